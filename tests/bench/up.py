#!/usr/bin/env python3
"""Measures what `up` saves by sending the code while the VM boots: `python3 tests/bench/up.py [--quick]`.

`up` against the same commands in a row, by turns, at a local Plato that takes 50 ms for a request and 150 ms
more for a command. Both end where Docker would begin: what Compose, the worker and the flow take is the same
in both, and is left out by VMs without Docker, at which both fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bench import shared  # noqa: E402
from bench.shared import Desk, Measured  # noqa: E402
from bench.sync import COMMAND_SECONDS, REQUEST_SECONDS, make_tree  # noqa: E402

if TYPE_CHECKING:
    import argparse

IN_A_ROW = (("check",), ("start", "--from-config"), ("start-services",))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--boot-seconds", type=float, default=5.0, help="that a VM takes to boot")
    parser.add_argument("--connect-seconds", type=float, default=10.0, help="that its network takes")
    parser.add_argument("--files", type=int, default=2000, help="of 10 kB beside the example simulator")


def timed(desk: Desk, *commands: tuple[str, ...]) -> Measured:
    """The time of commands in a row, of which only the last may fail, for want of Docker."""
    began = time.perf_counter()
    for words in commands:
        done = subprocess.run(
            [*desk.program, *words], cwd=desk.work, env=desk.environment, capture_output=True, text=True
        )
        if done.returncode and (words != commands[-1] or "no docker" not in done.stderr):
            raise RuntimeError(done.stderr)
    seconds = time.perf_counter() - began
    desk.output("stop")
    return Measured(seconds, 0)


def main() -> int:
    options = shared.options_of(__doc__, add_options)
    before = os.getloadavg()
    times = {"boot_seconds": options.boot_seconds, "connect_seconds": options.connect_seconds}
    with shared.patient_plato(docker="absent", **times) as (place, plato):
        desk = shared.our_desk(place / "desk", plato, shared.installed_command(place))
        shutil.copytree(ROOT / "tests" / "simulator", desk.work, dirs_exist_ok=True)
        make_tree(desk.work / "data", options.files // (10 if options.quick else 1), 10_000)
        plato.fault("latency", path="*/execute", seconds=REQUEST_SECONDS + COMMAND_SECONDS, times=-1)
        plato.fault("latency", seconds=REQUEST_SECONDS, times=-1)
        contestants = {
            "`up`": lambda: timed(desk, ("up",)),
            "`check`, `start`, `start-services`": lambda: timed(desk, *IN_A_ROW),
        }
        results = shared.interleave(contestants, min(options.runs, 5), warm=False)
    how = (
        f"medians of {min(options.runs, 5)} runs by turns (minimum to maximum), {options.files} files,"
        f" boot {options.boot_seconds:g} s, network {options.connect_seconds:g} s"
    )
    print(shared.machine_line(how, before))
    rows = [
        [name, shared.spread([one.seconds for one in runs], "{:.2f} s")] for name, runs in results.items()
    ]
    print(shared.markdown(["until the code is pushed", "time"], rows))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
