"""release.json: written once, read strictly, every problem at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.errors import ReleaseError, ReleaseVersionError
from exporters.release_manifest import checksum, load, release_id, to_text

Change = Callable[..., Path]


@pytest.fixture
def change(release_dir: Path, tmp_path: Path) -> Change:
    """A copy of the manifest with other entries, and a checksum that fits them."""

    def make(*, seal: bool = True, **entries: Any) -> Path:
        values = json.loads((release_dir / "release.json").read_text())
        kept = values.pop("sha256")
        values |= entries
        path = tmp_path / "release.json"
        path.write_text(json.dumps({**values, "sha256": checksum(values) if seal else kept}))
        return path

    return make


def test_it_reads_back_as_it_was_written(release_dir: Path) -> None:
    manifest = load(release_dir)
    assert to_text(manifest) == (release_dir / "release.json").read_text()
    assert manifest.release_id == release_id(manifest.digests())
    assert load(release_dir / "release.json") == manifest


def test_readers_without_this_package_can_check_it(release_dir: Path) -> None:
    import hashlib

    values = json.loads((release_dir / "release.json").read_text())
    kept = values.pop("sha256")
    assert hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() == kept
    lines = sorted(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(release_dir).as_posix()}\n"
        for below in ("models", "golden")
        for path in (release_dir / below).rglob("*")
        if path.is_file()
    )
    assert hashlib.sha256("".join(lines).encode()).hexdigest()[:16] == values["release_id"]


def test_every_problem_is_listed_at_once(change: Change) -> None:
    with pytest.raises(ReleaseError) as caught:
        load(change(seal=False, kind="pathology", created_utc=5, surprise=1))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for word in ("altered", "kind", "created_utc", "surprise"):
        assert word in told


def test_what_does_not_add_up_is_refused(change: Change, release_dir: Path) -> None:
    values = json.loads((release_dir / "release.json").read_text())
    somewhere = {**values["files"], "../secret": {"sha256": "0" * 64, "bytes": 1}}
    with pytest.raises(ReleaseError, match="leads out of the release"):
        load(change(files=somewhere))
    more = {**values["files"], "models/more": {"sha256": "0" * 64, "bytes": 1}}
    with pytest.raises(ReleaseError, match="release_id does not belong"):
        load(change(files=more))
    with pytest.raises(ReleaseError, match="not among formats"):
        load(change(classifiers={"tile_classifier": {"format": "coreml"}}))
    refused = {name: {**entry, "status": "refused"} for name, entry in values["formats"].items()}
    with pytest.raises(ReleaseError, match="is refused and has classifiers"):
        load(change(formats=refused))


def test_what_is_no_release_of_ours_is_named(change: Change, tmp_path: Path, release_dir: Path) -> None:
    with pytest.raises(ReleaseVersionError, match="version 99, this Clotline reads version 2"):
        load(change(version=99))
    with pytest.raises(ReleaseVersionError, match="no release of Clotline"):
        load(change(format="clotline.checkpoint"))
    with pytest.raises(ReleaseVersionError, match="is no release"):
        load(tmp_path / "none")
    broken = Path(shutil.copytree(release_dir, tmp_path / "broken"))
    (broken / "release.json").write_bytes(b"\xff{")
    with pytest.raises(ReleaseError, match="cannot be read as JSON"):
        load(broken)
