"""`release.py` in a clone whose tests are one line that leaves a mark; all else is as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Result, missing, part

import plato_sandbox

VERSION = plato_sandbox.__version__
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Somebody"), ("EMAIL", "somebody@example.com"))
}
RELEASE_SECONDS = 600.0


class Clone:
    """A repository with the files of this one, where `.ci/run` only says that it was run."""

    def __init__(self, place: Path) -> None:
        part("git", "git")
        self.place = place / "clone"
        self.mark = place / "tests were run"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(place),
            "LANG": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            **IDENTITY,
        }
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "dist")
        shutil.copytree(ROOT, self.place, ignore=ignored)
        self.let_tests_end_with(0)
        readme = self.place / "README.md"
        text = readme.read_text()
        day = re.sub(rf"(?m)^{re.escape(VERSION)} \([^)]*\): ", f"{VERSION} (2026-12-01): ", text)
        assert day != text
        readme.write_text(day)
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit()

    def let_tests_end_with(self, code: int) -> None:
        (self.place / ".ci" / "run").write_text(f'echo run >> "{self.mark}"\nexit {code}\n')

    def git(self, *words: str) -> str:
        return subprocess.run(
            ["git", *words],
            cwd=self.place,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "all of it")

    def release(self, *words: str) -> Result:
        done = subprocess.run(
            [sys.executable, "tests/release.py", *words],
            cwd=self.place,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=RELEASE_SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def edit(clone: Clone, name: str, old: str, new: str) -> None:
    path = clone.place / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_all_that_is_in_the_way_is_told_at_once(clone: Clone) -> None:
    edit(clone, "README.md", f"{VERSION} (2026-12-01)", f"{VERSION} (not yet released)")
    clone.git("tag", f"v{VERSION}")
    clone.git("switch", "--quiet", "--create", "work")
    result = clone.release(VERSION, "--tag")
    assert result.code == 1
    assert result.err.removeprefix("Error: ").splitlines() == [
        f'The README\'s Changes say "not yet released" of {VERSION}, where the day is to stand.',
        "There are changes that are not committed.",
        "This is the branch work, not main.",
        f"There is a tag v{VERSION} already.",
    ]
    assert not clone.mark.exists()


def test_another_version(clone: Clone) -> None:
    result = clone.release("9.9.9", "--tag")
    assert result.code == 1
    assert result.err == (
        "Error: plato_sandbox.py has another __version__ than 9.9.9.\n"
        "The README's Changes have no entry for 9.9.9.\n"
    )
    assert clone.git("tag") == ""


def test_no_release_without_the_tests(clone: Clone) -> None:
    clone.let_tests_end_with(3)
    clone.commit()
    result = clone.release(VERSION, "--tag")
    assert (result.code, result.err) == (1, "Error: `bash .ci/run` failed.\n")
    assert clone.mark.read_text() == "run\n"
    assert clone.git("tag") == ""
    assert not (clone.place / "dist").exists()


@pytest.mark.long
@pytest.mark.timeout(RELEASE_SECONDS)
def test_a_release(clone: Clone) -> None:
    result = clone.release(VERSION, "--tag", "--url", "https://example.com/plato-sandbox/")
    if "flit" in result.err and "No matching distribution" in result.err:
        missing(f"flit_core cannot be had from the package index: {result.err[-300:]}")
    assert result.code == 0, result.err
    assert clone.mark.read_text() == "run\n"
    shown, wheel, sdist, last = result.out.splitlines()
    python = [sys.executable, str(clone.place / "plato_sandbox.py"), "--version"]
    assert shown == subprocess.run(python, capture_output=True, text=True, check=True).stdout.strip()
    assert last == f"Push it: git push origin v{VERSION}"
    assert sorted(path.name for path in (clone.place / "dist").iterdir()) == [
        f"plato_sandbox-{VERSION}-py3-none-any.whl",
        f"plato_sandbox-{VERSION}.tar.gz",
    ]
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        page = archive.read(metadata).decode()
    pictures = re.findall(r"!\[[^]]+\]\((.+?)\)", page)
    assert pictures
    where = f"https://example.com/plato-sandbox/raw/v{VERSION}/tests/pictures/"
    assert [address for address in pictures if not address.startswith(where)] == []
    told = clone.git("for-each-ref", "--format=%(objecttype)%(contents)", f"refs/tags/v{VERSION}")
    assert told.startswith(f"tag{shown}\n")
    assert Path(wheel).name in told
    assert Path(sdist).name in told
    assert clone.git("status", "--porcelain") == ""

    # Is a copy that of the release? As the README says it.
    readme = (clone.place / "README.md").read_text()
    (compare, update) = re.findall(r"^git -C \.\./plato-sandbox show v.*$", readme, re.MULTILINE)
    simulator = clone.place.parent / "simulator"
    simulator.mkdir()
    clone.place.rename(clone.place.with_name("plato-sandbox"))
    copy = simulator / "plato_sandbox.py"
    for text, said in ((b"an older one\n", ""), (None, "the same\n")):
        if text is None:
            subprocess.run(["sh", "-c", update], cwd=simulator, check=True)
        else:
            copy.write_bytes(text)
        compared = subprocess.run(
            ["sh", "-c", compare], cwd=simulator, capture_output=True, text=True, check=False
        )
        assert compared.stdout.endswith(said)
        assert (compared.returncode == 0) is bool(said)


def test_without_an_address_words_stand_for_pictures() -> None:
    from release import on_its_own_page

    page = on_its_own_page("a ![the page](tests/pictures/page.png) b ![c](https://example.com/c.png)", "")
    assert page == "a *the page* b ![c](https://example.com/c.png)"
