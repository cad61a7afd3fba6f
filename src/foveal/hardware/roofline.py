"""The roofline: what a computation must take at least, from its work and the machine's peaks.

    seconds = max(flops / matmul peak, bytes moved / memory bandwidth) + calls * overhead

Williams, Waterman, Patterson 2009, with a term for the cost of launching operators.
"""

from dataclasses import dataclass

import torch

from foveal.core.dtypes import dtype_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """What one device of this machine can do, measured by `calibrate` or nominal (`peaks.py`)."""

    device: str
    matmul_flops: tuple[tuple[str, float], ...]
    """(dtype name, floating-point operations per second of a large matrix product)."""
    bandwidth_bytes: float
    """Bytes per second read from memory beyond the caches."""
    overhead_s: float
    """Seconds that one small operator call takes."""
    source: str
    """"measured 2026-11-21" or "nominal: ..." with the formula."""

    def flops(self, dtype: torch.dtype) -> float:
        """Matmul peak for `dtype`; that of float32 if the dtype was not measured."""
        table = dict(self.matmul_flops)
        return table.get(dtype_name(dtype), table["float32"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a computation does, counted from its shapes."""

    flops: float
    bytes_moved: float
    calls: int = 1
    """Operators launched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A predicted time. An estimate, never a measurement: prints with its formula."""

    seconds: float
    formula: str


def roofline(work: Work, dtype: torch.dtype, peaks: Peaks) -> Estimate:
    """The least time that `work` can take at these peaks."""
    compute_s = work.flops / peaks.flops(dtype)
    memory_s = work.bytes_moved / peaks.bandwidth_bytes
    overhead_s = work.calls * peaks.overhead_s
    formula = (
        f"max({work.flops:.3g} FLOP / {peaks.flops(dtype):.3g}/s, "
        f"{work.bytes_moved:.3g} B / {peaks.bandwidth_bytes:.3g} B/s) "
        f"+ {work.calls} calls * {peaks.overhead_s:.2g} s"
    )
    return Estimate(seconds=max(compute_s, memory_s) + overhead_s, formula=formula)
