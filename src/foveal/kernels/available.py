"""Which native kernels are here, and what to do about those that are not.

`import foveal` and every computation work without them; they are faster, not other.
"""

from dataclasses import dataclass
from functools import cache

from foveal.kernels.cpu import library

_SPOKEN = {"sse2": "SSE2", "avx2": "AVX2", "avx512": "AVX-512", "neon": "NEON"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """The state of the native CPU kernels."""

    present: bool
    detail: str
    """The instruction set in use, as one says it, or why there are none."""
    remedy: str = ""
    """How to get them; empty if nothing needs to be done."""


def native() -> Native:
    """Whether the native CPU kernels can be used here."""
    try:
        found = library.load()
    except library.NotBuilt as reason:
        remedy = "install g++ 11 or clang 14, or newer, then install foveal again"
        return Native(present=False, detail=str(reason), remedy=remedy)
    threads = "PyTorch's threads" if found.foveal_has_threads() else "one thread, no OpenMP found"
    return Native(present=True, detail=f"{_SPOKEN[library.isa()]}, {threads}")


@cache
def present() -> bool:
    """The same in one word, and asked once."""
    return native().present


def native_isa() -> str | None:
    """The instruction set in use, as one says it ("AVX-512"); None without native kernels."""
    try:
        return _SPOKEN[library.isa()]
    except library.NotBuilt:
        return None
