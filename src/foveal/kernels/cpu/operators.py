"""The native kernels as PyTorch operators, so that `torch.compile` and `torch.export` see one node
in place of a pointer that they cannot follow.

Eager calls do not come here: PyTorch's dispatcher costs about 10 us a call. The operators have no
gradients of their own.
"""

from collections.abc import Sequence

import torch

from foveal.kernels.cpu.attention import Beside, Result, Rules, attention_forward, new_result


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
) -> Result:
    """`attention_forward`, its rules and tensors one by one."""
    rules = Rules(
        scale=scale,
        softcap=softcap,
        causal=causal,
        left=left,
        right=right,
        chunk=chunk,
        sinks=sinks,
        alibi=None if alibi is None else torch.tensor(alibi, dtype=torch.float32),
    )
    beside = Beside(
        mask=mask,
        bias=bias,
        q_positions=q_positions,
        kv_positions=kv_positions,
        kv_lengths=kv_lengths,
        q_bounds=q_bounds,
        kv_bounds=kv_bounds,
    )
    return attention_forward(q, k, v, rules, beside)


@attention_operator.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> Result:
    return new_result(q, v.shape[-1])
