"""Recall: with everything fetched it is full attention; with clamped distances, attention over
keys that stand where they should; a budget is kept; what was planted is found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.paged import PagedCache
from foveal.kv.recall import RecallCache, RecallConfig
from foveal.kv.recalled import Turn
from foveal.kv.store import PageStore
from foveal.kv.tiers import TierConfig, Tiers
from foveal.nn.rope import RopeConfig, Rotation
from properties import examples

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=8, value_dim=6)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, causal=True)
ROPES = (RopeConfig(dim=8, theta=100.0), RopeConfig(dim=4, theta=50.0))
SIZE = 4
WINDOW = Window(9, 3)
EVERYTHING = 10**9


def turn(layer: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return Rotation.back(ROPES[layer], positions.unsqueeze(1), keys.dtype).apply(keys)


def make(
    budget: int = EVERYTHING,
    distances: str = "exact",
    *,
    window: Window = WINDOW,
    shape: CacheShape = SHAPE,
    tokens: int = 400,
    turn: Turn | None = turn,
    behind: int | None = None,
) -> RecallCache:
    hot = PageStore(shape, 60 * shape.batch, SIZE)
    tiers = Tiers(shape, SIZE, [TierConfig(name="cold", tokens=tokens)])
    config = RecallConfig(window=window, budget=budget, distances=distances, behind=behind)
    return RecallCache(PagedCache(hot), tiers, config, turn)


class Stream:
    """Random tokens through a cache, and all that they were, unrotated."""

    def __init__(self, cache: RecallCache, spec: AttentionSpec = SPEC) -> None:
        self.cache, self.spec = cache, spec
        self.positions = torch.empty(2, 0, dtype=torch.int64)
        self.keys = [torch.empty(2, 2, 0, 8) for _ in ROPES]
        self.values = [torch.empty(2, 2, 0, 6) for _ in ROPES]

    def step(self, positions: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Append a step; queries, not rotated, and outputs of each layer."""
        rng = torch.Generator().manual_seed(seed)
        batch, num = positions.shape
        seen = []
        for layer, rope in enumerate(ROPES):
            q, k, v = (
                torch.randn(batch, heads, num, size, generator=rng)
                for heads, size in ((4, 8), (2, 8), (2, 6))
            )
            at = Rotation.at(rope, positions, 0, torch.float32)
            far = Rotation.at(rope, self.cache.window.from_sinks(positions), 0, torch.float32)
            view = self.cache.append(layer, at.apply(k), v, positions)
            out = attend_view(
                at.apply(q),
                view,
                self.spec,
                q_positions=positions,
                far_q=far.apply(q),
                backend="unfused",
            )
            seen.append((q, out))
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
        self.positions = torch.cat([self.positions, positions], 1)
        return seen

    def dense(
        self,
        layer: int,
        q: torch.Tensor,
        positions: torch.Tensor,
        hot_from: list[int] | None,
        behind: int = 0,
    ) -> torch.Tensor:
        """Attention in float64 over everything so far. Keys at positions from `hot_from` of each
        sequence on are at their distances; others are clamped, None for no others."""
        out = torch.zeros(*q.shape[:3], 6, dtype=torch.float64)
        sinks = self.cache.window.sinks
        for row, of_row in enumerate(positions.tolist()):
            for i, p in enumerate(of_row):
                if p < 0:
                    continue
                seen = (self.positions[row] >= 0) & (self.positions[row] <= p)
                at = self.positions[row][seen]
                places, stands = at.clone(), torch.full_like(at, p)
                if hot_from is not None:
                    far = at < max(hot_from[row], sinks)
                    stands[far] = min(p, self.cache.window.span - 1)
                    clamped = far & (at >= sinks)
                    # The last key of a page stands `behind` every query.
                    last = self.cache.window.span - 1 - behind
                    places[clamped] = places[clamped] % SIZE + last - (SIZE - 1)
                k = turned(self.keys[layer][row][:, seen], places, ROPES[layer])
                v = self.values[layer][row][:, seen].double()
                for head in range(4):
                    here = q[row, head, i].expand(len(at), -1)
                    moved = turned(here[None], stands, ROPES[layer])[0]
                    scores = (moved * k[head // 2]).sum(-1) / math.sqrt(8)
                    if self.spec.left is not None:
                        scores[stands - places > self.spec.left] = -math.inf
                    out[row, head, i] = scores.softmax(0) @ v[head // 2]
        return out


def turned(x: torch.Tensor, positions: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """x [H, S, D] at positions [S], in float64."""
    return Rotation.at(rope, positions[None], 0, torch.float64).apply(x.double()[None])[0]


def places(start: list[int], num: int, pads: int = 0) -> torch.Tensor:
    """Positions of a step that go on from `start`, the second sequence padded on the left."""
    step = torch.tensor(start)[:, None] + torch.arange(num)
    step[1, pads:] = step[1, : num - pads].clone()
    step[1, :pads] = -1
    return step


@settings(max_examples=examples(10), deadline=None)
@given(data=st.data())
def test_exact_with_everything_recalled_is_full_attention(data: st.DataObject) -> None:
    own = data.draw(st.sampled_from([None, 5, 14]))
    stream = Stream(make(), SPEC.replace(window=None if own is None else (own, None)))
    for seed in range(data.draw(st.integers(1, 7))):
        start = (stream.positions >= 0).sum(1).tolist()
        num = data.draw(st.sampled_from([1, 1, 3, 8, 17]))
        step = places(start, num, data.draw(st.integers(0, num)))
        for layer, (q, out) in enumerate(stream.step(step, seed)):
            assert (out - stream.dense(layer, q, step, None)).abs().max() < 1e-5


@pytest.mark.parametrize("own", [None, 5, 14])
@pytest.mark.parametrize("sizes", [[17] + [1] * 9, [13, 9, 1, 1, 16]], ids=["ones", "chunks"])
@pytest.mark.parametrize("behind", [None, 9, 1])
def test_clamped_keys_stand_where_they_should(
    sizes: list[int], own: int | None, behind: int | None
) -> None:
    spec = SPEC.replace(window=None if own is None else (own, None))
    stream = Stream(make(distances="clamped", behind=behind), spec)
    for seed, num in enumerate(sizes):
        start = (stream.positions >= 0).sum(1).tolist()
        step = places(start, num, pads=min(seed % 3, num - 1))
        passed = [max(0, end - WINDOW.size + 1) // SIZE * SIZE for end in start]
        stands = WINDOW.size // 2 if behind is None else behind
        for layer, (q, out) in enumerate(stream.step(step, seed)):
            assert (out - stream.dense(layer, q, step, passed, stands)).abs().max() < 1e-5
    assert stream.cache.stats.num_retired > 2


@pytest.mark.parametrize("distances", ["exact", "clamped"])
@pytest.mark.parametrize("num_pages", [1, 3])
def test_the_budget_is_kept(distances: str, num_pages: int) -> None:
    page_bytes = make()._tiers.page_bytes
    cache = make(num_pages * page_bytes + page_bytes - 1, distances)
    stream = Stream(cache)
    for seed, num in enumerate([20, 20, 1, 1, 7]):
        before = cache.stats.fetched_bytes
        stream.step(places([cache.length] * 2, num), seed)
        assert cache.stats.fetched_bytes - before <= 2 * num_pages * page_bytes
    assert cache.stats.fetched_bytes - before == 2 * num_pages * page_bytes
    assert cache.stats.num_steps == 4, "nothing has retired before the first"


@pytest.mark.parametrize("distances", ["exact", "clamped"])
@pytest.mark.parametrize("ranking", ["spread", "bound"])
def test_the_page_of_a_matching_key_is_recalled(distances: str, ranking: str) -> None:
    one = CacheShape(num_layers=1, batch=1, num_kv_heads=1, head_dim=64, value_dim=64)
    rope, spec = RopeConfig(dim=64), AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64)
    hot = PageStore(one, 20, SIZE)
    tiers = Tiers(one, SIZE, [TierConfig(name="cold", tokens=4000)])
    window = Window(16, 1)
    config = RecallConfig(
        window=window, budget=tiers.page_bytes, distances=distances, ranking=ranking
    )

    def back(layer: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return Rotation.back(rope, positions.unsqueeze(1), keys.dtype).apply(keys)

    cache = RecallCache(PagedCache(hot), tiers, config, back)
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 401, 64, generator=rng) for _ in range(2))
    # The pairs that turn fast carry nothing, as in heads that look for content.
    k *= torch.cat([torch.zeros(20), torch.ones(12)]).repeat(2)
    q = torch.nn.functional.normalize(k[:, :, 400:], dim=-1) * 20
    for planted in (30, 123, 311):
        cache.reset()
        keys = k.clone()
        keys[:, :, planted] = q[:, :, 0]
        for start in range(0, 401, 10):
            step = torch.arange(start, min(start + 10, 401))[None]
            at = Rotation.at(rope, step, 0, torch.float32)
            here = slice(start, start + 10)
            view = cache.append(0, at.apply(keys[:, :, here]), v[:, :, here], step)
        far = Rotation.at(rope, cache.window.from_sinks(step), 0, torch.float32)
        out = attend_view(at.apply(q), view, spec, q_positions=step, far_q=far.apply(q))
        assert torch.allclose(out, v[:, :, planted : planted + 1], atol=1e-3)


def test_the_oldest_are_forgotten_when_the_tiers_are_full() -> None:
    cache = make(tokens=2 * 5 * SIZE)
    stream = Stream(cache)
    for seed, num in enumerate([50, 1, 1, 30, 1]):
        stream.step(places([cache.length] * 2, num), seed)
    cache._retire()
    passed = (cache.length - WINDOW.size + 1) // SIZE
    held = sorted(part for row, part in cache._tiers.keys if row == 1)
    assert held == list(range(passed - 5, passed))
    assert sorted(cache._summaries.parts[1].tolist()) == held
    assert cache.stats.num_forgotten == 2 * (passed - 1 - 5)


@pytest.mark.parametrize("distances", ["exact", "clamped"])
def test_states_and_forks_go_on_to_the_bit(distances: str) -> None:
    page_bytes = make()._tiers.page_bytes
    first, other = (Stream(make(2 * page_bytes, distances)) for _ in range(2))
    for seed, num in enumerate([20, 1, 13, 1]):
        first.step(places([first.cache.length] * 2, num), seed)
    other.step(places([0, 0], 30), 77)
    other.cache.restore({name: x.clone() for name, x in first.cache.state().items()})
    fork = Stream(first.cache.fork())
    for seed, num in enumerate([1, 9, 20, 1]):
        step = places([first.cache.length] * 2, num)
        for ours, *theirs in zip(*(s.step(step, seed) for s in (first, other, fork)), strict=True):
            assert all(torch.equal(ours[1], out) for _, out in theirs)
    first.cache.reset()
    assert first.cache.length == first.cache.stats.num_retired == 0
    assert fork.cache.stats.num_retired > 10
    fresh = Stream(make(2 * page_bytes, distances))
    for seed, num in enumerate([20, 9]):
        step = places([fresh.cache.length] * 2, num)
        for ours, theirs in zip(fresh.step(step, seed), first.step(step, seed), strict=True):
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("distances", ["exact", "clamped"])
def test_a_step_that_stops_half_way_leaves_no_trace(distances: str) -> None:
    page_bytes = make()._tiers.page_bytes
    whole, broken = (Stream(make(2 * page_bytes, distances)) for _ in range(2))
    for seed, num in enumerate([30, 1, 13, 5]):
        step = places([whole.cache.length] * 2, num)
        broken.cache.append(0, torch.ones(2, 2, 9, 8), torch.ones(2, 2, 9, 6))
        for ours, theirs in zip(whole.step(step, seed), broken.step(step, seed), strict=True):
            assert torch.equal(ours[1], theirs[1])


def test_truncates_what_has_not_retired() -> None:
    cache = make()
    stream = Stream(cache)
    stream.step(places([0, 0], 30), 0)
    cache.truncate(12)
    stream.positions = stream.positions[:, :12]
    stream.keys = [k[:, :, :12] for k in stream.keys]
    stream.values = [v[:, :, :12] for v in stream.values]
    for seed in range(8):
        step = places([cache.length] * 2, 5)
        for layer, (q, out) in enumerate(stream.step(step, seed)):
            assert (out - stream.dense(layer, q, step, None)).abs().max() < 1e-5
    cache.truncate(cache.length)
    with pytest.raises(ArgumentError, match="length: got 20; accepted: the length 52, or one"):
        cache.truncate(20)


def test_bytes_are_counted_without_allocating() -> None:
    shape = CacheShape(num_layers=2, batch=1, num_kv_heads=2, head_dim=8, value_dim=6)

    def built(device: str) -> RecallCache:
        hot = PageStore(shape, 60, SIZE, device=device)
        tiers = Tiers(shape, SIZE, [TierConfig(name="cold", tokens=400)], device=device)
        config = RecallConfig(window=WINDOW, budget=EVERYTHING)
        return RecallCache(PagedCache(hot), tiers, config, turn)

    assert built("meta").nbytes == built("cpu").nbytes
    stats = built("cpu").stats
    assert stats.summary_bytes == 2 * 100 * 2 * 2 * 8 * 4
    assert stats.allocated_bytes > 160 * 2 * 2 * SIZE * 14 * 4 + stats.summary_bytes
    assert "0 pages retired (0 cold), 0 forgotten" in stats.remarks[0]


def test_what_does_not_fit_is_refused() -> None:
    for settings_, message in (
        ({"budget": 100}, "budget: got 100 bytes; accepted: at least a page"),
        ({"distances": "near"}, "distances: got 'near'; accepted: clamped, exact"),
        ({"distances": "clamped", "window": Window(9)}, "sinks: got 0; accepted: at least 1"),
        ({"tokens": 4}, "tiers: got room for 1 pages"),
        ({"behind": 10}, "behind: got 10; accepted: 0 to the window of 9 tokens"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(**settings_)
    with pytest.raises(ArgumentError, match="ranking: got 'best'; accepted: spread, bound"):
        RecallConfig(window=WINDOW, budget=1, ranking="best")
    config = RecallConfig(window=WINDOW, budget=EVERYTHING)
    tiers = Tiers(SHAPE, SIZE, [TierConfig(name="cold", tokens=40)])
    with pytest.raises(ArgumentError, match="cache: got a cache with Window"):
        RecallCache(PagedCache(PageStore(SHAPE, 9, SIZE), window=WINDOW), tiers, config)
    with pytest.raises(ArgumentError, match="store: got pages of 3"):
        RecallCache(PagedCache(PageStore(SHAPE, 9, 3)), tiers, config)
