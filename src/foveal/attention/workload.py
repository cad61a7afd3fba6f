"""How big the call is: the sizes and circumstances by which backends refuse, price and compete."""

from dataclasses import dataclass
from typing import Self

import torch

from foveal.attention.operands import Operands
from foveal.core.dtypes import dtype_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes and circumstances of one call. Hashable; holds no tensor."""

    batch: int
    """B; for a packed call the number of sequences."""
    q_len: int
    """Lq; for a packed call the longest."""
    kv_len: int
    """Lk; for a packed call the longest."""
    dtype: torch.dtype
    device: str = "cpu"
    """Device type: "cpu" or "cuda"."""
    needs_grad: bool = False
    """Some input requires a gradient."""
    needs_lse: bool = False
    """The log-sum-exp is wanted (by the caller, or to merge learned sinks)."""
    needs_lse_grad: bool = False
    """A gradient will flow through the log-sum-exp (learned sinks, or the caller's own use)."""
    operands: frozenset[str] = frozenset()
    """Names of the tensors beside q, k, v; "bias_grad" if the bias requires a gradient."""
    packed: bool = False
    """The call is `attend_varlen`."""
    strided_head: bool = False
    """Some input's last dimension is not contiguous."""

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Operands,
        *,
        return_lse: bool = False,
    ) -> Self:
        """The workload of one call on `[B, H, L, D]` tensors. A caller who asks for the
        log-sum-exp of inputs that require gradients may send a gradient through it."""
        inputs = [q, k, v]
        present = operands.present
        if operands.bias is not None:
            inputs.append(operands.bias)
            if operands.bias.requires_grad:
                present |= {"bias_grad"}
        needs_lse = return_lse or operands.sink_logits is not None
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return cls(
            batch=q.shape[0],
            q_len=q.shape[2],
            kv_len=k.shape[2],
            dtype=q.dtype,
            device=q.device.type,
            needs_grad=needs_grad,
            needs_lse=needs_lse,
            needs_lse_grad=needs_grad and needs_lse,
            operands=present,
            strided_head=any(x.stride(-1) != 1 for x in (q, k, v)),
        )

    def __str__(self) -> str:
        words = [f"B={self.batch} Lq={self.q_len} Lk={self.kv_len}"]
        words.append(f"{dtype_name(self.dtype)} on {self.device}")
        if self.packed:
            words.append("packed")
        if self.needs_grad:
            words.append("with gradients")
        if self.operands:
            words.append("with " + ", ".join(sorted(self.operands)))
        return ", ".join(words)
