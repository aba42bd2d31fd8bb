"""Canaries in place of every secret: no command, however it ends, lets one be found where it need not be."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from conftest import Desk, Result, eventually, part
from localplato import LocalPlato
from test_flow import browser, texts_below
from test_flow import flow as flow_of
from test_flow import step as step_of
from test_services import IDLE, TRACES

import plato_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLOW_PASSWORD = "flow-Canary&7<1> x"
DATABASE_PASSWORD = f"database-Canary-{secrets.token_hex(4)}"
URL_PASSWORD = f"url-Canary-{secrets.token_hex(4)}"
WRITTEN_BY_THE_USER = ("plato-config.yml", "flows.yml")  # these hold their secrets themselves
FAILING_STATUSES = (401, 409, 500)


class Stage(NamedTuple):
    """A desk whose every secret is a canary. canaries: its bytes by what it is."""

    desk: Desk
    plato: LocalPlato
    canaries: dict[str, bytes]

    @property
    def vms(self) -> list[Path]:
        return [Path(machine["directory"]) for machine in self.plato.machines() if machine["alive"]]


def config_with_canaries(work: Path) -> None:
    path = work / "plato-config.yml"
    config = yaml.safe_load(path.read_text())
    dataset = config["datasets"]["base"]
    dataset["listeners"]["db"]["db_password"] = DATABASE_PASSWORD
    dataset["services"]["main"]["required_healthy_containers"] = []
    config["datasets"] = {"base": dataset}
    path.write_text(yaml.safe_dump(config))
    (work / "docker-compose.yml").write_text(IDLE)
    login = [
        step_of("navigate", url="/login"),
        step_of("fill", selector="#password", value=FLOW_PASSWORD, description=f"Type {FLOW_PASSWORD}"),
        step_of("click", selector="#go"),
        step_of("navigate", url=f"/login?{FLOW_PASSWORD}"),
    ]
    missed = [*login, step_of("wait_for_selector", selector="#no", timeout=100)]
    text = json.dumps({"flows": [flow_of("login", *login), flow_of("missed", *missed)]})
    (work / "flows.yml").write_text(text)


@pytest.fixture
def stage(tmp_path: Path, plato: LocalPlato, desk: Desk) -> Stage:
    part("git", "git")
    stored = json.loads((plato.home / "hub" / "credentials.json").read_text())
    shutil.rmtree(desk.work)
    shutil.copytree(Path(__file__).parent / "simulator", desk.work)
    config_with_canaries(desk.work)
    canaries = {
        "the key": desk.environment["PLATO_API_KEY"].encode(),
        "Gitea's password": stored["password"][-16:].encode(),
        "Gitea's user": urllib.parse.quote(stored["username"]).encode(),
        "the database's password": DATABASE_PASSWORD.encode(),
        "the password of an address": URL_PASSWORD.encode(),
    }
    for number, spelling in enumerate(sorted(plato_sandbox.spellings(FLOW_PASSWORD))):
        canaries[f"the flow's password ({number})"] = spelling.encode()
    assert all(len(canary) >= 8 for canary in canaries.values())
    return Stage(desk, plato, canaries)


class Watch:
    """Looks at the command lines and environments of all processes, VMs and all, as often as it can."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seen: set[tuple[bytes, str]] = set()  # a command line, and a canary or "" beside it
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def __enter__(self) -> Watch:  # noqa: PYI034 - Self is not in Python 3.9
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.over.is_set():
            for name in os.listdir("/proc"):
                if name.isdigit():
                    with contextlib.suppress(OSError):
                        self.look(name)
            self.over.wait(0.002)

    def look(self, pid: str) -> None:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if Path(f"/proc/{pid}/cmdline").read_bytes() != line:
            return  # between fork and exec a child still has what its parent has
        self.seen.add((line, ""))
        for what, canary in self.stage.canaries.items():
            if canary in line:
                self.seen.add((line, f"{what} in a command line"))
            if canary in environment and self.is_ours(environment, what):
                self.seen.add((line, what))

    def is_ours(self, environment: bytes, what: str) -> bool:
        """Whether a process is of the desk or of its SSH, and not one of the local Plato's own worker."""
        home = os.fsencode(f"HOME={self.stage.desk.home}") + b"\0"
        return what != "the database's password" or home in environment or b"SSH_CONNECTION=" in environment

    def unneeded(self) -> set[tuple[bytes, str]]:
        """Where a canary was found that has no business there."""
        return {(line, what) for line, what in self.seen if what and not needs(line.split(b"\0"), what)}


# The environment of these holds a secret because they use it: git and what it starts while it talks to
# Gitea, and clients of databases, those of the local Plato's worker among them.
USERS = {
    "Gitea's password": [b"ls-remote", b"push", b"fetch", b"git-core/", b"GITEA_PASSWORD"],
    "the database's password": [b"psql", b"pg_dump", b"pg_restore", b"mariadb", b"mysql"],
}


def needs(words: list[bytes], what: str) -> bool:
    """Whether a process uses a secret; the command itself is given all of them by the tests."""
    own = any(word.endswith(b"/plato_sandbox.py") for word in words)
    if own and "command line" not in what:
        return not {b"heartbeat-child", b"gateway-stream"} & set(words)
    what = "Gitea's password" if what == "Gitea's user" else what
    return any(user in word for word in words for user in USERS.get(what, ()))


def nothing_told(stage: Stage, results: list[Result]) -> None:
    for what, canary in stage.canaries.items():
        for result in results:
            assert canary not in (result.out + result.err).encode(), (what, result)


def nothing_written(stage: Stage, *more: Path) -> None:
    """No file of the desk, of the VMs or elsewhere holds a canary, nor any file inside an archive."""
    files: dict[str, bytes] = {}
    for place in (stage.desk.work, stage.desk.home, *stage.vms, *more):
        for name, data in texts_below(place).items():
            if Path(name).name not in WRITTEN_BY_THE_USER and not name.startswith("docker/"):
                files[f"{place}/{name}"] = data
    assert files
    for what, canary in stage.canaries.items():
        assert [name for name, data in files.items() if canary in data] == [], what


class Login(BaseHTTPRequestHandler):
    """A page that repeats whatever it is told."""

    def do_GET(self) -> None:
        self.answer(self.path)

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def answer(self, told: str) -> None:
        body = f"<title>{told}</title><form method=post><input id=password name=p><button id=go>go</button>"
        body += f"</form><div class=error>{urllib.parse.unquote_plus(told)}</div>"
        body += f"<script>console.error({json.dumps(told)})</script>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def login_page() -> Iterator[str]:
    browser()
    with ThreadingHTTPServer(("127.0.0.1", 0), Login) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


USED = (
    *(["status"], ["status", "--json"], ["sync"], ["sync", "--via", "api"], ["start-worker"], ["state"]),
    *(
        ["reset"],
        ["clear-audit"],
        ["start-services"],
        ["start-services", "--via", "sync"],
        ["flow", "--list"],
    ),
    *(["snapshot"], ["snapshot", "--json"]),
)


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(400)
def test_no_secret_is_anywhere(
    stage: Stage, tmp_path: Path, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    """Every command at its most talkative, first as it should be, then with answers that repeat the key."""
    desk, plato = stage.desk, stage.plato
    trace = tmp_path / "trace"
    trace.mkdir()
    traced = {**TRACES, "GIT_TRACE_SETUP": str(trace / "setup"), "PGPASSWORD": URL_PASSWORD}
    (trace / "setup").touch()
    results = []
    with Watch(stage) as watch:
        results.append(desk.good("start", "-c", "--verbose"))
        results += [desk.run(*words, "--verbose", environment=traced) for words in USED]
        key = desk.environment.pop("PLATO_API_KEY")
        seen = desk.ssh("env; cat /proc/*/environ /proc/*/cmdline; cat ~/.ssh/* ~/.*_history")
        # The local Plato's worker may be asking the database just now.
        results.append(seen._replace(out=seen.out.replace(f"PGPASSWORD={DATABASE_PASSWORD}", "")))
        desk.environment["PLATO_API_KEY"] = key
        nothing_written(stage, trace)
        for status in FAILING_STATUSES if soaking else FAILING_STATUSES[:1]:
            detail = f"said {key} and more"
            plato.fault("status", path="/api/*", status=status, body={"detail": detail}, times=-1)
            (desk.work / f"new-{status}").write_text("1")
            results += [desk.run(*words, "--verbose", environment=traced) for words in USED]
            results.append(desk.run("stop", "--verbose"))
            eventually(lambda: (desk.heartbeat_record().get("failures") or 0) > 0)
            plato.clear_faults()
        nothing_written(stage, trace)
        results.append(desk.good("stop", "--verbose"))
    assert sum(result.code == 0 for result in results) > len(USED) / 2
    assert sum("said *** and more" in result.out + result.err for result in results) > 5
    nothing_told(stage, results)
    nothing_written(stage, trace)
    lines = {line for line, _ in watch.seen}
    for word in (b"gateway-stream", b"heartbeat-child", b"remote-http"):
        assert any(word in line for line in lines), word
    assert watch.unneeded() == set()
    tally("commands with canaries for secrets", len(results))
    tally("processes looked at for secrets", len(lines))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_gitea_repeats_is_hidden(stage: Stage) -> None:
    """Gitea's own words of refusal, with the password in them as it is and as an address has it."""
    desk, plato = stage.desk, stage.plato
    stored = json.loads((plato.home / "hub" / "credentials.json").read_text())
    desk.good("start", "-c")
    results = []
    with Watch(stage) as watch:
        for path in ("*/info/refs", "*/git-receive-pack", "*/git-upload-pack"):
            for password in (stored["password"], urllib.parse.quote(stored["password"], safe="")):
                plato.fault(
                    "status",
                    path=path,
                    status=403,
                    headers={"Content-Type": "text/plain"},
                    body=f"not with {password} here",
                    times=-1,
                )
                results.append(desk.run("start-services", "--verbose"))
                plato.clear_faults()
                (desk.work / "more").write_text(path)
    assert {result.code for result in results} <= {1, 4, 6}
    nothing_told(stage, results)
    nothing_written(stage)
    assert watch.unneeded() == set()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_password_of_a_flow_is_nowhere(stage: Stage, login_page: str) -> None:
    """Neither after success nor after failure, with a trace of everything and a page that repeats it."""
    desk = stage.desk
    results = []
    with Watch(stage) as watch:
        for words in (["-f", "login"], ["-f", "missed"], ["--all", "--json"]):
            command = ["flow", *words, "--base-url", login_page, "--verbose"]
            results.append(desk.run(*command))
    assert [result.code for result in results] == [0, 8, 8]
    assert "Type ***" in results[0].out
    assert any(name.endswith("trace.trace") for name in texts_below(desk.work))
    nothing_told(stage, results)
    nothing_written(stage)
    assert any(b"remote-debugging" in line for line, _ in watch.seen)
    assert watch.unneeded() == set()


@pytest.mark.parametrize("how", ["environment", "address"])
def test_the_password_of_a_database_is_nowhere(stage: Stage, how: str) -> None:
    """One in an address can be seen in the command line of whoever writes it there, and nowhere else."""
    pytest.importorskip("streamlit")
    desk = stage.desk
    url = "postgresql://user@127.0.0.1:1/database"
    if how == "environment":
        desk.environment["PGPASSWORD"] = URL_PASSWORD
    else:
        url = url.replace("user@", f"user:{URL_PASSWORD}@")
    with Watch(stage) as watch:
        result = desk.run("audit-ui", "--no-browser", "--verbose", "--database-url", url)
    assert (result.code, result.out) == (1, "")
    nothing_told(stage, [result])
    nothing_written(stage)
    assert {what for line, what in watch.unneeded() if b"audit-ui" not in line} == set()
    assert any(b"audit-ui" in line for line, _ in watch.seen)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "words", [["status"], ["stop"], ["sync"], ["start", "-c", "--replace"]], ids=" ".join
)
def test_no_process_of_a_broken_off_command_keeps_a_secret(stage: Stage, words: list[str]) -> None:
    desk, plato = stage.desk, stage.plato
    desk.good("start", "-c")
    plato.fault("hang", path="/api/v2/sessions/*", times=-1)
    with Watch(stage) as watch:
        process = desk.begin(*words, "--verbose")
        plato.wait_for_request("GET" if words == ["status"] else "POST", "/api/v2/sessions/", count=1)
        process.terminate()
        out, err = process.communicate(timeout=60)
    plato.clear_faults()
    nothing_told(stage, [Result(process.returncode, out, err)])
    nothing_written(stage)
    assert watch.unneeded() == set()
