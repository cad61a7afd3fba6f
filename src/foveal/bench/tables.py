"""Findings as tables: for the terminal (rich) and for documents (Markdown). One row a finding.

A table is the findings of one part with one title; its columns are whatever these have. The end of
a value's name says its unit and so how it is written.
"""

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.table import Table

from foveal.bench.finding import Finding, newest
from foveal.bench.report import LEFT, caption, line
from foveal.core.units import format_bytes, format_count, format_s

Row = list[str]
WIDE = 10
"""Columns from which on a table is laid on its side: a finding a column."""

UNITS: dict[str, Callable[[float], str]] = {
    "_per_s": lambda x: f"{format_count(x)}/s",
    "_s": format_s,
    "_bytes": format_bytes,
    "_share": lambda x: f"{x:.1%}",
    "_ratio": lambda x: f"{x:.3f}×",
    "_bits": lambda x: f"{x:.3f}",
    "_error": lambda x: f"{x:.1e}",
}
"""How a value is written, by the end of its name; the first that fits. Others are counts."""


def by_table(findings: Iterable[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """The newest findings of each part and title."""
    tables: dict[tuple[str, str], list[Finding]] = {}
    for finding in newest(findings):
        tables.setdefault((finding.part, finding.title), []).append(finding)
    return tables


def rich_tables(findings: Iterable[Finding]) -> list[tuple[str, Table]]:
    """The title and the table of each part and title."""
    tables = []
    for (_, title), members in by_table(findings).items():
        (names, *body), num_names = grid(members)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **LEFT)
        for place, name in enumerate(names):
            table.add_column(name, justify="left" if place < num_names else "right")
        for row in body:
            table.add_row(*row)
        tables.append((title, table))
    return tables


def markdown(findings: Sequence[Finding]) -> str:
    """All tables as Markdown, each with its checks and, below, the runs they were taken in."""
    if not findings:
        return "No records.\n"
    parts = []
    for (part, title), members in by_table(findings).items():
        (names, *body), num_names = grid(members)
        aligned = ["---" if place < num_names else "---:" for place in range(len(names))]
        parts += [f"### {part}: {title}", "\n".join(map(line, [names, aligned, *body]))]
        parts += ["\n".join(f"- {check}" for check in checks(members))] if checks(members) else []
    runs = {f.run.date: caption(f.run) for f in newest(findings)}
    return "\n\n".join([*parts, *runs.values()]) + "\n"


def grid(members: Sequence[Finding]) -> tuple[list[Row], int]:
    """A table, its header first, and how many of its columns are names. One with many columns
    stands on its side."""
    names, figures = _keys(members, "subject"), _keys(members, "values")
    rows = [[*names, *map(_words, figures)]]
    for finding in members:
        values = (written(name, finding.values.get(name)) for name in figures)
        rows.append([*(finding.subject.get(name, "") for name in names), *values])
    if len(rows[0]) < WIDE or len(rows) > WIDE:
        return rows, len(names)
    return [list(column) for column in zip(*rows, strict=True)], 1


def checks(members: Iterable[Finding]) -> list[str]:
    """What was promised, and whether it holds, a line each."""
    return [f"{finding.label}: {check}" for finding in members for check in finding.checks]


def written(name: str, value: float | None) -> str:
    """A value as its name demands."""
    if value is None:
        return ""
    for end, write in UNITS.items():
        if name.endswith(end):
            return write(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _words(name: str) -> str:
    """`median_append_s` -> `median append`."""
    for end in UNITS:
        if name.endswith(end):
            shown = (
                name if end in ("_per_s", "_ratio", "_bits", "_error") else name.removesuffix(end)
            )
            return shown.replace("_", " ")
    return name.replace("_", " ")


def _keys(members: Sequence[Finding], field: str) -> list[str]:
    """Every name in a field of the members, in order."""
    return list(dict.fromkeys(key for one in members for key in getattr(one, field)))
