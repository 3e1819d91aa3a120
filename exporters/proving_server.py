"""A tritonserver that runs only as long as the gate needs it.

It is started by ``python -m serving up`` on a directory of links to the staged models that are to be proven, so that what
answers is, byte for byte, what will be published. The launcher ends with the exporter, however that ends: the kernel
sends it SIGTERM when its parent dies (PR_SET_PDEATHSIG, prctl(2)), and it takes the server with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from exporters.errors import ParityError, ServedError, UnavailableError
from exporters.formats.interface import ServedFormat
from exporters.triton_config import CONFIG_FILENAME, from_text

PROTOCOLS = ("http", "grpc")
_PORTS = ("--http-port", "--grpc-port", "--metrics-port")
READY_S = 300.0
ANSWER_S = 120.0
STOP_S = 40.0
_CHECKOUT = Path(__file__).resolve().parent.parent
_WITHOUT = "Or use --without-server: then no answer of a server is proven."
# Run in the new process, before it becomes the launcher: code between fork and exec is not safe where torch has threads.
_END_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


def unservable_here(fmt: ServedFormat) -> str | None:
    """Why the tritonserver of this machine cannot load a format, or None if it can.

    Raises:
        UnavailableError: there is no tritonserver.
    """
    found = _server_here()
    if fmt.backend not in found["backends"]:
        return (
            f"the {found['server']} tritonserver of this machine has no backend {fmt.backend} (it has "
            f"{', '.join(found['backends'])})"
        )
    if fmt.platform and found["server"] == "embedded":
        return f"the backend {fmt.backend} of the embedded tritonserver knows no {fmt.platform}"
    return None


@contextlib.contextmanager
def proving_server(
    models_dir: Path, models: Sequence[str], *, announce: Callable[[str], object] = print
) -> Iterator[ProvingServer]:
    """Serve models until the block ends.

    Args:
        models_dir: laid out as a Triton model repository; it is not written to, but a directory beside it is made.
        models: what to serve; models that ensembles among them refer to are served as well.
        announce: told what is going on, for a progress bar.

    Raises:
        UnavailableError: there is no tritonserver.
        ServedError: a model is missing, or does not load.
    """
    _server_here()
    # Beside the staged models: what a killed exporter leaves is swept up with them.
    beside = models_dir.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=beside) as scratch, contextlib.ExitStack() as stack:
        repository = Path(scratch, "models")
        repository.mkdir()
        linked = _link(models_dir, models, repository)
        announce(f"a tritonserver loads {len(linked)} models")
        said = stack.enter_context(Path(scratch, "stderr").open("w+"))
        launcher = _launch(repository, said)
        stack.callback(_stop, launcher)
        stack.callback(announce, "the tritonserver ends")
        assert launcher.stdout  # noqa: S101  opened in _launch
        line = launcher.stdout.readline()
        if not line:
            launcher.wait()
            raise ServedError(
                f"A tritonserver does not serve what was staged: {_error(said)} Nothing was published."
            )
        server = ProvingServer(launcher, json.loads(line), said)
        stack.callback(server.close)  # open connections hold up the server's graceful stop
        yield server


class ProvingServer:
    """One running server. Ask it from the thread that made it.

    Attributes:
        origin: ``embedded`` or ``native``.
        start_s: seconds from its start until it was proven ready.
        metrics, health: addresses of Triton's metrics and of the supervisor.
    """

    def __init__(self, launcher: subprocess.Popen[str], ready: Mapping[str, Any], said: IO[str]) -> None:
        self.origin = str(ready["server"])
        self.start_s = float(ready["ready_s"])
        self.metrics, self.health = str(ready["metrics"]), str(ready["health"])
        self._addresses = {protocol: str(ready[protocol]) for protocol in PROTOCOLS}
        self._launcher = launcher
        self._said = said
        self._clients: dict[str, Any] = {}

    def ask(
        self, protocol: str, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """One inference.

        Args:
            protocol: ``http`` or ``grpc``.
            model: its newest version answers.
            inputs: name -> array, with the batch dimension; arrays of bytes objects are BYTES tensors.
            outputs: names of the tensors wanted.

        Returns:
            output -> array.

        Raises:
            ParityError: the server refuses, or leaves an output out.
            ServedError: it is gone.
        """
        _, module = self._client(protocol)
        wanted = [module.InferRequestedOutput(name) for name in outputs]
        result = self._infer(protocol, model, inputs, wanted)
        answers = {name: result.as_numpy(name) for name in outputs}
        missing = [name for name, value in answers.items() if value is None]
        if missing:
            raise ParityError(
                f"{model} over {protocol}: the answer has no {', '.join(missing)}. Nothing was published."
            )
        return answers

    def label_names(
        self, protocol: str, model: str, inputs: Mapping[str, np.ndarray], output: str, classes: int
    ) -> list[str]:
        """The names that the server gives to the classes of an output, in their order.

        They are asked for with Triton's classification extension, which reads ``labels.txt``.

        Args:
            inputs: of one row.
            classes: how many there are.
        """
        _, module = self._client(protocol)
        wanted = [module.InferRequestedOutput(output, class_count=classes)]
        rows = self._infer(protocol, model, inputs, wanted).as_numpy(output)
        if rows is None or rows.size != classes:
            raise ParityError(
                f"{model} over {protocol}: {output} has no {classes} classes. Nothing was published."
            )
        named = {}
        for row in rows.ravel():
            _, index, name = (*row.decode(errors="replace").split(":", 2), "", "")[:3]  # "0.98:1:LAA"
            named[index] = name
        return [named.get(str(index), "") for index in range(classes)]

    def config(self, model: str) -> dict[str, Any]:
        """The configuration that the server has of a model."""
        client, _ = self._client("http")
        return dict(self._guarded("http", model, lambda: client.get_model_config(model)))

    def close(self) -> None:
        """Close all connections."""
        while self._clients:
            client, _ = self._clients.popitem()[1]
            client.close()

    def _client(self, protocol: str) -> tuple[Any, Any]:
        if protocol not in self._clients:
            address = self._addresses[protocol]
            if protocol == "http":
                import tritonclient.http as module

                client: Any = module.InferenceServerClient(address, network_timeout=ANSWER_S)
            else:
                import tritonclient.grpc as module

                client = module.InferenceServerClient(
                    address,
                    channel_args=[
                        ("grpc.max_send_message_length", -1),
                        ("grpc.max_receive_message_length", -1),
                        ("grpc.enable_http_proxy", 0),
                    ],
                )
            self._clients[protocol] = (client, module)
        found: tuple[Any, Any] = self._clients[protocol]
        return found

    def _infer(
        self, protocol: str, model: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[Any]
    ) -> Any:
        from tritonclient.utils import np_to_triton_dtype

        client, module = self._client(protocol)
        tensors = []
        for name, values in inputs.items():
            kind = "BYTES" if values.dtype == np.object_ else np_to_triton_dtype(values.dtype)
            tensor = module.InferInput(name, list(values.shape), kind)
            tensor.set_data_from_numpy(values)
            tensors.append(tensor)
        deadline = {} if protocol == "http" else {"client_timeout": ANSWER_S}
        return self._guarded(
            protocol, model, lambda: client.infer(model, tensors, outputs=list(wanted), **deadline)
        )

    def _guarded(self, protocol: str, model: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # tritonclient's, gevent's and the socket's errors share no root
            if self._launcher.poll() is not None:
                raise ServedError(
                    f"The tritonserver of the gate is gone: {_error(self._said)} Nothing was published."
                ) from error
            raise ParityError(f"{model} over {protocol}: {_told(error)}. Nothing was published.") from error


def _server_here() -> dict[str, Any]:
    return _backends(os.environ.get("PATH"), os.environ.get("CLOTLINE_TRITON_HOME"))


@functools.cache
def _backends(_path: str | None, _triton_home: str | None) -> dict[str, Any]:
    """What ``python -m serving backends`` says: ``server`` (embedded or native) and the names of its ``backends``.

    Args:
        _path, _triton_home: environment variables that the answer depends on.
    """
    asked = subprocess.run(
        [sys.executable, "-m", "serving", "backends"],
        capture_output=True,
        text=True,
        cwd=_CHECKOUT,
        check=False,
    )
    if asked.returncode:
        why = asked.stderr.strip().rpartition("error: ")[2] or "no tritonserver was found"
        raise UnavailableError(f"The gate needs a tritonserver: {why.rstrip('.')}. {_WITHOUT}")
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return found


def _link(models_dir: Path, models: Sequence[str], repository: Path) -> list[str]:
    """Link models, and those that their ensembles refer to; returns their names."""
    waiting, linked = list(models), []
    while waiting:
        name = waiting.pop()
        if name in linked:
            continue
        path = (models_dir / name / CONFIG_FILENAME).absolute()
        try:
            config = from_text(path.read_text(encoding="utf-8"), origin=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ServedError(f"{path} cannot be read: {error}. Nothing was published.") from error
        (repository / name).symlink_to(path.parent)
        linked.append(name)
        waiting += [step.model_name for step in config.ensemble_scheduling.step]
    return linked


def _launch(repository: Path, said: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving", "up", "--repository", str(repository)]
    for port in _PORTS:
        command += [port, "0"]
    command += ["--timeout-s", str(READY_S)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        cwd=_CHECKOUT,
        start_new_session=True,  # Ctrl-C in the terminal is the exporter's to handle
    )


def _stop(launcher: subprocess.Popen[str]) -> None:
    launcher.terminate()
    try:
        launcher.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # a second Ctrl-C, too
        if launcher.poll() is None:
            launcher.kill()  # its guardian cleans up
            launcher.wait()
        assert launcher.stdout  # noqa: S101  opened in _launch
        launcher.stdout.close()


def _error(said: IO[str]) -> str:
    """What the launcher gave as its error, in one line."""
    said.seek(0)
    lines = said.read().strip().rpartition("error: ")[2].splitlines()
    told = "; ".join(line.strip() for line in lines) or "its launcher ended without a word"
    told = told.replace(":; ", ": ").replace(".; ", ". ")
    return told if told.endswith(".") else f"{told}."


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0]}"
