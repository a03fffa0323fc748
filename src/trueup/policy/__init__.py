"""Policy mathematics: tensors in, tensors out. No engines, no configuration objects, no input or output."""
