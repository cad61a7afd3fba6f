"""Phi-3 and 3.5 and Phi-4 mini: Llama with fused matrices, LongRoPE, and partial rotation."""

from foveal.models.config import ModelConfig
from foveal.models.family import Family, Names
from foveal.models.fields import Fields
from foveal.models.llama import ACTIVATIONS, LAYER, NAMES, read_sizes, write_llama_like
from foveal.models.rotary import read_rope
from foveal.models.windows import read_window
from foveal.nn.scaling import LongScaling

_NAMES: Names = {
    **NAMES,
    "blocks.{}.attention.qkv": (LAYER + "self_attn.qkv_proj",),
    "blocks.{}.mlp.up": (LAYER + "mlp.gate_up_proj",),
}

_ROPE_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
"""Early files call LongRoPE "su" or "yarn"."""


def _read(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, norm_eps=1e-5)
    # The reference class has this field with a default, which wins over the one in rope_scaling.
    original = fields.integer("original_max_position_embeddings", 4096)
    rope = read_rope(
        fields,
        head_dim=sizes["head_dim"],
        max_positions=sizes["max_positions"],
        original=original,
        types=_ROPE_TYPES,
    )
    window = read_window(fields, default=None)
    return ModelConfig(
        family="phi3",
        **sizes,
        rope=rope,
        windows=() if window is None else (window,) * sizes["num_layers"],
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write(config: ModelConfig) -> dict[str, object]:
    fields = write_llama_like(config) | {"sliding_window": config.window(0)}
    if config.rope is not None and isinstance(config.rope.scaling, LongScaling):
        fields["original_max_position_embeddings"] = config.rope.scaling.original_length
    return fields


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    read_config=_read,
    write_config=_write,
    names=_NAMES,
)
