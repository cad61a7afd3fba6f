"""Which cells a benchmark visits: grids as data, one tuple of values for each factor.

The full product of the factors is large. The default grid varies one factor at a time around a
base, which is the first value of every factor, each time over all lengths; `product` takes all
combinations.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from foveal.attention.spec import AttentionSpec, SpecFields
from foveal.attention.workload import Workload
from foveal.bench.record import Cell
from foveal.core.errors import ArgumentError

WINDOW = 256
"""Keys to the left of a query under the mask "window"."""
MASKS: dict[str, SpecFields] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"causal": True, "window": (WINDOW, None)},
}
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The values of each factor; the first of each is the base."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    heads: tuple[int, ...] = (8,)
    kv_heads: tuple[int, ...] = (2, 8, 1)
    head_dims: tuple[int, ...] = (64, 128)
    masks: tuple[str, ...] = ("causal", "full", "window")
    phases: tuple[str, ...] = PHASES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu",)

    def __post_init__(self) -> None:
        for name, accepted in (("masks", MASKS), ("phases", PHASES)):
            for value in getattr(self, name):
                if value not in accepted:
                    raise ArgumentError(name, repr(value), ", ".join(accepted))
        for field in fields(self):
            values = getattr(self, field.name)
            if not values:
                raise ArgumentError(field.name, "no value", "one or more")
            for value in values:
                if isinstance(value, int) and value < 1:
                    raise ArgumentError(field.name, value, "1 or more")


DEFAULT = Grid()
QUICK = Grid(
    lengths=(128, 256, 512, 1024, 2048),
    kv_heads=(2,),
    head_dims=(64,),
    masks=("causal",),
    phases=("prefill",),
    dtypes=(torch.float32,),
)


def product(grid: Grid) -> list[Cell]:
    """Every combination of the grid's values, each computation once."""
    factors = (getattr(grid, field.name) for field in fields(grid))
    return list(dict.fromkeys(_cell(*values) for values in itertools.product(*factors)))


def one_at_a_time(grid: Grid) -> list[Cell]:
    """The base over all lengths, then each other value of each factor, over all lengths."""
    return list(dict.fromkeys(cell for variant in _variants(grid) for cell in product(variant)))


def _variants(grid: Grid) -> Iterator[Grid]:
    names = [field.name for field in fields(grid) if field.name != "lengths"]
    base = replace(grid, **{name: getattr(grid, name)[:1] for name in names})
    yield base
    for name in names:
        for value in getattr(grid, name)[1:]:
            yield replace(base, **{name: (value,)})


def _cell(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mask: str,
    phase: str,
    dtype: torch.dtype,
    device: str,
) -> Cell:
    # A single query at the last position sees all keys, causal or not: one computation.
    decode_full = phase == "decode" and mask == "full"
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        **MASKS["causal" if decode_full else mask],
    )
    q_len = 1 if phase == "decode" else length
    workload = Workload(batch=1, q_len=q_len, kv_len=length, dtype=dtype, device=device)
    return Cell(spec=spec, workload=workload)
