"""Operators are counted as Python launches them; what they call in turn is part of them."""

import torch
import torch.nn.functional as F
from torch.profiler import record_function

from foveal.bench.launches import count_launches


def test_counts_what_python_launches() -> None:
    x = torch.ones(4, 4)
    assert count_launches(lambda: (x + x) * x).count == 2
    assert count_launches(lambda: None).count == 0


def test_nested_operators_count_once() -> None:
    q = torch.ones(1, 2, 8, 4)
    assert count_launches(lambda: F.scaled_dot_product_attention(q, q, q)).count == 1


def test_operators_inside_marked_ranges_and_own_functions_count() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

    x = torch.ones(3, requires_grad=True)

    def call() -> None:
        with record_function("a range: not an operator"):
            Twice.apply(x).mul(2)

    launches = count_launches(call)
    assert launches.count == 2
    assert launches.kind == "operators"
