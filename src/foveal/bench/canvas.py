"""What pictures of findings share: a title, where and when it was measured, panels, colours.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from foveal.bench.finding import Finding
from foveal.bench.plots import INK, MUTED, RULE
from foveal.bench.record import Run, describe
from foveal.core.errors import ArgumentError
from foveal.core.files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")

_INCH_OF_HEAD, _INCH_OF_LINE = 1.05, 0.2


class Canvas:
    """A figure of `rows` x `columns` panels under a head that says what and where."""

    def __init__(
        self,
        members: Sequence[Finding],
        title: str,
        *,
        rows: int = 1,
        columns: int = 1,
        height: float = 4.0,
        foot: float = 0.1,
        note: str = "",
    ) -> None:
        """`height` is that of a row, `foot` that of the place for a legend, in inches; `note` goes
        below the title. Raises `ArgumentError` for findings of several
        machines."""
        if len({finding.run.fingerprint for finding in members}) > 1:
            raise ArgumentError("records", "several machines", "records of one machine")
        tall = rows * height + _INCH_OF_HEAD + foot + (_INCH_OF_LINE if note else 0.0)
        self._figure = Figure(figsize=(11, tall), facecolor="white")
        rect = (0.01, foot / tall, 0.98, rows * height / tall)
        self._figure.set_layout_engine("constrained", rect=rect, hspace=0.06, wspace=0.05)
        axes = self._figure.subplots(rows, columns, squeeze=False)
        self.panels: list[Any] = list(axes.flat)
        self._head(title, note, members[-1].run, tall)

    def legend(self, axes: Any, **placing: Any) -> None:
        """One legend for all panels, of what one of them shows, at the foot."""
        self._figure.legend(
            *axes.get_legend_handles_labels(),
            **{"loc": "lower center", "frameon": False, "fontsize": 10, "ncols": 4, **placing},
        )

    def save(self, target: Path) -> None:
        """In the format that the suffix names (png, svg, pdf)."""
        with atomic_path(target) as temporary:
            kind = target.suffix.removeprefix(".") or "png"
            self._figure.savefig(temporary, format=kind, dpi=150)

    def _head(self, title: str, note: str, run: Run, tall: float) -> None:
        settings = "".join(f"; {name} {value}" for name, value in run.settings.items())
        lines = [
            *([note] if note else []),
            describe(run.machine),
            f"{run.date[:10]}, foveal {run.foveal}, commit {run.commit[:10]}{settings}",
        ]
        self._figure.text(
            0.02,
            1 - 0.3 / tall,
            title,
            fontsize=13 if len(title) > 80 else 15,
            fontweight="bold",
            color=INK,
            va="center",
        )
        self._figure.text(
            0.02,
            1 - 0.5 / tall,
            "\n".join(lines),
            fontsize=9.5,
            color=MUTED,
            va="top",
            linespacing=1.5,
        )


def style(axes: Any, title: str, unit: str, across: str) -> None:
    """A panel's title, the unit of its values, and what runs across."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=MUTED)
    axes.set_xlabel(across, color=MUTED)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def in_full(axis: Any) -> None:
    """Write an axis's numbers in full."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def logarithmic(axis: Any, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Make an axis logarithmic, its numbers in full at these multiples of powers of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    in_full(axis)
