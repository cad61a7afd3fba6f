"""`Summaries`: what is remembered of retired pages' keys, to guess which are worth fetching back.

Of every page, layer and KV head the smallest and the largest value of each channel are kept (Quest,
Tang et al. 2024), as their middle m and half of their difference h. What any key of the page can
score with a query q is guessed in two ways:

    bound     q . m + sum_d |q_d| h_d           no key scores more (Quest)
    spread    q . m + 3 sqrt(sum_d q_d^2 h_d^2)

The bound is met only by a key with every channel at its worst. Where channels vary independently
the score spreads as a sum of squares does, and the second ranks much better (see `docs/log.md`).

Summaries take 2 D elements where the page's keys and values take S (D + Dv): 1 / S of it where
Dv = D and the dtype is the same. Memory is allocated once: the rows of a sequence are a ring over
its pages, which retire, and are forgotten, in order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch

from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape

RANKINGS = ("spread", "bound")
_DEVIATIONS = 3.0
"""Of the spread. For 16 normal numbers h is about 1.8 standard deviations, so this is 5 of the
score: a key that stands out. Between 2 and 4 it makes little difference (measured)."""
BLOCK_PAGES = 512
"""Pages that are looked at at a time: scores take 4 bytes for each, per head and query."""


class Summaries:
    """Of the pages of a batch of sequences."""

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `capacity` pages of each sequence, in the `dtype` of their keys."""
        if capacity < 1:
            raise ArgumentError("capacity", capacity, "an integer of at least 1")
        self.capacity = capacity
        rows = (shape.batch, shape.num_kv_heads, capacity, 2 * shape.head_dim)
        self._rows = [
            torch.zeros(rows, dtype=dtype, device=device) for _ in range(shape.num_layers)
        ]
        self.parts = torch.full((shape.batch, capacity), -1, device=device)
        """int64 [B, capacity]: which part of the sequence (position // S) each row is of, -1 if
        none; part p has row p modulo the capacity."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for rows."""
        return sum(rows.nbytes for rows in self._rows)

    def hold(self, sequence: int, parts: Sequence[int]) -> None:
        """Count these parts of a sequence as there; each takes the row of the part `capacity`
        before it."""
        index = torch.tensor(parts, dtype=torch.int64, device=self.parts.device)
        self.parts[sequence, index % self.capacity] = index

    def write(self, layer: int, sequence: int, parts: Sequence[int], keys: torch.Tensor) -> None:
        """Summarise pages of one layer: keys [Hkv, n, S, D] of n parts."""
        index = torch.tensor(parts, dtype=torch.int64, device=self.parts.device)
        low, high = keys.aminmax(dim=2)
        row = torch.cat([(high + low) / 2, (high - low) / 2], dim=-1)
        self._rows[layer][sequence, :, index % self.capacity] = row

    def forget(self, sequence: int, parts: Sequence[int]) -> None:
        """Forget parts of a sequence."""
        index = torch.tensor(parts, dtype=torch.int64, device=self.parts.device)
        self.parts[sequence, index % self.capacity] = -1

    def scores(
        self, layer: int, q: torch.Tensor, rows: torch.Tensor, ranking: str
    ) -> Iterator[torch.Tensor]:
        """What the best key of each page may score with q [B, H, T, D]: [B, H, T, n] for n pages at
        a time, in the dtype of sums; anything for pages that are not there.

        `rows` int64 [B] are the sequences that q is of; `ranking` is one of `RANKINGS`.
        """
        batch, heads, num, dim = q.shape
        every = self._rows[layer]
        grouped = q.to(accumulate_dtype(q.dtype)).reshape(batch, every.shape[1], -1, dim)
        for start in range(0, self.num_used, BLOCK_PAGES):
            block = every[:, :, start : min(start + BLOCK_PAGES, self.num_used)]
            block = block if len(rows) == len(block) == 1 else block[rows]
            middle, half = block.to(grouped.dtype).transpose(-1, -2).chunk(2, dim=-2)
            found = grouped @ middle
            if ranking == "bound":
                found += grouped.abs() @ half
            else:
                found += _DEVIATIONS * (grouped.square() @ half.square()).sqrt()
            yield found.view(batch, heads, num, -1)

    @property
    def num_used(self) -> int:
        """Rows, counted from the first, of which any sequence may hold something."""
        return min(self.capacity, int(self.parts.max()) + 1)

    def copy(self) -> Self:
        """An independent copy."""
        other = type(self).__new__(type(self))
        other.capacity, other.parts = self.capacity, self.parts.clone()
        other._rows = [rows.clone() for rows in self._rows]
        return other

    def clear(self) -> None:
        """Forget everything; memory stays allocated."""
        self.parts.fill_(-1)

    def state(self) -> dict[str, torch.Tensor]:
        """All of it as tensors by name, for `restore`."""
        rows = {f"summary.{layer}": rows for layer, rows in enumerate(self._rows)}
        return {**rows, "summary.parts": self.parts}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what `state` was taken of. Raises `ArgumentError` if that was another size."""
        for name, tensor in self.state().items():
            if name not in state or state[name].shape != tensor.shape:
                got = "nothing" if name not in state else f"shape {list(state[name].shape)}"
                raise ArgumentError(f"state {name}", got, f"{list(tensor.shape)}")
            tensor.copy_(state[name])
