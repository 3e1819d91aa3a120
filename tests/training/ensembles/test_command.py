"""python -m training ensemble"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.__main__ import COMMANDS
from training.commands import main
from training.ensembles.definition import Ensemble
from training.errors import EnsembleError
from training.folds import make_folds
from training.scores import roc_auc, weighted_log_loss

from .conftest import Files, made_members, write_files

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments: object) -> int:
    return main("python -m training", "", COMMANDS, ["ensemble", *map(str, arguments)])


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> dict[str, Any]:
        assert command(*arguments) == 0, capsys.readouterr().err
        told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return told

    return run


def test_soft_and_hard_scores_are_those_worked_out_by_hand(files: Files, tmp_path: Path, ask: Any) -> None:
    values, labels = files.members.probabilities_MNK, files.members.labels_N
    weights = np.array([0.5, 0.25, 0.25])
    votes = np.eye(2)[values.argmax(axis=2)]
    for method, rows in (
        ("soft", np.tensordot(weights, values, 1)),
        ("hard", np.tensordot(weights, votes, 1)),
    ):
        out = tmp_path / f"{method}.json"
        told = ask(
            "--oof",
            *files.tables,
            "--labels",
            files.labels,
            "--method",
            method,
            "--weights",
            2,
            1,
            1,
            "--out",
            out,
        )
        of_patient: dict[str, list[Any]] = {}
        for record, row in zip(files.members.records, rows, strict=True):
            of_patient.setdefault(record.patient_id, []).append(row)
        patient_rows = np.array([np.mean(of_patient[name], axis=0) for name in sorted(of_patient)])
        for level, truth, answers in (
            ("slide", labels, rows),
            ("patient", files.members.labels_P, patient_rows),
        ):
            assert told[level]["roc_auc"] == pytest.approx(roc_auc(truth.tolist(), answers), abs=1e-12)
            assert told[level]["weighted_log_loss"] == pytest.approx(
                weighted_log_loss(truth.tolist(), answers), abs=1e-9
            )
            low, high = told["intervals"][level]["roc_auc"]
            assert low < told[level]["roc_auc"] < high
        assert (told["slides"], told["patients"]) == (len(labels), 80)
        assert Ensemble.load(out).apply(values) == pytest.approx(rows)
        assert Ensemble.load(out).fitted_on_patients == ()


def test_the_table_of_answers_is_what_the_definition_says(files: Files, tmp_path: Path, ask: Any) -> None:
    out, answers = tmp_path / "e.json", tmp_path / "answers.csv"
    arguments = ("--oof", *files.tables, "--labels", files.labels, "--out", out)
    told = ask(*arguments, "--abstain-alpha", 0.2, "--predictions", answers)
    rows = list(csv.DictReader(answers.open()))
    ensemble = Ensemble.load(out)
    expected = ensemble.apply(files.members.probabilities_MNK)
    assert [row["image_id"] for row in rows] == [record.image_id for record in files.members.records]
    assert [float(row["p_LAA"]) for row in rows] == pytest.approx(expected[:, 1].tolist(), abs=1e-8)
    assert {row["predicted"] for row in rows} == {"CE", "LAA"}
    of_patient = {row["patient_id"]: row for row in rows}
    answered = [int(row["patient_answered"]) for row in of_patient.values()]
    assert np.mean(answered) == pytest.approx(told["abstention"]["patient"]["answered"])
    for row in rows:
        assert 0 <= float(row["mutual_information"]) <= float(row["entropy"]) + 1e-9
        assert float(row["patient_std"]) <= 0.5
    assert ensemble.fitted_on_patients == tuple(files.members.patient_ids)
    again = ask("--oof", answers, "--labels", files.labels, "--out", tmp_path / "again.json")
    assert again["patient"]["roc_auc"] == pytest.approx(told["patient"]["roc_auc_across_folds"])


def test_stacking_uses_the_folds_that_it_is_given(files: Files, tmp_path: Path, ask: Any) -> None:
    folds = tmp_path / "folds.json"
    make_folds(files.members.records, folds=4, seed=2).save(folds)
    arguments = ("--oof", *files.tables, "--labels", files.labels, "--method", "stack", "--temperature")
    told = ask(*arguments, "--folds", folds, "--out", tmp_path / "a.json")
    assert told["nested_folds"] == 4
    assert told["patient"]["roc_auc"] > 0.8
    assert told["temperature"] == Ensemble.load(tmp_path / "a.json").combination.temperature
    assert told == {**ask(*arguments, "--folds", folds, "--out", tmp_path / "b.json"), "out": told["out"]}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    make_folds(made_members(81).records, folds=4, seed=2).save(folds)
    assert command(*arguments, "--folds", folds, "--out", tmp_path / "c.json") == 2
    assert not (tmp_path / "c.json").exists()


def test_snapshots_of_a_run_are_members(tmp_path: Path, ask: Any) -> None:
    files = write_files(tmp_path, made_members())
    kept = {record.image_id for record in files.members.records[:90]}
    for number, path in enumerate(files.tables, start=1):
        lines = path.read_text().splitlines()
        held_out = [lines[0], *(line for line in lines[1:] if line.rsplit(",", 1)[1] in kept)]
        (tmp_path / "run" / "snapshots" / str(number)).mkdir(parents=True)
        (tmp_path / "run" / "snapshots" / str(number) / "held_out.csv").write_text("\n".join(held_out))
    told = ask("--snapshots", tmp_path / "run", "--labels", files.labels, "--out", tmp_path / "e.json")
    assert len(told["members"]) == 3
    assert told["slides"] == 90


def test_an_area_that_is_not_defined_is_null(files: Files, tmp_path: Path, ask: Any) -> None:
    lines = files.labels.read_text().splitlines()
    files.labels.write_text("\n".join([lines[0], *(line.replace("LAA", "CE") for line in lines[1:])]))
    arguments = ("--oof", files.tables[0], "--labels", files.labels, "--out", tmp_path / "e.json")
    told = ask(*arguments, "--class-names", "CE", "LAA")
    assert told["patient"]["roc_auc"] is None
    assert told["intervals"]["patient"]["roc_auc"] == [None, None]
    assert told["patient"]["weighted_log_loss"] > 0
    assert command(*arguments) == 2
    assert command(*arguments, "--class-names", "CE", "LAA", "--method", "stack") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--weights", 1, 2), "2 weights for 3 members"),
        (("--weights", 1, 2, -1), "weight -1 is negative"),
        (("--weights", "1,2,many"), "'many' is not a number"),
        (("--weights", 1, 1, 1, "--method", "stack"), "stacking finds its own"),
        (("--method", "hard", "--temperature"), "no meaning for hard votes"),
        (("--abstain-alpha", 1), "must be above 0 and below 1"),
        (("--checkpoints", "a"), "1 --checkpoints for 3 tables"),
        (("--class-names", "CE", "XX"), "is none of CE, XX"),
        (("--folds", "none.json"), "there is no such file"),
    ],
)
def test_options_that_do_not_fit_are_told_and_nothing_is_written(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...], message: str
) -> None:
    out, answers = tmp_path / "e.json", tmp_path / "answers.csv"
    arguments = ("--oof", *files.tables, "--labels", files.labels, "--out", out, "--predictions", answers)
    assert command(*arguments, *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not out.exists()
    assert not answers.exists()


def test_nothing_that_is_no_ensemble_is_overwritten(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files.tables[0].read_bytes(), files.labels.read_bytes()
    assert command("--oof", *files.tables, "--labels", files.labels, "--out", files.tables[0]) == 2
    assert command("--oof", *files.tables, "--labels", files.labels, "--predictions", files.labels) == 2
    assert "one of the files that are read" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert command("--oof", *files.tables, "--labels", files.labels, "--out", other) == 2
    assert other.read_text() == "{}"
    assert before == (files.tables[0].read_bytes(), files.labels.read_bytes())


def test_tables_alone_are_enough_and_torch_stays_unloaded(files: Files, tmp_path: Path) -> None:
    """In another process, with --out left away; nothing that takes seconds to load is loaded."""
    code = (
        "import sys; from training.__main__ import COMMANDS; from training.commands import main; "
        f"code = main('', '', COMMANDS, {['ensemble', '--oof', *map(str, files.tables), '--labels', str(files.labels), '--method', 'stack']!r}); "
        "print(code, [name for name in ('torch', 'torchvision', 'accelerate', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    *_, answer, told = done.stdout.splitlines()
    assert told == "0 []"
    assert {"roc_auc", "weighted_log_loss"} <= json.loads(answer)["patient"].keys() & json.loads(answer)[
        "slide"
    ].keys()
    assert Ensemble.load(tmp_path / "ensemble.json").combination.method == "stack"


def test_a_missing_definition_is_an_error() -> None:
    with pytest.raises(EnsembleError):
        Ensemble.load("none.json")
