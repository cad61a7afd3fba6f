"""The native CPU kernels for attention: what they compute, what it costs, and how to call them.

They serve the flash backend on CPUs in float32, bfloat16 and float16, forward and backward: all of
a spec but dropout, and no gradient of a bias.
What they cannot serve stays with the portable kernels, and `obstacles` says why.
"""

from functools import lru_cache

import torch

from foveal.attention import cost
from foveal.attention.operands import Operands
from foveal.attention.packed import Bounds
from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import dtype_name
from foveal.hardware.roofline import Estimate, Peaks, Work, roofline
from foveal.kernels.available import native, native_isa
from foveal.kernels.cpu.attention import ELEMENTS, Beside, Result, Rules, attention_forward
from foveal.kernels.cpu.operators import attention_operator

_SOFTMAX_FLOPS = 18
"""The softmax of one pair takes as long as so many FLOPs of a matrix product: about 9 of its 13
instructions take the unit that multiplies (see exp.h)."""
_TILE_KEYS, _SPLIT_KEYS, _FEW_ROWS, _MANY_ROWS = 128, 1024, 64, 512
"""As attention_plan.h and attention_plan.cpp have them."""
_PANEL_ROWS = 6
_GRADIENT_PARTS = 4


def obstacles(
    spec: AttentionSpec, dtype: torch.dtype, device: str, bias_grad: bool = False
) -> tuple[str, ...]:
    """Why the native kernels do not serve a call; empty if they do. `bias_grad`: a gradient of its
    bias is needed."""
    found = []
    if device != "cpu":
        found.append(f"the native kernels run on the CPU, not on {device}")
    if dtype not in ELEMENTS:
        found.append(f"no native kernel for {dtype_name(dtype)}")
    if spec.dropout:
        found.append("no native kernel with dropout")
    if bias_grad:
        # Nor can passes be mixed: where scores are large so is their rounding, and a backward pass
        # that recomputes them must share it.
        found.append("no native gradient of a bias")
    if native_isa() is None:
        found.append(f"native kernels: {native().detail}")
    return tuple(found)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    operands: Operands,
    bounds: Bounds | None = None,
) -> Result:
    """`out` [B, H, Lq, Dv] in q's dtype and `lse` float32 [B, H, Lq].

    With `bounds`, of packed sequences, [1, H, tokens, Dv] and [1, H, tokens]. Differentiable in q,
    k and v, through both.
    """
    if torch.compiler.is_compiling() or needs_grad(q, k, v):
        return _forward_as_operator(q, k, v, spec, operands, bounds)
    beside = Beside(
        mask=operands.mask,
        bias=operands.bias,
        q_positions=operands.q_positions,
        kv_positions=operands.kv_positions,
        kv_lengths=operands.kv_lengths,
        q_bounds=None if bounds is None else torch.tensor(bounds.q),
        kv_bounds=None if bounds is None else torch.tensor(bounds.kv),
    )
    return attention_forward(q, k, v, rules(spec), beside)


def needs_grad(*inputs: torch.Tensor | None) -> bool:
    """Whether autograd records what becomes of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _forward_as_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    operands: Operands,
    bounds: Bounds | None,
) -> Result:
    out, lse, _, _ = attention_operator(
        q,
        k,
        v,
        *(operands.mask, operands.bias, operands.q_positions, operands.kv_positions),
        operands.kv_lengths,
        None if bounds is None else torch.tensor(bounds.q),
        None if bounds is None else torch.tensor(bounds.kv),
        *(spec.resolved_scale, spec.softcap, spec.causal, spec.left, spec.right),
        *(spec.chunk, spec.sinks, spec.alibi),
    )
    return out, lse


def workspace_bytes(spec: AttentionSpec, workload: Workload) -> int:
    """What the threads keep at most (queries, sums and one tile of keys and values each, all in
    float32), and the partial results where keys are divided among tasks. With gradients, those of
    the queries in float32, once for each part of the keys, which takes more than all the rest."""
    width, group = spec.head_dim + spec.value_dim, spec.group_size
    rows = workload.q_len * group
    scratch = (min(rows, max(_MANY_ROWS, group)) + _TILE_KEYS) * width * 4
    total = torch.get_num_threads() * scratch
    if rows <= _FEW_ROWS and workload.kv_len > _SPLIT_KEYS:
        parts = -(-workload.kv_len // _SPLIT_KEYS)
        heads = workload.batch * spec.num_kv_heads
        total += heads * parts * rows * (spec.value_dim + 2) * 4
    if workload.needs_grad:
        queries = workload.batch * spec.num_heads * workload.q_len
        parts = min(_GRADIENT_PARTS, -(-workload.kv_len // _SPLIT_KEYS))
        total += queries * (parts * spec.head_dim + 2) * 4
    return total


def estimate(spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
    """The visible pairs and what panels of queries cut off at the edges of the view; each input
    once; one call. Sums and products are float32 whatever the inputs."""
    edges = (spec.left is not None) + (spec.right is not None) + 2 * (spec.chunk is not None)
    queries = workload.batch * spec.num_heads * workload.q_len
    wasted = queries * edges * (_PANEL_ROWS + _TILE_KEYS // 8) // 2
    pairs = min(cost.visible_pairs(spec, workload) + wasted, cost.all_pairs(spec, workload))
    work = Work(
        flops=cost.matmul_flops(spec, pairs) + _SOFTMAX_FLOPS * pairs,
        bytes_moved=cost.operand_bytes(spec, workload),
    )
    return roofline(work, torch.float32, peaks)


@lru_cache(maxsize=1024)
def rules(spec: AttentionSpec) -> Rules:
    return Rules(
        scale=spec.resolved_scale,
        softcap=spec.softcap,
        causal=spec.causal,
        left=spec.left,
        right=spec.right,
        chunk=spec.chunk,
        sinks=spec.sinks,
        alibi=None if spec.alibi is None else torch.tensor(spec.alibi, dtype=torch.float32),
    )
