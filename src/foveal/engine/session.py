"""`Session`: one stream of tokens without end through a model, in memory of a fixed size.

    session = Session(LLM(), window=508, memory=200 * 2**20)
    bits = session.feed(text)               # the surprise of each token
    print(session.generate().text)          # what the model would go on with
    session.save("stream.state")            # and Session.load goes on, to the bit

The policy says what is remembered. Tokens are computed in steps of at most `chunk`; how a text
falls into steps changes results by rounding only, because every query sees just what the policy
promises, in a step of any size; but where a step shares what it recalls (`Policy.shared_steps`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
import torch.nn.functional as F

from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError, ConfigError, RequestError
from foveal.engine import state
from foveal.engine.answer import Answer
from foveal.engine.budget import Need, Stream
from foveal.engine.gate import DriftStats, Tolerance
from foveal.engine.llm import LLM
from foveal.engine.memory import Memory
from foveal.engine.policies.catalogue import find_policy, policy_facts, policy_of
from foveal.engine.policy import Policy, Storage
from foveal.engine.request import Completion, Piece, Request, SamplingParams, check_ids
from foveal.engine.sampler import Draw, report, sample
from foveal.kv.cache import CacheStats
from foveal.models.decoder import Decoder
from foveal.models.fingerprint import fingerprint
from foveal.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How a session remembers; what a saved state is taken up with."""

    policy: Policy
    window: int
    """Last tokens that are kept, a query's own included."""
    sinks: int
    """First tokens that are kept."""
    kv: str
    """Storage format of keys and values."""
    memory: int | None
    """Bytes that cache and step may take, beside the weights."""
    chunk: int
    """Tokens of a step at most."""
    tolerance: Tolerance | None = None
    """How far the cache's rounding may lead the stream astray."""

    def settings(self) -> dict[str, Any]:
        """The arguments that make such a session."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def facts(self) -> dict[str, Any]:
        """The same, as JSON can hold it."""
        tolerance = None if self.tolerance is None else asdict(self.tolerance)
        return {**self.settings(), "policy": policy_facts(self.policy), "tolerance": tolerance}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "SessionConfig":
        """The settings that `facts` told."""
        tolerance = facts["tolerance"] and Tolerance(**facts["tolerance"])
        return cls(**{**facts, "policy": policy_of(facts["policy"]), "tolerance": tolerance})


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionStats:
    """A session at one moment."""

    num_tokens: int
    """Taken in so far, the begin token and what was generated included."""
    num_forgotten: int
    bits_per_token: float | None
    """Mean surprise of the tokens given to `feed`; None before the first that was predicted."""
    cache: CacheStats
    need: Need
    drift: DriftStats | None
    """What the tolerance's looks have found; None without a tolerance."""

    @property
    def occupancy(self) -> float:
        """Share of the cache's bytes that hold something."""
        return self.cache.used_bytes / self.cache.allocated_bytes


class Session:
    """A stream on one model. Not for use by several threads at once."""

    def __init__(
        self,
        model: Decoder | LLM,
        *,
        window: int | None = None,
        sinks: int | None = None,
        policy: str | Policy = "sinks",
        memory: int | None = None,
        kv: str | None = None,
        chunk: int | None = None,
        tolerance: float | Tolerance | None = None,
    ) -> None:
        """An empty session. A `Decoder` takes and gives token ids only, an `LLM` text, too.

        `policy` is one of `engine/policies/`, or the name of one for its default settings.
        `window` None is what the model's context leaves beside the sinks and what else the policy
        shows; `sinks` None is what the policy says; `kv` None is the model's dtype; `chunk` None is
        the largest of 256, 128, ... that fits. `memory` caps the bytes of cache and step beside the
        weights: the cache is counted exactly, a step by estimate (`engine/budget.py`).
        `tolerance` (a number of nats stands for the other defaults of `Tolerance`) is for a `kv`
        that rounds: now and then the stream is measured against one in the model's precision
        (`engine/gate.py`).

        Raises `ConfigError` for a model that cannot stream, with the reason, `BudgetExceeded`
        for a cap that is too small, with the numbers, and `ArgumentError`.
        """
        self._llm = model if isinstance(model, LLM) else None
        self.model = model.model if isinstance(model, LLM) else model
        self._backend = "auto" if self._llm is None else self._llm.backend
        if self.model.config.stream_refusal is not None:
            raise ConfigError(f"this model cannot stream: {self.model.config.stream_refusal}")
        for name, value in (("memory", memory), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ArgumentError(name, value, "an integer of at least 1")
        if isinstance(tolerance, float | int):
            tolerance = Tolerance(kl=tolerance)
        stream = self._plan(window, sinks, find_policy(policy), kv)
        stream = replace(stream, tolerance=tolerance).within(memory, chunk)
        self._memory, self._cap = Memory(stream, memory), memory
        self._next: torch.Tensor | None = None
        self._bits, self._num_predicted = 0.0, 0

    @property
    def config(self) -> SessionConfig:
        """How it remembers now."""
        stream = self._memory.stream
        return SessionConfig(
            policy=stream.policy,
            window=stream.window.size,
            sinks=stream.window.sinks,
            kv=stream.storage.format,
            memory=self._cap,
            chunk=stream.storage.step_tokens,
            tolerance=stream.tolerance,
        )

    @property
    def need(self) -> Need:
        """Bytes that it takes beside the weights."""
        return self._memory.need

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far."""
        return self._memory.cache.length

    @property
    def next_logits(self) -> torch.Tensor | None:
        """float [V]: logits of the token that comes next; None before the first."""
        return self._next

    @property
    def opening(self) -> list[int]:
        """The id that is to open a text here: the tokenizer's begin token, at the start only."""
        if self._llm is None or self.num_tokens:
            return []
        first = self._llm.tokenizer.encode("", special=True)[:1]
        return first if first == [self._llm.tokenizer.bos_id] else []

    @property
    def stats(self) -> SessionStats:
        """Counts for reports."""
        kept, gate = self._memory.stream.window.span, self._memory.gate
        cache = self._memory.cache.stats
        gone = cache.forgotten_tokens
        return SessionStats(
            num_tokens=self.num_tokens,
            num_forgotten=max(0, self.num_tokens - kept) if gone is None else gone,
            bits_per_token=self._bits / self._num_predicted if self._num_predicted else None,
            cache=cache,
            need=self.need,
            drift=None if gate is None else gate.stats,
        )

    def feed(self, tokens: str | Sequence[int]) -> torch.Tensor:
        """Take in text or token ids; gives the surprise -log2 p of each, float32 [n] on the CPU.

        At the start of a session a text is opened by the tokenizer's begin token, which is not
        among the n. A token that nothing came before has NaN. Raises `RequestError` for ids
        outside the vocabulary, and text where there is no tokenizer, before anything is taken in;
        and what a tolerance asks for, after a step: `num_tokens` says how far it came then.
        """
        ids = self._open(tokens)
        parts = [torch.zeros(0)]
        for _, bits in self._steps(ids):
            known = bits[~bits.isnan()]
            self._bits += float(known.double().sum())
            self._num_predicted += known.numel()
            parts.append(bits)
        return torch.cat(parts)

    def logits(self, tokens: str | Sequence[int]) -> torch.Tensor:
        """Take in text or token ids; gives the logits after each, [n, V]. Otherwise as `feed`."""
        parts = [logits for logits, _ in self._steps(self._open(tokens))]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.vocab_size)

    def generate(self, params: SamplingParams | None = None) -> Completion:
        """Go on with the stream; every token made is taken in, an end token, too.

        No context ends the answer; penalties count the answer's tokens. Raises `RequestError` for
        an empty session, and without a tokenizer.
        """
        *_, last = self.stream(params)
        assert last.completion is not None
        return last.completion

    def stream(self, params: SamplingParams | None = None) -> Iterator[Piece]:
        """As `generate`, piece by piece; the last piece carries the completion."""
        params, tokenizer = params or SamplingParams(), self._tokenizer("generating text")
        vocab_size = self.model.config.vocab_size
        check_ids("logit_bias", params.logit_bias, vocab_size)
        if self._next is None:
            raise RequestError("session: got nothing to go on from; accepted: feed it first")
        answer = Answer(Request((), params, params.max_tokens), tokenizer, perf_counter())
        return self._pieces(answer, Draw(params, (), vocab_size, self.model.device))

    def fork(self) -> Self:
        """An independent session in the same state; takes as much memory again."""
        other = type(self)(self._llm or self.model, **self.config.settings())
        other._restore(self._totals(), self._tensors())
        return other

    def change(self, *, kv: str | None = None, window: int | None = None) -> None:
        """Go on in another storage format, or with a smaller window; see `Memory.change`."""
        self._memory.change(kv, window)

    def close(self) -> None:
        """Give back what lies outside of memory: files and threads of the policy's cache."""
        self._memory.close()

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self._memory.reset()
        self._next = None
        self._bits, self._num_predicted = 0.0, 0

    def save(self, path: Path | str) -> None:
        """Write the whole state into one file, or leave what was there.

        A process killed at any moment leaves the old file or the new one. Raises `ArgumentError`
        where the file cannot be written.
        """
        header = {
            "model": fingerprint(self.model),
            "config": self.config.facts(),
            "totals": self._totals(),
        }
        state.write(Path(path), header, self._tensors())

    @classmethod
    def load(cls, path: Path | str, model: Decoder | LLM) -> Self:
        """The session that was saved to `path`, on the same model: it goes on to the bit.

        Raises `LoadError` for a file that is missing, damaged, cut short, or of another model.
        """
        decoder = model.model if isinstance(model, LLM) else model
        header, tensors = state.read(Path(path), fingerprint(decoder))
        session = cls(model, **SessionConfig.of(header["config"]).settings())
        session._restore(header["totals"], tensors)
        return session

    def _totals(self) -> dict[str, Any]:
        return {
            "bits": self._bits,
            "num_predicted": self._num_predicted,
            "memory": self._memory.facts(),
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        after = {} if self._next is None else {"next": self._next}
        return {**self._memory.tensors(), **after}

    def _restore(self, totals: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        after = tensors.get("next")
        held = {name: tensor for name, tensor in tensors.items() if name != "next"}
        self._memory.restore(totals["memory"], held)
        self._next = None if after is None else after.to(self.model.device)
        self._bits, self._num_predicted = totals["bits"], totals["num_predicted"]

    def _plan(
        self, window: int | None, sinks: int | None, policy: Policy, kv: str | None
    ) -> Stream:
        config = self.model.config
        sinks = policy.sinks if sinks is None else sinks
        size = policy.default_window(config.max_positions, sinks) if window is None else window
        storage = Storage(
            shape=config.cache_shape(1),
            dtype=self.model.dtype,
            format=kv or dtype_name(self.model.dtype),
            device=self.model.device,
            step_tokens=1,
            ropes=config.ropes,
            fingerprint=partial(fingerprint, self.model),
        )
        return Stream(self.model, policy, policy.window(size, sinks), storage, self._backend)

    def _tokenizer(self, purpose: str) -> Tokenizer:
        if self._llm is None:
            raise RequestError(f"{purpose}: got a Decoder; accepted: an LLM, which has a tokenizer")
        return self._llm.tokenizer

    def _open(self, tokens: str | Sequence[int]) -> list[int]:
        """The ids of `tokens`, once what opens a text has been taken in."""
        if not isinstance(tokens, str):
            check_ids("tokens", tokens, self.model.config.vocab_size)
            return list(tokens)
        ids = self._tokenizer("text").encode(tokens, special=False)
        for _ in self._steps(self.opening):
            pass
        return ids

    def _steps(self, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits [n, V] and surprise [n] of each step."""
        for start in range(0, len(ids), self.config.chunk):
            yield self._step(ids[start : start + self.config.chunk])
            self._memory.act()

    @torch.inference_mode()
    def _step(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        given = torch.tensor([ids], device=self.model.device)
        logits = self._memory.step(given)
        first = torch.full_like(logits[:1], math.nan) if self._next is None else self._next[None]
        predicted = torch.cat([first, logits[:-1]]).float()
        nats = F.cross_entropy(predicted, given[0], reduction="none")
        self._next = logits[-1].clone()
        return logits, (nats / math.log(2)).cpu()

    def _pieces(self, answer: Answer, draw: Draw) -> Iterator[Piece]:
        while answer.finish_reason is None:
            assert self._next is not None
            logits = self._next.unsqueeze(0)
            (token_id,) = sample(logits, [draw])
            (logprobs,) = report(logits, [token_id], [draw])
            draw.record(token_id)
            text = answer.push(token_id, logprobs)
            self._step([token_id])
            ended = answer.finish_reason is not None
            yield Piece(text, answer.completion() if ended else None)
            self._memory.act()
