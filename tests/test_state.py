""".sandbox.yaml: what is in it, who can read it, and that a damaged one is never taken for "no sandbox"."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import Desk, living

import plato_sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from localplato import LocalPlato

BLANK = ["--blank", "--service", "myapp"]

SPECIFIED = {
    *("session_id", "job_id", "public_url", "url", "mode", "service", "ssh_host", "ssh_config_path"),
    *("heartbeat_pid", "created_at"),
}
OURS = {
    "ssh_private_key_path",
    "base_url",
    "expires_at",
    "directory",
}  # on the real Plato there is no base_url
SIZES = {"cpus", "memory", "disk"}
NUMBERS = {"app_port", *SIZES}
KEYS = {
    "config": (["-c"], {"dataset", "plato_config_path", "app_port", "provider", *SIZES}),
    "simulator": (["-s", "espocrm"], {"dataset", "simulator", "tag", "provider"}),
    "artifact": (["-a", "art_abc123"], {"dataset", "artifact_id", "provider"}),
    "blank": (BLANK, {"provider", *SIZES}),
}

# A file as `plato` 2.0.x writes it: sorted keys, nulls, no base URL.
FOREIGN = {
    "artifact_id": None,
    "cpus": 2,
    "created_at": "2026-01-02T03:04:05.678901+00:00",
    "dataset": "base",
    "disk": 10240,
    "heartbeat_pid": 4194303,
    "job_id": "1c9d1c7e-93a5-4e53-a4f2-8f6f2c8f3d21",
    "memory": 1024,
    "mode": "blank",
    "plato_config_path": None,
    "public_url": "https://1c9d1c7e-93a5-4e53-a4f2-8f6f2c8f3d21.sims.plato.so",
    "service": "myapp",
    "session_id": "0b8f7a52-6c7e-4f7e-9a40-5d0c6f1f2a11",
    "simulator": None,
    "ssh_config_path": "/home/someone/.plato/ssh_0b8f7a52.conf",
    "ssh_host": "sandbox-0b8f7a52",
    "ssh_private_key_path": "/home/someone/.plato/ssh_0b8f7a52_key",
    "tag": None,
    "url": "https://1c9d1c7e-93a5-4e53-a4f2-8f6f2c8f3d21.sims.plato.so?_plato_router_target=myapp.web.plato.so",
}

# What the specification shows, byte for byte: `~` in a path, a time that YAML reads as one.
SPECIFIED_FILE = """\
session_id: abc123-def456
job_id: job-789
public_url: https://job-789.sims.plato.so
url: https://job-789.sims.plato.so?_plato_router_target=service.web.plato.so
mode: config
service: docuseal
dataset: base
plato_config_path: /path/to/plato-config.yml
ssh_host: sandbox-abc123
ssh_config_path: ~/.plato/ssh_abc123.conf
heartbeat_pid: 1234567
created_at: 2024-01-01T00:00:00+00:00
"""


def sdk_text(state: dict[str, Any]) -> str:
    return yaml.dump(state, default_flow_style=False, sort_keys=True)


def as_sdk_file(desk: Desk, **changes: Any) -> dict[str, Any]:
    """Rewrite the desk's record as `plato` 2.0.x would have written it."""
    ours = {
        name: value
        for name, value in desk.state.items()
        if name not in ("base_url", "expires_at", "directory")
    }
    state = {**dict.fromkeys(FOREIGN), **ours, **changes}
    desk.state_file.write_text(sdk_text(state))
    return state


# What is in it


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "keys"), KEYS.values(), ids=KEYS)
def test_keys_of_the_record(visitor: Desk, arguments: list[str], keys: set[str]) -> None:
    visitor.good("start", *arguments)
    state = visitor.state
    assert set(state) == SPECIFIED | OURS | keys
    assert {name for name, value in state.items() if isinstance(value, int)} == {"heartbeat_pid"} | (
        NUMBERS & keys
    )
    assert all(isinstance(value, (str, int)) for value in state.values())
    for name in ("created_at", "expires_at"):
        assert isinstance(state[name], str)
        assert yaml.safe_load(state[name]).utcoffset().total_seconds() == 0
    for name in ("ssh_config_path", "ssh_private_key_path"):
        assert os.path.isabs(state[name])
        assert stat.S_IMODE(os.stat(state[name]).st_mode) == 0o600
    assert state["ssh_host"] == f"sandbox-{state['session_id'].split('-')[0]}"
    visitor.good("stop")


def test_only_the_owner_may_read_it(visitor: Desk) -> None:
    before = os.umask(0)
    try:
        visitor.good("start", *BLANK)
    finally:
        os.umask(before)
    assert stat.S_IMODE(visitor.state_file.stat().st_mode) == 0o600
    assert [path.name for path in visitor.work.iterdir() if path.name.startswith(".")] == [".sandbox.yaml"]
    visitor.good("stop")


def test_no_key_in_any_file(visitor: Desk) -> None:
    visitor.good("start", "-c")
    visitor.run("start", "-c")
    key = visitor.environment["PLATO_API_KEY"].encode()
    files = [path for path in visitor.paths() if path.is_file()]
    assert {".sandbox.yaml", "plato-config.yml"} < {path.name for path in files}
    assert [path for path in files if key in path.read_bytes()] == []
    visitor.good("stop")


def test_a_record_may_be_read_only(visitor: Desk) -> None:
    visitor.good("start", *BLANK)
    visitor.state_file.chmod(0o400)
    before = visitor.state_file.read_bytes()
    visitor.good("status")
    assert visitor.run("start", *BLANK).code == 5
    assert visitor.state_file.read_bytes() == before
    visitor.good("stop")
    assert visitor.leftovers() == []


# Another client's


def test_the_file_of_another_client(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    state = as_sdk_file(desk, created_at="2026-01-02T03:04:05.678901+00:00")
    before = desk.state_file.read_bytes()

    status = desk.good("status")
    for line in (
        f"  Session ID:  {state['session_id']}\n",
        f"  Job ID:      {state['job_id']}\n",
        "  VM Status:   running\n",
        f"  Heartbeat:   running (PID: {state['heartbeat_pid']})\n",
    ):
        assert line in status.out
    assert desk.run("start", *BLANK).code == 5
    assert desk.state_file.read_bytes() == before

    desk.good("stop")
    assert living(plato) == []
    assert desk.leftovers() == []


@pytest.mark.parametrize(
    "text", [SPECIFIED_FILE, sdk_text(FOREIGN)], ids=["of the specification", "of the SDK"]
)
def test_a_record_of_a_vm_that_is_gone(visitor: Desk, text: str) -> None:
    visitor.state_file.write_text(text)
    status = visitor.run("status", "--json")
    assert status.code == 3
    assert status.error["code"] == "no_sandbox"
    written = yaml.safe_load(text)
    assert status.document["session_id"] == written["session_id"]
    assert status.document["created_at"].startswith(str(written["created_at"])[:10])
    human = visitor.run("status")
    assert f"  Heartbeat:   stopped (PID: {written['heartbeat_pid']} not found)\n" in human.out
    assert f"  SSH:         ssh -F {written['ssh_config_path']} {written['ssh_host']}\n" in human.out
    assert visitor.state_file.read_text() == text
    assert visitor.good("stop", "--json").document["already_gone"] is True
    assert visitor.leftovers() == []


def test_empty_texts_are_no_damage(visitor: Desk) -> None:
    visitor.good("start", *BLANK)
    as_sdk_file(visitor, public_url="", dataset="")
    visitor.good("status")
    visitor.good("stop")


def test_start_goes_ahead_over_the_record_of_a_gone_vm(visitor: Desk) -> None:
    visitor.state_file.write_text(sdk_text(FOREIGN))
    assert "gone" in visitor.good("start", *BLANK).err
    assert visitor.state["session_id"] != FOREIGN["session_id"]
    visitor.good("stop")


# Damaged

WHOLE = plato_sandbox.STATE_FIRST_LINE + sdk_text(FOREIGN) + plato_sandbox.STATE_LAST_LINE

DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\n",
    "zeros": bytes(512),
    "not text": b"session_id: caf\xe9\n",
    "sixteen bits": WHOLE.encode("utf-16"),
    "a list": b"- session_id: x\n",
    "a word": b"sandbox\n",
    "null": b"~\n",
    "comments only": b"# nothing\n",
    "no session_id": b"job_id: x\nmode: blank\n",
    "session_id is null": b"session_id: ~\njob_id: x\n",
    "session_id is empty": b"session_id: ''\njob_id: x\n",
    "session_id is a number": b"session_id: 12\njob_id: x\n",
    "session_id is a list": b"session_id: [x]\njob_id: x\n",
    "job_id is a map": b"session_id: abc\njob_id: {a: b}\n",
    "a tab": b"session_id: abc\n\tjob_id: x\n",
    "a key twice": b"session_id: abc\nsession_id: def\n",
    "cut in the first line": WHOLE.encode()[:20],
    "cut after the first line": plato_sandbox.STATE_FIRST_LINE.encode(),
    "cut in the middle": WHOLE.encode()[: len(WHOLE) // 2],
    "cut before the last line": WHOLE.encode()[: -len(plato_sandbox.STATE_LAST_LINE)],
    "cut in the last line": WHOLE.encode()[:-3],
    "the SDK's, cut in a line": sdk_text(FOREIGN).encode()[:-3],
    "the SDK's, cut before session_id": sdk_text(FOREIGN).partition("session_id")[0].encode(),
    "conflict of a merge": b"<<<<<<< ours\nsession_id: abc\n=======\nsession_id: def\n>>>>>>> theirs\n",
}
COMMANDS = (["status"], ["stop"], ["start", *BLANK], ["start", *BLANK, "--replace"])


@pytest.mark.sampled
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused_and_kept(
    visitor: Desk, shared_plato: LocalPlato, content: bytes
) -> None:
    visitor.state_file.write_bytes(content)
    before = len(shared_plato.requests())
    for command in COMMANDS:
        result = visitor.run(*command, "--json")
        assert result.code == 1, command
        assert result.error["code"] == "state_damaged"
        assert str(visitor.state_file) in result.error["message"]
        assert " stop --session-id " in result.error["hint"]
        assert visitor.state_file.read_bytes() == content
    assert len(shared_plato.requests()) == before
    assert not visitor.plato_home.exists() or list(visitor.plato_home.iterdir()) == []


def no_permission(path: Path) -> None:
    path.write_text(WHOLE)
    path.chmod(0)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_circle_of_links(path: Path) -> None:
    path.symlink_to(path.name)


UNREADABLE = [a_directory, a_circle_of_links, *([no_permission] if os.geteuid() else [])]


@pytest.mark.parametrize("make", UNREADABLE, ids=lambda make: make.__name__)
def test_an_unreadable_record_is_refused(visitor: Desk, shared_plato: LocalPlato, make: Any) -> None:
    make(visitor.state_file)
    before, status = len(shared_plato.requests()), visitor.state_file.lstat()
    for command in COMMANDS:
        result = visitor.run(*command, "--json")
        assert result.code == 1, command
        assert str(visitor.state_file) in result.error["message"]
        assert " stop --session-id " in result.error["hint"]
    after = visitor.state_file.lstat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (
        status.st_ino,
        status.st_mode,
        status.st_mtime_ns,
    )
    assert len(shared_plato.requests()) == before


@pytest.mark.sampled
@pytest.mark.parametrize("content", [DAMAGED["empty"], DAMAGED["zeros"], DAMAGED["cut in the middle"]])
def test_the_vm_of_a_damaged_record_is_stopped_by_its_id(
    desk: Desk, plato: LocalPlato, content: bytes
) -> None:
    desk.good("start", *BLANK)
    session_id = desk.state["session_id"]
    desk.state_file.write_bytes(content)
    stopped = desk.good("stop", "--session-id", session_id, "--json")
    assert stopped.document == {"stopped": True, "session_id": session_id, "already_gone": False}
    assert living(plato) == []
    assert desk.state_file.read_bytes() == content
    assert list(desk.plato_home.iterdir()) == []


def test_the_hint_for_a_damaged_record_names_the_session_where_it_can(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    session_id = desk.state["session_id"]
    desk.state_file.write_bytes(desk.state_file.read_bytes()[:-5])
    hint = desk.run("status", "--json").error["hint"]
    assert f" stop --session-id {session_id}." in hint
    desk.good("stop", "--session-id", session_id)
    assert living(plato) == []


def saved_text(place: Path) -> bytes:
    """A record as the product writes it, with text of every kind."""
    state = {
        **FOREIGN,
        "plato_config_path": "/tmp/ünï: 'x' # →/plato-config.yml",
        "base_url": "http://127.0.0.1:1",
    }
    plato_sandbox.save_state(str(place), state)
    return (place / ".sandbox.yaml").read_bytes()


def test_a_record_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    text = saved_text(tmp_path)
    path = tmp_path / ".sandbox.yaml"
    for length in range(len(text) - 1):  # without its last line break it is whole
        path.write_bytes(text[:length])
        with pytest.raises(plato_sandbox.StateError, match="damaged"):
            plato_sandbox.load_state(str(tmp_path))
    path.write_bytes(text)
    state = plato_sandbox.load_state(str(tmp_path))
    assert state is not None
    assert state["session_id"] == FOREIGN["session_id"]
    assert state["plato_config_path"] == "/tmp/ünï: 'x' # →/plato-config.yml"


def test_another_clients_record_cut_at_any_byte_never_names_another_session(tmp_path: Path) -> None:
    text = sdk_text(FOREIGN).encode()
    path = tmp_path / ".sandbox.yaml"
    understood = 0
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        try:
            state = plato_sandbox.load_state(str(tmp_path))
        except plato_sandbox.StateError:
            continue
        understood += 1
        assert state is not None
        for name, value in state.items():
            assert value == FOREIGN[name]
        assert state["session_id"] == FOREIGN["session_id"]
    assert understood == text.count(b"\n", text.index(b"session_id:"))


def test_a_saved_record_is_what_pyyaml_reads(tmp_path: Path) -> None:
    values = [
        "yes",
        "1e3",
        "0x1f",
        "~",
        "",
        "2024-01-01",
        "a: b",
        "#",
        "- x",
        "é→😀",
        "it's",
        '"',
        "x\ny",
        "\t",
    ]
    state: dict[str, Any] = {"session_id": "123", **{f"key{i}": value for i, value in enumerate(values)}}
    plato_sandbox.save_state(str(tmp_path), state)
    assert yaml.safe_load((tmp_path / ".sandbox.yaml").read_text()) == state
    assert plato_sandbox.load_state(str(tmp_path)) == state


# Another Plato's


@pytest.mark.long
def test_the_record_of_another_plato(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    session_id, here = desk.state["session_id"], desk.state["base_url"]
    text = desk.state_file.read_text().replace(here, "https://plato.example.com")
    desk.state_file.write_text(text)
    before = len(plato.requests("GET")) + len(plato.requests("POST", "/close"))
    for command in (*COMMANDS, ["stop", "--session-id", session_id]):
        result = desk.run(*command, "--json")
        assert result.code == 5, command
        for url in ("https://plato.example.com", here):
            assert url in result.error["message"]
        assert "PLATO_BASE_URL" in result.error["hint"]
        assert desk.state_file.read_text() == text
    assert len(plato.requests("GET")) + len(plato.requests("POST", "/close")) == before
    assert len(plato.requests("POST", "/make")) == 1
    assert living(plato) == [plato.machines()[0]["job_id"]]


def test_a_record_without_base_url_belongs_to_the_real_plato(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    lines = desk.state_file.read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("base_url:"))
    desk.state_file.write_text(text)
    result = desk.run("stop", "--json")
    assert result.code == 5
    assert "https://plato.so" in result.error["message"]
    assert desk.state_file.read_text() == text
    assert len(living(plato)) == 1


# A start that was cut off

UNFINISHED: dict[str, Any] = {
    "mode": "blank",
    "service": "myapp",
    "created_at": "2026-01-02T03:04:05+00:00",
    "starting": True,
}


def unfinished(desk: Desk, **more: Any) -> bytes:
    """A record as a `start` leaves it that was killed; its bytes."""
    base_url = desk.environment["PLATO_BASE_URL"]
    plato_sandbox.save_state(
        str(desk.work),
        {**UNFINISHED, "expires_at": "2099-01-01T00:00:00+00:00", "base_url": base_url, **more},
    )
    return desk.state_file.read_bytes()


def test_status_of_an_unfinished_start(visitor: Desk, shared_plato: LocalPlato) -> None:
    text = unfinished(visitor)
    before = len(shared_plato.requests())
    status = visitor.run("status", "--json")
    assert status.code == 3
    assert status.error["code"] == "no_sandbox"
    assert UNFINISHED["created_at"] in status.error["message"]
    assert " stop" in status.error["hint"]
    assert status.document["mode"] == "blank"
    human = visitor.run("status")
    assert human.code == 3
    assert human.out.startswith("Sandbox Status\n")
    assert "  Heartbeat:   never started\n" in human.out
    assert visitor.state_file.read_bytes() == text
    assert len(shared_plato.requests()) == before


def test_stop_of_an_unfinished_start(visitor: Desk, shared_plato: LocalPlato) -> None:
    unfinished(visitor)
    before = len(shared_plato.requests())
    stopped = visitor.good("stop", "--json")
    assert stopped.document == {"stopped": True, "session_id": None, "already_gone": True}
    assert "Warning: " in stopped.err
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


@pytest.mark.parametrize("replace", [[], ["--replace"]], ids=["start", "start --replace"])
def test_start_over_an_unfinished_start(visitor: Desk, replace: list[str]) -> None:
    unfinished(visitor)
    started = visitor.good("start", *BLANK, *replace)
    assert UNFINISHED["created_at"] in started.err
    assert "starting" not in visitor.state
    visitor.good("stop")


def test_an_unfinished_start_of_another_plato(visitor: Desk) -> None:
    text = unfinished(visitor, base_url="https://plato.example.com")
    for command in COMMANDS:
        assert visitor.run(*command).code == 5
    assert visitor.state_file.read_bytes() == text


def test_a_start_that_was_killed_with_its_answer(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    kept = {name: desk.state[name] for name in ("session_id", "job_id", "heartbeat_pid")}
    unfinished(desk, **kept)
    status = desk.good("status", "--json").document
    assert (status["vm_status"], status["vm_running"]) == ("running", True)
    assert desk.run("start", *BLANK).code == 5
    desk.good("stop")
    assert living(plato) == []
    assert desk.leftovers() == []


def test_status_while_start_waits_for_its_answer(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("hang", path="*/make")
    start = desk.begin("start", *BLANK)
    plato.wait_for_request("POST", "/make")
    status = desk.good("status", "--json").document
    assert status["vm_running"] is False
    assert "cut off" not in str(status)
    assert str(start.pid) in status["vm_status_reason"]
    stopped = desk.run("stop", "--json")
    assert stopped.code == 5
    assert str(start.pid) in stopped.error["message"]
    start.kill()
    start.wait()
    assert desk.run("status").code == 3
    desk.good("stop")


# The id on the command line


@pytest.mark.sampled
@pytest.mark.parametrize("given", ["", "  "], ids=["empty", "blank"])
def test_stop_with_an_empty_id_changes_nothing(desk: Desk, plato: LocalPlato, given: str) -> None:
    desk.good("start", *BLANK)
    before = desk.state_file.read_bytes()
    result = desk.run("stop", "--session-id", given, "--json")
    assert result.code == 2
    assert "--session-id" in result.error["message"]
    assert desk.state_file.read_bytes() == before
    assert living(plato) == [desk.state["job_id"]]
    assert plato.requests("POST", "/close") == []
