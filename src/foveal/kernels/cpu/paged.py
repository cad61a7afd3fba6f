"""The native forward pass of attention over pages: as `attention_forward`, but keys and values lie
in the pages of a store, in any format, and are read there: nothing is gathered or decoded.

Queries are packed [1, H, tokens, D] with the bounds of each sequence, or a batch [B, H, T, D]; each
sequence has its row of the page table. How pages are read is described in pages.h.
"""

from dataclasses import dataclass
from struct import Struct

import torch

from foveal.kernels.cpu.attention import (
    CALL,
    ELEMENTS,
    Result,
    Rules,
    new_result,
    numbers,
    strided,
)
from foveal.kernels.cpu.library import load

_INT8, _INT4 = 3, 4

EVERYWHERE = 2**62
"""A position behind every other."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Codes:
    """Pages as they are stored; `foveal.kv.formats` explains them."""

    codes: torch.Tensor
    """[Hkv, pages, S, D], or uint8 [..., D / 2] of int4 codes."""
    scale: torch.Tensor | None
    """float32 [Hkv, pages, S, 1] or [Hkv, pages, 1, D]; None for floats."""
    low: torch.Tensor | None
    """As `scale`; of int4 only."""
    per_channel: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Paged:
    """Keys and values in pages, and which sequence has which."""

    keys: Codes
    values: Codes
    table: torch.Tensor
    """int64 [N, C]: page numbers, -1 for none."""
    starts: torch.Tensor
    """int64 [N, C]: the position in the first slot of each page."""
    lengths: torch.Tensor
    """int64 [N]: there is nothing at positions from here on."""
    first: int = 0
    last: int = EVERYWHERE
    """Keys at positions below `first` or from `last` on are hidden."""


_PAGES = Struct("10q 10q 7q")
"""`Pages` in attention_pages.h, field by field."""


def attention_paged(
    q: torch.Tensor,
    pages: Paged,
    rules: Rules,
    q_positions: torch.Tensor,
    q_bounds: torch.Tensor | None = None,
) -> Result:
    """`out` [B, H, T, Dv] in q's dtype and `lse` float32 [B, H, T]; see `attention_forward`.

    `q_positions` is int [B, T], -1 for pads. Nothing is checked.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    out, lse = new_result(q, _value_dim(pages.values))
    positions, table, starts, lengths = (
        x.long().contiguous() for x in (q_positions, pages.table, pages.starts, pages.lengths)
    )
    bounds = None if q_bounds is None else q_bounds.long().contiguous()
    sizes = (len(table), q.shape[1], pages.keys.codes.shape[0], q.shape[2])
    call = CALL.pack(
        *strided(q),
        *(0,) * 8,
        *(*strided(out), *strided(lse)),
        *(0,) * 10,
        *(positions.data_ptr(), positions.shape[1] if bounds is None else 0, 0, 0),
        *(0, 0 if bounds is None else bounds.data_ptr(), 0),
        0 if rules.alibi is None else rules.alibi.data_ptr(),
        *(*sizes, 0, q.shape[3], out.shape[3], ELEMENTS[q.dtype]),
        *numbers(rules),
    )
    described = _PAGES.pack(
        *_describe(pages.keys),
        *_describe(pages.values),
        *(x.data_ptr() for x in (table, starts, lengths)),
        *(table.shape[1], pages.keys.codes.shape[2], pages.first, pages.last),
    )
    load().foveal_attention_pages(call, described)
    return out, lse


def _value_dim(values: Codes) -> int:
    """Dv."""
    return values.codes.shape[-1] * (2 if values.low is not None else 1)


def _describe(stored: Codes) -> tuple[int, ...]:
    codes, scale, low = stored.codes, stored.scale, stored.low
    storage = ELEMENTS[codes.dtype] if scale is None else _INT8 if low is None else _INT4
    return (
        codes.data_ptr(),
        *(stride * codes.element_size() for stride in codes.stride()[:3]),
        *(0 if x is None else x.data_ptr() for x in (scale, low)),
        *((0, 0) if scale is None else scale.stride()[:2]),
        *(stored.per_channel, storage),
    )
