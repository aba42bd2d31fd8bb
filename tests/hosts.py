#!/usr/bin/env python3
"""Try every way to run the tool in small systems of several Debian releases, and show a table of how it went.

    python3 tests/hosts.py [RELEASE ...]    the table, of all releases or of those named
    python3 tests/hosts.py --write          the same, and write it into tests/README.md

It needs root and mmdebstrap. Such a system (a root) is the smallest Debian with the packages that the README
names. It is made once and kept in the tests' cache; each run works in a copy of it, in namespaces of its own.
There the README's first commands are typed, by an ordinary user and by root; then that user comes to the tool
in every way, with a space in the path of the home, LANG=C, and a local Plato from a read-only project.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from localplato import debian
from release import Builder
from run import ROOT, cache_directory, pinned

RELEASES = {
    "bullseye": "Debian 11",
    "bookworm": "Debian 12",
    "trixie": "Debian 13",
    "testing": "Debian testing",
}
PACKAGES = ("python3", "python3-venv", "ca-certificates", "openssh-client", "openssh-server", "openssl")
README = ROOT / "tests" / "README.md"
HEADING = "## Hosts and ways in"
YES = "yes"
LONGEST_REASON = 200
# What a copy of the project leaves out: what is no part of it.
NOT_COPIED = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", ".sandbox.yaml", "dist")
# What a root takes over from this system, so that pip reaches the package index as it does here.
TAKEN_OVER = ("etc/resolv.conf", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
EPOCH = 1_000_000_000
# Inside of a root: the project, which cannot be written, and its wheel and sdist.
PROJECT = Path("/opt/plato-sandbox")
DIST = Path("/opt/dist")
# Makes a directory the root of new namespaces. The shell stays, since somebody has to reap orphans there.
ENTER = """
set -e
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
mount --bind ".$2" ".$2"
mount -o remount,bind,ro ".$2"
mkdir .host
pivot_root . .host
cd /
umount -l .host
rmdir .host
python3 "$2/tests/hosts.py" --inside
exit $?
"""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER = 1000
ODD_NAME = "caf\u00e9 1.txt"
AT_ONCE = "--boot-seconds 0 --gateway-seconds 0"
STEP_SECONDS = 180.0
END_SECONDS = 20.0


class Way(NamedTuple):
    """How somebody comes to run the tool: what they type once, and what they type for `plato-sandbox`."""

    name: str
    once: tuple[str, ...]
    command: str


# They are typed in the home by `sh`, the command in a simulator's directory below it.
WAYS = (
    Way("`python3 plato_sandbox.py`, read-only", (), 'python3 "$PROJECT/plato_sandbox.py"'),
    Way(
        "a link to it in `~/bin`",
        ("mkdir bin", 'ln -s "$PROJECT/plato_sandbox.py" bin/plato-sandbox'),
        '"$HOME/bin/plato-sandbox"',
    ),
    Way(
        "a read-only copy in the simulator",
        (
            "mkdir simulator/tools",
            'cp "$PROJECT/plato_sandbox.py" simulator/tools',
            "chmod -R a-w simulator/tools",
        ),
        "python3 tools/plato_sandbox.py",
    ),
    Way(
        "`python3 -m plato_sandbox`",
        (
            "mkdir module",
            'cp "$PROJECT/plato_sandbox.py" module',
            "cd module && python3 -m plato_sandbox --version",  # Python compiles it
        ),
        'PYTHONPATH="$HOME/module" python3 -m plato_sandbox',
    ),
    Way(
        "a zip, by `zipapp`",
        (
            "mkdir zip",
            'cp "$PROJECT/plato_sandbox.py" zip',
            "python3 -m zipapp zip --main plato_sandbox:main --output plato.pyz",
        ),
        'python3 "$HOME/plato.pyz"',
    ),
    Way(
        "`pip install` of the wheel",
        ("python3 -m venv venv", 'venv/bin/pip install "$WHEEL"'),
        '"$HOME/venv/bin/plato-sandbox"',
    ),
    Way(
        "`pip install` of the sdist",
        ('venv/bin/pip install --force-reinstall "$SDIST"',),
        '"$HOME/venv/bin/plato-sandbox"',
    ),
    Way(
        "`pip install .`",
        ('cd "$PROJECT" && "$HOME/venv/bin/pip" install --force-reinstall .',),
        '"$HOME/venv/bin/plato-sandbox"',
    ),
    Way(
        "`pipx install`",
        ("python3 -m venv tools", "tools/bin/pip install pipx uv", 'tools/bin/pipx install "$WHEEL"'),
        '"$HOME/.local/bin/plato-sandbox"',
    ),
    Way(
        "`pipx run`",
        ('tools/bin/pipx run --spec "$WHEEL" plato-sandbox --version',),
        '"$HOME/tools/bin/pipx" run --spec "$WHEEL" plato-sandbox',
    ),
    Way("`uvx --no-cache`", (), '"$HOME/tools/bin/uvx" --no-cache --from "$WHEEL" plato-sandbox'),
)
FIRST = {
    "user": "the README's first commands, as a user",
    "root": "the README's first commands, as root",
}
ROWS = (*FIRST.values(), *(way.name for way in WAYS))


class Report(NamedTuple):
    """What came of one release: its Python's version, and for each row of the table YES or the reason."""

    python: str
    cells: dict[str, str]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Try every way to run the tool in several Debian releases.")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)} (all)")
    parser.add_argument("--write", action="store_true", help="write the table into tests/README.md")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return inside()
    names = options.releases or list(RELEASES)
    if not set(names) <= set(RELEASES):
        parser.error(f"the releases are {', '.join(RELEASES)}")
    if options.write and set(names) != set(RELEASES):
        parser.error("--write needs all releases")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = dict(zip(names, pool.map(try_release, names)))
    print(table(reports), end="")
    if options.write:
        README.write_text(with_table(README.read_text(), table(reports)))
    return 0 if all(set(report.cells.values()) == {YES} for report in reports.values()) else 1


def table(reports: dict[str, Report]) -> str:
    """The reports in Markdown, a column for each release."""
    titles = [f"{RELEASES[name]} (Python {report.python})" for name, report in reports.items()]
    lines = [["way in", *titles], ["---"] * (len(titles) + 1)]
    lines += [[row, *(report.cells[row] for report in reports.values())] for row in ROWS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(text: str, new: str) -> str:
    """A README with another table below the heading."""
    before, heading, after = text.partition(HEADING + "\n")
    found = re.subn(r"(?:^\|.*\n)+", lambda _: new, after, count=1, flags=re.MULTILINE)
    if not heading or not found[1]:
        sys.exit(f"{README} has no table below {HEADING!r}")
    return before + heading + found[0]


# ---------------------------------------------------------------------------
# a root
# ---------------------------------------------------------------------------


def try_release(release: str) -> Report:
    """Everything in a new copy of the root of a release. Raises RuntimeError."""
    archive = root_archive(release)
    with tempfile.TemporaryDirectory(prefix="root-") as name:
        place = Path(name)
        run(["tar", "--extract", "--numeric-owner", "--file", str(archive), "--directory", name])
        place.chmod(0o755)
        furnish(place)
        say(f"{RELEASES[release]}: trying ...")
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc"]
        command += ["sh", "-c", ENTER, "sh", name, str(PROJECT)]
        python, cells = json.loads(run(command, {"PATH": SYSTEM_PATH, "PINNED": "yes" if pinned() else ""}))
        return Report(python, cells)


def root_archive(release: str) -> Path:
    """The files of a release's root, made unless the cache has them."""
    recipe = [release, platform.machine(), *PACKAGES, *([] if pinned() else [time.strftime("%Y-%m-%d")])]
    mark = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    cache = cache_directory() / "roots"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{release}-{mark}.tar"
    with open(cache / f"{release}.lock", "w") as lock, tempfile.TemporaryDirectory() as name:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():
            return archive
        for old in cache.glob(f"{release}-*"):
            old.unlink()
        say(f"{RELEASES[release]}: making its root ...")
        partial = cache / f"{release}-{mark}.new.tar"
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"]
        # A mirror may be a copy of some weeks ago; what it has is signed all the same.
        command += ['--aptopt=Acquire::Check-Valid-Until "false"']
        command += [f"--include={','.join(PACKAGES)}", release, str(partial)]
        source = debian.source_file(release, Path(name))
        run([*command, *([str(source)] if source is not None else [])])
        partial.rename(archive)
    return archive


def furnish(root: Path) -> None:
    """Put the project, its wheel and its sdist into a root, and what pip needs of this system."""
    project, dist = root / PROJECT.relative_to("/"), root / DIST.relative_to("/")
    copy_project(project)
    build(dist)
    run(["chmod", "-R", "a+rX,go-w", str(project), str(dist)])
    for name in TAKEN_OVER:
        if Path("/", name).exists():
            (root / name).unlink(missing_ok=True)  # it may be a link
            shutil.copy(Path("/", name), root / name)


def copy_project(place: Path) -> None:
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*NOT_COPIED))


def build(dist: Path) -> list[Path]:
    """The project's wheel and its sdist, as a package index would have them, in a new directory."""
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name, "project"))
        return Builder(Path(name, "tools")).build(Path(name, "project"), dist, EPOCH)


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises RuntimeError when it fails; its own words are on stderr."""
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {' '.join(command[:10])} ...")
    return done.stdout


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------
# inside of a root, with its Python
# ---------------------------------------------------------------------------


class StepError(Exception):
    """A step did not do what it has to; the message says which, and why."""


class Person:
    """Somebody with a home, an almost empty environment and a shell."""

    def __init__(self, uid: int, home: str) -> None:
        self.uid = uid
        self.home = Path(home)
        self.home.mkdir(exist_ok=True)
        os.chown(self.home, uid, uid)
        self.environment = {"PATH": SYSTEM_PATH, "HOME": home, "LANG": "C"}

    def type(self, line: str, directory: Path | None = None, **more: str) -> str:
        """What a shell's line prints. Raises StepError unless it succeeds."""
        try:
            done = subprocess.run(
                ["sh", "-c", line],
                cwd=directory or self.home,
                env={**self.environment, **more},
                user=self.uid,
                group=self.uid,
                extra_groups=[],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=STEP_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StepError(f"{line}: still not done after {STEP_SECONDS:g} s") from None
        out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        if done.returncode:
            words = (err.strip() or out.strip() or "no word").splitlines()
            say(f"$ {line}\n{out}{err}")
            raise StepError(f"{line}: exit {done.returncode}: {words[-1]}")
        return out

    def files(self) -> set[Path]:
        """The paths of all that this person has, but for what pipx keeps for later and the local Plato's."""
        kept = {".cache", ".local", ".plato-local"}
        inner = [
            path for top in self.home.iterdir() if top.name not in kept for path in (top, *top.rglob("*"))
        ]
        return {*inner, *Path("/tmp").rglob("*")} - {self.home / ".plato"}


def inside() -> int:
    """Try everything in this root; print the Python's version and the cells as JSON."""
    root, user = Person(0, "/root"), Person(USER, "/home/ada lovelace")
    with open("/etc/passwd", "a") as passwd, open("/etc/group", "a") as group:
        passwd.write(f"ada:x:{USER}:{USER}::{user.home}:/bin/sh\n")
        group.write(f"ada:x:{USER}:\n")
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    user.environment.update(PROJECT=str(PROJECT), WHEEL=str(wheel), SDIST=str(sdist))
    user.environment["UV_PYTHON_DOWNLOADS"] = "never"
    if os.environ["PINNED"]:
        constraints = f"{PROJECT}/tests/constraints.txt"
        user.environment.update(PIP_CONSTRAINT=constraints, PIP_BUILD_CONSTRAINT=constraints)
    cells = {
        FIRST["user"]: verdict(partial(first_commands, user)),
        FIRST["root"]: verdict(partial(first_commands, root)),
    }
    simulator = user.home / "simulator"
    user.type(f"mkdir simulator && echo there > 'simulator/{ODD_NAME}'")
    user.type(f'python3 "$PROJECT/tests/local_plato.py" up {AT_ONCE}')
    plato = json.loads(user.type('python3 "$PROJECT/tests/local_plato.py" env --json'))
    for way in WAYS:
        cells[way.name] = verdict(partial(a_day, user, way, simulator, plato))
    user.type('python3 "$PROJECT/tests/local_plato.py" down')
    print(json.dumps([platform.python_version(), cells]))
    return 0


def verdict(trial: Callable[[], None]) -> str:
    """YES, or the reason why not, as a cell of the table has it."""
    try:
        trial()
    except StepError as error:
        reason = " ".join(str(error).split()).replace("|", "\\|")
        return reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + " ..."
    return YES


def first_commands(person: Person) -> None:
    """Type what the README begins with, in a copy of the project. Raises StepError."""
    person.type(f"cp -r {PROJECT} plato-sandbox")
    copy = person.home / "plato-sandbox"
    text = (copy / "README.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^(?:python3 tests/local_plato\.py|ssh -F ~/\.plato/ssh_<id>\.conf) .*", text, re.MULTILINE
    )
    need(len(lines) >= 5 and " run start " in lines[0] and " down --purge" in lines[-1], "the README", lines)
    files, processes = person.files(), running()
    try:
        name = login_of(person.type(lines[0], copy)).rpartition("sandbox-")[2]
        for line in lines[1:]:
            person.type(line.replace("<id>", name), copy)
    finally:
        with suppress(StepError):
            person.type("python3 tests/local_plato.py down --purge", copy)
    left = {path for path in person.files() - files if "__pycache__" not in path.parts}
    nothing_left(left, processes)
    need(not (person.home / ".plato-local").exists(), "down --purge", "its data directory is still there")


def a_day(user: Person, way: Way, simulator: Path, plato: dict[str, str]) -> None:
    """Come to the tool in that way, and do with it what one does every day. Raises StepError."""

    def tool(words: str) -> str:
        return user.type(f"{way.command} {words}", simulator, **plato)

    for line in way.once:
        user.type(line)
    files, processes = user.files(), running()
    try:
        version = tool("--version")
        need(version.startswith("plato-sandbox "), "--version", version)
        login = login_of(tool("start --blank --service x"))
        status = json.loads(tool("status --json"))
        need(status["vm_running"] is True and status["heartbeat"]["state"] == "ok", "status", status)
        answer = user.type(f"{login} echo there", simulator)
        need(answer == "there\n", "ssh", answer)
        tool("sync")
        answer = user.type(f"{login} cat '/home/plato/worktree/x/*.txt'", simulator)
        need(answer == "there\n", "a file after `sync`", answer)
        tool("stop")
    except StepError:
        with suppress(StepError):
            user.type('python3 "$PROJECT/plato_sandbox.py" stop', simulator, **plato)
        raise
    nothing_left(user.files() - files, processes)


def login_of(started: str) -> str:
    """The command that `start` shows for SSH. Raises StepError."""
    shown = re.search(r"^ *SSH: +(ssh -F .*)$", started, re.MULTILINE)
    if shown is None:
        raise StepError(f"start: no line for SSH in {started!r}")
    return shown[1]


def need(condition: bool, what: str, seen: object) -> None:
    if not condition:
        raise StepError(f"{what}: {seen!r}")


def nothing_left(files: set[Path], before: set[int]) -> None:
    """Raises StepError for files, and for processes that do not end by themselves."""
    need(not files, "files are left", sorted(map(str, files)))
    deadline = time.monotonic() + END_SECONDS
    while running() - before:
        lines = [Path(f"/proc/{pid}/cmdline") for pid in running() - before]
        need(time.monotonic() < deadline, "processes are left", lines)
        time.sleep(0.05)


def running() -> set[int]:
    """The pids of all processes of this root that have not ended."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(int(process.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
