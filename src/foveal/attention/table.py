"""The tuning table: which backend took how long here, filed by bucket of workloads.

A bucket holds the calls that should take alike. From the spec it keeps what costs time (heads,
sizes, mask; of softcap, dropout and ALiBi only that they are there; not the scale). From the
workload it keeps batch and lengths rounded up to a power of two, which of the lengths is larger
(a kernel's own causal mask may serve only where they are equal), dtype, device, packing,
gradients and the tensors beside q, k, v. A bucket's entry comes from one shape in one interleaved
run, so its times can be compared; tuning another shape of the bucket replaces the entry.

The file belongs to one machine, thread count, PyTorch and foveal version (`hardware.store`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload
from foveal.core.log import warn_once
from foveal.hardware import store
from foveal.hardware.profile import Machine

FORMAT = 1
REMEDY = "`foveal tune` makes a new one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """How long one backend took for one bucket."""

    median_s: float
    spread_s: float
    """Distance between the quartiles."""
    num_samples: int
    disturbed: bool
    """Other processes kept the machine busy, so that the time is less certain."""
    date: str
    """YYYY-MM-DD."""
    shape: str
    """The workload that was run, which stands for its bucket."""


Table = Mapping[str, Mapping[str, Measured]]
"""Bucket key -> backend name -> time."""


def bucket_key(spec: AttentionSpec, workload: Workload) -> str:
    """The text under which a call's bucket is filed."""
    q_len, kv_len = workload.q_len, workload.kv_len
    relation = "=" if q_len == kv_len else "<" if q_len < kv_len else ">"
    return _bucket_key(spec, bucket_of(workload), relation)


@lru_cache(maxsize=4096)
def _bucket_key(spec: AttentionSpec, bucket: Workload, relation: str) -> str:
    kept = spec.replace(
        scale=None,
        softcap=spec.softcap and 1.0,
        dropout=0.5 if spec.dropout else 0.0,
    )
    return f"{kept} @ {bucket}, Lq {relation} Lk"


def bucket_of(workload: Workload) -> Workload:
    """The workload at the upper edge of a workload's bucket."""
    return dataclasses.replace(
        workload,
        batch=_round_up(workload.batch),
        q_len=_round_up(workload.q_len),
        kv_len=_round_up(workload.kv_len),
        needs_lse=False,
        needs_lse_grad=False,
        operands=workload.operands - {"sink_logits"},
        strided_head=False,
    )


def _round_up(length: int) -> int:
    """The next power of two; 0 stays 0."""
    return 1 << (length - 1).bit_length() if length else 0


def load_table(machine: Machine) -> Table:
    """This machine's table; empty if there is none that can be trusted."""
    return _load_table(machine, store.stamp())


@lru_cache(maxsize=8)
def _load_table(machine: Machine, stamp: object) -> Table:
    name = store.file_name("tuning", machine)
    content = store.load(name, FORMAT, REMEDY)
    if content is None:
        return {}
    try:
        return {
            key: {backend: Measured(**time) for backend, time in times.items()}
            for key, times in content["buckets"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        warn_once(f"{name} is not a tuning table and is ignored ({error!r}); {REMEDY}")
        return {}


def save_table(machine: Machine, new: Table) -> None:
    """Merge `new` buckets into this machine's table, replacing buckets of the same key."""
    merged = {**load_table(machine), **new}
    buckets = {
        key: {backend: dataclasses.asdict(time) for backend, time in sorted(times.items())}
        for key, times in sorted(merged.items())
    }
    store.save(store.file_name("tuning", machine), FORMAT, {"buckets": buckets})
