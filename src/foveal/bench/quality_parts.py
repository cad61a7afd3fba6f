"""The parts of `foveal bench quality`: who is held against whom, on which passages.

    context    policies and windows within the model's context, against full attention
    policies   policies and windows far beyond it, against full attention and recomputed windows
    sinks      how many first tokens are worth keeping, against the recomputed window
    precision  storage formats within the context, against full attention in the model's dtype
    recall     random strings told once and asked for after a distance
    mass       the share of attention that goes to the first tokens

Each part reads passages of its own choice from one text and yields its records when all of them
have been read, so a run can be made part by part.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from foveal.bench.quality import (
    FULL,
    RECOMPUTE,
    Candidate,
    Masses,
    Memory,
    Part,
    QualityRecord,
    Scores,
)
from foveal.bench.quality_mass import masses
from foveal.bench.quality_readers import StreamReader, open_reader
from foveal.bench.quality_recall import plan, remember
from foveal.bench.quality_scores import Entrant, Reading, read_all
from foveal.bench.quality_text import Source
from foveal.bench.record import Run
from foveal.core.dtypes import dtype_name
from foveal.core.errors import ArgumentError, BudgetExceeded, ConfigError
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import POLICIES, find_policy
from foveal.kv.formats import FORMATS
from foveal.models.fingerprint import fingerprint

STEP_TOKENS = 256
"""Read at once."""
PRECISE_STEP_TOKENS = 32
"""Read at once where storage is measured: a token of this step may still be as it was computed."""
MASS_PASSAGES = 16

Progress = Callable[[str, int], Callable[[], object]]
"""A bar with this title, for so many steps; the call that moves it by one."""
Refusal = (ArgumentError, ConfigError, BudgetExceeded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured; empty tuples stand for the default, which depends on the model."""

    tokens: int = 51_200
    """Read by each candidate in each part that scores a text."""
    length: int = 8192
    """Of a passage that goes beyond the context."""
    policies: tuple[str, ...] = ()
    windows: tuple[int, ...] = ()
    """Tokens kept, sinks included."""
    sinks: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    kv: tuple[str, ...] = ()
    distances: tuple[int, ...] = (64, 128, 256, 384, 768, 1536, 3072)
    facts: int = 24

    @property
    def described(self) -> dict[str, str]:
        """For the records."""
        return {
            "tokens": f"{self.tokens} a candidate, in passages of {self.length} or the context",
            "recall": f"{self.facts} facts",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """One model and one text."""

    llm: LLM
    source: Source
    settings: Settings
    run: Run
    progress: Progress

    def measure(self, part: Part) -> Iterator[QualityRecord]:
        """The records of one part."""
        parts: Mapping[Part, Callable[[], Iterable[QualityRecord]]] = {
            "context": self._context,
            "policies": self._policies,
            "sinks": self._sinks,
            "precision": self._precision,
            "recall": self._recall,
            "mass": self._mass,
        }
        yield from parts[part]()

    @property
    def context(self) -> int:
        """Tokens that the model was trained to look back on."""
        return self.llm.context

    @property
    def windows(self) -> tuple[int, ...]:
        """Those asked for, else an eighth, half and all of the context."""
        return self.settings.windows or (self.context // 8, self.context // 2, self.context)

    @property
    def policies(self) -> tuple[str, ...]:
        """Those asked for, else all."""
        return self.settings.policies or tuple(policy.name for policy in POLICIES)

    def candidate(self, policy: str, span: int, sinks: int = 0, kv: str = "") -> Candidate:
        """In the model's dtype unless told otherwise."""
        kv = kv or dtype_name(self.llm.model.dtype)
        return Candidate(policy=policy, span=span, sinks=sinks, kv=kv)

    def _context(self) -> Iterator[QualityRecord]:
        windows = [window for window in self.windows if window < self.context]
        yield from self._scored("context", self._of_policies(windows), self._rows(STEP_TOKENS))

    def _policies(self) -> Iterator[QualityRecord]:
        yield from self._scored("policies", self._of_policies(self.windows), self._passages())

    def _sinks(self) -> Iterator[QualityRecord]:
        candidates = [
            self.candidate("sinks", window, sinks)
            for window in sorted({min(self.windows), max(self.windows)})
            for sinks in self.settings.sinks
            if 2 * sinks <= window
        ]
        yield from self._scored("sinks", candidates, self._passages())

    def _precision(self) -> Iterator[QualityRecord]:
        own = dtype_name(self.llm.model.dtype)
        formats = self.settings.kv or tuple(format.name for format in FORMATS)
        candidates = [self.candidate(FULL, self.context, kv=kv) for kv in formats if kv != own]
        yield from self._scored("precision", candidates, self._rows(PRECISE_STEP_TOKENS))

    def _recall(self) -> Iterator[QualityRecord]:
        settings, source = self.settings, self.source
        tokenizer = self.llm.tokenizer
        planned = plan(tokenizer, source.ids, source.begin, settings.distances, settings.facts)
        full = self.candidate(FULL, len(planned.ids) + self.context)
        for candidate in (full, *self._of_policies([self.context])):
            try:
                reader = StreamReader(self.llm, candidate, STEP_TOKENS)
            except Refusal as refusal:
                yield self._record("recall", candidate, reason=str(refusal))
                continue
            questions = sum(map(len, planned.questions.values()))
            memory = remember(reader.session, planned, self.progress(str(candidate), questions))
            reader.close()
            yield self._record("recall", reader.candidate, memory=memory)

    def _mass(self) -> Iterator[QualityRecord]:
        full = self.candidate(FULL, self.context)
        rows = self._rows(STEP_TOKENS).passages[:MASS_PASSAGES]
        found = masses(self.llm.model, rows, self.context // 2, self.llm.backend)
        yield self._record("mass", full, masses=found)

    def _of_policies(self, windows: Sequence[int]) -> list[Candidate]:
        """Each policy with its own number of sinks, at each window."""
        return [
            self.candidate(name, window, find_policy(name).sinks)
            for window in windows
            for name in self.policies
        ]

    def _rows(self, step_tokens: int) -> Reading:
        """Rows as long as the context; the second half of each is scored."""
        passages = self.source.passages(self.context + 1, self.settings.tokens)
        return Reading(passages=passages, first=self.context // 2, step_tokens=step_tokens)

    def _passages(self) -> Reading:
        """Passages far longer than the context; all beyond it is scored."""
        passages = self.source.passages(self.settings.length + 1, self.settings.tokens)
        return Reading(passages=passages, first=self.context, step_tokens=STEP_TOKENS)

    def _scored(
        self, part: Part, candidates: Sequence[Candidate], reading: Reading
    ) -> Iterator[QualityRecord]:
        """References first, then each candidate that can be."""
        length = len(reading.passages[0]) - 1
        full = self._entrant(self.candidate(FULL, length), reading)
        entrants = [full]
        spans = sorted({c.span for c in candidates} if length > self.context else ())
        windows = {
            span: self._entrant(self.candidate(RECOMPUTE, span), reading, full) for span in spans
        }
        entrants += windows.values()
        for candidate in candidates:
            references = [full, *([windows[candidate.span]] if spans else [])]
            try:
                entrants.append(self._entrant(candidate, reading, *references))
            except Refusal as refusal:
                yield self._record(part, candidate, reason=str(refusal))
        read_all(entrants, reading, self.progress(part, reading.num_steps * len(entrants)))
        for entrant in entrants:
            entrant.reader.close()
            yield self._record(part, entrant.candidate, scores=entrant.scores(reading))

    def _entrant(self, candidate: Candidate, reading: Reading, *references: Entrant) -> Entrant:
        begin, step = self.source.begin, reading.step_tokens
        return Entrant(open_reader(self.llm, candidate, begin, step), references)

    def _record(
        self,
        part: Part,
        candidate: Candidate,
        *,
        reason: str = "",
        scores: Scores | None = None,
        memory: Memory | None = None,
        masses: Masses | None = None,
    ) -> QualityRecord:
        return QualityRecord(
            part=part,
            text=self.source.text,
            model=fingerprint(self.llm.model),
            candidate=candidate,
            reason=reason,
            scores=scores,
            memory=memory,
            masses=masses,
            run=self.run,
        )
