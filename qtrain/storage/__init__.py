"""Quantized tensors as they are stored, one kind a file; exact sizes, and bytes without loss."""
