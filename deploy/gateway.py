"""The gateway: nginx with the templates of docker/nginx, run on this machine.

How it is used:

    settings = GatewaySettings(directory=Path("run/gateway"), keys_file=KeyStore(DIRECTORY).nginx_file,
                               certificate=..., certificate_key=...)
    conf = render(settings)              # writes directory/nginx.conf and directory/gateway/*.conf
    check(conf)                          # nginx -t; GatewayError with nginx's own words
    process = subprocess.Popen(command(conf))   # in the foreground; SIGQUIT ends it when all requests are answered
    ...
    reload(conf)                         # new keys, certificate or settings, without dropping a request
    reopen_logs(conf)                    # after access.log was renamed

`python -m deploy keys` and `certificate` reload the gateways that they are told of by `--gateway DIRECTORY`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import GatewayError, ProgramNotFound, UsageError
from deploy.whole_file import write_whole
from serving.processes import start_time_ticks

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = CHECKOUT / "docker" / "nginx" / "templates"
MIB = 1 << 20
_VARIABLE = re.compile(r"\$\{(CLOTLINE_[A-Z_]+)\}")
# What nginx would read as syntax within a quoted string.
_UNSAFE = re.compile(r'["\'$\\;{}\n\r]')
_RELOAD_S = 10.0


def default_places(cores: int | None = None) -> int:
    """Requests in flight for interactive traffic: twice the instances of the models, of which each core has two."""
    return 4 * (cores or os.cpu_count() or 2)


@dataclass(frozen=True)
class GatewaySettings:
    """What the templates of docker/nginx need to know.

    Attributes:
        directory: of the configuration, and of all that nginx writes; made by `render`, one gateway each.
        keys_file: `deploy.keys.KeyStore(...).nginx_file`.
        certificate, certificate_key: PEM files of the server.
        client_ca: PEM file; clients must then show a certificate that it has signed (mutual TLS).
        listen_host, listen_port: the one TLS port, REST and gRPC.
        triton_http, triton_grpc: host:port of tritonserver.
        health: host:port of the supervisor, whose /ready is passed on.
        candidate_http, candidate_grpc: host:port of a second tritonserver, which serves a candidate; None: there is none.
        canary_percent: share of the inference requests that the candidate answers, 0 to 100, in steps of 0.01.
        shadow: host:port of `python -m deploy shadow`, None: there is none.
        shadow_percent: share of the inference requests of which it gets a copy, as above.
        in_flight: requests of interactive clients at Triton at once, the rest is refused; None: `default_places`.
        in_flight_batch: of batch clients; None: half of that.
        in_flight_slides: bags for slide_classifier over REST, counted besides; None: half of it.
        body_limit_bytes: of one request; Triton's own limit for HTTP is 64 MiB.
        client_timeout_s: for the head of a request as a whole, and between two pieces of its body.
        statistics: whether clients may ask for Triton's statistics, as perf_analyzer does.
        access_log: None: access.log in `directory`.
        server_name: of the certificate.
        workers: processes; None: one a core.
    """

    directory: Path
    keys_file: Path
    certificate: Path
    certificate_key: Path
    client_ca: Path | None = None
    listen_host: str = "127.0.0.1"
    listen_port: int = 8443
    triton_http: str = "127.0.0.1:8000"
    triton_grpc: str = "127.0.0.1:8001"
    health: str = "127.0.0.1:8003"
    candidate_http: str | None = None
    candidate_grpc: str | None = None
    canary_percent: float = 0.0
    shadow: str | None = None
    shadow_percent: float = 0.0
    in_flight: int | None = None
    in_flight_batch: int | None = None
    in_flight_slides: int | None = None
    body_limit_bytes: int = 64 * MIB
    client_timeout_s: int = 10
    statistics: bool = False
    access_log: Path | None = None
    server_name: str = "localhost"
    workers: int | None = None

    def variables(self) -> dict[str, str]:
        """Name -> value of each variable of the templates.

        Raises:
            UsageError: values that nginx could not be given, all of them.
        """
        places = default_places() if self.in_flight is None else self.in_flight
        half = -(-places // 2)
        batch = half if self.in_flight_batch is None else self.in_flight_batch
        slides = half if self.in_flight_slides is None else self.in_flight_slides
        canary = bool(self.candidate_http and self.candidate_grpc and self.canary_percent)
        shadow = bool(self.shadow and self.shadow_percent)
        host = f"[{self.listen_host}]" if ":" in self.listen_host else self.listen_host
        values = {
            "CLOTLINE_LISTEN": f"{host}:{self.listen_port}",
            "CLOTLINE_SERVER_NAME": self.server_name,
            "CLOTLINE_TRITON_HTTP": self.triton_http,
            "CLOTLINE_TRITON_GRPC": self.triton_grpc,
            "CLOTLINE_HEALTH": self.health,
            "CLOTLINE_CANDIDATE_HTTP": self.candidate_http or self.triton_http,
            "CLOTLINE_CANDIDATE_GRPC": self.candidate_grpc or self.triton_grpc,
            "CLOTLINE_CANARY": "on" if canary else "off",
            "CLOTLINE_CANARY_PERCENT": _percent(self.canary_percent if canary else 1),
            "CLOTLINE_SHADOW": "/gateway/shadow" if shadow else "off",
            "CLOTLINE_SHADOW_PERCENT": _percent(self.shadow_percent if shadow else 1),
            "CLOTLINE_SHADOW_TO": self.shadow or self.health,
            "CLOTLINE_IN_FLIGHT": str(places),
            "CLOTLINE_IN_FLIGHT_BATCH": str(batch),
            "CLOTLINE_IN_FLIGHT_SLIDES": str(slides),
            "CLOTLINE_BODY_LIMIT": _size(self.body_limit_bytes),
            "CLOTLINE_CLIENT_TIMEOUT_S": str(self.client_timeout_s),
            "CLOTLINE_STATISTICS": "metadata" if self.statistics else "other",
            "CLOTLINE_CERTIFICATE": str(self.certificate.absolute()),
            "CLOTLINE_CERTIFICATE_KEY": str(self.certificate_key.absolute()),
            "CLOTLINE_CLIENT_CA": str((self.client_ca or self.certificate).resolve()),
            "CLOTLINE_CLIENT_VERIFY": "on" if self.client_ca else "off",
            "CLOTLINE_KEYS": str(self.keys_file.resolve()),
            "CLOTLINE_ACCESS_LOG": str((self.access_log or self.directory / "access.log").resolve()),
            "CLOTLINE_SCRATCH": str(scratch_directory(self.directory)),
            "CLOTLINE_WORKERS": "auto" if self.workers is None else str(self.workers),
        }
        problems = [f"{name} cannot be {value!r}" for name, value in values.items() if _UNSAFE.search(value)]
        problems += [
            f"{name} must be 1 or more, not {value}"
            for name, value in (
                ("listen_port", self.listen_port),
                ("in_flight", places),
                ("in_flight_batch", batch),
                ("in_flight_slides", slides),
                ("client_timeout_s", self.client_timeout_s),
                ("body_limit_bytes", self.body_limit_bytes),
                ("workers", 1 if self.workers is None else self.workers),
            )
            if value < 1
        ]
        problems += [
            f"{name} must be 0, or 0.01 to 100, not {value:g}"
            for name, value in (
                ("canary_percent", self.canary_percent),
                ("shadow_percent", self.shadow_percent),
            )
            if not is_share(value)
        ]
        if problems:
            raise UsageError(f"settings of the gateway: {'; '.join(problems)}.")
        return values


def scratch_directory(directory: Path) -> Path:
    """Where nginx keeps its process id and the parts of requests that it does not hold in memory.

    The workers of a gateway that root starts run as nobody, who need not be able to enter `directory`; they get a place in
    /run, which only root can make.
    """
    if os.geteuid():
        return directory.resolve() / "scratch"
    mark = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return Path("/run/clotline-gateway") / mark


def render(settings: GatewaySettings) -> Path:
    """Write the configuration of nginx into `settings.directory`; returns the path of nginx.conf.

    Raises:
        UsageError: impossible settings; nothing was written.
    """
    values = settings.variables()
    texts = {}
    for template in sorted(TEMPLATES.rglob("*.template")):
        text = template.read_text()
        unknown = sorted({name for name in _VARIABLE.findall(text) if name not in values})
        if unknown:
            raise GatewayError(f"{template} has variables without a value: {', '.join(unknown)}.")
        texts[template.relative_to(TEMPLATES).with_suffix("")] = _VARIABLE.sub(lambda m: values[m[1]], text)
    settings.directory.mkdir(parents=True, exist_ok=True)
    scratch_directory(settings.directory).mkdir(parents=True, exist_ok=True, mode=0o755)
    for path, text in texts.items():
        target = settings.directory / path
        target.parent.mkdir(exist_ok=True)
        write_whole(target, text)
    return settings.directory / "nginx.conf"


def nginx() -> str:
    """Path of nginx; raises ProgramNotFound."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if not found:
        raise ProgramNotFound("nginx is not installed; Debian and Ubuntu: apt-get install nginx-light.")
    return found


def command(conf: Path) -> list[str]:
    """Argument list of an nginx that stays in the foreground and logs its errors to standard error."""
    return [*_invocation(conf, "daemon off;")]


def check(conf: Path) -> None:
    """`nginx -t`; raises GatewayError with what nginx says, or ProgramNotFound."""
    done = subprocess.run(
        [*_invocation(conf, ""), "-t", "-q"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "[emerg]" in line] or done.stderr.splitlines()
        words = re.sub(r"^nginx: ", "", said[0]) if said else "no reason given"
        raise GatewayError(f"nginx does not take {conf}: {words}")


def running_pid(conf: Path) -> int | None:
    """Process id of the gateway of this configuration, None if it does not run."""
    try:
        pid = int((scratch_directory(conf.parent) / "nginx.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"nginx" in words else None


def worker_pids(conf: Path) -> dict[int, int]:
    """Pid -> start time (ticks) of each worker of a running gateway; after a reload they finish what is under way, and end."""
    pid = running_pid(conf)
    found = {worker: start_time_ticks(worker) for worker in (_workers(pid) if pid else ())}
    return {worker: ticks for worker, ticks in found.items() if ticks is not None}


def reload(conf: Path) -> None:
    """Let a running gateway read its configuration, keys and certificate again; returns when new workers took over.

    Requests under way are finished by the old workers. A configuration that nginx does not take changes nothing.

    Raises:
        GatewayError: the configuration is wrong, or the gateway does not run.
    """
    check(conf)
    pid = running_pid(conf)
    if pid is None:
        raise GatewayError(f"no gateway of {conf} runs, so there is nothing to reload.")
    before = set(_workers(pid))
    os.kill(pid, signal.SIGHUP)
    give_up_s = time.monotonic() + _RELOAD_S
    while time.monotonic() < give_up_s:
        now = _workers(pid)
        # nginx starts the new workers, waits 100 ms, and tells the old ones to finish; they rename themselves.
        if set(now) - before and all(b"shutting down" in title for w, title in now.items() if w in before):
            return
        time.sleep(0.02)
    raise GatewayError(f"the gateway of {conf} (process {pid}) did not reload; its standard error says why.")


def reopen_logs(conf: Path) -> None:
    """Let a running gateway open its access log anew, after the file was renamed."""
    if os.geteuid() == 0:  # the workers could not open it as nobody; at a reload the master does
        reload(conf)
    elif (pid := running_pid(conf)) is not None:
        os.kill(pid, signal.SIGUSR1)


def remove_scratch(directory: Path) -> None:
    """Remove what a gateway that has ended left outside or inside its directory."""
    shutil.rmtree(scratch_directory(directory), ignore_errors=True)


def _workers(pid: int) -> dict[int, bytes]:
    """Process id -> title of the children of an nginx master."""
    found = {}
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes()
    except OSError:
        pass  # one that ended meanwhile; the next look will not meet it
    return found


def _invocation(conf: Path, directives: str) -> list[str]:
    user = "user nobody nogroup;" if os.geteuid() == 0 and _group_exists("nogroup") else ""
    found = [nginx(), "-p", f"{conf.parent.resolve()}/", "-c", str(conf.resolve())]
    given = f"{directives} {user}".strip()
    return [*found, "-g", given] if given else found


def _group_exists(name: str) -> bool:
    import grp

    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def is_share(percent: float) -> bool:
    """Whether it is a share that nginx' split_clients can give, which counts hundredths of a per cent, or none."""
    return percent == 0 or 0.01 <= percent <= 100


def _percent(percent: float) -> str:
    """As nginx writes it: two digits after the point."""
    return f"{percent:.2f}"


def _size(size_bytes: int) -> str:
    """As nginx writes it: whole MiB as `64m`."""
    return f"{size_bytes // MIB}m" if size_bytes % MIB == 0 else str(size_bytes)
