"""The whole service on this machine, for the tests of a module: in a path with a space, without root where root may give it up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import SlideClient
from deploy.local_parts import fetch
from deploy.local_settings import PORT_NAMES
from deploy.local_state import read_status
from serving.benchmarks.tiny_release import make_release
from serving.embedded import CHECKOUT, triton_home
from tests.one_level_tiff import write_one_level_bigtiff

PROGRAMS = ("nginx", "prometheus", "prometheus-alertmanager")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
needs_all_programs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

ANY_PORT = [word for name in PORT_NAMES for word in (f"--{name.replace('_', '-')}-port", "0")]
WAIT_S = 120.0


@contextmanager
def without_root() -> Iterator[list[str]]:
    """What to put before a command so that it has no right of root; nothing where that cannot be or is so already."""
    new = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if os.geteuid() or subprocess.run([*new, "true"], capture_output=True, check=False).returncode:
        yield []
        return
    holder = subprocess.Popen([*new, "sleep", "infinity"])
    before = ["nsenter", "--user", "--preserve-credentials", f"--target={holder.pid}"]
    try:
        wait_for(
            lambda: (
                subprocess.run([*before, "id", "-u"], capture_output=True, check=False).stdout == b"1000\n"
            )
        )
        yield before
    finally:
        holder.kill()
        holder.wait()


@dataclass
class Machine:
    """Where stacks of this module run: a home of their own for state, and who they run as."""

    top: Path
    before: list[str]
    taken: list[str]

    def words(self, *words: str | Path) -> list[str]:
        """`python -m deploy ...`."""
        return [*self.before, sys.executable, "-m", "deploy", *map(str, words)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CLOTLINE_TRITON_HOME": str(self.top / "home"), "HOME": str(self.top)}

    def deploy(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`python -m deploy ...`, to its end."""
        return subprocess.run(
            self.words(*words),
            cwd=CHECKOUT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def up(self, *words: str | Path) -> dict[str, Any]:
        """`deploy up`, which must not fail."""
        done = self.deploy("up", *words)
        assert done.returncode == 0, done.stderr
        self.taken += [done.stdout, done.stderr]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.deploy("status", "--json").stdout))

    def processes(self) -> list[str]:
        """Command lines of all living processes that name this directory, or work in it, or carry it in their environment."""
        mark, found = str(self.top).encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if entry.name == str(os.getpid()) or (entry / "stat").read_text().split(") ")[1][0] == "Z":
                    continue
                told = [(entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()]
                told.append(os.readlink(entry / "cwd").encode())
            except OSError:
                continue
            if any(mark in text for text in told):
                found.append(told[0].replace(b"\0", b" ").decode())
        return found


@dataclass
class Up:
    """The stack of this module, and what its `up` said."""

    machine: Machine
    said: dict[str, Any]
    releases: dict[str, Path]
    slide: Path

    @property
    def state(self) -> Path:
        return Path(self.said["state"])

    def pids(self) -> dict[str, int]:
        """Of supervisor and parts, now."""
        status = read_status(self.state)
        return {"supervisor": status["pid"], **{name: part["pid"] for name, part in status["parts"].items()}}

    def another(self, name: str, *, bias: float) -> Path:
        """A further release, with answers of its own."""
        self.releases[name] = make_release(self.machine.top / "my releases" / name, bias=bias)
        return self.releases[name]

    @property
    def key(self) -> str:
        return Path(self.said["key_file"]).read_text().strip()

    def classify(self, scheme: str = "https", *, key: str | None = None) -> Any:
        """The slide, through the gateway, with our client."""
        url = self.said["url"].replace("https", scheme)
        with SlideClient(
            url, api_key=self.key if key is None else key, ca=self.said["ca"], retries=0
        ) as client:
            return client.predict(self.slide)

    def ask_prometheus(self, query: str) -> list[dict[str, Any]]:
        from urllib.parse import quote

        address = self.said["addresses"]["prometheus"]
        status, body = fetch(f"{address}/api/v1/query?query={quote(query)}")
        assert status == 200, body
        return list(json.loads(body)["data"]["result"])


def wait_for(what: Callable[[], Any], about: str = "") -> Any:
    """Its first true value; `about` is told if there is none."""
    deadline_s = time.monotonic() + WAIT_S
    while not (value := what()):
        assert time.monotonic() < deadline_s, about or what
        time.sleep(0.2)
    return value


@contextmanager
def new_machine() -> Iterator[Machine]:
    """A home with what is installed in this checkout, in a path with spaces; its stack is down when the block ends."""
    with without_root() as before, tempfile.TemporaryDirectory(prefix="stack with spaces ") as name:
        top = Path(name)
        (top / "home").mkdir()
        for installed in ("server", "python", "installed.json"):
            (top / "home" / installed).symlink_to(triton_home() / installed)
        machine = Machine(top, before, [])
        yield machine
        machine.deploy("down")


def new_stack(machine: Machine) -> Up:
    """A stack that serves the release `a`; `b` answers otherwise."""
    releases = {
        name: make_release(machine.top / "my releases" / name, bias=bias)
        for name, bias in (("a", -4.0), ("b", 2.0))
    }
    rng = np.random.default_rng(3)
    tissue_HWC = rng.normal((190, 90, 140), 22, (128, 128, 3)).clip(0, 255).astype(np.uint8)
    slide = machine.top / "p1_0.tif"
    write_one_level_bigtiff(slide, 2048, [np.full((128, 128, 3), 243, np.uint8), tissue_HWC])
    said = machine.up("--release", releases["a"], *ANY_PORT)
    return Up(machine, said, releases, slide)
