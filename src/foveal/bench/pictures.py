"""Which picture shows which part of the findings."""

from collections.abc import Callable, Sequence
from pathlib import Path

from foveal.bench.finding import Finding
from foveal.bench.kv_plots import draw_append, draw_formats, draw_memory, draw_tiers
from foveal.bench.stream_plots import draw_bursts, draw_stream
from foveal.bench.tables import by_table
from foveal.core.errors import ArgumentError

Draw = Callable[[Sequence[Finding], Path], None]

PICTURES: dict[str, Draw] = {
    "stream": draw_stream,
    "bursts": draw_bursts,
    "append": draw_append,
    "tiers": draw_tiers,
    "formats": draw_formats,
    "memory": draw_memory,
}
"""By part."""


def draw(findings: Sequence[Finding], target: Path, words: str | None = None) -> None:
    """Draw the first table whose part or title contains `words` (None: any) and that has a
    picture. Raises `ArgumentError` if there is none, listing what there is."""
    drawable = {
        f"{part}: {title}": (part, members)
        for (part, title), members in by_table(findings).items()
        if part in PICTURES
    }
    for name, (part, members) in drawable.items():
        if words is None or words in name:
            PICTURES[part](members, target)
            return
    accepted = "part of one of: " + "; ".join(drawable) if drawable else "a file with pictures"
    raise ArgumentError("series", repr(words), accepted)
