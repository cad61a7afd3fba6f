"""What one attention call must do, counted from its shapes: pairs, FLOPs and bytes.

Backends price themselves with these counts and `hardware.roofline`. A pair is one query head's
query and one key; it costs 2 D FLOPs for its score and 2 Dv for its share of the output.
"""

from foveal.attention.mask import num_visible
from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload


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


def operand_bytes(spec: AttentionSpec, workload: Workload) -> int:
    """Bytes of q, k, v and out, each touched once: the least that any backend moves."""
    queries = workload.q_len * spec.num_heads
    keys = workload.kv_len * spec.num_kv_heads
    elements = (queries + keys) * (spec.head_dim + spec.value_dim)
    return workload.batch * elements * workload.dtype.itemsize
