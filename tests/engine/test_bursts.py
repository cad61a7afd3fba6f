"""The real-time loop by a real clock: nothing is lost unasked, latencies count from arrival."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from foveal.core.errors import ArgumentError, RequestError
from foveal.engine.bursts import Burst, Moment, Terms, as_read, at_times, replay, run
from foveal.engine.llm import LLM
from foveal.engine.session import Session
from tiny import write_tiny_model

IDS = [3 + i * 7 % 200 for i in range(400)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


def session(llm: LLM) -> Session:
    return Session(llm, window=64, chunk=64)


def now(*sizes: int) -> list[Burst]:
    """Bursts that have all arrived."""
    at = time.perf_counter()
    return [Burst([5] * size, at) for size in sizes]


def test_everything_is_taken_in_once_and_in_order(llm: LLM) -> None:
    ours, plain = session(llm), session(llm)
    report = run(ours, replay(IDS, burst=7, rate=4000))
    plain.feed(IDS)
    assert report.num_tokens == ours.num_tokens == 400 and report.dropped_bursts == 0
    assert report.num_bursts == 58 and report.num_steps <= 58
    assert torch.allclose(ours.next_logits, plain.next_logits, atol=2e-3)
    assert ours.stats.bits_per_token == pytest.approx(plain.stats.bits_per_token, rel=1e-4)
    assert report.occupancy == ours.stats.occupancy > 0.9


def test_the_clock_is_real(llm: LLM) -> None:
    """At a rate that is easily kept, the run takes as long as its tokens take to arrive."""
    report = run(session(llm), replay(IDS[:100], burst=10, rate=250))
    assert report.seconds >= 0.36
    assert 0 < report.busy_share <= 1 and report.tokens_per_s < 300
    latency = report.latency
    assert 0 < latency.min_s <= latency.p50_s <= latency.p99_s <= latency.max_s
    assert latency.min_s <= latency.mean_s <= latency.max_s
    assert latency.max_s <= report.seconds
    assert sum(number for _, number in report.histogram) == report.num_bursts == 10
    assert report.moments[-1].end_s == report.seconds
    assert sum(moment.num_bursts for moment in report.moments) == 10


@pytest.mark.parametrize("most", [1, 24, 64])
def test_what_has_queued_up_is_taken_in_together(llm: LLM, most: int) -> None:
    seen: list[Moment] = []
    bursts = now(8, 8, 8, 8, 100, 8)
    report = run(session(llm), bursts, Terms(coalesce=most, capacity=1000), on_step=seen.append)
    assert report.num_tokens == 140 and report.num_bursts == 6
    assert sum(moment.num_bursts for moment in seen) == 6 and len(seen) == report.num_steps
    assert all(moment.num_bursts <= max(1, most // 8) for moment in seen)
    if most == 1:
        assert report.num_steps == 6


def test_waiting_outside_of_the_queue_counts(llm: LLM) -> None:
    """Ten bursts have arrived before any is served, and one may wait: the later, the longer."""
    latencies: list[float] = []
    terms = Terms(coalesce=1, capacity=1)
    schedule = at_times((0.0, [5] * 20) for _ in range(10))
    report = run(session(llm), schedule, terms, on_step=lambda m: latencies.append(m.worst_s))
    assert report.num_bursts == 10 and report.dropped_bursts == 0
    assert latencies == sorted(latencies) and latencies[-1] > 5 * latencies[0]
    assert report.deepest_tokens <= 20


class Gate:
    """Bursts of which the later ones come only when the session is at work with the first."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.go, self.done = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[Burst]:
        yield Burst([5], time.perf_counter())
        self.go.wait(10)
        for number, size in enumerate(self.sizes):
            yield Burst([6 + number] * size, time.perf_counter())
        self.done.set()

    def open(self, moment: Moment) -> None:
        self.go.set()
        self.done.wait(10)


@pytest.mark.parametrize(
    ("overflow", "served", "dropped"),
    [("drop-oldest", (40, 30), 60), ("drop-newest", (20, 40, 40), 30)],
)
def test_what_finds_no_room_is_dropped_as_asked(
    llm: LLM, overflow: str, served: tuple[int, ...], dropped: int
) -> None:
    gate = Gate(20, 40, 40, 30)
    ours, terms = session(llm), Terms(coalesce=1, capacity=100, overflow=overflow)
    report = run(ours, gate, terms, on_step=gate.open)
    assert report.num_tokens == ours.num_tokens == 1 + sum(served)
    assert report.num_bursts == 1 + len(served)
    assert (report.dropped_tokens, report.num_tokens) == (dropped, 131 - dropped)
    assert report.deepest_tokens <= 100


def test_a_burst_beyond_the_capacity_waits_alone(llm: LLM) -> None:
    report = run(session(llm), now(50, 50), Terms(capacity=8))
    assert report.num_tokens == 100 and report.deepest_tokens == 50


def test_texts_arrive_when_they_are_read(llm: LLM) -> None:
    def texts() -> Iterator[str]:
        yield "def f():"
        time.sleep(0.05)
        yield ""
        yield "    return 1"

    report = run(
        session(llm), as_read(texts(), lambda text: llm.tokenizer.encode(text, special=False))
    )
    assert report.num_bursts == 2 and report.seconds >= 0.05


def test_stop_ends_it_after_the_step_under_way(llm: LLM) -> None:
    stop = threading.Event()
    ours = session(llm)
    source = at_times((0.01 * i, [5] * 4) for i in range(10_000))
    report = run(ours, source, stop=stop, on_step=lambda moment: stop.set())
    assert 4 <= report.num_tokens == ours.num_tokens <= 64


def test_errors_of_the_source_come_after_what_it_gave(llm: LLM) -> None:
    def broken() -> Iterator[Burst]:
        yield Burst([5] * 9, time.perf_counter())
        raise ArgumentError("text", "byte 0xe9", "UTF-8")

    ours = session(llm)
    with pytest.raises(ArgumentError, match="byte 0xe9"):
        run(ours, broken())
    assert ours.num_tokens == 9


def test_errors_of_the_session_end_the_source_too(llm: LLM) -> None:
    before = threading.active_count()
    with pytest.raises(RequestError):
        run(session(llm), replay([10**6] * 100, burst=1, rate=1000), Terms(capacity=1))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_nothing_is_not_zero(llm: LLM) -> None:
    report = run(session(llm), [])
    assert report.latency is None and report.tokens_per_s is None and report.num_bursts == 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Terms(coalesce=0), "coalesce"),
        (lambda: Terms(capacity=0), "capacity"),
        (lambda: Terms(overflow="burn"), "overflow"),
        (lambda: replay(IDS, burst=0, rate=1), "burst"),
        (lambda: replay(IDS, burst=1, rate=0), "rate"),
    ],
)
def test_what_makes_no_sense_is_named(make, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        make()
