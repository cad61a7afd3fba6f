"""What `foveal bench quality` does, apart from `bench_quality.py`, which must start fast."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.progress import Progress

from foveal.bench import lines, tables
from foveal.bench.finding import Finding, read_findings
from foveal.bench.quality_parts import PARTS, Bench, Settings
from foveal.bench.quality_text import source_of
from foveal.cli.answers import loading
from foveal.cli.bench_runs import progress_bar, require_appendable, run_of, wide_console
from foveal.core.errors import ArgumentError
from foveal.core.files import write_text
from foveal.engine.llm import LLM
from foveal.models.fingerprint import fingerprint

LEGEND = (
    "tokens: kept of the stream, sinks included. text bits: per token, mean. ±: standard error, of "
    "blocks of 256 tokens. full: attention to all that came before; recompute: the last tokens "
    "computed afresh for every eighth of a window. held: keys and values at the end of a passage. "
    "per token: time, median over steps. more: bits per token beyond the reference's, mean. KL: "
    "divergence of the next token's distribution from the reference's, bits. top-1: share of "
    "tokens at which both hold the same one for the likeliest."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured."""

    model: str | None
    file: Path | None
    dtype: str
    device: str
    backend: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where results go."""

    out: Path | None
    plot: Path | None
    table: Path | None
    as_json: bool

    @contextmanager
    def records(self) -> Iterator[Path]:
        """`--out`, else a file for this run only."""
        if self.out is not None:
            yield self.out
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / "quality.jsonl"


def parts(names: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, in the order of `PARTS`. Raises `ArgumentError` for an unknown one."""
    if list(names) in (["all"], ["none"]):
        return PARTS if list(names) == ["all"] else ()
    for name in names:
        if name not in PARTS:
            raise ArgumentError("--part", repr(name), f"{', '.join(PARTS)}; all, or none")
    return tuple(part for part in PARTS if part in names)


def quality(chosen: Sequence[str], settings: Settings, subject: Subject, output: Output) -> None:
    """Measure the parts one after the other; then show what the file holds."""
    with output.records() as path:
        require_appendable(path, read_findings)
        if chosen:
            _measure(chosen, settings, subject, path, output.as_json)
        _show(read_findings(path), output)


def _measure(
    chosen: Sequence[str], settings: Settings, subject: Subject, path: Path, as_json: bool
) -> None:
    with loading(subject.model):
        llm = LLM(
            subject.model, dtype=subject.dtype, device=subject.device, backend=subject.backend
        )
    source = source_of(llm.tokenizer, subject.file)
    facts = {
        "model": fingerprint(llm.model)[:12],
        "text": source.digest[:12],
        "dtype": subject.dtype,
        "backend": subject.backend,
        "tokens": str(settings.tokens),
        "length": str(settings.length),
    }
    run = run_of(subject.device, facts, calibrate=False)
    with progress_bar() as bar:
        bench = Bench(llm=llm, source=source, settings=settings, run=run, progress=_task(bar))
        for part in chosen:
            for finding in bench.measure(part):
                lines.append(path, finding)
                if as_json:
                    print(lines.encode(finding), flush=True)


def _task(bar: Progress) -> Callable[[str, int], Callable[[], object]]:
    def begin(title: str, total: int) -> Callable[[], object]:
        for task in bar.task_ids:
            bar.remove_task(task)
        task = bar.add_task(title, total=total)
        return lambda: bar.advance(task)

    return begin


def _show(findings: list[Finding], output: Output) -> None:
    if not output.as_json:
        console = wide_console()
        for title, found in tables.rich_tables(findings):
            console.print(title, style="italic", highlight=False, markup=False)
            console.print(found)
        console.print(LEGEND, highlight=False)
    if output.table is not None:
        text = f"# Quality has a price tag\n\n{LEGEND}\n\n{tables.markdown(findings)}"
        write_text(output.table, text)
        typer.echo(f"tables: {output.table}", err=True)
    if output.plot is not None:
        _draw(findings, output.plot)


def _draw(findings: list[Finding], folder: Path) -> None:
    from foveal.bench import quality_plots  # matplotlib is an extra

    for picture in quality_plots.draw(findings, folder):
        typer.echo(f"picture: {picture}", err=True)
