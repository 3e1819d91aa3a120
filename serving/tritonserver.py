"""Finding tritonserver, giving it the backends that a repository asks for, and its command line."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from serving.embedded import PYTHON_TAG, is_installed, library_directories, server_binary
from serving.errors import ServerNotFound
from serving.processes import INSTANCE_VARIABLE, shared_memory_prefix

PACKAGE = Path(__file__).resolve().parent
PYTHON_BASED_BACKENDS = PACKAGE / "backends"
PROOF_MODELS = PACKAGE / "proof_models"
CONTAINER_ROOT = Path("/opt/tritonserver")
ADMIN_HEADER = "clotline-admin"


@dataclass(frozen=True)
class TritonServer:
    """A tritonserver that was found: its binary, native backends, and how to run it."""

    binary: Path
    native_backends: Path
    embedded_home: Path | None  # None: a native installation (container), which brings its own Python

    @property
    def origin(self) -> str:
        """`embedded` or `native`."""
        return "embedded" if self.embedded_home else "native"


def find_tritonserver(home: Path, *, binary: str | None = None) -> TritonServer:
    """The tritonserver to use: `binary` if given, else the one on PATH, in /opt/tritonserver, or embedded in `home`.

    Raises ServerNotFound, saying how to install the embedded one.
    """
    candidates = (
        [binary] if binary else [shutil.which("tritonserver"), str(CONTAINER_ROOT / "bin" / "tritonserver")]
    )
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            path = Path(candidate).resolve()
            return TritonServer(path, path.parent.parent / "backends", None)
    if binary:
        raise ServerNotFound(
            f"{binary} is not an executable file; leave --tritonserver out to search for one."
        )
    if is_installed(home):
        path = server_binary(home)
        return TritonServer(path, path.parent.parent / "backends", home)
    raise ServerNotFound(
        f"no tritonserver on PATH or in {CONTAINER_ROOT}, and none is embedded in {home} for this checkout and "
        "Python; run `python -m serving install`."
    )


def compose(server: TritonServer, repository: Path, directory: Path) -> None:
    """Put the links of one server into `directory`: `repository`, `proof_models`, and `backends` made to measure."""
    (directory / "repository").symlink_to(repository)
    (directory / "proof_models").symlink_to(PROOF_MODELS)
    _compose_backends(server, directory / "backends")


def _compose_backends(server: TritonServer, directory: Path) -> None:
    """Fill `directory` with the native backends, and with ours of the names that have no native one.

    Native backends win. The Python backend's stub is the one of the running Python for the embedded server.
    """
    for backend in sorted(server.native_backends.iterdir()):
        if not backend.is_dir():
            continue
        if backend.name == "python":
            _place_files(backend, directory / "python")
        else:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / backend.name).symlink_to(backend)
    if server.embedded_home:
        stub = (
            server.binary.parent.parent / "python_backend_stubs" / PYTHON_TAG / "triton_python_backend_stub"
        )
        if not stub.exists():
            raise ServerNotFound(
                f"the embedded tritonserver has no Python stub for Python {PYTHON_TAG} ({stub})."
            )
        _place(stub, directory / "python" / stub.name)
    for backend in sorted(PYTHON_BASED_BACKENDS.iterdir()):
        if (backend / "model.py").exists() and not (directory / backend.name).exists():
            _place_files(backend, directory / backend.name)


def _place_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_file():
            _place(entry, target / entry.name)


def _place(source: Path, target: Path) -> None:
    """Hard link or copy: Triton refuses a symbolic link in a Python-based backend ("escapes backend directory")."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def environment(server: TritonServer, instance_id: str, proof_report: Path) -> dict[str, str]:
    """Environment of the server: ours, with the embedded libraries and the stubs' Python first, and nothing of the
    calling Python."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env[INSTANCE_VARIABLE] = instance_id
    env["CLOTLINE_PROOF_REPORT"] = str(proof_report)
    env.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    # Threads of torch that spin while they wait take the cores from the other stubs.
    env.setdefault("OMP_WAIT_POLICY", "passive")
    if server.embedded_home:
        libraries = [str(server.embedded_home / "server" / "nvidia_pytriton.libs"), *library_directories()]
        env["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
        env["PATH"] = f"{server.embedded_home / 'python' / 'bin'}:{env.get('PATH', '')}"
        env["PYTHONNOUSERSITE"] = "1"
    return env


@dataclass(frozen=True)
class Addresses:
    """Where an instance listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int


def command_line(
    server: TritonServer,
    directory: Path,
    addresses: Addresses,
    instance_id: str,
    admin_token: str,
    extra: list[str],
) -> list[str]:
    """Argument list of tritonserver over what `compose` put into `directory`.

    Explicit model control with all models loaded; the control API answers only to `admin_token`.
    """
    return [
        str(server.binary),
        f"--model-repository={directory / 'repository'}",
        f"--model-repository={directory / 'proof_models'}",
        f"--backend-directory={directory / 'backends'}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--exit-on-error=false",
        "--exit-timeout-secs=10",
        f"--http-address={addresses.host}",
        f"--http-port={addresses.http_port}",
        f"--grpc-address={addresses.host}",
        f"--grpc-port={addresses.grpc_port}",
        f"--metrics-address={addresses.host}",
        f"--metrics-port={addresses.metrics_port}",
        f"--http-restricted-api=model-repository:{ADMIN_HEADER}={admin_token}",
        f"--grpc-restricted-protocol=model-repository:{ADMIN_HEADER}={admin_token}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(instance_id)}",
        "--model-load-thread-count=8",
        *extra,
    ]
