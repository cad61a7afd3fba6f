"""What this machine is: `Machine`, found by `detect.detect()`. Facts only, no measurements."""

import dataclasses
import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One graphics processor."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability, for example (9, 0)."""
    num_multiprocessors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine: processor, memory, graphics processors and PyTorch. Hashable."""

    cpu_name: str
    architecture: str
    """x86_64 or aarch64."""
    instruction_sets: tuple[str, ...]
    """Those that kernels care about, for example ("avx2", "fma", "avx512f", "avx512_bf16")."""
    num_physical_cores: int
    num_logical_cores: int
    """Cores that this process may run on (affinity and container limits included)."""
    frequency_hz: float
    """Highest clock that the system reports; 0 if it reports none."""
    cache_bytes: tuple[tuple[str, int], ...]
    """("L1d", bytes per core), ("L2", bytes per core), ("L3", bytes in all)."""
    memory_bytes: int
    """Memory that this process may use (container limit included)."""
    gpus: tuple[Gpu, ...]
    torch_version: str
    num_threads: int
    """Threads that PyTorch uses within an operator."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits by which measurements of this machine are filed.

        Leaves out `memory_bytes`: no speed depends on it, and it differs from boot to boot.
        """
        facts = repr(dataclasses.replace(self, memory_bytes=0))
        return hashlib.sha256(facts.encode()).hexdigest()[:12]
