"""The sampler against transformers' processors, plain references, and its own distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from foveal.engine.request import SamplingParams
from foveal.engine.sampler import (
    Draw,
    invert,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    report,
    sample,
)
from properties import examples

VOCAB = 12
LOGITS = st.lists(
    st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB
)  # ties appear by shrinking


def draw(vocab=VOCAB, prompt=(), answer=(), **fields) -> Draw:
    made = Draw(SamplingParams(**fields), prompt, vocab)
    for token_id in answer:
        made.record(token_id)
    return made


def kept(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@settings(max_examples=examples(60), deadline=None)
@given(values=LOGITS, k=st.integers(1, VOCAB))
def test_top_k(values, k):
    threshold = sorted(values, reverse=True)[k - 1]
    expected = [i for i, value in enumerate(values) if value >= threshold]
    assert kept(keep_top_k(torch.tensor([values]), [k])[0]) == expected
    theirs = hf.TopKLogitsWarper(k)(None, torch.tensor([values]))
    assert kept(theirs[0]) == expected


@settings(max_examples=examples(60), deadline=None)
@given(values=LOGITS, p=st.floats(0.01, 1))
def test_top_p(values, p):
    logits = torch.tensor([values])
    probabilities = logits.double().softmax(-1)[0].tolist()
    expected, reached = [], 0.0
    for i in sorted(range(VOCAB), key=lambda i: (-values[i], i)):
        if abs(reached - p) < 1e-5:
            return  # on the edge, rounding decides
        if reached < p:
            expected.append(i)
        reached += probabilities[i]
    assert kept(keep_top_p(logits, torch.tensor([[p]]))[0]) == sorted(expected)


@settings(max_examples=examples(60), deadline=None)
@given(values=LOGITS, share=st.floats(0, 1))
def test_min_p(values, share):
    logits = torch.tensor([values])
    probabilities = logits.double().softmax(-1)[0]
    ratio = probabilities / probabilities.max()
    if ((ratio - share).abs() < 1e-5).any() and share < 1:
        return
    expected = (ratio >= share).nonzero().flatten().tolist()
    assert kept(keep_min_p(logits, torch.tensor([[share]]))[0]) == expected


def test_top_p_of_equals_keeps_the_lowest_ids():
    made = keep_top_p(torch.zeros(2, 4096), torch.tensor([[0.125], [1.0]]))
    assert kept(made[0]) == list(range(512))
    assert kept(made[1]) == list(range(4096))


def test_filters_in_order_agree_with_transformers():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)) * 3
    theirs = logits / 0.7
    for warper in (hf.TopKLogitsWarper(40), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.05)):
        theirs = warper(None, theirs)
    ours = keep_top_k(logits / 0.7, [40] * 64)
    ours = keep_top_p(ours, torch.full((64, 1), 0.9))
    ours = keep_min_p(ours, torch.full((64, 1), 0.05))
    assert torch.equal(ours, theirs)


@settings(max_examples=examples(40), deadline=None)
@given(
    values=LOGITS,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1),
    answer=st.lists(st.integers(0, VOCAB - 1)),
    repetition=st.floats(0.5, 0.99) | st.floats(1.01, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties(values, prompt, answer, repetition, presence, frequency):
    made = draw(
        prompt=prompt,
        answer=answer,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    expected = []
    for i, value in enumerate(values):
        if i in prompt + answer:
            value = value / repetition if value > 0 else value * repetition
        count = answer.count(i)
        expected.append(value - frequency * count - presence * (count > 0))
    ours = penalise(torch.tensor([values]), [made])
    torch.testing.assert_close(ours, torch.tensor([expected]), atol=1e-5, rtol=1e-5)
    only = draw(prompt=prompt, answer=answer, repetition_penalty=repetition)
    theirs = hf.RepetitionPenaltyLogitsProcessor(repetition)
    torch.testing.assert_close(
        penalise(torch.tensor([values]), [only]),
        theirs(torch.tensor([prompt + answer]), torch.tensor([values])),
    )


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "logit_bias": {3: 2.0}},
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    """Chi-square of 4000 draws; the bound is beyond the 99.9th percentile for up to 11 degrees of
    freedom (31.3), and the seed is fixed."""
    fields = CASES[name]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
    expected = logits.clone()
    for token_id, bias in fields.get("logit_bias", {}).items():
        expected[token_id] += bias
    expected = expected[None] / fields.get("temperature", 1.0)
    for warper, key in (
        (hf.TopKLogitsWarper, "top_k"),
        (hf.TopPLogitsWarper, "top_p"),
        (hf.MinPLogitsWarper, "min_p"),
    ):
        expected = warper(fields[key])(None, expected) if key in fields else expected
    probabilities = expected[0].softmax(-1)
    made = draw(seed=11, **fields)
    rows = [
        token_id for _ in range(40) for token_id in sample(logits.expand(100, -1), [made] * 100)
    ]
    counts = torch.bincount(torch.tensor(rows), minlength=VOCAB).float()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert chi_square(counts[possible], 4000 * probabilities[possible]) < 31.3


def test_rows_are_independent_of_their_neighbours():
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(20, 6, 50, generator=rng)
    fields = [
        {"seed": 1},
        {"seed": 2, "top_p": 0.7},
        {"seed": 3, "top_k": 5, "temperature": 2.0},
        {"temperature": 0},
        {"seed": 5, "repetition_penalty": 1.4, "presence_penalty": 1.0},
        {"seed": 6, "min_p": 0.1, "logit_bias": {4: 9.0}, "logprobs": 2},
    ]

    def run(rows: list[int]) -> list[list[int]]:
        made = [draw(vocab=50, prompt=[7], **fields[row]) for row in rows]
        out = []
        for step in logits:
            ids = sample(step[rows], made)
            for one, token_id in zip(made, ids, strict=True):
                one.record(token_id)
            out.append(ids)
        return [list(column) for column in zip(*out, strict=True)]

    together = run(list(range(6)))
    assert len({tuple(column) for column in together}) == 6
    for row in range(6):
        assert run([row]) == [together[row]]
    assert run([4, 2]) == [together[4], together[2]]


def test_unseeded_draws_differ():
    logits = torch.zeros(1, 10_000)
    assert sample(logits, [draw(vocab=10_000)]) != sample(logits, [draw(vocab=10_000)])


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, [draw(4, temperature=0), draw(4, temperature=1e-7)]) == [1, 0]


def test_bias_can_forbid_and_force():
    logits = torch.tensor([[1.0, 5.0, 4.0]])
    assert sample(logits, [draw(3, temperature=0, logit_bias={1: -math.inf})]) == [2]
    assert sample(logits, [draw(3, seed=0, logit_bias={0: 100.0})]) == [0]


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temperature):
    logits = torch.tensor([[3e4, -3e4, 2.9e4]])
    assert sample(logits, [draw(3, temperature=temperature, seed=0)])[0] in (0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype):
    logits = torch.tensor([[1.0, 5.0, 4.0]], dtype=dtype)
    given = logits.clone()
    assert sample(logits, [draw(3, top_p=0.01, logit_bias={1: -9.0})]) == [2]
    assert torch.equal(logits, given), "the model's logits are left as they are"


def test_the_ends_of_the_uniform_distribution():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert invert(logits, uniform).tolist() == [1, 2, 2]
    many = torch.randn(500, 37, generator=torch.Generator().manual_seed(0))
    last = invert(many, uniform[2:].expand(500))
    assert last.max() < 37, "no rounding of the total lets a draw fall behind the last token"


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    exact = logits.log_softmax(-1)
    draws = [draw(logprobs=2, temperature=0.1), draw(), draw(logprobs=0, repetition_penalty=2.0)]
    first, none, last = report(logits, [4, 5, 6], draws)
    assert none is None
    assert first.token_id == 4 and first.logprob == pytest.approx(exact[0, 4].item())
    best = exact[0].topk(2)
    assert [i for i, _ in first.top] == best.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(best.values.tolist())
    assert last.top == () and last.logprob == pytest.approx(exact[2, 6].item())
