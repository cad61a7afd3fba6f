"""The MLP of a block: plain (GPT-2) or gated (SwiGLU and GeGLU, Shazeer 2020).

A gated MLP keeps gate and up projection in one matrix, gate first, so that its input is read once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from foveal.core.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPConfig:
    """One MLP. Raises `ConfigError` for an unknown activation."""

    width: int
    """E: elements in and out."""
    inner: int
    """F: elements between."""
    activation: str = "silu"
    """A key of `ACTIVATIONS`; "gelu_tanh" is the approximation by tanh."""
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            accepted = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation: got {self.activation!r}; accepted: {accepted}")


class MLP(nn.Module):
    """[..., E] -> [..., E]."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        rows = 2 * config.inner if config.gated else config.inner
        self.up = nn.Linear(config.width, rows, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = self.activation(gate) * up
        else:
            x = self.activation(x)
        out: torch.Tensor = self.down(x)
        return out
