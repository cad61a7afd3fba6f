"""Measures what this machine can do: the peaks against which every time is held.

    matmul    C = A @ B of square matrices, per dtype, as PyTorch computes it     2 n^3 FLOP
    read      the sum of a float32 vector far larger than the caches              its bytes
    overhead  a one-element addition in a Python loop                             one call

All are interleaved (`timer`), and a peak is the best sample that nobody disturbed: a roof is what
can be reached. Medians follow from the raw samples, which are kept with the result, one file for
each machine and device. On a busy machine a peak can come out far too low; it is then marked so,
and does not replace one that was measured undisturbed.
"""

import datetime
from collections.abc import Callable
from functools import partial

import torch

from foveal.core.dtypes import FLOATS, dtype_name
from foveal.core.errors import ArgumentError
from foveal.core.log import warn_once
from foveal.hardware import store
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Peaks
from foveal.hardware.timer import Samples, interleave, time_one

FORMAT = 1
REMEDY = "`foveal doctor --calibrate` makes a new one"

PRODUCT_S = 0.05
"""A matrix product is made larger until it takes this long, or reaches its largest size."""
LARGEST_PRODUCT = {"cpu": 2048, "cuda": 8192}
READ_BYTES = 2**28
"""At least this much is read, and at least four times the largest cache."""
ADDITIONS = 200
"""Small operators in one sample."""
BUDGET_S = 4.0
BUSY = "others kept the machine busy, so the true peaks are higher"


def calibrate(
    machine: Machine,
    device: str = "cpu",
    *,
    budget_s: float = BUDGET_S,
    on_round: Callable[[], object] = lambda: None,
) -> Peaks:
    """Measure the peaks of `device` for about `budget_s` seconds, keep them on disk, return them.

    Takes memory for four pairs of matrices and one vector, under 1 GiB on a processor.
    `on_round` is called after each round of measurements. Raises `ArgumentError` if the machine
    has no such device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not machine.gpus):
        raise ArgumentError("device", repr(device), "cpu, or cuda where PyTorch sees a device")
    matrices = {dtype_name(dtype): _largest_matrix(dtype, device) for dtype in FLOATS}
    vector = torch.ones(_read_bytes(machine) // 4, device=device)
    one = torch.ones((), device=device)

    def add() -> None:
        for _ in range(ADDITIONS):
            torch.add(one, one)

    runs = {name: partial(torch.matmul, matrix, matrix) for name, matrix in matrices.items()}
    samples = interleave(
        {**runs, "read": vector.sum, "overhead": add},
        budget_s=budget_s,
        device=device,
        on_round=on_round,
    )
    flops = {name: 2 * m.shape[0] ** 3 / samples[name].best_s for name, m in matrices.items()}
    found = Peaks(
        device=device,
        matmul_flops=tuple(flops.items()),
        bandwidth_bytes=vector.nbytes / samples["read"].best_s,
        overhead_s=samples["overhead"].best_s / ADDITIONS,
        source=_source(samples),
    )
    disturbed = any(s.disturbed for s in samples.values())
    known = load_calibration(machine, device)
    if not disturbed or known is None or BUSY in known.source:
        sizes = {name: matrix.shape[0] for name, matrix in matrices.items()}
        _save(machine, found, samples, {**sizes, "read": vector.nbytes, "overhead": ADDITIONS})
    return found


def load_calibration(machine: Machine, device: str = "cpu") -> Peaks | None:
    """The peaks measured on this machine; None if it has not been calibrated."""
    name = store.file_name(f"calibration-{device}", machine)
    content = store.load(name, FORMAT, REMEDY)
    if content is None:
        return None
    try:
        fields = content["peaks"]
        flops = {str(dtype): float(rate) for dtype, rate in fields["matmul_flops"].items()}
        return Peaks(
            device=device,
            matmul_flops=tuple(flops.items()),
            bandwidth_bytes=float(fields["bandwidth_bytes"]),
            overhead_s=float(fields["overhead_s"]),
            source=str(fields["source"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        warn_once(f"{name} is not a calibration and is ignored ({error!r}); {REMEDY}")
        return None


def _largest_matrix(dtype: torch.dtype, device: str) -> torch.Tensor:
    """A square matrix whose product with itself takes about `PRODUCT_S`, or is as large as is
    sensible here: some processors need seconds for what others do in milliseconds.

    Tried on one thread, because threads that others interrupt wait for each other, which can make
    a small product look a hundred times slower than it is.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = 256
        while True:
            matrix = torch.rand((size, size), device=device).to(dtype)
            run = partial(torch.matmul, matrix, matrix)
            seconds = min(time_one(run, device) for _ in range(3)) / num_threads
            # Twice the size takes eight times as long.
            if size >= LARGEST_PRODUCT[device] or seconds * 8 > 2 * PRODUCT_S:
                return matrix
            size *= 2
    finally:
        torch.set_num_threads(num_threads)


def _read_bytes(machine: Machine) -> int:
    largest_cache = max((size for _, size in machine.cache_bytes), default=0)
    return min(max(READ_BYTES, 4 * largest_cache), machine.memory_bytes // 8) // 4 * 4


def _source(samples: dict[str, Samples]) -> str:
    disturbed = any(s.disturbed for s in samples.values())
    fewest = min(len(s.counted) for s in samples.values())
    text = f"measured {datetime.date.today()}, best of {fewest} samples or more"
    return f"{text}; {BUSY}" if disturbed else text


def _save(
    machine: Machine, found: Peaks, samples: dict[str, Samples], sizes: dict[str, int]
) -> None:
    content = {
        "cpu": machine.cpu_name,
        "gpus": [gpu.name for gpu in machine.gpus],
        "torch": machine.torch_version,
        "num_threads": machine.num_threads,
        "peaks": {
            "matmul_flops": dict(found.matmul_flops),
            "bandwidth_bytes": found.bandwidth_bytes,
            "overhead_s": found.overhead_s,
            "source": found.source,
        },
        "samples": {
            name: {"size": sizes[name], "seconds": s.seconds, "others": s.others}
            for name, s in samples.items()
        },
    }
    store.save(store.file_name(f"calibration-{found.device}", machine), FORMAT, content)
