"""The [bags] table of a recipe: how slides become bags, and what learns from them."""

from __future__ import annotations

from typing import Any, Literal

import pydantic


class BagOptions(pydantic.BaseModel):
    """How slides become bags of tiles, and what learns from them. Unknown keys are errors, types are not guessed.

    Attributes:
        tiles: tiles a bag while training, k; a slide with fewer gives all it has, at least one.
        evaluation_tiles: tiles of the one bag by which a slide is judged; 0 = as many as `tiles`.
        choice: "darkest": the k tiles that absorb most light, every epoch the same; "random": another k each epoch,
            by seed, epoch and slide alone. The bag of an evaluation is fixed: the darkest, or evenly spaced ones.
        pooling: "attention": gated attention (Ilse, Tomczak and Welling 2018); "mean": every tile counts the same.
        encoder: "trained": end to end with the slide labels; "frozen": tiles are embedded once, by the weights that
            the recipe names, kept in a file, and only the head learns.
        encoder_layer: name of the backbone's module whose output, pooled over the tile, is the embedding (for example
            "layer3" of a ResNet: finer detail than the last one); "" = all of the backbone but its classifier.
        tile_pooling: how the map of `encoder_layer` becomes one vector; not used where that is "".
        embedding_dim: the head's first layer (linear, ReLU) brings embeddings down to it; 0 = no such layer.
        attention_dim: width of the gated attention's hidden layer.
        dropout: 0..1, of the embeddings in the head while it learns.
        views: with a frozen encoder, how many differently turned and coloured views of each tile are embedded besides
            the plain one; an epoch shows one of them. 0 = only the plain one.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    tiles: int = pydantic.Field(default=16, ge=1)
    evaluation_tiles: int = pydantic.Field(default=0, ge=0)
    choice: Literal["darkest", "random"] = "darkest"
    pooling: Literal["attention", "mean"] = "attention"
    encoder: Literal["trained", "frozen"] = "trained"
    encoder_layer: str = ""
    tile_pooling: Literal["mean", "max", "mean+max"] = "mean"
    embedding_dim: int = pydantic.Field(default=0, ge=0)
    attention_dim: int = pydantic.Field(default=128, ge=1)
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    views: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _agree(self) -> BagOptions:
        if self.views and self.encoder != "frozen":
            raise ValueError(
                'views are for encoder = "frozen"; a trained encoder sees tiles augmented anyway'
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON types."""
        return self.model_dump()
