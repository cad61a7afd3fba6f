"""Rings: memory of a fixed size over a stream without end.

`RingBuffer` is the plain circular buffer. `RingCache` keeps, for each sequence, the first `sinks`
tokens and the last `size` ones (Xiao et al. 2024, StreamingLLM): the key of position p lies in

    slot p                                      p < sinks
    slot sinks + (p - sinks) mod size           otherwise

so a new token takes the place of the one that has just left the window, nothing is ever moved, and
pads are not stored at all: sinks are the first real tokens, whatever the padding. Slots are in no
order; attention goes by the positions that the view carries.
"""

from collections.abc import Mapping
from typing import Self

import torch

from foveal.core.errors import ArgumentError
from foveal.kv.cache import CacheShape, CacheStats, JoinedView, KVView, Window, check_append
from foveal.kv.slots import Slots


class RingBuffer:
    """The last `capacity` rows of a stream of rows, each of shape `row`."""

    def __init__(
        self,
        capacity: int,
        row: tuple[int, ...] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1:
            raise ArgumentError("capacity", capacity, "an integer of at least 1")
        self._rows = torch.empty((capacity, *row), dtype=dtype, device=device)
        self._end = 0
        """Rows ever appended; the next one goes to this number modulo the capacity."""

    def __len__(self) -> int:
        return min(self._end, self._rows.shape[0])

    def append(self, rows: torch.Tensor) -> None:
        """Add rows [n, *row], the newest last; what does not fit any more is forgotten.

        Writes the new rows only: its time does not depend on what is there.
        """
        capacity = self._rows.shape[0]
        if rows.shape[1:] != self._rows.shape[1:] or rows.ndim != self._rows.ndim:
            accepted = f"[n, {', '.join(map(str, self._rows.shape[1:]))}]"
            raise ArgumentError("rows", f"shape {list(rows.shape)}", accepted)
        self._end += max(len(rows) - capacity, 0)
        rows = rows[-capacity:]
        start = self._end % capacity
        first = min(len(rows), capacity - start)
        self._rows[start : start + first] = rows[:first]
        self._rows[: len(rows) - first] = rows[first:]
        self._end += len(rows)

    def recent(self, n: int) -> torch.Tensor:
        """The last n rows, oldest first. A view of the buffer unless it wraps within them."""
        if not 0 <= n <= len(self):
            raise ArgumentError("n", n, f"0 to the {len(self)} rows there are")
        capacity = self._rows.shape[0]
        start = (self._end - n) % capacity
        rows = self._rows[start : start + n]
        return rows if len(rows) == n else torch.cat([rows, self._rows[: n - len(rows)]])

    def all(self) -> torch.Tensor:
        """Every row there is, oldest first."""
        return self.recent(len(self))

    def clear(self) -> None:
        """Forget every row; memory stays allocated."""
        self._end = 0


class RingCache:
    """Window and sinks in fixed memory. Implements `KVCache`.

    A step of one token is written in place. A longer one is kept aside until its last layer, so
    that its early queries still see what its late tokens evict.
    """

    def __init__(
        self,
        shape: CacheShape,
        window: Window,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = shape
        self.window = window
        self.capacity = window.sinks + window.size
        layers = range(shape.num_layers)
        self._keys = [self._empty(shape.head_dim, dtype, device) for _ in layers]
        self._values = [self._empty(shape.value_dim, dtype, device) for _ in layers]
        self._held = torch.full((shape.batch, self.capacity + 1), -1, device=device)
        """[B, slots]: the position of the token in each slot, -1 if none."""
        self._slots = Slots(shape.batch, device)
        self._step = self._held[:, :0]
        """[B, T]: positions of the step under way."""
        self._chunk: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of the layers written so far, if the step is not of one token."""
        self._written = 0

    @property
    def length(self) -> int:
        """Slots the stream has taken, evicted ones included."""
        return self._slots.length

    @property
    def next_positions(self) -> torch.Tensor:
        """int64 [B]."""
        return self._slots.next

    @property
    def slots(self) -> Slots:
        """Its counts."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.nbytes for t in (*self._keys, *self._values))

    @property
    def stats(self) -> CacheStats:
        """Counts for reports."""
        used = min(self.length, self.capacity)
        return CacheStats(
            length=self.length,
            capacity=self.capacity,
            used_bytes=used * self.shape.slot_elements * self._keys[0].element_size(),
            allocated_bytes=self.nbytes,
            num_growths=0,
        )

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> JoinedView:
        """Store the keys and values of one layer; see `KVCache.append`.

        Positions, if given, go on from `next_positions` without a gap.
        """
        check_append(
            self.shape,
            self._keys[0],
            layer,
            k,
            v,
            written=self._written,
            slots=self._step.shape[1],
        )
        if layer == 0:
            self._begin(positions, k.shape[2])
        view = self._in_place(layer, k, v) if self._single else self._aside(layer, k, v)
        self._written = layer + 1
        if self._written == self.shape.num_layers:
            self._finish()
        return view

    def view(self, layer: int) -> JoinedView:
        """What one layer holds between two steps."""
        self._forget_beyond()
        return JoinedView(self.window, (self._ring(layer, self.capacity),))

    def leap(self, slots: Slots) -> None:
        """Go on from these counts, as if the tokens in between had come and been forgotten."""
        self._slots = slots.copy()

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, if the window before it is still there."""
        if not 0 <= length <= self.length:
            raise ArgumentError("length", length, f"0 to the cache's length {self.length}")
        tokens = self._slots.tokens_before(length).unsqueeze(1)
        first = (tokens - self.window.size + 1).clamp(min=0)
        needed = (self._held < tokens) & (self._held >= 0)
        needed &= (self._held >= first) | (self._held < self.window.sinks)
        sinks = torch.minimum(first, torch.full_like(first, self.window.sinks))
        if not torch.equal(needed.sum(1, keepdim=True), tokens - first + sinks):
            accepted = f"the length {self.length}, or one whose window is not evicted yet"
            raise ArgumentError("length", length, accepted)
        self._slots.truncate(length)
        self._forget_beyond()
        self._written = 0

    def fork(self) -> Self:
        """An independent copy; costs one copy of the ring."""
        first = self._keys[0]
        other = type(self)(self.shape, self.window, dtype=first.dtype, device=first.device)
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for source, target in zip(mine, theirs, strict=True):
                target.copy_(source)
        other._held.copy_(self._held)
        other._slots = self._slots.copy()
        other._forget_beyond()
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """Keys and values of each layer, positions and counts; see `ResumableCache.state`."""
        self._forget_beyond()
        return {**self._tensors(), **self._slots.state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of; see `ResumableCache.restore`."""
        for name, tensor in self._tensors().items():
            if name not in state or state[name].shape != tensor.shape:
                got = "nothing" if name not in state else f"shape {list(state[name].shape)}"
                raise ArgumentError(f"state {name}", got, f"{list(tensor.shape)}")
            tensor.copy_(state[name])
        self._slots.restore(state)
        self._written = 0

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._slots = Slots(self.shape.batch, self._held.device)
        self._held.fill_(-1)
        self._written = 0

    @property
    def _single(self) -> bool:
        return self._step.shape[1] == 1

    def _tensors(self) -> dict[str, torch.Tensor]:
        keys = {f"keys.{layer}": keys for layer, keys in enumerate(self._keys)}
        values = {f"values.{layer}": values for layer, values in enumerate(self._values)}
        return {**keys, **values, "held": self._held}

    def _begin(self, positions: torch.Tensor | None, num_slots: int) -> None:
        self._chunk, self._written = [], 0
        self._step = self._slots.place(positions, num_slots)
        if self._single:
            self._held.scatter_(1, self._slot_of(self._step), self._step)
            self._held[:, -1] = -1
        else:
            self._forget_beyond()

    def _in_place(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> JoinedView:
        self._write(layer, k, v, self._slot_of(self._step))
        return JoinedView(self.window, (self._ring(layer, self.length + 1),))

    def _aside(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> JoinedView:
        self._chunk.append((k, v))
        chunk = KVView(k, v, self._step)
        if not self.length:
            return JoinedView(self.window, (chunk,))
        ring = self._ring(layer, self.length)
        if layer == self.shape.num_layers - 1:
            # The step ends here and writes to the ring before attention has read this view.
            held = self._held[:, : ring.keys.shape[2]]
            ring = KVView(ring.keys.clone(), ring.values.clone(), held.clone())
        return JoinedView(self.window, (ring, chunk))

    def _finish(self) -> None:
        if not self._single:
            # Of two tokens with the same slot only the later may be written.
            end = self._slots.next + (self._step >= 0).sum(1)
            stays = (self._step >= end.unsqueeze(1) - self.window.size) | (
                self._step < self.window.sinks
            )
            step = torch.where(stays, self._step, -1)
            slots = self._slot_of(step)
            for layer, (k, v) in enumerate(self._chunk):
                self._write(layer, k, v, slots)
            self._held.scatter_(1, slots, step)
            self._held[:, -1] = -1
        self._slots.advance(self._step)
        self._chunk, self._written = [], 0

    def _slot_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Where each position is stored; what is not goes to a slot of its own, never read."""
        sinks, size = self.window.sinks, self.window.size
        slots = torch.where(positions < sinks, positions, sinks + (positions - sinks) % size)
        return torch.where(positions < 0, self.capacity, slots)

    def _write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        rows = torch.arange(self.shape.batch, device=k.device).unsqueeze(1)
        self._keys[layer].transpose(1, 2)[rows, slots] = k.transpose(1, 2)
        self._values[layer].transpose(1, 2)[rows, slots] = v.transpose(1, 2)

    def _ring(self, layer: int, length: int) -> KVView:
        """The slots that the first `length` slots of the stream can have reached."""
        used = slice(min(length, self.capacity))
        keys, values = self._keys[layer], self._values[layer]
        return KVView(keys[:, :, used], values[:, :, used], self._held[:, used])

    def _forget_beyond(self) -> None:
        """Forget tokens that no finished step has stored."""
        self._held[self._held >= self._slots.next.unsqueeze(1)] = -1

    def _empty(self, size: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        shape = (self.shape.batch, self.shape.num_kv_heads, self.capacity + 1, size)
        return torch.zeros(shape, dtype=dtype, device=device)
