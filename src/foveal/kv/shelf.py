"""Shelves: where the pages of one tier lie, in memory or in a file, and what has happened there.

A shelf knows slots, bytes and counts; which page is where, and what moves, is the chain's.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from foveal.kv.frozen import Record
from foveal.kv.layout import PageLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStats:
    """One tier at one moment, counted in pages of one sequence."""

    name: str
    capacity: int
    num_pages: int
    hits: int
    """Pages read that were here, ahead of time or not."""
    misses: int
    """Pages read that were in a tier below."""
    moves: int
    """Pages that came here, from above or below."""
    moved_bytes: int
    """What came with them."""
    waited_s: float
    """Time that reads took of which this was the slowest tier, and that pages waited to enter it.
    What was read ahead by then takes none."""


class Place(Protocol):
    """Where bytes lie."""

    @property
    def device(self) -> torch.device:
        """Of what `load` writes."""

    def put(self, slot: int, page: torch.Tensor, record: Record) -> None:
        """Keep a page, uint8 [L, R], in a free slot. Raises `OutOfPages` if it cannot."""

    def load(self, layer: int, slots: list[int], out: torch.Tensor) -> None:
        """Copy one layer of these slots to `out`, uint8 [n, R], on the device of this place. Raises
        `LoadError` for what is lost."""

    def page(self, slot: int) -> torch.Tensor:
        """A whole page, uint8 [L, R], of which the memory may be shared."""

    def erase(self, slot: int) -> None:
        """Forget what is in a slot."""

    def close(self) -> object:
        """Give up what is open."""


class Memory:
    """Pages in memory, of a device or of the host."""

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device, pin: bool) -> None:
        shape = (layout.num_layers, num_pages, layout.layer_bytes)
        with torch.inference_mode(False):  # another thread, which is not in it, writes, too
            self.pages = torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pin)

    def put(self, slot: int, page: torch.Tensor, record: Record) -> None:
        """See `Place`."""
        self.pages[:, slot] = page

    @property
    def device(self) -> torch.device:
        """See `Place`."""
        return self.pages.device

    def load(self, layer: int, slots: list[int], out: torch.Tensor) -> None:
        """See `Place`."""
        index = torch.tensor(slots, device=self.pages.device)
        torch.index_select(self.pages[layer], 0, index, out=out)

    def page(self, slot: int) -> torch.Tensor:
        """See `Place`."""
        return self.pages[:, slot]

    def erase(self, slot: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass(eq=False, slots=True)
class Page:
    """A retired page. Written by the chain only, under its lock."""

    record: Record
    """Its key and number."""
    level: int
    slot: int
    references: int = 1
    """Tiers that hold it: one, and its forks."""


@dataclass(eq=False, slots=True)
class Shelf:
    """A place, its free slots, and the pages in the others."""

    name: str
    place: Place
    capacity: int
    """Pages that may stay here."""
    num_slots: int
    """Pages that there is memory for: one more where pages are exchanged with a tier below."""
    held: dict[int, Page] = field(default_factory=dict)
    """By serial number, least recently used first."""
    freed: list[int] = field(default_factory=list)
    """Slots that were in use and are not; those from `num_touched` on never were."""
    num_touched: int = 0
    hits: int = 0
    misses: int = 0
    moves: int = 0
    waited_s: float = 0.0

    @property
    def room(self) -> int:
        """Pages that it may take."""
        return self.capacity - len(self.held)

    @property
    def num_free(self) -> int:
        """Slots that nothing is in."""
        return len(self.freed) + self.num_slots - self.num_touched

    def take(self) -> int:
        """A free slot."""
        if self.freed:
            return self.freed.pop()
        self.num_touched += 1
        return self.num_touched - 1

    def is_slow(self, device: torch.device) -> bool:
        """Whether it is worth beginning early to read from here."""
        return not isinstance(self.place, Memory) or self.place.device != device

    def accept(self, page: Page) -> None:
        """Count a page that has come."""
        self.held[page.record.serial] = page
        self.moves += 1

    def use(self, page: Page) -> None:
        """Count a page that is read."""
        self.held[page.record.serial] = self.held.pop(page.record.serial)
        self.hits += 1

    def release(self, page: Page, slot: int) -> None:
        """Give the slot of a page back."""
        del self.held[page.record.serial]
        self.place.erase(slot)
        self.freed.append(slot)

    def stats(self, page_bytes: int) -> TierStats:
        """Counts for reports."""
        return TierStats(
            name=self.name,
            capacity=self.capacity,
            num_pages=len(self.held),
            hits=self.hits,
            misses=self.misses,
            moves=self.moves,
            moved_bytes=self.moves * page_bytes,
            waited_s=self.waited_s,
        )
