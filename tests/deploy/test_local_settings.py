"""What `python -m deploy up` may be told, and the files that a stack is made of."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy import local_settings
from deploy.commands import up as command
from deploy.errors import UsageError
from deploy.local_plan import LocalPlan, digest, mirror
from deploy.local_settings import LocalSettings, Ports
from serving.embedded import CHECKOUT
from serving.errors import ServingError

PROGRAMS = ("nginx", "prometheus", "prometheus-alertmanager")
needs_programs = pytest.mark.skipif(
    not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS),
    reason=f"one of {', '.join(PROGRAMS)} is not installed",
)
ANY = "0.0.0.0"  # noqa: S104
NOTHING_TOLD: dict[str, Any] = dict.fromkeys(("repository", "release", "live", "gateway_host", "mlflow"))


def test_what_is_not_told_stays() -> None:
    before = LocalSettings(release="/a", mlflow=True, ports=Ports(gateway=1234), gateway_names=("x.example",))
    after = before.changed({**NOTHING_TOLD, "gateway_host": "10.0.0.7"}, {"prometheus": 0})
    assert after == replace(before, gateway_host="10.0.0.7", ports=Ports(gateway=1234, prometheus=0))
    assert LocalSettings.from_json(json.loads(json.dumps(after.as_json()))) == after


def test_a_repository_takes_the_place_of_a_release_and_the_reverse() -> None:
    release = LocalSettings(release="/a", live="/live")
    repository = release.changed({**NOTHING_TOLD, "repository": "/models"}, {})
    assert (repository.repository, repository.release, repository.live) == ("/models", None, None)
    assert repository.changed({**NOTHING_TOLD, "release": "/b"}, {}).repository is None


@needs_programs
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--repository", "a", "--release", "b"), "not both"),
        (("--gateway-port", "70000"), "--gateway-port 70000"),
        (("--metrics-days", "0"), "--metrics-days 0"),
        (("--release", "a", "--gateway-name", "no name!"), "no host names"),
        (("--release", "a", "--http-port", "4567", "--grpc-port", "4567"), "must differ"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], error: str, tmp_path: Path) -> None:
    ports = [word for name in local_settings.PORT_NAMES if f"--{name}-port" not in words
             for word in (f"--{name.replace('_', '-')}-port", "0")]  # fmt: skip
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    state = tmp_path / "state"
    with pytest.raises(ServingError, match=re.escape(error)):
        command.run(parser.parse_args(["--state", str(state), *ports, *words]))
    assert [path.name for path in state.iterdir()] in ([], ["logs"])


def test_where_there_is_nothing_to_serve_it_says_how_to_get_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_settings, "DEMO_RELEASE", tmp_path / "release")
    monkeypatch.setattr(local_settings, "MODEL_REPOSITORY", tmp_path / "models")
    with pytest.raises(UsageError, match="make demo"):
        LocalSettings().with_source()
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.pbtxt").touch()
    assert LocalSettings().with_source().repository == str(tmp_path / "models")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "release.json").touch()
    assert LocalSettings().with_source().release == str(tmp_path / "release")


def test_a_program_that_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    code = "import deploy.local_plan as p, deploy.gateway as g; g.nginx = p.nginx = lambda: ''; p.check_programs()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "apt-get install nginx prometheus prometheus-alertmanager" in done.stderr


def test_prometheus_gets_our_files_with_targets_of_this_machine(tmp_path: Path) -> None:
    source, target = tmp_path / "docker", tmp_path / "a state" / "prometheus"
    for name, text in (
        ("prometheus.yml", "a"),
        ("rules/x.yml", "b"),
        ("targets/triton.json", "c"),
        ("tests/x.yml", "d"),
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (target / "targets").mkdir(parents=True)
    (target / "targets" / "triton.json").write_text("of this machine")
    (target / "rules").mkdir()
    (target / "rules" / "gone.yml").write_text("of an older version")
    mirror(source, target)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"prometheus.yml": "a", "rules/x.yml": "b", "targets/triton.json": "of this machine"}
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    mirror(source, target)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_a_file_that_changes_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text("a")
    first = digest([file])
    assert digest([file]) == first
    file.write_text("b")
    assert digest([file]) != first


@needs_programs
def test_only_the_gateway_has_another_address(tmp_path: Path) -> None:
    plan = LocalPlan(
        tmp_path, LocalSettings(release="/a", gateway_host=ANY, gateway_names=("slides.example",))
    )
    assert plan.url == "https://localhost:8443"
    assert {"localhost", "127.0.0.1", "slides.example"} <= set(plan.certificate_names)
    assert ANY not in plan.certificate_names
    for part in plan.parts():
        assert (part.name == "gateway") == any(ANY in text for text in (*part.argv, *part.env.values()))
    assert plan.gateway_settings().listen_host == ANY
    own = LocalPlan(tmp_path, LocalSettings(release="/a", gateway_host="10.1.2.3"))
    assert (own.url, "10.1.2.3" in own.certificate_names) == ("https://10.1.2.3:8443", True)
