"""The file itself: its imports and order, the interpreters and places it runs from, its Python API."""

from __future__ import annotations

import ast
import functools
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, PRODUCT, ROOT, Desk, altered, is_running, living, missing, part
from localplato import LocalPlato
from run import pinned

import plato_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = PRODUCT.read_text(encoding="utf-8")
MOST_NODES = 59_999
TREE = ast.parse(SOURCE)
RULE = "# " + "-" * 106
OPTIONAL_PACKAGES = {
    "playwright",
    "psycopg2",
    "pymysql",
    "streamlit",
}  # each imported where it is needed, and its absence is told


# ---------------------------------------------------------------------------
# the text
# ---------------------------------------------------------------------------


def imported_modules() -> dict[str, list[int]]:
    """Top-level names of everything imported anywhere in the file, with their lines."""
    found: dict[str, list[int]] = {}
    for node in ast.walk(TREE):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names += [node.module or ""]
        for name in names:
            found.setdefault(name.partition(".")[0], []).append(getattr(node, "lineno", 0))
    return found


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is of Python 3.10")
def test_imports_only_the_standard_library() -> None:
    names: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset())
    others = {name: lines for name, lines in imported_modules().items() if name not in names}
    assert set(others) <= OPTIONAL_PACKAGES
    assert [name for name, lines in others.items() if len(lines) != 1] == []  # in one function each
    assert len(imported_modules()) > 10


def test_nothing_happens_at_import() -> None:
    """No file, environment variable, process or socket is touched, and heavy modules stay unloaded."""
    code = (
        "import sys\nevents = []\n"
        "sys.addaudithook(lambda name, words: events.append((name, words)))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport plato_sandbox\n"
        "doors = ('socket', 'subprocess', 'os', 'shutil', 'fcntl')\n"
        "own = ('os.listdir', 'os.mkdir', 'os.rename', 'os.scandir')  # the import system's\n"
        "print([e for e in events if e[0].split('.')[0] in doors and e[0] not in own])\n"
        "print(sorted(set(sys.modules) & {'ssl', 'http.client', 'argparse', 'subprocess', 'socket', 'json'}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


@functools.cache
def banners() -> list[tuple[int, str]]:
    """The sections by their three-line banners: line number and name."""
    lines = SOURCE.splitlines()
    return [
        (number, lines[number][2:].partition(":")[0])
        for number in range(1, len(lines) - 1)
        if lines[number - 1] == RULE and lines[number + 1] == RULE
    ]


def test_header_lists_the_sections_in_order() -> None:
    assert SOURCE.count(RULE) == 2 * len(banners())
    listed = re.search(r"each using only those above it: ([a-z, \n]+)\.", SOURCE)
    assert listed is not None
    assert [name.strip() for name in listed[1].split(",")] == [name for _, name in banners()]


def section_of(line: int) -> int:
    return sum(1 for _ in takewhile(lambda banner: banner[0] <= line, banners()))


def top_level_names() -> dict[str, int]:
    """Every name that the module defines, and the line where it is first defined."""
    names: dict[str, int] = {}
    for node in TREE.body:
        targets: list[ast.expr] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    names.setdefault(name.id, node.lineno)
    return names


def bound_in(scope: ast.AST) -> set[str]:
    """Names that a function binds itself, which therefore do not mean those of the module."""
    nodes = list(ast.walk(scope))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def uses(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every use of a name that is not bound in a function around it; annotations are never looked at."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        bound |= bound_in(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node
    unseen = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for child in ast.iter_child_nodes(node):
        if child not in unseen:
            yield from uses(child, bound)


def test_the_weight_of_the_file(tally: Callable[[str, int], None]) -> None:
    """A stranger reads the file before trusting it, and Python compiles it at every run of the script."""
    nodes = sum(1 for _ in ast.walk(TREE))
    tally("nodes in the syntax tree of plato_sandbox.py", nodes)
    assert nodes <= MOST_NODES


def test_sections_use_only_those_above_them() -> None:
    names = top_level_names()
    assert len(names) > 200
    found = [node for node in uses(TREE) if node.id in names]
    assert len(found) > 1000
    wrong = [
        f"line {node.lineno} uses {node.id} of line {names[node.id]}"
        for node in found
        if section_of(names[node.id]) > section_of(node.lineno)
    ]
    assert wrong == []


def functions() -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef))


def test_functions_are_short_and_typed() -> None:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions())
    assert lengths[-1] <= 75
    assert lengths[len(lengths) // 2] <= 14
    untyped = [node.name for node in functions() if node.returns is None and node.name != "__init__"]
    assert untyped == []


def test_public_names_are_there_and_documented() -> None:
    assert plato_sandbox.__all__ == sorted(plato_sandbox.__all__)
    for name in plato_sandbox.__all__:
        thing = getattr(plato_sandbox, name)
        assert isinstance(thing, str) or thing.__doc__, name


def test_every_variable_of_the_environment_is_in_the_header() -> None:
    used = set(re.findall(r'"(PLATO_[A-Z_]+|SSL_CERT_FILE|HTTPS_PROXY|NO_PROXY|NO_COLOR)"', SOURCE))
    header = ast.get_docstring(TREE) or ""
    assert used
    assert {name for name in used if name not in header} == set()


def test_script_metadata_block_is_valid() -> None:
    """The block of PEP 723, found by that document's own expression."""
    expression = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    blocks = [match for match in re.finditer(expression, SOURCE) if match["type"] == "script"]
    assert len(blocks) == 1
    content = "".join(line[2:] for line in blocks[0]["content"].splitlines(keepends=True))
    assert dict(line.split(" = ") for line in content.splitlines()) == {
        "requires-python": '">=3.9"',
        "dependencies": "[]",
    }
    assert '\nrequires-python = ">=3.9"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.long
def test_syntax_and_library_are_those_of_python_3_9() -> None:
    vermin = Path(sysconfig.get_path("scripts"), "vermin")
    if not vermin.exists():
        missing("vermin is not installed; it is in the test group of pyproject.toml")
    words = [str(vermin), "--no-tips", "--violations", "-t=3.9-", str(PRODUCT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------
# interpreters
# ---------------------------------------------------------------------------

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


def interpreter(version: str) -> str | None:
    """A Python of that version which really runs, from PATH or from pyenv's directory."""
    names = [shutil.which(f"python{version}")]
    try:
        names += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    except OSError:
        pass
    question = "import sys; print('%d.%d' % sys.version_info[:2])"
    for name in filter(None, names):
        try:
            done = subprocess.run(
                [name, "-c", question], capture_output=True, text=True, timeout=60, check=False
            )
        except OSError:
            continue
        if done.stdout.strip() == version:
            return name
    return None


FOUND = {version: found for version in VERSIONS if (found := interpreter(version))}


@pytest.fixture(params=FOUND.values(), ids=list(FOUND))
def python(request: pytest.FixtureRequest) -> str:
    """Each Python that this machine has; the static check above speaks for those that it has not."""
    return str(request.param)


def test_help_needs_the_standard_library_only(desk: Desk, python: str) -> None:
    result = desk.good(command=[python, "-I", "-S", "-W", "error", str(PRODUCT), "--help"])
    assert result.out.startswith("usage: plato-sandbox ")
    assert result.err == ""


@pytest.mark.long
def test_main_job_on_every_python(desk: Desk, plato: LocalPlato, python: str) -> None:
    product = [python, "-W", "error", str(PRODUCT)]
    desk.good(command=[*product, "start", "--from-config"])
    plato.wait_for_request("POST", "/heartbeat", count=2)
    assert desk.ssh("echo there") == (0, "there\n", "")
    assert desk.good(command=[*product, "status", "--json"]).document["heartbeat"]["state"] == "ok"
    plato.fault("hang", method="GET", path="/api/*", times=-1)
    request = "product.Transport.request"
    slow = f"ours = {request}\n{request} = lambda *w, **o: ours(*w, **{{**o, 'seconds': 0.2, 'window': 0}})"
    unreachable = desk.run(command=[python, *altered(slow, "status", "--json")[1:]])
    assert unreachable.code == 6
    assert "timed out" in unreachable.error["message"]
    desk.good(command=[*product, "stop"])
    assert living(plato) == []
    assert desk.leftovers() == []


@pytest.mark.parametrize(
    ("host", "named"),
    [("os.name = 'nt'", "WSL"), ("sys.version_info = (3, 8, 18)", "Python 3.9")],
    ids=["native Windows", "Python 3.8"],
)
def test_unfit_host_is_refused_in_one_sentence(desk: Desk, host: str, named: str) -> None:
    program = (
        "import os, re, runpy, shlex, sys, contextlib; sys.argv.pop(0); "
        f"{host}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for words in (["start", "-b", "--service", "x"], ["--help"], ["status", "--json"], ["heartbeat-child"]):
        result = desk.run(command=[sys.executable, "-c", program, str(PRODUCT), *words])
        assert result.code == 1
        assert result.err.count("\n") == 1
        assert named in result.err
    assert desk.leftovers() == []


# ---------------------------------------------------------------------------
# places
# ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["tools/plato_sandbox.py", "sandbox", "my tool.py", "a/b c/x.pyw"])
def test_copy_of_any_name(desk: Desk, plato: LocalPlato, name: str) -> None:
    copy = desk.place / "copies" / name
    copy.parent.mkdir(parents=True)
    shutil.copy(PRODUCT, copy)
    run = [sys.executable, str(copy)]
    desk.good(command=[*run, *BLANK])
    plato.wait_for_request("POST", "/heartbeat")
    assert desk.ssh("echo there").out == "there\n"
    hint = desk.run(command=[*run, *BLANK, "--json"]).error["hint"]
    assert copy.name in hint
    desk.good(command=[*run, "stop"])


def test_file_runs_by_itself(desk: Desk) -> None:
    """With its executable bit and first line, by a symbolic link, by a relative path and by `-m`."""
    assert SOURCE.startswith("#!/usr/bin/env python3\n")
    place = desk.work / "tools"
    place.mkdir()
    shutil.copy(PRODUCT, place / "plato_sandbox.py")
    (place / "plato_sandbox.py").chmod(0o755)
    (desk.work / "plato").symlink_to("tools/plato_sandbox.py")
    version = desk.good("--version").out
    python = str(Path(sys.executable).parent)
    environment = {"PATH": f"{python}:{os.environ['PATH']}"}
    for command in (
        [str(place / "plato_sandbox.py"), "--version"],
        ["./plato", "--version"],
        [sys.executable, "tools/plato_sandbox.py", "--version"],
    ):
        assert desk.good(command=command, environment=environment).out == version
    command = [sys.executable, "-m", "plato_sandbox", "--version"]
    assert desk.good(command=command, directory=place).out == version


def test_children_compile_no_more_than_they_need(desk: Desk, plato: LocalPlato) -> None:
    """Where no bytecode is kept: they do not look at what follows the part for them."""
    copy = desk.place / "plato.py"
    shutil.copy(PRODUCT, copy)
    desk.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    spoil = "text = open(product.__file__).read()\n"
    spoil += f"product.__file__ = {str(copy)!r}; open(product.__file__, 'w').write(text + '\\n)\\n')"
    desk.good(command=altered(spoil, *BLANK))
    assert desk.run(command=[sys.executable, str(copy), "--help"]).code == 1
    plato.wait_for_request("POST", "/heartbeat", count=2)
    assert desk.ssh("echo there") == (0, "there\n", "")
    assert not list(desk.place.rglob("*.pyc"))
    desk.good("stop")
    assert living(plato) == []


@pytest.mark.long
def test_children_of_a_file_in_a_directory_that_cannot_be_written(desk: Desk, plato: LocalPlato) -> None:
    tools = desk.place / "tools"
    tools.mkdir()
    copy = Path(shutil.copy(PRODUCT, tools))
    shut = f"mount --bind {tools} {tools} && mount -o remount,bind,ro {tools} && exec"
    words = [part("unshare", "util-linux"), "--mount"] if os.geteuid() == 0 else []
    words += ["sh", "-c", f'{shut if words else "chmod a-w " + str(tools) + " && exec"} "$@"', "sh"]
    desk.good(command=[*words, sys.executable, str(copy), *BLANK])
    connect = ["ssh", "-F", desk.state["ssh_config_path"], "-S", "none", desk.state["ssh_host"], "echo there"]
    plato.wait_for_request("POST", "/heartbeat", count=2)
    assert desk.run(command=[*words, *connect]) == (0, "there\n", "")
    assert [path.name for path in tools.iterdir()] == [copy.name]
    tools.chmod(0o755)
    py_compile.compile(str(copy))
    assert desk.run(command=[*words, *connect]) == (0, "there\n", "")
    desk.good("stop")


def test_relative_path_and_another_working_directory(desk: Desk, plato: LocalPlato) -> None:
    """The heartbeat and SSH find the file although it was named by a relative path."""
    (desk.place / "tools").mkdir()
    shutil.copy(PRODUCT, desk.place / "tools" / "plato.py")
    command = [sys.executable, "tools/plato.py", *BLANK, "-w", "work"]
    desk.good(command=command, directory=desk.place, environment={"PLATO_HOME": "relative"})
    desk.environment["PLATO_HOME"] = str(desk.place / "relative")
    plato.wait_for_request("POST", "/heartbeat", count=2)
    assert desk.ssh("echo there").out == "there\n"
    desk.good("stop")
    assert desk.leftovers() == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a copy of the source tree, and a virtual environment into which it was installed."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    source.mkdir()
    for name in ("plato_sandbox.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(place / "venv", symlinks=True)
    build = {"PIP_BUILD_CONSTRAINT": Path(pinned()[1]).as_uri()} if pinned() else {}
    done = subprocess.run(
        [*pip_of(place), "install", "--no-deps", "--quiet", str(source)],
        env={**os.environ, **build},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "flit" in done.stderr and "No matching distribution" in done.stderr:
        missing(f"flit_core cannot be had from the package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return place


def pip_of(place: Path) -> list[str]:
    """This environment's pip, at work on the virtual environment there, which has none."""
    return [sys.executable, "-m", "pip", f"--python={place / 'venv/bin/python'}"]


@pytest.mark.long
def test_installed_package(desk: Desk, plato: LocalPlato, installed: Path) -> None:
    python, program = str(installed / "venv/bin/python"), str(installed / "venv/bin/plato-sandbox")
    source = [python, str(installed / "source/plato_sandbox.py")]
    assert desk.good(command=[program, "--version"]).out == desk.good(command=[*source, "--version"]).out
    listed = desk.good(command=[*pip_of(installed), "show", "plato-sandbox"]).out
    assert f"\nVersion: {plato_sandbox.__version__}\n" in listed
    desk.good(command=[program, "start", "--from-config"])
    plato.wait_for_request("POST", "/heartbeat", count=2)
    assert desk.ssh("id -un") == (0, "root\n", "")
    again = desk.run(command=[program, "start", "--from-config", "--json"])
    assert again.code == 5
    assert "`plato-sandbox stop`" in again.error["hint"]
    desk.good(command=[program, "stop"])
    assert desk.leftovers() == []


# ---------------------------------------------------------------------------
# the module for Python programs
# ---------------------------------------------------------------------------


def run_program(desk: Desk, program: str) -> Any:
    """Run a Python program of a user, who has the file beside it."""
    shutil.copy(PRODUCT, desk.work)
    result = desk.run(command=[sys.executable, "-W", "error", "-c", program])
    assert result.err == "", result.err
    assert result.code == 0, result
    return ast.literal_eval(result.out)


def test_context_manager(desk: Desk, plato: LocalPlato) -> None:
    program = """
from plato_sandbox import Sandbox
with Sandbox.start(blank=True, service="myapp") as sandbox:
    report, state = sandbox.status(), sandbox.state
    again = Sandbox(".").load()
print((state, report["vm_status"], report["error"], again["session_id"], report["heartbeat"]["pid"]))
"""
    state, word, error, session_id, pid = run_program(desk, program)
    assert state["session_id"] == session_id
    assert (word, error) == ("running", None)
    assert [session["closed"] for session in plato.sessions()] == [True]
    assert not is_running(pid)
    assert desk.leftovers() == []


def test_context_manager_closes_after_an_error(desk: Desk, plato: LocalPlato) -> None:
    program = """
from plato_sandbox import Sandbox
try:
    with Sandbox.start(from_config=True, dataset="base"):
        raise KeyError("mine")
except KeyError as error:
    print(repr(str(error)))
"""
    assert run_program(desk, program) == "'mine'"
    assert living(plato) == []
    assert desk.leftovers() == []


def test_attach_status_stop(desk: Desk, plato: LocalPlato) -> None:
    """A sandbox of the command line, taken up by a program."""
    desk.good(*BLANK)
    program = """
from plato_sandbox import Sandbox
sandbox = Sandbox(".")
report = sandbox.status()
print((report["job_id"], report["vm_running"], sandbox.stop()["already_gone"]))
"""
    job_id = desk.state["job_id"]
    assert run_program(desk, program) == (job_id, True, False)
    assert living(plato) == []
    assert desk.leftovers() == []


ERRORS = {
    "Sandbox('.').load()": ("NoSandboxError", 3),
    "Sandbox('.').stop()": ("NoSandboxError", 3),
    "Sandbox('/nowhere/at/all')": ("UsageError", 2),
    "Sandbox.start()": ("UsageError", 2),
    "Sandbox.start(blank=True)": ("UsageError", 2),
    "Sandbox.start(from_config=True, dataset='nope')": ("UsageError", 2),
    "Sandbox.start(blank=True, service='x', settings=Settings(base_url=BASE))": ("AuthenticationError", 4),
    "Sandbox.start(blank=True, service='x', settings=Settings(api_key='no', base_url=BASE))": (
        "AuthenticationError",
        4,
    ),
    "Settings(base_url='http://plato.example')": ("UsageError", 2),
    "yaml_load('a: [')": ("YamlError", 8),
}


@pytest.mark.sampled
@pytest.mark.parametrize("call", ERRORS)
def test_errors_are_sandbox_errors(desk: Desk, plato: LocalPlato, call: str) -> None:
    program = f"""
import os
from plato_sandbox import Sandbox, SandboxError, Settings, yaml_load
BASE = os.environ["PLATO_BASE_URL"]
try:
    {call}
except SandboxError as error:
    print((type(error).__name__, error.exit_code, error.message in str(error)))
"""
    assert run_program(desk, program) == (*ERRORS[call], True)
    assert living(plato) == []
    assert desk.leftovers() == []


def test_settings_of_the_caller(desk: Desk, plato: LocalPlato) -> None:
    """Everything given in the call and nothing in the environment: the heartbeat and SSH work too."""
    environment = {
        name: desk.environment.pop(name) for name in list(desk.environment) if name.startswith("PLATO_")
    }
    authorities = desk.environment.pop("SSL_CERT_FILE")
    home = str(desk.place / "elsewhere")
    program = f"""
from plato_sandbox import Sandbox, Settings
settings = Settings(
    api_key={environment["PLATO_API_KEY"]!r}, base_url={environment["PLATO_BASE_URL"]!r}, home={home!r},
    gateway_host={environment["PLATO_GATEWAY_HOST"]!r}, gateway_port={environment["PLATO_GATEWAY_PORT"]},
    heartbeat_seconds=0.5, ca_file={authorities!r},
)
print(repr(Sandbox.start(blank=True, service="myapp", settings=settings).state["job_id"]))
"""
    assert run_program(desk, program) == living(plato)[0]
    desk.environment["PLATO_HOME"] = home
    plato.wait_for_request("POST", "/heartbeat", count=3)
    assert desk.ssh("echo there").out == "there\n"


def test_start_works_outside_the_main_thread(desk: Desk, plato: LocalPlato) -> None:
    program = """
import threading
from plato_sandbox import Sandbox
found = []
def work():
    with Sandbox.start(blank=True, service="myapp") as sandbox:
        found.append(sandbox.status()["vm_status"])
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found)
"""
    assert run_program(desk, program) == ["running"]
    assert living(plato) == []


def test_main_returns_its_exit_code(desk: Desk) -> None:
    program = """
import contextlib, io, sys
from plato_sandbox import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
    codes = [main(["status"]), main(["--version"]), main(["bogus"]), main(["--help"])]
print((codes, out.getvalue().startswith("plato-sandbox ")))
"""
    assert run_program(desk, program) == ([3, 0, 2, 0], True)


def test_type_annotations_can_be_resolved(new_desk: Callable[..., Desk]) -> None:
    """`start` and its options are what an editor shows to an importer."""
    import inspect

    words = inspect.signature(plato_sandbox.Sandbox.start).parameters
    assert {"timeout", "lifetime", "reset", "replace"} <= set(words)
    assert words["replace"].default is False
