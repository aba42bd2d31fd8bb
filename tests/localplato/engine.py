"""A VM's own Docker engine: the host's dockerd in the VM's namespaces, with its data in the VM's directory.

The socket exists from the VM's start; the first connection starts the engine (`keeper.py`), so that a VM that
never uses Docker does not pay for it. Its images come from a data root that was prepared once (`images.py`),
or from an artifact: the contents of their layers are mounted read-only, not copied.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from .accounts import PLATO_UID

if TYPE_CHECKING:
    from .machine import Machine

TESTS = Path(__file__).resolve().parent.parent
SOCKET = "docker.sock"
USER_SOCKET = "docker-user.sock"
API_SECONDS = 60.0
KEEPER_SECONDS = 15.0
STARTER = "import sys; sys.path.insert(0, sys.argv[1]); from localplato import keeper; keeper.main()"
PROGRAMS = {
    "dockerd": "docker.io",
    "containerd": "docker.io",
    "runc": "docker.io",
    "iptables": "iptables",
}
LAYERS = "overlay2"
ELSEWHERE = "layers.json"  # beside a saved data root
IMAGE_LAYERS = "image/overlay2/layerdb/sha256"


class EngineError(Exception):
    """The engine of a VM did not do what was asked; the message says why."""


# ---------------------------------------------------------------------------
# what this host allows
# ---------------------------------------------------------------------------


@functools.cache
def engine_problem() -> str | None:
    """Why VMs on this host have no Docker engine, or None when they have."""
    from .machine import PATH, namespaces_problem

    if not sys.platform.startswith("linux"):
        return "Docker in VMs needs Linux"
    if os.geteuid() != 0:
        return "Docker in VMs needs root: the local Plato runs as an ordinary user"
    problem = namespaces_problem()
    if problem is not None:
        return f"Docker in VMs needs namespaces: {problem}"
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=PATH) is None:
            return f"Docker in VMs needs {program}; on Debian: apt-get install {package}"
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers") and not os.path.ismount(
        "/sys/fs/cgroup/memory"
    ):
        return "Docker in VMs needs cgroups, which are not mounted at /sys/fs/cgroup"
    return None


# ---------------------------------------------------------------------------
# data roots
# ---------------------------------------------------------------------------


def copy_tree(source: Path, target: Path, *options: str) -> None:
    """Copy a directory with everything that it says about its files. Raises EngineError."""
    target.mkdir(parents=True, exist_ok=True)
    command = ["cp", "-a", "--reflink=auto", *options, f"{source}/.", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{source} could not be copied: {done.stderr.strip()[-500:]}")


def link_tree(source: Path, target: Path) -> None:
    """Copy a directory whose files never change by linking them, where both are on one file system."""
    try:
        copy_tree(source, target, "--link")
    except EngineError:
        shutil.rmtree(target)
        copy_tree(source, target)


def image_layers(root: Path) -> set[str]:
    """The directories under overlay2 that belong to images; those of containers change, these never do."""
    return {path.read_text().strip() for path in (root / IMAGE_LAYERS).glob("*/cache-id")}


def lay_out(source: Path, target: Path) -> dict[str, str]:
    """Make a data root from a saved one. Returns the layers to be mounted instead: id to path.

    Raises EngineError.
    """
    immutable = image_layers(source)
    elsewhere = source.with_name(ELSEWHERE)
    paths: dict[str, str] = json.loads(elsewhere.read_text()) if elsewhere.exists() else {}
    for layer in immutable:
        path = paths.setdefault(layer, str(source / LAYERS / layer / "diff"))
        if not os.path.isdir(path):
            raise EngineError(f"the contents of an image are gone: {path} was removed")
    copy_data(source, target, immutable)
    return paths


def save(root: Path, shared: dict[str, str], target: Path) -> None:
    """Save a data root, whose `shared` layers are mounted: they stay where they are, and are only noted."""
    immutable = image_layers(root)
    copy_data(root, target, immutable)
    for layer in immutable - set(shared):
        link_tree(root / LAYERS / layer / "diff", target / LAYERS / layer / "diff")
    paths = {layer: shared[layer] for layer in immutable & set(shared)}
    target.with_name(ELSEWHERE).write_text(json.dumps(paths, indent=1))


def copy_data(source: Path, target: Path, without: set[str]) -> None:
    """Copy a data root but for the contents of some layers, and for what is only mounted there."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copystat(source, target)
    for entry in os.scandir(source):
        if entry.name == LAYERS:
            continue
        if entry.is_dir(follow_symlinks=False):
            copy_tree(source / entry.name, target / entry.name)
        else:
            shutil.copy2(entry.path, target / entry.name, follow_symlinks=False)
    if not (source / LAYERS).is_dir():
        return
    (target / LAYERS).mkdir(mode=0o710, exist_ok=True)
    for entry in os.scandir(source / LAYERS):
        if entry.name == "l":
            copy_tree(source / LAYERS / "l", target / LAYERS / "l")
        elif entry.is_dir():
            copy_layer(Path(entry.path), target / LAYERS / entry.name, entry.name not in without)


def copy_layer(source: Path, target: Path, contents: bool) -> None:
    target.mkdir()
    shutil.copystat(source, target)
    for entry in os.scandir(source):
        if entry.name == "diff" and contents:
            copy_tree(source / "diff", target / "diff")
        elif entry.is_dir():
            (target / entry.name).mkdir()
            shutil.copystat(entry.path, target / entry.name)
        else:
            shutil.copy2(entry.path, target / entry.name)


def running_containers(root: Path) -> dict[str, bool]:
    """The ids of the containers that ran when a data root was saved, oldest first; whether it was paused."""
    found: list[tuple[str, str, bool]] = []
    for path in root.glob("containers/*/config.v2.json"):
        state = json.loads(path.read_text())["State"]
        if state["Running"]:
            found.append((state["StartedAt"], path.parent.name, state["Paused"]))
    return {identifier: paused for _, identifier, paused in sorted(found)}


# ---------------------------------------------------------------------------
# an engine
# ---------------------------------------------------------------------------


class Connection(http.client.HTTPConnection):
    """HTTP to the socket in a directory, however long the directory's path."""

    def __init__(self, directory: Path) -> None:
        super().__init__("localhost", timeout=API_SECONDS)
        self.directory = directory

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        descriptor = os.open(self.directory, os.O_PATH)
        try:
            self.sock.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
        finally:
            os.close(descriptor)


def listen(machine: Machine) -> socket.socket:
    """The socket of a VM's engine: root and plato may connect. Raises MachineError.

    Clients of a simulator's developer look for it under a second name, as on Plato's own VMs.
    """
    second = machine.directory / "run" / USER_SOCKET
    second.unlink(missing_ok=True)
    second.symlink_to(SOCKET)
    request = {"op": "listen", "path": f"/run/{SOCKET}", "gid": PLATO_UID, "mode": 0o660}
    return socket.socket(fileno=machine.request(request)[1][0])


Base = Callable[[], "Path | None"]


class Engine:
    """The engine of a running VM. `base` gives the saved data root that it begins with, when it begins."""

    def __init__(self, machine: Machine, base: Base) -> None:
        self.machine = machine
        self.base = base
        self.data = machine.directory / "docker"
        self.run = machine.directory / "run"
        self.log_path = machine.directory / "docker.log"
        self.shared: dict[str, str] = {}
        self.lock = threading.Lock()
        self.closed = False
        self.keeper: subprocess.Popen[bytes] | None = None
        self.listener = listen(machine)
        self.stop_reader, self.stop_writer = socket.socketpair()
        self.thread = threading.Thread(target=self.wait, name=f"docker {machine.name}", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """The engine's thread: start it when somebody connects."""
        ready, _, _ = select.select([self.listener, self.stop_reader], [], [])
        with open(self.log_path, "a") as log:
            if self.stop_reader in ready:
                return
            try:
                self.begin()
            except (OSError, EngineError) as error:
                log.write(f"the engine cannot start: {error}\n")
                # Clients are refused from now on.
                self.listener.shutdown(socket.SHUT_RDWR)

    def begin(self) -> None:
        base = self.base()
        with self.lock:
            pid = self.machine.pid
            if self.closed or pid is None:
                return
            if not self.data.exists():
                self.data.mkdir(mode=0o710)
                self.shared = lay_out(base, self.data) if base is not None else {}
            plan = {
                "name": self.machine.name,
                "pid": pid,
                "listener": self.listener.fileno(),
                "data": str(self.data),
                "layers": self.shared,
            }
            with open(self.log_path, "ab") as log:
                self.keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", STARTER, str(TESTS), json.dumps(plan)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[self.listener.fileno()],
                    cwd="/",
                    start_new_session=True,
                )

    @property
    def begun(self) -> bool:
        """Whether it has been used: an engine that has not has nothing to save."""
        return self.keeper is not None

    def close(self) -> None:
        """After the VM's end: wait until nothing of the engine is left."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self.stop_writer.close()
        self.thread.join(KEEPER_SECONDS)
        self.listener.close()
        self.stop_reader.close()
        if self.keeper is not None:
            try:
                self.keeper.wait(KEEPER_SECONDS)
            except subprocess.TimeoutExpired:
                self.keeper.kill()
                self.keeper.wait()

    def call(self, method: str, path: str) -> Any:
        """One request to the engine, which this starts; the JSON of its answer. Raises EngineError."""
        connection = Connection(self.run)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the VM's Docker engine does not answer ({error})") from error
        finally:
            connection.close()
        value = json.loads(body) if body else None
        if response.status >= 400:
            raise EngineError(f"{method} {path}: {value['message'] if value else response.status}")
        return value

    def save(self, target: Path) -> None:
        """Save the data of the engine, whose processes have been stopped meanwhile. Raises EngineError."""
        try:
            save(self.root(), self.shared, target)
        except OSError as error:
            raise EngineError(f"the engine's data could not be saved: {error}") from error

    def root(self) -> Path:
        """The data as the engine itself sees it, for it may be in memory."""
        if self.keeper is None or self.keeper.poll() is not None:
            return self.data
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        inside = Path(f"/proc/{children[0]}/root/run/docker-data") if children else self.data
        return inside if inside.is_dir() else self.data
