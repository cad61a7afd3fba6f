"""The loop: rows to loss to gradients to weights, with its records, evaluations and checkpoints.

Everything that a step depends on is in the checkpoint (weights, AdamW's averages, the row and the
step reached, the random state), so that a run in two parts gives the same weights, bit for bit, as
a run in one; with a limit of time the learning rate follows the clock, and only the data repeat.
A loss or gradient that is not finite ends the run before it touches the weights.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from foveal.core.errors import FovealError
from foveal.models.decoder import Decoder
from foveal.training.checkpoint import Counters, load_checkpoint, save_checkpoint
from foveal.training.config import Recipe
from foveal.training.curve import Curve
from foveal.training.data import HeldoutRows, Streams, TrainingRows
from foveal.training.loss import IGNORE, cross_entropy_sum
from foveal.training.optimiser import build_optimiser, learning_rate

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.jsonl"


class Diverged(FovealError):
    """The loss or the gradient is no longer finite; the last checkpoint is untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecord:
    """One update, or the mean of those since the record before."""

    step: int
    loss: float
    """Mean of -log p over the step's tokens, natural logarithm."""
    lr: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens trained on since the run began."""
    seconds: float
    """Since the run began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutRecord:
    """An evaluation on held-out text."""

    step: int
    loss: float
    """Mean of -log p over the tokens, natural logarithm."""
    bits_per_byte: float
    """The loss in bits, times held-out tokens per byte of held-out text."""
    rows: int
    seconds: float


Observer = Callable[[TrainRecord | HeldoutRecord], None]


class Trainer:
    """One run in the folder `out`: a model, its optimiser, and where they are."""

    def __init__(
        self,
        model: Decoder,
        streams: Streams,
        recipe: Recipe,
        out: Path,
        *,
        backend: str = "auto",
    ) -> None:
        """`backend` computes the attention."""
        self.model, self.streams, self.recipe, self.out = model, streams, recipe, out
        self.backend = backend
        self.optimiser = build_optimiser(model, recipe.optimiser)
        self.curve = Curve(out / CURVE)
        self.counters = Counters()
        row = {"context": recipe.data.context, "begin_id": streams.begin_id}
        self.rows = TrainingRows(streams.train, seed=recipe.run.seed, **row)
        self.heldout = HeldoutRows(streams.heldout, **row)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the run, its earlier parts included."""
        return self.counters.seconds + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        run = self.recipe.run
        by_time = self.seconds / run.time_limit_s if run.time_limit_s else 0.0
        return min(1.0, max(self.counters.step / run.steps, by_time))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        run = self.recipe.run
        return run.batch * run.accumulate * self.recipe.data.context

    def resume(self) -> None:
        """Continue from the folder's checkpoint."""
        self.counters = load_checkpoint(self.out / CHECKPOINT, self.model, self.optimiser)
        self.curve.cut(self.counters.step)
        self._started = time.monotonic()

    def save(self) -> None:
        """Write the folder's checkpoint."""
        self.counters = replace(self.counters, seconds=self.seconds)
        self._started = time.monotonic()
        recipe = self.recipe.to_dict()
        path = self.out / CHECKPOINT
        save_checkpoint(path, self.model, self.optimiser, self.counters, recipe)

    def run(self, observe: Observer, should_stop: Callable[[], bool]) -> bool:
        """Train to the end, or until `should_stop` says so between two steps, and save.

        True if the end was reached. Raises `Diverged`.
        """
        every = self.recipe.run
        since: list[TrainRecord] = []
        while self.progress < 1 and not should_stop():
            since.append(self.step())
            observe(since[-1])
            step = self.counters.step
            if step % every.log_every == 0:
                self.curve.append({"kind": "train", **asdict(_mean(since))})
                since.clear()
            if step % every.evaluate_every == 0:
                observe(self.evaluate(every.evaluate_rows))
            if step % every.checkpoint_every == 0:
                self.save()
        self.save()
        return self.progress >= 1

    def step(self) -> TrainRecord:
        """One update of the weights. Raises `Diverged` before the weights are touched."""
        run, model = self.recipe.run, self.model
        lr = learning_rate(self.recipe.optimiser, self.progress + 0.5 / run.steps)
        row, loss = self.counters.row, 0.0
        for _ in range(run.accumulate):
            inputs, targets = self.rows.batch(row, run.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
                part = self._loss_sum(inputs, targets) / self.tokens_per_step
            part.backward()  # type: ignore[no-untyped-call]
            row, loss = row + run.batch, loss + part.item()
        clip = self.recipe.optimiser.clip
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        self._require_finite(loss, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.counters = replace(self.counters, step=self.counters.step + 1, row=row)
        return TrainRecord(
            step=self.counters.step,
            loss=loss,
            lr=lr,
            gradient_norm=norm,
            tokens=self.counters.step * self.tokens_per_step,
            seconds=self.seconds,
        )

    @torch.no_grad()
    def evaluate(self, num_rows: int) -> HeldoutRecord:
        """The loss on `num_rows` held-out rows, spread evenly, written to the curve."""
        total, scored = 0.0, 0
        for inputs, targets in self.heldout.batches(num_rows, self.recipe.run.batch):
            total += self._loss_sum(inputs, targets).item()
            scored += int((targets != IGNORE).sum())
        facts = self.streams.heldout_facts
        loss = total / scored
        record = HeldoutRecord(
            step=self.counters.step,
            loss=loss,
            bits_per_byte=loss / math.log(2) * facts.tokens / facts.text_bytes,
            rows=min(num_rows, self.heldout.num_rows),
            seconds=self.seconds,
        )
        self.curve.append({"kind": "heldout", **asdict(record)})
        return record

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.model.hidden(inputs, backend=self.backend)
        vocab_size = self.model.config.vocab_size
        return cross_entropy_sum(self.model.logits, hidden, targets, vocab_size=vocab_size)

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = self.out / CHECKPOINT
        state = f"{kept} is kept" if kept.is_file() else "there is no checkpoint yet"
        raise Diverged(
            f"step {self.counters.step + 1}: loss {loss}, gradient norm {norm}; {state}. "
            "Try a lower learning rate or a longer warm-up."
        )


def _mean(records: list[TrainRecord]) -> TrainRecord:
    """The last record, with loss and gradient norm averaged over all."""
    count = len(records)
    loss = sum(record.loss for record in records) / count
    norm = sum(record.gradient_norm for record in records) / count
    return replace(records[-1], loss=loss, gradient_norm=norm)
