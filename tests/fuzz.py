"""Targets for coverage-guided fuzzing with atheris: `python3 tests/fuzz.py TARGET [OPTIONS] CORPUS`.

A target is called with bytes of any kind; whatever leaves it but an error of the product is a finding.
`corpus` gives the texts that the search begins with, made of our own files and answers.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if __name__ == "__main__":
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["plato_sandbox"]):
        product: Any = importlib.import_module("plato_sandbox")
else:
    product = importlib.import_module("plato_sandbox")

from test_yaml import exact, oracle_load  # noqa: E402  (after the instrumentation)

CONFIG = """service: taskboard
datasets:
  base:
    compute: &compute {cpus: 2, memory: 2048, disk: 10240, app_port: 8080, plato_messaging_port: 7000}
    metadata: {name: T, flows_path: flows.yml, variables: [{name: a, value: b}]}
    services: {main: {type: docker-compose, file: c.yml, required_healthy_containers: [db]}}
    listeners:
      db:
        type: db
        db_type: postgresql
        db_host: 127.0.0.1
        db_port: 5432
        db_user: u
        db_password: p
        db_database: d
        audit_ignore_tables:
          # noise
          - sessions
          - table: users
            columns: [login_count, last_login_at]
      files: {type: file, target_dir: /x, watch_enabled: true, watch_patterns: ['*.txt']}
  empty: {compute: *compute}
"""
JOB = "545bdce1-5555-494c-9eee-690227f67f20"
ROWS = {"before": {"id": 1, "n": 3}, "after": {"id": 1, "n": 4}}
MUTATIONS = [
    {"table_name": "users", "action": "UPDATE", **ROWS},
    {"table": "s", "operation": "insert", "row_data": {"id": 7}, "changed_columns": ["id"]},
    {"table_name": "t", "schema_name": "p", "action": "DELETE", "old_data": {"id": None}},
]
STATE = {"db": {"mutations": MUTATIONS, "audit_log_count": 3}, "mutations": MUTATIONS}
FLOW = {
    "name": "login",
    "description": "d",
    "steps": [
        {"type": "navigate", "url": "/login", "timeout": 1000},
        {"type": "fill", "selector": "#password", "value": "v", "retries": 2},
        {"type": "verify", "verify_type": "element_count", "selector": "li", "count": 3},
        {"type": "verify_text", "text": "x", "contains": False, "should_exist": False},
        {"type": "screenshot", "filename": "a/b.png", "full_page": True},
        {"type": "wait", "duration": 5},
        {"type": "switch_page", "page_index": 0},
    ],
}
ANSWERS: list[Any] = [
    {"session_id": "s", "envs": [{"job_id": JOB, "success": True, "simulator": "x"}]},
    {"ready": False, "status": "pending", "results": {JOB: {"ready": True, "status": "running"}}},
    {"jobs": [{"job_id": JOB, "status": "running", "status_reason": "r"}], "envs": [{"public_id": JOB}]},
    {"success": True, "results": {JOB: {"success": False, "gone": True, "errors": ["x"], "error": "e"}}},
    {"results": {JOB: {"success": True, "exit_code": 0, "stdout": "o", "stderr": "e", "timed_out": False}}},
    {"results": {JOB: {"success": True, "artifact_id": "a", "url": "https://x.test/?a=b#c"}}},
    {"results": {JOB: {"success": True, "state": STATE}}, "status": "ready"},
    {"results": {JOB: {"success": False, "state": {"error": "not up", "errors": {"db": "x"}}}}},
    {"username": "u", "password": "p", "clone_url": "https://u@g.test/x.git", "default_branch": "main"},
    [{"id": 3, "name": "taskboard", "has_repo": True}],
    {"detail": [{"loc": ["body", "x"], "msg": "m", "type": "t"}]},
    {"flows": [FLOW]},
    [FLOW],
]
RECORD = {"session_id": "s", "pid": 12, "interval": 30.0, "beats": 3, "last_ok": 1.7e9}
RECORD.update(last_error="e", last_error_at=1.7e9, failures=2, ended="the VM is gone", started=1.7e9)
SLOT: dict[str, Any] = {
    "name": "x",
    "session_id": "5e55-1",
    "job_id": JOB,
    "mode": "config",
    "simulator_name": "taskboard",
}
SLOT.update(public_url="http://x.test/?a=b", dataset="base", provider="qemu", plato_config_path="p.yml")
SLOT.update(ssh_key_path=".plato/ssh_key_x_545bdce1", heartbeat_pid=4194303, timeout=1800.0, stopped_at=None)
SLOT.update(created_at=1.7e9, expires_at=1.7e9, artifact_id=None, attached=False)
EMPTY = tempfile.TemporaryDirectory()
RULES = (
    b"# c\n*.py[co]\n!keep\n/build/\na/**/b\n**/x\n\\#y\n[!a-z]*\n[[:alpha:]]?\ndoc/*.txt\nt \\ \n\0a/b/x.pyc"
)
LISTING = [
    *(b"0123abcd", b"fa/b", b"da", b"fgone", b"", b"d 755", b"a", b"f 644 3 1700000000.5000000000", b"a/b"),
    *(b"f 644 1 1.0000000000", b"gone", b"l a/b", b"link", b"x", b".git", b"s", b"a/socket", b""),
]


def json_of(data: bytes) -> Any:
    """The JSON in the data, or None where there is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def harmless(text: str) -> None:
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)


def told_lines(lines: Iterable[Any]) -> None:
    told(lambda output: [output.result(line) for line in lines])


def told(show: Callable[[Any], Any]) -> None:
    """Let something be shown on a terminal of ours: all of it must be harmless."""
    stream = io.StringIO()
    output = product.Output(stream, stream, {})
    show(output)
    harmless(stream.getvalue())


# -- the targets --


def fuzz_yaml(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        value = product.yaml_load(text)
    except product.YamlError as error:
        harmless(str(error))
        return
    try:
        theirs = oracle_load(text)
    except Exception:  # noqa: BLE001  (what PyYAML cannot read is no witness)
        theirs = value
    assert exact(value) == exact(theirs), (value, theirs)
    try:
        again = product.yaml_load(product.yaml_dump(value))
    except product.YamlError as error:  # a key that takes more room as it is written than as it was read
        if "longer than" in error.message:
            return
        raise
    assert exact(again) == exact(value)


def fuzz_config(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    product.read_config = lambda path, *_: text
    try:
        config = product.load_config("/nowhere/plato-config.yml", "base")
        json.dumps(config.for_worker(), allow_nan=False)
        product._plan_from_config(config)
        product.named_files(config.content, product.plan_services(config))
        for _, words in product.around(config):
            harmless(words)
    except product.SandboxError as error:
        harmless(error.message)
    try:
        product.flows_file(product.load_config("/nowhere/plato-config.yml", "base"))
    except product.SandboxError as error:
        harmless(error.message)


def listed_flows(known: Any) -> dict[str, Any]:
    report: dict[str, Any] = product.run_flow(SimpleNamespace(flows=lambda _: known), list=True)
    return report


def fuzz_flows(data: bytes) -> None:
    text = data[1:].decode("utf-8", "replace")
    try:
        known = product.parse_flows(text, "flows.yml", "flows.yml" if data[:1] < b"\x80" else None)
    except product.SandboxError as error:
        harmless(error.message)
        return
    told_lines(product.flow_lines(listed_flows(known)))
    for flow in known.flows:
        for step in flow["steps"]:
            harmless(product.printable(step.record["target"]))
            product.report_step(step.record)
            if step.type == "fill":
                product.looks_secret(step)
            if step.type == "screenshot":
                name = os.path.normpath(os.path.join("/folder", step.values["filename"]))
                assert name.startswith("/folder/"), name


def fuzz_ignore(data: bytes) -> None:
    text, _, path = data.partition(b"\0")
    path = path.replace(b"\0", b"").strip(b"/") or b"a"
    rules = product.IgnoreFile(text)
    tree = product.LocalTree(os.fsencode(EMPTY.name))
    tree._rules = {**tree._rules, path.partition(b"/")[0]: [rules]}
    tree._rules[b""].insert(0, rules)
    for is_directory in (False, True):
        rules.verdict(path, is_directory)
        tree.ignores(path, is_directory)
        tree.keeps_away(path, is_directory)


class Answering:
    """Stands for the API: every request is answered with the same."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.settings = product.Settings(api_key="key-of-the-tests", home="/nowhere")
        self.reporter = product.Reporter()

    def another(self) -> Answering:
        return self

    def hang_up(self) -> None:
        """There is no connection."""

    def close(self, *_: Any) -> Any:
        return self.checked(dict)

    def checked(self, kind: type) -> Any:
        if not isinstance(self.answer, kind):
            raise product.ApiError("not what was asked for")
        return self.answer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("job_flows", "artifact_flows"):
            return lambda *_, **__: self.answer
        listed = isinstance(self.answer, list)
        if name == "gitea_simulators":
            return lambda: self.answer if listed else [{"name": "taskboard", **self.checked(dict)}]
        if name == "gitea_credentials" and listed:
            return lambda: {"username": "u", "password": "p"}
        return lambda *_, **__: self.checked(dict)


def fuzz_answers(data: bytes) -> None:
    status, body = (data[0] % 6) * 100 + data[-1] % 100 if data else 200, data[1:]
    headers = {"retry-after": body[:30].decode("latin-1"), "location": str(body)}
    text = body.decode("utf-8", "replace")
    harmless(product.error_for_answer("GET", "/api", status, headers, text).message)
    value = json_of(body)
    if not isinstance(value, (dict, list, str)):
        return
    config = product.parse_config(CONFIG, "plato-config.yml", "/plato-config.yml", None)
    sandbox = product.Sandbox("/")
    sandbox.api = Answering(value)
    sandbox.settings = sandbox.api.settings
    sandbox.state = {"session_id": "s", "job_id": JOB, "service": "taskboard", "artifact_id": "a"}
    product.load_state = lambda directory: {**sandbox.state, "base_url": sandbox.settings.base_url}
    sandbox.revive_heartbeat = sandbox.end_of_vm
    sandbox._record = lambda **_: None
    for work in (
        lambda: told_lines(product.status_lines(sandbox.status())),
        lambda: told(lambda output: output.document(sandbox.reset())),
        lambda: told_lines(product.state_lines(sandbox.read_state())),
        lambda: sandbox.snapshot(config=False),
        lambda: sandbox.clear_audit(),
        lambda: sandbox._wait_for_artifact("a", 0.0),
        lambda: sandbox._wait_for_worker(config, 0.0),
        lambda: product.wait_for_ready(sandbox, 0.0),
        sandbox.find_address,
        lambda: sandbox.connect_network(),
        lambda: product.beat_trouble(sandbox.api.checked(dict), JOB),
        lambda: product.execute(sandbox.api, sandbox.state, "true", 1.0),
        lambda: told_lines(
            product.flow_lines(listed_flows(product.parse_flows(product.fetch_flows(sandbox), "", None)))
        ),
        lambda: product.find_repository(sandbox.api, "taskboard"),
    ):
        try:
            work()
        except product.SandboxError as error:
            harmless(error.message)


def fuzz_listings(data: bytes) -> None:
    """What the VM sends back: the answer of a look, of a shell and of git."""
    tree = product.LocalTree(os.fsencode(EMPTY.name))
    tree.stamps.update({b"a": b"d 755", b"a/b": b"f 644 3 5.0000000000"})
    for packed in (data, gzip.compress(data, 0)):
        try:
            _, manifest, remote = product.parse_look(base64.b64encode(packed), {})
            plan = product.SyncPlan(tree, remote, manifest, False)
            harmless(product.listed_paths(plan.remove))
            assert set(plan.remove) <= remote.keys()
        except product.SandboxError as error:
            harmless(error.message)
    harmless(product.ssh_broken(data).message)
    outcome = product.Outcome(data[0] if data else 1, data, data)
    for check in (product.check_script, lambda outcome: product.check_push(outcome, "password-1")):
        try:
            check(outcome)
        except product.SandboxError as error:
            harmless(error.message)


def fuzz_mutations(data: bytes) -> None:
    value = json_of(data)
    if not isinstance(value, dict):
        return
    found = product.mutations_of(value)
    rules = product.entries_with([], product.Changes(found, "public").noise(set()), "public")
    harmless(product.rules_text(rules))
    assert product.yaml_load(product.rules_text(rules))["audit_ignore_tables"] == rules
    told_lines(product.state_lines({"summary": product.summarize(found), "results": {JOB: {"state": value}}}))
    harmless(product.mutations_found(found).hint or "")
    entries = [*rules, *product.as_list(value.get("rules"))]
    ticks = {tick for entry in entries for tick in product.ticks_of(entry, "public")}
    changes = product.Changes(found, "public")
    assert changes.remaining(ticks | changes.noise(ticks)) == {}
    for bar in product.bars_of(changes, ticks):
        harmless(bar["table"])
    for place, mutations in changes.of.items():
        harmless(product.change_text(mutations[0], place[1]))
    product.entries_with(entries, ticks | changes.noise(ticks), "public")
    product.new_mutations(found[:1], found)


def fuzz_edit(data: bytes) -> None:
    head, _, rest = data.partition(b"\0")
    text = rest.decode("utf-8", "replace")
    names = [name for name in head.decode("utf-8", "replace").split(",") if name]
    entries: list[Any] = [{"table": n[1:], "columns": [n[1:], "x"]} if n[:1] == "{" else n for n in names]
    entries = [entry for entry in entries if entry != {"table": "", "columns": ["", "x"]}]
    try:
        new, shared = product.edit_rules(text, "plato-config.yml", "base", "db", entries)
    except product.SandboxError as error:
        harmless(error.message)
        return
    before, after = product.yaml_load(text), product.yaml_load(new)
    assert (after["datasets"]["base"]["listeners"]["db"].get("audit_ignore_tables") or []) == entries
    product.difference_of(text, new)
    if not shared and "*" not in text:  # an alias may be anywhere
        after["datasets"]["base"]["listeners"]["db"].pop("audit_ignore_tables", None)
        before["datasets"]["base"]["listeners"]["db"].pop("audit_ignore_tables", None)
        assert exact(before) == exact(after)


def fuzz_state(data: bytes) -> None:
    text, _, record = data.partition(b"\0")
    settings = product.Settings(home="/nowhere")
    try:
        state = product.parse_state(text.decode("utf-8", "replace"), "/nowhere/.sandbox.yaml")
        told_lines(product.sandbox_lines({**state, "ssh_command": product.ssh_command(state)}))
        files = product.ssh_fields(settings.home, str(state.get("session_id") or ""))
        assert all(os.path.dirname(path) in (settings.home, "") for path in files.values())
        product.repair_ssh_config(state, settings)
        product.is_heartbeat(state.get("heartbeat_pid"), state.get("session_id"))
        product.unfinished_start(state)
        product.default_target(state)
    except product.SandboxError as error:
        harmless(error.message)
        state = {"session_id": "s"}
    truth = json_of(record)
    if isinstance(truth, dict):
        texts = {key: truth.get(key) for key in ("session_id", "last_error", "ended")}
        kept = {key: value for key, value in texts.items() if isinstance(value, str)}
        product.heartbeat_facts = lambda *_: kept
        health = product.heartbeat_health(settings, state)
        told_lines(
            product.status_lines(
                {
                    **state,
                    "heartbeat": health,
                    "ends": product.end_of_life({**state, "heartbeat": health}),
                    "ssh_command": product.ssh_command(state),
                    "vm_running": True,
                }
            )
        )


def fuzz_slot(data: bytes) -> None:
    path = "/nowhere/.plato/sandboxes/x.json"
    product.text_of_others = lambda _: data.decode("utf-8", "replace")
    settings = product.Settings(home="/nowhere")
    try:
        state = product.read_slot(path, "/nowhere")
        if state is None:
            return
        files = product.ssh_fields(settings.home, state["session_id"])
        product.ssh_config_text(settings, {**state, **files})
        product.default_target(state)
    except product.SandboxError as error:
        harmless(error.message)
        return
    assert all(os.path.dirname(path) in (settings.home, "") for path in files.values())
    assert "ssh_private_key_path" not in state
    json.dumps(state, allow_nan=False).encode()
    told_lines(product.sandbox_lines({**state, "ssh_command": product.ssh_command(state)}))
    health = product.heartbeat_health(settings, state)
    told_lines(
        product.status_lines(
            {
                **state,
                "heartbeat": health,
                "ends": product.end_of_life({**state, "heartbeat": health}),
                "ssh_command": product.ssh_command(state),
                "vm_running": True,
            }
        )
    )


TARGETS: dict[str, Callable[[bytes], None]] = {
    name[5:]: function for name, function in globals().items() if name.startswith("fuzz_")
}


def corpus(name: str) -> list[bytes]:
    """What the search of a target begins with."""
    simulator = ROOT / "tests" / "simulator"
    files = {path.name: path.read_bytes() for path in simulator.glob("*.yml")}
    answers = [json.dumps(answer).encode() for answer in ANSWERS]
    state = product.STATE_FIRST_LINE + product.yaml_dump(
        {"session_id": "5e55-1", "mode": "blank", "job_id": JOB}
    )
    flows = [json.dumps({"flows": [FLOW]}).encode(), product.yaml_dump({"flows": [FLOW]}).encode()]
    return {
        "yaml": [path.read_bytes() for path in sorted((ROOT / "tests" / "data" / "yaml").iterdir())],
        "config": [CONFIG.encode(), files["plato-config.yml"]],
        "flows": [sign + text for sign in (b"\0", b"\xff") for text in (*flows, files["flows.yml"])],
        "ignore": [RULES, *(line + b"\0a/b/c" for line in RULES.split(b"\n"))],
        "answers": [sign + answer for sign in (b"2", b"\4") for answer in answers],
        "listings": [
            b"\0".join(LISTING),
            b"Error: the gateway said no.\nTry again.\n",
            b"\x50remote: x\nfatal: unable to access 'https://g.test/': 403",
        ],
        "mutations": [json.dumps({**STATE, "rules": ["s", {"table": "p.t", "columns": ["n"]}]}).encode()],
        "edit": [
            b"a,b,{users\0" + CONFIG.encode(),
            b"sessions\0" + files["plato-config.yml"],
            b"\0" + CONFIG.encode(),
        ],
        "slot": [json.dumps(SLOT, indent=2).encode(), b'{"claimed_by_pid": 1}'],
        "state": [
            (state + product.STATE_LAST_LINE).encode() + b"\0" + json.dumps(RECORD).encode(),
            b"session_id: abc123-d\nssh_host: sandbox-1\nssh_config_path: ~/.plato/x\nheartbeat_pid: 5\n\0{}",
        ],
    }[name]


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
