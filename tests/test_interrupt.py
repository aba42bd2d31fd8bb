"""Signals at every step of `start` and `stop`: no VM is ever left without a trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Desk, ending, eventually, heartbeats, is_running, living, nothing_left, part

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from localplato import LocalPlato

SIGNAL_STEP = int(
    os.environ.get("PLATO_TESTS_SIGNAL_STEP", "29")
)  # lines of `start` from one signal to the next
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP}
AFTER_MAKE = {
    "wait_for_ready": ("GET", "/wait_for_ready", False),
    "reset before acting": ("POST", "/reset", False),
    "reset after acting": ("POST", "/reset", True),
    "public_url": ("GET", "/public_url", False),
    "connect_network after acting": ("POST", "/connect_network", True),
    "add_ssh_key before acting": ("POST", "/add_ssh_key", False),
    "add_ssh_key after acting": ("POST", "/add_ssh_key", True),
}
MAKE = {"before acting": ("POST", "/make", False), "after acting": ("POST", "/make", True)}


def hold(plato: LocalPlato, method: str, path: str, act: bool) -> None:
    """From now on, requests of that kind get no answer; with `act`, what they ask for is done."""
    plato.fault("hang", method=method, path=f"*{path}", act=act, times=-1)


def wait_until_held(plato: LocalPlato, method: str, path: str, act: bool) -> None:
    """Wait until such a request has come, and has been acted on if it ever is."""

    def held(snapshot: dict[str, Any]) -> bool:
        return any(
            request["method"] == method and request["path"].endswith(path) and (request["status"] or not act)
            for request in snapshot["requests"]
        )

    plato.wait_for(held)


def interrupted(desk: Desk, process: subprocess.Popen[str], number: int) -> dict[str, Any]:
    """A `start --json` that a signal ended says so: by its exit code, its one document and its words."""
    result = ending(process)
    assert result.code == 128 + number, result.err
    error = result.error
    assert error["code"] == "interrupted"
    assert f"Error: {error['message']}" in result.err
    return error


def named_command(desk: Desk, text: str) -> list[str]:
    """The arguments of the `stop` command that a message tells the user to run."""
    found = re.search(r"\bstop\b[^`.\n]*", text)
    assert found, text
    return found[0].split()


# -- one signal, at every request --


@pytest.mark.sampled
@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
@pytest.mark.parametrize("step", AFTER_MAKE.values(), ids=AFTER_MAKE)
def test_signal_while_start_waits(
    desk: Desk, plato: LocalPlato, step: tuple[str, str, bool], number: signal.Signals
) -> None:
    hold(plato, *step)
    process = desk.begin("start", "--from-config", "--json")
    wait_until_held(plato, *step)
    process.send_signal(number)
    error = interrupted(desk, process, number)
    assert "Nothing is left running" in error["message"]
    assert len(plato.requests("POST", "/make")) == 1
    nothing_left(desk, plato)


@pytest.mark.sampled
@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
def test_signal_while_make_is_answered_is_obeyed_after_it(
    desk: Desk, plato: LocalPlato, number: signal.Signals
) -> None:
    plato.fault("latency", path="*/make", seconds=1)
    process = desk.begin("start", "--from-config", "--json")
    wait_until_held(plato, "POST", "/make", act=True)
    process.send_signal(number)
    error = interrupted(desk, process, number)
    assert "Nothing is left running" in error["message"]
    assert plato.requests("POST", "/close"), "the session that make created was never closed"
    nothing_left(desk, plato)


@pytest.mark.parametrize("step", MAKE.values(), ids=MAKE)
def test_second_signal_during_make_ends_at_once(
    desk: Desk, plato: LocalPlato, step: tuple[str, str, bool]
) -> None:
    """Nobody knows then whether there is a VM: the record says so, and the VM dies for want of heartbeats."""
    hold(plato, *step)
    process = desk.begin("start", "--from-config", "--json")
    wait_until_held(plato, *step)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "nterrupt" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = interrupted(desk, process, signal.SIGINT)
    assert "VM" in f"{error['message']} {error['hint']}"
    assert "stop" in str(error["hint"])
    unknown_start_is_understood(desk, plato)


def unknown_start_is_understood(desk: Desk, plato: LocalPlato) -> None:
    """What is left of a `start` that ended before the answer to `make`: a record without a session."""
    assert desk.state["starting"] is True
    assert "session_id" not in desk.state
    status = desk.run("status", "--json")
    assert status.code == 3
    assert status.error["code"] == "no_sandbox"
    assert desk.good("stop").err
    plato.advance(130)
    nothing_left(desk, plato)


def test_second_signal_during_the_cleanup_ends_at_once(desk: Desk, plato: LocalPlato) -> None:
    reset, close = ("POST", "/reset", False), ("POST", "/close", False)
    hold(plato, *reset)
    hold(plato, *close)
    process = desk.begin("start", "--from-config", "--json")
    wait_until_held(plato, *reset)
    process.send_signal(signal.SIGINT)
    wait_until_held(plato, *close)
    process.send_signal(signal.SIGINT)
    error = interrupted(desk, process, signal.SIGINT)
    assert living(plato) == [desk.state["job_id"]]
    plato.clear_faults()
    desk.good(*named_command(desk, error["hint"]))
    nothing_left(desk, plato)


FAILURES: dict[str, dict[str, Any]] = {
    "500": {"effect": "status", "status": 500},
    "401": {"effect": "status", "status": 401},
    "html": {"effect": "html", "status": 200},
    "refused": {"effect": "status", "status": 200, "body": {"success": False, "message": "not now"}},
}


@pytest.mark.sampled
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_close_that_fails_after_a_signal_leaves_the_record(
    desk: Desk, plato: LocalPlato, failure: dict[str, Any]
) -> None:
    reset = ("POST", "/reset", False)
    hold(plato, *reset)
    plato.fault(path="*/close", times=-1, **failure)
    process = desk.begin("start", "--from-config", "--json")
    wait_until_held(plato, *reset)
    process.send_signal(signal.SIGTERM)
    error = interrupted(desk, process, signal.SIGTERM)
    assert living(plato) == [desk.state["job_id"]]
    plato.clear_faults()
    desk.good(*named_command(desk, error["hint"]))
    nothing_left(desk, plato)


@pytest.mark.sampled
@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
def test_stop_that_is_interrupted_loses_nothing(
    desk: Desk, plato: LocalPlato, number: signal.Signals
) -> None:
    desk.good("start", "--from-config")
    close = ("POST", "/close", False)
    hold(plato, *close)
    process = desk.begin("stop", "--json")
    wait_until_held(plato, *close)
    process.send_signal(number)
    interrupted(desk, process, number)
    assert heartbeats(desk) == [desk.state["heartbeat_pid"]]
    plato.clear_faults()
    desk.good("stop")
    nothing_left(desk, plato)


def test_ignored_hangup_stays_ignored(desk: Desk, plato: LocalPlato) -> None:
    """Under nohup a hangup does not end `start`."""
    plato.fault("latency", path="*/reset", seconds=1)
    hook = "import os, signal as s, sys; s.signal(s.SIGHUP, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    process = desk.begin_command(
        [sys.executable, "-c", hook, *desk.command("start", "--from-config", "--json")]
    )
    wait_until_held(plato, "POST", "/reset", act=True)
    process.send_signal(signal.SIGHUP)
    code, _, err = ending(process)
    assert code == 0, err
    desk.good("stop")
    nothing_left(desk, plato)


# -- on a terminal --


@pytest.mark.parametrize(
    "step", [("POST", "/make"), ("GET", "/wait_for_ready"), ("POST", "/reset")], ids=lambda x: x[1]
)
def test_terminal_closed_during_start(desk: Desk, plato: LocalPlato, step: tuple[str, str]) -> None:
    """The hangup closes the VM, although nothing can be written to the terminal any more."""
    method, path = step
    if path == "/make":
        plato.fault("latency", path="*/make", seconds=1)
    else:
        hold(plato, method, path, act=False)
    process, master = desk.begin_on_terminal("start", "--from-config")
    wait_until_held(plato, method, path, act=path == "/make")
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    nothing_left(desk, plato)


def test_ctrl_c_typed_at_the_terminal(desk: Desk, plato: LocalPlato) -> None:
    reset = ("POST", "/reset", False)
    hold(plato, *reset)
    process, master = desk.begin_on_terminal("start", "--from-config")
    wait_until_held(plato, *reset)
    os.write(master, b"\x03")
    assert process.wait(60) == 130
    said = os.read(master, 65536).decode()
    os.close(master)
    assert "Nothing is left running" in said
    nothing_left(desk, plato)


# -- SIGKILL --


def test_killed_before_make_was_answered(desk: Desk, plato: LocalPlato) -> None:
    step = MAKE["after acting"]
    hold(plato, *step)
    process = desk.begin("start", "--from-config")
    wait_until_held(plato, *step)
    process.kill()
    process.wait()
    eventually(lambda: living(plato))
    assert heartbeats(desk) == []
    unknown_start_is_understood(desk, plato)


@pytest.mark.sampled
@pytest.mark.parametrize("step", AFTER_MAKE.values(), ids=AFTER_MAKE)
def test_killed_while_start_waits(desk: Desk, plato: LocalPlato, step: tuple[str, str, bool]) -> None:
    hold(plato, *step)
    process = desk.begin("start", "--from-config")
    wait_until_held(plato, *step)
    process.kill()
    process.wait()
    status = desk.good("status")
    assert "  VM Status:   running\n" in status.out
    assert f"  Heartbeat:   running (PID: {desk.state['heartbeat_pid']})\n" in status.out
    second = desk.run("start", "--from-config")
    assert second.code == 5
    desk.good("stop")
    nothing_left(desk, plato)


SIGNAL_AT_LINE = """
import os, runpy, signal, sys

begin, limit, first, last, product = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
reached = set()
begun = False

def enter(frame, event, argument):
    global begun
    if not begun and frame.f_code.co_name == begin:
        begun = True
        if begin != "run_start":
            os.kill(os.getpid(), signal.SIGTERM)
    return at_line if begun and frame.f_code.co_filename == product else None

def at_line(frame, event, argument):
    place = frame.f_code, frame.f_lineno
    if event == "line" and first < frame.f_lineno < last and place not in reached:
        reached.add(place)
        if len(reached) == limit:
            os.kill(os.getpid(), signal.SIGTERM)
    return at_line

sys.argv = sys.argv[5:]
sys.settrace(enter)
runpy.run_path(product, run_name="__main__")
"""


def section_lines(product: Path, first: str, last: str) -> tuple[int, int]:
    """The lines of the product from the banner of one section to that of a later one."""
    lines = product.read_text().splitlines()
    numbers = [
        next(n for n, line in enumerate(lines, 1) if line.startswith(f"# {name}: ")) for name in (first, last)
    ]
    return numbers[0], numbers[1]


@pytest.mark.long
@pytest.mark.parametrize("remainder", range(4))
def test_signal_at_any_line_of_start(
    new_desk: Callable[..., Desk], plato: LocalPlato, remainder: int
) -> None:
    """SIGTERM when a line of the product is reached first, for lines all over `start`."""
    desk = new_desk(plato.environment)
    bounds = section_lines(desk.product, "processes", "output")
    number, step = 1 + SIGNAL_STEP * remainder, SIGNAL_STEP * 4
    while True:
        hook = [sys.executable, "-c", SIGNAL_AT_LINE, "run_start", *map(str, (number, *bounds))]
        done = desk.run(command=[*hook, *desk.words("start", "--from-config", "--json")])
        if done.code == 0:
            break
        assert done.code == 128 + signal.SIGTERM, (number, done.err)
        assert done.error["code"] == "interrupted"
        if desk.state_file.exists():  # it came after the last step: the sandbox is whole
            assert "starting" not in desk.state
            desk.good(*named_command(desk, done.error["hint"]))
        assert desk.leftovers() == [], (number, done.err)
        eventually(lambda: not heartbeats(desk))
        assert living(plato) == [], (number, done.err)
        number += step
    assert number > 300
    desk.good("stop")


@pytest.mark.sampled
@pytest.mark.parametrize("number", range(1, 130, 8))
def test_second_signal_at_any_line_of_the_cleanup(desk: Desk, plato: LocalPlato, number: int) -> None:
    """The first SIGTERM comes when the VM is to be reset, the second at some line of closing it."""
    bounds = section_lines(desk.product, "processes", "output")
    hook = [sys.executable, "-c", SIGNAL_AT_LINE, "reset", *map(str, (number, *bounds))]
    done = desk.run(command=[*hook, *desk.words("start", "--from-config", "--json")])
    assert done.code == 128 + signal.SIGTERM
    if desk.state_file.exists():
        desk.good(*named_command(desk, done.error["hint"]))
    nothing_left(desk, plato)


SLOW_KEYGEN = """#!/bin/sh
echo $$ > {place}/keygen.pid
read line < {place}/go
exec {keygen} "$@"
"""


# As soon as the thread that makes the key has begun to, before whoever started the thread knows of it.
SIGNAL_TO_KEYS_PARENT = """
import os, runpy, signal, sys, threading, time

begin = threading.Thread.start

def start(thread):
    begin(thread)
    for _ in range(100):
        if os.path.exists("../keygen.pid"):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

threading.Thread.start = start
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("at_once", [False, True])
def test_key_that_is_still_being_made_does_not_come_later(
    desk: Desk, plato: LocalPlato, at_once: bool
) -> None:
    desk.tune(KEY_SECONDS=2.0)
    tools = desk.place / "tools"
    tools.mkdir()
    slow = tools / "ssh-keygen"
    slow.write_text(SLOW_KEYGEN.format(place=desk.place, keygen=part("ssh-keygen", "openssh-client")))
    slow.chmod(0o755)
    os.mkfifo(desk.place / "go")
    desk.environment["PATH"] = f"{tools}:{desk.environment['PATH']}"
    words = ("start", "--from-config", "--json")
    hook = [sys.executable, "-c", SIGNAL_TO_KEYS_PARENT, *desk.words(*words)]
    process = desk.begin_command(hook) if at_once else desk.begin(*words)
    noted = desk.place / "keygen.pid"
    maker = int(eventually(lambda: noted.exists() and noted.read_text()))
    if not at_once:
        process.send_signal(signal.SIGTERM)
    interrupted(desk, process, signal.SIGTERM)
    go = os.open(desk.place / "go", os.O_RDWR)
    os.write(go, b"\n")
    eventually(lambda: not is_running(maker))
    os.close(go)
    nothing_left(desk, plato)


SIGNAL_TO_HEARTBEATS_PARENT = """
import io, os, runpy, signal, subprocess, sys

class Reader(io.BufferedReader):
    def read(self, *words):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().read(*words)

class Popen(subprocess.Popen):
    def __init__(self, args, **options):
        super().__init__(args, **options)
        if "heartbeat-child" in args:
            self.stdout = Reader(self.stdout.detach())

subprocess.Popen = Popen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_signal_while_the_heartbeat_begins(desk: Desk, plato: LocalPlato) -> None:
    """The child has its task but no lock yet: it must not come to life when everything is removed."""
    done = desk.run(
        command=[sys.executable, "-c", SIGNAL_TO_HEARTBEATS_PARENT, *desk.words("start", "--from-config")]
    )
    assert done.code == 128 + signal.SIGTERM
    nothing_left(desk, plato)
