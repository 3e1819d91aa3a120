"""One server as it should run: without any right of root, on a repository it cannot write to, gRPC with mutual TLS."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from serving.embedded import triton_home
from serving.processes import processes_of
from serving.tritonserver import ADMIN_HEADER, ADMIN_METADATA, Security
from tests.serving.conftest import ANY_PORT, launching
from tests.serving.public_model import ask, expected, make_public

WITHOUT_RIGHTS = """
mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec unshare --user --map-user=1000 --map-group=1000 "$@"
"""
RESTRICTED = {
    "model-repository": ("POST", "v2/repository/index"),
    "shared-memory": ("GET", "v2/systemsharedmemory/status"),
    "trace": ("GET", "v2/trace/setting"),
    "logging": ("GET", "v2/logging"),
    "statistics": ("GET", "v2/models/stats"),
}
OPEN = ("v2", "v2/health/live", "v2/health/ready", "v2/models/steady", "v2/models/steady/config")


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem; server.pem, client.pem signed by it, each with its .key; other.key of nobody."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates")
    directory = tmp_path_factory.mktemp("tls")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(directory, *new, "-x509", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(directory, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(directory, "x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-extfile", "names", "-in", f"{name}.csr", "-out", f"{name}.pem")  # fmt: skip
    openssl(directory, "ecparam", "-genkey", "-name", "prime256v1", "-out", "other.key")
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed server with a run directory of its own."""
    home = tmp_path_factory.mktemp("home") / "triton"
    home.mkdir()
    for installed in ("server", "python", "installed.json"):
        (home / installed).symlink_to(triton_home() / installed)
    return home


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, certificates: Path, home: Path) -> Iterator[dict[str, Any]]:
    """The server. Root's capabilities are dropped, and its repository is mounted read-only."""
    repository = make_public(tmp_path_factory.mktemp("read-only") / "models")
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:
        before = ("unshare", "--mount", "sh", "-c", WITHOUT_RIGHTS, str(repository))
        if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
            pytest.skip("this system does not let root drop its rights in namespaces of its own")
    for path in [repository, *repository.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    with launching() as start:
        yield start(
            repository, "--name", "secure",
            "--grpc-tls-cert", str(certificates / "server.pem"),
            "--grpc-tls-key", str(certificates / "server.key"),
            "--grpc-tls-ca", str(certificates / "ca.pem"),
            env={"CLOTLINE_TRITON_HOME": str(home)}, before=before,
        ).ready()  # fmt: skip
    for path in [repository, *repository.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


@pytest.fixture(scope="module")
def state(up: dict[str, Any], home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "run" / "secure.json").read_text()))


def call(url: str, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    data = b"{}" if method == "POST" else None
    request = urllib.request.Request(f"http://{url}/{path}", data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_needs_neither_root_nor_a_writable_repository(up: dict[str, Any], state: dict[str, Any]) -> None:
    assert ask(up["http"], b"x" * 7) == expected(b"x" * 7)
    pids = processes_of(state["instance_id"])
    assert len(pids) == 4  # guardian, tritonserver, two stubs
    for pid in [*pids, up["pid"]]:
        assert Path(f"/proc/{pid}/status").read_text().split("CapEff:")[1].split()[0] == "0" * 16


@pytest.mark.parametrize("api", RESTRICTED)
def test_restricted_apis_take_the_admin_token(up: dict[str, Any], state: dict[str, Any], api: str) -> None:
    assert call(up["http"], *RESTRICTED[api]) == 403
    assert call(up["http"], *RESTRICTED[api], headers={ADMIN_HEADER: "wrong"}) == 403
    assert call(up["http"], *RESTRICTED[api], headers={ADMIN_HEADER: state["admin_token"]}) == 200


@pytest.mark.parametrize("path", OPEN)
def test_what_clients_need_is_open(up: dict[str, Any], path: str) -> None:
    assert call(up["http"], "GET", path) == 200


def test_the_token_is_shown_to_nobody(up: dict[str, Any], state: dict[str, Any], home: Path) -> None:
    assert len(state["admin_token"]) >= 32
    pids = [*processes_of(state["instance_id"]), up["pid"]]
    assert len(pids) == 5
    for pid in pids:
        assert state["admin_token"].encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    run = home / "run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    for file in (run / "secure.json", run / "secure.log"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert state["admin_token"] not in (run / "secure.log").read_text()


def test_grpc_lets_in_whom_the_ca_has_signed(
    up: dict[str, Any], state: dict[str, Any], certificates: Path
) -> None:
    tensor = grpc.InferInput("tile", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"x" * 9]], dtype=np.object_))
    ca = str(certificates / "ca.pem")
    signed = {
        "private_key": str(certificates / "client.key"),
        "certificate_chain": str(certificates / "client.pem"),
    }
    client = grpc.InferenceServerClient(up["grpc"], ssl=True, root_certificates=ca, **signed)
    answer = client.infer("tile_classifier", [tensor], client_timeout=10).as_numpy("probabilities")
    assert answer.tolist() == [expected(b"x" * 9)]
    with pytest.raises(InferenceServerException, match="restricted"):
        client.get_model_repository_index(client_timeout=10)
    index = client.get_model_repository_index(
        headers={ADMIN_METADATA: state["admin_token"]}, as_json=True, client_timeout=10
    )
    assert {"tile_classifier", "steady"} <= {row["name"] for row in index["models"]}
    client.close()
    for options in ({}, {"ssl": True, "root_certificates": ca}):
        client = grpc.InferenceServerClient(up["grpc"], **options)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            client.infer("tile_classifier", [tensor], client_timeout=10)
        client.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grpc-tls-cert", "server.pem"], "belong together"),
        (["--grpc-tls-ca", "ca.pem"], "also takes --grpc-tls-cert"),
        (["--grpc-tls-cert", "server.pem", "--grpc-tls-key", "other.key"], "the key of this certificate"),
        (["--grpc-tls-cert", "server.pem", "--grpc-tls-key", "none.key"], "No such file"),
        (["--open-api", "model-repository"], "choose from shared-memory"),
        (["--live", "somewhere"], "not both"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    tmp_path: Path, certificates: Path, arguments: list[str], says: str
) -> None:
    repository = make_public(tmp_path / "models")
    named = [str(certificates / word) if "." in word else word for word in arguments]
    command = [sys.executable, "-m", "serving", "up", "--repository", str(repository), *ANY_PORT, *named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_an_api_can_be_opened() -> None:
    opened = Security(open_apis=("statistics",)).arguments("t")
    assert opened == [
        "--http-restricted-api=model-repository,shared-memory,trace,logging:clotline-admin=t",
        "--grpc-restricted-protocol=model-repository,shared-memory,trace,logging:clotline-admin=t",
    ]


def test_http_stays_on_loopback_where_grpc_is_encrypted(tmp_path: Path, certificates: Path) -> None:
    from serving.launcher import UpOptions
    from serving.ports import choose_ports

    def http_host(**options: Any) -> str:
        addresses, ports = choose_ports(UpOptions(**options))
        ports.close()
        return addresses.http_host

    tls = Security((), certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    free = {"home": tmp_path, "host": "0.0.0.0", "http_port": 0, "grpc_port": 0, "metrics_port": 0}  # noqa: S104
    assert http_host(**free) == "0.0.0.0"  # noqa: S104
    assert http_host(**free, security=tls) == "127.0.0.1"
    assert http_host(**free, security=tls, http_host="0.0.0.0") == "0.0.0.0"  # noqa: S104
