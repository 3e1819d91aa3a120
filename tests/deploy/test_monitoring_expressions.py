"""Every expression of every panel, annotation, variable and rule is asked of a real Prometheus, and has to have an answer.

Prometheus scrapes a real tritonserver under load (good tiles, bad ones, slides, over HTTP and gRPC, with and without a key),
its supervisor, and the gateway. Files are those of docker/prometheus but for their intervals, which are a second.
Expressions of alerts are asked without their thresholds (`without_thresholds`), and what looks back for hours looks back for
seconds: only there does a test have no history.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import yaml

from deploy.dashboards import RELEASE_MARK, dashboards, with_variables
from deploy.preview import Span, preview
from deploy.preview_prometheus import Prometheus, Series
from serving.embedded import triton_home
from tests.conftest import export
from tests.deploy.gateway_stack import INFER, needs_nginx
from tests.deploy.monitoring_stack import (
    DOCKER,
    Watched,
    needs_alertmanager,
    needs_prometheus,
    tensor_body,
    under_load,
    wait_for,
    watched,
)

pytestmark = [needs_nginx, needs_prometheus, needs_alertmanager]
RULES = DOCKER / "prometheus" / "rules"
GPU_ALERTS = {"GpuMemoryShort"}
"""Not asked here: no GPU. promtool fires and clears them with synthetic series."""
CANDIDATE_ALERTS = {"CandidateDisagrees"}
"""Not asked here: nothing is compared. `test_stack_canary` asks for what it is made of."""
SLIDE = "/v2/models/slide_classifier/infer"
CLIENTS = 3
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def live(untrained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Everything, under load, with a stub that was killed."""
    directory = tmp_path_factory.mktemp("watched")
    release = directory / "release"
    export(untrained_checkpoint, "--release", release, "--formats", "onnx")
    serve = ["--live", str(directory / "live"), "--release", str(release), *_cache()]
    with watched(directory, serve, alertmanager=True) as found:
        tiles = [path.read_bytes() for path in sorted((release / "golden").glob("*.jpg"))]
        found.kill_a_stub("tile_preprocess")
        with under_load(lambda stop, number: _load(found, tiles, stop, number), CLIENTS):
            yield found


def _cache() -> list[str]:
    """Options for a response cache; the embedded server does not know where its own lies."""
    caches = next((triton_home() / "server").rglob("libtritoncache_local.so"), None)
    where = [f"--triton-arg=--cache-directory={caches.parents[1]}"] if caches else []
    return [*where, "--triton-arg=--cache-config=local,size=1048576"]


def _load(found: Watched, tiles: list[bytes], stop: threading.Event, number: int) -> None:
    """Requests of all kinds until `stop`; what is answered to them is no matter here."""
    stack = found.stack
    asks: dict[str, tuple[str, str, tuple[str, bytes]]] = {
        "tile": (INFER, "lab", tensor_body("tile", [3, 1], tiles[:3])),
        "bad tile": (INFER, "lab", tensor_body("tile", [1, 1], [b"no image"])),
        "slide": (SLIDE, "lab", tensor_body("tiles", [6], tiles[:6])),
        "empty slide": (SLIDE, "lab", tensor_body("tiles", [0], [])),
        "one at a time": (INFER, "narrow", tensor_body("tile", [2, 1], tiles[3:5])),
        "wrong key": (INFER, "nobody", tensor_body("tile", [1, 1], tiles[:1])),
    }
    while not stop.is_set():
        for path, who, (headers, body) in asks.values():
            try:
                stack.ask(path, key=stack.keys.get(who, "wrong"), method="POST", headers=headers, body=body)
            except OSError:
                time.sleep(0.1)
        if number == 0:
            _ask_grpc(found, tiles[0])


def _ask_grpc(found: Watched, tile: bytes) -> None:
    credentials = grpc.ssl_channel_credentials(found.stack.ca.read_bytes())
    with grpcclient.InferenceServerClient(found.stack.authority, ssl=True, creds=credentials) as client:
        tensor = grpcclient.InferInput("tile", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[tile]], dtype=object))
        try:
            client.infer(
                "tile_classifier", [tensor], headers={"x-api-key": found.stack.keys["lab"]}, client_timeout=5
            )
        except Exception:
            time.sleep(0.1)


def panel_queries() -> list[tuple[str, str]]:
    """(where, expression) of every panel that needs no GPU."""
    return [
        (f"{dashboard.uid}: {panel.title}: {query.legend}", query.expr)
        for dashboard in dashboards()
        for panel in dashboard.panels()
        for query in panel.queries
        if not query.needs_gpu
    ]


def rules() -> list[dict[str, Any]]:
    """All rules of all files."""
    groups = [
        group for file in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]
    ]
    return [rule for group in groups for rule in group["rules"]]


def without_thresholds(expr: str) -> list[str]:
    """Expressions that have an answer if and only if the parts of an alert's expression have.

    Comparisons become `bool` (every series is kept), `unless` becomes `and`, `absent(x)` becomes `(x)`; what `or` joins is asked
    part by part; an offset is a second.
    """
    outside = re.split(r'("[^"]*"|\{[^}]*\})', expr)
    for place in range(0, len(outside), 2):
        text = re.sub(r"(==|!=|>=|<=|>|<)", r"\1 bool", outside[place])
        text = re.sub(r"\bunless\b", "and", text)
        text = re.sub(r"\babsent\b", "", text)
        outside[place] = re.sub(r"\boffset \w+", "offset 1s", text)
    return _parts("".join(outside))


def _parts(expr: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for found in re.finditer(r"[()]|\bor\b", expr):
        if found[0] == "or" and depth == 0:
            parts.append(expr[begin : found.start()])
            begin = found.end()
        depth += {"(": 1, ")": -1}.get(found[0], 0)
    return [*parts, expr[begin:]]


def test_thresholds_are_taken_out_of_alerts() -> None:
    assert without_thresholds('up{job!="a"} == 0 or x offset 1d > 2 unless on (y) absent(z)') == [
        'up{job!="a"} == bool 0 ',
        " x offset 1s > bool 2 and on (y) (z)",
    ]
    assert without_thresholds("a - (b or 0 * a) >= 3") == ["a - (b or 0 * a) >= bool 3"]


def is_answer(series: list[Series]) -> bool:
    """True if one of the series has a number."""
    return any(math.isfinite(value) for entry in series for _, value in entry.points)


def ask_all(prometheus: Prometheus, asked: dict[str, str]) -> None:
    """Fails if an expression has no answer within TIMEOUT_S; names all that have none."""
    left = dict(asked)

    def all_answered() -> bool:
        for where, expr in list(left.items()):
            if is_answer(prometheus.now(expr)):
                del left[where]
        return not left

    wait_for(all_answered, TIMEOUT_S, lambda: "\n".join(f"{where}: {expr}" for where, expr in left.items()))


def test_panels(live: Watched) -> None:
    asked = {where: with_variables(expr, rate_interval="1m") for where, expr in panel_queries()}
    assert len(asked) == len(panel_queries()), "two queries of a panel have the same legend"
    ask_all(live.prometheus, asked)


def test_variables_and_marks(live: Watched) -> None:
    asked = {"mark": with_variables(RELEASE_MARK.expr, rate_interval="1m")}
    for dashboard in dashboards():
        for variable in dashboard.variables:
            asked[f"{dashboard.uid} {variable.name}"] = with_variables(variable.metric, rate_interval="1m")
    ask_all(live.prometheus, asked)
    for dashboard in dashboards():
        for variable in dashboard.variables:
            found = live.prometheus.now(with_variables(variable.metric, rate_interval="1m"))
            assert {series.labels.get(variable.of_label) for series in found} - {None, ""}, variable
    [mark] = live.prometheus.now(with_variables(RELEASE_MARK.expr, rate_interval="1m"))
    assert abs(mark.points[0][1] / 1000 - time.time()) < 3600
    assert {"server", "number", "release_id"} <= set(mark.labels)


def test_recorded_series(live: Watched) -> None:
    asked = {}
    for rule in rules():
        if "record" in rule:
            labels = ",".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
            asked[f"{rule['record']} = {rule['expr']}"] = rule["expr"]
            asked[f"{rule['record']}{{{labels}}}"] = f"{rule['record']}{{{labels}}}"
    ask_all(live.prometheus, asked)


def test_alerts(live: Watched) -> None:
    names = {rule["alert"] for rule in rules() if "alert" in rule}
    elsewhere = GPU_ALERTS | CANDIDATE_ALERTS
    assert names >= elsewhere
    asked = {
        f"{rule['alert']}, part {number}": part
        for rule in rules()
        if "alert" in rule and rule["alert"] not in elsewhere
        for number, part in enumerate(without_thresholds(rule["expr"]))
    }
    ask_all(live.prometheus, asked)


def test_no_rule_fails(live: Watched) -> None:
    groups = live.prometheus.get("rules")["groups"]
    assert {Path(group["file"]).name for group in groups} == {file.name for file in RULES.glob("*.yml")}
    wrong = [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
    assert not wrong


def test_releases_are_a_label_of_their_own(live: Watched) -> None:
    found = live.prometheus.now("nv_inference_request_success")
    models = {(series.labels["model"], series.labels.get("release", "")) for series in found}
    assert {("tile_classifier", ""), ("tile_classifier", "1"), ("tile_preprocess", "1")} <= models
    assert not [model for model, _ in models if "__r" in model]


def test_bad_inputs_are_no_faults_of_a_model(live: Watched) -> None:
    """Triton counts them as failures of the ensemble, twice each; the recorded ratio leaves them out."""
    failures = live.prometheus.now('sum(nv_inference_request_failure{reason="OTHER"})')
    assert failures[0].latest
    rejected = live.prometheus.now('sum(clotline_rejected_inputs_total{reason="not_an_image"})')
    assert rejected[0].latest
    ratio = live.prometheus.now('clotline:model_fault_ratio:5m{model="tile_classifier"}')
    assert [series.latest for series in ratio] == [0.0]


def test_preview_draws_every_panel_that_needs_no_gpu(live: Watched) -> None:
    page = preview(live.prometheus, Span(minutes=2))
    needs_gpu = {
        f"{dashboard.title}: {panel.title}"
        for dashboard in dashboards()
        for panel in dashboard.panels()
        if any(query.needs_gpu for query in panel.queries)
    }
    assert set(page.empty) == needs_gpu
    assert page.html.count("<svg") > page.panels / 2
    assert "$server" not in page.html
    assert "nan" not in re.sub(r"<title>.*?</title>", "", page.html.lower()).replace("cannot", "").split()
