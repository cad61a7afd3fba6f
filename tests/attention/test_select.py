"""Selection: refusals, budget, measured before estimated, and a memory that is never wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.attention import select
from foveal.attention.api import attend
from foveal.attention.catalogue import BACKENDS, BY_NAME
from foveal.attention.explain import explain
from foveal.attention.select import Choice, choose, weigh
from foveal.attention.spec import Approximation, AttentionSpec
from foveal.attention.table import Measured, bucket_key, load_table, save_table
from foveal.attention.workload import Workload
from foveal.core.errors import ArgumentError, BudgetExceeded, Unsupported
from foveal.hardware import store
from foveal.hardware.detect import detect
from foveal.hardware.profile import Machine
from properties import examples

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, causal=True)
WORKLOAD = Workload(batch=1, q_len=256, kv_len=256, dtype=torch.float32)


def measured(seconds: float, **fields: object) -> Measured:
    plain = {"spread_s": 0.0, "num_samples": 9, "disturbed": False, "date": "2026-01-02"}
    return Measured(median_s=seconds, **{**plain, "shape": str(WORKLOAD), **fields})


def file_times(machine: Machine | None = None, **times: float) -> None:
    key = bucket_key(SPEC, WORKLOAD)
    filed = {name: measured(seconds) for name, seconds in times.items()}
    save_table(machine or detect(), {key: filed})


def standing(choice: Choice) -> dict[str, object]:
    return {c.name: c for c in choice.candidates}


def test_without_measurements_the_lowest_estimate_wins(cache: Path) -> None:
    choice = choose(SPEC, WORKLOAD)
    willing = [c for c in weigh(SPEC, WORKLOAD) if not c.refusals]
    assert choice.name == min(willing, key=lambda c: c.seconds).name
    assert {c.basis for c in willing} == {"estimate"}
    assert choice.chosen.formula in choice.reason
    assert "foveal tune" in choice.reason


@pytest.mark.parametrize("fast", ["unfused", "flash"])
def test_measurements_beat_estimates(cache: Path, fast: str) -> None:
    times = {"unfused": 2e-3, "flash": 2e-3, fast: 1e-3}
    file_times(**times)
    choice = choose(SPEC, WORKLOAD)
    assert choice.name == fast
    assert choice.reason.startswith(f"{fast}: measured 1 ms, against")
    assert f"(2026-01-02, {WORKLOAD})" in choice.reason
    assert choice.chosen.basis == "measured"


def test_an_estimate_never_beats_a_measurement(cache: Path) -> None:
    file_times(unfused=1e3)
    choice = choose(SPEC, WORKLOAD)
    assert choice.name == "unfused"
    assert standing(choice)["flash"].seconds < 1e3
    others = [c.name for c in choice.candidates if c.eligible and c.name != "unfused"]
    assert choice.reason.endswith(f"; not measured: {', '.join(others)}")


def test_a_bucket_serves_its_lengths_and_no_others(cache: Path) -> None:
    file_times(unfused=1e3)
    inside = dataclasses.replace(WORKLOAD, q_len=200, kv_len=200)
    assert choose(SPEC, inside).chosen.basis == "measured"
    for outside in (
        dataclasses.replace(WORKLOAD, kv_len=257),
        dataclasses.replace(WORKLOAD, q_len=128),
        dataclasses.replace(WORKLOAD, q_len=255),
        dataclasses.replace(WORKLOAD, kv_len=255),
        dataclasses.replace(WORKLOAD, batch=2),
        dataclasses.replace(WORKLOAD, dtype=torch.bfloat16),
        dataclasses.replace(WORKLOAD, needs_grad=True),
        dataclasses.replace(WORKLOAD, operands=frozenset({"mask"})),
    ):
        assert choose(SPEC, outside).chosen.basis == "estimate"
    assert choose(SPEC.replace(scale=0.5), WORKLOAD).chosen.basis == "measured"
    assert choose(SPEC.replace(window=(8, None)), WORKLOAD).chosen.basis == "estimate"


def test_new_measurements_are_seen_at_once(cache: Path) -> None:
    file_times(unfused=1e-3, flash=2e-3)
    assert choose(SPEC, WORKLOAD).name == "unfused"
    file_times(unfused=2e-3, flash=1e-3)
    assert choose(SPEC, WORKLOAD).name == "flash"


def test_another_machine_has_another_table(cache: Path) -> None:
    file_times(dataclasses.replace(detect(), cpu_name="another"), unfused=1e-3)
    assert len(list(cache.iterdir())) == 1
    assert choose(SPEC, WORKLOAD).chosen.basis == "estimate"


def test_tables_are_merged_by_bucket(cache: Path) -> None:
    file_times(unfused=1e-3)
    other = bucket_key(SPEC, dataclasses.replace(WORKLOAD, batch=9))
    save_table(detect(), {other: {"flash": measured(1.0)}})
    table = load_table(detect())
    assert table[other] == {"flash": measured(1.0)}
    assert len(table) == 2


@pytest.mark.parametrize("damage", ["cut", "foreign", "format", "shape"])
def test_a_table_that_cannot_be_trusted_is_ignored_and_said_once(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file_times(unfused=1e-3)
    (path,) = cache.iterdir()
    content = json.loads(path.read_text())
    if damage == "cut":
        text = path.read_text()[:-9]
    elif damage == "shape":
        text = json.dumps(content | {"buckets": {"x": {"unfused": {"seconds": 1}}}})
    else:
        changed = {"foreign": {"foveal": "0.0.0"}, "format": {"format": 99}}[damage]
        text = json.dumps(content | changed)
    path.unlink()
    store.write_text(path, text)
    for length in (200, 201):
        workload = dataclasses.replace(WORKLOAD, q_len=length, kv_len=length)
        assert choose(SPEC, workload).chosen.basis == "estimate"
    (record,) = caplog.records
    assert "ignored" in record.message
    assert "foveal tune" in record.message


def test_the_budget_excludes(cache: Path) -> None:
    needs = {c.name: c.workspace_bytes for c in weigh(SPEC, WORKLOAD) if not c.refusals}
    small, large = sorted(needs, key=needs.__getitem__)[:: len(needs) - 1]
    assert needs[small] < needs[large]
    file_times(**{small: 1.0, large: 1e-3})
    assert choose(SPEC, WORKLOAD, memory_budget=needs[large]).name == large
    choice = choose(SPEC, WORKLOAD, memory_budget=needs[large] - 1)
    assert choice.name != large
    assert not standing(choice)[large].fits
    assert "over the memory budget" in str(choice)
    with pytest.raises(BudgetExceeded) as error:
        choose(SPEC, WORKLOAD, memory_budget=min(needs.values()) - 1)
    assert error.value.needed_bytes == needs
    with pytest.raises(BudgetExceeded):
        choose(SPEC, WORKLOAD, backend=large, memory_budget=needs[large] - 1)


def test_by_name(cache: Path) -> None:
    for name in ("unfused", "flash"):
        choice = choose(SPEC, WORKLOAD, backend=name)
        assert choice.name == choice.backend.name == name
        assert "asked for by name" in choice.reason


def test_unknown_name() -> None:
    with pytest.raises(ArgumentError, match=r"backend: got 'fast'; accepted: auto, unfused"):
        choose(SPEC, WORKLOAD, backend="fast")


@pytest.mark.parametrize(
    "approximation", [a for a in Approximation if a is not Approximation.EXACT]
)
def test_what_all_refuse_is_unsupported_with_every_reason(approximation: Approximation) -> None:
    spec = SPEC.replace(approximation=approximation)
    with pytest.raises(Unsupported) as error:
        choose(spec, WORKLOAD)
    assert set(error.value.reasons) == set(BY_NAME)
    assert all(error.value.reasons.values())
    with pytest.raises(Unsupported) as error:
        choose(spec, WORKLOAD, backend="unfused")
    assert set(error.value.reasons) == {"unfused"}


def test_refusals_are_carried(cache: Path) -> None:
    """Every backend that refuses anything at all stands in the choice with its reasons."""
    workload = dataclasses.replace(WORKLOAD, operands=frozenset({"bias", "bias_grad"}))
    choice = choose(SPEC.replace(softcap=3.0, dropout=0.5), workload)
    for backend in BACKENDS:
        expected = backend.refuse(choice.spec, workload, detect())
        assert standing(choice)[backend.name].refusals == expected
        for reason in expected:
            assert reason in str(choice)
    data = json.loads(json.dumps(choice.to_dict()))
    assert {c["name"]: tuple(c["refusals"]) for c in data["candidates"]} == {
        c.name: c.refusals for c in choice.candidates
    }


@pytest.mark.parametrize("fields", [{}, {"softcap": 2.0}, {"window": (3, None)}], ids=str)
def test_candidates_stand_in_the_order_that_is_promised(cache: Path, fields: dict) -> None:
    spec = SPEC.replace(**fields)
    needs = [c.workspace_bytes for c in weigh(spec, WORKLOAD) if not c.refusals]
    for budget in (None, min(needs), max(needs)):
        choice = choose(spec, WORKLOAD, memory_budget=budget)
        classes = [(bool(c.refusals), not c.fits) for c in choice.candidates]
        assert classes == sorted(classes)
        eligible = [c.seconds for c in choice.candidates if c.eligible]
        assert eligible == sorted(eligible)
        assert choice.chosen is choice.candidates[0]


lengths = st.integers(0, 2100)
changes = (
    {},
    {"causal": False},
    {"window": (7, None), "sinks": 2},
    {"softcap": 2.0},
    {"chunk": 64},
)
specs = st.sampled_from([SPEC.replace(**fields) for fields in changes])


@settings(max_examples=examples(80), deadline=None)
@given(calls=st.lists(st.tuples(specs, lengths, lengths, st.booleans()), max_size=6))
def test_what_is_remembered_is_what_is_weighed_anew(calls: list) -> None:
    for spec, q_len, kv_len, square in calls:
        workload = dataclasses.replace(WORKLOAD, q_len=q_len, kv_len=q_len if square else kv_len)
        choose(spec, workload)
        remembered = choose(spec, workload)
        select._choose.cache_clear()
        assert remembered == choose(spec, workload)
        assert set(remembered.candidates) == set(weigh(spec, workload))
        refuse = remembered.backend.refuse(spec, workload, detect())
        assert refuse == ()


def test_a_hit_costs_microseconds(cache: Path) -> None:
    choose(SPEC, WORKLOAD)
    before = select._choose.cache_info()
    for _ in range(100):
        choose(SPEC, dataclasses.replace(WORKLOAD))
    after = select._choose.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (100, 0)


def test_explain_is_what_attend_does(cache: Path) -> None:
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    choice = explain(q, k, k, SPEC, kv_lengths=torch.tensor([5]))
    assert choice.workload.operands == {"kv_lengths"}
    expected = attend(q, k, k, SPEC, backend=choice.name, kv_lengths=torch.tensor([5]))
    assert torch.equal(attend(q, k, k, SPEC, kv_lengths=torch.tensor([5])), expected)
    with pytest.raises(ArgumentError, match="kv_lengths"):
        explain(q, k, k, SPEC, kv_lengths=torch.tensor([99]))
    assert explain(q, k, k).spec == AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16)
