"""The card says what the manifest says, and nothing breaks out of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from exporters.model_card import render
from exporters.release_manifest import Manifest, load


def altered(release_dir: Path, **changes: Any) -> Manifest:
    return Manifest.model_validate({**load(release_dir).as_dict(), **changes})


def test_it_is_written_from_the_manifest_alone(release_dir: Path) -> None:
    assert render(load(release_dir)) == (release_dir / "MODEL_CARD.md").read_text()


def test_it_has_the_sections_and_figures(release_dir: Path) -> None:
    manifest = load(release_dir)
    card = render(manifest)
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == [
        "Model details",
        "Intended use",
        "Training data",
        "Evaluation on held-out patients",
        "Formats",
        "Limits",
        "Pretrained weights and licence",
        "How to serve",
        "How to verify",
        "Built with",
    ]
    row = next(line for line in card.splitlines() if line.startswith("| `onnx` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["`onnx`", "fp32", "accepted", "tile_classifier"]
    assert cells[6] == "0 of 6"
    assert "| tile_accuracy | 0.5 |" in card
    assert "NOT PROVEN THROUGH A SERVER" in card  # this release was exported without one


def test_every_table_is_whole(release_dir: Path) -> None:
    for before, line in itertools.pairwise(render(load(release_dir)).splitlines()):
        if line.startswith("|") and before.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", before)), line


def test_names_cannot_break_out(release_dir: Path) -> None:
    spec = {**load(release_dir).spec, "class_names": ["a|b", "<script>alert(1)</script>\n# x"]}
    card = render(altered(release_dir, spec=spec))
    assert "<script>" not in card
    assert "\n# x" not in card
    assert "a\\|b" in card


def test_an_ensemble_tells_of_each_member(release_dir: Path) -> None:
    one = load(release_dir).checkpoint
    members = [{**one, "name": "a"}, {**one, "name": "b", "architecture": "resnet18"}]
    metrics = {"patient_roc_auc": 0.8125}
    checkpoint = {"kind": "ensemble", "method": "stack", "members": members, "metrics": metrics}
    origin = {"members": {"b": {"weights": "imagenet", "source": "PyPI x", "licence": "MIT", "sha256": None}}}
    card = render(altered(release_dir, kind="ensemble", checkpoint=checkpoint, pretrained=origin))
    assert "| Members | squeezenet1_1, resnet18, joined by stack |" in card
    assert "Member a:" in card
    assert "| b | imagenet | PyPI x | MIT | - |" in card
    assert "| patient_roc_auc | 0.8125 |" in card
    assert "out-of-fold predictions" in card
    assert "No score was recorded" in render(altered(release_dir, checkpoint={**one, "metrics": {}}))


def test_licence_and_origin_are_told(release_dir: Path) -> None:
    pretrained = {"weights": "imagenet", "source": "PyPI x", "licence": "Apache-2.0", "sha256": None}
    mlflow = {"run_id": "r1", "model_name": "clotline", "model_version": "7", "tracking_uri": "http://store"}
    card = render(altered(release_dir, pretrained=pretrained, mlflow=mlflow, git_dirty=True))
    assert "| squeezenet1_1 | imagenet | PyPI x | Apache-2.0 | - |" in card
    assert "run r1, model clotline version 7" in card
    assert "Exported from changed code" in card
