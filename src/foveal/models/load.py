"""Load a checkpoint: config.json into a `ModelConfig`, its tensors into a `Decoder`.

The decoder is built without memory, then each weight is allocated once, on its device and in its
dtype, and filled from the mapped file. Beside the model itself, at most one tensor is in memory.
"""

import re
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from foveal.core.errors import ArgumentError, LoadError
from foveal.kernels.portable.panels import parse_weights
from foveal.models.catalogue import BY_NAME, read_config
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.models.family import Family, Source
from foveal.models.hub import locate
from foveal.models.narrow import is_matrix, narrow_module
from foveal.models.weights import Tensors, open_tensors, read_json

_HEAD = "lm_head.weight"


def load_config(path_or_name: str | Path) -> ModelConfig:
    """The configuration of a checkpoint. Raises `LoadError` or `ConfigError`."""
    path = locate(path_or_name) / "config.json"
    if not path.exists():
        raise LoadError(f"{path}: missing; a checkpoint is a directory that holds one")
    return read_config(read_json(path))


def load_model(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: str | None = None,
) -> Decoder:
    """The model in a Hugging Face directory, or of that name on the hub, in evaluation mode.

    `dtype` None keeps the dtype that the token embedding is stored in. `weights` stores matrices
    narrow ("bf16", "f16", "int8", "int4", "f32", or as `kernels.portable.panels` says) and
    computes in float32, for inference. Raises `LoadError` for files, architectures and weights
    that are missing, superfluous, misshapen or unreadable, `ConfigError` for settings that are not
    understood, and `ArgumentError` for a format of weights or a dtype beside it that is not
    accepted; all name what is wrong.
    """
    form = None if weights is None else parse_weights(weights)
    if form is not None:
        if dtype not in (None, torch.float32):
            raise ArgumentError("dtype", dtype, "float32, or none, beside narrow weights")
        dtype = torch.float32
    directory = locate(path_or_name)
    config = load_config(directory)
    family = BY_NAME[config.family]
    model = Decoder(config, device="meta")
    with open_tensors(directory) as tensors:
        plan = _plan(model, family, tensors)
        if dtype is None:
            dtype = tensors.read(plan["embedding.tokens.weight"][0].name).dtype
        # One place for every matrix to be narrowed: freed and taken anew, it would leave holes.
        largest = max(p.numel() for p in model.parameters()) if form is not None else 0
        room = torch.empty(largest, dtype=dtype, device=device)
        for module_name, parts in groupby(plan.items(), lambda item: item[0].rpartition(".")[0]):
            module = model.get_submodule(module_name)
            for weight, sources in parts:
                name = weight.rpartition(".")[2]
                shape = module.get_parameter(name).shape
                narrowed = form is not None and name == "weight" and is_matrix(module_name, module)
                empty = (
                    room[: shape.numel()].view(shape)
                    if narrowed
                    else torch.empty(shape, dtype=dtype, device=device)
                )
                _fill(empty, sources, tensors)
                setattr(module, name, nn.Parameter(empty))
            if module_name == "embedding.tokens" and config.tied:
                _check_tied_head(module.get_parameter("weight"), tensors)
            if form is not None:
                narrow_module(model, module_name, form)
    return model.eval()


def _plan(model: Decoder, family: Family, tensors: Tensors) -> dict[str, tuple[Source, ...]]:
    """Where each weight of the model comes from, by names that are in the files."""
    config = model.config
    stored = {_full_name(family, name): name for name in tensors.names}
    plan, missing = {}, []
    for weight, parameter in model.named_parameters():
        sources = family.sources(config, weight, parameter.shape[0])
        missing += [source.name for source in sources if source.name not in stored]
        plan[weight] = tuple(source.named(stored.get(source.name, "")) for source in sources)
    if missing:
        raise LoadError(f"missing weights: {_some(missing)}")
    used = {source.name for sources in plan.values() for source in sources}
    spare = re.compile("|".join(family.spare))
    extra = [
        name
        for full, name in stored.items()
        if name not in used and not spare.fullmatch(full) and not (config.tied and full == _HEAD)
    ]
    if extra:
        raise LoadError(f"superfluous weights, which {family.name} does not have: {_some(extra)}")
    return plan


def _full_name(family: Family, name: str) -> str:
    """The name with the family's prefix, which some files leave out."""
    return name if name.startswith(family.prefix) or name == _HEAD else family.prefix + name


def _fill(empty: torch.Tensor, sources: tuple[Source, ...], tensors: Tensors) -> None:
    """Fill one weight from its sources."""
    for source in sources:
        tensor = tensors.read(source.name)
        if source.transposed and tensor.ndim == 2:
            tensor = tensor.T
        part = empty[source.start : source.stop]
        if tensor.shape != part.shape:
            where = tensors.where(source.name)
            order = " (transposed)" if source.transposed else ""
            raise LoadError(
                f"{where}: {source.name}: got shape {list(tensor.shape)}{order}; "
                f"accepted: {list(part.shape)}, by config.json"
            )
        part.copy_(tensor)


def _check_tied_head(weight: torch.Tensor, tensors: Tensors) -> None:
    """A file may repeat the embedding as its head, but not hold another."""
    if _HEAD in tensors.names:
        stored = tensors.read(_HEAD)
        if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
            raise LoadError(
                f"{tensors.where(_HEAD)}: {_HEAD} differs from the token embedding, but "
                "tie_word_embeddings (stated, or by the family's default) says they are one"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
