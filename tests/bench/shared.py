"""What the benchmarks share: both SDK releases, clients at a local Plato, runs by turns, and tables."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union

from localplato import LocalPlato
from run import SDK_GROUPS, sdk_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCT = ROOT / "plato_sandbox.py"
RELEASES = tuple(SDK_GROUPS)
NEWEST = RELEASES[-1]
LIFETIME_SECONDS = "36000"  # of the SDKs' VMs; their default is shorter than a run
BEAT_SECONDS = "3600"  # between heartbeats where they are not the question
SERVER_PATIENCE_SECONDS = 86400  # without a heartbeat
RUNS = 10
QUICK_RUNS = 2

Number = Union[int, float]
# An interpreter without site-packages, as the product runs itself for its children.
BARE = (sys.executable, "-I", "-S")
ENTRY_POINT = """#!{python}
import sys
from plato_sandbox import main

if __name__ == "__main__":
    sys.exit(main())
"""
# Starts a command and reports its status, seconds and peak memory. The kernel counts what the process that
# starts a program has in memory as that program's, so it has to be one with little of it.
SPAWN = """
import os, sys, time
report = int(sys.argv[1])
os.set_inheritable(report, False)
began = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, setsigdef=[13])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - began
os.write(report, b"%d %f %d" % (status, seconds, usage.ru_maxrss))
"""


@contextmanager
def patient_plato(**options: Any) -> Iterator[tuple[Path, LocalPlato]]:
    """A directory, whose path is short since that of a socket is limited, and in it a local Plato whose VMs
    need no heartbeat."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        LocalPlato(Path(name) / "plato", heartbeat_seconds=SERVER_PATIENCE_SECONDS, **options) as plato,
    ):
        yield Path(name), plato


class Measured(NamedTuple):
    """Seconds, and the largest resident memory of any process of the command, in MB (0: not measured)."""

    seconds: float
    megabytes: float = 0.0


class Desk(NamedTuple):
    """Where one client works: its command line, its directory and its environment."""

    program: list[str]
    work: Path
    environment: dict[str, str]

    def run(self, *words: str) -> Measured:
        return measure([*self.program, *words], self.work, self.environment)

    def output(self, *words: str) -> str:
        """What a command prints. RuntimeError when it fails."""
        done = subprocess.run(
            [*self.program, *words],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(" ".join((done.stdout + done.stderr).split())[-300:])
        return done.stdout

    def quietly(self, *words: str) -> None:
        """Run a command, whatever comes of it."""
        subprocess.run(
            [*self.program, *words],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


# ---------------------------------------------------------------------------
# clients
# ---------------------------------------------------------------------------


def environment_of(home: Path, plato: LocalPlato | None = None, *paths: Path) -> dict[str, str]:
    """A clean environment with a home of its own, some directories first on PATH."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.pathsep.join([*map(str, paths), os.environ["PATH"]]),
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "PLATO_HEARTBEAT_INTERVAL_SECONDS": BEAT_SECONDS,
        **(plato.environment if plato else {}),
    }


def our_desk(place: Path, plato: LocalPlato, program: Sequence[str] = ()) -> Desk:
    """A client with our program, by default as a script."""
    work = place / "work"
    work.mkdir(parents=True)
    words = list(program) or [sys.executable, str(PRODUCT)]
    return Desk(words, work, environment_of(place / "home", plato))


def installed_command(place: Path, product: Path = PRODUCT) -> list[str]:
    """Our program as a command in a virtual environment, as an installer puts it there."""
    place = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = (place / "lib").glob("python*/site-packages")
    shutil.copy(product, packages / PRODUCT.name)
    command = place / "bin" / "plato-sandbox"
    command.write_text(ENTRY_POINT.format(python=place / "bin" / "python"))
    command.chmod(0o755)
    return [str(command)]


def sdk_desk(place: Path, plato: LocalPlato, release: str, cache: Path) -> Desk:
    """A client with an SDK release in its activated virtual environment, where its heartbeat runs too."""
    work, tools = place / "work", place / "tools"
    work.mkdir(parents=True)
    tools.mkdir()
    # 2.0.40 only looks for this program, and names it in its SSH config.
    (tools / "proxytunnel").write_text("#!/bin/sh\nexit 1\n")
    (tools / "proxytunnel").chmod(0o755)
    program = install(release, cache)
    environment = environment_of(place / "home", plato, Path(program[0]).parent, tools)
    environment["PLATO_SSH_OPENSSL_BIN"] = str(make_openssl(tools))
    return Desk(program, work, environment)


def sdk_start(release: str) -> list[str]:
    """The words that start a blank VM with an SDK release."""
    named = ["--service", "bench"] if release == "2.0.40" else []
    return ["start", "--blank", *named, "--timeout", LIFETIME_SECONDS]


def make_openssl(place: Path) -> Path:
    """An `openssl` for the newest SDK's way to the gateway, whose port it does not let be set: always 443."""
    path = place / "openssl"
    path.write_text(
        """#!/bin/sh
for word; do
  shift
  if [ "$word" = "$PLATO_GATEWAY_HOST:443" ]; then word=$PLATO_GATEWAY_HOST:$PLATO_GATEWAY_PORT; fi
  set -- "$@" "$word"
done
exec openssl "$@"
"""
    )
    path.chmod(0o755)
    return path


def install(release: str, cache: Path) -> list[str]:
    """The command line of an SDK release, installed on first use."""
    place = cache / release
    program = place / "bin" / "plato"
    if not program.exists():
        print(f"installing plato-sdk-v2 {release} into {place}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--upgrade", "pip>=25.3"], check=True)  # an older one knows no groups
        subprocess.run([*pip, *sdk_words(release)], check=True)
    return [str(program), "sandbox"]


def started(name: str, desk: Desk, *words: str) -> bool:
    """Start a sandbox; False, with the reason on stderr, when the client cannot."""
    try:
        desk.run(*words)
    except RuntimeError as error:
        print(f"{name}: it could not start a sandbox here: {error}", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------


def measure(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Measured:
    """Run a command; RuntimeError with its words when it fails."""
    with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as report:
        subprocess.run(
            [*BARE, "-c", SPAWN, str(report.fileno()), *command],
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            pass_fds=[report.fileno()],
            check=False,
        )
        words.seek(0)
        report.seek(0)
        said = words.read().decode(errors="replace")
        numbers = report.read().split()
    if len(numbers) != 3 or numbers[0] != b"0" or "rror:" in said:
        raise RuntimeError(" ".join(said.split())[-300:])
    return Measured(float(numbers[1]), int(numbers[2]) / (1024 if sys.platform == "linux" else 1 << 20))


Contestants = dict[str, Callable[[], Measured]]
Results = dict[str, list[Measured]]


def interleave(contestants: Contestants, runs: int, *, warm: bool = True) -> Results:
    """Run every contestant so often, by turns, each turn beginning with another one.

    warm: a first turn is not counted. A contestant that fails leaves the contest, with no results.
    """
    results: Results = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-1 if warm else 0, runs):
        at = turn % len(contestants)
        for name in [name for name in [*names[at:], *names[:at]] if name in contestants]:
            try:
                measured = contestants[name]()
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                print(f"{name}: {error}", file=sys.stderr)
                contestants = {other: one for other, one in contestants.items() if other != name}
                results[name] = []
                continue
            if turn >= 0:
                results[name].append(measured)
        if not contestants:
            break
    return results


# ---------------------------------------------------------------------------
# telling
# ---------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if abs(seconds) >= 0.01 else f"{seconds * 1000:.1f} ms"


def ratio(results: Results, name: str, base: str) -> str:
    """The median of the ratios of each turn, as `1.2x`."""
    pairs = list(zip(results[name], results.get(base, [])))
    return f"{statistics.median(one.seconds / other.seconds for one, other in pairs):.2f}x" if pairs else "-"


def median_seconds(results: Results, name: str) -> float | None:
    found = [one.seconds for one in results.get(name, [])]
    return statistics.median(found) if found else None


def times_table(results: Results, bases: Sequence[str], title: str = "") -> str:
    """Median, minimum and maximum, the ratio to each of the bases, and the peak memory where it is known."""
    measured = any(one.megabytes for runs in results.values() for one in runs)
    heads = [title, "median", "minimum", "maximum", *(f"to {base}" for base in bases)]
    rows = []
    for name, runs in results.items():
        seconds = [one.seconds for one in runs]
        cells = [name, "failed", *["-"] * (len(heads) - 2)]
        if runs:
            values = (statistics.median(seconds), min(seconds), max(seconds))
            cells = [name, *map(seconds_text, values), *(ratio(results, name, base) for base in bases)]
        memory = max((one.megabytes for one in runs), default=0.0)
        rows.append([*cells, *([f"{memory:.0f} MB" if memory else "-"] if measured else [])])
    return markdown([*heads, *(["peak memory"] if measured else [])], rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def spread(values: Sequence[Number], form: str = "{:.1f}") -> str:
    """`median (minimum to maximum)`, or `-` without any."""
    if not values:
        return "-"
    middle, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def machine_line(how: str, before: tuple[float, ...]) -> str:
    """Where and when this was measured, how, and how busy the machine was."""
    return (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}, {how}; "
        f"load average {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )


# ---------------------------------------------------------------------------
# command lines
# ---------------------------------------------------------------------------


def options_of(text: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """The options that every benchmark has, and those that `add` adds; `runs` is settled by --quick."""
    parser = argparse.ArgumentParser(description=str(text).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few runs and little data: does it work?")
    parser.add_argument("--runs", type=int, default=0, help=f"of each, by turns (default: {RUNS})")
    parser.add_argument("--without", action="append", default=[], help="leave out an SDK release")
    parser.add_argument("--before", type=Path, help="another plato_sandbox.py, such as an older one, too")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/plato-sandbox-bench").expanduser())
    if add is not None:
        add(parser)
    options = parser.parse_args()
    options.runs = options.runs or (QUICK_RUNS if options.quick else RUNS)
    options.releases = [release for release in RELEASES if release not in options.without]
    end_in_order()
    return options


def end_in_order() -> None:
    """Let SIGTERM end a benchmark as Ctrl-C does, so that everything it started ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
