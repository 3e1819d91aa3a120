"""The parity gate for slides: embeddings, heads and whole answers against PyTorch, on bags of real tiles.

The reference is `training.mil.checkpoint` (of a tile network, `training.network.ServedNetwork` and the mean) and, for the
combination, `Ensemble.apply` in NumPy; none of them shares code with what is exported.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from exporters.comparison_tiles import Truth
from exporters.errors import GoldenTilesError, ParityError
from exporters.formats.interface import Answer, Runner
from exporters.parity import Parity, compare, one_torch_thread
from exporters.slide.combination import MEMBERS, OUTPUTS, combination_onnx
from exporters.slide.head import ATTENTION, HEAD_OUTPUTS, HeadRunner
from exporters.slide.source import Bag, SlideSource, decoded
from exporters.tolerances import TOLERANCES, Tolerance
from slides.errors import TileDecodeError
from slides.labels import patient_of
from training.ensembles import uncertainty

COMBINATION_TOLERANCE = 1e-6
_RANDOM_ROWS = 64
_NOTHING = "Nothing was published."

SlideAnswer = Mapping[str, np.ndarray]
"""HEAD_OUTPUTS by name."""
AskSlide = Callable[[int], SlideAnswer]
"""Something that answers to bags by their numbers."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Bags, and what PyTorch and NumPy make of them.

    Attributes:
        tiles_NHWC: uint8, the tiles of all bags, one after another.
        starts: where each bag begins, and the end: B + 1 numbers.
        embeddings: of each member FP32 [N, D].
        answers: of each bag.
        truth: of each bag.
    """

    bags: tuple[Bag, ...]
    tiles_NHWC: np.ndarray
    starts: tuple[int, ...]
    embeddings: tuple[np.ndarray, ...]
    answers: tuple[SlideAnswer, ...]
    truth: Truth

    def of_bag(self, values_N: np.ndarray, bag: int) -> np.ndarray:
        """What belongs to a bag's tiles."""
        return values_N[self.starts[bag] : self.starts[bag + 1]]


def reference(source: SlideSource, bags: Sequence[Bag]) -> Reference:
    """What PyTorch answers to bags.

    Raises:
        GoldenTilesError: there is none, or one of its tiles is no image.
        ParityError: a network answers with values that are not finite, or gives every tile the same embedding.
    """
    if not bags:
        raise GoldenTilesError(
            "There are no golden bags, and without real tiles nothing can be compared. Give a tile store with --tiles."
        )
    try:
        tiles = [decoded(bag, source.spec.input_size_px) for bag in bags]
    except TileDecodeError as error:
        raise GoldenTilesError(
            f"A tile of the bags is no image: {error}. Give a tile store with --tiles."
        ) from error
    starts = (0, *np.cumsum([len(part) for part in tiles]).tolist())
    tiles_NHWC = np.concatenate(tiles)
    embeddings = tuple(member.embed(tiles_NHWC) for member in source.members)
    for member, embeddings_ND in zip(source.members, embeddings, strict=True):
        _refuse_constant(member.origin["architecture"], embeddings_ND)
    answers = tuple(
        slide_answer(source, [part[start:end] for part in embeddings])
        for start, end in itertools.pairwise(starts)
    )
    truth = Truth(
        source.spec.class_names,
        tuple(bag.label for bag in bags),
        tuple(bag.image_id for bag in bags),
        tuple(patient_of(bag.image_id) for bag in bags),
    )
    return Reference(tuple(bags), tiles_NHWC, starts, embeddings, answers, truth)


def slide_answer(source: SlideSource, embeddings: Sequence[np.ndarray]) -> SlideAnswer:
    """What PyTorch's heads and NumPy's combination answer to a slide's embeddings, FP32 [T, D] of each member."""
    rows, attentions = [], []
    with one_torch_thread():
        for member, embeddings_TD in zip(source.members, embeddings, strict=True):
            probabilities_K, attention_T = member.pool(embeddings_TD)
            rows.append(probabilities_K[list(member.head.order_K)])
            attentions.append(attention_T)
    weights_M = source.definition.combination.weights_M
    attention_T = np.einsum("m,mt->t", weights_M, np.stack(attentions).astype(np.float64))
    return {**combined(source, np.stack(rows)), ATTENTION: attention_T.astype(np.float32)}


def combined(source: SlideSource, members_MK: np.ndarray) -> dict[str, np.ndarray]:
    """`Ensemble.apply` and the uncertainty of one slide: MEMBERS and `combination.OUTPUTS`."""
    definition = source.definition
    answer_1K = definition.apply(members_MK[:, None])
    unsure = uncertainty.of_members(members_MK[:, None], definition.combination.weights_M, answer_1K)
    probabilities_K = answer_1K[0].astype(np.float32)
    return {
        "probabilities": probabilities_K,
        "confidence": probabilities_K.max(keepdims=True),
        "label_index": answer_1K.argmax(axis=1),
        "entropy": unsure.entropy_N.astype(np.float32),
        "mutual_information": unsure.mutual_information_N.astype(np.float32),
        "std": unsure.std_N.astype(np.float32),
        "answered": definition.answered(answer_1K),
        MEMBERS: members_MK.astype(np.float32),
    }


def check_head(source: SlideSource, run: HeadRunner, expected: Reference) -> dict[str, float]:
    """Heads and combination in this process, on PyTorch's own embeddings: whole bags, one tile, two, and all of them.

    Returns:
        The largest differences found: "probabilities", "attention" and "combination" (the last against `Ensemble.apply`
        on the members' probabilities that the graph itself gives, and on random ones).

    Raises:
        ParityError: naming what differs by more than allowed.
    """
    worst = {"probabilities": 0.0, ATTENTION: 0.0, "combination": _check_combination(source)}
    ends = [
        *itertools.pairwise(expected.starts),
        (0, 1),
        (0, 2),
        (0, expected.starts[-1]),
    ]
    for start, end in dict.fromkeys(ends):
        parts = [part[start:end] for part in expected.embeddings]
        where = f"slide head, {len(parts[0])} tiles"
        ours, theirs = slide_answer(source, parts), _run_head(run, parts, where)
        for problem in slide_problems(theirs, ours, TOLERANCES["fp32"], source.definition):
            raise ParityError(f"{where}: {problem}. {_NOTHING}")
        again = combined(source, theirs[MEMBERS])
        found = float(np.abs(again["probabilities"] - theirs["probabilities"]).max())
        worst["combination"] = max(worst["combination"], found)
        for name in ("probabilities", ATTENTION):
            worst[name] = max(worst[name], float(np.abs(theirs[name] - ours[name]).max()))
    if worst["combination"] > COMBINATION_TOLERANCE:
        raise ParityError(
            f"slide head: the combination differs from Ensemble.apply by {worst['combination']:.3g} (allowed "
            f"{COMBINATION_TOLERANCE:g}). {_NOTHING}"
        )
    return worst


def check_encoders(
    name: str,
    runners: Sequence[Runner],
    head: HeadRunner,
    expected: Reference,
    *,
    max_batch: int,
    precision: str,
) -> tuple[Parity, dict[str, Any]]:
    """A format's encoders in this process at batch 1, 2 and the largest, and the slides' answers from their embeddings.

    Args:
        name: of the format, for errors.
        runners: of each member.

    Returns:
        How closely the slides' answers follow PyTorch (`tiles` counts slides), and the figures of the embeddings.

    Raises:
        ParityError: an answer is missing, of another shape or dtype, not finite, or too far off.
        GoldenTilesError: too few slides for this precision.
    """
    tolerance = TOLERANCES[precision]
    batches = tuple(sorted({size for size in (1, 2, max_batch) if size <= max_batch}))
    measured, figures = [], {"max_relative_diff": 0.0, "least_snr_db": float("inf")}
    for size in batches:
        with one_torch_thread():
            embeddings = [
                _embedded(f"{name}, member {m}", run, expected.tiles_NHWC, size, wanted)
                for m, (run, wanted) in enumerate(zip(runners, expected.embeddings, strict=True))
            ]
        for m, (found, wanted) in enumerate(zip(embeddings, expected.embeddings, strict=True)):
            relative, snr_db = _apart(found, wanted)
            figures["max_relative_diff"] = max(figures["max_relative_diff"], relative)
            figures["least_snr_db"] = min(figures["least_snr_db"], snr_db)
            _hold_embeddings(f"{name}, member {m}, batch {size}", relative, snr_db, tolerance)

        def ask(bag: int, embeddings: Sequence[np.ndarray] = embeddings) -> SlideAnswer:
            return _run_head(head, [expected.of_bag(part, bag) for part in embeddings], name)

        measured.append(compare_slides(f"{name}, encoder batch {size}", ask, expected, precision=precision))
    told = {key: None if np.isinf(value) else float(f"{value:.4g}") for key, value in figures.items()}
    return worst_of(measured, batches), told


def compare_slides(name: str, ask: AskSlide, expected: Reference, *, precision: str) -> Parity:
    """Compare with PyTorch whatever answers to bags, wherever it runs.

    Args:
        name: for the errors.
        ask: number of a bag -> its answer; may raise any error.

    Raises:
        ParityError, GoldenTilesError: as `check_encoders`.
    """
    tolerance = TOLERANCES[precision]

    def answer(rows: np.ndarray) -> Answer:
        (bag,) = rows.tolist()
        theirs = ask(bag)
        for problem in slide_problems(theirs, expected.answers[bag], tolerance):
            raise ParityError(f"{name}, slide {expected.bags[bag].image_id}: {problem}. {_NOTHING}")
        return Answer(*(theirs[output][None] for output in OUTPUTS[:3]))

    ours = [np.stack([entry[output] for entry in expected.answers]) for output in OUTPUTS[:3]]
    return compare(name, answer, Answer(*ours), max_batch=1, precision=precision, truth=expected.truth)


def slide_problems(
    theirs: SlideAnswer, ours: SlideAnswer, tolerance: Tolerance, definition: Any = None
) -> list[str]:
    """What is wrong with one slide's answer but for its probabilities, which `compare` holds; with `definition`, those too."""
    problems = []
    for name in HEAD_OUTPUTS:
        got, wanted = theirs.get(name), ours[name]
        if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
            told = "missing" if got is None else f"{got.dtype} {list(got.shape)}"
            problems.append(f"{name} is {told}, expected {wanted.dtype} {list(wanted.shape)}")
        elif name in ("label_index", "answered"):
            if definition is not None and (got != wanted).any() and not _at_the_limit(ours, definition):
                problems.append(f"{name} is {got.tolist()}, expected {wanted.tolist()}")
        elif not np.isfinite(got).all():
            problems.append(f"{name} is not finite")
        elif name == ATTENTION or definition is not None:
            apart = float(np.abs(got - wanted).max())
            if apart > tolerance.max_abs_diff:
                problems.append(
                    f"{name} differs from PyTorch by up to {apart:.3g} (allowed {tolerance.max_abs_diff:g})"
                )
    return problems


def worst_of(measured: Sequence[Parity], batches: tuple[int, ...]) -> Parity:
    """One figure for all of several comparisons of the same slides."""
    decibels = [entry.log_snr_db for entry in measured if entry.log_snr_db is not None]
    return dataclasses.replace(
        measured[-1],
        batches=batches,
        max_abs_diff=max(entry.max_abs_diff for entry in measured),
        max_log_diff=max(entry.max_log_diff for entry in measured),
        mean_abs_diff=max(entry.mean_abs_diff for entry in measured),
        log_snr_db=min(decibels, default=None),
        label_flips=max(entry.label_flips for entry in measured),
    )


def _at_the_limit(ours: SlideAnswer, definition: Any) -> bool:
    """Whether rounding decides: two classes alike, or one at the threshold of abstention."""
    first, second = np.sort(ours["probabilities"])[::-1][:2]
    limit = definition.abstention.threshold if definition.abstention else None
    near = limit is not None and (np.abs(1 - ours["probabilities"] - limit) < 1e-4).any()
    return bool(first - second < 2e-4 or near)


def _check_combination(source: SlideSource) -> float:
    """The combination alone on random rows, as members of all degrees of certainty would answer."""
    definition = source.definition
    session = onnxruntime.InferenceSession(combination_onnx(definition), providers=["CPUExecutionProvider"])
    shape = (len(definition.members), len(definition.class_names))
    generator = np.random.default_rng(0)
    worst = 0.0
    for row in range(_RANDOM_ROWS):
        spread = (0.05, 0.5, 5.0)[row % 3]
        members_MK = generator.dirichlet(np.full(shape[1], spread), shape[0]).astype(np.float32)
        found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {MEMBERS: members_MK}), strict=True))
        wanted = combined(source, members_MK)
        for name in OUTPUTS:
            if name not in ("label_index", "answered"):
                worst = max(worst, float(np.abs(found[name] - wanted[name]).max()))
            elif (found[name] != wanted[name]).any():
                raise ParityError(
                    f"combination: {name} is {found[name].tolist()}, Ensemble says {wanted[name].tolist()} of "
                    f"{members_MK.tolist()}. {_NOTHING}"
                )
    return worst


def _run_head(run: HeadRunner, embeddings: Sequence[np.ndarray], where: str) -> SlideAnswer:
    try:
        return run(embeddings)
    except Exception as error:  # onnxruntime's errors share no root of their own
        lines = str(error).strip().splitlines() or ["(no message)"]
        raise ParityError(
            f"{where}: the head fails where PyTorch answers ({lines[-1]}). {_NOTHING}"
        ) from error


def _embedded(
    where: str, run: Runner, tiles_NHWC: np.ndarray, size: int, wanted_ND: np.ndarray
) -> np.ndarray:
    found_ND = np.empty_like(wanted_ND)
    for start in range(0, len(tiles_NHWC), size):
        rows = np.arange(start, start + size) % len(tiles_NHWC)
        try:
            (embedding_ND,) = run(np.ascontiguousarray(tiles_NHWC[rows]))
        except Exception as error:  # each runtime has errors of its own
            lines = str(error).strip().splitlines() or ["(no message)"]
            raise ParityError(
                f"{where}, batch {size}: the encoder fails where PyTorch answers ({type(error).__name__}: {lines[-1]}). Is "
                f"its batch dimension frozen? {_NOTHING}"
            ) from error
        if embedding_ND.shape != (size, wanted_ND.shape[1]) or embedding_ND.dtype != np.float32:
            raise ParityError(
                f"{where}, batch {size}: the embedding is {embedding_ND.dtype} {list(embedding_ND.shape)}, expected "
                f"float32 {[size, wanted_ND.shape[1]]}. {_NOTHING}"
            )
        if not np.isfinite(embedding_ND).all():
            raise ParityError(f"{where}, batch {size}: the embedding is not finite. {_NOTHING}")
        found_ND[rows] = embedding_ND
    return found_ND


def _apart(found_ND: np.ndarray, wanted_ND: np.ndarray) -> tuple[float, float]:
    """Largest difference as a share of the largest value, and agreement in decibel."""
    wanted = wanted_ND.astype(np.float64)
    error = found_ND - wanted
    signal, noise = float((wanted - wanted.mean(axis=0)).var()), float((error**2).mean())
    relative = float(np.abs(error).max() / max(np.abs(wanted).max(), 1e-12))
    return relative, 10 * float(np.log10(signal / noise)) if noise and signal else float("inf")


def _hold_embeddings(where: str, relative: float, snr_db: float, tolerance: Tolerance) -> None:
    if tolerance.least_log_snr_db is None and relative > tolerance.max_abs_diff:
        raise ParityError(
            f"{where}: embeddings differ from PyTorch by {relative:.3g} of their largest value (allowed "
            f"{tolerance.max_abs_diff:g}). {_NOTHING}"
        )
    if tolerance.least_log_snr_db is not None and snr_db < tolerance.least_log_snr_db:
        raise ParityError(
            f"{where}: embeddings follow PyTorch's with {snr_db:.1f} dB (at least {tolerance.least_log_snr_db:g}). "
            f"{_NOTHING}"
        )


def _refuse_constant(architecture: str, embeddings_ND: np.ndarray) -> None:
    if not np.isfinite(embeddings_ND).all():
        raise ParityError(
            f"The network itself ({architecture}) answers with values that are not finite on the golden bags; its weights "
            f"are broken. Train again. {_NOTHING}"
        )
    spread = float(np.ptp(embeddings_ND, axis=0).max() / max(np.abs(embeddings_ND).max(), 1e-12))
    if len(embeddings_ND) < 2 or spread <= 1e-3:
        raise ParityError(
            f"The network ({architecture}) makes the same embedding of all {len(embeddings_ND)} tiles of the golden bags "
            f"(they vary by {spread:.3g}), so that a fault of the artefact could not be seen. Is it trained? Otherwise "
            f"give a tile store with --tiles. {_NOTHING}"
        )
