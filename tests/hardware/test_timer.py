"""Timing: order, counts, disturbed samples."""

import os
import subprocess
import sys
import time

import pytest

from foveal.core.errors import ArgumentError
from foveal.hardware.timer import WARM_UP_CALLS, Samples, interleave


def test_candidates_take_turns() -> None:
    order: list[str] = []
    found = interleave(
        {name: lambda name=name: order.append(name) for name in "abc"}, budget_s=0, min_samples=4
    )
    timed = order[3 * WARM_UP_CALLS :]
    assert [sorted(timed[i : i + 3]) for i in range(0, 12, 3)] == [list("abc")] * 4
    assert all(len(samples.seconds) == len(samples.others) == 4 for samples in found.values())


def test_the_budget_is_used_and_kept() -> None:
    start = time.perf_counter()
    found = interleave({"nap": lambda: time.sleep(0.01)}, budget_s=0.3, min_samples=1)
    assert 0.3 <= time.perf_counter() - start < 3
    samples = found["nap"]
    assert len(samples.seconds) >= 3
    assert samples.median_s >= 0.01


def test_rounds_are_reported() -> None:
    rounds: list[None] = []
    interleave({"": lambda: None}, budget_s=0, min_samples=3, on_round=lambda: rounds.append(None))
    assert len(rounds) == 3


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="min_samples"):
        interleave({"": lambda: None}, budget_s=0, min_samples=0)


def test_disturbed_samples_are_kept_but_not_counted() -> None:
    samples = Samples(seconds=(1.0, 9.0, 2.0, 3.0, 8.0), others=(0.0, 0.5, 0.1, 0.0, 0.9))
    assert samples.counted == (1.0, 2.0, 3.0)
    assert (samples.num_clean, samples.disturbed) == (3, False)
    assert (samples.median_s, samples.best_s, samples.spread_s) == (2.0, 1.0, 1.0)


def test_too_few_clean_samples_are_said() -> None:
    samples = Samples(seconds=(1.0, 9.0, 2.0), others=(0.0, 0.5, 0.1))
    assert (samples.num_clean, samples.disturbed, samples.median_s) == (2, True, 2.0)
    assert Samples(seconds=(4.0,), others=(0.0,)).spread_s == 0.0


def test_another_process_is_noticed() -> None:
    busy = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        found = interleave({"nap": lambda: time.sleep(0.4)}, budget_s=0, min_samples=1)
    finally:
        busy.kill()
        busy.communicate()
    assert found["nap"].others[0] > 0.02


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pins itself to one core")
def test_our_own_work_is_not_another_process() -> None:
    own_s = 0.4

    def spin() -> None:
        end = time.process_time() + own_s
        while time.process_time() < end:
            pass

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        samples = interleave({"spin": spin}, budget_s=0, min_samples=1)["spin"]
    finally:
        os.sched_setaffinity(0, allowed)
    # What is left of the one core is all that others can have had, give or take some ticks.
    assert samples.others[0] <= 1 - own_s / samples.seconds[0] + 0.1
