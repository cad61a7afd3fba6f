"""Merge partial results of attention over disjoint keys into the result over all of them.

A partial result is (out, lse), and softmax over the union of keys weighs each part by
exp(lse_part - lse_total) (Milakov & Gimelshein 2018; the "merge state" of Ye et al. 2024,
FlashInfer). A part that saw nothing, (0, -inf), is the identity. Weights are taken relative to
the largest lse, so no difference between parts overflows; sums are kept in float32, or float64 for
float64. The order of the parts changes the result by rounding only. Differentiable throughout, a
row that no part saw included: its gradients are 0.
"""

import math
from collections.abc import Sequence

import torch

from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ArgumentError


def merge(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of the keys of at least one partial result.

    `outs` are [..., L, Dv], zeros where nothing was visible; `lses` are [..., L], natural
    logarithm, -inf there. Returns `out` in the dtype of the first part and `lse` in float32
    (float64 for float64).
    """
    if not outs or len(outs) != len(lses):
        raise ArgumentError("outs, lses", f"{len(outs)} and {len(lses)}", "as many, at least one")
    weights, total = _weights(lses)
    out = sum(part * weight.unsqueeze(-1) for part, weight in zip(outs, weights, strict=True))
    assert isinstance(out, torch.Tensor)
    return out.to(outs[0].dtype), total


def with_sink(
    out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [B, H, L, Dv] and `lse` [B, H, L] after one logit per head, `sink_logits` [H], has
    joined every softmax: a part without a value (GPT-OSS)."""
    (weight, _), total = _weights((lse, sink_logits.unsqueeze(-1).expand_as(lse)))
    return (out * weight.unsqueeze(-1)).to(out.dtype), total


def _weights(lses: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Each part's share exp(lse - total), and the total; 0 and -inf where all are -inf."""
    parts = torch.stack([lse.to(accumulate_dtype(lse.dtype)) for lse in lses])
    largest = parts.detach().amax(0)
    hidden = largest == -math.inf
    largest = largest.masked_fill(hidden, 0.0)
    shares = torch.exp(parts - largest)
    # Replacing the sum, not the result, keeps 0 * inf out of the gradients of hidden rows.
    mass = shares.sum(0).masked_fill(hidden, 1.0)
    total = (largest + torch.log(mass)).masked_fill(hidden, -math.inf)
    return (shares / mass).unbind(0), total
