"""`foveal stream`: a text of any length through a model, in memory of a fixed size."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.cli import sampling


def stream(
    file: Annotated[str, typer.Argument(help="Text in UTF-8; - reads standard input.")],
    model: sampling.Model = None,
    window: Annotated[
        int | None, typer.Option(help="Last tokens to keep. Default: the model's context.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens to keep. Default: as the policy says.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="What is remembered: sinks, window, dynamic or recall.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the policy, as budget=16MiB; repeatable."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Cap on cache and step, beside the weights, as 200MiB.")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Format of keys and values, as int8. Default: the model's dtype."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Nats that a --kv that rounds may lead the stream astray.")
    ] = None,
    on_drift: Annotated[
        str | None, typer.Option(help="What follows then: refine (more bits; the default) or stop.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens computed at once.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="Byte of FILE to begin at.")] = 0,
    save_state: Annotated[Path | None, typer.Option(help="Write what is remembered.")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on from such a file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Draw memory, time and loss as HTML.")] = None,
    dtype: sampling.Dtype = None,
    weights: sampling.Weights = None,
    device: sampling.Device = "cpu",
    backend: sampling.Backend = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read a text without end, and show how well the model foresees it.

    Ctrl-C stops after the block under way and saves; the message says how to go on.

    Example: foveal stream book.txt --window 508 --sinks 4 --memory 200MiB --save-state book.state
    """
    from foveal.cli import opening, reading
    from foveal.cli.answers import NOTES, loading
    from foveal.engine.llm import LLM

    options: dict[str, Any] = {"window": window, "sinks": sinks, "policy": policy, "set": settings}
    options |= {"memory": memory, "kv": kv, "chunk": chunk}
    options |= {"tolerance": tolerance, "on_drift": on_drift}
    opening.check_target("save-state", save_state)
    opening.check_report(report)
    with opening.open_source(file, offset) as source:
        with loading(model):
            llm = LLM(model, dtype=dtype, weights=weights, device=device, backend=backend)
            session = opening.open_session(llm, options, load_state)
        NOTES.print(reading.heading(session), style="dim", markup=False)
        result = reading.read(session, llm, source, offset=offset, limit=limit, console=NOTES)
    document = reading.document(session, llm, result, file)
    failures = reading.write(session, document, save_state, report)
    session.close()
    print(json.dumps(document) if as_json else "\n".join(reading.lines(document)))
    for failure in (result.failure, *failures):
        if failure is not None:
            raise failure
    if result.stopped:
        if save_state is not None and file != "-":
            NOTES.print(
                f"stopped and saved; go on with --load-state {save_state} --offset "
                f"{result.next_byte}",
                markup=False,
            )
        raise typer.Exit(130)
