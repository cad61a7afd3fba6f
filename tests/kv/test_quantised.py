"""What is particular to the quantised cache: what is coded, when, and what it takes."""

import itertools

import pytest
import torch

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.cache import CacheShape, Window
from foveal.kv.formats import parse_format
from foveal.kv.paged import PagedCache
from foveal.kv.prefix import Salt
from foveal.kv.quantised import QuantisedCache
from foveal.kv.store import PageStore
from sights import sight

SHAPE = CacheShape(num_layers=2, batch=1, num_kv_heads=2, head_dim=8, value_dim=8)


def cache(
    num_recent: int = 5,
    window: Window | None = None,
    key_format: str = "int4-channel",
    num_pages: int = 32,
    recent_pages: int = 32,
) -> QuantisedCache:
    recent = PagedCache(PageStore(SHAPE, recent_pages, 4), window=window)
    old = PageStore(SHAPE, num_pages, 4, key_format=key_format, value_format="int8")
    return QuantisedCache(recent, old, num_recent=num_recent)


def feed(cache: QuantisedCache, x: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Append x [T, 8] to both heads of both layers; what the last layer's view then holds."""
    heads = x.view(1, 1, -1, 8).expand(1, 2, -1, 8)
    for layer in range(2):
        view = cache.append(layer, heads + layer, heads - layer)
    seen = {}
    for tile in view.tiles(sight()):
        for slot, position in enumerate(tile.positions[0].tolist()):
            if position >= 0:
                seen[position] = (tile.keys[0, 0, slot].clone(), tile.values[0, 1, slot].clone())
    return seen


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def coded(x: torch.Tensor, name: str) -> torch.Tensor:
    """x as it comes back from a format, page by page of 4."""
    format = parse_format(name)
    return torch.cat([format.decode(format.encode(page), x.dtype) for page in x.split(4)])


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_old_pages_are_coded_once_and_the_rest_is_exact(chunk: int) -> None:
    held, x = cache(num_recent=5), tokens(20)
    for part in x.split(chunk):
        feed(held, part)
    seen = feed(held, tokens(1, 1))
    # 20 tokens before the last step: those of pages that end at or before 20 - 5 are old.
    keys, values = coded(x[:12] + 1, "int4-channel"), coded(x[:12] - 1, "int8")
    for position in range(12):
        assert torch.equal(seen[position][0], keys[position])
        assert torch.equal(seen[position][1], values[position])
    for position in range(12, 20):
        assert torch.equal(seen[position][0], x[position] + 1)
    assert len(seen) == 21


def test_sinks_are_never_coded() -> None:
    held, x = cache(num_recent=0, window=Window(9, 2)), tokens(24)
    feed(held, x)
    seen = feed(held, tokens(1, 1))
    assert sorted(p for p in seen if p > 24 - 9 or p < 2) == [0, 1, *range(16, 25)]
    for position in range(2):
        assert torch.equal(seen[position][0], x[position] + 1)
    assert not torch.equal(seen[17][0], x[17] + 1)


def test_truncation_into_an_old_page_decodes_it() -> None:
    held, x = cache(num_recent=0), tokens(13)
    feed(held, x)
    held.truncate(6)
    seen = feed(held, tokens(1, 1))
    keys = coded(x[:8] + 1, "int4-channel")
    assert sorted(seen) == list(range(7))
    assert all(torch.equal(seen[p][0], keys[p]) for p in range(6))


def test_a_fork_shares_old_pages_and_all_are_given_back() -> None:
    held = cache()
    feed(held, tokens(20))
    other = held.fork()
    assert held.store.pool.stats().num_used == 3
    feed(other, tokens(8, 1))
    assert held.store.pool.stats().num_used == 5
    assert held.length == 20
    for one in (held, other):
        one.reset()
    assert held.store.pool.stats().num_used == 0
    assert held.stats.used_bytes == 0


@pytest.mark.parametrize("name", ["int8", "int8-channel"])
def test_pages_of_int8_take_at_most_55_percent_of_bfloat16(name: str) -> None:
    for dim, page_size in itertools.product((64, 96, 128, 256), (64, 128, 256)):
        shape = CacheShape(num_layers=2, batch=1, num_kv_heads=2, head_dim=dim, value_dim=dim)
        few, wide = (
            PageStore(shape, 3, page_size, key_format=format, value_format=format, device="meta")
            for format in (name, "bfloat16")
        )
        assert few.nbytes <= 0.55 * wide.nbytes
        per_head = parse_format(name).nbytes(page_size, dim)
        assert few.page_bytes == 2 * 2 * 2 * per_head  # layers, heads, keys and values


@pytest.mark.parametrize("dim", [64, 128])
def test_int8_takes_at_most_55_percent_with_everything_counted(dim: int) -> None:
    shape = CacheShape(num_layers=2, batch=1, num_kv_heads=2, head_dim=dim, value_dim=dim)
    num_tokens, num_recent = 4096, 64
    wide = {"key_format": "bfloat16", "value_format": "bfloat16"}
    few = {"key_format": "int8", "value_format": "int8"}
    recent = PagedCache(PageStore(shape, 70, 64, **wide), dtype=torch.bfloat16)
    held = QuantisedCache(recent, PageStore(shape, 70, 64, **few), num_recent=num_recent)
    x = torch.zeros(1, 2, num_tokens, dim, dtype=torch.bfloat16)
    for layer in range(2):
        held.append(layer, x, x)
    everything = num_tokens * shape.slot_elements * 2
    per_page = held.store.page_bytes / recent.store.page_bytes
    assert per_page == (dim + 4) / (2 * dim)
    assert held.stats.used_bytes <= 0.55 * everything


def test_a_full_store_leaves_pages_exact_until_both_are_full() -> None:
    held, x = cache(num_recent=0, num_pages=1, recent_pages=3), tokens(14)
    for token in x.split(1):
        feed(held, token)
    assert held.store.pool.stats().num_used == 1
    with pytest.raises(OutOfPages):
        feed(held, tokens(3, 1))
    assert held.length == 14
    seen = feed(held, tokens(1, 1))
    assert all(torch.equal(seen[p][0], x[p] + 1) for p in range(4, 14))


def test_misuse_is_refused() -> None:
    recent, old = PagedCache(PageStore(SHAPE, 4, 4)), PageStore(SHAPE, 4, 4)
    with pytest.raises(ArgumentError, match="num_recent: got -1"):
        QuantisedCache(recent, old, num_recent=-1)
    with pytest.raises(ArgumentError, match="store: got pages of 8; accepted: pages of 4 tokens"):
        QuantisedCache(recent, PageStore(SHAPE, 4, 8), num_recent=0)
    with pytest.raises(ArgumentError, match="accepted: a cache without a salt: what a coded page"):
        QuantisedCache(PagedCache(recent.store, salt=Salt(model="m")), old, num_recent=0)
    recent.append(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    recent.append(1, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    with pytest.raises(ArgumentError, match="cache: got length 1; accepted: an empty cache"):
        QuantisedCache(recent, old, num_recent=0)
