#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Ephemeral cloud VMs ("sandboxes") of the Plato platform for simulator developers, from one file.

This file is the whole tool. Copy it into a repository, or install the package of the same name; it needs
Python 3.9 or newer and, for SSH, the OpenSSH client. It imports nothing outside the standard library.

    python3 plato_sandbox.py init                    a plato-config.yml for the Compose file that is here
    python3 plato_sandbox.py check                   what is wrong with it, before a VM is made
    python3 plato_sandbox.py up                      all that is needed for a simulator that works, or:
    python3 plato_sandbox.py start --from-config     a VM for the plato-config.yml of this directory
    python3 plato_sandbox.py status                  what the VM and its heartbeat are doing
    python3 plato_sandbox.py sync                    bring the VM's files up to date with this directory
    python3 plato_sandbox.py start-services          bring code to the VM and Gitea, start Docker Compose
    python3 plato_sandbox.py start-worker --wait     let the Plato worker watch the databases
    python3 plato_sandbox.py flow                    run the login flow in a browser
    python3 plato_sandbox.py state                   what changed in them since the last reset
    python3 plato_sandbox.py audit-ui                choose what of that to ignore, in the browser
    python3 plato_sandbox.py snapshot                make an artifact of the VM as it is now
    python3 plato_sandbox.py stop                    destroy the VM and everything that belongs to it
    python3 plato_sandbox.py --help                  and the rest: ssh, exec, logs, tunnel, list, doctor, ...

Environment
    PLATO_API_KEY                       the key; required by every command that talks to Plato
    PLATO_BASE_URL                      the API (https://plato.so)
    PLATO_GATEWAY_HOST                  the SSH gateway (gateway.plato.so)
    PLATO_GATEWAY_PORT                  its port (443)
    PLATO_HOME                          SSH files and heartbeat records (~/.plato)
    PLATO_HEARTBEAT_INTERVAL_SECONDS    time between two heartbeats (15)
    PLATO_BROWSER                       the Chrome or Chromium that `flow` opens (one that is found)
    PLATO_SANDBOX_COMMAND               how a wrapper calls this tool, for the commands in its hints
    PLATO_SANDBOX                       which of several sandboxes of `plato sandbox` is meant, as there
    PGPASSWORD, MYSQL_PWD               the password that an --database-url leaves out
    XDG_RUNTIME_DIR                     for SSH's socket, if PLATO_HOME is too deep (/tmp/plato-sandbox-UID)
    HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, NO_COLOR, TERM    with their usual meaning

Files
    .sandbox.yaml            the sandbox of a directory: ids, address, SSH and heartbeat; no secret
    .plato/                  the sandboxes of `plato sandbox`, used where there is no .sandbox.yaml; written
                             there are only the artifact_id of a snapshot and the time of a `stop`
    .platoignore             what `sync` leaves out, in the syntax of .gitignore, at every level
    screenshots/             what the screenshot steps of flows make, beside the flows file
    test-results/            the report of `flow`, with pictures and traces (or --output)
    PLATO_HOME/child_<hash>.py
                             the copy of a part of this file that SSH runs; the last `stop` removes it
    PLATO_HOME/ssh_<id>.conf, ssh_<id>_key, ssh_<id>_key.pub, known_hosts_<id>, heartbeat_<id>.log
                             where <id> is the first part of the session id; `stop` removes them

Exit codes
    0 done; 1 failed; 2 usage; 3 no sandbox here, or it is gone; 4 authentication; 5 conflict;
    6 the API or the network failed; 7 timed out, or the outcome is unknown;
    8 a check said no (invalid config, failed flow, mutations found); 9 the worker is not up;
    130 and 143 interrupted

Importers may rely on the names in `__all__`, on the exit codes and on the keys of every `--json` document.
Everything else may change between versions.

Sections, each using only those above it: constants, errors, settings, processes, transport, api, gateway,
heartbeat, yaml, config, state, vm, sync, services, worker, flow, audit, sandbox, output, commands, main.
What a Sandbox can do is below what does it, so that some are handed one. The background processes end with
the section of the heartbeat.
"""

from __future__ import annotations  # of Python before 3.7 this is an error: plato-sandbox needs 3.9 or newer

import collections
import os
import re
import sys
import time
from contextlib import contextmanager, suppress

if sys.version_info < (3, 9):  # noqa: UP036  (the file is copied to where no installer checks)
    sys.exit(f"plato-sandbox needs Python 3.9 or newer; this is {sys.version.split()[0]}.")
from functools import cache, partial, reduce

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import http.client
    import socket
    import ssl
    import subprocess
    import urllib.parse
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType
    from typing import Any, NoReturn, Optional, TextIO, Union

    Line = Union[str, tuple[Any, ...]]
    Lines = Iterator[Line]
    Json = dict[str, Any]
    Words = Sequence[str]
    Act = Callable[[], Any]
    Pattern = re.Pattern[str]
    Feed = Optional[Callable[[Any], object]]
    FlowListener = Callable[[Json, Json | None], None]


__version__ = "0.1.0"

__all__ = [
    "ApiError",
    "AuthenticationError",
    "CheckFailedError",
    "ConfigError",
    "ConflictError",
    "NetworkError",
    "NoSandboxError",
    "Reporter",
    "Sandbox",
    "SandboxError",
    "Settings",
    "StateError",
    "TimedOutError",
    "UnknownOutcomeError",
    "UsageError",
    "WorkerNotUpError",
    "YamlError",
    "__version__",
    "main",
    "yaml_dump",
    "yaml_load",
]


# ----------------------------------------------------------------------------------------------------------
# constants: names, limits, intervals; nothing is read from the machine here
# ----------------------------------------------------------------------------------------------------------

PROGRAM = "plato-sandbox"
STATE_FILE = ".sandbox.yaml"
CONFIG_NAMES = ("plato-config.yml", "plato-config.yaml")

DEFAULT_BASE_URL = "https://plato.so"

DEFAULT_CPUS = 2
DEFAULT_MEMORY_MB = 1024
DEFAULT_DISK_MB = 10240
DEFAULT_DATASET = "base"
DEFAULT_TAG = "latest"
DEFAULT_READY_SECONDS = 300
DEFAULT_LIFETIME_SECONDS = 8 * 3600  # a working day; a forgotten VM ends by itself

SERVICE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

WEEK_SECONDS = 7 * 86400
REQUEST_SECONDS = 30.0
MAKE_SECONDS = 120.0
SETUP_SECONDS = 180.0
CONNECT_SECONDS = 300.0  # on older VMs the network has to be installed first
RESET_SECONDS = 180.0
CLOSE_SECONDS = 60.0
STATE_SECONDS = 120.0
SNAPSHOT_SECONDS = 600.0
ARTIFACT_SECONDS = 1800.0
ARTIFACT_POLL_SECONDS = 2.0
READY_POLL_SECONDS = 10
RETRY_SECONDS = (0.0, 1.0, 2.0)  # before each retry; a kept connection may have ended unseen
RETRY_WINDOW_SECONDS = 20.0
MAX_ANSWER_BYTES = 64_000_000
MAX_TEXT_OF_OTHERS = 1_000_000
SHORTEST_SECRET = 4  # hiding what is shorter would make nonsense of other words

BEAT_SECONDS = 10.0
BEAT_RETRY_SECONDS = 2.0  # while the VM may still live
VM_SILENCE_SECONDS = 120.0  # so long after its last beat the server ends a VM
BEAT_URGENT_SECONDS = VM_SILENCE_SECONDS + 30.0
BEAT_SILENCE_LIMIT_SECONDS = 3600.0  # no good beat for so long: the server ended the VM long ago
LEASE_SECONDS = 900.0  # another client's heartbeat that ends sooner by itself is not relied on

VM_IS_GONE = "the VM is gone"  # how a heartbeat ends that has no VM any more
TERMINAL_STATUSES = frozenset({"completed", "failed", "cancelled", "timeout"})


# ----------------------------------------------------------------------------------------------------------
# errors: one sentence, a hint, an exit code; the interruption; what an operation tells while it works
# ----------------------------------------------------------------------------------------------------------


class SandboxError(Exception):
    """Anything that went wrong and is understood.

    message: one or two plain sentences; hint: what to do next, or None. Both become one line each, whatever
    text of others is in them, unless lines are put together on purpose and set afterwards.
    exit_code and code (a stable word for programs) belong to the class.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(" ".join(message.split()))
        self.hint = hint and printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class UsageError(SandboxError):
    """The command line or the arguments of a call do not fit together."""

    exit_code = 2
    code = "usage"


class NoSandboxError(SandboxError):
    """There is no sandbox in this directory, or it is gone."""

    exit_code = 3
    code = "no_sandbox"


class AuthenticationError(SandboxError):
    """The API key is missing, wrong, or may not do this."""

    exit_code = 4
    code = "authentication"


class ConflictError(SandboxError):
    """A live sandbox or another command holds this directory."""

    exit_code = 5
    code = "conflict"


class ApiError(SandboxError):
    """Plato answered with an error, or with something that is not an answer.

    status: the HTTP status, or None when the body was the problem; retry_after: seconds, or None; text:
    the body, if it may be of use; sent: whether the server may have received the request.
    """

    exit_code = 6
    code = "api"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        text: str = "",
        sent: bool = True,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after = retry_after
        self.text = text
        self.sent = sent

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.status in (408, 429, 500, 502, 503, 504)

    @property
    def outcome_unknown(self) -> bool:
        """Whether Plato may have done what was asked all the same."""
        return self.sent and self.status in (None, 408, 502, 504)


class NetworkError(ApiError):
    """No whole answer came."""

    code = "network"
    may_pass = True


class TimedOutError(SandboxError):
    """What was waited for did not happen in time."""

    exit_code = 7
    code = "timed_out"


class UnknownOutcomeError(SandboxError):
    """A request that must not be repeated got no usable answer."""

    exit_code = 7
    code = "unknown_outcome"


class CheckFailedError(SandboxError):
    """Something was looked at and is not as it should be."""

    exit_code = 8
    code = "check_failed"


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived. Not an Exception: nothing but clean-up and `main` may catch it."""

    message = "Interrupted."
    hint: str | None = None
    code = "interrupted"

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number  # as shells count it


class Reporter:
    """What operations tell while they work. This one is silent; the command line has one that prints."""

    def step(self, text: str, limit: float | None = None) -> None:
        """A new thing is being waited for, at most `limit` seconds if given; 0: until the user ends it."""

    def detail(self, text: str) -> None:
        """What is known of the step under way, in a word or two."""

    def note(self, text: str) -> None:
        """Something worth knowing happened."""

    def warn(self, text: str) -> None:
        """Something is not as it should be, and the work goes on."""

    def trace(self, text: str) -> None:
        """A detail for --verbose: requests and child processes; never a secret."""


def reason(error: BaseException) -> str:
    """Why something failed, without Python's decoration: "Permission denied", "timed out"."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).rstrip(".")


@contextmanager
def explained(
    failure: str, hint: str | None = None, kind: type[SandboxError] = SandboxError
) -> Iterator[None]:
    """What the system refuses in the block becomes an error that says what could not be done, and why."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads the output any more; `main` knows what to do
    except (OSError, ValueError) as error:
        raise kind(f"{failure}: {reason(error)}.", hint=hint) from None


def printable(text: str) -> str:
    """Text from outside made harmless for a terminal: control characters become visible escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_path(path: str) -> str:
    """A path for people: the home directory as ~, nothing that a terminal would obey."""
    home = os.path.expanduser("~").rstrip("/")
    if home and path.startswith(home + "/"):
        path = "~" + path[len(home) :]
    return printable(path)


def text_of_others(path: str) -> str:
    """The text of a small file that another program wrote. OSError for a link, or a pipe that would block."""
    import stat

    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError("it is not a regular file")
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(MAX_TEXT_OF_OTHERS)


def write_whole(path: str, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step: temporary file beside it, fsync, rename, fsync of the directory."""
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(text.encode())
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is gone, if all went well
            os.unlink(temporary)
    _sync_directory(os.path.dirname(path))


def write_file(path: str, text: str, mode: int = 0o600) -> None:
    """The same; SandboxError where that cannot be."""
    with explained(f"{shown_path(path)} cannot be written"):
        write_whole(path, text, mode)


def _sync_directory(path: str) -> None:
    with suppress(OSError):  # some file systems cannot; what was done there is done
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def hashed(text: str) -> str:
    import hashlib

    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def from_here(path: str) -> str:
    """A path as people name it from the current directory, if it lies below that."""
    try:
        relative = os.path.relpath(path)
    except OSError:  # the current directory is gone
        return path
    return path if relative.startswith("..") else relative


def shown_here(path: str) -> str:
    return shown_path(from_here(path))


# ----------------------------------------------------------------------------------------------------------
# settings: what the environment says, read once per command
# ----------------------------------------------------------------------------------------------------------


class Settings:
    """Where Plato is and who asks. Only the environment and the caller decide these, never a file."""

    def __init__(
        self,
        *,
        api_key: str = "",
        base_url: str = DEFAULT_BASE_URL,
        gateway_host: str = "gateway.plato.so",
        gateway_port: int = 443,
        home: str = "~/.plato",
        heartbeat_seconds: float = 15.0,  # with 30, an outage of 90 seconds could end a VM
        ca_file: str = "",
        browser: str | None = None,
    ) -> None:
        self.api_key = api_key.strip()
        self.base_url = normal_base_url(base_url)
        self.gateway_host = gateway_host
        self.gateway_port = int(number_in("PLATO_GATEWAY_PORT", gateway_port, 1, 65535))
        home = os.path.expanduser(home)
        self.home = os.path.abspath(home)
        if home.startswith("~"):  # it would be a directory of that name, right here
            raise UsageError(
                "This user has no home directory.", hint="Set PLATO_HOME to a directory for the SSH files."
            )
        self.heartbeat_seconds = number_in("PLATO_HEARTBEAT_INTERVAL_SECONDS", heartbeat_seconds, 0.1, 3600)
        self.ca_file = os.path.abspath(ca_file) if ca_file else ""
        self.browser = browser

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read PLATO_* (see the head of this file); UsageError names a variable that makes no sense."""
        source = os.environ if environment is None else environment
        given: Json = {field: source[name] for field, name in _VARIABLES.items() if source.get(name)}
        return cls(**given)

    @property
    def gateway(self) -> tuple[str, int, str]:
        """What `vm_port` wants of it."""
        return self.gateway_host, self.gateway_port, self.ca_file

    def require_key(self) -> str:
        """The API key, or AuthenticationError."""
        if not self.api_key:
            raise AuthenticationError(
                "PLATO_API_KEY is not set, so Plato cannot know who is asking.",
                hint=f"Set it in this shell: export PLATO_API_KEY={_key_in_dotenv()}",
            )
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise AuthenticationError(
                "PLATO_API_KEY holds characters that no key has (a line break, perhaps).",
                hint="Copy the key again and set PLATO_API_KEY anew.",
            )
        return self.api_key

    def without_key(self, text: str) -> str:
        """A text from outside, with *** for the key."""
        return text.replace(self.api_key, "***") if len(self.api_key) >= SHORTEST_SECRET else text


_VARIABLES = {
    "api_key": "PLATO_API_KEY",
    "base_url": "PLATO_BASE_URL",
    "gateway_host": "PLATO_GATEWAY_HOST",
    "gateway_port": "PLATO_GATEWAY_PORT",
    "home": "PLATO_HOME",
    "heartbeat_seconds": "PLATO_HEARTBEAT_INTERVAL_SECONDS",
    "ca_file": "SSL_CERT_FILE",
    "browser": "PLATO_BROWSER",
}


# A line of a .env file with the key, in the syntax of `sed -E`, which Python reads the same way.
_KEY_LINE = """^ *(export +)?PLATO_API_KEY *= *['\\"]?([^'\\" #]+).*"""


def _key_in_dotenv() -> str:
    """What takes the key out of .env here or in the home, in a shell's words, if one of them has it.

    Other clients read these files. This one only looks whether there is such a line: a repository can bring
    a .env of its own, so its key is used when the user says so.
    """
    for path in (".env", "~/.env"):
        with suppress(OSError):
            lines = text_of_others(os.path.expanduser(path)).splitlines()
            if any(re.match(_KEY_LINE, line) for line in lines):
                return f'"$(sed -nE "s/{_KEY_LINE}/\\2/p" {path} | tail -n 1)"'
    return "..."


def number_in(name: str, value: Any, low: float, high: float) -> float:
    """A number, or what stands for one in a text, within its range; UsageError."""
    try:
        number = float(value)
        if low <= number <= high:
            return number
    except ValueError:
        pass
    raise UsageError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}.")


def normal_base_url(url: str) -> str:
    """Drop a trailing "/" or "/api"; refuse what would send the key somewhere it could be read.

    Plain http is allowed on loopback only.
    """
    trimmed = re.sub("(/+api)?/*$", "", url.strip())
    match = re.fullmatch(r"(https?)://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?(/[^?#\s]*)?", trimmed)
    if not match or not 0 < int(match[3] or 443) < 65536:
        raise UsageError(
            f"PLATO_BASE_URL is {url!r}, which is not the address of an API.",
            hint=f"It looks like {DEFAULT_BASE_URL}.",
        )
    if match[1] == "http" and match[2] not in ("localhost", "127.0.0.1", "[::1]"):
        raise UsageError(
            f"PLATO_BASE_URL is {url!r}: over plain http the API key could be read on the way.",
            hint="Use https://; plain http is only for 127.0.0.1, [::1] and localhost.",
        )
    return trimmed


# ----------------------------------------------------------------------------------------------------------
# processes: the one door to child processes; who a process is; work beside the main thread; signals
# ----------------------------------------------------------------------------------------------------------


def launch(command: Words, reporter: Reporter, **options: Any) -> subprocess.Popen[bytes]:
    """Start a child process, out of reach of the terminal's Ctrl-C, which is ours to handle, and without the
    secrets of the environment. SandboxError names a program that cannot be run."""
    import subprocess

    reporter.trace("run: " + shell_words(command))
    with explained(f"{command[0]} could not be run", "Check that it is installed and that PATH finds it."):
        return subprocess.Popen(command, env=child_environment(), start_new_session=True, **options)


def become(command: Words, output: Any) -> NoReturn:
    """Let another program take this process's place and its terminal, without the environment's secrets."""
    output.finish()
    output.trace("run: " + shell_words(command))
    sys.stdout.flush()
    with explained(f"{command[0]} could not be run", "Check that it is installed and that PATH finds it."):
        os.execvpe(command[0], [*command], child_environment())  # noqa: S606  (no shell is wanted)


def point_at_nothing(*descriptors: int) -> None:
    """Make file descriptors lead to /dev/null."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def child_environment() -> dict[str, str]:
    """The environment for a child process that has no use for the API key and the databases' passwords."""
    return {
        name: value
        for name, value in {**os.environ, "SHELL": "/bin/sh"}.items()  # by which ssh runs its ProxyCommand
        if name not in ("PLATO_API_KEY", "PGPASSWORD", "MYSQL_PWD")
    }


def shell_words(words: Words) -> str:
    """Words as one line that a POSIX shell reads back as the same words."""
    import shlex

    return shlex.join(words)


def own_command(program: str, *arguments: str) -> list[str]:
    """The command that runs `run_child`, from a file that `keep_copy` made, or from standard input (`-`)."""
    python = getattr(sys, "_base_executable", "") or sys.executable
    return [os.path.realpath(python), "-I", "-S", "-B", program, *arguments]


def keep_copy(home: str) -> None:
    """Have what ssh runs of this file in PLATO_HOME: it may go, and an environment that it came with."""
    path = copy_path(home)
    if not os.path.exists(path):
        write_file(path, child_program())


def copy_path(home: str) -> str:
    """Where that copy is, of which there is one for each content."""
    return f"{home}/child_{hashed(child_program())}.py"


def child_program(task: Json | None = None) -> str:
    """What children need of this file, and a call of `run_child`."""
    text, mark, _ = own_text().partition("\n# Children of this file need nothing below.")
    if not mark:
        raise UsageError(
            "This program cannot read its own text, of which it starts a heartbeat.",
            hint="Save it as plato_sandbox.py, and run that file.",
        )
    return f"{text}\nsys.exit(run_child(sys.argv[1:], {task!a}))\n"


@cache
def own_text() -> str:
    """The text of this file, which may be in a zip; "" where there is none, as when it came by a pipe."""
    with suppress(NameError, OSError, ValueError), open(__file__, encoding="utf-8") as file:
        return file.read()
    with suppress(NameError, AttributeError, OSError, ValueError):
        return str(__loader__.get_data(__file__).decode())  # type: ignore[name-defined]
    return ""


def invocation(program: str) -> str:
    """How this user calls the tool, for the commands in hints; a wrapper may say so in the environment."""
    return os.environ.get("PLATO_SANDBOX_COMMAND") or shell_words(
        ["python3", program] if program.endswith(".py") else [os.path.basename(program) or PROGRAM]
    )


def command_of(pid: int | str) -> str:
    """The command line of a process that runs here, words separated by spaces; "" where there is none."""
    import subprocess

    try:
        if os.path.isdir("/proc/self"):
            return text_of_others(f"/proc/{pid}/cmdline").replace("\0", " ")
        words = ["ps", "-wwo", "command=", "-p", str(pid)]
        return str(
            subprocess.run(words, capture_output=True, text=True, errors="replace", check=False).stdout
        )
    except OSError:
        return ""


def take_lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Take the kernel's lock on an open file, which ends with it; False when another process has it."""
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False


@cache
def hold(log: str, create: int = 0) -> None:
    """Show the heartbeat with that log that this process uses the VM, from now on and until it ends.

    create: os.O_CREAT for whoever starts the heartbeat. Others leave no file behind a `stop`.
    """
    with suppress(OSError):
        handle = os.open(f"{log}.used", os.O_RDWR | create, 0o600)
        os.utime(handle)
        take_lock(handle, shared=True)


def poll(look: Callable[[], str], seconds: float, pause: float, reporter: Reporter | None = None) -> str:
    """Look until there is no trouble (""), with pauses, at most so long; the last trouble.

    An answer that is none, or an error of the API that may pass, is such a trouble.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            trouble = look()
        except ApiError as error:
            if error.status and not error.may_pass:
                raise
            trouble = error.message.rstrip(".")
        left = deadline - time.monotonic()
        if not trouble or left <= 0:
            return trouble
        if reporter:
            reporter.detail(trouble)
        time.sleep(min(left, pause))


def since(began: float) -> float:
    """The seconds since then, to the millisecond. began: of the clock that nobody sets."""
    return round(time.monotonic() - began, 3)


def utc_text(seconds: float) -> str:
    """A time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


def seconds_of(text: str, form: str = "%Y-%m-%dT%H:%M:%S+00:00") -> float:
    """The time that `utc_text` wrote, or one of another form, as seconds since 1970. ValueError."""
    import calendar

    return calendar.timegm(time.strptime(text, form))


def duration_text(seconds: float) -> str:
    """A span of time for people: 0.4 s, 12 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{round(max(0, seconds), 1 if seconds < 10 else None):g} s"
    minutes, rest = divmod(int(seconds), 60)
    unit = "min"
    if minutes >= 60:
        (minutes, rest), unit = divmod(minutes, 60), "h"
    return f"{minutes}:{rest:02} {unit}"


class Aside:
    """A function running in a thread beside the main one; `result` waits and gives its value or its error.

    ended: a threading.Event that is set then, for who must know although this was interrupted.
    """

    def __init__(self, function: Act, ended: Any = None) -> None:
        import threading

        # Not Thread.join: until Python 3.12, one that an exception interrupts takes the thread for ended.
        ended = ended or threading.Event()
        self.wait = ended.wait
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._value = function()
            except BaseException as error:  # noqa: BLE001  (handed to whoever asks for the result)
                self._error = error
            finally:
                ended.set()

        threading.Thread(target=work, daemon=True).start()

    def result(self) -> Any:
        self.wait()
        if self._error:
            raise self._error
        return self._value


# How a command ended, here or on the VM: its exit code and its two outputs.
Outcome = collections.namedtuple("Outcome", "code stdout stderr")  # noqa: PYI024  (`typing` takes long)


def run_program(command: Words, reporter: Reporter, *, seconds: float, feed: Feed = None) -> Outcome:
    """Run a child process to its end. It is ended whenever this does not return.

    feed: writes its standard input to a file. TimedOutError when it has not ended so many seconds later.
    """
    import fcntl
    import signal
    import subprocess
    import tempfile

    # Its outputs go to files: a process that it leaves behind, as ssh may, could hold a pipe open for ever.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        fcntl.fcntl(stderr, fcntl.F_SETFL, os.O_APPEND)  # the ProxyCommand of ssh may open it once more
        process = launch(command, reporter, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
        try:
            feed_child(process, feed)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimedOutError(f"{command[0]} did not end within {seconds:g} s.") from None
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                # Nobody has waited for it yet, so the number of its group is still its own.
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(2.0)
        stdout.seek(0)
        stderr.seek(0)
        return Outcome(process.returncode, stdout.read(), stderr.read())


def feed_child(process: subprocess.Popen[bytes], feed: Feed) -> None:
    """Have a child's input written and close it; a child that does not want it says why elsewhere."""
    stdin: Any = process.stdin
    with suppress(BrokenPipeError), stdin:
        if feed:
            feed(stdin)


class SignalGuard:
    """Turns SIGINT, SIGTERM and SIGHUP into Interrupted while the block runs (main thread only).

    While `held` is true, a first signal is only remembered until `release`, so that the answer of a
    request that creates something is not lost; a second one is raised at once.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._previous: dict[int, Any] = {}
        self.held = False
        self._pending = 0

    def __enter__(self) -> SignalGuard:  # noqa: PYI034  (Self is newer than 3.9)
        import signal

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                with suppress(ValueError):  # in another thread than the main one
                    self._previous[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if not self.held or self._pending:
            raise Interrupted(number)
        self._pending = number
        self._reporter.warn("Interrupted; waiting for the answer to the request that creates the VM.")

    def release(self) -> None:
        """Obey signals again; raise the remembered one, if there is one."""
        self.held = False
        number, self._pending = self._pending, 0
        if number:
            raise Interrupted(number)


# ----------------------------------------------------------------------------------------------------------
# transport: the one door to the network: deadlines, proxies, TLS, retries, JSON, status to error
# ----------------------------------------------------------------------------------------------------------


def time_left(deadline: float) -> float:
    """The seconds until a deadline; TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def timed_response(deadline: float, sock: socket.socket, **options: Any) -> Any:
    """A response of http.client: nothing comes after the deadline, however slowly the bytes drip."""
    import http.client
    import socket

    def readinto(buffer: Any) -> int:
        while True:  # by the second: a signal that came just before a wait began must not wait for its end
            sock.settimeout(min(time_left(deadline), 1.0))
            with suppress(socket.timeout):  # another class than TimeoutError before Python 3.10
                return sock.recv_into(buffer)

    response: Any = http.client.HTTPResponse(sock, **options)
    response.fp.raw.readinto = readinto
    return response


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A TCP connection to a host, through the proxy of the environment if it names one for it."""
    import socket

    name, way = f"[{host}]" if ":" in host else host, ""
    proxy = proxy_for(name, port)
    try:
        if proxy:
            way = f" through the proxy {proxy.hostname}:{proxy.port or 80}"
            return _tunnel(proxy, name, port, deadline)
        sock = socket.create_connection((name_on_the_wire(host), port), time_left(deadline))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host looks like this
        raise NetworkError(
            f"{host}:{port} could not be reached{way}: {reason(error)}.",
            hint="Check the network and the name, or HTTPS_PROXY with the user and password that it wants.",
            sent=False,
        ) from None


def name_on_the_wire(host: str) -> Any:
    """A host's name for `socket` and `ssl`: ASCII as bytes, for which they load no tables of Unicode."""
    return host.encode("ascii") if host.isascii() else host


def proxy_for(host: str, port: int) -> urllib.parse.SplitResult | None:
    """The proxy that HTTPS_PROXY names, unless NO_PROXY excludes the host. UsageError when it is none."""
    url = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    if not url or host in ("localhost", "127.0.0.1", "[::1]"):
        return None
    import urllib.request

    if urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    with suppress(ValueError):  # its text may hold the password
        parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
        if parts.scheme == "http" and parts.hostname and parts.port != 0:
            return parts
    raise UsageError(
        "HTTPS_PROXY is not the address of a proxy that can be used.",
        hint="It looks like http://proxy.example.com:3128.",
    )


def _tunnel(proxy: urllib.parse.SplitResult, host: str, port: int, deadline: float) -> socket.socket:
    import base64
    import http.client
    from urllib.parse import unquote

    headers = {}
    if proxy.username is not None:
        pair = unquote(f"{proxy.username}:{proxy.password or ''}")
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    connection = http.client.HTTPConnection(proxy.hostname or "", proxy.port or 80, time_left(deadline))
    connection.response_class = partial(timed_response, deadline)  # type: ignore[assignment]
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except http.client.HTTPException as error:
        raise ConnectionError(reason(error)) from None
    return connection.sock


@cache
def tls_context(ca_file: str) -> ssl.SSLContext:
    """The TLS context of this process: verification on, the CAs of that file or those of the system."""
    import ssl

    failure = f"The CA certificates in {shown_path(ca_file)} cannot be used"
    hint = "SSL_CERT_FILE must name a file of certificates in PEM form, or not be set."
    with explained(failure, hint, UsageError):
        context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def secure(sock: socket.socket, name: str, deadline: float, ca_file: str) -> ssl.SSLSocket:
    """TLS over a connected socket, the certificate verified for `name`. Never without verification."""
    try:
        sock.settimeout(time_left(deadline))
        return tls_context(ca_file).wrap_socket(sock, server_hostname=name_on_the_wire(name))
    except (OSError, ValueError) as error:  # ValueError: no certificate can be for such a name
        sock.close()
        why = getattr(error, "verify_message", "")
        hint = (
            "Behind a company proxy, set SSL_CERT_FILE to a file that holds its CA and the usual ones."
            " Python 3.13 and newer also want a CA to follow RFC 5280 in all points. A slim image may have"
            " none at all: apt-get install ca-certificates"
        )
        raise NetworkError(
            f"No secure connection to {name}: {why or reason(error)}.", hint=hint if why else None, sent=False
        ) from None


class Transport:
    """JSON over HTTP to one base URL with one key, over one kept connection. Not for several threads."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        import urllib.parse

        self.settings = settings
        self.reporter = reporter
        self.base = urllib.parse.urlsplit(settings.base_url)
        self.server_time = ""  # as the last answer told it
        self._connection: http.client.HTTPConnection | None = None

    def hang_up(self) -> None:
        """Close the kept connection; the next request opens another one."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def request(
        self,
        method: str,
        path: str,
        *ids: str,
        kind: Any = dict,
        body: Any = None,
        seconds: float = REQUEST_SECONDS,
        repeatable: bool = True,
        window: float = RETRY_WINDOW_SECONDS,
    ) -> Json:
        """Send a request and return the decoded JSON of a 2xx answer: an object, or of the types in `kind`.

        ids: stand for each {} in the path; anything may be in them.
        seconds: until the complete answer, per attempt; window: no retry begins later than this.
        repeatable: whether it may be sent again after trouble that may pass; one that may not goes out once,
        on a connection of its own. AuthenticationError (401, 403), NoSandboxError (404 or 410 for a session
        or VM), ApiError (with `.status`) and NetworkError (with `.sent`) say what went wrong.
        """
        path = path.format(*map(quoted, ids))
        if not repeatable:
            self.hang_up()
        ends = time.monotonic() + window
        pauses = iter(RETRY_SECONDS if repeatable else ())
        while True:
            try:
                return self._attempt(method, path, body, kind, seconds)
            except ApiError as error:
                pause = max(next(pauses, window + 1.0), error.retry_after or 0.0)
                if not error.may_pass or time.monotonic() + pause > ends:
                    raise
                self.reporter.trace(f"{method} {path}: {error.message} Again in {pause:.1f} s.")
                time.sleep(pause)

    def _attempt(self, method: str, path: str, body: Any, kind: Any, seconds: float) -> Json:
        import http.client
        import json

        headers = {
            "X-API-Key": self.settings.require_key(),
            "Content-Type": "application/json",
            "User-Agent": f"plato-sandbox/{__version__}",
        }
        payload = None if body is None else json.dumps(body, allow_nan=False).encode()
        host, secured = self.base.hostname or "", self.base.scheme == "https"
        deadline = time.monotonic() + seconds
        try:
            connection = self._connection
            if connection is None:
                port = self.base.port or (443 if secured else 80)
                connection = self._connection = http.client.HTTPConnection(host, port)
                connection.sock = connect(host, port, deadline)
                if secured:
                    connection.sock = secure(connection.sock, host, deadline, self.settings.ca_file)
            connection.response_class = partial(timed_response, deadline)  # type: ignore[assignment]
            connection.sock.settimeout(time_left(deadline))
            connection.request(method, self.base.path + path, payload, headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES + 1)
            if response.length:
                raise ConnectionError("the answer was cut off")
            if response.will_close or not response.isclosed():
                self.hang_up()
        except BaseException as error:
            self.hang_up()  # also when interrupted halfway: what is left on it is nobody's answer
            if not isinstance(error, (OSError, http.client.HTTPException)):
                raise
            raise NetworkError(
                f"{host} did not answer {method} {path}: {reason(error)}.",
                hint="Run the command again; if it keeps failing, check the network.",
            ) from None
        self.reporter.trace(f"{method} {path}: {response.status}")
        # An answer that repeats the key, as errors may, loses it here: no message or file can hold it.
        text = self.settings.without_key(data.decode("utf-8", "replace"))
        told = {name.lower(): self.settings.without_key(value) for name, value in response.getheaders()}
        self.server_time = told.get("date", "")
        if not 200 <= response.status < 300:
            raise error_for_answer(method, path, response.status, told, text)
        content: Any = json_in(text)
        if isinstance(content, kind):
            return content  # type: ignore[no-any-return]
        raise ApiError(
            f"{host} answered {method} {path} with {told.get('content-type', 'a text')}, which is"
            " not the JSON that was asked for.",
            hint="Check PLATO_BASE_URL, and that no login page or proxy stands in between.",
            text=text,
        )


def gone_error(why: Any) -> NoSandboxError:
    return NoSandboxError(
        f"The VM is gone{': ' + why if why else ''}.",
        hint="Remove what is left of it with `plato-sandbox stop`, then start a new one.",
    )


def error_for_answer(
    method: str, path: str, status: int, headers: Mapping[str, str], text: str
) -> SandboxError:
    """The error that an HTTP status of 300 or more means, with the server's own words in it."""
    said, hint = server_words(text), None
    wait = headers.get("retry-after", "").strip()
    retry_after = float(wait) if re.fullmatch(r"\d{1,9}", wait) else None
    if status < 400:
        said = f"a redirect to {headers.get('location', 'nowhere')[:200]}"
        hint = "Redirects are not followed, so that the key stays here. Check PLATO_BASE_URL."
    elif status == 429 or status >= 500:
        hint = f"Run the command again {f'in {retry_after:.0f} s' if retry_after else 'a little later'}."
    why = f"{status}{said and ': '}{said}"
    # Elsewhere, 404 also says that what lives has no simulator or no flows.
    what = f"{status} {path}"
    if re.match("4(04|10) /api/(v2/sessions/(?!make$)|v1/sandbox/.*/vm/)|410 /api/v(1/env|2/jobs)/", what):
        return gone_error("")
    if status in (401, 403):
        return AuthenticationError(
            f"Plato refused the API key for {method} {path} ({why}).",
            hint="Check PLATO_API_KEY, that it belongs to PLATO_BASE_URL, and that its owner may do this.",
        )
    return ApiError(f"{method} {path} failed with {why}.", hint=hint, status=status, retry_after=retry_after)


def server_words(text: str) -> str:
    """What a FastAPI error says, in one line: `detail`, or the fields that a 422 complains about."""
    detail = as_dict(json_in(text)).get("detail") or ""
    if isinstance(detail, list):
        rows = [as_dict(row) for row in detail]
        detail = "; ".join(f"{'.'.join(map(str, as_list(row.get('loc'))))}: {row.get('msg')}" for row in rows)
    return str(detail)[:600].rstrip(".")


def quoted(part: str) -> str:
    """One part of a URL path."""
    import urllib.parse

    return urllib.parse.quote(part, safe="")


def json_in(text: str) -> Any:
    """The value that a text is in JSON; None where it is not."""
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# Answers come from outside: these take a value only if it has the type that the API promises.


def as_dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def without_none(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def dict_in(value: Any, key: str) -> Json:
    return as_dict(as_dict(value).get(key))


def text_in(value: Any, key: str) -> str | None:
    return as_text(as_dict(value).get(key))


# ----------------------------------------------------------------------------------------------------------
# api: one thin method per endpoint; no printing, no decisions
# ----------------------------------------------------------------------------------------------------------


class PlatoApi(Transport):
    """The endpoints that this tool uses. Answers are plain dicts; what is missing in them is missing."""

    def make_session(self, environment: Json, lifetime: int | None) -> Json:
        """POST /api/v2/sessions/make: a session of one job. Sent once, whatever happens.

        lifetime: seconds until the server ends the VM. Returns CreateSessionResponse.
        """
        return self.request(
            "POST",
            "/api/v2/sessions/make",
            body={"type": "envs", "envs": [environment], "timeout": lifetime, "source": "SDK"},
            seconds=MAKE_SECONDS,
            repeatable=False,
        )

    def wait_for_ready(self, session_id: str, seconds: int) -> Json:
        """GET .../wait_for_ready: a long poll of `seconds`, once. Returns WaitForReadyResponse."""
        return self.request(
            "GET",
            "/api/v2/sessions/{}/wait_for_ready?timeout={}",
            session_id,
            str(seconds),
            seconds=seconds + 15.0,
            window=0.0,
        )

    def session_details(self, session_id: str) -> Json:
        """GET /api/v2/sessions/{session_id}. Returns SessionDetailsResponse."""
        return self.request("GET", "/api/v2/sessions/{}", session_id)

    def heartbeat(self, session_id: str) -> Json:
        """POST .../heartbeat, once: the caller has its own rhythm. Returns HeartbeatResponse."""
        return self.request(
            "POST", "/api/v2/sessions/{}/heartbeat", session_id, seconds=BEAT_SECONDS, repeatable=False
        )

    def connect_network(self, session_id: str) -> Json:
        """POST .../connect_network: let the gateway reach the ready VM. {success, results: {<job>: true}}."""
        return self.request(
            "POST", "/api/v2/sessions/{}/connect_network", session_id, seconds=CONNECT_SECONDS
        )

    def reset(self, session_id: str) -> Json:
        """POST .../reset: back to the initial state, however often. Returns ResetSessionResponse."""
        return self.request(
            "POST", "/api/v2/sessions/{}/reset", session_id, body={"source": "SDK"}, seconds=RESET_SECONDS
        )

    def close(self, session_id: str) -> Json:
        """POST .../close. Returns CloseSessionResponse."""
        return self.request("POST", "/api/v2/sessions/{}/close", session_id, seconds=CLOSE_SECONDS)

    def public_url(self, session_id: str) -> Json:
        """GET .../public_url. Returns PublicUrlResponse."""
        return self.request("GET", "/api/v2/sessions/{}/public_url", session_id)

    def execute(self, session_id: str, command: str, seconds: float) -> Json:
        """POST .../execute: run a command on the VM, which may happen twice. Returns ExecuteCommandResponse.

        seconds: until the command is ended there.
        """
        return self.request(
            "POST",
            "/api/v2/sessions/{}/execute",
            session_id,
            body={"command": command, "timeout": max(1, int(seconds))},
            seconds=seconds + 15.0,
        )

    def sessions(self) -> Json:
        """GET /api/v2/sessions: the newest 50 of the key. Returns sessions: a list of session_id and jobs."""
        return self.request("GET", "/api/v2/sessions")

    def job_info(self, job_id: str) -> Json:
        """GET /api/v2/jobs/{job_id}/info. Returns JobInfoResult."""
        return self.request("GET", "/api/v2/jobs/{}/info", job_id)

    def job_logs(self, session_id: str, job_id: str, limit: int) -> Json:
        """GET .../jobs/{job_id}/logs. Returns logs: a list of timestamp and message, the newest last."""
        path = f"/api/v2/sessions/{{}}/jobs/{{}}/logs?limit={limit}"
        return self.request("GET", path, session_id, job_id)

    def job_config(self, job_id: str) -> Json:
        """GET /api/v2/jobs/{job_id}/plato_config: the dataset of its artifact. StoredSimConfigDataset."""
        return self.request("GET", "/api/v2/jobs/{}/plato_config", job_id)

    def job_flows(self, job_id: str) -> Any:
        """GET /api/v2/jobs/{job_id}/flows. Returns a list of Flow."""
        return self.request("GET", "/api/v2/jobs/{}/flows", job_id, kind=(dict, list, str))

    def artifact_config(self, artifact_id: str) -> Json:
        """GET /api/v1/simulator/{artifact_id}/plato_config, the text of a dataset. PlatoConfigResponse."""
        return self.request("GET", "/api/v1/simulator/{}/plato_config", artifact_id)

    def artifact_flows(self, artifact_id: str) -> Any:
        """GET /api/v1/simulator/{artifact_id}/flows: {"data": {"flows": TEXT}} or the flows file itself."""
        try:
            return self.request("GET", "/api/v1/simulator/{}/flows", artifact_id, kind=(dict, list, str))
        except ApiError as error:
            if not re.search(r"^flows:", error.text, re.MULTILINE):
                raise
            return error.text

    def add_ssh_key(self, session_id: str, public_key: str, username: str) -> Json:
        """POST .../add_ssh_key. Returns AddSSHKeyResponse."""
        return self.request(
            "POST",
            "/api/v2/sessions/{}/add_ssh_key",
            session_id,
            body={"public_key": public_key, "username": username},
            seconds=SETUP_SECONDS,
        )

    def start_worker(self, job_id: str, service: str, dataset: str, content: Json) -> Json:
        """POST .../vm/{job_id}/start-worker: begins at once, is up later. Returns VMManagementResponse."""
        return self.request(
            "POST",
            "/api/v1/sandbox/public-build/vm/{}/start-worker",
            job_id,
            body={"service": service, "dataset": dataset, "plato_dataset_config": content},
            seconds=SETUP_SECONDS,
        )

    def state(self, session_id: str, window: float = RETRY_WINDOW_SECONDS) -> Json:
        """GET .../state, mutations merged and ignore rules applied. Returns SessionStateResponse."""
        return self.request(
            "GET",
            "/api/v2/sessions/{}/state?merge_mutations=true",
            session_id,
            seconds=STATE_SECONDS,
            window=window,
        )

    def cleanup(self, session_id: str) -> Json:
        """POST /api/v1/env/{session_id}/cleanup: empty the audit tables. Returns EnvCleanupResponse.

        ApiError with the status 404 also where the session has no simulator.
        """
        return self.request("POST", "/api/v1/env/{}/cleanup", session_id, seconds=RESET_SECONDS)

    def snapshot(self, session_id: str, checkpoint: Json) -> Json:
        """POST .../snapshot: a new artifact. Sent once, whatever happens. Returns CreateSnapshotResponse.

        checkpoint: fields of CreateCheckpointRequest.
        """
        return self.request(
            "POST",
            "/api/v2/sessions/{}/snapshot",
            session_id,
            body=checkpoint,
            seconds=SNAPSHOT_SECONDS,
            repeatable=False,
        )

    def artifact(self, artifact_id: str) -> Json:
        """GET /api/v2/artifacts/{artifact_id}. Returns ArtifactInfoResponse."""
        return self.request("GET", "/api/v2/artifacts/{}", artifact_id)

    def prefetch(self, artifact_id: str) -> None:
        """POST /api/v1/cluster/prefetch: the workers may bring an artifact near. Sent once."""
        self.request(
            "POST",
            "/api/v1/cluster/prefetch",
            kind=(dict, list),
            body={"artifact_id": artifact_id},
            repeatable=False,
        )

    def gitea_credentials(self) -> Json:
        """GET /api/v1/gitea/credentials. Returns GiteaCredentialsResponse."""
        return self.request("GET", "/api/v1/gitea/credentials")

    def gitea_simulators(self) -> Any:
        """GET /api/v1/gitea/simulators that the key may use. Returns a list of SimulatorListItemResponse."""
        return self.request("GET", "/api/v1/gitea/simulators", kind=list)

    def gitea_repository(self, simulator_id: str) -> Json:
        """GET /api/v1/gitea/simulators/{id}/repo. Returns SimulatorRepositoryResponse."""
        return self.request("GET", "/api/v1/gitea/simulators/{}/repo", simulator_id)

    def create_gitea_repository(self, simulator_id: str) -> Json:
        """POST /api/v1/gitea/simulators/{id}/repo; 409 when there is one. Returns RepositoryResponse."""
        return self.request("POST", "/api/v1/gitea/simulators/{}/repo", simulator_id)


def job_of(answer: Json, job_id: Any) -> Json:
    """The entry of one job in the `results` of an answer; {} when it has none. Sessions here have one job."""
    results = dict_in(answer, "results")
    only = next(iter(results.values())) if len(results) == 1 else None
    return as_dict(results.get(str(job_id), only))


def refusal(answer: Json, job_id: Any) -> str:
    """Why an answer says that something was not done; "" when it was."""
    job = job_of(answer, job_id)
    told = dict_in(answer, "results").get(str(job_id))
    if False not in (answer.get("success"), told, job.get("success")):
        return ""
    words = [text_in(part, key) for part in (job, answer) for key in ("error", "message")]
    return next(filter(None, words), "no reason was given").rstrip(".")


def check_success(answer: Json, job_id: Any, failure: str) -> None:
    """SandboxError "FAILURE: why" when an answer says that something was not done."""
    why = refusal(answer, job_id)
    if why:
        raise SandboxError(f"{failure}: {why}.")


def vm_status(details: Json, job_id: Any) -> tuple[str | None, str | None]:
    """The VM's status and its reason in session details, wherever this server's version puts them."""
    jobs = [as_dict(job) for job in as_list(details.get("jobs")) or as_list(details.get("envs"))]
    jobs.sort(key=lambda job: job_id not in (job.get("job_id"), job.get("public_id")))
    for entry in (*jobs[:1], details):
        status = text_in(entry, "status")
        if status:
            return status, text_in(entry, "status_reason") or text_in(entry, "error")
    return None, None


# ----------------------------------------------------------------------------------------------------------
# gateway: a stream to a port of a VM; it is this file itself that `ssh` runs as its ProxyCommand
# ----------------------------------------------------------------------------------------------------------


def vm_port(gateway: tuple[str, int, str], target: str, deadline: float) -> ssl.SSLSocket:
    """A connection to a port of a VM, through TLS to the gateway. NetworkError when it does not give one.

    gateway: its host and port, and the certificates to verify it with instead of those of the system.
    target: `<job id>--<port>`; with the gateway's name behind it, it is the TLS server name.
    """
    host, port, ca_file = gateway
    return secure(connect(host, port, deadline), f"{target}.{host}", deadline, ca_file)


def gateway_stream(host: str, port: str, target: str, log: str, ca_file: str = "") -> None:
    """Join standard input and output to a port of a VM, through TLS to the gateway.

    log: see `hold`; ca_file: certificates to verify it with instead of those of SSL_CERT_FILE or the system.
    """
    hold(log)
    trusted = ca_file or os.environ.get("SSL_CERT_FILE", "")
    stream = vm_port((host, int(port), trusted), target, time.monotonic() + REQUEST_SECONDS)
    point_at_nothing(2)  # this may outlive the terminal
    with suppress(OSError), stream:  # either side hangs up, which is how these connections end
        _relay(stream, 0, 1)


def _relay(stream: ssl.SSLSocket, source: int, sink: int) -> bool:
    """Copy both ways until the VM's side ends; whether anything came from there.

    One thread: an SSL object must not be used by two.
    """
    import select
    import ssl

    later = suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError)
    stream.setblocking(False)
    outgoing = b""
    reading, came = True, False
    while True:
        sources: list[Any] = [stream, source] if reading and not outgoing else [stream]
        patience = 0 if stream.pending() else None
        readable, _, _ = select.select(sources, [stream] if outgoing else [], [], patience)
        if source in readable:
            outgoing = os.read(source, 65536)
            reading = bool(outgoing)
            if not reading:
                with suppress(OSError, ValueError):
                    stream.unwrap()  # tells the gateway that nothing more comes; what it has is still read
        if outgoing:
            with later:
                outgoing = outgoing[stream.send(outgoing) :]
        if stream in readable or stream.pending():
            with later:
                data = stream.recv(65536)
                if not data:
                    return came
                came = True
                while data:
                    data = data[os.write(sink, data) :]


# ----------------------------------------------------------------------------------------------------------
# heartbeat: the child that keeps a VM alive; its log, its start, its end, its health
# ----------------------------------------------------------------------------------------------------------


def short_id(session_id: str) -> str:
    """The <id> in the names of SSH files and hosts: the first part of the session id, safe as a name.

    Session ids are UUIDs today. Of another kind it is the whole id: "session-1" and "session-2" must not
    share their files.
    """
    safe = re.sub(r"[^A-Za-z0-9-]", "", session_id).strip("-")
    return re.sub(r"(?i)^([0-9a-f]{8})-.*", r"\1", safe)[:64] or "unknown"


def heartbeat_path(home: str, session_id: str) -> str:
    return os.path.join(home, f"heartbeat_{short_id(session_id)}.log")


def heartbeat_facts(home: str, session_id: str) -> Json:
    """What the heartbeat of a session wrote last, {} without one."""
    return facts_in(heartbeat_path(home, session_id))


def facts_in(path: str) -> Json:
    """What a heartbeat's log says (see `Heartbeat`), and `alive`: whether it has the lock; {} without one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            alive = not take_lock(file.fileno(), shared=True)
            return {**as_dict(json_in(file.readline(65536))), "alive": alive}
    except OSError:
        return {}


def beat_trouble(answer: Json, job_id: Any) -> tuple[str, bool]:
    """What a heartbeat's answer says is wrong ("": nothing), and whether the VM is gone (api notes).

    Errors that name `vm_heartbeat_message` only say that the worker is not started yet; one that names
    `registry_heartbeat_update` says that the VM's own record was not updated, which is what keeps it alive.
    """
    job = job_of(answer, job_id)
    errors = [str(error) for error in as_list(job.get("errors"))]
    serious = "; ".join(error for error in errors if "vm_heartbeat_message" not in error)
    gone = job.get("gone") is True
    if not gone and not serious and (errors or answer.get("success") is True):
        return "", False
    return printable(serious)[:200] or "Plato did not accept the heartbeat", gone


class Heartbeat:
    """The child's loop, and its heartbeat_<id>.log, one line of JSON with what is so now.

    It holds the kernel's lock on the file as long as it lives: the lock says whether it is alive.
    facts: session_id, pid, interval, beats, started, last_ok and last_error_at (seconds since 1970),
    last_error, failures (in a row), gone (whether the last answer said so), ended (why, once it has);
    directory: where the record is, also after it was moved.
    It ends when the VM is gone (looked at twice), when the record no longer names its session, when its log
    is taken away, after an hour without one good beat, or when nothing has used the VM for as long as its
    task says. The clock of that and of the pauses is one that nobody sets.
    """

    def __init__(self, task: Json) -> None:
        self.task = task
        settings = Settings(**task["settings"])
        self.api = PlatoApi(settings, Reporter())
        self.facts: Json = {
            "session_id": task["session_id"],
            "pid": os.getpid(),
            "started": time.time(),
            "interval": settings.heartbeat_seconds,
            "failures": 0,
            "beats": 0,
            "gone": False,
        }
        self.last_ok = self.last_use = time.monotonic()
        self.used: Any = None
        self.log = heartbeat_path(settings.home, task["session_id"])
        self._file = os.open(self.log, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def begin(self) -> bool:
        """Take the lock, unless another heartbeat has it; whether this one is to beat."""
        # Who only looks at the lock has it for a moment.
        taken = poll(lambda: "" if take_lock(self._file) else "it is taken", 2.0, 0.02)
        if not taken:
            self.write()
        return not taken

    def write(self) -> None:
        import json

        with suppress(OSError):  # it was removed
            self.facts["directory"] = os.getcwd()
        text = json.dumps(self.facts).encode() + b"\n"
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def run(self) -> None:
        """Beat until there is a reason to end: in the rhythm, or soon again while the VM may still live.

        Such retries are dense enough to meet an API that answers for 15 seconds in any 120.
        """
        while not self.facts.get("ended"):
            began = time.monotonic()
            self.facts["ended"] = self.reason_to_end() or self.beat() or None
            with suppress(OSError):  # a full disk must not end the heartbeat
                self.write()
            now = time.monotonic()
            pause = max(0.0, began + self.facts["interval"] - now)
            if self.facts["failures"] and now - self.last_ok <= BEAT_URGENT_SECONDS:
                pause = min(pause, BEAT_RETRY_SECONDS)
            if not self.facts["ended"]:
                time.sleep(pause)

    def beat(self) -> str:
        """One beat and what is so now; returns why the heartbeat must end, or ""."""
        facts = self.facts
        try:
            answer = self.api.heartbeat(self.task["session_id"])
            trouble, gone = beat_trouble(answer, self.task["job_id"])
        except SandboxError as error:
            trouble, gone = error.message, isinstance(error, NoSandboxError)
        self.api.hang_up()
        was_gone, facts["gone"] = facts["gone"], gone
        if not trouble:
            self.last_ok = time.monotonic()
            facts.update(last_ok=time.time(), failures=0, beats=facts["beats"] + 1)
            return ""
        facts.update(last_error=trouble, last_error_at=time.time(), failures=facts["failures"] + 1)
        if gone and was_gone:
            return VM_IS_GONE
        silence = time.monotonic() - self.last_ok
        return "no good beat for an hour" if silence > BEAT_SILENCE_LIMIT_SECONDS else ""

    def reason_to_end(self) -> str:
        """Why this heartbeat is not wanted any more, or "". A record that cannot be read is no reason."""
        try:
            os.stat(self.log)
            text = text_of_others(self.task["record"])
        except (FileNotFoundError, NotADirectoryError):
            return "its log or record was removed"
        except OSError:
            return ""
        ended = re.search(r'"stopped_at": *\d', text)  # in another client's
        another = re.search(r"session_id\W+[\w-]+[^\w-]", text)  # all of it, in a file that may be cut off
        if ended or (another and self.task["session_id"] not in text):
            return "its record names another sandbox, or none"
        idle = self.task.get("idle")
        is_idle = isinstance(idle, int) and self.unused_seconds() > idle
        return f"nothing used the VM for {idle} s" if is_idle else ""

    def unused_seconds(self) -> float:
        """How long no command and no connection has used the VM (see `hold`), as far as the looks tell."""
        with suppress(OSError):
            handle = os.open(f"{self.log}.used", os.O_RDWR)
            used = os.fstat(handle).st_mtime
            if used != self.used or not take_lock(handle):
                self.used, self.last_use = used, time.monotonic()
            os.close(handle)
        return time.monotonic() - self.last_use


def spawn_heartbeat(settings: Settings, state: Json, record: str, reporter: Reporter) -> int:
    """Start the heartbeat of a sandbox and return its pid, once it holds its lock.

    Its program goes by a pipe, and the key with it.

    record: the path of the file that names the sandbox, as long as it is wanted. Where another heartbeat of
    this session lives, as for a copy of the directory, it is that one.
    """
    import subprocess

    session_id = state["session_id"]
    task = {"settings": vars(settings), "session_id": session_id, "job_id": state.get("job_id")}
    task["idle"] = state.get("idle_seconds")
    directory, task["record"] = os.path.split(record)  # by its name alone, the directory may be moved
    command = own_command("-", "heartbeat-child", session_id)  # see is_heartbeat
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child: Any = launch(command, reporter, cwd=directory, **options)
    try:
        feed_child(child, lambda stdin: stdin.write(child_program(task).encode()))
        with child.stdout:
            child.stdout.read()  # which ends when it has begun, or is about to end
    except BaseException:
        child.kill()  # nobody would know of it
        child.wait()
        raise
    facts = heartbeat_facts(settings.home, session_id)
    if facts.get("pid") == child.pid:
        child.returncode = 0  # it lives on by itself: nobody waits for it
    else:
        child.wait()
    if facts.get("session_id") != session_id or not facts["alive"]:
        raise SandboxError(
            "The heartbeat could not be started.", hint=f"Check that {shown_path(settings.home)} is writable."
        )
    return int(facts["pid"])


def heartbeat_health(settings: Settings, state: Json) -> Json:
    """What is known of a sandbox's heartbeat, for `status`.

    state: ok, degraded (alive, but the last good beat is long ago), ending (that of another client, which
    ends at the time in its slot), dead, or expired (ended with the VM);
    pid; last_ok and last_error_at as ISO 8601 or None; last_error; failures in a row.
    """
    now, session_id = time.time(), state.get("session_id") or ""
    facts = heartbeat_facts(settings.home, session_id)
    pid, failures = facts.get("pid") or state.get("heartbeat_pid"), facts.get("failures", 0)
    word = "expired" if facts.get("ended") == VM_IS_GONE else "dead"
    if facts.get("alive"):
        # Older than four intervals is worth a warning.
        limit = 4 * facts.get("interval", 0) + BEAT_SECONDS
        since = facts.get("last_ok") or facts.get("started", 0)
        word = "ok" if now - since <= limit else "degraded"
    elif not facts and is_heartbeat(pid, session_id):
        word = "ending" if (state.get("expires_at") or "z") < utc_text(now + LEASE_SECONDS) else "ok"
    return {
        "state": word,
        "pid": pid,
        "last_error": facts.get("last_error") if failures or word != "ok" else None,
        **{key: utc_text(facts[key]) if key in facts else None for key in ("last_ok", "last_error_at")},
        "failures": failures,
        "ended": facts.get("ended"),
    }


def is_heartbeat(pid: Any, session_id: str) -> bool:
    """Whether a process is a heartbeat of this very session: its command line, ours too, says so."""
    command = command_of(pid) if isinstance(pid, int) and session_id else ""
    return "heartbeat" in command and session_id in command


def stop_heartbeat(settings: Settings, state: Json) -> bool:
    """End the heartbeat of a sandbox, ours or another client's; True when none is left.

    No signal goes to a process whose command line does not say that it is the heartbeat of this session.
    """
    import signal

    session_id = state["session_id"]
    look = partial(heartbeat_facts, settings.home, session_id)
    for pid in (look().get("pid"), state.get("heartbeat_pid")):
        for number in (signal.SIGTERM, signal.SIGCONT):  # a suspended one ends when it goes on
            if is_heartbeat(pid, session_id):
                with suppress(OSError):  # it has ended, or is not ours to end
                    _signal_heartbeat(pid, session_id, number)
    return not poll(lambda: "it runs" if look().get("alive") else "", 3.0, 0.01)


def _signal_heartbeat(pid: Any, session_id: str, number: int) -> None:
    """Send a signal to a heartbeat. On Linux a file descriptor holds the process while it is looked at once
    more, so a reused pid cannot slip in."""
    import signal

    try:
        handle = os.pidfd_open(pid)  # type: ignore[attr-defined,unused-ignore]
    except (AttributeError, OSError):  # a system or kernel without it, or it has ended
        os.kill(pid, number)
        return
    if is_heartbeat(pid, session_id):
        signal.pidfd_send_signal(handle, number)  # type: ignore[attr-defined,unused-ignore]
    os.close(handle)


def run_child(arguments: Words, task: Json | None) -> int:
    """The hidden commands that `own_command` starts: the heartbeat, which has a task, or the ProxyCommand."""
    try:
        if task:
            heartbeat = Heartbeat(task)
            if heartbeat.begin():
                point_at_nothing(0, 1)  # it holds nothing of its parent, which waits for that
                heartbeat.run()
        else:
            gateway_stream(*arguments[1:])
        return 0
    except SandboxError as error:
        hint = error.hint or "If the VM has ended, `plato-sandbox status` in its directory says so."
        print(f"Error: {error.message}", hint, sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


# Children of this file need nothing below.


# ----------------------------------------------------------------------------------------------------------
# yaml: text to values with the line and column of every node, and back; refuses what it does not support
# ----------------------------------------------------------------------------------------------------------
# One document of the YAML that people write by hand, with the scalar rules of YAML 1.1 (those of PyYAML's
# safe_load, but timestamps stay strings). Tags, directives, several documents, complex keys, numbers such as
# 22:22 (base 60) and .nan, and whatever else is doubtful are refused.

YAML_MAX_DEPTH = 64  # collections inside one another, aliases counted as if written out; spares the stack
YAML_MAX_NUMBER = 1000  # characters; Python takes quadratic time for long ones, and stops at 4300 digits
YAML_MAX_ALIASED = 1_000_000  # characters that all aliases together may stand for

_YAML_MERGE = object()  # the value of a plain `<<` used as a key

_YAML_WORDS = {
    word: value
    for words, value in (
        ("~ null Null NULL", None),
        ("true True TRUE yes Yes YES on On ON", True),
        ("false False FALSE no No NO off Off OFF", False),
    )
    for word in words.split()
}
_YAML_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|(0[0-7_]*)|[1-9][0-9_]*(?::[0-5]?[0-9])*)")
_YAML_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+][0-9]+)?|(?::[0-5]?[0-9])+\.[0-9_]*)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

# A NUL, which no document may hold, stands at the end of the text while it is read.
_YAML_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]|\r(?!\n)"
)
_YAML_GAP = re.compile(r"(?:[ \r\n]+|(?<![^ \n\ufeff])#[^\n\0]*)*")
_YAML_BLANK_LINES = re.compile(r"(?: *\r?\n)* *")
_YAML_MARKER = re.compile(r"(?<![^\n\ufeff])(?:---|\.\.\.)(?=[ \t\r\n\0])")
_YAML_COLON = re.compile(r" *:(?=[ \t\r\n\0])")
_YAML_FLOW_COLON = re.compile(r" *:")
_YAML_DASH = re.compile(r"-(?=[ \t\r\n\0])")
_YAML_NAME = re.compile(r"[&*][0-9A-Za-z_-]+(?=[ \t\r\n\0:,\]}])")
_YAML_QUOTED = re.compile(r"'[^'\0]*(?:''[^'\0]*)*'(?!')|\"[^\"\\\0]*(?:\\.[^\"\\\0]*)*\"", re.DOTALL)
_YAML_HEADER = re.compile(r"[|>](?:[1-9]?[-+]?|[-+][1-9])(?: +(?:#[^\n\0]*)?)?\r?(?:\n|(?=\0))")
_YAML_FOLDED = re.compile(r"^([^ \t\n].*)\n(\n*)(?=[^ \t\n])", re.MULTILINE)

# Plain text on one line, as a value's first and as a further one, in blocks and between brackets: a colon
# belongs to it when something follows, a '#' when no space precedes.
_YAML_LINE = r"(?:[^ \t\r\n\0:]+|:(?=[^ \t\r\n\0])| +(?=[^ \t\r\n\0:#]|:[^ \t\r\n\0]))+"
_YAML_FLOW_LINE = (
    r"(?:[^ \t\r\n\0:,?[\]{}]+|:(?=[^ \t\r\n\0,[\]{}])| +(?=[^ \t\r\n\0:#,?[\]{}]|:[^ \t\r\n\0,[\]{}]))+"
)
_YAML_PLAIN = (
    re.compile(r"(?=[^?:,[\]{}#&*!|>'\"%@`-]|[?:-][^ \t\r\n\0])" + _YAML_LINE),
    re.compile(_YAML_LINE),
)
_YAML_FLOW_PLAIN = (
    re.compile(r"(?=[^:#&*!|>'\"%@`-]|-(?:[^ \t\r\n\0:,?[\]{}]|:[^ \t\r\n\0,[\]{}]))" + _YAML_FLOW_LINE),
    re.compile(_YAML_FLOW_LINE),
)

_YAML_WHITE = re.compile(r"[ \t\r\n]+")
_YAML_ESCAPE = re.compile(
    r"[ \t\r\n]+|\\(?:\r?\n[ \t\r\n]*|(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.))"
)
_YAML_ESCAPES = dict(zip(
    "0abt\tnvfre \"/\\N_LP",
    "\0\a\b\t\t\n\v\f\r\x1b \"/\\\x85\xa0\u2028\u2029",
))  # fmt: skip

# Why a text cannot stand where it does: the first that fits what stands before it, a NUL, and itself.
_YAML_HINTS = {
    r"\n *\0\t": "a tab is used for indentation; use spaces",
    r"\0\t": "a tab is used as white space; use spaces",
    r"\0#": "'#' starts a comment only behind a space; put one before it, or put the text in quotes",
    r"[\]}] *\0 *:|\0[\[{]": "a list or a mapping cannot be a key; put text with brackets in quotes",
    r"['\"] *\0 *:": "a ':' follows a quoted value; quote the whole value, keep a key on one line",
    r"['\"] *\0[^\],}]": "text follows a closing quote; inside quotes write '' for ' and \\\" for \"",
    r"[^\s:,\[{-] *\0 *:": "': ' cannot stand inside a plain value; put the value in quotes, "
    "or start the nested mapping on a line of its own",
    r"\0:": "a key is missing before ':'; write 'key: value', or put the text in quotes",
    r"\0[@`]": "'@' and '`' are reserved and cannot start a plain value; put the value in quotes",
    r"\0%": "'%' cannot start a plain value, and directives are not supported; put a value in quotes",
    r"\0!": "tags such as '!name' are not supported; remove the tag, or put the value in quotes",
    r"\0[|>]": "block text must follow 'key:' or '-', not stand inside brackets; use quotes here",
    r"\0&": "a value cannot have two anchors; remove one",
    r"\0,": "a value is missing before ','; remove the comma, or put the text in quotes",
    r"\0[\]}]": "this bracket closes nothing here; remove it, or put the text in quotes",
    r"\0\?": "complex keys ('? ') are not supported; write 'key: value', or put the text in quotes",
    r"\0-": "a list item ('- ') cannot start here; put it on a line of its own, indented under its key",
    r"\0": "text follows a complete value; put the whole value in quotes",
}


class YamlError(SandboxError):
    """Text that is not YAML, or not the YAML that is supported, at a `line` and `column` counted from 1."""

    exit_code = 8
    code = "yaml_invalid"

    def __init__(self, message: str, source: str, line: int, column: int) -> None:
        super().__init__(message)
        self.source = source
        self.line = line
        self.column = column

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}: {self.message}"


class YamlNode:
    """One value of a document, and where it stands in the text.

    `value` is the resolved scalar, the list of the items' nodes, or a dict from each resolved key to its (key
    node, value node), merges applied. `text[start:end]` is the node's own source, without its anchor. An
    empty value has no source: `start` equals `end`, just behind its colon or dash. Block text ends with its
    last line break. An alias is the very node of its anchor.
    """

    __slots__ = ("_reader", "end", "start", "value")

    def __init__(self, reader: _YamlReader, value: Any, start: int, end: int) -> None:
        self._reader = reader
        self.value = value
        self.start = start
        self.end = end

    @property
    def line(self) -> int:
        """The line where the node starts, from 1."""
        return self._reader.line(self.start)

    @property
    def column(self) -> int:
        """The column where the node starts, from 1, in characters."""
        return self._reader.indent(self.start) + 1

    def get(self, *keys: object) -> YamlNode | None:
        """The value's node of a mapping's key (of that one's next key ...); None where there is none."""
        node = self
        for key in keys:
            if not isinstance(node.value, dict) or key not in node.value:
                return None
            node = node.value[key][1]
        return node

    def source_text(self) -> str:
        """The node as it is written in the document."""
        return self._reader.text[self.start : self.end]

    def plain(self, depth: int = 0) -> Any:
        """Plain Python values, new ones at every call: what an alias stands for is copied.

        depth: how many collections it is in; YamlError when they get too many, aliases written out.
        """
        if not isinstance(self.value, (list, dict)):
            return self.value
        self._reader.check_depth(depth + 1, self.start)
        if isinstance(self.value, list):
            return [item.plain(depth + 1) for item in self.value]
        return {key: pair[1].plain(depth + 1) for key, pair in self.value.items()}

    def error(self, message: str, text: str = "") -> YamlError:
        """An error, to be raised by the caller, that points at this node, or at a text that follows there."""
        return self._reader.error(message, max(self.start, self._reader.text.find(text, self.start)))


def yaml_load(text: str, source: str = "<yaml>") -> Any:
    """The one document of `text` as plain values; None when it is empty; YamlError when it is wrong."""
    return yaml_compose(text, source).plain()


def yaml_compose(text: str, source: str = "<yaml>") -> YamlNode:
    """The one document of `text` as nodes that know their place."""
    return _YamlReader(text, source).document()


class _YamlReader:
    """Reads a document. Each method reads one rule of the grammar at the offset `at` and moves behind it.

    first: where the last token stands that was the first of its line; column: its column, or -1 at the end of
    the document. Columns alone decide where a block ends. end: where the last value ended.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text + "\0"
        self.source = source
        self.origin = self.at = int(text.startswith("\ufeff"))  # a byte order mark takes no column
        self.first = -1
        self.column = self.end = self.depth = self.aliased = 0
        self.anchors: dict[str, YamlNode] = {}
        self.anchored: YamlNode | None = None  # the last one

    def line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def indent(self, at: int) -> int:
        """How many characters stand before an offset on its line."""
        return at - max(self.text.rfind("\n", 0, at) + 1, self.origin)

    def error(self, message: str, at: int) -> YamlError:
        return YamlError(message, self.source, self.line(at), self.indent(at) + 1)

    def wrong(self) -> YamlError:
        """Why the text at the cursor cannot stand there."""
        around = f"\n{self.text[: self.at][-200:]}\0{self.text[self.at : self.at + 20]}"
        hints = (hint for pattern, hint in _YAML_HINTS.items() if re.search(pattern, around))
        return self.error(next(hints), self.at)

    def take(self, pattern: Pattern) -> str:
        """Move behind what matches at the cursor, and return it; "" when nothing does."""
        match = pattern.match(self.text, self.at)
        if not match:
            return ""
        self.at = match.end()
        return match[0]

    def skip(self) -> bool:
        """Move to the next token; whether it is the first of its line, or the end of the text."""
        start = self.at
        if start != self.first:
            new_line = "\n" in self.take(_YAML_GAP) or start == self.origin
            char = self.text[self.at]
            if char in "\t#":
                raise self.wrong()
            if new_line or char == "\0":
                self.first = self.at
                self.column = self.indent(self.at)
                if char == "\0" or (self.column == 0 and _YAML_MARKER.match(self.text, self.at)):
                    self.column = -1
        return self.at == self.first

    def end_line(self) -> None:
        if not self.skip():
            raise self.wrong()

    def document(self) -> YamlNode:
        bad = _YAML_FORBIDDEN.search(self.text, self.origin, len(self.text) - 1)
        if bad:
            raise self.error(
                f"the character {ascii(bad[0])[1:-1]} is not allowed; remove it,"
                " or write it like this in double quotes",
                bad.start(),
            )
        self.skip()
        is_marked = self.column < 0 and self.text.startswith("---", self.at)
        self.at = self.at + 3 if is_marked else self.origin
        node = self.value(-1)
        if self.column >= 0:
            raise self.error(
                f"this line does not belong to what starts on line {node.line};"
                " indent it to match, or use quotes",
                self.at,
            )
        while node.end > self.origin and self.text.startswith("...", self.at):
            self.at += 3
            self.end_line()
        if self.text[self.at] != "\0":
            raise self.error("only one document in a text is supported; remove this line", self.at)
        return node

    # Blocks

    def value(self, indent: int, *, dash: bool = False) -> YamlNode:
        """What follows a colon or `---` (or a dash) on its line, or below it and deeper than `indent`.

        Behind a dash, keys and dashes may stand on its line; below a colon, dashes at `indent` itself.
        """
        start = self.at
        if not self.skip():
            return self.node(indent, self.indent(self.at) if dash else -1, dash=dash)
        level = self.column == indent and not dash and _YAML_DASH.match(self.text, self.at)
        if self.column > indent or level:
            return self.node(indent, self.column, dash=dash)
        self.end = start
        return YamlNode(self, None, start, start)

    def node(self, indent: int, column: int, *, dash: bool = False) -> YamlNode:
        """The value at the cursor. column: where that is, if a key or a dash may be there, else -1."""
        start = self.at
        if column >= 0 and _YAML_DASH.match(self.text, start):
            return self.sequence(column)
        name = self.anchor()
        behind = self.at
        if name and self.skip():
            self.at = behind
            return self.named(name, self.value(indent, dash=dash), start)
        if self.text[self.at] in "|>":
            node = self.block_text(indent)
        elif self.text[self.at] in "[{":
            node = self.flow()
        else:
            node = self.scalar(indent, _YAML_PLAIN)
        self.named(name, node, start)
        if column >= 0 and self.is_key(start, _YAML_COLON):
            return self.mapping(column, node, start)
        self.end_line()
        return node

    def is_key(self, start: int, colon: Pattern) -> bool:
        """Whether a colon makes a key of what was read from `start` on; the cursor moves behind it."""
        return "\n" not in self.text[start : self.at] and self.take(colon) != ""

    def sequence(self, column: int) -> YamlNode:
        node = self.open([], self.at)
        while self.take(_YAML_DASH):
            node.value.append(self.value(column, dash=True))
            if self.column != column:
                break
        return self.close_block(node, column)

    def mapping(self, column: int, key: YamlNode, start: int) -> YamlNode:
        """A block mapping, whose first key and its colon are already read."""
        node = self.open({}, start)
        while True:
            self.add(node, key, self.value(column), start)
            if self.column != column:
                return self.close_block(node, column)
            start = self.at
            name = self.anchor()
            if name:
                self.skip()
            key = self.named(name, self.scalar(column, _YAML_PLAIN), start)
            if not self.is_key(start, _YAML_COLON):
                raise self.error("'key: value' is expected here, with a space behind the colon", start)

    def close_block(self, node: YamlNode, column: int) -> YamlNode:
        if self.column > column:
            raise self.error(
                f"wrong indentation: this line has {self.column} spaces, what starts on line {node.line} has"
                f" {column}; align the lines, or put a text of several lines in quotes",
                self.at,
            )
        return self.close(node)

    def block_text(self, indent: int) -> YamlNode:
        """Text of lines deeper than `indent`, below `|` (kept as they are) or `>` (folded)."""
        start = self.at
        header = self.take(_YAML_HEADER)
        if not header:
            raise self.error(
                "behind '|' or '>' only '+' or '-', an indentation from 1 to 9 and a comment may stand;"
                " start the text on the next line",
                start,
            )
        marks = header[1:3]
        level = marks.strip("+- #\r\n")
        if level:
            margin = max(indent, 0) + int(level)
        else:
            behind = self.at
            blanks = self.take(_YAML_BLANK_LINES).replace("\r", "").split("\n")
            margin = max(indent + 1, 1, *map(len, blanks))
            self.at = behind
        line = rf" {{{margin}}}[^\r\n\0][^\n\0]*(?:\n|(?=\0))"
        body = self.take(re.compile(rf"(?:(?: *\r?\n)*{line})*"))
        value = "\n".join(line[margin:] for line in body.splitlines())
        if header[0] == ">":
            value = _YAML_FOLDED.sub(lambda match: match[1] + (match[2] or " "), value)
        if body.endswith("\n") and "-" not in marks:
            value += "\n"
        self.end = self.at
        breaks = self.take(_YAML_BLANK_LINES).count("\n")
        if "+" in marks and breaks:
            value += "\n" * breaks
            self.end = self.at - self.indent(self.at)
        if self.text[self.at] != "\0":
            self.at -= self.indent(self.at) + 1  # to the line break, where a line begins for `skip`
        self.skip()
        return YamlNode(self, value, start, self.end)

    # Brackets

    def flow(self) -> YamlNode:
        """A [list], in which `key: value` is a mapping of its own, or a {mapping}."""
        opened = self.at
        closer = "]" if self.text[opened] == "[" else "}"
        node = self.open([] if closer == "]" else {}, opened)
        self.at += 1
        while self.flow_token(opened) != closer:
            start = self.at
            part = self.flow_node(opened)
            paired = self.is_key(start, _YAML_FLOW_COLON)
            if paired or closer == "}":
                home = node if closer == "}" else self.open({}, start)
                behind = self.end = self.at
                empty = not paired or self.flow_token(opened) in ",]}"
                value = YamlNode(self, None, behind, behind) if empty else self.flow_node(opened)
                self.add(home, part, value, start)
                part = home if home is node else self.close(home)
            if closer == "]":
                node.value.append(part)
            if self.flow_token(opened) == ",":
                self.at += 1
            elif self.text[self.at] != closer:
                raise self.error(
                    f"',' or '{closer}' is expected here; add it, put the text in quotes,"
                    " or keep a key on one line",
                    self.at,
                )
        self.at += 1
        self.end = self.at
        return self.close(node)

    def flow_token(self, opened: int) -> str:
        """Move to the next token between brackets; its first character."""
        if self.skip() and self.column < 0:
            raise self.error(f"'{self.text[opened]}' is never closed; add the matching bracket", opened)
        return self.text[self.at]

    def flow_node(self, opened: int) -> YamlNode:
        start = self.at
        name = self.anchor()
        bracket = self.flow_token(opened) in "[{"
        return self.named(name, self.flow() if bracket else self.scalar(-1, _YAML_FLOW_PLAIN), start)

    # Collections of both kinds

    def open(self, value: Any, start: int) -> YamlNode:
        self.depth += 1
        self.check_depth(self.depth, start)
        return YamlNode(self, value, start, start)

    def check_depth(self, depth: int, at: int) -> None:
        if depth > YAML_MAX_DEPTH:
            raise self.error(f"nested deeper than {YAML_MAX_DEPTH} levels; make the document flatter", at)

    def close(self, node: YamlNode) -> YamlNode:
        self.depth -= 1
        node.end = self.end
        if isinstance(node.value, dict) and _YAML_MERGE in node.value:
            key, merge = node.value.pop(_YAML_MERGE)
            for source in merge.value if isinstance(merge.value, list) else [merge]:
                if not isinstance(source.value, dict):
                    raise key.error("'<<' takes a mapping or a list of mappings, such as '<<: *defaults'")
                node.value = {**source.value, **node.value}  # its own keys win, then the first in the list
        return node

    def add(self, node: YamlNode, key: YamlNode, value: YamlNode, at: int) -> None:
        if isinstance(key.value, (list, dict)):
            raise self.error("a list or a mapping cannot be a key; put text with brackets in quotes", at)
        if key.value in node.value:
            first = node.value[key.value][0].line
            remedy = "write '<<: [*a, *b]'" if key.value is _YAML_MERGE else "remove or rename one"
            raise self.error(
                f"the key {key.source_text()} is used twice, first on line {first}; {remedy}", at
            )
        node.value[key.value] = key, value

    # Anchors and aliases

    def name(self) -> str:
        name = self.take(_YAML_NAME)
        if not name:
            raise self.error(
                "a name (letters, digits, '-', '_') must follow '&' and '*'; put text in quotes", self.at
            )
        return name[1:]

    def anchor(self) -> str:
        return self.name() if self.text[self.at] == "&" else ""

    def named(self, name: str, node: YamlNode, start: int) -> YamlNode:
        """The node, which aliases may stand for from now on if it has an anchor; that is at `start`."""
        if name:
            if name in self.anchors:
                raise self.error(f"the anchor '&{name}' is defined twice; rename one", start)
            if node.start < start or node is self.anchored or node.value is _YAML_MERGE:
                raise self.error(
                    "an alias, '<<' or a value with an anchor cannot have this one; remove the anchor", start
                )
            self.anchors[name] = self.anchored = node
        return node

    def alias(self) -> YamlNode:
        start = self.at
        name = self.name()
        if name not in self.anchors:
            raise self.error(f"no '&{name}' ends above this alias; define it first, or quote the text", start)
        node = self.anchors[name]
        self.aliased += len(str(node.plain(self.depth)))
        if self.aliased > YAML_MAX_ALIASED:
            raise self.error(
                f"the aliases up to here stand for {self.aliased} characters, too many; use fewer", start
            )
        return node

    # Scalars

    def scalar(self, indent: int, patterns: tuple[Pattern, Pattern]) -> YamlNode:
        """An alias, quoted text, or plain text, which goes on in the lines below that are deeper."""
        start = self.at
        if self.text[start] == "*":
            node = self.alias()
            self.end = self.at
            return node
        if self.text[start] in "'\"":
            value = self.quoted()
            self.end = self.at
        else:
            value = self.plain(indent, *patterns)
        return YamlNode(self, value, start, self.end)

    def plain(self, indent: int, first: Pattern, further: Pattern) -> Any:
        start = self.at
        if not self.take(first):
            raise self.wrong()
        self.end = self.at
        while self.skip() and self.column > indent and "#" not in self.text[self.end : self.at]:
            if not self.take(further):
                break
            self.end = self.at
        raw = self.text[start : self.end]
        if "\n" in raw:
            raw = _YAML_WHITE.sub(self.part, raw)
        if raw in _YAML_WORDS:
            return _YAML_WORDS[raw]
        if raw == "<<" and self.text[self.at] == ":":
            return _YAML_MERGE
        if raw in ("=", "<<"):
            raise self.error(f"a plain '{raw}' has a special meaning in YAML; put it in quotes", start)
        whole = _YAML_INT.fullmatch(raw)
        if not whole and not _YAML_FLOAT.fullmatch(raw):
            return raw
        digits = raw.replace("_", "")
        with suppress(ValueError):  # of 0x, 1:30 (base 60), .inf
            if len(raw) <= YAML_MAX_NUMBER:
                return int(digits, 8 if whole[1] else 0) if whole else float(digits)
        raise self.error(
            "this number is too long, or its meaning is in doubt; put it in quotes to keep it as text", start
        )

    def quoted(self) -> str:
        start = self.at
        raw = self.take(_YAML_QUOTED)
        if not raw:
            raise self.error(
                f"the quote that opens here is never closed; add {self.text[start]} at its end", start
            )
        marker = "\n" in raw and _YAML_MARKER.search(self.text, start, self.at)
        if marker:
            raise self.error("a document marker stands inside quotes; indent the line", marker.start())
        value = raw[1:-1]
        if raw[0] == '"':
            return _YAML_ESCAPE.sub(self.part, value) if "\\" in value or "\n" in value else value
        return (_YAML_WHITE.sub(self.part, value) if "\n" in value else value).replace("''", "'")

    def part(self, match: re.Match[str]) -> str:
        """What an escape, or a run of white space, stands for in text that may have several lines."""
        if match.lastindex:
            try:
                return chr(int(match[1][1:], 16)) if match[1][1:] else _YAML_ESCAPES[match[1]]
            except (KeyError, ValueError, OverflowError):
                raise self.error(
                    f"{match[0][:2]} is no escape in double quotes; write \\\\, or use single quotes",
                    self.at - 1 - len(match.string) + match.start(),
                ) from None
        breaks = match[0].count("\n")
        if breaks == 1:
            return "" if match[0][0] == "\\" else " "
        return "\n" * (breaks - 1) if breaks else match[0]


# Writing


def yaml_dump(value: Any) -> str:
    """A YAML document as people write it; readers of YAML 1.1 read back the same.

    Takes dicts, lists, tuples (written as lists), strings, numbers, booleans and None; keys are scalars.
    SandboxError for other types, and for what is nested too deep to be read (or contains itself).
    """
    try:
        return _yaml_block(value, "").lstrip()
    except RecursionError:
        raise SandboxError("What is nested so deep cannot be written as YAML.") from None


def _yaml_block(value: Any, margin: str) -> str:
    """What stands behind a key: fields and items on lines of their own, scalars and lists of them on one."""
    below = f"{margin}  "
    if value and isinstance(value, dict):
        pairs = ((yaml_inline(key), _yaml_block(part, below)) for key, part in value.items())
        return "\n" + "".join(f"{margin}{key}:{text}" for key, text in pairs)
    if isinstance(value, (list, tuple)) and any(isinstance(part, (dict, list, tuple)) for part in value):
        return "\n" + "".join(f"{margin}- {_yaml_block(part, below).lstrip()}" for part in value)
    return f" {yaml_inline(value)}\n"


def yaml_inline(value: Any) -> str:
    """A value on one line, as people write it: name, "odd, name", [a, b], {table: a, columns: [b]}."""
    import json

    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./:=&$@+-]*(?<!:)", value)
        if plain and value not in _YAML_WORDS:
            return value
        return '"' + printable(value.replace("\\", "\\\\").replace('"', '\\"')) + '"'
    if isinstance(value, dict):
        pairs = (f"{yaml_inline(key)}: {yaml_inline(part)}" for key, part in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(yaml_inline, value)) + "]"
    if value is None or isinstance(value, (int, float)):
        written = json.dumps(value).replace("Infinity", ".inf").replace("NaN", ".nan")
        return re.sub(r"^(-?\d+)e", r"\1.0e", written)  # YAML wants a point before it
    raise SandboxError(f"A value of type {type(value).__name__} cannot be written as YAML.")


def yaml_items(margin: str, values: Sequence[Any]) -> list[str]:
    """The items of a block list, as people write it; a mapping's fields stand on lines of their own."""
    return [f"{margin}- " + yaml_dump(value)[:-1].replace("\n", f"\n{margin}  ") for value in values]


# ----------------------------------------------------------------------------------------------------------
# config: plato-config.yml and flows files, every field checked against the API's models beforehand
# ----------------------------------------------------------------------------------------------------------


class ConfigError(CheckFailedError):
    """A config that cannot be used. problems, warnings: what is wrong with it, where that is known."""

    code = "config_invalid"
    problems: Words = ()
    warnings: Words = ()


def counted(count: int, what: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def unusable_config(source: str, problems: Words, warnings: Words = ()) -> ConfigError:
    """The error for a file. problems, warnings: `file:line:column: what is wrong`, lines of the message."""
    error = ConfigError(
        f"{source} cannot be used: {counted(len(problems), 'problem')}.",
        hint="Nothing was done. Correct the file and run the command again.",
    )
    doubts = (f"{warning} (a warning)" for warning in warnings)
    error.message = "\n".join([error.message, *map(printable, (*problems, *doubts))])
    error.problems, error.warnings = [*problems], [*warnings]
    return error


def _meant(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that was meant, or all of them."""
    close = closest(word, known)
    return f"did you mean `{close}`?" if close else f"there are: {', '.join(known) or 'none'}"


def closest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or ""."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 3, 0.7)
    found.sort(key=lambda name: sorted(name) != sorted(word))  # "strat" is "start", not "state"
    return found[0] if found else ""


def whole_number(value: Any) -> int | None:
    """An int, or a float or text that the API's models take for one; None for anything else."""
    return int(float(value)) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}(\.0*)?\s*", str(value)) else None


# What each field of the API's models may be (source: SimConfigDataset, Flow): a kind of `_KINDS`, a range of
# whole numbers, one of several words, nothing in particular, a [list of such], or a map of fields. "*" is
# every other field; one with ! must be there and must not be empty; one with ? is a word (the first, unless
# it must be there) on which the fields beside it depend.
_SCHEMAS = """
dataset:
  compute:
    cpus: 1..8
    memory: 512..16384
    disk: 1024..204800
    app_port: 0..65535
    plato_messaging_port: 0..65535
  metadata:
    favicon: text
    name: text
    description: text
    source_code_url: text
    start_url: text
    license: text
    flows_path: text
    variables:
  services:
    "*":
      type: docker-compose
      file: text
      required_healthy_containers: [text]
      healthy_wait_timeout: 30..1800
  listeners:
    "*":
      type?:
        db:
          db_type!: postgresql mysql sqlite clickhouse mongodb redis
          db_database!: text
          db_port: 0..65535
          db_host: text
          db_user: text
          db_password: text
          db_schema: text
          schema_name: text
          truncate_tables: switch
          audit_ignore_tables: [table]
          audit_table_name: text
          seed_data_paths: [text]
          volumes: [text]
        proxy:
          sim_name: text
          dataset: text
          proxy_host: text
          proxy_port: 1024..65535
          passthrough_all_ood_requests: switch
          replay_sessions:
        file: &files
          seed_data_path: text
          target_dir!: text
          watch_enabled: switch
          watch_patterns: [text]
          ignore_patterns: [text]
          volumes: [text]
          scan_frequency: 0..
        xml: *files
flow:
  name!: filled
  description: text
  har_path:
  steps:
    - type!?:
        navigate: {url!: filled}
        wait_for_selector: {selector!: filled}
        click: {selector!: filled}
        fill: {selector!: filled, value!: value}
        wait: {duration!: 0..}
        wait_for_url: {url_contains!: filled}
        check_element: {selector!: filled, should_exist: switch}
        verify:
          verify_type!?:
            element_exists: {selector!: filled}
            element_visible: {selector!: filled}
            element_text: {selector!: filled, text!: filled, contains: switch}
            element_count: {selector!: filled, count!: 0..}
            page_title: {title!: text, contains: switch}
        verify_text: {text!: filled, should_exist: switch}
        verify_url: {url!: filled, contains: switch}
        verify_no_errors: {error_selectors: [text]}
        screenshot: {filename!: path, full_page: switch}
        switch_page: {page_index!: -1000..1000}
        execute_script: {script!: filled}
      description: text
      timeout: 0..
      retries: 0..
      retry_delay_ms: 0..
"""
# In words, as a type, and how its text begins.
_KINDS: dict[str, Any] = {
    "text": ("a text (quotes make one)", str, ""),
    "filled": ("a text that is not blank", str, r"\s*\S"),
    "name": ("a text of letters, digits, '.', '_' and '-'", str, SERVICE_NAME + r"\Z"),
    "table": ("a table name or {table: NAME, columns: [..]}", (str, dict), ""),
    "path": (
        "a path in the screenshots folder",
        str,
        r"(?s)(?!/|(.*/)?\.\.(/|\Z))(?=.*[^/.\s])[^\0]+\Z",
    ),
    "switch": ("true or false", bool, ""),
    "value": ("a text, a whole number, or true or false (quotes make a text)", (str, int), ""),
}


@cache
def schemas() -> Json:
    """Of a dataset and of a flow."""
    return yaml_load(_SCHEMAS)  # type: ignore[no-any-return]


def _fields(values: Mapping[str, Any], schema: Json) -> Json:
    """The fields that a map with these values may have: those beside a word, by the word."""
    fields: Json = {}
    for name, wanted in schema.items():
        key = name.rstrip("?")
        fields[key] = wanted
        if key != name:
            fields[key] = " ".join(wanted)
            word = values.get(key.rstrip("!")) or ("" if "!" in key else next(iter(wanted)))
            fields.update(_fields(values, wanted.get(str(word), {"*": None})))
    return fields


def _unlike(value: Any, wanted: Any) -> str:
    """What is wrong with a value that is no list or map; "" when nothing is."""
    if wanted in _KINDS:
        words, types, pattern = _KINDS[wanted]
        is_one = isinstance(value, types) and re.match(pattern, str(value))
        return "" if is_one else f"it must be {words}"
    low, dots, high = wanted.partition("..")
    if dots:
        number = whole_number(value)
        if number is not None and int(low) <= number <= int(high or number):
            return ""
        return f"it must be a whole number, at least {low}{high and ', at most '}{high}"
    return "" if value in wanted.split() else _meant(str(value), wanted.split())


def check_yaml(text: str, source: str, schema: Json, *, strict: bool = False) -> tuple[YamlNode, list[str]]:
    """Compare a YAML text with a schema: its document, and warnings of what looks mistaken.

    ConfigError lists what is wrong, with file, line and column. strict: an unknown field is wrong; else it is
    worth a warning if it looks misspelt.
    """
    found: tuple[list[str], list[str]] = [], []
    try:
        root = yaml_compose(text, source)
        for is_warning, node, where, words in _mistakes(root, "", schema, strict):
            what = f"`{where}`" if where else "the file"
            found[is_warning].append(str(node.error(f"{what} {words}")))
    except YamlError as error:
        found[0].append(str(error))
    problems, warnings = found
    if problems:
        raise unusable_config(source, problems, warnings)
    return root, warnings


def _mistakes(node: YamlNode, where: str, wanted: Any, strict: bool) -> Iterator[Any]:
    """What is wrong: whether it is but worth a warning, the node, its place, what is wrong with it."""
    value, written = node.value, node.source_text()
    if isinstance(wanted, list):
        if not isinstance(value, list):
            yield False, node, where, "must be a list (lines that start with `- `)"
            return
        names: set[str] = set()
        for number, item in enumerate(value, 1):
            name = item.get("name")
            label = str(name.plain() if name else number)
            if name and label in names:
                yield False, item, where, f"names `{label}` twice; give this one another name"
            names.add(label)
            yield from _mistakes(item, f"{where}.{label}", wanted[0], strict)
    elif isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield False, node, where, "must be a map of fields (`name: value` lines)"
            return
        fields = _fields({key: part.value for key, (_, part) in value.items()}, wanted)
        known = {name.rstrip("!"): inner for name, inner in fields.items()}
        for name in {**known, **value}:
            part, inner = node.get(name), known.get(name, known.get("*"))
            place = f"{where}.{name}".lstrip(".")
            if name not in known and "*" not in known:
                meant = _meant(str(name), known)
                if strict or "did you mean" in meant:
                    yield not strict, value[name][0], where, f"has no field `{name}`; {meant}"
            elif part and (part.value is not None or name not in known):
                yield from _mistakes(part, place, inner, strict)
            elif f"{name}!" in fields:
                is_leaf = isinstance(inner, str)
                needed = _unlike(None, inner) if is_leaf else _meant(name, [*map(str, value)])
                yield False, part or node, place, f"is {'empty' if part else 'missing'}; {needed}"
    else:
        wrong = wanted and _unlike(value, wanted)
        if wrong:  # where a text may stand, a password may stand; and in a map with wrong margins
            is_private = wanted in ("text", "value") or isinstance(value, (list, dict))
            shown = "" if is_private else written[:80]
            yield False, node, where, f"is {shown or 'wrong'}; {wrong}"
        elif wanted == "value" and not isinstance(value, str) and written != str(value):
            yield (
                True,
                node,
                where,
                f"is doubtful: YAML reads {written} as {value}; quotes keep it as it is",
            )


class Config:
    """A checked plato-config.yml and the dataset chosen from it.

    path: absolute, "" where Plato stores it; service: its name; dataset: the chosen dataset's name; content:
    that dataset as the user wrote it, unknown keys included; compute: its compute section; warnings: what
    looks mistaken.
    """

    def __init__(self, path: str, service: str, dataset: str, node: Any, warnings: list[str]):
        self.path = path
        self.service = service
        self.dataset = dataset
        self.content: Json = node.plain()
        self.compute: Json = self.content.get("compute") or {}
        self.warnings = warnings
        self._node = node

    def told(self, words: str, *keys: str, value: str = "") -> str:
        """What is wrong, behind its place: where the keys lead to, as far as they do; there, a text."""
        node = self._node
        for key in keys:
            node = node.get(key) or node
        return str(node.error(words, value))

    def for_worker(self) -> Json:
        """The dataset for `start-worker`: as written, required objects filled in."""
        filled = {**self.content, "compute": self.compute, "metadata": self.content.get("metadata") or {}}
        for name, kind in (("services", "docker-compose"), ("listeners", "db")):
            if filled.get(name):  # servers differ in whether `type` may be left out
                parts = filled[name].items()
                filled[name] = {key: {**part, "type": part.get("type") or kind} for key, part in parts}
        return filled


def find_config(directory: str) -> str:
    """The path of the plato-config.yml (or .yaml) in a directory, whether there is one or not."""
    paths = [os.path.join(directory, name) for name in CONFIG_NAMES]
    return next(filter(os.path.lexists, paths), paths[0])


NO_CONFIG = (
    "It is looked for in the current directory or that of -w DIR. `start-worker` takes --config-path FILE,"
    " and a VM of --blank needs none."
)


def read_config(path: str, hint: str | None = None) -> str:
    """The text of a config, or of a file that it names; ConfigError for one that cannot be read."""
    failure = f"{shown_path(path)} cannot be read"
    with explained(failure, hint, ConfigError), open(path, encoding="utf-8", newline="") as file:
        return file.read()


def load_config(path: str, dataset: Any) -> Config:
    """Read and check a plato-config.yml for one dataset (default: base); ConfigError lists every problem."""
    return parse_config(read_config(path, NO_CONFIG), shown_here(path), path, dataset)


def parse_config(text: str, source: str, path: str, dataset: str) -> Config:
    """The same from a text; source is what problems name as its place."""
    name = dataset or DEFAULT_DATASET
    datasets = {"*": None, f"{name}!": schemas()["dataset"]}  # the others are not looked at
    try:
        root, warnings = check_yaml(text, source, {"service!": "name", "datasets!": datasets})
    except ConfigError:
        with suppress(YamlError):  # which is told with all that is wrong
            known = dict_in(yaml_load(text), "datasets")
            if dataset and known and dataset not in known:
                meant = _meant(dataset, [*map(str, known)])
                raise UsageError(f"{source} has no dataset {dataset!r}; {meant}") from None
        raise
    native = root.get("datasets", name, "compute", "native_worker")
    if native is not None:
        warnings.append(str(native.error("`compute.native_worker` is ignored by Plato; remove it")))
    return Config(path, root.value["service"][1].value, name, root.get("datasets", name), warnings)


# Flows


# What each kind of step waits for; behind the bar: with `should_exist: false` or `contains: false`.
STEP_EXPECTS = {
    "navigate": "{url} to open",
    "wait_for_selector": "a visible element {selector}",
    "click": "an element {selector} that can be clicked",
    "fill": "a field {selector} that can be filled",
    "wait": "{duration} ms to pass",
    "wait_for_url": "an address with {url_contains!r}",
    "check_element": "an element {selector}|no element {selector}",
    "element_exists": "an element {selector}",
    "element_visible": "a visible element {selector}",
    "element_text": "{selector} with the text {text!r}|{selector} to be the text {text!r}",
    "element_count": "{count} elements {selector}",
    "page_title": "a page title with {title!r}|a page title equal to {title!r}",
    "verify_text": "a page with the text {text!r}|a page without the text {text!r}",
    "verify_url": "the address to contain {url!r}|the address to be {url!r}",
    "verify_no_errors": "no visible error on the page",
    "screenshot": "a screenshot {filename}",
    "switch_page": "a page with the index {page_index}",
    "execute_script": "the script to end without an error",
}
STEP_FOREVER_MS = 86400000  # where the timeout is 0


class FlowStep:
    """One checked step.

    number: from 1; values: its fields as written; type; kind: what a verify step checks, else the type;
    subjects: the fields that it cannot do without, but what it fills in; expected: what it waits for, as the
    end of "Expected ..."; limit: ms, for each thing that it waits for; patience: ms, for a page to open, and
    for an element that is there to let itself be used; record: what is told of it before it ran.
    """

    def __init__(self, number: int, values: Json, place: str | None) -> None:
        self.number = number
        self.values = given = without_none(values)
        self.type = given["type"]
        self.kind = given["verify_type"] if self.type == "verify" else self.type
        needed = _fields(given, schemas()["flow"]["steps"][0])
        others = ("type!", "value!")
        self.subjects = [given[name[:-1]] for name in needed if name.endswith("!") and name not in others]
        words = STEP_EXPECTS[self.kind].split("|")
        is_denial = False in (given.get("should_exist"), given.get("contains"))
        self.expected = words[-1 if is_denial else 0].format_map(given)

        def count(name: str, default: int = 0) -> int:
            return whole_number(given.get(name, default)) or 0

        self.retries = count("retries")
        self.retry_delay_ms = count("retry_delay_ms", 500)
        self.duration = count("duration")
        self.limit = count("timeout", 60_000 if self.type == "screenshot" else 8000) or STEP_FOREVER_MS
        self.patience = count("timeout", 30_000) or STEP_FOREVER_MS
        self.record: Json = {
            "number": number,
            "type": self.type if number else "open",
            "description": given.get("description", ""),
            "target": " ".join(map(str, self.subjects))[:200],
            "place": place,
            "status": "skipped",
            "seconds": 0.0,
            "attempts": 0,
            "url": None,
            "note": "",
            "expected": None,
            "seen": None,
            "picture": None,
        }


class FlowSet:
    """The flows of a simulator.

    flows: their names, descriptions and steps (a FlowStep each); path: the flows file, None for flows that
    Plato sent; shown: where they are from, in words; warnings: what looks mistaken.
    """

    def __init__(self, flows: list[Json], path: str | None, shown: str, warnings: list[str]):
        self.flows = flows
        self.path = path
        self.shown = shown
        self.warnings = warnings

    def choose(self, names: Words, *, every: bool = False) -> list[Json]:
        """The flows of those names, in that order; UsageError names what was probably meant."""
        known = {flow["name"]: flow for flow in self.flows}
        wanted = list(known) if every else names or ["login"]
        for name in wanted:
            if name not in known:
                raise UsageError(f"{self.shown} has no flow {name!r}; {_meant(name, known)}")
            if not known[name]["steps"]:
                raise UsageError(f"The flow {name!r} has no steps, so there is nothing to run.")
        return [known[name] for name in wanted]


def parse_flows(text: str, source: str, path: str | None) -> FlowSet:
    """The flows in a YAML text, checked; ConfigError lists every problem with its line and column.

    path: None for a text in which nobody can look those up.
    """
    schema = {"flows!": [schemas()["flow"]], "*": None}
    root, warnings = check_yaml(text, source, schema, strict=bool(path))
    flows: list[Json] = []
    for node in root.value["flows"][1].value:
        told, steps = node.plain(), node.get("steps")
        steps = [
            FlowStep(number, step.plain(), f"{source}:{step.line}:{step.column}" if path else None)
            for number, step in enumerate((steps and steps.value) or (), 1)
        ]
        flows.append({"name": told["name"], "description": told.get("description") or "", "steps": steps})
    return FlowSet(flows, path, source, warnings)


def flows_file(config: Config) -> str:
    """The absolute path of a config's flows file, "" if it names none.

    ConfigError unless it lies in the config's directory: its text leaves this machine with a snapshot, so a
    config must not be able to name any file at all.
    """
    name = (config.content.get("metadata") or {}).get("flows_path")
    if not name:
        return ""
    folder = os.path.dirname(os.path.abspath(config.path))
    path = os.path.join(folder, name)
    if not is_below(path, folder):
        raise ConfigError(
            f"{shown_here(config.path)}: `metadata.flows_path` is {name!r};"
            " it must lie in the directory of the config."
        )
    return path


def is_below(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, wherever links lead."""
    return "\0" not in path and os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


# ----------------------------------------------------------------------------------------------------------
# state: .sandbox.yaml and ~/.plato; written whole or not at all; one kernel lock per directory
# ----------------------------------------------------------------------------------------------------------


class StateError(SandboxError):
    """.sandbox.yaml cannot be read or written, or is damaged. The file is left as it is."""

    code = "state_damaged"


# A file that was cut off anywhere lacks its last line, so it is never taken for a whole one.
STATE_FIRST_LINE = "# The sandbox of this directory. Written by plato-sandbox; `stop` removes it.\n"
STATE_LAST_LINE = "# end of the sandbox state\n"


def state_path(directory: str) -> str:
    """The path of a directory's .sandbox.yaml."""
    return os.path.join(directory, STATE_FILE)


def load_state(directory: str) -> Json | None:
    """The state of a directory's sandbox (the keys of the specification), or None without one.

    It is in .sandbox.yaml, or in a slot of `plato sandbox`; then `slot_path` says which file is theirs.

    StateError for a file that cannot be read, was cut off, or holds no sandbox. A state with `starting`
    and without `session_id` is what a `start` leaves that died before Plato answered it.
    """
    path = state_path(directory)
    try:
        # What is no text becomes characters that YAML does not allow.
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return parse_state(file.read(), path)
    except FileNotFoundError:
        return load_slot(directory)
    except OSError as error:
        raise damaged_state(path, reason(error), "") from None


def parse_state(text: str, path: str) -> Json:
    """The state in the text of a .sandbox.yaml, ours or that of `plato` 2.0.x; StateError if damaged."""
    ours, whole = text.startswith(STATE_FIRST_LINE), text.rstrip("\n").endswith(STATE_LAST_LINE.rstrip("\n"))
    if not whole and (ours or not text.endswith("\n")):
        raise damaged_state(path, "its end is missing", text)
    try:
        state = as_dict(yaml_load(text, STATE_FILE))
    except YamlError as error:
        raise damaged_state(path, str(error), text) from None
    wrong = [key for key in _STATE_TEXTS if not isinstance(state.get(key, ""), (str, type(None)))]
    if not state.get("session_id") and not state.get("starting"):
        wrong.insert(0, "session_id")
    elif not re.fullmatch(SERVICE_NAME, str(state.get("ssh_host") or "none")):  # nor an option of ssh
        wrong.append("ssh_host")
    if wrong:
        raise damaged_state(path, f"its {wrong[0]} is missing or cannot be used", text)
    state.pop("slot_path", None)  # nothing is written where such a file says
    return state


_STATE_TEXTS = (
    *("session_id", "job_id", "public_url", "url", "mode", "service", "dataset", "base_url", "created_at"),
    *("plato_config_path", "ssh_host", "ssh_config_path", "ssh_private_key_path", "expires_at", "directory"),
)


def damaged_state(path: str, why: str, text: str) -> StateError:
    """The error for a record that cannot be trusted; its hint says how to stop the VM all the same."""
    found = re.search(r"^ *\"?session_id\"?: ['\"]?([A-Za-z0-9_-]+)['\"]?,?$\n", text, re.MULTILINE)
    session_id = found[1] if found else "ID"
    return StateError(
        f"{shown_path(path)} is damaged or cannot be read: {why}."
        " Nothing was changed; a VM may still be running.",
        hint=f"To stop the VM: plato-sandbox stop --session-id {session_id}. Then remove the file.",
    )


# The fields of a slot that are texts, by their names here. No address and no command is taken from there.
_SLOT_TEXTS = {
    "session_id": "session_id",
    "job_id": "job_id",
    "mode": "mode",
    "dataset": "dataset",
    "artifact_id": "artifact_id",
    "provider": "provider",
    "url": "public_url",
    "public_url": "public_url",
    "service": "simulator_name",
    "plato_config_path": "plato_config_path",
    "ssh_private_key_path": "ssh_key_path",
}


def load_slot(directory: str) -> Json | None:
    """The state of the sandbox that `plato sandbox` 2.121 or newer started in a directory, or None.

    It is the one that PLATO_SANDBOX or .plato/current names, else the only one that was not stopped.
    ConflictError for several. Before 2.121, .plato/state.json was the only slot; since then it is a link.
    """
    place = os.path.join(directory, ".plato")
    paths = matching(f"{place}/sandboxes", r"(?s)[^.].*\.json") or matching(place, r"state\.json")
    pinned = os.environ.get("PLATO_SANDBOX", "")
    name = pinned
    with suppress(OSError):
        name = pinned or text_of_others(os.path.join(place, "current")).strip()
    live: dict[str, Json] = {}
    for path in paths:
        state = read_slot(path, directory)
        if state:
            live[os.path.basename(path).removesuffix(".json")] = state
    if name in live or pinned:
        return live.get(name)
    if len(live) > 1:
        raise ConflictError(
            f"`plato sandbox` has several sandboxes in {shown_path(directory)}: {', '.join(live)}.",
            hint="Choose one: `plato sandbox use NAME`, or set PLATO_SANDBOX=NAME.",
        )
    return next(iter(live.values()), None)


def read_slot(path: str, directory: str) -> Json | None:
    """A slot in the words of .sandbox.yaml; None for what holds no running sandbox; StateError if damaged."""
    import json

    text = ""
    try:
        text = text_of_others(path)
        slot = as_dict(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_state(path, reason(error), text) from None
    if slot.get("stopped_at") or not slot.get("session_id") or not slot.get("job_id"):
        return None  # a `start` of theirs has no more than its name yet
    state: Json = {}
    for name, theirs in _SLOT_TEXTS.items():
        state[name] = slot.get(theirs) or ""
        if not isinstance(state[name], str) or not state[name].isprintable():
            raise damaged_state(path, f"its {theirs} is not a plain text", text)
    for name in ("created_at", "expires_at"):
        with suppress(TypeError, ValueError, OverflowError, OSError):  # no time at all
            state[name] = utc_text(float(slot.get(name)))  # type: ignore[arg-type]
    if state["plato_config_path"]:
        state["plato_config_path"] = os.path.join(directory, state["plato_config_path"])
    key = os.path.realpath(os.path.join(directory, state["ssh_private_key_path"]))
    is_theirs = os.path.dirname(key) == os.path.join(os.path.realpath(directory), ".plato")
    state["ssh_private_key_path"] = key if is_theirs and os.path.isfile(key) else None
    state.update(heartbeat_pid=whole_number(slot.get("heartbeat_pid")), attached=bool(slot.get("attached")))
    state.update(directory=directory, slot_path=path)
    return {name: value for name, value in state.items() if value}


def update_slot(state: Json, **changes: Any) -> None:
    """Change fields of the slot of a state; the others stay, and so does that of another session."""
    import json

    path = state["slot_path"]
    with changing(path):
        slot = json.loads(text_of_others(path))
        if slot.get("session_id") == state["session_id"]:
            write_whole(path, json.dumps({**slot, **changes}, indent=2))


def save_state(directory: str, state: Json) -> None:
    """Write .sandbox.yaml so that a crash leaves the old file or the new one, readable by the owner only."""
    kept = without_none(state)
    with changing(state_path(directory)):
        write_whole(state_path(directory), STATE_FIRST_LINE + yaml_dump(kept) + STATE_LAST_LINE)


def remove_state(directory: str) -> None:
    """Remove .sandbox.yaml; no error when it is not there."""
    with changing(state_path(directory)), suppress(FileNotFoundError):
        os.unlink(state_path(directory))
        _sync_directory(directory)


def changing(path: str) -> AbstractContextManager[None]:
    """StateError when a record cannot be written or removed."""
    hint = "The directory must be writable: the only record of the VM is kept there."
    return explained(f"{shown_path(path)} cannot be changed", hint, StateError)


def remove_matching(directory: str, pattern: str) -> None:
    """Remove the files of a directory whose names fit a regular expression, the last first."""
    for path in reversed(matching(directory, pattern)):
        with suppress(OSError):
            os.unlink(path)


def matching(directory: str, pattern: str) -> list[str]:
    """The paths of what is in a directory, if one can be read, by names that fit a regular expression."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listdir(directory))
    return [os.path.join(directory, name) for name in names if re.fullmatch(pattern, name)]


def make_home(home: str) -> None:
    """Create PLATO_HOME (0700) if needed and check that files can be written there.

    `~/.plato` becomes 0700 whoever made it; another directory that is there already keeps its mode, but must
    not be one in which everyone can make files.
    """
    import stat
    import tempfile

    failure = f"{shown_path(home)} cannot be used for SSH files and heartbeat records"
    hint = "Make it a directory that only you can write to, or set PLATO_HOME to another one."
    with explained(failure, hint):
        os.makedirs(home, mode=0o700, exist_ok=True)
        if home == os.path.expanduser("~/.plato") and os.stat(home).st_uid == os.getuid():
            os.chmod(home, 0o700)
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
        if os.stat(home).st_mode & stat.S_IWOTH:
            raise PermissionError("everyone can write to it, so an SSH config in it could be anyone's")
        with tempfile.TemporaryFile(dir=home) as probe:  # the disk may have no room for all that comes
            probe.write(bytes(131072))
            probe.flush()


@contextmanager
def locked(directory: str, **how: bool) -> Iterator[None]:
    """The kernel's lock on a directory itself: it leaves no file behind and ends with its process.

    ConflictError, naming the holder, when another command has it. shared: not against others that only look;
    wait: until it is free.
    """
    with explained(f"{shown_path(directory)} cannot be opened"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not take_lock(handle, **how):
            raise ConflictError(
                f"Another command is at work in {shown_path(directory)}: {lock_holder(os.fstat(handle))}.",
                hint="Wait for it to end, or press Ctrl-C in its terminal; then run this again.",
            )
        yield
    finally:
        os.close(handle)


def lock_holder(status: os.stat_result) -> str:
    """Who holds the lock on a file, in words: "start (PID 123)" where the system tells (Linux)."""
    with suppress(OSError), open("/proc/locks", encoding="ascii") as file:
        lock = re.search(rf"^\d+: FLOCK .* (\d+) \S+:{status.st_ino} ", file.read(), re.MULTILINE)
        if lock:
            name = re.search(r"(?:\.pyw?|plato[_-]sandbox) (?:-\S+ )*([a-z][a-z-]+)", command_of(lock[1]))
            return f"{f'`{name[1]}`' if name else 'a program'} (PID {lock[1]})"
    return "a plato-sandbox command"


# ----------------------------------------------------------------------------------------------------------
# vm: its SSH key, config and known hosts; scripts run on it, over SSH or through the API
# ----------------------------------------------------------------------------------------------------------


# What OpenSSH itself offers, but AES-GCM first: nearly every processor has it built in, so a large tree costs
# both ends less.
SSH_CIPHERS = (
    "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,"
    "aes128-ctr,aes192-ctr,aes256-ctr"
)
KEY_SECONDS = 10.0
SSH_FIRST_SECONDS = 30.0  # until a VM that was just connected answers
SSH_PATIENCE_SECONDS = (2, 4, 8, 16)  # of each attempt in them
SOCKET_HOME_BYTES = 60  # some systems allow 104 for the path of a socket; ssh adds 17 while it makes one
SSH_ANSWER_SECONDS = 20.0
EXEC_SECONDS = 3600.0
VM_SECONDS = 120.0  # the longest wait for a script on the VM to end
# Of input, in a command as base64: Linux takes no longer argument than 131,071 bytes, and the API's `execute`
# hands a command on as one.
PART_BYTES = 97_500


def ssh_fields(home: str, session_id: str) -> Json:
    """The fields of a state for SSH: what the host is called, and its files. `~/.ssh` is never touched."""
    name = short_id(session_id)
    path = os.path.join(home, f"ssh_{name}")
    return {
        "ssh_host": f"sandbox-{name}",
        "ssh_config_path": f"{path}.conf",
        "ssh_private_key_path": f"{path}_key",
    }


def files_of(session_id: str) -> str:
    """The names of what belongs to a sandbox under PLATO_HOME, as a regular expression."""
    return rf"(ssh|known_hosts|heartbeat)_{short_id(session_id)}([._].*)?"


def remove_files_of(home: str, session_id: str) -> None:
    """Remove what belongs to a sandbox under PLATO_HOME, also what ssh or a killed command left half made.

    Its key goes before its SSH config (see `repair_ssh_config`); with the last one, the copies that SSH ran.
    """
    remove_matching(home, files_of(session_id))
    if not matching(home, "ssh_.*"):
        remove_matching(home, "child_.*")


def make_key(path: str, reporter: Reporter) -> str:
    """Make the key pair of a sandbox; returns the public key."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", PROGRAM, "-f", path]
    outcome = run_program(command, reporter, seconds=KEY_SECONDS)
    if outcome.code:
        raise SandboxError(f"ssh-keygen could not make a key: {last_words(outcome.stderr)}.")
    return text_of_others(f"{path}.pub").strip()


# What its ProxyCommand has to say, ssh keeps to itself where the connection is kept for later ones. So that
# goes to what ssh, the parent, has as its standard error, or to the terminal.
_PROXY = """
for p in "/proc/$PPID/fd/2" /dev/tty; do (: >> "$p") 2> /dev/null && exec 2>> "$p" && break; done
[ -x "$0" ] && [ -r "$4" ] && exec "$0" "$@"
echo "Error: $0 or $4 is gone, which leads to the VM." >&2
echo "In the directory of the sandbox: plato-sandbox status" >&2
exit 255""".strip().replace("\n", "; ")


def proxy_command(settings: Settings, state: Json) -> str:
    """The ProxyCommand that makes this file the way to the VM."""
    way = settings.gateway_host, str(settings.gateway_port), f"{state['job_id']}--22"
    log = heartbeat_path(settings.home, state["session_id"])
    program, ca_file = copy_path(settings.home), filter(None, [settings.ca_file])
    words = own_command(program, "gateway-stream", *way, log, *ca_file)
    return shell_words(["sh", "-c", _PROXY, *words]).replace("%", "%%")


SSH_CONFIG = """\
# SSH to one sandbox. Written by plato-sandbox; `stop` removes it.
Host {host}
    HostName {host}
    HostKeyAlias {host}
    User {user}
    IdentityFile "{key}"
    IdentitiesOnly yes
    PreferredAuthentications publickey
    UserKnownHostsFile "{home}/known_hosts_{name}"
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking accept-new
    UpdateHostKeys no
    LogLevel ERROR
    ConnectTimeout 30
    ServerAliveInterval 15
    ServerAliveCountMax 4
    Ciphers {ciphers}
    ControlMaster auto
    ControlPath {socket}
    ControlPersist 300
    ProxyCommand {way}
"""


def short_place() -> str:
    """A directory of this user's alone with a short path; "" where there can be none."""
    place = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/plato-sandbox-{os.getuid()}"  # noqa: S108
    with suppress(OSError):
        os.makedirs(place, 0o700, exist_ok=True)
        found = os.lstat(place)
        if (found.st_mode, found.st_uid) == (0o40700, os.getuid()):
            return place
    return ""


def ssh_config_text(settings: Settings, state: Json) -> str:
    """The config for `ssh -F`: one host, its own key and known hosts, and this file as the way there.

    Later connections use the first, which is kept for a while. SandboxError where a path cannot stand in it.
    """
    name = short_id(state["session_id"])
    home = settings.home.replace("%", "%%")
    place = home if len(os.fsencode(home)) <= SOCKET_HOME_BYTES else short_place()
    fields = {
        "host": state["ssh_host"],
        "name": name,
        "user": ssh_user(state),
        "key": state["ssh_private_key_path"].replace("%", "%%"),
        "home": home,
        "ciphers": SSH_CIPHERS,
        "socket": f'"{place}/ssh_{name}.sock"' if place else "none",
        "way": proxy_command(settings, state),
    }
    # After a line break, an option could follow.
    odd = re.search(r"[\n\r\0\ud800-\udfff]", "".join(fields.values()))
    odd = odd or re.search(r'["\\]|\$\{', fields["key"] + home)
    if odd:
        raise SandboxError(
            f"An SSH config cannot carry {odd[0]!r}, which is in PLATO_HOME, Python's path or the job id.",
            hint=f"Move them to a path without it; PLATO_HOME is {shown_path(settings.home)}.",
        )
    return SSH_CONFIG.format(**fields)


def ssh_user(state: Json) -> str:
    return "plato" if state.get("provider") == "qemu" else "root"


def write_ssh_config(settings: Settings, state: Json, written: str = "") -> None:
    """Write the SSH config and what it runs; of one that is `written`, only how it goes to the gateway."""
    path, text = state["ssh_config_path"], ssh_config_text(settings, state)
    keep_copy(settings.home)
    way = text.splitlines()[-1]
    if way not in written:
        write_file(path, re.sub(" *ProxyCommand .*gateway-stream.*", lambda _: way, written or text))


def repair_ssh_config(state: Json, settings: Settings) -> None:
    """Have the way to the gateway in an SSH config of ours right: what it runs may be gone, or the gateway
    have moved. For another client's sandbox, the config is written here."""
    files = ssh_fields(settings.home, state.get("session_id") or "")
    ours, key = files["ssh_config_path"], files["ssh_private_key_path"]
    if not state.get("job_id") or state.get("ssh_config_path") != ours:
        return
    if "slot_path" in state:
        make_home(settings.home)
        write_ssh_config(settings, state)
    else:
        with suppress(OSError, SandboxError):
            write_ssh_config(settings, state, text_of_others(ours))
            if not os.path.exists(key):  # a `stop` came between, which removes the key first
                remove_files_of(settings.home, state["session_id"])


def ssh_command(state: Json) -> str | None:
    """The command that opens a shell on the VM. ssh runs its ProxyCommand by $SHELL, which is to be one."""
    config, host = state.get("ssh_config_path"), state.get("ssh_host")
    if not config or not host:
        return None
    has_none = os.environ.get("SHELL", "").endswith(("/nologin", "/false"))
    return "env SHELL=/bin/sh " * has_none + shell_words(["ssh", "-F", os.path.expanduser(config), host])


def ssh_words(sandbox: Sandbox, *options: str) -> list[str]:
    """The command that logs in to the VM; SandboxError for a config that lies where no client writes them.

    Such a file can name commands to run here, and the record may have come with somebody's repository.
    """
    state, home = sandbox.state, sandbox.settings.home
    path = os.path.normpath(os.path.expanduser(state["ssh_config_path"]))
    if os.path.dirname(path) != home:
        raise SandboxError(
            f".sandbox.yaml names {shown_path(path)} as its SSH config, which is not in"
            f" {shown_path(home)}, so it was not used.",
            hint="Set PLATO_HOME to where it is if it is yours; start the sandbox anew if not.",
        )
    return ["ssh", "-T", "-F", path, "-o", "BatchMode=yes", *options, state["ssh_host"]]


def wait_for_ssh(sandbox: Sandbox) -> None:
    """Log in to the VM, again and again for SSH_FIRST_SECONDS; NetworkError says why it does not answer.

    The gateway may not know a VM that was just connected: for seconds, a connection opens and stays silent
    for ever. So the first attempts are short.
    """
    for patience in SSH_PATIENCE_SECONDS:
        command = ssh_words(sandbox, "-S", "none", "-o", f"ConnectTimeout={patience}")
        outcome = run_program([*command, "exit"], sandbox.reporter, seconds=SSH_FIRST_SECONDS + 10.0)
        if not outcome.code:
            return
        time.sleep(1.0)
    raise ssh_broken(outcome.stderr)


class SshError(NetworkError):
    """SSH does not answer; whether the VM is still there is another question."""


class OvertakenError(ConflictError):
    """What was planned for is not there any more; looking again helps."""


class Vm:
    """Runs scripts on the VM of a sandbox: over SSH, or through the API where that does not answer.

    A script is POSIX sh. Its standard input is what `feed` writes to a file; how it fails is the last that it
    says on standard error, and its exit code: 73 for a conflict, 75 when looking again may help.
    via: "ssh" or "api". One connection to the VM serves all scripts: ssh itself keeps it, where it can.
    """

    def __init__(self, sandbox: Sandbox, via: str = "auto") -> None:
        has_ssh = bool(sandbox.state.get("ssh_config_path") and sandbox.state.get("ssh_host"))
        if via == "ssh" and not has_ssh:
            hint = "Go through the API: `sync --via api`, `start-services --via sync`"
            raise SandboxError("This sandbox has no SSH.", hint=hint)
        self.sandbox = sandbox
        self.via = "ssh" if has_ssh and via != "api" else "api"
        self._ssh_only = via == "ssh"
        self._opening: Aside | None = None
        if self.via == "ssh":
            repair_ssh_config(sandbox.state, sandbox.settings)
            self._opening = Aside(lambda: self._by_ssh(":", None, SSH_ANSWER_SECONDS))

    def run(self, script: str, feed: Feed = None, seconds: float = VM_SECONDS) -> bytes:
        """What a script prints; SandboxError with its last words when it fails."""
        return check_script(self.outcome(script, feed, seconds))

    def published_ports(self) -> list[str]:
        """The ports of the VM that running containers publish."""
        words = self.run("docker ps --format '{{.Ports}}' 2>/dev/null; exit 0").decode("utf-8", "replace")
        return sorted(set(re.findall(r":(\d+)->", words)), key=int)

    def outcome(self, script: str, feed: Feed = None, seconds: float = VM_SECONDS) -> Outcome:
        """How a script ended. A connection that breaks is opened once more, or left for the API."""
        if self.answers():
            try:
                return self._by_ssh(script, feed, seconds)
            except OvertakenError:
                raise  # what was to be sent has changed
            except SandboxError as error:
                if self._ssh_only and isinstance(error, NetworkError):
                    self.sandbox.reporter.note(f"{error.message} Connecting again.")
                    return self._by_ssh(script, feed, seconds)
                self._leave_ssh(error)
        return self._by_api(script, feed, seconds)

    def answers(self) -> bool:
        """Whether SSH answers; with `via="ssh"`, a SandboxError where it does not."""
        if self.via == "ssh":
            try:
                self._wait_for_answer()
                return True
            except SandboxError as error:
                self._leave_ssh(error)
        return False

    def _leave_ssh(self, error: SandboxError) -> None:
        if self._ssh_only:
            raise error
        self.sandbox.reporter.note(f"{error.message} Going on through the API.")
        self.via = "api"

    def _wait_for_answer(self) -> None:
        """Wait for SSH's first answer; where it is silent, the VM is connected to the network again, once."""
        sandbox, opening, self._opening = self.sandbox, self._opening, None
        try:
            if opening:
                opening.result()
        except SandboxError as silence:
            sandbox.reporter.note("SSH does not answer; connecting the VM to the network again.")
            try:
                sandbox.connect_network()
                wait_for_ssh(sandbox)
            except SandboxError:
                raise silence from None

    def _by_ssh(self, script: str, feed: Feed, seconds: float) -> Outcome:
        """The script goes ahead of its input, so that it stands in no argument list, and is run as a whole or
        not at all. What a login shell prints goes before a word that nothing else holds."""
        import secrets

        word, body = secrets.token_hex(16), f"{{\n{script}\n}}".encode()
        there = f'printf %s {word}; c=$(head -c {len(body)}); eval "$c"'
        command = [*ssh_words(self.sandbox), shell_words(["exec", "sh", "-c", there])]

        def fed(stdin: Any) -> None:
            stdin.write(body)
            if feed:
                feed(stdin)

        outcome = run_program(command, self.sandbox.reporter, seconds=seconds, feed=fed)
        _, begun, stdout = outcome.stdout.partition(word.encode())
        if outcome.code not in range(255) or not begun:
            raise ssh_broken(outcome.stderr)
        return Outcome(outcome.code, stdout, outcome.stderr)

    def _by_api(self, script: str, feed: Feed, seconds: float) -> Outcome:
        """Large input goes ahead in files, each as base64 in a command; small input is in the command."""
        import secrets
        import tempfile

        with tempfile.TemporaryFile() as content:
            if feed:
                feed(content)
            size = content.seek(0, os.SEEK_END)
            place = f"/var/tmp/plato-sandbox-{secrets.token_hex(12)}"  # noqa: S108  (nobody else can know it)
            if len(script.encode()) + size <= PART_BYTES:
                data = f"printf %s '{_encoded(content, 0)}' | base64 -d"
            else:
                self._send_parts(content, size, place)
                data = f"cat {place}/*"
        command = f"{data} | {{\n{script}\n}}\ncode=$?; rm -rf {place}*; exit $code"
        return execute(self.sandbox.api, self.sandbox.state, command, seconds)

    def _send_parts(self, content: Any, size: int, place: str) -> None:
        """Bring a file to a directory on the VM in numbered parts, several at once."""
        offsets = iter(range(0, max(size, 1), PART_BYTES))

        def send() -> None:
            api = PlatoApi(self.sandbox.settings, self.sandbox.reporter)  # with a connection of its own
            for offset in offsets:
                command = assigned(place=place, part=f"{offset:012d}", data=_encoded(content, offset))
                check_script(execute(api, self.sandbox.state, command + TAKE_PART, VM_SECONDS))
            api.hang_up()

        senders = [Aside(send) for _ in range(min(16, 1 + size // PART_BYTES))]
        try:
            for sender in senders:
                sender.result()
        except SandboxError:
            list(offsets)  # nobody begins another part
            raise


# What others left who were broken off goes first.
TAKE_PART = """
[ $part -gt 0 ] || find /var/tmp -maxdepth 1 -name 'plato-sandbox-*' -mmin +60 -exec rm -rf {} + 2>/dev/null
umask 077
[ ! -e $place.failed ] || exit 0 # another part says why
mkdir -p $place && printf %s $data | base64 -d > $place.$$ && mv -f $place.$$ $place/$part && exit
[ ! -e $place.failed ] || exit 0
: > $place.failed
rm -rf $place $place.[0-9]*
echo 'The VM could not take the files.' >&2
exit 1
"""


def _encoded(content: Any, offset: int) -> str:
    """A part of a file in base64."""
    import base64

    return base64.b64encode(os.pread(content.fileno(), PART_BYTES, offset)).decode()


def execute(api: PlatoApi, state: Json, command: str, seconds: float) -> Outcome:
    """What a command did that the API ran, perhaps twice. Raises when it did not run to its end."""
    answer = api.execute(state["session_id"], command, seconds)
    result = job_of(answer, state.get("job_id"))
    code = result.get("exit_code", 0 if result.get("success") else 1)
    stdout, stderr = (str(result.get(name) or "").encode("utf-8", "replace") for name in ("stdout", "stderr"))
    if result.get("timed_out"):
        raise TimedOutError(
            f"A command on the VM did not end within {seconds:g} s.",
            hint="Run the command again with a larger --timeout.",
        )
    if not result or not isinstance(code, int) or code < 0:
        raise ApiError(
            f"Plato could not run a command on the VM: {last_words(stderr) or 'no result came back'}.",
            hint="See what it is doing: plato-sandbox status",
        )
    return Outcome(code, stdout, stderr)


def check_script(outcome: Outcome) -> bytes:
    """What a script printed; SandboxError with its last words when it failed (see `Vm`)."""
    if not outcome.code:
        return bytes(outcome.stdout)
    kind = {73: ConflictError, 75: OvertakenError}.get(outcome.code, SandboxError)
    raise kind(last_words(outcome.stderr) or f"A command on the VM ended with {outcome.code}.")


def ssh_broken(stderr: bytes) -> SshError:
    """The error for an ssh that ended by itself, from what it printed."""
    text = stderr.decode("utf-8", "replace").strip()
    told = re.search(r"^Error: (.*)\n?(.*)", text, re.MULTILINE)  # by the gateway stream, which knows more
    words, hint = told.groups() if told else (text.rpartition("\n")[2], "")
    hint = hint or "Run the command again; see what the VM is doing: plato-sandbox status"
    return SshError(f"SSH to the VM does not work: {words.rstrip('.') or 'no reason was given'}.", hint=hint)


def last_words(stderr: bytes) -> str:
    """The end of what a command complained of, in one line."""
    lines = re.sub(r"\s*[\r\n]\s*", "; ", stderr.decode("utf-8", "replace").strip())
    return lines[-600:]


def assigned(**values: object) -> str:
    """Shell assignments; the one place where values become part of a script."""
    return "".join(f"{name}={shell_words([str(value)])}\n" for name, value in values.items())


# ----------------------------------------------------------------------------------------------------------
# sync: ignore rules, the local tree, the plan, the archive, what runs on the VM, the watch
# ----------------------------------------------------------------------------------------------------------
# One look at the VM brings what is there and the manifest of the last sync. The plan is a pure function of
# that and of the local tree; what differs travels in one archive. On the VM the archive is unpacked beside
# the tree before anything in the tree is touched; then it is moved in by links and renames, under a lock and
# only if no other sync came between.
# Paths inside the trees are bytes, relative, without a leading "./"; no path of a tree is ever part of a
# command: they travel as NUL-terminated fields inside the archive.
# A stamp is what `find` on the VM says of an entry: `d MODE`, `f MODE SIZE MTIME`, `l TARGET` or one letter.
# What is alike on both sides has equal stamps.

SYNC_ROOT = "/home/plato/worktree"
SYNC_SECONDS = 120.0
PATIENCE_SHARE = 0.5  # of a command's seconds the VM waits for another sync: it must be able to say so
SYNC_TRIES = 4  # a plan that another sync overtakes, or a file that changes while it is read
SYNC_STATE = ".plato-sync"  # beside the target: lock, manifests, and what is on its way in
CHUNK_BYTES = 1_000_000  # of an archive; with each, the speed of the connection is looked at anew
FAST_BYTES = 25_000_000  # a second; compression could not keep up with more
SHOWN_WARNINGS = 10
EMPTIED_FILES = 10  # fewer removals than this are never taken for an emptied tree
WATCH_QUIET_SECONDS = 0.3
WATCH_RETRY_SECONDS = 3.0

EXCLUDED_DIRECTORIES = b"__pycache__ .git .venv venv node_modules .pytest_cache .mypy_cache".split()
EXCLUDED_PATTERNS = EXCLUDED_DIRECTORIES + b"*.pyc .sandbox.yaml *.egg-info .DS_Store *.swp *.swo".split()
EXCLUDED_NAMES = b", ".join(EXCLUDED_PATTERNS).decode().replace(" *.pyc", "\n*.pyc")  # in two lines
NEVER_SENT = re.compile(rb"\.git|\.sandbox\.yaml.*|\.plato|\.plato-sync(?:\.new)?", re.DOTALL)
PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
REFUSED_TARGETS = (
    "/ /home /home/plato /root /bin /boot /dev /etc /lib /lib64 /proc /run /sbin /sys /tmp /usr /var"
    " " + SYNC_ROOT
)


Stamps = dict[bytes, bytes]  # by path; of a manifest, only the first letters


# Ignore rules: git's syntax and semantics (gitignore(5), and git's wildmatch where that is silent)

_GLOB = re.compile(
    rb"(?P<above>(?:^|(?<=/))\*\*+/)|(?P<below>(?:^|(?<=/))\*\*+(?=$|\\/))|(?P<star>\*+)|(?P<one>\?)"
    rb"|\[(?P<set>[!^]?\]?(?:\[:\w*:\]|\\.|[^\]\\])*)\]|\\(?P<plain>.)|(?P<other>[^\[\\])",
    re.DOTALL,
)
_STAR = b"\n"  # in an expression that is not finished: no pattern holds a line break
_GLOB_PARTS = {"above": rb"(?:[^\0]*/)?", "below": rb"[^\0]*", "star": _STAR, "one": rb"[^\x2f\0]"}
_GLOB_CLASSES = {
    b"alnum": rb"0-9A-Za-z",
    b"alpha": rb"A-Za-z",
    b"blank": rb" \t",
    b"cntrl": rb"\x01-\x1f\x7f",
    b"digit": rb"0-9",
    b"graph": rb"!-~",
    b"lower": rb"a-z",
    b"print": rb" -~",
    b"punct": rb"!-/:-@\[-`{-~",
    b"space": rb" \t\n\r",
    b"upper": rb"A-Z",
    b"xdigit": rb"0-9A-Fa-f",
}


def _glob_part(found: re.Match[bytes]) -> bytes:
    """A part of a pattern as a regular expression."""
    kind = found.lastgroup or ""
    if kind != "set":
        return _GLOB_PARTS.get(kind) or re.escape(found[kind])
    negated = found["set"][:1] in (b"!", b"^")
    inside = re.sub(
        rb"(?s)\[:(\w*):\]|\\?([^-]|(?<=\\)-)",
        lambda member: re.escape(member[2] or b"") or _GLOB_CLASSES.get(member[1], b"z-a"),  # no expression
        found["set"][negated:],
    )
    return rb"(?![\x2f\0])[" + b"^" * negated + inside + b"]"


def ignore_expression(pattern: bytes, name: bytes) -> bytes:
    """A pattern as a regular expression; `name` begins the names of its groups.

    git compares the text before the first wildcard of a path by itself; what follows starts a pattern anew.
    A star takes the first place where what stands before the next star fits, once and for all: the next star
    makes up for the rest. So the time stays in proportion, however many stars there are.
    """
    plain = re.split(rb"[*?\[\\]", pattern, maxsplit=1)[0] if b"/" in pattern else b""
    text = re.escape(plain) + _GLOB.sub(_glob_part, pattern[len(plain) :])

    def settled(found: re.Match[bytes]) -> bytes:
        group = name + b"%d" % found.start()
        return rb"(?=(?P<%s>[^/\0]*?%s))(?P=%s)" % (group, found[1], group)

    return re.sub(rb"\n([^\n/]*)(?=\n)", settled, text).replace(_STAR, rb"[^/\0]*")


class IgnoreFile:
    """The patterns of one ignore file. The last one that matches decides.

    odd_patterns: those that are none, which match nothing, as in git. taken_back: what `!PATH` names.
    """

    def __init__(self, text: bytes) -> None:
        self.odd_patterns: list[bytes] = []
        self.taken_back: list[bytes] = []
        alternatives: list[bytes] = []
        for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            pattern = re.sub(rb"(?<!\\)((?:\\\\)*) +$", rb"\1", re.sub(rb"\r$|\0.*", b"", line))
            negated = pattern.startswith(b"!")
            wanted = pattern[negated:].removesuffix(b"/")
            if not wanted or pattern.startswith(b"#"):
                continue
            if negated:
                self.taken_back.append(wanted.removeprefix(b"/"))
            name = b"%s%d" % (b"kept" if negated else b"ignored", len(alternatives))
            expression = ignore_expression(wanted.removeprefix(b"/"), name + b"_")
            # What they match is the `/` of a directory, the name, NUL, and the path.
            form = rb"(?P<%s>/%s[^\0]*\0%s)" if b"/" in wanted else rb"(?P<%s>/%s%s\0.*)"
            try:
                re.compile(expression)
                alternatives.append(form % (name, b"" if pattern.endswith(b"/") else b"?", expression))
            except re.error:
                self.odd_patterns.append(pattern)
        self._match = re.compile(b"|".join(reversed(alternatives)) or b"(?!)", re.DOTALL).fullmatch

    def verdict(self, path: bytes, is_directory: bool) -> bool | None:
        """Whether a path, relative to the file's directory, is ignored; None when no pattern matches."""
        found = self._match(b"/" * is_directory + path.rpartition(b"/")[2] + b"\0" + path)
        return None if not found else (found.lastgroup or "").startswith("ignored")


# The local tree


class LocalTree:
    """What there is to sync: stamps by path; what is left out, and why.

    also: what .gitignore files do not hide. odd_patterns: those in ignore files that git does not know
    either.
    """

    def __init__(self, root: bytes, *, gitignore: bool = False, also: Sequence[bytes] = ()) -> None:
        self.root = root
        self.stamps: Stamps = {}
        self.skipped: dict[bytes, str] = {}
        self.odd_patterns: list[bytes] = []
        self.taken_back: set[bytes] = set()  # by its own path
        names = [b".gitignore"] * gitignore + [b".platoignore"]
        # The ignore files of each directory that has some, the most important one first.
        self._rules = {b"": [IgnoreFile(b"\n".join(EXCLUDED_PATTERNS))]}
        waiting = [b""]
        while waiting:
            waiting += self._scan(waiting.pop(), names)
        if gitignore and also:
            for path, stamp in LocalTree(root).stamps.items():
                if any(name in lineage(path) or path in lineage(name) for name in also):
                    self.stamps[path] = stamp

    def _scan(self, directory: bytes, names: Sequence[bytes]) -> list[bytes]:
        """Take up what a directory holds; the directories in it to go into. names: of ignore files."""
        below = []
        prefix = directory + b"/" if directory else b""
        with reading(self.location(directory)):
            entries = {entry.name: entry for entry in os.scandir(self.location(directory))}
            for name in names:
                if name in entries and entries[name].is_file():
                    with open(entries[name].path, "rb") as file:
                        rules = IgnoreFile(file.read())
                    self._rules.setdefault(directory, []).insert(0, rules)
                    self.odd_patterns += [prefix + name + b": " + odd for odd in rules.odd_patterns]
                    if name == b".platoignore":
                        self.taken_back.update(prefix + path for path in rules.taken_back)
            for name, entry in entries.items():
                path = prefix + name
                is_directory = entry.is_dir(follow_symlinks=False)
                if self.ignores(path, is_directory):
                    continue
                stamp = local_stamp(entry.path)
                if stamp == b"?":
                    self.skipped[path] = "not a file, a directory or a symbolic link"
                elif stamp[:1] == b"l" and link_leaves(path, stamp[2:]):
                    self.skipped[path] = "a symbolic link that leads out of the tree"
                elif stamp:
                    self.stamps[path] = stamp
                    below += [path] * is_directory
        return below

    def location(self, path: bytes) -> bytes:
        return os.path.join(self.root, path)

    def ignores(self, path: bytes, is_directory: bool) -> bool:
        """Whether a path stays out, given that the directories above it do not."""
        directory, _, name = path.rpartition(b"/")
        if NEVER_SENT.fullmatch(name):
            return True
        for above in (*lineage(directory), b""):
            for rules in self._rules.get(above, ()):
                verdict = rules.verdict(path[len(above) :].lstrip(b"/"), is_directory)
                if verdict is not None:
                    return verdict
        return False

    def keeps_away(self, path: bytes, is_directory: bool) -> bool:
        """Whether what is not in this tree is none of its business on the VM."""
        return any(
            one in self.skipped or self.ignores(one, one != path or is_directory) for one in lineage(path)
        )

    def leave_out_private_keys(self, remote: Stamps) -> None:
        """What differs there and turns out to be one is not sent. SandboxError for what cannot be read."""
        for path, stamp in list(self.stamps.items()):
            if stamp[:1] == b"f" and remote.get(path) != stamp and path not in self.taken_back:
                with reading(self.location(path)), open(self.location(path), "rb", buffering=0) as file:
                    if PRIVATE_KEY.match(file.read(100)):
                        self.skipped[path] = f"a private key (!{shown_name(path)} in .platoignore sends it)"
                        del self.stamps[path]


@contextmanager
def reading(location: bytes) -> Iterator[None]:
    """Something here is read; SandboxError for what cannot be, nothing for what is gone meanwhile."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise SandboxError(
            f"{shown_path(os.fsdecode(error.filename or location))} cannot be read: {reason(error)}."
            " Nothing was changed.",
            hint="Make it readable, or list it in .platoignore.",
        ) from None


def local_stamp(location: bytes) -> bytes:
    """What `find` on the VM would say of what is here; "?" for what is not synced, "" for what is gone."""
    import stat

    try:
        status = os.lstat(location)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISREG(status.st_mode):
            return b"f %o %d %d.%09d0" % (mode, status.st_size, *divmod(status.st_mtime_ns, 1_000_000_000))
        if stat.S_ISDIR(status.st_mode):
            return b"d %o" % mode
        return b"l " + os.readlink(location) if stat.S_ISLNK(status.st_mode) else b"?"
    except (FileNotFoundError, NotADirectoryError):
        return b""


def link_leaves(path: bytes, target: bytes) -> bool:
    """Whether a symbolic link leads out of the tree that it stands in."""
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return inside.split(b"/")[0] in (b"", b"..")


def lineage(path: bytes) -> Iterator[bytes]:
    """A path and every directory above it, up to the root's child."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


# The plan: pure, from the two trees to what must be done


class SyncPlan:
    """What one sync does; SandboxError where it could do harm. Lists of paths, sorted; `remove` from the
    deepest up.

    send: entries that travel; files: those of them that are no directories; archived: `send` and the
    directories around all that changes; manifest: what is vouched for from now on, kinds by path.
    """

    def __init__(self, tree: LocalTree, remote: Stamps, manifest: Stamps, force: bool) -> None:
        local = tree.stamps
        self.send = sorted(path for path, stamp in local.items() if remote.get(path) != stamp)
        self.files = [path for path in self.send if local[path][:1] != b"d"]
        self.manifest = {path: stamp[:1] for path, stamp in local.items()}
        going = set()
        for path in (manifest.keys() & remote.keys()) - local.keys():
            kind = manifest[path]
            if tree.keeps_away(path, kind == b"d"):
                self.manifest[path] = kind
            elif remote[path][:1] == kind:
                going.add(path)
        lost, files = (sum(manifest[path] != b"d" for path in paths) for paths in (going, manifest))
        if lost >= EMPTIED_FILES and lost * 2 > files and not force:
            raise SandboxError(
                f"This would remove {lost} of the {files} files that were synced before."
                " Nothing was changed.",
                hint="If they are meant to go, run it again with --force. See which: --dry-run --force",
            )
        replaced = {path for path in self.send if path in remote and remote[path][:1] != local[path][:1]}
        going |= replaced
        staying = remote.keys() - local.keys() - going if going else set()
        blocked = sorted(path for path in staying if not replaced.isdisjoint(lineage(path)))
        if blocked:
            raise ConflictError(
                "Nothing was changed: a file must replace a directory on the VM that holds what no sync put"
                f" there, {listed_paths(blocked)}.",
                hint="Move it away on the VM, then run this again.",
            )
        going -= {above for path in staying for above in lineage(path)}
        self.remove = sorted(going, reverse=True)
        changing = {above for path in (*self.send, *going) for above in lineage(path)}
        self.archived = sorted(changing.intersection(local))


def listed_paths(paths: Sequence[bytes]) -> str:
    """The first paths of a list in words."""
    shown = ", ".join(map(shown_name, paths[:3]))
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown


def shown_name(path: bytes) -> str:
    return printable(os.fsdecode(path))


def size_text(count: int) -> str:
    """A number of bytes for people: 0.5 kB, 20.0 MB."""
    return f"{count / 1e3:,.1f} kB" if count < 999_950 else f"{count / 1e6:,.1f} MB"


def parse_look(answer: bytes, local: Stamps) -> tuple[str, Stamps, Stamps]:
    """What `_LOOK` prints: the name of the last sync, the kinds of what it left there, and stamps, by path.

    The stamp of a directory that was not entered is "x". What is alike in local stamps is the same object, as
    trees can be large.
    """
    import binascii
    import zlib

    try:
        same = {part: part for pair in local.items() for part in pair}.get
        listed = zlib.decompress(binascii.a2b_base64(answer), wbits=31)  # of gzip
        known, _, listed = listed.partition(b"\0\0")
        found = [same(field, field) for field in listed.split(b"\0")]
        generation, *fields = known.split(b"\0")
        manifest = {same(field[1:], field[1:]): field[:1] for field in fields}
        return generation.decode("ascii"), manifest, dict(zip(found[1::2], found[::2]))
    except (ValueError, zlib.error):
        raise ApiError(
            "What the VM told about its files cannot be understood; nothing was changed."
        ) from None


# The archive


def chunks_of(pieces: Iterable[bytes]) -> Iterator[bytearray]:
    """The same bytes in chunks of CHUNK_BYTES or a little more."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = bytearray()
    yield chunk


def tar_pieces(tree: LocalTree, plan: SyncPlan) -> Iterator[bytes]:
    """A tar file of what changes, piece by piece.

    `tree/` holds the entries, and `meta/` lists for the VM, the manifest last: when it has come, all has.
    """
    for path in plan.archived:
        kind, rest = tree.stamps[path].split(b" ", 1)
        name = b"tree/" + path
        if kind == b"d":
            yield tar_entry(b"5", rest, 0, name)
        elif kind == b"l":
            yield tar_entry(b"2", b"777", 0, name, rest)
        else:
            mode, digits, moment = rest.split(b" ")
            size = int(digits)
            with reading(tree.location(path)), open(tree.location(path), "rb") as file:
                yield tar_entry(b"0", mode, size, name, mtime=moment.decode())
                for start in range(0, size, CHUNK_BYTES):  # as long as it said, whatever becomes of the file
                    length = min(CHUNK_BYTES, size - start)
                    yield file.read(length).ljust(length, b"\0")
                yield bytes(-size % 512)
    manifest = [kind + path for path, kind in sorted(plan.manifest.items())]
    for name, paths in ((b"meta/remove", plan.remove), (b"meta/manifest", manifest)):
        data = b"\0".join([*paths, b""])
        yield tar_entry(b"0", b"644", len(data), name) + data + bytes(-len(data) % 512)
    yield bytes(1024)


def tar_entry(kind: bytes, mode: bytes, size: int, path: bytes, link: bytes = b"", **more: str) -> bytes:
    """The header of an entry: owner 0; more: records of POSIX's extended form."""
    import tarfile

    entry = tarfile.TarInfo(os.fsdecode(path))
    entry.type, entry.mode, entry.size = kind, int(mode, 8), size
    entry.linkname, entry.pax_headers = os.fsdecode(link), more
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# What runs on the VM: POSIX sh with the GNU tools of every Linux

_SHELL_HEAD = r"""
LC_ALL=C; export LC_ALL; umask 022; trap '' HUP PIPE
state=${target%/*}/.plato-sync/${target##*/}
fail() { code=$1; shift; printf '%s\n' "$*" >&2; exit "$code"; }
generation() { cat "$state/generation" 2>/dev/null; }
"""

# New files and directories belong to whom the place belongs where they come, whoever logs in.
_OWNER = r"""
near=$target; while [ ! -d "$near" ]; do
  if [ -e "$near" ] || [ -L "$near" ]; then
    fail 66 "$near on the VM is not a directory, so nothing can be put below it."; fi
  near=${near%/*}; near=${near:-/}; done
owner=$(stat -c %u:%g -- "$near")
case $target:$near in /home/plato/*:/|/home/plato/*:/home)  # plato's home is made with what goes into it
  ! id plato >/dev/null 2>&1 || owner=$(id -u plato):$(id -g plato) ;;
esac
own() { [ "$(id -u)" != 0 ] || [ "${owner%%:*}" = 0 ] || chown -hR "$owner" -- "$@"; }
made() {
  [ -d "${1:-/}" ] || { made "${1%/*}"
    if mkdir -- "$1" 2>/dev/null; then own "$1"; else [ -d "$1" ]; fi; } ||
    fail 77 "$1 on the VM cannot be made by the user who syncs."
}
"""

_LOOK = r"""
for tool in base64 chmod chown cp dirname find grep gzip head id mkdir mktemp mv rm rmdir sort stat tar \
  xargs; do
  command -v "$tool" >/dev/null 2>&1 || fail 69 "The VM has no $tool, which sync needs there; install it."
done
find / -maxdepth 0 -printf '' 2>/dev/null || fail 69 "The VM has no GNU find, which sync needs; install it."
if [ -d "$target" ]; then
  cd -- "$target" || fail 77 "$target on the VM cannot be entered by the user who syncs."
  case " $refused " in *" $(pwd -P) "*)
    fail 68 "The remote path leads to $(pwd -P) on the VM, which is never synced; choose another one.";; esac
else depth='-maxdepth 0'; cd /; fi
set -- -name .plato-sync -o -name .plato-sync.new
for name in $closed; do set -- "$@" -o -name "$name"; done
if [ -e "$state/lock" ] && command -v flock >/dev/null 2>&1; then
  exec 9<"$state/lock"
  flock -s -w "$patience" 9 || fail 73 "Another sync has been at work on the VM all the while."
fi
{ generation; printf '\0'; cat "$state/manifest.$source" 2>/dev/null; printf '\0'
  find . -mindepth 1 $depth -type d '(' "$@" ')' -prune -printf 'x\0%P\0' \
    -o -type d -printf 'd %m\0%P\0' -o -type f -printf 'f %m %s %T@\0%P\0' \
    -o -type l -printf 'l %l\0%P\0' -o -printf '%y\0%P\0' 2>/dev/null
} | gzip -1 | base64
"""

_PLACE = r"""
sweep() { find "$@" -type d ! -perm -700 -exec chmod u+rwx {} + 2>/dev/null; rm -rf -- "$@"; }
made "$state"
[ "$(generation)" != "$id" ] || exit 0  # this came twice
if [ -d "$target" ] && [ "$(stat -c %d -- "$target")" != "$(stat -c %d -- "$state")" ]; then
  base=$target/.plato-sync.new; made "$base"  # neither links nor renames lead to another file system
else base=$state; fi
new=$(mktemp -d "$base/new.XXXXXXXX") || fail 77 "$base on the VM cannot be written by the user who syncs."
trap 'sweep "$new"; rmdir -- "$target/.plato-sync.new" 2>/dev/null
  [ -z "$held" ] || rmdir -- "$held"; own "$state"' EXIT
turn() {
  [ "$(generation)" != "$id" ] || exit 0
  [ "$(generation)" = "$expected" ] || fail 75 "Another sync changed the tree on the VM meanwhile."
}
torn() { turn; fail 74 "The VM could not take the files, and nothing was changed: $words"; }
arrived() { while read -r form size; do
  if [ "$form" = gzip ]; then head -c "$size" | gzip -dc; else head -c "$size"; fi || break; done; }
words=$({ arrived | tar -xp --no-same-owner -f - -C "$new"; } 2>&1) || torn
words='not everything arrived'; [ -e "$new/meta/manifest" ] || torn
mkdir -p "$new/tree"
staged() { (cd "$new/tree" && find . -mindepth 1 "$@"); }
staged -type f -perm /6000 -printf '%m\0%p\0' > "$new/special"  # a new owner takes these bits away
own "$new"
busy='Another sync has been at work on the VM all the while.'
[ -e "$state/lock" ] || : > "$state/lock"
if command -v flock >/dev/null 2>&1; then
  exec 9<"$state/lock"; flock -w "$patience" 9 || fail 73 "$busy"
else
  find "$state" -maxdepth 1 -name lock.held -mmin +15 -exec rmdir -- {} + 2>/dev/null
  tries=0; until mkdir "$state/lock.held" 2>/dev/null; do
    tries=$((tries+1)); [ "$tries" -le "$patience" ] || fail 73 "$busy"; sleep 1; done
  held=$state/lock.held
fi
turn
each() { xargs -0 -r sh -c "for d; do $1 || printf '%s ' \"\$d\"; done" - 2>/dev/null; }
if [ -d "$target" ]; then
  cd -- "$target" || fail 77 "$target on the VM cannot be entered by the user who syncs."
  { printf '.\0'; staged -type d -print0; xargs -0 -r dirname -z -- < "$new/meta/remove" | sort -zu
  } > "$new/touched"
  there='[ ! -d "$d" ] || [ -L "$d" ] ||'; writable='{ [ -w "$d" ] && [ -x "$d" ]; }'
  closed=$(each "$there $writable || [ -O \"\$d\" ]" < "$new/touched"
    [ "$(id -u)" = 0 ] || staged -type d -print0 | each "$there [ -O \"\$d\" ]")
  [ -n "$closed" ] || closed=$(each "$there $writable || chmod u+rwx \"\$d\"" < "$new/touched")
  [ -z "$closed" ] || fail 77 "Nothing was changed: the user who syncs cannot write to $closed in $target."
else
  mv -T -- "$new/tree" "$target" || fail 75 "Something else made $target on the VM meanwhile."
  mkdir "$new/tree"; cd -- "$target"
fi
broken() { fail 74 "The VM could not take all of the files; run sync again: $words"; }
! words=$(xargs -0 -r rm -f -- 2>&1 < "$new/meta/remove" | grep -av ': Is a directory$') || broken
xargs -0 -r rmdir -- < "$new/meta/remove" 2>/dev/null  # those; one that is not empty any more stays
absent='for d; do [ -d "$d" ] || printf "%s\0" "$d"; done'
staged -type d -print0 | xargs -0 -r sh -c "$absent" - > "$new/created"
move() { (cd "$new/tree" && find . -mindepth 1 -maxdepth 1 -print0 |
  xargs -0 -r cp -RPf --preserve=mode "$@" -t "$target" -- 2>&1); }
words=$(move -l) || {
  words=$(move --remove-destination --preserve=timestamps) || broken
  staged ! -type d -print0 >> "$new/created"; }
[ "$(id -u)" != 0 ] || [ "${owner%%:*}" = 0 ] || xargs -0 -r chown -h "$owner" -- < "$new/created"
xargs -0 -r -n 2 chmod < "$new/special"
staged -type d ! -perm -2000 -print0 | xargs -0 -r chmod g-s --  # which a new directory inherits
mv -f -- "$new/meta/manifest" "$state/manifest.$source"
printf %s "$id" > "$new/generation" && mv -f -- "$new/generation" "$state/generation"
sweep "$state"/new.*
"""


# One sync, and the watch


class Syncer:
    """Brings one local tree to one directory on the VM, once or again and again."""

    def __init__(
        self,
        sandbox: Sandbox,
        path: str,
        remote_path: str = "",
        *,
        dry_run: bool = False,
        gitignore: bool = False,
        also: Sequence[bytes] = (),
        force: bool = False,
        via: str = "auto",
        timeout: float = SYNC_SECONDS,
    ) -> None:
        number_in("--timeout", timeout, 1, 86400)
        self.sandbox = sandbox
        self.reporter = sandbox.reporter
        self.root = os.path.normpath(os.path.join(sandbox.directory, path))
        if not os.path.isdir(self.root):
            raise UsageError(f"There is no directory {shown_path(self.root)} to sync.")
        if self.root == "/" or is_below(os.path.expanduser("~"), self.root):
            raise UsageError(
                f"{self.root} holds more than a simulator: this user's home directory is in it.",
                hint="Name the simulator's own directory: plato-sandbox sync DIR",
            )
        self.scan = partial(LocalTree, os.fsencode(self.root), gitignore=gitignore, also=also)
        self.target = normal_target(remote_path or default_target(sandbox.state))
        self.dry_run = dry_run
        self.force = force
        self.timeout = timeout
        self._warn_once = cache(self.reporter.warn)
        source = hashed(os.path.relpath(self.root, sandbox.directory))
        patience = int(timeout * PATIENCE_SHARE)
        self.head = assigned(target=self.target, source=source, patience=patience) + _SHELL_HEAD
        self.connect = partial(Vm, sandbox, via)
        self.vm = self.connect()

    def run(self) -> Json:
        """Sync once; what was done, as `Sandbox.sync` tells it. Again when another sync came between, or a
        file changed while it was read."""
        began = time.monotonic()
        report: Json = {"sent": 0, "removed": 0, "bytes": 0, "archive_bytes": 0}
        for left in reversed(range(SYNC_TRIES)):
            try:
                unsteady = self._sync(report)
                if not unsteady:
                    break
            except OvertakenError:
                if not left:
                    raise
        if unsteady:
            names = listed_paths(unsteady)
            self.reporter.warn(f"{names}: still changing while read, so the VM may have half of a change.")
        report.update(via=self.vm.via, remote_path=self.target, seconds=since(began))
        return report

    def _sync(self, report: Json) -> list[bytes]:
        """Bring the VM up to date, and add to a report; the files that changed while they were read."""
        tree = self.tree = self.scan()
        stamps = tree.stamps
        if not stamps and not self.force:
            raise SandboxError(
                f"There is nothing to sync in {shown_path(self.root)}; nothing was changed.",
                hint="If it is meant to be empty, give --force.",
            )
        self.reporter.step("Looking at the VM", self.timeout)
        # Directories of excluded names are not entered there, unless something here has that name.
        inside = {name for path in stamps for name in path.split(b"/")}
        closed = [name for name in EXCLUDED_DIRECTORIES if name not in inside and tree.ignores(name, True)]
        del inside  # trees can be large
        values = assigned(refused=REFUSED_TARGETS, closed=b" ".join(closed).decode())
        look = self.vm.run(self.head + values + _LOOK, None, self.timeout)
        generation, manifest, remote = parse_look(look, stamps)
        tree.leave_out_private_keys(remote)
        skipped = sorted(tree.skipped.items())
        doubts = [f"{shown_name(path)} is left out: {why}." for path, why in skipped]
        doubts += [
            f"{shown_name(text)}: no such pattern, so it matches nothing." for text in tree.odd_patterns
        ]
        for doubt in doubts[:SHOWN_WARNINGS]:
            self._warn_once(doubt)
        if len(doubts) > SHOWN_WARNINGS:
            self._warn_once(f"There are {len(doubts) - SHOWN_WARNINGS} more such warnings.")
        plan = self.plan = SyncPlan(tree, remote, manifest, self.force)
        report["unchanged"] = sum(stamp[:1] != b"d" for stamp in stamps.values()) - len(plan.files)
        report["skipped"] = [{"path": os.fsdecode(path), "reason": why} for path, why in skipped]
        if self.dry_run:
            report["dry_run"] = True
            for word, paths, kinds in (("send", plan.send, stamps), ("remove", plan.remove, remote)):
                report[word] = sorted(os.fsdecode(path) + "/" * (kinds[path][:1] == b"d") for path in paths)
            return []
        if not plan.send and not plan.remove and plan.manifest == manifest:
            return []
        size = sum(int(stamps[path].split(b" ")[2]) for path in plan.files if stamps[path][:1] == b"f")
        sending = f"Sending {counted(len(plan.files), 'file')}, {size_text(size)}"
        self.reporter.step(sending if plan.send else "Removing what is gone here")
        packed, unsteady = self._send(plan, generation)
        report["archive_bytes"] += packed
        report["bytes"] += size
        report["sent"] += len(plan.files) - len(unsteady)
        report["removed"] += sum(remote[path][:1] != b"d" for path in plan.remove)
        return unsteady

    def _send(self, plan: SyncPlan, generation: str) -> tuple[int, list[bytes]]:
        """Carry out a plan; how many bytes travelled, and the files that changed while they were read."""
        import gzip
        import secrets

        tree, packed, unsteady = self.tree, 0, plan.files

        def write(out: Any) -> None:
            """The archive in chunks, each after a line `plain SIZE` or `gzip SIZE`: it is packed where the
            connection has turned out to be slower than gzip, and through the API."""
            nonlocal packed, unsteady
            packed = done = 0
            seconds = 1.0 if self.vm.via == "api" else 0.0
            for chunk in chunks_of(tar_pieces(tree, plan)):
                is_slow = packed < FAST_BYTES * seconds
                data = gzip.compress(chunk, 1, mtime=0) if is_slow else chunk
                began = time.monotonic()
                out.write(b"%s %d\n" % (b"gzip" if is_slow else b"plain", len(data)))
                out.write(data)
                seconds += time.monotonic() - began
                packed += len(data)
                done += len(chunk)
                self.reporter.detail(size_text(done))
            unsteady = [path for path in plan.files if local_stamp(tree.location(path)) != tree.stamps[path]]

        values = assigned(id=secrets.token_hex(12), expected=generation)
        self.vm.run(self.head + values + _OWNER + _PLACE, write, self.timeout)
        return packed, unsteady

    # The watch

    def watch(self, told: Callable[[Json, str], None]) -> Json:
        """Sync, then follow the local tree until SIGINT. told: called with the report of each sync that did
        something, and with what that was in words. Returns the sums of all reports; Interrupted when there is
        none yet.

        What goes wrong after the first sync is tried again, unless it cannot pass.
        """
        import signal

        total = {"syncs": 0, "sent": 0, "removed": 0, "bytes": 0, "archive_bytes": 0}
        began = time.monotonic()
        report: Json = {}
        synced: Stamps = {}
        current: Stamps = {}
        trouble = ""
        try:
            while True:
                try:
                    self.sandbox.check_still_there()
                    looked = time.monotonic()
                    previous, current = current, self.scan().stamps
                    pause = max(
                        WATCH_QUIET_SECONDS, 3 * (time.monotonic() - looked)
                    )  # longer for a large tree
                    # What has changed is sent once it is still for a moment.
                    if not report or trouble or synced != current == previous:
                        report = self.run()
                        synced, trouble = current, ""
                        if report["sent"] or report["removed"] or not total["syncs"]:
                            total = {key: value + report.get(key, 1) for key, value in total.items()}
                            told(report, listed_paths([*self.plan.files, *self.plan.remove]))
                        self.reporter.step(f"Watching {shown_path(self.root)} (Ctrl-C ends it)", 0)
                except SandboxError as error:
                    if not report or isinstance(error, (AuthenticationError, NoSandboxError, StateError)):
                        raise
                    pause = WATCH_RETRY_SECONDS
                    if error.message != trouble:
                        trouble = error.message
                        self.reporter.warn(f"{trouble} Trying again every {pause:g} s.")
                    self.vm = self.connect()
                time.sleep(pause)
        except Interrupted as interruption:
            if interruption.number != signal.SIGINT or not report:
                raise
        return {**report, **total, "seconds": since(began)}


def normal_target(text: str) -> str:
    """A remote path in its normal form; UsageError for one that must not become a synced tree."""
    path = os.path.normpath("/" + text.strip("/"))
    is_plain = text.isprintable() and text.startswith("/") and ".." not in text.split("/")
    if not is_plain or path in REFUSED_TARGETS.split() or path.endswith("/" + SYNC_STATE):
        raise UsageError(
            f"{text!r} cannot be the remote path: it must be absolute, without '..', and no"
            " directory that the VM itself needs.",
            hint=f"Choose a directory of its own: --remote-path {SYNC_ROOT}/NAME",
        )
    return path


def default_target(state: Json) -> str:
    """The remote path of the specification."""
    return f"{SYNC_ROOT}/{state.get('service') or ''}"


# ----------------------------------------------------------------------------------------------------------
# services: the code on the VM goes to Gitea, the directory there becomes a clone, Docker Compose
# ----------------------------------------------------------------------------------------------------------
# `sync` brings the code to the VM, and git there pushes it to a workspace branch in Gitea: it travels once,
# and nothing here needs git. The VM's directory becomes a clone that stands at what was pushed. Gitea's
# credentials go there through the standard input of a shell, and to git through the environment: no argument,
# URL, configuration or file holds them.

GIT_SECONDS = 900.0
UP_SECONDS = 1800.0  # a first `docker compose up` pulls and builds images
COMPOSE_POLL_SECONDS = 0.6
APP_SECONDS = 5.0  # until it answers, once its containers are healthy
HEALTHY_SECONDS = 300  # the API's own default for healthy_wait_timeout


# What is to be started, and from which files


def plan_services(config: Config) -> list[Json]:
    """The services of a config's dataset, in its order.

    file: the Compose file; required: the containers that must be healthy, by container or Compose service
    name, or "all"; seconds: how long they may take.
    """
    return [
        {
            "name": str(name),
            "file": os.path.normpath(part.get("file") or "docker-compose.yml"),
            "required": part.get("required_healthy_containers") or ["all"],
            "seconds": whole_number(part.get("healthy_wait_timeout")) or HEALTHY_SECONDS,
        }
        for name, part in dict_in(config.content, "services").items()
    ]


UNCLEAR = "?"  # among ports: there may be others


def read_compose(path: str) -> tuple[list[str], set[str]]:
    """The services and containers that a Compose file defines, [] where only Compose itself can tell; and the
    ports of the VM that it publishes."""
    with suppress(SandboxError):  # Compose reads more of YAML, and says what is wrong
        content = as_dict(yaml_load(read_config(path), path))
        parts = dict_in(content, "services")
        given = (text_in(part, "container_name") for part in parts.values())
        names = [*map(str, parts), *filter(None, given)]
        if "include" not in content and "$" not in "".join(names):
            entries = [entry for part in parts.values() for entry in as_list(as_dict(part).get("ports"))]
            ports = {published for published, _ in map(compose_port, entries) if published}
            clear = all(map(str.isdecimal, ports)) and not re.search("extends|network_mode", str(parts))
            return names, ports if clear else {UNCLEAR}
    return [], {UNCLEAR}


def compose_port(entry: Any) -> list[str]:
    """The port of the VM ("" where it gives none) and the container's in an entry of Compose's `ports`."""
    if isinstance(entry, dict):
        entry = f"{entry.get('published') or ''}:{entry.get('target')}"
    return with_defaults(f":{entry}").partition("/")[0].split(":")[-2:]


COMPOSE_NAMES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")

# By the port in the container: the db_type, and in which variables user, password and database stand.
_DATABASES = {
    "5432": "postgresql POSTGRES_USER POSTGRES_PASSWORD POSTGRES_DB",
    "3306": "mysql MYSQL_USER MYSQL_PASSWORD MYSQL_DATABASE",
}

_NEW_CONFIG = """\
# What Plato is to know of this simulator. Made by `plato-sandbox init` from {0}; change what is not so.
service: {1}  # the simulator's name on Plato

datasets:
  base:
    compute:
      cpus: 2  # 1 to 8
      memory: 2048  # MB, 512 to 16384
      disk: 10240  # MB, 1024 to 204800
      app_port: {2}  # where the application answers on the VM
      plato_messaging_port: 7000

    metadata:
      name: {1}
      flows_path: flows.yml
      variables:  # a login that works
        - name: username
          value: admin
        - name: password
          value: change-me

    services:
      main:
        type: docker-compose
        file: {0}
        required_healthy_containers: [all]
        healthy_wait_timeout: 300  # seconds; a first build may take long
{3}"""

_NEW_LISTENER = """
      {0}:  # the worker watches this database
        type: db
        db_type: {1}
        db_host: 127.0.0.1
        db_port: {2}
        db_user: {3}
        db_password: {4}
        db_database: {5}
"""

_NEW_FLOWS = """\
# What `plato-sandbox flow` can do with the application. Change the selectors to those of its login page.
flows:
  - name: login
    description: Log in and arrive at the start page.
    steps:
      - type: navigate
        url: /
      - type: fill
        selector: "input[name='username']"
        value: admin
      - type: fill
        selector: "input[type='password']"
        value: change-me
      - type: click
        selector: "button[type='submit']"
      - type: verify_no_errors
"""


def new_config(directory: str) -> dict[str, str]:
    """The texts of a plato-config.yml and its flows for the Compose file of a directory, by name."""
    import json

    there = [name for name in COMPOSE_NAMES if os.path.isfile(os.path.join(directory, name))]
    if not there:
        raise UsageError(f"There is no Compose file ({COMPOSE_NAMES[-1]}) in {shown_path(directory)}.")
    path = os.path.join(directory, there[0])
    app, listeners = "", ""
    for name, part in dict_in(yaml_load(read_config(path), path), "services").items():
        given = as_dict(part).get("environment") or {}
        pairs = given.items() if isinstance(given, dict) else (str(one).partition("=")[::2] for one in given)
        known = {name.replace("MARIADB", "MYSQL"): with_defaults(str(value)) for name, value in pairs}
        for published, inside in map(compose_port, as_list(as_dict(part).get("ports"))):
            db_type, *names = _DATABASES.get(inside, " ").split(" ")
            if db_type:
                login = [json.dumps(known.get(one) or "change-me") for one in names]
                listeners += _NEW_LISTENER.format(name, db_type, published or inside, *login)
            app = app or (published if not db_type else "")
    service = re.sub(r"[^a-z0-9]+", "-", os.path.basename(directory).lower()).strip("-") or "simulator"
    listeners = listeners and f"\n    listeners:{listeners}"
    text = _NEW_CONFIG.format(there[0], service, app or 8080, listeners)
    return {"plato-config.yml": text, "flows.yml": _NEW_FLOWS}


def with_defaults(text: str) -> str:
    """A value of a Compose file, with ${NAME:-default} replaced."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def around(config: Config, *, whole: bool = True) -> Iterator[tuple[bool, str]]:
    """What is wrong, or doubtful (True), with what a dataset names: files, containers, ports of the VM.

    whole: also what its services can do without.
    """
    root, services = os.path.dirname(config.path), plan_services(config)
    for path in map(os.fsdecode, named_files(config.content if whole else {}, services)):
        if path.startswith(("/", "..")) or not os.path.exists(os.path.join(root, path)):
            yield False, config.told(f"there is no {path!r} in {shown_path(root)}", value=path)
    if "change-me" in str(config.content):  # as `init` writes it
        yield True, config.told("'change-me' is still to be replaced", value="change-me")
    published: set[str] = set()
    for service in services:
        known, ports = read_compose(os.path.join(root, service["file"]))
        published |= ports
        for one in service["required"] if known else ():
            if not re.fullmatch(rf"all|(.+[-_])?({'|'.join(map(re.escape, known))})([-_]\d+)?", one):
                words = f"{service['file']} defines no container {one!r}; {_meant(one, known)}"
                yield False, config.told(words, "services", service["name"], value=one)
    places = [("compute", "app_port")]
    places += [("listeners", name, "db_port") for name in dict_in(config.content, "listeners")]  # type: ignore[misc]
    for place in places if services and UNCLEAR not in published else ():
        part = reduce(dict_in, place[:-1], config.content)
        port = str(part.get(place[-1]) or "")
        if port and port not in published and part.get("db_host") in (None, "localhost", "127.0.0.1"):
            shown = ", ".join(sorted(published, key=int)) or "none"
            yield True, config.told(f"no service publishes port {port}; published are: {shown}", *place)


def what_is_wrong(config: Config, *, whole: bool = True) -> list[str]:
    return [words for is_doubt, words in around(config, whole=whole) if not is_doubt]


def named_files(dataset: Json, services: Sequence[Json]) -> list[bytes]:
    """The files and directories that a dataset and its planned services name, relative to its config."""
    found: list[Any] = [dict_in(dataset, "metadata").get("flows_path")]
    found += [service["file"] for service in services]
    for listener in dict_in(dataset, "listeners").values():
        found += [listener.get("seed_data_path"), *as_list(listener.get("seed_data_paths"))]
    return [os.fsencode(os.path.normpath(path)) for path in filter(as_text, found)]


# Gitea


def find_repository(api: PlatoApi, service: str) -> list[str]:
    """Gitea's user name and password, and the clone URL and the default branch of the repository of a
    service's simulator, which is made if need be. ApiError for what git must not be given."""
    answer = api.gitea_credentials()
    words = [text_in(answer, name) or "" for name in ("username", "password")]
    if "" in words or re.search("[\n\r\0]", "".join(words)):
        raise ApiError("Plato's answer holds no usable username and password for Gitea.")
    listed = map(as_dict, api.gitea_simulators())
    simulators = {str(entry.get("name")).lower(): entry for entry in listed}
    found = simulators.get(service.lower())
    if not found:
        raise SandboxError(
            f"Gitea lists no simulator {service!r} for this API key.",
            hint=f"It lists: {', '.join(sorted(simulators)) or 'none'}."
            " Without Gitea: plato-sandbox start-services --via sync",
        )
    identifier = str(found.get("id"))
    if not found.get("has_repo"):
        try:
            api.create_gitea_repository(identifier)
        except ApiError as error:
            if error.status != 409:  # another one has just made it, or our own first try
                raise
    repository = api.gitea_repository(identifier)
    url = re.sub("^(https?://)[^/]*@", r"\1", text_in(repository, "clone_url") or "")
    scheme = "https?" if api.settings.base_url.startswith("http:") else "https"
    if not re.fullmatch(scheme + r"://[^/@\s]+(/\S*)?", url) or not url.isprintable():
        raise ApiError(f"Plato names no usable clone URL for the repository ({url[:100]!r}).")
    return [*words, url, text_in(repository, "default_branch") or "main"]


# Brings the files that are named on its standard input into the repository. All is done by git's own records,
# beside the tree and an index that others may be using, until it is pushed.
_INDEX = r"""
command -v git >/dev/null 2>&1 || fail 69 "The VM has no git; bring the code over with --via sync."
cd -- "$target" || fail 77 "$target on the VM cannot be entered."
repo=$target/.git
[ -d "$repo" ] || [ ! -e "$repo" ] ||
  fail 73 "$repo on the VM is no repository; remove it, then run this again."
export GIT_TERMINAL_PROMPT=0 GIT_CONFIG_NOSYSTEM=1 GIT_ALLOW_PROTOCOL=http:https
helper='!f() { [ "$1" != get ] || printf "username=%s\npassword=%s\n" \
  "$GITEA_USERNAME" "$GITEA_PASSWORD"; }; f'
g() { git --git-dir="$repo" --work-tree="$target" -c safe.directory='*' -c core.hooksPath=/dev/null \
  -c http.followRedirects=false -c credential.helper= -c credential.helper="$helper" -c core.fsmonitor=false \
  -c core.autocrlf=false -c core.fileMode=true -c core.protectNTFS=false -c gc.auto=0 -c push.gpgSign=false \
  -c user.name=plato-sandbox -c user.email=plato-sandbox@localhost "$@"; }
from_gitea() { (export GITEA_USERNAME GITEA_PASSWORD; g "$@"); }
explain() { printf '%s\n%s\n' "$words" "$2" >&2; fail "$1" "$3"; }  # the code, what happened, what to do
broken() { explain 83 'git on the VM failed' 'Run the command again; --via sync does without Gitea.'; }
[ -d "$repo" ] || words=$(git -c init.defaultBranch=main init -q --template= . 2>&1) || broken
export GIT_INDEX_FILE="$repo/index.$id"
trap 'rm -f "$GIT_INDEX_FILE" "$GIT_INDEX_FILE.lock"; own "$repo"' EXIT
mkdir -p "$repo/info" && # byte for byte
  echo '* -text -eol -ident -filter -working-tree-encoding' > "$repo/info/attributes"
words=$(g update-index --add --remove -z --stdin 2>&1) || broken
tree=$(g write-tree) || broken
"""

# Commits and pushes that; says the commit, and the one before it. Again when the connection broke or another
# push came between. The credentials come first on standard input.
_CREDENTIALS = "IFS= read -r GITEA_USERNAME; IFS= read -r GITEA_PASSWORD\n"
_PUSH = r"""
origin=refs/remotes/origin/$branch
attempt() {
  words=$(from_gitea ls-remote -- "$url" "refs/heads/$branch" "refs/heads/$default" 2>&1) || return
  from=refs/heads/$default; there=; parent=
  while read -r commit name; do
    case $name in
      "refs/heads/$branch") from=$name; there=$commit ;;
      "refs/heads/$default") parent=$commit ;;
    esac
  done <<END
$words
END
  parent=${there:-$parent}; commit=$parent
  [ -z "$parent" ] || g cat-file -e "$parent^{tree}" 2>/dev/null ||
    words=$(from_gitea fetch -q --no-tags --depth=1 -- "$url" "$from" 2>&1) || return
  [ -n "$parent" ] && [ "$(g rev-parse "$parent^{tree}" 2>/dev/null)" = "$tree" ] ||
    commit=$(g commit-tree ${parent:+-p "$parent"} -m 'The workspace of a sandbox' "$tree" 2>/dev/null) ||
    { words='stale info'; return 1; }
  [ "$commit" = "$there" ] ||
    words=$(from_gitea push -q -- "$url" "$commit:refs/heads/$branch" 2>&1)
}
about() { printf '%s\n' "$words" | grep -qiE "$1"; }
for pause in 0.5 1 -; do
  attempt && break
  if about 'authentication failed|error: 40[13]|could not read (username|password)'; then
    explain 80 'Gitea refused the credentials that Plato gave for it' \
      'Ask the owner of the Plato organization for access; --via sync needs none.'
  elif about 'cannot lock ref|failed to update ref|fetch first|non-fast-forward|stale info'; then
    give_up() { fail 73 "Something else pushed to the branch meanwhile: $words"; }
  elif about 'error: 413|too large|exceeds|remote rejected|hook declined'; then
    explain 81 'Gitea did not take the files' \
      'Keep large files out with .platoignore, or bring the code over with --via sync.'
  elif about 'rpc failed|error: (429|5[0-9][0-9])|early eof|hung up|disconnect|resolve|connect|timed out' ||
    about 'ssl|tls|certificate|recv failure|empty reply|transfer closed|bad pack|incomplete'; then
    give_up() { explain 82 'git could not talk to Gitea' 'Run the command again a little later.'; }
  else give_up() { broken; }; fi
  [ "$pause" != - ] || give_up
  sleep "$pause"
done
words=$({ g config remote.origin.url "$url" && g config core.bare false &&
  g config remote.origin.fetch '+refs/heads/*:refs/remotes/origin/*' && g update-ref "$origin" "$commit" &&
  g update-ref "refs/heads/$branch" "$commit" && g symbolic-ref HEAD "refs/heads/$branch" &&
  mv -f -- "$GIT_INDEX_FILE" "$repo/index"; } 2>&1) || broken
echo "$commit $parent"
"""


def check_push(outcome: Outcome, password: str) -> bytes:
    """What a push printed; else what its failure means, without the password, which a server may repeat."""
    said = outcome.stderr
    for form in (password, quoted(password), password.encode().decode("latin-1")):  # as git guesses
        said = said.replace(form.encode(), b"***")
    if outcome.code in range(80, 84):
        words, what, hint = map(last_words, (b"\n\n" + said.rstrip()).rsplit(b"\n", 2))
        kind: Any = {80: AuthenticationError, 82: NetworkError}.get(outcome.code, SandboxError)
        raise kind(f"{what}: {words.rstrip('.')}.", hint=hint)
    return check_script(Outcome(outcome.code, outcome.stdout, said))


# Docker Compose on the VM

_COMPOSE_HEAD = r"""
cd -- "$target" || fail 77 "$target on the VM cannot be entered."
if [ -z "$DOCKER_HOST" ] && [ -S /var/run/docker-user.sock ]; then
  DOCKER_HOST=unix:///var/run/docker-user.sock; export DOCKER_HOST
fi
run=$state/compose-$key
"""

# The services of the file, and `up` begun in the background: it outlives a connection that breaks.
_UP = r"""
command -v docker >/dev/null 2>&1 || fail 69 "The VM has no docker."
words=$(timeout 90 docker version --format '{{.Server.Version}}' 2>&1) ||
  fail 70 "Docker on the VM does not answer: $words"
mkdir -p "$run" || fail 77 "$run on the VM cannot be made."
[ -e "$run/lock" ] || : > "$run/lock"
rm -f -- "$run"/*.*
run=$run/$id
words=$(docker compose -f "./$file" config --services 2>&1 > "$run.services") || {
  docker compose version >/dev/null 2>&1 || fail 69 "The VM has no docker compose (Compose v2)."
  fail 71 "$file is not a valid Compose file: $words"
}
: > "$run.output"; : > "$run.code.new"; : > "$run.found"; : > "$run.synced"
[ "$(id -u)" != 0 ] || chown -hR --reference="$target" "${run%/*}"
synced=$(generation)
[ "$build" != auto ] || [ "$(cat "${run%/*}/built" 2>/dev/null)" = "$synced" ] || build=yes
set -- OPTIONS
[ "$build" != yes ] || set -- --build "$@"
up='echo $$ > "$run.pid"
  if command -v flock >/dev/null 2>&1; then exec 8<"${run%/*}/lock"; flock 8; fi
  [ ! -e "$run.stop" ] || exit
  docker compose -f "./$file" up -d "$@" > "$run.output" 2>&1 < /dev/null 8<&-
  code=$?
  [ "$code $build" != "0 yes" ] || printf %s "$synced" > "${run%/*}/built"
  echo $code > "$run.code.new"; mv -f "$run.code.new" "$run.code"; rm -f "$run.pid"'
if command -v setsid >/dev/null 2>&1; then alone=setsid; else alone=nohup; fi
export run file build synced
"$alone" sh -c "$up" - "$@" > /dev/null 2>&1 < /dev/null &
"""

# Says how it stands: `up`, `wait`, `failed` or `late`; what there is to say of it; then the containers, or
# the last log lines of the one that is to blame. One that has just begun to run may die at once.
_LOOK_AT = r"""
run=$run/$id; set -- REQUIRED
joined() { sed -e :a -e '$!N;s/\n/'"$1 "'/;ta'; }
said() { tail -n 15 "$run.output" | tr '\r' '\n' | grep -a . | tail -n "$1" | joined ';'; }
older() { [ $(($(date +%s) - $(stat -c %Y -- "$1"))) -gt "$2" ]; }
tell() {
  printf '%s\n%s\n' "$1" "$2"
  [ -z "$3" ] || {
    docker logs --tail 20 -- "${3% *}" 2>&1 | grep -a . || echo '(it wrote nothing)'
    form='{{with .State.Health}}{{range .Log}}{{println .Output}}{{end}}{{end}}'
    docker inspect --format "$form" -- "${3% *}" |
      grep -a . | tail -n 3 | uniq | sed 's/^/health check: /'
  } | sed "s/^/${3#* } | /"
  exit 0; }
code=$(cat "$run.code" 2>/dev/null) || code=-
ids=$(docker compose -f "./$file" ps -aq) || [ "$code" = - ] ||
  fail 72 "The containers of $file cannot be listed."
moment=$(date -u -d '1 second ago' +%Y-%m-%dT%H:%M:%S)
form='{{.Name}} {{index .Config.Labels "com.docker.compose.service"}} {{.State.Status}}'
form=$form' {{with .State.Health}}{{.Status}}{{else}}-{{end}} {{.State.StartedAt}} {{.State.ExitCode}}'
form=$form'{{range .Mounts}}{{if eq .Type "bind"}} {{.Source}}{{end}}{{end}}'
tr '\0' '\n' < "$state/manifest.$source" > "$run.synced"
[ -z "$ids" ] || docker inspect --format "$form" $ids | sort > "$run.found"
while read -r name service state health started ended mounts; do
  grep -qxF -e "$service" "$run.services" || continue
  name=${name#/}; word=$state
  case $state:$health in exited:*) word="exited ($ended)" ;; running:[!-]*) word=$health ;; esac
  known="$known $name $service "; states="$states, $service $word"
  outdated=no  # whether a sync changed after its start what it mounts
  for place in $mounts; do
    case $place/ in "$target"/*) ;; *) continue ;; esac
    ! find ".${place#"$target"}" -type f -newerct "$started" | sed 's,^\./,f,' |
      grep -qxFf - "$run.synced" || outdated=yes
  done
  listed="$listed$name $service $state $outdated ${health#-}
"
  required=no; case " $* " in *" all "* | *" $name "* | *" $service "*) required=yes ;; esac
  case $word in
    healthy | 'exited (0)') continue ;;
    running) ! expr "$started" '<=' "$moment" >/dev/null || continue ;;
    unhealthy | exited* | dead)
      dead=${dead:-"$name $service"}
      [ "$required" = no ] || { failed="$failed, $service is $word"; blamed=${blamed:-"$name $service"}; }
      continue ;;
  esac
  [ "$required" = no ] || { late="$late, $service is $word"; slow=${slow:-"$name $service"}; }
done < "$run.found"
states=${states#, }; states=${states:-$(said 1)}
case $code in
  0) ;;
  -) ! older "$run.services" "$up_seconds" || tell late "\`docker compose up\` of $file did not end within\
 $up_seconds s and goes on there (${states:-no container yet}); give it more with --timeout."
    tell wait "$states" ;;
  *) tell failed "\`docker compose up\` failed: $(said 5)" "$dead" ;;
esac
for one; do case " all $known " in *" $one "*) ;; *) unknown="$unknown, $one" ;; esac; done
[ -z "$unknown" ] || tell failed "\`required_healthy_containers\` names ${unknown#, }; $file has none such.\
 Its services are: $(sort "$run.services" | joined ,)."
[ -z "$failed" ] || tell failed "${failed#, }." "$blamed"
[ -z "$late" ] || ! older "$run.code" "$healthy_seconds" ||
  tell late "Not healthy within $healthy_seconds s: ${late#, }." "$slow"
[ -z "$late" ] || tell wait "$states"
printf 'up\n%s\n%s' "$states" "$listed"
"""

_STOP_UP = r"""
: > "$run/$id.stop"
pid=$(cat "$run/$id.pid" 2>/dev/null) || exit 0
kill -0 "-$pid" 2>/dev/null && pid=-$pid  # its group; dash knows no -- here
kill -TERM "$pid" 2>/dev/null
for n in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
kill -KILL "$pid" 2>/dev/null; rm -f "$run/$id.pid"
"""


class Steps:
    """The parts of a whole: each is told as it begins, named in an error and timed for the report."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.taken: list[Json] = []

    @contextmanager
    def step(self, name: str, words: str, limit: float | None = None) -> Iterator[None]:
        self.reporter.step(words, limit)
        start = time.monotonic()
        try:
            yield
        except SandboxError as error:
            error.message = f"{words}: {error.message}"
            raise
        finally:
            self.taken.append({"step": name, "seconds": since(start)})


def start_services(
    sandbox: Sandbox,
    config: Config,
    *,
    via: str = "git",
    build: bool | None = None,
    force_recreate: bool = False,
    timeout: float = UP_SECONDS,
) -> Json:
    """The code to the VM and to Gitea, then the services one by one; what was done, as
    `Sandbox.start_services` tells it. build: None where something was synced since the last time."""
    number_in("--timeout", timeout, 1, 86400)
    services, problems = plan_services(config), what_is_wrong(config, whole=False)
    if not services:
        problems = [f"the dataset {config.dataset!r} has no services to start; `sync` alone brings code"]
    if problems:
        raise unusable_config(shown_here(config.path), problems)
    git = via == "git"
    syncer = code_syncer(sandbox, config, git, "ssh" if git else "auto")
    steps = Steps(sandbox.reporter)
    report: Json = {"via": via, "path": syncer.target, "branch": None, "commit": None, "repository": None}
    began = time.monotonic()
    if git:
        with steps.step("repository", "Finding the repository"):
            repository = find_repository(sandbox.api, sandbox.state["service"])
    with steps.step("sync", "Syncing the code"):
        done = syncer.run()
    if git:
        report.update(push_code(syncer, repository, steps))
    report.update(url=sandbox.state.get("url"), changed=done["sent"] + done["removed"], services=[])
    when = {True: "yes", False: "no", None: "auto"}[build]
    options = ["--force-recreate"] * force_recreate
    for service in services:
        name, file = service["name"], service["file"]
        with steps.step(name, f"Starting {name} ({file})", timeout):
            containers = bring_up(syncer, service, when, options, timeout)
        found = {"name": name, "type": "docker-compose", "file": file, "containers": containers}
        report["services"].append(found)
        outdated = [container["service"] for container in containers if container["outdated"]]
        if outdated:
            sandbox.reporter.warn(
                f"The code that {', '.join(outdated)} mounted has changed since it was started. If it is read"
                " only then: plato-sandbox start-services --force-recreate"
            )
    report["app_answers"] = find_app(syncer.vm, whole_number(config.compute.get("app_port")), steps)
    report.update(steps=steps.taken, seconds=since(began))
    return report


def code_syncer(sandbox: Sandbox, config: Config, git: bool, via: str) -> Syncer:
    """What brings the directory of a config to the VM. git: for its repository."""
    return Syncer(
        sandbox,
        os.path.dirname(config.path),
        gitignore=git,
        also=named_files(config.content, plan_services(config)),
        force=git,  # what is gone is in Gitea's history
        via=via,
    )


def push_code(syncer: Syncer, repository: Words, steps: Steps) -> Json:
    """Push what was synced to the workspace branch. Returns branch, commit, repository and pushed."""
    import secrets

    username, password, url, default = repository
    names = listed_files(syncer)
    branch = f"workspace-{short_id(syncer.vm.sandbox.state['session_id'])}"
    values = assigned(url=url, branch=branch, default=default, id=secrets.token_hex(12))
    words = f"{username}\n{password}\n".encode() + names
    with steps.step("push", f"Pushing {counted(names.count(0), 'file')}", GIT_SECONDS):
        script = syncer.head + values + _OWNER + _CREDENTIALS + _INDEX + _PUSH
        outcome = syncer.vm.outcome(script, lambda file: file.write(words), GIT_SECONDS)
        commit, _, parent = check_push(outcome, password).decode().strip().partition(" ")
    return {"branch": branch, "commit": commit, "repository": url, "pushed": commit != parent}


def listed_files(syncer: Syncer) -> bytes:
    """The names of the files that were synced, each with a NUL behind it."""
    return b"".join(path + b"\0" for path, stamp in syncer.tree.stamps.items() if stamp[:1] != b"d")


def find_app(vm: Vm, wanted: int | None, steps: Steps) -> str | None:
    """Ask the application where the sandbox's address leads; what it answers. wanted: the config's port."""
    port = whole_number(vm.sandbox.state.get("app_port")) or wanted
    if port != wanted:
        steps.reporter.warn(
            f"`compute.app_port` is {wanted} now; the address of this sandbox leads to {port}, with which it"
            " was started. Stop it and start a new one."
        )
    if not port:
        return None
    with steps.step("app", f"Asking port {port}", APP_SECONDS):
        return ask_app(vm, port)


def ask_app(vm: Vm, port: int) -> str | None:
    """Wait some seconds until the application answers on its port of the VM; what it does. Else warn."""
    import http.client

    answer, sandbox = None, vm.sandbox

    def trouble() -> str:
        nonlocal answer
        deadline = time.monotonic() + APP_SECONDS
        try:
            with vm_port(sandbox.settings.gateway, f"{sandbox.state['job_id']}--{port}", deadline) as stream:
                stream.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                response = timed_response(deadline, stream)
                response.begin()
            answer = f"HTTP {response.status}"
            return f"it answers {answer}" if response.status >= 500 else ""
        except SandboxError as error:
            return reason(error)
        except (OSError, http.client.HTTPException):
            return "nothing answers"

    why = poll(trouble, APP_SECONDS, 0.5)
    if why:
        others = ""
        with suppress(SandboxError):
            ports = vm.published_ports()
            others = "" if str(port) in ports else f" Containers publish: {', '.join(ports) or 'no port'}."
        sandbox.reporter.warn(
            f"The application's address leads to port {port} of the VM (`compute.app_port`), where it does"
            f" not work yet: {why}.{others}"
        )
    return answer


def bring_up(syncer: Syncer, service: Json, build: str, options: Words, timeout: float) -> list[Json]:
    """Bring one service up and wait until its containers are healthy; they. build: yes, no or auto."""
    import secrets

    file, vm = service["file"], syncer.vm
    values = assigned(
        file=file,
        build=build,
        key=hashed(file),
        id=secrets.token_hex(12),
        up_seconds=int(timeout),
        healthy_seconds=service["seconds"],
    )
    head = syncer.head + values + _COMPOSE_HEAD
    look = head + _LOOK_AT.replace("REQUIRED", shell_words(service["required"]))
    try:
        vm.run(head + _UP.replace("OPTIONS", shell_words(options)))
        return wait_for_containers(vm, look)
    except Interrupted:
        try:
            vm.run(head + _STOP_UP)
        except SandboxError as error:
            syncer.reporter.warn(f"`docker compose up` may go on on the VM: {error.message}")
        raise


def wait_for_containers(vm: Vm, look: str) -> list[Json]:
    """Look again and again until the containers are healthy; they."""
    import itertools

    while True:
        answer = vm.run(look).decode("utf-8", "replace")
        verdict, words, *lines = [printable(line) for line in f"{answer}\n".split("\n")]
        vm.sandbox.reporter.detail(words)
        if verdict == "up":
            names = ("name", "service", "state", "outdated", "health")
            found = [dict(itertools.zip_longest(names, line.split())) for line in lines if line]
            return [{**container, "outdated": container["outdated"] == "yes"} for container in found]
        if verdict != "wait":
            kind = TimedOutError if verdict == "late" else SandboxError
            error = kind(words, hint="Correct what is wrong there, then run this again.")
            error.message += "".join(f"\n  {line[:300]}" for line in lines if line)
            raise error
        time.sleep(COMPOSE_POLL_SECONDS)


# ----------------------------------------------------------------------------------------------------------
# worker: what the Plato worker recorded: mutations, what they sum up to, the rules that would ignore them
# ----------------------------------------------------------------------------------------------------------

RULES_KEY = "audit_ignore_tables"
WORKER_SECONDS = 240.0
WORKER_POLL_SECONDS = 2.0
LASTING_LOOKS = 15  # with the same answer, after which the reason is known to last
SHOWN_MUTATIONS = 50
_ACTIONS = {"INSERT": "inserted", "UPDATE": "updated", "DELETE": "deleted", "TRUNCATE": "deleted"}
_BEFORE_KEYS = "before old_data old_values old_row old previous"
_AFTER_KEYS = "after new_data new_values new_row new row_data data values row record"


class WorkerNotUpError(SandboxError):
    """The worker does not answer, so nobody knows what changed."""

    exit_code = 9
    code = "worker_not_up"


class Mutation:
    """A change of one row.

    action: INSERT, UPDATE, DELETE or what else the worker calls it; kind: what became of the row, "inserted",
    "updated", "deleted" or "other"; before, after: the row, {} where it is not known; columns: those that an
    UPDATE changed, as far as that is known; raw: as Plato tells it, with the listener; home: listener and
    schema; title: the table's name, with its home where the mutations told with it have several.
    """

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.table = self.title = str(raw.get("table_name") or raw.get("table") or "?")
        self.home = [str(raw[key]) for key in ("listener", "schema", "table_schema") if raw.get(key)]
        self.action = str(raw.get("action") or raw.get("operation") or "?").upper()
        self.kind = _ACTIONS.get(self.action, "other")
        self.before = _row(raw, _BEFORE_KEYS)
        self.after = _row(raw, _AFTER_KEYS)
        if self.action == "DELETE" and not self.before:
            self.before, self.after = self.after, {}
        self.columns: list[str] = []
        if self.action == "UPDATE":
            known = (self.before or self.after).items()
            listed = raw.get("changed_columns") or raw.get("changed_fields")
            if not isinstance(listed, (list, dict)):
                listed = [name for name, value in self.after.items() if (name, value) not in known]
            self.columns = list(map(str, listed))

    def told(self) -> str:
        """The change in one line: `id=1  login_count: 3 -> 4`."""
        row = self.after or self.before
        changed = self.columns if self.before and self.after else []
        if not changed:
            return ", ".join(f"{name}={excerpt(value_text(value))}" for name, value in row.items())
        key = "id" if "id" in row else next(iter(row), "")  # tables begin with their keys
        head = "" if key in changed else f"{key}={excerpt(value_text(row.get(key)))}  "
        return head + ", ".join(
            f"{name}: {difference(self.before.get(name), self.after.get(name))}" for name in changed
        )


def _row(raw: Json, names: str) -> Json:
    return next((raw[name] for name in names.split() if isinstance(raw.get(name), dict)), {})


def value_text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def difference(before: Any, after: Any) -> str:
    """Two values side by side; of long ones what stands around the place where they begin to differ."""
    texts = [value_text(before), value_text(after)]
    same = len(os.path.commonprefix(texts))  # noqa: RUF071  (it is meant to go by characters)
    start = same - 15 if same > 45 else 0
    return " -> ".join(excerpt(text, start) for text in texts)


def excerpt(text: str, start: int = 0) -> str:
    """So much of a text, from there on, as fits into a line with others."""
    end = start + 60
    return printable("..." * (start > 0) + text[start:end] + "..." * (len(text) > end))


def mutations_of(content: Json) -> list[Mutation]:
    """The mutations in the `state` of a job: merged if Plato does that, else listener by listener."""
    parts = [
        (entry, name) for name, part in content.items() for entry in as_list(as_dict(part).get("mutations"))
    ]
    listeners = {repr(entry): name for entry, name in parts}
    told = content.get("mutations")
    entries = told if isinstance(told, list) else [entry for entry, _ in parts]
    found = []
    for entry in map(as_dict, entries):
        name = listeners.get(repr(entry))
        found.append(Mutation({"listener": name, **entry} if name else entry))
    if len({tuple(mutation.home) for mutation in found}) > 1:
        for mutation in found:
            mutation.title = ".".join([*mutation.home, mutation.table])
    return found


def new_mutations(before: Sequence[Mutation], after: Sequence[Mutation]) -> list[Mutation]:
    """Those of the second look that the first one did not tell, or not as often."""
    known = collections.Counter(repr(mutation.raw) for mutation in before)
    found = []
    for mutation in after:
        told = repr(mutation.raw)
        known[told] -= 1
        if known[told] < 0:
            found.append(mutation)
    return found


def worker_trouble(job: Json) -> str:
    """Why the worker of a job cannot tell its state, in its own words; "" when it can."""
    content = job.get("state")
    said = as_dict(content).get("error") or as_dict(content).get("errors") or job.get("error")
    if not said and (job.get("success") is False or not isinstance(content, dict)):
        said = as_text(content) or "it gave no state"
    words = "; ".join(map(value_text, said)) if isinstance(said, list) else value_text(said or "")
    return " ".join(words.split()).rstrip(".")


def summarize(mutations: Sequence[Mutation]) -> Json:
    """How many rows changed: {"mutations": N, "tables": [{table, inserted, updated, deleted}]}."""
    tables: dict[str, Json] = {}
    for mutation in mutations:
        counts = tables.setdefault(
            mutation.title, {"table": mutation.title, "inserted": 0, "updated": 0, "deleted": 0}
        )
        counts[mutation.kind] = counts.get(mutation.kind, 0) + 1
    return {"mutations": len(mutations), "tables": [tables[name] for name in sorted(tables)]}


def counts_text(counts: Json) -> str:
    """`1 inserted, 2 updated`, of a table in a summary."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count and kind != "table")


# Ignore rules

# `audit_ignore_tables` is a list of entries: the name of a table, or {table: NAME, columns: [..]} for UPDATEs
# of nothing but those columns. The page works with ticks: pairs of a table and one of its columns, or WHOLE
# for all of the table. A table goes by its name, or by schema.name where the schema is not the listener's.

Tick = tuple[str, str]
WHOLE = ""


def ticks_of(entry: Any, schema: str) -> list[Tick]:
    """What a rule ignores; [] for what is none."""
    fields = {"table": entry} if isinstance(entry, str) else as_dict(entry)
    table, columns = text_in(fields, "table"), fields.get("columns")
    names = [WHOLE] if columns is None else as_list(columns)
    return [(table.removeprefix(f"{schema}."), str(name)) for name in names if table]


def entries_with(entries: Sequence[Any], ticks: set[Tick], schema: str) -> list[Any]:
    """The rules that ignore exactly this: each table's as they are if they do, else one written anew."""
    before = {tick for entry in entries for tick in ticks_of(entry, schema)}
    wanted = {table: {column for name, column in ticks if name == table} for table, _ in before ^ ticks}
    found: list[Any] = []
    for entry in [*entries, *sorted(wanted.keys() - {table for table, _ in before})]:
        table = next((table for table, _ in ticks_of(entry, schema)), "")  # which is none
        if table not in wanted:
            found.append(entry)
        elif wanted[table]:
            columns, wanted[table] = wanted[table], set()
            # With whatever else is there.
            fields = dict(entry) if isinstance(entry, dict) else {"table": entry}
            fields.pop("columns", None)
            if WHOLE not in columns:
                fields["columns"] = sorted(columns)
            found.append(fields if len(fields) > 1 else fields["table"])
    return found


class Changes:
    """What happened to tables, counted, so that the effect of rules is known at once however much it was.

    kinds: how often, by table, kind ("inserted", ..) and the ticks of the columns that an UPDATE changed;
    of: the mutations themselves, by tick.
    """

    def __init__(self, mutations: Sequence[Mutation], schema: str) -> None:
        self.mutations = mutations
        self.kinds: collections.Counter[Any] = collections.Counter()
        self.of: dict[Tick, list[Mutation]] = {}
        for mutation in mutations:
            table = table_of(mutation, schema)
            columns = [(table, name) for name in mutation.columns]
            self.kinds[table, mutation.kind, frozenset(columns)] += 1
            for place in [(table, WHOLE), *columns]:
                self.of.setdefault(place, []).append(mutation)

    def remaining(self, ticks: set[Tick]) -> dict[Any, int]:
        """The `kinds` that rules do not hide."""
        return {
            what: number
            for what, number in self.kinds.items()
            if (what[0], WHOLE) not in ticks and not set() < what[2] <= ticks
        }

    def noise(self, ticks: set[Tick]) -> set[Tick]:
        """The ticks that would hide what remains: columns where an UPDATE changed only those."""
        return {place for table, _, columns in self.remaining(ticks) for place in columns or [(table, WHOLE)]}


def table_of(mutation: Mutation, schema: str) -> str:
    """The name of a change's table, with its schema if that is another one."""
    return f"{schema_of(mutation) or schema}.{mutation.table}".removeprefix(f"{schema}.")


def schema_of(mutation: Mutation) -> Any:
    return mutation.raw.get("schema") or mutation.raw.get("table_schema")


def mutations_found(mutations: Sequence[Mutation]) -> CheckFailedError:
    """The error of --verify-no-mutations, with the rules that would ignore them ready to paste."""
    error = CheckFailedError(f"There are {counted(len(mutations), 'mutation')}: {mutation_words(mutations)}.")
    error.hint = "If they are noise, ignore them in plato-config.yml:"
    for listener in sorted({str(mutation.raw.get("listener") or "db") for mutation in mutations}):
        own = [mutation for mutation in mutations if mutation.raw.get("listener") in (None, listener)]
        found = {str(schema_of(mutation)) for mutation in own}
        schema = found.pop() if len(found) == 1 else "public"  # a listener's own needs no name
        rules = rules_text(entries_with([], Changes(own, schema).noise(set()), schema))
        error.hint += f"\n\n# in the listener {printable(listener)}\n{rules}"
    return error


def mutation_words(mutations: Iterable[Mutation]) -> str:
    """What was changed, counted: "activity (1 inserted); users (2 updated)"; "none" for nothing."""
    tables = summarize(list(mutations))["tables"]
    return "; ".join(f"{counts['table']} ({counts_text(counts)})" for counts in tables) or "none"


def rules_text(entries: Sequence[Any]) -> str:
    """The rules as YAML to copy, as a person would write them and the edit of a config writes them."""
    if not entries:
        return f"{RULES_KEY}: []"
    return "\n".join([f"{RULES_KEY}:", *yaml_items("  ", entries)])


# ----------------------------------------------------------------------------------------------------------
# flow: where the flows are, what must not be read, the steps in a browser, and the report
# ----------------------------------------------------------------------------------------------------------
# Playwright works in a thread with an event loop of its own, so that a signal finds the main thread in
# Python code, and an importer's own event loop is none of its business. Its driver ends the browser when
# this process ends, however it ends. Texts of pages and flows pass the mask before anybody sees them.

FLOW_SECONDS = 600.0
FLOW_OUTPUT = "test-results"
FLOW_LOOK_SECONDS = 8.0  # beyond a step's patience, for a picture, for the browser to end in order
ERROR_SELECTORS = (
    ".error",
    ".alert-danger",
    ".alert-error",
    "[role='alert']",
    ".error-message",
    ".validation-error",
)
INSTALLED_BROWSERS = (
    "google-chrome",
    "google-chrome-stable",
    "chromium",
    "chromium-browser",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


# Where the flows are


def fetch_flows(sandbox: Sandbox) -> str:
    """The flows that Plato has for the sandbox's job, or else for its artifact, as the text of a file."""
    found: Any = None
    sandbox.reporter.step("Fetching the flows")
    for name, ask in (("job_id", sandbox.api.job_flows), ("artifact_id", sandbox.api.artifact_flows)):
        try:
            found = found or (sandbox.state.get(name) and ask(sandbox.state[name]))
        except ApiError as error:
            if error.status not in (404, 405, 501):
                raise
        while isinstance(found, dict):  # bare, or under `flows` or `data`
            found = found.get("flows", found.get("data"))
    if not found:
        raise ConfigError(
            "Plato has no flows for this sandbox.",
            hint="Name a flows file in plato-config.yml (`metadata.flows_path`) and use --local.",
        )
    return found if isinstance(found, str) else yaml_dump({"flows": found})


# What must not be read


# Where a text is a value: of a field in a page or a request (JSON, form), or of the call that fills it.
_VALUE_PLACE = (
    r"""(\\*"(?!(?:type|name|id|for|class|autocomplete)\\*")[\w.\[\]-]+\\*":\s*\\*"|\bvalue=\\*["']"""
    r"""|\bfill\(\\*"|(?:^|[?&])[\w.%\[\]-]+=|name=\\*"[^"\\]*\\*"(?:\\r\\n|\r\n)+)(?:{})(?=\\*["'\r]|&|\s|$)"""
)
_ANYWHERE = "()(?:{})"


class Mask:
    """Hides the values of password fields in texts, in each spelling that they have in HTML, addresses, JSON.

    From the beginning it knows those fields that are for passwords by their own words. A value that is too
    short, or a plain word, or a word that can be read anyway, as in a selector or an address, is hidden only
    where it stands as a value: elsewhere that would make nonsense of other words and tell what it is.
    """

    def __init__(self, flows: Sequence[Json], address: str) -> None:
        self._patterns: dict[str, Pattern] = {}
        steps = [step for flow in flows for step in flow["steps"]]
        self._said = f"{address} {[step.subjects for step in steps]}".lower()
        for step in steps:
            if step.type == "fill" and looks_secret(step):
                self.add(step)

    def add(self, step: FlowStep) -> None:
        """Hide the value of a fill step from now on."""
        value = str(step.values["value"])
        # Such as admin, demo, guest.
        is_word = value.isalpha() and (len(value) < 6 or value.lower() in self._said)
        pattern = _VALUE_PLACE if is_word or len(value) < SHORTEST_SECRET else _ANYWHERE
        longest_first = sorted(spellings(value), key=len, reverse=True)
        if value:
            self._patterns[value] = re.compile(pattern.replace("{}", "|".join(map(re.escape, longest_first))))

    def __call__(self, leaf: Any) -> Any:
        """A text with nothing to be hidden in it; anything else as it is."""
        if isinstance(leaf, str):
            for value in sorted(self._patterns, key=len, reverse=True):
                leaf = self._patterns[value].sub(r"\1***", leaf)
        return leaf


def each_text(thing: Any, change: Callable[[Any], Any]) -> Any:
    """A value for JSON with every leaf in it changed."""
    if isinstance(thing, dict):
        return {key: each_text(part, change) for key, part in thing.items()}
    if isinstance(thing, list):
        return [each_text(part, change) for part in thing]
    return change(thing)


def spellings(value: str) -> set[str]:
    """How a text may be written in an address, in HTML and in JSON (once and twice encoded)."""
    import html
    import json
    import urllib.parse

    found = {value, html.escape(value), html.escape(value, quote=False)}
    found |= {urllib.parse.quote(value, safe=""), urllib.parse.quote(value)}
    found |= {text.replace("%20", "+") for text in found}
    for _ in range(2):
        found |= {json.dumps(text, ensure_ascii=escape)[1:-1] for text in found for escape in (True, False)}
    return found


def looks_secret(step: FlowStep) -> bool:
    """Whether a fill step is for a password, by its own words."""
    words = f"{step.values['selector']} {step.record['description']}"
    return re.search(r"passw|passphrase|\bpwd|secret", words, re.IGNORECASE) is not None


def mask_trace(source: str, target: str, mask: Mask) -> None:
    """Copy a trace with the values of password fields hidden in every file that is in it."""
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            text = old.read(entry).decode("utf-8", "surrogateescape")
            new.writestr(entry.filename, mask(text).encode("utf-8", "surrogateescape"))


# The steps


# In the page's HTML, or in what a person sees of it, whatever the line breaks and margins.
_PAGE_HAS_TEXT = r"""([text, there]) => {
  const root = document.documentElement, squeezed = text => text.replace(/\s+/g, " ").trim();
  return [root.innerHTML, root.innerText].some(part => squeezed(part).includes(squeezed(text))) === there;
}"""
_PRIVATE_FIELD = "e => e.type === 'password' || /password/.test(e.autocomplete || '')"
# Whatever a page does to its own JavaScript: a text, a number or null, a text.
_STATE_OF_PAGE = """() => {
  const entry = performance.getEntriesByType("navigation")[0] || {};
  const lines = (document.body ? document.body.innerText : "").split("\\n");
  const text = lines.map(line => line.trim().replace(/\\s+/g, " ")).filter(line => line).join("\\n");
  return {url: `${location.protocol === "chrome-error:" ? entry.name : location.href}`,
    http_status: entry.responseStatus | 0 || null, text: `${text}`.slice(0, 4000)};
}"""


# What Playwright says of a failure, the most telling first: a line of its log, an error, its first line.
_TELLING = (
    r"[^\w\s] ((?:unexpected value|element is not|locator resolved to hidden) .+|<.+ intercepts .+)",
    r"^(?:\w+\.\w+: )?\w*Error: (.+)",
    r"\A(?:\w+\.\w+: )?(.+)",
)


def seen_words(error: Exception) -> str:
    """What Playwright says of a failure, in one line for people."""
    text = str(error) or "the page did not answer"
    words = next(filter(None, (re.findall(telling, text, re.MULTILINE) for telling in _TELLING)))[-1]
    words = re.sub(r"net::ERR_(\w+)", lambda code: code[1].lower().replace("_", " "), words)
    return re.sub(r"Timeout (\d+)ms exceeded.*", r"nothing like it within \1 ms", words)[:500]


# A run


class FlowFailedError(CheckFailedError):
    """A flow did not come true."""

    code = "flow_failed"


async def quietly(look: Act, seconds: float = FLOW_LOOK_SECONDS) -> Any:
    """What a look at a page gives, or None when the page does not answer or has gone."""
    import asyncio

    try:
        return await asyncio.wait_for(look(), seconds)
    except Exception:  # noqa: BLE001  (a page in any state; what was looked for is told as missing)
        return None


def make_private(directory: str) -> None:
    """Make a directory whose files `sync` leaves out, unless it is there already."""
    if not os.path.isdir(directory):
        os.makedirs(directory)
        write_whole(os.path.join(directory, ".platoignore"), "*\n", 0o644)


class FlowRun:
    """Some flows in one browser, one after the other, each in a context of its own.

    results: what `Sandbox.flow` tells of each flow, as it grows. stay: what is to be done before the window
    stays open; None to close it.
    """

    stay: Act | None = None
    timed_out = False
    stays = False  # whether the flows are done and the window is still open
    page: Any = None
    _ended = False

    def __init__(
        self, sandbox: Sandbox, known: FlowSet, flows: Sequence[Json], address: str, output: str
    ) -> None:
        if not re.fullmatch(r"https?://[^\s/?#]\S*", address):
            raise UsageError(f"{address!r} is not the address of a page such as http://127.0.0.1:8080.")
        self.reporter = sandbox.reporter
        self.flows = flows
        self.address = address
        self.mask = Mask(flows, address)
        self.results: list[Json] = []
        self.screenshots = os.path.dirname(known.path or state_path(sandbox.directory)) + "/screenshots"
        self.output = output
        make_private(self.output)
        remove_matching(self.output, r"flow-\d+-.*-(step-\d+\.jpeg|trace\.zip)")  # of an earlier run

    def run(self, launch: Json, seconds: float, told: FlowListener) -> None:
        """Run the flows, as long as there is time, and tell of each step that ended, and of the end.

        launch: how the browser is started. Whatever ends this ends the browser too.
        """
        import asyncio
        import shutil
        import tempfile

        self.seconds = seconds
        self._folder = tempfile.mkdtemp(prefix="plato-flow-")  # for what is not masked yet
        work = self._run(
            launch, lambda result, step: told(each_text(result, self.mask), each_text(step, self.mask))
        )
        thread = Aside(lambda: asyncio.run(self._serve(work)))
        try:
            thread.result()
        except Interrupted:
            if not self.stays:
                raise
        finally:
            self._ended = True
            try:
                thread.wait(FLOW_LOOK_SECONDS)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)

    async def _serve(self, work: Any) -> None:
        """Wait for work until it ends, or is not wanted any more."""
        import asyncio

        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # nobody waits for some answers
        task = asyncio.ensure_future(work)
        while not (task.done() or self._ended):
            await asyncio.wait([task], timeout=0.05)
        task.cancel()
        await task

    async def _run(self, launch: Json, tell: FlowListener) -> None:
        import asyncio

        try:
            await self._open({**launch, "traces_dir": self._folder})
            self._ends = time.monotonic() + self.seconds
            for flow in self.flows:
                if not self.timed_out:
                    await self._run_flow(flow, tell)
                if not self.stay:
                    await quietly(lambda: self.context.close())
            if self.stay:
                self.stay()
                self.stays = True
                self.reporter.note("The browser stays open; close it or press Ctrl-C to end.")
                while self.browser.is_connected():
                    await asyncio.sleep(0.05)
        finally:
            await quietly(lambda: self._playwright.stop())

    async def _open(self, launch: Json) -> None:
        """Open the browser. SandboxError with the command for what is missing."""
        import logging
        import shutil

        python = shell_words([sys.executable, "-m"])
        try:
            from playwright.async_api import async_playwright, expect
        except ImportError:
            raise SandboxError(
                f"Flows need Playwright, which this Python does not have: {python} pip install playwright",
                hint="Where pip refuses or is missing, make a virtual environment: python3 -m venv flow-venv",
            ) from None
        logging.getLogger("playwright").disabled = True  # a traceback for each answer of a page that has gone
        self.expect = type(expect)()
        # Neither the driver nor the browser, which runs pages that nobody here wrote, has a use for the key.
        secrets = {name: os.environ.pop(name) for name in os.environ.keys() - child_environment()}
        try:
            try:
                self._playwright = await async_playwright().start()
            finally:
                os.environ.update(secrets)
            chromium = self._playwright.chromium
            path = launch["executable_path"]
            if path:
                path = shutil.which(path) or path
            elif not os.path.exists(chromium.executable_path):
                path = next(filter(None, map(shutil.which, INSTALLED_BROWSERS)), None)
            self.browser = await chromium.launch(**{**launch, "executable_path": path})
        except Exception as error:  # noqa: BLE001  (the driver or the browser failed in any way)
            raise SandboxError(
                f"The browser could not be opened: {seen_words(error)}. This brings one:"
                f" {python} playwright install --with-deps chromium"
                " (or install Chrome or Chromium, or set PLATO_BROWSER to the path of one)"
            ) from None

    async def _run_flow(self, flow: Json, tell: FlowListener) -> None:
        steps = [FlowStep(0, {"type": "navigate", "url": self.address}, None), *flow["steps"]]
        result: Json = {
            **flow,
            "passed": True,
            "steps": [dict(step.record) for step in steps],
            "failure": None,
            "trace": None,
            "trace_command": None,
        }
        self.results.append(result)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.mask(flow["name"]))[:60]
        place = f"{self.output}/flow-{len(self.results)}-{name}-"
        self.page = None
        shown: Any = None  # the newest picture
        began = time.monotonic()
        for step, record in zip(steps, result["steps"]):
            words = "{}: {number}/{} {type} {target}".format(flow["name"], len(flow["steps"]), **record)
            self.reporter.step(self.mask(words))
            start = time.monotonic()
            seen = await self._try(step, record)
            seconds = time.monotonic() - start
            is_look = step.type.startswith(("verify", "check_", "wait_for_", "screenshot"))
            # A check that passes at once shows what the picture before it shows, a page that was opened
            # what the next picture shows.
            is_fresh = shown and is_look and seconds < 0.15
            if seen or (step.number and not is_fresh):
                path = f"{place}step-{step.number:02d}.jpeg"
                picture = partial(self._picture, path, quality=75)
                shown = await quietly(picture) and path
            record.update(
                status="failed" if seen else "passed",
                seconds=round(seconds, 3),
                url=getattr(self.page, "url", None),
                expected=step.expected if seen else None,
                seen=seen,
                picture=shown,
            )
            if seen:
                await self._fail(step, record, result, f"{place}trace.zip")
            result["seconds"] = since(began)
            tell(result, record)
            if seen:
                break
        tell(result, None)

    async def _try(self, step: FlowStep, record: Json) -> str | None:
        """Try a step as often as it says. Returns what was seen instead of what it waits for."""
        import asyncio

        longest = (
            step.limit + step.patience + step.retry_delay_ms + step.duration
        ) / 1000 + FLOW_LOOK_SECONDS
        for attempt in range(1, step.retries + 2):
            record["attempts"] = attempt
            try:
                left = self._ends - time.monotonic()
                await asyncio.wait_for(self._perform(step, record), min(longest, left))
                return None
            except Exception as error:  # noqa: BLE001  (Playwright's, AssertionError, of a file, of an address)
                seen = seen_words(error)
            if time.monotonic() >= self._ends:
                self.timed_out = True
                return f"the {self.seconds:g} s for the whole run were over"
        return seen

    async def _perform(self, step: FlowStep, record: Json) -> None:
        """One attempt at a step, with Playwright's own waiting; it raises where it does not come true."""
        import asyncio
        import urllib.parse

        if record["attempts"] > 1:
            await asyncio.sleep(step.retry_delay_ms / 1000)
        if self.page is None:
            await self._open_page()
        page, at, expect = self.page, step.values, self.expect
        self.context.set_default_timeout(step.limit)
        self.context.set_default_navigation_timeout(step.patience)
        expect.set_options(timeout=step.limit)
        selector = at.get("selector", "")
        found = page.locator(selector)
        element = found.first
        if step.type in ("click", "fill"):
            await element.wait_for()
            self.context.set_default_timeout(step.patience)
        if step.type == "fill" and (looks_secret(step) or await element.evaluate(_PRIVATE_FIELD)):
            self.mask.add(step)
            self._covered.append(selector)
        what = ["", *step.subjects][-1]
        text = re.escape(str(what))
        pattern = re.compile(f"^{text}$" if at.get("contains") is False else text)
        is_there = at.get("should_exist") is not False
        actions: Json = {
            "navigate": lambda: page.goto(urllib.parse.urljoin(page.url, what)),
            "wait_for_selector": element.wait_for,
            "click": element.click,
            "fill": lambda: element.fill(str(at["value"])),
            "wait": lambda: page.wait_for_timeout(step.duration),
            "wait_for_url": lambda: self.at_address(expect(page), pattern),
            "check_element": lambda: expect(element).to_be_attached(attached=is_there),
            "element_exists": expect(element).to_be_attached,
            "element_visible": expect(element).to_be_visible,
            "element_text": lambda: self.element_text(expect(element), at),
            "element_count": lambda: expect(found).to_have_count(whole_number(what)),
            "page_title": lambda: expect(page).to_have_title(pattern),
            "verify_text": lambda: page.wait_for_function(_PAGE_HAS_TEXT, arg=[what, is_there], polling=100),
            "verify_url": lambda: self.at_address(expect(page), pattern),
            "verify_no_errors": lambda: self.no_errors(at.get("error_selectors") or ERROR_SELECTORS),
            "screenshot": lambda: self.screenshot(what, at.get("full_page")),
            "switch_page": lambda: self.switch_page(int(what)),
            "execute_script": lambda: page.evaluate(what),
        }
        # The text that a script gives, or the path of a screenshot.
        note = await actions[step.kind]()
        record["note"] = note[:200] if isinstance(note, str) else ""

    async def _open_page(self) -> None:
        """A first page, listened to."""
        self._covered: list[str] = []  # selectors of fields that no picture may show
        self._troubles: list[str] = []
        self.context = await self.browser.new_context()
        await self.context.tracing.start(snapshots=True)
        self.context.on("console", self._heard)
        self.context.on("weberror", lambda error: self._troubles.append(f"script error: {error.error}"))
        self.context.on("dialog", self._dialog)
        self.page = await self.context.new_page()

    def _heard(self, message: Any) -> None:
        """Note what the browser or the page calls an error, such as an answer of 404."""
        url = message.location["url"]
        if message.type == "error" and not url.endswith("/favicon.ico"):
            self._troubles.append(f"{message.text} {url}")

    async def _dialog(self, dialog: Any) -> None:
        """Do with a dialog what Playwright does when nobody listens, and tell its words."""
        self._troubles.append(f"{dialog.type}: {dialog.message!r} (closed)")
        await (dialog.accept() if dialog.type == "beforeunload" else dialog.dismiss())

    # Steps that are more than one call of Playwright

    async def at_address(self, expected: Any, pattern: Pattern) -> None:
        """Wait for an address. The browser knows it even of a page that is too busy to be looked at."""
        try:
            await expected.to_have_url(pattern)
        except AssertionError:
            raise AssertionError(f"the address is {self.page.url}") from None

    async def element_text(self, expected: Any, values: Json) -> None:
        """The text of an element, as it stands in the page or as a person sees it."""
        check = expected.to_have_text if values.get("contains") is False else expected.to_contain_text
        try:
            await check(values["text"], use_inner_text=True, timeout=1)
        except AssertionError:
            await check(values["text"])

    async def no_errors(self, selectors: Words) -> None:
        """Looked at once: an error that is there counts, even if it is to vanish."""
        await self.page.wait_for_load_state("domcontentloaded")
        for selector in selectors:
            visible = self.page.locator(selector).locator("visible=true")
            words = " ".join(" ".join(await visible.all_inner_texts()).split())
            if words:
                raise AssertionError(f"{selector} says {words[:300]!r}")

    async def screenshot(self, name: str, full_page: bool | None) -> str:
        """A picture in the user's own folder, its name prefixed with the time in milliseconds."""
        directory, base = os.path.split(name)
        base += "" if base.lower().endswith((".png", ".jpg", ".jpeg")) else ".png"
        path = os.path.join(self.screenshots, directory, f"{time.time() * 1000:.0f}_{base}")
        if not is_below(path, self.screenshots):
            raise AssertionError(f"{name!r} would lie outside of {shown_path(self.screenshots)}")
        make_private(self.screenshots)
        await self._picture(path, full_page=full_page)
        return from_here(path)

    async def switch_page(self, index: int) -> None:
        """Go on in another page, which may still be about to open."""
        while index >= len(self.context.pages):
            await self.context.wait_for_event("page")
        self.page = self.context.pages[index]
        await self.page.bring_to_front()
        await self.page.wait_for_load_state("domcontentloaded")

    # What is kept

    async def _picture(self, path: str, **options: Any) -> Any:
        """Take a picture in which fields for passwords are covered."""
        covered = [self.page.locator(selector) for selector in self._covered]
        # The timeout is the caller's, not that of the page's steps.
        return await self.page.screenshot(path=path, mask=covered, mask_color="#8a8f98", timeout=0, **options)

    async def _fail(self, step: FlowStep, record: Json, result: Json, path: str) -> None:
        """Note a failed step and what can be seen of its page, and keep the trace at a path."""
        if step.type == "fill":
            self.mask.add(step)  # it may be a password; nobody can tell
        state = await quietly(lambda: self.page.evaluate(_STATE_OF_PAGE))
        failure = {
            "step": step.number,
            **record,
            "http_status": None,
            "text": "",
            **(state or {}),
            "troubles": list(dict.fromkeys(self._troubles))[:20],
        }
        result.update(passed=False, failure=failure)
        whole = f"{self._folder}/trace.zip"
        await quietly(lambda: self.context.tracing.stop(path=whole), 30.0)
        if os.path.exists(whole):
            mask_trace(whole, path, self.mask)
            os.unlink(whole)
            command = [sys.executable, "-m", "playwright", "show-trace", path]
            result.update(trace=path, trace_command=shell_words(command))


# The report


REPORT_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #616a75; --line: #dfe3e8; --ground: #f6f7f9;
  --card: #fff; --good: #1a7f4b; --bad: #c0312b; --bad-ground: #fdf1f0; --code: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --dim: #98a2ae; --line: #2c333b;
  --ground: #14171b; --card: #1b2026; --good: #53c48a; --bad: #ff7b72; --bad-ground: #2a1d1e;
  --code: #262d35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; letter-spacing: -.01em; }
h1::before, .index li::before { content: "✓ "; color: var(--good); }
h1.False::before, .index .False::before { content: "✗ "; color: var(--bad); }
h2 { font-size: 1.15rem; margin: 0; }
code, .text { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
header { margin-bottom: 1.75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.1rem; margin: 1rem 0 0;
  font-size: .93rem; }
dt { color: var(--dim); } dd { margin: 0; min-width: 0; white-space: pre-wrap; }
.text { background: var(--code); border-radius: 6px; padding: .5rem .75rem; max-height: 18rem;
  overflow: auto; }
.seen { color: var(--bad); }
.index { list-style: none; padding: 0; margin: 1rem 0 0; columns: 16rem; }
.index:not(:has(li + li)), dd:empty, dt:has(+ dd:empty), .head p:empty, .words :empty { display: none; }
.index a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--line); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 1.5rem;
  overflow: hidden; }
summary { list-style: none; cursor: pointer; }
summary::-webkit-details-marker { display: none; }
summary:hover { background: color-mix(in srgb, var(--line) 25%, transparent); }
summary:focus-visible { outline: 2px solid var(--good); outline-offset: -2px; }
.head { padding: 1.1rem 1.25rem; display: grid; grid-template-columns: 1fr max-content; gap: 0 1rem;
  align-items: baseline; }
.head p { grid-column: 1 / -1; max-width: 44rem; margin: .25rem 0 0; color: var(--dim); }
.verdict { font-weight: 600; font-size: .95rem; color: var(--good); }
.verdict::before { content: "Passed in "; }
.False .verdict { color: var(--bad); }
.False .verdict::before { content: "Failed in "; }
details:not([open]) > .head .verdict::after { content: " ▸"; }
.failure { background: var(--bad-ground); border-top: 1px solid var(--line); padding: 1rem 1.25rem 1.15rem;
  margin: 0; }
.True .failure, img[src$=","] { display: none; }
ol { list-style: none; margin: 0; padding: 0; }
.step { border-top: 1px solid var(--line); }
.step summary { display: grid; grid-template-columns: 1.6rem 1fr max-content 8rem; gap: 0 .9rem;
  align-items: center; padding: .55rem 1.25rem; min-height: 3.4rem; }
.number, .time { color: var(--dim); text-align: right; font-variant-numeric: tabular-nums; font-size: .9rem; }
.words { min-width: 0; }
.words > * { display: block; color: var(--dim); font-size: .84rem; font-weight: 400; margin-top: .1rem; }
.words code { font-size: .76rem; }
.words em, .words em:empty + code { font: inherit; color: inherit; }
.tries-0, .tries-1, .skipped .time i, .time u { display: none; }
.time i, .time u { font-style: normal; text-decoration: none; }
.skipped .time u { display: inline; }
.words b { color: var(--bad); font-size: .9rem; }
img { display: block; width: 8rem; height: 4.5rem; object-fit: cover; object-position: top;
  border-radius: 4px; border: 1px solid var(--line); cursor: zoom-in; }
[open] > summary > img, .failed img { grid-column: 1 / -1; width: 100%; height: auto; margin: .7rem 0 .45rem;
  border-radius: 6px; cursor: zoom-out; }
.step.failed .number { color: var(--bad); font-weight: 700; }
.skipped { opacity: .55; }
footer { color: var(--dim); font-size: .85rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .75rem 3rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .55rem; }
  .head, .failure { padding-left: .9rem; padding-right: .9rem; }
  .step summary { grid-template-columns: 1.3rem 1fr 4.5rem; padding: .55rem .9rem; gap: 0 .6rem; }
  .time { grid-column: 2; grid-row: 2; text-align: left; font-size: .82rem; }
  img { width: 4.5rem; height: 3.2rem; grid-column: 3; grid-row: 1 / span 2; }
  .number { align-self: start; padding-top: .05rem; }
  [open] > summary > img, .failed img { grid-row: 3; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
REPORT_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<header><h1 class="{passed}">{title}</h1>
<dl><dt>Page</dt><dd>{address}</dd>
<dt>Flows</dt><dd>{source}</dd>
<dt>Browser</dt><dd>{browser[name]} {browser[version]}</dd>
<dt>Run</dt><dd>{started_at:.16} UTC, {seconds:.1f} s</dd>
<dt>Mutations</dt><dd>{changed}</dd></dl>
<ul class="index">{index}</ul>
</header>
{sections}
<footer>A click on a flow shows its steps, and on a step its picture in full.
Made by plato-sandbox {version}.</footer>
</main>
</body>
</html>
"""
REPORT_INDEX = '<li class="{passed}"><a href="#{number}">{name}</a></li>'
REPORT_FLOW = """\
<section id="{number}" class="{passed}"><details{open}><summary class="head"><h2>{name}</h2>
<span class="verdict">{seconds:.1f} s</span><p>{description}</p></summary>
<dl class="failure"><dt>Step</dt><dd>{failure[step]} {failure[type]}</dd>
<dt>Place</dt><dd>{failure[place]}</dd>
<dt>Expected</dt><dd>{failure[expected]}</dd>
<dt>Seen</dt><dd class="seen">{failure[seen]}</dd>
<dt>Address</dt><dd>{failure[url]}</dd>
<dt>HTTP status</dt><dd>{failure[http_status]}</dd>
<dt>Page text</dt><dd class="text">{failure[text]}</dd>
<dt>Also seen</dt><dd>{troubles}</dd>
<dt>Trace</dt><dd class="text">{trace_command}</dd></dl>
<ol>{lines}</ol></details></section>
"""
REPORT_STEP = """\
<li class="step {status}"><details><summary><span class="number">{number}</span>
<span class="words"><em>{description}</em><code>{type} {target}</code><small>{note}</small>
<small class="tries-{attempts}">{attempts} attempts</small><b>{seen}</b></span>
<span class="time"><i>{seconds:.2f} s</i><u>{status}</u></span>
<img alt="The page after this step" src="data:image/jpeg;base64,{image}"></summary></details></li>
"""


def html_text(leaf: Any) -> Any:
    """A text as HTML; nothing for None."""
    import html

    if leaf is None:
        return ""
    return html.escape("\n".join(map(printable, leaf.split("\n")))) if isinstance(leaf, str) else leaf


def report_page(report: Json) -> str:
    """The whole report as one page of HTML that needs nothing else. report: as `Sandbox.flow` tells it."""
    flows, mutations = report["flows"], report["mutations"]
    index = sections = ""
    for number, flow in enumerate(flows, 1):
        shown = {
            **each_text(flow, html_text),
            "number": number,
            "open": "" if flow["passed"] and len(flows) > 1 else " open",
            "lines": "".join(map(report_step, flow["steps"])),
        }
        failure = collections.defaultdict(str, shown["failure"] or {})
        index += REPORT_INDEX.format_map(shown)
        shown["failure"] = failure
        sections += REPORT_FLOW.format(**shown, troubles="\n".join(failure["troubles"]))
    passed = sum(flow["passed"] for flow in flows)
    change = ", but the databases changed" if mutations else ""
    words = {
        **report,
        "title": f"{passed} of {len(flows)} flows passed{change}",
        "source": report["flows_path"] or "from Plato",
        "changed": mutations and mutation_words(map(Mutation, mutations)),
    }
    return REPORT_PAGE.format(
        **each_text(words, html_text),
        style=REPORT_STYLE,
        index=index,
        sections=sections,
        version=__version__,
    )


def report_step(step: Json) -> str:
    """A line that unfolds a picture."""
    import base64

    picture = b""
    if step["picture"]:
        with open(step["picture"], "rb") as file:
            picture = file.read()
    return REPORT_STEP.format(**each_text(step, html_text), image=base64.b64encode(picture).decode())


def flow_failed_error(failed: Sequence[Json]) -> FlowFailedError:
    """What the first of the failed flows has to say, and how many there are."""
    failure = failed[0]["failure"]
    words = "The flow {name} failed at step {step} ({at}): expected {expected}; seen: {seen}.".format(
        **failure, name=failed[0]["name"], at=failure["place"] or failure["type"]
    )
    error = FlowFailedError(words + (f" {len(failed) - 1} more failed." if len(failed) > 1 else ""))
    status = failure["http_status"]
    if status in (502, 503, 504):
        error.hint = f"The page answers HTTP {status}: the simulator's services may not be up yet."
    return error


# ----------------------------------------------------------------------------------------------------------
# audit: ignore rules chosen by looking: what changed, the rules and their file, databases, the page
# ----------------------------------------------------------------------------------------------------------


def change_text(first: Mutation, column: str) -> str:
    """What happened to a table (WHOLE), or in a column."""
    if column != WHOLE:
        return difference(first.before.get(column), first.after.get(column))
    return printable(f"{first.kind}: {first.told()}"[:300])


# The way into the file: the lines of one list change, and what comes out is proved by reading it again


def edit_rules(
    text: str, source: str, dataset: str, listener: str, entries: Sequence[Any]
) -> tuple[str, list[str]]:
    """A config in which a listener has these rules; with the others ("dataset/name") that share them with it.

    A list changes where it stands; a listener that merges another's rules gets a list of its own. ConfigError
    when the text cannot be edited so: nothing but rules may differ when it is loaded.
    """
    node = listener_node(text, source, dataset, listener)
    edited = _with_rules(text, node, entries)
    place = ("datasets", dataset, "listeners", listener, RULES_KEY)
    try:
        changed = dict(differences(yaml_load(text), yaml_load(edited)))
    except YamlError:
        changed = {}
    if changed.get(place) != entries or any(path[-1:] != (RULES_KEY,) for path in changed):
        raise ConfigError(
            f"{source} was not changed: the rules of {listener!r} are written in an unusual way.",
            hint="Copy the YAML into the file with an editor.",
        )
    return edited, [f"{path[1]}/{path[3]}" for path in changed if len(path) == len(place) and path != place]


def listener_node(text: str, source: str, dataset: str, listener: str) -> YamlNode:
    """The mapping of a listener in a config. ConfigError when there is none, YamlError."""
    root = yaml_compose(text, source)
    node = root and root.get("datasets", dataset, "listeners", listener)
    if node is None or not isinstance(node.value, dict):
        raise ConfigError(f"{source} has no listener {listener!r} in the dataset {dataset!r} any more.")
    return node


def differences(old: Any, new: Any, *path: Any) -> Iterator[Any]:
    """Where two configs differ: the keys that lead there, and what the new one has."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), *path, key)
    elif repr(old) != repr(new):
        yield path, new


def _with_rules(text: str, listener: YamlNode, entries: Sequence[Any]) -> str:
    """A config with another list of rules, or nonsense where a list is written in an unusual way.

    The lines of entries that stay are as they were, with the comments above them.
    """
    line_break = "\r\n" if "\r\n" in text else "\n"
    text += line_break  # so that each line ends with one; it goes at the end

    def end_of_line(at: int) -> int:
        return text.index("\n", at - 1) + 1

    key, value = listener.value.get(RULES_KEY, (None, None))
    margin = " " * (listener.column - 1)
    new = [f"{margin}{line}\n" for line in rules_text(entries).split("\n")]
    if key is None or not listener.start <= key.start < listener.end:  # or it is merged
        start = end = end_of_line(listener.end)
    else:
        start, end = key.start - key.column + 1, end_of_line(value.end)
        new[0] = new[0][:-1] + text[value.end : end]
        if entries and text.startswith("-", value.start):
            start = at = value.start - value.column + 1
            margin = " " * (value.column - 1)
            kept = {}
            for item in value.value:
                kept[repr(item.plain())] = text[at : end_of_line(item.end)]
                at = end_of_line(item.end)
            new = [
                kept.get(repr(entry)) or "\n".join([*yaml_items(margin, [entry]), ""]) for entry in entries
            ]
    return (text[:start] + re.sub("\r?\n", line_break, "".join(new)) + text[end:]).removesuffix(line_break)


def difference_of(old: str, new: str) -> str:
    """The lines that an edit changes, and no others: of a list of rules, none holds a password."""
    import difflib

    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "\n".join([*lines][2:])


def replace_text(path: str, old: str, new: str) -> None:
    """Write a config anew in one step. ConflictError when it is not as it was read."""
    path = os.path.realpath(path)  # a symbolic link stays one
    if read_config(path) != old:
        raise ConflictError(
            "The config was changed by something else since it was read; nothing was written.",
            hint="Look again: your choice of rules is kept and put on top of what is there now.",
        )
    hint = "Copy the YAML, or make the file and its directory writable."
    with explained("The config cannot be written", hint, ConfigError):
        status = os.stat(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "you may not write to it")
        write_whole(path, new, status.st_mode & 0o7777)
        if os.geteuid() == 0:
            os.chown(path, status.st_uid, status.st_gid)


# Databases: read only, with a limit on every look


AUDIT_QUERY_SECONDS = 20
AUDIT_LOOK_SECONDS = 60.0  # whatever happens: a VM can go without a word
AUDIT_DRIVERS = {"postgresql": "psycopg2", "mysql": "pymysql"}

# Schema, table, column, type, and the table as statements name it.
_COLUMNS = {
    "postgresql": """
SELECT table_schema, table_name, column_name, data_type, format('%I.%I', table_schema, table_name)
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema NOT IN ('information_schema', 'pg_catalog') AND table_type = 'BASE TABLE'
ORDER BY table_schema, table_name, ordinal_position""",
    "mysql": """
SELECT table_schema, table_name, column_name, column_type, concat('`', replace(table_name, '`', '``'), '`')
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = database() AND table_type <> 'VIEW'
ORDER BY table_schema, table_name, ordinal_position""",
    "sqlite": """
SELECT 'main', m.name, p.name, p.type, '"' || replace(m.name, '"', '""') || '"'
FROM sqlite_master m JOIN pragma_table_info(m.name) p
WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite^_%' ESCAPE '^' ORDER BY m.name, p.cid""",
}

# Prints the rows that a statement gives, as texts of 200 characters at most. It runs where the database can
# be reached, and ends with 1 where the statement failed, 2 where the database let nobody in, 3 where none
# answered. A file that cannot be locked is read as one that nobody changes.
_READER = r"""
import json, os, re, sys, urllib.parse

kind, login, statement, seconds, modules = json.load(sys.stdin)
sys.path += modules
limits = {
    "postgresql": "SET TRANSACTION READ ONLY; SET statement_timeout = '%ss'" % seconds,
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = 1",
}

def connect(mode):
    if kind == "postgresql":
        import psycopg2
        own = dict(gssencmode="disable", client_encoding="UTF8", connect_timeout=10)
        return psycopg2.connect(**dict(own, **login))
    if kind == "mysql":
        import pymysql
        own = dict(charset="utf8mb4", connect_timeout=10, read_timeout=seconds)
        return pymysql.connect(**dict(own, **login))
    if kind != "sqlite":
        sys.exit("audit-ui cannot look into databases of the type " + kind)
    import sqlite3
    path = login["database"]
    if not os.path.isfile(path):
        raise ValueError("there is no file " + path)
    name = "file:" + urllib.parse.quote(os.path.abspath(path)) + mode
    connection = sqlite3.connect(name, uri=True)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection

def text(value):
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "(binary)"
    if isinstance(value, (dict, list)):
        value = json.dumps(value, default=str)
    return value if value is None else str(value)[:200]

problem = None
for mode in ("?mode=ro", "?mode=ro&immutable=1") if kind == "sqlite" else ("",):
    connected = False
    try:
        connection = connect(mode)
        connected = True
        cursor = connection.cursor()
        cursor.execute(limits[kind])
        cursor.execute(statement)
        rows = [[text(value) for value in row] for row in cursor.fetchall()]
        connection.close()
        sys.exit(print(json.dumps(rows)))
    except Exception as error:
        said = str(error.args[-1] if error.args else error).strip()
        refusal = re.search("(?:FATAL|ERROR): +(.*)", said)
        number = error.args[0] if len(error.args) > 1 else 0
        away = not refusal and number in (0, 2003, 2006, 2013, 2055)
        words = refusal.group(1) if refusal else said.partition("\n")[0]
        problem = problem or (words.rstrip("."), 1 if connected else 3 if away else 2)
sys.stderr.write(problem[0])
sys.exit(problem[1])
"""


class DatabaseError(SandboxError):
    """A database does not answer or refuses; the message has its words."""

    code = "database"


class Database:
    """The database of a `db` listener as it is reached from here; every look is a process of its own.

    kind: its db_type; login: its host, port, user, password and name, as drivers call them, and further
    options; tunnel: the way to it, None for a direct one; sandbox: whose VM has the file of SQLite, None for
    one here; rules: those that stand in the listener.
    """

    def __init__(self, name: str, listener: Json, sandbox: Sandbox | None = None, **options: str) -> None:
        usual_port, usual_user = (3306, "root") if listener["db_type"] == "mysql" else (5432, "postgres")
        self.name = name
        self.kind: str = listener["db_type"]
        self.file = database = listener["db_database"]
        self.login: Json = {
            "host": listener.get("db_host") or "127.0.0.1",
            "port": whole_number(listener.get("db_port")) or usual_port,
            "user": listener.get("db_user") or usual_user,
            "password": listener.get("db_password") or "",
            "database": database,
            **options,
        }
        schema: str = listener.get("db_schema") or listener.get("schema_name") or "public"
        self.schema = {"mysql": database, "sqlite": "main"}.get(self.kind, schema)
        self.audit_table = listener.get("audit_table_name") or "audit_log"
        self.rules = as_list(listener.get(RULES_KEY))
        self.sandbox = sandbox
        self.tunnel: Tunnel | None = None
        if sandbox and self.kind in AUDIT_DRIVERS:
            self.tunnel = Tunnel(sandbox, name, self.login["port"])

    def tables(self) -> Json:
        """The rows of _COLUMNS, by the names that rules have for tables; without what the worker fills."""
        found: Json = {}
        for row in self.query(_COLUMNS.get(self.kind)):
            name = f"{row[0]}.{row[1]}".removeprefix(f"{self.schema}.")
            found.setdefault(name, []).append(row)
        found.pop(self.audit_table, None)
        return found

    def examples(self, columns: Sequence[Any]) -> Json:
        """A few values of each column of a table."""
        rows = self.query(f"SELECT * FROM {columns[0][4]} LIMIT 20")  # noqa: S608  (quoted)
        return dict(zip((column[2] for column in columns), zip(*rows)))

    def query(self, statement: str | None) -> list[Any]:
        """The rows of a statement, which can read only. DatabaseError, NetworkError, TimedOutError."""
        import json

        login = dict(self.login)
        asked = [self.kind, login, statement, AUDIT_QUERY_SECONDS, sys.path]
        words = ["-I", "-c", _READER]

        def feed(stdin: Any) -> None:
            stdin.write(json.dumps(asked).encode())

        if self.tunnel:
            login.update(host="127.0.0.1", port=self.tunnel.port)
        if self.kind == "sqlite" and self.sandbox:
            login["database"] = os.path.join(default_target(self.sandbox.state), self.file)
            script = shell_words(["python3", *words])
            outcome = Vm(self.sandbox, "ssh").outcome(script, feed, AUDIT_LOOK_SECONDS)
        else:
            command = [sys.executable, *words]
            outcome = run_program(command, Reporter(), seconds=AUDIT_LOOK_SECONDS, feed=feed)
        if not outcome.code:
            return as_list(json.loads(outcome.stdout))
        said, hint = last_words(outcome.stderr), None
        if outcome.code in (2, 3):
            hint = "Correct its address (in the config, or --database-url), or: plato-sandbox start-services"
        if outcome.code == 3 and self.tunnel:
            self.tunnel.connect().close()  # if it is the gateway, it says so
            said = f"it does not answer on port {self.login['port']} of the VM"
        raise DatabaseError(f"The database could not be read: {said}.", hint=hint)


def check_audit_packages() -> None:
    """SandboxError with the command that installs what is missing, before anything is started."""
    import importlib.util

    for name in ("streamlit", *AUDIT_DRIVERS.values()):
        if importlib.util.find_spec(name) is None:
            command = f"{shell_words([sys.executable])} -m pip install streamlit psycopg2-binary pymysql"
            raise SandboxError(f"audit-ui needs {name}, which this Python does not have: {command}")


_DATABASE_URL = re.compile(
    r"(postgres|mysql|mariadb|sqlite)(?:ql)?(?:\+\w+)?:"
    r"//(?:([^:/]*)(?::(.*))?@)?(?:\[(.*)\]|([^:/]*))(?::(\d+))?/([^?]+)(?:\?(.*))?"
)


def database_url(url: str, environment: Mapping[str, str]) -> tuple[Json, Json]:
    """The fields of a listener and the connection's options. UsageError for anything else.

    postgresql://user@host:port/database?sslmode=require, mysql://.., mariadb://.., sqlite:///path/of/file.
    A password that it leaves out comes from PGPASSWORD or MYSQL_PWD.
    """
    import urllib.parse

    match = _DATABASE_URL.fullmatch(url)
    if not match:
        raise UsageError(
            "--database-url is not the address of a database that can be read.",
            hint="It looks like postgresql://user@host:5432/database (?sslmode=.. and ?sslrootcert=.. may"
            " follow), mysql://user@host:3306/database or sqlite:///path/of/file.",
        )
    scheme, user, password, *host, port, database = map(urllib.parse.unquote, match.groups("")[:7])
    kind = {"postgres": "postgresql", "mariadb": "mysql"}.get(scheme, scheme)
    fields = {
        "db_type": kind,
        "db_host": "".join(host),
        "db_port": port,
        "db_user": user,
        "db_password": password or environment.get("PGPASSWORD" if kind == "postgresql" else "MYSQL_PWD"),
        "db_database": os.path.abspath(database) if kind == "sqlite" else database,
    }
    return fields, dict(urllib.parse.parse_qsl(match[8]))


class Tunnel:
    """A port of 127.0.0.1 that leads through the gateway to a port of a VM, as long as this process lives.

    name: under which it is told what went wrong with a connection; there: the port; port: here, 0 for any.
    """

    def __init__(self, sandbox: Sandbox, name: str, there: int, port: int = 0) -> None:
        import socket

        self.sandbox = sandbox
        self.target = f"{sandbox.state['job_id']}--{there}"
        self.name = name
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        Aside(self._serve)

    def connect(self) -> ssl.SSLSocket:
        """A connection to the gateway that leads there. NetworkError when it does not give one."""
        return vm_port(self.sandbox.settings.gateway, self.target, time.monotonic() + 10.0)

    def _told(self, words: str) -> None:
        self.sandbox.reporter.note(f"{self.name}: {words}")

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            Aside(partial(self._carry, near))

    def _carry(self, near: socket.socket) -> None:
        import ssl

        with near:
            try:
                with self.connect() as far:
                    if not _relay(far, near.fileno(), near.fileno()):
                        self._told("the VM's side ended it without a word; does something listen there?")
            except SandboxError as error:
                self._told(reason(error))
            except ssl.SSLZeroReturnError:
                pass  # the VM's side has ended it
            except OSError as error:
                self._told(f"it broke off ({reason(error)}); the next one is a new one")


# What a visitor of the page has before them


# What a page shows: databases; `read_changes` gives the mutations that Plato tells now of a listener, or None
# without a sandbox; config: whose rules are edited, in the file at its path if it has one; url: of the
# application.
AuditPlan = collections.namedtuple(  # noqa: PYI024  (`typing` is not imported)
    "AuditPlan", "databases read_changes config url"
)


class Visit:
    """What one visitor has of one listener: its tables, what changed, the rules in the file and those chosen.

    known: whether Plato tells what changed; recorded: whether that is what happened during a recording;
    recording: what had changed before one. text: of the config, None without one; saved: the rules in it.
    troubles: why something could not be read. base: the rules saved, as ticks; ticks: those chosen; drawn:
    what the grid was drawn with.
    """

    def __init__(self, plan: AuditPlan, database: Database, _visitor: str) -> None:
        self.plan = plan
        self.database = database
        self.name, self.schema = database.name, database.schema
        self.saved = database.rules  # where no file has others
        self.ticks: set[Tick] = set()
        self.drawn = self.base = self.ticks
        self.turn = 0
        self.recording: Sequence[Mutation] | None = None
        self.look()

    def look(self) -> None:
        """Read everything anew; choices that were made stay, on top of what the file has now."""
        changes = Aside(lambda: self.plan.read_changes(self.name))
        self.troubles: dict[str, SandboxError] = {}
        self.examples = cache(lambda name: self.database.examples(self.tables[name]))
        self.tables: Json = self._try("tables", self.database.tables) or {}
        self.text: str | None = self._try("config", self._read_rules)
        found = self._try("changes", changes.result)
        self.known = found is not None
        self.changes = Changes(found or [], self.schema)
        self.recorded = False
        before, self.base = self.base, {tick for entry in self.saved for tick in ticks_of(entry, self.schema)}
        self.choose((self.base - (before - self.ticks)) | (self.ticks - before))

    def _try(self, what: str, work: Act) -> Any:
        """What comes of some work; None when nothing does, and why is in `troubles`."""
        try:
            return work()
        except SandboxError as error:
            self.troubles[what] = error
        return None

    def _read_rules(self) -> str:
        """The text of the config, once the rules in it are `saved`."""
        config = self.plan.config
        if not config.path:
            raise ConfigError("There is no plato-config.yml here to save to; copy the YAML instead.")
        text = read_config(config.path)
        listener = listener_node(text, os.path.basename(config.path), config.dataset, self.name)
        self.saved = as_list(listener.plain().get(RULES_KEY))
        return text

    def choose(self, ticks: set[Tick]) -> None:
        """Choose these rules, and have the grid drawn with them."""
        self.ticks = ticks
        self.turn += 1

    def save(self, tell: Callable[..., object], edited: str, entries: list[Any]) -> None:
        """Write rules into the file, whose text they make this, and tell how that went."""
        try:
            replace_text(self.plan.config.path, self.text or "", edited)
        except SandboxError as error:
            tell(_error_text(error), icon=":material/error:", duration="long")
        else:
            self.text, self.saved, self.base = edited, entries, self.ticks
            tell("Saved. `start-worker --wait` gives the rules to the worker.", duration="long")

    def record(self) -> None:
        """Note what has changed so far, or show what happened since that was done."""
        earlier = self.recording
        self.look()
        if self.known and earlier is None:
            self.recording = self.changes.mutations
        elif self.known:
            happened = new_mutations(earlier or [], self.changes.mutations)
            self.changes, self.recorded, self.recording = Changes(happened, self.schema), True, None

    def grid(self, only_changed: bool, words: str) -> dict[Tick, Json]:
        """A row for each table and one for each column, what changed most first.

        only_changed: no others, but for those with a rule; words: only those with a name that has them in it.
        """
        happened = self.changes.of
        counts = collections.Counter({place: len(found) for place, found in happened.items()})
        kinds: dict[Tick, str] = {}
        for table, columns in self.tables.items():
            kinds[table, WHOLE] = ""
            kinds.update(((table, column[2]), column[3]) for column in columns)
        for place in sorted({*happened, *self.drawn}):
            kinds.setdefault(place, "not in the database" if self.tables else "")
        places = sorted(kinds, key=lambda at: (-counts[at[0], WHOLE], at[0], at[1] != WHOLE, -counts[at]))
        return {
            place: {
                "Ignore": place in self.drawn,
                "Table": printable(place[0]),
                "Column": printable(place[1]) or "(whole table)",
                "Changes": counts[place],
                "What happened": change_text(happened[place][0], place[1]) if place in happened else "",
                "Type": kinds[place],
            }
            for place in places
            if (place in happened or place in self.drawn or not only_changed)
            and any(words in name.lower() for name in place)
        }


_visit = cache(Visit)


# The page: drawn by Streamlit, top to bottom, each time something is clicked

_AUDIT_STYLE = """
<style>
[data-testid="stMainBlockContainer"] { max-width: 72rem; padding-top: 2.5rem; padding-bottom: 1rem; }
[data-testid="stMainBlockContainer"] h1 { font-size: 2rem; padding-bottom: 0; }
button[data-testid="stBaseButton-primary"] { background: #3b70c4; border-color: #3b70c4; }
button[data-testid="stBaseButton-primary"]:hover { background: #2f5ea8; border-color: #2f5ea8; }
div:has(> .st-key-save) { position: sticky; bottom: 0; padding: .8rem 0 1.2rem; z-index: 9;
  backdrop-filter: blur(16px); }
</style>
"""
_AUDIT_COLUMNS = {
    "Ignore": {"width": "small"},
    "Changes": {"width": "small", "type_config": {"type": "number", "format": "localized"}},
    "What happened": {"width": "large"},
}
# A picture in the language of Vega-Lite: the tables that changed most, what the rules hide of that in a
# fainter shade.
_AUDIT_CHART = """{
    "transform": [
        {"joinaggregate": [{"op": "sum", "field": "changes", "as": "all"}], "groupby": ["table"]},
        {"window": [{"op": "dense_rank", "as": "rank"}],
            "sort": [{"field": "all", "order": "descending"}, {"field": "table"}]},
        {"filter": "datum.rank <= 10"}],
    "encoding": {"y": {"field": "table", "type": "nominal", "title": null,
        "sort": {"field": "rank", "op": "min"},
        "axis": {"ticks": false, "domain": false, "labelLimit": 260, "labelPadding": 12,
            "labelFontSize": 14}}},
    "layer": [
        {"mark": {"type": "bar", "height": 13, "cornerRadius": 2}, "encoding": {
            "x": {"field": "changes", "type": "quantitative", "aggregate": "sum", "axis": null},
            "color": {"field": "kind", "type": "nominal",
                "scale": {"domain": ["inserted", "updated", "deleted", "other"],
                    "range": ["#2f9e68", "#4b83d6", "#d2574d", "#8a8f98"]},
                "legend": {"title": null}},
            "opacity": {"field": "rules", "type": "nominal",
                "scale": {"domain": ["remaining", "hidden by the rules"], "range": [1, 0.28]},
                "legend": {"title": null, "values": ["hidden by the rules"], "symbolFillColor": "#8a8f98"}}}},
        {"mark": {"type": "text", "align": "left", "dx": 8, "fontSize": 13, "color": "#8a8f98"}, "encoding": {
            "x": {"field": "changes", "type": "quantitative", "aggregate": "sum"},
            "text": {"field": "changes", "type": "quantitative", "aggregate": "sum", "format": ","}}}],
    "title": {"text": "What changed most", "anchor": "start", "frame": "group", "fontSize": 14,
        "fontWeight": "normal", "offset": 12},
    "height": {"step": 28},
    "padding": {"bottom": 0, "left": 0, "top": 0, "right": 0},
    "config": {"view": {"stroke": null}, "legend": {"orient": "bottom", "offset": 8, "symbolOpacity": 1}}
}"""


def bars_of(changes: Changes, ticks: set[Tick]) -> list[Json]:
    """What the picture is drawn of."""
    left = changes.remaining(ticks)
    return [
        {
            "table": printable(what[0]),
            "kind": what[1],
            "rules": "remaining" if what in left else "hidden by the rules",
            "changes": number,
        }
        for what, number in changes.kinds.items()
    ]


def show_audit_page(plan: AuditPlan) -> None:
    """Draw the page for whoever looks at it; a choice outlives a reload by a word in the page's address."""
    import secrets

    st: Any = __import__("streamlit")
    config = plan.config
    st.set_page_config(page_title="Ignore rules", layout="wide")
    st.html(_AUDIT_STYLE)
    token = st.query_params.setdefault("visit", secrets.token_hex(8))
    st.title("Ignore rules")
    number, every = 0, plan.databases
    if len(every) > 1:
        names = [_markdown(database.name) for database in every]
        number = st.radio("Listener", range(len(names)), 0, names.__getitem__, horizontal=True)
    database = every[number]
    with st.spinner("Looking at the database and at what changed ..."):
        visit = _visit(plan, database, token)
    place = f"{config.service} · dataset {config.dataset} · " if config.path else ""
    place += f"database {os.path.basename(database.file)}"
    st.caption(_markdown(f"{place} · {counted(len(visit.tables), 'table')}"))
    _show_controls(st, visit)
    numbers = st.container()  # they are of what is ticked in the grid
    _show_grid(st, visit)
    with numbers:
        _show_changes(st, visit)
    _show_rules(st, visit)


def _show_controls(st: Any, visit: Visit) -> None:
    recording = visit.recording is not None
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Look again", icon=":material/refresh:", on_click=visit.look)
        if visit.known or recording:
            st.button(
                "Stop and show what happened" if recording else "Record",
                icon=":material/radio_button_checked:",
                type="primary" if recording else "secondary",
                on_click=visit.record,
            )
        if recording:
            where = visit.plan.url or ""
            st.markdown(f":red[●] Recording. Do something in the application, then stop. {where}")
        elif visit.recorded:
            st.caption("Only what happened during the recording; “Look again” shows all changes")


def _show_changes(st: Any, visit: Visit) -> None:
    """How much changed, and how much of it the rules hide."""
    import json

    trouble = visit.troubles.get("tables") or visit.troubles.get("changes")  # one thing at a time
    if trouble:
        st.warning(_error_text(trouble), icon=":material/database_off:")
    if not visit.known:
        return
    changes = visit.changes
    total = sum(changes.kinds.values())
    left = sum(changes.remaining(visit.ticks).values())
    numbers = {"Changes": total, "Hidden by the rules": total - left, "Remaining": left}
    with st.container(horizontal=True, gap="large"):
        for label, number in numbers.items():
            st.metric(label, f"{number:,}", width="content")
    if total:
        st.vega_lite_chart(bars_of(changes, visit.ticks), json.loads(_AUDIT_CHART))
    if not left:
        words = "The rules hide every change: `state -v` would pass." if total else "Nothing changed."
        st.success(words, icon=":material/check_circle:")


def _show_grid(st: Any, visit: Visit) -> None:
    """The tables and columns to be ticked, and what can be seen of one of them."""
    with st.container(horizontal=True, vertical_alignment="center"):
        only = st.toggle("Only what changed", bool(visit.changes.kinds))
        hint = "Search: part of a table's or a column's name"
        words = st.text_input("Search", placeholder=hint, label_visibility="collapsed").strip().lower()
    key = repr((visit.name, visit.turn, only, words))
    if key not in st.session_state:  # it was not drawn in the last run
        visit.drawn = visit.ticks
    rows = visit.grid(only and not words, words)
    if rows:
        ticked = st.data_editor(
            list(rows.values()),
            key=key,
            hide_index=True,
            height=min(460, 38 + 35 * len(rows)),
            disabled=["Table", "Column", "Changes", "What happened", "Type"],
            column_config=_AUDIT_COLUMNS,
        )
        chosen = {place for place, row in zip(rows, ticked) if row["Ignore"]}
        visit.ticks = visit.drawn - rows.keys() | chosen
    else:
        st.caption("Nothing here has such a name." if words else "There are no tables.")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        more, label = visit.changes.noise(visit.ticks), "Ignore all that remains"
        if words:
            more = {place for place in rows if words in place[1].lower()} - visit.ticks
            label = f"Ignore {counted(len(more), 'column')}"
        if more:
            st.button(label, on_click=visit.choose, args=(visit.ticks | more,))
        name = st.selectbox("Look into a table", list(visit.tables), None, printable)
    if name:
        try:
            st.dataframe(visit.examples(name), hide_index=True)
        except SandboxError as error:
            st.warning(_error_text(error))


def _show_rules(st: Any, visit: Visit) -> None:
    """The rules, and the way into the file, which stays in view while there is something to save."""
    config = visit.plan.config
    name = os.path.basename(config.path)
    entries = entries_with(visit.saved, visit.ticks, visit.schema)
    st.code(rules_text(entries), language="yaml")
    try:
        if visit.text is None:
            raise visit.troubles["config"]
        if entries == visit.saved:
            st.caption(f"{_markdown(name)} has these rules.")
            return
        edited, shared = edit_rules(visit.text, name, config.dataset, visit.name, entries)
    except SandboxError as error:
        st.info(_error_text(error))
        return
    st.code(difference_of(visit.text, edited), language="diff")
    with st.container(key="save", horizontal=True, vertical_alignment="center"):
        save = (st.toast, edited, entries)
        st.button(f"Save to {_markdown(name)}", type="primary", on_click=visit.save, args=save)
        st.button("Discard", on_click=visit.choose, args=(visit.base,))
        if shared:
            st.caption(f"The same list, so they change too: {_markdown(', '.join(shared))}")


def _markdown(text: str) -> str:
    """Text from outside that Streamlit's Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|$:~])", r"\\\1", printable(text))


def _error_text(error: SandboxError) -> str:
    """An error and its hint, for the page."""
    return "  \n".join(_markdown(part) for part in (str(error), error.hint) if part)


# The server: Streamlit in this process


STREAMLIT_OPTIONS = {
    "server.address": "127.0.0.1",
    "server.fileWatcherType": "none",
    "server.headless": True,
    "browser.gatherUsageStats": False,
    "browser.serverAddress": "127.0.0.1",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showSidebarNavigation": False,
    "global.developmentMode": False,
    "runner.magicEnabled": False,
    "logger.level": "error",
}


def serve_page(draw: Act, port: int, ready: Act) -> None:
    """Serve a page until an interruption. ready: called once the page can be asked for."""
    import asyncio
    import tempfile

    streamlit: Any = __import__("streamlit.web.bootstrap")
    bootstrap = streamlit.web.bootstrap
    bootstrap.load_config_options({**STREAMLIT_OPTIONS, "server.port": port})
    streamlit.draw_audit_page = draw

    async def serve(script: str) -> None:
        server = bootstrap.Server(script, False)
        await server.start()
        ready()
        await server.stopped

    Aside(partial(__import__, "pandas"))  # the first page needs it
    with tempfile.TemporaryDirectory() as place:
        script = os.path.join(place, "page.py")  # Streamlit runs a file anew at each click
        with open(script, "w", encoding="utf-8") as file:
            file.write("import streamlit\nstreamlit.draw_audit_page()\n")
        # Not in this thread: an event loop would keep the interruption to itself.
        Aside(lambda: asyncio.run(serve(script))).result()


def free_port(wanted: int | None) -> int:
    """The wanted port of 127.0.0.1, or any free one where that is taken or none is wanted."""
    import socket

    number_in("--port", wanted or 1, 1, 65535)
    for port in (wanted or 0, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as server:
            return int(server.getsockname()[1])
    raise SandboxError("No port of 127.0.0.1 could be opened for the page.")


# ----------------------------------------------------------------------------------------------------------
# sandbox: what can be done with a sandbox, as operations; the commands and importers are thin over this
# ----------------------------------------------------------------------------------------------------------


def plan_start(
    directory: str,
    *,
    from_config: bool = False,
    simulator: str = "",
    artifact_id: str = "",
    blank: bool = False,
    dataset: str = "",
    tag: str = "",
    **options: Any,
) -> tuple[Json, Json, Config | None]:
    """What the options of `start` ask for. Reads the config, changes nothing.

    Returns the `envs[]` entry of `make`, the first fields of .sandbox.yaml, and the config in config mode.
    UsageError for options that do not fit together, ConfigError for a config with problems.
    """
    wanted = {"from-config": from_config, "simulator": simulator, "artifact-id": artifact_id, "blank": blank}
    modes = [name for name, value in wanted.items() if value]
    if len(modes) != 1:
        raise UsageError(
            "Choose one mode, and only one: --from-config, --simulator, --artifact-id or --blank.",
            hint="In a simulator's directory: plato-sandbox start --from-config",
        )
    for option, value in {"dataset": dataset, "tag": tag, **options}.items():
        fitting = _OPTION_MODES.get(option, ("blank",))
        if value not in (None, "") and modes[0] not in fitting:
            words = f"--{option} goes with {' and '.join('--' + name for name in fitting)} only."
            raise UsageError(words, hint="A lifetime is --lifetime SECONDS." if option == "tag" else None)
    if from_config:
        config = load_config(find_config(directory), dataset)
        problems = what_is_wrong(config)
        if problems:
            raise unusable_config(shown_here(config.path), problems)
        return _plan_from_config(config)
    if simulator:
        return _plan_from_simulator(simulator, tag, dataset)
    if artifact_id:
        record = {"mode": "artifact", "artifact_id": artifact_id, "dataset": DEFAULT_DATASET}
        return {"type": "artifact", "artifact_id": artifact_id}, record, None
    return _plan_blank(**options)


_OPTION_MODES = {"dataset": ("from-config", "simulator"), "tag": ("simulator",)}


def _plan_from_config(config: Config) -> tuple[Json, Json, Config]:
    numbers = {name: whole_number(config.compute.get(name)) for name in schemas()["dataset"]["compute"]}
    sizes = without_none(numbers)
    record = {
        "mode": "config",
        "service": config.service,
        "dataset": config.dataset,
        "plato_config_path": config.path,
        **{name: numbers[name] for name in (*VM_SIZES, "app_port")},
    }
    return {"type": "resource", "simulator": config.service, "sim_config": sizes}, record, config


def _plan_from_simulator(simulator: str, tag: str, dataset: str) -> tuple[Json, Json, None]:
    match = re.fullmatch(r"([^:@\s]+)(?::([^@]+))?(?:@(.+))?", simulator)
    if not match:
        raise UsageError(
            f"--simulator is {simulator!r}; it must be a name, NAME:TAG, NAME:ARTIFACT-UUID or"
            " NAME:VERSION@DATASET.",
            hint="For example: --simulator espocrm:prod-latest",
        )
    name, version, named_dataset = match.groups()
    other_tag = tag and (named_dataset or version not in (None, tag))
    if other_tag or (named_dataset and dataset not in ("", named_dataset)):
        words = (
            f"--simulator {simulator!r} chooses what --tag or --dataset chooses too; leave one of them out."
        )
        raise UsageError(words)
    chosen = named_dataset or dataset or DEFAULT_DATASET
    record = {"mode": "artifact", "simulator": simulator, "service": name, "dataset": chosen}
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", version or ""):
        return {"type": "artifact", "artifact_id": version}, {**record, "artifact_id": version}, None
    environment = {"type": "simulator", "simulator": name, "dataset": chosen}
    if named_dataset and version:
        return {**environment, "version": version}, record, None
    which = {"tag": version or tag or DEFAULT_TAG}
    return {**environment, **which}, {**record, **which}, None


VM_SIZES = {"cpus": DEFAULT_CPUS, "memory": DEFAULT_MEMORY_MB, "disk": DEFAULT_DISK_MB}


def _plan_blank(service: str = "", **sizes: int | None) -> tuple[Json, Json, None]:
    if not service:
        raise UsageError(
            "--blank needs --service NAME.", hint="For example: plato-sandbox start --blank --service myapp"
        )
    if not re.fullmatch(SERVICE_NAME, service):
        raise UsageError(f"--service is {service!r}; it may hold letters, digits, '.', '_' and '-' only.")
    chosen = {**VM_SIZES, **without_none(sizes)}
    for name, size in chosen.items():
        wrong = _unlike(size, schemas()["dataset"]["compute"][name])
        if wrong:
            raise UsageError(f"--{name} is {size}; {wrong}.")
    environment = {"type": "resource", "simulator": service, "sim_config": chosen}
    return environment, {"mode": "blank", "service": service, **chosen}, None


def with_router_target(url: str, service: Any) -> str:
    """The address for a browser: the public URL with `_plato_router_target` (api notes)."""
    if not service:
        return url
    import urllib.parse

    target = urllib.parse.quote(f"{service}.web.plato.so", safe="")
    return f"{url}{'&' if '?' in url else '?'}_plato_router_target={target}"


class Sandbox:
    """The sandbox of a directory: at most one, recorded in its .sandbox.yaml.

        with Sandbox.start("simulator/", from_config=True) as sandbox:
            print(sandbox.state["url"])

    Leaving the block stops it. `Sandbox("simulator/")` is the one that is already there.
    state: the fields of .sandbox.yaml as a dict, {} without a sandbox.
    """

    def __init__(
        self, directory: str = ".", *, settings: Settings | None = None, reporter: Reporter | None = None
    ) -> None:
        with explained("The current directory cannot be used", "Go to another one.", UsageError):
            self.directory = os.path.abspath(directory)
        if not os.path.isdir(self.directory):
            raise UsageError(f"{shown_path(self.directory)} is not a directory.")
        self.settings = settings or Settings.from_environment()
        self.reporter = reporter or Reporter()
        self.api = PlatoApi(self.settings, self.reporter)
        self.state: Json = {}

    def silent(self, directory: str = "") -> Sandbox:
        """One with the same settings, here or elsewhere, for another thread or for what is nobody's news."""
        return Sandbox(directory or self.directory, settings=self.settings)

    @classmethod
    def start(
        cls,
        directory: str = ".",
        *,
        replace: bool = False,
        reset: bool = True,
        timeout: float = DEFAULT_READY_SECONDS,
        lifetime: int = DEFAULT_LIFETIME_SECONDS,
        idle: int | None = None,
        send_code: str = "",
        settings: Settings | None = None,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> Sandbox:
        """Create a VM and return when it is ready, reset, and reachable by SSH.

        options: what it is made of (from_config, simulator, artifact_id, blank, dataset, tag, service, cpus,
        memory and disk in MB). timeout: seconds until it must be ready; lifetime: until it ends; idle: until
        it ends because nothing used it. replace: stop a live one first. send_code: bring the config's code
        over meanwhile, as `start_services` does with that `via`. Whatever fails until the VM is ready closes
        it again; what it can live without (its network, the reset, SSH) is a warning. Any SandboxError.
        """
        sandbox = cls(directory, settings=settings, reporter=reporter)
        environment, record, config = plan_start(sandbox.directory, **options)
        patience = number_in("--timeout", timeout, 1, WEEK_SECONDS)
        lifetime = int(number_in("--lifetime", lifetime, 1, WEEK_SECONDS))
        record["idle_seconds"] = idle and int(number_in("--idle", idle, 1, WEEK_SECONDS))
        ahead = partial(send_ahead, sandbox, config, send_code, patience) if send_code and config else None
        sandbox.settings.require_key()
        for warning in config.warnings if config else ():
            sandbox.reporter.warn(warning)
        with locked(sandbox.directory), SignalGuard(sandbox.reporter) as guard:
            home = sandbox.settings.home
            make_home(home)
            state = {**ssh_fields(home, "x"), "session_id": "x", "job_id": "x"}
            ssh_config_text(sandbox.settings, state)  # refuses odd paths
            end_what_is_here(sandbox, replace)
            try:
                # From the request to the record of its answer no signal is obeyed at once.
                guard.held = True
                answer = create_vm(sandbox, environment, record, lifetime)
                record_vm(sandbox, answer)
                guard.release()
                bring_up_vm(sandbox, patience, reset, ahead)
            except BaseException as error:
                guard.held = False
                if sandbox.state.get("session_id"):
                    undo_start(sandbox, error)
                elif isinstance(error, SandboxError) and not isinstance(error, UnknownOutcomeError):
                    remove_state(sandbox.directory)
                raise
            finally:
                sandbox.api.hang_up()
        return sandbox

    def __enter__(self) -> Sandbox:  # noqa: PYI034  (Self is newer than 3.9)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # The record

    def load(self) -> Json:
        """Read .sandbox.yaml into `state`. NoSandboxError without one, ConflictError for another Plato's."""
        state = load_state(self.directory)
        if not state:
            hint = "Start one: plato-sandbox start --from-config (or --simulator, --artifact-id, --blank)"
            above = self.directory
            while above != "/":
                above = os.path.dirname(above)
                if os.path.lexists(state_path(above)):
                    hint = f"There is one in {shown_path(above)}; go there, or name it with -w DIR."
                    break
            raise NoSandboxError(f"There is no sandbox in {shown_path(self.directory)}.", hint=hint)
        self._check_base_url(state)
        if state.get("attached"):
            raise ConflictError(
                "The VM here is in a session that has other VMs too, and this tool would end them all.",
                hint="Use `plato sandbox`, which attached it to that session.",
            )
        if "slot_path" in state and "ssh_private_key_path" in state:  # their config could run anything here
            state = {**ssh_fields(self.settings.home, state["session_id"]), **state}
        if not self.state:
            self._tell_of_copy(state)
        self.state = state
        return state

    def _tell_of_copy(self, state: Json) -> None:
        """Warn when the directory is a copy of another one that still has the same sandbox."""
        theirs = state.get("directory") or self.directory
        with suppress(OSError, SandboxError):
            is_copy = not os.path.samefile(theirs, self.directory)
            if is_copy and as_dict(load_state(theirs)).get("session_id") == state.get("session_id"):
                self.reporter.warn(
                    f"{shown_path(self.directory)} is a copy of {shown_path(theirs)}: both have the same"
                    " sandbox, and `stop` ends it for both."
                )

    def _check_base_url(self, state: Json) -> None:
        theirs = state.get("base_url") or DEFAULT_BASE_URL
        # `plato` 2.0.x records neither an end nor its base URL, and newer ones no base URL.
        untold = "base_url" not in state and ("expires_at" not in state or "slot_path" in state)
        if theirs != self.settings.base_url and not untold:
            raise ConflictError(
                f"The sandbox of {shown_path(self.directory)} belongs to {theirs},"
                f" but PLATO_BASE_URL is {self.settings.base_url}.",
                hint="Set PLATO_BASE_URL to the sandbox's Plato. No file decides where the API key is sent.",
            )

    def save(self, **changes: Any) -> None:
        """Change fields of the state (None removes one) and write .sandbox.yaml.

        Another client's record learns of a new artifact alone, since its other tools look for that there.
        """
        self.state = without_none({**self.state, **changes})
        if "slot_path" not in self.state:
            save_state(self.directory, self.state)
        elif "artifact_id" in changes:
            update_slot(self.state, artifact_id=changes["artifact_id"])

    def _record(self, **changes: Any) -> None:
        """Write something learned into .sandbox.yaml, unless a `start` or `stop` is at work here."""
        try:
            with locked(self.directory):
                session_id = self.state["session_id"]
                if self.load().get("session_id") == session_id:
                    self.save(**changes)
        except (ConflictError, NoSandboxError, StateError) as error:
            self.reporter.warn(f".sandbox.yaml was not updated: {error.message}")

    def check_still_there(self) -> None:
        """NoSandboxError when .sandbox.yaml does not name this sandbox any more; unreadable is no reason."""
        try:
            state = load_state(self.directory)
        except SandboxError:
            return
        if not state or state.get("session_id") != self.state.get("session_id"):
            raise NoSandboxError(
                f"The sandbox of {shown_path(self.directory)} was stopped or replaced meanwhile.",
                hint="See what is there now: plato-sandbox status",
            )

    # What the VM is doing

    def status(self) -> Json:
        """The state with what the API and the heartbeat's log say now. At most its SSH config is changed.

        Adds vm_status, vm_status_reason, vm_running, ssh_command, heartbeat (see `heartbeat_health`), ends
        (see `end_of_life`), and `error` (a SandboxError or None) when the API could not be asked or the VM is
        gone.
        """
        state = self.load()
        repair_ssh_config(state, self.settings)
        report: Json = {**state, "ssh_command": ssh_command(state)}
        report["heartbeat"] = heartbeat_health(self.settings, state)
        report.update(vm_status="unknown", vm_status_reason=None, vm_running=False, error=None)
        try:
            report.update(self._vm_status() if state.get("session_id") else self._unfinished_start())
        except SandboxError as error:
            report["vm_status"] = "gone" if isinstance(error, NoSandboxError) else "unreachable"
            report["error"] = error
        self.api.hang_up()
        return {**report, "ends": end_of_life(report)}

    def _vm_status(self) -> Json:
        details = self.api.session_details(self.state["session_id"])
        word, why = vm_status(details, self.state.get("job_id"))
        word = word or "active"
        running = word.lower() in ("running", "active", "ready", "healthy")
        error = gone_error(why) if word.lower() in TERMINAL_STATUSES else None
        return {"vm_status": word, "vm_status_reason": why, "vm_running": running, "error": error}

    def _unfinished_start(self) -> Json:
        """A record without an id: its `start` waits for Plato's answer, or died before it."""
        try:
            with locked(self.directory, shared=True):
                return {"error": unfinished_start(self.state)}
        except ConflictError as error:
            return {"vm_status_reason": error.message}

    def end_of_vm(self) -> NoSandboxError | None:
        """Ask Plato whether the VM is gone; None when it is not, or when nobody can tell."""
        try:
            return self._vm_status()["error"]  # type: ignore[no-any-return]
        except NoSandboxError as gone:
            return gone
        except SandboxError:
            return None

    # What every use of it begins and ends with

    @contextmanager
    def in_use(self, step: str = "", limit: float | None = None) -> Iterator[Json]:
        """The state of the sandbox, with a key and a living heartbeat, for the block that works with it.

        A failure in it that may mean that the VM is gone becomes NoSandboxError if Plato says so.
        """
        state = self._load_for_use()
        if step:
            self.reporter.step(step, limit)
        try:
            yield state
        except SandboxError as error:
            raise self._gone_or(error) from None
        finally:
            self.api.hang_up()

    def _load_for_use(self) -> Json:
        """The state of a sandbox that is to be used now, with a key to use it and a heartbeat.

        ConflictError while its `start` is at work; what one left that was killed is used as far as it got.
        """
        state = self.load()
        if state.get("starting"):
            with locked(self.directory, shared=True):
                pass
        if not state.get("session_id"):
            raise unfinished_start(state)
        self.settings.require_key()
        hold(heartbeat_path(self.settings.home, state["session_id"]))
        self.revive_heartbeat()
        return self.state

    def revive_heartbeat(self) -> None:
        """Start a heartbeat anew that has died, or that fails where this command's own beat does not.

        It is left to a `start` or `stop` that is at work here.
        """
        health = heartbeat_health(self.settings, self.state)
        what = {"dead": "was not running", "ending": "of the other client ends soon"}.get(health["state"])
        if not what and (health["failures"] or health["state"] == "degraded"):
            why = f": {health['last_error']}" if health["last_error"] else ""
            what = f"has had no good beat since {health['last_ok'] or 'its start'}{why}"
            if self._own_beat_fails():
                self.reporter.warn(f"The heartbeat {what}.")
                return
        if what:
            with suppress(ConflictError), locked(self.directory):
                self.load()
                make_home(self.settings.home)
                stop_heartbeat(self.settings, self.state)
                pid = self.spawn_heartbeat()
                self.reporter.warn(f"The heartbeat {what}; it was started again (PID {pid}).")

    def _own_beat_fails(self) -> bool:
        """Whether a beat with this command's settings fails too; those of a heartbeat may be older."""
        with suppress(SandboxError):
            answer = self.api.heartbeat(self.state["session_id"])
            return bool(beat_trouble(answer, self.state.get("job_id"))[0])
        return True

    def spawn_heartbeat(self) -> int:
        hold(heartbeat_path(self.settings.home, self.state["session_id"]), os.O_CREAT)
        record = self.state.get("slot_path") or state_path(self.directory)
        pid = spawn_heartbeat(self.settings, self.state, record, self.reporter)
        self.save(heartbeat_pid=pid)
        return pid

    def _gone_or(self, error: SandboxError) -> SandboxError:
        """What a failure means: one that says only that something failed leaves it to be asked."""
        unclear = type(error) in (SandboxError, ApiError, TimedOutError, WorkerNotUpError, SshError)
        if not unclear or getattr(error, "status", None) is not None:
            return error
        return self.end_of_vm() or error

    def connect_network(self) -> None:
        """Let the gateway reach the VM, which is to be ready. Any SandboxError."""
        answer = self.api.connect_network(self.state["session_id"])
        check_success(answer, self.state.get("job_id"), "The VM could not be connected to the network")

    def _config(self, path: str, dataset: str, *, stored: bool = False) -> Config:
        """The config at a path, or the one that the sandbox was started from, or that of its directory.

        stored: where there is none, that of the artifact that the VM was started from will do.
        """
        path = path or self._config_path()
        chosen = dataset or self.state.get("dataset")
        if not path and stored and self.state.get("mode") == "artifact":
            return self._stored_config(chosen or DEFAULT_DATASET)
        config = load_config(os.path.abspath(path or find_config(self.directory)), chosen)
        for warning in config.warnings:
            self.reporter.warn(warning)
        return config

    def _config_path(self) -> str:
        """The config that the sandbox was started from, or that of its directory; "" without one."""
        paths = self.state.get("plato_config_path") or "", find_config(self.directory)
        return next(filter(os.path.isfile, paths), "")

    def _stored_config(self, dataset: str) -> Config:
        """The dataset that Plato stores with the VM's artifact; ConfigError when it has none."""
        try:
            content = self.api.job_config(self.state["job_id"])
        except ApiError as error:
            if error.status != 404:
                raise
            read_config(find_config(self.directory), NO_CONFIG)  # which says that there is none
            raise
        service = self.state.get("service") or "simulator"
        text = yaml_dump({"service": service, "datasets": {dataset: content}})
        return parse_config(text, "The config that Plato stores with the artifact", "", dataset)

    # What goes to the VM

    def sync(
        self,
        path: str = ".",
        *,
        remote_path: str = "",
        watch: Callable[[Json, str], None] | None = None,
        **options: Any,
    ) -> Json:
        """Make a directory on the VM like a local one: what differs is sent, what earlier syncs put there and
        is gone here is removed, what the VM made stays.

        path: of the local directory, relative to the sandbox's.
        remote_path: default /home/plato/worktree/<service>. options: those of `Syncer` (dry_run, gitignore,
        force, via "auto", "api" or "ssh", timeout in seconds). watch: follow the tree until SIGINT, and call
        this with the report of each sync and the files that it was about.
        Returns sent, removed, unchanged (numbers of files), bytes, archive_bytes, skipped (a list of path and
        reason), seconds, via and remote_path; with dry_run the lists send and remove of paths.
        """
        with self.in_use():
            syncer = Syncer(self, path, remote_path, **options)
            return syncer.run() if watch is None else syncer.watch(watch)

    def start_services(self, *, dataset: str = "", **options: Any) -> Json:
        """Bring the code to the VM, push it to Gitea from there, and start the dataset's Compose services.

        dataset: default the sandbox's. options: those of `start_services` (via "git" or "sync", build,
        force_recreate, timeout in seconds of one `docker compose up`).
        Returns via, branch, commit, repository (its URL), path (on the VM), changed (number of files),
        services (a list of name, type, file and containers), url, app_answers (such as HTTP 200, where
        the config names its port), steps (of step and seconds) and seconds.
        """
        with self.in_use():
            return start_services(self, self._config("", dataset), **options)

    # The worker, and what it records

    def start_worker(
        self,
        *,
        service: str = "",
        dataset: str = "",
        config_path: str = "",
        wait: bool = False,
        wait_timeout: float = WORKER_SECONDS,
    ) -> Json:
        """Start the Plato worker with a dataset of a config, which goes to Plato as the user wrote it.

        wait: return when it is up; TimedOutError when it is not after wait_timeout seconds.
        Returns status, correlation_id, service, dataset and ready (None if not waited for).
        """
        with self.in_use() as state:
            config = self._config(config_path, dataset)
            chosen = service or state.get("service") or config.service
            self.reporter.step("Starting the worker", SETUP_SECONDS)
            answer = self.api.start_worker(state["job_id"], chosen, config.dataset, config.for_worker())
            self._record(plato_config_path=config.path, dataset=config.dataset)
            if wait:
                self._wait_for_worker(config, wait_timeout)
        return {
            "status": text_in(answer, "status") or "ok",
            "correlation_id": text_in(answer, "correlation_id"),
            "service": chosen,
            "dataset": config.dataset,
            "ready": True if wait else None,
        }

    def _wait_for_worker(self, config: Config, seconds: float) -> None:
        """Until the worker is up; WorkerNotUpError once nothing changes and its databases do not run."""
        known, looks = "", 0

        def trouble() -> str:
            nonlocal known, looks
            answer = self.api.state(self.state["session_id"], window=0.0)
            why = worker_trouble(job_of(answer, self.state.get("job_id")))
            looks = looks + 1 if why == known else 0
            known = why
            if why and looks == LASTING_LOOKS and not self._databases_run(config):
                raise WorkerNotUpError(
                    f"The worker cannot come up: {why}. No database of the config runs on the VM.",
                    hint="Start the services first: plato-sandbox start-services",
                )
            return why

        self.reporter.step("Waiting for the worker", seconds)
        why = poll(trouble, seconds, WORKER_POLL_SECONDS, self.reporter)
        if why:
            raise TimedOutError(
                f"The worker was not up after {seconds:g} s: {why}.",
                hint="It may still come up: plato-sandbox state",
            )

    def _databases_run(self, config: Config) -> bool:
        """Whether a container of the VM publishes the port of a listener, as far as that can be told."""
        listeners = map(as_dict, dict_in(config.content, "listeners").values())
        ports = {str(part["db_port"]) for part in listeners if part.get("db_port")}
        try:
            return not ports or bool(ports.intersection(Vm(self).published_ports()))
        except SandboxError:
            return True

    def read_state(self, *, verify_no_mutations: bool = False) -> Json:
        """What the worker recorded since the last reset, the ignore rules applied.

        Returns SessionStateResponse with `summary` (see `summarize`) and `error` (a SandboxError or None:
        mutations where none are to be) beside it; WorkerNotUpError while nobody can tell.
        """
        with self.in_use("Asking what changed", STATE_SECONDS) as state:
            answer = self.api.state(state["session_id"])
            job = job_of(answer, state.get("job_id"))
            trouble = worker_trouble(job)
            if trouble:
                raise WorkerNotUpError(
                    f"The Plato worker is not up, so nobody knows what changed: {trouble}.",
                    hint="Start it: plato-sandbox start-worker --wait",
                )
        found = mutations_of(job["state"])
        error = mutations_found(found) if verify_no_mutations and found else None
        return {**answer, "summary": summarize(found), "error": error}

    def reset(self) -> Json:
        """Put the environment back to its initial state. Returns ResetSessionResponse."""
        with self.in_use("Resetting the environment", RESET_SECONDS):
            return self.reset_ready_vm()

    def reset_ready_vm(self) -> Json:
        answer = self.api.reset(self.state["session_id"])
        check_success(answer, self.state.get("job_id"), "The environment could not be reset")
        return answer

    def clear_audit(self) -> Json:
        """Empty the audit tables of every listener. Returns cleared and via ("api")."""
        with self.in_use("Emptying the audit tables", RESET_SECONDS) as state:
            try:
                answer = self.api.cleanup(state["session_id"])
            except ApiError as error:
                if error.status != 404:
                    raise
                raise SandboxError(
                    "Plato knows of no simulator in this session, so it cannot empty its audit tables.",
                    hint="`plato-sandbox reset` puts the whole environment back to its initial state.",
                ) from None
            check_success(answer, "", "The audit tables could not be emptied")
        return {"cleared": True, "via": "api", "listeners": []}

    # Artifacts

    def snapshot(
        self,
        *,
        description: str = "",
        include_config: bool = False,
        config: bool = True,
        target: str = "",
        wait: bool = False,
        wait_timeout: float = ARTIFACT_SECONDS,
    ) -> Json:
        """Make an artifact of the VM as it is now, and record its id.

        The config's dataset, its flows, ports and login credentials go with that of a config sandbox (not
        with config=False), and of any with include_config. target: the host that its pages are served under;
        None is that of the artifact that the VM came from. wait: return when the artifact is ready, at the
        latest after wait_timeout seconds; without, its upload goes on in the background.
        Returns artifact_id and status ("creating" or "ready").
        """
        with self.in_use() as state:
            checkpoint: Json = {"description": description or None, "target": target or None}
            if include_config or (config and state.get("mode") == "config"):
                checkpoint.update(self._config_for_snapshot())
            self.reporter.step("Creating the snapshot", SNAPSHOT_SECONDS)
            artifact_id = self._take_snapshot(state, checkpoint)
            self.reporter.note(f"The artifact is {artifact_id}.")  # whatever comes between
            self._record(artifact_id=artifact_id)
            with suppress(SandboxError):  # VMs start from it without that, too
                self.api.prefetch(artifact_id)
            if wait:
                self._wait_for_artifact(artifact_id, wait_timeout)
        return {"artifact_id": artifact_id, "status": "ready" if wait else "creating"}

    def _config_for_snapshot(self) -> Json:
        """What Plato stores of a config and gives back: one dataset with the file's own keys, no anchors."""
        config = self._config("", "")
        metadata = dict_in(config.content, "metadata")
        flows = flows_file(config)
        text = read_config(flows) if flows else ""
        return {
            "plato_config": yaml_dump(config.content),
            "override_service": config.service,
            "internal_app_port": whole_number(config.compute.get("app_port")),
            "messaging_port": whole_number(config.compute.get("plato_messaging_port")),
            "credentials": artifact_credentials(metadata),
            "flows": text if text.strip() else None,
        }

    def _take_snapshot(self, state: Json, checkpoint: Json) -> str:
        with sent_once("an artifact", "The sandbox runs on; take another snapshot if you need one."):
            given = without_none(checkpoint)
            answer = self.api.snapshot(state["session_id"], given)
            check_success(answer, state.get("job_id"), "The snapshot could not be created")
            artifact_id = text_in(job_of(answer, state.get("job_id")), "artifact_id")
            if not artifact_id:
                raise ApiError("it names none.")
        return artifact_id

    def _wait_for_artifact(self, artifact_id: str, seconds: float) -> None:
        def status() -> str:
            try:
                word = (text_in(self.api.artifact(artifact_id), "status") or "ready").lower()
            except ApiError as error:
                if error.status != 404:
                    raise
                word = "creating"
            if word == "failed":
                raise SandboxError(
                    f"The artifact {artifact_id} failed: Plato could not store the VM.",
                    hint="The sandbox runs on; take another snapshot.",
                )
            return "" if word == "ready" else word

        self.reporter.step("Waiting for the artifact to be ready", seconds)
        if poll(status, seconds, ARTIFACT_POLL_SECONDS, self.reporter):
            raise TimedOutError(
                f"The artifact {artifact_id} was not ready after {seconds:g} s.",
                hint="It may still become ready; it is recorded in .sandbox.yaml.",
            )

    # What a browser sees

    def flows(self, source: str = "") -> FlowSet:
        """The flows of its own config, else of its directory's config, else those that Plato has; checked.

        They are in the field `flows`, each with its name, description and steps.
        source: "local" (the config's flows file) or "api" (what Plato has) for one of them only. Without
        a sandbox, the local config's. ConfigError lists what is wrong with them.
        """
        if load_state(self.directory):
            self.load()
        path = "" if source == "api" else self._config_path()
        if path:
            path = flows_file(load_config(path, self.state.get("dataset")))
        if path:
            known = parse_flows(read_config(path), shown_here(path), path)
        elif source == "local":
            raise ConfigError(
                f"{shown_path(self.directory)} has no plato-config.yml with `metadata.flows_path`.",
                hint="Name the flows file there, or take the flows that Plato has: --api",
            )
        else:
            self.load()
            known = parse_flows(fetch_flows(self), "the flows that Plato has", None)
        for warning in known.warnings:
            self.reporter.warn(warning)
        return known

    def flow(
        self,
        names: Words = (),
        *,
        told: FlowListener = lambda result, step: None,
        every: bool = False,
        source: str = "",
        headed: bool = False,
        slowmo: float = 0,
        output: str = FLOW_OUTPUT,
        keep_open: bool = False,
        base_url: str = "",
        timeout: float = FLOW_SECONDS,
        verify_no_mutations: bool = False,
    ) -> Json:
        """Run flows in a real browser (Playwright) against the sandbox's address.

        names: in this order; none is `login`; every: all of them. source: "local" or "api" for flows of
        there only. slowmo: ms after each action; output: a directory; base_url: begin there, without a
        sandbox; timeout: seconds for all of it. told: called with a flow's result and each of its steps that
        ended, then with the result and None.
        Returns passed, seconds, flows (a result each, with its steps), mutations (what the flows changed,
        None if not asked), report (the path of report.html), and `error`: a SandboxError, or None when all
        passed. What cannot even begin raises.
        """
        headed = headed or keep_open
        launch = {"executable_path": self.settings.browser, "headless": not headed, "slow_mo": slowmo}
        if not base_url:
            self._load_for_use()
        known = self.flows(source)
        flows = known.choose(names, every=every)
        address = base_url or self.find_address()["url"]
        before = self._mutations_now() if verify_no_mutations else []
        began = time.time()
        path = os.path.join(self.directory, output, "report.html")
        report: Json = {}

        def finish() -> None:
            """Find out what was changed, and write the report."""
            changed: list[Json] = []
            if verify_no_mutations:
                changed = [found.raw for found in new_mutations(before, self._mutations_now())]
            results = session.results
            content: Json = {
                "passed": not changed and all(item["passed"] for item in results),
                "started_at": utc_text(began),
                "seconds": round(time.time() - began, 3),
                "address": address,
                "source": "local" if known.path else "api",
                "flows_path": known.path,
                "browser": {"name": "chromium", "headed": headed, "version": session.browser.version},
                "flows": results,
                "mutations": changed if verify_no_mutations else None,
            }
            report.update({**each_text(content, session.mask), "report": path})
            write_whole(path, report_page(report), 0o644)

        failure = f"{shown_path(os.path.dirname(path))} cannot be written"
        try:
            with explained(failure, "Name another directory for the report: --output DIR"):
                session = FlowRun(self, known, flows, address, os.path.dirname(path))
                self.reporter.step("Opening the browser")
                if keep_open:
                    session.stay = finish
                session.run(launch, timeout, told)
                if not keep_open:
                    finish()
        finally:
            self.api.hang_up()
        return {**report, "error": self._flow_error(session, report, begun_elsewhere=bool(base_url))}

    def _flow_error(self, session: FlowRun, report: Json, begun_elsewhere: bool) -> SandboxError | None:
        """Why a run is no success, or None. NoSandboxError where the page was that of a VM that is gone."""
        failed = [result for result in report["flows"] if not result["passed"]]
        if session.timed_out:
            return TimedOutError(
                f"The flows were not done after {session.seconds:g} s.",
                hint="Give them more time with --timeout SECONDS, or look at the report for what took it.",
            )
        if failed:
            gone = None if begun_elsewhere or failed[0]["failure"]["step"] else self.end_of_vm()
            if gone:
                raise gone
            return flow_failed_error(failed)
        return mutations_found(list(map(Mutation, report["mutations"]))) if report["mutations"] else None

    def _mutations_now(self) -> list[Mutation]:
        self.reporter.step("Reading the mutations")
        return mutations_in(self.read_state())

    def find_address(self) -> Json:
        """public_url and url of the sandbox's page, recorded or, where `start` found none, from Plato."""
        state = self.state
        public_url = state.get("public_url") or text_in(
            job_of(self.api.public_url(state["session_id"]), state.get("job_id")), "url"
        )
        if not public_url:
            raise SandboxError("Plato knows no public URL of this sandbox.")
        url = state.get("url") or with_router_target(public_url, state.get("service"))
        return {"public_url": public_url, "url": url}

    # The end

    def stop(self, session_id: str | None = None) -> Json:
        """Destroy the VM, then remove all that belongs to it; in that order, so nothing is lost on failure.

        session_id: stop this session, from any directory. Returns stopped, session_id and already_gone.
        """
        self.settings.require_key()
        already_gone = True
        try:
            with locked(self.directory):
                # Left by commands that were killed, as nobody else writes now.
                remove_matching(self.directory, r"\.sandbox\.yaml\..*\.tmp")
                if session_id is None:
                    session_id = self.load().get("session_id")
                else:
                    session_id = session_id.strip()
                    self._load_if_about(session_id)
                if session_id is not None:
                    self.reporter.step("Stopping the VM")
                    already_gone = self.end(session_id)
                else:  # a start that died before Plato answered
                    remove_state(self.directory)
                    words = unfinished_start(self.state).message
                    self.reporter.warn(f"{words} Its record was removed.")
        finally:
            self.api.hang_up()
        return {"stopped": True, "session_id": session_id, "already_gone": already_gone}

    def _load_if_about(self, session_id: str) -> None:
        """Take up this directory's state if it is of that session; another or a damaged one is left alone."""
        try:
            state = load_state(self.directory) or {}
        except SandboxError as error:
            self.reporter.warn(error.message)
            return
        if state.get("session_id") == session_id:
            self._check_base_url(state)
            self.state = state

    def end(self, session_id: str) -> bool:
        """Close a session, surely, then remove what is left of it here; whether it was gone already."""
        try:
            why = refusal(self.api.close(session_id), "")
            already_gone = bool(why)
            if why:
                word, _ = vm_status(self.api.session_details(session_id), self.state.get("job_id"))
                if (word or "").lower() not in TERMINAL_STATUSES:
                    raise ApiError(
                        f"Plato did not close the session: {why}.",
                        hint="Everything was left as it is; run `plato-sandbox stop` again.",
                    )
        except NoSandboxError:
            already_gone = True
            if not self.state and not matching(self.settings.home, files_of(session_id)):
                raise NoSandboxError(
                    f"Plato knows no session {session_id!r}, and nothing of it is here; nothing was stopped.",
                    hint="`plato-sandbox status` in the directory of the sandbox shows its id.",
                ) from None
        self._clean_up(session_id)
        return already_gone

    def _clean_up(self, session_id: str) -> None:
        """Remove what belongs to a session that is certainly closed: heartbeat, SSH files, .sandbox.yaml."""
        if not stop_heartbeat(self.settings, {**self.state, "session_id": session_id}):
            self.reporter.warn("The heartbeat could not be ended; it ends by itself within two beats.")
        remove_files_of(self.settings.home, session_id)
        if self.state.get("session_id") == session_id:  # last: what a killed `stop` leaves is still on record
            if "slot_path" in self.state:
                update_slot(self.state, stopped_at=time.time())
            else:
                remove_state(self.directory)
        self.state = {}


def plan_audit(
    sandbox: Sandbox,
    *,
    dataset: str = "",
    listener: str = "",
    direct: bool = False,
    url: str = "",
) -> AuditPlan:
    """What `audit-ui` is to show: the `db` listeners of the sandbox's dataset, and how they are reached.

    listener: only the one of this name. direct: at db_host from here, not through the gateway; a sandbox is
    not needed then. url: this database and no sandbox. Any SandboxError; the gateway is tried.
    """
    state: Json = {}
    if url:
        config, databases = _database_of_url(sandbox, url, dataset, listener)
    else:
        try:
            state = sandbox._load_for_use()
        except NoSandboxError:
            if not direct:
                raise
        config = sandbox._config("", dataset, stored=bool(state))
        repair_ssh_config(state, sandbox.settings)
        through = sandbox if state and not direct else None
        listeners = _audit_listeners(config, listener).items()
        databases = [Database(name, fields, through) for name, fields in listeners]
        for tunnel in filter(None, (database.tunnel for database in databases)):
            tunnel.connect().close()
    return AuditPlan(
        tuple(databases),
        partial(audit_changes, sandbox.directory) if state else lambda name: None,
        config,
        state.get("url"),
    )


def _audit_listeners(config: Config, wanted: str) -> dict[str, Json]:
    """The `db` listeners of a config, or the wanted one. CheckFailedError, UsageError."""
    every = dict_in(config.content, "listeners")
    found = {str(name): part for name, part in every.items() if part.get("type", "db") == "db"}
    if not found:
        raise CheckFailedError(
            f"The dataset {config.dataset!r} has no `db` listener, so there are no ignore rules to choose."
        )
    if wanted and wanted not in found:
        raise UsageError(
            f"There is no `db` listener {wanted!r} in the dataset {config.dataset!r}.",
            hint=f"Its `db` listeners are: {', '.join(found)}.",
        )
    return {name: part for name, part in found.items() if wanted in ("", name)}


def _database_of_url(
    sandbox: Sandbox, url: str, dataset: str, listener: str
) -> tuple[Config, list[Database]]:
    """A database by its address, and the config, if there is one, whose only `db` listener, or the named one,
    has the rules."""
    fields, options = database_url(url, os.environ)
    if re.search("://[^/@]*:[^/@]", url):
        sandbox.reporter.warn(
            "Others on this machine can see the password in --database-url;"
            " leave it out, and set PGPASSWORD or MYSQL_PWD instead."
        )
    if not listener and not os.path.exists(find_config(sandbox.directory)):
        nothing = parse_config("{service: none, datasets: {base: {}}}", "", "", "")
        return nothing, [Database("database", fields, None, **options)]
    config = load_config(find_config(sandbox.directory), dataset)
    own = _audit_listeners(config, listener)
    name, *others = own
    if others:
        raise UsageError(
            "The config has several `db` listeners; name the one whose database this is.",
            hint=f"--listener {' or --listener '.join(own)}",
        )
    return config, [Database(name, {**own[name], **fields}, None, **options)]


def audit_changes(directory: str, listener: str) -> list[Mutation]:
    """What `state` tells now of a listener; all of it where Plato does not tell listeners apart."""
    sandbox = Sandbox(directory)
    content = dict_in(job_of(sandbox.read_state(), sandbox.state.get("job_id")), "state")
    told = dict_in(content, listener).get("mutations")
    return mutations_of({"mutations": told} if isinstance(told, list) else content)


def artifact_credentials(metadata: Json) -> Json | None:
    """The logins that an artifact carries: metadata.credentials, else what metadata.variables name.

    {"default_role": NAME, "roles": {NAME: [{"type": email|username|password|bearer, "text"}]}}; an empty list
    needs no login. None when none is declared. ConfigError for another shape, without any value.
    """
    declared = dict_in(metadata, "credentials")
    if metadata.get("credentials") is None:
        declared = {"login": _account_of_variables(as_list(metadata.get("variables")))}
        if not declared["login"]:
            return None
    accounts, older = dict(dict_in(declared, "roles")), declared.get("login") or declared.get("primary")
    name = "default_login" if "default" in accounts else "default"
    if older:
        accounts[name] = older
    only = name if older else next(iter(accounts), None) if len(accounts) == 1 else None
    default = declared.get("default_role") or only
    if not accounts or default not in (None, *accounts):
        raise ConfigError("metadata.credentials names no role, or a default_role that is none of its roles.")
    return {"default_role": default, "roles": {name: _logins(part) for name, part in accounts.items()}}


def _account_of_variables(variables: list[Any]) -> Json | None:
    """A user with a password, or a token, by the usual names of variables."""
    pairs = map(as_dict, variables)
    values = {str(pair.get("name")).strip().lower(): pair["value"] for pair in pairs if pair.get("value")}

    def first(*names: str) -> str:
        return next((str(values[name]) for name in names if name in values), "")

    user = first("username", "user", "email", "login")
    if user:
        return {"user": user, "password": first("password", "pass")}
    token = first("token", "api_key", "api_token", "secret")
    return {"token": token} if token else None


def _logins(account: Any) -> list[Json]:
    """The login of one role, from a list of {type, text} or the older {kind, user, password | secret}."""
    if isinstance(account, dict):
        user = account.get("email") or account.get("user")
        texts = {
            "email" if account.get("email") or "@" in str(user) else "username": user,
            "password": account.get("password"),
            "bearer": account.get("token") or account.get("secret"),
        }
        needed = texts.items() if account.get("kind") != "none" else ()
        account = [{"type": word, "text": text} for word, text in needed if text]
    for entry in account if isinstance(account, list) else [None]:
        known = text_in(entry, "type") in ("email", "username", "password", "bearer")
        if not known or not text_in(entry, "text"):
            raise ConfigError(
                "metadata.credentials cannot be used: a role must be a list of entries"
                " {type: email|username|password|bearer, text: TEXT}."
            )
    return list(account)


def mutations_in(report: Json) -> list[Mutation]:
    """The mutations in a SessionStateResponse."""
    return mutations_of(dict_in(job_of(report, ""), "state"))


@contextmanager
def sent_once(made: str, hint: str) -> Iterator[None]:
    """For a request that creates something, and so is not repeated: UnknownOutcomeError when nobody knows
    whether it did."""
    try:
        yield
    except ApiError as error:
        if not error.outcome_unknown:
            raise
        message = f"Plato may have made {made}, but its answer was lost: {error.message}"
        raise UnknownOutcomeError(message, hint=hint) from None


UNKNOWN_VM = "If a VM was created, it gets no heartbeat and is shut down after about two minutes."


def end_of_life(report: Json) -> Json:
    """When a VM ends (`at`), why, and the `remedy` for who wants it otherwise, as far as this host knows.

    report: what `Sandbox.status` tells.
    """
    health, idle = report["heartbeat"], report.get("idle_seconds")
    if health["state"] in ("dead", "expired"):
        last_ok = health["last_ok"] or utc_text(time.time())
        at = utc_text(seconds_of(last_ok) + VM_SILENCE_SECONDS)
        remedy = "any use, such as `plato-sandbox state`, revives the heartbeat."
        return {"at": at, "why": "without a heartbeat", "remedy": remedy}
    why = "by its lifetime"
    if isinstance(idle, int):
        why += f", or {duration_text(idle)} after its last use"
    remedy = "`plato-sandbox stop` ends it now, `start --lifetime SECONDS` gives the next one longer."
    return {"at": report.get("expires_at"), "why": why, "remedy": remedy}


def unfinished_start(state: Json) -> NoSandboxError:
    return NoSandboxError(
        f"A `start` ({state.get('created_at', 'at an unknown time')}) was cut off before Plato answered it."
        f" {UNKNOWN_VM}",
        hint="`plato-sandbox stop` removes this record; `start` goes ahead in spite of it.",
    )


# One `start`: the order of its steps is what keeps every VM accounted for.


def end_what_is_here(sandbox: Sandbox, replace: bool) -> None:
    """Make sure that no live sandbox is recorded here; with `replace`, stop it."""
    if load_state(sandbox.directory) is None:
        return
    state = sandbox.load()
    session_id = state.get("session_id")
    if not session_id:
        sandbox.reporter.warn(unfinished_start(state).message)
    elif replace:
        sandbox.reporter.step("Stopping the sandbox that is here")
        sandbox.end(session_id)
    else:
        error = sandbox.status()["error"]
        if not isinstance(error, NoSandboxError):
            raise error or ConflictError(
                f"There is a live sandbox here already (session {session_id}).",
                hint="`plato-sandbox stop` ends it; `start --replace` ends it and starts a new one.",
            )
        sandbox.reporter.note("The sandbox that was recorded here is gone; its files are removed.")
        if "slot_path" in state:
            sandbox.state = {}  # so that another client's record stays as it is
        sandbox.end(session_id)
    sandbox.state = {}


def create_vm(sandbox: Sandbox, environment: Json, record: Json, lifetime: int) -> Json:
    """Record that a VM is asked for, and ask for it, once; returns an answer that names the session.

    When nobody knows whether there is a VM, the record stays without a session, so that `status` tells what
    is known.
    """
    import secrets

    now, base_url = time.time(), sandbox.settings.base_url
    sandbox.save(
        **record,
        directory=sandbox.directory,
        starting=True,
        created_at=utc_text(now),
        expires_at=utc_text(now + lifetime),
        base_url=None if base_url == DEFAULT_BASE_URL else base_url,
    )
    sandbox.reporter.step("Creating the VM", MAKE_SECONDS)
    environment = {**environment, "alias": f"sandbox-{secrets.token_hex(4)}"}
    try:
        with sent_once("a VM", "Such a VM gets no heartbeat and is shut down after about two minutes."):
            answer = sandbox.api.make_session(environment, lifetime)
            if not text_in(answer, "session_id"):
                raise ApiError("it names no session.")
    except Interrupted as error:
        error.message = f"Interrupted before Plato answered. {UNKNOWN_VM}"
        raise
    return answer


def record_vm(sandbox: Sandbox, answer: Json) -> None:
    """Record what `make` tells of a VM: its ids, the service of an artifact, the sizes of a config."""
    sandbox.save(session_id=answer["session_id"])
    entry = as_dict(next(iter(as_list(answer.get("envs"))), None))
    job_id = text_in(entry, "job_id")
    if entry.get("success") is False or not job_id:
        why = text_in(entry, "error") or "no reason was given"
        raise SandboxError(
            f"Plato could not create the VM: {why.rstrip('.')}.",
            hint="Check the simulator, tag, dataset or artifact id.",
        )
    sizes = dict_in(entry, "effective_sim_config")
    learned: Json = {name: whole_number(sizes.get(name)) for name in VM_SIZES}
    if sandbox.state["mode"] == "artifact":
        learned = {"service": text_in(entry, "simulator")}
    sandbox.save(job_id=job_id, **{**learned, **sandbox.state})


def bring_up_vm(sandbox: Sandbox, patience: float, reset: bool, ahead: Act | None) -> None:
    """Heartbeat first; then wait for the VM; then network, reset and SSH. ahead: what goes on beside that."""
    reporter = sandbox.reporter
    # Whoever put files of these names there: no link among them is followed.
    remove_files_of(sandbox.settings.home, sandbox.state["session_id"])
    sandbox.spawn_heartbeat()
    beside = Aside(ahead) if ahead else None
    provider = wait_for_ready(sandbox, patience)
    reporter.step("Connecting the VM to the network", CONNECT_SECONDS)
    no_ssh = "SSH and tunnels to the VM do not work; `sync` goes through the API."
    connected = may_fail(sandbox, sandbox.connect_network, no_ssh)
    if reset:
        reporter.step("Resetting the environment", RESET_SECONDS)
        may_fail(sandbox, sandbox.reset_ready_vm, "The VM is as it booted.")
    reporter.step("Setting up SSH", SETUP_SECONDS)
    ready = may_fail(sandbox, lambda: set_up_ssh(sandbox, provider), no_ssh)
    may_fail(sandbox, lambda: sandbox.save(**sandbox.find_address()), "`flow` asks for it again.")
    if ready and connected:
        reporter.step("Waiting for SSH to answer", SSH_FIRST_SECONDS)
        may_fail(sandbox, lambda: wait_for_ssh(sandbox), "Until it does, `sync` goes through the API.")
    if beside:
        reporter.step("Waiting for the code that is on its way", SYNC_SECONDS)
        may_fail(sandbox, beside.result, "It is sent later.")
    sandbox.save(starting=None)


def send_ahead(sandbox: Sandbox, config: Config, via: str, patience: float) -> None:
    """Bring the code to a VM that boots, as soon as it runs commands: through the API, as SSH comes last.

    It gives up when the VM should have been ready for so long as it may take: `start` must not wait for ever.
    """
    own = sandbox.silent()
    own.state = dict(sandbox.state)
    syncer = code_syncer(own, config, via == "git", "api")

    def trouble() -> str:
        syncer.run()
        if via == "git":  # which finds it there, then
            script = syncer.head + assigned(id="ahead") + _OWNER + _INDEX
            syncer.vm.run(script, lambda file: file.write(listed_files(syncer)))
        return ""

    try:
        poll(trouble, patience, 1.0)
    finally:
        own.api.hang_up()


def may_fail(sandbox: Sandbox, act: Act, consequence: str) -> bool:
    """Do what a VM can live without; a failure is a warning, unless the VM itself is gone."""
    try:
        act()
    except SandboxError as error:
        refused = type(error) is SandboxError  # Plato answered for the VM, so it is there
        gone = None if refused else sandbox.end_of_vm()
        if gone:
            raise gone from None
        sandbox.reporter.warn(f"{error.message} {consequence}")
        return False
    return True


def wait_for_ready(sandbox: Sandbox, patience: float) -> str | None:
    """Wait until the VM is ready; its provider, as far as Plato tells it."""
    deadline = time.monotonic() + patience
    state, job = sandbox.state, {}

    def trouble() -> str:
        """Ask, for some seconds, whether the VM is ready; "" if it is, else what it is doing."""
        seconds = max(1, min(READY_POLL_SECONDS, int(deadline - time.monotonic())))
        try:
            answer = sandbox.api.wait_for_ready(state["session_id"], seconds)
        except NoSandboxError:
            raise NoSandboxError("The session ended while its VM was booting.") from None
        except ApiError as error:
            if error.status != 408:  # that is how some servers say that it is not ready yet
                raise
            return "pending"
        job.update(job_of(answer, state["job_id"]))
        word = text_in(job, "status") or "pending"
        if answer.get("status") == "failed" or word.lower() in TERMINAL_STATUSES:
            why = text_in(job, "error") or word
            raise SandboxError(
                f"The VM could not be started: {why.rstrip('.')}.",
                hint="Run `start` again; if it fails the same way, try other sizes or another artifact.",
            )
        return "" if answer.get("ready") is True else word

    sandbox.reporter.step("Waiting for the VM to boot", patience)
    if poll(trouble, patience, 0.5, sandbox.reporter):  # the pause is for a server that answers at once
        raise TimedOutError(
            f"The VM was not ready after {patience:g} s.",
            hint="Run `start` again, with a longer --timeout if it needs one.",
        )
    return text_in(job, "provider")


def set_up_ssh(sandbox: Sandbox, provider: str | None) -> None:
    """Make a key, install it on the VM, write the config and record them. Any SandboxError."""
    import threading

    state = sandbox.state
    files = ssh_fields(sandbox.settings.home, state["session_id"])
    ended = threading.Event()
    try:  # beside the main thread, so that no signal comes while it is started
        make = partial(make_key, files["ssh_private_key_path"], sandbox.reporter)
        public_key = Aside(make, ended).result()
    finally:
        ended.wait(2 * KEY_SECONDS)  # no file of it comes after those here are removed
    if not provider:
        with suppress(SandboxError):
            provider = text_in(sandbox.api.job_info(state["job_id"]), "provider")
    files["provider"] = provider
    answer = sandbox.api.add_ssh_key(state["session_id"], public_key, ssh_user(files))
    check_success(answer, state["job_id"], "The SSH key could not be installed on the VM")
    write_ssh_config(sandbox.settings, {**state, **files})
    sandbox.save(**files)


def undo_start(sandbox: Sandbox, error: BaseException) -> None:
    """Close the session after a failure. Where that fails too, the record stays and the hint names it."""
    sandbox.reporter.step("Closing the VM")
    known = isinstance(error, (SandboxError, Interrupted))
    try:
        sandbox.end(sandbox.state["session_id"])
    except (SandboxError, Interrupted) as trouble:
        why = trouble.message if isinstance(trouble, SandboxError) else "interrupted again"
        left = f"The VM could not be closed ({why.rstrip('.')}) and may still run: plato-sandbox stop"
        if known:
            error.hint = left  # type: ignore[attr-defined]
        else:
            sandbox.reporter.warn(left)
        return
    if known:
        error.message += " Nothing is left running."  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------
# output: the one place that prints; the result on stdout, everything else on stderr
# ----------------------------------------------------------------------------------------------------------

PROGRESS_LINE_SECONDS = 10.0  # without a terminal, at most one progress line in this time
_COLOURS = {"good": "\033[32m", "bad": "\033[31m", "warn": "\033[33m"}


@contextmanager
def writing_result() -> Iterator[None]:
    """What is written in the block may find no room, say, which is a SandboxError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_stream(sys.stdout)
        raise SandboxError(
            f"The result could not be written to standard output: {reason(error)}.",
            hint="What was asked for is done; `plato-sandbox status` shows how things are.",
        ) from None


class Output(Reporter):
    """Human text and JSON, progress and errors. What comes from outside is made harmless, secrets are hidden.

    json: stdout gets exactly one JSON document, whatever happens; quiet: no progress and no notes; program,
    place: how this user calls the tool, and the `-w DIR` of this call; commands: what may follow its name.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO, environment: Mapping[str, str]) -> None:
        import threading

        self.stdout = stdout
        self.stderr = stderr
        self.json = self.quiet = self.verbose = False
        self.keeps_steps = True
        self.program = PROGRAM
        self.place = ""
        self.commands: Collection[str] = ()
        self._secret = environment.get("PLATO_API_KEY", "").strip()
        dumb = environment.get("TERM") == "dumb"
        self._colour = stdout.isatty() and not dumb and not environment.get("NO_COLOR")
        self._live = stderr.isatty() and not dumb
        self._lock = threading.RLock()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._step = self._detail = ""
        self._began = 0.0
        self._limit: float | None = None
        self._last_line = -PROGRESS_LINE_SECONDS

    def safe(self, text: object) -> str:
        """A line without the key, and without what a terminal would obey."""
        line = printable(str(text))
        return line.replace(self._secret, "***") if len(self._secret) >= SHORTEST_SECRET else line

    def told(self, text: str) -> str:
        """Commands in a text as this user types them: the same program, the same directory."""
        command = rf"\bplato-sandbox ({'|'.join(sorted(self.commands, reverse=True))}|--help)\b"
        return re.sub(command, lambda found: printable(f"{self.program} {found[1]}{self.place}"), text)

    # Results

    @writing_result()
    def result(self, line: Line) -> None:
        """A line of the result: a text, or (label, value, style, more) for `  Label:       value more`.

        The value is coloured on a terminal; without one, there is no line. style and more may be left out.
        label: None for a value at the margin.
        """
        self.finish()
        if isinstance(line, str):
            self.stdout.write(self.safe(self.told(line)) + "\n")
        elif line[1] not in (None, ""):
            label, value, style, more = (*line, "", "")[:4]
            head = "" if label is None else f"{self.safe(label) + ':' * bool(label):<12} "
            colour = _COLOURS.get(style) if self._colour else None
            shown = f"{colour}{self.safe(value)}\033[0m" if colour else self.safe(value)
            self.stdout.write(f"  {head}{shown}{self.safe(more)}\n")

    @writing_result()
    def document(self, value: Json) -> None:
        """The one JSON document of --json, in ASCII."""
        import json

        self.finish()
        text = json.dumps(value, indent=2).replace("\x7f", "\\u007f")
        self.stdout.write("\n".join(map(self.safe, text.split("\n"))) + "\n")

    def error(self, error: SandboxError | Interrupted) -> Json:
        """Tell an error in words on stderr; returns it for the document of --json."""
        self.finish()
        message, hint = self.told(error.message), self.told(error.hint) if error.hint else None
        self._say(f"Error: {message}" + (f"\n{hint}" if hint else ""))
        return {"error": {"code": error.code, "message": message, "hint": hint, "exit_code": error.exit_code}}

    def _say(self, text: str) -> None:
        with self._lock:
            self._erase()
            self._write("".join(self.safe(line) + "\n" for line in text.split("\n")))

    def _write(self, text: str) -> None:
        """Write to stderr. That nobody is there any more, as after a hangup, must not end the work."""
        try:
            self.stderr.write(text)
            self.stderr.flush()
        except (OSError, ValueError):
            forget_stream(self.stderr)
        except RuntimeError:
            pass  # a signal came in the middle of a write; what its handler has to say is lost

    # Progress (the Reporter that operations talk to)

    def step(self, text: str, limit: float | None = None) -> None:
        self.finish()
        if limit == 0 and not self._live:
            self.note(text)  # a log needs no more of it
            return
        with self._lock:
            self._step, self._detail, self._limit = self.safe(text), "", limit
            self._began = time.monotonic()
        if not self.quiet:
            self._draw()
            if self._ticker.ident is None:
                self._ticker.start()

    def detail(self, text: str) -> None:
        self._detail = self.safe(text).encode("ascii", "backslashreplace").decode()  # one column a character

    def note(self, text: str) -> None:
        if not self.quiet:
            self._say(printable(text))

    def warn(self, text: str) -> None:
        self._say(f"Warning: {self.told(text)}")

    def trace(self, text: str) -> None:
        if self.verbose:
            self._say(f"  {printable(text)}")

    def finish(self, *, told: bool = True) -> None:
        """The step under way is over: on a terminal it becomes a line that stays, if it is to be told."""
        with self._lock:
            step, self._step = self._step, ""
            if step and not self.quiet:
                self._erase()
                if told and self.keeps_steps and self._live:
                    self._write(f"{step}: {duration_text(time.monotonic() - self._began)}\n")

    def _tick(self) -> None:
        while True:
            time.sleep(1.0)
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._step or not (self._live or now - self._last_line >= PROGRESS_LINE_SECONDS):
                return
            self._last_line = now
            spent, clock, limit = now - self._began, " ...", ""
            if spent >= 1:
                clock = f": {duration_text(int(spent))}"
                limit = f" of at most {duration_text(self._limit)}" if self._limit else ""
            columns = terminal_columns(self.stderr) - 1 if self._live else sys.maxsize
            line = fitting(self._step, self._detail, clock, limit, columns)
            self._write(f"\r\033[K{line}" if self._live else f"{line}\n")

    def _erase(self) -> None:
        if self._live:
            self._write("\r\033[K")


def fitting(step: str, detail: str, clock: str, limit: str, columns: int) -> str:
    """A progress line in so many columns: first the limit gives way, then the detail, then the last words."""
    import textwrap

    whole = f"{step} ({detail})" if detail else step
    for line in (whole + clock + limit, whole + clock, step + clock):
        if len(line) <= columns:
            return line
    return textwrap.shorten(step, max(3, columns - len(clock)), placeholder="...") + clock


def forget_stream(stream: TextIO) -> None:
    """Point a stream that cannot be written at nothing, or the interpreter would complain at its end."""
    try:
        point_at_nothing(stream.fileno())
    except (OSError, ValueError):
        pass  # it is closed


def terminal_columns(stream: TextIO) -> int:
    try:
        return max(20, os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return 80


# ----------------------------------------------------------------------------------------------------------
# commands: each is declared once: what it takes, what it runs, the lines that it shows
# ----------------------------------------------------------------------------------------------------------
# Lines of a result: each is a text, or the label, value, style and more of a field (see `Output.result`).


def run_start(sandbox: Sandbox, **options: Any) -> Json:
    started = {"settings": sandbox.settings, "reporter": sandbox.reporter, **options}
    state = Sandbox.start(sandbox.directory, **started).state
    return {**state, "ssh_command": ssh_command(state)}


def start_lines(report: Json) -> Lines:
    yield "Sandbox started successfully!"
    yield from sandbox_lines(report)
    yield "Heartbeat", f"running (PID: {report['heartbeat_pid']})", "good"
    yield ""
    yield "State saved to .sandbox.yaml"


def sandbox_lines(report: Json) -> Lines:
    """The lines that `start` and `status` share: where the VM is and how long it may live."""
    status = report.get("vm_status")
    unsure = status in ("unreachable", "unknown", "created", "queued")
    style = "good" if report.get("vm_running") else "warn" if unsure else "bad"
    # A path that needs quotes begins with one, and stays: there, ~ would be none.
    ssh = (report["ssh_command"] or "").replace("ssh -F " + os.path.expanduser("~/"), "ssh -F ~/")
    shown = {"url": report.get("public_url"), **report, "ssh": ssh}
    for label, key in _SANDBOX_FIELDS.items():
        yield label, shown.get(key), style if key.startswith("vm_") else ""


_SANDBOX_FIELDS = {
    "Session ID": "session_id",
    "Job ID": "job_id",
    "Mode": "mode",
    "VM Status": "vm_status",
    "Reason": "vm_status_reason",
    "Simulator": "simulator",
    "Artifact ID": "artifact_id",
    "Service": "service",
    "Dataset": "dataset",
    "Public URL": "url",
    "Created": "created_at",
    "Ends at": "expires_at",
    "SSH": "ssh",
    "Slot": "slot_path",
}


def status_lines(report: Json) -> Lines:
    """With the heartbeat's line of the specification, then its last good beat and its last error."""
    yield "Sandbox Status"
    yield from sandbox_lines(report)
    health, ends, now = report["heartbeat"], report["ends"], time.time()
    style = {"ok": "good", "degraded": "warn", "ending": "warn"}.get(health["state"])
    word = "running" if style else "stopped" if health["pid"] else "never started"
    pid = f" (PID: {health['pid']}{'' if style else ' not found'})" if health["pid"] else ""
    yield "Heartbeat", word, style or "bad", pid
    if health["last_ok"]:
        yield "Last beat", f"{duration_text(now - seconds_of(health['last_ok']))} ago"
    with suppress(TypeError, ValueError):  # no time was recorded, or something that is none
        left = duration_text(int(seconds_of(ends["at"]) - now))
        if report["vm_running"]:
            yield f"The VM ends in about {left} {ends['why']}; {ends['remedy']}"
    yield "Ended", health["ended"], "bad"
    at = health["last_error_at"]
    ago = f" ({duration_text(now - seconds_of(at))} ago)" if at else ""
    yield "Last error", health["last_error"], "warn", ago


def stop_lines(report: Json) -> Lines:
    gone = " It was gone already; what was left of it here is removed." if report["already_gone"] else ""
    yield f"Sandbox stopped successfully.{gone}" if report["stopped"] else "There is none to stop."


def run_sync(sandbox: Sandbox, path: str = ".", watch: bool = False, **options: Any) -> Json:
    output: Any = sandbox.reporter

    def tell(report: Json, changed: str) -> None:
        line = (
            f"{time.strftime('%H:%M:%S')}  {changed or 'all is there'}  ({duration_text(report['seconds'])})"
        )
        output.note(line) if output.json else output.result(line)

    return sandbox.sync(path, watch=tell if watch else None, **options)


def sync_lines(report: Json) -> Lines:
    """What a sync did, or with --dry-run what it would do, or after --watch what all did together."""
    if "send" in report:
        for word in ("remove", "send"):
            yield from (f"{word} {path}" for path in report[word])
        if not report["send"] and not report["remove"]:
            yield f"Nothing to do: {report['remote_path']} has all of it."
        return
    files = counted(report["sent"], "file")
    done = f"{files} sent, {report['removed']} removed, {report['unchanged']} unchanged"
    if "syncs" in report:
        yield f"Watched {counted(report['syncs'], 'sync')}: {done}."
    else:
        way = "over SSH" if report["via"] == "ssh" else "through the API"
        amount = f"{size_text(report['archive_bytes'])} in {duration_text(report['seconds'])}, {way}"
        yield f"Synced to {report['remote_path']}: {done} ({amount})."


def services_lines(report: Json) -> Lines:
    yield "Services started successfully!"
    yield "Branch", report["branch"]
    if report["commit"]:
        yield "Commit", report["commit"][:12], "", "" if report["pushed"] else " (unchanged)"
    yield "VM Path", report["path"]
    for service in report["services"]:
        states = (
            f"{found['service']} {found['health'] or found['state']}" for found in service["containers"]
        )
        yield service["name"], ", ".join(states) or "no containers", "good"
    answers = report["app_answers"]
    yield "Public URL", report["url"], "", f" (answers {answers})" if answers else ""


def worker_lines(report: Json) -> Lines:
    yield "Worker started successfully!" if report["ready"] else "The worker is starting."
    yield "Service", report["service"]
    yield "Dataset", report["dataset"]
    yield "Status", report["status"]
    if not report["ready"]:
        yield "It takes minutes to come up; see whether it has: plato-sandbox state"


def state_lines(report: Json) -> Lines:
    """What changed: each table's counts, then the changes themselves."""
    yield "Environment State"
    mutations = mutations_in(report)
    shown = mutations[:SHOWN_MUTATIONS]
    if not mutations:
        yield "  No mutations since the last reset or clear-audit."
        return
    for counts in report["summary"]["tables"]:
        yield counts["table"], counts_text(counts)
    yield ""
    width = max(len(mutation.title) for mutation in shown)
    for mutation in shown:
        yield f"  {mutation.action:<7} {mutation.title:<{width}}  {mutation.told()}".rstrip()
    if len(mutations) > SHOWN_MUTATIONS:
        yield f"  ... and {len(mutations) - SHOWN_MUTATIONS} more; --json has all of them"


def snapshot_lines(report: Json) -> Lines:
    yield "Snapshot created successfully!"
    yield "Artifact ID", report["artifact_id"]
    if report["status"] != "ready":
        yield "Status", report["status"], "", " (its upload goes on; --wait waits for it)"


def run_init(sandbox: Sandbox) -> Json:
    """Make a config and its flows, where neither is."""
    path = find_config(sandbox.directory)
    if os.path.lexists(path):
        raise ConflictError(f"{shown_here(path)} is there already, and stays as it is.")
    made = []
    for name, text in new_config(sandbox.directory).items():
        place = os.path.join(sandbox.directory, name)
        if not os.path.lexists(place):
            write_file(place, text, 0o644)
            made.append(name)
    return {"made": made}


def run_check(sandbox: Sandbox, dataset: str = "") -> Json:
    """All that can be known of a config, its flows and Compose files without a VM.

    Returns problems and warnings, each `file:line:column: words`, and error. ConfigError where there is no
    config. dataset: "" for all of them.
    """
    path = find_config(sandbox.directory)
    text, source = read_config(path, NO_CONFIG), shown_here(path)
    found: Json = {"problems": [], "warnings": []}
    names: list[Any] = [dataset]
    with suppress(YamlError):
        names = [dataset] if dataset else [*dict_in(yaml_load(text), "datasets")] or names
    for name in names:
        try:
            config = parse_config(text, source, path, name)
            found["warnings"] += config.warnings
            for is_doubt, words in around(config):
                found["warnings" if is_doubt else "problems"].append(words)
            flows = flows_file(config)
            if flows and os.path.isfile(flows):
                known = parse_flows(read_config(flows), shown_here(flows), flows)
                found["warnings"] += known.warnings
                if "login" not in [flow["name"] for flow in known.flows]:
                    words = f"{known.shown}:1:1: there is no flow `login`; every simulator needs one"
                    found["warnings"].append(words)
        except ConfigError as error:
            found["problems"] += error.problems or [error.message]
            found["warnings"] += error.warnings
    report: Json = {name: [*dict.fromkeys(told)] for name, told in found.items()}
    wrong = counted(len(report["problems"]), "problem")
    return {**report, "error": CheckFailedError(f"There are {wrong}.") if report["problems"] else None}


def check_lines(report: Json) -> Lines:
    yield from report["problems"]
    yield from (f"{warning} (a warning)" for warning in report["warnings"])
    if not report["problems"]:
        yield "Nothing is wrong with the config and what it names."


def run_up(sandbox: Sandbox, dataset: str = "", via: str = "git") -> Json:
    """From a directory to a simulator that is known to work, in five stages; goes on with what is there."""
    output: Any = sandbox.reporter
    output.keeps_steps = False
    stages: Json = {
        "check": lambda: run_check(sandbox, dataset),
        "start": lambda: start_if_needed(sandbox, dataset, via),
        "start-services": lambda: sandbox.start_services(dataset=dataset, via=via),
        "start-worker": lambda: sandbox.start_worker(dataset=dataset, wait=True),
        "flow": lambda: sandbox.flow(verify_no_mutations=True),
    }
    report: Json = {"stages": []}
    for name, act in stages.items():
        began, told = time.monotonic(), {}
        try:
            told = act()
            error = told.get("error")
        except SandboxError as failure:
            error = failure
        seconds = since(began)
        report["stages"].append({"stage": name, "passed": not error, "seconds": seconds})
        report.update(url=sandbox.state.get("url"), error=error)
        output.finish()
        verdict = ("FAILED", "bad") if error else ("ok    ", "good")
        lines: Any = [(None, *verdict, f"  {name:<16}{duration_text(seconds)}")]
        lines += COMMANDS[name].lines(told) if error and told else []
        for line in lines if not output.json else ():
            output.result(line)
        if error:
            error.hint = f"{error.hint or 'Correct that.'}\nThen go on: plato-sandbox up"
            break
    return report


def start_if_needed(sandbox: Sandbox, dataset: str, via: str) -> Json:
    """Start a VM, unless there is one here that lives."""
    lives: Any = None
    with suppress(NoSandboxError):
        lives = sandbox.load().get("session_id") and not sandbox.end_of_vm()
    if not lives:
        sandbox.state = run_start(sandbox, from_config=True, dataset=dataset, send_code=via, reset=False)
    return {}


def up_lines(report: Json) -> Lines:
    if report["stages"][-1]["passed"]:  # which is the last of all, then
        yield "Public URL", report["url"]
        yield "It is up, and its flow changes nothing. `plato-sandbox down` ends it."


def run_pull_config(sandbox: Sandbox, artifact_id: str = "", yes: bool = False) -> Json:
    """The config and the flows of an artifact, as files here; what is there already is asked about."""
    api, output = sandbox.api, sandbox.reporter
    artifact_id = artifact_id or sandbox.load().get("artifact_id", "")
    if not artifact_id:
        raise UsageError("The sandbox here comes from no artifact.", hint="Name one: -a ID")
    about = api.artifact(artifact_id)
    stored = yaml_load(text_in(api.artifact_config(artifact_id), "plato_config") or "")
    dataset = text_in(about, "dataset") or DEFAULT_DATASET
    text = yaml_dump({"service": text_in(about, "simulator_name"), "datasets": {dataset: stored}})
    path = find_config(sandbox.directory)
    config = parse_config(text, "the config of the artifact", path, dataset)
    files = {path: text}
    sandbox.state = {"artifact_id": artifact_id}
    with suppress(ConfigError):  # it has no flows
        place = flows_file(config) or os.path.join(sandbox.directory, "flows.yml")
        files[place] = fetch_flows(sandbox)
    for place, new in files.items():
        shown = shown_here(place)
        old = read_config(place) if os.path.lexists(place) else new
        if old != new:
            for line in difference_of(old, new).split("\n"):
                output.note(line)
            confirm(output, f"Change {shown} like this?", yes)
        with explained(f"{shown} cannot be written"):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            write_whole(place, new, 0o644)
    return {"artifact_id": artifact_id, "dataset": dataset, "written": [*map(from_here, files)]}


def run_doctor(sandbox: Sandbox) -> Json:
    """Everything that this tool needs, looked at one by one, with the fix beside what is wrong."""
    import importlib.util
    import shutil

    settings, api = sandbox.settings, sandbox.api
    host, port, ca_file = settings.gateway
    status: Json = {"vm_status": "none here", "heartbeat": {"state": "none"}}

    def browser() -> Any:
        if importlib.util.find_spec("playwright"):
            return settings.browser or next(
                filter(None, map(shutil.which, INSTALLED_BROWSERS)), "Playwright's"
            )
        return SandboxError("`flow` needs Playwright.", hint="python3 -m pip install playwright")

    def clock() -> Any:
        with suppress(ValueError):
            ahead = time.time() - seconds_of(api.server_time, "%a, %d %b %Y %H:%M:%S GMT")
            words = f"{ahead:+.0f} s from Plato's"
            return SandboxError(words, hint="Have NTP set it.") if abs(ahead) > 60 else words
        return "Plato's is not known"

    def gateway() -> str:
        connect(host, port, time.monotonic() + REQUEST_SECONDS).close()
        return f"{host}:{port} answers"

    def here() -> Any:
        status.update(sandbox.status() if load_state(sandbox.directory) else {})
        return status.get("error") or status["vm_status"]

    def heartbeat() -> Any:
        word = status["heartbeat"]["state"]
        return SandboxError(word, hint=status["ends"]["remedy"]) if word in ("dead", "degraded") else word

    looks: Json = {
        "Python": lambda: f"{sys.version.split()[0]} ({sys.executable})",
        "ssh": lambda: (
            shutil.which("ssh") or SandboxError("It is missing.", hint="Install OpenSSH's client.")
        ),
        "git": lambda: shutil.which("git") or "none here; the VM's is enough",
        "Browser": browser,
        "Network": lambda: f"{'a' if proxy_for(host, port) else 'no'} proxy; CAs: {ca_file or 'the system'}",
        "API key": lambda: settings.require_key() and "PLATO_API_KEY is set",
        "API": lambda: api.sessions() and f"{settings.base_url} answers",
        "Clock": clock,
        "Gateway": gateway,
        "Sandbox": here,
        "Heartbeat": heartbeat,
    }

    def check(name: str) -> Json:
        try:
            found = looks[name]()
        except SandboxError as error:
            found = error
        fine = not isinstance(found, SandboxError)
        return {"name": name, "ok": fine, "found": str(found), "fix": getattr(found, "hint", None)}

    checks = [*map(check, looks)]
    wrong = ", ".join(check["name"] for check in checks if not check["ok"])
    return {"checks": checks, "error": SandboxError(f"Something is wrong with: {wrong}.") if wrong else None}


def doctor_lines(report: Json) -> Lines:
    for check in report["checks"]:
        style = "good" if check["ok"] else "bad"
        yield check["name"], check["found"], style, f"  {check['fix']}" if check["fix"] else ""


@contextmanager
def on_vm(sandbox: Sandbox, via: str = "auto") -> Iterator[Vm]:
    """The VM of a sandbox, once a `start` that is at work on it has ended."""
    if sandbox.load().get("starting"):
        sandbox.reporter.step("Waiting for the VM to be started")
        with locked(sandbox.directory, shared=True, wait=True):
            pass
    with sandbox.in_use():
        yield Vm(sandbox, via)


def run_ssh(sandbox: Sandbox, words: Words = ()) -> Json:
    """The system's ssh in this process's place; with --json, only the words that would run it."""
    output: Any = sandbox.reporter
    with on_vm(sandbox, "ssh") as vm:
        ssh = [*ssh_words(sandbox, *["-t"] * sys.stdin.isatty()), *words]
        if not output.json:
            vm.answers()
            become(ssh, output)
    return {"command": ssh}


def run_exec(sandbox: Sandbox, words: Words = ()) -> Json:
    """A command on the VM as if it were one here; one word is a line for the shell."""
    output: Any = sandbox.reporter
    if not words:
        raise UsageError("There is no command to run.", hint="For example: plato-sandbox exec ls /home/plato")
    line = shell_words(words) if words[1:] else words[0]

    def feed(file: Any) -> None:
        if not sys.stdin.isatty():
            file.write(sys.stdin.buffer.read())

    with on_vm(sandbox) as vm:
        if vm.answers() and not output.json:
            become([*ssh_words(sandbox), "--", line], output)
        outcome = vm.outcome(line, feed, EXEC_SECONDS)
    stdout, stderr = (part.decode("utf-8", "replace") for part in (outcome.stdout, outcome.stderr))
    return {"exit_code": outcome.code, "via": vm.via, "stdout": stdout, "stderr": stderr}


def exec_lines(report: Json) -> Lines:
    """None: what the command wrote is not ours to change."""
    sys.stdout.write(report["stdout"])
    sys.stderr.write(report["stderr"])
    yield from ()


def plan_tunnels(sandbox: Sandbox, ports: Words) -> Iterator[tuple[str, int, int, str]]:
    """What each tunnel is called, its port on the VM, the one that is wanted here, and how that (a NUL) is
    used."""
    for text in ports:
        first, _, second = text.partition(":")
        there, here = (int(number_in("PORT", port, 1, 65535)) for port in (first, second or first))
        yield f"port {there}", there, here, "127.0.0.1:\0"
    if ports:
        return
    config = sandbox._config("", "", stored=True)
    app = whole_number(config.compute.get("app_port"))
    if app:
        yield "app", app, app, "http://127.0.0.1:\0"
    for name, listener in dict_in(config.content, "listeners").items():
        if listener.get("type", "db") == "db" and listener["db_type"] in AUDIT_DRIVERS:
            login = Database(name, listener).login
            user, base = login["user"], login["database"]
            use = f"psql postgresql://{quoted(user)}@127.0.0.1:\0/{quoted(base)}"
            if listener["db_type"] == "mysql":
                use = f"mysql -h127.0.0.1 -P\0 {shell_words(['-u', user, '-p', base])}"
            yield str(name), login["port"], login["port"], use


def run_tunnel(sandbox: Sandbox, port: Words = ()) -> None:
    """Ports of the VM on 127.0.0.1 until Ctrl-C, the ordinary end."""
    import threading

    output: Any = sandbox.reporter
    with sandbox.in_use():
        plan = [*plan_tunnels(sandbox, port)]
    if not plan:
        raise UsageError("The config names no port; name one, such as 8080.")
    tunnels = []
    for name, there, wanted, use in plan:
        here = Tunnel(sandbox, name, there, free_port(wanted)).port
        tunnels.append({"name": name, "port": there, "local_port": here, "use": use.replace("\0", str(here))})
    begun(
        output,
        {"tunnels": tunnels},
        [*((tunnel["name"], tunnel["use"]) for tunnel in tunnels), "(Ctrl-C ends it)"],
    )
    with until_interrupted():
        threading.Event().wait()


def run_open(sandbox: Sandbox, print: bool = False) -> Json:  # noqa: A002  (the name of the option)
    output: Any = sandbox.reporter
    with sandbox.in_use():
        address = sandbox.find_address()
    if not print and not output.json:
        open_browser(address["url"], output)
    return address


_LOGS = r"""
fail() { code=$1; shift; printf '%s\n' "$*" >&2; exit "$code"; }
[ "$terminal" = True ] || stty -onlcr 2>/dev/null
command -v docker >/dev/null 2>&1 || fail 69 "The VM has no docker."
found=$(docker ps -a --format '{{.Names}} {{.Label "com.docker.compose.service"}}' | sort) ||
  fail 70 "Docker on the VM does not answer."
[ "$found" ] || fail 66 "There is no container on the VM. Make some: plato-sandbox start-services"
eval "set -- $services"
for one; do
  case " $(echo $found) " in *" $one "*) ;; *) fail 66 "No container is called $one: $(echo $found)" ;; esac
done
printf '%s
' "$found" | { while read -r name service; do
  service=${service:-$name}
  case "$# $* " in '0 '* | *" $service "* | *" $name "*) ;; *) continue ;; esac
  docker logs $follow --tail "$lines" -- "$name" 2>&1 | sed -u "s/^/$service | /" &
  [ "$follow" ] || wait
done; wait; }
"""


def run_logs(
    sandbox: Sandbox,
    service: Words = (),
    follow: bool = False,
    lines: int | None = None,
    worker: bool = False,
    vm: bool = False,
) -> Json | None:
    """What containers of the VM wrote, or what Plato noted of the VM itself or of its worker."""
    output: Any = sandbox.reporter
    if follow and output.json:
        raise UsageError("--follow and --json do not go together.")
    if vm or worker:
        with sandbox.in_use() as state:
            answer = sandbox.api.job_logs(state["session_id"], state["job_id"], lines or 100)
        noted = map(as_dict, as_list(answer.get("logs")))
        told = [f"{entry.get('timestamp')}  {entry.get('message')}" for entry in noted]
        return {"lines": [line for line in told if vm or "worker" in line.lower()]}
    given = {"follow": "--follow" * follow, "lines": "all" if lines is None else lines}
    script = assigned(**given, services=shell_words(service), terminal=sys.stdout.isatty()) + _LOGS
    with on_vm(sandbox, "ssh" if follow else "auto") as machine:
        if follow:
            machine.answers()
            # Of a terminal that is gone, the VM's processes learn at once.
            become([*ssh_words(sandbox, "-tt"), shell_words(["exec", "sh", "-c", script])], output)
        return {"lines": machine.run(script).decode("utf-8", "replace").split("\n")[:-1]}


def run_flow(
    sandbox: Sandbox,
    flow_name: Words = (),
    list: bool = False,  # noqa: A002  (the name of the option)
    all: bool = False,  # noqa: A002
    local: bool = False,
    api: bool = False,
    headless: bool = True,
    **options: Any,
) -> Json:
    source = "local" if local else "api" if api else ""
    if list:
        known = sandbox.flows(source)
        flows = [{**flow, "steps": len(flow["steps"])} for flow in known.flows]
        return {"source": "local" if known.path else "api", "flows_path": known.path, "flows": flows}
    output: Any = sandbox.reporter
    told = partial(show_flow_progress, output)
    return sandbox.flow(flow_name, told=told, every=all, source=source, **options)


def flow_lines(report: Json) -> Lines:
    if "report" not in report:  # of --list
        width = max((len(flow["name"]) for flow in report["flows"]), default=0)
        for flow in report["flows"]:
            steps = counted(flow["steps"], "step")
            yield f"{flow['name']:<{width}}  {steps:>8}  {flow['description']}".rstrip()
        return
    if report["mutations"] is not None:
        yield "Mutations", mutation_words(map(Mutation, report["mutations"]))
    yield "Report", shown_here(report["report"])


def show_flow_progress(output: Output, result: Json, step: Json | None) -> None:
    """A line for each step that ended, and for a flow that ended how it went."""
    output.finish(told=False)
    if output.json:
        return
    if step is None:
        for line in flow_end_lines(result):
            output.result(line)
    elif step["number"] == 0 and step["status"] == "passed":
        output.result(f"Flow {result['name']}{': ' if result['description'] else ''}{result['description']}")
    else:
        tries = f", {step['attempts']} attempts" if step["attempts"] > 1 else ""
        what = step["description"] or f"{step['type']} {step['target']}".rstrip()
        words = f"{step['number'] or ' ':>2} {what} ({step['seconds']:.2f} s{tries})"
        verdict = (None, "ok", "good") if step["status"] == "passed" else (None, "FAILED", "bad")
        output.result((*verdict, " " * (8 - len(verdict[1])) + words))
        output.stdout.flush()


def flow_end_lines(result: Json) -> Lines:
    """The verdict of a flow; after a failure, all that is known of it."""
    count = len(result["steps"]) - 1
    done = sum(step["status"] == "passed" for step in result["steps"][1:])
    if result["passed"]:
        yield f"Flow {result['name']} passed: {counted(count, 'step')} in {result['seconds']:.1f} s."
    else:
        yield f"Flow {result['name']} failed: {done} of {count} steps passed in {result['seconds']:.1f} s."
        yield from failure_lines(result["failure"])
    yield "Trace", result["trace_command"]


def failure_lines(failure: Json) -> Lines:
    yield "Place", failure["place"]
    yield "Expected", failure["expected"]
    yield "Seen", failure["seen"], "bad"
    yield "Address", failure["url"], "", f" (HTTP {failure['http_status']})" if failure["http_status"] else ""
    for number, line in enumerate((failure["text"] or "").split("\n")[:8]):
        yield "" if number else "Page says", line
    yield from (("Also", trouble) for trouble in failure["troubles"][:5])
    yield "Picture", failure["picture"] and shown_here(failure["picture"])


def run_audit_ui(
    sandbox: Sandbox,
    port: int | None = None,
    browser: bool = True,
    database_url: str = "",
    **options: Any,
) -> None:
    """Serve the page until Ctrl-C, its ordinary end."""
    output: Any = sandbox.reporter
    output.step("Looking for the databases")
    plan = plan_audit(sandbox, url=database_url, **options)
    sandbox.api.hang_up()
    check_audit_packages()
    if database_url:
        plan.databases[0].tables()  # whether it leads anywhere
    output.step("Starting the page")
    free, for_person = free_port(port), browser and not output.json

    def ready() -> None:
        url = f"http://127.0.0.1:{free}"
        names = [database.name for database in plan.databases]
        about = {"url": url, "port": free, "listeners": names, "config": plan.config.path or None}
        begun(output, about, [f"The page is at {url} (Ctrl-C ends it)"])
        if for_person:
            open_browser(url, output)

    with until_interrupted():
        serve_page(partial(show_audit_page, plan), free, ready)


@contextmanager
def until_interrupted() -> Iterator[None]:
    """The block goes on until Ctrl-C, which is its ordinary end."""
    import signal

    try:
        yield
    except Interrupted as interruption:
        if interruption.number != signal.SIGINT:
            raise


def begun(output: Output, document: Json, lines: Iterable[Line]) -> None:
    """Show at its beginning what a command does that goes on until Ctrl-C; later errors are in words only."""
    if output.json:
        output.document(document)
        output.json = False
    else:
        for line in lines:
            output.result(line)
    output.stdout.flush()


def open_browser(url: str, output: Output) -> None:
    """Show an address to the person at this machine, if there is a screen."""
    import shutil
    import subprocess

    mac = sys.platform == "darwin"
    program = shutil.which("open" if mac else "xdg-open")
    if program and (mac or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        quiet = subprocess.DEVNULL
        launch([program, url], output, stdin=quiet, stdout=quiet, stderr=quiet)


def known_sandboxes(sandbox: Sandbox, every: bool = False) -> list[Json]:
    """Every sandbox that this host started and that may still run, as its heartbeat's log, its record and
    Plato tell of it. every: also the other running sessions of the key.

    Each: directory, session_id, service, created_at, vm_status, gone, and, as `Sandbox.status` tells them,
    heartbeat and ends; orphan: why no command in a directory is for it, None for most.
    """
    read = map(facts_in, matching(sandbox.settings.home, r"heartbeat_.*\.log"))
    found = {facts["session_id"]: facts for facts in read if text_in(facts, "session_id")}
    rows = [_known_sandbox(sandbox, session_id, facts) for session_id, facts in found.items()]
    for session in map(as_dict, as_list(sandbox.api.sessions().get("sessions")) if every else []):
        word, _ = vm_status(session, "")
        if text_in(session, "session_id") not in found and word not in TERMINAL_STATUSES:
            rows.append({**session, "vm_status": word, "orphan": "this host did not start it, or forgot it"})
    sandbox.api.hang_up()
    keys = "directory session_id service created_at vm_status gone heartbeat ends orphan".split()  # noqa: SIM905
    return [{key: row.get(key) for key in keys} for row in rows]


def _known_sandbox(sandbox: Sandbox, session_id: str, facts: Json) -> Json:
    report: Json = {}
    with suppress(SandboxError):  # there is no record, or none that can be read
        other = sandbox.silent(re.sub(r"/\.plato(/sandboxes)?$", "", str(facts.get("directory"))))
        report = {**other.status(), "directory": other.directory}
    if report.get("session_id") != session_id:
        other = sandbox.silent()
        other.state = {"session_id": session_id}
        report = {**other.state, "error": other.end_of_vm(), "orphan": "no directory has its record"}
        report["vm_status"] = "gone" if report["error"] else "active"
    return {**report, "gone": isinstance(report["error"], NoSandboxError)}


def list_lines(report: Json) -> Lines:
    for row in report["sandboxes"]:
        yield shown_path(row["directory"] or f"session {row['session_id']}")
        yield "Service", row["service"]
        yield "Created", row["created_at"]
        yield "VM Status", row["vm_status"]
        if row["ends"]:
            yield "Ends at", row["ends"]["at"], "", f" ({row['ends']['why']})"
            yield "Heartbeat", row["heartbeat"]["state"]
        if row["orphan"]:
            yield "Orphaned", row["orphan"], "warn", f"; plato-sandbox stop --session-id {row['session_id']}"
    if not report["sandboxes"]:
        yield "There are none."


def run_gc(sandbox: Sandbox, dry_run: bool = False) -> Json:
    """Forget the sandboxes whose VM is gone; the others that no directory knows are for the user to end."""
    rows = known_sandboxes(sandbox)
    gone = [row for row in rows if row["gone"]]
    for row in gone if not dry_run else ():
        end_row(sandbox, row)
    return {"forgotten": gone, "orphans": [row for row in rows if row["orphan"] and not row["gone"]]}


def gc_lines(report: Json) -> Lines:
    for label in ("forgotten", "orphans"):
        yield f"{label.capitalize()}:"
        yield from list_lines({"sandboxes": report[label]})


def end_row(sandbox: Sandbox, row: Json) -> None:
    """Stop one of the `known_sandboxes`, from its directory where it has one."""
    place = sandbox.directory if row["orphan"] else row["directory"]
    Sandbox(place, settings=sandbox.settings, reporter=sandbox.reporter).stop(row["session_id"])


def run_stop(sandbox: Sandbox, all: bool = False, yes: bool = False, **options: Any) -> Json:  # noqa: A002
    if not all:
        return sandbox.stop(**options)
    rows = known_sandboxes(sandbox)
    names = ", ".join(row["directory"] or row["session_id"] for row in rows)
    if rows:
        confirm(sandbox.reporter, f"Stop the VMs of {names}?", yes)
    for row in rows:
        end_row(sandbox, row)
    return {"stopped": [row["session_id"] for row in rows], "already_gone": False}


def confirm(output: Any, question: str, yes: bool) -> None:
    """Ask whoever is at standard input, unless --yes was given; SandboxError for anything but a yes."""
    if not yes:
        output.finish()
        output._write(f"{printable(question)} [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise SandboxError("Nobody said yes, so that was not done.", hint="--yes says it beforehand.")


# What may come next, with its help: from the table of all options, given the words so far.
_COMPLETION = r"""awk -F '~' -v typed="TYPED" '
    { commands[$1]; row[NR] = $0 }
    END {
      count = split(typed, word, "\n")
      for (i = 1; i <= count && command == ""; i++)
        if (word[i] in commands && word[i - 1] !~ /^(-w|--working-dir)$/) command = word[i]
      for (n = 1; n <= NR; n++) {
        split(row[n], of, "~")
        if (of[1] != command || of[2] ~ /^\[/) continue
        if (of[4] != "" && count && (word[count] == of[2] || word[count] == of[3])) {
          if (of[4] !~ /[|]/) exit
          gsub("[|]", "\n", of[4]); print of[4]; exit
        }
        told = told of[2] "\t" of[5] "\n"
      }
      printf "%s", told
    }'"""
_SHELL_WORDS = """\
_plato_sandbox_words() {
  printf '%s\\n' TABLE | COMPLETION
}
"""
_SHELLS = {
    "bash": _SHELL_WORDS
    + r"""_plato_sandbox() {
  local IFS=$'\n'
  local found=$(_plato_sandbox_words "${COMP_WORDS[*]:1:COMP_CWORD-1}" | cut -f 1)
  COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _plato_sandbox plato-sandbox plato_sandbox.py""",
    "zsh": _SHELL_WORDS
    + r"""_plato_sandbox() {
  local -a found
  found=(${(f)"$(_plato_sandbox_words "${(F)words[2,CURRENT-1]}" | sed 's/:/\\:/g' | tr '\t' :)"})
  _describe plato-sandbox found || _files
}
compdef _plato_sandbox plato-sandbox plato_sandbox.py""",
    "fish": r"""function __plato_sandbox_words
  set -l words (commandline -opc)
  printf '%s\n' TABLE | COMPLETION
end
complete -c plato-sandbox -n __fish_use_subcommand -f
complete -c plato-sandbox -a '(__plato_sandbox_words)'""",
}


def run_completion(sandbox: Sandbox, shell: str = "") -> Json:
    """What a shell is to read, so that Tab completes commands, options and choices."""
    if shell not in _SHELLS:
        raise UsageError(f"It is `completion bash`, `completion zsh` or `completion fish`, not {shell!r}.")
    rows = [("", name, "", "", command.about) for name, command in COMMANDS.items()]
    for name, command in COMMANDS.items():
        for text in (command.text, COMMON_OPTIONS):
            for _, short, option, value, words in option_lines(text):
                rows.append((name, option, (short or "")[:2], value or "", words))
    table = shell_words(["\n".join(map("~".join, rows))])
    typed = "$(string join \\n -- $words[2..])" if shell == "fish" else "$1"
    script = _SHELLS[shell].replace("COMPLETION", _COMPLETION).replace("TYPED", typed)
    return {"shell": shell, "script": script.replace("TABLE", table)}


# A command. run: called with a Sandbox and the options that were given, returns the report, which is the
# document of --json (its `error`, if any, ends the command; None is shown already); lines: what people are
# shown of it; text: the options, one a line (see `add_options`), then what --help adds; interrupted: what to
# do next after Ctrl-C.
Command = collections.namedtuple(  # noqa: PYI024  (`typing` is not imported)
    "Command", "about run lines text interrupted", defaults=("", None)
)


COMMON_OPTIONS = """\
-w, --working-dir DIR    directory of the sandbox (default: this one)
-j, --json               one JSON document on stdout
-q, --quiet              no progress, only warnings and errors
    --verbose            show requests and child processes on stderr"""

# What stands below the options is shown as it is: in lines of at most 79 characters. {NAME} is a constant.
COMMANDS = {
    "start": Command(
        "Start a new sandbox environment",
        run_start,
        start_lines,
        """\
-c, --from-config        use plato-config.yml in the working directory
-s, --simulator NAME     NAME, NAME:TAG, NAME:VERSION@DATASET or NAME:ARTIFACT-UUID
-a, --artifact-id ID     specific artifact id
-b, --blank              create a blank VM
-d, --dataset NAME       dataset from config or simulator (default: {DEFAULT_DATASET})
-t, --tag TAG            artifact tag (default: {DEFAULT_TAG})
    --service NAME       service name (required for a blank VM)
    --cpus N             number of CPUs of a blank VM (default: {DEFAULT_CPUS})
    --memory N           its memory in MB (default: {DEFAULT_MEMORY_MB})
    --disk N             its disk in MB (default: {DEFAULT_DISK_MB})
    --timeout SECONDS    how long to wait for the VM to be ready (default: {DEFAULT_READY_SECONDS})
    --lifetime N         seconds until the VM ends, heartbeats or not (default: {DEFAULT_LIFETIME_SECONDS})
    --idle N             seconds without a command, SSH connection or tunnel until the VM ends
    --no-reset           skip the initial reset after the VM is ready
    --replace            stop a live sandbox of this directory first

modes (choose one):
  plato-sandbox start --from-config [--dataset base]
  plato-sandbox start --simulator espocrm[:prod-latest]
  plato-sandbox start --artifact-id ID
  plato-sandbox start --blank --service myapp [--cpus 4 --memory 2048]
""",
        "If the sandbox runs all the same, this ends it: plato-sandbox stop",
    ),
    "stop": Command(
        "Stop and destroy the sandbox",
        run_stop,
        stop_lines,
        """\
    --session-id ID      stop this session, from any directory
  | --all                stop every sandbox that this host started
    --yes                do not ask first""",
        "The VM may still run, and nothing is lost; run the command again.",
    ),
    "down": Command(
        "Stop and destroy the sandbox, as `stop` does",
        Sandbox.stop,
        stop_lines,
        interrupted="The VM may still run, and nothing is lost; run the command again.",
    ),
    "status": Command("Show current sandbox status", Sandbox.status, status_lines),
    "up": Command(
        "From a directory to a verified simulator: check, start, start-services, start-worker, flow",
        run_up,
        up_lines,
        """\
-d, --dataset NAME       dataset of the config (default: the sandbox's, or base)
    --via git|sync       how the code gets there, see start-services (default: git)

The code is sent while the VM boots. Run again, it goes on with the VM that is
there, and sends what has changed. It ends at the first stage that fails; the
last one is `flow --verify-no-mutations`.
""",
        "Run `plato-sandbox up` again to go on; `plato-sandbox down` ends the VM.",
    ),
    "list": Command(
        "Show the sandboxes that this host started and that may still run",
        lambda sandbox, all=False: {"sandboxes": known_sandboxes(sandbox, all)},  # noqa: A006
        list_lines,
        "    --all                also the key's other running sessions",
    ),
    "gc": Command(
        "Forget sandboxes that are gone, and name those that nothing is for",
        run_gc,
        gc_lines,
        "-n, --dry-run            only show them",
    ),
    "doctor": Command("See whether this machine has all that is needed", run_doctor, doctor_lines),
    "pull-config": Command(
        "Bring the config and the flows of an artifact here",
        run_pull_config,
        lambda report: [f"Written: {', '.join(report['written'])}"],
        """\
-a, --artifact-id ID     the artifact (default: the sandbox's)
    --yes                write over files that differ without a question""",
    ),
    "init": Command(
        "Make a plato-config.yml and a login flow from the Compose file that is here",
        run_init,
        lambda report: [f"Made {' and '.join(report['made'])}. Adapt them; then: plato-sandbox check"],
        "",
    ),
    "check": Command(
        "Check plato-config.yml, its flows and Compose files, without a VM",
        run_check,
        check_lines,
        """\
-d, --dataset NAME       only this dataset (default: all of them)

What is wrong is told as file:line:column, and the exit code is 8. It needs no
key, so it can be a step of a pre-commit hook or of CI.
""",
    ),
    "ssh": Command(
        "Log in to the VM, or run a command there, with the system's ssh",
        run_ssh,
        lambda report: [shell_words(report["command"])],
        """\
    [--] COMMAND         what to run there, as ssh takes it (default: a shell)

examples:
  plato-sandbox ssh
  plato-sandbox ssh -- docker ps
""",
    ),
    "exec": Command(
        "Run a command on the VM as if it were a local one",
        run_exec,
        exec_lines,
        """\
    [--] COMMAND         the command and its arguments, or one line for the shell

Standard input, both outputs and the exit code are the command's. It goes over
SSH, and through the API where that does not answer (then the output comes at
the end, and standard input must end first).

examples:
  plato-sandbox exec ls -la /home/plato/worktree
  plato-sandbox exec 'docker ps | wc -l'
  plato-sandbox exec --json -- psql --version
""",
    ),
    "logs": Command(
        "Show what the containers on the VM wrote",
        run_logs,
        lambda report: report["lines"],
        """\
    [SERVICE...]         Compose services or containers (default: all)
-f, --follow             go on, until Ctrl-C
  | --worker             instead, what Plato noted of its worker
  | --vm                 instead, what Plato noted of the VM itself
-n, --lines N            the last N lines of each

examples:
  plato-sandbox logs app -f -n 20
  plato-sandbox logs --vm
""",
    ),
    "tunnel": Command(
        "Reach ports of the VM on 127.0.0.1, until Ctrl-C",
        run_tunnel,
        tuple,
        """\
    [PORT...]            PORT or PORT:LOCAL (default: the app's and the databases')

A local port that is taken gives way to any that is free. Each connection is one
of its own, so a broken one is made again by whoever uses it.

examples:
  plato-sandbox tunnel
  plato-sandbox tunnel 8080 5432:15432
""",
    ),
    "open": Command(
        "Show the application of the sandbox in the browser",
        run_open,
        lambda report: [report["url"]],
        "    --print              only print the address",
    ),
    "sync": Command(
        "Sync local code to the sandbox",
        run_sync,
        sync_lines,
        """\
    [PATH]               what to sync (default: the working directory)
    --remote-path P      where to on the VM (default: {SYNC_ROOT}/<service>)
-n, --dry-run            show what would be sent and removed, change nothing
  | --watch              go on: send changes as they are made, until Ctrl-C
    --gitignore          honour .gitignore files too, not only .platoignore
-f, --force              also when nearly everything would be removed or replaced
    --via auto|api|ssh   the way to the VM (default: auto)
-t, --timeout SECONDS    the longest wait for one step on the VM (default: {SYNC_SECONDS:g})

Only what differs is sent. What an earlier sync put on the VM and is gone here
is removed there; what the VM made stays. .platoignore files (in the syntax of
.gitignore) keep files out. Always left out: private keys, .plato,
{EXCLUDED_NAMES}.

examples:
  plato-sandbox sync                      this directory
  plato-sandbox sync ./src --dry-run      what would be done for another one
  plato-sandbox sync --watch              keep the VM up to date while you edit
""",
        "The tree on the VM is the old one or the new one; go on with: plato-sandbox sync",
    ),
    "flow": Command(
        "Execute a test flow against the simulator",
        run_flow,
        flow_lines,
        """\
-f, --flow-name NAME...  flow to execute; may be given more than once (default: login)
  | --all                execute all flows, in the order of the file
-l, --list               show which flows there are
    --local              only the flows file of the local config
  | --api                only the flows that Plato has
    --base-url URL       begin at this address instead; needs no sandbox
    --headed             show the browser's window
  | --headless           do not show it (default)
    --keep-open          show the window and leave it open at the end, until Ctrl-C
    --slowmo MS          wait so long after each action of the browser
-o, --output DIR         for report, pictures and traces (default: {FLOW_OUTPUT})
    --verify-no-mutations  fail also when the database was changed
-t, --timeout SECONDS    the longest time for all of it (default: {FLOW_SECONDS:g})

Flows come from the file that the config's metadata.flows_path names, else
from Plato (--local, --api: only from there). Needs Playwright and Chrome or
Chromium; what is missing is told with the command that brings it. Values of
password fields are hidden in all that is shown and written. A failed flow is
exit code 8.

examples:
  plato-sandbox flow                      the login flow
  plato-sandbox flow --list               which flows there are
  plato-sandbox flow -f checkout --headed --slowmo 500
  plato-sandbox flow --all --verify-no-mutations
""",
    ),
    "start-services": Command(
        "Push code and start Docker Compose services",
        Sandbox.start_services,
        services_lines,
        """\
-d, --dataset NAME       dataset of the config (default: the sandbox's)
    --via git|sync       git pushes the code to Gitea as well, sync does not (default: git)
    --build              build images in any case (default: after the code changed)
  | --no-build           do not build images anew
    --force-recreate     recreate containers even if nothing changed
-t, --timeout SECONDS    the longest wait for one `docker compose up` (default: {UP_SECONDS:g})

The code is what `sync` would bring, without what .gitignore files hide unless
plato-config.yml names it. The VM pushes it to a workspace branch in Gitea and
becomes a clone of that; what services wrote beside it there stays.

examples:
  plato-sandbox start-services                 with the sandbox's dataset
  plato-sandbox start-services --build         after a change of a base image
  plato-sandbox start-services --via sync      for a key without a repository
""",
        "`docker compose up` was ended if it had begun, containers that run stay. Run it again to go on.",
    ),
    "start-worker": Command(
        "Start or configure the Plato worker",
        Sandbox.start_worker,
        worker_lines,
        """\
-s, --service NAME       service name (default: the sandbox's)
-d, --dataset NAME       dataset name (default: the sandbox's, or {DEFAULT_DATASET})
    --config-path FILE   path to plato-config.yml
    --wait               wait until the worker is up
    --wait-timeout SECONDS  the longest wait of --wait (default: {WORKER_SECONDS:g})""",
        "The worker may be starting all the same; see whether it is up: plato-sandbox state",
    ),
    "state": Command(
        "Show what changed in the environment's databases",
        Sandbox.read_state,
        state_lines,
        "-v, --verify-no-mutations  exit 8 if there are any mutations",
    ),
    "reset": Command(
        "Put the environment back to its initial state",
        Sandbox.reset,
        lambda report: ["Environment reset successfully."],
        interrupted="The reset may go on in the VM; to be sure of the state, run it again.",
    ),
    "snapshot": Command(
        "Create a snapshot (artifact) of the current state",
        Sandbox.snapshot,
        snapshot_lines,
        """\
    --description TEXT   a note that stays with the artifact
    --include-config     send the config's dataset, flows, ports and logins along (as config sandboxes do)
  | --no-config          do not send them
    --target HOST        host of its pages (default: that of the artifact before it)
    --wait               wait until the artifact is ready
    --wait-timeout SECONDS  the longest wait of --wait (default: {ARTIFACT_SECONDS:g})""",
    ),
    "clear-audit": Command(
        "Empty the audit tables that `state` reads",
        Sandbox.clear_audit,
        lambda report: ["Audit tables emptied successfully."],
    ),
    "audit-ui": Command(
        "Choose ignore rules by looking at the databases, in the browser",
        run_audit_ui,
        tuple,
        """\
-d, --dataset NAME       dataset of the config (default: the sandbox's)
    --listener NAME      only this `db` listener (default: all of them)
    --port N             port of the page, or any that is free (default: any)
    --no-browser         do not open a browser, only print the address
    --direct             reach db_host from here, not through the gateway
    --database-url URL   this database, without a sandbox; the password may stay out

The page shows what changed since the last reset and what is in the databases;
rules that are chosen there are saved to plato-config.yml. The databases are
read only. Needs streamlit, psycopg2-binary and pymysql.

examples:
  plato-sandbox audit-ui                       the databases of the dataset
  plato-sandbox audit-ui --no-browser --port 8600
  plato-sandbox audit-ui --database-url postgresql://user@host/database
                                           with PGPASSWORD set
""",
    ),
    "completion": Command(
        "Print what makes Tab complete commands and options in a shell",
        run_completion,
        lambda report: report["script"].split("\n"),
        """\
    [SHELL]              bash, zsh or fish

examples:
  plato-sandbox completion bash >> ~/.bashrc
  plato-sandbox completion fish > ~/.config/fish/completions/plato-sandbox.fish
""",
    ),
}

COMMANDS = {
    name: command._replace(text=command.text.format_map(globals())) for name, command in COMMANDS.items()
}

EXAMPLES = """\
examples:
  plato-sandbox start --from-config       a VM for this directory's config
  plato-sandbox status --json             everything about it, for programs
  plato-sandbox sync                      bring the VM's files up to date
  plato-sandbox start-services            push the code, start Docker Compose
  plato-sandbox state --verify-no-mutations

exit codes:
  0 done  1 failed  2 usage  3 no sandbox, or it is gone  4 authentication
  5 conflict  6 API or network  7 timed out, or outcome unknown  8 a check said
  no  9 the worker is not up  130/143 interrupted
"""


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser with the options of one command; the others are only named, which takes half the time.

    Only options that are given are in its result: what is left out is for the operation to decide.
    """
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message[:1].upper()}{message[1:]}.", hint=f"See {self.prog} --help")

    about: Json = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
        "argument_default": argparse.SUPPRESS,
    }
    words = "Ephemeral cloud VMs for simulator development on Plato."
    parser = Parser(prog=PROGRAM, description=words, epilog=EXAMPLES, **about)
    parser.add_argument("--version", action="store_true", help="show the version and a hash of this file")
    add_options(parser, COMMON_OPTIONS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        options, _, more = command.text.partition("\n\n")
        about.update(help=command.about, description=f"{command.about}.", epilog=more)
        part = commands.add_parser(name, **about)
        if name == chosen:
            add_options(part, options)
            add_options(part, COMMON_OPTIONS)
    return parser


def add_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Options from lines such as `-t, --timeout SECONDS   the longest wait`, which --help breaks anew.

    `|` before an option: it excludes the one above. `--no-x` sets x to False. N, SECONDS and MS are numbers,
    a|b a choice, NAME... may be given again and again; without a word behind it, the option takes none.
    [X] is an argument, [X...] are several, and [--] X is all that follows.
    """
    import argparse

    group: Any = None
    for excludes, short, name, value, words in option_lines(text):
        names, how = [*filter(None, [short]), name], {"help": words, "metavar": value}
        if name.startswith("["):
            many = {"[--]": argparse.REMAINDER, "...]": "*"}.get(name[-4:], "?")
            metavar = value or name.strip("[.]")
            where = "words" if many == argparse.REMAINDER else metavar.lower()
            parser.add_argument(where, help=words, metavar=metavar, nargs=many)
            continue
        if not excludes:
            group = parser.add_mutually_exclusive_group()
        if value is None:
            off = name.startswith("--no-")
            action = "store_false" if off else "store_true"
            how = {"help": words, "action": action, "dest": name[5 if off else 2 :].replace("-", "_")}
        elif value.endswith("..."):
            how.update(metavar=value[:-3], action="append")
        elif "|" in value:
            how = {"help": words, "choices": value.split("|")}
        else:
            how["type"] = {"N": int, "SECONDS": float, "MS": float}.get(value, str)
        group.add_argument(*names, **how)


def option_lines(text: str) -> Iterator[tuple[Any, ...]]:
    """Of each line: `|` or None, the short option or None, the long one, what it takes or None, its help."""
    for line in text.partition("\n\n")[0].splitlines():
        match: Any = re.fullmatch(r"(?: {2}(\|) |(-\w), | *)(\S+)(?: (\S+))? {2,}(.*)", line)
        yield match.groups()


def command_word(arguments: Words) -> str:
    """The command that is asked for, if any; UsageError for another word, with what was probably meant."""
    words = iter(arguments)
    for word in words:
        if word in ("-w", "--working-dir"):
            next(words, None)
        elif word in COMMANDS:
            return word
        elif not word.startswith("-"):
            command = next(filter(COMMANDS.__contains__, words), None)
            meant = f"did you mean `plato-sandbox {command}`?" if command else _meant(word, COMMANDS)
            raise UsageError(f"There is no command {word!r}; {meant}")
    return ""


# What the letters of `plato sandbox` are here.
_THEIR_OPTIONS = {"-v": "--verbose", "-n": "-w DIR (a directory has one sandbox)", "-t": "--lifetime"}


def unknown_word(word: str, command: str) -> UsageError:
    """The error for a word that the command does not take, with the option that was probably meant."""
    if not command:
        return UsageError(f"{word!r} needs a command before it.", hint="See plato-sandbox --help")
    known = re.findall("--[a-z-]+", COMMANDS[command].text + COMMON_OPTIONS)
    meant = _THEIR_OPTIONS.get(word) or closest(word.partition("=")[0], known)
    hint = f"Did you mean {meant}?" if meant else f"See plato-sandbox {command} --help"
    what = "option" if word.startswith("-") else "argument"
    return UsageError(f"`{command}` takes no {what} {word!r}.", hint=hint)


# ----------------------------------------------------------------------------------------------------------
# main: the only place that catches errors and turns them into words and exit codes
# ----------------------------------------------------------------------------------------------------------


def main(argv: Words | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.name == "nt":
        sys.exit("plato-sandbox runs on Linux, macOS and WSL, not on native Windows; use it inside WSL.")
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output = Output(sys.stdout, sys.stderr, os.environ)
    # Asked before parsing, for the errors that parsing finds.
    output.json = any(re.fullmatch("--json|-[a-z]*j[a-z]*", word) for word in arguments)
    try:
        output.program, output.commands = invocation(sys.argv[0]), COMMANDS
        code = run(arguments, output)
        with writing_result():
            sys.stdout.flush()
        return code
    except (SandboxError, Interrupted) as error:
        return fail(output, error)
    except KeyboardInterrupt:
        return fail(output, Interrupted(2))  # SIGINT
    except ImportError as error:
        words = f"This Python lacks a part of its standard library ({error.name})."
        return fail(output, SandboxError(words, hint="On Debian: apt-get install python3"))
    except BrokenPipeError:  # whoever read the output has gone, and shells count that as SIGPIPE
        forget_stream(sys.stdout)
        return 141
    except Exception as error:  # noqa: BLE001  (a mistake of ours; a traceback helps no user)
        if output.verbose:
            import traceback

            output.trace(traceback.format_exc().rstrip())
        words = f"This is a mistake in plato-sandbox {__version__} ({type(error).__name__}: {error})."
        mistake = SandboxError(words, hint="Please report it; --verbose shows where.")
        mistake.code = "internal"
        return fail(output, mistake)


def open_closed_streams() -> None:
    """Let a standard stream that was closed (`>&-`) lead nowhere, before a file takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def run(arguments: Words, output: Output) -> int:
    """Parse the command line and run its command; whatever goes wrong is an exception."""
    name = command_word(arguments)
    try:
        parsed, unknown = build_parser(name).parse_known_args(arguments or ["--help"])
    except SystemExit:  # of --help, as mistakes are UsageErrors
        return 0
    options = vars(parsed)
    if not unknown and options.pop("version", False):
        output.result(f"plato-sandbox {__version__} ({hashed(own_text())})")  # so that edited copies show
        return 0
    if unknown or not name:
        raise unknown_word([*unknown, *arguments][0], name)
    for option, value in options.items():
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"{'PATH' if option == 'path' else '--' + option.replace('_', '-')} is empty.")
    del options["command"]
    if options.get("words", [])[:1] == ["--"]:
        del options["words"][0]
    output.json, output.quiet, output.verbose = (
        options.pop(option, False) for option in ("json", "quiet", "verbose")
    )
    directory = options.pop("working_dir", ".")
    output.place = "" if directory == "." else " " + shell_words(["-w", directory])
    command = COMMANDS[name]
    try:
        with SignalGuard(output):
            report = command.run(Sandbox(directory, reporter=output), **options)
    except Interrupted as interruption:
        interruption.hint = interruption.hint or command.interrupted
        raise
    return 0 if report is None else show(report, command, output)


def show(report: Json, command: Command, output: Output) -> int:
    """What a command did, in lines or as its document; and how it ends, if it is an error."""
    error: SandboxError | None = report.pop("error", None)
    if not output.json:
        for line in command.lines(report):
            output.result(line)
    told = output.error(error) if error else {}
    if output.json:
        output.document({**report, **told})
    return error.exit_code if error else report.get("exit_code", 0)


def fail(output: Output, error: SandboxError | Interrupted) -> int:
    told = output.error(error)
    try:
        if output.json:
            output.document(told)
        sys.stdout.flush()
    except (OSError, SandboxError):  # nobody reads it; the exit code still tells
        forget_stream(sys.stdout)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
