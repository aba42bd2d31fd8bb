#!/usr/bin/env python3
"""Compares `sync` with the two SDK releases and with `tar | ssh`: `python3 tests/bench/sync.py [--quick]`.

All of them work against one local Plato that takes 50 ms for a request and 150 ms more for a command. The
SDKs are installed into virtual environments of their own (--cache DIR). Prints a table of medians, of ratios
to ours, and of peak memory. Needs the OpenSSH client and server, and rsync for the newest SDK.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from localplato import LocalPlato  # noqa: E402

from bench import shared  # noqa: E402
from bench.shared import LIFETIME_SECONDS, RELEASES, Measured, install, make_openssl, measure  # noqa: E402

OLD_SDK = "SDK 2.0.40"
REQUEST_SECONDS = 0.05
COMMAND_SECONDS = 0.15


class Desk(NamedTuple):
    """Where one client works: its directory, its environment, and its commands to start, sync and stop."""

    work: Path
    environment: dict[str, str]
    start: list[str]
    sync: list[str]
    stop: list[str]

    def measure(self, command: list[str]) -> Measured:
        return measure(command, self.work, self.environment)


def make_tree(root: Path, files: int, size: int) -> None:
    """Files of two kinds by turns: like source code, which shrinks to a quarter, and incompressible."""
    source = random.Random(files)
    words = [
        bytes(source.choices(b"abcdefghijklmnopqrstuvwxyz_", k=source.randint(2, 9))) for _ in range(2000)
    ]
    for number in range(files):
        place = root / f"part{number % 40}" / f"sub{number % 7}"
        place.mkdir(parents=True, exist_ok=True)
        if number % 2:
            content = source.randbytes(size)
        else:
            content = b" ".join(source.choices(words, k=size // 6))[:size]
        (place / f"file{number}").write_bytes(content)


def make_noise(root: Path, megabytes: int) -> None:
    for number in range(max(1, megabytes // 10)):
        with open(root / f"noise{number}", "wb") as file:
            for _ in range(10):
                file.write(os.urandom(1 << 20))


def touch(root: Path, count: int) -> None:
    """Change so many files."""
    for path in sorted(path for path in root.rglob("file*") if path.is_file())[:count]:
        with open(path, "ab") as file:
            file.write(b"x")


def make_desk(place: Path, plato: LocalPlato, program: list[str], start: list[str], sync: list[str]) -> Desk:
    work, home = place / "work", place / "home"
    work.mkdir(parents=True)
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(home), **plato.environment}
    return Desk(work, environment, [*program, *start], [*program, *sync], [*program, "stop"])


class Contest:
    """The clients on one local Plato, and what was measured."""

    def __init__(
        self,
        place: Path,
        plato: LocalPlato,
        cache: Path,
        repeats: int,
        releases: tuple[str, ...],
        before: Optional[Path],
    ) -> None:
        self.plato = plato
        self.repeats = repeats
        self.place = place
        blank = ["start", "--blank", "--service", "bench"]
        self.desks = {}
        for name, product in {"ours": shared.PRODUCT, **({"before": before} if before else {})}.items():
            program = [sys.executable, str(product)]
            for way in ("API", "SSH"):
                words = ["sync", "--via", way.lower()]
                self.desks[f"{name}, {way}"] = make_desk(
                    place / f"{name}-{way}", plato, program, blank, words
                )
        for release in releases:
            program = install(release, cache)
            named = ["--service", "bench"] if release == "2.0.40" else []
            start = ["start", "--blank", *named, "--timeout", LIFETIME_SECONDS]
            sync = ["sync", "--timeout", "600"]
            if release != "2.0.40":
                sync += ["--simulator-name", "bench"]
            desk = make_desk(place / release, plato, program, start, sync)
            desk.environment["PLATO_SSH_OPENSSL_BIN"] = str(make_openssl(place / release))
            self.desks[f"SDK {release}"] = desk
        self.results: dict[str, dict[str, object]] = {}

    def start(self) -> None:
        for name, desk in list(self.desks.items()):
            try:
                desk.measure(desk.start)
            except RuntimeError as error:
                print(f"{name}: it could not start a sandbox here: {error}", file=sys.stderr)
                del self.desks[name]

    def stop(self) -> None:
        for desk in self.desks.values():
            subprocess.run(desk.stop, cwd=desk.work, env=desk.environment, capture_output=True, check=False)

    def run(
        self,
        case: str,
        tree: Path,
        before: Optional[Callable[[Path], None]],
        *,
        again: bool,
        without: tuple[str, ...] = (),
    ) -> None:
        """Time each client on a tree of its own; again: on a VM that has it already, else on one without."""
        row: dict[str, object] = {}
        for name, desk in self.desks.items():
            try:
                row[name] = "not run" if name in without else self.one(name, desk, tree, before, again)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row[name] = str(error)
            print(f"{case}: {name}: {row[name]}", file=sys.stderr)
        if not again:
            row["tar over SSH"] = self.floor(tree)
        self.results[case] = row

    def one(
        self, name: str, desk: Desk, tree: Path, before: Optional[Callable[[Path], None]], again: bool
    ) -> Measured:
        clear(desk.work)
        shutil.copytree(tree, desk.work, dirs_exist_ok=True)
        if again and name != OLD_SDK:  # it begins anew each time anyway
            desk.measure(desk.sync)
        measured = []
        for _ in range(1 if name == OLD_SDK else self.repeats):
            if not again:
                self.empty_vm()
            elif before is not None:
                before(desk.work)
            measured.append(desk.measure(desk.sync))
        return Measured(
            statistics.median(one.seconds for one in measured), max(one.megabytes for one in measured)
        )

    def empty_vm(self) -> None:
        for machine in self.plato.machines():
            home = Path(machine["directory"]) / "home" / "plato"
            for path in home.iterdir() if home.is_dir() else ():
                if path.name == "worktree":
                    shutil.rmtree(path)

    def floor(self, tree: Path) -> Measured:
        """The same files by tar with the same SSH configuration, and so the same gateway and VM. Unpacked at
        once: no compression, no check."""
        desk = self.desks["ours, SSH"]
        config = next(Path(desk.environment["HOME"], ".plato").glob("ssh_*.conf"))
        host = f"sandbox-{config.stem[4:]}"
        remote = "mkdir -p worktree/floor && tar -xf - -C worktree/floor"
        line = (
            f"tar -cf - -C {shlex.quote(str(tree))} . | ssh -F {shlex.quote(str(config))} {host} '{remote}'"
        )
        measured = []
        for _ in range(self.repeats):
            self.empty_vm()
            measured.append(desk.measure(["sh", "-c", line]).seconds)
        return Measured(statistics.median(measured), 0.0)


def clear(work: Path) -> None:
    """Empty a working directory, but for the sandbox's own records."""
    for path in work.iterdir():
        if path.name in (".sandbox.yaml", ".plato"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def table(results: dict[str, dict[str, object]]) -> str:
    """The results in Markdown: seconds, the ratio to our better way, and megabytes."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    rows = [[case, *(cell(row.get(name), row) for name in names)] for case, row in results.items()]
    return shared.markdown(["case", *names], rows)


def cell(value: object, row: dict[str, object]) -> str:
    if not isinstance(value, Measured):
        return "-" if value is None else "not run" if value == "not run" else "failed"
    ours = [one.seconds for name, one in row.items() if name.startswith("ours") and isinstance(one, Measured)]
    ratio = f" ({value.seconds / min(ours):.1f}x)" if ours else ""
    memory = f", {value.megabytes:.0f} MB" if value.megabytes else ""
    return f"{value.seconds:.2f} s{ratio}{memory}"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the files, once")
    parser.add_argument("--repeats", type=int, default=0, help="runs of each, of which the median counts")
    parser.add_argument("--without", action="append", default=[], help="leave out an SDK release")
    parser.add_argument("--before", type=Path, help="another plato_sandbox.py, such as an older one, too")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/plato-sandbox-bench").expanduser())
    parser.add_argument(
        "--slow", action="store_true", help="the largest cases with SDK 2.0.40 too: 20 minutes each"
    )
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    repeats = options.repeats or (1 if options.quick else 3)
    load = os.getloadavg()
    shared.end_in_order()
    releases = tuple(release for release in RELEASES if release not in options.without)
    with (
        tempfile.TemporaryDirectory(prefix="bench") as name,
        LocalPlato(
            Path(name) / "plato",
            heartbeat_seconds=86400,  # the heartbeat of 2.0.40 needs httpx in the system's Python
        ) as plato,
    ):
        place = Path(name)
        contest = Contest(place / "desks", plato, options.cache, repeats, releases, options.before)
        contest.start()
        plato.fault("latency", path="*/execute", seconds=REQUEST_SECONDS + COMMAND_SECONDS, times=-1)
        plato.fault("latency", seconds=REQUEST_SECONDS, times=-1)
        try:
            small, large, huge, noise = (place / name for name in ("small", "large", "huge", "noise"))
            for path in (small, large, huge, noise):
                path.mkdir()
            files, many, very_many, megabytes = (count // scale for count in (2000, 20_000, 100_000, 200))
            make_tree(small, files, 10_000)
            make_tree(large, many, 1000)
            make_tree(huge, very_many, 20)
            make_noise(noise, megabytes)
            too_slow = () if options.slow else (OLD_SDK,)
            contest.run(f"first sync, {files} files, {files / 100:g} MB", small, None, again=False)
            contest.run("nothing changed", small, None, again=True)
            contest.run("one file changed", small, lambda root: touch(root, 1), again=True)
            contest.run(f"10 of {many} files changed", large, lambda root: touch(root, 10), again=True)
            noisy = f"first sync, {megabytes} MB incompressible"
            contest.run(noisy, noise, None, again=False, without=too_slow)
            contest.run(f"nothing changed in {very_many} files", huge, None, again=True, without=too_slow)
        finally:
            contest.stop()
        print(shared.machine_line(f"median of {repeats} (SDK 2.0.40: one run)", load))
        print(table(contest.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
