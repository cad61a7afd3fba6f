"""Attention over pages by the native CPU kernels: which views they serve, and how to call them.

They read pages where they lie, in every storage format, for all sequences of a call at once: one
call for each store of a view, and one more for its sinks where a window has some, which are seen by
queries of their own. The results are merged by their log-sum-exp.
"""

from dataclasses import dataclass, replace

import torch

from foveal.attention import native
from foveal.attention.merge import merge
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.kernels.cpu.attention import Result
from foveal.kernels.cpu.paged import Codes, Paged, attention_paged
from foveal.kv.cache import JoinedView, View
from foveal.kv.formats import Format, Scales, Stored
from foveal.kv.store import PagedView


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Queries:
    """Who looks at a view."""

    q: torch.Tensor
    """[B, H, T, D], or packed [1, H, tokens, D]."""
    far_q: torch.Tensor
    """The same as far keys see them; see `Sight`."""
    positions: torch.Tensor
    """int [B, T] or [1, tokens], -1 for pads."""
    bounds: torch.Tensor | None = None
    """Integer [N + 1]: the first token of each packed sequence, and their end."""

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return len(self.q) if self.bounds is None else len(self.bounds) - 1


def obstacles(queries: Queries, view: View, spec: AttentionSpec) -> tuple[str, ...]:
    """Why the native kernels do not serve a view; empty if they do."""
    q = queries.q
    found = list(native.obstacles(spec, q.dtype, q.device.type))
    if spec.approximation is not Approximation.EXACT:
        found.append(f"computes exactly, not {spec.approximation.value}")
    if torch.is_grad_enabled() and (q.requires_grad or queries.far_q.requires_grad):
        found.append("no native backward pass over pages")
    if torch.compiler.is_compiling():
        found.append("no operator for compilers over pages")
    parts = _parts(view)
    if parts is None:
        found.append(f"{type(view).__name__} is more than pages")
    elif not all(_fits(queries, part, spec) for part in parts):
        found.append("queries that do not fit the pages, which the tiles refuse")
    return tuple(found)


def forward(queries: Queries, view: View, spec: AttentionSpec, near: AttentionSpec) -> Result:
    """`out` [B, H, T, Dv] in q's dtype, in float32 if it was merged, and `lse` float32 [B, H, T].

    `near` is the spec for keys that are no sinks of the view's window. Only where there are no
    `obstacles`.
    """
    parts = _parts(view)
    assert parts is not None
    window = view.window
    sinks = 0 if window is None else window.sinks
    with_sinks = [part for part in parts if sinks and _holds(part, sinks)]
    parts = tuple(part for part in parts if part.table.shape[1]) or parts[:1]
    if len(parts) + len(with_sinks) > 1:
        queries = replace(queries, q=queries.q.float(), far_q=queries.far_q.float())
    results = [
        attention_paged(
            queries.q,
            replace(_pages(part), first=sinks),
            native.rules(near),
            queries.positions,
            queries.bounds,
        )
        for part in parts
    ]
    for part in with_sinks:
        assert window is not None
        results.append(
            attention_paged(
                queries.far_q,
                replace(_pages(part), last=sinks),
                native.rules(spec),
                window.from_sinks(queries.positions),
                queries.bounds,
            )
        )
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return merge(outs, lses)


def _parts(view: View) -> tuple[PagedView, ...] | None:
    """The pages that a view consists of; None if there is more to it."""
    parts = view.parts if isinstance(view, JoinedView) else (view,)
    paged = tuple(part for part in parts if isinstance(part, PagedView))
    return paged if len(paged) == len(parts) else None


def _fits(queries: Queries, part: PagedView, spec: AttentionSpec) -> bool:
    shape, (_, heads, q_len, head_dim) = part.store.shape, queries.q.shape
    return (
        part.dtype == queries.q.dtype == queries.far_q.dtype
        and part.store.device == queries.q.device
        and queries.far_q.shape == queries.q.shape
        and queries.positions.shape == (len(queries.q), q_len)
        and queries.num_rows == part.num_rows
        and (heads, head_dim) == (spec.num_heads, spec.head_dim)
        and shape.num_kv_heads == spec.num_kv_heads
        and (shape.head_dim, shape.value_dim) == (spec.head_dim, spec.value_dim)
    )


def _holds(part: PagedView, sinks: int) -> bool:
    """Whether any of its pages may hold a sink."""
    return bool(((part.starts < sinks) & (part.table >= 0)).any())


def _pages(view: PagedView) -> Paged:
    store = view.store
    keys, values = (
        _codes(format, stored)
        for format, stored in zip(store.formats, store.stored(view.layer), strict=True)
    )
    return Paged(
        keys=keys,
        values=values,
        table=view.table,
        starts=view.starts,
        lengths=view.lengths,
    )


def _codes(format: Format, stored: Stored) -> Codes:
    return Codes(
        codes=stored.codes,
        scale=stored.scale,
        low=stored.low,
        per_channel=format.scales is Scales.CHANNEL,
    )
