"""config.json: published checkpoints are read, both dialects agree, what matters is refused."""

import json
import logging

import pytest
import transformers as hf
from checkpoints import CHECKPOINTS, SIZES, directory
from published import PARAMETERS, PUBLISHED

from foveal.core.errors import ConfigError, LoadError
from foveal.core.log import warn_once
from foveal.models.catalogue import FAMILIES, read_config, write_config
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.models.fields import HARMLESS, MATTERS, Fields
from foveal.nn.norm import NormKind
from foveal.nn.rope import RopeConfig
from foveal.nn.scaling import LongScaling, YarnScaling

CLASSES = {
    "llama": hf.LlamaConfig,
    "mistral": hf.MistralConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "gemma2": hf.Gemma2Config,
    "gemma3_text": hf.Gemma3TextConfig,
    "phi3": hf.Phi3Config,
    "gpt2": hf.GPT2Config,
}


def llama(**changes: object) -> dict[str, object]:
    return PUBLISHED["Llama-2-7b"] | changes


def stored(name: str) -> dict[str, object]:
    """config.json as transformers 5 wrote it."""
    values: dict[str, object] = json.loads((directory(name) / "config.json").read_text())
    return values


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="foveal"):
        config = read_config(PUBLISHED[name])
    assert not caplog.records
    assert Decoder(config, device="meta").num_parameters == PARAMETERS[name]
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_config_means_the_same(name: str) -> None:
    # What we write is the older dialect, what transformers 5 stores is the newer one.
    config = read_config(stored(name))
    written = write_config(config)
    assert "rope_parameters" not in written
    assert read_config(written) == config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_field_of_the_reference_is_known(family) -> None:
    """So a field that nobody knows is not read by the reference implementation either."""
    values = CLASSES[family.name]().to_dict()
    fields = Fields(values)
    family.read_config(fields)
    unknown = {
        name
        for name in values.keys() - fields.read - HARMLESS - MATTERS.keys()
        if not name.startswith("_")
    }
    assert not unknown


def test_unknown_field_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="foveal"):
        assert read_config(llama(flavour="sweet", empty=None)) == read_config(llama())
    assert [r.getMessage() for r in caplog.records] == [
        "config.json: ignoring the unknown field 'flavour'"
    ]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "activation": (llama(hidden_act="mish"), "hidden_act: got 'mish'; accepted: silu"),
    "bias": (llama(attention_bias="yes"), "attention_bias: got 'yes'; accepted: true or false"),
    "size": (llama(hidden_size="big"), "hidden_size: got 'big'; accepted: an integer"),
    "no size": (llama(hidden_size=None), "hidden_size: got None"),
    "negative": (llama(vocab_size=-3), "vocab_size: got -3"),
    "no heads": (llama(num_attention_heads=0), "num_attention_heads: got 0"),
    "heads": (llama(num_key_value_heads=5), "num_kv_heads: got 5"),
    "epsilon": (llama(rms_norm_eps=-1e-5), "rms_norm_eps"),
    "theta": (llama(rope_theta=0), "rope_theta"),
    "odd head": (llama(head_dim=13), "rotary dim: got 13"),
    "rope type": (llama(rope_scaling={"type": "spiral"}), "type: got 'spiral'; accepted: default"),
    "rope key": (llama(rope_scaling={"type": "linear", "factor": 2.0, "mood": 1}), "mood: got 1"),
    "rope factor": (llama(rope_scaling={"type": "linear"}), "rope_scaling: factor: got nothing"),
    "rope object": (llama(rope_scaling=[2]), r"rope_scaling: got \[2\]; accepted: an object"),
    "mrope": (
        llama(rope_scaling={"rope_type": "default", "mrope_section": [2, 3]}),
        "mrope_section",
    ),
    "quantised": (llama(quantization_config={"bits": 4}), "quantization_config"),
    "interleaved": (llama(rope_interleaved=True), "rope_interleaved: got True"),
    "experts": (llama(num_local_experts=8), "num_local_experts: got 8"),
    "layer types": (llama(layer_types=["sliding_attention"]), "layer_types"),
    "window word": (
        PUBLISHED["Qwen3-0.6B"] | {"layer_types": ["sideways"] * 28},
        "layer_types: .*accepted: a list of 28 of: full_attention",
    ),
    "window switch": (
        PUBLISHED["Qwen3-0.6B"] | {"layer_types": ["sliding_attention"] * 28},
        "layer_types: .*use_sliding_window",
    ),
    "gemma window": (
        PUBLISHED["gemma-3-1b"] | {"sliding_window": None},
        "sliding_window: got None; accepted: an integer",
    ),
    "window": (PUBLISHED["Mistral-7B-v0.3"] | {"sliding_window": 0}, "windows: got"),
    "bidirectional": (
        PUBLISHED["gemma-3-1b"] | {"use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "softcap": (PUBLISHED["gemma-2-2b"] | {"final_logit_softcapping": -1}, "final_logit"),
    "gemma rope": (
        PUBLISHED["gemma-3-1b"] | {"rope_parameters": {"rope_type": "default"}},
        "rope_type",
    ),
    "phi factors": (
        PUBLISHED["Phi-3-mini-4k"]
        | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor: got .*accepted: a list of 48 numbers",
    ),
    "phi rope": (
        PUBLISHED["Phi-3-mini-4k"] | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "type: got 'linear'",
    ),
    "gpt2 scale": (PUBLISHED["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    "gpt2 unscaled": (PUBLISHED["gpt2"] | {"scale_attn_weights": False}, "scale_attn_weights"),
    "gpt2 cross": (PUBLISHED["gpt2"] | {"add_cross_attention": True}, "add_cross_attention"),
    "gpt2 heads": (PUBLISHED["gpt2"] | {"n_head": 7}, "n_head: got 7; accepted: a divisor"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_changes_the_mathematics_is_refused(why: str) -> None:
    values, message = REFUSED[why]
    with pytest.raises(ValueError, match=message):
        read_config(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (llama(architectures=["MambaForCausalLM"]), r"architectures: got \['MambaForCausalLM'\]"),
        (llama(architectures=["LlamaForSequenceClassification"]), "architectures"),
        ({"model_type": "mamba"}, "model_type: got 'mamba'; accepted: llama"),
        ({}, "model_type: got None"),
    ],
)
def test_unknown_architecture(values: dict[str, object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read_config(values)


def test_model_type_stands_in_for_architectures() -> None:
    assert read_config(llama(architectures=None)) == read_config(llama())


def test_defaults_of_absent_fields() -> None:
    mistral = dict(PUBLISHED["Mistral-7B-v0.3"])
    assert read_config(mistral).windows == ()
    del mistral["sliding_window"]
    assert read_config(mistral).window(3) == 4096
    qwen = PUBLISHED["Qwen3-0.6B"] | {"use_sliding_window": True, "max_window_layers": 3}
    assert read_config(qwen).windows == ()
    del qwen["sliding_window"]
    assert read_config(qwen).windows == (None,) * 3 + (4096,) * 25
    gemma = read_config(PUBLISHED["gemma-3-1b"])
    assert [layer for layer in range(26) if gemma.window(layer) is None] == [5, 11, 17, 23]
    assert gemma.rotary(5) == RopeConfig(dim=256, theta=1e6)
    assert gemma.rotary(4) == RopeConfig(dim=256, theta=1e4)
    assert gemma.tied


def test_scaling_details() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read_config(PUBLISHED["Qwen2.5-0.5B"] | {"rope_scaling": yarn}).rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnScaling)
    assert rope.scaling.attention_factor == pytest.approx(1.1386294361119891)
    long = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi = PUBLISHED["Phi-3-mini-4k"] | {"rope_scaling": long, "max_position_embeddings": 131072}
    rope = read_config(phi).rope
    assert rope is not None
    assert isinstance(rope.scaling, LongScaling)
    assert rope.scaling.attention_factor == pytest.approx(1.1902380714238083)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 32768),
        ({"type": "dynamic", "factor": 2.0}, 65536),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "linear", "factor": 2.0}, 32768),
    ],
)
def test_context_grows_with_the_scaling(scaling: object, context: int) -> None:
    assert read_config(PUBLISHED["Qwen2.5-0.5B"] | {"rope_scaling": scaling}).context == context


def small(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "family": "llama",
        "vocab_size": 11,
        "width": 8,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "mlp_width": 8,
        "max_positions": 16,
        "rope": RopeConfig(dim=4),
    }
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_norm": True}, "head_norm: cannot be written in the words of llama"),
        ({"norm": NormKind.LAYER, "windows": (None, 3)}, "windows, norm"),
        ({"rope": None}, "rope: got None"),
        ({"family": "gpt2"}, "rope: got rotary"),
        ({"family": "nobody"}, "family: got 'nobody'; accepted: llama"),
    ],
)
def test_config_without_words_is_not_written(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_config(small(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width: got 0"),
        ({"num_layers": 1.5}, "num_layers: got 1.5"),
        ({"windows": (3,)}, "windows: got 1 windows; accepted: one for each of 2"),
        ({"windows": (3, 0)}, "windows"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"activation": "tanh"}, "activation: got 'tanh'; accepted: silu"),
        ({"rope": RopeConfig(dim=6)}, "rope: got dim 6; accepted: up to 4"),
    ],
)
def test_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_only_sizes_are_required() -> None:
    assert read_config({"model_type": "llama", **SIZES}).head_dim == 12
