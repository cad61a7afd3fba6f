"""What it costs to keep eight times more than fits the fast memory, against keeping all of it there
and against keeping nothing.

A model of random weights (its size is in the title: time does not depend on what weights say) goes
on with an answer to a text, token by token. Compared are

    all hot      every page in the pages that attention computes on
    warm, ...    an eighth of the tokens hot, the rest in a tier: codes of int8 in memory, exact
                 pages in memory of the host, exact pages in a file on disk
    recomputed   nothing kept: the text is read again before the answer

and the seconds of a token are those of the answer, with the reading spread over its tokens where
the text is read again. All have the same text; decoding is timed in turn (`hardware.timer`), one
token of each, and what each appends is taken back after every token, so that the length stays.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from foveal.bench.attention import thinned
from foveal.bench.finding import Finding, of_samples
from foveal.bench.record import Run
from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.hardware.timer import Samples, interleave, time_one
from foveal.kv.cache import KVCache
from foveal.kv.paged import PagedCache
from foveal.kv.store import PageStore
from foveal.kv.tiered import TieredCache
from foveal.kv.tiers import TierConfig, Tiers
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.nn.rope import RopeConfig

PAGE_SIZE = 64
HOT_SHARE = 8
ANSWER_TOKENS = 64
"""Of an answer, over which reading the text again is spread."""
CHUNK = 512
MODEL = ModelConfig(
    family="llama",
    vocab_size=1024,
    width=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=1408,
    max_positions=131_072,
    rope=RopeConfig(dim=64, theta=500_000.0),
    tied=True,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """One way to keep the text."""

    name: str
    tier: str | None = None
    """Where all but the hot pages are."""
    format: str | None = None
    """In which they are kept there; None for the model's dtype."""


KEEPINGS: tuple[Keeping, ...] = (
    Keeping(name="all hot"),
    Keeping(name="warm, int8", tier="warm", format="int8"),
    Keeping(name="warm", tier="warm"),
    Keeping(name="cold", tier="cold"),
    Keeping(name="frozen", tier="frozen"),
)


def measure(num_tokens: int, num_samples: int, run: Run) -> Iterator[Finding]:
    """Every way to keep so many tokens, and not keeping them."""
    if num_tokens < HOT_SHARE * PAGE_SIZE:
        raise ArgumentError("tokens", num_tokens, f"at least {HOT_SHARE * PAGE_SIZE}")
    model = Decoder(MODEL)
    with ExitStack() as closing:
        caches = {keeping.name: _cache(keeping, num_tokens, model) for keeping in KEEPINGS}
        for cache in caches.values():
            _fill(cache, num_tokens, model.dtype)
            if isinstance(cache, TieredCache):
                closing.callback(cache.tiers.close)
                cache.tiers.settle()
        calls = {name: _answering(model, cache) for name, cache in caches.items()}
        samples = interleave(calls, budget_s=0.0, min_samples=num_samples)
        for name, cache in caches.items():
            yield _finding(name, cache, samples[name], num_tokens, run)
    anew = _cache(KEEPINGS[0], num_tokens, model)
    yield _recomputed(
        samples["all hot"], time_one(_reading(model, anew, num_tokens)), num_tokens, run
    )


def _fill(cache: KVCache, num_tokens: int, dtype: torch.dtype) -> None:
    """With random keys and values: time does not depend on what they say."""
    rng = torch.Generator().manual_seed(0)
    for start in range(0, num_tokens, CHUNK):
        shape = (1, MODEL.num_kv_heads, min(CHUNK, num_tokens - start), MODEL.head_dim)
        k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in "kv")
        for layer in range(MODEL.num_layers):
            cache.append(layer, k, v)


def _cache(keeping: Keeping, num_tokens: int, model: Decoder) -> PagedCache | TieredCache:
    shape, exact = model.config.cache_shape(1), dtype_name(model.dtype)
    num_hot = num_tokens if keeping.tier is None else num_tokens // HOT_SHARE
    num_pages = -(-(num_hot + CHUNK) // PAGE_SIZE) + 2
    store = PageStore(shape, num_pages, PAGE_SIZE, key_format=exact, value_format=exact)
    hot = PagedCache(store, dtype=model.dtype)
    if keeping.tier is None:
        return hot
    format = keeping.format or exact
    tiers = Tiers(
        shape,
        PAGE_SIZE,
        [TierConfig(name=keeping.tier, tokens=num_tokens)],
        key_format=format,
        value_format=format,
    )
    return TieredCache(hot, tiers, num_hot=num_hot)


def _reading(model: Decoder, cache: KVCache, num_tokens: int) -> Callable[[], None]:
    text = torch.arange(num_tokens).unsqueeze(0) % MODEL.vocab_size

    def read() -> None:
        with torch.inference_mode():
            for start in range(0, num_tokens, CHUNK):
                model.hidden(text[:, start : start + CHUNK], cache=cache)

    return read


def _answering(model: Decoder, cache: KVCache) -> Callable[[], None]:
    """One token more, which is taken back."""
    length, token = cache.length, torch.zeros(1, 1, dtype=torch.int64)

    def answer() -> None:
        with torch.inference_mode():
            model.logits(model.hidden(token, cache=cache)[:, -1])
        cache.truncate(length)

    return answer


def _finding(
    name: str,
    cache: PagedCache | TieredCache,
    samples: Samples,
    num_tokens: int,
    run: Run,
) -> Finding:
    values: dict[str, float | None] = {
        "token_s": samples.median_s,
        "tokens_per_s": 1 / samples.median_s,
        "quartiles_s": samples.spread_s,
        "memory_bytes": float(cache.nbytes),
    }
    if isinstance(cache, TieredCache):
        (tier,) = cache.tiers.stats
        values |= {
            "disk_bytes": float(cache.tiers.disk_bytes),
            "pages_there": float(tier.num_pages),
            "hits": float(tier.hits),
            "misses": float(tier.misses),
            "moves": float(tier.moves),
            "moved_bytes": float(tier.moved_bytes),
            "waited_s": tier.waited_s,
        }
    return Finding(
        benchmark="kv",
        part="tiers",
        title=_title(num_tokens),
        subject={"kept": name},
        values=values,
        curve=of_samples(thinned(samples)),
        run=run,
    )


def _recomputed(decoding: Samples, reading_s: float, num_tokens: int, run: Run) -> Finding:
    token_s = decoding.median_s + reading_s / ANSWER_TOKENS
    return Finding(
        benchmark="kv",
        part="tiers",
        title=_title(num_tokens),
        subject={"kept": f"nothing: read again for an answer of {ANSWER_TOKENS} tokens"},
        values={"token_s": token_s, "tokens_per_s": 1 / token_s, "reading_s": reading_s},
        curve={},
        run=run,
    )


def _title(num_tokens: int) -> str:
    return (
        f"Decoding with {num_tokens:,} tokens kept, {num_tokens // HOT_SHARE:,} of them hot: "
        f"{MODEL.num_layers} layers, width {MODEL.width}, {MODEL.num_heads}/{MODEL.num_kv_heads} "
        f"heads of {MODEL.head_dim}, random weights, float32, pages of {PAGE_SIZE}"
    )
