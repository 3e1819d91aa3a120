"""compose.yaml and .env.example: the schema, and that all that one file names is in the others.

There is no Docker Engine here, so nothing is started by these tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from deploy import containers
from deploy.access_metrics import AccessMetrics, LogFollower
from deploy.gateway import GatewaySettings, check
from tests.deploy.docker_files import (
    COMPOSE,
    DOCKER,
    DOCKERFILES,
    EXAMPLE,
    SECRET_WORDS,
    SERVICES,
    VARIABLE,
    environment,
    instructions,
    mounts,
    texts,
)


def test_compose_is_valid_by_the_schema_of_its_specification() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_every_variable_is_explained_and_every_explained_one_is_used() -> None:
    used = {match[1] for text in texts(COMPOSE) for match in VARIABLE.finditer(text)}
    assert used == set(EXAMPLE)
    lines = (DOCKER / ".env.example").read_text().splitlines()
    for name in EXAMPLE:
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name}="))
        comment = next(line for line in reversed(lines[:at]) if not re.match(r"\w+=", line))
        assert comment.startswith("# "), f"{name} has no comment above it"


def test_defaults_of_compose_are_those_of_the_example() -> None:
    for text in texts(COMPOSE):
        for match in VARIABLE.finditer(text):
            default = match[2] or ""
            if default.startswith((":-", "-")):
                assert default.lstrip(":")[1:] == EXAMPLE[match[1]], match[0]


def test_nothing_has_a_default_that_must_be_set() -> None:
    required = containers.required_variables()
    assert required == {name for name, value in EXAMPLE.items() if not value} - {"TRITON_DIGEST"}
    for text in texts(COMPOSE):
        for match in VARIABLE.finditer(text):
            if match[1] in required:
                assert not (match[2] or "").startswith((":-", "-")), match[0]


def test_there_is_no_password_anywhere_but_in_files() -> None:
    assert not [name for name in EXAMPLE if re.search("PASSWORD|TOKEN", name)]
    for name, service in SERVICES.items():
        for key, value in environment(name).items():
            if SECRET_WORDS.search(key) and not key.endswith(("_FILE", "__FILE")):
                pytest.fail(f"{name}: {key}={value}")
        for secret in service.get("secrets", []):
            assert secret in COMPOSE["secrets"]
    files = {name: entry["file"] for name, entry in COMPOSE["secrets"].items()}
    assert files == {name: f"${{CLOTLINE_SECRETS}}/{name}" for name in containers.PASSWORDS}
    for name, service in SERVICES.items():
        told = {value for value in environment(name).values() if str(value).startswith("/run/secrets/")}
        assert told <= {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["networks"]
    for source, target, read_only in mounts(service):
        if source.startswith((".", "$")):
            assert read_only, f"{source}:{target} may be written to"


def test_every_service_that_stays_has_a_health_check_and_a_profile() -> None:
    with_own = {f"clotline-{path.name.removesuffix('.Dockerfile')}" for path in DOCKERFILES
                if any(word == "HEALTHCHECK" and rest != "NONE" for word, rest in instructions(path))}  # fmt: skip
    assert with_own == {"clotline-server", "clotline-mlflow"}
    for name, service in SERVICES.items():
        if name in ("client", "workbench"):  # one answers and ends, the other waits for commands
            continue
        assert "healthcheck" in service or service["image"].split(":")[0] in with_own, name
        assert set(service["profiles"]) <= set(containers.PROFILES)
        test = service.get("healthcheck", {}).get("test", ["CMD"])
        assert test[0] == "CMD", f"{name}: a check without a shell"


def test_only_the_gateway_can_be_reached_from_outside() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"gateway", "prometheus", "alertmanager", "grafana", "mlflow"}
    for name, ports in published.items():
        for port in ports:
            address = VARIABLE.sub(lambda match: EXAMPLE[match[1]], port)
            assert address.startswith("127.0.0.1:"), f"{name}: {address}"
            assert port.startswith("${CLOTLINE_GATEWAY_HOST") == (name == "gateway")
    inner = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert inner == {"serving", "monitoring", "tracking"}
    for name, service in SERVICES.items():
        outer = set(service["networks"]) - inner
        assert bool(outer) == (name in published or name == "workbench"), f"{name} is on {outer}"


def test_services_depend_on_services_of_their_profile_that_they_share_a_network_with() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert set(service["networks"]) & set(SERVICES[other]["networks"]), (name, other)
            if how.get("required", True):
                assert set(service["profiles"]) <= set(SERVICES[other]["profiles"]), (name, other)


def test_volumes_and_networks_are_all_declared_and_used() -> None:
    named = {
        source
        for service in SERVICES.values()
        for source, _, _ in mounts(service)
        if re.match(r"[a-z]", source)
    }
    assert named == set(COMPOSE["volumes"])
    assert {network for service in SERVICES.values() for network in service["networks"]} == set(
        COMPOSE["networks"]
    )


def test_what_is_mounted_from_the_checkout_is_there() -> None:
    found = [
        source for service in SERVICES.values() for source, _, _ in mounts(service) if source.startswith(".")
    ]
    assert len(found) >= 6
    for source in found:
        assert (DOCKER / source).exists(), source


def test_the_gateway_gets_every_variable_of_its_templates(tmp_path: Path) -> None:
    given = environment("gateway")
    wanted = set()
    for template in (DOCKER / "nginx" / "templates").rglob("*.template"):
        wanted |= set(re.findall(r"\$\{(CLOTLINE_\w+)\}", template.read_text()))
    assert {name for name in given if name.startswith("CLOTLINE_")} == wanted
    files = (tmp_path / "keys.conf", tmp_path / "server.pem", tmp_path / "server.key")
    assert wanted <= set(GatewaySettings(tmp_path, *files).variables())
    assert re.compile(given["NGINX_ENVSUBST_FILTER"]).match("CLOTLINE_LISTEN")
    assert (given["NGINX_ENVSUBST_TEMPLATE_DIR"], given["NGINX_ENVSUBST_OUTPUT_DIR"]) == (
        "/templates",
        "/etc/nginx",
    )
    places = {target for _, target, _ in mounts(SERVICES["gateway"])}
    places |= {place.split(":")[0] for place in SERVICES["gateway"]["tmpfs"]}
    for name in ("CERTIFICATE", "CERTIFICATE_KEY", "KEYS", "ACCESS_LOG", "SCRATCH"):
        path = given[f"CLOTLINE_{name}"]
        assert path in places or str(Path(path).parent) in places, path
    made = containers.make_secrets(tmp_path / "secrets", ())
    assert set(made) == {*containers.PASSWORDS, "tls", "keys"}
    for name in ("CERTIFICATE", "CERTIFICATE_KEY", "KEYS"):
        inside = given[f"CLOTLINE_{name}"].removeprefix("/secrets/")
        assert (tmp_path / "secrets" / inside).is_file(), inside


@pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="nginx is not installed"
)
def test_nginx_takes_its_templates_with_the_values_of_compose(tmp_path: Path) -> None:
    """What the nginx image does with them (envsubst), but for places and names that are in containers only."""
    values = {
        name: VARIABLE.sub(lambda match: EXAMPLE[match[1]], str(value))
        for name, value in environment("gateway").items()
    }
    containers.make_secrets(tmp_path / "secrets", ())
    for directory in ("logs", "scratch"):
        (tmp_path / directory).mkdir()
    templates = DOCKER / "nginx" / "templates"
    for template in templates.rglob("*.template"):
        text = template.read_text()
        for name, value in values.items():
            here = re.sub(r"^/(secrets|logs|scratch)", f"{tmp_path}/\\1", value)
            text = text.replace(f"${{{name}}}", here.replace("triton:", "127.0.0.1:"))
        target = tmp_path / "nginx" / template.relative_to(templates).with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    check(tmp_path / "nginx" / "nginx.conf")


def start_access_metrics() -> ModuleType:
    """The script of the container, as a module."""
    spec = importlib.util.spec_from_file_location("start_access_metrics", DOCKER / "start_access_metrics.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_access_log_is_cut_and_every_line_counted(tmp_path: Path) -> None:
    script, log = start_access_metrics(), tmp_path / "access.log"
    line = {"protocol": "http", "route": "infer", "status": "200", "grpc_status": "", "request_s": "0.01",
            "request_bytes": "10", "key": "lab.1", "upstream_status": "200", "track": "stable"}  # fmt: skip
    metrics, follower = AccessMetrics(), LogFollower(log)
    with log.open("a", buffering=1) as nginx:
        for _ in range(50):
            nginx.write(json.dumps(line) + "\n")
            script.count(metrics, follower, log, 1000)
            assert log.stat().st_size <= 1000
    labels = {"protocol": "http", "route": "infer", "status": "200", "key": "lab.1", "track": "stable"}
    assert metrics.registry.get_sample_value("clotline_gateway_requests_total", labels) == 50
    assert SERVICES["access-metrics"]["command"] == [environment("gateway")["CLOTLINE_CERTIFICATE"]]


def test_what_nginx_writes_is_what_is_counted() -> None:
    assert environment("gateway")["CLOTLINE_ACCESS_LOG"] == "/logs/access.log"
    assert Path("/logs/access.log") == start_access_metrics().LOG
    for name in ("gateway", "access-metrics"):
        assert ("access-log", "/logs", False) in list(mounts(SERVICES[name]))
        assert [match[1] for match in VARIABLE.finditer(SERVICES[name]["user"])] == [
            "CLOTLINE_UID",
            "CLOTLINE_GID",
        ]


def test_targets_of_prometheus_are_services_on_its_networks() -> None:
    configuration = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["file_sd_configs"][0]["files"][0] for job in configuration["scrape_configs"]}
    files = {f"targets/{path.name}" for path in (DOCKER / "prometheus" / "targets").glob("*.json")}
    assert files == set(jobs.values())
    ports = {"triton": 8002, "supervisor": 8003, "gateway": 8004, "prometheus": 9090, "alertmanager": 9093}
    assert (
        json.loads((DOCKER / "prometheus" / jobs.pop("shadow")).read_text()) == []
    )  # no service of compose.yaml
    for job, name in jobs.items():
        (group,) = json.loads((DOCKER / "prometheus" / name).read_text())
        (target,) = group["targets"]
        service, port = target.split(":")
        assert int(port) == ports[job]
        assert service == "prometheus" or set(SERVICES[service]["networks"]) & set(
            SERVICES["prometheus"]["networks"]
        )
    exposed = next(
        rest for word, rest in instructions(DOCKER / "server.Dockerfile") if word == "EXPOSE"
    ).split()
    assert exposed == ["8000", "8001", "8002", "8003"]
    assert start_access_metrics().PORT == 8004


def test_prometheus_finds_its_files_where_it_looks_for_them() -> None:
    configuration = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    placed = {target for _, target, _ in mounts(SERVICES["prometheus"])}
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    for path in configuration["rule_files"]:
        assert f"/etc/prometheus/{Path(path).parent}" in placed
    assert "/etc/prometheus/targets" in placed
    assert "--config.file=/etc/alertmanager/alertmanager.yml" in SERVICES["alertmanager"]["command"]
    assert "/etc/alertmanager/alertmanager.yml" in {
        target for _, target, _ in mounts(SERVICES["alertmanager"])
    }


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    placed = {target for _, target, _ in mounts(SERVICES["grafana"])}
    (provider,) = yaml.safe_load(next((provisioning / "dashboards").glob("*.y*ml")).read_text())["providers"]
    assert provider["options"]["path"] in placed
    (source,) = yaml.safe_load(next((provisioning / "datasources").glob("*.y*ml")).read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_mlflow_finds_its_database() -> None:
    script = (DOCKER / "start_mlflow.py").read_text()
    database = environment("postgres")
    assert (
        f"postgresql+psycopg2://{database['POSTGRES_USER']}@postgres:5432/{database['POSTGRES_DB']}" in script
    )
    assert database["POSTGRES_PASSWORD_FILE"] in script
    assert environment("workbench")["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert '"mlflow:5000' in script
    assert set(SERVICES["workbench"]["networks"]) & set(SERVICES["mlflow"]["networks"])
