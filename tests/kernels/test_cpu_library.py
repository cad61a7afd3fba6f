"""The native library: found or said to be missing; its functions in every instruction set."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError
from foveal.kernels import available
from foveal.kernels.cpu import library

pytestmark = pytest.mark.skipif(not available.native().present, reason="no native library")
ISAS = library.isas() if available.native().present else ()

EXP2, EXP, TANH, BFLOAT16, FLOAT16 = range(5)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


def evaluate(function: int, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    library.load().foveal_evaluate(function, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulps(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error against float64, in units in the last place of float32."""
    unit = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
    return float(((ours.double() - exact).abs() / unit).max())


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, where any NaN is as good as another."""
    nan = expected.isnan()
    return torch.equal(ours.isnan(), nan) and torch.equal(
        ours[~nan].view(torch.int32), expected[~nan].view(torch.int32)
    )


def test_exponentials_are_good_to_two_units(isa: str) -> None:
    x = torch.linspace(-125.9, 126.9, 1_000_003)
    assert ulps(evaluate(EXP2, x), torch.exp2(x.double())) < 1.5
    near = torch.linspace(-1, 1, 100_003)
    assert ulps(evaluate(EXP, near), torch.exp(near.double())) < 2


def test_exponentials_at_the_ends(isa: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, -127.0, -1e4, -3e38, -torch.inf, torch.nan, 10.0])
    expected = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, torch.nan, 1024])
    assert same(evaluate(EXP2, x), expected)
    tiny = torch.linspace(-127, -126, 1001)
    assert (evaluate(EXP2, tiny).double() - torch.exp2(tiny.double())).abs().max() < 2**-126


def test_tanh(isa: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 1_000_003), torch.logspace(-37, 0, 10_001)])
    x = x[x != 0]
    assert ulps(evaluate(TANH, x), torch.tanh(x.double())) < 3
    ends = torch.tensor([0.0, 50, -50, torch.inf, -torch.inf, torch.nan])
    assert same(evaluate(TANH, ends), torch.tanh(ends))


@pytest.mark.parametrize(
    ("function", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)], ids=str
)
def test_half_precision_rounds_as_pytorch_does(isa: str, function: int, dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(dtype).float()
    assert same(evaluate(function, every), every)
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (200_001,), generator=rng).to(torch.int32)
    middles = (every[:-1].double() + every[1:].double()) / 2  # ties
    for x in (words.view(torch.float32), torch.randn(50_001, generator=rng), middles.float()):
        assert same(evaluate(function, x), x.to(dtype).float())


def test_the_best_instruction_set_is_used_and_another_only_for_a_while() -> None:
    best = library.isas()[-1]
    assert library.isa() == best
    with library.using_isa(library.isas()[0]):
        assert library.isa() == library.isas()[0]
    assert library.isa() == best
    with pytest.raises(ArgumentError, match="isa: got 'mmx'"), library.using_isa("mmx"):
        pass


def test_one_openmp_runtime_in_the_process() -> None:
    """In a process of its own: other packages bring runtimes of theirs."""
    script = """
from pathlib import Path
from foveal.kernels.cpu import library
assert library.load().foveal_has_threads()
maps = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in maps if "omp" in line.split("/")[-1]}))
"""
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_missing_a_broken_and_an_old_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libfoveal_cpu.so"
    broken.write_text("not a library")
    with pytest.raises(library.NotBuilt, match="cannot be loaded"):
        library.open_library(broken)
    monkeypatch.setattr(library, "VERSION", -1)
    with pytest.raises(library.NotBuilt, match="not -1"):
        library.open_library(library._find())
    library.load.cache_clear()
    state = available.native()
    assert not state.present
    assert "not -1" in state.detail
    assert "install" in state.remedy
    assert available.native_isa() is None
    monkeypatch.undo()
    library.load.cache_clear()
    assert isinstance(library.load(), ctypes.CDLL)
