"""`foveal bench weights`: what storing weights in fewer bits takes, and what it costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.cli import sampling
from foveal.cli.bench_stream import AsJson, Out, Plot
from foveal.cli.given import require_matplotlib, words

if TYPE_CHECKING:
    from foveal.bench.finding import Finding


def weights(
    formats: Annotated[
        str, typer.Option(help="Formats, such as bf16,int8-64.")
    ] = "bf16,f16,int8,int8-32,int4,int4-64",
    model: sampling.Model = None,
    file: Annotated[
        Path | None, typer.Option(help="Text in UTF-8. Default: held-out standard library.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Read with each format.")] = 16_384,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Hold narrow weights against float32 weights: bytes, exactness, speed.

    Bits per token of a text, divergence of the next token's distribution from
    float32's, the share of tokens on whose likeliest successor both agree, the
    model's bytes, and tokens decoded per second by one sequence alone.

    Example: foveal bench weights --formats bf16,int8,int4
    """
    require_matplotlib(plot)
    from foveal.bench import weights as benchmark
    from foveal.bench.quality_text import source_of
    from foveal.cli.bench_findings import collect
    from foveal.cli.bench_runs import Output, progress_bar, run_of
    from foveal.kernels.portable.panels import parse_weights
    from foveal.models.bundled import bundled_model
    from foveal.models.hub import locate
    from foveal.models.load import load_config
    from foveal.text.tokenizer import load_tokenizer

    names = [parse_weights(name).name for name in words(formats)]
    directory = bundled_model() if model is None else locate(model)
    source = source_of(load_tokenizer(directory), file)
    length = min(load_config(directory).context, tokens, 2048)
    passages = source.passages(length, tokens)
    settings = {"tokens": f"{tokens:,}", "text": source.name, "model": model or "bundled"}
    run = run_of("cpu", settings, False)

    def findings() -> Iterator["Finding"]:
        with progress_bar() as progress:
            task = progress.add_task("", total=len(names) + 2)
            yield from benchmark.measure(
                directory,
                names,
                passages,
                run,
                lambda name: progress.update(task, advance=1, description=name),
            )

    collect(findings(), Output(out=out, plot=plot, as_json=as_json))
