"""pre-commit's hooks: they look at every package, and secrets are found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tomllib
import yaml

from tests.docs.markdown_pages import ROOT

HOOK = Path(sys.executable).with_name("detect-secrets-hook")
PACKAGES = {
    name.split(".")[0]
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
}


def hooks() -> dict[str, dict[str, str]]:
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return {hook["id"]: hook for repo in document["repos"] for hook in repo["hooks"]}


@pytest.mark.parametrize("hook", ["mypy", "bandit"])
def test_a_hook_looks_at_every_package(hook: str) -> None:
    assert set(hooks()[hook]["entry"].split()) >= PACKAGES


@pytest.mark.parametrize("tool", ["mypy", "bandit"])
def test_make_lint_looks_at_every_package(tool: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = re.findall(rf"-m {tool} .*|pre.commit run --all-files.*", makefile)
    assert lines
    for line in lines:
        assert "commit run" in line or set(line.split()) >= PACKAGES, line


def secrets_in(*paths: Path) -> subprocess.CompletedProcess[str]:
    if not HOOK.is_file():
        pytest.skip("detect-secrets is not installed: pip install detect-secrets")
    baseline = ROOT / ".secrets.baseline"
    command = [str(HOOK), "--no-verify", "--baseline", str(baseline), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


def test_no_secret_is_in_the_tree() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nobody says which files belong to the project")
    done = subprocess.run([git, "ls-files", "-z"], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        pytest.skip(f"git does not list the files here: {done.stderr.strip()}")
    files = [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 300
    files.remove(Path(".secrets.baseline"))
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda first: secrets_in(*files[first::2]), (0, 1)))
    assert [done.stdout for done in halves if done.returncode] == []


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("key = 'AKIA" + "QYLPMN5HFIQR7XYA'", "AWS Access Key"),
        ("-----BEGIN " + "PRIVATE KEY-----", "Private Key"),
        ("token = 'ghp_" + "wWPw5k4aXcaT4fNP0UcnZwJUVFk6LO0pINUx'", "GitHub Token"),
        ("password = 'correct" + "-horse-battery'", "Secret Keyword"),
        ("https://user:" + "hunter2@example.org", "Basic Auth Credentials"),
    ],
    ids=["aws", "private key", "github", "password", "url"],
)
def test_a_planted_secret_is_found(tmp_path: Path, secret: str, kind: str) -> None:
    (tmp_path / "planted.py").write_text(
        f"# {secret}\n" if "BEGIN" in secret or "://" in secret else f"{secret}\n"
    )
    done = secrets_in(tmp_path / "planted.py")
    assert done.returncode == 1
    assert kind in done.stdout
