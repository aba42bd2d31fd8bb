"""start-worker, state, reset, clear-audit and snapshot: every answer that Plato may give, seen from outside.

The real worker, with real databases, is in test_story.py; here the answers are scripted.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, Desk, sent

if TYPE_CHECKING:
    from localplato import LocalPlato

UPDATED = {
    "table_name": "users",
    "action": "UPDATE",
    "before": {"id": 1, "name": "Ada", "login_count": 3},
    "after": {"id": 1, "name": "Ada", "login_count": 4},
}
INSERTED = {"table_name": "sessions", "action": "INSERT", "after": {"id": 7, "token": "x" * 100}}
DELETED = {"table": "tasks", "operation": "delete", "row_data": {"id": 9, "title": "old\x1b[2J"}}


@pytest.fixture
def started(desk: Desk, plato: LocalPlato) -> Desk:
    """A desk with a blank sandbox."""
    desk.good(*BLANK)
    return desk


def answer(plato: LocalPlato, desk: Desk, state: Any, *, success: bool = True, times: int = -1) -> None:
    """Let `state` be answered so for the desk's job."""
    body = {
        "session_id": desk.state["session_id"],
        "results": {desk.state["job_id"]: {"success": success, "state": state}},
    }
    plato.fault("status", method="GET", path="*/state", status=200, body=body, times=times)


# State


def test_state_counts_rows_by_table_and_shows_them(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"db": {"audit_log_count": 3}, "mutations": [UPDATED, INSERTED, DELETED]})
    result = started.good("state")
    lines = result.out.splitlines()
    assert lines[0] == "Environment State"
    assert "  sessions:    1 inserted" in lines
    assert "  tasks:       1 deleted" in lines
    assert "  users:       1 updated" in lines
    assert "  UPDATE  users     id=1  login_count: 3 -> 4" in lines
    assert any(
        line.startswith("  INSERT  sessions  id=7, token=xxx") and line.endswith("...") for line in lines
    )
    assert any(line.startswith("  DELETE  tasks     id=9, title=old") for line in lines)
    assert "\x1b" not in result.out
    assert plato.requests("GET", "/state")[-1]["query"] == "merge_mutations=true"


def test_json_is_the_answer_with_a_summary_beside_it(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"db": {"audit_log_count": 1}, "mutations": [UPDATED], "more": [1]})
    document = started.good("state", "--json").document
    job = document["results"][started.state["job_id"]]
    assert job["state"] == {"db": {"audit_log_count": 1}, "mutations": [UPDATED], "more": [1]}
    assert document["session_id"] == started.state["session_id"]
    assert document["summary"] == {
        "mutations": 1,
        "tables": [{"table": "users", "inserted": 0, "updated": 1, "deleted": 0}],
    }


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("state", "count"),
    [
        ({"mutations": []}, 0),
        ({"db": {"mutations": [], "audit_log_count": 0}}, 0),
        ({"db": {"mutations": [UPDATED]}, "other": {"mutations": [INSERTED, DELETED]}}, 3),
        ({"db": {"mutations": [UPDATED]}, "mutations": [UPDATED]}, 1),
        ({"mutations": [{"table": "t"}, "nonsense", {}]}, 3),
        ({}, 0),
    ],
    ids=["none", "none by listener", "by listener", "merged", "odd ones", "no databases"],
)
def test_mutations_are_found_wherever_they_stand(
    started: Desk, plato: LocalPlato, state: dict[str, Any], count: int
) -> None:
    answer(plato, started, state)
    assert started.good("state", "--json").document["summary"]["mutations"] == count
    human = started.good("state")
    assert ("No mutations since the last reset or clear-audit." in human.out) is (count == 0)
    assert started.run("state", "-v").code == (8 if count else 0)


def test_verify_names_the_tables_and_the_rules_that_would_ignore_them(
    started: Desk, plato: LocalPlato
) -> None:
    second = {**UPDATED, "after": {"id": 1, "name": "Bob", "login_count": 4}}
    answer(plato, started, {"mutations": [UPDATED, second, INSERTED, DELETED]})
    result = started.run("state", "--verify-no-mutations")
    assert result.code == 8
    assert "4 mutations" in result.err
    assert "users (2 updated)" in result.err
    assert "ignore them in plato-config.yml:\n\n# in the listener db\naudit_ignore_tables:" in result.err
    pasted = result.err[result.err.index("audit_ignore_tables:") :]
    assert yaml.safe_load(pasted) == {
        "audit_ignore_tables": [
            "sessions",
            "tasks",
            {"table": "users", "columns": ["login_count", "name"]},
        ]
    }
    document = started.run("state", "-vj").document
    assert document["error"]["exit_code"] == 8
    assert document["summary"]["mutations"] == 4
    assert len(document["results"][started.state["job_id"]]["state"]["mutations"]) == 4


def test_tables_of_several_listeners_and_schemas_are_told_apart(started: Desk, plato: LocalPlato) -> None:
    mail = {**UPDATED, "schema": "mail"}
    state = {"db": {"mutations": [UPDATED, mail]}, "files": {"mutations": [DELETED]}}
    answer(plato, started, {**state, "mutations": [UPDATED, mail, DELETED]})
    result = started.run("state", "-v")
    tables = [entry["table"] for entry in started.good("state", "--json").document["summary"]["tables"]]
    assert tables == ["db.mail.users", "db.users", "files.tasks"]
    assert "  db.users:    1 updated\n" in result.out
    assert "  db.mail.users: 1 updated\n" in result.out
    db, files = result.err.split("# in the listener ")[1:]
    rule = {"table": "users", "columns": ["login_count"]}
    assert yaml.safe_load(db.partition("\n")[2]) == {
        "audit_ignore_tables": [{**rule, "table": "mail.users"}, rule]
    }
    assert yaml.safe_load(files.partition("\n")[2]) == {"audit_ignore_tables": ["tasks"]}


def test_the_schema_of_all_tables_of_a_listener_is_not_named(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"shop": {"mutations": [{**DELETED, "schema": "shop"}]}})
    told = started.run("state", "-v").err
    assert "# in the listener shop\naudit_ignore_tables:\n  - tasks\n" in told


def test_a_row_without_an_id_is_named_by_its_first_column(started: Desk, plato: LocalPlato) -> None:
    row = {"country": "de", "amount": 1}
    changed = {"table": "prices", "action": "UPDATE", "before": row, "after": {**row, "amount": 2}}
    answer(plato, started, {"mutations": [changed]})
    assert "UPDATE  prices  country=de  amount: 1 -> 2\n" in started.good("state").out


def test_an_error_of_several_lines_is_told_in_one(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"errors": ["502 Bad\n\tGateway", "x"]}, success=False)
    assert "so nobody knows what changed: 502 Bad Gateway; x." in started.run("state").err


def test_many_mutations_are_not_all_shown(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"mutations": [INSERTED] * 75})
    result = started.good("state")
    assert "75 inserted" in result.out
    assert result.out.count("INSERT ") == 50
    assert "25 more" in result.out


@pytest.mark.long
@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"error": "Worker is not ready"}, "Worker is not ready"),
        ({"errors": ["502 from the worker"]}, "502 from the worker"),
        ({"errors": {"worker": "502"}, "mutations": []}, "502"),
        (None, "no state"),
        ("starting", "starting"),
    ],
)
def test_a_worker_that_is_not_up_never_means_no_mutations(
    started: Desk, plato: LocalPlato, state: Any, words: str
) -> None:
    answer(plato, started, state, success=False)
    for arguments in (("state",), ("state", "-v")):
        result = started.run(*arguments)
        assert result.code == 9
        assert result.out == ""
        assert words in result.err
        assert "start-worker" in result.err
    error = started.run("state", "--json").error
    assert error["code"] == "worker_not_up"


def test_an_unsuccessful_state_without_words_is_not_taken_for_clean(started: Desk, plato: LocalPlato) -> None:
    answer(plato, started, {"mutations": []}, success=False)
    assert started.run("state").code == 9


@pytest.mark.sampled
@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("command", ["state", "reset"])
def test_a_session_that_is_gone(started: Desk, plato: LocalPlato, command: str, status: int) -> None:
    plato.fault("status", path=f"*/{command}", status=status, body={"detail": "gone"}, times=-1)
    result = started.run(command)
    assert result.code == 3
    assert "gone" in result.err
    assert started.state_file.exists()


@pytest.mark.sampled
@pytest.mark.parametrize(
    "command", ["state", "reset", "snapshot", "clear-audit", "start-worker", "start-services"]
)
def test_without_a_sandbox(desk: Desk, command: str) -> None:
    assert desk.run(command, "--json").error["code"] == "no_sandbox"


# Worker


def test_the_dataset_goes_to_plato_as_it_is_written(started: Desk, plato: LocalPlato) -> None:
    config = started.work / "plato-config.yml"
    text = config.read_text().replace(
        "        audit_ignore_tables:",
        "        of_a_later_version: {x: [1, null]}\n        audit_ignore_tables:",
        1,
    )
    config.write_text(text)
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c1"})
    document = started.good("start-worker", "--json").document
    assert document == {
        "status": "ok",
        "correlation_id": "c1",
        "service": "myapp",
        "dataset": "base",
        "ready": None,
    }
    body = sent(plato, "/start-worker")[-1]
    written = yaml.safe_load(text)["datasets"]["base"]
    assert body["service"] == "myapp"
    assert body["dataset"] == "base"
    assert body["plato_dataset_config"] == written
    assert started.state["plato_config_path"] == str(config)


def test_service_dataset_and_config_can_be_named(started: Desk, plato: LocalPlato) -> None:
    other = started.place / "elsewhere.yml"
    other.write_text((started.work / "plato-config.yml").read_text())
    (started.work / "plato-config.yml").unlink()
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c"})
    started.good("start-worker", "-s", "other", "-d", "empty", "--config-path", str(other))
    body = sent(plato, "/start-worker")[-1]
    assert (body["service"], body["dataset"]) == ("other", "empty")
    assert started.state["dataset"] == "empty"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-d", "nowhere"), 2, "base"),
        (("--config-path", "missing.yml"), 8, "missing.yml"),
        (("--wait", "--wait-timeout", "no"), 2, "wait-timeout"),
    ],
)
def test_a_worker_that_cannot_be_started(
    started: Desk, plato: LocalPlato, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = started.run("start-worker", *arguments)
    assert result.code == code
    assert words in result.err
    assert plato.requests("POST", "/start-worker") == []


def test_waiting_until_the_worker_is_up(started: Desk, plato: LocalPlato) -> None:
    started.tune(WORKER_POLL_SECONDS=0.05)
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c"})
    plato.fault("status", path="*/state", status=502, body={"detail": "no worker"}, times=2)
    answer(plato, started, {"error": "still starting"}, success=False, times=3)
    answer(plato, started, {"mutations": []})
    result = started.good("start-worker", "--wait", "--json")
    assert result.document["ready"] is True
    assert len(plato.requests("GET", "/state")) >= 4


def test_a_worker_that_never_comes_up(started: Desk, plato: LocalPlato) -> None:
    started.tune(WORKER_POLL_SECONDS=0.05, LASTING_LOOKS=1000)
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c"})
    answer(plato, started, {"error": "the database does not answer"}, success=False)
    result = started.run("start-worker", "--wait", "--wait-timeout", "1", "--json")
    assert result.code == 7
    assert "the database does not answer" in result.error["message"]


def test_a_worker_without_databases_is_not_waited_for(started: Desk, plato: LocalPlato) -> None:
    started.tune(WORKER_POLL_SECONDS=0.05)
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c"})
    answer(plato, started, {"error": "connection to the database refused"}, success=False)
    result = started.run("start-worker", "--wait", "--wait-timeout", "60", "--json")
    assert (result.code, result.error["code"]) == (9, "worker_not_up")
    assert "connection to the database refused. No database of the config runs" in result.error["message"]
    assert "start-services" in result.error["hint"]


def test_the_vm_that_ends_while_the_worker_is_awaited(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/start-worker", status=200, body={"status": "ok", "correlation_id": "c"})
    plato.fault("status", path="*/state", status=410, body={"detail": "job is gone"}, times=-1)
    assert started.run("start-worker", "--wait").code == 3


# Reset and clear-audit


def test_reset(started: Desk, plato: LocalPlato) -> None:
    body = {"success": True, "session_id": started.state["session_id"], "results": {}}
    plato.fault("status", path="*/reset", status=200, body=body, times=2)
    assert "reset successfully" in started.good("reset").out
    assert started.good("reset", "--json").document == body


def test_a_reset_that_fails_says_why(started: Desk, plato: LocalPlato) -> None:
    body = {
        "success": False,
        "session_id": "s",
        "results": {started.state["job_id"]: {"success": False, "message": "the database is locked"}},
    }
    plato.fault("status", path="*/reset", status=200, body=body)
    result = started.run("reset")
    assert result.code == 1
    assert "the database is locked" in result.err


def test_clear_audit_asks_the_api(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/cleanup", status=200, body={"success": True}, times=2)
    assert "emptied successfully" in started.good("clear-audit").out
    assert started.good("clear-audit", "--json").document == {"cleared": True, "via": "api", "listeners": []}


def test_clear_audit_that_fails_says_why(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/cleanup", status=200, body={"success": False, "error": "no such table"})
    result = started.run("clear-audit")
    assert result.code == 1
    assert "no such table" in result.err


# Snapshots


def snapshot_answer(desk: Desk, **result: Any) -> dict[str, Any]:
    return {"results": {desk.state["job_id"]: result}}


def test_a_snapshot_records_its_artifact(started: Desk, plato: LocalPlato) -> None:
    body = snapshot_answer(started, success=True, artifact_id="art_xyz789")
    plato.fault("status", path="*/snapshot", status=200, body=body, times=2)
    result = started.good("snapshot", "--description", "after the login")
    said = "Snapshot created successfully!\n  Artifact ID: art_xyz789\n  Status:      creating"
    assert result.out == f"{said} (its upload goes on; --wait waits for it)\n"
    assert started.state["artifact_id"] == "art_xyz789"
    assert sent(plato, "/snapshot")[-1] == {"description": "after the login"}
    assert started.good("snapshot", "--json").document == {"artifact_id": "art_xyz789", "status": "creating"}


def test_older_servers_answer_without_success(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(started, artifact_id="art_1"))
    assert "art_1" in started.good("snapshot").out


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arguments", "mode", "carried"),
    [
        ((), "config", True),
        (("--no-config",), "config", False),
        ((), "blank", False),
        (("--include-config",), "blank", True),
    ],
)
def test_what_a_snapshot_carries(
    desk: Desk, plato: LocalPlato, arguments: tuple[str, ...], mode: str, carried: bool
) -> None:
    flows = desk.work / "flows.yml"
    flows.write_text("flows: []  # as written\n")
    desk.good(*(("start", "-c", "-d", "empty") if mode == "config" else BLANK))
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(desk, artifact_id="a"))
    desk.good("snapshot", *arguments)
    body = sent(plato, "/snapshot")[-1]
    expected = {
        "flows": flows.read_text(),
        "override_service": "taskboard",
        "internal_app_port": 8080,
        "messaging_port": 7000,
        "credentials": {
            "default_role": "default",
            "roles": {
                "default": [
                    {"type": "email", "text": "admin@example.com"},
                    {"type": "password", "text": "demo-password"},
                ]
            },
        },
    }
    stored = body.pop("plato_config", None)
    assert body == (expected if carried else {})
    if carried:  # one dataset, with what anchors and merges bring, and nothing that the file has not
        assert not set("&*") & set(stored.partition("description")[0])
        dataset = "empty" if mode == "config" else "base"
        written = yaml.safe_load((desk.work / "plato-config.yml").read_text())["datasets"][dataset]
        assert yaml.safe_load(stored) == written
        assert "<<" not in stored
    assert sent(plato, "/cluster/prefetch") == [{"artifact_id": "a"}]


def test_what_a_snapshot_leaves_out_or_is_told(desk: Desk, plato: LocalPlato) -> None:
    """No target unless one is given, no flows where their file is empty, no logins where none are named."""
    config = desk.work / "plato-config.yml"
    text = config.read_text()
    config.write_text(text[: text.index("      variables:")] + text[text.index("    services:") :])
    (desk.work / "flows.yml").write_text("\n")
    desk.good("start", "-c")
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(desk, artifact_id="a"))
    plato.fault("status", path="*/prefetch", status=500, times=-1)
    done = desk.good("snapshot", "--target", "board.example.com", "--quiet")
    assert done.err == "", "workers that cannot prefetch are no trouble of the user's"
    body = sent(plato, "/snapshot")[-1]
    assert body["target"] == "board.example.com"
    assert not {"flows", "credentials"} & set(body)


def login(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


SECRET = "s3cret-of-the-login"
LOGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "roles": (
        f"credentials: {{default_role: b, roles: {{a: [], b: [{{type: bearer, text: {SECRET}}}]}}}}",
        {"default_role": "b", "roles": {"a": [], "b": [login("bearer", SECRET)]}},
    ),
    "one role": (
        "credentials: {roles: {admin: [{type: username, text: ada},"
        f" {{type: password, text: {SECRET}}}]}}}}",
        {"default_role": "admin", "roles": {"admin": [login("username", "ada"), login("password", SECRET)]}},
    ),
    "older primary and roles": (
        f"credentials: {{primary: {{kind: password, user: a@b.c, password: {SECRET}}},"
        f" roles: {{api: {{kind: token, secret: {SECRET}}}, guest: {{kind: none}}}}}}",
        {
            "default_role": "default",
            "roles": {
                "api": [login("bearer", SECRET)],
                "guest": [],
                "default": [login("email", "a@b.c"), login("password", SECRET)],
            },
        },
    ),
    "variables": (
        f"variables: [{{name: User, value: ada}}, {{name: pass, value: {SECRET}}}]",
        {
            "default_role": "default",
            "roles": {"default": [login("username", "ada"), login("password", SECRET)]},
        },
    ),
    "a token": (
        f"variables: [{{name: api_key, value: {SECRET}}}]",
        {"default_role": "default", "roles": {"default": [login("bearer", SECRET)]}},
    ),
}


def with_metadata(desk: Desk, line: str) -> None:
    (desk.work / "plato-config.yml").write_text(
        f"service: myapp\ndatasets:\n  base:\n    compute: {{}}\n    metadata:\n      {line}\n"
    )


@pytest.mark.long
def test_the_logins_of_a_snapshot(desk: Desk, plato: LocalPlato) -> None:
    with_metadata(desk, "name: A")
    desk.good("start", "-c")
    plato.fault(
        "status", path="*/snapshot", status=200, body=snapshot_answer(desk, artifact_id="a"), times=-1
    )
    for line, expected in LOGINS.values():
        with_metadata(desk, line)
        told = desk.good("snapshot", "--verbose")
        assert sent(plato, "/snapshot")[-1]["credentials"] == expected, line
        assert SECRET not in told.out + told.err


@pytest.mark.sampled
@pytest.mark.parametrize(
    "line",
    [
        f"credentials: {SECRET}",
        "credentials: {roles: {a: b}}",
        f"credentials: {{roles: {{a: [{{type: phone, text: {SECRET}}}]}}}}",
        "credentials: {roles: {a: [{type: password, text: 7}]}}",
        "credentials: {default_role: b, roles: {a: []}}",
    ],
)
def test_logins_that_cannot_be_read(desk: Desk, plato: LocalPlato, line: str) -> None:
    with_metadata(desk, line)
    desk.good("start", "-c")
    result = desk.run("snapshot", "--json")
    assert result.code == 8
    assert "metadata.credentials" in result.error["message"]
    assert SECRET not in result.out + result.err
    assert plato.requests("POST", "/snapshot") == []


def test_flows_that_cannot_be_read_stop_a_snapshot_before_it_is_made(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "-c")
    (desk.work / "flows.yml").unlink()
    result = desk.run("snapshot")
    assert result.code == 8
    assert "flows.yml" in result.err
    assert plato.requests("POST", "/snapshot") == []


def test_a_snapshot_that_fails_says_why(started: Desk, plato: LocalPlato) -> None:
    body = snapshot_answer(started, success=False, error="disk is full")
    plato.fault("status", path="*/snapshot", status=200, body=body)
    result = started.run("snapshot")
    assert result.code == 1
    assert "disk is full" in result.err
    assert "artifact_id" not in started.state


@pytest.mark.sampled
@pytest.mark.parametrize("effect", ["lost_answer", "truncate", "html"])
def test_a_snapshot_whose_answer_is_lost_is_not_sent_again(
    started: Desk, plato: LocalPlato, effect: str
) -> None:
    plato.fault(effect, path="*/snapshot", status=200)
    result = started.run("snapshot", "--json")
    assert result.code == 7
    assert result.error["code"] == "unknown_outcome"
    assert len(plato.requests("POST", "/snapshot")) == 1


def artifact_answer(status: str | None) -> dict[str, Any]:
    return {"artifact_id": "a", **({"status": status} if status else {})}


def test_waiting_for_an_artifact(started: Desk, plato: LocalPlato) -> None:
    started.tune(ARTIFACT_POLL_SECONDS=0.05)
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(started, artifact_id="a"))
    plato.fault("status", path="*/artifacts/a", status=503, body={}, times=1)
    plato.fault("status", path="*/artifacts/a", status=200, body=artifact_answer("creating"), times=3)
    plato.fault("status", path="*/artifacts/a", status=200, body=artifact_answer("ready"), times=-1)
    assert started.good("snapshot", "--wait", "--json").document == {"artifact_id": "a", "status": "ready"}


def test_an_artifact_whose_id_cannot_be_recorded_is_told(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(started, artifact_id="a"))
    command = ["sh", "-c", 'ulimit -f 0; exec "$@"', "-", sys.executable, *started.words("snapshot")]
    result = started.good(command=command)
    assert "Artifact ID: a" in result.out
    assert ".sandbox.yaml was not updated" in result.err


def test_an_artifact_that_fails(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(started, artifact_id="a"))
    plato.fault("status", path="*/artifacts/a", status=200, body=artifact_answer("failed"))
    result = started.run("snapshot", "--wait")
    assert result.code == 1
    assert "failed" in result.err


def test_an_artifact_that_does_not_get_ready(started: Desk, plato: LocalPlato) -> None:
    started.tune(ARTIFACT_POLL_SECONDS=0.05)
    plato.fault("status", path="*/snapshot", status=200, body=snapshot_answer(started, artifact_id="a"))
    plato.fault("status", path="*/artifacts/a", status=200, body=artifact_answer("creating"), times=-1)
    result = started.run("snapshot", "--wait", "--wait-timeout", "1")
    assert result.code == 7
    assert "The artifact is a.\n" in result.err
    assert started.state["artifact_id"] == "a"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("command", "path"),
    [("state", "/state"), ("reset", "/reset"), ("snapshot", "/snapshot"), ("clear-audit", "/cleanup")],
)
@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_errors_of_the_api(started: Desk, plato: LocalPlato, command: str, path: str, status: int) -> None:
    plato.fault(
        "status",
        path=f"*{path}",
        status=status,
        body={"detail": "said so"},
        headers={"Retry-After": "60"},
        times=-1,
    )
    result = started.run(command, "--json")
    assert result.code == (4 if status in (401, 403) else 6)
    assert "said so" in result.error["message"]
    assert json.loads(result.out)
    assert started.state["session_id"]
