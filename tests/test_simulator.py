"""The example simulator: its application on a real PostgreSQL, and what its Plato and Compose files name."""

from __future__ import annotations

import ast
import http.cookiejar
import json
import os
import pwd
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.long  # the ordinary suite works with the simulator; --all asks it by itself

SIMULATOR = Path(__file__).resolve().parent / "simulator"
EMAIL = "admin@example.com"
PASSWORD = "demo-password"
DATABASE_SETTINGS = {"PGUSER": "taskboard", "PGPASSWORD": "taskboard", "PGDATABASE": "taskboard"}
START_TIMEOUT_SECONDS = 60.0
# Elements that have no end tag.
VOID_TAGS = {"br", "hr", "img", "input", "link", "meta"}


# ---------------------------------------------------------------------------
# processes
# ---------------------------------------------------------------------------


class Service:
    """A child process that says in its output when it is ready."""

    def __init__(
        self, command: list[str], environment: dict[str, str], ready: str, user: str | None = None
    ) -> None:
        self.output: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        # Settings of somebody's own PostgreSQL would lead the application astray.
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("PG", "TASKBOARD_"))
        }
        identity: dict[str, Any] = {}
        if user is not None:
            identity = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        self.process = subprocess.Popen(
            command,
            env={**inherited, "LC_ALL": "C.UTF-8", **environment},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **identity,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._wait_for(re.compile(ready))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self.output.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def _wait_for(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The first line that matches; None when the process ends without one."""
        while True:
            try:
                line = self._lines.get(timeout=START_TIMEOUT_SECONDS)
            except queue.Empty:
                self.stop(signal.SIGKILL)
                raise AssertionError(f"not ready in time:\n{''.join(self.output)}") from None
            if line is None:
                return None
            match = pattern.search(line)
            if match:
                return match

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def postgresql_programs() -> Path:
    """The directory of the newest PostgreSQL server on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        pytest.skip("no PostgreSQL server here (apt-get install postgresql)")
    return (found[-1] if found else Path(str(on_path))).parent


def unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root: the user to be instead, or None to stay who we are."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@dataclass(frozen=True)
class Database:
    port: int
    directory: Path
    psycopg2: Any

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Run `sql`, one statement or more, and return the rows of the last one."""
        connection = self.psycopg2.connect(
            host="127.0.0.1",
            port=self.port,
            user=DATABASE_SETTINGS["PGUSER"],
            password=DATABASE_SETTINGS["PGPASSWORD"],
            dbname=DATABASE_SETTINGS["PGDATABASE"],
        )
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def value(self, sql: str) -> Any:
        return self.rows(sql)[0][0]


def start_database(directory: Path, seed: str) -> tuple[Service, int]:
    """Run the database container's own start script, with its files copied to `directory` as in the image."""
    programs = postgresql_programs()
    user = unprivileged_user()
    shutil.copytree(SIMULATOR / "db", directory / "files")
    if user is not None:
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, user)
    for _attempt in range(5):
        # Somebody else may take the port before PostgreSQL does.
        port = free_port()
        service = Service(
            ["sh", str(directory / "files" / "start.sh")],
            {
                **DATABASE_SETTINGS,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PGDATA": str(directory / "cluster"),
                "PGPORT": str(port),
                "TASKBOARD_LISTEN": "127.0.0.1",
                "TASKBOARD_SEED": seed,
            },
            "ready to accept connections",
            user,
        )
        if service.ready:
            return service, port
        service.process.wait()
        if not any("could not bind" in line for line in service.output):
            break
    raise AssertionError(f"PostgreSQL did not start:\n{''.join(service.output)}")


def running_database(seed: str) -> Iterator[Database]:
    psycopg2 = pytest.importorskip("psycopg2", reason="needs psycopg2 (pip install psycopg2-binary)")
    # Not tmp_path: its parents are closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="taskboard-") as name:
        service, port = start_database(Path(name), seed)
        try:
            yield Database(port, Path(name), psycopg2)
        finally:
            service.stop(signal.SIGINT)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    yield from running_database("users board")


def start_app(database_port: int, **settings: str) -> Service:
    pytest.importorskip("flask", reason="needs Flask (pip install flask)")
    environment = {
        **DATABASE_SETTINGS,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database_port),
        "TASKBOARD_PORT": "0",
        "TASKBOARD_SECRET_KEY": "for the tests",
        "PYTHONDONTWRITEBYTECODE": "1",
        **settings,
    }
    return Service(
        [sys.executable, str(SIMULATOR / "app" / "taskboard.py")], environment, r"listens on (http://\S+)"
    )


def address(service: Service) -> str:
    assert service.ready, "".join(service.output)
    return service.ready.group(1)


@pytest.fixture(scope="module")
def app(database: Database) -> Iterator[str]:
    """The address of the application."""
    service = start_app(database.port)
    try:
        yield address(service)
    finally:
        service.stop()


# ---------------------------------------------------------------------------
# a browser without JavaScript
# ---------------------------------------------------------------------------


@dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    def descendants(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child.descendants()

    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text() for child in self.children)
        return " ".join(" ".join(parts).split())

    def closest(self, tag: str) -> Element | None:
        element: Element | None = self
        while element is not None and element.tag != tag:
            element = element.parent
        return element

    def matches(self, compound: str) -> bool:
        """Whether this element fits a selector without spaces: tag, #id, .class, [name='value']."""
        parts = re.findall(r"[#.]?[\w-]+|\[[\w-]+='[^']*'\]", compound)
        if "".join(parts) != compound:
            raise ValueError(f"selector not understood: {compound}")
        return all(self._fits(part) for part in parts)

    def _fits(self, part: str) -> bool:
        if part[0] == "#":
            return self.attributes.get("id") == part[1:]
        if part[0] == ".":
            return part[1:] in self.attributes.get("class", "").split()
        if part[0] == "[":
            name, value = part[1:-2].split("='")
            return self.attributes.get(name) == value
        return self.tag == part

    def _below(self, compounds: list[str]) -> bool:
        """Whether the ancestors fit `compounds`, each one somewhere above the next."""
        if not compounds:
            return True
        above = self.parent
        while above is not None:
            if above.matches(compounds[-1]) and above._below(compounds[:-1]):
                return True
            above = above.parent
        return False

    def select(self, selector: str) -> list[Element]:
        *ancestors, last = re.split(r" +(?![^\[]*\])", selector)
        return [
            element for element in self.descendants() if element.matches(last) and element._below(ancestors)
        ]

    def one(self, selector: str) -> Element:
        found = self.select(selector)
        assert len(found) == 1, f"{len(found)} elements fit {selector}"
        return found[0]


class TreeBuilder(HTMLParser):
    """Reads well-formed HTML; an end tag that does not fit is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("document", {})
        self._open = self.root

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes}, self._open)
        self._open.children.append(element)
        if tag not in VOID_TAGS:
            self._open = element

    def handle_endtag(self, tag: str) -> None:
        assert tag == self._open.tag, f"</{tag}> closes <{self._open.tag}> at {self.getpos()}"
        assert self._open.parent is not None
        self._open = self._open.parent

    def handle_data(self, data: str) -> None:
        self._open.children.append(data)

    def finish(self) -> Element:
        self.close()
        assert self._open is self.root, f"<{self._open.tag}> is not closed"
        return self.root


@dataclass
class Page:
    status: int
    url: str
    html: str
    document: Element
    headers: Any

    @property
    def path(self) -> str:
        return urllib.parse.urlsplit(self.url).path


class Browser:
    """Keeps cookies, follows redirects, submits the forms that it finds in pages."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.cookies = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self.cookies)
        )
        self.page = Page(0, base, "", Element("document", {}), {})

    def open(self, url: str, fields: dict[str, str] | None = None) -> Page:
        target = urllib.parse.urljoin(self.page.url, url)
        body = None if fields is None else urllib.parse.urlencode(fields).encode()
        try:
            response = self._opener.open(urllib.request.Request(target, data=body), timeout=30)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            html = response.read().decode()
        builder = TreeBuilder()
        builder.feed(html)
        self.page = Page(response.status or 0, response.geturl(), html, builder.finish(), response.headers)
        return self.page

    def submit(self, form: Element, **typed: str) -> Page:
        inputs = form.select("input")
        fields = {item.attributes["name"]: item.attributes.get("value", "") for item in inputs}
        assert set(typed) <= set(fields), f"the form has no field {set(typed) - set(fields)}"
        assert form.attributes["method"] == "post"
        return self.open(form.attributes["action"], {**fields, **typed})

    def press(self, button: Element) -> Page:
        """Submit the form that the button belongs to."""
        form = button.closest("form")
        assert form is not None, "this button is in no form"
        return self.submit(form)

    def log_in(self, email: str = EMAIL, password: str = PASSWORD) -> Page:
        form = self.open("/login").document.one("#login-form")
        return self.submit(form, email=email, password=password)

    def add_task(self, title: str, project: int = 1) -> Page:
        return self.submit(self.page.document.one(f"#project-{project} form.add"), title=title)

    def task(self, title: str) -> Element:
        found = [item for item in self.page.document.select(".task") if item.one(".title").text() == title]
        assert len(found) == 1, f"{len(found)} tasks are called {title}"
        return found[0]


@pytest.fixture
def browser(app: str) -> Browser:
    return Browser(app)


@pytest.fixture
def member(browser: Browser) -> Browser:
    """A browser that is logged in and shows the board."""
    assert browser.log_in().path == "/board"
    return browser


# ---------------------------------------------------------------------------
# log in and out
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_the_board_needs_a_login(browser: Browser) -> None:
    page = browser.open("/")
    assert (page.status, page.path) == (200, "/login")
    assert page.document.select("#login-form")
    assert not page.document.select("#board")


@pytest.mark.long
def test_login_shows_the_board(browser: Browser) -> None:
    page = browser.log_in()
    assert (page.status, page.path) == (200, "/board")
    assert page.document.one("#current-user").text() == "Ada Admin"
    assert len(page.document.select("[data-testid='project']")) == 3
    assert browser.open("/login").path == "/board"


@pytest.mark.long
def test_the_email_is_found_in_any_case(browser: Browser) -> None:
    assert browser.log_in(" Sam@Example.COM ").document.one("#current-user").text() == "Sam Porter"


@pytest.mark.long
@pytest.mark.parametrize(
    ("email", "password"),
    [
        (EMAIL, "wrong"),
        (EMAIL, ""),
        ("nobody@example.com", PASSWORD),
        ("' OR true --", PASSWORD),
        ("a\0b", "c\0d"),
    ],
)
def test_wrong_credentials(browser: Browser, email: str, password: str) -> None:
    page = browser.log_in(email, password)
    error = page.document.one(".alert-error")
    assert (page.status, page.path) == (403, "/login")
    assert error.text() == "Wrong email or password."
    assert error.attributes["role"] == "alert"
    assert browser.open("/board").path == "/login"


@pytest.mark.long
def test_a_login_leaves_its_traces(browser: Browser, database: Database) -> None:
    user = "SELECT login_count, coalesce(last_login_at, '-infinity') FROM users WHERE id = 2"
    sessions = "SELECT count(*) FROM sessions WHERE user_id = 2"
    activity = "SELECT count(*) FROM activity WHERE user_id = 2 AND action = 'logged in'"
    (count, moment), session_count = database.rows(user)[0], database.value(sessions)
    activity_count = database.value(activity)
    page = browser.log_in("sam@example.com")
    assert database.value("SELECT last_login_at FROM users WHERE id = 2") is not None
    assert database.rows(user)[0][0] == count + 1
    assert database.value(f"SELECT last_login_at > '{moment}' FROM users WHERE id = 2")
    assert database.value(sessions) == session_count + 1
    assert database.value(activity) == activity_count + 1
    assert page.document.one("#login-count").text() == str(count + 1)


def test_a_failed_login_is_logged_and_counts_for_nothing(browser: Browser, database: Database) -> None:
    before = database.rows("SELECT login_count, last_login_at FROM users ORDER BY id")
    browser.log_in("stranger@example.com", "guess")
    assert database.rows("SELECT login_count, last_login_at FROM users ORDER BY id") == before
    assert database.rows("SELECT user_id, action, subject FROM activity ORDER BY id DESC LIMIT 1") == [
        (None, "failed to log in as", "stranger@example.com")
    ]


def test_a_page_view_moves_last_seen(member: Browser, database: Database) -> None:
    newest = "SELECT last_seen_at FROM sessions ORDER BY created_at DESC LIMIT 1"
    before = database.value(newest)
    member.open("/board")
    assert database.value(newest) > before


def test_logout_ends_the_session_in_the_database_too(member: Browser, app: str) -> None:
    thief = Browser(app)
    for cookie in member.cookies:
        thief.cookies.set_cookie(cookie)
    assert thief.open("/board").path == "/board"
    page = member.press(member.page.document.one("#logout-button"))
    assert page.path == "/login"
    assert page.document.one("[data-testid='notice']").text() == "You are logged out."
    assert member.open("/board").path == "/login"
    assert thief.open("/board").path == "/login"


@pytest.mark.long
def test_an_old_session_has_ended(member: Browser, database: Database) -> None:
    database.rows("UPDATE sessions SET created_at = now() - interval '15 days'")
    assert member.open("/board").path == "/login"


def test_secrets_are_stored_as_hashes(member: Browser, database: Database) -> None:
    hashes = [row[0] for row in database.rows("SELECT password_hash FROM users")]
    assert len(set(hashes)) == 2
    assert all(value.startswith("pbkdf2:sha256:") for value in hashes)
    assert {cookie.name for cookie in member.cookies} == {"taskboard"}
    (cookie,) = member.cookies
    assert cookie.has_nonstandard_attr("HttpOnly")
    stored = database.rows("SELECT token_hash FROM sessions")
    assert all(re.fullmatch(r"[0-9a-f]{64}", row[0]) and row[0] not in str(cookie.value) for row in stored)


@pytest.mark.sampled
@pytest.mark.parametrize("token", [None, "", "guessed", "gu\u00e9ssed"])
def test_a_form_without_the_browsers_token_changes_nothing(
    member: Browser, database: Database, token: str | None
) -> None:
    fields = {"title": "Forged"} if token is None else {"title": "Forged", "csrf_token": token}
    page = member.open("/projects/1/tasks", fields)
    assert page.status == 400
    assert "expired" in page.document.one(".alert-error").text()
    assert database.value("SELECT count(*) FROM tasks WHERE title = 'Forged'") == 0


# ---------------------------------------------------------------------------
# the board
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_a_task_is_added_done_reopened_and_deleted(member: Browser, database: Database) -> None:
    title = 'Ask "Tom & <b>Ana</b>" about it — soon'
    page = member.add_task(title, project=3)
    assert (page.status, page.path) == (200, "/board")
    assert page.document.one("[data-testid='notice']").text() == f"Added “{title}”."
    assert title in page.document.one("#project-3").text()
    stored = f"SELECT done_at IS NOT NULL, created_by FROM tasks WHERE title = '{title}'"
    assert database.rows(stored) == [(False, 1)]

    done = page.document.one("#project-3 .count").text()
    page = member.press(member.task(title).one(".toggle"))
    assert "done" in member.task(title).attributes["class"].split()
    assert page.document.one("#project-3 .count").text() != done
    assert database.rows(stored) == [(True, 1)]

    page = member.press(member.task(title).one(".toggle"))
    assert page.document.one("#project-3 .count").text() == done
    assert database.rows(stored) == [(False, 1)]

    page = member.press(member.task(title).one(".delete"))
    assert database.rows(stored) == []
    assert title not in page.document.one("#project-3").text()
    log = database.rows(f"SELECT action FROM activity WHERE subject = '{title}' ORDER BY id")
    assert log == [("added",), ("finished",), ("reopened",), ("deleted",)]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("title", "problem"),
    [("", "A task needs a title."), (" \0 ", "A task needs a title."), ("x" * 201, "200 characters at most")],
)
def test_a_bad_title_is_refused_and_kept_in_the_form(
    member: Browser, database: Database, title: str, problem: str
) -> None:
    before = database.value("SELECT count(*) FROM tasks")
    page = member.add_task(title, project=2)
    assert page.status == 422
    assert problem in page.document.one(".alert-error").text()
    assert page.document.one("#project-2 [name='title']").attributes["value"] == title.strip(" \0")
    assert "value" not in page.document.one("#project-1 [name='title']").attributes
    assert database.value("SELECT count(*) FROM tasks") == before


def test_the_longest_title_fits(member: Browser) -> None:
    member.add_task("ü" * 200)
    member.press(member.task("ü" * 200).one(".delete"))


@pytest.mark.long
def test_a_task_that_is_gone(member: Browser, database: Database) -> None:
    member.add_task("Short-lived")
    button = member.task("Short-lived").one(".delete")
    member.press(button)
    before = database.value("SELECT count(*) FROM activity")
    page = member.press(button)
    assert page.status == 404
    assert page.document.one("[role='alert']").text() == "This task does not exist any more."
    assert database.value("SELECT count(*) FROM activity") == before


@pytest.mark.long
@pytest.mark.parametrize("project", ["4", "99999999999999999999"])
def test_a_project_that_does_not_exist(member: Browser, project: str) -> None:
    token = member.page.document.one("#project-1 form.add").one("[name='csrf_token']").attributes["value"]
    page = member.open(f"/projects/{project}/tasks", {"title": "Lost", "csrf_token": token})
    assert page.status == 404


@pytest.mark.long
def test_the_activity_names_the_newest_first(member: Browser) -> None:
    for number in range(8):
        member.add_task(f"An earlier one, {number}")
    member.add_task("Seen in the activity")
    member.press(member.task("Seen in the activity").one(".delete"))
    lines = [item.text() for item in member.page.document.one("#activity").select("li")]
    assert lines[0].startswith("Ada Admin deleted Seen in the activity")
    assert lines[1].startswith("Ada Admin added Seen in the activity")
    assert len(lines) == 8


def test_pages_need_no_script_and_their_files_exist(member: Browser) -> None:
    pages = [member.open("/board"), Browser(member.base).open("/login"), member.open("/tasks/1/done")]
    assert [page.status for page in pages] == [200, 200, 405]
    for page in pages:
        assert not page.document.select("script")
        found = [item.attributes.get("id") for item in page.document.descendants()]
        identifiers = [identifier for identifier in found if identifier is not None]
        assert len(identifiers) == len(set(identifiers))
        linked = [item.attributes["href"] for item in page.document.select("link")]
        assert len(linked) == 2
        for link in linked:
            assert member.open(link).status == 200


# ---------------------------------------------------------------------------
# health and start
# ---------------------------------------------------------------------------


def test_health_needs_no_login(browser: Browser, database: Database) -> None:
    before = database.value("SELECT count(*) FROM sessions")
    page = browser.open("/health")
    assert (page.status, json.loads(page.html)) == (200, {"status": "ok"})
    assert database.value("SELECT count(*) FROM sessions") == before


def test_without_its_database_the_app_says_so() -> None:
    service = start_app(free_port())
    try:
        browser = Browser(address(service))
        page = browser.open("/health")
        assert (page.status, json.loads(page.html)["status"]) == (503, "unavailable")
        page = browser.log_in()
        assert page.status == 503
        assert "database" in page.document.one(".alert-error").text()
    finally:
        service.stop()


def test_without_a_secret_key_the_app_does_not_start() -> None:
    service = start_app(1, TASKBOARD_SECRET_KEY="")
    assert service.ready is None
    assert service.process.wait() == 1
    assert "".join(service.output).strip().startswith("TASKBOARD_SECRET_KEY is not set.")


def test_seeds_can_be_loaded_again(database: Database) -> None:
    tables = ("users", "projects", "tasks")
    counts = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    before = database.rows(counts)
    for seed in sorted((SIMULATOR / "db" / "seed").glob("*.sql"), reverse=True):
        database.rows(seed.read_text(encoding="utf-8"))
    assert database.rows(counts) == before
    assert before[0][:2] == (2, 3)


@pytest.mark.long
def test_the_empty_dataset_has_users_and_no_projects() -> None:
    for database in running_database("users"):
        assert database.rows("SELECT email FROM users ORDER BY id") == [(EMAIL,), ("sam@example.com",)]
        service = start_app(database.port)
        try:
            page = Browser(address(service)).log_in()
            assert page.document.one("#no-projects").text() == "There are no projects."
        finally:
            service.stop()


@pytest.mark.long
def test_a_first_start_that_was_interrupted_begins_anew() -> None:
    postgresql_programs()
    with tempfile.TemporaryDirectory(prefix="taskboard-") as name:
        half_made = Path(name) / "cluster.new"
        half_made.mkdir()
        (half_made / "PG_VERSION").write_text("15\n", encoding="utf-8")
        service, _port = start_database(Path(name), "users")
        service.stop(signal.SIGINT)
        assert service.process.returncode == 0
        assert (Path(name) / "cluster" / "PG_VERSION").exists()
        assert not half_made.exists()


# ---------------------------------------------------------------------------
# flows
# ---------------------------------------------------------------------------


def load(name: str) -> Any:
    return yaml.safe_load((SIMULATOR / name).read_text(encoding="utf-8"))


def flow_named(name: str) -> dict[str, Any]:
    (flow,) = [flow for flow in load("flows.yml")["flows"] if flow["name"] == name]
    return dict(flow)


class FlowFailedError(Exception):
    pass


def require(condition: object, problem: str) -> None:
    if not condition:
        raise FlowFailedError(problem)


class FlowRunner:
    """Carries out a flow's steps without a browser engine: pages and forms only."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.typed: dict[str, str] = {}

    def run(self, steps: list[dict[str, Any]]) -> int | None:
        """The number of the step that failed, counted from 1; None when all passed."""
        for number, step in enumerate(steps, 1):
            try:
                getattr(self, f"do_{step['type']}")(step)
            except FlowFailedError:
                return number
        return None

    @property
    def document(self) -> Element:
        return self.browser.page.document

    def element(self, step: dict[str, Any]) -> Element:
        found = self.document.select(step["selector"])
        require(found, f"nothing fits {step['selector']}")
        return found[0]

    def do_navigate(self, step: dict[str, Any]) -> None:
        self.browser.open(step["url"])

    def do_wait_for_selector(self, step: dict[str, Any]) -> None:
        self.element(step)

    def do_fill(self, step: dict[str, Any]) -> None:
        element = self.element(step)
        assert element.tag == "input"
        self.typed[element.attributes["name"]] = step["value"]

    def do_click(self, step: dict[str, Any]) -> None:
        form = self.element(step).closest("form")
        assert form is not None
        typed, self.typed = self.typed, {}
        self.browser.submit(form, **typed)

    def do_wait_for_url(self, step: dict[str, Any]) -> None:
        require(step["url_contains"] in self.browser.page.url, "another address")

    def do_verify_url(self, step: dict[str, Any]) -> None:
        require(step["url"] in self.browser.page.url, "another address")

    def do_verify_text(self, step: dict[str, Any]) -> None:
        require(step["text"] in self.browser.page.html, "text not found")

    def do_verify_no_errors(self, _step: dict[str, Any]) -> None:
        require(not self.document.select(".alert-error"), "an error is shown")

    def do_check_element(self, step: dict[str, Any]) -> None:
        require(bool(self.document.select(step["selector"])) == step["should_exist"], "element")

    def do_screenshot(self, step: dict[str, Any]) -> None:
        assert re.fullmatch(r"[\w-]+\.png", step["filename"])

    def do_verify(self, step: dict[str, Any]) -> None:
        kind = step["verify_type"]
        if kind == "page_title":
            require(step["title"] in self.document.one("title").text(), "another title")
        elif kind == "element_count":
            require(len(self.document.select(step["selector"])) == step["count"], "another count")
        elif kind == "element_text":
            require(step["text"] in self.element(step).text(), "another text")
        else:
            assert kind == "element_visible"
            self.element(step)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "failing_step"), [("login", None), ("wrong_password", 5), ("add_task", None)]
)
def test_flow(browser: Browser, name: str, failing_step: int | None) -> None:
    assert FlowRunner(browser).run(flow_named(name)["steps"]) == failing_step


@pytest.mark.long
def test_the_wrong_password_flow_fails_where_it_says(browser: Browser) -> None:
    flow = flow_named("wrong_password")
    assert FlowRunner(browser).run(flow["steps"]) == 5
    assert "fifth step" in flow["description"]
    shown = browser.page.document.one("[role='alert']").text()
    assert shown in flow["description"]


@pytest.mark.long
def test_the_add_task_flow_adds_its_task(browser: Browser, database: Database) -> None:
    flow = flow_named("add_task")
    (title,) = [step["value"] for step in flow["steps"] if "name='title'" in step.get("selector", "")]
    count = f"SELECT count(*) FROM tasks WHERE project_id = 1 AND title = '{title}'"
    before = database.value(count)
    FlowRunner(browser).run(flow["steps"])
    assert database.value(count) == before + 1


# ---------------------------------------------------------------------------
# the Plato and Compose files
# ---------------------------------------------------------------------------

DATASETS = load("plato-config.yml")["datasets"]
# The keys that the API's models name.
COMPUTE_LIMITS = {
    "cpus": (1, 8),
    "memory": (512, 16384),
    "disk": (1024, 204800),
    "app_port": (0, 65535),
    "plato_messaging_port": (0, 65535),
}
METADATA_KEYS = {
    "favicon",
    "name",
    "description",
    "source_code_url",
    "start_url",
    "license",
    "variables",
    "flows_path",
}
SERVICE_KEYS = {"type", "file", "required_healthy_containers", "healthy_wait_timeout"}
LISTENER_KEYS = {
    "type",
    "db_type",
    "db_host",
    "db_port",
    "db_user",
    "db_password",
    "db_database",
    "db_schema",
    "seed_data_paths",
    "truncate_tables",
    "audit_ignore_tables",
}


def compose_services(name: str) -> dict[str, dict[str, Any]]:
    """The services of a Compose file, those that extend another file's joined with it as Compose does."""
    services: dict[str, dict[str, Any]] = {}
    for service_name, service in load(name)["services"].items():
        base: dict[str, Any] = {}
        if "extends" in service:
            base = compose_services(service["extends"]["file"])[service["extends"]["service"]]
        environment = {**base.get("environment", {}), **service.get("environment", {})}
        services[service_name] = {**base, **service, "environment": environment}
    return services


def published_ports(service: dict[str, Any]) -> list[tuple[int, int]]:
    """(port of the VM, port of the container), with the variables at their defaults."""
    plain = (re.sub(r"\$\{\w+:-(\w+)\}", r"\1", str(port)) for port in service["ports"])
    return [(int(host), int(container)) for host, container in (port.split(":") for port in plain)]


def dockerfile(service: dict[str, Any]) -> list[tuple[str, str]]:
    """The instructions of a service's Dockerfile and their arguments."""
    text = (SIMULATOR / service["build"] / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    split = (line.split(None, 1) for line in lines if line.strip())
    return [(instruction, arguments) for instruction, arguments in split]


def container_command(service: str) -> list[str]:
    instructions = dockerfile(load("docker-compose.yml")["services"][service])
    (command,) = [text for name, text in instructions if name == "CMD"]
    return list(json.loads(command))


def test_the_config_names_what_the_api_knows() -> None:
    config = load("plato-config.yml")
    assert set(config) == {"service", "datasets"}
    assert config["service"] == "taskboard"
    assert set(DATASETS) == {"base", "empty"}
    assert "sessions" in DATASETS["base"]["listeners"]["db"]["audit_ignore_tables"]


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS.keys())
class TestDataset:
    def test_values_are_within_the_limits(self, dataset: dict[str, Any]) -> None:
        assert set(dataset["compute"]) == set(COMPUTE_LIMITS)
        for key, value in dataset["compute"].items():
            low, high = COMPUTE_LIMITS[key]
            assert isinstance(value, int)
            assert low <= value <= high
        assert set(dataset["metadata"]) <= METADATA_KEYS
        service = dataset["services"]["main"]
        assert set(service) == SERVICE_KEYS
        assert service["type"] == "docker-compose"
        assert 30 <= service["healthy_wait_timeout"] <= 1800
        listener = dataset["listeners"]["db"]
        assert set(listener) == LISTENER_KEYS
        assert (listener["type"], listener["db_type"]) == ("db", "postgresql")

    def test_files_exist(self, dataset: dict[str, Any]) -> None:
        names = [dataset["metadata"]["flows_path"], dataset["services"]["main"]["file"]]
        for name in names + dataset["listeners"]["db"]["seed_data_paths"]:
            assert (SIMULATOR / name).is_file(), name

    def test_ports_and_credentials_are_those_of_compose(self, dataset: dict[str, Any]) -> None:
        services = compose_services(dataset["services"]["main"]["file"])
        listener = dataset["listeners"]["db"]
        environment = services["db"]["environment"]
        app_port = dataset["compute"]["app_port"]
        assert published_ports(services["app"]) == [(app_port, app_port)]
        assert published_ports(services["db"]) == [(listener["db_port"], 5432)]
        assert (listener["db_user"], listener["db_password"], listener["db_database"]) == (
            environment["PGUSER"],
            environment["PGPASSWORD"],
            environment["PGDATABASE"],
        )
        assert services["app"]["environment"]["PGHOST"] in services
        for key in ("PGUSER", "PGPASSWORD", "PGDATABASE"):
            assert services["app"]["environment"][key] == environment[key]

    def test_services_wait_for_healthy_ones(self, dataset: dict[str, Any]) -> None:
        main = dataset["services"]["main"]
        services = compose_services(main["file"])
        assert set(main["required_healthy_containers"]) == set(services) == {"db", "app"}
        assert services["app"]["depends_on"] == {"db": {"condition": "service_healthy"}}
        assert services["db"]["healthcheck"]["test"] == ["CMD", "pg_isready", "--quiet"]
        *command, program = services["app"]["healthcheck"]["test"]
        assert command == ["CMD", "python3", "-c"]
        ast.parse(program)
        assert f"http://127.0.0.1:{dataset['compute']['app_port']}/health" in program

    def test_the_database_is_in_a_declared_volume(self, dataset: dict[str, Any]) -> None:
        name = dataset["services"]["main"]["file"]
        service = compose_services(name)["db"]
        (mount,) = service["volumes"]
        volume, directory = mount.split(":")
        assert volume in load(name)["volumes"]
        environment = " ".join(text for instruction, text in dockerfile(service) if instruction == "ENV")
        assert f"PGDATA={directory}/" in environment

    def test_seeds_are_those_of_the_container(self, dataset: dict[str, Any]) -> None:
        seeds = compose_services(dataset["services"]["main"]["file"])["db"]["environment"]["TASKBOARD_SEED"]
        paths = [f"db/seed/{name}.sql" for name in seeds.split()]
        assert dataset["listeners"]["db"]["seed_data_paths"] == paths

    def test_images_are_built_from_files_that_exist(self, dataset: dict[str, Any]) -> None:
        for service in compose_services(dataset["services"]["main"]["file"]).values():
            instructions = dockerfile(service)
            assert "image" not in service
            assert instructions[0] == ("FROM", "debian:bookworm-slim")
            assert [name for name, _ in instructions].count("FROM") == 1
            copied = [text.split()[:-1] for instruction, text in instructions if instruction == "COPY"]
            assert copied
            for name in [name for names in copied for name in names]:
                assert (SIMULATOR / service["build"] / name).exists(), name
            exposed = [int(text) for instruction, text in instructions if instruction == "EXPOSE"]
            assert exposed == [container for _host, container in published_ports(service)]

    @pytest.mark.long
    def test_the_variables_log_in(self, dataset: dict[str, Any], browser: Browser) -> None:
        variables = {item["name"]: item["value"] for item in dataset["metadata"]["variables"]}
        assert browser.log_in(variables["username"], variables["wrong_password"]).path == "/login"
        assert browser.log_in(variables["username"], variables["password"]).path == "/board"

    def test_tables_of_the_listener_exist(self, dataset: dict[str, Any], database: Database) -> None:
        listener = dataset["listeners"]["db"]
        rows = database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        tables = {row[0] for row in rows}
        assert listener["db_schema"] == "public"
        assert set(listener["audit_ignore_tables"]) <= tables


def test_gunicorn_is_given_a_factory_that_exists() -> None:
    module, call = container_command("app")[-1].split(":")
    tree = ast.parse((SIMULATOR / "app" / f"{module}.py").read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert call.endswith("()")
    assert call[:-2] in functions


def test_the_start_script_is_a_valid_shell_script() -> None:
    script = SIMULATOR / "db" / "start.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert container_command("db") == ["sh", "start.sh"]
