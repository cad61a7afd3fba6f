"""The native backward pass of attention, in every instruction set that this processor has."""

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
from foveal.attention.api import attend
from foveal.attention.explain import explain
from foveal.attention.operands import Operands
from foveal.attention.packed import Bounds
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.kernels import available
from foveal.kernels.cpu import library
from properties import examples

pytestmark = pytest.mark.skipif(not available.native().present, reason="no native library")
ISAS = library.isas() if available.native().present else ()
FILLED = [case for case in CASES if case.name not in ("no-queries", "no-keys", "no-batch")]

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


def tensors(
    made: AttentionSpec, batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    rng = torch.Generator().manual_seed(0)
    shapes = (
        (batch, made.num_heads, q_len, made.head_dim),
        (batch, made.num_kv_heads, kv_len, made.head_dim),
        (batch, made.num_kv_heads, kv_len, made.value_dim),
    )
    q, k, v = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    return q, k, v


def upstream(out: torch.Tensor) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=rng).bfloat16().to(out.dtype)


def through_both(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient reaches `out` and the log-sum-exp."""
    return (out * upstream(out)).sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()


def gradients(
    inputs: Tensors, made: AttentionSpec, operands: Operands, bounds: Bounds | None = None
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    through_both(*native.forward(*leaves, made, operands, bounds)).backward()
    return [x.grad for x in leaves]


def reference(
    inputs: Tensors, made: AttentionSpec, operands: Operands, dtype: torch.dtype
) -> list[torch.Tensor]:
    """By the textbook's steps."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    present = {name: getattr(operands, name) for name in operands.present - {"sink_logits"}}
    through_both(*attend(*leaves, made, backend="unfused", return_lse=True, **present)).backward()
    return [x.grad for x in leaves]


def compare(inputs: Tensors, made: AttentionSpec, operands: Operands, score: float = 1.0) -> None:
    exact = reference(inputs, made, operands, torch.float64)
    plain = reference(inputs, made, operands, inputs[0].dtype)
    ours = gradients(inputs, made, operands)
    terms = score * max(float(x.abs().max()) for x in exact)
    for name, one, right, baseline in zip("qkv", ours, exact, plain, strict=True):
        oracle.assert_close(one, right, baseline, f"gradient of {name}", factor=3.0, terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FILLED, ids=str)
def test_cases(isa: str, case: Case, dtype: torch.dtype) -> None:
    *inputs, operands = case.tensors(dtype)
    compare(tuple(inputs), case.spec, operands)


SIZES = st.integers(1, 20) | st.sampled_from([24, 48, 64, 65, 80, 127, 128, 130, 256])
LENGTHS = st.integers(1, 30) | st.integers(1, 300)


@settings(
    max_examples=examples(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (7, 7), (9, 1), (130, 1)]),
    sizes=st.tuples(SIZES, SIZES),
    lengths=st.tuples(LENGTHS, LENGTHS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 90), st.none() | st.integers(0, 90)),
    sinks=st.sampled_from([0, 0, 3, 140]),
    chunk=st.none() | st.sampled_from([5, 64, 150]),
    softcap=st.none() | st.just(4.0),
    alibi=st.booleans(),
    scale=st.none() | st.sampled_from([0.0, -0.3, 1.1]),
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
    lengths = (min(lengths[0], 40), lengths[1]) if heads[0] > 9 else lengths
    inputs = tensors(made, 2, *lengths, dtype)
    compare(inputs, made, Operands(), largest_score(*inputs[:2], made))


def largest_score(q: torch.Tensor, k: torch.Tensor, made: AttentionSpec) -> float:
    """What the rounding of a weight is relative to."""
    k = k.float().repeat_interleave(made.group_size, 1)
    terms = (q.float().abs() @ k.mT.abs()).max() * abs(made.resolved_scale)
    distance = max(map(abs, made.alibi or (0.0,))) * (q.shape[2] + k.shape[2])
    return float(terms) / 2 + distance + 1


LONG = {
    "causal": (spec(4, 2, 64, causal=True), 1, 700, 700),
    "parts": (spec(2, 1, 16, causal=True), 2, 40, 2500),
    "many-parts": (spec(3, 3, 24), 1, 100, 4700),
    "few-rows": (spec(4, 2, 32, causal=True), 2, 3, 3000),
    "sinks": (spec(2, 1, 64, 32, causal=True, window=(100, None), sinks=4), 1, 600, 900),
}
"""Calls of several tiles, chunks and parts."""


@pytest.mark.parametrize("name", LONG)
def test_long_calls(isa: str, name: str) -> None:
    made, *shape = LONG[name]
    compare(tensors(made, *shape), made, Operands())


@pytest.mark.parametrize("name", [*LONG, "causal-gqa-strided", "mask-heads", "left-padding"])
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
            results.append(gradients(tuple(inputs), made, operands))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


PACKED = [(40, 40), (0, 9), (7, 300), (1, 2100), (30, 0), (0, 0), (200, 250), (3, 2)]
"""Queries and keys of packed sequences."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields", [{"causal": True}, {"window": (50, 9), "sinks": 2, "alibi": alibi_slopes(4)}], ids=str
)
def test_packed_sequences_are_each_alone(isa: str, dtype: torch.dtype, fields: dict) -> None:
    made = spec(4, 2, 32, **fields)
    bounds = Bounds(*(tuple(accumulate(x, initial=0)) for x in zip(*PACKED, strict=True)))
    q, k, v = tensors(made, 1, bounds.q[-1], bounds.kv[-1], dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = native.forward(q, k, v, made, Operands(), bounds)
    d_out = upstream(out)
    out.backward(d_out)
    d_q, d_k, d_v = (x.grad for x in leaves)
    for rows, keys in bounds:
        part = [
            x.detach()[:, :, at].requires_grad_() for x, at in ((q, rows), (k, keys), (v, keys))
        ]
        native.forward(*part, made, Operands())[0].backward(d_out[:, :, rows])
        whole = (d_q[:, :, rows], d_k[:, :, keys], d_v[:, :, keys])
        assert all(torch.equal(a.grad, b) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("q_len", [3, 120])
def test_weights_are_those_of_the_forward_pass(isa: str, q_len: int) -> None:
    """Where scores are so large that their rounding alone is worth several units."""
    made = spec(4, 2, 64, causal=True, scale=1.0)
    q, k, v = tensors(made, 1, q_len, 130)
    leaves = [x.requires_grad_() for x in (q * 1e3, k * 1e3, v)]
    native.forward(*leaves, made, Operands())[0].sum().backward()
    given_out = leaves[2].grad[..., 0].sum(-1)  # each of two query heads gives weights of 1 in all
    torch.testing.assert_close(given_out, torch.full_like(given_out, 2.0 * q_len))


def test_gradients_of_any_layout() -> None:
    made = spec(4, 2, 16, causal=True)
    inputs = tensors(made, 2, 50, 60)
    expected = gradients(inputs, made, Operands())
    by_token = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    by_channel = tuple(x.mT.contiguous().mT for x in inputs)
    for other in (by_token, by_channel):
        found = gradients(other, made, Operands())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    leaves = [x.detach().requires_grad_() for x in inputs]
    native.forward(*leaves, made, Operands())[0].sum().backward()  # one number, expanded
    one = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    out, _ = native.forward(*leaves, made, Operands())
    out.backward(torch.ones_like(out))
    assert all(torch.equal(a, x.grad) for a, x in zip(one, leaves, strict=True))


def test_flash_computes_gradients_natively_but_that_of_a_bias() -> None:
    made = spec(4, 2, 16, causal=True)
    q, k, v = (x.requires_grad_() for x in tensors(made, 1, 9, 9))
    bias = torch.zeros(9, 9)
    for given_bias in (None, bias):
        choice = explain(q, k, v, made, backend="flash", bias=given_bias)
        assert choice.chosen.kernel == f"native {available.native_isa()}"
    choice = explain(q, k, v, made, backend="flash", bias=bias.requires_grad_())
    assert choice.chosen.kernel == "portable: no native gradient of a bias"
    attend(q, k, v, made, backend="flash", bias=bias).sum().backward()
    assert bias.grad is not None
