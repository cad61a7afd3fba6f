"""The page pool against a plain model of it: after any sequence of operations no page is lost,
none is freed twice, and every count is right."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.pages import PagePool
from foveal.kv.prefix import Salt, chain


class Tables(RuleBasedStateMachine):
    """Page tables over one pool. The model keeps the tokens of every table and every page."""

    pool: PagePool | None = None
    tables: tuple | list = ()

    @initialize(num_pages=st.integers(1, 7), page_size=st.integers(1, 3))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.size = page_size
        self.root = Salt(model="m").digest()
        self.tables: list[tuple[list[int], list[int]]] = []  # (pages, tokens)
        self.contents: dict[int, list[int]] = {}  # what the tensors of a page would hold
        self.handed_out = self.matched = self.asked = self.peak = 0

    def take(self, count: int) -> list[int]:
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert not set(pages) & set(self.held()), "handed out a page that is held"
        for page in pages:
            self.contents[page] = []
        self.handed_out += count
        return pages

    def held(self) -> Counter[int]:
        return Counter(page for pages, _ in self.tables for page in pages)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6))
    def open(self, tokens: list[int]) -> None:
        """A new table takes what the pool knows of its prefix and nothing else."""
        digests = chain(self.root, tokens, self.size)
        pages = self.pool.match(digests)
        self.asked += len(digests)
        self.matched += len(pages)
        for i, page in enumerate(pages):
            assert self.contents[page] == tokens[: (i + 1) * self.size]
        self.tables.append((pages, tokens[: len(pages) * self.size]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def write(self, data: st.DataObject, tokens: list[int]) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for token in tokens:
            self.write_one(*table, token)

    def write_one(self, pages: list[int], tokens: list[int], token: int) -> None:
        index, slot = divmod(len(tokens), self.size)
        before = self.held()
        try:
            if index == len(pages):
                pages += self.take(1)
            else:
                self.rewrite(pages, index, slot, tokens)
        except OutOfPages:
            assert not self.pool.num_available
            assert self.held() == before
            return
        tokens.append(token)
        page = pages[index]
        assert self.held()[page] == 1, "wrote into a page that another table holds"
        self.pool.fill(page, slot + 1)
        self.contents[page] = tokens[:]
        if slot + 1 == self.size:
            self.pool.publish(page, chain(self.root, tokens, self.size)[-1])

    def rewrite(self, pages: list[int], index: int, slot: int, tokens: list[int]) -> None:
        old = pages[index]
        alone = self.held()[old] == 1 and self.pool.filled(old) < self.size
        fresh = self.pool.writable(old, slot)
        assert (fresh == old) == alone
        if fresh != old:
            assert fresh not in self.held()
            self.handed_out += 1
        self.contents[fresh] = tokens[:]
        pages[index] = fresh

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        pages, tokens = data.draw(st.sampled_from(self.tables))
        self.pool.share(pages)
        self.tables.append((pages[:], tokens[:]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        pages, tokens = data.draw(st.sampled_from(self.tables))
        length = data.draw(st.integers(0, len(tokens)))
        keep = -(-length // self.size)
        self.pool.release(pages[keep:])
        del pages[keep:], tokens[length:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        pages, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(pages)

    @rule(count=st.integers(0, 3))
    def evict(self, count: int) -> None:
        expected = min(count, self.pool.stats().num_cached)
        assert self.pool.evict(count) == expected

    @invariant()
    def counts_are_right(self) -> None:
        if self.pool is None:
            return
        held, stats = self.held(), self.pool.stats()
        self.peak = max(self.peak, len(held))
        for page in range(stats.num_pages):
            assert self.pool.references(page) == held[page]
        assert stats.num_used == len(held)
        assert stats.num_free + stats.num_cached + stats.num_used == stats.num_pages
        assert self.pool.num_available == stats.num_free + stats.num_cached
        assert stats.allocations == self.handed_out
        assert stats.allocations - stats.frees == stats.num_used + stats.num_cached
        assert (stats.hits, stats.misses) == (self.matched, self.asked - self.matched)
        assert stats.peak == self.peak
        assert stats.evictions <= stats.frees

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        for pages, tokens in self.tables:
            for i, page in enumerate(pages):
                end = min((i + 1) * self.size, len(tokens))
                assert self.contents[page][:end] == tokens[:end]

    def teardown(self) -> None:
        if self.pool is not None:
            for pages, _ in self.tables:
                self.pool.release(pages)
            self.pool.evict(self.pool.num_pages)
            assert sorted(self.pool.allocate(self.pool.num_pages)) == list(
                range(self.pool.num_pages)
            )


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = PagePool(3, 1)
    digests = chain(Salt(model="m").digest(), [5, 6, 7], 1)
    pages = pool.allocate(3)
    for page, digest in zip(pages, digests, strict=True):
        pool.fill(page, 1)
        pool.publish(page, digest)
    pool.release(pages)
    assert pool.stats().num_cached == 3
    pool.allocate(1)
    assert pool.match(digests) == pages[:2]
    assert pool.stats().evictions == 1


def test_exhaustion_raises_and_changes_nothing() -> None:
    pool = PagePool(2, 4)
    pool.allocate(1)
    before = pool.stats()
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 2 available"):
        pool.allocate(2)
    assert pool.stats() == before


def test_fragmentation_is_the_share_of_empty_slots_in_use() -> None:
    pool = PagePool(4, 8)
    full, part = pool.allocate(2)
    pool.fill(full, 8)
    pool.fill(part, 2)
    assert pool.stats().fragmentation == pytest.approx(6 / 16)


def test_misuse_is_refused() -> None:
    pool = PagePool(2, 4)
    (page,) = pool.allocate()
    pool.fill(page, 2)
    for misuse in (
        lambda: pool.release([page, page]),
        lambda: pool.release([page, 1 - page]),
        lambda: pool.share([9]),
        lambda: pool.fill(page, 5),
        lambda: pool.fill(page, 1),
        lambda: pool.publish(page, b"x"),
        lambda: pool.writable(page, 3),
        lambda: PagePool(0, 4),
        lambda: PagePool(4, 0),
    ):
        with pytest.raises(ArgumentError):
            misuse()
    assert pool.references(page) == 1


def test_everything_that_values_depend_on_changes_the_chain() -> None:
    plain = Salt(model="m")
    others = [
        Salt(model="n"),
        Salt(model="m", adapter="a"),
        Salt(model="m", weight_format="bfloat16"),
        Salt(model="m", key_format="int8"),
        Salt(model="m", value_format="int8"),
        Salt(model="m", window="1024+4"),
        Salt(model="m", tenant="t"),
    ]
    assert len({salt.digest() for salt in [plain, *others]}) == 1 + len(others)
    start = plain.digest()
    one, two = chain(start, [1, 2, 3, 4], 2)
    assert chain(start, [1, 2, 3, 4, 5], 2) == [one, two]
    assert chain(one, [3, 4], 2) == [two]
    assert chain(start, [9, 2, 3, 4], 2)[1] != two, "a page depends on the pages before it"
