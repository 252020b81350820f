"""Files: read as if hostile, written as if the power may fail."""
