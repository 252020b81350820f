"""Measurements: `python -m benchmarks` prints medians and ratios taken in one run."""
