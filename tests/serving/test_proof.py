"""The proof at the start: stubs that run the wrong NumPy must never be called ready."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from serving.embedded import PYTHON_TAG, triton_home
from tests.serving.conftest import Launch

SITE_PACKAGES = Path("python", "lib", f"python{PYTHON_TAG}", "site-packages")


@pytest.fixture
def home_without_numpy(tmp_path: Path) -> Path:
    """A copy (of hard links where the file system allows) of the embedded server, whose Python lacks numpy<2."""
    home = tmp_path / "triton home"
    home.mkdir()
    linked = (
        subprocess.run(["cp", "-al", triton_home() / "python", home / "python"], check=False).returncode == 0
    )
    if not linked:
        shutil.rmtree(home / "python", ignore_errors=True)
        shutil.copytree(triton_home() / "python", home / "python", symlinks=True)
    (home / "server").symlink_to(triton_home() / "server")
    shutil.copy(triton_home() / "installed.json", home)
    for package in (home / SITE_PACKAGES).glob("numpy*"):
        shutil.rmtree(package)
    return home


def test_numpy_2_is_named_and_not_served(
    home_without_numpy: Path, tiny_repository: Path, launch: Launch
) -> None:
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("the training environment has no NumPy 2 to fall back to")
    # What `.pth` appends for torch now provides NumPy 2; the site-packages of this interpreter, as installed.
    pth = home_without_numpy / SITE_PACKAGES / "zz_clotline.pth"
    pth.unlink()  # a hard link: never write through it
    pth.write_text(f"{Path(__file__).parents[2]}\n{Path(np.__path__[0]).parent}\n")
    launched = launch(tiny_repository, env={"CLOTLINE_TRITON_HOME": str(home_without_numpy)})
    assert launched.process.wait(60) == 1
    errors = launched.errors()
    assert f"NumPy {np.__version__}" in errors
    assert "numpy<2" in errors
    assert "ready" not in errors.split("error:")[0]
    assert "Traceback" not in errors


def test_no_numpy_at_all_is_named(home_without_numpy: Path, tiny_repository: Path, launch: Launch) -> None:
    (home_without_numpy / SITE_PACKAGES / "zz_clotline.pth").unlink()
    launched = launch(tiny_repository, env={"CLOTLINE_TRITON_HOME": str(home_without_numpy)})
    assert launched.process.wait(60) == 1
    assert "numpy<2" in launched.errors()


def test_an_incomplete_installation_is_not_used(
    tiny_repository: Path, tmp_path: Path, launch: Launch
) -> None:
    if shutil.which("tritonserver") or os.path.exists("/opt/tritonserver/bin/tritonserver"):
        pytest.skip("a native tritonserver is found first")
    launched = launch(tiny_repository, env={"CLOTLINE_TRITON_HOME": str(tmp_path)})
    assert launched.process.wait(30) == 1
    assert "python -m serving install" in launched.errors()
