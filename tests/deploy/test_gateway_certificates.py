from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import certificates
from deploy.errors import CertificateError, UsageError


def test_openssl_accepts_the_chain_for_its_names(tmp_path: Path) -> None:
    files = certificates.make(tmp_path, ["gateway.example", "10.1.2.3"])
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    for option, name, good in (
        ("-verify_hostname", "gateway.example", True),
        ("-verify_ip", "10.1.2.3", True),
        ("-verify_hostname", "other.example", False),
    ):
        done = subprocess.run(
            [openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(files.ca), option, name,
             str(files.certificate)], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is good, done.stderr


def test_private_keys_are_for_their_owner(tmp_path: Path) -> None:
    files = certificates.make(tmp_path)
    _, client_key = certificates.make_client(tmp_path, "lab-a")
    for key in (files.key, tmp_path / "ca.key", client_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_make_leaves_what_is_good_and_renews_what_is_not(tmp_path: Path) -> None:
    files = certificates.make(tmp_path, ["a.example"])
    first, authority = files.certificate.read_bytes(), files.ca.read_bytes()
    certificates.make(tmp_path, ["a.example"])
    assert files.certificate.read_bytes() == first
    certificates.make(tmp_path, ["a.example", "b.example"])
    assert certificates.names_of(files.certificate) == ["a.example", "b.example"]
    assert files.ca.read_bytes() == authority


def test_renewal_changes_key_and_certificate_in_one_step(tmp_path: Path) -> None:
    files = certificates.make(tmp_path, ["a.example"])
    before = (files.certificate.read_bytes(), files.key.read_bytes())
    place = (tmp_path / "current").resolve()
    certificates.renew(tmp_path)
    assert certificates.names_of(files.certificate) == ["a.example"]
    assert ((place / "server.pem").read_bytes(), (place / "server.key").read_bytes()) == before
    assert files.key.read_bytes() != before[1]
    for _ in range(4):
        certificates.renew(tmp_path)
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir() and not entry.is_symlink()]) == 3


def test_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"server\.pem"):
        certificates.renew(tmp_path)
    for names in ([], ["a b"], ["-x"], ["a;b"]):
        with pytest.raises(UsageError):
            certificates.make(tmp_path, names)
    certificates.make(tmp_path)
    (tmp_path / "ca.key").write_text("none")
    with pytest.raises(CertificateError, match=r"ca\.key"):
        certificates.renew(tmp_path)


def test_the_command_makes_and_shows(tmp_path: Path) -> None:
    for words in (["make", "--name", "localhost"], ["show"], ["renew"], ["client", "lab"]):
        done = subprocess.run(
            [sys.executable, "-m", "deploy", "certificate", *words, "--state", str(tmp_path)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert 89 < json.loads(done.stdout.splitlines()[-1])["days_left"] < 91
