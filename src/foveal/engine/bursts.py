"""A real-time loop: tokens arrive in bursts, by a real clock, and a session takes them in.

    llm = LLM()
    source = replay(llm.tokenizer.encode(text), burst=32, rate=2000)
    report = run(Session(llm, window=508), source)
    print(report.latency.p99_s, report.busy_share)

The source is read by a thread of its own, so that tokens arrive while the session computes. What
has queued up is taken in together, up to a bound (`Terms.coalesce`): larger steps are cheaper per
token, so the loop gains speed as it falls behind. Where that is not enough, the queue fills up,
and what happens then is asked for: "wait" holds the source up (nothing is lost), "drop-oldest" and
"drop-newest" leave bursts out, which are counted, and the stream goes on without them.

The latency of a burst runs from its arrival to the logits of its last token. A burst that is
replayed arrives when its time has come, even if the source was being held up then: waiting outside
of the queue counts as much as waiting within it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from foveal.core.errors import ArgumentError
from foveal.engine.session import Session
from foveal.engine.trail import Durations, Points

Overflow = Literal["wait", "drop-oldest", "drop-newest"]
OVERFLOWS: tuple[Overflow, ...] = ("wait", "drop-oldest", "drop-newest")


@dataclass(frozen=True, slots=True)
class Burst:
    """Tokens that arrive together."""

    ids: Sequence[int]
    """At least one."""
    arrived_s: float
    """By `time.perf_counter`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What happens to what has arrived and is not taken in yet."""

    coalesce: int | None = None
    """Tokens taken in together at most, or one burst if that is larger; None is a step."""
    capacity: int = 4096
    """Tokens that may wait; a burst that is larger than this may wait alone."""
    overflow: Overflow = "wait"
    """What happens to a burst that finds no room."""

    def __post_init__(self) -> None:
        for name, value in (("coalesce", self.coalesce), ("capacity", self.capacity)):
            if value is not None and value < 1:
                raise ArgumentError(name, value, "an integer of at least 1")
        if self.overflow not in OVERFLOWS:
            raise ArgumentError("overflow", repr(self.overflow), ", ".join(OVERFLOWS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """From the arrival of bursts to the logits of their last tokens, in seconds; quantiles within
    1 %."""

    min_s: float
    mean_s: float
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(slots=True)
class Moment:
    """Some steps in a row."""

    end_s: float
    """When the last of them ended, from the first arrival on."""
    num_bursts: int
    latency_s: float
    """Sum of their bursts'."""
    worst_s: float
    """The longest of them."""
    queued_tokens: int
    """Waiting at the beginning of a step, at most."""

    def __add__(self, other: "Moment") -> "Moment":
        return Moment(
            other.end_s,
            self.num_bursts + other.num_bursts,
            self.latency_s + other.latency_s,
            max(self.worst_s, other.worst_s),
            max(self.queued_tokens, other.queued_tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BurstReport:
    """How a run went."""

    num_bursts: int
    """Taken in."""
    num_tokens: int
    num_steps: int
    """Calls of the session; fewer than bursts where some were taken in together."""
    dropped_bursts: int
    dropped_tokens: int
    seconds: float
    """From the first arrival to the end of the last step."""
    busy_share: float
    """Of that time, what the session computed for."""
    deepest_tokens: int
    """Most that ever waited."""
    occupancy: float
    """Share of the cache's bytes that hold something, at the end."""
    latency: Latency | None
    """None without any burst."""
    moments: tuple[Moment, ...]
    """The run in a bounded number of parts."""
    histogram: tuple[tuple[float, int], ...]
    """Latencies in bins 1 % apart: the middle of a bin in seconds, and its bursts."""

    @property
    def tokens_per_s(self) -> float | None:
        """Throughput; None for nothing."""
        return self.num_tokens / self.seconds if self.seconds else None


def replay(ids: Sequence[int], *, burst: int, rate: float) -> Iterator[Burst]:
    """Bursts of `burst` tokens, `rate` tokens a second; the first arrives at once."""
    if burst < 1 or rate <= 0:
        name, value = ("burst", burst) if burst < 1 else ("rate", rate)
        raise ArgumentError(name, value, "more than 0")
    return at_times(
        (start / rate, ids[start : start + burst]) for start in range(0, len(ids), burst)
    )


def at_times(schedule: Iterable[tuple[float, Sequence[int]]]) -> Iterator[Burst]:
    """Bursts of any sizes, each at its time, in seconds from the first call on."""
    start = time.perf_counter()
    for due, ids in schedule:
        time.sleep(max(0.0, start + due - time.perf_counter()))
        yield Burst(ids, start + due)


def as_read(texts: Iterable[str], encode: Callable[[str], Sequence[int]]) -> Iterator[Burst]:
    """Texts as they come, of a pipe say (`text/blocks.py`); a burst arrives when it is read."""
    for text in texts:
        arrived = time.perf_counter()
        if ids := encode(text):
            yield Burst(ids, arrived)


def run(
    session: Session,
    source: Iterable[Burst],
    terms: Terms | None = None,
    *,
    stop: threading.Event | None = None,
    on_step: Callable[[Moment], object] = lambda moment: None,
) -> BurstReport:
    """Feed a session with what arrives, until the source ends or `stop` is set.

    A source that was stopped in the middle of waiting for its next burst ends with that burst.
    `on_step` is called after each step, in this thread. What the source raises is raised here,
    once all that came before is taken in; what the session raises, at once.
    """
    terms, stop = terms or Terms(), stop or threading.Event()
    inbox, tally = _Inbox(terms), _Tally()
    reader = threading.Thread(target=inbox.fill, args=(source, stop), daemon=True)
    reader.start()
    try:
        while not stop.is_set():
            depth = inbox.num_tokens
            batch = inbox.take(terms.coalesce or session.config.chunk)
            if batch is None:
                break
            if batch:
                ids = [token for burst in batch for token in burst.ids]
                started = time.perf_counter()
                session.feed(ids)
                tally.add(batch, len(ids), started, depth)
                on_step(tally.last)
    finally:
        inbox.close()
    if inbox.failure is not None and not stop.is_set():
        raise inbox.failure
    return tally.report(inbox, session.stats.occupancy)


_PATIENCE_S = 0.2
"""How often an empty queue is left to ask whether to stop."""


class _Inbox:
    """What has arrived and is not taken in yet. Written by the source's thread."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._waiting: deque[Burst] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self.num_tokens = self.deepest_tokens = 0
        self.dropped_bursts = self.dropped_tokens = 0
        self.failure: BaseException | None = None

    def fill(self, source: Iterable[Burst], stop: threading.Event) -> None:
        """Read the source to its end; the thread's."""
        try:
            for burst in source:
                if not self._put(burst) or stop.is_set():
                    break
        except BaseException as error:  # noqa: BLE001  raised again in the other thread
            self.failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, most: int) -> list[Burst] | None:
        """The oldest bursts, of `most` tokens together or a single one; none if nothing came for a
        while, None once nothing will come any more."""
        with self._changed:
            if not self._waiting and not self._ended:
                self._changed.wait(_PATIENCE_S)
            if not self._waiting:
                return None if self._ended else []
            batch = [self._pop()]
            room = most - len(batch[0].ids)
            while self._waiting and len(self._waiting[0].ids) <= room:
                batch.append(self._pop())
                room -= len(batch[-1].ids)
            self._changed.notify_all()
            return batch

    def close(self) -> None:
        """Take nothing more from the source."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, burst: Burst) -> bool:
        """Let a burst wait, or do as the terms say; False once closed."""
        size = len(burst.ids)
        with self._changed:
            while self._waiting and self.num_tokens + size > self._terms.capacity:
                if self._terms.overflow == "drop-newest":
                    self._drop(burst)
                    return not self._closed
                if self._terms.overflow == "drop-oldest":
                    self._drop(self._pop())
                elif self._closed:
                    return False
                else:
                    self._changed.wait()
            self._waiting.append(burst)
            self.num_tokens += size
            self.deepest_tokens = max(self.deepest_tokens, self.num_tokens)
            self._changed.notify_all()
            return not self._closed

    def _pop(self) -> Burst:
        burst = self._waiting.popleft()
        self.num_tokens -= len(burst.ids)
        return burst

    def _drop(self, burst: Burst) -> None:
        self.dropped_bursts += 1
        self.dropped_tokens += len(burst.ids)


@dataclass(slots=True)
class _Tally:
    """What has been taken in so far."""

    num_tokens: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    start_s: float | None = None
    last: Moment = field(default_factory=lambda: Moment(0.0, 0, 0.0, 0.0, 0))
    latencies: Durations = field(default_factory=Durations)
    moments: Points[Moment] = field(default_factory=Points)

    def add(self, batch: list[Burst], num_tokens: int, started: float, depth: int) -> None:
        """Count a step that has just ended."""
        end = time.perf_counter()
        self.start_s = batch[0].arrived_s if self.start_s is None else self.start_s
        latencies = [end - burst.arrived_s for burst in batch]
        for latency in latencies:
            self.latencies.add(latency)
        self.num_tokens += num_tokens
        self.num_steps += 1
        self.busy_s += end - started
        self.last = Moment(
            end - self.start_s, len(batch), sum(latencies), max(latencies), max(depth, num_tokens)
        )
        self.moments.add(self.last)

    def report(self, inbox: _Inbox, occupancy: float) -> BurstReport:
        """All of it."""
        seconds = self.last.end_s
        return BurstReport(
            num_bursts=self.latencies.count,
            num_tokens=self.num_tokens,
            num_steps=self.num_steps,
            dropped_bursts=inbox.dropped_bursts,
            dropped_tokens=inbox.dropped_tokens,
            seconds=seconds,
            busy_share=self.busy_s / seconds if seconds else 0.0,
            deepest_tokens=inbox.deepest_tokens,
            occupancy=occupancy,
            latency=self._latency(),
            moments=tuple(self.moments.points),
            histogram=tuple(self.latencies.histogram()),
        )

    def _latency(self) -> Latency | None:
        times = self.latencies
        low, mean, middle = times.at(0.0), times.mean_s, times.at(0.5)
        late, high = times.at(0.99), times.at(1.0)
        if low is None or mean is None or middle is None or late is None or high is None:
            return None
        return Latency(min_s=low, mean_s=mean, p50_s=middle, p99_s=late, max_s=high)
