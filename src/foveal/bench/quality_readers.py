"""Readers: the candidates at work. Each takes in a text and gives the logits after every token.

`StreamReader` is a `Session`, the very thing that is sold; full attention is a session whose
window no passage fills. `WindowReader` computes the last tokens afresh, without any memory: for
each stride of s predictions one dense forward pass over the W tokens that end there, so that a
prediction is made from W - s + 1 to W tokens. With a stride of 1 that is the textbook's sliding
window with re-computation; the default stride costs a few percent of the window instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from foveal.bench.quality import FULL, RECOMPUTE, Candidate
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import find_policy
from foveal.engine.session import Session

STRIDES = 8
"""Of a recomputed window."""
LARGEST_BATCH_TOKENS = 2048
"""Computed afresh at once."""


class Reader(Protocol):
    """Reads one text at a time."""

    @property
    def candidate(self) -> Candidate:
        """What it is, sinks and window as it has them."""

    @property
    def held_bytes(self) -> int:
        """Keys and values that it holds now, with all that is kept beside them."""

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in tokens; gives the logits after each, [n, V]."""

    def reset(self) -> None:
        """Forget everything."""

    def close(self) -> None:
        """Give back what it holds."""


def open_reader(llm: LLM, candidate: Candidate, begin: Sequence[int]) -> Reader:
    """The reader of a candidate. Raises what `Session` raises for one that cannot be."""
    if candidate.policy == RECOMPUTE:
        return WindowReader(llm, candidate, begin)
    return StreamReader(llm, candidate)


class StreamReader:
    """A session."""

    def __init__(self, llm: LLM, candidate: Candidate) -> None:
        """The policy says which window makes the most of the candidate's tokens."""
        full = candidate.policy == FULL
        policy = find_policy("window" if full else candidate.policy)
        sinks = candidate.sinks
        self.session = Session(
            llm,
            policy=policy,
            window=policy.default_window(candidate.span, sinks),
            sinks=sinks,
            kv=candidate.kv,
        )
        config = self.session.config
        kept = "" if full else f"{config.sinks} + {config.window}"
        self.candidate = replace(candidate, kept=kept)

    @property
    def held_bytes(self) -> int:
        """As the session's cache counts them."""
        return self.session.stats.cache.used_bytes

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Reader.read`."""
        return self.session.logits(ids)

    def reset(self) -> None:
        """See `Reader.reset`."""
        self.session.reset()

    def close(self) -> None:
        """See `Reader.close`."""
        self.session.close()


class WindowReader:
    """The last `span` tokens computed afresh, opened by the begin token where there is one."""

    held_bytes = 0

    def __init__(
        self, llm: LLM, candidate: Candidate, begin: Sequence[int], stride: int | None = None
    ) -> None:
        """`begin` counts among the tokens of the window."""
        self.candidate = candidate
        self._model, self._backend = llm.model, llm.backend
        self._begin = list(begin)
        self._stride = stride or max(1, candidate.span // STRIDES)
        self._past: list[int] = []
        """Everything within reach of the next prediction, or of the first ones."""
        self._full = False
        """Whether something has been forgotten."""

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Reader.read`."""
        size = self.candidate.span
        parts = []
        start = 0
        if not self._full:
            start = min(len(ids), max(0, size - len(self._past)))
            self._past += ids[:start]
            parts.append(self._forward([self._past])[0, len(self._past) - start :])
        if start < len(ids):
            self._full = True
            parts.append(self._slide(ids[start:]))
        return torch.cat(parts)

    def reset(self) -> None:
        """See `Reader.reset`."""
        self._past, self._full = [], False

    def close(self) -> None:
        """It holds nothing."""

    def _slide(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `ids`, all of which come once the window is full."""
        inner = self.candidate.span - len(self._begin)
        text = [*self._past, *ids]
        offset = len(self._past)
        self._past = text[-self.candidate.span :]
        ends = [*range(self._stride, len(ids), self._stride), len(ids)]
        windows = [[*self._begin, *text[offset + end - inner : offset + end]] for end in ends]
        at_once = max(1, LARGEST_BATCH_TOKENS // self.candidate.span)
        sizes = [end - before for before, end in zip([0, *ends], ends, strict=False)]
        parts = []
        for at in range(0, len(ends), at_once):
            logits = self._forward(windows[at : at + at_once])
            parts += [row[-n:] for row, n in zip(logits, sizes[at : at + at_once], strict=True)]
        return torch.cat(parts)

    def _forward(self, windows: list[list[int]]) -> torch.Tensor:
        given = torch.tensor(windows, device=self._model.device)
        logits: torch.Tensor = self._model(given, backend=self._backend)
        return logits
