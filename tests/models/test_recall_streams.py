"""Whole models over a cache that recalls: full attention at any depth where everything comes back,
layers with windows and rotations of their own included, and positions without end."""

from dataclasses import replace

import pytest
import torch

from foveal.engine.policies.recall import Recall
from foveal.engine.policy import Storage
from foveal.kv.cache import Window
from foveal.kv.recall import RecallCache
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.nn.rope import RopeConfig

CONFIG = ModelConfig(
    family="gemma3",
    vocab_size=50,
    width=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_positions=128,
    rope=RopeConfig(dim=8, theta=1000.0),
)
MIXED = replace(CONFIG, windows=(20, None, 70, 9), window_rope=RopeConfig(dim=8, theta=100.0))
IDS = torch.randint(0, 50, (1, 230), generator=torch.Generator().manual_seed(0))


def model(config: ModelConfig) -> Decoder:
    """Weights drawn wide, so that a wrong rotation or mask cannot hide within a tolerance."""
    decoder, rng = Decoder(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            drawn = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(drawn + (parameter.ndim == 1))
    return decoder


def recalling(config: ModelConfig, policy: Recall) -> RecallCache:
    storage = Storage(
        shape=config.cache_shape(1),
        dtype=torch.float32,
        format="float32",
        device=torch.device("cpu"),
        step_tokens=64,
        ropes=config.ropes,
        fingerprint=lambda: "one model",
    )
    return policy.make(Window(32, 16), storage)


@torch.inference_mode()
def stream(decoder: Decoder, cache: RecallCache, sizes: list[int]) -> torch.Tensor:
    """Logits [T, V] of the tokens, fed in steps of these sizes in turn."""
    logits, start = [], 0
    while start < IDS.shape[1]:
        size = sizes[len(logits) % len(sizes)]
        logits.append(decoder(IDS[:, start : start + size], cache=cache)[0])
        start += size
    return torch.cat(logits)


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("sizes", [[1], [64], [7, 1, 30]], ids=str)
def test_everything_recalled_is_the_plain_forward_at_any_depth(
    config: ModelConfig, sizes: list[int]
) -> None:
    decoder = model(config)
    cache = recalling(config, Recall(budget=2**40, distances="exact", retired=2**20))
    with torch.inference_mode():
        plain = decoder(IDS)[0]
    assert (stream(decoder, cache, sizes) - plain).abs().max() < 2e-4 * plain.abs().max()
    assert cache.stats.num_retired > 8


@pytest.mark.parametrize("distances", ["clamped", "exact"])
def test_layers_that_cannot_see_so_far_fetch_nothing(distances: str) -> None:
    fetched = []
    for config in (CONFIG, MIXED):
        policy = Recall(budget=2**40, retired=2**20, distances=distances, behind=32)
        cache = recalling(config, policy)
        stream(model(config), cache, [32])
        fetched.append(cache.stats.fetched_bytes)
    # Clamped keys stand 32 to 47 positions back, which windows of 20 and 9 do not reach and 70
    # does; of exact ones, 70 reaches a few.
    every, some = fetched
    assert 2 * some == every if distances == "clamped" else every / 4 < some < every / 2


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["full", "mixed"])
def test_clamped_streams_do_not_depend_on_how_much_has_gone_by(config: ModelConfig) -> None:
    """One layer after millions of tokens that have come and gone, against one at the start."""
    one = replace(config, num_layers=1, windows=config.windows[1:2])
    decoder, last = model(one), []
    for skipped in (0, 16 * 10**6):
        cache = recalling(one, Recall(budget=2**40, retired=2**13))
        with torch.inference_mode():
            decoder(IDS[:, :16], cache=cache)
            # As if so many tokens had come and gone.
            cache._hot._slots.next = cache._hot._slots.next + skipped
            cache._hot._slots.length += skipped
            for start in range(16, 230, 8):
                out = decoder(IDS[:, start : start + 8], cache=cache)
        last.append(out[0])
        assert cache.stats.num_forgotten > 0 and cache.length == 230 + skipped
    assert (last[0] - last[1]).abs().max() < 1e-4
