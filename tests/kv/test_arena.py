"""The scratch arena: nothing overlaps, nothing is allocated once it is warm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kv.arena import Arena

SHAPES = st.tuples(
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]),
)


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.lists(SHAPES, max_size=5), min_size=1, max_size=4), nested=st.booleans())
def test_live_tensors_do_not_overlap(frames: list, nested: bool) -> None:
    arena = Arena()
    for _ in range(3):
        live: list[tuple[torch.Tensor, int]] = []

        def enter(rest: list, live: list = live) -> None:
            if not rest:
                return
            with arena.frame():
                before = len(live)
                for shape, dtype in rest[0]:
                    tensor = arena.take(shape, dtype).fill_(len(live))
                    assert (tensor.shape, tensor.dtype) == (shape, dtype)
                    assert tensor.is_contiguous()
                    live.append((tensor, len(live)))
                if nested:
                    enter(rest[1:])
                for tensor, value in live:
                    assert (tensor == value).all()
                del live[before:]
            if not nested:
                enter(rest[1:])

        enter(frames)


def work(arena: Arena, scale: int = 1) -> None:
    for size in (100, 300, 200):
        with arena.frame():
            arena.take((size * scale,), torch.float32)
            arena.take((3,), torch.int8)


def test_a_steady_state_allocates_nothing() -> None:
    arena = Arena()
    work(arena)
    warm = arena.stats
    for _ in range(10):
        work(arena)
    after = arena.stats
    assert after.requests == 11 * 6
    assert (after.allocations, after.nbytes) == (warm.allocations, warm.nbytes)
    assert after.nbytes == after.peak_bytes == 1216 + 64
    work(arena, scale=2)
    assert arena.stats.allocations > after.allocations, "it grows where more is wanted"


def test_memory_comes_from_the_same_place() -> None:
    arena = Arena()
    work(arena)
    with arena.frame():
        first = arena.take((5,), torch.float64).data_ptr()
        assert first % 64 == 0
        assert arena.take((5,), torch.float64).data_ptr() == first + 64
    with arena.frame():
        assert arena.take((7,), torch.int8).data_ptr() == first


def test_an_error_closes_the_frame() -> None:
    arena = Arena()
    work(arena)
    with pytest.raises(KeyError), arena.frame():
        arena.take((5,), torch.float32)
        raise KeyError
    with arena.frame():
        arena.take((300,), torch.float32)
    assert arena.stats.peak_bytes == 1216 + 64


def test_it_is_written_to_in_and_outside_of_inference_mode() -> None:
    arena = Arena()
    with torch.inference_mode():
        work(arena)
    with arena.frame():
        arena.take((5,), torch.float32).fill_(1.0)
