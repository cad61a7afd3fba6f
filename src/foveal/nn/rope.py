"""Rotary position embedding (Su et al. 2021), exact at any position.

The checkpoint's float32 inverse frequencies are widened to float64, where angles, cosines and
sines are computed; these are rounded to float32, in which the heads are rotated; the result is
rounded once to the model's dtype. Position 10^8 is therefore as exact as position 10
(float32 angles, as they are common, are off by several radians there).

Pairs are (i, i + D/2), the "half" layout of Hugging Face checkpoints, not the interleaved one of
the paper. Only the first `dim` elements of a head are rotated.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ConfigError
from foveal.kernels.cpu.rows import rotate, serves
from foveal.nn.scaling import NoScaling, Scaling


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """One set of rotary frequencies."""

    dim: int
    """Leading elements of each head that are rotated; even."""
    theta: float = 10_000.0
    """Base of the wavelengths: pair i turns once in 2 pi theta^(2i/dim) tokens."""
    scaling: Scaling = field(default_factory=NoScaling)

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"rotary dim: got {self.dim}; accepted: an even number above 0")


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Cosines and sines of one call, [B or 1, 1, T or 1, dim / 2], float32 (float64 if the
    model is)."""

    cos: torch.Tensor
    sin: torch.Tensor
    far: "Rotation | None" = None
    """The rotation of queries for far keys, where it is another (`Window.from_sinks`)."""

    @classmethod
    def at(
        cls, config: RopeConfig, positions: torch.Tensor, length: int, dtype: torch.dtype
    ) -> "Rotation":
        """The rotation at integer `positions` [B or 1, T] for a model computing in `dtype`.

        `length` is the length of the longest sequence so far; it matters to length-dependent
        scaling only. Pads (negative positions) are turned by nothing.
        """
        known = length if config.scaling.length_dependent else 0
        angles = _angles(config, positions.clamp(min=0), known)
        wide, factor = accumulate_dtype(dtype), config.scaling.attention_factor
        return cls((angles.cos() * factor).to(wide), (angles.sin() * factor).to(wide))

    @classmethod
    def back(cls, config: RopeConfig, positions: torch.Tensor, dtype: torch.dtype) -> "Rotation":
        """The rotation that turns heads back by integer `positions` [B or 1, T], or forth by
        negative ones: of a key rotated at p, turned back by d, is left what `at` makes of it at
        p - d, to rounding.

        Not for length-dependent scaling, which need not have turned it by the same angles.
        """
        angles, wide = _angles(config, positions, 0), accumulate_dtype(dtype)
        return cls(angles.cos().to(wide), -angles.sin().to(wide))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Turn heads [B, H, T, D] (queries or keys); same shape and dtype."""
        whole = self.cos.shape[2] == x.shape[2]  # the native one reads a row for every position
        if whole and serves(x) and self.cos.dtype == x.dtype:
            return rotate(x, self.cos, self.sin)
        half = self.cos.shape[-1]
        wide = x.to(self.cos.dtype)
        first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
        turned = [
            first * self.cos - second * self.sin,
            second * self.cos + first * self.sin,
        ]
        return torch.cat([*turned, rest], dim=-1).to(x.dtype)


def _angles(config: RopeConfig, positions: torch.Tensor, length: int) -> torch.Tensor:
    """float64 [B or 1, 1, T, dim / 2]."""
    frequencies = _frequencies(config, length, positions.device)
    # float64 cosines reduce their argument modulo 2 pi with more digits of pi than we could.
    return (positions.double().unsqueeze(-1) * frequencies).unsqueeze(1)


@lru_cache(maxsize=256)
def _frequencies(config: RopeConfig, length: int, device: torch.device) -> torch.Tensor:
    """float64 [dim / 2], kept outside of any module so that no cast of a model rounds it."""
    with torch.inference_mode(False), torch.device("cpu"):
        return config.scaling.frequencies(config.theta, config.dim, length).double().to(device)
