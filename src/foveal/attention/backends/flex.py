"""PyTorch's FlexAttention, compiled: forward only, on a CPU with a C++ compiler.

The tiles to visit come from our own `Visibility`; the mask, the bias and ALiBi's slopes reach the
kernel as tensors, so that one compiled kernel serves every mask, window and bias of its sizes.
Compiling takes seconds, once for given sizes, scale and dtype; `estimate` counts it. Sizes cannot
be left open: with symbols for them PyTorch 2.13 writes C++ that does not compile.

Without a compiled kernel FlexAttention computes every score and says so only in a warning; here
that is an error (`fullgraph`). PyTorch 2.13 gives no gradient and no log-sum-exp on a CPU, and
its CUDA kernels have not been verified: all refused.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from foveal.attention import cost
from foveal.attention.mask import Sight, Visibility, cut
from foveal.attention.operands import Operands
from foveal.attention.packed import OneByOne
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import accumulate_dtype
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Estimate, Peaks, Work, roofline

_TILE = 128
"""Queries and keys of a tile, FlexAttention's default."""
_COMPILE_S = 5.0
"""Seconds to compile for given sizes: 4 to 15 measured on machines with 2 cores, some busy."""
_CALLS = 30
"""Operators that preparing a call launches."""
_MAX_COMPILED = 256
"""Compiled kernels kept; PyTorch's default of 8 is soon used up."""


class Flex(OneByOne):
    """FlexAttention, compiled."""

    name = "flex"

    def refuse(self, spec: AttentionSpec, workload: Workload, machine: Machine) -> tuple[str, ...]:
        """Refuses what FlexAttention's CPU kernel cannot do, and other devices."""
        reasons = []
        if spec.approximation is not Approximation.EXACT:
            reasons.append(f"computes exactly, not {spec.approximation.value}")
        if workload.device != "cpu":
            reasons.append(f"verified on the CPU only, not on {workload.device}")
        if workload.needs_grad:
            reasons.append("FlexAttention has no backward pass on a CPU")
        if workload.needs_lse:
            reasons.append("FlexAttention gives no log-sum-exp on a CPU")
        if spec.dropout:
            reasons.append("FlexAttention has no dropout")
        if workload.dtype == torch.float64:
            reasons.append("FlexAttention has no float64 on a CPU")
        if machine.architecture == "x86_64" and "avx2" not in machine.instruction_sets:
            reasons.append("FlexAttention needs AVX2 on a CPU")
        if _compiler() is None:
            reasons.append("compiling needs a C++ compiler: install g++ or set CXX")
        return tuple(reasons)

    def kernel(self, spec: AttentionSpec, workload: Workload) -> str:
        """See `Backend.kernel`."""
        return "compiled FlexAttention"

    def workspace_bytes(self, spec: AttentionSpec, workload: Workload) -> int:
        """The boolean mask with what some rows of it are made from, and a tile per thread. A mask
        counts as one per sequence and head, as a workload does not tell how far it is shared."""
        batch = workload.batch if workload.operands - {"bias"} else 1
        heads = spec.num_heads if "mask" in workload.operands else 1
        row = batch * workload.kv_len
        size = accumulate_dtype(workload.dtype).itemsize
        tile = _TILE * (_TILE + spec.value_dim) * size * torch.get_num_threads()
        rows = min(_TILE, workload.q_len)
        return heads * row * workload.q_len + row * rows * (11 + heads) + tile

    def estimate(self, spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
        """The pairs in visited tiles, each input and the mask once, and compiling."""
        edges = (spec.left is not None) + (spec.right is not None) + 2 * (spec.chunk is not None)
        queries = workload.batch * spec.num_heads * workload.q_len
        pairs = min(
            cost.visible_pairs(spec, workload) + queries * edges * _TILE // 2,
            cost.all_pairs(spec, workload),
        )
        work = Work(
            flops=cost.attention_flops(spec, pairs),
            bytes_moved=cost.operand_bytes(spec, workload) + workload.q_len * workload.kv_len,
            calls=_CALLS,
        )
        computed = roofline(work, accumulate_dtype(workload.dtype), peaks)
        formula = f"{computed.formula} + {_COMPILE_S:g} s to compile at the first call of its sizes"
        return Estimate(seconds=computed.seconds + _COMPILE_S, formula=formula)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`. The lse, which `refuse` does not promise, is NaN."""
        visibility = Visibility.of(spec, q, k, operands)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
            out = _compiled()(
                q,
                k,
                v,
                score_mod=_score_mod(q, visibility, operands),
                block_mask=_block_mask(q, visibility, operands),
                scale=spec.resolved_scale,
                enable_gqa=spec.group_size > 1,
            )
        return out, q.new_full(q.shape[:-1], torch.nan, dtype=accumulate_dtype(q.dtype))


@cache
def _compiler() -> str | None:
    """The C++ compiler that PyTorch will call."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def _compiled() -> Callable[..., Any]:
    """The function that compiles itself for every new combination of sizes."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _score_mod(
    q: torch.Tensor, visibility: Visibility, operands: Operands
) -> Callable[..., torch.Tensor] | None:
    """Softcap, ALiBi and bias. Numbers are tensors too: as such they are not compiled in."""
    spec, dtype = visibility.spec, accumulate_dtype(q.dtype)
    if spec.softcap is None and spec.alibi is None and operands.bias is None:
        return None
    batch, heads, q_len, _ = q.shape
    cap = None if spec.softcap is None else q.new_tensor([spec.softcap], dtype=dtype)
    slopes = None if spec.alibi is None else q.new_tensor(spec.alibi, dtype=dtype)
    q_positions = visibility.q_positions(slice(None)).expand(batch, -1)
    k_positions = visibility.kv_positions(slice(None)).expand(batch, -1)
    bias = operands.bias
    if bias is not None:
        bias = bias.detach().to(dtype).expand(batch, heads, q_len, visibility.kv_len)

    def score_mod(
        s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        if cap is not None:
            s = cap[0] * torch.tanh(s / cap[0])
        if slopes is not None:
            s = s + slopes[h] * (k_positions[b, j] - q_positions[b, i])
        return s if bias is None else s + bias[b, h, i, j]

    return score_mod


def _block_mask(q: torch.Tensor, visibility: Visibility, operands: Operands) -> BlockMask:
    """The tiles to visit, and which of them the mask must be asked about."""
    seen = _seen(visibility, operands).expand(q.shape[0], q.shape[1], -1, -1)

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return seen[b, h, i, j]

    masked = operands.mask is not None or operands.bias is not None
    rows = [tiles for _, tiles in visibility.tiles(_TILE, _TILE)]
    indices = torch.zeros(2, 1, 1, len(rows), -(-visibility.kv_len // _TILE), dtype=torch.int32)
    counts = torch.zeros(2, 1, 1, len(rows), dtype=torch.int32)
    for row, tiles in enumerate(rows):
        for full in (0, 1):
            found = [
                keys.start // _TILE
                for keys, sight in tiles
                if full == (sight is Sight.FULL and not masked)
            ]
            counts[full, 0, 0, row] = len(found)
            indices[full, 0, 0, row, : len(found)] = torch.tensor(found, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        counts[0],
        indices[0],
        counts[1],
        indices[1],
        BLOCK_SIZE=_TILE,
        mask_mod=mask_mod,
        seq_lengths=(visibility.q_len, visibility.kv_len),
    )


def _seen(visibility: Visibility, operands: Operands) -> torch.Tensor:
    """bool [B or 1, H or 1, Lq, Lk], made some rows at a time; -inf in a bias hides by itself."""
    parts = []
    for start in range(0, visibility.q_len, _TILE):
        rows = slice(start, min(start + _TILE, visibility.q_len))
        part = visibility.dense(rows)
        if operands.mask is not None:
            part = part & cut(operands.mask, rows, slice(None))
        parts.append(part)
    return torch.cat(parts, dim=2)
