"""foveal: the full attention stack, from kernels to a serving engine.

    from foveal import AttentionSpec, attend, explain
    out = attend(q, k, v, AttentionSpec.of(q, k, v, causal=True, window=(255, None)))

This module holds the public names and nothing else. Names are imported when they are first used,
so that attention needs nothing but PyTorch and `foveal --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveal.attention.api import attend, attend_varlen
    from foveal.attention.explain import explain
    from foveal.attention.merge import merge
    from foveal.attention.spec import Approximation, AttentionSpec, alibi_slopes
    from foveal.attention.trace import trace
    from foveal.core.errors import (
        ArgumentError,
        BudgetExceeded,
        FovealError,
        LoadError,
        RequestError,
        Unsupported,
    )
    from foveal.engine.llm import LLM
    from foveal.engine.request import SamplingParams
    from foveal.models.load import load_model
    from foveal.models.save import save_model

__version__ = "0.1.0"

_ROOMS = {
    "LLM": "engine.llm",
    "SamplingParams": "engine.request",
    "AttentionSpec": "attention.spec",
    "Approximation": "attention.spec",
    "alibi_slopes": "attention.spec",
    "attend": "attention.api",
    "attend_varlen": "attention.api",
    "explain": "attention.explain",
    "trace": "attention.trace",
    "merge": "attention.merge",
    "load_model": "models.load",
    "save_model": "models.save",
    "FovealError": "core.errors",
    "ArgumentError": "core.errors",
    "Unsupported": "core.errors",
    "BudgetExceeded": "core.errors",
    "LoadError": "core.errors",
    "RequestError": "core.errors",
}

__all__ = [
    "LLM",
    "Approximation",
    "ArgumentError",
    "AttentionSpec",
    "BudgetExceeded",
    "FovealError",
    "LoadError",
    "RequestError",
    "SamplingParams",
    "Unsupported",
    "alibi_slopes",
    "attend",
    "attend_varlen",
    "explain",
    "load_model",
    "merge",
    "save_model",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module 'foveal' has no attribute {name!r}")
    return getattr(import_module(f"foveal.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
