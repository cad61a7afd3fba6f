"""Kernels written in plain PyTorch operators: they run anywhere."""
