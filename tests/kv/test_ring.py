"""The circular buffer against a list, and what is particular to the ring cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.ring import RingBuffer, RingCache
from sights import sight

ONE = CacheShape(num_layers=1, batch=1, num_kv_heads=1, head_dim=1, value_dim=1)


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 7),
    sizes=st.lists(st.integers(0, 16) | st.just(-1), max_size=12),
    data=st.data(),
)
def test_a_buffer_is_the_end_of_a_list(capacity: int, sizes: list[int], data) -> None:
    buffer, rows = RingBuffer(capacity, (2,)), []
    for count, size in enumerate(sizes):
        if size < 0:
            buffer.clear()
            rows = []
            continue
        new = [[float(count), float(i)] for i in range(size)]
        buffer.append(torch.tensor(new).reshape(size, 2))
        rows = (rows + new)[-capacity:]
        assert len(buffer) == len(rows)
        assert buffer.all().tolist() == rows
        n = data.draw(st.integers(0, len(rows)))
        assert buffer.recent(n).tolist() == rows[len(rows) - n :]


def test_a_buffer_moves_nothing() -> None:
    buffer = RingBuffer(8)
    buffer.append(torch.arange(6.0))
    view = buffer.recent(6)
    buffer.append(torch.tensor([6.0, 7.0]))
    assert view.data_ptr() == buffer.all().data_ptr()
    buffer.append(torch.tensor([8.0]))
    assert view.tolist() == [8.0, 1.0, 2.0, 3.0, 4.0, 5.0], "the new row took the oldest's place"


def test_bad_buffers_are_refused() -> None:
    buffer = RingBuffer(3, (2,))
    for misuse in (
        lambda: RingBuffer(0),
        lambda: buffer.append(torch.zeros(2)),
        lambda: buffer.append(torch.zeros(1, 3)),
        lambda: buffer.recent(1),
        lambda: buffer.recent(-1),
    ):
        with pytest.raises(ArgumentError):
            misuse()


def test_window_smaller_than_the_sinks_is_refused() -> None:
    with pytest.raises(ArgumentError, match="sinks: got 5; accepted: an integer from 0 to"):
        Window(4, 5)
    with pytest.raises(ArgumentError, match="window size: got 0"):
        Window(0)


def held(cache: RingCache) -> list[int]:
    """What the cache holds, each key being its position."""
    k = torch.full((1, 1, 1, 1), float(cache.length))
    (tile,) = cache.append(0, k, k).tiles(sight())
    assert tile.positions is not None
    real = tile.positions[0] >= 0
    assert torch.equal(tile.keys[0, 0, real, 0], tile.positions[0, real].float())
    return sorted(tile.positions[0, real].tolist())


def test_sinks_and_window_are_what_stays() -> None:
    cache = RingCache(ONE, Window(3, 2))
    seen = [held(cache) for _ in range(9)]
    assert seen[4] == [0, 1, 2, 3, 4]
    assert seen[8] == [0, 1, 6, 7, 8]


def test_sinks_are_the_first_tokens_not_the_pads() -> None:
    cache = RingCache(ONE, Window(3, 2))
    pads = torch.zeros(1, 1, 4, 1)
    cache.append(0, pads, pads, torch.full((1, 4), -1))
    for position in range(8):
        k = torch.full((1, 1, 1, 1), float(position))
        (tile,) = cache.append(0, k, k, torch.tensor([[position]])).tiles(sight())
    assert sorted(tile.positions[0].tolist()) == [0, 1, 5, 6, 7]
    assert cache.length == 12


def test_memory_is_fixed_and_one_token_moves_nothing() -> None:
    cache = RingCache(ONE, Window(4, 1))
    k = torch.zeros(1, 1, 1, 1)
    places = set()
    for _ in range(30):
        (tile,) = cache.append(0, k, k).tiles(sight())
        places.add(tile.keys.data_ptr())
    assert len(places) == 1
    assert cache.nbytes == 2 * (4 + 1 + 1) * 4, "and one slot for what is not kept"


def test_truncate_needs_the_window_before_it() -> None:
    cache = RingCache(ONE, Window(4))
    for _ in range(6):
        held(cache)
    with pytest.raises(ArgumentError, match="length: got 3; accepted: the length 6"):
        cache.truncate(3)
    cache.truncate(5)  # the last token alone may go: a query at 5 sees 2, 3, 4 and itself
    assert held(cache) == [2, 3, 4, 5]


def test_positions_must_go_on() -> None:
    cache = RingCache(ONE, Window(4))
    k = torch.zeros(1, 1, 2, 1)
    for positions in ([[0, 2]], [[1, 2]], [[0, 0]]):
        with pytest.raises(ArgumentError, match=r"positions: got .* without a gap"):
            cache.append(0, k, k, torch.tensor(positions))
