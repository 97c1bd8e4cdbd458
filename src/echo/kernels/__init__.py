"""Kernels and their plain-torch twins. They take tensors, never the library's structures."""
