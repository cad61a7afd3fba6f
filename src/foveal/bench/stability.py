"""`foveal bench stability`: every backend through every trial, held against float64.

Our own backends promise every line: as exact as the rule of `accuracy` demands, exactly 0 (with a
log-sum-exp of minus infinity) where a row sees nothing, and nothing of what a mask hides. `fused`
and other people's kernels promise nothing and are reported as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from foveal.attention.api import attend
from foveal.bench.accuracy import BACKWARD_FACTOR, compare, plain, score_rounding
from foveal.bench.record import Accuracy
from foveal.bench.trials import BACKWARD, FORWARD, Trial
from foveal.core.dtypes import dtype_name
from foveal.core.errors import Unsupported

PROMISING = ("unfused", "flash")
"""Backends whose every line must hold."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 0

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How one backend did in one trial."""

    dtype: str
    trial: str
    direction: str
    """"forward" or "backward"."""
    backend: str
    accuracy: Accuracy | None
    """None if the backend refused."""
    note: str
    """Why it refused, or what is wrong besides the error; empty if nothing."""

    @property
    def holds(self) -> bool:
        """As exact as it must be, and nothing else wrong."""
        return self.accuracy is not None and self.accuracy.holds and not self.note

    @property
    def breaks_promise(self) -> bool:
        """Does not hold, and should."""
        return self.backend in PROMISING and not self.holds


def verdicts(backends: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Verdict]:
    """Every backend in every trial: by dtype, then trial, forward before backward."""
    for dtype in dtypes:
        for name, make in FORWARD.items():
            made = make(torch.Generator().manual_seed(SEED), dtype)
            directions = {"forward": _forward, "backward": _backward}
            for direction in directions if name in BACKWARD else ("forward",):
                judge = directions[direction](made)
                for backend in backends:
                    accuracy, note = _tried(judge, backend)
                    yield Verdict(
                        dtype=dtype_name(dtype),
                        trial=name,
                        direction=direction,
                        backend=backend,
                        accuracy=accuracy,
                        note=note,
                    )


Judge = Callable[[str], tuple[Accuracy, str]]


def _tried(judge: Judge, backend: str) -> tuple[Accuracy | None, str]:
    try:
        return judge(backend)
    except Unsupported as refusal:
        return None, "refuses: " + "; ".join(refusal.reasons[backend])


def _forward(trial: Trial) -> Judge:
    """Judges a backend's output: judged rows against float64, blind rows exactly."""
    seen, judged, blind = trial.seen, trial.judged, trial.blind
    exact = plain(*_double(trial), trial.spec, seen)[judged]
    plainly = plain(trial.q, trial.k, trial.v, trial.spec, seen)[judged]
    slack = score_rounding(trial.q, trial.k, trial.v, trial.spec, seen)
    k, v = trial.poisoned

    def judge(backend: str) -> tuple[Accuracy, str]:
        out, lse = attend(
            trial.q, k, v, trial.spec, backend=backend, return_lse=True, **trial.given
        )
        accuracy = compare(out[judged], plainly, exact, out.dtype, slack=slack)
        exactly = bool((out[blind] == 0).all() and (lse[blind] == -torch.inf).all())
        return accuracy, "" if exactly else "a row that sees nothing is not 0 and -inf"

    return judge


def _backward(trial: Trial) -> Judge:
    """Judges a backend's gradients of q, k and v, each relative to its largest true value."""
    seen = trial.seen
    rng = torch.Generator().manual_seed(SEED)
    d_out = torch.randn(trial.q.shape, generator=rng).to(trial.q.dtype)

    def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(q, k, v, trial.spec, seen)

    truth = _gradients(plainly, _double(trial), d_out.double())
    sizes = [gradient.abs().max() for gradient in truth]
    exact = _joined(truth, sizes)
    baseline = _joined(_gradients(plainly, (trial.q, trial.k, trial.v), d_out), sizes)

    def judge(backend: str) -> tuple[Accuracy, str]:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, trial.spec, backend=backend, **trial.given)

        ours = _joined(_gradients(call, (trial.q, *trial.poisoned), d_out), sizes)
        return compare(ours, baseline, exact, d_out.dtype, factor=BACKWARD_FACTOR), ""

    return judge


def _gradients(
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: Triple,
    d_out: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(call(q, k, v), (q, k, v), d_out)


def _joined(gradients: Sequence[torch.Tensor], sizes: Sequence[torch.Tensor]) -> torch.Tensor:
    """One float64 vector of all gradients, each divided by its size."""
    pairs = zip(gradients, sizes, strict=True)
    return torch.cat([(gradient.double() / size).flatten() for gradient, size in pairs])


def _double(trial: Trial) -> Triple:
    return trial.q.double(), trial.k.double(), trial.v.double()
