"""The HTTP interface: reads requests, checks them against the contract, and answers as FastAPI does."""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from . import admin, artifacts, network, worker  # noqa: F401 - their endpoints bind themselves
from .contract import Contract, Endpoint, Report
from .endpoints import HANDLERS, OLD_ENDPOINTS, ApiError, Call, Settings
from .faults import Fault, Faults, edited
from .gateway import Gateway
from .hub import Hub
from .relay import reset_when_closed
from .sessions import Sessions

BODY_LIMIT = 64 << 20
LOG_LENGTH = 20_000
REPORT_LENGTH = 1_000
KEY_PLACEHOLDER = "<the API key>"
HTML_PAGE = "<!doctype html><html><head><title>{status}</title></head><body><h1>{status}</h1></body></html>\n"


@dataclass
class Request:
    """A request of the API, and its record for the admin interface. Header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    entry: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What goes back to the client."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def json_answer(status: int, value: Any, **headers: str) -> Answer:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Answer(status, text.encode("utf-8", "backslashreplace"), headers)


class Service:
    """Everything that the HTTP interface works with, and its record of what was asked."""

    def __init__(
        self,
        contract: Contract,
        sessions: Sessions,
        settings: Settings,
        key: str,
        gateway: Gateway | None,
        hub: Hub,
    ) -> None:
        self.contract = contract
        self.endpoints = [
            known
            for known in contract.endpoints
            if settings.old_clients or (known.method, known.path) not in OLD_ENDPOINTS
        ]
        self.sessions = sessions
        self.settings = settings
        self.key = key
        self.gateway = gateway
        self.hub = hub
        self.faults = Faults()
        self.requests: deque[dict[str, Any]] = deque(maxlen=LOG_LENGTH)
        self.unknown_fields: deque[dict[str, Any]] = deque(maxlen=REPORT_LENGTH)
        self.last_active = time.monotonic()
        self.stopping = threading.Event()
        self.stop_reader, self.stop_writer = socket.socketpair()
        self.stop_writer.setblocking(False)
        self.request_count = 0

    def note(self, request: Request) -> dict[str, Any]:
        """Record a request when it comes. Its key is never in the record, wherever the client put it."""
        key = request.headers.get("x-api-key")
        headers = {
            name: self.without_key(text) for name, text in request.headers.items() if name != "x-api-key"
        }
        entry: dict[str, Any] = {
            "method": request.method,
            "path": self.without_key(request.path),
            "query": self.without_key(request.query),
            "headers": headers,
            "key": None if key is None else "right" if key == self.key else "wrong",
            "time": time.time(),
            "clock": self.sessions.clock.now(),
            "status": None,
            "body": None,
            "fault": None,
            "settled": None,
        }
        with self.sessions.lock:
            self.request_count += 1
            entry["number"] = self.request_count
            self.requests.append(entry)
            if not request.path.endswith("/heartbeat"):
                self.last_active = time.monotonic()
            self.sessions.touch()
        return entry

    def settle(self, request: Request, **changes: Any) -> None:
        """Complete the record of a request; `settled` is the time when its status was known."""
        if "status" in changes:
            changes["settled"] = time.time()
        with self.sessions.lock:
            request.entry.update(changes)
            self.sessions.touch()

    def request_stop(self) -> None:
        """Ask the main thread to end the server."""
        self.stop_writer.send(b"!")

    def without_key(self, text: str) -> str:
        return text.replace(self.key, KEY_PLACEHOLDER)

    # -- answering --

    def answer(self, request: Request) -> Answer:
        """The answer to a request of the API."""
        try:
            return self.dispatch(request)
        except ApiError as error:
            return json_answer(error.status, {"detail": error.detail})
        except Exception:  # noqa: BLE001 - a bug of ours is a 500 that says so
            traceback.print_exc()
            reason = traceback.format_exc().strip().splitlines()[-1]
            return json_answer(500, {"detail": f"the local Plato has a bug: {reason}"})

    def dispatch(self, request: Request) -> Answer:
        """Route, authenticate, check, act, check. Raises ApiError."""
        endpoint, parameters = self.find(request.method, request.path)
        given = request.headers.get("x-api-key")
        if given is None:
            raise ApiError(401, "Missing API key")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(401, "Invalid API key")
        handler = HANDLERS.get((endpoint.method, endpoint.path))
        if handler is None:
            raise ApiError(501, f"the local Plato does not have this yet: {endpoint.method} {endpoint.path}")
        report = Report()
        given_query = dict(urllib.parse.parse_qsl(request.query, keep_blank_values=True))
        checked_query = self.contract.check_query(endpoint.query, given_query, report)
        checked_body = self.check_body(endpoint, request, report)
        self.note_unknown(request, report)
        if report.problems:
            return json_answer(422, {"detail": report.problems}, **unknown_header(report))
        call = Call(
            self.sessions,
            self.sessions.clock,
            self.settings,
            parameters,
            checked_query,
            checked_body,
            raw=json.loads(request.body) if endpoint.body is not None else None,
            hub=self.hub,
            contract=self.contract,
        )
        result = handler(call)
        self.check_answer(endpoint, result)
        return json_answer(200, result, **unknown_header(report))

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]]:
        """The endpoint of a request and the parameters in its path. Raises 404 and 405."""
        found: tuple[Endpoint, dict[str, str]] | None = None
        matched = False
        for endpoint in self.endpoints:
            match = endpoint.pattern.match(path)
            if match is None:
                continue
            matched = True
            if endpoint.method == method and (found is None or len(match.groupdict()) < len(found[1])):
                found = (
                    endpoint,
                    {name: urllib.parse.unquote(text) for name, text in match.groupdict().items()},
                )
        if found is None:
            raise ApiError(405, "Method Not Allowed") if matched else ApiError(404, "Not Found")
        return found

    def check_body(self, endpoint: Endpoint, request: Request, report: Report) -> dict[str, Any]:
        """The body as its model has it; what is wrong goes into the report."""
        if endpoint.body is None:
            return {}
        if not request.body:
            report.problem("missing", ("body",), "Field required", None)
            return {}
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        value: Any = request.body.decode("utf-8", "replace")
        if kind == "application/json" or kind.endswith("+json"):
            try:
                value = json.loads(request.body)
            except ValueError as error:
                context = {"error": getattr(error, "msg", str(error))}
                where = ("body", getattr(error, "pos", 0))
                report.problem("json_invalid", where, "JSON decode error", {}, **context)
                return {}
        checked = self.contract.check(endpoint.body, value, ("body",), report)
        return checked if isinstance(checked, dict) else {}

    def check_answer(self, endpoint: Endpoint, result: Any) -> None:
        """Raises 500 when our own answer breaks the contract."""
        if endpoint.returns is None:
            return
        report = Report()
        self.contract.check(endpoint.returns, result, ("answer",), report)
        if report.problems:
            problem = (
                f"its own answer to {endpoint.method} {endpoint.path} breaks the contract: {report.problems}"
            )
            raise ApiError(500, f"the local Plato has a bug: {problem}")

    def note_unknown(self, request: Request, report: Report) -> None:
        if report.unknown:
            fields = sorted(set(report.unknown))
            with self.sessions.lock:
                self.unknown_fields.append({"method": request.method, "path": request.path, "fields": fields})


def unknown_header(report: Report) -> dict[str, str]:
    """The response header that lists what no model knows."""
    if not report.unknown:
        return {}
    return {
        "X-Local-Plato-Unknown-Fields": urllib.parse.quote(
            ", ".join(sorted(set(report.unknown))), safe=" ,.()"
        )
    }


# ---------------------------------------------------------------------------
# connections
# ---------------------------------------------------------------------------


class BodyTooLargeError(Exception):
    """More than BODY_LIMIT bytes."""


class HttpServer(ThreadingHTTPServer):
    """One thread for each connection."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True

    def __init__(self, port: int, service: Service, handler: type[Handler] | None = None) -> None:
        self.service = service
        super().__init__(("127.0.0.1", port), handler or Handler)

    def server_bind(self) -> None:
        # The parent class looks up the host's name here, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "LocalPlato"
    disable_nagle_algorithm = True
    server: HttpServer

    def handle_any(self) -> None:
        """One request, of any method."""
        path, _, query = self.path.partition("?")
        if path.startswith("/_local/"):
            self.handle_admin(path, query)
        else:
            self.handle_api(path, query)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = handle_any  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the parent's name
        """Requests are kept for the admin interface, not printed."""

    def read_body(self) -> bytes:
        """The request's body, of a known length or chunked. Raises BodyTooLargeError and ConnectionError."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self.read_chunks()
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY_LIMIT:
            raise BodyTooLargeError()
        return self.read_exactly(length)

    def read_exactly(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError("the client left in the middle of its request")
        return body

    def read_chunks(self) -> bytes:
        parts: list[bytes] = []
        total = 0
        while True:
            length = int(self.rfile.readline(64).partition(b";")[0], 16)
            total += length
            if total > BODY_LIMIT:
                raise BodyTooLargeError()
            parts.append(self.read_exactly(length))
            self.rfile.readline(8)
            if length == 0:
                return b"".join(parts)

    def send(self, answer: Answer) -> None:
        """Send an answer in one piece."""
        self.wfile.write(self.head(answer) + (b"" if self.command == "HEAD" else answer.body))

    def head(self, answer: Answer) -> bytes:
        reason = self.responses.get(answer.status, ("Unknown", ""))[0]
        lines = [f"HTTP/1.1 {answer.status} {reason}", "server: uvicorn", f"date: {self.date_time_string()}"]
        headers = {
            "content-length": str(len(answer.body)),
            "content-type": answer.content_type,
            **answer.headers,
        }
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.close_connection:
            lines.append("connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    # -- the API --

    def handle_api(self, path: str, query: str) -> None:
        service = self.server.service
        request = Request(
            self.command, path, query, {name.lower(): text for name, text in self.headers.items()}
        )
        request.entry = service.note(request)
        fault = service.faults.meet(self.command, path)
        if fault is not None:
            request.entry["fault"] = fault.effect
            if fault.effect in ("reset_before_body", "cut_upload"):
                self.rfile.read(fault.bytes if fault.effect == "cut_upload" else 0)
                self.reset_connection(request)
                return
        if not self.receive(request):
            return
        if fault is not None:
            FAULTY[fault.effect](self, fault, request)
        else:
            self.send(self.act(request))

    def receive(self, request: Request) -> bool:
        """Read and record the body; False when there is nothing to go on with."""
        service = self.server.service
        try:
            request.body = self.read_body()
        except BodyTooLargeError:
            self.close_connection = True
            service.settle(request, status=413)
            self.send(json_answer(413, {"detail": "Request body too large"}))
            return False
        except (ValueError, ConnectionError) as error:
            self.close_connection = True
            service.settle(request, error=str(error))
            return False
        service.settle(request, body=service.without_key(request.body.decode("utf-8", "replace")))
        return True

    def act(self, request: Request) -> Answer:
        """Do what the request asks for, and record the answer's status before the client can see it."""
        answer = self.server.service.answer(request)
        self.server.service.settle(request, status=answer.status)
        return answer

    def reset_connection(self, request: Request) -> None:
        self.server.service.settle(request, status="reset")
        self.break_off()

    def break_off(self) -> None:
        """Reset the connection: the client sees no orderly end."""
        self.close_connection = True
        reset_when_closed(self.connection)

    # -- the admin interface --

    def handle_admin(self, path: str, query: str) -> None:
        try:
            body = self.read_body()
            if "Origin" in self.headers:
                raise ValueError("the admin interface is not for web pages")
            status, value = admin.answer(self.server.service, self.command, path, query, body)
        except (BodyTooLargeError, ValueError, TypeError) as error:
            status, value = 400, {"detail": str(error)}
        self.send(json_answer(status, value))


# ---------------------------------------------------------------------------
# faults
# ---------------------------------------------------------------------------


def fault_status(handler: Handler, fault: Fault, request: Request) -> None:
    body = {"detail": "fault"} if fault.body is None else fault.body
    answer = json_answer(fault.status, body)
    if isinstance(fault.body, str):
        answer.body = fault.body.encode()
    answer.headers.update(fault.headers)
    handler.server.service.settle(request, status=answer.status)
    handler.send(answer)


def fault_reset(handler: Handler, fault: Fault, request: Request) -> None:
    handler.reset_connection(request)


def fault_lost_answer(handler: Handler, fault: Fault, request: Request) -> None:
    handler.act(request)
    handler.break_off()


def fault_hang(handler: Handler, fault: Fault, request: Request) -> None:
    if fault.act:
        handler.act(request)
    handler.close_connection = True
    while handler.connection.recv(4096):
        pass


def fault_latency(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    handler.server.service.stopping.wait(fault.seconds)
    handler.send(answer)


def fault_truncate(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    handler.close_connection = True
    handler.wfile.write(handler.head(answer) + answer.body[: fault.bytes])


def fault_content_type(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    answer.content_type = "text/plain; charset=utf-8"
    if fault.body is not None:
        answer.body = fault.body.encode() if isinstance(fault.body, str) else json.dumps(fault.body).encode()
    for name, value in fault.headers.items():
        if name.lower() == "content-type":
            answer.content_type = value
        else:
            answer.headers[name] = value
    handler.send(answer)


def fault_html(handler: Handler, fault: Fault, request: Request) -> None:
    page = HTML_PAGE.format(status=fault.status)
    handler.server.service.settle(request, status=fault.status)
    handler.send(Answer(fault.status, page.encode(), dict(fault.headers), "text/html; charset=utf-8"))


def fault_drip(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    handler.wfile.write(handler.head(answer))
    for position in range(len(answer.body)):
        handler.wfile.write(answer.body[position : position + 1])
        handler.server.service.stopping.wait(fault.seconds / len(answer.body))


def fault_redirect(handler: Handler, fault: Fault, request: Request) -> None:
    status = fault.status if 300 <= fault.status < 400 else 307
    handler.server.service.settle(request, status=status)
    handler.send(Answer(status, b"", {"location": fault.url, **fault.headers}))


def fault_edit(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    try:
        answer = json_answer(answer.status, edited(json.loads(answer.body), fault.edits), **answer.headers)
    except LookupError as error:
        answer = json_answer(500, {"detail": f"the fault does not fit this answer: {error}"})
        handler.server.service.settle(request, status=500, fault="edit, which does not fit")
    handler.send(answer)


def fault_copy(handler: Handler, fault: Fault, request: Request) -> None:
    answer = handler.act(request)
    handler.server.service.settle(request, answer=answer.body.decode())
    handler.send(answer)


FAULTY = {
    "status": fault_status,
    "reset_before_acting": fault_reset,
    "lost_answer": fault_lost_answer,
    "hang": fault_hang,
    "latency": fault_latency,
    "truncate": fault_truncate,
    "content_type": fault_content_type,
    "html": fault_html,
    "drip": fault_drip,
    "redirect": fault_redirect,
    "edit": fault_edit,
    "copy": fault_copy,
}
