"""Pictures of `foveal bench quality`, one a part and text, drawn from findings only.

context, policies   bits per token over position, and beyond the recomputed window's
sinks               bits per token beyond the recomputed window's, over the number of sinks
precision           divergence of each storage format: mean, 99th percentile, maximum
recall              bits per token of planted strings over distance
mass                the share of attention that goes to the first tokens, layer by head
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from foveal.bench.canvas import Canvas, in_full, logarithmic, style
from foveal.bench.finding import Finding, newest
from foveal.bench.plots import INK, MUTED
from foveal.bench.quality import AGAINST, FULL, RECOMPUTE

LINES = {
    FULL: ("#222222", ":", 1.8),
    RECOMPUTE: ("#6B6B6B", "--", 1.8),
    "sinks": ("#0072B2", "-", 4.0),
    "window": ("#E69F00", "-", 2.4),
    "dynamic": ("#CC79A7", "-", 1.5),
    "recall": ("#009E73", "-", 1.5),
}
"""Colour, dashes and width of each policy; those drawn first are wider, so that equal ones show."""
OTHER_LINE = ("#D55E00", "-", 1.5)
NEVER = "never told"
FOOT = 0.5
"""Inches for a legend."""

Members = Sequence[Finding]


def draw(findings: Sequence[Finding], folder: Path) -> list[Path]:
    """Draw each part of each text that there is; gives the files."""
    painters: dict[str, Callable[[Members, str], Canvas]] = {
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
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        target = folder / f"quality-{part}-{slug}.png"
        painters[part](members, f"{part}: {text}").save(target)
        drawn.append(target)
    return drawn


def _picture(finding: Finding) -> tuple[str, str]:
    return finding.part, finding.title.split(":")[0]


def _windows(members: Members, title: str) -> Canvas:
    """Divergence from full attention over the tokens kept."""
    canvas = Canvas(members, title, columns=2, foot=FOOT, note=_note(members))
    panels = {
        "KL": "KL divergence from full attention, mean",
        "KL p99": "The same, 99th percentile",
    }
    for axes, (name, heading) in zip(canvas.panels, panels.items(), strict=True):
        for policy, group in _by(members, "policy").items():
            points = sorted((_span(f), f.values[name]) for f in group if name in f.values)
            if points:
                axes.plot(*zip(*points, strict=True), **_line(policy), marker="o")
        style(axes, heading, "bits", "tokens kept")
        axes.set_xscale("log", base=2)
        in_full(axes.xaxis)
        logarithmic(axes.yaxis)
    canvas.legend(canvas.panels[0])
    return canvas


def _positions(members: Members, title: str) -> Canvas:
    """The policies that keep most, over position."""
    members = [finding for finding in members if finding.title.endswith(AGAINST[FULL])]
    canvas = Canvas(members, title, columns=2, foot=FOOT, note=_note(members))
    whole, close = canvas.panels
    largest = max(_span(f) for f in members if f.subject["policy"] != FULL)
    shown = [f for f in members if f.subject["policy"] == FULL or _span(f) == largest]
    (recomputed,) = (f for f in shown if f.subject["policy"] == RECOMPUTE)
    for finding in shown:
        place, bits = finding.curve["position"], finding.curve["bits"]
        line = _line(finding.subject["policy"])
        whole.plot(place, bits, **line)
        if finding.subject["policy"] not in (FULL, RECOMPUTE):
            pairs = zip(_known(bits), _known(recomputed.curve["bits"]), strict=True)
            close.plot(place, [ours - theirs for ours, theirs in pairs], **line)
    style(whole, f"{largest} tokens kept", "bits per token", "position")
    style(close, "Beyond recomputing the window", "bits per token", "position")
    close.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    for axes in (whole, close):
        in_full(axes.xaxis)
    canvas.legend(whole, ncols=6)
    return canvas


def _sinks(members: Members, title: str) -> Canvas:
    """A panel for each number of tokens kept, because their scales differ."""
    streams = [f for f in members if "more" in f.values]
    spans = sorted({_span(f) for f in streams})
    canvas = Canvas(members, title, columns=len(spans), note=_note(members))
    for axes, span in zip(canvas.panels, spans, strict=True):
        group = [f for f in streams if _span(f) == span]
        labels = [f.subject["sinks + window"].split(" + ")[0] for f in group]
        values, errors = (_known(f.values[key] for f in group) for key in ("more", "± more"))
        axes.errorbar(labels, values, errors, **_line("sinks"), marker="o", capsize=4)
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        heading = f"{span} tokens kept in all"
        style(axes, heading, "bits per token beyond recomputing the window", "of them sinks")
    return canvas


def _precision(members: Members, title: str) -> Canvas:
    canvas = Canvas(members, title, foot=FOOT, note=_note(members))
    (axes,) = canvas.panels
    coded = [f for f in members if "KL" in f.values]
    names = {"KL": "mean", "KL p99": "99th percentile", "KL max": "maximum"}
    for shift, (name, label) in enumerate(names.items()):
        places = [place + (shift - 1) * 0.27 for place in range(len(coded))]
        heights = _known(f.values[name] for f in coded)
        colour = ("#0072B2", "#E69F00", "#D55E00")[shift]
        axes.bar(places, heights, width=0.25, label=label, color=colour, zorder=3)
    held = _known(f.values["held_bytes"] for f in coded)
    pairs = zip((f.subject["stored as"] for f in coded), held, strict=True)
    labels = [f"{name}\n{num_bytes / 2**10:,.0f} KiB" for name, num_bytes in pairs]
    axes.set_xticks(range(len(coded)), labels)
    style(axes, "KL divergence from full attention", "bits", "")
    logarithmic(axes.yaxis, (1,))
    canvas.legend(axes)
    return canvas


def _recall(members: Members, title: str) -> Canvas:
    """A panel for each number of tokens kept, and full attention in all of them."""
    spans = sorted({_span(f) for f in members if f.subject["policy"] != FULL})
    canvas = Canvas(members, title, columns=len(spans), foot=FOOT, note=_note(members))
    for axes, span in zip(canvas.panels, spans, strict=True):
        shown = [f for f in members if f.subject["policy"] == FULL or _span(f) == span]
        for policy, group in _by(shown, "policy").items():
            told = [f for f in group if f.subject["after"] != NEVER]
            distances = [int(f.subject["after"]) for f in told]
            names = ("text_bits", "± text_bits")
            bits, errors = (_known(f.values[name] for f in told) for name in names)
            axes.errorbar(distances, bits, errors, **_line(policy), marker="o", capsize=3)
        fresh = [f for f in shown if f.subject["after"] == NEVER and f.subject["policy"] != FULL]
        levels = _known(f.values["text_bits"] for f in fresh)
        label = f"{NEVER}, least and most"
        axes.axhspan(min(levels), max(levels), color=MUTED, alpha=0.4, linewidth=1, label=label)
        style(axes, f"{span} tokens kept", "bits per token of it", "tokens since it was told")
        axes.set_xscale("log", base=2)
        in_full(axes.xaxis)
    canvas.legend(canvas.panels[0], ncols=6)
    return canvas


def _mass(members: Members, title: str) -> Canvas:
    groups = {head: list(group) for head, group in groupby(members, key=lambda f: f.title)}
    name = next(n for n in members[0].values if n.startswith("first "))
    even = 100 * _known([members[0].values["one of all, evenly_share"]])[0]
    note = f"% of attention to the {name.removesuffix('_share')} tokens; evenly {even:.2f} each"
    canvas = Canvas(members, title, columns=len(groups), note=note)
    for axes, (heading, group) in zip(canvas.panels, groups.items(), strict=True):
        rows = _by(group, "layer").values()
        shares = [[100 * x for x in _known(f.values[name] for f in row)] for row in rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for layer, row in enumerate(shares):
            for head, share in enumerate(row):
                colour = "white" if share > 60 else INK
                axes.text(head, layer, f"{share:.1f}", ha="center", va="center", color=colour)
        style(axes, heading.split(": ")[1].split(",")[0], "layer", "head")
        axes.set_xticks(range(len(shares[0])))
        axes.set_yticks(range(len(shares)))
        axes.grid(visible=False)
    return canvas


def _by(members: Members, name: str) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in members:
        groups.setdefault(finding.subject[name], []).append(finding)
    return groups


def _span(finding: Finding) -> int:
    return int(finding.subject["tokens"])


def _note(members: Members) -> str:
    """What all of them read."""
    return members[-1].title.split(": ", 1)[1]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _line(policy: str) -> dict[str, Any]:
    colour, dashes, width = LINES.get(policy, OTHER_LINE)
    return {"label": policy, "color": colour, "linestyle": dashes, "linewidth": width, "zorder": 3}
