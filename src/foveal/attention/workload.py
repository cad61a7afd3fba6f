"""How big the call is: the sizes and circumstances by which backends refuse, price and compete."""

from dataclasses import dataclass

import torch

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
    needs_lse_grad: bool = False
    """A gradient will flow through the log-sum-exp (learned sinks, or the caller's own use)."""
    operands: frozenset[str] = frozenset()
    """Names of the tensors beside q, k, v; "bias_grad" if the bias requires a gradient."""
    packed: bool = False
    """The call is `attend_varlen`."""
    strided_head: bool = False
    """Some input's last dimension is not contiguous."""

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
