"""TLS certificates for a gateway without a public one: an authority of its own, and what it signs.

DIRECTORY/ca.pem, ca.key           the authority; clients trust ca.pem (`--ca`); ca.key is needed for `renew` only
DIRECTORY/server.pem, server.key   links into current -> <time>/; `renew` makes a directory and moves the link `current`
DIRECTORY/clients/NAME.pem, .key   certificates of clients, for mutual TLS

Keys are ECDSA P-256: a handshake costs the gateway a tenth of RSA's. Private keys have mode 0600.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.errors import CertificateError, UsageError
from deploy.whole_file import write_whole

CA_DAYS = 3650
SERVER_DAYS = 90
DEFAULT_NAMES = ("localhost", "127.0.0.1", "::1")
_KEPT = 3
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


@dataclass(frozen=True)
class CertificateFiles:
    """Where the files of one directory are."""

    directory: Path

    @property
    def ca(self) -> Path:
        """What clients trust."""
        return self.directory / "ca.pem"

    @property
    def certificate(self) -> Path:
        """Of the server, with its authority's behind it."""
        return self.directory / "server.pem"

    @property
    def key(self) -> Path:
        """Of the server, mode 0600."""
        return self.directory / "server.key"


def make(directory: Path, names: Sequence[str] = DEFAULT_NAMES, days: int = SERVER_DAYS) -> CertificateFiles:
    """An authority and a server certificate; one that is there, for these names and not expired, stays as it is.

    Args:
        names: host names and IP addresses that clients will ask for.
        days: that the server certificate is valid.

    Raises:
        UsageError: a name that is none, or impossible days.
        CertificateError: files that are there and cannot be used.
    """
    files = CertificateFiles(directory)
    _check(names, days)
    with _alone(directory):
        if not files.ca.exists():
            _make_authority(files)
        if not (files.certificate.exists() and files.key.exists()) or _outdated(files.certificate, names):
            _sign_server(files, names, days)
    return files


def renew(directory: Path, days: int = SERVER_DAYS, names: Sequence[str] = ()) -> CertificateFiles:
    """A new key and certificate for the server, for the same names unless others are given; put in place at once.

    A gateway uses them after its next reload.

    Raises:
        CertificateError: there is no certificate yet, or the authority's key is not here.
    """
    files = CertificateFiles(directory)
    wanted = list(names) or names_of(files.certificate)
    _check(wanted, days)
    with _alone(directory):
        _sign_server(files, wanted, days)
    return files


def make_client(directory: Path, name: str, days: int = SERVER_DAYS) -> tuple[Path, Path]:
    """A certificate and key of a client, for gateways with mutual TLS; replaces an earlier one of that name."""
    if not _CLIENT.fullmatch(name):
        raise UsageError(f"client {name!r}: a name has 1 to 64 of A-Z, a-z, 0-9 and -.")
    _check(DEFAULT_NAMES, days)
    with _alone(directory):
        place = directory / "clients"
        place.mkdir(exist_ok=True, mode=0o700)
        files = CertificateFiles(directory)
        pem, key = _sign(files, name, days, ExtendedKeyUsageOID.CLIENT_AUTH, [])
        write_whole(place / f"{name}.key", key, 0o600)
        write_whole(place / f"{name}.pem", pem, 0o644)
    return place / f"{name}.pem", place / f"{name}.key"


def expiry_unix_s(certificate: Path) -> float:
    """When the certificate of a PEM file expires (of several, the first); raises CertificateError."""
    return _load(certificate).not_valid_after_utc.timestamp()


def names_of(certificate: Path) -> list[str]:
    """Host names and IP addresses that a certificate is for; raises CertificateError."""
    try:
        found = _load(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def _check(names: Sequence[str], days: int) -> None:
    wrong = [name for name in names if not _is_address(name) and not _HOST.fullmatch(name)]
    if wrong or not names:
        raise UsageError(f"no host names or IP addresses: {', '.join(map(repr, wrong)) or 'none given'}.")
    if not 1 <= days <= CA_DAYS:
        raise UsageError(f"--days must be from 1 to {CA_DAYS}, not {days}.")


def _outdated(certificate: Path, names: Sequence[str]) -> bool:
    now = datetime.datetime.now(datetime.timezone.utc).timestamp()
    wanted = {str(ipaddress.ip_address(name)) if _is_address(name) else name for name in names}
    return expiry_unix_s(certificate) <= now or not wanted <= set(names_of(certificate))


def _make_authority(files: CertificateFiles) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Clotline local authority")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_whole(files.directory / "ca.key", _pem(key), 0o600)
    write_whole(files.ca, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _sign_server(files: CertificateFiles, names: Sequence[str], days: int) -> None:
    """Write a directory of its own, then let `current` point to it: certificate and key change in one step."""
    kinds = [x509.IPAddress(ipaddress.ip_address(n)) if _is_address(n) else x509.DNSName(n) for n in names]
    pem, key = _sign(files, names[0][:64], days, ExtendedKeyUsageOID.SERVER_AUTH, kinds)
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    place = files.directory / stamp
    place.mkdir(mode=0o755)
    write_whole(place / "server.key", key, 0o600)
    write_whole(place / "server.pem", pem, 0o644)
    _link(files.directory / "current", stamp)
    for file in (files.certificate, files.key):
        _link(file, f"current/{file.name}")
    earlier = sorted(entry for entry in files.directory.glob("2*Z") if entry.is_dir())
    for entry in earlier[:-_KEPT]:
        shutil.rmtree(entry)


def _sign(
    files: CertificateFiles,
    name: str,
    days: int,
    purpose: x509.ObjectIdentifier,
    names: Sequence[x509.GeneralName],
) -> tuple[bytes, bytes]:
    """Certificate with its authority's behind it, and private key."""
    authority = _load(files.ca)
    try:
        authority_key = serialization.load_pem_private_key((files.directory / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(
            f"{files.directory / 'ca.key'}, the key of the authority, cannot be used: {error}"
        ) from error
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise CertificateError(
            f"{files.directory / 'ca.key'} is not the key of an authority of this program."
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(authority_key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    return certificate.public_bytes(encoding) + authority.public_bytes(encoding), _pem(key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{path} is no certificate that can be read: {error}") from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _link(path: Path, target: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(path)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One writer at a time; errors of the file system as ours."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CertificateError(f"{directory}: certificates cannot be written: {error}") from error
