"""Pictures of streams (memory, time and surprise over position) and of bursts (latency over time,
and how often it was how long), drawn from findings only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveal.bench.canvas import COLOURS, Canvas, in_full, logarithmic, style
from foveal.bench.finding import Column, Finding
from foveal.bench.plots import INK
from foveal.core.units import format_s

MIB, MS = 2**20, 1e-3
SINCE = "seconds from the first arrival"


def draw_stream(members: Sequence[Finding], target: Path) -> None:
    """Streams of one text over position, each in a colour of its own."""
    canvas = Canvas(members, f"Stream: {members[0].title}", rows=3, height=2.6, foot=0.5)
    memory, pace, bits = canvas.panels
    quiet = all(any(finding.curve["token_s"]) for finding in members)
    time, steps = ("token_s", "undisturbed") if quiet else ("token_of_all_s", "all")
    for finding, colour in zip(members, COLOURS, strict=False):
        across = finding.curve["position"]
        rows: tuple[tuple[Any, str, float], ...] = (
            (memory, "resident_bytes", MIB),
            (pace, time, MS),
            (bits, "token_bits", 1.0),
        )
        for axes, name, unit in rows:
            values = _scaled(finding.curve[name], unit)
            axes.plot(across, values, color=colour, linewidth=1.3, label=finding.label)
    style(memory, "Resident memory of the process", "MiB", "")
    style(pace, f"Time per token, median of {steps} steps", "ms", "")
    style(bits, "Surprise", "bits per token", "position in tokens")
    for axes in canvas.panels:
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        in_full(axes.xaxis)
    canvas.legend(memory, ncols=3)
    canvas.save(target)


def draw_bursts(members: Sequence[Finding], target: Path) -> None:
    """The latencies of one run: the last of the findings."""
    finding = members[-1]
    canvas = Canvas([finding], f"Bursts: {finding.title}", rows=2, columns=2)
    over, often, queue, total = canvas.panels
    time = finding.curve["end_s"]
    over.plot(time, _scaled(finding.curve["worst_s"], MS), color=COLOURS[1], label="longest")
    over.plot(time, _scaled(finding.curve["latency_s"], MS), color=COLOURS[0], label="mean")
    over.legend(frameon=False)
    over.set_ylim(bottom=0)
    style(over, "Latency over time", "ms, from arrival to logits", SINCE)
    _histogram(often, finding)
    queue.plot(time, finding.curve["queued_tokens"], color=COLOURS[2])
    queue.set_ylim(bottom=0)
    style(queue, "Queue", "tokens waiting or taken in", SINCE)
    total.plot(
        _scaled(finding.curve["bin_s"], MS),
        _cumulated(finding.curve["bin_count"]),
        color=COLOURS[0],
    )
    logarithmic(total.xaxis)
    style(total, "Share of bursts served within", "% of bursts", "ms, from arrival to logits")
    canvas.save(target)


def _histogram(axes: Any, finding: Finding) -> None:
    """Bursts by latency, on a logarithmic axis, with p50 and p99."""
    middles = np.array(finding.curve["bin_s"], dtype=float) / MS
    edges = np.geomspace(middles.min() * 0.95, middles.max() * 1.05, 31)
    axes.hist(middles, bins=edges, weights=finding.curve["bin_count"], color=COLOURS[0], alpha=0.8)
    quantiles = {name: finding.values[f"latency_{name}_s"] for name in ("p50", "p99")}
    for value in filter(None, quantiles.values()):
        axes.axvline(value / MS, color=INK, linestyle=":", linewidth=1.3)
    said = ", ".join(f"{name} {format_s(value or 0.0)}" for name, value in quantiles.items())
    logarithmic(axes.xaxis)
    style(axes, f"How often (dotted: {said})", "bursts", "ms, from arrival to logits")


def _scaled(column: Column, unit: float) -> list[float]:
    """Values in a unit; a gap where there is none."""
    return [float("nan") if value is None else value / unit for value in column]


def _cumulated(column: Column) -> np.ndarray:
    counts = np.array(column, dtype=float)
    share: np.ndarray = 100 * counts.cumsum() / counts.sum()
    return share
