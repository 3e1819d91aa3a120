"""The parity gate: an artefact is published only if it answers as PyTorch does on real tiles.

The reference is `training.network.ServedNetwork`, which shares no code with `exporters.served_graph`. Both see the
same tiles, decoded by `slides.decode`, at batch 1, 2 and the largest. What is compared, and how closely it must agree
at each precision, is one table: `exporters.tolerances`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from exporters.comparison_tiles import Truth
from exporters.errors import GoldenTilesError, ParityError, ServedError
from exporters.formats.interface import Answer, Runner
from exporters.tolerances import TOLERANCES, Tolerance
from slides.aggregate import slides_to_patients
from training.network import ServedNetwork, TileNetwork
from training.scores import by_slide, roc_auc, weighted_log_loss

_SMALLEST_PROBABILITY = 1e-12
_REFERENCE_BATCH = 16

Ask = Callable[[np.ndarray], Answer]
"""Something that answers to tiles by their numbers, int64 [n]."""


@dataclass(frozen=True)
class Parity:
    """How closely an artefact follows PyTorch.

    Attributes:
        precision: row of the table that it was held to.
        tiles: number of tiles compared at each batch size.
        batches: batch sizes.
        max_abs_diff: largest difference of a probability.
        max_log_diff: largest difference of a probability's natural logarithm.
        mean_abs_diff: mean difference of a probability.
        log_snr_db: see `exporters.tolerances`; None where the artefact agrees to rounding.
        label_flips: tiles whose label differs, at the batch size where most do.
        patients: patients whose true class is known; 0 where the tiles have no labels.
        patient_auc: PyTorch's and the artefact's; None where fewer than two classes occur.
        patient_log_loss: PyTorch's and the artefact's, classes weighted equally; None without labels.
    """

    precision: str
    tiles: int
    batches: tuple[int, ...]
    max_abs_diff: float
    max_log_diff: float
    mean_abs_diff: float
    log_snr_db: float | None
    label_flips: int
    patients: int = 0
    patient_auc: tuple[float, float] | None = None
    patient_log_loss: tuple[float, float] | None = None


def reference_answer(network: TileNetwork, tiles_NHWC: np.ndarray) -> Answer:
    """What PyTorch answers.

    Args:
        network: in evaluation mode, on the CPU.
        tiles_NHWC: uint8 [N, S, S, 3] RGB.

    Raises:
        ParityError: the network answers with values that are not finite, or the same to all tiles: comparing
            with a constant proves nothing.
    """
    served = ServedNetwork(network).eval()
    with one_torch_thread(), torch.inference_mode():
        parts = [served(tiles) for tiles in torch.from_numpy(tiles_NHWC).split(_REFERENCE_BATCH)]
    answer = Answer(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
    if not np.isfinite(answer.probabilities).all():
        raise ParityError(
            "The network itself answers with values that are not finite on the golden tiles; its weights are broken. "
            "Train again. Nothing was published."
        )
    spread = float(np.ptp(_log(answer.probabilities), axis=0).max())
    if spread <= (TOLERANCES["fp32"].max_log_diff or 0.0):
        raise ParityError(
            f"The network gives the same answer to all {len(tiles_NHWC)} golden tiles (logarithms of probabilities "
            f"vary by {spread:.3g}), so that a fault of the artefact could not be seen. Is it trained? Otherwise give "
            "tiles that differ with --tiles. Nothing was published."
        )
    return answer


def check_parity(
    format_name: str,
    run: Runner,
    tiles_NHWC: np.ndarray,
    expected: Answer,
    *,
    max_batch: int,
    precision: str = "fp32",
    truth: Truth | None = None,
) -> Parity:
    """Compare an artefact in this process with PyTorch on all tiles, at batch 1, 2 and `max_batch`.

    Args:
        format_name: for the errors.
        run: the artefact.
        tiles_NHWC: uint8 [N, S, S, 3] RGB; taken again from the start where a batch needs more of them.
        expected: PyTorch's answer to the same tiles.
        max_batch: the largest batch that will be served.
        precision: key of `TOLERANCES`.
        truth: labels and patients of the tiles, for the patients' AUC and log loss.

    Raises:
        ParityError: an answer is missing, of another shape or dtype, not finite, or differs by more than allowed; of
            the last, `measured` has the figures of all tiles.
        GoldenTilesError: too few tiles for this precision.
    """
    with one_torch_thread():
        return compare(
            format_name,
            lambda rows: run(np.ascontiguousarray(tiles_NHWC[rows])),
            expected,
            max_batch=max_batch,
            precision=precision,
            truth=truth,
        )


def compare(
    name: str,
    ask: Ask,
    expected: Answer,
    *,
    max_batch: int,
    precision: str = "fp32",
    truth: Truth | None = None,
) -> Parity:
    """Compare with PyTorch whatever answers to tiles, wherever it runs; see `check_parity`.

    Args:
        name: for the errors.
        ask: numbers of tiles (int64 [n]) -> its answer to those; may raise any error.
    """
    tolerance = TOLERANCES[precision]
    count = len(expected.probabilities)
    if count < tolerance.least_tiles:
        raise GoldenTilesError(
            f"{name}: {precision} is compared on at least {tolerance.least_tiles} tiles, there are "
            f"{count}. Give more with --tiles."
        )
    batches = tuple(sorted({size for size in (1, 2, max_batch) if size <= max_batch}))
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    problems: list[str] = []
    for size in batches:
        answers_NK = np.empty_like(expected.probabilities)
        labels_N = np.empty_like(expected.label_index[:, 0])
        for rows in _batches(count, size):
            where = f"{name}, batch {size}, tiles {rows[0]} to {rows[-1]}"
            theirs, ours = _asked(ask, rows, where), Answer(*(column[rows] for column in expected))
            _check_form(theirs, ours, where)
            too_far = _too_far(theirs, ours, tolerance)
            if too_far and not problems:  # the first is told; all tiles are measured all the same
                problems.append(f"batch {size}, tiles {rows[0]} to {rows[-1]}: {too_far}")
            answers_NK[rows], labels_N[rows] = theirs.probabilities, theirs.label_index[:, 0]
        seen.append((answers_NK, labels_N))
    measured = _summary(precision, batches, seen, expected, truth)
    problems += problems_of(measured, tolerance)
    if problems:
        raise ParityError(f"{name}: {'; '.join(problems)}. Nothing was published.", measured=measured)
    return measured


def problems_of(measured: Parity, tolerance: Tolerance) -> list[str]:
    """What a measurement over all tiles violates, with the figures; [] if nothing."""
    problems = []
    flips = measured.label_flips / measured.tiles
    if flips > tolerance.flip_share:
        problems.append(
            f"{measured.label_flips} labels of {measured.tiles} differ from PyTorch's, {flips:.2%} "
            f"(allowed {tolerance.flip_share:.1%})"
        )
    if measured.mean_abs_diff > tolerance.mean_abs_diff:
        problems.append(
            f"probabilities differ from PyTorch by {measured.mean_abs_diff:.3g} in the mean "
            f"(allowed {tolerance.mean_abs_diff:g})"
        )
    least_db = tolerance.least_log_snr_db
    if least_db is not None and measured.log_snr_db is not None and measured.log_snr_db < least_db:
        problems.append(
            f"the logarithms of probabilities follow PyTorch's with {measured.log_snr_db:.1f} dB "
            f"(at least {least_db:g})"
        )
    if measured.patient_auc is not None:
        before, after = measured.patient_auc
        if before - after > tolerance.auc_fall:
            problems.append(
                f"the AUC of {measured.patients} patients falls from {before:.4f} to {after:.4f} "
                f"(allowed {tolerance.auc_fall:g})"
            )
    if measured.patient_log_loss is not None:
        before, after = measured.patient_log_loss
        if after - before > tolerance.log_loss_rise:
            problems.append(
                f"the log loss of {measured.patients} patients rises from {before:.4f} to {after:.4f} "
                f"(allowed {tolerance.log_loss_rise:g})"
            )
    return problems


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread, as each instance is served; spinning ones make small batches ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def log_snr_db(ours_NK: np.ndarray, theirs_NK: np.ndarray) -> float | None:
    """Agreement of log-probabilities in decibel, see `exporters.tolerances`; None where they are equal."""
    ours, theirs = _log(ours_NK), _log(theirs_NK)
    error, signal = float(((theirs - ours) ** 2).mean()), float(ours.var(axis=0).mean())
    if error == 0.0 or signal == 0.0:
        return None
    return 10.0 * float(np.log10(signal / error))


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, start + size) % count


def _asked(ask: Ask, rows: np.ndarray, where: str) -> Answer:
    try:
        return ask(rows)
    except ServedError:
        raise
    except Exception as error:  # each runtime has errors of its own
        lines = str(error).strip().splitlines() or ["(no message)"]
        raise ParityError(
            f"{where}: the artefact fails where PyTorch answers ({type(error).__name__}: {lines[-1]}). "
            "Is its batch dimension frozen? Nothing was published."
        ) from error


def _check_form(theirs: Answer, ours: Answer, where: str) -> None:
    """Whether it is an answer at all."""
    for name, got, wanted in zip(Answer._fields, theirs, ours, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ParityError(
                f"{where}: {name} is {got.dtype} {list(got.shape)}, expected {wanted.dtype} {list(wanted.shape)}. "
                "Nothing was published."
            )
    if not (np.isfinite(theirs.probabilities).all() and np.isfinite(theirs.confidence).all()):
        raise ParityError(
            f"{where}: the artefact answers with values that are not finite. Nothing was published."
        )
    if ((theirs.label_index < 0) | (theirs.label_index >= theirs.probabilities.shape[1])).any():
        raise ParityError(f"{where}: label_index names no class. Nothing was published.")


def _too_far(theirs: Answer, ours: Answer, tolerance: Tolerance) -> str | None:
    """By how much a batch differs, if that is more than any one answer may."""
    abs_diff = max(
        float(np.abs(theirs.probabilities - ours.probabilities).max()),
        float(np.abs(theirs.confidence - ours.confidence).max()),
    )
    log_diff = float(np.abs(_log(theirs.probabilities) - _log(ours.probabilities)).max())
    wrong_labels = int((theirs.label_index != ours.label_index).sum())
    too_far_in_log = tolerance.max_log_diff is not None and log_diff > tolerance.max_log_diff
    too_many_labels = tolerance.flip_share == 0.0 and wrong_labels > 0
    if abs_diff > tolerance.max_abs_diff or too_far_in_log or too_many_labels:
        held_to = f" (allowed {tolerance.max_log_diff:g})" if tolerance.max_log_diff is not None else ""
        return (
            f"probabilities differ from PyTorch by up to {abs_diff:.3g} (allowed {tolerance.max_abs_diff:g}), "
            f"their logarithms by {log_diff:.3g}{held_to}, {wrong_labels} labels of {len(ours.label_index)} differ"
        )
    # Label and confidence come out of the same graph as the probabilities; whatever the precision, they belong together.
    said = np.take_along_axis(theirs.probabilities, theirs.label_index, axis=1)
    if np.abs(said - theirs.confidence).max() > tolerance.max_abs_diff or not np.allclose(
        said, theirs.probabilities.max(axis=1, keepdims=True), atol=1e-6
    ):
        return "label_index and confidence do not belong to the probabilities"
    return None


def _summary(
    precision: str,
    batches: tuple[int, ...],
    seen: list[tuple[np.ndarray, np.ndarray]],
    expected: Answer,
    truth: Truth | None,
) -> Parity:
    ours_NK, ours_N = expected.probabilities, expected.label_index[:, 0]
    answers_NK = seen[-1][0]  # at the largest batch, as most tiles are served
    decibels = [value for values_NK, _ in seen if (value := log_snr_db(ours_NK, values_NK)) is not None]
    patients, auc, log_loss = (
        _of_patients(ours_NK, answers_NK, truth) if truth is not None else (0, None, None)
    )
    return Parity(
        precision=precision,
        tiles=len(ours_NK),
        batches=batches,
        max_abs_diff=max(float(np.abs(values_NK - ours_NK).max()) for values_NK, _ in seen),
        max_log_diff=max(float(np.abs(_log(values_NK) - _log(ours_NK)).max()) for values_NK, _ in seen),
        mean_abs_diff=max(float(np.abs(values_NK - ours_NK).mean()) for values_NK, _ in seen),
        log_snr_db=min(decibels, default=None),
        label_flips=max(int((labels_N != ours_N).sum()) for _, labels_N in seen),
        patients=patients,
        patient_auc=auc,
        patient_log_loss=log_loss,
    )


_Pair = tuple[float, float]


def _of_patients(
    ours_NK: np.ndarray, theirs_NK: np.ndarray, truth: Truth
) -> tuple[int, _Pair | None, _Pair | None]:
    """Patients, and PyTorch's and the artefact's AUC and log loss on the mean answers of each."""
    known = [
        (row, image_id, patient_id, truth.class_names.index(label))
        for row, (label, image_id, patient_id) in enumerate(
            zip(truth.labels_N, truth.images_N, truth.patients_N, strict=True)
        )
        if label in truth.class_names and image_id is not None and patient_id is not None
    ]
    if not known:
        return 0, None, None
    rows = [row for row, *_ in known]
    label_of = {patient_id: label for _, _, patient_id, label in known}
    patient_of = {image_id: patient_id for _, image_id, patient_id, _ in known}
    scored = []
    for values_NK in (ours_NK, theirs_NK):
        of_patient = slides_to_patients(
            by_slide(values_NK[rows], [image for _, image, *_ in known]), patient_of
        )
        labels = [label_of[patient_id] for patient_id in of_patient]
        values_PK = np.stack(list(of_patient.values()))
        scored.append((roc_auc(labels, values_PK), weighted_log_loss(labels, values_PK)))
    (auc, loss), (their_auc, their_loss) = scored
    return (
        len(label_of),
        (auc, their_auc) if np.isfinite([auc, their_auc]).all() else None,
        (loss, their_loss),
    )


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST_PROBABILITY))
