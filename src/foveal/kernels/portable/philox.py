"""Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): dropout that
is a function of where an attention weight stands, not of who computes it when.

Layout, the same in every kernel of the house (PyTorch, C++, Triton):

    key      (seed mod 2^32, seed div 2^32), the seed taken modulo 2^64
    counter  (key index div 4, query index, head, batch)
    word     key index mod 4 of the four 32-bit words that one counter gives

A weight is dropped if its word is below floor(dropout * 2^32). Indices count from the start of the
sequence's own query and key tensors, so that any tiling drops the same elements.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10

Counter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Tile = tuple[range, range, range, range]
"""Batch, query heads, queries and keys of a tile, as contiguous ranges."""


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Ten rounds on int64 tensors that hold unsigned 32-bit words and broadcast together.

    The 64-bit products wrap around int64; masking after the shift restores their upper words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (
            (product1 >> 32 & _LOW) ^ c1 ^ k0,
            (product0 >> 32 & _LOW) ^ c3 ^ k1,
        )
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def random_words(seed: int, tile: Tile, device: torch.device | str = "cpu") -> torch.Tensor:
    """The word of every weight of a tile: int64 [B, H, Lq, Lk], each in [0, 2^32)."""
    batch, heads, queries, keys = tile
    first = keys.start // 4
    indices = (
        _along(range(first, max(first, (keys.stop + 3) // 4)), 3, device),
        _along(queries, 2, device),
        _along(heads, 1, device),
        _along(batch, 0, device),
    )
    words = torch.stack(philox(indices, (seed & _LOW, seed >> 32 & _LOW)), dim=-1).flatten(3)
    return words[..., keys.start - 4 * first :][..., : len(keys)]


def keep_mask(
    seed: int, dropout: float, tile: Tile, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which weights of a tile dropout keeps: bool [B, H, Lq, Lk]. `dropout` is in [0, 1)."""
    return random_words(seed, tile, device) >= int(dropout * 2**32)


def _along(indices: range, axis: int, device: torch.device | str) -> torch.Tensor:
    """The indices as int64, laid along one of four axes."""
    shape = [1, 1, 1, 1]
    shape[axis] = len(indices)
    return torch.arange(indices.start, indices.stop, device=device).view(shape)
