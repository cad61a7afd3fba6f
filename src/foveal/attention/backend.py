"""Who computes: the interface that every backend implements, and nothing else.

A backend refuses with reasons, says what memory it would take and what time it should take, and
runs. It never falls back to another way of computing without saying so: what it cannot do itself,
it refuses.
"""

from typing import Protocol

import torch

from foveal.attention.operands import Operands
from foveal.attention.packed import Bounds, Result
from foveal.attention.spec import AttentionSpec
from foveal.attention.workload import Workload
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Estimate, Peaks


class Backend(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """What the user types as `backend=`."""

    def refuse(self, spec: AttentionSpec, workload: Workload, machine: Machine) -> tuple[str, ...]:
        """Every reason why this backend cannot compute the call; empty if it is willing."""

    def kernel(self, spec: AttentionSpec, workload: Workload) -> str:
        """Which of the backend's kernels would compute the call, for people to read; where it is
        not the one they would expect, why."""

    def workspace_bytes(self, spec: AttentionSpec, workload: Workload) -> int:
        """Bytes of temporaries at the peak of a forward pass, beyond inputs and outputs."""

    def estimate(self, spec: AttentionSpec, workload: Workload, peaks: Peaks) -> Estimate:
        """Time that the call should take on a machine with these peaks, with its formula."""

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
    ) -> Result:
        """Compute `out` [B, H, Lq, Dv] in q's dtype and `lse` [B, H, Lq], the natural log-sum-exp
        of the visible scores, in float32 (float64 for float64 inputs).

        Inputs are [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] with any strides and
        no empty dimension (the door answers those). A row in which nothing is visible gives
        zeros and -inf. Differentiable with respect to q, k, v
        (and the bias and through lse where `refuse` accepted that). A backend that refuses
        `needs_lse` gives an lse of NaN. `operands.sink_logits` is not the backend's concern: the
        door merges it into the result.
        """

    def run_packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        operands: Operands,
        bounds: Bounds,
    ) -> Result:
        """As `run`, for sequences packed one after another: [1, H, tokens, D], each query seeing
        keys of its own sequence only. A sequence may have no queries or no keys. `OneByOne` does it
        by one `run` for each."""
