"""The forward pass of flash attention in PyTorch operators, on any device, in any float dtype.

Online softmax (Milakov & Gimelshein 2018) over tiles (Dao et al. 2022, 2023): no [Lq, Lk] tensor
ever exists. Each span of keys gives a finished partial result, a softmax of its own and its
log-sum-exp; partial results are interpolated into one another,

    out = out + (part - out) * sigmoid(lse_part - lse),  lse = logaddexp(lse, lse_part).

PyTorch's fused softmax makes that a third faster on a CPU than to exponentiate, sum and rescale
in operators of their own. The log-sum-exp comes from the same softmax: its largest probability is
exp(max - lse).
"""

import math
from collections.abc import Sequence

import torch

from foveal.kernels.portable.flash_tiles import Plan, Span, Tile, fold, gather, is_finite, scores
from foveal.kernels.portable.weigh import weigh

Partial = tuple[torch.Tensor, torch.Tensor]
"""Folded `out` [B * Hkv, G * rows, Dv] and `lse` [B * Hkv, G * rows, 1]."""


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [B, H, Lq, Dv] in q's dtype and `lse` [B, H, Lq] in `dtype`, the accumulating one.

    q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]. Rows that see nothing give 0 and -inf.
    """
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=dtype)
    for tile, spans in plan.tiles:
        queries = fold(q, tile, plan, dtype) * plan.factor
        result = _attend_tile(queries, k, v, tile, spans, plan, False)
        if not is_finite(result[0]):
            result = _attend_tile(queries, k, v, tile, spans, plan, True)
        out_part, lse_part = out[tile.batch, :, tile.rows], lse[tile.batch, :, tile.rows]
        out_part.copy_(result[0].view(out_part.shape))
        lse_part.copy_(result[1].view(lse_part.shape))
    return out, lse


def _attend_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile: Tile,
    spans: Sequence[Span],
    plan: Plan,
    careful: bool,
) -> Partial:
    """Folded, scaled queries with all the keys that they see."""
    out, lse = _attend_span(q, k, v, tile, spans[0], plan, careful)
    for span in spans[1:]:
        part, part_lse = _attend_span(q, k, v, tile, span, plan, careful)
        weight = torch.sigmoid(part_lse - lse)
        if span.partial:  # -inf - -inf is NaN
            weight.masked_fill_(part_lse == -math.inf, 0.0)
        out.lerp_(part, weight)
        lse = torch.logaddexp(lse, part_lse)
    return out, lse


def _attend_span(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile: Tile,
    span: Span,
    plan: Plan,
    careful: bool,
) -> Partial:
    """Folded, scaled queries with one span of keys."""
    s, _ = scores(q, gather(k, tile, span.keys, q.dtype), tile, span, plan, careful)
    largest = s.amax(-1, keepdim=True)
    p = torch.softmax(s, -1, out=s)
    lse = largest - p.amax(-1, keepdim=True).log_()
    if span.partial:
        nothing = largest == -math.inf
        if nothing.any():
            p.masked_fill_(nothing, 0.0)
            lse.masked_fill_(nothing, -math.inf)
    if plan.dropout is not None:
        p.mul_(plan.dropout(tile, span.keys))
    product = weigh if careful else torch.bmm
    values = gather(v, tile, span.keys, q.dtype)
    return product(p.view(*q.shape[:2], -1), values), lse.view(*q.shape[:2], 1)
