"""An embedded world of small tasks in which the description decides; nothing in the library proper imports it."""
