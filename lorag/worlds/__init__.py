"""Embedded worlds: a base model, tasks and a bank that ship with lorag."""
