"""Grids are the cells that they say they are."""

import pytest
import torch

from foveal.bench.grid import DEFAULT, QUICK, Grid, one_at_a_time, product
from foveal.bench.record import Cell
from foveal.core.errors import ArgumentError


def test_one_factor_varies_at_a_time() -> None:
    cells = one_at_a_time(DEFAULT)
    lengths = len(DEFAULT.lengths)
    others = (DEFAULT.kv_heads, DEFAULT.head_dims, DEFAULT.masks, DEFAULT.phases, DEFAULT.dtypes)
    assert len(cells) == lengths * (1 + sum(len(values) - 1 for values in others))
    assert cells[:lengths] == product(Grid(lengths=DEFAULT.lengths, **_base()))
    assert len({cell.series for cell in cells}) == len(cells) / lengths


def _base() -> dict[str, tuple[object, ...]]:
    return {
        "kv_heads": (2,),
        "head_dims": (64,),
        "masks": ("causal",),
        "phases": ("prefill",),
        "dtypes": (torch.float32,),
    }


def test_the_product_holds_everything_once() -> None:
    cells = product(DEFAULT)
    assert len(set(cells)) == len(cells)
    assert set(one_at_a_time(DEFAULT)) <= set(cells)
    # A decode step that is causal and one that is full are the same computation.
    assert len(cells) == 7 * 3 * 2 * 2 * (3 + 2)


def test_the_quick_grid_is_one_curve() -> None:
    assert len({cell.series for cell in one_at_a_time(QUICK)}) == 1


@pytest.mark.parametrize(
    "fields", [{"masks": ("diagonal",)}, {"phases": ("sleep",)}, {"lengths": (0,)}, {"heads": ()}]
)
def test_values_without_meaning_are_refused(fields: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ArgumentError):
        Grid(**fields)


def test_work_is_counted_over_visible_pairs() -> None:
    grid = Grid(lengths=(4,), heads=(2,), kv_heads=(1,), head_dims=(8,), masks=("causal",))
    prefill, decode = (c for c in product(grid) if c.workload.dtype == torch.float32)
    assert prefill.flops == 2 * (1 + 2 + 3 + 4) * 2 * (8 + 8)
    assert decode.kv_bytes == 4 * (8 + 8) * 4
    assert isinstance(prefill, Cell) and not prefill.decode and decode.decode


def test_only_keys_inside_the_window_are_counted() -> None:
    grid = Grid(lengths=(1024,), masks=("window",), phases=("decode",), head_dims=(64,))
    cell = product(grid)[0]
    assert cell.kv_bytes == 257 * cell.spec.num_kv_heads * 128 * 4
