"""Sessions: what they remember, what they take, how they are saved, and what they refuse."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal.core.errors import (
    ArgumentError,
    BudgetExceeded,
    ConfigError,
    LoadError,
    RequestError,
)
from foveal.engine.llm import LLM
from foveal.engine.request import SamplingParams
from foveal.engine.session import Session
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.text.bytes import BEGIN_ID
from sights import sight
from tiny import CONTEXT, write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog; päper und Tinte. " * 3
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory)


def test_before_eviction_it_is_the_plain_forward(llm: LLM) -> None:
    session, ids = Session(llm, chunk=16), llm.tokenizer.encode(TEXT)[:CONTEXT]
    with torch.inference_mode():
        plain = llm.model(torch.tensor([ids]))[0]
    bits = torch.cat([session.feed(ids[:40]), session.feed(ids[40:])])
    expected = -plain.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert bits[0].isnan(), "nothing came before the first token"
    assert torch.allclose(bits[1:], expected / math.log(2), atol=1e-3)
    assert session.next_logits is not None
    assert torch.allclose(session.next_logits, plain[-1], atol=1e-3)
    assert session.stats.bits_per_token == pytest.approx(float(bits[1:].mean()), rel=1e-5)
    assert session.stats.num_forgotten == 0


def test_text_is_opened_once_by_the_begin_token(llm: LLM) -> None:
    session, whole = Session(llm, window=20), Session(llm, window=20)
    parts = torch.cat([session.feed(TEXT[:50]), session.feed(TEXT[50:]), session.feed("")])
    assert torch.allclose(parts, whole.feed(TEXT), atol=1e-3)
    assert len(parts) == len(TEXT.encode()) and not parts.isnan().any()
    assert session.num_tokens == len(parts) + 1
    ids = [BEGIN_ID, *TEXT.encode()]
    assert torch.allclose(Session(llm, window=20).feed(ids)[1:], parts, atol=1e-3)


@pytest.mark.parametrize("policy", ["sinks", "window"])
def test_the_size_of_steps_changes_rounding_only(llm: LLM, policy: str) -> None:
    one, many = (Session(llm, window=20, policy=policy, chunk=chunk) for chunk in (1, 64))
    assert one.config.sinks == {"sinks": 4, "window": 0}[policy]
    assert torch.allclose(one.logits(TEXT), many.logits(TEXT), atol=2e-3)
    assert one.stats.num_forgotten == one.num_tokens - 20 - one.config.sinks > 0


def test_memory_does_not_grow(llm: LLM) -> None:
    session = Session(llm, window=20)
    session.feed(TEXT)
    before = session.stats
    session.feed(TEXT * 3)
    assert session.stats.cache == type(before.cache)(
        length=session.num_tokens,
        capacity=before.cache.capacity,
        used_bytes=before.cache.used_bytes,
        allocated_bytes=before.cache.allocated_bytes,
        num_growths=0,
    )
    assert before.cache.allocated_bytes == session.need.cache_bytes
    assert 0.9 < before.occupancy <= 1


def test_a_cap_sets_the_step_or_is_refused_with_the_numbers(llm: LLM) -> None:
    free = Session(llm, window=100)
    assert free.config.chunk == 256
    tight = Session(llm, window=100, memory=free.need.total_bytes - 1)
    assert tight.config.chunk < 256 and tight.need.total_bytes < free.need.total_bytes
    with pytest.raises(BudgetExceeded, match=r"largest window that fits is (\d+)") as caught:
        Session(llm, window=100, memory=tight.need.cache_bytes)
    assert caught.value.needed_bytes["cache"] == tight.need.cache_bytes
    largest = int(str(caught.value).split("that fits is ")[1].split(":")[0])
    Session(llm, window=largest, memory=tight.need.cache_bytes)
    with pytest.raises(BudgetExceeded):
        Session(llm, window=largest + 1, memory=tight.need.cache_bytes)
    with pytest.raises(BudgetExceeded, match="no window fits, however small"):
        Session(llm, window=100, memory=10)


def test_the_estimate_of_a_step_holds(llm: LLM) -> None:
    from foveal.bench.memory import counted_peak

    for chunk, kv in ((1, None), (32, None), (128, None), (1, "int8"), (128, "int8")):
        session = Session(llm, window=128, chunk=chunk, kv=kv)
        session.feed(TEXT)
        fresh = session.fork()  # its scratch memory is yet to be allocated
        taken = counted_peak(lambda: fresh.feed("x" * chunk))  # noqa: B023
        assert taken <= session.need.step_bytes
        assert chunk == 1 or session.need.step_bytes <= 20 * taken, "of a step worth estimating"


def test_generates_what_a_prompt_would(llm: LLM) -> None:
    session = Session(llm)
    session.feed(TEXT[:60])
    before = session.num_tokens
    pieces = list(session.stream(GREEDY))
    expected = llm.generate(TEXT[:60], GREEDY)[0]
    completion = pieces[-1].completion
    assert completion is not None and completion.token_ids == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text == completion.text
    assert session.num_tokens == before + 6, "what it wrote it has read"
    params = SamplingParams(temperature=0, max_tokens=CONTEXT + 20, ignore_eos=True)
    assert len(session.generate(params).token_ids) == CONTEXT + 20, "no context ends it"
    assert session.stats.num_forgotten > 0


def test_saved_sessions_go_on_to_the_bit(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "state"
    for length in (0, 1, 10, 100):
        session = Session(llm, window=20, sinks=3, memory=2**24, chunk=7)
        session.feed(list(TEXT.encode()[:length]))
        session.save(path)
        loaded, branch = Session.load(path, llm), session.fork()
        assert loaded.config == session.config and loaded.stats == session.stats
        first = session.logits("and so on, " * 5)
        assert torch.equal(loaded.logits("and so on, " * 5), first)
        assert torch.equal(branch.logits("and so on, " * 5), first)
        assert loaded.generate(GREEDY).token_ids == session.generate(GREEDY).token_ids


@pytest.mark.parametrize(
    "kv", ["bfloat16", "float16", "int8", "int8-channel", "int4", "int4-channel"]
)
def test_other_formats_take_less_and_survive_for_ever(llm: LLM, tmp_path: Path, kv: str) -> None:
    session, exact = (Session(llm, window=128, kv=one, chunk=16) for one in (kv, None))
    near, far = session.feed(TEXT * 3), exact.feed(TEXT * 3)
    typical = float((near - far)[250:].abs().median())
    assert 0 < typical < {"bfloat16": 0.1, "float16": 0.1}.get(kv, 0.2 if "int8" in kv else 2.0)
    assert session.need.cache_bytes < exact.need.cache_bytes
    assert session.stats.cache.allocated_bytes == session.need.cache_bytes
    session.save(tmp_path / "state")
    loaded, branch = Session.load(tmp_path / "state", llm), session.fork()
    later = session.logits(TEXT)
    assert torch.equal(loaded.logits(TEXT), later) and torch.equal(branch.logits(TEXT), later)


@pytest.mark.parametrize("window", [4, 15, 16, 17, 40])
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_pages_suffice_whatever_the_window_and_the_steps(llm: LLM, window: int, kv: str) -> None:
    for chunk in (1, 3, 16, 17):
        Session(llm, window=window, kv=kv, chunk=chunk).feed(TEXT[:120])


def test_sinks_and_what_is_recent_stay_exact_where_the_rest_is_in_few_bits(llm: LLM) -> None:
    session, exact = (Session(llm, window=100, kv=kv, chunk=5) for kv in ("int4", None))
    recent = list(TEXT.encode()[:10])  # all of it is recent: nothing is coded
    assert torch.allclose(session.feed(recent)[1:], exact.feed(recent)[1:], atol=1e-4)
    for one in (session, exact):
        one.feed(TEXT * 2)
    ours, theirs = (held(one) for one in (session, exact))
    same = {place for place in theirs if torch.equal(ours[place], theirs[place])}
    end = session.num_tokens
    assert same >= {*range(4), *range(end - 12, end)}
    assert len(same) < len(theirs)


def held(session: Session) -> dict[int, torch.Tensor]:
    """The keys of the first layer, by position: what went before does not change them."""
    found = {}
    for tile in session._memory.cache.view(0).tiles(sight()):
        for slot in (tile.positions[0] >= 0).nonzero().flatten().tolist():
            found[int(tile.positions[0, slot])] = tile.keys[0, :, slot].clone()
    return found


def test_forks_and_resets_are_independent(llm: LLM) -> None:
    session = Session(llm, window=20)
    session.feed(TEXT)
    branch = session.fork()
    branch.feed("something else")
    assert branch.num_tokens > session.num_tokens
    expected = session.fork().feed("x")
    assert torch.equal(session.feed("x"), expected)
    session.reset()
    assert session.num_tokens == 0 and session.next_logits is None
    assert session.stats.bits_per_token is None
    assert torch.equal(session.feed(TEXT), Session(llm, window=20).feed(TEXT))


def test_files_that_are_not_its_state_are_refused(llm: LLM, tmp_path: Path) -> None:
    path, other = tmp_path / "state", tmp_path / "other"
    with pytest.raises(LoadError, match="is not the whole state of a session"):
        Session.load(path, llm)
    session = Session(llm, window=20)
    session.feed(TEXT)
    session.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LoadError):
            Session.load(path, llm)
    for at in (whole.index(b"window"), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LoadError, match="damaged"):
            Session.load(path, llm)
    path.write_bytes(whole.replace(b'"foveal-session":"2"', b'"foveal-session":"1"'))
    with pytest.raises(LoadError, match="version 1; this foveal reads 2"):
        Session.load(path, llm)
    write_tiny_model(other, seed=1)
    path.write_bytes(whole)
    with pytest.raises(LoadError, match="is of another model"):
        Session.load(path, LLM(other))
    with pytest.raises(LoadError, match="is not the state of a session"):
        Session.load(other / "model.safetensors", llm)


KILLED_WHILE_SAVING = """
import os, signal, sys
from foveal.engine.llm import LLM
from foveal.engine.session import Session

session = Session(LLM(sys.argv[2]), window=20)
session.feed("first")
session.save(sys.argv[1])
session.feed(", second")
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
session.save(sys.argv[1])
"""

DISK_FULL = """
import resource, signal, sys
from foveal.core.errors import ArgumentError
from foveal.engine.llm import LLM
from foveal.engine.session import Session

session = Session.load(sys.argv[1], LLM(sys.argv[2]))
session.feed(", third")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    session.save(sys.argv[1])
except ArgumentError as error:
    sys.exit("a file that can be written" not in str(error))
"""


def test_what_was_saved_survives_a_kill_and_a_full_disk(
    llm: LLM, directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "state"

    def run(program: str) -> int:
        command = [sys.executable, "-c", program, str(path), str(directory)]
        return subprocess.run(command, check=False).returncode

    assert run(KILLED_WHILE_SAVING) == -signal.SIGKILL
    left = set(tmp_path.iterdir())
    assert len(left) == 2, "the new file was being written"
    assert Session.load(path, llm).num_tokens == 1 + len("first")
    assert run(DISK_FULL) == 0
    assert set(tmp_path.iterdir()) == left, "nothing half-written is left"
    assert Session.load(path, llm).num_tokens == 1 + len("first")


def test_bad_sessions_are_refused(llm: LLM) -> None:
    for settings, message in (
        ({"window": 3}, "sinks: got 4; accepted: an integer from 0 to the window of 3"),
        ({"window": 0, "sinks": 0}, "window size: got 0"),
        ({"window": 20, "sinks": 1, "policy": "window"}, "sinks: got 1; accepted: 0 with policy"),
        ({"policy": "everything"}, "policy: got 'everything'; accepted: sinks, window"),
        ({"memory": 0}, "memory: got 0"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"kv": "int7"}, "format: got 'int7'; accepted: float32, "),
    ):
        with pytest.raises(ArgumentError, match=message):
            Session(llm, **settings)


def test_bad_input_is_refused_before_anything_is_taken_in(llm: LLM) -> None:
    session, bare = Session(llm, window=20), Session(llm.model, window=20)
    for misuse, message in (
        (lambda: session.feed([1, 258]), "tokens: got token id 258; accepted: 0 to 257"),
        (lambda: session.stream(), "session: got nothing to go on from"),
        (lambda: bare.feed("text"), "text: got a Decoder; accepted: an LLM"),
        (lambda: bare.generate(), "generating text: got a Decoder"),
    ):
        with pytest.raises(RequestError, match=message):
            misuse()
    assert session.num_tokens == 0
    assert torch.equal(bare.feed([1, 2, 3])[1:], session.feed([1, 2, 3])[1:])
    with pytest.raises(ArgumentError, match="path: got"):
        session.save("/dev/null/state")


def test_a_model_that_cannot_stream_is_refused_with_the_reason() -> None:
    learned = ModelConfig(
        family="gpt2",
        vocab_size=30,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=16,
        max_positions=32,
    )
    with pytest.raises(ConfigError, match="cannot stream: it has 32 learned positions"):
        Session(Decoder(learned))
