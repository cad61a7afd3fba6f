"""The shared library of native kernels: found, loaded, and asked which instruction set it uses.

The library holds every kernel once per instruction set (sse2, avx2, avx512; neon on aarch64) and
uses the best that the processor can run. It needs neither PyTorch's headers nor an OpenMP runtime
of its own: its functions take plain pointers, and its threads are those of the runtime that PyTorch
has loaded, so the two never fight for the cores.

Where there was no C++ compiler when the package was installed, there is no library: `load` says so
with `NotBuilt`, `foveal.kernels.available` puts it into words, and callers use portable kernels.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch  # noqa: F401  brings the OpenMP runtime that the library looks for

import foveal.kernels.cpu
from foveal.core.errors import ArgumentError

VERSION = 7
"""Of the library's functions and structures; a library that says another is not called."""

_NAME = "libfoveal_cpu.so"


class NotBuilt(Exception):
    """There is no native library, or none that can be used; says why."""


@cache
def load() -> ctypes.CDLL:
    """The library. Raises `NotBuilt` if it is missing, broken, or from an older build."""
    return open_library(_find())


def open_library(path: Path) -> ctypes.CDLL:
    """The library in the file `path`, its functions declared."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"{path} cannot be loaded: {error}") from error
    library.foveal_version.restype = ctypes.c_int64
    if library.foveal_version() != VERSION:
        raise NotBuilt(f"{path} is of version {library.foveal_version()}, not {VERSION}")
    library.foveal_isa_name.restype = library.foveal_isa.restype = ctypes.c_char_p
    library.foveal_isa_name.argtypes = [ctypes.c_int64]
    library.foveal_use_isa.argtypes = [ctypes.c_char_p]
    library.foveal_use_isa.restype = library.foveal_has_threads.restype = ctypes.c_bool
    library.foveal_evaluate.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 2, ctypes.c_int64]
    library.foveal_evaluate.restype = library.foveal_attention_forward.restype = None
    library.foveal_attention_backward.restype = ctypes.c_bool
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.foveal_attention_pages.argtypes = [pointer, pointer]
    library.foveal_attention_pages.restype = None
    library.foveal_linear.argtypes = [pointer, pointer, integer, integer, pointer, integer]
    library.foveal_linear.restype = None
    for function in (library.foveal_rms_norm, library.foveal_rotate):
        function.argtypes, function.restype = [pointer, integer], None
    return library


def isas() -> tuple[str, ...]:
    """The instruction sets that the library has and this processor can run, best last."""
    return tuple(_isas(load()))


def isa() -> str:
    """The instruction set in use."""
    name: bytes = load().foveal_isa()
    return name.decode()


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Use another instruction set for a while, to test it. Not while other threads compute."""
    before = isa()
    if not load().foveal_use_isa(name.encode()):
        raise ArgumentError("isa", repr(name), ", ".join(isas()))
    try:
        yield
    finally:
        load().foveal_use_isa(before.encode())


def _isas(library: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while name := library.foveal_isa_name(index):
        yield name.decode()
        index += 1


def _find() -> Path:
    """An editable install has the sources in one folder and what was built in another."""
    for folder in foveal.kernels.cpu.__path__:
        path = Path(folder) / _NAME
        if path.exists():
            return path
    raise NotBuilt("not in this build: there was no C++ compiler")
