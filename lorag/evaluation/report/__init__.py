"""The report of a ladder: one page and its figures."""
