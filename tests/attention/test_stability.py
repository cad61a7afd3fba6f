"""Numerical stability as a promise of our own backends: what is hidden stays hidden, whatever it
holds, and no size of input makes NaN."""

import math

import pytest
import torch

import oracle
from cases import BY_NAME as CASES
from cases import Case, spec
from foveal.attention.api import attend
from foveal.attention.catalogue import BY_NAME
from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec, alibi_slopes

OWN = [name for name in ("unfused", "flash") if name in BY_NAME]
POISONS = (math.inf, -math.inf, math.nan)
LENGTH = 150
KEPT = 100
"""Keys from here on are poisoned."""

pytestmark = pytest.mark.parametrize("backend", OWN)


def tensors(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(2, h, LENGTH, 16, generator=rng) * scale for h in (4, 2, 2)]
    return tuple(x.to(dtype) for x in made)


def outcome(
    backend: str,
    inputs: tuple[torch.Tensor, ...],
    made: AttentionSpec,
    rows: slice = slice(None),
    **given: torch.Tensor,
) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v, where only `rows` of the queries count."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = attend(*leaves, made, backend=backend, return_lse=True, **given)
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
    (out[:, :, rows].square().sum() + finite_lse[:, :, rows].sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


HIDDEN: dict[str, tuple[AttentionSpec, dict[str, torch.Tensor]]] = {
    "lengths": (spec(), {"kv_lengths": torch.tensor([KEPT, KEPT])}),
    "mask": (spec(softcap=3.0), {"mask": torch.arange(LENGTH) < KEPT}),
    "bias": (spec(), {"bias": torch.where(torch.arange(LENGTH) < KEPT, 0.5, -math.inf)}),
    "pads": (
        spec(causal=True, alibi=alibi_slopes(4)),
        {"kv_positions": torch.where(torch.arange(LENGTH) < KEPT, torch.arange(LENGTH), -1)},
    ),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", HIDDEN)
def test_poison_hidden_from_all(backend: str, name: str, poison: float) -> None:
    made, given = HIDDEN[name]
    q, k, v = tensors()
    clean = outcome(backend, (q, k, v), made, **given)
    k[:, :, KEPT:], v[:, :, KEPT:] = poison, poison
    for ours, expected in zip(outcome(backend, (q, k, v), made, **given), clean, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("made", [spec(causal=True), spec(causal=True, window=(40, None))], ids=str)
def test_poison_hidden_from_some_rows(backend: str, made: AttentionSpec, poison: float) -> None:
    """Rows before a poisoned key do not notice it, forward or in the gradient of q; rows that
    see it are not finite, rather than silently wrong."""
    q, k, v = tensors()
    rows = slice(0, KEPT)
    clean_out, clean_lse, clean_dq, _, _ = outcome(backend, (q, k, v), made, rows)
    v[:, :, KEPT] = poison
    k[:, :, KEPT] = poison
    out, lse, dq, _, _ = outcome(backend, (q, k, v), made, rows)
    torch.testing.assert_close(out[:, :, rows], clean_out[:, :, rows])
    torch.testing.assert_close(lse[:, :, rows], clean_lse[:, :, rows])
    torch.testing.assert_close(dq[:, :, rows], clean_dq[:, :, rows])
    assert not out[:, :, KEPT].isfinite().any()


@pytest.mark.parametrize("poison", POISONS)
def test_poisoned_values_behind_a_window(backend: str, poison: float) -> None:
    """Rows that have left a poisoned value behind are clean again."""
    made = spec(causal=True, window=(10, None))
    q, k, v = tensors()
    clean = outcome(backend, (q, k, v), made)[0]
    v[:, :, 20] = poison
    out = outcome(backend, (q, k, v), made)[0]
    assert not out[:, :, 20:31].isfinite().any()
    torch.testing.assert_close(out[:, :, 31:], clean[:, :, 31:])


@pytest.mark.parametrize("poison", POISONS)
def test_poisoned_pad_queries(backend: str, poison: float) -> None:
    """A query that sees nothing gives zeros and reaches no gradient, whatever it holds."""
    q, k, v = tensors()
    positions = torch.where(torch.arange(LENGTH) < 30, -1, torch.arange(LENGTH))
    clean = outcome(backend, (q, k, v), spec(), q_positions=positions)
    q[:, :, :30] = poison
    for ours, expected in zip(
        outcome(backend, (q, k, v), spec(), q_positions=positions), clean, strict=True
    ):
        torch.testing.assert_close(ours, expected)
    assert not clean[0][:, :, :30].any()
    assert (clean[1][:, :, :30] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2, 1e4, 1e-40], ids=str)
@pytest.mark.parametrize("made", [spec(causal=True), spec(softcap=20.0)], ids=str)
def test_sizes_of_input(
    backend: str, made: AttentionSpec, scale: float, dtype: torch.dtype
) -> None:
    """From denormals to products beyond float16: finite, inside the values' hull, and the lse
    right to rounding of the scores."""
    q, k, v = tensors(dtype, scale)
    results = outcome(backend, (q, k, v), made)
    out, lse = results[:2]
    low, high = (
        f(v.float(), 2).repeat_interleave(2, 1).unsqueeze(2) for f in (torch.amin, torch.amax)
    )
    slack = 2 * torch.finfo(dtype).eps * v.float().abs().max()
    assert ((out.float() >= low - slack) & (out.float() <= high + slack)).all()
    assert out.isfinite().all() and lse.isfinite().all()
    if scale <= 1 or dtype != torch.float16:  # true gradients of large inputs are beyond float16
        assert all(x.isfinite().all() for x in results[2:])
    _, exact = oracle.attention(q, k, v, made, Operands())
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("made", [spec(causal=True), spec(window=(30, 5))], ids=str)
def test_mixed_sizes(backend: str, made: AttentionSpec) -> None:
    """A few channels and keys a thousand times larger than the others."""
    q, k, v = tensors()
    k[:, :, ::37] *= 1e3
    q[..., 3] *= 1e2
    v[:, :, ::11] *= 1e3
    exact_out, exact_lse = oracle.attention(q, k, v, made, Operands())
    out, lse = attend(q, k, v, made, backend=backend, return_lse=True)
    oracle.assert_close(out, exact_out, oracle.plain(q, k, v, made, Operands()), "out")
    atol = 1e-6 * float(exact_lse.abs().max())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["causal-more-queries", "lengths", "mask", "no-keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_rows(backend: str, name: str, dtype: torch.dtype) -> None:
    """Zeros and -inf, and no gradient from such a row."""
    case: Case = CASES[name]
    q, k, v, operands = case.tensors(dtype)
    given = {field: getattr(operands, field) for field in operands.present}
    out, lse, dq, dk, dv = outcome(backend, (q, k, v), case.spec, **given)
    seen = oracle.visibility(case.spec, case.batch, case.lq, case.lk, operands)
    hidden = ~seen.any(-1)
    assert hidden.any()
    assert not out[hidden].any()
    assert (lse[hidden] == -math.inf).all()
    assert not dq[hidden].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradient_of_the_lse_where_it_is_infinite(backend: str, softcap: float | None) -> None:
    """Whatever comes back through an lse of -inf stops there."""
    q, k, v = (x.requires_grad_() for x in tensors())
    made = spec(causal=True, softcap=softcap)
    positions = torch.arange(LENGTH) - 30
    _, lse = attend(q, k, v, made, backend=backend, return_lse=True, q_positions=positions)
    lse.square().sum().backward()  # 2 * -inf comes back to the first 30 rows
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k))
    assert not q.grad[:, :, :30].any()


def test_rising_maxima(backend: str) -> None:
    """Each key's score above the last one's: an online softmax rescales at every step."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.arange(300.0).view(1, 1, -1, 1)
    v = torch.randn(1, 1, 300, 8, generator=torch.Generator().manual_seed(0))
    for step in (0.1, 7.9, 8.1, 90.0):
        made = spec(1, 1, 1, 8, scale=step)
        exact_out, exact_lse = oracle.attention(q, k, v, made, Operands())
        out, lse = attend(q, k, v, made, backend=backend, return_lse=True)
        torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
