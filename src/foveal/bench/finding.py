"""`Finding`: a row of a table, kept as a line of a file, for benchmarks of many different things.

Where every record of a benchmark has the same fields, these are a class of their own (`record.py`).
Streams and caches are measured in a dozen ways, so a finding names its figures: `values` by a name
that ends in the unit, `curve` as columns of the same length. A figure that was promised is a
`Check`: measured value, limit, and whether it holds, so that no reader has to remember the promise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from foveal.bench import lines
from foveal.bench.record import Run
from foveal.hardware.timer import Samples

Column = tuple[float | None, ...]

BUSY = "other processes kept the machine busy"
"""Why a time could not be judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A figure that was promised."""

    what: str
    """What was measured, and how."""
    value: float | None
    """None where it could not be judged."""
    at_most: float
    unless: str = ""
    """Why it could not be judged."""

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None where that could not be judged."""
        return None if self.value is None else self.value <= self.at_most

    def __str__(self) -> str:
        if self.value is None:
            return f"not judged: {self.what} (at most {self.at_most:g}): {self.unless}"
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{verdict}: {self.what}: {self.value:.4g}, at most {self.at_most:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was measured."""

    benchmark: str
    part: str
    """Which table it is a row of."""
    title: str
    """What was computed, in words: the title of the table."""
    subject: dict[str, str]
    """What the row is about, by the name of the column."""
    values: dict[str, float | None]
    """By a name that ends in its unit (`tables.py` lists them); None where there is none."""
    checks: tuple[Check, ...] = ()
    curve: dict[str, Column]
    """Columns of samples, or of points of a curve."""
    run: Run

    @property
    def label(self) -> str:
        """The row in words."""
        return ", ".join(self.subject.values())


def read_findings(path: Path) -> list[Finding]:
    """Every finding of a file. Raises `LoadError` with the line and the field that are wrong."""
    return lines.read(path, Finding)


def newest(findings: Iterable[Finding]) -> list[Finding]:
    """Of several findings about one thing on one machine the last."""
    last = {(f.part, f.title, *f.subject.items(), f.run.fingerprint): f for f in findings}
    return list(last.values())


def of_samples(samples: Samples) -> dict[str, Column]:
    """Samples as columns: seconds, and the share of the machine that others took meanwhile."""
    return {"seconds": samples.seconds, "others_share": samples.others}
