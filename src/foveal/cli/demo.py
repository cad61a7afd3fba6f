"""`foveal demo`: the main job on real input, in four steps and under three minutes.

Every step is a command of its own, called as the terminal calls it, so the demo shows nothing that
a user cannot repeat; the line above each step says how.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PROMPT = '''def read_lines(path):
    """Return the lines of a file."""
'''
LENGTH = 2048
"""Tokens of the call that is explained."""
MAX_TOKENS, TEMPERATURE, SEED = 250, 0.7, 2


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and its records.")] = Path(
        "out"
    ),
) -> None:
    """Show what foveal does: this machine, attention measured and chosen, text generated.

    Example: foveal demo --out out
    """
    console = Console(highlight=False)
    _step(console, "1. This machine", "foveal doctor --calibrate")
    _machine()
    picture = out / "attention.png"
    _step(console, "2. Attention, measured", f"foveal bench attention --quick --plot {picture}")
    _benchmark(picture)
    call = f"--heads 8 --kv-heads 2 --head-dim 64 --q-len {LENGTH} --kv-len {LENGTH} --causal"
    both = f"foveal tune {call} && foveal backends {call}"
    _step(console, "3. Who computes it, and why", both)
    _choice(console)
    sampling = f"--max-tokens {MAX_TOKENS} --temperature {TEMPERATURE} --seed {SEED}"
    _step(console, "4. Text from the bundled model", f"foveal generate PROMPT {sampling}")
    _text()
    console.print(f"\nThe picture of step 2: [bold]{picture}[/]")


def _step(console: Console, title: str, command: str) -> None:
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ {command}\n", style="dim", markup=False, soft_wrap=True)


def _machine() -> None:
    from foveal.cli.doctor import doctor
    from foveal.hardware.calibrate import load_calibration
    from foveal.hardware.detect import detect

    doctor(calibrate=load_calibration(detect(), "cpu") is None)


def _benchmark(picture: Path) -> None:
    """The quick benchmark, from an empty file of records: they are appended to."""
    from foveal.cli import bench_runs as runs

    picture.with_suffix(".jsonl").unlink(missing_ok=True)
    runs.attention(
        size="quick",
        factors={},
        backends=runs.backends((), flex=False),
        output=runs.Output(out=None, plot=picture, as_json=False),
        budget_s=60.0,
        calibrate=True,
    )


def _choice(console: Console) -> None:
    """Measure one call, so that the choice rests on a measurement, and print the choice."""
    import torch

    from foveal.attention.select import choose
    from foveal.attention.spec import AttentionSpec
    from foveal.attention.tune import tune
    from foveal.attention.workload import Workload

    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, causal=True)
    workload = Workload(batch=1, q_len=LENGTH, kv_len=LENGTH, dtype=torch.float32)
    slow = {"flex": "compiles for seconds"}
    for _ in tune(((spec, workload),), budget_s=8.0, without=slow):
        console.print(str(choose(spec, workload)), markup=False, soft_wrap=True)


def _text() -> None:
    from foveal.cli import answers
    from foveal.engine.llm import LLM
    from foveal.engine.request import SamplingParams

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED)
    with answers.loading(None):
        llm = LLM()
    answers.show(PROMPT)
    answers.show_costs(llm, answers.show_pieces(llm.stream(PROMPT, params)))
