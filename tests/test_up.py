"""From a directory to a simulator that works, and what looks after it: up, pull-config, doctor, --idle."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import BLANK, ROOT, Desk, altered, eventually, heartbeats, living, part, take_whole_example

from plato_sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

README = (ROOT / "README.md").read_text()
STAGES = ["check", "start", "start-services", "start-worker", "flow"]
LOOP_SECONDS = 400.0


def answer(master: int, question: str, words: str) -> str:
    """Wait on a terminal until it asks, and answer; what was shown until then."""
    shown = ""
    while question not in shown:
        shown += os.read(master, 4096).decode()
    os.write(master, f"{words}\n".encode())
    return shown


# ---------------------------------------------------------------------------
# up
# ---------------------------------------------------------------------------


def test_up_begins_with_what_needs_no_vm(desk: Desk, plato: LocalPlato) -> None:
    config = desk.work / "plato-config.yml"
    config.write_text(config.read_text().replace("cpus: 2", "cpus: 99"))
    result = desk.run("up")
    assert result.code == 8
    first, problem, *_ = result.out.splitlines()
    assert re.fullmatch(r"  FAILED  check +0(\.\d)? s", first)
    assert problem.startswith("plato-config.yml:8:13: ")
    assert result.err.endswith("Then go on: python3 " + str(desk.product) + " up\n")
    document = desk.run("up", "--json").document
    assert [(stage["stage"], stage["passed"]) for stage in document["stages"]] == [("check", False)]
    assert living(plato) == []


def test_up_goes_on_from_where_it_is(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    part("git", "git")
    part("sshd", "openssh-server")
    plato = new_plato(docker="absent")
    desk = new_desk(plato.environment)
    document = desk.run("up", "--json").document
    assert [stage["stage"] for stage in document["stages"]] == STAGES[:3]
    assert [stage["passed"] for stage in document["stages"]] == [True, True, False]
    assert document["url"] == desk.state["url"]
    assert "no docker" in document["error"]["message"]
    session_id = desk.state["session_id"]
    (desk.work / "new").touch()
    assert desk.run("up").code == 1
    assert desk.state["session_id"] == session_id
    assert living(plato) == [desk.state["job_id"]]
    assert "new" in desk.good("exec", "ls", "/home/plato/worktree/taskboard").out


def test_code_is_sent_while_the_vm_boots(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    part("git", "git")
    part("sshd", "openssh-server")
    plato = new_plato(boot_seconds=2.0, connect_seconds=4.0)
    desk = new_desk(plato.environment)
    sandbox = Sandbox.start(str(desk.work), from_config=True, send_code="git", settings=desk.settings)
    paths = [request["path"].rpartition("/")[2] for request in plato.requests()]
    # The first command comes before the VM is connected, and its network takes longer than all of them.
    assert paths.index("execute") < len(paths) - paths[::-1].index("execute") <= paths.index("add_ssh_key")
    report = sandbox.sync(gitignore=True)
    assert report["sent"] == 0
    sandbox.stop()


def test_code_that_cannot_be_sent_ahead_is_sent_later(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    part("git", "git")
    part("sshd", "openssh-server")
    plato = new_plato(network_for="everything", docker="absent")
    desk = new_desk(plato.environment)
    plato.fault("status", path="*/execute", status=403, times=1)
    result = desk.run("up")
    assert "It is sent later." in result.err
    assert desk.state["ssh_host"]
    assert "plato-config.yml" in desk.good("exec", "ls", "/home/plato/worktree/taskboard").out


def test_a_vm_that_runs_no_commands_is_not_waited_for_for_ever(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/execute", status=503, times=-1)
    sandbox = Sandbox.start(
        str(desk.work), from_config=True, send_code="git", timeout=3, settings=desk.settings
    )
    assert sandbox.state["session_id"] == desk.state["session_id"]
    sandbox.stop()


@pytest.fixture
def simulator(desk: Desk, plato: LocalPlato) -> Desk:
    """A desk with the whole example, whose login changes nothing that its rules do not hide."""
    take_whole_example(desk, plato)
    config = desk.work / "plato-config.yml"
    rules = ["sessions", "activity", "{table: users, columns: [login_count, last_login_at]}"]
    listed = "\n          ".join(f"- {rule}" for rule in rules)
    config.write_text(config.read_text().replace("- sessions\n", f"{listed}\n", 1))
    desk.environment["PLATO_BROWSER"] = part("chromium", "chromium")
    return desk


def recipe() -> list[str]:
    """The commands of the README's workflow."""
    block = re.search(r"```yaml\n(name: .*?)```", README, re.DOTALL)
    assert block is not None
    steps = yaml.safe_load(block[1])["jobs"]["simulator"]["steps"]
    return [step["run"] for step in steps if "run" in step]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_workflow_of_the_readme(simulator: Desk, plato: LocalPlato) -> None:
    install, *lines = recipe()
    assert install.startswith("pip install ")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (simulator.work / "plato_sandbox.py").write_bytes(Path(simulator.product).read_bytes())
    seen = []
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=simulator.work,
            env={**simulator.environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=LOOP_SECONDS,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        seen.append(done.stdout)
    assert re.findall(r"^  ok +([\w-]+)", "".join(seen), re.MULTILINE) == STAGES
    assert living(plato) == []


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_fixture_of_the_readme(simulator: Desk, plato: LocalPlato) -> None:
    block = re.search(r"```python\n(import pytest\n.*?)```", README, re.DOTALL)
    assert block is not None
    place = simulator.place / "tests"
    place.mkdir()
    text = block[1].replace('"my-simulator"', repr(str(simulator.work)))
    assert text != block[1]
    (place / "test_login.py").write_text(text)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(place)]
    environment = {"PYTHONPATH": str(ROOT)}
    done = simulator.run(command=words, environment=environment, timeout=LOOP_SECONDS)
    assert done.code == 0, done.out
    assert "1 passed" in done.out
    assert living(plato) == []


# ---------------------------------------------------------------------------
# pull-config
# ---------------------------------------------------------------------------


def test_the_config_of_an_artifact(desk: Desk) -> None:
    part("sshd", "openssh-server")
    desk.good("start", "-c")
    assert desk.run("pull-config").code == 2  # the sandbox comes from none
    artifact_id = desk.good("snapshot", "--wait", "--json").document["artifact_id"]
    place = desk.place / "pulled"
    place.mkdir()
    told = desk.good("pull-config", "-a", artifact_id, "--json", directory=place).document
    assert (told["artifact_id"], told["dataset"]) == (artifact_id, "base")
    assert told["written"] == ["plato-config.yml", "flows.yml"]
    pulled, ours = (
        {name: yaml.safe_load((where / name).read_text()) for name in told["written"]}
        for where in (place, desk.work)
    )
    assert pulled["flows.yml"] == ours["flows.yml"]
    config = pulled["plato-config.yml"]
    assert config["service"] == "taskboard"
    assert config["datasets"]["base"] == ours["plato-config.yml"]["datasets"]["base"]
    for path in (desk.work / "docker-compose.yml", desk.work / "db"):
        if path.exists():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, place / path.name)
    assert desk.good("check", directory=place).out.startswith("Nothing is wrong with ")

    # What is there is shown as a difference, and asked about.
    flows = place / "flows.yml"
    flows.write_text(flows.read_text().replace("demo-password", "another"))
    edited = flows.read_text()
    result = desk.run("pull-config", "-a", artifact_id, directory=place)
    assert result.code == 1
    assert "Nobody said yes" in result.err
    assert "-        value: another\n" in result.err
    process, master = desk.begin_on_terminal("pull-config", "-a", artifact_id, "-w", str(place))
    assert "demo-password" in answer(master, "like this? [y/N]", "n")
    assert process.wait(30) == 1
    assert flows.read_text() == edited
    os.close(master)
    process, master = desk.begin_on_terminal("pull-config", "-a", artifact_id, "-w", str(place))
    answer(master, "like this? [y/N]", "y")
    assert process.wait(30) == 0
    os.close(master)
    assert "another" not in flows.read_text()
    flows.write_text(edited)
    desk.good("pull-config", "-a", artifact_id, "--yes", directory=place)
    assert "another" not in flows.read_text()


def test_an_artifact_without_a_config(desk: Desk) -> None:
    desk.good(*BLANK)
    artifact_id = desk.good("snapshot", "--json").document["artifact_id"]
    before = (desk.work / "plato-config.yml").read_bytes()
    result = desk.run("pull-config", "-a", artifact_id)
    assert result.code == 8, result.err
    assert (desk.work / "plato-config.yml").read_bytes() == before
    assert desk.run("pull-config", "-a", "00000000-0000-0000-0000-000000000000").code == 6


# ---------------------------------------------------------------------------
# doctor, status, stop --all
# ---------------------------------------------------------------------------


def checked(desk: Desk, **options: Any) -> dict[str, dict[str, Any]]:
    result = desk.run("doctor", "--json", **options)
    checks = {check["name"]: check for check in result.document["checks"]}
    wrong = [name for name, check in checks.items() if not check["ok"]]
    assert result.code == (1 if wrong else 0)
    assert all(check["ok"] or check["found"] for check in checks.values())
    return checks


def test_doctor(desk: Desk, plato: LocalPlato) -> None:
    part("sshd", "openssh-server")
    found = checked(desk)
    assert {name for name, check in found.items() if not check["ok"]} <= {"Browser"}
    assert (found["Sandbox"]["found"], found["Heartbeat"]["found"]) == ("none here", "none")
    desk.good(*BLANK)
    found = checked(desk)
    assert (found["Sandbox"]["found"], found["Heartbeat"]["found"]) == ("running", "ok")
    for pid in heartbeats(desk):
        os.kill(pid, signal.SIGKILL)
    dead = checked(desk)["Heartbeat"]
    assert not dead["ok"]
    assert "revives" in dead["fix"]
    key = checked(desk, environment={"PLATO_API_KEY": ""})["API key"]
    assert not key["ok"]
    assert "PLATO_API_KEY" in key["found"] + key["fix"]
    late = altered("real = product.time.time; product.time.time = lambda: real() + 7200", "doctor", "--json")
    clock = checked(desk, command=late)["Clock"]
    assert not clock["ok"]
    assert re.fullmatch(r"\+720\d s from Plato.s", clock["found"])
    nobody = {"PLATO_GATEWAY_PORT": "1"}
    gateway = checked(desk, environment=nobody)["Gateway"]
    assert not gateway["ok"]
    assert "could not be reached" in gateway["found"]
    shown = desk.run("doctor", environment={**nobody, "PATH": "/nowhere"})
    assert shown.code == 1
    assert "Error: Something is wrong with: ssh, " in shown.err
    assert str(plato.api_key) not in shown.out + shown.err


def test_status_says_why_a_vm_lives_or_ends(desk: Desk) -> None:
    desk.good(*BLANK, "--lifetime", "7200", "--idle", "600")
    shown = desk.good("status").out
    assert re.search(
        r"^The VM ends in about [12]:\d\d h by its lifetime, or 10:00 min after its last use;"
        r" `python3 .* stop` ends it now, `start --lifetime SECONDS` gives the next one longer\.$",
        shown,
        re.MULTILINE,
    )
    ends = desk.good("status", "--json").document["ends"]
    assert ends["at"] == desk.state["expires_at"]
    for pid in heartbeats(desk):
        os.kill(pid, signal.SIGKILL)
    shown = desk.good("status").out
    assert re.search(
        r"^The VM ends in about 1:\d\d min without a heartbeat; any use, such as", shown, re.MULTILINE
    )


def test_stop_all_asks_first(desk: Desk, plato: LocalPlato) -> None:
    other = desk.place / "other"
    other.mkdir()
    assert desk.good("stop", "--all").out == "There is none to stop.\n"
    desk.good(*BLANK)
    desk.good(*BLANK, directory=other)
    result = desk.run("stop", "--all", directory=desk.place)
    assert result.code == 1
    assert str(other) in result.err
    assert len(living(plato)) == 2
    process, master = desk.begin_on_terminal("stop", "--all")
    answer(master, "[y/N]", "no")
    assert process.wait(30) == 1
    os.close(master)
    assert len(living(plato)) == 2
    told = desk.good("stop", "--all", "--yes", "--json", directory=desk.place).document
    assert len(told["stopped"]) == 2
    assert living(plato) == []
    assert desk.leftovers() == []


# ---------------------------------------------------------------------------
# --idle
# ---------------------------------------------------------------------------


def test_a_vm_that_nothing_uses_ends(desk: Desk) -> None:
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "0.2"
    desk.good(*BLANK, "--idle", "2")
    assert desk.state["idle_seconds"] == 2
    eventually(lambda: heartbeats(desk) == [])
    assert desk.heartbeat_record()["ended"] == "nothing used the VM for 2 s"
    assert "nothing used the VM" in desk.good("status").out
    desk.good("logs", "--vm")  # a use
    assert len(heartbeats(desk)) == 1


def test_a_connection_is_a_use(desk: Desk) -> None:
    part("sshd", "openssh-server")
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "0.2"
    desk.good(*BLANK, "--idle", "2")
    config, host = desk.state["ssh_config_path"], desk.state["ssh_host"]
    desk.hang_up()
    login = desk.begin_command(["ssh", "-F", config, "-S", "none", host, "echo in; sleep 60"])
    assert login.stdout is not None
    assert login.stdout.readline() == "in\n"
    beats = desk.heartbeat_record()["beats"]
    eventually(lambda: desk.heartbeat_record()["beats"] > beats + 15)
    login.terminate()
    eventually(lambda: heartbeats(desk) == [])
    tunnel = desk.begin("tunnel", "22", "--json")
    assert tunnel.stdout is not None
    assert tunnel.stdout.readline() == "{\n"
    eventually(lambda: heartbeats(desk))
    beats = desk.heartbeat_record()["beats"]
    eventually(lambda: desk.heartbeat_record()["beats"] > beats + 15)
    tunnel.send_signal(signal.SIGINT)
    eventually(lambda: heartbeats(desk) == [])


# ---------------------------------------------------------------------------
# the letters of `plato sandbox`
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("status", "-v"), "Did you mean --verbose?"),
        (("stop", "-n", "two"), "-w DIR"),
        (("stop", "-t", "9"), "--lifetime"),
        (("start", "-c", "-t", "1800"), "--lifetime SECONDS"),
    ],
)
def test_letters_that_mean_something_else_there(desk: Desk, words: tuple[str, ...], hint: str) -> None:
    result = desk.run(*words)
    assert result.code == 2
    assert hint in result.err
