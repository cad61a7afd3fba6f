"""`foveal bench bursts`: a session in real time, as a finding.

The tokens of a text arrive in bursts by a real clock (`engine/bursts.py`), so a run lasts as long
as its tokens take to arrive, or longer where the session falls behind.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count

from foveal.bench.finding import Column, Finding
from foveal.bench.record import Run
from foveal.bench.stream import Text
from foveal.core.errors import ArgumentError
from foveal.engine import bursts
from foveal.engine.bursts import Burst, BurstReport, Moment, Terms
from foveal.engine.llm import LLM
from foveal.engine.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How the tokens of a text arrive."""

    burst: int
    """Tokens that arrive together."""
    rate: float
    """Tokens a second."""
    seconds: float
    """For how long."""

    def __post_init__(self) -> None:
        for name in ("burst", "rate", "seconds"):
            value = getattr(self, name)
            if not value > 0 or math.isinf(value):
                raise ArgumentError(name, value, "a finite number above 0")

    def __str__(self) -> str:
        return f"{self.burst} tokens at a time, {self.rate:,.0f} tokens/s for {self.seconds:g} s"

    def source(self, llm: LLM, text: Text) -> Iterator[Burst]:
        """The bursts, each at its time; fewer where the text ends before."""
        chunks = text.chunks(llm, math.ceil(self.rate * self.seconds), self.burst)
        first = [next(chunks, [])]  # what the first one takes to find is not its latency
        ids = (chunk for part in (first, chunks) for chunk in part if chunk)
        times = (number * self.burst / self.rate for number in count())
        return bursts.at_times(zip(times, ids, strict=False))


def measure(
    session: Session,
    source: Iterable[Burst],
    terms: Terms,
    title: str,
    run: Run,
    on_step: Callable[[Moment], object] = lambda moment: None,
) -> Finding:
    """Feed the session with what arrives; warm it up and empty it before."""
    session.feed([0] * session.config.chunk)
    session.reset()
    report = bursts.run(session, source, terms, on_step=on_step)
    config = session.config
    return Finding(
        benchmark="bursts",
        part="bursts",
        title=title,
        subject={
            "policy": config.policy.name,
            "kept": f"{config.sinks}+{config.window}",
            "kv": config.kv,
            "together": f"up to {terms.coalesce or config.chunk}",
            "queue": f"{terms.capacity}, {terms.overflow}",
        },
        values=_values(report),
        curve=_curve(report),
        run=run,
    )


def _values(report: BurstReport) -> dict[str, float | None]:
    latency = asdict(report.latency) if report.latency is not None else {}
    return {
        "bursts": float(report.num_bursts),
        "tokens": float(report.num_tokens),
        "steps": float(report.num_steps),
        "dropped_bursts": float(report.dropped_bursts),
        "duration_s": report.seconds,
        "tokens_per_s": report.tokens_per_s,
        "busy_share": report.busy_share,
        "occupancy_share": report.occupancy,
        "deepest_queue": float(report.deepest_tokens),
        **{f"latency_{name}": value for name, value in latency.items()},
    }


def _curve(report: BurstReport) -> dict[str, Column]:
    moments = report.moments
    return {
        "end_s": tuple(round(m.end_s, 6) for m in moments),
        "latency_s": tuple(round(m.latency_s / m.num_bursts, 6) for m in moments),
        "worst_s": tuple(round(m.worst_s, 6) for m in moments),
        "queued_tokens": tuple(float(m.queued_tokens) for m in moments),
        "bin_s": tuple(round(middle, 9) for middle, _ in report.histogram),
        "bin_count": tuple(float(number) for _, number in report.histogram),
    }
