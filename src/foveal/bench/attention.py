"""`foveal bench attention`: every willing backend at every cell, through the one door.

At each cell the backends are timed in turn within one run (`hardware.timer`), so that whatever
disturbs the machine meets all of them; then each one's peak memory is measured and its launches
are counted, and its result is held against float64. What a user would wait for is timed: the
whole call of `attend`, with its checks and its choice.

A backend that refuses, or whose estimated time or memory exceeds the caps, is recorded with the
reason instead of a measurement.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from foveal.attention.api import attend
from foveal.attention.select import Candidate, choose
from foveal.bench.accuracy import Judge
from foveal.bench.launches import count_launches
from foveal.bench.memory import peak_memory
from foveal.bench.record import Accuracy, Cell, Measurement, Outcome, Record, Run
from foveal.core.units import format_bytes, format_s
from foveal.hardware.timer import Samples, interleave

SEED = 0
MOST_SAMPLES = 100
"""Kept of each backend at a cell, evenly spaced in time; a short call would leave thousands."""
BUDGET_S = 2.0
QUICK_BUDGET_S = 1.0
MEMORY_SHARE = 0.5
"""Of the memory that is available now, what a backend's workspace may take."""

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How long and how often."""

    backends: tuple[str, ...]
    """Who takes part."""
    budget_s: float
    """Time for the samples of one cell, all backends together."""
    min_samples: int = 5
    """Of each backend, even where that exceeds the budget."""
    cap_s: float = 10.0
    """Time of a call, measured or estimated, from which on a backend is skipped."""

    @property
    def described(self) -> dict[str, str]:
        """For the records."""
        return {
            "backends": ", ".join(self.backends),
            "samples": f"{format_s(self.budget_s)} a cell, at least {self.min_samples}",
            "cap": format_s(self.cap_s),
        }


def measure(cell: Cell, settings: Settings, run: Run) -> Iterator[Record]:
    """One record for each backend of the settings, in the order of the settings."""
    choice = choose(cell.spec, cell.workload)
    standing = {candidate.name: candidate for candidate in choice.candidates}
    left_out = {name: _left_out(standing[name], settings) for name in settings.backends}
    willing = [name for name, why in left_out.items() if why is None]
    measured = _measure_willing(cell, willing, settings, run) if willing else {}
    for name, why in left_out.items():
        outcome, reason = why or ("measured", "")
        yield Record(
            title=str(cell),
            cell=cell,
            backend=name,
            outcome=outcome,
            reason=reason,
            measurement=measured.get(name),
            auto=choice.name,
            auto_reason=choice.reason,
            run=run,
        )


def _left_out(candidate: Candidate, settings: Settings) -> tuple[Outcome, str] | None:
    """Why a backend is not measured; None if it is."""
    if candidate.refusals:
        return "refused", "; ".join(candidate.refusals)
    if candidate.seconds > settings.cap_s:
        took = f"{candidate.basis} {format_s(candidate.seconds)} a call"
        return "skipped", f"{took}, cap {format_s(settings.cap_s)}"
    cap_bytes = int(psutil.virtual_memory().available * MEMORY_SHARE)
    if candidate.workspace_bytes > cap_bytes:
        needs = format_bytes(candidate.workspace_bytes)
        return "skipped", f"workspace {needs}, cap {format_bytes(cap_bytes)}"
    return None


def _measure_willing(
    cell: Cell, willing: list[str], settings: Settings, run: Run
) -> dict[str, Measurement]:
    q, k, v = inputs(cell)

    def call(name: str) -> torch.Tensor:
        return attend(q, k, v, cell.spec, backend=name)

    calls = {name: partial(call, name) for name in willing}
    judge = Judge(q, k, v, cell.spec)
    accuracy = {name: judge.accuracy(calls[name]()) for name in willing}
    samples = interleave(
        calls,
        budget_s=settings.budget_s,
        min_samples=settings.min_samples,
        device=cell.workload.device,
    )
    return {
        name: _measurement(cell, calls[name], samples[name], accuracy[name], run)
        for name in willing
    }


def _measurement(
    cell: Cell, call: Call, samples: Samples, accuracy: Accuracy, run: Run
) -> Measurement:
    samples = thinned(samples)
    peak = peak_memory(call, cell.workload.device)
    launches = count_launches(call, cell.workload.device)
    return Measurement(
        samples=samples,
        median_s=samples.median_s,
        spread_s=samples.spread_s,
        fraction_of_limit=cell.rate(samples.median_s) / cell.limit(run.peaks),
        peak_bytes=peak.num_bytes,
        peak_method=peak.method,
        launches=launches.count,
        launch_kind=launches.kind,
        accuracy=accuracy,
    )


def thinned(samples: Samples) -> Samples:
    """At most `MOST_SAMPLES`, evenly spaced; times to 1 ns and shares to 0.1 %, as precise as
    they are known."""
    step = -(-len(samples.seconds) // MOST_SAMPLES)
    return Samples(
        seconds=tuple(round(s, 9) for s in samples.seconds[::step]),
        others=tuple(round(share, 3) for share in samples.others[::step]),
    )


def inputs(cell: Cell) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of a cell, drawn from a fixed seed."""
    spec, work = cell.spec, cell.workload
    rng = torch.Generator().manual_seed(SEED)
    shapes = (
        (spec.num_heads, work.q_len, spec.head_dim),
        (spec.num_kv_heads, work.kv_len, spec.head_dim),
        (spec.num_kv_heads, work.kv_len, spec.value_dim),
    )

    def draw(shape: tuple[int, int, int]) -> torch.Tensor:
        values = torch.randn(work.batch, *shape, generator=rng)
        return values.to(device=work.device, dtype=work.dtype)

    q, k, v = map(draw, shapes)
    return q, k, v
