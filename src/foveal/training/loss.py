"""Cross-entropy without the logits of every token at once.

For N tokens and a vocabulary of V, logits and their gradient are 2 N V numbers: at V = 128,000 far
more than the model. Here tokens are taken in chunks, and each chunk's logits are computed again in
the backward pass (Chen et al. 2016, "Training deep nets with sublinear memory cost") instead of
kept, so that only one chunk's logits exist at a time, at the price of the output product twice.
Where all logits are smaller than one chunk may be, nothing is recomputed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from foveal.core.dtypes import accumulate_dtype

IGNORE = -100
"""Target of a position that is not scored."""

CHUNK_LOGITS = 2**23
"""Logits that may exist at once: 32 MiB in float32."""


def cross_entropy_sum(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> torch.Tensor:
    """Sum over tokens of -log p(target), in float32 (float64 for float64), natural logarithm.

    `hidden` [B, T, E] and `targets` [B, T] (int64; `IGNORE` is not scored); `logits_of` maps
    [tokens, E] to [tokens, vocab_size].
    """
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = max(1, chunk_logits // vocab_size)
    if len(rows) <= size:
        return _chunk_sum(rows, wanted, logits_of)
    total = torch.zeros((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    for part, want in zip(torch.split(rows, size), torch.split(wanted, size), strict=True):
        total = total + checkpoint(_chunk_sum, part, want, logits_of, use_reentrant=False)
    return total


def _chunk_sum(
    rows: torch.Tensor,
    targets: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    logits = logits_of(rows)
    wide = logits.to(accumulate_dtype(logits.dtype))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")
