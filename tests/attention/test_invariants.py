"""What must hold between two calls, whoever computes them: a wrong formula breaks one of these."""

import math
from itertools import pairwise

import pytest
import torch

from cases import spec
from foveal.attention.api import attend, attend_varlen
from foveal.attention.catalogue import BY_NAME
from foveal.attention.merge import merge
from foveal.attention.spec import alibi_slopes

OWN = [name for name in ("unfused", "flash") if name in BY_NAME]

pytestmark = pytest.mark.parametrize("backend", OWN)


def tensors(
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 70,
    kv_len: int = 70,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    q, k, v = (torch.randn(2, h, length, 16, generator=rng).to(dtype) for h, length in sizes)
    return q, k, v


def same(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shift", [-1000.0, -50.0, 100.0, 1000.0])
def test_shifting_the_logits_shifts_the_lse(backend: str, shift: float) -> None:
    """A constant added to a query's scores (through one more channel) leaves `out` alone."""
    q, k, v = tensors()
    made = spec(4, 2, 17, 16, causal=True, scale=0.25)
    ones = torch.ones(2, 4, 70, 1, dtype=q.dtype)
    wide_q = torch.cat([q, ones], -1)
    results = []
    for constant in (0.0, shift):
        wide_k = torch.cat([k, ones[:, :2] * constant / 0.25], -1)
        results.append(attend(wide_q, wide_k, v, made, backend=backend, return_lse=True))
    (out, lse), (shifted_out, shifted_lse) = results
    same(shifted_out, out)
    same(shifted_lse, lse + shift)


def test_the_order_of_keys_does_not_matter(backend: str) -> None:
    q, k, v = tensors()
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    full = attend(q, k, v, spec(), backend=backend, return_lse=True)
    same(attend(q, k[:, :, order], v[:, :, order], spec(), backend=backend, return_lse=True), full)
    causal = spec(causal=True, window=(20, None), sinks=2, alibi=alibi_slopes(4))
    plain = attend(q, k, v, causal, backend=backend)
    moved = attend(q, k[:, :, order], v[:, :, order], causal, backend=backend, kv_positions=order)
    same(moved, plain)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (4, 1)])
def test_gqa_is_mha_with_repeated_heads(backend: str, heads: int, kv_heads: int) -> None:
    q, k, v = tensors(heads, kv_heads)
    repeated = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    grouped = attend(q, k, v, spec(heads, kv_heads, causal=True), backend=backend)
    same(grouped, attend(q, *repeated, spec(heads, heads, causal=True), backend=backend))


@pytest.mark.parametrize(
    "made", [spec(), spec(causal=True, window=(9, None), sinks=2, chunk=32)], ids=str
)
def test_packed_is_one_by_one(backend: str, made: object) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in tensors(q_len=60, kv_len=70))
    q_bounds, k_bounds = [0, 5, 5, 30, 31, 60], [0, 9, 12, 40, 70, 70]
    out, lse = attend_varlen(
        q,
        k,
        v,
        made,
        torch.tensor(q_bounds),
        torch.tensor(k_bounds),
        backend=backend,
        return_lse=True,
    )
    assert out.shape == (60, 4, 16)
    assert lse.shape == (60, 4)
    for i in range(5):
        rows, columns = slice(*q_bounds[i : i + 2]), slice(*k_bounds[i : i + 2])
        alone = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[columns], v[columns]))
        alone_out, alone_lse = attend(*alone, made, backend=backend, return_lse=True)
        same(out[rows], alone_out[0].transpose(0, 1))
        same(lse[rows], alone_lse[0].transpose(0, 1))


def test_packed_positions_sinks_and_seeds_belong_to_their_sequence(backend: str) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in tensors(q_len=30, kv_len=30))
    made = spec(causal=True, dropout=0.3)
    bounds, sinks = torch.tensor([0, 12, 30]), torch.randn(4, dtype=torch.float64)
    positions = torch.cat([torch.arange(12), torch.arange(18) + 100])
    given = {"sink_logits": sinks, "q_positions": positions, "kv_positions": positions}
    out = attend_varlen(q, k, v, made, bounds, bounds, backend=backend, seed=5, **given)
    for i, rows in enumerate((slice(0, 12), slice(12, 30))):
        alone = attend(
            *(x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
            made,
            backend=backend,
            seed=5 + (i << 32),
            sink_logits=sinks,
            q_positions=positions[rows],
            kv_positions=positions[rows],
        )
        same(out[rows], alone[0].transpose(0, 1))


def test_no_sequences_at_all(backend: str) -> None:
    empty, bounds = torch.zeros(0, 4, 16), torch.tensor([0])
    out, lse = attend_varlen(
        empty, empty, empty, None, bounds, bounds, backend=backend, return_lse=True
    )
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize(
    "fields", [{}, {"window": (20, None), "sinks": 3}, {"chunk": 24}, {"softcap": 2.0}], ids=str
)
def test_decode_is_the_last_row_of_prefill(backend: str, fields: dict) -> None:
    q, k, v = tensors()
    made = spec(causal=True, **fields)
    prefill = attend(q, k, v, made, backend=backend)
    same(attend(q[:, :, -1:], k, v, made, backend=backend), prefill[:, :, -1:])
    same(attend(q[:, :, -9:], k, v, made, backend=backend), prefill[:, :, -9:])


def test_the_past_does_not_depend_on_the_future(backend: str) -> None:
    q, k, v = tensors()
    whole = attend(q, k, v, spec(causal=True), backend=backend)
    part = attend(*(x[:, :, :41] for x in (q, k, v)), spec(causal=True), backend=backend)
    same(whole[:, :, :41], part)


@pytest.mark.parametrize(
    ("special", "plain"),
    [
        (spec(window=(70, 70)), spec()),
        (spec(causal=True, window=(69, None)), spec(causal=True)),
        (spec(window=(None, 0)), spec(causal=True)),
        (spec(chunk=70), spec()),
        (spec(window=(3, 3), sinks=70), spec()),
        (spec(alibi=(0.0,) * 4), spec()),
        (spec(scale=0.25), spec()),
        (spec(dropout=0.0), spec()),
    ],
    ids=str,
)
def test_limits_of_a_spec(backend: str, special: object, plain: object) -> None:
    q, k, v = tensors()
    same(attend(q, k, v, special, backend=backend), attend(q, k, v, plain, backend=backend))


def test_softcap_to_infinity_is_none(backend: str) -> None:
    q, k, v = tensors()
    capped = attend(q, k, v, spec(softcap=1e6), backend=backend)
    torch.testing.assert_close(capped, attend(q, k, v, spec(), backend=backend), rtol=0, atol=1e-9)


def test_a_sink_at_minus_infinity_is_none(backend: str) -> None:
    q, k, v = tensors(kv_len=60)
    sinks = torch.full((4,), -math.inf, dtype=torch.float64)
    plain = attend(q, k, v, spec(causal=True), backend=backend, return_lse=True)
    same(
        attend(q, k, v, spec(causal=True), backend=backend, return_lse=True, sink_logits=sinks),
        plain,
    )


def test_masks_in_other_words(backend: str) -> None:
    """A causal mask as positions, as booleans, as -inf; lengths as pads."""
    q, k, v = tensors()
    plain = attend(q, k, v, spec(causal=True), backend=backend, return_lse=True)
    lower = torch.ones(70, 70, dtype=torch.bool).tril()
    bias = torch.zeros(70, 70, dtype=torch.float64).masked_fill(~lower, -math.inf)
    same(attend(q, k, v, spec(), backend=backend, return_lse=True, mask=lower), plain)
    same(attend(q, k, v, spec(), backend=backend, return_lse=True, bias=bias), plain)
    lengths = torch.tensor([70, 33])
    slots = torch.arange(70)
    short = attend(q, k, v, spec(), backend=backend, kv_lengths=lengths)
    positions = torch.where(slots < lengths[:, None], slots, -1)
    same(attend(q, k, v, spec(), backend=backend, kv_positions=positions), short)
    same(short[1:], attend(q[1:], k[1:, :, :33], v[1:, :, :33], spec(), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_of_one_give_one(backend: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    out = attend(q, k, torch.ones_like(v), spec(causal=True), backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_linear_in_the_values(backend: str) -> None:
    q, k, v = tensors()
    other = v.flip(2)
    both = attend(q, k, 2 * v - 3 * other, spec(causal=True), backend=backend)
    one, two = (attend(q, k, x, spec(causal=True), backend=backend) for x in (v, other))
    same(both, 2 * one - 3 * two)


@pytest.mark.parametrize("cuts", [(0, 70), (0, 1, 70), (0, 23, 40, 70), (0, 69, 70)], ids=str)
def test_parts_merge_into_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    q, k, v = tensors()
    made = spec(causal=True, window=(30, None))
    outs, lses = [], []
    for start, stop in pairwise(cuts):
        part = slice(start, stop)
        out, lse = attend(
            q,
            k[:, :, part],
            v[:, :, part],
            made,
            backend=backend,
            return_lse=True,
            q_positions=torch.arange(70),
            kv_positions=torch.arange(start, stop),
        )
        outs.append(out)
        lses.append(lse)
    same(merge(outs, lses), attend(q, k, v, made, backend=backend, return_lse=True))


def test_small_integers_are_exact(backend: str) -> None:
    """Equal scores over a power of two of keys: the mean of integers, to the last bit."""
    q, k, _ = tensors(kv_len=64, dtype=torch.float32)
    v = torch.randint(-8, 9, k.shape, generator=torch.Generator().manual_seed(0)).float()
    out, lse = attend(torch.zeros_like(q), k, v, spec(), backend=backend, return_lse=True)
    mean = v.mean(2, keepdim=True).repeat_interleave(2, dim=1)
    assert torch.equal(out, mean.expand_as(out))
    assert torch.equal(lse, torch.full_like(lse, math.log(64)))


def test_constant_shift_of_keys_gets_no_gradient(backend: str) -> None:
    """softmax ignores what is the same for all keys, so the gradients of k sum to nothing."""
    q, k, v = (x.requires_grad_() for x in tensors())
    attend(q, k, v, spec(), backend=backend).square().sum().backward()
    same(k.grad.sum(2), torch.zeros(2, 2, 16, dtype=torch.float64))


def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    q, k, v = tensors(dtype=torch.float32)
    together = attend(q, k, v, spec(causal=True), backend=backend)
    alone = attend(q[1:], k[1:], v[1:], spec(causal=True), backend=backend)
    torch.testing.assert_close(together[1:], alone, rtol=1e-6, atol=1e-6)


def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    results = []
    for _ in range(3):
        leaves = [x.requires_grad_() for x in tensors(dtype=torch.float32)]
        out = attend(*leaves, spec(causal=True), backend=backend)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_strides_do_not_matter(backend: str) -> None:
    q, k, v = tensors()
    plain = attend(q, k, v, spec(causal=True), backend=backend)
    by_token = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    same(attend(*by_token, spec(causal=True), backend=backend), plain)
    by_channel = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    same(attend(*by_channel, spec(causal=True), backend=backend), plain)
    shared = attend(q, k[:, :1].expand(-1, 2, -1, -1), v, spec(causal=True), backend=backend)
    same(shared, attend(q, k[:, :1].repeat(1, 2, 1, 1), v, spec(causal=True), backend=backend))


def test_dropout_is_seeded_and_unbiased(backend: str) -> None:
    q, k, v = tensors()
    made = spec(dropout=0.5)
    call = {"backend": backend, "return_lse": True}
    out, lse = attend(q, k, v, made, seed=1, **call)
    same(attend(q, k, v, made, seed=1, **call), (out, lse))
    assert not torch.equal(attend(q, k, v, made, seed=2, **call)[0], out)
    plain_out, plain_lse = attend(q, k, v, spec(), **call)
    same(lse, plain_lse)
    mean = torch.stack([attend(q, k, v, made, seed=s, backend=backend) for s in range(40)]).mean(0)
    assert (mean - plain_out).abs().mean() < 0.25 * (out - plain_out).abs().mean()
    torch.manual_seed(3)
    drawn = attend(q, k, v, made, backend=backend)
    assert not torch.equal(attend(q, k, v, made, backend=backend), drawn)
    torch.manual_seed(3)
    same(attend(q, k, v, made, backend=backend), drawn)
