"""What each backend can do, found by asking it: nothing here is written down by hand.

A capability is a call that needs it: an ordinary call (4 heads of 64, 128 tokens, float32) with
one thing changed. A backend has the capability if it does not refuse that call. Combinations may
be refused though each part is not; `explain` answers for a particular call.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from foveal.attention.catalogue import BACKENDS
from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.attention.workload import Workload
from foveal.core.dtypes import FLOATS, dtype_name
from foveal.hardware.detect import detect

SPEC = AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=64)
CAUSAL = SPEC.replace(causal=True)
WORKLOAD = Workload(batch=2, q_len=128, kv_len=128, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Probe:
    """A call that needs one capability."""

    name: str
    spec: AttentionSpec = SPEC
    workload: Workload = WORKLOAD


def _with(*operands: str) -> Workload:
    return dataclasses.replace(WORKLOAD, operands=frozenset(operands))


_GRAD = dataclasses.replace(WORKLOAD, needs_grad=True)

PROBES: tuple[Probe, ...] = (
    Probe("full"),
    Probe("causal", CAUSAL),
    Probe("causal, Lq < Lk", CAUSAL, dataclasses.replace(WORKLOAD, q_len=5)),
    Probe("causal, Lq > Lk", CAUSAL, dataclasses.replace(WORKLOAD, kv_len=5)),
    Probe("decode (Lq = 1)", CAUSAL, dataclasses.replace(WORKLOAD, q_len=1)),
    Probe("window, causal", CAUSAL.replace(window=(16, None))),
    Probe("window, two-sided", SPEC.replace(window=(16, 16))),
    Probe("sinks", CAUSAL.replace(window=(16, None), sinks=4)),
    Probe("chunk", CAUSAL.replace(chunk=16)),
    Probe("GQA", dataclasses.replace(SPEC, num_kv_heads=2)),
    Probe("MQA", dataclasses.replace(SPEC, num_kv_heads=1)),
    Probe("Dv ≠ D", dataclasses.replace(SPEC, value_dim=32)),
    Probe("softcap", SPEC.replace(softcap=30.0)),
    Probe("ALiBi", SPEC.replace(alibi=alibi_slopes(4))),
    Probe("boolean mask", workload=_with("mask")),
    Probe("additive bias", workload=_with("bias")),
    Probe("key lengths", workload=_with("kv_lengths")),
    Probe("positions", CAUSAL, _with("q_positions", "kv_positions")),
    Probe("learned sinks", workload=_with("sink_logits")),
    Probe("dropout", SPEC.replace(dropout=0.1)),
    Probe("gradients", workload=_GRAD),
    Probe("gradient of lse", workload=dataclasses.replace(_GRAD, needs_lse_grad=True)),
    Probe(
        "gradient of bias",
        workload=dataclasses.replace(_GRAD, operands=frozenset({"bias", "bias_grad"})),
    ),
    Probe("packed (varlen)", workload=dataclasses.replace(WORKLOAD, packed=True)),
    Probe("strided heads", workload=dataclasses.replace(WORKLOAD, strided_head=True)),
    *(
        Probe(dtype_name(dtype), workload=dataclasses.replace(WORKLOAD, dtype=dtype))
        for dtype in FLOATS
    ),
)


def capabilities(device: str = "cpu") -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Backend -> capability -> refusals on this machine; no refusals is a yes."""
    machine = detect()
    calls = [(p.name, p.spec, dataclasses.replace(p.workload, device=device)) for p in PROBES]
    return {
        backend.name: {name: backend.refuse(spec, call, machine) for name, spec, call in calls}
        for backend in BACKENDS
    }
