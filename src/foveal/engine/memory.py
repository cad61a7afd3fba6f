"""`Memory`: what a session remembers, as priced, made, watched over, and changed while it runs.

It owns the cache that the policy made and, where a tolerance is given, the gate beside it. Changing
the storage format or the window pours the old cache into a new one; nothing that the new one can
see is lost but what its format rounds.
"""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from foveal.core.errors import ArgumentError, BudgetExceeded, DriftExceeded
from foveal.core.log import logger
from foveal.engine.budget import Stream
from foveal.engine.gate import Drift, Gate, finer
from foveal.kv.cache import ResumableCache
from foveal.kv.pour import Pourable, pour


class Memory:
    """The cache of one stream."""

    def __init__(self, stream: Stream, cap: int | None) -> None:
        """`cap` is the most bytes that `stream` may take, now (it has been checked) and later."""
        self.stream, self.need, self._cap = stream, stream.need(), cap
        self.cache = stream.make()
        self.gate = self._new_gate()
        self._drift: tuple[float, float] | None = None
        """Mean and largest divergence of a look that has just ended."""

    @torch.inference_mode()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Take in ids [1, T], at most a step's; the logits [T, V] after each."""
        self.act()
        started = perf_counter()
        if self.gate is not None:
            self.gate.begin(pourable(self.cache))
        model, backend = self.stream.model, self.stream.backend
        logits: torch.Tensor = model(ids, cache=self.cache, backend=backend)[0]
        if self.gate is not None:
            self._drift = self.gate.follow(ids, logits) or self._drift
        self.stream.policy.after_step(self.cache, ids.shape[1], perf_counter() - started)
        return logits

    def act(self) -> None:
        """Do what the tolerance asks for, once the results of a step are in safe hands.

        Raises `DriftExceeded` to stop, and `BudgetExceeded` if a more precise format would not
        fit; the stream may go on as it is either way.
        """
        if self._drift is None or self.gate is None:
            return
        (mean, largest), self._drift = self._drift, None
        tolerance, kv = self.gate.tolerance, self.stream.storage.format
        look = Drift(
            position=self.cache.length, kv=kv, kl_mean=mean, kl_max=largest, outcome="kept"
        )
        if mean <= tolerance.kl:
            self.gate.record(look)
            return
        what = (
            f"at token {look.position:,} the stream in {kv} is {mean:.3g} nats from its reference "
            f"(at most {largest:.3g}); the tolerance is {tolerance.kl:g}"
        )
        if tolerance.action == "stop":
            self.gate.record(replace(look, outcome="stopped"))
            raise DriftExceeded(what, mean, largest)
        self._refine(look, what)

    def change(self, kv: str | None = None, window: int | None = None) -> None:
        """Go on in another storage format, or with a smaller window.

        While the one cache is poured into the other, both are there. Raises `BudgetExceeded` if
        the cap does not allow that, and `ArgumentError` for a window that reaches further back
        than what is kept, and where the policy's cache cannot be poured.
        """
        source, size = pourable(self.cache), self.stream.window.size if window is None else window
        planned = self._planned(kv or self.stream.storage.format, size, beside=self.cache.nbytes)
        fresh = pourable(planned.make())
        pour(source, fresh, planned.storage.step_tokens)
        self.stream, self.need, self.cache = planned, planned.need(), fresh
        looks, self.gate = self.gate, self._new_gate()
        if looks is not None and self.gate is not None:
            self.gate.inherit(looks)

    def facts(self) -> dict[str, Any] | None:
        """What is to be saved beside the tensors, as JSON can hold it."""
        return None if self.gate is None else self.gate.facts()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by name."""
        parts = {"cache": self.cache.state()}
        if self.gate is not None:
            parts["reference"] = self.gate.tensors()
        return {f"{part}.{name}": t for part, held in parts.items() for name, t in held.items()}

    def restore(self, facts: dict[str, Any] | None, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold what `facts` and `tensors` were taken of."""
        parts: dict[str, dict[str, torch.Tensor]] = {"cache": {}, "reference": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.cache.restore(parts["cache"])
        if self.gate is not None and facts is not None:
            self.gate.restore(facts, parts["reference"])

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self.cache.reset()
        self._drift = None
        if self.gate is not None:
            self.gate.restart()

    def close(self) -> None:
        """Give back files and threads."""
        self.stream.policy.close(self.cache)

    def _refine(self, look: Drift, what: str) -> None:
        """Go on in the next more precise format, from what the reference holds."""
        gate, storage = self.gate, self.stream.storage
        assert gate is not None
        format = finer(storage.format, storage.dtype)
        try:
            planned = self._planned(format, self.stream.window.size)
        except BudgetExceeded:
            gate.record(replace(look, outcome="no room"))
            raise
        gate.record(replace(look, outcome=f"refined to {format}"))
        logger().warning("%s: what follows is kept in %s", what, format)
        exact = gate.reference
        assert exact is not None
        self.stream, self.need = planned, planned.need()
        if planned.rounds:
            del self.cache  # before the new one is made: the reference holds everything
            self.cache = fresh = pourable(planned.make())
            pour(exact, fresh, storage.step_tokens)
        else:
            self.cache, gate.reference = exact, None

    def _planned(self, kv: str, window: int, beside: int = 0) -> Stream:
        """The stream in another format or window, within the cap less the bytes `beside`."""
        now = self.stream
        planned = replace(
            now,
            window=now.policy.window(window, now.window.sinks),
            storage=replace(now.storage, format=kv),
        )
        cap = None if self._cap is None else self._cap - beside
        return planned.within(cap, now.storage.step_tokens)

    def _new_gate(self) -> Gate | None:
        """None without a tolerance; one that never looks where nothing is rounded."""
        stream = self.stream
        if stream.tolerance is None:
            return None
        pourable(self.cache)
        reference = pourable(stream.reference.make()) if stream.rounds else None
        return Gate(
            stream.model, stream.tolerance, reference, stream.storage.step_tokens, stream.backend
        )


def pourable(cache: ResumableCache) -> Pourable:
    """The cache, if it can be poured. Raises `ArgumentError`."""
    if not isinstance(cache, Pourable):
        accepted = "one whose cache can be poured into another format: sinks, window"
        raise ArgumentError("policy", type(cache).__name__, accepted)
    return cache
