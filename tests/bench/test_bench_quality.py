"""The benchmark of quality: what must be equal is, what can be counted by hand is counted."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveal.attention.paged import attend_view
from foveal.attention.spec import AttentionSpec
from foveal.attention.trace import trace
from foveal.bench import lines
from foveal.bench.finding import Finding, newest, read_findings
from foveal.bench.quality import FULL, RECOMPUTE, Candidate, mean_of
from foveal.bench.quality_mass import NUM_FIRST, WatchedView, masses
from foveal.bench.quality_parts import PARTS, Bench, Settings
from foveal.bench.quality_plots import draw
from foveal.bench.quality_readers import StreamReader, WindowReader
from foveal.bench.quality_recall import Plan, plan, remember
from foveal.bench.quality_scores import Entrant, Reading, read_all
from foveal.bench.quality_text import Source, source_of
from foveal.bench.record import Run
from foveal.cli.main import app
from foveal.core.errors import ArgumentError
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import POLICIES
from foveal.hardware.detect import detect
from foveal.hardware.peaks import nominal
from foveal.kv.cache import KVView
from foveal.kv.formats import FORMATS
from foveal.training.corpus import standard_library
from tiny import CONTEXT, write_tiny_model

TEXT = "Pack my box with five dozen liquor jugs; the quick onyx goblin jumps over. " * 200
SETTINGS = Settings(
    tokens=2 * CONTEXT,
    length=300,
    windows=(64, CONTEXT),
    sinks=(0, 2),
    distances=(16, 200),
    facts=2,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory)


@pytest.fixture(scope="module")
def source(llm: LLM, directory: Path) -> Source:
    return source_of(llm.tokenizer, directory / "text.txt")


def candidate(policy: str, span: int, sinks: int = 0, kv: str = "float32") -> Candidate:
    return Candidate(policy=policy, span=span, sinks=sinks, kv=kv)


def reading(source: Source, length: int = 80, first: int = 20, step_tokens: int = 16) -> Reading:
    passages = source.passages(length + 1, 3 * length)
    return Reading(passages=passages, first=first, step_tokens=step_tokens)


def test_a_reader_against_itself_and_one_that_forgets_nothing(llm: LLM, source: Source) -> None:
    full = Entrant(StreamReader(llm, candidate(FULL, 80)))
    same = Entrant(StreamReader(llm, candidate(FULL, 80)), [full])
    wide = Entrant(StreamReader(llm, candidate("sinks", 80, 4)), [full])
    afresh = Entrant(WindowReader(llm, candidate(RECOMPUTE, 80), source.begin), [full])
    narrow = Entrant(StreamReader(llm, candidate("window", 8)), [full])
    read = reading(source)
    read_all([full, same, wide, afresh, narrow], read)
    for entrant, least in ((same, 1.0), (wide, 0.99), (afresh, 0.99)):
        (found,) = entrant.scores(read).divergences
        assert found.kl_max < 1e-4 and abs(found.more.value) < 1e-4
        assert found.agreement >= least
    (exactly,) = same.scores(read).divergences
    assert (exactly.kl_mean, exactly.kl_p99, exactly.kl_max, exactly.more.value) == (0, 0, 0, 0)
    (far,) = narrow.scores(read).divergences
    assert far.kl_mean > 0.01 and far.agreement < 1 and far.kl_max > far.kl_p99 > far.kl_mean


class Told:
    """A reader that gives the same distribution after every token."""

    held_bytes = 7

    def __init__(self, probabilities: list[float]) -> None:
        self.candidate = candidate("told", len(probabilities))
        self._logits = torch.tensor(probabilities).log()

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        return self._logits.expand(len(ids), -1)

    def reset(self) -> None: ...

    def close(self) -> None: ...


def test_figures_are_those_of_the_formulas() -> None:
    fair, biased = Entrant(Told([0.5, 0.5])), [0.75, 0.25]
    other = Entrant(Told(biased), [fair])
    read = Reading(passages=[[0, 1, 0, 0, 0, 1]] * 2, first=1, step_tokens=2)
    read_all([fair, other], read)
    scores = other.scores(read)
    assert scores.num_tokens == 2 * 4
    foreseen = [-math.log2(biased[token]) for token in (0, 0, 0, 1)]
    assert scores.bits.value == pytest.approx(sum(foreseen) / 4)
    (found,) = scores.divergences
    expected = sum(0.5 * math.log2(0.5 / q) for q in biased)
    assert found.kl_mean == pytest.approx(expected) == found.kl_max
    assert found.more.value == pytest.approx(scores.bits.value - 1)
    assert scores.held_bytes == 7 and scores.s_per_token > 0
    assert scores.curve["position"] == (1, 2, 3, 4, 5)
    assert scores.curve["bits"] == pytest.approx([2.0, *foreseen], rel=1e-4)


def test_what_is_not_finite_is_told_and_not_scored() -> None:
    sound = Entrant(Told([0.5, 0.5]))
    broken = Entrant(Told([math.nan, 0.5]), [sound])
    beside = Entrant(Told([0.5, 0.5]), [broken])
    read_all([sound, broken, beside], Reading(passages=[[0, 1, 0]], first=0, step_tokens=2))
    assert not sound.failure
    for entrant in (broken, beside):
        assert "told 2, 0 sinks, float32 gave 2 predictions" in entrant.failure


def test_standard_errors_are_over_blocks() -> None:
    assert (mean_of([2.0]).value, mean_of([2.0]).error) == (2, 0)
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.value, found.error) == pytest.approx((2, 1 / math.sqrt(3)))


@torch.inference_mode()
def dense(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Logits after the last token of a text, computed at once."""
    return llm.model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("stride", [1, 3])
def test_a_recomputed_window_is_dense_attention_over_it(
    llm: LLM, source: Source, stride: int
) -> None:
    span = 12
    reader = WindowReader(llm, candidate(RECOMPUTE, span), source.begin, stride)
    (passage,) = source.passages(40, 40)
    for _ in range(2):  # the second time after a reset
        reader.reset()
        parts = [passage[:5], passage[5:15], passage[15:15], passage[15:16], passage[16:]]
        ours = torch.cat([reader.read(part) for part in parts if part])
        for at in range(span):
            torch.testing.assert_close(ours[at], dense(llm, passage[: at + 1]), rtol=0, atol=1e-3)
        for end in (min(end, 40) for end in range(16 + stride, 40 + stride, stride)):
            window = [*source.begin, *passage[end - span + 1 : end]]
            assert len(window) == span
            torch.testing.assert_close(ours[end - 1], dense(llm, window), rtol=0, atol=1e-3)


def test_shares_of_attention_are_those_of_the_trace() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, causal=True)
    q, k, v = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    positions = torch.arange(20)[None]
    shares: list[torch.Tensor] = []
    view = WatchedView(KVView(k, v, positions), shares)
    out = attend_view(q, view, spec, q_positions=positions)
    (found,), expected = shares, trace(q, k, v, spec)
    torch.testing.assert_close(found, expected.probabilities[0, :, :, :NUM_FIRST].transpose(1, 2))
    torch.testing.assert_close(out, expected.out)


def test_mass_of_every_head_is_a_mean_over_the_second_half(llm: LLM, source: Source) -> None:
    passages = source.passages(24, 48)
    found = masses(llm.model, passages, 12, "auto")
    assert [(m.layer, m.head) for m in found] == [(i, j) for i in range(2) for j in range(4)]
    alone = [masses(llm.model, [passage], 12, "auto") for passage in passages]
    for mass, *parts in zip(found, *alone, strict=True):
        assert 0 < sum(mass.shares) < 1
        assert mass.even == pytest.approx(sum(1 / n for n in range(13, 25)) / 12)
        mean = torch.tensor([part.shares for part in parts]).mean(0)
        torch.testing.assert_close(torch.tensor(mass.shares), mean)


def test_what_has_left_the_window_cannot_be_recalled(llm: LLM, source: Source) -> None:
    """Two layers of a window of 24 reach 46 tokens back: 16 see the string, 200 do not."""
    near, far = 16, 200
    planned = plan(llm.tokenizer, source.ids, source.begin, (near, far), 2)
    facts = {fact for asked in planned.questions.values() for _, fact in asked}
    ids = list(planned.ids)
    for fact in facts:
        (at,) = (i for i in range(len(ids)) if tuple(ids[i : i + 16]) == fact.told)
        ids[at : at + 16] = fact.other
    lied = dataclasses.replace(planned, ids=tuple(ids))
    window, full = candidate("window", 24), candidate(FULL, len(ids) + 100)

    def bits(who: Candidate, what: Plan) -> list[float]:
        return [r.bits.value for r in remember(StreamReader(llm, who).session, what)]

    told, told_else = bits(window, planned), bits(window, lied)
    assert abs(told[0] - told_else[0]) > 1e-3
    assert told[1:] == pytest.approx(told_else[1:], abs=1e-4)
    assert abs(bits(full, planned)[1] - bits(full, lied)[1]) > 1e-4


def test_facts_are_planted_where_they_are_asked_for(llm: LLM, source: Source) -> None:
    planned = plan(llm.tokenizer, source.ids, source.begin, (10, 50), 3)
    text = llm.tokenizer.decode(planned.ids)
    assert planned.chance == pytest.approx(math.log2(62))
    assert len(planned.ids) == max(planned.questions) and planned.farthest == 50
    for at, asked in planned.questions.items():
        for distance, fact in asked:
            line = llm.tokenizer.decode([*fact.asked, *fact.told, *fact.closing])
            assert text.count(line) == 1
            assert llm.tokenizer.decode(planned.ids[: at - distance]).endswith(line)
    with pytest.raises(ArgumentError, match="at least"):
        plan(llm.tokenizer, source.ids[:500], source.begin, (10,), 3)


def test_passages_are_spread_and_opened(llm: LLM, source: Source) -> None:
    passages = source.passages(100, 1000)
    assert len(passages) == 10 and {len(p) for p in passages} == {100}
    assert all(p[0] == llm.tokenizer.bos_id for p in passages)
    middle = (len(source.ids) - 99) // 2
    assert source.passages(100, 100) == [[*source.begin, *source.ids[middle : middle + 99]]]
    every = source.passages(100, 10**9)
    assert len(every) == len(source.ids) // 99 and {len(p) for p in every} == {100}
    with pytest.raises(ArgumentError, match="text"):
        source.passages(len(source.ids) + 2, 10)


def test_default_text_is_held_out(llm: LLM) -> None:
    """No file of it is among those that the recipe trains on."""
    held = source_of(llm.tokenizer, None)
    assert held.name == "held-out source" and held.ids[0] == llm.tokenizer.bos_id
    assert held.ids.count(llm.tokenizer.bos_id) == held.ids.count(llm.tokenizer.eos_ids[0]) > 5
    text = llm.tokenizer.decode(held.ids)
    for document in standard_library():
        if not document.held_out and len(found := document.read() or "") > 500:
            assert found not in text, document.name


@pytest.fixture(scope="module")
def findings(llm: LLM, source: Source) -> list[Finding]:
    run = Run.now(detect(), nominal(detect()), {})
    bench = Bench(
        llm=llm,
        source=source,
        settings=SETTINGS,
        run=run,
        progress=lambda title, total: lambda: None,
    )
    return [finding for part in PARTS for finding in bench.measure(part)]


def test_every_part_measures_every_policy_in_finite_numbers(findings: list[Finding]) -> None:
    assert {f.part for f in findings} == set(PARTS)
    for finding in findings:
        assert finding.values, finding.subject
        assert all(math.isfinite(value) for value in finding.values.values() if value is not None)
        assert "refused" not in finding.subject
    for part in ("context", "policies", "recall"):
        policies = {f.subject["policy"] for f in findings if f.part == part}
        assert {policy.name for policy in POLICIES} | {FULL} <= policies
    formats = {f.subject["stored as"] for f in findings if f.part == "precision"}
    assert formats == {format.name for format in FORMATS}


def test_what_cannot_be_is_recorded_with_its_reason(llm: LLM, source: Source) -> None:
    run = Run.now(detect(), nominal(detect()), {})
    settings = dataclasses.replace(SETTINGS, kv=("int3",))
    bench = Bench(
        llm=llm, source=source, settings=settings, run=run, progress=lambda *_: lambda: None
    )
    refused, full = bench.measure("precision")
    assert "int3" in refused.subject["refused"] and not refused.values
    assert full.subject["policy"] == FULL and full.values


def test_findings_survive_the_file_and_become_pictures(
    findings: list[Finding], tmp_path: Path
) -> None:
    path = tmp_path / "quality.jsonl"
    for finding in findings:
        lines.append(path, finding)
    assert read_findings(path) == findings == newest([*findings, *findings])
    drawn = draw(read_findings(path), tmp_path)
    assert [p.name for p in drawn] == [f"quality-{part}-text-txt.png" for part in sorted(PARTS)]
    assert all(p.stat().st_size > 10_000 for p in drawn)


def test_command_line(directory: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "quality.jsonl", tmp_path / "quality.md"
    options = ["--model", str(directory), "--file", str(directory / "text.txt"), "--tokens", "400"]
    command = ["bench", "quality", *options, "--out", str(out)]
    ran = CliRunner().invoke(app, [*command, "--part", "mass,context", "--windows", "16", "--json"])
    assert ran.exit_code == 0, ran.output
    printed = [lines.decode(Finding, line) for line in ran.stdout.splitlines()]
    assert printed == read_findings(out)
    ran = CliRunner().invoke(app, [*command, "--part", "none", "--table", str(table)])
    assert ran.exit_code == 0 and len(read_findings(out)) == len(printed)
    assert "sinks + window" in table.read_text() and "| mass" not in table.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "mas"], "--part: got 'mas'"),
        (["--windows", "x"], "--windows"),
        (["--file", "nowhere"], "nowhere"),
        (["--length", "20"], "length"),
    ],
)
def test_bad_options_are_refused(directory: Path, options: list[str], message: str) -> None:
    command = ["bench", "quality", "--model", str(directory), *options]
    ran = CliRunner().invoke(app, command)
    assert isinstance(ran.exception, ArgumentError) and message in str(ran.exception)
