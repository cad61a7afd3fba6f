"""GPT-2: learned positions, LayerNorm with biases, and matrices stored transposed (Conv1D)."""

from foveal.core.errors import ConfigError
from foveal.models.config import ModelConfig
from foveal.models.family import Family, Names
from foveal.models.fields import Fields
from foveal.models.llama import ACTIVATIONS
from foveal.nn.norm import NormKind

_LAYER = "transformer.h.{}."

_NAMES: Names = {
    "embedding.tokens": ("transformer.wte",),
    "embedding.positions": ("transformer.wpe",),
    "blocks.{}.attention_norm": (_LAYER + "ln_1",),
    "blocks.{}.attention.qkv": (_LAYER + "attn.c_attn",),
    "blocks.{}.attention.output": (_LAYER + "attn.c_proj",),
    "blocks.{}.mlp_norm": (_LAYER + "ln_2",),
    "blocks.{}.mlp.up": (_LAYER + "mlp.c_fc",),
    "blocks.{}.mlp.down": (_LAYER + "mlp.c_proj",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}

_ACTIVATION_WORDS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}


def _read(fields: Fields) -> ModelConfig:
    width, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    if num_heads < 1 or width % num_heads:
        raise fields.refusal("n_head", f"a divisor of n_embd={width}")
    if not fields.flag("scale_attn_weights", True):
        raise fields.refusal("scale_attn_weights", "true")
    return ModelConfig(
        family="gpt2",
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=fields.integer("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=fields.integer("n_inner", 4 * width),
        max_positions=fields.integer("n_positions"),
        norm=NormKind.LAYER,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
    )


def _write(config: ModelConfig) -> dict[str, object]:
    if config.rope is not None:
        raise ConfigError("rope: got rotary positions; accepted: none, in GPT-2")
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATION_WORDS[config.activation],
        "tie_word_embeddings": config.tied,
    }


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=_read,
    write_config=_write,
    names=_NAMES,
    transposed=frozenset(
        {"blocks.{}.attention.qkv", "blocks.{}.attention.output"}
        | {"blocks.{}.mlp.up", "blocks.{}.mlp.down"}
    ),
    prefix="transformer.",
    spare=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
