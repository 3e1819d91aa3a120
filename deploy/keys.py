"""API keys of clients: who may ask, how often, and how much at once.

DIRECTORY/keys.json   what there is to know, mode 0600
DIRECTORY/keys.conf   the same as nginx reads it, mode 0600; written from keys.json
DIRECTORY/lock        held (flock) by who writes

A key is `clk_` and 256 random bits in hexadecimal. The files hold the keys themselves, not hashes: nginx looks a key up by its
text and has no hash function of its own, and who can read a file that only the gateway's owner can read can read the TLS key and
the memory of nginx as well. keys.json belongs outside of version control and of backups that others read. With 256 random
bits there is nothing to guess, so neither a slow hash nor a comparison in constant time would add anything: the look-up goes
by nginx's own hash of the text.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.errors import KeysError, UsageError
from deploy.whole_file import write_whole

CLASSES = ("interactive", "batch")
PREFIX = "clk_"
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_KEY = re.compile(rf"{PREFIX}[0-9a-f]{{64}}")
FORMAT, VERSION = "clotline.keys", 1


@dataclass(frozen=True)
class Limits:
    """What one client may do.

    Attributes:
        rate_per_s: requests a second in the long run, 0.1 or more; None: as many as there is room for.
        burst: requests above that at once.
        client_class: `interactive` or `batch`, which have places in flight of their own.
        in_flight: requests at Triton at once; None: as many as its class has places.
    """

    rate_per_s: float | None = None
    burst: int = 20
    client_class: str = "interactive"
    in_flight: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.rate_per_s is not None and not 0.1 <= self.rate_per_s <= 100_000:
            problems.append(f"--rate must be from 0.1 to 100000 requests a second, not {self.rate_per_s}")
        if not 1 <= self.burst <= 100_000:
            problems.append(f"--burst must be from 1 to 100000, not {self.burst}")
        if self.client_class not in CLASSES:
            problems.append(f"--class must be {' or '.join(CLASSES)}, not {self.client_class!r}")
        if self.in_flight is not None and not 1 <= self.in_flight <= 10_000:
            problems.append(f"--in-flight must be from 1 to 10000, not {self.in_flight}")
        if problems:
            raise UsageError(f"{'; '.join(problems)}.")


@dataclass(frozen=True)
class Key:
    """One key of a client. `expires_unix_s`: when it stops to be one, None for never."""

    number: int
    secret: str = field(repr=False)
    created_unix_s: int
    expires_unix_s: int | None = None


@dataclass(frozen=True)
class Client:
    """A client and its keys, the newest last; the numbers of keys are not used twice."""

    name: str
    limits: Limits
    keys: tuple[Key, ...]
    next_number: int

    def key_id(self, key: Key) -> str:
        """What the access log calls a key: `NAME.NUMBER`."""
        return f"{self.name}.{key.number}"


class KeyStore:
    """The keys of one gateway. Every change is written whole, by one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nginx_file = directory / "keys.conf"
        self._state = directory / "keys.json"

    def clients(self) -> dict[str, Client]:
        """Name -> client; none if there is no file yet. Raises KeysError for a file that is broken."""
        try:
            told = json.loads(self._state.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise KeysError(f"{self._state} cannot be read: {error}") from error
        try:
            if (told["format"], told["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {told['format']!r}, version {told['version']!r}")
            return {name: _client(name, entry) for name, entry in told["clients"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
            raise KeysError(f"{self._state} is not a file of keys of this version: {error!r}") from error

    def prepare(self) -> Path:
        """The file for nginx, written anew from keys.json; for before a start. An empty one lets nobody in."""
        with self._changing():
            pass
        return self.nginx_file

    def add(self, name: str, limits: Limits) -> str:
        """Add a client; returns its key, which is not shown again.

        Raises:
            UsageError: a name that is none, or taken.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"client {name!r}: a name has 1 to 32 of a-z, 0-9 and -, and begins with a letter."
            )
        with self._changing() as clients:
            if name in clients:
                raise UsageError(
                    f"there is a client {name!r} already; `rotate` gives it a new key, `revoke` ends it."
                )
            key = _new_key(1)
            clients[name] = Client(name, limits, (key,), 2)
        return key.secret

    def rotate(self, name: str, grace_s: float) -> str:
        """Give a client a new key, which is returned; its other keys go on for `grace_s` at most.

        The end of the grace stands in the file for nginx, which holds to it by itself.
        """
        if not 0 <= grace_s <= 366 * 86_400:
            raise UsageError(f"--grace must be from 0 s to 366 days, not {grace_s:g} s.")
        with self._changing() as clients:
            client = _known(clients, name)
            now = int(time.time())
            end = now + round(grace_s)
            old = tuple(replace(k, expires_unix_s=min(end, k.expires_unix_s or end)) for k in client.keys)
            key = _new_key(client.next_number)
            clients[name] = replace(client, keys=(*old, key), next_number=client.next_number + 1)
        return key.secret

    def revoke(self, name: str, number: int | None = None) -> list[str]:
        """End a client, or one of its keys; returns the ids of the keys that are gone."""
        with self._changing() as clients:
            client = _known(clients, name)
            gone = [key for key in client.keys if number in (None, key.number)]
            if not gone:
                raise UsageError(
                    f"client {name!r} has no key number {number}; `list` shows those that it has."
                )
            left = tuple(key for key in client.keys if key not in gone)
            if left:
                clients[name] = replace(client, keys=left)
            else:
                del clients[name]
        return [client.key_id(key) for key in gone]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Client]]:
        """The clients to change, alone; written, without keys that have expired, if the block ends well."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self.directory / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                clients = self.clients()
                yield clients
                clients = _without_expired(clients)
                told = {name: _told(client) for name, client in clients.items()}
                document = {"format": FORMAT, "version": VERSION, "clients": told}
                # In this order a kill in between is mended by the next change or start.
                write_whole(self._state, json.dumps(document, indent=1) + "\n", 0o600)
                write_whole(self.nginx_file, nginx_text(clients), 0o600)
        except OSError as error:
            raise KeysError(f"{self.directory}: keys cannot be written: {error}") from error


def nginx_text(clients: dict[str, Client]) -> str:
    """The file for nginx: maps from key to id, client and class, and a zone for each pair of limits that somebody has."""
    keys, owners, classes, expiring = [], [], [], []
    for client in clients.values():
        for key in client.keys:
            key_id, value = client.key_id(key), f'"{client.key_id(key)}"'
            if key.expires_unix_s is not None:
                variable = f"$until_{client.name.replace('-', '_')}_{key.number}"
                pattern = before_pattern(key.expires_unix_s)
                expiring.append(f'map $msec {variable} {{ default ""; "~{pattern}" {value}; }}')
                value = variable
            keys.append(f'"{key.secret}" {value};')
            owners.append(f'"{key_id}" "{client.name}";')
            classes.append(f'"{key_id}" {client.limits.client_class};')
    lines = [
        "# Written by `python -m deploy keys`; holds secrets.",
        *expiring,
        *_map("$presented_key", "$key_id", keys),
        *_map("$key_id", "$client", owners),
        *_map("$key_id", "$client_class", classes),
    ]
    for (rate_per_s, burst), names in _grouped(clients, lambda limits: (limits.rate_per_s, limits.burst)):
        if rate_per_s is None:
            continue
        per_min = round(60 * rate_per_s)
        variable = f"rate_{per_min}_{burst}"
        rate = f"{per_min // 60}r/s" if per_min % 60 == 0 else f"{per_min}r/m"
        lines += _map("$client", f"${variable}", [f'"{name}" "{name}";' for name in names])
        lines.append(f"limit_req_zone ${variable} zone={variable}:256k rate={rate};")
        lines.append(f"limit_req zone={variable} burst={burst} nodelay;")
    for in_flight, names in _grouped(clients, lambda limits: limits.in_flight):
        if in_flight is None:
            continue
        variable = f"in_flight_{in_flight}"
        lines += _map('"$route:$client"', f"${variable}", [f'"infer:{name}" "{name}";' for name in names])
        lines.append(f"limit_conn_zone ${variable} zone={variable}:256k;")
        lines.append(f"limit_conn {variable} {in_flight};")
    return "\n".join(lines) + "\n"


def before_pattern(unix_s: int) -> str:
    """A regular expression that matches nginx's `$msec` (`1764220032.123`) before that second.

    nginx cannot compare numbers. Of two numbers of ten digits, the smaller one has a smaller digit where they first differ.
    """
    digits = str(unix_s)
    if len(digits) != 10:
        raise UsageError(f"{unix_s} is not a time from 2001 to 2286.")
    smaller = [
        f"{digits[:at]}[0-{int(digit) - 1}]" for at, digit in enumerate(digits) if digit != "0"
    ]  # the first digit is not 0
    return f"^(?:{'|'.join(smaller)})"


def _map(source: str, target: str, entries: list[str]) -> list[str]:
    return [f"map {source} {target} {{", '    default "";', *(f"    {entry}" for entry in entries), "}"]


def _grouped(clients: dict[str, Client], of: Callable[[Limits], Any]) -> list[tuple[Any, list[str]]]:
    groups: dict[Any, list[str]] = {}
    for client in clients.values():
        groups.setdefault(of(client.limits), []).append(client.name)
    return list(groups.items())


def _new_key(number: int) -> Key:
    return Key(number, PREFIX + secrets.token_hex(32), int(time.time()))


def _known(clients: dict[str, Client], name: str) -> Client:
    if name not in clients:
        known = ", ".join(sorted(clients)) or "none"
        raise UsageError(f"there is no client {name!r}; there are: {known}.")
    return clients[name]


def _without_expired(clients: dict[str, Client]) -> dict[str, Client]:
    now = time.time()
    left = {
        name: replace(c, keys=tuple(k for k in c.keys if k.expires_unix_s is None or k.expires_unix_s > now))
        for name, c in clients.items()
    }
    return {name: client for name, client in left.items() if client.keys}


def _told(client: Client) -> dict[str, Any]:
    told = asdict(client)
    del told["name"]
    return told


def _client(name: str, entry: dict[str, Any]) -> Client:
    keys = tuple(Key(**key) for key in entry["keys"])
    if not _NAME.fullmatch(name) or not all(_KEY.fullmatch(key.secret) for key in keys):
        raise ValueError(f"client {name!r} has a name or keys that are none")
    return Client(name, Limits(**entry["limits"]), keys, int(entry["next_number"]))
