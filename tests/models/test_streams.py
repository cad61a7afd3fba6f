"""Streams over a windowed cache: for one layer they equal a dense forward over sinks and window at
contiguous positions; before anything is evicted they equal the plain forward at any depth."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from foveal.kv.cache import CacheShape, KVCache, Window
from foveal.kv.paged import PagedCache
from foveal.kv.ring import RingCache
from foveal.kv.store import PageStore
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.nn.rope import RopeConfig
from foveal.nn.scaling import DynamicScaling, LinearScaling

CONFIG = ModelConfig(
    family="llama",
    vocab_size=50,
    width=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_positions=64,
    rope=RopeConfig(dim=8, theta=100.0),
)
WINDOW = Window(9, 3)
IDS = torch.randint(0, 50, (1, 60), generator=torch.Generator().manual_seed(0))
FAR = 10**8 - 10**8 % WINDOW.size

Make = Callable[[CacheShape, Window, torch.dtype], KVCache]


def ring(shape: CacheShape, window: Window, dtype: torch.dtype) -> KVCache:
    return RingCache(shape, window, dtype=dtype)


def pages(shape: CacheShape, window: Window, dtype: torch.dtype) -> KVCache:
    store = PageStore(shape, 40, 4, key_format="float32", value_format="float32")
    return PagedCache(store, window=window, dtype=dtype)


def model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Decoder:
    """Weights drawn wide, so that a wrong rotation or mask cannot hide within a tolerance."""
    decoder = Decoder(config, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            drawn = torch.randn(parameter.shape, generator=rng) * 0.4
            parameter.copy_(drawn + (parameter.ndim == 1))
    return decoder


@torch.inference_mode()
def stream(decoder: Decoder, cache: KVCache, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits [T, V] of ids [1, T], fed in steps of these sizes, the last one for all the rest."""
    logits, start = [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(decoder(ids[:, start : start + size], cache=cache)[0])
        start += size
    return torch.cat(logits)


@torch.inference_mode()
def dense(decoder: Decoder, ids: torch.Tensor, at: int, window: Window) -> torch.Tensor:
    """Logits [V] of a forward over what a query at `at` may see, as a text of its own."""
    first = max(at - window.size + 1, min(window.sinks, at + 1))
    seen = torch.cat([ids[:, : min(window.sinks, at + 1)], ids[:, first : at + 1]], 1)
    return decoder(seen)[0, -1]


@pytest.mark.parametrize("sizes", [[1], [7], [60], [5, 1, 1, 14, 1]], ids=str)
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("own", [None, 4])
def test_one_layer_equals_dense_attention_over_sinks_and_window(
    sizes: list[int], sinks: int, own: int | None
) -> None:
    decoder, window = model(replace(CONFIG, windows=(own,))), Window(9, sinks)
    cache = ring(CONFIG.cache_shape(1), window, torch.float64)
    ours = stream(decoder, cache, IDS, list(sizes))
    for at in range(60):
        error = (ours[at] - dense(decoder, IDS, at, window)).abs().max()
        assert error < 1e-12, f"position {at}"


@pytest.mark.parametrize("make", [ring, pages])
def test_pages_and_rings_agree_with_it_in_float32(make: Make) -> None:
    decoder = model(dtype=torch.float32)
    ours = stream(decoder, make(CONFIG.cache_shape(1), WINDOW, torch.float32), IDS, [8, 1, 1, 6])
    for at in range(60):
        assert (ours[at] - dense(decoder, IDS, at, WINDOW)).abs().max() < 2e-5


@pytest.mark.parametrize("windows", [(), (5, None, 12)], ids=["full", "mixed"])
def test_any_depth_equals_the_plain_forward_before_eviction(
    windows: tuple[int | None, ...],
) -> None:
    decoder = model(replace(CONFIG, num_layers=3, windows=windows))
    shape = decoder.config.cache_shape(1)
    span = WINDOW.span
    ours = stream(decoder, ring(shape, WINDOW, torch.float64), IDS[:, :span], [4, 1, 5])
    with torch.inference_mode():
        assert (ours - decoder(IDS[:, :span])[0]).abs().max() < 1e-12
    later = stream(decoder, ring(shape, WINDOW, torch.float64), IDS, [4])[-1]
    with torch.inference_mode():
        assert (later - decoder(IDS)[0, -1]).abs().max() > 1e-3, "later it forgets"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_position_a_hundred_million_is_as_exact_as_position_ten(dtype: torch.dtype) -> None:
    decoder, exact = model(dtype=dtype), model(dtype=dtype).double()
    errors = []
    for start in (WINDOW.sinks, FAR):
        cache = RingCache(CONFIG.cache_shape(1), WINDOW, dtype=dtype)
        ids = IDS[:, : WINDOW.sinks]
        stream(decoder, cache, ids, [WINDOW.sinks])
        # As if so many tokens had come and gone.
        cache._slots.next = cache._slots.next + start - WINDOW.sinks
        cache._slots.length += start - WINDOW.sinks
        ours = stream(decoder, cache, IDS[:, WINDOW.sinks :], [1])
        assert int(cache.next_positions) == start + 60 - WINDOW.sinks
        late = range(WINDOW.span, 60)
        wanted = torch.stack([dense(exact, IDS, at, WINDOW) for at in late])
        errors.append((ours[[at - WINDOW.sinks for at in late]].double() - wanted).square().mean())
    near, far = errors
    assert far.sqrt() < 1.5 * near.sqrt(), "small angles round a little less, no more"


def test_who_cannot_stream_says_why() -> None:
    assert CONFIG.stream_refusal is None
    linear = replace(CONFIG, rope=RopeConfig(dim=8, scaling=LinearScaling(factor=2.0)))
    assert linear.stream_refusal is None
    learned = replace(CONFIG, rope=None).stream_refusal
    assert learned is not None and "64 learned positions" in learned
    scaling = DynamicScaling(factor=2.0, original_length=32)
    grown = RopeConfig(dim=8, scaling=scaling)
    for field in ("rope", "window_rope"):
        dynamic = replace(CONFIG, **{field: grown}).stream_refusal
        assert dynamic is not None and "DynamicScaling" in dynamic
