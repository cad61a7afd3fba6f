"""Peaks: nominal, measured, and files that must not be trusted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError
from foveal.hardware import store
from foveal.hardware.calibrate import BUSY, calibrate, load_calibration
from foveal.hardware.detect import detect
from foveal.hardware.peaks import nominal, peaks
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Work, roofline


def machine(**facts: object) -> Machine:
    plain = {"instruction_sets": ("avx2", "fma"), "num_physical_cores": 4, "num_threads": 4}
    return dataclasses.replace(detect(), frequency_hz=2e9, **{**plain, **facts})


def test_nominal_peak_is_its_formula() -> None:
    found = nominal(machine())
    assert found.flops(torch.float32) == 4 * 2e9 * 8 * 2 * 2
    assert found.flops(torch.float64) == found.flops(torch.float32) / 2
    assert found.source.startswith("nominal: 4 cores x 2.0 GHz x 8 float32 lanes")


@pytest.mark.parametrize(
    ("sets", "lanes", "speed_of_bfloat16"),
    [
        (("avx2", "avx512f"), 16, 0.25),
        (("avx512f", "avx512_bf16"), 16, 2),
        (("avx512f", "amx_bf16", "avx512_bf16"), 16, 16),
        (("asimd", "bf16"), 4, 2),
        ((), 4, 0.25),
    ],
)
def test_instruction_sets_decide(
    sets: tuple[str, ...], lanes: int, speed_of_bfloat16: float
) -> None:
    found = nominal(machine(instruction_sets=sets))
    assert found.flops(torch.float32) == 4 * 2e9 * lanes * 2 * 2
    assert found.flops(torch.bfloat16) == speed_of_bfloat16 * found.flops(torch.float32)


def test_one_thread_has_one_core() -> None:
    four, one = nominal(machine()), nominal(machine(num_threads=1))
    assert four.flops(torch.float32) == 4 * one.flops(torch.float32)
    assert four.bandwidth_bytes > one.bandwidth_bytes


def test_unknown_device() -> None:
    with pytest.raises(ArgumentError, match="device"):
        peaks(detect(), "tpu")
    with pytest.raises(ArgumentError, match="device"):
        calibrate(detect(), "tpu")


def test_calibration_is_kept_and_used(cache: Path) -> None:
    here = detect()
    assert peaks(here) == nominal(here)
    found = calibrate(here, budget_s=0.1)
    assert found.source.startswith("measured ")
    assert peaks(here) == load_calibration(here) == found
    assert {dtype for dtype, _ in found.matmul_flops} >= {"float32", "bfloat16", "float64"}
    assert 0 < found.overhead_s < 1e-3
    elsewhere = dataclasses.replace(here, cpu_name="another")
    assert peaks(elsewhere) == nominal(elsewhere)
    (path,) = cache.iterdir()
    sample = json.loads(path.read_text())["samples"]["float32"]
    rates = [2 * sample["size"] ** 3 / seconds for seconds in sample["seconds"]]
    assert found.flops(torch.float32) in rates
    assert len(sample["seconds"]) == len(sample["others"]) >= 5


def test_a_busy_machine_does_not_replace_a_quiet_calibration(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveal.hardware.timer.DISTURBED_SHARE", 1.0)
    quiet = calibrate(detect(), budget_s=0.1)
    monkeypatch.setattr("foveal.hardware.timer.DISTURBED_SHARE", -1.0)
    busy = calibrate(detect(), budget_s=0.1)
    assert BUSY in busy.source
    assert peaks(detect()) == quiet


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 0, "foveal": "0"}', "null"],
    ids=["empty", "cut", "list", "no version", "other version", "null"],
)
def test_a_bad_file_is_reported_once_and_ignored(
    cache: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    here = detect()
    cache.mkdir()
    (cache / store.file_name("calibration-cpu", here)).write_text(text)
    assert load_calibration(here) is None
    assert peaks(here) == nominal(here)
    (record,) = caplog.records
    assert "foveal doctor --calibrate" in record.message


@pytest.mark.parametrize(
    "content", [{}, {"peaks": 3}, {"peaks": {"matmul_flops": {"float32": "x"}}}]
)
def test_a_file_with_other_content_is_ignored(
    cache: Path, caplog: pytest.LogCaptureFixture, content: dict
) -> None:
    here = detect()
    store.save(store.file_name("calibration-cpu", here), 1, content)
    assert load_calibration(here) is None
    assert len(caplog.records) == 1


def test_roofline_is_the_larger_of_both_and_the_calls() -> None:
    here = nominal(machine())
    compute = Work(flops=1e12, bytes_moved=1.0, calls=0)
    assert roofline(compute, torch.float32, here).seconds == 1e12 / here.flops(torch.float32)
    memory = Work(flops=1.0, bytes_moved=1e10, calls=2)
    expected = 1e10 / here.bandwidth_bytes + 2 * here.overhead_s
    assert roofline(memory, torch.float32, here).seconds == pytest.approx(expected)
