#!/usr/bin/env python3
"""Make a release, which is a tag: `python3 tests/release.py VERSION --tag`, on a clean `main`.

It asks whether the file, the README and git agree on the version, runs all checks and tests (`.ci/run`),
builds the wheel and the sdist twice and compares them, and tries the wheel in a fresh virtual environment, at
a local Plato. Only then, and only with --tag, it makes the tag. Pushing it, and giving the files to a package
index, is left to you.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from run import pinned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
BUILD = """\
import sys
from flit_core import buildapi
print(buildapi.build_wheel(sys.argv[1]))
print(buildapi.build_sdist(sys.argv[1]))
"""
PICTURE = re.compile(r"!\[([^]]*)\]\((?!https://)([^)]+)\)")


class ReleaseError(Exception):
    """There can be no release; the message says why."""


def run(
    command: Sequence[str | Path], directory: Path = ROOT, environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints; its errors are shown. Raises ReleaseError when it fails."""
    words = [str(word) for word in command]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(
        words, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"`{shlex.join(words)}` failed with {done.returncode}.\n{done.stdout}".rstrip())
    return done.stdout


# ---------------------------------------------------------------------------
# the looks before
# ---------------------------------------------------------------------------


def problems(version: str) -> list[str]:
    """What is in the way of a release of that version, each a sentence."""
    found = []
    text = (ROOT / "plato_sandbox.py").read_text(encoding="utf-8")
    if f'\n__version__ = "{version}"\n' not in text:
        found.append(f"plato_sandbox.py has another __version__ than {version}.")
    changes = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Changes\n")[2]
    entry = re.search(rf"^{re.escape(version)} \((.*?)\): ", changes, re.MULTILINE)
    if entry is None:
        found.append(f"The README's Changes have no entry for {version}.")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", entry[1]):
        found.append(f'The README\'s Changes say "{entry[1]}" of {version}, where the day is to stand.')
    if run(["git", "status", "--porcelain"]):
        found.append("There are changes that are not committed.")
    branch = run(["git", "branch", "--show-current"]).strip()
    if branch != BRANCH:
        found.append(f"This is the branch {branch or '(none)'}, not {BRANCH}.")
    if run(["git", "tag", "--list", f"v{version}"]):
        found.append(f"There is a tag v{version} already.")
    return found


def run_tests(quick: bool) -> None:
    """All checks and tests, or the ordinary ones; their output is shown."""
    suite = [[sys.executable, "tests/run.py"], [sys.executable, "tests/run.py", "--check"]]
    for words in suite if quick else [["bash", ".ci/run"]]:
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            raise ReleaseError(f"`{shlex.join(words)}` failed.")


# ---------------------------------------------------------------------------
# wheel and sdist
# ---------------------------------------------------------------------------


def export(commit: str, place: Path) -> None:
    """The files of a commit, and no others, in a new directory."""
    place.mkdir(parents=True)
    archive = place.with_name(f"{place.name}.tar")
    run(["git", "archive", f"--output={archive}", commit])
    run(["tar", "-xf", archive, "-C", place])


def on_its_own_page(readme: str, url: str) -> str:
    """The README as the package's page is to show it, where no path leads to a file of the repository.

    A picture gets an address below `url`, the files of the release; without one, its words stand for it.
    """
    return PICTURE.sub(rf"![\1]({url}/\2)" if url else r"*\1*", readme)


class Builder:
    """Builds with flit in the pinned version, in a virtual environment of its own."""

    def __init__(self, place: Path) -> None:
        run([sys.executable, "-m", "venv", place])
        self.python = place / "bin" / "python"
        run([self.python, "-m", "pip", "install", "--quiet", *pinned(), "flit_core"])

    def build(self, source: Path, out: Path, epoch: int) -> list[Path]:
        """The wheel and the sdist of a tree; the same tree and time give the same bytes."""
        out.mkdir(parents=True, exist_ok=True)
        names = run([self.python, "-c", BUILD, out], source, {"SOURCE_DATE_EPOCH": str(epoch)}).split()
        return [out / name for name in names]


def build(version: str, url: str, place: Path) -> list[Path]:
    """Wheel and sdist of what is committed, made twice; they must not differ."""
    builder = Builder(place / "tools")
    epoch = int(run(["git", "log", "-1", "--format=%ct"]))
    pair = []
    for name in ("one", "another"):
        source = place / name / "source"
        export("HEAD", source)
        readme = source / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(on_its_own_page(text, url and f"{url}/raw/v{version}"), encoding="utf-8")
        pair.append(builder.build(source, place / name / "dist", epoch))
    for one, another in zip(*pair):
        if one.read_bytes() != another.read_bytes():
            raise ReleaseError(f"{one.name} is another one each time that it is built.")
    return pair[0]


# ---------------------------------------------------------------------------
# the wheel, tried
# ---------------------------------------------------------------------------


def smoke(wheel: Path, place: Path) -> str:
    """Install the wheel where nothing else is, and do the main job with it; the line of its `--version`."""
    fresh = place / "fresh"
    run([sys.executable, "-m", "venv", fresh])
    run([fresh / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index", wheel])
    program = fresh / "bin" / "plato-sandbox"
    version = run([program, "--version"], place).strip()
    if version != run([sys.executable, "plato_sandbox.py", "--version"]).strip():
        raise ReleaseError(f"The wheel has another text than the file: {version}.")
    if not run([program, "--help"], place).startswith("usage: plato-sandbox "):
        raise ReleaseError("The wheel's --help is none.")
    work = place / "simulator"
    shutil.copytree(ROOT / "tests" / "simulator", work)
    local = [sys.executable, str(ROOT / "tests" / "local_plato.py"), "--home", str(place / "plato")]
    home = {"HOME": str(place)}

    def do(*words: str) -> str:
        return run([*local, "exec", "--", str(program), *words], work, home)

    try:
        do("start", "--from-config")
        if do("exec", "echo", "there") != "there\n" or "running" not in do("status"):
            raise ReleaseError("The sandbox that the wheel started does not work.")
        do("stop")
        if (work / ".sandbox.yaml").exists():
            raise ReleaseError("The wheel's `stop` left a record.")
    finally:
        run([*local, "down", "--purge"], work, home)
    return version


def tag(version: str, shown: str, files: Sequence[Path]) -> None:
    """Make the tag; its message has what `--version` shows, and the checksums of the files."""
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    run(["git", "tag", "--annotate", f"v{version}", "--message", "\n".join([shown, "", *sums])])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Check, build and try a release; with --tag, make its tag.",
        epilog="It must be on main, with nothing uncommitted, and the README's Changes must name its day.",
    )
    parser.add_argument("version", metavar="VERSION", help="what plato_sandbox.py has as its __version__")
    parser.add_argument("--quick", action="store_true", help="run the ordinary tests only, not all of them")
    parser.add_argument("--tag", action="store_true", help="make the tag vVERSION at the end")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go (default: dist)")
    parser.add_argument(
        "--url", default="", help="the repository on GitHub, for the pictures on the package's page"
    )
    options = parser.parse_args(arguments)
    try:
        found = problems(options.version)
        if found:
            raise ReleaseError("\n".join(found))
        run_tests(options.quick)
        with tempfile.TemporaryDirectory(prefix="release-") as name:
            place = Path(name)
            files = build(options.version, options.url.rstrip("/"), place)
            shown = smoke(files[0], place)
            options.out.mkdir(parents=True, exist_ok=True)
            files = [Path(shutil.copy(path, options.out)) for path in files]
        if options.tag:
            tag(options.version, shown, files)
    except ReleaseError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(shown, *files, sep="\n")
    print(f"Push it: git push origin v{options.version}" if options.tag else "No tag was made (--tag).")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
