"""What the server's environment asks of the system does happen."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from serving.tritonserver import TritonServer, environment

SERVER = TritonServer(Path("/bin/false"), Path("/nowhere"), None)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HELD = """
held = bytes(64 << 20).replace(b"\\0", b"x")
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages:")))
"""


def huge_pages_kb(env: dict[str, str]) -> int:
    done = subprocess.run([sys.executable, "-c", HELD], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this system gives huge pages to all or to nobody",
)
@pytest.mark.skipif(
    tuple(map(int, (platform.libc_ver()[1] or "0").split("."))) < (2, 35),
    reason="glibc asks for huge pages from 2.35 on",
)
def test_large_memory_lies_in_huge_pages(tmp_path: Path) -> None:
    env = environment(SERVER, "1-a", tmp_path / "proof.json")
    assert huge_pages_kb({**env, "GLIBC_TUNABLES": ""}) == 0
    assert huge_pages_kb(env) > 32 << 10


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_tunables_of_the_user_are_kept(
    told: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", told)
    assert environment(SERVER, "1-a", tmp_path / "proof.json")["GLIBC_TUNABLES"] == kept


def test_a_stub_that_loads_numpy_starts_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    server = TritonServer(Path("/bin/false"), tmp_path, tmp_path)
    code = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    env = environment(server, "1-a", tmp_path / "proof.json")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert environment(server, "1-a", tmp_path / "proof.json")["OPENBLAS_NUM_THREADS"] == "3"
