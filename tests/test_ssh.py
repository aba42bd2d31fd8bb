"""SSH to a sandbox with the real OpenSSH client: the config, the key, the gateway stream, and odd places."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, PRODUCT, Desk, Result, eventually, living, nothing_left, part, ssh_processes
from localplato import LocalPlato

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEGABYTES = 20


@pytest.fixture
def sandbox(standing: tuple[Desk, LocalPlato]) -> Iterator[Desk]:
    desk, plato = standing
    yield desk
    plato.clear_faults()


def mode_of(path: Path | str) -> str:
    return oct(stat.S_IMODE(os.stat(path).st_mode))


def ssh_words(desk: Desk, *arguments: str, program: str = "ssh") -> list[str]:
    return [part(program, "openssh-client"), "-F", desk.state["ssh_config_path"], *arguments]


def effective(desk: Desk, host: str, config: str | None = None) -> dict[str, str]:
    """What OpenSSH itself reads from a config for a host."""
    words = [part("ssh", "openssh-client"), "-F", config or desk.state["ssh_config_path"], "-G", host]
    result = desk.run(command=words)
    assert result.code == 0, result.err
    pairs = (line.partition(" ") for line in result.out.splitlines())
    return {name: value for name, _, value in pairs}


# ---------------------------------------------------------------------------
# the files
# ---------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_of_the_files(desk: Desk, mask: int) -> None:
    desk.good(*BLANK, command=["sh", "-c", f'umask {mask:o}; exec "$@"', "sh", *desk.command(*BLANK)])
    state = desk.state
    assert mode_of(desk.plato_home) == "0o700"
    assert mode_of(state["ssh_config_path"]) == "0o600"
    assert mode_of(state["ssh_private_key_path"]) == "0o600"
    assert mode_of(desk.state_file) == "0o600"
    assert desk.ssh("true").code == 0
    assert mode_of(desk.plato_home / f"known_hosts_{state['session_id'].split('-')[0]}") in ("0o600", "0o644")


def test_home_that_was_open_is_closed(desk: Desk) -> None:
    desk.plato_home.mkdir(mode=0o777)
    desk.plato_home.chmod(0o777)
    desk.good(*BLANK)
    assert mode_of(desk.plato_home) == "0o700"


def test_config_says_what_it_should(sandbox: Desk) -> None:
    state = sandbox.state
    host = state["ssh_host"]
    assert host == "sandbox-" + state["session_id"].split("-")[0]
    assert state["ssh_config_path"] == str(sandbox.plato_home / f"ssh_{host.partition('-')[2]}.conf")
    read = effective(sandbox, host)
    assert read["user"] == "root"
    assert read["identityfile"] == state["ssh_private_key_path"]
    assert read["identitiesonly"] == "yes"
    assert read["userknownhostsfile"].startswith(str(sandbox.plato_home) + "/known_hosts_")
    assert read["globalknownhostsfile"] == "/dev/null"
    assert read["stricthostkeychecking"] == "accept-new"
    assert f" {sandbox.plato_home}/child_" in read["proxycommand"]
    assert sandbox.environment["PLATO_API_KEY"] not in Path(state["ssh_config_path"]).read_text()


@pytest.mark.parametrize("host", ["example.org", "sandbox-1", "sandbox-"])
def test_other_hosts_are_not_affected(sandbox: Desk, host: str) -> None:
    assert effective(sandbox, host) == effective(sandbox, host, os.devnull)
    longer = sandbox.state["ssh_host"] + "0"
    assert effective(sandbox, longer)["hostname"] == longer
    assert "proxycommand" not in effective(sandbox, longer)


def tree(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: mode, time of change, content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


def test_the_users_own_ssh_files_are_left_alone(desk: Desk) -> None:
    own = [desk.home / ".ssh", Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"]
    own[0].mkdir()
    (own[0] / "config").write_text("Host *\n    ProxyCommand false\n    User nobody\n")
    (own[0] / "known_hosts").write_text("# mine\n")
    before = [tree(directory) for directory in own]
    desk.good(*BLANK)
    assert desk.ssh("echo there").out == "there\n"
    desk.good("status")
    desk.good("stop")
    assert [tree(directory) for directory in own] == before


def test_specified_command_line_works_as_shown(desk: Desk) -> None:
    """The SSH line of `status`, pasted into a shell."""
    desk.good(*BLANK)
    line = re.search(r"^  SSH: {9}(ssh -F \S+ sandbox-\S+)$", desk.good("status").out, re.MULTILINE)
    assert line is not None
    assert line[1].startswith("ssh -F ~/.plato/ssh_")
    assert desk.run(command=["sh", "-c", line[1] + " 'echo there'"]).out == "there\n"
    command = desk.good("status", "--json").document["ssh_command"]
    assert "~" not in command
    assert desk.run(command=["sh", "-c", command + " 'echo there'"]).out == "there\n"


# ---------------------------------------------------------------------------
# what passes through
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 37, 255])
def test_exit_status_is_passed_on(sandbox: Desk, code: int) -> None:
    assert sandbox.ssh(f"echo out; echo err >&2; exit {code}") == (code, "out\n", "err\n")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_many_bytes_both_ways_at_once(sandbox: Desk) -> None:
    data = os.urandom(MEGABYTES << 20)
    words = ssh_words(sandbox, sandbox.state["ssh_host"], "cat")
    done = subprocess.run(
        words, input=data, capture_output=True, env=sandbox.environment, timeout=120, check=True
    )
    assert len(done.stdout) == len(data)
    assert digest(done.stdout) == digest(data)
    assert done.stderr == b""


@pytest.mark.parametrize("protocol", [(), ("-O",)], ids=["sftp", "old"])
def test_scp_both_ways(sandbox: Desk, tmp_path: Path, protocol: tuple[str, ...]) -> None:
    sent, back = tmp_path / "a file.bin", tmp_path / "back.bin"
    sent.write_bytes(os.urandom(3_000_001))
    host = sandbox.state["ssh_host"]
    for pair in ((str(sent), f"{host}:copy.bin"), (f"{host}:copy.bin", str(back))):
        result = sandbox.run(command=ssh_words(sandbox, *protocol, *pair, program="scp"))
        assert result == (0, "", "")
    assert digest(back.read_bytes()) == digest(sent.read_bytes())


def test_sftp(sandbox: Desk, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("by sftp\n")
    batch = tmp_path / "batch"
    batch.write_text(f"put {tmp_path}/x.txt y.txt\nget y.txt {tmp_path}/z.txt\n")
    result = sandbox.run(
        command=ssh_words(sandbox, "-b", str(batch), sandbox.state["ssh_host"], program="sftp")
    )
    assert result.code == 0, result.err
    assert (tmp_path / "z.txt").read_text() == "by sftp\n"


@pytest.mark.parametrize(
    ("text", "command", "expected"),
    [
        ("some data", "cat", "some data"),
        ("", "cat; echo end", "end\n"),
        ("x" * 100_000, "wc -c", "100000\n"),
        ("one\ntwo\n", "head -n 1", "one\n"),
    ],
    ids=["data", "nothing", "much", "not read to its end"],
)
def test_end_of_input_is_passed_on(sandbox: Desk, text: str, command: str, expected: str) -> None:
    words = ssh_words(sandbox, sandbox.state["ssh_host"], command)
    done = subprocess.run(
        words, input=text, capture_output=True, text=True, env=sandbox.environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


ECHO_ONCE = (
    "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
    "c = s.accept()[0]; c.sendall(b'echo ' + c.recv(99)); c.close()"
)


def test_port_forwarding(sandbox: Desk) -> None:
    """-L to a port that a process of the VM listens on."""
    host = sandbox.state["ssh_host"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options: dict[str, Any] = {"env": sandbox.environment, "stdin": subprocess.DEVNULL}
    server_words = ssh_words(sandbox, host, f'python3 -c "{ECHO_ONCE}"')
    with subprocess.Popen(server_words, stdout=subprocess.PIPE, text=True, **options) as server:
        assert server.stdout is not None
        far = int(server.stdout.readline())
        forward_words = ssh_words(sandbox, "-N", "-L", f"127.0.0.1:{port}:127.0.0.1:{far}", host)
        with subprocess.Popen(forward_words, **options) as forward:

            def connected() -> socket.socket | None:
                try:
                    return socket.create_connection(("127.0.0.1", port))
                except ConnectionRefusedError:
                    return None

            with eventually(connected) as connection:
                connection.sendall(b"hello")
                with connection.makefile("rb") as answer:
                    assert answer.read() == b"echo hello"
            forward.terminate()
        assert server.wait(30) == 0


def test_connections_at_once(sandbox: Desk) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: sandbox.ssh(f"echo {number}; cat /proc/uptime >&2"), range(8)))
    assert [result.code for result in results] == [0] * 8
    assert [result.out for result in results] == [f"{number}\n" for number in range(8)]


@pytest.mark.long
def test_later_connections_use_the_first(desk: Desk, plato: LocalPlato) -> None:
    """One connection through the gateway for all; it outlives its command, and `stop` ends it."""
    desk.good(*BLANK)
    before = len(plato.gateway()["connections"])
    for number in range(4):
        assert desk.ssh(f"echo {number}").out == f"{number}\n"
    assert len(plato.gateway()["connections"]) == before + 1
    assert len(ssh_processes(desk)) == 2
    (desk.work / "file").write_text("one")
    desk.good("sync", "--via", "ssh")
    assert len(plato.gateway()["connections"]) == before + 1
    desk.good("stop")
    eventually(lambda: not ssh_processes(desk))
    nothing_left(desk, plato)


def test_a_connection_that_was_kept_and_is_dead_is_made_anew(desk: Desk, plato: LocalPlato) -> None:
    desk.good(*BLANK)
    assert desk.ssh("true").code == 0
    [master] = [pid for pid, command in ssh_processes(desk).items() if command.startswith("ssh:")]
    os.kill(master, signal.SIGKILL)
    eventually(lambda: not ssh_processes(desk))
    assert desk.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_next_sandbox_has_other_host_keys_and_no_trouble(desk: Desk) -> None:
    for _ in range(2):
        desk.good(*BLANK, "--replace")
        assert desk.ssh("echo there") == (0, "there\n", "")
        assert desk.ssh("echo again") == (0, "again\n", "")
    desk.good("stop")
    assert desk.leftovers() == []


# ---------------------------------------------------------------------------
# odd places
# ---------------------------------------------------------------------------

ODD_NAMES = [
    "two  words",
    "100%h %% done",
    "it's",
    "#1 & $HOME; `x` (y)",
    "-dash=",
    "\u00fcml\u00e4ut \u6f22",
]


@pytest.mark.long
@pytest.mark.parametrize("name", ODD_NAMES)
def test_plato_home_at_an_odd_place(desk: Desk, name: str) -> None:
    desk.environment["PLATO_HOME"] = str(desk.place / name / ".plato")
    desk.good(*BLANK)
    assert desk.ssh("echo there") == (0, "there\n", "")
    command = desk.good("status", "--json").document["ssh_command"]
    assert desk.run(command=["sh", "-c", command + " 'echo there'"]).out == "there\n"
    desk.good("stop")
    assert desk.leftovers() == []


@pytest.mark.long
@pytest.mark.parametrize("name", [*ODD_NAMES, 'say "hi"', "back\\slash"])
def test_file_and_interpreter_at_an_odd_place(desk: Desk, plato: LocalPlato, name: str) -> None:
    place = desk.place / name
    place.mkdir()
    copy, python = place / "my plato.py", place / "python"
    shutil.copy(PRODUCT, copy)
    python.symlink_to(sys.executable)
    desk.good(command=[str(python), str(copy), *BLANK])
    plato.wait_for_request("POST", "/heartbeat")
    assert desk.ssh("echo there") == (0, "there\n", "")
    status = desk.good(command=[str(python), str(copy), "status"])
    assert "written anew" not in status.err
    desk.good(command=[str(python), str(copy), "stop"])
    assert desk.leftovers() == []


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "${HOME}", "two\nlines", os.fsdecode(b"\xff")])
def test_home_that_ssh_cannot_use_is_refused_before_anything_is_created(
    desk: Desk, plato: LocalPlato, name: str
) -> None:
    desk.environment["PLATO_HOME"] = str(desk.place / name)
    result = desk.run(*BLANK, "--json")
    assert result.code == 1
    assert "PLATO_HOME" in result.error["hint"]
    assert plato.requests() == []
    assert list(desk.work.glob(".sandbox.yaml*")) == []


def test_file_in_a_directory_with_a_line_break(desk: Desk, plato: LocalPlato) -> None:
    place = desk.place / "two\n    PermitLocalCommand yes"
    place.mkdir()
    shutil.copy(PRODUCT, place / "plato.py")
    desk.good(command=[sys.executable, str(place / "plato.py"), *BLANK])  # it is not named anywhere
    assert desk.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_status_repairs_the_config_after_a_move(desk: Desk) -> None:
    first, second = desk.place / "a tool.py", desk.place / "the tool.py"
    shutil.copy(PRODUCT, first)
    desk.good(command=[sys.executable, str(first), *BLANK])
    before = effective(desk, desk.state["ssh_host"])
    first.rename(second)
    assert desk.ssh("true").code == 0  # it goes by a copy
    desk.hang_up()
    (copy,) = desk.plato_home.glob("child_*.py")
    copy.unlink()
    assert_fails_clearly(desk.ssh("true"), str(copy), "plato-sandbox status")
    desk.good(command=[sys.executable, str(second), "status"])
    assert effective(desk, desk.state["ssh_host"]) == before
    assert mode_of(desk.state["ssh_config_path"]) == "0o600"
    assert desk.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_status_repairs_the_config_after_the_interpreter_moved(desk: Desk) -> None:
    python = desk.place / "old-python"
    python.symlink_to(sys.executable)
    desk.good(command=[str(python), str(PRODUCT), *BLANK])
    desk.hang_up()
    python.unlink()
    assert desk.ssh("echo there").out == "there\n"  # what the link led to is still there
    desk.hang_up()
    config = Path(desk.state["ssh_config_path"])
    written = config.read_text()
    assert os.path.realpath(sys.executable) in written
    config.write_text(written.replace(os.path.realpath(sys.executable), "/gone/python"))
    assert_fails_clearly(desk.ssh("true"), "/gone/python", "plato-sandbox status")
    desk.good("status")
    assert desk.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_status_repairs_the_config_after_the_gateway_moved(desk: Desk, plato: LocalPlato) -> None:
    desk.good(*BLANK, environment={"PLATO_GATEWAY_PORT": "9"})
    assert desk.ssh("true").code == 255
    desk.good("status")
    assert f" localhost {plato.gateway_port} " in effective(desk, desk.state["ssh_host"])["proxycommand"]
    assert desk.ssh("echo there").out == "there\n"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ProxyCommand ", "ProxyCommand 'unbalanced "),
        (" -I -S ", " "),
        ("gateway-stream", "gateway-stream 'x"),
    ],
)
def test_status_survives_a_config_edited_by_hand(desk: Desk, old: str, new: str) -> None:
    desk.good(*BLANK)
    config = Path(desk.state["ssh_config_path"])
    written = config.read_text()
    config.write_text(written.replace(old, new))
    desk.good("status")
    assert config.read_text() == written


# ---------------------------------------------------------------------------
# failures
# ---------------------------------------------------------------------------


def assert_fails_clearly(result: Result, *words: str) -> None:
    """ssh ends with 255 and says why, in a few lines."""
    assert result.code == 255
    assert 1 <= len(result.err.splitlines()) <= 4, result.err
    assert "mistake" not in result.err
    assert all(word in result.err for word in words), result.err


def test_gateway_is_not_there(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    desk.good(*BLANK, environment={"PLATO_GATEWAY_PORT": str(port)})
    assert_fails_clearly(desk.ssh("true"), "Error: ", f"localhost:{port}")


def test_gateway_hangs_up(sandbox: Desk, standing: tuple[Desk, LocalPlato]) -> None:
    sandbox.hang_up()
    standing[1].fault("gateway_down", times=1)
    assert_fails_clearly(sandbox.ssh("true"), "Error: ", "localhost")
    assert sandbox.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_gateway_breaks_off_midway(sandbox: Desk, standing: tuple[Desk, LocalPlato]) -> None:
    sandbox.hang_up()
    standing[1].fault("gateway_reset", after_bytes=100_000, times=1)
    assert sandbox.ssh("head -c 1000000 /dev/zero").code == 255
    assert sandbox.ssh("echo there").out == "there\n"


@pytest.mark.long
def test_gateway_with_a_certificate_of_another_ca(desk: Desk, plato: LocalPlato, tmp_path: Path) -> None:
    part("openssl", "openssl")
    with LocalPlato(tmp_path / "stranger") as stranger:
        other = stranger.environment["SSL_CERT_FILE"]
        desk.good(*BLANK, environment={"SSL_CERT_FILE": other})
        assert_fails_clearly(desk.ssh("true"), "certificate", "SSL_CERT_FILE")
    assert all(entry["bytes"] == 0 for entry in plato.gateway()["connections"])


def test_vm_is_gone(desk: Desk, plato: LocalPlato) -> None:
    desk.good(*BLANK, "--lifetime", "600")
    assert desk.ssh("true").code == 0
    plato.advance(700)
    eventually(lambda: living(plato) == [])
    assert_fails_clearly(desk.ssh("true"), "Error: ")


@pytest.mark.parametrize("command", ["gateway-stream", "heartbeat-child"])
def test_hidden_commands_are_none_for_people(desk: Desk, command: str) -> None:
    result = desk.run(command)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Error: ")


# ---------------------------------------------------------------------------
# a server that means harm
# ---------------------------------------------------------------------------

HOSTILE = [
    "x\n    PermitLocalCommand yes\n    LocalCommand touch CANARY\n#",
    "x\r\n    PermitLocalCommand yes\r\n    LocalCommand touch CANARY\r\n#",
    "x; touch CANARY;",
    "$(touch CANARY)",
    "`touch CANARY`",
    "x' ; touch CANARY ; '",
    'x" ; touch CANARY ; "',
    "x & touch CANARY #",
    "%h%r%n%%",
    "--ca-file",
    "-oProxyCommand=touch CANARY",
    "x\0; touch CANARY",
    "x" * 300,
    "\u202e\x1b]0;x",
]


def play_along(plato: LocalPlato, session_id: str, job_id: str) -> None:
    """Let the server answer everything well for ids of our choice."""
    job = {"success": True, "job_id": job_id, "ready": True, "status": "running"}
    answers = {
        "*/make": {"session_id": session_id, "envs": [{"job_id": job_id, "success": True}]},
        "*/wait_for_ready": {"ready": True, "session_id": session_id, "results": {job_id: job}},
        "*/heartbeat": {"success": True, "session_id": session_id, "results": {job_id: job}},
        "/api/*": {"success": True, "session_id": session_id, "results": {job_id: job}, "jobs": [job]},
    }
    for path, body in answers.items():
        plato.fault("status", path=path, status=200, body=body, times=-1)


def assert_no_injection(desk: Desk, plato: LocalPlato) -> None:
    result = desk.run(*BLANK, "--json")
    document = result.document
    if result.code:
        assert result.code == 1, result
        assert plato.requests("POST", "/close")
        assert desk.leftovers() == []
    elif "ssh_host" not in desk.state:
        assert "An SSH config cannot carry" in result.err
        desk.good("stop")
    else:
        read = effective(desk, desk.state["ssh_host"])
        assert read["permitlocalcommand"] == "no"
        assert "localcommand" not in read
        assert document["ssh_host"] == desk.state["ssh_host"]
        assert_fails_clearly(desk.run(command=ssh_words(desk, desk.state["ssh_host"], "true")))
        assert "\x1b" not in desk.good("status").out
        desk.good("stop")
        assert desk.leftovers() == []
    assert list(desk.place.rglob("CANARY*")) == []


@pytest.mark.sampled
@pytest.mark.parametrize("job_id", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_job_id(desk: Desk, plato: LocalPlato, job_id: str) -> None:
    play_along(plato, "5e551011-aaaa", job_id)
    assert_no_injection(desk, plato)


@pytest.mark.long
@pytest.mark.parametrize(
    "session_id", [*HOSTILE, "../../../x", "/etc/x", "a/../../b"], ids=range(len(HOSTILE) + 3)
)
def test_hostile_session_id(desk: Desk, plato: LocalPlato, session_id: str) -> None:
    play_along(plato, session_id, "job-1")
    before = sorted(path for path in desk.paths() if desk.plato_home not in path.parents)
    assert_no_injection(desk, plato)
    after = sorted(path for path in desk.paths() if desk.plato_home not in path.parents)
    assert [path for path in after if path != desk.plato_home] == before


@pytest.mark.sampled
@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_for_people(
    new_desk: Callable[..., Desk], standing: tuple[Desk, LocalPlato], words: str
) -> None:
    """A reason of the server's choice in the state of a sandbox."""
    desk, plato = standing
    job = {"job_id": desk.state["job_id"], "status": words, "status_reason": words}
    plato.fault("status", method="GET", status=200, body={"jobs": [job]}, path="/api/*", times=-1)
    try:
        human, document = desk.run("status"), desk.run("status", "--json").document
    finally:
        plato.clear_faults()
    assert human.out.isascii() or human.out.replace("\n", "").isprintable()
    assert human.out.count("\n  VM Status:   ") == 1
    assert "\n    PermitLocalCommand" not in human.out
    assert document["vm_status"] == words
