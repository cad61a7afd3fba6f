"""Files: sharded, retyped, incomplete, broken, hostile; and how much memory loading takes."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import directory, reference
from safetensors.torch import load_file, save_file

from foveal.core.errors import LoadError
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.models.hub import locate
from foveal.models.load import load_config, load_model
from foveal.models.save import save_model
from foveal.models.weights import INDEX, SINGLE
from foveal.nn.rope import RopeConfig

IDS = torch.arange(1, 31).view(2, 15)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(directory("llama-gqa"), tmp_path / "checkpoint"))


def edit(checkpoint: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    tensors = load_file(checkpoint / SINGLE)
    for name, tensor in changes.items():
        dotted = name.replace("__", ".")
        if tensor is None:
            del tensors[dotted]
        else:
            tensors[dotted] = tensor
    save_file(tensors, checkpoint / SINGLE)


def same_logits(ours: Decoder, name: str) -> bool:
    with torch.inference_mode():
        return bool((ours(IDS) - reference(name)(IDS).logits).abs().max() < 1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3-window", "qwen2"])
def test_sharded(name: str, tmp_path: Path) -> None:
    reference(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / SINGLE).exists()
    assert same_logits(load_model(tmp_path), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    model = load_model(directory("qwen3"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    with torch.inference_mode():
        exact = load_model(directory("qwen3"), dtype=torch.float64)(IDS)
        error = (model(IDS).double() - exact).abs().max() / exact.abs().max()
    assert error <= 40 * torch.finfo(dtype).eps


def test_dtype_defaults_to_the_stored_one(tmp_path: Path) -> None:
    save_model(load_model(directory("llama-gqa"), dtype=torch.bfloat16), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_without_prefix_and_masks_as_on_the_hub(tmp_path: Path) -> None:
    """The published GPT-2 has no `transformer.` in its names, but a mask in every layer."""
    source = directory("gpt2")
    tensors = load_file(source / SINGLE)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    save_file(tensors, tmp_path / SINGLE)
    shutil.copy(source / "config.json", tmp_path)
    assert same_logits(load_model(tmp_path), "gpt2")


def test_spare_rotary_buffers(checkpoint: Path) -> None:
    edit(checkpoint, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(6))
    assert same_logits(load_model(checkpoint), "llama-gqa")


def test_repeated_tied_head(tmp_path: Path) -> None:
    shutil.copytree(directory("llama-mha-tied"), tmp_path, dirs_exist_ok=True)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    edit(tmp_path, lm_head__weight=embedding.clone())
    assert same_logits(load_model(tmp_path), "llama-mha-tied")
    edit(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(LoadError, match=r"lm_head.weight differs .* tie_word_embeddings"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": None}, "missing weights: lm_head.weight"),
        (
            {"model__layers__1__self_attn__k_proj__weight": None},
            r"missing weights: model.layers.1.self_attn.k_proj.weight",
        ),
        (
            {"model__layers__0__self_attn__q_proj__bias": torch.ones(48)},
            r"superfluous weights.*model.layers.0.self_attn.q_proj.bias",
        ),
        ({"model__layers__2__mlp__up_proj__weight": torch.ones(56, 48)}, "superfluous"),
        (
            {"model__layers__0__self_attn__v_proj__weight": torch.ones(25, 48)},
            r"v_proj.weight: got shape \[25, 48\]; accepted: \[24, 48\]",
        ),
        ({"model__norm__weight": torch.ones(48, 1)}, r"norm.weight: got shape \[48, 1\]"),
        (
            {"model__norm__weight": torch.ones(48, dtype=torch.int8)},
            "model.norm.weight: got torch.int8; accepted: torch.float64",
        ),
    ],
)
def test_wrong_weights(checkpoint: Path, changes: dict, message: str) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(LoadError, match=message):
        load_model(checkpoint)


def test_misshapen_transposed_weight(tmp_path: Path) -> None:
    shutil.copytree(directory("gpt2"), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, transformer__h__0__mlp__c_fc__weight=torch.ones(144, 36))
    with pytest.raises(LoadError, match=r"c_fc.weight: got shape \[36, 144\] \(transposed\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.9, 0.999])
def test_truncated_file(checkpoint: Path, keep: float) -> None:
    path = checkpoint / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(LoadError, match=r"model.safetensors: not a whole safetensors file"):
        load_model(checkpoint)


def test_pickles_are_refused(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model.bin.*executes code.*safetensors"):
        load_model(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    with pytest.raises(LoadError, match=r"no model.safetensors and no model.safetensors.index"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "got list; accepted: an object"),
        ("{}", "weight_map: got None"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names gone.safetensors"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', r"names outside.safetensors"),
    ],
)
def test_bad_index(checkpoint: Path, index: str, message: str) -> None:
    shutil.move(checkpoint / SINGLE, checkpoint.parent / "outside.safetensors")
    (checkpoint / INDEX).write_text(index)
    with pytest.raises(LoadError, match=message):
        load_model(checkpoint)


def test_bad_directories(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"is a file; give the directory"):
        load_config(checkpoint / SINGLE)
    (checkpoint / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(LoadError, match="cannot be read as JSON"):
        load_config(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(LoadError, match=r"config.json: missing"):
        load_config(checkpoint)


def test_hub_name_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match=r"nobody/nothing: no such directory, and the hub gave"):
        locate("nobody/nothing")
    # What was downloaded before is found without a network.
    folder = tmp_path / "models--nobody--nothing"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree(directory("llama-gqa"), snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert locate("nobody/nothing") == snapshot
    for name in ("a/b/c", "/a/b", "", "..", "a//b"):
        with pytest.raises(LoadError, match=r"no such directory|missing"):
            load_config(name)


def test_failed_save_leaves_the_old_files(tmp_path: Path) -> None:
    model = load_model(directory("llama-gqa"))
    save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.head = torch.nn.Linear(48, 99, device="meta")
    with pytest.raises(RuntimeError):
        save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def test_loading_never_holds_two_copies(tmp_path: Path) -> None:
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
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(tmp_path, dtype=torch.float32)
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in model.parameters())
    assert weights > 200e6
    assert peak - before < 1.2 * weights
