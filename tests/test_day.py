"""What one does with a sandbox all day: check the config, log in, run something there, see what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, ROOT, Desk, eventually, part

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato


@pytest.fixture
def started(desk: Desk) -> Desk:
    part("sshd", "openssh-server")
    desk.good(*BLANK)
    return desk


def run(desk: Desk, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The product with something to read on its standard input."""
    environment = {**desk.environment}
    return subprocess.run(
        desk.command(*words), cwd=desk.work, env=environment, input=stdin, capture_output=True, text=True
    )


# ---------------------------------------------------------------------------
# exec and ssh
# ---------------------------------------------------------------------------


def test_exec_is_like_a_local_command(started: Desk) -> None:
    done = run(started, "exec", "sh", "-c", 'cat; echo "$1|$2" >&2; exit 7', "x", "a b", "-n", stdin="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n", "a b|-n\n")
    done = run(started, "exec", "-q", "--", "echo one | tr o 0; exit 3")
    assert (done.returncode, done.stdout) == (3, "0ne\n")
    document = started.run("exec", "--json", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert document.code == 3
    assert document.document == {"exit_code": 3, "via": "ssh", "stdout": "out\n", "stderr": "err\n"}


def test_exec_without_a_command(started: Desk) -> None:
    for words in (["exec"], ["exec", "--"]):
        result = started.run(*words)
        assert result.code == 2
        assert "no command to run" in result.err


def test_exec_goes_through_the_api_where_ssh_does_not_answer(started: Desk, plato: LocalPlato) -> None:
    started.tune(SSH_ANSWER_SECONDS=2.0, SSH_FIRST_SECONDS=1.0)
    started.hang_up()
    plato.fault("gateway_down", times=-1)
    done = run(started, "exec", "sh", "-c", "cat; echo no >&2; exit 4", stdin="in\n")
    assert (done.returncode, done.stdout) == (4, "in\n")
    assert "Going on through the API." in done.stderr
    assert done.stderr.endswith("\nno\n")
    document = started.run("exec", "--json", "pwd").document
    assert (document["exit_code"], document["via"]) == (0, "api")
    assert started.run("ssh", "true").code == 6


def test_ssh_is_the_systems(started: Desk) -> None:
    done = run(started, "ssh", "--", "cat; exit 5", stdin="in\n")
    assert (done.returncode, done.stdout) == (5, "in\n")
    assert run(started, "ssh", stdin="echo a shell; exit 6\n").returncode == 6
    words = started.good("ssh", "--json", "uname").document["command"]
    assert words[0] == "ssh"
    assert words[-2:] == [started.state["ssh_host"], "uname"]
    result = started.run(command=words, environment={"HOME": str(started.home)})
    assert (result.code, result.out) == (0, "Linux\n")


def test_ssh_has_a_terminal_where_there_is_one(started: Desk) -> None:
    process, master = started.begin_on_terminal("ssh", "-q", "tty && echo ready && read line && exit 9")
    got = b""
    while b"ready" not in got:
        got += os.read(master, 1000)
    assert re.search(rb"/dev/pts/\d+\r\nready", got)
    os.write(master, b"\r")
    assert process.wait(30) == 9
    os.close(master)


def test_a_sandbox_that_is_being_started_is_waited_for(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    part("sshd", "openssh-server")
    plato = new_plato(boot_seconds=2.0)
    desk = new_desk(plato.environment)
    starting = desk.begin(*BLANK)
    eventually(lambda: desk.state_file.exists() and desk.state.get("session_id"))
    done = run(desk, "exec", "echo", "there")
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr
    assert starting.wait(30) == 0


@pytest.mark.parametrize("command", [["exec", "true"], ["ssh"], ["logs"], ["logs", "--vm"], ["open"]])
def test_without_a_sandbox(desk: Desk, command: list[str]) -> None:
    result = desk.run(*command)
    assert result.code == 3
    assert "no sandbox" in result.err


# ---------------------------------------------------------------------------
# open and logs
# ---------------------------------------------------------------------------


def test_open_shows_the_address(started: Desk) -> None:
    tools = started.place / "tools"
    tools.mkdir()
    opener = tools / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho "$1" > {started.place}/opened\n')
    opener.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "DISPLAY": ":77"}
    url = started.state["url"]
    assert started.good("open", "--print", environment=environment).out == f"{url}\n"
    assert started.good("open", "--json", environment=environment).document["url"] == url
    assert not (started.place / "opened").exists()
    assert started.good("open", environment=environment).out == f"{url}\n"
    eventually(
        lambda: (started.place / "opened").exists() and (started.place / "opened").read_text() == f"{url}\n"
    )


def test_what_plato_noted_of_the_vm(started: Desk) -> None:
    lines = started.good("logs", "--vm", "--json").document["lines"]
    assert any("running" in line for line in lines)
    assert started.good("logs", "--vm", "-n", "1").out.splitlines() == lines[-1:]


def test_logs_that_cannot_be(started: Desk) -> None:
    assert started.run("logs", "--follow", "--json").code == 2
    assert started.run("logs", "-n", "many").code == 2


# ---------------------------------------------------------------------------
# check
# ---------------------------------------------------------------------------

COMPOSE = """\
services:
  database: {image: x, ports: ["3306:3306", "127.0.0.1:${OTHER:-3310}:3310/tcp"]}
  frontend: {image: y, ports: [{published: 8080, target: 80}]}
"""
CONFIG = """\
service: shop
datasets:
  base:
    compute: {cpus: 2, app_port: 8080}
    metadata: {flows_path: flows.yml}
    services:
      main: {file: docker-compose.yml, required_healthy_containers: [database]}
    listeners:
      db: {db_type: mysql, db_database: d, db_port: 3306, seed_data_paths: [seed.sql]}
      other: {db_type: mysql, db_database: d, db_port: 3310}
"""
FLOWS = "flows: [{name: login, steps: [{type: navigate, url: /}]}]\n"


def simulator(desk: Desk, **files: str) -> None:
    texts: dict[str, Any] = {"compose": COMPOSE, "config": CONFIG, "flows": FLOWS, **files}
    names = {"compose": "docker-compose.yml", "config": "plato-config.yml", "flows": "flows.yml"}
    (desk.work / "seed.sql").touch()
    for name, text in texts.items():
        (desk.work / names[name]).write_text(text)


def test_check_of_the_example(desk: Desk) -> None:
    result = desk.good("check", environment={"PLATO_API_KEY": ""})
    assert result.out == "Nothing is wrong with the config and what it names.\n"


def test_check_tells_all_that_is_wrong(desk: Desk) -> None:
    config = CONFIG.replace("[database]", "[databse]").replace("seed.sql", "sed.sql").replace("8080", "8081")
    config = config.replace("port: 3306", "port: 3307") + "  small: {compute: {cpus: 99}}\n"
    simulator(desk, config=config + "datsets: {}\n")
    result = desk.run("check")
    assert result.code == 8
    assert result.out.splitlines() == [
        f"plato-config.yml:9:77: there is no 'sed.sql' in {desk.work}",
        "plato-config.yml:7:70: docker-compose.yml defines no container 'databse'; did you mean `database`?",
        "plato-config.yml:11:27: `datasets.small.compute.cpus` is 99; it must be a whole number, at least 1,"
        " at most 8",
        "plato-config.yml:12:1: the file has no field `datsets`; did you mean `datasets`? (a warning)",
        "plato-config.yml:4:34: no service publishes port 8081; published are: 3306, 3310, 8080 (a warning)",
        "plato-config.yml:9:53: no service publishes port 3307; published are: 3306, 3310, 8080 (a warning)",
    ]
    assert result.err == "Error: There are 3 problems.\n"
    document = desk.run("check", "--json").document
    assert (len(document["problems"]), len(document["warnings"])) == (3, 3)
    assert document["error"]["exit_code"] == 8
    assert desk.run("check", "-d", "base", "--json").document["problems"] == document["problems"][:2]
    assert desk.run("check", "-d", "bse").code == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"flows": FLOWS.replace("login", "other")}, "flows.yml:1:1: there is no flow `login`"),
        ({"compose": COMPOSE.replace("3306:3306", "3306")}, "no service publishes port 3306"),
        ({"config": CONFIG + "    metdata: 1\n"}, "did you mean `metadata`?"),
    ],
)
def test_what_may_be_wrong_is_a_warning(desk: Desk, files: dict[str, str], words: str) -> None:
    simulator(desk, **files)
    (warning, last) = desk.good("check").out.splitlines()
    assert words in warning
    assert warning.endswith(" (a warning)")
    assert last.startswith("Nothing is wrong with ")


@pytest.mark.parametrize(
    "compose", [COMPOSE + "include: [x.yml]\n", COMPOSE.replace("image: y", "extends: z"), "{{not YAML"]
)
def test_what_only_compose_can_tell_is_not_guessed(desk: Desk, compose: str) -> None:
    config = (
        CONFIG
        if compose.startswith("services") and "extends" in compose
        else CONFIG.replace("[database]", "[x]")
    )
    simulator(desk, compose=compose, config=config.replace("3306", "1"))
    assert desk.good("check").out.startswith("Nothing is wrong with ")


@pytest.mark.parametrize(
    ("flows", "words"),
    [
        ("flows: [{name: login, steps: [{type: navigat, url: /}]}]\n", "flows.yml:1:38: "),
        ("flows: [\n", "flows.yml:1:8: "),
    ],
)
def test_flows_that_are_wrong(desk: Desk, flows: str, words: str) -> None:
    simulator(desk, flows=flows)
    result = desk.run("check")
    assert result.code == 8
    assert result.out.startswith(words), result.out


def test_check_without_a_config(desk: Desk) -> None:
    (desk.work / "plato-config.yml").unlink()
    result = desk.run("check", "--json")
    assert (result.code, result.error["code"]) == (8, "config_invalid")
    assert "--config-path" in result.error["hint"]


def test_the_readme_names_every_command() -> None:
    text = subprocess.run(
        [sys.executable, str(ROOT / "plato_sandbox.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    told = re.findall(r"^    ([a-z][a-z-]+) {2,}(.+)$", text, re.MULTILINE)
    rows = re.findall(r"^\| `([a-z][a-z-]+)[^|]*\| (.+?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == told


# ---------------------------------------------------------------------------
# tunnel
# ---------------------------------------------------------------------------

ANSWERING = """import socket
listener = socket.create_server(("127.0.0.1", 8080))
print("listening", flush=True)
while True:
    other, _ = listener.accept()
    other.sendall(b"hello " + other.recv(100))
    other.close()
"""


def say(port: int, word: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(word)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(100):
                got += data
    return got


def told_tunnels(process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        text += process.stdout.readline()
    return {one["name"]: one for one in json.loads(text)["tunnels"]}


def test_tunnels_of_the_config(desk: Desk, plato: LocalPlato) -> None:
    part("sshd", "openssh-server")
    desk.good("start", "-c")
    server = desk.begin("exec", "-q", "python3", "-c", ANSWERING)
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        process = desk.begin("tunnel", "--json", "8080", f"8081:{taken}")
        tunnels = told_tunnels(process)
        assert tunnels["port 8081"]["local_port"] != taken
    port = tunnels["port 8080"]["local_port"]
    assert tunnels["port 8080"]["use"] == f"127.0.0.1:{port}"
    assert say(port, b"one") == b"hello one"
    assert say(port, b"two") == b"hello two"
    assert say(tunnels["port 8081"]["local_port"], b"nobody") == b""
    plato.fault("gateway_down", times=1)
    assert say(port, b"nobody") == b""
    assert say(port, b"again") == b"hello again"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    first, second = [line for line in err.splitlines() if line.startswith("port ")]
    assert first.startswith("port 8081: ")
    assert second.startswith("port 8080: ")

    process = desk.begin("tunnel", "--json")
    tunnels = told_tunnels(process)
    assert {name: one["port"] for name, one in tunnels.items()} == {"app": 8080, "db": 5432}
    app, db = (tunnels[name]["local_port"] for name in ("app", "db"))
    assert tunnels["app"]["use"] == f"http://127.0.0.1:{app}"
    assert tunnels["db"]["use"] == f"psql postgresql://taskboard@127.0.0.1:{db}/taskboard"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_ports_that_are_none(started: Desk) -> None:
    for port in ("0", "65536", "80:x", "http", "1:2:3"):
        result = started.run("tunnel", port)
        assert result.code == 2
        assert port.partition(":")[2] or port in result.err
    (started.work / "plato-config.yml").unlink()
    assert started.run("tunnel").code == 8  # there is no config whose ports it could be


# ---------------------------------------------------------------------------
# list and gc
# ---------------------------------------------------------------------------


def sandboxes(desk: Desk, *words: str, directory: Path | None = None) -> dict[str, dict[str, Any]]:
    listed = desk.good("list", "--json", *words, directory=directory or desk.place).document["sandboxes"]
    return {one["session_id"]: one for one in listed}


def test_sandboxes_of_this_host(desk: Desk, plato: LocalPlato) -> None:
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "0.5"
    assert desk.good("list").out == "There are none.\n"
    assert desk.good("gc").out == "Forgotten:\nThere are none.\nOrphans:\nThere are none.\n"
    desk.plato_home.mkdir(exist_ok=True)
    (desk.plato_home / "heartbeat_torn.log").write_text("{}\n")  # nobody knows of what
    assert desk.good("gc", "--json").document == {"forgotten": [], "orphans": []}
    (desk.plato_home / "heartbeat_torn.log").unlink()
    second, third = (desk.place / name for name in ("second", "third"))
    for place in (second, third):
        place.mkdir()
    desk.good(*BLANK)
    for place in (second, third):
        desk.good(*BLANK, directory=place)
    first_id = desk.state["session_id"]
    second_id, third_id = (
        yaml.safe_load((place / ".sandbox.yaml").read_text())["session_id"] for place in (second, third)
    )
    found = sandboxes(desk)
    assert {one["directory"] for one in found.values()} == {str(desk.work), str(second), str(third)}
    assert {(one["vm_status"], one["heartbeat"]["state"], one["orphan"]) for one in found.values()} == {
        ("running", "ok", None)
    }
    moved = desk.place / "moved"
    second.rename(moved)
    eventually(lambda: sandboxes(desk)[second_id]["directory"] == str(moved))
    (third / ".sandbox.yaml").unlink()
    close = urllib.request.Request(
        f"{plato.base_url}/api/v2/sessions/{first_id}/close",
        method="POST",
        headers={"X-API-Key": plato.api_key},
    )
    plato.opener.open(close, timeout=30).close()
    found = sandboxes(desk)
    assert "no directory" in found[third_id]["orphan"]
    shown = desk.good("list").out
    assert f" stop --session-id {third_id}" in shown
    assert set(sandboxes(desk, "--all")) == set(found)
    plato.fault("edit", method="GET", path="/api/v2/sessions", edits=[[["sessions", 0, "session_id"], [7]]])
    assert "this host did not start it" in desk.good("list", "--all").out

    told = desk.good("gc", "--dry-run", "--json").document
    assert [one["session_id"] for one in told["forgotten"]] == [first_id]
    assert [one["session_id"] for one in told["orphans"]] == [third_id]
    assert desk.state_file.exists()
    (gone,) = desk.good("gc", "--json").document["forgotten"]
    assert gone["session_id"] == first_id
    assert not desk.state_file.exists()
    assert set(sandboxes(desk)) == {second_id, third_id}
    desk.good("stop", "--session-id", third_id)
    desk.good("down", directory=moved)
    assert sandboxes(desk) == {}


# ---------------------------------------------------------------------------
# completion
# ---------------------------------------------------------------------------

COMPLETE = """source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _plato_sandbox; echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("st",), "start stop status start-services start-worker state"),
        (("-w", "x", "sync", "--d"), "--dry-run"),
        (("sync", "--via", ""), "auto api ssh"),
        (("start-services", "--via", ""), "git sync"),
        (("status", "--j"), "--json"),
        (("sync", "-w", ""), ""),
    ],
)
def test_completion_of_bash(desk: Desk, words: tuple[str, ...], found: str) -> None:
    (desk.work / "script").write_text(desk.good("completion", "bash").out)
    result = desk.run(
        command=[part("bash", "bash"), "-c", COMPLETE, "-", "./script", "plato-sandbox", *words]
    )
    assert (result.code, result.out, result.err) == (0, f"{found}\n", "")


ZSH = """autoload -Uz compinit; compinit -D -d ./dump; source ./script
_describe() { [ ${#${(P)2}} -gt 0 ] && print -l -- "${(P@)2}" }
_files() { print a file }
words=(plato-sandbox "$@"); CURRENT=$(($# + 1)); _plato_sandbox
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("sync", "--via", ""), ["auto", "api", "ssh"]),
        (("-w", "stop", "open", "-"), ["--print:only print the address", "--working-dir:", "--json:"]),
        (("sync", "-w", ""), ["a file"]),
    ],
)
def test_completion_of_zsh(desk: Desk, words: tuple[str, ...], found: list[str]) -> None:
    (desk.work / "script").write_text(desk.good("completion", "zsh").out)
    result = desk.run(command=[part("zsh", "zsh"), "-f", "-c", ZSH, "-", *words])
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert len(lines) >= len(found)
    for line, start in zip(lines, found):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("plato-sandbox snaps", "snapshot\tCreate a snapshot (artifact) of the current state\n"),
        ("plato-sandbox status --j", "--json\tone JSON document on stdout\n"),
        ("plato-sandbox -w x sync --via s", "ssh\n"),
    ],
)
def test_completion_of_fish(desk: Desk, line: str, found: str) -> None:
    script = desk.place / "script"
    script.write_text(desk.good("completion", "fish").out)
    command = f"source {script}; complete -C '{line}'"
    result = desk.run(command=[part("fish", "fish"), "--no-config", "-c", command])
    assert (result.code, result.out, result.err) == (0, found, "")


def test_completion_of_no_such_shell(desk: Desk) -> None:
    for words in ([], ["tcsh"]):
        assert desk.run("completion", *words).code == 2


# ---------------------------------------------------------------------------
# init
# ---------------------------------------------------------------------------

SHOP = """\
services:
  web:
    image: shop
    ports: ["${PORT:-8000}:80"]
  db:
    image: mariadb
    environment: {MARIADB_USER: shop, MARIADB_PASSWORD: "${SECRET:-a: b}", MARIADB_DATABASE: shop}
    ports: [{published: 3307, target: 3306}]
  other:
    image: postgres
    environment: [POSTGRES_USER=me, POSTGRES_PASSWORD=mine, POSTGRES_DB=all]
    ports: ["5432"]
"""


def test_init_makes_what_check_accepts(desk: Desk) -> None:
    place = desk.place / "My Shop"
    place.mkdir()
    assert desk.run("init", directory=place).code == 2  # there is no Compose file
    (place / "compose.yaml").write_text(SHOP)
    assert desk.good("init", "--json", directory=place).document["made"] == ["plato-config.yml", "flows.yml"]
    config = yaml.safe_load((place / "plato-config.yml").read_text())
    assert config["service"] == "my-shop"
    base = config["datasets"]["base"]
    assert base["compute"]["app_port"] == 8000
    assert base["metadata"]["name"] == "my-shop"
    assert base["services"]["main"]["file"] == "compose.yaml"
    told = {
        name: [part[f"db_{key}"] for key in ("type", "port", "user", "password", "database")]
        for name, part in base["listeners"].items()
    }
    assert told == {
        "db": ["mysql", 3307, "shop", "a: b", "shop"],
        "other": ["postgresql", 5432, "me", "mine", "all"],
    }
    lines = desk.good("check", directory=place).out.splitlines()
    assert len(lines) == 3
    assert "'change-me' is still to be replaced" in lines[0]
    assert "no service publishes port 5432" in lines[1]  # which Compose chooses anew each time
    desk.good("start", "-c", directory=place)
    desk.good("stop", directory=place)


def test_init_overwrites_nothing(desk: Desk) -> None:
    config = desk.work / "plato-config.yml"
    before = config.read_bytes()
    assert desk.run("init").code == 5
    assert config.read_bytes() == before
    config.unlink()
    flows = (desk.work / "flows.yml").read_bytes()
    assert desk.good("init", "--json").document["made"] == ["plato-config.yml"]
    assert (desk.work / "flows.yml").read_bytes() == flows
    desk.good("check")
