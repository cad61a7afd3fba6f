"""Tiers: no page lost, none in two places, counts right, and content as it was stored."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape
from foveal.kv.formats import parse_format
from foveal.kv.layout import Key
from foveal.kv.store import PageStore
from foveal.kv.tiers import TierConfig, Tiers
from properties import examples

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=8, value_dim=6)
SIZE, NUM = 4, 24
KEYS = [(i % 2, i // 2) for i in range(NUM)]
"""Page i of the store is retired under key i."""


@pytest.fixture(scope="module")
def store() -> PageStore:
    return filled("float32")


def filled(format: str) -> PageStore:
    """Pages of random keys and values."""
    store = PageStore(SHAPE, NUM, SIZE, key_format=format, value_format=format)
    rng = torch.Generator().manual_seed(0)
    for layer in range(2):
        k, v = (torch.randn(2, NUM, SIZE, size, generator=rng) for size in (8, 6))
        store.write_pages(layer, torch.arange(NUM), k, v)
    return store


def make(*configs: TierConfig, format: str = "float32", forget: bool = False) -> Tiers:
    return Tiers(SHAPE, SIZE, configs, key_format=format, value_format=format, forget=forget)


def three(warm: int, cold: int, frozen: int, **settings: object) -> Tiers:
    """Sizes in pages."""
    sizes = {"warm": warm, "cold": cold, "frozen": frozen}
    configs = [TierConfig(name=name, tokens=SIZE * n) for name, n in sizes.items()]
    return make(*configs, **settings)


def room(tiers: Tiers) -> int:
    return sum(stats.capacity - stats.num_pages for stats in tiers.stats)


def check(
    tiers: Tiers, store: PageStore, keys: list[Key], layer: int, pages: list[int] | None = None
) -> None:
    """What is read is what the store holds in `pages`, as the format keeps it."""
    pages = [KEYS.index(key) for key in keys] if pages is None else pages
    index = torch.tensor(pages, dtype=torch.int64)
    arena = Arena()
    with arena.frame(), store.arena.frame():
        read = tiers.read(layer, keys, torch.float32, arena)
        stored = store.read(layer, index, torch.float32)
        for ours, theirs, format in zip(read, stored, tiers.layout.formats, strict=True):
            again = format.decode(format.encode(theirs), torch.float32)
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs if format in store.formats else again)


def check_places(*tiers: Tiers) -> None:
    """Every page is in one place, every slot is of one page or free."""
    tiers[0].settle()
    shelves = tiers[0]._chain.shelves
    places = [(level, page.slot) for level, s in enumerate(shelves) for page in s.held.values()]
    assert len(places) == len(set(places)), "one place holds one page"
    held = {id(page) for shelf in shelves for page in shelf.held.values()}
    named = [page for one in tiers for page in one._pages.values()]
    assert held == {id(page) for page in named}, "no page is lost, none is left over"
    for page in named:
        assert page.references == sum(page in one._pages.values() for one in tiers)
    for level, shelf in enumerate(shelves):
        slots = [page.slot for page in shelf.held.values()]
        assert sorted(slots + shelf.freed) == list(range(shelf.num_touched)), "no slot is lost"
        assert all(page.level == level for page in shelf.held.values())
        assert shelf.stats(1).num_pages == len(slots) <= shelf.num_slots


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int8-channel", "int4"])
def test_pages_sink_from_tier_to_tier_and_are_what_was_stored(
    store: PageStore, format: str
) -> None:
    tiers = three(2, 3, 21, format=format)
    tiers.retire(KEYS, store, range(NUM))
    check_places(tiers)
    assert [stats.num_pages for stats in tiers.stats] == [1, 2, 21]
    for layer in range(2):
        check(tiers, store, KEYS, layer)
        check(tiers, store, KEYS[::-3], layer)
    tiers.close()


def test_codes_of_the_same_format_are_taken_as_they_are() -> None:
    store = filled("int4")
    tiers = make(TierConfig(name="warm", tokens=96), format="int4")
    tiers.retire(KEYS, store, range(NUM))
    check(tiers, store, KEYS, 1)


def test_counts() -> None:
    store = filled("float32")
    tiers = three(2, 3, 20)
    tiers.retire(KEYS[:5], store, range(5))
    tiers.settle()
    before = tiers.stats
    assert [stats.num_pages for stats in before] == [1, 2, 2]
    assert [stats.moves for stats in before] == [5, 4, 2]
    check(tiers, store, KEYS[:5], 0)
    after = tiers.stats
    assert [stats.hits for stats in after] == [1, 2, 2]
    assert [stats.misses for stats in after] == [4, 2, 0]
    assert [stats.moved_bytes for stats in after] == [n * tiers.page_bytes for n in (5, 4, 2)]
    assert after[2].waited_s > before[2].waited_s, "the file was read while the reader waited"
    assert tiers.used_bytes == 3 * tiers.page_bytes
    assert tiers.nbytes == 5 * tiers.page_bytes
    assert tiers.disk_bytes > 2 * tiers.page_bytes


def test_what_is_read_stays_near_and_the_least_recently_used_sinks(store: PageStore) -> None:
    tiers = three(4, 2, 20)
    tiers.retire(KEYS[:3], store, range(3))
    check(tiers, store, KEYS[:1], 0)
    tiers.retire(KEYS[3:4], store, [3])
    tiers.settle()
    assert [tiers._pages[key].level for key in KEYS[:4]] == [0, 1, 0, 0]


def test_promotion_exchanges_pages_even_where_all_is_full() -> None:
    store = filled("float32")
    tiers = three(3, 2, 3, forget=True)
    tiers.retire(KEYS[:6], store, range(6))
    assert room(tiers) == 0
    low = KEYS[:2]
    tiers.promote(low)
    check_places(tiers)
    assert [tiers._pages[key].level for key in low] == [0, 0]
    check(tiers, store, KEYS[:6], 1)


class Model:
    """Tiers, and beside them which page of the store each key is to have."""

    def __init__(self, tiers: Tiers, pages: dict[Key, int]) -> None:
        self.tiers, self.pages = tiers, pages

    def some(self, data: st.DataObject) -> list[Key]:
        if not self.pages:
            return []
        return data.draw(st.lists(st.sampled_from(list(self.pages)), max_size=5, unique=True))

    def check(self, store: PageStore, keys: list[Key], layer: int) -> None:
        check(self.tiers, store, keys, layer, [self.pages[key] for key in keys])

    def retire(self, data: st.DataObject, store: PageStore, forget: bool) -> None:
        keys = [key for key in self.some_fresh(data) if key not in self.pages]
        pages = data.draw(st.lists(st.integers(0, NUM - 1), min_size=len(keys), max_size=len(keys)))
        places = room(self.tiers)
        try:
            forgotten = self.tiers.retire(keys, store, pages)
        except OutOfPages:
            assert len(keys) > places
            if forget:  # the room is others', whatever it gave up of its own
                self.pages = {key: self.pages[key] for key in self.tiers.keys}
            return
        self.pages |= dict(zip(keys, pages, strict=True))
        assert forgotten == list(self.pages)[: len(forgotten)], "the oldest go first"
        assert forget or not forgotten
        self.pages = {key: page for key, page in self.pages.items() if key not in forgotten}

    def some_fresh(self, data: st.DataObject) -> list[Key]:
        return data.draw(st.lists(st.sampled_from(KEYS), max_size=4, unique=True))


ACTIONS = ["retire", "retire", "retire", "read", "scan", "promote", "drop"]
ACTIONS += ["fork", "look", "restore", "reset"]


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations(store: PageStore, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 4)) for _ in range(3)]
    forget = data.draw(st.booleans())
    models = [Model(three(*sizes, forget=forget), {})]
    for _ in range(data.draw(st.integers(1, 25))):
        one = data.draw(st.sampled_from(models))
        action, some = data.draw(st.sampled_from(ACTIONS)), one.some(data)
        if action == "retire":
            one.retire(data, store, forget)
        elif action == "read":
            one.check(store, some, data.draw(st.integers(0, 1)))
        elif action == "scan" and some:
            one.tiers.prefetch(0, some)
            one.tiers.prefetch(1, some)
            one.check(store, some, 1)
            one.check(store, some, 0)
        elif action == "promote":
            one.tiers.promote(some)
        elif action == "drop":
            one.tiers.drop(some)
            one.pages = {key: page for key, page in one.pages.items() if key not in some}
        elif action == "fork" and len(models) < 3:
            models.append(Model(one.tiers.fork(), dict(one.pages)))
        elif action == "look":
            check_places(*(model.tiers for model in models))
        elif action == "restore" and len(models) == 1:
            one.tiers.restore({name: t.clone() for name, t in one.tiers.state().items()})
        elif action == "reset":
            one.tiers.reset()
            one.pages = {}
        assert one.tiers.keys == list(one.pages)
    check_places(*(model.tiers for model in models))
    for model in models:
        if model.pages:
            model.check(store, list(model.pages), 1)
        model.tiers.close()


def test_reading_while_pages_move(store: PageStore) -> None:
    """A reader that goes on while the mover promotes and demotes sees only what was stored."""
    tiers = three(4, 4, 20)
    tiers.retire(KEYS, store, range(NUM))
    rng = random.Random(0)
    for _ in range(150):
        some = rng.sample(KEYS, 5)
        tiers.promote(some[:3])
        tiers.prefetch(0, some[1:])
        check(tiers, store, some, 1)
        check(tiers, store, some[1:], 0)
    check_places(tiers)
    assert sum(stats.moves for stats in tiers.stats) > 100


def test_pages_dropped_while_they_move() -> None:
    """Pages of a megabyte, dropped at some moment of their way up and down."""
    shape = CacheShape(num_layers=4, batch=1, num_kv_heads=8, head_dim=64, value_dim=64)
    store = PageStore(shape, 1, 64)
    configs = [TierConfig(name=name, tokens=64 * 2) for name in ("cold", "frozen")]
    tiers, keys = Tiers(shape, 64, configs), [(0, 0), (0, 1)]
    assert tiers.page_bytes == 2**20
    for i in range(40):
        tiers.retire(keys, store, [0, 0])
        tiers.promote(keys)
        time.sleep(i % 8 * 2e-4)
        tiers.drop(keys)
    check_places(tiers)


def test_forgetting_drops_the_oldest_and_says_so(store: PageStore) -> None:
    tiers = make(
        TierConfig(name="cold", tokens=8), TierConfig(name="frozen", tokens=8), forget=True
    )
    capacity = tiers.capacity
    assert tiers.retire(KEYS[:capacity], store, range(capacity)) == []
    more = range(capacity, capacity + 2)
    assert tiers.retire([KEYS[i] for i in more], store, more) == KEYS[:2]
    assert tiers.keys == KEYS[2 : capacity + 2]
    check(tiers, store, tiers.keys, 0)


def test_without_forgetting_a_full_chain_refuses_and_loses_nothing(store: PageStore) -> None:
    tiers = make(TierConfig(name="warm", tokens=8), TierConfig(name="frozen", tokens=8))
    capacity = tiers.capacity
    tiers.retire(KEYS[: capacity - 1], store, range(capacity - 1))
    with pytest.raises(OutOfPages, match="the frozen tier holds all of its 2 pages"):
        tiers.retire(KEYS[10:13], store, range(10, 13))
    assert tiers.keys == KEYS[: capacity - 1]
    check_places(tiers)
    check(tiers, store, tiers.keys, 0)


def test_a_fork_shares_pages_until_both_have_dropped_them(store: PageStore) -> None:
    before = set(threading.enumerate())
    tiers = three(2, 2, 20)
    tiers.retire(KEYS[:6], store, range(6))
    other = tiers.fork()
    tiers.reset()
    check(other, store, KEYS[:6], 0)
    tiers.retire(KEYS[:1], store, [5])
    check_places(tiers, other)
    check(other, store, KEYS[:6], 1)
    tiers.close()
    check(other, store, KEYS[:6], 1)
    other.close()
    assert set(threading.enumerate()) <= before


def test_state_is_put_back_into_tiers_of_other_sizes(store: PageStore) -> None:
    tiers, other = three(2, 2, 20), make(TierConfig(name="cold", tokens=96))
    tiers.retire(KEYS[:9], store, range(9))
    tiers.drop(KEYS[3:4])
    tiers.promote(KEYS[:1])
    other.restore(tiers.state())
    assert other.keys == tiers.keys == KEYS[:3] + KEYS[4:9]
    for layer in range(2):
        check(other, store, other.keys, layer)
    small = make(TierConfig(name="cold", tokens=8))
    with pytest.raises(OutOfPages):
        small.restore(tiers.state())
    assert not small.keys
    with pytest.raises(ArgumentError, match=r"state tiers\.0: got torch.uint8 of shape"):
        make(TierConfig(name="cold", tokens=96), format="int8").restore(tiers.state())


def test_bytes_are_counted_without_allocating(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    configs = [
        TierConfig(name="warm", nbytes=5000),
        TierConfig(name="cold", tokens=30),
        TierConfig(name="frozen", nbytes=2**40, path=path),
    ]
    meta = Tiers(SHAPE, SIZE, configs, device="meta")
    assert meta.nbytes == 5000 // meta.page_bytes * meta.page_bytes + 8 * meta.page_bytes
    assert meta.nbytes == make(*configs[:2]).nbytes
    assert meta.disk_bytes == 0 and not path.parent.exists()


@pytest.mark.parametrize("format", ["float32", "int8", "int4-channel"])
def test_a_page_takes_what_its_format_says(format: str) -> None:
    shape = CacheShape(num_layers=3, batch=1, num_kv_heads=2, head_dim=64, value_dim=64)
    found = Tiers(
        shape, 16, [TierConfig(name="cold", tokens=16)], key_format=format, value_format=format
    )
    assert found.page_bytes == 3 * 2 * 2 * parse_format(format).nbytes(16, 64)


def test_misuse_is_refused(store: PageStore, tmp_path: Path) -> None:
    cold = TierConfig(name="cold", tokens=8)
    for configs in ([], [cold, TierConfig(name="warm", tokens=8)], [cold, cold]):
        with pytest.raises(ArgumentError, match=r"tiers: got .* some of warm, cold, frozen, in th"):
            make(*configs)
    with pytest.raises(ArgumentError, match="tier: got 'tepid'; accepted: warm, cold, frozen"):
        TierConfig(name="tepid", tokens=1)
    with pytest.raises(ArgumentError, match="cold size: got nbytes 1, tokens 1; accepted: one"):
        TierConfig(name="cold", tokens=1, nbytes=1)
    with pytest.raises(ArgumentError, match=r"path: got .* of a cold tier"):
        TierConfig(name="cold", tokens=1, path=tmp_path)
    for size in ({"tokens": 0}, {"nbytes": 63}):
        with pytest.raises(ArgumentError, match=r"cold size: got .* at least a page: 896 bytes"):
            make(TierConfig(name="cold", **size))
    tiers = make(cold, format="int8")
    tiers.retire(KEYS[:1], store, [0])
    with pytest.raises(ArgumentError, match=r"key: got \(0, 0\); accepted: one that is not there"):
        tiers.retire(KEYS[:1], store, [0])
    with pytest.raises(ArgumentError, match="store: got int4; accepted: int8, or full precision"):
        tiers.retire(KEYS[1:2], filled("int4"), [1])
    with pytest.raises(ArgumentError, match="store: got pages of 8; accepted: pages of 4 tokens"):
        tiers.retire(KEYS[1:2], PageStore(SHAPE, 1, 8), [0])
