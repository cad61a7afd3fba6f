"""Save a model as a Hugging Face directory: config.json and model.safetensors.

transformers and `load_model` both read it back. Each file is written whole or not at all, the
configuration last, so that a directory that has one also has its weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ConfigError
from foveal.core.files import atomic_path, write_text
from foveal.models.catalogue import BY_NAME, write_config
from foveal.models.decoder import Decoder
from foveal.models.weights import SINGLE


def save_model(model: Decoder, directory: Path | str) -> None:
    """Write `model` into `directory`, in its own dtype.

    Raises `ConfigError` if the model's family has no words for its configuration, or its weights
    are narrow.
    """
    if model.weight_format != dtype_name(model.dtype):
        raise ConfigError(f"weights: got {model.weight_format}; accepted: a dtype, to be saved")
    directory = Path(directory)
    values = write_config(model.config) | {"dtype": dtype_name(model.dtype)}
    with atomic_path(directory / SINGLE) as temporary:
        save_file(_tensors(model), temporary, metadata={"format": "pt"})
    write_text(directory / "config.json", json.dumps(values, indent=2) + "\n")


def _tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights by the family's names; views of the model's own wherever they can be."""
    family = BY_NAME[model.config.family]
    tensors = {}
    for weight, parameter in model.named_parameters():
        for source in family.sources(model.config, weight, parameter.shape[0]):
            part = parameter.detach()[source.start : source.stop]
            tensors[source.name] = (part.T if source.transposed else part).contiguous()
    return tensors
