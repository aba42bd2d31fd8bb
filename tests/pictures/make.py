#!/usr/bin/env python3
"""Makes the README's pictures anew: `python3 tests/pictures/make.py [NAME ...]`, in the tests' environment.

terminal        a morning with the example simulator, as a terminal of 80 columns shows it: the commands are
                typed into a real shell in tmux, and what tmux shows is drawn
flow-report     the top of the report of a flow that failed
audit-ui        the page of audit-ui after two logins, with some columns ticked

All of it at a local Plato with all its real parts. Needs what `run.py --all` installs.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from localplato import LocalPlato  # noqa: E402

PICTURES = ROOT / "tests" / "pictures"
COLUMNS, ROWS = 80, 60
# As README and the example's config tell: what a login changes is noise here.
NOISE = ("sessions", "activity", "{table: users, columns: [login_count, last_login_at]}")
TYPED = (
    "plato-sandbox up",
    "plato-sandbox exec docker ps --format '{{.Names}}  {{.Status}}'",
    "plato-sandbox flow -f add_task | tail -n 2",
    "plato-sandbox state",
    "plato-sandbox stop",
)
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#f2cc60"}
TERMINAL_PAGE = """\
<!DOCTYPE html>
<meta charset="utf-8">
<style>
body {{ margin: 0; background: #0d1117; }}
pre {{ margin: 0; padding: 16px 20px; display: inline-block; width: {columns}ch; color: #e6edf3;
       font: 15px/1.35 "DejaVu Sans Mono", monospace; }}
b {{ color: #fff; }}
</style>
<pre>{text}</pre>
"""


class Newcomer:
    """Someone with the example simulator in a directory, at a local Plato, with the tool as a command."""

    def __init__(self, place: Path, plato: LocalPlato) -> None:
        self.home = place / "home"
        self.work = self.home / "taskboard"
        shutil.copytree(ROOT / "tests" / "simulator", self.work)
        programs = place / "bin"
        programs.mkdir()
        (programs / "plato-sandbox").symlink_to(ROOT / "plato_sandbox.py")
        # By a short name, since the report shows it.
        (place / "venv").symlink_to(sys.prefix)
        own = (str(programs), str(place / "venv" / "bin"))
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([*own, os.environ["PATH"]]),
            "LANG": "C.UTF-8",
            **plato.environment,
        }

    def run(self, *words: str, check: bool = True) -> None:
        subprocess.run(["plato-sandbox", *words], cwd=self.work, env=self.environment, check=check)

    @contextmanager
    def sandbox(self) -> Iterator[None]:
        """The simulator on a VM, ready for use."""
        self.run("start", "--from-config")
        try:
            self.run("start-services")
            self.run("start-worker", "--wait")
            yield
        finally:
            self.run("stop")


# ---------------------------------------------------------------------------
# the terminal
# ---------------------------------------------------------------------------


def type_commands(someone: Newcomer) -> str:
    """What a terminal shows after some commands, with the colours as escape sequences."""
    socket = someone.home.parent / "tmux"
    tmux = ["tmux", "-S", str(socket), "-f", os.devnull]

    def control(*words: str) -> str:
        done = subprocess.run(
            [*tmux, *words], env=someone.environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def at_prompt(number: int) -> str:
        """What the terminal shows when the shell has printed so many prompts, and waits at the last."""
        while True:
            shown = control("capture-pane", "-e", "-p", "-S", "-").rstrip()
            prompts = [line.rstrip() for line in shown.split("\n") if line.startswith("$")]
            if len(prompts) == number and prompts[-1] == "$":
                return shown
            time.sleep(0.1)

    shell = ["env", "PS1=$ ", "bash", "--norc", "--noprofile", "-i"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    control("new-session", "-d", *size, "-c", str(someone.work), shlex.join(shell))
    try:
        for number, line in enumerate(TYPED, 1):
            at_prompt(number)
            control("send-keys", "-l", line)
            control("send-keys", "Enter")
        return at_prompt(len(TYPED) + 1)
    finally:
        control("kill-server")


def coloured(text: str) -> str:
    """A terminal's text as HTML: the commands bold, and the few colours that the tool uses."""
    lines = []
    for line in text.removesuffix("$").rstrip().split("\n"):
        shown = html.escape(line.rstrip())
        shown = re.sub(
            r"\x1b\[(\d+)m(.*?)\x1b\[(?:0|39)m",
            lambda found: f'<span style="color: {COLOURS[found[1]]}">{found[2]}</span>',
            shown,
        )
        lines.append(f"$ <b>{shown[2:]}</b>" if shown.startswith("$ ") else shown)
    whole = "\n".join(lines)
    assert "\x1b" not in whole, "the terminal shows something that this script cannot draw"
    return whole


def take_terminal(someone: Newcomer, page: Page, picture: Path) -> None:
    config = someone.work / "plato-config.yml"
    rules = "".join(f"          - {rule}\n" for rule in NOISE)
    config.write_text(config.read_text().replace("          - sessions\n", rules, 1))
    page.set_content(TERMINAL_PAGE.format(columns=COLUMNS, text=coloured(type_commands(someone))))
    page.locator("pre").screenshot(path=picture)


# ---------------------------------------------------------------------------
# the pages
# ---------------------------------------------------------------------------


def take_flow_report(someone: Newcomer, page: Page, picture: Path) -> None:
    with someone.sandbox():
        someone.run("flow", "-f", "wrong_password", check=False)
    page.set_viewport_size({"width": 960, "height": 916})
    page.goto((someone.work / "test-results" / "report.html").as_uri())
    page.screenshot(path=picture)


def take_audit_ui(someone: Newcomer, page: Page, picture: Path) -> None:
    with someone.sandbox():
        someone.run("flow")
        someone.run("flow")
        command = ["plato-sandbox", "audit-ui", "--no-browser", "--json"]
        with subprocess.Popen(
            command, cwd=someone.work, env=someone.environment, stdout=subprocess.PIPE
        ) as serving:
            assert serving.stdout is not None
            try:
                text = b""
                while not text.endswith(b"}\n"):
                    text += serving.stdout.readline()
                tick_columns(json.loads(text)["url"], page)
                page.screenshot(path=picture)
            finally:
                serving.terminate()


def tick_columns(url: str, page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 1240})
    page.goto(url)
    search = page.get_by_role("textbox", name="Search")
    page.get_by_text("What changed most").wait_for(timeout=60_000)
    search.fill("log")
    search.press("Enter")
    page.get_by_role("button", name=re.compile("Ignore .* column")).click()
    search.fill("")
    search.press("Enter")
    page.get_by_role("button", name="Save to").wait_for()
    search.blur()
    page.mouse.move(0, 0)
    page.wait_for_timeout(3000)  # the grid is drawn on a canvas, of which nothing tells


# How each is made, and how many of its dots there are to one of the page.
MADE = {
    "terminal": (take_terminal, 2),
    "flow-report": (take_flow_report, 1.5),
    "audit-ui": (take_audit_ui, 1),
}


def main(names: list[str]) -> int:
    browser = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
    for name in names or MADE:
        take, scale = MADE[name]
        with (
            tempfile.TemporaryDirectory(prefix="newcomer-") as place,
            LocalPlato(Path(place) / "plato") as plato,
        ):
            someone = Newcomer(Path(place), plato)
            with sync_playwright() as playwright:
                page = playwright.chromium.launch(executable_path=browser).new_page(device_scale_factor=scale)
                take(someone, page, PICTURES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
