"""Base models: what loads them, what identifies them, which modules an adapter changes."""
