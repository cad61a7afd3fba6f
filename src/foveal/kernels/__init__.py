"""Raw code that computes: portable PyTorch, and native kernels where they are built."""
