"""What one cache holds, poured into another: the same tokens at the same places, whatever the two
are, and the stream goes on as if it had been there from the start."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.catalogue import CACHES
from foveal.kv.paged import PagedCache
from foveal.kv.pour import Pourable, pour
from foveal.kv.quantised import QuantisedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore
from properties import examples
from sights import sight

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=8, value_dim=6)
ROOM = 64
KINDS = [
    kind
    for kind in CACHES
    if kind.window is not None and isinstance(kind.make(SHAPE, ROOM), Pourable)
]

Token = tuple[torch.Tensor, torch.Tensor]


def feed(cache: Pourable, positions: torch.Tensor, seed: int) -> dict[tuple[int, int, int], Token]:
    """Append tokens at these positions, [2, T]; what went where, by layer, row and position."""
    rng, fed = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        k, v = (torch.randn(2, 2, positions.shape[1], n, generator=rng) for n in (8, 6))
        cache.append(layer, k, v, positions)
        for row, column in (positions >= 0).nonzero().tolist():
            place = layer, row, int(positions[row, column])
            fed[place] = k[row, :, column], v[row, :, column]
    return fed


def held(cache: Pourable) -> dict[tuple[int, int, int], Token]:
    """Every token that a cache holds."""
    found = {}
    for layer in range(2):
        for tile in cache.view(layer).tiles(sight()):
            for row, slot in (tile.positions >= 0).nonzero().tolist():
                place = layer, row, int(tile.positions[row, slot])
                found[place] = tile.keys[row, :, slot].clone(), tile.values[row, :, slot].clone()
    return found


def check(cache: Pourable, fed: dict[tuple[int, int, int], Token], error: float) -> None:
    """All that a later query may see is there, as it was fed."""
    found, window = held(cache), cache.window
    for place, token in fed.items():
        end = int(cache.next_positions[place[1]])
        if place[2] < window.sinks or end - window.size < place[2] < end:
            for ours, given_ in zip(found[place], token, strict=True):
                assert torch.allclose(ours, given_, rtol=0, atol=8 * error + 1e-7 * bool(error))


@pytest.mark.parametrize("one", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("other", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=examples(6), deadline=None)
@given(data=st.data())
def test_what_is_poured_goes_on(one, other, data: st.DataObject) -> None:
    source, target = one.make(SHAPE, ROOM), other.make(SHAPE, ROOM)
    feed(target, torch.zeros(2, 1, dtype=torch.int64), 99)  # what was there is forgotten
    fed, pads = {}, data.draw(st.booleans())
    for seed in range(data.draw(st.integers(0, 6))):
        num = data.draw(st.sampled_from([1, 2, 5]))
        real = torch.ones(2, num, dtype=torch.bool)
        real[1, : num // 2] = not pads
        positions = source.next_positions[:, None] + real.cumsum(1) - 1
        fed |= feed(source, torch.where(real, positions, -1), seed)
    needed = target.window.sinks > source.window.sinks or target.window.size > source.window.size
    try:
        pour(source, target, data.draw(st.sampled_from([1, 3, 8])))
    except ArgumentError as error:
        assert needed and "a cache that has forgotten it" in str(error)
        assert target.length == 0 and not held(target)
        return
    assert target.length == source.length
    assert torch.equal(target.next_positions, source.next_positions)
    for length in range(source.length + 1):
        ours, theirs = (cache.slots.tokens_before(length) for cache in (target, source))
        assert torch.equal(ours, theirs)
    check(target, fed, one.error + other.error)
    for seed in range(10, 13):
        later = target.next_positions[:, None] + torch.arange(4)
        fed |= feed(target, later, seed)
        check(target, fed, one.error + other.error)


@pytest.mark.parametrize("start", [9, 12, 30])
def test_a_page_in_which_it_goes_on_is_coded_as_if_it_were_whole(start: int) -> None:
    """Its forgotten slots hold zeros, not what another stream had left there."""
    wide = PageStore(SHAPE, 20, 4)
    target = QuantisedCache(
        PagedCache(wide, window=Window(6, 1)),
        PageStore(SHAPE, 20, 4, key_format="int8-channel", value_format="int8-channel"),
        num_recent=0,
    )
    for layer in range(2):
        heads = torch.full((2, 2, 40, 8), 1e30)
        target.append(layer, heads, heads[..., :6])
    target.reset()
    source, fed = RingCache(SHAPE, Window(6, 1)), {}
    for position in range(start):
        fed |= feed(source, torch.full((2, 1), position), position)
    pour(source, target, 3)
    check(target, fed, 1 / 200)
    with pytest.raises(ArgumentError, match="one whose window is not evicted yet"):
        target.truncate(start - 1)
    for position in range(start, start + 5):
        fed |= feed(target, torch.full((2, 1), position), position)
        check(target, fed, 1 / 200)


def test_pages_are_given_back() -> None:
    store = PageStore(SHAPE, 12, 4)
    target, source = PagedCache(store, window=Window(6, 2)), RingCache(SHAPE, Window(6, 2))
    for round_ in range(5):
        feed(source, source.next_positions[:, None] + torch.arange(5), round_)
        pour(source, target, 4)
    target.reset()
    assert store.pool.num_available == 12
