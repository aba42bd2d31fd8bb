"""The way to a VM's ports: connect_network, the gateway that knows the VM only seconds later, and keys."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, Desk, ending, eventually, living, nothing_left, part, sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

OLD = ("setup-sandbox", "setup-root-access")
FOR_EVER = 10**6


@pytest.fixture(autouse=True)
def _needs_ssh() -> None:
    part("ssh", "openssh-client")
    part("sshd", "openssh-server")


def connects(plato: LocalPlato) -> int:
    return len(plato.requests("POST", "/connect_network"))


def warnings(text: str) -> list[str]:
    return [line[len("Warning: ") :] for line in text.splitlines() if line.startswith("Warning: ")]


def impatient(desk: Desk) -> None:
    """Wait for SSH two seconds only, where it will not answer anyway."""
    desk.tune(SSH_PATIENCE_SECONDS=(2,), SSH_ANSWER_SECONDS=2.0)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", [BLANK[1:], ["-c"], ["-s", "espocrm"]], ids=["blank", "config", "simulator"])
def test_the_network_is_connected_once_before_what_uses_it(
    desk: Desk, plato: LocalPlato, mode: list[str]
) -> None:
    desk.good("start", *mode)
    last_words = [request["path"].rpartition("/")[2] for request in plato.requests()]
    order = [word for word in last_words if word in ("make", "connect_network", "add_ssh_key", *OLD)]
    assert order == ["make", "connect_network", "add_ssh_key"]
    assert last_words.index("wait_for_ready") < last_words.index("connect_network")
    assert plato.requests("POST", "/connect_network")[0]["body"] == ""
    assert [body["username"] for body in sent(plato, "/add_ssh_key")] == ["root"]


@pytest.mark.long
def test_start_ends_when_ssh_answers(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    """In the first seconds the gateway lets connections open and stay silent."""
    desk = new_desk(new_plato(gateway_seconds=1.5).environment)
    started = desk.good(*BLANK)
    assert "SSH" not in "".join(warnings(started.err))
    assert desk.ssh("id -un", "-o", "ConnectTimeout=5").out == "root\n"


@pytest.mark.long
def test_start_says_that_ssh_does_not_answer_yet(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    plato = new_plato(gateway_seconds=100)
    desk = new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "1"})
    impatient(desk)
    (words,) = [words for words in warnings(desk.good("start", "-c").err) if "SSH" in words]
    assert "SSH to the VM does not work: Connection timed out during banner exchange" in words
    assert "through the API" in words
    synced = desk.good("sync", "--json")
    assert synced.document["via"] == "api"
    assert connects(plato) == 2, "the command that found SSH silent connected again, once"
    plato.advance(100)
    desk.tune()  # patient again
    assert desk.good("sync", "--via", "ssh", "--json").document["via"] == "ssh"
    assert connects(plato) == 2


REFUSALS: dict[str, dict[str, Any]] = {
    "500": {"status": 500, "body": {"detail": "WireGuard could not be installed"}},
    "success: false": {
        "status": 200,
        "body": {"success": False, "error": "WireGuard could not be installed", "results": {}},
    },
}


@pytest.mark.long
@pytest.mark.parametrize("unconnected", ["silent", "closed"])
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_network_that_cannot_be_connected_is_a_warning(
    new_plato: Callable[..., LocalPlato],
    new_desk: Callable[..., Desk],
    unconnected: str,
    refusal: dict[str, Any],
) -> None:
    plato = new_plato(unconnected=unconnected)
    desk = new_desk(plato.environment)
    impatient(desk)
    plato.fault("status", path="*/connect_network", times=-1, **refusal)
    started = desk.good("start", "-c")
    (words,) = [words for words in warnings(started.err) if "SSH" in words]
    for part_of_it in ("WireGuard could not be installed", "SSH and tunnels", "`sync` goes through the API"):
        assert part_of_it in words
    assert desk.good("sync", "--json").document["via"] == "api"
    assert desk.run("sync", "--via", "ssh").code in (6, 7)
    plato.clear_faults()
    before = connects(plato)
    assert desk.good("sync", "--via", "ssh", "--json").document["via"] == "ssh"
    assert connects(plato) == before + 1
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.long
def test_where_everything_needs_the_network(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    plato = new_plato(network_for="everything")
    desk = new_desk(plato.environment)
    desk.good("start", "-c")
    assert desk.ssh("id -un").out == "root\n"
    assert desk.good("sync", "--via", "api", "--json").document["via"] == "api"
    desk.good("stop")
    plato.fault("status", path="*/connect_network", status=500, times=-1)
    started = desk.good("start", "-c", "--json")
    assert "VM is not connected to the network" in started.err
    assert started.document["ssh_command"] is None


def test_a_vm_that_is_gone_when_its_key_comes_and_no_network_was_connected(
    desk: Desk, plato: LocalPlato
) -> None:
    """What the missing network excuses is that the key is refused, not that there is no VM any more."""
    plato.fault("status", path="*/connect_network", status=500, times=-1)
    plato.fault("status", path="*/add_ssh_key", status=404, times=-1)
    plato.fault("status", method="GET", path="/api/v2/sessions/{session_id}", status=404, times=-1)
    result = desk.run("start", "-c", "--json")
    assert (result.code, result.error["code"]) == (3, "no_sandbox")
    assert "Nothing is left running" in result.error["message"]
    nothing_left(desk, plato)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_network_is_connected(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk], number: signal.Signals
) -> None:
    plato = new_plato(connect_seconds=600)
    desk = new_desk(plato.environment)
    process = desk.begin("start", "-c", "--json")
    plato.wait_for(lambda seen: any("connect_network" in request["path"] for request in seen["requests"]))
    process.send_signal(number)
    result = ending(process)
    assert result.code == 128 + number
    assert "Nothing is left running" in result.error["message"]
    nothing_left(desk, plato)


def test_a_signal_while_ssh_is_silent(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    plato = new_plato(gateway_seconds=FOR_EVER)
    desk = new_desk(plato.environment)
    process = desk.begin("start", "-c", "--json")
    eventually(lambda: plato.admin("GET", "gateway")["connections"])
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 130
    nothing_left(desk, plato)


def test_a_vm_that_ends_while_its_network_is_connected(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    plato = new_plato(connect_seconds=600)
    desk = new_desk(plato.environment)
    process = desk.begin(*BLANK, "--json")
    plato.wait_for(lambda seen: any("connect_network" in request["path"] for request in seen["requests"]))
    os.kill(plato.machines()[0]["pid"], signal.SIGKILL)
    eventually(lambda: not plato.admin("GET", "status")["alive"])
    plato.advance(600)
    result = ending(process)
    assert result.code == 3
    assert "VM stopped unexpectedly" in result.error["message"]
    nothing_left(desk, plato)


@pytest.mark.long
@pytest.mark.parametrize("status", [200, 500])
def test_a_reset_without_a_worker_is_a_warning(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk], status: int
) -> None:
    plato = new_plato(reset_without_worker=status)
    desk = new_desk(plato.environment)
    (words,) = warnings(desk.good("start", "-c").err)
    assert "worker is not started" in words
    assert len(living(plato)) == 1
    desk.good("stop")
    assert warnings(desk.good("start", "-c", "--no-reset").err) == []


def test_the_provider_is_asked_for_where_ready_does_not_tell(desk: Desk, plato: LocalPlato) -> None:
    body = {"job_id": "x", "provider": "qemu"}
    plato.fault("content_type", path="*/info", body=body, headers={"content-type": "application/json"})
    ready = {"ready": True, "status": "ready", "session_id": "x"}
    plato.fault(
        "content_type", path="*/wait_for_ready", body=ready, headers={"content-type": "application/json"}
    )
    desk.good(*BLANK)
    assert [body["username"] for body in sent(plato, "/add_ssh_key")] == ["plato"]


@pytest.mark.long
@pytest.mark.parametrize("via", ["ssh", "api"])
def test_what_root_brings_belongs_to_plato(visitor: Desk, via: str) -> None:
    """SSH logs in as root; what lies below plato's home belongs to plato all the same."""
    (visitor.work / "deep").mkdir()
    (visitor.work / "deep" / "file").write_text("x")
    visitor.good("start", "-c")
    visitor.good("sync", "--via", via)
    owners = visitor.ssh("cd /home/plato/worktree && find . | sort | xargs stat -c '%U %n'").out
    assert {line.split()[0] for line in owners.splitlines()} == {"plato"}
    assert "plato ./taskboard/deep/file" in owners
    visitor.good("stop")
