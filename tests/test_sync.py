"""`sync`: after every one the VM's tree is what the plan says, over both ways in, whatever goes wrong."""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import pty
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import pytest
from conftest import Desk, Result, eventually, part, sent, ssh_processes
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from plato_sandbox import (
    ConflictError,
    Reporter,
    Sandbox,
    SandboxError,
    UsageError,
    link_leaves,
    normal_target,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localplato import LocalPlato

WAYS = ("api", "ssh")
Tree = dict[bytes, tuple[str, int, bytes]]  # kind, mode, and content or target, by path


class Vm(NamedTuple):
    """A sandbox of one desk, whose VM the tests of a module share; each has a target of its own."""

    plato: LocalPlato
    desk: Desk
    root: Path
    pid: int

    def place(self, target: str) -> Path:
        return self.root / target.lstrip("/")

    def execute(self, command: str) -> str:
        """Run a command on the VM as root, over the API."""
        sandbox = Sandbox(str(self.desk.work), settings=self.desk.settings)
        state = sandbox.load()
        answer = sandbox.api.execute(state["session_id"], command, 30)["results"][state["job_id"]]
        sandbox.api.hang_up()
        assert answer["exit_code"] == 0, answer
        return str(answer["stdout"])


def begin_vm(plato: LocalPlato, place: Path) -> Vm:
    desk = Desk(place, {**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "1"})
    desk.good("start", "-c")  # SSH is the user plato, the API is root
    machine = next(machine for machine in plato.machines() if machine["job_id"] == desk.state["job_id"])
    return Vm(plato, desk, Path(machine["directory"]), machine["pid"])


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory, shared_plato: LocalPlato) -> Iterator[Vm]:
    part("sshd", "openssh-server")
    begun = begin_vm(shared_plato, tmp_path_factory.mktemp("vm") / "desk")
    yield begun
    begun.desk.run("stop")
    begun.desk.clear()


@pytest.fixture
def own_vm(tmp_path: Path, plato: LocalPlato) -> Iterator[Vm]:
    """A VM on a local Plato of its own, for tests that script faults."""
    part("sshd", "openssh-server")
    begun = begin_vm(plato, tmp_path / "own")
    yield begun
    begun.desk.clear()


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    name = "".join(char if char.isalnum() else "-" for char in request.node.name)
    return f"/home/plato/worktree/{name[:80]}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    return root


def sync(vm: Vm, source: Path, target: str, *options: str, **keywords: Any) -> Result:
    return vm.desk.run("sync", str(source), "--remote-path", target, *options, **keywords)


def good_sync(vm: Vm, source: Path, target: str, *options: str) -> dict[str, Any]:
    result = sync(vm, source, target, "--json", *options)
    assert result.code == 0, f"exit {result.code}\n{result.out}\n{result.err}"
    return result.document


def read_tree(root: Path) -> Tree:
    """Everything below a directory; files with their content, links with their target."""
    tree: Tree = {}
    top = os.fsencode(root)
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            mode = stat.S_IMODE(status.st_mode)
            key = os.path.relpath(path, top)
            if stat.S_ISLNK(status.st_mode):
                tree[key] = ("l", 0o777, os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                tree[key] = ("d", mode, b"")
            else:
                with open(path, "rb") as file:
                    tree[key] = ("f", mode, file.read())
    return tree


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


# ----------------------------------------------------------------------------------------------------------
# the property: any trees, any edits
# ----------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        b"a",
        b"b",
        b"c d",
        b"it's",
        b"-rf",
        b"$(touch x)",
        b"new\nline",
        b"\xff\xfe",
        "é".encode(),
        b"`id`",
        b'"q"',
        b"*",
        b"..x",
        b"back\\slash",
        b"n" * 120,
        b"\xff" * 110,
    ]
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
CONTENTS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"x" * 100_000, os.urandom(90_000), b"", b"\n"])
)
FILE_MODES = st.sampled_from([0o644, 0o755, 0o600, 0o444, 0o4755, 0o640])
DIRECTORY_MODES = st.sampled_from([0o755, 0o700, 0o555, 0o775, 0o2755])
TARGETS = st.sampled_from([b"a", b"b/c d", b"nowhere", b"new\nline"])
EDITS = st.one_of(
    st.tuples(st.just("write"), PATHS, CONTENTS, FILE_MODES),
    st.tuples(st.just("write"), PATHS, CONTENTS, FILE_MODES),
    st.tuples(st.just("directory"), PATHS, DIRECTORY_MODES, st.none()),
    st.tuples(st.just("link"), PATHS, TARGETS, st.none()),
    st.tuples(st.just("remove"), PATHS, st.none(), st.none()),
    st.tuples(st.just("rename"), PATHS, PATHS, st.none()),
)
ROUNDS = st.lists(
    st.tuples(st.lists(EDITS, max_size=6), st.lists(EDITS, max_size=3), st.sampled_from(WAYS)),
    min_size=1,
    max_size=4,
)


def open_up(path: bytes) -> None:
    """Let the test itself write below a directory that some edit has made read-only."""
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode) | 0o700)


def clear_path(path: bytes) -> None:
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.isdir(path):
        for directory, directories, _ in os.walk(path):
            for name in directories:
                open_up(os.path.join(directory, name))
        open_up(path)
        shutil.rmtree(path)


def make_parents(root: bytes, path: bytes) -> None:
    parts = path.split(b"/")[:-1]
    for end in range(1, len(parts) + 1):
        parent = os.path.join(root, *parts[:end])
        if os.path.islink(parent) or not os.path.isdir(parent):
            clear_path(parent)
            os.mkdir(parent)
            os.chmod(parent, 0o755)  # noqa: S103


def apply_edit(root: bytes, edit: tuple[str, bytes, Any, Any]) -> None:
    """One edit, made possible by force. The modes of directories on the way stay as they were."""
    kind, path, value, mode = edit
    place = os.path.join(root, path)
    modes: dict[bytes, int] = {}
    involved = [path, value] if kind == "rename" else [path]
    for one in involved:
        parts = one.split(b"/")[:-1]
        for end in range(1, len(parts) + 1):
            parent = os.path.join(root, *parts[:end])
            if os.path.isdir(parent) and not os.path.islink(parent):
                modes.setdefault(parent, stat.S_IMODE(os.lstat(parent).st_mode))
                open_up(parent)
    if kind == "rename":
        goal = os.path.join(root, value)
        if os.path.lexists(place) and not goal.startswith(place + b"/") and goal != place:
            make_parents(root, value)
            if os.path.lexists(place) and not place.startswith(goal + b"/"):
                clear_path(goal)
                old = stat.S_IMODE(os.lstat(place).st_mode)
                open_up(place)
                os.rename(place, goal)
                if not os.path.islink(goal):
                    os.chmod(goal, old)
    elif kind == "remove":
        clear_path(place)
    else:
        make_parents(root, path)
        clear_path(place)
        if kind == "write":
            with open(place, "wb") as file:
                file.write(value)
            os.chmod(place, mode)
        elif kind == "directory":
            os.mkdir(place)
            os.chmod(place, value)
        elif not link_leaves(path, value):
            os.symlink(value, place)
    for parent, old in modes.items():
        if os.path.isdir(parent) and not os.path.islink(parent):
            os.chmod(parent, old)


def give_to_plato(root: Path) -> None:
    """What a test puts on the VM belongs to the user of the VM."""
    if os.geteuid() == 0:
        subprocess.run(["chown", "-hR", "--reference", str(root), str(root)], check=True)
        # chown takes the set-user-ID bits away; they are not this test's concern on that side.


def lineage(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def expected_tree(local: Tree, before: Tree, manifest: dict[bytes, str]) -> Optional[Tree]:
    """What the VM must hold after a sync; None for a conflict, where it stays as it was."""
    replaced = {path for path in before if path in local and local[path][0] != before[path][0]}
    result: Tree = {}
    for path, entry in before.items():
        if any(above in replaced for above in lineage(path)):
            below = path not in replaced or any(above in replaced for above in lineage(path)[:-1])
            if below and path not in manifest:
                return None
            continue
        gone = path in manifest and path not in local and (manifest[path] == "d") == (entry[0] == "d")
        if entry[0] == "d" or not gone:
            result[path] = entry
    result.update(local)
    for path in sorted(before, reverse=True):  # directories that a sync made go when nothing is left in them
        gone = result.get(path, ("",))[0] == "d" and path not in local and manifest.get(path) == "d"
        if gone and not any(other.startswith(path + b"/") for other in result):
            del result[path]
    return result


PROPERTY = settings(
    max_examples=20,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # an example takes a second: shrinking would take an hour
    report_multiple_bugs=False,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
COUNTER = iter(range(10**9))


@pytest.fixture
def closing() -> Iterator[Callable[[Sandbox], Sandbox]]:
    """Closes the connections of sandboxes used in this process."""
    opened: list[Sandbox] = []

    def keep(sandbox: Sandbox) -> Sandbox:
        opened.append(sandbox)
        return sandbox

    yield keep
    for sandbox in opened:
        sandbox.api.hang_up()


@pytest.mark.long
@PROPERTY
@given(rounds=ROUNDS)
@example(rounds=[([("write", b"a/b", b"1", 0o644)], [], "ssh"), ([("write", b"a", b"1", 0o600)], [], "api")])
@example(
    rounds=[
        ([("write", b"a/b", b"1", 0o644)], [], "api"),
        ([("write", b"a", b"1", 0o600)], [("write", b"a/c d", b"2", 0o644)], "ssh"),
    ]
)
@example(
    rounds=[
        ([("write", b"a/b", b"1", 0o644), ("directory", b"b", 0o555, None)], [], "ssh"),
        (
            [("write", b"b/b", b"2", 0o444), ("remove", b"a", None, None)],
            [("write", b"b/*", b"", 0o644)],
            "ssh",
        ),
    ]
)
@example(
    rounds=[
        ([("directory", b"a", 0o2755, None)], [], "ssh"),
        ([("directory", b"a/b", 0o775, None)], [], "ssh"),
        ([("directory", b"a/*", 0o775, None)], [], "api"),
    ]
)
@example(  # a directory that nobody can look into goes too
    rounds=[
        ([("write", b"a/b", b"1", 0o644), ("directory", b"b", 0o311, None)], [], "ssh"),
        ([("remove", b"b", None, None)], [], "ssh"),
    ]
)
def test_tree_is_what_the_plan_says(
    vm: Vm, tmp_path: Path, closing: Callable[[Sandbox], Sandbox], rounds: list[Any]
) -> None:
    number = next(COUNTER)
    source = tmp_path / f"tree{number}"
    source.mkdir()
    target = f"/home/plato/worktree/property-{number}-{os.getpid()}"
    place = vm.place(target)
    sandbox = closing(Sandbox(str(vm.desk.work), settings=vm.desk.settings))
    manifest: dict[bytes, str] = {}
    for edits, vm_edits, via in rounds:
        for edit in edits:
            apply_edit(os.fsencode(source), edit)
        if place.is_dir():
            for edit in vm_edits:
                apply_edit(os.fsencode(place), edit)
            give_to_plato(place)
        local, before = read_tree(source), read_tree(place)
        expected = expected_tree(local, before, manifest)
        if expected is None:
            with pytest.raises(ConflictError):
                sandbox.sync(str(source), remote_path=target, via=via)
            assert read_tree(place) == before
        elif not local:
            with pytest.raises(SandboxError, match="nothing to sync"):
                sandbox.sync(str(source), remote_path=target, via=via)
            assert read_tree(place) == before
        else:
            dry = sandbox.sync(str(source), remote_path=target, via=via, dry_run=True)
            assert read_tree(place) == before
            report = sandbox.sync(str(source), remote_path=target, via=via)
            assert read_tree(place) == expected
            assert report["sent"] == sum(not path.endswith("/") for path in dry["send"])
            gone = {path for path in before if path not in expected}
            assert gone <= {os.fsencode(path.rstrip("/")) for path in dry["remove"]}
            manifest = {path: entry[0] for path, entry in local.items()}
            again = sandbox.sync(str(source), remote_path=target, via=via)
            assert (again["sent"], again["removed"], again["archive_bytes"]) == (0, 0, 0)
    assert not list(place.parent.glob(f".plato-sync/{place.name}/new.*"))


# ----------------------------------------------------------------------------------------------------------
# what the command says and does
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("via", WAYS)
def test_only_what_changed_travels(vm: Vm, source: Path, target: str, via: str) -> None:
    write_tree(source, {f"d{number}/f{number}": str(number) for number in range(30)})
    first = sync(vm, source, target, "--via", via)
    assert first.code == 0
    assert first.out.startswith(f"Synced to {target}: 30 files sent, 0 removed, 0 unchanged (")
    (source / "d3/f3").write_text("other")
    second = good_sync(vm, source, target, "--via", via)
    assert (second["sent"], second["removed"], second["unchanged"], second["bytes"]) == (1, 0, 29, 5)
    assert (second["via"], second["remote_path"], second["skipped"]) == (via, target, [])
    third = good_sync(vm, source, target, "--via", via)
    assert (third["sent"], third["archive_bytes"]) == (0, 0)
    assert read_tree(vm.place(target)) == read_tree(source)


def test_defaults_are_those_of_the_specification(vm: Vm) -> None:
    """The working directory goes to /home/plato/worktree/<service>, without what is excluded."""
    expected = {path for path in read_tree(vm.desk.work) if not path.startswith(b".sandbox.yaml")}
    write_tree(vm.desk.work, {"app/main.py": "1", "venv/x": "2", ".env": "3"})
    document = vm.desk.good("sync", "--json").document
    assert document["via"] == "ssh"
    place = vm.place(f"/home/plato/worktree/{vm.desk.state['service']}")
    assert document["remote_path"].endswith(f"/worktree/{vm.desk.state['service']}")
    assert set(read_tree(place)) == {*expected, b"app/main.py", b".env"}


@pytest.mark.long
def test_nothing_changed_takes_one_request(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    good_sync(own_vm, source, target, "--via", "api")
    before = len(own_vm.plato.requests("POST", "/execute"))
    good_sync(own_vm, source, target, "--via", "api")
    assert len(own_vm.plato.requests("POST", "/execute")) == before + 1
    assert own_vm.plato.unknown_fields() == []


def test_a_small_change_takes_two_requests(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    good_sync(own_vm, source, target, "--via", "api")
    assert len(own_vm.plato.requests("POST", "/execute")) == 2


def test_commands_stay_below_the_limit_of_one_argument(own_vm: Vm, source: Path, target: str) -> None:
    (source / "noise").write_bytes(os.urandom(600_000))
    good_sync(own_vm, source, target, "--via", "api")
    commands = [body["command"].encode() for body in sent(own_vm.plato, "/execute")]
    assert max(map(len, commands)) <= 131_071
    assert max(map(len, commands)) > 125_000
    assert read_tree(own_vm.place(target)) == read_tree(source)


@pytest.mark.long
def test_equal_trees_give_equal_archives(own_vm: Vm, tmp_path: Path) -> None:
    parts = []
    for name in ("one", "two"):
        root = tmp_path / name
        for file in ("z", "a/b", "a-b", "c") if name == "one" else ("c", "a-b", "a/b", "z"):
            write_tree(root, {file: file * 1000})
        os.symlink("z", root / "link")
        for path in (root, *root.rglob("*")):
            os.utime(path, ns=(5, 1_700_000_000_123_456_789), follow_symlinks=False)
        good_sync(own_vm, root, f"/home/plato/worktree/{name}", "--via", "api")
        command = sent(own_vm.plato, "/execute")[-1]["command"]
        parts.append(command.split()[2])
    assert parts[0] == parts[1]


@pytest.mark.long
def test_what_a_slow_connection_carries_is_compressed(own_vm: Vm, source: Path, target: str) -> None:
    (source / "text").write_bytes(b"".join(b"line %d\n" % number for number in range(600_000)))
    own_vm.plato.fault("latency", method="POST", path="*/execute", seconds=0.3, times=-1)
    report = good_sync(own_vm, source, target, "--via", "api")
    assert report["archive_bytes"] < report["bytes"] / 2
    assert read_tree(own_vm.place(target)) == read_tree(source)


def test_modification_times_are_exact(vm: Vm, source: Path, target: str) -> None:
    times = [0, 1, -2_000_000_000, 1_700_000_000_123_456_789, 3_000_000_000_000_000_001, 999_999_999]
    for number, moment in enumerate(times):
        (source / str(number)).write_text("x")
        os.utime(source / str(number), ns=(0, moment))
    good_sync(vm, source, target)
    assert [os.stat(vm.place(target) / str(number)).st_mtime_ns for number in range(len(times))] == times
    assert good_sync(vm, source, target)["sent"] == 0


@pytest.mark.long
@pytest.mark.parametrize("via", WAYS)
def test_what_the_vm_made_stays_and_what_was_synced_goes(vm: Vm, source: Path, target: str, via: str) -> None:
    write_tree(source, {"old/a": "1", "old/b": "2", "keep": "3", "both/mine": "4"})
    good_sync(vm, source, target, "--via", via)
    write_tree(vm.place(target), {"both/theirs": "5", "made/by/vm": "6"})
    shutil.rmtree(source / "old")
    shutil.rmtree(source / "both")
    dry = good_sync(vm, source, target, "--via", via, "--dry-run")
    assert dry["remove"] == ["both/mine", "old/", "old/a", "old/b"]
    assert good_sync(vm, source, target, "--via", via)["removed"] == 3
    again = vm.desk.good("sync", str(source), "--remote-path", target, "--via", via, "--dry-run")
    assert again.out == f"Nothing to do: {target} has all of it.\n"
    assert set(read_tree(vm.place(target))) == {
        *(b"keep", b"both", b"both/theirs", b"made", b"made/by", b"made/by/vm"),
    }


def test_what_becomes_excluded_stays_on_the_vm(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"data/a": "1", "keep": "3"})
    good_sync(vm, source, target)
    write_tree(source, {".platoignore": "data\n"})
    assert good_sync(vm, source, target)["removed"] == 0
    assert b"data/a" in read_tree(vm.place(target))


def test_a_taken_back_exclusion_is_followed_and_forgotten(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"venv/a": "1", ".platoignore": "!venv\n"})
    good_sync(vm, source, target)
    assert b"venv/a" in read_tree(vm.place(target))
    shutil.rmtree(source / "venv")
    assert good_sync(vm, source, target)["removed"] == 1
    assert b"venv" not in read_tree(vm.place(target))


@pytest.mark.long
def test_progress_tells_bytes_on_a_terminal(own_vm: Vm, source: Path, target: str) -> None:
    for number in range(30):
        (source / str(number)).write_bytes(os.urandom(100_000))
    own_vm.plato.fault("latency", method="POST", path="*/execute", seconds=0.7, times=-1)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = own_vm.desk.command("sync", str(source), "--remote-path", target, "--via", "api")
    with subprocess.Popen(
        words,
        cwd=own_vm.desk.work,
        env={**own_vm.desk.environment, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        drawn = b""
        try:
            while data := os.read(ours, 10_000):
                drawn += data
        except OSError:  # the other side is closed
            pass
        out = process.communicate()[0].decode()
    os.close(ours)
    assert re.search(rb"Sending 30 files, 3.0 MB.* [0-9.]+ MB", drawn), drawn
    assert re.search(
        r"30 files sent, 0 removed, 0 unchanged \(3.[01] MB in [0-9.]+ s, through the API\)", out
    )


def test_emptied_tree_is_refused(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {f"f{number}": "x" for number in range(20)})
    good_sync(vm, source, target)
    for number in range(11):
        (source / f"f{number}").unlink()
    refused = sync(vm, source, target)
    assert refused.code == 1
    assert "11 of the 20" in refused.err
    assert "--force" in refused.err
    assert len(read_tree(vm.place(target))) == 20
    for number in range(11, 20):
        (source / f"f{number}").unlink()
    empty = sync(vm, source, target)
    assert empty.code == 1
    assert "nothing to sync" in empty.err
    assert good_sync(vm, source, target, "--force")["removed"] == 20
    assert read_tree(vm.place(target)) == {}


def test_two_sources_of_one_target_only_remove_their_own(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"one/a": "1", "two/b": "2"})
    good_sync(vm, source / "one", target)
    good_sync(vm, source / "two", target)
    assert set(read_tree(vm.place(target))) == {b"a", b"b"}


def test_conflict_with_a_directory_of_the_vm(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"x/a": "1", "y": "2"})
    good_sync(vm, source, target)
    write_tree(vm.place(target), {"x/theirs": "3"})
    give_to_plato(vm.place(target))
    shutil.rmtree(source / "x")
    write_tree(source, {"x": "now a file", "z": "more"})
    before = read_tree(vm.place(target))
    refused = sync(vm, source, target)
    assert refused.code == 5
    assert "x/theirs" in refused.err
    assert read_tree(vm.place(target)) == before
    shutil.rmtree(vm.place(target) / "x")
    good_sync(vm, source, target)
    assert read_tree(vm.place(target)) == read_tree(source)


def test_what_never_leaves(vm: Vm, source: Path, target: str) -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"
    write_tree(
        source,
        {
            "id": key,
            "deep/server.key": "-----BEGIN RSA PRIVATE KEY-----\n",
            "public.pem": "-----BEGIN CERTIFICATE-----",
        },
    )
    write_tree(source, {".sandbox.yaml": "x", ".plato/key": "x", ".platoignore": "!*\n"})
    os.symlink("/etc/passwd", source / "absolute")
    os.symlink("../../x", source / "outside")
    os.symlink("deep/../public.pem", source / "inside")
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(source / "socket"))
    result = sync(vm, source, target, "--json")
    assert result.code == 0
    left_out = {"id", "deep/server.key", "absolute", "outside", "fifo", "socket"}
    assert {entry["path"] for entry in result.document["skipped"]} == left_out
    for name in left_out:
        assert f"{name} is left out" in result.err
    assert set(read_tree(vm.place(target))) == {b"deep", b"public.pem", b".platoignore", b"inside"}


def test_a_private_key_is_sent_when_its_path_is_taken_back(vm: Vm, source: Path, target: str) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nx\n"
    write_tree(source, {"certs/server.key": key, "certs/other.key": key, "server.key": key})
    write_tree(source, {".platoignore": "!certs/server.key\n!*\n"})
    told = sync(vm, source, target)
    assert told.code == 0
    assert (
        "certs/other.key is left out: a private key (!certs/other.key in .platoignore sends it)" in told.err
    )
    assert set(read_tree(vm.place(target))) == {b".platoignore", b"certs", b"certs/server.key"}


def test_a_directory_above_the_home_is_refused_before_it_is_read(vm: Vm) -> None:
    for path in ("/", str(vm.desk.home.parent)):
        result = vm.desk.run("sync", path, "--json")
        assert (result.code, result.error["code"]) == (2, "usage")
        assert "home directory" in result.error["message"]


def test_many_warnings_are_counted(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    for number in range(25):
        os.symlink("/etc", source / f"link{number}")
    result = sync(vm, source, target)
    assert result.err.count("is left out") == 10
    assert "There are 15 more such warnings." in result.err
    assert len(good_sync(vm, source, target)["skipped"]) == 25


@pytest.mark.sampled
@pytest.mark.parametrize("via", WAYS)
def test_a_synced_file_that_becomes_a_private_key(vm: Vm, source: Path, target: str, via: str) -> None:
    """The old one stays on the VM, and goes when the local one goes."""
    write_tree(source, {"a": "1", "key": "2", "venv/b": "3"})
    good_sync(vm, source, target, "--via", via)
    write_tree(source, {"a": "11", "key": "-----BEGIN PRIVATE KEY-----\n"})
    report = good_sync(vm, source, target, "--via", via)
    assert [entry["path"] for entry in report["skipped"]] == ["key"]
    assert (vm.place(target) / "key").read_text() == "2"
    (source / "key").unlink()
    assert good_sync(vm, source, target, "--via", via)["removed"] == 1
    assert read_tree(vm.place(target)) == {b"a": ("f", 0o644, b"11")}


def test_unreadable(vm: Vm, source: Path, target: str) -> None:
    """Root is run without the capability that lets it read everything."""
    command = vm.desk.command()
    if os.geteuid() == 0:
        command = [
            part("setpriv", "util-linux"),
            "--bounding-set",
            "-dac_override,-dac_read_search",
            *command,
        ]
    check_unreadable(vm, source, target, command)


def check_unreadable(vm: Vm, source: Path, target: str, command: list[str]) -> None:
    write_tree(source, {"a": "1", "secret": "2", "deep/secret": "3"})
    (source / "secret").chmod(0)
    (source / "deep/secret").chmod(0)
    words = [*command, "sync", str(source), "--remote-path", target]
    refused = vm.desk.run(command=words)
    assert refused.code == 1
    assert "secret cannot be read" in refused.err
    assert not vm.place(target).exists()
    write_tree(source, {".platoignore": "secret\n"})
    assert vm.desk.run(command=words).code == 0
    assert set(read_tree(vm.place(target))) == {b"a", b"deep", b".platoignore"}


REFUSED = {
    "the root": "/",
    "home": "/home",
    "a user's home": "/home/plato/",
    "root's home": "/root",
    "hidden behind dots": "/home/./plato//",
    "parent directories": "/home/plato/x/../..",
    "relative": "worktree/x",
    "empty part only": "//",
    "a system directory": "/etc",
    "a line break": "/home/plato/x\ny",
    "our own state": "/home/plato/worktree/.plato-sync",
}


@pytest.mark.parametrize("path", REFUSED.values(), ids=REFUSED)
def test_refused_remote_paths(path: str) -> None:
    with pytest.raises(UsageError):
        normal_target(path)


def test_a_remote_path_that_leads_to_a_refused_one(vm: Vm, source: Path) -> None:
    write_tree(source, {"a": "1"})
    vm.execute("ln -sfn /home/plato /home/plato/sneaky")
    for via in WAYS:
        refused = sync(vm, source, "/home/plato/sneaky", "--via", via)
        assert refused.code == 1
        assert "/home/plato" in refused.err
    assert not (vm.place("/home/plato") / "a").exists()


def test_a_remote_path_below_a_file(vm: Vm, source: Path) -> None:
    write_tree(source, {"a": "1"})
    vm.execute("touch /home/plato/plain")
    for path in ("/home/plato/plain", "/home/plato/plain/deeper"):
        refused = sync(vm, source, path)
        assert refused.code == 1
        assert "/home/plato/plain" in refused.err


BAD_COMMANDS = {
    "no such path": (["sync", "nowhere"], 2, "nowhere"),
    "unknown way": (["sync", "--via", "pigeon"], 2, "pigeon"),
    "refused target": (["sync", "--remote-path", "/"], 2, "/"),
    "watch without a result": (["sync", "--watch", "--dry-run"], 2, "--dry-run"),
    "timeout": (["sync", "--timeout", "0"], 2, "0"),
}


@pytest.mark.parametrize(("arguments", "code", "word"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_commands(vm: Vm, arguments: list[str], code: int, word: str) -> None:
    result = vm.desk.run(*arguments, "--json")
    assert (result.code, result.error["exit_code"]) == (code, code)
    assert word in result.error["message"]


SERVICES = {"shell characters": "x; touch $HOME/owned '`id`' \"q\"", "a slash": "a/../../..", "dots": ".."}


@pytest.mark.parametrize(("name"), SERVICES.values(), ids=SERVICES)
def test_service_names_from_the_state_file(vm: Vm, tmp_path: Path, name: str) -> None:
    work = tmp_path / "elsewhere"
    work.mkdir()
    write_tree(work, {"a": "1"})
    text = vm.desk.state_file.read_text()
    old = vm.desk.state["service"]
    (work / ".sandbox.yaml").write_text(text.replace(f"service: {old}\n", f"service: {json.dumps(name)}\n"))
    results = [vm.desk.run("sync", "--via", via, directory=work) for via in WAYS]
    if ".." in name:
        assert [result.code for result in results] == [2, 2]
    else:
        assert [result.code for result in results] == [0, 0]
        assert (vm.place("/home/plato/worktree") / name / "a").read_text() == "1"
    for home in ("/home/plato", "/root"):
        assert not (vm.place(home) / "owned").exists()


@pytest.mark.long
def test_no_sandbox_and_a_gone_one(own_vm: Vm, tmp_path: Path, source: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    assert own_vm.desk.run("sync", directory=tmp_path / "empty").code == 3
    write_tree(source, {"a": "1"})
    state = own_vm.desk.state_file.read_text()
    own_vm.desk.good("stop")
    own_vm.desk.state_file.write_text(state)
    assert sync(own_vm, source, target, "--via", "api").code == 3
    assert sync(own_vm, source, target).code == 3


@pytest.mark.long
def test_a_dead_heartbeat_is_revived(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    old = own_vm.desk.state["heartbeat_pid"]
    os.kill(old, signal.SIGKILL)
    eventually(lambda: own_vm.desk.run("status", "--json").document["heartbeat"]["state"] == "dead")
    result = sync(own_vm, source, target)
    assert result.code == 0
    assert "heartbeat" in result.err
    assert own_vm.desk.state["heartbeat_pid"] != old
    assert own_vm.desk.run("status", "--json").document["heartbeat"]["state"] == "ok"


@pytest.mark.long
def test_missing_tools_are_named(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    inside(own_vm, "mount", "--bind", "/dev/null", own_vm.execute("command -v xargs").strip())
    for via in WAYS:
        result = sync(own_vm, source, target, "--via", via)
        assert (result.code, "The VM has no xargs" in result.err) == (1, True), result


# ----------------------------------------------------------------------------------------------------------
# faults: the tree is the old one or the new one, and the next sync completes
# ----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A tree that is on the VM, and another one that is to replace it."""

    old: Tree
    new: Tree


def prepare_change(vm: Vm, source: Path, target: str) -> Change:
    write_tree(source, {"a": "1", "d/b": "2", "gone/c": "3"})
    good_sync(vm, source, target)
    old = read_tree(vm.place(target))
    shutil.rmtree(source / "gone")
    write_tree(source, {"a": "11", "d/new": "4"})
    (source / "noise").write_bytes(os.urandom(300_000))
    return Change(old, read_tree(source))


LASTING = ["status", "reset_before_body", "reset_before_acting", "lost_answer", "truncate", "html"]


@pytest.mark.long
@pytest.mark.parametrize("effect", LASTING)
def test_lasting_faults_at_every_request(own_vm: Vm, source: Path, target: str, effect: str) -> None:
    """From the nth request on nothing works, for every n."""
    change = prepare_change(own_vm, source, target)
    place = own_vm.place(target)
    own_vm.desk.tune(RETRY_SECONDS=(0.0,))
    for nth in range(1, 7):
        own_vm.plato.fault(effect, method="POST", path="*/execute", nth=nth, times=-1, status=503, bytes=20)
        result = sync(own_vm, source, target, "--via", "api")
        assert result.code == 6
        own_vm.plato.clear_faults()
        now = read_tree(place)
        assert now in (change.old, change.new)
        if now == change.new:
            assert effect in ("lost_answer", "truncate")
            break
    good_sync(own_vm, source, target, "--via", "api")
    assert read_tree(place) == change.new
    assert not list(place.parent.glob(".plato-sync/*/new.*"))


@pytest.mark.sampled
@pytest.mark.parametrize("effect", ["status", "reset_before_acting", "lost_answer"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_passing_fault_does_not_show(own_vm: Vm, source: Path, target: str, effect: str, nth: int) -> None:
    change = prepare_change(own_vm, source, target)
    own_vm.plato.fault(effect, method="POST", path="*/execute", nth=nth, status=503)
    good_sync(own_vm, source, target, "--via", "api")
    assert read_tree(own_vm.place(target)) == change.new


@pytest.mark.long
@pytest.mark.parametrize("after", [0, 3000, 20_000, 100_000, 250_000, 310_000])
def test_ssh_breaks(own_vm: Vm, source: Path, target: str, after: int) -> None:
    change = prepare_change(own_vm, source, target)
    own_vm.plato.fault("gateway_reset", after_bytes=after, times=1)
    result = sync(own_vm, source, target, "--via", "ssh")
    assert read_tree(own_vm.place(target)) in ((change.old,) if result.code else (change.old, change.new))
    assert result.code in (0, 6)
    own_vm.plato.clear_faults()
    good_sync(own_vm, source, target, "--via", "ssh")
    assert read_tree(own_vm.place(target)) == change.new


@pytest.mark.long
@pytest.mark.parametrize("after", [None, 3000, 100_000], ids=["at once", "early", "late"])
def test_auto_goes_on_through_the_api(own_vm: Vm, source: Path, target: str, after: Optional[int]) -> None:
    change = prepare_change(own_vm, source, target)
    own_vm.desk.hang_up()
    if after is None:
        own_vm.plato.fault("gateway_down", times=-1)
    else:
        own_vm.plato.fault("gateway_reset", after_bytes=after, times=-1)
    result = sync(own_vm, source, target, "--json")
    assert result.code == 0
    assert result.document["via"] == "api"
    assert "through the API" in result.err
    assert read_tree(own_vm.place(target)) == change.new


@pytest.mark.long
@pytest.mark.parametrize("via", ["ssh", "auto"])
def test_connection_that_was_kept_breaks(own_vm: Vm, source: Path, target: str, via: str) -> None:
    """What ssh kept open is cut: the next `sync` makes a new connection."""
    change = prepare_change(own_vm, source, target)
    own_vm.desk.good("sync", str(source), "--remote-path", target, "--via", "ssh", "--dry-run")
    [stream] = [pid for pid, words in ssh_processes(own_vm.desk).items() if "gateway-stream" in words]
    os.kill(stream, signal.SIGKILL)
    assert good_sync(own_vm, source, target, "--via", via)["via"] == "ssh"
    assert read_tree(own_vm.place(target)) == change.new


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3, 5])
def test_killed_client_leaves_only_staging(own_vm: Vm, source: Path, target: str, count: int) -> None:
    change = prepare_change(own_vm, source, target)
    already = len(own_vm.plato.requests("POST", "/execute"))
    own_vm.plato.fault("hang", method="POST", path="*/execute", nth=count, times=-1)
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--via", "api")
    own_vm.plato.wait_for_request("POST", "/execute", count=already + count)
    process.kill()
    process.wait()
    own_vm.plato.clear_faults()
    assert read_tree(own_vm.place(target)) == change.old
    good_sync(own_vm, source, target, "--via", "api")
    assert read_tree(own_vm.place(target)) == change.new
    assert not list(own_vm.place(target).parent.glob(".plato-sync/*/new.*"))


@pytest.mark.long
def test_an_interrupted_sync_says_so(own_vm: Vm, source: Path, target: str) -> None:
    change = prepare_change(own_vm, source, target)
    already = len(own_vm.plato.requests("POST", "/execute"))
    own_vm.plato.fault("hang", method="POST", path="*/execute", nth=3, times=-1)
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--via", "api")
    own_vm.plato.wait_for_request("POST", "/execute", count=already + 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert read_tree(own_vm.place(target)) == change.old


def inside(vm: Vm, *command: str) -> None:
    """Run a command in the VM's mount namespace, with rights that nothing in the VM has."""
    if not Path(f"/proc/{vm.pid}/ns/mnt").exists():
        pytest.skip("the VM has no namespaces here")
    user = [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]
    done = subprocess.run(
        ["nsenter", "-t", str(vm.pid), "-m", *user, *command], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this host does not let a test mount in a VM: {done.stderr}")


@pytest.mark.long
@pytest.mark.parametrize("via", WAYS)
@pytest.mark.parametrize("where", ["parent", "target"])
def test_full_disk(vm: Vm, source: Path, target: str, via: str, where: str) -> None:
    """Whether the archive, the unpacked files or the last step has no room: the tree stays the old one."""
    base = f"/home/plato/worktree/small-{via}-{where}"
    target = f"{base}/tree"
    mounted = base if where == "parent" else target
    assert vm.desk.ssh(f"mkdir -p {mounted}").code == 0
    inside(vm, "mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs", mounted)
    write_tree(source, {"a": "1", "d/b": "2"})
    good_sync(vm, source, target, "--via", via)
    listing = f"cd {target} && find . -type f -exec sha256sum {{}} + | sort"
    old = vm.execute(listing)
    write_tree(source, {"a": "11"})
    for size, name in ((3_000_000, "noise"), (1_500_000, "zeros")):
        content = bytes(size) if name == "zeros" else os.urandom(size)
        (source / name).write_bytes(content)
        result = sync(vm, source, target, "--via", via)
        assert result.code == 1
        assert "space" in result.err.lower()
        assert vm.execute(listing) == old
        (source / name).unlink()
    good_sync(vm, source, target, "--via", via)
    assert vm.execute(f"cat {target}/a") == "11"


@pytest.mark.long
def test_no_room_for_what_goes_through_the_api(own_vm: Vm, source: Path, target: str) -> None:
    inside(own_vm, "mount", "-t", "tmpfs", "-o", "size=1m,mode=1777", "tmpfs", "/var/tmp")
    (source / "noise").write_bytes(os.urandom(3_000_000))
    result = sync(own_vm, source, target, "--via", "api")
    assert (result.code, "No space left" in result.err) == (1, True), result
    assert not own_vm.place(target).exists()
    own_vm.execute("mkdir /var/tmp/plato-sandbox-left && touch -d '2 hours ago' /var/tmp/plato-sandbox-left")
    (source / "noise").write_bytes(os.urandom(300_000))
    good_sync(own_vm, source, target, "--via", "api")
    assert "left" not in own_vm.execute("ls -A /var/tmp")


@pytest.mark.sampled
@pytest.mark.parametrize("via", WAYS)
def test_read_only_directory_on_the_vm(vm: Vm, source: Path, target: str, via: str) -> None:
    write_tree(source, {"a": "1", "ro/b": "2"})
    good_sync(vm, source, target)
    place = f"{target}/ro"
    inside(vm, "mount", "-t", "tmpfs", "-o", "ro,size=1m,mode=755", "tmpfs", place)
    write_tree(source, {"a": "11", "ro/c": "3"})
    result = sync(vm, source, target, "--via", via)
    assert result.code == 1
    assert "ro" in result.err
    assert vm.execute(f"cat {target}/a") == "1"
    inside(vm, "umount", place)
    good_sync(vm, source, target, "--via", via)
    assert read_tree(vm.place(target)) == read_tree(source)


# ----------------------------------------------------------------------------------------------------------
# at the same time
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_syncs_of_one_sandbox_take_turns(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    own_vm.plato.fault("latency", method="POST", path="*/execute", seconds=0.3, times=-1)
    words = ["sync", str(source), "--remote-path", target, "--via", "api", "--json"]
    both = [own_vm.desk.begin(*words) for _ in range(3)]
    documents = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(document.get("sent", -1) for document in documents) == [0, 0, 1], documents


@pytest.mark.long
def test_two_first_syncs_that_make_a_directory_at_the_same_moment(
    own_vm: Vm, source: Path, target: str
) -> None:
    """The one that comes second leaves it to the other, whose files come and go there meanwhile."""
    write_tree(source, {"a": "1"})
    state = f"{posixpath.dirname(target)}/.plato-sync/{posixpath.basename(target)}"
    stand_ins = {
        "mkdir": 'REAL "$@" || exit; case "$*" in *STATE) exit 1;; esac',  # the other one made it
        "chown": 'REAL "$@"; case "$*" in *STATE) echo "no such file" >&2; exit 1;; esac',
    }
    for name, text in stand_ins.items():
        real = own_vm.execute(f"command -v {name}").strip()
        own_vm.execute(f"cp {real} /home/plato/real-{name}")
        script = "#!/bin/sh\n" + text.replace("REAL", f"/home/plato/real-{name}").replace("STATE", state)
        own_vm.place(f"/home/plato/{name}").write_text(script)
        own_vm.execute(f"chmod 755 /home/plato/{name}")
        inside(own_vm, "mount", "--bind", f"/home/plato/{name}", real)
    assert good_sync(own_vm, source, target, "--via", "api")["sent"] == 1


@pytest.mark.long
def test_a_sync_that_does_not_end_holds_up_no_other(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    own_vm.plato.fault("hang", method="POST", path="*/execute", times=-1)
    own_vm.desk.begin("sync", str(source), "--remote-path", target, "--via", "api")
    own_vm.plato.wait_for_request("POST", "/execute")
    assert good_sync(own_vm, source, target, "--via", "ssh")["sent"] == 1


@pytest.mark.long
def test_two_hosts_sync_different_trees_to_one_target(own_vm: Vm, tmp_path: Path, target: str) -> None:
    """They do not know of each other, so the VM tells them apart: neither undoes what the other one did."""
    processes = []
    own_vm.plato.fault("latency", method="POST", path="*/execute", seconds=0.2, times=-1)
    for name in ("one", "two", "three"):
        work = tmp_path / name
        write_tree(work, {f"{name}/{name}{number}": name for number in range(5)})
        shutil.copy(own_vm.desk.state_file, work)
        words = ["sync", name, "--remote-path", target, "--via", "api"]
        processes.append(own_vm.desk.begin(*words, directory=work))
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    files = [path for path, entry in read_tree(own_vm.place(target)).items() if entry[0] == "f"]
    assert len(files) == 15


@pytest.mark.long
@pytest.mark.parametrize("via", WAYS)
def test_the_vm_waits_for_another_sync_and_says_so(own_vm: Vm, source: Path, target: str, via: str) -> None:
    write_tree(source, {"a": "1"})
    good_sync(own_vm, source, target, "--via", via)
    (source / "a").write_text("2")
    state = f"{target.rpartition('/')[0]}/.plato-sync/{target.rpartition('/')[2]}"
    own_vm.execute(f"setsid flock {state}/lock sh -c 'touch {state}/held; exec sleep 1000' >/dev/null 2>&1 &")
    eventually(lambda: own_vm.place(f"{state}/held").exists())
    own_vm.desk.tune(PATIENCE_SHARE=0.01)
    refused = sync(own_vm, source, target, "--via", via)
    assert (refused.code, (own_vm.place(target) / "a").read_text()) == (5, "1"), refused.err
    assert "Another sync" in refused.err
    own_vm.execute("kill $(pidof sleep)")
    good_sync(own_vm, source, target, "--via", via)
    assert (own_vm.place(target) / "a").read_text() == "2"


@pytest.mark.long
@pytest.mark.parametrize("via", WAYS)
def test_without_flock_a_directory_is_the_lock(own_vm: Vm, source: Path, target: str, via: str) -> None:
    flock = own_vm.execute("command -v flock || true").strip()
    if flock:
        inside(own_vm, "mount", "--bind", "/dev/null", flock)
    assert own_vm.execute("command -v flock || echo none") == "none\n"
    write_tree(source, {"a": "1"})
    good_sync(own_vm, source, target, "--via", via)
    place = own_vm.place(target)
    held = place.parent / ".plato-sync" / place.name / "lock.held"
    assert not held.exists()

    held.mkdir()  # somebody else is at work, and does not end
    (source / "a").write_text("2")
    own_vm.desk.tune(PATIENCE_SHARE=0.01)
    refused = sync(own_vm, source, target, "--via", via)
    assert (refused.code, (place / "a").read_text()) == (5, "1"), refused.err
    assert held.exists()

    own_vm.desk.tune(PATIENCE_SHARE=0.5)
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--via", via)
    eventually(lambda: list(held.parent.glob("new.*")))
    assert (place / "a").read_text() == "1"
    held.rmdir()  # now it does
    assert process.wait(60) == 0
    assert (place / "a").read_text() == "2"
    assert not held.exists()

    held.mkdir()  # left by one that was killed long ago
    os.utime(held, (1, 1))
    give_to_plato(held.parent)
    (source / "a").write_text("3")
    good_sync(own_vm, source, target, "--via", via)
    assert (place / "a").read_text() == "3"
    assert not held.exists()


class Meddler(Reporter):
    """Does something at a step of a sync, or at each word on the archive's way; keeps the warnings."""

    def __init__(self, act: Callable[[], object], *, times: int = 1, at_step: str = "") -> None:
        self.act = act
        self.left = times
        self.at_step = at_step
        self.warnings: list[str] = []

    def meddle(self) -> None:
        if self.left:
            self.left -= 1
            self.act()

    def step(self, text: str, limit: Optional[float] = None) -> None:
        if self.at_step and text.startswith(self.at_step):
            self.meddle()

    def detail(self, text: str) -> None:
        if not self.at_step:
            self.meddle()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def sync_meddled(vm: Vm, source: Path, target: str, via: str, meddler: Meddler) -> dict[str, Any]:
    sandbox = Sandbox(str(vm.desk.work), settings=vm.desk.settings, reporter=meddler)
    try:
        return sandbox.sync(str(source), remote_path=target, via=via)
    finally:
        sandbox.api.hang_up()


@pytest.mark.parametrize("via", WAYS)
def test_a_sync_that_another_one_overtakes_looks_again(vm: Vm, tmp_path: Path, target: str, via: str) -> None:
    for name in ("one", "two"):
        write_tree(tmp_path / name, {f"{name}/file": name})
        shutil.copy(vm.desk.state_file, tmp_path / name)
    words = ("sync", "--remote-path", target)
    meddler = Meddler(lambda: vm.desk.good(*words, directory=tmp_path / "two"), at_step="Sending")
    assert sync_meddled(vm, tmp_path / "one", target, via, meddler)["via"] == via
    found = read_tree(vm.place(target))
    assert {path for path, entry in found.items() if entry[0] == "f"} >= {b"one/file", b"two/file"}


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda path: path.write_bytes(os.urandom(900_000)),
    "shrinks": lambda path: path.write_bytes(b"c"),
    "rewritten": lambda path: path.write_bytes(os.urandom(600_000)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("via", WAYS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_changes_while_it_is_read(vm: Vm, source: Path, target: str, via: str, kind: str) -> None:
    """What the VM has in the end is what is here in the end."""
    moving = source / "moving"
    moving.write_bytes(os.urandom(600_000))
    write_tree(source, {"other": "still here"})
    meddler = Meddler(lambda: CHANGES[kind](moving))
    sync_meddled(vm, source, target, via, meddler)
    assert meddler.left == 0
    assert read_tree(vm.place(target)) == read_tree(source)
    assert meddler.warnings == []


def test_a_file_that_vanishes_before_it_is_read(vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"moving": "1", "other": "2"})
    report = sync_meddled(vm, source, target, "ssh", Meddler((source / "moving").unlink, at_step="Sending"))
    assert read_tree(vm.place(target)) == read_tree(source)
    assert report["sent"] == 1


def test_a_file_that_never_stops_changing_is_named(vm: Vm, source: Path, target: str) -> None:
    moving = source / "moving"
    moving.write_bytes(os.urandom(600_000))
    meddler = Meddler(lambda: moving.write_bytes(os.urandom(900_000)), times=-1)
    sync_meddled(vm, source, target, "api", meddler)
    assert any("moving: still changing" in text for text in meddler.warnings)


# ----------------------------------------------------------------------------------------------------------
# the watch
# ----------------------------------------------------------------------------------------------------------


def content(path: Path) -> Optional[str]:
    try:
        return path.read_text()
    except OSError:
        return None


@pytest.mark.long
@pytest.mark.parametrize("via", WAYS)
def test_watch(own_vm: Vm, source: Path, target: str, via: str) -> None:
    place = own_vm.place(target)
    write_tree(source, {"a": "1", "d/b": "2"})
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--watch", "--via", via)
    eventually(lambda: content(place / "d/b") == "2")
    write_tree(source, {"a": "11", "new/c": "3"})
    eventually(lambda: content(place / "a") == "11" and content(place / "new/c") == "3")
    shutil.rmtree(source / "d")
    eventually(lambda: not (place / "d").exists())
    if via == "ssh":
        own_vm.plato.fault("gateway_down", times=2)
        cut_ssh(own_vm)
        write_tree(source, {"a": "after the cut"})
        eventually(lambda: content(place / "a") == "after the cut", seconds=40)
    else:
        own_vm.plato.fault("reset_before_acting", method="POST", path="*/execute", times=6)
        write_tree(source, {"a": "after the cut"})
        eventually(lambda: content(place / "a") == "after the cut", seconds=40)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    first, second, *_, last = out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  a, d/b  \(.* s\)", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  a, new/c  \(.* s\)", second)
    assert last.startswith("Watched ")
    assert "Trying again" in errors


def cut_ssh(vm: Vm) -> None:
    """End the SSH servers of a VM, as a lost network would."""
    for machine in vm.plato.machines():
        servers = [str(found["pid"]) for found in machine["processes"] if "sshd" in found["argv"][0]]
        assert servers
        vm.execute(f"kill -9 {' '.join(servers)}")


def test_watch_interrupted_before_its_first_sync(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"a": "1"})
    own_vm.plato.fault("hang", method="POST", path="*/execute", times=-1)
    process = own_vm.desk.begin(
        "sync", str(source), "--remote-path", target, "--watch", "--via", "api", "--json"
    )
    own_vm.plato.wait_for_request("POST", "/execute")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["error"]["code"] == "interrupted"


@pytest.mark.long
def test_watch_when_an_answer_is_lost_and_the_change_taken_back(
    own_vm: Vm, source: Path, target: str
) -> None:
    """What a sync did whose answer never came is not taken for what is here."""
    place, plato = own_vm.place(target), own_vm.plato
    write_tree(source, {"a": "1"})
    before = (source / "a").stat()
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--watch", "--via", "api")
    eventually(lambda: content(place / "a") == "1")
    write_tree(source, {"b": "1"})
    count = len(plato.requests("POST", "/execute"))
    eventually(lambda: content(place / "b") == "1")
    count = len(plato.requests("POST", "/execute")) - count
    plato.fault("lost_answer", method="POST", path="*/execute", nth=count, times=-1)
    write_tree(source, {"a": "2"})
    eventually(lambda: content(place / "a") == "2")
    stderr = process.stderr
    assert stderr is not None
    assert any("Trying again" in line for line in iter(stderr.readline, ""))
    write_tree(source, {"a": "1"})
    os.utime(source / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    plato.clear_faults()
    eventually(lambda: content(place / "a") == "1")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.mark.long
def test_watch_interrupted_after_a_conflict(own_vm: Vm, source: Path, target: str) -> None:
    write_tree(source, {"x/a": "1"})
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--watch")
    place = own_vm.place(target)
    eventually(lambda: content(place / "x/a") == "1")
    write_tree(place, {"x/theirs": "2"})
    shutil.rmtree(source / "x")
    write_tree(source, {"x": "a file"})
    stderr = process.stderr
    assert stderr is not None
    assert any("x/theirs" in line for line in iter(stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Watched 1 sync: " in out


@pytest.mark.long
def test_watch_survives_its_own_bad_moments(own_vm: Vm, source: Path, target: str) -> None:
    """What cannot be synced at the moment is told, and the next change is tried again."""
    place = own_vm.place(target)
    write_tree(source, {"x/a": "1", "keep": "1"})
    process = own_vm.desk.begin("sync", str(source), "--remote-path", target, "--watch")
    eventually(lambda: content(place / "x/a") == "1")
    write_tree(place, {"x/theirs": "2"})
    errors: list[str] = []
    stderr = process.stderr
    assert stderr is not None
    threading.Thread(target=lambda: errors.extend(iter(stderr.readline, "")), daemon=True).start()
    shutil.rmtree(source / "x")
    write_tree(source, {"x": "a file"})
    eventually(lambda: any("x/theirs" in line for line in errors))
    (source / "x").unlink()
    write_tree(source, {"keep": "2"})
    eventually(lambda: content(place / "keep") == "2")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
