"""What an adapter, a bank or a generator says of itself, and where it may go."""
