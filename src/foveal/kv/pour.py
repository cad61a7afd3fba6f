"""Pouring: what one cache holds, put into another of another kind, format or smaller window.

A stream may change how it is stored while it runs: its tokens are decoded tile by tile, encoded
anew, and stand at the positions where they stood. Nothing is lost but what the target's format
rounds and what its window does not reach. At most one step of tokens is held beside the two
caches; it takes the time of attending to the source once for each step that is poured.
"""

import torch

from foveal.core.errors import ArgumentError
from foveal.kv.cache import Sight, View, Window
from foveal.kv.paged import PagedCache
from foveal.kv.quantised import QuantisedCache
from foveal.kv.ring import RingCache
from foveal.kv.slots import Slots

Pourable = RingCache | PagedCache | QuantisedCache
"""Caches that can be poured from and into."""


def pour(source: Pourable, target: Pourable, step_tokens: int) -> None:
    """Make `target` hold all of `source` that its own queries may yet see, and go on from there.

    Both are of one shape, dtype and device; `target` takes in steps of `step_tokens`. Raises
    `ArgumentError` where the target's window reaches to what the source has forgotten, and
    `OutOfPages`; the target is empty then.
    """
    ends = source.next_positions
    window = target.window or Window(max(1, int(ends.max())) + 1)
    sinks = ends.clamp(max=window.sinks)
    firsts = torch.maximum(ends - window.size + 1, sinks)
    target.reset()
    try:
        _move(source, target, torch.zeros_like(ends), sinks, step_tokens)
        target.leap(_slots_at(firsts))
        _move(source, target, firsts, ends, step_tokens)
    except BaseException:
        target.reset()
        raise
    target.leap(source.slots)


def _move(
    source: Pourable, target: Pourable, starts: torch.Tensor, ends: torch.Tensor, step_tokens: int
) -> None:
    """Append the tokens at positions `starts` up to `ends`, both [B], of each sequence."""
    for step in range(0, int((ends - starts).max()), step_tokens):
        positions = (starts + step).unsqueeze(1) + torch.arange(step_tokens, device=starts.device)
        positions = torch.where(positions < ends.unsqueeze(1), positions, -1)
        positions = positions[:, (positions >= 0).any(0)]
        for layer in range(source.shape.num_layers):
            k, v = _read(source.view(layer), positions, source.shape.num_kv_heads)
            target.append(layer, k, v, positions)


def _read(view: View, positions: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, Hkv, T, ...] of the tokens at positions [B, T]; zeros for pads."""
    missing = positions >= 0
    first = int(positions[missing].min())
    out: tuple[torch.Tensor, ...] = ()
    for tile in view.tiles(_onlooker(positions, first)):
        assert tile.positions is not None and tile.heads is None
        same = (tile.positions.unsqueeze(1) == positions.unsqueeze(2)) & missing.unsqueeze(2)
        found, slots = same.any(2), same.int().argmax(2)[:, None, :, None]
        parts = [
            x.gather(2, slots.expand(-1, num_heads, -1, x.shape[3]))
            for x in (tile.keys, tile.values)
        ]
        out = out or tuple(torch.zeros_like(part) for part in parts)
        here = found[:, None, :, None]
        out = tuple(torch.where(here, new, old) for new, old in zip(parts, out, strict=True))
        missing &= ~found
    if missing.any():
        position = int(positions[missing].min())
        accepted = f"one that holds position {position}, which the target's window reaches"
        raise ArgumentError("source", "a cache that has forgotten it", accepted)
    keys, values = out
    return keys, values


def _onlooker(positions: torch.Tensor, first: int) -> Sight:
    """Whoever looks without attending: sees every position from `first` on, and sinks."""
    nothing = torch.zeros(positions.shape[0], 1, 0, 1, device=positions.device)
    return Sight(
        q=nothing, far_q=nothing, positions=positions, scale=1.0, first=first, lse=nothing[..., 0]
    )


def _slots_at(positions: torch.Tensor) -> Slots:
    """Counts of sequences that go on at these positions."""
    slots = Slots(positions.shape[0], positions.device)
    slots.length, slots.next = int(positions.max()), positions.clone()
    return slots
