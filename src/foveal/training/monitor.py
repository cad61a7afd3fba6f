"""What a person sees of a run, on standard error: a progress bar, and a line per evaluation."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveal.core.units import format_count, format_s
from foveal.training.trainer import HeldoutRecord, Trainer, TrainRecord


class Monitor:
    """An observer of one run; a context manager, so that the bar ends with it."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer, self._console = trainer, console
        bar, text = BarColumn(), TextColumn("{task.description}")
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(text, bar, *times, console=console)
        self._task = self._progress.add_task("", total=1000)
        self._before = (trainer.seconds, trainer.counters.step)

    def __enter__(self) -> Self:
        self._describe()
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, record: TrainRecord | HeldoutRecord) -> None:
        """Show one record."""
        if isinstance(record, HeldoutRecord):
            self._console.print(
                f"step {record.step}: {record.bits_per_byte:.3f} bits per byte on {record.rows} "
                f"held-out rows after {format_s(record.seconds)}"
            )
            return
        seconds, step = self._before
        tokens = (record.step - step) * self._trainer.tokens_per_step
        line = (
            f"step {record.step} loss {record.loss:.3f} lr {record.lr:.1e} "
            f"{tokens / (record.seconds - seconds):,.0f} tokens/s"
        )
        done = int(1000 * self._trainer.progress)
        self._progress.update(self._task, description=line, completed=done)

    def _describe(self) -> None:
        trainer = self._trainer
        train, heldout = trainer.streams.train_facts, trainer.streams.heldout_facts
        self._console.print(
            f"{format_count(trainer.model.num_parameters)} parameters; {train.documents} documents "
            f"with {format_count(train.tokens)} tokens to learn from, {heldout.documents} with "
            f"{format_count(heldout.tokens)} held out; at step {trainer.counters.step}"
        )
