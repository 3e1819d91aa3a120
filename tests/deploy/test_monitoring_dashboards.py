"""The dashboards' files are what the code gives, Grafana can place what is in them, and they show what was promised."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.__main__ import COMMANDS
from deploy.commands.dashboards import DIRECTORY
from deploy.dashboards import UNITS, Dashboard, Panel, dashboards, with_variables
from deploy.errors import DeployError
from deploy.preview_charts import Canvas, heatmap, lines, shown, states
from deploy.preview_prometheus import Prometheus, Series, legend
from serving.commands import main

grafana = pytest.importorskip(
    "deploy.dashboards_grafana", reason="grafana-foundation-sdk needs Python 3.11", exc_type=DeployError
)

ROOT = Path(__file__).parents[2]
NINE = {
    "Request rate",
    "Latency",
    "Active requests",
    "Model status",
    "Error rate",
    "Predictions by class",
    "Confidence",
    "Batch sizes",
    "Errors by type",
}
GPU_SERIES = {
    "nv_gpu_utilization": 0.5,
    "nv_gpu_memory_used_bytes": 4e9,
    "nv_gpu_memory_total_bytes": 8e10,
    "nv_gpu_power_usage": 200.0,
    "nv_gpu_power_limit": 700.0,
}
"""Names and units of docs.nvidia.com's page on Triton's metrics."""


def all_panels() -> list[tuple[Dashboard, Panel]]:
    """With their dashboards."""
    return [(dashboard, panel) for dashboard in dashboards() for panel in dashboard.panels()]


def test_files_are_what_the_code_gives() -> None:
    assert grafana.out_of_date(DIRECTORY) == []


def test_a_stale_a_missing_and_a_foreign_file_are_found_and_mended(tmp_path: Path) -> None:
    names = sorted(grafana.files())
    assert grafana.write(tmp_path) == names
    (tmp_path / names[0]).write_text("{}\n")
    (tmp_path / names[1]).unlink()
    (tmp_path / "old.json").write_text("{}\n")
    expected = sorted([names[0], names[1], "old.json"])
    assert grafana.out_of_date(tmp_path) == expected
    assert grafana.write(tmp_path) == expected
    assert grafana.out_of_date(tmp_path) == []


def test_the_nine_classic_panels_are_on_the_first_dashboard() -> None:
    assert {panel.title for panel in dashboards()[0].panels()} >= NINE


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard.uid)
def test_json_of_a_dashboard(dashboard: Dashboard) -> None:
    told = json.loads(grafana.dashboard_json(dashboard))
    assert told["uid"] == dashboard.uid
    assert [entry["name"] for entry in told["templating"]["list"]] == ["datasource", "server", "model"]
    [mark] = told["annotations"]["list"]
    assert mark["useValueForTime"] == "on"
    assert mark["datasource"]["uid"] == "${datasource}"
    panels = [panel for panel in told["panels"] if panel["type"] != "row"]
    assert len(panels) == len(list(dashboard.panels()))
    for panel in panels:
        assert panel["description"]
        assert all(target["legendFormat"] and target["expr"] for target in panel["targets"])
    assert told["editable"] is False


def differences(told: Any, back: Any, where: str = "") -> list[str]:
    """Where `back` lacks something of `told`."""
    if isinstance(told, dict) and isinstance(back, dict):
        return [found for key in told for found in differences(told[key], back.get(key), f"{where}.{key}")]
    if isinstance(told, list) and isinstance(back, list) and len(told) == len(back):
        return [found for number, pair in enumerate(zip(told, back, strict=True))
                for found in differences(*pair, f"{where}[{number}]")]  # fmt: skip
    return [] if told == back else [where]


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard.uid)
def test_json_fits_grafanas_own_shapes(dashboard: Dashboard) -> None:
    """Read with the models that Grafana's schemas give, plugins among them, and written again, nothing is missing."""
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models import dashboard as shapes

    plugins.register_default_plugins()
    told = json.loads(grafana.dashboard_json(dashboard))
    back = json.loads(json.dumps(shapes.Dashboard.from_json(told), cls=encoder.JSONEncoder))
    own = {
        f".annotations.list[0].{name}" for name in ("titleFormat", "textFormat", "useValueForTime", "step")
    }
    assert set(differences(told, back)) == own
    told["panels"][1]["fieldConfig"]["defaults"]["unti"] = "s"
    assert ".panels[1].fieldConfig.defaults.unti" in differences(told, back)


def test_problems_of_a_dashboard_are_all_found() -> None:
    told = json.loads(grafana.dashboard_json(dashboards()[0]))
    assert grafana.problems_of(json.dumps(told)) == []
    _, first, second, third, *_ = told["panels"]
    second["id"] = first["id"]
    second["gridPos"] = {**first["gridPos"], "w": 30}
    third["datasource"]["uid"] = "prometheus"
    third["fieldConfig"]["defaults"]["unit"] = "parsec"
    third["targets"] = []
    found = grafana.problems_of(json.dumps(told))
    for words in ("same id", "beyond column", "lies over", "fixed data source", "no unit", "no queries"):
        assert any(words in problem for problem in found), (words, found)


def test_panels_say_what_they_show() -> None:
    for dashboard, panel in all_panels():
        assert panel.unit in UNITS, panel.title
        assert panel.about.endswith("."), panel.title
        for query in panel.queries:
            assert 'server=~"$server"' in query.expr or "ALERTS" in query.expr or "(up)" in query.expr, (
                dashboard.uid,
                panel.title,
            )


def test_provisioning_finds_source_and_files() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    prometheus = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "clotline.yml").read_text())["providers"]
    assert provider["type"] == "file"


def test_docs_say_which_panels_were_not_run_on_a_gpu() -> None:
    told = (
        (ROOT / "docs" / "monitoring.md")
        .read_text()
        .partition("**Not run by us on a GPU**")[2]
        .partition("\n- ")[0]
    )
    titles = {panel.title for _, panel in all_panels() if any(query.needs_gpu for query in panel.queries)}
    assert set(re.findall(r"\*([^*]+)\*", told)) == titles


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_gpu_panels_with_synthetic_series(tmp_path: Path) -> None:
    """What no machine of ours can answer: promtool evaluates the expressions over series as Triton names them."""
    queries = [query for _, panel in all_panels() for query in panel.queries if query.needs_gpu]
    asked = {re.match(r"\w+", query.expr)[0] for query in queries}  # type: ignore[index]
    assert asked == set(GPU_SERIES)
    labels = '{gpu_uuid="GPU-1",server="main"}'
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f"{name}{labels}", "values": f"{value:g}x5"} for name, value in GPU_SERIES.items()
        ],
        "promql_expr_test": [
            {
                "expr": with_variables(query.expr, rate_interval="1m"),
                "eval_time": "2m",
                "exp_samples": [{"labels": f"{name}{labels}", "value": GPU_SERIES[name]}],
            }
            for query in queries
            for name in [re.match(r"\w+", query.expr)[0]]  # type: ignore[index]
        ],
    }
    (tmp_path / "gpu.yml").write_text(json.dumps({"tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "gpu.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_are_shown_with_units() -> None:
    told = [
        ("percentunit", 0.0125),
        ("bytes", 3 * 2**30),
        ("s", 0.0052),
        ("s", 12.0),
        ("reqps", 250.4),
        ("s", float("nan")),
    ]
    assert [shown(value, unit) for unit, value in told] == [
        "1.25 %",
        "3 GiB",
        "5.2 ms",
        "12 s",
        "250 req/s",
        "no number",
    ]
    assert legend("p95 {{model}} {{absent}}", {"model": "tile_classifier"}) == "p95 tile_classifier"


def test_charts_leave_gaps_where_there_is_no_number() -> None:
    canvas = Canvas(400, 0.0, 60.0, [30.0])
    gap = Series({}, [(0.0, 1.0), (10.0, 2.0), (20.0, float("nan")), (30.0, 1.0), (40.0, 3.0)])
    drawn = lines(canvas, [("a", gap)], "none", highest=None, stacked=False)
    assert drawn.count("<polyline") == 2
    assert "nan" not in drawn
    assert drawn.count("<title>release</title>") == 1


def test_stacked_areas_lie_on_one_another() -> None:
    flat = [Series({}, [(0.0, 1.0), (60.0, 1.0)]), Series({}, [(0.0, 3.0), (60.0, 3.0)])]
    drawn = lines(Canvas(400, 0.0, 60.0), [("a", flat[0]), ("b", flat[1])], "none", highest=4.0, stacked=True)
    tops = sorted(
        {points.split()[0].split(",")[1] for points in re.findall(r'<polygon points="([^"]+)"', drawn)}
    )
    assert tops == ["128.0", "8.0"]  # a quarter, and all, of 160 px above 168


def test_states_and_buckets_are_drawn_as_counted() -> None:
    canvas = Canvas(400, 0.0, 60.0)
    ready = Series({}, [(0.0, 1.0), (20.0, 0.0), (40.0, 1.0)])
    assert states(canvas, [("tile_classifier", ready)]).count("#b3261e") == 1
    buckets = [
        Series({"le": le}, [(30.0, below)]) for le, below in (("0.5", 0.0), ("0.9", 4.0), ("+Inf", 4.0))
    ]
    assert heatmap(canvas, buckets, 10.0).count("<rect") == 1


def test_prometheus_that_is_not_there_or_refuses_is_one_clear_error() -> None:
    with pytest.raises(DeployError, match="must start with http"):
        Prometheus("127.0.0.1:9090")
    with pytest.raises(DeployError, match="no answer of Prometheus"):
        Prometheus("http://127.0.0.1:1").now("up")


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["--minutes", "0"], 2, "--minutes 0"),
        (["--prometheus", "localhost:9090"], 2, "must start with http"),
        (["--prometheus", "http://127.0.0.1:1"], 1, "no answer of Prometheus"),
    ],
)
def test_preview_that_cannot_be_drawn_is_one_line_and_no_file(
    words: list[str], exit_code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(None, COMMANDS, ["preview", "--out", str(page), *words]) == exit_code
    told = capsys.readouterr().err.strip()
    assert said in told
    assert told.count("\n") == 0
    assert not page.exists()
