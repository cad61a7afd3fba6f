"""What the subcommands of `foveal bench` do, apart from `bench.py`, which must start fast."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from foveal.attention.catalogue import BY_NAME
from foveal.bench import attention as benchmark
from foveal.bench import grid as grids
from foveal.bench import lines, report, tables
from foveal.bench import stability as trials
from foveal.bench.finding import read_findings
from foveal.bench.record import Cell, Record, Run, read_records
from foveal.core.dtypes import parse_dtype
from foveal.core.errors import ArgumentError, ConfigError, LoadError
from foveal.hardware import calibrate as calibration
from foveal.hardware.detect import detect
from foveal.hardware.peaks import peaks

WIDTH = 110
BY_REQUEST = ("flex",)
"""Backends that compile for seconds at every new shape: they take part when asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where results go."""

    out: Path | None
    plot: Path | None
    as_json: bool

    @contextmanager
    def records(self) -> Iterator[Path]:
        """`--out`, else beside the picture, else a file for this run only."""
        if self.out is not None:
            yield self.out
        elif self.plot is not None:
            yield self.plot.with_suffix(".jsonl")
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / "records.jsonl"


def attention(
    *,
    size: str,
    factors: dict[str, tuple[Any, ...]],
    backends: tuple[str, ...],
    output: Output,
    budget_s: float | None,
    calibrate: bool,
) -> None:
    """Measure the grid, one record after the other; then show what the file holds."""
    quick = size == "quick"
    given = {name: values for name, values in factors.items() if values}
    grid = dataclasses.replace(grids.QUICK if quick else grids.DEFAULT, **given)
    cells = grids.product(grid) if size == "full" else grids.one_at_a_time(grid)
    settings = benchmark.Settings(
        backends=backends, budget_s=benchmark.QUICK_BUDGET_S if quick else benchmark.BUDGET_S
    )
    with output.records() as path:
        require_appendable(path)
        run = run_of(grid.devices[0], {"grid": size, **settings.described}, calibrate)
        _measure(cells, settings, run, path, output.as_json, budget_s)
        records = [record for record in read_records(path) if record.run == run]
        _show(records, run, output)
    wrong = [record for record in records if record.disagrees]
    for record in wrong:
        typer.echo(f"disagrees with float64: {record.backend}, {record.title}", err=True)
    if wrong:
        raise typer.Exit(1)


def stability(backends: Sequence[str], dtypes: tuple[torch.dtype, ...], as_json: bool) -> None:
    """Every backend through every trial; exits with 1 if a promise is broken."""
    found = []
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        for verdict in trials.verdicts(backends, dtypes or trials.DTYPES):
            found.append(verdict)
            progress.update(task, advance=1, description=f"{verdict.dtype}, {verdict.trial}")
            if as_json:
                print(lines.encode(verdict), flush=True)
    if not as_json:
        console = wide_console()
        for table in report.stability_tables(found):
            console.print(table)
        console.print(report.STABILITY_LEGEND, highlight=False)
    broken = [verdict for verdict in found if verdict.breaks_promise]
    for verdict in broken:
        what = f"{verdict.backend}, {verdict.dtype}, {verdict.trial}, {verdict.direction}"
        typer.echo(f"breaks its promise: {what}", err=True)
    if broken:
        raise typer.Exit(1)


def draw(file: Path, target: Path, series: str | None) -> None:
    """Draw one series of a file of records."""
    if _are_findings(file):
        from foveal.bench import pictures

        pictures.draw(read_findings(file), target, series)
        typer.echo(f"picture: {target}", err=True)
    else:
        _draw(read_records(file), target, series)


def table(file: Path) -> None:
    """Print a file of records as Markdown."""
    if _are_findings(file):
        print(tables.markdown(read_findings(file)), end="")
    else:
        print(report.markdown(read_records(file)), end="")


def _are_findings(file: Path) -> bool:
    """Whether a file holds findings, as its first line says."""
    try:
        with file.open(encoding="utf-8") as text:
            return '"subject"' in text.readline()
    except OSError as error:
        raise LoadError(f"{file}: {error.strerror}") from error


def backends(names: tuple[str, ...], flex: bool) -> tuple[str, ...]:
    """Those asked for, else all but those that take part by request only."""
    for name in names:
        if name not in BY_NAME:
            raise ArgumentError("--backend", repr(name), ", ".join(BY_NAME))
    return names or tuple(name for name in BY_NAME if flex or name not in BY_REQUEST)


def dtypes(names: tuple[str, ...]) -> tuple[torch.dtype, ...]:
    """By name."""
    return tuple(map(parse_dtype, names))


def run_of(device: str, settings: dict[str, str], calibrate: bool) -> Run:
    """A run that starts now, on this machine."""
    machine = detect()
    if calibrate and calibration.load_calibration(machine, device) is None:
        typer.echo("measuring this machine's limits: a few seconds, once", err=True)
        calibration.calibrate(machine, device)
    return Run.now(machine, peaks(machine, device), settings)


def require_appendable(path: Path, read: Callable[[Path], object] = read_records) -> None:
    """Before anything is measured, not after. Raises `LoadError` if `path` holds anything but what
    `read` reads, `ConfigError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"records cannot be written to {path}: {error.strerror}") from error
    read(path)


def _measure(
    cells: Sequence[Cell],
    settings: benchmark.Settings,
    run: Run,
    path: Path,
    as_json: bool,
    budget_s: float | None,
) -> None:
    """Append each record to the file as soon as it is there: Ctrl-C loses none."""
    start = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("", total=len(cells))
        for number, cell in enumerate(cells):
            if budget_s is not None and time.monotonic() - start > budget_s:
                left = len(cells) - number
                typer.echo(f"not reached: {left} of {len(cells)} cells; raise --budget", err=True)
                return
            progress.update(task, completed=number, description=str(cell))
            for record in benchmark.measure(cell, settings, run):
                lines.append(path, record)
                if as_json:
                    print(lines.encode(record), flush=True)


def _show(records: list[Record], run: Run, output: Output) -> None:
    if not output.as_json:
        console = wide_console()
        for found in report.rich_tables(records):
            console.print(found)
        notes = (*report.reasons(records), report.caption(run), report.LEGEND)
        console.print(*notes, sep="\n", highlight=False)
    if output.plot is not None:
        _draw(records, output.plot, None)


def _draw(records: list[Record], target: Path, series: str | None) -> None:
    from foveal.bench import plots  # matplotlib is an extra

    plots.draw(plots.pick_series(records, series), target)
    typer.echo(f"picture: {target}", err=True)


def wide_console() -> Console:
    """Stdout; where it is not a terminal, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def progress_bar() -> Progress:
    """Steps done and time taken, on stderr."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # Redirected, rich would send what is printed to stdout to stderr instead.
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
