"""Several commands at once, processes that are not ours, and a `make` that is sent once and only once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, Desk, ending, eventually, heartbeats, is_running, living, nothing_left, part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localplato import LocalPlato


# -- `make` is sent once --

LOST: dict[str, dict[str, Any]] = {  # after these nobody knows whether there is a VM
    "lost answer": {"effect": "lost_answer"},
    "connection reset before acting": {"effect": "reset_before_acting"},
    "connection reset before the body": {"effect": "reset_before_body"},
    "no answer, acted": {"effect": "hang", "act": True},
    "no answer, not acted": {"effect": "hang"},
    "answer too slow": {"effect": "drip", "seconds": 300},
    "408": {"effect": "status", "status": 408},
    "502": {"effect": "status", "status": 502},
    "502 html": {"effect": "html", "status": 502},
    "504": {"effect": "status", "status": 504},
    "html": {"effect": "html", "status": 200},
    "empty": {"effect": "content_type", "body": ""},
    "half": {"effect": "truncate", "bytes": 200},
    "no session in it": {"effect": "content_type", "body": "{}"},
    "session of a wrong type": {"effect": "content_type", "body": '{"session_id": 5, "envs": []}'},
    "a list": {"effect": "content_type", "body": "[]"},
}


@pytest.mark.long
@pytest.mark.parametrize("fault", LOST.values(), ids=LOST)
def test_make_without_a_usable_answer_is_not_repeated(
    desk: Desk, plato: LocalPlato, fault: dict[str, Any]
) -> None:
    desk.tune(MAKE_SECONDS=1.0)
    plato.fault(path="*/make", **fault)
    lost = desk.run(*BLANK, "--json")
    assert lost.code == 7, lost.err
    assert lost.error["code"] == "unknown_outcome"
    assert len(plato.wait_for_request("POST", "/make")) == 1
    assert desk.state["starting"] is True
    assert desk.run("status").code == 3
    desk.good("stop")
    plato.advance(130)
    nothing_left(desk, plato)


@pytest.mark.long
def test_start_goes_ahead_after_an_unknown_outcome(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("lost_answer", path="*/make")
    assert desk.run(*BLANK).code == 7
    desk.good(*BLANK)
    plato.advance(100)
    plato.wait_for_request("POST", "/heartbeat", count=len(plato.requests("POST", "/heartbeat")) + 2)
    plato.advance(100)
    assert living(plato) == [desk.state["job_id"]]


@pytest.mark.sampled
@pytest.mark.parametrize("status", [400, 409, 422, 429, 500, 503])
def test_make_that_is_refused_is_not_repeated(desk: Desk, plato: LocalPlato, status: int) -> None:
    plato.fault("status", path="*/make", status=status, headers={"Retry-After": "0"})
    refused = desk.run(*BLANK, "--json")
    assert refused.code == 6, refused.err
    assert str(status) in refused.error["message"]
    assert len(plato.requests("POST", "/make")) == 1
    nothing_left(desk, plato)


def test_record_that_cannot_be_written_after_make_closes_the_vm(desk: Desk, plato: LocalPlato) -> None:
    """The directory goes away while Plato answers: the VM has no record, so it must not live."""
    plato.fault("latency", path="*/make", seconds=1)
    process = desk.begin(*BLANK, "--json")
    plato.wait_for_request("POST", "/make")
    desk.work.rename(desk.place / "moved")
    done = ending(process)
    assert done.code == 1, done.err
    assert done.error["code"]
    eventually(lambda: not heartbeats(desk))
    assert living(plato) == []


# -- what may be repeated is, within bounds --

REPEATABLE = {  # a part of the path of each, and what `start` does when it never works
    "wait_for_ready": ("GET", "/wait_for_ready"),
    "reset": ("POST", "/reset"),
    "public_url": ("GET", "/public_url"),
    "connect_network": ("POST", "/connect_network"),
    "add_ssh_key": ("POST", "/add_ssh_key"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("method", "path"), REPEATABLE.values(), ids=REPEATABLE)
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_repeatable_requests_are_repeated(
    desk: Desk, plato: LocalPlato, method: str, path: str, status: int
) -> None:
    plato.fault("status", method=method, path=f"*{path}", status=status, times=2)
    desk.good("start", "--from-config")
    assert len(plato.requests(method, path)) == 3
    desk.good("stop")


@pytest.mark.long
@pytest.mark.parametrize("effect", ["lost_answer", "reset_before_acting"])
def test_lost_answers_of_repeatable_requests(desk: Desk, plato: LocalPlato, effect: str) -> None:
    for path in ("/reset", "/connect_network", "/add_ssh_key", "/close"):
        plato.fault(effect, path=f"*{path}", times=2)
    desk.good("start", "--from-config")
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.long
def test_retries_are_bounded(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "--from-config", "--no-reset")
    plato.fault("status", path="*/reset", status=503, times=-1)
    assert desk.run("reset").code == 6
    assert 2 <= len(plato.requests("POST", "/reset")) <= 5


@pytest.mark.sampled
@pytest.mark.parametrize("status", [400, 404, 409, 422])
def test_a_refusal_is_not_repeated(desk: Desk, plato: LocalPlato, status: int) -> None:
    desk.good("start", "--from-config", "--no-reset")
    plato.fault("status", path="*/reset", status=status, times=-1)
    assert desk.run("reset").code in (3, 6)
    assert len(plato.requests("POST", "/reset")) == 1


@pytest.mark.long
def test_retry_after_is_honoured(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/reset", status=429, headers={"Retry-After": "3"})
    desk.good("start", "--from-config")
    first, second = plato.requests("POST", "/reset")
    assert second["time"] - first["time"] >= 3


@pytest.mark.long
def test_retry_after_beyond_the_window_is_not_waited_for(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "--from-config", "--no-reset")
    plato.fault("status", path="*/reset", status=429, headers={"Retry-After": "3600"})
    failed = desk.run("reset", "--json")
    assert failed.code == 6
    assert "3600" in failed.error["hint"]
    assert len(plato.requests("POST", "/reset")) == 1


# -- several commands at once --


@pytest.mark.long
def test_twenty_starts_in_one_directory_create_one_vm(desk: Desk, plato: LocalPlato) -> None:
    results = [ending(process) for process in [desk.begin(*BLANK, "--json") for _ in range(20)]]
    winners = [result for result in results if result.code == 0]
    assert len(winners) == 1
    session = winners[0].document["session_id"]
    for loser in results:
        if loser is not winners[0]:
            assert loser.code == 5, loser.err
            assert loser.error["code"] == "conflict"
            assert re.search(rf"PID \d+|{session}|a plato-sandbox command", loser.error["message"]), loser.err
    assert len(plato.requests("POST", "/make")) == 1
    assert living(plato) == [desk.state["job_id"]]
    assert len(heartbeats(desk)) == 1
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.long
def test_twenty_starts_in_twenty_directories(desk: Desk, plato: LocalPlato) -> None:
    """They share one PLATO_HOME; every VM is reached by SSH and is its own."""
    directories = [desk.place / f"simulator {number}" for number in range(20)]
    for directory in directories:
        directory.mkdir()
    starts = [desk.begin(*BLANK, "--json", directory=directory) for directory in directories]
    states = [ending(process).document for process in starts]
    assert len({state["session_id"] for state in states}) == 20
    assert len(living(plato)) == 20
    assert len(heartbeats(desk)) == 20
    ssh = part("ssh", "openssh-client")
    logins = [
        desk.begin_command(
            [ssh, "-F", state["ssh_config_path"], state["ssh_host"], "cat /proc/sys/kernel/hostname"]
        )
        for state in states
    ]
    for state, login in zip(states, logins):
        result = ending(login)
        assert result.code == 0, result.err
        assert state["job_id"].split("-")[0] in result.out
    stops = [desk.begin("stop", directory=directory) for directory in directories]
    assert [ending(process).code for process in stops] == [0] * 20
    nothing_left(desk, plato)


@pytest.fixture
def under_way(desk: Desk, plato: LocalPlato) -> Callable[[str, str], subprocess.Popen[str]]:
    """Begin a command and wait until it waits for the answer to one of its requests."""

    def begin(command: str, path: str) -> subprocess.Popen[str]:
        plato.fault("hang", path=f"*{path}", times=-1)
        arguments = BLANK if command == "start" else (command,)
        process = desk.begin(*arguments)
        plato.wait_for(lambda snapshot: any(path in request["path"] for request in snapshot["requests"]))
        return process

    return begin


@pytest.mark.long
@pytest.mark.parametrize("path", ["/make", "/wait_for_ready", "/reset"])
@pytest.mark.parametrize("command", ["stop", "start"])
def test_second_command_during_start_names_the_first(
    desk: Desk,
    plato: LocalPlato,
    under_way: Callable[[str, str], subprocess.Popen[str]],
    command: str,
    path: str,
) -> None:
    process = under_way("start", path)
    before = desk.state
    refused = desk.run(*(BLANK if command == "start" else ("stop",)), "--json")
    assert refused.code == 5
    assert refused.error["code"] == "conflict"
    assert f"`start` (PID {process.pid})" in refused.error["message"]
    assert desk.state == before
    assert process.poll() is None


@pytest.mark.long
def test_status_during_make_says_that_start_is_at_work(
    desk: Desk, under_way: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    process = under_way("start", "/make")
    status = desk.good("status")
    assert f"`start` (PID {process.pid})" in status.out
    assert "cut off" not in status.out + status.err


@pytest.mark.long
def test_status_during_start_shows_the_vm(
    desk: Desk, under_way: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    under_way("start", "/reset")
    status = desk.good("status")
    assert "  VM Status:   running\n" in status.out
    assert f"  Heartbeat:   running (PID: {desk.state['heartbeat_pid']})\n" in status.out


@pytest.mark.long
def test_two_stops(
    desk: Desk, plato: LocalPlato, under_way: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    desk.good(*BLANK)
    first = under_way("stop", "/close")
    second = desk.run("stop", "--json")
    assert second.code == 5
    assert f"`stop` (PID {first.pid})" in second.error["message"]
    first.kill()
    first.wait()
    plato.clear_faults()
    stops = [desk.begin("stop") for _ in range(5)]
    codes = sorted(ending(process).code for process in stops)
    assert codes[0] == 0
    assert set(codes[1:]) <= {3, 5}
    nothing_left(desk, plato)


def test_session_closed_from_elsewhere_during_start(
    desk: Desk, plato: LocalPlato, tmp_path: Path, under_way: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    process = under_way("start", "/wait_for_ready")
    desk.good("stop", "--session-id", desk.state["session_id"], directory=tmp_path)
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 130
    nothing_left(desk, plato)


@pytest.mark.long
@pytest.mark.parametrize("words", [("reset",), ("sync", "source", "--via", "api"), ("clear-audit",)])
def test_use_after_the_vm_has_ended(desk: Desk, plato: LocalPlato, words: tuple[str, ...]) -> None:
    """Plato answers such a request, with "not running": what it means is asked, and said."""
    desk.good("start", "--from-config", "--lifetime", "600")
    (desk.work / "source").mkdir()
    (desk.work / "source" / "file").touch()
    plato.advance(601)
    eventually(lambda: living(plato) == [])
    result = desk.run(*words, "--json")
    assert (result.code, result.error["code"]) == (3, "no_sandbox"), result
    assert "The VM is gone" in result.error["message"]


@pytest.mark.long
def test_copied_directory(desk: Desk, plato: LocalPlato) -> None:
    """The copy names the same sandbox: stopping it there is seen here, and nothing else is touched."""
    desk.good(*BLANK)
    copy = desk.place / "copy"
    shutil.copytree(desk.work, copy)
    status = desk.good("status", "--json", directory=copy)
    assert status.document["vm_running"] is True
    words = f"{copy} is a copy of {desk.work}: both have the same sandbox"
    assert status.err.count(words) == 1
    assert "copy" not in desk.good("status").err
    assert desk.run(*BLANK, directory=copy).code == 5
    assert words in desk.good("stop", directory=copy).err
    assert not (copy / ".sandbox.yaml").exists()
    assert living(plato) == []
    assert desk.run("status").code == 3
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.long
def test_moved_directory(desk: Desk, plato: LocalPlato) -> None:
    """What has moved is no copy, nor what is reached by another path; `stop` works there."""
    desk.good(*BLANK)
    link = desk.place / "link"
    link.symlink_to(desk.work)
    assert desk.good("status", directory=link).err == ""
    moved = desk.place / "moved"
    desk.work.rename(moved)
    assert "copy" not in desk.good("status", directory=moved).err
    desk.good("stop", directory=moved)
    nothing_left(desk, plato)


@pytest.mark.long
def test_many_share_one_home(desk: Desk, plato: LocalPlato) -> None:
    """Stopping one sandbox leaves the files and the heartbeat of the other alone."""
    other = desk.place / "other"
    other.mkdir()
    desk.good(*BLANK)
    desk.good(*BLANK, directory=other)
    mine = re.compile(rf"child_.*|.*{desk.state['session_id'][:8]}.*")
    kept = sorted(path.name for path in desk.plato_home.iterdir() if mine.fullmatch(path.name))
    desk.good("stop", directory=other)
    assert sorted(path.name for path in desk.plato_home.iterdir()) == kept
    assert desk.ssh("true").code == 0
    assert heartbeats(desk) == [desk.state["heartbeat_pid"]]
    assert living(plato) == [desk.state["job_id"]]


def test_start_replace_during_start(
    desk: Desk, plato: LocalPlato, under_way: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    under_way("start", "/reset")
    assert desk.run(*BLANK, "--replace").code == 5
    assert len(plato.requests("POST", "/make")) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("moment", ["/make", "/wait_for_ready"])
@pytest.mark.parametrize("words", [("reset",), ("state",), ("sync", "--dry-run"), ("snapshot",)])
def test_use_during_start(
    desk: Desk, under_way: Callable[[str, str], subprocess.Popen[str]], moment: str, words: tuple[str, ...]
) -> None:
    """A VM that is not ready yet is no trouble of the VM: the `start` is named that will tell."""
    process = under_way("start", moment)
    result = desk.run(*words, "--json")
    assert (result.code, result.error["code"]) == (5, "conflict"), result
    assert f"`start` (PID {process.pid})" in result.error["message"]


@pytest.mark.long
def test_stop_during_sync(desk: Desk, plato: LocalPlato) -> None:
    """`stop` does not wait for a `sync`; that one ends, says why, and leaves nothing."""
    desk.good("start", "--from-config")
    (desk.work / "big").mkdir()
    (desk.work / "big" / "noise").write_bytes(os.urandom(6_000_000))
    plato.fault("latency", path="*/execute", seconds=1.5, times=-1)
    sync = desk.begin("sync", "big", "--via", "api", "--json")
    plato.wait_for_request("POST", "/execute", count=2)
    desk.good("stop")
    result = ending(sync)
    assert result.code == 3
    assert "gone" in result.error["message"]
    nothing_left(desk, plato)


@pytest.mark.long
def test_stop_during_sync_that_watches(desk: Desk, plato: LocalPlato) -> None:
    part("sshd", "openssh-server")
    desk.good("start", "--from-config")
    (desk.work / "source").mkdir()
    (desk.work / "source" / "file").write_text("one")
    sync = desk.begin("sync", "source", "--watch")
    assert sync.stderr is not None
    assert any("Ctrl-C" in line for line in iter(sync.stderr.readline, ""))
    desk.good("stop")
    result = ending(sync)
    assert result.code == 3
    assert "stopped" in result.err
    assert result.err.count("Watching") == 0  # said once, and read above
    nothing_left(desk, plato)


@pytest.mark.long
def test_stop_while_a_watch_waits_to_try_again(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "--from-config")
    (desk.work / "source").mkdir()
    (desk.work / "source" / "file").write_text("one")
    sync = desk.begin("sync", "source", "--watch", "--via", "api")
    assert sync.stderr is not None
    assert any("Ctrl-C" in line for line in iter(sync.stderr.readline, ""))
    plato.fault("reset_before_acting", method="POST", path="*/execute", times=-1)
    (desk.work / "source" / "file").write_text("two")
    assert any("Trying again" in line for line in iter(sync.stderr.readline, ""))
    desk.good("stop")
    result = ending(sync)
    assert result.code == 3, result
    assert "was stopped or replaced meanwhile" in result.err
    nothing_left(desk, plato)


def test_ssh_that_comes_after_stop_leaves_nothing(desk: Desk, plato: LocalPlato) -> None:
    desk.good(*BLANK)
    kept = desk.place / "config"
    shutil.copy(desk.state["ssh_config_path"], kept)
    command = [part("ssh", "openssh-client"), "-F", str(kept), desk.state["ssh_host"], "true"]
    desk.good("stop")
    assert desk.run(command=command).code == 255
    nothing_left(desk, plato)


@pytest.mark.parametrize("words", [("status",), ("sync",)], ids=" ".join)
def test_stop_while_another_looks_at_the_way_to_the_vm(
    desk: Desk, plato: LocalPlato, words: tuple[str, ...]
) -> None:
    """What a command finds that comes between: the key is gone already, the record and the config are not."""
    desk.good(*BLANK)
    record, config = desk.state_file, Path(desk.state["ssh_config_path"])
    there = {path: path.read_bytes() for path in (record, config)}
    desk.good("stop")
    for path, content in there.items():
        path.write_bytes(content)
    assert desk.run(*words).code == 3
    assert desk.leftovers() == [record.name]


def test_a_home_that_was_lost(desk: Desk, plato: LocalPlato) -> None:
    """As that of a container that was made anew, while the directory stayed: the VM goes on and is listed."""
    desk.good(*BLANK)
    (heartbeat,) = heartbeats(desk)
    os.kill(heartbeat, signal.SIGKILL)
    shutil.rmtree(desk.plato_home)
    assert "it was started again" in desk.run("state").err
    desk.good("sync", "--via", "auto")
    (listed,) = desk.good("list", "--json").document["sandboxes"]
    assert (listed["directory"], listed["heartbeat"]["state"]) == (str(desk.work), "ok")
    desk.good("stop")
    nothing_left(desk, plato)


AT_ONCE: list[tuple[str, ...]] = [
    ("start", "--from-config"),
    ("start", "--from-config", "--replace"),
    BLANK,
    ("status",),
    ("sync", "source"),
    ("reset",),
    ("state",),
    ("stop",),
]


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_any_commands_at_once(
    desk: Desk, plato: LocalPlato, seed: int, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    """Whatever runs at once in a directory and its copies: at the end one VM that is known, or none."""
    chance = random.Random(seed)
    (desk.work / "source").mkdir()
    rounds = 30 if soaking else 2
    for number in range(rounds):
        (desk.work / "source" / "file").write_text(str(number))
        chosen = [chance.choice(AT_ONCE) for _ in range(6)]
        results = [ending(process) for process in [desk.begin(*words, "--json") for words in chosen]]
        for words, result in zip(chosen, results):
            assert result.document
            unready = words == ("reset",) and "worker is not started" in result.err
            assert result.code in (0, 3, 5, 9, 1 if unready else 0), (words, result)
            assert "Traceback" not in result.err
        if desk.state_file.exists():
            assert living(plato) == [desk.state["job_id"]]
            assert heartbeats(desk) == [desk.state["heartbeat_pid"]]
            assert desk.good("status", "--json").document["session_id"] == desk.state["session_id"]
        else:
            assert living(plato) == []
            eventually(lambda: not heartbeats(desk))
            assert desk.leftovers() == []
    desk.run("stop")
    nothing_left(desk, plato)
    tally("races", rounds)


# -- processes that are not ours --


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that nobody may signal."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    assert process.poll() is None, f"an innocent process was ended: {process.returncode}"
    process.kill()
    process.wait()


def rewrite_record(desk: Desk, **changes: Any) -> None:
    """Change the first line of the heartbeat's record as a stale or forged one would have it."""
    [path] = desk.plato_home.glob("heartbeat_*.log")
    first, _, rest = path.read_text().partition("\n")
    with open(path, "r+") as file:
        file.write(json.dumps({**json.loads(first), **changes}) + "\n" + rest)
        file.truncate()


@pytest.mark.long
def test_reused_pid_in_the_record_of_a_dead_heartbeat(
    desk: Desk, plato: LocalPlato, innocent: subprocess.Popen[bytes]
) -> None:
    desk.good(*BLANK)
    os.kill(desk.state["heartbeat_pid"], signal.SIGKILL)
    eventually(lambda: not heartbeats(desk))
    rewrite_record(desk, pid=innocent.pid)
    text = desk.state_file.read_text()
    desk.state_file.write_text(re.sub(r"heartbeat_pid: \d+", f"heartbeat_pid: {innocent.pid}", text))
    status = desk.good("status")
    assert f"  Heartbeat:   stopped (PID: {innocent.pid} not found)\n" in status.out
    desk.good("stop")
    nothing_left(desk, plato)


def test_another_pid_in_the_record_of_a_live_heartbeat(
    desk: Desk, plato: LocalPlato, innocent: subprocess.Popen[bytes]
) -> None:
    """The lock is held by the true one: the innocent is spared, and the true one ends by itself."""
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "5"
    desk.good(*BLANK)
    plato.wait_for_request("POST", "/heartbeat", count=1)
    eventually(lambda: desk.heartbeat_record()["beats"])
    rewrite_record(desk, pid=innocent.pid)
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.long
@pytest.mark.parametrize("pid", [0, -1, 1, 2**31 - 1, 2**70, "7", None, True])
def test_odd_pids_in_the_record_and_the_state(desk: Desk, plato: LocalPlato, pid: Any) -> None:
    """Not even a pid that means "every process" to kill(2) does any harm."""
    desk.good(*BLANK)
    os.kill(desk.state["heartbeat_pid"], signal.SIGKILL)
    eventually(lambda: not heartbeats(desk))
    rewrite_record(desk, pid=pid)
    text = desk.state_file.read_text()
    shown = "null" if pid is None else json.dumps(pid)
    desk.state_file.write_text(re.sub(r"heartbeat_pid: \d+", f"heartbeat_pid: {shown}", text))
    status = desk.good("status", "--json").document
    assert status["heartbeat"]["state"] == "dead"
    desk.good("stop")
    nothing_left(desk, plato)


def test_ended_heartbeat_of_ours_is_not_a_zombie_to_status(desk: Desk) -> None:
    desk.good(*BLANK)
    pid = desk.state["heartbeat_pid"]
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not is_running(pid))
    assert desk.good("status", "--json").document["heartbeat"]["state"] == "dead"
