"""The process beside a VM that runs its Docker engine, and takes away what only the host can.

`engine.py` starts it on the first connection to the VM's docker.sock, with one argument: JSON of `Plan`. It
forks a supervisor that enters the VM's namespaces, makes itself a mount namespace in which the engine's
data and the host's cgroups can be written, and runs dockerd whenever somebody connects. The supervisor,
dockerd and every container are in the VM's process namespace, so the kernel ends them with the VM, whoever
ended that. The keeper stays outside, sees the end, and removes the cgroups of the containers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from .init import MS_BIND, MS_RDONLY, MS_REC, MS_REMOUNT, OPEN_FILES, mount, unescape

DATA = "/run/docker-data"
SHARED = "/run/docker-layers"
PLAIN_DATA = "/run/docker-files"
CONFIG = "/run/docker-config.json"
CGROUP_PREFIX = "plato-local-"
CGROUP_SECONDS = 10.0
MOST_FILES = 524_288
NAMESPACES = ("net", "uts", "ipc", "mnt")
CLONE_NEWNS, MS_PRIVATE = 0x20000, 1 << 18
AT_FDCWD, OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH = -100, 1, os.O_CLOEXEC, 4
SYS_MOVE_MOUNT, SYS_OPEN_TREE = (539, 538) if platform.machine() == "alpha" else (429, 428)
# The newest release that cannot start without /etc/docker, where it keeps a key that nobody uses.
LAST_WITH_KEY = 23
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Plan:
    """What an engine needs: the VM's name and PID 1, its listening socket, and its files on the host.

    `layers` are directories on the host that are to be seen read-only as the contents of these image layers.
    """

    name: str
    pid: int
    listener: int
    data: str
    layers: dict[str, str]


# ---------------------------------------------------------------------------
# system calls
# ---------------------------------------------------------------------------


def checked(result: int, what: str) -> int:
    """The result of a system call; raises OSError with what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def open_tree(path: str) -> int:
    """A copy of the mount at a path that is mounted nowhere yet, and may be so in another namespace."""
    words = (AT_FDCWD, os.fsencode(path), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    return checked(library().syscall(SYS_OPEN_TREE, *words), path)


def attach(tree: int, target: str) -> None:
    """Mount what `open_tree` has copied."""
    words = (tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    checked(library().syscall(SYS_MOVE_MOUNT, *words), target)
    os.close(tree)
    # A shared mount would show the host whatever is mounted inside it.
    mount("none", target, "none", MS_PRIVATE | MS_REC)


def enter(descriptor: int) -> None:
    checked(library().setns(descriptor, 0), "setns")
    os.close(descriptor)


def cgroup_mounts() -> list[str]:
    """Where the cgroup hierarchies are mounted, with the directory that holds them first."""
    found: list[str] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            path = unescape(fields[4])
            if fields[fields.index("-") + 1] in ("cgroup", "cgroup2") or path == "/sys/fs/cgroup":
                found.append(path)
    return found


# ---------------------------------------------------------------------------
# outside
# ---------------------------------------------------------------------------


def keep(plan: Plan) -> None:
    """Run the supervisor, and clean up after the VM's end."""
    machine = os.pidfd_open(plan.pid)
    namespaces = [os.open(f"/proc/{plan.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in NAMESPACES]
    trees = {"": open_tree(plan.data)}
    trees.update({layer: open_tree(path) for layer, path in plan.layers.items()})
    # A process namespace takes in only the children of whoever enters it.
    enter(os.open(f"/proc/{plan.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
    child = os.fork()
    if child == 0:
        try:
            supervise(plan, namespaces, trees)
        except BaseException:  # noqa: BLE001 - this process may not go on as its parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    for descriptor in (plan.listener, *namespaces, *trees.values()):
        os.close(descriptor)
    os.waitpid(child, 0)
    # The processes of a paused container cannot even die.
    thaw_cgroups(CGROUP_PREFIX + plan.name)
    # Somebody in the VM may have killed the supervisor alone: containers go on until the VM ends.
    select.select([machine], [], [])
    remove_cgroups(CGROUP_PREFIX + plan.name)


def thaw_cgroups(name: str) -> None:
    """Let the processes in the cgroups of that name go on, which a container's pause has stopped."""
    for place in cgroup_mounts():
        for directory, _, files in os.walk(f"{place}/{name}"):
            if "freezer.state" in files:
                with contextlib.suppress(OSError):
                    Path(directory, "freezer.state").write_text("THAWED")


def remove_cgroups(name: str) -> None:
    """Remove the cgroups of that name from every hierarchy; the dead in them may take a moment to leave."""
    deadline = time.monotonic() + CGROUP_SECONDS
    while True:
        left = [top for place in cgroup_mounts() if os.path.isdir(top := f"{place}/{name}")]
        if not left or time.monotonic() > deadline:
            return
        for top in left:
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        time.sleep(0.02)


# ---------------------------------------------------------------------------
# inside
# ---------------------------------------------------------------------------


def supervise(plan: Plan, namespaces: list[int], trees: dict[str, int]) -> None:
    """In the VM: make the engine's world, and run dockerd whenever there is a connection and it is down."""
    for descriptor in namespaces:
        enter(descriptor)
    checked(library().unshare(CLONE_NEWNS), "unshare")
    os.chdir("/")
    mount("none", "/", "none", MS_PRIVATE | MS_REC)
    # The VM's own /proc has no switches to write; this one is of the same processes.
    mount("proc", "/proc", "proc", 0)
    for path in cgroup_mounts():
        mount("none", path, "none", MS_REMOUNT | MS_BIND)
    mount_data(trees)
    command = dockerd_command(plan.name)
    while True:
        select.select([plan.listener], [], [])
        status = run_dockerd(command, plan.listener)
        print(f"dockerd ended with status {status}", file=sys.stderr, flush=True)
        refuse_waiting(plan.listener)


def mount_data(trees: dict[str, int]) -> None:
    """Put the engine's data at DATA, and the shared layers at SHARED.

    Where the VM's directory is itself on an overlay (a server in a container), no overlay can be written in
    it: the data is then copied to memory.
    """
    os.makedirs(DATA, exist_ok=True)
    attach(trees.pop(""), DATA)
    if not overlay_works(DATA):
        os.makedirs(PLAIN_DATA, exist_ok=True)
        mount(DATA, PLAIN_DATA, "none", MS_BIND)
        mount("tmpfs", DATA, "tmpfs", 0, "mode=710")
        subprocess.run(["cp", "-a", PLAIN_DATA + "/.", DATA], check=True)
    os.makedirs(SHARED, exist_ok=True)
    mount("tmpfs", SHARED, "tmpfs", 0, "mode=700")
    for layer, tree in trees.items():
        os.mkdir(f"{SHARED}/{layer}")
        attach(tree, f"{SHARED}/{layer}")


def mount_layers() -> None:
    """Mount the shared layers where they belong; an engine that ends in order unmounts all that it sees."""
    for layer in os.listdir(SHARED):
        target = f"{DATA}/overlay2/{layer}/diff"
        # The image may have been removed since.
        if os.path.isdir(target) and not os.path.ismount(target):
            mount(f"{SHARED}/{layer}", target, "none", MS_BIND)
            mount("none", target, "none", MS_REMOUNT | MS_BIND | MS_RDONLY)


def overlay_works(directory: str) -> bool:
    """Whether a directory can take the changes of an overlay."""
    trial = os.path.join(directory, "trial")
    for name in ("lower", "upper", "work", "merged"):
        os.makedirs(os.path.join(trial, name), exist_ok=True)
    options = f"lowerdir={trial}/lower,upperdir={trial}/upper,workdir={trial}/work"
    try:
        mount("overlay", f"{trial}/merged", "overlay", 0, options)
        checked(library().umount2(os.fsencode(f"{trial}/merged"), 0), "umount")
    except OSError:
        return False
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return True


def dockerd_command(name: str) -> list[str]:
    """The engine's command line; its socket is inherited."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [
        "dockerd",
        "--host=fd://",
        f"--data-root={DATA}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        "--storage-driver=overlay2",
        "--exec-opt=native.cgroupdriver=cgroupfs",
        f"--cgroup-parent=/{CGROUP_PREFIX}{name}",
        # Not the server's own, which is as high as can be: some programs close all that they might have.
        f"--default-ulimit=nofile={min(OPEN_FILES, most)}:{min(MOST_FILES, most)}",
    ]
    version = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"version (\d+)", version)
    if number is not None and int(number.group(1)) <= LAST_WITH_KEY:
        with open(CONFIG, "w") as file:
            json.dump({"deprecated-key-path": "/run/docker-key.json"}, file)
        command.append(f"--config-file={CONFIG}")
    return command


def run_dockerd(command: list[str], listener: int) -> int:
    """Run dockerd to its end, with the listener handed over as systemd does; its exit status."""
    mount_layers()
    with contextlib.suppress(OSError):
        os.unlink("/run/docker.pid")
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(listener, 3)
            os.set_inheritable(3, True)
            environment = {
                "PATH": PATH,
                "LISTEN_FDS": "1",
                "LISTEN_PID": str(os.getpid()),
                # Profiles of AppArmor would be the host's; this word tells the engine not to load any.
                "container": "plato-local",
            }
            os.execvpe(command[0], command, environment)
        finally:
            os._exit(127)
    return os.waitpid(pid, 0)[1]


def refuse_waiting(listener: int) -> None:
    """Close the connections that nobody has answered, lest they start an engine that cannot run for ever."""
    with socket.socket(fileno=os.dup(listener)) as door:
        while select.select([door], [], [], 0)[0]:
            door.accept()[0].close()


def main() -> None:
    """Keep one engine; the plan is the last argument."""
    os.environ["PATH"] = PATH
    plan = Plan(**json.loads(sys.argv[-1]))
    os.set_inheritable(plan.listener, False)
    keep(plan)
