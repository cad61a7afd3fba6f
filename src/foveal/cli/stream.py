"""`foveal stream`: a text of any length through a model, in memory of a fixed size."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveal.cli import sampling
from foveal.core.errors import ArgumentError

if TYPE_CHECKING:
    from foveal.engine.llm import LLM
    from foveal.engine.session import Session


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
        str | None, typer.Option(help="What is remembered: sinks (and window), or window.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Cap on cache and step, beside the weights, as 200MiB.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Format of keys and values. Default: the model's dtype.")
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
    from foveal.cli import reading
    from foveal.cli.answers import NOTES, loading
    from foveal.engine.llm import LLM

    settings = {"window": window, "sinks": sinks, "policy": policy}
    settings |= {"memory": memory, "kv": kv, "chunk": chunk}
    if report is not None:
        reading.check_report(report)
    with open_source(file, offset) as source:
        with loading(model):
            llm = LLM(model, dtype=dtype, weights=weights, device=device, backend=backend)
            session = open_session(llm, settings, load_state)
        NOTES.print(reading.heading(session), style="dim", markup=False)
        result = reading.read(session, llm, source, offset=offset, limit=limit, console=NOTES)
    if save_state is not None:
        session.save(save_state)
    document = reading.document(session, llm, result, file)
    if report is not None:
        reading.write_report(report, document)
    if result.failure is not None:
        raise result.failure
    if as_json:
        print(json.dumps(document))
    else:
        print("\n".join(reading.lines(document)))
    if result.stopped:
        if save_state is not None and file != "-":
            NOTES.print(
                f"stopped and saved; go on with --load-state {save_state} --offset "
                f"{result.next_byte}",
                markup=False,
            )
        raise typer.Exit(130)


def open_source(file: str, offset: int) -> Any:
    """The file, unbuffered, at its offset. Raises `ArgumentError`."""
    if file == "-":
        if offset:
            raise ArgumentError("offset", offset, "0 for standard input, which has no places")
        return os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        source = Path(file).open("rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ArgumentError("FILE", repr(file), f"a file that can be read ({error})") from error
    if offset:
        source.seek(offset)
    return source


def open_session(llm: "LLM", settings: dict[str, Any], load_state: Path | None) -> "Session":
    """A fresh session, or the saved one, whose settings are its own."""
    from foveal.core.units import parse_bytes
    from foveal.engine.session import Session

    given = {name: value for name, value in settings.items() if value is not None}
    if load_state is not None:
        if given:
            accepted = f"no --{next(iter(given))}: the saved state has its own"
            raise ArgumentError("load-state", ", ".join(f"--{name}" for name in given), accepted)
        return Session.load(load_state, llm)
    if "memory" in given:
        given["memory"] = parse_bytes(given["memory"], "memory")
    return Session(llm, **given)
