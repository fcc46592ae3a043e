"""Attention over slots: tensors in, tensors out."""
