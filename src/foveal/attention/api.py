"""The one door to attention: `attend` for [B, H, L, D] tensors, `attend_varlen` for packed ones.

A call is checked once, a backend is chosen (`select.choose`) and run, and learned sink logits are
merged into its result here, the same way for all.
"""

from dataclasses import replace
from typing import Literal, Unpack, overload

import torch

from foveal.attention.backend import Backend
from foveal.attention.merge import with_sink
from foveal.attention.operands import OperandFields, Operands
from foveal.attention.packed import Bounds, Result, nothing
from foveal.attention.select import choose
from foveal.attention.spec import AttentionSpec
from foveal.attention.validate import check, check_budget, check_packed, read_bounds
from foveal.attention.workload import Workload
from foveal.core.errors import ArgumentError


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> torch.Tensor: ...


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    backend: str = "auto",
    return_lse: Literal[True],
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> Result: ...


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    backend: str = "auto",
    return_lse: bool = False,
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> torch.Tensor | Result:
    """Attention of queries [B, H, Lq, D] over keys [B, Hkv, Lk, D] and values [B, Hkv, Lk, Dv].

    `spec` says what is computed, None full attention. `operands` are the tensors beside it
    (`Operands` gives their shapes). `backend` names who computes, "auto" chooses by memory and
    time, and `explain` tells why. `memory_budget` bounds the temporaries, in bytes.

    Returns `out` [B, H, Lq, Dv] in q's dtype and, with `return_lse`, the natural log-sum-exp of
    the visible scores, [B, H, Lq] in float32 (float64 for float64). A row in which nothing is
    visible gives zeros and -inf, and sends no gradient.

    Raises `ArgumentError` for a bad argument, `Unsupported` if every backend (or the named one)
    refuses, with the reasons, and `BudgetExceeded` if none fits the budget.
    """
    given = Operands(**operands)
    spec = check(q, k, v, spec, given)
    check_budget(memory_budget)
    workload = Workload.of(q, k, v, given, return_lse=return_lse)
    choice = choose(spec, workload, backend=backend, memory_budget=memory_budget)
    out, lse = _compute(choice.backend, q, k, v, spec, seeded(given, spec))
    return (out, lse) if return_lse else out


@overload
def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> torch.Tensor: ...


@overload
def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    backend: str = "auto",
    return_lse: Literal[True],
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> Result: ...


def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    backend: str = "auto",
    return_lse: bool = False,
    memory_budget: int | None = None,
    **operands: Unpack[OperandFields],
) -> torch.Tensor | Result:
    """Attention within sequences packed one after another, without padding.

    q is [tokens, H, D], k [tokens of keys, Hkv, D], v [tokens of keys, Hkv, Dv]. Sequence i has
    the queries `cu_seqlens_q[i]` up to `cu_seqlens_q[i + 1]`, and likewise its keys; the bounds
    are integers [sequences + 1], and a sequence may be empty. Positions, if given, are [tokens];
    mask, bias and kv_lengths belong to unpacked calls. Sequence i drops what `attend` drops with
    the seed `seed + i * 2**32`.

    Returns `out` [tokens, H, Dv] and, with `return_lse`, `lse` [tokens, H]. Otherwise as `attend`.
    """
    given = Operands(**operands)
    spec = check_packed(q, k, v, spec, given)
    check_budget(memory_budget)
    bounds = _bounds(cu_seqlens_q, q, cu_seqlens_k, k)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    longest = bounds.longest
    workload = replace(
        Workload.of(q, k, v, given, return_lse=return_lse),
        batch=len(bounds),
        q_len=longest[0],
        kv_len=longest[1],
        packed=True,
    )
    choice = choose(spec, workload, backend=backend, memory_budget=memory_budget)
    out, lse = _compute(choice.backend, q, k, v, spec, seeded(given, spec), bounds)
    out, lse = (x.squeeze(0).transpose(0, 1) for x in (out, lse))
    return (out, lse) if return_lse else out


def _bounds(
    cu_seqlens_q: torch.Tensor, q: torch.Tensor, cu_seqlens_k: torch.Tensor, k: torch.Tensor
) -> Bounds:
    q_bounds = read_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    k_bounds = read_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(q_bounds) != len(k_bounds):
        accepted = f"{len(q_bounds)} bounds, as cu_seqlens_q"
        raise ArgumentError("cu_seqlens_k", f"{len(k_bounds)} bounds", accepted)
    return Bounds(tuple(q_bounds), tuple(k_bounds))


def _compute(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    operands: Operands,
    bounds: Bounds | None = None,
) -> Result:
    """Run a backend; answer calls with nothing in them; let the sink logits join."""
    if not q.numel() or not k.numel():
        out, lse = nothing(q, k, v)
    elif bounds is None:
        out, lse = backend.run(q, k, v, spec, operands)
    else:
        out, lse = backend.run_packed(q, k, v, spec, operands, bounds)
    if operands.sink_logits is not None:
        out, lse = with_sink(out, lse, operands.sink_logits)
    return out, lse


def seeded(operands: Operands, spec: AttentionSpec) -> Operands:
    """The operands, with a seed drawn from PyTorch's default generator if dropout lacks one."""
    if not spec.dropout or operands.seed is not None:
        return operands
    return replace(operands, seed=int(torch.randint(2**63 - 1, ())))
