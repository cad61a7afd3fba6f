"""`Reaches`: how far back the heads look, from the attention that was observed at every distance.

Distances are counted in strides of some pages. The share of its attention that a query gives to a
run of keys is exp(lse of the run - lse of all); it is averaged over the query heads of a KV head
and over the queries of a step, and smoothed over steps:

    share <- (w share + sum over the step's queries) / (w + n),    w <- min(w + n, 64)

where n is the number of these queries and w that of the earlier ones, at most 64. The reach of a
head is the fewest strides r for which both what was observed beyond them, and what there would be
if it went on at the rate of the last one for as long again, are at most `1 - mass`:

    share_{r+1} + share_{r+2} + ... <= 1 - mass     and     r share_r <= 1 - mass

The second holds the mass where nothing beyond the reach is there to be observed any more (for
shares that fall exponentially or faster). Until it is met, the reach grows by a stride with every
observation, as tokens arrive: it widens with the first sample and narrows with the smoothed past.
"""

from typing import Self

import torch

from foveal.core.errors import ArgumentError

_MEMORY = 64
"""Queries for which all earlier ones count at most."""


class Reaches:
    """Attention by distance of every layer and KV head."""

    def __init__(self, num_layers: int, num_kv_heads: int, longest: int, mass: float) -> None:
        """`longest` is the longest reach, in strides."""
        if not 0 < mass <= 1:
            raise ArgumentError("mass", mass, "a share of attention above 0, at most 1")
        self.mass = mass
        self.longest = longest
        self.shares = torch.zeros(num_layers, num_kv_heads, longest + 1)
        """float32: the mean share that goes to keys so many strides back."""
        self.weight = 0
        """w: queries that the shares stand for."""
        self._sums = torch.zeros_like(self.shares)
        self._counts = [0] * num_layers

    def note(self, layer: int, distances: torch.Tensor, shares: torch.Tensor) -> None:
        """What n queries gave to R runs of keys: shares [R, Hkv, n]; of each run, the strides to
        its farthest key, int64 [R, n]. It counts once every layer has been noted."""
        places = distances.clamp(0, self.longest).flatten().to(self._sums.device)
        given = shares.transpose(0, 1).flatten(1).to(self._sums)
        self._sums[layer].index_add_(1, places, given)
        self._counts[layer] += distances.shape[1]

    def settle(self) -> None:
        """Smooth into the shares what was noted since the last call; drop it if a layer of the
        step is missing."""
        if not any(self._counts):
            return
        if all(self._counts):
            counts = torch.tensor(self._counts).view(-1, 1, 1)
            self.shares = (self.weight * self.shares + self._sums) / (self.weight + counts)
            self.weight = min(_MEMORY, self.weight + min(self._counts))
        self._sums.zero_()
        self._counts = [0] * len(self._counts)

    def strides(self, least: int, most: int) -> list[list[int]]:
        """The reach of each layer and KV head within two bounds; the upper one for all as long as
        nothing has been observed."""
        if not self.weight:
            return [[most] * self.shares.shape[1] for _ in self.shares]
        beyond = self.shares.sum(-1, keepdim=True) - self.shares.cumsum(-1)
        ahead = self.shares * torch.arange(self.longest + 1)
        rest = torch.maximum(beyond, ahead)
        rest[..., -1] = 0.0
        reach = (rest <= 1 - self.mass).int().argmax(-1)
        bounded: list[list[int]] = reach.clamp(least, most).tolist()
        return bounded

    def forget(self) -> None:
        """Begin anew."""
        self.shares = torch.zeros_like(self.shares)
        self.weight = 0
        self._sums.zero_()
        self._counts = [0] * len(self._counts)

    def copy(self) -> Self:
        """An independent copy of what has settled."""
        num_layers, num_kv_heads, _ = self.shares.shape
        other = type(self)(num_layers, num_kv_heads, self.longest, self.mass)
        other.shares, other.weight = self.shares, self.weight
        return other
