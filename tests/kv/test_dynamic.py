"""Dynamic windows: what each head sees, how reaches follow attention, and what is given up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.operands import Operands
from foveal.attention.paged import attend_paged, attend_view
from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.dynamic import DynamicCache
from foveal.kv.paged import PagedCache
from foveal.kv.reach import Reaches
from foveal.kv.store import PageStore
from oracle import attention
from properties import examples

SLOPES = (2.0, 1.0, 0.2, 0.1)
"""Of four query heads: the first KV head looks near, the second far."""
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, causal=True, alibi=SLOPES)
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)


WINDOW = Window(64, 4)


def make(
    window: Window | None = WINDOW,
    *,
    page: int = 4,
    batch: int = 1,
    num_pages: int = 60,
    **settings,
) -> DynamicCache:
    shape = CacheShape(num_layers=1, batch=batch, num_kv_heads=2, head_dim=8, value_dim=8)
    store = PageStore(shape, num_pages, page)
    return DynamicCache(PagedCache(store, window=window), **{"minimum": 8, **settings})


class Stream:
    """A cache of one layer, every token it was given, and what its queries were promised."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.keys, self.values = torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 8)

    def step(self, num: int, seed: int, checked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in tokens; their queries, and what these see, which is checked."""
        rng = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, heads, num, 8, generator=rng) for heads in (4, 2, 2))
        start = self.keys.shape[2]
        positions = torch.arange(start, start + num)[None]
        self.seen = [self.cache.seen(0, head) for head in (0, 1)]
        self.view = self.cache.append(0, k, v)
        out = attend_view(q, self.view, SPEC, q_positions=positions, backend="unfused")
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        if checked:
            given_ = self.promised(positions[0])
            exact, _ = attention(q, self.keys, self.values, PLAIN, given_)
            assert torch.allclose(out.double(), exact, atol=2e-5)
        return q[0], out

    def promised(self, positions: torch.Tensor) -> Operands:
        """What the heads see, and their slopes: sinks are as near as the window ends."""
        window, end = self.cache.window, int(positions[-1]) + 1 if len(positions) else 0
        keys, queries = torch.arange(end), positions[:, None]
        sinks = keys < window.sinks
        inside = (keys > queries - window.size) | sinks
        mask = torch.zeros(1, 4, len(positions), end, dtype=torch.bool)
        for head, seen in enumerate(self.seen):
            known = keys >= (end - len(positions))
            known[torch.tensor(seen, dtype=torch.int64)] = True
            mask[:, 2 * head : 2 * head + 2] = known & inside & (keys <= queries)
        distance = keys - torch.where(sinks, window.from_sinks(queries), queries)
        return Operands(mask=mask, bias=torch.tensor(SLOPES)[None, :, None, None] * distance)


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_every_head_attends_to_exactly_what_it_sees(data: st.DataObject) -> None:
    page, sinks = data.draw(st.sampled_from([1, 4, 5])), data.draw(st.sampled_from([0, 3, 6]))
    window = Window(data.draw(st.sampled_from([16, 40])), sinks)
    every = data.draw(st.sampled_from([1, 3]))
    stream = Stream(make(window, page=page, num_pages=200, every=every, mass=0.9))
    for seed in range(data.draw(st.integers(1, 16))):
        length = stream.keys.shape[2]
        action = data.draw(st.sampled_from(["step", "step", "step", "resize", "cut", "move"]))
        if action == "step":
            stream.step(data.draw(st.sampled_from([1, 1, 2, 7, 12, 30])), seed)
        elif action == "resize":
            stream.cache.maximum = data.draw(st.integers(8, window.size))
        elif action == "cut":
            cut = data.draw(st.integers(max(0, length - 6), length))
            try:
                stream.cache.truncate(cut)
            except ArgumentError:
                assert length > 8
                continue
            stream.keys, stream.values = stream.keys[:, :, :cut], stream.values[:, :, :cut]
        else:
            other = make(window, page=page, num_pages=200, every=every, mass=0.9)
            other.restore(stream.cache.state())
            assert other.stats == stream.cache.stats
            stream.cache = other if data.draw(st.booleans()) else stream.cache.fork()
    for head, seen in enumerate(stream.seen if stream.keys.shape[2] else ()):
        assert set(range(min(sinks, len(seen)))) <= set(seen), head


def test_until_the_maximum_is_behind_everything_is_seen() -> None:
    stream = Stream(make(every=1))
    for seed in range(16):
        stream.step(4, seed)
        assert stream.seen == [list(range(4 * seed))] * 2
        assert len(stream.view.runs) == 1, "nothing to observe yet"
    assert stream.cache.stats.reaches == ((64, 64),)


def test_reaches_follow_each_head_and_pages_follow_the_longest() -> None:
    stream = Stream(make(mass=0.95, every=4))
    for seed in range(150):
        stream.step(1, seed, checked=seed > 140)
    stats = stream.cache.stats
    (near, far), size = stats.reaches[0], 4
    assert near == 8 < far < 64 and stats.longest_reach == far
    assert len(stream.cache.seen(0, 0)) == 4 + 8 + 150 % size
    held = set(stream.cache._cache.tables[0].pages)
    assert held == {0, *range(150 // size - far // size, 150 // size + 1)}, "sinks and the reach"
    page_bytes = stream.cache._cache.store.page_bytes
    assert stream.cache.stats.used_bytes == len(held) * page_bytes
    first = (150 - 64 + 1) // size
    assert stats.saved_bytes == (150 // size + 1 - first - (len(held) - 1)) * page_bytes
    assert stream.view.pages.table.shape[1] <= 64 // size + 2, "the sinks are not laid out"
    assert [len(seen) < n for seen, n in zip(stream.seen, (20, 50), strict=True)] == [True, True]
    assert f"reach: mean {(near + far) / 2:.0f}, longest {far}, at most 64" in stats.remarks[0]


@pytest.mark.parametrize("mass", [0.8, 0.95, 0.99])
def test_the_mass_is_held(mass: float) -> None:
    """Dense attention of every query over the whole window, against what its head saw."""
    stream, outside = Stream(make(mass=mass, every=4)), []
    for seed in range(300):
        q, _ = stream.step(1, seed, checked=False)
        scores = (q @ stream.keys[0].repeat_interleave(2, 0).mT)[:, 0] * 8**-0.5
        given = stream.promised(torch.tensor([seed]))
        inside = torch.arange(seed + 1) > seed - 64
        inside[:4] = True
        weights = (scores + given.bias[0, :, 0]).masked_fill(~inside, -torch.inf).softmax(-1)
        outside.append((weights * ~given.mask[0, :, 0]).sum(-1).view(2, 2).mean(1))
    assert (torch.stack(outside[100:]).mean(0) < 1 - mass).all()
    assert stream.cache.stats.reaches[0][0] < 64


def feed(cache: DynamicCache, num_steps: int, sharpness: float, num_tokens: int = 8) -> None:
    """Tokens whose keys turn with their position: sharp queries look near, others anywhere."""
    for _ in range(num_steps):
        positions = cache.length + torch.arange(num_tokens)[None]
        angle = positions[0, :, None] * torch.tensor([0.1, 0.02])
        turn = torch.cat([angle.cos(), angle.sin(), torch.zeros(num_tokens, 4)], -1)
        turn = turn.expand(1, 2, num_tokens, 8)
        view = cache.append(0, turn, turn)
        q = (sharpness * turn).repeat_interleave(2, 1)
        attend_view(q, view, PLAIN.replace(causal=True), q_positions=positions)


def test_a_reach_widens_with_what_it_sees_and_narrows_slowly() -> None:
    cache = make(mass=0.99, every=2)
    feed(cache, 20, 300.0)
    narrow = cache.stats.longest_reach
    assert narrow <= 24
    feed(cache, 3, 0.0)
    wider = cache.stats.longest_reach
    assert narrow < wider < 64, "what is given up does not come back"
    feed(cache, 40, 0.0)
    assert cache.stats.longest_reach == 64 and cache.stats.saved_bytes == 0
    feed(cache, 20, 300.0)
    assert cache.stats.longest_reach > narrow
    feed(cache, 80, 300.0)
    assert cache.stats.longest_reach == narrow


def test_long_steps_observe_what_short_ones_do() -> None:
    caches = [make(Window(32, 0), mass=1.0, every=1) for _ in range(2)]
    for cache, num_tokens in zip(caches, (1, 8), strict=True):
        feed(cache, 160 // num_tokens, 8.0, num_tokens)
    short, long = (cache._seen.shares[0, 0] for cache in caches)
    assert torch.allclose(short, long, atol=0.02) and float(short[1:4].min()) > 0.05


def test_sequences_count_once_the_maximum_is_behind_them() -> None:
    alone, beside = make(every=1), make(every=1, batch=2)
    rng = torch.Generator().manual_seed(0)
    for step in range(80):
        q, k, v = (torch.randn(2, heads, 1, 8, generator=rng) for heads in (4, 2, 2))
        positions = torch.tensor([[step], [step - 50 if step >= 50 else -1]])
        view = beside.append(0, k, v, positions)
        attend_view(q, view, SPEC, q_positions=positions)
        positions = positions[:1]
        attend_view(q[:1], alone.append(0, k[:1], v[:1]), SPEC, q_positions=positions)
    shares = [cache.state()["shares"] for cache in (alone, beside)]
    assert torch.allclose(*shares, atol=1e-5) and float(shares[0].sum()) > 1


def test_what_the_reaches_need_cannot_be_cut_into() -> None:
    stream = Stream(make(mass=0.95, every=4))
    for seed in range(130):
        stream.step(1, seed, checked=False)
    assert stream.cache.stats.longest_reach < 64
    for length in (129, 128):
        stream.cache.truncate(length)
    for length in (120, 100, 20):
        with pytest.raises(ArgumentError, match=f"length: got {length}; accepted: the length 128"):
            stream.cache.truncate(length)
    assert stream.cache.length == 128
    stream.cache.truncate(4)  # the sinks are there


def test_the_maximum_can_be_set_between_steps() -> None:
    stream = Stream(make(mass=1.0))
    for seed in range(10):
        stream.step(10, seed)
    free = stream.cache._cache.store.pool.num_available
    stream.cache.maximum = 16
    assert stream.cache._cache.store.pool.num_available >= free + 11, "given up at once"
    stream.step(1, 10)
    assert stream.cache.stats.longest_reach == 16
    stream.cache.maximum = 48
    stream.step(1, 11)
    for seed in range(12, 30):
        stream.step(10, seed)
    assert stream.cache.stats.longest_reach == 48
    for tokens in (7, 65):
        with pytest.raises(ArgumentError, match=f"maximum: got {tokens}; accepted: 8 to 64"):
            stream.cache.maximum = tokens
    stream.cache.reset()
    assert stream.cache.maximum == 48 and stream.cache._cache.store.pool.num_available == 60


def test_what_is_put_back_or_forked_goes_on_to_the_bit() -> None:
    stream = Stream(make(mass=0.9, every=3))
    for seed in range(31):
        stream.step(3, seed, checked=False)
    stream.cache.maximum = 40
    others = [make(mass=0.9, every=3), stream.cache.fork()]
    others[0].restore({name: tensor.clone() for name, tensor in stream.cache.state().items()})
    streams = [stream, *map(Stream, others)]
    for other in streams[1:]:
        other.keys, other.values = stream.keys, stream.values
    for seed in range(30, 42):
        first, *rest = (one.step(1 + seed % 3, seed)[1] for one in streams)
        assert all(torch.equal(first, other) for other in rest)
    assert streams[0].cache.stats.reaches == streams[1].cache.stats.reaches
    with pytest.raises(ArgumentError, match=r"state shares: got shape \[1, 2, 17\]; accepted"):
        make(Window(30, 4)).restore(stream.cache.state())
    with pytest.raises(ArgumentError, match="state shares: got nothing"):
        make().restore({})


def test_packed_sequences_see_and_tell_the_same() -> None:
    caches = [make(Window(16, 2), batch=2, every=1, mass=0.9) for _ in range(2)]
    rng = torch.Generator().manual_seed(0)
    for step in range(60):
        q, k, v = (torch.randn(2, heads, 1, 8, generator=rng) for heads in (4, 2, 2))
        positions = torch.tensor([[step], [step - 9 if step > 8 else -1]])
        views = [cache.append(0, k, v, positions) for cache in caches]
        whole = attend_view(q, views[0], SPEC, q_positions=positions)
        packed, _ = attend_paged(
            q[:, :, 0], views[1], SPEC, torch.arange(3), positions[:, 0], backend="unfused"
        )
        assert torch.allclose(whole[:, :, 0], packed, atol=1e-5)
    assert caches[0].stats == caches[1].stats and caches[0].stats.reaches[0][0] < 16


def test_reaches_are_smoothed_and_hold_the_mass() -> None:
    reaches = Reaches(2, 1, 20, mass=0.9)
    assert reaches.strides(1, 20) == [[20], [20]]
    near = torch.tensor([0.6, 0.2, 0.15, 0.04])[:, None, None].expand(4, 1, 32)
    distances = torch.tensor([0, 3, 9, 30])[:, None].expand(4, 32)
    reaches.note(0, distances, near)
    reaches.settle()
    assert reaches.weight == 0, "a layer is missing"
    for _ in range(3):
        reaches.note(0, distances, near)
        reaches.note(1, torch.zeros(1, 32, dtype=torch.int64), torch.ones(1, 1, 32))
        reaches.settle()
    assert reaches.weight == 64
    assert reaches.shares[0, 0, [0, 3, 9, 20]].tolist() == pytest.approx([0.6, 0.2, 0.15, 0.04])
    assert reaches.strides(1, 20) == [[10], [1]], "9 hold 0.96, but much is still there"
    assert reaches.strides(2, 8) == [[8], [2]]
    other = reaches.copy()
    for layer in (0, 1):
        other.note(layer, torch.full((1, 16), 15), torch.ones(1, 1, 16))
    other.settle()
    assert float(other.shares[0, 0, 15]) == pytest.approx(16 / (64 + 16))
    assert float(other.shares[0, 0, 0]) == pytest.approx(0.6 * 64 / (64 + 16))
    assert reaches.strides(1, 20)[0] == [10] and other.strides(1, 20)[0] == [16]


def test_bad_settings_are_refused() -> None:
    for misuse, message in (
        (lambda: make(minimum=3), "minimum: got 3; accepted: 4 to the window of 64"),
        (lambda: make(minimum=65), "minimum: got 65"),
        (lambda: make(mass=0.0), "mass: got 0.0"),
        (lambda: make(mass=1.1), "mass: got 1.1"),
        (lambda: make(every=0), "every: got 0"),
        (lambda: make(None), "cache: got length 0, window None"),
    ):
        with pytest.raises(ArgumentError, match=message):
            misuse()
