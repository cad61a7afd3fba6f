"""`foveal bench kv`: what keeping the past costs, in time, in bytes and in exactness."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.cli import sampling
from foveal.cli.bench_stream import AsJson, Plot
from foveal.cli.given import integers, require_matplotlib, words
from foveal.core.errors import ArgumentError

if TYPE_CHECKING:
    from foveal.bench.finding import Finding
    from foveal.bench.record import Run

PARTS = ("append", "arena", "tiers", "formats", "memory")


def kv(
    part: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}, or all.")] = "all",
    capacity: Annotated[int, typer.Option(help="append: tokens that the caches hold.")] = 65_536,
    samples: Annotated[int, typer.Option(min=1, help="append, tiers: of each candidate.")] = 40,
    tile_tokens: Annotated[int, typer.Option(min=1, help="arena: tokens attended to.")] = 8192,
    tokens: Annotated[
        int, typer.Option(help="tiers: tokens kept, an eighth of them hot.")
    ] = 16_384,
    model: sampling.Model = None,
    lengths: Annotated[
        str, typer.Option(help="memory: tokens of the text.")
    ] = "1024,4096,16384,65536,262144",
    cap: Annotated[str, typer.Option(help="memory: bytes appended for a measurement.")] = "8GiB",
    out: Annotated[Path | None, typer.Option(help="Append records here.")] = Path("out/kv.jsonl"),
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure appends, the scratch arena, tiers, storage formats, and memory over length.

    append: the time of one token by how full the memory is. arena: attention over
    pages with scratch memory and without. tiers: decoding with eight times more
    kept than is hot. formats: bytes, and the error of attention on the model's own
    keys. memory: a whole text against a stream, each measurement in a process of
    its own. Exits with 1 if a promised figure is not reached.

    Example: foveal bench kv --part formats,arena --out out/kv.jsonl
    """
    require_matplotlib(plot)
    from foveal.cli.bench_findings import collect
    from foveal.cli.bench_runs import Output, progress_bar, run_of
    from foveal.core.units import parse_bytes

    asked = PARTS if part == "all" else words(part)
    for name in asked:
        if name not in PARTS:
            raise ArgumentError("part", repr(name), f"{', '.join(PARTS)}, or all")
    sizes = _Sizes(
        capacity=capacity,
        samples=samples,
        tile_tokens=tile_tokens,
        tokens=tokens,
        model=model,
        lengths=integers("lengths", lengths),
        cap_bytes=parse_bytes(cap, "cap"),
    )
    run = run_of("cpu", {}, False)

    def findings() -> Iterator["Finding"]:
        with progress_bar() as progress:
            task = progress.add_task("", total=None)
            for name in asked:
                progress.update(task, description=name)
                for finding in _PARTS[name](sizes, run):
                    progress.update(task, advance=1, description=f"{name}: {finding.label}")
                    yield finding

    collect(findings(), Output(out=out, plot=plot, as_json=as_json))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """How much each part does; see the options."""

    capacity: int
    samples: int
    tile_tokens: int
    tokens: int
    model: str | None
    lengths: tuple[int, ...]
    cap_bytes: int


def _append(sizes: _Sizes, run: "Run") -> Iterator["Finding"]:
    from foveal.bench.kv_append import measure

    return measure(sizes.capacity, sizes.samples, run)


def _arena(sizes: _Sizes, run: "Run") -> Iterator["Finding"]:
    from foveal.bench.kv_arena import BUDGET_S, measure

    return measure(sizes.tile_tokens, BUDGET_S, run)


def _tiers(sizes: _Sizes, run: "Run") -> Iterator["Finding"]:
    from foveal.bench.kv_tiers import measure

    return measure(sizes.tokens, sizes.samples, run)


def _formats(sizes: _Sizes, run: "Run") -> Iterator["Finding"]:
    from foveal.bench.kv_formats import measure
    from foveal.bench.stream import Text
    from foveal.engine.llm import LLM

    llm = LLM(sizes.model, dtype="float32")  # what was never stored is exact then
    return measure(llm, next(Text().chunks(llm, llm.context, llm.context)), run)


def _memory(sizes: _Sizes, run: "Run") -> Iterator["Finding"]:
    from foveal.bench.kv_memory import measure

    return measure(sizes.lengths, sizes.cap_bytes, run)


_PARTS = {
    "append": _append,
    "arena": _arena,
    "tiers": _tiers,
    "formats": _formats,
    "memory": _memory,
}
