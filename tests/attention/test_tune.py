"""Tuning: measures who is willing, files it, and selection then goes by it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from foveal.attention.select import choose, weigh
from foveal.attention.spec import AttentionSpec
from foveal.attention.table import bucket_of, load_table
from foveal.attention.tune import Tuned, grid, tune, tune_one
from foveal.attention.workload import Workload
from foveal.hardware.detect import detect

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, causal=True)
WORKLOAD = Workload(batch=1, q_len=30, kv_len=40, dtype=torch.float32)


def the_willing(tuned: Tuned) -> set[str]:
    """Who should have been measured; compiling flex is too long for these budgets."""
    willing = {c.name for c in weigh(tuned.spec, tuned.workload) if not c.refusals}
    return willing - {"flex"}


def test_selection_goes_by_what_was_measured(cache: Path) -> None:
    tuned = tune_one(SPEC, WORKLOAD, budget_s=0.2)
    assert set(tuned.times) == the_willing(tuned)
    choice = choose(SPEC, WORKLOAD)
    assert choice.chosen.basis == "measured"
    assert choice.name == next(iter(tuned.times))
    assert choice.chosen.seconds == tuned.times[choice.name].median_s > 0
    (filed,) = load_table(detect()).values()
    assert {time.shape for time in filed.values()} == {str(WORKLOAD)}
    json.dumps(tuned.to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"needs_grad": True},
        {"operands": frozenset({"mask"})},
        {"operands": frozenset({"bias", "bias_grad"}), "needs_grad": True},
        {"operands": frozenset({"kv_lengths"}), "dtype": torch.bfloat16},
        {"operands": frozenset({"q_positions", "kv_positions", "sink_logits"})},
        {"q_len": 40, "kv_len": 30},
    ],
    ids=str,
)
def test_every_kind_of_workload_can_be_measured(cache: Path, changes: dict) -> None:
    workload = dataclasses.replace(WORKLOAD, **changes)
    spec = SPEC.replace(dropout=0.1)
    tuned = tune_one(spec, workload, budget_s=0.05)
    assert set(tuned.times) == the_willing(tuned)
    assert choose(spec, workload).chosen.basis == "measured"


def test_what_cannot_fit_or_finish_is_left_out_with_its_reason(cache: Path) -> None:
    huge = dataclasses.replace(WORKLOAD, q_len=2**20, kv_len=2**20)
    tuned = tune_one(SPEC, huge, budget_s=0.1)
    assert tuned.times == {}
    assert "more than half of the free" in tuned.skipped["unfused"]
    assert "too long for the budget" in tuned.skipped["flash"]
    assert load_table(detect()) == {}


def test_who_is_left_out_is_not_measured(cache: Path) -> None:
    tuned = tune_one(SPEC, WORKLOAD, budget_s=0.05, without={"unfused": "it is slow"})
    assert "unfused" not in tuned.times
    assert tuned.skipped["unfused"] == "it is slow"


def test_the_budget_ends_it(cache: Path) -> None:
    calls = [(SPEC, dataclasses.replace(WORKLOAD, kv_len=n)) for n in (32, 64, 128)]
    done = list(tune(calls, budget_s=0.1))
    assert 1 <= len(done) < 3
    assert len(load_table(detect())) == len(done)


@pytest.mark.parametrize("quick", [True, False])
def test_the_grid_has_one_call_for_each_bucket(quick: bool) -> None:
    calls = grid(quick=quick)
    buckets = {(spec, bucket_of(workload)) for spec, workload in calls}
    assert len(buckets) == len(calls) >= 3
    assert {(spec, workload) for spec, workload in calls} == buckets, "shapes stand at the edge"
