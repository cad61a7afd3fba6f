"""`foveal stream`, as a user or a script meets it."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveal.cli.main import app
from foveal.core.errors import ArgumentError, BudgetExceeded, LoadError
from foveal.engine.llm import LLM
from foveal.engine.session import Session
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
    path.write_text(LINE * 100)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["stream", *map(str, arguments)])


def test_a_file_is_read_to_its_end_in_fixed_memory(model: str, text: Path) -> None:
    result = run(text, "--model", model, "--window", 40, "--chunk", 64, "--memory", "2MiB")
    assert result.exit_code == 0
    num = len(text.read_bytes()) + 1
    for words in (f"{num:,} tokens in", "tokens/s", "bits per token", "p99", "resident memory: "):
        assert words in result.stdout
    assert f"{num - 44:,} tokens forgotten" in result.stdout
    assert "keeps the first tokens (sinks) and the last ones (window)" in result.stderr
    assert "4 sinks, window 40, in float32: cache" in result.stderr


def test_json_is_one_document_with_what_a_session_finds(model: str, text: Path) -> None:
    options = ("--model", model, "--window", 40, "--policy", "window", "--chunk", 64, "--json")
    found = json.loads(run(text, *options).stdout)
    session = Session(LLM(model), window=40, policy="window", chunk=64)
    bits = session.feed(text.read_text())
    assert found["summary"]["bits_per_token"] == pytest.approx(float(bits.mean()), rel=1e-4)
    assert found["stream"]["tokens"] == found["summary"]["tokens"] == session.num_tokens
    assert found["config"]["sinks"] == 0 and found["next_byte"] == len(text.read_bytes())
    assert found["curve"][-1]["position"] == session.num_tokens
    times = found["summary"]["step_s"]
    assert 0 < times["min"] <= times["p50"] <= times["p99"] <= times["max"]
    assert found["summary"]["resident_bytes"]["last_tenth"] > 10**7


def test_a_limit_is_exact(model: str, text: Path) -> None:
    for limit in (1, 64, 100):
        options = ("--model", model, "--limit", limit, "--chunk", 32, "--json")
        found = json.loads(run(text, *options).stdout)
        assert found["stream"]["tokens"] == limit and found["next_byte"] is None


def test_a_saved_stream_goes_on(model: str, text: Path, tmp_path: Path) -> None:
    whole, first = tmp_path / "whole", tmp_path / "first"
    options = ("--model", model, "--window", 40, "--chunk", 64)
    run(text, *options, "--save-state", whole)
    half = tmp_path / "half"
    cut = len((LINE * 40).encode())
    half.write_bytes(text.read_bytes()[:cut])
    found = json.loads(run(half, *options, "--save-state", first, "--json").stdout)
    assert found["next_byte"] == cut
    later = ("--load-state", first, "--offset", cut, "--save-state", first)
    assert run(text, "--model", model, *later).exit_code == 0
    a, b = (Session.load(path, LLM(model)) for path in (whole, first))
    assert a.num_tokens == b.num_tokens and a.config == b.config
    assert a.next_logits is not None and b.next_logits is not None
    assert torch.allclose(a.next_logits, b.next_logits, atol=2e-3)
    assert a.stats.bits_per_token == pytest.approx(b.stats.bits_per_token, rel=1e-4)


def test_ctrl_c_stops_saves_and_says_how_to_go_on(model: str, tmp_path: Path) -> None:
    state, pipe = tmp_path / "state", tmp_path / "pipe"
    os.mkfifo(pipe)
    program = "from foveal.cli.main import main; main()"
    command = [sys.executable, "-c", program, "stream", str(pipe), "--model", model]
    command += ["--window", "40", "--chunk", "16", "--save-state", str(state), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb", buffering=0) as writer:  # a feed that stays open and falls silent
        writer.write(LINE.encode() * 3)
        unread = b"...."
        while any(unread):
            time.sleep(0.05)
            unread = fcntl.ioctl(writer, termios.FIONREAD, b"....")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    found = json.loads(out)
    assert found["stopped"] and found["next_byte"] == len((LINE * 3).encode())
    assert f"--load-state {state} --offset {found['next_byte']}" in " ".join(error.split())
    assert Session.load(state, LLM(model)).num_tokens == found["next_byte"] + 1


def test_standard_input(model: str) -> None:
    program = "from foveal.cli.main import main; main()"
    command = [sys.executable, "-c", program, "stream", "-", "--model", model, "--json"]
    result = subprocess.run(command, input=LINE.encode() * 5, capture_output=True, check=True)
    assert json.loads(result.stdout)["stream"]["tokens"] == len(LINE.encode()) * 5 + 1
    piped = result.stdout + result.stderr
    assert not any(byte < 32 and byte != 10 for byte in piped), "no control characters in pipes"


def test_text_that_is_not_utf8_says_where_and_loses_nothing(model: str, tmp_path: Path) -> None:
    bad, state = tmp_path / "bad", tmp_path / "state"
    bad.write_bytes(LINE.encode() * 150 + b"caf\xe9 au lait\n")
    result = run(bad, "--model", model, "--window", 40, "--save-state", state)
    assert isinstance(result.exception, ArgumentError)
    place = len(LINE.encode()) * 150 + 3
    assert f"text: got byte 0xe9 at offset {place}; accepted: UTF-8" in str(result.exception)
    assert Session.load(state, LLM(model)).num_tokens > 4000, "the block before it"


def test_a_report_is_one_page_with_three_curves(model: str, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    assert run(text, "--model", model, "--window", 40, "--report", page).exit_code == 0
    html = page.read_text()
    assert html.count("<svg") == 3 and "http://" not in html.split("<svg")[0]
    for name in ("Bits per token", "Milliseconds per token", "Resident memory, MiB"):
        assert f"<h2>{name}</h2>" in html
    drawn = re.findall(r"#[0-9a-f]{6}", "".join(html.split("<svg")[1:]))
    assert not drawn, "every colour is one of the reader's scheme"
    clips = re.findall(r'clipPath id="(\w+)"', html)
    assert len(clips) == len(set(clips)), "no picture clips another"
    assert "window 40, sinks 4, float32" in html and "tokens forgotten" in html
    assert "src=" not in html and "<script" not in html


def test_what_cannot_be_is_refused(model: str, text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(text, "--model", model, "--window", 40, "--limit", 100, "--save-state", state)
    for arguments, error, message in (
        ((tmp_path / "none",), ArgumentError, "FILE: got .* a file that can be read"),
        ((text, "--memory", "1KiB"), BudgetExceeded, "budget 1,024 bytes"),
        ((text, "--memory", "much"), ArgumentError, "memory: got 'much'"),
        ((text, "--policy", "window", "--sinks", 2), ArgumentError, "sinks: got 2"),
        ((text, "--window", 2), ArgumentError, "sinks: got 4; accepted: .* window of 2"),
        ((text, "--load-state", state, "--sinks", 2), ArgumentError, "load-state: got --sinks"),
        ((text, "--load-state", state, "--window", 90), ArgumentError, "has forgotten it"),
        ((text, "--load-state", text), LoadError, "is not the whole state"),
        (("-", "--offset", 3), ArgumentError, "offset: got 3"),
        ((text, "--report", tmp_path / "no" / "out.html"), ArgumentError, "report: got"),
    ):
        with pytest.raises(error, match=message):
            raise run(*arguments, "--model", model).exception


def test_a_dynamic_window_keeps_to_a_time(model: str, text: Path) -> None:
    settings = ("--set", "minimum=16", "--set", "mass=0.9", "--set", "latency=1us")
    options = ("--policy", "dynamic", *settings, "--window", 64, "--chunk", 4, "--json")
    result = run(text, "--model", model, *options)
    found = json.loads(result.stdout)
    assert found["config"]["policy"] == {
        "name": "dynamic",
        "minimum": 16,
        "mass": 0.9,
        "latency": 1e-6,
        "held": None,
    }
    assert found["stream"]["cache"]["maximum"] == 16
    assert "at most 16 tokens" in found["stream"]["remarks"][0]
