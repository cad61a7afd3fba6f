"""`Arena`: scratch memory that is used again and again, for temporaries of one call after another.

A block of bytes is handed out from its beginning to its end within a frame and is free again when
the frame closes. What does not fit is allocated apart, and the block grows to the most that was
ever needed as soon as nothing lies in it, so a steady state allocates nothing. Large allocations
are worth avoiding on a CPU because the system hands them out as untouched pages, and each one's
first write is a page fault.

Frames nest and close in the opposite order. For one thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaStats:
    """What an arena holds and has done."""

    nbytes: int
    """Bytes of the block."""
    peak_bytes: int
    """Most bytes ever in use at once."""
    requests: int
    """Tensors asked for."""
    allocations: int
    """Allocations made for them: the block's, and those of tensors that did not fit."""


class Arena:
    """Scratch tensors on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = self._peak = self._depth = self._requests = self._allocations = 0

    @property
    def stats(self) -> ArenaStats:
        """Counts for reports."""
        return ArenaStats(
            nbytes=self._block.nbytes,
            peak_bytes=self._peak,
            requests=self._requests,
            allocations=self._allocations,
        )

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What is taken within is free again afterwards."""
        start = self._used
        self._depth += 1
        try:
            yield
        finally:
            self._used = start
            self._depth -= 1
            if not self._depth and self._peak > self._block.nbytes:
                self._block = self._allocate(self._peak)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of unspecified content, until the innermost frame closes."""
        assert self._depth, "scratch memory is taken within a frame"
        self._requests += 1
        start = self._used
        stop = start + prod(shape) * dtype.itemsize
        self._used = -(-stop // _ALIGNMENT) * _ALIGNMENT
        self._peak = max(self._peak, self._used)
        if stop > self._block.nbytes:
            return self._allocate(stop - start).view(dtype).view(shape)
        return self._block[start:stop].view(dtype).view(shape)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        self._allocations += 1
        # A block made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
