"""A share of the requests for a candidate: who answers what, and what happens when the candidate fails. Two real servers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.errors import UsageError
from deploy.gateway import GatewaySettings
from tests.deploy.gateway_stack import (
    Answer,
    Stack,
    gateway_stack,
    infer_body,
    jpeg_tiles,
    needs_nginx,
    tiny_server,
)

pytestmark = needs_nginx
PERCENT = 30.0
SUBJECTS = [f"{number:016x}" for number in range(60)]
TILE = jpeg_tiles()[0]
MODEL = "/v2/models/tile_classifier"


@dataclass
class Both:
    """The gateway, and the launcher of the candidate behind it. The candidate's tiny network leans to the other class."""

    stack: Stack
    candidate: subprocess.Popen[str]

    def ask(self, headers: str = "", path: str = f"{MODEL}/infer") -> Answer:
        """A tile over REST."""
        length, body = infer_body(TILE)
        key = self.stack.keys["lab"]
        return self.stack.ask(path, key=key, method="POST", body=body, headers=length + headers)

    def over_rest(self, headers: str = "", path: str = f"{MODEL}/infer") -> str:
        """Who answered: `stable` or `candidate`."""
        found = self.ask(headers, path)
        assert found.status == 200, found
        head = json.loads(found.body[: int(found.headers["inference-header-content-length"])]
                          if "inference-header-content-length" in found.headers else found.body)  # fmt: skip
        outputs = {output["name"]: output for output in head["outputs"]}
        return who(np.asarray(outputs["label_index"]["data"]).ravel()[0])

    def over_grpc(self, client: Any, **headers: str) -> str:
        """The same over gRPC."""
        import tritonclient.grpc as grpc

        tensor = grpc.InferInput("tile", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[TILE]], dtype=np.object_))
        told = {"x-api-key": self.stack.keys["lab"], **{n.replace("_", "-"): v for n, v in headers.items()}}
        found = client.infer("tile_classifier", [tensor], headers=told, client_timeout=20)
        return who(found.as_numpy("label_index").ravel()[0])

    def grpc(self) -> Any:
        """A client of the gateway."""
        import tritonclient.grpc as grpc

        return grpc.InferenceServerClient(
            self.stack.authority, ssl=True, root_certificates=str(self.stack.ca)
        )


def who(label_index: int) -> str:
    return "stable" if label_index == 0 else "candidate"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    directory = tmp_path_factory.mktemp("a canary")
    with tiny_server(directory / "candidate", -4.0) as (server, launcher), gateway_stack(
        directory / "gateway", candidate_http=server["http"], candidate_grpc=server["grpc"], canary_percent=PERCENT
    ) as stack:  # fmt: skip
        yield Both(stack, launcher)


def test_a_share_of_the_requests_is_answered_by_the_candidate(both: Both) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: both.over_rest(), range(200)))
    # Of 200 draws at 30 %, one in ten thousand lies outside of 60 +- 25.
    assert 35 <= found.count("candidate") <= 85


def test_a_subject_stays_with_one_server_over_both_protocols(both: Both) -> None:
    client = both.grpc()
    found = {
        subject: {
            both.over_rest(f"clotline-subject: {subject}\r\n"),
            both.over_rest(f"clotline-subject: {subject}\r\n"),
            both.over_grpc(client, clotline_subject=subject),
        }
        for subject in SUBJECTS
    }
    assert all(len(answered) == 1 for answered in found.values())
    assert {name for answered in found.values() for name in answered} == {"stable", "candidate"}


def test_a_client_may_name_the_track(both: Both) -> None:
    client = both.grpc()
    for track, expected in (("canary", "candidate"), ("stable", "stable")):
        assert {both.over_rest(f"clotline-track: {track}\r\n") for _ in range(8)} == {expected}
        assert {both.over_grpc(client, clotline_track=track) for _ in range(8)} == {expected}
    assert both.stack.ask(MODEL, headers="clotline-track: canary\r\n").status == 401


def test_who_names_a_version_gets_it_from_the_one_that_serves(both: Both) -> None:
    found = {
        both.over_rest(f"clotline-subject: {subject}\r\n", f"{MODEL}/versions/1/infer")
        for subject in SUBJECTS[:20]
    }
    assert found == {"stable"}


def test_the_log_says_who_answered_and_metadata_follows_the_subject(both: Both) -> None:
    key = both.stack.keys["lab"]
    for subject in SUBJECTS[:30]:
        headers = f"clotline-subject: {subject}\r\nX-Request-ID: metadata.{subject}\r\n"
        assert both.stack.ask(MODEL, key=key, headers=headers).status == 200
        both.ask(f"clotline-subject: {subject}\r\nX-Request-ID: infer.{subject}\r\n")
    for number in range(20):
        assert both.stack.ask(MODEL, key=key, headers=f"X-Request-ID: plain.{number}\r\n").status == 200
    tracks = {line["request_id"]: line["track"] for line in both.stack.log()}
    pairs = [(tracks[f"metadata.{subject}"], tracks[f"infer.{subject}"]) for subject in SUBJECTS[:30]]
    assert set(pairs) == {("stable", "stable"), ("canary", "canary")}
    assert {tracks[f"plain.{number}"] for number in range(20)} == {"stable"}


def test_a_request_that_is_refused_is_told_as_the_candidates(both: Both) -> None:
    length, body = infer_body(b"no image")
    found = both.stack.ask(f"{MODEL}/infer", key=both.stack.keys["lab"], method="POST", body=body,
                           headers=f"{length}clotline-track: canary\r\nX-Request-ID: bad.1\r\n")  # fmt: skip
    assert found.status == 400, found
    found = both.stack.ask(f"{MODEL}/infer", method="POST", body=body,
                           headers=f"{length}clotline-track: canary\r\nX-Request-ID: bad.2\r\n")  # fmt: skip
    assert found.status == 401
    tracks = {line["request_id"]: line["track"] for line in both.stack.log()}
    assert (tracks["bad.1"], tracks["bad.2"]) == (
        "canary",
        "stable",
    )  # of the second the candidate did not hear


def test_what_a_dead_candidate_would_have_answered_is_answered_by_the_one_that_serves(both: Both) -> None:
    """The last test of this module: it stops the candidate under load."""
    client = both.grpc()
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(both.ask, f"clotline-track: canary\r\nX-Request-ID: dying.{n}\r\n")
            for n in range(400)
        ]
        both.candidate.terminate()
        both.candidate.wait(40)
        assert {each.result().status for each in asked} == {200}
    assert both.over_rest("clotline-track: canary\r\nX-Request-ID: dead.1\r\n") == "stable"
    assert both.over_grpc(client, clotline_track="canary", x_request_id="dead.2") == "stable"
    tracks = {line["request_id"]: line["track"] for line in both.stack.log()}
    assert tracks["dead.1"] == tracks["dead.2"] == "canary_fallback"


@pytest.mark.parametrize("percent", [-1.0, 0.001, 100.5])
def test_impossible_shares_are_told(percent: float, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("keys", "certificate", "key")]
    settings = GatewaySettings(tmp_path, *files, candidate_http="a:1", candidate_grpc="a:2",
                               canary_percent=percent, shadow_percent=percent)  # fmt: skip
    with pytest.raises(UsageError, match=r"canary_percent .* shadow_percent"):
        settings.variables()
