"""Fidelity: the real command line and models of plato-sdk-v2 on the local Plato, and each client taking up
a sandbox that the other one started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, SIMULATOR, Desk, Result, eventually, is_running, living, missing, sdk_environment
from test_local_plato import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localplato import LocalPlato

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the first test of all installs the SDK


@pytest.fixture(scope="session")
def sdk() -> Path:
    """The `bin` of a virtual environment that holds the SDK."""
    return sdk_environment("2.0.40") / "bin"


@pytest.fixture
def plato(new_plato: Callable[..., LocalPlato]) -> LocalPlato:
    """A local Plato that has what this release calls and no newer one does."""
    return new_plato(old_clients=True)


class Theirs:
    """The SDK's command line at a desk."""

    def __init__(self, desk: Desk, sdk: Path) -> None:
        self.desk = desk
        self.sdk = sdk
        tools = desk.place / "tools"
        tools.mkdir()
        # It only looks for this program, and names it in the SSH config.
        (tools / "proxytunnel").write_text("#!/bin/sh\nexit 1\n")
        (tools / "proxytunnel").chmod(0o755)
        path = f"{sdk}:{tools}:{desk.environment['PATH']}"  # its heartbeat is whatever `python3` is
        self.environment = {"PATH": path, "COLUMNS": "1000", "TERM": "dumb"}

    def run(self, *words: str) -> Result:
        command = [str(self.sdk / "plato"), "sandbox", *words]
        return self.desk.run(command=command, environment=self.environment, timeout=120)

    def good(self, *words: str) -> Result:
        result = self.run(*words)
        assert result.code == 0, f"{result.out}\n{result.err}"
        assert "Warning" not in result.out, result.out
        return result

    def document(self, *words: str) -> dict[str, Any]:
        """The JSON in what --json prints; lines of its log are on stdout too."""
        out = self.good(*words).out
        value = json.loads(out[out.index("{") :])
        assert isinstance(value, dict)
        return value

    def python(self, program: str, *words: str) -> Result:
        command = [str(self.sdk / "python"), "-c", program, *words]
        result = self.desk.run(command=command, environment=self.environment, timeout=120)
        assert result.code == 0, f"{result.out}\n{result.err}"
        return result


@pytest.fixture
def theirs(desk: Desk, sdk: Path) -> Iterator[Theirs]:
    yield Theirs(desk, sdk)
    end_their_heartbeat(desk)


def end_their_heartbeat(desk: Desk) -> None:
    """End the process that their state names, if it is a heartbeat of this very session."""
    if not desk.state_file.exists():
        return
    pid, session_id = desk.state.get("heartbeat_pid"), desk.state["session_id"]
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if session_id.encode() in command or b"heartbeat-child" in command:
        os.kill(int(str(pid)), signal.SIGKILL)


MODES = {
    "blank": ("-b", "--service", "myapp", "--cpus", "1", "--memory", "512", "--disk", "2048"),
    "simulator": ("-s", "espocrm"),
    "simulator and tag": ("-s", "espocrm", "-t", "staging"),
    "artifact": ("-a", "art_abc123"),
    "config": ("-c",),
}


# ---------------------------------------------------------------------------
# theirs on the local Plato
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_their_start_status_stop(theirs: Theirs, plato: LocalPlato, options: tuple[str, ...]) -> None:
    started = theirs.good("start", *options)
    assert "Sandbox started successfully!" in started.out
    state = theirs.desk.state
    assert living(plato) == [state["job_id"]]
    status = theirs.good("status")
    assert "VM Status:   running" in status.out
    document = theirs.document("status", "--json")
    assert (document["vm_running"], document["session_id"]) == (True, state["session_id"])
    assert "stopped successfully" in theirs.good("stop").out
    assert living(plato) == []
    assert theirs.desk.leftovers() == []
    assert plato.unknown_fields() == []
    assert [request for request in plato.requests() if request["status"] in (404, 422, 501)] == []
    assert len(plato.requests("POST", "/setup-sandbox")) == (1 if options == ("-c",) else 0)


def test_their_json(theirs: Theirs, plato: LocalPlato) -> None:
    document = theirs.document("start", *MODES["blank"], "--json")
    assert document["job_id"] == living(plato)[0]
    assert document["public_url"].startswith("http")


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({"PLATO_API_KEY": "wrong-key"}, MODES["blank"], "401"),
        ({}, ("-a", "art_nowhere"), "art_nowhere"),
        ({}, ("-s", "nobody"), "nobody"),
    ],
    ids=["key", "artifact", "simulator"],
)
def test_their_failures(
    theirs: Theirs, plato: LocalPlato, environment: dict[str, str], options: tuple[str, ...], words: str
) -> None:
    theirs.environment.update(environment)
    failed = theirs.run("start", *options)
    assert failed.code == 1
    assert words in failed.out
    assert living(plato) == []


DRIVER = """
import json, sys
import httpx
from plato._generated.api.v1 import env, gitea
from plato._generated.api.v1.sandbox import (
    healthy_services, healthy_worker, setup_root_access, setup_sandbox, start_worker,
)
from plato._generated.api.v2 import jobs, sessions
from plato._generated.models import AppSchemasGiteaResponsesSimulatorListItemResponse as SimulatorItem
from plato._generated.models import (
    CreateSessionFromEnvs, ExecuteCommandRequest, ResetSessionRequest, SetupRootPasswordRequest,
    SetupSandboxRequest, VMManagementRequest,
)

base_url, key, public_key, dataset = sys.argv[1:]
client = httpx.Client(base_url=base_url, timeout=60)
answers = {}

def call(name, endpoint, **words):
    answer = endpoint.sync(client=client, x_api_key=key, **words)
    answers[name] = answer if isinstance(answer, (dict, list)) else answer.model_dump(mode="json")
    return answers[name]

envs = [{"type": "resource", "simulator": "myapp", "alias": "one",
         "sim_config": {"cpus": 1, "memory": 512, "disk": 2048}}]
body = CreateSessionFromEnvs.model_validate({"type": "envs", "envs": envs, "timeout": 600, "source": "SDK"})
made = call("make", sessions.make, body=body)
session_id, job_id = made["session_id"], made["envs"][0]["job_id"]
ready = call("wait_for_ready", sessions.wait_for_ready, session_id=session_id, timeout=20)
assert ready["ready"] is True, ready
call("details", sessions.get_session_details, session_id=session_id)
call("list", sessions.list_sessions)
call("jobs", sessions.list_jobs, session_id=session_id)
call("heartbeat", sessions.heartbeat, session_id=session_id)
call("reset", sessions.reset, session_id=session_id, body=ResetSessionRequest())
call("public_url", sessions.get_public_url, session_id=session_id)
command = ExecuteCommandRequest(command="echo out; echo err >&2; exit 3")
call("execute", sessions.execute, session_id=session_id, body=command)
request = SetupRootPasswordRequest(ssh_public_key=public_key)
call("setup_root_access", setup_root_access, public_id=job_id, body=request)
request = SetupSandboxRequest.model_validate({
    "service": "myapp", "dataset": "base", "plato_dataset_config": json.loads(dataset),
    "ssh_public_key": public_key,
})
call("setup_sandbox", setup_sandbox, public_id=job_id, body=request)
call("gitea", gitea.get_gitea_credentials)
listed = [SimulatorItem.model_validate(one) for one in call("simulators", gitea.get_accessible_simulators)]
simulator = next(one for one in listed if not one.has_repo)
call("no_repo", gitea.get_simulator_repository, simulator_id=simulator.id)
call("made_repo", gitea.create_simulator_repository, simulator_id=simulator.id)
call("repo", gitea.get_simulator_repository, simulator_id=simulator.id)
call("no_worker", sessions.state, session_id=session_id)
request = VMManagementRequest.model_validate({
    "service": "myapp", "dataset": "base", "plato_dataset_config": {"compute": {}, "metadata": {}},
})
call("start_worker", start_worker, public_id=job_id, body=request)
call("healthy_services", healthy_services, public_id=job_id, body=request)
while not call("job_state", jobs.state, job_id=job_id)["success"]:
    pass
call("healthy_worker", healthy_worker, public_id=job_id)
call("state", sessions.state, session_id=session_id, merge_mutations=True)
call("cleanup", env.cleanup, job_group_id=session_id)
call("close", sessions.close, session_id=session_id)
print(json.dumps({"session_id": session_id, "job_id": job_id, "answers": answers}))
"""


def test_their_models_accept_every_answer(theirs: Theirs, plato: LocalPlato, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    config = yaml.safe_load((theirs.desk.work / "plato-config.yml").read_text())
    words = (
        plato.base_url,
        plato.api_key,
        Path(f"{key}.pub").read_text(),
        json.dumps(config["datasets"]["base"]),
    )
    done = json.loads(theirs.python(DRIVER, *words).out)
    session_id, job_id, answers = done["session_id"], done["job_id"], done["answers"]
    for name in ("wait_for_ready", "heartbeat", "reset", "public_url", "execute", "close"):
        assert list(answers[name]["results"]) == [job_id], name
    assert answers["details"]["jobs"][0]["status"] == "running"
    assert answers["jobs"]["jobs"][0]["job_id"] == job_id
    assert session_id in json.dumps(answers["list"])
    assert answers["heartbeat"]["success"] is True
    assert answers["public_url"]["results"][job_id]["url"].startswith("http")
    executed = answers["execute"]["results"][job_id]
    assert (executed["stdout"], executed["stderr"], executed["exit_code"]) == ("out\n", "err\n", 3)
    assert answers["setup_root_access"]["status"] == answers["setup_sandbox"]["status"] == "success"
    assert answers["simulators"][2]["name"] == "taskboard"
    assert answers["repo"]["clone_url"] == answers["made_repo"]["clone_url"]
    assert answers["no_worker"]["results"][job_id]["success"] is False
    assert answers["state"]["results"][job_id]["state"] == {"mutations": []}
    assert (answers["healthy_worker"]["status"], answers["cleanup"]["success"]) == ("healthy", True)
    assert answers["close"]["success"] is True
    assert living(plato) == []
    assert plato.unknown_fields() == []


ARTIFACT_DRIVER = """
import json, sys
import httpx
from plato._generated.api.v1.simulator import get_env_flows, get_plato_config
from plato._generated.api.v2 import sessions
from plato._generated.api.v2.jobs import get_flows
from plato._generated.models import (
    AppApiV2SchemasSessionCreateSnapshotRequest, CreateSessionFromEnvs, Flow,
)

base_url, key, session_id, flows, config = sys.argv[1:]
client = httpx.Client(base_url=base_url, timeout=60)
words = {"client": client, "x_api_key": key}
body = AppApiV2SchemasSessionCreateSnapshotRequest(flows=flows, plato_config=config)
(result,) = sessions.snapshot.sync(session_id=session_id, body=body, **words).results.values()
artifact = result.artifact_id
stored = get_plato_config.sync(artifact_id=artifact, **words)
text = get_env_flows.sync(artifact_id=artifact, **words)["data"]["flows"]
while client.get(f"/api/v2/artifacts/{artifact}", headers={"X-API-Key": key}).json()["status"] == "creating":
    pass
request = {"type": "envs", "envs": [{"type": "artifact", "artifact_id": artifact}]}
made = sessions.make.sync(body=CreateSessionFromEnvs.model_validate(request), **words)
names = [Flow.model_validate(flow).name for flow in get_flows.sync(job_id=made.envs[0].job_id, **words)]
sessions.close.sync(session_id=made.session_id, **words)
print(json.dumps({"artifact": artifact, "flows": text, "config": stored.plato_config, "names": names}))
"""


def test_their_snapshot(theirs: Theirs, plato: LocalPlato) -> None:
    theirs.good("start", *MODES["config"])
    first = theirs.desk.state
    said = theirs.good("snapshot").out
    assert "Snapshot created successfully!" in said
    artifact = theirs.document("snapshot", "--json")["artifact_id"]
    made = {entry["artifact_id"]: entry for entry in plato.artifacts()}
    assert made[artifact]["simulator"] == "taskboard"
    assert sum(entry["job_id"] == first["job_id"] for entry in made.values()) == 2
    assert any(name in said for name in made)
    flows = (SIMULATOR / "flows.yml").read_text()
    config = (SIMULATOR / "plato-config.yml").read_text()
    words = (plato.base_url, plato.api_key, first["session_id"], flows, config)
    done = json.loads(theirs.python(ARTIFACT_DRIVER, *words).out)
    assert (done["flows"], done["config"]) == (flows, config)
    assert done["names"] == ["login", "wrong_password", "add_task"]
    theirs.good("stop")
    theirs.good("start", "-a", artifact)
    assert theirs.desk.state["artifact_id"] == artifact
    assert plato.unknown_fields() == []
    theirs.good("stop")


DATABASE = "/home/plato/app.db"
SQL = "import sqlite3; c = sqlite3.connect('{database}'); c.execute('{statement}'); c.commit()"


def database(plato: LocalPlato, state: dict[str, Any], statement: str) -> None:
    """Run a statement in the VM's SQLite database."""
    program = SQL.format(database=DATABASE, statement=statement)
    Client(plato).output(state["session_id"], f'python3 -c "{program}"')


def write_config(desk: Desk, **changes: Any) -> None:
    """A plato-config.yml as the example's, with these parts of its dataset changed."""
    path = desk.work / "plato-config.yml"
    config = yaml.safe_load(path.read_text())
    config["datasets"]["base"].update(changes)
    path.write_text(yaml.safe_dump(config))


def test_their_worker_and_state(theirs: Theirs, plato: LocalPlato) -> None:
    listener = {"type": "db", "db_type": "sqlite", "db_database": DATABASE}
    write_config(theirs.desk, listeners={"db": listener})
    theirs.good("start", "-c")
    state = theirs.desk.state
    database(plato, state, "CREATE TABLE tasks (id integer PRIMARY KEY)")
    assert "The worker is not started" in theirs.good("state").out
    assert "Worker started successfully!" in theirs.good("start-worker").out
    plato.wait_for(lambda snapshot: snapshot["sessions"][0]["jobs"][0]["worker"]["up"])
    database(plato, state, "INSERT INTO tasks VALUES (7)")
    told = json.loads(theirs.good("state").out.partition("Environment State:")[2])
    (mutation,) = told[state["job_id"]]["state"]["mutations"]
    assert (mutation["table_name"], mutation["action"], mutation["after"]) == ("tasks", "INSERT", {"id": 7})


def test_their_start_services(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk], sdk: Path
) -> None:
    """It gives git the credentials in the URL, and only over HTTPS: its own git, and that of the VM."""
    plato = new_plato(hub_scheme="https", old_clients=True)
    if plato.information["docker"] is not None:
        missing(plato.information["docker"])
    desk = new_desk(plato.environment)
    (desk.home / ".gitconfig").write_text("[user]\nname = Tester\nemail = tester@example.com\n")
    compose = {"services": {"web": {"image": "busybox", "command": "sleep 600", "init": True}}}
    (desk.work / "compose.yml").write_text(yaml.safe_dump(compose))
    write_config(desk, services={"main": {"type": "docker-compose", "file": "compose.yml"}})
    desk.good("start", "--from-config")
    theirs = Theirs(desk, sdk)
    authority = (plato.certificates / "ca.pem").read_text()
    trust = f"cat > /home/plato/ca.pem <<'END'\n{authority}END\n"
    trust += "printf '[http]\\nsslCAInfo = /home/plato/ca.pem\\n' > /root/.gitconfig"
    Client(plato).output(desk.state["session_id"], trust)
    done = theirs.good("start-services").out
    assert "Services started successfully!" in done
    branch = done.partition("Code pushed to branch: ")[2].split()[0]
    bare = str(plato.repository("taskboard"))
    files = subprocess.run(
        ["git", "-c", "safe.directory=*", "--git-dir", bare, "ls-tree", "--name-only", branch],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {".sandbox.yaml", "compose.yml", "plato-config.yml"} <= set(files.stdout.splitlines())
    assert "running" in desk.ssh("docker ps --all --format '{{.State}}'").out
    assert (
        desk.ssh("cat /home/plato/worktree/taskboard/plato-config.yml").out
        == (desk.work / "plato-config.yml").read_text()
    )


# ---------------------------------------------------------------------------
# each with a sandbox of the other
# ---------------------------------------------------------------------------

OURS = {
    "blank": BLANK,
    "simulator": ("start", "--simulator", "espocrm:staging"),
    "artifact": ("start", "--artifact-id", "art_abc123"),
    "config": ("start", "--from-config"),
}


@pytest.mark.parametrize("arguments", OURS.values(), ids=OURS)
def test_theirs_goes_on_with_ours(
    theirs: Theirs, desk: Desk, plato: LocalPlato, arguments: tuple[str, ...]
) -> None:
    desk.good(*arguments)
    state = desk.state
    pid = state["heartbeat_pid"]
    human = theirs.good("status").out
    for words in (
        f"Session ID:  {state['session_id']}",
        f"Job ID:      {state['job_id']}",
        f"Mode:        {state['mode']}",
        "VM Status:   running",
        f"Public URL:  {state['url']}",
        f"SSH:         ssh -F {state['ssh_config_path']} {state['ssh_host']}",
        f"Heartbeat:   running (PID: {pid})",
    ):
        assert f"  {words}\n" in human, human
    document = theirs.document("status", "--json")
    assert document == {**state, "vm_status": "running", "vm_status_reason": None, "vm_running": True}
    stopped = theirs.good("stop").out
    assert f"Stopped heartbeat process (PID: {pid})" in stopped
    eventually(lambda: not is_running(pid))
    assert living(plato) == []
    assert not desk.state_file.exists()
    assert [name for name in desk.leftovers() if name.startswith("ssh_")] == []
    assert desk.run("status").code == 3
    desk.good(*arguments)  # what theirs has left behind does not disturb
    desk.good("stop")


@pytest.mark.parametrize("mode", ["blank", "simulator", "config"])
def test_ours_goes_on_with_theirs(theirs: Theirs, desk: Desk, plato: LocalPlato, mode: str) -> None:
    options = MODES[mode]
    theirs.good("start", *options)
    state, record = desk.state, desk.state_file.read_bytes()
    pid = state["heartbeat_pid"]
    plato.wait_for_request("POST", "/heartbeat")
    human = desk.good("status").out
    assert human.startswith(f"Sandbox Status\n  Session ID:  {state['session_id']}\n")
    assert "  VM Status:   running\n" in human
    assert f"  Heartbeat:   running (PID: {pid})\n" in human
    if mode == "config":
        assert f"  SSH:         ssh -F ~/.plato/ssh_1.conf {state['ssh_host']}\n" in human
    document: dict[str, Any] = desk.good("status", "--json").document
    assert document["vm_running"] is True
    assert document["heartbeat"]["state"] == "ok"
    assert document["heartbeat"]["pid"] == pid
    assert state.items() <= document.items()
    assert desk.run(*BLANK).code == 5
    assert desk.state_file.read_bytes() == record
    desk.good("stop")
    eventually(lambda: not is_running(pid))
    assert living(plato) == []
    # What they put there for SSH is left to them.
    assert [name for name in desk.leftovers() if not name.startswith("ssh_1")] == []
    assert theirs.run("status").code == 1


def test_ours_replaces_theirs(theirs: Theirs, desk: Desk, plato: LocalPlato) -> None:
    theirs.good("start", *MODES["config"])
    before = desk.state
    desk.good(*BLANK, "--replace")
    assert living(plato) == [desk.state["job_id"]]
    assert desk.state["job_id"] != before["job_id"]
    eventually(lambda: not is_running(before["heartbeat_pid"]))
    assert desk.ssh("echo there").out == "there\n"


def test_ours_sees_that_their_heartbeat_died(theirs: Theirs, desk: Desk, plato: LocalPlato) -> None:
    theirs.good("start", *MODES["blank"])
    pid = desk.state["heartbeat_pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in desk.run("status").out
    plato.advance(130)
    gone = desk.run("status")
    assert gone.code == 3
    assert "heartbeat miss" in gone.out
    desk.good("stop")
    assert desk.leftovers() == []
