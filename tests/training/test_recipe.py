"""training/recipe.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from training import network, recipe
from training.errors import RecipeError
from training.recipe import Recipe


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_of_the_package_load_and_their_network_fits(name: str) -> None:
    plan = recipe.load(name)
    assert recipe.from_dict(plan.as_dict()) == plan
    network.build(plan.architecture, plan.spec)


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_of_the_package_name_their_outcome(name: str) -> None:
    comment = [
        line for line in (recipe.RECIPES_DIR / f"{name}.toml").read_text().splitlines() if line[:1] == "#"
    ]
    named = {line[1:].split()[0] for line in comment if line[1:].strip()}
    assert {"Data", "Metric", "Time", "Command", "Commit"} <= named


def test_file_and_dict_give_the_same_recipe(plan: Recipe, recipe_file: Path) -> None:
    assert recipe.load(recipe_file) == plan
    assert recipe.from_dict(plan.as_dict()) == plan


def test_all_problems_come_at_once(plan: Recipe, tmp_path: Path) -> None:
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


def test_impossible_spec_values_are_named(plan: Recipe) -> None:
    values = plan.as_dict()
    values["spec"] = {**values["spec"], "um_per_px": -1.0, "input_size_px": 3}
    with pytest.raises(RecipeError, match=r"(?s)input_size_px .*um_per_px"):
        recipe.from_dict(values)


def test_missing_keys_are_named(plan: Recipe) -> None:
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


BAGS = {"source": "slides", "weights": "imagenet", "bags": {"tiles": 4, "encoder": "frozen"}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schedule": "cyclic"}, 'cycles: must be 1 or more with schedule = "cyclic", not 0'),
        ({"schedule": "cyclic", "cycles": 2, "epochs": 3}, "cycles: must divide epochs = 3, not 2"),
        ({"cycles": 3}, 'cycles: is for schedule = "cyclic", not 3'),
        (
            {"schedule": "cyclic", "cycles": 3, "epochs": 3, "warmup_share": 0.5},
            "warmup_share: must be below 1 / cycles = 0.333, not 0.5",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience: needs validation_share above 0, not 2"),
        (
            {"early_stopping_patience": 2, "validation_share": 0.2, "schedule": "cyclic", "cycles": 1},
            'early_stopping_patience: excludes schedule = "cyclic", whose loss rises at the start of every cycle, not 2',
        ),
        ({"validation_share": 0.6}, "validation_share: Input should be less than or equal to 0.5, not 0.6"),
        (
            {"freeze": ["layer1"]},
            "freeze: needs weights other than \"none\": noise would be frozen, not ['layer1']",
        ),
        (
            {"weights": "imagenet", "freeze": ["*"], "layer_decay": 0.7},
            "layer_decay: must be 1.0 where the backbone is frozen, not 0.7",
        ),
        (
            {**BAGS, "backbone_learning_rate_factor": 0.1},
            "backbone_learning_rate_factor: must be 1.0 where the backbone is frozen, not 0.1",
        ),
        (
            {**BAGS, "freeze": ["layer1"]},
            "freeze: is not for bags.encoder = \"frozen\", which freezes all of the encoder, not ['layer1']",
        ),
        (
            {**BAGS, "mixup_alpha": 0.2},
            "mixup_alpha: must be 0 with [bags], whose tiles have no counterparts to be blended with, not 0.2",
        ),
        (
            {"stain": "macenko"},
            "stain: needs source = \"store\": tiles are normalised when a store is cut, not 'macenko'",
        ),
        (
            {**BAGS, "source": "tiles"},
            'bags: needs source = "slides" or "store": a ready-cut tile is no slide',
        ),
        (
            {**BAGS, "weights": "none"},
            'bags: encoder = "frozen" needs weights other than "none": noise would embed the tiles',
        ),
        (
            {"weights": "resnet18"},
            'weights: must be "none", "imagenet", or a file that ends in .safetensors, .pth, .pt, not \'resnet18\'',
        ),
        ({"pretrained": True}, 'pretrained: is now weights = "imagenet" or weights = "none"'),
        ({"ema_decay": 1.0}, "ema_decay: Input should be less than 1, not 1.0"),
    ],
)
def test_keys_that_exclude_each_other(plan: Recipe, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.from_dict({**plan.as_dict(), **changes})
    assert caught.value.problems == (problem,)


def test_cross_checks_come_with_all_other_problems(plan: Recipe) -> None:
    changes = {"epochs": 0, "early_stopping_patience": 2, "cycles": 1, "freeze": ["conv1"], "colours": 3}
    with pytest.raises(RecipeError) as caught:
        recipe.from_dict({**plan.as_dict(), **changes})
    keys = {problem.split(":")[0] for problem in caught.value.problems}
    assert keys == {*changes}


def test_everything_at_once_is_a_recipe(plan: Recipe) -> None:
    changed = recipe.from_dict(
        {
            **plan.as_dict(),
            "source": "store",
            "stain": "reinhard",
            "stain_augmentation": 0.1,
            "weights": "weights/resnet18.safetensors",
            "epochs": 12,
            "schedule": "cyclic",
            "cycles": 3,
            "validation_share": 0.1,
            "ema_decay": 0.99,
            "freeze": ["conv1", "layer1"],
            "backbone_learning_rate_factor": 0.1,
            "layer_decay": 0.8,
            "class_weights": "none",
            "mixup_alpha": 0.2,
            "channels_last": True,
            "compile": True,
            "sync_batch_norm": True,
            "save_every_s": 0.0,
        }
    )
    assert recipe.from_dict(changed.as_dict()) == changed
    assert changed.freeze == ("conv1", "layer1")


def test_table_of_bags(plan: Recipe, tmp_path: Path) -> None:
    assert "bags" not in plan.as_dict()
    slides = {**plan.as_dict(), "source": "slides"}
    with_bags = recipe.from_dict({**slides, "bags": {"tiles": 5, "choice": "random"}})
    assert recipe.from_dict(with_bags.as_dict()) == with_bags
    assert with_bags.bags is not None
    assert (with_bags.bags.tiles, with_bags.bags.choice) == (5, "random")
    with pytest.raises(
        RecipeError,
        match=r"(?s)bags.pooling: Input should be.*not 'max'.*bags.k: unknown key \(known: tiles,",
    ):
        recipe.from_dict({**slides, "bags": {"k": 5, "pooling": "max"}})


def test_values_told_on_a_command_line(plan: Recipe) -> None:
    values = {**plan.as_dict(), "source": "slides"}
    told = (
        "epochs=7",
        "learning_rate = 1",
        "schedule=cyclic",
        "cycles=7",
        "warmup_share=0.1",
        'freeze=["conv1"]',
    )
    for each in (
        *told,
        "weights=weights/a b.pth",
        "spec.um_per_px=0.25",
        "bags.tiles=3",
        "bags.encoder=trained",
    ):
        recipe.set_value(values, each)
    changed = recipe.from_dict(values)
    assert (changed.epochs, changed.learning_rate, changed.cycles, changed.freeze) == (7, 1.0, 7, ("conv1",))
    assert (changed.weights, changed.spec.um_per_px) == ("weights/a b.pth", 0.25)
    assert changed.bags is not None
    assert changed.bags.tiles == 3
    assert plan.spec.um_per_px == 0.5
    for wrong in ("epochs", "=3", "epochs.more=3", "spec.=1"):
        with pytest.raises(RecipeError, match=r"(?s)--set .*(KEY=VALUE|is no table)"):
            recipe.set_value(plan.as_dict(), wrong)


def test_recipes_are_read_without_torch() -> None:
    code = "import sys; from training import recipe; recipe.load('demo'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_recipe_does_not_change(plan: Recipe) -> None:
    with pytest.raises(pydantic.ValidationError):
        plan.epochs = 4  # type: ignore[misc]
