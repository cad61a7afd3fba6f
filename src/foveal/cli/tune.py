"""`foveal tune`: measure the attention backends here, so that they are chosen by measurement."""

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from foveal.cli import options
from foveal.core.units import format_s

Json = dict[str, Any]


def tune(
    heads: options.Heads = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    batch: options.Batch = None,
    q_len: options.QLen = None,
    kv_len: options.KvLen = None,
    dtype: options.Dtype = None,
    causal: options.Causal = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    softcap: options.Softcap = None,
    grad: options.Grad = None,
    device: options.Device = "cpu",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose calls to measure: directory or hub name.")
    ] = None,
    flex: Annotated[
        bool, typer.Option("--flex", help="Take flex along: it compiles at every new call.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three calls, about 10 seconds.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds in all. Default: 120; with --quick or one call 10."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure every willing attention backend and remember the times.

    It measures a grid of common calls, those of a model (with --model), or the
    one that the other options describe.
    Each result is filed at once: Ctrl-C loses none. From then on these calls
    are decided by measurement.

    Example: foveal tune --heads 32 --kv-heads 8 --head-dim 128 --q-len 1 --kv-len 8192 --dtype bf16
    """
    from foveal.attention import tune as tuning
    from foveal.cli.shape import ShapeOptions

    given = ShapeOptions(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        dtype=dtype,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
        grad=grad,
    )
    if model is not None:
        calls = given.calls_of_model(model, device)
    elif given.given:
        calls = (given.call(device),)
    else:
        calls = tuning.grid(quick=quick, device=device)
    seconds = budget or (10.0 if quick or len(calls) == 1 else 120.0)
    without = {} if flex else {"flex": "compiles at every new call; --flex takes it along"}
    results = (t.to_dict() for t in tuning.tune(calls, budget_s=seconds, without=without))
    found = _with_progress(results, len(calls))
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _print(found, num_left=len(calls) - len(found))


def _with_progress(results: Iterable[Json], total: int) -> list[Json]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tuning", total=total)
        for result in results:
            found.append(result)
            progress.update(task, advance=1, description=result["workload"])
    return found


def _print(found: list[Json], num_left: int) -> None:
    console = Console(highlight=False)
    for result in found:
        console.print(f"{result['spec']}; {result['workload']}", markup=False)
        table = Table.grid(padding=(0, 2))
        for name, time in result["times"].items():
            doubt = "others kept the machine busy" if time["disturbed"] else ""
            spread = f"± {format_s(time['spread_s'] / 2)}"
            if len(time["seconds"]) == 1:
                spread = "1 sample"
            estimate = f"(estimated {format_s(time['estimate_s'])})"
            table.add_row(f"  {name}", format_s(time["median_s"]), spread, estimate, doubt)
        for name, why in result["not_measured"].items():
            table.add_row(f"  {name}", "-", "", f"not measured: {why}")
        console.print(table)
    if num_left:
        console.print(f"not reached: {num_left} of the calls; raise --budget")
