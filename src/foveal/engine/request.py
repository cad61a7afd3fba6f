"""What a caller asks for and what it gets: `SamplingParams` in, `Completion` out."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from foveal.core.errors import ArgumentError, RequestError

FinishReason = Literal["stop", "length"]
"""stop: an end token, a stop id or a stop string came. length: no more tokens were allowed."""

GREEDY_BELOW = 1e-5
"""Temperatures below this take the likeliest token, as a draw almost surely would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one completion is drawn. Raises `ArgumentError` naming the field that is wrong.

    The order of operations is that of `sampler.py`. Defaults change nothing: the model's own
    distribution, until it ends the text or `max_tokens`.
    """

    max_tokens: int = 256
    """Tokens to make at most, at least 1; the model's context may end earlier."""
    temperature: float = 1.0
    """Divides the logits; 0 (or below 1e-5) always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens, and those that tie with the last of them; None keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this, in (0, 1]; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share of the likeliest one's probability, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or answer and multiplies negative ones; above 0,
    1 is none (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the answer so far, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time it is in the answer so far, in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; minus infinity forbids one."""
    seed: int | None = None
    """Makes the draws reproducible, whatever else is in the batch; None draws anew every time."""
    stop: Sequence[str] = ()
    """Texts that end the answer, which is cut before them. A single string may be given."""
    stop_ids: Sequence[int] = ()
    """Token ids that end the answer, beside the model's own end tokens."""
    ignore_eos: bool = False
    """Go on past the model's end tokens (`stop` and `stop_ids` still count)."""
    logprobs: int | None = None
    """Report each token's log-probability, and that of so many likeliest ones, 0 to 20."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_number("temperature", self.temperature, 0, math.inf)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias", token_id, 0)
            if not isinstance(bias, int | float) or math.isnan(bias) or bias == math.inf:
                raise ArgumentError("logit_bias", bias, "a number, or minus infinity")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ArgumentError("stop", repr(text), "strings that are not empty")
        for token_id in self.stop_ids:
            _check_integer("stop_ids", token_id, 0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, 20)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether what has been written so far changes the logits."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return neutral != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt that has passed the checks of the door (`llm.py`)."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    params: SamplingParams
    max_tokens: int
    """Tokens of the answer that the parameters and the model's context both allow."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one step, of the model's own distribution: before temperature,
    penalties and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured on the clock."""

    first_token_s: float
    """From the start of the prompt's batch to this request's first token."""
    total_s: float
    """To its last token."""
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first per second of the time after it; 0 for a single token."""
        spent = self.total_s - self.first_token_s
        return (self.num_tokens - 1) / spent if self.num_tokens > 1 and spent > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One finished answer."""

    text: str
    """Cut before a stop string; special tokens left out."""
    token_ids: tuple[int, ...]
    """Every token made, the one that ended the answer included."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    timing: Timing
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry per token, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it is made."""

    text: str
    """New text; never half a character, never part of a stop string."""
    completion: Completion | None = None
    """The whole, with the last piece."""


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises `RequestError` for a token id outside the vocabulary."""
    strange = [i for i in ids if not 0 <= i < vocab_size]
    if strange:
        raise RequestError(f"{name}: got token id {strange[0]}; accepted: 0 to {vocab_size - 1}")


def _check_integer(name: str, value: object, low: int, high: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        accepted = f"an integer of at least {low}" + (
            "" if high == math.inf else f", at most {high}"
        )
        raise ArgumentError(name, repr(value), accepted)


def _check_number(
    name: str, value: object, low: float, high: float, *, above: bool = False
) -> None:
    """`above`: the value must not equal `low`."""
    bounds = f"{'(' if above else '['}{low:g}, " + (
        "infinity)" if high == math.inf else f"{high:g}]"
    )
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = low < value if above else low <= value
        if inside and value <= high and value != math.inf:  # NaN is never inside
            return
    raise ArgumentError(name, repr(value), f"a number in {bounds}")
