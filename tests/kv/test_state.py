"""What a cache holds can be kept elsewhere and put back into another cache, pads and all."""

from collections.abc import Callable

import pytest
import torch

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.cache import CacheShape, ResumableCache, Window
from foveal.kv.paged import PagedCache
from foveal.kv.quantised import QuantisedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore
from sights import sight

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=1, head_dim=4, value_dim=2)


def ring(window: Window) -> RingCache:
    return RingCache(SHAPE, window)


def pages(window: Window, format: str = "int8", num_pages: int = 20) -> PagedCache:
    store = PageStore(SHAPE, num_pages, 2, key_format=format, value_format=format)
    return PagedCache(store, window=window)


def quantised(window: Window) -> QuantisedCache:
    old = PageStore(SHAPE, 20, 2, key_format="int8-channel", value_format="int4")
    return QuantisedCache(pages(window, "float32"), old, num_recent=1)


def step(cache: ResumableCache, positions: torch.Tensor) -> list[torch.Tensor]:
    """Append tokens to both layers; every tensor of the views, as far as slots hold something."""
    seen = []
    rng = torch.Generator().manual_seed(cache.length)
    for layer in range(2):
        k, v = (torch.randn(2, 1, positions.shape[1], n, generator=rng) for n in (4, 2))
        for tile in cache.append(layer, k, v, positions).tiles(sight()):
            nothing = (tile.positions < 0)[:, None, :, None]
            seen += [x.masked_fill(nothing, 0) for x in (tile.keys, tile.values)]
            seen.append(tile.positions.clone())
    return seen


@pytest.mark.parametrize("make", [ring, pages, quantised])
def test_what_is_put_back_goes_on_to_the_bit(make: Callable[[Window], ResumableCache]) -> None:
    cache, other = (make(Window(5, 2)) for _ in range(2))
    step(cache, torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]]))
    for position in range(2, 9):
        step(cache, torch.tensor([[position], [position + 2]]))
    kept = {name: tensor.clone() for name, tensor in cache.state().items()}
    step(other, torch.tensor([[0, 1], [0, 1]]))
    other.restore(kept)
    assert other.length == cache.length == 11
    for positions in ([[9, 10, -1], [11, 12, 13]], [[11], [14]]):
        ours, theirs = step(cache, torch.tensor(positions)), step(other, torch.tensor(positions))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for length in range(15):  # what the pads took is known to both
        ours, theirs = (one.slots.tokens_before(length) for one in (cache, other))
        assert torch.equal(ours, theirs)


def test_the_state_of_another_cache_is_refused() -> None:
    cache = RingCache(SHAPE, Window(5, 2))
    with pytest.raises(ArgumentError, match=r"state keys\.0: got shape \[2, 1, 9, 4\]"):
        cache.restore(RingCache(SHAPE, Window(6, 2)).state())
    with pytest.raises(ArgumentError, match=r"state keys\.0: got nothing"):
        cache.restore({})
    paged = pages(Window(5, 2))
    with pytest.raises(ArgumentError, match=r"state keys\.0\.0: got torch.float32 .* torch.int8"):
        paged.restore(pages(Window(5, 2), "float32").state())
    step(paged, torch.arange(6).expand(2, 6))
    small = pages(Window(5, 2), num_pages=3)
    with pytest.raises(OutOfPages):
        small.restore(paged.state())
    assert small.length == 0 and small.store.pool.num_available == 3
    coded, plain = quantised(Window(5, 2)), pages(Window(5, 2), "float32")
    step(plain, torch.arange(3).expand(2, 3))
    with pytest.raises(ArgumentError, match=r"state keys\.0\.0: got torch.float32 .* torch.int8"):
        coded.restore(plain.state())
    assert coded.length == 0 and coded.stats.used_bytes == 0


def test_shared_pages_stay_shared() -> None:
    cache, other = pages(Window(20)), pages(Window(20))
    step(cache, torch.arange(8).expand(2, 8))
    one, two = cache.tables
    cache.store.pool.release(list(two.pages.values()))
    two.pages = dict(one.pages)
    cache.store.pool.share(two.pages.values())
    other.restore(cache.state())
    assert other.stats.used_bytes == cache.stats.used_bytes == 4 * cache.store.page_bytes
    other.reset()
    assert other.store.pool.num_available == 20, "no page is lost"
