"""`Chain`: which retired page is in which tier, and the thread that moves them.

A page enters at the top. What a tier cannot hold goes down, least recently used first; a page is
copied, then the map is changed, and only then is its old slot freed, so that at every moment it is
in one place and readable there. One thread moves and reads ahead, in the order it was told. A page
that is dropped while it is copied is not counted where the copy went.

Pages are known by serial numbers that are never used again. The chain knows no sequences; tiers
and their forks share it.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import perf_counter

import torch

from foveal.core.errors import LoadError, OutOfPages
from foveal.kv.arena import Arena
from foveal.kv.frozen import FrozenFile, Record
from foveal.kv.layout import Key
from foveal.kv.shelf import Page, Shelf

_AHEAD = 2
"""Tiles that may have been read ahead and not yet be out of use."""
_SPARE = 8
"""One slot in so many is freed ahead of time, while the tiers below have room."""


class _Tile:
    """Pages of one layer, read ahead."""

    def __init__(self, layer: int, pages: Sequence[Page], done: "Future[torch.Tensor]") -> None:
        self.layer = layer
        self.serials = [page.record.serial for page in pages]
        self.done = done
        """uint8 [n, R]"""


class Chain:
    """Shelves from the fastest to the slowest. Its methods are for one thread."""

    def __init__(self, shelves: Sequence[Shelf], layer_bytes: int, device: torch.device) -> None:
        self.shelves = tuple(shelves)
        self._layer_bytes = layer_bytes
        self._device = device
        self._lock = threading.Lock()
        self._mover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foveal-tiers")
        self._ahead: deque[_Tile] = deque(maxlen=_AHEAD)
        self._serial = 0
        self.num_users = 1
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            """Recorded after what the device was last told to do with pages."""

    def take_up(self, level: int, slot: int, record: Record) -> Page:
        """Count a page that a tier has had before."""
        shelf, page = self.shelves[level], Page(record, level, slot)
        shelf.held[record.serial] = page
        shelf.freed += range(shelf.num_touched, slot)
        shelf.num_touched = max(shelf.num_touched, slot + 1)
        if slot in shelf.freed:
            shelf.freed.remove(slot)
        self._serial = max(self._serial, record.serial + 1)
        return page

    def insert(self, key: Key, page: torch.Tensor) -> Page:
        """Take in a page, uint8 [L, R], at the top; waits for room. Raises `OutOfPages`."""
        top, slot = self.shelves[0], self._slot_at_top()
        new = Page(Record(key, self._serial, ()), 0, slot)
        self._serial += 1
        try:
            top.place.put(slot, page, new.record)
        except OutOfPages:
            with self._lock:
                top.freed.append(slot)
            raise
        with self._lock:
            top.accept(new)
            self._mark()
        spare = top.capacity // _SPARE
        if top.room < spare and sum(shelf.room for shelf in self.shelves[1:]) > spare:
            self._mover.submit(self._make_room, 0, spare)
        return new

    def share(self, pages: Sequence[Page]) -> None:
        """Hold these pages once more."""
        with self._lock:
            for page in pages:
                page.references += 1

    def release(self, pages: Sequence[Page]) -> None:
        """Hold these pages once less; what nobody holds is gone."""
        with self._lock:
            for page in pages:
                page.references -= 1
                if not page.references:
                    self.shelves[page.level].release(page, page.slot)

    def read(self, layer: int, pages: Sequence[Page], arena: Arena) -> torch.Tensor:
        """One layer of pages, uint8 [n, R] on the device; in the arena unless it was read ahead.
        Raises `LoadError`."""
        start, out = perf_counter(), self._from_ahead(layer, pages)
        ahead = out is not None
        out = arena.take((len(pages), self._layer_bytes), torch.uint8) if out is None else out
        with self._lock:
            if not ahead:
                self._gather(layer, pages, out)
                self._mark()
            self._count(pages, perf_counter() - start)
        return out

    def prefetch(self, layer: int, pages: Sequence[Page]) -> None:
        """Begin to read pages of one layer if they are slow, for a `read` of just these."""
        levels = {page.level for page in pages}
        if any(self.shelves[level].is_slow(self._device) for level in levels):
            done = self._mover.submit(self._load_ahead, layer, pages)
            self._ahead.append(_Tile(layer, pages, done))

    def promote(self, pages: Sequence[Page]) -> None:
        """Begin to move pages to the top, in exchange for what was not used for longest."""
        for page in pages:
            if page.level:
                self._mover.submit(self._raise, page)

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        self._mover.submit(lambda: None).result()

    def whole(self, page: Page) -> torch.Tensor:
        """All of a page, uint8 [L, R], where it lies; while nothing moves. Raises `LoadError`."""
        place = self.shelves[page.level].place
        return place.shown(page.slot) if isinstance(place, FrozenFile) else place.page(page.slot)

    def close(self) -> None:
        """One user less. The last one ends the thread, once it has done what it was told, and
        closes what is open."""
        self.num_users -= 1
        if self.num_users:
            return
        self._mover.shutdown()
        for shelf in self.shelves:
            shelf.place.close()

    def _slot_at_top(self) -> int:
        top = self.shelves[0]
        while True:
            with self._lock:
                if top.room > 0 and top.num_free:
                    return top.take()
            start = perf_counter()
            self._mover.submit(self._make_room, 0, 1).result()
            top.waited_s += perf_counter() - start

    def _make_room(self, level: int, count: int) -> None:
        """Move pages down until a tier can take `count` more; the mover's."""
        shelf = self.shelves[level]
        while shelf.room < count:
            if level + 1 == len(self.shelves):
                raise OutOfPages(f"the {shelf.name} tier holds all of its {shelf.capacity} pages")
            self._make_room(level + 1, 1)
            with self._lock:
                oldest = next(iter(shelf.held.values()), None)
            if oldest is not None:
                self._move(oldest, level + 1)

    def _raise(self, page: Page) -> None:
        """Move a page to the top; the mover's."""
        with suppress(LoadError):  # whoever reads it is told
            if page.level:
                self._move(page, 0)
        if self.shelves[0].room < 0:
            self._make_room(0, 0)

    def _move(self, page: Page, level: int) -> None:
        """Copy a page to another tier, then count it there; the mover's. Does nothing to a page
        that is gone, or for want of a slot."""
        target = self.shelves[level]
        with self._lock:
            if not page.references or not target.num_free:
                return
            source, old, new = self.shelves[page.level], page.slot, target.take()
        try:
            with self._aside():
                target.place.put(new, source.place.page(old), page.record)
        except (OutOfPages, LoadError):
            with self._lock:
                target.freed.append(new)
            raise
        with self._lock:
            if not page.references:
                target.place.erase(new)
                target.freed.append(new)
                return
            source.release(page, old)
            page.level, page.slot = level, new
            target.accept(page)

    def _load_ahead(self, layer: int, pages: Sequence[Page]) -> torch.Tensor:
        """One layer of pages; the mover's, so that it moves none of them meanwhile."""
        with self._aside():
            shape = (len(pages), self._layer_bytes)
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
            self._gather(layer, pages, out)
        return out

    def _from_ahead(self, layer: int, pages: Sequence[Page]) -> torch.Tensor | None:
        """These pages as they were read ahead; None if they were not, or not well."""
        serials = [page.record.serial for page in pages]
        for tile in self._ahead:
            if tile.layer == layer and tile.serials == serials:
                with suppress(LoadError):  # told when it is read again
                    out = tile.done.result()
                    if self._on_cuda:
                        out.record_stream(torch.cuda.current_stream(self._device))
                    return out
        return None

    def _gather(self, layer: int, pages: Sequence[Page], out: torch.Tensor) -> None:
        """Copy one layer of pages from wherever they are to `out`, uint8 [n, R]."""
        for level, shelf in enumerate(self.shelves):
            here = [i for i, page in enumerate(pages) if page.level == level]
            if not here:
                continue
            slots = [pages[i].slot for i in here]
            if len(here) == len(pages) and shelf.place.device == self._device:
                shelf.place.load(layer, slots, out)
            else:
                shape = (len(here), self._layer_bytes)
                pin = self._on_cuda and shelf.place.device.type == "cpu"
                device = shelf.place.device
                part = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pin)
                shelf.place.load(layer, slots, part)
                index = torch.tensor(here, device=self._device)
                out[index] = part.to(self._device, non_blocking=True)

    def _count(self, pages: Sequence[Page], waited_s: float) -> None:
        """Count a read; its time goes to the slowest tier in it."""
        for page in pages:
            for shelf in self.shelves[: page.level]:
                shelf.misses += 1
            self.shelves[page.level].use(page)
        self.shelves[max((page.level for page in pages), default=0)].waited_s += waited_s

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The mover's copies: on CUDA, on a stream of their own, and done at the end."""
        if not self._on_cuda:
            yield
            return
        with self._lock:
            self._stream.wait_event(self._used)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _mark(self) -> None:
        """Note, under the lock, that the device was told to read or write pages."""
        if self._on_cuda:
            self._used.record(torch.cuda.current_stream(self._device))
