"""`Tiers`: where full pages go when they leave the pages that a cache computes on.

    warm      memory of the device, in a format of few bits
    cold      memory of the host
    frozen    a file on disk

A page is taken out of the hot store, encoded once, enters the first tier there is, and sinks from
tier to tier, least recently used first, moved by a thread of its own. It is known by its key
(row, part): the row of the batch and which part of the sequence (position // S) it is. Pages are
never rewritten, so a fork shares them.

    forgotten = tiers.retire(keys, store, pages)  # from a PageStore; give them back there then
    tiers.prefetch(layer, next_keys)              # a scan: read one tile ahead
    tiers.promote(keys)                           # wanted again and again: move them to the top
    with arena.frame():
        k, v = tiers.read(layer, keys, dtype, arena)  # [Hkv, n, S, D], [Hkv, n, S, Dv]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from foveal.core.errors import ArgumentError, OutOfPages
from foveal.kv.arena import Arena
from foveal.kv.cache import CacheShape
from foveal.kv.chain import Chain
from foveal.kv.frozen import FrozenFile, record_bytes
from foveal.kv.layout import Key, PageLayout
from foveal.kv.shelf import Memory, Page, Shelf, TierStats
from foveal.kv.store import KeyValue, PageStore

_ORDER = ("warm", "cold", "frozen")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """One tier: its kind and its size, either in bytes or in tokens."""

    name: str
    """warm, cold or frozen."""
    nbytes: int | None = None
    """Bytes that it may take, at most."""
    tokens: int | None = None
    """Tokens, of all sequences together, that it holds; rounded up to whole pages."""
    path: Path | None = None
    """Of a frozen tier: its file; None for one in the folder for temporary files (which may be
    memory), gone with the process."""

    def __post_init__(self) -> None:
        if self.name not in _ORDER:
            raise ArgumentError("tier", repr(self.name), ", ".join(_ORDER))
        if (self.nbytes is None) == (self.tokens is None):
            got = f"nbytes {self.nbytes}, tokens {self.tokens}"
            raise ArgumentError(f"{self.name} size", got, "one of the two")
        if self.path is not None and self.name != "frozen":
            raise ArgumentError("path", f"{self.path} of a {self.name} tier", "None")

    def num_pages(self, page_bytes: int, page_size: int) -> int:
        """Pages of such a size that it has memory for. Raises `ArgumentError` if none."""
        if self.nbytes is not None and self.nbytes >= page_bytes:
            return self.nbytes // page_bytes
        if self.tokens is not None and self.tokens >= 1:
            return -(-self.tokens // page_size)
        got = f"{self.nbytes} bytes" if self.tokens is None else f"{self.tokens} tokens"
        accepted = f"at least a page: {page_bytes:,} bytes, or {page_size} tokens"
        raise ArgumentError(f"{self.name} size", got, accepted)


class Tiers:
    """Retired pages of a batch of sequences. Not for use by several threads at once."""

    def __init__(
        self,
        shape: CacheShape,
        page_size: int,
        configs: Sequence[TierConfig],
        *,
        key_format: str = "float32",
        value_format: str = "float32",
        device: torch.device | str = "cpu",
        salt: bytes = b"",
        forget: bool = False,
    ) -> None:
        """Tiers in the order warm, cold, frozen; any of them may be missing, not all.

        Every tier holds the same codes. `salt` says what pages depend on beside these settings
        (the model's fingerprint); a frozen file of another is refused. A file that has pages of
        these settings is taken up: `keys` has them then. `forget` drops the oldest pages when the
        last tier is full; else `retire` raises. On the "meta" device no memory and no file is
        touched: for counting bytes.

        Raises `ArgumentError`, and what `FrozenFile` raises.
        """
        names = [config.name for config in configs]
        if not names or names != sorted(set(names), key=_ORDER.index):
            raise ArgumentError("tiers", names, f"some of {', '.join(_ORDER)}, in this order")
        self.layout = PageLayout(shape, page_size, key_format=key_format, value_format=value_format)
        self.device = torch.empty(0, device=device).device  # with its number, where it has one
        self.forgets = forget
        self.arena = Arena(self.device)
        """For what `retire` encodes, and `read` where the caller has none."""
        self._pages: dict[Key, Page] = {}
        """In the order in which they were retired."""
        shelves = [self._shelf(config, salt, last=config is configs[-1]) for config in configs]
        self._chain = Chain(shelves, self.layout.layer_bytes, self.device)
        self._take_up()

    @property
    def keys(self) -> list[Key]:
        """Of all pages, in the order in which they were retired."""
        return list(self._pages)

    @property
    def page_size(self) -> int:
        """S: tokens of a page."""
        return self.layout.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.layout.page_bytes

    @property
    def capacity(self) -> int:
        """Pages that fit into all tiers together."""
        return sum(shelf.capacity for shelf in self._chain.shelves)

    @property
    def nbytes(self) -> int:
        """Bytes of memory allocated for pages, on device and host; not what is being read ahead:
        at most two tiles of one layer."""
        places = [shelf.place for shelf in self._chain.shelves]
        return sum(place.pages.nbytes for place in places if isinstance(place, Memory))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the frozen file as it is."""
        places = [shelf.place for shelf in self._chain.shelves]
        return sum(place.disk_bytes for place in places if isinstance(place, FrozenFile))

    @property
    def used_bytes(self) -> int:
        """Bytes of memory that these pages take."""
        shelves = self._chain.shelves
        in_memory = [p for p in self._pages.values() if isinstance(shelves[p.level].place, Memory)]
        return len(in_memory) * self.page_bytes

    @property
    def stats(self) -> tuple[TierStats, ...]:
        """Counts of each tier, for all that share it."""
        return tuple(shelf.stats(self.page_bytes) for shelf in self._chain.shelves)

    def retire(self, keys: Sequence[Key], store: PageStore, pages: Sequence[int]) -> list[Key]:
        """Take in full pages of a store under these keys; the caller gives them back there.

        Returns what was forgotten for them: the oldest pages, if need be some of these. Raises
        `OutOfPages` where the tiers are full, or the disk is, and holds none of these pages then;
        `ArgumentError` for a key that is there.
        """
        self.layout.check(store)
        for key in keys:
            if key in self._pages:
                raise ArgumentError("key", key, "one that is not there yet")
        index = torch.tensor(pages, dtype=torch.int64, device=store.device)
        with self.arena.frame():
            shape = (self.layout.num_layers, len(keys), self.layout.layer_bytes)
            records = self.arena.take(shape, torch.uint8)
            self.layout.encode(store, index, records)
            forgotten: list[Key] = []
            try:
                for i, key in enumerate(keys):
                    forgotten += self._insert(key, records[:, i])
            except OutOfPages:
                self.drop([key for key in keys if key in self._pages])
                raise
        return forgotten

    def read(self, layer: int, keys: Sequence[Key], dtype: torch.dtype, arena: Arena) -> KeyValue:
        """Keys [Hkv, n, S, D] and values [Hkv, n, S, Dv] of one layer of these pages, in their
        order, from wherever they are.

        They lie in the arena, of which the caller has opened a frame. Raises `LoadError` where a
        page is lost or damaged, `KeyError` for one that was never there.
        """
        records = self._chain.read(layer, [self._pages[key] for key in keys], arena)
        return self.layout.decode(records, dtype, arena)

    def prefetch(self, layer: int, keys: Sequence[Key]) -> None:
        """Begin to read what is slow among these pages: for the next `read`, of just these, or
        for the one after it. For scans of everything, which leave the tiers as they are."""
        self._chain.prefetch(layer, [self._pages[key] for key in keys])

    def promote(self, keys: Sequence[Key]) -> None:
        """Begin to move these pages to the first tier, whose least recently used ones go down for
        them. For pages that are wanted again and again."""
        self._chain.promote([self._pages[key] for key in keys])

    def drop(self, keys: Sequence[Key]) -> None:
        """Forget these pages."""
        self._chain.release([self._pages.pop(key) for key in keys])

    def reset(self) -> None:
        """Forget every page; memory stays allocated."""
        self.drop(self.keys)

    def fork(self) -> Self:
        """Tiers that share these pages, and the room there is for others."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._pages = dict(self._pages)
        self._chain.share(list(self._pages.values()))
        self._chain.num_users += 1
        return other

    def settle(self) -> None:
        """Wait until nothing is on its way between tiers."""
        self._chain.settle()

    def state(self) -> dict[str, torch.Tensor]:
        """Every page as it is stored, and its key; they share memory with the tiers, and are valid
        until the next call of anything here. Raises `LoadError` for what is lost."""
        self.settle()
        order = {page.record.serial: i for i, page in enumerate(self._pages.values())}
        listed = [
            page
            for shelf in reversed(self._chain.shelves)
            for page in shelf.held.values()
            if page.record.serial in order
        ]
        keys = [[*page.record.key, order[page.record.serial]] for page in listed]
        pages = {f"tiers.{i}": self._chain.whole(page) for i, page in enumerate(listed)}
        return {"tiers.keys": torch.tensor(keys, dtype=torch.int64).reshape(-1, 3), **pages}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what `state` was taken of, in place of what there is; other names in it are left
        alone. Raises `ArgumentError` for other pages than these, `OutOfPages`."""
        self.reset()
        order: dict[Key, int] = {}
        shape = (self.layout.num_layers, self.layout.layer_bytes)
        for i, (row, part, place) in enumerate(state["tiers.keys"].tolist()):
            page = state[f"tiers.{i}"]
            if page.shape != shape or page.dtype != torch.uint8:
                got = f"{page.dtype} of shape {list(page.shape)}"
                raise ArgumentError(f"state tiers.{i}", got, f"uint8 of shape {list(shape)}")
            try:
                self._pages[row, part] = self._chain.insert((row, part), page)
            except OutOfPages:
                self.reset()
                raise
            order[row, part] = place
        self._pages = {key: self._pages[key] for key in sorted(order, key=order.__getitem__)}

    def close(self) -> None:
        """Let go of the tiers. The last of the forks that does so ends the thread and closes the
        file; what a file with a name holds stays there, for whoever opens it next."""
        self._chain.close()

    def _insert(self, key: Key, record: torch.Tensor) -> list[Key]:
        """Take in one page; says what was forgotten for it."""
        forgotten: list[Key] = []
        while True:
            try:
                self._pages[key] = self._chain.insert(key, record)
                return forgotten
            except OutOfPages:
                if not self.forgets or not self._pages:
                    raise
            oldest = next(iter(self._pages))
            self.drop([oldest])
            forgotten.append(oldest)

    def _shelf(self, config: TierConfig, salt: bytes, last: bool) -> Shelf:
        frozen, meta = config.name == "frozen", self.device.type == "meta"
        size = record_bytes(self.layout) if frozen else self.page_bytes
        num_pages = config.num_pages(size, self.page_size)
        if frozen and not meta:
            place = FrozenFile(config.path, self.layout, salt)
            return Shelf(config.name, place, num_pages, num_pages)
        device = self.device if config.name == "warm" or meta else torch.device("cpu")
        pin = self.device.type == "cuda" and device.type == "cpu"
        memory = Memory(self.layout, 0 if frozen else num_pages, device, pin)
        spare = 0 if frozen or last or num_pages == 1 else 1
        return Shelf(config.name, memory, num_pages - spare, num_pages)

    def _take_up(self) -> None:
        """Know the pages that a frozen file has had before; of one key the newest."""
        for level, shelf in enumerate(self._chain.shelves):
            if isinstance(shelf.place, FrozenFile):
                most = max(shelf.place.records, default=-1) + 1
                if most > shelf.capacity:
                    accepted = f"the {most} pages that {shelf.place.name} already takes"
                    raise ArgumentError("frozen size", f"{shelf.capacity} pages", accepted)
                there = sorted(shelf.place.records.items(), key=lambda item: item[1].serial)
                for slot, record in there:
                    if record.key in self._pages:
                        self.drop([record.key])
                    self._pages[record.key] = self._chain.take_up(level, slot, record)
