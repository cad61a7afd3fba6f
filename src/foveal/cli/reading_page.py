"""The report of `foveal stream` as one HTML page: loss, time and memory over position, drawn from
the run's points and from nothing else. The picture is SVG within the page."""

import io
from html import escape
from typing import Any

from matplotlib.figure import Figure

from foveal.core.units import format_bytes

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>foveal stream: {title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
h1 {{ font-size: 1.3rem }} svg {{ width: 100%; height: auto }} li {{ margin: .2rem 0 }}
</style></head><body>
<h1>{title}</h1>
<p>{settings}</p>
<ul>{facts}</ul>
{picture}
</body></html>
"""


def page(found: dict[str, Any], lines: list[str]) -> str:
    """The page of one run, from its document and the lines that sum it up."""
    config = found["config"]
    settings = (
        f"model {found['model']}; policy {config['policy']['name']}: window {config['window']}, "
        f"sinks {config['sinks']}, {config['kv']}; steps of {config['chunk']} tokens"
    )
    if config["memory"] is not None:
        settings += f"; cap {format_bytes(config['memory'])}"
    return _PAGE.format(
        title=escape(found["file"]),
        settings=escape(settings),
        facts="".join(f"<li>{escape(line)}</li>" for line in lines),
        picture=_draw(found),
    )


def _draw(found: dict[str, Any]) -> str:
    """Three curves over position, as an SVG element."""
    points, kept = found["curve"], found["config"]["window"] + found["config"]["sinks"]
    predicted = [p for p in points if p["num_predicted"]]
    panels = (
        ("bits per token", predicted, [p["bits"] / p["num_predicted"] for p in predicted]),
        ("ms per token", points, [1e3 * p["seconds"] / p["tokens"] for p in points]),
        ("resident memory, MiB", points, [p["resident_bytes"] / 2**20 for p in points]),
    )
    figure = Figure(figsize=(9, 8), layout="constrained")
    for axes, (name, rows, values) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        axes.plot([p["position"] for p in rows], values, linewidth=1)
        axes.axvline(kept, color="grey", linestyle=":", linewidth=1)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.1 * max(values, default=1))
        axes.grid(alpha=0.3)
    axes.set_xlabel("position in tokens (dotted: the first token is forgotten)")
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]
