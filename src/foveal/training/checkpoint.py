"""A run's whole state in one file, written whole or not at all: what exact resume needs.

The file is safetensors (no code runs when it is read): the weights as `model.<name>`, AdamW's two
averages and its step count as `<quantity>.<name>`, PyTorch's random state; and the run's counters
and its recipe as JSON in the header. It replaces the file before it by one rename, so a process
killed at any moment leaves the old checkpoint or the new one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from foveal.core.errors import LoadError
from foveal.core.files import atomic_path

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """Where a run is."""

    step: int = 0
    """Updates done."""
    row: int = 0
    """Rows of the training stream taken."""
    seconds: float = 0.0
    """Time spent so far, earlier parts of the run included."""


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    counters: Counters,
    recipe: Mapping[str, Any],
) -> None:
    """Write the state of a run to `path`, atomically."""
    tensors = {"random": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}.{name}"] = value.contiguous()
    header = {"counters": json.dumps(asdict(counters)), "recipe": json.dumps(recipe)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> Counters:
    """Put the state of `path` into `model`, `optimiser` and PyTorch's random generator.

    Raises `LoadError` if the file is missing, damaged, or of another model.
    """
    header, names = read_header(path)
    expected = {"random"}
    for name, _ in model.named_parameters():
        expected |= {f"model.{name}", *(f"{key}.{name}" for key in _MOMENTS)}
    if names != expected:
        odd = ", ".join(sorted(names ^ expected)[:3])
        raise LoadError(f"{path}: is the checkpoint of another model; differs in {odd}")
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = file.get_tensor(f"model.{name}")
            if stored.shape != parameter.shape:
                shapes = f"{list(stored.shape)} instead of {list(parameter.shape)}"
                raise LoadError(f"{path}: {name} has shape {shapes}")
            parameter.copy_(stored)
            optimiser.state[parameter] = {k: file.get_tensor(f"{k}.{name}") for k in _MOMENTS}
        torch.set_rng_state(file.get_tensor("random"))
    return Counters(**header["counters"])


def read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The counters and the recipe of a checkpoint, and the names of its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            fields, names = file.metadata(), set(file.keys())
        return {key: json.loads(fields[key]) for key in ("counters", "recipe")}, names
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise LoadError(f"{path}: is not a checkpoint of a training run ({error})") from error
