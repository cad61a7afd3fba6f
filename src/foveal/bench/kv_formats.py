"""What each storage format takes, everything counted, and what it costs in exactness.

Bytes are those of a page as a store allocates it, scales included. The error is that of attention
on a model's own keys and values: its queries, keys and values over a text of its context
length are taken from every layer; keys and values are stored page by page and read back, and the
output of attention over them is held against that over the ones that were never stored, in float64.
It is given relative to the root mean square of the exact output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from foveal.attention.spec import AttentionSpec
from foveal.bench.accuracy import plain
from foveal.bench.finding import Check, Finding
from foveal.bench.record import Run
from foveal.core.errors import ConfigError
from foveal.engine.llm import LLM
from foveal.kv.cache import CacheShape
from foveal.kv.formats import FORMATS, Format
from foveal.kv.store import PageStore
from foveal.models.bundled import bundled_model
from foveal.models.config import ModelConfig
from foveal.nn.attention import Attention
from foveal.nn.rope import Rotation

HEAD_DIMS = (64, 128)
PAGE_SIZE = 64
SHARE_OF_BFLOAT16 = 0.55
"""That int8 may take."""


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What one layer computes attention of, in float64."""

    spec: AttentionSpec
    q: torch.Tensor
    """[1, H, T, D]"""
    k: torch.Tensor
    """[1, Hkv, T, D]"""
    v: torch.Tensor
    """[1, Hkv, T, D]"""

    @property
    def seen(self) -> torch.Tensor:
        """bool [T, T]"""
        length = self.q.shape[2]
        return torch.ones(length, length, dtype=torch.bool).tril()

    def attention(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[1, H, T, D] over these keys and values."""
        return plain(self.q, k, v, self.spec, self.seen)


def measure(llm: LLM, ids: Sequence[int], run: Run) -> Iterator[Finding]:
    """Every format, for pages of both sizes of a head and for the keys of this model."""
    layers = heads_of(llm, ids)
    bundled = llm.directory == bundled_model()
    name = "the bundled model" if bundled else llm.directory.name
    length = layers[0].q.shape[2]
    exact = [layer.attention(layer.k, layer.v) for layer in layers]
    for format in FORMATS:
        values: dict[str, float | None] = {}
        checks = []
        for head_dim in HEAD_DIMS:
            share = page_bytes(format.name, head_dim) / page_bytes("bfloat16", head_dim)
            values[f"page_of_heads_{head_dim}_bytes"] = float(page_bytes(format.name, head_dim))
            values[f"of_bfloat16_{head_dim}_ratio"] = share
            what = f"bytes of a page over those in bfloat16, heads of {head_dim}"
            checks.append(Check(what=what, value=share, at_most=SHARE_OF_BFLOAT16))
        errors = [_error(layer, out, format) for layer, out in zip(layers, exact, strict=True)]
        values["rms_error"] = max(rms for rms, _ in errors)
        values["largest_error"] = max(largest for _, largest in errors)
        yield Finding(
            benchmark="kv",
            part="formats",
            title=(
                f"Pages of {PAGE_SIZE} tokens (keys and values of one head); attention over "
                f"{length} stored keys of {name}, the worst of {len(layers)} layers"
            ),
            subject={"format": format.name},
            values=values,
            checks=tuple(checks) if format.name == "int8" else (),
            curve={
                "layer_rms_error": tuple(rms for rms, _ in errors),
                "layer_largest_error": tuple(largest for _, largest in errors),
            },
            run=run,
        )


def page_bytes(format: str, head_dim: int) -> int:
    """Of the keys and values of one head, as a store would allocate them."""
    shape = CacheShape(num_layers=1, batch=1, num_kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    return PageStore(
        shape, 1, PAGE_SIZE, key_format=format, value_format=format, device="meta"
    ).page_bytes


def heads_of(llm: LLM, ids: Sequence[int]) -> list[Heads]:
    """Queries, keys and values of every layer over these tokens, as many whole pages of them as
    the model's context holds. Raises `ConfigError` for a model that adds or scales positions
    otherwise than by rotation alone."""
    model, config = llm.model, llm.model.config
    if config.rope is None or config.head_norm:
        raise ConfigError("this model's keys cannot be had from its projections and rotation alone")
    length = min(len(ids), config.max_positions) // PAGE_SIZE * PAGE_SIZE
    if not length:
        raise ConfigError(f"text: got {len(ids)} tokens; accepted: a page of {PAGE_SIZE} or more")
    attentions = [part for part in model.modules() if isinstance(part, Attention)]
    found: list[torch.Tensor] = []
    hooks = [
        attention.qkv.register_forward_hook(lambda module, given, out: found.append(out))
        for attention in attentions
    ]
    with torch.inference_mode():
        model.hidden(torch.tensor([ids[:length]], device=model.device))
    for hook in hooks:
        hook.remove()
    return [
        _heads(config, attention, out) for attention, out in zip(attentions, found, strict=True)
    ]


def _heads(config: ModelConfig, attention: Attention, qkv: torch.Tensor) -> Heads:
    q, k, v = (
        part.reshape(*part.shape[:2], -1, config.head_dim).transpose(1, 2)
        for part in torch.split(qkv, list(attention.sizes), dim=-1)
    )
    rope = config.rotary(attention.layer)
    assert rope is not None
    positions = torch.arange(qkv.shape[1], device=qkv.device).unsqueeze(0)
    rotation = Rotation.at(rope, positions, 0, qkv.dtype)
    q, k = rotation.apply(q), rotation.apply(k)
    return Heads(attention.spec, q.double(), k.double(), v.double())


def _error(layer: Heads, exact: torch.Tensor, format: Format) -> tuple[float, float]:
    """Root mean square and largest error of the output, relative to its root mean square."""
    k, v = (_stored(x, format) for x in (layer.k, layer.v))
    off = layer.attention(k, v) - exact
    scale = exact.square().mean().sqrt()
    return (off.square().mean().sqrt() / scale).item(), (off.abs().max() / scale).item()


def _stored(x: torch.Tensor, format: Format) -> torch.Tensor:
    """[1, Hkv, T, D] as it is read back from pages of this format."""
    pages = x.float().reshape(*x.shape[:2], -1, PAGE_SIZE, x.shape[3])
    return format.decode(format.encode(pages), torch.float32).flatten(2, 3).double()
