"""The table of faults: every request of every command, times everything that can happen to one.

It is generated. Which requests a command makes is seen by running it once against a local Plato that keeps
its answers; which fields those have, and of which types, is in them and in the API's contract. Each case is
one run of the product, judged from outside: exit code, one JSON document, no traceback and no secret, an
intact .sandbox.yaml, every living VM named, nothing sent again that must not be.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import pytest
import yaml
from conftest import BLANK, ROOT, Desk, Result, eventually, heartbeats, is_running, part
from localplato import LocalPlato, contract, faults
from test_transport import QUICK, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLE_STEP = 80  # the ordinary suite tries every so-manieth case of a scene
SHARDS = 4
WAIT_SECONDS = 0.4  # for an answer that does not come
ATTEMPTS = 4  # of a request; the first may find a kept connection dead
TEXT = "w\N{LATIN SMALL LETTER O WITH DIAERESIS}rd\x1b[2J"
WRONG: tuple[Any, ...] = (True, 7, TEXT, [7], {"x": 7}, [], {})
PLAIN = -1
V2 = "/api/v2/sessions/{session_id}"
HEARTBEAT = "/api/v2/sessions/{session_id}/heartbeat"
CONTRACT = contract.load()

# ---------------------------------------------------------------------------
# the faults
# ---------------------------------------------------------------------------


class Fault(NamedTuple):
    """Something that happens to a request. kind: its row in RULES; script: for the local Plato, None for a
    connection that is refused; late: whether the answer is not there in time."""

    name: str
    kind: str
    script: Optional[dict[str, Any]]
    late: bool = False
    once: bool = False


CONNECTION = (
    Fault("refused", "refused", None),
    Fault("reset before the body", "lost", {"effect": "reset_before_body"}),
    Fault("reset after the body", "lost", {"effect": "reset_before_acting"}),
    Fault("reset after acting", "lost", {"effect": "lost_answer"}),
    Fault("no answer", "lost", {"effect": "hang"}, late=True),
    Fault("no answer, but acted", "lost", {"effect": "hang", "act": True}, late=True),
    Fault("a very slow drip", "lost", {"effect": "drip", "seconds": 5}, late=True),
    Fault("cut off", "lost", {"effect": "truncate", "bytes": 1}),
)
KINDS = {401: "key", 403: "key", 404: "gone", 410: "gone", 408: "gateway", 502: "gateway", 504: "gateway"}
KINDS.update(dict.fromkeys((429, 500, 503), "trouble"))
STATUSES = (400, 401, 403, 404, 405, 408, 409, 410, 422, 429, 500, 501, 502, 503, 504)
REDIRECTS = (301, 302, 303, 307, 308)
LATER = "in an hour"
NEVER_ENDING = "[" * 200_000
BODIES = {
    "empty": "",
    "blank": " \r\n",
    "HTML": "<!doctype html><html><body>Sign in</body></html>",
    "half a document": '{"results": {"a": [1, {"b": "',
    "null": "null",
    "a number": "4",
    "a text": '"fine"',
    "too deep": NEVER_ENDING,
    "not JSON": "NaN' OR 1=1 --",
}


def status_fault(name: str, status: int, key: str, **headers: str) -> Fault:
    """A status whose body repeats the key, as careless servers do."""
    body = {"detail": f"this is {name}, and the key was {key}"}
    script = {"effect": "status", "status": status, "headers": headers, "body": body}
    return Fault(name, KINDS.get(status, "refusal"), script)


def general_faults(key: str, elsewhere: str) -> list[Fault]:
    """The faults that do not look at the answer. elsewhere: where redirects lead."""
    retry_after = {
        LATER: "3600",
        "that is no time": "\x01soon",
    }
    found = [*CONNECTION, *(status_fault(str(status), status, key) for status in STATUSES)]
    for name, value in retry_after.items():
        fault = status_fault(f"429, again {name}", 429, key, **{"Retry-After": value})
        found.append(fault._replace(kind="later") if LATER in name else fault)
    for status in REDIRECTS:
        script = {"effect": "redirect", "status": status, "url": f"{elsewhere}/?key={key}"}
        found.append(Fault(f"{status} to another host", "refusal", script))
    found.append(Fault("502 with HTML", "gateway", {"effect": "html", "status": 502}))
    for name, body in BODIES.items():
        found.append(body_fault(name, body))
    return found


def body_fault(name: str, body: Any) -> Fault:
    headers = {"Content-Type": "text/html" if name == "HTML" else "application/json"}
    return Fault(f"200 with {name}", "garbage", {"effect": "content_type", "headers": headers, "body": body})


def passing_faults(key: str) -> list[Fault]:
    """The same fault once, where a second try is worth it."""
    statuses = [status_fault(str(status), status, key) for status in (429, 500, 502, 503, 504)]
    statuses.append(status_fault("429, again at once", 429, key, **{"Retry-After": "0"}))
    return [fault._replace(name=f"once {fault.name}", once=True) for fault in (*CONNECTION, *statuses)]


# Fields of answers

Place = tuple[Any, ...]
IDENTIFIER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def places(kind: contract.Type, value: Any, place: Place = ()) -> Iterator[tuple[Place, Any, bool]]:
    """Every field of an answer: its place, its value, and whether it is there. Of lists, the first entry."""
    kind = member_for(kind, value)
    if isinstance(value, dict):
        fields = CONTRACT.models[kind.name] if kind.kind == "model" else []
        types = {known.name: known.type for known in fields}
        for name, inner in value.items():
            inner_kind = kind.members[1] if kind.kind == "map" else types.get(name, contract.Type("any"))
            # What is of any kind may be an object of which the contract knows no more; ids are keys of maps.
            every = bool(IDENTIFIER.fullmatch(name)) or (kind.kind == "map" and inner_kind.kind != "any")
            yield (*place, "*" if every else name), inner, True
            yield from places(inner_kind, inner, (*place, "*" if every else name))
        yield from (((*place, known.name), None, False) for known in fields if known.name not in value)
    elif isinstance(value, list) and value:
        inner_kind = kind.members[0] if kind.kind == "list" else contract.Type("any")
        yield (*place, 0), value[0], True
        yield from places(inner_kind, value[0], (*place, 0))


def member_for(kind: contract.Type, value: Any) -> contract.Type:
    """The member of a union that a value is of, and the type that a model of one `root` stands for."""
    if kind.kind == "model" and [known.name for known in CONTRACT.models[kind.name]] == ["root"]:
        return member_for(CONTRACT.models[kind.name][0].type, value)
    if kind.kind != "union":
        return kind
    for member in kind.members:
        report = contract.Report()
        CONTRACT.check(member, value, (), report)
        if not report.problems:
            return member_for(member, value)
    return contract.Type("any")


def field_faults(returns: contract.Type, answer: Any) -> Iterator[Fault]:
    """Every field missing, null, and of two other types; and fields that nobody knows in every object."""
    found = list(places(returns, answer))
    maps = {place[:-1] for place, _, _ in found if place[-1] == "*"}
    objects = [((), answer), *((place, value) for place, value, there in found if there)]
    edits = [
        [[*place, "not_known_yet"], {"deep": [1]}]
        for place, value in objects
        if isinstance(value, dict) and place not in maps
    ]
    if edits:
        yield Fault("fields that nobody knows", "extra", {"effect": "edit", "edits": edits})
    for number, (place, value, there) in enumerate(found):
        where = ".".join(map(str, place))
        if there:
            yield edit(f"without {where}", [list(place)])  # an entry of a list or map: all of them
        others = [wrong for wrong in WRONG if not (there and type(wrong) is type(value))]
        chosen = [others[number % len(others)], others[(number + 3) % len(others)]]
        for wrong in (*chosen, *([None] if there and value is not None else [])):
            yield edit(f"{where} is {json.dumps(wrong)}", [list(place), wrong])


def edit(name: str, *edits: list[Any]) -> Fault:
    return Fault(name, "fields", {"effect": "edit", "edits": list(edits)})


# ---------------------------------------------------------------------------
# what a command may come to
# ---------------------------------------------------------------------------

RULES: dict[str, set[int]] = {  # exit codes, where the command cannot go on without the answer
    "refused": {6},
    "lost": {6},
    "key": {4},
    "gone": {3},
    "refusal": {6},
    "gateway": {6},
    "trouble": {6},
    "later": {6},
    "garbage": {6},
    "fields": {6, PLAIN},  # PLAIN: as without a fault; a field may not matter
    "extra": {PLAIN},
    "passing": {PLAIN},
}


class Other(NamedTuple):
    """Where a rule does not hold: patterns of the scene and the endpoint, kinds of faults, codes, and why."""

    scene: str
    endpoint: str
    kinds: str
    codes: set[int]
    why: str


EVERY = "refused lost key gone refusal gateway trouble later garbage fields"
UNSURE = "it is sent once, and nobody knows what came of it"
OTHERS = (
    Other("*", "*/make", "lost gateway garbage", {7}, UNSURE),
    Other("*", "*/make", "gone", {6}, "there is no session yet that could be gone"),
    Other(
        "*", "*/make", "fields", {PLAIN, 1, 7}, "1: a session without a VM, which is closed; 7: no session"
    ),
    Other("*", "*/snapshot", "lost gateway garbage fields", {PLAIN, 7}, UNSURE),
    Other(
        "start *", "*/wait_for_ready", "refused lost gateway trouble later garbage", {7}, "the wait goes on"
    ),
    Other("start *", "*/wait_for_ready", "fields", {PLAIN, 7}, "the wait goes on"),
    Other(
        "start-worker --wait",
        "*/state",
        "refused lost gateway trouble later garbage",
        {7},
        "the wait goes on",
    ),
    Other("start-worker --wait", "*/state", "fields", {PLAIN, 7}, "the wait goes on"),
    Other("snapshot --wait", "*/artifacts/*", "refused lost trouble later garbage", {7}, "the wait goes on"),
    Other("snapshot --wait", "*/artifacts/*", "gone gateway", {6, 7}, "it may not be known everywhere yet"),
    Other("start *", "*/public_url", EVERY, {0}, "an address that can be asked for later"),
    Other("start that fails*", "*/close", EVERY, {PLAIN}, "the first failure is told, and what is left"),
    Other("start *", "*/connect_network", EVERY, {PLAIN}, "a VM without SSH is of use, too"),
    Other("start *", "*/reset", EVERY, {PLAIN}, "the VM is as it booted"),
    Other("start *", "*/add_ssh_key", EVERY, {PLAIN}, "a VM without SSH is of use, too"),
    Other("snapshot*", "*/prefetch", EVERY, {PLAIN}, "VMs start from an artifact without that, too"),
    Other("st*", "*/close", "gone", {PLAIN}, "what is to be closed is gone already"),
    Other("stop that*", V2, "gone", {0}, "what could not be closed is gone"),
    Other("start beside*", V2, "gone", {0}, "a sandbox that is gone gives way to a new one"),
    Other("start *", "*", "gone", {3, 6}, "the session is the command's own"),
    Other("*", "*/state", "fields", {PLAIN, 0, 8, 9}, "the worker has nothing to tell, or other changes"),
    Other(
        "clear-audit", "*/cleanup", "gone", {1, 3}, "404: there may be no simulator in a session that lives"
    ),
    Other(
        "clear-audit of no*",
        V2,
        EVERY.replace("gone ", ""),
        {PLAIN},
        "it is asked only whether there is no simulator because the VM is gone",
    ),
    Other("flow*", "*/public_url", "fields", {PLAIN, 1}, "1: Plato names no address"),
    Other("flow*", "*/flows", "gone", {0, 3, 6, 8}, "404: those of the artifact, or none"),
    Other("flow*", "*/flows", "refusal", {0, 6, 8}, "405, 501: the same"),
    Other("flow*", "*/flows", "garbage fields", {PLAIN, 6, 8}, "flows that cannot be used are told as such"),
    Other("sync*", "*/execute", "fields", {PLAIN, 1, 6, 7}, "it says what a command on the VM did"),
    Other("*without a repository", "*/repo", "refusal garbage", {PLAIN, 6}, "409: it is there"),
    Other(
        "start-services*",
        V2,
        EVERY.replace("gone ", ""),
        {PLAIN},
        "it is asked only whether a failure means that the VM is gone",
    ),
    Other("start-services*", "*/gitea/*", "gone", {6}, "it is not the sandbox that is gone"),
    Other("doctor", "*", EVERY, {PLAIN, 1}, "it is there to say what is wrong"),
    Other("list --all", "*/sessions", "gone", {6}, "it is not a sandbox that is gone"),
    Other("list --all", V2, EVERY, {PLAIN}, "what cannot be asked for is told in its row"),
    Other("gc", V2, EVERY, {PLAIN}, "what may still be there is not forgotten"),
    Other("stop --all", V2, EVERY, {PLAIN}, "it is stopped whatever is known of it"),
    Other("pull-config", "*/flows", "gone refusal garbage fields", {PLAIN, 6, 8}, "as for flow"),
    Other("pull-config", "*", "gone", {6}, "it is not the sandbox that is gone"),
    Other("pull-config", "*", "fields", {PLAIN, 6, 8}, "a config that cannot be used is told as such"),
)


def allowed(scene: Scene, call: Call, fault: Fault) -> set[int]:
    """The exit codes that a command may come to."""
    kind = "passing" if fault.once and not call.endpoint.endswith(CREATING) else fault.kind
    codes = next((other.codes for other in OTHERS if other_holds(other, scene, call, kind)), RULES[kind])
    return {scene.plain if code == PLAIN else code for code in codes}


def other_holds(other: Other, scene: Scene, call: Call, kind: str) -> bool:
    return (
        kind in other.kinds.split()
        and fnmatch.fnmatchcase(scene.name, other.scene)
        and fnmatch.fnmatchcase(call.endpoint, other.endpoint)
    )


# ---------------------------------------------------------------------------
# the scenes
# ---------------------------------------------------------------------------


class Call(NamedTuple):
    """A request of a command: the nth one to that endpoint, and what it is answered with."""

    method: str
    endpoint: str
    nth: int
    returns: Optional[contract.Type]
    answer: Any

    @property
    def name(self) -> str:
        return f"{self.method} {self.endpoint}" + (f" ({self.nth})" if self.nth > 1 else "")


class Scene(NamedTuple):
    """A command in some situation. plain: how it ends without a fault; given: faults that make the
    situation; only: the endpoint that is of interest; patience: more words when an answer never comes;
    fields: every so-manieth fault in a field is tried, where another scene has the same requests."""

    name: str
    words: tuple[str, ...]
    kind: str = "use"
    plain: int = 0
    given: tuple[dict[str, Any], ...] = ()
    only: str = "*"
    patience: tuple[str, ...] = ()
    fields: int = 1


def given(effect: str, method: str, path: str, **values: Any) -> dict[str, Any]:
    return {"effect": effect, "method": method, "path": path, "times": -1, **values}


GITEA = "/api/v1/gitea/simulators"
BOOT = ("--timeout", "1")
# The flows end where the browser would open: the one that is named does not exist.
SCENES = (
    Scene("status", ("status",)),
    Scene("state", ("state",)),
    Scene("state --verify-no-mutations", ("state", "-v"), plain=8, fields=4),
    Scene("reset", ("reset",)),
    Scene("clear-audit", ("clear-audit",)),
    Scene(
        "clear-audit of no simulator",
        ("clear-audit",),
        plain=1,
        given=(given("status", "POST", "/api/v1/env/*/cleanup", status=404),),
        only=V2,
        fields=4,
    ),
    Scene("sync --via api", ("sync", "--via", "api")),
    Scene("start-worker", ("start-worker",)),
    Scene(
        "start-worker --wait", ("start-worker", "--wait"), only="*/state", patience=("--wait-timeout", "1")
    ),
    Scene("snapshot", ("snapshot",)),
    Scene(
        "snapshot --wait",
        ("snapshot", "--wait", "--include-config"),
        only="*/artifacts/*",
        patience=("--wait-timeout", "1"),
    ),
    Scene("flow --list --api", ("flow", "--list", "--api")),
    Scene(
        "flow --list --api of the artifact",
        ("flow", "--list", "--api"),
        given=(given("status", "GET", "*/jobs/*/flows", status=404),),
        only="*/simulator/*",
    ),
    Scene(
        "flow --api --verify-no-mutations",
        ("flow", "--api", "--verify-no-mutations"),
        plain=1,
        only="*/state",
        fields=4,
    ),
    Scene(
        "flow --api where no address is known",
        ("flow", "--api"),
        kind="no address",
        plain=1,
        only="*/public_url",
    ),
    Scene("start-services", ("start-services",), plain=1),
    Scene(
        "start-services without a repository",
        ("start-services",),
        plain=1,
        given=(given("edit", "GET", GITEA, edits=[[["*", "has_repo"], False]]),),
        only=GITEA + "/*",
    ),
    Scene("start-services --via sync", ("start-services", "--via", "sync", "--timeout", "20"), plain=1),
    Scene("the state of audit-ui", (), fields=4),
    Scene("open --print", ("open", "--print"), fields=4),
    Scene("logs --vm", ("logs", "--vm")),
    Scene("pull-config", ("pull-config", "--yes")),
    Scene("list --all", ("list", "--all")),
    Scene("gc", ("gc",), kind="beside", only=V2, fields=4),
    Scene("doctor", ("doctor",), fields=4),
    Scene("start --blank", ("start", "--blank", "--service", "myapp"), kind="start", patience=BOOT),
    Scene("start --from-config", ("start", "--from-config"), kind="start", patience=BOOT, fields=4),
    Scene("start --simulator", ("start", "--simulator", "espocrm"), kind="start", patience=BOOT, fields=4),
    Scene(
        "start --artifact-id", ("start", "--artifact-id", "art_abc123"), kind="start", patience=BOOT, fields=4
    ),
    Scene(
        "start that fails, and closes",
        ("start", "--blank", "--service", "myapp"),
        kind="start",
        plain=6,
        given=(given("status", "GET", "*/wait_for_ready", status=409),),
        only="*/close",
    ),
    Scene("start beside a sandbox", ("start", "--from-config"), kind="beside", plain=5, fields=2),
    Scene("start --replace", ("start", "--from-config", "--replace"), kind="beside", only="*/close"),
    Scene("stop", ("stop",), kind="stop"),
    Scene(
        "stop that is refused",
        ("stop",),
        kind="stop",
        plain=6,
        given=(given("status", "POST", "*/close", status=200, body={"success": False, "message": "no"}),),
        only=V2,
    ),
    Scene("stop --all", ("stop", "--all", "--yes"), kind="stop"),
)
BY_NAME = {scene.name: scene for scene in SCENES}

# The program: the product, whose retries come at once, polls quickly, and gives up early on an answer that
# does not come; a connection is refused by asking at a port on which nobody listens.
ENTRY = """
import json, os, re, sys
sys.path.insert(0, {root!r})
import plato_sandbox as product
{quick}
product.ARTIFACT_POLL_SECONDS = product.WORKER_POLL_SECONDS = 0.1
case = json.loads(os.environ.pop("FAULT_CASE", "null"))
if case:
    attempt, seen = product.Transport._attempt, 0
    def met(self, method, path, *words):
        global seen
        if method != case["method"] or not re.fullmatch(case["path"], path.partition("?")[0]):
            return attempt(self, method, path, *words)
        seen += 1
        if seen < case["nth"] or 0 < case["times"] <= seen - case["nth"]:
            return attempt(self, method, path, *words)
        if not case["port"]:
            return attempt(self, method, path, *words[:-1], min(words[-1], case["seconds"]))
        self.hang_up()
        base, self.base = self.base, self.base._replace(netloc=f"127.0.0.1:{{case['port']}}")
        try:
            return attempt(self, method, path, *words)
        finally:
            self.base = base
    product.Transport._attempt = met
if sys.argv[1:2] == ["the-state-of-audit-ui"]:
    try:
        print(json.dumps({{"db": [one.raw for one in product.audit_changes(os.getcwd(), "db")]}}))
    except product.SandboxError as error:
        told = {{"code": error.code, "message": error.message, "hint": error.hint}}
        print(json.dumps({{"error": {{**told, "exit_code": error.exit_code}}}}))
        sys.exit(error.exit_code)
else:
    sys.exit(product.main())
"""


class Table:
    """A local Plato and a desk on which the cases of a scene are tried, one after another."""

    def __init__(self, place: Path, certificates: Path, elsewhere: socket.socket) -> None:
        self.plato = LocalPlato(place / "plato", ca_from=certificates, docker="off")
        self.plato.start()
        settings = {"PLATO_HEARTBEAT_INTERVAL_SECONDS": "60", "PLATO_BROWSER": "/no/such/browser"}
        self.desk = Desk(place / "desk", {**self.plato.environment, **settings})
        self.entry = place / "entry.py"
        self.entry.write_text(ENTRY.format(root=str(ROOT), quick=QUICK))
        self.elsewhere = elsewhere
        self.port = free_port()
        self.cases = 0
        self.artifact = ""
        self.made_for = ""
        self.flows = [
            {"name": "login", "description": "In", "steps": [{"type": "navigate", "url": "/login"}]}
        ]
        self.write_simulator()
        self.simulator = {path: path.read_bytes() for path in self.desk.work.iterdir() if path.is_file()}

    def write_simulator(self) -> None:
        """A simulator whose worker has a database to watch, and whose services do not start here."""
        config = yaml.safe_load((self.desk.work / "plato-config.yml").read_text())
        config["datasets"] = {"base": config["datasets"]["base"]}
        listener = {"type": "db", "db_type": "sqlite", "db_database": "/home/plato/board.sqlite"}
        config["datasets"]["base"]["listeners"] = {"db": listener}
        (self.desk.work / "plato-config.yml").write_text(yaml.safe_dump(config))
        (self.desk.work / "flows.yml").write_text(yaml.safe_dump({"flows": self.flows}))
        (self.desk.work / "docker-compose.yml").write_text(
            "services: {app: {image: none}, db: {image: none}}\n"
        )

    def end(self) -> None:
        self.desk.clear()
        self.plato.stop()

    def run(self, *words: str, case: Optional[dict[str, Any]] = None) -> Result:
        environment = {"FAULT_CASE": json.dumps(case)} if case else {}
        return self.desk.run(command=[sys.executable, str(self.entry), *words], environment=environment)

    def must(self, *words: str) -> Result:
        result = self.run(*words)
        assert result.code == 0, (words, result)
        return result

    # -- the situation that a case begins in --

    def prepare(self, scene: Scene) -> None:
        """See to it that the sandbox that a scene is about is there, and only that one."""
        self.plato.clear_faults()
        for path, content in self.simulator.items():  # which `pull-config` writes anew
            if path.read_bytes() != content:
                path.write_bytes(content)
        if scene.kind == "start":
            self.wipe()
        elif not self.is_standing(scene.kind):
            self.wipe()
            self.start_sandbox(scene.kind)
            self.made_for = scene.kind
        if scene.name.startswith(("sync", "start-services --via sync")):
            self.cases += 1
            (self.desk.work / "changing.txt").write_text(str(self.cases))

    def is_standing(self, kind: str) -> bool:
        if self.made_for != kind or not self.desk.state_file.exists():
            return False
        state = self.desk.state
        return self.living() == [state.get("job_id")] and is_running(state.get("heartbeat_pid", 0))

    def living(self) -> list[str]:
        """The job ids of the VMs that live, which costs less to ask than `conftest.living`."""
        return list(self.plato.admin("GET", "status")["alive"])

    def start_sandbox(self, kind: str) -> None:
        if kind in ("stop", "beside"):
            self.must("start", "--from-config")
            return
        if not self.artifact:  # one with flows, which Plato then has for its sandboxes
            self.must("start", "--from-config")
            self.artifact = str(self.must("snapshot", "--json").document["artifact_id"])
            self.must("stop")
        if kind == "no address":
            self.plato.fault("status", path="*/public_url", status=400, times=-1)
        self.must("start", "--artifact-id", self.artifact)
        self.plato.clear_faults()
        self.execute(
            "import sqlite3; board = sqlite3.connect('/home/plato/board.sqlite');"
            "board.execute('CREATE TABLE IF NOT EXISTS tasks (id INTEGER PRIMARY KEY, title TEXT)')"
        )
        self.must("start-worker", "--wait")
        assert self.run("start-services").code == 1  # makes the repository; there is no Docker here

    def change_the_database(self) -> None:
        """Give the worker something to tell."""
        self.execute(
            "import sqlite3; board = sqlite3.connect('/home/plato/board.sqlite', isolation_level=None);"
            "board.execute('INSERT INTO tasks (title) VALUES (?)', ['a new one'])"
        )

    def execute(self, program: str) -> None:
        """Run a Python program on the VM."""
        body = {"command": f'python3 -c "{program}"', "timeout": 60}
        session_id = self.desk.state["session_id"]
        [result] = self.ask("POST", f"/api/v2/sessions/{session_id}/execute", body)["results"].values()
        assert result["exit_code"] == 0, result

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A request of our own to the API."""
        headers = {"X-API-Key": self.plato.api_key, "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.plato.base_url + path, data, headers, method=method)
        with self.plato.opener.open(request, timeout=60) as response:
            return json.load(response)

    def wipe(self) -> None:
        """Leave no VM, no heartbeat and no file."""
        self.made_for = ""
        for job_id in self.living():
            session_id = self.ask("GET", f"/api/v2/jobs/{job_id}/info")["session_id"]
            self.ask("POST", f"/api/v2/sessions/{session_id}/close")
        self.desk.clear()
        shutil.rmtree(self.desk.plato_home, ignore_errors=True)
        self.desk.state_file.unlink(missing_ok=True)

    # -- what a command asks for --

    def calls(self, scene: Scene) -> list[Call]:
        """Run a scene without a fault, and see which requests it makes."""
        self.prepare(scene)
        if "state" in scene.name:
            self.change_the_database()
        for rule in scene.given:
            self.plato.fault(**rule)
        self.plato.fault("copy", path="/api/*", times=-1)
        since = self.newest_request()
        result = self.run(*self.words(scene), "--json")
        assert result.code == scene.plain, (scene.name, result)
        found: list[Call] = []
        counts: dict[tuple[str, str], int] = {}
        for request in self.plato.requests(path="/api/", since=since):
            endpoint = endpoint_of(request)
            key = (endpoint.method, endpoint.path)
            counts[key] = nth = counts.get(key, 0) + 1
            if endpoint.path == HEARTBEAT or not fnmatch.fnmatchcase(endpoint.path, scene.only):
                continue
            if nth > 1 and endpoint.path.endswith(POLLED):  # what ends the wait is of interest
                nth = 1
                found = [call for call in found if call.endpoint != endpoint.path]
            answer = json.loads(request.get("answer") or "null")
            found.append(Call(*key, nth, endpoint.returns, answer))
        return found

    def newest_request(self) -> int:
        return int(self.plato.admin("GET", "status")["requests"])

    @staticmethod
    def words(scene: Scene) -> tuple[str, ...]:
        return scene.words or ("the-state-of-audit-ui",)

    # -- a case --

    def complaints(self, scene: Scene, call: Call, fault: Fault) -> list[str]:
        """Try one case; what is wrong with how it went."""
        self.prepare(scene)
        before = self.desk.state_file.read_bytes() if scene.kind != "start" else b""
        times = 1 if fault.once else -1
        case = None
        if fault.script is None or fault.late:
            pattern = re.sub(r"{\w+}", "[^/]+", call.endpoint)
            case = {"method": call.method, "path": pattern, "nth": call.nth, "times": times}
            case.update(seconds=WAIT_SECONDS, port=0 if fault.late else self.port)
        if fault.script is not None:
            where: dict[str, Any] = {
                "method": call.method,
                "path": call.endpoint,
                "nth": call.nth,
                "times": times,
            }
            self.plato.fault(**fault.script, **where)
        for rule in scene.given:
            self.plato.fault(**rule)
        since = self.newest_request()
        words = (*self.words(scene), "--json", "--verbose")
        if scene.patience and call.endpoint.endswith(POLLED) and not fault.once and fault.kind != "extra":
            words += scene.patience
        try:
            result = self.run(*words, case=case)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return [str(error)[-2000:]]
        sent = [
            one
            for one in self.plato.requests(call.method, "/api/", since)
            if endpoint_of(one).path == call.endpoint
        ]
        found = [
            *self.wrong_with_the_end(result, allowed(scene, call, fault)),
            *self.wrong_with_what_was_told(result),
            *self.wrong_with_the_requests(call, fault, sent),
            *self.wrong_with_what_is_left(scene, call, fault, result, before),
        ]
        return [*found, f"stdout: {result.out[-1500:]}", f"stderr: {result.err[-1500:]}"] if found else []

    @staticmethod
    def wrong_with_the_end(result: Result, codes: set[int]) -> Iterator[str]:
        if result.code not in codes:
            yield f"exit code {result.code}, and not one of {sorted(codes)}"

    def wrong_with_what_was_told(self, result: Result) -> Iterator[str]:
        told = result.out + result.err
        if self.plato.api_key in told:
            yield "the key is told"
        if "\x1b" in told or "\r" in told:
            yield "a control character is told"
        try:
            document = result.document
        except (ValueError, AssertionError):
            yield "stdout is not one JSON document"
            return
        error = document.get("error")
        if result.code and (not isinstance(error, dict) or error.get("exit_code") != result.code):
            yield f"the error of the document is {error}"
        if result.code and set(error or ()) != {"code", "message", "hint", "exit_code"}:
            yield "the error of the document has other keys"
        if result.code == 0 and isinstance(error, dict) and "exit_code" in error:
            yield "the document holds an error, and the exit code is 0"
        if isinstance(error, dict) and error.get("code") == "internal":
            yield "a mistake of the product"

    def wrong_with_the_requests(self, call: Call, fault: Fault, sent: list[dict[str, Any]]) -> Iterator[str]:
        met = [one for one in sent if one["fault"]]
        if fault.script is not None and not met:
            yield "the request never came"
        if met and all(one["fault"] == "edit, which does not fit" for one in met):
            yield "the fault does not fit the answer"
        if call.endpoint.endswith(CREATING) and len(sent) > 1:
            yield f"what creates something was sent {len(sent)} times"
        limit = ATTEMPTS if fault.kind in WORTH_REPEATING else 1
        if fault.kind not in ("fields", "extra") and not call.endpoint.endswith(POLLED) and len(met) > limit:
            yield f"the request that met the fault was sent {len(met)} times"
        if was_called(self.elsewhere):
            yield "a redirect was followed"

    def wrong_with_what_is_left(
        self, scene: Scene, call: Call, fault: Fault, result: Result, before: bytes
    ) -> Iterator[str]:
        """The record, the VMs and the heartbeats after a case."""
        ending = scene.kind == "stop" or call.endpoint.endswith("/close")
        lied = ending and fault.kind == "gone"  # Plato says so; the VM lives on
        alive = [] if lied else self.living()
        if not self.desk.state_file.exists():
            if scene.kind in ("use", "no address") or (scene.kind != "start" and result.code):
                yield ".sandbox.yaml is gone"
            if heartbeats(self.desk):
                yield "a heartbeat is left, and .sandbox.yaml is gone"
            if self.desk.leftovers():
                yield f"files are left: {self.desk.leftovers()}"
            if alive:
                yield "a VM is left, and .sandbox.yaml is gone"
            return
        for path in (self.desk.state_file, *self.desk.plato_home.iterdir()):
            if path.is_file() and self.plato.api_key.encode() in path.read_bytes():
                yield f"the key is in {path.name}"
        state, old = self.desk.state, yaml.safe_load(before or b"{}")
        for name, kind in FIELD_TYPES.items():
            if name in state and type(state[name]) is not kind:
                yield f".sandbox.yaml has {name}: {state[name]!r}"
        if state.get("starting") and "session_id" not in state:
            if "heartbeat" not in str(result.document["error"]):
                yield "whether a VM lives is not known, and that is not told"
            if heartbeats(self.desk):
                yield "a heartbeat keeps an unknown VM alive"
            return
        if scene.kind == "stop" and result.code == 0:
            yield ".sandbox.yaml is left"
        if set(alive) - {state.get("job_id")}:
            yield "a VM lives that .sandbox.yaml does not name"
        if scene.kind == "start":
            if result.code and "stop" not in str(result.document["error"]["hint"]):
                yield "a sandbox is left after a failure, and it is not told how to end it"
            if result.code == 0 and not alive:
                yield "there is no VM"
        elif result.code or scene.kind != "beside":
            same = {name: value for name, value in state.items() if name not in LEARNED}
            if same != {name: value for name, value in old.items() if name not in LEARNED}:
                yield f".sandbox.yaml was changed to {state}"
        if not call.endpoint.endswith("/close") and not alive:
            yield "the VM is gone"
        if (alive or lied) and not is_running(state.get("heartbeat_pid", 0)):
            yield "the heartbeat is gone"


POLLED = ("/wait_for_ready", "/state", "/artifacts/{artifact_id}")
CREATING = ("/make", "/snapshot")
WORTH_REPEATING = ("refused", "lost", "gateway", "trouble")
LEARNED = ("heartbeat_pid", "plato_config_path", "dataset", "artifact_id", "service")
TEXTS = ("session_id", "job_id", "mode", "service", "dataset", "public_url", "url", "ssh_host")
FIELD_TYPES: dict[str, type] = {**dict.fromkeys(TEXTS, str), "cpus": int, "memory": int, "disk": int}


@functools.cache
def endpoint_for(method: str, path: str) -> contract.Endpoint:
    found = [one for one in CONTRACT.endpoints if one.method == method and one.pattern.match(path)]
    return min(found, key=lambda one: one.path.count("{"))


def endpoint_of(request: dict[str, Any]) -> contract.Endpoint:
    """The endpoint of the contract that a request was for."""
    return endpoint_for(request["method"], request["path"])


# ---------------------------------------------------------------------------
# the tests
# ---------------------------------------------------------------------------


def faults_for(call: Call, key: str, elsewhere: socket.socket, step: int = 1) -> list[Fault]:
    """Everything that is to happen to a request; of what happens to its fields every `step`th."""
    address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    found = [*general_faults(key, address), *passing_faults(key)]
    other: Any = {} if isinstance(call.answer, list) else []
    found.append(body_fault("the other kind", other))
    if call.returns is not None:
        found.extend(list(field_faults(call.returns, call.answer))[::step])
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In the soak, the cases of a scene are shared out; a sample is tried by one process."""
    if "shard" not in metafunc.fixturenames:
        return
    soak = "soak" in str(metafunc.config.option.markexpr)
    shards = range(SHARDS) if soak else [None]
    marks = [] if soak else [pytest.mark.xdist_group("faults")]
    metafunc.parametrize(
        ("name", "shard"),
        [
            pytest.param(name, shard, marks=marks, id=name if shard is None else f"{name}, part {shard}")
            for shard in shards
            for name in BY_NAME
        ],
    )


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[socket.socket]:
    """Another host, at which nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def was_called(server: socket.socket) -> bool:
    """Whether anyone has connected since the last look."""
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path, elsewhere: socket.socket
) -> Iterator[Table]:
    part("sshd", "openssh-server")
    part("git", "git")
    table = Table(tmp_path_factory.mktemp("faults"), certificates, elsewhere)
    yield table
    table.end()


@pytest.mark.sampled
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_request_meets_every_fault(
    table: Table, name: str, shard: Optional[int], tally: Callable[[str, int], None]
) -> None:
    scene, key = BY_NAME[name], table.plato.api_key
    cases = [
        (call, fault)
        for call in table.calls(scene)
        for fault in faults_for(call, key, table.elsewhere, scene.fields)
    ]
    step, offset = (SAMPLE_STEP, zlib.crc32(name.encode())) if shard is None else (SHARDS, shard)
    chosen = cases[offset % step :: step]
    wrong = []
    for call, fault in chosen:
        complaints = table.complaints(scene, call, fault)
        if complaints:
            wrong.append("\n  ".join([f"{scene.name}, {call.name}: {fault.name}", *complaints]))
    tally("faults", len(chosen))
    assert not wrong, f"{len(wrong)} of {len(chosen)} cases:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([[["a", 0, "b"], 2]], {"a": [{"b": 2}, {"b": 1}], "c": {}}),
        ([[["a", "*", "b"]]], {"a": [{}, {}], "c": {}}),
        ([[["a", "*"]], [["d"], None]], {"a": [], "c": {}, "d": None}),
        ([[["c", "d"], []], [["c", "*"], 5]], {"a": [{"b": 1}, {"b": 1}], "c": {"d": 5}}),
        ([[[], 7]], 7),
    ],
)
def test_edits_of_answers(edits: list[Any], expected: Any) -> None:
    assert faults.edited({"a": [{"b": 1}, {"b": 1}], "c": {}}, edits) == expected


@pytest.mark.parametrize("place", [["x"], ["c", "*"], ["a", 2], ["a", 0, "b", "c"], ["x", "y"]])
def test_an_edit_must_fit_the_answer(place: list[Any]) -> None:
    """Nothing is left as it was without a word: a case would then try nothing."""
    with pytest.raises(LookupError):
        faults.edited({"a": [{"b": 1}], "c": {}}, [[place]])


# ---------------------------------------------------------------------------
# the heartbeat
# ---------------------------------------------------------------------------


def heartbeat_record(desk: Desk) -> dict[str, Any]:
    """The record of the heartbeat, {} while it is being written."""
    try:
        return desk.heartbeat_record()
    except ValueError:
        return {}


def met(plato: LocalPlato, since: int) -> int:
    """How many beats met a fault."""
    return sum(bool(one["fault"]) for one in plato.requests("POST", "/heartbeat", since))


def wrong_with_a_beat(desk: Desk, plato: LocalPlato, fault: Fault) -> list[str]:
    """Let every beat meet a fault, then none: what is wrong with the heartbeat during and after it."""
    since = int(plato.admin("GET", "status")["requests"])
    before, pid = heartbeat_record(desk).get("beats", 0), desk.state["heartbeat_pid"]
    assert fault.script is not None
    plato.fault(**fault.script, method="POST", path=HEARTBEAT, times=-1)
    found = []
    if fault.kind == "gone":
        eventually(lambda: not is_running(pid))
        if heartbeat_record(desk)["ended"] != "the VM is gone" or met(plato, since) != 2:
            found.append("it ended otherwise than after a second look")
        plato.clear_faults()
        desk.good("stop")
        desk.good(*BLANK)
        return found
    eventually(lambda: met(plato, since) >= 3)
    record = eventually(lambda: heartbeat_record(desk))
    if fault.kind not in ("fields", "extra"):
        record = eventually(lambda: heartbeat_record(desk).get("failures") and heartbeat_record(desk))
        if not record["last_error"]:
            found.append("it does not say what is wrong")
    if plato.api_key in (desk.plato_home / f"heartbeat_{desk.state['session_id'][:8]}.log").read_text():
        found.append("its record holds the key")
    if fault.kind == "extra" and record["failures"]:
        found.append("fields that nobody knows disturb it")
    plato.clear_faults()
    eventually(lambda: heartbeat_record(desk).get("failures") == 0)
    eventually(lambda: heartbeat_record(desk).get("beats", 0) > before)
    if heartbeats(desk) != [pid]:
        found.append(f"the heartbeats are {heartbeats(desk)}, and not {[pid]}")
    return found


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_heartbeat_meets_every_fault(
    plato: LocalPlato,
    new_desk: Callable[..., Desk],
    elsewhere: socket.socket,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    """It goes on through all of them but a session that is gone, and says what is wrong."""
    desk = new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "0.1"})
    desk.tune(BEAT_SECONDS=0.3)
    desk.good(*BLANK)
    plato.fault("copy", path=HEARTBEAT, times=-1)
    copied = eventually(lambda: [one for one in plato.requests("POST", "/heartbeat") if one.get("answer")])
    plato.clear_faults()
    endpoint = endpoint_of(copied[0])
    call = Call("POST", HEARTBEAT, 1, endpoint.returns, json.loads(copied[0]["answer"]))
    cases = [
        fault
        for fault in faults_for(call, plato.api_key, elsewhere)
        if fault.script is not None and not fault.once
    ]
    chosen = cases if soaking else cases[:: SAMPLE_STEP // 8]
    wrong = [
        f"{fault.name}: {complaint}"
        for fault in chosen
        for complaint in wrong_with_a_beat(desk, plato, fault)
    ]
    tally("faults", len(chosen))
    assert not wrong, "\n".join(wrong)
    assert not was_called(elsewhere)
