"""The way to Plato: every kind of failure on it, TLS, proxies; and the functions that decide about them."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from conftest import BLANK, Desk, Result, altered, eventually, living
from localplato import LocalPlato

import plato_sandbox
from plato_sandbox import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Retries come at once, unless the server asks for a longer wait.
QUICK = """
product.RETRY_SECONDS = (0.0, 0.01, 0.01)
"""
# And every request has half a second for its whole answer.
SHORT = (
    QUICK
    + """
request = product.Transport.request
product.Transport.request = lambda *words, **options: request(*words, **{**options, "seconds": 0.5})
"""
)


def run_quick(desk: Desk, *arguments: str, change: str = QUICK, **options: Any) -> Result:
    result = desk.run(command=altered(change, *arguments), **options)
    assert_no_secret(desk, result)
    return result


def assert_no_secret(desk: Desk, result: Result) -> None:
    assert desk.environment["PLATO_API_KEY"] not in result.out + result.err


@contextlib.contextmanager
def listener(backlog: int = 16) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def free_port() -> int:
    """A port on which nothing listens."""
    with listener() as server:
        return port_of(server)


# ---------------------------------------------------------------------------
# pure functions
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    {
        "https://plato.so": "https://plato.so",
        "https://plato.so/": "https://plato.so",
        "https://plato.so/api": "https://plato.so",
        "https://plato.so/api/": "https://plato.so",
        "  https://plato.so//\n": "https://plato.so",
        "https://plato.so:8443/plato/api": "https://plato.so:8443/plato",
        "https://plato.so/myapi": "https://plato.so/myapi",
        "https://[2001:db8::1]:8443": "https://[2001:db8::1]:8443",
        "http://localhost:3000": "http://localhost:3000",
        "http://127.0.0.1/api": "http://127.0.0.1",
        "http://[::1]:1": "http://[::1]:1",
    }.items(),
)
def test_normal_base_url(url: str, expected: str) -> None:
    assert plato_sandbox.normal_base_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "plato.so",
        "ftp://plato.so",
        "https://",
        "https:///api",
        "https://user@plato.so",
        "https://user:word@plato.so",
        "https://plato.so?x=1",
        "https://plato.so#x",
        "https://plato.so\n.evil.example",
        "https://plato.so:port",
        "https://plato.so:99999",
        "https://plato.so:0",
        "https://plato so",
        "http://plato.so",
        "http://127.0.0.1.evil.example",
        "http://localhost@evil.example",
        "http://0.0.0.0",
    ],
)
def test_base_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="PLATO_BASE_URL"):
        plato_sandbox.normal_base_url(url)


PROXY = "http://proxy.test:3128"


@pytest.mark.parametrize(
    ("host", "environment", "expected"),
    [
        ("plato.so", {}, None),
        ("plato.so", {"HTTPS_PROXY": PROXY}, PROXY),
        ("plato.so", {"https_proxy": PROXY}, PROXY),
        ("plato.so", {"https_proxy": PROXY, "HTTPS_PROXY": "http://other.test"}, PROXY),
        ("plato.so", {"HTTPS_PROXY": ""}, None),
        ("plato.so", {"HTTP_PROXY": PROXY}, None),
        ("localhost", {"HTTPS_PROXY": PROXY}, None),
        ("127.0.0.1", {"HTTPS_PROXY": PROXY}, None),
        ("[::1]", {"HTTPS_PROXY": PROXY}, None),
        ("plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": "plato.so"}, None),
        ("plato.so", {"HTTPS_PROXY": PROXY, "no_proxy": "a.test, plato.so"}, None),
        ("api.plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": "plato.so"}, None),
        ("api.plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": ".plato.so"}, None),
        ("API.plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": "Plato.SO:443"}, None),
        ("notplato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": "plato.so"}, PROXY),
        ("plato.so.evil.test", {"HTTPS_PROXY": PROXY, "NO_PROXY": "plato.so"}, PROXY),
        ("plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, None),
        ("plato.so", {"HTTPS_PROXY": PROXY, "NO_PROXY": " , ,"}, PROXY),
        ("[2001:db8::1]", {"HTTPS_PROXY": PROXY, "NO_PROXY": "[2001:db8::1]"}, None),
        ("[2001:db8::2]", {"HTTPS_PROXY": PROXY, "NO_PROXY": "2001:db8::1"}, PROXY),
    ],
)
def test_proxy_for(
    monkeypatch: pytest.MonkeyPatch, host: str, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy = plato_sandbox.proxy_for(host, 443)
    assert (proxy and proxy.geturl()) == expected


@pytest.mark.parametrize(
    ("url", "service", "expected"),
    [
        ("https://j.sims.plato.so", None, "https://j.sims.plato.so"),
        (
            "https://j.sims.plato.so",
            "app",
            "https://j.sims.plato.so?_plato_router_target=app.web.plato.so",
        ),
        ("https://j.so/?a=1", "app", "https://j.so/?a=1&_plato_router_target=app.web.plato.so"),
        ("https://j.so", "a b&c", "https://j.so?_plato_router_target=a%20b%26c.web.plato.so"),
    ],
)
def test_with_router_target(url: str, service: str | None, expected: str) -> None:
    assert plato_sandbox.with_router_target(url, service) == expected


@pytest.mark.parametrize(
    ("session_id", "expected"),
    {
        "abc123-def456": "abc123-def456",
        "0d4f1a2b-9c3d-4e5f-8a6b-7c8d9e0f1a2b": "0d4f1a2b",
        "ab-cdef": "ab-cdef",
        "session-1": "session-1",
        "session-2": "session-2",
        "deadbeef-1": "deadbeef",
        "sess_1234567": "sess1234567",
        "../../etc/passwd": "etcpasswd",
        "a b\nc;d$(e)": "abcde",
        "---": "unknown",
        "": "unknown",
        "x" * 500: "x" * 64,
        "-oProxyCommand=evil": "oProxyCommandevil",
    }.items(),
)
def test_short_id(session_id: str, expected: str) -> None:
    assert plato_sandbox.short_id(session_id) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    {
        -5: "0 s",
        -0.5: "0 s",
        0: "0 s",
        0.44: "0.4 s",
        9.94: "9.9 s",
        10: "10 s",
        119.9: "1:59 min",
        120: "2:00 min",
        185: "3:05 min",
        7199: "1:59 h",
        7200: "2:00 h",
        7800: "2:10 h",
    }.items(),
)
def test_duration_text(seconds: float, expected: str) -> None:
    assert plato_sandbox.duration_text(seconds) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "plain": "plain",
        "sch\N{LATIN SMALL LETTER O WITH DIAERESIS}n": "sch\N{LATIN SMALL LETTER O WITH DIAERESIS}n",
        "\x1b[31mred": "\\x1b[31mred",
        "a\nb\tc\r": "a\\nb\\tc\\r",
        "\x9b2J": "\\x9b2J",
        "\x7f": "\\x7f",
        "\u202eevil": "\\u202eevil",
        "\ud800": "\\ud800",
    }.items(),
)
def test_printable(text: str, expected: str) -> None:
    assert plato_sandbox.printable(text) == expected


@pytest.mark.parametrize(
    ("home", "path", "expected"),
    [
        ("/home/ann", "/home/ann/x", "~/x"),
        ("/home/ann/", "/home/ann/x", "~/x"),
        ("/home/ann", "/home/anna/x", "/home/anna/x"),
        ("/home/ann", "/home/ann", "/home/ann"),
        ("/", "/etc/x", "/etc/x"),
        ("/home/ann", "/tmp/\x1b]0;x", "/tmp/\\x1b]0;x"),
    ],
)
def test_shown_path(monkeypatch: pytest.MonkeyPatch, home: str, path: str, expected: str) -> None:
    monkeypatch.setenv("HOME", home)
    assert plato_sandbox.shown_path(path) == expected


# ---------------------------------------------------------------------------
# Plato cannot be reached, or is slow
# ---------------------------------------------------------------------------


@pytest.fixture
def sandbox(standing: tuple[Desk, LocalPlato]) -> Iterator[tuple[Desk, LocalPlato]]:
    """The standing sandbox; afterwards its record and its VM must be as they were."""
    desk, plato = standing
    record = desk.state_file.read_bytes()
    yield desk, plato
    plato.clear_faults()
    assert desk.state_file.read_bytes() == record
    assert living(plato) == [desk.state["job_id"]]


def assert_status_fails(desk: Desk, code: int, *, vm_status: str, **options: Any) -> str:
    """`status` in both forms: the exit code, what is known all the same, and one document; the message."""
    human = run_quick(desk, "status", **options)
    assert human.code == code, human
    assert f"  VM Status:   {vm_status}\n" in human.out
    assert f"  Session ID:  {desk.state['session_id']}\n" in human.out
    result = run_quick(desk, "status", "--json", **options)
    assert result.code == code
    assert result.document["vm_status"] == vm_status
    assert result.document["session_id"] == desk.state["session_id"]
    assert result.document["vm_running"] is False
    message: str = result.error["message"]
    assert message in human.err
    return message


def assert_stop_fails(desk: Desk, code: int, **options: Any) -> str:
    result = run_quick(desk, "stop", "--json", **options)
    assert result.code == code, result
    message: str = result.error["message"]
    return message


def unreachable(base_url: str, desk: Desk) -> dict[str, str]:
    """An environment in which Plato is at another address, and the desk's record says so."""
    desk.state_file.write_text(f"session_id: abc123-def\njob_id: job-1\nmode: blank\nbase_url: {base_url}\n")
    return {"PLATO_BASE_URL": base_url}


@pytest.fixture
def away(new_desk: Callable[..., Desk]) -> Desk:
    """A desk whose Plato is nowhere yet."""
    return new_desk({"PLATO_API_KEY": "canary-3f9a7c51e2"})


def assert_unreachable(desk: Desk, base_url: str, change: str = SHORT) -> str:
    environment = unreachable(base_url, desk)
    before = desk.state_file.read_bytes()
    message = assert_status_fails(desk, 6, vm_status="unreachable", environment=environment, change=change)
    assert assert_stop_fails(desk, 6, environment=environment, change=change)
    assert desk.state_file.read_bytes() == before
    desk.state_file.unlink()
    failed = run_quick(desk, *BLANK, "--json", environment=environment, change=change)
    assert failed.code == 6
    assert failed.error["code"] == "network"
    assert desk.leftovers() == []
    return message


def test_refused(away: Desk) -> None:
    port = free_port()
    assert f"127.0.0.1:{port}" in assert_unreachable(away, f"http://127.0.0.1:{port}")


@pytest.mark.sampled
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70 + ".invalid"])
def test_name_that_nobody_knows(away: Desk, host: str) -> None:
    assert host in assert_unreachable(away, f"https://{host}")


@pytest.mark.long
def test_connection_is_never_accepted(away: Desk) -> None:
    with listener(backlog=0) as server, contextlib.ExitStack() as stack:
        for _ in range(4):  # the queue is full: the next connections are left without an answer
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        message = assert_unreachable(away, f"http://127.0.0.1:{port_of(server)}")
    assert "timed out" in message


@pytest.mark.long
def test_server_accepts_and_says_nothing_over_tls(away: Desk) -> None:
    with listener() as server:
        assert "localhost" in assert_unreachable(away, f"https://localhost:{port_of(server)}")


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [{"effect": "hang"}, {"effect": "drip", "seconds": 60}], ids=["hang", "drip"]
)
def test_answer_that_does_not_end_in_time(sandbox: tuple[Desk, LocalPlato], fault: dict[str, Any]) -> None:
    desk, plato = sandbox
    plato.fault(**fault, path="/api/v2/*", times=-1)
    assert "timed out" in assert_status_fails(desk, 6, vm_status="unreachable", change=SHORT)
    plato.clear_faults()
    plato.fault("hang", path="*/close", times=-1)
    assert "timed out" in assert_stop_fails(desk, 6, change=SHORT)


def test_slow_answer_is_awaited(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, plato = sandbox
    plato.fault("drip", method="GET", path="/api/v2/sessions/*", seconds=1.5)
    assert desk.good("status").out.count("VM Status:   running") == 1


# ---------------------------------------------------------------------------
# answers that are not answers
# ---------------------------------------------------------------------------

WRONG_BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "html": ({"effect": "html", "status": 200}, "text/html"),
    "cut connection": ({"effect": "truncate", "bytes": 9}, "session"),
    "empty": ({"effect": "status", "status": 200, "body": ""}, "not the JSON"),
    "list": ({"effect": "status", "status": 200, "body": []}, "not the JSON"),
    "deep": ({"effect": "status", "status": 200, "body": "[" * 200_000}, "not the JSON"),
    "long number": ({"effect": "status", "status": 200, "body": "9" * 9999}, "JSON"),
    "plain text": (
        {"effect": "content_type", "headers": {"Content-Type": "text/plain"}, "body": "hello"},
        "not the JSON",
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("fault", "words"), WRONG_BODIES.values(), ids=WRONG_BODIES)
def test_body_that_is_no_answer(sandbox: tuple[Desk, LocalPlato], fault: dict[str, Any], words: str) -> None:
    desk, plato = sandbox
    plato.fault(method="GET", path="/api/v2/sessions/*", times=-1, **fault)
    message = assert_status_fails(desk, 6, vm_status="unreachable")
    assert words in message
    assert "127.0.0.1" in message or "/api/v2/sessions/" in message
    if fault["effect"] == "status":  # the other effects close the session before they spoil the answer
        plato.fault(path="*/close", times=-1, **fault)
        assert words in assert_stop_fails(desk, 6)


WRONG_SHAPES: dict[str, Any] = {
    "no fields": {},
    "jobs of another type": {"session_id": "x", "jobs": "none"},
    "jobs null": {"session_id": "x", "jobs": None},
    "jobs of numbers": {"session_id": "x", "jobs": [1, None, []]},
    "status of another type": {"session_id": "x", "jobs": [{"job_id": 1, "status": ["running"]}]},
    "status an object": {"session_id": "x", "status": {"a": 1}, "jobs": {}},
    "reason of another type": {"session_id": "x", "jobs": [{"status": "running", "status_reason": 5}]},
}


@pytest.mark.sampled
@pytest.mark.parametrize("body", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_details_of_another_shape_are_no_crash(sandbox: tuple[Desk, LocalPlato], body: Any) -> None:
    desk, plato = sandbox
    plato.fault("status", status=200, body=body, method="GET", path="/api/v2/sessions/*", times=-1)
    human = desk.run("status")
    assert "mistake" not in human.err
    assert "  VM Status:   " in human.out
    assert isinstance(desk.run("status", "--json").document["vm_status"], str)


def test_unknown_fields_do_not_disturb(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, plato = sandbox
    job = {"job_id": desk.state["job_id"], "status": "running", "new": {"deep": [1]}, "status_reason": None}
    body = {"session_id": desk.state["session_id"], "jobs": [job], "colour": "blue"}
    plato.fault("status", status=200, body=body, method="GET", path="/api/v2/sessions/*")
    assert desk.good("status", "--json").document["vm_running"] is True


# ---------------------------------------------------------------------------
# statuses
# ---------------------------------------------------------------------------


@dataclass
class Case:
    """What a status must come to: the exit code of `status`, its word for the VM, words of the message."""

    status: int
    code: int
    vm_status: str = "unreachable"
    words: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    attempts: int = 1


VALIDATION = {
    "detail": [
        {"loc": ["body", "envs", 0, "sim_config", "cpus"], "msg": "too many", "type": "value_error"},
        {"loc": ["query", "timeout"], "msg": "not a number", "type": "type_error"},
        "nonsense",
        {"loc": None, "msg": None},
    ]
}
STATUSES = {
    "401": Case(401, 4, words=("401", "Invalid API key"), body={"detail": "Invalid API key"}),
    "403": Case(403, 4, words=("403", "Not yours"), body={"detail": "Not yours"}),
    "404": Case(404, 3, vm_status="gone"),
    "410": Case(410, 3, vm_status="gone"),
    "400": Case(400, 6, words=("400", "no such thing"), body={"detail": "no such thing"}),
    "408": Case(408, 6, words=("408",), attempts=4),
    "409": Case(409, 6, words=("409", "still booting"), body={"detail": "still booting"}),
    "422": Case(422, 6, words=("body.envs.0.sim_config.cpus: too many", "query.timeout"), body=VALIDATION),
    "422 of another form": Case(422, 6, words=("422",), body={"detail": {"cpus": "wrong"}}),
    "429 seconds": Case(429, 6, words=("429",), headers={"Retry-After": "3600"}),
    "429 bare": Case(429, 6, words=("429",), attempts=4),
    "500": Case(500, 6, words=("500",), attempts=4),
    "502 html": Case(502, 6, words=("502",), body="<html>bad gateway</html>", attempts=4),
    "503": Case(503, 6, words=("503",), headers={"Retry-After": "0"}, attempts=4),
    "503 later": Case(503, 6, words=("503",), headers={"Retry-After": "3600"}),
    "504": Case(504, 6, words=("504",), attempts=4),
    "501": Case(501, 6, words=("501",)),
    "302": Case(302, 6, words=("redirect", "/login"), headers={"Location": "/login"}),
    "304": Case(304, 6, words=("redirect",)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", STATUSES.values(), ids=STATUSES)
def test_statuses(sandbox: tuple[Desk, LocalPlato], case: Case) -> None:
    desk, plato = sandbox
    session = f"/api/v2/sessions/{desk.state['session_id']}"
    before = len(plato.requests("GET", session))
    fault = {"status": case.status, "headers": case.headers, "body": case.body, "times": -1}
    plato.fault("status", method="GET", path="/api/v2/sessions/*", **fault)
    message = assert_status_fails(desk, case.code, vm_status=case.vm_status)
    assert all(word in message for word in case.words), message
    assert len(plato.requests("GET", session)) - before == 2 * case.attempts
    if case.vm_status != "gone":
        plato.fault("status", method="POST", path="*/close", **fault)
        message = assert_stop_fails(desk, case.code)
        assert all(word in message for word in case.words), message


def test_hint_of_429_says_how_long(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, plato = sandbox
    plato.fault("status", method="GET", path="/api/*", status=429, headers={"Retry-After": "3600"}, times=-1)
    assert "in 3600 s" in run_quick(desk, "status", "--json").error["hint"]


@pytest.mark.parametrize(
    "fault",
    [
        {"effect": "status", "status": 503, "headers": {"Retry-After": "0"}},
        {"effect": "status", "status": 429},
        {"effect": "reset_before_body"},
        {"effect": "lost_answer"},
    ],
    ids=["503", "429", "reset", "lost answer"],
)
@pytest.mark.parametrize("times", [1, 3])
def test_trouble_that_passes(sandbox: tuple[Desk, LocalPlato], fault: dict[str, Any], times: int) -> None:
    desk, plato = sandbox
    plato.fault(method="GET", path="/api/v2/sessions/*", times=times, **fault)
    assert run_quick(desk, "status").code == 0


class Recorder(ThreadingHTTPServer):
    """Another host, to which a redirect leads: it records whatever reaches it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RecordingHandler)
        self.seen: list[str] = []


class RecordingHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Recorder)
        self.server.seen.append(str(self.headers))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET  # noqa: N815  (the name that http.server calls)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[Recorder]:
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.sampled
@pytest.mark.parametrize("status", [301, 307])
def test_redirect_to_another_host_is_not_followed(
    sandbox: tuple[Desk, LocalPlato], elsewhere: Recorder, status: int
) -> None:
    desk, plato = sandbox
    url = f"http://127.0.0.1:{elsewhere.server_port}/api/v2/x"
    plato.fault("redirect", path="/api/*", url=url, status=status, times=-1)
    assert url in assert_status_fails(desk, 6, vm_status="unreachable")
    assert url in assert_stop_fails(desk, 6)
    assert elsewhere.seen == []


# ---------------------------------------------------------------------------
# the same on the way of `start`: whatever fails, no VM is left
# ---------------------------------------------------------------------------

STEP_FAULTS: dict[str, tuple[dict[str, Any], int]] = {
    "401": ({"effect": "status", "status": 401}, 4),
    "422": ({"effect": "status", "status": 422, "body": VALIDATION}, 6),
    "html": ({"effect": "html", "status": 200}, 6),
    "redirect": ({"effect": "redirect", "url": "https://evil.example/"}, 6),
    "reset": ({"effect": "reset_before_acting"}, 6),
}
PATIENT = {"html", "reset"}  # while the VM boots, these are waited out


@pytest.mark.sampled
@pytest.mark.parametrize("name", STEP_FAULTS)
def test_start_fails_and_leaves_nothing(desk: Desk, plato: LocalPlato, name: str) -> None:
    fault, code = STEP_FAULTS[name]
    arguments: tuple[str, ...] = BLANK
    if name in PATIENT:
        code = 7
        arguments = (*BLANK, "--timeout", "1")
    plato.fault(method="GET", path="*/wait_for_ready", times=-1, **fault)
    result = run_quick(desk, *arguments, "--json")
    assert result.code == code, result
    assert "Nothing is left running" in result.error["message"]
    assert living(plato) == []
    assert desk.leftovers() == []


def test_start_waits_out_a_short_trouble_of_every_step(desk: Desk, plato: LocalPlato) -> None:
    for path in ("*/wait_for_ready", "*/connect_network", "*/reset", "*/public_url", "*/add_ssh_key"):
        plato.fault("status", path=path, status=503, headers={"Retry-After": "0"})
        plato.fault("reset_before_acting", path=path, nth=2)
    started = run_quick(desk, "start", "-c", "--json")
    assert started.code == 0, started
    assert started.document["public_url"]
    assert living(plato) == [desk.state["job_id"]]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "fault",
    [
        {"effect": "status", "status": 500},
        {"effect": "html", "status": 200},
        {"effect": "status", "status": 200, "body": {"results": {"x": {"url": 7}}}},
    ],
    ids=["500", "html", "number"],
)
def test_start_goes_on_without_a_public_url(desk: Desk, plato: LocalPlato, fault: dict[str, Any]) -> None:
    plato.fault(path="*/public_url", times=-1, **fault)
    result = run_quick(desk, *BLANK)
    assert result.code == 0, result
    assert "public_url" not in desk.state
    assert "url" not in desk.state
    assert "Public URL" not in result.out


def test_key_that_the_server_repeats_is_hidden(desk: Desk, plato: LocalPlato) -> None:
    key = desk.environment["PLATO_API_KEY"]
    desk.good(*BLANK)
    body = {"detail": f"the key {key} was revoked"}
    plato.fault("status", path="/api/*", status=401, body=body, times=-1)
    for arguments in (("status",), ("status", "--json"), ("stop", "--verbose")):
        result = desk.run(*arguments)
        assert result.code == 4
        assert "was revoked" in result.out + result.err
        assert_no_secret(desk, result)
    eventually(lambda: desk.heartbeat_record().get("last_error"))
    assert "was revoked" in desk.heartbeat_record()["last_error"]
    for path in (*desk.plato_home.iterdir(), desk.state_file):
        assert key not in path.read_text()


# ---------------------------------------------------------------------------
# TLS
# ---------------------------------------------------------------------------


def pump(source: socket.socket, sink: socket.socket, record: bytearray | None = None) -> None:
    """Copy from one socket to another until the end, and pass the end on."""
    try:
        while data := source.recv(65536):
            if record is not None:
                record += data
            sink.sendall(data)
    except OSError:
        pass
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def join(client: socket.socket, server: socket.socket, record: bytearray | None = None) -> None:
    """Pass everything between two sockets until both sides have ended, and close them."""
    with client, server:
        back = threading.Thread(target=pump, args=(server, client))
        back.start()
        pump(client, server, record)
        back.join()


class Relay:
    """Accepts connections on a port of its own and serves each in a thread."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = port_of(self.listener)
        self.threads = [threading.Thread(target=self.accept)]
        self.connections: list[socket.socket] = []
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(client)
            thread = threading.Thread(target=self.serve_quietly, args=(client,))
            self.threads.append(thread)
            thread.start()

    def serve_quietly(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self.serve(client)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


class TlsRelay(Relay):
    """TLS in front of a port of this host. `received` is what came out of the encryption."""

    def __init__(self, certificate: trustme.LeafCert, target: int) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.context)
        self.target = target
        self.received = bytearray()
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        secured = self.context.wrap_socket(client, server_side=True)
        self.connections.append(secured)
        join(secured, socket.create_connection(("127.0.0.1", self.target)), self.received)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def bundle(desk: Desk, plato: LocalPlato, *authorities: trustme.CA) -> Path:
    """A file with the CA of the local Plato's gateway and these."""
    path = desk.place / "authorities.pem"
    parts = [authority.cert_pem.bytes() for authority in authorities]
    with open(plato.environment["SSL_CERT_FILE"], "rb") as file:
        path.write_bytes(b"\n".join([file.read(), *parts]))
    return path


def over_tls(relay: Relay, authorities: Path, host: str = "localhost") -> dict[str, str]:
    return {"PLATO_BASE_URL": f"https://{host}:{relay.port}", "SSL_CERT_FILE": str(authorities)}


@pytest.mark.long
def test_tls_with_a_company_ca(desk: Desk, plato: LocalPlato, authority: trustme.CA) -> None:
    """Start, heartbeat, SSH and stop; the CA file is named by a relative path."""
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    with TlsRelay(certificate, int(plato.base_url.rpartition(":")[2])) as relay:
        bundle(desk, plato, authority).rename(desk.work / "ca.pem")
        desk.environment.update({**over_tls(relay, desk.work / "ca.pem"), "SSL_CERT_FILE": "ca.pem"})
        desk.good(*BLANK)
        plato.wait_for_request("POST", "/heartbeat", count=2)
        assert desk.ssh("echo there") == (0, "there\n", "")
        assert "VM Status:   running" in desk.good("status").out
        assert (
            run_quick(desk, "status", environment={"PLATO_BASE_URL": f"https://127.0.0.1:{relay.port}"}).code
            == 5
        )  # the same Plato by another name is another one, as a file never decides
        desk.good("stop")
        assert b"x-api-key" in bytes(relay.received).lower()
    assert living(plato) == []
    assert desk.leftovers() == []


@pytest.mark.parametrize("content", [None, "", "no certificate\n"], ids=["missing", "empty", "other text"])
def test_ca_file_that_cannot_be_used(away: Desk, content: str | None) -> None:
    path = away.place / "ca.pem"
    if content is not None:
        path.write_text(content)
    with listener() as server:
        away.environment.update(
            PLATO_BASE_URL=f"https://localhost:{port_of(server)}", SSL_CERT_FILE=str(path)
        )
        failed = run_quick(away, *BLANK, "--json")
    assert failed.code == 2
    assert "ca.pem" in failed.error["message"]
    assert "SSL_CERT_FILE" in failed.error["hint"]
    assert away.leftovers() == []


YEAR = datetime.timedelta(days=365)
CERTIFICATES: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "wrong host": lambda authority: authority.issue_cert("other.test"),
    "expired": lambda authority: authority.issue_cert(
        "localhost",
        not_before=datetime.datetime.now(datetime.timezone.utc) - YEAR,
        not_after=datetime.datetime.now(datetime.timezone.utc) - YEAR / 2,
    ),
    "unknown CA": lambda authority: trustme.CA().issue_cert("localhost"),
}


@pytest.mark.parametrize("make", CERTIFICATES.values(), ids=CERTIFICATES)
def test_tls_that_cannot_be_trusted(
    new_desk: Callable[..., Desk],
    standing: tuple[Desk, LocalPlato],
    authority: trustme.CA,
    make: Callable[[trustme.CA], trustme.LeafCert],
) -> None:
    _, plato = standing
    desk = new_desk(plato.environment)
    with TlsRelay(make(authority), int(plato.base_url.rpartition(":")[2])) as relay:
        desk.environment.update(over_tls(relay, bundle(desk, plato, authority)))
        before = len(plato.requests())
        failed = run_quick(desk, *BLANK, "--json")
        assert failed.code == 6
        assert "localhost" in failed.error["message"]
        assert "certificate" in failed.error["message"]
        assert "SSL_CERT_FILE" in failed.error["hint"]
        assert relay.received == b""
    assert len(plato.requests()) == before
    assert desk.leftovers() == []


# ---------------------------------------------------------------------------
# proxies
# ---------------------------------------------------------------------------

PASSWORD = "hunter2 @:/%"
CREDENTIALS = "Basic YW5uOmh1bnRlcjIgQDovJQ=="  # ann and the password
PROXY_USER = "ann:hunter2%20%40%3A%2F%25"


class Proxy(Relay):
    """An HTTP proxy that knows the way to some host names, and perhaps wants credentials."""

    def __init__(self, ways: dict[str, int], credentials: str | None = None, refusal: bytes = b"") -> None:
        self.ways = ways
        self.credentials = credentials
        self.refusal = refusal
        self.requests: list[str] = []
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = client.recv(1)
            if not data:
                return
            head += data
        lines = head.decode("latin-1").split("\r\n")
        self.requests.append(lines[0].rpartition(" HTTP/1.")[0])
        given = {line.partition(": ")[2] for line in lines if line.lower().startswith("proxy-authorization:")}
        if self.refusal:
            client.sendall(self.refusal)
        elif self.credentials is not None and given != {self.credentials}:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        else:
            way = socket.create_connection(("127.0.0.1", self.ways[lines[0].split()[1]]))
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a proxy\r\n\r\n")
            join(client, way)


@pytest.fixture
def distant(
    tmp_path: Path, new_desk: Callable[..., Desk], authority: trustme.CA, certificates: Path
) -> Iterator[tuple[Desk, LocalPlato, dict[str, int]]]:
    """A Plato at names that only a proxy can resolve, and the proxy's ways to it."""
    with contextlib.ExitStack() as stack:
        assert certificates  # whose CA vouches for other names; this one has its own
        plato = stack.enter_context(LocalPlato(tmp_path / "distant", gateway_host="gateway.plato.test"))
        certificate = authority.issue_cert("plato.test")
        relay = stack.enter_context(TlsRelay(certificate, int(plato.base_url.rpartition(":")[2])))
        desk = new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "1"})
        desk.environment.update(
            PLATO_BASE_URL="https://plato.test",
            PLATO_GATEWAY_HOST="gateway.plato.test",
            PLATO_GATEWAY_PORT="443",
            SSL_CERT_FILE=str(bundle(desk, plato, authority)),
        )
        yield desk, plato, {"plato.test:443": relay.port, "gateway.plato.test:443": plato.gateway_port}
        desk.clear()


@pytest.mark.long
@pytest.mark.parametrize("credentials", [None, CREDENTIALS], ids=["open", "with a password"])
def test_everything_goes_through_the_proxy(
    distant: tuple[Desk, LocalPlato, dict[str, int]], credentials: str | None
) -> None:
    desk, plato, ways = distant
    with Proxy(ways, credentials) as proxy:
        user = f"{PROXY_USER}@" if credentials else ""
        desk.environment["HTTPS_PROXY"] = f"http://{user}127.0.0.1:{proxy.port}"
        started = desk.good(*BLANK, "--verbose")
        plato.wait_for_request("POST", "/heartbeat", count=2)
        assert desk.ssh("echo there") == (0, "there\n", "")
        status = desk.good("status", "--json")
        stopped = desk.good("stop", "--verbose")
        assert set(proxy.requests) == {
            "CONNECT plato.test:443",
            "CONNECT gateway.plato.test:443",
        }
    for result in (started, status, stopped):
        assert "hunter2" not in result.out + result.err
        assert CREDENTIALS.split()[1] not in result.out + result.err
    assert living(plato) == []


def test_proxy_without_the_right_password(distant: tuple[Desk, LocalPlato, dict[str, int]]) -> None:
    desk, plato, ways = distant
    with Proxy(ways, CREDENTIALS) as proxy:
        for user in ("", "ann@", "ann:secretword@"):
            desk.environment["HTTPS_PROXY"] = f"http://{user}127.0.0.1:{proxy.port}"
            failed = run_quick(desk, *BLANK, "--json", "--verbose")
            assert failed.code == 6
            assert "407" in failed.error["message"]
            assert "HTTPS_PROXY" in failed.error["hint"]
            assert "secretword" not in failed.out + failed.err
    assert plato.requests() == []
    assert desk.leftovers() == []


def test_ssh_tells_that_the_proxy_refuses(distant: tuple[Desk, LocalPlato, dict[str, int]]) -> None:
    desk, _, ways = distant
    with Proxy(ways) as proxy:
        desk.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{proxy.port}"
        desk.good(*BLANK)
        proxy.refusal = b"HTTP/1.1 403 Forbidden\r\n\r\n"
        result = desk.ssh("true")
        assert result.code == 255
        assert "403" in result.err
        proxy.refusal = b""


REFUSALS = {
    "403": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    "502": b"HTTP/1.0 502 Bad Gateway\r\n\r\n<html>",
    "no HTTP": b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
    "hang-up": b"HTTP/1.1 2",
    "escape": b"HTTP/1.1 \x1b[2J no\r\n\r\n",
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_proxy_that_refuses(away: Desk, refusal: bytes) -> None:
    with Proxy({}, refusal=refusal) as proxy:
        away.environment.update(
            HTTPS_PROXY=f"http://ann:hunter2@127.0.0.1:{proxy.port}", PLATO_BASE_URL="https://plato.test"
        )
        failed = run_quick(away, *BLANK, "--json")
        assert failed.code == 6
        assert "proxy" in failed.error["message"].lower()
        assert "\x1b" not in failed.error["message"]
        assert "hunter2" not in failed.out + failed.err


def test_proxy_cannot_be_reached(away: Desk) -> None:
    port = free_port()
    away.environment.update(
        HTTPS_PROXY=f"http://ann:hunter2@127.0.0.1:{port}", PLATO_BASE_URL="https://plato.test"
    )
    failed = run_quick(away, *BLANK, "--json")
    assert failed.code == 6
    assert f"proxy 127.0.0.1:{port}" in failed.error["message"]
    assert "hunter2" not in failed.out + failed.err


def test_proxy_for_an_ipv6_address(away: Desk) -> None:
    with Proxy({}, refusal=b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        away.environment.update(
            HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}", PLATO_BASE_URL="https://[2001:db8::1]:8443"
        )
        assert run_quick(away, *BLANK).code == 6
        assert set(proxy.requests) == {"CONNECT [2001:db8::1]:8443"}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "proxy",
    [
        "https://ann:hunter2@127.0.0.1:1",
        "socks5://ann:hunter2@127.0.0.1:1",
        "http://ann:hunter2@:1",
        "http://ann:hunter2@127.0.0.1:99999",
        "http://ann:hunter2[@127.0.0.1:1",
        "http://ann:hunter2]@127.0.0.1:1",
        "http://ann:hunter2\u2100@127.0.0.1:1",
        "http://",
    ],
)
def test_proxy_that_makes_no_sense(away: Desk, proxy: str) -> None:
    away.environment.update(HTTPS_PROXY=proxy, PLATO_BASE_URL="https://plato.test")
    failed = run_quick(away, *BLANK, "--json", "--verbose")
    assert failed.code == 2, failed
    assert "HTTPS_PROXY" in failed.error["message"]
    assert "hunter2" not in failed.out + failed.err
    assert away.leftovers() == []


def test_no_proxy_is_honoured(distant: tuple[Desk, LocalPlato, dict[str, int]]) -> None:
    desk, plato, ways = distant
    with Proxy(ways) as proxy:
        desk.environment.update(HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}", NO_PROXY="plato.test")
        failed = run_quick(desk, *BLANK, "--json")
        assert failed.code == 6
        assert "plato.test" in failed.error["message"]
        assert proxy.requests == []
    assert plato.requests() == []


@pytest.mark.long
def test_loopback_never_goes_to_a_proxy(desk: Desk) -> None:
    desk.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{free_port()}"
    desk.good(*BLANK)
    assert desk.ssh("echo there") == (0, "there\n", "")
    assert json.loads(desk.good("stop", "--json").out)["stopped"] is True
