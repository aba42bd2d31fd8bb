"""Public URLs: a loopback port of the host that leads to a web application in a VM."""

from __future__ import annotations

import socket
import threading
from typing import Callable

from .gateway import close_listener, listen
from .relay import PlainStream, relay

REQUEST_SECONDS = 5.0
HEAD_LIMIT = 1 << 16
PAGE = """\
<!doctype html>
<html><head><meta charset="utf-8"><title>502 Bad Gateway</title></head>
<body><h1>502 Bad Gateway</h1><p>{reason}</p></body></html>
"""

Connect = Callable[[], socket.socket]


class Door:
    """A listener whose connections lead into a VM. `connect` raises OSError when nobody listens there."""

    def __init__(self, connect: Connect) -> None:
        self.connect = connect
        self.listener = listen(0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self) -> None:
        close_listener(self.listener)

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        try:
            target = self.connect()
        except OSError as error:
            with connection:
                refuse(connection, str(error))
            return
        relay(PlainStream(connection), PlainStream(target, far=True))


def refuse(connection: socket.socket, reason: str) -> None:
    """Answer 502 to one request, after its head has come."""
    body = PAGE.format(reason=reason).encode()
    head = (
        "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    connection.settimeout(REQUEST_SECONDS)
    received = b""
    try:
        while b"\r\n\r\n" not in received and len(received) < HEAD_LIMIT:
            part = connection.recv(4096)
            if not part:
                return
            received += part
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    except OSError:
        pass
