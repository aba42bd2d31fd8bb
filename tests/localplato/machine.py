"""A VM: a directory with its own files, and real processes in their own namespaces.

`Machine` is the server's end of the socket to the VM's PID 1 (`init.py`). Where the host allows no
namespaces, a VM has no processes at all: they could reach the files, processes and ports of the host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable

from . import accounts
from .engine import Engine
from .init import receive_message, send_message

BOOT_LIMIT_SECONDS = 20.0
REPLY_LIMIT_SECONDS = 20.0
KILL_LIMIT_SECONDS = 5.0
BINDS = {
    "/home": "home",
    "/root": "root",
    "/tmp": "tmp",
    "/var/tmp": "var-tmp",
    "/run": "run",
    "/etc/passwd": "etc/passwd",
    "/etc/group": "etc/group",
    "/etc/shadow": "etc/shadow",
    "/etc/hostname": "etc/hostname",
    "/etc/hosts": "etc/hosts",
}
NO_PROCESSES = "the VM runs no processes: this local Plato has no namespaces for them"
# Where it says 1, as on Ubuntu, an ordinary user can make namespaces and may do nothing in them.
RESTRICTION = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
CONTAINER_OPTIONS = "--cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt apparmor=unconfined"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class MachineError(Exception):
    """A VM could not start, or is gone; the message says why."""


@dataclass(frozen=True)
class CommandResult:
    """What a command left: its two outputs, and its exit status (negative: the signal that ended it)."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    timed_out: bool


# ---------------------------------------------------------------------------
# what this host allows
# ---------------------------------------------------------------------------


def unshare_command() -> list[str]:
    """The command that starts a program as PID 1 of new namespaces, as root or as an ordinary user."""
    command = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--uts", "--ipc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    return [*command, "--"]


def init_command(argument: str) -> list[str]:
    """The command that runs `init.py`."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py")), argument]


@functools.cache
def namespaces_problem() -> str | None:
    """Why this host cannot give a VM its own namespaces, or None when it can."""
    if not sys.platform.startswith("linux"):
        return "VMs with their own file system and network need Linux"
    if shutil.which("unshare") is None:
        return "the unshare command is missing (package util-linux)"
    try:
        trial = subprocess.run(
            [*unshare_command(), *init_command("try")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unshare does not work here ({error})"
    if trial.returncode != 0:
        reason = (trial.stderr.strip().splitlines() or [f"status {trial.returncode}"])[-1]
        return f"this host does not allow namespaces ({reason})"
    return None


def namespaces_remedy(problem: str) -> str:
    """What would give the VMs of this host their own namespaces, with a line to paste."""
    if "util-linux" in problem:
        return "apt-get install util-linux"
    if "propagation: Invalid argument" in problem or "'/proc/" in problem:
        return "mount --bind DIR DIR && mount -t proc proc DIR/proc, before a chroot to DIR"
    if os.geteuid() == 0:
        return f"docker run {CONTAINER_OPTIONS} ..."
    alone = "to be root"
    if RESTRICTION.exists() and RESTRICTION.read_text().strip() == "1":
        alone = f"sudo sysctl -w kernel.{RESTRICTION.name}=0"
    return f"{alone}; in a container: docker run --user root {CONTAINER_OPTIONS} ..."


# ---------------------------------------------------------------------------
# the VM's files
# ---------------------------------------------------------------------------


def own(path: Path, uid: int, mode: int) -> None:
    """Set owner and mode; an ordinary user owns everything anyway."""
    if os.geteuid() == 0:
        os.chown(path, uid, uid)
    path.chmod(mode)


def create_directory(directory: Path, hostname: str) -> None:
    """Lay out an empty VM: the homes of root and plato, temporary directories and the account files."""
    for name, uid, mode in (
        ("home", 0, 0o755),
        ("home/plato", accounts.PLATO_UID, 0o755),
        ("root", 0, 0o700),
        ("tmp", 0, 0o1777),
        ("var-tmp", 0, 0o1777),
        ("run", 0, 0o755),
        ("run/sshd", 0, 0o755),
        ("etc", 0, 0o755),
    ):
        path = directory / name
        path.mkdir(parents=True, exist_ok=True)
        own(path, uid, mode)
    for name, text, mode in accounts.account_files(hostname, one_uid=os.geteuid() != 0):
        path = directory / "etc" / name
        path.write_text(text)
        own(path, 0, mode)


def remove_tree(directory: Path) -> None:
    """Remove a directory, also when a VM has left directories in it that its owner may not read."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        for parent, names, _ in os.walk(directory):
            for name in names:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    with contextlib.suppress(FileNotFoundError):
                        os.chmod(path, 0o700)
        shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------------------
# a running VM
# ---------------------------------------------------------------------------


class Command:
    """A command that runs in a VM; `exited` becomes its exit status."""

    def __init__(self, machine: Machine, identifier: int) -> None:
        self.machine = machine
        self.identifier = identifier
        self.pid = 0
        self.exited: concurrent.futures.Future[int] = concurrent.futures.Future()

    def signal_group(self, number: int) -> None:
        """Send a signal to the command and everything that it started and that stayed in its group."""
        self.machine.request({"op": "signal", "pid": self.pid, "signal": number})


Reply = tuple[dict[str, Any], list[int]]


class Machine:
    """A VM. Every method may be called from any thread.

    Set before the start: `shown`, files of the host to be seen in the VM read-only, by their paths there,
    where the VM's own files have a place for them; and `overlays`, layers that lie over directories of the
    host.
    """

    def __init__(
        self, name: str, directory: Path, hostname: str, isolated: bool, on_death: Callable[[Machine], None]
    ) -> None:
        self.name = name
        self.directory = directory
        self.hostname = hostname
        self.on_death = on_death
        self.isolated = isolated
        self.one_uid = os.geteuid() != 0
        self.console_path = directory / "console.log"
        self.shown: dict[str, str] = {}
        self.overlays: dict[str, str] = {}
        self.channel: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.alive = False
        self.lock = threading.Lock()
        self.next_identifier = 1
        self.replies: dict[int, concurrent.futures.Future[Reply]] = {}
        self.commands: dict[int, Command] = {}
        self.ssh_lock = threading.Lock()
        self.freeze_lock = threading.Lock()
        self.engine: Engine | None = None

    # -- life --

    def start(self) -> None:
        """Start PID 1 and wait until the VM's world is set up. Raises MachineError."""
        if not self.isolated:
            self.alive = True
            return
        ours, theirs = socket.socketpair()
        with theirs, open(self.console_path, "ab") as console:
            self.process = subprocess.Popen(
                [*unshare_command(), *init_command(str(theirs.fileno()))],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[theirs.fileno()],
                env={"PATH": PATH},
                cwd="/",
                start_new_session=True,
            )
        self.channel = ours
        settings = {
            "directory": str(self.directory),
            "hostname": self.hostname,
            "binds": BINDS,
            "shown": self.shown,
            "overlays": self.overlays,
        }
        ours.settimeout(BOOT_LIMIT_SECONDS)
        try:
            send_message(ours, settings)
            received = receive_message(ours)
        except OSError as error:
            received = ({"error": f"{error}"}, [])
        if received is None or received[0].get("event") != "ready":
            self.kill()
            reason = received[0].get("error") if received else "its PID 1 ended at once"
            raise MachineError(f"the VM did not start: {reason} (see {self.console_path})")
        ours.settimeout(None)
        self.alive = True
        threading.Thread(target=self.read_replies, name=f"machine {self.name}", daemon=True).start()

    def kill(self) -> None:
        """End the VM and every process in it, and wait until they are gone."""
        self.alive = False
        if self.channel is not None:
            try:
                self.channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.end_process()

    def end_process(self) -> None:
        """Kill PID 1. The kernel ends every process of the VM before unshare sees it gone, and ends too."""
        if self.process is None:
            return
        pid = self.pid
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            self.process.wait(KILL_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            # --kill-child: the death of unshare is the death of PID 1 too.
            self.process.kill()
            self.process.wait()
        if self.engine is not None:
            self.engine.close()

    @property
    def pid(self) -> int | None:
        """The process id, on the host, of the VM's PID 1."""
        if self.process is None or self.process.poll() is not None:
            return None
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def read_replies(self) -> None:
        """The machine's thread: hands every answer of PID 1 to whoever waits for it."""
        assert self.channel is not None
        while True:
            received = receive_message(self.channel)
            if received is None:
                break
            message, descriptors = received
            identifier = message["id"]
            with self.lock:
                command = self.commands.pop(identifier, None) if "exit" in message else None
                reply = None if "exit" in message else self.replies.pop(identifier, None)
            if command is not None:
                command.exited.set_result(message["exit"])
            elif reply is not None and reply.set_running_or_notify_cancel():
                reply.set_result((message, descriptors))
            else:
                for descriptor in descriptors:
                    os.close(descriptor)
        self.bury()

    def bury(self) -> None:
        """After the end: nobody waits for an answer any more."""
        died = self.alive
        self.alive = False
        if self.channel is not None:
            self.channel.close()
        with self.lock:
            replies, self.replies = self.replies, {}
            commands, self.commands = self.commands, {}
        for reply in replies.values():
            reply.set_exception(MachineError("the VM is gone"))
        for command in commands.values():
            command.exited.set_result(-signal.SIGKILL)
        if died:
            self.end_process()
            self.on_death(self)

    # -- requests --

    def request(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> Reply:
        """Send a request to PID 1 and wait for its answer. Raises MachineError."""
        if not self.isolated:
            raise MachineError(NO_PROCESSES)
        reply: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        with self.lock:
            if not self.alive or self.channel is None:
                raise MachineError("the VM is gone")
            identifier = message.setdefault("id", self.next_identifier)
            self.next_identifier = max(self.next_identifier, identifier) + 1
            self.replies[identifier] = reply
            try:
                send_message(self.channel, message, descriptors)
            except OSError as error:
                del self.replies[identifier]
                raise MachineError(f"the VM is gone ({error})") from error
        try:
            answer = reply.result(REPLY_LIMIT_SECONDS)
        except concurrent.futures.TimeoutError:
            raise MachineError("PID 1 of the VM does not answer") from None
        if "error" in answer[0]:
            raise MachineError(answer[0]["error"])
        return answer

    def spawn(
        self,
        argv: list[str],
        stdin: int,
        stdout: int,
        stderr: int,
        user: str = "root",
        environment: dict[str, str] | None = None,
    ) -> Command:
        """Start a command with these standard streams, as a user of the VM, in that user's home."""
        account = accounts.ACCOUNTS[user]
        keep_uid = self.one_uid or user == "root"
        with self.lock:
            command = Command(self, self.next_identifier)
            self.next_identifier += 1
            self.commands[command.identifier] = command
        message = {
            "op": "run",
            "id": command.identifier,
            "argv": argv,
            "env": {**accounts.environment(user, PATH), **(environment or {})},
            "cwd": account.home,
            "uid": None if keep_uid else account.uid,
            "gid": None if keep_uid else account.uid,
        }
        try:
            command.pid = self.request(message, (stdin, stdout, stderr))[0]["pid"]
        except MachineError:
            with self.lock:
                self.commands.pop(command.identifier, None)
            raise
        return command

    def connect(self, port: int, timeout: float = 5.0) -> socket.socket:
        """Connect to a TCP port of the VM's own loopback. Raises OSError when nothing listens there."""
        problem: OSError = ConnectionRefusedError(f"nothing listens on port {port} of the VM")
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                _, descriptors = self.request({"op": "socket", "family": int(family)})
            except MachineError as error:
                raise ConnectionRefusedError(str(error)) from error
            connection = socket.socket(fileno=descriptors[0])
            connection.settimeout(timeout)
            try:
                connection.connect((address, port))
            except OSError as error:
                connection.close()
                problem = problem if family == socket.AF_INET6 else error
                continue
            connection.settimeout(None)
            return connection
        raise problem

    def processes(self) -> list[dict[str, Any]]:
        """The processes of the VM but its PID 1, as `init.list_processes` gives them."""
        found: list[dict[str, Any]] = self.request({"op": "processes"})[0]["processes"]
        return found

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold every process of the VM still, those in containers too. Raises MachineError."""
        if not self.isolated:
            yield  # there are none
            return
        with self.freeze_lock:
            try:
                self.request({"op": "freeze"})
                yield
            finally:
                with contextlib.suppress(MachineError):
                    self.request({"op": "thaw"})

    # -- commands --

    def execute(
        self, command: str, timeout: float | None, user: str = "root", standard_input: bytes = b""
    ) -> CommandResult:
        """Run `sh -c COMMAND` to its end, or kill its whole group after `timeout` real seconds.

        As over SSH it ends only when its outputs are closed too: a background process must redirect them.
        """
        with open_spool(standard_input) as stdin, OutputReader() as stdout, OutputReader() as stderr:
            started = time.monotonic()
            running = self.spawn(
                ["/bin/sh", "-c", command], stdin.fileno(), stdout.writer, stderr.writer, user
            )
            stdout.start()
            stderr.start()
            timed_out = False
            try:
                exit_code = running.exited.result(timeout)
                for reader in (stdout, stderr):
                    remaining = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
                    reader.finish(remaining)
            except concurrent.futures.TimeoutError:
                timed_out = True
                exit_code = self.kill_command(running)
                stdout.finish(1.0, give_up=True)
                stderr.finish(1.0, give_up=True)
        return CommandResult(stdout.data(), stderr.data(), exit_code, timed_out)

    def kill_command(self, command: Command) -> int:
        """Kill a command's group; its exit status."""
        try:
            command.signal_group(signal.SIGKILL)
            return command.exited.result(REPLY_LIMIT_SECONDS)
        except (MachineError, concurrent.futures.TimeoutError):
            return -signal.SIGKILL


def open_spool(content: bytes) -> IO[bytes]:
    """A file to be read as a command's input; empty input is /dev/null."""
    if not content:
        return open(os.devnull, "rb")
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe:
        pipe.write(content)
    return open(reader, "rb")


class OutputReader:
    """A pipe that a command writes to and a thread that reads it to its end."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.parts: list[bytes] = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.started = False

    def __enter__(self) -> OutputReader:  # noqa: PYI034 - Self is not in Python 3.9
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.started:
            os.close(self.writer)
            os.close(self.reader)

    def start(self) -> None:
        """Leave the writing end to the command and read."""
        os.close(self.writer)
        self.started = True
        self.thread.start()

    def read(self) -> None:
        with open(self.reader, "rb", buffering=0) as pipe:
            while True:
                part = pipe.read(1 << 16)
                if not part:
                    return
                self.parts.append(part)

    def finish(self, timeout: float | None, give_up: bool = False) -> None:
        """Wait for the end of the output. Raises concurrent.futures.TimeoutError unless giving up is fine."""
        self.thread.join(timeout)
        if self.thread.is_alive() and not give_up:
            raise concurrent.futures.TimeoutError()

    def data(self) -> bytes:
        return b"".join(list(self.parts))
