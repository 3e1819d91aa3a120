"""Errors of the package `clients`.

    ClientError
     +- AddressError          a URL that names no server (also a ValueError)
     +- AccessError           an API key or certificate that cannot be used (also a ValueError)
     +- AccessRefused         the server wants an API key, another one, or does not offer what was asked
     +- ServerUnreachable     no connection, or one that broke; tried again, in vain
     +- ServerBusy            the server is there but takes no more just now; tried again, in vain
     +- DeadlineExceeded      no answer within `timeout_s`
     +- ModelNotReady         the server does not have the model, or has not loaded it
     +- ModelMismatch         a model that does not say what tiles it takes, or was replaced while it was
     asked +- RequestRefused        the server did not accept what was sent: a tile that is no image, too
     large, ... +- ServerFault           the server accepted the request and failed
     +- AnswerError           an answer that cannot be: wrong shape, not finite, not a probability
     +- HeatmapError          a heatmap that cannot be drawn or written
     +- ClosedError           a client used after its end (also a RuntimeError)

What is wrong with a slide itself is told by the errors of `slides` (SlidesError), which pass through
unchanged. Whoever reads one of these messages learns what was asked of which server, what came back, and what
would work.
"""

from __future__ import annotations


class ClientError(Exception):
    """Root of the errors of this package.

    Attributes:
        status: what the protocol called it ("400", "StatusCode.UNAVAILABLE"), None where no answer came.
    """

    def __init__(self, message: str, *, status: str | None = None) -> None:
        self.status = status
        super().__init__(message)


class AddressError(ClientError, ValueError):
    """A URL that names no server."""


class AccessError(ClientError, ValueError):
    """An API key or certificate that cannot be used."""


class AccessRefused(ClientError):
    """The server, or the gateway before it, does not let this client do this."""


class ServerUnreachable(ClientError):
    """No connection to the server, or one that broke before the answer was complete."""


class ServerBusy(ClientError):
    """The server (or the gateway before it) takes no more requests just now.

    Attributes:
        retry_after_s: seconds after which it may be asked again, as it says itself; None if it says nothing.
    """

    def __init__(
        self, message: str, *, status: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, status=status)


class DeadlineExceeded(ClientError):
    """No answer in time; retries included."""


class ModelNotReady(ClientError):
    """The server does not have the model, or has not loaded it."""


class ModelMismatch(ClientError):
    """The model is no Clotline tile classifier, or another version answered than the one that was asked."""


class RequestRefused(ClientError):
    """The server did not accept the request; sending it again unchanged would not help."""


class ServerFault(ClientError):
    """The server accepted the request and failed at it."""


class AnswerError(ClientError):
    """The server answered with what cannot be: wrong shape, not finite, not a probability."""


class HeatmapError(ClientError):
    """A heatmap cannot be drawn or written."""


class ClosedError(ClientError, RuntimeError):
    """The client was closed before this call."""


RETRIED = (ServerUnreachable, ServerBusy)
