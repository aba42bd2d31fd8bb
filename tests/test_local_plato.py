"""The local Plato itself, from outside: HTTP, TLS, SSH, processes, and the command `local_plato.py`."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme
from conftest import eventually, is_running, part
from localplato import LocalPlato
from localplato.machine import remove_tree
from localplato.relay import BUFFER_LIMIT, PlainStream, TlsStream, relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = Path(__file__).resolve().parent / "local_plato.py"
SESSIONS = "/api/v2/sessions"
VM = "/api/v1/sandbox/public-build/vm"
BLANK = {"type": "resource", "simulator": "shop", "sim_config": {}}
NOBODY = "00000000-0000-4000-8000-000000000000"
SERVER_LIMIT = 20.0

# A server on port 7000 of a VM: says how much came and its SHA-256, once the client has ended its direction.
DIGEST_SERVER = """
import hashlib, socket, threading
def serve(connection):
    with connection:
        digest, length = hashlib.sha256(), 0
        while True:
            data = connection.recv(65536)
            if not data:
                break
            digest.update(data)
            length += len(data)
        connection.sendall(b"%d %s" % (length, digest.hexdigest().encode()))
listener = socket.create_server(("127.0.0.1", 7000), backlog=300)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""
# A server on port 7001: sends that many bytes, ends its direction, and writes what comes into a file.
SOURCE_SERVER = """
import hashlib, socket
listener = socket.create_server(("127.0.0.1", 7001))
connection = listener.accept()[0]
connection.sendall(bytes(range(256)) * (%d // 256))
connection.shutdown(socket.SHUT_WR)
received = b""
while True:
    data = connection.recv(65536)
    if not data:
        break
    received += data
open("/tmp/received", "wb").write(received)
"""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def value(self) -> Any:
        return json.loads(self.text)


class Client:
    """A bare HTTP client of one local Plato: what it sends is what a test says."""

    def __init__(self, plato: LocalPlato) -> None:
        self.plato = plato

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on its own connection, with the right key unless the headers say otherwise."""
        connection = http.client.HTTPConnection("127.0.0.1", self.plato.information["port"], timeout=60)
        sent = {"X-API-Key": self.plato.api_key, "Content-Type": "application/json", **(headers or {})}
        try:
            connection.request(method, path, body, {name: text for name, text in sent.items() if text})
            with connection.getresponse() as response:
                text = response.read().decode()
                return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, text)
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """A JSON request and its JSON answer, which must have that status."""
        reply = self.send(method, path, None if body is None else json.dumps(body).encode())
        assert reply.status == status, reply
        return reply.value

    def make(self, *environments: dict[str, Any], wait: bool = True, **fields: Any) -> dict[str, Any]:
        query = "?wait=true" if wait else ""
        body = {"envs": list(environments) or [BLANK], **fields}
        answer: dict[str, Any] = self.call("POST", f"{SESSIONS}/make{query}", body)
        return answer

    def start(self, *environments: dict[str, Any], **fields: Any) -> tuple[str, str]:
        """A ready session: its id and the id of its first job."""
        answer = self.make(*environments, **fields)
        assert answer["ready"], answer
        return answer["session_id"], answer["envs"][0]["job_id"]

    def connect(self, *environments: dict[str, Any], **fields: Any) -> tuple[str, str]:
        """A ready session whose VM the gateway reaches: its id and the id of its job."""
        session_id, job_id = self.start(*environments, **fields)
        assert self.call("POST", f"{SESSIONS}/{session_id}/connect_network")["success"]
        return session_id, job_id

    def details(self, session_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.call("GET", f"{SESSIONS}/{session_id}")["jobs"][0]
        return job

    def execute(self, session_id: str, command: str, **fields: Any) -> dict[str, Any]:
        """The result of a command on the session's one VM."""
        answer = self.call("POST", f"{SESSIONS}/{session_id}/execute", {"command": command, **fields})
        (result,) = answer["results"].values()
        return dict(result)

    def output(self, session_id: str, command: str) -> str:
        result = self.execute(session_id, command)
        assert result["success"], result
        return str(result["stdout"])

    def serve_in_vm(self, session_id: str, program: str, port: int) -> None:
        """Run a Python server in the VM and wait until it listens."""
        if self.execute(session_id, "command -v python3")["exit_code"] != 0:
            pytest.skip("a VM of this host has no python3")
        script = (
            f"cat > /tmp/server.py <<'END'\n{program}\nEND\nsetsid python3 /tmp/server.py >/dev/null 2>&1 &"
        )
        self.output(session_id, script)
        listens = f'grep -qi ":{port:04X} 0*:0000 0A" /proc/net/tcp'
        self.output(session_id, f"for i in $(seq 200); do {listens} && exit; sleep 0.05; done; exit 1")


@pytest.fixture
def client(plato: LocalPlato) -> Client:
    return Client(plato)


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------

DATASET: dict[str, Any] = {"compute": {}, "metadata": {}}
WORKER = f"{VM}/{NOBODY}/start-worker"
BAD_REQUESTS: list[tuple[str, str, Any, set[tuple[str, str]]]] = [
    ("POST", f"{SESSIONS}/make", {}, {("body.envs", "missing")}),
    ("POST", f"{SESSIONS}/make", [], {("body", "model_attributes_type")}),
    ("POST", f"{SESSIONS}/make", {"envs": {}}, {("body.envs", "list_type")}),
    ("POST", f"{SESSIONS}/make", {"envs": [{}]}, {("body.envs.0", "union_tag_not_found")}),
    ("POST", f"{SESSIONS}/make", {"envs": [{"type": "vm"}]}, {("body.envs.0", "union_tag_invalid")}),
    ("POST", f"{SESSIONS}/make", {"envs": [7]}, {("body.envs.0", "model_attributes_type")}),
    (
        "POST",
        f"{SESSIONS}/make",
        {"envs": [{"type": "simulator"}, {"type": "artifact", "artifact_id": 5}]},
        {
            ("body.envs.0.simulator.simulator", "missing"),
            ("body.envs.1.artifact.artifact_id", "string_type"),
        },
    ),
    (
        "POST",
        f"{SESSIONS}/make",
        {"envs": [{**BLANK, "sim_config": {"cpus": 9, "memory": 511, "disk": "big", "app_port": 65536}}]},
        {
            ("body.envs.0.resource.sim_config.cpus", "less_than_equal"),
            ("body.envs.0.resource.sim_config.memory", "greater_than_equal"),
            ("body.envs.0.resource.sim_config.disk", "int_parsing"),
            ("body.envs.0.resource.sim_config.app_port", "less_than_equal"),
        },
    ),
    (
        "POST",
        f"{SESSIONS}/make",
        {"envs": [{**BLANK, "provider": "xen"}], "timeout": 1.5, "heartbeat_timeout": -1, "source": "ME"},
        {
            ("body.envs.0.resource.provider", "enum"),
            ("body.timeout", "int_from_float"),
            ("body.heartbeat_timeout", "greater_than_equal"),
            ("body.source", "enum"),
        },
    ),
    ("POST", f"{SESSIONS}/make?wait=perhaps", {"envs": [BLANK]}, {("query.wait", "bool_parsing")}),
    ("GET", f"{SESSIONS}/{NOBODY}/wait_for_ready?timeout=soon", None, {("query.timeout", "int_parsing")}),
    ("POST", f"{SESSIONS}/{NOBODY}/execute", None, {("body", "missing")}),
    ("POST", f"{SESSIONS}/{NOBODY}/execute", {"command": ["ls"]}, {("body.command", "string_type")}),
    (
        "POST",
        f"{SESSIONS}/{NOBODY}/execute",
        {"timeout": []},
        {("body.command", "missing"), ("body.timeout", "int_type")},
    ),
    ("POST", f"{SESSIONS}/{NOBODY}/add_ssh_key", {"username": "root"}, {("body.public_key", "missing")}),
    ("POST", WORKER, {"dataset": "base"}, {("body.plato_dataset_config", "missing")}),
    (
        "POST",
        WORKER,
        {"dataset": "base", "plato_dataset_config": {"services": {}}, "request_timeout": 59},
        {
            ("body.plato_dataset_config.compute", "missing"),
            ("body.plato_dataset_config.metadata", "missing"),
            ("body.request_timeout", "greater_than_equal"),
        },
    ),
    (
        "POST",
        WORKER,
        {
            "dataset": "base",
            "plato_dataset_config": {
                **DATASET,
                "services": {"main": {"type": "helm", "healthy_wait_timeout": 5}},
                "listeners": {
                    "db": {"type": "db", "db_type": "oracle"},
                    "files": {"type": "file"},
                    "mail": {"type": "imap"},
                },
            },
        },
        {
            ("body.plato_dataset_config.services.main.type", "literal_error"),
            ("body.plato_dataset_config.services.main.healthy_wait_timeout", "greater_than_equal"),
            ("body.plato_dataset_config.listeners.db.db.db_type", "enum"),
            ("body.plato_dataset_config.listeners.db.db.db_database", "missing"),
            ("body.plato_dataset_config.listeners.files.file.target_dir", "missing"),
            ("body.plato_dataset_config.listeners.mail", "union_tag_invalid"),
        },
    ),
]


@pytest.fixture(scope="module")
def shared_client(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server that the tests of this file share, because they change nothing in it."""
    with LocalPlato(tmp_path_factory.mktemp("shared"), ca_from=certificates) as plato:
        yield Client(plato)


@pytest.mark.sampled
@pytest.mark.parametrize(("method", "path", "body", "problems"), BAD_REQUESTS)
def test_wrong_requests_are_refused_with_every_problem(
    shared_client: Client, method: str, path: str, body: Any, problems: set[tuple[str, str]]
) -> None:
    detail = shared_client.call(method, path, body, status=422)["detail"]
    assert {(".".join(map(str, item["loc"])), item["type"]) for item in detail} == problems
    assert all(item["msg"] and "input" in item for item in detail)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", SESSIONS, {"X-API-Key": ""}, 401),
        ("GET", SESSIONS, {"X-API-Key": "wrong"}, 401),
        ("GET", SESSIONS, {}, 200),
        ("GET", "/api/v2/nothing", {}, 404),
        ("GET", "/", {"X-API-Key": ""}, 404),
        ("DELETE", SESSIONS, {}, 405),
        ("GET", f"{SESSIONS}/{NOBODY}", {}, 404),
        ("POST", f"{SESSIONS}/{NOBODY}/heartbeat", {}, 404),
        ("POST", f"{SESSIONS}/{NOBODY}/close", {}, 404),
        ("GET", f"/api/v2/jobs/{NOBODY}/info", {}, 404),
        ("POST", f"{SESSIONS}/{NOBODY}/connect_network", {}, 404),
        ("POST", f"{VM}/{NOBODY}/setup-sandbox", {}, 404),
        ("POST", f"{VM}/{NOBODY}/setup-root-access", {}, 404),
    ],
)
def test_authentication_and_routes(
    shared_client: Client, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    reply = shared_client.send(method, path, headers=headers)
    assert reply.status == status
    assert status == 200 or isinstance(reply.value["detail"], str)


def test_bodies_that_are_no_json_are_refused(shared_client: Client) -> None:
    path = f"{SESSIONS}/{NOBODY}/execute"
    (problem,) = shared_client.send("POST", path, b'{"command": ').value["detail"]
    assert problem["type"] == "json_invalid"
    form = shared_client.send(
        "POST", path, b"command=ls", {"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert form.status == 422
    assert form.value["detail"][0]["type"] == "model_attributes_type"
    huge = shared_client.send("POST", path, b"{}", {"Content-Length": str(1 << 40)})
    assert huge.status == 413


def test_chunked_bodies_and_kept_connections(shared_client: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared_client.plato.information["port"], timeout=30)
    headers = {"X-API-Key": shared_client.plato.api_key}
    for _ in range(3):
        body = iter([b'{"comm', b'and": "true"}'])
        connection.request("POST", f"{SESSIONS}/{NOBODY}/execute", body, headers, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (404, {"detail": "Session not found"})
    connection.close()


def test_unknown_fields_are_reported_and_accepted(plato: LocalPlato, client: Client) -> None:
    body = json.dumps({"envs": [{**BLANK, "colour": "red"}], "timeout": "600", "zone": 1}).encode()
    reply = client.send("POST", f"{SESSIONS}/make?fast=1", body)
    assert reply.status == 200
    fields = reply.headers["x-local-plato-unknown-fields"].split(", ")
    assert {"body.envs.0.resource.colour", "body.zone", "query.fast"} <= set(fields)
    assert any(field.startswith("body.timeout (str") for field in fields)
    (report,) = plato.unknown_fields()
    assert sorted(report["fields"]) == sorted(fields)
    assert plato.sessions()[0]["lifetime"] == 600


def test_the_key_is_never_recorded(plato: LocalPlato, client: Client) -> None:
    client.send("POST", f"{SESSIONS}/make?key={plato.api_key}", plato.api_key.encode())
    client.send("GET", SESSIONS, headers={"Authorization": f"Bearer {plato.api_key}", "X-API-Key": "wrong"})
    recorded = plato.requests()
    assert [entry["key"] for entry in recorded] == ["right", "wrong"]
    assert plato.api_key not in json.dumps(recorded)
    assert plato.api_key not in (plato.home / "server.log").read_text()
    assert (plato.home / "key").stat().st_mode & 0o777 == 0o600
    assert plato.home.stat().st_mode & 0o777 == 0o700


# ---------------------------------------------------------------------------
# lives of sessions
# ---------------------------------------------------------------------------


def test_a_session_from_make_to_close(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(boot_seconds=1000)
    client = Client(plato)
    answer = client.make(wait=False)
    session_id, job_id = answer["session_id"], answer["envs"][0]["job_id"]
    path = f"{SESSIONS}/{session_id}"
    pending = client.call("GET", f"{path}/wait_for_ready?timeout=0")
    assert (pending["ready"], pending["status"]) == (False, "pending")
    assert pending["results"][job_id]["status"] in ("created", "queued")
    early = client.execute(session_id, "true")
    assert not early["success"]
    assert "not running" in early["stderr"]

    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(client.call, "GET", f"{path}/wait_for_ready?timeout=30")
        entries = plato.wait_for_request("GET", "wait_for_ready", count=2)
        assert not poll.done()
        assert [entry["settled"] is None for entry in entries] == [False, True]
        plato.advance(1000)
        ready = poll.result(SERVER_LIMIT)
    (entry,) = plato.requests("GET", "wait_for_ready", since=entries[0]["number"])
    assert entry["time"] <= entry["settled"]
    assert (ready["ready"], ready["status"], ready["results"][job_id]["status"]) == (True, "ready", "running")

    (machine,) = plato.machines()
    assert machine["alive"]
    assert is_running(machine["pid"])
    assert client.call("POST", f"{path}/close")["success"]
    assert not is_running(machine["pid"])
    assert not Path(machine["directory"]).exists()
    job = client.details(session_id)
    assert (job["status"], job["job_id"], job["public_id"]) == ("completed", job_id, job_id)
    assert client.call("POST", f"{path}/close")["success"]
    for method, name, body in (
        ("POST", "heartbeat", None),
        ("POST", "execute", {"command": "true"}),
        ("POST", "add_ssh_key", {"public_key": "x"}),
        ("GET", "wait_for_ready", None),
    ):
        client.call(method, f"{path}/{name}", body, status=410)


@pytest.mark.long
def test_environments_of_all_kinds_in_one_session(client: Client) -> None:
    answer = client.make(
        {"type": "simulator", "simulator": "espocrm", "tag": "prod-latest"},
        {"type": "artifact", "artifact_id": "art_abc123"},
        {"type": "simulator", "simulator": "espocrm:staging", "dataset": "base"},
        {**BLANK, "sim_config": {"cpus": 4, "memory": 4096}},
        {"type": "simulator", "simulator": "espocrm", "alias": "espocrm"},
    )
    environments = answer["envs"]
    assert answer["ready"]
    assert len({entry["alias"] for entry in environments}) == 5
    assert len({entry["artifact_id"] for entry in environments}) == 5
    assert environments[3]["effective_sim_config"] == {"cpus": 4, "memory": 4096, "disk": 10240}
    command = {
        "command": "cat /home/plato/worktree/*/VERSION; echo hello > /home/plato/x; ls /home/plato | wc -l"
    }
    results = client.call("POST", f"{SESSIONS}/{answer['session_id']}/execute", command)["results"]
    outputs = [results[entry["job_id"]]["stdout"].split() for entry in environments]
    assert outputs == [["1.1.0", "2"], ["0.9.0", "2"], ["1.3.0-rc1", "2"], ["1"], ["1.2.0", "2"]]
    jobs = client.call("GET", f"{SESSIONS}/{answer['session_id']}/jobs")["jobs"]
    assert [job["simulator"] for job in jobs] == ["espocrm", "espocrm", "espocrm", "shop", "espocrm"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"type": "simulator", "simulator": "nowhere"}, "Simulator 'nowhere' not found"),
        ({"type": "simulator", "simulator": "espocrm", "tag": "beta"}, "tag 'beta'"),
        ({"type": "simulator", "simulator": "espocrm", "dataset": "huge"}, "dataset 'huge'"),
        ({"type": "simulator", "simulator": "espocrm", "version": "9"}, "version '9'"),
        ({"type": "artifact", "artifact_id": NOBODY}, "not found"),
        ({"type": "artifact", "artifact_id": "../artifacts"}, "not found"),
    ],
)
def test_what_does_not_exist_fails_inside_the_answer(
    shared_client: Client, environment: dict[str, Any], words: str
) -> None:
    answer = shared_client.make(environment, wait=False)
    (entry,) = answer["envs"]
    assert (entry["success"], entry["job_id"]) == (False, None)
    assert words in entry["error"]


@pytest.mark.long
def test_a_vm_that_fails_to_boot_and_one_that_never_gets_ready(plato: LocalPlato, client: Client) -> None:
    plato.fault("boot_failure", reason="no capacity in this region")
    failed = client.make()
    job_id = failed["envs"][0]["job_id"]
    assert failed["ready"] is False
    state = client.call("GET", f"{SESSIONS}/{failed['session_id']}/wait_for_ready")
    assert (state["ready"], state["status"]) == (False, "failed")
    assert state["results"][job_id]["status"] == "failed"
    assert state["results"][job_id]["error"] == "no capacity in this region"

    plato.fault("never_ready")
    stuck = client.make(wait=False)["session_id"]
    state = client.call("GET", f"{SESSIONS}/{stuck}/wait_for_ready?timeout=1")
    assert (state["ready"], state["status"]) == (False, "pending")
    assert client.make()["ready"]


def test_a_network_is_for_ready_vms_and_says_what_it_is_not(client: Client, plato: LocalPlato) -> None:
    session_id, job_id = client.start()
    answer = client.call("POST", f"{SESSIONS}/{session_id}/connect_network")
    assert (answer["success"], answer["results"]) == (True, {job_id: True})
    assert ipaddress.ip_network(answer["subnet"]).is_private
    assert client.call("POST", f"{SESSIONS}/{session_id}/connect_network") == answer
    two = client.make(BLANK, {**BLANK, "alias": "second"})["session_id"]
    problem = client.call("POST", f"{SESSIONS}/{two}/connect_network", status=501)
    assert "no network between VMs" in problem["detail"]
    plato.fault("never_ready")
    stuck = client.make(wait=False)["session_id"]
    client.call("POST", f"{SESSIONS}/{stuck}/connect_network", status=409)
    client.call("POST", f"{SESSIONS}/{session_id}/close")
    client.call("POST", f"{SESSIONS}/{session_id}/connect_network", status=410)


def test_not_ready_can_be_a_408(new_plato: Callable[..., LocalPlato]) -> None:
    client = Client(new_plato(boot_seconds=1000, not_ready_status=408))
    session_id = client.make(wait=False)["session_id"]
    client.call("GET", f"{SESSIONS}/{session_id}/wait_for_ready?timeout=0", status=408)


def test_vms_die_without_heartbeats(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.start()
    pid = plato.machines()[0]["pid"]
    for _ in range(3):
        plato.advance(119)
        beat = client.call("POST", f"{SESSIONS}/{session_id}/heartbeat")
        assert beat["success"]
        assert not beat["results"][job_id]["gone"]
        assert all("vm_heartbeat_message" in error for error in beat["results"][job_id]["errors"])
    plato.advance(121)
    assert not is_running(pid)
    job = client.details(session_id)
    assert (job["status"], job["status_reason"]) == ("failed", "VM shutdown due to heartbeat miss")
    beat = client.call("POST", f"{SESSIONS}/{session_id}/heartbeat")
    assert not beat["success"]
    assert beat["results"][job_id]["gone"]
    assert beat["results"][job_id]["errors"]
    client.call("POST", f"{SESSIONS}/{session_id}/execute", {"command": "true"}, status=410)
    assert client.call("POST", f"{SESSIONS}/{session_id}/close")["success"]
    assert client.details(session_id)["status"] == "failed"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("fields", "seconds", "status"),
    [
        ({"heartbeat_timeout": 0}, 1799, "running"),
        ({"heartbeat_timeout": 0}, 1800, "timeout"),
        ({"heartbeat_timeout": 10}, 11, "failed"),
        ({"timeout": 60, "heartbeat_timeout": 0}, 61, "timeout"),
        ({"timeout": None}, 100, "running"),
    ],
)
def test_lifetimes(
    new_plato: Callable[..., LocalPlato], fields: dict[str, Any], seconds: float, status: str
) -> None:
    # The clock must not go on by itself here: it is moved to just before and just after a limit.
    plato = new_plato(speed=0.001)
    client = Client(plato)
    session_id, _ = client.start(**fields)
    plato.advance(seconds)
    assert client.details(session_id)["status"] == status


@pytest.mark.long
def test_speed_multiplies_time(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(speed=1000, boot_seconds=300, heartbeat_seconds=1000)
    session_id, _ = Client(plato).start()
    plato.wait_for(lambda snapshot: snapshot["sessions"][0]["jobs"][0]["status"] == "failed")
    assert Client(plato).details(session_id)["status_reason"] == "VM shutdown due to heartbeat miss"


def test_a_vm_that_is_killed_from_outside_is_a_failed_job(plato: LocalPlato, client: Client) -> None:
    session_id, _ = client.start()
    os.kill(plato.machines()[0]["pid"], signal.SIGKILL)
    plato.wait_for(lambda snapshot: snapshot["sessions"][0]["jobs"][0]["status"] == "failed")
    assert "unexpectedly" in client.details(session_id)["status_reason"]


@pytest.mark.long
def test_lists_logs_and_info(client: Client) -> None:
    sessions = [client.start()[0] for _ in range(3)]
    client.call("POST", f"{SESSIONS}/{sessions[0]}/close")
    listed = client.call("GET", f"{SESSIONS}?page_size=2")
    assert [entry["session_id"] for entry in listed["sessions"]] == [sessions[2], sessions[1]]
    assert listed["total"] == 3
    done = client.call("GET", f"{SESSIONS}?statuses=completed")["sessions"]
    assert [entry["session_id"] for entry in done] == [sessions[0]]
    job_id = client.details(sessions[1])["job_id"]
    logs = client.call("GET", f"{SESSIONS}/{sessions[1]}/jobs/{job_id}/logs")["logs"]
    assert [entry["message"] for entry in logs] == ["queued", "running"]
    info = client.call("GET", f"/api/v2/jobs/{job_id}/info")
    assert (info["session_id"], info["status"], info["mem_size_mib"]) == (sessions[1], "running", 2048)
    client.call("GET", f"{SESSIONS}/{sessions[2]}/jobs/{job_id}/logs", status=404)


# ---------------------------------------------------------------------------
# inside a VM
# ---------------------------------------------------------------------------


def test_execute_is_a_fresh_root_shell(client: Client) -> None:
    session_id, job_id = client.start()
    words = client.output(
        session_id, "id -u; whoami; pwd; echo $HOME $USER $PLATO_API_KEY; hostname; cat | wc -c"
    )
    assert words.splitlines() == ["0", "root", "/root", "/root root", f"vm-{job_id[:8]}", "0"]
    result = client.execute(session_id, "echo out; echo err >&2; cd /tmp; exit 7")
    assert (result["success"], result["exit_code"]) == (False, 7)
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
    assert client.execute(session_id, "kill -9 $$")["exit_code"] == 137
    assert client.execute(session_id, "printf 'a\\377b'")["stdout"] == "a\ufffdb"
    assert client.execute(session_id, "no-such-command")["exit_code"] == 127
    assert client.output(session_id, "pwd") == "/root\n"


@pytest.mark.long
def test_execute_ends_the_whole_group_at_its_timeout(plato: LocalPlato, client: Client) -> None:
    session_id, _ = client.start()
    result = client.execute(session_id, "echo begun; sleep 1000 & sleep 1000", timeout=1)
    assert (result["success"], result["timed_out"], result["stdout"]) == (False, True, "begun\n")
    eventually(lambda: plato.machines()[0]["processes"] == [])  # the last ones are about to be reaped
    # As over SSH, an output that stays open keeps the command going; with redirection it is over at once.
    assert client.execute(session_id, "sleep 1000 &", timeout=1)["timed_out"]
    assert client.execute(session_id, "sleep 1000 >/dev/null 2>&1 &", timeout=20)["success"]
    (process,) = plato.machines()[0]["processes"]
    assert process["argv"] == ["sleep", "1000"]


def test_a_command_has_the_length_of_one_argument(client: Client) -> None:
    session_id, _ = client.start()
    assert client.output(session_id, "echo " + "x" * (131_071 - 5)) == "x" * (131_071 - 5) + "\n"
    result = client.execute(session_id, "echo " + "x" * (131_071 - 4))
    assert not result["success"]
    assert "too long" in result["stderr"]


@pytest.mark.long
def test_a_vm_has_its_own_world_and_cannot_harm_the_host(
    plato: LocalPlato, client: Client, tmp_path: Path
) -> None:
    first, second = client.start()[0], client.start()[0]
    witness = tmp_path / "witness"
    witness.write_text("safe")
    client.output(first, "echo one > /home/plato/file; echo one > /tmp/file; echo one > /root/file")
    assert client.execute(second, "ls /home/plato/file /tmp/file /root/file")["exit_code"] != 0
    assert client.execute(first, f"echo gone > {witness}")["exit_code"] != 0
    assert client.execute(first, "touch /etc/passwd.new")["exit_code"] != 0
    assert client.execute(first, "touch /usr/local/new")["exit_code"] != 0
    assert witness.read_text() == "safe"
    assert client.output(first, "hostname") != client.output(second, "hostname")
    assert (
        client.output(first, "cat /proc/1/cmdline | tr '\\0' ' '")
        .rstrip()
        .split("/")[-1]
        .startswith("init.py")
    )
    # Every process of the VM but its first can be killed from inside, and nothing outside.
    client.execute(first, "kill -9 -1", timeout=5)
    assert client.output(first, "echo alive") == "alive\n"
    assert is_running(plato.information["pid"])


@pytest.mark.long
def test_a_hundred_commands_at_once(client: Client) -> None:
    session_id, _ = client.start()
    with ThreadPoolExecutor(20) as pool:
        outputs = list(pool.map(lambda number: client.output(session_id, f"echo {number}"), range(100)))
    assert outputs == [f"{number}\n" for number in range(100)]


# ---------------------------------------------------------------------------
# SSH
# ---------------------------------------------------------------------------


class SshUser:
    """OpenSSH with a config made by hand, whose ProxyCommand is `openssl s_client`."""

    def __init__(self, plato: LocalPlato, job_id: str, directory: Path) -> None:
        self.ssh = part("ssh", "openssh-client")
        part("sshd", "openssh-server")
        self.key = directory / "key"
        keygen = [part("ssh-keygen", "openssh-client"), "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)]
        subprocess.run(keygen, check=True)
        name = f"{job_id}--22.localhost"
        proxy = (
            f"{part('openssl', 'openssl')} s_client -quiet -verify_return_error -verify_hostname {name} "
            f"-CAfile {plato.environment['SSL_CERT_FILE']} -servername {name} "
            f"-connect localhost:{plato.gateway_port} 2>/dev/null"
        )
        self.config = directory / "config"
        self.config.write_text(
            f"Host vm\n HostName {name}\n IdentityFile {self.key}\n IdentitiesOnly yes\n BatchMode yes\n"
            f" UserKnownHostsFile {directory}/known_hosts\n StrictHostKeyChecking accept-new\n"
            f" LogLevel ERROR\n ProxyCommand {proxy}\n"
        )

    @property
    def public_key(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()

    def run(self, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [self.ssh, "-F", str(self.config), *words]
        return subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)


@pytest.mark.long
def test_ssh_for_both_users(plato: LocalPlato, client: Client, ssh_place: Path) -> None:
    session_id, job_id = client.connect()
    user = SshUser(plato, job_id, ssh_place)
    assert user.run("root@vm", "true").returncode == 255
    for fields in ({}, {"username": "plato"}):
        body = {"public_key": user.public_key, **fields}
        assert client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", body)["success"]
    for name, home in (("root", "/root"), ("plato", "/home/plato")):
        done = user.run(f"{name}@vm", "whoami; pwd; touch made; ls -A; exit 9")
        assert (done.returncode, done.stdout.decode().split()) == (9, [name, home, ".ssh", "made"]), done
    data = os.urandom(3_000_000)
    assert user.run("plato@vm", "cat", data=data).stdout == data
    assert (
        client.output(session_id, "stat -c %a /home/plato/.ssh /home/plato/.ssh/authorized_keys")
        == "700\n600\n"
    )
    again = client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", {"public_key": user.public_key})
    assert again["success"]
    assert client.output(session_id, "wc -l < /root/.ssh/authorized_keys") == "1\n"
    client.call("POST", f"{SESSIONS}/{session_id}/close")
    assert user.run("root@vm", "true").returncode == 255


@pytest.mark.long
def test_ssh_carries_terminals_files_and_ports(plato: LocalPlato, client: Client, ssh_place: Path) -> None:
    session_id, job_id = client.connect()
    user = SshUser(plato, job_id, ssh_place)
    client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", {"public_key": user.public_key})
    assert user.run("-tt", "root@vm", "tty").stdout.startswith(b"/dev/pts/")
    batch = ssh_place / "batch"
    batch.write_text(f"put {user.config} /home/plato/copy\n")
    sftp = [part("sftp", "openssh-client"), "-F", str(user.config), "-b", str(batch), "root@vm"]
    subprocess.run(sftp, check=True, capture_output=True, timeout=60)
    assert client.output(session_id, "cat /home/plato/copy") == user.config.read_text()
    client.serve_in_vm(session_id, DIGEST_SERVER, 7000)
    forwarded = user.run("-W", "127.0.0.1:7000", "root@vm", data=b"hello").stdout.decode()
    assert forwarded == f"5 {hashlib.sha256(b'hello').hexdigest()}"


def test_keys_that_are_none_are_refused(client: Client) -> None:
    session_id, job_id = client.start()
    for key in ("", "ssh-ed25519", "ssh-ed25519 AAAA!", "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIA=="):
        answer = client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", {"public_key": key})
        assert not answer["success"]
        assert answer["results"][job_id]["error"]


@pytest.mark.long
def test_what_old_clients_call(new_plato: Callable[..., LocalPlato], ssh_place: Path) -> None:
    plato = new_plato(old_clients=True)
    client = Client(plato)
    _, job_id = client.connect()
    user = SshUser(plato, job_id, ssh_place)
    setup = {"dataset": "full", "plato_dataset_config": {**DATASET, "compute": {"app_port": 3210}}}
    key = {"ssh_public_key": user.public_key}
    assert client.call("POST", f"{VM}/{job_id}/setup-sandbox", {**setup, **key})["correlation_id"]
    assert client.call("POST", f"{VM}/{job_id}/setup-root-access", key)["status"] == "success"
    for name in ("root", "plato"):
        assert user.run(f"{name}@vm", "whoami").stdout.decode() == f"{name}\n"
    (job,) = plato.sessions()[0]["jobs"]
    assert job["app_port"] == 3210
    for wrong in ("", "ssh-ed25519 AAAA!"):
        client.call("POST", f"{VM}/{job_id}/setup-root-access", {"ssh_public_key": wrong}, status=400)


# ---------------------------------------------------------------------------
# the gateway
# ---------------------------------------------------------------------------


@functools.cache
def strict_context(bundle: str, check_hostname: bool) -> ssl.SSLContext:
    """What a client trusts; reading a bundle takes a while."""
    context = ssl.create_default_context(cafile=bundle)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.check_hostname = check_hostname
    return context


class Tunnel:
    """A verified TLS connection through the gateway that can end one direction and go on with the other."""

    def __init__(self, plato: LocalPlato, name: str | None, verify: bool = True) -> None:
        context = strict_context(plato.environment["SSL_CERT_FILE"], verify)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)
        self.socket = socket.create_connection(("127.0.0.1", plato.gateway_port), timeout=30)
        try:
            self.pump(self.tls.do_handshake)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Tunnel:  # noqa: PYI034 - Self is not in Python 3.9
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def pump(self, operation: Callable[[], Any]) -> Any:
        """Do one TLS operation, with the network's help."""
        while True:
            try:
                result = operation()
                self.flush()
                return result
            except ssl.SSLWantReadError:
                self.flush()
                data = self.socket.recv(1 << 16)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            except ssl.SSLError:
                self.flush()
                raise

    def flush(self) -> None:
        data = self.outgoing.read()
        if data:
            self.socket.sendall(data)

    def send(self, data: bytes) -> None:
        for position in range(0, len(data), 1 << 20):
            self.tls.write(data[position : position + (1 << 20)])
            self.flush()

    def end(self) -> None:
        """Say in TLS that nothing more is sent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.flush()

    def is_silent(self) -> bool:
        """Whether nothing comes within a moment, not even an end."""
        self.socket.settimeout(0.2)
        try:
            self.receive_all()
        except socket.timeout:
            return True
        return False

    def receive_all(self) -> bytes:
        parts: list[bytes] = []
        while True:
            try:
                data = self.pump(lambda: self.tls.read(1 << 16))
            except ssl.SSLZeroReturnError:
                data = b""
            if not data:
                return b"".join(parts)
            parts.append(data)


@pytest.mark.long
def test_the_gateway_carries_bytes_and_ends_of_both_directions(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.connect()
    client.serve_in_vm(session_id, DIGEST_SERVER, 7000)
    data = os.urandom(1 << 20) * 20
    expected = f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode()
    with Tunnel(plato, f"{job_id}--7000.localhost") as tunnel:
        tunnel.send(data)
        tunnel.end()
        assert tunnel.receive_all() == expected
    # A client that only ends its TCP direction is understood too.
    with Tunnel(plato, f"{job_id}--7000.localhost") as tunnel:
        tunnel.send(b"short")
        tunnel.socket.shutdown(socket.SHUT_WR)
        assert tunnel.receive_all().startswith(b"5 ")


def test_the_gateway_does_not_wait_for_what_it_has_read_already() -> None:
    """A socket that takes nothing, then all at once, must not make the relay forget what TLS still holds."""

    class Stalled(PlainStream):
        stalls = 1

        def flush(self) -> None:
            self.stalls -= 1
            if self.stalls < 0:
                super().flush()

    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("vm.localhost").configure_cert(server)
    authority.configure_trust(client)
    near, left = socket.socketpair()
    right, far = socket.socketpair()
    for end in (near, left, right, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        end.settimeout(30)
    data = os.urandom(BUFFER_LIMIT + 32768)
    stream = TlsStream(left, server)
    greeting = threading.Thread(target=stream.handshake)
    greeting.start()
    with client.wrap_socket(near, server_hostname="vm.localhost") as tunnel, far:
        greeting.join()
        tunnel.sendall(data)
        carrying = threading.Thread(target=relay, args=(stream, Stalled(right, far=True)), daemon=True)
        carrying.start()
        received = b""
        while len(received) < len(data):
            received += far.recv(1 << 16)
    assert received == data
    carrying.join()


@pytest.mark.long
def test_the_gateway_carries_on_after_the_vm_has_ended_its_direction(
    plato: LocalPlato, client: Client
) -> None:
    session_id, job_id = client.connect()
    length = 10 << 20
    client.serve_in_vm(session_id, SOURCE_SERVER % length, 7001)
    with Tunnel(plato, f"{job_id}--7001.localhost") as tunnel:
        assert tunnel.receive_all() == bytes(range(256)) * (length // 256)
        tunnel.send(b"still here")
        tunnel.end()
        wait = "for i in $(seq 200); do test -s /tmp/received && break; sleep 0.05; done; cat /tmp/received"
        assert client.output(session_id, wait) == "still here"


@pytest.mark.long
def test_two_hundred_connections_at_once(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.connect()
    client.serve_in_vm(session_id, DIGEST_SERVER, 7000)
    name = f"{job_id}--7000.localhost"
    with ThreadPoolExecutor(20) as pool:
        tunnels = list(pool.map(lambda _: Tunnel(plato, name), range(200)))
    assert plato.gateway()["open"] == 200
    for number, tunnel in enumerate(tunnels):
        tunnel.send(b"x" * number)
        tunnel.end()
    for number, tunnel in enumerate(tunnels):
        with tunnel:
            assert tunnel.receive_all().startswith(b"%d " % number)
    eventually(lambda: plato.gateway()["open"] == 0)


@pytest.mark.long
def test_names_that_lead_nowhere_are_refused(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.connect()
    for name in (
        f"{NOBODY}--22.localhost",
        f"{job_id}.localhost",
        f"{job_id}--0.localhost",
        "localhost",
        None,
    ):
        with pytest.raises((ssl.SSLError, OSError)):
            Tunnel(plato, name, verify=name is not None)
    with Tunnel(plato, f"{job_id}--7999.localhost") as tunnel, pytest.raises((ssl.SSLError, OSError)):
        assert tunnel.receive_all() != b"", "nothing listens there"
    client.call("POST", f"{SESSIONS}/{session_id}/close")
    with pytest.raises((ssl.SSLError, OSError)):
        Tunnel(plato, f"{job_id}--22.localhost")
    entries = plato.gateway()["connections"]
    assert all(entry["error"] for entry in entries)
    other = client.connect()[1]
    context = ssl.create_default_context()
    plain = socket.create_connection(("127.0.0.1", plato.gateway_port), timeout=30)
    with plain, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(plain, server_hostname=f"{other}--22.localhost")


@pytest.mark.long
def test_an_open_connection_ends_with_its_vm(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.connect()
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.pump(lambda: tunnel.tls.read(8)).startswith(b"SSH-2.0-")
        client.call("POST", f"{SESSIONS}/{session_id}/close")
        try:
            while tunnel.pump(lambda: tunnel.tls.read(1 << 16)):
                pass
        except (ssl.SSLError, OSError):
            pass
    eventually(lambda: plato.gateway()["open"] == 0)


@pytest.mark.long
def test_gateway_faults(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.connect()
    client.serve_in_vm(session_id, SOURCE_SERVER % (1 << 20), 7001)
    plato.fault("gateway_down")
    with pytest.raises((ssl.SSLError, OSError)):
        Tunnel(plato, f"{job_id}--7001.localhost")
    plato.fault("gateway_reset", after_bytes=100_000)
    with Tunnel(plato, f"{job_id}--7001.localhost") as tunnel, pytest.raises((ssl.SSLError, OSError)):
        tunnel.receive_all()
    assert [entry["error"] for entry in plato.gateway()["connections"]][:1] == ["the gateway is down (fault)"]


@pytest.mark.long
def test_the_gateway_reaches_no_port_before_the_network(
    new_plato: Callable[..., LocalPlato], ssh_place: Path
) -> None:
    """Then the VM is unknown for a while, and what was opened meanwhile does not come alive."""
    plato = new_plato(gateway_seconds=1000)
    client = Client(plato)
    session_id, job_id = client.start(heartbeat_timeout=0, timeout=86_400)
    path = f"{SESSIONS}/{session_id}"
    user = SshUser(plato, job_id, ssh_place)
    assert client.call("POST", f"{path}/add_ssh_key", {"public_key": user.public_key})["success"]
    client.serve_in_vm(session_id, DIGEST_SERVER, 7000)
    with contextlib.ExitStack() as stack:
        tunnels = [stack.enter_context(Tunnel(plato, f"{job_id}--{port}.localhost")) for port in (22, 7000)]
        eventually(lambda: len([entry for entry in plato.gateway()["connections"] if entry["error"]]) == 2)
        client.call("POST", f"{path}/connect_network")
        tunnels += [stack.enter_context(Tunnel(plato, f"{job_id}--{port}.localhost")) for port in (22, 7000)]
        timed_out = user.run("-o", "ConnectTimeout=1", "root@vm", "true")
        assert timed_out.returncode == 255
        assert b"banner exchange" in timed_out.stderr
        client.call("POST", f"{path}/connect_network")  # which does not begin the time anew
        plato.advance(1001)
        assert user.run("root@vm", "whoami").stdout == b"root\n"
        with Tunnel(plato, f"{job_id}--7000.localhost") as tunnel:
            tunnel.send(b"known")
            tunnel.end()
            assert tunnel.receive_all().startswith(b"5 ")
        for silent in tunnels:
            silent.send(b"anybody there?")
            assert silent.is_silent()
        errors = [entry["error"] for entry in plato.gateway()["connections"]]
        assert (
            errors[:4]
            == ["the VM was never connected to the network"] * 2
            + ["the gateway does not know the VM yet"] * 2
        )
    eventually(lambda: plato.gateway()["open"] == 0)


@pytest.mark.long
def test_a_silent_connection_ends_with_its_vm(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.start()
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        client.call("POST", f"{SESSIONS}/{session_id}/close")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert tunnel.receive_all() == b""
    eventually(lambda: plato.gateway()["open"] == 0)


@pytest.mark.long
def test_a_vm_that_was_never_connected_can_be_a_closed_door(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(unconnected="closed", gateway_seconds=1000)
    client = Client(plato)
    session_id, job_id = client.start()
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel, pytest.raises((ssl.SSLError, OSError)):
        assert tunnel.receive_all() != b""
    client.call("POST", f"{SESSIONS}/{session_id}/connect_network")
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.is_silent()


@pytest.mark.long
def test_every_vm_needs_its_own_network(plato: LocalPlato, client: Client) -> None:
    session_id, _ = client.connect()
    (made,) = client.call("POST", f"{SESSIONS}/{session_id}/snapshot", {})["results"].values()
    artifact = {"type": "artifact", "artifact_id": made["artifact_id"]}
    eventually(lambda: client.make(artifact)["envs"][0]["success"])
    again, job_id = client.start(artifact)
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.is_silent()
    client.call("POST", f"{SESSIONS}/{again}/connect_network")
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.pump(lambda: tunnel.tls.read(8)).startswith(b"SSH-2.0-")


@pytest.mark.long
@pytest.mark.parametrize("ending", ["in time", "closed"])
def test_a_network_that_takes_its_time(new_plato: Callable[..., LocalPlato], ending: str) -> None:
    plato = new_plato(connect_seconds=1000)
    client = Client(plato)
    session_id, job_id = client.start(heartbeat_timeout=0, timeout=86_400)
    path = f"{SESSIONS}/{session_id}/connect_network"
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(client.send, "POST", path)
        plato.wait_for_request("POST", "connect_network")
        assert not connecting.done()
        with Tunnel(plato, f"{job_id}--22.localhost"):
            eventually(lambda: "never connected" in str([e["error"] for e in plato.gateway()["connections"]]))
        if ending == "closed":
            client.call("POST", f"{SESSIONS}/{session_id}/close")
            assert connecting.result(SERVER_LIMIT).status == 410
            return
        plato.advance(1001)
        assert connecting.result(SERVER_LIMIT).value["success"] is True
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.pump(lambda: tunnel.tls.read(8)).startswith(b"SSH-2.0-")
    assert client.call("POST", path)["success"], "at once, as it is connected"


@pytest.mark.long
def test_a_network_that_fails(plato: LocalPlato, client: Client) -> None:
    session_id, job_id = client.start()
    body = {"detail": "WireGuard could not be installed"}
    plato.fault("status", path="*/connect_network", status=500, body=body)
    path = f"{SESSIONS}/{session_id}/connect_network"
    assert client.call("POST", path, status=500) == body
    with Tunnel(plato, f"{job_id}--22.localhost") as tunnel:
        assert tunnel.is_silent()
    assert client.call("POST", path)["success"]


def test_commands_and_keys_can_need_the_network_too(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(network_for="everything")
    client = Client(plato)
    session_id, job_id = client.start()
    refused = client.execute(session_id, "true")
    assert (refused["success"], "network" in refused["stderr"]) == (False, True)
    key = {"public_key": "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519").decode()}
    added = client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", key)
    assert (added["success"], "network" in added["results"][job_id]["error"]) == (False, True)
    client.call("POST", f"{SESSIONS}/{session_id}/connect_network")
    assert client.output(session_id, "echo yes") == "yes\n"
    assert client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", key)["success"]


@pytest.mark.sampled
@pytest.mark.parametrize("status", [200, 500])
def test_a_reset_without_a_worker(new_plato: Callable[..., LocalPlato], status: int) -> None:
    client = Client(new_plato(reset_without_worker=status))
    session_id, job_id = client.start()
    answer = client.call("POST", f"{SESSIONS}/{session_id}/reset", {}, status=status)
    if status == 500:
        assert "The worker is not started" in answer["detail"]
    else:
        assert answer["success"] is False
        assert answer["results"] == {job_id: {"success": False, "message": "The worker is not started"}}


# ---------------------------------------------------------------------------
# public addresses
# ---------------------------------------------------------------------------


def fetch(url: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.long
def test_public_addresses_lead_to_the_application(client: Client) -> None:
    session_id, job_id = client.start({**BLANK, "sim_config": {"app_port": 3210}})
    path = f"{SESSIONS}/{session_id}/public_url"
    url = client.call("GET", path)["results"][job_id]["url"]
    assert url == client.call("GET", path)["results"][job_id]["url"]
    status, page = fetch(url)
    assert (status, "port 3210" in page) == (502, True)
    handler = "http.server.SimpleHTTPRequestHandler"
    server = f"import http.server, os\nos.chdir('/tmp')\nhttp.server.test({handler}, port=3210)"
    client.output(session_id, "echo 'from the VM' > /tmp/page")
    client.serve_in_vm(session_id, server, 3210)
    assert fetch(f"{url}/page?_plato_router_target=shop.web.plato.so") == (200, "from the VM\n")
    other = client.call("GET", f"{path}?port=4321")["results"][job_id]["url"]
    assert other != url
    assert fetch(other)[0] == 502
    client.call("GET", f"{path}?port=70000", status=400)
    client.call("POST", f"{SESSIONS}/{session_id}/close")
    with pytest.raises(urllib.error.URLError):
        fetch(url)


# ---------------------------------------------------------------------------
# faults
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_faults_of_answers(plato: LocalPlato, client: Client) -> None:
    plato.fault(
        "status", path=SESSIONS, status=429, headers={"Retry-After": "7"}, body={"detail": "slow down"}
    )
    reply = client.send("GET", SESSIONS)
    assert (reply.status, reply.headers["retry-after"], reply.value) == (429, "7", {"detail": "slow down"})
    assert client.send("GET", SESSIONS).status == 200
    plato.fault("html", method="GET", status=502)
    reply = client.send("GET", SESSIONS)
    assert (reply.status, reply.headers["content-type"]) == (502, "text/html; charset=utf-8")
    plato.fault("content_type", body="not json")
    reply = client.send("GET", SESSIONS)
    assert (reply.status, reply.headers["content-type"], reply.text) == (
        200,
        "text/plain; charset=utf-8",
        "not json",
    )
    plato.fault("truncate", bytes=5)
    with pytest.raises(http.client.IncompleteRead) as cut:
        client.send("GET", SESSIONS)
    assert len(cut.value.partial) == 5
    plato.fault("redirect", url="http://127.0.0.1:1/elsewhere")
    reply = client.send("GET", SESSIONS)
    assert (reply.status, reply.headers["location"]) == (307, "http://127.0.0.1:1/elsewhere")
    plato.fault("drip", seconds=0.2)
    assert client.send("GET", SESSIONS).value["total"] == 0
    plato.fault("latency", seconds=0.2)
    assert client.send("GET", SESSIONS).status == 200


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("effect", "acted", "body_read"),
    [("reset_before_body", False, False), ("reset_before_acting", False, True), ("lost_answer", True, True)],
)
def test_faults_of_connections(
    plato: LocalPlato, client: Client, effect: str, acted: bool, body_read: bool
) -> None:
    plato.fault(effect, method="POST", path="*/make")
    with pytest.raises(ConnectionError):
        client.make(wait=False)
    (entry,) = plato.wait_for_request("POST", "/make")
    assert entry["fault"] == effect
    assert (entry["body"] is not None) == body_read
    assert bool(plato.sessions()) == acted


@pytest.mark.long
def test_a_hanging_answer_ends_with_the_client(plato: LocalPlato) -> None:
    plato.fault("hang", times=-1)
    connection = http.client.HTTPConnection("127.0.0.1", plato.information["port"], timeout=0.3)
    connection.request("GET", SESSIONS)
    with pytest.raises(TimeoutError if sys.version_info >= (3, 10) else OSError):
        connection.getresponse()
    connection.close()
    plato.clear_faults()
    assert Client(plato).send("GET", SESSIONS).status == 200


def test_which_requests_a_fault_meets(plato: LocalPlato, client: Client) -> None:
    plato.fault("status", method="GET", path=f"{SESSIONS}*", status=503, nth=2, times=2)
    client.call("POST", f"{SESSIONS}/{NOBODY}/close", status=404)
    assert [client.send("GET", SESSIONS).status for _ in range(5)] == [200, 503, 503, 200, 200]
    plato.fault("status", status=500, times=-1)
    assert [client.send("GET", SESSIONS).status for _ in range(3)] == [500, 500, 500]
    plato.clear_faults()
    assert client.send("GET", SESSIONS).status == 200
    for wrong in ({"effect": "magic"}, {"effect": "status", "colour": 1}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            plato.admin("POST", "faults", wrong)
        refused.value.close()


# ---------------------------------------------------------------------------
# the server's own life
# ---------------------------------------------------------------------------


def command(home: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(COMMAND), "--home", str(home), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose server, if there is one, ends with the test."""
    directory = tmp_path / "a home"
    yield directory
    command(directory, "down")


@pytest.mark.long
def test_ten_at_once_start_one_server(home: Path) -> None:
    with ThreadPoolExecutor(10) as pool:
        done = list(pool.map(lambda _: command(home, "up", "--json"), range(10)))
    assert [process.returncode for process in done] == [0] * 10, done
    values = [json.loads(process.stdout) for process in done]
    assert len({value["pid"] for value in values}) == 1
    assert sorted(value["started"] for value in values) == [False] * 9 + [True]


@pytest.mark.long
def test_the_commands(home: Path, tmp_path: Path) -> None:
    stopped = command(home, "status", "--json")
    assert (stopped.returncode, json.loads(stopped.stdout)["running"]) == (3, False)
    exports = command(home, "env")
    shell = f'{exports.stdout}\nprintf \'%s\\n\' "$PLATO_API_KEY" "$SSL_CERT_FILE"'
    key, bundle = subprocess.run(
        ["sh", "-c", shell], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert Path(bundle).is_file()
    assert "a home" in bundle
    environment = json.loads(command(home, "env", "--json").stdout)
    assert environment["PLATO_API_KEY"] == key
    assert set(environment) == {
        "PLATO_BASE_URL",
        "PLATO_API_KEY",
        "PLATO_GATEWAY_HOST",
        "PLATO_GATEWAY_PORT",
        "SSL_CERT_FILE",
    }
    shown = command(home, "exec", "--", "sh", "-c", 'echo "$PLATO_BASE_URL"; pwd; exit 5', cwd=tmp_path)
    assert shown.stdout.splitlines() == [environment["PLATO_BASE_URL"], str(tmp_path)]
    assert shown.returncode == 5
    assert command(home, "exec", "--", "no-such-program").returncode == 1
    # Options after `run` and `exec` are the other program's, also the first and also one that is ours too.
    assert command(home, "exec", sys.executable, "--version").stdout.startswith("Python ")
    product = command(home, "run", "--help").stdout
    assert product.startswith("usage: ")
    assert "local_plato.py" not in product.splitlines()[0]
    assert command(home, "run", "--version").returncode == 0
    assert command(home, "exec", "--help").stdout.startswith("usage: local_plato.py exec")
    running = command(home, "status", "--json")
    assert (running.returncode, json.loads(running.stdout)["running"]) == (0, True)
    pid = json.loads(running.stdout)["pid"]
    assert command(home, "down", "--purge").returncode == 0
    assert not is_running(pid)
    assert not home.exists()


@pytest.mark.long
def test_ports_and_key_outlive_the_server(home: Path) -> None:
    first = json.loads(command(home, "env", "--json").stdout)
    command(home, "down")
    assert json.loads(command(home, "env", "--json").stdout) == first


def processes_of(plato: LocalPlato) -> list[int]:
    """Ids, on this host, of the processes of the server's VMs and of the server."""
    pids = [plato.information["pid"]]
    for machine in plato.machines():
        pids.append(machine["pid"])
        namespace = os.readlink(f"/proc/{machine['pid']}/ns/pid")
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    pids.append(int(name))
            except OSError:
                continue
    return pids


@pytest.mark.sampled
@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_nothing_is_left_when_the_server_ends(plato: LocalPlato, client: Client, ending: str) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    for _ in range(2):
        session_id, _ = client.start()
        client.output(session_id, "setsid sleep 1000 >/dev/null 2>&1 & sleep 1001 >/dev/null 2>&1 &")
    pids = processes_of(plato)
    assert len(pids) >= 7
    getattr(plato, ending)()
    eventually(lambda: not any(is_running(pid) for pid in pids))
    assert Path("/proc/self/mounts").read_text() == mounts
    if ending == "stop":
        assert not list((plato.home / "vms").glob("*"))


@pytest.mark.long
def test_a_killed_server_can_be_started_again(plato: LocalPlato, client: Client) -> None:
    session_id, _ = client.start()
    plato.kill()
    plato.start()
    assert not list((plato.home / "vms").glob("*"))
    client.call("GET", f"{SESSIONS}/{session_id}", status=404)
    assert client.start()


@pytest.mark.long
def test_a_second_server_on_the_same_directory_is_refused(plato: LocalPlato) -> None:
    second = command(plato.home, "serve")
    assert second.returncode == 1
    assert "runs already" in second.stderr
    assert len(second.stderr.splitlines()) == 1


@pytest.mark.long
def test_an_idle_server_stops_but_not_under_a_living_vm(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(idle_minutes=0.005)
    client = Client(plato)
    session_id, _ = client.start()
    begun = time.monotonic()
    eventually(lambda: time.monotonic() - begun > 1)
    assert plato.process is not None
    assert plato.process.poll() is None
    client.call("POST", f"{SESSIONS}/{session_id}/close")
    assert plato.process.wait(SERVER_LIMIT) == 0


def test_waiting_for_a_request(plato: LocalPlato, client: Client) -> None:
    timer = threading.Timer(0.05, client.send, ("GET", SESSIONS))
    timer.start()
    (entry,) = plato.wait_for_request("GET", SESSIONS)
    assert entry["path"] == SESSIONS
    timer.join()
    with pytest.raises(TimeoutError):
        plato.wait_for(lambda snapshot: False, timeout=0.05)


def test_web_pages_cannot_use_the_admin_interface(shared_client: Client) -> None:
    reply = shared_client.send("POST", "/_local/shutdown", b"{}", {"Origin": "http://evil.example"})
    assert reply.status == 400
    assert shared_client.send("GET", SESSIONS).status == 200


# ---------------------------------------------------------------------------
# hosts that allow less
# ---------------------------------------------------------------------------


def test_a_vm_without_namespaces_reaches_nothing(
    new_plato: Callable[..., LocalPlato], ssh_place: Path
) -> None:
    plato = new_plato(isolation="none")
    assert "no commands" in plato.information["warnings"][0]
    client = Client(plato)
    session_id, job_id = client.connect({"type": "simulator", "simulator": "espocrm"})
    path = f"{SESSIONS}/{session_id}"
    reason = "the VM runs no processes"
    made = ssh_place / "made"
    result = client.execute(session_id, f"touch {made}")
    assert (result["success"], result["exit_code"], reason in result["stderr"]) == (False, -1, True)
    user = SshUser(plato, job_id, ssh_place)
    for name in ("root", "plato"):
        body = {"public_key": user.public_key, "username": name}
        (added,) = client.call("POST", f"{path}/add_ssh_key", body)["results"].values()
        assert (added["success"], reason in added["error"]) == (False, True)
        assert user.run(f"{name}@vm", f"touch {made}").returncode == 255
    with socket.create_server(("127.0.0.1", 0)) as listener:  # of the host
        port = listener.getsockname()[1]
        url = client.call("GET", f"{path}/public_url?port={port}")["results"][job_id]["url"]
        assert fetch(url)[0] == 502
        with Tunnel(plato, f"{job_id}--{port}.localhost") as tunnel, pytest.raises((ssl.SSLError, OSError)):
            assert tunnel.receive_all() != b""
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert [entry["error"] for entry in plato.gateway()["connections"] if reason not in entry["error"]] == []
    assert client.call("POST", f"{path}/heartbeat", {})["success"]
    (machine,) = plato.machines()
    assert (machine["pid"], machine["processes"]) == (None, [])
    assert Path(machine["directory"], "home/plato/worktree/espocrm").is_dir()
    assert client.call("POST", f"{path}/close")["success"]
    assert not Path(machine["directory"]).exists()
    assert not made.exists()


@pytest.fixture
def ordinary_user() -> Iterator[tuple[list[str], Path]]:
    """A command prefix that makes a process an ordinary user's, and a directory of that user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else; the other tests are an ordinary user's already")
    uid = 64_123
    prefix = [part("setpriv", "util-linux"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    trial = [*prefix, "/usr/bin/python3", str(COMMAND), "--help"]
    namespaces = [*prefix, "unshare", "--user", "--map-root-user", "true"]
    for words in (trial, namespaces):
        if not Path(words[len(prefix)]).exists() and words is trial:
            pytest.skip("there is no /usr/bin/python3")
        if subprocess.run(words, capture_output=True, check=False, cwd="/").returncode != 0:
            pytest.skip("an ordinary user cannot read these files or have namespaces here")
    directory = Path(tempfile.mkdtemp(prefix="plato"))
    os.chown(directory, uid, uid)
    yield [*prefix, "env", f"HOME={directory}"], directory
    remove_tree(directory)


@pytest.mark.long
def test_an_ordinary_user_has_the_same(ordinary_user: tuple[list[str], Path], ssh_place: Path) -> None:
    prefix, directory = ordinary_user
    line = [*prefix, "/usr/bin/python3", str(COMMAND), "--home", str(directory / "home")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*line, *words], capture_output=True, text=True, timeout=60, check=True, cwd="/"
        )

    plato = LocalPlato(directory / "home")
    plato.information = json.loads(
        run("up", "--boot-seconds", "0", "--gateway-seconds", "0", "--json").stdout
    )
    try:
        assert plato.information["warnings"] == []
        client = Client(plato)
        session_id, job_id = client.connect({"type": "simulator", "simulator": "espocrm"})
        assert client.output(session_id, "id -u; pwd; ls /home/plato") == "0\n/root\nworktree\n"
        user = SshUser(plato, job_id, ssh_place)
        for name in ("root", "plato"):
            body = {"public_key": user.public_key, "username": name}
            assert client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", body)["success"]
            assert user.run(f"{name}@vm", "whoami; touch made").stdout.decode() == f"{name}\n"
        assert user.run("-tt", "plato@vm", "tty").stdout.startswith(b"/dev/pts/")
        pids = processes_of(plato)
    finally:
        run("down", "--purge")
    assert not any(is_running(pid) for pid in pids)
    assert not (directory / "home").exists()


@pytest.mark.long
def test_a_user_that_the_host_gets_later_does_not_matter(tmp_path: Path, ssh_place: Path) -> None:
    """`useradd` puts new account files in the place of the old ones, which takes mounts over them away."""
    if os.geteuid() != 0:
        pytest.skip("only root can give the server an /etc to change")
    etc = tmp_path / "etc"
    subprocess.run(["cp", "-a", "/etc", str(etc)], check=True)
    words = [
        part("unshare", "util-linux"),
        "--mount",
        "sh",
        "-c",
        f'mount --bind {etc} /etc && exec "$@"',
        "sh",
    ]
    line = [*words, sys.executable, str(COMMAND), "--home", str(tmp_path / "home")]
    plato = LocalPlato(tmp_path / "home")
    up = subprocess.run(
        [*line, "up", "--boot-seconds", "0", "--gateway-seconds", "0", "--json"],
        capture_output=True,
        check=True,
    )
    plato.information = json.loads(up.stdout)
    try:
        client = Client(plato)
        session_id, job_id = client.start()
        client.call("POST", f"{SESSIONS}/{session_id}/connect_network")
        user = SshUser(plato, job_id, ssh_place)
        for name in ("root", "plato"):
            body = {"public_key": user.public_key, "username": name}
            assert client.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", body)["success"]
        for name, entry in (("passwd", "x:999:999::/home/plato:/bin/sh"), ("shadow", "!:19000:0:99999:7:::")):
            new = etc / f"{name}.new"
            new.write_text((etc / name).read_text() + f"plato:{entry}\n")
            new.rename(etc / name)
        for name in ("root", "plato"):
            assert user.run(f"{name}@vm", "whoami").stdout.decode() == f"{name}\n"
        client.output(session_id, "echo 127.0.0.1 mine >> /etc/hosts")
        assert "mine" not in (etc / "hosts").read_text()
    finally:
        subprocess.run([*line, "down", "--purge"], check=True)
