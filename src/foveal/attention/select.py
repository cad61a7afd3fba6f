"""Who computes a call, and why: `choose` weighs every backend and keeps what it found.

    refusals -> memory budget -> measured time -> estimated time (roofline)

Times decide among those who are willing and fit. If the tuning table has this workload's bucket,
measured backends compete by their measurements and one without a measurement stands behind them;
a measurement is never compared with an estimate. Otherwise all compete by estimate.

`choose` runs at every `attend`, so choices are remembered under the exact spec and workload:
refusals may depend on exact lengths (equal or not, a multiple of something), and rounding these
would let a backend run that refuses. A step of decoding, one key longer than the last, therefore
weighs anew once, and all its layers share the answer. The memory is dropped when PyTorch's thread
count or a file in the cache folder (a new tuning table or calibration) changes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from foveal.attention.backend import Backend
from foveal.attention.catalogue import BACKENDS, BY_NAME
from foveal.attention.spec import AttentionSpec
from foveal.attention.table import Measured, bucket_key, load_table
from foveal.attention.workload import Workload
from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError, BudgetExceeded, Unsupported
from foveal.core.units import format_bytes, format_s
from foveal.hardware import store
from foveal.hardware.detect import detect
from foveal.hardware.peaks import peaks
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Peaks

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One backend's standing for a call."""

    name: str
    refusals: tuple[str, ...]
    """Why it cannot compute the call; empty if it is willing. The fields below then hold."""
    kernel: str = ""
    """Which of its kernels would compute the call (`Backend.kernel`)."""
    workspace_bytes: int = 0
    fits: bool = True
    """Whether the workspace fits the memory budget."""
    seconds: float = float("inf")
    basis: str = ""
    """"measured" or "estimate"."""
    formula: str = ""
    """Of an estimate: how it was reckoned. Of a measurement: when, and on which shape."""

    @property
    def eligible(self) -> bool:
        """Willing, and within the budget."""
        return not self.refusals and self.fits

    def __str__(self) -> str:
        return f"{self.name} {format_s(self.seconds)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The backend chosen for a call, and what every backend had to say. Prints as a table."""

    backend: Backend
    spec: AttentionSpec
    workload: Workload
    candidates: tuple[Candidate, ...]
    """Best first: the eligible by time, then those over budget, then those who refuse."""
    by_name: bool
    """The caller asked for this very backend."""
    memory_budget: int | None

    @property
    def name(self) -> str:
        """The chosen backend's name."""
        return self.backend.name

    @property
    def chosen(self) -> Candidate:
        """The chosen backend's standing."""
        return next(c for c in self.candidates if c.name == self.name)

    @property
    def reason(self) -> str:
        """One sentence: why this backend."""
        chosen = self.chosen
        others = [c for c in self.candidates if c.eligible and c is not chosen]
        rivals = [str(c) for c in others if c.basis == chosen.basis]
        words = "asked for by name; " if self.by_name else ""
        if not others:
            words += "the only one willing"
            words += "; " if self.memory_budget is None else " that fits the memory budget; "
        words += f"{chosen.basis} {format_s(chosen.seconds)}"
        if rivals:
            words += ", against " + ", ".join(rivals)
        words += f" ({chosen.formula})"
        if chosen.basis == "estimate":
            return f"{self.name}: {words}; `foveal tune` would measure it"
        unmeasured = [c.name for c in others if c.basis != chosen.basis]
        if unmeasured:
            words += f"; not measured: {', '.join(unmeasured)}"
        return f"{self.name}: {words}"

    def __str__(self) -> str:
        lines = [self.reason, f"  spec      {self.spec}", f"  workload  {self.workload}"]
        width = max(len(c.name) for c in self.candidates)
        for c in self.candidates:
            mark = "→" if c.name == self.name else " "
            lines.append(f"{mark} {c.name:{width}}  {_standing(c)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as data that JSON can hold."""
        return {
            "backend": self.name,
            "reason": self.reason,
            "spec": str(self.spec),
            "workload": str(self.workload),
            "dtype": dtype_name(self.workload.dtype),
            "memory_budget_bytes": self.memory_budget,
            "candidates": [_candidate_dict(c) for c in self.candidates],
        }


def choose(
    spec: AttentionSpec,
    workload: Workload,
    *,
    backend: str = AUTO,
    memory_budget: int | None = None,
) -> Choice:
    """The backend for a call: `backend` by name, or the fastest that is willing and fits.

    `memory_budget` is in bytes of temporaries beyond inputs and outputs. Raises `ArgumentError`
    for an unknown name, `Unsupported` where all (or the named one) refuse, and `BudgetExceeded`
    where all who are willing (or the named one) need more than the budget.
    """
    return _choose(spec, workload, backend, memory_budget, (torch.get_num_threads(), store.stamp()))


@lru_cache(maxsize=2048)
def _choose(
    spec: AttentionSpec,
    workload: Workload,
    backend: str,
    memory_budget: int | None,
    circumstances: object,
) -> Choice:
    if backend != AUTO and backend not in BY_NAME:
        raise ArgumentError("backend", repr(backend), ", ".join([AUTO, *BY_NAME]))
    candidates = tuple(sorted(weigh(spec, workload, memory_budget), key=_rank))
    asked = [c for c in candidates if backend in (AUTO, c.name)]
    winner = next((c for c in asked if c.eligible), None)
    if winner is None:
        raise _nobody(asked, spec, workload, memory_budget)
    return Choice(
        backend=BY_NAME[winner.name],
        spec=spec,
        workload=workload,
        candidates=candidates,
        by_name=backend != AUTO,
        memory_budget=memory_budget,
    )


def weigh(
    spec: AttentionSpec, workload: Workload, memory_budget: int | None = None
) -> tuple[Candidate, ...]:
    """Every backend's standing for a call, in the order of the catalogue. Nothing is cached."""
    machine = detect()
    times = load_table(machine).get(bucket_key(spec, workload), {})
    device_peaks = peaks(machine, workload.device)
    return tuple(
        _weigh_one(b, spec, workload, machine, device_peaks, times.get(b.name), memory_budget)
        for b in BACKENDS
    )


def _weigh_one(
    backend: Backend,
    spec: AttentionSpec,
    workload: Workload,
    machine: Machine,
    device_peaks: Peaks,
    time: Measured | None,
    memory_budget: int | None,
) -> Candidate:
    refusals = backend.refuse(spec, workload, machine)
    if refusals:
        return Candidate(name=backend.name, refusals=refusals)
    workspace = backend.workspace_bytes(spec, workload)
    if time is not None:
        seconds, basis = time.median_s, "measured"
        formula = f"{time.date}, {time.shape}" + (", machine busy" if time.disturbed else "")
    else:
        estimate = backend.estimate(spec, workload, device_peaks)
        seconds, basis, formula = estimate.seconds, "estimate", estimate.formula
    return Candidate(
        name=backend.name,
        refusals=(),
        kernel=backend.kernel(spec, workload),
        workspace_bytes=workspace,
        fits=memory_budget is None or workspace <= memory_budget,
        seconds=seconds,
        basis=basis,
        formula=formula,
    )


def _rank(candidate: Candidate) -> tuple[bool, bool, bool, float]:
    """Best first: willing, fitting, measured, fast. Equal ones keep the catalogue's order."""
    c = candidate
    return bool(c.refusals), not c.fits, c.basis != "measured", c.seconds


def _nobody(
    asked: list[Candidate], spec: AttentionSpec, workload: Workload, memory_budget: int | None
) -> Unsupported | BudgetExceeded:
    """Why none of those who were asked can compute the call."""
    who = f"backend {asked[0].name!r}" if len(asked) == 1 else "no backend"
    verb = "cannot compute" if len(asked) == 1 else "can compute"
    call = f"this call ({spec}; {workload})"
    willing = {c.name: c.workspace_bytes for c in asked if not c.refusals}
    if willing and memory_budget is not None:
        what = f"{who} {verb} {call} within the memory budget"
        return BudgetExceeded(what, memory_budget, willing)
    return Unsupported(f"{who} {verb} {call}", {c.name: c.refusals for c in asked})


def _standing(candidate: Candidate) -> str:
    """What `Choice` prints of one candidate."""
    c = candidate
    if c.refusals:
        return "refuses: " + "; ".join(c.refusals)
    time = f"{format_s(c.seconds):>8} {c.basis:8}  workspace {format_bytes(c.workspace_bytes)}"
    over = "" if c.fits else ", over the memory budget"
    return f"{time}{over}  {c.kernel}"


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    c = candidate
    if c.refusals:
        return {"name": c.name, "refusals": list(c.refusals)}
    return {
        "name": c.name,
        "refusals": [],
        "kernel": c.kernel,
        "workspace_bytes": c.workspace_bytes,
        "fits": c.fits,
        "seconds": c.seconds,
        "basis": c.basis,
        "formula": c.formula,
    }
