"""A slide in, a Prediction out, through a Clotline tile or slide classifier on a Triton server.

with SlideClient("localhost:8000") as client:
    prediction = client.predict("slides/006388_0.tif")
    print(prediction.label, prediction.confidence)
"""

from __future__ import annotations

import collections
import functools
import hashlib
import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from clients.access import Access, api_key_from
from clients.address import parse_address
from clients.answers import (
    BAGS,
    ModelCard,
    TileAnswers,
    check_answers,
    empty_answers,
    join_answers,
    read_model_card,
)
from clients.bags import BagAnswer, check_bag_answer
from clients.batches import MAX_REQUEST_BYTES, batches
from clients.connections import CLOSING_S, Connections, Patience
from clients.errors import ModelMismatch, ModelNotReady, RequestRefused
from clients.prediction import Prediction, bag_prediction, slide_prediction
from clients.transport import Transport
from slides.labels import patient_of
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import TileRef, find_tiles, iter_tiles

# A bag is not cut into several requests; this is Triton's limit for HTTP less room for the headers.
MAX_HTTP_BAG_BYTES = 60 * 1024 * 1024
AUTO = "auto"
AUTO_MODELS = ("slide_classifier", "tile_classifier")
KEPT_CARDS = 4
TRIES = 3
"""With the card of another release, with that of the one that answers, and once more for a release meanwhile."""

T = TypeVar("T")


class _About(TypedDict):
    image_id: str
    patient_id: str
    model: str
    model_version: str
    slide_size_px: tuple[int, int]
    um_per_px: float


class SlideClient:
    """Asks one model on one server. Thread-safe; a context manager.

    Class names, tile size and resolution come from the server (the model's parameter `clotline_spec`), so a
    client needs to know nothing but the URL.

    A gateway that tries a candidate release has two releases answer. All requests of one call name the same subject, and so
    are answered by one of them; a slide's is `subject_of` its image_id, so that the same slide has the same release again.

    Args:
        url: `host:port`, `http://...`, `https://...`, `grpc://...` or `grpcs://...`.
        model: name of the tile or slide classifier on the server; "auto" asks for slide_classifier and, where the server
            has none, for tile_classifier (`model` then says which one it is).
        timeout_s: deadline of one request, its retries included.
        concurrency: requests under way at once, each on a connection and thread of its own.
        batch: tiles a request; at most (and by default) what the model takes.
        retries: further attempts after a broken connection or a busy server, with growing pauses; not sooner than the
            server asks for.
        api_key: for a gateway that wants one; by default that of the environment variable CLOTLINE_API_KEY, if it is set.
            Sent over TLS, or to this machine, only.
        ca: PEM file with the authority that signed the server's certificate; by default those that the system trusts.
        certificate, certificate_key: PEM files of this client, where the server asks for them (mutual TLS).

    Raises:
        AddressError: a URL that names no server.
        AccessError: a key or certificate that cannot be used.
        ValueError: an impossible number.
    """

    def __init__(
        self,
        url: str = "localhost:8000",
        *,
        model: str = "tile_classifier",
        timeout_s: float = 30.0,
        concurrency: int = 2,
        batch: int | None = None,
        retries: int = 3,
        api_key: str | None = None,
        ca: Path | str | None = None,
        certificate: Path | str | None = None,
        certificate_key: Path | str | None = None,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("batch", batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value!r}")
        self.address = parse_address(url)
        self.model = model
        self._concurrency = concurrency
        self._batch = batch
        self._card: ModelCard | None = None
        self._cards: dict[str, ModelCard] = {}
        files = [None if path is None else Path(path) for path in (ca, certificate, certificate_key)]
        access = Access(api_key_from(None) if api_key is None else api_key, *files)
        access.check(self.address)
        self._connections = Connections(
            self.address, size=concurrency, patience=Patience(timeout_s, retries), access=access
        )

    def __enter__(self) -> SlideClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, or Ctrl-C, nobody wants to wait for the calls that are still under way.
        self._connections.close(wait_s=0.0 if error else CLOSING_S)

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._connections.close()

    @property
    def card(self) -> ModelCard:
        """What the server says of the model, of the version that answered last; asked once for each version.

        Raises:
            ServerUnreachable, ServerBusy, DeadlineExceeded, ModelNotReady, RequestRefused, ServerFault: no
                answer.
            ModelMismatch: the model is no tile or slide classifier.
        """
        return self._first_card("")

    @property
    def spec(self) -> ModelSpec:
        """The model's specification, from the server; raises what `card` raises."""
        return self.card.spec

    def classify(self, tiles: Sequence[bytes]) -> TileAnswers:
        """Classify encoded tiles (JPEG or PNG).

        Returns:
            TileAnswers for N tiles in the order given; N may be 0.

        Raises:
            RequestRefused: the server took a tile for no image, too large, ...; its message says which.
            AnswerError: the answer cannot be.
            ClientError: no answer; see clients.errors.
        """
        return self._ask(lambda card: tiles, self._send, secrets.token_hex(8))[1]

    def classify_tiles(self, tiles: Sequence[bytes]) -> NDArray[np.float32]:
        """Probabilities float32 [N, K] of N encoded tiles, a column for each of `spec.class_names`; raises as
        `classify` does."""
        return self.classify(tiles).probabilities_NK

    def classify_bag(self, tiles: Sequence[bytes]) -> BagAnswer:
        """Ask a slide classifier about a bag of encoded tiles, all those of one slide.

        Raises:
            RequestRefused: the bag is empty or too large, the server took a tile for no image, ...
            ModelMismatch: the model is a tile classifier.
            AnswerError: the answer cannot be.
            ClientError: no answer; see clients.errors.
        """
        return self._ask(lambda card: tiles, self._send_bag, secrets.token_hex(8))[1]

    def predict(
        self, path: Path | str, *, um_per_px: float | None = None, patient_id: str | None = None
    ) -> Prediction:
        """Find tissue on the slide, send its tiles, and say what the model makes of them.

        To a tile classifier, tiles are sent while others are being cut, and the answers are averaged. A slide classifier
        gets the bag that it was judged by in one request; attention says how much rests on each tile.

        Args:
            path: a slide file that `slides.reader.open_slide` reads.
            um_per_px: level-0 resolution, for slides that do not state theirs (it wins over what they state).
            patient_id: the slide's patient; by default read from its name (`<patient>_<number>`).

        Raises:
            slides.errors.SlidesError: the slide cannot be read, has no tissue, or does not state its
            resolution.
            ClientError: no answer, or one that cannot be; see clients.errors.
        """
        path = Path(path)
        subject = subject_of(path.stem)
        self._first_card(subject)  # a server that is not there is told before a slide is read
        with open_slide(path, um_per_px=um_per_px) as slide:
            refs: list[TileRef] = []

            def cut(card: ModelCard) -> Generator[bytes, None, None]:
                found = find_tiles(slide, card.spec)
                refs[:] = found if card.bag is None else card.bag.chosen(found)
                for _, data in iter_tiles(slide, card.spec, refs):
                    yield data

            card, answer = self._ask(cut, self._send_any, subject)
            about: _About = {
                "image_id": path.stem,
                "patient_id": patient_of(path.stem) if patient_id is None else patient_id,
                "model": self.model,
                "model_version": card.version,
                "slide_size_px": slide.size_px,
                "um_per_px": float(slide.um_per_px or 0),
            }
            if isinstance(answer, BagAnswer):
                return bag_prediction(refs, answer, card.spec.class_names, **about)
            return slide_prediction(refs, answer.probabilities_NK, card.spec.class_names, **about)

    def _first_card(self, subject: str) -> ModelCard:
        """That of the version that answered last; where none did, the server is asked."""
        return self._card or self._keep(self._ask_card(subject))

    def _know(self, card: ModelCard) -> ModelCard:
        """Remember it, and forget all but a few; other threads see the cards before or after."""
        others = [known for known in self._cards.values() if known.version != card.version]
        self._cards = {known.version: known for known in [*others, card][-KEPT_CARDS:]}
        return card

    def _keep(self, card: ModelCard) -> ModelCard:
        """Make it the one that answered last."""
        self._card = self._know(card)
        return card

    def _ask(
        self,
        cut: Callable[[ModelCard], Iterable[bytes]],
        send: Callable[[Iterable[bytes], ModelCard, str], tuple[ModelCard, T]],
        subject: str,
    ) -> tuple[ModelCard, T]:
        """Send the tiles that `cut` makes for the model; the card of the version that answered, and its answer.

        When another version answers than the one they were made for, a release took place, or two of them answer. One that
        wants such tiles, too, has answered well. Otherwise, or where it refuses, or two versions answered for one slide:
        take its specification, cut and send anew.
        """
        card = self._first_card(subject)
        for _ in range(TRIES):
            tiles = cut(card)
            try:
                by, answer = send(tiles, card, subject)
                return self._keep(by), answer
            except _VersionChanged as change:
                card = self._keep(change.card or self._ask_card(subject))
            except RequestRefused:
                # Perhaps by a release with other limits than that which the tiles were made for.
                asked = self._ask_card(subject)
                if asked.version == card.version:
                    raise
                card = self._keep(asked)
            finally:
                # Not left to the garbage collector: it would come after the slide is closed, which the
                # threads that cut tiles still read.
                if isinstance(tiles, Generator):
                    tiles.close()
        raise ModelMismatch(
            f"{self.address}, model {self.model!r}: other versions answered than were asked, {TRIES} times, at last {card.version}; "
            "releases take place right now, try again later"
        )

    def _answered_by(
        self, transport: Transport, version: str, card: ModelCard, timeout_s: float, subject: str
    ) -> ModelCard:
        """The card of the version that answered tiles made for `card`, asked over the connection that it answered.

        Raises:
            _VersionChanged: it wants other tiles.
        """
        if version == card.version:
            return card
        by = self._cards.get(version)
        if by is None:
            try:
                config = transport.model_config(self.model, version, timeout_s, subject=subject)
            except (ModelNotReady, RequestRefused):  # it has gone, or another server was asked
                raise _VersionChanged from None
            # At once: the next tiles of the same slide may be under way, and their answer needs not ask again.
            by = self._know(read_model_card(self.model, version, config))
        if (by.spec, by.bag) != (card.spec, card.bag):
            raise _VersionChanged(by)
        return by

    def _send_any(
        self, tiles: Iterable[bytes], card: ModelCard, subject: str
    ) -> tuple[ModelCard, TileAnswers | BagAnswer]:
        send = self._send if card.bag is None else self._send_bag
        return send(tiles, card, subject)

    def _send_bag(self, tiles: Iterable[bytes], card: ModelCard, subject: str) -> tuple[ModelCard, BagAnswer]:
        """All tiles in one request, which has one answer."""
        source = f"{self.address}, model {self.model!r}"
        if card.bag is None:
            raise ModelMismatch(f"{source} is a tile classifier; a bag is answered by slide_classifier")
        bag = list(tiles)
        held_bytes = sum(map(len, bag))
        over_http = self.address.protocol == "http"
        most_bytes = min(card.bag.max_bytes, MAX_HTTP_BAG_BYTES) if over_http else card.bag.max_bytes
        if not 1 <= len(bag) <= card.bag.max_tiles or held_bytes > most_bytes:
            hint = " (over grpc:// it may be larger)" if most_bytes < card.bag.max_bytes else ""
            raise RequestRefused(
                f"{source}: a bag of {len(bag)} tiles with {held_bytes} bytes was not sent; it takes 1 to "
                f"{card.bag.max_tiles} tiles and at most {most_bytes} bytes{hint}"
            )

        def infer(transport: Transport, timeout_s: float) -> tuple[ModelCard, BagAnswer]:
            raw = transport.infer(self.model, bag, timeout_s, BAGS, subject=subject)
            by = self._answered_by(transport, raw.version, card, timeout_s, subject)
            classes = len(by.spec.class_names)
            return by, check_bag_answer(raw.outputs, tile_count=len(bag), class_count=classes, source=source)

        return self._connections.submit(infer).result()

    def _send(self, tiles: Iterable[bytes], card: ModelCard, subject: str) -> tuple[ModelCard, TileAnswers]:
        source = f"{self.address}, model {self.model!r}"
        if card.bag is not None:
            raise ModelMismatch(
                f"{source} answers for whole slides; single tiles are classified by tile_classifier"
            )
        size = min(self._batch or card.max_batch, card.max_batch)
        waiting: collections.deque[Future[tuple[ModelCard, TileAnswers]]] = collections.deque()
        found: list[tuple[ModelCard, TileAnswers]] = []

        def infer(
            first: int, batch: list[bytes], transport: Transport, timeout_s: float
        ) -> tuple[ModelCard, TileAnswers]:
            try:
                raw = transport.infer(self.model, batch, timeout_s, subject=subject)
            except RequestRefused as error:  # the server counts within the request, the caller over all tiles
                among = f"{error} (the request held tiles {first} to {first + len(batch) - 1})"
                raise RequestRefused(among, status=error.status) from error
            by = self._answered_by(transport, raw.version, card, timeout_s, subject)
            return by, check_answers(
                raw.outputs, tile_count=len(batch), class_count=len(by.spec.class_names), source=source
            )

        sent = 0
        try:
            for batch in batches(tiles, size, MAX_REQUEST_BYTES):
                if len(waiting) > self._concurrency:  # one more than can be under way: memory stays bounded
                    found.append(waiting.popleft().result())
                waiting.append(self._connections.submit(functools.partial(infer, sent, batch)))
                sent += len(batch)
            while waiting:
                found.append(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()
        if len({by.version for by, _ in found}) > 1:  # never one slide by two releases
            raise _VersionChanged(found[-1][0])
        parts = [answers for _, answers in found]
        return found[-1][0] if found else card, join_answers(
            [empty_answers(len(card.spec.class_names)), *parts]
        )

    def _ask_card(self, subject: str = "") -> ModelCard:
        def ask(model: str, transport: Transport, timeout_s: float) -> ModelCard:
            versions = transport.model_versions(model, timeout_s, subject=subject)
            if not versions:
                raise ModelNotReady(f"{self.address}, model {model!r}: no version of it is loaded")
            version = max(versions, key=int)
            config = transport.model_config(model, version, timeout_s, subject=subject)
            return read_model_card(model, version, config)

        if self.model == AUTO:
            first, second = AUTO_MODELS
            try:
                card = self._connections.submit(functools.partial(ask, first)).result()
            except ModelNotReady:
                card = self._connections.submit(functools.partial(ask, second)).result()
            self.model = card.name
            return card
        return self._connections.submit(functools.partial(ask, self.model)).result()


def subject_of(image_id: str) -> str:
    """What requests about a slide name as their subject: 16 hexadecimal digits of SHA-256, nothing readable."""
    return hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _VersionChanged(Exception):
    """Another version answered than the one whose specification is known: `card` is its, None where it was not told."""

    def __init__(self, card: ModelCard | None = None) -> None:
        super().__init__()
        self.card = card
