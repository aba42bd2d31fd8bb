"""TLS and proxies where it is not only the API: the gateway (ssh, sync, audit-ui) and the heartbeat."""

from __future__ import annotations

import contextlib
import datetime
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from conftest import BLANK, Desk, ending, eventually, heartbeats, missing, part
from localplato import LocalPlato
from test_file import interpreter
from test_services import config_text
from test_transport import (
    CREDENTIALS,
    PROXY_USER,
    Proxy,
    TlsRelay,
    authority,  # noqa: F401  (a fixture)
    bundle,
    distant,  # noqa: F401  (a fixture)
    over_tls,
)

if TYPE_CHECKING:
    from collections.abc import Callable

YEAR = datetime.timedelta(days=365)
GATEWAY = "localhost"


def expired(ours: trustme.CA, name: str) -> trustme.LeafCert:
    now = datetime.datetime.now(datetime.timezone.utc)
    return ours.issue_cert(name, not_before=now - YEAR, not_after=now - YEAR / 2)


# A certificate by what is wrong with it, and OpenSSL's word for that.
BAD: dict[str, tuple[Callable[[trustme.CA, str], trustme.LeafCert], str]] = {
    "wrong host": (lambda ours, _: ours.issue_cert("other.test"), "not valid for"),
    "expired": (expired, "expired"),
    "unknown CA": (lambda _, name: trustme.CA().issue_cert(name), "local issuer"),
    "self-signed": (lambda _, name: self_signed(name), "self"),
}


def self_signed(name: str) -> Any:
    """A certificate that vouches for itself."""

    class Leaf:
        def configure_cert(self, context: ssl.SSLContext) -> None:
            part("openssl", "openssl")
            with trustme.Blob(b"").tempfile() as path:
                key = f"{path}.key"
                command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
                command += ["-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", path]
                subprocess.run(command, check=True, capture_output=True)
                context.load_cert_chain(path, key)
                Path(key).unlink()

    return Leaf()


LONG = [pytest.mark.long]
LATER = ("unknown CA", "self-signed")


class GatewayRelay(TlsRelay):
    """TLS of the tests' own in front of nothing: what gets through the handshake is recorded and ended."""

    def serve(self, client: Any) -> None:
        secured = self.context.wrap_socket(client, server_side=True)
        self.connections.append(secured)
        with contextlib.suppress(OSError):
            while data := secured.recv(65536):
                self.received += data


def gateway_desk(desk: Desk) -> str:
    """A sandbox with a database; the TLS server name of its SSH."""
    (desk.work / "plato-config.yml").write_text(config_text(main={}))
    (desk.work / "docker-compose.yml").write_text("services: {}")
    (desk.work / "seed").mkdir()
    (desk.work / "seed/a.sql").touch()
    desk.good("start", "-c")
    return f"{desk.state['job_id']}--22.{GATEWAY}"


@pytest.mark.long
@pytest.mark.parametrize(("make", "word"), BAD.values(), ids=BAD)
def test_a_gateway_that_cannot_be_trusted(
    desk: Desk,
    plato: LocalPlato,
    authority: trustme.CA,  # noqa: F811
    make: Callable[[trustme.CA, str], trustme.LeafCert],
    word: str,
) -> None:
    """ssh, sync, start-services and audit-ui's tunnel say why, and not a byte of theirs gets through."""
    name = gateway_desk(desk)
    database = name.replace("--22.", "--5432.")
    authorities = str(bundle(desk, plato, authority))
    with GatewayRelay(make(authority, name), 0) as relay, GatewayRelay(make(authority, database), 0) as other:
        for port, words in (
            (relay.port, ["sync", "--via", "ssh"]),
            (relay.port, ["start-services"]),
            (other.port, ["audit-ui", "--no-browser"]),
        ):
            environment = {"PLATO_GATEWAY_PORT": str(port), "SSL_CERT_FILE": authorities}
            failed = desk.run(*words, "--json", environment=environment)
            assert failed.code == 6, failed
            assert "certificate" in failed.error["message"]
            assert "SSL_CERT_FILE" in failed.error["hint"]
        desk.good("status", environment={"PLATO_GATEWAY_PORT": str(relay.port), "SSL_CERT_FILE": authorities})
        result = desk.ssh("true")
        assert result.code == 255
        assert "certificate" in result.err
        assert word in result.err, result.err
        assert (relay.received, other.received) == (b"", b"")
    desk.good("status")
    assert desk.ssh("echo there").out == "there\n"
    assert desk.good("sync", "--json").document["via"] == "ssh"


@pytest.mark.long
def test_a_sync_goes_on_through_the_api(
    desk: Desk,
    plato: LocalPlato,
    authority: trustme.CA,  # noqa: F811
) -> None:
    """A gateway that cannot be trusted does not keep a sync from its work; that it is not used, is said."""
    name = gateway_desk(desk)
    with GatewayRelay(trustme.CA().issue_cert(name), 0) as relay:
        environment = {"PLATO_GATEWAY_PORT": str(relay.port)}
        done = desk.good("sync", "--json", environment=environment)
        assert done.document["via"] == "api"
        assert "certificate" in done.err
        assert relay.received == b""


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "word"),
    [pytest.param(*case, id=name, marks=LONG if name in LATER else ()) for name, case in BAD.items()],
)
def test_a_heartbeat_to_an_api_that_cannot_be_trusted(
    desk: Desk,
    plato: LocalPlato,
    authority: trustme.CA,  # noqa: F811
    make: Callable[[trustme.CA, str], trustme.LeafCert],
    word: str,
) -> None:
    """It goes on trying, records why, never sends the key, and beats again once the certificate is good."""
    target = int(plato.base_url.rpartition(":")[2])
    authorities = bundle(desk, plato, authority)
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(TlsRelay(authority.issue_cert("localhost"), target))
        desk.environment.update(over_tls(relay, authorities))
        desk.good(*BLANK)
        plato.wait_for_request("POST", "/heartbeat", count=1)
        good = relay.context
        relay.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        make(authority, "localhost").configure_cert(relay.context)
        for connection in list(relay.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(2)
        eventually(lambda: word in (desk.heartbeat_record().get("last_error") or ""))
        received = len(relay.received)
        failures = desk.heartbeat_record()["failures"]
        eventually(lambda: desk.heartbeat_record()["failures"] > failures)
        assert len(relay.received) == received
        assert "SSL_CERT_FILE" in desk.run("status").out or word in desk.run("status", "--json").out
        relay.context = good
        eventually(lambda: desk.heartbeat_record()["failures"] == 0)
        desk.good("stop")
    assert heartbeats(desk) == []


def strict_python() -> str:
    """An interpreter whose TLS refuses what RFC 5280 does not allow: 3.13 or newer."""
    for version in ("3.14", "3.13"):
        found = interpreter(version)
        if found is not None:
            return found
    missing("there is no Python 3.13 or newer here")
    raise AssertionError


def loose_authority(place: Path) -> tuple[Path, Path]:
    """A CA whose basic constraints are not critical, as those of company proxies often are, and a leaf."""
    part("openssl", "openssl")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -subj /CN=Loose -keyout ca.key -out ca.pem -config ca.cnf",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout leaf.key -out leaf.csr",
        "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -set_serial 7 -extfile leaf.ext -out leaf.pem",
    ):
        (place / "ca.cnf").write_text(
            "[req]\ndistinguished_name=n\nx509_extensions=x\nprompt=no\n[n]\nCN=Loose\n"
            "[x]\nbasicConstraints=CA:TRUE\nkeyUsage=keyCertSign\nsubjectKeyIdentifier=hash\n"
        )
        (place / "leaf.ext").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
        subprocess.run(["openssl", *command.split()], cwd=place, check=True, capture_output=True)
    return place / "ca.pem", place / "leaf.pem"


class Loose:
    """What `TlsRelay` wants of a certificate."""

    def __init__(self, leaf: Path) -> None:
        self.leaf = leaf

    def configure_cert(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.leaf, self.leaf.with_name("leaf.key"))


@pytest.mark.long
def test_a_ca_that_only_newer_pythons_refuse(desk: Desk, plato: LocalPlato, tmp_path: Path) -> None:
    """The error names the cause and what to do, instead of sending people to look for a missing CA."""
    python = strict_python()
    ca, leaf = loose_authority(tmp_path)
    certificate: Any = Loose(leaf)
    with TlsRelay(certificate, int(plato.base_url.rpartition(":")[2])) as relay:
        desk.environment.update(
            PLATO_BASE_URL=f"https://localhost:{relay.port}",
            SSL_CERT_FILE=str(ca),
        )
        failed = desk.run(command=[python, str(desk.product), *BLANK, "--json"])
        assert failed.code == 6, failed
        assert "localhost" in failed.error["message"]
        assert "Basic Constraints" in failed.error["message"]
        hint = failed.error["hint"]
        assert "Python 3.13" in hint
        assert "CA" in hint
        assert relay.received == b""
    assert plato.requests() == []
    assert desk.leftovers() == []


@pytest.mark.long
@pytest.mark.parametrize("user", ["", f"{PROXY_USER}@"], ids=["open", "with a password"])
def test_sync_and_the_tunnel_go_through_the_proxy(
    distant: tuple[Desk, LocalPlato, dict[str, int]],  # noqa: F811
    user: str,
) -> None:
    """The gateway is reached through the proxy by everything, and only by its name."""
    desk, _, ways = distant
    (desk.work / "source").mkdir()
    (desk.work / "source" / "a").write_text("1")
    with Proxy(ways, CREDENTIALS if user else None) as proxy:
        desk.environment["HTTPS_PROXY"] = f"http://{user}127.0.0.1:{proxy.port}"
        desk.good(*BLANK)
        before = proxy.requests.count("CONNECT gateway.plato.test:443")
        done = desk.good("sync", "source", "--via", "ssh", "--json", "--verbose")
        assert proxy.requests.count("CONNECT gateway.plato.test:443") > before
        (desk.work / "plato-config.yml").write_text(config_text(main={}))
        process = desk.begin("audit-ui", "--no-browser", "--verbose")
        assert process.stdout is not None
        assert "http://127.0.0.1" in process.stdout.readline()
        process.terminate()
        page = ending(process)
        assert proxy.requests.count("CONNECT gateway.plato.test:443") > before + 1
        desk.good("stop")
        for result in (done, page):
            assert "hunter2" not in result.out + result.err
    assert set(proxy.requests) == {
        "CONNECT plato.test:443",
        "CONNECT gateway.plato.test:443",
    }


def test_a_heartbeat_through_a_proxy_that_changes_its_mind(
    distant: tuple[Desk, LocalPlato, dict[str, int]],  # noqa: F811
) -> None:
    desk, _, ways = distant
    with Proxy(ways) as proxy:
        desk.environment["HTTPS_PROXY"] = f"http://{PROXY_USER}@127.0.0.1:{proxy.port}"
        desk.good(*BLANK)
        proxy.refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"
        for connection in list(proxy.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(2)
        eventually(lambda: "407" in (desk.heartbeat_record().get("last_error") or ""))
        proxy.refusal = b""
        eventually(lambda: desk.heartbeat_record()["failures"] == 0)
        for path in desk.plato_home.iterdir():
            assert b"hunter2" not in path.read_bytes(), path
        desk.good("stop")


@pytest.mark.long
@pytest.mark.parametrize("excluded", ["gateway.plato.test", ".plato.test", "plato.test:443"])
def test_no_proxy_for_the_gateway(
    distant: tuple[Desk, LocalPlato, dict[str, int]],  # noqa: F811
    excluded: str,
) -> None:
    """Hosts that NO_PROXY names are looked for without the proxy, by ssh and sync as by the API."""
    desk, _, ways = distant
    with Proxy(ways) as proxy:
        desk.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{proxy.port}"
        desk.good(*BLANK)
        proxy.requests.clear()
        environment = {"NO_PROXY": excluded}
        failed = desk.run("sync", "--via", "ssh", "--json", environment=environment)
        assert failed.code == 6, failed
        assert "gateway.plato.test" in failed.error["message"]
        assert not any("gateway" in request for request in proxy.requests)
        desk.environment["NO_PROXY"] = excluded
        assert desk.ssh("true").code == 255
        assert not any("gateway" in request for request in proxy.requests)
        del desk.environment["NO_PROXY"]
        assert desk.ssh("echo there").out == "there\n"
        desk.good("stop")


def test_an_added_ca_is_enough_for_the_gateway(desk: Desk) -> None:
    """SSL_CERT_FILE under a relative name, for commands that run elsewhere too."""
    authorities = Path(desk.environment["SSL_CERT_FILE"])
    (desk.work / "ca.pem").write_bytes(authorities.read_bytes())
    desk.environment["SSL_CERT_FILE"] = "ca.pem"
    gateway_desk(desk)
    del desk.environment["SSL_CERT_FILE"]
    assert desk.good("sync", "--via", "ssh", "--json").document["via"] == "ssh"
