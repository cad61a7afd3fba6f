"""Recall: what leaves the window retires to host memory or disk, and the best of it comes back
(Quest, Tang et al. 2024; InfLLM, Xiao et al. 2024)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.engine.policy import Policy, Storage
from foveal.kv.cache import ResumableCache, Window
from foveal.kv.paged import PagedCache
from foveal.kv.recall import RecallCache, RecallConfig
from foveal.kv.store import PageStore
from foveal.kv.tiers import TierConfig, Tiers
from foveal.nn.rope import Rotation

_PAGE_SIZE = 16
"""Tokens of a page. Twice as many bytes of summaries would be those of half the size."""
_BUDGET_OF_WINDOW = 4
"""Where nobody says, a step recalls one token for so many of the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall(Policy):
    """The first tokens, the last ones, and in each layer and step the best of those between.

    What is hot stays in the model's dtype; the stream's format of keys and values is that of
    retired pages.
    """

    name: ClassVar[str] = "recall"
    keeps: ClassVar[str] = (
        "the first tokens (sinks), the last ones (window), and what lies between as far as memory "
        "and disk hold it, of which each step sees the pages that its queries ask for most"
    )
    costs: ClassVar[str] = (
        "(sinks + window) keys and values; retired pages, and a summary of each that takes a part "
        "in 16 of its bytes in full precision; the ranking of all, and the fetching of the best"
    )
    sinks: ClassVar[int] = 4
    shared_steps: ClassVar[bool] = True

    budget: int | None = None
    """Bytes that a step may fetch, in all layers; None for a quarter of the window."""
    retired: int = 64 * 2**20
    """Bytes of host memory for retired pages; 0 for none, if there is a file."""
    frozen: str | None = None
    """A file for those that memory does not hold."""
    frozen_bytes: int = 2**30
    """Its size at most."""
    distances: str = "clamped"
    """At which recalled keys are seen: clamped to the window, or exact."""
    behind: int | None = None
    """Clamped to which: how far behind every query the last key of a recalled page stands; None
    for half of the window."""
    ranking: str = "spread"
    """How pages are ranked (`kv/summary.py`): spread, or bound."""

    def default_window(self, context: int, sinks: int) -> int:
        """Queries see a step and a page beyond the window, and the sinks' pages: all of it within
        the context, as steps are a quarter of the window at most."""
        pages = -(-sinks // _PAGE_SIZE) + 1
        return max(1, (context - pages * _PAGE_SIZE) * 4 // 5)

    def window(self, size: int, sinks: int) -> Window:
        """See `Policy.window`. Sinks are kept in whole pages."""
        if size < _PAGE_SIZE:
            accepted = f"at least a page of {_PAGE_SIZE} tokens, with policy {self.name!r}"
            raise ArgumentError("window size", size, accepted)
        return Window(size, -(-sinks // _PAGE_SIZE) * _PAGE_SIZE)

    def make(self, window: Window, storage: Storage) -> RecallCache:
        """See `Policy.make`. A frozen file of this model that is there is emptied: a saved state
        holds all that it needs. Raises `LoadError` for a file of anything else."""
        hot = self._hot(window, storage)
        tiers = self._tiers(storage)
        tiers.reset()
        config = RecallConfig(
            window=window,
            budget=self._budget(window, tiers.page_bytes),
            distances=self.distances,
            behind=self.behind,
            ranking=self.ranking,
        )
        ropes = storage.ropes

        def turn(layer: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return Rotation.back(ropes[layer], positions.unsqueeze(1), keys.dtype).apply(keys)

        return RecallCache(PagedCache(hot, dtype=storage.dtype), tiers, config, turn)

    def read_bytes(self, cache: ResumableCache, storage: Storage, num_heads: int) -> int:
        """See `Policy.read_bytes` and `RecallCache.read_bytes`."""
        assert isinstance(cache, RecallCache)
        return cache.read_bytes(num_heads, storage.step_tokens)

    def disk_bytes(self, window: Window, storage: Storage) -> int:
        """See `Policy.disk_bytes`."""
        return 0 if self.frozen is None else self.frozen_bytes

    def close(self, cache: ResumableCache) -> None:
        """See `Policy.close`."""
        assert isinstance(cache, RecallCache)
        cache.close()

    def _hot(self, window: Window, storage: Storage) -> PageStore:
        """As many pages as the sinks fill, and as window and step may lie in."""
        reached = window.size - 1 + storage.step_tokens
        num_pages = -(-window.sinks // _PAGE_SIZE) + -(-(reached - 1) // _PAGE_SIZE) + 1
        name = dtype_name(storage.dtype)
        return PageStore(
            storage.shape,
            num_pages,
            _PAGE_SIZE,
            key_format=name,
            value_format=name,
            device=storage.device,
        )

    def _tiers(self, storage: Storage) -> Tiers:
        configs = [TierConfig(name="cold", nbytes=self.retired)] if self.retired else []
        if self.frozen is not None:
            path = Path(self.frozen)
            configs.append(TierConfig(name="frozen", nbytes=self.frozen_bytes, path=path))
        priced = storage.device.type == "meta"
        salt = "" if self.frozen is None or priced else storage.fingerprint()
        if not configs:
            raise ArgumentError("retired", 0, "bytes of memory, or a frozen file")
        return Tiers(
            storage.shape,
            _PAGE_SIZE,
            configs,
            key_format=storage.format,
            value_format=storage.format,
            device=storage.device,
            salt=salt.encode(),
        )

    def _budget(self, window: Window, page_bytes: int) -> int:
        if self.budget is not None:
            return self.budget
        return max(1, window.size // _BUDGET_OF_WINDOW // _PAGE_SIZE) * page_bytes
