"""The service in containers: what docker/compose.yaml needs before it is started, and starting it so that it comes up or not at all."""

from __future__ import annotations

import re
import secrets as randomness
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import certificates
from deploy.errors import DeployError, ProgramNotFound, UsageError
from deploy.keys import KeyStore
from deploy.whole_file import write_whole
from serving.embedded import CHECKOUT

DOCKER = CHECKOUT / "docker"
COMPOSE, ENV, EXAMPLE = DOCKER / "compose.yaml", DOCKER / ".env", DOCKER / ".env.example"
PROFILES = ("cpu", "gpu", "dev")
PASSWORDS = ("grafana_admin_password", "mlflow_database_password")
LEAST_PASSWORD_CHARACTERS = 12
READY_S = 1200
_LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
_REQUIRED = re.compile(r"\$\{([A-Z][A-Z0-9_]*):\?")


def read_env(path: Path) -> dict[str, str]:
    """Variables of a .env file. Raises UsageError for a line that is none."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise UsageError(f"{path}, line {number}: NAME=VALUE is what belongs there.")
        found[match[1]] = match[2].strip().strip("\"'")
    return found


def required_variables() -> set[str]:
    """Variables that compose.yaml refuses to go without."""
    return set(_REQUIRED.findall(COMPOSE.read_text()))


def check(env: Mapping[str, str], project: Path = DOCKER) -> None:
    """Raises UsageError that names everything that is missing or wrong: variables, release, passwords, certificate, keys.

    Args:
        env: variables of docker/.env.
        project: what relative paths in it are relative to.
    """
    problems = [f"{name} is empty" for name in sorted(required_variables()) if not env.get(name)]
    if env.get("CLOTLINE_RELEASES") and env.get("CLOTLINE_RELEASE"):
        release = project / env["CLOTLINE_RELEASES"] / env["CLOTLINE_RELEASE"]
        if not (release / "release.json").is_file():
            problems.append(
                f"{release} is no Release (CLOTLINE_RELEASES, CLOTLINE_RELEASE): it has no release.json"
            )
    if env.get("CLOTLINE_SECRETS"):
        problems += _secret_problems(project / env["CLOTLINE_SECRETS"], env)
    if problems:
        raise UsageError(
            "; ".join(problems)
            + f". {EXAMPLE.name} explains each; `python -m deploy docker secrets` makes what is secret."
        )


def _secret_problems(directory: Path, env: Mapping[str, str]) -> list[str]:
    if not directory.is_dir():
        return [f"{directory} is no directory (CLOTLINE_SECRETS)"]
    found = directory.stat()
    problems = []
    if found.st_mode & 0o077:
        problems.append(f"{directory} is open to others ({stat.filemode(found.st_mode)}): chmod 700")
    owner = (str(found.st_uid), str(found.st_gid))
    if env.get("CLOTLINE_UID") and owner != (env["CLOTLINE_UID"], env.get("CLOTLINE_GID")):
        problems.append(
            f"{directory} belongs to {':'.join(owner)}, which CLOTLINE_UID and CLOTLINE_GID must be"
        )
    for name in PASSWORDS:
        path = directory / name
        password = path.read_text().strip() if path.is_file() else ""
        if len(password) < LEAST_PASSWORD_CHARACTERS:
            problems.append(f"{path} must hold a password of {LEAST_PASSWORD_CHARACTERS} characters or more")
    wanted = [directory / "tls" / name for name in ("ca.pem", "server.pem", "server.key")]
    wanted.append(KeyStore(directory / "keys").nginx_file)
    return problems + [f"{path} is missing" for path in wanted if not path.is_file()]


def make_secrets(directory: Path, names: tuple[str, ...]) -> list[str]:
    """Make what is missing in the directory of secrets: random passwords, certificate, an empty set of API keys.

    The passwords are readable for whoever may enter the directory, which is its owner alone: containers read them under
    other users, through a mount of the file. Returns the names of what was made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    made = []
    for name in PASSWORDS:
        if not (directory / name).exists():
            write_whole(directory / name, randomness.token_urlsafe(24) + "\n", 0o444)
            made.append(name)
    if not (directory / "tls" / "server.pem").exists():
        made.append("tls")
    certificates.make(directory / "tls", [*certificates.DEFAULT_NAMES, *names])
    store = KeyStore(directory / "keys")
    if not store.nginx_file.exists():
        made.append("keys")
    store.prepare()
    return made


def compose_command(*arguments: str) -> list[str]:
    """`docker compose` on our file. Raises ProgramNotFound where Docker or its compose plugin is not installed."""
    docker = shutil.which("docker")
    if not docker:
        raise ProgramNotFound(
            "docker is not installed; without it, `python -m deploy up` runs the same service on this machine."
        )
    done = subprocess.run([docker, "compose", "version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProgramNotFound(
            "`docker compose` is not there; Debian and Ubuntu: apt-get install docker-compose-plugin."
        )
    return [docker, "compose", "--file", str(COMPOSE), "--env-file", str(ENV), *arguments]


def up(profile: str) -> dict[str, Any]:
    """Build, start, and wait until every container is healthy; what a failed first start has started is stopped.

    Raises DeployError, UsageError for what is missing, ProgramNotFound.
    """
    command = compose_command("--profile", profile)
    if not ENV.is_file():
        raise UsageError(f"{ENV} is missing: copy {EXAMPLE.name} there and fill it in.")
    env = read_env(ENV)
    check(env)
    before = subprocess.run(
        [*command, "ps", "--quiet"], capture_output=True, text=True, check=False
    ).stdout.split()
    started = subprocess.run(
        [*command, "up", "--detach", "--build", "--wait", "--wait-timeout", str(READY_S)],
        stdout=sys.stderr, check=False,
    )  # fmt: skip
    if started.returncode:
        subprocess.run([*command, "logs", "--tail", "20"], stdout=sys.stderr, check=False)
        if before:
            raise DeployError(
                "the change failed; what was up is as Docker left it: python -m deploy docker status."
            )
        subprocess.run([*command, "down"], stdout=sys.stderr, check=False)
        raise DeployError("the start failed and was rolled back (volumes are kept); the logs are above.")
    host, port = env.get("CLOTLINE_GATEWAY_HOST", "127.0.0.1"), env.get("CLOTLINE_GATEWAY_PORT", "8443")
    return {"status": "ready", "url": f"https://{host}:{port}", "ca": f"{env['CLOTLINE_SECRETS']}/tls/ca.pem"}


def run(*arguments: str) -> int:
    """`docker compose` over all profiles, its output on standard error; returns its exit code."""
    profiles = [word for profile in (*PROFILES, "tools") for word in ("--profile", profile)]
    return subprocess.run(
        [*compose_command(*profiles), *arguments], stdout=sys.stderr, check=False
    ).returncode
