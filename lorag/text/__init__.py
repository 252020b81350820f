"""From a description to what generators see."""
