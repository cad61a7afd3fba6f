"""What every key/value cache is: the protocol, and the view that attention computes on.

A step of a model appends the new keys and values layer by layer, in order. The length advances
once, when the last layer has been written, so that a step that fails half-way leaves no trace: the
next step begins again at layer 0 and overwrites it. Slots are counted in tokens and the same for
every sequence of the batch; a slot that holds a pad has position -1.

Attention computes on a view tile by tile and merges the tiles by their log-sum-exp. A contiguous
cache is one tile; a ring, pages and quantised pages are several, of which one at a time is in the
form that attention needs. A view is told who looks (`Sight`), so that it may leave out what they
cannot see, watch what they attend to, or choose by it what to fetch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from foveal.core.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """The sizes of a model's keys and values."""

    num_layers: int
    batch: int
    """Sequences B."""
    num_kv_heads: int
    head_dim: int
    """Size D of a key head."""
    value_dim: int
    """Size Dv of a value head."""

    @property
    def slot_elements(self) -> int:
        """Elements that one slot (one token of every sequence) takes in all layers."""
        return self.num_layers * self.batch * self.num_kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class Window:
    """What a cache keeps of a stream, and all that a query may see: its own position and the
    `size - 1` before it, and the first `sinks` positions of the sequence (Xiao et al. 2024)."""

    size: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError("window size", self.size, "an integer of at least 1")
        if not 0 <= self.sinks <= self.size:
            accepted = f"an integer from 0 to the window of {self.size} tokens"
            raise ArgumentError("sinks", self.sinks, accepted)

    @property
    def span(self) -> int:
        """Tokens that a query sees at most."""
        return self.sinks + self.size

    def from_sinks(self, positions: torch.Tensor) -> torch.Tensor:
        """Where queries at `positions` stand for the sinks: as if those stood right before the
        window, however long ago they were. Differs only where something has been evicted."""
        return positions.clamp(max=self.span - 1)


@dataclass(kw_only=True, slots=True, eq=False)
class Sight:
    """Queries that look at a view, and what has come of it so far.

    `lse` and `tile_lse` are written by attention after each tile, so that they can be read when
    the next tile is asked for.
    """

    q: torch.Tensor
    """[B, H, T, D]"""
    far_q: torch.Tensor
    """[B, H, T, D]: the queries as far keys see them: rotated at `Window.from_sinks`."""
    positions: torch.Tensor
    """int [B, T], -1 for pads."""
    scale: float
    """Factor on q . k."""
    first: int
    """No query sees a key at a position below this one."""
    lse: torch.Tensor
    """[B, H, T]: log-sum-exp of the scores of all tiles so far; -inf before the first."""
    tile_lse: torch.Tensor | None = None
    """[B, H, T]: of the last tile alone; of its heads' queries where it is of some heads only."""


class View(Protocol):
    """The keys and values of one layer."""

    @property
    def window(self) -> Window | None:
        """What queries may see of it at most; None for everything."""

    @property
    def num_rows(self) -> int:
        """Sequences."""

    def tiles(self, sight: Sight) -> "Iterator[KVView]":
        """Disjoint parts, each valid until the next is asked for, that together hold every key
        that these queries are to see."""

    def rows(self, index: torch.Tensor) -> "View":
        """The same of some of the sequences, int64 [n]."""


@dataclass(frozen=True, slots=True, eq=False)
class KVView:
    """Keys and values of one layer, as `attend` takes them. Shares the cache's memory."""

    keys: torch.Tensor
    """[B, Hkv, S, D]"""
    values: torch.Tensor
    """[B, Hkv, S, Dv]"""
    positions: torch.Tensor | None
    """int64 [B, S], -1 where a slot holds nothing; None where slot j holds position j."""
    q_positions: torch.Tensor | None = None
    """int [B, T]: where the queries stand for far keys, which `Sight.far_q` looks at; None for
    keys that are seen from where the queries are."""
    heads: torch.Tensor | None = None
    """int64 [n]: the KV heads that see this part, ascending, of which alone it holds keys
    [B, n, S, D]; None for all."""

    @property
    def valid(self) -> torch.Tensor | None:
        """bool [B, S]: which slots hold a token; None for all."""
        return None if self.positions is None else self.positions >= 0

    @property
    def window(self) -> Window | None:
        """All of it may be seen."""
        return None

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self.keys.shape[0]

    def tiles(self, sight: Sight) -> "Iterator[KVView]":
        """Itself: it is one tile."""
        yield self

    def rows(self, index: torch.Tensor) -> "KVView":
        """The same of some of the sequences; copies them."""
        positions = None if self.positions is None else self.positions[index]
        return replace(self, keys=self.keys[index], values=self.values[index], positions=positions)


@dataclass(frozen=True, slots=True, eq=False)
class JoinedView:
    """Several views of disjoint keys as one."""

    window: Window | None
    parts: tuple[View, ...]

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self.parts[0].num_rows

    def tiles(self, sight: Sight) -> Iterator[KVView]:
        """The tiles of each part in turn."""
        for part in self.parts:
            yield from part.tiles(sight)

    def rows(self, index: torch.Tensor) -> "JoinedView":
        """The same of some of the sequences."""
        return JoinedView(self.window, tuple(part.rows(index) for part in self.parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """What a cache holds and has done."""

    length: int
    """Slots in use, in tokens."""
    capacity: int
    """Slots allocated, in tokens."""
    used_bytes: int
    allocated_bytes: int
    num_growths: int
    """How often what was there had to be copied into a larger allocation."""

    @property
    def forgotten_tokens(self) -> int | None:
        """Tokens of all sequences that are gone for good, from a cache that keeps more than its
        window; None from others."""
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for a reader, of caches with more to tell: their stats are a class of their own."""
        return ()


class KVCache(Protocol):
    """Where the keys and values of the past live."""

    @property
    def length(self) -> int:
        """Slots in use, pads included; the same for each sequence. Kept, never inferred."""

    @property
    def next_positions(self) -> torch.Tensor | None:
        """int64 [B]: where each sequence goes on, one after its last position; None where slot j
        holds position j throughout, in one tile, so that attention needs no positions."""

    @property
    def window(self) -> Window | None:
        """What it keeps of a stream; None for everything."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""

    @property
    def stats(self) -> CacheStats:
        """Counts for reports."""

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> View:
        """Store k [B, Hkv, T, D] and v [B, Hkv, T, Dv]; the view holds all there is, these too.

        `positions` is int [B, T] with -1 for pads; None continues at slot = position. It counts at
        layer 0 and is the same for the other layers of the step. Raises `ArgumentError` for a
        layer out of order, tensors that do not fit, or tensors that require a gradient.
        """

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on. Raises `ArgumentError` beyond what is there, and
        where a query at the new end would need what was evicted."""

    def fork(self) -> Self:
        """An independent cache with the same content."""

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""


class ResumableCache(KVCache, Protocol):
    """A cache whose content can be kept elsewhere and put back, to the bit."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds between two steps, as tensors by name; they may share its memory."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of, by a cache made as this one was. Raises
        `ArgumentError` for the state of another kind of cache."""


def check_append(
    shape: CacheShape,
    like: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    written: int,
    slots: int,
) -> None:
    """Check one `append`: the layer's turn, shapes, and dtype and device against `like`.

    `written` layers of the step under way are there, and each adds `slots`.
    """
    if layer not in (0, written):
        accepted = f"0 to begin a step, or {written} to go on with it"
        raise ArgumentError("layer", layer, accepted)
    slots = k.shape[-2] if layer == 0 else slots
    for name, tensor, size in (("k", k, shape.head_dim), ("v", v, shape.value_dim)):
        expected = (shape.batch, shape.num_kv_heads, slots, size)
        if tensor.shape != expected:
            raise ArgumentError(name, f"shape {list(tensor.shape)}", f"{list(expected)}")
        if tensor.dtype != like.dtype or tensor.device != like.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise ArgumentError(name, got, f"{like.dtype} on {like.device}")
        if tensor.requires_grad:
            accepted = "no gradient: a cache is for inference (use torch.inference_mode())"
            raise ArgumentError(name, "a tensor that requires a gradient", accepted)
