"""Tasks, their descriptions and examples."""
