"""How many operators or kernels a call launches, counted by PyTorch's profiler.

On CPU: operators that Python launches; those that an operator calls in turn are part of it. On
CUDA: kernels that run on the device. Both say how much of a small call is overhead.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """What one call launched."""

    count: int
    kind: str
    """"operators" or "kernels"."""


def count_launches(call: Callable[[], object], device: str = "cpu") -> Launches:
    """Run `call` once under the profiler. Warm it up first: a first call may compile."""
    # The profiler announces each start and stop on stderr; 6 is above its highest level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if on_cuda:
        return Launches(count=sum(map(_is_kernel, events)), kind="kernels")
    return Launches(count=sum(map(_is_outermost, events)), kind="operators")


def _is_kernel(event: FunctionEvent) -> bool:
    on_device = event.device_type.name == "CUDA"
    return on_device and not event.name.startswith(("Memcpy", "Memset"))


def _is_outermost(event: FunctionEvent) -> bool:
    if not _is_operator(event):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return False
        parent = parent.cpu_parent
    return True


def _is_operator(event: FunctionEvent) -> bool:
    """Operators carry their namespace, `aten::mm`; ranges that a user marks do not."""
    return "::" in event.name and event.device_type.name == "CPU"
