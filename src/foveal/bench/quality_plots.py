"""Pictures of `foveal bench quality`, one a part and text, drawn from findings only.

context, policies   bits per token over position, and beyond the recomputed window's
sinks               bits per token beyond the recomputed window's, over the number of sinks
precision           divergence of each storage format: mean, 99th percentile, maximum
recall              bits per token of planted strings over distance
mass                the share of attention that goes to the first tokens, layer by head
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foveal.bench.finding import Finding, newest
from foveal.bench.plots import INK, MUTED, RULE
from foveal.bench.quality import FULL, RECOMPUTE
from foveal.bench.record import describe
from foveal.core.files import atomic_path

STYLES = {
    FULL: ("#222222", ":"),
    RECOMPUTE: ("#6B6B6B", "--"),
    "sinks": ("#0072B2", "-"),
    "window": ("#E69F00", "-"),
    "recall": ("#009E73", "-"),
    "dynamic": ("#CC79A7", "-"),
}
"""Colours of Okabe and Ito (2008)."""
OTHER_STYLE = ("#D55E00", "-")
NEVER = "never told"

Members = Sequence[Finding]


def draw(findings: Sequence[Finding], folder: Path) -> list[Path]:
    """Draw each part of each text that there is; gives the files."""
    painters: dict[str, Callable[[Members], Figure]] = {
        "context": _windows,
        "policies": _positions,
        "sinks": _sinks,
        "precision": _precision,
        "recall": _recall,
        "mass": _mass,
    }
    drawn = []
    groups = groupby(sorted(newest(findings), key=_picture), key=_picture)
    for (part, text), group in groups:
        members = [finding for finding in group if finding.values]
        if not members:
            continue
        figure = painters[part](members)
        _frame(figure, members[-1], text)
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        target = folder / f"quality-{part}-{slug}.png"
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        drawn.append(target)
    return drawn


def _picture(finding: Finding) -> tuple[str, str]:
    return finding.part, finding.title.split(":")[0]


def _windows(members: Members) -> Figure:
    """Divergence from full attention over the tokens kept."""
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    panels = {
        "KL to full": "KL divergence from full attention, mean",
        "KL p99 to full": "the same, 99th percentile",
    }
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for policy, group in _by(members, "policy").items():
            points = sorted((_span(f), f.values[name]) for f in group if name in f.values)
            if points:
                axes.plot(*zip(*points, strict=True), **_style(policy), marker="o")
        _dress(axes, title, "bits", "tokens kept")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return figure


def _positions(members: Members) -> Figure:
    """The policies that keep most, over position."""
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    whole, close = figure.subplots(1, 2)
    largest = max(_span(f) for f in members if f.subject["policy"] != FULL)
    shown = [f for f in members if f.subject["policy"] == FULL or _span(f) == largest]
    (recomputed,) = (f for f in shown if f.subject["policy"] == RECOMPUTE)
    for finding in shown:
        place, bits = finding.curve["position"], finding.curve["bits"]
        style = _style(finding.subject["policy"])
        whole.plot(place, bits, **style)
        if finding.subject["policy"] not in (FULL, RECOMPUTE):
            pairs = zip(_known(bits), _known(recomputed.curve["bits"]), strict=True)
            close.plot(place, [ours - theirs for ours, theirs in pairs], **style)
    _dress(whole, f"{largest} tokens kept", "bits per token", "position")
    _dress(close, "Beyond recomputing the window", "bits per token", "position")
    close.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    for axes in (whole, close):
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return figure


def _sinks(members: Members) -> Figure:
    """A panel for each number of tokens kept, because their scales differ."""
    streams = [f for f in members if f.subject["policy"] == "sinks"]
    spans = sorted({_span(f) for f in streams})
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    panels = figure.subplots(1, len(spans), squeeze=False)[0]
    name = f"more than {RECOMPUTE}"
    for axes, span in zip(panels, spans, strict=True):
        group = [f for f in streams if _span(f) == span and name in f.values]
        labels = [f.subject["sinks + window"].split(" + ")[0] for f in group]
        values, errors = (_known(f.values[key] for f in group) for key in (name, f"± {name}"))
        axes.errorbar(labels, values, errors, **_style("sinks"), marker="o", capsize=4)
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        _dress(axes, f"{span} tokens kept in all", "bits per token beyond recomputing", "sinks")
    return figure


def _precision(members: Members) -> Figure:
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    axes = figure.subplots()
    coded = [f for f in members if "KL to full" in f.values]
    names = {"KL to full": "mean", "KL p99 to full": "99th percentile", "KL max to full": "maximum"}
    for shift, (name, label) in enumerate(names.items()):
        places = [place + (shift - 1) * 0.27 for place in range(len(coded))]
        heights = _known(f.values[name] for f in coded)
        colour = ("#0072B2", "#E69F00", "#D55E00")[shift]
        axes.bar(places, heights, width=0.25, label=label, color=colour, zorder=3)
    held = _known(f.values["held_bytes"] for f in coded)
    labels = [
        f"{f.subject['stored as']}\n{kept / 2**10:,.0f} KiB"
        for f, kept in zip(coded, held, strict=True)
    ]
    axes.set_xticks(range(len(coded)), labels)
    axes.set_yscale("log")
    _dress(axes, "KL divergence from full attention", "bits", "keys and values stored as")
    return figure


def _recall(members: Members) -> Figure:
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    axes, right = figure.subplots(1, 2)
    for policy, group in _by(members, "policy").items():
        told = [f for f in group if f.subject["after"] != NEVER]
        distances = [int(f.subject["after"]) for f in told]
        bits, errors, hits = (
            _known(f.values[name] for f in told)
            for name in ("bits per token_bits", "± bits per token_bits", "right_share")
        )
        axes.errorbar(distances, bits, errors, **_style(policy), marker="o", capsize=3)
        right.plot(distances, [100 * share for share in hits], **_style(policy), marker="o")
        fresh = [f.values["bits per token_bits"] for f in group if f.subject["after"] == NEVER]
        axes.axhline(_known(fresh)[0], color=_style(policy)["color"], linewidth=1, alpha=0.5)
    _dress(axes, "Random strings (thin: never told)", "bits per token", "tokens since it was told")
    _dress(right, "Likeliest token is right", "% of the string", "tokens since it was told")
    for panel in (axes, right):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return figure


def _mass(members: Members) -> Figure:
    figure = Figure(figsize=(11, 4.8), facecolor="white")
    groups = {title: list(group) for title, group in groupby(members, key=lambda f: f.title)}
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    name = next(n for n in members[0].values if n.startswith("first "))
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        layers = _by(group, "layer")
        shares = [[100 * x for x in _known(f.values[name] for f in row)] for row in layers.values()]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for layer, row in enumerate(shares):
            for head, share in enumerate(row):
                colour = "white" if share > 60 else INK
                axes.text(head, layer, f"{share:.1f}", ha="center", va="center", color=colour)
        even = 100 * _known([group[0].values["one of all, evenly_share"]])[0]
        _dress(axes, title.split(": ")[1].split(",")[0], "layer", "head")
        words = name.removesuffix("_share")
        axes.set_xlabel(f"head; % to the {words}, evenly {even:.2f} each", color=MUTED)
        axes.set_xticks(range(len(shares[0])))
        axes.set_yticks(range(len(shares)))
        axes.grid(visible=False)
    return figure


def _by(members: Members, name: str) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in members:
        groups.setdefault(finding.subject[name], []).append(finding)
    return groups


def _span(finding: Finding) -> int:
    return int(finding.subject["tokens"])


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _style(policy: str) -> dict[str, Any]:
    colour, line = STYLES.get(policy, OTHER_STYLE)
    return {"label": policy, "color": colour, "linestyle": line, "linewidth": 1.8, "zorder": 3}


def _dress(axes: Any, title: str, unit: str, across: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylabel(unit, color=MUTED)
    axes.set_xlabel(across, color=MUTED)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _frame(figure: Figure, last: Finding, text: str) -> None:
    run = last.run
    figure.set_layout_engine("constrained", rect=(0.01, 0.07, 0.98, 0.79), wspace=0.05)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, frameon=False)
    figure.text(0.02, 0.95, f"{last.part}: {text}", fontsize=14, fontweight="bold", color=INK)
    caption = f"{describe(run.machine)}; {run.date[:10]}, foveal {run.foveal}, {run.commit[:10]}"
    details = last.title.split(": ", 1)[1]
    figure.text(0.02, 0.935, f"{details}\n{caption}", fontsize=9, color=MUTED, va="top")
