"""The loss curve as a picture, drawn from the recorded lines and from nothing else."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Bits per token in training and on held-out text, and the learning rate, over tokens."""
    train = [record for record in records if record["kind"] == "train"]
    heldout = [record for record in records if record["kind"] == "heldout"]
    per_step = train[-1]["tokens"] / train[-1]["step"] / 1e6
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, kept, width in (("training", train, 0.8), ("held out", heldout, 2.0)):
        tokens = [record["step"] * per_step for record in kept]
        bits = [record["loss"] / math.log(2) for record in kept]
        axes.plot(tokens, bits, label=name, linewidth=width)
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("loss, bits per token")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    steps = [record["step"] * per_step for record in train]
    rate.plot(steps, [record["lr"] for record in train], color="grey", linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    rate.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
