"""`python -m training evaluate`: what its files say is what the predictions say, and nothing is kept quiet."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from tests.training.evaluation.conftest import CLASS_NAMES, SPEC, options, patients_of, table_of
from training import checkpoint, commands
from training.__main__ import COMMANDS
from training.errors import EvaluationError, OutputExistsError
from training.evaluation import command
from training.evaluation.assignment import assign
from training.evaluation.candidates import models_of, read_candidates
from training.evaluation.data import open_data
from training.evaluation.prediction import predict

CHARTS = ("roc", "precision_recall", "confusion", "reliability", "probabilities", "abstention", "centres")


def evaluated(out: Path, *words: str | Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The last line, scores.json and the report's HTML."""
    line = command.run(options(*words, "--out", out, "--device", "cpu"))
    return line, json.loads((out / "scores.json").read_text()), (out / "report.html").read_text()


def patients_in(rows: list[dict[str, str]]) -> tuple[list[int], list[float]]:
    """Label and p(LAA) of every patient, recomputed from the table."""
    of_patient: dict[str, list[float]] = {}
    labels = {row["patient_id"]: CLASS_NAMES.index(row["label"]) for row in rows}
    for row in rows:
        of_patient.setdefault(row["patient_id"], []).append(float(row["p_LAA"]))
    return [labels[patient] for patient in of_patient], [float(np.mean(p)) for p in of_patient.values()]


@pytest.fixture(scope="module")
def tile_report(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, Any], str]:
    """An evaluation of ready-cut tiles: all patients held out, one centre with one class."""
    path = save_tile_checkpoint("all held out", tiles_dir, patients_of(tiles_dir))
    out = tmp_path_factory.mktemp("tile report") / "out"
    return out, *evaluated(out, path, "--data", tiles_dir, "--bootstrap", "100")


def test_scores_are_those_of_the_predictions(tile_report: Any) -> None:
    out, line, scores, html = tile_report
    rows = table_of(out)
    assert len(rows) == line["slides"] == 48
    (model,) = scores["models"]
    slide, patient = model["levels"]["slide"], model["levels"]["patient"]
    labels = [CLASS_NAMES.index(row["label"]) for row in rows]
    p = [float(row["p_LAA"]) for row in rows]
    assert slide["scores"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(labels, p))
    assert slide["scores"]["pr_auc"]["value"] == pytest.approx(average_precision_score(labels, p))
    patient_labels, patient_p = patients_in(rows)
    auc = roc_auc_score(patient_labels, patient_p)
    assert patient["scores"]["roc_auc"]["value"] == pytest.approx(auc)
    assert patient["scores"]["weighted_log_loss"]["value"] == pytest.approx(
        log_loss(patient_labels, patient_p)
    )
    assert (patient["n"], patient["by_class"]) == (24, {"CE": 12, "LAA": 12})
    assert line["patient"]["roc_auc"] == round(patient["scores"]["roc_auc"]["value"], 4)
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert slide["scores"]["accuracy"]["value"] == pytest.approx(right)
    counts = np.array(model["confusion"]["slide"]["counts"])
    assert counts.trace() == round(right * 48)
    assert f"<b>{auc:.3f}</b><span>ROC AUC by patient" in html
    assert f"{counts[0, 0]} of 24 (" in html
    assert model["levels"]["tile"]["n"] == 48


def test_a_centre_with_one_class_says_so(tile_report: Any) -> None:
    _, _, scores, html = tile_report
    (model,) = scores["models"]
    assert set(model["centres"]) == {"0", "1", "solo"}
    solo = model["centres"]["solo"]["patient"]
    assert (solo["n"], solo["undefined"], solo["scores"]["roc_auc"]["value"]) == (4, "only CE", None)
    assert solo["scores"]["accuracy"]["value"] is not None
    assert html.count("not defined: only CE") >= 2
    assert model["centres"]["0"]["patient"]["scores"]["roc_auc"]["value"] is not None


def test_held_out_patients_raise_no_alarm(tile_report: Any) -> None:
    _, line, scores, html = tile_report
    assert line["exposed_patients"] == 0
    assert scores["exposed_patients"] == {}
    assert "Do not trust" not in html


def test_the_report_is_whole_in_itself(tile_report: Any) -> None:
    out, _, _, html = tile_report
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", html)
    assert not re.search(r"https?://|<script|@import|url\(", html)
    assert html.count("data:image/png;base64,") == len(CHARTS)
    for name in CHARTS:
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5, f"{name}.png is blank"
    assert "0123abc" in html
    assert "0" * 64 in html


def test_worst_errors_come_first_and_show_their_tile(tile_report: Any) -> None:
    out, _, _, html = tile_report
    wrong = [row for row in table_of(out) if row["predicted"] != row["label"]]
    wrong.sort(key=lambda row: -max(float(row["p_CE"]), float(row["p_LAA"])))
    shown = re.findall(r"<figcaption><b>(\S+)</b>: truly (\S+), answered", html)
    assert shown == [(row["image_id"], row["label"]) for row in wrong[:8]]
    assert len(list((out / "errors").iterdir())) == len(shown)
    assert f"{len(wrong)} slides of 48 answered wrong" in html
    assert "Where the model looked" not in html, "ready-cut tiles have no place on a slide"


@pytest.fixture(scope="module")
def leaky(save_tile_checkpoint: Any, slides_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All slides, half of the patients trained on."""
    held_out = patients_of(slides_dir)[:4]
    path = save_tile_checkpoint("half held out", slides_dir, held_out)
    out = tmp_path_factory.mktemp("leaky") / "out"
    words = (
        path,
        "--data",
        slides_dir,
        "--split",
        "all",
        "--heatmaps",
        "2",
        "--errors",
        "1",
        "--bootstrap",
        "20",
    )
    return out, held_out, *evaluated(out, *words, "--strict")


def test_trained_patients_are_shouted_about(leaky: Any, slides_dir: Path) -> None:
    out, held_out, line, scores, html = leaky
    trained = sorted(set(patients_of(slides_dir)) - set(held_out))
    assert scores["exposed_patients"] == dict.fromkeys(trained, "trained on")
    assert line["exposed_patients"] == 4
    assert line["exit_code"] == 1, "--strict"
    warning = scores["warnings"][0]
    assert warning["severity"] == "danger"
    assert warning["text"].startswith("4 of the 8 evaluated patients were trained on")
    assert warning["text"] in line["warnings"]
    assert "<b>Do not trust these scores.</b> 4 of the 8" in html
    assert "4 of them known to training" in html
    groups = scores["models"][0]["by_exposure"]
    assert {kind: group["n"] for kind, group in groups.items()} == {"trained on": 4, "held out": 4}
    exposure = {row["patient_id"]: row["exposure"] for row in table_of(out)}
    assert exposure == {**dict.fromkeys(trained, "trained on"), **dict.fromkeys(held_out, "held out")}


def test_heatmaps_of_slides_are_drawn(leaky: Any) -> None:
    out, _, _, _, html = leaky
    drawn = sorted((out / "heatmaps").iterdir())
    assert len(drawn) == 2
    with Image.open(drawn[0]) as image:
        pixels_HWC = np.asarray(image.convert("RGB")).astype(int)
    assert image.width > 500
    coloured = np.ptp(pixels_HWC[:, image.width // 2 :], axis=2) > 60
    assert coloured.mean() > 0.005, "tiles are coloured on the grey slide"
    assert "Every tile is coloured by its own probability" in html
    assert "64 µm a side" in html


def test_folds_are_pooled(save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path) -> None:
    patients = patients_of(tiles_dir)
    folds = [patients[:12], patients[12:]]
    paths = [
        save_tile_checkpoint(
            f"cv/fold_{number}", tiles_dir, held_out, seed=number, recipe={"held_out_fold": number}
        )
        for number, held_out in enumerate(folds)
    ]
    words = ("--data", tiles_dir, "--errors", "0", "--bootstrap", "0")
    line, scores, html = evaluated(tmp_path / "out", *paths, *words)
    assert line["model"] == "fold, 2 folds"
    assert line["patients"] == 24
    assert scores["models"][0]["levels"]["patient"]["scores"]["roc_auc"]["low"] is None
    of_fold = scores["models"][0]["folds"]
    assert {name: group["n"] for name, group in of_fold.items()} == {"fold_0": 12, "fold_1": 12}
    for number, name in enumerate(of_fold):
        rows = [row for row in table_of(tmp_path / "out") if row["patient_id"] in folds[number]]
        assert of_fold[name]["scores"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(*patients_in(rows)))
    assert "Mean ROC AUC over 2 folds" in html
    pooled = {row["image_id"]: row for row in table_of(tmp_path / "out")}
    assert len(pooled) == 48
    data = open_data(tiles_dir, None, [SPEC])
    for number, path in enumerate(paths):
        models = models_of(read_candidates([path]))
        told = predict(
            models, assign(models, data.records, "held-out"), data.source, device=torch.device("cpu")
        )
        (answers,) = told.of_model.values()
        assert {answer.record.patient_id for answer in answers} == set(folds[number])
        for answer in answers:
            row = pooled[answer.record.image_id]
            assert row["checkpoint"] == f"fold_{number}"
            assert float(row["p_LAA"]) == pytest.approx(answer.probabilities_K[1], abs=1e-6)


def test_models_of_the_same_patients_are_compared_and_joined(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path
) -> None:
    held_out = patients_of(tiles_dir)
    paths = [save_tile_checkpoint(f"same/{n}", tiles_dir, held_out, seed=n) for n in range(2)]
    words = ("--data", tiles_dir, "--errors", "0", "--bootstrap", "30")
    line, scores, html = evaluated(tmp_path / "out", *paths, *words)
    assert [model["name"] for model in scores["models"]] == ["0", "1", "soft mean of all"]
    assert set(line["models"]) == {"0", "1", "soft mean of all"}
    rows = table_of(tmp_path / "out")
    p = {name: [float(row["p_LAA"]) for row in rows if row["model"] == name] for name in line["models"]}
    np.testing.assert_allclose(p["soft mean of all"], (np.array(p["0"]) + np.array(p["1"])) / 2, atol=1e-7)
    assert np.abs(np.array(p["0"]) - np.array(p["1"])).max() > 0.01
    assert "minus_first" in scores["models"][1]
    assert "Choosing the best of them here" in html
    assert (tmp_path / "out" / "models.png").is_file()

    from training.ensembles.combination import Combination
    from training.ensembles.definition import Ensemble, Member

    ensemble = Ensemble(
        CLASS_NAMES,
        (Member("1", "0" * 64), Member("0", "0" * 64)),
        Combination(method="soft", weights_M=np.array([0.75, 0.25])),
        fitted_on_patients=tuple(held_out[:3]),
    )
    ensemble.save(tmp_path / "ensemble.json")
    line, scores, html = evaluated(
        tmp_path / "joined", *paths, *words, "--ensemble", tmp_path / "ensemble.json"
    )
    name = "soft ensemble (ensemble.json)"
    assert line["model"] == name
    rows = [row for row in table_of(tmp_path / "joined") if row["model"] == name]
    expected = 0.75 * np.array(p["1"]) + 0.25 * np.array(p["0"])
    np.testing.assert_allclose([float(row["p_LAA"]) for row in rows], expected, atol=1e-7)
    assert all(float(row["disagreement"]) >= 0 for row in rows)
    assert "was fitted (weights, meta-learner, temperature or threshold) on 3 of the 24" in html

    with pytest.raises(EvaluationError, match="it has 2 members"):
        evaluated(tmp_path / "three", paths[0], *words, "--ensemble", tmp_path / "ensemble.json")
    assert not (tmp_path / "three").exists()


def test_a_slide_checkpoint_shows_its_attention(slides_dir: Path, tmp_path: Path) -> None:
    from training.mil import checkpoint as slide_checkpoint
    from training.mil.network import build_encoder, build_head
    from training.mil.options import BagOptions

    torch.manual_seed(1)
    bags = BagOptions(tiles=4, attention_dim=16)
    encoder = build_encoder("shufflenet_v2_x0_5", SPEC, bags).module
    head = build_head(encoder.feature_dim, SPEC, bags)
    held_out = patients_of(slides_dir)[:5]
    data = {
        "fingerprint": "1" * 64,
        "held_out_patients": held_out,
        "held_out_slides": [f"{one}_0" for one in held_out],
    }
    path = slide_checkpoint.save(
        tmp_path / "mil" / "checkpoint", encoder.eval(), head.eval(), SPEC, architecture="shufflenet_v2_x0_5",
        bags=bags, metrics={}, data=data, golden_bags=[],
    )  # fmt: skip
    words = ("--data", slides_dir, "--bootstrap", "0", "--heatmaps", "1", "--errors", "1")
    line, scores, html = evaluated(tmp_path / "out", path, *words)
    assert line["patients"] == 5
    assert scores["checkpoints"][0]["kind"] == "slide"
    assert "tile" not in scores["models"][0]["levels"]
    assert "Attention says how much each tile weighs" in html
    assert {row["tiles"] for row in table_of(tmp_path / "out")} == {"4"}

    from slides import iter_tiles, open_slide
    from slides.labels import read_labels
    from training.mil.bags import SlideBag, evaluation_rows

    row = table_of(tmp_path / "out")[0]
    record = next(
        one for one in read_labels(slides_dir, class_names=CLASS_NAMES) if one.image_id == row["image_id"]
    )
    with open_slide(record.path) as slide:
        refs, tiles = zip(*iter_tiles(slide, SPEC), strict=True)
    bag = SlideBag(record, tiles, np.array([ref.darkness for ref in refs]))
    expected = slide_checkpoint.load(path).answer([tiles[place] for place in evaluation_rows(bag, bags)])
    assert float(row["p_LAA"]) == pytest.approx(float(expected.probabilities_K[1]), abs=1e-5)


def test_bad_slides_are_listed_and_strict_says_no(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiles_dir, tmp_path / "data")
    (data / "train" / "p03_1.jpg").write_bytes(b"torn")
    path = save_tile_checkpoint("bad", tiles_dir, patients_of(tiles_dir))
    words = (path, "--data", data, "--errors", "0", "--bootstrap", "0")
    line, scores, html = evaluated(tmp_path / "out", *words, "--strict")
    assert (line["bad_slides"], line["slides"], line["exit_code"]) == (1, 47, 1)
    (bad,) = scores["data"]["bad_slides"]
    assert bad["image_id"] == "p03_1"
    assert "is no image" in bad["reason"]
    assert "1 slide could not be used" in html
    assert "<code>p03_1</code>" in html
    for file in (data / "train").iterdir():
        file.write_bytes(b"torn")
    with pytest.raises(EvaluationError, match="not one slide can be used: 48 problems"):
        evaluated(tmp_path / "none", *words)
    assert not (tmp_path / "none").exists()


def test_only_an_evaluation_is_replaced(save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path) -> None:
    path = save_tile_checkpoint("replacing", tiles_dir, patients_of(tiles_dir)[:4])
    words = (path, "--data", tiles_dir, "--errors", "0", "--bootstrap", "0")
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="something other than an evaluation"):
        evaluated(foreign, *words, "--overwrite")
    assert (foreign / "chapter1.txt").read_text() == "years of work"
    (tmp_path / "out").mkdir()
    for name in ("report.html", "scores.json"):
        (tmp_path / "out" / name).write_text("of last week")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        evaluated(tmp_path / "out", *words)
    _, _, html = evaluated(tmp_path / "out", *words, "--overwrite")
    assert "of last week" not in html
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_training_and_evaluation_that_disagree_are_told(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path
) -> None:
    path = save_tile_checkpoint("changed", tiles_dir, patients_of(tiles_dir))
    manifest = json.loads((path / checkpoint.MANIFEST_NAME).read_text())
    manifest["metrics"]["patient_log_loss"] = 0.1
    (path / checkpoint.MANIFEST_NAME).write_text(json.dumps(manifest))
    line, _, _ = evaluated(tmp_path / "out", path, "--data", tiles_dir, "--errors", "0", "--bootstrap", "0")
    assert any("and was 0.1000 at the end of training" in warning for warning in line["warnings"])


def test_the_command_line(save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path) -> None:
    path = save_tile_checkpoint("cli", tiles_dir, patients_of(tiles_dir)[:6])
    words = [
        "evaluate",
        path,
        "--data",
        tiles_dir,
        "--out",
        tmp_path / "out",
        "--bootstrap",
        "10",
        "--errors",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "training", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "slides: 100%" in done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["patients"] == 6
    assert Path(last["report"]).is_file()


def test_bad_input_is_an_error_with_exit_code_2(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_tile_checkpoint("errors", tiles_dir, patients_of(tiles_dir)[:6])
    out = str(tmp_path / "out")
    for words, message in (
        ((str(path), "--data", str(tmp_path / "absent")), "file is missing"),
        ((str(path),), "--data DIR, --store STORE or both"),
        ((str(path), "--data", str(tiles_dir), "--device", "warp"), "--device warp"),
        ((str(path), "--store", str(tiles_dir)), str(tiles_dir)),
    ):
        code = commands.main("training", None, COMMANDS, ["evaluate", *words, "--out", out])
        told = capsys.readouterr()
        assert (code, told.out) == (2, ""), told.err
        assert told.err.startswith("error: ")
        assert message in told.err
    assert not (tmp_path / "out").exists()
