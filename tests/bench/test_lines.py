"""Records survive the way to disk and back, and what is not a record is refused by name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from foveal.attention.spec import AttentionSpec, alibi_slopes
from foveal.attention.workload import Workload
from foveal.bench import lines
from foveal.bench.record import Cell
from foveal.core.errors import ArgumentError, LoadError


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    sizes: tuple[int, ...]
    pair: tuple[str, float | None]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: dict[str, float]
    some: frozenset[str]
    dtype: torch.dtype
    added_later: int = 7


OUTER = Outer(Inner("a", (1, 2), ("x", None)), {"y": 1.5}, frozenset({"p", "q"}), torch.bfloat16, 3)
CELL = Cell(
    spec=AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        window=(5, None),
        alibi=alibi_slopes(4),
        softcap=3.0,
    ),
    workload=Workload(
        batch=1, q_len=3, kv_len=9, dtype=torch.float16, operands=frozenset({"mask"})
    ),
)


@pytest.mark.parametrize("record", [OUTER, CELL], ids=["generic", "cell"])
def test_there_and_back(tmp_path: Path, record: object) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    lines.append(path, record)
    lines.append(path, record)
    assert lines.read(path, type(record)) == [record, record]
    assert len(path.read_text().splitlines()) == 2


def test_a_field_with_a_default_may_be_missing() -> None:
    content = json.loads(lines.encode(OUTER))
    del content["added_later"]
    assert lines.decode(Outer, json.dumps(content)).added_later == 7


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["inner", "kind"], "c", "Outer.inner.kind"),
        (["inner", "sizes"], [1, "2"], r"Outer.inner.sizes\[1\]"),
        (["inner", "sizes"], [1, True], r"Outer.inner.sizes\[1\]"),
        (["inner", "pair"], ["x"], "Outer.inner.pair"),
        (["names", "y"], None, "Outer.names.y"),
        (["dtype"], "int7", "int7"),
        (["unknown"], 1, "unknown"),
        (["inner"], [], "Outer.inner"),
    ],
)
def test_a_wrong_value_is_named(path: list[str], value: object, named: str) -> None:
    content = json.loads(lines.encode(OUTER))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ArgumentError, match=named):
        lines.decode(Outer, json.dumps(content))


def test_a_missing_field_is_named() -> None:
    content = json.loads(lines.encode(OUTER))
    del content["some"]
    with pytest.raises(ArgumentError, match=r"Outer\.some"):
        lines.decode(Outer, json.dumps(content))


def test_what_json_cannot_hold_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        lines.encode(Inner("a", (), ("x", float("nan"))))


def test_a_line_cut_short_is_reported_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines.append(path, OUTER)
    path.write_text(path.read_text() + '{"inner": {"ki')
    lines.append(path, OUTER)
    with pytest.raises(LoadError, match="line 2"):
        lines.read(path, Outer)
    kept = path.read_text().splitlines()
    assert [lines.decode(Outer, line) for line in (kept[0], kept[2])] == [OUTER, OUTER]


def test_an_absent_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"absent\.jsonl"):
        lines.read(tmp_path / "absent.jsonl", Outer)
