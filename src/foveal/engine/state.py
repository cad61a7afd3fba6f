"""The file of a session: safetensors (no code runs when it is read), whole or not there.

Its metadata hold this format's version, the header as JSON (the model's fingerprint, the session's
settings), and a digest of header and tensors, so that a file that is cut short, damaged or another
model's is refused before anything of it is used.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foveal.core.errors import ArgumentError, LoadError
from foveal.core.files import atomic_path
from foveal.models.fingerprint import digest

_VERSION = "2"


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace `path` by a file with this header and these tensors. Raises `ArgumentError`."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    facts = {"foveal-session": _VERSION, "header": text, "digest": _digest(text, whole)}
    try:
        with atomic_path(path) as temporary:
            save_file(whole, temporary, metadata=facts)
    except (OSError, SafetensorError) as error:
        raise ArgumentError("path", str(path), f"a file that can be written ({error})") from error


def read(path: Path, model: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file for the model of this fingerprint. Raises `LoadError`."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: is not the whole state of a session ({error})") from error
    version = facts.get("foveal-session")
    if version is None:
        raise LoadError(f"{path}: is not the state of a session")
    if version != _VERSION:
        raise LoadError(f"{path}: is of version {version}; this foveal reads {_VERSION}")
    if facts.get("digest") != _digest(facts.get("header", ""), tensors):
        raise LoadError(f"{path}: is damaged: its contents are not those that were written")
    header: dict[str, Any] = json.loads(facts["header"])
    if header["model"] != model:
        raise LoadError(
            f"{path}: is of another model: fingerprint {header['model'][:12]}, not {model[:12]}"
        )
    return header, tensors


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{header} {digest(tensors)}".encode()).hexdigest()
