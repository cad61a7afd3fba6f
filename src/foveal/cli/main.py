"""`foveal`: the terminal door. Each command has a file of its own; this one only lists them.

Exit codes: 0 done, 1 the command ran and what it checked does not hold, 2 bad input or a refusal
(the message says what to change), 130 interrupted.
"""

import sys

import typer
from rich.console import Console

from foveal.cli.backends import backends
from foveal.cli.bench import bench
from foveal.cli.chat import chat
from foveal.cli.demo import demo
from foveal.cli.doctor import doctor
from foveal.cli.generate import generate
from foveal.cli.stream import stream
from foveal.cli.train import train
from foveal.cli.tune import tune
from foveal.core.errors import FovealError

app = typer.Typer(
    name="foveal",
    help="Attention, from kernels to a serving engine: computed, chosen, measured and explained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def root() -> None:
    """Attention, from kernels to a serving engine: computed, chosen, measured and explained."""


app.command()(demo)
app.command()(generate)
app.command()(chat)
app.command()(stream)
app.command()(train)
app.command()(backends)
app.command()(doctor)
app.command()(tune)
app.add_typer(bench)


def main() -> None:
    """Run the command line; a `FovealError` becomes one message and exit code 2."""
    try:
        app()
    except FovealError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
