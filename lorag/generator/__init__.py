"""The trained thing that a user holds: descriptions to adapters, with a gate."""
