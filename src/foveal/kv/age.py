"""Which pages of a paged cache have grown old: for the caches that keep those elsewhere."""

from collections.abc import Iterable

from foveal.kv.layout import Key
from foveal.kv.paged import PagedCache


def old_parts(cache: PagedCache, num_recent: int) -> list[Key]:
    """Full pages (row, part) of nothing but tokens before the last `num_recent`, without those that
    hold sinks: every query reads these, and they hold the largest keys (Xiao et al. 2024)."""
    size = cache.store.page_size
    sinks = 0 if cache.window is None else cache.window.sinks
    return [
        (row, part)
        for row, (table, end) in enumerate(
            zip(cache.tables, cache.next_positions.tolist(), strict=True)
        )
        for part in table.pages
        if part * size >= sinks and (part + 1) * size <= end - num_recent
    ]


def passed_parts(cache: PagedCache, keys: Iterable[Key]) -> list[Key]:
    """Those pages among `keys`, kept elsewhere, that the window has passed; the cache counts them
    as evicted from now on."""
    if cache.window is None:
        return []
    size, passed = cache.store.page_size, []
    firsts = (cache.next_positions - cache.window.size + 1).tolist()
    for row, part in keys:
        if (part + 1) * size <= firsts[row]:
            passed.append((row, part))
            table = cache.tables[row]
            table.evicted = max(table.evicted, (part + 1) * size)
    return passed
