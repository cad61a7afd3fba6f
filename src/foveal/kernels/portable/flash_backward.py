"""The backward pass of flash attention in PyTorch operators: linear memory, from the saved lse.

Probabilities are recomputed tile by tile as p = exp(s - lse) (Dao et al. 2022, 2023). With dp the
gradient that reaches a probability and delta = sum_j p_j dp_j = sum(d_out * out),

    ds = p * (dp - delta + d_lse),  dq = ds k * scale,  dk = ds^T q * scale,  dv = p^T d_out.

Rows that see nothing take and give no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from foveal.kernels.portable.flash_tiles import Plan, Span, Tile, fold, gather, scores
from foveal.kernels.portable.weigh import weigh

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BiasGradient = Callable[[Tile, slice], torch.Tensor]
"""The part of the bias's gradient to which that of a tile is added, once summed to its shape."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Saved:
    """What the forward pass leaves behind, and the gradients of its results."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    d_out: torch.Tensor
    d_lse: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Queries:
    """One tile of queries, folded to [B * Hkv, G * rows, ...]."""

    tile: Tile
    q: torch.Tensor
    """Multiplied by `plan.factor`."""
    lse: torch.Tensor
    """+inf where nothing is visible, so that exp(s - lse) is 0."""
    d_out: torch.Tensor
    delta: torch.Tensor
    """sum(d_out * out) - d_lse."""


def flash_backward(
    saved: Saved, plan: Plan, d_bias: BiasGradient | None = None, careful: bool = False
) -> Gradients:
    """dq, dk and dv in the dtype of the lse, in the shapes of q, k and v.

    Unless `careful`, inf or NaN behind the mask makes them inf or NaN: look, and call again.
    """
    dtype = saved.lse.dtype
    d_q, d_k, d_v = (x.new_zeros(x.shape, dtype=dtype) for x in (saved.q, saved.k, saved.v))
    for tile, spans in plan.tiles:
        queries = _fold_queries(saved, tile, plan)
        d_q_tile = torch.zeros_like(queries.q)
        for span in spans:
            k, v = (gather(x, tile, span.keys, dtype) for x in (saved.k, saved.v))
            parts = _differentiate(queries, k, v, span, plan, d_bias, careful)
            d_q_tile += parts[0]
            for total, part in ((d_k, parts[1]), (d_v, parts[2])):
                seen = total[tile.batch, :, span.keys]
                seen += part.view(seen.shape)
        rows = d_q[tile.batch, :, tile.rows]
        rows.copy_(d_q_tile.mul_(plan.factor).view(rows.shape))
    return d_q, d_k, d_v


def _fold_queries(saved: Saved, tile: Tile, plan: Plan) -> _Queries:
    dtype = saved.lse.dtype
    out, d_out = (fold(x, tile, plan, dtype) for x in (saved.out, saved.d_out))
    lse, d_lse = (fold(x.unsqueeze(-1), tile, plan, dtype) for x in (saved.lse, saved.d_lse))
    return _Queries(
        tile=tile,
        q=fold(saved.q, tile, plan, dtype) * plan.factor,
        lse=lse.masked_fill(lse == -math.inf, math.inf),
        d_out=d_out,
        delta=(d_out * out).sum(-1, keepdim=True) - d_lse,
    )


def _differentiate(
    queries: _Queries,
    k: torch.Tensor,
    v: torch.Tensor,
    span: Span,
    plan: Plan,
    d_bias: BiasGradient | None,
    careful: bool,
) -> Gradients:
    """What one tile of queries and one span of keys add to dq / plan.factor, dk and dv."""
    product = weigh if careful else torch.bmm
    tile = queries.tile
    s, products = scores(queries.q, k, tile, span, plan, careful)
    p = s.view(*queries.q.shape[:2], -1).sub_(queries.lse).exp_()
    d_s = torch.bmm(queries.d_out, v.mT)
    if plan.dropout is None:
        d_v = product(p.mT, queries.d_out)
    else:
        factors = plan.dropout(tile, span.keys).view(p.shape)
        d_v = product((p * factors).mT, queries.d_out)
        d_s.mul_(factors)
    d_s.sub_(queries.delta).mul_(p)
    if careful:
        d_s.masked_fill_(p == 0, 0.0)
    if d_bias is not None:
        part = d_bias(tile, span.keys)
        part += d_s.view(s.shape).sum_to_size(part.shape)
    if plan.softcap is not None:  # tanh' = 1 / cosh^2, as 1 - tanh^2 cancels near the cap
        d_s.div_(products.cosh_().square_().view(p.shape)).mul_(plan.softcap)
        if careful:
            d_s.masked_fill_(p == 0, 0.0)
    return product(d_s, k), product(d_s.mT, queries.q), d_v
