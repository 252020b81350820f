"""Pure neural networks: tensors in, tensors out. No files, no tokenizers, no losses, no logging."""
