"""Window policies: what a stream remembers, where it is kept, and what that costs.

A policy is one entry of `POLICIES`. It makes the cache, and the cache says the rest: which keys a
query may see (`Window`) and how many bytes they take. Bytes are counted on PyTorch's "meta"
device, that is from the very tensors that would be allocated, before any of them is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, ResumableCache, Window
from foveal.kv.formats import Scales, parse_format
from foveal.kv.paged import PagedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore

_PAGE_SIZE = 16
"""Tokens of a page: what is kept beyond window and sinks is less than two pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How a policy is to keep keys and values."""

    shape: CacheShape
    dtype: torch.dtype
    """In which the model computes them."""
    format: str
    """In which they are stored."""
    device: torch.device
    step_tokens: int
    """Most tokens that come at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One way to remember."""

    name: str
    keeps: str
    costs: str
    sinks: int
    """First tokens that are kept unless told otherwise."""
    most_sinks: int | None
    """None for as many as fit the window."""
    make: Callable[[Window, Storage], ResumableCache]

    def window(self, size: int, sinks: int) -> Window:
        """What is kept. Raises `ArgumentError` where the policy, or a window, cannot be so."""
        if self.most_sinks is not None and sinks > self.most_sinks:
            raise ArgumentError("sinks", sinks, f"{self.most_sinks} with policy {self.name!r}")
        return Window(size, sinks)


def _windowed(window: Window, storage: Storage) -> ResumableCache:
    """A ring where keys and values stay in the model's dtype, which moves nothing; else pages,
    just as many as window, sinks and one step can reach."""
    if storage.format == dtype_name(storage.dtype):
        return RingCache(storage.shape, window, dtype=storage.dtype, device=storage.device)
    if parse_format(storage.format).scales is Scales.CHANNEL:
        accepted = "a format with scales per token: a stream is stored token by token"
        raise ArgumentError("kv", repr(storage.format), accepted)
    reached = window.size - 1 + storage.step_tokens
    num_pages = -(-window.sinks // _PAGE_SIZE) + -(-reached // _PAGE_SIZE) + 1
    store = PageStore(
        storage.shape,
        num_pages,
        _PAGE_SIZE,
        key_format=storage.format,
        value_format=storage.format,
        device=storage.device,
    )
    return PagedCache(store, window=window, dtype=storage.dtype)


POLICIES: tuple[Policy, ...] = (
    Policy(
        name="sinks",
        keeps="the first tokens (sinks) and the last ones (window)",
        costs="(sinks + window) keys and values; what lies between is forgotten",
        sinks=4,
        most_sinks=None,
        make=_windowed,
    ),
    Policy(
        name="window",
        keeps="the last tokens (window)",
        costs="window keys and values; many models lose their way once the first token has left it "
        "(Xiao et al. 2024)",
        sinks=0,
        most_sinks=0,
        make=_windowed,
    ),
)


def find_policy(name: str) -> Policy:
    """The policy of this name. Raises `ArgumentError` if there is none."""
    for policy in POLICIES:
        if policy.name == name:
            return policy
    raise ArgumentError("policy", repr(name), ", ".join(policy.name for policy in POLICIES))
