"""One small run of the attention benchmark, measured once for all tests that need records."""

import dataclasses
from pathlib import Path

import pytest

from foveal.bench import lines
from foveal.bench.attention import Settings, measure
from foveal.bench.grid import QUICK, one_at_a_time
from foveal.bench.record import Record, Run
from foveal.hardware.detect import detect
from foveal.hardware.peaks import nominal

GRID = dataclasses.replace(QUICK, lengths=(16, 64), phases=("prefill", "decode"))


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(backends=("unfused", "flash"), budget_s=0.05, min_samples=3)


@pytest.fixture(scope="session")
def run() -> Run:
    return Run.now(detect(), nominal(detect()), {"grid": "tiny"})


@pytest.fixture(scope="session")
def records(run: Run, settings: Settings) -> list[Record]:
    return [r for cell in one_at_a_time(GRID) for r in measure(cell, settings, run)]


@pytest.fixture(scope="session")
def records_path(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "attention.jsonl"
    for record in records:
        lines.append(path, record)
    return path
