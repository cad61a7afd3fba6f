"""What a stream has cost so far, in memory that does not grow with it.

Steps are summed into points; when there are too many, neighbours are merged, so that a stream of
any length has between half of and all of `_POINTS` (`Points`). Times of steps are counted in bins
1 % apart, from which quantiles are read (`Durations`).
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

_POINTS = 1024
_BINS_PER_FACTOR = 100
"""Bins of the logarithm of a time: 1 % each."""


class Summable(Protocol):
    """What can be merged with its neighbour."""

    def __add__(self, other: Self) -> Self:
        """Both as one."""


P = TypeVar("P", bound=Summable)


class Points(Generic[P]):
    """A curve of any number of steps in at most `_POINTS` points of as many steps each."""

    def __init__(self) -> None:
        self.points: list[P] = []
        self._per_point, self._in_last = 1, 0

    def add(self, step: P) -> None:
        """Take in one step."""
        if self._in_last:
            self.points[-1] += step
        else:
            self.points.append(step)
        self._in_last = (self._in_last + 1) % self._per_point
        if len(self.points) == _POINTS and not self._in_last:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [first + second for first, second in pairs]
            self._per_point *= 2


class Durations:
    """Any number of times, counted in bins 1 % apart."""

    def __init__(self) -> None:
        self.count, self.total_s = 0, 0.0
        self._bins: Counter[int] = Counter()
        self._shortest, self._longest = math.inf, 0.0

    def add(self, seconds: float) -> None:
        """Count a time above 0."""
        self.count += 1
        self.total_s += seconds
        self._bins[round(math.log(seconds) * _BINS_PER_FACTOR)] += 1
        self._shortest = min(self._shortest, seconds)
        self._longest = max(self._longest, seconds)

    @property
    def mean_s(self) -> float | None:
        """None without any."""
        return _ratio(self.total_s, self.count)

    def at(self, share: float) -> float | None:
        """The time that this share of all did not exceed, within 1 %; None without any."""
        remaining = math.ceil(share * self.count)
        for place in sorted(self._bins):
            remaining -= self._bins[place]
            if remaining <= 0:
                time = math.exp(place / _BINS_PER_FACTOR)
                return min(max(time, self._shortest), self._longest)
        return None

    def histogram(self) -> list[tuple[float, int]]:
        """The middle of each bin that is not empty, in seconds, and how many times fell there."""
        return [(math.exp(b / _BINS_PER_FACTOR), n) for b, n in sorted(self._bins.items())]


@dataclass(slots=True)
class Point:
    """Some steps in a row."""

    tokens: int
    """Of these steps."""
    seconds: float
    bits: float
    """Sum of their tokens' surprise."""
    num_predicted: int
    """Tokens that it is the sum of."""
    resident_bytes: int
    """Of the process, at most."""

    def __add__(self, other: "Point") -> "Point":
        return Point(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.bits + other.bits,
            self.num_predicted + other.num_predicted,
            max(self.resident_bytes, other.resident_bytes),
        )


class Trail:
    """Collects the steps of one stream."""

    def __init__(self, chunk: int) -> None:
        """`chunk` is the size of a full step: the times of these are compared."""
        self.total = Point(0, 0.0, 0.0, 0, 0)
        self._chunk = chunk
        self._curve: Points[Point] = Points()
        self._times = Durations()

    @property
    def points(self) -> list[Point]:
        """The curve so far."""
        return self._curve.points

    def add(self, step: Point) -> None:
        """Take in one step."""
        self.total += step
        self._curve.add(step)
        if step.tokens == self._chunk:
            self._times.add(step.seconds)

    def step_s(self, share: float) -> float | None:
        """The time that this share of full steps did not exceed, within 1 %; None without any."""
        return self._times.at(share)

    def summary(self) -> dict[str, Any]:
        """Totals, times of full steps, and how the last tenth compares with the one after the
        first, in which the cache fills up."""
        total = self.total
        early, late = self._between(0.1, 0.2), self._between(0.9, 1.0)
        return {
            "tokens": total.tokens,
            "seconds": total.seconds,
            "tokens_per_s": _ratio(total.tokens, total.seconds),
            "bits_per_token": _ratio(total.bits, total.num_predicted),
            "step_s": {
                "tokens": self._chunk,
                "min": self.step_s(0.0),
                "p50": self.step_s(0.5),
                "p99": self.step_s(0.99),
                "max": self.step_s(1.0),
            },
            "resident_bytes": {
                "second_tenth": early.resident_bytes or None,
                "last_tenth": late.resident_bytes or None,
            },
            "s_per_token": {
                "second_tenth": _ratio(early.seconds, early.tokens),
                "last_tenth": _ratio(late.seconds, late.tokens),
            },
        }

    def curve(self) -> list[dict[str, Any]]:
        """Every point as data, with the position of its last token."""
        position, rows = 0, []
        for point in self.points:
            position += point.tokens
            rows.append({"position": position, **asdict(point)})
        return rows

    def _between(self, start: float, end: float) -> Point:
        """The points whose last token lies in this part of the stream."""
        total, position, part = self.total.tokens, 0, Point(0, 0.0, 0.0, 0, 0)
        for point in self.points:
            position += point.tokens
            part = part + point if start * total < position <= end * total else part
        return part


def _ratio(amount: float, count: float) -> float | None:
    return amount / count if count else None
