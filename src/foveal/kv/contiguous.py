"""`ContiguousCache`: one tensor of keys and one of values per layer, filled from the left.

Memory is allocated ahead, either once for a given capacity or by doubling, so an append writes
the new tokens only; what is there is copied just when an allocation is outgrown, which costs
O(1) per token on average. It wastes up to half of its memory when it doubles and shares nothing
between sequences; it is the simplest cache and the one that others are tested against.
"""

from typing import Self

import torch

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, CacheStats, KVView, check_append

_FIRST_CAPACITY = 64
"""Slots of the first allocation where no capacity is given."""


class ContiguousCache:
    """Keys and values side by side. Implements `KVCache`."""

    def __init__(
        self,
        shape: CacheShape,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`capacity` slots are allocated at once and never exceeded; None grows by doubling."""
        if capacity is not None and capacity < 1:
            raise ArgumentError("capacity", capacity, "an integer of at least 1, or None")
        self.shape = shape
        self.dtype = dtype
        self._limit = capacity
        self._length = 0
        self._written = 0
        """Layers that the step under way has written."""
        self._step = 0
        """Slots that the step under way adds."""
        self._num_growths = 0
        layers, slots = range(shape.num_layers), capacity or 0
        self._keys = [self._empty(shape.head_dim, slots, device) for _ in layers]
        self._values = [self._empty(shape.value_dim, slots, device) for _ in layers]
        self._positions: torch.Tensor | None = None
        """int64 [B, slots], once a step has given positions."""

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self._keys[0].device

    @property
    def length(self) -> int:
        """Slots in use."""
        return self._length

    @property
    def capacity(self) -> int:
        """Slots allocated in every layer."""
        return min(keys.shape[2] for keys in self._keys)

    @property
    def positions(self) -> torch.Tensor | None:
        """int64 [B, length], or None where slot j holds position j throughout."""
        return None if self._positions is None else self._positions[:, : self._length]

    @property
    def next_positions(self) -> torch.Tensor | None:
        """int64 [B], or None where slot j holds position j throughout."""
        return None if self.positions is None or not self._length else self.positions.amax(1) + 1

    @property
    def window(self) -> None:
        """It keeps everything."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.nbytes for t in (*self._keys, *self._values))

    @property
    def stats(self) -> CacheStats:
        """Counts for reports."""
        return CacheStats(
            length=self._length,
            capacity=self.capacity,
            used_bytes=self._length * self.shape.slot_elements * self.dtype.itemsize,
            allocated_bytes=self.nbytes,
            num_growths=self._num_growths,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> KVView:
        """Store the keys and values of one layer; see `KVCache.append`."""
        check_append(
            self.shape, self._keys[0], layer, k, v, written=self._written, slots=self._step
        )
        start, stop = self._length, self._length + k.shape[2]
        self._reserve(layer, stop)
        if layer == 0:
            self._step = k.shape[2]
            self._place(positions)
        keys, values = self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]
        keys[:, :, start:].copy_(k)
        values[:, :, start:].copy_(v)
        self._written = layer + 1
        if self._written == self.shape.num_layers:
            self._length, self._written = stop, 0
        placed = None if self._positions is None else self._positions[:, :stop]
        return KVView(keys, values, placed)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        if not 0 <= length <= self._length:
            raise ArgumentError("length", length, f"0 to the cache's length {self._length}")
        self._length, self._written = length, 0
        if length == 0:
            self._positions = None
        elif self._positions is not None:
            self._positions = self._positions[:, :length]

    def fork(self) -> Self:
        """An independent copy; costs one copy of what is stored."""
        other = type(self)(self.shape, capacity=self._limit, dtype=self.dtype, device=self.device)
        for layer in range(self.shape.num_layers):
            other._reserve(layer, self._length)
            for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
                theirs[layer][:, :, : self._length].copy_(mine[layer][:, :, : self._length])
        other._length = self._length
        other._positions = None if self.positions is None else self.positions.clone()
        return other

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self.truncate(0)

    def _empty(self, size: int, slots: int, device: torch.device | str) -> torch.Tensor:
        shape = (self.shape.batch, self.shape.num_kv_heads, slots, size)
        return torch.empty(shape, dtype=self.dtype, device=device)

    def _reserve(self, layer: int, slots: int) -> None:
        """Make room for `slots` in one layer, copying what is there if it must move."""
        held = self._keys[layer].shape[2]
        if slots <= held:
            return
        if self._limit is not None:
            accepted = f"at most {self._limit - self._length} more tokens (capacity {self._limit})"
            raise ArgumentError("k", f"{slots - self._length} tokens", accepted)
        grown = max(slots, 2 * held, _FIRST_CAPACITY)
        for tensors in (self._keys, self._values):
            old = tensors[layer]
            tensors[layer] = self._empty(old.shape[3], grown, old.device)
            tensors[layer][:, :, : self._length].copy_(old[:, :, : self._length])
        self._num_growths += layer == 0 and self._length > 0

    def _place(self, positions: torch.Tensor | None) -> None:
        """Remember the positions of the step's slots; nothing where slot = position throughout."""
        start, stop = self._length, self._length + self._step
        if positions is None and self._positions is None:
            return
        slots = torch.arange(stop, device=self.device).expand(self.shape.batch, -1)
        before = slots[:, :start] if self._positions is None else self._positions[:, :start]
        new = slots[:, start:] if positions is None else positions.to(slots)
        if new.shape != slots[:, start:].shape:
            accepted = f"[{self.shape.batch}, {self._step}]"
            raise ArgumentError("positions", f"shape {list(new.shape)}", accepted)
        self._positions = torch.cat([before, new], dim=1)
