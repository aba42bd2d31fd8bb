"""The README's commands, as they stand there, in a fresh copy of the repository with an empty home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import PRODUCT, ROOT, Result, part

from plato_sandbox import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (ROOT / "README.md").read_text()
COMMAND_SECONDS = 120


def commands(heading: str) -> list[str]:
    """The shell commands of a section, comments dropped."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [
        line.partition("   #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()
    ]


class Newcomer:
    """Someone with a fresh copy of the repository, an empty home and nothing set."""

    def __init__(self, place: Path) -> None:
        self.clone = place / "a clone"
        self.home = place / "home"
        self.home.mkdir()
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.clone, ignore=ignored)

    def type(self, line: str) -> Result:
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=self.clone,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    someone = Newcomer(tmp_path)
    yield someone
    someone.type("python3 tests/local_plato.py down --purge")


def test_try_it_without_an_account(newcomer: Newcomer) -> None:
    part("sshd", "openssh-server")
    part("openssl", "openssl")
    start, login, *rest = commands("Try it, without an account")
    assert start == "python3 tests/local_plato.py run start -c -w tests/simulator"

    started = newcomer.type(start)
    assert started.code == 0, started.err
    shown = re.search(r"^  SSH: +(ssh -F (\S+) (\S+))$", started.out, re.MULTILINE)
    assert shown is not None
    name = shown[3].replace("sandbox-", "")
    typed = login.replace("<id>", name)
    assert typed == f"{shown[1]} uname -a", "the README shows another command than `start` does"
    answered = newcomer.type(typed)
    assert (answered.code, answered.out.split()[:2]) == (0, ["Linux", re.findall(r"vm-\S+", answered.out)[0]])

    for line in rest:
        done = newcomer.type(line)
        assert done.code == 0, (line, done.out, done.err)
    assert list((newcomer.home / ".plato").iterdir()) == []
    assert not (newcomer.home / ".plato-local").exists()
    assert not (newcomer.clone / "tests" / "simulator" / ".sandbox.yaml").exists()


@pytest.mark.long
def test_hints_name_the_command_that_the_newcomer_typed(newcomer: Newcomer) -> None:
    stopped = newcomer.type("python3 tests/local_plato.py run stop -w tests/simulator")
    assert stopped.code == 3
    assert "python3 tests/local_plato.py run start -w tests/simulator" in stopped.err


def test_exit_codes_are_those_of_the_file(newcomer: Newcomer) -> None:
    table = re.findall(r"^\| (\d+(?:, \d+)?) \| ", README, re.MULTILINE)
    assert table == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "130, 143"]
    told = newcomer.type("python3 plato_sandbox.py --help").out
    for code in (*"0123456789", "130/143"):
        assert re.search(rf"(?:^|\s){code} ", told), code


@pytest.mark.long
def test_every_option_in_the_readme_exists(newcomer: Newcomer) -> None:
    told = "".join(newcomer.type(f"python3 plato_sandbox.py {name} --help").out for name in COMMANDS)
    named = set(re.findall(r"`(--[a-z-]+)", README)) - {"--all", "--purge"}
    assert named, "the README names no option"
    assert sorted(option for option in named if option not in told) == []
    assert PRODUCT.name in README
