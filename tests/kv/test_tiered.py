"""What is particular to the tiered cache: what is where, and what happens when something is full
or lost."""

from pathlib import Path

import pytest
import torch

from foveal.attention.operands import Operands
from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ArgumentError, LoadError, OutOfPages
from foveal.kv.cache import CacheShape, Window
from foveal.kv.formats import parse_format
from foveal.kv.paged import PagedCache
from foveal.kv.store import PageStore
from foveal.kv.tiered import TieredCache
from foveal.kv.tiers import TierConfig, Tiers
from oracle import attention
from sights import sight

SHAPE = CacheShape(num_layers=2, batch=2, num_kv_heads=2, head_dim=8, value_dim=6)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, causal=True)


def tiers(
    sizes: dict[str, int], path: Path | None = None, format: str = "float32", forget: bool = False
) -> Tiers:
    """Sizes in pages of 4."""
    configs = [
        TierConfig(name=name, tokens=4 * size, path=path if name == "frozen" else None)
        for name, size in sizes.items()
    ]
    return Tiers(SHAPE, 4, configs, key_format=format, value_format=format, forget=forget)


def cache(
    kept: Tiers, num_hot: int = 5, window: Window | None = None, hot_pages: int = 12
) -> TieredCache:
    return TieredCache(
        PagedCache(PageStore(SHAPE, hot_pages, 4), window=window), kept, num_hot=num_hot
    )


class Feed:
    """Random tokens for a cache, and what it should hold."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.keys, self.values = torch.empty(2, 2, 2, 0, 8), torch.empty(2, 2, 2, 0, 6)
        self.positions = torch.empty(2, 0, dtype=torch.int64)

    def step(self, held: TieredCache, positions: list[list[int]]) -> list[torch.Tensor]:
        """Append tokens to both layers; attention over each, after it equals the oracle's."""
        num, out = len(positions[0]), []
        k, v = (torch.randn(2, 2, 2, num, size, generator=self.rng) for size in (8, 6))
        self.keys, self.values = torch.cat([self.keys, k], 3), torch.cat([self.values, v], 3)
        at = torch.tensor(positions).reshape(2, num)
        self.positions = torch.cat([self.positions, at], 1)
        q = torch.randn(2, 4, num, 8, generator=self.rng)
        for layer in range(2):
            view = held.append(layer, k[layer], v[layer], at)
            out.append(attend_view(q, view, SPEC, q_positions=at, backend="unfused"))
        return out

    def both(self, held: TieredCache, count: int) -> None:
        """`count` more tokens for both sequences, one at a time."""
        for _ in range(count):
            self.step(held, held.next_positions.unsqueeze(1).tolist())

    def check(self, held: TieredCache, format: str = "float32", exact: int = 0) -> None:
        """Layer 0 holds every token once; those from `exact` on as they came, others coded."""
        seen = torch.zeros(2, int(self.positions.max()) + 1, dtype=torch.int64)
        coded = parse_format(format)
        for tile in held.view(0).tiles(sight()):
            assert tile.positions is not None
            for row in range(2):
                for slot, position in enumerate(tile.positions[row].tolist()):
                    if position < 0:
                        continue
                    seen[row, position] += 1
                    index = self.positions[row].tolist().index(position)
                    key, value = (x[0, row, :, index] for x in (self.keys, self.values))
                    if position < exact:
                        key, value = (
                            coded.decode(coded.encode(x.unsqueeze(1)), x.dtype).squeeze(1)
                            for x in (key, value)
                        )
                    assert torch.equal(tile.keys[row, :, slot], key)
                    assert torch.equal(tile.values[row, :, slot], value)
        tokens = torch.arange(seen.shape[1]) < held.next_positions.unsqueeze(1)
        assert torch.equal(seen, tokens.long())


def where(held: TieredCache) -> list[int]:
    """Pages in each tier."""
    held.tiers.settle()
    return [stats.num_pages for stats in held.tiers.stats]


def test_everything_stays_visible_in_every_tier() -> None:
    held, feed = cache(tiers({"warm": 3, "cold": 4, "frozen": 40}), num_hot=5), Feed()
    feed.step(held, [[-1, -1, 0, 1], [0, 1, 2, 3]])
    feed.both(held, 58)
    # 60 and 62 tokens: pages 0 .. 12 and 0 .. 13 end at least 5 before the end.
    assert where(held) == [2, 3, 22]
    feed.check(held)
    hot = held.stats.used_bytes // held.tiers.page_bytes - 5
    assert hot == 2 + 2
    assert held.nbytes == 12 * held.tiers.page_bytes + 7 * held.tiers.page_bytes
    assert held.stats.capacity == (12 + 45) * 4
    late = [tile.positions for tile in held.view(0).tiles(sight(first=41))]
    seen = torch.cat([at.flatten() for at in late if at is not None])
    assert int(seen[seen >= 0].min()) == 40, "no page is read that nobody sees"


def test_a_warm_page_is_coded_once_whichever_way_it_goes() -> None:
    held, feed = (
        cache(tiers({"warm": 2, "cold": 2, "frozen": 40}, format="int8"), num_hot=0),
        Feed(),
    )
    feed.step(held, [list(range(20))] * 2)
    feed.check(held, "int8", exact=20)
    held.tiers.promote(held.tiers.keys)
    held.tiers.settle()
    feed.check(held, "int8", exact=20)


def test_tiles_of_many_pages_and_sequences_of_different_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of two pages; one sequence has many, the other one or none."""
    monkeypatch.setattr("foveal.kv.tiered.TILE_TOKENS", 8)
    held, feed = cache(tiers({"cold": 1, "frozen": 40}), num_hot=0, hot_pages=20), Feed()
    feed.step(held, [list(range(27)), [*range(5), *[-1] * 22]])
    feed.both(held, 1)
    feed.check(held)
    feed.step(held, [[28, -1], [-1, 6]])
    feed.check(held)
    only = held.view(0).rows(torch.tensor([1]))
    assert only.num_rows == 1
    assert sum(int((t.positions >= 0).sum()) for t in only.tiles(sight())) == 7


def test_attention_equals_the_oracle_to_the_end() -> None:
    held, feed = cache(tiers({"warm": 2, "cold": 2, "frozen": 40}), num_hot=3), Feed()
    feed.both(held, 37)
    q = torch.randn(2, 4, 1, 8)
    at = torch.tensor([[36], [36]])
    for layer in range(2):
        ours = attend_view(q, held.view(layer), SPEC, q_positions=at, backend="unfused")
        exact, _ = attention(q, feed.keys[layer], feed.values[layer], SPEC, Operands())
        assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-5)


def test_truncation_into_a_retired_page_makes_it_hot_again() -> None:
    held, feed = cache(tiers({"cold": 2, "frozen": 40}), num_hot=0), Feed()
    feed.both(held, 30)
    held.truncate(6)
    assert sum(where(held)) == 2
    feed.keys, feed.values = feed.keys[..., :6, :], feed.values[..., :6, :]
    feed.positions = feed.positions[:, :6]
    feed.check(held)
    feed.both(held, 9)
    feed.check(held)


def test_what_the_window_has_passed_leaves_every_tier() -> None:
    held, feed = cache(tiers({"warm": 2, "frozen": 40}), num_hot=0, window=Window(14, 5)), Feed()
    feed.step(held, [[-1, -1, -1, 0], [0, 1, 2, 3]])
    feed.both(held, 60)
    # 61 and 64 tokens; of pages 0 and 1, which hold the sinks 0 .. 4, none is ever retired
    parts = set(held.tiers.keys)
    assert {part for row, part in parts if row == 0} == {11, 12, 13, 14}
    assert {part for row, part in parts if row == 1} == {12, 13, 14, 15}
    assert [sorted(table.pages)[:2] for table in held._hot.tables] == [[0, 1], [0, 1]]
    assert [table.evicted for table in held._hot.tables] == [44, 48]
    with pytest.raises(ArgumentError, match="one whose window is not evicted yet"):
        held.truncate(40)
    held.reset()
    assert not held.tiers.keys and held.stats.used_bytes == 0


def test_state_is_put_back_to_the_bit(tmp_path: Path) -> None:
    held, feed = cache(tiers({"warm": 2, "cold": 2, "frozen": 40}, tmp_path / "one")), Feed()
    feed.step(held, [[-1, 0, 1, 2], [0, 1, 2, 3]])
    feed.both(held, 30)
    kept = {name: tensor.clone() for name, tensor in held.state().items()}
    held.close()
    held = cache(tiers({"cold": 40}))
    held.restore(kept)
    other = cache(tiers({"warm": 2, "cold": 2, "frozen": 40}, tmp_path / "two"))
    other.restore(kept)
    assert other.length == held.length and other.tiers.keys == held.tiers.keys
    feed.check(other)
    again = Feed()
    feed.rng = torch.Generator().manual_seed(7)
    again.rng = torch.Generator().manual_seed(7)
    for position in range(3):
        at = [[33 + position], [34 + position]]
        ours, theirs = feed.step(held, at), again.step(other, at)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(OutOfPages):
        small = cache(tiers({"cold": 2}))
        small.restore(kept)
    assert small.length == 0 and not small.tiers.keys and small.stats.used_bytes == 0


def test_a_fork_goes_its_own_way() -> None:
    held, feed = cache(tiers({"warm": 2, "cold": 2, "frozen": 80}), hot_pages=24), Feed()
    feed.both(held, 24)
    other, theirs = held.fork(), Feed()
    theirs.keys, theirs.values, theirs.positions = feed.keys, feed.values, feed.positions
    before = sum(where(held))
    theirs.rng.manual_seed(5)
    theirs.both(other, 9)
    assert before < sum(where(held)) < 2 * before
    feed.both(held, 5)
    feed.check(held)
    theirs.check(other)
    held.reset()
    theirs.check(other)
    other.reset()
    assert where(held) == [0, 0, 0]


def test_full_tiers_leave_pages_hot_until_these_are_full_and_say_why() -> None:
    held, feed = cache(tiers({"cold": 2, "frozen": 2}), num_hot=0, hot_pages=8), Feed()
    feed.both(held, 17)  # 8 full pages, 3 of them retired; 2 pages begun
    feed.both(held, 3)
    with pytest.raises(OutOfPages, match=r"wanted, 0 of 8 .*; older ones stay: the frozen tier h"):
        held.append(0, torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 6))
    feed.check(held)
    held.truncate(10)
    feed.keys, feed.values = feed.keys[..., :10, :], feed.values[..., :10, :]
    feed.positions = feed.positions[:, :10]
    feed.both(held, 3)
    feed.check(held)


def test_a_lost_page_is_reported_by_attention(tmp_path: Path) -> None:
    path = tmp_path / "frozen"
    held, feed = cache(tiers({"frozen": 40}, path), num_hot=0), Feed()
    feed.both(held, 9)
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(LoadError, match=rf"{path}: is cut short"):
        feed.both(held, 1)
    with pytest.raises(LoadError, match=rf"{path}: is cut short"):
        held.state()


def test_misuse_is_refused() -> None:
    with pytest.raises(ArgumentError, match="num_hot: got -1; accepted: an integer of at least 0"):
        cache(tiers({"cold": 4}), num_hot=-1)
    with pytest.raises(ArgumentError, match="tiers: got tiers that forget; accepted: tiers that k"):
        cache(tiers({"cold": 4}, forget=True))
    with pytest.raises(ArgumentError, match="store: got pages of 8; accepted: pages of 4 tokens"):
        TieredCache(PagedCache(PageStore(SHAPE, 4, 8)), tiers({"cold": 4}), num_hot=0)
    held, feed = cache(tiers({"cold": 40}), num_hot=0), Feed()
    feed.both(held, 9)
    with pytest.raises(ArgumentError, match=r"tiers: got 4 pages; accepted: empty tiers \(reset"):
        cache(held.tiers)
    with pytest.raises(ArgumentError, match="cache: got length 9; accepted: an empty cache"):
        TieredCache(held._hot, tiers({"cold": 4}), num_hot=0)
