"""Detection: this machine, and trees captured from others."""

import math
from pathlib import Path

import psutil
import pytest
import torch

from foveal.hardware import detect as room
from foveal.hardware.detect import detect

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
cpu MHz\t\t: 2699.998
flags\t\t: fpu sse sse2 fma f16c avx avx2 avx512f avx512bw avx512vl avx512_bf16 amx_bf16 amx_tile
bogomips\t: 5399.99

processor\t: 1
model name\t: another
bogomips\t: 5399.99
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine() -> None:
    machine = detect()
    assert 1 <= machine.num_physical_cores <= machine.num_logical_cores <= (psutil.cpu_count() or 1)
    assert 0 < machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.torch_version == torch.__version__
    assert len(machine.gpus) == torch.cuda.device_count()
    assert detect() is machine


def test_thread_count_belongs_to_the_machine() -> None:
    before, threads = detect(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert detect().num_threads == threads + 1
        assert detect().fingerprint != before.fingerprint
    finally:
        torch.set_num_threads(threads)
    assert detect() == before


def test_x86() -> None:
    assert room.cpu_name(XEON) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert room.instruction_sets(XEON) == (
        *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
        *("amx_tile", "amx_bf16"),
    )


def test_aarch64() -> None:
    assert room.cpu_name(GRAVITON) == "Arm Neoverse-V1"
    sets = ("asimd", "asimdhp", "asimddp", "fphp", "bf16", "i8mm", "sve")
    assert room.instruction_sets(GRAVITON) == sets
    assert room.cpu_name(GRAVITON.replace("0xd40", "0xabc")) == "Arm implementer 0x41 part 0xabc"


@pytest.mark.parametrize(
    ("cpuinfo", "maximum", "expected"),
    [(XEON, "", 2.7e9), (XEON, "3800000\n", 3.8e9), (GRAVITON, "", 0.0), ("", "", 0.0)],
)
def test_frequency(tmp_path: Path, cpuinfo: str, maximum: str, expected: float) -> None:
    tree(tmp_path, {"sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": maximum})
    assert room.frequency_hz(tmp_path, cpuinfo) == expected


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu, (package, core) in enumerate([(0, 0), (0, 0), (0, 1), (1, 0)]):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        ids = {f"{folder}/physical_package_id": f"{package}\n", f"{folder}/core_id": f"{core}\n"}
        tree(tmp_path, ids)
    assert room.num_physical_cores(tmp_path, (0, 1)) == 1
    assert room.num_physical_cores(tmp_path, (0, 1, 2, 3)) == 3


def test_caches_shared_by_cores_count_once(tmp_path: Path) -> None:
    for cpu, shared in enumerate(["0-1", "0-1", "2-3"]):
        kinds = [("1", "Data", "48K", str(cpu)), ("1", "Instruction", "32K", str(cpu))]
        kinds += [("2", "Unified", "2048K", str(cpu)), ("3", "Unified", "32M", shared)]
        for index, (level, kind, size, cpus) in enumerate(kinds):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            names = ("level", "type", "size", "shared_cpu_list")
            fields = zip(names, (level, kind, size, cpus), strict=True)
            tree(tmp_path, {f"{folder}/{name}": f"{text}\n" for name, text in fields})
    sizes = (("L1d", 48 * 2**10), ("L2", 2 * 2**20))
    assert room.cache_bytes(tmp_path, (0, 1)) == (*sizes, ("L3", 32 * 2**20))
    assert room.cache_bytes(tmp_path, (0, 1, 2)) == (*sizes, ("L3", 64 * 2**20))


def test_limits_of_control_groups_2(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/memory.max": "1000\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/outer/cpu.max": "max 100000\n",
    }
    assert room.memory_limit(tree(tmp_path, files)) == 1000
    assert room.cpu_quota(tmp_path) == 1.5


def test_limits_of_control_groups_1_in_a_container(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert room.memory_limit(tree(tmp_path, files)) == 2000
    assert room.cpu_quota(tmp_path) == 0.5


def test_no_limits(tmp_path: Path) -> None:
    unlimited = {
        "proc/self/cgroup": "2:cpu:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    tree(tmp_path, unlimited)
    assert room.memory_limit(tmp_path) == room.cpu_quota(tmp_path) == math.inf
