"""Normalisation: RMSNorm (Zhang and Sennrich 2019), its Gemma variant, and LayerNorm.

Statistics and scaling are computed in float32 (float64 for float64 inputs) and rounded once to
the input's dtype. Gemma stores its weight as a distance from one, so that zero means "no change".
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn

from foveal.core.dtypes import accumulate_dtype
from foveal.kernels.cpu.rows import rms_norm, serves


class NormKind(Enum):
    """Which normalisation a model uses."""

    RMS = "rms"
    RMS_OFFSET = "rms_offset"
    """RMSNorm whose factor is 1 + weight (Gemma)."""
    LAYER = "layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """One normalisation over the last dimension."""

    size: int
    """Elements that are normalised together."""
    eps: float
    """Added to the mean square (RMS) or variance (layer)."""
    kind: NormKind = NormKind.RMS


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight); any shape [..., size]."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `x`."""
        if serves(x) and self.weight.dtype == x.dtype:
            return rms_norm(x, self.weight, self.eps, self.offset)
        wide = accumulate_dtype(x.dtype)
        weight = self.weight.to(wide)
        if self.offset:
            weight = weight + self.offset
        return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


def make_norm(config: NormConfig) -> RMSNorm | nn.LayerNorm:
    """The module that `config` describes. Its initial state changes nothing but the scale."""
    if config.kind is NormKind.LAYER:
        return nn.LayerNorm(config.size, eps=config.eps)
    return RMSNorm(config.size, config.eps, offset=float(config.kind is NormKind.RMS_OFFSET))
