"""What is particular to the paged cache: sharing, copying, reusing, running out."""

import pytest
import torch

from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.cache import CacheShape, Window
from foveal.kv.paged import PagedCache
from foveal.kv.prefix import Salt
from foveal.kv.store import PageStore

SHAPE = CacheShape(num_layers=2, batch=1, num_kv_heads=1, head_dim=2, value_dim=3)
SPEC = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2, value_dim=3, causal=True)


def store(num_pages: int = 8, page_size: int = 4, **formats: str) -> PageStore:
    return PageStore(SHAPE, num_pages, page_size, **formats)


def feed(cache: PagedCache, tokens: list[int]) -> torch.Tensor:
    """Append tokens whose keys and values follow from them; the last layer's attention."""
    x = torch.tensor(tokens, dtype=torch.float32).sin().view(1, 1, -1, 1)
    x = x.expand(cache.shape.batch, 1, -1, 1)
    positions = cache.next_positions.unsqueeze(1) + torch.arange(len(tokens))
    for layer in range(2):
        k, v = x.expand(-1, -1, -1, 2) + layer, x.expand(-1, -1, -1, 3) - layer
        view = cache.append(layer, k, v, positions)
        out = attend_view(k, view, SPEC, q_positions=positions, backend="unfused")
    return out


def pages(cache: PagedCache, row: int = 0) -> list[int]:
    return list(cache.tables[row].pages.values())


def test_a_fork_shares_pages_and_copies_only_the_one_it_writes() -> None:
    cache = PagedCache(store())
    feed(cache, [1, 2, 3, 4, 5, 6])
    other = cache.fork()
    assert pages(other) == pages(cache)
    pool = cache.store.pool
    assert pool.stats().num_used == 2
    ours, theirs = feed(cache, [7]), feed(other, [8])
    assert pages(other)[0] == pages(cache)[0]
    assert pages(other)[1] != pages(cache)[1]
    assert pool.stats().copies == 1
    fresh = PagedCache(store())
    assert torch.equal(ours, feed(fresh, [1, 2, 3, 4, 5, 6, 7])[:, :, -1:])
    fresh.truncate(6)
    assert torch.equal(theirs, feed(fresh, [8]))
    cache.reset()
    other.reset()
    assert pool.stats().num_free == 8


def test_a_full_page_is_not_rewritten_after_truncation() -> None:
    cache = PagedCache(store())
    feed(cache, [1, 2, 3, 4])
    (full,) = pages(cache)
    cache.truncate(2)
    feed(cache, [5])
    assert pages(cache) != [full]


def test_a_known_prefix_is_taken_up_and_gives_the_same() -> None:
    shared, prompt = store(), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    first = PagedCache(shared, salt=Salt(model="m"))
    assert first.reuse([prompt]) == [0]
    miss = feed(first, prompt)
    first.publish([prompt])
    first.reset()
    assert shared.pool.stats().num_cached == 2
    second = PagedCache(shared, salt=Salt(model="m"))
    assert second.reuse([prompt]) == [8]
    assert second.length == 8
    assert torch.equal(feed(second, prompt[8:]), miss[:, :, 8:])
    second.publish([prompt])
    stats = shared.pool.stats()
    assert (stats.hits, stats.misses, stats.allocations) == (2, 2, 4)


def test_a_prompt_leaves_its_last_token_to_compute() -> None:
    shared, prompt = store(), [1, 2, 3, 4, 5, 6, 7, 8]
    cache = PagedCache(shared, salt=Salt(model="m"))
    feed(cache, prompt)
    cache.publish([prompt])
    assert PagedCache(shared, salt=Salt(model="m")).reuse([prompt]) == [4]


@pytest.mark.parametrize(
    "other",
    [
        lambda store: PagedCache(store, salt=Salt(model="n")),
        lambda store: PagedCache(store, salt=Salt(model="m", tenant="t")),
        lambda store: PagedCache(store, salt=Salt(model="m"), window=Window(8)),
    ],
    ids=["model", "tenant", "window"],
)
def test_nothing_is_taken_up_under_another_salt(other) -> None:
    shared, prompt = store(), [1, 2, 3, 4, 5]
    cache = PagedCache(shared, salt=Salt(model="m"))
    feed(cache, prompt)
    cache.publish([prompt])
    assert other(shared).reuse([prompt]) == [0]
    assert PagedCache(shared, salt=Salt(model="m")).reuse([prompt]) == [4]


def test_sequences_of_a_batch_take_up_what_each_finds() -> None:
    shared = store(16)
    one = PagedCache(shared, batch=1, salt=Salt(model="m"))
    whole = list(range(12))
    expected = feed(one, [*whole, 20])[:, :, -1:]
    one.publish([[*whole, 20]])
    both = PagedCache(shared, batch=2, salt=Salt(model="m"))
    assert both.reuse([[*whole, 20], [0, 1, 2, 3, 9, 9, 9]]) == [12, 4]
    assert both.next_positions.tolist() == [12, 4]
    assert both.length == 12
    assert torch.allclose(feed(both, [20])[:1], expected)
    both.truncate(11)
    assert both.next_positions.tolist() == [11, 3]


def test_after_an_eviction_nothing_is_published() -> None:
    cache = PagedCache(store(), window=Window(4), salt=Salt(model="m"))
    tokens = list(range(12))
    feed(cache, tokens)
    cache.publish([tokens])
    assert cache.tables[0].evicted == 8
    cache.reset()
    assert cache.store.pool.stats().num_cached == 0


def test_a_window_holds_a_fixed_number_of_pages() -> None:
    cache = PagedCache(store(num_pages=4), window=Window(6, 2))
    for token in range(60):
        feed(cache, [token])
        assert len(pages(cache)) <= 4
    parts = list(cache.tables[0].pages)
    assert parts == [0, 13, 14], "the page of the sinks, and those of positions 54 to 59"
    with pytest.raises(ArgumentError, match="length: got 40; accepted: the length 60"):
        cache.truncate(40)


def test_running_out_leaves_no_trace() -> None:
    cache = PagedCache(store(num_pages=3), batch=2)
    feed(cache, [1, 2, 3])
    k, v = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 3)
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 of 3 available"):
        cache.append(0, k, v)
    assert cache.length == 3
    assert cache.store.pool.stats().num_used == 2
    with pytest.raises(ArgumentError, match="layer: got 1"):
        cache.append(1, k, v)
    feed(cache, [4])


def test_used_bytes_count_shared_pages_once() -> None:
    cache = PagedCache(store(), batch=2, salt=Salt(model="m"))
    one = PagedCache(cache.store, salt=Salt(model="m"))
    feed(one, [1, 2, 3, 4, 5])
    one.publish([[1, 2, 3, 4, 5]])
    cache.reuse([[1, 2, 3, 4, 5]] * 2)
    page_bytes = 4 * (2 + 3) * 4 * SHAPE.num_layers
    assert cache.stats.used_bytes == page_bytes
    assert cache.nbytes == 8 * page_bytes


def test_misuse_is_refused() -> None:
    with pytest.raises(ArgumentError, match="store: got scales per channel"):
        PagedCache(store(key_format="int8-channel"))
    cache = PagedCache(store())
    with pytest.raises(ArgumentError, match="salt: got None"):
        cache.reuse([[1, 2]])
    feed(cache, [1])
    salted = PagedCache(store(), salt=Salt(model="m"))
    feed(salted, [1, 2])
    with pytest.raises(ArgumentError, match="prompts: got 1, length 2; accepted: 1 prompts and an"):
        salted.reuse([[1, 2]])
    with pytest.raises(ArgumentError, match="tokens: got 1 of a sequence; accepted: all 2"):
        salted.publish([[1]])


def test_what_is_written_after_a_truncation_is_published_anew() -> None:
    shared = store()
    cache = PagedCache(shared, salt=Salt(model="m"))
    feed(cache, [1, 2, 3, 4, 5])
    cache.publish([[1, 2, 3, 4, 5]])
    cache.truncate(2)
    feed(cache, [8, 9, 9])
    cache.publish([[1, 2, 8, 9, 9]])
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 8, 9, 9]):
        assert PagedCache(shared, salt=Salt(model="m")).reuse([prompt]) == [4]


def test_an_abandoned_step_keeps_no_page() -> None:
    cache = PagedCache(store())
    feed(cache, [1, 2])
    cache.append(0, torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 3))
    feed(cache, [3])
    assert cache.store.pool.stats().num_used == 1


def test_nothing_is_needed_to_begin_again() -> None:
    pages_of_one = store(20, 1)
    cache = PagedCache(pages_of_one, window=Window(4))
    feed(cache, list(range(6)))
    with pytest.raises(ArgumentError, match="whose window is not evicted yet"):
        cache.truncate(5)
    cache.truncate(0)
    assert cache.length == 0 and pages_of_one.pool.stats().num_used == 0
