"""`Pace`: how long a window may be so that steps keep to a time, and pages to a number of bytes.

Pure logic, no tensors. Sizes are rungs from a minimum to a maximum, a tenth apart and at least a
page. After every few steps the window goes down a rung if the median step took longer than the
target, or more bytes are in use; it goes up one if it would keep to both even if costs grew with
the size. What follows a step up counts once the window can have filled. So, where costs grow with
the size, the window settles at the longest rung that keeps to the targets, or one below it; where
they leap between two rungs, it goes back and forth between these.

Only steps as long as the longest so far are timed: shorter ones take less.
"""

from bisect import bisect_right
from dataclasses import dataclass
from statistics import median

from foveal.core.errors import ArgumentError

_STEPS = 8
"""Steps between two decisions."""
_TENTH = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked for."""

    step_s: float | None = None
    """Seconds that a step may take in the median."""
    used_bytes: int | None = None
    """Bytes of pages in use."""

    def __post_init__(self) -> None:
        for name in ("step_s", "used_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(name, value, "a number above 0, or None")


class Pace:
    """Chooses the size of one window, in tokens."""

    def __init__(self, target: Target, *, minimum: int, maximum: int, page_size: int) -> None:
        if not 1 <= minimum <= maximum:
            raise ArgumentError("minimum", minimum, f"1 to the maximum of {maximum} tokens")
        self.target = target
        self.rungs = _rungs(minimum, maximum, page_size)
        self._longest_step = 0
        self._times: list[float] = []
        self._num_steps = 0
        """Since the last decision."""
        self._filling = 0
        """Tokens that the window still has to take in."""

    def next_size(self, size: int, *, num_tokens: int, seconds: float, used_bytes: int) -> int:
        """The size to go on with, after a step of `num_tokens` in a window of `size`."""
        if self._filling > 0:
            self._filling -= num_tokens
            return size
        if num_tokens > self._longest_step:
            self._longest_step, self._times = num_tokens, []
        if num_tokens == self._longest_step:
            self._times.append(seconds)
        self._num_steps += 1
        if self._num_steps < _STEPS:
            return size
        load = self._load(used_bytes)
        self._num_steps, self._times = 0, []
        rung = bisect_right(self.rungs, size) - 1
        lower, upper = self.rungs[max(rung - 1, 0)], self.rungs[min(rung + 1, len(self.rungs) - 1)]
        if load > 1:
            return lower
        if load * upper > size:
            return size
        self._filling = upper - size
        return upper

    def _load(self, used_bytes: int) -> float:
        """The costs in parts of their targets, the larger of both; 1 where no step was timed."""
        loads = [0.0]
        if self.target.step_s is not None:
            loads.append(median(self._times) / self.target.step_s if self._times else 1.0)
        if self.target.used_bytes is not None:
            loads.append(used_bytes / self.target.used_bytes)
        return max(loads)


def _rungs(minimum: int, maximum: int, page_size: int) -> list[int]:
    """From the maximum down; ascending."""
    rungs = [maximum]
    while rungs[-1] > minimum:
        below = min(int(rungs[-1] / _TENTH), rungs[-1] - page_size)
        rungs.append(max(below, minimum))
    return rungs[::-1]
