#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Ephemeral cloud VMs ("sandboxes") of the Plato platform for simulator developers, from one file.

This file is the whole tool. Copy it into a repository, or install the package of the same name; it needs
Python 3.9 or newer and, for SSH, the OpenSSH client. It imports nothing outside the standard library.

    python3 plato_sandbox.py start --from-config     a VM for the plato-config.yml of this directory
    python3 plato_sandbox.py status                  what the VM and its heartbeat are doing
    python3 plato_sandbox.py sync                    bring the VM's files up to date with this directory
    python3 plato_sandbox.py start-services          push the code, clone it on the VM, start Docker Compose
    python3 plato_sandbox.py start-worker --wait     let the Plato worker watch the databases
    python3 plato_sandbox.py flow                    run the login flow in a browser
    python3 plato_sandbox.py state                   what changed in them since the last reset
    python3 plato_sandbox.py audit-ui                choose what of that to ignore, in the browser
    python3 plato_sandbox.py snapshot                make an artifact of the VM as it is now
    python3 plato_sandbox.py stop                    destroy the VM and everything that belongs to it

Environment
    PLATO_API_KEY                       the key; required by every command that talks to Plato
    PLATO_BASE_URL                      the API (https://plato.so)
    PLATO_GATEWAY_HOST                  the SSH gateway (gateway.plato.so)
    PLATO_GATEWAY_PORT                  its port (443)
    PLATO_HOME                          SSH files and heartbeat records (~/.plato)
    PLATO_HEARTBEAT_INTERVAL_SECONDS    time between two heartbeats (15)
    PLATO_BROWSER                       the Chrome or Chromium that `flow` opens (one that is found)
    PLATO_SANDBOX_COMMAND               how a wrapper calls this tool, for the commands in its hints
    PGPASSWORD, MYSQL_PWD               the password that an --database-url leaves out
    HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, NO_COLOR, TERM    with their usual meaning

Files
    .sandbox.yaml            the sandbox of a directory: ids, address, SSH and heartbeat; no secret
    .platoignore             what `sync` leaves out, in the syntax of .gitignore, at every level
    screenshots/             what the screenshot steps of flows make, beside the flows file
    test-results/            the report of `flow`, with pictures and traces (or --output)
    PLATO_HOME/ssh_<id>.conf, ssh_<id>_key, ssh_<id>_key.pub, known_hosts_<id>, heartbeat_<id>.log,
    PLATO_HOME/git_<id>      where <id> is the first part of the session id; `stop` removes them

Exit codes
    0 done; 1 failed; 2 usage; 3 no sandbox here, or it is gone; 4 authentication; 5 conflict;
    6 the API or the network failed; 7 timed out, or the outcome is unknown;
    8 a check said no (invalid config, failed flow, mutations found); 9 the worker is not up;
    130 and 143 interrupted

Importers may rely on the names in `__all__`, on the exit codes and on the keys of every `--json` document.
Everything else may change between versions.

Sections, each using only those above it: constants, errors, settings, yaml, config, processes, state,
transport, api, ssh, heartbeat, sync, services, worker, flow, audit, sandbox, output, commands, parser,
main.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import http.client
    import socket
    import ssl
    import subprocess
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType
    from typing import Any, NoReturn, TextIO, TypeVar

    Json = dict[str, Any]
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
COMMANDS = (
    *("start", "stop", "status", "sync", "start-services", "start-worker", "state", "reset"),
    *("snapshot", "clear-audit", "flow", "audit-ui"),
)
CONFIG_NAMES = ("plato-config.yml", "plato-config.yaml")

DEFAULT_BASE_URL = "https://plato.so"
DEFAULT_GATEWAY_HOST = "gateway.plato.so"
DEFAULT_GATEWAY_PORT = 443
DEFAULT_HEARTBEAT_SECONDS = 15.0  # with 30, an outage of 90 seconds could end a VM

DEFAULT_CPUS = 2
DEFAULT_MEMORY_MB = 1024
DEFAULT_DISK_MB = 10240
DEFAULT_DATASET = "base"
DEFAULT_TAG = "latest"
DEFAULT_READY_SECONDS = 300
DEFAULT_LIFETIME_SECONDS = 8 * 3600  # a working day; a forgotten VM ends by itself

SERVICE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
CPUS_RANGE = (1, 8)
MEMORY_RANGE_MB = (512, 16384)
DISK_RANGE_MB = (1024, 204800)

REQUEST_SECONDS = 30.0
MAKE_SECONDS = 120.0
SETUP_SECONDS = 180.0
RESET_SECONDS = 180.0
CLOSE_SECONDS = 60.0
STATE_SECONDS = 120.0
SNAPSHOT_SECONDS = 600.0
ARTIFACT_SECONDS = 1800.0
ARTIFACT_POLL_SECONDS = 2.0
READY_POLL_SECONDS = 10
RETRY_STATUSES = frozenset({429, 500, 502, 503, 504})
RETRY_ATTEMPTS = 4
RETRY_WINDOW_SECONDS = 20.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024
SHORTEST_SECRET = 4  # hiding what is shorter would make nonsense of other words

HEARTBEAT_START_SECONDS = 20.0
BEAT_SECONDS = 10.0
BEAT_RETRY_SECONDS = (1.0, 2.0, 3.0)  # the last one again and again, while the VM may still live
BEAT_RETRY_AFTER_SECONDS = 10.0  # the most that a failed beat waits because the server asks for it
BEAT_URGENT_SECONDS = 150.0  # the server ends a VM 120 seconds after its last beat
BEAT_SILENCE_LIMIT_SECONDS = 3600.0  # no good beat for so long: the server ended the VM long ago
BEAT_LOG_EVENTS = 100
WAKE_SECONDS = 15.0
UNHEALTHY_BEATS = 4  # a last good beat older than this many intervals is worth a warning

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
        self.message = printable(message)
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

    status: the HTTP status, or None when the body was the problem; retry_after: seconds, or None.
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
        body: bytes = b"",
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after = retry_after
        self.body = body


class NetworkError(ApiError):
    """No whole answer came. sent: whether the server may have received the request; body: what came."""

    code = "network"

    def __init__(self, message: str, *, hint: str | None = None, sent: bool, body: bytes = b"") -> None:
        super().__init__(message, hint=hint, body=body)
        self.sent = sent


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

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.message = "Interrupted."
        self.hint: str | None = None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count it."""
        return 128 + self.number


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
    return printable(str(text)).rstrip(".")


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


def from_here(path: str) -> str:
    """A path as people name it from the current directory, if it lies below that."""
    try:
        relative = os.path.relpath(path)
    except OSError:  # the current directory is gone
        return path
    return path if relative.startswith("..") else relative


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
        gateway_host: str = DEFAULT_GATEWAY_HOST,
        gateway_port: int = DEFAULT_GATEWAY_PORT,
        home: str = "~/.plato",
        heartbeat_seconds: float = DEFAULT_HEARTBEAT_SECONDS,
        ca_file: str | None = None,
        browser: str | None = None,
    ) -> None:
        self.api_key = api_key
        self.base_url = normal_base_url(base_url)
        self.gateway_host = gateway_host
        self.gateway_port = gateway_port
        self.home = os.path.abspath(os.path.expanduser(home))
        if os.path.expanduser(home).startswith("~"):  # it would be a directory of that name, right here
            raise UsageError(
                "This user has no home directory.", hint="Set PLATO_HOME to a directory for the SSH files."
            )
        self.heartbeat_seconds = heartbeat_seconds
        self.ca_file = os.path.abspath(ca_file) if ca_file else None
        self.browser = browser

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read PLATO_* (see the head of this file); UsageError names a variable that makes no sense."""
        source = os.environ if environment is None else environment
        return cls(
            api_key=source.get("PLATO_API_KEY", "").strip(),
            base_url=source.get("PLATO_BASE_URL") or DEFAULT_BASE_URL,
            gateway_host=source.get("PLATO_GATEWAY_HOST") or DEFAULT_GATEWAY_HOST,
            gateway_port=int(_number(source, "PLATO_GATEWAY_PORT", DEFAULT_GATEWAY_PORT, 1, 65535)),
            home=source.get("PLATO_HOME") or "~/.plato",
            heartbeat_seconds=_number(
                source, "PLATO_HEARTBEAT_INTERVAL_SECONDS", DEFAULT_HEARTBEAT_SECONDS, 0.1, 3600
            ),
            ca_file=source.get("SSL_CERT_FILE") or None,
            browser=source.get("PLATO_BROWSER") or None,
        )

    def require_key(self) -> str:
        """The API key, or AuthenticationError."""
        if not self.api_key:
            raise AuthenticationError(
                "PLATO_API_KEY is not set, so Plato cannot know who is asking.",
                hint="Set it in this shell: export PLATO_API_KEY=...",
            )
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise AuthenticationError(
                "PLATO_API_KEY holds characters that no key has (a line break, perhaps).",
                hint="Copy the key again and set PLATO_API_KEY anew.",
            )
        return self.api_key


def _number(source: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = source.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise UsageError(f"{name} is {text!r}; it must be a number from {low:g} to {high:g}.")
    return value


def normal_base_url(url: str) -> str:
    """Drop a trailing "/" or "/api"; refuse what would send the key somewhere it could be read.

    Plain http is allowed on loopback only.
    """
    trimmed = url.strip().rstrip("/")
    if trimmed.endswith("/api"):
        trimmed = trimmed[: -len("/api")].rstrip("/")
    match = re.fullmatch(r"(https?)://(\[[0-9a-fA-F:.]+\]|[^/?#@:\s]+)(?::(\d{1,5}))?(/[^?#\s]*)?", trimmed)
    if match is None or not 0 < int(match[3] or 443) < 65536:
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
# yaml: text to values with the line and column of every node, and back; refuses what it does not support
# ----------------------------------------------------------------------------------------------------------
# One document of the YAML that people write by hand, with the scalar rules of YAML 1.1 (those of PyYAML's
# safe_load, but timestamps stay strings). Every function below reads one rule at an offset of the text and
# returns what it read with the offset where it stopped. Block rules also return the column of the next
# token, -1 at the end of the document: columns alone decide where a block ends. Tags, several documents,
# complex keys and whatever is doubtful are refused.

YAML_MAX_DEPTH = 64  # collections inside one another, aliases counted as if written out; spares the stack
YAML_MAX_KEY = 1024  # characters from the start of a key to its colon, the limit of YAML itself
YAML_MAX_NUMBER = 4300  # characters: int() takes quadratic time, and newer Pythons stop at this length
YAML_ALIAS_FACTOR = 10  # aliases may stand for this many times the text's length ...
YAML_ALIAS_ALLOWANCE = 1_000_000  # ... plus this many characters

_MERGE_KEY = object()  # the resolved value of a plain `<<` used as a key

_YAML_WORDS: dict[str, bool | None] = {
    "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "yes": True, "Yes": True, "YES": True, "no": False, "No": False, "NO": False,
    "on": True, "On": True, "ON": True, "off": False, "Off": False, "OFF": False,
}  # fmt: skip
_YAML_NUMBER_STARTS = frozenset("+-.0123456789")
_YAML_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*(?::[0-5]?[0-9])*)")
_YAML_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+][0-9]+)?|(?::[0-5]?[0-9])+\.[0-9_]*)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

_YAML_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]|\r(?!\n)"
)
_YAML_GAP = re.compile(r"[ \r\n]*")
_YAML_SPACES = re.compile(r" *")
_YAML_MARKER = re.compile(r"(?:---|\.\.\.)(?=[ \t\r\n]|\Z)")
_YAML_COLON = re.compile(r" *:(?=[ \t\r\n]|\Z)")
_YAML_DASH = re.compile(r"-(?=[ \t\r\n]|\Z)")
_YAML_NAME = re.compile(r"[&*]([0-9A-Za-z_-]+)(?=[ \t\r\n:,\]}]|\Z)")
# A colon belongs to plain text when something follows it, a '#' when no space precedes it.
_YAML_PLAIN = re.compile(r"(?:[^ \t\r\n:]+|:(?=[^ \t\r\n])| +(?=[^ \t\r\n:#]|:[^ \t\r\n]))+")
_YAML_FLOW_PLAIN = re.compile(
    r"(?:[^ \t\r\n:,?\[\]{}]+|:(?=[^ \t\r\n,\[\]{}])| +(?=[^ \t\r\n:#,?\[\]{}]|:[^ \t\r\n,\[\]{}]))+"
)
_YAML_SINGLE_QUOTED = re.compile(r"'[^']*(?:''[^']*)*'(?!')")
_YAML_DOUBLE_QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_YAML_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_YAML_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\",
    "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip
_YAML_BLOCK_HEADER = re.compile(r"[|>]([+-]?)([1-9]?)([+-]?)(?: +(?:#[^\r\n]*)?)?(?:\r?\n|\Z)")

_YAML_WHITE = frozenset(("", " ", "\t", "\r", "\n"))
_YAML_LINE_ENDS = frozenset(("", "\r", "\n", "#"))
_YAML_INDICATORS = frozenset(("", *"\t-?:,[]{}#&*!|>'\"%@`"))
_YAML_BAD_STARTS = {
    "\t": "a tab is used as white space; use spaces",
    "@": "'@' is reserved and cannot start a plain value; put the value in quotes",
    "`": "'`' is reserved and cannot start a plain value; put the value in quotes",
    "%": "'%' cannot start a plain value; put the value in quotes",
    "!": "tags such as '!name' are not supported; remove the tag, or put the value in quotes",
    "|": "block text ('|') must follow 'key:' or '-', not stand inside brackets; use quotes here",
    ">": "block text ('>') must follow 'key:' or '-', not stand inside brackets; use quotes here",
    "&": "a value cannot have two anchors; remove one",
    "*": "an alias cannot have an anchor of its own; remove the anchor",
    ",": "a value is missing before ','; remove the comma, or put the text in quotes",
    "]": "']' closes nothing here; remove it, or put the text in quotes",
    "}": "'}' closes nothing here; remove it, or put the text in quotes",
    "[": "a list or a mapping cannot be a key; put text with brackets or braces in quotes",
    "{": "a list or a mapping cannot be a key; put text with brackets or braces in quotes",
    "#": "'#' starts a comment only behind a space; put one before it, or put the text in quotes",
    ":": "a key is missing before ':'; write 'key: value', or put the text in quotes",
    "?": "complex keys ('? ') are not supported; write 'key: value', or put the text in quotes",
    "-": "a list item ('- ') cannot start here; put it on a line of its own, or put the text in quotes",
}
_YAML_COLLECTION_KEY = _YAML_BAD_STARTS["["]
_YAML_COLON_IN_VALUE = (
    "': ' cannot stand inside a plain value; put the value in quotes, "
    "or start the nested mapping on a line of its own"
)

# What may not be written as plain text in a block, and how double quotes show a character.
_YAML_UNSAFE = re.compile(r"\A(?:[ #,\[\]{}&*!|>'\"%@`]|---|\.\.\.|[-?:](?: |\Z))|[^ -~]|:(?: |\Z)| (?:#|\Z)")
_YAML_ESCAPED = {
    character: "\\" + letter for letter, character in _YAML_ESCAPES.items() if letter not in "\t /"
}


class YamlError(SandboxError):
    """Text that is not YAML, or not the YAML that is supported, at a `line` and `column` counted from 1."""

    exit_code = 8
    code = "yaml_invalid"

    def __init__(self, message: str, source: str, line: int, column: int) -> None:
        super().__init__(f"{source}:{line}:{column}: {message}")
        self.message = printable(message)
        self.source = source
        self.line = line
        self.column = column

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}: {self.message}"


class YamlNode:
    """One value of a document, and where it stands in the text.

    `kind` is "scalar", "sequence" or "mapping". `value` is the resolved scalar, the list of the items' nodes,
    or a dict from each resolved key to its (key node, value node), merges applied. `text[start:end]` is the
    node's own source, without its anchor. An empty value has no source: `start` equals `end`, just behind its
    colon or dash. Block text ends with its last line break. An alias is the very node of its anchor.
    """

    __slots__ = ("_document", "end", "kind", "start", "value")

    def __init__(self, document: _YamlDocument, kind: str, value: Any, start: int, end: int) -> None:
        self._document = document
        self.kind = kind
        self.value = value
        self.start = start
        self.end = end

    def __repr__(self) -> str:
        return f"<YamlNode {self.kind} at {self._document.source}:{self.line}:{self.column}>"

    @property
    def line(self) -> int:
        """The line where the node starts, from 1."""
        return self._document.position(self.start)[0]

    @property
    def column(self) -> int:
        """The column where the node starts, from 1, in characters."""
        return self._document.position(self.start)[1]

    def get(self, key: object) -> YamlNode | None:
        """The value's node of a mapping's key; None when there is no such key, or the node is no mapping."""
        pair = self.value.get(key) if self.kind == "mapping" else None
        return pair[1] if pair else None

    def key(self, key: object) -> YamlNode | None:
        """The node of the key itself."""
        pair = self.value.get(key) if self.kind == "mapping" else None
        return pair[0] if pair else None

    def pairs(self) -> Iterator[tuple[YamlNode, YamlNode]]:
        """Each (key node, value node) of a mapping; nothing for the other kinds."""
        return iter(self.value.values() if self.kind == "mapping" else ())

    def items(self) -> Iterator[YamlNode]:
        """Each item of a sequence; nothing for the other kinds."""
        return iter(self.value if self.kind == "sequence" else ())

    def source_text(self) -> str:
        """The node as it is written in the document."""
        return self._document.text[self.start : self.end]

    def plain(self) -> Any:
        """Plain Python values, new ones at every call: what an alias stands for is copied."""
        if self.kind == "mapping":
            return {key: pair[1].plain() for key, pair in self.value.items()}
        if self.kind == "sequence":
            return [item.plain() for item in self.value]
        return self.value

    def error(self, message: str) -> YamlError:
        """An error, to be raised by the caller, that points at this node."""
        return self._document.error(self.start, message)


class _YamlDocument:
    """The text being read, its anchors, and how far its aliases blow it up."""

    __slots__ = ("anchors", "deepest", "expanded", "line_starts", "origin", "source", "text")

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.origin = 1 if text.startswith("\ufeff") else 0  # a byte order mark takes no column
        self.anchors: dict[str, tuple[YamlNode, int, int] | None] = {}  # node, characters, height; None: open
        self.expanded = 0  # characters that the aliases read so far stand for
        self.deepest = 0  # collections around the deepest one read since the innermost open anchor
        self.line_starts: list[int] = []

    def position(self, offset: int) -> tuple[int, int]:
        from bisect import bisect_right

        if not self.line_starts:
            self.line_starts = [self.origin]
            self.line_starts += (match.end() for match in re.finditer("\n", self.text))
        line = max(bisect_right(self.line_starts, offset), 1)
        return line, offset - self.line_starts[line - 1] + 1

    def error(self, offset: int, message: str) -> YamlError:
        return YamlError(message, self.source, *self.position(offset))

    def enter(self, offset: int, depth: int) -> None:
        """Note a collection that is the `depth`-th of those around it."""
        if depth > YAML_MAX_DEPTH:
            raise self.error(offset, f"nested deeper than {YAML_MAX_DEPTH} levels; make the document flatter")
        if depth > self.deepest:
            self.deepest = depth


if TYPE_CHECKING:
    _YamlPairs = dict[Any, tuple[YamlNode, YamlNode]]
if TYPE_CHECKING:
    _YamlRead = tuple[YamlNode, int, int, int]
if TYPE_CHECKING:
    _YamlResult = TypeVar("_YamlResult", bound=tuple[Any, ...])


def yaml_load(text: str, source: str = "<yaml>") -> Any:
    """The one document of `text` as plain values; None when it is empty; YamlError when it is wrong."""
    node = yaml_compose(text, source)
    return None if node is None else node.plain()


def yaml_compose(text: str, source: str = "<yaml>") -> YamlNode | None:
    """The one document of `text` as nodes that know their place; None when it is empty."""
    document = _YamlDocument(text, source)
    _yaml_check_characters(document)
    at, column = _yaml_directives(document, *_yaml_next(document, document.origin, line_start=True))
    if column >= 0:
        node, _, at, column = _yaml_block_node(document, at, column, -1, 0, "")
    elif text.startswith("---", at):
        node, _, at, column = _yaml_block_value(document, at + 3, -1, 0, "")
    elif at < len(text):
        raise document.error(at, "'...' ends a document, but none has started; remove this line")
    else:
        return None
    _yaml_document_end(document, node, at, column)
    return node if node.start < node.end else None


def _yaml_check_characters(document: _YamlDocument) -> None:
    found = _YAML_FORBIDDEN.search(document.text, document.origin)
    if not found:
        return
    if found.group() == "\r":
        message = "a carriage return without a line feed; use one kind of line ends, LF or CRLF"
    else:
        code = ord(found.group())
        escape = f"\\x{code:02X}" if code < 256 else f"\\u{code:04X}"
        message = (
            f"the character U+{code:04X} is not allowed; write it as {escape} in double quotes, or remove it"
        )
    raise document.error(found.start(), message)


def _yaml_directives(document: _YamlDocument, at: int, column: int) -> tuple[int, int]:
    """Read `%YAML 1.x`, if it is there; return the next token."""
    if column != 0 or document.text[at] != "%":
        return at, column
    version = re.compile(r"%YAML +1\.[0-9]+(?=[ \r\n]|\Z)").match(document.text, at)
    if not version:
        raise document.error(at, "this directive is not supported; only '%YAML 1.1' and other 1.x are")
    at, column = _yaml_next(document, version.end())
    if column >= 0 or not document.text.startswith("---", at):
        raise document.error(at, "'---' must follow the %YAML line")
    return at, column


def _yaml_document_end(document: _YamlDocument, node: YamlNode, at: int, column: int) -> None:
    if column >= 0:
        message = (
            "this line does not belong to what starts on line {}; indent it to match, or put that in quotes"
        )
        raise document.error(at, message.format(node.line))
    while column < 0 and document.text.startswith("...", at):
        at, column = _yaml_next(document, at + 3)
    if at < len(document.text):
        raise document.error(at, "a second document starts here; only one document in a text is supported")


# White space, comments and the ends of lines


def _yaml_skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a match at `at` ends; `at` itself when there is none."""
    match = pattern.match(text, at)
    return match.end() if match else at


def _yaml_next(document: _YamlDocument, at: int, *, line_start: bool = False) -> tuple[int, int]:
    """Skip from the end of a value (or the start of a line) to the next token; return it with its column."""
    text = document.text
    stop = _yaml_skip(_YAML_GAP, text, at)
    while text.startswith("#", stop):
        if stop == at and not line_start:
            raise document.error(stop, _YAML_BAD_STARTS["#"])
        at, line_start = text.find("\n", stop), False
        if at < 0:
            return len(text), -1
        stop = _yaml_skip(_YAML_GAP, text, at)
    if stop == len(text):
        return stop, -1
    newline = text.rfind("\n", at, stop)
    if newline < 0:
        if not line_start:
            raise _yaml_unexpected(document, stop)
        newline = at - 1
    if text[stop] == "\t":
        raise document.error(stop, "a tab is used for indentation; use spaces")
    column = stop - newline - 1
    if column == 0 and _YAML_MARKER.match(text, stop):
        return stop, -1
    return stop, column


def _yaml_unexpected(document: _YamlDocument, at: int) -> YamlError:
    """Why the text at `at` cannot stand behind a value, on its line."""
    text = document.text
    before = text[:at].rstrip(" ")[-1:]
    if text[at] == "\t":
        return document.error(at, _YAML_BAD_STARTS["\t"])
    if text[at] == ":" and before and before in "]}":
        return document.error(at, _YAML_COLLECTION_KEY)
    if text[at] == ":" and before and before in "\"'":
        return document.error(
            at, "a ':' follows a quoted value; quote the whole value, keep a key on one line"
        )
    if text[at] == ":":
        return document.error(at, _YAML_COLON_IN_VALUE)
    if before and before in "\"'":
        return document.error(
            at, "text follows a closing quote; inside quotes write '' for ' and \\\" for \""
        )
    return document.error(at, "text follows a complete value; put the whole value in quotes")


def _yaml_flow_gap(document: _YamlDocument, at: int, opened: int) -> int:
    """Skip white space and comments between brackets; `opened` is where the bracket stands."""
    text = document.text
    stop = _yaml_skip(_YAML_GAP, text, at)
    while text.startswith("#", stop):
        if stop == at:
            raise document.error(stop, _YAML_BAD_STARTS["#"])
        at = text.find("\n", stop)
        stop = _yaml_skip(_YAML_GAP, text, at) if at >= 0 else len(text)
    if stop == len(text):
        raise document.error(opened, f"'{text[opened]}' is never closed; add the matching bracket")
    if text[stop] == "\t":
        raise document.error(stop, _YAML_BAD_STARTS["\t"])
    if text[stop] in "-." and text[stop - 1] == "\n" and _YAML_MARKER.match(text, stop):
        raise document.error(stop, f"a document marker inside '{text[opened]}'; close the bracket before it")
    return stop


# Block structure


def _yaml_block_value(document: _YamlDocument, at: int, indent: int, depth: int, after: str) -> _YamlRead:
    """The value that follows `after`: ":", "-", or "" for `---`, each with "&" added behind an anchor.

    It stands on the same line, or below and deeper than `indent`. Behind a dash, keys and further dashes may
    stand on the same line; below a key, dashes may stand at `indent` itself.
    """
    text = document.text
    here = _yaml_skip(_YAML_SPACES, text, at)
    if text[here : here + 1] in _YAML_LINE_ENDS:
        below, column = _yaml_next(document, at)
        if column > indent or (":" in after and column == indent and _YAML_DASH.match(text, below)):
            return _yaml_block_node(document, below, column, indent, depth, after)
        return YamlNode(document, "scalar", None, at, at), at, below, column
    if after == "-":
        return _yaml_block_node(document, here, indent + 1 + here - at, indent, depth, after)
    return _yaml_inline(document, here, indent, depth, after)


def _yaml_block_node(
    document: _YamlDocument, at: int, column: int, indent: int, depth: int, after: str
) -> _YamlRead:
    """A value that starts a line or follows `- `: keys and dashes may stand here."""
    if _YAML_DASH.match(document.text, at):
        return _yaml_block_sequence(document, at, column, depth + 1)
    key = _yaml_key(document, at)
    if key:
        return _yaml_block_mapping(document, at, column, depth + 1, key)
    return _yaml_inline(document, at, indent, depth, after.replace("-", ""))


def _yaml_block_sequence(document: _YamlDocument, at: int, column: int, depth: int) -> _YamlRead:
    document.enter(at, depth)
    start = end = at
    next_column = column
    items: list[YamlNode] = []
    while next_column == column and _YAML_DASH.match(document.text, at):
        item, end, at, next_column = _yaml_block_value(document, at + 1, column, depth, "-")
        items.append(item)
    if next_column > column:
        raise _yaml_wrong_indent(document, at, next_column, start, column)
    return YamlNode(document, "sequence", items, start, end), end, at, next_column


def _yaml_block_mapping(
    document: _YamlDocument, at: int, column: int, depth: int, key: tuple[YamlNode, int]
) -> _YamlRead:
    """A block mapping; its first key is already read, with the offset behind its colon."""
    document.enter(at, depth)
    start = at
    pairs: _YamlPairs = {}
    while True:
        value, end, below, next_column = _yaml_block_value(document, key[1], column, depth, ":")
        _yaml_add_pair(document, pairs, key[0], value, at)
        at = below
        if next_column != column:
            break
        next_key = _yaml_key(document, at)
        if next_key is None:
            raise _yaml_missing_key(document, at)
        key = next_key
    if next_column > column:
        raise _yaml_wrong_indent(document, at, next_column, start, column)
    return YamlNode(document, "mapping", _yaml_merged(pairs), start, end), end, at, next_column


def _yaml_wrong_indent(document: _YamlDocument, at: int, column: int, start: int, expected: int) -> YamlError:
    line = document.position(start)[0]
    return document.error(
        at,
        f"wrong indentation: this line has {column} spaces, what starts on line {line} has {expected}; "
        "align the lines, or put a text of several lines in quotes",
    )


def _yaml_missing_key(document: _YamlDocument, at: int) -> YamlError:
    """Why the line at `at`, in a block mapping, does not start with a key."""
    text = document.text
    line = text[at:].split("\n", 1)[0]
    if _YAML_DASH.match(text, at):
        return document.error(
            at, "a list item stands where 'key: value' is expected; indent it under its key"
        )
    if text[at] not in "&*\"'" and not _yaml_starts_plain(text, at):
        return _yaml_bad_start(document, at)
    if ":" in line and text[at] not in "\"'":
        return document.error(at, "'key: value' is expected here; put a space after the colon")
    return document.error(at, "'key: value' is expected here; add the colon, or indent the text")


def _yaml_key(document: _YamlDocument, at: int) -> tuple[YamlNode, int] | None:
    """A key and the offset behind its colon, when one starts at `at`."""
    text, start, anchor = document.text, at, ""
    if text[at] == "&":
        anchor, at = _yaml_name(document, at)
        at = _yaml_skip(_YAML_SPACES, text, at)
    char = text[at : at + 1]
    if char == "*":
        end = _yaml_name(document, at)[1]
    elif char and char in "\"'":
        end = _yaml_quoted_end(document, at)
    elif _yaml_starts_plain(text, at):
        end = _yaml_skip(_YAML_PLAIN, text, at)
    else:
        return None
    colon = _YAML_COLON.match(text, end)
    if not colon or "\n" in text[at:end] or (anchor and char == "*"):
        return None
    _yaml_check_key(document, start, colon.end() - 1)
    if char == "*":
        node = _yaml_alias(document, at, 0)[0]
    elif char in "\"'":
        node = _yaml_quoted(document, at)[0]
    else:
        node = YamlNode(document, "scalar", _yaml_resolve(document, text[at:end], at, end), at, end)
    if node.kind != "scalar":
        raise document.error(at, _YAML_COLLECTION_KEY)
    if anchor:
        _yaml_anchor_key(document, start, anchor, node)
    return node, colon.end()


def _yaml_check_key(document: _YamlDocument, start: int, colon: int) -> None:
    if "\n" in document.text[start:colon]:
        raise document.error(start, "a key and its colon must stand on one line; join the lines")
    if colon - start > YAML_MAX_KEY:
        raise document.error(start, f"this key is longer than {YAML_MAX_KEY} characters; use a shorter one")


def _yaml_add_pair(
    document: _YamlDocument, pairs: _YamlPairs, key: YamlNode, value: YamlNode, at: int
) -> None:
    first = pairs.get(key.value)
    if first:
        name = document.text[key.start : key.end]
        remedy = "write '<<: [*a, *b]'" if key.value is _MERGE_KEY else "remove or rename one"
        raise document.error(at, f"the key {name} is used twice, first on line {first[0].line}; {remedy}")
    if key.value is _MERGE_KEY:
        for source in value.value if value.kind == "sequence" else [value]:
            if source.kind != "mapping":
                raise document.error(
                    at, "'<<' takes a mapping or a list of mappings, such as '<<: *defaults'"
                )
    pairs[key.value] = key, value


def _yaml_merged(pairs: _YamlPairs) -> _YamlPairs:
    """Put the pairs of `<<` first: the mapping's own win over them, earlier ones in its list over later."""
    merge = pairs.pop(_MERGE_KEY, None)
    if merge is None:
        return pairs
    value = merge[1]
    merged: _YamlPairs = {}
    for source in reversed(value.value) if value.kind == "sequence" else [value]:
        merged.update(source.value)
    merged.update(pairs)
    return merged


# Values in block context


def _yaml_inline(document: _YamlDocument, at: int, indent: int, depth: int, after: str) -> _YamlRead:
    """A value at `at`, in a block, that is no block collection itself; `after` as for block values."""
    char = document.text[at]
    if char in "&*" and "&" in after:
        raise _yaml_bad_start(document, at)
    if char == "&":
        return _yaml_anchored(
            document,
            at,
            depth,
            lambda behind: _yaml_block_value(document, behind, indent, depth, after + "&"),
        )
    if char in "\"'":
        node, end = _yaml_quoted(document, at)
    elif char in "[{":
        node, end = _yaml_flow_collection(document, at, depth + 1)
    elif char == "*":
        node, end = _yaml_alias(document, at, depth)
    elif char in "|>":
        return _yaml_block_text(document, at, indent)
    else:
        return _yaml_block_plain(document, at, indent)
    return node, end, *_yaml_next(document, end)


def _yaml_starts_plain(text: str, at: int) -> bool:
    char = text[at : at + 1]
    if char not in _YAML_INDICATORS:
        return True
    return char != "" and char in "-?:" and text[at + 1 : at + 2] not in _YAML_WHITE


def _yaml_bad_start(document: _YamlDocument, at: int) -> YamlError:
    """Why no value can start with the character at `at`."""
    return document.error(at, _YAML_BAD_STARTS[document.text[at]])


def _yaml_block_plain(document: _YamlDocument, at: int, indent: int) -> _YamlRead:
    """A plain scalar; the lines below that are deeper than `indent` go on with it, up to a comment."""
    text, start = document.text, at
    if not _yaml_starts_plain(text, at):
        raise _yaml_bad_start(document, at)
    end = first_end = _yaml_skip(_YAML_PLAIN, text, at)
    at, column = _yaml_next(document, end)
    while column > indent:
        if "#" in text[end:at]:
            raise document.error(at, "text cannot go on after a comment; move the comment, or quote the text")
        more = _YAML_PLAIN.match(text, at)
        if not more:
            raise document.error(at, _YAML_COLON_IN_VALUE)
        end = more.end()
        at, column = _yaml_next(document, end)
    raw = text[start:end]
    value = _yaml_resolve(document, raw if end == first_end else _yaml_fold(raw), start, end)
    return YamlNode(document, "scalar", value, start, end), end, at, column


def _yaml_block_text(document: _YamlDocument, at: int, indent: int) -> _YamlRead:
    """Text of lines deeper than `indent`, below `|` (kept as they are) or `>` (folded)."""
    text = document.text
    header = _YAML_BLOCK_HEADER.match(text, at)
    if not header or (header[1] and header[3]):
        message = f"behind '{text[at]}' only '+' or '-', an indentation from 1 to 9 and a comment may stand"
        raise document.error(at, f"{message}; start the text on the next line")
    chomping = header[1] or header[3]
    if header[2]:
        margin = max(indent, 0) + int(header[2])
    else:
        margin = _yaml_block_margin(document, header.end(), indent)
    lines, filled_end, end = _yaml_block_lines(text, header.end(), margin)
    filled = len(lines)
    while filled and not lines[filled - 1]:
        filled -= 1
    value = "\n".join(lines[:filled]) if text[at] == "|" else _yaml_fold_block(lines[:filled])
    if filled and chomping != "-" and text[filled_end - 1] == "\n":
        value += "\n"
    if chomping == "+":
        value += "\n" * (len(lines) - filled)
        filled_end = end
    node = YamlNode(document, "scalar", value, at, filled_end)
    return node, filled_end, *_yaml_next(document, end, line_start=True)


def _yaml_block_margin(document: _YamlDocument, at: int, indent: int) -> int:
    """The indentation of block text: that of its first line that is not blank."""
    text = document.text
    stop = _yaml_skip(_YAML_GAP, text, at)
    margin = stop - max(at, text.rfind("\n", at, stop) + 1)
    longest = max(len(line.rstrip("\r")) for line in text[at:stop].split("\n"))
    if stop == len(text) or margin < max(indent + 1, 1):
        return max(indent + 1, 1, longest)  # no text at all, only blank lines
    if longest > margin:
        message = "a blank line above has more spaces than this first line of the text; remove them"
        raise document.error(stop, message)
    return margin


def _yaml_block_lines(text: str, at: int, margin: int) -> tuple[list[str], int, int]:
    """The lines of block text without margin, blank ones empty; the end of the last filled one; of all."""
    lines: list[str] = []
    prefix = " " * margin
    filled_end = at
    while at < len(text):
        newline = text.find("\n", at)
        stop = newline + 1 or len(text)
        line = text[at:stop].rstrip("\r\n")
        if line.startswith(prefix) and len(line) > margin:
            lines.append(line[margin:])
            filled_end = stop
        elif line.strip(" "):
            break
        elif newline >= 0:
            lines.append("")
        at = stop
    return lines, filled_end, at


def _yaml_fold_block(lines: list[str]) -> str:
    """Join lines by spaces, but keep the breaks at blank lines and around those that start with a space."""
    parts: list[str] = []
    previous, blanks = "", 0
    for line in lines:
        if not line:
            blanks += 1
            continue
        if not previous:
            parts.append("\n" * blanks)
        elif previous[0] in " \t" or line[0] in " \t":
            parts.append("\n" * (blanks + 1))
        else:
            parts.append("\n" * blanks or " ")
        parts.append(line)
        previous, blanks = line, 0
    return "".join(parts)


# Scalars


def _yaml_resolve(document: _YamlDocument, raw: str, start: int, end: int) -> Any:
    """The value of plain text, by the rules of YAML 1.1; it stands at `start` to `end`."""
    if raw in _YAML_WORDS:
        return _YAML_WORDS[raw]
    if raw[0] in _YAML_NUMBER_STARTS:
        try:
            return _yaml_number(raw)
        except (ValueError, OverflowError):
            raise document.error(
                start, "this number has no value; put it in quotes to keep it as text"
            ) from None
    if raw == "<<" and document.text.startswith(":", _yaml_skip(_YAML_SPACES, document.text, end)):
        return _MERGE_KEY
    if raw in ("=", "<<"):
        raise document.error(start, f"a plain '{raw}' has a special meaning in YAML; put it in quotes")
    return raw


def _yaml_number(raw: str) -> int | float | str:
    """The number that `raw` is, or `raw` itself; ValueError or OverflowError for one that has no value."""
    is_int = _YAML_INT.fullmatch(raw)
    if not is_int and not _YAML_FLOAT.fullmatch(raw):
        return raw
    if len(raw) > YAML_MAX_NUMBER:
        raise ValueError(raw)
    sign = -1 if raw[0] == "-" else 1
    digits = raw.lstrip("+-").replace("_", "")
    return sign * (_yaml_int(digits) if is_int else _yaml_float(digits.lower()))


def _yaml_int(digits: str) -> int:
    if digits.startswith(("0b", "0x")):
        return int(digits[2:], 2 if digits[1] == "b" else 16)
    if digits.startswith("0"):
        return int(digits, 8)
    value = 0
    for part in digits.split(":"):
        value = value * 60 + int(part)
    return value


def _yaml_float(digits: str) -> float:
    if digits in (".inf", ".nan"):
        return float(digits[1:])
    value, base = 0.0, 1
    for part in reversed(digits.split(":")):  # from the right: sums must round as they do elsewhere
        value += float(part) * base
        base *= 60
    return value


def _yaml_fold(raw: str, escapes: bool = False) -> str:
    """Join the lines of a scalar: one line break is a space, each further one a line break."""
    lines = raw.split("\n")
    parts: list[str] = []
    blanks, glue = 0, ""
    for number, line in enumerate(lines):
        body, next_glue = line.lstrip(" \t") if number else line, " "
        if number < len(lines) - 1:
            body, next_glue = _yaml_trim_line(body, escapes)
            if number and not body and next_glue:
                blanks += 1
                continue
        parts.append("\n" * blanks or glue)
        parts.append(body)
        blanks, glue = 0, next_glue
    return "".join(parts)


def _yaml_trim_line(line: str, escapes: bool) -> tuple[str, str]:
    """A line without the white space at its end, and what joins it to the next line."""
    body = line.rstrip(" \t\r")
    if not escapes or (len(body) - len(body.rstrip("\\"))) % 2 == 0:
        return body, " "
    if line[len(body) :] in ("", "\r"):
        return body[:-1], ""
    return line[: len(body) + 1], " "  # the backslash keeps one space or tab


def _yaml_quoted_end(document: _YamlDocument, at: int) -> int:
    pattern = _YAML_DOUBLE_QUOTED if document.text[at] == '"' else _YAML_SINGLE_QUOTED
    match = pattern.match(document.text, at)
    if not match:
        raise document.error(
            at, f"the quote that opens here is never closed; add {document.text[at]} at its end"
        )
    return match.end()


def _yaml_quoted(document: _YamlDocument, at: int) -> tuple[YamlNode, int]:
    text = document.text
    end = _yaml_quoted_end(document, at)
    double = text[at] == '"'
    value = text[at + 1 : end - 1]
    if "\n" in value:
        marker = re.compile(r"^(?:---|\.\.\.)(?=[ \t\r\n])", re.MULTILINE).search(text, at, end)
        if marker:
            raise document.error(marker.start(), "a document marker stands inside quotes; indent the line")
        value = _yaml_fold(value, double)
    if not double:
        value = value.replace("''", "'")
    elif "\\" in value:
        value = _yaml_unescape(document, value, at, end)
    return YamlNode(document, "scalar", value, at, end), end


def _yaml_unescape(document: _YamlDocument, value: str, start: int, end: int) -> str:
    try:
        return _YAML_ESCAPE.sub(_yaml_escape, value)
    except (KeyError, ValueError, OverflowError):
        escapes = _YAML_ESCAPE.finditer(document.text, start + 1, end)
        bad = next(match for match in escapes if not _yaml_is_escape(match))
    message = f"{bad[0][:2]} is no escape in double quotes; write \\\\ for a backslash, or use single quotes"
    raise document.error(bad.start(), message)


def _yaml_escape(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    return chr(int(code, 16)) if code else _YAML_ESCAPES[match[4]]


def _yaml_is_escape(match: re.Match[str]) -> bool:
    if match[4]:
        return match[4] in _YAML_ESCAPES or match[4] in "\r\n"  # a line may end with a backslash
    return int(match[0][2:], 16) <= sys.maxunicode


# Anchors and aliases


def _yaml_name(document: _YamlDocument, at: int) -> tuple[str, int]:
    """The name of the anchor or alias at `at`, and where it ends."""
    match = _YAML_NAME.match(document.text, at)
    if not match:
        message = f"a name (letters, digits, '-', '_') must follow '{document.text[at]}'; put text in quotes"
        raise document.error(at, message)
    return match[1], match.end()


def _yaml_check_anchor(document: _YamlDocument, at: int, name: str) -> None:
    if name in document.anchors:
        raise document.error(at, f"the anchor '&{name}' is defined twice; rename one")


def _yaml_anchored(
    document: _YamlDocument, at: int, depth: int, read: Callable[[int], _YamlResult]
) -> _YamlResult:
    """An anchor and what `read` makes of the text behind it, noted for the aliases to come."""
    name, behind = _yaml_name(document, at)
    _yaml_check_anchor(document, at, name)
    expanded, deepest = document.expanded, document.deepest
    document.anchors[name], document.deepest = None, depth
    result = read(behind)
    size = result[1] - behind + document.expanded - expanded
    document.anchors[name] = result[0], size, document.deepest - depth
    document.deepest = max(document.deepest, deepest)
    return result


def _yaml_anchor_key(document: _YamlDocument, at: int, name: str, node: YamlNode) -> None:
    _yaml_check_anchor(document, at, name)
    if node.value is _MERGE_KEY:
        raise document.error(at, "'<<' cannot have an anchor; remove it")
    document.anchors[name] = node, node.end - node.start, 0


def _yaml_alias(document: _YamlDocument, at: int, depth: int) -> tuple[YamlNode, int]:
    name, end = _yaml_name(document, at)
    if name not in document.anchors:
        raise document.error(at, f"no '&{name}' stands above this alias; define it first, or quote the text")
    anchor = document.anchors[name]
    if anchor is None:
        raise document.error(
            at, f"the alias '*{name}' stands inside its own anchor; a value cannot hold itself"
        )
    node, size, height = anchor
    document.expanded += size + 1
    if document.expanded > YAML_ALIAS_FACTOR * len(document.text) + YAML_ALIAS_ALLOWANCE:
        message = f"the aliases up to here stand for {document.expanded} characters, too many; use fewer"
        raise document.error(at, message)
    if height:
        document.enter(at, depth + height)
    return node, end


# Flow collections


def _yaml_flow_collection(document: _YamlDocument, at: int, depth: int) -> tuple[YamlNode, int]:
    document.enter(at, depth)
    if document.text[at] == "[":
        return _yaml_flow_sequence(document, at, depth)
    return _yaml_flow_mapping(document, at, depth)


def _yaml_flow_sequence(document: _YamlDocument, opened: int, depth: int) -> tuple[YamlNode, int]:
    items: list[YamlNode] = []
    at = _yaml_flow_gap(document, opened + 1, opened)
    while document.text[at] != "]":
        item, end = _yaml_flow_value(document, at, opened, depth)
        colon = _yaml_flow_colon(document, item, at, end)
        if colon:  # `[key: value]` is a list that holds a mapping of one pair
            document.enter(at, depth + 1)
            value, end = _yaml_flow_pair_value(document, colon, opened, depth + 1)
            pairs: _YamlPairs = {}
            _yaml_add_pair(document, pairs, item, value, at)
            item = YamlNode(document, "mapping", _yaml_merged(pairs), at, end)
        items.append(item)
        at = _yaml_flow_separator(document, end, opened, "]")
    return YamlNode(document, "sequence", items, opened, at + 1), at + 1


def _yaml_flow_mapping(document: _YamlDocument, opened: int, depth: int) -> tuple[YamlNode, int]:
    pairs: _YamlPairs = {}
    at = _yaml_flow_gap(document, opened + 1, opened)
    while document.text[at] != "}":
        key, end = _yaml_flow_value(document, at, opened, depth)
        if key.kind != "scalar":
            raise document.error(at, _YAML_COLLECTION_KEY)
        colon = _yaml_flow_colon(document, key, at, end)
        value = YamlNode(document, "scalar", None, end, end)
        if colon:
            value, end = _yaml_flow_pair_value(document, colon, opened, depth)
        _yaml_add_pair(document, pairs, key, value, at)
        at = _yaml_flow_separator(document, end, opened, "}")
    return YamlNode(document, "mapping", _yaml_merged(pairs), opened, at + 1), at + 1


def _yaml_flow_colon(document: _YamlDocument, key: YamlNode, at: int, end: int) -> int:
    """The offset behind the colon that makes a key of what stands at `at` to `end`; 0 without one."""
    colon = _yaml_skip(_YAML_SPACES, document.text, end)
    if not document.text.startswith(":", colon):
        return 0
    if key.kind != "scalar":
        raise document.error(at, _YAML_COLLECTION_KEY)
    _yaml_check_key(document, at, colon)
    return colon + 1


def _yaml_flow_pair_value(document: _YamlDocument, at: int, opened: int, depth: int) -> tuple[YamlNode, int]:
    here = _yaml_flow_gap(document, at, opened)
    if document.text[here] in ",]}":
        return YamlNode(document, "scalar", None, at, at), at
    return _yaml_flow_value(document, here, opened, depth)


def _yaml_flow_separator(document: _YamlDocument, at: int, opened: int, closer: str) -> int:
    """Skip a comma to the next entry; stop at the closing bracket."""
    at = _yaml_flow_gap(document, at, opened)
    char = document.text[at]
    if char == ",":
        return _yaml_flow_gap(document, at + 1, opened)
    if char == closer:
        return at
    if char == ":":
        message = (
            "':' is not expected here; a key stands on one line with its colon, text with ': ' in quotes"
        )
    elif char in "]}":
        message = f"'{char}' cannot close the '{document.text[opened]}' that is open; write '{closer}'"
    else:
        message = f"',' or '{closer}' is expected here; add it, or put the text in quotes"
    raise document.error(at, message)


def _yaml_flow_value(
    document: _YamlDocument, at: int, opened: int, depth: int, anchored: bool = False
) -> tuple[YamlNode, int]:
    char = document.text[at]
    if char in "&*" and anchored:
        raise _yaml_bad_start(document, at)
    if char == "&":
        return _yaml_anchored(
            document,
            at,
            depth,
            lambda behind: _yaml_flow_value(
                document, _yaml_flow_gap(document, behind, opened), opened, depth, anchored=True
            ),
        )
    if char == "*":
        return _yaml_alias(document, at, depth)
    if char in "\"'":
        return _yaml_quoted(document, at)
    if char in "[{":
        return _yaml_flow_collection(document, at, depth + 1)
    return _yaml_flow_plain(document, at)


def _yaml_flow_plain(document: _YamlDocument, at: int) -> tuple[YamlNode, int]:
    """A plain scalar between brackets; it may go on over lines, whatever their indentation."""
    text, start, end = document.text, at, at
    more = _YAML_FLOW_PLAIN.match(text, at) if _yaml_starts_plain(text, at) and text[at] != ":" else None
    if not more or text[at : more.end()] == "-":
        raise _yaml_bad_start(document, at)
    while more:
        end = more.end()
        at = _yaml_skip(_YAML_GAP, text, end)
        if text.startswith("#", at) or (text[at - 1] == "\n" and _YAML_MARKER.match(text, at)):
            break
        more = _YAML_FLOW_PLAIN.match(text, at) if at > end else None
    raw = text[start:end]
    value = _yaml_resolve(document, _yaml_fold(raw) if "\n" in raw else raw, start, end)
    return YamlNode(document, "scalar", value, start, end), end


# Writing


def yaml_dump(value: Any) -> str:
    """`value` as a YAML document in block style with sorted keys, which readers of YAML 1.1 read back equal.

    Takes dicts, lists, tuples (written as lists), strings, numbers, booleans and None; keys are scalars.
    What stands in several places is written out in each. SandboxError for other types, for what contains
    itself, and for what is nested too deep to be read.
    """
    out: list[str] = []
    if isinstance(value, (dict, list, tuple)) and value:
        _yaml_write_block(out, value, 0, ())
    else:
        written = _yaml_write_scalar(value, 2)
        out.append(written + "\n")
        if written[0] not in "\"'[{":
            out.append("...\n")  # the only value of a document that is plain text ends with a marker
    return "".join(out)


def yaml_inline(value: Any) -> str:
    """A value on one line, as people write it: name, "odd, name", [a, b], {table: a, columns: [b]}."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{yaml_inline(key)}: {yaml_inline(part)}" for key, part in value.items()) + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(yaml_inline, value)) + "]"
    if not isinstance(value, str):
        return _yaml_write_scalar(value, 0)
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.$-]*", value) and not _yaml_means_more(value):
        return value
    readable = (
        char if char.isprintable() and char not in '"\\' else _yaml_write_double_quoted(char)[1:-1]
        for char in value
    )
    return '"' + "".join(readable) + '"'


def yaml_items(margin: str, values: Sequence[Any]) -> list[str]:
    """The lines of a block list, as people write it; a mapping's fields stand on lines of their own."""
    lines: list[str] = []
    for value in values:
        if not isinstance(value, dict) or not value:
            lines.append(f"{margin}- {yaml_inline(value)}")
            continue
        lead = "- "
        for key, part in value.items():
            lines.append(f"{margin}{lead}{yaml_inline(key)}: {yaml_inline(part)}")
            lead = "  "
    return lines


def _yaml_write_block(out: list[str], value: Any, indent: int, parents: tuple[int, ...]) -> None:
    """Write a collection that is not empty; the cursor stands in column `indent` already."""
    if id(value) in parents:
        raise SandboxError("This value cannot be written as YAML: it contains itself.")
    if len(parents) >= YAML_MAX_DEPTH:
        raise SandboxError(
            f"This value cannot be written as YAML: it is deeper than {YAML_MAX_DEPTH} levels."
        )
    parents = (*parents, id(value))
    margin = ""
    for head, item in _yaml_write_heads(value):
        out.append(margin + head)
        if not isinstance(item, (dict, list, tuple)) or not item:
            out.append(f" {_yaml_write_scalar(item, indent + 2)}\n")
        elif head == "-":
            out.append(" ")
            _yaml_write_block(out, item, indent + 2, parents)
        else:
            inner = indent + 2 if isinstance(item, dict) else indent
            out.append("\n" + " " * inner)
            _yaml_write_block(out, item, inner, parents)
        margin = " " * indent


def _yaml_write_heads(value: Any) -> Iterator[tuple[str, Any]]:
    """What starts each entry, `-` or `key:`, with the entry's value; keys are sorted if they compare."""
    if not isinstance(value, dict):
        yield from (("-", item) for item in value)
        return
    try:
        keys = sorted(value)
    except TypeError:
        keys = list(value)
    for key in keys:
        yield _yaml_write_key(key) + ":", value[key]


def _yaml_write_key(key: Any) -> str:
    if isinstance(key, str) and "\n" in key:
        written = _yaml_write_double_quoted(key)
    elif isinstance(key, tuple):
        raise SandboxError("This value cannot be written as YAML: a key is a tuple; use text.")
    else:
        written = _yaml_write_scalar(key, 0)
    if len(written) > YAML_MAX_KEY:
        raise SandboxError(
            f"This value cannot be written as YAML: a key takes over {YAML_MAX_KEY} characters."
        )
    return written


def _yaml_write_scalar(value: Any, indent: int) -> str:
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if type(value) is str:
        return _yaml_write_text(value, indent)
    if type(value) is int and value.bit_length() < 3 * YAML_MAX_NUMBER:  # a digit is more than 3 bits
        return str(value)
    if type(value) is float:
        return _yaml_write_float(value)
    if isinstance(value, (dict, list, tuple)):
        return "{}" if isinstance(value, dict) else "[]"
    what = "too long an integer" if type(value) is int else f"a value of type {type(value).__name__}"
    raise SandboxError(f"This value cannot be written as YAML: it holds {what}; convert it to text first.")


def _yaml_write_float(value: float) -> str:
    written = repr(value)
    if written[-1] in "fn":  # inf, -inf, nan
        return written.replace("inf", ".inf").replace("nan", ".nan")
    return written if "." in written else written.replace("e", ".0e")  # an exponent needs a point before it


def _yaml_write_text(value: str, indent: int) -> str:
    """Text in the plainest style that reads back the same; lines after the first get `indent` spaces."""
    if re.search(r"[^\n -~]| \n|\n ", value):
        return _yaml_write_double_quoted(value)
    if not _YAML_UNSAFE.search(value) and not _yaml_means_more(value):
        return value
    quoted = value.replace("'", "''")
    if "\n" in quoted:
        quoted = re.sub(r"\n+", lambda breaks: f"\n{breaks[0]}{' ' * indent}", quoted)
    return f"'{quoted}'"


def _yaml_means_more(value: str) -> bool:
    """Whether plain text would be read as something else than text, here or by another reader of YAML 1.1."""
    if value in _YAML_WORDS or value in ("", "=", "<<"):
        return True
    if value[0] not in _YAML_NUMBER_STARTS:
        return False
    timestamp = (
        r"\d{4}-\d\d-\d\d|\d{4}-\d\d?-\d\d?(?:[Tt]|[ \t]+)\d\d?:\d\d:\d\d(?:\.\d*)?"
        r"(?:[ \t]*(?:Z|[-+]\d\d?(?::\d\d)?))?"
    )
    return bool(_YAML_INT.fullmatch(value) or _YAML_FLOAT.fullmatch(value) or re.fullmatch(timestamp, value))


def _yaml_write_double_quoted(value: str) -> str:
    return '"' + re.sub(r"[^ !#-\[\]-~]", _yaml_write_escape, value) + '"'


def _yaml_write_escape(match: re.Match[str]) -> str:
    if match[0] in _YAML_ESCAPED:
        return _YAML_ESCAPED[match[0]]
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


# ----------------------------------------------------------------------------------------------------------
# config: plato-config.yml and flows files, every field checked against the API's models beforehand
# ----------------------------------------------------------------------------------------------------------


class ConfigError(CheckFailedError):
    """A config that cannot be used. problems: one `file:line:column: what is wrong` each."""

    code = "config_invalid"

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.problems = [printable(problem) for problem in problems]
        self.message = "\n".join([self.message, *self.problems])


class Field:
    """What a field of the API's models may hold (source: the models of `setup-sandbox`).

    kind: integer, text, boolean, texts (list of text), value (text, whole number or boolean), or any;
    low/high: bounds of an integer;
    choices: the only texts allowed; nullable: whether it may be left empty.
    """

    __slots__ = ("choices", "high", "kind", "low", "nullable", "required")

    def __init__(
        self,
        kind: str,
        low: int | None = None,
        high: int | None = None,
        *,
        choices: tuple[str, ...] = (),
        required: bool = False,
        nullable: bool = True,
    ) -> None:
        self.kind = kind
        self.low = low
        self.high = high
        self.choices = choices
        self.required = required
        self.nullable = nullable and not required


_TEXT, _TEXTS, _ANY, _BOOLEAN = Field("text"), Field("texts"), Field("any"), Field("boolean")

COMPUTE_FIELDS = {
    "cpus": Field("integer", *CPUS_RANGE),
    "memory": Field("integer", *MEMORY_RANGE_MB),
    "disk": Field("integer", *DISK_RANGE_MB),
    "app_port": Field("integer", 0, 65535),
    "plato_messaging_port": Field("integer", 0, 65535),
    "native_worker": _BOOLEAN,
}
METADATA_FIELDS = {
    "favicon": _TEXT,
    "name": _TEXT,
    "description": _TEXT,
    "source_code_url": _TEXT,
    "start_url": _TEXT,
    "license": _TEXT,
    "variables": _ANY,
    "flows_path": _TEXT,
}
SERVICE_FIELDS = {
    "type": Field("text", choices=("docker-compose",), nullable=False),
    "file": _TEXT,
    "required_healthy_containers": _TEXTS,
    "healthy_wait_timeout": Field("integer", 30, 1800),
}
DATABASE_TYPES = ("postgresql", "mysql", "sqlite", "clickhouse", "mongodb", "redis")
_FILE_LISTENER_FIELDS = {
    "type": _TEXT,
    "seed_data_path": _TEXT,
    "target_dir": Field("text", required=True),
    "watch_enabled": _BOOLEAN,
    "watch_patterns": _TEXTS,
    "ignore_patterns": _TEXTS,
    "scan_frequency": Field("integer"),
    "volumes": _TEXTS,
}
LISTENER_FIELDS = {
    "db": {
        "type": _TEXT,
        "db_type": Field("text", choices=DATABASE_TYPES, required=True),
        "db_host": _TEXT,
        "db_port": Field("integer", 0, 65535),
        "db_user": _TEXT,
        "db_password": _TEXT,
        "db_database": Field("text", required=True),
        "db_schema": _TEXT,
        "schema_name": _TEXT,
        "seed_data_paths": _TEXTS,
        "truncate_tables": _BOOLEAN,
        "audit_ignore_tables": _ANY,
        "audit_table_name": _TEXT,
        "volumes": _TEXTS,
    },
    "proxy": {
        "type": _TEXT,
        "sim_name": _TEXT,
        "dataset": _TEXT,
        "proxy_host": _TEXT,
        "proxy_port": Field("integer", 1024, 65535),
        "passthrough_all_ood_requests": _BOOLEAN,
        "replay_sessions": _ANY,
    },
    "file": _FILE_LISTENER_FIELDS,
    "xml": _FILE_LISTENER_FIELDS,
}


class Config:
    """A checked plato-config.yml and the dataset chosen from it.

    path: absolute; service: its name; dataset: the chosen dataset's name; content: that dataset as the
    user wrote it, unknown keys included; compute: its compute section; warnings: what looks mistaken.
    """

    def __init__(self, path: str, service: str, dataset: str, content: dict[str, Any], warnings: list[str]):
        self.path = path
        self.service = service
        self.dataset = dataset
        self.content = content
        self.compute: dict[str, Any] = content.get("compute") or {}
        self.warnings = warnings

    def for_setup(self) -> dict[str, Any]:
        """The dataset for `setup-sandbox` and `start-worker`: as written, required objects filled in."""
        filled = dict(self.content)
        filled["compute"] = dict(self.compute)
        filled["metadata"] = dict(self.content.get("metadata") or {})
        for name, kind in (("services", "docker-compose"), ("listeners", "db")):
            if filled.get(name):  # servers differ in whether `type` may be left out
                filled[name] = {key: {"type": kind, **part} for key, part in filled[name].items()}
        return filled


def find_config(directory: str) -> str:
    """The path of the plato-config.yml (or .yaml) in a directory; ConfigError when there is none."""
    for name in CONFIG_NAMES:
        path = os.path.join(directory, name)
        if os.path.lexists(path):
            return path
    raise ConfigError(
        f"There is no {CONFIG_NAMES[0]} in {shown_path(directory)}.",
        hint="Go to the simulator's directory or name it with -w DIR; --blank starts a VM without a config.",
    )


def load_config(path: str, dataset: str | None) -> Config:
    """Read and check a plato-config.yml for one dataset (default: base); ConfigError lists every problem."""
    source = shown_path(from_here(path))
    try:
        root = yaml_compose(read_config(path), source)
    except YamlError as error:
        raise unusable_config(source, [str(error)]) from None
    checker = ConfigChecker(source)
    chosen = checker.check(root, dataset or DEFAULT_DATASET)
    if checker.problems or root is None or chosen is None:
        raise unusable_config(source, checker.problems, checker.warnings)
    plain = root.plain()
    name = dataset or DEFAULT_DATASET
    return Config(path, plain["service"], name, plain["datasets"][name], checker.warnings)


def unusable_config(source: str, problems: Sequence[str], warnings: Sequence[str] = ()) -> ConfigError:
    count = len(problems)
    return ConfigError(
        f"{source} cannot be used: {count} problem{'s' if count != 1 else ''}.",
        problems=[*problems, *warnings],
        hint="Nothing was created. Correct the file and run the command again.",
    )


def read_config(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown_path(path)} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{shown_path(path)} cannot be read: {reason(error)}.") from None


class ConfigChecker:
    """Walks the nodes of a config and collects problems and warnings, each with file, line and column."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def check(self, root: YamlNode | None, dataset: str) -> YamlNode | None:
        """Check the whole document for one dataset; returns that dataset's node, None when it is missing."""
        if root is None:
            self.problems.append(f"{self.source}:1:1: the file is empty; it needs `service` and `datasets`")
            return None
        if not self._is_mapping(root, "the config"):
            return None
        service = root.get("service")
        if service is None:
            self._problem(root, "`service` is missing: the name of the simulator")
        else:
            self._check_service_name(service)
        datasets = root.get("datasets")
        if datasets is None:
            self._problem(root, "`datasets` is missing: a map from dataset names to datasets")
        elif self._is_mapping(datasets, "`datasets`"):
            return self._check_chosen(datasets, dataset)
        return None

    def _check_service_name(self, node: YamlNode) -> None:
        if self._check_value(node, "`service`", Field("text", required=True)) and not re.fullmatch(
            SERVICE_NAME, str(node.value)
        ):
            self._problem(node, "`service` may hold letters, digits, '.', '_' and '-' only")

    def _check_chosen(self, datasets: YamlNode, dataset: str) -> YamlNode | None:
        chosen = datasets.get(dataset)
        if chosen is None:
            known = ", ".join(str(key.value) for key, _ in datasets.pairs()) or "none"
            self._problem(datasets, f"there is no dataset {dataset!r}; the datasets here are: {known}")
        elif self._is_mapping(chosen, f"dataset {dataset!r}"):
            self._check_dataset(chosen)
        return chosen

    def _check_dataset(self, node: YamlNode) -> None:
        for name, fields in (("compute", COMPUTE_FIELDS), ("metadata", METADATA_FIELDS)):
            part = node.get(name)
            if part is not None and part.value is not None and self._is_mapping(part, f"`{name}`"):
                self._check_fields(part, fields, name)
        for name, check in (("services", self._check_service), ("listeners", self._check_listener)):
            part = node.get(name)
            if part is not None and part.value is not None and self._is_mapping(part, f"`{name}`"):
                for key, value in part.pairs():
                    where = f"{name}.{key.value}"
                    if self._is_mapping(value, f"`{where}`"):
                        check(value, where)
        self._warn_unknown(node, ("compute", "metadata", "services", "listeners"), "the dataset")
        self._check_numbers(node)

    def _check_numbers(self, node: YamlNode) -> None:
        """Find `.inf` and `.nan`: the dataset is sent as JSON, which has no such numbers."""
        for part in (*(value for _, value in node.pairs()), *node.items()):
            if part.kind != "scalar":
                self._check_numbers(part)
            elif isinstance(part.value, float) and part.value - part.value != 0:
                self._problem(part, "`.inf` and `.nan` cannot be sent to Plato; write a number or a text")

    def _check_service(self, node: YamlNode, where: str) -> None:
        self._check_fields(node, SERVICE_FIELDS, where)

    def _check_listener(self, node: YamlNode, where: str) -> None:
        kind = node.get("type")
        name = "db" if kind is None else kind.value
        fields = LISTENER_FIELDS.get(name) if isinstance(name, str) else None
        if fields is None:
            known = _listed(LISTENER_FIELDS)
            self._problem(kind or node, f"`{where}.type` is {name!r}; it must be one of {known}")
            return
        self._check_fields(node, fields, where)
        ignored = node.get("audit_ignore_tables")
        if ignored is not None and ignored.value is not None:
            self._check_ignore_rules(ignored, f"{where}.audit_ignore_tables")

    def _check_ignore_rules(self, node: YamlNode, where: str) -> None:
        if node.kind != "sequence":
            self._problem(node, f"`{where}` must be a list of table names and {{table, columns}} entries")
            return
        for item in node.items():
            if item.kind == "mapping" or (item.kind == "scalar" and isinstance(item.value, str)):
                continue
            self._problem(item, f"each entry of `{where}` is a table name or {{table: NAME, columns: [..]}}")

    def _check_fields(self, node: YamlNode, fields: Mapping[str, Field], where: str) -> None:
        for name, field in fields.items():
            value = node.get(name)
            if value is not None:
                self._check_value(value, f"`{where}.{name}`", field)
            elif field.required:
                self._problem(node, f"`{where}.{name}` is missing")
        self._warn_unknown(node, tuple(fields), f"`{where}`")

    def _check_value(self, node: YamlNode, what: str, field: Field) -> bool:
        wrong = describe_wrong_value(node, field)
        if wrong:
            self._problem(node, f"{what} {wrong}")
        return not wrong

    def _warn_unknown(self, node: YamlNode, known: tuple[str, ...], where: str) -> None:
        for key, _ in node.pairs():
            if key.value in known:
                continue
            close = closest(str(key.value), known)
            if close:
                meant = f"; did you mean `{close}`?"
                self.warnings.append(
                    f"{self.source}:{key.line}:{key.column}: {where} has no field `{key.value}`{meant}"
                )

    def _is_mapping(self, node: YamlNode, what: str) -> bool:
        if node.kind != "mapping":
            self._problem(node, f"{what} must be a map of fields (`name: value` lines)")
        return node.kind == "mapping"

    def _problem(self, node: YamlNode, text: str) -> None:
        self.problems.append(f"{self.source}:{node.line}:{node.column}: {text}")


def describe_wrong_value(node: YamlNode, field: Field) -> str:
    """What is wrong with a node as the value of a field, as the end of a sentence; "" when it fits."""
    if field.kind == "any":
        return ""
    if node.kind == "scalar" and node.value is None:
        return "" if field.nullable else "is empty"
    if field.kind == "texts":
        if node.kind != "sequence":
            return "must be a list of texts"
        wrong = [item for item in node.items() if not isinstance(item.value, str) or item.kind != "scalar"]
        return f"must be a list of texts; the entry on line {wrong[0].line} is not one" if wrong else ""
    if node.kind != "scalar":
        return f"must be {_KIND_WORDS[field.kind]}, not a {'list' if node.kind == 'sequence' else 'map'}"
    return _describe_wrong_scalar(node.value, field)


_KIND_WORDS = {
    "integer": "a whole number",
    "text": "a text",
    "boolean": "true or false",
    "value": "a text, a whole number, or true or false",
}


def _describe_wrong_scalar(value: Any, field: Field) -> str:
    if field.kind == "boolean":
        return "" if isinstance(value, bool) else f"is {value!r}; it must be true or false"
    if field.kind == "value":
        fits = isinstance(value, (str, int))
        return "" if fits else f"is {value!r}; it must be {_KIND_WORDS['value']} (quotes make a text)"
    if field.kind == "text":
        if not isinstance(value, str):
            return f"is {value!r}, which YAML does not read as a text; put it in quotes"
        return (
            f"is {value!r}; it must be one of {_listed(field.choices)}" if _not_chosen(value, field) else ""
        )
    number = whole_number(value)
    if number is None:
        return f"is {value!r}; it must be a whole number"
    low, high = field.low, field.high
    if (low is not None and number < low) or (high is not None and number > high):
        return f"is {number}; it must be " + (f"at least {low}" if high is None else f"from {low} to {high}")
    return ""


def _not_chosen(value: str, field: Field) -> bool:
    return bool(field.choices) and value not in field.choices


def whole_number(value: Any) -> int | None:
    """An int, or a float or text that the API's models take for one; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}", value.strip()):
        return int(value)
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 3, 0.7)
    swapped = [name for name in found if sorted(name) == sorted(word)]  # "strat" is "start", not "state"
    return next(iter(swapped + found), None)


# Flows: the steps of the API's models, each with its own fields


_REQUIRED = Field("text", required=True)
_SELECTOR_STEP = {"selector": _REQUIRED}
STEP_COMMON_FIELDS = {
    "type": _REQUIRED,
    "description": _TEXT,
    "timeout": Field("integer", 0),
    "retries": Field("integer", 0),
    "retry_delay_ms": Field("integer", 0),
}
STEP_FIELDS: dict[str, dict[str, Field]] = {
    "navigate": {"url": _REQUIRED},
    "wait_for_selector": _SELECTOR_STEP,
    "click": _SELECTOR_STEP,
    "fill": {"selector": _REQUIRED, "value": Field("value", required=True)},
    "wait": {"duration": Field("integer", 0, required=True)},
    "wait_for_url": {"url_contains": _REQUIRED},
    "check_element": {"selector": _REQUIRED, "should_exist": _BOOLEAN},
    "verify": {
        "verify_type": Field("text", required=True),
        "selector": _TEXT,
        "text": _TEXT,
        "contains": _BOOLEAN,
        "count": Field("integer", 0),
        "title": _TEXT,
    },
    "verify_text": {"text": _REQUIRED, "should_exist": _BOOLEAN},
    "verify_url": {"url": _REQUIRED, "contains": _BOOLEAN},
    "verify_no_errors": {"error_selectors": _TEXTS},
    "screenshot": {"filename": _REQUIRED, "full_page": _BOOLEAN},
    "switch_page": {"page_index": Field("integer", required=True)},
    "execute_script": {"script": _REQUIRED},
}
VERIFY_NEEDS = {
    "element_exists": ("selector",),
    "element_visible": ("selector",),
    "element_text": ("selector", "text"),
    "element_count": ("selector", "count"),
    "page_title": ("title",),
}
NEVER_BLANK = ("selector", "url", "url_contains", "filename", "script")
STEP_TIMEOUT_MS = 8000
SCREENSHOT_TIMEOUT_MS = 60000
RETRY_DELAY_MS = 500


class FlowStep:
    """One checked step. number: from 1; place: `file:line:column`, "" for flows that Plato sent;
    values: its fields as written; timeout and retry_delay_ms: milliseconds."""

    def __init__(self, number: int, values: dict[str, Any], place: str) -> None:
        self.number = number
        self.type: str = values["type"]
        self.description: str = values.get("description") or ""
        self.values = values
        self.place = place
        standard = SCREENSHOT_TIMEOUT_MS if self.type == "screenshot" else STEP_TIMEOUT_MS
        self.timeout = self._number("timeout", standard)
        self.retries = self._number("retries", 0)
        self.retry_delay_ms = self._number("retry_delay_ms", RETRY_DELAY_MS)

    def _number(self, name: str, default: int) -> int:
        number = whole_number(self.values.get(name))
        return default if number is None else number


class Flow:
    """One checked flow: its name, its description and its steps."""

    def __init__(self, name: str, description: str, steps: list[FlowStep]) -> None:
        self.name = name
        self.description = description
        self.steps = steps


class FlowSet:
    """The flows of a simulator.

    source: "local" or "api"; path: the flows file, None for flows that Plato sent; shown: where they are
    from, in words; warnings: what looks mistaken.
    """

    def __init__(self, flows: list[Flow], source: str, path: str | None, shown: str, warnings: list[str]):
        self.flows = flows
        self.source = source
        self.path = path
        self.shown = shown
        self.warnings = warnings

    def choose(self, names: Sequence[str], *, every: bool = False) -> list[Flow]:
        """The flows of those names, in that order; UsageError names what was probably meant."""
        known = [flow.name for flow in self.flows]
        chosen = list(self.flows) if every else []
        for name in () if every else names or ("login",):
            if name not in known:
                close = closest(name, known)
                listed = f"The flows here are: {_listed(known)}."
                raise UsageError(
                    f"{self.shown} has no flow {name!r}.",
                    hint=f"Did you mean {close!r}? {listed}" if close else listed,
                )
            chosen.append(self.flows[known.index(name)])
        empty = [flow.name for flow in chosen if not flow.steps]
        if empty:
            raise UsageError(f"The flow {empty[0]!r} has no steps, so there is nothing to run.")
        return chosen


def load_flows(path: str) -> FlowSet:
    """Read and check a whole flows file; ConfigError lists every problem with its line and column."""
    source = shown_path(from_here(path))
    return parse_flows(read_config(path), source, path=path)


def parse_flows(text: str, source: str, *, path: str | None = None, placed: bool = True) -> FlowSet:
    """The flows in a YAML text. placed: whether the user can look lines and columns up in that text."""
    try:
        root = yaml_compose(text, source)
    except YamlError as error:
        raise unusable_flows(source, [str(error) if placed else error.message]) from None
    checker = FlowsChecker(source, placed)
    flows = checker.flows(root)
    if checker.problems:
        raise unusable_flows(source, checker.problems, checker.warnings)
    return FlowSet(flows, "local" if placed else "api", path, source, checker.warnings)


def unusable_flows(source: str, problems: Sequence[str], warnings: Sequence[str] = ()) -> ConfigError:
    count = len(problems)
    return ConfigError(
        f"{source} cannot be used: {count} problem{'s' if count != 1 else ''}.",
        problems=[*problems, *warnings],
        hint="No browser was opened. Correct the flows and run the command again.",
    )


def configured_flows_path(config_path: str, dataset: str) -> str | None:
    """The absolute path of a dataset's flows file, or None when its `metadata` names none.

    ConfigError when the config cannot be read, the dataset is not in it, or the file is not there.
    """
    source = shown_path(from_here(config_path))
    try:
        root = yaml_compose(read_config(config_path), source)
    except YamlError as error:
        raise unusable_flows(source, [str(error)]) from None
    datasets = root.get("datasets") if root else None
    chosen = datasets.get(dataset) if datasets else None
    if datasets is None or chosen is None:
        known = _listed(str(key.value) for key, _ in datasets.pairs()) if datasets else ""
        raise ConfigError(f"{source} has no dataset {dataset!r}; the datasets there are: {known or 'none'}.")
    metadata = chosen.get("metadata")
    node = metadata.get("flows_path") if metadata else None
    if node is None or node.value is None:
        return None
    if not isinstance(node.value, str) or not node.value.strip():
        raise unusable_flows(source, [str(node.error("`metadata.flows_path` must be the path of a file"))])
    where = f"{source}:{node.line}:{node.column}"
    path = flows_file(config_path, node.value, where)
    if not os.path.isfile(path):
        raise ConfigError(f"{where}: the flows file {shown_path(from_here(path))} is not there.")
    return path


def flows_file(config_path: str, name: str, where: str) -> str:
    """The absolute path of a config's flows file; ConfigError unless it lies in the config's directory.

    Its text leaves this machine with a snapshot, so a config must not be able to name any file at all.
    """
    folder = os.path.dirname(os.path.abspath(config_path))
    path = os.path.normpath(os.path.join(folder, name))
    top, real = os.path.realpath(folder), os.path.realpath(path)
    if os.path.isabs(name) or not is_inside(name) or os.path.commonpath([top, real]) != top:
        raise ConfigError(
            f"{where}: `metadata.flows_path` is {name!r}; it must lie in the directory of the config."
        )
    return path


class FlowsChecker(ConfigChecker):
    """Walks the nodes of a flows file and collects problems and warnings, each with its place."""

    def __init__(self, source: str, placed: bool) -> None:
        super().__init__(source)
        self.placed = placed

    def flows(self, root: YamlNode | None) -> list[Flow]:
        """Every flow of the document; those with problems are incomplete."""
        listed = root.get("flows") if root else None
        if root is None or listed is None:
            where = f"{self.source}:1:1: " if self.placed else ""
            self.problems.append(f"{where}`flows` is missing: a list of flows with `name` and `steps`")
            return []
        self._warn_unknown(root, ("flows",), "the file")
        found: list[Flow] = []
        for number, node in enumerate(self._entries(listed, "`flows`"), 1):
            flow = self._flow(node, number)
            if flow and any(flow.name == other.name for other in found):
                self._problem(node, f"there is a flow `{flow.name}` already; each name must be another one")
            found += [flow] if flow else []
        return found

    def _entries(self, node: YamlNode, what: str) -> list[YamlNode]:
        if node.kind != "sequence":
            self._problem(node, f"{what} must be a list (lines that start with `- `)")
        return list(node.items())

    def _flow(self, node: YamlNode, number: int) -> Flow | None:
        what = f"flow {number}"
        if not self._is_mapping(node, what):
            return None
        name, description, steps = (node.get(key) for key in ("name", "description", "steps"))
        if name is None:
            self._problem(node, f"{what} has no `name`")
        elif self._check_value(name, f"{what}: `name`", _REQUIRED):
            what = f"flow `{name.value}`"
        if description is not None:
            self._check_value(description, f"{what}: `description`", _TEXT)
        if self.placed:
            self._refuse_unknown(node, ("name", "description", "har_path", "steps"), what)
        done: list[FlowStep] = []
        if steps is not None and steps.value is not None:
            for place, step in enumerate(self._entries(steps, f"{what}: `steps`"), 1):
                checked = self._step(step, place, f"{what}, step {place}")
                done += [checked] if checked else []
        told = description.value if description is not None else None
        return Flow(str(name.value if name else ""), str(told or ""), done)

    def _step(self, node: YamlNode, number: int, what: str) -> FlowStep | None:
        if not self._is_mapping(node, what):
            return None
        fields = self._fields_of(node, what)
        if fields is None:
            return None
        before = len(self.problems)
        for name, field in fields.items():
            value = node.get(name)
            if value is None:
                if field.required:
                    self._problem(node, f"{what}: `{name}` is missing")
            elif self._check_value(value, f"{what}: `{name}`", field):
                self._check_sense(name, value, f"{what}: `{name}`")
        if self.placed:
            self._refuse_unknown(node, tuple(fields), what)
        if "verify_type" in fields:
            self._check_verify(node, what)
        where = f"{self.source}:{node.line}:{node.column}" if self.placed else ""
        return FlowStep(number, node.plain(), where) if len(self.problems) == before else None

    def _fields_of(self, node: YamlNode, what: str) -> dict[str, Field] | None:
        """The fields that a step of this type may have; None (and a problem) for an unknown type."""
        kind = node.get("type")
        if kind is None or kind.value is None:
            self._problem(kind or node, f"{what} has no `type`; the types are: {_listed(STEP_FIELDS)}")
            return None
        own = STEP_FIELDS.get(kind.value) if isinstance(kind.value, str) else None
        if own is None:
            close = closest(str(kind.plain()), STEP_FIELDS)
            meant = f"did you mean `{close}`?" if close else f"the types are: {_listed(STEP_FIELDS)}"
            self._problem(kind, f"{what}: there is no step type {kind.plain()!r}; {meant}")
            return None
        return {**STEP_COMMON_FIELDS, **own}

    def _refuse_unknown(self, node: YamlNode, known: tuple[str, ...], what: str) -> None:
        kind = node.get("type")
        for key, _ in node.pairs():
            if key.value in known:
                continue
            missing = [name for name in known if node.get(name) is None]
            close = closest(str(key.value), missing) or closest(str(key.value), known)
            others = [name for name, fields in STEP_FIELDS.items() if kind and key.value in fields]
            meant = f"; did you mean `{close}`?" if close else ""
            if others and not close:
                meant = f" (it belongs to {_listed(others)})"
            subject = f"{what}: `{kind.value}`" if kind else what
            self._problem(key, f"{subject} has no field `{key.value}`{meant}")

    def _check_sense(self, name: str, node: YamlNode, what: str) -> None:
        """What the models take and cannot have been meant."""
        if name in NEVER_BLANK and isinstance(node.value, str) and not node.value.strip():
            self._problem(node, f"{what} is empty")
        elif name == "filename" and not is_inside(node.value):
            self._problem(
                node, f"{what} is {node.value!r}, which would lie outside of the screenshots folder"
            )
        elif name == "value" and not isinstance(node.value, str) and self.placed:
            written = node.source_text()
            if written != str(node.value):
                self._warning(node, f"{what}: YAML reads {written} as {node.value}; quotes keep it as it is")

    def _check_verify(self, node: YamlNode, what: str) -> None:
        kind = node.get("verify_type")
        if kind is None or not isinstance(kind.value, str):
            return
        if kind.value not in VERIFY_NEEDS:
            close = closest(kind.value, VERIFY_NEEDS)
            meant = f"did you mean `{close}`?" if close else f"it is one of {_listed(VERIFY_NEEDS)}"
            self._problem(kind, f"{what}: there is no verify_type {kind.value!r}; {meant}")
            return
        for name in VERIFY_NEEDS[kind.value]:
            value = node.get(name)
            if value is None or value.value is None:
                self._problem(node, f"{what}: `{kind.value}` needs `{name}`")

    def _warning(self, node: YamlNode, text: str) -> None:
        self.warnings.append(f"{self.source}:{node.line}:{node.column}: {text}")

    def _problem(self, node: YamlNode, text: str) -> None:
        if self.placed:
            super()._problem(node, text)
        else:
            self.problems.append(text)

    def _warn_unknown(self, node: YamlNode, known: tuple[str, ...], where: str) -> None:
        if self.placed:
            super()._warn_unknown(node, known, where)


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, by its words alone."""
    path = os.path.normpath(name)
    return not os.path.isabs(path) and path.split("/")[0] not in ("..", ".") and "\0" not in name


# ----------------------------------------------------------------------------------------------------------
# processes: the one door to child processes; who a process is; work beside the main thread; signals
# ----------------------------------------------------------------------------------------------------------


def launch(command: Sequence[str], reporter: Reporter, **options: Any) -> subprocess.Popen[bytes]:
    """Start a child process, without the secrets of the environment unless `env` has them.

    SandboxError names a program that cannot be run.
    """
    import subprocess

    reporter.trace("run: " + shell_words(command))
    if "env" not in options:
        options["env"] = child_environment(os.environ)
    try:
        return subprocess.Popen(list(command), **options)
    except OSError as error:
        raise SandboxError(
            f"{command[0]} could not be run: {reason(error)}.",
            hint="Check that it is installed and that PATH finds it.",
        ) from None


def point_at_nothing(*descriptors: int) -> None:
    """Make file descriptors lead to /dev/null."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that has no use for the API key and the databases' passwords."""
    secret = ("PLATO_API_KEY", "PGPASSWORD", "MYSQL_PWD")
    return {name: value for name, value in environment.items() if name not in secret}


def find_program(name: str) -> str | None:
    """The absolute path of a program on PATH, or None."""
    import shutil

    return shutil.which(name)


def shell_words(words: Sequence[str]) -> str:
    """Words as one line that a POSIX shell reads back as the same words."""
    import shlex

    return " ".join(shlex.quote(word) for word in words)


# Runs a file as Python runs an imported one: from its cached bytecode. Compiling this one for every child
# takes five times as long and six times the memory.
_RUN_FILE = (
    "import os, sys; from importlib.machinery import SourceFileLoader as Loader; sys.argv.pop(0); "
    'os.path.exists(sys.argv[0]) or sys.exit(sys.argv[0] + " is not there any more."); '
    'exec(Loader("plato_sandbox", sys.argv[0]).get_code("plato_sandbox"),'
    ' {"__name__": "__main__", "__file__": sys.argv[0]})'
)


def own_command(*arguments: str) -> list[str]:
    """The command that runs this very file again, without the user's site-packages and PYTHON* variables."""
    if not sys.executable:
        raise SandboxError(
            "The path of the Python interpreter is unknown, so the heartbeat and SSH could not be started.",
            hint="Run this file with python3.",
        )
    flags = ["-I", "-S", "-B"] if sys.dont_write_bytecode else ["-I", "-S"]
    return [os.path.abspath(sys.executable), *flags, "-c", _RUN_FILE, own_file(), *arguments]


def cache_bytecode() -> None:
    """Have the bytecode of this file in Python's cache, if that can be, for the children started later."""
    from importlib.machinery import SourceFileLoader

    SourceFileLoader("plato_sandbox", own_file()).get_code("plato_sandbox")


def own_file() -> str:
    """The absolute path of this file, symbolic links kept."""
    return os.path.abspath(__file__)


def process_start_mark(pid: int) -> str | None:
    """Something that two processes with the same pid never share: the start time; None if there is none.

    Linux: clock ticks since boot (/proc/PID/stat); elsewhere what `ps` says.
    """
    if pid <= 0:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        return None if os.path.isdir("/proc/self") else _start_mark_from_ps(pid)
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _start_mark_from_ps(pid: int) -> str | None:
    import subprocess

    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def process_command(pid: int) -> str:
    """The command line of a process, words separated by spaces; "" when it cannot be read."""
    import subprocess

    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return ""
    command = ["ps", "-o", "command=", "-p", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def process_ids() -> list[int]:
    """The ids of the processes that run here."""
    import subprocess

    if os.path.isdir("/proc/self"):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    try:
        done = subprocess.run(["ps", "-axo", "pid="], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(word) for word in done.stdout.split()]


def signal_process(pid: int, is_it: Callable[[], bool], number: int) -> bool:
    """Send a signal to the process that `is_it` says it is, and to no other; False when it is not there.

    On Linux a file descriptor holds the process while it is looked at, so a reused pid cannot slip in.
    """
    import signal

    try:
        if hasattr(os, "pidfd_open"):
            handle = os.pidfd_open(pid)
            try:
                if not is_it():
                    return False
                signal.pidfd_send_signal(handle, number)  # type: ignore[attr-defined,unused-ignore]
                return True
            finally:
                os.close(handle)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # a kernel or sandbox without pidfd: look and send
    try:
        if not is_it():
            return False
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class Aside:
    """A function running in a thread beside the main one; `result` waits and gives its value or its error."""

    def __init__(self, function: Callable[[], Any]) -> None:
        import threading

        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        # Not `Thread.join`: where an exception interrupts it, Python 3.11 counts the thread as ended.
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001  (handed to whoever asks for the result)
            self._error = error
        finally:
            self._ended.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait, at most so long; whether it has ended."""
        return self._ended.wait(seconds)

    def result(self) -> Any:
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._value


class Outcome:
    """How a command ended, here or on the VM: its exit code and its two outputs."""

    def __init__(self, code: int, stdout: bytes, stderr: bytes) -> None:
        self.code = code
        self.stdout = stdout
        self.stderr = stderr


def run_program(
    command: Sequence[str], reporter: Reporter, *, seconds: float, stdin: Iterable[bytes] = (), **options: Any
) -> Outcome:
    """Run a child process to its end. It is ended whenever this does not return.

    stdin: what it reads, piece by piece. TimedOutError after `seconds`.
    """
    import subprocess

    pipe = subprocess.PIPE
    # In a session of its own, so that a Ctrl-C in the terminal is ours to handle.
    process = launch(
        command, reporter, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, **options
    )
    streams: list[Any] = [process.stdin, process.stdout, process.stderr]
    outputs = [Aside(stream.read) for stream in streams[1:]]
    try:
        _feed(streams[0], stdin)
        process.wait(seconds)
        stdout, stderr = (output.result() for output in outputs)
    except subprocess.TimeoutExpired:
        raise TimedOutError(f"{command[0]} did not end within {seconds:g} s.") from None
    finally:
        _end_group(process)
        for stream in streams:
            stream.close()
    return Outcome(process.returncode, stdout, stderr)


def _feed(stream: Any, pieces: Iterable[bytes]) -> None:
    """Write all pieces and close; a child that does not want them says why elsewhere."""
    try:
        for piece in pieces:
            stream.write(piece)
        stream.close()
    except BrokenPipeError:
        pass


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, with its own children; it leads a group and has not been waited for."""
    import signal
    import subprocess

    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(2.0)
            except subprocess.TimeoutExpired:
                continue


class SignalGuard:
    """Turns SIGINT, SIGTERM and SIGHUP into Interrupted while the block runs (main thread only).

    While `held` is true, a first signal is only remembered until `release`, so that the answer of a
    request that creates something is not lost; a second one is raised at once.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._previous: list[tuple[int, Any]] = []
        self.held = False
        self._pending: int | None = None

    def __enter__(self) -> SignalGuard:  # noqa: PYI034  (Self is newer than 3.9)
        import signal
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self._previous.append((number, signal.signal(number, self._arrived)))
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._previous:
            signal.signal(number, handler)
        self._previous.clear()

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if self.held and self._pending is None:
            self._pending = number
            self._reporter.warn("Interrupted; waiting for the answer to the request that creates the VM.")
            return
        raise Interrupted(number)

    def release(self) -> None:
        """Obey signals again; raise the remembered one, if there is one."""
        self.held = False
        if self._pending is not None:
            number, self._pending = self._pending, None
            raise Interrupted(number)


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


def load_state(directory: str) -> dict[str, Any] | None:
    """The state of a directory's sandbox (the keys of the specification), or None without a file.

    StateError for a file that cannot be read, was cut off, or holds no sandbox. A state with `starting`
    and without `session_id` is what a `start` leaves that died before Plato answered it.
    """
    path = state_path(directory)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise damaged_state(path, "it is not text", "") from None
    except OSError as error:
        message = f"{shown_path(path)} cannot be read: {reason(error)}. A VM may still be running."
        raise StateError(message, hint=stop_by_id_hint("ID")) from None
    return parse_state(text, path)


def parse_state(text: str, path: str) -> dict[str, Any]:
    """The state in the text of a .sandbox.yaml, ours or that of `plato` 2.0.x; StateError if damaged."""
    if not text.strip():
        raise damaged_state(path, "it is empty", text)
    ours, whole = text.startswith(STATE_FIRST_LINE), text.rstrip("\n").endswith(STATE_LAST_LINE.rstrip("\n"))
    if not whole and (ours or not text.endswith("\n")):
        raise damaged_state(path, "its end is missing", text)
    try:
        state = yaml_load(text, STATE_FILE)
    except YamlError as error:
        raise damaged_state(path, str(error), text) from None
    if not isinstance(state, dict):
        raise damaged_state(path, "it does not hold the fields of a sandbox", text)
    if not state.get("starting") and not _is_text(state.get("session_id")):
        raise damaged_state(path, "it holds no session_id", text)
    wrong = [key for key in _TEXT_KEYS if not isinstance(state.get(key), (str, type(None)))]
    if wrong:
        raise damaged_state(path, f"its {wrong[0]} is not a text", text)
    if state.get("ssh_host") and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", state["ssh_host"]):
        raise damaged_state(path, "its ssh_host is not the name of a host", text)
    return state


_TEXT_KEYS = (
    *("session_id", "job_id", "public_url", "url", "mode", "service", "dataset", "base_url", "created_at"),
    *("plato_config_path", "ssh_host", "ssh_config_path", "ssh_private_key_path", "expires_at"),
    "directory",
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def damaged_state(path: str, why: str, text: str) -> StateError:
    """The error for a .sandbox.yaml that cannot be trusted; its hint says how to stop the VM all the same."""
    found = re.search(r"^session_id: ['\"]?([A-Za-z0-9_-]+)['\"]?$\n", text, re.MULTILINE)
    name = found[1] if found else "ID"
    return StateError(
        f"{shown_path(path)} is damaged: {why}. Nothing was changed; a VM may still be running.",
        hint=stop_by_id_hint(name),
    )


def stop_by_id_hint(session_id: str) -> str:
    return f"To stop the VM: {PROGRAM} stop --session-id {session_id}. Then remove the file."


def save_state(directory: str, state: Mapping[str, Any]) -> None:
    """Write .sandbox.yaml so that a crash leaves the old file or the new one, readable by the owner only."""
    kept = {key: value for key, value in state.items() if value is not None}
    text = STATE_FIRST_LINE + yaml_dump(kept) + STATE_LAST_LINE
    try:
        write_whole(state_path(directory), text)
    except OSError as error:
        raise StateError(
            f"{shown_path(state_path(directory))} cannot be written: {reason(error)}.",
            hint="The directory must be writable: the only record of the VM is kept there.",
        ) from None


def remove_state(directory: str) -> None:
    """Remove .sandbox.yaml; no error when it is not there."""
    try:
        os.unlink(state_path(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateError(f"{shown_path(state_path(directory))} cannot be removed: {reason(error)}.") from None
    _sync_directory(directory)


def write_whole(path: str, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step: temporary file beside it, fsync, rename, fsync of the directory."""
    temporary = f"{path}.{os.getpid()}.tmp"
    remove_temporaries(path)

    def create(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, mode)

    try:
        with open(temporary, "x", encoding="utf-8", newline="\n", opener=create) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _unlink_quietly(temporary)
        raise
    _sync_directory(os.path.dirname(path))


def remove_temporaries(path: str) -> None:
    """Remove what `write_whole` left beside a path in processes that were killed, or in this one."""
    import glob

    for temporary in glob.glob(f"{glob.escape(path)}.*.tmp"):
        pid = temporary.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or process_start_mark(int(pid)) is None):
            _unlink_quietly(temporary)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def remove_tree(path: str) -> None:
    """Remove a directory of ours with all that is in it, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def _sync_directory(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems cannot; the rename itself is done
    finally:
        os.close(handle)


def make_home(home: str) -> None:
    """Create PLATO_HOME (0700) if needed and check that files can be written there.

    `~/.plato` becomes 0700 whoever made it; another directory that is there already keeps its mode, but must
    not be one in which everyone can make files.
    """
    import stat

    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        if home == os.path.expanduser("~/.plato") and os.stat(home).st_uid == os.getuid():
            os.chmod(home, 0o700)
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
        if os.stat(home).st_mode & stat.S_IWOTH:
            raise PermissionError("everyone can write to it, so an SSH config in it could be anyone's")
    except OSError as error:
        raise SandboxError(
            f"{shown_path(home)} cannot be used for SSH files and heartbeat records: {reason(error)}.",
            hint="Make it a directory that only you can write to, or set PLATO_HOME to another one.",
        ) from None


def short_id(session_id: str) -> str:
    """The <id> in the names of SSH files and hosts: the first part of the session id, safe as a name.

    Session ids are UUIDs today. The first part of another kind of id is used only where it looks random
    ("abc123-def456"), else the whole id: "session-1" and "session-2" must not share their files.
    """
    safe = re.sub(r"[^A-Za-z0-9-]", "", session_id).strip("-")
    first = safe.split("-", 1)[0]
    random = re.fullmatch(r"[0-9a-f]{8}|(?=.*\d)[0-9a-f]{6,}", first, re.IGNORECASE)
    return (first if random else safe)[:64] or "unknown"


class DirectoryLock:
    """The kernel's lock on a directory itself: it leaves no file behind and ends with its process.

    Entering raises ConflictError, naming the holder, when another command has it. shared: not against others
    that only look.
    """

    def __init__(self, directory: str, *, shared: bool = False) -> None:
        self.directory = directory
        self.shared = shared
        self._handle = -1

    def __enter__(self) -> DirectoryLock:  # noqa: PYI034  (Self is newer than 3.9)
        import fcntl

        try:
            self._handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise SandboxError(f"{shown_path(self.directory)} cannot be opened: {reason(error)}.") from None
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock_holder(os.fstat(self._handle))
            os.close(self._handle)
            raise ConflictError(
                f"Another command is at work in {shown_path(self.directory)}: {holder}.",
                hint="Wait for it to end, or press Ctrl-C in its terminal; then run this again.",
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def lock_holder(status: os.stat_result) -> str:
    """Who holds the lock on a file, in words: "start (PID 123)" where the system tells (Linux)."""
    wanted = f":{status.st_ino} "
    try:
        with open("/proc/locks", encoding="ascii") as file:
            lines = [line for line in file if " FLOCK " in line and wanted in line and "->" not in line]
    except OSError:
        lines = []
    for line in lines:
        pid = line.split()[4]
        words = process_command(int(pid)).split() if pid.isdigit() else []
        for word in words:
            if word in COMMANDS:
                return f"`{word}` (PID {pid})"
        return f"PID {pid}"
    return "a plato-sandbox command"


# ----------------------------------------------------------------------------------------------------------
# transport: the one door to the network: deadlines, proxies, TLS, retries, JSON, status to error
# ----------------------------------------------------------------------------------------------------------


class Stream:
    """A connected socket whose every operation ends at one deadline, however slowly the bytes drip.

    It is what http.client needs of a socket (sendall, makefile, close). Like a socket, it is closed once
    the files made of it are: http.client closes the one before it has read the other.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self._users = 1

    def _limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no complete answer in time")
        self.sock.settimeout(left)

    def sendall(self, data: Any) -> None:
        self._limit()
        self.sock.sendall(data)

    def recv_into(self, buffer: Any) -> int:
        self._limit()
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str, *_: Any, **__: Any) -> Any:
        import io

        stream = self

        class Reader(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                return stream.recv_into(buffer)

            def close(self) -> None:
                if not self.closed:
                    super().close()
                    stream.close()

        self._users += 1
        return io.BufferedReader(Reader(), 65536)

    def close(self) -> None:
        self._users -= 1
        if self._users <= 0:
            self.sock.close()


def split_address(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path prefix of a base URL that `normal_base_url` accepted."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    host, port = authority, ""
    if not authority.endswith("]"):
        found = re.fullmatch(r"(.*?):(\d+)", authority)
        if found:
            host, port = found[1], found[2]
    return scheme, host.strip("[]"), int(port or (443 if scheme == "https" else 80)), slash + path


def proxy_for(host: str, environment: Mapping[str, str]) -> str | None:
    """The proxy URL that HTTPS_PROXY names for a host, or None (NO_PROXY: suffixes, "*", exact addresses)."""
    proxy = environment.get("https_proxy") or environment.get("HTTPS_PROXY")
    if not proxy or host in ("localhost", "127.0.0.1", "::1"):
        return None
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    for entry in excluded.replace(",", " ").split():
        name = entry.lower().lstrip("*").lstrip(".").strip("[]")
        if name.count(":") == 1:  # with a port; more colons are an IPv6 address
            name = name.partition(":")[0]
        if entry == "*" or (name and (host.lower() == name or host.lower().endswith("." + name))):
            return None
    return proxy


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A TCP connection to a host, through the proxy of the environment if it names one."""
    import socket

    proxy = proxy_for(host, os.environ)
    target = _proxy_address(proxy) if proxy else (host, port)
    left = max(0.1, deadline - time.monotonic())
    try:
        sock = socket.create_connection((name_on_the_wire(target[0]), target[1]), timeout=left)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name of a host looks like this
        raise NetworkError(
            f"The address of {printable(target[0])} could not be found ({reason(error)}).",
            hint="Check the network connection and the name.",
            sent=False,
        ) from None
    except OSError as error:
        raise NetworkError(
            f"{'The proxy ' if proxy else ''}{target[0]}:{target[1]} could not be reached: {reason(error)}.",
            hint="Check the network connection, and HTTPS_PROXY if there is a proxy.",
            sent=False,
        ) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if proxy:
        _tunnel(sock, host, port, proxy, deadline)
    return sock


def name_on_the_wire(host: str) -> Any:
    """A host's name for `socket` and `ssl`: ASCII as bytes, for which they load no tables of Unicode."""
    return host.encode("ascii") if host.isascii() else host


def _proxy_address(proxy: str) -> tuple[str, int]:
    import urllib.parse

    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
        scheme, host, port = parts.scheme, parts.hostname, parts.port or 80
    except ValueError:  # its text may hold the password
        scheme, host, port = "", None, 0
    if scheme != "http" or not host:
        raise UsageError(
            "HTTPS_PROXY is not the address of a proxy that can be used.",
            hint="It looks like http://proxy.example.com:3128.",
        )
    return host, port


def _tunnel(sock: socket.socket, host: str, port: int, proxy: str, deadline: float) -> None:
    import base64
    import urllib.parse

    parts = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if parts.username is not None:
        pair = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(pair.encode()).decode())
    stream = Stream(sock, deadline)
    try:
        stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        answer = bytearray()
        byte = bytearray(1)
        while not answer.endswith(b"\r\n\r\n") and len(answer) < 65536:
            if not stream.recv_into(byte):  # byte by byte: what follows belongs to the tunnel
                break
            answer += byte
    except OSError as error:
        sock.close()
        raise NetworkError(f"The proxy did not answer: {reason(error)}.", sent=False) from None
    status = bytes(answer).split(b"\r\n", 1)[0].split(b" ")
    if len(status) < 2 or status[1] != b"200":
        sock.close()
        word = printable(status[1].decode("ascii", "replace"))[:20] if len(status) > 1 else "no status"
        hint = "Put the proxy's user and password into HTTPS_PROXY." if word == "407" else None
        message = f"The proxy refused the connection to {target} ({word})."
        raise NetworkError(message, hint=hint, sent=False)


STRICT_VERIFY_CODES = range(80, 95)  # OpenSSL's, for what it looks at only when it is to be strict


@functools.lru_cache(maxsize=1)
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """The TLS context of this process: verification on, the CAs of that file or those of the system."""
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise UsageError(
            f"The CA certificates in {shown_path(ca_file or '')} cannot be used: {reason(error)}.",
            hint="SSL_CERT_FILE must name a file of certificates in PEM form, or not be set.",
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def secure(sock: socket.socket, name: str, deadline: float, ca_file: str | None) -> ssl.SSLSocket:
    """TLS over a connected socket, the certificate verified for `name`. Never without verification."""
    import ssl

    sock.settimeout(max(0.1, deadline - time.monotonic()))
    try:
        return tls_context(ca_file).wrap_socket(sock, server_hostname=name_on_the_wire(name))
    except UsageError:
        sock.close()
        raise
    except ssl.SSLCertVerificationError as error:
        sock.close()
        hint = "Behind a company proxy, set SSL_CERT_FILE to a file that holds its CA and the usual ones."
        if error.verify_code in STRICT_VERIFY_CODES:
            hint = (
                "Python 3.13 and newer refuse certificates that do not follow RFC 5280 in all points."
                " Have the CA's made anew by whoever runs it, or run this with Python 3.12 or older."
            )
        raise NetworkError(
            f"The certificate of {name} could not be verified: {error.verify_message}.",
            hint=hint,
            sent=False,
        ) from None
    except (OSError, ValueError) as error:  # ValueError: no certificate can be for such a name
        sock.close()
        message = f"No secure connection to {printable(name)}: {reason(error)}."
        raise NetworkError(message, sent=False) from None


class Answer:
    """An HTTP answer: status, headers (lower-case names), body."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body


class Transport:
    """JSON over HTTP to one base URL with one key, over one kept connection. Not for several threads."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self.settings = settings
        self.reporter = reporter
        self._scheme, self._host, self._port, self._prefix = split_address(settings.base_url)
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        seconds: float = REQUEST_SECONDS,
        repeatable: bool = True,
        window: float = RETRY_WINDOW_SECONDS,
    ) -> Any:
        """Send a request and return the decoded JSON of a 2xx answer.

        seconds: until the complete answer, per attempt; window: no retry begins later than this.
        repeatable: whether the request may be sent again after a lost answer or a status that invites it;
        one that is not goes out once, on a connection of its own. AuthenticationError (401, 403), ApiError
        (with `.status`) and NetworkError (with `.sent`) say what went wrong.
        """
        started = time.monotonic()
        for attempt in range(RETRY_ATTEMPTS):
            try:
                return self._attempt(method, path, query, body, seconds, fresh=not repeatable)
            except ApiError as error:
                delay = retry_delay(error, attempt)
                late = delay is None or time.monotonic() - started + delay > window
                if not repeatable or late or attempt + 1 == RETRY_ATTEMPTS:
                    raise
                self.reporter.trace(f"{method} {path}: {error.message} Again in {delay:.1f} s.")
                time.sleep(delay or 0)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(
        self, method: str, path: str, query: Mapping[str, Any] | None, body: Any, seconds: float, fresh: bool
    ) -> Any:
        import json

        target = self._prefix + path
        if query:
            import urllib.parse

            target += "?" + urllib.parse.urlencode(query)
        payload = None if body is None else json.dumps(body, allow_nan=False).encode()
        started = time.monotonic()
        answer = self._exchange(method, target, payload, started + seconds, fresh)
        self.reporter.trace(f"{method} {path}: {answer.status} in {time.monotonic() - started:.2f} s")
        if not 200 <= answer.status < 300:
            raise error_for_answer(method, path, answer)
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):
            raise ApiError(
                f"{self._host} answered {method} {path} with {describe_body(answer)} instead of JSON.",
                hint="Check PLATO_BASE_URL, and that no login page or proxy stands in between.",
                body=answer.body,
            ) from None

    def _exchange(
        self, method: str, target: str, payload: bytes | None, deadline: float, fresh: bool
    ) -> Answer:
        """One request and its answer; a kept connection that turns out dead is replaced once, unseen."""
        kept = None if fresh else self._connection
        if kept is not None:
            try:
                return self._send(kept, method, target, payload, deadline)
            except NetworkError:
                if time.monotonic() >= deadline:
                    raise
        self.close()
        self._connection = self._connect(deadline)
        return self._send(self._connection, method, target, payload, deadline)

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        import http.client

        sock = connect(self._host, self._port, deadline)
        if self._scheme == "https":
            sock = secure(sock, self._host, deadline, self.settings.ca_file)
        connection = http.client.HTTPConnection(self._host, self._port)
        connection.auto_open = 0
        stream: Any = Stream(sock, deadline)
        connection.sock = stream
        return connection

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        payload: bytes | None,
        deadline: float,
    ) -> Answer:
        import http.client
        import socket

        headers = {
            "X-API-Key": self.settings.require_key(),
            "Accept": "application/json",
            "User-Agent": f"{PROGRAM}/{__version__}",
        }
        if payload is not None:
            headers["Content-Type"] = "application/json"
        where = target.partition("?")[0]
        stream: Any = connection.sock
        stream.deadline = deadline
        body = b""
        try:
            connection.request(method, target, payload, headers)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES + 1)
            if response.length and len(body) <= MAX_ANSWER_BYTES:  # bytes that were announced and never came
                raise ConnectionError("the answer was cut off")
            if response.will_close or len(body) > MAX_ANSWER_BYTES:
                self.close()
        except (TimeoutError, socket.timeout):  # two classes until Python 3.10
            self.close()
            raise NetworkError(
                f"{self._host} did not answer {method} {where} in time.",
                hint="Run the command again; if it keeps failing, Plato may be having trouble.",
                sent=True,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise NetworkError(
                f"The connection to {self._host} broke during {method} {where}: {reason(error)}.",
                hint="Run the command again; if it keeps failing, check the network.",
                sent=True,
                body=body,
            ) from None
        except BaseException:  # interrupted halfway: what is left on this connection is nobody's answer
            self.close()
            raise
        if len(body) > MAX_ANSWER_BYTES:
            raise ApiError(f"{self._host} sent an answer of more than {MAX_ANSWER_BYTES >> 20} MB.")
        return self._without_key(Answer(response.status, dict(response.getheaders()), body))

    def _without_key(self, answer: Answer) -> Answer:
        """An answer that repeats the key, as errors may, loses it here: no message or file can hold it."""
        key = self.settings.require_key()
        if len(key) < SHORTEST_SECRET:
            return answer
        headers = {name: value.replace(key, "***") for name, value in answer.headers.items()}
        return Answer(answer.status, headers, answer.body.replace(key.encode(), b"***"))


def retry_delay(error: ApiError, attempt: int) -> float | None:
    """Seconds to wait before a request is sent again; None when sending it again would not help."""
    import random

    if not isinstance(error, NetworkError) and error.status not in RETRY_STATUSES:
        return None
    backoff: float = 0.4 * 2**attempt * random.uniform(0.75, 1.25)  # noqa: S311  (jitter, not a secret)
    return max(backoff, error.retry_after or 0.0)


def error_for_answer(method: str, path: str, answer: Answer) -> SandboxError:
    """The error that an HTTP status of 300 or more means, with the server's own words in it."""
    said = server_words(answer)
    status = answer.status
    if status == 401:
        return AuthenticationError(
            f"Plato refused the API key (401{': ' + said if said else ''}).",
            hint="Check PLATO_API_KEY, and that it belongs to PLATO_BASE_URL.",
        )
    if status == 403:
        return AuthenticationError(
            f"This API key may not do that ({method} {path}: 403{', ' + said if said else ''}).",
            hint="Ask the owner of the Plato organization for access.",
        )
    hint = None
    if 300 <= status < 400:
        said = f"a redirect to {answer.headers.get('location', 'nowhere')[:200]}"
        hint = "Redirects are not followed, so that the key stays here. Check PLATO_BASE_URL."
    wait = parse_retry_after(answer.headers.get("retry-after"), time.time())
    if status == 429:
        hint = (
            f"Too many requests; try again in {wait:.0f} s."
            if wait
            else "Too many requests; try again later."
        )
    elif status >= 500:
        hint = "This is a trouble of the server; run the command again a little later."
    return ApiError(
        f"{method} {path} failed with {status}{': ' + said if said else ''}.",
        hint=hint,
        status=status,
        retry_after=wait,
        body=answer.body,
    )


def server_words(answer: Answer) -> str:
    """What a FastAPI error says, in one line: `detail`, or the fields that a 422 complains about."""
    import json

    try:
        content = json.loads(answer.body)
    except (ValueError, RecursionError):
        return describe_body(answer) if answer.body else ""
    detail = content.get("detail") if isinstance(content, dict) else None
    if isinstance(detail, list):
        rows = [row for row in detail if isinstance(row, dict)]
        fields = [".".join(map(str, as_list(row.get("loc")))) + ": " + str(row.get("msg")) for row in rows]
        return printable("; ".join(fields)[:600])
    return printable(str(detail)[:600]).rstrip(".") if detail else ""


def describe_body(answer: Answer) -> str:
    """What kind of body came instead of JSON, without its text (it may echo what was sent)."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not answer.body.strip():
        return "an empty body"
    if answer.body.lstrip()[:1] == b"<" or "html" in kind:
        return "an HTML page"
    if answer.body.lstrip()[:1] in (b"{", b"["):
        return "half a JSON document"
    return f"{len(answer.body)} bytes of {printable(kind)[:60] or 'something'}"


def parse_retry_after(value: str | None, now: float) -> float | None:
    """The seconds of a Retry-After header, given in seconds or as a date; None when it says nothing."""
    if not value:
        return None
    if re.fullmatch(r"[ \t]*\d{1,9}[ \t]*", value):
        return float(value)
    import email.utils

    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# Answers come from outside: these take a value only if it has the type that the API promises.


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


# ----------------------------------------------------------------------------------------------------------
# api: one thin method per endpoint; no printing, no decisions
# ----------------------------------------------------------------------------------------------------------


class PlatoApi:
    """The endpoints that this tool uses. Answers are plain dicts; what is missing in them is missing."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self.settings = settings
        self.transport = Transport(settings, reporter)

    def another(self) -> PlatoApi:
        """The same with a connection of its own, for another thread."""
        return PlatoApi(self.settings, self.transport.reporter)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._checked(dict, method, path, **options)
        return answer

    def _call_for_list(self, method: str, path: str, **options: Any) -> list[Any]:
        answer: list[Any] = self._checked(list, method, path, **options)
        return answer

    def _checked(self, kind: type, method: str, path: str, **options: Any) -> Any:
        answer = self.transport.request(method, path, **options)
        if not isinstance(answer, kind):
            wanted = "a list" if kind is list else "an object"
            raise ApiError(
                f"{method} {path} was answered with a JSON {type(answer).__name__} where {wanted} belongs.",
                hint="Check PLATO_BASE_URL, and that this version fits the server.",
            )
        return answer

    def make_session(self, environment: Mapping[str, Any], lifetime: int | None) -> dict[str, Any]:
        """POST /api/v2/sessions/make: a session of one job. Sent once, whatever happens.

        lifetime: seconds until the server ends the VM. Returns CreateSessionResponse.
        """
        body = {"type": "envs", "envs": [dict(environment)], "timeout": lifetime, "source": "SDK"}
        return self._call("POST", "/api/v2/sessions/make", body=body, seconds=MAKE_SECONDS, repeatable=False)

    def wait_for_ready(self, session_id: str, seconds: int) -> dict[str, Any]:
        """GET .../wait_for_ready: a long poll of `seconds`. Returns WaitForReadyResponse."""
        path = f"/api/v2/sessions/{quoted(session_id)}/wait_for_ready"
        return self._call("GET", path, query={"timeout": seconds}, seconds=seconds + 15.0)

    def session_details(self, session_id: str) -> dict[str, Any]:
        """GET /api/v2/sessions/{session_id}. Returns SessionDetailsResponse."""
        return self._call("GET", f"/api/v2/sessions/{quoted(session_id)}")

    def heartbeat(self, session_id: str) -> dict[str, Any]:
        """POST .../heartbeat, once: the caller has its own rhythm. Returns HeartbeatResponse."""
        path = f"/api/v2/sessions/{quoted(session_id)}/heartbeat"
        return self._call("POST", path, seconds=BEAT_SECONDS, repeatable=False)

    def reset(self, session_id: str) -> dict[str, Any]:
        """POST .../reset: back to the initial state, however often. Returns ResetSessionResponse."""
        path = f"/api/v2/sessions/{quoted(session_id)}/reset"
        return self._call("POST", path, body={"source": "SDK"}, seconds=RESET_SECONDS)

    def close(self, session_id: str) -> dict[str, Any]:
        """POST .../close. Returns CloseSessionResponse."""
        return self._call("POST", f"/api/v2/sessions/{quoted(session_id)}/close", seconds=CLOSE_SECONDS)

    def public_url(self, session_id: str) -> dict[str, Any]:
        """GET .../public_url. Returns PublicUrlResponse."""
        return self._call("GET", f"/api/v2/sessions/{quoted(session_id)}/public_url")

    def execute(self, session_id: str, command: str, seconds: float) -> dict[str, Any]:
        """POST .../execute: run a command on the VM, which may happen twice. Returns ExecuteCommandResponse.

        seconds: until the command is ended there.
        """
        body = {"command": command, "timeout": max(1, int(seconds))}
        path = f"/api/v2/sessions/{quoted(session_id)}/execute"
        return self._call("POST", path, body=body, seconds=seconds + 15.0)

    def job_flows(self, job_id: str) -> Any:
        """GET /api/v2/jobs/{job_id}/flows. Returns a list of Flow."""
        return self.transport.request("GET", f"/api/v2/jobs/{quoted(job_id)}/flows")

    def artifact_flows(self, artifact_id: str) -> Any:
        """GET /api/v1/simulator/{artifact_id}/flows: {"data": {"flows": TEXT}} or the flows file itself."""
        try:
            return self.transport.request("GET", f"/api/v1/simulator/{quoted(artifact_id)}/flows")
        except ApiError as error:
            text = error.body.decode("utf-8", "replace") if error.status is None and error.body else ""
            if not re.search(r"^flows:", text, re.MULTILINE):
                raise
            return text

    def add_ssh_key(self, session_id: str, public_key: str, username: str) -> dict[str, Any]:
        """POST .../add_ssh_key. Returns AddSSHKeyResponse."""
        body = {"public_key": public_key, "username": username}
        path = f"/api/v2/sessions/{quoted(session_id)}/add_ssh_key"
        return self._call("POST", path, body=body, seconds=SETUP_SECONDS)

    def setup_root_access(self, job_id: str, public_key: str) -> dict[str, Any]:
        """POST .../vm/{job_id}/setup-root-access. Returns VMManagementResponse."""
        path = f"/api/v1/sandbox/public-build/vm/{quoted(job_id)}/setup-root-access"
        return self._call("POST", path, body={"ssh_public_key": public_key}, seconds=SETUP_SECONDS)

    def setup_sandbox(
        self, job_id: str, service: str, dataset: str, content: Mapping[str, Any], public_key: str | None
    ) -> dict[str, Any]:
        """POST .../vm/{job_id}/setup-sandbox: the config and the SSH key. Returns SetupSandboxResponse."""
        body = {"service": service, "dataset": dataset, "plato_dataset_config": dict(content)}
        if public_key:
            body["ssh_public_key"] = public_key
        path = f"/api/v1/sandbox/public-build/vm/{quoted(job_id)}/setup-sandbox"
        return self._call("POST", path, body=body, seconds=SETUP_SECONDS)

    def start_worker(
        self, job_id: str, service: str, dataset: str, content: Mapping[str, Any]
    ) -> dict[str, Any]:
        """POST .../vm/{job_id}/start-worker: begins at once, is up later. Returns VMManagementResponse."""
        body = {"service": service, "dataset": dataset, "plato_dataset_config": dict(content)}
        path = f"/api/v1/sandbox/public-build/vm/{quoted(job_id)}/start-worker"
        return self._call("POST", path, body=body, seconds=SETUP_SECONDS)

    def state(self, session_id: str, window: float = RETRY_WINDOW_SECONDS) -> dict[str, Any]:
        """GET .../state, mutations merged and ignore rules applied. Returns SessionStateResponse."""
        path = f"/api/v2/sessions/{quoted(session_id)}/state"
        query = {"merge_mutations": "true"}
        return self._call("GET", path, query=query, seconds=STATE_SECONDS, window=window)

    def cleanup(self, session_id: str) -> dict[str, Any]:
        """POST /api/v1/env/{session_id}/cleanup: empty the audit tables. Returns EnvCleanupResponse."""
        return self._call("POST", f"/api/v1/env/{quoted(session_id)}/cleanup", seconds=RESET_SECONDS)

    def snapshot(self, session_id: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """POST .../snapshot: a new artifact. Sent once, whatever happens. Returns CreateSnapshotResponse.

        checkpoint: fields of CreateCheckpointRequest.
        """
        path = f"/api/v2/sessions/{quoted(session_id)}/snapshot"
        return self._call("POST", path, body=dict(checkpoint), seconds=SNAPSHOT_SECONDS, repeatable=False)

    def artifact(self, artifact_id: str) -> dict[str, Any]:
        """GET /api/v2/artifacts/{artifact_id}. Returns ArtifactInfoResponse."""
        return self._call("GET", f"/api/v2/artifacts/{quoted(artifact_id)}")

    def gitea_credentials(self) -> dict[str, Any]:
        """GET /api/v1/gitea/credentials. Returns GiteaCredentialsResponse."""
        return self._call("GET", "/api/v1/gitea/credentials")

    def gitea_simulators(self) -> list[Any]:
        """GET /api/v1/gitea/simulators that the key may use. Returns SimulatorListItemResponses."""
        return self._call_for_list("GET", "/api/v1/gitea/simulators")

    def gitea_repository(self, simulator_id: str) -> dict[str, Any]:
        """GET /api/v1/gitea/simulators/{id}/repo. Returns SimulatorRepositoryResponse."""
        return self._call("GET", f"/api/v1/gitea/simulators/{quoted(simulator_id)}/repo")

    def create_gitea_repository(self, simulator_id: str) -> dict[str, Any]:
        """POST /api/v1/gitea/simulators/{id}/repo; 409 when there is one. Returns RepositoryResponse."""
        return self._call("POST", f"/api/v1/gitea/simulators/{quoted(simulator_id)}/repo")


class SandboxBase:
    """What every operation on a sandbox works with: its directory, its Plato, whom to tell, and its state."""

    def __init__(
        self, directory: str = ".", *, settings: Settings | None = None, reporter: Reporter | None = None
    ) -> None:
        if not directory:
            raise UsageError("The name of the working directory is empty.")
        try:
            self.directory = os.path.abspath(directory)
        except FileNotFoundError:
            raise UsageError("The current directory does not exist any more; go to another one.") from None
        if not os.path.isdir(self.directory):
            raise UsageError(f"{shown_path(self.directory)} is not a directory.")
        self.settings = settings or Settings.from_environment()
        self.reporter = reporter or Reporter()
        self.api = PlatoApi(self.settings, self.reporter)
        self.state: dict[str, Any] = {}

    def check_still_there(self) -> None:
        """NoSandboxError when .sandbox.yaml does not name this sandbox any more; unreadable is no reason."""
        try:
            state = load_state(self.directory)
        except SandboxError:
            return
        if state is None or state.get("session_id") != self.state.get("session_id"):
            raise NoSandboxError(
                f"The sandbox of {shown_path(self.directory)} was stopped or replaced meanwhile.",
                hint=f"See what is there now: {PROGRAM} status",
            )


def quoted(part: str) -> str:
    """One part of a URL path; ids are opaque, so anything may be in them."""
    import urllib.parse

    return urllib.parse.quote(part, safe="")


def job_of(answer: Mapping[str, Any], job_id: str | None) -> dict[str, Any]:
    """The entry of one job in the `results` of an answer; {} when it has none. Sessions here have one job."""
    results = as_dict(answer.get("results"))
    if job_id in results:
        return as_dict(results[job_id])
    return as_dict(next(iter(results.values()), None)) if len(results) == 1 else {}


def vm_status(details: Mapping[str, Any], job_id: str | None) -> tuple[str | None, str | None]:
    """The VM's status and its reason in session details, wherever this server's version puts them."""
    jobs = [as_dict(job) for job in as_list(details.get("jobs")) or as_list(details.get("envs"))]
    same = [job for job in jobs if job_id and job_id in (job.get("job_id"), job.get("public_id"))]
    for entry in (*same, *jobs[:1], details):
        status = as_text(entry.get("status"))
        if status:
            return status, as_text(entry.get("status_reason")) or as_text(entry.get("error"))
    return None, None


# ----------------------------------------------------------------------------------------------------------
# ssh: key, config and known hosts of one sandbox; the gateway stream, which is this file as ProxyCommand
# ----------------------------------------------------------------------------------------------------------


# What OpenSSH itself offers, but AES-GCM first: nearly every processor has it built in, so a large tree costs
# both ends less.
SSH_CIPHERS = (
    "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,"
    "aes128-ctr,aes192-ctr,aes256-ctr"
)
SSH_KEPT_SECONDS = 300  # without use
SSH_EXIT_SECONDS = 5.0
SOCKET_PATH_BYTES = 86  # of the 104 that some systems allow; ssh adds 17 while it makes one


class SshFiles:
    """The SSH files of one sandbox under PLATO_HOME. `~/.ssh` is never read or written."""

    def __init__(self, home: str, session_id: str) -> None:
        self.name = short_id(session_id)
        self.host = f"sandbox-{self.name}"
        self.config = os.path.join(home, f"ssh_{self.name}.conf")
        self.key = os.path.join(home, f"ssh_{self.name}_key")
        self.public_key = self.key + ".pub"
        self.known_hosts = os.path.join(home, f"known_hosts_{self.name}")
        self.socket = os.path.join(home, f"ssh_{self.name}.sock")

    def all(self) -> tuple[str, ...]:
        return self.config, self.key, self.public_key, self.known_hosts

    def remove(self) -> None:
        self._hang_up()
        for path in (*self.all(), self.socket, self.known_hosts + ".old"):
            _unlink_quietly(path)
        remove_temporaries(self.config)

    def _hang_up(self) -> None:
        """End the connection that ssh keeps for later ones, if there is one."""
        import subprocess

        if not os.path.exists(self.socket):
            return
        quiet = subprocess.DEVNULL
        command = ["ssh", "-F", self.config, "-O", "exit", self.host]
        try:
            launch(command, Reporter(), stdin=quiet, stdout=quiet, stderr=quiet).wait(SSH_EXIT_SECONDS)
        except (SandboxError, subprocess.TimeoutExpired):
            pass  # it ends by itself with the VM


class KeyMaking:
    """ssh-keygen at work beside the main thread; `finish` waits and returns the public key."""

    def __init__(self, files: SshFiles, reporter: Reporter) -> None:
        import subprocess

        self.files = files
        for path in (files.key, files.public_key, files.known_hosts):  # links among them are not followed
            _unlink_quietly(path)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", files.host, "-f", files.key]
        quiet = subprocess.DEVNULL
        self._process = launch(command, reporter, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE)

    def cancel(self) -> None:
        """End it, so that no file of its comes after those here are removed."""
        self._process.kill()
        self._process.wait()

    def finish(self) -> str:
        _, complaint = self._process.communicate()
        if self._process.returncode:
            words = printable(complaint.decode("utf-8", "replace").strip())
            raise SandboxError(f"ssh-keygen could not make a key: {words or 'no reason given'}.")
        try:
            with open(self.files.public_key, encoding="ascii") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SandboxError(f"The new SSH key cannot be read: {reason(error)}.") from None


def ssh_config_text(settings: Settings, files: SshFiles, job_id: str, user: str) -> str:
    """The config for `ssh -F`: one host, its own key and known hosts, and this file as the way there."""
    stream = own_command(
        "gateway-stream", "--host", settings.gateway_host, "--port", str(settings.gateway_port)
    )
    if settings.ca_file:
        stream += ["--ca-file", settings.ca_file]
    stream += [f"{job_id}--22"]
    lines = [
        f"# SSH to one sandbox. Written by {PROGRAM}; `stop` removes it.",
        f"Host {files.host}",
        f"    HostName {files.host}",
        f"    HostKeyAlias {files.host}",
        f"    User {user}",
        f"    IdentityFile {ssh_quoted(files.key)}",
        "    IdentitiesOnly yes",
        "    PreferredAuthentications publickey",
        f"    UserKnownHostsFile {ssh_quoted(files.known_hosts)}",
        "    GlobalKnownHostsFile /dev/null",
        "    StrictHostKeyChecking accept-new",
        "    UpdateHostKeys no",
        "    LogLevel ERROR",
        "    ConnectTimeout 30",
        "    ServerAliveInterval 15",
        "    ServerAliveCountMax 4",
        f"    Ciphers {SSH_CIPHERS}",
        *_shared_connection(files),
        f"    ProxyCommand {shell_words(stream).replace('%', '%%')}",
    ]
    if any(mark in line for line in lines for mark in "\n\r\0"):  # what follows it would be an option
        raise SandboxError(
            "An SSH config cannot be written, as a path or the job id in it holds a line break.",
            hint="Move PLATO_HOME, this file or Python to a path without one.",
        )
    return "\n".join(lines) + "\n"


def _shared_connection(files: SshFiles) -> list[str]:
    """The lines that make later connections use the first one, which stays open for a while."""
    if len(os.fsencode(files.socket)) > SOCKET_PATH_BYTES:
        return []
    return [
        "    ControlMaster auto",
        f"    ControlPath {ssh_quoted(files.socket)}",
        f"    ControlPersist {SSH_KEPT_SECONDS}",
    ]


def ssh_quoted(path: str) -> str:
    """A path as a value of ssh_config; SandboxError for one that its syntax cannot carry."""
    if any(mark in path for mark in ('"', "\n", "\\", "${")) or not _is_unicode(path):
        raise SandboxError(
            f"The path {shown_path(path)} holds a character that an SSH config cannot carry.",
            hint="Set PLATO_HOME to a directory with a simpler name.",
        )
    return '"' + path.replace("%", "%%") + '"'


def _is_unicode(path: str) -> bool:
    """Whether the bytes of a file name are text; Python keeps others as surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in path)


def write_ssh_config(settings: Settings, files: SshFiles, job_id: str, user: str) -> None:
    try:
        write_whole(files.config, ssh_config_text(settings, files, job_id, user))
    except OSError as error:
        raise SandboxError(f"{shown_path(files.config)} cannot be written: {reason(error)}.") from None


def repair_ssh_config(state: Mapping[str, Any], settings: Settings, reporter: Reporter) -> None:
    """Write an SSH config of ours anew when this file, its interpreter or the gateway has moved."""
    path, job_id = state.get("ssh_config_path"), state.get("job_id")
    if not path or not job_id or not state.get("session_id"):
        return
    files = SshFiles(settings.home, state["session_id"])
    if path != files.config:
        return  # another client's
    try:
        with open(path, encoding="utf-8") as file:
            written = file.read()
    except (OSError, UnicodeDecodeError):
        return
    user = re.search(r"^    User (\w+)$", written, re.MULTILINE)
    proxy = re.search(r"^    ProxyCommand .*gateway-stream .*$", written, re.MULTILINE)
    if user is None or proxy is None or not written.startswith(f"# SSH to one sandbox. Written by {PROGRAM}"):
        return
    if not _proxy_runs(proxy[0], settings):
        write_ssh_config(settings, files, job_id, user[1])
        reporter.note(f"{shown_path(path)} was written anew, as this file, Python or the gateway has moved.")


def _proxy_runs(line: str, settings: Settings) -> bool:
    """Whether what a ProxyCommand line names (see `ssh_config_text`) is still where it was."""
    import shlex

    try:
        words = shlex.split(line.replace("%%", "%"))[1:]
    except ValueError:  # edited by hand
        return False
    gateway = ["--host", settings.gateway_host, "--port", str(settings.gateway_port)]
    at = words.index(_RUN_FILE) if _RUN_FILE in words else 0
    runs = {*words[1:at]} - {"-B"} == {"-I", "-S", "-c"} and words[at + 3 : at + 7] == gateway
    return runs and os.access(words[0], os.X_OK) and os.path.isfile(words[at + 1])


def ssh_command(state: Mapping[str, Any], *, shown: bool) -> str | None:
    """The command that opens a shell on the VM; with `shown`, for people: the home directory as ~."""
    config, host = state.get("ssh_config_path"), state.get("ssh_host")
    if not config or not host:
        return None
    short = shown_path(config)
    if shown and short.startswith("~/") and shell_words([short[2:]]) == short[2:]:
        return f"ssh -F {short} {shell_words([host])}"
    return shell_words(["ssh", "-F", config, host])


def gateway_stream(host: str, port: int, target: str, ca_file: str | None) -> None:
    """Join standard input and output to a port of a VM, through TLS to the gateway.

    target: `<job id>--<port>`; with the gateway's name behind it, it is the TLS server name.
    ca_file: certificates to verify it with instead of the system's.
    """
    deadline = time.monotonic() + REQUEST_SECONDS
    silent = _speak_through_ssh()
    try:
        stream = secure(connect(host, port, deadline), f"{target}.{host}", deadline, ca_file)
    except NetworkError as error:
        error.hint = error.hint or f"If the VM has ended, `{PROGRAM} status` in its directory says so."
        raise
    if silent:
        point_at_nothing(2)  # this may outlive the terminal
    try:
        _relay(stream, 0, 1)
    except OSError:
        return  # either side hung up, which is how these connections end
    finally:
        stream.close()


def _speak_through_ssh() -> bool:
    """Use the standard error of ssh, the parent, where it took this process's away; whether that was so.

    It does where the connection is kept for later ones, and why there is none would never be seen.
    """
    try:
        if not os.path.samestat(os.fstat(2), os.stat(os.devnull)):
            return False
        path = f"/proc/{os.getppid()}/fd/2" if os.path.isdir("/proc/self/fd") else "/dev/tty"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    os.dup2(handle, 2)
    os.close(handle)
    return True


def _relay(stream: ssl.SSLSocket, source: int, sink: int) -> None:
    """Copy both ways until the VM's side ends. One thread: an SSL object must not be used by two."""
    import select
    import ssl

    stream.setblocking(False)
    outgoing = b""
    reading = True
    while True:
        sources: list[Any] = [stream, source] if reading and not outgoing else [stream]
        patience = 0 if stream.pending() else None
        readable, _, _ = select.select(sources, [stream] if outgoing else [], [], patience)
        if source in readable:
            outgoing = os.read(source, 65536)
            if not outgoing:
                reading = False
                _say_goodbye(stream)
        if outgoing:
            try:
                outgoing = outgoing[stream.send(outgoing) :]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
        if stream in readable or stream.pending():
            try:
                data = stream.recv(65536)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            if not data:
                return
            _write_all(sink, data)


def _say_goodbye(stream: ssl.SSLSocket) -> None:
    """Tell the gateway that nothing more comes, and go on reading what it still has."""
    try:
        stream.unwrap()
    except (OSError, ValueError):
        pass


def _write_all(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]


# Runs on the VM: reads a length and so many bytes of a script, runs it, tells how it ended; again and again.
# What a script prints stands between two lines with a word that nothing else holds, whatever a login shell
# prints before. A script whose exit code is 64 or more may have left input unread, so it is the last one.
_SHELL_LOOP = r"""
printf '\n%s\n' WORD
while IFS= read -r n; do
  c=$(head -c "$n"); printf '\n%s\n' WORD
  { e=$( { eval "$c"; } 2>&1 1>&3 3>&- ); r=$?; } 3>&1
  printf '\n%s %s %s\n' WORD "$r" "$(printf %s "$e" | tail -c 4000 | base64 | tr -d '\n')"
  [ "$r" -lt 64 ] || exit 0
done
"""


def trusted_ssh_config(state: Mapping[str, Any], settings: Settings) -> str:
    """The SSH config of a sandbox; SandboxError for one that lies where no client writes them.

    Such a file can name commands to run here, and the record may have come with somebody's repository.
    """
    path = os.path.normpath(os.path.expanduser(str(state["ssh_config_path"])))
    if os.path.dirname(path) not in (settings.home, os.path.abspath(os.path.expanduser("~/.plato"))):
        raise SandboxError(
            f"{STATE_FILE} names {shown_path(path)} as its SSH config, which is not in"
            f" {shown_path(settings.home)}, so it was not used.",
            hint="Set PLATO_HOME to where it is if it is yours; start the sandbox anew if not.",
        )
    return path


class SshShell:
    """A shell on the VM that runs scripts one after another over one SSH connection."""

    def __init__(self, state: Mapping[str, Any], settings: Settings, reporter: Reporter) -> None:
        import secrets
        import subprocess

        word = secrets.token_hex(16)
        self._word = word.encode()
        loop = shell_words(["exec", "sh", "-c", _SHELL_LOOP.replace("WORD", word)])
        command = [
            "ssh",
            *("-T", "-F", trusted_ssh_config(state, settings), "-o", "BatchMode=yes"),
            *("-c", SSH_CIPHERS),
            state["ssh_host"],
            loop,
        ]
        pipe = subprocess.PIPE
        # In a session of its own, so that a Ctrl-C in the terminal is ours to handle.
        self._process = launch(
            command, reporter, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        complaints: Any = self._process.stderr
        self._complaint = Aside(complaints.read)
        self._buffer = bytearray()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for the VM's first word. NetworkError or TimedOutError when it does not come."""
        if self._word:
            self._read_through(b"\n" + self._word + b"\n", time.monotonic() + seconds)

    def run(self, script: str, *, seconds: float, data: Iterable[bytes] = ()) -> Outcome:
        """Run a script with `data` as its standard input, of which it must know the end.

        seconds: the longest wait for its end once it has its input. NetworkError when the connection breaks.
        """
        import binascii

        body = script.encode()
        whole = self._write(b"%d\n" % len(body) + body)
        for piece in data:
            if not whole or self._has_answered():
                break
            whole = self._write(piece)
        deadline = time.monotonic() + seconds
        self._read_through(b"\n" + self._word + b"\n", deadline)
        stdout = self._read_through(b"\n" + self._word + b" ", deadline)
        code, _, words = self._read_through(b"\n", deadline).partition(b" ")
        try:
            return Outcome(int(code), stdout, binascii.a2b_base64(words))
        except ValueError:
            raise NetworkError("The VM's answer over SSH cannot be understood.", sent=True) from None

    def _write(self, data: bytes) -> bool:
        """Whether the other side still reads."""
        stdin: Any = self._process.stdin
        try:
            _write_all(stdin.fileno(), data)
        except BrokenPipeError:
            return False
        return True

    def _has_answered(self) -> bool:
        """Whether a script has ended before it had all of its input: it failed."""
        import select

        stdout: Any = self._process.stdout
        ready = select.select([stdout], [], [], 0)[0]
        if ready and len(self._buffer) < 1000:
            self._buffer += os.read(stdout.fileno(), 65536)
        return self._buffer.count(self._word) > 1

    def _read_through(self, mark: bytes, deadline: float) -> bytes:
        """What comes before a mark; both are taken away."""
        import select

        stdout: Any = self._process.stdout
        searched = 0
        while True:
            found = self._buffer.find(mark, searched)
            if found >= 0:
                taken = bytes(self._buffer[:found])
                del self._buffer[: found + len(mark)]
                return taken
            searched = max(0, len(self._buffer) - len(mark))
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise TimedOutError(
                    "The VM did not answer over SSH in time.", hint=f"See what it is doing: {PROGRAM} status"
                )
            data = os.read(stdout.fileno(), 1 << 18)
            if not data:
                raise self._broken()
            self._buffer += data

    def _broken(self) -> NetworkError:
        self._process.wait()
        lines = self._complaint.result().decode("utf-8", "replace").strip().splitlines()
        hint = f"Run the command again; see what the VM is doing: {PROGRAM} status"
        for line, after in zip(lines, [*lines[1:], ""]):
            if line.startswith("Error: "):  # of the gateway stream, which knows more than ssh does
                lines, hint = [line[len("Error: ") :]], after or hint
                break
        words = f": {printable(lines[-1]).rstrip('.')}" if lines else ""
        return NetworkError(f"The SSH connection to the VM broke{words}.", hint=hint, sent=True)

    def end(self) -> None:
        """End the connection, at once; whoever still reads from it is told that it broke."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the connection, and forget it."""
        self.end()
        self._complaint.result()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # what was still to be written has nowhere to go


# ----------------------------------------------------------------------------------------------------------
# heartbeat: the child that keeps a VM alive; its record, its start, its end, its health
# ----------------------------------------------------------------------------------------------------------


class HeartbeatRecord:
    """heartbeat_<id>.log: one line of JSON with the present truth, then the last events, one a line.

    The child holds the kernel's lock on the file as long as it lives: the lock says whether it is alive.
    The keys of the first line: session_id, pid, start_mark, interval, beats, last_ok and last_error_at
    (seconds since 1970), last_error, failures (in a row), ended (why, once it has).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.truth: dict[str, Any] = {}
        self.events: list[str] = []
        self._handle = -1

    def take(self) -> bool:
        """Create the file if needed and take its lock; False when another heartbeat has it."""
        import fcntl

        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        for _ in range(100):  # a command that only looks holds a shared lock for a moment
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.02)
        return False

    def is_ours(self) -> bool:
        """Whether the file at the path is still the one that was taken."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            return False

    def write(self, event: str | None = None, **truth: Any) -> None:
        import json

        self.truth.update(truth)
        if event:
            self.events = [*self.events[-BEAT_LOG_EVENTS + 1 :], f"{utc_text(time.time())} {event[:300]}"]
        data = ("\n".join([json.dumps(self.truth), *self.events]) + "\n").encode("utf-8", "replace")
        try:
            os.pwrite(self._handle, data, 0)
            os.ftruncate(self._handle, len(data))
        except OSError:
            pass  # a full disk must not end the heartbeat

    @classmethod
    def read(cls, path: str) -> dict[str, Any]:
        """The truth that a child wrote last, or {} when there is none to read."""
        import json

        for _ in range(3):  # a reader may meet a write halfway
            try:
                with open(path, encoding="utf-8") as file:
                    truth = as_dict(json.loads(file.readline(65536)))
                return {key: value for key, value in truth.items() if cls._makes_sense(key, value)}
            except OSError:
                return {}
            except (ValueError, RecursionError):
                time.sleep(0.02)
        return {}

    @staticmethod
    def _makes_sense(key: str, value: Any) -> bool:
        if key in ("session_id", "start_mark", "last_error", "ended"):
            return isinstance(value, str)
        return type(value) in ((int,) if key == "pid" else (int, float)) and 0 <= value < 1e10


def heartbeat_path(home: str, session_id: str) -> str:
    return os.path.join(home, f"heartbeat_{short_id(session_id)}.log")


def heartbeat_alive(path: str) -> bool:
    """Whether a heartbeat holds the lock on its record."""
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def utc_text(seconds: float) -> str:
    """A time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


class BeatOutcome:
    """What one beat came to: good; gone (the VM ended), and what was said, for the record."""

    def __init__(
        self, good: bool, gone: bool = False, words: str = "", retry_after: float | None = None
    ) -> None:
        self.good = good
        self.gone = gone
        self.words = words
        self.retry_after = retry_after


def judge_beat(answer: Mapping[str, Any], job_id: str | None) -> BeatOutcome:
    """What a heartbeat's answer means (api notes on `heartbeat`).

    Errors that name `vm_heartbeat_message` only say that the worker is not started yet; one that names
    `registry_heartbeat_update` says that the VM's own record was not updated, which is what keeps it alive.
    """
    job = job_of(answer, job_id)
    errors = [str(error) for error in as_list(job.get("errors"))]
    serious = [error for error in errors if "vm_heartbeat_message" not in error]
    words = printable("; ".join(serious))[:200]
    if job.get("gone") is True:
        return BeatOutcome(False, True, words or "the VM is gone")
    if not serious and (errors or answer.get("success") is True):
        return BeatOutcome(True)
    return BeatOutcome(False, words=words or "Plato did not accept the heartbeat")


def try_beat(api: PlatoApi, session_id: str, job_id: str | None) -> BeatOutcome:
    """Send one heartbeat; whatever goes wrong is an outcome, never an error."""
    try:
        return judge_beat(api.heartbeat(session_id), job_id)
    except ApiError as error:
        return BeatOutcome(False, error.status in (404, 410), error.message, error.retry_after)
    except SandboxError as error:
        return BeatOutcome(False, words=error.message)
    finally:
        api.transport.close()


def next_beat_delay(
    interval: float, failures: int, elapsed: float, retry_after: float | None, silence: float
) -> float:
    """Seconds from now to the next beat: the rest of the interval, or a retry that comes no later than it.

    silence: seconds since the last good beat. Retries stay dense while the VM may live, so that an API which
    answers for 15 seconds in any 120 is met; after that, the interval is enough.
    """
    regular = max(0.0, interval - elapsed)
    if not failures or (failures > len(BEAT_RETRY_SECONDS) and silence > BEAT_URGENT_SECONDS):
        return regular
    retry = BEAT_RETRY_SECONDS[min(failures, len(BEAT_RETRY_SECONDS)) - 1]
    return min(regular, max(retry, min(retry_after or 0.0, BEAT_RETRY_AFTER_SECONDS)))


class Heartbeat:
    """The child's loop. Ends when the VM is gone (looked at twice), when .sandbox.yaml no longer names its
    session, when its record is taken away, or after an hour without one good beat."""

    def __init__(self, task: Mapping[str, Any], record: HeartbeatRecord) -> None:
        settings = Settings(api_key=task["api_key"], base_url=task["base_url"], ca_file=task.get("ca_file"))
        self.api = PlatoApi(settings, Reporter())
        self.session_id: str = task["session_id"]
        self.job_id: str | None = task["job_id"]
        self.directory: str = task["directory"]
        self.interval: float = task["interval"]
        self.record = record
        self.failures = 0
        self.gone_before = False
        self.last_ok = time.time()
        self.retry_after: float | None = None
        self._seen: object = None

    def run(self) -> str:
        """Beat until there is a reason to end; returns that reason."""
        self.record.write("started")
        while True:
            began = time.time()
            ending = self.reason_to_end() or self.beat()
            if ending:
                self.record.write(f"ended: {ending}", ended=ending)
                return ending
            now = time.time()
            elapsed, silence = max(0.0, now - began), now - self.last_ok
            wait_until(
                now + next_beat_delay(self.interval, self.failures, elapsed, self.retry_after, silence)
            )

    def beat(self) -> str | None:
        """One beat and its place in the record; returns why the heartbeat must end, or None."""
        outcome = try_beat(self.api, self.session_id, self.job_id)
        now = time.time()
        self.retry_after = outcome.retry_after
        if outcome.good:
            event = f"good again after {self.failures} failed beats" if self.failures else None
            self.failures, self.gone_before, self.last_ok = 0, False, now
            beats = self.record.truth.get("beats", 0) + 1
            self.record.write(event, last_ok=now, failures=0, beats=beats)
            return None
        self.failures += 1
        first = self.failures == 1 or outcome.gone
        event = f"failed: {outcome.words}" if first else None
        self.record.write(event, last_error=outcome.words, last_error_at=now, failures=self.failures)
        if outcome.gone and self.gone_before:
            return "the VM is gone"
        self.gone_before = outcome.gone
        if now - self.last_ok > BEAT_SILENCE_LIMIT_SECONDS:
            return "no good beat for an hour"
        return None

    def reason_to_end(self) -> str | None:
        """Why this heartbeat is no longer wanted, or None. A file that cannot be read is no reason."""
        if not self.record.is_ours():
            return "its record was taken away"
        try:
            status = os.stat(state_path(self.directory))
        except (FileNotFoundError, NotADirectoryError):
            return f"{STATE_FILE} was removed"
        except OSError:
            return None
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen == self._seen:
            return None
        try:
            state = load_state(self.directory)
        except SandboxError:
            return None
        self._seen = seen
        if state is None or state.get("session_id") != self.session_id:
            return f"{STATE_FILE} names another sandbox"
        return None


def wait_until(moment: float) -> None:
    """Sleep until a time of the wall clock; a computer that slept meanwhile wakes this at once.

    The monotonic clock stands still while a computer sleeps, so a long wait is cut into slices.
    """
    started, mark = time.time(), time.monotonic()
    total = moment - started
    while True:
        now = time.time()
        left = min(moment - now, total - (time.monotonic() - mark))
        if left <= 0:
            return
        time.sleep(min(left, WAKE_SECONDS))


def heartbeat_child() -> int:
    """The hidden command: read the task from standard input, report on standard output, then beat."""
    import json

    task = json.loads(sys.stdin.buffer.read())
    record = HeartbeatRecord(task["record"])
    try:
        taken = record.take()
    except OSError as error:
        print(f"error {reason(error)}", flush=True)
        return 1
    pid = os.getpid()
    if taken:
        record.truth = {"session_id": task["session_id"], "pid": pid, "start_mark": process_start_mark(pid)}
        record.write(interval=task["interval"], started=time.time(), failures=0, beats=0)
    print("ready" if taken else "busy", flush=True)
    point_at_nothing(0, 1, 2)  # so that no pipe or terminal is held open
    if taken:
        Heartbeat(task, record).run()
    return 0


def spawn_heartbeat(settings: Settings, state: Mapping[str, Any], directory: str, reporter: Reporter) -> int:
    """Start the heartbeat of a sandbox and return its pid, once it holds its lock. The key goes by a pipe."""
    import json
    import subprocess

    task = {
        "api_key": settings.require_key(),
        "base_url": settings.base_url,
        "session_id": state["session_id"],
        "job_id": state.get("job_id"),
        "directory": directory,
        "interval": settings.heartbeat_seconds,
        "record": heartbeat_path(settings.home, state["session_id"]),
        "ca_file": settings.ca_file,
    }
    environment = child_environment(os.environ)
    if environment.get("SSL_CERT_DIR"):  # the child's working directory is another one
        environment["SSL_CERT_DIR"] = os.path.abspath(environment["SSL_CERT_DIR"])
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    options = {"stdin": pipe, "stdout": pipe, "stderr": quiet, "env": environment, "cwd": "/"}
    child = launch(own_command("heartbeat-child"), reporter, start_new_session=True, **options)
    said = _tell_and_hear(child, json.dumps(task).encode())
    word, _, detail = said.decode("utf-8", "replace").strip().partition(" ")
    holder = HeartbeatRecord.read(str(task["record"])) if word == "busy" else {}
    if word == "busy" and holder.get("session_id") == state["session_id"]:
        return int(holder.get("pid") or 0)
    if word == "busy":
        detail = f"that of another sandbox uses {shown_path(str(task['record']))}"
    if word != "ready":
        raise SandboxError(
            f"The heartbeat could not be started: {printable(detail) or 'it ended at once'}.",
            hint=f"Check that {shown_path(settings.home)} is writable.",
        )
    child.returncode = 0  # it lives on by itself: nobody waits for it
    return child.pid


def _tell_and_hear(child: subprocess.Popen[bytes], task: bytes) -> bytes:
    """Give the child its task and return its first word; it is ended if it does not say one."""
    import select

    stdin, stdout = child.stdin, child.stdout
    if stdin is None or stdout is None:
        raise TypeError("both streams of the child must be pipes")
    said = b"error it did not start in time"
    try:
        try:
            with stdin:
                stdin.write(task)
        except BrokenPipeError:
            pass  # it ended at once: its silence says so
        with stdout:
            if select.select([stdout], [], [], HEARTBEAT_START_SECONDS)[0]:
                said = os.read(stdout.fileno(), 4096)
        return said
    finally:
        if not said.startswith(b"ready"):  # also when a signal came: nobody would know of it
            child.kill()
            child.wait()


def heartbeat_health(settings: Settings, state: Mapping[str, Any], now: float) -> dict[str, Any]:
    """What is known of a sandbox's heartbeat, for `status`.

    state: ok, degraded (alive, but the last good beat is long ago), dead, or expired (ended with the VM);
    pid; last_ok and last_error_at as ISO 8601 or None; last_error; failures in a row.
    """
    path = heartbeat_path(settings.home, state.get("session_id") or "")
    truth = HeartbeatRecord.read(path)
    pid = truth.get("pid") or state.get("heartbeat_pid")
    last_ok, failed_at = truth.get("last_ok"), truth.get("last_error_at")
    if heartbeat_alive(path):
        limit = UNHEALTHY_BEATS * truth.get("interval", settings.heartbeat_seconds) + BEAT_SECONDS
        fresh = now - (last_ok or truth.get("started") or 0) <= limit
        word = "ok" if fresh else "degraded"
    elif not truth and other_heartbeat_alive(state):
        word = "ok"
    else:
        word = "expired" if truth.get("ended") == "the VM is gone" else "dead"
    return {
        "state": word,
        "pid": pid,
        "last_ok": utc_text(last_ok) if last_ok else None,
        "last_error": truth.get("last_error") if truth.get("failures") or word != "ok" else None,
        "last_error_at": utc_text(failed_at) if failed_at else None,
        "failures": truth.get("failures", 0),
        "ended": truth.get("ended"),
    }


def ensure_heartbeat(
    settings: Settings, state: Mapping[str, Any], directory: str, reporter: Reporter
) -> int | None:
    """Start a heartbeat that has died anew and return its pid; warn of one that is not well. Else None."""
    health = heartbeat_health(settings, state, time.time())
    if health["state"] == "degraded":
        why = f": {health['last_error']}" if health["last_error"] else ""
        reporter.warn(f"The heartbeat has had no good beat since {health['last_ok'] or 'its start'}{why}.")
    if health["state"] != "dead":
        return None
    make_home(settings.home)
    pid = spawn_heartbeat(settings, state, directory, reporter)
    reporter.warn(f"The heartbeat was not running; it was started again (PID {pid}).")
    return pid


def other_heartbeat_alive(state: Mapping[str, Any]) -> bool:
    """Whether the process that another client's state names is a heartbeat of this very session."""
    pid, session_id = state.get("heartbeat_pid"), state.get("session_id")
    if not isinstance(pid, int) or not session_id:
        return False
    command = process_command(pid)
    return session_id in command and "heartbeat" in command and process_start_mark(pid) is not None


def stop_heartbeat(settings: Settings, state: Mapping[str, Any]) -> bool:
    """End the heartbeat of a sandbox, ours or another client's; True when none is left.

    No signal goes to a process that is not provably the heartbeat: it holds the lock and is the process
    that its record describes, or its command line names this session.
    """
    import signal

    path = heartbeat_path(settings.home, state["session_id"])
    if not heartbeat_alive(path):
        pid = state.get("heartbeat_pid")
        if other_heartbeat_alive(state) and isinstance(pid, int):
            signal_process(pid, lambda: other_heartbeat_alive(state), signal.SIGTERM)
        return True
    truth = HeartbeatRecord.read(path)
    pid, mark = truth.get("pid"), truth.get("start_mark")
    if isinstance(pid, int) and mark:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal_process(pid, lambda: heartbeat_alive(path) and process_start_mark(pid) == mark, number)
            if _ended_within(path, pid, 3.0):
                return True
    return not heartbeat_alive(path)


def _ended_within(path: str, pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while heartbeat_alive(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    try:
        os.waitpid(pid, os.WNOHANG)  # where this very process started it
    except ChildProcessError:
        pass
    return True


# ----------------------------------------------------------------------------------------------------------
# sync: ignore rules, scan, plan, archive, and the two ways to the VM
# ----------------------------------------------------------------------------------------------------------
# One look at the VM brings what is there and the manifest of the last sync. The plan is a pure function of
# that and of the local tree; what differs travels in one archive. On the VM the archive is unpacked beside
# the tree and checked before anything in the tree is touched; then it is moved in by links and renames, under
# a lock and only if no other sync came between.
# Paths inside the trees are bytes, relative, without a leading "./"; no path of a tree is ever part of a
# command: they travel as NUL-terminated fields inside the archive.

SYNC_ROOT = "/home/plato/worktree"
SYNC_SECONDS = 120.0
PATIENCE_SHARE = 0.5  # of a command's seconds the VM waits for another sync: it must be able to say so
SYNC_TRIES = 4  # a plan that another sync overtakes, or a file that changes while it is read
SYNC_STATE = ".plato-sync"  # beside the target: lock, manifests, and what is on its way in
SYNC_CONNECTIONS = 8  # for parts; sshd starts to turn connections away when it has ten to let in
SSH_ANSWER_SECONDS = 20.0
COMMAND_BYTES = 131_071  # Linux takes no longer argument, and the API's `execute` hands a command on as one
BLOCK_BYTES = 256 * 1024
FRAME_BYTES = 1024 * 1024
PROBE_BYTES = 512 * 1024  # what a connection has to take before its speed says anything
GZIP_LEVEL = 3
SAMPLED_BYTES = 4096  # files from this size on are looked at for whether compression gains anything
PRIVATE_KEY_BYTES = 64 * 1024
EMPTIED_FILES = 10  # fewer removals than this are never taken for an emptied tree
WATCH_QUIET_SECONDS = 0.3
WATCH_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)

EXCLUDED_DIRECTORIES = (
    *(b"__pycache__", b".git", b".venv", b"venv", b"node_modules"),
    *(b".pytest_cache", b".mypy_cache"),
)
EXCLUDED_PATTERNS = (
    *EXCLUDED_DIRECTORIES,
    *(b"*.pyc", b".sandbox.yaml", b"*.egg-info", b".DS_Store", b"*.swp", b"*.swo"),
)
NEVER_SENT = re.compile(rb"\.git|\.sandbox\.yaml.*|\.plato|\.plato-sync(?:\.new)?", re.DOTALL)
PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
REFUSED_TARGETS = (
    *("/", "/home", "/home/plato", "/root", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64"),
    *("/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var"),  # noqa: S108
)


# Ignore rules: git's syntax and semantics (gitignore(5), and git's wildmatch where that is silent)


class IgnoreRules:
    """The patterns of one ignore file. The last one that matches decides."""

    def __init__(self, text: bytes) -> None:
        lines = list(_ignore_lines(text))
        self._rules = [rule for rule in map(_ignore_rule, lines) if rule is not None]
        self._taken_back = [line[1:].rstrip(b"/").rpartition(b"/")[2] for line in lines if line[:1] == b"!"]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def takes_back(self, name: bytes) -> bool:
        """Whether a directory of that name may be re-included somewhere."""
        rules = IgnoreRules(b"\n".join(b"/" + part for part in self._taken_back))
        return rules.decide(name, name, True) is True

    def decide(self, path: bytes, name: bytes, is_directory: bool) -> bool | None:
        """Whether a path is ignored; None when no pattern matches.

        path: relative to the file's directory; name: its last part.
        """
        by_name, by_path = self._directories if is_directory else self._files
        best = max(by_name(name), by_path(path))
        return None if best < 0 else not self._rules[best][0]

    @functools.cached_property
    def _files(self) -> tuple[Callable[[bytes], int], Callable[[bytes], int]]:
        return self._compiled(is_directory=False)

    @functools.cached_property
    def _directories(self) -> tuple[Callable[[bytes], int], Callable[[bytes], int]]:
        return self._compiled(is_directory=True)

    def _compiled(self, is_directory: bool) -> tuple[Callable[[bytes], int], Callable[[bytes], int]]:
        usable = [
            (number, by_name, pieces)
            for number, (_, directories_only, by_name, pieces) in enumerate(self._rules)
            if is_directory or not directories_only
        ]
        return (
            _last_match([(number, pieces) for number, by_name, pieces in usable if by_name]),
            _last_match([(number, pieces) for number, by_name, pieces in usable if not by_name]),
        )


def _ignore_lines(text: bytes) -> Iterator[bytes]:
    """The pattern of every line, its end and its unescaped trailing spaces cut off."""
    for line in text[3 if text.startswith(b"\xef\xbb\xbf") else 0 :].split(b"\n"):
        if line.startswith(b"#"):
            continue
        line = line[:-1] if line.endswith(b"\r") else line
        line = line.partition(b"\0")[0]
        kept = len(line.rstrip(b" "))
        backslashes = kept - len(line[:kept].rstrip(b"\\"))
        if backslashes % 2 and kept < len(line):
            kept += 1
        if kept:
            yield line[:kept]


def _ignore_rule(line: bytes) -> tuple[bool, bool, bool, list[bytes]] | None:
    """Re-includes, directories only, by name alone, pieces of its expression; None: it never matches."""
    negated = line.startswith(b"!")
    pattern = line[1:] if negated else line
    directories_only = pattern.endswith(b"/")
    pattern = pattern[:-1] if directories_only else pattern
    by_name = b"/" not in pattern
    if by_name:
        literal = b""
    else:
        pattern = pattern[1:] if pattern.startswith(b"/") else pattern
        # git compares the text before the first wildcard by itself, so what follows starts a pattern anew
        literal = re.split(rb"[*?\[\\]", pattern, maxsplit=1)[0]
    pieces = _glob_pieces(pattern[len(literal) :], pathname=not by_name) if pattern else None
    if pieces is None:
        return None
    return negated, directories_only, by_name, [re.escape(literal), *pieces]


_STAR = b"*"


def _glob_pieces(pattern: bytes, *, pathname: bool) -> list[bytes] | None:
    """A wildcard pattern as pieces of a regular expression, _STAR for itself; None: it matches nothing."""
    pieces: list[bytes] = []
    at = 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        if char == b"*":
            piece, at = _glob_stars(pattern, at, pathname)
        elif char == b"?":
            piece, at = b"[^/]", at + 1
        elif char == b"[":
            found = _glob_class(pattern, at + 1)
            if found is None:
                return None
            piece, at = found
        else:
            at += char == b"\\"
            if at == len(pattern):
                return None
            piece, at = re.escape(pattern[at : at + 1]), at + 1
        pieces.append(piece)
    return pieces


def _glob_stars(pattern: bytes, at: int, pathname: bool) -> tuple[bytes, int]:
    """The piece for the stars at an offset, and where it ends; `**` is special only as a whole path part."""
    end = at + len(pattern[at:]) - len(pattern[at:].lstrip(b"*"))
    starts_part = at == 0 or pattern[at - 1 : at] == b"/"
    if pathname and end - at > 1 and starts_part:
        if pattern[end : end + 1] == b"/":
            return b"(?:.*/)?", end + 1
        if end == len(pattern) or pattern[end : end + 2] == b"\\/":
            return b".*", end
    return _STAR, end


_GLOB_CLASSES = {
    b"alnum": rb"[0-9A-Za-z]",
    b"alpha": rb"[A-Za-z]",
    b"blank": rb"[ \t]",
    b"cntrl": rb"[\x00-\x1f\x7f]",
    b"digit": rb"[0-9]",
    b"graph": rb"[!-~]",
    b"lower": rb"[a-z]",
    b"print": rb"[ -~]",
    b"punct": rb"[!-/:-@\[-`{-~]",
    b"space": rb"[ \t\n\r]",
    b"upper": rb"[A-Z]",
    b"xdigit": rb"[0-9A-Fa-f]",
}


def _glob_class(pattern: bytes, at: int) -> tuple[bytes, int] | None:
    """The piece for a bracket expression whose inside starts at an offset; None when it is malformed."""
    negated = pattern[at : at + 1] in (b"!", b"^") and at < len(pattern)
    at += negated
    start, previous = at, -1
    members: set[int] = set()
    while at < len(pattern) and (pattern[at : at + 1] != b"]" or at == start):
        char = pattern[at]
        if pattern[at : at + 2] == b"[:":
            close = pattern.find(b"]", at + 2)
            if close < 0:
                return None
            if close > at + 2 and pattern[close - 1 : close] == b":":
                named = _GLOB_CLASSES.get(pattern[at + 2 : close - 1])
                if named is None:
                    return None
                members.update(code for code in range(1, 256) if re.match(named, bytes([code])))
                at, previous = close + 1, -1
                continue
        is_range = char == 0x2D and previous >= 0 and pattern[at + 1 : at + 2] not in (b"", b"]")
        at += is_range
        at += pattern[at : at + 1] == b"\\"
        if at >= len(pattern):
            return None
        members.update(range(previous if is_range else pattern[at], pattern[at] + 1))
        previous = -1 if is_range else pattern[at]
        at += 1
    if at >= len(pattern):
        return None
    chosen = (set(range(1, 256)) - members if negated else members) - {0x2F}
    piece = b"[" + b"".join(b"\\x%02x" % code for code in sorted(chosen)) + b"]" if chosen else b"(?!)"
    return piece, at + 1


def _last_match(rules: Sequence[tuple[int, list[bytes]]]) -> Callable[[bytes], int]:
    """One expression for numbered rules: a function that gives the number of the last one to match, or -1."""
    if not rules:
        return lambda text: -1
    alternatives: list[bytes] = []
    numbers: dict[int, int] = {}
    groups = 0
    for number, pieces in reversed(rules):
        numbers[groups + 1] = number
        expression, inner = _joined(pieces, groups + 1)
        alternatives.append(b"(" + expression + b")")
        groups += 1 + inner
    match = re.compile(b"(?:" + b"|".join(alternatives) + rb")\Z", re.DOTALL).match

    def last(text: bytes) -> int:
        found = match(text)
        return numbers[found.lastindex or 0] if found else -1

    return last


def _joined(pieces: Sequence[bytes], groups: int) -> tuple[bytes, int]:
    """Pieces as one expression, and how many groups it opens; `groups` are open before it.

    A star takes the first place where what stands before the next star fits, once and for all: the next
    star makes up for the rest. So the time stays in proportion, however many stars there are.
    """
    out: list[bytes] = []
    at = opened = 0
    while at < len(pieces):
        if pieces[at] != _STAR:
            out.append(pieces[at])
            at += 1
            continue
        end = next((index for index in range(at + 1, len(pieces)) if pieces[index] in _NOT_ONE), len(pieces))
        if end == len(pieces) or pieces[end] != _STAR:
            out.append(b"[^/]*")
            at += 1
            continue
        opened += 1
        name = b"g%d" % (groups + opened)
        out.append(b"(?=(?P<" + name + b">[^/]*?" + b"".join(pieces[at + 1 : end]) + b"))(?P=" + name + b")")
        at = end
    return b"".join(out), opened


_NOT_ONE = (_STAR, b"/", b".*", b"(?:.*/)?")  # the pieces that do not stand for one character of a name


class IgnoreTree:
    """The ignore rules of a tree: those of a directory win over those above it."""

    def __init__(self) -> None:
        built_in = IgnoreRules(b"\n".join(EXCLUDED_PATTERNS))
        self._chains: dict[bytes, tuple[tuple[int, IgnoreRules], ...]] = {b"": ((0, built_in),)}

    def add(self, directory: bytes, rules: IgnoreRules) -> None:
        """Take up an ignore file of a directory; a later one wins. Parents come before their children."""
        start = len(directory) + 1 if directory else 0
        self._chains[directory] = ((start, rules), *self._chain(directory))

    def _chain(self, directory: bytes) -> tuple[tuple[int, IgnoreRules], ...]:
        while directory not in self._chains:
            directory = directory.rpartition(b"/")[0]
        return self._chains[directory]

    def ignores(self, path: bytes, is_directory: bool) -> bool:
        """Whether a path stays out, given that the directories above it do not."""
        directory, _, name = path.rpartition(b"/")
        if NEVER_SENT.fullmatch(name):
            return True
        for start, rules in self._chain(directory):
            verdict = rules.decide(path[start:], name, is_directory)
            if verdict is not None:
                return verdict
        return False

    def takes_back(self, name: bytes) -> bool:
        """Whether some ignore file may re-include directories of a name."""
        return any(rules.takes_back(name) for chain in self._chains.values() for _, rules in chain)

    def ignores_at_all(self, path: bytes, is_directory: bool) -> bool:
        """Whether a path, or a directory above it, stays out."""
        ends = [index for index, code in enumerate(path) if code == 0x2F]
        return any(self.ignores(path[:end], True) for end in ends) or self.ignores(path, is_directory)


# The local tree


class Entry(bytes):
    """A file, a directory or a symbolic link, as either side knows it: one small object, as a tree may have
    hundreds of thousands. Equal ones are alike in everything.

    kind: "f", "d" or "l", on the VM also other letters of `find`; mode: permission bits; size in bytes and
    mtime in nanoseconds since 1970, of files; target of a link.
    """

    __slots__ = ()

    def __new__(cls, kind: str, mode: int, size: int = 0, mtime: int = 0, target: bytes = b"") -> Entry:  # noqa: PYI034
        return super().__new__(cls, b"%s %o %d %d %s" % (kind.encode(), mode, size, mtime, target))

    @property
    def kind(self) -> str:
        return chr(self[0])

    @property
    def mode(self) -> int:
        return int(self.split(b" ", 2)[1], 8)

    @property
    def size(self) -> int:
        return int(self.split(b" ", 3)[2])

    @property
    def mtime(self) -> int:
        return int(self.split(b" ", 4)[3])

    @property
    def target(self) -> bytes:
        return self.split(b" ", 4)[4]

    def same_as(self, other: Entry) -> bool:
        """Whether nothing needs to travel to make one the other."""
        return self == other or (self.kind == other.kind == "l" and self.target == other.target)


class LocalTree:
    """What there is to sync: entries by path; what cannot be read and what is left out, each with why; the
    SHA-256 of files where it was asked for."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.entries: dict[bytes, Entry] = {}
        self.unreadable: dict[bytes, str] = {}
        self.skipped: dict[bytes, str] = {}
        self.digests: dict[bytes, bytes] = {}
        self.ignore = IgnoreTree()

    def location(self, path: bytes) -> bytes:
        return os.path.join(self.root, path)

    def protects(self, path: bytes) -> bool:
        """Whether something local that was not looked at stands at a path or above it."""
        if not self.unreadable and not self.skipped:
            return False
        while path:
            if path in self.unreadable or path in self.skipped:
                return True
            path = path.rpartition(b"/")[0]
        return False

    def files(self, paths: Iterable[bytes] | None = None) -> int:
        """How many of all entries, or of those at some paths, are files or links."""
        entries = self.entries.values() if paths is None else map(self.entries.__getitem__, paths)
        return sum(entry.kind != "d" for entry in entries)

    def drop(self, path: bytes, why: str, *, unreadable: bool = False) -> None:
        """Leave a path out after all."""
        self.entries.pop(path, None)
        (self.unreadable if unreadable else self.skipped)[path] = why


def scan_tree(root: bytes, *, gitignore: bool) -> LocalTree:
    """Look at a directory; what the ignore rules exclude is never entered."""
    tree = LocalTree(root)
    names = (b".gitignore", b".platoignore") if gitignore else (b".platoignore",)
    waiting = [b""]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(tree.location(directory) or b".") as listing:
                found = list(listing)
        except OSError as error:
            tree.drop(directory, reason(error), unreadable=True)
            continue
        here = {entry.name for entry in found}
        for name in names:
            if name in here:
                _read_ignore_file(tree, directory, name)
        prefix = directory + b"/" if directory else b""
        for entry in found:
            path = prefix + entry.name
            is_directory = entry.is_dir(follow_symlinks=False)
            if not tree.ignore.ignores(path, is_directory) and _take(tree, path, entry):
                waiting.append(path)
    return tree


def _read_ignore_file(tree: LocalTree, directory: bytes, name: bytes) -> None:
    path = os.path.join(directory, name)
    try:
        with open(tree.location(path), "rb") as file:
            rules = IgnoreRules(file.read())
    except OSError as error:
        if not os.path.isdir(tree.location(path)):
            tree.unreadable[path] = reason(error)
        return
    if rules:
        tree.ignore.add(directory, rules)


def _take(tree: LocalTree, path: bytes, found: os.DirEntry[bytes]) -> bool:
    """Note what a directory holds; True for a directory to go into."""
    import stat

    try:
        status = found.stat(follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        target = os.readlink(tree.location(path)) if kind == stat.S_IFLNK else b""
    except FileNotFoundError:
        return False  # gone since the directory was listed
    except OSError as error:
        tree.drop(path, reason(error), unreadable=True)
        return False
    mode = stat.S_IMODE(status.st_mode)
    if kind == stat.S_IFREG:
        tree.entries[path] = Entry("f", mode, status.st_size, status.st_mtime_ns)
    elif kind == stat.S_IFDIR:
        tree.entries[path] = Entry("d", mode)
        return True
    elif kind == stat.S_IFLNK and link_leaves(path, target):
        tree.drop(path, "a symbolic link that leads out of the tree")
    elif kind == stat.S_IFLNK:
        tree.entries[path] = Entry("l", 0o777, mtime=status.st_mtime_ns, target=target)
    else:
        tree.drop(path, "not a file, a directory or a symbolic link")
    return False


def link_leaves(path: bytes, target: bytes) -> bool:
    """Whether a symbolic link leads out of the tree that it stands in."""
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return target.startswith(b"/") or inside == b".." or inside.startswith(b"../")


def scan_file(path: bytes) -> LocalTree:
    """A single file as a tree of its own; the ignore rules have no say in what was named."""
    directory, name = os.path.split(path)
    tree = LocalTree(directory)
    if NEVER_SENT.fullmatch(name):
        raise UsageError(f"{shown_path(os.fsdecode(path))} never leaves this machine.")
    with os.scandir(directory or b".") as listing:
        for entry in listing:
            if entry.name == name:
                _take(tree, name, entry)
    return tree


def check_before_sending(tree: LocalTree, remote: RemoteTree, paths: Iterable[bytes]) -> None:
    """Take out of a tree what turns out to be a private key, or cannot be read, or is gone."""
    for path in paths:
        entry = tree.entries[path]
        if entry.kind != "f":
            continue
        why, unreadable = _why_not_sent(tree.location(path), entry)
        if why:
            remote.hold(path)
            tree.drop(path, why, unreadable=unreadable)


def _why_not_sent(location: bytes, entry: Entry) -> tuple[str, bool]:
    """Why a file stays out, "" if it does not; and whether that is because it cannot be read."""
    try:
        handle = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if entry.size < PRIVATE_KEY_BYTES and PRIVATE_KEY.match(os.read(handle, 100)):
                return "a private key", False
        finally:
            os.close(handle)
    except FileNotFoundError:
        return "it vanished", False
    except OSError as error:
        return reason(error), True
    return "", False


def add_digests(tree: LocalTree, remote: RemoteTree) -> None:
    """SHA-256 of every local file that could be the one on the VM."""
    import hashlib

    for path in remote.digests:
        entry, theirs = tree.entries.get(path), remote.entries.get(path)
        if entry is None or theirs is None or entry.kind != "f" or theirs.size != entry.size:
            continue
        digest = hashlib.sha256()
        try:
            with open(tree.location(path), "rb") as file:
                for block in iter(lambda: file.read(BLOCK_BYTES), b""):
                    digest.update(block)
        except OSError:
            continue  # said when it is to be sent
        tree.digests[path] = digest.digest()


# The tree on the VM


class Overlay:
    """A mapping by path that is nearly another one, `base`: only what is different takes memory.

    view: what a value of the base means here. The base must not change where the two agree.
    """

    def __init__(
        self, base: Mapping[bytes, Any] | None = None, view: Callable[[Any], Any] = lambda value: value
    ) -> None:
        self.base: Mapping[bytes, Any] = {} if base is None else base
        self.view = view
        self.own: dict[bytes, Any] = {}
        self.gone: set[bytes] = set()  # paths of the base that are not here, or with a value of our own

    def fill(self, items: Iterable[tuple[bytes, Any]]) -> None:
        """Take these items and nothing else."""
        unseen = set(self.base)
        for path, value in items:
            if path in unseen and self.view(self.base[path]) == value:
                unseen.discard(path)
            else:
                self.own[path] = value
        self.gone = set(unseen) if 4 * len(unseen) < len(self.base) else unseen  # a set never shrinks

    def get(self, path: bytes) -> Any:
        """The value at a path, or None."""
        if path in self.own:
            return self.own[path]
        return self.view(self.base[path]) if path in self.base and path not in self.gone else None

    def __getitem__(self, path: bytes) -> Any:
        if path not in self:
            raise KeyError(path)
        return self.get(path)

    def __setitem__(self, path: bytes, value: Any) -> None:
        self.discard(path)
        self.own[path] = value

    def discard(self, path: bytes) -> None:
        self.own.pop(path, None)
        if path in self.base:
            self.gone.add(path)

    def __contains__(self, path: bytes) -> bool:
        return path in self.own or (path in self.base and path not in self.gone)

    def __iter__(self) -> Iterator[bytes]:
        yield from self.own
        yield from (path for path in self.base if path not in self.gone)

    def __len__(self) -> int:
        return len(self.own) + len(self.base) - len(self.gone)

    def items(self) -> Iterator[tuple[bytes, Any]]:
        return ((path, self.get(path)) for path in self)

    def same_as(self, other: Overlay) -> bool:
        if self.base is other.base:
            return self.gone == other.gone and self.own == other.own
        return len(self) == len(other) and all(other.get(path) == value for path, value in self.items())

    def differing(self, other: Mapping[bytes, Any]) -> Iterable[bytes]:
        """Paths of another mapping: all those with another value than here, or with none here."""
        return [path for path in self.gone if path in other] if other is self.base else other

    def beyond(self, other: Mapping[bytes, Any]) -> Iterator[bytes]:
        """The paths here that another mapping does not have."""
        return (path for path in (self.own if other is self.base else self) if path not in other)


def _kind(entry: Entry) -> str:
    return entry.kind


class RemoteTree:
    """What a look at the VM found.

    entries by path; closed: directories of excluded names, which were not entered; manifest: kind by path
    of what the last sync left there; generation: names that sync, "" before the first one; exists: whether
    the target does; stale: uploads that were broken off; digests: SHA-256 of files where it was asked for.
    local: entries that those on the VM are likely to be equal to.
    """

    def __init__(self, local: Mapping[bytes, Entry] | None = None) -> None:
        self.entries = Overlay(local)
        self.manifest = Overlay(local, _kind)
        self.closed: set[bytes] = set()
        self.digests: dict[bytes, bytes] = {}
        self.generation = ""
        self.exists = False
        self.stale = 0

    def hold(self, path: bytes) -> None:
        """Keep what is known of a path, whatever becomes of the local one."""
        for known in (self.entries, self.manifest):
            if path in known:
                known[path] = known[path]


def parse_look(packed: bytes, local: Mapping[bytes, Entry]) -> RemoteTree:
    """Read the answer of `look_script`. ApiError when it is not one."""
    import zlib

    tree = RemoteTree(local)
    try:
        fields = _fields(packed)
        if next(fields) != b"plato-sync-1":
            raise ValueError("another beginning")
        tree.exists = next(fields) == b"here"
        tree.generation = next(fields).decode("ascii", "replace")
        tree.stale = int(next(fields))
        tree.manifest.fill((field[1:], chr(field[0])) for field in _until_empty(fields))
        tree.entries.fill(_found(tree, field, next(fields)) for field in _until_empty(fields))
        for field in _until_empty(fields):
            digest, _, path = field.partition(b"  ")
            tree.digests[path[2:]] = bytes.fromhex(digest.decode())
        if next(fields) != b"end":
            raise ValueError("no end")
    except (ValueError, IndexError, StopIteration, RuntimeError, zlib.error):
        raise ApiError(
            "What the VM told about its files cannot be understood; nothing was changed.",
            hint="Run the command again.",
        ) from None
    return tree


def _fields(packed: bytes) -> Iterator[bytes]:
    """The NUL-terminated fields of a gzip stream, unpacked a little at a time."""
    import zlib

    unpacker = zlib.decompressobj(31)
    rest = b""
    for at in range(0, len(packed), SAMPLED_BYTES):
        *fields, rest = (rest + unpacker.decompress(packed[at : at + SAMPLED_BYTES])).split(b"\0")
        yield from fields
    if not unpacker.eof:
        raise ValueError("cut off")


def _until_empty(fields: Iterator[bytes]) -> Iterator[bytes]:
    """Fields up to an empty one; ValueError when there is none."""
    for field in fields:
        if not field:
            return
        yield field
    raise ValueError("no end of a list")


def _found(tree: RemoteTree, field: bytes, target: bytes) -> tuple[bytes, Entry]:
    """One entry: `kind mode size seconds.fraction path`, in `find`'s words."""
    kind, mode, size, moment, path = field.split(b" ", 4)
    if kind == b"x":
        tree.closed.add(path)
        kind = b"d"
    if kind != b"f":
        return path, Entry(kind.decode("ascii", "replace"), int(mode, 8), target=target)
    seconds, _, fraction = moment.partition(b".")
    mtime = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0") or 0)
    return path, Entry("f", int(mode, 8), int(size), mtime)


# The plan: pure, from the two trees to what must be done


class SyncPlan:
    """What one sync does. Lists of paths, sorted.

    send: entries that travel; remove: files and links; remove_trees: directories of excluded names, whole;
    remove_directories: empty by then, the deepest first; extra: those of the removals that no earlier sync
    put there; touched: directories on the VM in which something changes; changed: those that get another
    mode; replaced: directories that give way to something else, with how many entries they are and hold;
    unchanged: how many files are.
    """

    def __init__(self) -> None:
        self.send: list[bytes] = []
        self.remove: list[bytes] = []
        self.remove_trees: list[bytes] = []
        self.remove_directories: list[bytes] = []
        self.extra: list[bytes] = []
        self.touched: list[bytes] = []
        self.changed: set[bytes] = set()
        self.replaced: dict[bytes, int] = {}
        self.manifest = Overlay()
        self.unchanged = 0

    @property
    def removed(self) -> list[bytes]:
        """Everything that goes, sorted."""
        return sorted([*self.remove, *self.remove_trees, *self.remove_directories])


def plan_sync(
    local: LocalTree,
    remote: RemoteTree,
    *,
    delete_extra: bool = False,
    force: bool = False,
    single: bool = False,
) -> SyncPlan:
    """Compare the two trees. ConflictError when a directory of the VM's own stands where a file must go;
    SandboxError, unless `force`, when nearly everything would be removed. single: nothing is removed."""
    plan = SyncPlan()
    candidates = local.entries if local.digests else remote.entries.differing(local.entries)
    for path in candidates:
        theirs = remote.entries.get(path)
        if theirs is None or not _same(local, remote, path):
            plan.send.append(path)
            if theirs is not None and theirs.kind == local.entries[path].kind == "d":
                plan.changed.add(path)
    plan.unchanged = local.files() - local.files(plan.send)
    in_the_way = _in_the_way(local, remote)
    _check_conflicts(in_the_way, remote, force=force or delete_extra)
    gone = set() if single else _no_longer_local(local, remote)
    extra = _extra(local, remote) - gone if delete_extra and not single else set()
    if not force and not delete_extra:
        _check_emptied(remote, gone)
    _sort_removals(plan, remote, gone | extra | in_the_way)
    plan.replaced = _replaced(local, remote, in_the_way)
    plan.extra = sorted(path for path in extra if remote.entries[path].kind != "d")
    plan.send.sort()
    plan.manifest = remote.manifest if single else manifest_of(local, remote)
    changed = {os.path.dirname(path) for path in (*plan.send, *plan.removed)}
    standing = {path for path in changed if path in remote.entries and remote.entries[path].kind == "d"}
    plan.touched = sorted((standing | ({b""} & changed if remote.exists else set())) - set(plan.removed))
    return plan


def _same(local: LocalTree, remote: RemoteTree, path: bytes) -> bool:
    """Whether nothing needs to travel for a path that both have; digests, if known, speak for the content."""
    mine, theirs = local.entries[path], remote.entries[path]
    if path not in local.digests or path not in remote.digests:
        return mine.same_as(theirs)
    same = local.digests[path] == remote.digests[path]
    return same and (mine.kind, mine.mode, mine.size) == (theirs.kind, theirs.mode, theirs.size)


def manifest_of(local: LocalTree, remote: RemoteTree) -> Overlay:
    """What this sync vouches for, and what earlier ones did and this one could not look at."""
    manifest = Overlay(local.entries, _kind)
    for path in remote.manifest.beyond(local.entries):
        if local.protects(path):
            manifest[path] = remote.manifest[path]
    return manifest


def _in_the_way(local: LocalTree, remote: RemoteTree) -> set[bytes]:
    """What must go because something of another kind comes: itself and, for a directory, all below it."""
    roots = {
        path
        for path in remote.entries.differing(local.entries)
        if path in remote.entries and remote.entries[path].kind != local.entries[path].kind
    }
    if not roots:
        return set()
    return {path for path in remote.entries if not roots.isdisjoint(_lineage(path))}


def _replaced(local: LocalTree, remote: RemoteTree, in_the_way: set[bytes]) -> dict[bytes, int]:
    """The directories in the way whose contents are known to the last entry."""
    counts = {path: 0 for path in in_the_way if path in local.entries and remote.entries[path].kind == "d"}
    for path in in_the_way if counts else ():
        for above in _lineage(path):
            if above in counts:
                counts[above] += 1 if path not in remote.closed else -(1 << 40)
    return {path: count for path, count in counts.items() if count > 0}


def _lineage(path: bytes) -> Iterator[bytes]:
    """A path and every directory above it, up to the root's child."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


def _check_conflicts(in_the_way: set[bytes], remote: RemoteTree, *, force: bool) -> None:
    own = sorted(
        path
        for path in in_the_way
        if (remote.entries[path].kind != "d" or path in remote.closed)
        and path not in remote.manifest
        and not in_the_way.isdisjoint(_lineage(os.path.dirname(path)))
    )
    if own and not force:
        raise ConflictError(
            "Nothing was changed: a file must replace a directory on the VM that holds what no sync put"
            f" there, {listed_paths(own)}.",
            hint="Move it away on the VM, or give --force to remove it.",
        )


def _no_longer_local(local: LocalTree, remote: RemoteTree) -> set[bytes]:
    """What an earlier sync put there, is still there, and is neither local nor excluded by now."""
    return {
        path
        for path in remote.manifest.beyond(local.entries)
        if path in remote.entries
        and (remote.entries[path].kind == "d") == (remote.manifest[path] == "d")
        and not local.protects(path)
        and not local.ignore.ignores_at_all(path, remote.manifest[path] == "d")
    }


def _extra(local: LocalTree, remote: RemoteTree) -> set[bytes]:
    """Everything on the VM that is not local; what the ignore rules exclude is nobody's business."""
    return {
        path
        for path in remote.entries.beyond(local.entries)
        if path not in remote.closed
        and not local.protects(path)
        and not local.ignore.ignores_at_all(path, remote.entries[path].kind == "d")
    }


def _check_emptied(remote: RemoteTree, gone: set[bytes]) -> None:
    files = sum(kind != "d" for _, kind in remote.manifest.items())
    lost = sum(remote.manifest[path] != "d" for path in gone)
    if lost >= EMPTIED_FILES and lost * 2 > files:
        raise SandboxError(
            f"This would remove {lost} of the {files} files that were synced before. Nothing was changed.",
            hint="If they are meant to go, run it again with --force. See which: --dry-run --force",
        )


def _sort_removals(plan: SyncPlan, remote: RemoteTree, going: set[bytes]) -> None:
    """Removals by how they are done; a directory only goes if nothing stays in it."""
    if not going:
        return
    staying = {
        above for path in remote.entries if path not in going for above in _lineage(os.path.dirname(path))
    }
    for path in going:
        if path in remote.closed:
            plan.remove_trees.append(path)
        elif remote.entries[path].kind != "d":
            plan.remove.append(path)
        elif path not in staying:
            plan.remove_directories.append(path)
    plan.remove.sort()
    plan.remove_trees.sort()
    plan.remove_directories.sort(reverse=True)


def listed_paths(paths: Sequence[bytes], limit: int = 5) -> str:
    """The first paths of a list in words."""
    shown = ", ".join(shown_name(path) for path in paths[:limit])
    return f"{shown} and {len(paths) - limit} more" if len(paths) > limit else shown


def shown_name(path: bytes) -> str:
    return printable(os.fsdecode(path))


# The archive: a tar stream, made while it is sent; equal trees give equal bytes. How it is packed for its way
# is another matter: in gzip members, or as it is where the connection is faster than compression.


class SyncArchive:
    """The archive of a plan as a stream. Iterate over it once; the counts and the digest are then final.

    Gives blocks of the tar stream, each with the level that it is worth to be compressed with. files, bytes:
    content so far; digest: of the tar stream; packed: bytes that travelled, kept by who sends them; unsteady:
    files that changed while they were read; vanished: files that were gone. `meta/` holds the lists for the
    VM, `tree/` the entries.
    """

    def __init__(self, tree: LocalTree, plan: SyncPlan, manifest: Overlay | None) -> None:
        import hashlib

        self.tree = tree
        self.plan = plan
        self.manifest = manifest
        self._sent_directories = {path for path in plan.send if tree.entries[path].kind == "d"}
        self._around = sorted(set(self._directories()) - self._sent_directories)
        self.files = self.bytes = self.packed = 0
        self.unsteady: list[bytes] = []
        self.vanished: list[bytes] = []
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def progress(self) -> str:
        return f"{self.files} files, {size_text(self.bytes)}"

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        for data, level in self._tar():
            self._hash.update(data)
            yield data, level

    def _tar(self) -> Iterator[tuple[bytes, int]]:
        import heapq

        for name, data in self._lists():
            header = tar_header(b"meta/" + name, Entry("f", 0o644, len(data)))
            yield header + data + bytes(-len(data) % 512), GZIP_LEVEL
        if self.manifest is not None:
            yield from ((block, GZIP_LEVEL) for block in self._manifest_file(self.manifest))
        for path in heapq.merge(self.plan.send, self._around):
            entry = self.tree.entries[path]
            if entry.kind == "f":
                yield from self._file(path, entry)
            else:
                yield tar_header(b"tree/" + path, entry), GZIP_LEVEL
                self.files += entry.kind == "l"
        yield bytes(1024), GZIP_LEVEL

    def _directories(self) -> Iterator[bytes]:
        """The directories around all that changes: unpacking must give them their modes (again)."""
        for path in (*self.plan.send, *self.plan.removed):
            for above in _lineage(os.path.dirname(path)):
                if above in self.tree.entries:
                    yield above

    def _lists(self) -> Iterator[tuple[bytes, bytes]]:
        plan, entries = self.plan, self.tree.entries
        lists = {
            b"remove": plan.remove,
            b"trees": plan.remove_trees,
            b"directories": plan.remove_directories,
            b"touched": plan.touched,
            b"created": [
                path for path in plan.send if entries[path].kind == "d" and path not in plan.changed
            ],
            b"changed": sorted(plan.changed),
        }
        for path in self._with_modes():
            # five digits, as chmod lets a directory keep what it inherited of set-group-ID at four
            lists.setdefault(b"mode.%05o" % entries[path].mode, []).append(path)
        counts = [field for path, count in plan.replaced.items() for field in (b"./" + path, b"%d" % count)]
        yield b"replaced", nul_ended(counts)
        for name, paths in lists.items():
            yield name, nul_ended([b"./" + path for path in paths])

    def _manifest_file(self, manifest: Overlay) -> Iterator[bytes]:
        """The manifest as an entry of the archive, a few paths at a time."""
        paths = sorted(manifest)
        size = sum(map(len, paths)) + 2 * len(paths)
        yield tar_header(b"meta/manifest", Entry("f", 0o644, size))
        for at in range(0, len(paths), 1000):
            yield nul_ended([manifest[path].encode() + path for path in paths[at : at + 1000]])
        yield bytes(-size % 512)

    def _with_modes(self) -> Iterator[bytes]:
        """What must get its mode at the end: new and changed directories, those that had to be opened for
        a while, and files that lose set-user-ID when their owner is set."""
        entries = self.tree.entries
        files = (path for path in self.plan.send if entries[path].kind == "f")
        special = [path for path in files if entries[path].mode & 0o6000]
        opened = [path for path in self._around if entries[path].mode & 0o300 != 0o300]
        yield from sorted([*special, *opened, *self._sent_directories], reverse=True)

    def _file(self, path: bytes, entry: Entry) -> Iterator[tuple[bytes, int]]:
        """A file as it is now, exactly as long as its header says whatever happens to it meanwhile."""
        try:
            file = open(self.tree.location(path), "rb", buffering=0)  # noqa: SIM115  (closed below)
        except OSError:
            self.vanished.append(path)
            return
        with file:
            before = os.fstat(file.fileno())
            now = Entry("f", entry.mode, before.st_size, before.st_mtime_ns)
            block = file.read(min(BLOCK_BYTES, now.size)) if now.size else b""
            level = 0 if now.size >= SAMPLED_BYTES and is_dense(block) else GZIP_LEVEL
            left, padding = now.size, bytes(-now.size % 512)
            head = tar_header(b"tree/" + path, now)
            while left and block:
                left -= len(block)
                self.bytes += len(block)
                yield b"".join((head, block, b"" if left else padding)), level
                head, block = b"", file.read(min(BLOCK_BYTES, left)) if left else b""
            if left or not now.size:
                yield head, GZIP_LEVEL
                yield from ((bytes(min(left - done, BLOCK_BYTES)), 1) for done in range(0, left, BLOCK_BYTES))
                yield padding, GZIP_LEVEL
            after = os.fstat(file.fileno())
        self.files += 1
        if left or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self.unsteady.append(path)
        self.tree.entries[path] = now


def counted(count: int, what: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def size_text(count: float) -> str:
    """A number of bytes for people: 512 bytes, 34.5 kB, 20 MB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"
    raise AssertionError("the last unit fits all")


def nul_ended(fields: Sequence[bytes]) -> bytes:
    return b"".join(field + b"\0" for field in fields)


def is_dense(sample: bytes) -> bool:
    """Whether compression would gain next to nothing: nearly every byte value occurs in a short stretch."""
    middle = len(sample) // 2
    return len(set(sample[middle : middle + 1024])) > 230


class GzipMembers:
    """Compresses a stream whose level changes on the way: each run of one level is a gzip member."""

    def __init__(self) -> None:
        self._level = -1
        self._member: Any = None
        self._ready: list[bytes] = []
        self._size = 0

    def add(self, data: bytes, level: int) -> Iterator[bytes]:
        """Take data; give out what is ready, in pieces of at least BLOCK_BYTES."""
        import zlib

        if level != self._level:
            self._end_member()
            self._level, self._member = level, zlib.compressobj(level, zlib.DEFLATED, 31)
        self._keep(self._member.compress(data))
        if self._size >= BLOCK_BYTES:
            yield self._taken()

    def finish(self) -> Iterator[bytes]:
        self._end_member()
        if self._size:
            yield self._taken()

    def _end_member(self) -> None:
        if self._member is not None:
            self._keep(self._member.flush())

    def _keep(self, data: bytes) -> None:
        if data:
            self._ready.append(data)
            self._size += len(data)

    def _taken(self) -> bytes:
        data, self._ready, self._size = b"".join(self._ready), [], 0
        return data


def packed(archive: SyncArchive, reporter: Reporter) -> Iterator[bytes]:
    """An archive in gzip members, for a way where every byte counts."""
    packer = GzipMembers()
    for data, level in archive:
        for piece in packer.add(data, level):
            archive.packed += len(piece)
            reporter.detail(archive.progress)
            yield piece
    for piece in packer.finish():
        archive.packed += len(piece)
        yield piece


class Frames:
    """An archive as `receive_script` reads it: lines `gzip N` or `raw N`, each with so many bytes, then `end`
    and the digest. Frames are packed while earlier ones are being written, and compressed as long as the
    connection is slower than that."""

    def __init__(self, archive: SyncArchive, reporter: Reporter) -> None:
        self._archive = archive
        self._reporter = reporter
        self._writing = 0.0  # seconds that the reader of this iterator has taken, for so many bytes:
        self._written = 0
        self._packing_speed = 0.0  # bytes a second

    def __iter__(self) -> Iterator[bytes]:
        for frame in made_ahead(self._frames()):
            self._reporter.detail(self._archive.progress)
            began = time.monotonic()
            yield frame
            self._writing += time.monotonic() - began
            self._written += len(frame)
        self._archive.packed = self._written
        yield f"end\n{self._archive.digest}\n".encode()

    def _frames(self) -> Iterator[bytes]:
        blocks: list[tuple[bytes, int]] = []
        size = 0
        for block in self._archive:
            blocks.append(block)
            size += len(block[0])
            if size >= FRAME_BYTES:
                yield self._frame(blocks)
                blocks, size = [], 0
        if blocks:
            yield self._frame(blocks)

    def _frame(self, blocks: list[tuple[bytes, int]]) -> bytes:
        if not any(level for _, level in blocks) or not self._compression_pays():
            body = b"".join([data for data, _ in blocks])
            return b"raw %d\n" % len(body) + body
        began = time.monotonic()
        packer = GzipMembers()
        pieces = [piece for data, level in blocks for piece in packer.add(data, level)]
        body = b"".join([*pieces, *packer.finish()])
        self._packing_speed = sum(len(data) for data, _ in blocks) / max(1e-6, time.monotonic() - began)
        return b"gzip %d\n" % len(body) + body

    def _compression_pays(self) -> bool:
        if self._written < PROBE_BYTES:
            return True
        return self._written / max(1e-6, self._writing) < self._packing_speed


def made_ahead(pieces: Iterator[bytes], count: int = 2) -> Iterator[bytes]:
    """The same pieces, made by a thread of their own, at most so many ahead of the reader."""
    import queue

    ready: queue.Queue[bytes | None] = queue.Queue(count)
    wanted = [True]

    def make() -> None:
        try:
            for piece in pieces:
                if not wanted[0]:
                    break
                ready.put(piece)
        finally:
            ready.put(None)

    maker = Aside(make)
    try:
        yield from iter(ready.get, None)
        maker.result()
    finally:  # a maker that waits for room makes one more piece at most
        wanted[0] = False
        while not ready.empty():
            ready.get_nowait()


_TAR_TYPES = {"f": b"0", "l": b"2", "d": b"5"}


def tar_header(path: bytes, entry: Entry) -> bytes:
    """The header of one entry: owner 0, no names; in POSIX's extended form where ustar is too small."""
    name = path + b"/" if entry.kind == "d" else path
    seconds, fraction = divmod(entry.mtime, 1_000_000_000)
    records = b""
    if fraction or not 0 <= seconds < 8**11:
        sign = b"-" if entry.mtime < 0 else b""
        records += pax_record(b"mtime", sign + b"%d.%09d" % divmod(abs(entry.mtime), 1_000_000_000))
    for key, value in ((b"path", name), (b"linkpath", entry.target)):
        if len(value) > 100:
            records += pax_record(key, value)
    if entry.size >= 8**11:
        records += pax_record(b"size", b"%d" % entry.size)
    seconds = seconds if 0 <= seconds < 8**11 else 0
    size = entry.size if entry.kind == "f" and entry.size < 8**11 else 0
    block = ustar_block(name, entry.mode, size, seconds, _TAR_TYPES[entry.kind], entry.target)
    if not records:
        return block
    extended = ustar_block(b"pax", 0o644, len(records), 0, b"x", b"")
    return extended + records + bytes(-len(records) % 512) + block


def pax_record(key: bytes, value: bytes) -> bytes:
    """`length key=value`, where the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def ustar_block(name: bytes, mode: int, size: int, seconds: int, kind: bytes, target: bytes) -> bytes:
    head = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, 0, 0, size, seconds),
            b" " * 8,
            kind,
            target[:100].ljust(100, b"\0"),
            b"ustar\x0000",
        )
    ).ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


# What runs on the VM. POSIX sh with the GNU tools of every Linux; everything in it is quoted by `assigned`.


def assigned(**values: object) -> str:
    """Shell assignments; the one place where values become part of a command."""
    return "".join(f"{name}={shell_words([str(value)])}\n" for name, value in values.items())


_SHELL_HEAD = """\
LC_ALL=C; export LC_ALL; umask 022; trap '' HUP PIPE
sweep() { for dir; do [ ! -d "$dir" ] || rm -rf -- "$dir" 2>/dev/null || {
  find "$dir" -type d ! -perm -700 -exec chmod u+rwx {} + ; rm -rf -- "$dir"; }; done; }
quit() { sweep "$upload" "$new"; rmdir -- "$target/.plato-sync.new" 2>/dev/null; fail "$@"; }
room() { df -Pk "$1" 2>/dev/null | tail -n 1 | { read -r system all used left rest
  [ "${left:-100}" -ge 100 ]; }; }
told() { room "$upload" && room "$target" || echo 'no space left on the device'
  printf %s "$words" | tail -c 1000; }
fail() { code=$1; shift; printf '%s\\n' "$*" >&2; exit "$code"; }
own() { if [ "$(id -u)" = 0 ] && [ "${owner%%:*}" != 0 ]; then chown -h "$owner" -- "$@"; fi; }
near() { near=$1; while [ ! -d "$near" ]; do
  if [ -e "$near" ] || [ -L "$near" ]; then fail 66 "$near"; fi
  near=${near%/*}; near=${near:-/}; done; }
made() { dir=$1; set --; while [ ! -d "$dir" ]; do set -- "$dir" "$@"; dir=${dir%/*}; dir=${dir:-/}; done
  for dir; do mkdir "$dir" 2>/dev/null || [ -d "$dir" ] || fail 77 "$dir"; own "$dir"; done; }
"""

_LOOK_BODY = """\
for tool in base64 chmod chown cp df find gzip head id mkdir mv rm rmdir \\
    sha256sum stat tail tar tee tr wc xargs; do
  command -v "$tool" >/dev/null 2>&1 || fail 69 "$tool"
done
find / -maxdepth 0 -printf '' 2>/dev/null || fail 69 "GNU find (with -printf)"
near "$target"
if [ -d "$target" ]; then
  cd -- "$target" 2>/dev/null || fail 77 "$target"
  real=$(pwd -P)
  case " $refused " in *" $real "*) fail 68 "$real";; esac
  here=here
else here=missing; fi
if [ -e "$state/lock" ] && command -v flock >/dev/null 2>&1; then
  exec 9<"$state/lock"; flock -s -w "$patience" 9 || fail 75 lock
fi
looked() { [ "$here" = missing ] || find . -mindepth 1 $depth "$@" 2>/dev/null; }
{
  stale=0; for upload in "$state"/up.*; do [ ! -d "$upload" ] || stale=$((stale+1)); done
  printf '%s\\0' plato-sync-1 "$here" "$(cat "$state/generation" 2>/dev/null)" "$stale"
  cat "$state/manifest.$source" 2>/dev/null; printf '\\0'
  looked -type d '(' CLOSED ')' -prune -printf 'x 0 0 0 %P\\0\\0' -o -printf '%y %m %s %T@ %P\\0%l\\0'
  printf '\\0'
  [ "$digests" = no ] || looked -type d '(' CLOSED ')' -prune -o -type f -print0 |
    xargs -0 -r sha256sum -z -- 2>/dev/null
  printf '\\0end\\0'
} | gzip -1"""

_UPLOAD_BEGIN = """\
near "$target"; owner=$(stat -c %u:%g -- "$near"); upload=$state/up.$id; new=$upload/new
overtaken() { [ -d "$upload" ] || fail 78 "$upload"
  [ "$(cat "$state/generation" 2>/dev/null)" = "$expected" ] || quit 76 generation; }
staging() {
  if [ -d "$target" ] && [ "$(stat -c %d -- "$target")" != "$(stat -c %d -- "$upload")" ]; then
    new=$target/.plato-sync.new/$id  # neither links nor renames lead from one file system to another
    mkdir -p -- "$target/.plato-sync.new" || quit 77 "$target"
  fi
  sweep "$new"; mkdir "$new" "$new/tree" || quit 77 "$new"
}
digest_of() {
  if openssl dgst -sha256 -r </dev/null >/dev/null 2>&1; then openssl dgst -sha256 -r; else sha256sum; fi
}
unpack() { tar -xp --no-same-owner -f - -C "$new" 2>&1; }
"""

_PART_BODY = """\
made "$state"; mkdir "$upload" 2>/dev/null || [ -d "$upload" ] || fail 77 "$upload"
base64 -d > "$upload/part.$$" && mv -f -- "$upload/part.$$" "$upload/$part" || fail 74 "part $part"
"""

# What comes is unpacked and hashed at the same time: `tee` also writes to descriptor 4, which leads to the
# hash. It ends as soon as `tar` does not go on, and with it the reading of frames.
_RECEIVE_BODY = r"""
made "$state"; mkdir "$upload" || fail 77 "$upload"
staging
frames() {
  while IFS=' ' read -r form count && [ "$form" != end ]; do
    case $form in
      gzip) head -c "$count" | gzip -cd ;;
      *) head -c "$count" ;;
    esac || return
  done
}
sum=$(trap - PIPE; { { frames | tee /dev/fd/4; } 2>/dev/null |
  { unpack > "$upload/words" 4>&- && : > "$upload/whole"; }; } 4>&1 | digest_of)
[ -e "$upload/whole" ] || { overtaken; words=$(cat "$upload/words"); quit 74 "$(told)"; }
IFS= read -r digest && [ "${sum%% *}" = "$digest" ] || quit 67 digest
"""

_LOCK_BODY = r"""
made "$state"
[ -e "$state/lock" ] || { : > "$state/lock"; own "$state/lock"; }
if command -v flock >/dev/null 2>&1; then
  exec 9<"$state/lock"; flock -w "$patience" 9 || fail 75 lock
else
  find "$state" -maxdepth 1 -name lock.held -mmin +15 -exec rmdir -- {} + 2>/dev/null
  tries=0; until mkdir "$state/lock.held" 2>/dev/null; do
    tries=$((tries+1)); [ "$tries" -le "$patience" ] || fail 75 lock; sleep 1; done
  trap 'rmdir -- "$state/lock.held"' EXIT
fi
"""

_TURN_BODY = r"""
now=$(cat "$state/generation" 2>/dev/null)
[ "$now" != "$id" ] || exit 0
overtaken
"""

_CHECK_PARTS_BODY = r"""
whole() { cat "$upload"/[0-9]* | gzip -cd 2>/dev/null; }
sum=$(whole | digest_of); [ "${sum%% *}" = "$digest" ] || quit 67 digest
staging
words=$(whole | unpack) || quit 74 "$(told)"
rm -f -- "$upload"/[0-9]*
"""

_PLACE_BODY = r"""
meta=$new/meta; own "$meta"/*
if [ "$(id -u)" = 0 ] && [ "${owner%%:*}" != 0 ]; then chown -hR "$owner" -- "$new/tree" || quit 74 chown; fi
if [ -d "$target" ]; then
  cd -- "$target" || quit 77 "$target"
  may='for d; do { [ -w "$d" ] && [ -x "$d" ]; } || [ -O "$d" ] || printf "%s " "$d"; done'
  ours='[ "$(id -u)" = 0 ] || for d; do [ -O "$d" ] || printf "%s " "$d"; done'
  open='for d; do { [ -w "$d" ] && [ -x "$d" ]; } || chmod u+rwx "$d" || printf "%s " "$d"; done'
  closed=$(xargs -0 -r sh -c "$may" - < "$meta/touched" 2>/dev/null
    xargs -0 -r sh -c "$ours" - < "$meta/changed" 2>/dev/null)
  [ -n "$closed" ] || closed=$(xargs -0 -r sh -c "$open" - < "$meta/touched" 2>/dev/null)
  [ -z "$closed" ] || quit 77 "$closed"
  same='[ "$(find "$1" -printf x 2>/dev/null | wc -c)" -eq "$2" ]'  # the VM may have put something there
  xargs -0 -r -n 2 sh -c "$same" - < "$meta/replaced" || quit 76 replaced
else
  mv -T -- "$new/tree" "$target" || quit 76 "$target"
  mkdir "$new/tree"; cd -- "$target" || quit 77 "$target"
fi
words=$(xargs -0 -r rm -f -- 2>&1 < "$meta/remove") || quit 74 "$(told)"
words=$(xargs -0 -r rm -rf -- 2>&1 < "$meta/trees") || quit 74 "$(told)"
xargs -0 -r rmdir -- < "$meta/directories" 2>/dev/null
move() { (cd "$new/tree" && find . -mindepth 1 -maxdepth 1 -print0 |
  xargs -0 -r cp -RPf "$@" -t "$OLDPWD" -- 2>&1); }
words=$(move -l) || words=$(move --remove-destination --preserve=mode,ownership,timestamps) ||
  quit 74 "$(told)"
if [ "$(id -u)" = 0 ] && [ "${owner%%:*}" != 0 ]; then xargs -0 -r chown -h "$owner" -- < "$meta/created"; fi
for list in "$meta"/mode.*; do
  [ ! -e "$list" ] || words=$(xargs -0 -r chmod "${list##*.}" -- 2>&1 < "$list") || quit 74 "$(told)"
done
[ ! -e "$meta/manifest" ] || mv -f -- "$meta/manifest" "$state/manifest.$source"
printf %s "$id" > "$upload/generation"; own "$upload/generation"
mv -f -- "$upload/generation" "$state/generation"
sweep "$state"/up.* "$target/.plato-sync.new"
"""


class SyncTarget:
    """Where a tree goes on the VM, and the scripts that work there.

    path: absolute and normal; source: names the local tree among those that are synced to this target.
    """

    def __init__(self, path: str, source: str, seconds: float) -> None:
        parent, _, name = path.rpartition("/")
        self.path = path
        self.seconds = seconds
        self._values = {
            "target": path,
            "state": f"{parent}/{SYNC_STATE}/{name}",
            "source": source,
            "patience": max(1, int(seconds * PATIENCE_SHARE)),
        }

    def look_script(self, local: LocalTree, *, digests: bool, single: bool) -> str:
        """Prints, packed, what `parse_look` reads. Nothing on the VM changes."""
        inside = {part for path in local.entries for part in path.split(b"/")}
        taken_back = local.ignore.takes_back
        closed = [
            name.decode() for name in EXCLUDED_DIRECTORIES if name not in inside and not taken_back(name)
        ]
        tests = shell_words(
            [word for name in (*closed, SYNC_STATE, SYNC_STATE + ".new") for word in ("-o", "-name", name)][
                1:
            ]
        )
        values = assigned(
            **self._values,
            refused=" ".join(REFUSED_TARGETS),
            digests="yes" if digests else "no",
            depth="-maxdepth 1" if single else "",
        )
        return values + _SHELL_HEAD + _LOOK_BODY.replace("CLOSED", tests)

    def part_script(self, upload: str, number: int) -> str:
        """Keeps one part of an upload, given as base64 on its standard input. May be run again."""
        return (
            assigned(**self._values, id=upload, part=f"{number:06d}")
            + _SHELL_HEAD
            + _UPLOAD_BEGIN
            + _PART_BODY
        )

    def receive_script(self, upload: str, expected: str) -> str:
        """Takes an archive from standard input (see `Frames`) and makes it the tree."""
        values = assigned(**self._values, id=upload, expected=expected)
        return values + _SHELL_HEAD + _UPLOAD_BEGIN + _RECEIVE_BODY + _LOCK_BODY + _TURN_BODY + _PLACE_BODY

    def commit_script(self, upload: str, expected: str, archive: SyncArchive) -> str:
        """Makes the parts of an upload the tree. May be run again."""
        values = assigned(**self._values, id=upload, expected=expected, digest=archive.digest)
        placing = _CHECK_PARTS_BODY + _PLACE_BODY
        return values + _SHELL_HEAD + _UPLOAD_BEGIN + _LOCK_BODY + _TURN_BODY + placing

    def clean_script(self) -> str:
        """Removes uploads that were broken off."""
        return assigned(**self._values) + _SHELL_HEAD + 'sweep "$state"/up.* "$target/.plato-sync.new"\n'

    def failure(self, outcome: Outcome) -> SandboxError | None:
        """The error that the end of one of these scripts means, or None."""
        if outcome.code == 0:
            return None
        words = printable("; ".join(outcome.stderr.decode("utf-8", "replace").split("\n"))).strip("; ")[-600:]
        where = f"{words or self.path} on the VM"
        again = f"Nothing was changed in the tree; run `{PROGRAM} sync` again."
        known: dict[int, tuple[str, str | None]] = {
            66: (
                f"{where} is not a directory, so nothing can be put below it.",
                "Choose another --remote-path.",
            ),
            67: ("The archive did not arrive on the VM as it was sent.", again),
            68: (
                f"The remote path leads to {where}, which is never synced.",
                "Choose another --remote-path.",
            ),
            69: (
                f"The VM has no {words}, which `sync` needs there.",
                "Install it on the VM, then sync again.",
            ),
            74: (
                f"The VM could not take the files: {words}.",
                "The tree there is as it was; make room, then sync again.",
            ),
            77: (
                f"{where} cannot be written by the user who syncs.",
                "Nothing was changed; check its owner and mode.",
            ),
        }
        if outcome.code == 75:
            return ConflictError("Another sync has been at work on the VM all the while.", hint=again)
        if outcome.code in (76, 78):
            return OvertakenError("Another sync changed the tree on the VM meanwhile.", hint=again)
        message, hint = known.get(
            outcome.code, (f"The VM could not do it (exit {outcome.code}): {words}.", again)
        )
        return SandboxError(message, hint=hint)


class OvertakenError(ConflictError):
    """Another sync came between the look and the change; looking again helps."""


def normal_target(text: str) -> str:
    """A remote path in its normal form; UsageError for one that must not become a synced tree."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    path = "/" + "/".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("The remote path is not valid UTF-8.") from None
    if not text.startswith("/") or ".." in parts or "\0" in text or "\n" in text:
        raise UsageError(
            f"The remote path {printable(text)!r} is not an absolute path of one line without '..'.",
            hint=f"It looks like {SYNC_ROOT}/NAME.",
        )
    if path in REFUSED_TARGETS or path.endswith("/" + SYNC_STATE):
        raise UsageError(
            f"{path} is never synced: what the VM itself keeps there could be lost.",
            hint=f"Choose a directory of its own, such as {SYNC_ROOT}/NAME.",
        )
    return path


# The two ways to the VM: both run the scripts above; they differ in how an archive gets there


class SshWay:
    """One SSH connection for everything; the archive goes as one stream."""

    name = "ssh"
    words = "over SSH"

    def __init__(self, sandbox: SandboxBase, seconds: float) -> None:
        self._seconds = seconds
        self._reporter = sandbox.reporter
        self._shell = SshShell(sandbox.state, sandbox.settings, sandbox.reporter)

    def ready(self) -> None:
        """Wait until the VM answers."""
        self._shell.wait_until_ready(min(self._seconds, SSH_ANSWER_SECONDS))

    def run(self, script: str, seconds: float | None = None) -> Outcome:
        return self._shell.run(script, seconds=seconds or self._seconds)

    def look(self, script: str) -> Outcome:
        return self.run(script)

    def deliver(self, target: SyncTarget, upload: str, expected: str, archive: SyncArchive) -> Outcome:
        """Send the archive and make it the tree."""
        script = target.receive_script(upload, expected)
        return self._shell.run(script, seconds=self._seconds, data=Frames(archive, self._reporter))

    def close(self) -> None:
        self._shell.close()


class ApiWay:
    """The API's `execute`: the archive goes as base64 in commands, several at once."""

    name = "api"
    words = "through the API"

    def __init__(self, sandbox: SandboxBase, seconds: float) -> None:
        self._sandbox = sandbox
        self._seconds = seconds
        self._api = sandbox.api

    def ready(self) -> None:
        pass

    def run(self, script: str, api: PlatoApi | None = None) -> Outcome:
        state = self._sandbox.state
        answer = (api or self._api).execute(state["session_id"], script, self._seconds)
        return execute_outcome(answer, state.get("job_id"), self._seconds)

    def look(self, script: str) -> Outcome:
        import binascii

        outcome = self.run(script + " | base64")
        try:
            return Outcome(outcome.code, binascii.a2b_base64(outcome.stdout), outcome.stderr)
        except binascii.Error:
            return Outcome(outcome.code, b"", outcome.stderr)

    def deliver(self, target: SyncTarget, upload: str, expected: str, archive: SyncArchive) -> Outcome:
        """Send the archive in parts, then make it the tree; a small one does both in one command."""
        commit_room = len(target.commit_script(upload, expected, archive)) + 200
        size = (COMMAND_BYTES - len(self._part(target, upload, 0, b"").encode()) - 64) // 4 * 3
        parts = in_parts(packed(archive, self._sandbox.reporter), size)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None and len(first) * 4 // 3 + 2 * commit_room < COMMAND_BYTES:
            both = self._part(target, upload, 0, first) + " || exit $?\n"
            return self.run(both + target.commit_script(upload, expected, archive))
        failed = PartUpload(self, target, upload).send(
            first, *(() if second is None else (second,)), rest=parts
        )
        if failed is not None:
            return failed
        return self.run(target.commit_script(upload, expected, archive))

    def send_part(self, api: PlatoApi, target: SyncTarget, upload: str, number: int, data: bytes) -> Outcome:
        return self.run(self._part(target, upload, number, data), api)

    def another(self) -> PlatoApi:
        return self._api.another()

    @staticmethod
    def _part(target: SyncTarget, upload: str, number: int, data: bytes) -> str:
        import binascii

        text = binascii.b2a_base64(data, newline=False).decode()
        return f"printf %s {text or chr(39) * 2} | {{\n{target.part_script(upload, number)}}}"

    def close(self) -> None:
        pass


def execute_outcome(answer: Mapping[str, Any], job_id: str | None, seconds: float) -> Outcome:
    """What a command did, in an answer of `execute`. Raises when it did not run to its end."""
    result = job_of(answer, job_id)
    code = result.get("exit_code", 0 if result.get("success") else 1)
    stdout, stderr = as_text(result.get("stdout")) or "", as_text(result.get("stderr")) or ""
    if result.get("timed_out"):
        raise TimedOutError(
            f"A command on the VM did not end within {seconds:g} s.",
            hint="Run the command again with a larger --timeout.",
        )
    if not result or not isinstance(code, int) or code < 0:
        words = printable(stderr.strip()) or "no result came back"
        raise ApiError(
            f"Plato could not run a command on the VM: {words}.",
            hint=f"See what it is doing: {PROGRAM} status",
        )
    return Outcome(code, stdout.encode("utf-8", "replace"), stderr.encode("utf-8", "replace"))


def in_parts(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """A stream cut into parts of one size, the last one shorter."""
    kept = bytearray()
    for piece in pieces:
        kept += piece
        while len(kept) >= size:
            yield bytes(kept[:size])
            del kept[:size]
    if kept:
        yield bytes(kept)


class PartUpload:
    """Parts of an archive on their way over several connections; at most a few are in memory at a time."""

    def __init__(self, way: ApiWay, target: SyncTarget, upload: str) -> None:
        import queue

        self._way = way
        self._target = target
        self._upload = upload
        self._queue: queue.Queue[tuple[int, bytes] | None] = queue.Queue(SYNC_CONNECTIONS)
        self._failure: Outcome | BaseException | None = None

    def send(self, *first: bytes, rest: Iterator[bytes]) -> Outcome | None:
        """Send all parts; the outcome of one that failed, or None."""
        import itertools

        workers: list[Aside] = []
        for number, part in enumerate(itertools.chain(first, rest)):
            if self._failure is not None:
                break
            if len(workers) < SYNC_CONNECTIONS:
                workers.append(Aside(self._work))
            self._queue.put((number, part))
        for _ in workers:
            self._queue.put(None)
        for worker in workers:
            worker.result()
        if isinstance(self._failure, BaseException):
            raise self._failure
        return self._failure

    def _work(self) -> None:
        api = self._way.another()
        try:
            for number, part in iter(self._queue.get, None):
                if self._failure is None:
                    self._send_one(api, number, part)
        finally:
            api.transport.close()

    def _send_one(self, api: PlatoApi, number: int, part: bytes) -> None:
        try:
            outcome = self._way.send_part(api, self._target, self._upload, number, part)
        except BaseException as error:  # noqa: BLE001  (handed to the main thread)
            self._failure = error
            return
        if outcome.code:
            self._failure = outcome


# One sync, and the watch


class SyncLock:
    """The kernel's lock on a directory's .sandbox.yaml: syncs of one sandbox take turns."""

    def __init__(self, directory: str, reporter: Reporter, seconds: float) -> None:
        self._path = state_path(directory)
        self._reporter = reporter
        self._seconds = seconds
        self._handle = -1

    def __enter__(self) -> SyncLock:  # noqa: PYI034  (Self is newer than 3.9)
        import fcntl

        self._handle = os.open(self._path, os.O_RDONLY)
        deadline = time.monotonic() + self._seconds
        waiting = False
        try:
            while True:
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._wait(deadline, told=waiting)
                    waiting = True
                else:
                    return self
        except BaseException:
            os.close(self._handle)
            raise

    def _wait(self, deadline: float, *, told: bool) -> None:
        if not told:
            self._reporter.step("Waiting for another sync of this sandbox to end", self._seconds)
        if time.monotonic() > deadline:
            raise ConflictError(
                "Another sync of this sandbox is still at work.",
                hint="Wait for it to end, then run this again.",
            )
        time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


class SyncOptions:
    """What a sync was asked to do; see `Sandbox.sync`."""

    def __init__(
        self,
        *,
        dry_run: bool = False,
        checksum: bool = False,
        gitignore: bool = False,
        delete_extra: bool = False,
        confirm: Callable[[Sequence[str]], bool] | None = None,
        force: bool = False,
        keep_going: bool = False,
        via: str = "auto",
        timeout: float = SYNC_SECONDS,
    ) -> None:
        if via not in ("auto", "api", "ssh"):
            raise UsageError(f"via is {via!r}; it must be auto, api or ssh.")
        if not 1 <= timeout <= 86400:
            raise UsageError(f"The timeout is {timeout:g} s; it must be from 1 to 86400.")
        self.dry_run = dry_run
        self.checksum = checksum
        self.gitignore = gitignore
        self.delete_extra = delete_extra
        self.confirm = confirm
        self.force = force
        self.keep_going = keep_going
        self.via = via
        self.timeout = timeout


class Syncer:
    """Brings one local tree to one target, once or again and again."""

    def __init__(
        self, sandbox: SandboxBase, path: str, remote_path: str | None, options: SyncOptions
    ) -> None:
        self.sandbox = sandbox
        self.reporter = sandbox.reporter
        self.options = options
        self.root = os.path.normpath(os.path.join(sandbox.directory, path))
        self.single = os.path.isfile(self.root)
        self._check_root(path)
        source = hashed(os.path.relpath(self.root, sandbox.directory))
        target = normal_target(remote_path or default_target(sandbox.state))
        self.target = SyncTarget(target, source, options.timeout)
        self.remote: RemoteTree | None = None
        self._way: SshWay | ApiWay | None = None
        self._warned: set[bytes] = set()
        self._ssh_failed = False

    def _check_root(self, path: str) -> None:
        if self.single and self.options.delete_extra:
            raise UsageError("--delete-extra needs a directory to mirror, not a single file.")
        if not path or not os.path.lexists(self.root):
            raise UsageError(f"There is no {shown_path(self.root)} to sync.")
        if not self.single and not os.path.isdir(self.root):
            raise UsageError(f"{shown_path(self.root)} is neither a file nor a directory.")

    # One sync

    def run(self) -> dict[str, Any]:
        """Sync once; what was done, as `Sandbox.sync` tells it."""
        started = time.monotonic()
        with SyncLock(self.sandbox.directory, self.reporter, self.options.timeout):
            report = self._run_by_any_way()
        report["seconds"] = round(time.monotonic() - started, 3)
        return report

    def _run_by_any_way(self) -> dict[str, Any]:
        try:
            return self._run_until_settled()
        except (NetworkError, TimedOutError) as error:
            if self.options.via != "auto" or not isinstance(self._way, SshWay):
                raise
            self.reporter.note(f"{error.message} Going on through the API.")
            self.forget()
            self._ssh_failed = True
            return self._run_until_settled()

    def _run_until_settled(self) -> dict[str, Any]:
        """Plan and send; again when another sync came between, or a file changed while it was read."""
        total: dict[str, Any] = {"sent": 0, "removed": 0, "bytes": 0, "archive_bytes": 0}
        for attempt in range(SYNC_TRIES):
            last = attempt + 1 == SYNC_TRIES
            try:
                report, unsteady = self._run_plan()
            except OvertakenError:
                self.remote = None
                if last:
                    raise
                continue
            for key in total:
                if isinstance(report.get(key), int):
                    total[key] += report[key]
            if not unsteady:
                break
            if last:
                names = listed_paths(unsteady)
                self.reporter.warn(
                    f"{names}: still changing while read, so the VM may have half of a change."
                )
        return {**report, **({} if self.options.dry_run else total)}

    def _run_plan(self) -> tuple[dict[str, Any], list[bytes]]:
        options = self.options
        self._open_way()
        local = self._scan()
        remote = self._look(local)
        if options.checksum:
            add_digests(local, remote)
        plan = self._plan(local, remote)
        check_before_sending(local, remote, plan.send)
        self._warn_of_skipped(local)
        self._refuse_unreadable(local)
        plan = self._plan(local, remote) if any(path not in local.entries for path in plan.send) else plan
        report: dict[str, Any] = {
            **self._counts(local, plan),
            "unchanged": plan.unchanged,
            "skipped": told_paths(local.skipped),
            "unreadable": told_paths(local.unreadable),
            "via": self.way.name,
            "remote_path": self.target.path,
        }
        if options.dry_run:
            return report, []
        self._ask(plan)
        archive = self._send(local, remote, plan)
        if archive is None:
            return report, []
        vanished = [path for path in archive.vanished if path not in self._warned]
        if vanished:
            self.reporter.warn(f"Vanished while it was to be sent: {listed_paths(vanished)}.")
        report["sent"] -= len(archive.vanished)
        report["bytes"], report["archive_bytes"] = archive.bytes, archive.packed
        return report, archive.unsteady

    def _counts(self, local: LocalTree, plan: SyncPlan) -> dict[str, Any]:
        """For a dry run the paths, else the numbers of files and links (and bytes)."""
        if self.options.dry_run:
            send = [os.fsdecode(path) + "/" * (local.entries[path].kind == "d") for path in plan.send]
            directories = {*plan.remove_directories, *plan.remove_trees}
            remove = [os.fsdecode(path) + "/" * (path in directories) for path in plan.removed]
            return {"dry_run": True, "send": send, "remove": remove}
        return {"sent": local.files(plan.send), "removed": len(plan.remove), "bytes": 0, "archive_bytes": 0}

    def _plan(self, local: LocalTree, remote: RemoteTree) -> SyncPlan:
        options = self.options
        return plan_sync(
            local, remote, delete_extra=options.delete_extra, force=options.force, single=self.single
        )

    def _scan(self) -> LocalTree:
        root = os.fsencode(self.root)
        if self.single:
            return scan_file(root)
        local = scan_tree(root, gitignore=self.options.gitignore)
        if b"" in local.unreadable:
            raise SandboxError(f"{shown_path(self.root)} cannot be read: {local.unreadable[b'']}.")
        if not local.entries and not self.options.force:
            raise SandboxError(
                f"There is nothing to sync in {shown_path(self.root)}; nothing was changed.",
                hint="If it is meant to be empty, give --force.",
            )
        return local

    def _look(self, local: LocalTree) -> RemoteTree:
        """What is on the VM: asked once, then known from what was sent."""
        if self.remote is None:
            self.reporter.step("Looking at the VM", self.options.timeout)
            self.way.ready()
            script = self.target.look_script(local, digests=self.options.checksum, single=self.single)
            outcome = self.way.look(script)
            failure = self.target.failure(outcome)
            if failure is not None:
                raise failure
            self.remote = parse_look(outcome.stdout, local.entries)
        return self.remote

    def _warn_of_skipped(self, local: LocalTree) -> None:
        for path, why in sorted(local.skipped.items()):
            if path not in self._warned:
                self._warned.add(path)
                self.reporter.warn(f"{shown_name(path)} is left out: {why}.")

    def _refuse_unreadable(self, local: LocalTree) -> None:
        if not local.unreadable:
            return
        for path, why in sorted(local.unreadable.items()):
            if path not in self._warned:
                self._warned.add(path)
                self.reporter.warn(f"{shown_name(path)} cannot be read: {why}.")
        if not self.options.keep_going:
            names = listed_paths(sorted(local.unreadable))
            raise SandboxError(
                f"Not everything can be read: {names}. Nothing was sent.",
                hint="Make it readable, list it in .platoignore, or sync the rest with --keep-going.",
            )

    def _ask(self, plan: SyncPlan) -> None:
        if not plan.extra:
            return
        names = [os.fsdecode(path) for path in plan.extra]
        if self.options.confirm is not None and not self.options.confirm(names):
            raise SandboxError("Nothing was changed.")

    def _send(self, local: LocalTree, remote: RemoteTree, plan: SyncPlan) -> SyncArchive | None:
        """Carry out a plan; None when there is nothing to do."""
        import secrets

        same_manifest = plan.manifest.same_as(remote.manifest)
        if not plan.send and not plan.removed and (same_manifest or self.single):
            if remote.stale:
                self.way.run(self.target.clean_script())
                remote.stale = 0
            return None
        total = sum(local.entries[path].size for path in plan.send)
        sending = f"Sending {counted(local.files(plan.send), 'file')}, {size_text(total)}"
        self.reporter.step(sending if plan.send else "Removing what is gone here")
        manifest = None if same_manifest or self.single else plan.manifest
        archive = SyncArchive(local, plan, manifest)
        upload = secrets.token_hex(12)
        outcome = self.way.deliver(self.target, upload, remote.generation, archive)
        failure = self.target.failure(outcome)
        if failure is not None:
            self._clean_up(failure)
            raise failure
        self._learn(local, remote, plan, archive, upload)
        return archive

    def _clean_up(self, failure: SandboxError) -> None:
        """Free the VM of an upload that failed, if that is easily done; the next sync does it anyway."""
        self.remote = None
        if isinstance(self._way, SshWay):  # its shell ends with a script that fails
            self.forget()
        if isinstance(self._way, ApiWay) and not isinstance(failure, OvertakenError):
            try:
                self._way.run(self.target.clean_script())
            except SandboxError as error:
                self.reporter.trace(error.message)

    def _learn(
        self, local: LocalTree, remote: RemoteTree, plan: SyncPlan, archive: SyncArchive, upload: str
    ) -> None:
        """What is on the VM from now on."""
        for path in plan.removed:
            remote.entries.discard(path)
            remote.closed.discard(path)
            remote.digests.pop(path, None)
        for path in plan.send:
            if path not in archive.vanished:
                remote.entries[path] = local.entries[path]
                remote.digests.pop(path, None)
        remote.manifest, remote.generation, remote.exists = plan.manifest, upload, True

    # The way

    @property
    def way(self) -> SshWay | ApiWay:
        if self._way is None:
            raise TypeError("no way to the VM was opened")
        return self._way

    def _open_way(self) -> None:
        """Begin to connect; SSH does so by itself while the local tree is looked at."""
        if self._way is not None:
            return
        via, sandbox = self.options.via, self.sandbox
        has_ssh = bool(sandbox.state.get("ssh_config_path") and sandbox.state.get("ssh_host"))
        if via == "ssh" and not has_ssh:
            raise SandboxError("This sandbox has no SSH.", hint="Sync through the API: --via api")
        if via == "api" or not has_ssh or self._ssh_failed:
            self._way = ApiWay(sandbox, self.options.timeout)
            return
        repair_ssh_config(sandbox.state, sandbox.settings, self.reporter)
        try:
            self._way = SshWay(sandbox, self.options.timeout)
        except SandboxError as error:
            if via == "ssh":
                raise
            self.reporter.note(f"{error.message} Going on through the API.")
            self._way = ApiWay(sandbox, self.options.timeout)

    def forget(self) -> None:
        """Drop the connection and what is known of the VM."""
        if self._way is not None:
            self._way.close()
        self._way = self.remote = None

    # The watch

    def watch(self, told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Sync, then follow the local tree until SIGINT. told: called with the report of each sync that did
        something. Returns the sums of all reports; Interrupted when there is none yet."""
        import signal

        total: dict[str, Any] = {"syncs": 0, "sent": 0, "removed": 0, "bytes": 0, "archive_bytes": 0}
        started = time.monotonic()
        report: dict[str, Any] = {}
        try:
            while True:
                seen, latest = self._sync_for_watch(report)
                report = latest or report
                if latest.get("sent") or latest.get("removed") or not total["syncs"]:
                    total = {key: value + latest.get(key, 1) for key, value in total.items()}
                    told(latest)
                self.reporter.step(f"Watching {shown_path(self.root)} (Ctrl-C ends it)", 0)
                self._wait_for_change(seen)
        except Interrupted as interruption:
            if interruption.number != signal.SIGINT or not report:
                raise
        return {**report, **total, "seconds": round(time.monotonic() - started, 3)}

    def _sync_for_watch(self, before: dict[str, Any]) -> tuple[dict[bytes, Entry], dict[str, Any]]:
        """Sync until it succeeds: a lost connection is tried again, other trouble waits for a change."""
        delays = iter(WATCH_RETRY_SECONDS)
        while True:
            seen = self._snapshot()
            try:
                return seen, self.run()
            except (NetworkError, TimedOutError) as error:
                delay = next(delays, WATCH_RETRY_SECONDS[-1])
                self.reporter.warn(f"{error.message} Trying again in {delay:g} s.")
                self.forget()
                self._ssh_failed = False
                time.sleep(delay)
            except (AuthenticationError, NoSandboxError, UsageError, StateError):
                raise
            except SandboxError as error:
                if not before:
                    raise
                self.reporter.warn(f"{error.message} Waiting for the next change.")
                self.forget()
                return seen, {}

    def _snapshot(self) -> dict[bytes, Entry]:
        """What tells whether the tree has changed."""
        root = os.fsencode(self.root)
        try:
            tree = scan_file(root) if self.single else scan_tree(root, gitignore=self.options.gitignore)
        except OSError:
            return {}
        return tree.entries

    def _wait_for_change(self, seen: dict[bytes, Entry]) -> None:
        """Return when the tree is another one and still for a moment. A large one is looked at less often."""
        current = previous = seen
        while current == seen or current != previous:
            self.sandbox.check_still_there()
            began = time.monotonic()
            previous, current = current, self._snapshot()
            time.sleep(max(WATCH_QUIET_SECONDS, 3 * (time.monotonic() - began)))


def default_target(state: Mapping[str, Any]) -> str:
    """The remote path of the specification; UsageError when the service's name cannot be part of one."""
    service = state.get("service")
    if not isinstance(service, str) or not service or "/" in service or service in (".", ".."):
        raise UsageError(
            "This sandbox has no service whose name could make a remote path.",
            hint=f"Say where to: --remote-path {SYNC_ROOT}/NAME",
        )
    return f"{SYNC_ROOT}/{service}"


def hashed(text: str) -> str:
    import hashlib

    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def told_paths(reasons: Mapping[bytes, str]) -> list[dict[str, str]]:
    """Paths and why, for --json."""
    return [{"path": os.fsdecode(path), "reason": why} for path, why in sorted(reasons.items())]


# ----------------------------------------------------------------------------------------------------------
# services: the Gitea push, the clone on the VM, Docker Compose
# ----------------------------------------------------------------------------------------------------------
# The code goes from a bare repository of ours, under PLATO_HOME, to a workspace branch in Gitea: the user's
# own `.git`, index, hooks and git configuration take no part. The VM fetches that one commit and takes over
# the files that differ. Gitea's credentials go to git through the environment here, and there through the
# standard input of a shell: no argument, URL, configuration or file holds them.

GIT_SECONDS = 900.0
GIT_TRIES = 3
GIT_IDENTITY = "plato-sandbox <plato-sandbox@localhost>"
UP_SECONDS = 1800.0  # a first `docker compose up` pulls and builds images
COMPOSE_POLL_SECONDS = (0.2, 0.5, 1.0)
HEALTHY_SECONDS = 300  # the API's own default for healthy_wait_timeout
LOG_LINES = 20
COMPOSE_FILE = "docker-compose.yml"  # where a service names none
WHOLE_FILE_BYTES = 4 * 1024 * 1024

# What git asks for is answered from the environment; the text itself holds no secret.
_CREDENTIAL_HELPER = (
    '!f() { [ "$1" != get ] || printf "username=%s\\npassword=%s\\n"'
    ' "$GITEA_USERNAME" "$GITEA_PASSWORD"; }; f'
)
_GIT_SETTINGS = (
    *("-c", "core.hooksPath=/dev/null", "-c", "http.followRedirects=false", "-c", "gc.auto=0"),
    *("-c", "credential.helper=", "-c", "credential.helper=" + _CREDENTIAL_HELPER),
)


class Steps:
    """The steps of a long operation: told as they begin, named in an error, timed for the report.

        with steps("push", "Pushing the code"):
            ...

    done: a list of {"step": NAME, "seconds": SECONDS}.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.done: list[dict[str, Any]] = []
        self._reporter = reporter
        self._name = self._words = ""
        self._began = 0.0

    def __call__(self, name: str, words: str, limit: float | None = None) -> Steps:
        self._name, self._words = name, words
        self._reporter.step(words, limit)
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.done.append({"step": self._name, "seconds": round(time.monotonic() - self._began, 3)})
        if isinstance(error, SandboxError):
            error.message = f"{self._words}: {error.message}"


# What is to be started, and from which files


class ComposeService:
    """A service of a dataset.

    file: its Compose file; required: the containers that must be healthy, by container or Compose service
    name, empty for all; seconds: how long they may take.
    """

    def __init__(self, name: str, file: str, required: Sequence[str], seconds: float) -> None:
        self.name = name
        self.file = file
        self.required = list(required)
        self.seconds = seconds


def plan_services(config: Config) -> list[ComposeService]:
    """The services of a config's dataset, in its order; ConfigError when they cannot be started."""
    wanted = config.content.get("services") or {}
    if not wanted:
        raise ConfigError(
            f"{shown_path(from_here(config.path))}: the dataset {config.dataset!r} has no services to start.",
            hint="List its Compose file under `services`; `sync` alone brings code to the VM.",
        )
    root = os.path.dirname(config.path)
    planned, problems = [], []
    for name, part in wanted.items():
        file = part.get("file") or COMPOSE_FILE
        inside = os.path.normpath(file)
        if os.path.isabs(file) or inside.startswith(".."):
            problems.append(f"services.{name}.file is {file!r}; it must lie in the directory of the config")
        elif not os.path.isfile(os.path.join(root, file)):
            problems.append(f"services.{name}.file: there is no {file!r} in {shown_path(root)}")
        required = [text for text in part.get("required_healthy_containers") or [] if text != "all"]
        seconds = whole_number(part.get("healthy_wait_timeout")) or HEALTHY_SECONDS
        inside = "./-" if inside == "-" else inside  # which means standard input to Compose
        planned.append(ComposeService(str(name), inside, required, float(seconds)))
    if problems:
        raise unusable_config(shown_path(from_here(config.path)), problems)
    return planned


def tree_to_push(config: Config, *, gitignore: bool) -> LocalTree:
    """The directory of a config as it goes to Gitea; what git ignores only if the config names it."""
    root = os.fsencode(os.path.dirname(config.path))
    tree = scan_tree(root, gitignore=gitignore)
    missing = [name for name in named_files(config.content) if name not in tree.entries]
    if gitignore and missing:
        everything = scan_tree(root, gitignore=False)
        for path, entry in everything.entries.items():
            if any(path == name or path.startswith(name + b"/") for name in missing):
                tree.entries[path] = entry
    files = sorted(path for path, entry in tree.entries.items() if entry.kind != "d")
    check_before_sending(tree, RemoteTree(), files)
    if tree.unreadable:
        path, why = min(tree.unreadable.items())
        raise SandboxError(
            f"{shown_name(path)} cannot be read: {why}. Nothing was pushed.",
            hint="Make it readable, or list it in .platoignore.",
        )
    tree.entries = {path: tree.entries[path] for path in files if path in tree.entries}
    if not tree.entries:
        raise SandboxError(f"There is nothing to push in {shown_path(os.fsdecode(root))}.")
    return tree


def named_files(dataset: Mapping[str, Any]) -> list[bytes]:
    """The files and directories that a dataset names, relative to its config."""
    found: list[Any] = [as_dict(dataset.get("metadata")).get("flows_path")]
    for service in as_dict(dataset.get("services")).values():
        found.append(service.get("file") or COMPOSE_FILE)
    for listener in as_dict(dataset.get("listeners")).values():
        found += [listener.get("seed_data_path"), *as_list(listener.get("seed_data_paths"))]
    paths = [os.path.normpath(path) for path in filter(as_text, found)]
    return [os.fsencode(path) for path in paths if not os.path.isabs(path) and not path.startswith("..")]


# Gitea


class GiteaRepository:
    """Where the code of a simulator goes, and with which credentials. clone_url holds none."""

    def __init__(self, clone_url: str, default_branch: str, username: str, password: str) -> None:
        self.clone_url = clone_url
        self.default_branch = default_branch
        self.username = username
        self.password = password

    def environment(self) -> dict[str, str]:
        """What the credential helper answers with."""
        return {"GITEA_USERNAME": self.username, "GITEA_PASSWORD": self.password}

    def hide(self, text: str) -> str:
        """A text without the password, whichever way it was written in it."""
        misread = self.password.encode().decode("latin-1")  # as git takes a text without a charset
        for secret in (self.password, quoted(self.password), misread):
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


def find_repository(api: PlatoApi, service: str) -> GiteaRepository:
    """The repository of the simulator of a service, made if it has none yet."""
    credentials = api.gitea_credentials()
    listed = [as_dict(entry) for entry in api.gitea_simulators()]
    simulators = {name: entry for entry in listed if (name := as_text(entry.get("name")))}
    found = [entry for name, entry in simulators.items() if name.lower() == service.lower()]
    if not found:
        close = closest(service.lower(), [name.lower() for name in simulators])
        raise SandboxError(
            f"Gitea lists no simulator {service!r} for this API key."
            + (f" Did you mean {close!r}?" if close else ""),
            hint=f"It lists: {_listed(sorted(simulators)) or 'none'}."
            f" Without Gitea: {PROGRAM} start-services --via sync",
        )
    identifier = str(found[0].get("id"))
    repository = _existing_repository(api, identifier) if found[0].get("has_repo") else {}
    repository = repository or _new_repository(api, identifier)
    return GiteaRepository(
        plain_clone_url(as_text(repository.get("clone_url")) or "", api.settings),
        as_text(repository.get("default_branch")) or "main",
        _credential(credentials, "username"),
        _credential(credentials, "password"),
    )


def _existing_repository(api: PlatoApi, identifier: str) -> dict[str, Any]:
    answer = api.gitea_repository(identifier)
    return answer if answer.get("has_repo") is not False else {}


def _new_repository(api: PlatoApi, identifier: str) -> dict[str, Any]:
    """Create it; another one may just have done so, or our own first try."""
    try:
        return api.create_gitea_repository(identifier)
    except ApiError as error:
        if error.status != 409:
            raise
        return api.gitea_repository(identifier)


def _credential(credentials: Mapping[str, Any], name: str) -> str:
    value = as_text(credentials.get(name))
    if value is None or any(mark in value for mark in "\n\r\0"):
        raise ApiError(f"Plato's answer holds no usable {name} for Gitea.")
    return value


def plain_clone_url(url: str, settings: Settings) -> str:
    """A clone URL without user and password; ApiError for one that git must not be given."""
    import urllib.parse

    allowed = ("https", "http") if settings.base_url.startswith("http:") else ("https",)
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in allowed and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:  # brackets that hold no address
        fits = False
    if not fits:
        raise ApiError(f"Plato names no usable clone URL for the repository ({printable(url)[:100]!r}).")
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class GitStore:
    """Our bare repository of one sandbox, through which its code goes to Gitea. `stop` removes it."""

    def __init__(
        self, path: str, repository: GiteaRepository, settings: Settings, reporter: Reporter
    ) -> None:
        self.path = path
        self.repository = repository
        self.reporter = reporter
        self.ca_file = settings.ca_file
        if find_program("git") is None:
            raise SandboxError(
                "git cannot be found on this machine.",
                hint="Install git, or bring the code over without it: start-services --via sync",
            )
        self.is_old = os.path.isfile(os.path.join(path, "HEAD")) and not os.path.islink(path)
        if not self.is_old:
            self._make()

    def _make(self) -> None:
        """Make it anew."""
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)
        _unlink_quietly(self.path)  # a link is not followed
        self.is_old = False
        self.run("init", "--quiet", "--bare", "--template=", self.path)

    def run(self, *arguments: str, stdin: Iterable[bytes] = (), credentials: Mapping[str, str] = {}) -> str:
        """Run git on this repository; what it prints, or the error that its failure means."""
        command = ["git", f"--git-dir={self.path}", *_GIT_SETTINGS, *arguments]
        outcome = run_program(
            command,
            self.reporter,
            seconds=GIT_SECONDS,
            stdin=stdin,
            env={**self._environment(), **credentials},
            cwd="/",
        )
        if outcome.code:
            raise git_error(outcome, self.repository)
        return outcome.stdout.decode("utf-8", "replace").strip()

    def _environment(self) -> dict[str, str]:
        """The user's, without what would change what git does, and without the API key."""
        unwanted = ("GIT_", "GITEA_", "SSH_ASKPASS", "PLATO_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        own = {
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "http:https",
            "HOME": self.path,  # a git that does not know GIT_CONFIG_GLOBAL looks here
            "XDG_CONFIG_HOME": self.path,
            "LC_ALL": "C",
        }
        if self.ca_file:
            own["GIT_SSL_CAINFO"] = self.ca_file
        return {**child_environment(kept), **own}

    def _remotely(self, *arguments: str) -> str:
        """The same for what needs the network: once more when the connection broke."""
        for attempt in range(GIT_TRIES):
            try:
                return self.run(*arguments, credentials=self.repository.environment())
            except NetworkError as error:
                delay = retry_delay(error, attempt)
                if delay is None or attempt + 1 == GIT_TRIES:
                    raise
                self.reporter.trace(f"git {arguments[0]}: {error.message} Again in {delay:.1f} s.")
                time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def push(self, tree: LocalTree, branch: str) -> tuple[str, bool]:
        """Make the tree the newest commit of a branch in Gitea; that commit, and whether it is a new one."""
        for attempt in range(GIT_TRIES):
            try:
                return self._push(tree, branch)
            except PushOvertakenError as error:
                if attempt + 1 == GIT_TRIES:
                    raise
                self.reporter.trace(f"{error.message} Again from what is there now.")
            except GitFailureError as error:
                if not self.is_old:
                    raise
                # What an earlier run left, when it was killed or the disk was full, may be of no use.
                self.reporter.trace(f"{error.message} Again with a new {self.path}.")
                self._make()
        raise AssertionError("the last attempt returns or raises")

    def _push(self, tree: LocalTree, branch: str) -> tuple[str, bool]:
        reference = f"refs/heads/{branch}"
        names = (reference, f"refs/heads/{self.repository.default_branch}")
        lines = self._remotely("ls-remote", "--", self.repository.clone_url, *names).splitlines()
        listed = {name: commit for commit, _, name in (line.partition("\t") for line in lines)}
        parent = next((listed[name] for name in names if name in listed), None)
        if parent is not None:
            self._fetch(parent, next(name for name in names if name in listed))
        commit = self._write(tree, parent)
        if parent is not None and self._tree_of(commit) == self._tree_of(parent):
            commit = parent
        if listed.get(reference) != commit:
            self._remotely("push", "--quiet", "--", self.repository.clone_url, f"{commit}:{reference}")
        return commit, commit != parent

    def _tree_of(self, commit: str) -> str:
        return self.run("rev-parse", "--verify", f"{commit}^{{tree}}")

    def _fetch(self, commit: str, reference: str) -> None:
        """Have that one commit here, without the history before it."""
        try:
            self.run("cat-file", "-e", f"{commit}^{{tree}}")
        except SandboxError:
            fetch = ("fetch", "--quiet", "--no-tags", "--depth=1", "--", self.repository.clone_url, reference)
            self._remotely(*fetch)

    def _write(self, tree: LocalTree, parent: str | None) -> str:
        """A commit that holds the tree and nothing else, byte for byte."""
        for attempt in range(SYNC_TRIES):
            try:
                self.run("fast-import", "--quiet", "--force", "--done", stdin=import_stream(tree, parent))
                return self.run("rev-parse", "--verify", "refs/heads/new")
            except UnsteadyFileError:
                if attempt + 1 == SYNC_TRIES:
                    raise
        raise AssertionError("the last attempt returns or raises")


class GitFailureError(SandboxError):
    """git failed, and neither the network nor the server is known to be the reason."""


class PushOvertakenError(ConflictError):
    """The branch moved between the look at it and the push: another one, or our own whose answer was lost."""


class UnsteadyFileError(SandboxError):
    """A file changed while it was read."""


def import_stream(tree: LocalTree, parent: str | None) -> Iterator[bytes]:
    """A tree as `git fast-import` reads it: one commit on the branch `new`."""
    message = b"The workspace of a sandbox\n"
    yield b"commit refs/heads/new\ncommitter %s %d +0000\n" % (GIT_IDENTITY.encode(), int(time.time()))
    yield b"data %d\n%s\n" % (len(message), message)
    if parent is not None:
        yield b"from %s\n" % parent.encode()
    yield b"deleteall\n"
    for path, entry in sorted(tree.entries.items()):
        mode = b"120000" if entry.kind == "l" else b"100755" if entry.mode & 0o100 else b"100644"
        name = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
        yield b'M %s inline "%s"\n' % (mode, name)
        yield from _content(tree, path, entry)
    yield b"done\n"


def _content(tree: LocalTree, path: bytes, entry: Entry) -> Iterator[bytes]:
    """The bytes of a file or link with their count before them."""
    if entry.kind == "l":
        yield b"data %d\n%s\n" % (len(entry.target), entry.target)
        return
    try:
        with open(tree.location(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield b"data %d\n" % size
            left = size
            while left:
                piece = file.read(min(left, WHOLE_FILE_BYTES))
                if not piece:
                    break
                left -= len(piece)
                yield piece
            if left or file.read(1):
                raise UnsteadyFileError(f"{shown_name(path)} changed while it was read; run this again.")
    except OSError as error:
        raise UnsteadyFileError(f"{shown_name(path)} cannot be read any more: {reason(error)}.") from None
    yield b"\n"


def git_error(outcome: Outcome, repository: GiteaRepository) -> SandboxError:
    """The error that a failed git means, with the last words of git and of the server."""
    text = repository.hide(outcome.stderr.decode("utf-8", "replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("fatal:", "error:", "remote:"))]
    words = printable("; ".join((telling or lines)[-4:])).rstrip(".")[-600:]
    words = words or f"git ended with {outcome.code}"
    low = "\n".join(lines).lower()
    if re.search(r"cannot lock ref|failed to update ref|fetch first|non-fast-forward|stale info", low):
        return PushOvertakenError(
            f"Something else pushed to the branch meanwhile: {words}.", hint="Run this again."
        )
    if re.search(r"\b413\b|too large|exceeds|remote rejected|hook declined", low):
        return SandboxError(
            f"Gitea did not take the files: {words}.",
            hint="Keep large files out with .platoignore, or bring the code over with --via sync.",
        )
    if re.search(r"authentication failed|error: 40[13]|could not read (username|password)", low):
        return AuthenticationError(
            f"Gitea refused the credentials that Plato gave for it: {words}.",
            hint="Ask the owner of the Plato organization for access; --via sync needs none.",
        )
    if re.search(
        r"rpc failed|error: (429|5\d\d)|early eof|hung up|disconnect|resolve|connect|timed out|"
        r"ssl|tls|certificate|recv failure|empty reply|transfer closed|bad pack|incomplete",
        low,
    ):
        return NetworkError(
            f"git could not talk to Gitea: {words}.", hint="Run the command again a little later.", sent=True
        )
    return GitFailureError(f"git failed: {words}.", hint="Run the command again; --verbose shows each step.")


# The clone on the VM. POSIX sh with GNU tools and git, like the scripts of `sync`, whose helpers it uses:
# everything new is fetched, checked and written beside the tree before the first file in it changes.

_CLONE_BODY = r"""
command -v git >/dev/null 2>&1 || fail 69 git
new=$upload/new; mkdir "$upload" "$new" "$new/tree" || fail 77 "$upload"
made "$target"; cd -- "$target" || quit 77 "$target"
export GIT_TERMINAL_PROMPT=0 GIT_CONFIG_NOSYSTEM=1
g() { git --git-dir="$repo" --work-tree="$target" -c safe.directory='*' -c core.hooksPath=/dev/null \
  -c http.followRedirects=false -c credential.helper= -c credential.helper="$helper" \
  -c core.autocrlf=false -c core.fileMode=true -c core.quotePath=true -c core.fsmonitor=false "$@"; }
repo=$target/.git
if [ ! -d "$repo" ]; then
  [ ! -e "$repo" ] || quit 73 .git
  repo=$upload/repo.git
  words=$(git -c init.defaultBranch=main init -q --bare --template= "$repo" 2>&1) || quit 74 "$words"
  g config core.bare false
fi
words=$(export GITEA_USERNAME GITEA_PASSWORD
  g fetch -q --no-tags --depth=1 "$url" "+refs/heads/$branch:refs/remotes/origin/$branch" 2>&1) ||
  quit 80 "$words"
unset GITEA_USERNAME GITEA_PASSWORD
[ "$(g rev-parse "refs/remotes/origin/$branch")" = "$commit" ] || quit 76 branch
mkdir -p "$repo/info"
printf '%s\n' '* -text -eol -ident -filter -working-tree-encoding' > "$repo/info/attributes"
g config remote.origin.url "$url"
g config remote.origin.fetch "+refs/heads/*:refs/remotes/origin/*"
g update-index -q --refresh >/dev/null 2>&1
gone=$upload/gone; write=$upload/write
words=$({ g diff-index --no-renames -z --name-only --diff-filter=A "$commit" -- > "$gone" &&
  g diff-index --no-renames -z --name-only --diff-filter=DMTU "$commit" -- > "$write"; } 2>&1) ||
  quit 74 "$words"
words=$({ export GIT_INDEX_FILE="$upload/index"; g read-tree "$commit" &&
  g checkout-index -q -z --stdin --prefix="$new/tree/" < "$write"; } 2>&1) || quit 74 "$(told)"
if [ "$(id -u)" = 0 ] && [ "${owner%%:*}" != 0 ]; then chown -hR "$owner" -- "$new/tree" || quit 74 chown; fi
standing='for p; do if [ -d "$p" ] && [ ! -L "$p" ]; then find "./$p" ! -type d -print0; fi; done'
blocking='for p; do if [ -L "$p" ] || { [ -e "$p" ] && [ ! -d "$p" ]; }; then printf "%s\0" "./$p"; fi; done'
{ xargs -0 -r sh -c "$standing" - < "$write"
  g ls-tree -r -d -z --name-only "$commit" | xargs -0 -r sh -c "$blocking" -; } |
  tr '\0\n' '\n?' | sed 's|^\./||' | sort -u > "$upload/there"
tr '\0\n' '\n?' < "$gone" | sort -u > "$upload/going"
words=$(comm -23 "$upload/there" "$upload/going" | head -n 5)
[ -z "$words" ] || quit 73 "$words"
words=$(xargs -0 -r rm -f -- 2>&1 < "$gone") || quit 74 "$words"
xargs -0 -r dirname -z -- < "$gone" | sort -zru | xargs -0 -r rmdir -p -- 2>/dev/null
empty='for p; do [ ! -d "$p" ] || [ -L "$p" ] || find "./$p" -depth -type d -exec rmdir {} +; done'
xargs -0 -r sh -c "$empty" - < "$write" 2>/dev/null
absent='for p; do [ -d "$p" ] || printf "%s\0" "$p"; done'
(cd "$new/tree" && find . -mindepth 1 -type d -print0) | xargs -0 -r sh -c "$absent" - > "$upload/created"
move() { (cd "$new/tree" && find . -mindepth 1 -maxdepth 1 -print0 |
  xargs -0 -r cp -RPf "$@" -t "$target" -- 2>&1); }
words=$(move -l) || words=$(move --remove-destination --preserve=mode,ownership,timestamps) ||
  quit 74 "$(told)"
if [ "$repo" != "$target/.git" ]; then
  mv -- "$repo" "$target/.git" || quit 74 "$(told)"
  repo=$target/.git
fi
g update-ref "refs/heads/$branch" "$commit" && g symbolic-ref HEAD "refs/heads/$branch" &&
  mv -f -- "$upload/index" "$repo/index" || quit 74 "$(told)"
g update-index -q --refresh >/dev/null 2>&1
if [ "$(id -u)" = 0 ] && [ "${owner%%:*}" != 0 ]; then
  xargs -0 -r chown -h "$owner" -- < "$upload/created"; chown -R "$owner" -- "$repo"
fi
changed=$(cat "$gone" "$write" | tr -dc '\0' | wc -c)
printf %s "$id" > "$upload/generation"; own "$upload/generation"
mv -f -- "$upload/generation" "$state/generation"  # what a sync saw before is not what is there now
sweep "$state"/up.*
printf '%s\n' "$changed"
"""


def clone_script(target: str, branch: str, commit: str, repository: GiteaRepository, seconds: float) -> str:
    """Makes a directory on the VM a clone of one commit. To be read from standard input, never an argument.

    Prints the number of files that changed. What is there and not tracked stays.
    """
    import secrets

    parent, _, name = target.rpartition("/")
    values = assigned(
        target=target,
        state=f"{parent}/{SYNC_STATE}/{name}",
        id=secrets.token_hex(12),
        patience=max(1, int(seconds)),
        url=repository.clone_url,
        branch=branch,
        commit=commit,
        helper=_CREDENTIAL_HELPER,
        **repository.environment(),
    )
    return values + _SHELL_HEAD + _UPLOAD_BEGIN + _LOCK_BODY + _CLONE_BODY


def clone_failure(outcome: Outcome, target: str, repository: GiteaRepository) -> SandboxError | None:
    """The error that the end of the script means, or None."""
    if outcome.code == 0:
        return None
    lines = [line for line in outcome.stderr.decode("utf-8", "replace").split("\n") if line.strip()]
    words = printable(repository.hide("; ".join(lines)))[-600:].rstrip(".")
    if outcome.code == 80:
        return git_error(Outcome(1, b"", outcome.stderr), repository)
    if outcome.code == 69:
        return SandboxError(f"The VM has no {words}.", hint="Bring the code over with --via sync.")
    if outcome.code == 73:
        return ConflictError(
            f"On the VM something that is not in the code stands where it has to go: {words}.",
            hint=f"Nothing was changed; remove it from {target}, then run this again.",
        )
    if outcome.code in (75, 76):
        return ConflictError(
            "Another `start-services` or `sync` is at work on this sandbox.", hint="Run this again."
        )
    if outcome.code in (66, 77):
        return SandboxError(f"{words} on the VM cannot be written.", hint="Check its owner and mode.")
    return SandboxError(f"The VM could not take the code (exit {outcome.code}): {words}.")


# Docker Compose on the VM

_COMPOSE_HEAD = r"""
cd -- "$target" || fail 77 "$target"
if [ -z "$DOCKER_HOST" ] && [ -S /var/run/docker-user.sock ]; then
  DOCKER_HOST=unix:///var/run/docker-user.sock; export DOCKER_HOST
fi
"""

# The services of the file, and `up` begun in the background: it outlives a connection that breaks.
_UP_BODY = r"""
command -v docker >/dev/null 2>&1 || fail 69 docker
words=$(docker version --format '{{.Server.Version}}' 2>&1) || fail 70 "$words"
near "$target"; owner=$(stat -c %u:%g -- "$near"); made "$run"
rm -f -- "$run"/*.code "$run"/*.code.new "$run"/*.output "$run"/*.services "$run"/*.stop
run=$run/$id
words=$(docker compose -f "$file" config --services 2>&1 > "$run.services") || {
  docker compose version >/dev/null 2>&1 || fail 69 'docker compose (Compose v2)'
  fail 71 "$words"
}
[ -e "${run%/*}/lock" ] || : > "${run%/*}/lock"
: > "$run.output"; : > "$run.code.new"
own "${run%/*}/lock" "$run.output" "$run.services" "$run.code.new"
up='echo $$ > "$run.pid"
  if command -v flock >/dev/null 2>&1; then exec 8<"${run%/*}/lock"; flock 8; fi
  [ ! -e "$run.stop" ] || exit
  docker compose -f "$file" up -d "$@" > "$run.output" 2>&1 < /dev/null 8<&-
  echo $? > "$run.code.new"; mv -f "$run.code.new" "$run.code"; rm -f "$run.pid"'
if command -v setsid >/dev/null 2>&1; then alone=setsid; else alone=nohup; fi
run="$run" file="$file" "$alone" sh -c "$up" - OPTIONS > /dev/null 2>&1 < /dev/null 9>&- &
cat "$run.services"
"""

_LOOK_AT_BODY = r"""
run=$run/$id
cat "$run.code" 2>/dev/null || echo -
tail -n 15 "$run.output" 2>/dev/null | tr '\r' '\n' | tail -c 3000 | base64 | tr -d '\n'; echo
docker compose -f "$file" ps --all --format json
"""

_STOP_UP_BODY = r"""
: > "$run/$id.stop"
pid=$(cat "$run/$id.pid" 2>/dev/null) || exit 0
kill -0 "-$pid" 2>/dev/null && pid=-$pid  # its group; dash knows no -- here
kill -TERM "$pid" 2>/dev/null
for n in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
kill -KILL "$pid" 2>/dev/null; rm -f "$run/$id.pid"
"""

_LOGS_BODY = r"""
docker logs --tail "$lines" -- "$name" 2>&1
"""


class Container:
    """A container as `docker compose ps` tells of it."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.name = as_text(entry.get("Name")) or "?"
        self.service = as_text(entry.get("Service")) or self.name
        self.state = (as_text(entry.get("State")) or "unknown").lower()
        self.health = (as_text(entry.get("Health")) or "").lower()
        self.exit_code = whole_number(entry.get("ExitCode")) or 0
        self.is_new = "less than a second" in (as_text(entry.get("Status")) or "").lower()

    @property
    def word(self) -> str:
        """Its state in a word or two."""
        if self.state == "running":
            return self.health or "running"
        return f"{self.state} ({self.exit_code})" if self.state == "exited" else self.state

    @property
    def is_up(self) -> bool:
        """Whether it runs and is healthy, or has not died at once; or has done what it was there for."""
        if self.state == "running":
            return self.health == "healthy" or (not self.health and not self.is_new)
        return self.state == "exited" and self.exit_code == 0

    @property
    def has_failed(self) -> bool:
        dead = self.state == "dead" or (self.state == "exited" and self.exit_code != 0)
        return dead or (self.state == "running" and self.health == "unhealthy")

    def told(self) -> dict[str, Any]:
        """The same for --json."""
        return {
            "name": self.name,
            "service": self.service,
            "state": self.state,
            "health": self.health or None,
        }


def parse_containers(text: str) -> list[Container]:
    """The containers in the JSON of `docker compose ps`: a list, or since Compose 2.21 a line each."""
    import json

    entries: list[Any] = []
    for line in text.splitlines():
        try:
            value = json.loads(line) if line.strip() else []
        except (ValueError, RecursionError):
            continue
        entries += value if isinstance(value, list) else [value]
    return sorted((Container(as_dict(entry)) for entry in entries), key=lambda found: found.name)


class ComposeLook:
    """What one look at a service showed. code: of `up`, or None while it works; output: its last lines."""

    def __init__(self, outcome: Outcome) -> None:
        import binascii

        code, _, rest = outcome.stdout.partition(b"\n")
        output, _, listing = rest.partition(b"\n")
        self.code = int(code) if re.fullmatch(rb"\d{1,3}", code.strip()) else None
        try:
            lines = binascii.a2b_base64(output).decode("utf-8", "replace").splitlines()
        except binascii.Error:
            lines = []
        self.output = [line.strip() for line in lines if line.strip()]
        self.containers = parse_containers(listing.decode("utf-8", "replace"))

    def of(self, names: Sequence[str]) -> list[Container]:
        """The containers with one of these names or service names."""
        return [found for found in self.containers if found.name in names or found.service in names]

    @property
    def complaints(self) -> list[str]:
        """The output without what tells of progress, if there is such."""
        progress = r"(\S+ )?\S+\s+(Creat|Recreat|Start|Stopp|Remov|Pull|Runn|Wait|Buil|Healthy|Exited)\w*"
        return [line for line in self.output if not re.fullmatch(progress, line)] or self.output

    @property
    def words(self) -> str:
        """Which container is in which state; before there are any, what `up` is doing."""
        states = [f"{found.service} {found.word}" for found in self.containers]
        if self.code is None and self.output and not states:
            return self.output[-1]
        return ", ".join(states)


class ComposeRun:
    """Starts Compose services on the VM, one after another, and waits until they are healthy."""

    def __init__(
        self, connect: Callable[[], SshWay | ApiWay], target: str, reporter: Reporter, seconds: float
    ) -> None:
        self.way: SshWay | ApiWay | None = None
        self.connect = connect
        self.target = target
        self.reporter = reporter
        self.seconds = seconds
        self.id = ""

    def close(self) -> None:
        """End the connection; the next step opens another."""
        if self.way is not None:
            self.way.close()
        self.way = None

    def _run(self, service: ComposeService, body: str, **values: object) -> Outcome:
        parent, _, name = self.target.rpartition("/")
        run = f"{parent}/{SYNC_STATE}/{name}/compose-{hashed(service.file)}"
        head = assigned(target=self.target, file=service.file, run=run, id=self.id, **values)
        self.way = self.way or self.connect()
        return self.way.run(head + _SHELL_HEAD + _COMPOSE_HEAD + body)

    def start(self, service: ComposeService, options: Sequence[str]) -> list[Container]:
        """Bring one service up and wait for the containers that must be healthy; all of its containers."""
        import secrets

        self.id = secrets.token_hex(12)
        try:
            names = self._begin(service, options)
            look = self._wait_for_up(service, names)
        except Interrupted:
            self._stop_up(service)
            raise
        unknown = [name for name in service.required if not look.of([name])]
        if unknown:
            known = _listed(names)
            raise SandboxError(
                f"`required_healthy_containers` names {_listed(unknown)}; {service.file} has none such.",
                hint=f"Its services are: {known}.",
            )
        return self._wait_until_healthy(service, names, look)

    def _stop_up(self, service: ComposeService) -> None:
        """After an interruption: end `docker compose up`, which would go on without us."""
        self.close()  # it may be in the middle of an answer
        try:
            self._run(service, _STOP_UP_BODY)
        except SandboxError as error:
            self.reporter.warn(f"`docker compose up` may go on on the VM: {error.message}")

    def _begin(self, service: ComposeService, options: Sequence[str]) -> list[str]:
        """Check the file and start `docker compose up`; the names of the services in the file."""
        outcome = self._run(service, _UP_BODY.replace("OPTIONS", shell_words(options)))
        words = printable("; ".join(outcome.stderr.decode("utf-8", "replace").split("\n"))).strip("; ")[-800:]
        known = {
            69: (f"The VM has no {words}.", "Install it there, or start from an image that has it."),
            70: (
                f"Docker on the VM does not answer: {words}",
                "Start its Docker service, then run this again.",
            ),
            71: (f"{service.file} is not a valid Compose file: {words}", "Correct it, then run this again."),
            77: (f"{words} on the VM cannot be entered.", "Check its owner and mode."),
        }
        if outcome.code:
            message, hint = known.get(outcome.code, (f"The VM could not start it: {words}", None))
            raise SandboxError(message, hint=hint)
        return outcome.stdout.decode("utf-8", "replace").split()

    def _look(self, service: ComposeService, names: Sequence[str]) -> ComposeLook:
        try:
            outcome = self._run(service, _LOOK_AT_BODY)
        except NetworkError as error:
            self.reporter.note(f"{error.message} Connecting again.")
            self.close()
            outcome = self._run(service, _LOOK_AT_BODY)
        look = ComposeLook(outcome)
        if outcome.code and look.code is not None:
            words = printable(outcome.stderr.decode("utf-8", "replace").strip())[-400:]
            raise SandboxError(f"The containers of {service.file} cannot be listed: {words}")
        look.containers = look.of(names)
        self.reporter.detail(look.words)
        return look

    def _wait_for_up(self, service: ComposeService, names: Sequence[str]) -> ComposeLook:
        deadline = time.monotonic() + self.seconds
        pauses = iter(COMPOSE_POLL_SECONDS)
        while True:
            look = self._look(service, names)
            if look.code == 0:
                return look
            if look.code is not None:
                failed = [found for found in look.containers if found.has_failed]
                words = printable("; ".join(look.complaints[-5:]))[-800:]
                raise self._failure(service, f"`docker compose up` failed: {words}", failed)
            if time.monotonic() > deadline:
                raise TimedOutError(
                    f"`docker compose up` of {service.file} did not end within {self.seconds:g} s"
                    f" ({look.words or 'no container yet'}).",
                    hint="It goes on there; run this again with a larger --timeout.",
                )
            time.sleep(next(pauses, COMPOSE_POLL_SECONDS[-1]))

    def _wait_until_healthy(
        self, service: ComposeService, names: Sequence[str], look: ComposeLook
    ) -> list[Container]:
        deadline = time.monotonic() + service.seconds
        pauses = iter(COMPOSE_POLL_SECONDS)
        while True:
            awaited = look.of(service.required) if service.required else look.containers
            failed = [found for found in awaited if found.has_failed]
            if failed:
                states = _listed(f"{found.service} is {found.word}" for found in failed)
                raise self._failure(service, f"{states}.", failed)
            late = [found for found in awaited if not found.is_up]
            if not late:
                return look.containers
            if time.monotonic() > deadline:
                states = _listed(f"{found.service} is {found.word}" for found in late)
                failure = self._failure(service, f"Not healthy within {service.seconds:g} s: {states}.", late)
                raise TimedOutError(failure.message, hint=failure.hint)
            time.sleep(next(pauses, COMPOSE_POLL_SECONDS[-1]))
            look = self._look(service, names)

    def _failure(self, service: ComposeService, words: str, failed: Sequence[Container]) -> SandboxError:
        """The error, with the last log lines of the first container that is to blame."""
        tail: list[str] = []
        if failed:
            name = printable(failed[0].service)
            try:
                outcome = self._run(service, _LOGS_BODY, name=failed[0].name, lines=LOG_LINES)
                lines = outcome.stdout.decode("utf-8", "replace").splitlines()
            except SandboxError as error:
                lines = [error.message]
            tail = [f"  {name} | {printable(line)[:300]}" for line in lines if line.strip()]
            tail = tail or [f"  {name} | (it wrote nothing)"]
        failure = SandboxError(words, hint="Correct what is wrong there, then run this again.")
        failure.message = "\n".join([failure.message, *tail])
        return failure


class ServiceOptions:
    """What `start-services` was asked to do; see `Sandbox.start_services`."""

    def __init__(
        self,
        *,
        via: str = "git",
        build: bool = False,
        force_recreate: bool = False,
        gitignore: bool = True,
        timeout: float = UP_SECONDS,
    ) -> None:
        if via not in ("git", "sync"):
            raise UsageError(f"via is {via!r}; it must be git or sync.")
        if not 1 <= timeout <= 86400:
            raise UsageError(f"The timeout is {timeout:g} s; it must be from 1 to 86400.")
        self.via = via
        self.gitignore = gitignore
        self.timeout = timeout
        self.up = [
            *(["--build"] if build else []),
            *(["--force-recreate"] if force_recreate else []),
        ]


class ServiceStarter:
    """One `start-services`: the code to Gitea and from there to the VM, then the services one by one."""

    def __init__(self, sandbox: SandboxBase, config: Config, options: ServiceOptions) -> None:
        self.sandbox = sandbox
        self.config = config
        self.options = options
        self.reporter = sandbox.reporter
        self.services = plan_services(config)
        self.target = normal_target(default_target(sandbox.state))
        self.steps = Steps(sandbox.reporter)
        self.compose = ComposeRun(self._connect, self.target, sandbox.reporter, options.timeout)

    def run(self) -> dict[str, Any]:
        """Do it; what was done, as `Sandbox.start_services` tells it."""
        began = time.monotonic()
        report: dict[str, Any] = {"via": self.options.via, "path": self.target}
        try:
            if self.options.via == "git":
                with SyncLock(self.sandbox.directory, self.reporter, GIT_SECONDS):
                    report.update(self._bring_by_git())
            else:
                report.update(self._bring_by_sync())
            report["services"] = [self._start(service) for service in self.services]
        finally:
            self.compose.close()
        report["steps"] = self.steps.done
        report["seconds"] = round(time.monotonic() - began, 3)
        return report

    def _bring_by_sync(self) -> dict[str, Any]:
        with self.steps("sync", "Syncing the code"):
            syncer = Syncer(self.sandbox, os.path.dirname(self.config.path), None, SyncOptions())
            try:
                done = syncer.run()
            finally:
                syncer.forget()
        return {"branch": None, "commit": None, "repository": None, "changed": done["sent"] + done["removed"]}

    def _bring_by_git(self) -> dict[str, Any]:
        sandbox, state = self.sandbox, self.sandbox.state
        if not (state.get("ssh_config_path") and state.get("ssh_host")):
            raise SandboxError(
                "This sandbox has no SSH, and Gitea's credentials must not go to the VM in a command line.",
                hint=f"Bring the code over without Gitea: {PROGRAM} start-services --via sync",
            )
        with self.steps("tree", "Looking at the code"):
            tree = tree_to_push(self.config, gitignore=self.options.gitignore)
            for path, why in sorted(tree.skipped.items()):
                self.reporter.warn(f"{shown_name(path)} is left out: {why}.")
        with self.steps("connect", "Connecting to the VM"):
            way = self._open_ssh()  # goes on by itself while the code is pushed
        with self.steps("repository", "Finding the repository"):
            repository = find_repository(sandbox.api, state["service"])
        branch = f"workspace-{short_id(state['session_id'])}"
        with self.steps("push", f"Pushing {counted(len(tree.entries), 'file')}", GIT_SECONDS):
            make_home(sandbox.settings.home)
            place = git_store_path(sandbox.settings.home, state["session_id"])
            store = GitStore(place, repository, sandbox.settings, self.reporter)
            commit, is_new = store.push(tree, branch)
        with self.steps("clone", "Cloning on the VM", GIT_SECONDS):
            changed = self._clone(way, branch, commit, repository)
        return {
            "branch": branch,
            "commit": commit,
            "pushed": is_new,
            "repository": repository.clone_url,
            "changed": changed,
        }

    def _open_ssh(self) -> SshWay:
        """Begin to connect; the connection is closed with everything else."""
        repair_ssh_config(self.sandbox.state, self.sandbox.settings, self.reporter)
        way = self.compose.way = SshWay(self.sandbox, SYNC_SECONDS)
        return way

    def _clone(self, way: SshWay, branch: str, commit: str, repository: GiteaRepository) -> int:
        """The number of files that changed. A connection that broke meanwhile is opened anew, once."""
        for again in (True, False):
            try:
                way.ready()
                script = clone_script(self.target, branch, commit, repository, SYNC_SECONDS)
                outcome = way.run(script, GIT_SECONDS)
                break
            except NetworkError as error:
                if not again:
                    raise
                self.reporter.note(f"{error.message} Connecting again.")
                self.compose.close()
                way = self._open_ssh()
        failure = clone_failure(outcome, self.target, repository)
        if failure is not None:
            raise failure
        count = (outcome.stdout.split() or [b""])[-1]
        return int(count) if re.fullmatch(rb"\d{1,9}", count) else 0

    def _start(self, service: ComposeService) -> dict[str, Any]:
        words = f"Starting {service.name} ({service.file})"
        with self.steps(service.name, words, self.options.timeout):
            containers = self.compose.start(service, self.options.up)
        return {
            "name": service.name,
            "type": "docker-compose",
            "file": service.file,
            "containers": [found.told() for found in containers],
        }

    def _connect(self) -> SshWay | ApiWay:
        """SSH if the sandbox has it and it answers, else the API."""
        state = self.sandbox.state
        if state.get("ssh_config_path") and state.get("ssh_host"):
            try:
                way = self._open_ssh()
                way.ready()
            except SandboxError as error:
                self.compose.close()
                self.reporter.note(f"{error.message} Going on through the API.")
            else:
                return way
        return ApiWay(self.sandbox, SYNC_SECONDS)


def git_store_path(home: str, session_id: str) -> str:
    """Where the bare repository of a sandbox is."""
    return os.path.join(home, f"git_{short_id(session_id)}")


# ----------------------------------------------------------------------------------------------------------
# worker: what the Plato worker recorded: mutations, what they sum up to, the rules that would ignore them
# ----------------------------------------------------------------------------------------------------------

RULES_KEY = "audit_ignore_tables"
WORKER_SECONDS = 240.0
WORKER_POLL_SECONDS = 2.0
SHOWN_MUTATIONS = 50
_ACTIONS = {"insert": "inserted", "update": "updated", "delete": "deleted", "truncate": "deleted"}
_BEFORE_KEYS = ("before", "old_data", "old_values", "old_row", "old", "previous")
_AFTER_KEYS = (
    "after",
    "new_data",
    "new_values",
    "new_row",
    "new",
    "row_data",
    "data",
    "values",
    "row",
    "record",
)


class WorkerNotUpError(SandboxError):
    """The worker does not answer, so nobody knows what changed."""

    exit_code = 9
    code = "worker_not_up"


class Mutation:
    """A change of one row.

    action: INSERT, UPDATE, DELETE or what else the worker calls it; before, after: the row, {} where it is
    not known; raw: as Plato tells it.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.table = as_text(raw.get("table_name")) or as_text(raw.get("table")) or "?"
        self.action = (as_text(raw.get("action")) or as_text(raw.get("operation")) or "?").upper()
        self.before = _row(raw, _BEFORE_KEYS)
        self.after = _row(raw, _AFTER_KEYS)
        if self.action == "DELETE" and not self.before:
            self.before, self.after = self.after, {}

    @property
    def columns(self) -> list[str]:
        """The columns whose values an UPDATE changed, if both rows are known."""
        listed = self.raw.get("changed_columns") or self.raw.get("changed_fields")
        if isinstance(listed, (list, dict)):
            return [str(name) for name in listed]
        if not self.before or not self.after:
            return []
        missing = object()
        return [name for name, value in self.after.items() if self.before.get(name, missing) != value]

    def told(self) -> str:
        """The change in one line: `id=1  login_count: 3 -> 4`."""
        row = self.after or self.before
        if self.action != "UPDATE" or not self.before or not self.after:
            return ", ".join(f"{name}={_value(value)}" for name, value in row.items())
        changes = ", ".join(
            f"{name}: {_value(self.before.get(name))} -> {_value(self.after.get(name))}"
            for name in self.columns
        )
        key = f"id={_value(row['id'])}  " if "id" in row else ""
        return key + (changes or "nothing changed")


def _row(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return next((raw[name] for name in names if isinstance(raw.get(name), dict)), {})


def _value(value: Any) -> str:
    import json

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(text if len(text) <= 60 else text[:57] + "...")


def mutations_of(content: Mapping[str, Any]) -> list[Mutation]:
    """The mutations in the `state` of a job: merged if Plato does that, else listener by listener."""
    found = content.get("mutations")
    if not isinstance(found, list):
        listeners = [as_dict(part) for part in content.values()]
        found = [entry for part in listeners for entry in as_list(part.get("mutations"))]
    return [Mutation(as_dict(entry)) for entry in found]


def worker_trouble(job: Mapping[str, Any]) -> str | None:
    """Why the worker of a job cannot tell its state, in its own words; None when it can."""
    content = job.get("state")
    if not isinstance(content, dict):
        return as_text(job.get("error")) or as_text(content) or "it gave no state"
    for name in ("error", "errors"):
        said = content.get(name)
        if said:
            return printable(said if isinstance(said, str) else _value(said)).rstrip(".")
    if job.get("success") is False:
        return as_text(job.get("error")) or "it could not read its state"
    return None


def summarize(mutations: Sequence[Mutation]) -> dict[str, Any]:
    """How many rows changed: {"mutations": N, "tables": [{table, inserted, updated, deleted}]}."""
    tables: dict[str, dict[str, Any]] = {}
    for mutation in mutations:
        counts = tables.setdefault(
            mutation.table, {"table": mutation.table, "inserted": 0, "updated": 0, "deleted": 0}
        )
        kind = _ACTIONS.get(mutation.action.lower(), "other")
        counts[kind] = counts.get(kind, 0) + 1
    return {"mutations": len(mutations), "tables": [tables[name] for name in sorted(tables)]}


def counts_text(counts: Mapping[str, Any]) -> str:
    """`1 inserted, 2 updated`, of a table in a summary."""
    kinds = [name for name in counts if name != "table" and counts[name]]
    return ", ".join(f"{counts[name]} {name}" for name in kinds)


def ignore_rules(mutations: Sequence[Mutation]) -> list[Any]:
    """The `audit_ignore_tables` entries that would ignore them: columns where only those changed."""
    tables: dict[str, set[str] | None] = {}
    for mutation in mutations:
        columns = set(mutation.columns) if mutation.action == "UPDATE" else set()
        known = tables.get(mutation.table, set())
        tables[mutation.table] = known | columns if columns and known is not None else None
    return [
        name if columns is None else {"table": name, "columns": sorted(columns)}
        for name, columns in sorted(tables.items())
    ]


def mutations_found(mutations: Sequence[Mutation]) -> CheckFailedError:
    """The error of --verify-no-mutations, with the rules that would ignore them ready to paste."""
    summary = summarize(mutations)
    tables = "; ".join(f"{counts['table']} ({counts_text(counts)})" for counts in summary["tables"])
    error = CheckFailedError(f"There are {counted(len(mutations), 'mutation')}: {tables}.")
    error.hint = "If they are noise, ignore them in the `db` listener of plato-config.yml:\n\n" + rules_text(
        ignore_rules(mutations)
    )
    return error


def rules_text(entries: Sequence[Any]) -> str:
    """The rules as YAML to copy, as a person would write them and the edit of a config writes them."""
    if not entries:
        return f"{RULES_KEY}: []"
    return "\n".join([f"{RULES_KEY}:", *yaml_items("  ", entries)])


# Emptying the audit tables where the API cannot: by the database's own client, in its container. The script
# goes to the standard input of a shell on the VM, as it holds the database's password.

_CLEAR_AUDIT_BODY = r"""
if [ -z "$DOCKER_HOST" ] && [ -S /var/run/docker-user.sock ]; then
  DOCKER_HOST=unix:///var/run/docker-user.sock; export DOCKER_HOST
fi
PGPASSWORD=$password; MYSQL_PWD=$password
container=; inner=$port
if command -v docker >/dev/null 2>&1; then
  found=$(docker ps --format '{{.ID}} {{.Ports}}' 2>/dev/null | grep -- ":$port->" | head -n 1)
  container=${found%% *}
  inner=$(printf %s "$found" | sed -n "s|.*:$port->\([0-9]*\)/.*|\1|p")
fi
client() { (export PGPASSWORD MYSQL_PWD
  if [ -n "$container" ]; then docker exec -i -e PGPASSWORD -e MYSQL_PWD "$container" "$@"
  else "$@"; fi); }
where=127.0.0.1; [ -n "$container" ] || where=$host
case $kind in
postgresql) printf '%s\n' "$statement" | client psql -X -q -v ON_ERROR_STOP=1 \
  -h "$where" -p "$inner" -U "$user" -d "$database" ;;
mysql)
  program=mariadb; client sh -c 'command -v mariadb' >/dev/null 2>&1 || program=mysql
  printf '%s\n' "$statement" | client "$program" -h "$where" -P "$inner" -u "$user" -- "$database" ;;
esac
"""


class AuditTable:
    """The audit table of a `db` listener, and how to reach it from the VM."""

    def __init__(self, name: str, listener: Mapping[str, Any]) -> None:
        self.name = name
        self.kind = str(listener.get("db_type"))
        self.host = as_text(listener.get("db_host")) or "127.0.0.1"
        self.port = whole_number(listener.get("db_port")) or {"postgresql": 5432, "mysql": 3306}.get(
            self.kind, 0
        )
        self.user = as_text(listener.get("db_user")) or {"mysql": "root"}.get(self.kind, "postgres")
        self.password = as_text(listener.get("db_password")) or ""
        self.database = str(listener.get("db_database"))
        self.schema = as_text(listener.get("db_schema")) or as_text(listener.get("schema_name")) or "public"
        self.table = as_text(listener.get("audit_table_name")) or "audit_log"

    def script(self) -> str:
        """Empties the table. To be read from standard input, never an argument."""
        if self.kind not in ("postgresql", "mysql"):
            raise SandboxError(
                f"The audit table of {self.name!r} ({self.kind}) can only be emptied by the Plato worker."
            )
        values = assigned(
            kind=self.kind,
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            database=self.database,
            statement=self._statement(),
        )
        return values + _CLEAR_AUDIT_BODY

    def _statement(self) -> str:
        if self.kind == "mysql":
            return "TRUNCATE TABLE `{}`;".format(self.table.replace("`", "``"))
        schema, table = (name.replace('"', '""') for name in (self.schema, self.table))
        return f'TRUNCATE TABLE "{schema}"."{table}";'


def audit_tables(dataset: Mapping[str, Any]) -> list[AuditTable]:
    """The audit tables of a dataset's `db` listeners."""
    listeners = as_dict(dataset.get("listeners"))
    return [AuditTable(str(name), part) for name, part in listeners.items() if part.get("type", "db") == "db"]


# ----------------------------------------------------------------------------------------------------------
# flow: where the flows are, what must not be read, the steps in a browser, and the report
# ----------------------------------------------------------------------------------------------------------
# Playwright works in a thread with an event loop of its own, so that a signal finds the main thread in
# Python code, and an importer's own event loop is none of its business. Its driver ends the browser when
# this process ends, however it ends. Texts of pages and flows pass the mask before anybody sees them.

FLOW_SECONDS = 600.0
FLOW_OUTPUT = "test-results"
FLOW_PATIENCE_MS = 30000  # for a page to open, and for an element that is there to let itself be used
FLOW_GRACE_SECONDS = 3.0  # what a step may take longer than all that, before its page counts as hung
FLOW_LOOK_SECONDS = 5.0  # for a picture, or a look at a page that just failed
FLOW_CLOSE_SECONDS = 8.0  # for the browser to end in order
FLOW_POLL_SECONDS = 0.05
PICTURE_FRESH_SECONDS = 0.15  # a check that passes this soon shows what the picture before it shows
FLOW_FOREVER_MS = 86400000  # a step whose timeout is 0
TROUBLE_LIMIT = 20
ERROR_SELECTORS = (
    *(".error", ".alert-danger", ".alert-error", "[role='alert']", ".error-message"),
    ".validation-error",
)
INSTALLED_BROWSERS = (
    *("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
HIDDEN = "***"
LONGEST_PLAIN_WORD = 5  # such as admin, demo, guest


# Where the flows are


def find_flows(sandbox: SandboxBase, source: str | None = None) -> FlowSet:
    """The flows of the sandbox's own config, else of its directory's config, else those that Plato has.

    source: "local" or "api" for one of them only. ConfigError for flows with problems.
    """
    path = None if source == "api" else local_flows_path(sandbox)
    if path is not None:
        return load_flows(path)
    if source == "local":
        raise ConfigError(
            f"{shown_path(sandbox.directory)} has no {CONFIG_NAMES[0]} with `metadata.flows_path`.",
            hint="Name the flows file there, or take the flows that Plato has: --api",
        )
    return fetch_flows(sandbox)


def local_flows_path(sandbox: SandboxBase) -> str | None:
    """The flows file that the local config names for the sandbox's dataset; None without one."""
    beside = [os.path.join(sandbox.directory, name) for name in CONFIG_NAMES]
    recorded = sandbox.state.get("plato_config_path") or ""
    config = next(filter(os.path.isfile, [recorded, *beside]), None)
    return config and configured_flows_path(config, sandbox.state.get("dataset") or DEFAULT_DATASET)


def fetch_flows(sandbox: SandboxBase) -> FlowSet:
    """The flows that Plato has for the sandbox's job, or else for its artifact."""
    found: Any = None
    sandbox.reporter.step("Fetching the flows")
    for name, ask in (("job_id", sandbox.api.job_flows), ("artifact_id", sandbox.api.artifact_flows)):
        try:
            found = found or (sandbox.state.get(name) and ask(sandbox.state[name]))
        except ApiError as error:
            if error.status not in (404, 405, 501):
                raise
        while isinstance(found, dict):  # bare, or under `flows` or `data`
            found = found["data"] if isinstance(found.get("data"), dict) else found.get("flows")
    if not found:
        raise ConfigError(
            "Plato has no flows for this sandbox.",
            hint=f"Name a flows file in {CONFIG_NAMES[0]} (`metadata.flows_path`) and use --local.",
        )
    text = found if isinstance(found, str) else yaml_dump({"flows": found})
    return parse_flows(text, "the flows that Plato has", placed=False)


# What a flow changed


def new_mutations(before: Sequence[Mutation], after: Sequence[Mutation]) -> list[Mutation]:
    """What is in the second list and not in the first, each as often as it is there more often."""
    left = [mutation.raw for mutation in before]
    found = []
    for mutation in after:
        if mutation.raw in left:
            left.remove(mutation.raw)
        else:
            found.append(mutation)
    return found


def mutation_words(mutations: Sequence[Json]) -> str:
    """What was changed, counted: "activity (1 inserted); users (2 updated)"; "none" for nothing."""
    tables = summarize([Mutation(raw) for raw in mutations])["tables"]
    return "; ".join(f"{counts['table']} ({counts_text(counts)})" for counts in tables) or "none"


# What must not be read


# Where a text is a value: of a field in a page or a request (JSON, form), or of the call that fills it.
_VALUE_PLACE = (
    r"""(\\*"(?!(?:type|name|id|for|class|autocomplete)\\*")[\w.\[\]-]+\\*":\s*\\*"|\bvalue=\\*["']"""
    r"""|\bfill\(\\*"|[?&][\w.%\[\]-]+=|name=\\*"[^"\\]*\\*"(?:\\r\\n|\r\n)+)(?:{})(?=\\*["'\r]|&|\s|$)"""
)
_ANYWHERE = "()(?:{})"


class Mask:
    """Hides the values of password fields in texts, in each spelling that they have in HTML, addresses, JSON.

    said: what can be read anyway, such as selectors and addresses. A word of it, or a value that is too short
    or too plain, is hidden only where it stands as a value: elsewhere that would make nonsense of other words
    and tell what it is.
    """

    def __init__(self, said: str) -> None:
        self._said = said.lower()
        self._patterns: dict[str, re.Pattern[str]] = {}

    def add(self, value: str) -> None:
        """Hide a value from now on."""
        if not value:
            return
        is_word = value.isalpha() and (len(value) <= LONGEST_PLAIN_WORD or value.lower() in self._said)
        pattern = _VALUE_PLACE if is_word or len(value) < SHORTEST_SECRET else _ANYWHERE
        longest_first = sorted(spellings(value), key=len, reverse=True)
        self._patterns[value] = re.compile(pattern.replace("{}", "|".join(map(re.escape, longest_first))))

    def __call__(self, text: str) -> str:
        for value in sorted(self._patterns, key=len, reverse=True):
            text = self._patterns[value].sub(rf"\1{HIDDEN}", text)
        return text

    def value(self, thing: Any) -> Any:
        """A value for JSON with every text in it masked."""
        if isinstance(thing, dict):
            return {key: self.value(part) for key, part in thing.items()}
        if isinstance(thing, list):
            return [self.value(part) for part in thing]
        return self(thing) if isinstance(thing, str) else thing


def spellings(value: str) -> set[str]:
    """How a text may be written in an address, in HTML and in JSON (once and twice encoded)."""
    import html
    import json
    import urllib.parse

    found = {value, html.escape(value), html.escape(value, quote=False)}
    found |= {urllib.parse.quote(value, safe=""), urllib.parse.quote(value), urllib.parse.quote_plus(value)}
    found |= {text.replace("%20", "+") for text in found}
    for _ in range(2):
        found |= {json.dumps(text, ensure_ascii=escape)[1:-1] for text in found for escape in (True, False)}
    return found


def looks_secret(step: FlowStep) -> bool:
    """Whether a fill step is for a password, by its own words."""
    words = f"{step.values['selector']} {step.description}"
    return re.search(r"passw|passphrase|\bpwd|secret", words, re.IGNORECASE) is not None


def mask_of(flows: Sequence[Flow], said: str) -> Mask:
    """The mask of a run, with the values of those fields that are for passwords by their own words."""
    steps = [step for flow in flows for step in flow.steps]
    for step in steps:
        said += " ".join(
            str(text) for name, text in step.values.items() if name not in ("value", "description")
        )
    mask = Mask(said)
    for step in steps:
        if step.type == "fill" and looks_secret(step):
            mask.add(str(step.values["value"]))
    return mask


def mask_trace(source: str, target: str, mask: Mask) -> None:
    """Copy a trace with the values of password fields hidden in every file that is in it."""
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            text = "&" + old.read(entry).decode("utf-8", "surrogateescape")  # it may be the fields of a form
            new.writestr(entry.filename, mask(text)[1:].encode("utf-8", "surrogateescape"))


# The steps


# What each type acts on; what is expected (behind the bar: with `should_exist: false` or `contains: false`);
# and what is done, with Playwright's own waiting. It raises where it does not come true.
STEPS: dict[str, tuple[str, str, Callable[[FlowRun, Json], Any]]] = {
    "navigate": ("{url}", "{url} to open", lambda run, at: run.page.goto(run.absolute(at["url"]))),
    "wait_for_selector": (
        "{selector}",
        "a visible element {selector}",
        lambda run, at: run.page.wait_for_selector(at["selector"]),
    ),
    "click": (
        "{selector}",
        "an element {selector} that can be clicked",
        lambda run, at: run.page.click(at["selector"], timeout=run.patience),
    ),
    "fill": (
        "{selector}",
        "a field {selector} that can be filled",
        lambda run, at: run.page.fill(at["selector"], str(at["value"]), timeout=run.patience),
    ),
    "wait": (
        "{duration} ms",
        "{duration} ms to pass",
        lambda run, at: run.page.wait_for_timeout(whole_number(at["duration"])),
    ),
    "wait_for_url": (
        "{url_contains}",
        "an address with {url_contains!r}",
        lambda run, at: run.expect(run.page).to_have_url(matching(at["url_contains"], at)),
    ),
    "check_element": (
        "{selector}",
        "an element {selector}|no element {selector}",
        lambda run, at: run.expect(run.first(at)).to_be_attached(
            attached=at.get("should_exist") is not False
        ),
    ),
    "element_exists": (
        "element_exists {selector}",
        "an element {selector}",
        lambda run, at: run.expect(run.first(at)).to_be_attached(),
    ),
    "element_visible": (
        "element_visible {selector}",
        "a visible element {selector}",
        lambda run, at: run.expect(run.first(at)).to_be_visible(),
    ),
    "element_text": (
        "element_text {selector} {text}",
        "{selector} with the text {text!r}|{selector} to be the text {text!r}",
        lambda run, at: run.element_text(at),
    ),
    "element_count": (
        "element_count {selector} {count}",
        "{count} elements {selector}",
        lambda run, at: run.expect(run.page.locator(at["selector"])).to_have_count(whole_number(at["count"])),
    ),
    "page_title": (
        "page_title {title}",
        "a page title with {title!r}|a page title equal to {title!r}",
        lambda run, at: run.expect(run.page).to_have_title(matching(at["title"], at)),
    ),
    "verify_text": (
        "{text}",
        "a page with the text {text!r}|a page without the text {text!r}",
        lambda run, at: run.page_text(at),
    ),
    "verify_url": (
        "{url}",
        "the address to contain {url!r}|the address to be {url!r}",
        lambda run, at: run.expect(run.page).to_have_url(matching(at["url"], at)),
    ),
    "verify_no_errors": ("", "no visible error on the page", lambda run, at: run.no_errors(at)),
    "screenshot": ("{filename}", "a screenshot {filename}", lambda run, at: run.screenshot(at)),
    "switch_page": (
        "{page_index}",
        "a page with the index {page_index}",
        lambda run, at: run.switch_page(int(at["page_index"])),
    ),
    "execute_script": ("{script}", "the script to end without an error", lambda run, at: run.script(at)),
}


def step_kind(step: FlowStep) -> tuple[str, str, Any]:
    """The entry of a step in the table."""
    return STEPS[step.values["verify_type"] if step.type == "verify" else step.type]


def matching(text: str, values: Json) -> re.Pattern[str]:
    """What contains a text, or with `contains: false` equals it."""
    return re.compile(f"^{re.escape(text)}$" if values.get("contains") is False else re.escape(text))


def squeezed(text: str) -> str:
    """A text as it is read, whatever its line breaks and margins."""
    return " ".join(text.split())


def expectation(step: FlowStep) -> str:
    """What a step waits for, as the end of "Expected ..."."""
    forms = step_kind(step)[1].split("|")
    negative = False in (step.values.get("should_exist"), step.values.get("contains"))
    return forms[-1 if negative else 0].format_map(step.values)


def step_words(step: Json) -> str:
    """A step's own description, or what it does."""
    return step["description"] or f"{step['type']} {step['target']}".rstrip()


def step_record(step: FlowStep) -> Json:
    """What is told of a step before it ran; a filled value is not in it."""
    return {
        "number": step.number,
        "type": step.type if step.number else "open",
        "description": step.description,
        "target": step_kind(step)[0].format_map(step.values)[:200],
        "place": step.place or None,
        "status": "skipped",
        "seconds": 0.0,
        "attempts": 0,
        "url": None,
        "note": "",
        "expected": None,
        "seen": None,
        "picture": None,
    }


# Lines in which Playwright says that a wait was in vain; lines of its call log that do not say why.
_IN_VAIN = (
    r"[\w. :]*(Timeout \d+ms exceeded|expected (not )?to |Actual value|element\(s\) not found|==|waiting)"
)
_NOT_WHY = r"attempting|retrying|waiting (\d|for element)|scrolling|done scroll|navigating|Expect |fill\(|$"


def seen_words(error: Exception) -> str:
    """What Playwright says of a failure, for people: its first line, or why a wait was in vain."""
    text = getattr(error, "strerror", None) or str(error)
    said, _, log = text.partition("Aria snapshot")[0].partition("Call log:")
    lines = [line for line in said.splitlines() if line and not re.match(_IN_VAIN, line)]
    if lines:
        words = re.sub(r"^(\w+\.\w+: )?(\w*Error: )?", "", lines[0])
        return re.sub(r"net::ERR_\w+", lambda code: code[0][9:].lower().replace("_", " "), words)[
            :500
        ].strip()
    lines = [re.sub(r"^[\s-]*(\d+ . )?", "", line) for line in log.splitlines()]
    words = ([line for line in lines if not re.match(_NOT_WHY, line)] or ["it was not done in time"])[-1]
    return "nothing was found in time" if words.startswith("waiting for loc") else words[:500]


def screenshot_path(folder: str, name: str, now: float) -> str:
    """Where a screenshot step saves its picture: prefixed with the time in milliseconds; never outside."""
    directory, base = os.path.split(os.path.normpath(name))
    base += "" if base.lower().endswith((".png", ".jpg", ".jpeg")) else ".png"
    path = os.path.join(folder, directory, f"{int(now * 1000)}_{base}")
    real, top = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, top]) != top:
        raise AssertionError(f"{name!r} would lie outside of {shown_path(folder)}")
    return path


# A run


def check_flow_options(base_url: str | None, slowmo: float, timeout: float, unseen: bool) -> None:
    """UsageError for what makes no sense. unseen: whether a window is to stay open that nobody sees."""
    for wrong, words in (
        (not 0 <= slowmo <= 60000, f"--slowmo is {slowmo:g}; it must be from 0 to 60000."),
        (not 1 <= timeout <= 86400, f"--timeout is {timeout:g}; it must be from 1 to 86400."),
        (
            base_url is not None and not re.fullmatch(r"https?://[^\s/?#]\S*", base_url),
            f"--base-url is {base_url!r}, which is not the address of a page such as http://127.0.0.1:8080.",
        ),
        (unseen, "--keep-open needs --headed and a display: nobody sees a browser without a window."),
    ):
        if wrong:
            raise UsageError(words)


def has_display(environment: Mapping[str, str]) -> bool:
    """Whether a window can be shown (X11 or Wayland; a Mac has one)."""
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def chosen_browser(settings: Settings) -> str | None:
    """The executable that PLATO_BROWSER names, checked; None without that variable."""
    path = settings.browser and find_program(os.path.expanduser(settings.browser))
    if settings.browser and not path:
        raise UsageError(f"PLATO_BROWSER is {settings.browser!r}, which is no program that can be run.")
    return path


class FlowFailedError(CheckFailedError):
    """A flow did not come true."""

    code = "flow_failed"


class FlowSession:
    """What the flows of one run share: the browser, driven by Playwright in a thread with an event loop of
    its own, from `open` to `close`; the address that they begin at; where their files go; the time they have.
    """

    def __init__(
        self,
        sandbox: SandboxBase,
        known: FlowSet,
        flows: list[Flow],
        address: str,
        output: str,
        *,
        seconds: float,
        keep_open: bool,
    ) -> None:
        import asyncio
        import tempfile

        self.reporter = sandbox.reporter
        self.flows = flows
        self.address = address
        self.mask = mask_of(flows, address)
        folder = os.path.dirname(os.path.abspath(known.path)) if known.path else sandbox.directory
        self.screenshots = os.path.join(folder, "screenshots")
        self.output = os.path.join(sandbox.directory, output)
        try:
            os.makedirs(self.output, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The report cannot be written to {shown_path(self.output)}: {reason(error)}.",
                hint="Name another directory: --output DIR",
            ) from None
        self.seconds = seconds
        self.ends = 0.0  # by the monotonic clock
        self.keep_open = keep_open
        self.folder = tempfile.TemporaryDirectory(prefix="plato-flow-")  # for traces that are not masked yet
        self.timed_out = False
        self.expect: Any = None
        self.browser: Any = None
        self._playwright: Any = None
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # of answers for which nobody waits any more
        self._thread = Aside(self._serve)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def left(self) -> float:
        """The seconds that are left."""
        return max(0.0, self.ends - time.monotonic())

    def wait(self, work: Any, seconds: float | None = None) -> Any:
        """What a coroutine gives that runs in the thread. AssertionError when it is not done in time."""
        import asyncio
        import concurrent.futures

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            raise AssertionError("the page did not answer") from None
        finally:
            future.cancel()

    def look(self, work: Any, seconds: float = FLOW_LOOK_SECONDS) -> Any:
        """What a look at a page gives, or None when the page does not answer or has gone."""
        try:
            return self.wait(work, seconds)
        except Exception:  # noqa: BLE001  (a page in any state; what was looked for is told as missing)
            return None

    async def open(self, executable: str | None, *, headed: bool, slowmo: float) -> None:
        """Open the browser. SandboxError with the command for what is missing."""
        import logging

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
        environment = child_environment(os.environ)
        secrets = {name: os.environ.pop(name) for name in set(os.environ) - set(environment)}
        try:
            try:
                self._playwright = await async_playwright().start()
            finally:
                os.environ.update(secrets)
            chromium = self._playwright.chromium
            if executable is None and not os.path.exists(chromium.executable_path):
                executable = next(filter(None, map(find_program, INSTALLED_BROWSERS)), None)
            self.browser = await chromium.launch(
                executable_path=executable,
                headless=not headed,
                slow_mo=slowmo,
                env=environment,
                traces_dir=self.folder.name,
            )
        except Exception as error:  # noqa: BLE001  (the driver or the browser failed in any way)
            raise SandboxError(
                f"The browser could not be opened: {seen_words(error)}. This brings one:"
                f" {python} playwright install --with-deps chromium"
                " (or install Chrome or Chromium, or set PLATO_BROWSER to the path of one)"
            ) from None

    def run(self, told: FlowListener) -> list[Json]:
        """Run the flows, as long as there is time. Returns a result each, as `Sandbox.flow` tells them."""
        results: list[Json] = []
        places: set[str] = set()
        self.ends = time.monotonic() + self.seconds
        for flow in self.flows:
            if self.timed_out:
                break
            place = os.path.join(self.output, flow_file_name(self.mask(flow.name)))
            while place in places:
                place += "-2"
            places.add(place)
            os.makedirs(place, exist_ok=True)
            for name in os.listdir(place):
                if re.fullmatch(r"step-\d+\.(jpg|png)|trace\.zip", name):
                    os.unlink(os.path.join(place, name))
            run = FlowRun(self, flow, place)
            results.append(run.result)
            run.run(lambda result, step: told(self.mask.value(result), self.mask.value(step)))
            if flow is not self.flows[-1] and not self.keep_open:
                self.look(run.close())
        return results

    def stay_open(self) -> None:
        """Wait until the user closes the window or presses Ctrl-C, which is no failure here."""
        import signal

        try:
            self.reporter.note("The browser stays open; close it or press Ctrl-C to end.")
            while self.browser.is_connected():
                time.sleep(FLOW_POLL_SECONDS)
        except Interrupted as interruption:
            if interruption.number != signal.SIGINT:
                raise

    def close(self) -> None:
        """End the browser, its driver and the thread."""
        if self._playwright is not None:
            self.look(self._playwright.stop(), FLOW_CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.wait(FLOW_CLOSE_SECONDS)
        self.folder.cleanup()


_PRIVATE_FIELD = "e => e.type === 'password' || /password/.test(e.autocomplete || '')"
_STATE_OF_PAGE = """() => {
  const entry = performance.getEntriesByType("navigation")[0] || {};
  const lines = (document.body ? document.body.innerText : "").split("\\n");
  return [location.protocol === "chrome-error:" ? entry.name : location.href, entry.responseStatus || 0,
    lines.map(line => line.trim().replace(/\\s+/g, " ")).filter(line => line).join("\\n").slice(0, 4000)];
}"""


class FlowRun:
    """One flow in a browser context of its own; `result` is what `Sandbox.flow` tells of it, as it grows."""

    def __init__(self, session: FlowSession, flow: Flow, place: str) -> None:
        self.session = session
        self.place = place
        self.steps = [FlowStep(0, {"type": "navigate", "url": session.address}, ""), *flow.steps]
        self.result: Json = {
            "name": flow.name,
            "description": flow.description,
            "passed": True,
            "seconds": 0.0,
            "steps": list(map(step_record, self.steps)),
            "failure": None,
            "trace": None,
            "trace_command": None,
        }
        self.expect: Any = session.expect
        self.context: Any = None
        self.page: Any = None
        self.limit: int = 0  # ms, for each thing that a step waits for
        self.patience: int = 0  # ms, for what it then does
        self._note = ""
        self._shown: str | None = None  # the newest picture
        self._covered: list[str] = []  # selectors of fields that no picture may show
        self._troubles: list[str] = []

    def run(self, told: FlowListener) -> None:
        """Run it to its end, and tell of each step that ended, and of the end."""
        began = time.monotonic()
        for step, record in zip(self.steps, self.result["steps"]):
            self._run_step(step, record)
            self.result["seconds"] = round(time.monotonic() - began, 3)
            told(self.result, record)
            if not self.result["passed"]:
                break
        told(self.result, None)

    def _run_step(self, step: FlowStep, record: Json) -> None:
        session = self.session
        # The description of a fill step may hold a password that is not known as one yet.
        words = f"fill {record['target']}" if step.type == "fill" else step_words(record)
        total = len(self.steps) - 1
        session.reporter.step(session.mask(f"{self.result['name']}: {step.number}/{total} {words}"))
        began = time.monotonic()
        seen = self._try(step, record)
        record.update(
            status="failed" if seen else "passed",
            seconds=round(time.monotonic() - began, 3),
            url=getattr(self.page, "url", None),
            note=self._note,
        )
        left_at_once = not step.number and self.steps[1].type == "navigate"
        looked_only = step.type.startswith(("verify", "check_", "wait_for_", "screenshot"))
        if seen or not (left_at_once or (looked_only and record["seconds"] < PICTURE_FRESH_SECONDS)):
            path = os.path.join(self.place, f"step-{step.number:02d}.{'png' if seen else 'jpg'}")
            self._shown = session.look(self._picture(path, timeout=FLOW_LOOK_SECONDS * 1000)) and path
        record["picture"] = self._shown
        if seen:
            self._fail(step, record, seen)

    def _try(self, step: FlowStep, record: Json) -> str:
        """Try a step as often as it says; "" when it passed, else what was seen instead."""
        session = self.session
        self.limit = self.patience = (step.type != "wait" and step.timeout) or FLOW_FOREVER_MS
        if step.values.get("timeout") is None:
            self.patience = max(self.limit, FLOW_PATIENCE_MS)
        longest = (self.limit + self.patience) / 1000 + FLOW_GRACE_SECONDS
        seen = ""
        for attempt in range(1, step.retries + 2):
            if seen:
                time.sleep(min(step.retry_delay_ms / 1000, session.left()))
            record["attempts"] = attempt
            try:
                session.wait(self._perform(step), min(longest, session.left()))
                return ""
            except Exception as error:  # noqa: BLE001  (Playwright's, AssertionError, of a file, of an address)
                seen = seen_words(error)
            if not session.left():
                session.timed_out = True
                return f"the {session.seconds:g} s for the whole run were over"
        return seen

    async def _perform(self, step: FlowStep) -> None:
        """One attempt at a step. What it says of time holds for each thing that it waits for."""
        if self.page is None:
            await self._open()
        values, self._note = step.values, ""
        self.context.set_default_timeout(self.limit)
        self.context.set_default_navigation_timeout(self.patience)
        self.expect.set_options(timeout=self.limit)
        if step.type in ("click", "fill"):
            await self.page.wait_for_selector(values["selector"])
        if step.type == "fill" and (
            looks_secret(step) or await self.page.eval_on_selector(values["selector"], _PRIVATE_FIELD)
        ):
            self.session.mask.add(str(values["value"]))
            self._covered.append(values["selector"])
        await step_kind(step)[2](self, values)

    async def close(self) -> None:
        """Close its pages."""
        await self.context.close()

    async def _open(self) -> None:
        """A first page, listened to."""
        self.context = context = await self.session.browser.new_context()
        await context.tracing.start(snapshots=True)
        context.on("response", self._heard)
        context.on("requestfailed", self._missed)
        context.on("weberror", lambda error: self._trouble(f"script error: {error.error}"))
        context.on("dialog", self._dialog)
        self.page = await context.new_page()

    def _trouble(self, text: str) -> None:
        if len(self._troubles) < TROUBLE_LIMIT and text not in self._troubles:
            self._troubles.append(text)

    def _heard(self, response: Any) -> None:
        if response.status >= 400:
            self._trouble(f"{response.request.method} {response.url}: HTTP {response.status}")

    def _missed(self, request: Any) -> None:
        """Note a request without an answer, unless the page itself gave it up, as on the way to another."""
        if "ERR_ABORTED" not in (request.failure or ""):
            self._trouble(f"{request.method} {request.url}: no answer")

    async def _dialog(self, dialog: Any) -> None:
        """Do with a dialog what Playwright does when nobody listens, and tell its words."""
        self._trouble(f"{dialog.type}: {dialog.message!r} (closed)")
        await (dialog.accept() if dialog.type == "beforeunload" else dialog.dismiss())

    # Steps that are more than one call of Playwright

    def absolute(self, url: str) -> str:
        """An address as seen from the page."""
        import urllib.parse

        here = self.page.url if self.page.url.startswith("http") else self.session.address
        return urllib.parse.urljoin(here, url)

    def first(self, values: Json) -> Any:
        """The first element that a selector matches, when it is asked for."""
        return self.page.locator(values["selector"]).first

    async def element_text(self, values: Json) -> None:
        """The text of an element, as it stands in the page or as a person sees it."""
        expected = self.expect(self.first(values))
        check = expected.to_have_text if values.get("contains") is False else expected.to_contain_text
        try:
            await check(values["text"], use_inner_text=True, timeout=1)
        except AssertionError:
            await check(values["text"])

    async def page_text(self, values: Json) -> None:
        """A text in the page's HTML, or in what a person sees of it."""
        import asyncio

        wanted, there = squeezed(values["text"]), values.get("should_exist") is not False
        ends = time.monotonic() + self.limit / 1000
        while True:
            texts = [await self.page.inner_html(":root"), await self.page.inner_text(":root")]
            if any(wanted in squeezed(text) for text in texts) is there:
                return
            if time.monotonic() >= ends:
                raise AssertionError(f"the text is {'not there' if there else 'there'}")
            await asyncio.sleep(FLOW_POLL_SECONDS)

    async def no_errors(self, values: Json) -> None:
        """Looked at once: an error that is there counts, even if it is to vanish."""
        await self.page.wait_for_load_state("domcontentloaded")
        for selector in values.get("error_selectors") or ERROR_SELECTORS:
            visible = self.page.locator(selector).locator("visible=true")
            for text in filter(None, map(squeezed, await visible.all_inner_texts())):
                raise AssertionError(f"{selector} says {text[:300]!r}")

    async def screenshot(self, values: Json) -> None:
        """A picture for the user's own folder."""
        path = screenshot_path(self.session.screenshots, values["filename"], time.time())
        await self._picture(path, full_page=bool(values.get("full_page")))
        self._note = from_here(path)

    async def switch_page(self, index: int) -> None:
        """Go on in another page, which may still be about to open."""
        while index >= len(self.context.pages):
            await self.context.wait_for_event("page")
        self.page = self.context.pages[index]
        await self.page.bring_to_front()
        await self.page.wait_for_load_state("domcontentloaded")

    async def script(self, values: Json) -> None:
        """A script, whose value becomes the note of the step."""
        result = await self.page.evaluate(values["script"])
        self._note = "" if result is None else f"result: {result!r}"[:200]

    # What is kept

    async def _picture(self, path: str, **options: Any) -> Any:
        """Take a picture in which a password that can be read is covered."""
        page, readable = self.page, self.page.locator(":not([type=password])")
        covered = [page.locator(selector).and_(readable) for selector in self._covered]
        if path.endswith(".jpg"):
            options["quality"] = 60
        return await page.screenshot(path=path, mask=covered, mask_color="#8a8f98", **options)

    async def _stop_trace(self, path: str) -> None:
        await self.context.tracing.stop(path=path)

    async def _state(self) -> Json:
        """The address, the HTTP status and the visible text of the page; a page can say anything."""
        url, status, text = await self.page.evaluate(_STATE_OF_PAGE)
        return {"url": str(url), "http_status": int(status) or None, "text": str(text)}

    def _fail(self, step: FlowStep, record: Json, seen: str) -> None:
        """Note a failed step and what can be seen of its page, and keep the trace."""
        session, result = self.session, self.result
        if step.type == "fill":
            session.mask.add(str(step.values["value"]))  # it may be a password; nobody can tell
        record.update(expected=expectation(step), seen=seen)
        result["passed"] = False
        result["failure"] = {
            "step": step.number,
            **{name: record[name] for name in ("type", "place", "expected", "seen", "picture")},
            **(session.look(self._state()) or {"url": record["url"], "http_status": None, "text": ""}),
            "troubles": self._troubles,
        }
        whole, path = (os.path.join(place, "trace.zip") for place in (session.folder.name, self.place))
        session.look(self._stop_trace(whole), 4 * FLOW_CLOSE_SECONDS)
        if os.path.exists(whole):
            mask_trace(whole, path, session.mask)
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
h1.failed::before, .index .failed::before { content: "✗ "; color: var(--bad); }
h2 { font-size: 1.15rem; margin: 0; }
code, .text, .Trace { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
header { margin-bottom: 1.75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.1rem; margin: 1rem 0 0;
  font-size: .93rem; }
dt { color: var(--dim); } dd { margin: 0; min-width: 0; white-space: pre-wrap; }
.text, .Trace { background: var(--code); border-radius: 6px; padding: .5rem .75rem; max-height: 18rem;
  overflow: auto; }
.Seen { color: var(--bad); }
.index { list-style: none; padding: 0; margin: 1rem 0 0; columns: 16rem; }
.index:empty, .failure:empty, .head p:empty, .words :empty { display: none; }
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
.verdict::first-letter { text-transform: uppercase; }
section.failed .verdict { color: var(--bad); }
details:not([open]) > .head .verdict::after { content: " ▸"; }
.failure { background: var(--bad-ground); border-top: 1px solid var(--line); padding: 1rem 1.25rem 1.15rem;
  margin: 0; }
ol { list-style: none; margin: 0; padding: 0; }
.step { border-top: 1px solid var(--line); }
.step summary { display: grid; grid-template-columns: 1.6rem 1fr max-content 8rem; gap: 0 .9rem;
  align-items: center; padding: .55rem 1.25rem; min-height: 3.4rem; }
.number, .time { color: var(--dim); text-align: right; font-variant-numeric: tabular-nums; font-size: .9rem; }
.words { min-width: 0; }
.words > * { display: block; color: var(--dim); font-size: .84rem; font-weight: 400; margin-top: .1rem; }
.words code { font-size: .76rem; }
.words b { color: var(--bad); font-size: .9rem; }
img { display: block; width: 8rem; height: 4.5rem; object-fit: cover; object-position: top;
  border-radius: 4px; border: 1px solid var(--line); cursor: zoom-in; }
[open] > summary > img { grid-column: 1 / -1; width: 100%; height: auto; margin: .7rem 0 .45rem;
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
  [open] > summary > img { grid-row: 3; }
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
<header><h1 class="{verdict}">{title}</h1>
<dl>{facts}</dl>
<ul class="index">{index}</ul>
</header>
{flows}
<footer>A click on a flow shows its steps, and on a step its picture in full.
Made by plato-sandbox {version}.</footer>
</main>
</body>
</html>
"""
REPORT_INDEX = '<li class="{verdict}"><a href="#{number}">{name}</a></li>'
REPORT_FACT = '<dt>{name}</dt><dd class="{name}">{value}</dd>'
REPORT_FLOW = """\
<section id="{number}" class="{verdict}"><details{open}><summary class="head"><h2>{name}</h2>
<span class="verdict">{verdict} in {time}</span><p>{description}</p></summary>
<dl class="failure">{facts}</dl><ol>{lines}</ol></details></section>
"""
REPORT_STEP = """\
<li class="step {status}"><details{open}><summary><span class="number">{number}</span>
<span class="words">{words}<code>{what}</code><small>{note}</small><b>{seen}</b></span>
<span class="time">{time}</span>{image}</summary></details></li>
"""
REPORT_IMAGE = '<img alt="The page after this step" src="data:image/{kind};base64,{data}">'
FAILURE_FACTS = {
    "Step": "step",
    "Place": "place",
    "Expected": "expected",
    "Seen": "seen",
    "Address": "url",
    "HTTP status": "http_status",
    "Page text": "text",
    "Also seen": "troubles",
    "Trace": "trace_command",
}


class Html(str):
    """A text that is HTML already."""


def markup(template: str, **values: Any) -> Html:
    """A template with texts in it, which become HTML unless they are it already; nothing for 0 and None."""
    import html

    for name, value in values.items():
        if not isinstance(value, Html):
            lines = map(printable, str(value or "").split("\n"))
            values[name] = html.escape("\n".join(lines))
    return Html(template.format_map(values))


def markups(template: str, items: Iterable[Json]) -> Html:
    """A template once for each item, one after the other."""
    return Html("".join(markup(template, **item) for item in items))


def facts(pairs: Mapping[str, Any]) -> Html:
    return markups(REPORT_FACT, ({"name": name, "value": value} for name, value in pairs.items() if value))


def report_page(report: Json) -> str:
    """The whole report as one page of HTML that needs nothing else. report: as `Sandbox.flow` tells it."""
    browser, mutations = report["browser"], report["mutations"]
    started = report["started_at"][:16].replace("T", ", ")
    flows = [report_flow(number, flow) for number, flow in enumerate(report["flows"], 1)]
    alone = len(flows) == 1
    failed = sum(not flow["passed"] for flow in flows)
    title = f"{failed} of {len(flows)} flows failed" if failed else f"All {len(flows)} flows passed"
    if alone:
        title = f"The flow {flows[0]['name']} {verdict(flows[0])}"
    if not report["passed"] and not failed:
        title += ", but the databases changed"
    about = {
        "Page": report["address"],
        "Flows": report["flows_path"] or "from Plato",
        "Browser": f"{browser['name']} {browser['version']}, {'headed' if browser['headed'] else 'headless'}",
        "Run": f"{started} UTC, {duration_words(report['seconds'])}",
        "Mutations": mutations is not None and mutation_words(mutations),
    }
    return markup(
        REPORT_PAGE,
        title=title,
        style=Html(REPORT_STYLE),
        verdict=verdict(report),
        facts=facts(about),
        index=markups(REPORT_INDEX, [] if alone else flows),
        flows=markups(REPORT_FLOW, [{**flow, "open": " open"} for flow in flows] if alone else flows),
        version=__version__,
    )


def verdict(result: Json) -> str:
    return "passed" if result["passed"] else "failed"


def duration_words(seconds: float) -> str:
    """A measured time, as short as it may be: 14 ms, 2.3 s, 4 min."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds / 60:.0f} min"


def report_flow(number: int, flow: Json) -> Json:
    """One flow for its template: its verdict, what is known of its failure, and its steps."""
    known = {**(flow["failure"] or {}), "trace_command": flow["trace_command"]}
    known["troubles"] = "\n".join(known.get("troubles", ()))
    if flow["failure"]:
        known["step"] = f"{known['step'] or ''} {step_words(flow['steps'][known['step']])}".strip()
    return {
        **flow,
        "number": number,
        "verdict": verdict(flow),
        "open": "" if flow["passed"] else " open",
        "time": duration_words(flow["seconds"]),
        "facts": facts({label: known.get(name) for label, name in FAILURE_FACTS.items()}),
        "lines": markups(REPORT_STEP, map(report_step, flow["steps"])),
    }


def report_step(step: Json) -> Json:
    """One step for its template: a line that unfolds its picture."""
    import base64

    image, failed = Html(), step["status"] == "failed"
    if step["picture"] and os.path.exists(step["picture"]):
        with open(step["picture"], "rb") as file:
            data = base64.b64encode(file.read()).decode()
        image = markup(REPORT_IMAGE, kind="png" if failed else "jpeg", data=data)
    tries = f"{step['attempts']} attempts" if step["attempts"] > 1 else ""
    return {
        **step,
        "open": " open" if failed else "",
        "words": step_words(step),
        "what": f"{step['type']} {step['target']}" if step["description"] else "",
        "note": " · ".join(filter(None, (step["note"], tries))),
        "time": "skipped" if step["status"] == "skipped" else duration_words(step["seconds"]),
        "image": image,
    }


def flow_file_name(name: str) -> str:
    """The name of a flow's directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "flow"


def flow_failed_error(failed: Sequence[Json]) -> FlowFailedError:
    """What the first of the failed flows has to say, and how many there are."""
    flow, failure = failed[0], failed[0]["failure"]
    where = f"step {failure['step']}" if failure["step"] else "opening the page"
    place = f" ({failure['place']})" if failure["place"] else ""
    others = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
    status = failure["http_status"]
    return FlowFailedError(
        f"The flow {flow['name']} failed at {where}{place}: expected {failure['expected']};"
        f" seen: {failure['seen']}.{others}",
        hint=f"The page answers HTTP {status}: the simulator's services may not be up yet."
        if status in (502, 503, 504)
        else None,
    )


# ----------------------------------------------------------------------------------------------------------
# audit: ignore rules chosen by looking: their effect, their edit in the config, databases, the page
# ----------------------------------------------------------------------------------------------------------
# `audit_ignore_tables` is a list of entries: the name of a table, or {table: NAME, columns: [..]} for changes
# of those columns alone. Everything about them is plain data in, plain data out; below it come the edit of
# the file, the databases, the tunnels to them, and the page that shows it all.


def rule_target(entry: Any) -> tuple[str, list[str] | None] | None:
    """The table of an ignore rule and its columns, None for the whole table; None for what is no rule."""
    if isinstance(entry, str):
        return entry, None
    table = as_text(as_dict(entry).get("table"))
    if table is None:
        return None
    columns = entry.get("columns")
    return table, None if columns is None else [str(name) for name in as_list(columns)]


def ignores(entry: Any, mutation: Mutation) -> bool:
    """Whether a rule hides a change: any of its table, or an UPDATE of nothing but its columns."""
    target = rule_target(entry)
    if target is None or target[0] not in table_names(mutation):
        return False
    if target[1] is None:
        return True
    return mutation.action == "UPDATE" and bool(mutation.columns) and set(mutation.columns) <= set(target[1])


def table_names(mutation: Mutation) -> list[str]:
    """What a rule may call the table of a change: its name, or schema.name where the schema is known."""
    schema = as_text(mutation.raw.get("schema")) or as_text(mutation.raw.get("table_schema"))
    return [mutation.table, f"{schema}.{mutation.table}"] if schema else [mutation.table]


def remaining(mutations: Sequence[Mutation], entries: Sequence[Any]) -> list[Mutation]:
    """The changes that no rule hides."""
    return [mutation for mutation in mutations if not any(ignores(entry, mutation) for entry in entries)]


def with_table(entries: Sequence[Any], table: str) -> list[Any]:
    """The rules and one for a whole table, in place of those for its columns."""
    if (table, None) in map(rule_target, entries):
        return list(entries)
    kept: list[Any] = []
    for entry in entries:
        if (rule_target(entry) or ("",))[0] != table:
            kept.append(entry)
        elif table not in kept:
            kept.append(table)
    return kept if table in kept else [*kept, table]


def with_columns(entries: Sequence[Any], table: str, columns: Sequence[str]) -> list[Any]:
    """The rules and one for columns of a table, joined with the one that is there."""
    changed = list(entries)
    for number, entry in enumerate(entries):
        target = rule_target(entry)
        if target is None or target[0] != table:
            continue
        if target[1] is None:
            return changed
        more = [name for name in columns if name not in target[1]]
        changed[number] = {**entry, "columns": [*target[1], *more]} if more else entry
        return changed
    return [*changed, {"table": table, "columns": list(columns)}]


def with_column_everywhere(entries: Sequence[Any], column: str, tables: Sequence[str]) -> list[Any]:
    """The rules and one for a column of each of these tables."""
    changed = list(entries)
    for table in tables:
        changed = with_columns(changed, table, [column])
    return changed


def without_rule(entries: Sequence[Any], table: str, columns: Sequence[str] | None = None) -> list[Any]:
    """The rules without those for a table, or without some columns in them."""
    kept: list[Any] = []
    for entry in entries:
        target = rule_target(entry)
        if target is None or target[0] != table:
            kept.append(entry)
        elif columns is not None and target[1] is not None:
            left = [name for name in target[1] if name not in columns]
            if left:
                kept.append({**entry, "columns": left} if left != target[1] else entry)
        elif columns is not None:
            kept.append(entry)
    return kept


def with_changes_between(entries: Sequence[Any], old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """The rules after the same additions and removals that lead from `old` to `new`."""
    changed = list(entries)
    before, after = (dict(filter(None, map(rule_target, rules))) for rules in (old, new))
    for table, columns in before.items():
        left = after.get(table, [])
        gone = None if columns is None or left is None else [name for name in columns if name not in left]
        if table not in after or (columns is None and left is not None):
            changed = without_rule(changed, table)
        elif gone:
            changed = without_rule(changed, table, gone)
    for table, wanted in after.items():
        if wanted is None:
            changed = with_table(changed, table)
        elif wanted:
            changed = with_columns(changed, table, wanted)
    return changed


class TableChanges:
    """What happened to one table: its changes, their counts by kind, and its changed columns.

    columns: each column that an UPDATE changed, with the pairs of values before and after; suggestion: the
    entry that would hide all of it.
    """

    def __init__(self, table: str, mutations: Sequence[Mutation]) -> None:
        self.table = table
        self.mutations = list(mutations)
        self.counts = summarize(mutations)["tables"][0]
        self.suggestion = ignore_rules(mutations)[0]
        self.columns: dict[str, list[tuple[Any, Any]]] = {}
        for mutation in self.mutations:
            for name in mutation.columns if mutation.action == "UPDATE" else ():
                pair = mutation.before.get(name), mutation.after.get(name)
                self.columns.setdefault(name, []).append(pair)

    @property
    def whole_rows(self) -> list[Mutation]:
        """The changes that brought a row, took one away, or do not say what they changed."""
        return [
            mutation for mutation in self.mutations if mutation.action != "UPDATE" or not mutation.columns
        ]


def changes_by_table(mutations: Sequence[Mutation]) -> list[TableChanges]:
    """The changes table by table, the most changed table first."""
    tables: dict[str, list[Mutation]] = {}
    for mutation in mutations:
        tables.setdefault(mutation.table, []).append(mutation)
    groups = [TableChanges(table, found) for table, found in tables.items()]
    return sorted(groups, key=lambda group: (-len(group.mutations), group.table))


def changes_between(
    earlier: Sequence[Mutation], later: Sequence[Mutation], keys: Mapping[str, Sequence[str]]
) -> list[Mutation]:
    """What happened between two looks at the state, where all changes of a row are told as one.

    keys: the columns that tell a table's rows apart; where it names none, `id`, or else the whole row.
    """
    before: dict[str, list[Mutation]] = {}
    for mutation in earlier:
        before.setdefault(_row_key(mutation, keys), []).append(mutation)
    found: list[Mutation] = []
    for mutation in later:
        waiting = before.get(_row_key(mutation, keys))
        if not waiting:
            found.append(mutation)
            continue
        old = waiting.pop()
        if (old.action, old.before, old.after) != (mutation.action, mutation.before, mutation.after):
            found.append(_step(mutation, old.after, mutation.after))
    for waiting in before.values():  # these rows are again as they were at the last reset
        found += [_step(old, old.after, old.before) for old in waiting]
    return found


def _row_key(mutation: Mutation, keys: Mapping[str, Sequence[str]]) -> str:
    import json

    row = mutation.before or mutation.after
    names = [name for name in keys.get(mutation.table, ["id"]) if name in row]
    told: Any = {name: row[name] for name in names or row} or mutation.raw
    return json.dumps([table_names(mutation)[-1], told], sort_keys=True, default=str)


def _step(like: Mutation, before: Mapping[str, Any], after: Mapping[str, Any]) -> Mutation:
    action = "UPDATE" if before and after else "INSERT" if after else "DELETE"
    raw = {key: value for key, value in like.raw.items() if key in ("table_name", "table", "schema")}
    return Mutation({**raw, "action": action, "before": dict(before), "after": dict(after)})


# The edit of a config: as few characters as will do


class YamlEditor:
    """Edits of lists in a YAML text that leave every other byte as it is."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.line_break = "\r\n" if re.match(r"[^\n]*\r\n", text) else "\n"
        self._edits: list[tuple[int, int, str | list[str]]] = []  # start, end, text or whole lines

    def result(self) -> str:
        out, at = "", 0
        for start, end, new in sorted(self._edits, key=lambda edit: edit[:2]):
            out += self.text[at:start]
            at = end
            if isinstance(new, str):
                out += new
                continue
            lines = self.line_break.join(new)
            if out and not out.endswith("\n"):
                out += self.line_break + lines  # the file does not end with a line break
            else:
                out += lines + self.line_break
        return out + self.text[at:]

    def set_list(self, mapping: YamlNode, key: str, values: Sequence[Any]) -> None:
        """Let a key of a mapping have this list, where it stands: at an anchor, if its value is an alias."""
        pair = mapping.value.get(key)
        if pair is None or not mapping.start <= pair[0].start < mapping.end:  # or merged from elsewhere
            self._add_key(mapping, key, values)
        elif pair[1].kind == "sequence" and pair[1].value:
            self._edit_list(pair[1], values)
        elif pair[1].kind == "sequence" or pair[1].value is None:
            self._fill(mapping, pair[1], values)
        else:
            raise pair[1].error("this is not a list")

    def _replace(self, start: int, end: int, new: str) -> None:
        self._edits.append((start, end, new))

    def _insert_lines(self, at: int, lines: list[str]) -> None:
        self._edits.append((at, at, lines))

    def _line_start(self, at: int) -> int:
        return self.text.rfind("\n", 0, at) + 1

    def _next_line(self, at: int) -> int:
        """Where the next line starts; `at` itself behind a line break, which block text ends with."""
        if self.text[at - 1 : at] == "\n":
            return at
        found = self.text.find("\n", at)
        return found + 1 if found >= 0 else len(self.text)

    def _is_flow(self, node: YamlNode) -> bool:
        return self.text[node.start : node.start + 1] in ("[", "{")

    def _add_key(self, mapping: YamlNode, key: str, values: Sequence[Any]) -> None:
        if self._is_flow(mapping):
            inside = self.text[mapping.start + 1 : mapping.end - 1].rstrip()
            comma = "" if not inside or inside.endswith(",") else ","
            space = " " if inside else ""
            at = mapping.start + 1 + len(inside)
            self._replace(at, at, f"{comma}{space}{key}: {yaml_inline(list(values))}")
            return
        margin = " " * (mapping.column - 1)
        head = f"{margin}{key}:" + ("" if values else " []")
        items = yaml_items(margin + " " * self._list_offset(mapping), values)
        self._insert_lines(self._next_line(mapping.end), [head, *items])

    def _fill(self, mapping: YamlNode, value: YamlNode, values: Sequence[Any]) -> None:
        """Give a key a list whose value is empty, null or []."""
        old = self.text[value.start : value.end]
        if self._is_flow(mapping) or not re.fullmatch(r"\[ *\]|[^\[\s]*", old):
            space = "" if old else " "
            rest = old[1:] if old.startswith("[") else "]"
            self._replace(value.start, value.end, space + yaml_inline(list(values))[:-1] + rest)
            return
        start = len(self.text[: value.start].rstrip(" ")) if old else value.start
        self._replace(start, value.end, "")
        margin = " " * (mapping.column - 1 + self._list_offset(mapping))
        self._insert_lines(self._next_line(value.end), yaml_items(margin, values))

    def _list_offset(self, mapping: YamlNode) -> int:
        """How far this file indents the lists of such a mapping."""
        own = (value for _, value in mapping.pairs() if mapping.start < value.start < mapping.end)
        lists = (value for value in own if value.kind == "sequence" and not self._is_flow(value))
        return next((value.column - mapping.column for value in lists), 2)

    def _edit_list(self, node: YamlNode, values: Sequence[Any]) -> None:
        old = [item.plain() for item in node.items()]
        targets, added = _aligned(old, values)
        if self._is_flow(node):
            self._edit_flow(node, old, targets, added)
        else:
            self._edit_block(node, old, targets, added)

    def _change(self, item: YamlNode, old: Any, new: Any) -> None:
        """Make an item another one; of a {table, columns} entry only the list of columns, if that will do."""
        columns = item.get("columns")
        same_rest = [{**value, "columns": None} for value in (old, new) if isinstance(value, dict)]
        if (
            columns is not None
            and item.start < columns.start < item.end
            and columns.value
            and len(same_rest) == 2
            and same_rest[0] == same_rest[1]
            and new["columns"]
        ):
            self._edit_list(columns, new["columns"])
        else:
            self._replace(item.start, item.end, yaml_inline(new))

    def _edit_block(self, node: YamlNode, old: list[Any], targets: list[Any], added: Sequence[Any]) -> None:
        dashes = self._dashes(node)
        ends = [*dashes[1:], max(node.end, dashes[-1] + 1)]
        last = 0
        for item, dash, limit, before, after in zip(node.items(), dashes, ends, old, targets):
            end = item.end if dash < item.end <= limit else dash + 1  # an alias ends elsewhere
            last = self._next_line(end)
            if after is _GONE:
                self._replace(self._line_start(dash), last, "")
            elif before != after:
                self._change(item, before, after)
        margin = " " * (node.column - 1)
        if added:
            self._insert_lines(last, yaml_items(margin, added))
        elif all(after is _GONE for after in targets):
            at = self._behind_key(node)
            self._replace(at, at, " []")

    def _dashes(self, node: YamlNode) -> list[int]:
        """Where each item of a block list starts."""
        margin = " " * (node.column - 1)
        found = re.compile(rf"^{margin}(?=-(?:[ \r\n]|\Z))", re.MULTILINE)
        dashes = [match.end() for match in found.finditer(self.text, self._line_start(node.start))]
        within = [dash for dash in dashes if dash < max(node.end, node.start + 1)]
        if len(within) != len(node.value) or within[:1] != [node.start]:
            raise node.error("this list is written in a way that cannot be edited")
        return within

    def _behind_key(self, node: YamlNode) -> int:
        """Where a value may stand on the line of a block list's key: behind its colon and its anchor."""
        found = re.search(
            r":(?: *&[0-9A-Za-z_-]+)?(?=(?:[ \t]*(?:#[^\n]*|\r)?\n)+ *\Z)", self.text[: node.start]
        )
        if found is None:
            raise node.error("this list is written in a way that cannot be edited")
        return found.end()

    def _edit_flow(self, node: YamlNode, old: list[Any], targets: list[Any], added: Sequence[Any]) -> None:
        """Edit [a, b]: on one line by writing it anew, on several lines item by item."""
        items = list(node.items())
        kept = [item for item, after in zip(items, targets) if after is not _GONE]
        inside = all(node.start < item.start <= item.end < node.end for item in items)
        if not kept or not inside or "\n" not in self.text[node.start : node.end]:
            self._replace(node.start, node.end, self._flow_text(node, items, old, targets, added))
            return
        for item, before, after in zip(items, old, targets):
            if after is _GONE:
                self._remove_flow_item(node, item)
            elif before != after:
                self._change(item, before, after)
        if added:
            start = self._line_start(kept[-1].start)
            margin = self.text[start : kept[-1].start]
            space = self.line_break + margin if start > node.start and not margin.strip() else " "
            new = "".join(f",{space}{yaml_inline(value)}" for value in added)
            self._replace(kept[-1].end, kept[-1].end, new)

    def _flow_text(
        self, node: YamlNode, items: list[YamlNode], old: list[Any], targets: list[Any], added: Sequence[Any]
    ) -> str:
        written = [
            self.text[item.start : item.end]
            if before == after and node.start < item.start < node.end
            else yaml_inline(after)
            for item, before, after in zip(items, old, targets)
            if after is not _GONE
        ]
        pad = " " if self.text.startswith("[ ", node.start) and (written or added) else ""
        return f"[{pad}{', '.join([*written, *map(yaml_inline, added)])}{pad}]"

    def _remove_flow_item(self, node: YamlNode, item: YamlNode) -> None:
        """Take an item out of a list of several lines, its comma, and the line that it leaves."""
        comma = re.compile(r"((?:[ \r\n]|#[^\n]*)*),( *)").match(self.text, item.end, node.end)
        if comma is None or not comma[1].strip():
            end = comma.end() if comma else item.end
            start, next_line = self._line_start(item.start), self._next_line(end)
            if not self.text[start : item.start].strip() and not self.text[end:next_line].strip():
                self._replace(start, next_line, "")
            else:
                self._replace(item.start, end, "")
            return
        self._replace(item.start, item.end, "")  # a comment stands before the comma, and stays
        self._replace(comma.end(1), comma.end(), "")


_GONE = object()  # what an entry becomes that is taken out


def _aligned(old: Sequence[Any], new: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
    """What becomes of each old entry of a list (itself, another one, _GONE), and what is added at its end."""
    import json

    def name(entry: Any) -> str:
        return (rule_target(entry) or (json.dumps(entry, default=str),))[0]

    targets: list[Any] = []
    position = 0
    for entry in old:
        if position < len(new) and name(new[position]) == name(entry):
            targets.append(new[position])
            position += 1
        else:
            targets.append(_GONE)
    return targets, new[position:]


class RulesEdit:
    """A config after an edit. text: all of it; shared: the other listeners ("dataset/name") that changed."""

    def __init__(self, text: str, shared: Sequence[str]) -> None:
        self.text = text
        self.shared = list(shared)


def edit_rules(text: str, source: str, dataset: str, listener: str, entries: Sequence[Any]) -> RulesEdit:
    """Give a listener of a config these ignore rules. ConfigError when the text cannot be edited so.

    The list is changed where it stands: one behind an anchor changes for everything that refers to it.
    A listener that merges another's rules gets a list of its own.
    """
    before = yaml_compose(text, source)
    node = listener_node(before, dataset, listener)
    if as_list(node.plain().get(RULES_KEY)) == list(entries):
        return RulesEdit(text, [])
    editor = YamlEditor(text)
    try:
        editor.set_list(node, RULES_KEY, entries)
        edited = editor.result()
        after = yaml_compose(edited, source)
        changed = listener_node(after, dataset, listener)
    except YamlError as error:
        raise _not_editable(source, str(error)) from None
    lists = node.get(RULES_KEY), changed.get(RULES_KEY)
    rules = as_list(changed.plain().get(RULES_KEY))
    if rules != list(entries) or _without_rules(before, lists[0]) != _without_rules(after, lists[1]):
        raise _not_editable(source, f"the list of {listener!r} is written in a way that cannot be edited")
    old, new = _all_rules(before), _all_rules(after)
    shared = [place for place in new if new[place] != old.get(place) and place != (dataset, listener)]
    return RulesEdit(edited, ["/".join(place) for place in shared])


def _not_editable(source: str, why: str) -> ConfigError:
    return ConfigError(
        f"{source} was not changed: {why}.", hint="Copy the YAML block into the file with an editor."
    )


def listener_node(root: YamlNode | None, dataset: str, listener: str) -> YamlNode:
    """The mapping of a listener in a config. ConfigError when there is none."""
    node = root
    for name in ("datasets", dataset, "listeners", listener):
        node = node.get(name) if node is not None else None
    if node is None or node.kind != "mapping":
        raise ConfigError(f"The config has no listener {listener!r} in the dataset {dataset!r} any more.")
    return node


def _without_rules(node: YamlNode | None, rules: YamlNode | None) -> str:
    """Everything in a document that an edit of rules must leave alone, in a form that can be compared."""
    if node is None or node is rules:
        return "rules"
    if node.kind == "mapping":
        pairs = ((key, pair[1]) for key, pair in node.value.items() if key != RULES_KEY)
        return repr([(key, _without_rules(value, rules)) for key, value in pairs])
    if node.kind == "sequence":
        return repr([_without_rules(item, rules) for item in node.items()])
    return repr(node.value)


def _all_rules(root: YamlNode | None) -> dict[tuple[str, str], Any]:
    """The rules of every listener of every dataset."""
    found: dict[tuple[str, str], Any] = {}
    datasets = root.get("datasets") if root is not None else None
    for dataset, part in datasets.pairs() if datasets is not None else ():
        listeners = part.get("listeners")
        for name, node in listeners.pairs() if listeners is not None else ():
            rules = node.get(RULES_KEY)
            found[str(dataset.value), str(name.value)] = None if rules is None else rules.plain()
    return found


_SECRET_KEY = re.compile(r"passw|secret|token|credential|api_?key", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A config with the values of passwords and the like as ***, to be shown."""
    root = yaml_compose(text)
    places: set[tuple[int, int]] = set()

    def search(node: YamlNode) -> None:
        name = node.get("name")
        value = node.get("value")
        if name and value and value.kind == "scalar" and _SECRET_KEY.search(str(name.value)):
            places.add((value.start, value.end))
        for key, part in node.pairs():
            if part.kind == "scalar" and isinstance(key.value, str) and _SECRET_KEY.search(key.value):
                places.add((part.start, part.end))
            search(part)
        for item in node.items():
            search(item)

    if root is not None:
        search(root)
    for start, end in sorted(places, reverse=True):
        if start < end:
            text = text[:start] + "***" + text[len(text[:end].rstrip("\r\n")) :]
    return text


class RulesFile:
    """The ignore rules of one listener in a plato-config.yml, as they were read, and the way back there."""

    def __init__(self, path: str, dataset: str, listener: str) -> None:
        self.path = os.path.realpath(path)  # a symbolic link stays one
        self.name = os.path.basename(path)
        self.dataset = dataset
        self.listener = listener
        self.text = ""
        self.entries: list[Any] = []
        self.read()

    def read(self) -> None:
        """Read the file. ConfigError when it cannot be read or has no such listener."""
        self.text = self._content()
        try:
            root = yaml_compose(self.text, self.name)
        except YamlError as error:
            raise ConfigError(f"{self.name} cannot be used: {error}.") from None
        node = listener_node(root, self.dataset, self.listener)
        self.entries = as_list(node.plain().get(RULES_KEY))

    def _content(self) -> str:
        try:
            with open(self.path, "rb") as file:
                return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.name} is not UTF-8 text (byte {error.start}).") from None
        except OSError as error:
            raise ConfigError(f"{self.name} cannot be read: {reason(error)}.") from None

    def edit(self, entries: Sequence[Any]) -> RulesEdit:
        """What the file would be with these rules. ConfigError when it cannot be edited so."""
        return edit_rules(self.text, self.name, self.dataset, self.listener, entries)

    def diff(self, entries: Sequence[Any]) -> str:
        """What `save` would change, as a unified diff without secrets."""
        import difflib

        old, new = (without_secrets(text).splitlines() for text in (self.text, self.edit(entries).text))
        return "\n".join(difflib.unified_diff(old, new, self.name, self.name, lineterm=""))

    def save(self, entries: Sequence[Any]) -> RulesEdit:
        """Write the rules into the file in one step. ConflictError when it is not as it was read."""
        edited = self.edit(entries)
        if self._content() != self.text:
            raise ConflictError(
                f"{self.name} was changed by something else since it was read; nothing was written.",
                hint="Load it again: your choice of rules is kept and put on top of what is there now.",
            )
        try:
            status = os.stat(self.path)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "you may not write to it")
            write_whole(self.path, edited.text, status.st_mode & 0o7777)
            if os.geteuid() == 0:
                os.chown(self.path, status.st_uid, status.st_gid)
        except OSError as error:
            raise ConfigError(
                f"{self.name} cannot be written: {reason(error)}.",
                hint="Copy the YAML block, or make the file and its directory writable.",
            ) from None
        self.read()
        return edited


# Databases: read only, with a limit on every statement, and names quoted by the drivers


AUDIT_CONNECT_SECONDS = 10
AUDIT_FRESH_SECONDS = 10.0
AUDIT_LIST_SECONDS = 20.0
AUDIT_COUNT_SECONDS = 30.0
AUDIT_EXAMPLE_SECONDS = 5.0
AUDIT_EXAMPLE_ROWS = 20
AUDIT_EXAMPLE_CHARACTERS = 120
TUNNEL_SECONDS = 60.0  # no single look at a database takes longer


class Table:
    """A table or view. kind: "table", "view", "partitioned", "partition of NAME" ..; rows: an estimate, None
    where there is none; columns: (name, type, whether it is of the primary key) each."""

    def __init__(self, schema: str, name: str, kind: str, rows: int | None) -> None:
        self.schema = schema
        self.name = name
        self.kind = kind
        self.rows = rows
        self.columns: list[tuple[str, str, bool]] = []

    def column_names(self) -> list[str]:
        return [name for name, _, _ in self.columns]


class DatabaseError(SandboxError):
    """A database does not answer or refuses; the message has its words."""

    code = "database"


class Early:
    """Work that is begun at once, so that whoever asks for it soon does not wait; later, it is done anew."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._began = time.monotonic()
        self._first: Aside | None = Aside(work)

    def __call__(self) -> Any:
        first, self._first = self._first, None
        if first is not None and time.monotonic() - self._began < AUDIT_FRESH_SECONDS:
            return first.result()
        return self._work()


AUDIT_PACKAGES = {"postgresql": ("psycopg2", "psycopg2-binary"), "mysql": ("pymysql", "pymysql")}


class Database:
    """The database of a `db` listener as it is reached from here; every look is a connection of its own."""

    words = ""

    def __init__(self, listener: AuditTable, tunnel: Tunnel | None = None, options: Mapping[str, str] = {}):
        self.listener = listener
        self.tunnel = tunnel
        self.options = options
        self.early: Early | None = None  # its tables, on their way
        self.host = "127.0.0.1" if tunnel else listener.host
        self.port = tunnel.port if tunnel else listener.port

    def tables(self) -> list[Table]:
        """All tables with their columns and estimates, by schema and name. DatabaseError, TimedOutError."""
        raise self.failure(f"audit-ui cannot look into databases of the type {self.listener.kind}")

    def count(self, table: Table) -> int:
        """The exact number of rows. TimedOutError where counting takes too long."""
        raise NotImplementedError

    def examples(self, table: Table) -> list[Sequence[str | None]]:
        """A few rows as texts, long values cut off, binary ones as their length."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is under way."""

    def failure(self, words: str, stage: str = "statement") -> DatabaseError:
        """An error in the database's own words.

        stage: "reach" when it did not answer, for which a tunnel may know the reason; "login" when it did not
        let us in; "statement" for all that comes later.
        """
        if stage == "reach" and self.tunnel is not None and self.tunnel.problem:
            return DatabaseError(self.tunnel.problem, hint=f"See what the VM is doing: {PROGRAM} status")
        told = printable(words.strip().replace("\n", " ")).rstrip(".")
        found = re.search(r"(?:FATAL|ERROR): +(.*)", told)
        said, hint = found[1] if found else told, None
        if stage == "reach":
            where = f"port {self.listener.port} of " + ("the VM" if self.tunnel else self.listener.host)
            said = f"it does not answer on {where}"
            hint = f"If its container does not run, start it: {PROGRAM} start-services"
        elif stage == "login":
            hint = "Correct what the config says of the listener: db_user, db_password and db_database."
        return DatabaseError(f"The database of {self.listener.name!r} could not be read: {said}.", hint=hint)

    def too_slow(self, seconds: float) -> TimedOutError:
        return TimedOutError(f"The database took longer than {seconds:g} s, so it was told to stop.")


class PostgresDatabase(Database):
    """PostgreSQL by psycopg2; all schemas."""

    words = "PostgreSQL"

    def _query(self, statement: Any, seconds: float) -> list[Sequence[Any]]:
        driver = import_package("psycopg2", "psycopg2-binary")
        connection = None
        try:
            connection = driver.connect(
                host=self.host,
                port=self.port,
                user=self.listener.user,
                password=self.listener.password,
                dbname=self.listener.database,
                connect_timeout=AUDIT_CONNECT_SECONDS,
                tcp_user_timeout=int(TUNNEL_SECONDS * 1000),
                application_name=PROGRAM,
                gssencmode="disable",
                client_encoding="UTF8",
                **self.options,
            )
            connection.set_session(readonly=True)
            with connection.cursor() as cursor:
                cursor.execute("SET statement_timeout = %s", (int(seconds * 1000),))
                cursor.execute(statement)
                return list(cursor.fetchall())
        except driver.errors.QueryCanceled:
            raise self.too_slow(seconds) from None
        except driver.Error as error:
            stage = "statement" if error.pgcode else "login" if "FATAL: " in str(error) else "reach"
            raise self.failure(str(error), stage) from None
        except UnicodeError as error:
            raise self.failure(str(error)) from None
        finally:
            if connection is not None:
                connection.close()

    def tables(self) -> list[Table]:
        found: dict[int, Table] = {}
        parents: dict[int, int] = {}
        for oid, schema, name, kind, parent, rows in self._query(_POSTGRES_TABLES, AUDIT_LIST_SECONDS):
            found[oid] = Table(schema, name, _POSTGRES_KINDS.get(kind, "table"), rows)
            if parent is not None:
                parents[oid] = parent
        for oid, name, kind, is_key in self._query(_POSTGRES_COLUMNS, AUDIT_LIST_SECONDS):
            if oid in found:
                found[oid].columns.append((name, kind, is_key))
        for oid, parent in parents.items():
            if parent in found:
                found[oid].kind = f"partition of {found[parent].name}"
        _sum_up_partitions(found, parents)
        return list(found.values())

    def count(self, table: Table) -> int:
        sql = import_package("psycopg2.sql", "psycopg2-binary")
        statement = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table.schema, table.name))
        return int(self._query(statement, AUDIT_COUNT_SECONDS)[0][0])

    def examples(self, table: Table) -> list[Sequence[str | None]]:
        sql = import_package("psycopg2.sql", "psycopg2-binary")
        length = sql.Literal(AUDIT_EXAMPLE_CHARACTERS)
        columns = [
            sql.SQL("octet_length({})::text || ' bytes'").format(sql.Identifier(name))
            if kind == "bytea"
            else sql.SQL("left({}::text, {})").format(sql.Identifier(name), length)
            for name, kind, _ in table.columns
        ]
        statement = sql.SQL("SELECT {} FROM {} LIMIT {}").format(
            sql.SQL(", ").join(columns),
            sql.Identifier(table.schema, table.name),
            sql.Literal(AUDIT_EXAMPLE_ROWS),
        )
        return self._query(statement, AUDIT_EXAMPLE_SECONDS) if columns else []


_POSTGRES_KINDS = {"v": "view", "m": "materialized view", "f": "foreign table", "p": "partitioned table"}
# The planner's estimate, or what the statistics counted; an empty file has no row; -1 means "never looked".
_POSTGRES_TABLES = """
SELECT c.oid, n.nspname, c.relname, c.relkind,
    (SELECT i.inhparent FROM pg_inherits i WHERE c.relispartition AND i.inhrelid = c.oid LIMIT 1),
    CASE WHEN c.relkind IN ('v', 'p') THEN NULL
        WHEN c.reltuples > 0 THEN c.reltuples::bigint
        WHEN pg_stat_get_live_tuples(c.oid) > 0 THEN pg_stat_get_live_tuples(c.oid)
        WHEN c.relkind IN ('r', 'm') AND (c.relpages > 0 OR pg_relation_size(c.oid) = 0) THEN 0 END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    AND has_schema_privilege(n.oid, 'USAGE')
ORDER BY n.nspname, c.relname
"""
_POSTGRES_COLUMNS = """
SELECT a.attrelid, a.attname, format_type(a.atttypid, a.atttypmod), coalesce(a.attnum = ANY (i.indkey), false)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attrelid, a.attnum
"""


def _sum_up_partitions(tables: Mapping[int, Table], parents: Mapping[int, int]) -> None:
    """Give a partitioned table the rows of all its partitions, however deep they are."""
    for oid, parent in parents.items():
        rows = tables[oid].rows
        above = parent
        while rows is not None and above in tables:
            tables[above].rows = (tables[above].rows or 0) + rows
            above = parents.get(above, 0)


class MysqlDatabase(Database):
    """MySQL and MariaDB by pymysql; the one database that the listener names."""

    words = "MySQL"

    def _query(self, statement: str, seconds: float, parameters: Any = None) -> list[Sequence[Any]]:
        driver = import_package("pymysql", "pymysql")
        connection = None
        try:
            connection = driver.connect(
                host=self.host,
                port=self.port,
                user=self.listener.user,
                password=self.listener.password,
                database=self.listener.database,
                charset="utf8mb4",
                connect_timeout=AUDIT_CONNECT_SECONDS,
                read_timeout=seconds + AUDIT_CONNECT_SECONDS,
            )
            with connection.cursor() as cursor:
                mariadb = "mariadb" in connection.get_server_info().lower()
                name, limit = ("max_statement_time", 1) if mariadb else ("max_execution_time", 1000)
                cursor.execute(f"SET SESSION {name} = %s", (int(seconds * limit),))
                cursor.execute("SET SESSION TRANSACTION READ ONLY")
                cursor.execute("START TRANSACTION READ ONLY")
                cursor.execute(statement, parameters)
                return list(cursor.fetchall())
        except driver.err.MySQLError as error:
            number, *_, words = (*error.args, 0, str(error)) if len(error.args) < 2 else error.args
            if number in _MYSQL_TOO_SLOW:
                raise self.too_slow(seconds) from None
            stage = "reach" if number in _MYSQL_AWAY else "login" if connection is None else "statement"
            raise self.failure(str(words), stage) from None
        except RuntimeError as error:  # a way to log in that needs another package
            if "cryptography" not in str(error):
                raise
            raise missing_packages(["cryptography"]) from None
        except OSError as error:
            raise self.failure(str(error), "reach") from None
        except UnicodeError as error:
            raise self.failure(str(error)) from None
        finally:
            if connection is not None and connection.open:
                connection.close()

    def tables(self) -> list[Table]:
        name = (self.listener.database,)
        found: dict[str, Table] = {}
        for table, kind, rows in self._query(_MYSQL_TABLES, AUDIT_LIST_SECONDS, name):
            is_view = "VIEW" in kind
            found[table] = Table(self.listener.database, table, "view" if is_view else "table", rows)
        for table, column, kind, key in self._query(_MYSQL_COLUMNS, AUDIT_LIST_SECONDS, name):
            if table in found:
                found[table].columns.append((column, kind, key == "PRI"))
        return list(found.values())

    def count(self, table: Table) -> int:
        statement = f"SELECT count(*) FROM {mysql_name(table.name)}"  # noqa: S608  (quoted)
        return int(self._query(statement, AUDIT_COUNT_SECONDS)[0][0])

    def examples(self, table: Table) -> list[Sequence[str | None]]:
        columns = [
            f"CONCAT(OCTET_LENGTH({mysql_name(name)}), ' bytes')"
            if re.match(r"(?:var)?binary|\w*blob|bit|geometry|point|linestring|polygon|multi\w+", kind)
            else f"LEFT(CAST({mysql_name(name)} AS CHAR), {AUDIT_EXAMPLE_CHARACTERS})"
            for name, kind, _ in table.columns
        ]
        statement = (
            f"SELECT {', '.join(columns)} FROM {mysql_name(table.name)}"  # noqa: S608  (quoted)
            f" LIMIT {AUDIT_EXAMPLE_ROWS}"
        )
        return self._query(statement, AUDIT_EXAMPLE_SECONDS) if columns else []


_MYSQL_TOO_SLOW = (1317, 1969, 3024)
_MYSQL_AWAY = (0, 2003, 2006, 2013, 2055)
_MYSQL_TABLES = """
SELECT table_name, table_type, table_rows FROM information_schema.tables
WHERE table_schema = %s ORDER BY table_name
"""
_MYSQL_COLUMNS = """
SELECT table_name, column_name, column_type, column_key FROM information_schema.columns
WHERE table_schema = %s ORDER BY table_name, ordinal_position
"""


def mysql_name(name: str) -> str:
    """An identifier in a statement; pymysql itself has no way to quote one."""
    return "`" + name.replace("`", "``") + "`"


# Runs where the file is, by Python: the path and a request in, a line of JSON out. `max(rowid)` is an
# estimate that costs nothing. A database that cannot be locked is read as one that nobody changes.
_SQLITE_READER = r"""
import json, os, sqlite3, sys, threading, urllib.parse
path, what, table, seconds, rows, length = sys.argv[1:7]
def quoted(name): return '"' + name.replace('"', '""') + '"'
def look(connection):
    def ask(statement): return connection.execute(statement).fetchall()
    def name_of(schema_row): return schema_row[0]
    if what == "count":
        return ask("SELECT count(*) FROM " + quoted(table))[0][0]
    if what == "examples":
        names = [column[1] for column in ask("PRAGMA table_xinfo(%s)" % quoted(table))]
        parts = ["CASE typeof({0}) WHEN 'blob' THEN length({0}) || ' bytes' ELSE substr({0}, 1, {1}) END"
                 .format(quoted(name), int(length)) for name in names]
        return ask("SELECT %s FROM %s LIMIT %d" % (", ".join(parts), quoted(table), int(rows)))
    found = []
    for name, kind in ask("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
                          "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"):
        count = None
        if kind == "table":
            try: count = ask("SELECT max(rowid) FROM " + quoted(name))[0][0] or 0
            except sqlite3.Error: pass
        try: columns = [(c[1], c[2], bool(c[5])) for c in ask("PRAGMA table_xinfo(%s)" % quoted(name))]
        except sqlite3.Error: columns = []
        found.append((name, kind, count if isinstance(count, int) else None, columns))
    return found
def main():
    if not os.path.isfile(path):
        return {"error": "there is no file " + path}
    problem = None
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        try:
            uri = "file:" + urllib.parse.quote(os.path.abspath(path)) + "?" + mode
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            connection.execute("PRAGMA query_only = ON")
            timer = threading.Timer(float(seconds), connection.interrupt)
            timer.daemon = True
            timer.start()
            return {"found": look(connection)}
        except sqlite3.Error as error:
            if "interrupted" in str(error): return {"slow": True}
            problem = problem or str(error)
    return {"error": problem}
print(json.dumps(main()))
"""


class SqliteDatabase(Database):
    """A file, read by the Python of the machine where it is: the VM over SSH, or this one.

    sandbox: the one whose VM has the file; None for a file here.
    """

    words = "SQLite"

    def __init__(self, listener: AuditTable, sandbox: SandboxBase | None) -> None:
        super().__init__(listener)
        self.sandbox = sandbox
        self._shells: list[SshShell] = []

    def _ask(self, what: str, table: str, seconds: float) -> Any:
        import json

        words = [self._path(), what, table, seconds, AUDIT_EXAMPLE_ROWS, AUDIT_EXAMPLE_CHARACTERS]
        command = ["-I", "-c", _SQLITE_READER, *map(str, words)]
        outcome = self._run_there(command, seconds) if self.sandbox else self._run_here(command, seconds)
        if outcome.code:
            words_said = outcome.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
            raise self.failure(words_said[-1])
        try:
            answer = as_dict(json.loads(outcome.stdout.decode("utf-8", "replace")))
        except (ValueError, RecursionError):
            answer = {}
        if not {"slow", "error", "found"} & set(answer):
            raise self.failure("what was read there cannot be understood")
        if answer.get("slow"):
            raise self.too_slow(seconds)
        if "error" in answer:
            raise DatabaseError(
                f"The database of {self.listener.name!r} could not be read: {printable(answer['error'])}."
            )
        return answer["found"]

    def _path(self) -> str:
        path = self.listener.database
        if self.sandbox is None or path.startswith("/"):
            return path
        return f"{default_target(self.sandbox.state)}/{path}"

    @staticmethod
    def _run_here(command: Sequence[str], seconds: float) -> Outcome:
        program = [sys.executable, *command]
        return run_program(program, Reporter(), seconds=seconds + AUDIT_CONNECT_SECONDS)

    def _run_there(self, command: Sequence[str], seconds: float) -> Outcome:
        sandbox: Any = self.sandbox
        shell = SshShell(sandbox.state, sandbox.settings, sandbox.reporter)
        self._shells.append(shell)
        try:
            shell.wait_until_ready(REQUEST_SECONDS)
            return shell.run(shell_words(["python3", *command]), seconds=seconds + AUDIT_CONNECT_SECONDS)
        finally:
            self._shells.remove(shell)
            shell.close()

    def close(self) -> None:
        for shell in self._shells:
            shell.end()

    def tables(self) -> list[Table]:
        found = []
        for name, kind, rows, columns in self._ask("tables", "", AUDIT_LIST_SECONDS):
            table = Table("main", name, kind, rows)
            table.columns = [(column, type_name, is_key) for column, type_name, is_key in columns]
            found.append(table)
        return found

    def count(self, table: Table) -> int:
        return int(self._ask("count", table.name, AUDIT_COUNT_SECONDS))

    def examples(self, table: Table) -> list[Sequence[str | None]]:
        found: list[Sequence[str | None]] = self._ask("examples", table.name, AUDIT_EXAMPLE_SECONDS)
        return [[None if value is None else str(value) for value in row] for row in found]


def open_database(
    listener: AuditTable,
    tunnel: Tunnel | None,
    sandbox: SandboxBase | None,
    options: Mapping[str, str] = {},
) -> Database:
    """The database of a listener, not yet connected to."""
    if listener.kind == "postgresql":
        return PostgresDatabase(listener, tunnel, options)
    if listener.kind == "mysql":
        return MysqlDatabase(listener, tunnel)
    if listener.kind == "sqlite":
        return SqliteDatabase(listener, sandbox)
    return Database(listener, tunnel)


def import_package(module: str, package: str) -> Any:
    """A module that is not of the standard library. SandboxError says how to install its package."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_packages([package]) from None


def missing_packages(packages: Sequence[str]) -> SandboxError:
    """The error for packages that this Python lacks, with the command that installs them."""
    import sysconfig

    names = " and ".join(packages)
    command = shell_words([sys.executable, "-m", "pip", "install", *packages])
    managed = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and os.path.exists(managed):
        steps = [sys.executable, "-m", "venv", "audit-venv"], ["audit-venv/bin/pip", "install", *packages]
        command = " && ".join(map(shell_words, steps)) + ", then run this with audit-venv/bin/python"
    return SandboxError(f"audit-ui needs {names}, which this Python does not have: {command}")


def gateway_connection(settings: Settings, target: str) -> ssl.SSLSocket:
    """A connection to `<job id>--<port>`. NetworkError when the gateway does not give one."""
    deadline = time.monotonic() + AUDIT_CONNECT_SECONDS
    sock = connect(settings.gateway_host, settings.gateway_port, deadline)
    return secure(sock, f"{target}.{settings.gateway_host}", deadline, settings.ca_file)


class Tunnel:
    """A port of 127.0.0.1 that leads through the gateway to a port of a VM, as long as this process lives.

    target: `<job id>--<port>`. problem: why the last connection did not come about, "" if it did.
    """

    def __init__(self, settings: Settings, target: str) -> None:
        import socket
        import threading

        self.settings = settings
        self.target = target
        self.problem = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        import threading

        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        """One connection, which ends after a while whatever happens: a VM can go without a word."""
        import socket
        import threading

        try:
            far = gateway_connection(self.settings, self.target)
        except SandboxError as error:
            self.problem = error.message
            near.close()
            return
        self.problem = ""
        timer = threading.Timer(TUNNEL_SECONDS, far.shutdown, [socket.SHUT_RDWR])
        timer.daemon = True
        timer.start()
        try:
            _relay(far, near.fileno(), near.fileno())
        except OSError:
            pass  # either side hung up
        finally:
            timer.cancel()
            far.close()
            near.close()

    def close(self) -> None:
        self._listener.close()


# The plan: what the command found out, and hands to the process that serves the page


class AuditPlan:
    """What a page shows, as plain data that goes through a pipe.

    listeners: one dict each of name, fields (those of the config), target (`<job id>--<port>` to reach it
    through the gateway, None for one reached directly) and options (of the connection); config: the path of
    the file whose rules are edited, or None; directory: that of the sandbox, None without one.
    """

    def __init__(
        self,
        listeners: Sequence[Mapping[str, Any]],
        *,
        config: str | None,
        service: str | None,
        dataset: str,
        directory: str | None,
        url: str | None,
    ) -> None:
        self.listeners = list(listeners)
        self.config = config
        self.service = service
        self.dataset = dataset
        self.directory = directory
        self.url = url

    def table(self, number: int) -> AuditTable:
        """A listener by its number, as the thing that can be connected to."""
        entry = self.listeners[number]
        return AuditTable(str(entry["name"]), as_dict(entry["fields"]))


def database_url(url: str, environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str], bool]:
    """The fields of a listener, the connection's options, and whether the URL itself holds a password.

    postgresql://user@host:port/database?sslmode=require, mysql://.., mariadb://.., sqlite:///path/of/file.
    A password that it leaves out comes from PGPASSWORD or MYSQL_PWD. UsageError for anything else.
    """
    import urllib.parse

    scheme = url.partition("://")[0].partition("+")[0].lower()
    kinds = {"postgres": "postgresql", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
    if scheme == "sqlite" and url.partition("://")[2][1:]:
        path = urllib.parse.unquote(url.partition("://")[2][1:])
        return {"db_type": "sqlite", "db_database": os.path.abspath(path)}, {}, False
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        port, scheme = None, ""
    database = urllib.parse.unquote(parts.path[1:]) if scheme in kinds else ""
    options = dict(urllib.parse.parse_qsl(parts.query)) if scheme in kinds else {}
    if not database or not set(options) <= ({"sslmode", "sslrootcert"} if scheme[:1] == "p" else set()):
        raise UsageError(
            "--database-url is not the address of a database that can be read.",
            hint="It looks like postgresql://user@host:5432/database (?sslmode=.. and ?sslrootcert=.. may"
            " follow), mysql://user@host:3306/database or sqlite:///path/of/file.",
        )
    kind = kinds[scheme]
    variable = {"postgresql": "PGPASSWORD", "mysql": "MYSQL_PWD"}[kind]
    password = urllib.parse.unquote(parts.password or "") or environment.get(variable, "")
    fields = {
        "db_type": kind,
        "db_host": parts.hostname or "127.0.0.1",
        "db_port": port or 0,
        "db_user": urllib.parse.unquote(parts.username or ""),
        "db_password": password,
        "db_database": database,
    }
    return fields, options, bool(parts.password)


# Pictures of what changed, as HTML that scripts no one and follows the page's colours

_AUDIT_STYLE = """
<style>
[data-testid="stMainBlockContainer"] { max-width: 60rem; padding-top: 2.5rem; padding-bottom: 6rem; }
[data-testid="stMainBlockContainer"] h1 { font-size: 2rem; padding-bottom: 0; }
[data-testid="stMainBlockContainer"] h3 { font-size: 1.35rem; padding-top: 1.2rem; }
button[data-testid="stBaseButton-primary"] { background: #3b70c4; border-color: #3b70c4; }
button[data-testid="stBaseButton-primary"]:hover { background: #2f5ea8; border-color: #2f5ea8; }
.pa-bars { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr max-content;
  gap: .35rem .9rem; align-items: center; font-size: .9rem; }
.pa-name { overflow-wrap: anywhere; max-width: 18rem; }
.pa-bar { display: flex; height: .8rem; gap: 2px; }
.pa-bar i { display: block; min-width: 3px; border-radius: 2px; }
.pa-inserted { background: #2f9e68; } .pa-updated { background: #4b83d6; }
.pa-deleted { background: #d2574d; } .pa-other { background: #8a8f98; }
.pa-faded { opacity: .28; }
.pa-count { font-variant-numeric: tabular-nums; opacity: .75; text-align: right; }
.pa-key { display: flex; flex-wrap: wrap; gap: 1.1rem; margin-top: .8rem; font-size: .8rem; opacity: .8; }
.pa-key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem; }
.pa-head { font-weight: 600; overflow-wrap: anywhere; }
.pa-head span { font-weight: 400; opacity: .7; margin-left: .6rem; }
.pa-table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: .88rem;
  margin-top: .5rem; }
.pa-table td { padding: .3rem .9rem .3rem 0; vertical-align: top; border: 0; overflow-wrap: anywhere;
  border-top: 1px solid color-mix(in srgb, currentColor 12%, transparent); }
.pa-table td:first-child { width: 11rem; }
.pa-table td.pa-times { font-variant-numeric: tabular-nums; opacity: .7; width: 3.6rem; }
.pa-value { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .8rem; line-height: 1.5; }
.pa-value del { text-decoration: none; opacity: .6; }
.pa-quiet { opacity: .65; font-size: .85rem; }
.pa-warn { color: #c77700; font-size: .85rem; }
</style>
"""
_KINDS = ("inserted", "updated", "deleted", "other")
SHOWN_GROUPS = 12
SHOWN_BARS = 14
SHOWN_COLUMNS = 8
SHOWN_EXAMPLES = 2
SHOWN_LISTED = 2000


def html_of(text: str) -> str:
    """Text from a database as HTML."""
    import html

    return html.escape(printable(text))


def changes_picture(groups: Sequence[TableChanges], entries: Sequence[Any]) -> str:
    """Bars: which tables changed how often, what the rules hide in a fainter shade."""
    most = max((len(group.mutations) for group in groups), default=1)
    rows = []
    for group in groups[:SHOWN_BARS]:
        left = remaining(group.mutations, entries)
        bars = ""
        for faded, mutations in (("", left), (" pa-faded", [m for m in group.mutations if m not in left])):
            counts = summarize(mutations)["tables"][0] if mutations else {}
            for kind in _KINDS:
                if counts.get(kind):
                    width = 100 * counts[kind] / most
                    bars += f'<i class="pa-{kind}{faded}" style="width:{width:.1f}%"></i>'
        hidden = len(group.mutations) - len(left)
        told = html_of(counts_text(group.counts) + (f", {hidden} of them hidden" if hidden else ""))
        rows.append(
            f'<div class="pa-name">{html_of(group.table)}</div>'
            f'<div class="pa-bar" role="img" aria-label="{told}" title="{told}">{bars}</div>'
            f'<div class="pa-count">{len(group.mutations):,}</div>'
        )
    kinds = [kind for kind in _KINDS if any(group.counts.get(kind) for group in groups)]
    key = "".join(f'<span><i class="pa-{kind}"></i>{kind}</span>' for kind in kinds)
    if len(remaining([m for group in groups for m in group.mutations], entries)) < sum(
        len(group.mutations) for group in groups
    ):
        key += '<span><i class="pa-other pa-faded"></i>faint: hidden by the rules</span>'
    more = (
        f"<span>and {counted(len(groups) - SHOWN_BARS, 'more table')}</span>"
        if len(groups) > SHOWN_BARS
        else ""
    )
    return f'<div class="pa-bars">{"".join(rows)}</div><div class="pa-key">{key}{more}</div>'


def changes_table(group: TableChanges) -> str:
    """What happened to a table: its changed columns with values before and after, then whole rows."""
    rows = []
    for name, pairs in list(group.columns.items())[:SHOWN_COLUMNS]:
        distinct = list(dict.fromkeys((_value(before), _value(after)) for before, after in pairs))
        values = "<br>".join(
            f"<del>{html_of(before)}</del> → {html_of(after)}" for before, after in distinct[:SHOWN_EXAMPLES]
        )
        rows.append((html_of(name), f"{len(pairs):,}x", values))
    if len(group.columns) > SHOWN_COLUMNS:
        rows.append(
            (f'<span class="pa-quiet">and {len(group.columns) - SHOWN_COLUMNS} more columns</span>', "", "")
        )
    by_action: dict[str, list[Mutation]] = {}
    for mutation in group.whole_rows:
        by_action.setdefault(mutation.action, []).append(mutation)
    for action, mutations in by_action.items():
        told = "<br>".join(html_of(mutation.told()[:300]) for mutation in mutations[:SHOWN_EXAMPLES])
        rows.append(
            (f'<span class="pa-quiet">{html_of(action.lower())}</span>', f"{len(mutations):,}x", told)
        )
    cells = "".join(
        f'<tr><td>{name}</td><td class="pa-times">{times}</td><td class="pa-value">{value}</td></tr>'
        for name, times, value in rows
    )
    head = f"{html_of(group.table)} <span>{html_of(counts_text(group.counts))}</span>"
    return f'<div class="pa-head">{head}</div><table class="pa-table">{cells}</table>'


def rule_words(entry: Any) -> str:
    """A rule for people: `users: login_count, last_login_at` or `sessions`."""
    target = rule_target(entry)
    if target is None:
        return yaml_inline(entry)
    return target[0] if target[1] is None else f"{target[0]}: {', '.join(target[1])}"


def rule_trouble(entry: Any, tables: Sequence[Table]) -> str:
    """Why a rule can match nothing in a database of these tables; "" when it can."""
    target = rule_target(entry)
    if target is None:
        return "not a rule that is understood here"
    same = [table for table in tables if target[0] in (table.name, f"{table.schema}.{table.name}")]
    if not same:
        return "no such table"
    known = {name for table in same for name in table.column_names()}
    missing = [name for name in target[1] or () if name not in known]
    return f"no such column: {', '.join(missing)}" if missing else ""


def open_databases(plan: AuditPlan, settings: Settings, sandbox: SandboxBase | None) -> list[Database]:
    """The databases of a plan's listeners, with the tunnels to them, which last as long as this process."""
    found = []
    for number, entry in enumerate(plan.listeners):
        tunnel = Tunnel(settings, entry["target"]) if entry.get("target") else None
        there = sandbox if entry.get("there") else None
        found.append(open_database(plan.table(number), tunnel, there, as_dict(entry.get("options"))))
    return found


class AuditPage:
    """The Streamlit page: one object and one run of `show`, top to bottom, each time something is clicked.

    read_changes: gives the mutations that Plato tells now, by listener; None without a sandbox.
    What lasts between runs is in Streamlit's session state, one dict per listener.
    """

    def __init__(
        self,
        plan: AuditPlan,
        databases: Sequence[Database],
        read_changes: Callable[[], Mapping[str, list[Mutation]]] | None,
    ) -> None:
        self.plan = plan
        self.databases = databases
        self.read_changes = read_changes
        self.database = databases[0]
        self.listener = self.database.listener
        self.suffix = ""  # of the keys of widgets that each listener has its own of
        self.memory: dict[str, Any] = {}
        self.st: Any = None

    def show(self) -> None:
        """Draw the page."""
        self.st = import_package("streamlit", "streamlit")
        title = f"Ignore rules: {self.plan.service or 'database'}"
        self.st.set_page_config(page_title=title, layout="wide")
        self.st.html(_AUDIT_STYLE)
        self._choose_listener()
        self._load()
        self._show_changes()
        self._show_tables()
        self._show_rules()

    # What lasts between runs

    def _choose_listener(self) -> None:
        st = self.st
        st.title("Ignore rules")
        names = [str(entry["name"]) for entry in self.plan.listeners]
        number = 0
        if len(names) > 1:
            chosen = st.radio("Listener", range(len(names)), format_func=names.__getitem__, horizontal=True)
            number = int(chosen or 0)
        self.database = self.databases[number]
        self.suffix = f" {number}" if number else ""
        self.listener = self.database.listener
        self.memory = st.session_state.setdefault(f"listener {number}", {})
        words = self.database.words or self.listener.kind
        parts = [self.plan.service, f"dataset {self.plan.dataset}" if self.plan.config else None]
        parts += [f"{words} database {os.path.basename(self.listener.database)}"]
        st.caption(" · ".join(_markdown(part) for part in parts if part))

    def _load(self) -> None:
        """Read the file, the tables and the changes, each once; the slow ones at the same time."""
        memory = self.memory
        if "entries" not in memory:
            memory.update(file=None, entries=[], counts={}, examples={}, file_problem="")
            self._read_file()
        slow: dict[str, Callable[[], Any]] = {}
        if "tables" not in memory:
            slow["tables"] = self.database.early or self.database.tables
        if self.read_changes is not None and "changes" not in self.st.session_state:
            slow["changes"] = self.read_changes
        if slow:
            with self.st.spinner("Looking at the database and at what changed ..."):
                found = {name: _attempt(work) for name, work in [(n, Aside(w)) for n, w in slow.items()]}
            if "tables" in found:
                memory["tables"] = self._without_audit_table(found["tables"])
            if "changes" in found:
                self.st.session_state["changes"] = found["changes"]

    def _without_audit_table(self, found: Any) -> Any:
        """The tables without the one that the worker itself fills."""
        if isinstance(found, SandboxError):
            return found
        own = self.listener.table
        schemas = (self.listener.schema, self.listener.database, "main")
        return [table for table in found if table.name != own or table.schema not in schemas]

    def _read_file(self) -> None:
        memory = self.memory
        if self.plan.config is None:
            memory["file_problem"] = "There is no plato-config.yml here to save to; copy the YAML instead."
            return
        try:
            memory["file"] = RulesFile(self.plan.config, self.plan.dataset, self.listener.name)
            memory["entries"] = list(memory["file"].entries)
        except SandboxError as error:
            memory["file_problem"] = error.message

    @property
    def entries(self) -> list[Any]:
        """The rules as they are chosen now."""
        return list(self.memory["entries"])

    def _choose(self, change: Callable[..., list[Any]], *words: Any) -> None:
        """Take a changed list of rules; called by buttons before the page is drawn again."""
        self.memory["entries"] = change(self.entries, *words)
        self.memory.pop("saved", None)

    def _tables(self) -> list[Table]:
        found = self.memory.get("tables")
        return found if isinstance(found, list) else []

    def _mutations(self) -> list[Mutation] | SandboxError | None:
        """What changed in this listener's database; None without a sandbox."""
        changes = self.st.session_state.get("changes")
        if changes is None or isinstance(changes, SandboxError):
            return changes
        return list(changes.get(self.listener.name) or [])

    # What changed

    def _show_changes(self) -> None:
        st = self.st
        mutations = self._mutations()
        if mutations is None:
            return
        st.subheader("What changed", anchor="changes")
        if isinstance(mutations, SandboxError):
            st.info(_told(mutations), icon=":material/info:")
            st.button("Look again", on_click=self._forget_changes, key="refresh")
            return
        mutations = self._recorded(mutations)
        self._show_controls()
        if not mutations:
            recorded = "recorded" in self.memory
            st.success("Nothing changed meanwhile." if recorded else "No changes since the last reset.")
            return
        groups = changes_by_table(mutations)
        self._show_effect(mutations)
        st.html(changes_picture(groups, self.entries))
        self._show_groups(mutations)

    def _forget_changes(self) -> None:
        self.st.session_state.pop("changes", None)

    def _show_controls(self) -> None:
        st = self.st
        with st.container(horizontal=True, vertical_alignment="center"):
            if "recording" in self.memory:
                st.button(
                    "Stop and show what happened", key="stop", type="primary", on_click=self._stop_recording
                )
                place = f"[the application]({self.plan.url})" if self.plan.url else "the application"
                st.markdown(f":red[●] Recording. Do something in {place}, then stop.")
                return
            st.button("Look again", key="refresh", icon=":material/refresh:", on_click=self._forget_changes)
            st.button(
                "Record",
                key="record",
                icon=":material/radio_button_checked:",
                on_click=self._start_recording,
                help="See only what one thing that you do in the application changes",
            )
            if "recorded" in self.memory:
                st.button("Show all changes", key="all", on_click=lambda: self.memory.pop("recorded"))

    def _start_recording(self) -> None:
        """Note what has changed so far, as it is now and not as the page shows it."""
        self._look_again()
        found = self._mutations()
        self.memory.pop("recorded", None)
        if isinstance(found, list):
            self.memory["recording"] = found

    def _stop_recording(self) -> None:
        self._look_again()
        found = self._mutations()
        if isinstance(found, list):
            keys = {table.name: [name for name, _, key in table.columns if key] for table in self._tables()}
            known = {name: names for name, names in keys.items() if names}
            self.memory["recorded"] = changes_between(self.memory.pop("recording"), found, known)

    def _look_again(self) -> None:
        self._forget_changes()
        self._load()

    def _recorded(self, mutations: list[Mutation]) -> list[Mutation]:
        if "recording" not in self.memory and "recorded" in self.memory:
            self.st.caption("Only what happened during the recording")
            return list(self.memory["recorded"])
        return mutations

    def _show_effect(self, mutations: Sequence[Mutation]) -> None:
        left = len(remaining(mutations, self.entries))
        columns = self.st.columns(3)
        columns[0].metric("Changes", f"{len(mutations):,}")
        columns[1].metric("Hidden by the rules", f"{len(mutations) - left:,}")
        columns[2].metric("Remaining", f"{left:,}")
        file = self.memory["file"]
        if file is not None and self.entries != file.entries:
            self.st.markdown(":orange[●] Rules are chosen and not saved yet: [look at them and save](#rules)")

    def _show_groups(self, mutations: Sequence[Mutation]) -> None:
        st = self.st
        left = remaining(mutations, self.entries)
        groups = changes_by_table(left)
        shown = len(groups) if self.memory.get("show all") else SHOWN_GROUPS
        for group in groups[:shown]:
            with st.container(border=True):
                st.html(changes_table(group))
                self._show_choices(group)
        if len(groups) > shown:
            words = f"Show {counted(len(groups) - shown, 'more table')}"
            st.button(words, key="more", on_click=self.memory.update, args=({"show all": True},))
        if not left:
            st.success("The rules hide every change: `state -v` would pass.", icon=":material/check_circle:")

    def _show_choices(self, group: TableChanges) -> None:
        """The buttons under a table's changes, that of the suggested rule first."""
        table, names = group.table, list(group.columns)
        words = f"Ignore {_markdown(names[0])}" if len(names) == 1 else f"Ignore these {len(names)} columns"
        buttons: list[tuple[str, str, tuple[Any, ...]]] = [
            ("Ignore the whole table", f"table {table}", (with_table, table))
        ]
        if names:
            buttons.append((words, f"columns {table}", (with_columns, table, names)))
        if not isinstance(group.suggestion, str):
            buttons.reverse()
        with self.st.container(horizontal=True):
            for label, key, words_of_rule in buttons:
                self.st.button(label, key=key, on_click=self._choose, args=words_of_rule)

    # The tables

    def _show_tables(self) -> None:
        st = self.st
        st.subheader("Tables", anchor="tables")
        found = self.memory["tables"]
        if isinstance(found, SandboxError):
            st.error(_told(found), icon=":material/database_off:")
            st.button("Try again", key="again", on_click=lambda: self.memory.pop("tables"))
            return
        tables = self._matching(found)
        if not tables:
            st.caption("No table matches." if found else "The database has no tables.")
            return
        several = len({table.schema for table in found}) > 1
        chosen = self._list_tables(tables, several)
        names = [table_title(table, several) for table in tables]
        key = "look" + self.suffix
        if chosen is not None:
            st.session_state[key] = names[chosen]
        elif st.session_state.get(key) not in names:
            st.session_state.pop(key, None)
        name = st.selectbox("Look into", names, index=None, key=key, placeholder="Choose a table")
        if name in names:
            self._show_table(tables[names.index(name)])
        self._show_common_columns(found)

    def _matching(self, found: Sequence[Table]) -> list[Table]:
        st = self.st
        schemas = sorted({table.schema for table in found})
        chosen = None
        left, right = st.columns([2, 1], vertical_alignment="bottom") if len(schemas) > 1 else (st, st)
        words = left.text_input(
            "Search", key="search" + self.suffix, placeholder="Part of a table's or a column's name"
        )
        if len(schemas) > 1:
            start = schemas.index(self.listener.schema) + 1 if self.listener.schema in schemas else 0
            chosen = right.selectbox(
                "Schema", ["all schemas", *schemas], index=start, key="schema" + self.suffix
            )
        needle = (words or "").strip().lower()
        return [
            table
            for table in found
            if (chosen in (None, "all schemas", table.schema))
            and any(needle in name.lower() for name in (table.name, *table.column_names()))
        ]

    def _list_tables(self, tables: Sequence[Table], several: bool) -> int | None:
        """The list of tables; the number of the one that was clicked just now."""
        rows = []
        for table in tables[:SHOWN_LISTED]:
            exact = self.memory["counts"].get((table.schema, table.name))
            rows.append(
                {
                    **({"Schema": printable(table.schema)} if several else {}),
                    "Table": printable(table.name),
                    "Rows, about": exact if exact is not None else table.rows,
                    "Columns": len(table.columns),
                    "Kind": table.kind,
                    "Rule": self._rule_of(table),
                }
            )
        event = self.st.dataframe(
            rows,
            hide_index=True,
            height=min(330, 38 + 35 * len(rows)),
            on_select="rerun",
            selection_mode="single-row",
            column_config={"Rows, about": self.st.column_config.NumberColumn(format="localized")},
            key=f"list {len(tables)} {tables[0].name}" + self.suffix,
        )
        more = len(tables) - len(rows)
        about = f"{len(tables):,} tables and views" + (f", the first {len(rows):,} shown" if more else "")
        self.st.caption(f"{about}. Rows are the database's own estimates; counting is one click, below.")
        picked = list(event.selection.rows)
        previous, self.memory["picked"] = self.memory.get("picked"), picked
        return picked[0] if picked and picked != previous else None

    def _rule_of(self, table: Table) -> str:
        """What the rules ignore of a table: "", "ignored" or some columns."""
        columns: list[str] = []
        for target in filter(None, map(rule_target, self.entries)):
            if target[0] in (table.name, f"{table.schema}.{table.name}"):
                if target[1] is None:
                    return "ignored"
                columns += target[1]
        return f"ignored: {', '.join(columns)}" if columns else ""

    def _show_table(self, table: Table) -> None:
        st, key = self.st, (table.schema, table.name)
        with st.container(border=True):
            exact = self.memory["counts"].get(key)
            rows = f"{exact:,} rows" if isinstance(exact, int) else "rows not known"
            if exact is None and table.rows is not None:
                rows = f"about {table.rows:,} rows"
            st.html(
                f'<div class="pa-head">{html_of(table.name)} <span>{html_of(table.kind)}, {rows}</span></div>'
            )
            self._show_columns(table, self.memory["examples"].get(key))
            with st.container(horizontal=True):
                for word, label, work in (
                    ("examples", "Show example values", self.database.examples),
                    ("counts", "Count the rows", self.database.count),
                ):
                    known = key in self.memory[word]
                    if not known:
                        st.button(label, key=word, on_click=self._ask, args=(word, table, work))
            self._show_column_choice(table)
        problem = self.memory.pop("problem", None)
        if problem is not None:
            st.warning(_told(problem))

    def _ask(self, word: str, table: Table, work: Callable[[Table], Any]) -> None:
        """Ask the database something about a table, and remember the answer."""
        answer = _attempt(Aside(lambda: work(table)))
        if isinstance(answer, SandboxError):
            self.memory["problem"] = answer
        else:
            self.memory[word][table.schema, table.name] = answer

    def _show_columns(self, table: Table, examples: Sequence[Sequence[str | None]] | None) -> None:
        rows = []
        for number, (name, kind, is_key) in enumerate(table.columns):
            row = {
                "Column": printable(name),
                "Type": printable(kind)[:60],
                "Key": "primary" if is_key else "",
            }
            if examples is not None:
                values = dict.fromkeys(row[number] for row in examples)
                shown = ["NULL" if value is None else printable(value) for value in list(values)[:3]]
                row["Examples"] = " · ".join(shown) if examples else "(no rows)"
            rows.append(row)
        self.st.dataframe(
            rows, hide_index=True, height=min(300, 38 + 35 * len(rows)), key="shown columns" + self.suffix
        )

    def _show_column_choice(self, table: Table) -> None:
        st = self.st
        chosen = st.multiselect(
            "Ignore only some of its columns",
            table.column_names(),
            key=f"some {table.schema} {table.name}" + self.suffix,
        )
        with st.container(horizontal=True):
            if chosen:
                words = "Ignore this column" if len(chosen) == 1 else f"Ignore these {len(chosen)} columns"
                args = (with_columns, table.name, chosen)
                st.button(words, key="ignore columns", type="primary", on_click=self._choose, args=args)
            st.button(
                "Ignore the whole table",
                key="ignore table",
                on_click=self._choose,
                args=(with_table, table.name),
            )

    def _show_common_columns(self, tables: Sequence[Table]) -> None:
        """One rule for a column that many tables have, `updated_at` say."""
        st = self.st
        having: dict[str, list[str]] = {}
        for table in tables:
            if table.kind not in ("view", "materialized view") and table.schema in (
                self.listener.schema,
                tables[0].schema,
            ):
                for name in table.column_names():
                    having.setdefault(name, []).append(table.name)
        common = sorted(
            (name for name in having if len(having[name]) > 1), key=lambda name: -len(having[name])
        )
        if not common:
            return
        with st.expander("Ignore a column in every table that has it"):
            words = {name: f"{printable(name)} ({len(having[name])} tables)" for name in common}
            chosen = st.selectbox(
                "Column", common, index=None, format_func=words.get, key="common" + self.suffix
            )
            if chosen:
                args = (with_column_everywhere, chosen, sorted(set(having[chosen])))
                label = f"Ignore it in {len(having[chosen])} tables"
                st.button(label, key="everywhere", type="primary", on_click=self._choose, args=args)

    # The rules, and the way into the file

    def _show_rules(self) -> None:
        st = self.st
        st.subheader("Rules", anchor="rules")
        if not self.entries:
            st.caption("No rules yet: every change counts.")
        found = self._mutations()
        mutations = found if isinstance(found, list) else []
        for number, entry in enumerate(self.entries):
            self._show_rule(number, entry, mutations)
        self._show_saving()
        with st.expander("The rules as YAML, to copy"):
            st.code(rules_text(self.entries), language="yaml")

    def _show_rule(self, number: int, entry: Any, mutations: Sequence[Mutation]) -> None:
        st = self.st
        hidden = sum(ignores(entry, mutation) for mutation in mutations)
        trouble = rule_trouble(entry, self._tables()) if self._tables() else ""
        file = self.memory["file"]
        notes = ["new"] if file is not None and entry not in file.entries else []
        notes += [f"hides {counted(hidden, 'change')}"] if hidden else []
        left, right = st.columns([6, 1], vertical_alignment="center")
        mark = f' <span class="pa-warn">{html_of(trouble)}</span>' if trouble else ""
        told = html_of(", ".join(notes))
        left.html(f'<div>{html_of(rule_words(entry))}<span class="pa-quiet"> {told}</span>{mark}</div>')
        args = (_without_number, number)
        right.button("Remove", key=f"remove {number}", type="tertiary", on_click=self._choose, args=args)

    def _show_saving(self) -> None:
        st, file = self.st, self.memory["file"]
        saved = self.memory.get("saved")
        if saved is not None:
            (st.success if saved[0] else st.error)(saved[1])
        if file is None:
            st.caption(_markdown(self.memory["file_problem"]))
            return
        if self.entries == file.entries:
            if saved is None:
                st.caption(f"{_markdown(file.name)} has these rules.")
            return
        try:
            diff, shared = file.diff(self.entries), file.edit(self.entries).shared
        except SandboxError as error:
            st.error(_told(error))
            return
        st.markdown("**What saving changes in the file**")
        st.code(diff, language="diff")
        if shared:
            st.warning(
                f"These listeners take their rules from the same place, and change too: {', '.join(shared)}."
            )
        with st.container(horizontal=True):
            st.button(f"Save to {file.name}", key="save", type="primary", on_click=self._save)
            st.button("Discard", key="discard", on_click=self._discard)
            if saved is not None and not saved[0]:
                st.button("Load the file again", key="reload", on_click=self._reload)

    def _save(self) -> None:
        file = self.memory["file"]
        try:
            file.save(self.entries)
        except SandboxError as error:
            self.memory["saved"] = False, _told(error)
            return
        steps = "`start-worker --wait` gives them to the worker, and `reset` starts from a clean state."
        self.memory["entries"] = list(file.entries)
        self.memory["saved"] = True, f"Saved. {steps}"

    def _discard(self) -> None:
        self.memory["entries"] = list(self.memory["file"].entries)
        self.memory.pop("saved", None)

    def _reload(self) -> None:
        """Read the file anew, and make the same choices in it again."""
        file, chosen = self.memory["file"], self.entries
        old = list(file.entries)
        try:
            file.read()
        except SandboxError as error:
            self.memory["saved"] = False, _told(error)
            return
        self.memory["entries"] = with_changes_between(file.entries, old, chosen)
        self.memory.pop("saved", None)


def _without_number(entries: Sequence[Any], number: int) -> list[Any]:
    return [entry for position, entry in enumerate(entries) if position != number]


def _attempt(work: Aside) -> Any:
    """What came of some work, which may be the SandboxError that it ended with."""
    try:
        return work.result()
    except SandboxError as error:
        return error


def table_title(table: Table, several: bool) -> str:
    return f"{table.schema}.{table.name}" if several else table.name


def _markdown(text: str) -> str:
    """Text from outside that Streamlit's Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|$:~])", r"\\\1", printable(text))


def _told(error: SandboxError) -> str:
    """An error and its hint, for the page."""
    return _markdown(error.message) + (f"  \n{_markdown(error.hint)}" if error.hint else "")


# The server: Streamlit as a child process, whose page is this file


AUDIT_PAGE = "plato_sandbox_audit_page"  # the module whose `audit_page` the page is, while one is served
AUDIT_START_SECONDS = 60.0
STREAMLIT_OPTIONS = {
    "server.headless": "true",
    "server.address": "127.0.0.1",
    "server.fileWatcherType": "none",
    "server.runOnSave": "false",
    "browser.gatherUsageStats": "false",
    "browser.serverAddress": "127.0.0.1",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showSidebarNavigation": "false",
    "global.developmentMode": "false",
    "runner.magicEnabled": "false",
    "logger.level": "warning",
}


class AuditServer:
    """The process that serves the page. It ends when this one does, whatever ends that: a pipe joins them."""

    def __init__(self, plan: AuditPlan, port: int, reporter: Reporter) -> None:
        import json
        import subprocess

        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        command = [os.path.abspath(sys.executable), own_file(), "audit-server", str(port)]
        environment = child_environment(os.environ)
        if "PLATO_API_KEY" in os.environ:  # the page asks Plato what changed; the passwords are in the plan
            environment["PLATO_API_KEY"] = os.environ["PLATO_API_KEY"]
        pipe = subprocess.PIPE
        streams = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT}
        # In a session of its own, so that a Ctrl-C in the terminal is ours to handle.
        self._process = launch(command, reporter, env=environment, start_new_session=True, **streams)
        self._words: list[str] = []
        self._listening = Aside(functools.partial(self._listen, reporter))
        stdin: Any = self._process.stdin
        _feed_line(stdin, json.dumps(vars(plan)).encode() + b"\n")

    def _listen(self, reporter: Reporter) -> None:
        stdout: Any = self._process.stdout
        for line in stdout:
            text = line.decode("utf-8", "replace").rstrip()
            self._words = [*self._words[-20:], text]
            reporter.trace(printable(text))

    def wait_until_ready(self) -> None:
        """Return when the page can be asked for. SandboxError when the server does not come up."""
        deadline = time.monotonic() + AUDIT_START_SECONDS
        while not self._answers():
            if self._process.poll() is not None:
                raise self._failure()
            if time.monotonic() > deadline:
                raise TimedOutError(f"Streamlit did not start within {AUDIT_START_SECONDS:g} s.")
            time.sleep(0.05)

    def _answers(self) -> bool:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/_stcore/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait(self) -> None:
        """Wait for the server's end, which is never as it should be."""
        self._process.wait()
        raise self._failure()

    def _failure(self) -> SandboxError:
        self._listening.result()
        words = next((line for line in reversed(self._words) if line.strip()), "no reason given")
        return SandboxError(f"The page's server ended: {printable(words.strip()).rstrip('.')}.")

    def close(self) -> None:
        """End the server and whatever it started."""
        stdin: Any = self._process.stdin
        try:
            stdin.close()
        except OSError:
            pass
        _end_group(self._process)
        self._listening.result()
        stdout: Any = self._process.stdout
        stdout.close()


def _feed_line(stream: Any, line: bytes) -> None:
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:
        pass  # it has ended; `wait_until_ready` says why


def free_port(wanted: int | None) -> int:
    """The wanted port of 127.0.0.1, or the next that is free after it; any free one if none is wanted."""
    import socket

    last: OSError | None = None
    for port in range(wanted, min(wanted + 50, 65536)) if wanted else (0,):
        try:
            with socket.create_server(("127.0.0.1", port)) as listener:
                return int(listener.getsockname()[1])
        except OSError as error:
            last = error
    why = reason(last) if last else "there is no such port"
    raise SandboxError(f"No port could be opened for the page: {why}.", hint="Name another one with --port.")


def check_audit_packages(plan: AuditPlan) -> None:
    """SandboxError with the command that installs what is missing, before anything is started."""
    import importlib.util

    needed = {"streamlit": "streamlit"}
    for entry in plan.listeners:
        kind = as_dict(entry["fields"]).get("db_type")
        if kind in AUDIT_PACKAGES:
            module, package = AUDIT_PACKAGES[kind]
            needed[module] = package
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise missing_packages(missing)


def serve_audit_page(port: int) -> None:
    """Run Streamlit in this process, with this file as its page, until it is told to end."""
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    _import_quietly(("pandas", "pyarrow"))
    streamlit = import_package("streamlit.web.cli", "streamlit")
    options = [f"--{name}={value}" for name, value in {**STREAMLIT_OPTIONS, "server.port": port}.items()]
    streamlit.main(["run", own_file(), *options], prog_name="streamlit", standalone_mode=False)


def _import_quietly(modules: Sequence[str]) -> None:
    """Load what the first page will need before anybody can ask for it."""
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            pass


def _end_with_parent() -> None:
    """End this process when the one at the other side of standard input has ended."""
    import signal

    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.0)
    os._exit(143)


# ----------------------------------------------------------------------------------------------------------
# sandbox: what can be done with a sandbox, as operations; the commands and importers are thin over this
# ----------------------------------------------------------------------------------------------------------


class StartPlan:
    """What `start` will do, decided before anything is touched.

    environment: the `envs[]` entry of `make` (its alias is added when it is sent); state: the first fields
    of .sandbox.yaml; ssh_user: whose key is installed; config: in config mode; lifetime, ready_seconds: in
    seconds; reset: whether to reset once the VM is ready.
    """

    def __init__(
        self,
        environment: dict[str, Any],
        state: dict[str, Any],
        *,
        ssh_user: str = "root",
        config: Config | None = None,
        lifetime: int = DEFAULT_LIFETIME_SECONDS,
        ready_seconds: float = DEFAULT_READY_SECONDS,
        reset: bool = True,
    ) -> None:
        self.environment = environment
        self.state = state
        self.ssh_user = ssh_user
        self.config = config
        self.lifetime = lifetime
        self.ready_seconds = ready_seconds
        self.reset = reset


def plan_start(
    directory: str,
    *,
    from_config: bool = False,
    simulator: str | None = None,
    artifact_id: str | None = None,
    blank: bool = False,
    dataset: str | None = None,
    tag: str | None = None,
    service: str | None = None,
    cpus: int | None = None,
    memory: int | None = None,
    disk: int | None = None,
    timeout: float = DEFAULT_READY_SECONDS,
    lifetime: int = DEFAULT_LIFETIME_SECONDS,
    reset: bool = True,
) -> StartPlan:
    """Check the options of `start` and turn them into a plan. Reads the config, changes nothing.

    UsageError for options that do not fit together, ConfigError for a config with problems.
    """
    modes = [from_config, simulator is not None, artifact_id is not None, blank]
    if sum(modes) != 1:
        raise UsageError(
            "Choose one mode: --from-config, --simulator, --artifact-id or --blank."
            if not any(modes)
            else "Only one of --from-config, --simulator, --artifact-id and --blank can be used.",
            hint=f"In a simulator's directory: {PROGRAM} start --from-config",
        )
    specs = {"cpus": cpus, "memory": memory, "disk": disk}
    mode = ("from-config", "simulator", "artifact-id", "blank")[modes.index(True)]
    _refuse_unfit(mode, {"dataset": dataset, "tag": tag, "service": service, **specs})
    _check_seconds("--timeout", timeout)
    _check_seconds("--lifetime", lifetime)
    if from_config:
        plan = _plan_from_config(load_config(find_config(directory), dataset))
    elif simulator is not None:
        plan = _plan_from_simulator(simulator, tag, dataset)
    elif artifact_id is not None:
        plan = _plan_from_artifact(artifact_id)
    else:
        plan = _plan_blank(service, specs)
    plan.ready_seconds, plan.lifetime, plan.reset = timeout, lifetime, reset
    return plan


_OPTION_MODES = {
    "dataset": ("from-config", "simulator"),
    "tag": ("simulator",),
    "service": ("blank",),
    "cpus": ("blank",),
    "memory": ("blank",),
    "disk": ("blank",),
}


def _refuse_unfit(mode: str, given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        fitting = _OPTION_MODES[option]
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"--{option} is empty.")
        if value is not None and mode not in fitting:
            raise UsageError(f"--{option} goes with {' and '.join('--' + name for name in fitting)} only.")


def _check_seconds(option: str, value: float) -> None:
    if not 1 <= value <= 7 * 86400:
        raise UsageError(f"{option} is {value:g}; it must be from 1 second to 7 days (604800).")


def _plan_from_config(config: Config) -> StartPlan:
    numbers = {
        name: whole_number(config.compute.get(name)) for name in COMPUTE_FIELDS if name != "native_worker"
    }
    sent = {name: number for name, number in numbers.items() if number is not None}
    state = {
        "mode": "config",
        "service": config.service,
        "dataset": config.dataset,
        "plato_config_path": config.path,
        **{name: sent.get(name) for name in ("cpus", "memory", "disk")},
    }
    environment = {"type": "resource", "simulator": config.service, "sim_config": sent}
    return StartPlan(environment, state, ssh_user="plato", config=config)


def _plan_from_simulator(simulator: str, tag: str | None, dataset: str | None) -> StartPlan:
    name, colon, version = simulator.partition(":")
    if not name.strip() or (colon and not version):
        raise UsageError(
            f"--simulator is {simulator!r}; it must be a name, NAME:TAG or NAME:ARTIFACT-UUID.",
            hint="For example: --simulator espocrm:prod-latest",
        )
    if colon and tag is not None and tag != version:
        raise UsageError(
            f"--simulator names the tag {version!r} and --tag the tag {tag!r}; give one of them."
        )
    state = {
        "mode": "artifact",
        "simulator": simulator,
        "service": name,
        "dataset": dataset or DEFAULT_DATASET,
    }
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", version):
        return StartPlan({"type": "artifact", "artifact_id": version}, {**state, "artifact_id": version})
    chosen = version or tag or DEFAULT_TAG
    environment = {
        "type": "simulator",
        "simulator": name,
        "tag": chosen,
        "dataset": dataset or DEFAULT_DATASET,
    }
    return StartPlan(environment, {**state, "tag": chosen})


def _plan_from_artifact(artifact_id: str) -> StartPlan:
    if not artifact_id.strip():
        raise UsageError("--artifact-id is empty.")
    state = {"mode": "artifact", "artifact_id": artifact_id, "dataset": DEFAULT_DATASET}
    return StartPlan({"type": "artifact", "artifact_id": artifact_id}, state)


def _plan_blank(service: str | None, specs: Mapping[str, int | None]) -> StartPlan:
    if not service:
        raise UsageError(
            "--blank needs --service NAME.", hint=f"For example: {PROGRAM} start --blank --service myapp"
        )
    if not re.fullmatch(SERVICE_NAME, service):
        raise UsageError(f"--service is {service!r}; it may hold letters, digits, '.', '_' and '-' only.")
    sizes = {
        "cpus": _within("--cpus", specs["cpus"], DEFAULT_CPUS, CPUS_RANGE),
        "memory": _within("--memory", specs["memory"], DEFAULT_MEMORY_MB, MEMORY_RANGE_MB),
        "disk": _within("--disk", specs["disk"], DEFAULT_DISK_MB, DISK_RANGE_MB),
    }
    environment = {"type": "resource", "simulator": service, "sim_config": sizes}
    return StartPlan(environment, {"mode": "blank", "service": service, **sizes})


def _within(option: str, value: int | None, default: int, bounds: tuple[int, int]) -> int:
    chosen = default if value is None else value
    if not bounds[0] <= chosen <= bounds[1]:
        raise UsageError(f"{option} is {chosen}; it must be from {bounds[0]} to {bounds[1]}.")
    return chosen


def with_router_target(url: str | None, service: str | None) -> str | None:
    """The address for a browser: the public URL with `_plato_router_target` (api notes)."""
    if not url or not service:
        return url
    import urllib.parse

    target = urllib.parse.quote(f"{service}.web.plato.so", safe="")
    return f"{url}{'&' if '?' in url else '?'}_plato_router_target={target}"


class Sandbox(SandboxBase):
    """The sandbox of a directory: at most one, recorded in its .sandbox.yaml.

        with Sandbox.start("simulator/", from_config=True) as sandbox:
            print(sandbox.state["url"])

    Leaving the block stops it. `Sandbox("simulator/")` is the one that is already there.
    state: the fields of .sandbox.yaml as a dict, {} without a sandbox.
    """

    @classmethod
    def start(
        cls,
        directory: str = ".",
        *,
        replace: bool = False,
        settings: Settings | None = None,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> Sandbox:
        """Create a VM and return when it is ready, reset, and reachable by SSH.

        options: those of `plan_start` (from_config, simulator, artifact_id, blank, dataset, tag, service,
        cpus, memory, disk in MB, timeout and lifetime in seconds, reset). replace: stop a live one first.
        Whatever fails after the VM exists, the VM is closed again. Raises any SandboxError.
        """
        sandbox = cls(directory, settings=settings, reporter=reporter)
        plan = plan_start(sandbox.directory, **options)
        sandbox.settings.require_key()
        try:
            Starter(sandbox, plan).run(replace)
        finally:
            sandbox.api.transport.close()
        return sandbox

    def __enter__(self) -> Sandbox:  # noqa: PYI034  (Self is newer than 3.9)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def load(self) -> dict[str, Any]:
        """Read .sandbox.yaml into `state`. NoSandboxError without one, ConflictError for another Plato's."""
        state = load_state(self.directory)
        if state is None:
            raise NoSandboxError(
                f"There is no sandbox in {shown_path(self.directory)}.",
                hint=f"Start one: {PROGRAM} start --from-config (or --simulator, --artifact-id, --blank)",
            )
        self._check_base_url(state)
        if not self.state:
            self._tell_of_copy(state)
        self.state = state
        return state

    def _tell_of_copy(self, state: Mapping[str, Any]) -> None:
        """Warn when the directory is a copy of another one that still has the same sandbox."""
        theirs = state.get("directory")
        try:
            if not theirs or os.path.samefile(theirs, self.directory):
                return
            other = load_state(theirs)
        except (OSError, SandboxError):
            return
        if other and other.get("session_id") == state.get("session_id"):
            self.reporter.warn(
                f"{shown_path(self.directory)} is a copy of {shown_path(theirs)}: both have the same sandbox,"
                " and `stop` ends it for both."
            )

    def _check_base_url(self, state: Mapping[str, Any]) -> None:
        theirs = state.get("base_url") or DEFAULT_BASE_URL
        if theirs == self.settings.base_url or ("base_url" not in state and not self._is_ours(state)):
            return
        raise ConflictError(
            f"The sandbox of {shown_path(self.directory)} belongs to {printable(theirs)},"
            f" but PLATO_BASE_URL is {self.settings.base_url}.",
            hint="Set PLATO_BASE_URL to the sandbox's Plato. A file never decides where the API key is sent.",
        )

    @staticmethod
    def _is_ours(state: Mapping[str, Any]) -> bool:
        return "expires_at" in state  # `plato` 2.0.x records neither this nor its base URL

    def save(self, **changes: Any) -> None:
        """Change fields of the state (None removes one) and write .sandbox.yaml."""
        self.state = {key: value for key, value in {**self.state, **changes}.items() if value is not None}
        save_state(self.directory, self.state)

    # What the VM is doing

    def status(self) -> dict[str, Any]:
        """The state with what the API and the heartbeat's record say now. Nothing is changed.

        Adds vm_status, vm_status_reason, vm_running, ssh_command, heartbeat (see `heartbeat_health`), and
        `error` (a SandboxError or None) when the API could not be asked or the VM is gone.
        """
        state = self.load()
        report: dict[str, Any] = {**state, "ssh_command": ssh_command(state, shown=False)}
        report["heartbeat"] = heartbeat_health(self.settings, state, time.time())
        report.update(vm_status="unknown", vm_status_reason=None, vm_running=False, error=None)
        if state.get("session_id"):
            self._ask_for_status(state, report)
        else:
            self._look_at_unfinished_start(state, report)
        self.api.transport.close()
        return report

    def _look_at_unfinished_start(self, state: Mapping[str, Any], report: dict[str, Any]) -> None:
        """A record without an id: its `start` waits for Plato's answer, or died before it."""
        try:
            with DirectoryLock(self.directory, shared=True):
                report["vm_status_reason"] = "`start` was cut off before Plato answered"
                report["error"] = unfinished_start(state)
        except ConflictError as error:
            report["vm_status_reason"] = error.message

    def _ask_for_status(self, state: Mapping[str, Any], report: dict[str, Any]) -> None:
        try:
            details = self.api.session_details(state["session_id"])
        except SandboxError as error:
            gone = isinstance(error, ApiError) and error.status in (404, 410)
            report["vm_status"] = "gone" if gone else "unreachable"
            report["error"] = gone_error(None) if gone else error
            return
        word, why = vm_status(details, state.get("job_id"))
        report.update(vm_status=word or "active", vm_status_reason=why)
        report["vm_running"] = report["vm_status"].lower() in ("running", "active", "ready", "healthy")
        if report["vm_status"].lower() in TERMINAL_STATUSES:
            report["error"] = gone_error(why)

    # What goes to the VM

    def sync(
        self,
        path: str = ".",
        *,
        remote_path: str | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Make a directory on the VM like a local one: what differs is sent, what earlier syncs put there and
        is gone here is removed, what the VM made stays.

        path: relative to the sandbox's directory; a single file goes into remote_path under its name.
        remote_path: default /home/plato/worktree/<service>. options: those of `SyncOptions` (dry_run,
        checksum, gitignore, delete_extra, confirm, force, keep_going, via "auto", "api" or "ssh", timeout in
        seconds). watch: follow the tree until SIGINT, and call this with the report of each sync.
        Returns sent, removed, unchanged (numbers of files), bytes, archive_bytes, skipped, unreadable (lists
        of path and reason), seconds, via and remote_path; with dry_run the lists send and remove of paths.
        """
        self._load_for_use()
        syncer = Syncer(self, path, remote_path, SyncOptions(**options))
        self.revive_heartbeat()
        try:
            return syncer.run() if watch is None else syncer.watch(watch)
        except ApiError as error:
            raise self._gone_or(error) from None
        finally:
            syncer.forget()

    def start_services(self, *, dataset: str | None = None, **options: Any) -> dict[str, Any]:
        """Push the code to Gitea, clone it on the VM, and start the dataset's Docker Compose services there.

        dataset: default the sandbox's. options: those of `ServiceOptions` (via "git" or "sync", build,
        force_recreate, gitignore, timeout in seconds of one `docker compose up`).
        Returns via, branch, commit, repository (its URL), path (on the VM), changed (number of files),
        services (a list of name, type, file and containers), steps (of step and seconds) and seconds.
        """
        self._load_for_use()
        starter = ServiceStarter(self, self._config(None, dataset), ServiceOptions(**options))
        self.revive_heartbeat()
        try:
            return starter.run()
        finally:
            self.api.transport.close()

    # The worker, and what it records

    def start_worker(
        self,
        *,
        service: str | None = None,
        dataset: str | None = None,
        config_path: str | None = None,
        wait: float | None = None,
    ) -> dict[str, Any]:
        """Start the Plato worker with a dataset of a config, which goes to Plato as the user wrote it.

        wait: seconds until it must be up, TimedOutError after that; without, this returns at once.
        Returns status, correlation_id, service, dataset and ready (None if not waited for).
        """
        state = self._load_for_use()
        config = self._config(config_path, dataset)
        chosen = service or as_text(state.get("service")) or config.service
        self.revive_heartbeat()
        try:
            self.reporter.step("Starting the worker", SETUP_SECONDS)
            answer = self.api.start_worker(state["job_id"], chosen, config.dataset, config.for_setup())
            self._record(plato_config_path=config.path, dataset=config.dataset)
            if wait is not None:
                self._wait_for_worker(wait)
        except ApiError as error:
            raise self._gone_or(error) from None
        finally:
            self.api.transport.close()
        return {
            "status": as_text(answer.get("status")) or "ok",
            "correlation_id": as_text(answer.get("correlation_id")),
            "service": chosen,
            "dataset": config.dataset,
            "ready": None if wait is None else True,
        }

    def _wait_for_worker(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.reporter.step("Waiting for the worker", seconds)
        while True:
            began = time.monotonic()
            trouble = self._worker_trouble()
            if trouble is None:
                return
            self.reporter.detail(trouble)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOutError(
                    f"The worker was not up after {seconds:g} s: {trouble}.",
                    hint=f"It may still come up: {PROGRAM} state",
                )
            time.sleep(max(0.0, min(left, WORKER_POLL_SECONDS - (time.monotonic() - began))))

    def _worker_trouble(self) -> str | None:
        try:
            answer = self.api.state(self.state["session_id"], window=0.0)
        except ApiError as error:
            if isinstance(error, NetworkError) or error.status in (*RETRY_STATUSES, 408):
                return error.message.rstrip(".")
            raise
        return worker_trouble(job_of(answer, self.state.get("job_id")))

    def read_state(self) -> dict[str, Any]:
        """What the worker recorded since the last reset, the ignore rules applied.

        Returns SessionStateResponse with `summary` (see `summarize`) beside it; WorkerNotUpError while
        nobody can tell.
        """
        state = self._load_for_use()
        self.revive_heartbeat()
        try:
            answer = self.api.state(state["session_id"])
        except ApiError as error:
            raise self._gone_or(error) from None
        finally:
            self.api.transport.close()
        job = job_of(answer, state.get("job_id"))
        trouble = worker_trouble(job)
        if trouble is not None:
            raise WorkerNotUpError(
                f"The Plato worker is not up, so nobody knows what changed: {trouble}.",
                hint=f"Start it: {PROGRAM} start-worker --wait",
            )
        return {**answer, "summary": summarize(mutations_of(job["state"]))}

    def mutations(self, report: Mapping[str, Any]) -> list[Mutation]:
        """The mutations in what `read_state` returned."""
        return mutations_of(as_dict(job_of(report, self.state.get("job_id")).get("state")))

    def reset(self) -> dict[str, Any]:
        """Put the environment back to its initial state. Returns ResetSessionResponse."""
        state = self._load_for_use()
        self.revive_heartbeat()
        self.reporter.step("Resetting the environment", RESET_SECONDS)
        try:
            answer = self.api.reset(state["session_id"])
            check_reset(answer, state.get("job_id"))
        except SandboxError as error:
            raise self._gone_or(error) from None
        finally:
            self.api.transport.close()
        return answer

    def clear_audit(self) -> dict[str, Any]:
        """Empty the audit tables: by the API, or where it knows of no simulator, in the databases themselves.

        Returns via ("api" or "database") and listeners (the names, if it was done in the databases).
        """
        state = self._load_for_use()
        self.revive_heartbeat()
        self.reporter.step("Emptying the audit tables", RESET_SECONDS)
        try:
            answer = self.api.cleanup(state["session_id"])
        except ApiError as error:
            if error.status != 404:
                raise self._gone_or(error) from None
            gone = self.end_of_vm()
            if gone is not None:
                raise gone from None
            return {"via": "database", "listeners": self._clear_databases()}
        finally:
            self.api.transport.close()
        if answer.get("success") is False:
            said = as_text(answer.get("error")) or "no reason was given"
            raise SandboxError(f"The audit tables could not be emptied: {printable(said).rstrip('.')}.")
        return {"via": "api", "listeners": []}

    def _clear_databases(self) -> list[str]:
        tables = audit_tables(self._config(None, None).content)
        if not tables:
            raise SandboxError("The dataset has no `db` listener, so there is no audit table to empty.")
        if not (self.state.get("ssh_config_path") and self.state.get("ssh_host")):
            raise SandboxError(
                "Plato knows of no simulator in this session, and there is no SSH to reach its databases by.",
                hint=f"Start the worker, then try again: {PROGRAM} start-worker --wait",
            )
        scripts = [(table, table.script()) for table in tables]
        repair_ssh_config(self.state, self.settings, self.reporter)
        way = SshWay(self, RESET_SECONDS)
        try:
            way.ready()
            for table, script in scripts:
                outcome = way.run(script)
                if outcome.code:
                    words = printable(outcome.stderr.decode("utf-8", "replace").strip())[-400:].rstrip(".")
                    raise SandboxError(f"The audit table of {table.name!r} could not be emptied: {words}.")
        finally:
            way.close()
        return [table.name for table in tables]

    # Artifacts

    def snapshot(
        self, *, description: str | None = None, config: bool | None = None, wait: float | None = None
    ) -> dict[str, Any]:
        """Make an artifact of the VM as it is now, and record its id.

        config: whether the config, its flows and its ports go with it (None: those of a config sandbox do).
        wait: seconds until the artifact must be ready; without, its upload goes on in the background.
        Returns artifact_id and status ("creating" or "ready").
        """
        state = self._load_for_use()
        checkpoint: dict[str, Any] = {"description": description} if description else {}
        if state.get("mode") == "config" if config is None else config:
            checkpoint.update(self._config_for_snapshot())
        self.revive_heartbeat()
        self.reporter.step("Creating the snapshot", SNAPSHOT_SECONDS)
        try:
            artifact_id = self._take_snapshot(state, checkpoint)
            self._record(artifact_id=artifact_id)
            status = "creating" if wait is None else self._wait_for_artifact(artifact_id, wait)
        finally:
            self.api.transport.close()
        return {"artifact_id": artifact_id, "status": status}

    def _config_for_snapshot(self) -> dict[str, Any]:
        config = self._config(None, None)
        fields: dict[str, Any] = {
            "plato_config": read_config(config.path),
            "internal_app_port": whole_number(config.compute.get("app_port")),
            "messaging_port": whole_number(config.compute.get("plato_messaging_port")),
            "target": f"{config.service}.web.plato.so",
        }
        flows = as_text(as_dict(config.content.get("metadata")).get("flows_path"))
        if flows:
            fields["flows"] = read_config(flows_file(config.path, flows, shown_path(from_here(config.path))))
        return {name: value for name, value in fields.items() if value is not None}

    def _take_snapshot(self, state: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
        try:
            answer = self.api.snapshot(state["session_id"], checkpoint)
        except ApiError as error:
            lost = error.sent if isinstance(error, NetworkError) else error.status in (None, 408, 502, 504)
            if lost:
                raise lost_snapshot(f"its answer was lost: {error.message}") from None
            raise self._gone_or(error) from None
        job = job_of(answer, state.get("job_id"))
        artifact_id, said = as_text(job.get("artifact_id")), as_text(job.get("error"))
        if job.get("success") is False or (said and not artifact_id):
            raise SandboxError(
                f"The snapshot could not be created: {printable(said or 'no reason was given').rstrip('.')}.",
                hint="The sandbox runs on; try again.",
            )
        if artifact_id is None:
            raise lost_snapshot("its answer names none.")
        return artifact_id

    def _wait_for_artifact(self, artifact_id: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        self.reporter.step("Waiting for the artifact to be ready", seconds)
        while True:
            status = self._artifact_status(artifact_id)
            if status == "ready":
                return status
            if status == "failed":
                raise SandboxError(
                    f"The artifact {artifact_id} failed: Plato could not store the VM.",
                    hint="The sandbox runs on; take another snapshot.",
                )
            self.reporter.detail(status)
            if time.monotonic() > deadline:
                raise TimedOutError(
                    f"The artifact {artifact_id} was not ready after {seconds:g} s.",
                    hint="It may still become ready; it is recorded in .sandbox.yaml.",
                )
            time.sleep(ARTIFACT_POLL_SECONDS)

    def _artifact_status(self, artifact_id: str) -> str:
        try:
            answer = self.api.artifact(artifact_id)
        except ApiError as error:
            if isinstance(error, NetworkError) or error.status in (*RETRY_STATUSES, 404):
                self.reporter.trace(error.message)
                return "creating"
            raise
        return (as_text(answer.get("status")) or "ready").lower()

    # What they share

    def _load_for_use(self) -> dict[str, Any]:
        """The state of a sandbox that is to be used now, with a key to use it.

        ConflictError while its `start` is at work; what one left that was killed is used as far as it got.
        """
        state = self.load()
        if state.get("starting"):
            with DirectoryLock(self.directory, shared=True):
                pass
        if not state.get("session_id"):
            raise unfinished_start(state)
        self.settings.require_key()
        return state

    def _config(self, path: str | None, dataset: str | None) -> Config:
        """The config at a path, or the one that the sandbox was started from, or that of its directory."""
        recorded = as_text(self.state.get("plato_config_path"))
        if path is not None:
            found = os.path.abspath(path)
        else:
            found = recorded if recorded and os.path.isfile(recorded) else find_config(self.directory)
        config = load_config(found, dataset or as_text(self.state.get("dataset")))
        for warning in config.warnings:
            self.reporter.warn(warning)
        return config

    def _record(self, **changes: Any) -> None:
        """Write something learned into .sandbox.yaml, unless a `start` or `stop` is at work here."""
        try:
            with DirectoryLock(self.directory):
                session_id = self.state["session_id"]
                if self.load().get("session_id") == session_id:
                    self.save(**changes)
        except (ConflictError, NoSandboxError) as error:
            self.reporter.warn(f"{STATE_FILE} was not updated: {error.message}")

    def _gone_or(self, error: SandboxError) -> SandboxError:
        """What the failure of a session's request means: that the VM is gone, or the error itself.

        404 and 410 say so. An answer that says only that something did not work leaves it to be asked.
        """
        status = error.status if isinstance(error, ApiError) else None
        if status in (404, 410):
            return gone_error(None)
        if status is not None or isinstance(error, (NetworkError, AuthenticationError)):
            return error
        return self.end_of_vm() or error

    def end_of_vm(self) -> NoSandboxError | None:
        """Ask Plato whether the VM is gone; None when it is not, or when nobody can tell."""
        try:
            details = self.api.session_details(self.state["session_id"])
        except SandboxError as error:
            return gone_error(None) if isinstance(error, ApiError) and error.status in (404, 410) else None
        word, why = vm_status(details, self.state.get("job_id"))
        return gone_error(why) if (word or "").lower() in TERMINAL_STATUSES else None

    # What a browser sees

    def flows(self, source: str | None = None) -> FlowSet:
        """The flows of this sandbox, checked; `flows` and `shown` (where they are from) are its fields.

        source: "local" (the config's flows file) or "api" (what Plato has) for one of them only. Without
        a sandbox, the local config's. ConfigError lists what is wrong with them.
        """
        state = load_state(self.directory)
        if source == "api" or state or not local_flows_path(self):
            self.load()
        try:
            return find_flows(self, source)
        except ApiError as error:
            raise self._gone_or(error) from None

    def flow(
        self,
        names: Sequence[str] = (),
        *,
        told: FlowListener = lambda result, step: None,
        every: bool = False,
        source: str | None = None,
        headed: bool = False,
        slowmo: float = 0,
        output: str = FLOW_OUTPUT,
        keep_open: bool = False,
        base_url: str | None = None,
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
        if headed and not has_display(os.environ):
            self.reporter.warn("There is no display here (DISPLAY is not set); the browser runs headless.")
            headed = False
        check_flow_options(base_url, slowmo, timeout, keep_open and not headed)
        executable = chosen_browser(self.settings)
        if base_url is None:
            self._load_for_use()
            self.revive_heartbeat()
        known = self.flows(source)
        for warning in known.warnings:
            self.reporter.warn(warning)
        flows = known.choose(names, every=every)
        address = base_url or self._page_address()
        before = self._mutations_now() if verify_no_mutations else []
        began = time.time()
        session = FlowSession(self, known, flows, address, output, seconds=timeout, keep_open=keep_open)
        path = os.path.join(session.output, "report.html")
        try:
            self.reporter.step("Opening the browser")
            session.wait(session.open(executable, headed=headed, slowmo=slowmo))
            results = session.run(told)
            changed = new_mutations(before, self._mutations_now()) if verify_no_mutations else []
            report: Json = {
                "passed": not changed and not session.timed_out and all(item["passed"] for item in results),
                "started_at": utc_text(began),
                "seconds": round(time.time() - began, 3),
                "address": address,
                "source": known.source,
                "flows_path": known.path and os.path.abspath(known.path),
                "browser": {"name": "chromium", "headed": headed, "version": session.browser.version},
                "flows": results,
                "mutations": [mutation.raw for mutation in changed] if verify_no_mutations else None,
            }
            report = {**session.mask.value(report), "report": path}
            write_whole(path, report_page(report), 0o644)
            if keep_open:
                session.stay_open()
        except BrokenPipeError:
            raise
        except OSError as problem:
            raise SandboxError(
                f"{shown_path(session.output)} cannot be written: {reason(problem)}."
            ) from None
        finally:
            session.close()
            self.api.transport.close()
        return {**report, "error": self._flow_error(session, report, begun_elsewhere=bool(base_url))}

    def _flow_error(self, session: FlowSession, report: Json, begun_elsewhere: bool) -> SandboxError | None:
        """Why a run is no success, or None. NoSandboxError where the page was that of a VM that is gone."""
        failed = [result for result in report["flows"] if not result["passed"]]
        if session.timed_out:
            return TimedOutError(
                f"The flows were not done after {session.seconds:g} s.",
                hint="Give them more time with --timeout SECONDS, or look at the report for what took it.",
            )
        if failed:
            gone = None if begun_elsewhere or failed[0]["failure"]["step"] else self.end_of_vm()
            if gone is not None:
                raise gone
            return flow_failed_error(failed)
        return mutations_found(list(map(Mutation, report["mutations"]))) if report["mutations"] else None

    def _mutations_now(self) -> list[Mutation]:
        self.reporter.step("Reading the mutations")
        return self.mutations(self.read_state())

    def _page_address(self) -> str:
        """The address of the sandbox's page; asked again where `start` could not find it out."""
        state = self.state
        address = state.get("url") or state.get("public_url")
        if not address:
            try:
                answer = job_of(self.api.public_url(state["session_id"]), state.get("job_id"))
            except ApiError as error:
                raise self._gone_or(error) from None
            address = with_router_target(as_text(answer.get("url")), state.get("service"))
        if not address:
            raise SandboxError("Plato knows no address of this sandbox, so there is no page for a browser.")
        return address

    def revive_heartbeat(self) -> None:
        """See to it that the heartbeat runs; left to a `start` or `stop` that is at work here."""
        health = heartbeat_health(self.settings, self.state, time.time())
        if health["state"] in ("ok", "expired"):
            return
        try:
            with DirectoryLock(self.directory):
                pid = ensure_heartbeat(self.settings, self.load(), self.directory, self.reporter)
                if pid is not None:
                    self.save(heartbeat_pid=pid)
        except ConflictError as error:
            self.reporter.trace(error.message)

    # The end

    def stop(self, session_id: str | None = None) -> dict[str, Any]:
        """Destroy the VM, then remove all that belongs to it; in that order, so nothing is lost on failure.

        session_id: stop this session, from any directory. Returns session_id and already_gone.
        """
        if session_id is not None:
            session_id = session_id.strip()
            if not session_id:
                raise UsageError("--session-id is empty, so nothing was stopped.")
        try:
            with DirectoryLock(self.directory):
                return self._stop(session_id)
        finally:
            self.api.transport.close()

    def _stop(self, session_id: str | None) -> dict[str, Any]:
        remove_temporaries(state_path(self.directory))
        if session_id is None:
            self.load()
        else:
            self._load_if_about(session_id)
        target = session_id or self.state.get("session_id")
        if target is None:  # a start that died before Plato answered
            remove_state(self.directory)
            self.reporter.warn(f"{unfinished_start(self.state).message} Its record was removed.")
            return {"session_id": None, "already_gone": True}
        self.reporter.step("Stopping the VM")
        already_gone = self.close_session(target)
        self.clean_up({**self.state, "session_id": target})
        return {"session_id": target, "already_gone": already_gone}

    def _load_if_about(self, session_id: str) -> None:
        """Take up this directory's state if it is of that session; another or a damaged one is left alone."""
        try:
            state = load_state(self.directory)
        except StateError as error:
            self.reporter.warn(error.message)
            return
        if state is not None and state.get("session_id") == session_id:
            self._check_base_url(state)
            self.state = state

    def close_session(self, session_id: str) -> bool:
        """Close a session and be sure of it; True when it was gone already. Raises when it may still run."""
        try:
            answer = self.api.close(session_id)
            if answer.get("success") is not False:
                return False
            details = self.api.session_details(session_id)
        except ApiError as error:
            if error.status in (404, 410):
                return True
            raise
        word, _ = vm_status(details, self.state.get("job_id"))
        if word is not None and word.lower() in TERMINAL_STATUSES:
            return True
        said = as_text(answer.get("message")) or "no reason was given"
        raise ApiError(
            f"Plato did not close the session: {printable(said)}.",
            hint=f"Everything was left as it is; run `{PROGRAM} stop` again.",
        )

    def clean_up(self, state: Mapping[str, Any]) -> None:
        """Remove what belongs to a session that is certainly closed: heartbeat, SSH files, .sandbox.yaml."""
        session_id = state["session_id"]
        if not stop_heartbeat(self.settings, state):
            self.reporter.warn("The heartbeat could not be ended; it ends by itself within two beats.")
        SshFiles(self.settings.home, session_id).remove()
        remove_tree(git_store_path(self.settings.home, session_id))
        self._remove_foreign_ssh_files(state)
        _unlink_quietly(heartbeat_path(self.settings.home, session_id))
        if self.state.get("session_id") == session_id:
            remove_state(self.directory)  # last: what a killed `stop` leaves is still on record
        self.state = {}

    def _remove_foreign_ssh_files(self, state: Mapping[str, Any]) -> None:
        """Another client's SSH files, if they lie in PLATO_HOME and are named as such files are."""
        key = state.get("ssh_private_key_path")
        for path in (state.get("ssh_config_path"), key, key and key + ".pub"):
            name = os.path.basename(path or "")
            if path == os.path.join(self.settings.home, name) and re.fullmatch(
                r"ssh_[A-Za-z0-9-]+(\.conf|_key|_key\.pub)", name
            ):
                _unlink_quietly(path)


def plan_audit(
    sandbox: Sandbox,
    *,
    dataset: str | None = None,
    listener: str | None = None,
    direct: bool = False,
    url: str | None = None,
) -> AuditPlan:
    """What `audit-ui` is to show: the `db` listeners of the sandbox's dataset, and how they are reached.

    listener: only the one of this name. direct: at db_host from here, not through the gateway; a sandbox is
    not needed then. url: this database and no sandbox. Any SandboxError; the gateway is tried.
    """
    if url is not None:
        return _plan_audit_of_url(sandbox, url, dataset, listener)
    state: dict[str, Any] = {}
    try:
        state = sandbox._load_for_use()
    except NoSandboxError:
        if not direct:
            raise
    config = sandbox._config(None, dataset)
    listeners = []
    for name, fields in _audit_listeners(config, listener).items():
        kind, port = fields.get("db_type"), AuditTable(name, fields).port
        through = bool(state) and not direct and kind in AUDIT_PACKAGES
        target = f"{state['job_id']}--{port}" if through else None
        there = kind == "sqlite" and not direct
        listeners.append({"name": name, "fields": fields, "target": target, "there": there})
    for entry in listeners:
        if entry["target"]:
            gateway_connection(sandbox.settings, str(entry["target"])).close()
    return AuditPlan(
        listeners,
        config=config.path,
        service=config.service,
        dataset=config.dataset,
        directory=sandbox.directory if state else None,
        url=as_text(state.get("url")),
    )


def _audit_listeners(config: Config, wanted: str | None) -> dict[str, dict[str, Any]]:
    """The `db` listeners of a config, or the wanted one. CheckFailedError, UsageError."""
    every = as_dict(config.content.get("listeners"))
    found = {str(name): part for name, part in every.items() if part.get("type", "db") == "db"}
    if not found:
        raise CheckFailedError(
            f"The dataset {config.dataset!r} of {os.path.basename(config.path)} has no `db` listener,"
            " so there are no ignore rules to choose."
        )
    if wanted is not None and wanted not in found:
        raise UsageError(
            f"There is no `db` listener {wanted!r} in the dataset {config.dataset!r}.",
            hint=f"Its `db` listeners are: {', '.join(found)}.",
        )
    return {name: part for name, part in found.items() if wanted in (None, name)}


def _plan_audit_of_url(sandbox: Sandbox, url: str, dataset: str | None, listener: str | None) -> AuditPlan:
    """A database by its address. Its rules are those of the only `db` listener here, or of the one named."""
    fields, options, open_password = database_url(url, os.environ)
    if open_password:
        sandbox.reporter.warn(
            "Others on this machine can see the password in --database-url;"
            " leave it out, and set PGPASSWORD or MYSQL_PWD instead."
        )
    config = None
    if listener or any(os.path.exists(os.path.join(sandbox.directory, name)) for name in CONFIG_NAMES):
        config = load_config(find_config(sandbox.directory), dataset)
        names = list(_audit_listeners(config, listener))
        if len(names) > 1:
            raise UsageError(
                "The config has several `db` listeners; name the one whose database this is.",
                hint=f"--listener {' or --listener '.join(names)}",
            )
        fields["audit_table_name"] = _audit_listeners(config, listener)[names[0]].get("audit_table_name")
    name = names[0] if config else "database"
    return AuditPlan(
        [{"name": name, "fields": fields, "target": None, "there": False, "options": options}],
        config=config.path if config else None,
        service=config.service if config else None,
        dataset=config.dataset if config else DEFAULT_DATASET,
        directory=None,
        url=None,
    )


def audit_changes(directory: str, names: Sequence[str]) -> dict[str, list[Mutation]]:
    """What `state` tells now, by listener; all of it for each where Plato does not tell them apart."""
    sandbox = Sandbox(directory)
    job = job_of(sandbox.read_state(), sandbox.state.get("job_id"))
    content = as_dict(job.get("state"))
    parts = {name: as_dict(content.get(name)).get("mutations") for name in names}
    if len(names) == 1 or not all(isinstance(part, list) for part in parts.values()):
        return {name: mutations_of(content) for name in names}
    return {name: mutations_of({"mutations": part}) for name, part in parts.items()}


def check_reset(answer: Mapping[str, Any], job_id: str | None, hint: str | None = None) -> None:
    """Raise when a reset was answered with `success: false`."""
    if answer.get("success") is False:
        said = as_text(job_of(answer, job_id).get("message")) or "no reason was given"
        raise SandboxError(f"The environment could not be reset: {printable(said).rstrip('.')}.", hint=hint)


def gone_error(why: str | None) -> NoSandboxError:
    return NoSandboxError(
        f"The VM is gone{': ' + printable(why) if why else ''}.",
        hint=f"Remove what is left of it with `{PROGRAM} stop`, then start a new one.",
    )


def lost_snapshot(why: str) -> UnknownOutcomeError:
    return UnknownOutcomeError(
        f"Plato may have made an artifact, but {why}",
        hint="The sandbox runs on; take another snapshot if you need one.",
    )


UNKNOWN_VM = "If a VM was created, it gets no heartbeat and is shut down after about two minutes."


def unfinished_start(state: Mapping[str, Any]) -> NoSandboxError:
    return NoSandboxError(
        f"A `start` ({state.get('created_at', 'at an unknown time')}) was cut off before Plato answered it."
        f" {UNKNOWN_VM}",
        hint=f"`{PROGRAM} stop` removes this record; `start` goes ahead in spite of it.",
    )


class Starter:
    """One `start`: the order of its steps is what keeps every VM accounted for.

    Lock; record; create; record the ids; heartbeat; then wait. After a failure or an interruption the
    session is closed and everything removed; where even that fails, the record stays.
    """

    def __init__(self, sandbox: Sandbox, plan: StartPlan) -> None:
        self.sandbox = sandbox
        self.plan = plan
        self.api = sandbox.api
        self.settings = sandbox.settings
        self.reporter = sandbox.reporter
        self.provider: str | None = None
        self.keys: KeyMaking | None = None

    def run(self, replace: bool) -> None:
        for warning in self.plan.config.warnings if self.plan.config else ():
            self.reporter.warn(warning)
        cached = Aside(cache_bytecode)
        with DirectoryLock(self.sandbox.directory), SignalGuard(self.reporter) as guard:
            make_home(self.settings.home)
            ssh_config_text(self.settings, SshFiles(self.settings.home, "x"), "x", "x")  # refuses odd paths
            self._make_way(replace)
            try:
                self._create(guard)
                cached.result()
                guard.release()
                self._bring_up()
            except BaseException as error:
                guard.held = False
                if self.sandbox.state.get("session_id"):
                    self._undo(error)
                raise

    # Before the VM exists

    def _make_way(self, replace: bool) -> None:
        """Make sure that no live sandbox is recorded here; with `replace`, stop it."""
        if load_state(self.sandbox.directory) is None:
            return
        state = self.sandbox.load()
        session_id = state.get("session_id")
        if session_id is None:
            self.reporter.warn(unfinished_start(state).message)
        elif replace:
            self.reporter.step("Stopping the sandbox that is here")
            self.sandbox.close_session(session_id)
            self.sandbox.clean_up(state)
        else:
            report = self.sandbox.status()
            if not isinstance(report["error"], NoSandboxError):
                raise report["error"] or live_sandbox_error(state)
            self.reporter.note("The sandbox that was recorded here is gone; its files are removed.")
            self.sandbox.close_session(session_id)
            self.sandbox.clean_up(state)
        self.sandbox.state = {}

    def _create(self, guard: SignalGuard) -> None:
        """Create the VM and record it. From the request to the record no signal is obeyed at once.

        What is left after an error: without a VM, nothing; when nobody knows whether there is one, the
        record without a session, so that `status` tells what is known; else a session for `_undo` to close.
        """
        now = time.time()
        place = os.path.abspath(self.sandbox.directory)
        intent: dict[str, Any] = {**self.plan.state, "directory": place, "starting": True}
        intent["created_at"] = utc_text(now)
        intent["expires_at"] = utc_text(now + self.plan.lifetime)
        if self.settings.base_url != DEFAULT_BASE_URL:
            intent["base_url"] = self.settings.base_url
        try:
            self.sandbox.save(**intent)
            guard.held = True
            self.reporter.step("Creating the VM", MAKE_SECONDS)
            answer = self._make()
        except BaseException as error:
            unknown = isinstance(error, UnknownOutcomeError) or (
                isinstance(error, Interrupted) and guard.held
            )
            if isinstance(error, Interrupted) and unknown:
                error.message = f"Interrupted before Plato answered. {UNKNOWN_VM}"
                error.hint = unfinished_start(self.sandbox.state).hint
            elif not unknown and not self.sandbox.state.get("session_id"):
                remove_state(self.sandbox.directory)
            raise
        session_id = answer["session_id"]
        entry = as_dict(next(iter(as_list(answer.get("envs"))), None))
        if entry.get("success") is False or not as_text(entry.get("job_id")):
            self._refuse(session_id, as_text(entry.get("error")))
        self.sandbox.save(session_id=session_id, job_id=entry["job_id"], **self._learned(entry))

    def _learned(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What `make` tells of a VM beyond its id: the service of an artifact, the sizes of a config."""
        state = self.sandbox.state
        if state["mode"] == "artifact":
            return {} if state.get("service") else {"service": as_text(entry.get("simulator"))}
        sizes = as_dict(entry.get("effective_sim_config"))
        return {
            name: whole_number(sizes.get(name)) for name in ("cpus", "memory", "disk") if name not in state
        }

    def _make(self) -> dict[str, Any]:
        import uuid

        environment = {**self.plan.environment, "alias": f"sandbox-{uuid.uuid4().hex[:8]}"}
        try:
            answer = self.api.make_session(environment, self.plan.lifetime)
            if as_text(answer.get("session_id")):
                return answer
            raise ApiError("Plato's answer to the request that creates a VM names no session.")
        except NetworkError as error:
            if error.sent:
                self._record_what_the_answer_names(error)
                raise lost_answer(error) from None
            raise
        except ApiError as error:
            if error.status is None or error.status in (408, 502, 504):
                self._record_what_the_answer_names(error)
                raise lost_answer(error) from None
            raise

    def _record_what_the_answer_names(self, error: ApiError) -> None:
        """Half an answer may still name the session: then it can be closed, and nothing runs unknown."""
        found = re.search(rb'"session_id"\s*:\s*"([^"\\]{1,200})"', error.body)
        if found is None:
            return
        self.sandbox.save(session_id=found[1].decode("utf-8", "replace"))
        raise ApiError(
            f"Plato's answer to the request that creates a VM was cut short: {error.message}",
            hint="Run the command once more.",
        )

    def _refuse(self, session_id: str, why: str | None) -> NoReturn:
        """Plato made a session without a VM: record it, to be closed, and say why there is none."""
        self.sandbox.save(session_id=session_id)
        raise SandboxError(
            f"Plato could not create the VM: {printable(why or 'no reason was given').rstrip('.')}.",
            hint="Check the simulator, tag, dataset or artifact id; nothing is left running.",
        )

    # From the moment it exists

    def _bring_up(self) -> None:
        """Heartbeat first; then wait, with the keys being made meanwhile; then reset, address and SSH."""
        sandbox = self.sandbox
        pid = spawn_heartbeat(self.settings, sandbox.state, sandbox.directory, self.reporter)
        sandbox.save(heartbeat_pid=pid)
        session_id, job_id = sandbox.state["session_id"], sandbox.state["job_id"]
        self.keys = self._begin_keys(session_id)
        self._wait_for_ready(session_id, job_id)
        address = Aside(lambda: self._public_url(session_id, job_id))
        if self.plan.reset:
            self.reporter.step("Resetting the environment", RESET_SECONDS)
            check_reset(
                self.api.reset(session_id), job_id, hint="--no-reset starts without the initial reset."
            )
        self.reporter.step("Setting up SSH", SETUP_SECONDS)
        ssh = self._set_up_ssh(self.keys, session_id, job_id)
        public_url = address.result()
        url = with_router_target(public_url, sandbox.state.get("service"))
        sandbox.save(public_url=public_url, url=url, starting=None, **ssh)

    def _begin_keys(self, session_id: str) -> KeyMaking | None:
        missing = [name for name in ("ssh", "ssh-keygen") if find_program(name) is None]
        if missing:
            self.reporter.warn(
                f"{' and '.join(missing)} cannot be found, so SSH to this sandbox is not set up."
                " Install the OpenSSH client and start again to have it."
            )
            return None
        return KeyMaking(SshFiles(self.settings.home, session_id), self.reporter)

    def _wait_for_ready(self, session_id: str, job_id: str) -> None:
        deadline = time.monotonic() + self.plan.ready_seconds
        self.reporter.step("Waiting for the VM to boot", self.plan.ready_seconds)
        while True:
            began = time.monotonic()
            left = deadline - began
            if left <= 0:
                raise TimedOutError(
                    f"The VM was not ready after {self.plan.ready_seconds:g} s.",
                    hint="Run `start` again, with a longer --timeout if it needs one.",
                )
            if self._is_ready(session_id, job_id, max(1, min(READY_POLL_SECONDS, int(left)))):
                return
            pause = 0.5 - (time.monotonic() - began)
            if pause > 0:  # a server that answers at once is not to be flooded
                time.sleep(pause)

    def _is_ready(self, session_id: str, job_id: str, seconds: int) -> bool:
        try:
            answer = self.api.wait_for_ready(session_id, seconds)
        except ApiError as error:
            if error.status in (404, 410):
                raise NoSandboxError("The session ended while its VM was booting.") from None
            if error.status == 408:
                return False
            if isinstance(error, NetworkError) or error.status in RETRY_STATUSES or error.status is None:
                self.reporter.note(f"{error.message} Still waiting.")
                return False
            raise
        job = job_of(answer, job_id)
        word = as_text(job.get("status"))
        if answer.get("status") == "failed" or (word or "").lower() in TERMINAL_STATUSES:
            why = as_text(job.get("error")) or word or "no reason was given"
            raise SandboxError(
                f"The VM could not be started: {printable(why).rstrip('.')}.",
                hint="Run `start` again; if it fails the same way, try other sizes or another artifact.",
            )
        self.provider = as_text(job.get("provider")) or self.provider
        if answer.get("ready") is not True:
            self.reporter.detail(word or "pending")
        return answer.get("ready") is True

    def _public_url(self, session_id: str, job_id: str) -> str | None:
        api = self.api.another()
        try:
            answer = api.public_url(session_id)
        except SandboxError as error:
            self.reporter.warn(f"The public URL is unknown: {error.message}")
            return None
        finally:
            api.transport.close()
        return as_text(job_of(answer, job_id).get("url"))

    def _set_up_ssh(self, keys: KeyMaking | None, session_id: str, job_id: str) -> dict[str, Any]:
        """Install the key on the VM and write the config; returns the SSH fields of the state."""
        public_key = keys.finish() if keys else None
        config = self.plan.config
        user = "plato" if self.provider == "qemu" else self.plan.ssh_user
        if config is not None:
            self.api.setup_sandbox(job_id, config.service, config.dataset, config.for_setup(), public_key)
        elif public_key:
            self._add_key(session_id, job_id, public_key, user)
        if keys is None:
            return {}
        write_ssh_config(self.settings, keys.files, job_id, user)
        return {
            "ssh_host": keys.files.host,
            "ssh_config_path": keys.files.config,
            "ssh_private_key_path": keys.files.key,
        }

    def _add_key(self, session_id: str, job_id: str, public_key: str, user: str) -> None:
        try:
            answer = self.api.add_ssh_key(session_id, public_key, user)
        except ApiError as error:
            if error.status not in (404, 405, 501):
                raise
            self.api.setup_root_access(job_id, public_key)  # servers that do not have add_ssh_key
            return
        job = job_of(answer, job_id)
        if answer.get("success") is False or job.get("success") is False:
            said = as_text(job.get("error")) or "no reason was given"
            raise SandboxError(
                f"The SSH key could not be installed on the VM: {printable(said).rstrip('.')}."
            )

    # When it goes wrong

    def _undo(self, error: BaseException) -> None:
        """Close the session after a failure. Where that fails too, the record stays and the hint names it."""
        sandbox = self.sandbox
        self.reporter.step("Closing the VM")
        had_vm = "job_id" in sandbox.state
        try:
            if self.keys:
                self.keys.cancel()
            sandbox.close_session(sandbox.state["session_id"])
            sandbox.clean_up(sandbox.state)
        except (SandboxError, Interrupted) as trouble:
            why = trouble.message if isinstance(trouble, SandboxError) else "interrupted again"
            left = (
                f"The VM could not be closed ({printable(why).rstrip('.')}) and may still run: {PROGRAM} stop"
            )
            if isinstance(error, (SandboxError, Interrupted)):
                error.hint = left
            else:
                self.reporter.warn(left)
            return
        if isinstance(error, (SandboxError, Interrupted)):
            error.message = (
                f"{error.message.rstrip()} {'The VM' if had_vm else 'Its session'} was closed again."
            )


def live_sandbox_error(state: Mapping[str, Any]) -> ConflictError:
    return ConflictError(
        f"There is a live sandbox here already (session {printable(str(state.get('session_id')))}).",
        hint=f"`{PROGRAM} stop` ends it; `start --replace` ends it and starts a new one.",
    )


def lost_answer(error: ApiError) -> UnknownOutcomeError:
    return UnknownOutcomeError(
        f"Plato may have created a VM, but its answer was lost: {error.message}",
        hint="Such a VM gets no heartbeat and is shut down after about two minutes; then `start` again.",
    )


# ----------------------------------------------------------------------------------------------------------
# output: the one place that prints; the result on stdout, everything else on stderr
# ----------------------------------------------------------------------------------------------------------

PROGRESS_LINE_SECONDS = 10.0  # without a terminal, at most one progress line in this time
_COLOURS = {"good": "\033[32m", "bad": "\033[31m", "warn": "\033[33m", "plain": ""}


def use_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether a stream is a terminal that wants colours (NO_COLOR, TERM=dumb)."""
    return bool(stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb")


def duration_text(seconds: float) -> str:
    """A span of time for people: 0.4 s, 12 s, 5 min, 3 min 5 s, 2 h 10 min."""
    whole = int(seconds)
    if seconds < 10 and seconds != whole:
        return f"{max(0.0, seconds):.1f} s"
    if whole < 120:
        return f"{max(0, whole)} s"
    large, small, names = (
        (whole // 60, whole % 60, ("min", "s"))
        if whole < 7200
        else (whole // 3600, whole % 3600 // 60, ("h", "min"))
    )
    return f"{large} {names[0]} {small} {names[1]}" if small else f"{large} {names[0]}"


class Output(Reporter):
    """Human text and JSON, progress and errors. What comes from outside is made harmless, secrets are hidden.

    json: stdout gets exactly one JSON document, whatever happens; quiet: no progress and no notes.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO, environment: Mapping[str, str]) -> None:
        import threading

        self.stdout = stdout
        self.stderr = stderr
        self.json = False
        self.quiet = False
        self.verbose = False
        self.program = PROGRAM
        self.place = ""
        self._secret = environment.get("PLATO_API_KEY", "").strip()
        self._colour = use_colour(stdout, environment)
        self._live = stderr.isatty() and environment.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._ticker: threading.Thread | None = None
        self._wake = threading.Event()
        self._step = ""
        self._detail = ""
        self._began = 0.0
        self._limit: float | None = None
        self._last_line = -PROGRESS_LINE_SECONDS

    # Results

    def line(self, text: str = "") -> None:
        """A line of the result."""
        self.finish()
        self.stdout.write(self._hide(printable(text)) + "\n")

    def field(self, label: str, value: object, style: str = "plain", suffix: str = "") -> None:
        """`  Label:       value`, as the specification shows it; the value coloured on a terminal."""
        text = self._hide(printable(str(value)))
        if self._colour and _COLOURS[style]:
            text = f"{_COLOURS[style]}{text}\033[0m"
        self.finish()
        self.stdout.write(f"  {self._hide(printable(label)) + ':':<13}{text}{printable(suffix)}\n")

    def document(self, value: Mapping[str, Any]) -> None:
        """The one JSON document of --json."""
        import json

        text = json.dumps(value, ensure_ascii=not self._is_utf8(), indent=2)
        # A terminal obeys more characters than JSON has to escape.
        lines = ["".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in t) for t in text.split("\n")]
        self.finish()
        self.stdout.write(self._hide("\n".join(lines)) + "\n")

    def _is_utf8(self) -> bool:
        return (getattr(self.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"

    def error(self, error: SandboxError | Interrupted, code: str) -> None:
        """Tell an error: in words on stderr, and with --json as the document on stdout."""
        self.finish()
        if self.json:
            self.document({"error": self.error_document(error, code)})
        self._say(f"Error: {self.told(error.message)}")
        if error.hint:
            self._say(self.told(error.hint))

    def error_document(self, error: SandboxError | Interrupted, code: str) -> dict[str, Any]:
        """The `error` object of a --json document."""
        hint = self.told(error.hint) if error.hint else None
        message = self.told(error.message)
        return {"code": code, "message": message, "hint": hint, "exit_code": error.exit_code}

    def told(self, text: str) -> str:
        """Commands in a text as this user types them: the same program, the same directory."""
        return re.sub(
            rf"\b{PROGRAM} ({'|'.join(sorted(COMMANDS, reverse=True))}|--help)\b",
            lambda found: printable(f"{self.program} {found[1]}{self.place}"),
            text,
        )

    def _hide(self, text: str) -> str:
        return text.replace(self._secret, "***") if len(self._secret) >= SHORTEST_SECRET else text

    def _say(self, text: str) -> None:
        safe = self._hide("\n".join(map(printable, text.split("\n"))))
        with self._lock:
            self._erase()
            self._tell(safe + "\n")

    def _tell(self, text: str) -> None:
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
            self._step, self._detail, self._limit = self._hide(printable(text)), "", limit
            self._began = time.monotonic()
        if self.quiet:
            return
        self._draw()
        if self._ticker is None:
            import threading

            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def detail(self, text: str) -> None:
        narrow = printable(text).encode("ascii", "backslashreplace").decode()  # one column a character
        with self._lock:
            self._detail = narrow[:40]

    def note(self, text: str) -> None:
        if not self.quiet:
            self._say(printable(text))

    def warn(self, text: str) -> None:
        self._say(f"Warning: {self.told(printable(text))}")

    def trace(self, text: str) -> None:
        if self.verbose:
            self._say(f"  {printable(text)}")

    def finish(self) -> None:
        """The step under way is over: on a terminal it becomes a line that stays."""
        with self._lock:
            step, self._step = self._step, ""
            if step and self._live and not self.quiet:
                self._erase()
                self._tell(f"{step}: {duration_text(time.monotonic() - self._began)}\n")

    def drop(self) -> None:
        """Forget the step under way: what came of it is told otherwise."""
        with self._lock:
            self._step = ""
            self._erase()

    def outcome(self, word: str, text: str, style: str) -> None:
        """`  word    text` as a line of the result, the word coloured on a terminal."""
        self.drop()
        shown = f"{word:<7}"
        if self._colour and _COLOURS[style]:
            shown = f"{_COLOURS[style]}{shown}\033[0m"
        self.stdout.write(f"  {shown} {self._hide(printable(text))}\n")
        self.stdout.flush()

    def _tick(self) -> None:
        while not self._wake.wait(1.0 if self._live else PROGRESS_LINE_SECONDS / 10):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if not self._step:
                return
            now = time.monotonic()
            if not self._live and now - self._last_line < PROGRESS_LINE_SECONDS:
                return
            self._last_line = now
            text = self._hide(self._progress_text(now))
            if self._live:
                self._tell("\r\033[K" + text[: terminal_columns(self.stderr) - 1])
            else:
                self._tell(text + "\n")

    def _progress_text(self, now: float) -> str:
        spent = now - self._began
        text = f"{self._step} ({self._detail})" if self._detail else self._step
        if spent < 1:
            return text + " ..."
        limit = f" of at most {duration_text(self._limit)}" if self._limit else ""
        return f"{text}: {duration_text(int(spent))}{limit}"

    def _erase(self) -> None:
        if self._live:
            self._tell("\r\033[K")


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
# commands: one function per command: call the operation, show what came of it
# ----------------------------------------------------------------------------------------------------------


def command_start(options: argparse.Namespace, output: Output) -> int:
    try:
        return start_and_show(options, output)
    except Interrupted as interruption:
        if interruption.hint is None and os.path.exists(state_path(os.path.abspath(options.working_dir))):
            interruption.hint = f"The sandbox runs all the same; to end it: {PROGRAM} stop"
        raise


def start_and_show(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox.start(
        options.working_dir,
        replace=options.replace,
        reporter=output,
        from_config=options.from_config,
        simulator=options.simulator,
        artifact_id=options.artifact_id,
        blank=options.blank,
        dataset=options.dataset,
        tag=options.tag,
        service=options.service,
        cpus=options.cpus,
        memory=options.memory,
        disk=options.disk,
        timeout=options.timeout,
        lifetime=options.lifetime,
        reset=not options.no_reset,
    )
    state = sandbox.state
    if output.json:
        output.document({**state, "ssh_command": ssh_command(state, shown=False)})
        return 0
    output.line("Sandbox started successfully!")
    show_sandbox(state, output)
    output.field("Heartbeat", f"running (PID: {state['heartbeat_pid']})", "good")
    output.line()
    output.line(f"State saved to {STATE_FILE}")
    return 0


def show_sandbox(state: Mapping[str, Any], output: Output) -> None:
    """The lines that `start` and `status` share: where the VM is and how long it may live."""
    shown = (
        ("Session ID", state.get("session_id")),
        ("Job ID", state.get("job_id")),
        ("Mode", state.get("mode")),
        ("VM Status", state.get("vm_status")),
        ("Reason", state.get("vm_status_reason")),
        ("Simulator", state.get("simulator")),
        ("Artifact ID", state.get("artifact_id")),
        ("Service", state.get("service")),
        ("Dataset", state.get("dataset")),
        ("Public URL", state.get("url") or state.get("public_url")),
        ("Created", state.get("created_at")),
        ("Ends at", state.get("expires_at")),
        ("SSH", ssh_command(state, shown=True)),
    )
    for label, value in shown:
        if value:
            style = status_style(state) if label in ("VM Status", "Reason") else "plain"
            output.field(label, value, style)


def status_style(report: Mapping[str, Any]) -> str:
    if report.get("vm_running"):
        return "good"
    return "warn" if report.get("vm_status") in ("unreachable", "unknown", "created", "queued") else "bad"


def command_status(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox(options.working_dir, reporter=output)
    state = sandbox.load()
    repair_ssh_config(state, sandbox.settings, output)
    report = sandbox.status()
    error: SandboxError | None = report.pop("error")
    if output.json:
        told = {"error": output.error_document(error, error.code)} if error else {}
        output.document({**report, **told})
    else:
        output.line("Sandbox Status")
        show_sandbox(report, output)
        show_heartbeat(report["heartbeat"], time.time(), output)
    if error is None:
        return 0
    if not output.json:
        output.error(error, error.code)
    return error.exit_code


def show_heartbeat(health: Mapping[str, Any], now: float, output: Output) -> None:
    """The heartbeat's line of the specification, then its last good beat and its last error."""
    pid = health["pid"]
    if health["state"] in ("ok", "degraded"):
        output.field("Heartbeat", "running", "good" if health["state"] == "ok" else "warn", f" (PID: {pid})")
    elif pid:
        output.field("Heartbeat", "stopped", "bad", f" (PID: {pid} not found)")
    else:
        output.field("Heartbeat", "never started", "bad")
    if health["last_ok"]:
        output.field("Last beat", f"{duration_text(now - seconds_of(health['last_ok']))} ago", "plain")
    if health["ended"]:
        output.field("Ended", health["ended"], "bad")
    if health["last_error"]:
        at = health["last_error_at"]
        ago = f" ({duration_text(now - seconds_of(at))} ago)" if at else ""
        output.field("Last error", health["last_error"], "warn", ago)


def seconds_of(text: str) -> float:
    """The time that `utc_text` wrote, as seconds since 1970."""
    from datetime import datetime, timezone

    return datetime.fromisoformat(text[:19]).replace(tzinfo=timezone.utc).timestamp()


def command_stop(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox(options.working_dir, reporter=output)
    sandbox.settings.require_key()
    try:
        done = sandbox.stop(options.session_id)
    except Interrupted as interruption:
        which = f" --session-id {options.session_id}" if options.session_id else ""
        interruption.hint = f"The VM may still run, and nothing is lost; go on with: {PROGRAM} stop{which}"
        raise
    if output.json:
        output.document({"stopped": True, **done})
        return 0
    gone = " It was gone already; what was left of it here is removed." if done["already_gone"] else ""
    output.line(f"Sandbox stopped successfully.{gone}")
    return 0


def command_sync(options: argparse.Namespace, output: Output) -> int:
    if options.watch and options.dry_run:
        raise UsageError("--watch and --dry-run exclude each other.")
    confirm = None
    if options.delete_extra and not options.yes and not options.dry_run:
        if options.watch or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                "--delete-extra removes files that no sync put on the VM; without a terminal it needs --yes.",
                hint="See what would go: --delete-extra --dry-run",
            )
        confirm = functools.partial(confirm_removals, output)
    sandbox = Sandbox(options.working_dir, reporter=output)
    try:
        report = sandbox.sync(
            options.path,
            remote_path=options.remote_path,
            watch=functools.partial(show_sync, output=output) if options.watch else None,
            dry_run=options.dry_run,
            checksum=options.checksum,
            gitignore=options.gitignore,
            delete_extra=options.delete_extra,
            confirm=confirm,
            force=options.force,
            keep_going=options.keep_going,
            via=options.via,
            timeout=options.timeout,
        )
    except Interrupted as interruption:
        interruption.hint = f"The tree on the VM is the old one or the new one; go on with: {PROGRAM} sync"
        raise
    if output.json:
        output.document(report)
    elif options.dry_run:
        for word in ("remove", "send"):
            for path in report[word]:
                output.line(f"{word} {printable(path)}")
    elif options.watch:
        times = "1 sync" if report["syncs"] == 1 else f"{report['syncs']} syncs"
        output.line(f"Watched {times}: {sync_words(report)}.")
    else:
        show_sync(report, output)
    return 1 if report["unreadable"] else 0


def show_sync(report: Mapping[str, Any], output: Output) -> None:
    """One line of what a sync did; with --json that of a watch is progress."""
    way = {"ssh": "over SSH", "api": "through the API"}[report["via"]]
    amount = f"{size_text(report['archive_bytes'])} in {duration_text(report['seconds'])}, {way}"
    text = f"Synced to {report['remote_path']}: {sync_words(report)} ({amount})."
    if output.json:
        output.note(text)
    else:
        output.line(text)


def command_flow(options: argparse.Namespace, output: Output) -> int:
    source = "local" if options.local else "api" if options.api else None
    sandbox = Sandbox(options.working_dir, reporter=output)
    if options.list:
        return show_flows(sandbox.flows(source), output)
    if options.all and options.flow_name:
        raise UsageError("--all and --flow-name exclude each other.")
    report = sandbox.flow(
        options.flow_name,
        told=functools.partial(show_flow_progress, output),
        every=options.all,
        source=source,
        headed=options.headed,
        slowmo=options.slowmo,
        output=options.output,
        keep_open=options.keep_open,
        base_url=options.base_url,
        timeout=options.timeout,
        verify_no_mutations=options.verify_no_mutations,
    )
    error: SandboxError | None = report.pop("error")
    if output.json:
        told = {"error": output.error_document(error, error.code)} if error else {}
        output.document({**report, **told})
    else:
        if report["mutations"] is not None:
            output.field("Mutations", mutation_words(report["mutations"]))
        output.field("Report", shown_path(from_here(report["report"])))
    if error is None:
        return 0
    if not output.json:
        output.error(error, error.code)
    return error.exit_code


def show_flows(known: FlowSet, output: Output) -> int:
    """The flows by name, with how many steps each has and what it is about."""
    for warning in known.warnings:
        output.warn(warning)
    if output.json:
        listed = [
            {"name": flow.name, "description": flow.description, "steps": len(flow.steps)}
            for flow in known.flows
        ]
        path = known.path and os.path.abspath(known.path)
        output.document({"source": known.source, "flows_path": path, "flows": listed})
        return 0
    width = max((len(flow.name) for flow in known.flows), default=0)
    for flow in known.flows:
        steps = f"{len(flow.steps)} step{'s' if len(flow.steps) != 1 else ''}"
        output.line(f"{flow.name:<{width}}  {steps:>8}  {flow.description}".rstrip())
    return 0


def show_flow_progress(output: Output, result: dict[str, Any], step: dict[str, Any] | None) -> None:
    """A line for each step that ended, and for a flow that ended how it went."""
    if output.json:
        output.drop()
    elif step is None:
        show_flow_end(output, result)
    elif step["number"] == 0 and step["status"] == "passed":
        output.drop()
        output.line(f"Flow {result['name']}{': ' if result['description'] else ''}{result['description']}")
    else:
        tries = f", {step['attempts']} attempts" if step["attempts"] > 1 else ""
        words = f"{step['number'] or ' ':>2} {step_words(step)} ({duration_words(step['seconds'])}{tries})"
        good = step["status"] == "passed"
        output.outcome("ok" if good else "FAILED", words, "good" if good else "bad")


def show_flow_end(output: Output, result: Mapping[str, Any]) -> None:
    """The verdict of a flow; after a failure, all that is known of it."""
    output.drop()
    count = len(result["steps"]) - 1
    done = sum(step["status"] == "passed" for step in result["steps"][1:])
    seconds = duration_words(result["seconds"])
    if result["passed"]:
        output.line(f"Flow {result['name']} passed: {count} step{'s' if count != 1 else ''} in {seconds}.")
    else:
        output.line(f"Flow {result['name']} failed: {done} of {count} steps passed in {seconds}.")
    failure = result["failure"]
    if failure:
        show_flow_failure(output, failure)
    if result["trace_command"]:
        output.field("Trace", result["trace_command"])


def show_flow_failure(output: Output, failure: Mapping[str, Any]) -> None:
    status = f" (HTTP {failure['http_status']})" if failure["http_status"] else ""
    lines = (failure["text"] or "").split("\n")
    for label, value in (
        ("Place", failure["place"]),
        ("Expected", failure["expected"]),
        ("Seen", failure["seen"]),
        ("Address", f"{failure['url']}{status}"),
        *(("Page says", line) for line in lines[:1] if line),
        *(("", line) for line in lines[1:8]),
        *(("", "...") for _ in lines[8:9]),
        *(("Also", trouble) for trouble in failure["troubles"][:5]),
        ("Picture", failure["picture"] and shown_path(from_here(failure["picture"]))),
    ):
        if value and label:
            output.field(label, value, "bad" if label == "Seen" else "plain")
        elif value:
            output.line(f"  {'':<13}{value}")


def sync_words(report: Mapping[str, Any]) -> str:
    files = counted(report["sent"], "file")
    return f"{files} sent, {report['removed']} removed, {report['unchanged']} unchanged"


def confirm_removals(output: Output, paths: Sequence[str]) -> bool:
    """Show what would go for ever, and ask."""
    output.finish()
    for path in paths:
        output.note(f"  {printable(path)}")
    output.stderr.write(f"Remove these {len(paths)} from the VM, which no sync put there? [y/N] ")
    output.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def command_start_services(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox(options.working_dir, reporter=output)
    report = sandbox.start_services(
        dataset=options.dataset,
        via=options.via,
        build=options.build,
        force_recreate=options.force_recreate,
        gitignore=not options.no_gitignore,
        timeout=options.timeout,
    )
    if output.json:
        output.document(report)
        return 0
    output.line("Services started successfully!")
    if report["branch"]:
        output.field("Branch", report["branch"])
        output.field("Commit", report["commit"][:12], suffix="" if report["pushed"] else " (unchanged)")
    output.field("VM Path", report["path"])
    for service in report["services"]:
        states = [
            f"{found['service']} {found['health'] or found['state']}" for found in service["containers"]
        ]
        output.field(service["name"], ", ".join(states) or "no containers", "good")
    steps = ", ".join(f"{step['step']} {duration_text(step['seconds'])}" for step in report["steps"])
    output.field("Took", duration_text(report["seconds"]), suffix=f" ({steps})")
    return 0


def command_start_worker(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox(options.working_dir, reporter=output)
    done = sandbox.start_worker(
        service=options.service,
        dataset=options.dataset,
        config_path=options.config_path,
        wait=options.wait_timeout if options.wait else None,
    )
    if output.json:
        output.document(done)
        return 0
    output.line("Worker started successfully!" if done["ready"] else "The worker is starting.")
    output.field("Service", done["service"])
    output.field("Dataset", done["dataset"])
    output.field("Status", done["status"])
    if not done["ready"]:
        output.line()
        output.line(output.told(f"It takes minutes to come up; see whether it has: {PROGRAM} state"))
    return 0


def command_state(options: argparse.Namespace, output: Output) -> int:
    sandbox = Sandbox(options.working_dir, reporter=output)
    report = sandbox.read_state()
    found = sandbox.mutations(report)
    error = mutations_found(found) if options.verify_no_mutations and found else None
    if output.json:
        told = {"error": output.error_document(error, error.code)} if error else {}
        output.document({**report, **told})
    else:
        show_state(report["summary"], found, output)
        if error:
            output.error(error, error.code)
    return error.exit_code if error else 0


def show_state(summary: Mapping[str, Any], mutations: Sequence[Mutation], output: Output) -> None:
    """What changed: each table's counts, then the changes themselves."""
    output.line("Environment State")
    if not mutations:
        output.line("  No mutations since the last reset.")
        return
    for counts in summary["tables"]:
        output.field(counts["table"], counts_text(counts))
    output.line()
    width = max(len(mutation.table) for mutation in mutations[:SHOWN_MUTATIONS])
    for mutation in mutations[:SHOWN_MUTATIONS]:
        output.line(f"  {mutation.action:<7} {mutation.table:<{width}}  {mutation.told()}".rstrip())
    if len(mutations) > SHOWN_MUTATIONS:
        output.line(f"  ... and {len(mutations) - SHOWN_MUTATIONS} more; --json has all of them")


def command_reset(options: argparse.Namespace, output: Output) -> int:
    answer = Sandbox(options.working_dir, reporter=output).reset()
    if output.json:
        output.document(answer)
        return 0
    output.line("Environment reset successfully.")
    return 0


def command_clear_audit(options: argparse.Namespace, output: Output) -> int:
    done = Sandbox(options.working_dir, reporter=output).clear_audit()
    if output.json:
        output.document({"cleared": True, **done})
        return 0
    where = f" (in the databases of {', '.join(done['listeners'])})" if done["listeners"] else ""
    output.line(f"Audit tables emptied successfully{where}.")
    return 0


def command_audit_ui(options: argparse.Namespace, output: Output) -> int:
    """Serve the page until Ctrl-C, its ordinary end. With --json, the document comes at the start."""
    import signal

    sandbox = Sandbox(options.working_dir, reporter=output)
    output.step("Looking for the databases")
    plan = plan_audit(
        sandbox,
        dataset=options.dataset,
        listener=options.listener,
        direct=options.direct,
        url=options.database_url,
    )
    sandbox.api.transport.close()
    check_audit_packages(plan)
    server = None
    try:
        output.step("Starting the page", AUDIT_START_SECONDS)
        server = AuditServer(plan, free_port(options.port), output)
        server.wait_until_ready()
        show_audit_address(server, plan, output)
        if not (options.no_browser or output.json):
            open_browser(server.url, output)
        server.wait()
    except Interrupted as interruption:
        if interruption.number != signal.SIGINT or server is None:
            raise
    finally:
        if server is not None:
            server.close()
    return 0


def show_audit_address(server: AuditServer, plan: AuditPlan, output: Output) -> None:
    """Where the page is; from here on, errors are told in words only, as the one document is written."""
    if output.json:
        names = [entry["name"] for entry in plan.listeners]
        output.document({"url": server.url, "port": server.port, "listeners": names, "config": plan.config})
        output.json = False
    else:
        output.line(f"The page is at {server.url} (Ctrl-C ends it)")
    output.stdout.flush()


def open_browser(url: str, output: Output) -> None:
    """Show an address to the person at this machine, if there is a screen."""
    import subprocess

    program = find_program("open") if sys.platform == "darwin" else find_program("xdg-open")
    screen = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if program and screen:
        quiet = subprocess.DEVNULL
        launch([program, url], output, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def command_snapshot(options: argparse.Namespace, output: Output) -> int:
    config = True if options.include_config else False if options.no_config else None
    done = Sandbox(options.working_dir, reporter=output).snapshot(
        description=options.description,
        config=config,
        wait=options.wait_timeout if options.wait else None,
    )
    if output.json:
        output.document(done)
        return 0
    output.line("Snapshot created successfully!")
    output.field("Artifact ID", done["artifact_id"])
    if done["status"] != "ready":
        output.note("Its upload goes on in the background; --wait waits for it.")
    return 0


# ----------------------------------------------------------------------------------------------------------
# parser: the command line; one small function per command sets its options and its handler
# ----------------------------------------------------------------------------------------------------------

COMMANDS_HELP = {
    "start": "Start a new sandbox environment",
    "stop": "Stop and destroy the sandbox",
    "status": "Show current sandbox status",
    "sync": "Sync local code to the sandbox",
    "flow": "Execute a test flow against the simulator",
    "start-services": "Push code and start Docker Compose services",
    "start-worker": "Start or configure the Plato worker",
    "state": "Show what changed in the environment's databases",
    "reset": "Put the environment back to its initial state",
    "snapshot": "Create a snapshot (artifact) of the current state",
    "clear-audit": "Empty the audit tables that `state` reads",
    "audit-ui": "Choose ignore rules by looking at the databases, in the browser",
}

EXAMPLES = f"""\
examples:
  {PROGRAM} start --from-config       a VM for the plato-config.yml in this directory
  {PROGRAM} status --json             everything about it, for programs
  {PROGRAM} sync                      bring the VM's files up to date with this directory
  {PROGRAM} start-services            push the code, clone it on the VM, start Docker Compose
  {PROGRAM} state --verify-no-mutations

exit codes:
  0 done  1 failed  2 usage  3 no sandbox, or it is gone  4 authentication  5 conflict
  6 API or network  7 timed out, or outcome unknown  8 a check said no  9 the worker is not up
  130/143 interrupted
"""

START_EXAMPLES = f"""\
modes (choose one):
  {PROGRAM} start --from-config [--dataset base]
  {PROGRAM} start --simulator espocrm[:prod-latest | :ARTIFACT-UUID]
  {PROGRAM} start --artifact-id ID
  {PROGRAM} start --blank --service myapp [--cpus 4 --memory 2048 --disk 20480]
"""


SYNC_EPILOG = f"""\
Only what differs is sent. What an earlier sync put on the VM and is gone here is removed there; what the VM
made stays, unless --delete-extra is given. .platoignore files (in the syntax of .gitignore) keep files out.
Always left out: {", ".join(name.decode() for name in EXCLUDED_PATTERNS[:7])},
{", ".join(name.decode() for name in EXCLUDED_PATTERNS[7:])}, .plato and private keys.

examples:
  {PROGRAM} sync                      this directory
  {PROGRAM} sync ./src --dry-run      what would be done for another one
  {PROGRAM} sync --watch              keep the VM up to date while you edit
"""


SERVICES_EPILOG = f"""\
The code is what `sync` would bring, without what .gitignore files hide unless plato-config.yml names it.
It is pushed to a workspace branch in Gitea and cloned on the VM; what services wrote beside it there stays.

examples:
  {PROGRAM} start-services                   with the sandbox's dataset
  {PROGRAM} start-services --build           after a change to an image
  {PROGRAM} start-services --via sync        for an API key without access to a repository
"""


FLOW_EPILOG = f"""\
Flows come from the file that the config's metadata.flows_path names, else from Plato (--local, --api: only
from there). Needs Playwright and Chrome or Chromium; what is missing is told with the command that brings it.
Values of password fields are hidden in all that is shown and written. A failed flow is exit code 8.

examples:
  {PROGRAM} flow                      the login flow
  {PROGRAM} flow --list               which flows there are
  {PROGRAM} flow -f checkout --headed --slowmo 500
  {PROGRAM} flow --all --verify-no-mutations
"""


AUDIT_EPILOG = f"""\
The page shows what changed since the last reset and what is in the databases; rules that are chosen there
are saved to plato-config.yml. The databases are read only. Needs streamlit, and psycopg2-binary or pymysql.

examples:
  {PROGRAM} audit-ui                         the databases of the sandbox's dataset
  {PROGRAM} audit-ui --no-browser --port 8600
  {PROGRAM} audit-ui --database-url postgresql://user@host/database      with PGPASSWORD set
"""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with the options of one command; the others are only named, which takes half the time."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message[:1].upper()}{message[1:]}.", hint=f"See {self.prog} --help")

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog=PROGRAM,
        description="Ephemeral cloud VMs for simulator development on Plato.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and a hash of this file")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (text, describe) in {
        "start": (START_EXAMPLES, describe_start),
        "stop": (None, describe_stop),
        "status": (None, describe_status),
        "sync": (SYNC_EPILOG, describe_sync),
        "flow": (FLOW_EPILOG, describe_flow),
        "start-services": (SERVICES_EPILOG, describe_start_services),
        "start-worker": (None, describe_start_worker),
        "state": (None, describe_state),
        "reset": (None, describe_reset),
        "snapshot": (None, describe_snapshot),
        "clear-audit": (None, describe_clear_audit),
        "audit-ui": (AUDIT_EPILOG, describe_audit_ui),
    }.items():
        words = COMMANDS_HELP[name]
        command = commands.add_parser(
            name, help=words, description=words + ".", epilog=text, formatter_class=raw, allow_abbrev=False
        )
        if name == chosen:
            describe(command)
            add_common_options(command)
            command.set_defaults(parser=command)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-w", "--working-dir", metavar="DIR", default=".", help="directory of the sandbox (default: this one)"
    )
    parser.add_argument("-j", "--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only warnings and errors")
    parser.add_argument("--verbose", action="store_true", help="show requests and child processes on stderr")


def describe_start(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-c", "--from-config", action="store_true", help="use plato-config.yml in the working directory")
    add("-s", "--simulator", metavar="NAME", help="simulator name, NAME:TAG or NAME:ARTIFACT-UUID")
    add("-a", "--artifact-id", metavar="ID", help="specific artifact id")
    add("-b", "--blank", action="store_true", help="create a blank VM")
    add(
        "-d",
        "--dataset",
        metavar="NAME",
        help=f"dataset from config or simulator (default: {DEFAULT_DATASET})",
    )
    add("-t", "--tag", help=f"artifact tag (default: {DEFAULT_TAG})")
    add("--service", metavar="NAME", help="service name (required for a blank VM)")
    add("--cpus", type=int, metavar="N", help=f"number of CPUs of a blank VM (default: {DEFAULT_CPUS})")
    add("--memory", type=int, metavar="MB", help=f"its memory in MB (default: {DEFAULT_MEMORY_MB})")
    add("--disk", type=int, metavar="MB", help=f"its disk in MB (default: {DEFAULT_DISK_MB})")
    add(
        "--timeout",
        type=float,
        default=DEFAULT_READY_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for the VM to be ready (default: {DEFAULT_READY_SECONDS})",
    )
    add(
        "--lifetime",
        type=int,
        default=DEFAULT_LIFETIME_SECONDS,
        metavar="SECONDS",
        help=f"when the VM ends even with heartbeats (default: {DEFAULT_LIFETIME_SECONDS}, 8 hours)",
    )
    add("--no-reset", action="store_true", help="skip the initial reset after the VM is ready")
    add("--replace", action="store_true", help="stop a live sandbox of this directory first")
    parser.set_defaults(handler=command_start)


def describe_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--session-id", metavar="ID", help="stop this session, from any directory")
    parser.set_defaults(handler=command_stop)


def describe_status(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=command_status)


def describe_sync(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", default=".", metavar="PATH", help="what to sync (default: the working directory)")
    add("--remote-path", metavar="P", help=f"where to on the VM (default: {SYNC_ROOT}/<service>)")
    add("-n", "--dry-run", action="store_true", help="show what would be sent and removed, change nothing")
    add("--checksum", action="store_true", help="compare contents instead of modification times")
    add("--gitignore", action="store_true", help="honour .gitignore files too, not only .platoignore")
    add("--delete-extra", action="store_true", help="also remove what no sync put there (asks first)")
    add("-y", "--yes", action="store_true", help="do not ask")
    add("-f", "--force", action="store_true", help="also when nearly everything would be removed or replaced")
    add("--keep-going", action="store_true", help="sync the rest when something cannot be read (exit 1)")
    add("--via", choices=("auto", "api", "ssh"), default="auto", help="the way to the VM (default: auto)")
    add("--watch", action="store_true", help="go on: send changes as they are made, until Ctrl-C")
    add(
        "-t",
        "--timeout",
        type=float,
        default=SYNC_SECONDS,
        metavar="SECONDS",
        help=f"the longest wait for one step on the VM (default: {SYNC_SECONDS:g})",
    )
    parser.set_defaults(handler=command_sync)


def describe_start_services(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", "--dataset", metavar="NAME", help="dataset of the config (default: the sandbox's)")
    add(
        "--via",
        choices=("git", "sync"),
        default="git",
        help="how the code gets to the VM: through Gitea, or as `sync` does it (default: git)",
    )
    add("--no-gitignore", action="store_true", help="push also what .gitignore files hide")
    add("--build", action="store_true", help="build images before starting containers")
    add("--force-recreate", action="store_true", help="recreate containers even if nothing changed")
    add(
        "-t",
        "--timeout",
        type=float,
        default=UP_SECONDS,
        metavar="SECONDS",
        help=f"the longest wait for one `docker compose up` (default: {UP_SECONDS:g})",
    )
    parser.set_defaults(handler=command_start_services)


def describe_start_worker(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-s", "--service", metavar="NAME", help="service name (default: the sandbox's)")
    add(
        "-d", "--dataset", metavar="NAME", help=f"dataset name (default: the sandbox's, or {DEFAULT_DATASET})"
    )
    add("--config-path", metavar="FILE", help="path to plato-config.yml")
    add("--wait", action="store_true", help="wait until the worker is up")
    add_wait_timeout(parser, WORKER_SECONDS)
    parser.set_defaults(handler=command_start_worker)


def add_wait_timeout(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument(
        "--wait-timeout",
        type=float,
        default=seconds,
        metavar="SECONDS",
        help=f"the longest wait of --wait (default: {seconds:g})",
    )


def describe_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verify-no-mutations", action="store_true", help="exit 8 if there are any mutations"
    )
    parser.set_defaults(handler=command_state)


def describe_reset(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=command_reset)


def describe_snapshot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--description", metavar="TEXT", help="a note that stays with the artifact")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--include-config",
        action="store_true",
        help="send plato-config.yml, its flows and ports along (as config sandboxes do)",
    )
    which.add_argument("--no-config", action="store_true", help="do not send them")
    add("--wait", action="store_true", help="wait until the artifact is ready")
    add_wait_timeout(parser, ARTIFACT_SECONDS)
    parser.set_defaults(handler=command_snapshot)


def describe_clear_audit(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=command_clear_audit)


def describe_flow(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        *("-f", "--flow-name"),
        action="append",
        default=[],
        metavar="NAME",
        help="flow to execute; may be given more than once (default: login)",
    )
    add("--all", action="store_true", help="execute all flows, in the order of the file")
    add("-l", "--list", action="store_true", help="show which flows there are")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--local", action="store_true", help="only the flows file of the local config")
    source.add_argument("--api", action="store_true", help="only the flows that Plato has")
    add("--base-url", metavar="URL", help="begin at this address instead; needs no sandbox")
    window = parser.add_mutually_exclusive_group()
    window.add_argument("--headed", action="store_true", help="show the browser's window")
    window.add_argument("--headless", dest="headed", action="store_false", help="do not show it (default)")
    add("--keep-open", action="store_true", help="leave the window open at the end, until Ctrl-C")
    add("--slowmo", type=float, default=0, metavar="MS", help="wait so long after each action of the browser")
    add(
        *("-o", "--output"),
        default=FLOW_OUTPUT,
        metavar="DIR",
        help=f"for report, pictures and traces (default: {FLOW_OUTPUT})",
    )
    add("--verify-no-mutations", action="store_true", help="fail also when the database was changed")
    add(
        "-t",
        "--timeout",
        type=float,
        default=FLOW_SECONDS,
        metavar="SECONDS",
        help=f"the longest time for all of it (default: {FLOW_SECONDS:g})",
    )
    parser.set_defaults(handler=command_flow)


def describe_audit_ui(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", "--dataset", metavar="NAME", help="dataset of the config (default: the sandbox's)")
    add("--listener", metavar="NAME", help="only this `db` listener (default: all of them)")
    add("--port", type=int, metavar="N", help="port of the page, or the next free one (default: any)")
    add("--no-browser", action="store_true", help="do not open a browser, only print the address")
    add("--direct", action="store_true", help="reach db_host from here, not through the gateway")
    add("--database-url", metavar="URL", help="this database, without a sandbox; the password may stay out")
    parser.set_defaults(handler=command_audit_ui)


def command_word(arguments: Sequence[str]) -> str | None:
    """The command that is asked for, if any; UsageError for another word, with what was probably meant."""
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    if word is None or word in COMMANDS_HELP:
        return word
    meant = closest(word, COMMANDS_HELP)
    hint = f"Did you mean `{meant}`?" if meant else f"The commands are: {', '.join(COMMANDS_HELP)}."
    raise UsageError(f"There is no command {word!r}.", hint=hint)


def unknown_word(word: str, options: argparse.Namespace) -> UsageError:
    """The error for a word that the command does not take, with the option that was probably meant."""
    if options.command is None:
        return UsageError(f"{word!r} needs a command before it.", hint=f"See {PROGRAM} --help")
    meant = closest(word.partition("=")[0], re.findall("--[a-z-]+", options.parser.format_help()))
    hint = f"Did you mean {meant}?" if meant else f"See {PROGRAM} {options.command} --help"
    what = "option" if word.startswith("-") else "argument"
    return UsageError(f"`{options.command}` takes no {what} {word!r}.", hint=hint)


# ----------------------------------------------------------------------------------------------------------
# main: the only place that catches errors and turns them into words and exit codes
# ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    unfit = unfit_host()
    if unfit:
        print(unfit, file=sys.stderr)
        return 1
    if arguments[:1] == ["heartbeat-child"]:
        return heartbeat_child()
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output = Output(sys.stdout, sys.stderr, os.environ)
    output.program = invocation(sys.argv[0], os.environ)
    output.json = asks_for_json(arguments)
    try:
        code = run(arguments, output)
        flush_result()
        return code
    except SandboxError as error:
        return fail(output, error, error.code)
    except Interrupted as interruption:
        return fail(output, interruption, "interrupted")
    except KeyboardInterrupt:
        import signal

        return fail(output, Interrupted(signal.SIGINT), "interrupted")
    except BrokenPipeError:
        return closed_pipe()
    except Exception as error:  # noqa: BLE001  (a mistake of ours; a traceback helps no user)
        if output.verbose:
            import traceback

            for line in traceback.format_exc().splitlines():
                output.trace(line)
        words = f"This is a mistake in {PROGRAM} {__version__} ({type(error).__name__}: {error})."
        return fail(output, SandboxError(words, hint="Please report it; --verbose shows where."), "internal")


def unfit_host() -> str:
    """Why this tool cannot run here at all, in one sentence; "" where it can."""
    if os.name == "nt":
        return f"{PROGRAM} runs on Linux, macOS and WSL, not on native Windows; use it inside WSL."
    if sys.version_info < (3, 9):  # noqa: UP036  (the file is copied to where no installer checks)
        found = ".".join(map(str, sys.version_info[:2]))
        return f"{PROGRAM} needs Python 3.9 or newer; this is {found}."
    return ""


def open_closed_streams() -> None:
    """Let a standard stream that was closed (`>&-`) lead nowhere, before a file takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def flush_result() -> None:
    """Write the rest of the result; SandboxError when there is no room for it, say."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_stream(sys.stdout)
        raise SandboxError(
            f"The result could not be written to standard output: {reason(error)}.",
            hint=f"What was asked for is done; `{PROGRAM} status` shows how things are.",
        ) from None


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether --json is given, also as in `-cj`; asked before parsing, for the errors that parsing finds."""
    return any(word == "--json" or re.match("-[bcqnyfvl]*j", word) for word in arguments)


def invocation(program: str, environment: Mapping[str, str]) -> str:
    """How this user calls the tool, for the commands in hints; a wrapper may say so in the environment."""
    if environment.get("PLATO_SANDBOX_COMMAND"):
        return environment["PLATO_SANDBOX_COMMAND"]
    if program.endswith(".py"):
        return shell_words(["python3", program])
    return shell_words([os.path.basename(program) or PROGRAM])


def run(arguments: Sequence[str], output: Output) -> int:
    """Parse the command line and run its command; whatever goes wrong is an exception."""
    if arguments[:1] == ["gateway-stream"]:
        return run_gateway_stream(arguments[1:])
    if arguments[:1] == ["audit-server"]:
        return run_audit_server(arguments[1:])
    if arguments == ["--version"]:
        output.line(version_text())
        return 0
    parser = build_parser(command_word(arguments))
    if not arguments:
        parser.print_help()
        return 0
    try:
        options, unknown = parser.parse_known_args(arguments)
    except SystemExit as ending:  # --help
        return int(ending.code or 0)
    if unknown:
        raise unknown_word(unknown[0], options)
    if options.version or options.command is None:
        output.line(version_text())
        return 0
    output.json, output.quiet, output.verbose = options.json, options.quiet, options.verbose
    output.place = "" if options.working_dir == "." else " " + shell_words(["-w", options.working_dir])
    with SignalGuard(output):
        return int(options.handler(options, output))


def run_gateway_stream(arguments: Sequence[str]) -> int:
    """The hidden command behind ProxyCommand: --host H --port P [--ca-file F] TARGET, in this order."""
    values = dict(zip(arguments[:-1:2], arguments[1:-1:2]))
    if len(arguments) % 2 == 0 or not {"--host", "--port"} <= set(values) or not values["--port"].isdigit():
        raise UsageError("gateway-stream is for the ProxyCommand of the SSH configs written by `start`.")
    ca_file = values.get("--ca-file") or os.environ.get("SSL_CERT_FILE") or None
    gateway_stream(values["--host"], int(values["--port"]), arguments[-1], ca_file)
    return 0


def run_audit_server(arguments: Sequence[str]) -> int:
    """The hidden command behind `audit-ui`: PORT, and the plan as a line of JSON on standard input."""
    import json
    import types

    line = sys.stdin.buffer.readline() if arguments and arguments[0].isdigit() else b""
    if not line:
        raise UsageError("audit-server is for `audit-ui`.")
    plan, settings = AuditPlan(**json.loads(line)), Settings.from_environment()
    sandbox = reader = None
    if plan.directory is not None:
        sandbox = Sandbox(plan.directory)
        sandbox.load()
        names = [str(entry["name"]) for entry in plan.listeners]
        reader = functools.partial(audit_changes, plan.directory, names)
    databases = open_databases(plan, settings, sandbox)
    for database in databases:
        database.early = Early(database.tables)
    page = functools.partial(AuditPage, plan, databases, reader)
    module = types.ModuleType(AUDIT_PAGE)
    module.show = lambda: page().show()  # type: ignore[attr-defined]
    sys.modules[AUDIT_PAGE] = module
    try:
        serve_audit_page(int(arguments[0]))
    finally:
        for database in databases:
            database.close()
    return 0


def version_text() -> str:
    """The version, and a hash of this file's text so that edited copies show."""
    import hashlib

    with open(own_file(), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return f"{PROGRAM} {__version__} ({digest[:12]})"


def fail(output: Output, error: SandboxError | Interrupted, code: str) -> int:
    try:
        output.error(error, code)
        sys.stdout.flush()
    except OSError:  # nobody reads it; the exit code still tells
        forget_stream(sys.stdout)
    return error.exit_code


def closed_pipe() -> int:
    """Whoever read the output has gone, and shells count that as SIGPIPE."""
    forget_stream(sys.stdout)
    return 141


if __name__ == "__main__":
    if AUDIT_PAGE in sys.modules:  # Streamlit runs this file as its page
        sys.modules[AUDIT_PAGE].show()
    else:
        sys.exit(main())
