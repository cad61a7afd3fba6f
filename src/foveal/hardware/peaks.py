"""Peaks of a device: those that `foveal doctor --calibrate` measured, else nominal ones.

Nominal figures come from what the system says about itself and from the assumptions named in
`Peaks.source`; they are labelled as nominal wherever they are shown. Floating-point operations per
clock and core follow from the width of the vectors and two fused multiply-adds at once, as the
vendors' optimisation manuals give for server cores.
"""

from functools import lru_cache

import torch

from foveal.core.errors import ArgumentError
from foveal.hardware import store
from foveal.hardware.calibrate import load_calibration
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Peaks

ASSUMED_HZ = 2.5e9
"""Where the system reports no clock."""
ASSUMED_CORE_BANDWIDTH = 10e9
"""Bytes per second that one core streams from memory; 8 to 14 GB/s on servers since 2017."""
ASSUMED_MAX_BANDWIDTH = 200e9
"""Bytes per second at which the memory of one socket is taken to saturate."""
ASSUMED_OVERHEAD_S = 5e-6
"""One small PyTorch operator, from Python."""
FMA_PORTS = 2

CUDA_LANES = 128
"""float32 multiply-adds per clock of one multiprocessor since compute capability 8.6."""
CUDA_TENSOR_FLOPS = {7: 1024, 8: 2048}
"""16-bit FLOP per clock of one multiprocessor's tensor cores, by major compute capability."""
CUDA_TENSOR_FLOPS_SINCE_HOPPER = 4096


def peaks(machine: Machine, device: str = "cpu") -> Peaks:
    """What `device` ("cpu" or "cuda") of this machine can do: calibrated if it has been
    calibrated, else nominal. Raises `ArgumentError` if the machine has no such device."""
    return _peaks(machine, device, store.stamp())


@lru_cache(maxsize=32)
def _peaks(machine: Machine, device: str, stamp: object) -> Peaks:
    return load_calibration(machine, device) or nominal(machine, device)


def nominal(machine: Machine, device: str = "cpu") -> Peaks:
    """Peaks from the system's facts and stated assumptions, without measuring."""
    if device == "cpu":
        return _nominal_cpu(machine)
    if device == "cuda" and machine.gpus:
        return _nominal_cuda(machine)
    accepted = "cpu or cuda" if machine.gpus else "cpu (PyTorch sees no CUDA device here)"
    raise ArgumentError("device", repr(device), accepted)


def _nominal_cpu(machine: Machine) -> Peaks:
    hz = machine.frequency_hz or ASSUMED_HZ
    cores = min(machine.num_physical_cores, machine.num_threads)
    lanes = _vector_bytes(machine) // 4
    single = cores * hz * lanes * FMA_PORTS * 2
    half = {name: single * _speed_of_half(machine, name) for name in ("bfloat16", "float16")}
    flops = {"float32": single, "float64": single / 2, **half}
    return Peaks(
        device="cpu",
        matmul_flops=tuple(flops.items()),
        bandwidth_bytes=min(cores * ASSUMED_CORE_BANDWIDTH, ASSUMED_MAX_BANDWIDTH),
        overhead_s=ASSUMED_OVERHEAD_S,
        source=(
            f"nominal: {cores} cores x {hz / 1e9:.1f} GHz x {lanes} float32 lanes x "
            f"{FMA_PORTS} FMA ports x 2 FLOP; {ASSUMED_CORE_BANDWIDTH / 1e9:.0f} GB/s a core and "
            f"{ASSUMED_OVERHEAD_S * 1e6:.0f} µs a call assumed"
        ),
    )


def _vector_bytes(machine: Machine) -> int:
    sets = machine.instruction_sets
    if "avx512f" in sets:
        return 64
    return 32 if "avx2" in sets or "sve" in sets else 16


def _speed_of_half(machine: Machine, name: str) -> float:
    """How much faster than float32 a 16-bit matrix product runs, from the instruction sets;
    0.25 where values must be widened one by one."""
    sets = set(machine.instruction_sets)
    tile = "amx_bf16" if name == "bfloat16" else "amx_fp16"
    direct = {"bfloat16": {"avx512_bf16", "bf16"}, "float16": {"avx512_fp16", "asimdhp"}}
    if tile in sets:
        return 16.0
    return 2.0 if direct[name] & sets else 0.25


def _nominal_cuda(machine: Machine) -> Peaks:
    gpu = torch.cuda.get_device_properties(0)
    clocks = gpu.multi_processor_count * gpu.clock_rate * 1e3
    tensor = CUDA_TENSOR_FLOPS.get(gpu.major, CUDA_TENSOR_FLOPS_SINCE_HOPPER)
    flops = {
        "float32": clocks * CUDA_LANES * 2,
        "float64": clocks * CUDA_LANES,
        "bfloat16": clocks * tensor,
        "float16": clocks * tensor,
    }
    # Two transfers per memory clock; the bus width is in bits.
    bandwidth = 2 * gpu.memory_clock_rate * 1e3 * gpu.memory_bus_width / 8
    return Peaks(
        device="cuda",
        matmul_flops=tuple(flops.items()),
        bandwidth_bytes=bandwidth,
        overhead_s=ASSUMED_OVERHEAD_S,
        source=(
            f"nominal: {gpu.multi_processor_count} multiprocessors x {gpu.clock_rate / 1e6:.2f} "
            f"GHz x {tensor} 16-bit FLOP (float32: {CUDA_LANES} lanes x 2); memory clock x bus "
            f"width x 2; {ASSUMED_OVERHEAD_S * 1e6:.0f} µs a call assumed"
        ),
    )
