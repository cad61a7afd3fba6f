"""Philox against the published vectors, and dropout as a function of position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kernels.portable.philox import keep_mask, philox, random_words
from properties import examples

# philox4x32, 10 rounds, from `tests/kat_vectors` of Random123: counter, key, result.
KNOWN = (
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    words = tuple(torch.tensor(int(word, 16)) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert [f"{word.item():08x}" for word in philox(words, (low, high))] == expected.split()


def test_layout_is_the_documented_one() -> None:
    seed = 0x299F31D0_A4093822
    words = random_words(seed, (range(2), range(3), range(5), range(9)))
    b, h, i, j = 1, 2, 4, 6
    counter = tuple(torch.tensor(n) for n in (j // 4, i, h, b))
    assert words[b, h, i, j] == philox(counter, (0xA4093822, 0x299F31D0))[j % 4]


WHOLE = random_words(7, (range(2), range(3), range(20), range(30)))
INSIDE = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)) for n in WHOLE.shape))


@settings(max_examples=examples(50), deadline=None)
@given(INSIDE)
def test_a_tile_is_a_slice_of_the_whole(bounds: tuple[tuple[int, int], ...]) -> None:
    tile = tuple(range(min(pair), max(pair)) for pair in bounds)
    expected = WHOLE[tuple(slice(r.start, r.stop) for r in tile)]
    assert torch.equal(random_words(7, tile), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_kept_share(dropout: float) -> None:
    keep = keep_mask(3, dropout, (range(2), range(4), range(128), range(128)))
    deviation = math.sqrt(dropout * (1 - dropout) / keep.numel())
    assert abs(keep.double().mean().item() - (1 - dropout)) <= 5 * deviation


def test_words_are_uniform() -> None:
    """Chi-squared over 256 bins of the upper and of the lower bits; 5 deviations."""
    words = random_words(11, (range(2), range(4), range(128), range(128))).flatten()
    for shift in (24, 0):
        counts = torch.bincount(words >> shift & 255, minlength=256).double()
        expected = words.numel() / 256
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_neighbours_and_seeds_are_uncorrelated() -> None:
    tile = (range(2), range(4), range(64), range(64))
    words = random_words(5, tile).double() / 2**32 - 0.5
    for axis in range(4):
        low, high = words.narrow(axis, 0, 1), words.narrow(axis, 1, 1)
        limit = 5 / 12 / math.sqrt(low.numel())
        assert abs((low * high).mean().item()) < limit
    for other in (4, 5 + 2**32, -5):
        assert (random_words(other, tile) == random_words(5, tile)).double().mean() < 1e-3


def test_seeds_count_modulo_two_to_the_64() -> None:
    tile = (range(1), range(1), range(4), range(8))
    assert torch.equal(random_words(-1, tile), random_words(2**64 - 1, tile))
