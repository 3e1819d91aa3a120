"""Making a tile store: what is there already stays, what is missing is cut, the index comes last."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slides.labels import SlideRecord, read_labels
from training.errors import DataError, OutputExistsError, StoreError
from training.store import index, report, slide_file, workers
from training.store.index import FORMAT, INDEX_NAME, VERSION
from training.store.spec import StoreSpec

MANIFEST_NAME = "store.json"
LOCK_NAME = ".lock"
FOLDERS = ("slides", "overlays", "contact_sheets")


@dataclasses.dataclass(frozen=True)
class StoreReport:
    """What a run did.

    Attributes:
        summary: what the index says (`TileStore.summary`).
        cut_slides, cut_tiles: done by this run; the others were there already.
    """

    summary: dict[str, Any]
    cut_slides: int
    cut_tiles: int

    @property
    def failed(self) -> list[dict[str, str]]:
        return list(self.summary["failed"])


def write_store(
    data_dir: Path | str,
    store: Path | str,
    spec: StoreSpec,
    *,
    class_names: Sequence[str],
    workers_count: int,
    stain_reference: bytes | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> StoreReport:
    """Cut every slide of `data_dir`/train.csv that `store` does not hold yet, and write its index.

    Killed at any time and started again, it gives the store that an undisturbed run gives, byte for byte. Slides that
    failed are tried again by the next run.

    Args:
        data_dir: holds train.csv and train/.
        store: folder; made if it is missing.
        stain_reference: encoded image whose SHA-256 `spec` holds.
        workers_count: processes.
        overwrite: cut everything anew.

    Raises:
        LabelsError: train.csv cannot be used.
        OutputExistsError: `store` holds something else.
        StoreError: another run writes into it, or it was cut with other values or of other slides.
        DataError: no slide gave a tile.
        OSError: it cannot be written.
    """
    data_dir, store = Path(data_dir), Path(store)
    records = read_labels(data_dir, class_names=class_names, allow_missing=True)
    if spec.stain_reference_sha256 != (
        hashlib.sha256(stain_reference).hexdigest() if stain_reference else ""
    ):
        raise ValueError("stain_reference is not the image that spec.stain_reference_sha256 names")
    _refuse_foreign(store)
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        _prepare(store, spec, records, overwrite=overwrite)
        missing = [record for record in records if not _is_done(store, record, spec)]
        # The largest first: the run does not end with one core cutting the giant that happened to be last.
        missing.sort(key=lambda record: (-_size_bytes(record.path), record.image_id))
        threads = max(1, workers_count // max(1, len(missing)))
        jobs = [
            slide_file.SlideJob(record.image_id, record.path, store, spec, stain_reference, threads)
            for record in missing
        ]
        reason_of: dict[str, str] = {}
        tiles = 0
        with (
            contextlib.closing(workers.cut_slides(jobs, workers_count)) as outcomes,
            tqdm(
                total=len(records),
                initial=len(records) - len(missing),
                desc="tiling",
                unit="slide",
                file=sys.stderr,
                disable=not show_progress,
            ) as bar,
        ):
            for outcome in outcomes:
                tiles += outcome.tiles
                if outcome.reason is not None:
                    reason_of[outcome.job.image_id] = outcome.reason
                bar.update()
                bar.set_postfix(tiles=tiles, failed=len(reason_of))
        failed = [
            (record.image_id, reason_of[record.image_id])
            for record in records
            if record.image_id in reason_of
        ]
        usable = [record for record in records if record.image_id not in reason_of]
        if not usable:
            raise DataError(f"none of {len(records)} slides gave a tile", [reason for _, reason in failed])
        table, summary = index.assemble(store, spec, class_names, data_dir, usable, failed)
        report.write_report(store, summary)
        index.write(store, table)
    return StoreReport(summary, len(missing) - len(failed), tiles)


def _refuse_foreign(store: Path) -> None:
    if store.exists() and not store.is_dir():
        raise OutputExistsError(f"{store} is a file; a tile store is a folder")
    if store.is_dir() and not (store / MANIFEST_NAME).is_file():
        others = sorted(
            path.name for path in store.iterdir() if path.name != LOCK_NAME and ".partial" not in path.name
        )
        if others:
            raise OutputExistsError(
                f"{store} holds something other than a tile store ({', '.join(others[:3])}); give another folder"
            )


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Held by the kernel for this process: it goes with the process, however that ends."""
    with (store / LOCK_NAME).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                str(store), ["another run is writing into it; wait for it, or stop it"]
            ) from None
        yield


def _prepare(store: Path, spec: StoreSpec, records: Sequence[SlideRecord], *, overwrite: bool) -> None:
    """Folders, store.json, no left-overs of a killed run; refuses a store of another cut or of other slides."""
    manifest = store / MANIFEST_NAME
    if manifest.is_file() and not overwrite:
        _refuse_other_cut(manifest, spec)
    if overwrite:
        (store / INDEX_NAME).unlink(missing_ok=True)  # first: a store without index is known to be unfinished
        for name in FOLDERS:
            shutil.rmtree(store / name, ignore_errors=True)
    for name in FOLDERS:
        (store / name).mkdir(exist_ok=True)
        for left_over in (store / name).glob(".*.partial"):
            left_over.unlink()
    known = {record.image_id for record in records}
    strangers = sorted(path.stem for path in (store / "slides").glob("*.arrow") if path.stem not in known)
    if strangers:
        raise StoreError(
            str(store),
            [
                f"holds {len(strangers)} slides that train.csv does not list ({', '.join(strangers[:3])}); list them, "
                "delete their files in slides/, or cut anew with --overwrite"
            ],
        )
    text = json.dumps({"format": FORMAT, "version": VERSION, "spec": spec.as_dict()}, indent=1) + "\n"
    aside = store / f".{MANIFEST_NAME}.partial"
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, manifest)


def _refuse_other_cut(manifest: Path, spec: StoreSpec) -> None:
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        known = (values["format"], values["version"]) == (FORMAT, VERSION)
        there = StoreSpec.from_dict(values["spec"], str(manifest)) if known else None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(str(manifest), [f"is damaged ({error}); cut anew with --overwrite"]) from error
    if there is None:
        raise StoreError(str(manifest), ["is of another version of Clotline; cut anew with --overwrite"])
    differences = there.differences(spec)
    if differences:
        raise StoreError(
            str(manifest.parent),
            [*differences, "a store holds one cut: give the same values, another --out, or --overwrite"],
        )


def _is_done(store: Path, record: SlideRecord, spec: StoreSpec) -> bool:
    about = slide_file.read_metadata(slide_file.tiles_path(store, record.image_id))
    return (
        about is not None
        and about["spec"] == spec.as_dict()
        and (about["source"], about["source_bytes"]) == (record.path.name, _size_bytes(record.path))
        and slide_file.overlay_path(store, record.image_id).is_file()
        and slide_file.sheet_path(store, record.image_id).is_file()
    )


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
