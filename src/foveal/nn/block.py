"""The transformer block: attention and MLP, each normalised before (and, in Gemma, after)."""

from dataclasses import dataclass

import torch
from torch import nn

from foveal.nn.attention import Attention, AttentionConfig, Step
from foveal.nn.mlp import MLP, MLPConfig
from foveal.nn.norm import NormConfig, make_norm
from foveal.nn.rope import Rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """One block."""

    attention: AttentionConfig
    mlp: MLPConfig
    norm: NormConfig
    post_norms: bool = False
    """Normalise what attention and MLP add, too, before it is added (Gemma 2 and 3)."""


class Block(nn.Module):
    """[B, T, E] -> [B, T, E]."""

    def __init__(self, config: BlockConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm)
        self.attention = Attention(config.attention, layer)
        self.mlp_norm = make_norm(config.norm)
        self.mlp = MLP(config.mlp)
        self.attention_post_norm = make_norm(config.norm) if config.post_norms else None
        self.mlp_post_norm = make_norm(config.norm) if config.post_norms else None

    def forward(self, x: torch.Tensor, rotation: Rotation | None, step: Step) -> torch.Tensor:
        """x + attention(norm(x)), then the same with the MLP."""
        added: torch.Tensor = self.attention(self.attention_norm(x), rotation, step)
        if self.attention_post_norm is not None:
            added = self.attention_post_norm(added)
        x = x + added
        added = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            added = self.mlp_post_norm(added)
        return x + added
