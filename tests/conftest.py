"""What tests stand on: a local Plato each, a user's desk with its own home, the product run from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from localplato import LocalPlato
from run import cache_directory, pins_mark, sdk_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ROOT / "plato_sandbox.py"
SIMULATOR = ROOT / "tests" / "simulator"
# Under nohup or as a background job the tests ignore these, and so would the commands that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

COMMAND_SECONDS = 60.0
# Runs a file as the main program from Python's cached bytecode, as it runs a module of an installed package.
# Compiling the product anew for each of some thousand runs would take most of the time of the tests.
RUN_CACHED = (
    "import sys; from importlib.machinery import SourceFileLoader as Loader; sys.argv.pop(0); "
    "loader = Loader('plato_sandbox', sys.argv[0]); exec(loader.get_code('plato_sandbox'), "
    "{'__name__': '__main__', '__file__': sys.argv[0], '__loader__': loader, '__builtins__': __builtins__})"
)
BLANK = ("start", "--blank", "--service", "myapp")


def part(name: str, package: str) -> str:
    """The path of a program of the system; without it the test is skipped, or fails under `run.py --all`."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        missing(f"{name} is not installed; on Debian: apt-get install {package}")
    return str(found)


def missing(reason: str) -> None:
    """Skip for a missing part, or fail where nothing may be missing."""
    if os.environ.get("PLATO_TESTS_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests, and all but the first case of sampled ones, to `run.py --all` and to whoever names
    them; keep those together that share an expensive fixture."""
    named = any("::" in argument for argument in config.args)
    whole = bool(os.environ.get("PLATO_TESTS_ALL")) or named or "soak" in str(config.option.markexpr)
    begun: set[str] = set()
    left: list[pytest.Item] = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if not whole and ("long" in item.keywords or ("sampled" in item.keywords and name in begun)):
            left.append(item)
        begun.add(name)
        for fixture in ("passing", "failing"):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(fixture))
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def soaking(request: pytest.FixtureRequest) -> bool:
    """Whether all is to be tried (`run.py -m soak`); else a test with the mark `soak` tries a sample."""
    return "soak" in str(request.config.option.markexpr)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Count what was tried, by its name in the plural; the sums of all tests are printed at the end."""
    return lambda name, number: record_property(f"tried {name}", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    sums: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, number in report.user_properties:
                    sums[name] = sums.get(name, 0) + number
    tried = {name[6:]: number for name, number in sums.items() if name.startswith("tried ")}
    if tried:
        terminalreporter.section("tried")
        for name, number in sorted(tried.items()):
            terminalreporter.write_line(f"{number:>10,} {name}")


def altered(code: str, *arguments: str) -> list[str]:
    """A command that runs the product after a change by `code` to its module, which is named `product`."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import plato_sandbox as product\n{code}\n"
        "sys.exit(product.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", program, *arguments]


class Result(NamedTuple):
    """How a command ended: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> dict[str, Any]:
        """The `error` object of a --json failure; its exit code is checked against the process's."""
        error: dict[str, Any] = self.document["error"]
        assert set(error) == {"code", "message", "hint", "exit_code"}
        assert error["exit_code"] == self.code
        return error


class Desk:
    """A user: a home, a working directory with the example simulator, an environment; the product at hand."""

    def __init__(self, place: Path, environment: Mapping[str, str]) -> None:
        self.place = place
        # A short path, as homes have, since the path of a socket is limited.
        self.home = Path(tempfile.mkdtemp(prefix="home-"))
        weakref.finalize(self, shutil.rmtree, self.home, ignore_errors=True)
        self.work = place / "work"
        shutil.copytree(SIMULATOR, self.work, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            **environment,
        }
        self.processes: list[subprocess.Popen[str]] = []
        self.product = PRODUCT

    @property
    def plato_home(self) -> Path:
        return Path(self.environment.get("PLATO_HOME", self.home / ".plato"))

    @property
    def settings(self) -> Any:
        """The Settings of a desk's commands, for operations in the process of the tests itself."""
        from plato_sandbox import Settings

        return Settings.from_environment({**self.environment, "PLATO_HOME": str(self.plato_home)})

    @property
    def state_file(self) -> Path:
        return self.work / ".sandbox.yaml"

    @property
    def state(self) -> dict[str, Any]:
        """The fields of .sandbox.yaml, as another client reads them."""
        value = yaml.safe_load(self.state_file.read_text())
        assert isinstance(value, dict)
        return value

    def command(self, *arguments: str) -> list[str]:
        """The words of a command line of the product."""
        return [sys.executable, "-c", RUN_CACHED, *self.words(*arguments)]

    def words(self, *arguments: str) -> list[str]:
        """What the product sees as its sys.argv."""
        return [str(self.product), *arguments]

    def tune(self, **constants: object) -> None:
        """From now on, run a copy of the product with other values for constants of its first section."""
        text = PRODUCT.read_text()
        for name, value in constants.items():
            text, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
            assert found == 1, name
        self.product = self.place / "tuned.py"
        self.product.write_text(text)

    def run(
        self,
        *arguments: str,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = COMMAND_SECONDS,
        command: list[str] | None = None,
    ) -> Result:
        """Run the product to its end, without a terminal and with no input."""
        done = subprocess.run(
            command or self.command(*arguments),
            cwd=directory or self.work,
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        result = Result(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in result.err, result.err
        return result

    def good(self, *arguments: str, **options: Any) -> Result:
        """Run the product; it must succeed."""
        result = self.run(*arguments, **options)
        assert result.code == 0, f"exit {result.code}\n{result.out}\n{result.err}"
        return result

    def begin(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the product and go on; it is ended with the test."""
        return self.begin_command(self.command(*arguments), **options)

    def begin_command(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=options.pop("directory", self.work),
            env={**self.environment, **options.pop("environment", {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.processes.append(process)
        return process

    def begin_on_terminal(self, *arguments: str) -> tuple[subprocess.Popen[str], int]:
        """Start the product in a session of its own on a new terminal; with the terminal's master side."""
        master, slave = os.openpty()
        shell = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave)]
        process = self.begin_command([*shell, *self.command(*arguments)], start_new_session=True)
        eventually(lambda: os.tcgetpgrp(master) == process.pid)
        os.close(slave)
        return process, master

    def ssh(self, command: str, *options: str) -> Result:
        """Run a command on the VM through the real OpenSSH client and the config that `start` wrote."""
        state = self.state
        part("sshd", "openssh-server")  # the VM's
        words = [
            part("ssh", "openssh-client"),
            "-F",
            state["ssh_config_path"],
            *options,
            state["ssh_host"],
            command,
        ]
        return self.run(command=words)

    def hang_up(self) -> None:
        """End the connection that ssh keeps for later ones, if there is one."""
        state = self.state
        words = ["ssh", "-F", state["ssh_config_path"], "-O", "exit", state["ssh_host"]]
        self.run(command=words)
        name = state["ssh_host"].replace("sandbox-", "ssh_") + ".sock"
        eventually(lambda: not (self.plato_home / name).exists())

    def heartbeat_record(self) -> dict[str, Any]:
        """The first line of the heartbeat's record of the sandbox in the working directory."""
        name = self.state["session_id"].split("-")[0]
        record: dict[str, Any] = json.loads(
            (self.plato_home / f"heartbeat_{name}.log").read_text().splitlines()[0]
        )
        return record

    def paths(self) -> list[Path]:
        """Everything that the user has."""
        return [*self.place.rglob("*"), *self.home.rglob("*")]

    def leftovers(self) -> list[str]:
        """Files that a stopped sandbox must not leave behind."""
        files = list(self.plato_home.iterdir()) if self.plato_home.is_dir() else []
        return sorted(path.name for path in [*files, *self.work.glob(".sandbox.yaml*")])

    def clear(self) -> None:
        """End every process that the test left: commands under way and heartbeats, with or without a record.

        A heartbeat that lives on would beat at whatever local Plato gets the port of its own one next.
        """
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for record in self.plato_home.glob("heartbeat_*.log") if self.plato_home.is_dir() else ():
            end_heartbeat(record)
        for pid in [*heartbeats(self), *heartbeats(self, SDK_HEARTBEAT)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def take_whole_example(desk: Desk, plato: LocalPlato) -> None:
    """Give a desk the example as it is, for VMs that have a Docker engine."""
    problem = plato.information["docker"]
    if problem is not None:
        missing(problem)
    shutil.rmtree(desk.work)
    shutil.copytree(SIMULATOR, desk.work)


def end_heartbeat(record: Path) -> None:
    """Kill the heartbeat that a record names, if it is one."""
    try:
        pid = int(json.loads(record.read_text().splitlines()[0])["pid"])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError, IndexError):
        return
    if b"heartbeat-child" in command:
        os.kill(pid, signal.SIGKILL)


def processes_of(desk: Desk) -> dict[int, bytes]:
    """The processes that have a desk's home in their environment: pid and command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(f"HOME={desk.home}") + b"\0" in environment:
            found[int(process.name)] = command
    return found


def heartbeats(desk: Desk, mark: bytes = b"heartbeat-child") -> list[int]:
    """The pids of the heartbeats that a desk has running, found by what they are and not by any record."""
    return sorted(pid for pid, command in processes_of(desk).items() if mark in command)


def ssh_processes(desk: Desk) -> dict[int, str]:
    """The ssh clients of a desk and their ways to the gateway, by pid."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        kept = command.startswith(
            os.fsencode(f"ssh: {desk.plato_home}/")
        )  # its title lies over its environment
        ours = os.fsencode(f"HOME={desk.home}") + b"\0" in environment
        if kept or (ours and (b"gateway-stream" in command or command.startswith(b"ssh"))):
            found[int(process.name)] = command.replace(b"\0", b" ").decode()
    return found


def living(plato: LocalPlato) -> list[str]:
    """The job ids of the VMs that a local Plato still has running."""
    return sorted(machine["job_id"] for machine in plato.machines() if machine["alive"])


def sent(plato: LocalPlato, path: str) -> list[dict[str, Any]]:
    """The JSON bodies of the POST requests whose path contains that text, oldest first."""
    return [json.loads(request["body"]) for request in plato.requests("POST", path)]


def ending(process: subprocess.Popen[str]) -> Result:
    """Wait for a command that was begun; how it ended, free of tracebacks."""
    out, err = process.communicate(timeout=2 * COMMAND_SECONDS)
    assert "Traceback" not in err, err
    return Result(process.returncode, out, err)


def nothing_left(desk: Desk, plato: LocalPlato) -> None:
    """No file, no heartbeat and no VM remains of what a desk started."""
    eventually(lambda: not heartbeats(desk))
    assert desk.leftovers() == []
    assert living(plato) == []


def is_running(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What a condition gives once it holds; the test fails when it does not within the time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {condition}")
        time.sleep(0.02)


# ---------------------------------------------------------------------------
# the SDK
# ---------------------------------------------------------------------------

NEWEST_SDK = "2.187.0"
SDK_HEARTBEAT = b"plato-sandbox-heartbeat"  # in the command line of a heartbeat of the newest release
SDK_SECONDS = 120.0
# The newest release has the gateway's port 443 in its SSH config, whatever PLATO_GATEWAY_PORT says.
SDK_OPENSSL = """\
#!/bin/sh
for word do
    shift
    case $word in *:443) word=${word%:443}:$PLATO_GATEWAY_PORT ;; esac
    set -- "$@" "$word"
done
exec openssl "$@"
"""


def sdk_environment(version: str) -> Path:
    """A virtual environment that holds that release of plato-sdk-v2, made at its first use.

    It is kept inside that of the tests, or in the user's cache.
    """
    name = f"plato-sdk-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    inside = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    place = (Path(sys.prefix) if inside else cache_directory()) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = install_sdk(place, version)
    if problem is not None:
        missing(problem)
    return place


def install_sdk(place: Path, version: str) -> str | None:
    """Make the virtual environment unless it is complete; why it could not be made, or None."""
    complete, mark = place / "complete", pins_mark()
    if complete.exists() and complete.read_text() == mark:
        return None
    venv.create(place, symlinks=True, clear=True)
    pip = [sys.executable, "-m", "pip", f"--python={place / 'bin' / 'python'}", "install", "--quiet"]
    done = subprocess.run([*pip, *sdk_words(version)], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"plato-sdk-v2 {version} cannot be installed: {done.stderr.strip()[-400:]}"
    complete.write_text(mark)
    return None


class NewestSdk:
    """The newest release of the SDK, and its command line at any desk."""

    def __init__(self, place: Path) -> None:
        self.bin = place / "bin"
        self.python = self.bin / "python"

    def environment(self, desk: Desk) -> dict[str, str]:
        """What its programs need at a desk, beside what the desk has."""
        openssl = desk.place / "openssl"
        if not openssl.exists():
            openssl.write_text(SDK_OPENSSL)
            openssl.chmod(0o755)
        return {
            "PATH": f"{self.bin}:{desk.environment['PATH']}",  # its heartbeat is whatever `python3` is
            "PLATO_SSH_OPENSSL_BIN": str(openssl),
            "COLUMNS": "1000",
            "TERM": "dumb",
        }

    def run(self, desk: Desk, *words: str, **options: Any) -> Result:
        """Run `plato sandbox WORDS` at a desk; `options` are those of `Desk.run`."""
        command = [str(self.bin / "plato"), "sandbox", *words]
        environment = {**self.environment(desk), **options.pop("environment", {})}
        return desk.run(command=command, environment=environment, timeout=SDK_SECONDS, **options)

    def good(self, desk: Desk, *words: str, **options: Any) -> Result:
        """Run it; it must succeed."""
        result = self.run(desk, *words, **options)
        assert result.code == 0, f"exit {result.code}\n{result.out}\n{result.err}"
        return result

    def slot(self, desk: Desk) -> dict[str, Any]:
        """The record of the sandbox that its commands at a desk work with."""
        record: dict[str, Any] = json.loads((desk.work / ".plato" / "state.json").read_text())
        return record


@pytest.fixture(scope="session")
def newest_sdk() -> NewestSdk:
    """The newest release of the SDK; there is none for other Pythons."""
    if not (3, 11) <= sys.version_info < (3, 14):
        pytest.skip(f"plato-sdk-v2 {NEWEST_SDK} is for Python 3.11 to 3.13")
    return NewestSdk(sdk_environment(NEWEST_SDK))


# ---------------------------------------------------------------------------
# servers and desks
# ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate authority that the local Platos of one test process share."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the local Plato is for Linux")
    part("openssl", "openssl")
    with LocalPlato(tmp_path_factory.mktemp("authority")) as plato:
        return plato.certificates


@pytest.fixture
def new_plato(tmp_path: Path, certificates: Path) -> Iterator[Callable[..., LocalPlato]]:
    """Start local Platos with settings of the test's choice: `new_plato(boot_seconds=3)`."""
    started: list[LocalPlato] = []

    def start(**settings: Any) -> LocalPlato:
        plato = LocalPlato(tmp_path / f"plato{len(started)}", ca_from=certificates, **settings)
        plato.start()
        started.append(plato)
        return plato

    yield start
    for plato in started:
        plato.stop()


@pytest.fixture
def plato(new_plato: Callable[..., LocalPlato]) -> LocalPlato:
    """A local Plato whose VMs boot at once."""
    return new_plato()


@pytest.fixture
def ssh_place() -> Iterator[Path]:
    """A directory with a short path, which only its owner may enter."""
    with tempfile.TemporaryDirectory(prefix="ssh") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def shared_plato(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[LocalPlato]:
    """One local Plato for all tests of a process that script no fault and tell their own VMs from others'."""
    with LocalPlato(tmp_path_factory.mktemp("shared"), ca_from=certificates) as plato:
        yield plato


@pytest.fixture
def visitor(new_desk: Callable[..., Desk], shared_plato: LocalPlato) -> Desk:
    """A user of `shared_plato`."""
    return new_desk(shared_plato.environment)


@pytest.fixture
def new_desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    """Desks with an environment of the test's choice: `new_desk(plato.environment)`."""
    made: list[Desk] = []

    def make(environment: Mapping[str, str]) -> Desk:
        made.append(Desk(tmp_path / f"desk{len(made)}", environment))
        return made[-1]

    yield make
    for desk in made:
        desk.clear()


@pytest.fixture
def desk(new_desk: Callable[..., Desk], plato: LocalPlato) -> Desk:
    """A user of `plato`, with a fast heartbeat."""
    return new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "1"})


@pytest.fixture(scope="module")
def standing(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path
) -> Iterator[tuple[Desk, LocalPlato]]:
    """A sandbox that stays for many tests: none of them may change it."""
    place = tmp_path_factory.mktemp("standing")
    with LocalPlato(place / "plato", ca_from=certificates) as plato:
        desk = Desk(place / "desk", {**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "60"})
        desk.good(*BLANK)
        yield desk, plato
        desk.clear()
