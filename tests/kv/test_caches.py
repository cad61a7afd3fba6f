"""Every cache of the catalogue against dense attention over a plain list of all tokens.

Whatever is appended, truncated, forked and reset, with pads anywhere, attention over the cache's
view equals the oracle over everything that its window lets a query see.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention.operands import Operands
from foveal.attention.paged import attend_view, narrow
from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, KVCache
from foveal.kv.catalogue import CACHES, CacheKind
from oracle import attention

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=8, value_dim=6)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, causal=True)
ROOM = 64

KINDS = pytest.mark.parametrize("kind", CACHES, ids=lambda kind: kind.name)


class Stream:
    """A cache, and beside it every token it was given."""

    def __init__(self, kind: CacheKind, cache: KVCache) -> None:
        self.kind, self.cache = kind, cache
        self.positions = torch.empty(SHAPE.batch, 0, dtype=torch.int64)
        self.keys = [torch.empty(2, 2, 0, 8) for _ in range(2)]
        self.values = [torch.empty(2, 2, 0, 6) for _ in range(2)]

    def next(self) -> torch.Tensor:
        return (self.positions >= 0).sum(1)

    def step(self, positions: torch.Tensor, seed: int, layers: int = 2) -> None:
        """Append tokens to the first layers, and attend from them."""
        rng = torch.Generator().manual_seed(seed)
        batch, num = positions.shape
        q, k, v = (
            [torch.randn(batch, heads, num, size, generator=rng) for _ in range(2)]
            for heads, size in ((4, 8), (2, 8), (2, 6))
        )
        everything = torch.cat([self.positions, positions], 1)
        for layer in range(layers):
            keys = torch.cat([self.keys[layer], k[layer]], 2)
            values = torch.cat([self.values[layer], v[layer]], 2)
            view = self.cache.append(layer, k[layer], v[layer], positions)
            backend = "flash" if seed % 2 else "unfused"
            ours = attend_view(q[layer], view, SPEC, q_positions=positions, backend=backend)
            given_ = Operands(q_positions=positions, kv_positions=everything)
            spec = narrow(SPEC, self.kind.window)
            exact, _ = attention(q[layer], keys, values, spec, given_)
            largest = max(1.0, float(keys.abs().max()), float(values.abs().max())) if num else 1
            limit = 1e-5 + 4 * self.kind.error * largest
            assert torch.allclose(ours.double(), exact, rtol=0, atol=limit)
            if layers == 2:
                self.keys[layer], self.values[layer] = keys, values
        if layers == 2:
            self.positions = everything

    def truncate(self, length: int) -> None:
        try:
            self.cache.truncate(length)
        except ArgumentError:
            window = self.kind.window
            assert window is not None and int(self.next().max()) >= window.size
            return
        self.positions = self.positions[:, :length]
        self.keys = [k[:, :, :length] for k in self.keys]
        self.values = [v[:, :, :length] for v in self.values]

    def fork(self) -> "Stream":
        other = Stream(self.kind, self.cache.fork())
        other.positions, other.keys, other.values = self.positions, self.keys[:], self.values[:]
        return other


def draw_positions(data: st.DataObject, start: torch.Tensor, num: int) -> torch.Tensor:
    """Positions of a step: tokens that go on from `start`, with pads in between."""
    pads = data.draw(st.sampled_from(["none", "left", "right", "any"]))
    real = torch.ones(SHAPE.batch, num, dtype=torch.bool)
    if pads == "any":
        flat = data.draw(st.lists(st.booleans(), min_size=2 * num, max_size=2 * num))
        real = torch.tensor(flat, dtype=torch.bool).reshape(2, num)
    elif pads != "none":
        count = data.draw(st.integers(0, num))
        real[1, :count] = False
        real = real.flip(1) if pads == "right" else real
    return torch.where(real, start[:, None] + real.cumsum(1) - 1, -1)


@KINDS
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_over_a_cache_equals_attention_over_a_list(
    kind: CacheKind, data: st.DataObject
) -> None:
    streams = [Stream(kind, kind.make(SHAPE, ROOM))]
    for seed in range(data.draw(st.integers(1, 8))):
        one = data.draw(st.sampled_from(streams))
        action = data.draw(st.sampled_from(["step", "step", "step", "cut", "fork", "fail", "new"]))
        room = ROOM // 2 - one.cache.length
        if action in ("step", "fail") and room > 0:
            num = data.draw(st.sampled_from([1, 1, 1, 0, 2, 4, 7, 13]))
            positions = draw_positions(data, one.next(), min(num, room))
            one.step(positions, seed, layers=1 if action == "fail" else 2)
        elif action == "cut":
            one.truncate(data.draw(st.integers(0, one.cache.length)))
        elif action == "fork" and len(streams) < 2:
            streams.append(one.fork())
        elif action == "new":
            one.cache.reset()
            streams[streams.index(one)] = Stream(kind, one.cache)
    for one in streams:
        assert one.cache.length == one.positions.shape[1]
        stats = one.cache.stats
        assert (stats.length, stats.allocated_bytes) == (one.cache.length, one.cache.nbytes)


@KINDS
def test_positions_go_on_by_themselves(kind: CacheKind) -> None:
    stream = Stream(kind, kind.make(SHAPE, ROOM))
    for seed, num in enumerate([3, 1, 1, 9, 1]):
        start = stream.cache.length
        assert stream.cache.next_positions is None or stream.cache.next_positions.tolist() == [
            start,
            start,
        ]
        stream.step(torch.arange(start, start + num).expand(2, num), seed)


@KINDS
def test_bad_appends_are_refused(kind: CacheKind) -> None:
    cache = kind.make(SHAPE, ROOM)
    k, v = torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 6)
    for call, message in (
        ((1, k, v), "layer: got 1"),
        ((0, k[:1], v), "k: got shape"),
        ((0, k, v[:, :, :2]), "v: got shape"),
        ((0, k.half(), v), "k: got torch.float16"),
        ((0, k, v.requires_grad_()), "v: got a tensor that requires a gradient"),
        ((0, k, v.detach(), torch.zeros(2, 2)), "positions: got shape"),
    ):
        with pytest.raises(ArgumentError, match=message):
            cache.append(*call)
    assert cache.length == 0
    for length in (-1, 1):
        with pytest.raises(ArgumentError, match=f"length: got {length}"):
            cache.truncate(length)
