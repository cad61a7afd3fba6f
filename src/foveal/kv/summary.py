"""`Summaries`: what is remembered of retired pages' keys, to guess which are worth fetching back.

Of every page, layer and KV head the largest and the smallest value of each channel are kept (Quest,
Tang et al. 2024). No key k of the page can score more with a query q than

    q . k  <=  sum_d max(q_d high_d, q_d low_d)  =  relu(q) . high + relu(-q) . (-low)

so rows [high, -low] are stored, and the bounds of all pages are one matrix product. They take 2 D
elements where the page's keys and values take S (D + Dv): 1 / S of it where Dv = D and the dtype
is the same. Memory is allocated once: the rows of a sequence are a ring over its pages, which are
retired, and forgotten, in order.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from foveal.core.dtypes import accumulate_dtype
from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape

_BLOCK = 512
"""Pages that are looked at at a time: bounds take 4 bytes for each, per head and query."""


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
        """Room for `capacity` pages of each sequence. `dtype` is that of the keys, so that extremes
        are exact."""
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
        self._rows[layer][sequence, :, index % self.capacity] = torch.cat([high, -low], dim=-1)

    def forget(self, sequence: int, parts: Sequence[int]) -> None:
        """Forget parts of a sequence."""
        index = torch.tensor(parts, dtype=torch.int64, device=self.parts.device)
        self.parts[sequence, index % self.capacity] = -1

    def bounds(
        self, layer: int, q: torch.Tensor, rows: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """No key of a page scores more than this with q [B, H, T, D]: [B, H, T, n] for n rows at a
        time, in the dtype of sums; rows that hold nothing have any value.

        `rows` int64 [B] are the sequences that q is of; None for all.
        """
        batch, heads, num, _ = q.shape
        wide = q.to(accumulate_dtype(q.dtype))
        signed = torch.cat([wide.clamp(min=0), -wide.clamp(max=0)], dim=-1)
        every = self._rows[layer]
        signed = signed.view(batch, every.shape[1], -1, signed.shape[-1])
        for start in range(0, self.num_used, _BLOCK):
            block = every[:, :, start : min(start + _BLOCK, self.num_used)]
            block = block if rows is None else block[rows]
            found = signed @ block.to(signed.dtype).transpose(-1, -2)
            yield found.view(batch, heads, num, -1)

    @property
    def num_used(self) -> int:
        """Rows, counted from the first, of which any sequence may hold something."""
        return min(self.capacity, int(self.parts.max()) + 1)

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
