"""What one attention call must do, counted from its shapes: pairs, FLOPs and bytes.

Backends price themselves with these counts and `hardware.roofline`. A pair is one query head's
query and one key; it costs 2 D FLOPs for its score and 2 Dv for its share of the output.
"""

from foveal.attention.mask import num_visible
from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.dtypes import accumulate_dtype

SOFTMAX_FLOPS = 64
"""The softmax of one pair takes as long as so many FLOPs of a matrix product: 0.7 ns against
95 GFLOP/s, measured in float32 on one core with AVX-512 (maximum, softmax, sum; in cache)."""


def all_pairs(spec: AttentionSpec, workload: Workload) -> int:
    """B * H * Lq * Lk: the pairs of a backend that computes what it then hides."""
    return workload.batch * spec.num_heads * workload.q_len * workload.kv_len


def visible_pairs(spec: AttentionSpec, workload: Workload) -> int:
    """The pairs that the spec leaves visible at default positions."""
    per_head = num_visible(spec, workload.q_len, workload.kv_len)
    return workload.batch * spec.num_heads * per_head


def matmul_flops(spec: AttentionSpec, num_pairs: int) -> float:
    """FLOPs of the two matrix products over these pairs; elementwise work is not counted."""
    return 2.0 * num_pairs * (spec.head_dim + spec.value_dim)


def attention_flops(spec: AttentionSpec, num_pairs: int) -> float:
    """FLOPs of the two products, and the softmax in their coin."""
    return matmul_flops(spec, num_pairs) + SOFTMAX_FLOPS * num_pairs


def operand_bytes(spec: AttentionSpec, workload: Workload) -> int:
    """Bytes of q, k, v and out, each touched once: the least that any backend moves."""
    queries = workload.q_len * spec.num_heads
    keys = workload.kv_len * spec.num_kv_heads
    elements = (queries + keys) * (spec.head_dim + spec.value_dim)
    return workload.batch * elements * workload.dtype.itemsize


def widening_bytes(spec: AttentionSpec, workload: Workload) -> int:
    """Bytes of writing q, k and v in the accumulating dtype and reading them back; 0 if they have
    it already."""
    wide = accumulate_dtype(workload.dtype).itemsize
    if wide == workload.dtype.itemsize:
        return 0
    return operand_bytes(spec, workload) // workload.dtype.itemsize * wide * 2
