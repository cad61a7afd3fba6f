"""Names for what a model computes: a SHA-256 over its configuration and every bit of its weights.

Saved states and shared pages belong to one model, and a name or a path does not say which: two
checkpoints of one run have the same. Takes about a second per GB, so callers keep the result.
"""

import hashlib
from collections.abc import Mapping

import torch

from foveal.models.decoder import Decoder


def fingerprint(model: Decoder) -> str:
    """Hexadecimal; equal for models whose configuration, dtype and weights are equal.

    Narrow weights are buffers; their format shows in names, dtypes and shapes.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    name = f"{model.config!r} {digest(tensors)}"
    return hashlib.sha256(name.encode()).hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of names, dtypes, shapes and contents, in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
