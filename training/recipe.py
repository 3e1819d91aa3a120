"""Recipes: everything that decides a training run, in one TOML file.

A recipe is found by name in `training/recipes/` or by path. Its header comment says on what data it was run, what
it reached, how long it took and on what hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from slides.errors import SpecError
from slides.spec import ModelSpec
from training.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"


def _to_spec(value: object) -> ModelSpec:
    if isinstance(value, ModelSpec):
        return value
    if not isinstance(value, Mapping):
        raise SpecError(f"must be a table, not {type(value).__name__}")
    return ModelSpec.from_dict(value)


class Recipe(pydantic.BaseModel):
    """One training run. Unknown keys are errors, types are not guessed.

    Attributes:
        source: "slides": train/<image_id>.tif are slides, tiles are cut where tissue is; "tiles": train/<image_id>.jpg
            or .png are the tiles themselves.
        spec: what the model expects of its input and how its classes are called.
        architecture: a classification network of torchvision, as `torchvision.models.get_model` names it.
        pretrained: start from torchvision's ImageNet weights (downloaded on first use), not from noise.
        epochs: passes over the training tiles.
        batch_size: tiles a step and process.
        gradient_accumulation_steps: batches whose gradients are added up before the weights move.
        learning_rate: the highest rate, reached after the warm-up, from where it falls to 0 along a half cosine.
        warmup_share: 0..1, share of all steps in which the rate rises from 0.
        weight_decay: AdamW's.
        label_smoothing: 0..1, as in torch.nn.CrossEntropyLoss.
        max_gradient_norm: longer gradients are clipped to it.
        colour_jitter: 0..1, largest relative change of each colour channel and of brightness while training.
        folds: patients are dealt into so many folds, classes evenly.
        held_out_fold: 0..folds-1, the fold that is not trained on.
        seed: of weights, order, augmentation and folds.
        workers: processes that load tiles, a training process; 0 loads in the training process itself.
        mixed_precision: "no", "fp16" or "bf16"; weights and the served network stay FP32.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    source: Literal["slides", "tiles"]
    spec: Annotated[ModelSpec, pydantic.PlainValidator(_to_spec)]
    architecture: str = pydantic.Field(min_length=1)
    pretrained: bool = False
    epochs: int = pydantic.Field(ge=1)
    batch_size: int = pydantic.Field(ge=2)
    gradient_accumulation_steps: int = pydantic.Field(default=1, ge=1)
    learning_rate: float = pydantic.Field(gt=0)
    warmup_share: float = pydantic.Field(default=0.2, ge=0, lt=1)
    weight_decay: float = pydantic.Field(default=0.01, ge=0)
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)
    max_gradient_norm: float = pydantic.Field(default=1.0, gt=0)
    colour_jitter: float = pydantic.Field(default=0.1, ge=0, le=1)
    folds: int = pydantic.Field(ge=2)
    held_out_fold: int = pydantic.Field(default=0, ge=0)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    workers: int = pydantic.Field(default=0, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    @pydantic.field_validator("held_out_fold")
    @classmethod
    def _fold_exists(cls, value: int, info: pydantic.ValidationInfo) -> int:
        folds = info.data.get("folds")
        if folds is not None and value >= folds:
            raise ValueError(f"must be below folds = {folds}")
        return value

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON types, `spec` as a nested object."""
        return {**self.model_dump(exclude={"spec"}), "spec": self.spec.as_dict()}


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a name such as "demo", or the path of a TOML file (it ends in .toml).

    Raises:
        RecipeError: no such recipe, not TOML, or any key unknown, missing or impossible; all of them at once.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in names():
            raise RecipeError(
                f"recipe {str(name_or_path)!r}",
                [f"is not known; there are {', '.join(names())}, or give a .toml file"],
            )
        path = RECIPES_DIR / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(str(path), ["there is no such file"]) from None
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise RecipeError(str(path), [f"cannot be read as TOML: {error}"]) from error
    return from_dict(values, source=str(path))


def from_dict(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe from the JSON types of `Recipe.as_dict`; raises RecipeError as `load` does."""
    try:
        return Recipe.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise RecipeError(source, [_problem(item["loc"], item) for item in error.errors()]) from error


def _problem(location: tuple[int | str, ...], item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key (known: {', '.join(Recipe.model_fields)})"
    if item["type"] == "missing":
        return f"{key}: is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key == "spec" else f"{key}: {message}, not {item['input']!r}"
