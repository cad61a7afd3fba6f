"""Who sees whom: one predicate over positions, and the forms in which backends need it.

A key at position k is visible to a query at position q if

    (k <= q or not causal) and (k < sinks or q - left <= k <= q + right and q, k in one chunk)

and neither is a pad: a *given* position below 0, or a key at or beyond its sequence's length.
Default positions are q_i = i + Lk - Lq and k_j = j; where queries outnumber keys they begin below
0, and those are no pads.

Forms: `visible` and `Visibility.dense` (boolean tensors), `classify` (a tile is hidden, partial or
full, by interval arithmetic on the smallest and largest positions in it), `Visibility.tiles` (the
tiles that must be visited at all; found in closed form where positions are the default ones) and
`num_visible` (how many pairs, for cost models). The caller combines them with a boolean mask or a
bias, cut to the tile by `cut`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Self

import numpy as np
import torch

from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec

_FAR = 2**62
"""Beyond every position."""


class Sight(Enum):
    """What the queries of a tile see of its keys."""

    HIDDEN = "hidden"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Extent:
    """The positions in one tile of queries or keys, pads left out; `low > high` if none is left."""

    low: int
    high: int
    padded: bool = False
    """Whether the tile holds a pad."""


def visible(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """bool [..., Lq, Lk] from integer positions [..., Lq] and [..., Lk], none of them a pad."""
    q, k = q.unsqueeze(-1), k.unsqueeze(-2)
    distance = k - q
    seen = torch.ones_like(distance, dtype=torch.bool)
    if spec.left is not None:
        seen &= distance >= -spec.left
    if spec.right is not None and not spec.causal:
        seen &= distance <= spec.right
    if spec.chunk is not None:
        seen &= q // spec.chunk == k // spec.chunk
    if spec.sinks:
        seen |= k < spec.sinks
    if spec.causal:
        seen &= distance <= 0
    return seen


def classify(spec: AttentionSpec, q: Extent, k: Extent) -> Sight:
    """What the queries in `q` see of the keys in `k`.

    HIDDEN and FULL are certain; PARTIAL is the answer whenever the extents alone cannot tell.
    """
    left = _FAR if spec.left is None else spec.left
    right = _FAR if spec.right is None else spec.right
    if q.low > q.high or k.low > k.high or (spec.causal and k.low > q.high):
        return Sight.HIDDEN
    outside = k.high < q.low - left or k.low > q.high + right
    inside = k.low >= q.high - left and k.high <= q.low + right
    if spec.chunk is not None:
        first_q, last_q, first_k, last_k = (p // spec.chunk for p in (q.low, q.high, k.low, k.high))
        outside |= last_k < first_q or first_k > last_q
        inside &= first_q == last_q == first_k == last_k
    if outside and k.low >= spec.sinks:
        return Sight.HIDDEN
    sinks = k.high < spec.sinks and (not spec.causal or k.high <= q.low)
    full = (inside or sinks) and not q.padded and not k.padded
    return Sight.FULL if full else Sight.PARTIAL


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """Who sees whom in one call, from positions and lengths (boolean masks and biases aside)."""

    spec: AttentionSpec
    q_len: int
    kv_len: int
    device: torch.device
    q_given: torch.Tensor | None
    """int64 [B or 1, Lq], negative for a pad; None for the default positions."""
    kv_given: torch.Tensor | None
    """int64 [B or 1, Lk], negative for a pad; None for the default positions."""

    @classmethod
    def of(cls, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, operands: Operands) -> Self:
        """The visibility of a call with queries [..., Lq, D] and keys [..., Lk, D]."""
        q_len, kv_len = q.shape[-2], k.shape[-2]
        kv_given = _rows(operands.kv_positions)
        if operands.kv_lengths is not None:
            slots = torch.arange(kv_len, device=q.device)
            filled = slots < operands.kv_lengths.unsqueeze(-1)
            kv_given = torch.where(filled, slots if kv_given is None else kv_given, -1)
        return cls(spec, q_len, kv_len, q.device, _rows(operands.q_positions), kv_given)

    def q_positions(self, rows: slice) -> torch.Tensor:
        """int64 [B or 1, rows]."""
        if self.q_given is not None:
            return self.q_given[:, rows]
        offset = self.kv_len - self.q_len
        return _arange(rows, self.q_len, offset, self.device)

    def kv_positions(self, columns: slice) -> torch.Tensor:
        """int64 [B or 1, columns]."""
        if self.kv_given is not None:
            return self.kv_given[:, columns]
        return _arange(columns, self.kv_len, 0, self.device)

    def distances(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """int64 [B or 1, 1, rows, columns]: position of the key less that of the query."""
        q, k = self.q_positions(rows), self.kv_positions(columns)
        return (k.unsqueeze(-2) - q.unsqueeze(-1)).unsqueeze(1)

    def dense(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """bool [B or 1, 1, rows, columns]: the mask of one tile, or of the whole call."""
        q, k = self.q_positions(rows), self.kv_positions(columns)
        seen = visible(self.spec, q, k)
        if self.q_given is not None:
            seen = seen & (q >= 0).unsqueeze(-1)
        if self.kv_given is not None:
            seen = seen & (k >= 0).unsqueeze(-2)
        return seen.unsqueeze(1)

    def whole(self) -> Sight:
        """What the queries see of the keys, taking the call as one tile."""
        if not self.q_len or not self.kv_len:
            return Sight.HIDDEN
        return classify(self.spec, self._q_extents(self.q_len)[0], self._kv_extents(self.kv_len)[0])

    def tiles(
        self, q_tile: int, kv_tile: int
    ) -> Iterator[tuple[slice, tuple[tuple[slice, Sight], ...]]]:
        """For each tile of queries, its rows and the tiles of keys that are not hidden from it.

        Tiles start at multiples of their size, so that sums have the same order whatever the
        window. With the default positions only tiles near the visible ranges are looked at.
        """
        q_extents, kv_extents = self._q_extents(q_tile), self._kv_extents(kv_tile)
        for i, q in enumerate(q_extents):
            seen: list[tuple[slice, Sight]] = []
            for start, stop in self._ranges(q):
                for j in range(start // kv_tile, -(-stop // kv_tile)):
                    columns = slice(j * kv_tile, min((j + 1) * kv_tile, self.kv_len))
                    sight = classify(self.spec, q, kv_extents[j])
                    if sight is not Sight.HIDDEN and (not seen or seen[-1][0] != columns):
                        seen.append((columns, sight))
            yield slice(i * q_tile, min((i + 1) * q_tile, self.q_len)), tuple(seen)

    def _ranges(self, q: Extent) -> tuple[tuple[int, int], ...]:
        """Ranges of key indices outside of which nothing is visible to the queries in `q`."""
        if self.kv_given is not None:
            return ((0, self.kv_len),)
        return key_ranges(self.spec, q, self.kv_len)

    def _q_extents(self, tile: int) -> list[Extent]:
        if self.q_given is not None:
            return _extents(self.q_given, tile)
        return _default_extents(self.q_len, self.kv_len - self.q_len, tile)

    def _kv_extents(self, tile: int) -> list[Extent]:
        if self.kv_given is not None:
            return _extents(self.kv_given, tile)
        return _default_extents(self.kv_len, 0, tile)


def key_ranges(spec: AttentionSpec, q: Extent, kv_len: int) -> tuple[tuple[int, int], ...]:
    """Ranges [start, stop) of keys, at default positions, that queries with positions from
    `q.low` to `q.high` see: the sinks and the band, or one range where they meet."""
    start, stop = 0, kv_len
    if spec.left is not None:
        start = max(start, q.low - spec.left)
    if spec.right is not None:
        stop = min(stop, q.high + spec.right + 1)
    if spec.chunk is not None:
        start = max(start, q.low // spec.chunk * spec.chunk)
        stop = min(stop, (q.high // spec.chunk + 1) * spec.chunk)
    sinks = min(spec.sinks, kv_len, q.high + 1 if spec.causal else kv_len)
    if start <= sinks:
        start, stop, sinks = 0, max(sinks, stop), 0
    return tuple((a, b) for a, b in ((0, sinks), (start, stop)) if a < b)


@lru_cache(maxsize=4096)
def num_visible(spec: AttentionSpec, q_len: int, kv_len: int) -> int:
    """How many of the Lq * Lk pairs are visible at default positions. O(Lq), cached."""
    q = np.arange(kv_len - q_len, kv_len, dtype=np.int64)
    start, stop = np.zeros_like(q), np.full_like(q, kv_len)
    if spec.left is not None:
        start = np.maximum(start, q - spec.left)
    if spec.right is not None:
        stop = np.minimum(stop, q + spec.right + 1)
    if spec.chunk is not None:
        start = np.maximum(start, q // spec.chunk * spec.chunk)
        stop = np.minimum(stop, (q // spec.chunk + 1) * spec.chunk)
    limit = np.minimum(kv_len, q + 1) if spec.causal else np.full_like(q, kv_len)
    sinks = np.clip(np.minimum(limit, spec.sinks), 0, None)
    beyond = stop - np.maximum(start, sinks)
    return int((sinks + np.clip(beyond, 0, None)).sum())


def cut(operand: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """The part of a mask or bias, broadcastable to [B, H, Lq, Lk], that covers a tile. A view."""
    operand = operand[(None,) * (4 - operand.ndim)]
    if operand.shape[-2] > 1:
        operand = operand[..., rows, :]
    return operand[..., columns] if operand.shape[-1] > 1 else operand


def _rows(positions: torch.Tensor | None) -> torch.Tensor | None:
    if positions is None:
        return None
    return positions.long() if positions.ndim == 2 else positions.long().unsqueeze(0)


def _arange(part: slice, length: int, offset: int, device: torch.device) -> torch.Tensor:
    start, stop, _ = part.indices(length)
    return torch.arange(start + offset, stop + offset, device=device).unsqueeze(0)


def _default_extents(length: int, offset: int, tile: int) -> list[Extent]:
    starts = range(0, length, tile)
    return [Extent(i + offset, min(i + tile, length) - 1 + offset) for i in starts]


def _extents(positions: torch.Tensor, tile: int) -> list[Extent]:
    """The extents of positions [B, L], tile by tile over L, the whole batch together."""
    batch, length = positions.shape
    num_tiles = -(-length // tile)
    if not batch:
        return [Extent(0, -1)] * num_tiles
    # The last tile is filled up with its last position, which changes no extent.
    index = torch.arange(num_tiles * tile, device=positions.device).clamp(max=length - 1)
    tiles = positions[:, index].view(batch, num_tiles, tile)
    low = tiles.masked_fill(tiles < 0, _FAR).amin((0, 2)).tolist()
    high = tiles.amax((0, 2)).tolist()
    padded = (tiles < 0).any(2).any(0).tolist()
    return [Extent(*ends) for ends in zip(low, high, padded, strict=True)]
