"""What a client shows to a gateway: an API key, whom it trusts, and a certificate of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
from pathlib import Path
from typing import Any

from clients.address import Address
from clients.errors import AccessError

KEY_VARIABLE = "CLOTLINE_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


@dataclasses.dataclass(frozen=True)
class Access:
    """How a server is asked that does not let everybody in.

    Attributes:
        api_key: sent with every request; None for none. Only over TLS, or to this machine.
        ca: PEM file with the authority that signed the server's certificate; None: those that the system trusts.
        certificate, certificate_key: PEM files of the client, where the server asks for them (mutual TLS).
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None

    def check(self, address: Address) -> None:
        """Raises AccessError for what cannot be used, or must not be, with this address."""
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise AccessError(
                "the API key must be 8 to 512 visible ASCII characters without blanks; this one is not"
            )
        if self.api_key and not address.secure and not address.is_loopback:
            raise AccessError(
                f"{address}: an API key is sent over https:// or grpcs:// only, because others could read it on the way"
            )
        if bool(self.certificate) != bool(self.certificate_key):
            raise AccessError("a client's certificate and its key belong together: give both")
        if (self.ca or self.certificate) and not address.secure:
            raise AccessError(f"{address}: certificates are for https:// and grpcs://")
        self.tls_context(ssl)

    def tls_context(self, module: Any) -> ssl.SSLContext:
        """For HTTP; `module` is `ssl`, or one that stands for it (gevent's).

        Raises:
            AccessError: a file that cannot be used.
        """
        try:
            context: ssl.SSLContext = module.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.certificate_key, password="")  # nosec B106
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(f) for f in (self.ca, self.certificate, self.certificate_key) if f)
            raise AccessError(
                f"the TLS files {files} cannot be used: {error}; they must be PEM, and the key without a password"
            ) from error
        return context

    @property
    def headers(self) -> dict[str, str]:
        """Of every request over HTTP; over gRPC the same as metadata, which has small letters only."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


NO_ACCESS = Access()
"""Of a server that lets everybody in."""


def api_key_from(file: Path | None) -> str | None:
    """The key in a file, else that of the environment variable CLOTLINE_API_KEY, else None.

    Raises:
        AccessError: the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise AccessError(f"the API key file {file} cannot be read: {error}") from error
    if not key:
        raise AccessError(f"the API key file {file} is empty")
    return key
