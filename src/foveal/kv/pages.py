"""The page pool: who holds which page. Numbers only, no tensors; the paged cache owns those.

A page is `page_size` slots, one token each, in every layer at once. It is in one of three states:

    free      nobody holds it and nobody can find it
    in use    held by one or more page tables (its reference count)
    cached    held by nobody, but full and published under the hash of its contents, so that the
              next request with this prefix may take it up again; given up least recently used
              first when pages run out

A full page is never rewritten, and a page that several hold is never written at all: whoever wants
to write asks `writable` and gets a copy to write into (PagedAttention, Kwon et al. 2023).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foveal.core.errors import ArgumentError, OutOfPages


@dataclass(frozen=True, kw_only=True, slots=True)
class PageStats:
    """The pool at one moment: pages by state, and what has happened since it was made."""

    num_pages: int
    num_free: int
    num_cached: int
    num_used: int
    peak: int
    """Most pages ever in use at once."""
    allocations: int
    """Pages handed out, copies included; `allocations - frees = num_used + num_cached`."""
    frees: int
    """Pages that went back to the free list, evicted ones included."""
    copies: int
    """Pages handed out by copy-on-write."""
    hits: int
    """Pages that `match` found."""
    misses: int
    """Pages that `match` was asked for and did not find."""
    evictions: int
    """Cached pages given up."""
    fragmentation: float
    """Share of the slots of pages in use that hold no token."""


class PagePool:
    """Reference counts, copy-on-write, prefix index and least-recently-used order over page
    numbers 0 .. num_pages - 1. Every operation either happens whole or raises and changes
    nothing. Raises `ArgumentError` for a page that the caller cannot hold, `OutOfPages` when full.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ArgumentError(name, value, "an integer of at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._filled = [0] * num_pages
        self._digest: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}
        self._cached: dict[int, None] = {}  # insertion order: least recently used first
        self._peak = 0
        self._counts = dict.fromkeys(
            ("allocations", "frees", "copies", "hits", "misses", "evictions"), 0
        )

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now: the free and the cached."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """How many hold this page."""
        return self._references[page]

    def filled(self, page: int) -> int:
        """Slots of this page that hold a token."""
        return self._filled[page]

    def allocate(self, count: int = 1) -> list[int]:
        """`count` empty pages, each held once; all of them or none."""
        if count > self.num_available:
            raise OutOfPages(
                f"{count} pages wanted, {self.num_available} of {self.num_pages} available: "
                f"{len(self._free)} free, {len(self._cached)} cached"
            )
        if count > len(self._free):
            self.evict(count - len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        self._counts["allocations"] += count
        self._note_peak()
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of these pages once more."""
        pages = list(pages)
        for page in pages:
            self._check_held(page)
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Hold each of these pages once less; what nobody holds becomes cached or free.

        Pages come in the order of their tokens and go in the opposite one, so that of a prefix
        the end is evicted before the beginning.
        """
        for page, count in Counter(pages).items():
            self._check_held(page, count)
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._digest:
                self._cached[page] = None
            else:
                self._return(page)

    def writable(self, page: int, start: int) -> int:
        """The page to write into from slot `start` on, in place of `page`.

        It is `page` itself, its later slots forgotten, unless someone else holds it or it is
        full: then it is a fresh page, to which the caller must copy the slots below `start`,
        and `page` is held once less.
        """
        self._check_held(page)
        if not 0 <= start <= min(self._filled[page], self.page_size - 1):
            accepted = f"a slot up to the {self._filled[page]} filled ones of {self.page_size}"
            raise ArgumentError("start", start, accepted)
        if self._references[page] == 1 and self._filled[page] < self.page_size:
            self._filled[page] = start
            return page
        (fresh,) = self.allocate()
        self._filled[fresh] = start
        self._counts["copies"] += 1
        self.release([page])
        return fresh

    def fill(self, page: int, num_tokens: int) -> None:
        """Note that the first `num_tokens` slots of a page hold tokens now."""
        self._check_held(page)
        low = self._filled[page]
        grows = num_tokens > low and self._references[page] > 1
        if not low <= num_tokens <= self.page_size or grows:
            accepted = f"{low} to {self.page_size} slots of a page that is held once"
            raise ArgumentError("num_tokens", num_tokens, accepted)
        self._filled[page] = num_tokens

    def publish(self, page: int, digest: bytes) -> None:
        """Let `match` find this full page by the hash of its contents (`prefix.chain`).

        Where another page is known under that hash already, this one stays private.
        """
        self._check_held(page)
        if self._filled[page] < self.page_size:
            accepted = f"a page with all {self.page_size} slots filled"
            raise ArgumentError("page", f"{page} with {self._filled[page]} filled", accepted)
        if digest not in self._published and page not in self._digest:
            self._published[digest] = page
            self._digest[page] = digest

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of this chain, each held once more."""
        pages: list[int] = []
        for digest in digests:
            if digest not in self._published:
                break
            pages.append(self._published[digest])
        for page in pages:
            self._cached.pop(page, None)
            self._references[page] += 1
        self._counts["hits"] += len(pages)
        self._counts["misses"] += len(digests) - len(pages)
        self._note_peak()
        return pages

    def evict(self, count: int) -> int:
        """Give up to `count` cached pages back, least recently used first; says how many."""
        victims = [page for page, _ in zip(self._cached, range(count), strict=False)]
        for page in victims:
            del self._cached[page]
            del self._published[self._digest.pop(page)]
            self._return(page)
        self._counts["evictions"] += len(victims)
        return len(victims)

    def stats(self) -> PageStats:
        """Counts of pages and of what happened to them. Takes time proportional to the pool."""
        held = [page for page, count in enumerate(self._references) if count]
        slots = len(held) * self.page_size
        filled = sum(self._filled[page] for page in held)
        return PageStats(
            num_pages=self.num_pages,
            num_free=len(self._free),
            num_cached=len(self._cached),
            num_used=len(held),
            peak=self._peak,
            fragmentation=1 - filled / slots if slots else 0.0,
            **self._counts,
        )

    def _return(self, page: int) -> None:
        self._filled[page] = 0
        self._free.append(page)
        self._counts["frees"] += 1

    def _note_peak(self) -> None:
        self._peak = max(self._peak, self.num_pages - self.num_available)

    def _check_held(self, page: int, count: int = 1) -> None:
        if not 0 <= page < self.num_pages or self._references[page] < count:
            raise ArgumentError("page", page, f"the number of a page held at least {count} times")
