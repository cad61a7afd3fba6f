"""How exact a result is: against float64, held to the rule for low precision.

The rule (that of flash-attention's own tests): our error against float64 is at most twice that of
plain PyTorch operators in the same precision, gradients three times, and errors below a few units
in the last place of the result's scale are never held against anyone, because a lucky baseline
proves nothing.

`plain` is both: the textbook formula in ordinary operators, in float64 the reference and in the
inputs' dtype the baseline. It shares no code with the backends but the mask's definition.
"""

import math

import torch

from foveal.attention.mask import Visibility
from foveal.attention.operands import Operands
from foveal.attention.spec import AttentionSpec
from foveal.bench.record import Accuracy
from foveal.core.dtypes import accumulate_dtype

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
FLOOR_ULPS = 4
SCORE_ULPS = 2
LARGEST_REFERENCE = 2**24
"""Scores that a reference may hold: 128 MiB in float64."""


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    seen: torch.Tensor,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over what is `seen`, zeros for a row that sees nothing.

    Takes [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] and a boolean [.., Lq, Lk]; keeps their
    dtype throughout. Knows scale and mask only. Differentiable.
    """
    k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    return _weights(q, k, spec, seen) @ v


def _weights(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, seen: torch.Tensor
) -> torch.Tensor:
    s = (q @ k.transpose(-1, -2) * spec.resolved_scale).masked_fill(~seen, -math.inf)
    largest = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - largest.masked_fill(largest == -math.inf, 0.0))
    total = p.sum(-1, keepdim=True)
    return p / total.masked_fill(total == 0, 1.0)


def score_rounding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, seen: torch.Tensor
) -> float:
    """By how much the output may move if every score is off by a rounding or two of its products.

    Scores are sums, so they are known to about eps |q| . |k|; to first order the output moves by
    sum_j p_j (v_j - out) ds_j. With large inputs two scores may nearly tie, and this, not the
    algorithm, decides the error. eps is that of the accumulating dtype, the rest float64.
    """
    eps = torch.finfo(accumulate_dtype(q.dtype)).eps
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    p = _weights(q, k, spec, seen)
    off = SCORE_ULPS * eps * spec.resolved_scale * (q.abs() @ k.abs().transpose(-1, -2))
    distance = (v.unsqueeze(2) - (p @ v).unsqueeze(3)).abs()  # [B, H, Lq, Lk, Dv]
    return torch.einsum("bhqk,bhqkd->bhqd", p * off, distance).max().item()


def compare(
    ours: torch.Tensor,
    plainly: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    *,
    factor: float = FORWARD_FACTOR,
    slack: float = 0.0,
) -> Accuracy:
    """The accuracy of `ours` and of the baseline `plainly`, both computed in `dtype`, against the
    float64 tensor `exact`. Errors up to `slack` are allowed whatever the baseline's."""
    limits = torch.finfo(dtype)
    scale = exact.abs().max().item() if exact.numel() else 0.0
    floor = FLOOR_ULPS * limits.eps * max(scale, limits.smallest_normal)
    plain_error = largest_error(plainly, exact)
    return Accuracy(
        error=largest_error(ours, exact),
        plain_error=plain_error,
        allowed=max(factor * (plain_error or 0.0), floor, slack),
    )


def largest_error(result: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Largest absolute difference to `exact`, which is finite; None if `result` is not."""
    if not result.isfinite().all():
        return None
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


class Judge:
    """Holds the float64 answer and the baseline of one call for a choice of its query rows.

    All rows where that is affordable; else every n-th, n odd, so that tiles of any power of two
    are met at different rows, and the last.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
    ) -> None:
        q_len, kv_len = q.shape[2], k.shape[2]
        step = -(-q.shape[0] * q.shape[1] * q_len * kv_len // LARGEST_REFERENCE) | 1
        self.rows = torch.tensor(sorted({*range(0, q_len, step), q_len - 1}), device=q.device)
        positions = Operands(q_positions=self.rows + kv_len - q_len)
        q = q[:, :, self.rows]
        seen = Visibility.of(spec, q, k, positions).dense()
        self._exact = plain(q.double(), k.double(), v.double(), spec, seen)
        self._plain = plain(q, k, v, spec, seen)

    def accuracy(self, out: torch.Tensor) -> Accuracy:
        """The accuracy of `out` [B, H, Lq, Dv]."""
        return compare(out[:, :, self.rows], self._plain, self._exact, out.dtype)
