"""Gemma 2 and the text models of Gemma 3.

Norms scale by 1 + weight and stand before and after attention and MLP; embeddings are scaled by
sqrt(E); layers with and without a window alternate. Gemma 2 caps scores and logits; Gemma 3
normalises heads instead and gives the layers with a window rotary positions of their own.
"""

import math

from foveal.models.config import ModelConfig
from foveal.models.family import Family, Names
from foveal.models.fields import Fields
from foveal.models.llama import (
    ACTIVATIONS,
    LAYER,
    NAMES,
    WRITTEN_ACTIVATIONS,
    Sizes,
    read_sizes,
    write_sizes,
)
from foveal.models.rotary import read_rope, rope_from, write_rope
from foveal.models.windows import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    layer_types,
    read_window,
    windows_of,
)
from foveal.nn.norm import NormKind
from foveal.nn.rope import RopeConfig

_NAMES: Names = {
    **NAMES,
    "blocks.{}.attention_post_norm": (LAYER + "post_attention_layernorm",),
    "blocks.{}.mlp_norm": (LAYER + "pre_feedforward_layernorm",),
    "blocks.{}.mlp_post_norm": (LAYER + "post_feedforward_layernorm",),
}


def _read_gemma2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, head_dim=256)
    types = fields.words("layer_types", LAYER_TYPES, sizes["num_layers"])
    types = types or layer_types(sizes["num_layers"], lambda layer: layer % 2 == 0)
    rope = read_rope(fields, head_dim=sizes["head_dim"], max_positions=sizes["max_positions"])
    return _gemma("gemma2", fields, sizes, types, (rope, None))


def _read_gemma3(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, head_dim=256)
    period = fields.integer("sliding_window_pattern", 6)
    types = fields.words("layer_types", LAYER_TYPES, sizes["num_layers"])
    types = types or layer_types(sizes["num_layers"], lambda layer: (layer + 1) % period != 0)
    return _gemma("gemma3_text", fields, sizes, types, _gemma3_ropes(fields, sizes))


def _gemma(
    family: str,
    fields: Fields,
    sizes: Sizes,
    types: tuple[str, ...],
    ropes: tuple[RopeConfig, RopeConfig | None],
) -> ModelConfig:
    second = family == "gemma2"
    bias = fields.flag("attention_bias", False)
    fields.get("hidden_act")  # an older name, which the reference does not read either
    return ModelConfig(
        family=family,
        **sizes,
        rope=ropes[0],
        window_rope=ropes[1],
        windows=windows_of(types, _window(fields)),
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0 if second else None),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0 if second else None),
        norm=NormKind.RMS_OFFSET,
        post_norms=True,
        head_norm=not second,
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=math.sqrt(sizes["width"]),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _window(fields: Fields) -> int:
    """The window of the sliding layers, which Gemma always has."""
    window = read_window(fields, default=4096)
    if window is None:
        raise fields.refusal("sliding_window", "an integer")
    return window


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A softcap: null means none, absent means the default."""
    return fields.optional_number(name) if name in fields else default


def _gemma3_ropes(fields: Fields, sizes: Sizes) -> tuple[RopeConfig, RopeConfig]:
    """The rotary positions of full and of sliding layers, from either dialect."""
    older, newer = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    nested = newer or Fields({})
    thetas = {
        FULL: fields.number("rope_theta", 1e6),
        SLIDING: fields.number("rope_local_base_freq", 1e4),
    }
    nested.only_keys(frozenset(thetas))
    inner = {word: nested.inner(word) or Fields({}) for word in thetas}
    if older is not None:
        inner[FULL] = older
    full, sliding = (
        rope_from(
            inner[word],
            theta=theta,
            dim=sizes["head_dim"],
            max_positions=sizes["max_positions"],
        )
        for word, theta in thetas.items()
    )
    return full, sliding


def _write_gemma2(config: ModelConfig) -> dict[str, object]:
    sliding = [window for window in config.windows if window is not None]
    types = layer_types(config.num_layers, lambda layer: config.window(layer) is not None)
    return {
        **write_sizes(config),
        **write_rope(config.rope, config.head_dim),
        "hidden_activation": WRITTEN_ACTIVATIONS[config.activation],
        "query_pre_attn_scalar": _scalar(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": sliding[0] if sliding else 4096,
        "layer_types": list(types),
        "attention_bias": config.qkv_bias,
    }


def _write_gemma3(config: ModelConfig) -> dict[str, object]:
    local = {} if config.window_rope is None else {"rope_local_base_freq": config.window_rope.theta}
    return _write_gemma2(config) | local


def _scalar(config: ModelConfig) -> float:
    """The whole number whose root the scale divides by, free of rounding."""
    scale = config.spec(0).resolved_scale
    return round(scale**-2) if round(scale**-2) ** -0.5 == scale else scale**-2


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=_read_gemma2,
    write_config=_write_gemma2,
    names=_NAMES,
)

GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=_read_gemma3,
    write_config=_write_gemma3,
    names=_NAMES,
)
