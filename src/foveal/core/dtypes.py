"""Floating-point types by name: one table for the command line, files and tuning tables."""

import torch

from foveal.core.errors import ArgumentError

_NAMES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_ALIASES |= {"f64": "float64", "f32": "float32", "f16": "float16", "half": "float16"}

FLOATS: tuple[torch.dtype, ...] = tuple(_NAMES.values())
"""Every dtype that attention accepts."""


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called `name` (`bfloat16` or `bf16`, ...). Raises `ArgumentError` if unknown."""
    full = _ALIASES.get(name, name)
    if full not in _NAMES:
        raise ArgumentError("dtype", repr(name), ", ".join(_NAMES))
    return _NAMES[full]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
