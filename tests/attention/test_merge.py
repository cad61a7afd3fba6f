"""Merging partial results: parts of any cut, in any order, equal the whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.merge import merge, with_sink
from foveal.core.errors import ArgumentError
from properties import examples

B, H, L, D = 2, 3, 4, 5


def scores_and_values(num_keys: int, seed: int, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(B, H, L, num_keys, generator=rng, dtype=torch.float64)
    return scores, torch.randn(B, H, num_keys, D, generator=rng, dtype=torch.float64)


def partial(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return weights @ values, lse


@settings(max_examples=examples(40), deadline=None)
@given(
    cuts=st.lists(st.integers(0, 24), max_size=5),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**31),
    hidden=st.floats(0, 1),
)
def test_parts_in_any_order_equal_the_whole(cuts, order, seed, hidden) -> None:
    scores, values = scores_and_values(24, seed)
    rng = torch.Generator().manual_seed(seed)
    scores[torch.rand(scores.shape, generator=rng) < hidden] = -math.inf
    bounds = [0, *sorted(cuts), 24]
    parts = [partial(scores[..., a:b], values[..., a:b, :]) for a, b in itertools.pairwise(bounds)]
    order.shuffle(parts)
    out, lse = merge(*zip(*parts, strict=True))
    whole, whole_lse = partial(scores, values)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-15, atol=1e-14)


def test_grouping_changes_rounding_only() -> None:
    scores, values = scores_and_values(24, 0)
    cuts = (slice(0, 7), slice(7, 15), slice(15, 24))
    a, b, c = (partial(scores[..., cut], values[..., cut, :]) for cut in cuts)
    left = merge(*zip(merge(*zip(a, b, strict=True)), c, strict=True))
    right = merge(*zip(a, merge(*zip(b, c, strict=True)), strict=True))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_nothing_seen_is_the_identity() -> None:
    out, lse = partial(*scores_and_values(9, 1))
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for first, second, expected in (
        ((out, lse), nothing, (out, lse)),
        (nothing, (out, lse), (out, lse)),
        (nothing, nothing, nothing),
    ):
        merged = merge(*zip(first, second, strict=True))
        assert all(map(torch.equal, merged, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("difference", [1e3, -1e3])
def test_a_far_larger_part_wins_without_nan(dtype: torch.dtype, difference: float) -> None:
    outs = torch.ones(L, D, dtype=dtype), torch.full((L, D), 2.0, dtype=dtype)
    lses = torch.zeros(L), torch.full((L,), difference)
    out, lse = merge(outs, lses)
    assert torch.equal(out, outs[difference > 0])
    assert torch.equal(lse, lses[difference > 0])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


def test_half_parts_are_summed_in_float32() -> None:
    """256 parts of weight 1/256: a running sum in bfloat16 would stall."""
    out, _ = merge([torch.ones(1, 1, dtype=torch.bfloat16)] * 256, [torch.zeros(1)] * 256)
    assert out.item() == 1.0


def test_gradients() -> None:
    outs = [torch.randn(L, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(L, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: merge(t[:3], t[3:]), (*outs, *lses))


def test_gradients_of_hidden_rows_are_zero() -> None:
    outs = [torch.zeros(L, D, requires_grad=True) for _ in range(2)]
    lses = [torch.full((L,), -math.inf, requires_grad=True) for _ in range(2)]
    out, lse = merge(outs, lses)
    (out.sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()).backward()
    for leaf in (*outs, *lses):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_sink_is_a_part_without_a_value() -> None:
    scores, values = scores_and_values(9, 2)
    scores[0, 0, 0] = -math.inf
    sinks = torch.tensor([0.3, -math.inf, 2.0], dtype=torch.float64, requires_grad=True)
    out, lse = with_sink(*partial(scores, values), sinks)
    column = sinks.view(1, H, 1, 1).expand(B, H, L, 1)
    joined = torch.cat([scores, column], -1)
    empty = torch.cat([values, torch.zeros(B, H, 1, D, dtype=torch.float64)], -2)
    whole, whole_lse = partial(joined, empty)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-14, atol=0)


def test_sink_gradients() -> None:
    out = torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(B, H, L, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(with_sink, (out, lse, sinks))


def test_parts_must_pair_up() -> None:
    with pytest.raises(ArgumentError, match="outs, lses: got 2 and 1"):
        merge([torch.zeros(1, 1)] * 2, [torch.zeros(1)])
