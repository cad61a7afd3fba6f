"""`attend_paged` against dense attention: any page table, any format, queries of mixed lengths."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.operands import Operands
from foveal.attention.paged import attend_paged
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape
from foveal.kv.formats import FORMATS
from foveal.kv.store import PagedView, PageStore
from oracle import attention

SHAPE = CacheShape(num_layers=2, batch=1, num_kv_heads=2, head_dim=8, value_dim=6)


def spec(**fields) -> AttentionSpec:
    fields = {"causal": True, **fields}
    return AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, **fields)


SPECS = [
    spec(),
    spec(window=(5, None)),
    spec(window=(5, None), sinks=2),
    spec(chunk=7),
    spec(softcap=2.0, scale=0.5),
    spec(alibi=alibi_slopes(4)),
    spec(causal=False),
]


def fill(store: PageStore, rng: torch.Generator) -> None:
    """Write something into every page but 0, which holds what must never be seen."""
    pages, size = torch.arange(1, store.pool.num_pages), store.page_size
    for layer in range(2):
        k, v = (torch.randn(2, len(pages), size, dim, generator=rng) for dim in (8, 6))
        store.write_pages(layer, pages, k, v)
        store.write_pages(layer, torch.tensor([0]), k[:, :1] * torch.nan, v[:, :1] * torch.nan)


@dataclass
class Batch:
    """Packed queries and a view of random pages."""

    q: torch.Tensor
    view: PagedView
    bounds: list[int]
    positions: torch.Tensor

    @classmethod
    def draw(cls, store: PageStore, queries: list[tuple[int, int]], seed: int) -> "Batch":
        """`queries` are (how many, keys before them) of each sequence."""
        rng = torch.Generator().manual_seed(seed)
        fill(store, rng)
        size = store.page_size
        lengths = [before + count for count, before in queries]
        columns = max((-(-length // size) for length in lengths), default=0) + 1
        table = torch.full((len(queries), columns), -1)
        starts = torch.zeros_like(table)
        for row, length in enumerate(lengths):
            used = -(-length // size)
            # Pages lie anywhere, in any order, and may be shared; page 0 is the poisoned one.
            order = torch.randperm(columns, generator=rng)[:used]
            table[row, order] = torch.randint(1, store.pool.num_pages, (used,), generator=rng)
            starts[row, order] = torch.arange(used) * size
        view = PagedView(
            store=store,
            layer=1,
            dtype=torch.float32,
            table=table,
            starts=starts,
            lengths=torch.tensor(lengths, dtype=torch.int64),
        )
        counts = [count for count, _ in queries]
        bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
        places = [torch.arange(count) + before for count, before in queries]
        positions = torch.cat([*places, torch.empty(0, dtype=torch.int64)])
        return cls(torch.randn(sum(counts), 4, 8, generator=rng), view, bounds, positions)

    def dense(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, decoded and put in order: [1, Hkv, length, D]."""
        used = self.view.table[row] >= 0
        order = self.view.starts[row][used].argsort()
        store, length = self.view.store, int(self.view.lengths[row])
        with store.arena.frame():
            pages = store.read(1, self.view.table[row][used][order], torch.float32)
            return tuple(x.flatten(1, 2)[None, :, :length].clone() for x in pages)

    def run(self, spec: AttentionSpec, **options) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens = torch.tensor(self.bounds)
        return attend_paged(self.q, self.view, spec, cu_seqlens, self.positions, **options)

    def check(self, spec: AttentionSpec, backend: str, sinks: torch.Tensor | None = None) -> None:
        out, lse = self.run(spec, backend=backend, sink_logits=sinks)
        for row, (a, b) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            q = self.q[a:b].transpose(0, 1)[None]
            operands = Operands(q_positions=self.positions[a:b], sink_logits=sinks)
            exact, exact_lse = attention(q, *self.dense(row), spec, operands)
            for ours, theirs in ((out, exact), (lse, exact_lse)):
                ours = ours[a:b].transpose(0, 1)[None].double()
                assert torch.allclose(ours, theirs, rtol=1e-5, atol=2e-5), (row, backend)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    page_size=st.sampled_from([1, 3, 8]),
    queries=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 1, 5, 12]), st.integers(0, 40)), max_size=5
    ),
    which=st.sampled_from(SPECS),
    backend=st.sampled_from(["unfused", "flash"]),
)
def test_any_page_table_equals_dense(format, seed, page_size, queries, which, backend) -> None:
    store = PageStore(SHAPE, 12, page_size, key_format=format.name, value_format=format.name)
    Batch.draw(store, queries, seed).check(which, backend)


@pytest.mark.parametrize("backend", ["auto", "unfused", "flash"])
def test_several_tiles_merge(backend: str) -> None:
    store = PageStore(SHAPE, 64, 128)
    Batch.draw(store, [(1, 3000), (40, 1500), (1, 3000), (1, 7)], 0).check(spec(), backend)


def test_sink_logits_count_once_over_all_tiles() -> None:
    store = PageStore(SHAPE, 64, 128)
    Batch.draw(store, [(1, 3000), (3, 4)], 0).check(
        spec(), "unfused", sinks=torch.tensor([0.5, -1.0, 7.0, 3.0])
    )


def test_never_the_whole_cache_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    store = PageStore(SHAPE, 200, 64, key_format="int8", value_format="int8")
    batch = Batch.draw(store, [(1, 10_000)], 0)
    read, most = store.read, 0

    def watched(layer: int, pages: torch.Tensor, dtype: torch.dtype):
        nonlocal most
        most = max(most, pages.numel() * store.page_size)
        return read(layer, pages, dtype)

    monkeypatch.setattr(store, "read", watched)
    batch.run(spec(), backend="unfused")
    assert 0 < most <= 1024


def test_bad_input_is_refused() -> None:
    store = PageStore(SHAPE, 8, 4)
    batch = Batch.draw(store, [(1, 6), (3, 0)], 0)
    q, view, positions = batch.q, batch.view, batch.positions
    cu_seqlens = torch.tensor(batch.bounds)
    for call, message in (
        ((q[0], view, spec(), cu_seqlens, positions), "q: got shape"),
        ((q, view, spec(), cu_seqlens, positions[1:]), "q_positions: got shape"),
        ((q, view, spec(), cu_seqlens[1:], positions), "cu_seqlens_q: got bounds from 1"),
        ((q, view, spec(), torch.tensor([0, 4]), positions), "cu_seqlens_q: got 2 bounds"),
        ((q.double(), view, spec(), cu_seqlens, positions), "k: got dtype torch.float32"),
        ((q, view, spec(dropout=0.1), cu_seqlens, positions), "spec: got dropout 0.1"),
        ((q[..., :4], view, spec(), cu_seqlens, positions), "q: got shape"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attend_paged(*call)
    table, fields = view.table, {"store": store, "layer": 0, "dtype": torch.float32}
    for tensors, message in (
        ((table + 8, view.starts, view.lengths), "table: got numbers from"),
        ((table[0], view.starts, view.lengths), "table: got shape"),
        ((table, view.starts[:, 1:], view.lengths), "starts: got shape"),
        ((table, view.starts, view.lengths[1:]), "lengths: got shape"),
    ):
        names = ("table", "starts", "lengths")
        with pytest.raises(ArgumentError, match=message):
            PagedView(**fields, **dict(zip(names, tensors, strict=True)))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4-channel"])
def test_gathering_pages_allocates_nothing_once_warm(format: str) -> None:
    store = PageStore(SHAPE, 64, 16, key_format=format, value_format=format)
    batch = Batch.draw(store, [(1, 2000), (1, 1500)], 0)
    batch.run(spec(), backend="unfused")
    warm = store.arena.stats
    for _ in range(3):
        batch.run(spec(), backend="unfused")
    after = store.arena.stats
    assert after.requests > warm.requests
    assert (after.allocations, after.nbytes) == (warm.allocations, warm.nbytes)
