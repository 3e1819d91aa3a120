"""What `python -m deploy up` may be told, and what it remembers of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from deploy.errors import UsageError
from deploy.gateway import is_share
from serving.embedded import CHECKOUT

DEMO_RELEASE = CHECKOUT / "runs" / "demo" / "release"
MODEL_REPOSITORY = CHECKOUT / "model_repository"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """Where a stack listens; 0 takes a free one. All but the gateway's are on the loopback address."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    health: int = 8003
    gateway_metrics: int = 8004
    gateway: int = 8443
    prometheus: int = 9090
    alertmanager: int = 9093
    mlflow: int = 5000
    candidate_http: int = 8010
    candidate_grpc: int = 8011
    candidate_metrics: int = 8012
    candidate_health: int = 8013
    shadow: int = 8005


PORT_NAMES = tuple(field.name for field in fields(Ports))


@dataclass(frozen=True)
class LocalSettings:
    """Settings of a stack on this machine.

    Attributes:
        repository: Triton model repository that is served as it is; else a Release is served.
        release: Release that a new live directory begins with.
        live: live directory; None: one in the state directory, which goes when the stack does.
        ports: see Ports.
        gateway_host: address that the gateway listens on.
        gateway_names: further names and addresses that the certificate is made for.
        mlflow: whether MLflow runs too.
        metrics_days, metrics_mb: how long, and how much of it, Prometheus keeps what it has scraped.
        timeout_s: seconds that the start of tritonserver may take.
        candidate: Release that a second tritonserver serves, "" for none: a canary, a shadow, or both.
        canary_percent: of the inference requests, that the candidate answers; 0 without one.
        shadow_percent: of the inference requests, that both answer for comparison; 0 without one.
    """

    repository: str | None = None
    release: str | None = None
    live: str | None = None
    ports: Ports = Ports()
    gateway_host: str = LOOPBACK
    gateway_names: tuple[str, ...] = ()
    mlflow: bool = False
    metrics_days: int = 15
    metrics_mb: int = 2048
    timeout_s: float = 120.0
    candidate: str = ""
    canary_percent: float = 0.0
    shadow_percent: float = 0.0

    @property
    def used_ports(self) -> set[str]:
        """Names of the ports that something listens on."""
        used = set(PORT_NAMES)
        if not self.mlflow:
            used.discard("mlflow")
        if not self.candidate:
            used -= {name for name in PORT_NAMES if name.startswith("candidate_")}
        if not self.shadow_percent:
            used.discard("shadow")
        return used

    def as_json(self) -> dict[str, Any]:
        """For `stack.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> LocalSettings:
        """What `as_json` wrote."""
        return cls(**{**told, "ports": Ports(**told["ports"]), "gateway_names": tuple(told["gateway_names"])})

    def changed(self, told: dict[str, Any], ports: dict[str, int]) -> LocalSettings:
        """These settings with what was told now; what is None was not told.

        Raises UsageError for settings that cannot be meant.
        """
        given = {key: value for key, value in told.items() if value is not None}
        if given.get("repository") and (given.get("release") or given.get("live")):
            raise UsageError(
                "--repository serves a directory as it is; --release and --live serve Releases: not both."
            )
        source: dict[str, None] = {}
        if given.get("repository"):
            source = {"release": None, "live": None}
        elif given.get("release") or given.get("live"):
            source = {"repository": None}
        settings = replace(self, **{**source, **given}, ports=replace(self.ports, **ports))
        settings.check()
        return settings

    def check(self) -> None:
        """Raises UsageError, naming the option."""
        for name in PORT_NAMES:
            port = getattr(self.ports, name)
            if not 0 <= port <= 65535:
                raise UsageError(
                    f"--{name.replace('_', '-')}-port {port}: a port lies between 0 (a free one) and 65535."
                )
        for option, value in (("--metrics-days", self.metrics_days), ("--metrics-mb", self.metrics_mb)):
            if value < 1:
                raise UsageError(f"{option} {value}: at least 1.")
        for option, percent in (("--share", self.canary_percent), ("--shadow", self.shadow_percent)):
            if not is_share(percent):
                raise UsageError(f"{option} {percent:g}%: 0, or 0.01 to 100 per cent.")
        if self.candidate and self.repository:
            raise UsageError(
                "a plain repository has no releases with numbers, so none can be tried beside it: serve a --release, or end "
                "the candidate first (`python -m deploy canary stop`)."
            )

    def with_source(self) -> LocalSettings:
        """The same with something to serve: the demo's release if there is one, else the checkout's model repository."""
        if self.repository or self.release or self.live:
            return self
        if (DEMO_RELEASE / "release.json").exists():
            return replace(self, release=str(DEMO_RELEASE))
        if any(MODEL_REPOSITORY.glob("*/config.pbtxt")):
            return replace(self, repository=str(MODEL_REPOSITORY))
        raise UsageError(
            f"there is nothing to serve: no release in {DEMO_RELEASE} and no model in {MODEL_REPOSITORY}. Make one with "
            "`make demo`, or name yours: --release RELEASE or --repository DIR."
        )


def absolute(path: Path | None) -> str | None:
    """As a setting: the checkout is not where every part works."""
    return str(path.resolve()) if path else None
