"""Window policies: what a stream remembers, where it is kept, and what that costs.

A policy is a small frozen dataclass: its fields are its settings, its class says in words what it
keeps and costs. It makes the cache, and the cache says the rest: which keys a query may see
(`Window`) and how many bytes they take. Bytes are counted on PyTorch's "meta" device, that is from
the very tensors that would be allocated, before any of them is.

The policies are in `engine/policies/`; `policies/catalogue.py` lists them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from foveal.kv.cache import CacheShape, ResumableCache, Window
from foveal.nn.rope import RopeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How a policy is to keep keys and values."""

    shape: CacheShape
    dtype: torch.dtype
    """In which the model computes them."""
    format: str
    """In which they are stored."""
    device: torch.device
    """Where; on "meta" a cache is priced only: it allocates nothing and touches no file."""
    step_tokens: int
    """Most tokens that come at once."""
    ropes: tuple[RopeConfig, ...]
    """How each layer rotates its keys."""
    fingerprint: Callable[[], str]
    """Of the model, which files of keys and values belong to; reads all its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(Protocol):
    """One way to remember. Policies inherit from it; their fields are plain data, because a saved
    stream keeps them as JSON."""

    name: ClassVar[str]
    keeps: ClassVar[str]
    """What is remembered, in words."""
    costs: ClassVar[str]
    """What that takes, in words."""
    sinks: ClassVar[int]
    """First tokens that are kept unless told otherwise."""
    shared_steps: ClassVar[bool] = False
    """Whether the tokens of a step share what they see beside the window: small steps see better,
    and are what is taken where nobody says."""

    def default_window(self, context: int, sinks: int) -> int:
        """Last tokens to keep where nobody says, for a model made for `context` tokens."""
        return context - sinks

    def window(self, size: int, sinks: int) -> Window:
        """What is kept. Raises `ArgumentError` where the policy, or a window, cannot be so."""
        return Window(size, sinks)

    def make(self, window: Window, storage: Storage) -> ResumableCache:
        """An empty cache. What it has to tell beside the counts of every cache is in its `stats`,
        of a class of its own."""

    def read_bytes(self, cache: ResumableCache, storage: Storage, num_heads: int) -> int:
        """Bytes that one layer of a step takes at most to bring what it sees of the cache together,
        as that is stored; an estimate. `num_heads` are the query heads."""
        return cache.nbytes // storage.shape.num_layers

    def disk_bytes(self, window: Window, storage: Storage) -> int:
        """Bytes that the cache may take on disk; not part of any cap on memory."""
        return 0

    def after_step(self, cache: ResumableCache, num_tokens: int, seconds: float) -> None:
        """Called after each step of a stream over `cache`, with what it took: the place to adapt
        the cache to the time or to the memory there is."""

    def close(self, cache: ResumableCache) -> None:
        """Called when a session is closed: give back files and threads that `cache` holds."""
