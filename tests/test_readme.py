"""The README's commands, as they stand there, in a fresh copy of the repository with an empty home."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import PRODUCT, ROOT, Result, part

from plato_sandbox import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (ROOT / "README.md").read_text()
TREE = ast.parse(PRODUCT.read_text(encoding="utf-8"))
PICTURES = ROOT / "tests" / "pictures"
COMMAND_SECONDS = 120


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, its head and rule left out."""
    cells = [re.split(r"\s*\|\s*", line)[1:-1] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    assert cells, "there is no table"
    return cells[2:]


def commands(heading: str) -> list[str]:
    """The shell commands of a section, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", section(heading), re.DOTALL)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the local Plato is for Linux")
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
    told += newcomer.type("python3 plato_sandbox.py --help").out
    named = set(re.findall(r"`(--[a-z-]+)", README)) - {"--all", "--purge"}
    assert named, "the README names no option"
    assert sorted(option for option in named if option not in told) == []
    assert PRODUCT.name in README


# ---------------------------------------------------------------------------
# what the README says of the file, and of the measurements
# ---------------------------------------------------------------------------


def header(heading: str) -> str:
    """A part of the text at the file's head."""
    found = re.search(rf"^{heading}\n((?: +.*\n)+)", ast.get_docstring(TREE) or "", re.MULTILINE)
    assert found is not None
    return found[1]


def test_variables_are_those_at_the_files_head() -> None:
    told = {
        name: re.search(r"\(([^ ]+)\)$", line)
        for line in header("Environment").splitlines()
        for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", line.strip().partition("  ")[0])
    }
    assert len(told) > 10
    shown = {
        name: absent
        for variable, _, absent in rows(section("Configuration"))
        for name in re.findall(r"`([A-Z_]+)`", variable)
    }
    assert list(shown) == list(told)
    for name, default in told.items():
        assert default is None or default[1] in shown[name], name


def test_files_are_those_at_the_files_head() -> None:
    words = re.findall(r"^    (\S+(?:, \S+)*)(?: {2,}|$)", header("Files"), re.MULTILINE)
    told = [name for line in words for name in line.split(", ")]
    assert "PLATO_HOME/ssh_<id>.conf" in told
    bullets = re.findall(r"^- (`.*?): ", section("Configuration"), re.MULTILINE)
    assert [name for line in bullets for name in re.findall("`([^`]+)`", line)] == told


def test_messages_are_those_of_the_file() -> None:
    texts = [node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant)]
    strings = [text for text in texts if isinstance(text, str)]
    quoted = [cells[0] for cells in rows(section("When something is wrong"))]
    assert len(quoted) > 20
    pieces = [piece.strip() for message in quoted for piece in message.strip("`").split("…")]
    gone = [piece for piece in pieces if not any(piece in text for text in strings)]
    assert gone == []


def test_figures_are_those_that_were_measured() -> None:
    measured = (ROOT / "tests" / "bench" / "README.md").read_text()
    figures = [figure for cells in rows(section("How fast it is")) for figure in cells[1:]]
    assert len(figures) > 20
    assert [figure for figure in figures if f" {figure}" not in measured] == []


def test_what_the_readme_points_to_is_there() -> None:
    """Pictures are the only links to files: the package's page knows no files of the repository."""
    linked = re.findall(r"\]\(([^)]+)\)", README)
    inside = [target for target in linked if not target.startswith("https://")]
    assert sorted(inside) == sorted(f"tests/pictures/{path.name}" for path in PICTURES.glob("*.png"))
    named = re.findall(r"`((?:tests|\.github)/[\w./-]+)`", README)
    assert len(named) > 3
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_pictures_are_made_by_the_script() -> None:
    script = (PICTURES / "make.py").read_text()
    for path in PICTURES.glob("*.png"):
        assert f'"{path.stem}": ' in script


def test_every_file_of_tests_has_a_place() -> None:
    told = (ROOT / "tests" / "README.md").read_text().partition("\n# ")[0]
    assert [path.name for path in (ROOT / "tests").glob("test_*.py") if f"`{path.name}`" not in told] == []


def test_functions_that_whoever_carries_on_reads_of_are_there() -> None:
    told = re.findall(r"\(`(_?[a-zA-Z]\w+)`\)", (ROOT / ".github" / "CONTRIBUTING.md").read_text())
    assert len(told) > 5
    source = PRODUCT.read_text(encoding="utf-8")
    assert [name for name in told if not re.search(rf"(?m)^(def {name}\(|{name} = )", source)] == []
