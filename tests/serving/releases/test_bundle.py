"""A release directory is taken as it was written, or refused with what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.release_manifest import load
from serving.benchmarks.tiny_release import make_release
from serving.releases.bundle import read_bundle
from serving.releases.errors import BadRelease


def rewrite(release: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest without mending its checksum."""
    values = json.loads((release / "release.json").read_text())
    change(values)
    (release / "release.json").write_text(json.dumps(values))


def forge(release: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest and mend its checksum."""
    import hashlib

    values = json.loads((release / "release.json").read_text())
    del values["sha256"]
    change(values)
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (release / "release.json").write_text(json.dumps(values))


@pytest.fixture
def release(tiny_releases: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_releases["a"], tmp_path / "copied")


def test_the_exporter_reads_the_same_manifest(tiny_releases: dict[str, Path]) -> None:
    bundle = read_bundle(tiny_releases["b"])
    manifest = load(tiny_releases["b"])
    assert bundle.release_id == manifest.release_id
    assert bundle.public == sorted(manifest.classifiers) == ["tile_classifier", "tile_classifier_second"]


def test_a_copy_is_complete_and_equal(release: Path, tmp_path: Path) -> None:
    read_bundle(release).copy_to(tmp_path / "copy")
    for path in sorted(
        p for folder in ("models", "golden") for p in (release / folder).rglob("*") if p.is_file()
    ):
        assert (tmp_path / "copy" / path.relative_to(release)).read_bytes() == path.read_bytes()


def flip_a_byte(release: Path) -> None:
    path = release / "models" / "tile_network_onnx" / "1" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_a_byte, "models/tile_network_onnx/1/model.onnx was changed"),
        (lambda r: (r / "models/tile_classifier/labels.txt").unlink(), "labels.txt is missing"),
        (lambda r: (r / "models/tile_classifier/2").mkdir() or (r / "models/tile_classifier/2/x").touch(), "2/x is not in"),
        (lambda r: (r / "golden/extra.jpg").touch(), "golden/extra.jpg is not in the manifest"),
        (
            lambda r: (r / "golden/0000.jpg").rename(r / "moved") and (r / "golden/0000.jpg").symlink_to(r / "moved"),
            "golden/0000.jpg is a symbolic link",
        ),
    ],
)  # fmt: skip
def test_files_that_differ_are_named(
    release: Path, damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    damage(release)
    with pytest.raises(BadRelease, match=says):
        read_bundle(release).verify()
    with pytest.raises(BadRelease, match=says):
        read_bundle(release).copy_to(tmp_path / "copy")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda r: shutil.rmtree(r), "is no release"),
        (lambda r: (r / "release.json").write_text("{"), "cannot be read"),
        (lambda r: (r / "release.json").write_text("[]"), "is not the manifest"),
        (lambda r: rewrite(r, lambda v: v.update(version=3)), "has version 3"),
        (lambda r: rewrite(r, lambda v: v.update(kind="slide")), "was altered"),
        (lambda r: forge(r, lambda v: v.update(release_id="0" * 16)), "release_id does not belong"),
        (lambda r: forge(r, lambda v: v.update(classifiers={})), "no public model"),
        (lambda r: forge(r, lambda v: v["classifiers"].update(other=v["classifiers"]["tile_classifier"])), "public model other"),
        (lambda r: forge(r, lambda v: v.pop("files")), "is not complete"),
        (
            lambda r: forge(r, lambda v: v["files"].update({"models/../../x": {"sha256": "0" * 64, "bytes": 1}})),
            "leads out of the release",
        ),
        (
            lambda r: forge(r, lambda v: v["files"].update({"models/x__r2/config.pbtxt": {"sha256": "0" * 64, "bytes": 1}})),
            "'x__r2' cannot be the name",
        ),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense_are_refused(
    release: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(release)
    with pytest.raises(BadRelease, match=says) as refused:
        read_bundle(release)
    assert refused.value.exit_code == 2


def test_tiny_releases_differ(tiny_releases: dict[str, Path], tmp_path: Path) -> None:
    ids = {read_bundle(path).release_id for path in tiny_releases.values()}
    assert len(ids) == 3
    assert read_bundle(make_release(tmp_path / "again", bias=-1.0)).release_id in ids
