"""What is this machine? `detect()` reads it from the system; nothing is measured.

Linux keeps the facts in text files: `/proc/cpuinfo` (name, instruction sets), `/sys` (caches,
topology, clocks), control groups of version 1 and 2 (what a container may use). Each reader takes
the root of the tree it reads, so that a tree captured elsewhere reads just as well. Where a file
is missing, psutil's answer or an honest 0 stands in.
"""

import math
import os
import platform
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from foveal.hardware.profile import Gpu, Machine

X86_SETS: tuple[str, ...] = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
X86_SETS += ("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni")
X86_SETS += ("amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
ARM_SETS: tuple[str, ...] = ("asimd", "asimdhp", "asimddp", "fphp", "bf16", "i8mm")
ARM_SETS += ("sve", "sve2", "svebf16", "sme", "sme2")
KNOWN_SETS = X86_SETS + ARM_SETS
"""Instruction sets that attention kernels can make use of, under the names Linux gives them."""

ARM_CORES = {
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
    ("0x41", "0xd83"): "Arm Neoverse-V3AE",
    ("0x41", "0xd84"): "Arm Neoverse-V3",
    ("0x41", "0xd8e"): "Arm Neoverse-N3",
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0xc0", "0xac3"): "Ampere-1",
}
"""(implementer, part) -> name; Arm kernels print numbers where x86 prints a model name."""

ROOT = Path("/")


def detect() -> Machine:
    """This machine as it is now; read once for each number of threads PyTorch is set to."""
    return _detect(torch.get_num_threads())


@lru_cache
def _detect(num_threads: int) -> Machine:
    cpuinfo = _read(ROOT / "proc/cpuinfo")
    cpus = allowed_cpus()
    num_logical = math.ceil(min(len(cpus), cpu_quota(ROOT)))
    return Machine(
        cpu_name=cpu_name(cpuinfo),
        architecture=platform.machine(),
        instruction_sets=instruction_sets(cpuinfo),
        num_physical_cores=min(num_logical, num_physical_cores(ROOT, cpus)),
        num_logical_cores=num_logical,
        frequency_hz=frequency_hz(ROOT, cpuinfo),
        cache_bytes=cache_bytes(ROOT, cpus),
        memory_bytes=int(min(psutil.virtual_memory().total, memory_limit(ROOT))),
        gpus=_gpus(),
        torch_version=torch.__version__,
        num_threads=num_threads,
    )


def allowed_cpus() -> tuple[int, ...]:
    """Numbers of the logical cores that this process may be scheduled on."""
    if os.name == "posix" and platform.system() == "Linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(psutil.cpu_count() or 1))


def cpu_name(cpuinfo: str) -> str:
    """The processor's name, from the text of `/proc/cpuinfo`."""
    named = _field(cpuinfo, "model name")
    if named:
        return named
    implementer, part = _field(cpuinfo, "CPU implementer"), _field(cpuinfo, "CPU part")
    if part:
        fallback = f"Arm implementer {implementer} part {part}"
        return ARM_CORES.get((implementer, part), fallback)
    return platform.processor() or platform.machine()


def instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Those of `KNOWN_SETS` that the processor has, in that order."""
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    return tuple(name for name in KNOWN_SETS if name in flags)


def frequency_hz(root: Path, cpuinfo: str) -> float:
    """The highest clock the system admits to, else (x86) that of the time stamp counter.

    The current clock would differ between two readings; the time stamp counter runs at the base
    clock, and bogomips is twice that. Rounded to 0.1 GHz so that two boots agree.
    """
    kilohertz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if kilohertz:
        return float(kilohertz) * 1e3
    if _field(cpuinfo, "flags") and (bogomips := _field(cpuinfo, "bogomips")):
        return round(float(bogomips) / 2 / 100) * 1e8
    return 0.0


def num_physical_cores(root: Path, cpus: tuple[int, ...]) -> int:
    """Distinct cores among `cpus`; two hardware threads of one core count once."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
        if not core:
            return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
        cores.add((package.strip(), core.strip()))
    return max(1, len(cores))


def cache_bytes(root: Path, cpus: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """("L1d", per core), ("L2", per core), ("L3", all of those that `cpus` reach)."""
    sizes: dict[str, int] = {}
    third_level: dict[str, int] = {}
    for cpu in cpus:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            level, kind, size, shared = (
                _read(index / name).strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind == "Instruction" or not size:
                continue
            if level == "3":
                third_level[shared] = _kib(size)
            else:
                sizes.setdefault(f"L{level}d" if kind == "Data" else f"L{level}", _kib(size))
    if third_level:
        sizes["L3"] = sum(third_level.values())
    return tuple(sizes.items())


def memory_limit(root: Path) -> float:
    """Bytes that control groups allow this process; infinity if they set no limit."""
    limits = [
        float(text)
        for folder in _control_groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read(folder / name).strip()) and text != "max"
    ]
    return min(limits, default=math.inf)


def cpu_quota(root: Path) -> float:
    """Cores' worth of time that control groups allow this process; infinity if unlimited."""
    quotas = []
    for folder in _control_groups(root, "cpu"):
        new = _read(folder / "cpu.max").split()
        old = [_read(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
        quota, period = new if len(new) == 2 else old
        if quota not in ("", "max", "-1"):
            quotas.append(float(quota) / float(period))
    return min(quotas, default=math.inf)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that hold this process, innermost first.

    Inside a container the recorded path may not exist; its mount then shows the container's own
    group at the top, which is always visited.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for top in tops:
            for group in (inner, *inner.parents):
                yield top / group


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(
        Gpu(
            name=gpu.name,
            memory_bytes=gpu.total_memory,
            capability=(gpu.major, gpu.minor),
            num_multiprocessors=gpu.multi_processor_count,
        )
        for gpu in found
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _kib(text: str) -> int:
    """`1024K` or `32M` -> bytes."""
    return int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10)
