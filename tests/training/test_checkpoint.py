"""A checkpoint is whole or not there, and is refused by a model that it does not fit."""

import signal
import subprocess
import sys
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


KILLED_WHILE_SAVING = """
import os
import signal
import sys
from pathlib import Path
from torch import nn
from foveal.training.checkpoint import Counters, save_checkpoint
from foveal.training.config import OptimiserRecipe
from foveal.training.optimiser import build_optimiser

model = nn.Linear(4, 4)
state = (model, build_optimiser(model, OptimiserRecipe()))
save_checkpoint(Path(sys.argv[1]), *state, Counters(step=1), {})
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(Path(sys.argv[1]), *state, Counters(step=2), {})
"""


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the new file was being written"
    assert read_header(path)[0]["counters"]["step"] == 1
