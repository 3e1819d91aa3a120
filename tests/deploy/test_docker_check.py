"""`python -m deploy docker`: what is checked before anything is started."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from deploy import containers
from deploy.errors import UsageError
from serving.benchmarks.tiny_release import make_release
from tests.conftest import run_module

EXAMPLE = containers.DOCKER / ".env.example"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a complete .env, a release, and secrets."""
    make_release(tmp_path / "my releases" / "7", bias=0.0)
    values = {
        "CLOTLINE_RELEASES": "my releases",
        "CLOTLINE_RELEASE": "7",
        "CLOTLINE_SECRETS": "secrets",
        "CLOTLINE_UID": str(os.geteuid()),
        "CLOTLINE_GID": str(os.getegid()),
    }
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        name = line.partition("=")[0]
        lines.append(f"{name}={values[name]}" if name in values else line)
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    containers.make_secrets(tmp_path / "secrets", ("gateway.example.org",))
    return tmp_path


def check(project: Path) -> None:
    containers.check(containers.read_env(project / ".env"), project)


def test_a_complete_project_passes(project: Path) -> None:
    check(project)
    done = run_module("deploy", "docker", "check", "--env", project / ".env")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"status": "complete"})


def test_the_example_as_it_is_names_all_that_must_be_set() -> None:
    with pytest.raises(UsageError) as refused:
        containers.check(containers.read_env(EXAMPLE))
    for name in containers.required_variables():
        assert f"{name} is empty" in str(refused.value)


def test_all_problems_are_told_at_once(project: Path) -> None:
    secrets = project / "secrets"
    secrets.chmod(0o755)
    (secrets / "grafana_admin_password").unlink()
    (secrets / "grafana_admin_password").write_text("admin\n")
    (secrets / "tls" / "server.key").unlink()
    shutil.rmtree(project / "my releases" / "7")
    done = run_module("deploy", "docker", "check", "--env", project / ".env")
    assert done.returncode == 2
    for problem in (
        "open to others",
        "grafana_admin_password must hold",
        "server.key is missing",
        "is no Release",
    ):
        assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_secrets_are_random_and_made_once(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secrets = project / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    first = {name: (secrets / name).read_text() for name in containers.PASSWORDS}
    assert len(set(first.values())) == len(containers.PASSWORDS)
    assert all(
        len(password.strip()) >= 2 * containers.LEAST_PASSWORD_CHARACTERS for password in first.values()
    )
    assert containers.make_secrets(secrets, ("gateway.example.org",)) == []
    assert {name: (secrets / name).read_text() for name in containers.PASSWORDS} == first
    other = tmp_path_factory.mktemp("other")
    containers.make_secrets(other, ())
    assert (other / "grafana_admin_password").read_text() != first["grafana_admin_password"]


def test_what_is_no_variable_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CLOTLINE_TAG=local\nthis is none\n")
    with pytest.raises(UsageError, match="line 2"):
        containers.read_env(tmp_path / ".env")
    missing = run_module("deploy", "docker", "check", "--env", tmp_path / "nothing")
    assert missing.returncode == 2
    assert "copy docker/.env.example" in missing.stderr


def test_up_without_docker_says_so() -> None:
    if shutil.which("docker") and run_docker_compose():
        pytest.skip("Docker is installed here")
    done = run_module("deploy", "docker", "up")
    assert done.returncode == 1
    assert "docker" in done.stderr
    assert "Traceback" not in done.stderr


def run_docker_compose() -> bool:
    import subprocess

    return not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
