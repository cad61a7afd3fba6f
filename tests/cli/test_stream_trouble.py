"""What goes wrong with `foveal stream`, as a user meets it: nothing is lost, nothing half-written,
and the message says what to change."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as hf
from rich.console import Console
from typer.testing import CliRunner

from foveal.cli import opening, reading
from foveal.cli.main import app
from foveal.core.errors import (
    ArgumentError,
    BudgetExceeded,
    ConfigError,
    DriftExceeded,
    LoadError,
)
from foveal.engine.llm import LLM
from foveal.engine.session import Session
from foveal.text.bytes import VOCAB_SIZE, write_byte_tokenizer
from tiny import write_tiny_model

LINE = "def größe(x):  # a line of text\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(LINE * 40)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["stream", *map(str, arguments)])


def test_settings_that_cannot_be_are_refused_before_anything_is_read(
    model: str, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for arguments, error, message in (
        (("--window", 2), ArgumentError, "sinks: got 4; accepted: an integer from 0 to the window"),
        (("--memory", "1KiB", "--kv", "int8"), BudgetExceeded, "budget 1,024 bytes; needed"),
        (("--kv", "int3"), ArgumentError, "format: got 'int3'; accepted: float32, "),
        (("--set", "budget=1MiB"), ArgumentError, "set: got 'budget=1MiB'; accepted: nothing with"),
        (
            ("--policy", "dynamic", "--set", "mass=much"),
            ArgumentError,
            "set mass: got 'much'; accepted: a number",
        ),
        (("--policy", "dynamic", "--set", "size=1"), ArgumentError, "accepted: minimum=..., mass="),
        (("--on-drift", "stop"), ArgumentError, "on-drift: got stop; accepted: --tolerance beside"),
        (
            ("--tolerance", 1, "--on-drift", "cry"),
            ArgumentError,
            "tolerance action: got 'cry'; accepted: refine or stop",
        ),
        (("--save-state", "/dev/full"), ArgumentError, "save-state: got /dev/full; accepted: a fi"),
        (("--report", "/dev/full"), ArgumentError, "report: got /dev/full; accepted: a file, not"),
        (("--save-state", folder), ArgumentError, "accepted: a file, not a folder or a device"),
        (("--save-state", folder / "no" / "x"), ArgumentError, "in a folder that exists"),
    ):
        with pytest.raises(error, match=message):
            raise run(text, *arguments, "--model", model).exception
    assert Path("/dev/full").is_char_device()


def test_a_family_that_cannot_stream_is_refused_with_the_reason(text: Path, tmp_path: Path) -> None:
    config = hf.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_byte_tokenizer(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="cannot stream: it has 32 learned positions"):
        raise run(text, "--model", tmp_path / "gpt2").exception


def test_states_that_are_not_whole_or_not_its_own_are_refused(
    model: str, text: Path, tmp_path: Path
) -> None:
    state, other = tmp_path / "state", tmp_path / "other"
    run(text, "--model", model, "--window", 40, "--limit", 50, "--save-state", state)
    whole = state.read_bytes()
    write_tiny_model(other, seed=1)
    for content, using, message in (
        (whole[: len(whole) // 2], model, "is not the whole state of a session"),
        (whole[:-1], model, "is not the whole state of a session"),
        (whole, other, "is of another model"),
        (whole.replace(b'session":"2"', b'session":"1"'), model, "is of version 1; this foveal"),
    ):
        state.write_bytes(content)
        with pytest.raises(LoadError, match=message):
            raise run(text, "--model", using, "--load-state", state).exception
        assert state.read_bytes() == content


def test_a_saved_state_goes_on_in_another_format(model: str, text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(text, "--model", model, "--window", 64, "--limit", 200, "--save-state", state)
    more = ("--load-state", state, "--kv", "int8", "--window", 48, "--json")
    found = json.loads(run(text, "--model", model, *more).stdout)
    assert found["config"]["kv"] == "int8" and found["config"]["window"] == 48
    assert found["stream"]["tokens"] == 200 + len(text.read_bytes())


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
from foveal.cli.main import main
main()
"""


def test_a_full_disk_loses_neither_what_was_there_nor_what_was_measured(
    model: str, text: Path, tmp_path: Path
) -> None:
    state, page = tmp_path / "state", tmp_path / "page.html"
    run(text, "--model", model, "--window", 64, "--limit", 200, "--save-state", state)
    page.write_text("the report of yesterday")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, "stream", str(text), "--model", model, "--json"]
    command += ["--load-state", str(state), "--save-state", str(state), "--report", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"path: got {state}; accepted: a file that can be written" in " ".join(
        done.stderr.split()
    )
    assert json.loads(done.stdout)["stream"]["tokens"] == 200 + len(text.read_bytes())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
from foveal.engine.llm import LLM
from foveal.engine.session import Session

path, llm, rng = Path(sys.argv[1]), LLM(sys.argv[2]), random.Random(0)
session = Session(llm, window=20)
session.feed("x")
for round in range(8):
    session.save(path)
    born = path.stat().st_mtime_ns
    child = os.fork()
    while not child:
        session.feed("x")
        session.save(path)
    while path.stat().st_mtime_ns == born:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = Session.load(path, llm)
    assert loaded.num_tokens > session.num_tokens
    session = loaded
"""


def test_a_kill_at_any_moment_leaves_a_state(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path / "state"), model]
    subprocess.run(command, check=True)


def test_a_tolerance_refines_and_says_so(model: str, tmp_path: Path) -> None:
    text = tmp_path / "long"
    text.write_text("".join(chr(33 + (i * i) % 90) for i in range(4700)))
    options = (text, "--model", model, "--window", 64, "--kv", "int4", "--tolerance", 1e-9)
    found = run(*options)
    assert found.exit_code == 0
    assert "nats from the reference, at most" in found.stdout
    assert ": refined to int8" in found.stdout and "tolerance: looked at 1 times" in found.stdout
    assert "a reference of " in found.stderr
    state = tmp_path / "state"
    stopped = run(*options, "--on-drift", "stop", "--json", "--save-state", state)
    assert isinstance(stopped.exception, DriftExceeded)
    document = json.loads(stopped.stdout)
    (look,) = document["stream"]["drift"]["looks"]
    assert look["outcome"] == "stopped" and look["kl_mean"] > 1e-9
    assert document["next_byte"] is None and "the tolerance is 1e-09" in document["failure"]
    assert Session.load(state, LLM(model)).num_tokens == look["position"]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_the_bar_fits_the_terminal_with_whole_facts(model: str, text: Path, width: int) -> None:
    shown = io.StringIO()
    console, llm = Console(file=shown, force_terminal=True, width=width), LLM(model)
    with opening.open_source(str(text), 0) as source:
        reading.read(Session(llm), llm, source, offset=0, limit=None, console=console)
    last = shown.getvalue().split("\x1b[2K")[-1]
    visible = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", last).strip("\n")
    assert len(visible) <= width and "…" not in visible
    assert "1,361 tokens" in visible and "━" in visible
    assert ("cache" in visible) == (width > 80)
