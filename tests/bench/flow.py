#!/usr/bin/env python3
"""Compares `flow` with a hand-written Playwright script of its steps: `python3 tests/bench/flow.py [RUNS]`.

Both log in to the example simulator, by turns, each in a process of its own; ours as a script, which Python
compiles at every run, and as a module, whose bytecode it keeps. Prints the medians, their ratios, and how
long after its start (Playwright's own import and start left out) `flow` opens its browser. Run it in the
environment of the tests (tests/run.py makes it); needs PostgreSQL and Chrome or Chromium.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_simulator import SIMULATOR, address, start_app, start_database  # noqa: E402

PRODUCT = ROOT / "plato_sandbox.py"
BY_HAND = """
import sys
from playwright.sync_api import sync_playwright

address, executable = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=executable or None)
    page = browser.new_page()
    page.goto(address)
    page.goto(address + "/login")
    page.wait_for_selector("#login-form")
    assert "Log in" in page.title()
    page.fill("#email", "admin@example.com")
    page.fill("#password", "demo-password")
    page.screenshot(path="login.png")
    page.click("#login-button")
    page.wait_for_url(lambda url: "/board" in url)
    for selector in (".error", ".alert-danger", ".alert-error", "[role='alert']", ".error-message",
                     ".validation-error"):
        for element in page.locator(selector).all():
            assert not (element.is_visible() and element.inner_text())
    assert "Ada Admin" in page.text_content("#current-user")
    page.screenshot(path="board.png", full_page=True)
    browser.close()
"""
# What a process does before it can open a browser, and Playwright does not do for it.
START = f"""
import sys, time
began = time.time()
sys.path.insert(0, {str(ROOT)!r})
sys.argv = sys.argv[1:]
import runpy
import playwright.async_api as api
imported = time.time() - began
inner = api.async_playwright
def outer():
    print(time.time() - began - imported, flush=True)
    return inner()
api.async_playwright = outer
runpy.run_path({str(PRODUCT)!r}, run_name="__main__")
"""


def browser() -> str:
    names = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
    return next(filter(None, map(shutil.which, names)), "")


def seconds_of(command: list[str], place: Path) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def until_playwright(place: Path, url: str) -> float:
    """Seconds from the program's first line until it calls Playwright, whose import is not counted."""
    command = [sys.executable, "-c", START, str(PRODUCT), "flow", "--base-url", url]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0])


def measure(place: Path, url: str, runs: int) -> None:
    shutil.copy(SIMULATOR / "flows.yml", place)
    shutil.copy(SIMULATOR / "plato-config.yml", place)
    os.environ["PLATO_BROWSER"] = browser()
    os.environ["PYTHONPATH"] = str(ROOT)
    contestants = {
        "by hand": [sys.executable, "-c", BY_HAND, url, browser()],
        "script": [sys.executable, str(PRODUCT), "flow", "--base-url", url],
        "module": [sys.executable, "-m", "plato_sandbox", "flow", "--base-url", url],
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(runs + 1):
        for name, command in contestants.items():
            seconds = seconds_of(command, place)
            if number:  # the first of each warms the caches up
                times[name].append(seconds)
    middle = {name: statistics.median(found) for name, found in times.items()}
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {runs} runs")
    for name, found in times.items():
        ratio = middle[name] / middle["by hand"]
        print(f"{name:<8} {middle[name]:.2f} s  ({min(found):.2f} to {max(found):.2f})  {ratio:.2f}x")
    starts = [until_playwright(place, url) for _ in range(min(runs, 5))]
    print(f"to the call of Playwright: {statistics.median(starts):.2f} s")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with tempfile.TemporaryDirectory(prefix="taskboard-") as name, tempfile.TemporaryDirectory() as work:
        database, port = start_database(Path(name), "users board")
        app = start_app(port)
        try:
            measure(Path(work), address(app), runs)
        finally:
            app.stop()
            database.stop(signal.SIGINT)


if __name__ == "__main__":
    main()
