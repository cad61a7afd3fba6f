"""The judge agrees with the oracle, finds errors wherever they are, and does not invent any."""

import pytest
import torch

import oracle
from cases import spec
from foveal.attention.operands import Operands
from foveal.bench import accuracy
from foveal.bench.accuracy import Judge, compare, plain


def tensors(
    length: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 16, generator=rng).to(dtype) for h in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("fields", [{"causal": True}, {"window": (3, 2)}, {"scale": 2.0}])
def test_plain_in_float64_is_the_oracle(fields: dict) -> None:
    made, (q, k, v) = spec(**fields), tensors(20, torch.float64)
    seen = oracle.visibility(made, 1, 20, 20, Operands())
    exact, _ = oracle.attention(q, k, v, made, Operands())
    torch.testing.assert_close(plain(q, k, v, made, seen), exact, rtol=1e-12, atol=1e-12)


def test_rows_that_see_nothing_are_zero_with_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(6))
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[2] = False
    out = plain(q, k, v, spec(), seen)
    out.sum().backward()
    assert not out[:, :, 2].any() and not q.grad[:, :, 2].any()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("largest", [2**24, 2**12])
def test_one_wrong_row_or_key_is_found(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only some rows can be held against float64: a tile of wrong rows is met."""
    monkeypatch.setattr(accuracy, "LARGEST_REFERENCE", largest)
    made, (q, k, v) = spec(causal=True), tensors(256)
    exact, _ = oracle.attention(q, k, v, made, Operands())
    judge = Judge(q, k, v, made)
    assert judge.accuracy(exact.float()).holds
    wrong = exact.clone()
    wrong[:, 2, 64:128] *= 1.001
    assert not judge.accuracy(wrong.float()).holds
    without_last, _ = oracle.attention(q, k[:, :, :-1], v[:, :, :-1], spec(), Operands())
    assert not judge.accuracy(without_last.float()).holds


def test_nan_never_holds() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    bad = torch.tensor([1.0, float("nan"), 1.0])
    found = compare(bad, exact.float(), exact, bad.dtype)
    assert found.error is None and not found.holds
    assert compare(exact.float(), bad, exact, bad.dtype).plain_error is None


def test_the_rule_is_twice_plain_with_a_floor() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    plainly = torch.tensor([1.0, 1.01])
    assert compare(torch.tensor([1.0, 1.019]), plainly, exact, torch.float32).holds
    assert not compare(torch.tensor([1.0, 1.021]), plainly, exact, torch.float32).holds
    eps = torch.finfo(torch.float32).eps
    assert compare(torch.tensor([1.0, 1 + 4 * eps]), exact.float(), exact, torch.float32).holds
    assert not compare(torch.tensor([1.0, 1 + 5 * eps]), exact.float(), exact, torch.float32).holds


def test_rounding_of_scores_grows_with_the_scores() -> None:
    made, (q, k, v) = spec(), tensors(30)
    seen = torch.ones(30, 30, dtype=torch.bool)
    small = accuracy.score_rounding(q, k, v, made, seen)
    shifted = q.clone(), k.clone()
    shifted[0][..., 0] = shifted[1][..., 0] = 200.0
    assert 0 < 100 * small < accuracy.score_rounding(*shifted, v, made, seen)
