"""What the portable flash kernels share: the plan of tiles, and the scores of one tile.

A plan comes from the caller, who knows what the mask looks like: for each tile of queries, the
spans of keys to visit and the parts of them in which something is hidden. Query heads that share
a KV head are folded into the rows of one matrix, [B * Hkv, G * rows, D], so that keys and values
are never repeated.

What a mask hides may hold inf or NaN. Adding -inf to hidden scores is nine times as fast on a CPU
as filling them by a boolean mask, but lets inf and NaN through (inf - inf and 0 * inf are NaN).
So the kernels add, look whether the result is finite, and compute it again in the careful form,
by filling, if it is not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FEW_ROWS = 16
"""With at most so many rows, k @ q^T is up to twice as fast as q @ k^T (MKL, float32)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring keys that one tile of queries visits in one product."""

    keys: slice
    partial: tuple[slice, ...] = ()
    """The parts of `keys` in which some are hidden from some queries."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some queries of some sequences."""

    batch: slice
    rows: slice


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """One attention computation, tile by tile."""

    num_heads: int
    num_kv_heads: int
    scale: float
    softcap: float | None
    tiles: Sequence[tuple[Tile, Sequence[Span]]]
    """Every tile of queries that sees anything, and the spans of keys that it visits."""
    hidden: Callable[[Tile, slice], torch.Tensor]
    """bool, broadcastable to the scores [B, H, rows, keys] of a tile; True is hidden."""
    added: Callable[[Tile, slice], Sequence[torch.Tensor]]
    """What is added to the scores of a tile, summand by summand, each broadcastable to them."""
    dropout: Callable[[Tile, slice], torch.Tensor] | None
    """The factors [B, H, rows, keys] on the weights of a tile, if there is dropout."""

    @property
    def factor(self) -> float:
        """What queries are multiplied by before their product with the keys."""
        return self.scale if self.softcap is None else self.scale / self.softcap


def fold(x: torch.Tensor, tile: Tile, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """The tile's part of [B, H, Lq, N], as [B * Hkv, G * rows, N] in `dtype`."""
    part = x[tile.batch, :, tile.rows].to(dtype)
    batch, heads, rows, size = part.shape
    group = heads // plan.num_kv_heads
    return part.reshape(batch * plan.num_kv_heads, group * rows, size)


def gather(x: torch.Tensor, tile: Tile, keys: slice, dtype: torch.dtype) -> torch.Tensor:
    """Keys of [B, Hkv, Lk, N] as [B * Hkv, keys, N] in `dtype`; a view where that is possible."""
    return x[tile.batch, :, keys].to(dtype).flatten(0, 1)


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds inf or NaN, at the price of one pass: a sum cannot miss one. If it
    overflows of its own, the answer is no, and the careful form is taken needlessly."""
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors)


def scores(
    q: torch.Tensor, k: torch.Tensor, tile: Tile, span: Span, plan: Plan, careful: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores [B, H, rows, keys] of folded queries, multiplied by `plan.factor`, and gathered
    keys, -inf where hidden; and the bare products, the same tensor if there is no softcap."""
    few = q.shape[1] <= _FEW_ROWS
    products = torch.bmm(k, q.mT).mT.contiguous() if few else torch.bmm(q, k.mT)
    products = products.view(-1, plan.num_heads, _length(tile.rows), k.shape[1])
    s = products if plan.softcap is None else products.tanh().mul_(plan.softcap)
    for term in plan.added(tile, span.keys):
        s.add_(term)
    for keys in span.partial:
        start = keys.start - span.keys.start
        part, hidden = s[..., start : start + _length(keys)], plan.hidden(tile, keys)
        if careful:
            part.masked_fill_(hidden, -math.inf)
        else:
            part.add_(torch.zeros_like(hidden, dtype=s.dtype).masked_fill_(hidden, -math.inf))
    return s, products


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
