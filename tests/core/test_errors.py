"""Errors are one tree, and their messages say what to do."""

import pytest
import torch

from foveal.core import errors
from foveal.core.dtypes import FLOATS, accumulate_dtype, dtype_name, parse_dtype
from foveal.core.errors import ArgumentError, BudgetExceeded, FovealError, Unsupported


def test_every_error_is_a_foveal_error() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) == 9
    assert all(issubclass(error, FovealError) for error in found)


def test_argument_error_names_all_three() -> None:
    error = ArgumentError("window", (-1, 0), "pairs of at least 0")
    assert isinstance(error, ValueError)
    assert str(error) == "window: got (-1, 0); accepted: pairs of at least 0"


def test_unsupported_carries_every_reason() -> None:
    error = Unsupported("nobody", {"fused": ("dropout", "softcap"), "flex": ("no compiler",)})
    assert error.reasons["fused"] == ("dropout", "softcap")
    assert "fused: dropout; softcap" in str(error)


def test_budget_error_carries_the_numbers() -> None:
    error = BudgetExceeded("attention", 10, {"unfused": 4096})
    assert error.needed_bytes == {"unfused": 4096}
    assert "budget 10 bytes" in str(error) and "unfused: 4,096 bytes" in str(error)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_names_round_trip(dtype: torch.dtype) -> None:
    assert parse_dtype(dtype_name(dtype)) == dtype


def test_dtype_aliases_and_refusal() -> None:
    assert parse_dtype("bf16") == torch.bfloat16
    with pytest.raises(ArgumentError, match="dtype: got 'int8'; accepted: float64, float32"):
        parse_dtype("int8")


def test_sums_are_kept_in_at_least_float32() -> None:
    assert accumulate_dtype(torch.bfloat16) == torch.float32
    assert accumulate_dtype(torch.float64) == torch.float64
