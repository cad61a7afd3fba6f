"""`foveal bench`, as a person and as a script would call it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from foveal.attention.backends.flash import Flash
from foveal.attention.catalogue import BY_NAME
from foveal.bench.record import read_records
from foveal.bench.trials import BACKWARD, FORWARD
from foveal.cli.main import app
from foveal.core.errors import ArgumentError, ConfigError, LoadError
from foveal.hardware import calibrate as calibration
from foveal.hardware.detect import detect

TINY = ("attention", "--quick", "--lengths", "16,32", "--backend", "unfused,flash")
NOMINAL = "--no-calibrate"


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words], catch_exceptions=False)


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("foveal.bench.attention.QUICK_BUDGET_S", 0.05)


@pytest.fixture
def wrong_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Flash.run

    def wrong(self: Flash, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(self, *given)
        return out * 1.01, lse

    monkeypatch.setattr(Flash, "run", wrong)


def test_attention_measures_keeps_shows_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "attention.png"
    result = bench(*TINY, NOMINAL, "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "GFLOP/s" in result.stdout and detect().cpu_name in result.stdout
    assert "nominal" in result.stdout
    records = read_records(picture.with_suffix(".jsonl"))
    assert [(r.backend, r.cell.workload.kv_len) for r in records] == [
        ("unfused", 16),
        ("flash", 16),
        ("unfused", 32),
        ("flash", 32),
    ]
    assert records[0].run.settings["grid"] == "quick"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_of_records_is_appended_to_drawn_and_tabled(tmp_path: Path) -> None:
    path, picture = tmp_path / "records.jsonl", tmp_path / "again.svg"
    for length in ("16", "32"):
        bench(*TINY[:2], "--lengths", length, "--backend", "flash", NOMINAL, "--out", str(path))
    assert len(read_records(path)) == 2
    text = bench("table", str(path)).stdout
    assert "| 16 | flash |" in text and "| 32 | flash |" in text
    assert bench("plot", str(path), "-o", str(picture)).exit_code == 0
    assert "<svg" in picture.read_text()
    with pytest.raises(ArgumentError, match="8/2 heads"):
        bench("plot", str(path), "-o", str(picture), "--series", "nothing like it")


def test_json_is_lines_and_nothing_else() -> None:
    lines = bench(*TINY, NOMINAL, "--json").stdout.splitlines()
    documents = [json.loads(line) for line in lines]
    assert [d["backend"] for d in documents] == ["unfused", "flash"] * 2
    assert documents[0]["measurement"]["samples"]["seconds"]


def test_limits_are_measured_first_if_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BUDGET_S", 0.1)
    monkeypatch.setattr(calibration, "READ_BYTES", 2**20)
    result = bench(*TINY[:2], "--lengths", "16", "--backend", "flash", "--json")
    assert json.loads(result.stdout)["run"]["peaks"]["source"].startswith("measured")
    assert calibration.load_calibration(detect()) is not None


@pytest.mark.usefixtures("wrong_flash")
def test_disagreement_is_an_error() -> None:
    result = bench(*TINY, NOMINAL)
    assert result.exit_code == 1
    assert "disagrees with float64: flash" in result.stderr
    assert "✗" in result.stdout


@pytest.mark.usefixtures("wrong_flash")
def test_stability_says_who_breaks_the_promise() -> None:
    result = bench("stability", "--dtype", "float32", "--backend", "unfused,flash")
    assert result.exit_code == 1
    assert "breaks its promise: flash, float32, inputs at 1, forward" in result.stderr
    assert "promise: unfused" not in result.stderr


def test_stability_shows_every_backend_and_trial() -> None:
    result = bench("stability", "--dtype", "bf16")
    assert result.exit_code == 0, result.stderr
    for word in (*FORWARD, *(set(BY_NAME) - {"flex"}), "Stability, bfloat16"):
        assert word in result.stdout
    lines = bench("stability", "--dtype", "bf16", "--backend", "flash", "--json").stdout
    assert len(lines.splitlines()) == len(FORWARD) + len(BACKWARD)
    assert {json.loads(line)["backend"] for line in lines.splitlines()} == {"flash"}


def test_the_budget_ends_the_run() -> None:
    result = bench(*TINY, NOMINAL, "--budget", "0", "--json")
    assert result.stdout == ""
    assert "not reached: 2 of 2 cells; raise --budget" in result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--quick", "--full"), "--quick"),
        (("--lengths", "12,many"), "--lengths"),
        (("--backend", "magic"), "--backend"),
        (("--mask", "diagonal"), "masks"),
        (("--heads", "6", "--kv-heads", "4"), "num_kv_heads"),
        (("--dtype", "int8"), "dtype"),
        (("--device", "abacus"), "device"),
    ],
)
def test_bad_options_are_named(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        bench("attention", *words)


def test_missing_matplotlib_is_said_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'foveal\[plots\]'"):
        bench(*TINY, "--plot", str(tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_record_is_refused_before_measuring(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"benchmark": "other"}\n')
    with pytest.raises(LoadError, match="line 1"):
        bench("table", str(path))
    with pytest.raises(LoadError, match="line 1"):
        bench(*TINY, "--out", str(path))
    with pytest.raises(ConfigError, match="cannot be written"):
        bench(*TINY, "--out", str(path / "below" / "a.jsonl"))
