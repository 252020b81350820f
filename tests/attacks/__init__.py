"""Attacks: one file an abuse; what is refused, with which error, and at what cost in memory."""
