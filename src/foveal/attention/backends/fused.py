"""PyTorch's SDPA with its kernel pinned: the operators themselves, never PyTorch's own choice.

`scaled_dot_product_attention` picks a kernel silently and may fall back to one that holds every
score. Here the kernel follows from the call alone:

    CPU                            _scaled_dot_product_flash_attention_for_cpu
    CUDA, no mask, 16 bits         _scaled_dot_product_flash_attention
    CUDA otherwise                 _scaled_dot_product_efficient_attention

What these kernels do not know is either refused or written into one additive mask [B, H, Lq, Lk]
(windows, sinks, chunks, lengths, positions, masks, biases, ALiBi), of which every pair is computed.
Two repairs: their causal mask is aligned top-left, ours bottom-right, so it is used only where both
agree; and rows that see nothing get an lse of -inf (the CPU kernel says 0). Where all queries see
all keys, the query heads that share a KV head are folded into the query length, which reads each
key once instead of once per query head: 2 (float32) to 9 times (bfloat16) as fast in decoding.

Inf or NaN behind a mask is not held back: an additive mask cannot. The CUDA kernels were written
against their documented signatures and shapes and have not been run.
"""

import math

import torch

from foveal.attention import cost
from foveal.attention.mask import Sight, Visibility, cut, num_visible
from foveal.attention.operands import Operands
from foveal.attention.packed import OneByOne
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import accumulate_dtype
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Estimate, Peaks, Work, roofline

_HIDING = frozenset({"mask", "bias", "kv_lengths", "q_positions", "kv_positions"})
"""Operands that call for a mask."""
_TILE_KEYS = 512
"""Keys of a tile inside the CPU kernel."""
_MASK_CALLS = 12
"""Operators that building a mask and repairing the hidden rows launches."""
_MASK_ROWS = 128
"""Rows of a mask that are made at a time."""
_POSITION_BYTES = 11
"""Per pair of these rows: the distance in int64 and three booleans."""
_ALIGNMENT = 16
"""Elements to which the CUDA kernel wants the rows of a mask padded."""
_CUDA_HEAD_DIM = 256
_HALVES = (torch.float16, torch.bfloat16)


class Fused(OneByOne):
    """SDPA, pinned."""

    name = "fused"

    def refuse(self, spec: AttentionSpec, workload: Workload, machine: Machine) -> tuple[str, ...]:
        """Refuses what the pinned kernel would reject, get wrong, or cannot give back."""
        reasons = []
        if spec.approximation is not Approximation.EXACT:
            reasons.append(f"computes exactly, not {spec.approximation.value}")
        if spec.softcap is not None:
            reasons.append("SDPA has no softcap")
        if spec.dropout:
            reasons.append("SDPA's CPU kernel has no dropout, its CUDA kernels drop other elements")
        if spec.value_dim != spec.head_dim:
            reasons.append("the kernel wants values of the size of keys")
        if workload.strided_head:
            reasons.append("the kernel misreads inputs whose last dimension is not contiguous")
        if workload.needs_lse_grad:
            reasons.append("the kernel's log-sum-exp has no gradient")
        if "bias_grad" in workload.operands:
            reasons.append("the CPU kernel's mask has no gradient")
        if workload.device == "cuda":
            reasons += _refuse_on_cuda(spec, workload)
        return tuple(reasons)

    def kernel(self, spec: AttentionSpec, workload: Workload) -> str:
        """See `Backend.kernel`."""
        masked = ", masked" if _needs_mask(spec, workload) else ""
        return f"SDPA{masked}"

    def workspace_bytes(self, spec: AttentionSpec, workload: Workload) -> int:
        """The mask, and the CPU kernel's tile of scores per thread."""
        rows = min(_tile_rows(workload.q_len), workload.q_len)
        keys = min(_TILE_KEYS, workload.kv_len)
        size = accumulate_dtype(workload.dtype).itemsize
        scratch = torch.get_num_threads() * rows * (keys + spec.head_dim) * size
        return scratch + (_mask_bytes(spec, workload) if _needs_mask(spec, workload) else 0)

    def estimate(self, spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
        """All pairs, or the causal half; each input once; the mask once per query head."""
        masked = _needs_mask(spec, workload)
        pairs = cost.all_pairs(spec, workload)
        if spec.causal and not masked:
            tile = _tile_rows(workload.q_len) * workload.q_len // 2
            waste = workload.batch * spec.num_heads * tile
            pairs = min(pairs, cost.visible_pairs(spec, workload) + waste)
        mask_size = accumulate_dtype(workload.dtype).itemsize if masked else 0
        work = Work(
            flops=cost.attention_flops(spec, pairs),
            bytes_moved=cost.operand_bytes(spec, workload) + pairs * mask_size,
            calls=1 + (_MASK_CALLS if masked else 0),
        )
        # On a CPU its half-precision kernel runs at the speed of the float32 one (measured).
        on_cpu = workload.device == "cpu"
        return roofline(work, accumulate_dtype(workload.dtype) if on_cpu else workload.dtype, peaks)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`. Differentiable in q, k, v through `out` only."""
        causal, mask = _mask_of(q, k, spec, operands)
        if q.shape[2] == 1 or (mask is None and not causal):
            folded = None if mask is None else _fold_mask(mask, spec)
            out, lse = _kernel(_fold_queries(q, spec), k, v, folded, False, spec.resolved_scale)
        else:
            out, lse = _kernel(q, k, v, mask, causal, spec.resolved_scale)
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
        if mask is not None:
            nothing = mask.amax(-1) == -math.inf
            if nothing.any():
                out = out.masked_fill(nothing.unsqueeze(-1), 0.0)
                lse = lse.masked_fill(nothing, -math.inf)
        return out, lse


def _needs_mask(spec: AttentionSpec, workload: Workload) -> bool:
    """Whether a call needs a mask, as far as its sizes tell."""
    if workload.operands & _HIDING or spec.alibi is not None:
        return True
    return not _is_plain(spec, workload.q_len, workload.kv_len)


def _is_plain(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether, at default positions, the kernel's own causal mask or none at all will do."""
    seen = num_visible(spec, q_len, kv_len)
    if seen == q_len * kv_len:
        return True
    return spec.causal and q_len == kv_len and seen == q_len * (q_len + 1) // 2


def _mask_of(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[bool, torch.Tensor | None]:
    """Whether the kernel's causal mask is used, and the additive mask if one is needed.

    The mask is [B or 1, H or 1, Lq, Lk]; in q's dtype if it only hides, in the accumulating
    dtype if it also adds.
    """
    visibility = Visibility.of(spec, q, k, operands)
    if operands.mask is None and operands.bias is None and spec.alibi is None:
        if visibility.whole() is Sight.FULL:
            return False, None
        moved = visibility.q_given is not None or visibility.kv_given is not None
        if not moved and _is_plain(spec, q.shape[2], k.shape[2]):
            return spec.causal and q.shape[2] > 1, None
    return False, _build_mask(q, visibility, operands)


def _build_mask(q: torch.Tensor, visibility: Visibility, operands: Operands) -> torch.Tensor:
    """The additive mask, made some rows at a time, as what it is made from is wider than it is."""
    alibi = visibility.spec.alibi
    beside = [x for x in (operands.mask, operands.bias) if x is not None]
    adds = alibi is not None or operands.bias is not None
    dtype = accumulate_dtype(q.dtype) if adds else q.dtype
    some = visibility.dense(slice(0, 1), slice(0, 1)).shape
    heads = 1 if alibi is None else len(alibi)
    sizes = (some[0], heads, visibility.q_len, visibility.kv_len)
    shape = torch.broadcast_shapes(sizes, *(x.shape for x in beside))  # type: ignore[no-untyped-call]
    mask = q.new_zeros(shape, dtype=dtype)
    for start in range(0, visibility.q_len, _MASK_ROWS):
        rows = slice(start, min(start + _MASK_ROWS, visibility.q_len))
        part, seen = mask[:, :, rows], visibility.dense(rows)
        if operands.mask is not None:
            seen = seen & cut(operands.mask, rows, slice(None))
        part.masked_fill_(~seen, -math.inf)
        if alibi is not None:
            slopes = torch.tensor(alibi, dtype=dtype, device=q.device)[:, None, None]
            part += slopes * visibility.distances(rows)
        if operands.bias is not None:
            part += cut(operands.bias.detach(), rows, slice(None)).to(dtype)
    return mask


def _mask_bytes(spec: AttentionSpec, workload: Workload) -> int:
    """The additive mask, and what some of its rows are made from. A mask or a bias counts as one
    per sequence and head, as a workload does not tell how far they are shared."""
    adds = spec.alibi is not None or "bias" in workload.operands
    batch = workload.batch if workload.operands & _HIDING else 1
    heads = spec.num_heads if adds or "mask" in workload.operands else 1
    widest = accumulate_dtype(workload.dtype).itemsize
    size = widest if adds else workload.dtype.itemsize
    row = workload.kv_len * batch * (_POSITION_BYTES + heads * (widest if adds else 1))
    return workload.q_len * workload.kv_len * batch * heads * size + row * min(
        _MASK_ROWS, workload.q_len
    )


def _tile_rows(q_len: int) -> int:
    """Queries of a tile inside the CPU kernel."""
    return 256 if q_len >= 768 else 64 if q_len >= 192 else 32


def _fold_queries(q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[B, H, Lq, D] -> [B, Hkv, G * Lq, D]."""
    return q.reshape(q.shape[0], spec.num_kv_heads, -1, q.shape[-1])


def _fold_mask(mask: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """The mask of a single query, [B or 1, H or 1, 1, Lk], for folded queries."""
    if mask.shape[1] == 1:
        return mask
    return mask.reshape(mask.shape[0], spec.num_kv_heads, spec.group_size, mask.shape[-1])


def _kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of the one kernel that the call's device, dtype and mask determine."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    elif mask is None and q.dtype in _HALVES:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        mask = None if mask is None else _pad_rows(mask.to(q.dtype)).expand(*q.shape[:3], -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : q.shape[2]]
    return out, lse


def _pad_rows(mask: torch.Tensor) -> torch.Tensor:
    """The mask in memory whose rows are as long as the CUDA kernel wants them."""
    length = -(-mask.shape[-1] // _ALIGNMENT) * _ALIGNMENT
    padded = mask.new_empty(*mask.shape[:-1], length)[..., : mask.shape[-1]]
    return padded.copy_(mask)


def _refuse_on_cuda(spec: AttentionSpec, workload: Workload) -> list[str]:
    """What the CUDA kernels add to the refusals."""
    reasons = []
    if workload.dtype == torch.float64:
        reasons.append("SDPA's CUDA kernels have no float64")
    if spec.head_dim % 8 or spec.head_dim > _CUDA_HEAD_DIM:
        accepted = f"multiples of 8 up to {_CUDA_HEAD_DIM}"
        reasons.append(f"SDPA's CUDA kernels take head sizes that are {accepted}")
    plain = workload.dtype in _HALVES and not _needs_mask(spec, workload)
    if spec.group_size > 1 and workload.q_len > 1 and not plain:
        reasons.append("SDPA's CUDA kernel for masks and float32 wants as many KV as query heads")
    return reasons
