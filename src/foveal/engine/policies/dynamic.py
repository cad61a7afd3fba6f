"""The dynamic window: of each layer and head as long as its attention is, or as time allows."""

from dataclasses import dataclass
from typing import ClassVar

from foveal.core.errors import ArgumentError
from foveal.engine.policies.windowed import paged
from foveal.engine.policy import Policy, Storage
from foveal.kv.cache import ResumableCache, Window
from foveal.kv.dynamic import DynamicCache
from foveal.kv.formats import Scales, parse_format
from foveal.kv.pace import Target

_MINIMUM_OF_WINDOW = 8
"""Where nobody says, no reach is shorter than one part of the window in so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dynamic(Policy):
    """The first tokens and, for every layer and KV head, the last ones that get its attention.

    The window of the stream is the longest reach. With `latency` or `held` it adapts at run time:
    how long it is then depends on the machine, and so do results.
    """

    name: ClassVar[str] = "dynamic"
    keeps: ClassVar[str] = (
        "the first tokens (sinks) and, for each layer and head, the last ones that together get "
        "most of its attention, as far as the window"
    )
    costs: ClassVar[str] = (
        "(sinks + window) keys and values at most, of which pages that no head reaches any more "
        "are given up; all heads look at all of it, piece by piece, on every 16th step"
    )
    sinks: ClassVar[int] = 4

    minimum: int | None = None
    """Tokens of the shortest reach; None for an eighth of the window."""
    mass: float = 0.9
    """The share of a head's attention, as observed, that its reach is to hold. With 0.9 the bundled
    model foresees as well as with the whole window, at 0.4 to 0.7 of it in the mean; it gives the
    far end of any window some hundredths, so 0.99 narrows nothing."""
    latency: float | None = None
    """Seconds that a step may take in the median: a longer window is narrowed."""
    held: int | None = None
    """Bytes that pages in use may take, as a target: the window is narrowed when they take more."""

    def make(self, window: Window, storage: Storage) -> DynamicCache:
        """See `Policy.make`. Pages are stored token by token, each in the stream's format."""
        if parse_format(storage.format).scales is Scales.CHANNEL:
            accepted = f"a format with scales per token, with policy {self.name!r}"
            raise ArgumentError("kv", repr(storage.format), accepted)
        least = max(1, window.sinks, window.size // _MINIMUM_OF_WINDOW)
        target = None
        if self.latency is not None or self.held is not None:
            target = Target(step_s=self.latency, used_bytes=self.held)
        return DynamicCache(
            paged(window, storage),
            minimum=least if self.minimum is None else self.minimum,
            mass=self.mass,
            target=target,
        )

    def after_step(self, cache: ResumableCache, num_tokens: int, seconds: float) -> None:
        """See `Policy.after_step`."""
        assert isinstance(cache, DynamicCache)
        cache.after_step(num_tokens, seconds)
