"""Summaries of pages: bounds that no key exceeds, guesses that are closer, rows taken again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape
from foveal.kv.summary import Summaries
from properties import examples

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=6, value_dim=4)
ALL = torch.tensor([0, 1])
ONES = torch.ones(2, 2, 1, 6)


@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    shift=st.sampled_from([0.0, 3.0, -100.0]),
)
def test_no_key_scores_more_than_the_bound_of_its_page(
    seed: int, dtype: torch.dtype, sizes: tuple[int, int, int], shift: float
) -> None:
    pages, page_size, group = sizes
    rng = torch.Generator().manual_seed(seed)
    summaries = Summaries(SHAPE, pages, dtype=dtype)
    keys = torch.randn(2, 2, pages, page_size, 6, generator=rng) + shift
    keys = keys.to(dtype)
    q = torch.randn(2, 2 * group, 3, 6, generator=rng).to(dtype)
    for row in range(2):
        summaries.write(1, row, range(pages), keys[row])
        summaries.hold(row, range(pages))
    bounds = torch.cat(list(summaries.scores(1, q, ALL, "bound")), -1)
    wide = keys.double().repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhnsd->bhtns", q.double(), wide)
    size = torch.einsum("bhtd,bhnsd->bhtns", q.double().abs(), wide.abs()).amax(-1)
    eps = torch.finfo(dtype).eps
    assert (bounds >= scores.amax(-1) - 8 * eps * size).all()
    if page_size == 1:
        assert ((bounds - scores[..., 0]).abs() <= 8 * eps * size).all(), "one key is its bound"
    (one,) = summaries.scores(1, q[1:], torch.tensor([1]), "bound")
    assert torch.allclose(one, bounds[1:])


def test_the_spread_is_that_of_independent_channels() -> None:
    wide = CacheShape(num_layers=1, batch=1, num_kv_heads=1, head_dim=64, value_dim=4)
    summaries, rng = Summaries(wide, 200), torch.Generator().manual_seed(0)
    keys = torch.randn(1, 200, 16, 64, generator=rng)
    q = torch.randn(1, 1, 20, 64, generator=rng)
    summaries.write(0, 0, range(200), keys)
    summaries.hold(0, range(200))
    best = torch.einsum("btd,bnsd->btns", q[0], keys).amax(-1)
    (spread,) = summaries.scores(0, q, torch.tensor([0]), "spread")
    (bound,) = summaries.scores(0, q, torch.tensor([0]), "bound")
    assert (bound[0] >= best).all() and float((spread[0] >= best).double().mean()) > 0.99
    assert float((spread[0] / best).median()) < float((bound[0] / best).median()) / 2


def test_many_pages_come_in_blocks() -> None:
    summaries = Summaries(SHAPE, 1100)
    keys = torch.randn(2, 1030, 3, 6, generator=torch.Generator().manual_seed(0))
    summaries.write(0, 0, range(5, 1035), keys)
    summaries.hold(0, range(5, 1035))
    q = torch.randn(2, 2, 1, 6, generator=torch.Generator().manual_seed(1))
    found = torch.cat(list(summaries.scores(0, q, ALL, "bound")), -1)[0, :, 0, 5:]
    scores = torch.einsum("hd,hnsd->hns", q[0, :, 0], keys).amax(-1)
    assert found.shape == scores.shape and (found >= scores - 1e-5).all()


def test_the_oldest_row_is_taken_again() -> None:
    summaries = Summaries(SHAPE, 4)
    for part in range(3, 9):
        summaries.write(0, 1, [part], torch.full((2, 1, 3, 6), float(part)))
        summaries.hold(1, [part])
    assert sorted(summaries.parts[1].tolist()) == [5, 6, 7, 8] and summaries.num_used == 4
    (bounds,) = summaries.scores(0, ONES, ALL, "bound")
    assert torch.equal(bounds[1, 0, 0], 6.0 * summaries.parts[1])
    summaries.forget(1, [6, 8])
    assert sorted(summaries.parts[1].tolist()) == [-1, -1, 5, 7]
    other = Summaries(SHAPE, 4)
    other.restore(summaries.state())
    assert torch.equal(other.parts, summaries.parts)
    assert torch.equal(next(other.scores(0, ONES, ALL, "bound")), bounds)
    copy = summaries.copy()
    summaries.clear()
    assert torch.equal(copy.parts, other.parts)
    assert not summaries.num_used and not list(summaries.scores(0, ONES, ALL, "bound"))


def test_they_take_what_they_say_and_refuse_what_does_not_fit() -> None:
    summaries = Summaries(SHAPE, 5, dtype=torch.bfloat16, device="meta")
    assert summaries.nbytes == 2 * 2 * 2 * 5 * 2 * 6 * 2
    with pytest.raises(ArgumentError, match="capacity: got 0"):
        Summaries(SHAPE, 0)
    with pytest.raises(ArgumentError, match=r"state summary\.0: got shape \[2, 2, 4, 12\]"):
        Summaries(SHAPE, 5).restore(Summaries(SHAPE, 4).state())
