"""Attention over a cache's view, tile by tile: the way to paged, quantised and windowed caches.

Each tile of the view is brought into the form that `attend` takes (pages gathered, codes widened),
attended to by any backend, and merged into the result by its log-sum-exp, so a cache is never
widened as a whole. Portable, exact to rounding, for inference. The temporaries are one tile of
keys and values and one result of the queries' size.

`attend_view` takes [B, H, T, D] queries, as a model's layers have them; `attend_paged` takes
sequences of different lengths packed together: decoding and chunks of prompts in one call.
"""

import torch

from foveal.attention.api import attend
from foveal.attention.merge import merge
from foveal.attention.spec import AttentionSpec
from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ArgumentError
from foveal.kv.cache import KVView, View, Window

Result = tuple[torch.Tensor, torch.Tensor]


def attend_view(
    q: torch.Tensor,
    view: View,
    spec: AttentionSpec,
    *,
    q_positions: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of q [B, H, T, D] over everything that a cache holds: out [B, H, T, Dv].

    `q_positions` is int [B, T], -1 for pads; None where queries are the last slots of a view that
    is one tile without positions. Arguments and errors otherwise as `attend`.
    """
    if isinstance(view, KVView):
        out = attend(
            q,
            view.keys,
            view.values,
            spec,
            backend=backend,
            q_positions=q_positions,
            kv_positions=view.positions,
        )
        assert isinstance(out, torch.Tensor)
        return out
    if q_positions is None:
        raise ArgumentError("q_positions", None, "int [B, T]: this cache's slots are in no order")
    return _over_tiles(q, view, spec, q_positions, backend)[0].to(q.dtype)


def narrow(spec: AttentionSpec, window: Window | None) -> AttentionSpec:
    """The spec in which a query sees no more than the cache promises to keep.

    Without this, a chunk's early queries would see keys that its late ones evict.
    """
    if window is None:
        return spec
    left = window.size - 1 if spec.left is None else min(spec.left, window.size - 1)
    return spec.replace(window=(left, spec.right), sinks=max(spec.sinks, window.sinks))


def _over_tiles(
    q: torch.Tensor, view: View, spec: AttentionSpec, q_positions: torch.Tensor, backend: str
) -> Result:
    """`out` in the dtype of sums, and `lse`, over all tiles of a view."""
    if spec.dropout:
        raise ArgumentError("spec", f"dropout {spec.dropout}", "no dropout over a cache's tiles")
    spec, wide = narrow(spec, view.window), accumulate_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:3], spec.value_dim), dtype=wide)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for tile in view.tiles():
        part = attend(
            q,
            tile.keys,
            tile.values,
            spec,
            backend=backend,
            return_lse=True,
            q_positions=q_positions,
            kv_positions=tile.positions,
        )
        out, lse = merge((out, part[0]), (lse, part[1]))
    return out, lse
