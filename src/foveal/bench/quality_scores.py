"""Scoring: every candidate and its references read the same passages side by side.

All read one step of tokens after the other in turn, so that whatever disturbs the machine meets
all alike, and only the references' distributions of one step are kept. Of each token stay three
floats: its surprise, the divergence, and whether the likeliest token is the same; means, standard
errors and quantiles are taken of these.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from foveal.bench.finding import Column
from foveal.bench.quality import Candidate, Divergence, Mean, Scores, mean_of
from foveal.bench.quality_readers import Reader

BLOCK_TOKENS = 256
"""Tokens in a row whose mean is one sample of a standard error."""
STRETCHES = 64
"""Points of the curve over positions, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What is read, and how."""

    passages: Sequence[Sequence[int]]
    """Token ids, all of the same length."""
    first: int
    """So many predictions at the beginning of each passage are not scored."""
    step_tokens: int
    """Read at once."""

    @property
    def length(self) -> int:
        """Tokens of a passage that are read."""
        return len(self.passages[0]) - 1

    @property
    def num_steps(self) -> int:
        """Of one reader."""
        return sum(1 for passage in self.passages for _ in self.steps(passage))

    def __str__(self) -> str:
        scored = f"scored from {self.first:,} on" if self.first else "all scored"
        passages = "a passage" if len(self.passages) == 1 else f"{len(self.passages)} passages"
        return f"{passages} of {self.length:,} tokens, {scored}, read {self.step_tokens} at once"

    def steps(self, passage: Sequence[int]) -> Iterator[tuple[int, Sequence[int], torch.Tensor]]:
        """Where each step begins, its tokens, and the tokens that follow each of them."""
        for start in range(0, len(passage) - 1, self.step_tokens):
            stop = min(start + self.step_tokens, len(passage) - 1)
            yield start, passage[start:stop], torch.tensor(passage[start + 1 : stop + 1])


@dataclass(slots=True)
class _Pair:
    """A candidate beside one reference, token by token."""

    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)


class Entrant:
    """A reader, whom it is held against, and what has come of it so far."""

    def __init__(self, reader: Reader, references: Sequence["Entrant"] = ()) -> None:
        self.reader = reader
        self._pairs = [(reference, _Pair()) for reference in references]
        self._is_reference = False
        self._num_unsound = 0
        for reference in references:
            reference._is_reference = True
        self._bits: list[torch.Tensor] = []
        self._seconds: list[float] = []
        self._held_bytes = 0
        self._log_p = torch.empty(0)
        """Of the step under way, [n, V], nats; kept by references only."""

    @property
    def candidate(self) -> Candidate:
        """Who reads."""
        return self.reader.candidate

    def begin(self) -> None:
        """A passage begins."""
        self.reader.reset()
        self._bits.append(torch.empty(0))

    def step(self, ids: Sequence[int], following: torch.Tensor, skipped: int) -> None:
        """Read; the first `skipped` predictions are not compared."""
        started = time.perf_counter()
        logits = self.reader.read(ids)
        self._seconds.append((time.perf_counter() - started) / len(ids))
        self._held_bytes = self.reader.held_bytes
        log_p = logits.float().log_softmax(-1).cpu()
        self._num_unsound += int((~log_p.isfinite()).any(-1).sum())
        nats = -log_p.gather(1, following.unsqueeze(1)).squeeze(1)
        self._bits[-1] = torch.cat([self._bits[-1], nats / math.log(2)])
        for reference, pair in self._pairs:
            theirs, ours = reference._log_p[skipped:], log_p[skipped:]
            kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0)  # below 0 by rounding only
            pair.kl.append(kl / math.log(2))
            pair.agrees.append(theirs.argmax(-1) == ours.argmax(-1))
        if self._is_reference:
            self._log_p = log_p

    @property
    def failure(self) -> str:
        """Why it cannot be scored; empty if it can."""
        for who in (self, *(reference for reference, _ in self._pairs)):
            if who._num_unsound:
                return f"{who.candidate} gave {who._num_unsound} predictions that are not finite"
        return ""

    def end_step(self) -> None:
        """Nobody looks at the distributions of this step any more."""
        self._log_p = torch.empty(0)

    def scores(self, reading: Reading) -> Scores:
        """What it all comes to."""
        counted = torch.cat([bits[reading.first :] for bits in self._bits])
        scored = self._seconds[-(-reading.first // reading.step_tokens) :]
        return Scores(
            num_tokens=len(counted),
            bits=_mean(counted),
            s_per_token=statistics.median(scored or self._seconds),
            held_bytes=self._held_bytes,
            divergences=tuple(
                self._divergence(reference, pair, reading) for reference, pair in self._pairs
            ),
            curve=_curve(torch.stack(self._bits)),
        )

    def _divergence(self, reference: "Entrant", pair: _Pair, reading: Reading) -> Divergence:
        kl, agrees = torch.cat(pair.kl).double(), torch.cat(pair.agrees).double()
        more = [a - b for a, b in zip(self._bits, reference._bits, strict=True)]
        return Divergence(
            reference=reference.candidate,
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            agreement=float(agrees.mean()),
            more=_mean(torch.cat([x[reading.first :] for x in more])),
        )


def read_all(
    entrants: Sequence[Entrant], reading: Reading, on_step: Callable[[], object] = lambda: None
) -> None:
    """Let all entrants, references before those they are held against, read everything."""
    for passage in reading.passages:
        for entrant in entrants:
            entrant.begin()
        for start, ids, following in reading.steps(passage):
            skipped = min(max(0, reading.first - start), len(ids))
            for entrant in entrants:
                entrant.step(ids, following, skipped)
                on_step()
            for entrant in entrants:
                entrant.end_step()


def _mean(bits: torch.Tensor) -> Mean:
    """Of all tokens, with the error of its blocks."""
    blocks = [float(block.double().mean()) for block in torch.split(bits, BLOCK_TOKENS)]
    return Mean(value=float(bits.double().mean()), error=mean_of(blocks).error)


def _curve(bits: torch.Tensor) -> dict[str, Column]:
    """Mean bits of every stretch of positions; `bits` is [passages, positions]."""
    width = -(-bits.shape[1] // STRETCHES)
    means = [float(part.double().mean()) for part in torch.split(bits, width, dim=1)]
    ends = [*range(width, bits.shape[1], width), bits.shape[1]]
    return {"position": tuple(map(float, ends)), "bits": tuple(means)}
