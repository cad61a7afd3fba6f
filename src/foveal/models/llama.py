"""The Llama family (1, 2, 3 and what is built like them) and Mistral, which adds a window.

Also what most families share with them: the names of sizes and of weights.
"""

from typing import TypedDict

from foveal.models.config import ModelConfig
from foveal.models.family import Family, Names
from foveal.models.fields import Fields
from foveal.models.rotary import read_rope, write_rope
from foveal.models.windows import read_window

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Words of config.json to those of `nn.mlp`."""

WRITTEN_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

LAYER = "model.layers.{}."

NAMES: Names = {
    "embedding.tokens": ("model.embed_tokens",),
    "blocks.{}.attention_norm": (LAYER + "input_layernorm",),
    "blocks.{}.attention.qkv": tuple(f"{LAYER}self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attention.q_norm": (LAYER + "self_attn.q_norm",),
    "blocks.{}.attention.k_norm": (LAYER + "self_attn.k_norm",),
    "blocks.{}.attention.output": (LAYER + "self_attn.o_proj",),
    "blocks.{}.mlp_norm": (LAYER + "post_attention_layernorm",),
    "blocks.{}.mlp.up": (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"),
    "blocks.{}.mlp.down": (LAYER + "mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}


class Sizes(TypedDict):
    """The fields that most families call by the same names."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm_eps: float


def read_sizes(fields: Fields, head_dim: int | None = None, norm_eps: float = 1e-6) -> Sizes:
    """The sizes in config.json; `head_dim` by default the width divided by the heads."""
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if num_heads < 1:
        raise fields.refusal("num_attention_heads", "an integer of at least 1")
    return Sizes(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", head_dim or width // num_heads),
        mlp_width=fields.integer("intermediate_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", norm_eps),
    )


def write_sizes(config: ModelConfig) -> dict[str, object]:
    """What `read_sizes` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def write_llama_like(config: ModelConfig) -> dict[str, object]:
    """Sizes, activation and rotary positions."""
    return {
        **write_sizes(config),
        "hidden_act": WRITTEN_ACTIVATIONS[config.activation],
        **write_rope(config.rope, config.head_dim),
    }


def _read_llama(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        **sizes,
        rope=read_rope(fields, head_dim=sizes["head_dim"], max_positions=sizes["max_positions"]),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_llama(config: ModelConfig) -> dict[str, object]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_llama_like(config) | biases


def _read_mistral(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    window = read_window(fields, default=4096)
    return ModelConfig(
        family="mistral",
        **sizes,
        rope=read_rope(fields, head_dim=sizes["head_dim"], max_positions=sizes["max_positions"]),
        windows=() if window is None else (window,) * sizes["num_layers"],
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_mistral(config: ModelConfig) -> dict[str, object]:
    return write_llama_like(config) | {"sliding_window": config.window(0)}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_llama,
    write_config=_write_llama,
    names=NAMES,
)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    read_config=_read_mistral,
    write_config=_write_mistral,
    names=NAMES,
)
