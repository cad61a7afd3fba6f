"""The gate of a stream whose cache rounds: how far it drifts from a reference, measured as it runs.

Every so many tokens what the stream holds is poured into a cache of the model's own precision, the
reference, which then reads along. Once its window holds only keys that it computed itself, the
next-token distributions of the two are compared over a span of tokens:

    KL = sum over tokens t of p(t) (log p(t) - log q(t)), p the reference's, q the stream's, in nats

If the mean over the span exceeds the tolerance, the session goes on in a more precise format, or
stops. What lies deeper than one layer may still remember the rounding from before the window, by
way of the first keys that the reference took over; the divergence counts what has come since.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError
from foveal.kv.formats import parse_format
from foveal.kv.pour import Pourable, pour
from foveal.models.decoder import Decoder

_HISTORY = 64
"""Looks that are remembered."""

_ACTIONS = ("refine", "stop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a stream may drift from its reference, and what happens beyond that."""

    kl: float
    """Mean divergence over a span, in nats."""
    every: int = 4096
    """Tokens from the end of one look to the beginning of the next."""
    span: int = 64
    """Tokens over which is measured, after a window's worth of reading along."""
    action: Literal["refine", "stop"] = "refine"
    """Go on in the next more precise format, or raise `DriftExceeded`."""

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ArgumentError("tolerance kl", self.kl, "a number of nats above 0")
        for name in ("every", "span"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"tolerance {name}", getattr(self, name), "1 token or more")
        if self.action not in _ACTIONS:
            raise ArgumentError("tolerance action", repr(self.action), " or ".join(_ACTIONS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """What one look has found."""

    position: int
    """Tokens of the stream at its end."""
    kv: str
    """The storage format that was looked at."""
    kl_mean: float
    kl_max: float
    """In nats, over the span."""
    outcome: str
    """What came of it: kept, refined, stopped, or no room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftStats:
    """All looks so far."""

    num_looks: int
    looks: tuple[Drift, ...]
    """The last ones, at most 64."""


class Gate:
    """Looks at one stream."""

    def __init__(
        self,
        model: Decoder,
        tolerance: Tolerance,
        reference: Pourable | None,
        chunk: int,
        backend: str,
    ) -> None:
        """`reference` is a cache like the stream's, in the model's dtype; None where the stream's
        rounds nothing: then there is nothing to look for. It is filled in steps of `chunk`."""
        self.tolerance = tolerance
        self.reference = reference
        self._model, self._backend, self._chunk = model, backend, chunk
        self._looks: deque[Drift] = deque(maxlen=_HISTORY)
        self._num_looks = 0
        self._waited = 0
        """Tokens since the last look."""
        self._followed: int | None = None
        """Tokens that the reference has read in this look; None between looks."""
        self._num_measured, self._sum, self._largest = 0, 0.0, 0.0

    @property
    def stats(self) -> DriftStats:
        """What has been found so far."""
        return DriftStats(num_looks=self._num_looks, looks=tuple(self._looks))

    def begin(self, cache: Pourable) -> None:
        """Called before each step: begin to look, if it is time."""
        due = self._followed is None and self._waited >= self.tolerance.every
        if due and self.reference is not None:
            pour(cache, self.reference, self._chunk)
            self._followed = 0

    def follow(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[float, float] | None:
        """Read ids [1, T] along, for which the stream has these logits [T, V]; the mean and the
        largest divergence, in nats, when a look ends with them."""
        num = ids.shape[1]
        if self._followed is None or self.reference is None:
            self._waited += num
            return None
        assert self.reference.window is not None
        hidden = self._model.hidden(ids, cache=self.reference, backend=self._backend)[0]
        first = max(0, self.reference.window.size - self._followed)
        seen = slice(first, first + self.tolerance.span - self._num_measured)
        if first < num:
            self._measure(self._model.logits(hidden[seen]), logits[seen])
        self._followed += num
        if self._num_measured < self.tolerance.span:
            return None
        found = self._sum / self._num_measured, self._largest
        self._rest()
        return found

    def record(self, look: Drift) -> None:
        """Remember a look."""
        self._looks.append(look)
        self._num_looks += 1

    def restart(self) -> None:
        """Forget everything but the settings."""
        self._looks.clear()
        self._num_looks = 0
        self._rest()

    def inherit(self, other: "Gate") -> None:
        """Take over the looks of a gate that this one replaces."""
        self._looks, self._num_looks = other._looks, other._num_looks

    def facts(self) -> dict[str, Any]:
        """Counts and looks, as JSON can hold them."""
        return {
            "num_looks": self._num_looks,
            "looks": [asdict(look) for look in self._looks],
            "under_way": [
                self._waited,
                self._followed,
                self._num_measured,
                self._sum,
                self._largest,
            ],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the reference holds, of a look under way."""
        if self._followed is None or self.reference is None:
            return {}
        return self.reference.state()

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `facts` and `tensors` told, in the middle of a look, too."""
        self._num_looks = facts["num_looks"]
        self._looks.extend(Drift(**look) for look in facts["looks"])
        self._waited, self._followed, self._num_measured, self._sum, self._largest = facts[
            "under_way"
        ]
        if self._followed is not None and self.reference is not None:
            self.reference.restore(tensors)

    def _rest(self) -> None:
        """Wait for the next look. What the reference holds stays until then."""
        self._waited, self._followed = 0, None
        self._num_measured, self._sum, self._largest = 0, 0.0, 0.0

    def _measure(self, exact: torch.Tensor, logits: torch.Tensor) -> None:
        p, q = (x.double().log_softmax(-1) for x in (exact, logits))
        kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        self._num_measured += len(kl)
        self._sum += float(kl.sum())
        self._largest = max(self._largest, float(kl.max()))


def rounds(format: str, dtype: torch.dtype) -> bool:
    """Whether storing in this format changes numbers of this dtype."""
    stored = parse_format(format)
    return stored.quantised or torch.promote_types(stored.dtype, dtype) != stored.dtype


def finer(format: str, dtype: torch.dtype) -> str:
    """The next more precise format, for a model that computes in `dtype`."""
    stored = parse_format(format)
    if stored.bits == 4:
        return format.replace("int4", "int8")
    if stored.bits == 8 and dtype.itemsize > 2:
        return "bfloat16"
    return dtype_name(dtype)
