"""audit-ui from outside: the command and its processes, and the page in a real browser.

The sandbox is the example simulator's, with PostgreSQL and the worker in the VM; the application runs here
and reaches its database through the gateway, as the page does.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, SIMULATOR, Desk, altered, ending, eventually, missing, part, processes_of
from localplato import LocalPlato
from test_local_worker import AS_PLATO, has_namespaces, has_postgresql
from test_simulator import Browser as Person
from test_simulator import address, start_app

from plato_sandbox import Database, DatabaseError, NetworkError, Sandbox, Tunnel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = "audit_ignore_tables"
SERVE = ("audit-ui", "--no-browser")
UP_SECONDS = 60.0
TICKS_AT, ROW_HEIGHT = 56, 35  # pixels in the grid, in a window of this width
RUN_DATABASE = """
cd /home/plato && cp -r worktree/taskboard/db files || exit
export PATH=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1):$PATH
export PGUSER=taskboard PGPASSWORD=taskboard PGDATABASE=taskboard PGDATA=/home/plato/cluster
export TASKBOARD_LISTEN=127.0.0.1
setsid sh files/start.sh >database.log 2>&1 </dev/null &
for i in $(seq 600); do
    psql -h 127.0.0.1 -c 'SELECT 1' >/dev/null 2>&1 && exit; sleep 0.1
done
tail database.log; exit 1
"""


@pytest.fixture(autouse=True, scope="module")
def _packages() -> None:
    for name in ("streamlit", "psycopg2"):
        try:
            __import__(name)
        except ImportError:
            missing(f"{name} is not installed; it is in the test group of pyproject.toml")


def audit_processes(desk: Desk) -> list[int]:
    """The pids of the processes that serve a desk's pages, or were begun by them."""
    commands = processes_of(desk).items()
    return [pid for pid, command in commands if b"audit-ui" in command or b"streamlit" in command]


class Serving:
    """`audit-ui` under way."""

    def __init__(self, desk: Desk, *arguments: str, **options: Any) -> None:
        self.desk = desk
        self.process = desk.begin(*SERVE, *arguments, **options)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if "http://" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(self.lines))
        if found is None:
            pytest.fail(f"no address: {self.lines} {ending(self.process)}")
        self.url, self.port = found[0], int(found[1])

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def end(self, number: int = signal.SIGINT) -> Any:
        self.process.send_signal(number)
        return ending(self.process)


def nothing_serves(desk: Desk, port: int) -> None:
    """No process of the page is left, and nothing listens on its port."""
    eventually(lambda: not audit_processes(desk))
    eventually(lambda: not listens(port))


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


# The command, without a look at the page


# With --direct the databases are looked for here; that nothing is there, only the page would notice.


def test_the_address_is_printed_and_ctrl_c_ends_it_in_order(desk: Desk) -> None:
    serving = Serving(desk, "--direct")
    assert "".join(serving.lines) == f"The page is at {serving.url} (Ctrl-C ends it)\n"
    assert serving.get("/_stcore/health") == b"ok"
    assert b"streamlit" in serving.get("/").lower()
    assert audit_processes(desk)
    result = serving.end()
    assert (result.code, result.out) == (0, "")
    nothing_serves(desk, serving.port)


def test_it_listens_on_loopback_only(desk: Desk) -> None:
    serving = Serving(desk, "--direct")
    listening = [
        line.split()[1]
        for name in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(name).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{serving.port:04X}")
    ]
    assert listening == [f"0100007F:{serving.port:04X}"]


@pytest.mark.long
def test_json_is_one_document_at_the_start(desk: Desk) -> None:
    process = desk.begin("audit-ui", "--direct", "--json")
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    document = json.loads(text)
    assert document == {
        "url": f"http://127.0.0.1:{document['port']}",
        "port": document["port"],
        "listeners": ["db"],
        "config": str(desk.work / "plato-config.yml"),
    }
    process.send_signal(signal.SIGINT)
    result = ending(process)
    assert (result.code, result.out) == (0, "")
    nothing_serves(desk, document["port"])


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(desk: Desk, number: int) -> None:
    serving = Serving(desk, "--direct")
    result = serving.end(number)
    assert result.code == (-9 if number == signal.SIGKILL else 128 + number)
    assert ("Error: Interrupted." in result.err) is (number != signal.SIGKILL)
    nothing_serves(desk, serving.port)


def test_it_ends_on_a_terminal_in_the_middle_of_a_look(desk: Desk) -> None:
    """A database that accepts and says nothing holds up neither the page nor its end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with_listeners(desk, db={"type": "db", "db_type": "postgresql", "db_port": port, "db_database": "x"})
        process, master = desk.begin_on_terminal(*SERVE, "--direct")
        shown = b""
        while b"Ctrl-C ends it" not in shown:
            shown += os.read(master, 4096)
        os.write(master, b"\x03")
        assert process.wait(UP_SECONDS) == 0
        os.close(master)
    eventually(lambda: not audit_processes(desk))


@pytest.mark.long
def test_a_port_in_use_leads_to_another_one(desk: Desk) -> None:
    first = Serving(desk, "--direct")
    second = Serving(desk, "--direct", "--port", str(first.port))
    assert first.port != second.port
    assert second.get("/_stcore/health") == b"ok"
    assert desk.run(*SERVE, "--direct", "--port", "70000").code == 2


@pytest.mark.long
def test_the_browser_is_opened_where_there_is_a_screen(desk: Desk) -> None:
    programs = desk.place / "programs"
    programs.mkdir()
    opener = programs / ("open" if sys.platform == "darwin" else "xdg-open")
    opener.write_text(f'#!/bin/sh\necho noise; echo "$1" > {desk.place}/opened.part\n'
                      f"mv {desk.place}/opened.part {desk.place}/opened\n")  # fmt: skip
    opener.chmod(0o755)
    screen = {"PATH": f"{programs}:{os.environ['PATH']}", "DISPLAY": ":9"}
    process = desk.begin("audit-ui", "--direct", environment=screen)
    opened = desk.place / "opened"
    eventually(opened.exists, UP_SECONDS)
    process.send_signal(signal.SIGINT)
    assert f"at {opened.read_text().strip()} (" in ending(process).out
    opened.unlink()
    for arguments, environment in ((("--no-browser",), screen), ((), {**screen, "DISPLAY": ""})):
        quiet = desk.begin("audit-ui", "--direct", *arguments, environment=environment)
        assert quiet.stdout is not None
        assert "http://" in quiet.stdout.readline()
        quiet.send_signal(signal.SIGINT)
        ending(quiet)
        assert not opened.exists()


# Bad input


def with_listeners(desk: Desk, **listeners: Any) -> None:
    config = {"service": "shop", "datasets": {"base": {"compute": {}, "listeners": listeners}}}
    (desk.work / "plato-config.yml").write_text(yaml.safe_dump(config))


def test_without_a_sandbox(desk: Desk) -> None:
    assert desk.run(*SERVE, "--json").error["code"] == "no_sandbox"


def test_a_dataset_without_databases(desk: Desk) -> None:
    with_listeners(desk, files={"type": "file", "target_dir": "/data"})
    result = desk.run(*SERVE, "--direct")
    assert result.code == 8
    assert "no `db` listener" in result.err


def test_a_listener_that_is_not_there(desk: Desk) -> None:
    result = desk.run(*SERVE, "--direct", "--listener", "nope")
    assert result.code == 2
    assert "'nope'" in result.err
    assert "db" in result.err
    assert desk.run(*SERVE, "--direct", "-d", "nope").code == 2


@pytest.mark.parametrize("gone", ["streamlit", "psycopg2", "pymysql"])
def test_a_missing_package_is_one_line_with_the_command(desk: Desk, gone: str) -> None:
    kind = "mysql" if gone == "pymysql" else "postgresql"
    with_listeners(desk, db={"type": "db", "db_type": kind, "db_database": "x"})
    code = f"import sys; sys.modules[{gone!r}] = None"
    result = desk.run(command=altered(code, *SERVE, "--direct"))
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if "needs" in line]
    assert f"{sys.executable} -m pip install streamlit psycopg2-binary pymysql" in line
    assert f"needs {gone}" in line
    assert result.out == ""


def test_a_sandbox_whose_gateway_is_down(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "-c")
    plato.fault("gateway_down", times=-1)
    result = desk.run(*SERVE)
    assert result.code == 6
    (line,) = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert desk.environment["PLATO_GATEWAY_HOST"] in line
    assert result.out == ""
    assert audit_processes(desk) == []


def empty_database(path: Path) -> str:
    """The address of a new file of SQLite."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (a TEXT)")
    connection.close()
    return f"sqlite:///{path}"


@pytest.mark.long
def test_a_database_url_needs_neither_sandbox_nor_config(desk: Desk) -> None:
    (desk.work / "plato-config.yml").unlink()
    serving = Serving(desk, "--database-url", empty_database(desk.work / "data.db"))
    assert serving.end().code == 0
    result = desk.run(*SERVE, "--database-url", "nonsense")
    assert result.code == 2


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:////no/data.db", "there is no file /no/data.db"),
        ("postgresql://me@no.such.host.invalid/x", "no.such.host.invalid"),
        ("mysql://me@127.0.0.1:1/x", "refused"),
        ("postgresql://me@127.0.0.1:1/x?sslmode=require", "refused"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_before_the_page_opens(
    desk: Desk, url: str, words: str
) -> None:
    (desk.work / "plato-config.yml").unlink()
    error = desk.run(*SERVE, "--json", "--database-url", url).error
    assert error["code"] == "database"
    assert words in error["message"]


@pytest.mark.long
def test_a_database_url_goes_with_the_rules_of_the_config_that_is_here(desk: Desk) -> None:
    address_of_it = ("--database-url", empty_database(desk.work / "data.db"))
    process = desk.begin(*SERVE, "--json", *address_of_it)
    assert process.stdout is not None
    document = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
    assert document["listeners"] == ["db"]
    assert document["config"] == str(desk.work / "plato-config.yml")
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 0
    listener = {"type": "db", "db_type": "sqlite", "db_database": "data.db"}
    with_listeners(desk, one=listener, two=listener)
    several = desk.run(*SERVE, *address_of_it)
    assert several.code == 2
    assert "--listener one or --listener two" in several.err


def test_a_password_in_an_address_is_warned_about_and_not_repeated(desk: Desk) -> None:
    result = desk.run(*SERVE, "--verbose", "--database-url", "postgresql://me:hunter2@127.0.0.1:1/x")
    assert result.code == 1
    assert "PGPASSWORD" in result.err
    assert "Warning" in result.err
    assert "hunter2" not in result.err + result.out


# With a sandbox


class Scene:
    """The example simulator in a sandbox, its database and worker running."""

    def __init__(self, desk: Desk, plato: LocalPlato) -> None:
        self.desk = desk
        self.plato = plato
        self.settings = desk.settings
        sandbox = Sandbox(str(desk.work), settings=self.settings)
        sandbox.load()
        self.tunnel = Tunnel(sandbox, "db", 5432)

    @property
    def config(self) -> Path:
        return self.desk.work / "plato-config.yml"

    @property
    def rules(self) -> Any:
        config = yaml.safe_load(self.config.read_text())
        return config["datasets"]["base"]["listeners"]["db"][KEY]

    def begin_anew(self) -> None:
        """The example's config, a worker with its rules, and a database without changes."""
        shutil.copy(SIMULATOR / "plato-config.yml", self.config)
        self.restart()

    def restart(self) -> None:
        self.desk.good("start-worker", "--wait")
        self.desk.good("reset")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Scene]:
    has_postgresql()
    place = tmp_path_factory.mktemp("stage")
    with LocalPlato(place / "plato", ca_from=certificates) as plato:
        has_namespaces(plato)
        desk = Desk(place / "desk", {**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "60"})
        shutil.rmtree(desk.work)
        shutil.copytree(SIMULATOR, desk.work)
        desk.good("start", "-c")
        desk.good("sync")
        made = desk.ssh(f"{AS_PLATO} sh -c {shlex.quote(RUN_DATABASE)}")
        assert made.code == 0, made
        yield Scene(desk, plato)
        desk.clear()


@pytest.fixture
def scene(stage: Scene) -> Scene:
    stage.begin_anew()
    return stage


@pytest.fixture
def person(scene: Scene) -> Iterator[Person]:
    """Someone at the application, which is here and has its database in the VM."""
    service = start_app(scene.tunnel.port)
    try:
        yield Person(address(service))
    finally:
        service.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = part("chromium", "chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed; it is in the test group of pyproject.toml")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The page in a browser, and every address that the browser asked for."""

    def __init__(self, chromium: Any, url: str) -> None:
        self.browser = chromium.new_context()
        self.tab = self.browser.new_page()
        self.tab.set_default_timeout(40_000)
        self.asked: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(url)
        self.heading("Ignore rules").wait_for()
        self.tab.get_by_test_id("stDataFrame").first.wait_for()

    def heading(self, name: str) -> Any:
        return self.tab.get_by_role("heading", name=name, exact=True)

    def tick(self, *places: tuple[str, str]) -> None:
        """Tick rows of the grid: it is a picture, and a table for readers of screens."""
        for place in places:
            self.settle()
            grid = self.tab.get_by_test_id("stDataFrame").first
            grid.evaluate("grid => grid.scrollIntoView()")
            rows, told, number = eventually(functools.partial(self._row, grid, place))
            corner = grid.bounding_box()
            self.tab.mouse.click(corner["x"] + TICKS_AT, corner["y"] + (number + 1.5) * ROW_HEIGHT)
            box = rows[number].locator("td").first
            box.filter(has_not_text=told[number][0]).wait_for(state="attached")

    @staticmethod
    def _row(grid: Any, place: tuple[str, str]) -> tuple[Any, list[list[str]], int] | None:
        """The rows of the grid, their cells, and the number of a place's row; None until it is there."""
        rows = grid.locator("tbody tr").all()
        told = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
        found = [number for number, cells in enumerate(told) if tuple(cells[1:3]) == place]
        return (rows, told, found[0]) if found else None

    def settle(self) -> None:
        """Wait until nothing of the page is being drawn."""
        self.tab.locator('[data-test-script-state="notRunning"]').wait_for()

    def click(self, label: str) -> None:
        self.tab.get_by_role("button", name=label, exact=True).click()

    def see(self, words: str) -> None:
        self.tab.get_by_text(words).first.wait_for()

    @property
    def outside(self) -> list[str]:
        """Addresses of other machines."""
        own = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
        return [url for url in self.asked if not url.startswith(own)]

    def close(self) -> None:
        self.browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[[str], Page]]:
    pages: list[Page] = []

    def open_it(url: str) -> Page:
        pages.append(Page(chromium, url))
        return pages[-1]

    yield open_it
    for page in pages:
        page.close()


@pytest.fixture
def serving(scene: Scene) -> Iterator[Serving]:
    """audit-ui for the scene's sandbox, with a trap for whatever would go to another machine."""
    trapped: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:

        def catch() -> None:
            while True:
                try:
                    trapped.append(trap.accept()[0])
                except OSError:
                    return

        threading.Thread(target=catch, daemon=True).start()
        proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
        environment = dict.fromkeys(names, proxy)
        own = f"{scene.settings.gateway_host},127.0.0.1,localhost"
        environment.update(NO_PROXY=own, no_proxy=own)
        serving = Serving(scene.desk, environment=environment)
        yield serving
        assert serving.end().code == 0
        nothing_serves(scene.desk, serving.port)
        trap.shutdown(socket.SHUT_RDWR)
    assert trapped == []


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_login_is_noise_after_two_clicks(
    scene: Scene, person: Person, serving: Serving, open_page: Callable[[str], Page]
) -> None:
    """The whole job: what a login changes, two rules, saved; the next login changes nothing."""
    desk = scene.desk
    person.log_in()
    refused = desk.run("state", "-v")
    assert refused.code == 8
    assert "users (1 updated)" in refused.err
    assert "activity (1 inserted)" in refused.err

    page = open_page(serving.url)
    page.tick(("users", "login_count"), ("users", "last_login_at"), ("activity", "(whole table)"))
    page.see("The rules hide every change")
    assert scene.rules == ["sessions"]
    page.click("Save to plato-config.yml")
    page.see("Saved.")
    assert scene.rules == [
        "sessions",
        "activity",
        {"table": "users", "columns": ["last_login_at", "login_count"]},
    ]
    before = (SIMULATOR / "plato-config.yml").read_text().splitlines()
    assert [line for line in scene.config.read_text().splitlines() if line in before] == before
    assert page.outside == []

    scene.restart()
    person.cookies.clear()
    person.log_in()
    passed = desk.good("state", "-v")
    assert "No mutations" in passed.out


@pytest.mark.long
@pytest.mark.timeout(400)
def test_recording_and_looking_into_tables(
    scene: Scene, person: Person, serving: Serving, open_page: Callable[[str], Page]
) -> None:
    person.log_in()
    page = open_page(serving.url)
    page.click("Record")
    page.see("Recording.")
    person.add_task("Water the plants")
    page.click("Stop and show what happened")
    page.see("Only what happened during the recording")
    page.tab.get_by_text("Water the plants").first.wait_for(state="attached")
    page.click("Look again")
    page.tab.get_by_text("Only what happened during the recording").wait_for(state="detached")

    look = page.tab.get_by_role("combobox", name="Look into a table")
    look.press("ArrowDown")
    look.press_sequentially("tasks")
    page.tab.get_by_role("option", name="tasks").wait_for()
    look.press("Enter")
    page.tab.get_by_test_id("stDataFrame").nth(1).get_by_text("Water the plants").wait_for(state="attached")
    search = page.tab.get_by_role("textbox", name="Search")
    search.fill("token_hash")
    search.press("Enter")
    page.tab.get_by_role("button", name="Ignore 1 column").wait_for()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_people_look_at_the_same_time(
    scene: Scene, person: Person, serving: Serving, open_page: Callable[[str], Page]
) -> None:
    """Each has choices of their own; the file that one has saved is not overwritten by the other."""
    person.log_in()
    first, second = open_page(serving.url), open_page(serving.url)
    first.tick(("users", "(whole table)"))
    second.tick(("activity", "(whole table)"))
    first.click("Save to plato-config.yml")
    first.see("Saved.")
    second.click("Save to plato-config.yml")
    second.see("was changed by something else")
    assert scene.rules == ["sessions", "users"]
    second.click("Look again")
    second.tab.get_by_text("was changed by something else").wait_for(state="detached")
    second.click("Save to plato-config.yml")
    second.see("Saved.")
    assert scene.rules == ["sessions", "users", "activity"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_troubles_are_told_on_the_page(scene: Scene, open_page: Callable[[str], Page]) -> None:
    """A wrong password, and a database that does not answer: in words, beside what still works."""
    text = scene.config.read_text()
    scene.config.write_text(text.replace("db_password: taskboard", "db_password: not-the-word"))
    serving = Serving(scene.desk)
    page = open_page(serving.url)
    page.see("password authentication failed")
    assert "not-the-word" not in page.tab.content()
    serving.end()
    scene.config.write_text(text.replace("db_port: 5432", "db_port: 5999"))
    serving = Serving(scene.desk)
    page = open_page(serving.url)
    page.see("it does not answer on port 5999 of the VM")
    serving.end()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_no_password_is_anywhere_but_in_the_config(scene: Scene, open_page: Callable[[str], Page]) -> None:
    word = "taskboard-word-of-its-own"
    alter_password(scene, "taskboard", word)
    try:
        text = scene.config.read_text().replace("db_password: taskboard", f"db_password: {word}")
        scene.config.write_text(text)
        serving = Serving(scene.desk, "--verbose")
        page = open_page(serving.url)
        page.tick(("sessions", "(whole table)"))
        page.see("Save to plato-config.yml")
        seen = page.tab.content() + page.tab.inner_text("body") + page.tab.url
        pids = [serving.process.pid, *audit_processes(scene.desk)]
        files = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
        held = b"".join(path.read_bytes() for path in files)
        result = serving.end()
        printed = "".join([*serving.lines, result.out, result.err])
        for told in (seen, held.decode("utf-8", "replace"), printed):
            assert word not in told
        for path in scene.desk.home.rglob("*"):
            assert not path.is_file() or word.encode() not in path.read_bytes(), path
    finally:
        alter_password(scene, word, "taskboard")


def alter_password(scene: Scene, old: str, new: str) -> None:
    statement = f"ALTER USER taskboard PASSWORD '{new}'"
    made = scene.desk.ssh(f'PGPASSWORD={old} psql -h 127.0.0.1 -U taskboard -c "{statement}"')
    assert made.code == 0, made


def reader_of(scene: Scene, **changes: str) -> Database:
    """audit-ui's way to the database; changes: in the record of the sandbox."""
    config = yaml.safe_load(scene.config.read_text())
    sandbox = Sandbox(str(scene.desk.work), settings=scene.settings)
    sandbox.load()
    sandbox.state.update(changes)
    return Database("db", config["datasets"]["base"]["listeners"]["db"], sandbox)


# Tunnels and SQLite on the VM


# Python's ssl leaves the socket of a connection that is reset before its handshake to the garbage collector.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tunnel_says_why_it_cannot_open(scene: Scene) -> None:
    reader = reader_of(scene)
    scene.plato.fault("gateway_down", times=-1)
    try:
        with pytest.raises(NetworkError, match=re.escape(scene.settings.gateway_host)):
            reader.tables()
    finally:
        scene.plato.clear_faults()
    assert len(reader.tables()) == 5
    with pytest.raises(NetworkError, match="no-such-job"):
        reader_of(scene, job_id="no-such-job").tables()


@pytest.mark.long
def test_a_tunnel_carries_many_connections_and_ends_with_them(scene: Scene) -> None:
    scene.desk.hang_up()
    reader = reader_of(scene)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(reader.tables()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 8
    eventually(lambda: scene.plato.gateway()["open"] == 0)


@pytest.mark.long
def test_a_connection_that_is_cut_is_an_error_and_not_a_wait(scene: Scene) -> None:
    reader = reader_of(scene)
    scene.plato.fault("gateway_reset", after_bytes=1500, times=1)
    try:
        with pytest.raises(DatabaseError, match="closed"):
            reader.tables()
    finally:
        scene.plato.clear_faults()
    assert len(reader.tables()) == 5


@pytest.mark.long
def test_a_file_of_sqlite_on_the_vm(desk: Desk) -> None:
    """Read by the VM's own Python over SSH: an absolute path, and one in the worktree."""
    part("ssh", "openssh-client")
    desk.good(*BLANK)
    program = (
        "import os, sqlite3; os.makedirs('/home/plato/worktree/myapp'); "
        "c = sqlite3.connect('/home/plato/worktree/myapp/it is.db'); "
        "c.execute('CREATE TABLE \\\"odd ''name\\\" (id INTEGER PRIMARY KEY, a TEXT)'); "
        "c.execute('INSERT INTO \\\"odd ''name\\\" VALUES (3, \\\"x\\\")'); c.commit()"
    ).replace("''", "it")
    made = desk.ssh(f'python3 -c "{program}"')
    assert made.code == 0, made
    sandbox = Sandbox(str(desk.work), settings=desk.settings)
    sandbox.load()
    for path in ("/home/plato/worktree/myapp/it is.db", "it is.db"):
        reader = Database("file", {"db_type": "sqlite", "db_database": path}, sandbox)
        ((name, table),) = reader.tables().items()
        assert name == "odd itname"
        assert [row[2:4] for row in table] == [["id", "INTEGER"], ["a", "TEXT"]]
        assert reader.examples(table) == {"id": ("3",), "a": ("x",)}
    with pytest.raises(DatabaseError, match=r"there is no file /no\.db"):
        Database("file", {"db_type": "sqlite", "db_database": "/no.db"}, sandbox).tables()
