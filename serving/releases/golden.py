"""Holding what a server answers against the golden examples of a release, which PyTorch answered when it was exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from serving.releases.errors import BadRelease, WrongAnswer
from serving.releases.server import Server

EXAMPLES = 32
"""More golden examples than these are not asked again: the exporter has compared them all through a server."""
SUM_TOLERANCE = 1e-3


class Golden:
    """The golden examples of a release, and how close to them each public model has to answer.

    Args:
        directory: holds `release.json` and `golden/`.
        manifest: content of that release.json.

    Raises BadRelease if the examples cannot be used.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._manifest = manifest
        folder = directory / "golden"
        try:
            told = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
            self.class_names = list(map(str, told["class_names"]))
            entries = told["items"][:EXAMPLES]
            self._examples = [
                (
                    [(folder / path).read_bytes() for path in entry.get("paths") or [entry["path"]]],
                    np.asarray(entry["probabilities"], dtype=np.float64),
                    str(entry["image_id"]),
                )
                for entry in entries
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRelease(f"{folder} has no usable golden examples: {error!r}; export again.") from error
        if not self._examples:
            raise BadRelease(f"{folder} has no golden example; export again.")

    @classmethod
    def of(cls, directory: Path) -> Golden:
        """The examples beside a release.json."""
        try:
            manifest = json.loads((directory / "release.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadRelease(f"{directory / 'release.json'} cannot be read: {error}.") from error
        return cls(directory, manifest)

    def check(
        self,
        server: Server,
        model: str,
        public: str,
        max_batch: int,
        *,
        most: int = EXAMPLES,
        number: int = 1,
    ) -> float:
        """Ask a model for the examples; returns the largest difference of a probability from PyTorch's.

        Args:
            server: where it is loaded.
            model: who is asked, `<public>__r<N>` or the public name itself.
            public: the public model whose tolerance holds.
            max_batch: most tiles in a request; 0 for a model that takes a whole bag.
            most: no more examples than these.
            number: version that has to answer.

        Raises WrongAnswer naming the example and both answers.
        """
        worst = 0.0
        for tiles, expected_K, image_id in self._examples[:most]:
            got_K = self._ask(server, model, tiles, max_batch, number)
            if (
                got_K.shape != expected_K.shape
                or abs(got_K.sum() - 1) > SUM_TOLERANCE
                or not np.isfinite(got_K).all()
            ):
                raise WrongAnswer(
                    f"{model} answers golden example {image_id} with {got_K.tolist()}, which are not "
                    f"{len(expected_K)} probabilities."
                )
            if self._proven_by_examples(public, tiles, max_batch):
                difference = float(np.abs(got_K - expected_K).max())
                worst = max(worst, difference)
                if difference > self._tolerance(public):
                    raise WrongAnswer(
                        f"{model} answers golden example {image_id} with {np.round(got_K, 5).tolist()}, PyTorch with "
                        f"{np.round(expected_K, 5).tolist()}: {difference:.2g} apart, and {self._tolerance(public):g} is "
                        "what its format may differ by."
                    )
        if max_batch > 1 and most > 2:
            self._check_batch(server, model, public, max_batch, number)
        return worst

    def _check_batch(self, server: Server, model: str, public: str, max_batch: int, number: int) -> None:
        """The largest batch has to give each tile the answer that it has alone."""
        wanted = [example for example in self._examples if len(example[0]) == 1][:max_batch]
        if len(wanted) < 2:
            return
        tiles = np.array([[example[0][0]] for example in wanted], dtype=np.object_)
        answer, version = server.infer(model, {"tile": tiles})
        _hold_version(model, version, number)
        got_NK = np.asarray(answer["probabilities"], dtype=np.float64)
        expected_NK = np.stack([example[1] for example in wanted])
        if got_NK.shape != expected_NK.shape or not np.abs(got_NK - expected_NK).max() <= self._tolerance(
            public
        ):
            raise WrongAnswer(
                f"{model} answers a batch of {len(wanted)} golden tiles otherwise than PyTorch: {got_NK.tolist()} instead "
                f"of {np.round(expected_NK, 5).tolist()}."
            )

    def _ask(self, server: Server, model: str, tiles: list[bytes], max_batch: int, number: int) -> np.ndarray:
        if max_batch:
            if len(tiles) != 1:
                raise WrongAnswer(f"{model} takes tiles, and the golden examples are bags.")
            inputs = {"tile": np.array([tiles], dtype=np.object_)}
        else:
            inputs = {"tiles": np.array(tiles, dtype=np.object_)}
        answer, version = server.infer(model, inputs)
        _hold_version(model, version, number)
        return np.asarray(answer["probabilities"], dtype=np.float64).reshape(-1)

    def _proven_by_examples(self, public: str, tiles: list[bytes], max_batch: int) -> bool:
        """A slide model of a release of tiles pools tiles: of one tile its answer is that tile's."""
        return bool(max_batch) or self._manifest["kind"] != "tile" or len(tiles) == 1

    def _tolerance(self, public: str) -> float:
        entry = self._manifest["formats"][self._manifest["classifiers"][public]["format"]]
        row = self._manifest["tolerances"].get(entry["precision"])
        if row is None:
            raise BadRelease(
                f"the manifest has no tolerance for {entry['precision']}, the precision of {public}."
            )
        return float(row["max_abs_diff"])


def _hold_version(model: str, version: int, number: int) -> None:
    if version != number:
        raise WrongAnswer(f"{model} was answered by version {version} instead of {number}.")
