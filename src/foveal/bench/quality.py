"""What `foveal bench quality` measures, as data.

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

from foveal.bench.finding import Column

FULL = "full"
RECOMPUTE = "recompute"
AGAINST = {FULL: "against full attention", RECOMPUTE: "against the window computed afresh"}
"""References, and how the titles of findings end that compare with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to read a text."""

    policy: str
    """Name of a window policy, or `FULL`, or `RECOMPUTE`."""
    span: int
    """Tokens kept, sinks included."""
    sinks: int = 0
    kv: str
    """Storage format of keys and values."""
    kept: str = ""
    """Sinks and window, as a policy makes them of this."""

    @property
    def subject(self) -> dict[str, str]:
        """For a finding."""
        found = {"policy": self.policy, "tokens": str(self.span), "stored as": self.kv}
        return found | ({"sinks + window": self.kept} if self.kept else {})

    def __str__(self) -> str:
        return f"{self.policy} {self.span}, {self.sinks} sinks, {self.kv}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean with its standard error, which is taken over blocks of tokens in a row: neighbours
    are not independent."""

    value: float
    error: float

    def named(self, name: str) -> dict[str, float | None]:
        """For a finding."""
        return {name: self.value, f"± {name}": self.error}


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

    @property
    def values(self) -> dict[str, float | None]:
        """For a finding."""
        return {
            **self.more.named("more"),
            "KL": self.kl_mean,
            "KL p99": self.kl_p99,
            "KL max": self.kl_max,
            "top-1_share": self.agreement,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How a candidate did."""

    num_tokens: int
    """That were scored."""
    bits: Mean
    """Per token."""
    s_per_token: float
    """Median over steps, of all candidates in turn."""
    held_bytes: int
    """Keys and values held at the end of a passage, with all that the policy keeps beside them;
    0 for what is computed afresh."""
    divergences: tuple[Divergence, ...]
    curve: dict[str, Column]
    """`position`, one after the last of a stretch, and its mean `bits` over all passages."""

    def values(self, against: str) -> dict[str, float | None]:
        """For a finding that compares with the reference of this policy's name, if there is one."""
        found = self.bits.named("text_bits")
        found |= {"held_bytes": self.held_bytes, "per token_s": self.s_per_token}
        for divergence in self.divergences:
            found |= divergence.values if divergence.reference.policy == against else {}
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalled:
    """Random strings that were told once and asked for after a distance."""

    distance: int | None
    """Tokens between what tells the string and what asks for it; None if it was never told."""
    num_strings: int
    bits: Mean
    """Per token of the string."""
    hits: float
    """Share of the string's tokens that were held for the likeliest."""

    @property
    def values(self) -> dict[str, float | None]:
        """For a finding."""
        return {**self.bits.named("text_bits"), "right_share": self.hits}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mass:
    """Where one head looks."""

    layer: int
    head: int
    shares: tuple[float, ...]
    """Of its attention that goes to each of the first tokens, mean over queries."""
    even: float
    """The share of one token if all that a query sees were given the same."""

    @property
    def values(self) -> dict[str, float | None]:
        """For a finding."""
        return {
            "first_share": self.shares[0],
            f"first {len(self.shares)}_share": sum(self.shares),
            "one of all, evenly_share": self.even,
        }


def mean_of(blocks: Iterable[float]) -> Mean:
    """The mean of blocks of the same size, with its standard error; 0 of a single one."""
    values = list(blocks)
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Mean(value=statistics.fmean(values), error=spread)
