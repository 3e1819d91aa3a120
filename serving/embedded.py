"""The embedded tritonserver: taken from a pinned PyPI wheel, with a small Python environment of its own.

    .triton/server/     the wheel `nvidia-pytriton` unpacked (tritonserver, its Python backend, stubs, libraries)
    .triton/python/     a virtual environment with numpy<2 for Triton's Python stubs (see docs/decisions.md)
    .triton/installed.json   written last; says what was installed, so that a half-done installation is done again

The stub of Triton 2.51 reads NumPy 2 arrays as zeros without an error, therefore the stubs never share the training
environment. They find `slides` and, if it is there, `torch` through a `.pth` that appends the checkout and the
site-packages of the interpreter that ran the installation *behind* their own packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from serving.errors import InstallError

CHECKOUT = Path(__file__).resolve().parent.parent
TRITON_WHEEL = "nvidia-pytriton==0.7.0"
TRITON_VERSION = "2.51.0"
REQUIREMENTS = Path(__file__).resolve().parent / "server-requirements.txt"
PINNED = ("wheel", "requirements_sha256", "python")
PYTHON_TAG = f"{sys.version_info.major}.{sys.version_info.minor}"


def triton_home() -> Path:
    """Where the embedded server and the state of running ones live: `$CLOTLINE_TRITON_HOME` or `.triton` in the
    checkout."""
    return Path(os.environ.get("CLOTLINE_TRITON_HOME") or CHECKOUT / ".triton").resolve()


def server_binary(home: Path) -> Path:
    """Path of the embedded tritonserver."""
    return home / "server" / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def torch_site_packages() -> Path | None:
    """The site-packages that holds torch for the interpreter at work, None if it has none. torch is not imported."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parents[1] if found and found.origin else None


def library_directories() -> list[str]:
    """Where the stub finds libpython: the directory of the running interpreter's shared library.

    Raises InstallError if this Python has no shared library anywhere (a static build without libpython3.x).
    """
    name = f"libpython{PYTHON_TAG}.so.1.0"
    directories = [sysconfig.get_config_var("LIBDIR"), "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
    for directory in directories:
        if directory and (Path(directory) / name).exists():
            return [directory]
    raise InstallError(
        f"{name} was not found in {', '.join(filter(None, directories))}: Triton's Python backend needs Python as a "
        f"shared library. Install it (Debian: apt-get install libpython{PYTHON_TAG}) or use a Python that was built "
        "with --enable-shared."
    )


def _fingerprint() -> dict[str, str]:
    torch = torch_site_packages()
    return {
        "wheel": TRITON_WHEEL,
        "requirements_sha256": hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest(),
        "python": sys.version.split()[0],
        "checkout": str(CHECKOUT),
        "torch_site_packages": str(torch) if torch else "",
    }


def is_installed(home: Path, *, exactly: bool = False) -> bool:
    """True if the embedded server was installed completely, with the pinned versions and for this Python.

    Args:
        exactly: also for this checkout and this interpreter's torch, which `install` looks after.
    """
    try:
        found = json.loads((home / "installed.json").read_text())
    except (OSError, ValueError):
        return False
    wanted = _fingerprint()
    return bool(all(found.get(key) == wanted[key] for key in (wanted if exactly else PINNED)))


def _pip(python: Path | str, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise InstallError(
            f"pip install {' '.join(arguments)} failed:\n{tail}\nCheck the network and free space, run it again."
        )


def _write_pth(python: Path) -> None:
    """Tell the stubs' Python where to find `slides` and torch, and to write no byte code.

    Triton's stub does not heed PYTHONDONTWRITEBYTECODE. Byte code beside a model.py would change a Release that is
    served, and the time of its directory, for which Triton takes a loaded model as changed.
    """
    torch = torch_site_packages()
    lines = [str(CHECKOUT), *([str(torch)] if torch else []), "import sys; sys.dont_write_bytecode = True"]
    path = python / "lib" / f"python{PYTHON_TAG}" / "site-packages" / "zz_clotline.pth"
    aside = path.with_suffix(".partial")
    aside.write_text("\n".join(lines) + "\n")
    aside.replace(path)


def install(home: Path, *, force: bool = False) -> bool:
    """Install the embedded server below `home`. Returns False if it was there already.

    Raises InstallError on an unsupported platform, without libpython, or when pip fails; a later run starts over.
    """
    library_directories()
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise InstallError(
            f"the embedded tritonserver is x86-64 Linux only, this is {sys.platform} {os.uname().machine}: "
            "use the NGC container nvcr.io/nvidia/tritonserver, whose tritonserver is found on PATH."
        )
    if is_installed(home, exactly=True) and not force:
        _write_pth(home / "python")  # costs nothing, and may be of an older Clotline
        return False
    home.mkdir(parents=True, exist_ok=True)
    marker, server, python = home / "installed.json", home / "server", home / "python"
    marker.unlink(missing_ok=True)
    for directory in (server, python):
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"serving: unpacking {TRITON_WHEEL} (tritonserver {TRITON_VERSION}) into {server}",
        file=sys.stderr,
        flush=True,
    )
    _pip(sys.executable, "--no-deps", "--no-compile", "--target", str(server), TRITON_WHEEL)
    print(f"serving: making the stubs' environment in {python}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
    _pip(python / "bin" / "python3", "--requirement", str(REQUIREMENTS))
    _write_pth(python)
    if not server_binary(home).exists():
        raise InstallError(
            f"{TRITON_WHEEL} holds no tritonserver at {server_binary(home)}: the wheel has changed."
        )
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps(_fingerprint(), indent=1))
    partial.replace(marker)
    return True
