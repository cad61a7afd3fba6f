"""Inputs that break formulas, as data: sizes, overflow, denormals, poison, rows that see nothing.

A trial is drawn in float64 and rounded to the dtype under test; the rounded tensors are then the
truth for everybody. Poison (inf and NaN) is written into keys and values that a mask hides; rows
that do see it are not judged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from foveal.attention.mask import Visibility
from foveal.attention.operands import OperandFields, Operands
from foveal.attention.spec import AttentionSpec

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 96, 32
SHIFT = 1e4
"""Added to all logits of the shifted trial."""

Make = Callable[[torch.Generator, torch.dtype], "Trial"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """One input under test: q [B, H, L, D], k and v [B, Hkv, L, D], the latter without poison."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spec: AttentionSpec
    given: OperandFields
    poison: torch.Tensor
    """bool [B, L]: keys and values that hold NaN and inf in what backends are given."""

    @property
    def seen(self) -> torch.Tensor:
        """bool [B or 1, 1, L, L]: who sees whom."""
        operands = Operands(**self.given)
        seen = Visibility.of(self.spec, self.q, self.k, operands).dense()
        return seen if operands.mask is None else seen & operands.mask

    @property
    def judged(self) -> torch.Tensor:
        """bool [B, H, L]: query rows that see no poison."""
        rows = ~(self.seen & self.poison[:, None, None, :]).any(-1)
        return rows.expand(BATCH, HEADS, LENGTH)

    @property
    def blind(self) -> torch.Tensor:
        """bool [B, H, L]: query rows that see nothing at all."""
        return (~self.seen.any(-1)).expand(BATCH, HEADS, LENGTH)

    @property
    def poisoned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k with NaN and v with infinity wherever there is poison."""
        where = self.poison[:, None, :, None]
        return self.k.masked_fill(where, math.nan), self.v.masked_fill(where, math.inf)


def trial(
    tensors: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    *,
    causal: bool = True,
    given: OperandFields | None = None,
    poison: torch.Tensor | None = None,
) -> Trial:
    """A trial of float64 tensors, rounded to `dtype`."""
    q, k, v = (x.to(dtype) for x in tensors)
    none = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    return Trial(
        q=q,
        k=k,
        v=v,
        spec=AttentionSpec.of(q, k, v, causal=causal),
        given=given or {},
        poison=none if poison is None else poison,
    )


def draw(rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Standard normal q, k and v in float64."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(BATCH, h, LENGTH, DIM, generator=rng).double() for h in heads)


def sized(factor: float, rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """All inputs `factor` times standard normal."""
    return trial(tuple(x * factor for x in draw(rng)), dtype)


def mixed(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Every row of q, k and v has a size of its own, from 1e-2 to 1e2."""

    def resize(x: torch.Tensor) -> torch.Tensor:
        return x * 10 ** (4 * torch.rand(*x.shape[:3], 1, generator=rng) - 2)

    return trial(tuple(map(resize, draw(rng))), dtype)


def overflow(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Products q . k beyond 65504, the largest float16, before they are scaled."""
    q, k, v = draw(rng)
    return trial((q + 50.0, k + 50.0, v), dtype)


def denormal(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Inputs below the smallest normal number of the dtype."""
    return sized(torch.finfo(dtype).smallest_normal / 8, rng, dtype)


def shifted(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """All logits of a row moved by about `SHIFT`, which no softmax may notice."""
    q, k, v = draw(rng)
    q[..., 0] = k[..., 0] = round(math.sqrt(SHIFT * math.sqrt(DIM)))
    return trial((q, k, v), dtype)


def behind_lengths(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Poison beyond each sequence's length."""
    lengths = torch.tensor([LENGTH // 2, LENGTH - 1])
    poison = torch.arange(LENGTH) >= lengths[:, None]
    return trial(draw(rng), dtype, causal=False, given={"kv_lengths": lengths}, poison=poison)


def behind_mask(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Poison in keys that a boolean mask hides from everybody."""
    poison = torch.rand(BATCH, LENGTH, generator=rng) < 0.25
    mask = ~poison[:, None, None, :].expand(BATCH, 1, LENGTH, LENGTH)
    return trial(draw(rng), dtype, causal=False, given={"mask": mask}, poison=poison)


def behind_some_rows(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Poison that a boolean mask hides from every second query; only those are judged."""
    poison = torch.rand(BATCH, LENGTH, generator=rng) < 0.25
    odd = (torch.arange(LENGTH) % 2 == 1)[:, None]
    mask = (~poison[:, None, :] | odd).unsqueeze(1)
    return trial(draw(rng), dtype, causal=False, given={"mask": mask}, poison=poison)


def behind_causal(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Poison in the last third of the keys; only the queries before are judged."""
    poison = (torch.arange(LENGTH) >= 2 * LENGTH // 3).repeat(BATCH, 1)
    return trial(draw(rng), dtype, poison=poison)


def blind_rows(rng: torch.Generator, dtype: torch.dtype) -> Trial:
    """Some rows, and one whole sequence, from which everything is hidden."""
    mask = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=rng) < 0.5
    mask[0, :, ::5] = False
    mask[1] = False
    return trial(draw(rng), dtype, given={"mask": mask})


FORWARD: dict[str, Make] = {
    "inputs at 1": partial(sized, 1.0),
    "inputs at 1e-2": partial(sized, 1e-2),
    "inputs at 1e2": partial(sized, 1e2),
    "inputs at 1e4": partial(sized, 1e4),
    "rows of 1e-2 to 1e2": mixed,
    "q . k beyond float16": overflow,
    "denormals": denormal,
    "logits + 1e4": shifted,
    "poison behind lengths": behind_lengths,
    "poison behind mask": behind_mask,
    "poison for some rows": behind_some_rows,
    "poison behind causal": behind_causal,
    "rows that see nothing": blind_rows,
}
"""Every trial, by what the table calls it."""

BACKWARD = (
    "inputs at 1",
    "logits + 1e4",
    "poison behind lengths",
    "poison behind mask",
    "rows that see nothing",
)
"""Trials whose gradients are finite numbers of the dtype, in every row."""
