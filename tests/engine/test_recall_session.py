"""Sessions that recall: what they take, how they are saved, and what they find again."""

from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError, BudgetExceeded, LoadError
from foveal.engine.llm import LLM
from foveal.engine.policies.recall import Recall
from foveal.engine.session import Session
from tiny import CONTEXT, write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog; päper und Tinte. " * 4
EVERYTHING = Recall(budget=2**40, distances="exact", retired=2**22)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_exact_with_everything_recalled_is_the_plain_forward(llm: LLM, chunk: int) -> None:
    ids = list((TEXT * 2).encode())
    session = Session(llm, window=40, policy=EVERYTHING, chunk=chunk)
    with torch.inference_mode():
        plain = llm.model(torch.tensor([ids]))[0]
    ours = session.logits(ids)
    # Float32 over two layers of wide random weights.
    assert (ours - plain).abs().max() < 1e-3 * plain.abs().max()
    assert session.stats.cache.num_retired > 20


def test_with_little_it_forgets_and_clamped_differs(llm: LLM) -> None:
    ids = list((TEXT * 2).encode())
    with torch.inference_mode():
        plain = llm.model(torch.tensor([ids]))[0, -1]
    for policy in (Recall(budget=2**14, distances="exact"), Recall(budget=2**40)):
        last = Session(llm, window=40, policy=policy, chunk=16).logits(ids)[-1]
        assert (last - plain).abs().max() > 1e-2 * plain.abs().max()


def test_the_default_stays_within_the_context(llm: LLM) -> None:
    session = Session(llm, policy="recall")
    config, page = session.config, 16
    assert config.window + config.chunk + 2 * page <= CONTEXT < 2 * config.window
    assert config.chunk <= config.window // 4
    session.feed(TEXT * 3)
    stats = session.stats.cache
    assert stats.fetched_bytes <= stats.num_steps * config.window // 4 // page * 2**20
    assert stats.allocated_bytes == session.need.cache_bytes > 64 * 2**20
    assert "pages retired" in stats.remarks[0]
    assert stats.num_forgotten == session.stats.num_forgotten == 0


def test_memory_does_not_grow_when_the_oldest_are_forgotten(llm: LLM, tmp_path: Path) -> None:
    session = Session(llm, window=40, policy=Recall(retired=2**17), memory=2**22)
    session.feed(TEXT * 3)
    before = session.stats
    session.feed(TEXT * 3)
    after = session.stats
    assert after.cache.num_forgotten > before.cache.num_forgotten > 0
    assert after.num_forgotten == 16 * after.cache.num_forgotten
    session.save(tmp_path / "state")
    assert Session.load(tmp_path / "state", llm).stats.num_forgotten == after.num_forgotten
    assert after.cache.used_bytes == before.cache.used_bytes
    assert after.cache.allocated_bytes == before.cache.allocated_bytes == session.need.cache_bytes
    with pytest.raises(BudgetExceeded):
        Session(llm, window=40, policy=Recall(retired=2**22), memory=2**22)


def test_the_estimate_of_a_step_holds(llm: LLM) -> None:
    from foveal.bench.memory import counted_peak

    for chunk, kv in ((1, None), (32, None), (32, "int8")):
        session = Session(llm, window=64, chunk=chunk, kv=kv, policy=Recall(retired=2**17))
        session.feed(TEXT * 2)
        taken = counted_peak(lambda: session.feed("x" * chunk))  # noqa: B023
        assert taken <= session.need.step_bytes <= (10 if chunk > 1 else 30) * taken


@pytest.mark.parametrize(
    ("kv", "distances"),
    [(None, "clamped"), ("bfloat16", "exact"), ("int8", "exact"), ("int4-channel", "clamped")],
)
def test_saved_sessions_go_on_to_the_bit(
    llm: LLM, tmp_path: Path, kv: str | None, distances: str
) -> None:
    policy = Recall(distances=distances, retired=2**17, budget=2**15)
    session = Session(llm, window=40, policy=policy, chunk=20, kv=kv)
    session.feed(TEXT)
    session.save(tmp_path / "state")
    loaded, branch = Session.load(tmp_path / "state", llm), session.fork()
    assert loaded.config == session.config
    first = session.logits(TEXT)
    assert torch.equal(loaded.logits(TEXT), first)
    assert torch.equal(branch.logits(TEXT), first)
    session.reset()
    branch.reset()
    assert torch.equal(session.logits(TEXT[:150]), branch.logits(TEXT[:150]))


def test_pages_go_to_a_file_and_come_back(llm: LLM, tmp_path: Path) -> None:
    small = Recall(retired=2**13, frozen=str(tmp_path / "frozen"), frozen_bytes=2**19)
    large = Recall(retired=2**19 + 2**13)
    on_disk, in_memory = (
        Session(llm, window=40, policy=p, chunk=10, kv="int8") for p in (small, large)
    )
    first = on_disk.logits(TEXT * 2)
    assert torch.equal(first, in_memory.logits(TEXT * 2))
    cold, frozen = on_disk.stats.cache.tiers
    assert cold.num_pages and cold.hits and frozen.num_pages and frozen.moves
    assert on_disk.need.disk_bytes == 2**19 and in_memory.need.disk_bytes == 0
    with pytest.raises(LoadError, match="in use"):
        on_disk.fork()
    on_disk.save(tmp_path / "state")
    on_disk.close()
    loaded = Session.load(tmp_path / "state", llm)
    assert torch.equal(loaded.logits(TEXT), in_memory.logits(TEXT))
    loaded.close()


def test_bad_settings_are_refused(llm: LLM) -> None:
    for policy, message in (
        (Recall(budget=100), "budget: got 100 bytes; accepted: at least a page, which takes"),
        (Recall(distances="far"), "distances: got 'far'; accepted: clamped, exact"),
        (Recall(retired=0), "retired: got 0; accepted: bytes of memory, or a frozen file"),
        (Recall(retired=100), "cold size: got 100 bytes; accepted: at least a page"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Session(llm, policy=policy)
    with pytest.raises(ArgumentError, match="window size: got 15; accepted: at least a page"):
        Session(llm, policy="recall", window=15)
    with pytest.raises(ArgumentError, match="sinks: got 0; accepted: at least 1: with clamped"):
        Session(llm, policy="recall", sinks=0)


def test_a_frozen_file_of_another_model_is_refused_and_left_alone(llm: LLM, tmp_path: Path) -> None:
    policy = Recall(retired=2**13, frozen=str(tmp_path / "frozen"), frozen_bytes=2**19)
    write_tiny_model(tmp_path / "other", seed=1)
    other = Session(LLM(tmp_path / "other"), window=40, policy=policy, chunk=10)
    other.feed(TEXT * 2)
    other.close()
    there = (tmp_path / "frozen").read_bytes()
    with pytest.raises(LoadError, match="is of another model"):
        Session(llm, window=40, policy=policy, chunk=10)
    assert (tmp_path / "frozen").read_bytes() == there
