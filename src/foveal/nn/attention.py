"""The attention layer: projections, rotation, cache, and `attend_view`.

MHA and MQA are the two ends of GQA; which one it is, the window, the scale and the softcap are all
in the layer's `AttentionSpec`. Queries, keys and values come from one matrix, in this order.
"""

from dataclasses import dataclass

import torch
from torch import nn

from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.kv.cache import KVCache, KVView, View
from foveal.nn.norm import NormConfig, make_norm
from foveal.nn.rope import Rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """One attention layer."""

    width: int
    """E: elements in and out."""
    spec: AttentionSpec
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: NormConfig | None = None
    """Normalisation of every query and key head before its rotation (Qwen3, Gemma 3)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """What the layers of one call share."""

    positions: torch.Tensor | None = None
    """Integer [B, T], -1 for pads; None where tokens simply follow the cache's slots."""
    cache: KVCache | None = None
    backend: str = "auto"
    """The attention backend's name."""


class Attention(nn.Module):
    """[B, T, E] -> [B, T, E]."""

    def __init__(self, config: AttentionConfig, layer: int) -> None:
        """`layer` is the layer's index in the cache."""
        super().__init__()
        self.spec, self.layer = config.spec, layer
        spec = config.spec
        self.sizes = (
            spec.num_heads * spec.head_dim,
            spec.num_kv_heads * spec.head_dim,
            spec.num_kv_heads * spec.value_dim,
        )
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=config.qkv_bias)
        inner = spec.num_heads * spec.value_dim
        self.output = nn.Linear(inner, config.width, bias=config.output_bias)
        norm = config.head_norm
        self.q_norm = None if norm is None else make_norm(norm)
        self.k_norm = None if norm is None else make_norm(norm)

    def forward(self, x: torch.Tensor, rotation: Rotation | None, step: Step) -> torch.Tensor:
        """`rotation` is None where positions were added to the embedding."""
        q, k, v = self._project(x)
        far_q = None
        if rotation is not None:
            far_q = None if rotation.far is None else rotation.far.apply(q)
            q, k = rotation.apply(q), rotation.apply(k)
        view: View = KVView(k, v, step.positions)
        if step.cache is not None:
            view = step.cache.append(self.layer, k, v, step.positions)
        heads = attend_view(
            q, view, self.spec, q_positions=step.positions, far_q=far_q, backend=step.backend
        )
        out: torch.Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return out

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], not yet rotated."""
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k = (part.unflatten(-1, (-1, self.spec.head_dim)) for part in parts[:2])
        v = parts[2].unflatten(-1, (-1, self.spec.value_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
