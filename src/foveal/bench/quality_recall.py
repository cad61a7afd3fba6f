"""Recall: is a random string, told once, still known after a distance?

Assignments of random strings to fresh names are planted in a text, in lines of their own:

    key_xqjw = "mB4kT0pRw2ZcQ9dL"

and so many tokens later the stream is forked and asked: `key_xqjw = "`, then the string again, one
token at a time as in generation where steps matter to what is seen; the stream itself goes on
without the question. A random string can be foreseen only by copying it, so its bits per token say
what is left of it in memory: the same question with a string that was never told is the yardstick.
"""

import math
import random
import statistics
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foveal.bench.quality import Recalled, mean_of
from foveal.core.errors import ArgumentError
from foveal.engine.session import Session
from foveal.text.tokenizer import Tokenizer

ALPHABET = string.ascii_letters + string.digits
STRING_LENGTH = 16
"""Characters."""
GAP_TOKENS = (384, 640)
"""Between two facts, at least and at most: no fixed distance meets the next fact every time."""
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One assignment, as token ids. The string is encoded alone, so that it is the same tokens in
    every place."""

    asked: tuple[int, ...]
    """A line that names it, up to the string."""
    told: tuple[int, ...]
    """The string."""
    other: tuple[int, ...]
    """A string that was never told."""
    closing: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A text with facts planted in it, and where each is asked for."""

    ids: tuple[int, ...]
    questions: dict[int, tuple[tuple[int, Fact], ...]]
    """By position in the text: distance and fact, of each question asked there."""
    farthest: int
    """The largest distance."""
    chance: float
    """Bits per token of a string of which only the alphabet is known."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One string, asked for once."""

    bits: float
    """Per token."""
    hits: float
    """Share of its tokens that were likeliest."""


def plan(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    begin: Sequence[int],
    distances: Sequence[int],
    num_facts: int,
) -> Plan:
    """Plant facts in the text `ids`. Raises `ArgumentError` for a text that is too short."""
    rng = random.Random(SEED)
    facts = [_fact(tokenizer, rng) for _ in range(num_facts)]
    text, rest = list(begin), iter(ids)
    questions = defaultdict(list)
    for fact in facts:
        text += [token for _, token in zip(range(rng.randint(*GAP_TOKENS)), rest, strict=False)]
        text += [*fact.asked, *fact.told, *fact.closing]
        for distance in distances:
            questions[len(text) + distance].append((distance, fact))
    last = max(questions)
    text += [token for _, token in zip(range(last - len(text)), rest, strict=False)]
    if len(text) < last:
        accepted = f"at least {last}, for {num_facts} facts and a distance of {max(distances)}"
        raise ArgumentError("text", f"{len(ids)} tokens", accepted)
    characters = num_facts * STRING_LENGTH * math.log2(len(ALPHABET))
    return Plan(
        ids=tuple(text),
        questions={at: tuple(asked) for at, asked in sorted(questions.items())},
        farthest=max(distances),
        chance=characters / sum(len(fact.told) for fact in facts),
    )


def remember(
    session: Session, planned: Plan, on_question: Callable[[], object] = lambda: None
) -> list[Recalled]:
    """Read the text and ask every question: how well strings are known by distance, ascending,
    and last those that were never told."""
    answers: defaultdict[int | None, list[Answer]] = defaultdict(list)
    position = 0
    for at, asked in planned.questions.items():
        session.feed(planned.ids[position:at])
        position = at
        for distance, fact in asked:
            answers[distance].append(_ask(session, fact.asked, fact.told))
            if distance == planned.farthest:
                answers[None].append(_ask(session, fact.asked, fact.other))
            on_question()
    return [
        Recalled(
            distance=distance,
            num_strings=len(found),
            bits=mean_of(answer.bits for answer in found),
            hits=statistics.fmean(answer.hits for answer in found),
        )
        for distance, found in sorted(answers.items(), key=lambda item: item[0] or math.inf)
    ]


def _ask(session: Session, asked: Sequence[int], answer: Sequence[int]) -> Answer:
    """How well the answer is foreseen, on a fork of the stream."""
    fork = session.fork()
    steps = [[*asked], *([token] for token in answer[:-1])]
    if not session.config.policy.shared_steps:
        steps = [[*asked, *answer[:-1]]]
    log_p = torch.cat([fork.logits(step) for step in steps])[-len(answer) :].float().log_softmax(-1)
    fork.close()
    given = torch.tensor(answer, device=log_p.device)
    bits = -log_p.gather(1, given.unsqueeze(1)).mean() / math.log(2)
    return Answer(float(bits), float((log_p.argmax(-1) == given).float().mean()))


def _fact(tokenizer: Tokenizer, rng: random.Random) -> Fact:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, special=False))

    def draw() -> tuple[int, ...]:
        return encode("".join(rng.choices(ALPHABET, k=STRING_LENGTH)))

    name = "".join(rng.choices(string.ascii_lowercase, k=6))
    asked = encode(f'\nkey_{name} = "')
    return Fact(asked=asked, told=draw(), other=draw(), closing=encode('"\n'))
