"""`status` tells what is known, whatever fails; `stop` closes first, removes then, and harms nobody else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import pytest
import yaml
from conftest import Desk, Result, eventually, is_running, living, part

import plato_sandbox as product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localplato import LocalPlato

BLANK = ["--blank", "--service", "myapp"]
HEARTBEAT_KEYS = {"state", "pid", "last_ok", "last_error", "last_error_at", "failures", "ended"}
NO_SUCH_PID = 4194303


def ask(plato: LocalPlato, method: str, path: str) -> Any:
    """What another client of the same account does: one request to the API."""
    request = urllib.request.Request(
        plato.base_url + path, method=method, headers={"X-API-Key": plato.api_key}
    )
    with plato.opener.open(request, timeout=30) as response:
        return json.load(response)


def record_of(desk: Desk) -> Path:
    return desk.plato_home / f"heartbeat_{desk.state['session_id'].split('-')[0]}.log"


def end_heartbeat_of(desk: Desk) -> int:
    """Kill the desk's heartbeat as a crash would; its pid."""
    pid = int(desk.state["heartbeat_pid"])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))
    return pid


def change_state(desk: Desk, **changes: Any) -> None:
    """Rewrite the desk's record as another client would."""
    state = {name: value for name, value in {**desk.state, **changes}.items() if value is not None}
    desk.state_file.write_text(yaml.dump(state))


@pytest.fixture
def started(desk: Desk) -> Desk:
    """A desk with a running blank sandbox."""
    desk.good("start", *BLANK)
    return desk


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Processes of somebody else: `process("sleep", "600")`."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        return made[-1]

    yield start
    for item in made:
        if item.poll() is None:
            item.kill()
        item.wait()


# status: every line and every key

SHOWN = {
    "config": (["-c"], {"Mode": "config", "Service": "taskboard", "Dataset": "base"}),
    "simulator": (
        ["-s", "espocrm:staging"],
        {"Mode": "artifact", "Simulator": "espocrm:staging", "Service": "espocrm", "Dataset": "base"},
    ),
    "artifact": (
        ["-a", "art_abc123"],
        {"Mode": "artifact", "Artifact ID": "art_abc123", "Service": "espocrm"},
    ),
    "blank": (BLANK, {"Mode": "blank", "Service": "myapp"}),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "fields"), SHOWN.values(), ids=SHOWN)
def test_status_shows_every_line(visitor: Desk, arguments: list[str], fields: dict[str, str]) -> None:
    visitor.good("start", *arguments)
    state = visitor.state
    status = visitor.good("status")
    assert status.err == ""
    lines = status.out.splitlines()
    assert lines[0] == "Sandbox Status"
    expected = {
        "Session ID": state["session_id"],
        "Job ID": state["job_id"],
        "VM Status": "running",
        "Public URL": f"{state['public_url']}?_plato_router_target={fields['Service']}.web.plato.so",
        "SSH": f"ssh -F ~/.plato/{os.path.basename(state['ssh_config_path'])} {state['ssh_host']}",
        "Heartbeat": f"running (PID: {state['heartbeat_pid']})",
        **fields,
    }
    for label, value in expected.items():
        assert f"  {label + ':':<13}{value}" in lines
    labels = [line[2:].partition(":")[0] for line in lines[1:]]
    specified = ["Session ID", "Job ID", "Mode", "VM Status", "Service", "Public URL", "SSH", "Heartbeat"]
    assert [label for label in labels if label in specified] == specified
    assert state["url"] == expected["Public URL"]
    visitor.good("stop")


@pytest.mark.sampled
@pytest.mark.parametrize("arguments", [arguments for arguments, _ in SHOWN.values()], ids=SHOWN)
def test_status_as_json(visitor: Desk, arguments: list[str]) -> None:
    visitor.good("start", *arguments)
    before, state = visitor.state_file.stat(), visitor.state
    document = visitor.good("status", "--json").document
    added = {"vm_status", "vm_status_reason", "vm_running", "ssh_command", "heartbeat", "ends"}
    assert set(document) == set(state) | added
    assert {name: document[name] for name in state} == state
    assert (document["vm_status"], document["vm_status_reason"], document["vm_running"]) == (
        "running",
        None,
        True,
    )
    assert document["ssh_command"] == f"ssh -F {state['ssh_config_path']} {state['ssh_host']}"
    assert set(document["heartbeat"]) == HEARTBEAT_KEYS
    assert (document["heartbeat"]["state"], document["heartbeat"]["pid"]) == ("ok", state["heartbeat_pid"])
    after = visitor.state_file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    visitor.good("stop")


@pytest.mark.parametrize("command", ["status", "stop"])
def test_no_sandbox_here(visitor: Desk, command: str) -> None:
    result = visitor.run(command, "--json")
    assert result.code == 3
    assert result.error["code"] == "no_sandbox"
    assert str(visitor.work) in result.error["message"]
    assert " start" in result.error["hint"]
    assert visitor.run(command).out == ""


@pytest.mark.parametrize("command", ["status", "stop"])
@pytest.mark.parametrize("place", ["nowhere", "plato-config.yml"], ids=["missing", "a file"])
def test_no_such_directory(visitor: Desk, command: str, place: str) -> None:
    result = visitor.run(command, "--json", "-w", place)
    assert (result.code, result.error["code"]) == (2, "usage")
    assert place in result.error["message"]


@pytest.mark.sampled
@pytest.mark.parametrize("command", ["status", "stop"])
def test_no_key(started: Desk, command: str) -> None:
    before = started.state_file.read_bytes()
    result = started.run(command, "--json", environment={"PLATO_API_KEY": ""})
    assert (result.code, result.error["code"]) == (4, "authentication")
    assert started.state_file.read_bytes() == before
    if command == "status":  # what is known without asking is shown all the same
        assert result.document["session_id"] == started.state["session_id"]


# status: the VM is gone


def answers_404(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", method="GET", path="*/sessions/*", status=404, times=-1)


def answers_410(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", method="GET", path="*/sessions/*", status=410, times=-1)


def closed_elsewhere(desk: Desk, plato: LocalPlato) -> None:
    ask(plato, "POST", f"/api/v2/sessions/{desk.state['session_id']}/close")


def died(desk: Desk, plato: LocalPlato) -> None:
    os.kill(plato.machines()[0]["pid"], signal.SIGKILL)
    plato.wait_for(lambda snapshot: snapshot["sessions"][0]["jobs"][0]["status"] == "failed")


def lifetime_over(desk: Desk, plato: LocalPlato) -> None:
    plato.advance(8 * 3600 + 1)


def without_heartbeats(desk: Desk, plato: LocalPlato) -> None:
    end_heartbeat_of(desk)
    plato.advance(130)


GONE: dict[str, tuple[Callable[[Desk, LocalPlato], None], str, str]] = {
    "404": (answers_404, "gone", ""),
    "410": (answers_410, "gone", ""),
    "closed elsewhere": (closed_elsewhere, "completed", "closed"),
    "died": (died, "failed", "stopped unexpectedly"),
    "lifetime over": (lifetime_over, "timeout", "lifetime"),
    "no heartbeats": (without_heartbeats, "failed", "heartbeat miss"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("happen", "word", "why"), GONE.values(), ids=GONE)
def test_status_of_a_vm_that_is_gone(
    started: Desk, plato: LocalPlato, happen: Callable[[Desk, LocalPlato], None], word: str, why: str
) -> None:
    happen(started, plato)
    before = started.state_file.read_bytes()
    status = started.run("status")
    assert status.code == 3
    for line in (
        "Sandbox Status\n",
        f"  Session ID:  {started.state['session_id']}\n",
        f"  Job ID:      {started.state['job_id']}\n",
        f"  VM Status:   {word}\n",
        "  Heartbeat:   ",
    ):
        assert line in status.out
    assert why in status.out
    assert "gone" in status.err
    assert " stop" in status.err
    told = started.run("status", "--json")
    assert (told.code, told.error["code"]) == (3, "no_sandbox")
    assert (told.document["vm_status"], told.document["vm_running"]) == (word, False)
    assert told.document["session_id"] == started.state["session_id"]
    assert started.state_file.read_bytes() == before


@pytest.mark.sampled
@pytest.mark.parametrize(("happen", "word", "why"), GONE.values(), ids=GONE)
def test_stop_of_a_vm_that_is_gone(
    started: Desk, plato: LocalPlato, happen: Callable[[Desk, LocalPlato], None], word: str, why: str
) -> None:
    heartbeat = started.state["heartbeat_pid"]
    happen(started, plato)
    plato.clear_faults()
    if word == "gone":
        plato.fault("status", path="*/close", status=int(happen.__name__[-3:]))
    document = started.good("stop", "--json").document
    assert document["already_gone"] is (word == "gone")
    assert started.leftovers() == []
    assert not is_running(heartbeat)


# status: the API cannot tell

TROUBLE: dict[str, tuple[dict[str, Any], int, str]] = {
    "401": ({"effect": "status", "status": 401}, 4, "401"),
    "403": ({"effect": "status", "status": 403}, 4, "403"),
    "422": ({"effect": "status", "status": 422}, 6, "422"),
    "500": ({"effect": "status", "status": 500}, 6, "500"),
    "503": ({"effect": "status", "status": 503}, 6, "503"),
    "HTML": ({"effect": "html", "status": 200}, 6, "text/html"),
    "half an answer": ({"effect": "truncate", "bytes": 20}, 6, ""),
    "a list": ({"effect": "status", "status": 200, "body": [1]}, 6, "not the JSON"),
    "reset": ({"effect": "reset_before_acting"}, 6, ""),
    "hang": ({"effect": "hang"}, 6, "timed out"),
    "drip": ({"effect": "drip", "seconds": 60}, 6, "timed out"),
}


@pytest.mark.long
@pytest.mark.parametrize(("fault", "code", "named"), TROUBLE.values(), ids=TROUBLE)
def test_status_shows_what_is_known(
    started: Desk, plato: LocalPlato, fault: dict[str, Any], code: int, named: str
) -> None:
    started.tune(REQUEST_SECONDS=1.0, RETRY_SECONDS=())
    plato.fault(**fault, method="GET", path="*/sessions/*", times=-1)
    before, state = started.state_file.read_bytes(), started.state
    status = started.run("status")
    assert status.code == code
    for line in (
        f"  Session ID:  {state['session_id']}\n",
        "  VM Status:   unreachable\n",
        "  Service:     myapp\n",
        f"  Heartbeat:   running (PID: {state['heartbeat_pid']})\n",
    ):
        assert line in status.out
    assert named in status.err
    told = started.run("status", "--json")
    assert told.code == code
    assert told.error["message"]
    assert {name: told.document[name] for name in state} == state
    assert started.state_file.read_bytes() == before


@pytest.mark.long
def test_status_without_a_server(started: Desk, plato: LocalPlato) -> None:
    started.tune(RETRY_SECONDS=())
    plato.kill()
    status = started.run("status")
    assert status.code == 6
    assert "  VM Status:   unreachable\n" in status.out
    assert started.run("status", "--json").error["code"] == "network"


@pytest.mark.long
def test_status_outlasts_a_hiccup(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", method="GET", path="*/sessions/*", status=503, times=2)
    assert "  VM Status:   running\n" in started.good("status").out


@pytest.mark.long
def test_status_waits_for_a_slow_answer(started: Desk, plato: LocalPlato) -> None:
    plato.fault("latency", method="GET", path="*/sessions/*", seconds=1.5)
    assert "  VM Status:   running\n" in started.good("status").out


SHAPES: dict[str, tuple[dict[str, Any], str, bool, int]] = {
    "status at the top": ({"status": "running"}, "running", True, 0),
    "status in envs": ({"envs": [{"job_id": "x", "status": "active"}]}, "active", True, 0),
    "queued": ({"jobs": [{"status": "queued"}]}, "queued", False, 0),
    "a job that failed": ({"jobs": [{"status": "failed", "status_reason": "disk"}]}, "failed", False, 3),
    "cancelled": ({"jobs": [{"status": "cancelled"}]}, "cancelled", False, 3),
    "timeout in capitals": ({"jobs": [{"status": "TIMEOUT"}]}, "TIMEOUT", False, 3),
    "our job among others": (
        {"jobs": [{"job_id": "x", "status": "failed"}, {"public_id": "JOB", "status": "running"}]},
        "running",
        True,
        0,
    ),
    "a word of a later version": ({"jobs": [{"status": "hibernating"}]}, "hibernating", False, 0),
    "wrong types": ({"jobs": [None, 3, {"status": 5}], "status": "running"}, "running", True, 0),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("body", "word", "running", "code"), SHAPES.values(), ids=SHAPES)
def test_status_of_other_servers(
    started: Desk, plato: LocalPlato, body: dict[str, Any], word: str, running: bool, code: int
) -> None:
    told = json.loads(json.dumps(body).replace("JOB", started.state["job_id"]))
    plato.fault("status", method="GET", path="*/sessions/*", status=200, body={"session_id": "x", **told})
    result = started.run("status", "--json")
    assert result.code == code
    assert (result.document["vm_status"], result.document["vm_running"]) == (word, running)


# status: the heartbeat


def test_status_of_a_dead_heartbeat(started: Desk) -> None:
    pid = end_heartbeat_of(started)
    status = started.good("status")
    assert "  VM Status:   running\n" in status.out
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in status.out
    assert "  Last beat:   " in status.out
    assert re.search(
        r"The VM ends in about (1:\d+ min|\d+ s) without a heartbeat; any use, such as `.* state`, revives",
        status.out,
    )
    health = started.good("status", "--json").document["heartbeat"]
    assert (health["state"], health["pid"]) == ("dead", pid)


@pytest.mark.long
def test_status_of_failing_beats(started: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/heartbeat", status=500, body={"detail": "no room"}, times=-1)
    eventually(lambda: started.heartbeat_record()["failures"] >= 2)
    status = started.good("status")
    assert f"  Heartbeat:   running (PID: {started.state['heartbeat_pid']})\n" in status.out
    assert "no room" in status.out
    health = started.good("status", "--json").document["heartbeat"]
    assert health["failures"] >= 2
    assert "no room" in health["last_error"]
    plato.clear_faults()
    eventually(lambda: started.heartbeat_record()["failures"] == 0)
    assert started.good("status", "--json").document["heartbeat"]["last_error"] is None


@pytest.mark.long
def test_status_of_a_heartbeat_that_beats_no_more(started: Desk) -> None:
    pid = started.state["heartbeat_pid"]
    os.kill(pid, signal.SIGSTOP)
    lines = record_of(started).read_text().splitlines()
    truth = {
        **json.loads(lines[0]),
        "last_ok": 1_700_000_000,
        "last_error": "late",
        "last_error_at": 1_700_000_001,
    }
    record_of(started).write_text("\n".join([json.dumps(truth), *lines[1:]]) + "\n")
    health = started.good("status", "--json").document["heartbeat"]
    assert (health["state"], health["pid"]) == ("degraded", pid)
    assert (health["last_ok"], health["last_error"]) == ("2023-11-14T22:13:20+00:00", "late")
    assert f"  Heartbeat:   running (PID: {pid})\n" in started.good("status").out
    started.good("stop")
    eventually(lambda: not is_running(pid))


@pytest.mark.long
def test_status_of_a_heartbeat_that_ended_with_its_vm(started: Desk, plato: LocalPlato) -> None:
    pid = started.state["heartbeat_pid"]
    closed_elsewhere(started, plato)
    eventually(lambda: not is_running(pid))
    status = started.run("status")
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in status.out
    assert started.run("status", "--json").document["heartbeat"]["state"] == "expired"


@pytest.mark.sampled
@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"[1]\n", b"{\n", b"\xff\xfe\n", b'{"pid": "x"}\n'])
def test_status_with_a_damaged_heartbeat_record(started: Desk, content: bytes) -> None:
    end_heartbeat_of(started)
    record_of(started).write_bytes(content)
    status = started.good("status", "--json").document
    assert status["heartbeat"]["state"] == "dead"
    started.good("stop")
    assert started.leftovers() == []


# status: what moved


def test_status_leaves_a_config_of_somebody_else(started: Desk) -> None:
    config = started.state["ssh_config_path"]
    with open(config, "w") as file:
        file.write(f"Host {started.state['ssh_host']}\n    ProxyCommand nothing\n")
    started.good("status")
    with open(config) as file:
        assert "ProxyCommand nothing" in file.read()


# stop: close first, then remove

REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "500": ({"effect": "status", "status": 500}, 6),
    "409": ({"effect": "status", "status": 409}, 6),
    "401": ({"effect": "status", "status": 401}, 4),
    "403": ({"effect": "status", "status": 403}, 4),
    "reset": ({"effect": "reset_before_acting"}, 6),
    "no answer": ({"effect": "hang"}, 6),
    "HTML": ({"effect": "html", "status": 200}, 6),
    "an empty list": ({"effect": "status", "status": 200, "body": []}, 6),
    "success is false": (
        {"effect": "status", "status": 200, "body": {"success": False, "message": "busy", "session_id": "x"}},
        6,
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("fault", "code"), REFUSED.values(), ids=REFUSED)
def test_a_close_that_fails_loses_nothing(
    started: Desk, plato: LocalPlato, fault: dict[str, Any], code: int
) -> None:
    started.tune(CLOSE_SECONDS=1.0, RETRY_SECONDS=())
    plato.fault(**fault, path="*/close", times=-1)
    before, state = started.state_file.read_bytes(), started.state
    files = {path.name for path in started.plato_home.iterdir()}
    result = started.run("stop", "--json")
    assert result.code == code
    assert result.error["message"]
    assert started.state_file.read_bytes() == before
    assert {path.name for path in started.plato_home.iterdir()} == files
    assert is_running(state["heartbeat_pid"])
    assert living(plato) == [state["job_id"]]
    beats = len(plato.requests("POST", "/heartbeat"))
    plato.wait_for_request("POST", "/heartbeat", count=beats + 1)

    plato.clear_faults()
    assert started.good("stop").out == "Sandbox stopped successfully.\n"
    assert living(plato) == []
    assert started.leftovers() == []
    assert not is_running(state["heartbeat_pid"])


def test_a_lost_answer_to_close_is_asked_for_again(started: Desk, plato: LocalPlato) -> None:
    plato.fault("lost_answer", path="*/close")
    started.good("stop")
    assert len(plato.requests("POST", "/close")) == 2
    assert started.leftovers() == []


def test_a_close_that_says_no_to_a_vm_that_is_over(started: Desk, plato: LocalPlato) -> None:
    closed_elsewhere(started, plato)
    plato.fault("status", path="*/close", status=200, body={"success": False, "message": "over"}, times=-1)
    assert started.good("stop", "--json").document["already_gone"] is True
    assert started.leftovers() == []


def test_the_order_of_stop(started: Desk, plato: LocalPlato) -> None:
    """While the close is under way everything is still there."""
    plato.fault("hang", path="*/close")
    heartbeat, files = started.state["heartbeat_pid"], sorted(started.leftovers())
    process = started.begin("stop")
    plato.wait_for_request("POST", "/close")
    assert sorted(started.leftovers()) == files
    assert is_running(heartbeat)
    process.kill()
    process.wait()
    started.good("stop")
    assert started.leftovers() == []


def test_stop_with_a_dead_heartbeat(started: Desk, plato: LocalPlato) -> None:
    end_heartbeat_of(started)
    assert started.good("stop").out == "Sandbox stopped successfully.\n"
    assert living(plato) == []
    assert started.leftovers() == []


def test_stop_twice(started: Desk) -> None:
    session_id = started.state["session_id"]
    document = started.good("stop", "--json").document
    assert document == {"stopped": True, "session_id": session_id, "already_gone": False}
    again = started.run("stop", "--json")
    assert (again.code, again.error["code"]) == (3, "no_sandbox")


def test_stop_without_any_files_of_plato_home(started: Desk, plato: LocalPlato) -> None:
    pid = started.state["heartbeat_pid"]
    shutil.rmtree(started.plato_home)
    started.good("stop")
    assert living(plato) == []
    assert started.leftovers() == []
    eventually(lambda: not is_running(pid))


@pytest.mark.long
def test_stop_keeps_what_belongs_to_other_sandboxes(visitor: Desk, shared_plato: LocalPlato) -> None:
    other = visitor.place / "other"
    other.mkdir()
    visitor.good("start", *BLANK)
    visitor.good("start", *BLANK, "-w", str(other))
    kept = yaml.safe_load((other / ".sandbox.yaml").read_text())
    theirs = (kept["session_id"].split("-")[0], "child_")
    files = {path.name for path in visitor.plato_home.iterdir() if any(word in path.name for word in theirs)}
    visitor.good("stop")
    assert {path.name for path in visitor.plato_home.iterdir()} == files
    assert len(files) >= 4
    assert is_running(kept["heartbeat_pid"])
    assert kept["job_id"] in living(shared_plato)
    visitor.good("stop", "-w", str(other))


# stop --session-id


@pytest.mark.long
def test_stop_by_id_from_another_directory(started: Desk, plato: LocalPlato) -> None:
    state = started.state
    elsewhere = started.place / "elsewhere"
    elsewhere.mkdir()
    before = started.state_file.read_bytes()
    result = started.good("stop", "--session-id", state["session_id"], "--json", directory=elsewhere)
    assert result.document == {"stopped": True, "session_id": state["session_id"], "already_gone": False}
    assert living(plato) == []
    assert not is_running(state["heartbeat_pid"])
    assert list(started.plato_home.iterdir()) == []
    assert started.state_file.read_bytes() == before
    assert started.run("status").code == 3
    started.good("stop")
    assert started.leftovers() == []


def test_stop_by_id_without_any_files(
    started: Desk, plato: LocalPlato, new_desk: Callable[..., Desk]
) -> None:
    somebody = new_desk(plato.environment)
    assert somebody.good("stop", "--session-id", started.state["session_id"]).code == 0
    assert living(plato) == []
    assert somebody.leftovers() == []
    assert not somebody.plato_home.exists()


def test_stop_by_id_with_white_space_around_it(started: Desk, plato: LocalPlato) -> None:
    started.good("stop", "--session-id", f" {started.state['session_id']}\n")
    assert living(plato) == []
    assert started.leftovers() == []


def test_stop_by_id_in_its_own_directory(started: Desk, plato: LocalPlato) -> None:
    started.good("stop", "--session-id", started.state["session_id"])
    assert living(plato) == []
    assert started.leftovers() == []


def test_stop_by_id_leaves_another_sandbox_of_this_directory(started: Desk, plato: LocalPlato) -> None:
    here = started.state
    other = started.place / "other"
    other.mkdir()
    started.good("start", *BLANK, "-w", str(other))
    there = yaml.safe_load((other / ".sandbox.yaml").read_text())
    before = started.state_file.read_bytes()
    started.good("stop", "--session-id", there["session_id"])
    assert started.state_file.read_bytes() == before
    assert living(plato) == [here["job_id"]]
    assert is_running(here["heartbeat_pid"])
    assert not is_running(there["heartbeat_pid"])


@pytest.mark.sampled
@pytest.mark.parametrize("session_id", ["nonesuch", "../../x", "a b/c?d#e", "%2e%2e", "é", "-x"])
def test_stop_by_an_id_that_plato_does_not_know(visitor: Desk, session_id: str) -> None:
    """A typing error must not pass for a VM that was stopped; what is left here of one that is gone goes."""
    result: Result = visitor.run("stop", f"--session-id={session_id}", "--json")
    assert result.code == 3
    assert "nothing was stopped" in result.error["message"]
    log = Path(product.heartbeat_path(str(visitor.plato_home), session_id))
    log.parent.mkdir(exist_ok=True)
    log.write_text("{}\n")
    result = visitor.good("stop", f"--session-id={session_id}", "--json")
    assert result.document == {"stopped": True, "session_id": session_id, "already_gone": True}
    assert not log.exists()


def test_a_directory_below_that_of_a_sandbox(started: Desk) -> None:
    below = started.work / "src" / "deep"
    below.mkdir(parents=True)
    result = started.run("status", directory=below)
    assert result.code == 3
    assert f"There is one in {started.work}" in result.err


# stop: nobody else is harmed


@pytest.mark.long
@pytest.mark.parametrize("record", ["removed", "naming it too"])
def test_an_innocent_process_survives(started: Desk, process: Any, record: str) -> None:
    end_heartbeat_of(started)
    innocent = process("sleep", "600")
    change_state(started, heartbeat_pid=innocent.pid)
    if record == "removed":
        record_of(started).unlink()
    else:
        truth = {**started.heartbeat_record(), "pid": innocent.pid}
        record_of(started).write_text(json.dumps(truth) + "\n")
    status = started.good("status").out
    assert f"  Heartbeat:   stopped (PID: {innocent.pid} not found)\n" in status
    started.good("stop")
    assert innocent.poll() is None
    assert started.leftovers() == []


@pytest.mark.sampled
@pytest.mark.parametrize("words", ["heartbeat of another session", "{session_id}"])
def test_a_process_that_only_resembles_a_heartbeat_survives(started: Desk, process: Any, words: str) -> None:
    end_heartbeat_of(started)
    record_of(started).unlink()
    session_id = started.state["session_id"]
    code = f"import time; '''{words.format(session_id=session_id)}'''; time.sleep(600)"
    innocent = process(sys.executable, "-c", code)
    change_state(started, heartbeat_pid=innocent.pid)
    started.good("stop")
    assert innocent.poll() is None


@pytest.mark.sampled
@pytest.mark.parametrize("pid", [0, 1, -1, NO_SUCH_PID, 2**40, "text", True, 1.5])
def test_any_pid_in_the_record(started: Desk, pid: Any) -> None:
    end_heartbeat_of(started)
    record_of(started).unlink()
    change_state(started, heartbeat_pid=pid)
    assert started.good("status", "--json").document["heartbeat"]["state"] == "dead"
    started.good("stop")
    assert started.leftovers() == []


def test_the_heartbeat_of_another_client_is_ended(started: Desk, plato: LocalPlato, process: Any) -> None:
    end_heartbeat_of(started)
    record_of(started).unlink()
    path = f"/api/v2/sessions/{started.state['session_id']}/heartbeat"
    code = f"import time\nurl = '{path}'\nwhile True:\n    time.sleep(30)\n"
    theirs = process(sys.executable, "-c", code)
    change_state(started, heartbeat_pid=theirs.pid, base_url=None, expires_at=None)
    eventually(lambda: b"heartbeat" in (started.place / f"/proc/{theirs.pid}/cmdline").read_bytes())
    assert f"  Heartbeat:   running (PID: {theirs.pid})\n" in started.good("status").out
    started.good("stop")
    assert theirs.wait(20) == -signal.SIGTERM
    assert living(plato) == []
    assert started.leftovers() == []


@pytest.mark.long
def test_files_that_the_record_names_elsewhere_are_kept(started: Desk) -> None:
    secrets = started.home / ".ssh"
    secrets.mkdir()
    pairs = [
        (secrets / "config", secrets / "id_ed25519"),
        (secrets / "ssh_1234.conf", secrets / "ssh_1234_key"),
        (started.plato_home / "notes.conf", started.plato_home / ".." / ".ssh" / "ssh_1234_key"),
        (started.plato_home / "ssh_a b.conf", started.plato_home / "key"),
    ]
    named = {
        path.resolve() for config, key in pairs for path in (config, key, key.with_name(key.name + ".pub"))
    }
    for path in named:
        path.write_text("precious")
    for config, key in pairs:
        change_state(started, ssh_config_path=str(config), ssh_private_key_path=str(key))
        started.good("status")
        started.good("stop")
        started.good("start", *BLANK)
    assert {path: path.read_text() for path in named} == dict.fromkeys(named, "precious")


IN_THE_VM = [
    "sync", "sync --via ssh", "start-services", "start-services --via sync", "start-worker --wait", "state",
    "reset", "snapshot", "clear-audit", "flow",
]  # fmt: skip


def test_every_command_says_that_the_vm_is_gone(desk: Desk, plato: LocalPlato) -> None:
    part("git", "git")  # of the repositories that `start-services` looks for
    desk.good("start", "-c", environment={"PLATO_HEARTBEAT_INTERVAL_SECONDS": "3600"})
    plato.advance(20 * 3600)
    for command in IN_THE_VM:
        result = desk.run(*command.split(), "--json")
        assert (result.code, result.error["code"]) == (3, "no_sandbox"), (command, result)
