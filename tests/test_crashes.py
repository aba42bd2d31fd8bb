"""Commands that are killed at every step: what they leave is understood by the commands that the tool names.

Two ways to kill: before each system call of the main thread that changes or sends something (by strace, from
outside), and before each effect of any thread (by an audit hook in the process that runs the product).
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import BLANK, Desk, Result, eventually, heartbeats, living, part
from test_services import IDLE, SERVICE, TARGET, config_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localplato import LocalPlato

SYSTEM_CALLS = """
    mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir link linkat symlink symlinkat chmod fchmod
    fchmodat ftruncate utimensat write pwrite64 writev fsync fdatasync flock connect sendto sendmsg recvfrom
    recvmsg clone clone3 vfork fork kill
"""
KILL_AT_EFFECT = """
import os, runpy, signal, sys

limit, places, product = int(sys.argv[1]), tuple(sys.argv[2].split(":")), sys.argv[3]
effects = {"os.rename", "os.remove", "os.mkdir", "subprocess.Popen", "socket.connect", "http.client.send"}
seen = 0

def look(event, arguments):
    global seen
    written = event == "open" and str(arguments[0]).startswith(places) and arguments[2] & os.O_CREAT
    if event in effects or written:
        seen += 1
        if seen == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.argv = sys.argv[3:]
sys.addaudithook(look)
exec(compile(open(product).read(), product, "exec"), {"__name__": "__main__", "__file__": product})
"""
KILLERS = ("system call", "effect")
SHARDS = 3  # tests of one command, which run side by side
SAMPLE = 8  # the ordinary suite takes every eighth point


def killed_at(desk: Desk, killer: str, number: int, *arguments: str) -> Result:
    """Run a command that is killed just before its n-th system call or effect, if it comes that far."""
    if killer == "system call":
        calls = ",".join(f"?{name}" for name in SYSTEM_CALLS.split())
        words = [part("strace", "strace"), "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
        words += ["-e", f"inject={calls}:signal=KILL:when={number}", *desk.command(*arguments)]
    else:
        places = f"{desk.work}:{desk.home}"
        words = [sys.executable, "-c", KILL_AT_EFFECT, str(number), places, *desk.words(*arguments)]
    return desk.run(command=words)


def crashes(
    desk: Desk, killer: str, shard: int, soaking: bool, prepare: Callable[[int], tuple[str, ...]]
) -> Iterator[int]:
    """Kill a command at one point after the other until it comes to its end; yields the number of each kill.

    `prepare` is given the number, puts things in order, and returns the command line.
    """
    number, step = shard + 1, SHARDS * (1 if soaking else SAMPLE)
    while True:
        done = killed_at(desk, killer, number, *prepare(number))
        if done.code == 0:
            return
        assert done.code == -signal.SIGKILL, done
        assert number < 500
        yield number
        number += step


shards = pytest.mark.parametrize("shard", range(SHARDS))
killers = pytest.mark.parametrize("killer", KILLERS)


def recover(desk: Desk, plato: LocalPlato) -> None:
    """Whatever a killed `start` left, `status` and `stop` understand it, and a new `start` can follow."""
    session = desk.state.get("session_id") if desk.state_file.exists() else None
    known = desk.state_file.exists()
    status = desk.run("status", "--json")
    assert status.code == (0 if session else 3), status.out
    assert status.document
    stopped = desk.run("stop")
    assert stopped.code == (0 if known else 3), stopped.err
    eventually(lambda: not heartbeats(desk))
    assert desk.leftovers() == []
    assert all(view["closed"] for view in plato.sessions() if view["session_id"] == session)


@pytest.mark.sampled
@pytest.mark.soak
@killers
@shards
@pytest.mark.parametrize("mode", [("--from-config",), BLANK[1:]], ids=["config", "blank"])
def test_start(
    desk: Desk,
    plato: LocalPlato,
    mode: tuple[str, ...],
    killer: str,
    shard: int,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    count = 0
    for _ in crashes(desk, killer, shard, soaking, lambda _: ("start", *mode)):
        recover(desk, plato)
        count += 1
    assert shard or count
    recover(desk, plato)
    plato.advance(130)
    assert living(plato) == []
    tally("crash points", count)


@pytest.mark.sampled
@pytest.mark.soak
@killers
@shards
def test_stop(
    desk: Desk, plato: LocalPlato, killer: str, shard: int, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    count = 0

    def prepare(_: int) -> tuple[str, ...]:
        if not desk.state_file.exists():
            desk.good("start", "--from-config")
        return ("stop",)

    def nothing_left() -> None:
        eventually(lambda: not heartbeats(desk))
        assert desk.leftovers() == []
        assert living(plato) == []

    for _ in crashes(desk, killer, shard, soaking, prepare):
        if desk.state_file.exists():
            desk.good("stop")
        nothing_left()
        count += 1
    assert shard or count
    nothing_left()
    tally("crash points", count)


# -- commands that work with a sandbox: it lives on, and the command can be run again --


@pytest.fixture
def begun(desk: Desk) -> Desk:
    """A desk whose sandbox runs."""
    part("sshd", "openssh-server")
    desk.good("start", "--from-config")
    return desk


def vm_root(desk: Desk, plato: LocalPlato) -> Path:
    """Where the files of the sandbox's VM lie."""
    machine = next(one for one in plato.machines() if one["job_id"] == desk.state["job_id"])
    return Path(machine["directory"])


def still_there(desk: Desk, session: str) -> None:
    """The sandbox is as it was: recorded, alive, kept alive."""
    status = desk.good("status", "--json").document
    assert status["session_id"] == desk.state["session_id"] == session
    assert len(heartbeats(desk)) == 1


def files(root: Path) -> dict[str, str]:
    """The texts of all files of a tree."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.soak
@killers
@shards
@pytest.mark.parametrize("via", ["ssh", "api"])
def test_sync(
    begun: Desk,
    plato: LocalPlato,
    via: str,
    killer: str,
    shard: int,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    """The tree on the VM is the old one or the new one; the next `sync` makes it the new one."""
    source, target = begun.place / "source", "/home/plato/worktree/here"
    place = vm_root(begun, plato) / target[1:]
    session = begun.state["session_id"]
    words = ("sync", str(source), "--remote-path", target, "--via", via)
    old: dict[str, str] = {}
    count = 0

    def prepare(number: int) -> tuple[str, ...]:
        nonlocal old
        old = files(place) if place.exists() else {}
        shutil.rmtree(source, ignore_errors=True)
        (source / "deep").mkdir(parents=True)
        for name in ("one", f"deep/{number}", "deep/two"):
            (source / name).write_text(f"{name} at {number}")
        return words

    for _ in crashes(begun, killer, shard, soaking, prepare):
        new = files(source)
        eventually(lambda: not place.exists() or files(place) in (old, new))  # noqa: B023 - used at once
        begun.good(*words)
        assert files(place) == new
        eventually(lambda: not list(place.parent.glob(".plato-sync/*/new.*")))
        still_there(begun, session)
        count += 1
    assert shard or count
    assert files(place) == files(source)
    tally("crash points", count)


@pytest.mark.long
@pytest.mark.soak
@killers
@shards
@pytest.mark.timeout(900)
@pytest.mark.parametrize("via", ["gitea", "sync"])
def test_start_services(
    begun: Desk,
    plato: LocalPlato,
    via: str,
    killer: str,
    shard: int,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    """The code on the VM is the old one or the new one; run again, the command comes to its end."""
    if plato.information["docker"]:
        pytest.skip(plato.information["docker"])
    place = vm_root(begun, plato) / TARGET[1:]
    session = begun.state["session_id"]
    words = ("start-services", *(("--via", "sync") if via == "sync" else ()))
    (begun.work / "plato-config.yml").write_text(config_text(main={}))
    (begun.work / "docker-compose.yml").write_text(IDLE)
    count = 0

    def prepare(number: int) -> tuple[str, ...]:
        (begun.work / "deep").mkdir(exist_ok=True)
        for name in ("one", "deep/two"):
            (begun.work / name).write_text(str(number))
        return words

    for number in crashes(begun, killer, shard, soaking, prepare):
        with contextlib.suppress(FileNotFoundError):
            assert (place / "one").read_text() == (place / "deep" / "two").read_text()
        document = begun.good(*words, "--json").document
        assert [one["name"] for one in document["services"]] == ["main"]
        assert (place / "one").read_text() == (place / "deep" / "two").read_text() == str(number)
        assert sorted(path.name for path in place.parent.iterdir()) == [".plato-sync", SERVICE]
        still_there(begun, session)
        count += 1
    assert shard or count
    begun.good("stop")
    assert begun.leftovers() == []
    tally("crash points", count)


OTHERS: dict[str, tuple[str, ...]] = {
    "status": ("status",),
    "reset": ("reset",),
    "state": ("state",),
    "start-worker": ("start-worker",),
    "clear-audit": ("clear-audit",),
}


@pytest.mark.sampled
@pytest.mark.soak
@killers
@pytest.mark.parametrize("name", OTHERS)
def test_others(
    begun: Desk, killer: str, name: str, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    """Commands that only ask for something: the sandbox and its record are as before."""
    record, count = begun.state, 0
    wanted = begun.run(*OTHERS[name]).code
    number = 1
    while True:
        done = killed_at(begun, killer, number, *OTHERS[name])
        if done.code != -signal.SIGKILL:
            break
        assert begun.state == record
        count += 1
        number += 1 if soaking else SAMPLE
    assert count
    assert done.code == wanted
    still_there(begun, record["session_id"])
    tally("crash points", count)


@pytest.mark.sampled
@pytest.mark.soak
@killers
def test_snapshot(
    begun: Desk, plato: LocalPlato, killer: str, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    """The record has the old artifact or the new one, and is whole."""
    count = 0
    before = begun.state
    for _ in crashes(begun, killer, 0, soaking, lambda _: ("snapshot", "--no-config")):
        made = [artifact["artifact_id"] for artifact in plato.artifacts()]
        state = begun.state
        assert state.pop("artifact_id", None) in (before.get("artifact_id"), *made)
        assert state == {key: value for key, value in before.items() if key != "artifact_id"}
        count += 1
        assert len(plato.requests("POST", "/snapshot")) <= count
    assert count
    assert begun.state["artifact_id"] not in (None, "")
    still_there(begun, begun.state["session_id"])
    tally("crash points", count)


# -- a disk that is full --

ON_A_SMALL_DISK = """
place=$1 pages=$2; shift 2
mount -t tmpfs -o size=1m,mode=700 none "$place" || exit 99
mkdir "$place/work" "$place/home" && cd "$place/work" || exit 99
head -c 2m /dev/zero >../filler 2>/dev/null
truncate -s -$((pages * 4096)) ../filler
PLATO_HOME=$place/home "$@"
code=$?
[ ! -e .sandbox.yaml ] || echo "record kept" >&2
for file in ../home/* .sandbox.yaml.*; do [ ! -e "$file" ] || echo "left: $file" >&2; done
exit $code
"""


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.parametrize("remainder", range(3))
def test_start_on_a_full_disk(
    desk: Desk, plato: LocalPlato, remainder: int, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    """Whatever is the first that finds no room: no VM lives that is not on record, and the words say why."""
    disk = desk.place / "disk"
    disk.mkdir()
    count, pages = 0, remainder
    while True:
        words = [part("unshare", "util-linux"), "--user", "--map-root-user", "--mount", "sh", "-c"]
        words += [ON_A_SMALL_DISK, "sh", str(disk), str(pages), *desk.command(*BLANK, "--json")]
        result = desk.run(command=words)
        count += 1
        if result.code == 0:
            assert "record kept" in result.err
            assert result.document["job_id"] in living(plato)
            break
        assert result.code == 1, result
        assert "No space left on device" in result.error["message"], result
        assert "record kept" not in result.err
        assert "left:" not in result.err
        assert living(plato) == []
        eventually(lambda: not heartbeats(desk))
        pages += 3 if soaking else 6
        assert pages < 60
    assert count > 1
    desk.good("stop", "--session-id", result.document["session_id"])
    tally("full disks", count)
