"""How much memory keys and values take over the length of a text: all of them, or a stream's.

Batch-style: one tensor a layer with room for the whole text (`ContiguousCache`). Streaming: sinks
and a window in a ring (`RingCache`). What is measured is allocated for real, in a process of its
own so that no earlier allocation is reused unseen, filled by appending so that every page of memory
is touched, and read from the operating system as the growth of the resident memory. What would take
more bytes of appending than the cap is computed from the very tensors, on PyTorch's "meta" device,
and marked so.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import psutil
import torch

from foveal.bench.finding import Check, Finding
from foveal.bench.memory import trim
from foveal.bench.record import Run
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.contiguous import ContiguousCache
from foveal.kv.ring import RingCache

DTYPE = torch.bfloat16
WINDOW = Window(4092, 4)
LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
CHUNK = 512
DIFFERENCE = 0.05
"""Between what is measured and what is computed; of measurements above `JUDGED_BYTES`, because
below that what the process does beside counts."""
JUDGED_BYTES = 32 * 2**20
SHARE_OF_AVAILABLE = 0.5


def _shape(num_layers: int, num_kv_heads: int, head_dim: int) -> CacheShape:
    return CacheShape(
        num_layers=num_layers,
        batch=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
    )


SHAPES: dict[str, CacheShape] = {
    "bundled: 4 layers, 2 heads of 64": _shape(4, 2, 64),
    "135M: 30 layers, 3 heads of 64": _shape(30, 3, 64),
    "1B: 16 layers, 8 heads of 64": _shape(16, 8, 64),
    "8B: 32 layers, 8 heads of 128": _shape(32, 8, 128),
}
"""KV heads of the bundled model, SmolLM2 135M, and Llama 3.2 1B and 3.1 8B."""

STYLES = ("whole text", "stream")


def measure(lengths: tuple[int, ...], cap_bytes: int, run: Run) -> Iterator[Finding]:
    """Every model at every length in both styles; `cap_bytes` of keys and values are appended for
    a measurement at most."""
    if min(lengths) < 1 or cap_bytes < 0:
        raise ArgumentError("lengths", lengths, "integers of at least 1, and a cap of 0 or more")
    # Imports what it needs once; every child is forked from there, before any tensor exists.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for model, shape in SHAPES.items():
        for length in lengths:
            for style in STYLES:
                resident = None
                if _measurable(shape, style, length, cap_bytes):
                    with ProcessPoolExecutor(1, mp_context=context) as apart:
                        resident = apart.submit(fill, shape, style, length).result()
                yield _finding(model, shape, style, length, resident, run)


def allocate(
    shape: CacheShape, style: str, length: int, device: str = "cpu"
) -> ContiguousCache | RingCache:
    """An empty cache for a text of so many tokens."""
    if style == "stream":
        return RingCache(shape, WINDOW, dtype=DTYPE, device=device)
    return ContiguousCache(shape, capacity=length, dtype=DTYPE, device=device)


def fill(shape: CacheShape, style: str, length: int) -> int:
    """By how many bytes the resident memory of this process grows with a full cache."""
    torch.set_num_threads(1)
    size = (shape.batch, shape.num_kv_heads, min(CHUNK, length), shape.head_dim)
    k = torch.ones(size, dtype=DTYPE)
    allocate(shape, style, 1).append(0, k[:, :, :1], k[:, :, :1])  # loads what an append needs
    process = psutil.Process()
    before = process.memory_info().rss
    cache = allocate(shape, style, length)
    for start in range(0, length, CHUNK):
        part = k[:, :, : min(CHUNK, length - start)]
        for layer in range(shape.num_layers):
            cache.append(layer, part, part)
    trim()  # of what single steps needed
    after = process.memory_info().rss
    assert cache.length == length
    return int(after - before)


def _measurable(shape: CacheShape, style: str, length: int, cap_bytes: int) -> bool:
    appended = length * shape.slot_elements * DTYPE.itemsize
    held = allocate(shape, style, length, "meta").nbytes
    available = psutil.virtual_memory().available * SHARE_OF_AVAILABLE
    return appended <= cap_bytes and held <= available


def _finding(
    model: str, shape: CacheShape, style: str, length: int, resident: int | None, run: Run
) -> Finding:
    computed = allocate(shape, style, length, "meta").nbytes
    checks: tuple[Check, ...] = ()
    if resident is not None and computed > JUDGED_BYTES:
        off = abs(resident / computed - 1)
        what = "what was measured over what was computed: difference"
        checks = (Check(what=what, value=off, at_most=DIFFERENCE),)
    return Finding(
        benchmark="kv",
        part="memory",
        title=(
            f"Memory of keys and values in bfloat16; a stream keeps {WINDOW.sinks} sinks and a "
            f"window of {WINDOW.size}"
        ),
        subject={
            "model": model,
            "tokens": f"{length:,}",
            "style": style,
            "basis": "computed" if resident is None else "measured",
        },
        values={
            "resident_bytes": float(computed if resident is None else resident),
            "tensors_bytes": float(computed),
        },
        checks=checks,
        curve={},
        run=run,
    )
