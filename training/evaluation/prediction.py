"""Asking the checkpoints: slides stream through, only small arrays stay."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training.evaluation import networks
from training.evaluation.assignment import Assignment
from training.evaluation.candidates import Candidate, Model
from training.evaluation.networks import Answer, Network
from training.evaluation.sources import CutSlide, Places, Source, cut_ahead


@dataclasses.dataclass(frozen=True)
class SlideAnswer:
    """What a model says of a slide.

    Attributes:
        candidates: who was asked; `probabilities_K` is the mean over them.
        tiles: what the first of them told about tiles.
        slide: as the first of them was given it, without the bytes of its tiles.
    """

    record: SlideRecord
    candidates: tuple[Candidate, ...]
    probabilities_K: NDArray[np.float64]
    tiles: Answer
    slide: CutSlide

    @property
    def places(self) -> Places | None:
        """Of the tiles in `tiles.rows_T`; None where tiles came ready cut."""
        return None if self.slide.places is None else self.slide.places[self.tiles.rows_T]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Everything that was answered.

    Attributes:
        of_model: model name -> answers in the order of the labels; the same slides for every model.
        bad: image_id -> reason, slides that could not be answered by all.
        fingerprint: SHA-256 of the slides that were answered and their tiles; order does not matter.
        batch_tiles: the largest batch of each checkpoint.
    """

    of_model: dict[str, list[SlideAnswer]]
    bad: dict[str, str]
    fingerprint: str
    batch_tiles: dict[str, int]


def predict(
    models: Sequence[Model],
    assignment: Assignment,
    source: Source,
    *,
    device: torch.device,
    batch_tiles: int | None = None,
) -> Predictions:
    """Ask every checkpoint for its slides. Weights are loaded when they are first needed and dropped after their last slide.

    Raises:
        CheckpointError: as `training.checkpoint.load`.
    """
    of_slide: dict[tuple[str, str], tuple[Answer, CutSlide]] = {}
    bad: dict[str, str] = {}
    digests: dict[str, bytes] = {}
    batches: dict[str, int] = {}
    asked = {record.image_id: _asked(models, assignment, record.image_id) for record in assignment.records}
    # Slides with the same checkpoints follow each other, so that no more weights than needed are in memory.
    groups: dict[tuple[str, ...], list[SlideRecord]] = {}
    for record in assignment.records:
        groups.setdefault(tuple(one.name for one in asked[record.image_id]), []).append(record)
    loaded: dict[str, Network] = {}
    with tqdm(total=len(assignment.records), desc="slides", unit="slide", file=sys.stderr) as bar:
        for names, records in groups.items():
            candidates = asked[records[0].image_id]
            loaded = {name: network for name, network in loaded.items() if name in names}
            for one in candidates:
                if one.name not in loaded:
                    loaded[one.name] = networks.load(one, device, batch_tiles)
                    batches[one.name] = loaded[one.name].batch_tiles
            before = bar.n
            for number, (spec, sharing) in enumerate(_cuts(candidates)):
                count = max(loaded[one.name].batch_tiles for one in sharing)
                for portion in _portions(cut_ahead(source, records, spec), count, bad):
                    for one in sharing:
                        answers = loaded[one.name].answers(portion)
                        for slide, answer in zip(portion, answers, strict=True):
                            if isinstance(answer, str):
                                bad.setdefault(slide.record.image_id, answer)
                            else:
                                bare = dataclasses.replace(slide, tiles=())  # its bytes are not kept
                                of_slide[one.name, slide.record.image_id] = (answer, bare)
                    for slide in portion:
                        if slide.record.image_id not in digests:
                            digests[slide.record.image_id] = slide.fingerprint()
                    if number == 0:
                        bar.update(len(portion))
            bar.update(before + len(records) - bar.n)
    answered = [record for record in assignment.records if record.image_id not in bad]
    return Predictions(
        {
            model.name: [
                _mean(record, assignment.answering[model.name][record.image_id], of_slide)
                for record in answered
            ]
            for model in models
        },
        bad,
        hashlib.sha256(b"".join(sorted(digests[record.image_id] for record in answered))).hexdigest(),
        batches,
    )


def _asked(models: Sequence[Model], assignment: Assignment, image_id: str) -> list[Candidate]:
    found = {one.name: one for model in models for one in assignment.answering[model.name][image_id]}
    return list(found.values())


def _cuts(candidates: Sequence[Candidate]) -> list[tuple[ModelSpec, list[Candidate]]]:
    """Candidates that are given the same tiles share one cutting."""
    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for one in candidates:
        spec = one.spec
        key = (
            spec.tile_size_px,
            spec.um_per_px,
            spec.tiles_per_slide,
            spec.min_tissue_share,
            spec.jpeg_quality,
        )
        groups.setdefault(key, []).append(one)
    return [(sharing[0].spec, sharing) for sharing in groups.values()]


def _portions(
    slides: Iterator[tuple[SlideRecord, CutSlide | str]], tiles: int, bad: dict[str, str]
) -> Iterator[list[CutSlide]]:
    """Slides until they hold `tiles` tiles: small ones fill a batch together, a large one is alone in its portion."""
    portion: list[CutSlide] = []
    for record, slide in slides:
        if isinstance(slide, str):
            bad.setdefault(record.image_id, slide)
            continue
        portion.append(slide)
        if sum(len(one.tiles) for one in portion) >= tiles:
            yield portion
            portion = []
    if portion:
        yield portion


def _mean(
    record: SlideRecord,
    candidates: tuple[Candidate, ...],
    of_slide: dict[tuple[str, str], tuple[Answer, CutSlide]],
) -> SlideAnswer:
    answers = [of_slide[one.name, record.image_id] for one in candidates]
    mean_K = np.mean([answer.probabilities_K for answer, _ in answers], axis=0)
    return SlideAnswer(record, candidates, mean_K, *answers[0])
