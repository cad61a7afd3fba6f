"""Peak memory of a call: measured, never computed from a formula.

`resident` (Linux): the kernel keeps the high-water mark of the process's resident memory, and
writing 5 to `/proc/self/clear_refs` sets it back to what is resident now (proc_pid_clear_refs(5)).
What malloc has kept from earlier calls would be reused unseen, so it is given back first
(malloc_trim(3)). Sees everything, kernels' own scratch buffers included. The method is tried once
on an allocation of known size; where it does not see that, `counted` takes its place, and for a
small call too where that finds more: malloc cannot give back pages that are partly in use, and
they may be enough for a small call.
`allocator` (CUDA): the high-water mark of PyTorch's allocator.
`counted` (elsewhere): bytes alive in tensors that operators returned; misses kernels' scratch.

The peak is what the call holds at most beyond what was there before it, its result included. A
call should have run before, so that what libraries allocate once and keep is left out.
"""

import ctypes
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]

TRIAL_BYTES = 64 * 2**20
"""Allocation on which the resident method must prove itself."""
TRIAL_TOLERANCE = 0.05
SMALL_BYTES = 16 * 2**20
"""Below this, memory that malloc holds in partly used pages may hide a call's peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """What a call held at most, beyond what was there before it."""

    num_bytes: int
    method: str
    """"resident", "allocator" or "counted"; see the module."""


def peak_memory(call: Call, device: str = "cpu") -> PeakMemory:
    """Run `call`, which is warm, and measure its peak."""
    gc.collect()
    if device == "cuda":
        return PeakMemory(num_bytes=_allocator_peak(call), method="allocator")
    resident = _resident_peak(call) if resident_works() else 0
    if resident < SMALL_BYTES and (counted := counted_peak(call)) >= resident:
        return PeakMemory(num_bytes=counted, method="counted")
    return PeakMemory(num_bytes=resident, method="resident")


@cache
def resident_works() -> bool:
    """Whether the resident method exists here and sees a known allocation within 5 %."""
    try:
        seen = _resident_peak(lambda: torch.ones(TRIAL_BYTES, dtype=torch.uint8))
    except (OSError, AttributeError):  # not Linux, not glibc, or /proc not writable
        return False
    return abs(seen - TRIAL_BYTES) <= TRIAL_TOLERANCE * TRIAL_BYTES


def counted_peak(call: Call) -> int:
    """Peak of the bytes alive in tensors that operators returned during `call`."""
    live = _LiveBytes()
    with live:
        call()
    return live.peak


def trim() -> None:
    """Give back what malloc has kept from earlier calls, where it can be asked to."""
    with suppress(OSError, AttributeError):
        _trim()


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _resident_peak(call: Call) -> int:
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A size from `/proc/self/status`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _allocator_peak(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators return, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, 0)  # was there before, or is followed already
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        return result

    def _follow(self, tensor: torch.Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def end(_: object) -> None:
            del self._seen[key]
            self._live -= num_bytes

        self._seen[key] = weakref.ref(storage, end)
        self._live += num_bytes
        self.peak = max(self.peak, self._live)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
