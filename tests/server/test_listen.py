"""Addresses and certificates."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request

import pytest

from ernie_jax.errors import UserError
from ernie_jax.server.listen import bind, check_certificate
from tests.server.conftest import running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    """A certificate of 127.0.0.1 and its key."""
    directory = tmp_path_factory.mktemp("tls")
    files = str(directory / "chain.pem"), str(directory / "key.pem")
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl to make a certificate")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
    command += ["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", files[0], "-keyout", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_https_with_a_certificate(llm, certificate):
    trusting = ssl.create_default_context(cafile=certificate[0])
    with running(llm, tls=certificate) as server:
        with urllib.request.urlopen(f"{server.url}/version", context=trusting) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{server.url}/version", context=ssl.create_default_context())


def test_ipv6(llm):
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    with running(llm, host="::1") as server, urllib.request.urlopen(f"{server.url}/version") as response:
        assert response.status == 200


def test_bad_certificates_are_told_in_one_sentence(certificate, tmp_path):
    check_certificate(*certificate)
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    with pytest.raises(UserError, match=r"--tls_cert=.*other.pem --tls_key=.*not a PEM certificate and its key"):
        check_certificate(str(other), certificate[1])
    with pytest.raises(UserError, match="not a PEM certificate and its key"):
        check_certificate(certificate[0], certificate[0])
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", certificate[1], "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UserError, match="without a password"):
        check_certificate(certificate[0], str(locked))


def test_a_taken_port_is_told_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host=127.0.0.1 --port={port}: Address already in use"):
            bind("127.0.0.1", port).listen()
    with pytest.raises(UserError, match="--host=no.such.host.invalid"):
        bind("no.such.host.invalid", 0)
