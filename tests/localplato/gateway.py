"""The TLS gateway: the server name `<job id>--<port>.<gateway host>` says which port of which VM.

It reaches no port of a VM before `connect_network` has connected it, and for some time after that does not
know the VM yet. A connection of that time opens, and then says nothing until its end: it does not come alive
when the VM becomes known.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Callable, Optional

from . import ssh
from .certificates import CertificateError, Certificates
from .machine import Machine, MachineError
from .relay import PlainStream, StreamCutError, StreamResetError, TlsStream, relay, reset, select_one

SSH_PORT = 22
BACKLOG = 512
LOG_LENGTH = 1000

SILENCE_LOOK_SECONDS = 0.5

FindMachine = Callable[[str], Optional[Machine]]
# Whether the gateway knows the VM of a job, or None when it was never connected.
Reachable = Callable[[str], Optional[bool]]


@dataclass
class Fault:
    """What goes wrong with the next `times` connections (negative: with all)."""

    effect: str  # "down": reset on accept; "reset": reset after that many bytes have passed
    after_bytes: int
    times: int


class Gateway:
    """One listener on loopback."""

    def __init__(
        self,
        certificates: Certificates,
        host: str,
        port: int,
        find_machine: FindMachine,
        reachable: Reachable,
        unconnected: str,
    ) -> None:
        self.certificates = certificates
        self.host = host
        self.find_machine = find_machine
        self.reachable = reachable
        self.unconnected = unconnected  # "silent" or "closed": connections to VMs that never were connected
        self.listener = listen(port)
        self.port: int = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self.log: deque[dict[str, object]] = deque(maxlen=LOG_LENGTH)
        self.fault: Fault | None = None
        self.served = 0

    def start(self) -> None:
        threading.Thread(target=self.accept, name="gateway", daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and cut the open ones."""
        close_listener(self.listener)
        with self.lock:
            connections = list(self.open)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """One connection, from the handshake to its end."""
        entry: dict[str, object] = {"time": time.time(), "name": None, "bytes": 0, "error": None}
        with self.lock:
            self.served += 1
            self.log.append(entry)
            self.open.add(connection)
        fault = self.take_fault()
        try:
            if fault is not None and fault.effect == "down":
                raise StreamResetError("the gateway is down (fault)")
            self.carry(connection, entry, fault)
        except (StreamResetError, MachineError, CertificateError, OSError) as error:
            entry["error"] = entry["error"] or str(error)
            reset(connection)
        finally:
            connection.close()
            with self.lock:
                self.open.discard(connection)

    def take_fault(self) -> Fault | None:
        with self.lock:
            fault = self.fault
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault

    def carry(self, connection: socket.socket, entry: dict[str, object], fault: Fault | None) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = TlsStream(connection, self.context(entry))
        stream.handshake()
        job_id, port = split_name(str(entry["name"]), self.host) or ("", 0)
        machine = self.find_machine(job_id)
        if machine is None:
            raise StreamResetError("the VM is gone")
        reachable = self.reachable(job_id)
        if not reachable:
            never = "the VM was never connected to the network"
            entry["error"] = never if reachable is None else "the gateway does not know the VM yet"
            if reachable is None and self.unconnected == "closed":
                raise StreamResetError(never)
            self.stay_silent(stream, job_id)
            return
        target = ssh.connect(machine) if port == SSH_PORT else machine.connect(port)
        passed = 0

        def count(length: int) -> None:
            nonlocal passed
            passed += length
            entry["bytes"] = passed
            if fault is not None and fault.effect == "reset" and passed >= fault.after_bytes:
                raise StreamCutError("cut (fault)")

        relay(stream, PlainStream(target, far=True), count)

    def stay_silent(self, stream: TlsStream, job_id: str) -> None:
        """Take what the client sends and answer nothing, until it leaves or the VM has ended."""
        while self.find_machine(job_id) is not None:
            if select_one(stream.connection, SILENCE_LOOK_SECONDS) and stream.receive_raw() == b"":
                return
        raise StreamResetError("the VM is gone")

    def context(self, entry: dict[str, object]) -> ssl.SSLContext:
        """A TLS context that takes the certificate of the server name, and refuses names of no living VM."""

        def choose(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
            entry["name"] = name
            parts = split_name(name or "", self.host)
            if name is None or parts is None or self.find_machine(parts[0]) is None:
                entry["error"] = "no living VM has this name"
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            try:
                tls.context = self.certificates.context(name)
            except CertificateError as error:
                entry["error"] = str(error)
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            return None

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = choose
        return context


def listen(port: int) -> socket.socket:
    """A listener on that port of 127.0.0.1, or on a free one when it is taken."""
    for wanted in (port, 0):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
            listener.listen(BACKLOG)
            return listener
        except OSError:
            listener.close()
    raise OSError("no free port on 127.0.0.1")


def close_listener(listener: socket.socket) -> None:
    """Close a listener; a thread that waits in accept() wakes up by the shutdown, not by the close."""
    try:
        listener.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    listener.close()


def split_name(name: str, host: str) -> tuple[str, int] | None:
    """`<job id>--<port>.<host>` as job id and port, or None."""
    label, dot, rest = name.lower().partition(".")
    job_id, dashes, port = label.rpartition("--")
    if not dot or rest != host or not dashes or not port.isdigit() or not 0 < int(port) < 65536:
        return None
    return job_id, int(port)
