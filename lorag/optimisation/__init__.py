"""Gradient steps through a frozen base model, and the loop under every learned generator."""
