from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.errors import KeysError, UsageError
from deploy.keys import KeyStore, Limits, before_pattern, nginx_text


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


def test_a_key_has_256_random_bits_and_is_known_to_its_owner_alone(store: KeyStore) -> None:
    first, second = store.add("lab-a", Limits()), store.add("lab-b", Limits())
    assert re.fullmatch(r"clk_[0-9a-f]{64}", first)
    assert first != second
    for file in (store.nginx_file, store.directory / "keys.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert f'"{first}" "lab-a.1";' in store.nginx_file.read_text()
    assert first not in repr(store.clients())


def test_rotation_leaves_the_old_key_for_its_grace(store: KeyStore) -> None:
    old = store.add("lab", Limits())
    new = store.rotate("lab", 100)
    keys = store.clients()["lab"].keys
    assert [(key.number, key.secret) for key in keys] == [(1, old), (2, new)]
    assert keys[1].expires_unix_s is None
    assert abs(keys[0].expires_unix_s - time.time() - 100) < 5
    store.rotate("lab", 10_000)
    assert store.clients()["lab"].keys[0].expires_unix_s == keys[0].expires_unix_s  # no grace is made longer
    store.rotate("lab", 0)
    assert [key.number for key in store.clients()["lab"].keys] == [4]


def test_revoke_ends_one_key_or_the_client(store: KeyStore) -> None:
    store.add("lab", Limits())
    new = store.rotate("lab", 100)
    assert store.revoke("lab", 1) == ["lab.1"]
    assert [key.secret for key in store.clients()["lab"].keys] == [new]
    assert store.revoke("lab") == ["lab.2"]
    assert store.clients() == {}
    assert "clk_" not in store.nginx_file.read_text()


@pytest.mark.parametrize("unix_s", [1764220032, 1900000000, 1999999999, 2000000000, 1764220030])
def test_nginx_can_tell_the_time_before_from_the_time_after(unix_s: int) -> None:
    pattern = re.compile(before_pattern(unix_s))
    for step in (1, 2, 9, 10, 99, 100, 31, 1000, 86_399, 10_000_000):
        assert pattern.match(f"{unix_s - step}.999")
        assert not pattern.match(f"{unix_s + step}.000")
    assert not pattern.match(f"{unix_s}.000")


def test_limits_become_zones_that_clients_with_the_same_share(store: KeyStore) -> None:
    for name, limits in {
        "a": Limits(rate_per_s=2.5, burst=7),
        "b": Limits(rate_per_s=2.5, burst=7, in_flight=4),
        "c": Limits(rate_per_s=30, client_class="batch"),
        "d": Limits(),
    }.items():
        store.add(name, limits)
    text = nginx_text(store.clients())
    assert "zone=rate_150_7:256k rate=150r/m;" in text
    assert "zone=rate_1800_20:256k rate=30r/s;" in text
    assert text.count("limit_req_zone") == 2
    assert "limit_conn in_flight_4 4;" in text
    assert '"c.1" batch;' in text


@pytest.mark.parametrize("name", ["", "A", "a b", "a" * 33, "-a", 'a"', "a.b", "a;", "$a"])
def test_a_name_that_nginx_or_the_log_could_misread_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        store.add(name, Limits())
    assert store.clients() == {}


def test_all_wrong_limits_are_told_at_once() -> None:
    with pytest.raises(UsageError, match=r"--rate.*--burst.*--class.*--in-flight"):
        Limits(rate_per_s=-1, burst=0, client_class="fast", in_flight=0)


def test_clients_that_are_not_there_or_there_already(store: KeyStore) -> None:
    store.add("lab", Limits())
    with pytest.raises(UsageError, match="already"):
        store.add("lab", Limits())
    for change in (lambda: store.revoke("other"), lambda: store.rotate("other", 1)):
        with pytest.raises(UsageError, match="there are: lab"):
            change()
    with pytest.raises(UsageError, match="no key number 9"):
        store.revoke("lab", 9)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format":"x","version":1,"clients":{}}'])
def test_a_broken_file_is_told_and_left_alone(store: KeyStore, text: str) -> None:
    store.directory.mkdir()
    file = store.directory / "keys.json"
    file.write_text(text)
    with pytest.raises(KeysError, match=re.escape(str(file))):
        store.add("lab", Limits())
    assert file.read_text() == text


def test_many_at_once_lose_nothing(store: KeyStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda n: KeyStore(store.directory).add(f"lab-{n}", Limits()), range(24)))
    assert {client.keys[0].secret for client in store.clients().values()} == set(keys)
    assert all(key in store.nginx_file.read_text() for key in keys)


def test_the_command_shows_a_key_once(tmp_path: Path) -> None:
    def keys(*words: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "deploy", "keys", *words, "--state", str(tmp_path)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout.splitlines()[-1]))

    added = keys("add", "lab", "--rate", "5", "--class", "batch")
    assert added["key_id"] == "lab.1"
    assert str(added["key"]) not in json.dumps(keys("list"))
    assert keys("list")["clients"][0]["rate_per_s"] == 5  # type: ignore[index]
    assert keys("rotate", "lab", "--grace", "60")["key"] != added["key"]
    assert keys("revoke", "lab")["revoked"] == ["lab.1", "lab.2"]
