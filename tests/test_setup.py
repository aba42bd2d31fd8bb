"""What `run.py` sets up: pins for everything that the tests install, and packages of another Debian."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from localplato.debian import for_suite
from run import PINS

if TYPE_CHECKING:
    from pathlib import Path


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
