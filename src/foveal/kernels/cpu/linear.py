"""The native linear layer with narrow weights: one call of the library, without a copy of anything.

What is computed, and how weights lie, is described in linear.h; the loop in linear.cpp. Every sum
is taken in one order, whatever the number of rows or threads: a row alone gives the same bits as in
a batch. Sums begin at the bias; an element is off by at most (K + 1) 2^-24 sum |x w| and what the
bias adds to that.
"""

import ctypes

import torch

from foveal.kernels.cpu.library import load
from foveal.kernels.portable.panels import Panels, WeightFormat

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
"""`WeightFormat` in linear.h, by the dtype of the codes."""


class _Linear(ctypes.Structure):
    """`Linear` in linear.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("format", "outputs", "inputs", "group")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "low", "bias")),
    )


class BoundLinear:
    """A matrix and its bias where they lie in memory, which it keeps alive."""

    def __init__(
        self, panels: Panels, outputs: int, bias: torch.Tensor | None, form: WeightFormat
    ) -> None:
        """`bias` is float32 [outputs]. Raises `NotBuilt` where there is no native library."""
        inputs = panels.codes.shape[1]
        kept = (panels.codes, panels.scale, panels.low, bias)
        self._kept = tuple(None if t is None else t.contiguous() for t in kept)
        pointers = (None if t is None else t.data_ptr() for t in self._kept)
        group = form.group or inputs
        self._call = _Linear(_FORMATS[form.dtype], outputs, inputs, group, *pointers)
        self._where = ctypes.addressof(self._call)
        self._function = load().foveal_linear
        self._inputs, self._outputs = inputs, outputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K], contiguous, on the CPU, to [..., N]. Nothing is checked."""
        y = x.new_empty((*x.shape[:-1], self._outputs))
        rows = x.numel() // self._inputs
        self._function(
            self._where, x.data_ptr(), rows, self._inputs, y.data_ptr(), torch.get_num_threads()
        )
        return y
