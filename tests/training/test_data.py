"""Corpus, streams and rows: what is read, in which order, and what is kept apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ArgumentError, ConfigError, LoadError
from foveal.text.bytes import BEGIN_ID, END_ID, write_byte_tokenizer
from foveal.text.tokenizer import Tokenizer, load_tokenizer
from foveal.training.corpus import documents, standard_library
from foveal.training.data import HeldoutRows, TrainingRows, read_streams, write_streams
from foveal.training.loss import IGNORE
from properties import examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def write_files(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}, " * 3)
    return root


def test_order_and_split_do_not_depend_on_the_disk(tmp_path: Path) -> None:
    names = [f"part{i % 3}/file{i}.txt" for i in range(60)]
    first = documents([write_files(tmp_path / "a", names)])
    second = documents([write_files(tmp_path / "b", names[::-1])])
    assert [d.name for d in first] == [d.name for d in second] != sorted(names)
    held = {d.name for d in first if d.held_out}
    assert held == {d.name for d in second if d.held_out}
    assert 0 < len(held) < 12


def test_hidden_and_excluded_files_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.txt", ".git/b.txt", "c/.d.txt", "skip/e.txt", "c/skip", "c/f.txt"])
    assert {d.name for d in documents([tmp_path], ["skip"])} == {"a.txt", "c/f.txt"}


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"data: got .*missing"):
        documents([tmp_path / "missing"])


def test_the_standard_library_is_programs_without_tests_or_packages() -> None:
    found = {d.name for d in standard_library(["encodings"])}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= found
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idlelib", "encodings"}
    assert 0.02 < sum(d.held_out for d in standard_library()) / len(found) < 0.1


def test_documents_are_opened_and_closed_and_kept_apart(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = documents([write_files(tmp_path / "text", [f"{i}.txt" for i in range(80)])])
    (tmp_path / "text" / "0.txt").write_bytes(b"\xff\xfe")  # not UTF-8: left out
    (tmp_path / "text" / "1.txt").write_bytes(b"")  # empty: left out
    write_streams(found, tokenizer, tmp_path / "data")
    streams = read_streams(tmp_path / "data")
    kept = [d for d in found if d.name not in ("0.txt", "1.txt")]
    for stream, facts, want in (
        (streams.train, streams.train_facts, [d for d in kept if not d.held_out]),
        (streams.heldout, streams.heldout_facts, [d for d in kept if d.held_out]),
    ):
        expected = [[BEGIN_ID, *d.path.read_bytes(), END_ID] for d in want]
        assert stream.tolist() == [token for ids in expected for token in ids]
        assert (facts.documents, facts.tokens) == (len(want), len(stream))
        assert facts.text_bytes == facts.tokens - 2 * len(want)


def test_of_few_documents_the_tails_are_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 950 + "b" * 50)
    write_streams(documents([path]), tokenizer, tmp_path / "data")
    streams = read_streams(tmp_path / "data")
    assert bytes(streams.train[1:-1].tolist()) == b"a" * 950
    assert bytes(streams.heldout[1:-1].tolist()) == b"b" * 50


def test_of_many_documents_none_drawn_the_tails_are_held_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = documents([write_files(tmp_path / "text", [f"{i}.txt" for i in range(80)])])
    write_streams([d for d in found if not d.held_out], tokenizer, tmp_path / "data")
    assert read_streams(tmp_path / "data").heldout_facts.text_bytes >= 70 * 10 // 20


def test_text_too_short_to_hold_any_out_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "short").write_text("short")
    with pytest.raises(ConfigError, match="1 documents hold no text for the heldout stream"):
        write_streams(documents([tmp_path / "short"]), tokenizer, tmp_path / "data")


def test_a_cut_stream_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text").write_text("a" * 40)
    write_streams(documents([tmp_path / "text"]), tokenizer, tmp_path / "data")
    (tmp_path / "data" / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(LoadError, match=r"train\.bin: not the \d+ tokens"):
        read_streams(tmp_path / "data")
    (tmp_path / "data" / "data.json").unlink()
    with pytest.raises(LoadError, match=r"holds no data\.json"):
        read_streams(tmp_path / "data")


def counting(num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens, dtype=np.uint32)


@settings(max_examples=examples(40), deadline=None)
@given(
    tokens=st.integers(40, 400),
    context=st.integers(1, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_no_token_twice_and_misses_fewer_than_two_rows(
    tokens: int, context: int, seed: int, epoch: int
) -> None:
    rows = TrainingRows(counting(tokens), context=context, begin_id=0, seed=seed)
    count = rows.rows_per_epoch
    _, targets = rows.batch(epoch * count, count)
    seen = targets.flatten().tolist()
    assert len(set(seen)) == len(seen) > tokens - 2 * context


def test_inputs_are_the_targets_behind_a_begin_token() -> None:
    rows = TrainingRows(counting(100), context=8, begin_id=777, seed=0)
    inputs, targets = rows.batch(0, 3)
    assert inputs[:, 0].tolist() == [777] * 3
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets, targets[:, :1] + torch.arange(8)), "a row is consecutive tokens"


def test_row_n_is_the_same_whoever_asks_when() -> None:
    rows = TrainingRows(counting(300), context=8, begin_id=0, seed=3)
    ahead = rows.batch(100, 4)[1]
    again = TrainingRows(counting(300), context=8, begin_id=0, seed=3)
    one_by_one = torch.cat([again.batch(n, 1)[1] for n in (100, 101, 102, 103)])
    assert torch.equal(ahead, one_by_one)
    first, second = rows.batch(0, 30)[1], rows.batch(rows.rows_per_epoch, 30)[1]
    assert not torch.equal(first, second), "epochs differ in order"
    other = TrainingRows(counting(300), context=8, begin_id=0, seed=4)
    assert not torch.equal(first, other.batch(0, 30)[1])


def test_epochs_cut_rows_at_different_places() -> None:
    rows = TrainingRows(counting(300), context=8, begin_id=0, seed=0)
    firsts = [rows.batch(epoch * rows.rows_per_epoch, 1)[1] for epoch in range(6)]
    assert len({int(targets[0, 0]) % 8 for targets in firsts}) > 1


def test_too_little_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="14 tokens; accepted: at least 15 for a context of 8"):
        TrainingRows(counting(14), context=8, begin_id=0, seed=0)
    assert TrainingRows(counting(15), context=8, begin_id=0, seed=0).rows_per_epoch == 1


@settings(max_examples=examples(30), deadline=None)
@given(tokens=st.integers(1, 100), context=st.integers(1, 20), size=st.integers(1, 7))
def test_held_out_rows_score_every_token_once(tokens: int, context: int, size: int) -> None:
    rows = HeldoutRows(counting(tokens), context=context, begin_id=777)
    scored: list[int] = []
    for inputs, targets in rows.batches(rows.num_rows, size):
        assert inputs.shape == targets.shape and len(inputs) <= size
        assert not (inputs == IGNORE).any()
        scored += targets[targets != IGNORE].tolist()
    assert scored == list(range(tokens))


def test_a_sample_of_held_out_rows_is_spread_evenly() -> None:
    rows = HeldoutRows(counting(100), context=10, begin_id=777)
    starts = [int(t[0]) for _, targets in rows.batches(5, 2) for t in targets]
    assert starts == [0, 20, 40, 60, 80]
