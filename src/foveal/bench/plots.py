"""Pictures of benchmarks, drawn from their records only: never from numbers still in memory.

One figure shows one series over the number of keys in four panels: time with the machine's limit,
peak memory, and both relative to the textbook computation. Colours are those of Okabe and Ito
(2008), which people with any colour vision can tell apart; every backend has its own marker
besides. Results that disagree with float64 are left out, and the figure says so.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from foveal.bench.record import Measurement, Record, describe
from foveal.bench.report import by_series
from foveal.core.errors import ArgumentError
from foveal.core.files import atomic_path

BASELINE = "unfused"
STYLES = {
    "unfused": ("#E69F00", "s"),
    "fused": ("#0072B2", "o"),
    "flash": ("#009E73", "D"),
    "flex": ("#CC79A7", "^"),
}
OTHER_STYLE = ("#D55E00", "v")
INK, MUTED, RULE = "#222222", "#6B6B6B", "#E2E2E2"

Curve = dict[int, float]
"""Number of keys -> value."""


def pick_series(records: Sequence[Record], words: str | None = None) -> list[Record]:
    """The records of the first series whose name contains `words` (None: any) and that has
    measurements. Raises `ArgumentError` if there is none, listing what there is."""
    series = by_series(records)
    for name, members in series.items():
        if (words is None or words in name) and any(r.measurement for r in members):
            return members
    accepted = "part of one of: " + "; ".join(series) if series else "a file with measurements"
    raise ArgumentError("series", repr(words), accepted)


def draw(members: Sequence[Record], target: Path) -> None:
    """Draw one series to `target`, in the format its suffix names (png, svg, pdf)."""
    machines = {r.run.fingerprint for r in members}
    if len(machines) > 1:
        raise ArgumentError("records", f"{len(machines)} machines", "records of one machine")
    times = _curves(members, lambda m: m.median_s * 1e3)
    peaks = _curves(members, lambda m: m.peak_bytes / 2**20)
    figure = Figure(figsize=(11, 8.4), facecolor="white")
    (time, memory), (faster, saved) = figure.subplots(2, 2)
    _panel(time, times, "Time of a call", "milliseconds, median and quartiles")
    _quartiles(time, members)
    _limit(time, members)
    _panel(memory, peaks, "Peak memory", "MiB beyond the inputs, as measured")
    _panel(faster, _relative(times), f"Speed-up over {BASELINE}", "times as fast")
    _panel(saved, _relative(peaks), f"Memory saved over {BASELINE}", "times less memory")
    for axes, curves in ((faster, _relative(times)), (saved, _relative(peaks))):
        axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=":", zorder=1)
        _last_values(axes, curves)
    _frame(figure, members, time.get_legend_handles_labels())
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.removeprefix(".") or "png", dpi=150)


def _curves(members: Sequence[Record], value: Callable[[Measurement], float]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for record in members:
        if record.measurement is not None and not record.disagrees:
            curve = curves.setdefault(record.backend, {})
            curve[record.cell.workload.kv_len] = value(record.measurement)
    return curves


def _relative(curves: dict[str, Curve]) -> dict[str, Curve]:
    """The baseline's value over each backend's, where both are known and not 0."""
    base = curves.get(BASELINE, {})
    return {
        name: {keys: base[keys] / value for keys, value in curve.items() if value and keys in base}
        for name, curve in curves.items()
        if name != BASELINE
    }


def _panel(axes: Any, curves: dict[str, Curve], title: str, unit: str) -> None:
    for name, curve in curves.items():
        colour, marker = STYLES.get(name, OTHER_STYLE)
        axes.plot(
            list(curve),
            list(curve.values()),
            label=name,
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=2,
            zorder=3,
        )
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=MUTED)
    axes.set_xlabel("sequence length, keys", color=MUTED)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda keys, _: f"{keys:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.minorticks_off()
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _last_values(axes: Any, curves: dict[str, Curve]) -> None:
    """Each curve's last value in figures, to the right of its last point."""
    ends = [(list(curve.items())[-1], name) for name, curve in curves.items() if curve]
    ends.sort(key=lambda end: end[0][1])
    for rank, ((keys, value), name) in enumerate(ends):
        # The lowest label a little down, the highest a little up: close ones stay apart.
        nudge = 0 if len(ends) == 1 else 10 * rank / (len(ends) - 1) - 5
        axes.annotate(
            f"{value:.3g}×",
            (keys, value),
            xytext=(9, nudge),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            color=STYLES.get(name, OTHER_STYLE)[0],
        )
    axes.margins(y=0.1)


def _quartiles(axes: Any, members: Sequence[Record]) -> None:
    """Bands between the quartiles of the samples."""
    low = _curves(members, lambda m: _quartile(m, 0))
    high = _curves(members, lambda m: _quartile(m, 2))
    for name, curve in low.items():
        colour, _ = STYLES.get(name, OTHER_STYLE)
        axes.fill_between(
            list(curve), list(curve.values()), list(high[name].values()), color=colour, alpha=0.2
        )


def _quartile(measurement: Measurement, index: int) -> float:
    counted = measurement.samples.counted
    if len(counted) < 2:
        return counted[0] * 1e3
    return statistics.quantiles(counted, n=4, method="inclusive")[index] * 1e3


def _limit(axes: Any, members: Sequence[Record]) -> None:
    """The least time that the machine's peaks allow, as a dotted line."""
    cells = {r.cell.workload.kv_len: (r.cell, r.run.peaks) for r in members}
    limit = {
        keys: (cell.kv_bytes if cell.decode else cell.flops) / cell.limit(peaks) * 1e3
        for keys, (cell, peaks) in cells.items()
    }
    what = "bandwidth" if members[0].cell.decode else "matmul peak"
    axes.plot(
        list(limit),
        list(limit.values()),
        color=INK,
        linewidth=1.3,
        linestyle=":",
        label=f"limit: {what}",
    )


def _frame(figure: Figure, members: Sequence[Record], legend: tuple[Any, Any]) -> None:
    """Title, where and how it was taken, and one legend for all panels."""
    run = members[-1].run
    settings = ", ".join(
        f"{name} {value}" for name, value in run.settings.items() if name != "backends"
    )
    peaks = "measured" if run.peaks.source.startswith("measured") else "nominal"
    lines = [
        f"{describe(run.machine)}; limits {peaks}",
        f"{run.date[:10]}, foveal {run.foveal}, commit {run.commit[:10]}; {settings}",
    ]
    measured = [r for r in members if r.measurement]
    busy = sum(r.measurement.samples.disturbed for r in members if r.measurement)
    if busy:
        lines[1] += f"; other processes disturbed {busy} of {len(measured)} points"
    wrong = sum(r.disagrees for r in members)
    if wrong:
        lines[1] += f"; {wrong} left out: they disagree with float64"
    figure.set_layout_engine("constrained", rect=(0.01, 0.05, 0.98, 0.82), hspace=0.07, wspace=0.05)
    title = f"Attention: {members[0].cell.series}"
    figure.text(0.02, 0.965, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 0.945, "\n".join(lines), fontsize=9.5, color=MUTED, va="top", linespacing=1.5)
    figure.legend(*legend, loc="lower center", ncols=6, frameon=False, fontsize=11)
