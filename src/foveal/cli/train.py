"""`foveal train`: text to weights, from the terminal. The work is in `training`."""

import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from foveal.core.errors import ArgumentError
from foveal.core.units import format_bytes


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    recipe: Annotated[
        str, typer.Option(help="TOML file, or 'bundled': how the model in the package was made.")
    ] = "bundled",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or folder; repeatable. Default: the Python standard library."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Minutes; the schedule is fitted to them. 0: no limit.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per batch.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the order.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads. Default: PyTorch's.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model from scratch and write it as a Hugging Face directory, OUT/model.

    Ctrl-C stops after the current step and saves; --resume goes on from there.

    Example: foveal train --out run --data notes/ --steps 500
    """
    import torch

    from foveal.core.signals import interruptible
    from foveal.training.config import Recipe
    from foveal.training.monitor import Monitor
    from foveal.training.run import finish_run, resume_run, start_run

    length = {
        "run_steps": steps,
        "run_time_limit_s": None if time_limit is None else time_limit * 60,
    }
    changes = {
        "run_batch": batch,
        "data_context": context,
        "optimiser_lr": lr,
        "run_seed": seed,
    }
    if threads is not None:
        torch.set_num_threads(threads)
    if resume:
        if data or recipe != "bundled" or any(value is not None for value in changes.values()):
            accepted = "only --out, --steps, --time-limit, --threads, --backend and --json"
            raise ArgumentError("resume", "other options", accepted)
        trainer = resume_run(out, length, backend=backend)
    else:
        chosen = Recipe.read(_recipe_path(recipe)).override(changes | length)
        trainer = start_run(chosen, data or [], out, backend=backend)
    console = Console(stderr=True)
    with interruptible() as stop, Monitor(trainer, console) as monitor:
        if not trainer.run(monitor, stop.is_set):
            console.print(f"stopped and saved at step {trainer.counters.step}; go on with --resume")
            raise typer.Exit(130)
        result = finish_run(trainer, monitor)
    _draw(console, out)
    if as_json:
        print(json.dumps(result))
        return
    print(f"held-out bits per byte: {result['heldout_bits_per_byte']:.3f}")
    print(f"model: {out / 'model'} ({format_bytes(result['model_bytes'])})")


def _recipe_path(name: str) -> Path:
    if name == "bundled":
        return Path(str(files("foveal") / "data" / "recipes" / "bundled.toml"))
    return Path(name)


def _draw(console: Console, out: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture of the loss curve: pip install 'foveal[plots]' for one")
        return
    from foveal.training.curve import Curve
    from foveal.training.plot import draw_curve
    from foveal.training.trainer import CURVE

    draw_curve(Curve(out / CURVE).read(), out / "curve.png")
