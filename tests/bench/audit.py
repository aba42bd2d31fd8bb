#!/usr/bin/env python3
"""Compares the pages of `audit-ui` and of the SDK: `python3 tests/bench/audit.py [--tables N] [--rows N]`.

Both look at one MariaDB database, from the same machine, in headless Chromium: seconds from opening the page
to the list of all tables, and for an empty page of Streamlit. The rows are real. Needs MariaDB, Chromium, and
in the interpreter that runs this streamlit, pymysql and playwright; the SDK's page is taken from its package.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_audit_databases import Server, as_user  # noqa: E402
from test_simulator import Service, free_port, unprivileged_user  # noqa: E402

RELEASE = "2.0.40"
RUNS = 3
PAGE_SECONDS = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=500)
    parser.add_argument("--rows", type=int, default=10_000, help="in each table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, database(Path(name)) as port:
        place = Path(name)
        fill(Server("mysql", port, "shop"), options.tables, options.rows)
        with browser() as chromium:
            ours = [our_page(chromium, port, options.tables) for _ in range(RUNS)]
            query = f"?host=127.0.0.1&port={port}&user=root&password=&database=shop"
            theirs = [other_page(chromium, sdk_page(place), query, f"Tables ({options.tables})")]
            script = place / "empty.py"
            script.write_text("import streamlit\n\nstreamlit.title('Nothing to see')\n")
            empty = [other_page(chromium, script, "", "Nothing to see") for _ in range(RUNS)]
    print(f"\n{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(f"{options.tables} tables, {options.tables * options.rows:,} rows\n")
    print("| page | seconds until all tables are listed | ratio |\n|---|---|---|")
    best = statistics.median(ours)
    for name, seconds in (("ours", best), (f"SDK {RELEASE}", statistics.median(theirs))):
        print(f"| {name} | {seconds:.2f} s | {seconds / best:.1f}x |")
    print(f"| an empty page of Streamlit | {statistics.median(empty):.2f} s | - |")


@contextlib.contextmanager
def database(place: Path) -> Iterator[int]:
    """The port of a MariaDB server."""
    place.chmod(0o755)
    home = place / "data"
    home.mkdir()
    user = unprivileged_user()
    if user is not None:
        import shutil

        shutil.chown(home, user)
    install = ["mariadb-install-db", "--no-defaults", f"--datadir={home}", "--skip-test-db"]
    as_user([*install, "--auth-root-authentication-method=normal"])
    port = free_port()
    words = [f"--datadir={home}", f"--socket={home}/sock", f"--port={port}", "--bind-address=127.0.0.1"]
    speed = ["--innodb-flush-log-at-trx-commit=0", "--skip-log-bin", "--innodb-buffer-pool-size=1G"]
    service = Service(
        ["/usr/sbin/mariadbd", "--no-defaults", *words, *speed], {}, "ready for connections", user
    )
    try:
        yield port
    finally:
        service.stop()


def fill(server: Server, tables: int, rows: int) -> None:
    print(f"Making {tables} tables of {rows:,} rows ...", file=sys.stderr)
    columns = "id int PRIMARY KEY, name varchar(40), email varchar(80), state int, note text, seen datetime"
    values = "SELECT seq, concat('n', seq), concat(seq, '@x'), seq % 7, repeat('x', 40), now()"
    for number in range(tables):
        server.run(
            f"CREATE TABLE t{number} ({columns})", f"INSERT INTO t{number} {values} FROM seq_1_to_{rows}"
        )


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def serving(command: list[str], ready: str) -> Iterator[str]:
    """The address that a server prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield next(found[1] for line in process.stdout if (found := re.search(ready, line)))
    finally:
        process.terminate()
        process.wait()


def seen(page: Any, begin: Any, words: str, *, grid: bool = False) -> float:
    """Seconds from an action until the page shows some words, and the cells of a grid."""
    page.set_default_timeout(PAGE_SECONDS * 1000)
    began = time.perf_counter()
    begin()
    page.get_by_text(words).first.wait_for()
    if grid:
        page.locator("[data-testid=stDataFrame] td").first.wait_for(state="attached")
    return time.perf_counter() - began


def our_page(chromium: Any, port: int, tables: int) -> float:
    address = f"mysql://root@127.0.0.1:{port}/shop"
    command = [sys.executable, str(ROOT / "plato_sandbox.py"), "audit-ui", "--no-browser", "-w", "/"]
    with serving([*command, "--database-url", address], r"(http://\S+)") as url:
        page = chromium.new_page()
        seconds = seen(page, lambda: page.goto(url), f"{tables} tables", grid=True)
        page.close()
    print(f"ours: {seconds:.2f} s", file=sys.stderr)
    return seconds


def other_page(chromium: Any, script: Path, query: str, words: str) -> float:
    """A page of another script; with a query, its button is pressed."""
    command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.headless=true"]
    command += [f"--server.port={free_port()}", "--server.address=127.0.0.1"]
    with serving([*command, "--browser.gatherUsageStats=false"], r"(http://\S+)") as url:
        page = chromium.new_page()

        def begin() -> None:
            page.goto(f"{url}/{query}")
            if query:
                page.get_by_role("button", name="Connect & Load").click()

        seconds = seen(page, begin, words)
        page.close()
    print(f"{script.name}: {seconds:.2f} s", file=sys.stderr)
    return seconds


def sdk_page(place: Path) -> Path:
    """The SDK's page, out of its package."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place)]
    subprocess.run([*download, f"plato-sdk-v2=={RELEASE}"], check=True, stdout=sys.stderr)
    (wheel,) = place.glob("*.whl")
    script = place / "sdk.py"
    script.write_bytes(zipfile.ZipFile(wheel).read("plato/v1/audit_ui.py"))
    return script


if __name__ == "__main__":
    main()
