"""From a bank to a generator with its gate."""
