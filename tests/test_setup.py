"""What is set up and packed: pins for all that tests install, packages of another Debian, the sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, missing, part
from localplato.debian import for_suite
from release import Builder, ReleaseError
from run import PINS


def requirements(group: str) -> set[str]:
    """The names in a dependency group of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{group} = \[(.*?)\](?: #.*)?$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return {name.lower().replace("_", "-") for name in re.findall(r'"([\w-]+)', found[1])}


@pytest.mark.parametrize("name", PINS)
def test_everything_that_tests_install_is_pinned(name: str) -> None:
    lines = (ROOT / "tests" / name).read_text().splitlines()
    assert all(re.match(r"[\w-]+==\S+( ; |$)", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    for group in PINS[name]:
        assert requirements(group) <= pinned


def test_old_pips_can_install_all() -> None:
    """`all` names the packages: the pip of Debian 11 does not understand an extra that names the package."""
    extras = {
        name: set(re.findall(r'"([^"]+)"', listed))
        for name, listed in re.findall(
            r"^(flow|audit|all) = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
        )
    }
    assert extras["all"] == extras["flow"] | extras["audit"]


LINE = """\
# deb http://old.test/debian bookworm main
deb-src [arch=amd64] http://mirror.test/debian bookworm main contrib
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.test/debian bookworm main contrib  # c
deb\thttp://mirror.test/debian/ bookworm main
"""
STANZAS = """\
# Types: deb

Types: deb
URIs: https://other.test/x
Suites: ./

types: deb deb-src
# URIs: http://old.test
URIs: http://mirror.test/debian
 http://second.test/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEZ
"""


@pytest.mark.parametrize(
    ("name", "text", "number", "expected"),
    [
        (
            "a.list",
            LINE,
            3,
            "deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.test/debian trixie main\n",
        ),
        ("a.list", LINE, 4, "deb http://mirror.test/debian/ trixie main\n"),
        (
            "a.sources",
            STANZAS,
            2,
            "Types: deb\nURIs: http://mirror.test/debian\n http://second.test/debian\nSuites: trixie\n"
            "Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEZ\n",
        ),
    ],
    ids=["options", "no options", "stanza"],
)
def test_another_release_from_the_same_mirror(
    tmp_path: Path, name: str, text: str, number: int, expected: str
) -> None:
    (tmp_path / name).write_text(text)
    assert for_suite(tmp_path / name, number, "trixie") == expected


# ---------------------------------------------------------------------------
# the sdist
# ---------------------------------------------------------------------------


def repository_files() -> list[str]:
    """What belongs to the repository, or to the sdist that this is."""
    if not (ROOT / ".git").exists():
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        made = re.compile(r"(^|/)(\.venv.*|__pycache__|\..*_cache|\.hypothesis|dist)/")
        return [str(path) for path in found if not made.search(str(path))]
    words = [part("git", "git"), "ls-files", "-z", "--cached"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.long
def test_the_sdist_holds_the_tests_and_they_run_there(tmp_path: Path) -> None:
    """It is all that somebody needs who carries on: every file of the repository, and a test of it runs."""
    source = tmp_path / "source"
    for name in repository_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    try:
        built = Builder(tmp_path / "tools").build(source, tmp_path / "dist", epoch=1_000_000_000)
    except ReleaseError as error:
        missing(str(error))
    sdist = next(path for path in built if path.name.endswith(".tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")  # noqa: S202  (it was made two lines above)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert packed == {*repository_files(), "PKG-INFO"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_yaml.py"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)
