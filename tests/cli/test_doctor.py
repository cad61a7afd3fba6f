"""`foveal doctor`, `backends` and `tune`, as a person and as a script would call them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveal.attention.capabilities import PROBES
from foveal.attention.catalogue import BACKENDS
from foveal.cli.main import app
from foveal.core.errors import ArgumentError, BudgetExceeded
from foveal.hardware import calibrate as calibration
from foveal.hardware.detect import detect
from tiny import write_tiny_model


def run(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*words: str) -> Any:
    return json.loads(run(*words, "--json"))


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_doctor_tells_what_is_here_and_what_is_missing() -> None:
    document = run_json("doctor")
    assert document["machine"]["cpu_name"] == detect().cpu_name
    assert document["machine"]["fingerprint"] == detect().fingerprint
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["PyTorch"]["detail"].startswith(torch.__version__)
    assert not checks["calibration (cpu)"]["present"]
    assert checks["calibration (cpu)"]["remedy"].startswith("foveal doctor --calibrate")
    assert (checks["tuning table"]["present"], checks["tuning table"]["remedy"]) == (
        False,
        "foveal tune",
    )
    text = run("doctor")
    assert detect().cpu_name in text
    assert "nominal: " in text
    assert "measured" not in text


def test_doctor_calibrates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BUDGET_S", 0.1)
    document = run_json("doctor", "--calibrate")
    rates = document["rates"]["cpu"]
    assert rates["peaks"]["source"].startswith("measured ")
    assert rates["nominal"]["source"].startswith("nominal: ")
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["calibration (cpu)"]["present"]
    text = run("doctor")
    assert "measured" in text
    assert "nominal" in text


def test_doctor_fits_a_terminal() -> None:
    assert max(map(len, run("doctor").splitlines())) <= 80


def test_backends_says_what_refuse_says() -> None:
    able = run_json("backends")["capabilities"]
    assert set(able) == {backend.name for backend in BACKENDS}
    for backend in BACKENDS:
        for probe in PROBES:
            refusals = backend.refuse(probe.spec, probe.workload, detect())
            assert able[backend.name][probe.name] == (list(refusals) or True)
    text = run("backends")
    for probe in PROBES:
        assert probe.name in text
    assert max(map(len, text.splitlines())) <= 80


def test_backends_chooses_for_a_call() -> None:
    words = ("backends", "--heads", "8", "--kv-heads", "2", "--head-dim", "32", "--q-len", "1")
    words += ("--kv-len", "500", "--dtype", "bf16", "--window", "100", "--sinks", "4")
    choice = run_json(*words)["choice"]
    assert choice["spec"] == "8/2 heads of 32, causal, window 100, sinks 4"
    assert choice["workload"] == "B=1 Lq=1 Lk=500, bfloat16 on cpu"
    assert choice["backend"] in {c["name"] for c in choice["candidates"] if not c["refusals"]}
    text = run(*words)
    assert choice["reason"] in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_backends_refuses_in_words() -> None:
    def fails(error: type[Exception], *words: str) -> None:
        with pytest.raises(error):
            CliRunner().invoke(app, ["backends", *words], catch_exceptions=False)

    fails(ArgumentError, "--backend", "fastest")
    fails(ArgumentError, "--kv-heads", "3")
    fails(ArgumentError, "--memory-budget", "much")
    fails(ArgumentError, "--dtype", "int3")
    fails(BudgetExceeded, "--memory-budget", "1", "--backend", "unfused")


def test_tune_files_what_backends_then_uses() -> None:
    words = ("--heads", "2", "--head-dim", "16", "--kv-len", "20", "--q-len", "1")
    (tuned,) = run_json("tune", *words, "--budget", "0.1")
    assert tuned["workload"] == "B=1 Lq=1 Lk=20, float32 on cpu"
    for time in tuned["times"].values():
        assert len(time["seconds"]) == len(time["others"]) >= 1
    choice = run_json("backends", *words)["choice"]
    fastest = min(tuned["times"], key=lambda name: tuned["times"][name]["median_s"])
    assert choice["backend"] == fastest
    assert choice["candidates"][0]["basis"] == "measured"
    table = {check["name"]: check for check in run_json("doctor")["checks"]}["tuning table"]
    assert table["present"]


def test_tune_prints_a_table() -> None:
    text = run("tune", "--heads", "2", "--head-dim", "16", "--kv-len", "20", "--budget", "0.1")
    assert "2 heads of 16, causal" in text
    assert max(map(len, text.splitlines())) <= 80


def test_tune_measures_the_calls_of_a_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tuned = run_json("tune", "--model", str(tmp_path), "--dtype", "bf16", "--budget", "1")
    assert [result["workload"] for result in tuned] == [
        "B=1 Lq=128 Lk=128, bfloat16 on cpu",
        "B=1 Lq=1 Lk=128, bfloat16 on cpu, with kv_positions, q_positions",
    ]
    with pytest.raises(ArgumentError, match="--model"):
        run("tune", "--model", str(tmp_path), "--heads", "3")


@pytest.mark.parametrize("command", ["doctor", "backends", "tune"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: foveal {command}" in run(command, "--help")
