"""The ignore rules of `sync`: git's own, shown by asking git, and the rules that are ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import part
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plato_sandbox import EXCLUDED_PATTERNS, IgnoreFile, LocalTree

if TYPE_CHECKING:
    from collections.abc import Iterator

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty git repository with no ignore rules but its own files'."""
    git = part("git", "git")
    root = tmp_path_factory.mktemp("repository")
    subprocess.run([git, "init", "-q", str(root)], check=True)
    (root / ".git/info/exclude").write_text("")
    yield root
    shutil.rmtree(root)


def git_ignores(root: Path, paths: list[bytes]) -> set[bytes]:
    """The paths that git ignores; a directory on the way there counts for what is below it."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    done = subprocess.run(
        [
            "git",
            "-c",
            "core.excludesFile=/dev/null",
            "check-ignore",
            "--no-index",
            "-v",
            "-n",
            "-z",
            "--stdin",
        ],
        input=b"".join(path + b"\0" for path in paths),
        cwd=root,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    fields = done.stdout.split(b"\0")[:-1]
    assert len(fields) == 4 * len(paths)
    return {
        fields[at + 3] for at in range(0, len(fields), 4) if fields[at + 2] and fields[at + 2][:1] != b"!"
    }


def lay_out(root: Path, tree: Files, ignore_files: dict[str, bytes], name: str) -> None:
    for path in root.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for where, content in tree.items():
        target = root / where
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            target.write_bytes(content)
    for directory, text in ignore_files.items():
        if (root / directory).is_dir():
            (root / directory / name).write_bytes(text)


def all_paths(root: Path) -> list[bytes]:
    found = [path for path in root.rglob("*") if path.relative_to(root).parts[0] != ".git"]
    return sorted(os.fsencode(path.relative_to(root)) for path in found)


def compare(root: Path, tree: Files, ignore_files: dict[str, bytes]) -> None:
    """Both must leave out the same of one tree, for each of the two names that our files may have."""
    # What is excluded from the start has no part in this.
    lay_out(root, tree, ignore_files, ".gitignore")
    paths = all_paths(root)
    ignored = git_ignores(root, paths) if paths else set()
    kept = {path for path in paths if path not in ignored}
    assert set(LocalTree(os.fsencode(root), gitignore=True).stamps) == kept

    lay_out(root, tree, ignore_files, ".platoignore")
    renamed = {path.replace(b".gitignore", b".platoignore") for path in kept}
    assert set(LocalTree(os.fsencode(root)).stamps) == renamed


NAMES = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "abc",
        "foo",
        "foobar",
        "bar",
        "a.c",
        "x.log",
        "A",
        "a-b",
        "a b",
        "[a]",
        "a]",
        "!a",
        "#a",
        "a\\b",
        "*",
        "d",
        "-",
        "^",
        "é",
        "a ",
        "1",
        "_",
        "foo.d",
        "x\ty",
    ]
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(PATHS, st.just(b"x"), min_size=1, max_size=14)
ATOMS = st.sampled_from(
    [
        "*",
        "**",
        "?",
        "/",
        "/",
        "**/",
        "/**",
        "a",
        "b",
        "foo",
        "bar",
        "\\*",
        "\\",
        "\\ ",
        " ",
        "!",
        "#",
        "\\!",
        "\\#",
        "[ab]",
        "[!a]",
        "[^a]",
        "[a-c]",
        "[]a]",
        "[!]a]",
        "[[:alpha:]]",
        "[[:space:]]",
        "[[:digit:]_]",
        "[a-]",
        "[-a]",
        "[\\]]",
        "[[:bad:]]",
        "[[:]",
        "[a",
        ".",
        ".log",
        "c",
        "-",
        "é",
        "\t",
        "\r",
        "[^]b]",
        "[\\\\]",
    ]
)
LINES = st.builds(
    lambda negated, atoms, directory: negated + "".join(atoms) + directory,
    st.sampled_from(["", "", "", "!"]),
    st.lists(ATOMS, min_size=1, max_size=6),
    st.sampled_from(["", "", "/"]),
)
IGNORE_TEXTS = st.lists(st.one_of(LINES, st.just(""), st.just("# note")), min_size=1, max_size=6).map(
    lambda lines: "\n".join(lines).encode()
)
IGNORE_FILES = st.dictionaries(
    st.sampled_from(["", "a", "foo", "a/b", "d"]), IGNORE_TEXTS, min_size=1, max_size=3
)


@pytest.mark.long
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tree=TREES, ignore_files=IGNORE_FILES)
@example(tree={"foo/bar": b"", "foo/x/bar": b"", "foobar": b""}, ignore_files={"": b"foo**/bar"})
@example(tree={"a": b""}, ignore_files={"": b"!*"})
@example(tree={"a/b/c": b"", "a/d": b""}, ignore_files={"": b"a/*\n!a/b\n"})
@example(tree={"a/b": b"", "b": b""}, ignore_files={"": b"a/\n!a/b\n"})
@example(tree={"a ": b"", "a": b""}, ignore_files={"": b"a\\ \\ \na  \n"})
def test_same_as_git(repository: Path, tree: Files, ignore_files: dict[str, bytes]) -> None:
    # A path cannot be a file and a directory at once.
    whole = {
        path: text for path, text in tree.items() if not any(other.startswith(path + "/") for other in tree)
    }
    compare(repository, whole, ignore_files)


CASES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "name at any depth": (b"x.log", ["x.log", "a/x.log"], ["x.logs"]),
    "leading slash anchors": (b"/x", ["x"], ["a/x"]),
    "inner slash anchors": (b"a/x", ["a/x"], ["b/a/x"]),
    "directories only": (b"build/", ["build/out"], ["a/build"]),
    "last match wins": (b"*.log\n!keep.log\n", ["x.log"], ["keep.log"]),
    "no way back into a directory": (b"a/\n!a/x\n", ["a/x"], ["b"]),
    "a way back past a star": (b"a/*\n!a/x\n", ["a/y"], ["a/x"]),
    "two stars in front": (b"**/x", ["x", "a/x", "a/b/x"], ["ax"]),
    "two stars inside": (b"a/**/x", ["a/x", "a/b/x", "a/b/c/x"], ["x", "b/a/x"]),
    "two stars behind": (b"a/**", ["a/x", "a/b/x"], ["b/a"]),
    "a star stops at a slash": (b"a/*/x", ["a/b/x"], ["a/b/c/x", "a/x"]),
    "question mark": (b"a?c", ["abc", "a.c"], ["ac", "abbc"]),
    "range": (b"[a-c]x", ["ax", "cx"], ["dx"]),
    "negated class": (b"[!a-c]x", ["dx"], ["ax"]),
    "POSIX class": (b"x[[:digit:]]", ["x1"], ["xa"]),
    "escaped exclamation mark": (b"\\!x", ["!x"], ["x"]),
    "escaped hash": (b"\\#x", ["#x"], ["x"]),
    "comment": (b"#x\n", [], ["#x"]),
    "trailing spaces fall off": (b"x   \n", ["x"], ["x "]),
    "an escaped space stays": (b"x\\ \n", ["x "], ["x"]),
    "CRLF": (b"x\r\ny\r\n", ["x", "y"], ["z"]),
    "byte order mark": (b"\xef\xbb\xbfx\n", ["x"], ["z"]),
    "backslash at the end": (b"x\\", [], ["x", "x\\"]),
    "class never closed": (b"x[a", [], ["xa", "x[a"]),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("text", "ignored", "kept"), CASES.values(), ids=CASES)
def test_case(repository: Path, text: bytes, ignored: list[str], kept: list[str]) -> None:
    tree = dict.fromkeys([*ignored, *kept], b"")
    compare(repository, tree, {"": text})
    entries = LocalTree(os.fsencode(repository)).stamps
    assert not {os.fsencode(path) for path in ignored} & set(entries)
    assert {os.fsencode(path) for path in kept} <= set(entries)


def test_names_that_are_not_utf8(repository: Path) -> None:
    compare(repository, {}, {"": b"\xff*\n"})
    lay_out(repository, {}, {"": b"\xff*\n!\xffkeep\n"}, ".platoignore")
    for name in (b"\xffa", b"\xffkeep", b"\xfe"):
        Path(os.fsdecode(os.fsencode(repository) + b"/" + name)).write_bytes(b"")
    entries = LocalTree(os.fsencode(repository)).stamps
    assert set(entries) == {b".platoignore", b"\xffkeep", b"\xfe"}


def test_what_the_specification_excludes(tmp_path: Path) -> None:
    names = ["__pycache__/m.pyc", "a/m.pyc", ".git/config", ".venv/x", "venv/x", "node_modules/m/i.js"]
    names += [
        ".sandbox.yaml",
        "p.egg-info/x",
        ".pytest_cache/x",
        ".mypy_cache/x",
        ".DS_Store",
        ".x.swp",
        ".x.swo",
    ]
    lay_out(tmp_path, dict.fromkeys([*names, *(f"deep/{name}" for name in names), "kept.py"], b""), {}, "")
    assert set(LocalTree(os.fsencode(tmp_path)).stamps) == {
        b"kept.py",
        b"a",
        b"deep",
        b"deep/a",
    }


def test_defaults_can_be_taken_back_but_not_all(tmp_path: Path) -> None:
    never = [".sandbox.yaml", ".sandbox.yaml.123.tmp", ".plato/key", "a/.plato/x"]
    lay_out(
        tmp_path,
        dict.fromkeys([*never, "venv/x", "node_modules/x"], b""),
        {"": b"!venv\n!.*\n!*\n"},
        ".platoignore",
    )
    entries = set(LocalTree(os.fsencode(tmp_path)).stamps)
    assert {b"venv/x", b"node_modules/x"} <= entries
    assert not {os.fsencode(name) for name in never} & entries


def test_gitignore_counts_only_when_asked_and_platoignore_wins(tmp_path: Path) -> None:
    lay_out(tmp_path, {".env": b"", "x.log": b""}, {"": b".env\n*.log\n"}, ".gitignore")
    (tmp_path / ".platoignore").write_bytes(b"!.env\n")
    assert {b".env", b"x.log"} <= set(LocalTree(os.fsencode(tmp_path)).stamps)
    entries = set(LocalTree(os.fsencode(tmp_path), gitignore=True).stamps)
    assert b".env" in entries
    assert b"x.log" not in entries


def test_excluded_directories_are_never_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, {"venv/lib/x": b"", "big/data/x": b"", "src/x": b""}, {"": b"big\n"}, ".platoignore")
    entered: list[bytes] = []
    scandir = os.scandir

    def noted(path: bytes) -> Iterator[os.DirEntry[bytes]]:
        entered.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    LocalTree(os.fsencode(tmp_path))
    assert sorted(os.path.relpath(path, os.fsencode(tmp_path)) for path in entered) == [b".", b"src"]


def test_many_stars_end() -> None:
    """Tried one after the other, the ways to match would outlast the universe."""
    rules = IgnoreFile(b"*a" * 40 + b"b\n" + b"?*" * 40 + b"z\n" + b"x/" + b"*a*" * 30 + b"b\n")
    for path in (b"a" * 255, b"x/" + b"a" * 253):
        assert rules.verdict(path, False) is None


def test_every_default_is_a_pattern_of_its_own() -> None:
    for pattern in EXCLUDED_PATTERNS:
        name = pattern.replace(b"*", b"x")
        assert IgnoreFile(b"\n".join(EXCLUDED_PATTERNS)).verdict(name, False) is True
