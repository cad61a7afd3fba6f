"""The native attention over pages: every format, page size and instruction set, read in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from foveal.attention.operands import Operands
from foveal.attention.paged import attend_paged, attend_view, view_kernel
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.kernels import available
from foveal.kernels.cpu import library
from foveal.kv.cache import CacheShape, JoinedView, KVView, View, Window
from foveal.kv.formats import FORMATS
from foveal.kv.store import PagedView, PageStore
from properties import examples

pytestmark = pytest.mark.skipif(not available.native().present, reason="no native library")
ISAS = library.isas() if available.native().present else ()

NAMES = [format.name for format in FORMATS]
Result = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using_isa(request.param):
        yield request.param


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(heads: int = 4, kv_heads: int = 2, sizes: tuple[int, int] = (64, 32), **fields):
    fields = {"causal": True, **fields}
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=sizes[0], value_dim=sizes[1], **fields
    )


def filled(
    spec: AttentionSpec, formats: tuple[str, str], page_size: int, num_pages: int, rng
) -> PageStore:
    """Pages of random tokens; page 0 holds what must never be seen."""
    shape = CacheShape(
        num_layers=1,
        batch=1,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
    )
    store = PageStore(shape, num_pages, page_size, key_format=formats[0], value_format=formats[1])
    lead = (spec.num_kv_heads, num_pages, page_size)
    k, v = (torch.randn(*lead, dim, generator=rng) for dim in (spec.head_dim, spec.value_dim))
    k[:, 0] = v[:, 0] = torch.nan
    store.write_pages(0, torch.arange(num_pages), k, v)
    return store


def view_of(
    store: PageStore,
    lengths: list[int],
    rng,
    dtype: torch.dtype = torch.float32,
    window: Window | None = None,
    shuffled: bool = False,
) -> PagedView:
    """Sequences in random pages; with a window, without what it has passed."""
    size = store.page_size
    columns = max(-(-length // size) for length in lengths) + 1
    table = torch.full((len(lengths), columns), -1)
    starts = torch.zeros_like(table)
    for row, length in enumerate(lengths):
        parts = torch.arange(-(-length // size))
        if window is not None:
            parts = parts[
                ((parts + 1) * size > length - window.span) | (parts * size < window.sinks)
            ]
        places = torch.randperm(columns, generator=rng) if shuffled else torch.arange(columns)
        places = places[: len(parts)]
        table[row, places] = torch.randint(1, store.pool.num_pages, places.shape, generator=rng)
        starts[row, places] = parts * size
    return PagedView(
        store=store,
        layer=0,
        dtype=dtype,
        table=table,
        starts=starts,
        lengths=torch.tensor(lengths),
        window=window,
    )


def packed(spec: AttentionSpec, queries: list[tuple[int, int]], rng, dtype=torch.float32):
    """q and far_q [tokens, H, D], bounds, and positions: the last tokens of each sequence."""
    counts = [count for count, _ in queries]
    bounds = torch.tensor([0, *counts]).cumsum(0)
    places = [torch.arange(length - count, length) for count, length in queries]
    shape = (2, sum(counts), spec.num_heads, spec.head_dim)
    q, far_q = torch.randn(shape, generator=rng).to(dtype)
    return q, far_q, bounds, torch.cat(places)


def as_tiles(q, view: PagedView, spec, bounds, positions, **others) -> Result:
    """What the portable way gives, in float32 whatever the dtype of q and of the tiles."""
    view = replace(view, dtype=torch.float32)
    others = {name: x.float() for name, x in others.items()}
    return attend_paged(q.float(), view, spec, bounds, positions, backend="unfused", **others)


def assert_near(ours: Result, theirs: Result, dtype: torch.dtype = torch.float32) -> None:
    eps = torch.finfo(dtype).eps
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.isfinite().equal(exact.isfinite())
        seen = exact.isfinite()
        scale = float(exact[seen].abs().max()) if seen.any() else 1.0
        off = (mine[seen].double() - exact[seen].double()).abs()
        bound = max(2 * eps, 2e-6) * exact[seen].double().abs() + max(scale, 1.0) * 4e-6
        assert (off <= bound).all(), float((off - bound).max())


@settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 999),
    formats=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    page_size=st.sampled_from([1, 3, 16, 16, 64]),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 1), (6, 3), (9, 1)]),
    sizes=st.sampled_from([(64, 32), (32, 64), (128, 128), (6, 10), (34, 18), (40, 20)]),
    queries=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 1, 5, 90]), st.integers(0, 300)),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    window=st.none() | st.sampled_from([Window(40), Window(70, 4), Window(33, 20)]),
    fields=st.sampled_from(
        [
            {},
            {"window": (17, None)},
            {"chunk": 19},
            {"softcap": 4.0},
            {"causal": False},
            {"alibi": 1},
        ]
    ),
    shuffled=st.booleans(),
)
def test_pages_equal_tiles(
    isa, seed, formats, page_size, heads, sizes, queries, dtype, window, fields, shuffled
) -> None:
    if fields.get("alibi"):
        fields = {"alibi": alibi_slopes(heads[0])}
    spec = make(*heads, sizes, **fields)
    queries = [(count, before + count) for count, before in queries]
    rng = torch.Generator().manual_seed(seed)
    store = filled(spec, formats, page_size, 24, rng)
    view = view_of(store, [length for _, length in queries], rng, dtype, window, shuffled)
    q, far_q, bounds, positions = packed(spec, queries, rng, dtype)
    ours = attend_paged(q, view, spec, bounds, positions, far_q=far_q)
    assert_near(ours, as_tiles(q, view, spec, bounds, positions, far_q=far_q), dtype)


@pytest.mark.parametrize("format", NAMES)
def test_long_decoding_is_split_and_right(isa: str, format: str) -> None:
    rng = torch.Generator().manual_seed(0)
    spec = make(8, 2, (128, 128))
    store = filled(spec, (format, format), 16, 300, rng)
    queries = [(1, 3000), (1, 1025), (1, 40), (2, 2048)]
    view = view_of(store, [length for _, length in queries], rng)
    q, _, bounds, positions = packed(spec, queries, rng)
    ours = attend_paged(q, view, spec, bounds, positions)
    assert_near(ours, as_tiles(q, view, spec, bounds, positions))


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4-channel"])
@pytest.mark.parametrize("window", [None, Window(900, 4)], ids=str)
def test_threads_and_neighbours_change_no_bit(format: str, window: Window | None) -> None:
    rng = torch.Generator().manual_seed(1)
    spec = make(8, 2, (64, 64))
    store = filled(spec, (format, format), 16, 300, rng)
    queries = [(1, 3000), (200, 700), (1, 5), (1, 2000)]
    view = view_of(store, [length for _, length in queries], rng, window=window)
    q, far_q, bounds, positions = packed(spec, queries, rng)

    def run(q, far_q, view, bounds, positions):
        return attend_paged(q, view, spec, bounds, positions, far_q=far_q)

    with threads(1):
        whole = run(q, far_q, view, bounds, positions)
    for count in (2, 4):
        with threads(count):
            again = run(q, far_q, view, bounds, positions)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for row, (a, b) in enumerate(pairwise(bounds.tolist())):
        alone = run(
            q[a:b],
            far_q[a:b],
            view.rows(torch.tensor([row])),
            torch.tensor([0, b - a]),
            positions[a:b],
        )
        assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, whole, strict=True)), row


@pytest.mark.parametrize("page_size", [3, 16])
def test_what_lies_behind_the_end_is_never_seen(isa: str, page_size: int) -> None:
    rng = torch.Generator().manual_seed(2)
    spec = make(4, 2, (64, 64), causal=False)
    store = filled(spec, ("float32", "float32"), page_size, 40, rng)
    view = view_of(store, [page_size * 9 + 1], rng, shuffled=True)
    last = 39  # a page that nothing else is in
    view.table[view.table == last] = 1
    view.table[view.starts == page_size * 9] = last
    q, _, bounds, positions = packed(spec, [(1, page_size * 9 + 1)], rng)
    clean = attend_paged(q, view, spec, bounds, positions)
    for x in store.stored(0):
        x.codes[:, last, 1:] = torch.inf
    poisoned = attend_paged(q, view, spec, bounds, positions)
    assert_near(poisoned, clean)


def test_rows_that_see_nothing() -> None:
    rng = torch.Generator().manual_seed(3)
    spec = make()
    store = filled(spec, ("int8", "int8"), 16, 8, rng)
    view = view_of(store, [20, 0], rng)
    q = torch.randn(2, 4, 3, 64, generator=rng)
    positions = torch.tensor([[-1, 18, 19], [-1, -1, -1]])
    out = attend_view(q, view, spec, q_positions=positions)
    assert (out[0, :, 1:] != 0).all()
    assert out[0, :, 0].eq(0).all() and out[1].eq(0).all()


def test_joined_stores_are_one_softmax() -> None:
    rng = torch.Generator().manual_seed(4)
    spec, window = make(4, 2, (64, 64)), Window(500, 4)
    old = filled(spec, ("int8-channel", "int4"), 16, 40, rng)
    recent = filled(spec, ("bfloat16", "bfloat16"), 16, 40, rng)
    whole = view_of(recent, [300], rng, torch.bfloat16, window)
    is_old = (whole.starts >= 16) & (whole.starts < 128)
    rows = {name: getattr(whole, name) for name in ("starts", "lengths", "window", "dtype")}
    parts = (
        PagedView(store=old, layer=0, table=whole.table.where(is_old, -1), **rows),
        PagedView(store=recent, layer=0, table=whole.table.where(~is_old, -1), **rows),
    )
    view = JoinedView(window, parts)
    q, far_q = torch.randn(2, 1, 4, 2, 64, generator=rng).to(torch.bfloat16)
    positions = torch.tensor([[298, 299]])
    assert view_kernel(q, view, spec, positions).startswith("native")
    ours, tiles = (
        attend_view(q, view, spec, q_positions=positions, far_q=far_q, backend=backend)
        for backend in ("auto", "unfused")
    )
    assert torch.allclose(ours.float(), tiles.float(), rtol=0.02, atol=0.01)


def test_it_says_why_a_view_goes_by_tiles() -> None:
    rng = torch.Generator().manual_seed(5)
    spec = make()
    view: View = view_of(filled(spec, ("int8", "int8"), 16, 8, rng), [20], rng)
    q, positions = torch.randn(1, 4, 1, 64), torch.tensor([[19]])
    assert view_kernel(q, view, spec, positions).startswith("native")
    for expected, why in (
        ("the backend is unfused", {"backend": "unfused"}),
        ("a memory budget", {"memory_budget": 2**30}),
    ):
        assert expected in view_kernel(q, view, spec, positions, **why)
    assert "no native kernel for float64" in view_kernel(q.double(), view, spec, positions)
    dense = KVView(torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4, 32), None)
    assert "KVView is more than pages" in view_kernel(q, dense, spec, positions)


def test_pages_equal_dense_attention() -> None:
    rng = torch.Generator().manual_seed(6)
    spec = make(8, 2, (64, 64))
    store = filled(spec, ("float32", "float32"), 16, 60, rng)
    view = view_of(store, [500], rng)
    q, _, bounds, positions = packed(spec, [(3, 500)], rng)
    used = view.table[0][view.table[0] >= 0]
    k, v = (x.codes[:, used].flatten(1, 2)[None, :, :500] for x in store.stored(0))
    operands = Operands(q_positions=positions)
    exact = oracle.attention(q.transpose(0, 1)[None], k, v, spec, operands)
    out, lse = attend_paged(q, view, spec, bounds, positions)
    assert torch.allclose(out.transpose(0, 1)[None].double(), exact[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(lse.transpose(0, 1)[None].double(), exact[1], rtol=1e-5, atol=1e-5)
