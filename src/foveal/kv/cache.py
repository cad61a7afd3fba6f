"""What every key/value cache is: the protocol, and the view that attention computes on.

A step of a model appends the new keys and values layer by layer, in order. The length advances
once, when the last layer has been written, so that a step that fails half-way leaves no trace: the
next step begins again at layer 0 and overwrites it. Slots are counted in tokens and the same for
every sequence of the batch; a slot that holds a pad has position -1.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """The sizes of a model's keys and values."""

    num_layers: int
    batch: int
    """Sequences B."""
    num_kv_heads: int
    head_dim: int
    """Size D of a key head."""
    value_dim: int
    """Size Dv of a value head."""

    @property
    def slot_elements(self) -> int:
        """Elements that one slot (one token of every sequence) takes in all layers."""
        return self.num_layers * self.batch * self.num_kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class KVView:
    """The keys and values of one layer, as `attend` takes them. Shares the cache's memory."""

    keys: torch.Tensor
    """[B, Hkv, S, D]"""
    values: torch.Tensor
    """[B, Hkv, S, Dv]"""
    positions: torch.Tensor | None
    """int64 [B, S], -1 where a slot holds nothing; None where slot j holds position j."""

    @property
    def valid(self) -> torch.Tensor | None:
        """bool [B, S]: which slots hold a token; None for all."""
        return None if self.positions is None else self.positions >= 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """What a cache holds and has done."""

    length: int
    """Slots in use, in tokens."""
    capacity: int
    """Slots allocated, in tokens."""
    used_bytes: int
    allocated_bytes: int
    num_growths: int
    """How often what was there had to be copied into a larger allocation."""


class KVCache(Protocol):
    """Where the keys and values of the past live."""

    @property
    def length(self) -> int:
        """Slots in use, pads included; the same for each sequence. Kept, never inferred."""

    @property
    def positions(self) -> torch.Tensor | None:
        """int64 [B, length], -1 for pads; None where slot j holds position j throughout."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""

    @property
    def stats(self) -> CacheStats:
        """Counts for reports."""

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> KVView:
        """Store k [B, Hkv, T, D] and v [B, Hkv, T, Dv]; the view holds all there is, these too.

        `positions` is int [B, T] with -1 for pads; None continues at slot = position. It counts at
        layer 0 and is the same for the other layers of the step. Raises `ArgumentError` for a
        layer out of order, tensors that do not fit, or tensors that require a gradient.
        """

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on. Raises `ArgumentError` beyond what is there."""

    def fork(self) -> Self:
        """An independent cache with the same content."""

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
