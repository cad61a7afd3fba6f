"""Kernels in C++ for the CPU: one shared library, chosen from by instruction set at run time."""
