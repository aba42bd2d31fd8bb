#!/usr/bin/env python3
"""Measures the process that keeps a VM alive: `python3 tests/bench/heartbeat.py [--seconds N]`.

Ours and those of both SDK releases, at a local Plato, against an interpreter that only sleeps: memory of
one process and of a hundred of ours on this host, and what a beat costs in CPU time and wake-ups (voluntary
context switches, of which waiting for the answer is one). Linux only: all is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from localplato import LocalPlato  # noqa: E402

import plato_sandbox as product  # noqa: E402
from bench import shared  # noqa: E402
from bench.shared import Desk  # noqa: E402

FAST_SECONDS = 0.5
THEIR_SECONDS = 30.0  # between two heartbeats of the SDK, by default
START_SECONDS = 60.0
FLOOR = "import time; time.sleep(600)"
INTERVAL = "PLATO_HEARTBEAT_INTERVAL_SECONDS"


OURS = "ours"
# How the program of an SDK's heartbeat says how long it waits: in its own words, and in ours.
WRITTEN = {
    "2.0.40": (f"time.sleep({THEIR_SECONDS:g})", "time.sleep({})"),
    "2.187.0": (f"INTERVAL = {float(shared.BEAT_SECONDS)}", "INTERVAL = {}"),
}
FLOOR_NAME = f'`python3 -I -S -c "{FLOOR}"`'
DEFAULTS = {
    OURS: product.Settings().heartbeat_seconds,
    **{f"SDK {release}": THEIR_SECONDS for release in WRITTEN},
}


class Memory(NamedTuple):
    """In MB: what is resident, and of it what this process would free (shared pages count in part)."""

    resident: float
    proportional: float


class Usage(NamedTuple):
    """What a process has used so far: seconds of CPU, and how often it went to sleep of its own accord."""

    cpu: float
    switches: int


class Beats(NamedTuple):
    """Of some processes over a stretch of time."""

    beats: int
    cpu: float
    switches: int


def memory_of(pid: int) -> Memory:
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        fields[name] = int(amount) / 1024
    return Memory(fields["Rss:"], fields["Pss:"])


def usage_of(pid: int) -> Usage:
    """In nanoseconds where the kernel counts so; its other clock has only 100 ticks a second."""
    switches, cpu = 0, 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                switches += int(line.split()[1])
        try:
            cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            user, system = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
            cpu += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return Usage(cpu, switches)


# ---------------------------------------------------------------------------
# processes to measure
# ---------------------------------------------------------------------------


class Children:
    """Processes that were started here, each ended and waited for in the end."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def add(self, pid: int) -> int:
        self.pids.append(pid)
        return pid

    def end(self, pid: int) -> None:
        self.pids.remove(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def end_all(self) -> None:
        for pid in list(self.pids):
            self.end(pid)


class Ours:
    """Starts our heartbeats for one session, each with a home and a directory of its own as for a VM each."""

    def __init__(self, place: Path, plato: LocalPlato, state_file: Path) -> None:
        self.place = place
        self.plato = plato
        self.state_file = state_file
        self.count = 0

    def spawn(self, interval: float) -> int:
        self.count += 1
        directory = self.place / f"child{self.count}"
        home = directory / "home"
        home.mkdir(parents=True)
        shutil.copy(self.state_file, directory)
        environment = {**self.plato.environment, "PLATO_HOME": str(home), INTERVAL: str(interval)}
        settings = product.Settings.from_environment(environment)
        state = product.load_state(str(directory))
        assert state is not None
        return product.spawn_heartbeat(settings, state, str(directory), product.Reporter())


class Theirs:
    """Starts an SDK's heartbeat again: the program and environment of the one that its `start` started.

    That one is ended: 2.0.40's beats every 30 s whatever the environment says, and would be counted.
    """

    def __init__(self, desk: Desk, release: str) -> None:
        pid = heartbeat_of(desk)
        place = Path(f"/proc/{pid}")
        self.command = [os.fsdecode(word) for word in (place / "cmdline").read_bytes().split(b"\0")[:-1]]
        words = [os.fsdecode(word) for word in (place / "environ").read_bytes().split(b"\0")[:-1]]
        pairs = (word.partition("=") for word in words)
        self.environment = {name: value for name, _, value in pairs}
        self.written, self.ours = WRITTEN[release]
        if not any(self.written in word for word in self.command):
            raise RuntimeError("its heartbeat is not the program that it was")
        os.kill(pid, signal.SIGTERM)

    def spawn(self, interval: float) -> int:
        command = [word.replace(self.written, self.ours.format(interval)) for word in self.command]
        return begin(command, self.environment)


def begin(command: list[str], environment: dict[str, str]) -> int:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    process.returncode = 0  # `Children` waits for it
    return process.pid


def heartbeat_of(desk: Desk) -> int:
    """The pid of the heartbeat with a desk's home. RuntimeError without one."""
    home = os.fsencode(f"HOME={desk.environment['HOME']}")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if b"heartbeat" in command and home in environment.split(b"\0"):
            return int(process.name)
    raise RuntimeError("its heartbeat does not run")


def memories_before(place: Path, plato: LocalPlato, product: Path, runs: int) -> dict[str, list[Memory]]:
    """Of the heartbeats of another file, each as its own `start` starts it, after some beats."""
    found: dict[str, list[Memory]] = {}
    for name, word in (("before", ""), ("before, without bytecode", "1")):
        found[name] = []
        (place / f"p{word}").mkdir(parents=True)
        copy = shutil.copy(product, place / f"p{word}" / "plato_sandbox.py")
        for run in range(runs):
            desk = shared.our_desk(place / f"{name}{run}", plato, [sys.executable, str(copy)])
            desk.environment.update({INTERVAL: str(FAST_SECONDS), "PYTHONDONTWRITEBYTECODE": word})
            desk.run("start", "--blank", "--service", "bench")
            time.sleep(4 * FAST_SECONDS)
            found[name].append(memory_of(heartbeat_of(desk)))
            desk.quietly("stop")
    return found


def begin_floor(_: float) -> int:
    return begin([*shared.BARE, "-c", FLOOR], dict(os.environ))


# ---------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------


class Bench:
    """Starts processes by their names and counts their beats, by the session that each name's have."""

    def __init__(self, plato: LocalPlato) -> None:
        self.plato = plato
        self.spawners: dict[str, Callable[[float], int]] = {}
        self.sessions: dict[str, str] = {}
        self.children = Children()
        self.last_memories: list[Memory] = []

    def spawn(self, name: str, interval: float, count: int = 1) -> list[int]:
        """Start processes and wait until each has sent a heartbeat."""
        number = self.number()
        pids = [self.children.add(self.spawners[name](interval)) for _ in range(count)]
        self.wait_for_beats(name, number, count)
        return pids

    def beats(self, name: str, since: int) -> int:
        """How many heartbeats have come since the request of a number."""
        if name not in self.sessions:
            return 0
        return len(self.plato.requests("POST", f"/{self.sessions[name]}/heartbeat", since))

    def number(self) -> int:
        return int(self.plato.admin("GET", "status")["requests"])

    def wait_for_beats(self, name: str, since: int, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while name in self.sessions and self.beats(name, since) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}: no {count} heartbeats in {START_SECONDS:g} s")
            time.sleep(0.1)
        time.sleep(FAST_SECONDS / 2)  # between two beats, also for the floor, which has none

    def memory_by_turns(self, runs: int) -> dict[str, list[Memory]]:
        """Of one new process of each kind at a time, after some beats."""
        found: dict[str, list[Memory]] = {name: [] for name in self.spawners}
        for _ in range(runs):
            for name, memories in found.items():
                number = self.number()
                (pid,) = self.spawn(name, FAST_SECONDS)
                self.wait_for_beats(name, number, 3)
                memories.append(memory_of(pid))
                self.children.end(pid)
        return found

    def stretch(self, name: str, pids: list[int], seconds: float) -> Beats:
        """What some processes use in so many seconds."""
        number, before = self.number(), [usage_of(pid) for pid in pids]
        time.sleep(seconds)
        after = [usage_of(pid) for pid in pids]
        cpu = sum(one.cpu for one in after) - sum(one.cpu for one in before)
        switches = sum(one.switches for one in after) - sum(one.switches for one in before)
        return Beats(self.beats(name, number), cpu, switches)

    def row(self, name: str, count: int, interval: float, default: float, seconds: float) -> list[str]:
        """The cost of a beat, and of an hour of beats at the client's own interval."""
        pids = self.spawn(name, interval, count)
        found = self.stretch(name, pids, seconds)
        self.last_memories = [memory_of(pid) for pid in pids]
        for pid in pids:
            self.children.end(pid)
        words = ["-", "-", "-"]
        if found.beats:
            cost, wakes = found.cpu / found.beats, found.switches / found.beats
            words = [f"{cost * 1000:.2f} ms", f"{wakes:.1f}", f"{cost * 3600 / default:.2f} s"]
        return [name, str(count), f"{interval:g} s", str(found.beats), *words]


def memory_rows(found: dict[str, list[Memory]]) -> list[list[str]]:
    return [
        [
            name,
            shared.spread([one.resident for one in memories], "{:.1f} MB"),
            shared.spread([one.proportional for one in memories], "{:.1f} MB"),
        ]
        for name, memories in found.items()
    ]


def prepare(place: Path, plato: LocalPlato, bench: Bench, desks: dict[str, Desk], options: Any) -> None:
    """Start a sandbox with each client, whose heartbeats are then started again and again."""
    bench.spawners[FLOOR_NAME] = begin_floor
    desks[OURS] = shared.our_desk(place / "ours", plato)
    state = json.loads(desks[OURS].output("start", "--blank", "--service", "bench", "--json"))
    bench.sessions[OURS] = state["session_id"]
    bench.spawners[OURS] = Ours(place, plato, desks[OURS].work / ".sandbox.yaml").spawn
    for release in options.releases:
        theirs = f"SDK {release}"
        known = {session["session_id"] for session in plato.sessions()}
        desk = shared.sdk_desk(place / release, plato, release, options.cache)
        if shared.started(theirs, desk, *shared.sdk_start(release)):
            desks[theirs] = desk
            ids = {session["session_id"] for session in plato.sessions()} - known
            (bench.sessions[theirs],) = ids
            bench.spawners[theirs] = Theirs(desk, release).spawn


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0, help="of each stretch (default: 60)")
    parser.add_argument("--many", type=int, default=0, help="heartbeats at once (default: 100)")


def main() -> int:
    options = shared.options_of(__doc__, add_options)
    seconds = options.seconds or (4.0 if options.quick else 60.0)
    many = options.many or (10 if options.quick else 100)
    before = os.getloadavg()
    with shared.patient_plato() as (place, plato):
        bench = Bench(plato)
        desks: dict[str, Desk] = {}
        rows = []
        try:
            prepare(place, plato, bench, desks, options)
            memories = bench.memory_by_turns(options.runs)
            for client, default in DEFAULTS.items():
                for interval in [FAST_SECONDS] if options.quick else [FAST_SECONDS, default]:
                    if client in bench.spawners:
                        length = max(seconds, 2 * interval)
                        rows.append(bench.row(client, 1, interval, default, length))
            interval = FAST_SECONDS if options.quick else DEFAULTS[OURS]
            rows.append(bench.row(OURS, many, interval, DEFAULTS[OURS], max(seconds, 2 * interval)))
            memories[f"{OURS}, each of {many} at once"] = bench.last_memories
            if options.before:
                memories.update(memories_before(place / "before", plato, options.before, options.runs))
        finally:
            bench.children.end_all()
            for desk in desks.values():
                desk.quietly("stop")
    how = f"medians of {options.runs} processes by turns (minimum to maximum), stretches of {seconds:g} s"
    print(shared.machine_line(how, before))
    print(shared.markdown(["process", "resident", "proportional"], memory_rows(memories)) + "\n")
    heads = ["heartbeat", "processes", "interval", "beats", "CPU a beat", "wake-ups a beat", "CPU an hour"]
    print(shared.markdown(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
