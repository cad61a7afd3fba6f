"""Attention over a cache's view: the way to paged, quantised and windowed caches.

Pages are read by the native kernels where they lie (`native_pages`). Any other view, and pages
where there are obstacles (`view_kernel` names them), go tile by tile: each is brought into the form
that `attend` takes, attended to by any backend, and merged into the result by its log-sum-exp, so a
cache is never widened as a whole. Exact to rounding, for inference.

Keys keep the rotation of their absolute position, so distances within a window are right for ever.
Sinks, and whatever else a view calls far, are attended to apart, by queries rotated as if those
keys stood right before the window (`Window.from_sinks`): no query meets a distance that is longer
than what is kept, and no key is ever rewritten.

`attend_view` takes [B, H, T, D] queries, as a model's layers have them; `attend_paged` takes
sequences of different lengths packed together: decoding and chunks of prompts in one call.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from foveal.attention import native_pages
from foveal.attention.api import attend
from foveal.attention.merge import merge, with_sink
from foveal.attention.native_pages import Queries
from foveal.attention.spec import AttentionSpec
from foveal.attention.validate import read_bounds
from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ArgumentError
from foveal.kernels.available import native_isa
from foveal.kv.cache import KVView, Sight, View, Window

Result = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Terms:
    """How one call computes."""

    spec: AttentionSpec
    backend: str
    memory_budget: int | None


def attend_view(
    q: torch.Tensor,
    view: View,
    spec: AttentionSpec,
    *,
    q_positions: torch.Tensor | None = None,
    far_q: torch.Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    """Attention of q [B, H, T, D] over everything that a cache holds: out [B, H, T, Dv].

    `q_positions` is int [B, T], -1 for pads; None where queries are the last slots of a view that
    is one tile without positions. `far_q` [B, H, T, D] is q as sinks and other far keys see it,
    rotated at `Window.from_sinks`; None where it is the same. Arguments and errors otherwise as
    `attend`.
    """
    if isinstance(view, KVView):
        return attend(
            q,
            view.keys,
            view.values,
            spec,
            backend=backend,
            memory_budget=memory_budget,
            q_positions=q_positions,
            kv_positions=view.positions,
        )
    if q_positions is None:
        raise ArgumentError("q_positions", None, "int [B, T]: this cache's slots are in no order")
    terms = _Terms(spec=spec, backend=backend, memory_budget=memory_budget)
    far_q = q if far_q is None else far_q
    queries = Queries(q=q, far_q=far_q, positions=q_positions)
    if not _obstacles(queries, view, terms):
        near = narrow(spec, view.window)
        return native_pages.forward(queries, view, spec, near)[0].to(q.dtype)
    return _over_tiles((q, far_q), q_positions, view, terms)[0].to(q.dtype)


def attend_paged(
    q: torch.Tensor,
    view: View,
    spec: AttentionSpec,
    cu_seqlens_q: torch.Tensor,
    q_positions: torch.Tensor,
    *,
    far_q: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Result:
    """Attention of packed queries, each sequence over its own row of the view.

    q (and `far_q`, see `attend_view`) is [tokens, H, D] in the dtype of the view's tiles;
    sequence i has the queries `cu_seqlens_q[i]` up to `cu_seqlens_q[i + 1]` (integers [N + 1]; a
    sequence may have none) and row i of the view. `q_positions` is int [tokens]. `sink_logits` [H]
    join every softmax.

    Natively it is one call. Tile by tile, sequences with as many queries and about as many keys run
    together, so less than half of what is computed is padding.

    Returns `out` [tokens, H, Dv] in q's dtype and `lse` [tokens, H]. Raises `ArgumentError`, and
    what `attend` raises.
    """
    bounds = _check_packed(q, view, cu_seqlens_q, q_positions)
    far_q = q if far_q is None else far_q
    terms = _Terms(spec=spec, backend=backend, memory_budget=memory_budget)
    packed = _packed(q, far_q, q_positions, cu_seqlens_q)
    if not _obstacles(packed, view, terms):
        part = native_pages.forward(packed, view, spec, narrow(spec, view.window))
        if sink_logits is not None:
            part = with_sink(*part, sink_logits)
        return part[0][0].transpose(0, 1).to(q.dtype), part[1][0].transpose(0, 1)
    out = q.new_zeros((*q.shape[:2], spec.value_dim))
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulate_dtype(q.dtype))
    for index, tokens in _alike(bounds, q_positions):
        queries = (q[tokens].transpose(1, 2), far_q[tokens].transpose(1, 2))
        part = _over_tiles(queries, q_positions[tokens], view.rows(index), terms)
        if sink_logits is not None:
            part = with_sink(*part, sink_logits)
        out[tokens] = part[0].transpose(1, 2).to(q.dtype)
        lse[tokens] = part[1].transpose(1, 2)
    return out, lse


def view_kernel(
    q: torch.Tensor,
    view: View,
    spec: AttentionSpec,
    q_positions: torch.Tensor,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> str:
    """Who computes `attend_view` of such a call: "native AVX-512", or "tiles: " and why."""
    terms = _Terms(spec=spec, backend=backend, memory_budget=memory_budget)
    why_not = _obstacles(Queries(q=q, far_q=q, positions=q_positions), view, terms)
    return f"tiles: {'; '.join(why_not)}" if why_not else f"native {native_isa()}"


def narrow(spec: AttentionSpec, window: Window | None) -> AttentionSpec:
    """The spec in which a query sees no more than the cache promises to keep.

    Without this, a chunk's early queries would see keys that its late ones evict. A layer whose
    own window is smaller needs nothing, sinks neither.
    """
    if window is None or (spec.left is not None and spec.left < window.size):
        return spec
    sinks = max(spec.sinks, window.sinks)
    return spec.replace(window=(window.size - 1, spec.right), sinks=sinks)


def _obstacles(queries: Queries, view: View, terms: _Terms) -> tuple[str, ...]:
    """Why a view goes tile by tile; empty if the native kernels read its pages."""
    if terms.backend not in ("auto", "flash"):
        return (f"the backend is {terms.backend}",)
    if terms.memory_budget is not None:
        return ("a memory budget is given, which each tile keeps",)
    return native_pages.obstacles(queries, view, terms.spec)


def _packed(
    q: torch.Tensor, far_q: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor
) -> Queries:
    """Packed [tokens, H, D] queries as [1, H, tokens, D]."""
    q, far_q = (x.transpose(0, 1).unsqueeze(0) for x in (q, far_q))
    return Queries(q=q, far_q=far_q, positions=positions.unsqueeze(0), bounds=bounds)


def _check_packed(
    q: torch.Tensor, view: View, cu_seqlens_q: torch.Tensor, q_positions: torch.Tensor
) -> list[int]:
    """The bounds of the sequences, once the packed queries have been checked against them."""
    if q.ndim != 3:
        raise ArgumentError("q", f"shape {list(q.shape)}", "[tokens, H, D]")
    if q_positions.shape != q.shape[:1]:
        accepted = f"[{q.shape[0]}], one position for each query"
        raise ArgumentError("q_positions", f"shape {list(q_positions.shape)}", accepted)
    bounds = read_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    if len(bounds) - 1 != view.num_rows:
        accepted = f"{view.num_rows + 1} bounds, for the view's {view.num_rows} sequences"
        raise ArgumentError("cu_seqlens_q", f"{len(bounds)} bounds", accepted)
    return bounds


def _alike(bounds: list[int], q_positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences that may run as one batch: their rows [n] and their queries' indices [n, T]."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    positions = q_positions.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            reach = max(positions[start:stop]) + 1
            groups[stop - start, reach.bit_length()].append(row)
    device = q_positions.device
    return [
        (
            torch.tensor(rows, device=device),
            torch.tensor(
                [list(range(bounds[row], bounds[row + 1])) for row in rows], device=device
            ),
        )
        for rows in groups.values()
    ]


def _over_tiles(
    queries: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    view: View,
    terms: _Terms,
) -> Result:
    """`out` in the dtype of sums, and `lse`, over all tiles of a view; `queries` are near and far
    [B, H, T, D]."""
    if terms.spec.dropout:
        raise ArgumentError("spec", f"dropout {terms.spec.dropout}", "no dropout over tiles")
    q, wide = queries[0], accumulate_dtype(queries[0].dtype)
    near = replace(terms, spec=narrow(terms.spec, view.window))
    out = q.new_zeros((*q.shape[:3], terms.spec.value_dim), dtype=wide)
    sight = Sight(
        q=q,
        far_q=queries[1],
        positions=positions,
        scale=terms.spec.resolved_scale,
        first=_first_visible(near.spec, terms.spec.sinks, positions),
        lse=q.new_full(q.shape[:3], -torch.inf, dtype=wide),
    )
    for tile in view.tiles(sight):
        parts = [_attend(sight, part, near, terms) for part in _parts(tile, view.window, positions)]
        sight.tile_lse = parts[0][1]
        for _, lse in parts[1:]:
            sight.tile_lse = torch.logaddexp(sight.tile_lse, lse)
        for part in parts:
            if tile.heads is None:
                out, sight.lse = merge((out, part[0]), (sight.lse, part[1]))
            else:
                index = _query_heads(tile.heads, terms.spec.group_size)
                merged = merge((out[:, index], part[0]), (sight.lse[:, index], part[1]))
                out[:, index], sight.lse[:, index] = merged
    return out, sight.lse


def _first_visible(near: AttentionSpec, own_sinks: int, positions: torch.Tensor) -> int:
    """The lowest position that any query may see, sinks of the cache aside."""
    real = positions[positions >= 0]
    if near.left is None or own_sinks or not real.numel():
        return 0
    return max(0, int(real.min()) - near.left)


def _query_heads(kv_heads: torch.Tensor, group_size: int) -> torch.Tensor:
    """int64 [n * G]: the query heads that share these KV heads."""
    offsets = torch.arange(group_size, device=kv_heads.device)
    return (kv_heads.unsqueeze(1) * group_size + offsets).flatten()


def _attend(sight: Sight, tile: KVView, near: _Terms, far: _Terms) -> Result:
    """One tile alone, seen from where its keys are."""
    terms, q, positions = near, sight.q, sight.positions
    if tile.q_positions is not None:
        terms, q, positions = far, sight.far_q, tile.q_positions
    spec = terms.spec
    if tile.heads is not None:
        q = q[:, _query_heads(tile.heads, spec.group_size)]
        spec = spec.of_heads(tile.heads.tolist())
    return attend(
        q,
        tile.keys,
        tile.values,
        spec,
        backend=terms.backend,
        return_lse=True,
        memory_budget=terms.memory_budget,
        q_positions=positions,
        kv_positions=tile.positions,
    )


def _parts(tile: KVView, window: Window | None, positions: torch.Tensor) -> list[KVView]:
    """A tile's keys that are not sinks, and its sinks, which are far, if there are any."""
    if window is None or tile.q_positions is not None:
        return [tile]
    sinks, rest = _split(tile, window.sinks)
    if sinks is None:
        return [rest]
    return [rest, replace(sinks, q_positions=window.from_sinks(positions))]


def _split(tile: KVView, num_sinks: int) -> tuple[KVView | None, KVView]:
    """The sinks in a tile, None if there are none, and the tile without them.

    Each sequence may have its sinks in other slots, because of pads.
    """
    assert tile.positions is not None
    sinks = torch.arange(num_sinks, device=tile.positions.device)
    is_sink = tile.positions.unsqueeze(1) == sinks.unsqueeze(1)  # [B, sinks, S]
    found = is_sink.any(-1)
    if not found.any():
        return None, tile
    slots = is_sink.int().argmax(-1)[:, None, :, None]
    keys, values = (
        x.gather(2, slots.expand(-1, x.shape[1], -1, x.shape[3])) for x in (tile.keys, tile.values)
    )
    hidden = tile.positions.masked_fill(is_sink.any(1), -1)
    return (
        replace(tile, keys=keys, values=values, positions=torch.where(found, sinks, -1)),
        replace(tile, positions=hidden),
    )
