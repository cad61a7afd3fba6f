"""What scratch memory is worth: attention over pages with an arena, and with tensors made anew.

A decode step reads all pages of a sequence tile by tile: a tile is gathered from its pages, decoded
to what attention computes with, attended to and merged. Where the gathered and the decoded tile lie
is the only difference between the two that are timed in turn. Page faults are those of the process
(`getrusage`): the system hands large allocations out untouched, and each page's first write faults.
"""

import resource
from collections.abc import Iterator
from functools import partial

import torch

from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.bench.attention import thinned
from foveal.bench.finding import Check, Finding, of_samples
from foveal.bench.record import Run
from foveal.hardware.timer import interleave
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape
from foveal.kv.paged import PagedCache
from foveal.kv.store import PagedView, PageStore

SHAPE = CacheShape(num_layers=1, batch=1, num_kv_heads=8, head_dim=128, value_dim=128)
SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, causal=True)
"""One layer of an 8B Llama."""
PAGE_SIZE = 64
FORMATS = ("bfloat16", "int8", "int4")
BUDGET_S = 6.0
"""For the samples of one format, both ways together."""
STEADY_CALLS = 20
"""In which allocations and page faults are counted."""


class Anew(Arena):
    """No arena: every tensor is allocated when it is asked for."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Arena.take`."""
        self._requests += 1
        self._allocations += 1
        return torch.empty(shape, dtype=dtype)


def measure(num_tokens: int, budget_s: float, run: Run) -> Iterator[Finding]:
    """Both, for every format, over a sequence of so many tokens."""
    for format in FORMATS:
        view, q = _filled(format, num_tokens)
        arenas: dict[str, Arena] = {"arena": Arena(), "anew": Anew()}
        calls = {name: partial(_decode, view, q, arena) for name, arena in arenas.items()}
        samples = interleave(calls, budget_s=budget_s)
        for name, arena in arenas.items():
            before, faults = arena.stats, _page_faults()
            for _ in range(STEADY_CALLS):
                calls[name]()
            faults, after = _page_faults() - faults, arena.stats
            allocations = (after.allocations - before.allocations) / STEADY_CALLS
            check = Check(
                what="allocations of a step in steady state", value=allocations, at_most=0.0
            )
            yield Finding(
                benchmark="kv",
                part="arena",
                title=(
                    f"A decode step over {num_tokens:,} tokens in pages of {PAGE_SIZE}: "
                    f"{SPEC}, float32"
                ),
                subject={"format": format, "temporaries": name},
                values={
                    "step_s": samples[name].median_s,
                    "quartiles_s": samples[name].spread_s,
                    "requests": (after.requests - before.requests) / STEADY_CALLS,
                    "allocations": allocations,
                    "page_faults": faults / STEADY_CALLS,
                    "scratch_bytes": float(after.peak_bytes) if name == "arena" else None,
                },
                checks=(check,) if name == "arena" else (),
                curve=of_samples(thinned(samples[name])),
                run=run,
            )


def _filled(format: str, num_tokens: int) -> tuple[PagedView, torch.Tensor]:
    """What attention sees of a full sequence, and a query at its end [1, H, 1, D]."""
    num_pages = -(-num_tokens // PAGE_SIZE)
    store = PageStore(SHAPE, num_pages, PAGE_SIZE, key_format=format, value_format=format)
    cache, rng = PagedCache(store), torch.Generator().manual_seed(0)
    for start in range(0, num_tokens, 1024):
        shape = (1, SHAPE.num_kv_heads, min(1024, num_tokens - start), SHAPE.head_dim)
        k, v = (torch.randn(shape, generator=rng) for _ in "kv")
        cache.append(0, k, v)
    return cache.view(0), torch.randn(1, SPEC.num_heads, 1, SHAPE.head_dim, generator=rng)


def _decode(view: PagedView, q: torch.Tensor, arena: Arena) -> torch.Tensor:
    view.store.arena = arena
    last = view.lengths.unsqueeze(1) - 1
    with torch.inference_mode():
        # By name, because the native kernel reads pages where they lie and needs no scratch memory.
        return attend_view(q, view, SPEC, q_positions=last, backend="fused")


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
