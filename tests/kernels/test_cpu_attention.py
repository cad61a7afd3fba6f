"""The native forward pass of attention, in every instruction set that this processor has."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from cases import BY_NAME, CASES, Case, spec
from foveal.attention import native
from foveal.attention.explain import explain
from foveal.attention.merge import with_sink
from foveal.attention.operands import Operands
from foveal.attention.packed import Bounds
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.attention.workload import Workload
from foveal.hardware.roofline import Peaks
from foveal.kernels import available
from foveal.kernels.cpu import library
from properties import examples

pytestmark = pytest.mark.skipif(not available.native().present, reason="no native library")
ISAS = library.isas() if available.native().present else ()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY = ("no-queries", "no-keys", "no-batch")
"""Cases that the door answers."""
FILLED = [case for case in CASES if case.name not in EMPTY]

Result = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


def compute(case: Case, dtype: torch.dtype) -> Result:
    q, k, v, operands = case.tensors(dtype)
    return native.forward(q, k, v, case.spec, operands)


def tensors(
    made: AttentionSpec, batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = (
        (batch, made.num_heads, q_len, made.head_dim),
        (batch, made.num_kv_heads, kv_len, made.head_dim),
        (batch, made.num_kv_heads, kv_len, made.value_dim),
    )
    q, k, v = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    return q, k, v


def equal(one: Result, other: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FILLED, ids=str)
def test_cases(isa: str, case: Case, dtype: torch.dtype) -> None:
    q, k, v, operands = case.tensors(dtype)
    out, lse = native.forward(q, k, v, case.spec, operands)
    if operands.sink_logits is not None:
        out, lse = with_sink(out, lse, operands.sink_logits)
    exact_out, exact_lse = oracle.attention(q, k, v, case.spec, operands)
    oracle.assert_close(out, exact_out, oracle.plain(q, k, v, case.spec, operands), "out")
    oracle.assert_close(lse, exact_lse, exact_lse.float(), "lse")


SIZES = st.integers(1, 20) | st.sampled_from([24, 32, 48, 64, 65, 80, 96, 127, 128, 130, 256])
LENGTHS = st.integers(1, 30) | st.integers(1, 300)


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 1), (7, 7), (16, 2), (9, 1)]),
    sizes=st.tuples(SIZES, SIZES),
    lengths=st.tuples(LENGTHS, LENGTHS),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 90), st.none() | st.integers(0, 90)),
    sinks=st.sampled_from([0, 0, 3, 140]),
    chunk=st.none() | st.sampled_from([5, 64, 150]),
    softcap=st.none() | st.just(4.0),
    alibi=st.booleans(),
    scale=st.none() | st.sampled_from([0.0, -0.3, 1.7]),
)
def test_any_shape(
    isa, heads, sizes, lengths, dtype, causal, window, sinks, chunk, softcap, alibi, scale
) -> None:
    made = AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=sizes[0],
        value_dim=sizes[1],
        causal=causal,
        window=window,
        sinks=sinks,
        chunk=chunk,
        softcap=softcap,
        alibi=alibi_slopes(heads[0]) if alibi else None,
        scale=scale,
    )
    q, k, v = tensors(made, 2, *lengths, dtype)
    out, lse = native.forward(q, k, v, made, Operands())
    exact_out, exact_lse = oracle.attention(q, k, v, made, Operands())
    plain = oracle.plain(q, k, v, made, Operands())
    score = largest_score(q, k, made)
    oracle.assert_close(out, exact_out, plain, "out", terms=score * float(v.abs().max()))
    oracle.assert_close(lse, exact_lse, exact_lse.float(), "lse", terms=score)


def largest_score(q: torch.Tensor, k: torch.Tensor, made: AttentionSpec) -> float:
    """What rounding is relative to: half the terms of a score (the tolerance has four
    units), ALiBi's part included."""
    k = k.float().repeat_interleave(made.group_size, 1)
    terms = (q.float().abs() @ k.mT.abs()).max() * abs(made.resolved_scale)
    distance = max(map(abs, made.alibi or (0.0,))) * (q.shape[2] + k.shape[2])
    return float(terms) / 2 + distance + 1


LONG = {
    "causal": (spec(4, 2, 64, causal=True), 1, 700, 700),
    "gqa-decode": (spec(8, 2, 64, causal=True), 3, 1, 5000),
    "mha-decode": (spec(3, 3, 32, 48), 2, 1, 3000),
    "odd-decode": (spec(4, 1, 20, causal=True), 1, 3, 2500),
    "many-heads-decode": (spec(20, 1, 16, causal=True), 1, 2, 2500),
    "verify": (spec(4, 2, 64, causal=True, window=(2000, None), sinks=5), 2, 7, 4000),
    "chunk-of-prompt": (spec(4, 1, 64, causal=True), 1, 30, 3000),
    "sinks": (spec(2, 1, 64, causal=True, window=(100, None), sinks=4), 1, 600, 900),
}
"""Calls of several tiles and several parts of the keys."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long_calls(isa: str, name: str, dtype: torch.dtype) -> None:
    made, *shape = LONG[name]
    q, k, v = tensors(made, *shape, dtype)
    out, lse = native.forward(q, k, v, made, Operands())
    exact_out, exact_lse = reference(q, k, v, made)
    oracle.assert_close(out, exact_out, reference(q, k, v, made, dtype)[0].to(dtype), "out")
    oracle.assert_close(lse, exact_lse, exact_lse.float(), "lse")


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    made: AttentionSpec,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """The definition in whole tensors: the oracle, key by key, is slow where there are many."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(made.group_size, 1) for x in (k, v))
    at = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2])
    seen = keys <= at if made.causal else torch.ones_like(keys <= at)
    if made.left is not None:
        seen &= (keys >= at - made.left) | (keys < made.sinks)
    s = (q @ k.mT * made.resolved_scale).masked_fill(~seen, -math.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


@pytest.mark.parametrize("name", [*LONG, *(case.name for case in FILLED)])
def test_threads_change_no_bit(isa: str, name: str) -> None:
    if name in LONG:
        made, *shape = LONG[name]
        inputs, operands = tensors(made, *shape, torch.bfloat16), Operands()
    else:
        made = BY_NAME[name].spec
        *inputs, operands = BY_NAME[name].tensors(torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            results.append(native.forward(*inputs, made, operands))
    finally:
        torch.set_num_threads(before)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("name", LONG)
def test_a_row_alone_is_the_row_in_a_batch(isa: str, name: str) -> None:
    made, _, *lengths = LONG[name]
    q, k, v = tensors(made, 5, *lengths)
    out, lse = native.forward(q, k, v, made, Operands())
    for i in (0, 3):
        one = slice(i, i + 1)
        alone = native.forward(q[one], k[one], v[one], made, Operands())
        assert equal(alone, (out[one], lse[one]))


PACKED = [(40, 40), (0, 9), (7, 300), (1, 2100), (30, 0), (0, 0), (400, 500), (3, 2)]
"""Queries and keys of packed sequences."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_positions", [False, True])
@pytest.mark.parametrize(
    "fields", [{"causal": True}, {"window": (50, 9), "sinks": 2, "alibi": alibi_slopes(4)}], ids=str
)
def test_packed_sequences_are_each_alone(
    isa: str, dtype: torch.dtype, given_positions: bool, fields: dict
) -> None:
    made = spec(4, 2, 32, **fields)
    bounds = Bounds(*(tuple(accumulate(x, initial=0)) for x in zip(*PACKED, strict=True)))
    q, k, v = tensors(made, 1, bounds.q[-1], bounds.kv[-1], dtype)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    positions = torch.cat([torch.arange(n) + m for n, m in PACKED]) if given_positions else None
    out, lse = native.forward(q, k, v, made, Operands(q_positions=positions), bounds)
    for rows, keys in bounds:
        part = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        given = Operands(q_positions=None if positions is None else positions[rows])
        assert equal(native.forward(*part, made, given), (out[:, :, rows], lse[:, :, rows]))


@pytest.mark.parametrize("left", [None, 60])
def test_a_query_does_not_depend_on_its_neighbours(isa: str, left: int | None) -> None:
    """A query's bits come from what it sees alone, not from what else is in its tile or panel."""
    made = spec(4, 2, 64, causal=True, window=(left, None), sinks=3)
    q, k, v = tensors(made, 1, 500, 500)
    out, lse = native.forward(q, k, v, made, Operands())
    positions = torch.arange(500)
    for rows in (slice(0, 270), slice(130, 439), slice(201, 300)):
        given = Operands(q_positions=positions[rows])
        part = native.forward(q[:, :, rows], k, v, made, given)
        assert equal(part, (out[:, :, rows], lse[:, :, rows]))


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("q_len", [1, 300])
def test_what_is_hidden_may_be_anything(isa: str, poison: float, q_len: int) -> None:
    made = spec(4, 2, 32, causal=True, window=(150, None))
    q, k, v = tensors(made, 2, q_len, 400)
    lengths = torch.tensor([400, 390])
    operands = Operands(kv_lengths=lengths, q_positions=torch.arange(380 - q_len, 380))
    clean = native.forward(q, k, v, made, operands)
    for x in (k, v):
        x[:, :, 380:] = poison
        x[1, :, 390:] = poison
        x[:, :, : max(0, 380 - q_len - 150)] = poison
    assert equal(native.forward(q, k, v, made, operands), clean)


def test_masks_that_hide_whole_tiles_cost_little_and_change_nothing(isa: str) -> None:
    made = spec(2, 1, 32)
    q, k, v = tensors(made, 1, 300, 600)
    blocks = (torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    mask = blocks.repeat_interleave(100, 2).repeat_interleave(120, 3).bool()
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    by_mask = native.forward(q, k, v, made, Operands(mask=mask))
    assert equal(native.forward(q, k, v, made, Operands(mask=mask.mT.contiguous().mT)), by_mask)
    by_bias = native.forward(q, k, v, made, Operands(bias=bias))
    torch.testing.assert_close(by_bias, by_mask)


def test_result_is_laid_out_as_the_queries_are() -> None:
    made = spec(4, 2, 16, causal=True)
    q, k, v = tensors(made, 2, 9, 9)
    by_token = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = native.forward(by_token, k, v, made, Operands())
    assert out.transpose(1, 2).is_contiguous()
    plain, _ = native.forward(q, k, v, made, Operands())
    assert plain.is_contiguous()
    assert torch.equal(out, plain)


def test_flash_says_which_kernels_it_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made = spec(4, 2, 16, causal=True)
    call = (torch.float32, "cpu")
    assert native.obstacles(made, *call) == ()
    assert native.obstacles(made, torch.float64, "cpu") == ("no native kernel for float64",)
    assert native.obstacles(made.replace(dropout=0.5), *call) == ("no native kernel with dropout",)
    monkeypatch.setattr(library, "VERSION", -1)
    library.load.cache_clear()
    assert "is of version" in native.obstacles(made, *call)[0]
    monkeypatch.undo()
    library.load.cache_clear()


def test_the_choice_names_the_kernels() -> None:
    q, k, v = tensors(spec(4, 2, 16, causal=True), 1, 9, 9)
    made = spec(4, 2, 16, causal=True)
    native_choice = explain(q, k, v, made, backend="flash")
    assert native_choice.chosen.kernel == f"native {available.native_isa()}"
    assert native_choice.chosen.kernel in str(native_choice)
    portable = explain(q, k, v, made.replace(dropout=0.5), backend="flash")
    assert portable.chosen.kernel == "portable: no native kernel with dropout"
    assert portable.to_dict()["candidates"][0]["kernel"] == portable.chosen.kernel


def test_estimate_follows_what_is_visible() -> None:
    peaks = Peaks(
        device="cpu",
        matmul_flops=(("float32", 1e11),),
        bandwidth_bytes=1e10,
        overhead_s=1e-6,
        source="of a test",
    )
    workload = Workload(batch=1, q_len=8192, kv_len=8192, dtype=torch.bfloat16)
    full, causal, window = (
        native.estimate(spec(8, 8, 64, **fields), workload, peaks).seconds
        for fields in ({}, {"causal": True}, {"causal": True, "window": (255, None)})
    )
    assert 1.9 < full / causal < 2.1
    assert 12 < causal / window < 17
    decode = dataclasses.replace(workload, q_len=1)
    seconds = native.estimate(spec(32, 8, 64, causal=True), decode, peaks).seconds
    assert seconds == pytest.approx(2 * 8192 * 8 * 64 * 2 / 1e10, rel=0.05), "memory's time"


def test_workspace_is_linear_in_the_keys_and_bounded_in_the_queries() -> None:
    def workspace(q_len: int, kv_len: int) -> int:
        workload = Workload(batch=1, q_len=q_len, kv_len=kv_len, dtype=torch.float32)
        return native.workspace_bytes(spec(8, 2, 64, causal=True), workload)

    assert workspace(4096, 4096) == workspace(8192, 8192)
    scratch = workspace(1, 1024)
    assert workspace(1, 65536) - scratch == 2 * (workspace(1, 32768) - scratch)
