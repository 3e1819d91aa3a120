"""The client against a real Triton server (fixture `served_repository`), and where there is none."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.answers import ModelCard
from clients.batches import batches
from clients.errors import ClosedError, ModelMismatch, ModelNotReady, RequestRefused, ServerUnreachable
from clients.prediction import Prediction
from clients.slide_client import KEPT_CARDS, SlideClient, subject_of
from slides.decode import encode_tile
from slides.errors import NoTissueError, SlideFileError
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import find_tiles, iter_tiles
from tests.clients.recording_proxy import Passed, recording_proxy
from tests.conftest import ServedRepository, run_module

KEY = "clk_" + 64 * "a"
CANARY_TILE_PX = 320


def test_batches_keep_order_and_bounds() -> None:
    tiles = [b"1", b"22", b"333", b"4" * 90, b"5", b"6"]
    assert list(batches(iter(tiles), 2, 10)) == [[b"1", b"22"], [b"333"], [b"4" * 90], [b"5", b"6"]]
    assert list(batches(tiles, 3, 1000)) == [tiles[:3], tiles[3:]]
    assert list(batches([], 3, 1000)) == []


def test_a_server_that_is_not_there_is_told_before_the_slide_is_read(unused_port: int) -> None:
    with (
        SlideClient(f"127.0.0.1:{unused_port}", retries=1) as client,
        pytest.raises(ServerUnreachable, match=f"{unused_port}.*serving status"),
    ):
        client.predict("no such slide.tif")


def test_a_closed_client_says_so(unused_port: int) -> None:
    client = SlideClient(f"127.0.0.1:{unused_port}")
    client.close()
    with pytest.raises(ClosedError):
        client.classify_tiles([b"tile"])


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"batch": 0}, {"timeout_s": 0}, {"retries": -1}])
def test_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        SlideClient("localhost:8000", **wrong)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, served_repository: Any) -> Iterator[SlideClient]:
    with SlideClient(url_of(served_repository, request.param)) as client:
        yield client


def url_of(served_repository: Any, protocol: str) -> str:
    url = served_repository.http_url if protocol == "http" else served_repository.grpc_url
    return url if "://" in url else f"{protocol}://{url}"


@pytest.fixture(scope="module")
def tiles() -> list[bytes]:
    """Nineteen different images: batches of every size are needed to send them."""
    rng = np.random.default_rng(5)
    return [encode_tile(rng.integers(0, 256, (96 + n, 120, 3), dtype=np.uint8), 90) for n in range(19)]


def test_the_specification_comes_from_the_server(client: SlideClient, served_repository: Any) -> None:
    assert len(client.spec.class_names) >= 2
    assert client.card.version.isdigit()
    assert client.card.max_batch >= 1
    assert "weights_sha256" in client.card.checkpoint


def test_a_slide_in_an_answer_out(client: SlideClient, slide_path: Path) -> None:
    prediction = client.predict(slide_path)
    assert (prediction.image_id, prediction.patient_id) == ("abc123_0", "abc123")
    assert tuple(prediction.probabilities) == client.spec.class_names
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert prediction.confidence == max(prediction.probabilities.values())
    assert prediction.slide_size_px == (2560, 2560)
    assert prediction.um_per_px == pytest.approx(0.5, rel=1e-3)
    with open_slide(slide_path) as slide:
        refs = find_tiles(slide, client.spec)
        data = [jpeg for _, jpeg in iter_tiles(slide, client.spec, refs)]
    assert [(tile.x_px, tile.y_px) for tile in prediction.tiles] == [(ref.x_px, ref.y_px) for ref in refs]
    direct_NK = client.classify_tiles(data)
    for tile, row_K in zip(prediction.tiles, direct_NK, strict=True):
        assert list(tile.probabilities.values()) == pytest.approx(row_K.tolist(), abs=1e-6)


def test_answers_keep_the_order_of_the_tiles(client: SlideClient, tiles: list[bytes]) -> None:
    forwards_NK = client.classify_tiles(tiles)
    assert forwards_NK.shape == (19, len(client.spec.class_names))
    np.testing.assert_allclose(client.classify_tiles(tiles[::-1])[::-1], forwards_NK, atol=1e-5)
    assert len({tuple(row) for row in forwards_NK.round(6).tolist()}) > 10  # or order could not be seen


def test_batch_and_protocol_do_not_show(served_repository: Any, tiles: list[bytes]) -> None:
    answers = []
    for protocol in ("http", "grpc"):
        for batch in (1, 3, 10_000):
            with SlideClient(url_of(served_repository, protocol), batch=batch, concurrency=3) as client:
                answers.append(client.classify(tiles))
    for answer in answers[1:]:
        np.testing.assert_allclose(answer.probabilities_NK, answers[0].probabilities_NK, atol=1e-5)
        np.testing.assert_array_equal(answer.label_index_N, answers[0].label_index_N)


def test_a_refusal_says_where_among_all_tiles(served_repository: Any, tiles: list[bytes]) -> None:
    with (
        SlideClient(url_of(served_repository, "http"), batch=2) as client,
        pytest.raises(RequestRefused, match=r"tile 1 of 2.*the request held tiles 4 to 5\)"),
    ):
        client.classify_tiles([*tiles[:5], b"no image", *tiles[5:8]])


def test_tiles_are_no_longer_cut_once_a_request_failed(client: SlideClient) -> None:
    ended = []

    def endless(card: ModelCard) -> Iterator[bytes]:
        try:
            while True:
                yield b"no image"
        finally:
            ended.append(True)

    with pytest.raises(RequestRefused) as caught:
        client._ask(endless, client._send, "")
    assert ended == [True]  # although the error still refers to the frames that cut
    assert caught.value.__traceback__ is not None


def test_after_a_release_the_specification_is_asked_for_again(
    client: SlideClient, tiles: list[bytes]
) -> None:
    version = client.card.version
    client._card = dataclasses.replace(client.card, version="999")  # as if it had been the one before
    client._cards = {"999": client._card}
    assert client.classify_tiles(tiles[:3]).shape[0] == 3
    assert client.card.version == version


def test_another_release_that_wants_such_tiles_has_answered_well(
    client: SlideClient, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = client.card
    client._keep(dataclasses.replace(true, version="999"))
    monkeypatch.setattr(client, "_ask_card", None)  # the connection that answered is asked
    expected_NK = client.classify_tiles(tiles[:3])
    assert client.card == true
    np.testing.assert_array_equal(client.classify_tiles(tiles[:3]), expected_NK)


def test_tiles_of_one_call_are_never_answered_by_two_releases(
    client: SlideClient, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client._batch = 1
    versions = itertools.cycle(["7", "8"])

    def in_turn(transport: object, version: str, card: ModelCard, *rest: object) -> ModelCard:
        return dataclasses.replace(card, version=next(versions))

    monkeypatch.setattr(client, "_answered_by", in_turn)
    with pytest.raises(
        ModelMismatch, match=r"other versions answered than were asked, 3 times, at last [78]; releases"
    ):
        client.classify_tiles(tiles[:2])
    assert client.classify_tiles(tiles[:1]).shape[0] == 1


def test_no_tile_no_answer(client: SlideClient) -> None:
    assert client.classify_tiles([]).shape == (0, len(client.spec.class_names))


def test_one_client_serves_many_threads(client: SlideClient, tiles: list[bytes]) -> None:
    expected_NK = client.classify_tiles(tiles)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for answer_NK in pool.map(client.classify_tiles, [tiles] * 6):
            np.testing.assert_allclose(answer_NK, expected_NK, atol=1e-5)


def test_bytes_that_are_no_image_are_refused_and_the_client_goes_on(
    client: SlideClient, tiles: list[bytes]
) -> None:
    for bad in (b"not an image", b"", tiles[0][:200]):
        with pytest.raises(RequestRefused):
            client.classify_tiles([tiles[0], bad])
    assert client.classify_tiles(tiles[:2]).shape[0] == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_that_is_not_there(served_repository: Any, protocol: str) -> None:
    with (
        SlideClient(url_of(served_repository, protocol), model="no_such_model", retries=0) as client,
        pytest.raises(ModelNotReady, match="no_such_model"),
    ):
        client.spec  # noqa: B018


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_part_of_the_classifier_is_no_classifier(served_repository: Any, protocol: str) -> None:
    with (
        SlideClient(url_of(served_repository, protocol), model="tile_preprocess") as client,
        pytest.raises(ModelMismatch, match="clotline_spec"),
    ):
        client.spec  # noqa: B018


def test_the_other_protocols_port_is_told_as_such(served_repository: Any) -> None:
    grpc = served_repository.grpc_url.split("://")[-1]
    with (
        SlideClient(f"http://{grpc}", retries=0, timeout_s=5) as client,
        pytest.raises(ServerUnreachable, match="grpc://"),
    ):
        client.spec  # noqa: B018


def test_bad_slides_are_told_as_such(client: SlideClient, tmp_path: Path) -> None:
    with pytest.raises(SlideFileError):
        client.predict(tmp_path / "none.tif")
    (tmp_path / "empty.tif").touch()
    with pytest.raises(SlideFileError):
        client.predict(tmp_path / "empty.tif")


def test_empty_glass_has_no_answer(client: SlideClient, tmp_path: Path) -> None:
    import tifffile

    glass = tmp_path / "glass.tif"
    tifffile.imwrite(
        glass,
        np.full((1024, 1024, 3), 243, np.uint8),
        photometric="rgb",
        tile=(256, 256),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    with pytest.raises(NoTissueError):
        client.predict(glass)


@dataclasses.dataclass(frozen=True)
class TwoReleases:
    """Version 1 on one server and version 2, which takes larger tiles, on another; `of` says which has a subject."""

    one: dict[str, str]
    two: dict[str, str]

    def servers(self, protocol: str) -> tuple[str, str]:
        return self.one[protocol], self.two[protocol]

    @staticmethod
    def of(subject: str | None) -> int:
        return 0 if subject is None else int(subject, 16) % 2


@pytest.fixture(scope="module")
def two_releases(
    served_repository: ServedRepository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoReleases]:
    repository = tmp_path_factory.mktemp("canary") / "models"
    shutil.copytree(
        served_repository.repository,
        repository,
        ignore=shutil.ignore_patterns("*torchscript*", "__pycache__"),
    )
    classifier = repository / "tile_classifier"
    (classifier / "1").rename(classifier / "2")
    config = (classifier / "config.pbtxt").read_text()
    larger, changed = re.subn(r'(tile_size_px\\":)256', rf"\g<1>{CANARY_TILE_PX}", config)
    assert changed == 1
    (classifier / "config.pbtxt").write_text(larger)
    name = f"canary-{os.getpid()}"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    done = run_module("serving", "up", "--repository", repository, "--name", name, *ports, "--detach")
    assert done.returncode == 0, done.stderr
    one = {"http": served_repository.http_url, "grpc": served_repository.grpc_url}
    try:
        yield TwoReleases(one, json.loads(done.stdout.splitlines()[-1]))
    finally:
        run_module("serving", "down", "--name", name)


@pytest.fixture
def slide_paths(slide_path: Path, tmp_path: Path) -> list[Path]:
    """The slide under six names, whose subjects version 1 and version 2 have in turn."""
    names: tuple[list[str], list[str]] = ([], [])
    for number in range(40):
        stem = f"case{number}_0"
        names[TwoReleases.of(subject_of(stem))].append(stem)
    paths = [tmp_path / f"{stem}.tif" for pair in list(zip(*names, strict=False))[:3] for stem in pair]
    for path in paths:
        path.symlink_to(slide_path)
    return paths


def test_a_subject_is_of_the_slide_and_not_readable() -> None:
    assert subject_of("abc123_0") == hashlib.sha256(b"abc123_0").hexdigest()[:16]
    assert len({subject_of(image_id) for image_id in ("abc123_0", "abc123_1", "é_0", "\udcff_0")}) == 4


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_request_of_a_call_names_one_subject(
    protocol: str, served_repository: ServedRepository, slide_paths: list[Path], tiles: list[bytes]
) -> None:
    server = {"http": served_repository.http_url, "grpc": served_repository.grpc_url}[protocol]
    with recording_proxy(protocol, lambda kind, subject: server) as proxy:

        def subject(ask: Any) -> str | None:
            """The one that all requests of a new client name, which is asked for its model too."""
            proxy.passed.clear()
            with SlideClient(proxy.url, api_key=KEY, batch=4) as client:
                ask(client)
            kinds = Counter(passed.kind for passed in proxy.passed)
            assert kinds.pop("infer", 2) >= 2
            assert kinds == {"metadata": 1, "config": 1}
            assert {passed.authorization for passed in proxy.passed} == {f"Bearer {KEY}"}
            (found,) = {passed.subject for passed in proxy.passed}
            return found

        first, second, *_ = slide_paths
        for path in (first, second, first):
            assert subject(lambda client, path=path: client.predict(path)) == subject_of(path.stem)
        random = [subject(lambda client: client.classify(tiles)) for _ in range(2)]
        assert all(re.fullmatch("[0-9a-f]{16}", found or "") for found in random)
        assert len({*random, subject_of(first.stem), subject_of(second.stem)}) == 4
        assert subject(lambda client: client.card) is None


def cut_by(spec: ModelSpec, path: Path) -> list[tuple[int, int, int]]:
    with open_slide(path) as slide:
        return [(ref.x_px, ref.y_px, ref.side_px) for ref in find_tiles(slide, spec)]


def asked_about(passed: list[Passed]) -> Counter[tuple[str, str]]:
    """How often each server was asked about its model."""
    return Counter((entry.kind, entry.server) for entry in passed if entry.kind != "infer")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_two_releases_in_turn_are_asked_about_once_and_each_has_its_own_tiles(
    protocol: str, two_releases: TwoReleases, slide_paths: list[Path]
) -> None:
    servers = two_releases.servers(protocol)
    with (
        recording_proxy(protocol, lambda kind, subject: servers[two_releases.of(subject)]) as proxy,
        SlideClient(proxy.url, batch=4) as client,
    ):

        def check(prediction: Prediction, path: Path) -> None:
            number = two_releases.of(subject_of(path.stem))
            assert prediction.model_version == str(number + 1)
            spec = dataclasses.replace(client.spec, tile_size_px=(256, CANARY_TILE_PX)[number])
            assert [(tile.x_px, tile.y_px, tile.side_px) for tile in prediction.tiles] == cut_by(spec, path)

        for path in slide_paths:
            check(client.predict(path), path)
        first, other = servers if two_releases.of(subject_of(slide_paths[0].stem)) == 0 else servers[::-1]
        once = asked_about(proxy.passed)
        each = once.pop(("config", other))
        assert 1 <= each <= 2, "once a connection, where both met it at the same time"
        assert once == {("metadata", first): 1, ("config", first): 1}
        once["config", other] = each
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for path, prediction in zip(slide_paths, pool.map(client.predict, slide_paths), strict=True):
                check(prediction, path)
        assert asked_about(proxy.passed) == once
        assert all(servers[two_releases.of(entry.subject)] == entry.server for entry in proxy.passed)
        assert {entry.subject for entry in proxy.passed} == {subject_of(path.stem) for path in slide_paths}


def test_a_candidate_that_is_withdrawn_within_a_slide_fails_nothing(
    two_releases: TwoReleases, slide_paths: list[Path]
) -> None:
    servers = two_releases.servers("http")
    of_one, of_two, *_ = slide_paths

    def route(kind: str, subject: str | None) -> str:
        """Once the candidate has said what it is, it answers one request more."""
        since = [entry.kind for entry in proxy.passed if entry.server == servers[1]]
        withdrawn = "config" in since and since[-1] == "infer"
        return servers[0 if withdrawn else two_releases.of(subject)]

    with (
        recording_proxy("http", route) as proxy,
        SlideClient(proxy.url, batch=4, concurrency=1) as client,
    ):
        assert client.predict(of_one).model_version == "1"
        prediction = client.predict(of_two)
        assert prediction.model_version == "1"
        assert [(tile.x_px, tile.y_px, tile.side_px) for tile in prediction.tiles] == cut_by(
            client.spec, of_two
        )
        assert asked_about(proxy.passed) == {
            ("metadata", servers[0]): 1,
            ("config", servers[0]): 1,
            ("config", servers[1]): 1,
        }


def test_what_a_release_with_other_limits_refuses_is_sent_as_it_wants_it(
    two_releases: TwoReleases, tiles: list[bytes]
) -> None:
    servers = two_releases.servers("http")
    with recording_proxy("http", lambda kind, subject: servers[1]) as proxy, SlideClient(proxy.url) as client:
        true = client.card
        guess = dataclasses.replace(true, version="1", max_batch=4 * true.max_batch)
        client._card, client._cards = guess, {"1": guess}
        many = (tiles * (2 * true.max_batch))[: 2 * true.max_batch]
        assert client.classify_tiles(many).shape[0] == len(many)
        assert client.card.version == true.version
        with pytest.raises(RequestRefused):
            client.classify_tiles([b"no image"])


def test_a_server_that_tells_of_a_third_version_is_asked_again(
    two_releases: TwoReleases, tiles: list[bytes]
) -> None:
    servers = two_releases.servers("http")

    def route(kind: str, subject: str | None) -> str:
        told = sum(entry.kind == "config" for entry in proxy.passed)
        return servers[0 if kind != "infer" and told == 1 else 1]

    with recording_proxy("http", route) as proxy, SlideClient(proxy.url) as client:
        client._card = dataclasses.replace(client.card, version="999")
        client._cards = {"999": client._card}
        assert client.classify_tiles(tiles[:3]).shape[0] == 3
        assert client.card.version == "2"
        asked = [(entry.kind, entry.server) for entry in proxy.passed]
        card_of = {server: [("metadata", server), ("config", server)] for server in servers}
        infer = ("infer", servers[1])
        assert asked == [
            *card_of[servers[1]],
            infer,
            ("config", servers[0]),  # which has no such version
            *card_of[servers[1]],
            infer,
        ]


def test_releases_without_end_are_told(two_releases: TwoReleases, tiles: list[bytes]) -> None:
    servers = two_releases.servers("http")

    def route(kind: str, subject: str | None) -> str:
        """Each answer is of the release that was not asked for."""
        asked = sum(entry.kind == "infer" for entry in proxy.passed)
        return servers[(asked + (kind == "infer")) % 2]

    with recording_proxy("http", route) as proxy, SlideClient(proxy.url) as client:
        with pytest.raises(ModelMismatch, match=r"asked, 3 times, at last \d; releases"):
            client.classify_tiles(tiles[:1])
        assert [entry.kind for entry in proxy.passed].count("infer") == 3


def test_few_cards_are_kept(client: SlideClient) -> None:
    versions = [str(number) for number in range(100, 100 + 2 * KEPT_CARDS)]
    for version in versions:
        client._keep(dataclasses.replace(client.card, version=version))
    assert list(client._cards) == versions[-KEPT_CARDS:]
    client._keep(client._cards[versions[-KEPT_CARDS]])
    client._keep(dataclasses.replace(client.card, version="999"))
    assert list(client._cards) == [*versions[-KEPT_CARDS + 2 :], versions[-KEPT_CARDS], "999"]
