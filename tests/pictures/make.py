#!/usr/bin/env python3
"""Makes the README's pictures anew: `python3 tests/pictures/make.py`, in the environment of the tests.

The page of audit-ui after two logins to the example simulator, on a local Plato with all its real parts, with
some columns ticked. Needs what `run.py --all` installs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from localplato import LocalPlato  # noqa: E402

PRODUCT = [sys.executable, str(ROOT / "plato_sandbox.py")]
PICTURE = ROOT / "tests" / "pictures" / "audit-ui.png"
WIDTH, HEIGHT = 1280, 1240


def take_picture(url: str) -> None:
    browser = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser).new_page(
            viewport={"width": WIDTH, "height": HEIGHT}
        )
        page.goto(url)
        search = page.get_by_label("Search")
        page.get_by_text("What changed most").wait_for(timeout=60_000)
        search.fill("last_")
        search.press("Enter")
        page.get_by_role("button", name="column").click()
        search.fill("")
        search.press("Enter")
        page.get_by_role("button", name="Save to").wait_for()
        page.wait_for_timeout(3000)  # the grid is drawn on a canvas, of which nothing tells
        page.screenshot(path=PICTURE)


def main() -> int:
    with tempfile.TemporaryDirectory() as name, LocalPlato(Path(name) / "plato") as plato:
        work, home = Path(name) / "taskboard", Path(name) / "home"
        shutil.copytree(ROOT / "tests" / "simulator", work)
        home.mkdir()
        environment = {**os.environ, "HOME": str(home), **plato.environment}

        def run(*words: str) -> None:
            subprocess.run([*PRODUCT, *words], cwd=work, env=environment, check=True)

        run("start", "--from-config")
        try:
            run("start-services")
            run("start-worker", "--wait")
            run("flow")
            run("flow")
            command = [*PRODUCT, "audit-ui", "--no-browser", "--json"]
            with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE) as serving:
                assert serving.stdout is not None
                text = b""
                while not text.endswith(b"}\n"):
                    text += serving.stdout.readline()
                take_picture(json.loads(text)["url"])
                serving.terminate()
        finally:
            run("stop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
