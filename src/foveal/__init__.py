"""foveal: the full attention stack, from kernels to a serving engine."""
