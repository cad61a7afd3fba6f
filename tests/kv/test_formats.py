"""Storage formats: error within half a step, bytes exactly as stated, corners kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.formats import FORMATS, Format, Scales, parse_format

ALL = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
QUANTISED = [format for format in FORMATS if format.quantised]


def draw(seed: int, scale: float = 1.0) -> torch.Tensor:
    """[3, 2, 16, 8] with one channel far from zero, as keys have them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 16, 8, generator=rng)
    x[..., 5] += 20
    return x * scale


@ALL
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
def test_error_is_at_most_half_a_step(format: Format, seed: int, scale: float) -> None:
    x = draw(seed, scale)
    stored = format.encode(x)
    error = (format.decode(stored, torch.float32) - x).abs()
    if stored.scale is None:
        kind = torch.finfo(format.dtype)
        assert (error <= (x.abs() + kind.smallest_normal) * kind.eps / 2).all()
    else:
        rounding = 4 * torch.finfo(torch.float32).eps * x.abs().amax()
        assert (error <= stored.scale / 2 + rounding).all()


@ALL
@pytest.mark.parametrize(("tokens", "dim"), [(64, 64), (16, 128), (1, 2), (7, 6)])
def test_bytes_are_exact(format: Format, tokens: int, dim: int) -> None:
    stored = format.encode(torch.randn(5, 3, tokens, dim))
    assert stored.nbytes == 15 * format.nbytes(tokens, dim)
    empty = format.empty((5, 3, tokens, dim))
    assert [(t.shape, t.dtype) for t in empty.tensors] == [
        (t.shape, t.dtype) for t in stored.tensors
    ]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_int8_takes_at_most_55_percent_of_bfloat16(tokens: int, dim: int) -> None:
    wide = parse_format("bfloat16").nbytes(tokens, dim)
    for name in ("int8", "int8-channel"):
        assert parse_format(name).nbytes(tokens, dim) <= 0.55 * wide
    for name in ("int4", "int4-channel"):
        assert parse_format(name).nbytes(tokens, dim) <= 0.32 * wide


@pytest.mark.parametrize("format", QUANTISED, ids=lambda format: format.name)
def test_constant_rows_are_kept_exactly_enough(format: Format) -> None:
    for value in (0.0, -3.0, 1e-44):
        x = torch.full((2, 4, 6), value)
        back = format.decode(format.encode(x), torch.float32)
        assert torch.allclose(back, x, rtol=1e-6, atol=1e-43)


@pytest.mark.parametrize("format", QUANTISED, ids=lambda format: format.name)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_and_stays_where_it_is(format: Format, poison: float) -> None:
    x = draw(0)
    x[1, 0, 2, 3] = poison
    back = format.decode(format.encode(x), torch.float32)
    hit = torch.zeros_like(x, dtype=torch.bool)
    index = (1, 0, 2) if format.scales is Scales.TOKEN else (1, 0, slice(None), 3)
    hit[index] = True
    assert not back[1, 0, 2, 3].isfinite()
    assert back[~hit].isfinite().all()


def test_a_channel_far_from_zero_wants_scales_per_channel() -> None:
    x = draw(0)
    errors = {
        format.name: (format.decode(format.encode(x), torch.float32) - x).square().mean()
        for format in QUANTISED
    }
    assert errors["int4-channel"] < errors["int4"] / 10
    assert errors["int8"] < errors["int4"] / 50


def test_bad_formats_are_refused() -> None:
    with pytest.raises(ArgumentError, match="format: got 'int3'; accepted: float32, bfloat16"):
        parse_format("int3")
    with pytest.raises(ArgumentError, match="head size: got 7; accepted: an even number"):
        parse_format("int4").empty((1, 1, 4, 7))
