"""The tolerance of a session: what its looks measure, what follows, and that nothing is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveal.bench.memory import counted_peak
from foveal.core.errors import ArgumentError, BudgetExceeded, DriftExceeded
from foveal.engine.gate import Tolerance, finer, rounds
from foveal.engine.llm import LLM
from foveal.engine.session import Session
from foveal.kv.cache import Window
from foveal.kv.pour import pour
from foveal.kv.ring import RingCache
from tiny import write_tiny_model

WINDOW, CHUNK = 48, 8
TEXT = [(7 * i * i + 3 * i) % 256 for i in range(400)]
LOOK = Tolerance(kl=1e-9, every=64, span=16)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


def session(llm: LLM, kv: str | None = "int4", **settings) -> Session:
    return Session(llm, window=WINDOW, kv=kv, chunk=CHUNK, **settings)


def test_a_look_measures_the_divergence_from_a_stream_in_full_precision(llm: LLM) -> None:
    """Poured at token 64, the reference is its own after a window, and measured over the next 16
    tokens: here done by hand."""
    watched = session(llm, tolerance=replace(LOOK, kl=1e9))
    ours = watched.logits(TEXT[:136])
    plain, exact = session(llm), session(llm, None)
    plain.logits(TEXT[:64])
    exact._memory.cache.reset()
    pour(plain._memory.cache, exact._memory.cache, CHUNK)
    theirs = exact.logits(TEXT[64:136])
    first = 64 + WINDOW
    p = theirs[WINDOW : WINDOW + 16].double().log_softmax(-1)
    q = ours[first : first + 16].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    (look,) = watched.stats.drift.looks
    assert (look.position, look.kv, look.outcome) == (first + 16, "int4", "kept")
    assert look.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert look.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    assert look.kl_mean > 1e-4, "four bits are felt"
    assert torch.equal(ours, session(llm).logits(TEXT[:136])), "looking changes nothing"


def test_beyond_the_tolerance_it_is_refined_until_nothing_is_rounded(
    llm: LLM, tmp_path: Path
) -> None:
    watched, exact = session(llm, tolerance=LOOK), session(llm, None)
    watched.feed(TEXT)
    exact.feed(TEXT)
    looks = watched.stats.drift.looks
    assert [look.kv for look in looks] == ["int4", "int8", "bfloat16"]
    assert [look.outcome for look in looks] == [
        "refined to int8",
        "refined to bfloat16",
        "refined to float32",
    ]
    assert looks[0].kl_mean > 10 * looks[1].kl_mean > 0
    assert watched.config.kv == "float32" and watched.need.reference_bytes == 0
    assert watched.num_tokens == len(TEXT)
    assert isinstance(watched._memory.cache, RingCache)
    # what follows is what the reference would say, whose window is all its own by now
    near = (watched.next_logits - exact.next_logits).abs().max()
    far = (session_fed(llm).next_logits - exact.next_logits).abs().max()
    assert near < far / 10
    watched.save(tmp_path / "state")
    loaded = Session.load(tmp_path / "state", llm)
    assert loaded.stats == watched.stats and loaded.config == watched.config
    assert torch.equal(loaded.feed(TEXT), watched.feed(TEXT))


def session_fed(llm: LLM) -> Session:
    plain = session(llm)
    plain.feed(TEXT)
    return plain


def test_within_the_tolerance_it_is_kept(llm: LLM) -> None:
    watched = session(llm, "int8", tolerance=replace(LOOK, kl=10.0))
    watched.feed(TEXT)
    stats = watched.stats.drift
    assert stats.num_looks == len(stats.looks) == 3  # each takes 64 + 48 + 16 tokens
    assert {look.outcome for look in stats.looks} == {"kept"} and watched.config.kv == "int8"


def test_it_stops_and_may_go_on(llm: LLM, tmp_path: Path) -> None:
    watched = session(llm, tolerance=replace(LOOK, action="stop"))
    watched.save(tmp_path / "state")
    saved = (tmp_path / "state").read_bytes()
    with pytest.raises(DriftExceeded, match=r"at token 128 the stream in int4 is .* nats") as found:
        watched.feed(TEXT)
    assert found.value.kl_max >= found.value.kl_mean > LOOK.kl
    assert watched.num_tokens == 128 and watched.stats.drift.looks[-1].outcome == "stopped"
    assert (tmp_path / "state").read_bytes() == saved
    plain = session(llm)
    plain.feed(TEXT[:128])
    assert watched.stats.bits_per_token == plain.stats.bits_per_token, "nothing is left out"
    assert torch.equal(watched.feed(TEXT[128:160]), plain.feed(TEXT[128:160]))
    with pytest.raises(DriftExceeded, match="at token 256"):
        watched.feed(TEXT[160:])


def test_a_generator_left_alone_acts_before_the_next_step(llm: LLM) -> None:
    watched = session(llm, tolerance=replace(LOOK, action="stop"))
    steps = watched._steps(TEXT)
    while watched.num_tokens < 128:
        next(steps)
    with pytest.raises(DriftExceeded):
        watched.feed(TEXT[:1])
    assert watched.num_tokens == 128


def test_saved_in_the_middle_of_a_look_it_goes_on_to_the_bit(llm: LLM, tmp_path: Path) -> None:
    for length in (60, 64, 90, 120, 130):
        watched = session(llm, tolerance=LOOK)
        watched.feed(TEXT[:length])
        watched.save(tmp_path / "state")
        loaded, branch = Session.load(tmp_path / "state", llm), watched.fork()
        assert loaded.config == branch.config == watched.config
        more = TEXT[length : length + 90]
        later = watched.logits(more)
        assert torch.equal(loaded.logits(more), later)
        assert torch.equal(branch.logits(more), later)
        assert loaded.stats == branch.stats == watched.stats


def test_the_reference_is_paid_for(llm: LLM) -> None:
    plain, watched = session(llm), session(llm, tolerance=LOOK)
    exact = session(llm, None)
    assert watched.need.cache_bytes == plain.need.cache_bytes
    assert watched.need.reference_bytes == exact.need.cache_bytes
    assert watched.need.step_bytes > plain.need.step_bytes
    with pytest.raises(BudgetExceeded, match="reference: "):
        session(llm, tolerance=LOOK, memory=plain.need.total_bytes)


def test_the_estimate_of_a_step_holds_while_it_looks(llm: LLM) -> None:
    for chunk, kv in ((8, "int8"), (16, "int4-channel")):
        tolerance = replace(LOOK, kl=10)
        watched = Session(llm, window=WINDOW, kv=kv, chunk=chunk, tolerance=tolerance)
        watched.feed(TEXT[:40])
        taken = counted_peak(lambda: watched.feed(TEXT[40:140]))  # noqa: B023
        assert watched.stats.drift.num_looks == 1
        assert taken <= watched.need.step_bytes <= 20 * taken


def test_a_policy_whose_cache_cannot_be_poured_is_refused(llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="policy: got RecallCache; accepted: one whose cache"):
        Session(llm, window=WINDOW, kv="int8", policy="recall", tolerance=LOOK)


def test_a_cap_without_room_for_more_precision_says_so(llm: LLM) -> None:
    needs = [
        Session(llm, window=WINDOW, kv=kv, chunk=CHUNK, tolerance=LOOK).need.total_bytes
        for kv in ("int4", "int8")
    ]
    assert needs[0] < needs[1]
    watched = session(llm, tolerance=LOOK, memory=needs[0])
    with pytest.raises(BudgetExceeded, match="in int8 takes"):
        watched.feed(TEXT)
    assert watched.config.kv == "int4" and watched.stats.drift.looks[-1].outcome == "no room"
    watched.feed(TEXT[:32])
    assert watched.num_tokens == 160


def test_what_rounds_nothing_is_not_looked_at(llm: LLM) -> None:
    watched = session(llm, None, tolerance=LOOK)
    watched.feed(TEXT)
    assert watched.stats.drift.num_looks == 0 and watched.need.reference_bytes == 0


def test_what_is_remembered_of_looks_does_not_grow(llm: LLM) -> None:
    tolerance = Tolerance(kl=10, every=1, span=1)
    watched = Session(llm, window=8, sinks=0, kv="int4", chunk=8, tolerance=tolerance)
    watched.feed(TEXT * 4)
    stats = watched.stats.drift
    assert stats.num_looks == len(TEXT) * 4 // 24 > len(stats.looks) == 64
    watched.reset()
    assert watched.stats.drift.num_looks == 0 and not watched.stats.drift.looks


def test_a_session_changes_its_format_and_window_as_it_runs(llm: LLM) -> None:
    one, other = session(llm, None), Session(llm, window=20, chunk=CHUNK)
    for each in (one, other):
        each.feed(TEXT[:16])  # both still see all of it
    one.change(window=20)
    assert one.config == other.config and one.need == other.need
    assert torch.allclose(one.logits(TEXT[:100]), other.logits(TEXT[:100]), atol=1e-3)
    one.change(kv="int8")
    assert one.config.kv == "int8" and one.num_tokens == 116
    one.feed(TEXT)
    with pytest.raises(ArgumentError, match="a cache that has forgotten it"):
        one.change(window=30)
    assert one.config.window == 20
    capped = session(llm, "int8", memory=session(llm, "int8").need.total_bytes)
    with pytest.raises(BudgetExceeded):
        capped.change(kv="float32")
    assert capped.config.kv == "int8"


def test_a_change_keeps_what_the_looks_found(llm: LLM) -> None:
    watched = session(llm, "int8", tolerance=replace(LOOK, kl=10))
    watched.feed(TEXT[:140])
    watched.change(window=20)
    watched.feed(TEXT)
    looks = watched.stats.drift.looks
    assert looks[0].position == 128 and len(looks) == watched.stats.drift.num_looks > 1
    assert watched._memory.gate.reference.window == Window(20, 4)


def test_a_plain_number_stands_for_the_defaults(llm: LLM) -> None:
    assert session(llm, tolerance=0.5).config.tolerance == Tolerance(kl=0.5)
    for settings, message in (
        ({"kl": 0}, "tolerance kl: got 0"),
        ({"kl": float("nan")}, "tolerance kl: got nan"),
        ({"kl": 1, "every": 0}, "tolerance every: got 0"),
        ({"kl": 1, "span": 0}, "tolerance span: got 0"),
        ({"kl": 1, "action": "panic"}, "tolerance action: got 'panic'; accepted: refine or stop"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Tolerance(**settings)


def test_the_ladder_of_formats() -> None:
    assert finer("int4-channel", torch.float32) == "int8-channel"
    assert finer("int8", torch.bfloat16) == "bfloat16"
    assert finer("int8-channel", torch.float16) == "float16"
    assert finer("float16", torch.bfloat16) == "bfloat16"
    assert not rounds("float32", torch.bfloat16)
    assert rounds("bfloat16", torch.float16) and rounds("float16", torch.float32)
