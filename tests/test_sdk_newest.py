"""Fidelity to today: the command line and the models of the newest SDK on the local Plato."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SDK_HEARTBEAT, SIMULATOR, Desk, NewestSdk, eventually, heartbeats, living, sent
from test_local_plato import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the first test of all installs the SDK

MODES = {
    "blank": ("--blank", "--cpus", "1", "--memory", "512", "--disk", "2048"),
    "blank on qemu": ("--blank", "--provider", "qemu"),
    "simulator": ("-s", "espocrm"),
    "simulator and tag": ("-s", "espocrm:staging"),
    "simulator, version and dataset": ("-s", "espocrm:1.1.0@base"),
    "artifact": ("-a", "art_abc123"),
    "config": ("-c",),
}
# What a start asks for, in this order, but for the polls and the heartbeats.
ORDER = ["make", "connect_network", "public_url", "info", "add_ssh_key"]


def asked(plato: LocalPlato) -> list[str]:
    """The last words of the paths that were asked for, without those that are repeated by the clock."""
    words = [request["path"].rpartition("/")[2] for request in plato.requests()]
    return [word for word in words if word not in ("wait_for_ready", "heartbeat")]


def nothing_strange(plato: LocalPlato) -> None:
    """Everything that was asked for is there, and nothing was sent that no model knows."""
    assert plato.unknown_fields() == []
    strange = [request for request in plato.requests() if request["status"] in (404, 405, 422, 500, 501)]
    assert strange == []


@pytest.mark.parametrize(("mode", "options"), MODES.items(), ids=MODES)
def test_start_status_ssh_stop(
    newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato, mode: str, options: tuple[str, ...]
) -> None:
    newest_sdk.good(desk, "start", *options)
    slot = newest_sdk.slot(desk)
    session_id = slot["session_id"]
    assert living(plato) == [slot["job_id"]]
    order = [word for word in asked(plato) if word != session_id]  # it may look for an artifact's simulator
    assert order == [word for word in ORDER if (word, mode) != ("info", "blank on qemu")]
    assert slot["network_connected"] is True
    assert slot["provider"] == ("qemu" if mode == "blank on qemu" else "firecracker")
    user = "plato" if mode == "blank on qemu" else "root"
    assert [body["username"] for body in sent(plato, "add_ssh_key")] == [user]
    told = newest_sdk.run(desk, "ssh", "--", "id -un; exit 9")
    assert (told.code, told.out.split()[-1]) == (9, user)
    nothing_strange(plato)


def test_status_and_stop(newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato) -> None:
    newest_sdk.good(desk, "start", "--blank")
    status = newest_sdk.good(desk, "status", "--json").document
    assert status["remote"]["jobs"][0]["status"] == "running"
    assert status["heartbeat"]["state"] == "running"
    assert heartbeats(desk, SDK_HEARTBEAT) == [newest_sdk.slot(desk)["heartbeat_pid"]]
    newest_sdk.good(desk, "stop")
    assert living(plato) == []
    eventually(lambda: not heartbeats(desk, SDK_HEARTBEAT))
    assert newest_sdk.slot(desk)["stopped_at"]
    nothing_strange(plato)


def test_no_network_until_it_is_asked_for(newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato) -> None:
    newest_sdk.good(desk, "start", "--blank", "--no-network")
    config = desk.work / newest_sdk.slot(desk)["ssh_config_path"]
    limited = config.read_text().replace("LogLevel ERROR", "LogLevel ERROR\n    ConnectTimeout 1")
    config.write_text(limited)
    refused = newest_sdk.run(desk, "ssh", "--", "true")
    assert refused.code == 255
    assert "banner exchange" in refused.err
    assert "success: True" in newest_sdk.good(desk, "connect-network").out
    assert "root" in newest_sdk.good(desk, "ssh", "--", "id -un").out
    newest_sdk.good(desk, "stop")


def test_a_network_that_fails_ends_their_start(newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato) -> None:
    body = {"detail": "WireGuard could not be installed"}
    plato.fault("status", path="*/connect_network", status=500, body=body)
    assert newest_sdk.run(desk, "start", "--blank").code == 1
    assert living(plato) == []


DATABASE = "/home/plato/app.db"
LISTENER = {"type": "db", "db_type": "sqlite", "db_database": DATABASE, "audit_ignore_tables": ["noise"]}


def statement(plato: LocalPlato, slot: dict[str, Any], text: str) -> None:
    """Run a statement in the VM's SQLite database."""
    program = f"import sqlite3; c = sqlite3.connect('{DATABASE}'); c.execute('{text}'); c.commit()"
    Client(plato).output(slot["session_id"], f'python3 -c "{program}"')


def mutations(newest_sdk: NewestSdk, desk: Desk) -> list[tuple[str, str]]:
    """Action and table of what `state` tells, whose worker must be up."""
    results = newest_sdk.good(desk, "state", "--json").document["results"]
    (result,) = results.values()
    assert result["success"], result
    return [(one["action"], one["table_name"]) for one in result["state"]["mutations"]]


def test_worker_state_snapshot_and_a_vm_of_it(
    newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato, new_desk: Callable[..., Desk]
) -> None:
    """What the snapshot stores is one flat dataset, and the VM of it knows the listeners from there."""
    path = desk.work / "plato-config.yml"
    config = yaml.safe_load(path.read_text())
    config["datasets"]["base"]["listeners"] = {"db": LISTENER}
    path.write_text(yaml.safe_dump(config))
    (desk.work / "flows.yml").write_text((SIMULATOR / "flows.yml").read_text())
    newest_sdk.good(desk, "start", "-c")
    slot = newest_sdk.slot(desk)
    statement(plato, slot, "CREATE TABLE tasks (id integer PRIMARY KEY)")
    statement(plato, slot, "CREATE TABLE noise (id integer PRIMARY KEY)")
    assert "The worker is not started" in newest_sdk.good(desk, "state").out
    assert newest_sdk.good(desk, "reset", "--json").document["success"] is False
    newest_sdk.good(desk, "start-worker", "--wait-timeout", "0")
    plato.wait_for(lambda snapshot: snapshot["sessions"][0]["jobs"][0]["worker"]["up"])
    statement(plato, slot, "INSERT INTO tasks VALUES (7)")
    assert mutations(newest_sdk, desk) == [("INSERT", "tasks")]
    assert newest_sdk.good(desk, "reset", "--json").document["success"] is True
    assert mutations(newest_sdk, desk) == []
    statement(plato, slot, "INSERT INTO tasks VALUES (8)")
    newest_sdk.good(desk, "clear-audit")
    assert mutations(newest_sdk, desk) == []

    newest_sdk.good(desk, "snapshot", "--wait")
    (body,) = sent(plato, "/snapshot")
    stored = yaml.safe_load(body["plato_config"])
    assert sorted(stored) == ["compute", "listeners", "metadata", "services"]
    artifact = newest_sdk.slot(desk)["artifact_id"]
    assert sent(plato, "/prefetch") == [{"artifact_id": artifact, "dataset": "base", "priority": 0}]
    told = json.loads(newest_sdk.good(desk, "artifact", "--json").out)
    assert json.dumps(told).count(artifact) >= 1
    record = Client(plato).call("GET", f"/api/v2/artifacts/{artifact}")
    assert (record["has_flows"], record["has_plato_config"]) == (True, True)
    assert record["credentials"]["roles"] == body["credentials"]["roles"]
    newest_sdk.good(desk, "stop")

    other = new_desk(plato.environment)
    (other.work / "plato-config.yml").unlink()
    newest_sdk.good(other, "start", "-a", artifact)
    slot = newest_sdk.slot(other)
    plato.wait_for(lambda snapshot: snapshot["sessions"][-1]["jobs"][0]["worker"]["up"])
    statement(plato, slot, "INSERT INTO tasks VALUES (9)")
    statement(plato, slot, "INSERT INTO noise VALUES (1)")
    assert ("INSERT", "tasks") in mutations(newest_sdk, other)
    newest_sdk.good(other, "pull-config")
    assert yaml.safe_load((other.work / "plato-config.yml").read_text()) == stored
    newest_sdk.good(other, "stop")
    nothing_strange(plato)


DRIVER = """
import json, sys
import httpx
from plato._generated.api.v1 import gitea
from plato._generated.api.v1.cluster import prefetch_snapshot
from plato._generated.api.v1.sandbox import healthy_services, healthy_worker, start_worker
from plato._generated.api.v1.simulator import get_db_config, get_env_flows, get_plato_config
from plato._generated.api.v2 import jobs, sessions
from plato._generated.api.v2.artifacts import get_artifact
from plato._generated.api.v2.jobs import get_flows, get_job_info
from plato._generated.api.v2.jobs import get_plato_config as get_job_config
from plato._generated.models import (
    AddSSHKeyRequest, CreateCheckpointRequest, CreateSessionFromEnvs, DbConfigResponse,
    ExecuteCommandRequest, Flow, PrefetchRequest, ResetSessionRequest, VMManagementRequest,
)

base_url, key, dataset, flows, text = sys.argv[1:]
client = httpx.Client(base_url=base_url, timeout=60)
answers = {}

def call(name, endpoint, **words):
    answer = endpoint.sync(client=client, x_api_key=key, **words)
    answers[name] = answer.model_dump(mode="json") if hasattr(answer, "model_dump") else answer
    return answers[name]

def begin(environment):
    request = {"type": "envs", "envs": [environment], "heartbeat_timeout": 0}
    made = call("make", sessions.make, body=CreateSessionFromEnvs.model_validate(request))
    session_id = made["session_id"]
    while not call("wait_for_ready", sessions.wait_for_ready, session_id=session_id, timeout=20)["ready"]:
        pass
    return session_id, made["envs"][0]["job_id"]

session_id, job_id = begin({"type": "resource", "simulator": "myapp", "sim_config": {"app_port": 3000}})
words = {"session_id": session_id}
call("connect_network", sessions.connect_network, **words)
call("details", sessions.get_session_details, **words)
call("jobs", sessions.list_jobs, **words)
call("info", get_job_info, job_id=job_id)
call("heartbeat", sessions.heartbeat, **words)
call("reset", sessions.reset, body=ResetSessionRequest(), **words)
call("public_url", sessions.get_public_url, **words)
call("execute", sessions.execute, body=ExecuteCommandRequest(command="echo out"), **words)
call("add_ssh_key", sessions.add_ssh_key, body=AddSSHKeyRequest(public_key="no key"), **words)
request = VMManagementRequest.model_validate(
    {"service": "myapp", "dataset": "base", "plato_dataset_config": json.loads(dataset)}
)
call("start_worker", start_worker, public_id=job_id, body=request)
call("healthy_services", healthy_services, public_id=job_id, body=request)
while not call("job_state", jobs.state, job_id=job_id)["success"]:
    pass
call("healthy_worker", healthy_worker, public_id=job_id)
call("state", sessions.state, merge_mutations=True, **words)
body = CreateCheckpointRequest(flows=flows, plato_config=text, override_service="market", target="a.example")
(taken,) = call("snapshot", sessions.snapshot, body=body, **words)["results"].values()
artifact = {"artifact_id": taken["artifact_id"]}
call("prefetch", prefetch_snapshot, body=PrefetchRequest(**artifact))
while call("artifact", get_artifact, **artifact)["status"] != "ready":
    pass
call("plato_config", get_plato_config, **artifact)
call("flows", get_env_flows, **artifact)
for one in call("db_config", get_db_config, **artifact):
    DbConfigResponse.model_validate(one)
call("close", sessions.close, **words)
again, second = begin({"type": "artifact", **artifact})
flows = get_flows.sync(client=client, x_api_key=key, job_id=second)
answers["job_flows"] = [Flow.model_validate(flow).name for flow in flows]
call("job_config", get_job_config, job_id=second)
call("close", sessions.close, session_id=again)
call("gitea", gitea.get_gitea_credentials)
call("list", sessions.list_sessions)
print(json.dumps({"job_id": job_id, "answers": answers}))
"""


def test_their_models_accept_every_answer(newest_sdk: NewestSdk, desk: Desk, plato: LocalPlato) -> None:
    listeners = {"db": {"type": "db", "db_type": "redis", "db_database": "0", "db_port": 6379}}
    dataset = {"compute": {"app_port": 3000}, "metadata": {"name": "My app"}, "listeners": listeners}
    flows = (SIMULATOR / "flows.yml").read_text()
    words = (plato.base_url, plato.api_key, json.dumps(dataset), flows, yaml.safe_dump(dataset))
    result = desk.run(command=[str(newest_sdk.python), "-c", DRIVER, *words], timeout=120)
    assert result.code == 0, result.err
    job_id, answers = result.document["job_id"], result.document["answers"]
    assert answers["connect_network"]["results"] == {job_id: True}
    assert answers["reset"]["results"][job_id]["success"] is False
    assert answers["details"]["jobs"][0]["status"] == "running"
    assert answers["info"]["provider"] == "firecracker"
    assert answers["artifact"]["simulator_name"] == "market"
    assert (answers["artifact"]["target"], answers["artifact"]["internal_app_port"]) == ("a.example", 3000)
    assert yaml.safe_load(answers["plato_config"]["plato_config"]) == dataset
    assert answers["job_config"]["listeners"]["db"]["db_type"] == "redis"
    assert answers["db_config"][0]["db_port"] == 6379
    assert answers["job_flows"] == ["login", "wrong_password", "add_task"]
    assert answers["prefetch"]["success"] is True
    assert living(plato) == []
    assert plato.unknown_fields() == []
