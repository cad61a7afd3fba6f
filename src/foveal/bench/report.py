"""Records as tables: for the terminal (rich) and for documents (Markdown). One row a record.

Figures are given with their limits: FLOP/s against the measured matmul peak for prefill, bytes per
second of keys and values against the measured memory bandwidth for decode.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.table import Table

from foveal.bench.record import Measurement, Record, Run, describe, newest
from foveal.bench.stability import Verdict
from foveal.core.units import format_count, format_s

HEADER = ("keys", "backend", "median", "± spread", "rate", "of limit", "peak", "ops", "error")
AUTO_MARK = "→"
LEGEND = (
    f"{AUTO_MARK} is what backend=auto chooses; regret is its time over the best. Spread is the "
    "distance between the quartiles. Peak is memory held beyond the inputs, measured. Error is the "
    "largest against float64."
)
STABILITY_LEGEND = (
    "Error: the largest against float64, and as a multiple of that of plain PyTorch operators in "
    "the same precision. ✗: more than twice theirs (gradients: three times) and than rounding "
    "explains, or not finite, or something hidden came through."
)


def by_series(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The newest records of each series (all but the length alike), ordered by length."""
    series: dict[str, list[Record]] = {}
    for record in newest(list(records)):
        series.setdefault(record.cell.series, []).append(record)
    for members in series.values():
        members.sort(key=lambda r: r.cell.workload.kv_len)
    return series


def caption(run: Run) -> str:
    """Where and when, and the limits that fractions refer to."""
    peaks = run.peaks
    flops = [f"{name} {format_count(rate)}FLOP/s" for name, rate in peaks.matmul_flops]
    return (
        f"{describe(run.machine)}; {run.date}; foveal {run.foveal}, commit {run.commit[:12]}. "
        f"Limits ({peaks.source}): matmul {', '.join(flops)}; "
        f"memory {format_count(peaks.bandwidth_bytes)}B/s."
    )


def regrets(records: Sequence[Record]) -> dict[int, float]:
    """By number of keys: the time of auto's choice over the best time measured there."""
    result = {}
    for keys, group in groupby(records, key=lambda r: r.cell.workload.kv_len):
        cell = list(group)
        times = {r.backend: r.measurement.median_s for r in cell if r.measurement}
        if cell[0].auto in times:
            result[keys] = times[cell[0].auto] / min(times.values())
    return result


def rich_tables(records: Iterable[Record]) -> list[Table]:
    """One table for each series."""
    tables = []
    for series, members in by_series(records).items():
        table = Table(title=series, title_justify="left", caption_justify="left")
        for name in HEADER:
            table.add_column(name, justify="left" if name == "backend" else "right")
        keys = None
        for record, row in zip(members, rows(members), strict=True):
            if keys is not None and keys != record.cell.workload.kv_len:
                table.add_section()
            keys = record.cell.workload.kv_len
            table.add_row(*row, style="bold red" if record.disagrees else "")
        table.caption = members[-1].auto_reason
        tables.append(table)
    return tables


def markdown(records: Sequence[Record]) -> str:
    """All series as Markdown tables, under one caption for each run."""
    if not records:
        return "No records."
    runs = {r.run.date: r.run for r in newest(list(records))}
    parts = [*map(caption, runs.values()), LEGEND]
    for series, members in by_series(records).items():
        lines = [f"### {series}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        parts.append("\n".join([*lines, *map(_line, rows(members))]))
    return "\n\n".join(parts) + "\n"


def rows(members: Sequence[Record]) -> list[list[str]]:
    """The cells of the table of one series, under `HEADER`."""
    regret = regrets(members)
    table = []
    for record in members:
        keys = record.cell.workload.kv_len
        name = record.backend
        if record.auto == name:
            name = f"{AUTO_MARK} {name}"
            if regret.get(keys, 1.0) > 1.0:
                name += f" (regret {regret[keys]:.2f})"
        table.append([str(keys), name, *_figures(record)])
    return table


def _figures(record: Record) -> list[str]:
    m = record.measurement
    if m is None:
        return [f"{record.outcome}: {record.reason}", *[""] * (len(HEADER) - 3)]
    unit = "B/s" if record.cell.decode else "FLOP/s"
    return [
        format_s(m.median_s) + ("*" if m.samples.disturbed else ""),
        format_s(m.spread_s),
        format_count(record.cell.rate(m.median_s)) + unit,
        f"{m.fraction_of_limit:.1%}",
        f"{m.peak_bytes / 2**20:.1f} MiB",
        str(m.launches),
        _error(m),
    ]


def _error(m: Measurement) -> str:
    text = _number(m.accuracy.error)
    return text if m.accuracy.holds else f"{text} > {m.accuracy.allowed:.1e}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def stability_tables(verdicts: Iterable[Verdict]) -> list[Table]:
    """One table for each dtype: trials down, backends across."""
    tables = []
    for dtype, group in groupby(verdicts, key=lambda v: v.dtype):
        found = list(group)
        backends = list(dict.fromkeys(v.backend for v in found))
        table = Table("trial", "direction", "PyTorch", *backends, title=f"Stability, {dtype}")
        for (trial, direction), each in groupby(found, key=lambda v: (v.trial, v.direction)):
            row = {v.backend: v for v in each}
            known = [v.accuracy for v in row.values() if v.accuracy is not None]
            plain = _number(known[0].plain_error) if known else ""
            table.add_row(trial, direction, plain, *(_standing(row[name]) for name in backends))
        tables.append(table)
    return tables


def _standing(verdict: Verdict) -> str:
    """`4.2e-07 0.8× ✓`, or why not."""
    accuracy = verdict.accuracy
    if accuracy is None:
        return verdict.note
    text = _number(accuracy.error)
    if accuracy.error is not None and accuracy.plain_error:
        text += f" {accuracy.error / accuracy.plain_error:.2g}×"
    if verdict.holds:
        return f"{text} [green]✓[/]"
    colour = "bold red" if verdict.breaks_promise else "yellow"
    return f"{text} [{colour}]✗ {verdict.note}[/]"


def _number(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
