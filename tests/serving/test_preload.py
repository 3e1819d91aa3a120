"""On a real server: JSON that Triton cannot parse is the client's error, other failures stay the server's, and memory that is
free is given back."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import native
from serving.embedded import triton_home
from serving.instances import instances
from serving.native import __main__ as building
from serving.processes import processes_of
from serving.tritonserver import TritonServer, environment
from slides.native.compiler import NativeBuildError
from tests.serving.conftest import Launch, launching, make_tiny

TENSOR = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
INFER = "/v2/models/tiny/infer"
BAD = {
    "no JSON": b"x=1",
    "half": b'{"inputs":[',
    "a list": b"[]",
    "no inputs": b"{}",
    "inputs that are no list": b'{"inputs":7}',
    "a number for a name": json.dumps({"inputs": [TENSOR | {"name": 5}]}).encode(),
    "a negative shape": json.dumps({"inputs": [TENSOR | {"shape": [1, -2]}]}).encode(),
    "text for a shape": json.dumps({"inputs": [TENSOR | {"shape": "x"}]}).encode(),
    "an output without a name": json.dumps({"inputs": [TENSOR], "outputs": [{"name": 7}]}).encode(),
    "parameters that are none": json.dumps({"inputs": [TENSOR], "parameters": 4}).encode(),
    "an id that is none": json.dumps({"inputs": [TENSOR], "id": {}}).encode(),
}
PIECES = """
import ctypes, time

def anonymous_mb():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before_mb = anonymous_mb()
pieces = [c.malloc(4096) for _ in range(16384)]
for piece in pieces:
    ctypes.memset(piece, 1, 4096)
for piece in pieces[:-1]:
    c.free(piece)
del pieces
kept_mb = most_mb = anonymous_mb() - before_mb
until_s = time.monotonic() + 15
while kept_mb > most_mb / 8 and time.monotonic() < until_s:
    time.sleep(0.5)
    kept_mb = anonymous_mb() - before_mb
print(kept_mb)
"""
FAILING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("the disk is full", pb_utils.TritonError.INTERNAL))
                for _ in requests]
"""


@pytest.fixture(scope="module")
def library() -> Path:
    if not native.library_path().is_file():
        pytest.skip("serving/native is not compiled: python -m serving.native")
    return native.library_path()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, and `failing`, whose every answer is an internal error."""
    made = make_tiny(tmp_path_factory.mktemp("json refusals") / "models")
    (made / "failing" / "1").mkdir(parents=True)
    (made / "failing" / "1" / "model.py").write_text(FAILING)
    config = (made / "tiny" / "config.pbtxt").read_text().replace("onnxruntime", "python")
    (made / "failing" / "config.pbtxt").write_text(config)
    return made


@pytest.fixture(scope="module")
def up(library: Path, repository: Path) -> Iterator[dict[str, Any]]:
    """What the server said when it was ready."""
    with launching() as start:
        yield start(repository).ready()


@pytest.fixture
def address(up: dict[str, Any]) -> str:
    return str(up["http"])


@pytest.fixture
def pids(up: dict[str, Any]) -> list[int]:
    """Of the server's processes."""
    state = next(state for state in instances(triton_home()) if state.name == up["name"])
    return list(processes_of(state.instance_id))


def ask(address: str, body: bytes, path: str = INFER) -> tuple[int, str]:
    """Status and error."""
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", path, body)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told.get("error", "")


@pytest.mark.parametrize("what", BAD)
def test_it_is_refused_as_the_clients_error(address: str, what: str) -> None:
    status, error = ask(address, BAD[what])
    assert (status, bool(error)) == (400, True)


def test_the_others_are_answered_and_failures_stay_failures(address: str) -> None:
    body = json.dumps({"inputs": [TENSOR]}).encode()
    assert ask(address, body)[0] == 200
    assert ask(address, body, "/v2/models/failing/infer") == (500, "the disk is full")
    assert ask(address, body, "/v2/models/none/infer")[0] == 404


def test_tritonserver_runs_what_gives_memory_back(pids: list[int]) -> None:
    running = {pid: Path(f"/proc/{pid}") for pid in pids}
    named = {pid: {task.read_text().strip() for task in running[pid].glob("task/*/comm")} for pid in running}
    with_it = [pid for pid, names in named.items() if "memory-return" in names]
    assert [(running[pid] / "comm").read_text().strip() for pid in with_it] == ["tritonserver"]


def test_pages_are_small_in_tritonserver_alone(pids: list[int]) -> None:
    """Its stubs, which it starts, keep the huge ones that their weights are read from."""
    told = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    if not all("THP_enabled:" in text for text in told):
        pytest.skip("this kernel does not say of a process whether it has huge pages")
    huge = {
        re.findall(r"^(?:Name|THP_enabled):\s+(\S+)", text, re.MULTILINE)[0]: "THP_enabled:\t1" in text
        for text in told
    }
    assert huge.pop("tritonserver") is False
    assert huge
    assert all(huge.values())


@pytest.mark.parametrize(("name", "given_back"), [("tritonserver", True), ("another", False)])
def test_free_memory_behind_a_piece_in_use_is_given_back(library: Path, name: str, given_back: bool) -> None:
    """64 MB in pieces as a request arrives in them; all but the last are freed. glibc alone keeps them all."""
    done = subprocess.run(
        [name, "-c", PIECES],
        executable=sys.executable,
        env={**os.environ, **native.preloaded({})},
        capture_output=True,
        text=True,
        check=True,
    )
    kept_mb = float(done.stdout)
    assert kept_mb < 8 if given_back else kept_mb > 48, done.stderr


def test_it_can_be_left_out(launch: Launch, repository: Path, library: Path) -> None:
    """Triton's own answer is what this is for: where it is no longer 500, the library has become needless."""
    address = launch(repository, env={native.SWITCH_VARIABLE: "off"}).ready()["http"]
    assert ask(address, BAD["no JSON"])[0] == 500


def test_the_linker_finds_it_in_a_path_with_a_space(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "with a space"
    place.mkdir()
    shutil.copy(library, place / library.name)
    monkeypatch.setattr(native, "HERE", place)
    asked = native.preloaded({"LD_LIBRARY_PATH": "/no/where", "LD_PRELOAD": "libc.so.6"})
    assert asked["LD_LIBRARY_PATH"] == f"{place}:/no/where"
    maps = "import pathlib; print(pathlib.Path('/proc/self/maps').read_text())"
    done = subprocess.run(
        [sys.executable, "-c", maps], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert str(place / library.name) in done.stdout
    assert not done.stderr


def test_without_it_nothing_is_asked_of_the_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for place in (tmp_path, tmp_path / "a:b"):
        monkeypatch.setattr(native, "HERE", place)
        assert native.preloaded({}) == {}
        server = TritonServer(Path("/bin/true"), tmp_path, None)
        assert "LD_PRELOAD" not in environment(server, "1-a", tmp_path / "proof.json")
        place.mkdir(exist_ok=True)
    native.library_path().touch()  # in a:b, which the linker would take for two
    assert native.preloaded({}) == {}


def test_it_is_compiled_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "made here"
    place.mkdir()
    for module in (native, building):
        monkeypatch.setattr(module, "HERE", place)
    (place / native.LIBRARIES.replace("*", "of-an-older-source")).touch()
    path = building.build()
    assert list(place.iterdir()) == [path]
    path.unlink()
    source = tmp_path / "broken.c"
    for text, told in (("int x = nonsense(;", "was not compiled"), ("int x;", "cannot be used")):
        source.write_text(text)
        for module in (native, building):
            monkeypatch.setattr(module, "SOURCES", (source,))
        with pytest.raises(NativeBuildError, match=told):
            building.build()
        assert not list(place.iterdir())
