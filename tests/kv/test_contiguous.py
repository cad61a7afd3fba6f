"""`ContiguousCache` against a plain list of tensors, and its refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, KVCache
from foveal.kv.contiguous import ContiguousCache

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=3, head_dim=4, value_dim=5)

Tokens = tuple[torch.Tensor, torch.Tensor]


def draw(num_tokens: int, seed: int) -> list[Tokens]:
    """Keys and values of a step, for each layer."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, num_tokens, size) for size in (4, 5)] * SHAPE.num_layers
    drawn = [torch.randn(shape, generator=rng) for shape in shapes]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def step(cache: KVCache, tokens: list[Tokens], positions: torch.Tensor | None = None) -> list:
    return [cache.append(layer, k, v, positions) for layer, (k, v) in enumerate(tokens)]


class Plain:
    """What a cache should hold: a list with one entry per slot, copied whole."""

    def __init__(self, capacity: int | None) -> None:
        self.cache: KVCache = ContiguousCache(SHAPE, capacity=capacity)
        self.slots: list[list[Tokens]] = []
        self.positions: list[list[int]] = []

    def append(self, num_tokens: int, num_pads: int | None, seed: int) -> None:
        tokens, start = draw(num_tokens, seed), len(self.slots)
        new = [[start + i] * 2 for i in range(num_tokens)]
        given = None
        if num_pads is not None:
            new = [[p, p if i >= num_pads else -1] for i, (p, _) in enumerate(new)]
            given = torch.tensor(new).reshape(num_tokens, 2).T
        views = step(self.cache, tokens, given)
        self.slots += [[(k[:, :, i], v[:, :, i]) for k, v in tokens] for i in range(num_tokens)]
        self.positions += new
        for layer, view in enumerate(views):
            self.check(layer, view)

    def check(self, layer: int, view) -> None:
        assert view.keys.shape == (2, 3, len(self.slots), 4)
        assert view.values.shape == (2, 3, len(self.slots), 5)
        for i, slot in enumerate(self.slots):
            assert torch.equal(view.keys[:, :, i], slot[layer][0])
            assert torch.equal(view.values[:, :, i], slot[layer][1])
        if view.positions is None:
            assert self.positions == [[i, i] for i in range(len(self.slots))]
            assert view.valid is None
        else:
            assert view.positions.T.tolist() == self.positions
            assert torch.equal(view.valid, view.positions >= 0)

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)
        del self.slots[length:], self.positions[length:]

    def fork(self) -> "Plain":
        other = Plain(None)
        other.cache, other.slots = self.cache.fork(), list(self.slots)
        other.positions = list(self.positions)
        return other

    def reset(self) -> None:
        self.cache.reset()
        self.slots, self.positions = [], []


@settings(max_examples=60, deadline=None)
@given(data=st.data(), capacity=st.sampled_from([None, 40]))
def test_any_sequence_equals_a_list(data: st.DataObject, capacity: int | None) -> None:
    held = [Plain(capacity)]
    for seed in range(data.draw(st.integers(1, 8))):
        one = data.draw(st.sampled_from(held))
        action = data.draw(st.sampled_from(["append", "append", "truncate", "fork", "reset"]))
        room = 40 - one.cache.length
        if action == "append" and room:
            num_tokens = data.draw(st.integers(0, min(room, 30)))
            one.append(num_tokens, data.draw(st.sampled_from([None, 0, 1, 3])), seed)
        elif action == "truncate":
            one.truncate(data.draw(st.integers(0, one.cache.length)))
        elif action == "fork":
            held.append(one.fork())
        elif action == "reset":
            one.reset()
    for one in held:
        assert one.cache.length == len(one.slots)
        stats = one.cache.stats
        assert stats.length == one.cache.length <= stats.capacity or stats.length == 0
        assert stats.used_bytes == len(one.slots) * 2 * 2 * 3 * 9 * 4
        assert stats.allocated_bytes == one.cache.nbytes >= stats.used_bytes
        if one.cache.length < 40:
            one.append(1, None, seed=99)


def test_length_advances_with_the_last_layer_only() -> None:
    cache = ContiguousCache(SHAPE)
    (k0, v0), (k1, v1) = draw(3, 0)
    cache.append(0, k0, v0)
    assert cache.length == 0
    cache.append(0, k1, v1)  # the step failed and begins again
    view = cache.append(1, k1, v1)
    assert cache.length == 3
    assert torch.equal(view.keys, k1)
    assert torch.equal(cache.append(0, k0, v0).keys[:, :, :3], k1)


def test_failed_step_leaves_no_positions() -> None:
    cache = ContiguousCache(SHAPE)
    step(cache, draw(2, 0))
    cache.append(0, *draw(1, 1)[0], torch.tensor([[2], [-1]]))
    views = step(cache, draw(1, 2))
    assert views[-1].positions is None or views[-1].positions.tolist() == [[0, 1, 2]] * 2


def test_append_within_capacity_moves_nothing() -> None:
    cache = ContiguousCache(SHAPE, capacity=50)
    places = {view.keys.data_ptr() for view in step(cache, draw(20, 0))}
    for seed in range(30):
        assert {view.keys.data_ptr() for view in step(cache, draw(1, seed))} == places
    assert cache.stats.num_growths == 0
    assert cache.nbytes == 50 * 2 * 2 * 3 * 9 * 4


def test_growth_doubles() -> None:
    cache = ContiguousCache(SHAPE)
    for seed in range(520):
        step(cache, draw(1, seed))
    assert cache.capacity == 1024
    assert cache.stats.num_growths == 4


def test_reset_keeps_the_memory() -> None:
    cache = ContiguousCache(SHAPE)
    step(cache, draw(70, 0), torch.full((2, 70), -1))
    before = cache.nbytes
    cache.reset()
    assert (cache.length, cache.positions, cache.nbytes) == (0, None, before)


def test_fork_is_independent() -> None:
    cache = ContiguousCache(SHAPE, capacity=9, dtype=torch.float64)
    tokens = [(k.double(), v.double()) for k, v in draw(3, 0)]
    step(cache, tokens)
    other = cache.fork()
    other.truncate(0)
    step(other, [(-k, -v) for k, v in tokens])
    assert torch.equal(cache.append(0, *tokens[0]).keys[:, :, :3], tokens[0][0])
    assert (other.capacity, other.dtype) == (9, torch.float64)


def bad(**changes: object) -> tuple:
    k, v = draw(2, 0)[0]
    call = {"layer": 0, "k": k, "v": v, "positions": None} | changes
    return tuple(call.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(layer=1), "layer: got 1; accepted: 0 to begin a step"),
        (bad(layer=-1), "layer: got -1"),
        (bad(k=torch.zeros(2, 3, 2, 5)), r"k: got shape \[2, 3, 2, 5\]; accepted: \[2, 3, 2, 4\]"),
        (bad(v=torch.zeros(2, 3, 1, 5)), r"v: got shape \[2, 3, 1, 5\]; accepted: \[2, 3, 2, 5\]"),
        (bad(k=torch.zeros(3, 2, 4)), r"k: got shape \[3, 2, 4\]"),
        (bad(k=torch.zeros(2, 3, 2, 4).half()), "k: got torch.float16 on cpu"),
        (bad(v=torch.zeros(2, 3, 2, 5, device="meta")), "v: got torch.float32 on meta"),
        (bad(k=torch.zeros(2, 3, 2, 4, requires_grad=True)), "k: got a tensor that requires"),
        (bad(positions=torch.zeros(2, 3)), r"positions: got shape \[2, 3\]; accepted: \[2, 2\]"),
        (
            (0, torch.zeros(2, 3, 9, 4), torch.zeros(2, 3, 9, 5)),
            r"k: got 9 tokens; accepted: at most 8 more tokens \(capacity 8\)",
        ),
    ],
)
def test_bad_append(call: tuple, message: str) -> None:
    cache = ContiguousCache(SHAPE, capacity=8)
    with pytest.raises(ArgumentError, match=message):
        cache.append(*call)
    assert cache.length == 0
    step(cache, draw(8, 1))


def test_other_bad_arguments() -> None:
    cache = ContiguousCache(SHAPE)
    step(cache, draw(3, 0))
    for length in (-1, 4):
        with pytest.raises(ArgumentError, match=f"length: got {length}; accepted: 0 to"):
            cache.truncate(length)
    with pytest.raises(ArgumentError, match="capacity: got 0"):
        ContiguousCache(SHAPE, capacity=0)
