"""Every intermediate of the textbook computation by name: to learn, to debug, to compare with.

The steps are those of the `unfused` backend (`backends.unfused.steps`), not a second version of
them, so what a trace shows is what that backend computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Unpack

import torch

from foveal.attention.api import seeded
from foveal.attention.backends.unfused import steps
from foveal.attention.merge import with_sink
from foveal.attention.operands import OperandFields, Operands
from foveal.attention.spec import AttentionSpec
from foveal.attention.validate import check
from foveal.core.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """The steps of one call, in order. Floating ones are in the accumulating dtype (float32, or
    float64 for float64) except `out`; None is a step that the spec does not have."""

    scores: torch.Tensor
    """q . k, [B, H, Lq, Lk]."""
    scaled: torch.Tensor
    """scores * scale."""
    capped: torch.Tensor | None = None
    """softcap * tanh(scaled / softcap)."""
    mask: torch.Tensor
    """bool [B or 1, H or 1, Lq, Lk]: True where the query sees the key."""
    biased: torch.Tensor | None = None
    """With ALiBi and the additive bias."""
    masked: torch.Tensor
    """-inf where hidden."""
    row_max: torch.Tensor
    """Largest visible score of each query, [B, H, Lq, 1]; 0 where there is none."""
    exponentials: torch.Tensor
    """exp(masked - row_max)."""
    denominator: torch.Tensor
    """Sum of the exponentials, [B, H, Lq, 1]."""
    probabilities: torch.Tensor
    """exponentials / denominator; zeros where nothing is visible."""
    dropped: torch.Tensor | None = None
    """Probabilities after dropout, those kept divided by 1 - dropout."""
    sink_weight: torch.Tensor | None = None
    """The share of each query's softmax that went to its head's learned sink, [B, H, Lq]."""
    out: torch.Tensor
    """[B, H, Lq, Dv] in q's dtype, as `attend` returns it: dropped @ v * (1 - sink_weight)."""
    lse: torch.Tensor
    """[B, H, Lq], as `attend` returns it: row_max + log(denominator), the sink included."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each step that took place, in order."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def __str__(self) -> str:
        return "\n".join(f"{name:14} {_summary(value)}" for name, value in self)


def trace(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    **operands: Unpack[OperandFields],
) -> Trace:
    """Compute attention step by step and keep every step. Arguments as `attend`.

    Holds about eight [B, H, Lq, Lk] tensors. Raises `ArgumentError` for bad arguments, and where
    there are no keys, of which there is nothing to show.
    """
    given = Operands(**operands)
    spec = check(q, k, v, spec, given)
    if not k.shape[2]:
        raise ArgumentError("k", f"shape {list(k.shape)}", "at least one key")
    found = dict(steps(q, k, v, spec, seeded(given, spec)))
    found["out"] = found["out"].to(q.dtype)
    if given.sink_logits is not None:
        found["out"], found["lse"] = with_sink(found["out"], found["lse"], given.sink_logits)
        share = torch.exp(given.sink_logits.unsqueeze(-1) - found["lse"])
        found["sink_weight"] = share.nan_to_num(0.0)  # a sink of -inf where nothing is visible
    return Trace(**found)


def _summary(value: torch.Tensor) -> str:
    shape = f"{list(value.shape)!s:20}"
    if value.dtype == torch.bool:
        return f"{shape} {int(value.sum())} of {value.numel()} visible"
    if not value.numel():
        return shape
    return f"{shape} from {value.min():.4g} to {value.max():.4g}"
