"""Tiny random checkpoints of every family, made by transformers and saved as it saves them.

Weights are drawn wide (0.3), so that logits differ by whole units and a wrong mask, scale or
rotation cannot hide within a tolerance; norms and biases are drawn too, because their initial
values (ones, zeros) would hide a missing one.
"""

import atexit
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers as hf

VOCABULARY = 99

_FOLDER = TemporaryDirectory(prefix="foveal-checkpoints-")
atexit.register(_FOLDER.cleanup)

Make = Callable[[], hf.PreTrainedConfig]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GEMMA = {**SIZES, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 7}


def rope(kind: str, **fields: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


def longrope(**fields: object) -> hf.Phi3Config:
    factors = {"short_factor": [1.0, 1.1, 1.5], "long_factor": [1.2, 2.0, 4.0]}
    parameters = rope("longrope", **factors, partial_rotary_factor=0.5)
    return hf.Phi3Config(
        **{**SIZES, "max_position_embeddings": 96},
        original_max_position_embeddings=24,
        rope_parameters=parameters,
        **fields,
    )


CHECKPOINTS: dict[str, Make] = {
    "llama-gqa": lambda: hf.LlamaConfig(**SIZES),
    "llama-mha-tied": lambda: hf.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}
    ),
    "llama-mqa-biases": lambda: hf.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True
    ),
    "llama-odd-sizes": lambda: hf.LlamaConfig(
        **{**SIZES, "hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3},
        head_dim=14,
        rms_norm_eps=1e-3,
    ),
    "llama-gelu": lambda: hf.LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama-linear": lambda: hf.LlamaConfig(**SIZES, rope_parameters=rope("linear", factor=4.0)),
    "llama-llama3": lambda: hf.LlamaConfig(
        **SIZES,
        rope_parameters=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-dynamic": lambda: hf.LlamaConfig(
        **{**SIZES, "max_position_embeddings": 24}, rope_parameters=rope("dynamic", factor=2.0)
    ),
    "llama-yarn": lambda: hf.LlamaConfig(
        **SIZES,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn-mscale": lambda: hf.LlamaConfig(
        **SIZES,
        rope_parameters=rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=16,
            beta_slow=2,
            mscale=0.7,
            mscale_all_dim=1.0,
            truncate=False,
        ),
    ),
    "mistral-window": lambda: hf.MistralConfig(**SIZES, sliding_window=5),
    "mistral-none": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": lambda: hf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "qwen3-mqa-bias": lambda: hf.Qwen3Config(
        **{**SIZES, "num_key_value_heads": 1}, head_dim=10, attention_bias=True
    ),
    "gemma2": lambda: hf.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=24, attn_logit_softcapping=4.0, final_logit_softcapping=3.0
    ),
    "gemma2-uncapped-untied": lambda: hf.Gemma2Config(
        **GEMMA,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=20),
    "gemma3-scaled": lambda: hf.Gemma3TextConfig(
        **{**GEMMA, "num_key_value_heads": 1},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": rope("linear", factor=8.0),
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "phi3-window": lambda: hf.Phi3Config(**SIZES, sliding_window=9),
    "phi3-longrope": longrope,
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=36,
        n_layer=2,
        n_head=3,
        n_positions=128,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    ),
    "gpt2-untied-inner": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=40,
        n_positions=128,
        tie_word_embeddings=False,
        activation_function="relu",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    ),
}


def randomised(config: hf.PreTrainedConfig, seed: int) -> hf.PreTrainedModel:
    """A transformers model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model.eval()


@cache
def reference(name: str) -> hf.PreTrainedModel:
    """The transformers model of that name."""
    return randomised(CHECKPOINTS[name](), seed=sum(map(ord, name)))


@cache
def directory(name: str) -> Path:
    """`reference(name)` saved to disk, until the tests end."""
    path = Path(_FOLDER.name) / name
    reference(name).save_pretrained(path)
    return path
