"""Where the server is: `localhost:8000`, `http://host:8000/path`, `https://...`, `grpc://host:8001`, `grpcs://...`."""

from __future__ import annotations

import dataclasses
import ipaddress
import urllib.parse

from clients.errors import AddressError

DEFAULT_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}


@dataclasses.dataclass(frozen=True)
class Address:
    """A server's place on the network.

    Attributes:
        scheme: "http", "https", "grpc" or "grpcs".
        host: a name or an IP address, IPv6 without brackets.
        port: 1..65535.
        base_path: what a gateway puts before Triton's own paths, "" or "/prefix"; HTTP only.
    """

    scheme: str
    host: str
    port: int
    base_path: str = ""

    @property
    def secure(self) -> bool:
        return self.scheme in ("https", "grpcs")

    @property
    def protocol(self) -> str:
        """`http` or `grpc`, encrypted or not."""
        return self.scheme.removesuffix("s")

    @property
    def is_loopback(self) -> bool:
        """True for this machine itself."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def authority(self) -> str:
        """`host:port/base_path`, the form that tritonclient takes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.base_path}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def parse_address(url: str) -> Address:
    """The address that a URL names.

    Args:
        url: `host`, `host:port` (HTTP) or `scheme://host[:port][/base_path]`. Without a port: 8000 for http,
            8001 for grpc, 443 for https and grpcs.

    Raises:
        AddressError: another scheme, no host, an impossible port, or parts that have no meaning here.
    """
    expected = "expected host:port, http://host:8000, https://host, grpc://host:8001 or grpcs://host"
    text = url.strip()
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise AddressError(f"server URL {url!r}: {error}; {expected}") from None
    problem = None
    if parts.scheme not in DEFAULT_PORTS:
        problem = f"unknown scheme {parts.scheme!r}"
    elif not parts.hostname or any(letter.isspace() for letter in text):
        problem = "no host"
    elif port == 0:
        problem = "port 0 names no server"
    elif parts.username is not None or parts.query or parts.fragment:
        problem = "user names, ?queries and #fragments have no meaning here"
    elif parts.scheme.startswith("grpc") and parts.path.strip("/"):
        problem = f"gRPC takes no path, and {parts.path!r} is one"
    if problem or parts.hostname is None:
        raise AddressError(f"server URL {url!r}: {problem}; {expected}")
    return Address(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"))
