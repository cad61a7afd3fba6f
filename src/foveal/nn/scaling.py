"""Rotary scaling: how checkpoints stretch their rotary frequencies beyond the trained length.

Each kind is a frozen record of a checkpoint's numbers that yields the inverse frequencies of the
D/2 pairs, computed in float32 step by step as the reference implementation does, because the
weights were trained or tuned against those very values. `attention_factor` multiplies the cosines
and sines. A kind that is `length_dependent` changes with the length of the sequence, so keys that
were cached at a shorter length keep the frequencies of their time.

Papers: position interpolation (Chen et al. 2023), YaRN (Peng et al. 2023), LongRoPE (Ding et al.
2024); dynamic NTK was never published as a paper, llama3 is described in the Llama 3 herd report.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Scaling(Protocol):
    """One kind of rotary scaling."""

    @property
    def length_dependent(self) -> bool:
        """Whether the frequencies depend on how long the sequence is."""

    @property
    def attention_factor(self) -> float:
        """Factor on the cosines and sines."""

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2], for sequences of `length` tokens."""


def plain_frequencies(theta: float, dim: int) -> torch.Tensor:
    """theta^(-2i/dim), float32 [dim / 2] (Su et al. 2021)."""
    return 1.0 / _powers(theta, dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoScaling:
    """The frequencies as they are."""

    length_dependent: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        return plain_frequencies(theta, dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`."""

    factor: float
    length_dependent: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        return plain_frequencies(theta, dim) / self.factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """Tokens per sequence before the context was extended."""
    length_dependent: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        plain = plain_frequencies(theta, dim)
        wavelength = 2 * math.pi / plain
        turns = self.original_length / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ramp = (1 - smooth) * plain / self.factor + smooth * plain
        slow = wavelength > self.original_length / self.low_freq_factor
        fast = wavelength < self.original_length / self.high_freq_factor
        return torch.where(slow, plain / self.factor, torch.where(fast, plain, ramp))


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """NTK by parts: a linear ramp over the pairs from kept to interpolated frequencies (YaRN)."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    """Turns within the original length from which on a pair is kept as it is."""
    beta_slow: float = 1.0
    """Turns up to which a pair is fully interpolated."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole pairs."""
    length_dependent: ClassVar[bool] = False

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        low, high = (self._pair(beta, theta, dim) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept, powers = 1 - ramp, _powers(theta, dim)
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def _pair(self, turns: float, theta: float, dim: int) -> float:
        """The (fractional) pair that makes `turns` turns within the original length."""
        ratio = self.original_length / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicScaling:
    """Dynamic NTK: theta grows with the length of the sequence beyond the trained length."""

    factor: float
    original_length: int
    length_dependent: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        # The length enters as a float32 tensor, as in the reference implementation.
        longest = torch.tensor(max(length, self.original_length))
        stretch = self.factor * longest / self.original_length - (self.factor - 1)
        grown = theta * stretch ** (dim / (dim - 2))
        return 1.0 / grown ** (torch.arange(0, dim, 2).float() / dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongScaling:
    """LongRoPE: one factor per pair, one set for short and one for long sequences (Phi-3)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    """Sequences longer than this take the long factors."""
    attention_factor: float
    length_dependent: ClassVar[bool] = True

    def frequencies(self, theta: float, dim: int, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [dim / 2]."""
        factors = self.long_factor if length > self.original_length else self.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _powers(theta, dim))


def _powers(theta: float, dim: int) -> torch.Tensor:
    """theta^(2i/dim), float32 [dim / 2]."""
    powers: torch.Tensor = theta ** (torch.arange(0, dim, 2).float() / dim)
    return powers
