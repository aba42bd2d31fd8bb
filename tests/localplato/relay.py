"""Carries bytes both ways between two streams, one of which may be TLS, and the end of each direction too."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from typing import Callable

CHUNK = 1 << 16
BUFFER_LIMIT = 1 << 18
HANDSHAKE_SECONDS = 15.0
REST_SECONDS = 10.0


class StreamResetError(Exception):
    """A stream ended without saying so properly, or was `cut` on purpose."""

    cut = False


class StreamCutError(StreamResetError):
    """The line is to be cut at once: bytes on their way are lost."""

    cut = True


def reset_when_closed(connection: socket.socket) -> None:
    """Let the end of a TCP connection be a reset instead of an orderly one."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass


def reset(connection: socket.socket) -> None:
    """Close a TCP connection with a reset."""
    reset_when_closed(connection)
    connection.close()


class PlainStream:
    """A socket as one side of a relay.

    `far` is the side of the VM: it may stop reading before it has said everything, which is no error.
    """

    def __init__(self, connection: socket.socket, far: bool = False) -> None:
        self.connection = connection
        self.far = far
        connection.setblocking(False)
        self.output = bytearray()
        self.input_ended = False
        self.ending = False
        self.output_ended = False

    def receive(self) -> bytes | None:
        """The bytes that have come; empty at the end, None when there are none yet. Or StreamResetError."""
        data = self.receive_raw()
        self.input_ended = data == b""
        return data

    def receive_raw(self) -> bytes | None:
        try:
            return self.connection.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise StreamResetError(str(error)) from error

    def send(self, data: bytes) -> None:
        """Queue bytes, to be sent by `flush`."""
        if not self.output_ended:
            self.output += data

    def end(self) -> None:
        """Queue the end of this direction."""
        self.ending = True

    def flush(self) -> None:
        """Send as much of the queue as the socket takes. Raises StreamResetError."""
        try:
            while self.output:
                sent = self.connection.send(memoryview(self.output)[:CHUNK])
                del self.output[:sent]
            if self.ending and not self.output_ended:
                self.output_ended = True
                self.connection.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError as error:
            if not self.far:
                raise StreamResetError(str(error)) from error
            self.discard_output()

    def discard_output(self) -> None:
        """This side takes nothing more."""
        self.output.clear()
        self.ending = self.output_ended = True

    @property
    def full(self) -> bool:
        return len(self.output) >= BUFFER_LIMIT


class TlsStream(PlainStream):
    """The server's end of a TLS connection. TLS runs over memory: each direction can end by itself."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(connection)
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.decrypted = bytearray()

    def handshake(self) -> None:
        """Greet the client. Raises StreamResetError when it goes away, refuses us or is refused."""
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while True:
            try:
                self.tls.do_handshake()
                self.flush_tls()
                return
            except ssl.SSLWantReadError:
                self.flush_tls()
            except ssl.SSLError as error:
                self.flush_tls()
                raise StreamResetError(f"TLS handshake failed: {error.reason or error}") from error
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select_one(self.connection, remaining):
                raise StreamResetError("TLS handshake not done in time")
            if not self.feed():
                raise StreamResetError("the client left during the TLS handshake")

    def flush_tls(self) -> None:
        self.output += self.outgoing.read()
        self.flush()

    def feed(self) -> bool | None:
        """Hand what the socket has to TLS: True for bytes, False at the end, None when there are none yet."""
        data = self.receive_raw()
        if data:
            self.incoming.write(data)
        return None if data is None else bool(data)

    def receive(self) -> bytes | None:
        while True:
            if self.decrypted:
                data, self.decrypted = bytes(self.decrypted), bytearray()
                return data
            try:
                data = self.tls.read(CHUNK)
                self.input_ended = data == b""
                return data
            except ssl.SSLWantReadError:
                fed = self.feed()
                if fed is None:
                    return None
                # A client that only ends its TCP direction has still said that it sends nothing more. TLS
                # must not hear of it: OpenSSL would then refuse to send what the client is still to get.
                self.input_ended = not fed
                if self.input_ended:
                    return b""
            except ssl.SSLZeroReturnError:
                self.input_ended = True
                return b""
            except ssl.SSLError as error:
                raise StreamResetError(str(error)) from error
            finally:
                self.output += self.outgoing.read()

    def send(self, data: bytes) -> None:
        try:
            self.tls.write(data)
        except ssl.SSLError as error:
            raise StreamResetError(str(error)) from error
        self.output += self.outgoing.read()

    def end(self) -> None:
        """Say "nothing more" in TLS; what the client still sends can be read afterwards."""
        try:
            # OpenSSL takes data that waits to be read for an error here.
            while True:
                data = self.tls.read(CHUNK)
                if not data:
                    break
                self.decrypted += data
        except ssl.SSLError:
            pass
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass
        self.output += self.outgoing.read()
        self.ending = True


def select_one(connection: socket.socket, timeout: float) -> bool:
    """Wait until a socket can be read."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def move(source: PlainStream, target: PlainStream, count: Callable[[int], None]) -> bool:
    """Carry what is there from source to target, and the end; whether anything moved, or can move now."""
    moved, was_full = False, target.full
    while not source.input_ended and not target.full:
        data = source.receive()
        if data is None:
            break
        moved = True
        if data:
            count(len(data))
            target.send(data)
    if source.input_ended and not target.ending:
        target.end()
        moved = True
    target.flush()
    # What TLS has decrypted while the target was full shows in no socket that could be waited for.
    return moved or (was_full and not target.full)


def relay(left: PlainStream, right: PlainStream, count: Callable[[int], None] = lambda length: None) -> None:
    """Carry bytes both ways until both directions have ended, and close both. A reset is passed on.

    `count` is called with the length of every piece, and may raise StreamCutError to cut the line.
    """
    sides = (left, right)
    try:
        while not all(side.output_ended and side.input_ended for side in sides):
            if not (move(left, right, count) | move(right, left, count)):
                wait(left, right)
    except StreamResetError as error:
        if not error.cut:
            deliver_rest(left)
        for side in sides:
            reset(side.connection)
    finally:
        for side in sides:
            side.connection.close()


def deliver_rest(client: PlainStream) -> None:
    """After the far side broke off: give the client what was already on its way to it."""
    deadline = time.monotonic() + REST_SECONDS
    try:
        client.flush()
        while client.output and time.monotonic() < deadline:
            poll = select.poll()
            poll.register(client.connection, select.POLLOUT)
            poll.poll(1000)
            client.flush()
    except StreamResetError:
        pass


def wait(left: PlainStream, right: PlainStream) -> None:
    """Wait until one of the two can go on, and note a side that is closed for good."""
    poll = select.poll()
    for side, other in ((left, right), (right, left)):
        events = 0
        if not side.input_ended and not other.full:
            events |= select.POLLIN
        if side.output:
            events |= select.POLLOUT
        if events or side.input_ended:
            poll.register(side.connection, events)
    for descriptor, event in poll.poll():
        side, other = (left, right) if left.connection.fileno() == descriptor else (right, left)
        if event & (select.POLLHUP | select.POLLERR) and side.input_ended:
            # Both of its directions are over: what it should still get cannot arrive.
            side.discard_output()
            other.input_ended = True
