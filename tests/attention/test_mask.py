"""The mask in all its forms against the oracle's key-by-key definition, on random specs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from cases import spec as small_spec
from foveal.attention.mask import Extent, Sight, Visibility, classify, cut, key_ranges, num_visible
from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec
from properties import examples

MANY = settings(max_examples=examples(200), deadline=None, derandomize=True)

lengths = st.integers(0, 14)
sides = st.none() | st.integers(0, 6)
specs = st.builds(
    lambda **fields: small_spec(1, 1, 1, **fields),
    causal=st.booleans(),
    window=st.none() | st.tuples(sides, sides),
    chunk=st.none() | st.integers(1, 6),
    sinks=st.integers(0, 4),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[AttentionSpec, int, int, int, Operands]:
    """A spec, B, Lq, Lk, and perhaps lengths and positions with pads among them."""
    batch, q_len, kv_len = draw(st.integers(1, 3)), draw(lengths), draw(lengths)

    def positions(length: int) -> torch.Tensor | None:
        if draw(st.booleans()):
            return None
        rows = draw(st.sampled_from((0, batch)))
        numbers = st.integers(-2, 12)
        found = draw(
            st.lists(numbers, min_size=length * max(rows, 1), max_size=length * max(rows, 1))
        )
        return torch.tensor(found, dtype=torch.int64).view((rows, length) if rows else (length,))

    kv_lengths = None
    if draw(st.booleans()):
        drawn = st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch)
        kv_lengths = torch.tensor(draw(drawn), dtype=torch.int32)
    operands = Operands(
        kv_lengths=kv_lengths, q_positions=positions(q_len), kv_positions=positions(kv_len)
    )
    return draw(specs), batch, q_len, kv_len, operands


def visibility(
    spec: AttentionSpec, batch: int, q_len: int, kv_len: int, operands: Operands
) -> tuple[Visibility, torch.Tensor]:
    """Ours, and the oracle's [B, 1, Lq, Lk]."""
    q, k = torch.empty(batch, 1, q_len, 1), torch.empty(batch, 1, kv_len, 1)
    return (
        Visibility.of(spec, q, k, operands),
        oracle.visibility(spec, batch, q_len, kv_len, operands),
    )


@MANY
@given(calls())
def test_dense_is_the_definition(call: tuple[AttentionSpec, int, int, int, Operands]) -> None:
    ours, right = visibility(*call)
    assert torch.equal(ours.dense().expand_as(right), right)


@MANY
@given(calls(), st.integers(1, 5), st.integers(1, 5))
def test_tiles_rebuild_the_mask(
    call: tuple[AttentionSpec, int, int, int, Operands], q_tile: int, kv_tile: int
) -> None:
    ours, right = visibility(*call)
    rebuilt = torch.zeros_like(right)
    rows_done = 0
    for rows, tiles in ours.tiles(q_tile, kv_tile):
        assert rows.start == rows_done
        rows_done = rows.stop
        starts = [columns.start for columns, _ in tiles]
        assert starts == sorted(set(starts))
        for columns, sight in tiles:
            assert sight is not Sight.HIDDEN
            full = sight is Sight.FULL
            rebuilt[:, :, rows, columns] = True if full else ours.dense(rows, columns)
    assert rows_done == call[2]
    assert torch.equal(rebuilt, right)


@MANY
@given(calls())
def test_whole_is_never_wrong(call: tuple[AttentionSpec, int, int, int, Operands]) -> None:
    ours, right = visibility(*call)
    sight = ours.whole()
    if sight is Sight.HIDDEN:
        assert not right.any()
    elif sight is Sight.FULL:
        assert right.all()


@MANY
@given(specs, lengths, lengths)
def test_num_visible_counts(spec: AttentionSpec, q_len: int, kv_len: int) -> None:
    _, right = visibility(spec, 1, q_len, kv_len, Operands())
    assert num_visible(spec, q_len, kv_len) == int(right.sum())


@MANY
@given(specs, st.integers(-3, 12), st.integers(0, 4), st.integers(0, 14))
def test_key_ranges_are_tight(spec: AttentionSpec, low: int, more: int, kv_len: int) -> None:
    queries = range(low, low + more + 1)
    seen = {k for k in range(kv_len) for q in queries if oracle.visible(spec, q, k)}
    ranges = key_ranges(spec, Extent(low, low + more), kv_len)
    assert len(ranges) <= 2
    assert {k for start, stop in ranges for k in range(start, stop)} == seen


def test_skipping_is_real() -> None:
    """A window over long sequences visits tiles by the window's size, not the sequence's."""
    spec = small_spec(1, 1, 1, causal=True, window=(63, None), sinks=4)
    q = torch.empty(1, 1, 64 * 64, 1)
    visited = [len(tiles) for _, tiles in Visibility.of(spec, q, q, Operands()).tiles(64, 64)]
    assert visited == [1, 2] + [3] * 62


def test_padding_is_skipped_too() -> None:
    spec = small_spec(1, 1, 1)
    q, k = torch.empty(2, 1, 1, 1), torch.empty(2, 1, 1000, 1)
    ours = Visibility.of(spec, q, k, Operands(kv_lengths=torch.tensor([90, 130])))
    [(_, tiles)] = ours.tiles(1, 64)
    assert [(columns.start, sight) for columns, sight in tiles] == [
        (0, Sight.FULL),
        (64, Sight.PARTIAL),
        (128, Sight.PARTIAL),
    ]


@pytest.mark.parametrize(
    ("q", "k", "sight"),
    [
        (Extent(8, 15), Extent(0, 7), Sight.FULL),
        (Extent(8, 15), Extent(8, 15), Sight.PARTIAL),
        (Extent(8, 15), Extent(16, 23), Sight.HIDDEN),
        (Extent(8, 15, padded=True), Extent(0, 7), Sight.PARTIAL),
        (Extent(8, 15), Extent(0, -1, padded=True), Sight.HIDDEN),
    ],
)
def test_classify_causal(q: Extent, k: Extent, sight: Sight) -> None:
    assert classify(small_spec(causal=True), q, k) is sight


def test_cut_broadcasts() -> None:
    rows, columns = slice(1, 3), slice(2, 5)
    full = torch.arange(30).view(1, 1, 5, 6)
    assert torch.equal(cut(full, rows, columns), full[:, :, 1:3, 2:5])
    assert torch.equal(cut(full[0, 0], rows, columns), full[:, :, 1:3, 2:5])
    assert cut(full[..., :1, :], rows, columns).shape == (1, 1, 1, 3)
    assert cut(full[..., :1], rows, columns).shape == (1, 1, 2, 1)
    assert cut(full[0, 0, 0], rows, columns).shape == (1, 1, 1, 3)
