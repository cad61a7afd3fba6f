"""Timing that survives a busy machine: candidates in turn, samples judged by who else was busy.

Two computations timed one after the other meet two different machines. `interleave` runs them in
turn, in a new random order each round, so that whatever disturbs meets all alike. Beside each
sample stands the share of the machine's processor time that other processes took meanwhile;
samples above `DISTURBED_SHARE` are kept but not counted, unless too few remain.

The system counts processor time in ticks of 10 ms, so the share is taken over stretches of at
least `STRETCH_S`; short samples of one stretch have one share.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from foveal.core.errors import ArgumentError
from foveal.hardware.detect import allowed_cpus

DISTURBED_SHARE = 0.12
"""Above this share of the machine's processor time, others are taken to have slowed us down."""
FEWEST_CLEAN = 3
"""Undisturbed samples that a median needs."""
STRETCH_S = 0.2
"""Long enough for the system's 10 ms ticks to give a share to within a few percent."""
WARM_UP_CALLS = 2
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")
"""States of a core that do not count as busy; guests' time is in `user` and `nice` already."""

Candidates = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """All samples of one candidate, in the order in which they were taken."""

    seconds: tuple[float, ...]
    others: tuple[float, ...]
    """For each sample, the share (0 to 1) of the machine's processor time that other processes
    took meanwhile."""

    def __post_init__(self) -> None:
        assert len(self.seconds) == len(self.others) >= 1

    @property
    def clean(self) -> tuple[float, ...]:
        """Seconds of the samples that nobody disturbed."""
        pairs = zip(self.seconds, self.others, strict=True)
        return tuple(s for s, share in pairs if share <= DISTURBED_SHARE)

    @property
    def num_clean(self) -> int:
        """How many samples nobody disturbed."""
        return len(self.clean)

    @property
    def disturbed(self) -> bool:
        """Too few samples are clean, so that the figures below rest on all of them."""
        return self.num_clean < FEWEST_CLEAN

    @property
    def counted(self) -> tuple[float, ...]:
        """Seconds of the samples that the figures below rest on."""
        return self.seconds if self.disturbed else self.clean

    @property
    def median_s(self) -> float:
        """Median of the counted samples."""
        return statistics.median(self.counted)

    @property
    def best_s(self) -> float:
        """The fastest counted sample."""
        return min(self.counted)

    @property
    def spread_s(self) -> float:
        """Distance between the quartiles of the counted samples; 0 if there is only one."""
        if len(self.counted) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.counted, n=4, method="inclusive")
        return high - low


def interleave(
    candidates: Candidates,
    *,
    budget_s: float,
    min_samples: int = 5,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Time each candidate: warm up, then run all in turn, round after round.

    Stops after `budget_s` seconds, warm-up included, but not before each candidate has
    `min_samples`: slow candidates can overrun the budget. On "cuda" each sample ends when the
    device has finished. `on_round` is called after each round, for a progress bar.
    """
    if min_samples < 1:
        raise ArgumentError("min_samples", min_samples, "1 or more")
    start = time.perf_counter()
    for run in list(candidates.values()) * WARM_UP_CALLS:
        time_one(run, device)
    watch = Neighbours()
    taken: list[tuple[str, float]] = []
    shares: list[float] = []
    num_rounds = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while num_rounds < min_samples or time.perf_counter() - start < budget_s:
            for name in random.sample(list(candidates), len(candidates)):
                taken.append((name, time_one(candidates[name], device)))
                if watch.elapsed_s >= STRETCH_S:
                    shares += [watch.share()] * (len(taken) - len(shares))
            num_rounds += 1
            on_round()
    finally:
        if collecting:
            gc.enable()
    watch.wait_for(STRETCH_S)
    shares += [watch.share()] * (len(taken) - len(shares))
    return {name: _samples_of(name, taken, shares) for name in candidates}


def _samples_of(name: str, taken: list[tuple[str, float]], shares: list[float]) -> Samples:
    own = [(s, share) for (who, s), share in zip(taken, shares, strict=True) if who == name]
    return Samples(seconds=tuple(s for s, _ in own), others=tuple(share for _, share in own))


def time_one(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, on "cuda" until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Neighbours:
    """Watches how much processor time others take on the cores that we may use."""

    def __init__(self) -> None:
        self._cpus = allowed_cpus()
        self._mark()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the last share was taken."""
        return time.perf_counter() - self._start

    def share(self) -> float:
        """Share, 0 to 1, of our cores' time that others took since the last call."""
        elapsed, busy, own = self.elapsed_s, self._busy, self._own
        self._mark()
        others = (self._busy - busy) - (self._own - own)
        return min(1.0, max(0.0, others / (elapsed * len(self._cpus))))

    def wait_for(self, seconds: float) -> None:
        """Sleep until the stretch is long enough to be judged."""
        time.sleep(max(0.0, seconds - self.elapsed_s))

    def _mark(self) -> None:
        self._start = time.perf_counter()
        self._own = time.process_time()
        cores = psutil.cpu_times(percpu=True)
        self._busy: float = sum(
            seconds
            for i in self._cpus
            for state, seconds in cores[i]._asdict().items()
            if state not in NOT_BUSY
        )
