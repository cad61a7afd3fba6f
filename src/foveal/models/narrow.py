"""Narrow the weights of a model: its matrices in bfloat16, float16, int8 or int4, one at a time.

Norms, biases and learned positions stay float32, in which everything is computed. A tied output
matrix is the token embedding still: tokens are looked up in the narrow matrix, nothing is kept
twice.
"""

import torch
from torch import nn

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.kernels.portable.panels import WeightFormat, parse_weights
from foveal.models.decoder import Decoder
from foveal.nn.linear import NarrowEmbedding, NarrowLinear

_TOKENS = "embedding.tokens"


def narrow(model: Decoder, weights: str) -> None:
    """Store every matrix of a float32 `model` in the format `weights`, in place, for inference.

    Beside the model, one matrix at a time is in memory. Raises `ArgumentError`.
    """
    form = parse_weights(weights)
    if model.weight_format != dtype_name(torch.float32):
        raise ArgumentError("model", f"weights in {model.weight_format}", "weights in float32")
    for name, _ in list(model.named_modules()):
        narrow_module(model, name, form)


def narrow_module(model: Decoder, name: str, form: WeightFormat) -> None:
    """The same for one module of it; nothing happens to one that is no matrix."""
    module = model.get_submodule(name)
    if not is_matrix(name, module):
        return
    replacement: nn.Module
    if isinstance(module, nn.Linear):
        replacement = NarrowLinear(module.weight, module.bias, form)
    else:
        replacement = NarrowEmbedding(module.get_parameter("weight"), form)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, replacement.train(module.training))


def is_matrix(name: str, module: nn.Module) -> bool:
    """Whether this module's weight is narrowed: every linear layer's and the token embedding's."""
    return isinstance(module, nn.Linear) or (name == _TOKENS and isinstance(module, nn.Embedding))
