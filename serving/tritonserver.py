"""Finding tritonserver, giving it the backends that a repository asks for, and its command line."""

from __future__ import annotations

import os
import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path

from serving import native
from serving.embedded import PYTHON_TAG, is_installed, library_directories, server_binary
from serving.errors import ServerNotFound, UsageError
from serving.processes import INSTANCE_VARIABLE, shared_memory_prefix
from slides.switches import is_off

PACKAGE = Path(__file__).resolve().parent
PYTHON_BASED_BACKENDS = PACKAGE / "backends"
PROOF_MODELS = PACKAGE / "proof_models"
CONTAINER_ROOT = Path("/opt/tritonserver")
ADMIN_HEADER = "clotline-admin"
ADMIN_METADATA = f"triton-grpc-protocol-{ADMIN_HEADER}"  # the same over gRPC
SUMMARY_QUANTILES = "0.5:0.02,0.95:0.005,0.99:0.001"  # quantile:error, of the last minute (docs/metrics.md)
RESTRICTED_APIS = ("model-repository", "shared-memory", "trace", "logging", "statistics")


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


def backend_names(server: TritonServer) -> list[str]:
    """Names of the backends that `compose` gives a server: its native ones, and ours."""
    native = [entry.name for entry in server.native_backends.iterdir() if entry.is_dir()]
    return sorted({*native, *python_based_backends()})


def python_based_backends() -> list[str]:
    """Names of our Python-based backends."""
    return sorted(entry.name for entry in PYTHON_BASED_BACKENDS.iterdir() if (entry / "model.py").exists())


def counting_backends(server: TritonServer) -> set[str]:
    """Those of our backends that `compose` gives a server: they count predictions, native ones do not (docs/metrics.md)."""
    return {name for name in python_based_backends() if not (server.native_backends / name).is_dir()}


def composed_counting_backends(directory: Path) -> set[str]:
    """The same of the server for which `compose` filled `directory`."""
    return {name for name in python_based_backends() if not (directory / "backends" / name).is_symlink()}


def compose(server: TritonServer, repository: Path, directory: Path) -> None:
    """Put the links of one server into `directory`: `repository`, `proof_models`, and `backends` made to measure.

    Those of an earlier life of the server are replaced.
    """
    for link in ("repository", "proof_models"):
        (directory / link).unlink(missing_ok=True)
    shutil.rmtree(directory / "backends", ignore_errors=True)
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
    for name in python_based_backends():
        if not (directory / name).exists():
            _place_files(PYTHON_BASED_BACKENDS / name, directory / name)


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
    # Tiles and tensors of 100 kB and more: glibc would map and unmap each one, page faults and all (docs/performance.md).
    # Larger ones are rare, and in the heap, above all in an arena a thread, their memory would never be given back.
    env.setdefault("MALLOC_MMAP_THRESHOLD_", str(8 << 20))
    env.setdefault("MALLOC_ARENA_MAX", str(max(2, len(os.sched_getaffinity(0)))))
    env.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 20))
    # A network's weights are tens of MB, read from one end to the other for every batch: in pages of 4 kB most of them
    # have left the processor's table of pages by then.
    tunables = env.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb=" not in tunables:
        env["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    if server.embedded_home:
        libraries = [str(server.embedded_home / "server" / "nvidia_pytriton.libs"), *library_directories()]
        env["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
        env["PATH"] = f"{server.embedded_home / 'python' / 'bin'}:{env.get('PATH', '')}"
        env["PYTHONNOUSERSITE"] = "1"
        # Stubs multiply no matrices in NumPy: threads of OpenBLAS would only spin at their start, for half of its CPU time.
        env.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not is_off(native.SWITCH_VARIABLE):
        env.update(native.preloaded(env))
    # For stubs of other versions; that of 2.51 does not heed it (see embedded.py).
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    return env


@dataclass(frozen=True)
class Addresses:
    """Where an instance listens. HTTP has an address of its own, because Triton has no TLS for it."""

    host: str
    http_host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    health_port: int


@dataclass(frozen=True)
class Security:
    """What of the server is open to whom.

    Attributes:
        open_apis: of RESTRICTED_APIS, those that need no admin token.
        grpc_tls_cert, grpc_tls_key: PEM files; gRPC is encrypted with them.
        grpc_tls_ca: PEM file; clients must then show a certificate that it has signed (mutual TLS).
    """

    open_apis: tuple[str, ...] = ()
    grpc_tls_cert: Path | None = None
    grpc_tls_key: Path | None = None
    grpc_tls_ca: Path | None = None

    def check(self) -> None:
        """Raises UsageError for an API or files that tritonserver would not take, or not say why."""
        for api in self.open_apis:
            if api not in RESTRICTED_APIS[1:]:
                raise UsageError(f"--open-api {api}: choose from {', '.join(RESTRICTED_APIS[1:])}.")
        if bool(self.grpc_tls_cert) != bool(self.grpc_tls_key):
            raise UsageError("--grpc-tls-cert and --grpc-tls-key belong together: give both.")
        if self.grpc_tls_ca and not self.grpc_tls_cert:
            raise UsageError("--grpc-tls-ca (mutual TLS) also takes --grpc-tls-cert and --grpc-tls-key.")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.grpc_tls_cert:
                context.load_cert_chain(self.grpc_tls_cert, self.grpc_tls_key, password="")  # nosec B106
            if self.grpc_tls_ca:
                context.load_verify_locations(self.grpc_tls_ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageError(
                f"the TLS files {', '.join(str(f) for f in self._files())} cannot be used: {error}. They must be PEM, "
                "readable, the key without a password, and the key of this certificate."
            ) from error

    def _files(self) -> list[Path]:
        return [file for file in (self.grpc_tls_cert, self.grpc_tls_key, self.grpc_tls_ca) if file]

    @property
    def grpc_tls(self) -> str:
        """`off`, `server` or `mutual`."""
        return "mutual" if self.grpc_tls_ca else "server" if self.grpc_tls_cert else "off"

    def arguments(self, admin_token: str) -> list[str]:
        """Of tritonserver's command line."""
        restricted = ",".join(api for api in RESTRICTED_APIS if api not in self.open_apis)
        found = [
            f"--http-restricted-api={restricted}:{ADMIN_HEADER}={admin_token}",
            f"--grpc-restricted-protocol={restricted}:{ADMIN_HEADER}={admin_token}",
        ]
        if self.grpc_tls_cert and self.grpc_tls_key:
            found += [
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={self.grpc_tls_cert.resolve()}",
                f"--grpc-server-key={self.grpc_tls_key.resolve()}",
            ]
        if self.grpc_tls_ca:
            found += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.grpc_tls_ca.resolve()}"]
        return found


def command_line(
    server: TritonServer,
    directory: Path,
    addresses: Addresses,
    instance_id: str,
    admin_token: str,
    security: Security,
    extra: list[str],
) -> list[str]:
    """Argument list of tritonserver over what `compose` put into `directory`.

    Explicit model control with all models loaded; the restricted APIs answer only to `admin_token`.
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
        f"--http-address={addresses.http_host}",
        f"--http-port={addresses.http_port}",
        f"--grpc-address={addresses.host}",
        f"--grpc-port={addresses.grpc_port}",
        f"--metrics-address={addresses.host}",
        f"--metrics-port={addresses.metrics_port}",
        *security.arguments(admin_token),
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(instance_id)}",
        "--model-load-thread-count=8",
        # A request object that is kept for reuse keeps the memory of its request until then: none is kept.
        "--grpc-infer-allocation-pool-size=0",
        "--metrics-config=summary_latencies=true",
        f"--metrics-config=summary_quantiles={SUMMARY_QUANTILES}",
        *extra,
    ]
