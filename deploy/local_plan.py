"""From settings to the files and parts of a stack on this machine: the same files that run in containers.

STATE/candidate/      live directory of a candidate's tritonserver (deploy/canary.py)
STATE/prometheus/     docker/prometheus, copied, with targets/ of this machine
STATE/alertmanager/   docker/alertmanager, copied
STATE/run/gateway/    nginx.conf and its access log (deploy/gateway.py)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from deploy.certificates import DEFAULT_NAMES, CertificateFiles
from deploy.errors import DeployError, ProgramNotFound
from deploy.gateway import GatewaySettings, check, command, nginx, render
from deploy.keys import KeyStore
from deploy.local_parts import Part
from deploy.local_settings import LOOPBACK, LocalSettings
from deploy.local_state import CANDIDATE, candidate_of
from deploy.whole_file import write_whole
from serving.embedded import CHECKOUT

DOCKER = CHECKOUT / "docker"
INSTALL = "Debian and Ubuntu: apt-get install nginx prometheus prometheus-alertmanager"
ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  told by name, never a default  # nosec B104
CHECK_S = 30.0
DIFFERENCES = "differences.jsonl"


def program(*names: str) -> str:
    """Path of the first of these that is installed. Raises ProgramNotFound, saying how to get it."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise ProgramNotFound(f"{names[0]} is not installed. {INSTALL}")


def check_programs() -> None:
    """Raises ProgramNotFound if nginx, Prometheus or Alertmanager is not installed."""
    try:
        nginx()
    except ProgramNotFound as error:
        raise ProgramNotFound(f"nginx is not installed. {INSTALL}") from error
    program("prometheus")
    program(*ALERTMANAGERS)


class LocalPlan:
    """One stack: where its files lie, and what its parts are."""

    def __init__(self, state: Path, settings: LocalSettings) -> None:
        self.state = state
        self.settings = settings
        self.ports = settings.ports
        self.keys = KeyStore(state / "keys")
        self.certificate = CertificateFiles(state / "tls")
        self.gateway = state / "run" / "gateway"
        self.live = Path(settings.live) if settings.live else state / "live"
        self.candidate_live = state / CANDIDATE

    @property
    def server_name(self) -> str:
        """Name of the tritonserver among the instances of `serving`."""
        return f"stack-{self.ports.http}"

    @property
    def candidate_name(self) -> str:
        """Name of the candidate's."""
        return candidate_of(self.server_name)

    @property
    def certificate_names(self) -> list[str]:
        """Names and addresses that the certificate has to be for."""
        host = self.settings.gateway_host
        own = [] if host in ANY_ADDRESS else [host]
        return list(dict.fromkeys([*DEFAULT_NAMES, *own, *self.settings.gateway_names]))

    @property
    def url(self) -> str:
        """Where clients find the gateway."""
        return f"https://{_shown(self.settings.gateway_host)}:{self.ports.gateway}"

    def write_files(self) -> None:
        """Write all that the parts read, and let nginx and Prometheus judge it. Raises DeployError."""
        for directory in (
            self.gateway,
            self.state / "data" / "prometheus",
            self.state / "data" / "alertmanager",
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keys.prepare()
        for name in ("prometheus", "alertmanager"):
            mirror(DOCKER / name, self.state / name)
        (self.state / "prometheus" / "targets").mkdir(exist_ok=True)
        for job, ports in self.targets().items():
            targets = [
                {"targets": [f"{LOOPBACK}:{port}"], "labels": {"server": server} if server else {}}
                for server, port in ports.items()
            ]
            _place(
                self.state / "prometheus" / "targets" / f"{job}.json", (json.dumps(targets) + "\n").encode()
            )
        check(render(self.gateway_settings()))
        self._check_prometheus()

    def targets(self) -> dict[str, dict[str, int]]:
        """Label `server` ("": none) and port of each target, for each job of prometheus.yml."""
        ports, settings = self.ports, self.settings
        found = {
            "triton": {"": ports.metrics},
            "supervisor": {"": ports.health},
            "gateway": {"": ports.gateway_metrics},
            "prometheus": {"": ports.prometheus},
            "alertmanager": {"": ports.alertmanager},
            "shadow": {"": ports.shadow} if settings.shadow_percent else {},
        }
        if settings.candidate:
            found["triton"][CANDIDATE] = ports.candidate_metrics
            found["supervisor"][CANDIDATE] = ports.candidate_health
        return found

    def gateway_settings(self) -> GatewaySettings:
        """For deploy/gateway.py."""
        ports, settings = self.ports, self.settings
        candidate = bool(settings.candidate)
        return GatewaySettings(
            directory=self.gateway,
            keys_file=self.keys.nginx_file,
            certificate=self.certificate.certificate,
            certificate_key=self.certificate.key,
            listen_host=self.settings.gateway_host,
            listen_port=ports.gateway,
            triton_http=f"{LOOPBACK}:{ports.http}",
            triton_grpc=f"{LOOPBACK}:{ports.grpc}",
            health=f"{LOOPBACK}:{ports.health}",
            candidate_http=f"{LOOPBACK}:{ports.candidate_http}" if candidate else None,
            candidate_grpc=f"{LOOPBACK}:{ports.candidate_grpc}" if candidate else None,
            canary_percent=settings.canary_percent,
            shadow=f"{LOOPBACK}:{ports.shadow}" if settings.shadow_percent else None,
            shadow_percent=settings.shadow_percent,
        )

    def _check_prometheus(self) -> None:
        promtool = shutil.which("promtool")
        if not promtool:
            return
        conf = self.state / "prometheus" / "prometheus.yml"
        done = subprocess.run(
            [promtool, "check", "config", str(conf)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_S, check=False,
        )  # fmt: skip
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())
            raise DeployError(f"Prometheus does not take {conf}: {said[-400:]}")

    def parts(self) -> tuple[Part, ...]:
        """In the order of their start: the gateway opens when there is something behind it."""
        settings = self.settings
        source = ["--repository", settings.repository] if settings.repository else ["--live", str(self.live)]
        parts = [self._server("triton", self.server_name, source, "")]
        if settings.candidate:
            own = ["--live", str(self.candidate_live)]
            parts.append(self._server(CANDIDATE, self.candidate_name, own, "candidate_"))
        if settings.shadow_percent:
            parts.append(self._shadow())
        parts += [self._access_metrics(), self._gateway(), self._alertmanager(), self._prometheus()]
        return (*parts, self._mlflow()) if settings.mlflow else tuple(parts)

    def _log(self, name: str) -> str:
        return str(self.state / "logs" / f"{name}.log")

    def _server(self, name: str, instance: str, source: list[str], prefix: str) -> Part:
        """A tritonserver; its ports are those whose names begin with `prefix`."""
        settings = self.settings
        ports = {
            what: getattr(self.ports, f"{prefix}{what}") for what in ("http", "grpc", "metrics", "health")
        }
        argv = [sys.executable, "-m", "serving", "up", *source, "--name", instance]
        for what, port in ports.items():
            argv += [f"--{what}-port", str(port)]
        health = f"http://{LOOPBACK}:{ports['health']}"
        return Part(
            name=name,
            argv=(*argv, "--timeout-s", f"{settings.timeout_s:g}"),
            log=self._log(name),
            directory=str(CHECKOUT),
            ready_url=f"{health}/ready",
            address=f"http {LOOPBACK}:{ports['http']}, grpc {LOOPBACK}:{ports['grpc']}, {health}/ready",
            stop_s=40.0,
            ready_s=settings.timeout_s + 30.0,
        )

    def _shadow(self) -> Part:
        ports, url = self.ports, f"http://{LOOPBACK}:{self.ports.shadow}"
        argv = [sys.executable, "-m", "deploy", "shadow", "--port", str(ports.shadow)]
        for side, prefix in (("stable", ""), ("candidate", "candidate_")):
            for what in ("http", "grpc"):
                argv += [f"--{side}-{what}", f"{LOOPBACK}:{getattr(ports, prefix + what)}"]
        return Part(
            name="shadow",
            argv=(*argv, "--log", str(self.state / "logs" / DIFFERENCES)),
            log=self._log("shadow"),
            directory=str(CHECKOUT),
            ready_url=f"{url}/health",
            address=f"{url}/metrics",
        )

    def _access_metrics(self) -> Part:
        url = f"http://{LOOPBACK}:{self.ports.gateway_metrics}/metrics"
        argv = [sys.executable, "-m", "deploy", "access-metrics", "--log", str(self.gateway / "access.log")]
        argv += [
            "--port",
            str(self.ports.gateway_metrics),
            "--certificate",
            str(self.certificate.certificate),
        ]
        return Part(
            name="access-metrics",
            argv=tuple(argv),
            log=self._log("access-metrics"),
            directory=str(CHECKOUT),
            ready_url=url,
            address=url,
        )

    def _gateway(self) -> Part:
        conf = self.gateway / "nginx.conf"
        read = [*sorted(self.gateway.rglob("*.conf")), self.keys.nginx_file, self.certificate.certificate]
        return Part(
            name="gateway",
            argv=tuple(command(conf)),
            log=self._log("gateway"),
            directory=str(self.state),
            ready_url=f"{self.url}/gateway/health",
            ca=str(self.certificate.ca),
            address=self.url,
            env={
                "CLOTLINE_LISTEN": f"{self.settings.gateway_host}:{self.ports.gateway}"
            },  # another one: start anew
            files_sha256=digest(read),
            reload_signal="SIGHUP",
            stop_signal="SIGQUIT",
            own_log=str(self.gateway / "access.log"),
            # Workers that run as nobody cannot open it; at a reload the master does (deploy/gateway.py).
            reopen_signal="SIGUSR1" if os.geteuid() else "SIGHUP",
        )

    def _alertmanager(self) -> Part:
        own = ["--config.file=alertmanager/alertmanager.yml", "--storage.path=data/alertmanager"]
        return self._watching("alertmanager", [program(*ALERTMANAGERS), *own, "--cluster.listen-address="])

    def _prometheus(self) -> Part:
        own = ["--config.file=prometheus/prometheus.yml", "--storage.tsdb.path=data/prometheus"]
        own += [f"--storage.tsdb.retention.time={self.settings.metrics_days}d"]
        own += [f"--storage.tsdb.retention.size={self.settings.metrics_mb}MB"]
        return self._watching("prometheus", [program("prometheus"), *own])

    def _watching(self, name: str, argv: list[str]) -> Part:
        """Prometheus or Alertmanager, which take the same options; paths are relative to the state directory."""
        port = getattr(self.ports, name)
        return Part(
            name=name,
            argv=(*argv, f"--web.listen-address={LOOPBACK}:{port}", "--log.level=warn"),
            log=self._log(name),
            directory=str(self.state),
            ready_url=f"http://{LOOPBACK}:{port}/-/ready",
            address=f"http://{LOOPBACK}:{port}",
            files_sha256=digest(sorted((self.state / name).rglob("*"))),
            reload_signal="SIGHUP",
        )

    def _mlflow(self) -> Part:
        url, runs = f"http://{LOOPBACK}:{self.ports.mlflow}", CHECKOUT / "runs"
        argv = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            LOOPBACK,
            "--port",
            str(self.ports.mlflow),
        ]
        argv += ["--workers", "1", "--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}"]
        argv += ["--artifacts-destination", str(runs / "mlflow-artifacts")]
        return Part(
            name="mlflow",
            argv=tuple(argv),
            log=self._log("mlflow"),
            directory=str(CHECKOUT),
            ready_url=f"{url}/health",
            address=url,
            env={"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            ready_s=60.0,
        )


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(f"{path}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def mirror(source: Path, target: Path) -> None:
    """Make `target` a copy of a directory of docker/ but for its targets; files that are the same are left alone.

    Prometheus watches the files, so they are never away.
    """
    files = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".md"
    }
    files = {path for path in files if path.parts[0] not in ("targets", "tests")}
    for path in files:
        _place(target / path, (source / path).read_bytes())
    for path in [path for path in target.rglob("*") if path.is_file()]:
        name = path.relative_to(target)
        if name not in files and name.parts[0] != "targets":
            path.unlink()


def _place(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _shown(host: str) -> str:
    """What a client on this machine calls an address: one that stands for all is reached as localhost."""
    if host in (*ANY_ADDRESS, LOOPBACK, "::1"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
