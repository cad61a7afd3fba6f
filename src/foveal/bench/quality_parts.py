"""The parts of `foveal bench quality`: who is held against whom, on which passages.

    context    policies and windows within the model's context, against full attention
    policies   policies far beyond it, with the least and the largest window, against full attention
               and the recomputed window
    sinks      how many first tokens are worth keeping, against the recomputed window
    precision  storage formats within the context, against full attention in the model's dtype
    recall     random strings told once and asked for after a distance, by the larger windows
    mass       the share of attention that goes to the first tokens

Each part reads passages of its own choice from one text and yields its findings when all of them
have been read, so a run can be made part by part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from foveal.bench.finding import Column, Finding
from foveal.bench.quality import AGAINST, FULL, RECOMPUTE, Candidate
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

BENCHMARK = "quality"
PARTS = ("context", "policies", "sinks", "precision", "recall", "mass")
STEP_TOKENS = 64
"""Read at once: few enough for policies that look about on some steps only."""
ROW_STEP_TOKENS = 32
"""The same within the context. What a step computes may not be stored yet when it is seen."""
ROWS_SHARE = 2
"""Rows read one token for so many of the passages beyond the context: their differences from the
reference are taken token by token and need fewer."""
MASS_PASSAGES = 16

Progress = Callable[[str, int], Callable[[], object]]
"""A bar with this title, for so many steps; the call that moves it by one."""
Refusal = (ArgumentError, ConfigError, BudgetExceeded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured; empty tuples stand for a default that depends on the model."""

    tokens: int
    """Read by each candidate in each part that scores a text."""
    length: int
    """Of a passage that goes beyond the context."""
    policies: tuple[str, ...] = ()
    windows: tuple[int, ...] = ()
    """Tokens kept, sinks included."""
    sinks: tuple[int, ...]
    kv: tuple[str, ...] = ()
    distances: tuple[int, ...]
    facts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """One model and one text."""

    llm: LLM
    source: Source
    settings: Settings
    run: Run
    progress: Progress

    def __post_init__(self) -> None:
        if self.settings.length <= self.context:
            accepted = f"more than the model's context of {self.context}"
            raise ArgumentError("length", self.settings.length, accepted)

    def measure(self, part: str) -> Iterator[Finding]:
        """The findings of one part."""
        parts: Mapping[str, Callable[[], Iterator[Finding]]] = {
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
        """Those asked for, else a quarter, half and all of the context."""
        return self.settings.windows or (self.context // 4, self.context // 2, self.context)

    def candidate(self, policy: str, span: int, sinks: int = 0, kv: str = "") -> Candidate:
        """In the model's dtype unless told otherwise."""
        kv = kv or dtype_name(self.llm.model.dtype)
        return Candidate(policy=policy, span=span, sinks=sinks, kv=kv)

    def _context(self) -> Iterator[Finding]:
        windows = [window for window in self.windows if window < self.context]
        yield from self._scored("context", self._of_policies(windows), self._rows(), [FULL])

    def _policies(self) -> Iterator[Finding]:
        windows = sorted({min(self.windows), max(self.windows)})
        candidates, references = self._of_policies(windows), [FULL, RECOMPUTE]
        yield from self._scored("policies", candidates, self._passages(), references)

    def _sinks(self) -> Iterator[Finding]:
        candidates = [
            self.candidate("sinks", window, sinks)
            for window in self.settings.windows or (self.context // 8, self.context)
            for sinks in self.settings.sinks
            if 2 * sinks <= window
        ]
        yield from self._scored("sinks", candidates, self._passages(), [RECOMPUTE])

    def _precision(self) -> Iterator[Finding]:
        own = dtype_name(self.llm.model.dtype)
        formats = self.settings.kv or tuple(format.name for format in FORMATS)
        candidates = [self.candidate(FULL, self.context, kv=kv) for kv in formats if kv != own]
        yield from self._scored("precision", candidates, self._rows(), [FULL])

    def _recall(self) -> Iterator[Finding]:
        settings, source = self.settings, self.source
        tokenizer = self.llm.tokenizer
        planned = plan(tokenizer, source.ids, source.begin, settings.distances, settings.facts)
        chance = f"{planned.chance:.2f} bits per token if only the alphabet were known"
        title = f"{source.name}: {settings.facts} random strings, asked for once; {chance}"
        full = self.candidate(FULL, len(planned.ids) + STEP_TOKENS)
        for candidate in (full, *self._of_policies(self.windows[-2:])):
            try:
                reader = StreamReader(self.llm, candidate)
            except Refusal as refusal:
                yield self._refused("recall", title, candidate, refusal)
                continue
            questions = sum(map(len, planned.questions.values()))
            found = remember(reader.session, planned, self.progress(str(candidate), questions))
            reader.close()
            for recalled in found:
                distance = {"after": str(recalled.distance or "never told")}
                subject = {**reader.candidate.subject, **distance}
                yield self._finding("recall", title, subject, recalled.values)

    def _mass(self) -> Iterator[Finding]:
        reading = self._rows()
        rows = reading.passages[:MASS_PASSAGES]
        for opened in (True, False):
            start = 0 if opened else len(self.source.begin)
            how = "opened by the begin token" if opened else "begun in the middle"
            title = f"{self.source.name}: {how}, {len(rows)} rows, second half of {self.context}"
            given = [row[start:] for row in rows]
            found = masses(self.llm.model, given, reading.first, self.llm.backend)
            for mass in found if opened or self.source.begin else ():
                subject = {"layer": str(mass.layer), "head": str(mass.head)}
                yield self._finding("mass", title, subject, mass.values)

    def _of_policies(self, windows: Sequence[int]) -> list[Candidate]:
        """Each policy with its own number of sinks, at each window."""
        names = self.settings.policies or tuple(policy.name for policy in POLICIES)
        return [
            self.candidate(name, window, find_policy(name).sinks)
            for window in windows
            for name in names
        ]

    def _rows(self) -> Reading:
        """Rows as long as the context; the second half of each is scored."""
        passages = self.source.passages(self.context + 1, self.settings.tokens // ROWS_SHARE)
        return Reading(passages=passages, first=self.context // 2, step_tokens=ROW_STEP_TOKENS)

    def _passages(self) -> Reading:
        """Passages far longer than the context; all beyond it is scored."""
        passages = self.source.passages(self.settings.length + 1, self.settings.tokens)
        return Reading(passages=passages, first=self.context, step_tokens=STEP_TOKENS)

    def _scored(
        self,
        part: str,
        candidates: Sequence[Candidate],
        reading: Reading,
        against: Sequence[str],
    ) -> Iterator[Finding]:
        """References first, then each candidate that can be."""
        titles = {kind: f"{self.source.name}: {reading}; {AGAINST[kind]}" for kind in against}
        full = [self._entrant(self.candidate(FULL, reading.length))] if FULL in against else []
        spans = sorted({c.span for c in candidates}) if RECOMPUTE in against else []
        windows = {span: self._entrant(self.candidate(RECOMPUTE, span), *full) for span in spans}
        entrants = [*full, *windows.values()]
        for candidate in candidates:
            references = [*full, *(windows[span] for span in spans if span == candidate.span)]
            try:
                entrants.append(self._entrant(candidate, *references))
            except Refusal as refusal:
                yield self._refused(part, titles[against[-1]], candidate, refusal)
        read_all(entrants, reading, self.progress(part, reading.num_steps * len(entrants)))
        scored = []
        for entrant in entrants:
            entrant.reader.close()
            if entrant.failure:
                yield self._refused(part, titles[against[-1]], entrant.candidate, entrant.failure)
            else:
                scored.append((entrant.candidate, entrant.scores(reading)))
        for kind, title in titles.items():
            for candidate, scores in scored:
                values = scores.values(kind)
                if candidate.policy == kind or "KL" in values:
                    yield self._finding(part, title, candidate.subject, values, scores.curve)

    def _entrant(self, candidate: Candidate, *references: Entrant) -> Entrant:
        return Entrant(open_reader(self.llm, candidate, self.source.begin), references)

    def _refused(self, part: str, title: str, candidate: Candidate, refusal: object) -> Finding:
        return self._finding(part, title, {**candidate.subject, "refused": str(refusal)}, {})

    def _finding(
        self,
        part: str,
        title: str,
        subject: dict[str, str],
        values: dict[str, float | None],
        curve: dict[str, Column] | None = None,
    ) -> Finding:
        return Finding(
            benchmark=BENCHMARK,
            part=part,
            title=title,
            subject=subject,
            values=values,
            curve=curve or {},
            run=self.run,
        )
