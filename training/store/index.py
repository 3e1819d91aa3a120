"""The index of a store: one row a tile, assembled when all slides are there, and always the same for the same slides."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slides.labels import SlideRecord
from training.errors import StoreError
from training.store import slide_file
from training.store.spec import StoreSpec

FORMAT, VERSION = "clotline.tile_store", 1
INDEX_NAME = "index.parquet"
META_KEY = b"clotline"
OF_SLIDE = ("image_id", "patient_id", "center_id", "label")


def assemble(
    store: Path,
    spec: StoreSpec,
    class_names: Sequence[str],
    data_dir: Path,
    records: Sequence[SlideRecord],
    failed: Sequence[tuple[str, str]],
) -> tuple[pa.Table, dict[str, Any]]:
    """The index from the slides' files, and what it says of the store (`TileStore.summary`).

    Args:
        records: usable slides, in the order of train.csv; each has its file.
        failed: (image_id, reason) of the others, in the same order.

    Raises:
        StoreError: a slide's file is damaged.
    """
    tables, slides, digest_of = [], [], {}
    for record in records:
        path = slide_file.tiles_path(store, record.image_id)
        about = slide_file.read_metadata(path)
        try:
            measures = slide_file.read_tiles(path, measures_only=True)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                str(store), [f"{path.name} is damaged: {error}; delete it and run again"]
            ) from error
        if about is None:
            raise StoreError(str(store), [f"{path.name} is damaged; delete it and run again"])
        digest_of[record.image_id] = _digest(record, measures.column("tile_sha256"))
        slides.append(
            {
                **{name: getattr(record, name) for name in (*OF_SLIDE, "image_num")},
                "source": about["source"],
                "tiles": measures.num_rows,
                "bytes": path.stat().st_size,
                "width_px": about["width_px"],
                "height_px": about["height_px"],
                "um_per_px": about["um_per_px"],
                "levels": about["levels"],
                "tissue_share": about["tissue_share"],
                "mean_sharpness": round(_mean(measures, "sharpness"), 2),
                "mean_darkness": round(_mean(measures, "darkness"), 4),
                "stain_normalised": int(pc.sum(measures.column("stain_normalised")).as_py()),
            }
        )
        tables.append(measures.drop_columns(["tile_sha256"]).replace_schema_metadata(None))
    table = pa.concat_tables(tables).combine_chunks()
    counts = [slide["tiles"] for slide in slides]
    for place, name in enumerate(OF_SLIDE):
        table = table.add_column(place, name, _repeated([str(slide[name]) for slide in slides], counts))
    summary = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.as_dict(),
        "class_names": list(class_names),
        "data": str(data_dir),
        "fingerprint": hashlib.sha256(b"".join(digest_of[name] for name in sorted(digest_of))).hexdigest(),
        "tiles": table.num_rows,
        "slides": slides,
        "failed": [{"image_id": image_id, "reason": reason} for image_id, reason in failed],
    }
    return table.replace_schema_metadata(
        {META_KEY: json.dumps(summary, ensure_ascii=False).encode()}
    ), summary


def write(store: Path, table: pa.Table) -> None:
    """Write index.parquet aside and rename it into place."""
    aside = store / f".{INDEX_NAME}.partial"
    with aside.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", row_group_size=2**20)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(store / INDEX_NAME)


def _digest(record: SlideRecord, sha256: pa.ChunkedArray) -> bytes:
    head = "\0".join((record.image_id, record.patient_id, record.label, str(len(sha256)))).encode()
    return hashlib.sha256(head + b"".join(sha256.to_pylist())).digest()


def _mean(table: pa.Table, column: str) -> float:
    return float(pc.mean(table.column(column)).as_py())


def _repeated(values: Sequence[str], counts: Sequence[int]) -> pa.DictionaryArray:
    """Each value so many times, as a dictionary: a slide's name is stored once, not once a tile."""
    distinct = list(dict.fromkeys(values))
    place_of = {value: place for place, value in enumerate(distinct)}
    places = [place_of[value] for value, count in zip(values, counts, strict=True) for _ in range(count)]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(distinct, pa.string()))
