"""Every way in: a file that goes, a zip, a pipe, half a Python, a deep home."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import zipapp
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import BLANK, PRODUCT, Desk, altered, eventually, heartbeats, living, part, ssh_processes

if TYPE_CHECKING:
    from localplato import LocalPlato


def test_the_file_can_be_run() -> None:
    assert PRODUCT.stat().st_mode & stat.S_IXUSR
    done = subprocess.run([str(PRODUCT), "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:14]) == (0, "plato-sandbox ")


@pytest.mark.long
def test_an_environment_that_goes_leaves_heartbeat_and_ssh(desk: Desk, plato: LocalPlato) -> None:
    part("sshd", "openssh-server")
    place = desk.place / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = (place / "lib").glob("python*/site-packages")
    shutil.copy(PRODUCT, packages)
    desk.good(command=[str(place / "bin" / "python"), "-m", "plato_sandbox", *BLANK])
    shutil.rmtree(place)
    beats = desk.heartbeat_record()["beats"]
    eventually(lambda: desk.heartbeat_record()["beats"] > beats, 40)
    assert desk.ssh("echo there").out == "there\n"
    assert not list(desk.home.glob("**/__pycache__"))
    desk.good("stop")
    assert desk.leftovers() == []
    assert living(plato) == []


def test_a_link_to_the_file_leaves_nothing_beside_it(desk: Desk) -> None:
    place = desk.place / "bin"
    place.mkdir()
    link = place / "plato-sandbox"
    link.symlink_to(PRODUCT)
    desk.good(command=[sys.executable, str(link), *BLANK])
    assert [path.name for path in place.iterdir()] == ["plato-sandbox"]


def test_from_a_zip(desk: Desk) -> None:
    part("sshd", "openssh-server")
    package = desk.place / "package"
    package.mkdir()
    shutil.copy(PRODUCT, package)
    archive = desk.place / "tool.pyz"
    zipapp.create_archive(package, archive, main="plato_sandbox:main")
    shutil.rmtree(package)
    version = desk.good(command=[sys.executable, str(archive), "--version"]).out
    assert version == desk.good("--version").out
    desk.good(command=[sys.executable, str(archive), *BLANK])
    assert len(heartbeats(desk)) == 1
    assert desk.ssh("echo there").out == "there\n"


WITHOUT_TEXT = {
    "standard input": "{python} - {words} < {file}",
    "a pipe": "{python} <(cat {file}) {words}",
    "bytecode": "{python} -c \"import py_compile; py_compile.compile('{file}', 'only.pyc')\" && "
    "{python} only.pyc {words}",
}


@pytest.mark.parametrize("line", WITHOUT_TEXT.values(), ids=WITHOUT_TEXT)
def test_without_its_text_nothing_is_started(desk: Desk, plato: LocalPlato, line: str) -> None:
    script = line.format(python=sys.executable, file=PRODUCT, words=" ".join([*BLANK, "--json"]))
    result = desk.run(command=[part("bash", "bash"), "-c", script])
    assert result.code == 2, result
    assert "own text" in result.error["message"]
    assert "plato_sandbox.py" in result.error["hint"]
    assert plato.requests("POST") == []
    assert not desk.state_file.exists()


@pytest.mark.parametrize("name", ["shlex", "http.client", "argparse", "difflib"])
def test_half_a_python_is_told_in_a_sentence(desk: Desk, name: str) -> None:
    command = altered(
        f"sys.modules[{name!r}] = None", "--json", "statsu" if name == "difflib" else "start", "-b"
    )
    result = desk.run(command=[*command, "--service", "x"])
    assert result.code == 1, result
    assert name in result.error["message"]
    assert "apt-get install python3" in result.error["hint"]


def masters(desk: Desk) -> list[int]:
    """The ssh that keeps the connection to the VM of a desk, wherever its socket is."""
    name = desk.state["ssh_host"].replace("sandbox-", "ssh_") + ".sock"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            line = (process / "cmdline").read_bytes()
            if line.startswith(b"ssh: ") and name.encode() in line:
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("runtime", ["r", None])
def test_a_deep_home_keeps_its_connection(desk: Desk, runtime: str | None) -> None:
    part("sshd", "openssh-server")
    desk.environment["PLATO_HOME"] = str(desk.place / ("deep" * 33))
    if runtime:
        desk.environment["XDG_RUNTIME_DIR"] = str(desk.home / runtime)
    desk.good(*BLANK)
    assert desk.ssh("echo there").out == "there\n"
    (master,) = masters(desk)
    assert desk.ssh("echo again").out == "again\n"
    assert masters(desk) == [master]
    place = desk.home / runtime if runtime else Path(f"/tmp/plato-sandbox-{os.getuid()}")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    desk.good("stop")
    assert desk.leftovers() == []


def test_a_short_directory_of_somebody_else_is_not_used(desk: Desk) -> None:
    part("sshd", "openssh-server")
    desk.environment["PLATO_HOME"] = str(desk.place / ("deep" * 33))
    open_to_all = desk.place / "run"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    desk.environment["XDG_RUNTIME_DIR"] = str(open_to_all)
    desk.good(*BLANK)
    assert desk.ssh("echo there").out == "there\n"
    assert list(open_to_all.iterdir()) == []
    assert not ssh_processes(desk)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become anybody")
def test_a_user_without_an_entry(desk: Desk) -> None:
    python = part("/usr/bin/python3", "python3")
    for path in (desk.home, desk.work):
        path.chmod(0o777)
    for path in desk.work.parents:
        if len(path.parts) > 2:
            path.chmod(path.stat().st_mode | 0o055)
    product = desk.home / "plato_sandbox.py"
    shutil.copy(PRODUCT, product)
    nobody = [part("setpriv", "util-linux"), "--reuid=54321", "--regid=54321", "--clear-groups"]
    desk.environment.pop("SSL_CERT_FILE", None)
    result = desk.run(command=[*nobody, python, str(product), *BLANK])
    assert result.code == 0, result
    assert "No user exists for uid 54321" in result.err
    assert "`sync` goes through the API" in result.err
    desk.good(command=[*nobody, python, str(product), "stop"])
