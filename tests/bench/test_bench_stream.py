"""Streams and bursts as findings: what is promised is judged by what was measured."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from foveal.bench import bursts, lines, pictures, tables
from foveal.bench.finding import Check, Finding, newest, read_findings
from foveal.bench.record import Run
from foveal.bench.stream import Samples, Text, checks, measure, policy_words
from foveal.core.errors import ArgumentError, LoadError
from foveal.engine.bursts import Terms
from foveal.engine.llm import LLM
from foveal.engine.policies.dynamic import Dynamic
from foveal.engine.session import Session
from foveal.hardware.timer import DISTURBED_SHARE
from tiny import write_tiny_model

SETTINGS = {"window": 40, "chunk": 16}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


@pytest.fixture(scope="module")
def streamed(llm: LLM, run: Run) -> Finding:
    return measure(llm, Text(), 1000, SETTINGS, run)


@pytest.fixture(scope="module")
def burst(llm: LLM, run: Run) -> Finding:
    arrivals = bursts.Arrivals(burst=8, rate=2000, seconds=0.1)
    session = Session(llm, **SETTINGS)
    return bursts.measure(session, arrivals.source(llm, Text()), Terms(), str(arrivals), run)


def samples(seconds: np.ndarray, resident: np.ndarray, others: float = 0.0) -> Samples:
    """A stream of full steps of 16 tokens."""
    made = Samples(len(seconds))
    made.count = len(seconds)
    made.tokens[:], made.seconds[:], made.resident[:] = 16, seconds, resident
    made.others[:] = others
    return made


def test_a_stream_is_what_a_session_makes_of_it(llm: LLM, streamed: Finding) -> None:
    session = Session(llm, **SETTINGS)
    ids = [i for chunk in Text().chunks(llm, 1000, 64) for i in chunk]
    assert len(ids) == 1000
    bits = session.feed(ids)
    values = streamed.values
    assert values["token_bits"] == pytest.approx(float(bits[1:].mean()), rel=1e-4)
    assert values["step_tokens"] == 16
    assert values["cache_bytes"] == session.stats.cache.allocated_bytes
    assert values["step_p50_of_all_s"] <= values["step_p99_of_all_s"] <= values["step_max_s"]
    assert streamed.curve["position"][-1] == 1000 and values["resident_bytes"] > 10**7
    assert len(streamed.curve["step_s"]) == len(streamed.curve["step_others_share"]) == 63
    assert streamed.subject == {"policy": "sinks", "kept": "4+40", "kv": "float32"}


def test_a_text_of_ones_own_ends_the_stream(llm: LLM, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("def größe(x):\n" * 10)
    found = measure(llm, Text(path), 10_000, SETTINGS, run)
    assert found.curve["position"][-1] == len(path.read_bytes())
    assert found.title.endswith("tokens of text")
    path.write_text("")
    with pytest.raises(ArgumentError, match="at least one token"):
        measure(llm, Text(path), 10, SETTINGS, run)
    with pytest.raises(ArgumentError, match=r"file: got .* can be read"):
        measure(llm, Text(tmp_path / "none"), 10, SETTINGS, run)
    with pytest.raises(ArgumentError, match="tokens: got 0"):
        measure(llm, Text(), 0, SETTINGS, run)


def test_promises_are_judged_by_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    steady = 0.01 * rng.uniform(0.99, 1.01, 1000)
    flat = np.full(1000, 300e6)
    assert [c.holds for c in checks(samples(steady, flat), 44)] == [True, True, True]
    growing = np.linspace(300e6, 310e6, 1000)
    slowing = steady * np.linspace(1.0, 1.1, 1000)
    spiky = steady * np.where(np.arange(1000) % 50 == 0, 2.0, 1.0)
    verdicts = {
        "growing": [c.holds for c in checks(samples(steady, growing), 44)],
        "slowing": [c.holds for c in checks(samples(slowing, flat), 44)],
        "spiky": [c.holds for c in checks(samples(spiky, flat), 44)],
    }
    assert verdicts == {
        "growing": [False, True, True],
        "slowing": [True, False, True],
        "spiky": [True, True, False],
    }


def test_what_fills_up_first_is_not_growth() -> None:
    early = np.where(np.arange(1000) < 90, 200e6, 300e6)
    assert checks(samples(np.full(1000, 0.01), early), 44)[0].holds


def test_times_of_a_busy_machine_are_not_judged() -> None:
    spiky = 0.01 * np.where(np.arange(1000) % 2, 5.0, 1.0)
    memory, pace, even = checks(samples(spiky, np.full(1000, 3e8), DISTURBED_SHARE + 0.1), 44)
    assert memory.holds and pace.holds is None and even.holds is None
    assert "not judged" in str(pace) and "undisturbed" in str(pace)


def test_bursts_are_measured_as_they_arrive(burst: Finding) -> None:
    values = burst.values
    assert values["tokens"] == 200 and values["bursts"] == 25
    assert values["duration_s"] >= 0.09
    assert values["latency_min_s"] <= values["latency_p50_s"] <= values["latency_max_s"]
    assert sum(burst.curve["bin_count"]) == 25
    assert len(burst.curve["end_s"]) == len(burst.curve["latency_s"])


@pytest.mark.parametrize("fields", [{"burst": 0}, {"rate": -1.0}, {"seconds": float("inf")}])
def test_arrivals_without_meaning_are_refused(fields: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        bursts.Arrivals(**{"burst": 1, "rate": 1.0, "seconds": 1.0, **fields})


def test_findings_survive_the_file(streamed: Finding, burst: Finding, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for finding in (streamed, burst):
        lines.append(path, finding)
    assert read_findings(path) == [streamed, burst]
    path.write_text('{"benchmark": "other"}\n')
    with pytest.raises(LoadError, match="line 1"):
        read_findings(path)


def test_the_newest_of_each_counts(streamed: Finding) -> None:
    later = dataclasses.replace(streamed, values={"tokens_per_s": 1.0})
    other = dataclasses.replace(streamed, subject={**streamed.subject, "kv": "int8"})
    assert newest([streamed, other, later]) == [later, other]


def test_tables_say_all_of_it_with_units(streamed: Finding, burst: Finding) -> None:
    text = tables.markdown([streamed, burst])
    assert f"### stream: {streamed.title}" in text and "### bursts: " in text
    assert "| policy | sinks |" in text, "many columns: on its side"
    for check in streamed.checks:
        assert f"- {streamed.label}: {check}" in text
    assert [title for title, _ in tables.rich_tables([streamed, burst])] == [
        streamed.title,
        burst.title,
    ]
    assert tables.markdown([]) == "No records.\n"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("step_s", 0.0123, "12.3 ms"),
        ("cache_bytes", 2**21, "2.0 MiB"),
        ("tokens_per_s", 8200.0, "8.2 k/s"),
        ("busy_share", 0.5, "50.0%"),
        ("rms_error", 0.00123, "1.2e-03"),
        ("tokens", 8000.0, "8,000"),
        ("tokens", None, ""),
    ],
)
def test_values_are_written_by_the_end_of_their_names(
    name: str, value: float | None, text: str
) -> None:
    assert tables.written(name, value) == text


def test_a_check_says_whether_it_holds() -> None:
    made = Check(what="p99 over p50", value=1.4, at_most=1.5)
    assert str(made) == "holds: p99 over p50: 1.4, at most 1.5"
    assert str(dataclasses.replace(made, value=1.6)).startswith("DOES NOT HOLD")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures_are_drawn(streamed: Finding, burst: Finding, tmp_path: Path, kind: str) -> None:
    target = tmp_path / f"a.{kind}"
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[kind]
    for words in ("stream", "bursts", None):
        pictures.draw([streamed, burst], target, words)
        assert target.read_bytes().startswith(start)
    with pytest.raises(ArgumentError, match="stream: 1,000 tokens"):
        pictures.draw([streamed], target, "nothing like it")


def test_only_settings_that_are_not_usual_are_said() -> None:
    assert policy_words(Dynamic()) == "dynamic"
    assert policy_words(Dynamic(mass=0.5)) == "dynamic (mass 0.5)"
