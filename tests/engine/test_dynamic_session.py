"""Streams with a dynamic window: the same as any until it is full, then shorter where heads allow,
saved and forked to the bit, and kept to a time and to a number of bytes."""

from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError
from foveal.engine.llm import LLM
from foveal.engine.policies.dynamic import Dynamic
from foveal.engine.session import Session
from foveal.kv.dynamic import DynamicStats
from tiny import write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog; päper und Tinte. " * 3


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


def found(session: Session) -> DynamicStats:
    stats = session.stats.cache
    assert isinstance(stats, DynamicStats)
    return stats


def test_until_the_window_is_full_it_is_like_any_other(llm: LLM) -> None:
    dynamic, fixed = Session(llm, window=64, policy="dynamic"), Session(llm, window=64)
    assert dynamic.config.policy == Dynamic() and dynamic.config.sinks == 4
    near, far = dynamic.logits(TEXT[:60]), fixed.logits(TEXT[:60])
    assert torch.allclose(near, far, atol=1e-3)
    assert found(dynamic).saved_bytes == 0 and found(dynamic).longest_reach == 64


def test_all_mass_is_the_fixed_window(llm: LLM) -> None:
    dynamic = Session(llm, window=64, policy=Dynamic(mass=1.0), chunk=7)
    fixed = Session(llm, window=64, chunk=7)
    assert torch.allclose(dynamic.logits(TEXT), fixed.logits(TEXT), atol=2e-3)


def test_less_mass_sees_less(llm: LLM) -> None:
    session = Session(llm, window=96, policy=Dynamic(mass=0.5, minimum=8), chunk=4)
    session.feed(TEXT * 3)
    stats = found(session)
    assert 8 <= stats.mean_reach <= stats.longest_reach <= 96 and stats.mean_reach < 80
    assert len(stats.reaches) == 2 and all(len(layer) == 2 for layer in stats.reaches)
    assert stats.allocated_bytes == session.need.cache_bytes
    assert any("reach: mean" in remark for remark in stats.remarks)


def test_saved_sessions_go_on_to_the_bit(llm: LLM, tmp_path: Path) -> None:
    for length in (0, 10, 150):
        session = Session(llm, window=48, policy=Dynamic(mass=0.6, minimum=16), chunk=3)
        session.feed(list(TEXT.encode()[:length]))
        session.save(tmp_path / "state")
        loaded, branch = Session.load(tmp_path / "state", llm), session.fork()
        assert loaded.config == session.config and loaded.stats == session.stats
        first = session.logits(TEXT)
        assert torch.equal(loaded.logits(TEXT), first)
        assert torch.equal(branch.logits(TEXT), first)


def test_targets_narrow_the_window(llm: LLM) -> None:
    slow = Session(llm, window=128, policy=Dynamic(minimum=16, latency=1e-9), chunk=1)
    slow.feed(TEXT)
    assert found(slow).maximum == 16 == found(slow).longest_reach
    assert found(slow).saved_bytes > 0
    fast = Session(llm, window=128, policy=Dynamic(minimum=16, latency=1e9), chunk=1)
    fast.feed(TEXT)
    assert found(fast).maximum == 128
    page_bytes = found(fast).allocated_bytes * 16 // found(fast).capacity
    small = Session(llm, window=128, policy=Dynamic(mass=1.0, held=6 * page_bytes), chunk=1)
    small.feed(TEXT * 2)
    assert found(small).used_bytes <= 6 * page_bytes < found(fast).used_bytes
    branch = small.fork()
    assert found(branch).maximum == found(small).maximum < 128


def test_quantised_pages_are_as_good(llm: LLM) -> None:
    exact = Session(llm, window=64, policy="dynamic", chunk=8)
    coded = Session(llm, window=64, policy="dynamic", chunk=8, kv="int8")
    near, far = exact.feed(TEXT * 2), coded.feed(TEXT * 2)
    assert 0 < float((near - far).abs().median()) < 0.1
    assert coded.need.cache_bytes < exact.need.cache_bytes


def test_bad_settings_are_refused(llm: LLM) -> None:
    for settings, message in (
        ({"policy": Dynamic(minimum=2)}, "minimum: got 2; accepted: 4 to the window of 64 tokens"),
        ({"policy": Dynamic(mass=0)}, "mass: got 0"),
        ({"policy": Dynamic(latency=0.0)}, "step_s: got 0.0"),
        ({"policy": Dynamic(), "kv": "int8-channel"}, "kv: got 'int8-channel'; accepted: a format"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Session(llm, window=64, **settings)
