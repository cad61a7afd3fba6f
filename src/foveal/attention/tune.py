"""Tuning: run every willing backend on a workload and file the times (`table`) for `choose`.

Each bucket is measured in two passes, both interleaved (`hardware.timer`): a short one of all
candidates, then a longer one of those near the fastest, since how slow a hopeless one is need not
be known well. Whoever refuses, would take more memory than is free, or is estimated to take
longer for one call than the bucket may take in all, is left out, and the report says so.
"""

import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import psutil
import torch

from foveal.attention.backend import Backend
from foveal.attention.catalogue import BACKENDS, BY_NAME
from foveal.attention.operands import Operands
from foveal.attention.select import weigh
from foveal.attention.spec import AttentionSpec
from foveal.attention.table import Measured, bucket_key, save_table
from foveal.attention.workload import Workload
from foveal.core.units import format_bytes, format_s
from foveal.hardware.detect import detect
from foveal.hardware.peaks import peaks
from foveal.hardware.timer import Samples, interleave

NEAR = 3.0
"""Backends within this factor of the fastest are measured closely."""

NOBODY: Mapping[str, str] = {}

Call = tuple[AttentionSpec, Workload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What tuning found for one call."""

    spec: AttentionSpec
    workload: Workload
    times: dict[str, Samples]
    """By backend, fastest first."""
    estimates: dict[str, float]
    """What each of them was estimated to take, in seconds."""
    skipped: dict[str, str]
    """Backends that were not measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """The same as data that JSON can hold."""
        return {
            "spec": str(self.spec),
            "workload": str(self.workload),
            "times": {
                name: {
                    "median_s": s.median_s,
                    "estimate_s": self.estimates[name],
                    "spread_s": s.spread_s,
                    "disturbed": s.disturbed,
                    "seconds": s.seconds,
                    "others": s.others,
                }
                for name, s in self.times.items()
            },
            "not_measured": self.skipped,
        }


def tune(
    calls: Sequence[Call], *, budget_s: float, without: Mapping[str, str] = NOBODY
) -> Iterator[Tuned]:
    """Measure one call after the other and file each result at once. `without` maps backends
    that shall not take part to the reason.

    Every call gets an equal part of the `budget_s` seconds that remain; slow ones may overrun
    theirs, and then later calls have less, or none at all.
    """
    remaining = budget_s
    for done, (spec, workload) in enumerate(calls):
        if remaining <= 0:
            return
        start = time.monotonic()
        yield tune_one(spec, workload, remaining / (len(calls) - done), without)
        remaining -= time.monotonic() - start


def tune_one(
    spec: AttentionSpec, workload: Workload, budget_s: float, without: Mapping[str, str] = NOBODY
) -> Tuned:
    """Measure one call on every backend that can take part, and file the times."""
    skipped = _skipped(spec, workload, budget_s)
    skipped |= {name: why for name, why in without.items() if name in BY_NAME}
    runs = {b.name: Run(b, spec, workload) for b in BACKENDS if b.name not in skipped}
    times = _measure(runs, workload.device, budget_s)
    machine = detect()
    if times:
        filed = {name: _filed(samples, workload) for name, samples in times.items()}
        save_table(machine, {bucket_key(spec, workload): filed})
    ranked = dict(sorted(times.items(), key=lambda item: item[1].median_s))
    device_peaks = peaks(machine, workload.device)
    estimates = {
        name: BY_NAME[name].estimate(spec, workload, device_peaks).seconds for name in ranked
    }
    return Tuned(spec=spec, workload=workload, times=ranked, estimates=estimates, skipped=skipped)


class Run:
    """One backend's computation of a call on random tensors, ready to be timed.

    With gradients a run is a forward and a backward pass.
    """

    def __init__(self, backend: Backend, spec: AttentionSpec, workload: Workload) -> None:
        self._backend, self._spec, self._workload = backend, spec, workload
        self._inputs = _tensors(spec, workload)
        self._operands = _operands(spec, workload)
        tensors = (*self._inputs, self._operands.bias)
        self._leaves = [t for t in tensors if t is not None and t.requires_grad]
        self._d_out: torch.Tensor | None = None

    def __call__(self) -> None:
        grad = self._workload.needs_grad
        with torch.set_grad_enabled(grad):
            out, _ = self._backend.run(*self._inputs, self._spec, self._operands)
        if grad:
            if self._d_out is None:
                self._d_out = torch.randn_like(out)
            torch.autograd.grad(out, self._leaves, self._d_out)


def grid(*, quick: bool = False, device: str = "cpu") -> tuple[Call, ...]:
    """The calls that tuning measures unless told which: causal prefill and decode of common head
    layouts, in float32 and bfloat16, and training at a middling length."""
    layouts = ((8, 2, 64),) if quick else ((8, 8, 64), (8, 2, 64), (32, 8, 128))
    prefills = (128, 1024) if quick else (128, 512, 2048)
    decodes = (1024,) if quick else (512, 2048, 8192)
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
    lengths = [(n, n, False) for n in prefills] + [(1, n, False) for n in decodes]
    lengths += [] if quick else [(512, 512, True)]
    return tuple(
        (
            AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, causal=True),
            Workload(batch=1, q_len=q, kv_len=k, dtype=dtype, device=device, needs_grad=needs_grad),
        )
        for (heads, kv_heads, dim), dtype, (q, k, needs_grad) in product(layouts, dtypes, lengths)
    )


def model_calls(
    specs: Iterable[AttentionSpec],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    batch: int = 1,
    max_length: int,
) -> tuple[Call, ...]:
    """The calls of generation with layers of these specs: prompts in chunks of up to 512 tokens,
    then decoding, which passes positions along."""
    positions = frozenset({"q_positions", "kv_positions"})
    prefills = ((128, 128), (512, 512), (512, 2048))
    decodes = ((1, 128), (1, 512), (1, 2048))
    lengths = [(q, k, frozenset[str]()) for q, k in prefills]
    lengths += [(q, k, positions) for q, k in decodes]
    return tuple(
        (
            spec,
            Workload(batch=batch, q_len=q, kv_len=k, dtype=dtype, device=device, operands=operands),
        )
        for spec, (q, k, operands) in product(dict.fromkeys(specs), lengths)
        if k <= max_length
    )


def _skipped(spec: AttentionSpec, workload: Workload, budget_s: float) -> dict[str, str]:
    """The backends that are left out, and why."""
    free = psutil.virtual_memory().available
    if workload.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    reasons = {}
    for c in weigh(spec, workload, memory_budget=free // 2):
        if c.refusals:
            reasons[c.name] = "refuses: " + "; ".join(c.refusals)
        elif not c.fits:
            need = format_bytes(c.workspace_bytes)
            reasons[c.name] = f"needs {need}, more than half of the free {format_bytes(free)}"
        elif c.seconds > budget_s:
            reasons[c.name] = f"{c.basis} {format_s(c.seconds)} a call, too long for the budget"
    return reasons


def _measure(runs: dict[str, Run], device: str, budget_s: float) -> dict[str, Samples]:
    first = interleave(runs, budget_s=0, min_samples=1, device=device)
    if not first:
        return {}
    limit = NEAR * min(samples.median_s for samples in first.values())
    near = {name: run for name, run in runs.items() if first[name].median_s <= limit}
    return first | interleave(near, budget_s=budget_s, device=device)


def _filed(samples: Samples, workload: Workload) -> Measured:
    return Measured(
        median_s=samples.median_s,
        spread_s=samples.spread_s,
        num_samples=len(samples.counted),
        disturbed=samples.disturbed,
        date=str(datetime.date.today()),
        shape=str(workload),
    )


def _tensors(
    spec: AttentionSpec, workload: Workload
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as a call of this workload has them."""
    sizes = (
        (spec.num_heads, workload.q_len, spec.head_dim),
        (spec.num_kv_heads, workload.kv_len, spec.head_dim),
        (spec.num_kv_heads, workload.kv_len, spec.value_dim),
    )
    q, k, v = (
        torch.randn(workload.batch, *size, device=workload.device)
        .to(workload.dtype)
        .requires_grad_(workload.needs_grad)
        for size in sizes
    )
    return q, k, v


def _operands(spec: AttentionSpec, workload: Workload) -> Operands:
    """The tensors beside q, k, v that the workload names, of the usual kind: a mask and a bias
    for all heads alike, full lengths, default positions."""
    batch, q_len, kv_len = workload.batch, workload.q_len, workload.kv_len
    first = max(0, kv_len - q_len)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "mask": lambda: torch.rand(batch, 1, q_len, kv_len) < 0.9,
        "bias": lambda: torch.randn(batch, 1, q_len, kv_len),
        "kv_lengths": lambda: torch.full((batch,), kv_len),
        "q_positions": lambda: torch.arange(first, first + q_len).expand(batch, -1),
        "kv_positions": lambda: torch.arange(kv_len).expand(batch, -1),
    }
    made = {name: makers[name]().to(workload.device) for name in workload.operands & set(makers)}
    if "bias_grad" in workload.operands:
        made["bias"].requires_grad_()
    return Operands(**made, seed=0 if spec.dropout else None)
