"""The command `local_plato.py`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .endpoints import Settings
from .engine import engine_problem
from .home import Home, HomeError, default_home
from .images import Images
from .machine import remove_tree

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COMMAND = Path(__file__).resolve().parent.parent / "local_plato.py"
STOP_SECONDS = 15.0
ADMIN_SECONDS = 10.0


class CommandError(Exception):
    """A command failed; the message says why."""


# ---------------------------------------------------------------------------
# the server's life
# ---------------------------------------------------------------------------


def up(home: Home, options: Sequence[str] = ()) -> dict[str, Any]:
    """Start the server unless it runs. What it says about itself, and `started` when it was started now."""
    home.prepare()
    with home.lock_for_start():
        information = home.information()
        if information is not None and home.running:
            if answers(information):
                return {**information, "started": False}
            if not wait_for_stop(home):
                raise CommandError(
                    "the local Plato runs but does not answer; stop it with: local_plato.py down"
                )
        return {**start_server(home, options), "started": True}


def answers(information: dict[str, Any]) -> bool:
    """Whether the server takes requests; one that is about to end does not."""
    try:
        admin(information, "GET", "/_local/status")
    except OSError:
        return False
    return True


def start_server(home: Home, options: Sequence[str]) -> dict[str, Any]:
    """Start `serve` apart from this terminal, and wait until it is ready. Raises CommandError."""
    with open(home.log_path, "a") as log:
        process = subprocess.Popen(
            [sys.executable, str(COMMAND), "--home", str(home.directory), "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
            text=True,
        )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if not line:
        process.wait()
        last = home.log_path.read_text(errors="replace").strip().splitlines()[-1:]
        raise CommandError(f"the server did not start: {''.join(last)} (see {home.log_path})")
    process.returncode = 0  # It outlives us, of which Popen would warn.
    information: dict[str, Any] = json.loads(line)
    return information


def down(home: Home) -> bool:
    """Stop the server, and with it every VM; whether one ran."""
    if not home.directory.is_dir():
        return False
    with home.lock_for_start():
        if not home.running:
            return False
        information = home.information() or {}
        try:
            admin(information, "POST", "/_local/shutdown")
        except (OSError, ValueError, KeyError):
            # The lock proves that the server lives, and only the server writes its pid.
            signal_server(information, signal.SIGTERM)
        if not wait_for_stop(home):
            signal_server(information, signal.SIGKILL)
            home.wait_until_stopped()
    return True


def signal_server(information: dict[str, Any], number: int) -> None:
    try:
        os.kill(int(information["pid"]), number)
    except (KeyError, ProcessLookupError):
        pass


def wait_for_stop(home: Home) -> bool:
    """Wait for the server to let go of its lock, with the kernel's help and a limit."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)
    try:
        home.wait_until_stopped()
        return True
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def admin(information: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """One request to the admin interface of a running server, past any proxy."""
    request = urllib.request.Request(information["base_url"] + path, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ADMIN_SECONDS) as response:
        value: dict[str, Any] = json.load(response)
    return value


# ---------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------


def show(arguments: argparse.Namespace, value: dict[str, Any], lines: Sequence[str]) -> int:
    """Print a result as JSON or as lines."""
    print(json.dumps(value, indent=2) if arguments.json else "\n".join(lines))
    return 0


def warn(information: dict[str, Any], again: bool = False) -> None:
    """Say what does not hold on this host: when the server has just started, and `again` where it matters."""
    if information["started"] or again:
        for warning in information["warnings"]:
            print(f"local plato: {warning}", file=sys.stderr)


def command_up(home: Home, arguments: argparse.Namespace) -> int:
    information = up(home, server_options(arguments))
    warn(information)
    state = "started" if information["started"] else "already running"
    return show(
        arguments,
        information,
        [f"Local Plato {state} at {information['base_url']} (PID: {information['pid']})"],
    )


def command_env(home: Home, arguments: argparse.Namespace) -> int:
    information = up(home)
    warn(information)
    environment: dict[str, str] = information["environment"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return show(arguments, environment, exports)


def command_status(home: Home, arguments: argparse.Namespace) -> int:
    """Exit status 0 when the server runs, else 3."""
    information = home.information()
    if information is None or not home.running:
        show(
            arguments,
            {"running": False, "home": str(home.directory)},
            [f"Local Plato is not running ({home.directory})"],
        )
        return 3
    status = admin(information, "GET", "/_local/status")
    sessions = admin(information, "GET", "/_local/sessions")["sessions"]
    value = {"running": True, "home": str(home.directory), **information, **status, "sessions": sessions}
    gateway_host = information["environment"].get("PLATO_GATEWAY_HOST", "off")
    lines = [
        f"Local Plato is running at {information['base_url']} (PID: {information['pid']})",
        f"  Data directory:  {home.directory}",
        f"  Gateway:         {gateway_host}:{information['gateway_port']}",
        f"  Docker in VMs:   {'off: ' + information['docker'] if information['docker'] else 'on'}",
        f"  Living VMs:      {len(status['alive'])}",
    ]
    lines += [
        f"  {job['job_id']}  {job['status']:<10} {job['simulator']}" for s in sessions for job in s["jobs"]
    ]
    return show(arguments, value, lines)


def command_images(home: Home, arguments: argparse.Namespace) -> int:
    """Make the Docker images of VMs ahead of the first use, unless they are there."""
    problem = engine_problem()
    if problem is None:
        images = Images()
        place = images.data_root()
        problem = images.problem
        if place is not None:
            print(place.parent)
    if problem is not None:
        raise CommandError(problem)
    return 0


def command_down(home: Home, arguments: argparse.Namespace) -> int:
    stopped = down(home)
    print("Local Plato stopped" if stopped else "Local Plato was not running")
    if arguments.purge and home.directory.is_dir():
        remove_tree(home.directory)
        print(f"Removed {home.directory}")
    return 0


def command_run(home: Home, arguments: argparse.Namespace) -> int:
    """Become `plato_sandbox.py ARGS` of this repository; its hints then name this command."""
    typed = shlex.join(["python3", sys.argv[0], "run"])
    command = [sys.executable, str(REPOSITORY / "plato_sandbox.py"), *arguments.arguments]
    makes_vm = arguments.arguments[:1] in (["start"], ["up"])
    return become(home, command, {"PLATO_SANDBOX_COMMAND": typed}, makes_vm)


def command_exec(home: Home, arguments: argparse.Namespace) -> int:
    """Become any command."""
    words = arguments.arguments[1:] if arguments.arguments[:1] == ["--"] else arguments.arguments
    if not words:
        raise CommandError("exec needs a command: local_plato.py exec -- CMD ARGS")
    return become(home, words, {})


def become(home: Home, command: list[str], environment: dict[str, str], again: bool = False) -> int:
    information = up(home)
    warn(information, again)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **information["environment"], **environment})
    except OSError as error:
        raise CommandError(f"{command[0]}: {error.strerror}") from error


def command_serve(home: Home, arguments: argparse.Namespace) -> int:
    from . import serve

    status = serve.serve(home, settings_of(arguments), arguments.ca_from)
    # Threads of open connections may hold what the interpreter would wait for in its own orderly end.
    os._exit(status)


# ---------------------------------------------------------------------------
# the command line
# ---------------------------------------------------------------------------

SETTINGS = {
    "boot_seconds": "seconds that a VM takes to boot",
    "heartbeat_seconds": "seconds without a heartbeat until a VM is shut down",
    "upload_seconds": "seconds that an artifact is being uploaded after its snapshot",
    "speed": "how many times faster than real time boots, lifetimes, heartbeats and uploads go",
    "idle_minutes": "stop by itself after that long without use and without VMs; 0: never",
    "gateway_host": "the gateway's host name",
    "not_ready_status": "status of wait_for_ready when it is not ready in time",
    "hub_scheme": "how Gitea's repositories are reached",
    "worker_seconds": "seconds that a worker takes to come up",
    "connect_seconds": "seconds that connect_network takes",
    "gateway_seconds": "seconds after connect_network in which the gateway does not know the VM yet",
    "unconnected": "what the gateway does with a connection to a VM that was never connected",
    "network_for": "what needs connect_network: the gateway, or execute and add_ssh_key too",
    "reset_without_worker": "status of a reset, which fails, where a VM has no running worker",
    "wrong_config": "status of a snapshot whose plato_config is not one dataset",
    "old_clients": "have setup-sandbox and setup-root-access, for clients of before SDK 2.7",
    "isolation": "namespaces for VMs, or none, and with them no processes",
    "docker": "a Docker engine for each VM where this host allows it, none, or not even the docker command",
}
PASSING = ("run", "exec")
CHOICES: dict[str, list[Any]] = {
    "not_ready_status": [200, 408],
    "hub_scheme": ["http", "https"],
    "isolation": ["auto", "namespaces", "none"],
    "unconnected": ["silent", "closed"],
    "network_for": ["gateway", "everything"],
    "reset_without_worker": [200, 500],
    "wrong_config": [200, 422],
    "old_clients": [False, True],
    "docker": ["auto", "off", "absent"],
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of Settings."""
    defaults = vars(Settings())
    for name, help_text in SETTINGS.items():
        option = "--" + name.replace("_", "-")
        default = defaults[name]
        help_text = f"{help_text} (default: {default})"
        choices = CHOICES.get(name)
        reader = truth if isinstance(default, bool) else type(default)
        parser.add_argument(option, type=reader, default=default, choices=choices, help=help_text)


def truth(text: str) -> bool:
    """`True` or `False`. Raises ValueError."""
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(**{name: getattr(arguments, name) for name in SETTINGS})


def server_options(arguments: argparse.Namespace) -> list[str]:
    """The settings that differ from the defaults, as options of `serve`."""
    defaults = vars(Settings())
    options: list[str] = []
    for name in SETTINGS:
        if getattr(arguments, name) != defaults[name]:
            options += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="local_plato.py",
        description="A Plato on this machine: real HTTP, TLS, SSH and VMs of real processes.",
    )
    parser.add_argument(
        "--home", type=Path, help="data directory (default: $PLATO_LOCAL_HOME or ~/.plato-local)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adding = {
        "run": (command_run, "run plato_sandbox.py ARGS against it"),
        "exec": (command_exec, "run any command against it: exec -- CMD ARGS"),
        "up": (command_up, "start it, unless it runs"),
        "env": (command_env, "start it, and print shell exports for clients"),
        "status": (command_status, "show whether it runs, and its VMs"),
        "images": (command_images, "make the Docker images of VMs now, and not at their first use"),
        "down": (command_down, "stop it, and with it every VM"),
        "serve": (command_serve, "be the server, in the foreground"),
    }
    for name, (handler, help_text) in adding.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(handler=handler)
        if name in PASSING:
            command.add_argument("arguments", nargs="*", metavar="...")
        if name in ("up", "env", "status"):
            command.add_argument("--json", action="store_true", help="print JSON")
        if name in ("up", "serve"):
            add_settings(command)
        if name == "down":
            command.add_argument("--purge", action="store_true", help="remove the data directory too")
        if name == "serve":
            command.add_argument(
                "--ca-from", type=Path, help="take the CA from this directory of certificates"
            )
    return parser


def split_words(words: list[str]) -> tuple[list[str], list[str] | None]:
    """Our own words, and those after `run` or `exec`: they are another program's, not argparse's."""
    for position, word in enumerate(words):
        if word.startswith("-") or (position > 0 and words[position - 1] == "--home"):
            continue
        passed = words[position + 1 :]
        if word not in PASSING or (word == "exec" and passed[:1] in (["-h"], ["--help"])):
            break
        return words[: position + 1], passed
    return words, None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    words, passed = split_words(list(sys.argv[1:] if argv is None else argv))
    arguments = make_parser().parse_args(words)
    if passed is not None:
        arguments.arguments = passed
    try:
        home = Home(arguments.home.absolute() if arguments.home else default_home())
        status: int = arguments.handler(home, arguments)
    except (CommandError, HomeError, OSError) as error:
        print(f"local plato: {error}", file=sys.stderr)
        return 1
    return status
