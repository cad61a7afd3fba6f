"""`foveal bench stream`, `bursts` and `kv`, and what `plot` and `table` make of their files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foveal.bench.finding import read_findings
from foveal.cli.main import app
from foveal.core.errors import ArgumentError, LoadError
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> None:
    """Nothing measured on this machine before."""


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)], catch_exceptions=False)


def test_streams_of_several_kinds_are_kept_shown_and_drawn(model: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "deep" / "stream.jsonl", tmp_path / "stream.png"
    options = ("--model", model, "--window", 40, "--chunk", 16, "--tokens", 400, "--out", out)
    result = bench("stream", *options, "--policy", "sinks,window", "--kv", "model,int8")
    assert result.exit_code in (0, 1), result.output
    labels = [finding.label for finding in read_findings(out)]
    assert labels == [
        "sinks, 4+40, float32",
        "sinks, 4+40, int8",
        "window, 0+40, float32",
        "window, 0+40, int8",
    ]
    for words in ("400 tokens of", "resident memory", "tokens per s", "not judged"):
        assert words in result.stdout
    assert "### stream: 400 tokens" in bench("table", out).stdout
    assert bench("plot", out, "-o", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_promise_that_is_broken_is_an_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveal.bench.stream.MEMORY_GROWTH", -1.0)
    options = ("--window", 40, "--chunk", 16, "--tokens", 400, "--out", tmp_path / "s.jsonl")
    result = bench("stream", "--model", model, *options)
    assert result.exit_code == 1 and "DOES NOT HOLD" in result.stderr


def test_every_policy_can_be_streamed(model: str, tmp_path: Path) -> None:
    options = ("--window", 64, "--chunk", 16, "--tokens", 200, "--out", tmp_path / "s.jsonl")
    result = bench("stream", "--model", model, "--policy", "all", *options, "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({one["subject"]["policy"] for one in found}) == len(found) >= 2


def test_bursts_are_kept_shown_and_drawn(model: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "bursts.jsonl", tmp_path / "bursts.svg"
    options = ("--rate", 500, "--burst", 5, "--seconds", 0.1, "--window", 40, "--out", out)
    result = bench("bursts", "--model", model, *options, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "5 tokens at a time, 500 tokens/s for 0.1 s" in result.stdout
    assert read_findings(out)[0].values["tokens"] == 50
    assert "<svg" in picture.read_text()


def test_bursts_come_from_standard_input(model: str, tmp_path: Path) -> None:
    program = "from foveal.cli.main import main; main()"
    command = [sys.executable, "-c", program, "bench", "bursts", "--file", "-", "--model", model]
    command += ["--out", str(tmp_path / "b.jsonl"), "--json"]
    result = subprocess.run(command, input=b"def f():\n" * 5, capture_output=True, check=True)
    found = json.loads(result.stdout)
    assert found["values"]["tokens"] == 45 and "standard input" in found["title"]


def test_parts_of_kv_are_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "kv.jsonl"
    options = ("--capacity", 256, "--samples", 1, "--out", out, "--json")
    for part in ("formats", "append"):
        assert bench("kv", "--part", part, *options).exit_code in (0, 1)
    assert {finding.part for finding in read_findings(out)} == {"formats", "append"}
    picture = tmp_path / "formats.png"
    bench("plot", out, "-o", picture, "--series", "formats")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("stream", "--policy", "magic"), "policy"),
        (("stream", "--tokens", 0), "tokens"),
        (("bursts", "--overflow", "burn"), "overflow"),
        (("bursts", "--rate", 0), "rate"),
        (("kv", "--part", "soul"), "part"),
        (("kv", "--lengths", "many"), "lengths"),
        (("kv", "--cap", "much"), "cap"),
    ],
)
def test_bad_options_are_named(words: tuple[object, ...], named: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=named):
        bench(*words, "--out", tmp_path / "out.jsonl")


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text('{"subject": 1}\n')
    for words in (("table", path), ("kv", "--part", "formats", "--out", path)):
        with pytest.raises(LoadError, match="line 1"):
            bench(*words)
    with pytest.raises(LoadError, match="No such file"):
        bench("table", tmp_path / "none")
