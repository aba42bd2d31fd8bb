"""Small systems of several Debian releases, every way in there, and the packages that are published."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest
from conftest import PRODUCT, part
from hosts import HEADING, README, RELEASES, ROWS, USER, YES, build, try_release, with_table
from packaging.metadata import Metadata

from plato_sandbox import __version__

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("release", RELEASES)
def test_every_way_in(release: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make such systems and enter them")
    part("mmdebstrap", "mmdebstrap")
    ordinary = [part("setpriv", "util-linux"), f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    namespaces = [*ordinary, "unshare", "--user", "--map-root-user", "--mount", "true"]
    if subprocess.run(namespaces, capture_output=True, cwd="/", check=False).returncode:
        pytest.skip("an ordinary user cannot have namespaces here")
    report = try_release(release)
    assert list(report.cells) == list(ROWS)
    assert {row: cell for row, cell in report.cells.items() if cell != YES} == {}


def test_the_table_has_these_hosts_and_ways() -> None:
    text = README.read_text()
    found = re.search(r"(?:^\|.*\n)+", text.split(f"\n{HEADING}\n", 1)[1], re.MULTILINE)
    assert found is not None
    head, line, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in found[0].splitlines()
    )
    assert [title.partition(" (Python ")[0] for title in head[1:]] == list(RELEASES.values())
    assert set(line) == {"---"}
    assert [row[0] for row in rows] == list(ROWS)
    assert all(len(row) == len(head) and all(row) for row in rows)
    assert with_table(text, found[0]) == text
    assert "\n| another |\n" in with_table(text, "| another |\n")


@pytest.mark.long
def test_an_index_takes_wheel_and_sdist(tmp_path: Path) -> None:
    """The wheel is the one file, and both describe it by what the packaging standards allow."""
    wheel, sdist = build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (archive.read(name) for name in names if name.endswith(".dist-info/METADATA"))
        assert [name for name in names if ".dist-info/" not in name] == [PRODUCT.name]
        assert archive.read(PRODUCT.name) == PRODUCT.read_bytes()
    metadata = Metadata.from_email(described, validate=True)
    assert (metadata.name, str(metadata.version)) == ("plato-sandbox", __version__)
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description
    with tarfile.open(sdist) as archive_of_all:
        information = archive_of_all.extractfile(sdist.name[: -len(".tar.gz")] + "/PKG-INFO")
        assert information is not None
        assert information.read() == described
