"""The pace of a window: bounded, settling, and never back and forth between distant sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.pace import Pace, Target
from properties import examples


def run(pace: Pace, size: int, num_steps: int, seconds, num_tokens: int = 16) -> list[int]:
    """Sizes after each step, whose cost is that of what the window holds by then."""
    sizes, held = [], size
    for _ in range(num_steps):
        held = min(held + num_tokens, size)
        size = pace.next_size(
            size, num_tokens=num_tokens, seconds=seconds(held), used_bytes=1000 * held
        )
        sizes.append(size)
    return sizes


@settings(max_examples=examples(60), deadline=None)
@given(
    minimum=st.integers(1, 300),
    extra=st.integers(0, 3000),
    page_size=st.sampled_from([1, 16, 64]),
    leaps=st.lists(st.tuples(st.integers(1, 3300), st.floats(0, 3)), max_size=4),
    slope=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]),
    start=st.floats(0, 1),
)
def test_it_settles_within_its_bounds(minimum, extra, page_size, leaps, slope, start) -> None:
    maximum = minimum + extra
    pace = Pace(Target(step_s=1.0), minimum=minimum, maximum=maximum, page_size=page_size)
    gaps = [b - a for a, b in zip(pace.rungs, pace.rungs[1:], strict=False)]
    assert pace.rungs[0] == minimum and pace.rungs[-1] == maximum
    assert all(gap >= page_size for gap in gaps[1:]), "a page, but for the last one down"

    def cost(size: int) -> float:
        return slope * size + sum(height for at, height in leaps if size >= at)

    first = pace.rungs[round(start * (len(pace.rungs) - 1))]
    sizes = run(pace, first, 16 * len(pace.rungs) + 400, cost)
    assert all(minimum <= size <= maximum for size in sizes)
    last = sorted({pace.rungs.index(size) for size in sizes[-200:]})
    assert last in ([last[0]], [last[0], last[0] + 1])
    fits = [rung for rung, size in enumerate(pace.rungs) if cost(size) <= 1]
    highest = fits[-1] if fits else 0
    assert last[-1] <= highest + 1
    if not leaps:
        assert last[0] >= highest - 1 and (last[-1] <= highest or not fits)


def test_it_follows_the_machine() -> None:
    pace = Pace(Target(step_s=1.0), minimum=64, maximum=1024, page_size=16)
    assert run(pace, 1024, 100, lambda size: size / 2000)[-1] == 1024
    slow = run(pace, 1024, 400, lambda size: size / 500)[-1]
    assert 400 <= slow <= 500
    assert run(pace, slow, 400, lambda size: size / 2000)[-1] == 1024
    assert run(pace, 1024, 400, lambda size: 2.0)[-1] == 64, "nothing helps: the least"


def test_bytes_count_as_well() -> None:
    target = Target(step_s=1.0, used_bytes=300_000)
    pace = Pace(target, minimum=64, maximum=1024, page_size=16)
    assert 270 <= run(pace, 1024, 400, lambda size: 0.1)[-1] <= 300
    only = Pace(Target(used_bytes=300_000), minimum=64, maximum=1024, page_size=16)
    assert 270 <= run(only, 1024, 400, lambda size: 9.0)[-1] <= 300
    free = Pace(Target(), minimum=64, maximum=1024, page_size=16)
    assert run(free, 64, 400, lambda size: 9.0)[-1] == 1024


def test_one_slow_step_changes_nothing_and_short_ones_are_not_timed() -> None:
    pace = Pace(Target(step_s=1.0), minimum=64, maximum=1024, page_size=16)
    size = pace.rungs[10]

    def step(num_tokens: int, seconds: float) -> int:
        return pace.next_size(size, num_tokens=num_tokens, seconds=seconds, used_bytes=0)

    assert {step(16, 50.0 if i % 5 == 0 else 0.99) for i in range(64)} == {size}
    assert {step(1, 0.001) for _ in range(64)} == {size}
    assert [step(16, 1.5) for _ in range(8)] == [size] * 7 + [pace.rungs[9]]


def test_bad_targets_are_refused() -> None:
    for misuse, message in (
        (lambda: Target(step_s=0.0), "step_s: got 0.0; accepted: a number above 0"),
        (lambda: Target(step_s=float("nan")), "step_s: got nan"),
        (lambda: Target(used_bytes=-1), "used_bytes: got -1"),
        (lambda: Pace(Target(), minimum=9, maximum=8, page_size=1), "minimum: got 9; accepted: 1"),
        (lambda: Pace(Target(), minimum=0, maximum=8, page_size=1), "minimum: got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            misuse()
