"""The page, from answers as `bench` gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf.__main__ import main
from perf.report import verdicts, work_named
from perf.standard_work import STANDARD_WORK


def answer(ratio: float, rows: tuple[str, str] = ("http", "grpc")) -> dict[str, Any]:
    figures = {
        "ratio_to_limit": ratio, "requests_per_s": 100.0 * ratio, "mean_ms": 80.0, "p50_ms": 79.0, "p95_ms": 96.0,
        "p95_to_mean": 1.2, "latency_to_limit": 1.1, "cpu_s_per_1000": 20.0, "cpu_ratio": 1.04, "load_cpu_s_per_1000": 0.1,
    }  # fmt: skip
    return {
        **figures,
        "protocols": {rows[0]: figures, rows[1]: {**figures, "ratio_to_limit": ratio + 0.01}},
        "limit_model": "tile_network_onnx", "limit_per_s": 100.0, "limit_cpu_s_per_1000": 19.2, "limit_call_ms": 20.0,
        "ratio_rounds": {rows[0]: [ratio, ratio], rows[1]: [ratio, ratio + 0.02]},
        "tiles": {"count": 16, "mean_bytes": 121_681},
        "layout": {"processes": 2, "threads": 1, "batch": 1, "spin": True},
        "rounds": 2, "answers_checked": 500, "max_abs_diff": 1e-7, "load_average": 2.0,
        "machine": {"cpu": "a <CPU>", "cores": 2, "ram_gb": 8.0},
    }  # fmt: skip


def test_a_figure_at_its_bar_is_met_and_below_it_is_not() -> None:
    work = work_named("resnet18")
    assert verdicts(work, answer(0.96))["ratio_to_limit"] == {"value": 0.96, "bar": ">= 0.96", "met": True}
    assert not verdicts(work, answer(0.9599))["ratio_to_limit"]["met"]
    assert verdicts(work, answer(0.9))["p95_to_mean"]["met"]


def test_the_page_is_written_again_from_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        work.name: answer(0.9, ("8", "64") if work.slides else ("http", "grpc")) for work in STANDARD_WORK
    }
    del results["slides"]["protocols"]["8"]["p50_ms"], results["slides"]["protocols"]["8"]["p95_to_mean"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["report", "--out", str(tmp_path), "--again"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert set(told["bars"]) == set(results)
    assert told["passed_by_bar"] == {
        "1": False,
        "1s": True,
        "2": True,
        "1b": True,
        "3": False,
        "4": False,
    }
    assert not told["passed"]
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "a &lt;CPU&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert "MISSED" in text
    assert "121,681 bytes" in text
    assert "http, 64 slides" in text
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ratio.png", "cpu.png"))
    assert not list(tmp_path.glob(".*"))


def test_a_report_that_met_its_bars_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"resnet18": answer(0.97)}))
    assert main(["report", "--out", str(tmp_path), "--again"]) == 0
    assert json.loads(capsys.readouterr().out)["passed_by_bar"] == {"1": True}


def test_nothing_to_write_again_and_unknown_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", str(tmp_path), "--again"]) == 2
    assert main(["report", "--out", str(tmp_path), "--only", "resnet19"]) == 2
    assert "resnet18-alone" in capsys.readouterr().err
