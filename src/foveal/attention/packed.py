"""Sequences packed one after another: where each lies, and the way to take them one by one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec
from foveal.core.dtypes import accumulate_dtype

Result = tuple[torch.Tensor, torch.Tensor]
"""`out` and the natural log-sum-exp."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sequence i has the queries `q[i]` up to `q[i + 1]` and the keys `kv[i]` up to `kv[i + 1]`."""

    q: tuple[int, ...]
    kv: tuple[int, ...]

    def __len__(self) -> int:
        """Sequences."""
        return len(self.q) - 1

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each sequence."""
        for (a, b), (c, d) in zip(pairwise(self.q), pairwise(self.kv), strict=True):
            yield slice(a, b), slice(c, d)

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a sequence."""
        lengths = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in self]
        return max((q for q, _ in lengths), default=0), max((kv for _, kv in lengths), default=0)


class OneByOne(ABC):
    """A backend that takes the sequences of a packed call one by one."""

    @abstractmethod
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> Result:
        """See `Backend.run`."""

    def run_packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
        bounds: Bounds,
    ) -> Result:
        """See `Backend.run_packed`."""
        results = [nothing(q[:, :, :0], k[:, :, :0], v[:, :, :0])]
        for i, (rows, keys) in enumerate(bounds):
            part = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            if part[0].numel() and part[1].numel():
                results.append(self.run(*part, spec, _sequence(operands, i, rows, keys)))
            else:
                results.append(nothing(*part))
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
    """The result where there are no queries or no keys; gradients reach the inputs as zeros."""
    zero = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]) + zero
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=accumulate_dtype(q.dtype)) + zero
    return out, lse


def _sequence(operands: Operands, index: int, rows: slice, keys: slice) -> Operands:
    """The operands of one sequence."""
    q_positions, kv_positions, seed = operands.q_positions, operands.kv_positions, operands.seed
    return replace(
        operands,
        q_positions=None if q_positions is None else q_positions[rows],
        kv_positions=None if kv_positions is None else kv_positions[keys],
        seed=None if seed is None else seed + (index << 32),
    )
