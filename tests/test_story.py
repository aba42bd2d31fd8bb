"""The inner loop as one story, with real git, Docker Compose, PostgreSQL and a real worker."""

from __future__ import annotations

import http.cookiejar
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Desk, eventually, living, nothing_left, take_whole_example
from test_audit_ui import Page, Serving, chromium, open_page  # noqa: F401  (two are fixtures)

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

pytestmark = pytest.mark.long
LOOP_SECONDS = 300.0


class Browser:
    """Someone who uses the Taskboard at an address."""

    def __init__(self, url: str) -> None:
        self.url = url.partition("?")[0].rstrip("/")
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), jar)

    def get(self, path: str) -> str:
        with self.opener.open(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def answers(self) -> bool:
        try:
            return bool(self.get("/health"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def send(self, path: str, page: str, **fields: str) -> str:
        """Submit a form whose page holds the token that every form has."""
        token = re.search(r'name="csrf_token" value="([^"]+)"', page)
        assert token is not None
        body = urllib.parse.urlencode({"csrf_token": token[1], **fields}).encode()
        with self.opener.open(self.url + path, data=body, timeout=30) as answer:
            return str(answer.read().decode())

    def log_in(self) -> str:
        page = self.get("/login")
        return self.send("/login", page, email="admin@example.com", password="demo-password")

    def add_task(self, board: str, title: str) -> str:
        action = re.search(r'action="([^"]*/tasks)"', board)
        assert action is not None
        return self.send(action[1], board, title=title)


@pytest.fixture
def simulator(desk: Desk, plato: LocalPlato) -> Desk:
    """A desk with the whole example in its working directory, where VMs have a Docker engine."""
    take_whole_example(desk, plato)
    return desk


def summary(desk: Desk) -> dict[str, dict[str, Any]]:
    """The counts of `state` by table."""
    document = desk.good("state", "--json").document
    return {counts["table"]: counts for counts in document["summary"]["tables"]}


@pytest.mark.timeout(600)
def test_a_day_with_the_example_simulator(simulator: Desk, plato: LocalPlato) -> None:
    desk = simulator
    desk.good("start", "-c")
    services = desk.good("start-services", "--json", timeout=LOOP_SECONDS).document
    assert services["path"] == "/home/plato/worktree/taskboard"
    assert {found["service"]: found["health"] for found in services["services"][0]["containers"]} == {
        "app": "healthy",
        "db": "healthy",
    }
    assert services["app_answers"] == "HTTP 302"
    assert services["url"] == desk.state["url"]
    browser = Browser(desk.state["url"])
    assert browser.answers()

    # What is edited is what is shown then; an address that leads nowhere is told.
    template = desk.work / "app/templates/login.html"
    template.write_text(template.read_text().replace(">Log in<", ">Log in today<"))
    config = desk.work / "plato-config.yml"
    written = config.read_text()
    config.write_text(written.replace("app_port: 8080", "app_port: 8099"))
    told = desk.good("start-services", timeout=LOOP_SECONDS).err
    assert "`compute.app_port` is 8099 now; the address of this sandbox leads to 8080" in told
    assert "not work" not in told
    config.write_text(written)
    assert ">Log in today<" in browser.get("/login")

    # Before the worker is up nobody knows what changed; then nothing has.
    assert desk.run("state").code == 9
    assert desk.good("start-worker", "--wait", "--json", timeout=LOOP_SECONDS).document["ready"] is True
    assert summary(desk) == {}
    assert desk.good("state", "-v").out.endswith("No mutations since the last reset or clear-audit.\n")

    # What a person does in the application is what `state` shows.
    board = browser.log_in()
    assert "Ada Admin" in board
    board = browser.add_task(board, "Water the plants")
    assert "Water the plants" in board
    changed = summary(desk)
    assert changed["tasks"]["inserted"] == 1
    assert "sessions" not in changed  # the config ignores it
    assert "Water the plants" in desk.good("state").out
    refused = desk.run("state", "--verify-no-mutations")
    assert refused.code == 8
    assert "audit_ignore_tables:\n" in refused.err

    # `clear-audit` forgets the changes, `reset` takes them back.
    desk.good("clear-audit")
    assert summary(desk) == {}
    browser.add_task(board, "Feed the cat")
    assert summary(desk)["tasks"]["inserted"] == 1
    desk.good("reset")
    assert summary(desk) == {}
    board = Browser(desk.state["url"]).log_in()
    assert "Feed the cat" not in board
    assert "Water the plants" not in board

    # A snapshot keeps what is there then; a sandbox started from it has it.
    browser = Browser(desk.state["url"])
    browser.add_task(browser.log_in(), "Call the bank")
    artifact_id = desk.good("snapshot", "--wait", "--json", timeout=LOOP_SECONDS).document["artifact_id"]
    assert desk.state["artifact_id"] == artifact_id
    desk.good("stop")
    nothing_left(desk, plato)
    desk.good("start", "-a", artifact_id, timeout=LOOP_SECONDS)
    browser = Browser(desk.state["url"])
    eventually(browser.answers, 60)
    assert "Call the bank" in browser.log_in()
    desk.good("stop")
    nothing_left(desk, plato)
    assert living(plato) == []


@pytest.mark.timeout(600)
def test_what_a_login_changes_becomes_noise(
    simulator: Desk,
    plato: LocalPlato,
    open_page: Callable[[str], Page],  # noqa: F811
) -> None:
    """A login flow, what it changed, two clicks in the page, saved: the next login changes nothing."""
    desk = simulator
    desk.good("start", "-c")
    desk.good("start-services", timeout=LOOP_SECONDS)
    desk.good("start-worker", "--wait", timeout=LOOP_SECONDS)
    desk.good("flow", "-f", "login", timeout=LOOP_SECONDS)
    refused = desk.run("state", "-v")
    assert refused.code == 8
    assert "activity (1 inserted); users (1 updated)" in refused.err

    serving = Serving(desk)
    page = open_page(serving.url)
    page.tick(("users", "login_count"), ("users", "last_login_at"), ("activity", "(whole table)"))
    page.click("Save to plato-config.yml")
    page.see("Saved.")
    assert serving.end().code == 0

    desk.good("start-worker", "--wait", timeout=LOOP_SECONDS)
    desk.good("reset")
    passed = desk.good("flow", "-f", "login", "--verify-no-mutations", "--json", timeout=LOOP_SECONDS)
    assert passed.document["mutations"] == []
    assert "No mutations" in desk.good("state", "-v").out

    # An artifact has the flows of its config: they run where there are no local files.
    artifact_id = desk.good("snapshot", "--wait", "--json", timeout=LOOP_SECONDS).document["artifact_id"]
    desk.good("stop")
    elsewhere = desk.place / "elsewhere"
    elsewhere.mkdir()
    desk.good("start", "-a", artifact_id, directory=elsewhere, timeout=LOOP_SECONDS)
    ran = desk.good("flow", "-f", "login", "--json", directory=elsewhere, timeout=LOOP_SECONDS).document
    assert ran["source"] == "api"
    listed = desk.good("flow", "--list", "--api", "--json", directory=elsewhere).document["flows"]
    assert [flow["name"] for flow in listed] == ["login", "wrong_password", "add_task"]

    # And its listeners: the worker watches them, and the page shows them, without a config here.
    known = desk.good("state", "--json", directory=elsewhere).document
    assert "db" in next(iter(known["results"].values()))["state"]
    serving = Serving(desk, directory=elsewhere)
    tab = open_page(serving.url).tab
    search = tab.get_by_role("textbox", name="Search")  # the grid has only the rows that are in view
    search.fill("login_count")
    search.press("Enter")
    tab.get_by_test_id("stDataFrame").first.get_by_text("users").first.wait_for(state="attached")
    assert serving.end().code == 0
    desk.good("stop", directory=elsewhere)
    nothing_left(desk, plato)
