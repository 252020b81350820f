"""One adapter: PEFT's format in and out."""
