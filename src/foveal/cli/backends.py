"""`foveal backends`: what each attention backend can do, and who would compute a given call."""

import json
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from foveal.cli import options
from foveal.core.units import parse_bytes


def backends(
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
    backend: Annotated[str, typer.Option(help="Ask for one by name.")] = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(help="Most that temporaries may take, such as 200MiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what each attention backend can do, or who would compute a given call and why.

    What they can do is found by asking them. Any option that describes a call
    asks who would compute that call.

    Example: foveal backends --heads 32 --kv-heads 8 --head-dim 128 --q-len 1 --kv-len 8192
    """
    from foveal.attention.capabilities import capabilities
    from foveal.attention.select import AUTO, choose
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
    budget = None if memory_budget is None else parse_bytes(memory_budget, "--memory-budget")
    choice = None
    if given.given or budget is not None or backend != AUTO:
        choice = choose(*given.call(device), backend=backend, memory_budget=budget)
    if as_json:
        able = {name: _yes_or_why(answers) for name, answers in capabilities(device).items()}
        document = {"capabilities": able, "choice": choice and choice.to_dict()}
        print(json.dumps(document, indent=1, ensure_ascii=False))
    elif choice is not None:
        Console(highlight=False, markup=False).print(str(choice))
    else:
        _print_table(capabilities(device), f"Attention backends on this machine's {device}")


def _yes_or_why(answers: Mapping[str, tuple[str, ...]]) -> dict[str, bool | list[str]]:
    return {name: list(refusals) or True for name, refusals in answers.items()}


def _print_table(able: Mapping[str, Mapping[str, tuple[str, ...]]], title: str) -> None:
    """Capabilities down, backends across; below, why each no is a no."""
    table = Table("", *able, title=title)
    for name in next(iter(able.values())):
        refused = [answers[name] for answers in able.values()]
        table.add_row(name, *("[red]no[/]" if why else "yes" for why in refused))
    console = Console()
    console.print(table)
    for backend, answers in able.items():
        for name, refusals in answers.items():
            if refusals:
                console.print(f"[bold]{backend}[/]: {name}: {'; '.join(refusals)}", highlight=False)
    console.print("Describe a call (see --help) to see who would compute it and why.")
