"""Linear layers with narrow weights: every format in every instruction set against float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kernels import available
from foveal.kernels.cpu import library
from foveal.kernels.cpu.linear import BoundLinear
from foveal.kernels.narrow import bind, portable_linear
from foveal.kernels.portable.panels import (
    PANEL,
    WeightFormat,
    decode,
    decode_rows,
    encode,
    parse_weights,
)
from properties import examples

NAMES = ("f32", "bf16", "f16", "int8", "int8-32", "int8-40", "int4", "int4-128")
SHAPES = ((1, 1), (33, 7), (64, 65), (100, 96), (31, 1100))
"""N, K: about panels, vectors, groups, and more inputs than are widened at once."""
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 24, 25, 26, 70)
ISAS = library.isas() if available.native().present else ()
needs_native = pytest.mark.skipif(not ISAS, reason="no native library")


@pytest.fixture(params=ISAS or ("none",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


class Case:
    """A random matrix in a format, its bias, and what it stands for."""

    def __init__(self, outputs: int, inputs: int, name: str, bias: bool = True) -> None:
        self.form = parse_weights(name)
        self.exact = torch.randn(outputs, inputs)
        self.bias = torch.randn(outputs) if bias else None
        self.panels = encode(self.exact, self.form)
        self.weight = decode(self.panels, outputs, self.form)

    def bound(self) -> BoundLinear:
        found = bind(self.panels, len(self.exact), self.bias, self.form)
        assert found is not None
        return found

    def portable(self, x: torch.Tensor) -> torch.Tensor:
        return portable_linear(x, self.panels, len(self.exact), self.bias, self.form)

    def worst(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """The largest error of y, in units of its bound: one rounding for every term."""
        bias = torch.zeros(()) if self.bias is None else self.bias
        exact = x.double() @ self.weight.double().T + bias
        size = x.double().abs() @ self.weight.double().abs().T + bias.abs()
        unit = 2.0**-24 * (self.exact.shape[1] + 1)
        return float(((y - exact).abs() / (size * unit)).max())


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_against_float64(isa: str, shape: tuple[int, int], name: str) -> None:
    case = Case(*shape, name)
    bound, x = case.bound(), torch.randn(max(ROWS), shape[1])
    every = bound(x)
    assert case.worst(x, every) <= 1
    for rows in ROWS:  # a row alone, or in any batch: the same bits
        assert torch.equal(bound(x[:rows]), every[:rows]), rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_against_float64(shape: tuple[int, int], name: str) -> None:
    case = Case(*shape, name)
    x = torch.randn(2, 3, shape[1])
    assert case.worst(x, case.portable(x)) <= 1


@needs_native
@settings(max_examples=examples(40), deadline=None)
@given(
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 60),
    name=st.sampled_from([*NAMES, "int8-1", "int4-7"]),
    bias=st.booleans(),
)
def test_any_shape(outputs: int, inputs: int, rows: int, name: str, bias: bool) -> None:
    case = Case(outputs, inputs, name, bias)
    x = torch.randn(rows, inputs)
    y = case.bound()(x)
    assert case.worst(x, y) <= 1
    assert case.worst(x, case.portable(x)) <= 1


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_native_weights_are_those_of_pytorch_to_the_bit(isa: str, name: str) -> None:
    case = Case(45, 130, name, bias=False)
    bound, unit = case.bound(), torch.eye(130)
    assert torch.equal(bound(unit).T, case.weight)
    assert torch.equal(torch.cat([bound(row) for row in unit.split(5)]).T, case.weight)


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 70, 800])
def test_threads_change_no_bit(rows: int) -> None:
    case = Case(300, 601, "int8-32")
    bound, x, before = case.bound(), torch.randn(rows, 601), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(bound(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][-1:], bound(x[-1:]))


@needs_native
def test_no_rows_no_work() -> None:
    case = Case(40, 20, "bf16")
    assert case.bound()(torch.empty(0, 20)).shape == (0, 40)
    assert case.portable(torch.empty(2, 0, 20)).shape == (2, 0, 40)


@needs_native
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_show_in_their_row_alone(
    isa: str, bad: float, rows: int
) -> None:
    case = Case(40, 20, "int4")
    x = torch.randn(rows, 20)
    x[1, 7] = bad
    y = case.bound()(x)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_show_in_their_channel_alone(name: str, bad: float) -> None:
    weight = torch.randn(40, 70)
    weight[33, 5] = bad
    form = parse_weights(name)
    wide = decode(encode(weight, form), 40, form)
    assert not wide[33, 5].isfinite()
    others = torch.arange(40) != 33
    assert wide[others].isfinite().all()
    if ISAS:
        y = BoundLinear(encode(weight, form), 40, None, form)(torch.ones(1, 70))
        assert not y[0, 33].isfinite()
        assert y[0, others].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_rounding(name: str) -> None:
    form = parse_weights(name)
    weight = torch.randn(70, 203) * torch.logspace(-6, 3, 70).unsqueeze(1)
    weight[3] = 0
    panels = encode(weight, form)
    wide = decode(panels, 70, form)
    assert torch.equal(wide[3], torch.zeros(203))
    if not form.quantised:
        assert torch.equal(wide, weight.to(form.dtype).float())
        return
    group = form.group or 203
    for start in range(0, 203, group):
        part, ours = weight[:, start : start + group], wide[:, start : start + group]
        largest = part.abs().amax(1, keepdim=True)
        spread = part.amax(1, keepdim=True) - part.amin(1, keepdim=True)
        step = largest / 127 if form.bits == 8 else spread / 15
        # Half a step, and what bfloat16 takes from scale and low at the ends of the range.
        assert ((ours - part).abs() <= step / 2 + largest * 2.0**-8).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_matrix(name: str) -> None:
    case = Case(70, 90, name)
    index = torch.tensor([[0, 69, 31], [32, 15, 16]])
    assert torch.equal(decode_rows(case.panels, index, case.form), case.weight[index])


@pytest.mark.parametrize(
    ("name", "bits"), [("bf16", 16), ("f16", 16), ("int8-64", 8.25), ("int4", 5), ("int4-64", 4.5)]
)
def test_bytes(name: str, bits: float) -> None:
    form = parse_weights(name)
    panels = encode(torch.randn(2 * PANEL, 256), form)
    assert sum(t.nbytes for t in panels.tensors) * 8 == 2 * PANEL * 256 * bits


def test_large_matrices_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, form = torch.randn(100, 50), parse_weights("int4")
    whole = encode(weight, form)
    monkeypatch.setattr("foveal.kernels.portable.panels._CHUNK_BYTES", 1)
    parts = encode(weight, form)
    assert all(map(torch.equal, whole.tensors, parts.tensors))
    assert torch.equal(decode(parts, 100, form), decode(whole, 100, form))


@pytest.mark.parametrize("name", ["int3", "int8-0", "bf16-32", "", "INT8"])
def test_unknown_format(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"weights: got .* accepted: f32, bf16, f16, int8"):
        parse_weights(name)


def test_formats_are_their_settings() -> None:
    assert parse_weights("int4-64") == WeightFormat(
        name="int4-64", dtype=torch.uint8, bits=4, group=64
    )
