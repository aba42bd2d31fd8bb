#!/usr/bin/env python3
"""Runs every benchmark in turn: `python3 tests/bench/run.py [--quick]`. Their tables go to stdout.

Run it on an idle machine, in the environment of the tests (tests/run.py makes it), since some need more than
the standard library. One that fails is named at the end, and the others run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parent
# With what they are called for --quick.
BENCHMARKS = {
    "startup.py": ["--quick"],
    "start.py": ["--quick"],
    "up.py": ["--quick"],
    "heartbeat.py": ["--quick"],
    "ssh.py": ["--quick"],
    "yaml_reader.py": ["--quick"],
    "sync.py": ["--quick"],
    "flow.py": ["1"],
    "audit.py": ["--tables", "20", "--rows", "100"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few runs and little data: do they work?")
    options = parser.parse_args()
    failed = []
    for name, quick in BENCHMARKS.items():
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, str(PLACE / name), *(quick if options.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nThese failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
