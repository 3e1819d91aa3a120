"""The command line as a user starts it."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clients.__main__ import main

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "clients", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
    )


def last_document(result: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(result.stdout.splitlines()[-1])


def test_help_is_complete() -> None:
    for command, options in (
        (
            "predict",
            ("--url", "--model", "--json", "--heatmap-dir", "--labels", "--um-per-px", "--timeout-s"),
        ),
        ("classify", ("--url", "--model", "--json", "--batch", "--concurrency")),
    ):
        text = run(command, "--help").stdout
        assert all(option in text for option in options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict"], "SLIDE"),
        (["predict", "a.tif", "--url", "ftp://host"], "unknown scheme 'ftp'"),
        (["predict", "a/x_0.tif", "b/x_0.tif"], "same name would count as one: x_0"),
        (["predict", "a.tif", "--labels", "other.csv"], "must be called train.csv"),
        (["predict", "a.tif", "--heatmap-class", "CE"], "needs --heatmap-dir"),
        (["predict", "a.tif", "--timeout-s", "0"], "above 0"),
        (["predict", "a.tif", "--concurrency", "-1"], "above 0"),
        (["predict", "a.tif", "--concurrency", "many"], "invalid"),
    ],
)
def test_bad_usage_exits_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_no_server_is_one_clear_error(scheme: str, slide_path: Path, unused_port: int) -> None:
    result = run("predict", slide_path, "--url", f"{scheme}://127.0.0.1:{unused_port}")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {scheme}://127.0.0.1:{unused_port}: no connection")
    assert "Traceback" not in result.stderr


def test_ctrl_c_exits_130(slide_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "clients",
                "predict",
                str(slide_path),
                "--url",
                f"127.0.0.1:{silent.getsockname()[1]}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        silent.settimeout(30)
        connection, _ = silent.accept()  # the client is now waiting for an answer
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
        connection.close()
    assert process.returncode == 130
    assert "Traceback" not in errors


def write_labels(folder: Path, class_names: list[str]) -> Path:
    path = folder / "train.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", "center_id", "patient_id", "image_num", "label"])
        writer.writerow(["abc123_0", "1", "patient-of-the-file", "0", class_names[0]])
        writer.writerow(["other_0", "1", "other", "0", class_names[1]])
    return path


def test_slides_patients_heatmaps_and_a_bad_slide(
    served_repository: Any, slide_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken_0.tif").write_bytes(b"II*\x00 and then nothing")
    result = run(
        "predict",
        tmp_path / "broken_0.tif",
        slide_path,
        "--url",
        served_repository.http_url,
        "--heatmap-dir",
        tmp_path,
    )
    assert result.returncode == 1, result.stderr
    assert "broken_0.tif" in result.stderr
    assert "Traceback" not in result.stderr
    document = last_document(result)
    assert [entry["image_id"] for entry in document["slides"]] == ["abc123_0"]
    assert [entry["patient_id"] for entry in document["patients"]] == ["abc123"]
    assert document["failed"][0]["file"].endswith("broken_0.tif")
    assert "abc123_0" in result.stdout.splitlines()[2]
    with Image.open(document["slides"][0]["heatmap"]) as heatmap:
        assert heatmap.format == "PNG"


def test_labels_name_patients_and_truth(served_repository: Any, slide_path: Path, tmp_path: Path) -> None:
    plain = last_document(run("predict", slide_path, "--url", served_repository.http_url))
    labels = write_labels(tmp_path, list(plain["slides"][0]["probabilities"]))
    result = run("predict", slide_path, "--url", served_repository.http_url, "--labels", labels)
    assert result.returncode == 0, result.stderr
    assert last_document(result)["patients"][0]["patient_id"] == "patient-of-the-file"
    assert "(right)" in result.stdout or "(WRONG)" in result.stdout


def test_json_is_one_document_a_line(served_repository: Any, slide_path: Path) -> None:
    result = run("predict", slide_path, "--url", served_repository.http_url, "--json")
    assert result.returncode == 0, result.stderr
    slide, everything = (json.loads(line) for line in result.stdout.splitlines())
    assert slide["tiles"][0]["side_px"] > 0
    assert everything["slides"][0]["tiles"] == len(slide["tiles"])


def test_tiles_are_classified_and_bad_ones_told(served_repository: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 90, 140)).save(tmp_path / "tile.png")
    (tmp_path / "text.png").write_text("no image")
    result = run(
        "classify",
        tmp_path / "text.png",
        tmp_path / "none.png",
        tmp_path / "tile.png",
        "--url",
        served_repository.http_url,
    )
    assert result.returncode == 1
    document = last_document(result)
    assert [Path(entry["tile"]).name for entry in document["tiles"]] == ["tile.png"]
    assert [entry["error"] for entry in document["failed"]] == ["RequestRefused", "FileNotFoundError"]
    assert "Traceback" not in result.stderr
