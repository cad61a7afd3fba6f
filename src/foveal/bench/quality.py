"""What `foveal bench quality` measures, as data: one `QualityRecord` a candidate and part.

A *candidate* is a way to read a text: with all of it in view (`FULL`), with the last tokens
computed afresh for each prediction (`RECOMPUTE`, "sliding window with re-computation" of Xiao et
al. 2024), or as a stream that remembers by a policy. It is scored on the same tokens as a
*reference*, token by token: how likely the text is (bits per token) and how far its distribution
of the next token is from the reference's (Kullback-Leibler divergence, in bits).

Full attention is the right reference as far as the model was trained to look; beyond that it is
itself at a loss, and recomputing the window is what a stream is to be held against.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.bench import lines
from foveal.bench.record import Run

FULL = "full"
RECOMPUTE = "recompute"

Part = Literal["context", "policies", "sinks", "precision", "recall", "mass"]
PARTS: tuple[Part, ...] = ("context", "policies", "sinks", "precision", "recall", "mass")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to read a text."""

    policy: str
    """Name of a window policy, or `FULL`, or `RECOMPUTE`."""
    span: int
    """Tokens that a query sees at most, sinks included."""
    sinks: int = 0
    kv: str
    """Storage format of keys and values."""
    settings: str = "{}"
    """Of the policy, as JSON."""

    def __str__(self) -> str:
        kept = f"{self.sinks}+{self.span - self.sinks}" if self.sinks else f"{self.span}"
        words = self.policy if self.policy == FULL else f"{self.policy} {kept}"
        return f"{words}, {self.kv}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What was read."""

    name: str
    num_tokens: int
    """Of the whole text, of which passages are read."""
    sha256: str
    """Of its token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean with its standard error, which is taken over blocks of tokens in a row: neighbours
    are not independent."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A candidate against a reference on the same tokens."""

    reference: Candidate
    kl_mean: float
    """Bits, of the reference's distribution relative to the candidate's; so are the next two."""
    kl_p99: float
    kl_max: float
    agreement: float
    """Share of tokens at which both hold the same token for the likeliest."""
    more: Mean
    """Bits per token that the candidate needs beyond the reference, token by token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Some positions in a row."""

    end: int
    """One after the last."""
    bits: float
    """Mean bits per token there, over all passages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How a candidate did."""

    num_tokens: int
    """That were scored."""
    first: int
    """So many predictions at the beginning of each passage are not scored."""
    length: int
    """Of each passage, in tokens; each is read from an empty memory."""
    bits: Mean
    """Per token."""
    s_per_token: float
    """Median over steps of `step_tokens`, of all candidates in turn."""
    step_tokens: int
    held_bytes: int
    """Keys and values held at the end of a passage, with all that the policy keeps beside them;
    0 for what is computed afresh."""
    divergences: tuple[Divergence, ...]
    curve: tuple[Stretch, ...]

    def against(self, reference: str) -> Divergence | None:
        """The divergence from the reference of this policy's name."""
        found = [d for d in self.divergences if d.reference.policy == reference]
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalled:
    """Random strings that were told once and come again after a distance."""

    distance: int
    """Tokens between what tells the string and what asks for it."""
    num_facts: int
    bits: Mean
    """Per token of the string when it comes again; errors over facts."""
    hits: float
    """Share of the string's tokens that were held for the likeliest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How well random strings are copied."""

    recalled: tuple[Recalled, ...]
    fresh: Mean
    """Bits per token of a string that was never told, in the same place."""
    chance: float
    """Bits per token if only the alphabet were known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mass:
    """Where one head looks."""

    layer: int
    head: int
    shares: tuple[float, ...]
    """Of its attention that goes to each of the first tokens, mean over queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Masses:
    """How much attention goes to the first tokens."""

    heads: tuple[Mass, ...]
    even: float
    """The share of one token if all that a query sees were given the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRecord:
    """One candidate in one part; of what was measured, the one that the part is about."""

    benchmark: Literal["quality"] = "quality"
    part: Part
    text: Text
    model: str
    """Fingerprint of the weights."""
    candidate: Candidate
    reason: str = ""
    """Why it was not measured; empty if it was."""
    scores: Scores | None = None
    memory: Memory | None = None
    masses: Masses | None = None
    run: Run


def read_quality(path: Path) -> list[QualityRecord]:
    """Every record of a file. Raises `LoadError` with the line and the field that are wrong."""
    return lines.read(path, QualityRecord)


def newest(records: Iterable[QualityRecord]) -> list[QualityRecord]:
    """Of several records of one candidate in one part, of one text, model and machine, the last."""
    last = {(r.part, r.text.sha256, r.model, r.run.fingerprint, r.candidate): r for r in records}
    return list(last.values())


def mean_of(blocks: Iterable[float]) -> Mean:
    """The mean of blocks of the same size, with its standard error; 0 of a single one."""
    values = list(blocks)
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Mean(value=statistics.fmean(values), error=spread)
