"""The schedule's shape, and which parameters decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveal.training.config import OptimiserRecipe
from foveal.training.optimiser import build_optimiser, learning_rate
from properties import examples


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@settings(max_examples=examples(50), deadline=None)
@given(progress=st.floats(0, 1.1))
def test_the_rate_stays_between_zero_and_its_peak(schedule: str, progress: float) -> None:
    recipe = OptimiserRecipe(lr=0.01, schedule=schedule, warmup=0.1, decay=0.4)
    assert 0 <= learning_rate(recipe, progress) <= 0.01


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_rises_from_zero_and_ends_at_zero(schedule: str) -> None:
    recipe = OptimiserRecipe(lr=0.01, schedule=schedule, warmup=0.1, decay=0.4)
    assert learning_rate(recipe, 0.0) == 0
    assert learning_rate(recipe, 0.05) == pytest.approx(0.005)
    assert learning_rate(recipe, 0.1) == 0.01
    assert learning_rate(recipe, 1.0) == pytest.approx(0, abs=1e-12)
    late = [learning_rate(recipe, 0.1 + 0.9 * i / 50) for i in range(51)]
    assert late == sorted(late, reverse=True)


def test_wsd_is_flat_until_its_decay() -> None:
    recipe = OptimiserRecipe(lr=0.01, schedule="wsd", warmup=0.1, decay=0.4)
    assert learning_rate(recipe, 0.59) == 0.01
    assert learning_rate(recipe, 0.7) == pytest.approx(0.01 * (1 - (1 - 0.3 / 0.4) ** 0.5))


def test_without_warmup_or_decay_the_rate_is_constant() -> None:
    recipe = OptimiserRecipe(lr=0.01, schedule="wsd", warmup=0, decay=0)
    assert {learning_rate(recipe, p / 10) for p in range(11)} == {0.01}


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    )
    decayed, others = build_optimiser(model, OptimiserRecipe(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 4])]
    assert len(others["params"]) == 4
