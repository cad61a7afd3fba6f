"""`foveal train` from the terminal: a run, its files, its interruption, its refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from foveal.cli.main import app
from foveal.core.errors import ArgumentError, ConfigError
from foveal.models.load import load_model
from foveal.text.tokenizer import load_tokenizer
from foveal.training.run import resume_run

RECIPE = """
[model]
width = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
mlp_width = 64
max_positions = 64

[data]
context = 32

[run]
steps = {steps}
batch = 4
log_every = 2
evaluate_every = 4
evaluate_rows = 2
checkpoint_every = 3
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(steps=6))
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    files = ["--recipe", str(tmp_path / "recipe.toml"), "--data", str(tmp_path / "text.txt")]
    return ["train", "--out", str(tmp_path / "run"), *files]


def foveal(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_leaves_a_model_that_loads(arguments: list[str], tmp_path: Path) -> None:
    result = json.loads(foveal(*arguments, "--json"))
    out = tmp_path / "run"
    assert result == json.loads((out / "result.json").read_text())
    assert result["steps"] == 6 and result["tokens"] == 6 * 4 * 32
    assert 0 < result["heldout_bits_per_byte"] < 10
    assert f"{result['heldout_bits_per_byte']:.3f} bits" in (out / "model/README.md").read_text()
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(out / "model" / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
    trained, exported = resume_run(out).model, load_model(out / "model", dtype=torch.float32)
    for ours, theirs in zip(trained.parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs)
    ids = load_tokenizer(out / "model").encode("the")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model = load_model(out / "model", dtype=dtype)
        assert model(torch.tensor([ids])).isfinite().all()


def test_transformers_reads_the_model_and_agrees(arguments: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    foveal(*arguments)
    folder = tmp_path / "run" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("the fox", return_tensors="pt").input_ids
    assert ids[0, 0] == 256, "a text begins with the begin token"
    ours = load_model(folder, dtype=torch.float32)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id in (257, [257])


def test_options_outrank_the_recipe(arguments: list[str]) -> None:
    options = ["--steps", "2", "--batch", "3", "--context", "16", "--lr", "0.002", "--seed", "5"]
    recipe = json.loads(foveal(*arguments, *options, "--json"))["recipe"]
    assert (recipe["run"]["steps"], recipe["run"]["batch"], recipe["run"]["seed"]) == (2, 3, 5)
    assert (recipe["data"]["context"], recipe["optimiser"]["lr"]) == (16, 0.002)


def test_an_interrupted_run_saves_and_goes_on(arguments: list[str], tmp_path: Path) -> None:
    endless = [*arguments, "--steps", "1000000"]
    command = [sys.executable, "-c", "from foveal.cli.main import main; main()", *endless]
    curve = tmp_path / "run" / "curve.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not (curve.is_file() and curve.stat().st_size):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in said
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ConfigError, match="holds a run"):
        foveal(*arguments)


def test_resume_takes_no_other_recipe(arguments: list[str], tmp_path: Path) -> None:
    foveal(*arguments)
    out = ["train", "--out", str(tmp_path / "run"), "--resume"]
    with pytest.raises(ArgumentError, match="resume: got other options"):
        foveal(*out, "--lr", "0.1")
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    again = json.loads(foveal(*out, "--json"))
    assert again["heldout_loss"] == first["heldout_loss"], "a finished run only ends again"
    assert json.loads(foveal(*out, "--steps", "8", "--json"))["steps"] == 8, "or is made longer"


def test_help_shows_an_example() -> None:
    assert "Example: foveal train" in foveal("train", "--help")
