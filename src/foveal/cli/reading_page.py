"""The report of `foveal stream` as one HTML page: loss, time and memory over position, drawn from
the run's points and from nothing else. The pictures are SVG within the page, in the colours of the
reader's light or dark scheme."""

import io
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from foveal.core.units import format_bytes

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>foveal stream: {title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; --ink: #1d2329; --line: #0072b2; background: #fff }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #d9dee3; --line: #56b4e9; background: #14181c }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 1.5rem 0 0 }}
svg {{ width: 100%; height: auto }} li {{ margin: .2rem 0 }} ul {{ padding-left: 1.2rem }}
</style></head><body>
<h1>{title}</h1>
<p>{settings}</p>
<ul>{facts}</ul>
{pictures}
<p>Position in tokens. Pale: each of {points} points; bold: the mean of {smoothed} in a row. Dotted:
from here on tokens are forgotten.{refined}</p>
</body></html>
"""

_INK, _LINE = "#010203", "#040506"
"""Stand for the page's colours until the picture is in the page."""
_SMOOTHED = 32
"""A mean is of one point in so many."""


def page(found: dict[str, Any], lines: list[str]) -> str:
    """The page of one run, from its document and the lines that sum it up."""
    config, points = found["config"], found["curve"]
    settings = (
        f"model {found['model']}; policy {config['policy']['name']}: window {config['window']}, "
        f"sinks {config['sinks']}, {config['kv']}; steps of {config['chunk']} tokens"
    )
    if config["memory"] is not None:
        settings += f"; cap {format_bytes(config['memory'])}"
    refined = " Dashed: kept more precisely from here on." if _refined(found) else ""
    return _PAGE.format(
        title=escape(found["file"]),
        settings=escape(settings),
        facts="".join(f"<li>{escape(line)}</li>" for line in lines),
        pictures="\n".join(_pictures(found)),
        points=f"{len(points):,}",
        smoothed=_window(len(points)),
        refined=refined,
    )


def _pictures(found: dict[str, Any]) -> list[str]:
    """Three curves over position."""
    points = found["curve"]
    predicted = [p for p in points if p["num_predicted"]]
    panels = (
        ("Bits per token", predicted, [p["bits"] / p["num_predicted"] for p in predicted]),
        ("Milliseconds per token", points, [1e3 * p["seconds"] / p["tokens"] for p in points]),
        ("Resident memory, MiB", points, [p["resident_bytes"] / 2**20 for p in points]),
    )
    return [
        f"<h2>{name}</h2>\n{_draw(name, [p['position'] for p in rows], values, found)}"
        for name, rows, values in panels
    ]


def _draw(name: str, positions: list[int], values: list[float], found: dict[str, Any]) -> str:
    """One curve as an SVG element whose text is text, in the page's font."""
    figure = Figure(figsize=(5.4, 1.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(positions, values, linewidth=0.6, color=_LINE, alpha=0.4)
    axes.plot(positions, _means(values), linewidth=1.4, color=_LINE)
    axes.axvline(found["config"]["window"] + found["config"]["sinks"], color=_INK, linestyle=":")
    for position in _refined(found):
        axes.axvline(position, color=_INK, linestyle="--", linewidth=0.8)
    axes.set_ylim(0, 1.1 * max(values, default=1))
    axes.set_xlim(0, max(positions, default=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color=_INK, alpha=0.15)
    axes.tick_params(labelsize=8, labelcolor=_INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    svg = io.StringIO()
    # The salt names what clips the curve; pictures of one page must not clip each other.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    element = svg.getvalue()[svg.getvalue().index("<svg") :]
    return element.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")


def _means(values: list[float]) -> list[float]:
    """Of each value and its neighbours, fewer at the ends."""
    half = _window(len(values)) // 2
    return [
        sum(part) / len(part)
        for part in (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    ]


def _window(num_points: int) -> int:
    """Points of a mean: odd."""
    return num_points // _SMOOTHED // 2 * 2 + 1


def _refined(found: dict[str, Any]) -> list[int]:
    """Where a tolerance made the stream more precise, as far as that is remembered."""
    looks = (found["stream"]["drift"] or {"looks": ()})["looks"]
    return [look["position"] for look in looks if look["outcome"].startswith("refined")]
