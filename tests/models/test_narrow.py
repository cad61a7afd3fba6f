"""Models with narrow weights: the float32 model of what these weights stand for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import CHECKPOINTS, directory

from foveal.core.errors import ArgumentError, ConfigError
from foveal.engine.llm import LLM
from foveal.engine.request import SamplingParams
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.models.fingerprint import fingerprint
from foveal.models.load import load_model
from foveal.models.narrow import narrow
from foveal.models.save import save_model
from foveal.nn.linear import NarrowEmbedding, NarrowLinear
from foveal.nn.rope import RopeConfig
from tiny import write_tiny_model

FORMATS = ("f32", "bf16", "f16", "int8", "int4")
IDS = torch.arange(1, 31).view(2, 15)


def widened(model: Decoder, name: str) -> Decoder:
    """The float32 model whose weights are what the narrow ones stand for."""
    wide = load_model(directory(name), dtype=torch.float32)
    for module_name, module in model.named_modules():
        if isinstance(module, NarrowEmbedding):
            wide.embedding.tokens.weight.data = module.matrix.weight
        elif isinstance(module, NarrowLinear) and not module_name.startswith("embedding"):
            wide.get_submodule(module_name).weight.data = module.weight
    return wide


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_every_family_in_every_format(name: str, weights: str) -> None:
    model = load_model(directory(name), weights=weights)
    assert model.dtype == torch.float32
    assert model.weight_format == weights
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2]
    assert matrices == (["embedding.positions.weight"] if name.startswith("gpt2") else [])
    logits, wide = model(IDS), widened(model, name)
    exact = wide(IDS)
    assert (logits - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert model.num_parameters == wide.num_parameters
    cache = model.new_cache(2)
    parts = [model(part, cache=cache) for part in IDS.split((9, 1, 5), dim=1)]
    assert (torch.cat(parts, dim=1) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("weights", FORMATS)
@torch.inference_mode()
def test_loading_narrow_is_narrowing_what_was_loaded(weights: str) -> None:
    model = load_model(directory("llama-mha-tied"), dtype=torch.float32)
    plain = fingerprint(model)
    narrow(model, weights)
    loaded = load_model(directory("llama-mha-tied"), weights=weights)
    assert torch.equal(model(IDS), loaded(IDS))
    assert fingerprint(model) == fingerprint(loaded) != plain
    with pytest.raises(ArgumentError, match=f"model: got weights in {weights}"):
        narrow(model, "int8")


@torch.inference_mode()
def test_fewer_bits_are_farther_off() -> None:
    exact = load_model(directory("qwen3"))(IDS)
    errors = []
    for weights in ("f16", "bf16", "int8-16", "int4-16"):
        logits = load_model(directory("qwen3"), weights=weights)(IDS)
        errors.append(float((logits - exact).norm() / exact.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 2e-3 < 0.05 < errors[3]


def test_fingerprints_tell_formats_apart() -> None:
    prints = {fingerprint(load_model(directory("qwen3"), weights=w)) for w in (None, *FORMATS)}
    assert len(prints) == 1 + len(FORMATS)


@pytest.mark.parametrize("weights", FORMATS)
def test_generation(weights: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    llm = LLM(tmp_path, weights=weights)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    alone = llm.generate("hello", params)[0]
    assert len(alone.token_ids) == 12
    beside = llm.generate(["hello", "a longer neighbour"], params)[0]
    assert beside.token_ids == alone.token_ids


def test_refusals(tmp_path: Path) -> None:
    model = load_model(directory("llama-gqa"), weights="int8")
    with pytest.raises(ConfigError, match="weights: got int8; accepted: a dtype, to be saved"):
        save_model(model, tmp_path)
    with pytest.raises(ArgumentError, match=r"dtype: got torch\.bfloat16; accepted: float32"):
        load_model(directory("llama-gqa"), dtype=torch.bfloat16, weights="int8")
    with pytest.raises(ArgumentError, match="weights: got 'int2'"):
        load_model(directory("llama-gqa"), weights="int2")
    ids = torch.tensor([[1, 2]])
    model.norm.weight.requires_grad_()
    with pytest.raises(ArgumentError, match="inference only"):
        model(ids)


WATCHED = """
import sys, threading
from pathlib import Path
from foveal.models.decoder import Decoder
from foveal.models.load import load_config, load_model

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

Decoder(load_config(sys.argv[1]), device="meta")  # imports what PyTorch puts off
before, peak, done = anonymous_bytes(), 0, threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], weights="int8")
done.set()
watcher.join()
print(peak - before, model.weight_bytes)
"""
"""In a process of its own: in another the heap has holes already, and what they hold counts."""


def test_peak_of_loading_is_the_narrow_model_and_one_matrix(tmp_path: Path) -> None:
    config = ModelConfig(
        family="llama",
        vocab_size=64,
        width=1024,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=1024,
        max_positions=64,
        rope=RopeConfig(dim=128),
    )
    save_model(Decoder(config, dtype=torch.bfloat16), tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, weights = map(int, child.stdout.split())
    assert weights < 62e6
    assert peak < weights + 2 * 4 * 3072 * 1024  # twice the largest matrix in float32
