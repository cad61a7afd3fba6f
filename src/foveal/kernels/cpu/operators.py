"""The native kernels as PyTorch operators, so that `torch.compile` and `torch.export` see one node
in place of a pointer that they cannot follow, and autograd finds the native backward pass.

Eager calls without gradients do not come here: PyTorch's dispatcher costs about 10 us a call.
"""

from collections.abc import Sequence
from typing import Any

import torch

from foveal.kernels.cpu.attention import (
    Beside,
    Gradients,
    Rules,
    Saved,
    attention_backward,
    attention_forward,
    new_gradient,
    new_result,
)

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""`out`, `lse`, and `tops` and `weights` as `Saved` has them."""

_POSITIONS = ("q_positions", "kv_positions", "kv_lengths", "q_bounds", "kv_bounds")
_TENSORS = ("mask", "bias", *_POSITIONS)
_NUMBERS = ("scale", "softcap", "causal", "left", "right", "chunk", "sinks")


@torch.library.custom_op("foveal::attention_forward", mutates_args=(), device_types="cpu")
def attention_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    q_positions: torch.Tensor | None,
    kv_positions: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    q_bounds: torch.Tensor | None,
    kv_bounds: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
    left: int | None,
    right: int | None,
    chunk: int | None,
    sinks: int,
    alibi: Sequence[float] | None,
) -> Results:
    """`attention_forward`, its rules and tensors one by one."""
    tensors = (mask, bias, q_positions, kv_positions, kv_lengths, q_bounds, kv_bounds)
    numbers = (scale, softcap, causal, left, right, chunk, sinks, alibi)
    rows = (_numbers_of_rows(q), _numbers_of_rows(q))
    out, lse = attention_forward(q, k, v, *_describe(*tensors, *numbers), rows)
    return out, lse, *rows


@attention_operator.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> Results:
    return *new_result(q, v.shape[-1]), _numbers_of_rows(q), _numbers_of_rows(q)


@torch.library.custom_op(
    "foveal::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor tops, "
    "Tensor weights, Tensor? mask, Tensor? bias, Tensor? q_positions, Tensor? kv_positions, "
    "Tensor? kv_lengths, Tensor? q_bounds, Tensor? kv_bounds, float scale, float? softcap, "
    "bool causal, SymInt? left, SymInt? right, SymInt? chunk, SymInt sinks, float[]? alibi) "
    "-> (Tensor, Tensor, Tensor)",
)
def gradient_operator(d_out: torch.Tensor, d_lse: torch.Tensor, *rest: Any) -> Gradients:
    """`attention_backward`, what is saved, its tensors and rules one by one."""
    q, k, v, out, tops, weights, *given = rest
    saved = Saved(q=q, k=k, v=v, out=out, tops=tops, weights=weights)
    return attention_backward(d_out, d_lse, saved, *_describe(*given))


@gradient_operator.register_fake
def _(
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: object,
) -> Gradients:
    return new_gradient(q), new_gradient(k), new_gradient(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    tensors = 3 + len(_TENSORS)
    out, _, tops, weights = output
    ctx.save_for_backward(*inputs[:3], out, tops, weights, *inputs[3:tensors])
    ctx.numbers = inputs[tensors:]


def _differentiate(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[3:]):
        raise NotImplementedError("the native kernels have gradients of q, k and v alone")
    gradients = gradient_operator(d_out, d_lse, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


attention_operator.register_autograd(_differentiate, setup_context=_save)


def _numbers_of_rows(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _describe(*given: Any) -> tuple[Rules, Beside]:
    """Rules and tensors, from the operators' arguments after q, k and v."""
    tensors, (*numbers, alibi) = given[: len(_TENSORS)], given[len(_TENSORS) :]
    slopes = None if alibi is None else torch.tensor(alibi, dtype=torch.float32)
    rules = Rules(**dict(zip(_NUMBERS, numbers, strict=True)), alibi=slopes)
    return rules, Beside(**dict(zip(_TENSORS, tensors, strict=True)))
