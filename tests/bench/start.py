#!/usr/bin/env python3
"""Measures what `start` adds to the server's own time: `python3 tests/bench/start.py [--boot-seconds N]`.

Every mode of ours, and a blank VM with both SDK releases, at a local Plato whose VMs boot that long. The
server's path is read from its log: the time in which it booted the VM or worked on a request of the command.
The rest of the time that the command took is its overhead: before `make` arrived, between the server's
answers and the next requests, and after the last answer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from localplato import LocalPlato  # noqa: E402

from bench import shared  # noqa: E402
from bench.shared import Desk, Measured  # noqa: E402

MODES = {
    "ours, blank": ("--blank", "--service", "bench"),
    "ours, config": ("--from-config",),
    "ours, simulator": ("--simulator", "espocrm"),
    "ours, artifact": ("--artifact-id", "art_abc123"),
}


class Parts(NamedTuple):
    """The seconds of one `start`."""

    server: float
    before: float
    between: float
    after: float
    requests: int

    @property
    def overhead(self) -> float:
        return self.before + self.between + self.after


class Starts:
    """One client's starts at a local Plato, each stopped again."""

    def __init__(self, plato: LocalPlato, desk: Desk, words: tuple[str, ...], boot_seconds: float) -> None:
        self.plato = plato
        self.desk = desk
        self.words = words
        self.boot_seconds = boot_seconds
        self.parts: list[Parts] = []

    def run(self) -> Measured:
        number = self.last_number()
        began = time.time()
        try:
            measured = self.desk.run("start", *self.words)
            ended = time.time()
            self.parts.append(self.split(number, began, ended))
        finally:
            self.desk.quietly("stop")
        return measured

    def last_number(self) -> int:
        return int(self.plato.admin("GET", "status")["requests"])

    def split(self, number: int, began: float, ended: float) -> Parts:
        """Where the time between two moments went, by the server's log of the requests after a number."""
        requests = [one for one in self.plato.requests(since=number) if one["time"] <= ended]
        # Heartbeats are sent by a process that the command does not wait for.
        spans = [
            (one["time"], min(one["settled"] or ended, ended))
            for one in requests
            if not one["path"].endswith("/heartbeat")
        ]
        make = next(one for one in requests if one["path"].endswith("/sessions/make"))
        spans.append((make["time"], min(make["time"] + self.boot_seconds, ended)))
        spans = merged(spans)
        first, last = make["time"], spans[-1][1]
        early = sum(min(end, first) - start for start, end in spans if start < first)
        server = sum(end - start for start, end in spans)
        before = first - began - early
        after = ended - last
        return Parts(server, before, ended - began - server - before - after, after, len(spans))


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretches of time without those that lie within another, and joined where they overlap."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def make_contest(place: Path, plato: LocalPlato, options: Any) -> dict[str, Starts]:
    contest = {}
    for name, words in MODES.items():
        desk = shared.our_desk(place / name.replace(", ", "-"), plato, options.program)
        for file in (ROOT / "tests" / "simulator").glob("*.yml"):
            shutil.copy(file, desk.work)
        contest[name] = Starts(plato, desk, words, options.boot_seconds)
    for release in options.releases:
        desk = shared.sdk_desk(place / release, plato, release, options.cache)
        words = tuple(shared.sdk_start(release)[1:])
        contest[f"SDK {release}, blank"] = Starts(plato, desk, words, options.boot_seconds)
    return contest


def part_table(contest: dict[str, Starts], results: shared.Results) -> str:
    """Seconds of the command, the server's path and the parts of the overhead, medians."""
    rows = []
    for name, starts in contest.items():
        runs, parts = results[name], starts.parts[-len(results[name]) :]
        if not runs:
            rows.append([name, "failed", *["-"] * 7])
            continue
        overheads = [part.overhead for part in parts]
        rows.append(
            [
                name,
                shared.spread([one.seconds for one in runs], "{:.2f} s"),
                middle(parts, lambda part: part.server),
                shared.spread(overheads, "{:.2f} s"),
                middle(parts, lambda part: part.before),
                middle(parts, lambda part: part.between),
                middle(parts, lambda part: part.after),
                f"{max(one.megabytes for one in runs):.0f} MB",
            ]
        )
    heads = ["`start`", "the command", "server's path", "overhead", "before `make`", "between", "after"]
    return shared.markdown([*heads, "peak memory"], rows)


def middle(parts: list[Parts], pick: Callable[[Parts], float]) -> str:
    return f"{statistics.median(map(pick, parts)):.2f} s"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--boot-seconds", type=float, default=5.0, help="of every VM (default: 5)")


def main() -> int:
    options = shared.options_of(__doc__, add_options)
    before = os.getloadavg()
    with shared.patient_plato(boot_seconds=options.boot_seconds) as (place, plato):
        options.program = shared.installed_command(place)
        contest = make_contest(place, plato, options)
        results = shared.interleave({name: one.run for name, one in contest.items()}, options.runs)
        table = part_table(contest, results)
    how = f"medians of {options.runs} runs by turns (minimum to maximum), VMs boot {options.boot_seconds:g} s"
    print(shared.machine_line(how, before))
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
