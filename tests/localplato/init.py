"""PID 1 of a VM of the local Plato.

`machine.py` starts this file in new namespaces with one argument: the number of an inherited socket. It reads
the VM's settings from it, gives the VM its own files, /proc, /dev, loopback and host name, answers `ready`,
and then serves requests until the socket closes, which ends the VM and every process in it.

A message is a four byte length and that many bytes of JSON; file descriptors ride on the length. Requests,
each with an "id" that comes back in the answer:

    run         argv, env, cwd, uid, gid, and three descriptors: answers "pid", and "exit" when it has ended
    signal      pid, signal: to the process group of a command started by `run`
    socket      family: answers a new TCP socket of the VM's network, not yet connected
    listen      path, gid, mode: answers a Unix socket of root and that group that listens at the path
    processes   answers every process of the VM but this one
    freeze      stops every process of the VM but this one; what `run` starts from now on is born stopped
    thaw        lets go on what `freeze` has stopped

With the argument `try` it only tries what a VM needs of its host, and says what it is not allowed.

This file imports nothing of ours, so that it runs by its path with `python -I`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import resource
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, Callable

HEADER = struct.Struct("!I")
MAXIMUM_DESCRIPTORS = 8
OPEN_FILES = 1024
BACKLOG = 128
FREEZE_SECONDS = 5.0

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1024, 2048, 1 << 21
MOUNT_OPTIONS = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
}
STATVFS_FLAGS = {
    os.ST_NOSUID: MS_NOSUID,
    os.ST_NOEXEC: MS_NOEXEC,
    os.ST_NOATIME: MS_NOATIME,
    os.ST_NODIRATIME: MS_NODIRATIME,
    os.ST_RELATIME: MS_RELATIME,
}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
STOPPED, DEAD = "Tt", "ZX"
READ_ONLY_PROC = ("bus", "fs", "irq", "sys", "sysrq-trigger")
# Nothing in a VM may load modules, touch raw devices or mounts, reboot, set the clock or make device nodes.
CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_ADMIN, CAP_SYS_BOOT, CAP_SYS_TIME, CAP_MKNOD = 16, 17, 21, 22, 25, 27
DROPPED_CAPABILITIES = (CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_ADMIN, CAP_SYS_BOOT, CAP_SYS_TIME, CAP_MKNOD)
PR_CAPBSET_DROP = 24
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


# ---------------------------------------------------------------------------
# messages
# ---------------------------------------------------------------------------


def send_message(channel: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message. The descriptors stay open here; the other side gets copies."""
    body = json.dumps(message).encode()
    header = HEADER.pack(len(body))
    if descriptors:
        socket.send_fds(channel, [header], list(descriptors))
    else:
        channel.sendall(header)
    channel.sendall(body)


def receive_message(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one message and its descriptors, or None when the other side has closed."""
    try:
        header, descriptors, _, _ = socket.recv_fds(channel, HEADER.size, MAXIMUM_DESCRIPTORS)
        header += receive_exactly(channel, HEADER.size - len(header)) if header else b""
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        body = receive_exactly(channel, length)
    except ConnectionError:
        return None
    if len(body) < length:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return json.loads(body), list(descriptors)


def receive_exactly(channel: socket.socket, length: int) -> bytes:
    """Receive that many bytes, or fewer when the other side has closed."""
    parts: list[bytes] = []
    while length > 0:
        part = channel.recv(min(length, 1 << 20))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------------------
# the VM's own world
# ---------------------------------------------------------------------------


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2); raises OSError with the target's name."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode() or None
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def host_mounts() -> list[tuple[str, int]]:
    """Every mount point of this mount namespace with the flags that a remount must keep."""
    mounts: list[tuple[str, int]] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            flags = 0
            for option in fields[5].split(","):
                flags |= MOUNT_OPTIONS.get(option, 0)
            mounts.append((unescape(fields[4]), flags))
    return mounts


def unescape(text: str) -> str:
    """A path of mountinfo, which writes spaces and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def protect_host() -> None:
    """Make every file system of the host read-only in here; the VM's own are mounted afterwards."""
    for path, flags in host_mounts():
        if path == "/proc" or path.startswith(("/proc/", "/dev/")) or path == "/dev":
            continue
        try:
            mount("none", path, "none", flags | MS_REMOUNT | MS_BIND | MS_RDONLY)
        except OSError as error:
            # A mount hidden by a later one cannot be named, and cannot be reached either.
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EACCES, errno.EPERM):
                raise


def lay_over(overlays: dict[str, str]) -> None:
    """Let layers add names to directories of the host, or hide some: {directory: layer}."""
    for directory, layer in overlays.items():
        mount("overlay", directory, "overlay", 0, f"lowerdir={layer}:{directory}")


def cover_etc(directory: str) -> None:
    """Lay the VM's account files over the host's /etc, for its own to be mounted over those.

    A mount over a file of the host goes when the host puts another file in its place, as `useradd` does.
    """
    try:
        lay_over({"/etc": os.path.join(directory, "etc")})
    except OSError:
        pass  # an ordinary user may not everywhere; then such a change is seen in the VM


def open_host_files(shown: dict[str, str]) -> dict[str, int]:
    """Files of the host that are to be seen, opened before the VM's own files hide them."""
    return {target: os.open(source, os.O_PATH) for target, source in shown.items()}


def show_host_files(opened: dict[str, int]) -> None:
    """Mount them, read-only as all of the host."""
    for target, descriptor in opened.items():
        mount(f"/proc/self/fd/{descriptor}", target, "none", MS_BIND)
        mount("none", target, "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.close(descriptor)


def bind_own_files(directory: str, binds: dict[str, str]) -> None:
    """Mount what lies in the VM's directory over the host's files: {path in the VM: name in the directory}.

    All are opened first, since a mount over /tmp or /home may hide the VM's directory itself.
    """
    opened = [(target, os.open(os.path.join(directory, name), os.O_PATH)) for target, name in binds.items()]
    for target, descriptor in opened:
        if os.path.exists(target):
            mount(f"/proc/self/fd/{descriptor}", target, "none", MS_BIND)
            make_writable(target, descriptor)
        elif os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise FileNotFoundError(errno.ENOENT, "a VM needs this directory on the host", target)
        os.close(descriptor)


def make_writable(target: str, source: int) -> None:
    """Undo `protect_host` for a mount of the VM's own, and lift what else the host's mount forbids."""
    try:
        mount("none", target, "none", MS_REMOUNT | MS_BIND | MS_NODEV)
    except PermissionError:
        # An ordinary user may not lift it, only keep it.
        kept = sum(flag for option, flag in STATVFS_FLAGS.items() if os.fstatvfs(source).f_flag & option)
        mount("none", target, "none", MS_REMOUNT | MS_BIND | MS_NODEV | kept)


def mount_devices() -> None:
    """A /dev with the harmless devices only, its own terminals and its own shared memory."""
    opened = {name: os.open("/dev/" + name, os.O_PATH) for name in DEVICES if os.path.exists("/dev/" + name)}
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name, descriptor in opened.items():
        os.close(os.open("/dev/" + name, os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/proc/self/fd/{descriptor}", "/dev/" + name, "none", MS_BIND)
        os.close(descriptor)
    os.mkdir("/dev/pts")
    os.mkdir("/dev/shm")
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    os.symlink("pts/ptmx", "/dev/ptmx")
    for name, target in (
        ("fd", "self/fd"),
        ("stdin", "self/fd/0"),
        ("stdout", "self/fd/1"),
        ("stderr", "self/fd/2"),
    ):
        os.symlink("/proc/" + target, "/dev/" + name)


def mount_proc() -> None:
    """The VM's own /proc, without the switches of the host's kernel."""
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in READ_ONLY_PROC:
        path = "/proc/" + name
        if os.path.exists(path):
            mount(path, path, "none", MS_BIND)
            mount("none", path, "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def bring_loopback_up() -> None:
    """127.0.0.1 and ::1 work in the VM; there is no other network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def try_host() -> int:
    """Do in new namespaces what a host may not allow; the last line on standard error says what it was."""
    for step in (bring_loopback_up, protect_host, mount_devices, mount_proc):
        try:
            step()
        except OSError as error:
            print(f"{step.__name__}: {error}", file=sys.stderr)
            return 1
    return 0


def drop_capabilities() -> None:
    """What PID 1 starts can never have these again, whoever it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in DROPPED_CAPABILITIES:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def set_up(settings: dict[str, Any]) -> None:
    """Turn the new namespaces into this VM."""
    os.umask(0o022)
    # The server needs many more open files than programs in a VM should be used to.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    socket.sethostname(settings["hostname"])
    bring_loopback_up()
    lay_over(settings["overlays"])
    cover_etc(settings["directory"])
    protect_host()
    shown = open_host_files(settings["shown"])
    bind_own_files(settings["directory"], settings["binds"])
    show_host_files(shown)
    mount_devices()
    mount_proc()
    os.chdir("/")
    drop_capabilities()


# ---------------------------------------------------------------------------
# requests
# ---------------------------------------------------------------------------


def run_child(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """In the forked child: become the command, or exit as a shell does when it cannot start one."""
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    try:
        if request["gid"] is not None:
            os.setgroups([request["gid"]])
            os.setgid(request["gid"])
        if request["uid"] is not None:
            os.setuid(request["uid"])
        os.chdir(request["cwd"])
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except OSError as error:
        os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)


def list_processes() -> list[dict[str, Any]]:
    """Every process of the VM but this one: pid, parent, state letter and command line."""
    processes: list[dict[str, Any]] = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            with open(f"/proc/{name}/cmdline", "rb") as binary:
                argv = binary.read().decode("utf-8", "replace").rstrip("\0").split("\0")
        except OSError:
            continue
        processes.append({"pid": int(name), "parent": int(parent), "state": state, "argv": argv})
    return processes


def is_frozen(pid: int) -> bool:
    """Whether a process is in a paused container, where it neither runs nor becomes stopped."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        for _, controllers, path in groups:
            place, mark = f"/sys/fs/cgroup{path}/cgroup.events", "frozen 1"
            if controllers == "freezer":
                place, mark = f"/sys/fs/cgroup/freezer{path}/freezer.state", "FROZEN"
            if controllers in ("", "freezer") and os.path.exists(place):
                with open(place, encoding="utf-8") as file:
                    return mark in file.read().splitlines()
    except OSError:
        pass
    return False


def stop_processes() -> set[int]:
    """Stop every process of the VM but this one; those that were stopped before."""
    before = {process["pid"] for process in list_processes() if process["state"] in STOPPED}
    deadline = time.monotonic() + FREEZE_SECONDS
    while True:
        living = [process for process in list_processes() if process["state"] not in STOPPED + DEAD]
        moving = [process["pid"] for process in living if not is_frozen(process["pid"])]
        # One that waits for a disk stops when it gets on, before it does anything else.
        if not moving or time.monotonic() > deadline:
            return before
        for pid in moving:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.001)


def continue_processes(without: set[int]) -> None:
    """Let stopped processes go on, children before parents: a shell is not to see that they were stopped."""
    processes = list_processes()
    parents = {process["pid"]: process["parent"] for process in processes}

    def depth(pid: int) -> int:
        return 1 + depth(parents[pid]) if pid in parents else 0

    for pid in sorted(set(parents) - without, key=depth, reverse=True):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Init:
    """Serves the requests that come over the socket, and reaps every process of the VM."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.commands: dict[int, int] = {}  # pid -> id of the `run` request
        self.stopped_before: set[int] | None = None  # while frozen: what was stopped already
        self.wakeup, wakeup_writer = socket.socketpair()
        self.wakeup.setblocking(False)
        wakeup_writer.setblocking(False)
        self.wakeup_writer = wakeup_writer
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup_writer.fileno())

    def serve(self) -> None:
        """Until the server closes the socket, or is gone."""
        selector = selectors.DefaultSelector()
        selector.register(self.channel, selectors.EVENT_READ)
        selector.register(self.wakeup, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if self.wakeup in ready:
                self.wakeup.recv(4096)
                self.reap()
            if self.channel in ready:
                received = receive_message(self.channel)
                if received is None:
                    return
                self.answer(*received)

    def answer(self, request: dict[str, Any], descriptors: list[int]) -> None:
        operations: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            "run": self.run,
            "signal": self.signal,
            "socket": self.socket,
            "listen": self.listen,
            "processes": self.processes,
            "freeze": self.freeze,
            "thaw": self.thaw,
        }
        try:
            operations[request["op"]](request, descriptors)
        except OSError as error:
            send_message(self.channel, {"id": request["id"], "error": str(error)})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def run(self, request: dict[str, Any], descriptors: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                if self.stopped_before is not None:
                    os.kill(os.getpid(), signal.SIGSTOP)
                run_child(request, descriptors)
            finally:
                os._exit(126)
        self.commands[pid] = request["id"]
        send_message(self.channel, {"id": request["id"], "pid": pid})

    def signal(self, request: dict[str, Any], descriptors: list[int]) -> None:
        try:
            os.killpg(request["pid"], request["signal"])
        except ProcessLookupError:
            pass
        send_message(self.channel, {"id": request["id"]})

    def socket(self, request: dict[str, Any], descriptors: list[int]) -> None:
        with socket.socket(request["family"], socket.SOCK_STREAM) as fresh:
            send_message(self.channel, {"id": request["id"]}, [fresh.fileno()])

    def listen(self, request: dict[str, Any], descriptors: list[int]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(request["path"])
            os.chown(request["path"], 0, request["gid"])
            os.chmod(request["path"], request["mode"])
            listener.listen(BACKLOG)
            send_message(self.channel, {"id": request["id"]}, [listener.fileno()])

    def processes(self, request: dict[str, Any], descriptors: list[int]) -> None:
        send_message(self.channel, {"id": request["id"], "processes": list_processes()})

    def freeze(self, request: dict[str, Any], descriptors: list[int]) -> None:
        self.stopped_before = stop_processes()
        send_message(self.channel, {"id": request["id"]})

    def thaw(self, request: dict[str, Any], descriptors: list[int]) -> None:
        if self.stopped_before is not None:
            continue_processes(self.stopped_before)
        self.stopped_before = None
        send_message(self.channel, {"id": request["id"]})

    def reap(self) -> None:
        """Collect the dead: report the commands, forget the orphans."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            identifier = self.commands.pop(pid, None)
            if identifier is not None:
                send_message(
                    self.channel,
                    {
                        "id": identifier,
                        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
                    },
                )


def main() -> int:
    """Set the VM up and serve; the exit of this process is the end of the VM."""
    if sys.argv[1] == "try":
        return try_host()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    received = receive_message(channel)
    if received is None:
        return 1
    try:
        set_up(received[0])
    except OSError as error:
        traceback.print_exc()
        send_message(channel, {"event": "failed", "error": str(error)})
        return 1
    try:
        init = Init(channel)
        send_message(channel, {"event": "ready"})
        init.serve()
    except ConnectionError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
