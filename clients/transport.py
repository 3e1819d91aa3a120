"""One connection to Triton: tritonclient's HTTP and gRPC clients behind one small interface, and their errors
as ours.

A transport belongs to the thread that made it: tritonclient's HTTP client is not thread-safe (gevent), so it
    is
created, used and closed by one thread. gRPC's is thread-safe and simply treated alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from clients.access import NO_ACCESS, Access
from clients.address import Address
from clients.answers import TILES, Question
from clients.errors import (
    AccessRefused,
    ClientError,
    DeadlineExceeded,
    ModelNotReady,
    RequestRefused,
    ServerBusy,
    ServerFault,
    ServerUnreachable,
)

CONNECT_TIMEOUT_S = 5.0
SUBJECT_HEADER = "clotline-subject"
MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC's own bound; Triton's HTTP server takes 64 MiB a request by default
_BUSY = {"429", "502", "503", "504", "UNAVAILABLE"}
_NO_ACCESS = {"401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED"}
_REFUSED = {
    "INVALID_ARGUMENT",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ALREADY_EXISTS",
    "OUT_OF_RANGE",
}
_NOT_READY = re.compile(r"unknown model|is not ready|not at ready state|no available versions", re.IGNORECASE)
# The gateway's words (docker/nginx); tritonclient keeps the text of an error and drops its headers.
_RATE_LIMIT = "too many requests"
_AGAIN_IN = re.compile(r"again in (\d{1,4}) s\b")
_NO_CONNECTION = re.compile(
    r"failed to connect|connection (refused|reset)|socket closed|GOAWAY|DNS|broken pipe", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class RawAnswer:
    """A response as it came: output name -> array (None where absent), and the model version that
    answered."""

    outputs: Mapping[str, NDArray[Any] | None]
    version: str


class Transport(Protocol):
    """What a client needs of a server. Every call gets the seconds it may take and raises errors of ours.

    `subject`, 16 hexadecimal digits, says what requests belong together: a gateway that tries a candidate release has all
    of one subject answered by the same server. Empty: none is sent.
    """

    def model_versions(self, model: str, timeout_s: float, *, subject: str = "") -> list[str]: ...

    def model_config(
        self, model: str, version: str, timeout_s: float, *, subject: str = ""
    ) -> dict[str, Any]: ...

    def infer(
        self,
        model: str,
        tiles: Sequence[bytes],
        timeout_s: float,
        question: Question = TILES,
        *,
        subject: str = "",
    ) -> RawAnswer: ...

    def close(self) -> None: ...


def open_transport(address: Address, access: Access = NO_ACCESS) -> Transport:
    """A transport for the calling thread; connects on the first call."""
    return HttpTransport(address, access) if address.protocol == "http" else GrpcTransport(address, access)


def error_of(message: str, status: str | None, *, model: str, address: Address) -> ClientError:
    """The error of ours for what a server (or a gateway) answered.

    Args:
        message: the server's own words.
        status: an HTTP status ("400") or a gRPC code ("StatusCode.INVALID_ARGUMENT"); None if the client
            library itself refused.

    Source: Triton maps its error codes to HTTP 400, 404, 500, 503 and to gRPC codes of the same meaning
    (server/src/http_server.cc `HttpCodeFromError`, server/src/grpc/grpc_utils.h `GrpcStatusUtil`).
    """
    code = (status or "").removeprefix("StatusCode.")
    where = f"{address}, model {model!r}"
    if code in _NO_ACCESS:
        return AccessRefused(f"{where}: no access: {message}", status=status)
    if code in ("404", "NOT_FOUND") or _NOT_READY.search(message):
        return ModelNotReady(
            f"{where}: {message}; is the name as in the server's repository, and did the model load? (The "
            "server's log says why one did not.)",
            status=status,
        )
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(
            f"{where}: no answer in time; raise timeout_s or send smaller batches", status=status
        )
    if code == "UNAVAILABLE" and _NO_CONNECTION.search(message):
        return unreachable(address, message, status=status)
    if code in _BUSY or (code == "RESOURCE_EXHAUSTED" and _RATE_LIMIT in message):
        again = _AGAIN_IN.search(message)
        return ServerBusy(
            f"{where}: busy: {message}; try again later or with less concurrency",
            status=status,
            retry_after_s=float(again[1]) if again else None,
        )
    if not code or code in _REFUSED or re.fullmatch("4..", code):
        return RequestRefused(f"{where}: refused: {message}", status=status)
    return ServerFault(f"{where}: failed: {message}; the server's log says more", status=status)


def unreachable(address: Address, reason: object, *, status: str | None = None) -> ServerUnreachable:
    """The error for a connection that cannot be made or that broke."""
    other = (
        "gRPC address, which starts with grpc://"
        if address.protocol == "http"
        else "HTTP address, http://host:8000"
    )
    if re.search(r"certificate|CERTIFICATE", str(reason)):
        return ServerUnreachable(
            f"{address}: no TLS connection ({reason}). A server whose certificate comes from an authority of its own needs "
            "that one: ca=... or --ca FILE; one that asks for a certificate of yours: certificate=... or --certificate.",
            status=status,
        )
    return ServerUnreachable(
        f"{address}: no connection ({reason}). Is the server up (`python -m serving status`), is the port "
        f"right, or is this the port of the other protocol (a {other})?",
        status=status,
    )


def _tile_array(tiles: Sequence[bytes]) -> NDArray[np.object_]:
    """Encoded tiles as the BYTES tensor [N, 1]."""
    tiles_N1 = np.empty((len(tiles), 1), dtype=np.object_)
    # One by one: as a list, NumPy would make them fixed-width strings that lose their trailing zero bytes.
    for row, data in enumerate(tiles):
        tiles_N1[row, 0] = data
    return tiles_N1


def _headers(access: Access, subject: str) -> dict[str, str]:
    """Of one request, over HTTP or gRPC."""
    return access.headers | ({SUBJECT_HEADER: subject} if subject else {})


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class HttpTransport:
    """tritonclient.http with a deadline over the whole call, which it has not by itself."""

    def __init__(self, address: Address, access: Access = NO_ACCESS) -> None:
        self._address = address
        self._access = access
        self._client: Any = None

    def model_versions(self, model: str, timeout_s: float, *, subject: str = "") -> list[str]:
        headers = _headers(self._access, subject)
        metadata = self._call(
            model, timeout_s, lambda client: client.get_model_metadata(model, headers=headers)
        )
        return [str(version) for version in metadata.get("versions", [])]

    def model_config(
        self, model: str, version: str, timeout_s: float, *, subject: str = ""
    ) -> dict[str, Any]:
        headers = _headers(self._access, subject)
        ask = self._call(model, timeout_s, lambda c: c.get_model_config(model, version, headers=headers))
        return dict(ask)

    def infer(
        self,
        model: str,
        tiles: Sequence[bytes],
        timeout_s: float,
        question: Question = TILES,
        *,
        subject: str = "",
    ) -> RawAnswer:
        import tritonclient.http as triton

        tensor = triton.InferInput(question.input, question.shape(len(tiles)), "BYTES")
        tensor.set_data_from_numpy(_tile_array(tiles).reshape(question.shape(len(tiles))))
        wanted = [triton.InferRequestedOutput(name) for name in question.outputs]
        headers = _headers(self._access, subject)
        result = self._call(
            model,
            timeout_s,
            lambda client: client.infer(model, [tensor], outputs=wanted, headers=headers),
        )
        version = str(result.get_response().get("model_version", ""))
        return RawAnswer({name: result.as_numpy(name) for name in question.outputs}, version)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            import gevent

            client.close()
            gevent.get_hub().destroy(
                destroy_loop=True
            )  # this thread's event loop; it would keep two descriptors

    def _call(self, model: str, timeout_s: float, ask: Any) -> Any:
        import gevent
        import gevent.ssl
        import tritonclient.http as triton
        from geventhttpclient.response import HTTPParseError
        from tritonclient.utils import InferenceServerException

        if self._client is None:
            self._client = triton.InferenceServerClient(
                self._address.authority,
                connection_timeout=CONNECT_TIMEOUT_S,
                network_timeout=None,
                ssl=self._address.secure,
                ssl_context_factory=(lambda: self._access.tls_context(gevent.ssl))
                if self._address.secure
                else None,
            )
        try:
            with gevent.Timeout(timeout_s):
                return ask(self._client)
        except InferenceServerException as error:
            raise error_of(
                str(error.message()), error.status(), model=model, address=self._address
            ) from error
        except gevent.Timeout:
            self._forget()
            raise DeadlineExceeded(
                f"{self._address}, model {model!r}: no answer within {timeout_s:.3g} s; raise timeout_s "
                "or send smaller batches"
            ) from None
        except (OSError, HTTPParseError, ValueError) as error:  # ValueError: an answer that is no JSON
            self._forget()
            raise unreachable(self._address, error) from error

    def _forget(self) -> None:
        """Drop a connection that is in an unknown state; the next call makes a new one."""
        client, self._client = self._client, None
        client.close()


class GrpcTransport:
    """tritonclient.grpc with a deadline on every call, which it has not by default."""

    def __init__(self, address: Address, access: Access = NO_ACCESS) -> None:
        self._address = address
        self._access = access
        self._client: Any = None

    def model_versions(self, model: str, timeout_s: float, *, subject: str = "") -> list[str]:
        headers = _headers(self._access, subject)
        ask = self._connected().get_model_metadata
        try:
            metadata = ask(model, as_json=True, client_timeout=timeout_s, headers=headers)
        except Exception as error:
            self._raise(error, model)
        return [str(version) for version in metadata.get("versions", [])]

    def model_config(
        self, model: str, version: str, timeout_s: float, *, subject: str = ""
    ) -> dict[str, Any]:
        headers = _headers(self._access, subject)
        ask = self._connected().get_model_config
        try:
            told = ask(model, version, as_json=True, client_timeout=timeout_s, headers=headers)
            return dict(told.get("config", {}))
        except Exception as error:
            self._raise(error, model)

    def infer(
        self,
        model: str,
        tiles: Sequence[bytes],
        timeout_s: float,
        question: Question = TILES,
        *,
        subject: str = "",
    ) -> RawAnswer:
        import tritonclient.grpc as triton

        tensor = triton.InferInput(question.input, question.shape(len(tiles)), "BYTES")
        tensor.set_data_from_numpy(_tile_array(tiles).reshape(question.shape(len(tiles))))
        wanted = [triton.InferRequestedOutput(name) for name in question.outputs]
        headers = _headers(self._access, subject)
        try:
            result = self._connected().infer(
                model, [tensor], outputs=wanted, client_timeout=timeout_s, headers=headers
            )
        except Exception as error:
            self._raise(error, model)
        return RawAnswer(
            {name: result.as_numpy(name) for name in question.outputs}, result.get_response().model_version
        )

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> Any:
        if self._client is None:
            import tritonclient.grpc as triton

            options = [
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # A refused connection is tried anew by our own retries; gRPC's back-off of a second and more
                # would fail them all without asking the server.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", round(1000 * CONNECT_TIMEOUT_S)),  # for one attempt
                ("grpc.max_reconnect_backoff_ms", 1000),
            ]
            if self._address.is_loopback:
                options.append(("grpc.enable_http_proxy", 0))
            self._client = triton.InferenceServerClient(
                self._address.authority,
                ssl=self._address.secure,
                root_certificates=_text(self._access.ca),
                certificate_chain=_text(self._access.certificate),
                private_key=_text(self._access.certificate_key),
                channel_args=options,
            )
        return self._client

    def _raise(self, error: Exception, model: str) -> NoReturn:
        from tritonclient.utils import InferenceServerException

        if not isinstance(error, InferenceServerException):
            raise error
        raise error_of(str(error.message()), error.status(), model=model, address=self._address) from error
