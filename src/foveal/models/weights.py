"""The tensors of a checkpoint's safetensors files, by name, read one at a time.

Files are memory-mapped, so a tensor takes memory only where it is copied to. Pickled weights are
refused: unpickling executes whatever code the file holds.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from foveal.core.dtypes import FLOATS
from foveal.core.errors import LoadError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")


class _Reader(Protocol):
    """What is used of an open safetensors file."""

    def keys(self) -> list[str]:
        """Names of the tensors in it."""

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor, backed by the mapped file."""


class Tensors:
    """The tensors of one checkpoint, whichever file they are in."""

    def __init__(self, files: dict[str, tuple[Path, _Reader]]) -> None:
        self._files = files

    @property
    def names(self) -> frozenset[str]:
        """What there is."""
        return frozenset(self._files)

    def read(self, name: str) -> torch.Tensor:
        """A floating-point tensor. Raises `LoadError` for another dtype."""
        path, reader = self._files[name]
        tensor = reader.get_tensor(name)
        if tensor.dtype not in FLOATS:
            accepted = ", ".join(map(str, FLOATS))
            raise LoadError(f"{path}: {name}: got {tensor.dtype}; accepted: {accepted}")
        return tensor

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name][0]


@contextmanager
def open_tensors(directory: Path) -> Iterator[Tensors]:
    """Every tensor of the checkpoint in `directory`. Raises `LoadError`."""
    with ExitStack() as stack:
        files: dict[str, tuple[Path, _Reader]] = {}
        for path in _paths(directory):
            try:
                reader = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise LoadError(f"{path}: not a whole safetensors file: {error}") from error
            files |= dict.fromkeys(reader.keys(), (path, reader))
        yield Tensors(files)


def _paths(directory: Path) -> list[Path]:
    """The safetensors files, from the index if there is no single one."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise _nothing_to_read(directory)
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise LoadError(f"{index}: weight_map: got {entries!r}; accepted: names to files")
    paths = [directory / str(name) for name in sorted(set(entries.values()))]
    for path in paths:
        if path.parent != directory or not path.is_file():
            raise LoadError(f"{index}: names {path.name}, which is not in {directory}")
    return paths


def read_json(path: Path) -> dict[str, object]:
    """A JSON file that holds an object. Raises `LoadError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise LoadError(f"{path}: got {type(values).__name__}; accepted: an object")
    return values


def _nothing_to_read(directory: Path) -> LoadError:
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if not pickles:
        return LoadError(f"{directory}: no {SINGLE} and no {INDEX}")
    return LoadError(
        f"{directory}: only pickled weights ({', '.join(pickles)}), which are refused because "
        "unpickling executes code in the file; convert them to safetensors where you trust them"
    )
