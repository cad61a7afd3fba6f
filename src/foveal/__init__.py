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
    from foveal.attention.paged import attend_paged
    from foveal.attention.spec import Approximation, AttentionSpec, alibi_slopes
    from foveal.attention.trace import trace
    from foveal.core.errors import (
        ArgumentError,
        BudgetExceeded,
        DriftExceeded,
        FovealError,
        LoadError,
        RequestError,
        Unsupported,
    )
    from foveal.engine.gate import Tolerance
    from foveal.engine.llm import LLM
    from foveal.engine.policies.dynamic import Dynamic
    from foveal.engine.policies.recall import Recall
    from foveal.engine.policies.windowed import Plain, Sinks
    from foveal.engine.request import SamplingParams
    from foveal.engine.session import Session
    from foveal.models.load import load_model
    from foveal.models.save import save_model

__version__ = "0.1.0"

_ROOMS = {
    "LLM": "engine.llm",
    "SamplingParams": "engine.request",
    "Session": "engine.session",
    "Tolerance": "engine.gate",
    "Sinks": "engine.policies.windowed",
    "Plain": "engine.policies.windowed",
    "Dynamic": "engine.policies.dynamic",
    "Recall": "engine.policies.recall",
    "AttentionSpec": "attention.spec",
    "Approximation": "attention.spec",
    "alibi_slopes": "attention.spec",
    "attend": "attention.api",
    "attend_varlen": "attention.api",
    "attend_paged": "attention.paged",
    "explain": "attention.explain",
    "trace": "attention.trace",
    "merge": "attention.merge",
    "load_model": "models.load",
    "save_model": "models.save",
    "FovealError": "core.errors",
    "ArgumentError": "core.errors",
    "Unsupported": "core.errors",
    "BudgetExceeded": "core.errors",
    "DriftExceeded": "core.errors",
    "LoadError": "core.errors",
    "RequestError": "core.errors",
}

__all__ = [
    "LLM",
    "Approximation",
    "ArgumentError",
    "AttentionSpec",
    "BudgetExceeded",
    "DriftExceeded",
    "Dynamic",
    "FovealError",
    "LoadError",
    "Plain",
    "Recall",
    "RequestError",
    "SamplingParams",
    "Session",
    "Sinks",
    "Tolerance",
    "Unsupported",
    "alibi_slopes",
    "attend",
    "attend_paged",
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
