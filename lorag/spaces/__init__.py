"""Many adapters in one weight space."""
