"""What people and programs get to see: streams, JSON, progress, colours, encodings, closed pipes, secrets."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, PRODUCT, Desk, altered, eventually, living, part
from localplato import LocalPlato

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

QUIET_START = (*BLANK, "--no-reset")  # a VM without a worker cannot be reset, which is a warning
ESCAPES = "\x1b[31mred\x1b]0;title\x07 \x9b2J \x7f \u202ex\nforged: line\r"


@pytest.fixture
def sandbox(standing: tuple[Desk, LocalPlato]) -> Iterator[tuple[Desk, LocalPlato]]:
    yield standing
    standing[1].clear_faults()


# ---------------------------------------------------------------------------
# terminals
# ---------------------------------------------------------------------------


def on_terminal(
    desk: Desk,
    command: list[str],
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    streams: tuple[str, ...] = ("stdout", "stderr"),
) -> tuple[int, str, str]:
    """Run a command with these streams on a pseudo-terminal: exit code, what the terminal got, the rest."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    got = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(ours, 65536):
                got.extend(data)

    pipes: dict[str, Any] = dict.fromkeys(streams, theirs)
    process = subprocess.Popen(
        command,
        cwd=desk.work,
        env={"TERM": "xterm", **desk.environment, **(environment or {})},
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes},
    )
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    rest = b"".join(part for part in process.communicate(timeout=60) if part)
    reader.join(10)
    os.close(ours)
    return process.returncode, got.decode(), rest.decode()


def screen_lines(text: str) -> list[str]:
    """What stays on a terminal: each line's text after its last erasure."""
    return [re.split(r"\r\x1b\[K", line)[-1].rstrip("\r") for line in text.replace("\r\n", "\n").split("\n")]


@pytest.mark.long
@pytest.mark.parametrize("columns", [80, 40, 20])
def test_progress_is_redrawn_within_its_line(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk], columns: int
) -> None:
    plato = new_plato(boot_seconds=2.5)
    desk = new_desk(plato.environment)
    code, text, _ = on_terminal(desk, desk.command(*QUIET_START), columns, streams=("stderr",))
    assert code == 0, text
    drawn = re.split(r"\r\x1b\[K|\n", text.replace("\r\n", "\n"))
    unfinished = [piece for piece in drawn if piece.startswith("Waiting for")]
    assert len(unfinished) >= 3  # at once, after a second, and at the end
    assert any(re.fullmatch(r"Waiting for.*[a-z.)]: [12] s( of at most .*)?", piece) for piece in unfinished)
    assert all(len(piece) < columns for piece in drawn if not re.search(r": [0-9.]+ s$", piece))
    stays = screen_lines(text)
    assert stays[-1] == ""
    assert [line.partition(":")[0] for line in stays[:-1]] == [
        "Creating the VM",
        "Waiting for the VM to boot",
        "Connecting the VM to the network",
        "Setting up SSH",
        "Waiting for SSH to answer",
    ]
    assert all(re.fullmatch(r".*: [0-9.]+ s", line) for line in stays[:-1])


@pytest.mark.sampled
@pytest.mark.parametrize("columns", [80, 40])
def test_progress_on_the_screen_of_a_real_terminal(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk], tmp_path: Path, columns: int
) -> None:
    tmux = [part("tmux", "tmux"), "-L", f"plato-test-{os.getpid()}-{columns}", "-f", os.devnull]
    plato = new_plato(boot_seconds=2.2)
    desk = new_desk(plato.environment)
    done = tmp_path / "done"
    words = shlex.join(desk.command(*QUIET_START))
    script = f'cd {shlex.quote(str(desk.work))} && {words} >/dev/null; echo "exit $?"; touch {done}; sleep 60'
    server = [*tmux, "new-session", "-d", "-x", str(columns), "-y", "20", script]
    environment = {**desk.environment, "TERM": "xterm", "TMUX_TMPDIR": str(tmp_path)}
    subprocess.run(server, env=environment, check=True, timeout=30)
    try:
        eventually(done.exists)
        shot = subprocess.run(
            [*tmux, "capture-pane", "-p"],
            env=environment,
            check=True,
            timeout=30,
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run([*tmux, "kill-server"], env=environment, check=True, timeout=30)
    lines = shot.stdout.rstrip().split("\n")
    assert len(lines) == 6, shot.stdout
    assert re.fullmatch(r"Waiting for the VM to boot: [0-9.]+ s", lines[1])
    assert lines[-1] == "exit 0"


def test_message_of_an_error_does_not_run_into_the_progress(desk: Desk, plato: LocalPlato) -> None:
    plato.fault("status", path="*/wait_for_ready*", status=409, body={"detail": "no"}, times=-1)
    code, text, _ = on_terminal(desk, desk.command(*BLANK))
    assert code == 6
    lines = screen_lines(text)
    assert [line for line in lines if line.startswith("Error: ")]
    assert all("Error" not in line or line.startswith("Error: ") for line in lines)


COLOUR_CASES = {
    "terminal": ({}, True),
    "NO_COLOR empty": ({"NO_COLOR": ""}, True),
    "NO_COLOR set": ({"NO_COLOR": "1"}, False),
    "dumb": ({"TERM": "dumb"}, False),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("environment", "colours"), COLOUR_CASES.values(), ids=COLOUR_CASES)
def test_colours(sandbox: tuple[Desk, LocalPlato], environment: dict[str, str], colours: bool) -> None:
    desk, _ = sandbox
    code, text, _ = on_terminal(desk, desk.command("status"), environment=environment)
    assert code == 0
    assert ("  VM Status:   \x1b[32mrunning\x1b[0m\r\n" in text) is colours
    assert ("  VM Status:   running\r\n" in text) is not colours
    if environment.get("TERM") == "dumb":
        assert "\x1b" not in text


@pytest.mark.long
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_each_stream_is_judged_by_itself(sandbox: tuple[Desk, LocalPlato], stream: str) -> None:
    desk, _ = sandbox
    _, terminal, pipe = on_terminal(desk, desk.command("status"), streams=(stream,))
    assert "\x1b" not in pipe
    assert ("\x1b[32m" in terminal) is (stream == "stdout")


def test_dumb_terminal_gets_plain_lines(desk: Desk) -> None:
    code, text, _ = on_terminal(desk, desk.command(*BLANK), environment={"TERM": "dumb"})
    assert code == 0
    assert "\x1b" not in text
    assert "\r" not in text.replace("\r\n", "\n")


def test_json_on_a_terminal_is_one_document(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, _ = sandbox
    code, text, _ = on_terminal(desk, desk.command("status", "--json"), streams=("stdout",))
    assert code == 0
    assert json.loads(text)["vm_running"] is True


@pytest.mark.parametrize("words", [("--help",), ("start", "--help"), ("stop", "-h")])
def test_help_on_a_terminal_without_colours(desk: Desk, words: tuple[str, ...]) -> None:
    code, text, _ = on_terminal(desk, desk.command(*words), environment={"NO_COLOR": "1"})
    assert code == 0
    assert "\x1b" not in text


# ---------------------------------------------------------------------------
# without a terminal
# ---------------------------------------------------------------------------


def test_no_terminal_no_escapes_and_few_lines(desk: Desk) -> None:
    began = time.monotonic()
    result = desk.good(*QUIET_START)
    allowed = 1 + int((time.monotonic() - began) // 10)
    assert "\x1b" not in result.out + result.err
    assert "\r" not in result.out + result.err
    assert 1 <= len(result.err.splitlines()) <= allowed


@pytest.mark.long
def test_progress_lines_keep_their_distance(
    new_plato: Callable[..., LocalPlato], new_desk: Callable[..., Desk]
) -> None:
    """A long boot, with the ten seconds between two lines made one."""
    desk = new_desk(new_plato(boot_seconds=3.5).environment)
    began = time.monotonic()
    result = desk.run(command=altered("product.PROGRESS_LINE_SECONDS = 1.0", *QUIET_START))
    allowed = 1 + int(time.monotonic() - began)
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert 3 <= len(lines) <= allowed
    assert lines[0] == "Creating the VM ..."
    boot = r"Waiting for the VM to boot( \(\w+\))?: \d+ s of at most 5:00 min"
    assert any(re.fullmatch(boot, line) for line in lines)


@pytest.mark.long
def test_quiet_says_nothing(desk: Desk) -> None:
    assert desk.good(*QUIET_START, "--quiet").err == ""
    assert desk.good("status", "-q").err == ""
    assert desk.good("stop", "-q").err == ""


def test_verbose_tells_requests_and_children(desk: Desk) -> None:
    started = desk.good(*BLANK, "--verbose")
    assert "POST /api/v2/sessions/make: 200" in started.err
    assert "ssh-keygen" in started.err
    assert started.out.startswith("Sandbox started successfully!\n")


# ---------------------------------------------------------------------------
# --json and usage
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_json_of_every_command(desk: Desk) -> None:
    started = desk.good(*BLANK, "--json").document
    assert started["session_id"] == desk.state["session_id"]
    status = desk.good("status", "-j").document
    assert status["heartbeat"]["state"] == "ok"
    assert {**desk.state, "vm_status": "running"}.items() <= status.items()
    stopped = desk.good("stop", "--json").document
    assert stopped == {"stopped": True, "session_id": started["session_id"], "already_gone": False}


FAILURES = {
    "status without a sandbox": (["status"], 3, "no_sandbox"),
    "stop without a sandbox": (["stop"], 3, "no_sandbox"),
    "no such command": (["strat"], 2, "usage"),
    "no command": ([], 2, "usage"),
    "no such option": (["status", "--bogus"], 2, "usage"),
    "an abbreviation": (["status", "--verb"], 2, "usage"),
    "a word too many": (["status", "now"], 2, "usage"),
    "no mode": (["start"], 2, "usage"),
    "two modes": (["start", "-b", "-c"], 2, "usage"),
    "no service": (["start", "-b"], 2, "usage"),
    "no number": (["start", "-b", "--service", "x", "--cpus", "many"], 2, "usage"),
    "out of range": (["start", "-b", "--service", "x", "--cpus", "99"], 2, "usage"),
    "option without its value": (["start", "-s"], 2, "usage"),
    "no such directory": (["status", "-w", "/nowhere/at/all"], 2, "usage"),
    "unknown dataset": (["start", "-c", "-d", "nope"], 2, "usage"),
    "unknown simulator": (["start", "-s", "nobody"], 1, "failed"),
}


def test_the_habit_of_another_client(desk: Desk) -> None:
    result = desk.run("sandbox", "-w", "x", "status")
    assert result.code == 2
    assert re.search(r"did you mean `\S.* status`\?", result.err)


@pytest.mark.sampled
@pytest.mark.parametrize(("words", "code", "name"), FAILURES.values(), ids=FAILURES)
def test_json_of_every_failure(desk: Desk, words: list[str], code: int, name: str) -> None:
    result = desk.run(*words, "--json")
    assert result.code == code, result
    assert result.error["code"] == name
    assert result.error["message"]
    assert f"Error: {result.error['message']}\n" in result.err.replace("\n  ", "\n")
    human = desk.run(*words)
    if words:
        assert human.code == code
        assert human.out == ""
        assert human.err.rpartition("Creating the VM ...\n")[2].startswith("Error: ")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"PLATO_API_KEY": ""}, 4),
        ({"PLATO_API_KEY": "two\nlines"}, 4),
        ({"PLATO_API_KEY": "wrong-key-of-somebody"}, 4),
        ({"PLATO_BASE_URL": "http://plato.example"}, 2),
        ({"PLATO_GATEWAY_PORT": "http"}, 2),
        ({"PLATO_HEARTBEAT_INTERVAL_SECONDS": "nan"}, 2),
    ],
    ids=["no key", "broken key", "wrong key", "plain http", "port", "interval"],
)
def test_json_of_a_wrong_environment(desk: Desk, environment: dict[str, str], code: int) -> None:
    result = desk.run(*BLANK, "--json", environment=environment)
    assert result.code == code, result
    assert result.error["exit_code"] == code
    assert desk.leftovers() == []


@pytest.mark.long
@pytest.mark.parametrize("word", ["-bj", "-jb", "-bqj"])
def test_json_among_other_short_options(desk: Desk, word: str) -> None:
    assert desk.good("start", word, "--service", "myapp").document["session_id"]
    again = desk.run("start", word, "--service", "myapp")
    assert again.code == 5
    assert again.error["code"] == "conflict"
    assert desk.run("start", word, "--bogus").error["code"] == "usage"


def test_misspelt_command_is_guessed(desk: Desk) -> None:
    assert "`status`" in desk.run("statsu").err
    assert "start, stop, down, status" in desk.run("frobnicate").err


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_the_commands(desk: Desk, words: list[str]) -> None:
    result = desk.good(*words)
    assert result.err == ""
    for word in ("start", "stop", "status", "examples:", "exit codes:", "--from-config"):
        assert word in result.out


HELP = {
    "start": (
        *("--from-config", "--simulator", "--artifact-id", "--blank", "--dataset", "--tag", "--service"),
        *("--cpus", "--memory", "--disk", "--timeout", "--lifetime", "--no-reset", "--replace"),
        *("-c,", "-s ", "-a ", "-b,", "-d ", "-t "),
    ),
    "stop": ("--session-id",),
    "status": (),
}


@pytest.mark.sampled
@pytest.mark.parametrize("command", HELP)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_every_command(desk: Desk, command: str, option: str) -> None:
    result = desk.good(command, option, environment={"COLUMNS": "80"})
    assert result.err == ""
    for word in (*HELP[command], "--json", "-j", "--working-dir", "-w ", "--quiet", "--verbose"):
        assert word in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines() if not line.startswith("  plato-sandbox"))


def test_version_shows_an_edited_copy(desk: Desk) -> None:
    result = desk.good("--version")
    assert re.fullmatch(r"plato-sandbox \d+\.\d+\.\d+ \([0-9a-f]{16}\)\n", result.out)
    assert result.err == ""
    copy = desk.place / "copy.py"
    copy.write_bytes(PRODUCT.read_bytes())
    assert desk.good(command=[sys.executable, str(copy), "--version"]).out == result.out
    copy.write_bytes(PRODUCT.read_bytes() + b"# edited\n")
    assert desk.good(command=[sys.executable, str(copy), "--version"]).out != result.out


def test_hints_name_the_command_as_it_was_called(desk: Desk) -> None:
    named = desk.run("status", "-w", ".", environment={"PLATO_SANDBOX_COMMAND": "tools/plato"})
    assert "tools/plato start" in named.err
    place = desk.place / "a dir"
    place.mkdir()
    hint = desk.run("status", "-w", str(place), "--json").error["hint"]
    assert f"start -w '{place}'" in hint


# ---------------------------------------------------------------------------
# what comes from outside
# ---------------------------------------------------------------------------


def assert_harmless(text: str) -> None:
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
    assert not any(line.startswith("forged: line") for line in text.splitlines())


@pytest.mark.long
def test_escapes_in_answers(sandbox: tuple[Desk, LocalPlato]) -> None:
    desk, plato = sandbox
    for status, body in (
        (200, {"jobs": [{"job_id": desk.state["job_id"], "status": "failed", "status_reason": ESCAPES}]}),
        (200, {"jobs": [{"job_id": desk.state["job_id"], "status": ESCAPES}]}),
        (409, {"detail": ESCAPES}),
        (401, {"detail": ESCAPES}),
        (403, {"detail": ESCAPES}),
        (422, {"detail": [{"loc": ["body", ESCAPES], "msg": ESCAPES}]}),
    ):
        plato.clear_faults()
        plato.fault("status", method="GET", path="/api/*", status=status, body=body, times=-1)
        for words in (["status"], ["status", "--json"], ["status", "--verbose"]):
            result = desk.run(*words)
            assert_harmless(result.out)
            assert_harmless(result.err)
            assert "red" in result.out + result.err
            if "--json" in words:
                json.loads(result.out)


@pytest.mark.sampled
@pytest.mark.parametrize("path", ["*/make", "*/wait_for_ready", "*/reset", "*/public_url", "*/add_ssh_key"])
def test_escapes_in_answers_to_start(desk: Desk, plato: LocalPlato, path: str) -> None:
    body = {"session_id": "5e551011", "envs": [{"success": False, "error": ESCAPES}], "success": False}
    body.update(
        status="failed", ready=False, results={"x": {"error": ESCAPES, "message": ESCAPES, "url": ESCAPES}}
    )
    plato.fault("status", path=path, status=200, body=body, times=-1)
    for words in ([], ["--json"]):
        result = desk.run(*BLANK, *words)
        assert_harmless(result.out)
        assert_harmless(result.err)
        desk.run("stop")


def test_escapes_in_the_config(desk: Desk) -> None:
    config = desk.work / "plato-config.yml"
    config.write_text(
        config.read_text().replace("service:", 'serv\\u001bice: "\\e[31m\\u009b\\u202e"\nservice:', 1)
    )
    config.write_text(config.read_text() + '\n"\\e[31mkey": "\\e]0;x\\a"\n')
    config.write_text(config.read_text().replace("cpus: 2", 'cpus: "\\e[31m2"'))
    for words in ([], ["--json"]):
        for named in ([], ["-d", "\x1b[31mnope"]):
            result = desk.run("start", "-c", *named, *words)
            assert result.code == (2 if named else 8)
            assert_harmless(result.out)
            assert_harmless(result.err)


def test_escapes_in_names_and_arguments(desk: Desk) -> None:
    place = desk.place / ESCAPES
    place.mkdir()
    for words in (
        ["status", "-w", str(place)],
        ["start", "-b", "--service", ESCAPES],
        [ESCAPES],
        ["-" + ESCAPES],
    ):
        for form in ([], ["--json"]):
            result = desk.run(*words, *form)
            assert result.code in (2, 3)
            assert_harmless(result.out)
            assert_harmless(result.err)


# ---------------------------------------------------------------------------
# encodings
# ---------------------------------------------------------------------------

FOREIGN = "gr\u00fc\u00dfe \u6f22\u5b57 \U0001f600"


@pytest.mark.sampled
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16", "cp1252:strict"])
def test_streams_of_other_encodings(sandbox: tuple[Desk, LocalPlato], encoding: str) -> None:
    desk, plato = sandbox
    job = {"job_id": desk.state["job_id"], "status": "running", "status_reason": FOREIGN}
    plato.fault("status", method="GET", path="/api/*", status=200, body={"jobs": [job]}, times=-1)
    environment = {**desk.environment, "PYTHONIOENCODING": encoding}
    for words in (["status"], ["status", "--json"]):
        done = subprocess.run(
            desk.command(*words), cwd=desk.work, env=environment, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        text = done.stdout.decode(encoding.partition(":")[0])
        if "--json" in words:
            assert json.loads(text)["vm_status_reason"] == FOREIGN
        else:
            assert "gr" in text.partition("  Reason:      ")[2]


@pytest.mark.sampled
@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_other_locales(desk: Desk, locale: str) -> None:
    place = desk.work / "gr\u00fc\u00dfe"
    place.mkdir()
    environment = {"LANG": locale, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    desk.good(*BLANK, "-w", str(place), environment=environment)
    assert desk.good("status", "-w", str(place), "--json", environment=environment).document["vm_running"]
    desk.good("stop", "-w", str(place), environment=environment)


# ---------------------------------------------------------------------------
# pipes and files that take nothing
# ---------------------------------------------------------------------------


def run_into_closed_pipe(desk: Desk, words: list[str], stream: str) -> subprocess.CompletedProcess[str]:
    """The read end of the pipe is closed before the product starts."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    try:
        return subprocess.run(
            desk.command(*words),
            cwd=desk.work,
            env=desk.environment,
            text=True,
            timeout=60,
            check=False,
            **streams,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "words", [["status"], ["status", "--json"], ["--help"], ["start", "-h"], ["--version"], []]
)
def test_nobody_reads_stdout(sandbox: tuple[Desk, LocalPlato], words: list[str]) -> None:
    desk, _ = sandbox
    done = run_into_closed_pipe(desk, words, "stdout")
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words", [["status", "--verbose"], ["status", "--bogus"], ["stop", "-w", "/nowhere"]]
)
def test_nobody_reads_stderr(sandbox: tuple[Desk, LocalPlato], words: list[str]) -> None:
    desk, _ = sandbox
    assert run_into_closed_pipe(desk, words, "stderr").returncode == (0 if "--verbose" in words else 2)


def test_failure_that_nobody_reads_keeps_its_exit_code(desk: Desk) -> None:
    assert run_into_closed_pipe(desk, ["status", "--json"], "stdout").returncode == 3
    assert run_into_closed_pipe(desk, ["status", "--json"], "stderr").returncode == 3


@pytest.mark.long
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_start_and_stop_that_nobody_reads(desk: Desk, plato: LocalPlato, stream: str) -> None:
    """The VM is there, recorded and kept alive, whoever reads."""
    started = run_into_closed_pipe(desk, [*BLANK, "--verbose"], stream)
    assert started.returncode == (141 if stream == "stdout" else 0)
    assert living(plato) == [desk.state["job_id"]]
    assert desk.good("status", "--json").document["heartbeat"]["state"] == "ok"
    stopped = run_into_closed_pipe(desk, ["stop", "--verbose"], stream)
    assert stopped.returncode == (141 if stream == "stdout" else 0)
    assert living(plato) == []
    assert desk.leftovers() == []


@pytest.mark.long
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(desk: Desk, plato: LocalPlato, redirection: str) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        return desk.run(command=["sh", "-c", f'exec "$@" {redirection}', "sh", *desk.command(*words)])

    assert run(*BLANK, "--verbose")[0] == 0
    assert living(plato) == [desk.state["job_id"]]
    assert desk.ssh("echo there").out == "there\n"
    code, out, err = run("status")
    assert code == 0
    assert out.startswith("Sandbox Status") is (redirection in ("2>&-", "<&-"))
    assert err == ""
    assert run("status", "--bogus")[0] == 2
    assert run("--help")[0] == 0
    assert run("stop")[0] == 0
    assert desk.leftovers() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize("at_once", ["", "1"])
def test_disk_is_full(sandbox: tuple[Desk, LocalPlato], words: list[str], at_once: str) -> None:
    desk, _ = sandbox
    command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *desk.command(*words)]
    result = desk.run(command=command, environment={"PYTHONUNBUFFERED": at_once})
    if at_once and words == ["--help"]:
        return  # which argparse writes, and tells nobody
    assert result.code == 1
    assert "No space left on device" in result.err
    assert "mistake" not in result.err


# ---------------------------------------------------------------------------
# the key is nowhere
# ---------------------------------------------------------------------------


class ArgumentWatch:
    """Looks at the command lines of all processes, again and again, for a word."""

    def __init__(self, word: str) -> None:
        self.word = word.encode()
        self.found: set[bytes] = set()
        self.looks = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.over.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = path.read_bytes()
                    if self.word in line:
                        self.found.add(line)
            self.looks += 1

    def __enter__(self) -> ArgumentWatch:  # noqa: PYI034
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def files_with(word: str, *directories: Path) -> list[Path]:
    return [
        path
        for directory in directories
        for path in directory.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes()
    ]


@pytest.mark.long
def test_key_is_nowhere(desk: Desk, plato: LocalPlato) -> None:
    key = desk.environment["PLATO_API_KEY"]
    assert len(key) >= 12
    results = []
    with ArgumentWatch(key) as watch:
        results.append(desk.good("start", "-c", "--verbose"))
        pid = desk.state["heartbeat_pid"]
        assert key.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert desk.environment["PLATO_BASE_URL"].encode() in Path(f"/proc/{pid}/environ").read_bytes()
        results.append(desk.ssh("env; ps -ef"))
        plato.wait_for_request("POST", "/heartbeat", count=2)
        results += [desk.good("status", "--verbose"), desk.good("status", "--json", "--verbose")]
        for status in (401, 409, 500):
            plato.fault("status", path="/api/*", status=status, body={"detail": f"said {key} it"}, times=-1)
            results += [desk.run("status", "--verbose"), desk.run("status", "--json")]
            eventually(lambda: (desk.heartbeat_record().get("failures") or 0) > 0)
            assert files_with(key, desk.home, desk.work) == []
            plato.clear_faults()
        results += [desk.good("stop", "--verbose"), desk.run("status", "--bogus"), desk.run(key, "--json")]
        assert files_with(key, desk.home, desk.work) == []
    assert watch.looks > 5
    # The last command was given the key as a word by this test: only that one may be seen with it.
    assert {line for line in watch.found if not line.endswith(key.encode() + b"\0--json\0")} == set()
    assert [result for result in results if key in result.out + result.err] == []
    assert sum("***" in result.out + result.err for result in results) >= 4


def test_mistake_of_ours_is_told_without_secrets(desk: Desk) -> None:
    key = desk.environment["PLATO_API_KEY"]
    code = "def broken(*_, **__): raise ZeroDivisionError(product.os.environ['PLATO_API_KEY'])\n"
    code += "product.plan_start = broken"
    for words, places in ((["--json"], 0), (["--verbose"], 1)):
        done = subprocess.run(
            altered(code, *BLANK, *words),
            cwd=desk.work,
            env=desk.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == places
        assert "ZeroDivisionError" in done.stderr
        assert key not in done.stdout + done.stderr
        if words == ["--json"]:
            assert json.loads(done.stdout)["error"]["code"] == "internal"
