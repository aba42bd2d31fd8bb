"""`start`: what each mode and option asks of Plato, what is refused before, and what a failure undoes."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from typing import TYPE_CHECKING, Any, Callable

import pytest
import yaml
from conftest import PRODUCT, Desk, Result, altered, is_running, living, part, sent

if TYPE_CHECKING:
    from pathlib import Path

    from localplato import LocalPlato

BLANK = ["--blank", "--service", "myapp"]
KEY = "PLATO_API_KEY"
BASE_URL = "PLATO_BASE_URL"


def make_of(plato: LocalPlato, desk: Desk) -> dict[str, Any]:
    """The body of the `make` that created the desk's sandbox, its alias checked and taken out."""
    (session,) = [item for item in plato.sessions() if item["session_id"] == desk.state["session_id"]]
    (job,) = session["jobs"]
    bodies = [body for body in sent(plato, "/sessions/make") if body["envs"][0].get("alias") == job["alias"]]
    (body,) = bodies
    alias = body["envs"][0].pop("alias")
    assert re.fullmatch(r"sandbox-[0-9a-f]{8}", alias)
    return body


def asked(plato: LocalPlato, desk: Desk, path: str) -> list[dict[str, Any]]:
    """The bodies of the POST requests about the desk's sandbox."""
    state = desk.state
    found = [body for key in ("session_id", "job_id") for body in sent(plato, f"{state[key]}/{path}")]
    assert all(isinstance(body, dict) for body in found)
    return found


# Modes and options: (arguments, the `envs` entry of make, fields of .sandbox.yaml)
MODES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "config": (
        ["--from-config"],
        {
            "type": "resource",
            "simulator": "taskboard",
            "sim_config": {
                "cpus": 2,
                "memory": 2048,
                "disk": 10240,
                "app_port": 8080,
                "plato_messaging_port": 7000,
            },
        },
        {
            "mode": "config",
            "service": "taskboard",
            "dataset": "base",
            "cpus": 2,
            "memory": 2048,
            "disk": 10240,
        },
    ),
    "config with a dataset": (
        ["-c", "-d", "empty"],
        {
            "type": "resource",
            "simulator": "taskboard",
            "sim_config": {
                "cpus": 2,
                "memory": 2048,
                "disk": 10240,
                "app_port": 8080,
                "plato_messaging_port": 7000,
            },
        },
        {"mode": "config", "service": "taskboard", "dataset": "empty"},
    ),
    "simulator": (
        ["--simulator", "espocrm"],
        {"type": "simulator", "simulator": "espocrm", "tag": "latest", "dataset": "base"},
        {
            "mode": "artifact",
            "service": "espocrm",
            "simulator": "espocrm",
            "tag": "latest",
            "dataset": "base",
        },
    ),
    "simulator name:tag": (
        ["-s", "espocrm:prod-latest"],
        {"type": "simulator", "simulator": "espocrm", "tag": "prod-latest", "dataset": "base"},
        {"mode": "artifact", "service": "espocrm", "simulator": "espocrm:prod-latest", "tag": "prod-latest"},
    ),
    "simulator name:version@dataset": (
        ["-s", "espocrm:1.1.0@base"],
        {"type": "simulator", "simulator": "espocrm", "version": "1.1.0", "dataset": "base"},
        {"mode": "artifact", "service": "espocrm", "simulator": "espocrm:1.1.0@base", "dataset": "base"},
    ),
    "simulator name@dataset": (
        ["-s", "docuseal@base"],
        {"type": "simulator", "simulator": "docuseal", "tag": "latest", "dataset": "base"},
        {"service": "docuseal", "tag": "latest", "dataset": "base"},
    ),
    "simulator and --tag": (
        ["-s", "espocrm", "-t", "staging"],
        {"type": "simulator", "simulator": "espocrm", "tag": "staging", "dataset": "base"},
        {"tag": "staging", "service": "espocrm"},
    ),
    "simulator name:tag and the same --tag": (
        ["-s", "espocrm:staging", "--tag", "staging"],
        {"type": "simulator", "simulator": "espocrm", "tag": "staging", "dataset": "base"},
        {"tag": "staging"},
    ),
    "simulator and --dataset": (
        ["-s", "docuseal", "--dataset", "base"],
        {"type": "simulator", "simulator": "docuseal", "tag": "latest", "dataset": "base"},
        {"dataset": "base", "service": "docuseal"},
    ),
    "artifact": (
        ["--artifact-id", "art_abc123"],
        {"type": "artifact", "artifact_id": "art_abc123"},
        {"mode": "artifact", "artifact_id": "art_abc123", "service": "espocrm"},
    ),
    "blank": (
        BLANK,
        {
            "type": "resource",
            "simulator": "myapp",
            "sim_config": {"cpus": 2, "memory": 1024, "disk": 10240},
        },
        {"mode": "blank", "service": "myapp", "cpus": 2, "memory": 1024, "disk": 10240},
    ),
    "blank with sizes": (
        ["-b", "--service", "my-app.2", "--cpus", "4", "--memory", "2048", "--disk", "20480"],
        {
            "type": "resource",
            "simulator": "my-app.2",
            "sim_config": {"cpus": 4, "memory": 2048, "disk": 20480},
        },
        {"mode": "blank", "service": "my-app.2", "cpus": 4, "memory": 2048, "disk": 20480},
    ),
    "blank with the least": (
        [*BLANK, "--cpus", "1", "--memory", "512", "--disk", "1024"],
        {"type": "resource", "simulator": "myapp", "sim_config": {"cpus": 1, "memory": 512, "disk": 1024}},
        {"cpus": 1, "memory": 512, "disk": 1024},
    ),
    "blank with the most": (
        [*BLANK, "--cpus=8", "--memory=16384", "--disk=204800"],
        {
            "type": "resource",
            "simulator": "myapp",
            "sim_config": {"cpus": 8, "memory": 16384, "disk": 204800},
        },
        {"cpus": 8, "memory": 16384, "disk": 204800},
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "environment", "fields"), MODES.values(), ids=MODES)
def test_mode_reaches_the_api(
    visitor: Desk,
    shared_plato: LocalPlato,
    arguments: list[str],
    environment: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    visitor.good("start", *arguments)
    body = make_of(shared_plato, visitor)
    assert body == {"type": "envs", "envs": [environment], "timeout": 8 * 3600, "source": "SDK"}
    assert {name: visitor.state[name] for name in fields} == fields
    assert asked(shared_plato, visitor, "reset") == [{"source": "SDK"}]

    public_key = (visitor.plato_home / f"ssh_{visitor.state['session_id'].split('-')[0]}_key.pub").read_text()
    keys = asked(shared_plato, visitor, "add_ssh_key")
    assert keys == [{"public_key": public_key.strip(), "username": "root"}]
    assert visitor.ssh("id -un").out == "root\n"
    visitor.good("stop")
    assert visitor.leftovers() == []


@pytest.mark.long
def test_simulator_with_an_artifact_uuid(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", "-s", "espocrm:staging")
    session_id = visitor.state["session_id"]
    (session,) = [item for item in shared_plato.sessions() if item["session_id"] == session_id]
    artifact_id = session["jobs"][0]["artifact_id"]
    visitor.good("stop")

    visitor.good("start", "-s", f"espocrm:{artifact_id}")
    environment = {"type": "artifact", "artifact_id": artifact_id}
    assert make_of(shared_plato, visitor)["envs"] == [environment]
    assert (visitor.state["artifact_id"], visitor.state["service"]) == (artifact_id, "espocrm")
    assert "tag" not in visitor.state
    visitor.good("stop")


def test_lifetime_is_the_timeout_of_make(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", *BLANK, "--lifetime", "600", "--timeout", "77")
    assert make_of(shared_plato, visitor)["timeout"] == 600
    begins, ends = (yaml.safe_load(visitor.state[name]) for name in ("created_at", "expires_at"))
    assert (ends - begins).total_seconds() == 600
    visitor.good("stop")


def test_timeout_is_the_wait_only(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", *BLANK, "--timeout", "3")
    assert make_of(shared_plato, visitor)["timeout"] == 8 * 3600
    path = f"{visitor.state['session_id']}/wait_for_ready"
    queries = [request["query"] for request in shared_plato.requests("GET", path)]
    assert queries
    assert all(0 < int(query.partition("=")[2]) <= 3 for query in queries)
    visitor.good("stop")


def test_no_reset(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", *BLANK, "--no-reset")
    assert asked(shared_plato, visitor, "reset") == []
    visitor.good("stop")


# The working directory and the output


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["plain", "with some spaces", "-dash", "quo'te", "ünï→", "tab\there"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_working_directory(visitor: Desk, name: str, absolute: bool) -> None:
    (visitor.work / name).mkdir()
    given = str(visitor.work / name) if absolute else name
    visitor.good("start", *BLANK, f"--working-dir={given}")
    assert not visitor.state_file.exists()
    state = yaml.safe_load((visitor.work / name / ".sandbox.yaml").read_text())
    assert visitor.good("status", "--json", f"-w{given}").document["session_id"] == state["session_id"]
    conflict = visitor.run("start", *BLANK, f"-w{given}", "--json")
    assert conflict.code == 5
    visitor.good("stop", f"-w{given}")
    assert list((visitor.work / name).iterdir()) == []


def test_hints_name_the_working_directory(visitor: Desk) -> None:
    import shlex

    (visitor.work / "my simulator").mkdir()
    visitor.good("start", *BLANK, "-w", "my simulator")
    hint = visitor.run("start", *BLANK, "-w", "my simulator", "--json").error["hint"]
    command = shlex.split(hint.partition("`")[2].partition("`")[0])
    assert command[0] == "python3"
    assert command[1:] == [str(PRODUCT), "stop", "-w", "my simulator"]
    visitor.good(command=[sys.executable, *command[1:]])
    assert list((visitor.work / "my simulator").iterdir()) == []


@pytest.mark.sampled
@pytest.mark.parametrize("flags", [["--json"], ["-j"], ["-qj"], ["-jq"]], ids=" ".join)
def test_json_is_one_document(visitor: Desk, flags: list[str]) -> None:
    document = visitor.good("start", *BLANK, *flags).document
    state = visitor.state
    assert "error" not in document
    assert {name: document[name] for name in state} == state
    assert document["ssh_command"] == f"ssh -F {state['ssh_config_path']} {state['ssh_host']}"
    visitor.good("stop")


def test_json_in_a_cluster_of_flags(visitor: Desk) -> None:
    assert visitor.good("start", "-bj", "--service", "myapp").document["mode"] == "blank"
    assert visitor.run("start", "-jb").error["code"] == "usage"
    assert visitor.run("start", "-bj", "--frobnicate").error["code"] == "usage"
    visitor.good("stop")


def test_human_output(visitor: Desk) -> None:
    started = visitor.good("start", *BLANK)
    state = visitor.state
    lines = started.out.splitlines()
    assert lines[0] == "Sandbox started successfully!"
    for line in (
        f"  Session ID:  {state['session_id']}",
        f"  Job ID:      {state['job_id']}",
        "  Mode:        blank",
        "  Service:     myapp",
        f"  Public URL:  {state['url']}",
        f"  SSH:         ssh -F ~/.plato/{os.path.basename(state['ssh_config_path'])} {state['ssh_host']}",
        f"  Heartbeat:   running (PID: {state['heartbeat_pid']})",
    ):
        assert line in lines
    assert state["url"] == f"{state['public_url']}?_plato_router_target=myapp.web.plato.so"
    visitor.good("stop")


def test_quiet_says_nothing_but_the_result(visitor: Desk) -> None:
    started = visitor.good("start", *BLANK, "--quiet")
    assert [line.partition(":")[0] for line in started.err.splitlines()] == ["Warning"]  # nothing to reset
    assert visitor.good("stop", "-q").err == ""
    assert "Error: " in visitor.run("stop", "-q").err


def test_verbose_shows_requests_and_no_key(visitor: Desk) -> None:
    started = visitor.good("start", *BLANK, "--verbose")
    for shown in ("POST /api/v2/sessions/make: 200", "ssh-keygen", "wait_for_ready", "heartbeat-child"):
        assert shown in started.err
    assert visitor.environment[KEY] not in started.err + started.out
    visitor.good("stop")


# What is refused before anything is asked: (arguments, what the message names)
USAGE: dict[str, tuple[list[str], str]] = {
    "no mode": (["start"], "--from-config"),
    "two modes": (["start", "-c", *BLANK], "--blank"),
    "three modes": (["start", "-c", "-s", "espocrm", "-a", "art_abc123"], "--artifact-id"),
    "blank without service": (["start", "--blank"], "--service"),
    "empty service": (["start", "--blank", "--service", ""], "--service"),
    "service with a slash": (["start", "--blank", "--service", "a/b"], "a/b"),
    "service with a space": (["start", "--blank", "--service", "a b"], "a b"),
    "service with a line break": (["start", "--blank", "--service", "a\nb"], "--service"),
    "service with a trailing line break": (["start", "--blank", "--service", "ab\n"], "--service"),
    "empty simulator": (["start", "-s", ""], "--simulator"),
    "blank simulator": (["start", "-s", "  "], "--simulator"),
    "simulator without name": (["start", "-s", ":latest"], "--simulator"),
    "simulator without tag": (["start", "-s", "espocrm:"], "--simulator"),
    "two tags": (["start", "-s", "espocrm:staging", "-t", "latest"], "--tag"),
    "empty tag": (["start", "-s", "espocrm", "-t", ""], "--tag"),
    "empty artifact": (["start", "-a", ""], "--artifact-id"),
    "blank artifact": (["start", "-a", " "], "--artifact-id"),
    "empty dataset": (["start", "-c", "-d", ""], "--dataset"),
    "empty dataset of a simulator": (["start", "-s", "espocrm", "--dataset="], "--dataset"),
    "dataset of an artifact": (["start", "-a", "art_abc123", "-d", "base"], "--dataset"),
    "dataset of a blank VM": (["start", *BLANK, "-d", "base"], "--dataset"),
    "tag of a config": (["start", "-c", "-t", "latest"], "--tag"),
    "tag of an artifact": (["start", "-a", "art_abc123", "-t", "latest"], "--tag"),
    "service of a config": (["start", "-c", "--service", "x"], "--service"),
    "cpus of a config": (["start", "-c", "--cpus", "2"], "--cpus"),
    "memory of a simulator": (["start", "-s", "espocrm", "--memory", "2048"], "--memory"),
    "disk of an artifact": (["start", "-a", "art_abc123", "--disk", "20480"], "--disk"),
    "cpus 0": (["start", *BLANK, "--cpus", "0"], "--cpus"),
    "cpus 9": (["start", *BLANK, "--cpus", "9"], "--cpus"),
    "cpus a word": (["start", *BLANK, "--cpus", "two"], "--cpus"),
    "memory 511": (["start", *BLANK, "--memory", "511"], "--memory"),
    "memory 16385": (["start", *BLANK, "--memory", "16385"], "--memory"),
    "disk 1023": (["start", *BLANK, "--disk", "1023"], "--disk"),
    "disk 204801": (["start", *BLANK, "--disk", "204801"], "--disk"),
    "disk a fraction": (["start", *BLANK, "--disk", "2048.5"], "--disk"),
    "timeout 0": (["start", *BLANK, "--timeout", "0"], "--timeout"),
    "timeout negative": (["start", *BLANK, "--timeout=-5"], "--timeout"),
    "timeout nan": (["start", *BLANK, "--timeout", "nan"], "--timeout"),
    "timeout infinite": (["start", *BLANK, "--timeout", "inf"], "--timeout"),
    "timeout a word": (["start", *BLANK, "--timeout", "soon"], "--timeout"),
    "lifetime 0": (["start", *BLANK, "--lifetime", "0"], "--lifetime"),
    "lifetime too long": (["start", *BLANK, "--lifetime", "604801"], "--lifetime"),
    "option without its value": (["start", "--simulator"], "simulator"),
    "unknown option": (["start", *BLANK, "--frobnicate"], "--frobnicate"),
    "shortened option": (["start", "--blan", "--service", "x"], "--blan"),
    "a word too many": (["start", *BLANK, "now"], "now"),
    "option of another command": (["stop", "--replace"], "--replace"),
    "option without a command": (["--json", "--quiet"], "--json"),
    "misspelt start": (["strat"], "strat"),
    "misspelt status": (["stauts"], "stauts"),
    "no such command": (["frobnicate"], "frobnicate"),
    "missing working directory": (["start", *BLANK, "-w", "nowhere"], "nowhere"),
    "empty working directory": (["start", *BLANK, "-w", ""], "--working-dir"),
    "working directory is a file": (["start", *BLANK, "-w", "plato-config.yml"], "plato-config.yml"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "named"), USAGE.values(), ids=USAGE)
def test_usage_errors(visitor: Desk, shared_plato: LocalPlato, arguments: list[str], named: str) -> None:
    before = len(shared_plato.requests())
    result = visitor.run(*arguments, "--json")
    assert result.code == 2
    assert result.error["code"] == "usage"
    assert named.replace("\n", "\\n") in result.error["message"].replace("\n", "\\n")
    assert result.err.startswith("Error: ")
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


@pytest.mark.parametrize(
    "arguments", [["start"], ["start", "--frobnicate"], ["strat"], ["start", *BLANK, "--cpus", "9"]]
)
def test_usage_errors_without_json(visitor: Desk, arguments: list[str]) -> None:
    assert visitor.run(*arguments) == Result(2, "", visitor.run(*arguments, "--json").err)


@pytest.mark.parametrize(("word", "meant"), [("strat", "start"), ("stauts", "status"), ("sotp", "stop")])
def test_a_misspelt_command_is_understood(visitor: Desk, word: str, meant: str) -> None:
    assert f"{meant}`?" in visitor.run(word, "--json").error["message"]


# What the environment says wrongly: (variables, exit code, what the message names)
ENVIRONMENT: dict[str, tuple[dict[str, str], int, str]] = {
    "no key": ({KEY: ""}, 4, KEY),
    "blank key": ({KEY: "  "}, 4, KEY),
    "key with a line break": ({KEY: "abcdefgh\nijkl"}, 4, KEY),
    "key with a carriage return": ({KEY: "abcdefgh\rijkl"}, 4, KEY),
    "key that is not ASCII": ({KEY: "schlüssel"}, 4, KEY),
    "base URL is a word": ({BASE_URL: "plato"}, 2, BASE_URL),
    "base URL without host": ({BASE_URL: "https://"}, 2, BASE_URL),
    "base URL of another scheme": ({BASE_URL: "ftp://127.0.0.1"}, 2, BASE_URL),
    "base URL with a password": ({BASE_URL: "https://me:secret@plato.so"}, 2, BASE_URL),
    "base URL with a query": ({BASE_URL: "https://plato.so?x=1"}, 2, BASE_URL),
    "base URL with a space": ({BASE_URL: "https://plato so"}, 2, BASE_URL),
    "base URL with a line break": ({BASE_URL: "http://127.0.0.1\r\nHost: x"}, 2, BASE_URL),
    "base URL with a port too high": ({BASE_URL: "http://127.0.0.1:65536"}, 2, BASE_URL),
    "base URL with port 0": ({BASE_URL: "http://127.0.0.1:0"}, 2, BASE_URL),
    "base URL over plain http": ({BASE_URL: "http://plato.so"}, 2, "http"),
    "base URL over plain http to a private address": ({BASE_URL: "http://192.168.1.2:8000"}, 2, "http"),
    "base URL over plain http to a lookalike": ({BASE_URL: "http://localhost.example.com"}, 2, "http"),
    "gateway port is a word": ({"PLATO_GATEWAY_PORT": "https"}, 2, "PLATO_GATEWAY_PORT"),
    "gateway port too high": ({"PLATO_GATEWAY_PORT": "65536"}, 2, "PLATO_GATEWAY_PORT"),
    "interval 0": ({"PLATO_HEARTBEAT_INTERVAL_SECONDS": "0"}, 2, "PLATO_HEARTBEAT_INTERVAL_SECONDS"),
    "interval nan": ({"PLATO_HEARTBEAT_INTERVAL_SECONDS": "nan"}, 2, "PLATO_HEARTBEAT_INTERVAL_SECONDS"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("variables", "code", "named"), ENVIRONMENT.values(), ids=ENVIRONMENT)
def test_a_wrong_environment(
    visitor: Desk, shared_plato: LocalPlato, variables: dict[str, str], code: int, named: str
) -> None:
    before = len(shared_plato.requests())
    result = visitor.run("start", *BLANK, "--json", environment=variables)
    assert result.code == code
    assert named in result.error["message"]
    assert "secret" not in result.error["message"].replace("PLATO", "") or BASE_URL in variables
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_a_host_name_that_cannot_be(visitor: Desk) -> None:
    result = visitor.run("start", *BLANK, "--json", environment={BASE_URL: "https://a..b"})
    assert result.code in (2, 6)
    assert "a..b" in result.error["message"]
    assert visitor.leftovers() == []


def test_a_wrong_key(visitor: Desk, shared_plato: LocalPlato) -> None:
    wrong = "pk-wrong-0123456789"
    result = visitor.run("start", *BLANK, "--json", "--verbose", environment={KEY: wrong})
    assert result.code == 4
    assert "401" in result.error["message"]
    assert KEY in result.error["hint"]
    assert wrong not in result.out + result.err
    assert visitor.leftovers() == []
    assert shared_plato.requests()[-1]["key"] == "wrong"


def test_the_key_may_have_white_space_around_it(visitor: Desk) -> None:
    visitor.good("start", *BLANK, environment={KEY: f" {visitor.environment[KEY]}\n"})
    visitor.good("stop")


@pytest.mark.sampled
@pytest.mark.parametrize("suffix", ["/", "/api", "/api/"])
def test_the_base_url_may_end_in_api(visitor: Desk, suffix: str) -> None:
    visitor.good("start", *BLANK, environment={BASE_URL: visitor.environment[BASE_URL] + suffix})
    assert visitor.state["base_url"] == visitor.environment[BASE_URL]
    visitor.good("stop")


def test_a_working_directory_that_was_removed(visitor: Desk) -> None:
    (visitor.work / "gone").mkdir()
    script = 'cd gone && rmdir ../gone && exec "$@"'
    result = visitor.run(command=["sh", "-c", script, "sh", *visitor.command("start", *BLANK, "--json")])
    assert result.error["code"] != "internal"
    assert result.code in (1, 2)


def test_a_directory_whose_name_is_not_text(visitor: Desk) -> None:
    place = os.fsencode(visitor.work) + b"/caf\xe9"
    os.mkdir(place)
    (visitor.work / "plato-config.yml").rename(os.fsdecode(place) + "/plato-config.yml")
    result = visitor.run("start", "-c", "--json", "-w", os.fsdecode(place))
    if result.code:
        assert result.error["code"] != "internal", result.error
        assert os.listdir(place) == [b"plato-config.yml"]
    else:
        visitor.good("stop", "-w", os.fsdecode(place))


# A sandbox that is here already


def test_a_live_sandbox_is_a_conflict(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    before, status = desk.state_file.read_bytes(), desk.state_file.stat()
    for arguments in (BLANK, ["-c"], ["-s", "docuseal"]):
        result = desk.run("start", *arguments, "--json")
        assert result.code == 5
        assert desk.state["session_id"] in result.error["message"]
        assert "stop" in result.error["hint"]
        assert "--replace" in result.error["hint"]
    assert desk.state_file.read_bytes() == before
    assert desk.state_file.stat().st_mtime_ns == status.st_mtime_ns
    assert len(plato.requests("POST", "/make")) == 1
    assert is_running(desk.state["heartbeat_pid"])


@pytest.mark.long
def test_replace_stops_first_and_then_creates(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    old = desk.state
    desk.good("start", "-s", "docuseal", "--replace")
    new = desk.state
    assert new["session_id"] != old["session_id"]
    assert living(plato) == [new["job_id"]]
    assert not is_running(old["heartbeat_pid"])
    order = [r["path"].rpartition("/")[2] for r in plato.requests("POST") if "heartbeat" not in r["path"]]
    assert order[order.index("close") :][:2] == ["close", "make"]
    files = {path.name for path in desk.plato_home.iterdir()}
    assert not {name for name in files if old["session_id"].split("-")[0] in name}


def test_replace_where_nothing_is(visitor: Desk) -> None:
    visitor.good("start", *BLANK, "--replace")
    visitor.good("stop")


def test_replace_with_options_that_are_wrong_keeps_the_old_one(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    before = desk.state_file.read_bytes()
    assert desk.run("start", "--replace", "-c", "-d", "nope").code == 2
    assert desk.run("start", "--replace", "--blank").code == 2
    assert desk.state_file.read_bytes() == before
    assert living(plato) == [desk.state["job_id"]]


@pytest.mark.long
def test_replace_that_cannot_close_creates_nothing(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    before = desk.state_file.read_bytes()
    plato.fault("status", path="*/close", status=500, times=-1)
    result = desk.run("start", *BLANK, "--replace", "--json")
    assert result.code == 6
    assert desk.state_file.read_bytes() == before
    assert len(plato.requests("POST", "/make")) == 1
    assert is_running(desk.state["heartbeat_pid"])


def test_a_recorded_sandbox_that_is_gone_makes_way(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    old = desk.state
    plato.admin("POST", "advance", {"seconds": 8 * 3600 + 1})
    started = desk.good("start", *BLANK, "--json")
    assert "gone" in started.err
    assert living(plato) == [started.document["job_id"]]
    assert not is_running(old["heartbeat_pid"])
    assert not list(desk.plato_home.glob(f"*{old['session_id'].split('-')[0]}*"))


@pytest.mark.long
def test_a_record_stands_while_the_api_is_unreachable(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", *BLANK)
    before = desk.state_file.read_bytes()
    plato.fault("reset_before_acting", path="*/sessions/*", method="GET", times=-1)
    result = desk.run("start", *BLANK, "--json")
    assert result.code == 6
    assert desk.state_file.read_bytes() == before
    plato.clear_faults()
    plato.fault("status", path="*/sessions/*", method="GET", status=401, times=-1)
    assert desk.run("start", *BLANK, "--json").code == 4
    assert desk.state_file.read_bytes() == before
    assert len(plato.requests("POST", "/make")) == 1


# What fails after `make`: everything is closed and removed


def nothing_left(desk: Desk, plato: LocalPlato) -> None:
    assert living(plato) == []
    assert all(session["closed"] for session in plato.sessions())
    assert desk.leftovers() == []
    assert not desk.plato_home.exists() or list(desk.plato_home.iterdir()) == []


UNKNOWN = {
    "simulator": (["-s", "nonesuch"], "nonesuch"),
    "tag": (["-s", "espocrm:nonesuch"], "nonesuch"),
    "tag option": (["-s", "espocrm", "-t", "nonesuch"], "nonesuch"),
    "dataset": (["-s", "espocrm", "-d", "nonesuch"], "nonesuch"),
    "artifact": (["-a", "art_nonesuch"], "art_nonesuch"),
    "artifact uuid": (["-s", "espocrm:00000000-0000-4000-8000-000000000000"], "00000000-0000-4000-8000"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "named"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_plato_does_not_know(desk: Desk, plato: LocalPlato, arguments: list[str], named: str) -> None:
    result = desk.run("start", *arguments, "--json")
    assert result.code == 1
    assert named in result.error["message"]
    assert len(plato.sessions()) == 1
    nothing_left(desk, plato)


@pytest.mark.parametrize("envs", [[], [{"alias": "x"}], [None], "none"], ids=str)
def test_a_session_without_a_vm(desk: Desk, plato: LocalPlato, envs: Any) -> None:
    plato.fault("status", path="*/make", status=200, body={"session_id": "abc-def", "envs": envs})
    result = desk.run("start", *BLANK, "--json")
    assert result.code == 1
    assert "could not create" in result.error["message"]
    (close,) = plato.requests("POST", "/close")
    assert "/abc-def/" in close["path"]
    nothing_left(desk, plato)


def test_a_refused_session_that_cannot_be_closed_stays_on_record(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/close", status=500, times=-1)
    result = desk.run("start", "-s", "nonesuch", "--json")
    assert "nonesuch" in result.error["message"]
    assert " stop" in result.error["hint"]
    assert desk.state["session_id"] == plato.sessions()[0]["session_id"]
    plato.clear_faults()
    desk.good("stop")
    nothing_left(desk, plato)


# The fault, how the message begins to explain it, the exit code
AFTER_MAKE: dict[str, tuple[dict[str, Any], str, int]] = {
    "boot fails": ({"effect": "boot_failure", "reason": "no kernel found"}, "no kernel found", 1),
    "ready answers 404": ({"effect": "status", "path": "*/wait_for_ready", "status": 404}, "booting", 3),
    "ready answers 410": ({"effect": "status", "path": "*/wait_for_ready", "status": 410}, "booting", 3),
    "ready answers 401": ({"effect": "status", "path": "*/wait_for_ready", "status": 401}, "401", 4),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("fault", "told", "code"), AFTER_MAKE.values(), ids=AFTER_MAKE)
def test_a_failure_after_make_is_undone(
    desk: Desk, plato: LocalPlato, fault: dict[str, Any], told: str, code: int
) -> None:
    plato.fault(**fault)
    result = desk.run("start", *BLANK, "--json")
    assert result.code == code
    assert told in result.error["message"]
    assert "Nothing is left running" in result.error["message"]
    assert len(plato.sessions()) == 1
    nothing_left(desk, plato)


def test_a_failure_that_cannot_be_undone_names_stop(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("boot_failure", reason="no kernel found")
    plato.fault("status", path="*/close", status=500, times=-1)
    result = desk.run("start", *BLANK, "--json")
    assert "no kernel found" in result.error["message"]
    assert "Nothing is left running" not in result.error["message"]
    assert " stop" in result.error["hint"]
    assert desk.state["session_id"] == plato.sessions()[0]["session_id"]
    plato.clear_faults()
    desk.good("stop")
    nothing_left(desk, plato)


@pytest.mark.parametrize("status", [200, 408])
def test_never_ready(
    new_desk: Callable[..., Desk], new_plato: Callable[..., LocalPlato], status: int
) -> None:
    plato = new_plato(not_ready_status=status)
    desk = new_desk(plato.environment)
    plato.fault("never_ready")
    result = desk.run("start", *BLANK, "--timeout", "1", "--json")
    assert result.code == 7
    assert result.error["code"] == "timed_out"
    assert "--timeout" in result.error["hint"]
    nothing_left(desk, plato)


# Parts of the system that are missing or in the way


def programs_without(desk: Desk, *missing: str) -> dict[str, str]:
    """A PATH with the OpenSSH client's programs but for some."""
    programs = desk.place / "programs"
    programs.mkdir()
    for name in {"ssh", "ssh-keygen"} - set(missing):
        (programs / name).symlink_to(part(name, "openssh-client"))
    return {"PATH": str(programs)}


@pytest.mark.sampled
@pytest.mark.parametrize("missing", [["ssh"], ["ssh-keygen"], ["ssh", "ssh-keygen"]], ids=" and ".join)
@pytest.mark.parametrize("mode", [BLANK, ["-c"]], ids=["blank", "config"])
def test_without_openssh(
    visitor: Desk, shared_plato: LocalPlato, missing: list[str], mode: list[str]
) -> None:
    environment = programs_without(visitor, *missing)
    started = visitor.good("start", *mode, "--json", environment=environment)
    assert f"Warning: {missing[-1]} could not be run: No such file" in started.err
    assert "`sync` goes through the API" in started.err
    if "ssh-keygen" in missing:
        assert started.document["ssh_command"] is None
        assert not {"ssh_host", "ssh_config_path", "ssh_private_key_path"} & set(visitor.state)
        assert asked(shared_plato, visitor, "add_ssh_key") == []
    status = visitor.good("status", environment=environment)
    assert "  VM Status:   running\n" in status.out
    visitor.good("sync", environment=environment)
    visitor.good("stop", environment=environment)
    assert visitor.leftovers() == []


def test_ssh_keygen_that_fails(desk: Desk, plato: LocalPlato) -> None:
    environment = programs_without(desk, "ssh-keygen")
    broken = desk.place / "programs" / "ssh-keygen"
    broken.write_text("#!/bin/sh\necho 'no entropy today' >&2\nexit 3\n")
    broken.chmod(0o755)
    result = desk.good("start", *BLANK, "--json", environment=environment)
    assert "no entropy today" in result.err
    assert "`sync` goes through the API" in result.err
    assert result.document["ssh_command"] is None
    desk.good("sync")
    desk.good("stop")
    nothing_left(desk, plato)


def test_a_key_that_plato_does_not_install(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/add_ssh_key", status=500, times=-1)
    result = desk.good("start", *BLANK, "--json")
    assert "`sync` goes through the API" in result.err
    assert result.document["ssh_command"] is None
    desk.good("sync")


def test_a_windows_vm_gets_the_key_of_plato(desk: Desk, plato: LocalPlato) -> None:
    ready = {"ready": True, "job_id": "x", "status": "running", "provider": "qemu"}
    body = {"ready": True, "status": "ready", "session_id": "x", "results": {"x": ready}}
    plato.fault(
        "content_type", path="*/wait_for_ready", body=body, headers={"content-type": "application/json"}
    )
    desk.good("start", *BLANK)
    (key,) = asked(plato, desk, "add_ssh_key")
    assert key["username"] == "plato"
    assert desk.ssh("id -un").out == "plato\n"


def test_the_public_url_may_be_unknown(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/public_url", status=404, times=-1)
    started = desk.good("start", *BLANK, "--json")
    assert "Warning: " in started.err
    assert "public_url" not in desk.state
    assert "url" not in desk.state
    desk.good("stop")


def test_plato_home_is_made(visitor: Desk) -> None:
    home = visitor.place / "deep" / "below" / "plato home"
    environment = {"PLATO_HOME": str(home)}
    visitor.good("start", *BLANK, environment=environment)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert str(home) in visitor.state["ssh_config_path"]
    assert not (visitor.home / ".plato").exists()
    visitor.good("stop", environment=environment)
    assert list(home.iterdir()) == []


def test_a_shared_directory_as_plato_home_keeps_its_mode(visitor: Desk) -> None:
    home = visitor.place / "shared"
    home.mkdir()
    home.chmod(0o2770)
    visitor.good("start", *BLANK, environment={"PLATO_HOME": str(home)})
    assert stat.S_IMODE(home.stat().st_mode) == 0o2770
    secret = [path for path in home.iterdir() if path.suffix != ".pub" and "known_hosts" not in path.name]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    visitor.good("stop", environment={"PLATO_HOME": str(home)})


def home_is_a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file"


def home_is_below_a_file(place: Path) -> Path:
    return home_is_a_file(place) / "plato"


def home_is_a_dangling_link(place: Path) -> Path:
    (place / "link").symlink_to("nowhere/at all")
    return place / "link"


def home_is_not_a_place_for_files(place: Path) -> Path:
    return type(place)("/proc/plato")


@pytest.mark.parametrize(
    "make",
    [home_is_a_file, home_is_below_a_file, home_is_a_dangling_link, home_is_not_a_place_for_files],
    ids=lambda make: make.__name__,
)
def test_plato_home_cannot_be_used(visitor: Desk, shared_plato: LocalPlato, make: Any) -> None:
    home = make(visitor.place)
    before = len(shared_plato.requests())
    result = visitor.run("start", *BLANK, "--json", environment={"PLATO_HOME": str(home)})
    assert result.code == 1
    assert home.name in result.error["message"]
    assert "PLATO_HOME" in result.error["hint"]
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


READ_ONLY = 'mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD" && cd "$PWD" && exec "$@"'
FULL_HOME = """mount -t tmpfs -o size=64k,mode=700 tmpfs "$PLATO_HOME" &&
! head -c 100000 /dev/zero 2>/dev/null >"$PLATO_HOME/all" && "$@"
code=$?; ls "$PLATO_HOME" >&2; exit $code"""


def mounted(desk: Desk, script: str, *arguments: str) -> list[str]:
    """The product in a mount namespace of its own, whoever runs it, which a script prepares."""
    unshare = [part("unshare", "util-linux"), "--user", "--map-root-user", "--mount"]
    return [*unshare, "sh", "-c", script, "sh", *desk.command(*arguments)]


def in_a_read_only_directory(desk: Desk, *arguments: str) -> list[str]:
    return mounted(desk, READ_ONLY, *arguments)


def test_a_read_only_working_directory(visitor: Desk, shared_plato: LocalPlato) -> None:
    before = len(shared_plato.requests())
    result = visitor.run(command=in_a_read_only_directory(visitor, "start", *BLANK, "--json"))
    assert result.code == 1
    assert ".sandbox.yaml" in result.error["message"]
    assert "Read-only" in result.error["message"]
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_plato_home_on_a_read_only_file_system(visitor: Desk, shared_plato: LocalPlato) -> None:
    (visitor.work / "plato home").mkdir()
    (visitor.place / "other").mkdir()
    before = len(shared_plato.requests())
    command = in_a_read_only_directory(visitor, "start", *BLANK, "--json", "-w", "../other")
    for home in ("plato home", "new/home"):
        result = visitor.run(command=command, environment={"PLATO_HOME": home})
        assert result.code == 1
        assert home in result.error["message"]
        assert "PLATO_HOME" in result.error["hint"]
    assert list((visitor.place / "other").iterdir()) == []
    assert len(shared_plato.requests()) == before


def test_a_user_without_a_home(visitor: Desk, shared_plato: LocalPlato) -> None:
    """Neither HOME nor an account, as in some containers: nothing is made in a directory named ~."""
    before = len(shared_plato.requests())
    files = set(visitor.work.iterdir())
    code = "import os.path; os.path.expanduser = lambda path: path  # what it does for a user without a home"
    result = visitor.run(command=altered(code, "start", *BLANK, "--json"))
    assert result.code == 2
    assert "PLATO_HOME" in result.error["hint"]
    assert set(visitor.work.iterdir()) == files
    assert len(shared_plato.requests()) == before
    visitor.environment["PLATO_HOME"] = str(visitor.place / "elsewhere")
    visitor.good(command=altered(code, "start", *BLANK))
    visitor.good("stop")


def test_a_full_disk_is_known_before_a_vm_is_made(visitor: Desk, shared_plato: LocalPlato) -> None:
    before = len(shared_plato.requests())
    home = visitor.place / "full"
    home.mkdir()
    command = mounted(visitor, FULL_HOME, "start", *BLANK)
    result = visitor.run(command=command, environment={"PLATO_HOME": str(home)})
    assert result.code == 1
    assert "No space left on device" in result.err
    assert result.err.endswith("\nall\n")  # nothing of ours is there
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_stop_in_a_read_only_directory(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", *BLANK)
    state = visitor.state
    result = visitor.run(command=in_a_read_only_directory(visitor, "stop", "--json"))
    assert result.code == 1
    assert ".sandbox.yaml" in result.error["message"]
    assert state["job_id"] not in living(shared_plato)
    assert not is_running(state["heartbeat_pid"])
    assert visitor.good("stop", "--json").document["session_id"] == state["session_id"]
    assert visitor.leftovers() == []


def test_start_through_a_symbolic_link(visitor: Desk) -> None:
    link = visitor.place / "link"
    link.symlink_to(visitor.work)
    visitor.good("start", *BLANK, "-w", str(link))
    assert visitor.run("start", *BLANK).code == 5
    visitor.good("stop")
    assert visitor.leftovers() == []


@pytest.mark.long
def test_unknown_fields_are_never_sent(desk: Desk, plato: LocalPlato) -> None:
    for arguments in (["-c"], ["-s", "espocrm"], ["-a", "art_abc123"], BLANK):
        desk.good("start", *arguments, "--replace")
    desk.good("stop")
    assert plato.unknown_fields() == []
    assert json.dumps(plato.requests()).count(plato.api_key) == 0


@pytest.mark.parametrize(
    ("words", "named", "hint"),
    [
        (["start", "-c", "--cpuss", "3"], "--cpuss", "--cpus?"),
        (["start", "-c", "--lifetme=60"], "--lifetme=60", "--lifetime?"),
        (["stop", "--sesion-id", "x"], "--sesion-id", "--session-id?"),
        (["status", "--zzz"], "--zzz", "status --help"),
        (["status", "extra"], "extra", "status --help"),
        (["--jsno"], "--jsno", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_word_and_what_was_meant(visitor: Desk, words: list[str], named: str, hint: str) -> None:
    result = visitor.run(*words)
    assert result.code == 2
    assert named in result.err
    assert result.err.endswith(f"{hint}\n")


def test_config_problems_are_told_as_seen_from_here(visitor: Desk) -> None:
    (visitor.work / "below").mkdir(exist_ok=True)
    config = visitor.work / "below" / "plato-config.yml"
    config.write_text("service: 12\ndatasets:\n  base:\n    compute:\n      memmory: 3\n")
    told = visitor.run("start", "-c", "-w", "below").err
    assert "below/plato-config.yml:1:10: " in told
    assert str(config) not in told
    assert "below/plato-config.yml:5:7: `datasets.base.compute` has no field `memmory`; did you mean" in told
