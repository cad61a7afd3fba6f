"""Attention as the textbook writes it (Vaswani et al. 2017), step by step: the definition of right.

`steps` is the forward pass, one named intermediate after the other; `trace` shows them, this
backend keeps what it needs. The backward pass is written out by hand. It computes every score,
hidden or not, and holds [B, H, Lq, Lk] tensors: use it to understand, to check, and in float64.

Half precision is widened to float32 once, at the beginning, and rounded once, at the end.

What a query does not see cannot reach it: a hidden key or value may hold inf or NaN, and so may
a query that sees nothing. 0 * inf is NaN, so wherever a weight of 0 meets such a value the product
is replaced by what the mathematics means, nothing (`weigh`).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveal.attention import cost
from foveal.attention.mask import Visibility
from foveal.attention.operands import Operands
from foveal.attention.packed import OneByOne
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import accumulate_dtype
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Estimate, Peaks, Work, roofline
from foveal.kernels.portable.philox import keep_mask
from foveal.kernels.portable.weigh import weigh

_SCORE_PASSES = 16
"""How often the forward pass reads or writes a [B, H, Lq, Lk] tensor."""
_LIVE_SCORES = 3
"""How many of them are alive at once."""
_CALLS = 30
"""Operators that a forward pass launches."""


class Unfused(OneByOne):
    """The textbook computation."""

    name = "unfused"

    def refuse(self, spec: AttentionSpec, workload: Workload, machine: Machine) -> tuple[str, ...]:
        """Refuses only approximations."""
        if spec.approximation is not Approximation.EXACT:
            return (f"computes exactly, not {spec.approximation.value}",)
        return ()

    def kernel(self, spec: AttentionSpec, workload: Workload) -> str:
        """See `Backend.kernel`."""
        return "PyTorch operators, step by step"

    def workspace_bytes(self, spec: AttentionSpec, workload: Workload) -> int:
        """The score matrices alive at once, and one boolean mask."""
        pairs = workload.batch * workload.q_len * workload.kv_len
        size = accumulate_dtype(workload.dtype).itemsize
        return pairs * (spec.num_heads * size * _LIVE_SCORES + 1)

    def estimate(self, spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
        """Two matrix products and a softmax over all pairs; a walk over the scores for every step;
        the inputs twice (values are searched for inf and NaN), and widened where they are half."""
        dtype = accumulate_dtype(workload.dtype)
        pairs = cost.all_pairs(spec, workload)
        inputs = 2 * cost.operand_bytes(spec, workload) + cost.widening_bytes(spec, workload)
        work = Work(
            flops=cost.attention_flops(spec, pairs),
            bytes_moved=pairs * dtype.itemsize * _SCORE_PASSES + inputs,
            calls=_CALLS,
        )
        return roofline(work, dtype, peaks)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`. Differentiable in q, k, v and the bias, through `out` and `lse`."""
        out, lse = _Textbook.apply(q, k, v, operands.bias, spec, operands)  # type: ignore[no-untyped-call]
        return out, lse


def steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> Iterator[tuple[str, torch.Tensor]]:
    """The forward pass: each intermediate as it comes, by name, in the accumulating dtype.

    Score-shaped ones are [B, H, Lq, Lk], `row_max` and `denominator` [B, H, Lq, 1]. A row that
    sees nothing has row_max 0 and denominator 0, hence zeros and an lse of -inf.
    """
    q, k, v = (t.to(accumulate_dtype(q.dtype)) for t in (q, k, v))
    s = unfold(fold(q, spec) @ k.transpose(-1, -2), spec)
    yield "scores", s
    s = s * spec.resolved_scale
    yield "scaled", s
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
        yield "capped", s
    seen = visible_pairs(q, k, spec, operands)
    yield "mask", seen
    if spec.alibi is not None or operands.bias is not None:
        s = s + score_bias(q, k, spec, operands)
        yield "biased", s
    s = s.masked_fill(~seen, -math.inf)
    yield "masked", s
    row_max = s.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    yield "row_max", row_max
    s = torch.exp(s - row_max)
    yield "exponentials", s
    denominator = s.sum(-1, keepdim=True)
    yield "denominator", denominator
    p = s / denominator.masked_fill(denominator == 0, 1.0)
    yield "probabilities", p
    if spec.dropout:
        p = p * dropout_factor(p, spec, operands)
        yield "dropped", p
    yield "out", unfold(weigh(fold(p, spec), v), spec)
    yield "lse", (row_max + torch.log(denominator)).squeeze(-1)


def visible_pairs(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> torch.Tensor:
    """bool [B or 1, H or 1, Lq, Lk]: positions, lengths, boolean mask and -inf in the bias."""
    seen = Visibility.of(spec, q, k, operands).dense()
    if operands.mask is not None:
        seen = seen & operands.mask
    if operands.bias is not None:
        seen = seen & (operands.bias != -math.inf)
    return seen


def score_bias(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> torch.Tensor:
    """What is added to the scores, broadcastable to [B, H, Lq, Lk]: ALiBi and the bias."""
    total = q.new_zeros(())
    if spec.alibi is not None:
        slopes = q.new_tensor(spec.alibi).view(-1, 1, 1)
        total = total + slopes * Visibility.of(spec, q, k, operands).distances()
    return total if operands.bias is None else total + operands.bias.to(q.dtype)


def dropout_factor(p: torch.Tensor, spec: AttentionSpec, operands: Operands) -> torch.Tensor:
    """0 where dropout takes a weight, 1 / (1 - dropout) where it leaves one."""
    assert operands.seed is not None, "the door draws a seed"
    batch, heads, q_len, kv_len = map(range, p.shape)
    keep = keep_mask(operands.seed, spec.dropout, (batch, heads, q_len, kv_len), p.device)
    return keep.to(p.dtype) / (1 - spec.dropout)


def fold(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[B, H, Lq, N] -> [B, Hkv, G * Lq, N]: the queries that share a KV head, one after another,
    so that no key is ever repeated."""
    batch, _, q_len, size = x.shape
    return x.reshape(batch, spec.num_kv_heads, spec.group_size * q_len, size)


def unfold(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[B, Hkv, G * Lq, N] -> [B, H, Lq, N]."""
    batch, _, rows, size = x.shape
    return x.reshape(batch, spec.num_heads, rows // spec.group_size, size)


class _Textbook(torch.autograd.Function):
    """The steps, and their derivatives by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = {"probabilities", "out", "lse"} | ({"scaled"} if spec.softcap else set())
        kept = {name: x for name, x in steps(q, k, v, spec, operands) if name in wanted}
        ctx.save_for_backward(q, k, v, kept["probabilities"], kept.get("scaled"))
        ctx.spec, ctx.operands = spec, operands
        return kept["out"].to(q.dtype), kept["lse"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[Any, ...]:
        """With p the probabilities and dp the gradient that reaches them,

        ds = p * (dp - sum_j p_j dp_j + d_lse): the softmax's Jacobian, and d lse / ds = p.
        Taking a constant from dp changes nothing, as the p_j sum to 1; taking dp at the largest
        p keeps the cancellation out where one key has nearly all the weight.
        """
        spec, operands = ctx.spec, ctx.operands
        *inputs, p, scaled = ctx.saved_tensors
        q, k, v = (t.to(p.dtype) for t in inputs)
        d_out = fold(d_out.to(p.dtype), spec)
        factor = dropout_factor(p, spec, operands) if spec.dropout else 1.0
        d_v = weigh(fold(p * factor, spec).transpose(-1, -2), d_out)
        unseen = p == 0
        d_p = unfold(d_out @ v.transpose(-1, -2), spec) * factor
        d_p = d_p.masked_fill(unseen, 0.0)
        d_p = d_p - d_p.gather(-1, p.argmax(-1, keepdim=True))
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True) + d_lse.unsqueeze(-1))
        d_s = d_s.masked_fill(unseen, 0.0)
        d_bias = None
        if ctx.needs_input_grad[3]:
            d_bias = d_s.sum_to_size(operands.bias.shape).to(operands.bias.dtype)
        if scaled is not None:  # tanh' = 1 / cosh^2; 1 - tanh^2 would cancel near the cap
            d_s = (d_s / torch.cosh(scaled / spec.softcap) ** 2).masked_fill(unseen, 0.0)
        d_s = fold(d_s * spec.resolved_scale, spec)
        d_q = unfold(weigh(d_s, k), spec)
        d_k = weigh(d_s.transpose(-1, -2), fold(q, spec))
        grads = (d.to(t.dtype) for d, t in zip((d_q, d_k, d_v), inputs, strict=True))
        return (*grads, d_bias, None, None)
