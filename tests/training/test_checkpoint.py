"""A checkpoint is whole or not there, and is refused by a model that it does not fit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from foveal.core.errors import LoadError
from foveal.training.checkpoint import Counters, load_checkpoint, read_header, save_checkpoint
from foveal.training.config import OptimiserRecipe
from foveal.training.optimiser import build_optimiser


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Linear, torch.optim.AdamW]:
    """A layer after one update, so that its optimiser has a state."""
    torch.manual_seed(seed)
    model = nn.Linear(width, width)
    optimiser = build_optimiser(model, OptimiserRecipe())
    model(torch.randn(2, width)).square().sum().backward()
    optimiser.step()
    return model, optimiser


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimiser = trained()
    counters = Counters(step=7, row=56, seconds=1.5)
    save_checkpoint(path, model, optimiser, counters, {"run": {"steps": 9}})
    expected = torch.rand(5)
    fresh, state = trained(seed=1)
    assert load_checkpoint(path, fresh, state) == counters
    assert torch.equal(torch.rand(5), expected), "the random state"
    assert read_header(path)[0]["recipe"] == {"run": {"steps": 9}}
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimiser.state[ours].items():
            assert torch.equal(value, state.state[theirs][key]), key


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *trained(width=4), Counters(), {})
    with pytest.raises(LoadError, match=r"weight has shape \[4, 4\] instead of \[5, 5\]"):
        load_checkpoint(path, *trained(width=5))
    two = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(LoadError, match="of another model"):
        load_checkpoint(path, two, build_optimiser(two, OptimiserRecipe()))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *trained(), Counters(), {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoadError, match="is not a checkpoint"):
        load_checkpoint(path, *trained())


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
from torch import nn
from foveal.training.checkpoint import Counters, save_checkpoint
from foveal.training.config import OptimiserRecipe
from foveal.training.optimiser import build_optimiser

model = nn.Linear(1000, 1000)  # 12 MB with its optimiser: a save takes long enough to be hit
optimiser = build_optimiser(model, OptimiserRecipe())
model(torch.randn(2, 1000)).sum().backward()
optimiser.step()
for step in range(10**6):
    save_checkpoint(Path(sys.argv[1]), model, optimiser, Counters(step=step), {})
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(path)]
    killed_inside = 0
    for delay in (0.004, 0.015):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines[-1] == "2\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        header, names = read_header(path)
        assert header["counters"]["step"] >= 2
        assert "model.weight" in names
        torch.manual_seed(0)
        model = nn.Linear(1000, 1000)
        load_checkpoint(path, model, build_optimiser(model, OptimiserRecipe()))
        partial = [other for other in tmp_path.iterdir() if other != path]
        killed_inside += bool(partial)
        for other in partial:
            other.unlink()
    assert killed_inside, "no kill hit a save: the test proves nothing"
