"""Qwen2 and 2.5 (biases on queries, keys and values) and Qwen3 (normalised heads instead).

Both may have a window in some layers: by `layer_types`, or from `max_window_layers` on.
"""

from foveal.models.config import ModelConfig
from foveal.models.family import Family
from foveal.models.fields import Fields
from foveal.models.llama import ACTIVATIONS, NAMES, Sizes, read_sizes, write_llama_like
from foveal.models.rotary import read_rope
from foveal.models.windows import LAYER_TYPES, SLIDING, layer_types, read_window, windows_of
from foveal.nn.rope import RopeConfig


def _read_qwen2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    return ModelConfig(
        family="qwen2",
        **sizes,
        rope=_rope(fields, sizes),
        windows=_windows(fields, sizes["num_layers"]),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        qkv_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _read_qwen3(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, head_dim=128)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        family="qwen3",
        **sizes,
        rope=_rope(fields, sizes),
        windows=_windows(fields, sizes["num_layers"]),
        head_norm=True,
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        qkv_bias=bias,
        output_bias=bias,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _rope(fields: Fields, sizes: Sizes) -> RopeConfig:
    return read_rope(fields, head_dim=sizes["head_dim"], max_positions=sizes["max_positions"])


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    sliding = fields.flag("use_sliding_window", False)
    window = read_window(fields, default=4096)
    window = window if sliding else None
    first = fields.integer("max_window_layers", 28)
    types = fields.words("layer_types", LAYER_TYPES, num_layers)
    if types is None:
        types = layer_types(num_layers, lambda layer: sliding and layer >= first)
    elif SLIDING in types and window is None:
        accepted = "no sliding_attention without use_sliding_window and sliding_window"
        raise fields.refusal("layer_types", accepted)
    return windows_of(types, window)


def _write_qwen2(config: ModelConfig) -> dict[str, object]:
    sliding = [window for window in config.windows if window is not None]
    fields: dict[str, object] = {"use_sliding_window": bool(sliding)}
    if sliding:
        types = layer_types(config.num_layers, lambda layer: config.windows[layer] is not None)
        fields |= {"sliding_window": sliding[0], "layer_types": list(types)}
    return write_llama_like(config) | fields


def _write_qwen3(config: ModelConfig) -> dict[str, object]:
    return _write_qwen2(config) | {"attention_bias": config.qkv_bias}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=_read_qwen2,
    write_config=_write_qwen2,
    names=NAMES,
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read_qwen3,
    write_config=_write_qwen3,
    names=NAMES,
)
