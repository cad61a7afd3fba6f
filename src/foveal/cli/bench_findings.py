"""What the subcommands of `foveal bench` share whose records are findings: each is kept as soon as
it is there, then all are shown with what was promised, and drawn."""

from collections.abc import Iterable
from pathlib import Path

import typer

from foveal.bench import lines, tables
from foveal.bench.finding import Finding, read_findings
from foveal.bench.report import caption
from foveal.cli.bench_runs import Output, require_appendable, wide_console


def collect(findings: Iterable[Finding], output: Output) -> None:
    """Measure, keep and show. Ctrl-C loses the one under way only. Exits with 1 if a promise is
    not kept."""
    with output.records() as path:
        require_appendable(path, read_findings)
        done = []
        for finding in findings:
            lines.append(path, finding)
            if output.as_json:
                print(lines.encode(finding), flush=True)
            done.append(finding)
    if not output.as_json:
        _show(done)
    if output.plot is not None:
        draw(done, output.plot, None)
    broken = [line for line in tables.checks(done) if "DOES NOT HOLD" in line]
    for line in broken:
        typer.echo(line, err=True)
    if broken:
        raise typer.Exit(1)


def draw(findings: list[Finding], target: Path, words: str | None) -> None:
    """Draw one table of findings."""
    from foveal.bench import pictures  # matplotlib is an extra

    pictures.draw(findings, target, words)
    typer.echo(f"picture: {target}", err=True)


def _show(findings: list[Finding]) -> None:
    console = wide_console()
    for title, table in tables.rich_tables(findings):
        console.print(title, style="italic", highlight=False, markup=False)
        console.print(table)
    promised = tables.checks(findings)
    console.print(*promised, sep="\n", highlight=False, markup=False)
    for run in {f.run.date: f.run for f in findings}.values():
        console.print(caption(run), highlight=False, markup=False)
