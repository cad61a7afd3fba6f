"""Pictures of caches: appends over the fill, decoding by tier, and memory over length, drawn from
findings only."""

from collections.abc import Sequence
from pathlib import Path

from foveal.bench.canvas import COLOURS, MARKERS, Canvas, in_full, logarithmic, style
from foveal.bench.finding import Finding
from foveal.bench.plots import INK, MUTED

GIB, MS, US = 2**30, 1e-3, 1e-6


def draw_append(members: Sequence[Finding], target: Path) -> None:
    """Time of an append over the fill, a curve for each kind of cache."""
    canvas = Canvas(members, members[0].title, height=5.2, foot=0.9)
    (axes,) = canvas.panels
    fills = list(dict.fromkeys(f.subject["fill"] for f in members))
    for number, kind in enumerate(dict.fromkeys(f.subject["cache"] for f in members)):
        own = {f.subject["fill"]: f for f in members if f.subject["cache"] == kind}
        axes.plot(
            [fills.index(fill) for fill in own],
            [(f.values["append_s"] or 0.0) / US for f in own.values()],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=2,
            label=kind,
        )
    axes.set_xticks(range(len(fills)), fills)
    logarithmic(axes.yaxis)
    style(axes, "Time of one append, median", "µs", "how full the memory is")
    canvas.legend(axes)
    canvas.save(target)


def draw_tiers(members: Sequence[Finding], target: Path) -> None:
    """Tokens per second by where the past is kept."""
    canvas = Canvas(
        members, "Decoding by where the past is kept", height=3.8, note=members[0].title
    )
    (axes,) = canvas.panels
    names = [f.subject["kept"].replace(": ", ":\n").replace(" for an", "\nfor an") for f in members]
    rates = [f.values["tokens_per_s"] or 0.0 for f in members]
    bars = axes.barh(range(len(members)), rates, color=COLOURS[0], height=0.65)
    axes.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=5, color=INK, fontweight="bold")
    axes.set_yticks(range(len(members)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    style(axes, "", "", "tokens per second")
    axes.grid(visible=False, axis="y")
    canvas.save(target)


def draw_memory(members: Sequence[Finding], target: Path) -> None:
    """Memory over length, a colour for each model; a stream dashed, what was computed hollow."""
    canvas = Canvas(members, members[0].title, height=6.0, foot=0.9)
    (axes,) = canvas.panels
    for number, model in enumerate(dict.fromkeys(f.subject["model"] for f in members)):
        colour = COLOURS[number % len(COLOURS)]
        for name, line, marker in (("whole text", "-", "o"), ("stream", "--", "s")):
            own = [f for f in members if f.subject["model"] == model and f.subject["style"] == name]
            points = [(_tokens(f), (f.values["resident_bytes"] or 0.0) / GIB) for f in own]
            label = f"{model.partition(':')[0]}, {name}"
            axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=1.8, label=label)
            for finding, point in zip(own, points, strict=True):
                filled = finding.subject["basis"] == "measured"
                face = colour if filled else "white"
                axes.plot(*point, marker, color=colour, markerfacecolor=face, markersize=7)
    axes.set_xscale("log", base=2)
    lengths = sorted({_tokens(f) for f in members})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    logarithmic(axes.yaxis, (1,))
    style(axes, "Resident memory (filled: measured, hollow: computed)", "GiB", "tokens of the text")
    canvas.legend(axes)
    canvas.save(target)


def draw_formats(members: Sequence[Finding], target: Path) -> None:
    """Bytes against exactness, a point for each format."""
    canvas = Canvas(
        members, "Storage formats: bytes and exactness", height=4.4, note=members[0].title
    )
    (axes,) = canvas.panels
    shown = [f for f in members if f.values["rms_error"]]
    for number, finding in enumerate(shown):
        share, error = finding.values["of_bfloat16_64_ratio"], finding.values["rms_error"]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(share, error, MARKERS[number % len(MARKERS)], color=colour, markersize=10)
        axes.annotate(
            finding.subject["format"],
            (share, error),
            xytext=(-11, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            color=INK,
        )
    axes.axvline(0.55, color=MUTED, linestyle=":", linewidth=1.3)
    axes.set_xlim(0.1, 1.1)
    in_full(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.margins(y=0.15)
    across = "bytes over those of bfloat16, heads of 64, scales counted (dotted: 0.55)"
    style(axes, "", "error of attention (rms, relative)", across)
    canvas.save(target)


def _tokens(finding: Finding) -> int:
    return int(finding.subject["tokens"].replace(",", ""))
