"""Beside the newest SDK: a sandbox that `plato sandbox` started in a directory is worked with as our own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import (
    BLANK,
    SIMULATOR,
    Desk,
    NewestSdk,
    Result,
    eventually,
    heartbeats,
    is_running,
    living,
    missing,
    part,
)
from test_flow import browser, flow, step, write_flows
from test_local_plato import SESSIONS, Client

import plato_sandbox as product

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

LEASE = 1800.0
ROOT = "/home/plato/worktree"
# The fields of a slot of 2.187.0 that a sandbox of ours knows nothing of.
MORE_FIELDS = {
    "rdp_url": None,
    "provider": "firecracker",
    "cpus": 1,
    "app_port": 8080,
    "tag": None,
    "ssh_config_path": ".plato/ssh_config_{name}",
    "ssh_host": "sandbox",
    "ssh_command": "ssh -F .plato/ssh_config_{name} sandbox",
    "timeout": LEASE,
    "stopped_at": None,
    "network_connected": True,
    "attached": False,
    "chronos_session_id": None,
    "mesh_ip": None,
    "a field of tomorrow": {"with": ["more", 0.1, None]},
}


class Slot:
    """A sandbox as `plato sandbox` 2.187.0 leaves it in a working directory, made by requests of its kind."""

    def __init__(self, desk: Desk, plato: LocalPlato, name: str = "taskboard") -> None:
        self.desk = desk
        self.place = desk.work / ".plato"
        self.path = self.place / "sandboxes" / f"{name}.json"
        self.client = Client(plato)
        environment = {"type": "resource", "simulator": "taskboard", "sim_config": {}}
        self.session_id, self.job_id = self.client.connect(environment)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.key = self.place / f"ssh_key_{name}_{self.job_id[:8]}"
        keygen = [part("ssh-keygen", "openssh-client"), "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)]
        subprocess.run(keygen, check=True)
        body = {"public_key": self.key.with_suffix(".pub").read_text().strip(), "username": "root"}
        self.client.call("POST", f"{SESSIONS}/{self.session_id}/add_ssh_key", body)
        now = time.time()
        more = {
            key: value.format(name=name) if isinstance(value, str) else value
            for key, value in MORE_FIELDS.items()
        }
        self.write(
            {
                "name": name,
                "session_id": self.session_id,
                "job_id": self.job_id,
                "public_url": f"http://127.0.0.1:9/{self.job_id}?_plato_router_target=taskboard.web.plato.so",
                "mode": "blank",
                "dataset": "base",
                "simulator_name": "taskboard",
                "plato_config_path": None,
                "artifact_id": None,
                "ssh_key_path": f".plato/{self.key.name}",
                "heartbeat_pid": None,
                "created_at": now,
                "expires_at": now + LEASE,
                **more,
            }
        )
        self.use()

    def use(self) -> None:
        """Make it the current slot."""
        (self.place / "current").write_text(self.path.stem)
        link = self.place / "state.json"
        link.unlink(missing_ok=True)
        link.symlink_to(f"sandboxes/{self.path.name}")

    def write(self, fields: Any) -> None:
        scratch = self.path.with_name(".scratch.tmp")
        scratch.write_text(json.dumps(fields, indent=2))
        scratch.replace(self.path)

    @property
    def fields(self) -> dict[str, Any]:
        fields = json.loads(self.path.read_text())
        assert isinstance(fields, dict)
        return fields

    def change(self, **fields: Any) -> None:
        self.write({**self.fields, **fields})

    def files(self) -> dict[str, bytes]:
        """Every file under .plato."""
        paths = [path for path in self.place.rglob("*") if path.is_file() and not path.is_symlink()]
        return {str(path.relative_to(self.place)): path.read_bytes() for path in paths}

    def status(self, **options: Any) -> dict[str, Any]:
        return self.desk.run("status", "--json", **options).document


@pytest.fixture
def slot(desk: Desk, plato: LocalPlato) -> Slot:
    return Slot(desk, plato)


@pytest.fixture
def their_heartbeat(desk: Desk) -> Callable[[Slot], int]:
    """Start what looks like their heartbeat of a slot, and record it there."""

    def start(slot: Slot) -> int:
        program = f"# plato-sandbox-heartbeat-v1 {slot.session_id}\nimport time\ntime.sleep(600)"
        process = desk.begin_command([sys.executable, "-c", program])
        slot.change(heartbeat_pid=process.pid)
        return process.pid

    return start


# ---------------------------------------------------------------------------
# the commands on their sandbox
# ---------------------------------------------------------------------------


def test_status_of_their_sandbox(slot: Slot, desk: Desk, their_heartbeat: Callable[[Slot], int]) -> None:
    pid = their_heartbeat(slot)
    fields, files = slot.fields, slot.files()
    told = desk.good("status").out
    short = slot.session_id.split("-")[0]
    for line in (
        f"Session ID:  {slot.session_id}",
        f"Job ID:      {slot.job_id}",
        "Mode:        blank",
        "VM Status:   running",
        "Service:     taskboard",
        f"Public URL:  {fields['public_url']}",
        f"SSH:         ssh -F ~/.plato/ssh_{short}.conf sandbox-{short}",
        f"Slot:        {slot.path}",
        f"Heartbeat:   running (PID: {pid})",
    ):
        assert f"  {line}\n" in told, told
    document = slot.status()
    assert document["slot_path"] == str(slot.path)
    assert (document["vm_running"], document["heartbeat"]["state"]) == (True, "ok")
    assert document["created_at"] == time.strftime(
        "%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(fields["created_at"])
    )
    assert slot.files() == files
    assert heartbeats(desk) == []


def test_ssh_goes_by_their_key_and_our_config(slot: Slot, desk: Desk) -> None:
    document = slot.status()
    words = [part("ssh", "openssh-client"), "-F", document["ssh_config_path"], document["ssh_host"], "id -un"]
    assert desk.run(command=words) == Result(0, "root\n", "")
    config = Path(document["ssh_config_path"]).read_text()
    assert f'    IdentityFile "{slot.key}"\n' in config
    assert Path(document["ssh_config_path"]).parent == desk.plato_home
    assert desk.run(command=[*words[:3], "-O", "exit", document["ssh_host"]]).code == 0


def test_the_user_of_a_qemu_vm(slot: Slot, desk: Desk) -> None:
    slot.change(provider="qemu")
    assert "    User plato\n" in Path(slot.status()["ssh_config_path"]).read_text()
    slot.change(provider="firecracker")
    assert "    User root\n" in Path(slot.status()["ssh_config_path"]).read_text()
    assert desk.good("stop")


@pytest.mark.long
def test_sync_and_the_other_commands(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    files = slot.files()
    document = desk.good("sync", "--json").document
    assert document["via"] == "ssh"
    there = slot.client.output(slot.session_id, "ls /home/plato/worktree/taskboard").splitlines()
    assert there == sorted(path.name for path in desk.work.iterdir() if path.name[0] != ".")
    state = desk.run("state", "--json")
    assert (state.code, state.error["code"]) == (9, "worker_not_up")
    assert desk.good("start-worker", "--json").document["service"] == "taskboard"
    assert len(plato.requests("POST", "/start-worker")) == 1
    assert slot.files() == files


def test_start_beside_their_live_sandbox(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    files = slot.files()
    refused = desk.run(*BLANK, "--json")
    assert (refused.code, refused.error["code"]) == (5, "conflict")
    assert slot.session_id in refused.error["message"]
    assert slot.files() == files
    assert living(plato) == [slot.job_id]
    assert not desk.state_file.exists()


def test_a_snapshot_is_told_to_their_tools(slot: Slot, desk: Desk) -> None:
    before = slot.fields
    artifact = desk.good("snapshot", "--json").document["artifact_id"]
    assert slot.fields == {**before, "artifact_id": artifact}
    assert list(slot.fields) == list(before)
    assert json.loads((slot.place / "state.json").read_text())["artifact_id"] == artifact
    assert slot.status()["artifact_id"] == artifact
    assert {path.name for path in slot.path.parent.iterdir()} == {slot.path.name}


def test_stop(slot: Slot, desk: Desk, plato: LocalPlato, their_heartbeat: Callable[[Slot], int]) -> None:
    pid = their_heartbeat(slot)
    desk.good("sync")
    before, files, began = slot.fields, slot.files(), time.time()
    desk.good("stop")
    assert living(plato) == []
    stopped = slot.fields.pop("stopped_at")
    assert began <= stopped <= time.time()
    assert slot.fields == {**before, "stopped_at": stopped}
    name = str(slot.path.relative_to(slot.place))
    assert {**slot.files(), name: b""} == {**files, name: b""}
    eventually(lambda: not is_running(pid))
    assert desk.leftovers() == []
    assert desk.run("status").code == desk.run("stop").code == 3


def test_stop_by_id(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    desk.good("stop", "--session-id", slot.session_id)
    assert living(plato) == []
    assert slot.fields["stopped_at"] > 0


def test_an_innocent_process_survives_their_record(slot: Slot, desk: Desk) -> None:
    process = desk.begin_command([sys.executable, "-c", "import time; time.sleep(600)"])
    slot.change(heartbeat_pid=process.pid)
    desk.good("stop")
    assert process.poll() is None


def test_the_slot_was_taken_for_another_sandbox_meanwhile(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    """What `snapshot` and `stop` have to say is not written over the next sandbox of that name."""
    plato.fault("latency", path="*/snapshot", seconds=1.5)
    process = desk.begin("snapshot", "--json")
    plato.wait_for_request("POST", "/snapshot")
    slot.change(session_id="5e55-another")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert slot.fields["artifact_id"] is None
    assert json.loads(out)["artifact_id"]


@pytest.mark.long
def test_start_goes_ahead_when_theirs_is_gone(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    desk.good("sync")
    slot.client.call("POST", f"{SESSIONS}/{slot.session_id}/close")
    assert desk.run("status").code == 3
    files = slot.files()
    desk.run(*BLANK, "--json")  # whatever becomes of SSH
    assert len(plato.requests("POST", "/make")) == 2
    assert slot.files() == files


def test_replace(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    desk.run(*BLANK, "--replace")
    assert slot.job_id not in living(plato)
    assert slot.fields["stopped_at"] > 0
    assert len(plato.requests("POST", "/make")) == 2


def test_a_vm_in_a_session_with_others_is_left_to_them(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    slot.change(attached=True)
    files = slot.files()
    for words in (("status",), ("stop",), ("reset",), BLANK, (*BLANK, "--replace")):
        refused = desk.run(*words, "--json")
        assert (refused.code, refused.error["code"]) == (5, "conflict")
    assert living(plato) == [slot.job_id]
    assert slot.files() == files


# ---------------------------------------------------------------------------
# which sandbox
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_the_current_one_of_several(desk: Desk, plato: LocalPlato) -> None:
    first, second = Slot(desk, plato, "first"), Slot(desk, plato, "second")
    assert first.status()["session_id"] == second.session_id
    first.use()
    assert first.status()["session_id"] == first.session_id
    chosen = second.status(environment={"PLATO_SANDBOX": "second"})
    assert chosen["session_id"] == second.session_id
    assert desk.run("status", environment={"PLATO_SANDBOX": "third"}).code == 3
    first.change(stopped_at=time.time())
    assert first.status()["session_id"] == second.session_id
    second.change(stopped_at=time.time())
    assert desk.run("status").code == 3


def test_several_and_none_is_current(desk: Desk, plato: LocalPlato) -> None:
    first, second = Slot(desk, plato, "first"), Slot(desk, plato, "second")
    (first.place / "current").unlink()
    for words in (("status",), ("stop",), ("sync",), BLANK):
        refused = desk.run(*words, "--json")
        assert (refused.code, refused.error["code"]) == (5, "conflict")
        assert "first, second" in refused.error["message"]
        assert "PLATO_SANDBOX" in refused.error["hint"]
    assert len(living(plato)) == 2
    (first.place / "current").write_text("../../elsewhere\n")
    assert desk.run("status").code == 5
    desk.good("stop", "--session-id", second.session_id)
    assert living(plato) == [first.job_id]


def test_a_start_of_theirs_that_has_no_session_yet(desk: Desk, plato: LocalPlato, slot: Slot) -> None:
    claim = slot.path.with_name("claimed.json")
    claim.write_text(json.dumps({"claimed_by_pid": os.getpid()}))
    (slot.place / "current").write_text("claimed")
    assert slot.status()["session_id"] == slot.session_id
    slot.change(stopped_at=1.0)
    assert desk.run("status").code == 3
    assert plato.requests("POST", "/close") == []


def test_the_state_file_of_older_releases(slot: Slot, desk: Desk) -> None:
    """Before 2.121, the one sandbox of a directory was in .plato/state.json."""
    fields = slot.fields
    shutil.rmtree(slot.path.parent)
    (slot.place / "current").unlink()
    slot.path = slot.place / "state.json"
    slot.path.unlink()
    slot.write(fields)
    assert slot.status()["session_id"] == slot.session_id
    assert desk.good("sync", "--json").document["via"] == "ssh"
    desk.good("stop")
    assert slot.fields["stopped_at"] > 0


def test_our_own_record_wins(desk: Desk, plato: LocalPlato, slot: Slot) -> None:
    session_id, job_id = slot.client.start()
    desk.state_file.write_text(
        yaml.safe_dump({"session_id": session_id, "job_id": job_id, "slot_path": str(slot.path)})
    )
    files = slot.files()
    document = slot.status()
    assert document["session_id"] == session_id
    assert "slot_path" not in document
    desk.good("stop")
    assert living(plato) == [slot.job_id]
    assert slot.files() == files
    assert slot.status()["session_id"] == slot.session_id


def test_a_record_of_ours_cannot_name_a_slot(desk: Desk, slot: Slot) -> None:
    """What a .sandbox.yaml calls a slot is neither written to nor marked as stopped."""
    victim = desk.place / "victim.json"
    victim.write_text(json.dumps({"session_id": slot.session_id}))
    record = {"session_id": slot.session_id, "job_id": slot.job_id, "slot_path": str(victim)}
    desk.state_file.write_text(yaml.safe_dump(record))
    desk.good("snapshot")
    desk.good("stop")
    assert json.loads(victim.read_text()) == {"session_id": slot.session_id}


# ---------------------------------------------------------------------------
# the heartbeat
# ---------------------------------------------------------------------------


def test_theirs_is_enough_while_it_lives(
    slot: Slot, desk: Desk, their_heartbeat: Callable[[Slot], int]
) -> None:
    their_heartbeat(slot)
    desk.good("sync")
    assert heartbeats(desk) == []


@pytest.mark.sampled
@pytest.mark.parametrize("seconds", [-60.0, 60.0], ids=["past", "soon"])
def test_a_lease_that_ends(
    slot: Slot,
    desk: Desk,
    plato: LocalPlato,
    their_heartbeat: Callable[[Slot], int],
    seconds: float,
) -> None:
    """Their heartbeat ends with its lease, which no command of ours extends: so ours goes on."""
    pid = their_heartbeat(slot)
    slot.change(expires_at=time.time() + seconds)
    assert slot.status()["heartbeat"].items() >= {"state": "ending", "pid": pid}.items()
    fields = slot.fields
    assert "ends soon" in desk.good("sync").err
    (ours,) = heartbeats(desk)
    plato.wait_for_request("POST", "/heartbeat")
    assert slot.status()["heartbeat"].items() >= {"state": "ok", "pid": ours}.items()
    assert slot.fields == fields
    desk.good("sync")
    assert heartbeats(desk) == [ours]


@pytest.mark.long
@pytest.mark.parametrize("how", ["stopped", "removed", "reused"])
def test_ours_ends_with_their_slot(slot: Slot, desk: Desk, plato: LocalPlato, how: str) -> None:
    fields = slot.fields
    assert "was not running" in desk.good("sync").err
    assert len(heartbeats(desk)) == 1
    plato.wait_for_request("POST", "/heartbeat")
    slot.change(expires_at=time.time() + 2 * LEASE)  # as each command of theirs does
    slot.path.with_name("other.json").write_text("{}")
    beats = len(plato.requests("POST", "/heartbeat"))
    eventually(lambda: len(plato.requests("POST", "/heartbeat")) > beats + 1)
    assert slot.fields["heartbeat_pid"] == fields["heartbeat_pid"]
    if how == "stopped":
        slot.change(stopped_at=time.time())
    elif how == "reused":
        slot.change(session_id="5e55-another")
    else:
        slot.path.unlink()
    eventually(lambda: heartbeats(desk) == [])


def test_stop_ends_ours(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    desk.good("sync")
    (pid,) = heartbeats(desk)
    desk.good("stop")
    assert not is_running(pid)
    assert desk.leftovers() == []
    assert living(plato) == []


# ---------------------------------------------------------------------------
# a .plato that came with somebody's repository
# ---------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["missing", "absolute", "above", "link", "link to .plato", "text"])
def test_a_key_that_is_not_theirs(slot: Slot, desk: Desk, how: str) -> None:
    """Without a key that lies in .plato itself, the sandbox has no SSH; the API does."""
    outside = desk.home / "id_ed25519"
    slot.key.rename(outside)
    if how == "absolute":
        slot.change(ssh_key_path=str(outside))
    elif how == "above":
        slot.change(ssh_key_path=os.path.relpath(outside, desk.work))
    elif how == "link":
        slot.key.symlink_to(outside)
    elif how == "link to .plato":
        outside.rename(slot.key)
        slot.place.rename(desk.place / "elsewhere")
        slot.place.symlink_to(desk.place / "elsewhere")
    elif how == "text":
        slot.change(ssh_key_path="a\nProxyCommand touch x")
    refused = desk.run("sync", "--via", "ssh", "--json")
    assert refused.code == 1
    if how == "text":
        assert refused.error["code"] == "state_damaged"
        return
    assert "no SSH" in refused.error["message"]
    assert "ssh_command" not in slot.status() or slot.status()["ssh_command"] is None
    assert desk.good("sync", "--json").document["via"] == "api"


NONSENSE: dict[str, Any] = {
    "an empty file": b"",
    "no JSON": b"{\x00",
    "cut off": b'{"session_id": "5e55-1", "job_id": "j"',
    "not UTF-8": b'{"session_id": "5e55-1", "job_id": "\xff\xfe',
    "deep": b"[" * 100_000,
    "a long number": b"1" * 100_000,
    "huge": b" " * 2_000_000 + b"{}",
}


def assert_damaged(desk: Desk, *words: str) -> dict[str, Any]:
    refused = desk.run(*words, "--json")
    assert (refused.code, refused.error["code"]) == (1, "state_damaged")
    return refused.error


@pytest.mark.sampled
@pytest.mark.parametrize("content", NONSENSE.values(), ids=NONSENSE)
def test_a_slot_of_nonsense(visitor: Desk, content: bytes) -> None:
    path = visitor.work / ".plato" / "sandboxes" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for words in (("status",), ("stop",), BLANK):
        error = assert_damaged(visitor, *words)
        assert str(path) in error["message"]
        assert "stop --session-id" in error["hint"]
    assert path.read_bytes() == content
    assert not visitor.state_file.exists()


def test_a_slot_of_nothing(slot: Slot, desk: Desk) -> None:
    for content in ("null", "[]", '"text"', "7", "{}", '{"session_id": "", "x": NaN}', '{"session_id": "a"}'):
        slot.path.write_text(content)
        assert desk.run("status").code == 3


WRONG: list[dict[str, Any]] = [
    {"session_id": 7},
    {"session_id": ["x"]},
    {"session_id": "a\nb"},
    {"job_id": "\x1b[2J"},
    {"job_id": {"a": 1}},
    {"session_id": "\ud800"},
    {"mode": 1e300},
    {"public_url": ["http://127.0.0.1"]},
    {"ssh_key_path": "a\0b"},
    {"plato_config_path": "a\0b"},
    {"simulator_name": True},
]


@pytest.mark.long
def test_texts_that_are_none(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    good = slot.fields
    for fields in WRONG:
        slot.write({**good, **fields})
        files = slot.files()
        for words in (("status",), ("snapshot",), BLANK):
            error = assert_damaged(desk, *words)
            assert next(iter(fields)) in error["message"]
            assert "session_id" in fields or slot.session_id in error["hint"]
        assert slot.files() == files
    assert living(plato) == [slot.job_id]


@pytest.mark.long
def test_numbers_that_are_none(slot: Slot, desk: Desk) -> None:
    odd: Any
    for odd in (float("nan"), float("inf"), -1, 10**400, "1", [], {}, True, 1e-300, 0.5):
        slot.change(created_at=odd, expires_at=odd, heartbeat_pid=odd, cpus=odd, timeout=odd)
        assert slot.status()["vm_running"] is True
    desk.good("stop")


@pytest.mark.long
def test_a_slot_of_another_kind(slot: Slot, desk: Desk) -> None:
    outside = desk.place / "outside.json"
    slot.path.rename(outside)
    before = outside.read_bytes()
    makes: list[Callable[[], object]] = [
        lambda: slot.path.symlink_to(outside),
        lambda: os.mkfifo(slot.path),
        slot.path.mkdir,
    ]
    for make in makes:
        make()
        for words in (("status",), ("stop",), ("snapshot",), BLANK):
            assert_damaged(desk, *words)
        if not slot.path.is_dir():
            slot.path.unlink()
    assert outside.read_bytes() == before


def test_a_pointer_of_another_kind(slot: Slot, desk: Desk) -> None:
    current = slot.place / "current"
    makes: list[Callable[[], object]] = [
        lambda: current.symlink_to(slot.path),
        lambda: os.mkfifo(current),
        lambda: current.write_bytes(b"\xff\xfe\0"),
        lambda: current.write_bytes(b"x" * 2_000_000),
        current.mkdir,
    ]
    for make in makes:
        current.unlink()
        make()
        assert slot.status()["session_id"] == slot.session_id


@pytest.mark.long
def test_nothing_of_theirs_is_run_or_believed(slot: Slot, desk: Desk, plato: LocalPlato) -> None:
    """No other address gets the key, and no config or command of theirs is used."""
    canary = desk.work / "CANARY"
    evil = slot.place / "ssh_config_taskboard"
    evil.write_text(f"Host *\n    ProxyCommand touch {canary}\n    LocalCommand touch {canary}\n")
    slot.change(
        base_url="http://127.0.0.1:9",
        api_url="http://127.0.0.1:9",
        ssh_config_path=str(evil),
        ssh_host=f"-oProxyCommand=touch {canary}",
        ssh_command=f"touch {canary}",
    )
    desk.good("sync", "--via", "ssh")
    desk.good("sync", "--via", "api")
    assert slot.status()["vm_running"] is True
    desk.good("snapshot")
    desk.good("stop")
    assert living(plato) == []
    assert not canary.exists()


def test_a_session_of_somebody_else(slot: Slot, desk: Desk) -> None:
    """Ids are opaque parts of addresses, whatever is in them."""
    slot.change(session_id="../../v1/x?y#z", job_id="../j")
    assert desk.run("status").code == 3
    desk.run("sync", "--json")
    assert sorted(path.name for path in desk.home.iterdir()) == [".plato"]
    for path in desk.plato_home.rglob("*"):
        assert path.parent == desk.plato_home


def test_the_slots_never_leave(slot: Slot, desk: Desk) -> None:
    """The private key in .plato is no part of what is synced."""
    desk.good("sync")
    assert ".plato" not in slot.client.output(slot.session_id, "ls -a /home/plato/worktree/taskboard")


# ---------------------------------------------------------------------------
# with the real one
# ---------------------------------------------------------------------------


class Newest:
    """`plato sandbox` of the newest SDK at the desk of a test."""

    def __init__(self, desk: Desk, sdk: NewestSdk) -> None:
        self.desk = desk
        self.sdk = sdk

    def good(self, *words: str) -> Result:
        return self.sdk.good(self.desk, *words)

    def document(self, *words: str) -> dict[str, Any]:
        return self.good(*words, "--json").document

    @property
    def fields(self) -> dict[str, Any]:
        """The current slot, as their other tools find it."""
        return self.sdk.slot(self.desk)

    def listed(self) -> dict[str, Any]:
        (row,) = self.document("list")["sandboxes"]
        assert isinstance(row, dict)
        return row


@pytest.fixture
def newest(desk: Desk, newest_sdk: NewestSdk) -> Newest:
    return Newest(desk, newest_sdk)


STARTS = {
    "blank": ("--blank", "--cpus", "1", "--memory", "512", "--disk", "2048"),
    "config": ("-c",),
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_ours_on_the_sandbox_of_the_newest(
    newest: Newest, desk: Desk, plato: LocalPlato, options: tuple[str, ...]
) -> None:
    shutil.copy(SIMULATOR / "flows.yml", desk.work)  # which a snapshot of a config sandbox has with it
    newest.good("start", *options)
    started = newest.fields
    pid, session_id, service = started["heartbeat_pid"], started["session_id"], started["simulator_name"]
    told = desk.good("status").out
    assert f"  Session ID:  {session_id}\n" in told
    assert "  VM Status:   running\n" in told
    assert f"  Heartbeat:   running (PID: {pid})\n" in told
    assert desk.run(*BLANK, "--json").error["code"] == "conflict"
    assert desk.good("sync", "--json").document["via"] == "ssh"
    ssh = desk.good("status", "--json").document
    print_it = f"cat {ROOT}/{service}/plato-config.yml"
    words = [part("ssh", "openssh-client"), "-F", ssh["ssh_config_path"], ssh["ssh_host"], print_it]
    assert desk.run(command=words).out == (desk.work / "plato-config.yml").read_text()
    assert heartbeats(desk) == []
    assert newest.fields == started

    artifact = desk.good("snapshot", "--json").document["artifact_id"]
    assert newest.fields == {**started, "artifact_id": artifact}
    assert newest.document("artifact")["artifact_id"] == artifact
    row = newest.listed()
    assert (row["artifact_id"], row.get("stopped_at")) == (artifact, None)
    seen = newest.document("status")
    assert (seen["local"]["session_id"], seen["snapshot"]["artifact_id"]) == (session_id, artifact)

    desk.good("stop")
    assert living(plato) == []
    eventually(lambda: not is_running(pid))
    assert newest.listed()["stopped_at"] == pytest.approx(time.time(), abs=120)
    assert desk.run("status").code == 3
    assert desk.leftovers() == ["sandboxes.json", "sandboxes.lock"]  # theirs
    newest.good("start", *options)  # and what is left disturbs neither
    assert desk.good("status", "--json").document["session_id"] != session_id
    newest.good("stop")
    assert living(plato) == []
    assert desk.run("status").code == 3
    assert plato.unknown_fields() == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_worker_flow_and_audit_on_theirs(newest: Newest, desk: Desk, plato: LocalPlato) -> None:
    database = "/home/plato/app.db"
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    listener = {"type": "db", "db_type": "sqlite", "db_database": database}
    config["datasets"]["base"]["listeners"] = {"db": listener}
    (desk.work / "plato-config.yml").write_text(yaml.safe_dump(config))
    write_flows(desk, flow("login", step("verify_text", text="Hello from their VM")))
    newest.good("start", "-c")
    started = newest.fields
    client = Client(plato)

    def change(statement: str) -> None:
        program = f"import sqlite3; c = sqlite3.connect('{database}'); c.execute('{statement}'); c.commit()"
        client.output(started["session_id"], f'python3 -c "{program}"')

    change("CREATE TABLE tasks (id integer PRIMARY KEY)")
    assert desk.run("state").code == 9
    assert desk.good("start-worker", "--wait", "--json").document["ready"] is True
    change("INSERT INTO tasks VALUES (7)")
    assert "tasks" in desk.good("state").out

    page = "import http.server as h\nclass H(h.BaseHTTPRequestHandler):\n  def do_GET(s):\n"
    page += "    s.send_response(200); s.end_headers(); s.wfile.write(b'Hello from their VM')\n"
    page += f"h.HTTPServer(('0.0.0.0', {started['app_port']}), H).serve_forever()"
    client.serve_in_vm(started["session_id"], page, started["app_port"])
    executable = browser()
    done = desk.good("flow", "--json", environment={"PLATO_BROWSER": executable}, timeout=120).document
    assert done["passed"] is True

    sandbox = product.Sandbox(str(desk.work), settings=desk.settings)
    plan = product.plan_audit(sandbox)
    (there,) = plan.databases
    assert "tasks" in there.tables()
    assert newest.fields == started
    newest.good("stop")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_start_services_on_theirs(newest: Newest, desk: Desk, plato: LocalPlato) -> None:
    if plato.information["docker"] is not None:
        missing(plato.information["docker"])
    compose = {"services": {"web": {"image": "busybox", "command": "sleep 600", "init": True}}}
    (desk.work / "compose.yml").write_text(yaml.safe_dump(compose))
    config = yaml.safe_load((desk.work / "plato-config.yml").read_text())
    config["datasets"]["base"]["services"] = {"main": {"type": "docker-compose", "file": "compose.yml"}}
    (desk.work / "plato-config.yml").write_text(yaml.safe_dump(config))
    newest.good("start", "-c")
    document = desk.good("start-services", "--json", timeout=300).document
    assert [container["state"] for container in document["services"][0]["containers"]] == ["running"]
    bare = ["git", "-c", "safe.directory=*", "--git-dir", str(plato.repository("taskboard")), "ls-tree"]
    files = subprocess.run(
        [*bare, "-r", "--name-only", document["branch"]], capture_output=True, text=True, check=True
    )
    assert ".plato" not in files.stdout
    assert "compose.yml" in files.stdout
    newest.good("stop")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_their_heartbeat_dies_and_ours_goes_on(newest: Newest, desk: Desk, plato: LocalPlato) -> None:
    newest.good("start", *STARTS["blank"])
    pid = newest.fields["heartbeat_pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in desk.good("status").out
    desk.good("sync")
    (ours,) = heartbeats(desk)
    beats = len(plato.requests("POST", "/heartbeat"))
    newest.good("status")  # which extends the lease in the slot
    eventually(lambda: len(plato.requests("POST", "/heartbeat")) > beats + 1)
    assert heartbeats(desk) == [ours]
    newest.good("stop")
    eventually(lambda: heartbeats(desk) == [])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ours_chooses_what_the_newest_uses(newest: Newest, desk: Desk) -> None:
    for name in ("one", "two"):
        newest.good("start", "-n", name, *STARTS["blank"])
    sessions = {row["name"]: row["session_id"] for row in newest.document("list")["sandboxes"]}
    assert desk.good("status", "--json").document["session_id"] == sessions["two"]
    newest.good("use", "one")
    assert desk.good("status", "--json").document["session_id"] == sessions["one"]
    desk.good("stop")
    assert desk.good("status", "--json").document["session_id"] == sessions["two"]
    desk.good("stop")
    assert desk.run("status").code == 3


# ---------------------------------------------------------------------------
# the key in a .env
# ---------------------------------------------------------------------------

KEY = "a-key.of_the+tests/1="
LINES = {
    "plain": f"PLATO_API_KEY={KEY}\n",
    "exported": f"export PLATO_API_KEY={KEY}\n",
    "in double quotes": f'PLATO_API_KEY="{KEY}"\n',
    "in single quotes": f"  export  PLATO_API_KEY = '{KEY}'  # mine\n",
    "with a comment": f"A=1\nPLATO_API_KEY={KEY} # mine\nPLATO_API_KEY_OLD=x\n",
    "without an end": f"#PLATO_API_KEY=old\nPLATO_API_KEY={KEY}",
    "of Windows": f"A=1\r\nPLATO_API_KEY={KEY}\r\n",
    "twice": f"PLATO_API_KEY=old\nPLATO_API_KEY={KEY}\n",
}


def without_key(desk: Desk, *words: str) -> str:
    """The hint of a command that has no key."""
    result = desk.run(*words, "--json", environment={"PLATO_API_KEY": ""})
    assert (result.code, result.error["code"]) == (4, "authentication")
    assert KEY not in result.out + result.err
    hint = result.error["hint"]
    assert hint.startswith("Set it in this shell: ")
    return str(hint).partition(": ")[2]


def shells() -> list[str]:
    return [path for path in map(shutil.which, ("bash", "zsh", "dash")) if path]


@pytest.mark.sampled
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("where", ["work", "home"])
def test_the_hint_takes_the_key_from_a_dotenv(visitor: Desk, line: str, where: str) -> None:
    place = visitor.work if where == "work" else visitor.home
    (place / ".env").write_text(line, newline="")
    export = without_key(visitor, *BLANK)
    shown = 'printf %s "$PLATO_API_KEY" | tr -d "\\r"'
    for shell in shells():
        done = visitor.run(command=[shell, "-c", f"{export}\n{shown}"], environment={"PLATO_API_KEY": ""})
        assert (done.out, done.err) == (KEY, ""), shell
    program = shlex_of(visitor.command("status"))
    done = visitor.run(command=["sh", "-c", f"{export}; {program}"], environment={"PLATO_API_KEY": ""})
    assert done.code == 3, done  # the key as it stands there was good enough to ask with


def shlex_of(words: list[str]) -> str:
    import shlex

    return " ".join(shlex.quote(word) for word in words)


@pytest.mark.parametrize("kind", ["none", "other", "empty", "pipe", "directory", "closed", "not UTF-8"])
def test_the_hint_without_such_a_line(visitor: Desk, kind: str) -> None:
    path = visitor.work / ".env"
    if kind == "other":
        path.write_text(f"# PLATO_API_KEY={KEY}\nMY_PLATO_API_KEY={KEY}\nPLATO_API_KEYS={KEY}\n")
    elif kind == "empty":
        path.write_text("PLATO_API_KEY=\nPLATO_API_KEY=''\n")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "closed":
        path.write_text("x\n")
        path.chmod(0)
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff\xfe\0")
    assert without_key(visitor, *BLANK) == "export PLATO_API_KEY=..."


def test_a_dotenv_beside_the_code_is_never_used_by_itself(visitor: Desk, shared_plato: LocalPlato) -> None:
    """A repository can bring a .env; its key, good or not, is not taken from there."""
    (visitor.work / ".env").write_text(f"PLATO_API_KEY={shared_plato.api_key}\n")
    before = len(shared_plato.requests())
    result = visitor.run(*BLANK, environment={"PLATO_API_KEY": ""})
    assert result.code == 4
    assert shared_plato.api_key not in result.out + result.err
    assert len(shared_plato.requests()) == before
