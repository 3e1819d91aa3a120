"""CPU time of real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from perf.process_tree import cpu_s, descendants

BUSY = """
import subprocess, sys, time
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
while time.process_time() < 0.3:
    pass
print("done", flush=True)
sys.stdin.read()
"""


def test_the_time_of_children_and_their_children_is_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        assert parent.stdin
        parent.stdout.readline()
        pids = descendants(parent.pid)
        assert pids[0] == parent.pid
        assert len(pids) == 2
        assert 0.55 < cpu_s(pids) < 5
        assert 0.25 < cpu_s(pids[:1]) < 5
        parent.stdin.close()
    deadline = time.monotonic() + 10
    while cpu_s(pids) and time.monotonic() < deadline:  # the grandchild ends by itself
        time.sleep(0.02)
    assert cpu_s(pids) == 0


def test_a_name_with_a_bracket_is_no_field(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = ["S", "1", *["0"] * 9, "250", "50", *["0"] * 5]
    (tmp_path / "7" / "stat").write_text(f"7 (a) b (c)) {' '.join(fields)}")
    assert cpu_s([7], tmp_path) == 3.0
    assert descendants(1, tmp_path) == [1, 7]
