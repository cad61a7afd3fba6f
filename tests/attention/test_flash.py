"""The portable flash backend: what it visits, what it holds, and that cutting changes nothing.

The native kernels are kept out here; `test_cpu_attention` is theirs, and `test_cases` takes what a
call would take.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
from cases import CASES, Case, spec
from foveal.attention import native
from foveal.attention.api import attend
from foveal.attention.backends import flash
from foveal.attention.mask import Visibility
from foveal.attention.merge import with_sink
from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.attention.workload import Workload
from foveal.bench.memory import counted_peak
from foveal.hardware.roofline import Peaks
from foveal.kernels.portable.flash_tiles import Plan

HEADS, DIM = 16, 8
EMPTY = ("no-queries", "no-keys", "no-batch")
"""Cases that the door answers."""
PEAKS = Peaks(
    device="cpu",
    matmul_flops=(("float32", 1e11),),
    bandwidth_bytes=1e10,
    overhead_s=1e-5,
    source="of a test",
)


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "obstacles", lambda *call: ("kept out by a test",))


def tensors(length: int, grad: bool = False, kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    made = (torch.randn(1, h, length, DIM, generator=rng) for h in (HEADS, kv_heads, kv_heads))
    return tuple(x.requires_grad_(grad) for x in made)


def plan_of(made: AttentionSpec, q_len: int, kv_len: int, sizes: flash.Sizes) -> Plan:
    q = torch.empty(1, made.num_heads, q_len, made.head_dim, device="meta")
    k = torch.empty(1, made.num_kv_heads, kv_len, made.head_dim, device="meta")
    return flash.plan(q, k, made, Operands(), sizes)


def peak(length: int, backward: bool) -> int:
    """Peak bytes of a call beyond its inputs."""
    q, k, v = tensors(length, backward)
    made = AttentionSpec.of(q, k, v, causal=True)

    def call() -> None:
        out = attend(q, k, v, made, backend="flash")
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return counted_peak(call)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear(backward: bool) -> None:
    """Once tiles have their full size, only tensors as long as the inputs grow."""
    short, long = peak(1024, backward), peak(2048, backward)
    assert long < 2.2 * short
    assert long < HEADS * 2048 * 2048 * 4 / 8, "an eighth of one matrix of scores"


@settings(max_examples=60, deadline=None)
@given(
    q_len=st.integers(1, 90),
    kv_len=st.integers(1, 90),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 40),
    sinks=st.integers(0, 20),
    chunk=st.none() | st.integers(1, 30),
    rows=st.integers(1, 40),
    keys=st.integers(1, 40),
    spanned=st.integers(1, 4),
)
@example(q_len=60, kv_len=60, causal=True, left=3, sinks=8, chunk=None, rows=4, keys=4, spanned=4)
def test_plan_visits_what_is_visible_and_masks_what_is_not(
    q_len, kv_len, causal, left, sinks, chunk, rows, keys, spanned
) -> None:
    made = spec(causal=causal, window=(left, None), sinks=sinks, chunk=chunk)
    sizes = flash.Sizes(1, rows, keys, keys * spanned)
    visited = torch.zeros(q_len, kv_len, dtype=torch.int64)
    masked = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for tile, spans in plan_of(made, q_len, kv_len, sizes).tiles:
        for span in spans:
            assert span.keys.stop - span.keys.start <= sizes.span
            visited[tile.rows, span.keys] += 1
            for keys_hidden in span.partial:
                masked[tile.rows, keys_hidden] = True
    empty = torch.empty(1, 1, q_len, 1), torch.empty(1, 1, kv_len, 1)
    seen = Visibility.of(made, *empty, Operands()).dense()[0, 0]
    assert (visited <= 1).all(), "a pair is visited twice"
    assert (visited[seen] == 1).all(), "a visible pair is not visited"
    assert (masked | seen)[visited == 1].all(), "a hidden pair is visited and not masked"


def test_hidden_tiles_are_skipped_and_full_ones_not_masked() -> None:
    length, sizes = 1024, flash.Sizes(1, 64, 64, 64)
    causal = plan_of(spec(causal=True), length, length, sizes).tiles
    assert sum(len(spans) for _, spans in causal) == 16 * 17 // 2
    assert sum(bool(span.partial) for _, spans in causal for span in spans) == 16
    window = plan_of(spec(causal=True, window=(63, None)), length, length, sizes).tiles
    assert sum(len(spans) for _, spans in window) == 16 + 15


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in EMPTY], ids=str)
def test_tile_sizes_change_rounding_only(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    *inputs, operands = case.tensors(torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for sizes in (
        flash.Sizes(9, 512, 512, 512),
        flash.Sizes(1, 8, 8, 16),
        flash.Sizes(1, 20, 6, 6),
    ):
        monkeypatch.setattr(flash, "sizes", lambda *_, chosen=sizes: chosen)
        out, lse = flash.Flash().run(*inputs, case.spec, operands)
        total = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
        results.append([out, lse, *torch.autograd.grad(total, inputs)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_same_call_same_bits() -> None:
    q, k, v = tensors(300, grad=True)
    made = AttentionSpec.of(q, k, v, causal=True, dropout=0.2)
    runs = []
    for _ in range(2):
        out = attend(q, k, v, made, backend="flash", seed=3)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("length", [33, 300])
def test_dropout_takes_the_same_elements_as_unfused(length: int) -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(length))
    made = AttentionSpec.of(q, k, v, causal=True, dropout=0.3)
    results = []
    for backend in ("unfused", "flash"):
        out, lse = attend(q, k, v, made, backend=backend, return_lse=True, seed=2**63 + 5)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    other = attend(q, k, v, made, backend="flash", seed=6)
    assert not torch.allclose(results[1][0], other)


def test_bias_gradient_sums_to_the_bias_shape() -> None:
    q, k, v = (x.double() for x in tensors(150))
    made = AttentionSpec.of(q, k, v, causal=True, softcap=4.0)
    for shape in ((1, HEADS, 150, 150), (150, 150), (1, HEADS, 1, 150), (1, 1, 150, 1), (150,)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        grads = []
        for backend in ("unfused", "flash"):
            out = attend(q, k, v, made, backend=backend, bias=bias)
            grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_poison_behind_the_mask_takes_the_careful_form() -> None:
    """A key hidden from some queries only: they give what they give without it."""
    q, k, v = tensors(200)
    made = AttentionSpec.of(q, k, v, causal=True)
    clean = attend(q, k, v, made, backend="flash")[:, :, :150]
    k[:, :, 150:], v[:, :, 160:] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, made, backend="flash")[:, :, :150], clean)


WORKSPACES = {
    "causal": (spec(8, 8, 64, causal=True), 1, 1024, 1024, {}),
    "gqa": (spec(8, 2, 64, causal=True), 3, 700, 700, {}),
    "decode": (spec(32, 8, 128, causal=True), 2, 1, 4096, {}),
    "window": (spec(8, 8, 64, causal=True, window=(128, None)), 1, 2048, 2048, {}),
    "softcap": (spec(8, 8, 64, softcap=9.0), 1, 512, 512, {}),
    "alibi": (spec(8, 8, 64, alibi=alibi_slopes(8)), 1, 512, 512, {}),
    "mask": (spec(8, 8, 64), 1, 512, 512, {"mask": torch.ones(8, 512, 512).bool()}),
    "dropout": (spec(8, 8, 64, dropout=0.1), 1, 512, 512, {"seed": 1}),
    "small": (spec(4, 4, 32), 4, 64, 64, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WORKSPACES)
def test_workspace_is_what_a_call_takes(name: str, dtype: torch.dtype) -> None:
    """Within a factor of 1.5 of the bytes alive in tensors at the peak, results aside."""
    made, batch, q_len, kv_len, given_fields = WORKSPACES[name]
    q = torch.randn(batch, made.num_heads, q_len, made.head_dim).to(dtype)
    k, v = torch.randn(2, batch, made.num_kv_heads, kv_len, made.head_dim).to(dtype)
    operands = Operands(**given_fields)
    results = q.numel() * dtype.itemsize + q[..., 0].numel() * 4
    taken = counted_peak(lambda: flash.Flash().run(q, k, v, made, operands)) - results
    claimed = flash.Flash().workspace_bytes(made, Workload.of(q, k, v, operands))
    assert taken / 1.5 < claimed < taken * 1.5


def test_estimate_follows_what_is_visited() -> None:
    workload = Workload(batch=1, q_len=8192, kv_len=8192, dtype=torch.float32)
    seconds = {
        name: flash.Flash().estimate(made, workload, PEAKS).seconds
        for name, made in (
            ("full", spec()),
            ("causal", spec(causal=True)),
            ("window", spec(causal=True, window=(255, None))),
        )
    }
    assert 1.8 < seconds["full"] / seconds["causal"] < 2.1
    assert seconds["causal"] / seconds["window"] > 6
    longer = dataclasses.replace(workload, q_len=16384, kv_len=16384)
    window = spec(causal=True, window=(255, None))
    assert 1.9 < flash.Flash().estimate(window, longer, PEAKS).seconds / seconds["window"] < 2.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in EMPTY], ids=str)
def test_forward_in_the_dtypes_that_native_kernels_take(case: Case, dtype: torch.dtype) -> None:
    *inputs, operands = case.tensors(dtype)
    out, lse = flash.Flash().run(*inputs, case.spec, operands)
    if operands.sink_logits is not None:
        out, lse = with_sink(out, lse, operands.sink_logits)
    exact_out, exact_lse = oracle.attention(*inputs, case.spec, operands)
    oracle.assert_close(out, exact_out, oracle.plain(*inputs, case.spec, operands), "out")
    oracle.assert_close(lse, exact_lse, exact_lse.float(), "lse")


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in EMPTY], ids=str)
def test_backward_in_a_dtype_that_native_kernels_take(case: Case) -> None:
    *inputs, operands = case.tensors(torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = flash.Flash().run(*leaves, case.spec, operands)
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        (out.square().sum() + lse.sum()).backward()
        found.append([x.grad for x in leaves])
    for ours, exact in zip(*found, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_half_precision_is_as_good_as_pytorch(scale: float) -> None:
    q, k, v = (x * scale for x in tensors(400))
    made = AttentionSpec.of(q, k, v, causal=True)
    q, k, v = (x.half() for x in (q, k, v))
    exact, _ = oracle.attention(q, k, v, made, Operands())
    plain = oracle.plain(q, k, v, made, Operands())
    oracle.assert_close(attend(q, k, v, made, backend="flash"), exact, plain, "out")
