"""training/recipe.py"""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from training import network, recipe
from training.errors import RecipeError


@pytest.mark.parametrize("name", ["bccd", "demo"])
def test_recipes_of_the_package_load_and_their_network_fits(name: str) -> None:
    plan = recipe.load(name)
    assert name in recipe.names()
    network.build(plan.architecture, plan.spec)


def test_file_and_dict_give_the_same_recipe(plan: recipe.Recipe, recipe_file: Path) -> None:
    assert recipe.load(recipe_file) == plan
    assert recipe.from_dict(plan.as_dict()) == plan


def test_all_problems_come_at_once(plan: recipe.Recipe, tmp_path: Path) -> None:
    text = (
        'source = "tapes"\nlearnin_rate = 0.1\nbatch_size = "8"\nepochs = 0\narchitecture = "resnet18"\n'
        "learning_rate = nan\nfolds = 3\nheld_out_fold = 3\nseed = -1\ncolours = 3\n"
        "[spec]\nclass_names = ['one']\ntile_size = 3\n"
    )
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    keys = {problem.split(":")[0] for problem in caught.value.problems}
    wrong = {"source", "batch_size", "epochs", "learning_rate", "held_out_fold", "seed", "spec"}
    assert keys == {*wrong, "learnin_rate", "colours"}
    assert str(path) in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    spec_problem = next(problem for problem in caught.value.problems if problem.startswith("spec"))
    assert "tile_size" in spec_problem


def test_impossible_spec_values_are_named(plan: recipe.Recipe) -> None:
    values = plan.as_dict()
    values["spec"] = {**values["spec"], "um_per_px": -1.0, "input_size_px": 3}
    with pytest.raises(RecipeError, match=r"(?s)input_size_px .*um_per_px"):
        recipe.from_dict(values)


def test_missing_keys_are_named(plan: recipe.Recipe) -> None:
    values = plan.as_dict()
    del values["epochs"], values["spec"]
    with pytest.raises(RecipeError) as caught:
        recipe.from_dict(values)
    assert sorted(caught.value.problems) == ["epochs: is missing", "spec: is missing"]


def test_unknown_name_tells_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"(?s)'dmeo'.*bccd, demo"):
        recipe.load("dmeo")


def test_missing_file_and_no_toml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        recipe.load(tmp_path / "absent.toml")
    (tmp_path / "torn.toml").write_bytes(b"epochs = \xff[")
    with pytest.raises(RecipeError, match="cannot be read as TOML"):
        recipe.load(tmp_path / "torn.toml")


def test_a_recipe_does_not_change(plan: recipe.Recipe) -> None:
    with pytest.raises(pydantic.ValidationError):
        plan.epochs = 4  # type: ignore[misc]
