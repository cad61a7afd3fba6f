"""Recipes: read, overridden, and refused with the name of what is wrong."""

from pathlib import Path

import pytest

from foveal.core.errors import ConfigError
from foveal.training.config import Recipe


def test_a_recipe_survives_its_own_table() -> None:
    recipe = Recipe.from_dict({"run": {"steps": 7}, "data": {"exclude": ["a", "b"]}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.data.exclude == ("a", "b")


def test_overriding_leaves_the_rest_alone() -> None:
    recipe = Recipe.from_dict({"run": {"seed": 3}})
    changes = {"run_steps": 5, "optimiser_lr": 0.25, "data_context": None, "run_seed": 0}
    recipe = recipe.override(changes)
    assert recipe.run.seed == 0
    assert (recipe.run.steps, recipe.optimiser.lr) == (5, 0.25)
    assert recipe.data == Recipe().data
    assert recipe.run.batch == Recipe().run.batch


def test_a_whole_number_will_do_for_a_real_one() -> None:
    assert Recipe.from_dict({"optimiser": {"clip": 2}}).optimiser.clip == 2.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"runn": {}}, "unknown runn; accepted: model, data, optimiser, run"),
        ({"run": {"stepz": 1}}, r"\[run\] has unknown stepz; accepted: steps"),
        ({"run": 3}, "run is 3; accepted: a table"),
        ({"run": {"steps": 0}}, "run.steps: got 0; accepted: at least 1"),
        ({"run": {"steps": 1.5}}, "run.steps: got 1.5; accepted: a value of type int"),
        ({"run": {"steps": True}}, "run.steps: got True; accepted: a value of type int"),
        ({"run": {"time_limit_s": -1}}, "run.time_limit_s: got -1"),
        ({"optimiser": {"lr": -1}}, "optimiser.lr: got -1.0"),
        ({"optimiser": {"schedule": "step"}}, "optimiser.schedule: got 'step'; accepted: wsd or"),
        ({"optimiser": {"warmup": 0.8, "decay": 0.3}}, "shares of at most 1 together"),
        ({"optimiser": {"beta2": 1.0}}, "optimiser.beta2: got 1.0"),
        ({"data": {"exclude": [1]}}, r"data.exclude: got \[1\]; accepted: a list of strings"),
        ({"data": {"context": 600}}, "data.context: got 600; accepted: 1 to .* = 512"),
        ({"model": {"tied": 1}}, "model.tied: got 1; accepted: a value of type bool"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(table)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Recipe.read(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("run = [")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        Recipe.read(tmp_path / "bad.toml")
