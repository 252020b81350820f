"""How far a generated adapter can be trusted."""
