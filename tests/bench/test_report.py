"""Tables and pictures say what the records say, and only that."""

import dataclasses
import io
import struct
from pathlib import Path

import pytest
from rich.console import Console

from foveal.bench import report
from foveal.bench.plots import draw, pick_series
from foveal.bench.record import Measurement, Record, newest, read_records
from foveal.core.errors import ArgumentError
from foveal.hardware.timer import Samples


def measured(record: Record, seconds: float, **fields: object) -> Record:
    """The record, had all its samples taken `seconds`."""
    assert record.measurement is not None
    samples = Samples(seconds=(seconds,) * 5, others=(0.0,) * 5)
    measurement = dataclasses.replace(
        record.measurement, samples=samples, median_s=seconds, spread_s=0.0
    )
    return dataclasses.replace(record, measurement=measurement, **fields)


def prefill(records: list[Record]) -> list[Record]:
    return [r for r in records if not r.cell.decode]


def figures(record: Record) -> Measurement:
    assert record.measurement is not None
    return record.measurement


def test_series_are_ordered_by_length(records: list[Record]) -> None:
    series = report.by_series(reversed(records))
    assert len(series) == 2
    for members in series.values():
        lengths = [r.cell.workload.kv_len for r in members]
        assert lengths == sorted(lengths)


def test_regret_is_the_time_of_the_choice_over_the_best(records: list[Record]) -> None:
    slow, fast = prefill(records)[:2]
    cell = [measured(slow, 0.3, auto="unfused"), measured(fast, 0.1, auto="unfused")]
    keys = slow.cell.workload.kv_len
    assert report.regrets(cell) == {keys: pytest.approx(3.0)}
    rows = report.rows(cell)
    assert [row[-1] for row in rows] == ["→ 3.00×", ""]
    assert [row[2] for row in rows] == ["300", "100"]
    assert report.regrets([dataclasses.replace(r, auto="absent") for r in cell]) == {}


def test_what_disagrees_is_never_best_nor_drawn(records: list[Record], tmp_path: Path) -> None:
    right, wrong = prefill(records)[:2]
    bad = dataclasses.replace(figures(wrong).accuracy, error=None)
    spoilt = dataclasses.replace(
        wrong, measurement=dataclasses.replace(figures(wrong), accuracy=bad)
    )
    assert spoilt.disagrees
    cell = [measured(right, 0.3, auto="unfused"), measured(spoilt, 0.1, auto="unfused")]
    assert report.regrets(cell) == {right.cell.workload.kv_len: 1.0}
    assert "NaN, inf ✗" in report.rows(cell)[1]
    draw(cell, tmp_path / "a.png")


def test_of_two_records_of_a_cell_the_last_counts(records: list[Record]) -> None:
    again = measured(records[0], 123.0)
    assert newest([*records, again])[0] == again
    assert len(newest([*records, again])) == len(records)


def test_markdown_holds_every_record(records_path: Path, records: list[Record]) -> None:
    text = report.markdown(read_records(records_path))
    assert text.count("\n| ") == 2 * 2 + len(records)
    assert records[0].run.machine.cpu_name in text and records[0].run.date in text
    assert "GFLOP/s" in text and "GB/s" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(report.HEADER) - 1}
    assert report.markdown([]) == "No records.\n"


def test_terminal_tables_fit_their_width(records: list[Record]) -> None:
    console = Console(file=io.StringIO(), width=80)
    for table in report.rich_tables(records):
        console.print(table)
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_reasons_are_counted(records: list[Record]) -> None:
    left_out = dataclasses.replace(
        records[0], outcome="skipped", reason="too large", measurement=None
    )
    assert report.reasons([left_out, left_out]) == ["unfused skipped: too large (2 cells)"]
    assert report.rows([left_out])[0][2] == "skipped"


def test_a_picture_is_drawn_from_the_file(records_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    draw(pick_series(read_records(records_path)), target)
    header = target.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1650, 1260)


def test_a_series_is_picked_by_its_words(records: list[Record]) -> None:
    assert {r.cell.decode for r in pick_series(records, "decode")} == {True}
    with pytest.raises(ArgumentError, match="prefill"):
        pick_series(records, "no such words")
    with pytest.raises(ArgumentError, match="file with measurements"):
        pick_series([])


def test_a_picture_shows_one_machine(records: list[Record], tmp_path: Path) -> None:
    members = prefill(records)
    other = dataclasses.replace(members[0].run, fingerprint="0" * 12)
    mixed = [*members, dataclasses.replace(members[0], run=other)]
    with pytest.raises(ArgumentError, match="2 machines"):
        draw(mixed, tmp_path / "a.png")
