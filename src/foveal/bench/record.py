"""What one measurement leaves behind: `Record`, a line in a file that says all of it.

Tables and pictures are made from these files only, so a record carries what is needed to judge it
later: where, when and with what it was taken (`Run`), what was computed (`Cell`), by whom, every
raw sample with what other processes did meanwhile, and how exact the result was. A backend that
refused, or that was left out because it would have taken too long, has a record with the reason.
"""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from foveal.attention.cost import matmul_flops, visible_pairs
from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload
from foveal.bench import lines
from foveal.core.dtypes import accumulate_dtype, dtype_name
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Peaks
from foveal.hardware.store import foveal_version
from foveal.hardware.timer import Samples

SOURCE = Path(__file__).resolve()

Outcome = Literal["measured", "refused", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where, when and with what: the same for all records of one command."""

    fingerprint: str
    machine: Machine
    peaks: Peaks
    """The limits of the machine that fractions refer to."""
    commit: str
    """Of the source tree, with "-dirty" if it was changed since; "unknown" outside of one."""
    foveal: str
    python: str
    date: str
    """Start of the run, ISO 8601 in UTC."""
    settings: dict[str, str]

    @classmethod
    def now(cls, machine: Machine, peaks: Peaks, settings: dict[str, str]) -> "Run":
        """A run that starts now."""
        return cls(
            fingerprint=machine.fingerprint,
            machine=machine,
            peaks=peaks,
            commit=source_commit(),
            foveal=foveal_version(),
            python=platform.python_version(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=settings,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One computation that backends compete at."""

    spec: AttentionSpec
    workload: Workload

    @property
    def decode(self) -> bool:
        """One query per sequence: bound by reading keys and values, not by arithmetic."""
        return self.workload.q_len == 1

    @property
    def flops(self) -> float:
        """FLOPs of the visible pairs."""
        return matmul_flops(self.spec, visible_pairs(self.spec, self.workload))

    @property
    def kv_bytes(self) -> float:
        """Bytes of the visible keys and values of a decode step, each read once."""
        # The pairs are counted for every query head; G of them share one key.
        pairs = visible_pairs(self.spec, self.workload) / self.spec.group_size
        return pairs * (self.spec.head_dim + self.spec.value_dim) * self.workload.dtype.itemsize

    def rate(self, seconds: float) -> float:
        """FLOP/s of a prefill, bytes/s of a decode step."""
        return (self.kv_bytes if self.decode else self.flops) / seconds

    def limit(self, peaks: Peaks) -> float:
        """The rate that this machine cannot exceed: memory bandwidth for decode, else the matmul
        peak; for 16-bit inputs the better of theirs and float32's, since a backend may widen.

        Keys and values that fit the caches can be read faster than from memory.
        """
        if self.decode:
            return peaks.bandwidth_bytes
        dtype = self.workload.dtype
        return max(peaks.flops(dtype), peaks.flops(accumulate_dtype(dtype)))

    @property
    def series(self) -> str:
        """The cell in words, but for its length: what the points of one curve share."""
        work = self.workload
        phase = "decode" if self.decode else "prefill"
        return f"{phase}, {self.spec}, B={work.batch}, {dtype_name(work.dtype)} on {work.device}"

    def __str__(self) -> str:
        return f"{self.series}, Lq={self.workload.q_len} Lk={self.workload.kv_len}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How far a result is from the same computation in float64."""

    error: float | None
    """Largest absolute difference; None if the result is not finite where it should be."""
    plain_error: float | None
    """The same of plain PyTorch operators in this precision."""
    allowed: float
    """What the rule for low precision allows."""

    @property
    def holds(self) -> bool:
        """Whether the result is as exact as the rule demands."""
        return self.error is not None and self.error <= self.allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured of one backend at one cell."""

    samples: Samples
    median_s: float
    spread_s: float
    """Distance between the quartiles."""
    fraction_of_limit: float
    """Of `Cell.limit`."""
    peak_bytes: int
    """Memory held at most beyond the inputs, the result included."""
    peak_method: str
    launches: int
    launch_kind: str
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One backend at one cell."""

    benchmark: Literal["attention"] = "attention"
    title: str
    """The cell in words."""
    cell: Cell
    backend: str
    outcome: Outcome
    reason: str
    """Why it refused or was skipped; empty if measured."""
    measurement: Measurement | None
    auto: str
    """The backend that "auto" would have chosen here."""
    auto_reason: str
    run: Run

    def __post_init__(self) -> None:
        assert (self.measurement is not None) == (self.outcome == "measured")

    @property
    def disagrees(self) -> bool:
        """Measured, and not as exact as it must be."""
        return self.measurement is not None and not self.measurement.accuracy.holds


def read_records(path: Path) -> list[Record]:
    """Every record of a file. Raises `LoadError` with the line and the field that are wrong."""
    return lines.read(path, Record)


def newest(records: list[Record]) -> list[Record]:
    """Of several records of one backend at one cell the last, in the order of the cells."""
    last = {(r.cell, r.backend, r.run.fingerprint): r for r in records}
    return list(last.values())


def source_commit() -> str:
    """The commit of the source tree this file belongs to; "unknown" if it belongs to none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", SOURCE.name)  # installed into someone else's tree?
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(machine: Machine) -> str:
    """A machine in one line, for captions."""
    words = [machine.cpu_name, f"{machine.num_threads} threads", f"PyTorch {machine.torch_version}"]
    return ", ".join([*(gpu.name for gpu in machine.gpus), *words])
