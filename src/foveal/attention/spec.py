"""What is computed: `AttentionSpec`, the description of one attention call without its tensors.

A spec is frozen, hashable and prints in one line, so that it can be the key of a tuning table and
of a benchmark record. Everything that is a tensor travels beside it (`operands.Operands`).

For query *i* of Lq and key *j* of Lk the score is

    s = softcap * tanh(scale * q_i . k_j / softcap) + alibi_h * (p_j - p_i) + bias_ij

(without the tanh if there is no softcap), and the key is visible as `mask.py` defines from the
positions p_i = i + Lk - Lq and p_j = j, which calls may replace. Rows in which nothing is visible
give zeros and a log-sum-exp of minus infinity.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self, TypedDict, Unpack

import torch

from foveal.core.errors import ArgumentError


class Approximation(Enum):
    """Whether the result is exact, or which approximation the caller asks for."""

    EXACT = "exact"
    TOPK = "topk"
    BLOCK_SPARSE = "blocksparse"
    LOW_RANK = "lowrank"


class SpecFields(TypedDict, total=False):
    """The fields of a spec that do not follow from the shapes; for `AttentionSpec.of`."""

    causal: bool
    window: tuple[int | None, int | None] | None
    chunk: int | None
    sinks: int
    scale: float | None
    softcap: float | None
    dropout: float
    alibi: tuple[float, ...] | None
    approximation: Approximation


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One attention computation, without its tensors. Raises `ArgumentError` for bad fields."""

    num_heads: int
    """Query heads H."""
    num_kv_heads: int
    """Key/value heads Hkv; divides H. Equal to H is MHA, 1 is MQA, between is GQA."""
    head_dim: int
    """Size D of a query or key head."""
    value_dim: int = 0
    """Size Dv of a value head; 0 means D."""
    causal: bool = False
    """A query sees no key behind its own position (aligned bottom-right: the last query is at
    the last key)."""
    window: tuple[int | None, int | None] | None = None
    """(left, right): a query at p sees keys in [p - left, p + right]; None is unbounded."""
    chunk: int | None = None
    """A query sees only keys of its own aligned chunk of this many positions."""
    sinks: int = 0
    """Keys at positions below this stay visible whatever window and chunk say."""
    scale: float | None = None
    """Factor on q . k; None means 1 / sqrt(D)."""
    softcap: float | None = None
    """Scores are squeezed into (-softcap, softcap) by tanh (Gemma 2)."""
    dropout: float = 0.0
    """Probability with which an attention weight is dropped."""
    alibi: tuple[float, ...] | None = None
    """One slope per query head, on the distance p_j - p_i (Press et al. 2022);
    `alibi_slopes(H)` gives the paper's."""
    approximation: Approximation = Approximation.EXACT

    def __post_init__(self) -> None:
        if self.value_dim == 0:
            object.__setattr__(self, "value_dim", self.head_dim)
        self._check_sizes()
        self._check_mask()
        self._check_scores()

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **fields: Unpack[SpecFields]
    ) -> Self:
        """The spec whose heads and head sizes are those of `q`, `k` and `v`.

        Takes `[B, H, L, D]` or packed `[tokens, H, D]` tensors.
        """
        axis = 1 if q.ndim == 4 else -2
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.ndim not in (3, 4) or tensor.ndim != q.ndim:
                accepted = "[B, H, L, D] tensors, or packed [tokens, H, D] tensors, all alike"
                raise ArgumentError(name, f"shape {list(tensor.shape)}", accepted)
        return cls(
            num_heads=q.shape[axis],
            num_kv_heads=k.shape[axis],
            head_dim=q.shape[-1],
            value_dim=v.shape[-1],
            **fields,
        )

    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def resolved_scale(self) -> float:
        """The factor on q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def left(self) -> int | None:
        """How far back a query sees, None for all the way."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """How far ahead a query sees, None for all the way; 0 if causal."""
        if self.causal:
            return 0
        return None if self.window is None else self.window[1]

    @property
    def restricted(self) -> bool:
        """Whether positions alone hide any key from any query."""
        return self.left is not None or self.right is not None or self.chunk is not None

    def __str__(self) -> str:
        heads = f"{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        size = f"{self.head_dim}"
        if self.value_dim != self.head_dim:
            size += f"|{self.value_dim}"
        words = [f"{heads} heads of {size}", "causal" if self.causal else "full"]
        if self.window is not None:
            left, right = ("∞" if side is None else str(side) for side in self.window)
            words.append(f"window {left}" if self.causal else f"window {left}:{right}")
        for name in ("chunk", "sinks", "scale", "softcap", "dropout"):
            value = getattr(self, name)
            if value or (name == "scale" and value is not None):
                words.append(f"{name} {value:g}")
        if self.alibi is not None:
            words.append("ALiBi")
        if self.approximation is not Approximation.EXACT:
            words.append(self.approximation.value)
        return ", ".join(words)

    def replace(self, **fields: Unpack[SpecFields]) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **fields)

    def of_heads(self, kv_heads: Sequence[int]) -> Self:
        """The same of some KV heads only, and of the query heads that share them."""
        groups = [range(h * self.group_size, (h + 1) * self.group_size) for h in kv_heads]
        slopes = self.alibi and tuple(self.alibi[h] for group in groups for h in group)
        return dataclasses.replace(
            self,
            num_heads=len(groups) * self.group_size,
            num_kv_heads=len(groups),
            alibi=slopes,
        )

    def _check_sizes(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "value_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(name, value, "an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            accepted = f"a divisor of num_heads={self.num_heads}"
            raise ArgumentError("num_kv_heads", self.num_kv_heads, accepted)

    def _check_mask(self) -> None:
        if self.window is not None:
            if not isinstance(self.window, tuple) or len(self.window) != 2:
                raise ArgumentError("window", self.window, "a pair (left, right) or None")
            for side in self.window:
                if side is not None and (not isinstance(side, int) or side < 0):
                    accepted = "(left, right), each an integer of at least 0, or None"
                    raise ArgumentError("window", self.window, accepted)
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise ArgumentError("chunk", self.chunk, "an integer of at least 1, or None")
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ArgumentError("sinks", self.sinks, "an integer of at least 0")

    def _check_scores(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise ArgumentError("scale", self.scale, "a finite number, or None for 1/sqrt(D)")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ArgumentError("softcap", self.softcap, "a positive number, or None")
        if not 0 <= self.dropout < 1:
            raise ArgumentError("dropout", self.dropout, "a probability in [0, 1)")
        if self.alibi is not None and (
            len(self.alibi) != self.num_heads or not all(map(math.isfinite, self.alibi))
        ):
            accepted = f"a finite slope for each of {self.num_heads} heads, or None"
            raise ArgumentError("alibi", self.alibi, accepted)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al. 2022): geometric from 2^(-8/n), interleaved if n is not
    a power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return tuple(slopes + between)
