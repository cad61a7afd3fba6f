"""Attention mass: what share of each head's attention goes to the first tokens?

Models with an attention sink give most of it to the first token, whatever that is, where they find
nothing to look at (Xiao et al. 2024); only these lose their way without it. The share is read from
the log-sum-exp, which attention tells a view after every tile: the first tokens are made tiles of
their own, so exp(lse of the tile - lse of everything) is their share, by the computation that
serves, not by another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from foveal.bench.quality import Mass
from foveal.kv.cache import CacheStats, KVView, Sight, View, Window
from foveal.kv.contiguous import ContiguousCache
from foveal.models.decoder import Decoder

NUM_FIRST = 4
"""As many as the sinks of Xiao et al."""


@torch.inference_mode()
def masses(
    model: Decoder, passages: Sequence[Sequence[int]], first: int, backend: str
) -> list[Mass]:
    """Mean shares over the queries from `first` on of dense attention over each passage."""
    total = torch.zeros(model.config.num_layers, model.config.num_heads, NUM_FIRST)
    length = len(passages[0])
    for passage in passages:
        cache = WatchedCache(model.new_cache(capacity=length))
        for part in (passage[:first], passage[first:]):
            model.hidden(torch.tensor([part], device=model.device), cache=cache, backend=backend)
        total += torch.stack([shares.mean(-1) for shares in cache.shares]).cpu()
    even = float((1 / (torch.arange(first, length) + 1)).mean())
    return [
        Mass(layer=layer, head=head, shares=tuple(shares.tolist()), even=even)
        for layer, heads in enumerate(total / len(passages))
        for head, shares in enumerate(heads)
    ]


class WatchedCache:
    """A contiguous cache of one sequence, of which attention sees the first tokens one by one.
    Implements `KVCache`."""

    def __init__(self, cache: ContiguousCache) -> None:
        self._cache = cache
        self.shares: list[torch.Tensor] = []
        """Of each layer [H, NUM_FIRST, T], in the last step."""

    @property
    def length(self) -> int:
        """Slots in use."""
        return self._cache.length

    @property
    def window(self) -> Window | None:
        """It keeps everything."""
        return self._cache.window

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._cache.nbytes

    @property
    def stats(self) -> CacheStats:
        """Counts for reports."""
        return self._cache.stats

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [1]: there are positions, because there is more than one tile."""
        return torch.tensor([self.length], device=self._cache.device)

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> View:
        """See `KVCache.append`."""
        if layer == 0:
            self.shares = []
        view = self._cache.append(layer, k, v, positions)
        return WatchedView(view, self.shares)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        self._cache.truncate(length)

    def fork(self) -> Self:
        """An independent cache with the same content."""
        return type(self)(self._cache.fork())

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._cache.reset()


@dataclass(frozen=True, slots=True, eq=False)
class WatchedView:
    """A view whose first tokens are tiles of their own."""

    whole: KVView
    shares: list[torch.Tensor]
    window: Window | None = None
    num_rows: int = 1

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """The first tokens, and the rest."""
        parts = []
        for start in range(NUM_FIRST):
            yield self._tile(slice(start, start + 1))
            assert sight.tile_lse is not None
            parts.append(sight.tile_lse.clone())
        yield self._tile(slice(NUM_FIRST, None))
        self.shares.append(torch.exp(torch.stack(parts, 2) - sight.lse.unsqueeze(2))[0])

    def rows(self, index: torch.Tensor) -> "WatchedView":
        """There is but one."""
        return self

    def _tile(self, slots: slice) -> KVView:
        whole = self.whole
        assert whole.positions is not None
        keys, values = whole.keys[:, :, slots], whole.values[:, :, slots]
        return replace(whole, keys=keys, values=values, positions=whole.positions[:, slots])
