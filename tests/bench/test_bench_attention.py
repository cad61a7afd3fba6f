"""The benchmark measures what it says: agreement is checked, reasons are kept, lines are whole."""

import dataclasses
from pathlib import Path

import pytest
import torch

from foveal.attention.backends.flash import Flash
from foveal.attention.catalogue import BY_NAME
from foveal.bench.attention import MOST_SAMPLES, Settings, inputs, measure, thinned
from foveal.bench.grid import QUICK, product
from foveal.bench.record import Cell, Record, Run, read_records
from foveal.hardware.timer import Samples


def cell(length: int = 64, **fields: tuple) -> Cell:
    return product(dataclasses.replace(QUICK, lengths=(length,), **fields))[0]


def test_each_backend_leaves_a_full_record(records: list[Record], settings: Settings) -> None:
    assert [r.backend for r in records[:2]] == ["unfused", "flash"]
    for record in records:
        m = record.measurement
        assert record.outcome == "measured" and m is not None
        assert len(m.samples.seconds) >= settings.min_samples
        assert m.median_s == m.samples.median_s > 0
        assert m.peak_bytes > 0 and m.launches >= 1
        assert m.accuracy.holds and not record.disagrees
        assert record.auto in BY_NAME
        rate = record.cell.rate(m.median_s)
        assert m.fraction_of_limit == pytest.approx(rate / record.cell.limit(record.run.peaks))


def test_records_survive_the_file(records: list[Record], records_path: Path) -> None:
    assert read_records(records_path) == records


def test_a_wrong_backend_is_flagged(
    monkeypatch: pytest.MonkeyPatch, run: Run, settings: Settings
) -> None:
    right = Flash.run

    def wrong(self: Flash, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(self, *arguments)
        return out * 1.0001, lse

    monkeypatch.setattr(Flash, "run", wrong)
    by_name = {r.backend: r for r in measure(cell(), settings, run)}
    assert by_name["flash"].disagrees and not by_name["unfused"].disagrees


def test_refusals_are_recorded_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, run: Run, settings: Settings
) -> None:
    monkeypatch.setattr(Flash, "refuse", lambda *_: ("does not feel like it",))
    found = {r.backend: r for r in measure(cell(32), settings, run)}["flash"]
    assert (found.outcome, found.reason) == ("refused", "does not feel like it")
    assert found.measurement is None


def test_what_would_take_too_long_is_skipped(run: Run) -> None:
    settings = Settings(backends=("unfused",), budget_s=0.1, cap_s=1e-12)
    (found,) = measure(cell(48), settings, run)
    assert found.outcome == "skipped" and "cap 0.001 ns" in found.reason


def test_what_would_not_fit_is_skipped(run: Run) -> None:
    """Scores of a million tokens fit no memory; nothing is allocated to find out."""
    settings = Settings(backends=("unfused",), budget_s=0.1, cap_s=float("inf"))
    (found,) = measure(cell(2**20), settings, run)
    assert found.outcome == "skipped" and found.reason.startswith("workspace")


def test_inputs_are_those_of_the_cell() -> None:
    q, k, v = inputs(cell(32, phases=("decode",), dtypes=(torch.bfloat16,)))
    assert q.shape == (1, 8, 1, 64) and k.shape == v.shape == (1, 2, 32, 64)
    assert q.dtype == torch.bfloat16
    assert torch.equal(inputs(cell(32))[1], inputs(cell(32))[1])


def test_many_samples_are_thinned_evenly() -> None:
    seconds = tuple(float(i) for i in range(1050))
    kept = thinned(Samples(seconds=seconds, others=(0.0,) * 1050))
    assert len(kept.seconds) <= MOST_SAMPLES
    assert kept.seconds == seconds[::11]
    few = Samples(seconds=(1.0, 2.0), others=(0.0, 0.5))
    assert thinned(few) == few
