"""`explain`: who would compute a call, and why, without computing it.

Takes the arguments of `attend` and checks them alike, so what it answers is what `attend` does.
"""

from typing import Unpack

import torch

from foveal.attention.operands import OperandFields, Operands
from foveal.attention.select import Choice, choose
from foveal.attention.spec import AttentionSpec
from foveal.attention.validate import check, check_budget
from foveal.attention.workload import Workload


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    backend: str = "auto",
    return_lse: bool = False,
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> Choice:
    """The choice that `attend` makes for these arguments: `print` it, or take `to_dict()`.

    Raises what `attend` raises: `ArgumentError`, `Unsupported`, `BudgetExceeded`.
    """
    given = Operands(**operands)
    spec = check(q, k, v, spec, given)
    check_budget(memory_budget)
    workload = Workload.of(q, k, v, given, return_lse=return_lse)
    return choose(spec, workload, backend=backend, memory_budget=memory_budget)
