"""Git over smart HTTP: git's own `http-backend` behind Basic authentication, on a loopback port of its own.

Bodies stream both ways. The same port answers inside every VM that has a network of its own (`Outlet`).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from .faults import Fault
from .gateway import close_listener
from .hub import Hub, HubError, Simulator, git_environment
from .machine import Machine
from .server import FAULTY, Answer, Handler, HttpServer, Request, Service

CHUNK = 1 << 16
HELD_BYTES = 1 << 18
BACKLOG = 128
REST_BYTES = 1 << 20
END_SECONDS = 10.0
TLS_HANDSHAKE = b"\x16"
CREDENTIALS_PLACEHOLDER = "<credentials>"
SERVICES = ("git-upload-pack", "git-receive-pack")
WITHOUT_ACTING = ("status", "html", "redirect", "reset_before_acting", "hang")
REALM = {"www-authenticate": 'Basic realm="Gitea", charset="UTF-8"'}
# Says of every new file that is over the limit how big it is, and refuses the push.
HOOK = """\
#!/bin/sh
limit=%d
objects=$(while read -r old new name; do
    case $new in *[!0]*) git rev-list --objects "$new" --not --all ;; esac
done)
bad=$(printf '%%s\\n' "$objects" | git cat-file --batch-check='%%(objecttype) %%(objectsize) %%(rest)' |
    while read -r kind size name; do
        if [ "$kind" = blob ] && [ "$size" -gt "$limit" ]; then
            echo "error: File $name has $size bytes; the limit is $limit bytes"
        fi
    done)
[ -z "$bad" ] || { printf '%%s\\n' "$bad" >&2; exit 1; }
"""


class GitServer(HttpServer):
    """One thread for each connection."""

    def __init__(self, port: int, service: Service, hub: Hub, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(port, service, GitHandler)
        self.tls = tls
        self.hub = hub
        self.hooks = hub.directory / "hooks"

    def settings(self) -> dict[str, str]:
        """The configuration of the backend: what Gitea sets, and the limits in force."""
        limits = self.hub.limits
        settings = {
            "http.receivepack": "true",
            "uploadpack.allowFilter": "true",
            "uploadpack.allowAnySHA1InWant": "true",
        }
        if limits.pack:
            settings["receive.maxInputSize"] = str(limits.pack)
        if limits.file:
            self.hooks.mkdir(exist_ok=True)
            hook = self.hooks / f"{limits.file}" / "pre-receive"
            if not hook.exists():
                hook.parent.mkdir(exist_ok=True)
                partial = hook.with_name(f"{threading.get_ident()}.new")
                partial.write_text(HOOK % limits.file)
                partial.chmod(0o755)
                partial.rename(hook)
            settings["core.hooksPath"] = str(hook.parent)
        return settings


# ---------------------------------------------------------------------------
# one request
# ---------------------------------------------------------------------------


class RefusedError(Exception):
    """The request is answered without git."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.answer = Answer(status, (text + "\n").encode(), headers, "text/plain; charset=utf-8")


class CutError(Exception):
    """The connection is to be reset."""


class GitHandler(Handler):
    """One connection, with or without TLS."""

    server: GitServer
    drained = False

    def setup(self) -> None:
        context = self.server.tls
        if context is not None and self.request.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
            self.request = context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def handle_any(self) -> None:
        """One request. Its credentials do not get into its record."""
        self.drained = False
        path, _, query = self.path.partition("?")
        headers = {name.lower(): text for name, text in self.headers.items()}
        authorization = headers.pop("authorization", None)
        if authorization is not None:
            headers["authorization"] = CREDENTIALS_PLACEHOLDER
        request = Request(self.command, path, query, headers)
        request.entry = self.server.service.note(request)
        fault = self.server.service.faults.meet(self.command, path) or Fault("none")
        if fault.effect != "none":
            request.entry["fault"] = fault.effect
        try:
            self.answer(request, authorization, fault)
        except RefusedError as refused:
            self.drain()
            self.server.service.settle(request, status=refused.answer.status)
            self.send(refused.answer)
        except CutError:
            self.reset_connection(request)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = handle_any  # noqa: N815

    def answer(self, request: Request, authorization: str | None, fault: Fault) -> None:
        """Raises RefusedError and CutError."""
        if fault.effect == "reset_before_body":
            raise CutError
        if fault.effect in WITHOUT_ACTING and not (fault.effect == "hang" and fault.act):
            self.drain()
            FAULTY[fault.effect](self, fault, request)
            return
        simulator, action = self.admit(request, authorization)
        try:
            path = self.server.hub.repository(simulator)
        except HubError as error:
            raise RefusedError(500, str(error)) from error
        if fault.effect == "latency":
            self.server.service.stopping.wait(fault.seconds)
        cut = fault.bytes if fault.effect == "cut_upload" else 0
        with Exchange(self, self.environment(request, path, action), self.server.hub.limits.body, cut) as git:
            try:
                git.deliver(AnswerWriter(self, request, fault))
            finally:
                self.server.service.settle(request, received=git.received, sent=git.sent)

    def admit(self, request: Request, authorization: str | None) -> tuple[Simulator, str]:
        """The simulator and the git action that a request names. Raises RefusedError."""
        if not self.knows(authorization):
            raise RefusedError(401, "Unauthorized", **REALM)
        owner, name, action = split_path(request.path)
        query = dict(urllib.parse.parse_qsl(request.query))
        service = query.get("service", "") if action == "info/refs" else action
        simulator = self.server.hub.find(owner, name)
        if service not in SERVICES or simulator is None:
            raise RefusedError(404, "Not found.")
        expected = "GET" if action == "info/refs" else "POST"
        if self.command != expected:
            raise RefusedError(405, "Method not allowed", allow=expected)
        if simulator.access == "none" or (simulator.access == "read" and service == "git-receive-pack"):
            raise RefusedError(403, "User permission denied")
        limit = self.server.hub.limits.body
        if limit and self.length() > limit:
            raise RefusedError(413, "Request Entity Too Large")
        return simulator, action

    def knows(self, authorization: str | None) -> bool:
        """Whether these are the credentials, in UTF-8."""
        kind, _, text = (authorization or "").partition(" ")
        try:
            given = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        right = f"{self.server.hub.username}:{self.server.hub.password}".encode()
        return kind.lower() == "basic" and hmac.compare_digest(given, right)

    def environment(self, request: Request, path: Path, action: str) -> dict[str, str]:
        """The variables of the CGI interface.

        Without CONTENT_LENGTH git reads a body to its end; with it, it would wait for ever, and busily,
        for the rest of one that was cut off.
        """
        return {
            **git_environment(self.server.settings()),
            "GIT_PROJECT_ROOT": str(path.parent),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": f"/{path.name}/{action}",
            "REQUEST_METHOD": self.command,
            "QUERY_STRING": request.query,
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
            "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
            "REMOTE_USER": "plato",
            "REMOTE_ADDR": "127.0.0.1",
        }

    # -- the body of the request --

    def length(self) -> int:
        """The announced length of the body; 0 when it is chunked. Raises RefusedError."""
        text = self.headers.get("Content-Length") or "0"
        if not text.isdigit():
            self.close_connection = True
            raise RefusedError(400, "Bad Request")
        return int(text)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes, of a known length or chunked. Raises ConnectionError."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self.exactly(self.length())
            return
        while True:
            try:
                length = int(self.rfile.readline(64).partition(b";")[0], 16)
            except ValueError:
                raise ConnectionResetError("the client left in the middle of its request") from None
            yield from self.exactly(length)
            self.rfile.readline(8)
            if length == 0:
                return

    def exactly(self, length: int) -> Iterator[bytes]:
        while length > 0:
            piece = self.read_exactly(min(length, CHUNK))
            length -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read what the client still sends of a body that nobody wants, so that it can read the answer."""
        if not self.drained:
            self.drained = True
            try:
                for _ in self.pieces():
                    pass
            except RefusedError:
                self.close_connection = True


class AnswerWriter:
    """Git's answer on its way to the client, chunked; with a fault it goes wrong."""

    def __init__(self, handler: GitHandler, request: Request, fault: Fault) -> None:
        self.handler = handler
        self.request = request
        self.fault = fault
        self.left = fault.bytes

    def open(self, status: int, headers: dict[str, str]) -> None:
        """Send the head."""
        if self.fault.effect in ("lost_answer", "hang"):
            return
        self.handler.server.service.settle(self.request, status=status)
        kind = headers.get("content-type", "text/plain")
        others = {name: text for name, text in headers.items() if name not in ("content-type", "status")}
        if self.fault.effect == "content_type":
            kind = {name.lower(): text for name, text in self.fault.headers.items()}.get("content-type", kind)
        answer = Answer(status, b"", {**others, "transfer-encoding": "chunked"}, kind)
        self.handler.wfile.write(self.handler.head(answer).replace(b"content-length: 0\r\n", b""))

    def write(self, piece: bytes) -> None:
        """Send a piece; an empty one is the end. Raises CutError, and ConnectionError when it was cut off."""
        effect = self.fault.effect
        if effect == "lost_answer":
            if not piece:
                raise CutError
        elif effect == "hang":
            if not piece:
                FAULTY["hang"](self.handler, Fault("hang"), self.request)
        elif effect == "drip" and piece:
            for position in range(len(piece)):
                self.chunk(piece[position : position + 1])
                self.handler.server.service.stopping.wait(self.fault.seconds / len(piece))
        elif effect == "truncate" and (self.left < len(piece) or not piece):
            self.handler.wfile.write(b"%x\r\n%s" % (max(1, len(piece)), piece[: self.left]))
            self.handler.connection.shutdown(socket.SHUT_WR)
            raise BrokenPipeError("cut off (fault)")
        else:
            self.left -= len(piece)
            self.chunk(piece)

    def chunk(self, piece: bytes) -> None:
        self.handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))


class Exchange:
    """One run of git's backend: a thread feeds it the request's body while its answer is delivered."""

    def __init__(self, handler: GitHandler, environment: dict[str, str], limit: int, cut: int) -> None:
        self.handler = handler
        self.limit = limit
        self.cut = cut
        self.received = self.sent = 0
        self.failure: Exception | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            ["git", "http-backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        handler.drained = True
        self.fed = threading.Event()
        self.feeder = threading.Thread(target=self.feed, daemon=True)

    def __enter__(self) -> Exchange:  # noqa: PYI034 - Self is not in Python 3.9
        self.feeder.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Let git end, which it does without its pipes.

        A push that was cut off takes back what it has written, but not when it dies of saying so: what it
        says is read. A fetch has more to say, and just dies.
        """
        if self.feeder.is_alive():
            try:
                self.handler.connection.shutdown(socket.SHUT_RD)
            except OSError:
                pass
            self.feeder.join()
        stdout = cast("io.BufferedReader", self.process.stdout)
        rest = 0
        while rest < REST_BYTES:
            piece = stdout.read1(CHUNK)
            rest += len(piece)
            if not piece:
                break
        stdout.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()

    def feed(self) -> None:
        """The feeder's thread: carry the body, and see to its limits."""
        assert self.process.stdin is not None
        target: IO[bytes] | None = self.process.stdin
        try:
            for piece in self.handler.pieces():
                self.received += len(piece)
                if self.cut and self.received >= self.cut:
                    raise CutError
                if self.limit and self.received > self.limit:
                    self.failure = RefusedError(413, "Request Entity Too Large")
                    close_quietly(target)
                    target = None
                if target is not None and not hand_on(target, piece):
                    target = None
        except (CutError, RefusedError, OSError, ValueError) as error:
            self.failure = error if isinstance(error, RefusedError) else CutError(str(error))
        finally:
            close_quietly(target)
            self.fed.set()

    def deliver(self, writer: AnswerWriter) -> None:
        """Write git's answer. It is held back until the body is in: that may be refused to the last byte."""
        stdout = cast("io.BufferedReader", self.process.stdout)
        status, headers = read_head(stdout)
        held: list[bytes] = []
        is_open = False
        while True:
            piece = stdout.read1(CHUNK)
            self.sent += len(piece)
            held.append(piece)
            if not piece:
                self.feeder.join()
            if is_open or self.fed.is_set() or self.sent > HELD_BYTES:
                if self.failure is not None:
                    raise CutError if is_open else self.failure
                if not is_open:
                    self.check_head(status)
                    writer.open(status, headers)
                    is_open = True
                for part in held:
                    writer.write(part)
                held.clear()
            if not piece:
                return

    def check_head(self, status: int) -> None:
        """Raises RefusedError when git has not even begun an answer."""
        if status == 0:
            self.errors.seek(0)
            text = self.errors.read().decode("utf-8", "replace").strip()
            raise RefusedError(500, f"git http-backend failed: {text[-500:]}")


def hand_on(target: IO[bytes], piece: bytes) -> bool:
    """Give git a piece; whether it takes more."""
    try:
        target.write(piece)
        return True
    except BrokenPipeError:
        close_quietly(target)
        return False


def close_quietly(target: IO[bytes] | None) -> None:
    if target is not None:
        try:
            target.close()
        except BrokenPipeError:
            pass


def read_head(stream: io.BufferedReader) -> tuple[int, dict[str, str]]:
    """Status and headers of a CGI answer; status 0 when there is none."""
    headers: dict[str, str] = {}
    while True:
        line = stream.readline()
        if not line:
            return 0, {}
        if line in (b"\r\n", b"\n"):
            return int(headers.get("status", "200").split()[0]), headers
        name, _, text = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = text.strip()


def split_path(path: str) -> tuple[str, str, str]:
    """`/<owner>/<name>.git/<action>` in its parts. Raises RefusedError."""
    parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
    if len(parts) < 3:
        raise RefusedError(404, "Not found.")
    name = parts[1][:-4] if parts[1].lower().endswith(".git") else parts[1]
    return parts[0], name, "/".join(parts[2:])


# ---------------------------------------------------------------------------
# inside the VMs
# ---------------------------------------------------------------------------


class Outlet:
    """The server's port on the loopback of a VM: the same address leads to the same server everywhere."""

    def __init__(self, machine: Machine, server: GitServer) -> None:
        _, descriptors = machine.request({"op": "socket", "family": int(socket.AF_INET)})
        self.server = server
        self.listener = socket.socket(fileno=descriptors[0])
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", server.server_port))
        self.listener.listen(BACKLOG)
        threading.Thread(target=self.accept, name=f"hub {machine.name}", daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, address = self.listener.accept()
            except OSError:
                return
            self.server.process_request(connection, address)

    def close(self) -> None:
        close_listener(self.listener)
