"""`foveal bench quality`: what remembering less costs, on a text, against full attention."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.cli import sampling
from foveal.cli.given import integers, require_matplotlib, words

Some = str | None


def quality(
    model: sampling.Model = None,
    file: Annotated[
        Path | None, typer.Option(help="Text in UTF-8. Default: held-out standard library.")
    ] = None,
    part: Annotated[
        str,
        typer.Option(help="Some of context,policies,sinks,precision,recall,mass; all, or none."),
    ] = "all",
    tokens: Annotated[int, typer.Option(min=1, help="Read by each candidate.")] = 57_344,
    length: Annotated[int, typer.Option(min=2, help="Of a passage beyond the context.")] = 8192,
    policies: Annotated[Some, typer.Option(help="Such as sinks,window. Default: all.")] = None,
    windows: Annotated[Some, typer.Option(help="Tokens kept, sinks included.")] = None,
    sinks: Annotated[str, typer.Option(help="Numbers of first tokens kept.")] = "0,1,2,4,8,16",
    kv: Annotated[Some, typer.Option(help="Storage formats. Default: all.")] = None,
    distances: Annotated[
        str, typer.Option(help="Tokens after which a planted string is asked for.")
    ] = "64,128,256,384,768,1536,3072",
    facts: Annotated[int, typer.Option(min=2, help="Strings planted.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Append records to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture of each part here.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write all tables, as Markdown.")] = None,
    dtype: Annotated[str, typer.Option(help="In which the model computes.")] = "float32",
    device: sampling.Device = "cpu",
    backend: sampling.Backend = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines and nothing else.")
    ] = False,
) -> None:
    """Hold window policies, windows, sinks and cache precision against full attention.

    Bits per token, divergence of the next token's distribution, recall of planted
    strings, bytes held and time per token. Parts can be measured one by one into
    the same --out file; pictures and tables are made of all that it holds, and
    --part none only makes these.

    Example: foveal bench quality --part mass,sinks --out out/quality.jsonl --plot out
    """
    from foveal.bench.quality_parts import Settings
    from foveal.cli import bench_quality_runs as runs

    require_matplotlib(plot)
    settings = Settings(
        tokens=tokens,
        length=length,
        policies=words(policies),
        windows=integers("--windows", windows),
        sinks=integers("--sinks", sinks),
        kv=words(kv),
        distances=integers("--distances", distances),
        facts=facts,
    )
    runs.quality(
        runs.parts(words(part)),
        settings,
        runs.Subject(model=model, file=file, dtype=dtype, device=device, backend=backend),
        runs.Output(out=out, plot=plot, table=table, as_json=as_json),
    )
