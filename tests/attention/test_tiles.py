"""What a view may ask of attention: tiles for some heads, far tiles, and to be told who looks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.operands import Operands
from foveal.attention.paged import attend_view, narrow
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.kv.cache import CacheShape, KVView, Sight, Window
from foveal.kv.paged import PagedCache
from foveal.kv.store import PageStore
from oracle import attention
from properties import examples

HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 3, 8, 5


def spec(**fields) -> AttentionSpec:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "value_dim": VALUE_DIM}
    return AttentionSpec(causal=True, **sizes, **fields)


SPECS = [
    spec(),
    spec(window=(6, None), sinks=1),
    spec(softcap=1.5, scale=0.7),
    spec(alibi=alibi_slopes(HEADS)),
    spec(alibi=alibi_slopes(HEADS), softcap=2.0, chunk=9),
]


@dataclass
class Tiles:
    """A view of given tiles that keeps what it was told after each."""

    given: Sequence[KVView]
    window: Window | None = None
    num_rows: int = 1

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        self.tile_lses, self.lses, self.first = [], [], sight.first
        for tile in self.given:
            yield tile
            assert sight.tile_lse is not None
            self.tile_lses.append(sight.tile_lse.clone())
            self.lses.append(sight.lse.clone())

    def rows(self, index: torch.Tensor) -> "Tiles":
        raise NotImplementedError


def draw(num_queries: int, num_keys: int, seed: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, num_queries, DIM), (KV_HEADS, num_keys, DIM), (KV_HEADS, num_keys, VALUE_DIM))
    return tuple(torch.randn(1, *size, generator=rng) for size in sizes)


def of_heads(k: torch.Tensor, v: torch.Tensor, columns: range, heads: list[int]) -> KVView:
    """The tile of these columns and heads."""
    index, places = torch.tensor(heads), torch.arange(columns.start, columns.stop)
    parts = (x[:, index][:, :, places] for x in (k, v))
    return KVView(*parts, places[None], heads=index)


@pytest.mark.parametrize("backend", ["unfused", "flash"])
@pytest.mark.parametrize("which", SPECS, ids=str)
@settings(max_examples=examples(8), deadline=None)
@given(data=st.data())
def test_heads_see_the_tiles_that_name_them(
    which: AttentionSpec, backend: str, data: st.DataObject
) -> None:
    num_keys, num_queries = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 4]))
    q, k, v = draw(num_queries, num_keys, data.draw(st.integers(0, 99)))
    positions = torch.arange(num_queries)[None] + max(0, num_keys - num_queries)
    seen = torch.zeros(KV_HEADS, num_keys, dtype=torch.bool)
    tiles = []
    for start in range(0, num_keys, 5):
        columns = range(start, min(start + 5, num_keys))
        for heads in data.draw(st.sampled_from([[[0, 1, 2]], [[0, 2], [1]], [[1, 2]], [[0]], []])):
            tiles.append(of_heads(k, v, columns, heads))
            seen[heads, columns.start : columns.stop] = True
    given_ = Operands(
        q_positions=positions,
        kv_positions=torch.arange(num_keys),
        mask=seen.repeat_interleave(HEADS // KV_HEADS, 0)[None, :, None],
    )
    view = Tiles(tiles)
    ours = attend_view(q, view, which, q_positions=positions, backend=backend)
    exact, exact_lse = attention(q, k, v, which, given_)
    assert torch.allclose(ours.double(), exact, atol=2e-5)
    if tiles:
        assert torch.allclose(view.lses[-1].double(), exact_lse, atol=2e-5)


def test_a_view_reads_the_share_of_every_tile() -> None:
    q, k, v = draw(4, 12, 0)
    positions = torch.arange(8, 12)[None]
    tiles = [of_heads(k, v, range(a, a + 4), heads) for a in (0, 4, 8) for heads in ([0, 2], [1])]
    view = Tiles(tiles)
    attend_view(q, view, SPECS[0], q_positions=positions, backend="unfused")
    scores = torch.einsum("hqd,hkd->hqk", q[0].double(), k[0].double().repeat_interleave(2, 0))
    hidden = torch.arange(12) > positions[0, :, None]
    weights = (scores * DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    for tile, tile_lse in zip(tiles, view.tile_lses, strict=True):
        heads = [2 * int(h) + i for h in tile.heads for i in (0, 1)]
        share = torch.exp(tile_lse[0] - view.lses[-1][0, heads])
        columns = tile.positions[0]
        assert torch.allclose(share.double(), weights[heads][:, :, columns].sum(-1), atol=1e-5)
    assert (view.lses[0][:, [2, 3]] == -torch.inf).all(), "heads that have not seen anything yet"
    assert (view.lses[1] >= view.lses[0]).all() and view.first == 0


@pytest.mark.parametrize("some_heads", [None, [0, 2]])
def test_far_tiles_are_seen_by_the_far_query(some_heads: list[int] | None) -> None:
    """A far key and its query as one half of vectors of twice the size, near ones as the other."""
    q, k, v = draw(3, 10, 1)
    far_q, far_k, far_v = draw(3, 4, 2)
    positions, far_positions = torch.tensor([[70, 71, 72]]), torch.tensor([[8, 9, 2]])
    kv_positions = torch.cat([torch.arange(63, 73), torch.arange(4)])
    window = Window(5, 1)  # keys of the near tile that it hides stay hidden, the far tile whole
    heads = list(range(KV_HEADS)) if some_heads is None else some_heads
    far = replace(
        of_heads(far_k, far_v, range(4), heads),
        q_positions=far_positions,
        heads=None if some_heads is None else torch.tensor(heads),
    )
    view = Tiles([KVView(k, v, kv_positions[None, :10]), far], window)
    ours = attend_view(q, view, spec(scale=0.3), q_positions=positions, far_q=far_q)

    zeros, near = torch.zeros_like, narrow(spec(), window)
    keys = torch.cat([torch.cat([k, zeros(k)], -1), torch.cat([zeros(far_k), far_k], -1)], 2)
    seen = torch.zeros(1, HEADS, 3, 14, dtype=torch.bool)
    for i, p in enumerate(positions[0].tolist()):
        for j, p_k in enumerate(range(63, 73)):
            seen[:, :, i, j] = p - near.left <= p_k <= p
        for head in heads:
            allowed = torch.arange(4) <= far_positions[0, i]
            seen[0, 2 * head : 2 * head + 2, i, 10:] = allowed
    whole = spec(scale=0.3).replace(causal=False)
    whole = replace(whole, head_dim=2 * DIM)
    exact, _ = attention(
        torch.cat([q, far_q], -1), keys, torch.cat([v, far_v], 2), whole, Operands(mask=seen)
    )
    assert torch.allclose(ours.double(), exact, atol=2e-5)


def test_alibi_counts_the_distance_from_where_far_queries_stand() -> None:
    q, k, v = draw(1, 4, 3)
    far = KVView(k, v, torch.arange(4)[None], q_positions=torch.tensor([[6]]))
    given_ = Operands(q_positions=torch.tensor([6]), kv_positions=torch.arange(4))
    ours = attend_view(q, Tiles([far]), SPECS[3], q_positions=torch.tensor([[900]]))
    assert torch.allclose(ours.double(), attention(q, k, v, SPECS[3], given_)[0], atol=2e-5)


@pytest.mark.parametrize("left", [None, 0, 5, 8, 30])
def test_a_layer_gathers_the_pages_that_its_own_window_sees(
    left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = CacheShape(
        num_layers=1, batch=1, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=VALUE_DIM
    )
    window, size = Window(40, 2), 4
    cache = PagedCache(PageStore(shape, 20, size), window=window)
    q, k, v = draw(53, 53, 4)
    which = spec(window=None if left is None else (left, None))
    gathered: list[int] = []
    read = cache.store.read

    def counted(layer: int, pages: torch.Tensor, dtype: torch.dtype):
        gathered.append(len(pages))
        return read(layer, pages, dtype)

    monkeypatch.setattr(cache.store, "read", counted)
    for start, stop in ((0, 30), (30, 50), (50, 53)):
        gathered.clear()
        columns, positions = slice(start, stop), torch.arange(start, stop)[None]
        held = set(cache.tables[0].pages) | {p // size for p in range(start, stop)}
        view = cache.append(0, k[:, :, columns], v[:, :, columns])
        ours = attend_view(q[:, :, columns], view, which, q_positions=positions, backend="unfused")
        given_ = Operands(q_positions=positions, kv_positions=torch.arange(53))
        exact, _ = attention(q[:, :, columns], k, v, narrow(which, window), given_)
        assert torch.allclose(ours.double(), exact, atol=2e-5)
        reach = window.size - 1 if left is None else min(left, window.size - 1)
        seen = {part for part in held if part == 0 or (part + 1) * size > start - reach}
        assert sum(gathered) == len(seen)
