"""Records as tables: for the terminal (rich) and for documents (Markdown). One row a record.

Figures are given with their limits: FLOP/s against the measured matmul peak for prefill, bytes per
second of keys and values against the measured memory bandwidth for decode.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from foveal.bench.record import Measurement, Record, Run, describe, newest
from foveal.bench.stability import Verdict
from foveal.core.units import format_count

HEADER = ("keys", "backend", "ms", "±", "", "limit", "MiB", "ops", "error", "auto")
AUTO = "→"
LEFT: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "pad_edge": False}
LEGEND = (
    "ms: median; * if other processes kept the machine busy in nearly all samples. ±: half the "
    "distance between the quartiles. limit: the share reached of the matmul peak (prefill) or the "
    "memory bandwidth (decode; keys and values that fit the caches can exceed it). MiB: peak "
    "memory beyond the inputs, measured. ops: operators launched on a CPU, kernels on CUDA. error: "
    "the largest against float64; ✗ if that is too much. auto: what backend=auto chooses, and its "
    "time over the best where it is not the best."
)
STABILITY_LEGEND = (
    "Error: the largest against float64 (of gradients relative to their largest value), and as a "
    "multiple of that of plain PyTorch operators in the same precision. ✗: more than twice theirs "
    "(gradients: three times) and more than rounding explains, or not finite, or wrong in rows "
    "that see nothing."
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
    """By number of keys: the time of auto's choice over the best of those who were right."""
    result = {}
    for keys, group in groupby(records, key=lambda r: r.cell.workload.kv_len):
        cell = list(group)
        right = [r for r in cell if not r.disagrees]
        times = {r.backend: r.measurement.median_s for r in right if r.measurement}
        if cell[0].auto in times:
            result[keys] = times[cell[0].auto] / min(times.values())
    return result


def rich_tables(records: Iterable[Record]) -> list[Table]:
    """One table for each series."""
    tables = []
    for series, members in by_series(records).items():
        table = Table(title=series, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **LEFT)
        for name in header(members):
            table.add_column(name, justify="left" if name == "backend" else "right", no_wrap=True)
        lengths = [record.cell.workload.kv_len for record in members]
        for record, row, following in zip(members, rows(members), [*lengths[1:], 0], strict=True):
            last = following != record.cell.workload.kv_len
            table.add_row(*row, style="bold red" if record.disagrees else "", end_section=last)
        table.caption = members[-1].auto_reason
        tables.append(table)
    return tables


def markdown(records: Sequence[Record]) -> str:
    """All series as Markdown tables, under one caption for each run."""
    if not records:
        return "No records.\n"
    runs = {r.run.date: r.run for r in newest(list(records))}
    parts = [*map(caption, runs.values()), LEGEND]
    for series, members in by_series(records).items():
        titles = header(members)
        lines = [f"### {series}", "", line(titles), line(["---:"] * len(titles))]
        parts.append("\n".join([*lines, *map(line, rows(members))]))
    return "\n\n".join(parts) + "\n"


def header(members: Sequence[Record]) -> list[str]:
    """`HEADER`, with the unit of this series' rate."""
    return [name or ("GB/s" if members[0].cell.decode else "GFLOP/s") for name in HEADER]


def rows(members: Sequence[Record]) -> list[list[str]]:
    """The table of one series, under `header`."""
    regret = regrets(members)
    return [
        [
            str(record.cell.workload.kv_len),
            record.backend,
            *_figures(record),
            _choice(record, regret.get(record.cell.workload.kv_len, 1.0)),
        ]
        for record in members
    ]


def _figures(record: Record) -> list[str]:
    m = record.measurement
    if m is None:
        return [record.outcome, *[""] * (len(HEADER) - 4)]
    return [
        f"{m.median_s * 1e3:.4g}{'*' if m.samples.disturbed else ''}",
        f"{m.spread_s / 2 / m.median_s:.0%}",
        f"{record.cell.rate(m.median_s) / 1e9:.3g}",
        f"{m.fraction_of_limit:.1%}",
        f"{m.peak_bytes / 2**20:.3g}",
        str(m.launches),
        _error(m),
    ]


def _choice(record: Record, regret: float) -> str:
    if record.auto != record.backend:
        return ""
    return f"{AUTO} {regret:.2f}×" if regret > 1 else AUTO


def reasons(records: Iterable[Record]) -> list[str]:
    """Why backends were not measured, each reason once, with the number of cells."""
    counts = Counter(f"{r.backend} {r.outcome}: {r.reason}" for r in records if not r.measurement)
    return [f"{text} ({number} cells)" for text, number in counts.items()]


def _error(m: Measurement) -> str:
    text = _number(m.accuracy.error)
    return text if m.accuracy.holds else f"{text} ✗"


def line(cells: Iterable[str]) -> str:
    """Cells as a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def stability_tables(verdicts: Iterable[Verdict]) -> list[Table]:
    """One table for each dtype: trials down, backends across."""
    tables = []
    for dtype, group in groupby(verdicts, key=lambda v: v.dtype):
        found = list(group)
        backends = list(dict.fromkeys(v.backend for v in found))
        table = Table(
            "trial", "PyTorch", *backends, title=f"Stability, {dtype}", box=box.SIMPLE, **LEFT
        )
        for (trial, direction), each in groupby(found, key=lambda v: (v.trial, v.direction)):
            row = {v.backend: v for v in each}
            known = [v.accuracy for v in row.values() if v.accuracy is not None]
            plain = _number(known[0].plain_error) if known else ""
            name = f"{trial}, gradients" if direction == "backward" else trial
            table.add_row(name, plain, *(_standing(row[backend]) for backend in backends))
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
    return "NaN, inf" if error is None else f"{error:.1e}"
