"""The certificates of the TLS gateway: a CA of the data directory, and one for each server name.

They are made by the `openssl` command. The CA may vouch only for the gateway's host and the names below it,
or below 127.0.0.1, which is the gateway's host where names are not found.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
from pathlib import Path

CA_DAYS, LEAF_DAYS = 3650, 800
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
SHARED_FILES = ("ca.pem", "ca.key", "leaf.key", "leaf.csr")
CA_CONFIG = """\
[req]
distinguished_name = name
x509_extensions = ca
prompt = no
[name]
CN = Local Plato CA
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
nameConstraints = critical, permitted;DNS:{host}, permitted;DNS:127.0.0.1
"""
LEAF_EXTENSIONS = """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:{name}
"""


class CertificateError(Exception):
    """Certificates cannot be made; the message says why and what to install."""


def openssl(*arguments: str) -> None:
    """Run the openssl command. Raises CertificateError."""
    program = shutil.which("openssl")
    if program is None:
        raise CertificateError(
            "the openssl command is missing, so the gateway (SSH and TCP into VMs) is off: "
            "install the package openssl"
        )
    done = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise CertificateError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-300:]}")


def system_bundle() -> str:
    """The certificates that the host trusts, or an empty text."""
    for path in (ssl.get_default_verify_paths().cafile, *SYSTEM_BUNDLES):
        if path and os.path.isfile(path):
            return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


class Certificates:
    """The CA in a directory, and the TLS contexts of the names that it has signed."""

    def __init__(self, directory: Path, host: str) -> None:
        self.directory = directory
        self.host = host
        self.bundle_path = directory / "bundle.pem"
        self.lock = threading.Lock()
        self.contexts: dict[str, ssl.SSLContext] = {}

    def prepare(self, shared: Path | None = None) -> None:
        """Make the CA, the leaf key and the clients' bundle unless they exist, or take them from `shared`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        if not (self.directory / "leaf.csr").exists():
            if shared is not None and (shared / "leaf.csr").exists():
                for name in SHARED_FILES:
                    shutil.copy(shared / name, self.directory / name)
            else:
                self.make_authority()
        if not self.bundle_path.exists():
            own = (self.directory / "ca.pem").read_text()
            self.bundle_path.write_text(system_bundle().rstrip("\n") + "\n" + own)

    def make_authority(self) -> None:
        """A CA and the key that all leaf certificates share, both ECDSA P-256."""
        config = self.directory / "ca.cnf"
        config.write_text(CA_CONFIG.format(host=self.host))
        for name in ("ca.key", "leaf.key"):
            os.close(os.open(self.directory / name, os.O_CREAT | os.O_WRONLY, 0o600))
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", str(config))
        openssl(
            "req", "-x509", *key, "-days", str(CA_DAYS), "-sha256",
            "-keyout", str(self.directory / "ca.key"), "-out", str(self.directory / "ca.pem"),
        )  # fmt: skip
        partial = self.directory / "leaf.csr.new"
        openssl("req", "-new", *key, "-subj", "/CN=Local Plato gateway",
                "-keyout", str(self.directory / "leaf.key"), "-out", str(partial))  # fmt: skip
        partial.rename(self.directory / "leaf.csr")

    def context(self, name: str) -> ssl.SSLContext:
        """The server's TLS context for a name, signed when first asked for. Raises CertificateError."""
        with self.lock:
            if name not in self.contexts:
                self.contexts[name] = self.sign(name)
            return self.contexts[name]

    def sign(self, name: str) -> ssl.SSLContext:
        extensions = self.directory / f"{name}.ext"
        certificate = self.directory / f"{name}.pem"
        extensions.write_text(LEAF_EXTENSIONS.format(name=name))
        try:
            authority = ("-CA", str(self.directory / "ca.pem"), "-CAkey", str(self.directory / "ca.key"))
            openssl(
                "x509", "-req", "-in", str(self.directory / "leaf.csr"), *authority,
                "-set_serial", "0x" + os.urandom(15).hex(), "-days", str(LEAF_DAYS), "-sha256",
                "-extfile", str(extensions), "-out", str(certificate),
            )  # fmt: skip
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, self.directory / "leaf.key")
        finally:
            for path in (extensions, certificate):
                if path.exists():
                    path.unlink()
        return context
