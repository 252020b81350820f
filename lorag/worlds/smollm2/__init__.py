"""Real tasks for SmolLM2-135M-Instruct."""
