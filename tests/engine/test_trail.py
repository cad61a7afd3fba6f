"""A trail keeps totals exactly, times within 1 %, and itself small."""

import random

import pytest

from foveal.engine.trail import Point, Trail


def test_it_stays_small_and_loses_nothing() -> None:
    trail = Trail(chunk=8)
    for step in range(20_000):
        trail.add(Point(8, 0.001, 16.0, 8, 1000 + step))
    assert 512 <= len(trail.points) <= 1024
    assert trail.total.tokens == sum(p.tokens for p in trail.points) == 160_000
    assert trail.curve()[-1]["position"] == 160_000
    summary = trail.summary()
    assert summary["bits_per_token"] == pytest.approx(2.0)
    assert summary["tokens_per_s"] == pytest.approx(8000.0)
    assert summary["s_per_token"]["last_tenth"] == pytest.approx(1 / 8000)
    assert summary["resident_bytes"]["second_tenth"] == pytest.approx(1000 + 4000, rel=0.01)
    assert summary["resident_bytes"]["last_tenth"] == 20_999


def test_quantiles_are_those_of_full_steps() -> None:
    trail, rng = Trail(chunk=4), random.Random(0)
    times = [rng.lognormvariate(-6, 1) for _ in range(1001)]
    for time in times:
        trail.add(Point(4, time, 1.0, 4, 1))
    trail.add(Point(1, 1e9, 1.0, 1, 1))
    times.sort()
    assert trail.step_s(0.5) == pytest.approx(times[500], rel=0.01)
    assert trail.step_s(0.99) == pytest.approx(times[990], rel=0.01)
    assert (trail.step_s(0.0), trail.step_s(1.0)) == (times[0], times[-1])


def test_nothing_is_not_zero() -> None:
    summary = Trail(chunk=4).summary()
    assert summary["tokens"] == 0
    assert summary["tokens_per_s"] is None and summary["bits_per_token"] is None
    assert summary["step_s"]["p99"] is None and summary["resident_bytes"]["last_tenth"] is None
