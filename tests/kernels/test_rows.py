"""RMSNorm and rotary positions in native code: every instruction set against float64."""

from collections.abc import Iterator

import pytest
import torch

from foveal.kernels import available
from foveal.kernels.cpu import library
from foveal.kernels.cpu.rows import rms_norm, rotate, serves

pytestmark = pytest.mark.skipif(not available.present(), reason="no native library")
ISAS = library.isas() if available.present() else ()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


@pytest.mark.parametrize("size", [1, 3, 16, 63, 577, 4096])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(isa: str, size: int, offset: float) -> None:
    x, weight = torch.randn(3, 7, size) * 5, torch.randn(size)
    ours = rms_norm(x, weight, 1e-5, offset)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = exact * (weight.double() + offset)
    # Each of size / 64 additions in a row of the sum of squares, and some roundings after it.
    assert ((ours - exact).abs() <= (size / 64 + 6) * 2.0**-24 * exact.abs() + 1e-7).all()
    assert torch.equal(rms_norm(x[1:2, 3], weight, 1e-5, offset)[0], ours[1, 3])
    assert torch.equal(rms_norm(x.transpose(0, 1), weight, 1e-5, offset), ours.transpose(0, 1))


def test_rms_norm_of_what_is_not_finite_and_of_nothing(isa: str) -> None:
    x, weight = torch.ones(3, 20), torch.ones(20)
    x[1, 4] = torch.nan
    y = rms_norm(x, weight, 1e-5, 0.0)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert torch.equal(rms_norm(torch.zeros(1, 20), weight, 1e-5, 0.0), torch.zeros(1, 20))
    assert rms_norm(torch.ones(0, 20), weight, 1e-5, 0.0).shape == (0, 20)


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (20, 7), (7, 3), (128, 20), (2, 1)])
@pytest.mark.parametrize("turns", [1, 2])
def test_rotate(isa: str, dim: int, half: int, turns: int) -> None:
    x = torch.randn(2, 4, 3, dim).transpose(1, 2)
    angle = torch.rand(turns, 1, 4, half) * 7
    ours = rotate(x, angle.cos(), angle.sin())
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = x[..., :half].double(), x[..., half : 2 * half].double()
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    size = (first.abs() + second.abs()).repeat(1, 1, 1, 2)
    assert ((ours[..., : 2 * half] - exact).abs() <= 2.0**-23 * size).all()
    assert torch.equal(ours[..., 2 * half :], x[..., 2 * half :])
    assert ours.is_contiguous()
    gapped = torch.randn(2, 3, 4, 2 * dim)[..., ::2]
    assert torch.equal(
        rotate(gapped, angle.cos(), angle.sin()),
        rotate(gapped.contiguous(), angle.cos(), angle.sin()),
    )


def test_threads_change_no_bit() -> None:
    x, weight, before = torch.randn(200, 1000), torch.randn(1000), torch.get_num_threads()
    angle = torch.rand(1, 1, 50, 60)
    heads = torch.randn(2, 9, 50, 128)
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            turned = rotate(heads, angle.cos(), angle.sin())
            results.append((rms_norm(x, weight, 1e-5, 0.0), turned))
    finally:
        torch.set_num_threads(before)
    for normed, turned in results[1:]:
        assert torch.equal(normed, results[0][0])
        assert torch.equal(turned, results[0][1])


def test_who_is_served() -> None:
    x = torch.ones(1)
    assert not serves(x)
    with torch.no_grad():
        assert serves(x)
        assert not serves(x.double())
        assert not serves(x.to("meta"))
        assert not serves(torch.nn.Parameter(x))
