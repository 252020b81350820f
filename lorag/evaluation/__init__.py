"""The ladder of scores and its controls."""
