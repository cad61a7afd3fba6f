"""`foveal bench`: measure, hold against float64, keep every sample, and show."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.cli.bench_kv import kv
from foveal.cli.bench_quality import quality
from foveal.cli.bench_stream import bursts, stream
from foveal.cli.bench_weights import weights
from foveal.cli.given import integers, require_matplotlib, words
from foveal.core.errors import ArgumentError

bench = typer.Typer(
    name="bench",
    help="Measure, hold against float64, keep every sample, and show.",
    no_args_is_help=True,
)

bench.command()(quality)
bench.command()(stream)
bench.command()(bursts)
bench.command()(kv)
bench.command()(weights)

Some = str | None
Backends = Annotated[Some, typer.Option("--backend", help="Only these, such as flash,fused.")]
Flex = Annotated[bool, typer.Option("--flex", help="Take flex along: it compiles, slowly.")]
Dtypes = Annotated[Some, typer.Option("--dtype", help="Such as float32,bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines and nothing else.")]
File = Annotated[Path, typer.Argument(help="Records, as --out wrote them.")]


@bench.command()
def attention(
    quick: Annotated[bool, typer.Option("--quick", help="One curve, under a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All combinations: over an hour.")] = False,
    lengths: Annotated[Some, typer.Option(help="Keys, such as 128,1024.")] = None,
    heads: Annotated[Some, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[Some, typer.Option(help="Key/value heads.")] = None,
    head_dim: Annotated[Some, typer.Option(help="Sizes of a head.")] = None,
    mask: Annotated[Some, typer.Option(help="Some of causal,full,window.")] = None,
    phase: Annotated[Some, typer.Option(help="prefill, decode or both.")] = None,
    dtype: Dtypes = None,
    backend: Backends = None,
    flex: Flex = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[float | None, typer.Option(help="Start no cell after so many s.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append records to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the first curve; keeps the records beside it.")
    ] = None,
    as_json: AsJson = False,
    calibrate: Annotated[
        bool, typer.Option(help="Measure the machine's limits if they are not known.")
    ] = True,
) -> None:
    """Measure every willing attention backend on a grid.

    Backends are timed in turn, their memory is measured and their results are
    held against float64. By default one factor at a time is varied around a
    base; a list of values replaces that factor's. Exits with 1 if a result
    disagrees.

    Example: foveal bench attention --quick --plot out/attention.png
    """
    from foveal.cli import bench_runs as runs

    if quick and full:
        raise ArgumentError("--quick", "--full as well", "one of them")
    require_matplotlib(plot)
    runs.attention(
        size="quick" if quick else "full" if full else "default",
        factors={
            "lengths": integers("--lengths", lengths),
            "heads": integers("--heads", heads),
            "kv_heads": integers("--kv-heads", kv_heads),
            "head_dims": integers("--head-dim", head_dim),
            "masks": words(mask),
            "phases": words(phase),
            "dtypes": runs.dtypes(words(dtype)),
            "devices": (device,),
        },
        backends=runs.backends(words(backend), flex),
        output=runs.Output(out=out, plot=plot, as_json=as_json),
        budget_s=budget,
        calibrate=calibrate,
    )


@bench.command()
def stability(
    dtype: Dtypes = None, backend: Backends = None, flex: Flex = False, as_json: AsJson = False
) -> None:
    """Show every backend's error against float64 under inputs that break formulas.

    Beside it stands the error of plain PyTorch operators in the same
    precision. Exits with 1 if one of our own backends is worse than it
    promises; fused and flex promise nothing.

    Example: foveal bench stability --dtype bfloat16
    """
    from foveal.cli import bench_runs as runs

    runs.stability(runs.backends(words(backend), flex), runs.dtypes(words(dtype)), as_json)


@bench.command()
def plot(
    file: File,
    out: Annotated[Path, typer.Option("-o", "--out", help="png, svg or pdf.")],
    series: Annotated[Some, typer.Option(help="Part of the name of the curve wanted.")] = None,
) -> None:
    """Draw one curve or table of a file of records.

    Without --series the first one; `foveal bench table` shows their names. Of
    attention: time, memory, speed-up and memory saved.

    Example: foveal bench plot docs/results/attention.jsonl -o out/window.png --series "window 256"
    """
    from foveal.cli import bench_runs as runs

    require_matplotlib(out)
    runs.draw(file, out, series)


@bench.command()
def table(file: File) -> None:
    """Print a file of records as Markdown.

    Example: foveal bench table docs/results/attention.jsonl
    """
    from foveal.cli import bench_runs as runs

    runs.table(file)
