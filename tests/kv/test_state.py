"""What a cache holds can be kept elsewhere and put back into another cache, pads and all."""

import pytest
import torch

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, Window
from foveal.kv.ring import RingCache

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=1, head_dim=4, value_dim=2)


def step(cache: RingCache, positions: torch.Tensor) -> list[torch.Tensor]:
    """Append tokens to both layers; every tensor of the views."""
    seen = []
    rng = torch.Generator().manual_seed(cache.length)
    for layer in range(2):
        k, v = (torch.randn(2, 1, positions.shape[1], n, generator=rng) for n in (4, 2))
        for tile in cache.append(layer, k, v, positions).tiles():
            seen += [tile.keys.clone(), tile.values.clone(), tile.positions.clone()]
    return seen


def test_a_ring_put_back_goes_on_to_the_bit() -> None:
    cache, other = (RingCache(SHAPE, Window(5, 2)) for _ in range(2))
    step(cache, torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]]))
    for position in range(2, 9):
        step(cache, torch.tensor([[position], [position + 2]]))
    kept = {name: tensor.clone() for name, tensor in cache.state().items()}
    step(other, torch.tensor([[0, 1], [0, 1]]))
    other.restore(kept)
    assert other.length == cache.length == 11
    for positions in ([[9, 10, -1], [11, 12, 13]], [[11], [14]]):
        ours, theirs = step(cache, torch.tensor(positions)), step(other, torch.tensor(positions))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for one in (cache, other):
        one.truncate(14)  # what the pads took is known to both
    assert torch.equal(cache.next_positions, other.next_positions)


def test_the_state_of_another_cache_is_refused() -> None:
    cache = RingCache(SHAPE, Window(5, 2))
    with pytest.raises(ArgumentError, match=r"state keys\.0: got shape \[2, 1, 9, 4\]"):
        cache.restore(RingCache(SHAPE, Window(6, 2)).state())
    with pytest.raises(ArgumentError, match=r"state keys\.0: got nothing"):
        cache.restore({})
