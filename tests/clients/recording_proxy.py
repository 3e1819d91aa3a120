"""A proxy before real servers, over HTTP or gRPC: it notes every request and passes it on to the server that `route` names."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

KINDS = {"ModelMetadata": "metadata", "ModelConfig": "config", "ModelInfer": "infer"}
NO_PROXY = [("grpc.enable_http_proxy", 0)]


@dataclass(frozen=True)
class Passed:
    """A request: "metadata", "config" or "infer", what it carried, and the server that it went to."""

    kind: str
    subject: str | None
    authorization: str | None
    server: str


@dataclass
class Proxy:
    """Where it listens and what it saw. `route` has the kind and the subject of a request."""

    route: Callable[[str, str | None], str]
    url: str = ""
    passed: list[Passed] = field(default_factory=list)

    def server_for(self, kind: str, headers: Any) -> str:
        """host:port for this request, which is noted."""
        subject = headers.get("clotline-subject")
        server = self.route(kind, subject)
        self.passed.append(Passed(kind, subject, headers.get("authorization"), server))
        return server


@contextmanager
def recording_proxy(protocol: str, route: Callable[[str, str | None], str]) -> Iterator[Proxy]:
    """A proxy on a free port of this machine."""
    proxy = Proxy(route)
    with _http(proxy) if protocol == "http" else _grpc(proxy) as port:
        proxy.url = f"{protocol}://127.0.0.1:{port}"
        yield proxy


@contextmanager
def _http(proxy: Proxy) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            last = self.path.rpartition("/")[2]
            kind = last if last in ("config", "infer") else "metadata"
            upstream = http.client.HTTPConnection(proxy.server_for(kind, self.headers), timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = pass_on

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _grpc(proxy: Proxy) -> Iterator[int]:
    class Handler(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def pass_on(request: bytes, context: grpc.ServicerContext) -> bytes:
                server = proxy.server_for(
                    KINDS[call.method.rpartition("/")[2]], dict(call.invocation_metadata)
                )
                with grpc.insecure_channel(server, options=NO_PROXY) as channel:
                    try:
                        return channel.unary_unary(call.method)(request, timeout=30)
                    except grpc.RpcError as error:
                        context.abort(error.code(), error.details())

            return grpc.unary_unary_rpc_method_handler(pass_on)

    server = grpc.server(ThreadPoolExecutor(4), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=None).wait()
