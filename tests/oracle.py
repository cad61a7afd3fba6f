"""The oracle: attention in float64, written as plainly as possible, and the tolerance rule.

Shares no code with `foveal.attention`: visibility is decided key by key from the definition in
`AttentionSpec`, and gradients come from autograd.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec

FLOOR_ULPS = 4
"""Errors below this many units in the last place of the output's scale are never held against us:
a lucky baseline proves nothing."""


def visible(spec: AttentionSpec, p_q: int, p_k: int) -> bool:
    """Whether the query at position p_q sees the key at position p_k, neither being a pad."""
    if spec.causal and p_k > p_q:
        return False
    if p_k < spec.sinks:
        return True
    left, right = spec.window or (None, None)
    if left is not None and p_k < p_q - left:
        return False
    if right is not None and p_k > p_q + right:
        return False
    return spec.chunk is None or p_q // spec.chunk == p_k // spec.chunk


def visibility(spec: AttentionSpec, batch: int, lq: int, lk: int, given: Operands) -> torch.Tensor:
    """[B, H, Lq, Lk] bool, one key at a time."""
    q_pos = torch.arange(lq) + lk - lq if given.q_positions is None else given.q_positions
    k_pos = torch.arange(lk) if given.kv_positions is None else given.kv_positions
    q_rows, k_rows = (p.expand(batch, -1).tolist() for p in (q_pos, k_pos))
    # Only a given position below 0 is a pad: with more queries than keys the default ones begin
    # below 0, and still see what a window or no causality lets them.
    first = -math.inf if given.q_positions is None else 0
    lengths = [lk] * batch if given.kv_lengths is None else given.kv_lengths.tolist()
    seen = torch.tensor(
        [
            [
                [
                    j < lengths[b] and p >= first and k >= 0 and visible(spec, p, k)
                    for j, k in enumerate(k_rows[b])
                ]
                for p in q_rows[b]
            ]
            for b in range(batch)
        ],
        dtype=torch.bool,
    ).reshape(batch, 1, lq, lk)
    seen = seen.expand(batch, spec.num_heads, lq, lk).clone()
    if given.mask is not None:
        seen &= given.mask
    if given.bias is not None:
        seen &= given.bias != -math.inf
    return seen


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, given: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [B, H, Lq, Dv] and `lse` [B, H, Lq] in float64; no dropout."""
    q, k, v = (t.double() for t in (q, k, v))
    batch, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(spec.group_size, dim=1) for t in (k, v))
    seen = visibility(spec, batch, lq, lk, given)
    # What is hidden must not matter, even inf or NaN: clear it where no query may see it.
    k = torch.where(seen.any(2).unsqueeze(-1), k, 0.0)
    v = torch.where(seen.any(2).unsqueeze(-1), v, 0.0)
    s = q @ k.transpose(-1, -2) * spec.resolved_scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if spec.alibi is not None:
        q_pos = torch.arange(lq) + lk - lq if given.q_positions is None else given.q_positions
        k_pos = torch.arange(lk) if given.kv_positions is None else given.kv_positions
        distance = k_pos.expand(batch, -1)[:, None, :] - q_pos.expand(batch, -1)[:, :, None]
        slopes = torch.tensor(spec.alibi, dtype=torch.float64)[:, None, None]
        s = s + slopes * distance[:, None].double()
    if given.bias is not None:
        s = s + torch.where(seen, given.bias.double(), 0.0)
    s = s.masked_fill(~seen, -math.inf)
    if given.sink_logits is not None:
        column = given.sink_logits.double().view(1, -1, 1, 1).expand(batch, -1, lq, 1)
        s = torch.cat([s, column], dim=-1)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))[..., :lk]
    return p @ v, lse


@dataclass(frozen=True)
class Error:
    """Largest absolute errors of one result."""

    ours: float
    baseline: float
    scale: float
    dtype: torch.dtype
    factor: float
    terms: float

    @property
    def allowed(self) -> float:
        """A factor on the baseline's error, with a floor of a few units in the last place of the
        result or (where they cancel) in float32 of the terms that were summed."""
        floor = torch.finfo(self.dtype).eps * self.scale
        if self.dtype != torch.float64:
            floor = max(floor, torch.finfo(torch.float32).eps * self.terms)
        return max(self.factor * self.baseline, FLOOR_ULPS * floor)


def assert_close(
    ours: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    what: str,
    factor: float = 2.0,
    terms: float = 0.0,
) -> None:
    """The rule: our error against float64 is at most twice (for gradients three times: `factor`)
    that of PyTorch in our precision. `terms` is the size of terms that may have cancelled.

    `exact` is float64; `baseline` is PyTorch's plain computation in the dtype of `ours`. Infinite
    entries (the lse of hidden rows) must agree exactly; NaN is never right.
    """
    assert not ours.isnan().any(), f"{what}: NaN"
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error = Error(
        ours=(ours.double() - exact)[finite].abs().max().item(),
        baseline=(baseline.double() - exact)[finite].abs().nan_to_num(0.0).max().item(),
        scale=exact[finite].abs().max().item(),
        dtype=ours.dtype,
        factor=factor,
        terms=terms,
    )
    assert error.ours <= error.allowed, f"{what}: error {error.ours:.3g} > {error.allowed:.3g}"


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, given: Operands
) -> torch.Tensor:
    """PyTorch's own answer in the inputs' precision, for the tolerance rule: SDPA with a mask.

    Softcap, ALiBi and sinks are composed from ordinary operators in the same precision.
    """
    batch, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    seen = visibility(spec, batch, lq, lk, given)
    k, v = (t.repeat_interleave(spec.group_size, dim=1) for t in (k, v))
    k = torch.where(seen.any(2).unsqueeze(-1), k, 0)
    v = torch.where(seen.any(2).unsqueeze(-1), v, 0)
    simple = spec.softcap is None and spec.alibi is None and given.sink_logits is None
    if simple and given.bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=spec.resolved_scale
        ).nan_to_num(0.0)
    s = q @ k.transpose(-1, -2) * spec.resolved_scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if spec.alibi is not None:
        q_pos = torch.arange(lq) + lk - lq if given.q_positions is None else given.q_positions
        k_pos = torch.arange(lk) if given.kv_positions is None else given.kv_positions
        distance = k_pos.expand(batch, -1)[:, None, :] - q_pos.expand(batch, -1)[:, :, None]
        slopes = torch.tensor(spec.alibi, dtype=q.dtype)[:, None, None]
        s = s + slopes * distance[:, None].to(q.dtype)
    if given.bias is not None:
        s = s + torch.where(seen, given.bias.to(q.dtype), 0)
    s = s.masked_fill(~seen, -math.inf)
    if given.sink_logits is not None:
        column = given.sink_logits.to(q.dtype).view(1, -1, 1, 1).expand(batch, -1, lq, 1)
        s = torch.cat([s, column], dim=-1)
    return torch.softmax(s, dim=-1)[..., :lk].nan_to_num(0.0) @ v
