"""Predictions as a plain text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clients.prediction import PatientPrediction, Prediction


def slide_table(predictions: Sequence[Prediction], truth: Mapping[str, str] | None = None) -> str:
    """One line a slide; with `truth` (image_id -> label) a column that says what the label file says. A label in brackets
    is one that the model abstains from.

    Args:
        predictions: at least one, all with the same classes.
    """
    classes = list(predictions[0].probabilities)
    header = ["slide", "patient", "label", *(f"p({name})" for name in classes), "tiles"]
    rows = [
        [
            entry.image_id,
            entry.patient_id,
            _label(entry),
            *_values(entry.probabilities),
            str(len(entry.tiles)),
        ]
        for entry in predictions
    ]
    return _table(
        header, rows, [_verdict(entry.label, (truth or {}).get(entry.image_id)) for entry in predictions]
    )


def patient_table(patients: Sequence[PatientPrediction], truth: Mapping[str, str] | None = None) -> str:
    """One line a patient; with `truth` (patient_id -> label) a column that says what the label file says.

    Args:
        patients: at least one, all with the same classes.
    """
    classes = list(patients[0].probabilities)
    header = ["patient", "label", *(f"p({name})" for name in classes), "slides"]
    rows = [
        [entry.patient_id, entry.label, *_values(entry.probabilities), str(len(entry.image_ids))]
        for entry in patients
    ]
    return _table(
        header, rows, [_verdict(entry.label, (truth or {}).get(entry.patient_id)) for entry in patients]
    )


def _label(prediction: Prediction) -> str:
    return prediction.label if prediction.answered else f"({prediction.label})"


def _values(probabilities: Mapping[str, float]) -> list[str]:
    return [f"{value:.4f}" for value in probabilities.values()]


def _verdict(label: str, truth: str | None) -> str:
    if truth is None:
        return ""
    return f"{truth} (right)" if label == truth else f"{truth} (WRONG)"


def _table(header: list[str], rows: list[list[str]], verdicts: list[str]) -> str:
    lines = [header, *rows]
    if any(verdicts):
        lines = [[*line, verdict] for line, verdict in zip(lines, ["in the labels", *verdicts], strict=True)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [all(_is_number(line[column]) for line in lines[1:]) for column in range(len(widths))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()
