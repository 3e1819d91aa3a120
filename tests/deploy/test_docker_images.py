"""Dockerfiles: linted, not root, pinned, and made of what is in the checkout. There is no Docker Engine here: none is built."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.embedded import CHECKOUT
from tests.deploy.docker_files import DOCKER, DOCKERFILES, SECRET_WORDS, SERVICES, instructions

IMAGES = {"server", "client", "training", "mlflow"}


def test_there_is_a_dockerfile_for_each_image_and_no_other() -> None:
    assert {path.name.removesuffix(".Dockerfile") for path in DOCKERFILES} == IMAGES
    built = {(s["build"]["dockerfile"], s["image"].split(":")[0]) for s in SERVICES.values() if "build" in s}
    assert built == {(f"docker/{name}.Dockerfile", f"clotline-{name}") for name in IMAGES}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "hadolint is a package of .[dev]"
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_is_labelled(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    words = [word for word, _ in found]
    assert [rest for word, rest in found if word == "USER"][-1] == "1000:1000"
    assert words[-1] in ("CMD", "ENTRYPOINT")
    assert "HEALTHCHECK" in words
    labels = " ".join(rest for word, rest in found if word == "LABEL")
    assert "image.title" in labels
    assert "image.licenses" in labels
    assert "ADD" not in words
    assert not [rest for word, rest in found if word in ("ENV", "ARG") and SECRET_WORDS.search(rest)]
    last_user = max(at for at, word in enumerate(words) if word == "USER")
    assert "RUN" not in words[last_user:]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_base_image_can_be_pinned_by_digest(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    arguments = {rest.split("=")[0] for word, rest in found if word == "ARG"}
    for word, rest in found:
        if word == "FROM":
            tag, digest = re.findall(r"\$\{(\w+)\}", rest)
            assert {tag, digest} <= arguments
            assert (tag[-4:], digest[-7:]) == ("_TAG", "_DIGEST")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_in_the_checkout_and_in_the_build_context(dockerfile: Path) -> None:
    allowed = [
        line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    copied = [rest for word, rest in instructions(dockerfile) if word == "COPY" and "--from" not in rest]
    for rest in copied:
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]:
            assert (CHECKOUT / source).exists(), source
            assert any(
                Path(source).match(pattern) or Path(source).parts[0] == Path(pattern).parts[0]
                for pattern in allowed
            ), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_has_finds_what_it_imports(dockerfile: Path) -> None:
    """No package of ours in an image imports one that is not there, nor do the scripts that it starts."""
    ours = {path.parent.name for path in CHECKOUT.glob("*/__init__.py")}
    copied = [
        rest.split()[-2] for word, rest in instructions(dockerfile) if word == "COPY" and "--from" not in rest
    ]
    packages = ours & set(copied)
    files = [CHECKOUT / name for name in copied if name.startswith("docker/") and name.endswith(".py")]
    for package in packages:
        files += (CHECKOUT / package).rglob("*.py")
    missing: dict[str, list[str]] = {}
    for file in files:
        if "benchmarks" in file.parts:  # of the checkout
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if (top := name.split(".")[0]) in ours - packages:
                    missing.setdefault(top, []).append(str(file.relative_to(CHECKOUT)))
    assert missing == {}
    assert ("exporters" in packages) == ("model_repository" in copied)


def test_the_build_context_is_a_list_of_what_is_needed() -> None:
    lines = (CHECKOUT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    for line in lines:
        if line.startswith("!"):
            assert list(CHECKOUT.glob(line[1:])), line


def test_the_stubs_of_the_server_get_the_pinned_image_libraries_and_nothing_of_numpy() -> None:
    run = next(
        rest for word, rest in instructions(DOCKER / "server.Dockerfile") if word == "RUN" and "grep" in rest
    )
    pattern = re.search(r"grep -E '([^']+)'", run)
    assert pattern
    pinned = (CHECKOUT / "serving" / "server-requirements.txt").read_text().splitlines()
    chosen = {line.split("==")[0] for line in pinned if re.match(pattern[1], line)}
    imported = {"simplejpeg": "simplejpeg", "pillow": "PIL", "opencv-python-headless": "cv2"}
    assert chosen == set(imported)
    assert "--no-deps" in run
    # What `preflight` says that NVIDIA's containers lack for tile_preprocess, slides itself apart.
    needed = set()
    for path in (
        CHECKOUT / "slides" / "decode.py",
        *(CHECKOUT / "model_repository").glob("tile_preprocess/1/model.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                needed.add(node.module.split(".")[0])
    third_party = needed - set(sys.stdlib_module_names) - {"slides", "numpy", "triton_python_backend_utils"}
    assert third_party <= set(imported.values())


@pytest.mark.parametrize("extras", [(), ("train", "track", "export")], ids=" ".join)
def test_requirements_of_an_image_are_those_of_the_project(extras: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(DOCKER / "requirements_of.py"), *extras],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {re.split(r"[<>=\[;]", line)[0] for line in done.stdout.splitlines()}
    assert {"numpy", "tritonclient", "simplejpeg"} <= names
    assert ("torch" in names) == bool(extras)
    assert "clotline" not in names
