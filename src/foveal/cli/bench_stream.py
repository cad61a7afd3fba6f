"""`foveal bench stream` and `foveal bench bursts`: a text without end, and tokens by the clock."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveal.cli import sampling
from foveal.cli.given import require_matplotlib, words

if TYPE_CHECKING:
    from foveal.bench.finding import Finding
    from foveal.bench.stream import Text
    from foveal.engine.bursts import Burst
    from foveal.engine.llm import LLM

File = Annotated[
    Path | None, typer.Option(help="Text in UTF-8. Default: the standard library's source.")
]
Window = Annotated[int | None, typer.Option(help="Last tokens kept. Default: what fits.")]
Sinks = Annotated[int | None, typer.Option(help="First tokens kept.")]
Chunk = Annotated[int | None, typer.Option(help="Tokens computed at once.")]
Out = Annotated[Path | None, typer.Option(help="Append records to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture (png, svg or pdf).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines and nothing else.")]


def stream(
    tokens: Annotated[int, typer.Option(help="Tokens of each stream.")] = 1_000_000,
    file: File = None,
    model: sampling.Model = None,
    policy: Annotated[str, typer.Option(help="Some of the policies, or all.")] = "sinks",
    kv: Annotated[str, typer.Option(help="Formats of keys and values, or model.")] = "model",
    window: Window = None,
    sinks: Sinks = None,
    chunk: Chunk = None,
    out: Out = Path("out/stream.jsonl"),
    plot: Plot = None,
    dtype: sampling.Dtype = None,
    backend: sampling.Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Stream a long text, and check that memory and time per token stay.

    Every policy is run with every format, one after the other, a record each.
    Exits with 1 if memory grows by more than 1 % from a tenth of the stream on,
    if the last tenth is 5 % slower than the second, or if p99 is above 1.5 times
    p50, of steps that other processes did not disturb. 1,000,000 tokens of the
    bundled model take about two minutes on two quiet cores.

    Example: foveal bench stream --policy sinks,window --kv model,int8 --plot out/stream.png
    """
    require_matplotlib(plot)
    from foveal.bench import stream as benchmark
    from foveal.cli.bench_findings import collect
    from foveal.cli.bench_runs import Output, progress_bar, run_of
    from foveal.engine.llm import LLM

    shared = {"window": window, "sinks": sinks, "chunk": chunk}
    settings = [
        {**shared, "policy": name, "kv": None if format == "model" else format}
        for name in _policies(policy)
        for format in words(kv)
    ]
    text, llm = benchmark.Text(file), LLM(model, dtype=dtype, backend=backend)
    run = run_of("cpu", {"tokens": f"{tokens:,}", "model": model or "bundled"}, False)

    def findings() -> Iterator["Finding"]:
        with progress_bar() as progress:
            for each in settings:
                task = progress.add_task(f"{each['policy']}, {each['kv'] or llm.model.dtype}")
                progress.update(task, total=tokens)
                yield benchmark.measure(
                    llm,
                    text,
                    tokens,
                    {name: value for name, value in each.items() if value is not None},
                    run,
                    lambda done: progress.update(task, completed=done),  # noqa: B023
                )

    collect(findings(), Output(out=out, plot=plot, as_json=as_json))


def bursts(
    rate: Annotated[float, typer.Option(help="Tokens that arrive in a second.")] = 2000,
    burst: Annotated[int, typer.Option(help="Tokens that arrive together.")] = 32,
    seconds: Annotated[float, typer.Option(help="For how long.")] = 20,
    together: Annotated[
        int | None, typer.Option(help="Tokens taken in together at most. Default: a step.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Tokens that may wait.")] = 4096,
    overflow: Annotated[
        str, typer.Option(help="With a full queue: wait, drop-oldest or drop-newest.")
    ] = "wait",
    file: Annotated[
        str | None, typer.Option(help="Text; - takes lines as they come on standard input.")
    ] = None,
    model: sampling.Model = None,
    policy: Annotated[str, typer.Option(help="What is remembered.")] = "sinks",
    kv: Annotated[str | None, typer.Option(help="Format of keys and values.")] = None,
    window: Window = None,
    sinks: Sinks = None,
    chunk: Chunk = None,
    out: Out = Path("out/bursts.jsonl"),
    plot: Plot = None,
    dtype: sampling.Dtype = None,
    backend: sampling.Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Feed a session in real time: latency of each burst from arrival to logits.

    What has queued up while the session was busy is taken in together. When the
    session falls behind for good, the queue fills: then the source waits (and
    latency grows without end), or bursts are dropped, as asked.

    Example: foveal bench bursts --rate 2000 --burst 32 --seconds 20 --plot out/bursts.png
    """
    require_matplotlib(plot)
    from foveal.bench import bursts as benchmark
    from foveal.cli.bench_findings import collect
    from foveal.cli.bench_runs import Output, run_of
    from foveal.engine.bursts import Terms
    from foveal.engine.llm import LLM
    from foveal.engine.session import Session

    arrivals = benchmark.Arrivals(burst=burst, rate=rate, seconds=seconds)
    terms = Terms(coalesce=together, capacity=queue, overflow=overflow)  # type: ignore[arg-type]
    llm = LLM(model, dtype=dtype, backend=backend)
    session = Session(llm, policy=policy, kv=kv, window=window, sinks=sinks, chunk=chunk)
    run = run_of("cpu", {"model": model or "bundled"}, False)
    title = "lines of standard input, as they come" if file == "-" else str(arrivals)

    def findings() -> Iterator["Finding"]:
        source = _standard_input(llm) if file == "-" else arrivals.source(llm, _text(file))
        yield benchmark.measure(session, source, terms, title, run)
        session.close()

    collect(findings(), Output(out=out, plot=plot, as_json=as_json))


def _policies(text: str) -> tuple[str, ...]:
    """Names, all known before anything is measured."""
    from foveal.engine.policies.catalogue import POLICIES, find_policy

    names = tuple(p.name for p in POLICIES) if text == "all" else words(text)
    return tuple(find_policy(name).name for name in names)


def _text(file: str | None) -> "Text":
    from foveal.bench.stream import Text

    return Text(None if file is None else Path(file))


def _standard_input(llm: "LLM") -> "Iterator[Burst]":
    """Whatever has come since the last read is a burst."""
    import os
    import sys

    from foveal.engine.bursts import as_read
    from foveal.text.blocks import read_blocks

    source: Any = os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    texts = (block.text for block in read_blocks(source, lambda: False))
    return as_read(texts, lambda text: llm.tokenizer.encode(text, special=False))
