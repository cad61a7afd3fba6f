"""`PageLayout`: one layer of one page as bytes, the same in every tier, in memory and on disk.

The keys of the page, then its values, each as codes and scales, every part at a multiple of 64
bytes. A page is encoded once, when it leaves the store it was computed into; afterwards it moves
between tiers as bytes and is decoded when it is read.
"""

from dataclasses import dataclass

import torch

from foveal.core.errors import ArgumentError
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape
from foveal.kv.formats import Stored, parse_format
from foveal.kv.store import KeyValue, PageStore

Key = tuple[int, int]
"""Of a page: row of the batch, and part of the sequence (position // S)."""

_ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of every element's size."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one tensor of a page lies."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size
    """[Hkv, S, ...]"""


class PageLayout:
    """Where keys and values lie in a record of bytes."""

    def __init__(
        self, shape: CacheShape, page_size: int, *, key_format: str, value_format: str
    ) -> None:
        self.num_layers = shape.num_layers
        self.page_size = page_size
        self.formats = (parse_format(key_format), parse_format(value_format))
        self.layer_bytes = 0
        """R: bytes of one layer of a page; a multiple of 64."""
        self._parts = [
            [self._part(tensor) for tensor in format.empty(one_page, "meta").tensors]
            for format, one_page in zip(
                self.formats,
                (
                    (shape.num_kv_heads, page_size, shape.head_dim),
                    (shape.num_kv_heads, page_size, shape.value_dim),
                ),
                strict=True,
            )
        ]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def words(self) -> str:
        """All of it in words: bytes mean the same where these are the same."""
        names = " ".join(format.name for format in self.formats)
        parts = [tuple(part.shape) for stored in self._parts for part in stored]
        return f"{self.num_layers} layers, pages of {self.page_size}, {names}, {parts}"

    def check(self, store: PageStore) -> None:
        """Refuse a store whose pages cannot be kept so. Raises `ArgumentError`."""
        if store.page_size != self.page_size:
            accepted = f"pages of {self.page_size} tokens, as in the tiers"
            raise ArgumentError("store", f"pages of {store.page_size}", accepted)
        for theirs, ours in zip(store.formats, self.formats, strict=True):
            if theirs.quantised and theirs != ours:
                accepted = f"{ours.name}, or full precision: a page is quantised once"
                raise ArgumentError("store", theirs.name, accepted)

    def encode(self, store: PageStore, pages: torch.Tensor, out: torch.Tensor) -> None:
        """Write n pages of a store to records, uint8 [L, n, R]; all layers at once, because a page
        is small and few come together."""
        with store.arena.frame():
            layers = [store.select(layer, pages) for layer in range(self.num_layers)]
            for given, theirs, ours, mine in zip(
                zip(*layers, strict=True),
                store.formats,
                self.formats,
                self._tensors(out),
                strict=True,
            ):
                parts = zip(*(stored.tensors for stored in given), strict=True)
                stored = Stored(*(torch.stack(part) for part in parts))
                coded = stored if theirs == ours else ours.encode(stored.codes)
                for target, source in zip(mine.tensors, coded.tensors, strict=True):
                    target.copy_(source)

    def decode(self, records: torch.Tensor, dtype: torch.dtype, arena: Arena) -> KeyValue:
        """Keys [Hkv, n, S, D] and values [Hkv, n, S, Dv] of records, uint8 [n, R]; in the arena,
        of which the caller has opened a frame."""
        decoded = []
        for format, stored in zip(self.formats, self._tensors(records), strict=True):
            x = format.decode(stored, dtype, arena)
            decoded.append(x if x.is_contiguous() else arena.take(x.shape, dtype).copy_(x))
        keys, values = decoded
        return keys, values

    def _tensors(self, records: torch.Tensor) -> tuple[Stored, Stored]:
        """Keys and values [..., Hkv, n, S, ...] as they lie in records [..., n, R]."""
        lead = records.shape[:-1]
        keys, values = (
            Stored(
                *(
                    records[..., part.start : part.stop]
                    .view(part.dtype)
                    .view(*lead, *part.shape)
                    .transpose(-4, -3)
                    for part in stored
                )
            )
            for stored in self._parts
        )
        return keys, values

    def _part(self, tensor: torch.Tensor) -> _Part:
        start = self.layer_bytes
        stop = start + tensor.nbytes
        self.layer_bytes = -(-stop // _ALIGNMENT) * _ALIGNMENT
        return _Part(start, stop, tensor.dtype, tensor.shape)
