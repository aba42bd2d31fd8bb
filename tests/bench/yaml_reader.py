#!/usr/bin/env python3
"""Compares our YAML reader with PyYAML's: `python3 tests/bench/yaml_reader.py [--kilobytes N]`.

All of them read a file like a plato-config.yml, of many datasets, each in a process of its own in which only
the reading is timed. Needs PyYAML in the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bench import shared  # noqa: E402
from bench.shared import Measured  # noqa: E402

OURS = "ours"
PURE = "PyYAML, SafeLoader"
# Prints the seconds of the reading, the peak memory in kB of this program alone (the kernel's other count
# begins with what the process that started it had), and a digest of the value.
READ = """
import hashlib, json, os, sys, time
{imports}
with open(sys.argv[1], encoding="utf-8") as file:
    text = file.read()
began = time.perf_counter()
value = {call}
seconds = time.perf_counter() - began
peak = 0
if os.path.exists("/proc/self/status"):
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
print(seconds, peak, digest)
"""
READERS = {
    OURS: ("import plato_sandbox", "plato_sandbox.yaml_load(text)"),
    PURE: ("import yaml", "yaml.load(text, yaml.SafeLoader)"),
    "PyYAML, CSafeLoader": ("import yaml", "yaml.load(text, yaml.CSafeLoader)"),
}
DATASET = """\
  # What the tests of part {number} need.
  dataset-{number}:
    compute: {{cpus: {cpus}, memory: {memory}, disk: 10240, app_port: 8080, plato_messaging_port: 7000}}
    metadata:
      name: "The dataset {number} of the \\"bench\\" simulator"
      description: >-
        {words}
        and some more {words}
      flows_path: flows/{number}.yml
      start_url: 'https://example.com/board/{number}?view=all'
      variables:
        - {{name: user, value: admin-{number}@example.com}}
        - {{name: enabled, value: true}}
    services:
      main_app:
        type: docker-compose
        file: docker-compose.yml  # beside this file
        required_healthy_containers:
          - app
          - db
        healthy_wait_timeout: 600
    listeners:
      db:
        type: db
        db_type: postgresql
        db_host: 127.0.0.1
        db_port: 5432
        db_user: app
        db_database: board_{number}
        audit_ignore_tables:
          - sessions
          - table: users
            columns: [last_seen_at, updated_at, {word}]
        volumes:
          - /home/plato/db_signals:/tmp/postgres-signals
    script: |
      set -e
      echo "{words}"
"""


def make_config(path: Path, size: int) -> None:
    source = random.Random(size)
    words = [
        "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(3, 9))) for _ in range(200)
    ]
    parts = ["service: bench\ndatasets:\n"]
    length = 0
    while length < size:
        text = DATASET.format(
            number=len(parts),
            cpus=source.randint(1, 8),
            memory=source.randint(512, 16384),
            words=" ".join(source.choices(words, k=9)),
            word=source.choice(words),
        )
        parts.append(text)
        length += len(text)
    path.write_text("".join(parts))


class Reader:
    """Reads the file in a new process each time; what it read must be what the others read."""

    def __init__(self, path: Path, code: str, digests: set[str]) -> None:
        self.path = path
        self.code = code
        self.digests = digests

    def run(self) -> Measured:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # reading is to be measured, not compiling
        done = subprocess.run(
            [sys.executable, "-c", self.code, str(self.path)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        seconds, peak, digest = done.stdout.split()
        self.digests.add(digest)
        if len(self.digests) > 1:
            raise RuntimeError("the readers do not agree about the file")
        return Measured(float(seconds), int(peak) / 1024)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kilobytes", type=int, default=0, help="size of the file (default: 1000)")


def main() -> int:
    options = shared.options_of(__doc__, add_options)
    before = os.getloadavg()
    size = 1000 * (options.kilobytes or (100 if options.quick else 1000))
    digests: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "plato-config.yml"
        make_config(path, size)
        readers = {
            reader: Reader(path, READ.format(imports=imports, call=call), digests)
            for reader, (imports, call) in READERS.items()
        }
        results = shared.interleave({reader: one.run for reader, one in readers.items()}, options.runs)
        length = path.stat().st_size
    print(shared.machine_line(f"medians of {options.runs} runs by turns, a file of {length:,} bytes", before))
    print(shared.times_table(results, [OURS, PURE], "reader"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
