"""The tensors that travel beside a spec, checked once at the door."""

from dataclasses import dataclass
from typing import TypedDict

import torch


class OperandFields(TypedDict, total=False):
    """Keyword arguments that `attend` and its kin take beside q, k, v and the spec."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    sink_logits: torch.Tensor | None
    kv_lengths: torch.Tensor | None
    q_positions: torch.Tensor | None
    kv_positions: torch.Tensor | None
    seed: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Operands:
    """Tensors (and the dropout seed) of one call; None where the call has none."""

    mask: torch.Tensor | None = None
    """bool, broadcastable to [B, H, Lq, Lk]; True is visible."""
    bias: torch.Tensor | None = None
    """Floating, broadcastable to [B, H, Lq, Lk]; added to the scores. -inf hides."""
    sink_logits: torch.Tensor | None = None
    """[H]: one learned logit per head that joins every softmax without a value (GPT-OSS)."""
    kv_lengths: torch.Tensor | None = None
    """Integer [B]: keys j >= kv_lengths[b] are hidden. Positions do not move."""
    q_positions: torch.Tensor | None = None
    """Integer [B, Lq] or [Lq]; default i + Lk - Lq. A given position below 0 marks a pad,
    which sees nothing."""
    kv_positions: torch.Tensor | None = None
    """Integer [B, Lk] or [Lk]; default j. A position below 0 marks an empty slot, which is
    hidden."""
    seed: int | None = None
    """Seed of dropout; None draws one from PyTorch's default generator."""

    @property
    def present(self) -> frozenset[str]:
        """Names of the tensors that are there."""
        tensors = ("mask", "bias", "sink_logits", "kv_lengths", "q_positions", "kv_positions")
        return frozenset(name for name in tensors if getattr(self, name) is not None)
