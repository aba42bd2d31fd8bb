"""Text, names and files of someone who means harm: a server, a VM, a repository, another user here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, Desk, part
from localplato import LocalPlato
from test_flow import browser, write_flows
from test_flow import flow as flow_of
from test_flow import step as step_of
from test_output import on_terminal
from test_ssh import play_along

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Escape sequences (colour, title, link, clipboard, reset), C1 controls, line ends of every kind, characters
# that change the direction of text, and a line that pretends to be the tool's own.
NASTY = (
    "\x1b[35mpurple\x1b]0;title\x07\x1b]8;;http://evil.test\x1b\\link\x1b]8;;\x07\x1b]52;c;aGk=\x07\x1bc"
    "\r\x9b2J\x85\u2028\u202e\u2066\x7f\nforged: line\r\nforged: line\rforged: line"
)
NASTY_NAME = NASTY.replace("/", "|")  # as the name of a file
OWN_ESCAPES = r"\r?\x1b\[K|\x1b\[(0|31|32|33)m|\r\n"  # what the tool itself sends to a terminal


def assert_harmless(text: str, *, terminal: bool = False) -> None:
    if terminal:
        text = re.sub(OWN_ESCAPES, "\n", text)
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
    assert not any(line.strip().startswith("forged: line") for line in text.splitlines()), text


HOSTILE_WORDS = (
    "x; touch CANARY;",
    "$(touch CANARY)",
    "`touch CANARY`",
    "x' ; touch CANARY ; '",
    'x" ; touch CANARY ; "',
    "x\\'; touch CANARY #",
    "x & touch CANARY #",
    "| touch CANARY",
    "${IFS}&&touch${IFS}CANARY",
    "x\ntouch CANARY\n#",
    "x\rtouch CANARY\r#",
    "-e touch CANARY",
    "--upload-pack=touch CANARY",
    "-oProxyCommand=touch CANARY",
    "*",
    "~root",
    "!!",
    "%s%n",
)


class Shower:
    """Runs commands piped, with --json and on a terminal: each must show what it is given, harmlessly.

    With `run.py -m soak` every command is run in all three ways, else in one of them, which takes turns.
    """

    turn = 0

    def __init__(self, everything: bool, tally: Callable[[str, int], None]) -> None:
        self.everything = everything
        self.tally = tally

    def __call__(
        self, desk: Desk, *words: str, say: str = "purple", environment: dict[str, str] | None = None
    ) -> None:
        Shower.turn += 1
        for way in range(3):
            if self.everything or way == Shower.turn % 3:
                self.look(desk, words, way, say, environment or {})

    def look(
        self, desk: Desk, words: tuple[str, ...], way: int, say: str, environment: dict[str, str]
    ) -> None:
        if way == 2:
            command = desk.command(*words)
            code, out, err = on_terminal(desk, command, columns=200, environment=environment)
        else:
            code, out, err = desk.run(*words, ("--verbose", "--json")[way], environment=environment)
        assert_harmless(out, terminal=way == 2)
        assert_harmless(err)
        assert say in out + err, (code, out, err)
        if way == 1:
            json.loads(out)
        assert "mistake in plato-sandbox" not in out + err
        self.tally("looks at hostile text", 1)


@pytest.fixture
def shown(soaking: bool, tally: Callable[[str, int], None]) -> Shower:
    return Shower(soaking, tally)


# ---------------------------------------------------------------------------
# what is shown
# ---------------------------------------------------------------------------

ROW = {"id": 1, NASTY: NASTY}
MUTATIONS = [
    {"table_name": NASTY, "action": "INSERT", "after": ROW},
    {"table_name": "t", "action": NASTY, "after": {NASTY: {NASTY: NASTY}}},
    {
        "table_name": NASTY,
        "action": "UPDATE",
        "before": {"id": 1, NASTY: 1},
        "after": {"id": 1, NASTY: NASTY},
    },
]
RESULTS = "results"  # stands for {"results": {JOB: ...}} in an answer
Answers = dict[str, Any]
NOISY_FLOW = {
    "name": NASTY,
    "description": NASTY,
    "steps": [{"type": "click", "selector": NASTY, "description": NASTY}],
}
WRONG_FLOW = {
    "name": NASTY,
    NASTY: 1,
    "steps": [{"type": NASTY}, {"type": "click", NASTY: 1}, {"type": "verify", "verify_type": NASTY}],
}
GITEA = "/api/v1/gitea"
CREDENTIALS = {"username": "u", "password": "secret-password"}
LISTED = [{"id": 1, "name": "taskboard", "has_repo": True}]


def failing(**fields: Any) -> dict[str, Any]:
    return {"success": False, "error": NASTY, "message": NASTY, **fields}


# Which answers, by their path; and the command that shows them.
ANSWERS: dict[str, tuple[Answers, list[str]]] = {
    "status": (
        {"/api/v2/sessions/*": {"jobs": [{"status": NASTY, "status_reason": NASTY}]}},
        ["status"],
    ),
    "mutations": ({"*/state": {RESULTS: {"success": True, "state": {"mutations": MUTATIONS}}}}, ["state"]),
    "verified mutations": (
        {"*/state": {RESULTS: {"success": True, "state": {"db": {"mutations": MUTATIONS}}}}},
        ["state", "--verify-no-mutations"],
    ),
    "worker trouble": ({"*/state": {RESULTS: {"success": False, "state": {"error": NASTY}}}}, ["state"]),
    "worker troubles": (
        {"*/state": {RESULTS: {"success": False, "state": {"errors": {NASTY: [NASTY]}}}}},
        ["state"],
    ),
    "worker": ({"*/start-worker": {"status": NASTY, "correlation_id": NASTY}}, ["start-worker"]),
    "worker awaited": (
        {
            "*/start-worker": {"status": "ok", "correlation_id": NASTY},
            "*/state": {RESULTS: {"success": False, "state": {"error": NASTY}}},
        },
        ["start-worker", "--wait", "--wait-timeout", "1"],
    ),
    "reset": ({"*/reset": {**failing(), RESULTS: failing()}}, ["reset"]),
    "audit tables": ({"*/cleanup": {**failing(), RESULTS: failing()}}, ["clear-audit"]),
    "snapshot": ({"*/snapshot": {RESULTS: failing()}}, ["snapshot"]),
    "artifact": ({"*/snapshot": {RESULTS: {"success": True, "artifact_id": NASTY}}}, ["snapshot"]),
    "failed artifact": (
        {
            "*/snapshot": {RESULTS: {"success": True, "artifact_id": NASTY}},
            "*/artifacts/*": {"artifact_id": NASTY, "status": "failed"},
        },
        ["snapshot", "--wait"],
    ),
    "late artifact": (
        {
            "*/snapshot": {RESULTS: {"success": True, "artifact_id": NASTY}},
            "*/artifacts/*": {"artifact_id": NASTY, "status": NASTY},
        },
        ["snapshot", "--wait", "--wait-timeout", "1"],
    ),
    "stop": (
        {"*/close": failing(), "/api/v2/sessions/*": {"jobs": [{"status": "running"}]}},
        ["stop"],
    ),
    "flows": ({"*/flows": [NOISY_FLOW]}, ["flow", "--api", "--list"]),
    "text of flows": (
        {"*/flows": yaml.safe_dump({"flows": [NOISY_FLOW]}, allow_unicode=False)},
        ["flow", "--api", "--list"],
    ),
    "unknown flow": ({"*/flows": [NOISY_FLOW]}, ["flow", "--api", "-f", "nope"]),
    "wrong flows": ({"*/flows": [WRONG_FLOW, NOISY_FLOW, NOISY_FLOW]}, ["flow", "--api"]),
    "simulators": (
        {
            f"{GITEA}/credentials": CREDENTIALS,
            f"{GITEA}/simulators": [{"id": 1, "name": NASTY}, {"id": 2, "name": "taskboart" + NASTY}],
        },
        ["start-services"],
    ),
    "clone URL": (
        {
            f"{GITEA}/credentials": CREDENTIALS,
            f"{GITEA}/simulators": LISTED,
            f"{GITEA}/simulators/*/repo": {"has_repo": True, "clone_url": "http://127.0.0.1:1/" + NASTY},
        },
        ["start-services"],
    ),
    "clone host": (
        {
            f"{GITEA}/credentials": CREDENTIALS,
            f"{GITEA}/simulators": LISTED,
            f"{GITEA}/simulators/*/repo": {"has_repo": True, "clone_url": "http://[" + NASTY},
        },
        ["start-services"],
    ),
    "default branch": (
        {
            f"{GITEA}/credentials": CREDENTIALS,
            f"{GITEA}/simulators": LISTED,
            f"{GITEA}/simulators/*/repo": {
                "has_repo": True,
                "clone_url": "http://127.0.0.1:1/purple.git",
                "default_branch": NASTY,
            },
        },
        ["start-services"],
    ),
    **{
        f"command on the VM, exit {code}": (
            {
                "*/execute": {
                    RESULTS: {"success": code == 0, "exit_code": code, "stdout": NASTY, "stderr": NASTY}
                }
            },
            ["sync", "--via", "api"],
        )
        for code in (-1, 1, 66, 68, 69, 74, 77)
    },
    **{
        f"409 for {words[0]}": ({"/api/*": (409, {"detail": NASTY})}, words)
        for words in (
            *(["reset"], ["state"], ["snapshot"], ["start-worker"], ["clear-audit"], ["stop"], ["status"]),
            *(["flow", "--api"], ["sync", "--via", "api"], ["start-services"]),
        )
    },
}


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path
) -> Iterator[tuple[Desk, LocalPlato, bytes]]:
    place = tmp_path_factory.mktemp("hostile")
    with LocalPlato(place / "plato", ca_from=certificates) as plato:
        desk = Desk(place / "desk", {**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "60"})
        desk.good("start", "-c")
        yield desk, plato, desk.state_file.read_bytes()
        desk.clear()


@pytest.fixture
def sandbox(scene: tuple[Desk, LocalPlato, bytes]) -> Iterator[tuple[Desk, LocalPlato]]:
    """A sandbox from the example config, as it was when it was started."""
    desk, plato, recorded = scene
    for path in desk.work.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(Path(__file__).parent / "simulator", desk.work, dirs_exist_ok=True)
    desk.state_file.write_bytes(recorded)
    yield desk, plato
    plato.clear_faults()


def answer(plato: LocalPlato, desk: Desk, answers: Answers) -> None:
    """Script answers, in which RESULTS stands for the results of the desk's job."""
    for path, body in answers.items():
        status, content = body if isinstance(body, tuple) else (200, body)
        if isinstance(content, dict) and RESULTS in content:
            content = {**content, "results": {desk.state["job_id"]: content[RESULTS]}}
        text = json.dumps(content) if isinstance(content, str) else content
        plato.fault("status", path=path, status=status, body=text, times=-1)


@pytest.mark.sampled
@pytest.mark.soak
@pytest.mark.parametrize(("answers", "words"), ANSWERS.values(), ids=ANSWERS)
def test_text_of_the_server(
    sandbox: tuple[Desk, LocalPlato], shown: Shower, answers: Answers, words: list[str]
) -> None:
    desk, plato = sandbox
    answer(plato, desk, answers)
    shown(desk, *words)


STATE_TEXTS = ("job_id", "mode", "service", "dataset", "url", "created_at", "artifact_id", "simulator")


@pytest.mark.long
@pytest.mark.soak
def test_text_of_the_record(sandbox: tuple[Desk, LocalPlato], shown: Shower) -> None:
    desk, _ = sandbox
    state = desk.state
    for name in STATE_TEXTS:
        desk.state_file.write_text(json.dumps({**state, name: NASTY}) + "\n")
        shown(desk, "status")
    for name in ("session_id", "plato_config_path", "expires_at"):
        desk.state_file.write_text(json.dumps({**state, name: NASTY}) + "\n")
        for words in (["status"], ["snapshot"], ["flow", "--list"], ["start-services"]):
            shown(desk, *words, say="")
    kept = {name: value for name, value in state.items() if not name.startswith("ssh_")}
    desk.state_file.write_text(json.dumps({**kept, "session_id": NASTY}) + "\n")
    shown(desk, "stop", say="")
    desk.state_file.write_text(json.dumps({**state, "base_url": NASTY}) + "\n")
    shown(desk, "status")


SLOT_TEXTS = (
    *("session_id", "job_id", "mode", "dataset", "artifact_id", "provider", "public_url", "simulator_name"),
    *("plato_config_path", "ssh_key_path"),
)


@pytest.mark.long
@pytest.mark.soak
def test_text_of_another_clients_record(sandbox: tuple[Desk, LocalPlato], shown: Shower) -> None:
    desk, _ = sandbox
    fields = {name: desk.state[name] for name in ("session_id", "job_id", "mode")}
    desk.state_file.unlink()
    slots = desk.work / ".plato" / "sandboxes"
    slots.mkdir(parents=True)
    for name in SLOT_TEXTS:
        (slots / "x.json").write_text(json.dumps({**fields, name: NASTY}))
        for words in (["status"], ["sync"], ["stop"], BLANK):
            shown(desk, *words, say="x.json is damaged")
    (slots / "x.json").write_text(json.dumps({**fields, NASTY: NASTY, "created_at": NASTY}))
    shown(desk, "status", say="x.json")
    (slots / f"{NASTY_NAME}.json").write_text(json.dumps(fields))
    shown(desk, "status")
    (slots / "x.json").unlink()
    shown(desk, "status")


def nasty_config(desk: Desk) -> dict[str, Any]:
    """The example config with a nasty name for everything that has one."""
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    dataset = config["datasets"]["base"]
    (service,), (listener,) = dataset["services"].values(), dataset["listeners"].values()
    dataset["services"] = {NASTY: {**service, "file": NASTY_NAME}}
    dataset["listeners"] = {NASTY: {**listener, "db_host": NASTY}, f"x{NASTY}": listener}
    return {"service": "taskboard", "datasets": {"base": dataset, NASTY: dataset}}


def write_config(desk: Desk, config: Any) -> None:
    (desk.work / "plato-config.yml").write_text(json.dumps(config))


@pytest.mark.long
@pytest.mark.soak
def test_text_of_the_config(sandbox: tuple[Desk, LocalPlato], shown: Shower) -> None:
    desk, plato = sandbox
    config = nasty_config(desk)
    write_config(desk, config)
    shown(desk, "start-worker", "-d", "nope")
    shown(desk, "start-services")
    (desk.work / NASTY_NAME).write_text("services: {}")
    answer(plato, desk, {"*/simulators": []})
    shown(desk, "start-services", say="taskboard")
    shown(desk, "audit-ui", "--listener", "nope")
    plato.fault("status", path="*/cleanup", status=404, body={"detail": "no simulator"}, times=-1)
    (desk.work / NASTY_NAME).rename(desk.work / "flows.yml")
    config["datasets"]["base"]["metadata"]["flows_path"] = NASTY_NAME
    write_config(desk, config)
    shown(desk, "flow", "--list")
    shown(desk, "snapshot")
    dataset = config["datasets"]["base"]
    for wrong in (
        {"service": NASTY, "datasets": {NASTY: {}}},
        {"service": "x", "datasets": {"base": {NASTY: 1, "compute": {"cpus": NASTY, f"cpus{NASTY}": 1}}}},
        {"service": "x", "datasets": {"base": {"listeners": {NASTY: {"type": NASTY}, f"y{NASTY}": 1}}}},
        {
            "service": "x",
            "datasets": {"base": {**dataset, "services": {NASTY: {"file": NASTY, "type": NASTY}}}},
        },
        {"service": "x", "datasets": {"base": {"compute": {"memory": f"{NASTY}"}}}},
    ):
        write_config(desk, wrong)
        shown(desk, "start-worker")
    for text in (
        f"service: {{ {NASTY_NAME}",
        f"a: 'b\n{NASTY_NAME}: [",
        f"? {NASTY_NAME}\n- x",
        "purple: &x [*y]",
    ):
        (desk.work / "plato-config.yml").write_text(text)
        shown(desk, "start-worker", say="plato-config.yml")


@pytest.mark.soak
def test_text_of_the_flows(sandbox: tuple[Desk, LocalPlato], shown: Shower) -> None:
    desk, _ = sandbox
    several: list[list[Any]] = [[WRONG_FLOW], [NOISY_FLOW, NOISY_FLOW]]
    for flows in several:
        write_flows(desk, text=json.dumps({"flows": flows}))
        shown(desk, "flow", "--list")
    write_flows(desk, text=json.dumps({"flows": [NOISY_FLOW, flow_of(f"x{NASTY}")]}))
    shown(desk, "flow", "--list")
    shown(desk, "flow", "-f", "nope")
    shown(desk, "flow", "-f", f"x{NASTY}")
    for name in ("\x1b[35mpurple", f"../{NASTY}", f"/{NASTY}"):
        wrong = flow_of("login", step_of("screenshot", filename=name, **{NASTY: NASTY}))
        write_flows(desk, text=json.dumps({"flows": [wrong]}))
        shown(desk, "flow")


@pytest.mark.long
@pytest.mark.soak
def test_text_of_names_of_files(sandbox: tuple[Desk, LocalPlato], shown: Shower, tmp_path: Path) -> None:
    desk, _ = sandbox
    tree = tmp_path / NASTY_NAME
    (tree / NASTY_NAME).mkdir(parents=True)
    (tree / NASTY_NAME / NASTY_NAME).write_text("1")
    (tree / f"link{NASTY_NAME}").symlink_to(f"/{NASTY_NAME}")
    (tree / f"key{NASTY_NAME}").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    os.mkfifo(tree / f"pipe{NASTY_NAME}")
    for via in ("api", "ssh"):
        shown(
            desk,
            "sync",
            str(tree),
            "--via",
            via,
            "--dry-run",
            "--remote-path",
            f"/home/plato/{NASTY_NAME[1:5]}",
        )
        shown(desk, "sync", str(tree), "--via", via, "--remote-path", "/home/plato/worktree/nasty")
    shown(desk, "sync", str(tree), "--remote-path", NASTY)
    shown(desk, "sync", NASTY)
    shown(desk, "status", "-w", str(tree))
    shown(desk, "start-worker", "--config-path", str(tree))
    shown(desk, "flow", "--output", f"{desk.work}/flows.yml/{NASTY}", "--base-url", "http://127.0.0.1:1")
    shown(desk, "audit-ui", "--database-url", NASTY, say="--database-url")


def on_the_vm(desk: Desk, plato: LocalPlato) -> Path:
    """The home of the user plato of the VM, seen from outside."""
    machine = next(one for one in plato.machines() if one["job_id"] == desk.state["job_id"])
    return Path(machine["directory"]) / "home" / "plato"


@contextlib.contextmanager
def programs_of_the_vm(desk: Desk, plato: LocalPlato, **programs: str) -> Iterator[None]:
    """Put shell scripts before the programs of these names, for root, who logs in to the VM."""
    home = on_the_vm(desk, plato)
    place = home / "evil"
    place.mkdir()
    for name, text in programs.items():
        (place / name).write_text(f"#!/bin/sh\ncd /home/plato/evil\n{text}\n")
        (place / name).chmod(0o755)
    (place / "nasty").write_text(NASTY)
    startup = home.parent.parent / "root" / ".bashrc"  # who logs in is root
    old = startup.read_bytes() if startup.exists() else b""
    startup.write_text(
        "PATH=/home/plato/evil:$PATH; cat /home/plato/evil/nasty; cat /home/plato/evil/nasty >&2\n"
    )
    try:
        yield
    finally:
        startup.write_bytes(old)
        shutil.rmtree(place)


ONE_LINE = " ".join(NASTY.split())
CONTAINER = "/c app exited - 2026-01-01T00:00:00Z 3"
NASTY_CONTAINER = (
    f"/{ONE_LINE.replace(' ', '_')} app exited {ONE_LINE.replace(' ', '_')} 2026-01-01T00:00:00Z 3"
)
DOCKER = """case "$*" in
version*|"compose version") echo 1;;
*"config --services") %s;;
*" up "*) %s;;
*" ps "*) echo 1;;
inspect*) cat containers;;
logs*) cat nasty;;
*) exit 1;;
esac"""


@pytest.mark.sampled
@pytest.mark.soak
@pytest.mark.parametrize(
    ("config", "up", "containers", "say"),
    [
        ("cat nasty >&2; exit 1", "", "", "purple"),
        ("echo app", "cat nasty >&2; cat nasty; exit 1", "", "forged"),
        ("echo app", "exit 1", NASTY_CONTAINER, "purple"),
        ("echo app", "exit 0", f"{CONTAINER}\n{NASTY}", "purple"),
        ("cat nasty", "exit 0", "", ""),
    ],
    ids=["compose file", "up", "container after up", "container", "names of services"],
)
def test_text_of_containers(
    sandbox: tuple[Desk, LocalPlato], shown: Shower, config: str, up: str, containers: str, say: str
) -> None:
    desk, plato = sandbox
    part("git", "git")
    content = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    content["datasets"]["base"]["services"]["main"]["required_healthy_containers"] = []
    write_config(desk, content)
    with programs_of_the_vm(desk, plato, docker=DOCKER % (config, up)):
        (on_the_vm(desk, plato) / "evil" / "containers").write_text(containers)
        shown(desk, "start-services", say=say)


@pytest.mark.sampled
@pytest.mark.soak
@pytest.mark.parametrize(
    "programs",
    [
        {"find": "cat nasty; cat nasty >&2; exit 1"},
        {"gzip": "cat nasty; cat nasty >&2; exit 0"},
        {"tar": "cat nasty; cat nasty >&2; exit 1"},
        {"base64": "cat nasty", "cp": "cat nasty >&2; exit 1"},
        {"stat": "cat nasty >&2; exit 1"},
        {"mkdir": "cat nasty >&2; exit 1"},
    ],
    ids=["find", "gzip", "tar", "base64", "stat", "mkdir"],
)
def test_text_of_the_vm(sandbox: tuple[Desk, LocalPlato], shown: Shower, programs: dict[str, str]) -> None:
    desk, plato = sandbox
    with programs_of_the_vm(desk, plato, **programs):
        shown(desk, "sync", "--via", "ssh", "--remote-path", "/home/plato/worktree/words", say="")


def test_conflicts_on_the_vm_with_nasty_names(sandbox: tuple[Desk, LocalPlato], shown: Shower) -> None:
    desk, plato = sandbox
    target = on_the_vm(desk, plato) / "worktree" / "conflict"
    (target / NASTY_NAME / NASTY_NAME).mkdir(parents=True)
    (target / NASTY_NAME / NASTY_NAME / "made there").write_text("1")
    source = desk.work / "source"
    source.mkdir()
    (source / NASTY_NAME).write_text("a file here, a directory there")
    for way in ("api", "ssh"):
        shown(desk, "sync", str(source), "--via", way, "--remote-path", "/home/plato/worktree/conflict")
    shown(
        desk,
        *("sync", str(source), "--force", "--dry-run"),
        *("--remote-path", "/home/plato/worktree/conflict"),
    )


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.parametrize(
    "script",
    [
        "cat {nasty} >&2; exit 255",
        "cat {nasty}; exit 1",
        "cat {nasty} >&2; kill -9 $$",
    ],
)
def test_text_of_ssh(sandbox: tuple[Desk, LocalPlato], shown: Shower, tmp_path: Path, script: str) -> None:
    """Whatever the SSH client prints, sync and start-services pass it on as harmless text."""
    desk, _ = sandbox
    (tmp_path / "nasty").write_text(NASTY)
    fake = tmp_path / "ssh"
    fake.write_text("#!/bin/sh\n" + script.format(nasty=tmp_path / "nasty"))
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words in (["sync"], ["sync", "--via", "ssh"], ["start-services"]):
        shown(desk, *words, say="", environment=environment)


class Nasty(BaseHTTPRequestHandler):
    """A page whose every text is nasty."""

    def do_GET(self) -> None:
        body = f"<title>{NASTY}</title><div class=error>{NASTY}</div><p id=p>{NASTY}</p><script>"
        body += f"console.error({json.dumps(NASTY)}); throw new Error({json.dumps(NASTY)})</script>"
        self.send_response(200, "OK")
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.long
def test_text_of_pages_and_names_of_flows(sandbox: tuple[Desk, LocalPlato]) -> None:
    """A page, names of flows and names of pictures: harmless text, and no file outside of the folders."""
    browser()
    desk, _ = sandbox
    names = ["../../../out", "/out", "..", ".", "a/../../out", "$(touch CANARY)", NASTY, "-rf", "x" * 300]
    check = step_of("verify", verify_type="page_title", title="never", timeout=300)
    steps = [step_of("screenshot", filename="a/b.png"), check]
    write_flows(desk, text=json.dumps({"flows": [flow_of(name, *steps) for name in names]}))
    before = set(desk.work.rglob("*"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Nasty) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        command = desk.command("flow", "--all", "--base-url", f"http://127.0.0.1:{server.server_port}")
        code, out, _ = on_terminal(desk, command, columns=200)
        server.shutdown()
    assert code == 8
    assert out.count("purple") > len(names)
    assert_harmless(out, terminal=True)
    made = set(desk.work.rglob("*")) - before
    folders = [desk.work / "test-results", desk.work / "screenshots"]
    assert [path for path in made if not any(path == one or one in path.parents for one in folders)] == []
    assert {path.name for path in desk.place.iterdir()} <= {"home", "work"}
    report = (desk.work / "test-results" / "report.html").read_text()
    assert len(list((desk.work / "test-results").glob("flow-*-trace.zip"))) == len(names)
    assert "\x1b" not in report
    assert "\u202e" not in report


# ---------------------------------------------------------------------------
# paths
# ---------------------------------------------------------------------------

OUTSIDE = ("../out", "/tmp/out", "a/../../out", "..", "", ".", "a\0b", "a/../..")


@pytest.mark.sampled
@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("way", ["api", "local"])
def test_names_of_pictures_stay_in_their_folder(
    sandbox: tuple[Desk, LocalPlato], name: str, way: str
) -> None:
    desk, plato = sandbox
    flow = flow_of("login", step_of("screenshot", filename=name))
    answer(plato, desk, {"*/flows": [flow]})
    write_flows(desk, text=json.dumps({"flows": [flow]}))
    result = desk.run("flow", f"--{way}", "--json")
    assert result.code == 8
    assert "screenshots folder" in result.error["message"] or "is empty" in result.error["message"]
    assert not (desk.work / "screenshots").exists()


@pytest.mark.parametrize("kind", ["words", "absolute", "link", "linked folder"])
def test_a_flows_file_lies_in_the_folder_of_its_config(sandbox: tuple[Desk, LocalPlato], kind: str) -> None:
    """A snapshot takes the text of that file along: it must not be any file of this machine."""
    desk, plato = sandbox
    secret = desk.home / "secret.yml"
    secret.write_text("flows: [{name: login, description: CANARY, steps: []}]\n")
    (desk.work / "link.yml").symlink_to(secret)
    (desk.work / "folder").symlink_to(desk.home)
    names = {"words": "../home/secret.yml", "absolute": str(secret), "link": "link.yml"}
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    config["datasets"]["base"]["metadata"]["flows_path"] = names.get(kind, "folder/secret.yml")
    write_config(desk, config)
    since = len(plato.requests())
    for words in (["snapshot"], ["flow", "--list"]):
        result = desk.run(*words, "--json")
        assert result.code == 8, result
        assert "flows_path" in result.error["message"]
        assert "CANARY" not in result.out + result.err
    assert [one for one in plato.requests()[since:] if "CANARY" in (one["body"] or "")] == []


@pytest.mark.parametrize("name", ["../docker-compose.yml", "/etc/passwd", "a/../../x.yml"])
def test_a_compose_file_lies_in_the_folder_of_its_config(sandbox: tuple[Desk, LocalPlato], name: str) -> None:
    desk, plato = sandbox
    (desk.place / "docker-compose.yml").write_text("services: {}")
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    config["datasets"]["base"]["services"]["main"]["file"] = name
    write_config(desk, config)
    since = len(plato.requests("POST"))
    result = desk.run("start-services", "--json")
    assert result.code == 8, result
    assert "there is no '" in result.error["message"]
    assert len(plato.requests("POST")) == since


# ---------------------------------------------------------------------------
# words that reach a shell, here or on the VM
# ---------------------------------------------------------------------------


def canaries(desk: Desk, plato: LocalPlato) -> list[Path]:
    """Files that only a command hidden in a word can have made."""
    homes = [desk.place, desk.home, on_the_vm(desk, plato).parent.parent]
    return [path for home in homes for path in home.rglob("*CANARY*") if path.name == "CANARY"]


@pytest.mark.sampled
@pytest.mark.soak
@pytest.mark.parametrize("way", ["api", "ssh"])
def test_remote_paths_and_services_are_only_words(
    sandbox: tuple[Desk, LocalPlato], tally: Callable[[str, int], None], way: str, soaking: bool
) -> None:
    desk, plato = sandbox
    source = desk.work / "source"
    source.mkdir()
    (source / "a").write_text("1")
    words = HOSTILE_WORDS if soaking else HOSTILE_WORDS[1:13:3]
    for word in words:
        name = word.replace("/", "|")
        result = desk.run("sync", str(source), "--via", way, "--remote-path", f"/home/plato/worktree/{name}")
        assert result.code == (0 if word.isprintable() else 2), result
        if result.code == 0:
            assert (on_the_vm(desk, plato) / "worktree" / name / "a").read_text() == "1"
    assert canaries(desk, plato) == []
    tally("hostile words", len(words))


@pytest.mark.soak
def test_names_of_services_and_compose_files_are_only_words(
    sandbox: tuple[Desk, LocalPlato], tally: Callable[[str, int], None], soaking: bool
) -> None:
    """What reaches `docker` on the VM is the name, whatever is in it."""
    desk, plato = sandbox
    part("git", "git")
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    service = {**config["datasets"]["base"]["services"].pop("main"), "required_healthy_containers": []}
    words = HOSTILE_WORDS if soaking else HOSTILE_WORDS[::5]
    names = ["-", *(word.replace("/", "|") + ".yml" for word in words)]
    for name in names:
        (desk.work / name).write_text("services: {}")
        config["datasets"]["base"]["services"][f"of {name}"] = {
            **service,
            "file": name,
            "required_healthy_containers": [],
        }
    write_config(desk, config)
    docker = DOCKER % ("printf '%s\\0' \"$3\" >> asked; echo app", "exit 0")
    with programs_of_the_vm(desk, plato, docker=docker):
        evil = on_the_vm(desk, plato) / "evil"
        (evil / "containers").write_text("/c app running - 2026-01-01T00:00:00Z 0\n")
        (evil / "asked").touch()
        (evil / "asked").chmod(0o666)
        result = desk.run("start-services", "--via", "sync", "--json")
        assert result.code == 0, result
        asked = (evil / "asked").read_bytes().split(b"\0")[:-1]
        assert asked == [f"./{name}".encode() for name in names]
    assert canaries(desk, plato) == []
    tally("hostile words", len(words))


@pytest.mark.long
@pytest.mark.soak
def test_answers_about_gitea_are_only_words(
    sandbox: tuple[Desk, LocalPlato], tally: Callable[[str, int], None], soaking: bool
) -> None:
    desk, plato = sandbox
    part("git", "git")
    words = [*HOSTILE_WORDS, "ext::sh -c touch% CANARY", "file:///tmp", "ssh://-oProxyCommand=touch CANARY/x"]
    for word in words if soaking else words[::4]:
        repository = {"has_repo": True, "clone_url": "http://127.0.0.1:1/x.git", "default_branch": word}
        for name, value in (("default_branch", word), ("clone_url", word), ("username", word)):
            plato.clear_faults()
            answers: Answers = {
                f"{GITEA}/credentials": {**CREDENTIALS, **({name: value} if name == "username" else {})},
                f"{GITEA}/simulators": LISTED,
                f"{GITEA}/simulators/*/repo": {**repository, **({} if name == "username" else {name: value})},
            }
            answer(plato, desk, answers)
            result = desk.run("start-services", "--json")
            assert result.code in (1, 4, 6), result
            tally("hostile words", 1)
    assert canaries(desk, plato) == []


def test_only_a_user_is_taken_from_the_clone_url(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, plato = sandbox
    part("git", "git")
    repository = {"has_repo": True, "clone_url": "http://127.0.0.1:1/a//b@c/d.git"}
    answers: Answers = {
        f"{GITEA}/credentials": CREDENTIALS,
        f"{GITEA}/simulators": LISTED,
        f"{GITEA}/simulators/*/repo": repository,
    }
    answer(plato, desk, answers)
    result = desk.run("start-services", "--json")
    assert "http://127.0.0.1:1/a//b@c/d.git" in result.error["message"], result


@pytest.mark.sampled
@pytest.mark.parametrize("word", [word for word in HOSTILE_WORDS if word != "~root"])
def test_datasets_and_services_of_the_command_line_are_only_words(
    sandbox: tuple[Desk, LocalPlato], word: str
) -> None:
    desk, plato = sandbox
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    config["datasets"][word] = config["datasets"]["base"]
    write_config(desk, config)
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok"}, times=-1)
    result = desk.run("start-worker", f"--dataset={word}", f"--service={word}", "--json")
    assert (result.code, result.document["dataset"], result.document["service"]) == (0, word, word)
    assert desk.state["dataset"] == word
    assert canaries(desk, plato) == []


# ---------------------------------------------------------------------------
# a .sandbox.yaml that came with somebody's repository
# ---------------------------------------------------------------------------

USES_OF_SSH = (["sync", "--via", "ssh"], ["sync"], ["start-services"])
EVIL_CONFIG = (
    "Host *\n    ProxyCommand touch {canary}\n    PermitLocalCommand yes\n    LocalCommand touch {canary}\n"
)


@pytest.mark.sampled
@pytest.mark.parametrize("words", USES_OF_SSH, ids=" ".join)
def test_a_record_cannot_name_an_ssh_config_of_its_own(
    sandbox: tuple[Desk, LocalPlato], words: list[str]
) -> None:
    desk, plato = sandbox
    evil = desk.work / "evil.conf"
    evil.write_text(EVIL_CONFIG.format(canary=desk.work / "CANARY"))
    state = desk.state
    below = os.path.relpath(evil, desk.home)
    for path in (str(evil), "evil.conf", f"{desk.plato_home}/../{below}", f"~/{below}"):
        desk.state_file.write_text(json.dumps({**state, "ssh_config_path": path}) + "\n")
        result = desk.run(*words, "--json")
        assert canaries(desk, plato) == []
        assert "evil.conf" in result.err
        assert desk.good("status", "--json").document["vm_running"] is True


@pytest.mark.sampled
@pytest.mark.parametrize("words", USES_OF_SSH, ids=" ".join)
def test_a_record_cannot_name_options_as_a_host(sandbox: tuple[Desk, LocalPlato], words: list[str]) -> None:
    desk, plato = sandbox
    state = desk.state
    canary = desk.work / "CANARY"
    for host in (f"-oProxyCommand=touch {canary}", "-F/dev/null", "x -oProxyCommand=y", "a\nb", "user@host"):
        desk.state_file.write_text(json.dumps({**state, "ssh_host": host}) + "\n")
        result = desk.run(*words, "--json")
        assert canaries(desk, plato) == []
        assert result.code == 1
        assert "ssh_host" in result.error["message"]
        assert host not in desk.run("status").out


# ---------------------------------------------------------------------------
# links, and places that others can write to
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_links_in_the_home_do_not_lead_out(desk: Desk, plato: LocalPlato) -> None:
    """Every file of ours planted beforehand as a link: nothing that it leads to is touched."""
    session = "5e551011-aaaa"
    play_along(plato, session, "job-1")
    desk.plato_home.mkdir(mode=0o700)
    outside = desk.place / "outside"
    outside.mkdir()
    names = ("ssh_{}.conf", "ssh_{}_key", "ssh_{}_key.pub", "known_hosts_{}", "heartbeat_{}.log")
    planted = [desk.plato_home / name.format("5e551011") for name in names]
    for path in planted:
        (outside / path.name).write_text("precious")
        path.symlink_to(outside / path.name)
    desk.good(*BLANK)
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    for path in planted[:3]:
        assert not path.is_symlink()
        public = path.suffix == ".pub" or path.name.startswith("known_hosts")
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or public
    assert not planted[3].is_symlink()
    assert planted[4].is_file()
    assert not planted[4].is_symlink()
    desk.good("stop")
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    assert desk.leftovers() == []


def test_a_home_that_everyone_can_write_to_is_refused(desk: Desk, plato: LocalPlato) -> None:
    """Whoever can put an SSH config there can have commands run by whoever uses it."""
    home = desk.place / "shared"
    home.mkdir()
    desk.environment["PLATO_HOME"] = str(home)
    for mode in (0o777, 0o1777):  # the second as in /tmp, where files cannot be replaced, but sockets planted
        home.chmod(mode)
        refused = desk.run(*BLANK, "--json")
        assert (refused.code, refused.error["code"]) == (1, "failed")
        assert "everyone" in refused.error["message"]
        assert list(home.iterdir()) == []
    assert plato.requests("POST", "/make") == []
    home.chmod(0o775)
    desk.good(*BLANK)
    for path in home.iterdir():
        public = path.suffix == ".pub" or path.name.startswith("known_hosts")
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or public
    desk.good("stop")
    assert list(home.iterdir()) == []


def test_the_usual_home_is_closed_to_others(desk: Desk) -> None:
    desk.plato_home.mkdir()
    desk.plato_home.chmod(0o777)
    desk.good(*BLANK)
    assert stat.S_IMODE(desk.plato_home.stat().st_mode) == 0o700


def test_a_home_of_somebody_else_is_refused(desk: Desk, plato: LocalPlato) -> None:
    """`~/.plato` as a link to a directory that another user owns and lets everyone write to."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory for another user")
    theirs = desk.place / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    theirs.chmod(0o777)
    desk.plato_home.symlink_to(theirs)
    refused = desk.run(*BLANK, "--json")
    assert refused.code == 1
    assert "everyone" in refused.error["message"]
    assert plato.requests("POST", "/make") == []
    assert list(theirs.iterdir()) == []


def test_names_planted_beside_the_record(desk: Desk) -> None:
    """The temporary file of a record is never one that was there before, nor where a link leads."""
    outside = desk.place / "outside"
    outside.write_text("precious")
    # Every pid that the next commands can have.
    last = (
        int(Path("/proc/loadavg").read_text().split()[-1]) if os.path.exists("/proc/loadavg") else os.getpid()
    )
    for pid in range(last, last + 300):
        (desk.work / f".sandbox.yaml.{pid}.tmp").symlink_to(outside)
    started = desk.run(*BLANK, "--json")
    assert outside.read_text() == "precious"
    assert started.code == 0 or "cannot be written" in started.error["message"]
    if started.code == 0:
        assert not desk.state_file.is_symlink()
        desk.good("stop")
    assert outside.read_text() == "precious"


def test_the_record_as_a_link(desk: Desk) -> None:
    """A `.sandbox.yaml` that leads out is read, and replaced or removed, but not written through."""
    outside = desk.place / "outside.yaml"
    desk.good(*BLANK)
    desk.state_file.rename(outside)
    text = outside.read_bytes()
    desk.state_file.symlink_to(outside)
    desk.good("status")
    desk.good("stop")
    assert outside.read_bytes() == text
    assert not desk.state_file.exists()
    assert not desk.state_file.is_symlink()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["link", "missing", "closed"])
def test_a_temporary_directory_of_another_kind(
    sandbox: tuple[Desk, LocalPlato], tmp_path: Path, kind: str
) -> None:
    """Only a flow's browser uses one, in a directory of its own that others cannot enter."""
    browser()
    desk, _ = sandbox
    real = tmp_path / "real"
    real.mkdir()
    place = tmp_path / "t"
    if kind == "link":
        place.symlink_to(real)
    elif kind == "closed":
        place.mkdir(mode=0o500)
    write_flows(desk, flow_of("login", step_of("wait", duration=1)))
    with ThreadingHTTPServer(("127.0.0.1", 0), Nasty) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        address = f"http://127.0.0.1:{server.server_port}"
        result = desk.run("flow", "--json", "--base-url", address, environment={"TMPDIR": str(place)})
        server.shutdown()
    assert result.code in (0, 1), result
    assert list(real.glob("plato-*")) == []
