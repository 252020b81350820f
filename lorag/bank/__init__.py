"""Banks of experts."""
