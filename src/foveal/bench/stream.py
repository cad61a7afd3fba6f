"""`foveal bench stream`: whether a stream without end keeps its memory and its pace.

A text is fed to a session step by step; beside each step's time stands the share of the machine
that other processes took meanwhile (`hardware.timer`), and the resident memory of the process after
it. What is promised of a stream is checked over full steps:

    memory    the most resident in each tenth from the second on: the largest over the smallest
    pace      the median time of a step in the last tenth over that in the second tenth
    evenness  p99 over p50 of undisturbed steps, once the window is full

Samples lie in arrays made ahead, so that what is measured does not grow with the measuring.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import psutil

from foveal.bench.finding import Check, Column, Finding
from foveal.bench.memory import trim
from foveal.bench.record import Run
from foveal.core.errors import ArgumentError
from foveal.core.units import format_bytes
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import find_policy, policy_facts
from foveal.engine.policy import Policy
from foveal.engine.session import Session
from foveal.hardware.timer import DISTURBED_SHARE, STRETCH_S, Neighbours
from foveal.text.blocks import read_blocks
from foveal.training.corpus import standard_library

LIBRARY = "the standard library's source"
POINTS = 400
"""Of a curve."""
MOST_SAMPLES = 1000
"""Times of steps that are kept, evenly spaced; quantiles are taken of all."""
MEMORY_GROWTH, SLOWDOWN, UNEVENNESS = 0.01, 0.05, 1.5
FEWEST_STEPS = 20
"""Undisturbed steps that a median of a tenth needs."""
FEWEST_FOR_P99 = 200


@dataclass(frozen=True, slots=True)
class Text:
    """What is read."""

    file: Path | None = None
    """None for the standard library's source, its files in the fixed order of `corpus.py`."""

    @property
    def name(self) -> str:
        """In words."""
        return LIBRARY if self.file is None else self.file.name

    def chunks(self, llm: LLM, num_tokens: int, size: int) -> Iterator[list[int]]:
        """Token ids, `num_tokens` in all or as many as there are, `size` at a time."""
        ids, left = self._ids(llm), num_tokens
        while chunk := list(islice(ids, min(size, left))):
            left -= len(chunk)
            yield chunk

    def _ids(self, llm: LLM) -> Iterator[int]:
        for text in self._texts():
            yield from llm.tokenizer.encode(text, special=False)

    def _texts(self) -> Iterator[str]:
        """Block by block, because a whole file and its ids would show in the resident memory."""
        if self.file is not None:
            yield from _blocks(self.file)
            return
        for document in standard_library():
            with suppress(ArgumentError):  # not UTF-8 from here on: the rest is left out
                yield from _blocks(document.path)


def _blocks(path: Path) -> Iterator[str]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise ArgumentError("file", path, f"a file that can be read ({error.strerror})") from error
    with file:
        for block in read_blocks(file, lambda: False):
            yield block.text


class Samples:
    """What was measured of each step, in arrays of a fixed size."""

    def __init__(self, num_steps: int) -> None:
        columns = np.full((6, num_steps), np.nan)  # written to: its pages are there from now on
        self.tokens, self.seconds, self.others = columns[:3]
        self.bits, self.predicted, self.resident = columns[3:]
        self.count = 0
        self._judged = 0
        self._watch = Neighbours()
        self._process = psutil.Process()

    def add(self, seconds: float, num_tokens: int, bits: float, num_predicted: int) -> None:
        """Take in a step that has just ended."""
        at = self.count
        self.tokens[at], self.seconds[at] = num_tokens, seconds
        self.bits[at], self.predicted[at] = bits, num_predicted
        self.resident[at] = self._process.memory_info().rss
        self.count += 1
        if self._watch.elapsed_s >= STRETCH_S:
            self.judge()

    def judge(self) -> None:
        """Note what others did since the last time."""
        self._watch.wait_for(STRETCH_S)
        self.others[self._judged : self.count] = self._watch.share()
        self._judged = self.count

    @property
    def position(self) -> np.ndarray:
        """Of each step's last token."""
        return np.cumsum(self.tokens[: self.count])

    def part(self, start: float, end: float) -> slice:
        """The steps whose last token lies in this part of the stream."""
        total = float(self.tokens[: self.count].sum())
        low, high = np.searchsorted(self.position, (start * total, end * total), side="right")
        return slice(int(low), int(high))

    def quiet(self, part: slice) -> np.ndarray:
        """Seconds of the full steps of a part that nobody disturbed."""
        columns = (self.seconds, self.tokens, self.others)
        seconds, tokens, others = (column[: self.count][part] for column in columns)
        found: np.ndarray = seconds[(tokens == self.tokens[0]) & (others <= DISTURBED_SHARE)]
        return found


def measure(
    llm: LLM,
    text: Text,
    num_tokens: int,
    settings: Mapping[str, object],
    run: Run,
    on_step: Callable[[int], object] = lambda tokens: None,
) -> Finding:
    """Stream so many tokens through a session of these settings. `on_step` is told the tokens so
    far. Raises `ArgumentError`, and what `Session` raises."""
    if num_tokens < 1:
        raise ArgumentError("tokens", num_tokens, "an integer of at least 1")
    gc.collect()
    trim()
    session = Session(llm, **settings)  # type: ignore[arg-type]
    size = session.config.chunk
    samples, done = Samples(-(-num_tokens // size)), 0
    try:
        for ids in text.chunks(llm, num_tokens, size):
            started = time.perf_counter()
            bits = session.feed(ids)
            seconds = time.perf_counter() - started
            known = bits[~bits.isnan()]
            samples.add(seconds, len(ids), float(known.double().sum()), known.numel())
            done += len(ids)
            on_step(done)
        if not done:
            raise ArgumentError("file", text.name, "a text of at least one token")
        samples.judge()
        return _finding(samples, session, text, run)
    finally:
        session.close()


def _finding(samples: Samples, session: Session, text: Text, run: Run) -> Finding:
    config, stats = session.config, session.stats
    position = samples.position
    return Finding(
        benchmark="stream",
        part="stream",
        title=f"{position[-1]:,.0f} tokens of {text.name}",
        subject={
            "policy": policy_words(config.policy),
            "kept": f"{config.sinks}+{config.window}",
            "kv": config.kv,
        },
        values={
            "step_tokens": float(config.chunk),
            **_values(samples),
            "cache_bytes": float(stats.cache.allocated_bytes),
        },
        checks=checks(samples, config.window + config.sinks),
        curve=_curve(samples),
        run=run,
    )


def policy_words(policy: Policy) -> str:
    """Its name, and those of its settings that are not the default."""
    usual = policy_facts(find_policy(policy.name))
    other = [f"{k} {v}" for k, v in policy_facts(policy).items() if v != usual[k]]
    return f"{policy.name} ({', '.join(other)})" if other else policy.name


def _values(samples: Samples) -> dict[str, float | None]:
    everything = slice(0, samples.count)
    seconds, tokens = (x[: samples.count] for x in (samples.seconds, samples.tokens))
    quiet, full = samples.quiet(everything), seconds[tokens == tokens[0]]
    predicted = float(samples.predicted[: samples.count].sum())
    return {
        "tokens_per_s": float(tokens.sum() / seconds.sum()),
        "token_bits": float(samples.bits[: samples.count].sum()) / predicted if predicted else None,
        "resident_bytes": float(samples.resident[samples.count - 1]),
        "undisturbed_share": len(quiet) / len(full),
        "step_p50_s": _quantile(quiet, 0.5),
        "step_p99_s": _quantile(quiet, 0.99),
        "step_p50_of_all_s": _quantile(full, 0.5),
        "step_p99_of_all_s": _quantile(full, 0.99),
        "step_max_s": float(full.max()),
    }


def checks(samples: Samples, kept: int) -> tuple[Check, ...]:
    """What is promised of a stream that keeps so many tokens."""
    tenths = [samples.part(tenth / 10, (tenth + 1) / 10) for tenth in range(1, 10)]
    resident = [float(samples.resident[tenth].max(initial=0.0)) for tenth in tenths]
    low, high = min(resident), max(resident)
    early, late = (samples.quiet(samples.part(*part)) for part in ((0.1, 0.2), (0.9, 1.0)))
    filled = int(np.searchsorted(samples.position, kept))
    steady = samples.quiet(slice(filled + 1, samples.count))
    paced = min(len(early), len(late)) >= FEWEST_STEPS
    even = len(steady) >= FEWEST_FOR_P99
    return (
        Check(
            what=(
                "most resident memory in each tenth of the stream from the second on, "
                f"{format_bytes(low)} to {format_bytes(high)}: change"
            ),
            value=high / low - 1 if low else None,
            at_most=MEMORY_GROWTH,
            unless="a tenth has no step",
        ),
        Check(
            what="median time of a step in the last tenth over the second tenth: change",
            value=abs(float(np.median(late) / np.median(early)) - 1) if paced else None,
            at_most=SLOWDOWN,
            unless=f"fewer than {FEWEST_STEPS} undisturbed steps in one of the two",
        ),
        Check(
            what=f"p99 over p50 of {len(steady):,} undisturbed steps with a full window",
            value=float(np.quantile(steady, 0.99) / np.median(steady)) if even else None,
            at_most=UNEVENNESS,
            unless=f"fewer than {FEWEST_FOR_P99}",
        ),
    )


def _curve(samples: Samples) -> dict[str, Column]:
    """Points over position, and beside them evenly spaced samples of steps."""
    cuts = np.linspace(0, samples.count, min(POINTS, samples.count) + 1).astype(int)
    spans = [slice(low, high) for low, high in pairwise(cuts)]
    step = -(-samples.count // MOST_SAMPLES)
    size = samples.tokens[0]
    predicted = [float(samples.predicted[span].sum()) for span in spans]
    bits = [float(samples.bits[span].sum()) for span in spans]
    return {
        "position": tuple(samples.position[span][-1] for span in spans),
        "resident_bytes": tuple(float(samples.resident[span].max()) for span in spans),
        "token_s": _rounded([_quantile(samples.quiet(span) / size, 0.5) for span in spans]),
        "token_of_all_s": _rounded(
            [_quantile(samples.seconds[span] / samples.tokens[span], 0.5) for span in spans]
        ),
        "token_bits": _rounded(
            [b / n if n else None for b, n in zip(bits, predicted, strict=True)]
        ),
        "step_s": _rounded(samples.seconds[: samples.count : step].tolist()),
        "step_others_share": _rounded(samples.others[: samples.count : step].tolist(), 3),
    }


def _rounded(column: Sequence[float | None], digits: int = 9) -> Column:
    """Times to 1 ns and shares to 0.1 %, as precise as they are known."""
    return tuple(None if x is None or math.isnan(x) else round(x, digits) for x in column)


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None
