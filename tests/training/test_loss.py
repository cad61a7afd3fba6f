"""Chunked cross-entropy against PyTorch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.training.loss import IGNORE, cross_entropy_sum
from properties import examples


def problem(tokens: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(seed)
    hidden = torch.randn(1, tokens, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (1, tokens))
    targets[0, ::3] = IGNORE
    return hidden, weight, targets


@settings(max_examples=examples(25), deadline=None)
@given(tokens=st.integers(1, 40), vocab=st.integers(2, 30), chunk=st.integers(1, 400))
def test_equals_plain_cross_entropy_and_its_gradients(tokens: int, vocab: int, chunk: int) -> None:
    hidden, weight, targets = problem(tokens, vocab, seed=tokens)
    options = {"vocab_size": vocab, "chunk_logits": chunk}
    ours = cross_entropy_sum(lambda rows: rows @ weight.T, hidden, targets, **options)
    plain = F.cross_entropy(
        (hidden @ weight.T)[0], targets[0], ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(ours, plain)
    got = torch.autograd.grad(ours, (hidden, weight))
    want = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(got, want)


def test_no_more_than_a_chunk_of_logits_exists_at_once() -> None:
    hidden, weight, targets = problem(100, 10, seed=0)
    sizes: list[int] = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits = rows @ weight.T
        sizes.append(logits.numel())
        return logits

    cross_entropy_sum(logits_of, hidden, targets, vocab_size=10, chunk_logits=70).backward()
    assert max(sizes) == 70
    assert sum(sizes) == 2 * 1000, "each chunk once forward and once again in backward"


def test_nothing_is_recomputed_when_all_fits() -> None:
    hidden, weight, targets = problem(100, 10, seed=0)
    calls: list[int] = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows @ weight.T

    cross_entropy_sum(logits_of, hidden, targets, vocab_size=10).backward()
    assert calls == [100]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(64, 12, seed=1, dtype=dtype)
    ours = cross_entropy_sum(lambda rows: rows @ weight.T, hidden, targets, vocab_size=12)
    logits = (hidden @ weight.T)[0].double()
    plain = F.cross_entropy(logits, targets[0], ignore_index=IGNORE, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=0)
