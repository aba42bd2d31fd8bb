"""`start-services`: the pushed tree, the VM's tree, the secrets, the containers, and all kinds of trouble."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import pytest
from conftest import Desk, Result, altered, ending, eventually, missing, part
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from localplato import LocalPlato

from plato_sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVICE = "taskboard"
TARGET = f"/home/plato/worktree/{SERVICE}"
STATE = f"/home/plato/worktree/.plato-sync/{SERVICE}"
GITEA = "/api/v1/gitea"
# Runs a command on the VM as the user plato; an ordinary user's VM has one user only.
AS_PLATO = "su -s /bin/sh plato -c" if os.geteuid() == 0 else "sh -c"
# Compose makes nothing of it, so the tests that are about the code do not wait for containers.
IDLE = "services: {idle: {image: 'busybox:latest', network_mode: none, deploy: {replicas: 0}}}\n"
Tree = dict[bytes, tuple[bytes, bytes]]  # git's mode, and content or target, by path


def compose(**services: dict[str, Any]) -> str:
    """A Compose file of services on busybox without a network, as JSON, which is YAML too."""
    common = {"image": "busybox:latest", "network_mode": "none", "init": True, "stop_grace_period": "0s"}
    return json.dumps({"services": {name: {**common, **own} for name, own in services.items()}})


def config_text(**services: dict[str, Any]) -> str:
    """A plato-config.yml with these services."""
    named = {name: {"type": "docker-compose", **own} for name, own in services.items()}
    compute = {"cpus": 1, "memory": 512, "disk": 5120, "app_port": 8080, "plato_messaging_port": 7000}
    metadata = {"name": "Taskboard", "flows_path": "flows.yml"}
    listeners = {"db": {"type": "db", "db_type": "postgresql", "db_host": "127.0.0.1", "db_port": 5432}}
    listeners["db"].update(db_user="u", db_password="p", db_database="d", seed_data_paths=["seed/a.sql"])
    dataset = {"compute": compute, "metadata": metadata, "services": named, "listeners": listeners}
    return json.dumps({"service": SERVICE, "datasets": {"base": dataset}})


class Vm(NamedTuple):
    """A sandbox whose VM the tests of a module share, one after another; each begins with an empty one."""

    plato: LocalPlato
    desk: Desk
    root: Path
    docker: Optional[str]  # why there is none

    @property
    def work(self) -> Path:
        return self.desk.work

    @property
    def tree(self) -> Path:
        """The clone on the VM."""
        return self.root / TARGET.lstrip("/")

    @property
    def repository(self) -> Path:
        return self.plato.repository(SERVICE)

    @property
    def branch(self) -> str:
        return f"workspace-{self.desk.state['session_id'].split('-')[0]}"

    def execute(self, command: str, code: Optional[int] = 0) -> str:
        """Run a command on the VM as root, over the API."""
        sandbox = Sandbox(str(self.desk.work), settings=self.desk.settings)
        state = sandbox.load()
        answer = sandbox.api.execute(state["session_id"], command, 60)["results"][state["job_id"]]
        sandbox.api.hang_up()
        assert code is None or answer["exit_code"] == code, answer
        return str(answer["stdout"])

    def git(self, *words: str, stdin: bytes = b"") -> bytes:
        """Run git on the bare repository of the simulator."""
        command = ["git", f"--git-dir={self.repository}", "-c", "safe.directory=*", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        assert done.returncode == 0, done
        return done.stdout

    def head(self) -> str:
        """The commit that the workspace branch is at."""
        return self.git("rev-parse", "--verify", f"refs/heads/{self.branch}").decode().strip()

    def pushed(self, reference: Optional[str] = None) -> Tree:
        """What Gitea has of the code."""
        tree: Tree = {}
        listing = self.git("ls-tree", "-r", "-z", reference or f"refs/heads/{self.branch}")
        lines = [line.partition(b"\t") for line in listing.split(b"\0") if line]
        wanted = b"".join(head.split()[2] + b"\n" for head, _, _ in lines)
        blobs = io.BytesIO(self.git("cat-file", "--batch", stdin=wanted))
        for head, _, path in lines:
            size = int(blobs.readline().split()[2])
            tree[path] = (head.split()[0], blobs.read(size + 1)[:-1])
        return tree

    def run(self, *arguments: str, **options: Any) -> Result:
        return self.desk.run("start-services", *arguments, **options)

    def good(self, *arguments: str, **options: Any) -> dict[str, Any]:
        """`start-services --json`, which must succeed; its report. Without an engine: up to Compose."""
        result = self.run("--json", *arguments, **options)
        if self.docker is None:
            assert result.code == 0, f"exit {result.code}\n{result.out}\n{result.err}"
            return result.document
        assert result.error["message"].startswith("Starting main"), result
        return {"commit": self.head(), "path": TARGET}


def begin_vm(plato: LocalPlato, place: Path, *start: str) -> Vm:
    part("git", "git")
    part("sshd", "openssh-server")
    desk = Desk(place, {**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "30"})
    desk.tune(APP_SECONDS=0.2)  # nothing listens on the application's port here
    write(desk.work, {"plato-config.yml": config_text(main={}), "seed/a.sql": ""})
    desk.good(*(start or ("start", "-c")))
    machine = next(one for one in plato.machines() if one["job_id"] == desk.state["job_id"])
    return Vm(plato, desk, Path(machine["directory"]), plato.information["docker"])


@pytest.fixture(scope="module")
def module_vm(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Vm]:
    place = tmp_path_factory.mktemp("services")
    with LocalPlato(place / "plato", ca_from=certificates) as plato:
        begun = begin_vm(plato, place / "desk")
        yield begun
        begun.desk.clear()


@pytest.fixture
def vm(module_vm: Vm) -> Iterator[Vm]:
    """The shared sandbox as if it were new: an empty VM and repository, a desk with the least that starts."""
    empty(module_vm)
    write(module_vm.work, {"plato-config.yml": config_text(main={}), "docker-compose.yml": IDLE})
    yield module_vm
    module_vm.plato.clear_faults()
    module_vm.plato.limit_hub(body=0, pack=0, file=0)
    for process in module_vm.desk.processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def empty(vm: Vm) -> None:
    remove = (
        f"rm -rf {TARGET} /home/plato/worktree/.plato-sync /home/plato/.gitconfig;"
        " [ -S /run/docker.sock ] || [ ! -e /run/docker-user.sock ] ||"
        " mv /run/docker-user.sock /run/docker.sock"
    )
    vm.execute(remove)
    for path in vm.work.iterdir():
        if path.name != ".sandbox.yaml":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with contextlib.suppress(KeyError, FileNotFoundError):
        shutil.rmtree(vm.repository)
    (vm.desk.home / ".gitconfig").unlink(missing_ok=True)


@pytest.fixture
def docker(vm: Vm) -> Iterator[Vm]:
    """The same where containers are started; none of them remains."""
    if vm.docker is not None:
        missing(f"the VM has no Docker engine: {vm.docker}")
    yield vm
    vm.execute('ids=$(docker ps -aq); [ -z "$ids" ] || docker rm -f -v $ids')


def write(root: Path, files: dict[str, Any]) -> None:
    """Files by their paths: text or bytes; None removes one."""
    for name, content in files.items():
        path = root / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(root: Path, *without: str) -> Tree:
    """Files and links below a directory as git names them."""
    tree: Tree = {}
    top = os.fsencode(root)
    left_out = {b".git", b".sandbox.yaml", *map(os.fsencode, without)}
    for directory, directories, files in os.walk(top):
        directories[:] = [name for name in directories if name not in left_out]
        links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
        for name in (*links, *files):
            path = os.path.join(directory, name)
            key = os.path.relpath(path, top)
            if name in left_out:
                continue
            if os.path.islink(path):
                tree[key] = (b"120000", os.readlink(path))
                continue
            with open(path, "rb") as file:
                mode = b"100755" if os.stat(path).st_mode & 0o100 else b"100644"
                tree[key] = (mode, file.read())
    return tree


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory with mode, time and content: to see whether anything was touched."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def requests_to(vm: Vm, method: str, path: str, since: int) -> list[dict[str, Any]]:
    return [one for one in vm.plato.requests()[since:] if one["method"] == method and path in one["path"]]


# ---------------------------------------------------------------------------
# the pushed tree is the local tree
# ---------------------------------------------------------------------------

ODD_NAMES = (
    b"with space", b" lead", b"trail ", b"it's", b'dou"ble', b"new\nline", b"back\\slash", b"tab\there",
    b"$(touch /tmp/ran)", b"`touch /tmp/ran`", b"-rf", b"--", b"-n/-e", b"semi;colon", b"*", b"?[x]{y}",
    b":(top)x", b"!bang", b"#hash", b"\xff\xfe\x80", "ünï/雪".encode(), b"%41", b"a&b|c", b"x" * 255, b"...",
    b"~", b"\x01\x7f",
)  # fmt: skip


@pytest.mark.long
def test_odd_names_arrive_byte_for_byte(vm: Vm) -> None:
    for name in ODD_NAMES:
        path = os.path.join(os.fsencode(vm.work), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name + b"\r\n\0\n")
    vm.good()
    local = read(vm.work)
    assert set(ODD_NAMES) < set(local)
    assert vm.pushed() == local
    assert read(vm.tree) == local
    for name in ODD_NAMES:
        os.unlink(os.path.join(os.fsencode(vm.work), name))
    vm.good()
    assert read(vm.tree) == vm.pushed() == read(vm.work)
    assert not Path("/tmp/ran").exists()
    assert not (vm.root / "tmp/ran").exists()


@pytest.mark.long
def test_edits_deletions_renames_and_changes_of_kind(vm: Vm) -> None:
    write(
        vm.work,
        {"keep": "1", "edit": "1", "gone/deep/file": "1", "old name": "1", "file": "1", "tree/a": "1"},
    )
    write(vm.work, {"tree/b/c": "1", "run.sh": "1", "was-link": "1"})
    (vm.work / "link").symlink_to("keep")
    (vm.work / "dangling").symlink_to("nowhere")
    (vm.work / "to-directory").symlink_to("tree")
    first = vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)
    write(vm.work, {"edit": "2", "was-link": None, "file": None, "link": None, "to-directory": None})
    write(vm.work, {"file/inside": "2", "link": "a file", "to-directory/x": "2"})
    shutil.rmtree(vm.work / "gone")
    shutil.rmtree(vm.work / "tree")
    (vm.work / "tree").write_text("a file now")
    (vm.work / "old name").rename(vm.work / "new name")
    (vm.work / "run.sh").chmod(0o755)
    (vm.work / "was-link").symlink_to("edit")
    second = vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)
    assert not (vm.tree / "gone").exists()
    assert second["commit"] != first["commit"]
    assert vm.git("rev-list", "--count", vm.head()).strip() == b"2"
    assert (
        vm.execute(f"cd {TARGET} && {AS_PLATO} 'git status --porcelain; git log --oneline | wc -l'") == "2\n"
    )


@pytest.mark.long
def test_content_is_not_converted_whatever_the_attributes_say(vm: Vm) -> None:
    attributes = "* text=auto eol=lf\n*.crlf text eol=crlf\n*.id ident\n*.x filter=evil\n"
    attributes += "*.u working-tree-encoding=UTF-16\n"
    write(vm.work, {".gitattributes": attributes, "sub/.gitattributes": "* text eol=crlf ident\n"})
    write(
        vm.work,
        {"a": "1\r\n2\n", "b.crlf": "1\n2\r\n", "c.id": "$Id$ $Id: x $\n", "d.x": "plain", "e.u": "plain"},
    )
    write(vm.work, {"sub/f": "1\n$Id$\r\n", "nul": b"\0\r\n"})
    evil = '[core]\n autocrlf = true\n[filter "evil"]\n smudge = touch /tmp/ran; cat\n clean = rev\n'
    (vm.desk.home / ".gitconfig").write_text(evil)
    (vm.root / "home/plato/.gitconfig").write_text(evil)
    vm.good()
    write(vm.work, {"a": "2\r\n", "sub/f": "\n\r\n"})
    vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)
    assert vm.execute(f"cd {TARGET} && {AS_PLATO} 'git status --porcelain'") == ""
    assert not (vm.root / "tmp/ran").exists()


@pytest.mark.long
def test_an_unchanged_tree_is_not_pushed_again(vm: Vm) -> None:
    write(vm.work, {"a": "1"})
    first = vm.good()
    since = len(vm.plato.requests())
    (vm.work / "a").touch()
    second = vm.good()
    assert first["commit"] == second["commit"] == vm.head()
    assert requests_to(vm, "POST", "git-receive-pack", since) == []
    if vm.docker is None:
        assert (first["pushed"], second["pushed"], second["changed"]) == (True, False, 1)  # its time
        assert vm.good()["changed"] == 0
        assert "(unchanged)" in vm.desk.good("start-services").out


@pytest.mark.long
def test_the_default_branch_is_the_parent_and_its_history_stays_away(vm: Vm, tmp_path: Path) -> None:
    vm.good()  # makes the repository
    shutil.rmtree(vm.repository)
    source = tmp_path / "history"
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")

    def git(*words: str) -> None:
        subprocess.run(["git", *identity, *words], cwd=source, check=True, capture_output=True)

    source.mkdir()
    git("init", "-q", "-b", "main")
    for number in range(5):
        (source / f"old-{number}").write_bytes(os.urandom(300_000))
        (source / "README").write_text(f"{number}")
        if number:
            (source / f"old-{number - 1}").unlink()
        git("add", "-A")
        git("commit", "-q", "-m", f"Change {number}")
    vm.plato.requests()
    hub = vm.plato.hub()["base_url"]
    username, password = credentials(vm)
    quoted = urllib.parse.quote(username, safe="") + ":" + urllib.parse.quote(password, safe="")
    git("push", "-q", hub.replace("://", f"://{quoted}@") + f"/local/{SERVICE}.git", "main")
    since = len(vm.plato.requests())
    vm.good()
    main = vm.git("rev-parse", "main").strip()
    assert vm.git("rev-parse", f"{vm.head()}^").strip() == main
    assert vm.pushed() == read(vm.tree) == read(vm.work)
    received = sum(one.get("sent") or 0 for one in requests_to(vm, "POST", "git-upload-pack", since))
    assert 300_000 < received < 500_000  # the newest of five commits
    assert vm.git("rev-parse", "main").strip() == main
    assert (vm.tree / ".git/shallow").read_text().split() == [main.decode()]
    write(vm.work, {"new": "1"})
    since = len(vm.plato.requests())
    vm.good()
    received = sum(one.get("sent") or 0 for one in requests_to(vm, "POST", "git-upload-pack", since))
    assert received < 50_000
    assert vm.git("rev-list", "--count", vm.head()).strip() == b"7"


@pytest.mark.long
def test_an_unknown_parent_of_the_workspace_branch_is_fetched(vm: Vm) -> None:
    """The directory on the VM is another one."""
    write(vm.work, {"a": "1"})
    vm.good()
    shutil.rmtree(vm.tree / ".git")
    write(vm.work, {"a": "2"})
    vm.good()
    assert vm.git("rev-list", "--count", vm.head()).strip() == b"2"
    assert vm.pushed() == read(vm.tree) == read(vm.work)


# ---------------------------------------------------------------------------
# what goes along
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_ignored_files_stay_out_unless_the_config_names_them(vm: Vm) -> None:
    write(
        vm.work,
        {".gitignore": "*.log\nbuild/\nseed\nflows.yml\ndocker-*.yml\n", "x.log": "1", "build/x": "1"},
    )
    write(vm.work, {"flows.yml": "flows: []\n", "seed/a.sql": "1", "seed/b.sql": "1", "code": "1"})
    write(
        vm.work,
        {
            ".platoignore": "secret*\n",
            "secret.txt": "1",
            "sub/.gitignore": "!keep.log\n",
            "sub/keep.log": "1",
        },
    )
    write(
        vm.work,
        {"__pycache__/x.pyc": "1", "node_modules/x": "1", ".venv/x": "1", "a.pyc": "1", ".DS_Store": "1"},
    )
    write(vm.work, {"key.pem": "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", "nested/.git/config": "[core]\n"})
    result = vm.run()
    assert "key.pem is left out: a private key (!key.pem in .platoignore sends it)." in result.err
    expected = {
        b".gitignore", b".platoignore", b"code", b"docker-compose.yml", b"flows.yml", b"plato-config.yml",
        b"seed/a.sql", b"sub/.gitignore", b"sub/keep.log",
    }  # fmt: skip
    assert set(vm.pushed()) == set(read(vm.tree)) == expected
    vm.desk.good("sync")
    everything = {*expected, b"x.log", b"build/x", b"seed/b.sql"}
    assert set(read(vm.tree)) == everything
    vm.good()
    assert set(vm.pushed()) == expected
    assert set(read(vm.tree)) == everything  # as `sync` leaves it


def test_links_that_lead_out_are_left_out_and_said(vm: Vm) -> None:
    (vm.work / "out").symlink_to("/etc/passwd")
    (vm.work / "up").symlink_to("../home")
    os.mkfifo(vm.work / "pipe")
    result = vm.run()
    assert "out is left out: a symbolic link that leads out of the tree." in result.err
    assert "pipe is left out" in result.err
    assert set(vm.pushed()) == {b"plato-config.yml", b"docker-compose.yml"}


# ---------------------------------------------------------------------------
# the user's own git takes no part
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_the_users_git_is_neither_touched_nor_needed(vm: Vm, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.com"]
    write(vm.work, {"a": "1"})
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Mine"]):
        subprocess.run([*git, *words], cwd=vm.work, check=True, capture_output=True)
    write(vm.work, {"staged": "1"})
    subprocess.run([*git, "add", "staged"], cwd=vm.work, check=True)
    write(vm.work, {"untracked": "1", "a": "2"})
    before = everything(vm.work / ".git")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "sh"):
        (programs / name).symlink_to(part(name, name))
    vm.good(environment={"PATH": str(programs)})
    assert everything(vm.work / ".git") == before
    assert vm.pushed() == read(vm.tree) == read(vm.work)


# ---------------------------------------------------------------------------
# the tree on the VM
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_what_the_vm_made_survives_and_what_it_changed_is_as_pushed(vm: Vm) -> None:
    write(vm.work, {"a": "1", "data/tracked": "1", "gone/x": "1"})
    vm.good()
    write(
        vm.tree,
        {"data/base/1": "made there", "gone/made": "made there", "a": "changed there", "untracked": "x"},
    )
    (vm.tree / "data/tracked").unlink()
    (vm.tree / "a").chmod(0o700)
    shutil.rmtree(vm.work / "gone")
    vm.good()
    made = {b"data/base/1", b"gone/made", b"untracked"}
    after = read(vm.tree)
    assert {path: after[path] for path in after if path not in made} == read(vm.work)
    assert made < set(after)


@pytest.mark.long
def test_what_is_in_the_way_is_named_and_nothing_changes(vm: Vm) -> None:
    write(vm.work, {"a": "1", "place/x": "1"})
    vm.good()
    write(vm.tree, {"place/made there": "x"})
    write(vm.work, {"a": "2"})
    shutil.rmtree(vm.work / "place")
    (vm.work / "place").write_text("a file now")
    before = everything(vm.tree)
    result = vm.run("--json")
    assert (result.code, result.error["code"]) == (5, "conflict"), result
    assert "place/made there" in result.error["message"]
    without_git = {path: found for path, found in everything(vm.tree).items() if "/.git" not in path}
    assert without_git == {path: found for path, found in before.items() if "/.git" not in path}
    assert vm.execute(f"{AS_PLATO} 'git -C {TARGET} rev-list --count HEAD'").strip() == "1"
    assert vm.execute(f"ls -A {STATE} | grep up || true") == ""
    (vm.tree / "place/made there").unlink()
    vm.good()
    assert read(vm.tree) == read(vm.work)


@pytest.mark.long
@pytest.mark.parametrize("after", [1, 3000, 9000, 20_000])
def test_an_ssh_connection_that_breaks_is_opened_again(vm: Vm, after: int) -> None:
    write(vm.work, {"a": "1"})
    vm.good()
    write(vm.work, {"a": "2", **{f"file-{number}": os.urandom(2000) for number in range(30)}})
    vm.plato.fault("gateway_reset", after_bytes=after)
    vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)
    assert vm.execute(f"ls -A {STATE} | grep up || true") == ""


@pytest.mark.long
def test_a_directory_that_sync_filled_becomes_a_clone_and_back(vm: Vm) -> None:
    write(vm.work, {"a": "1", "b/c": "1", "later": "1"})
    vm.desk.good("sync")
    (vm.tree / "made").write_text("there")
    write(vm.work, {"a": "2", "b/d": "1"})
    vm.good()
    assert read(vm.tree, "made") == read(vm.work) == vm.pushed()
    write(vm.work, {"a": "3", "later": None})
    vm.desk.good("sync")
    assert read(vm.tree, "made") == read(vm.work)
    write(vm.work, {"e": "1"})
    vm.good()
    assert read(vm.tree, "made") == read(vm.work) == vm.pushed()
    assert (vm.tree / "made").exists()


@pytest.mark.long
def test_a_sync_that_was_planned_before_a_clone_notices_it(vm: Vm) -> None:
    """`sync --watch` knows the VM's tree from what it sent, until something else changes that tree."""
    write(vm.work, {"a": "1"})
    watch = vm.desk.begin("sync", "--watch", "--json")
    eventually(lambda: (vm.tree / "a").exists())
    vm.good()
    (vm.tree / "a").write_text("changed there")
    write(vm.work, {"b": "1"})
    eventually(lambda: (vm.tree / "b").exists())
    watch.send_signal(signal.SIGINT)
    ending(watch)
    assert read(vm.tree) == read(vm.work)


@pytest.mark.long
def test_a_clone_with_credentials_in_its_address_gets_a_clean_one(vm: Vm) -> None:
    write(vm.work, {"a": "1"})
    vm.good()
    head = vm.head()
    shutil.rmtree(vm.tree)
    username, password = credentials(vm)
    quoted = urllib.parse.quote(username, safe="") + ":" + urllib.parse.quote(password, safe="")
    url = vm.plato.hub()["base_url"].replace("://", f"://{quoted}@") + f"/local/{SERVICE}.git"
    clone = f"git clone -q -b {vm.branch} {shlex.quote(url)} {TARGET}"
    vm.execute(f"{AS_PLATO} {shlex.quote(clone)}")
    assert password[-16:] in (vm.tree / ".git/config").read_text()
    write(vm.work, {"a": "2"})
    vm.good()
    assert vm.head() != head
    assert read(vm.tree) == read(vm.work)
    for path in (vm.tree / ".git").rglob("*"):
        if path.is_file():
            assert password[-16:].encode() not in path.read_bytes(), path
    assert vm.execute(f"{AS_PLATO} 'git -C {TARGET} status --porcelain'") == ""


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="there the users of a VM are one")
def test_the_owner_is_plato_also_where_root_logs_in(module_vm: Vm, tmp_path: Path) -> None:
    other = begin_vm(module_vm.plato, tmp_path / "blank", "start", "--blank", "--service", SERVICE)
    try:
        write(other.work, {"docker-compose.yml": IDLE, "a": "1", "sub/run": "1"})
        (other.work / "sub/run").chmod(0o755)
        other.good()
        write(other.work, {"a": "2", "new/b": "1"})
        other.good()
        assert "uid=0(" in other.desk.ssh("id").out
        foreign = f"find {TARGET} {STATE} ! -user plato; find {TARGET}/.git ! -user plato"
        assert other.execute(foreign) == ""
        assert other.execute(f"{AS_PLATO} 'git -C {TARGET} status --porcelain'") == ""
        assert read(other.tree) == read(other.work)
    finally:
        other.desk.clear()


NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "f", "f/g", "f/g/h", "new\nline", "sp ace/x", "-x"])
CONTENTS = st.one_of(st.binary(max_size=12), st.sampled_from([None, "exec", "link"]))
EDITS = st.lists(st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=5), min_size=2, max_size=4)


def edit(root: Path, changes: dict[str, Any]) -> None:
    """Make changes to a tree; what is in the way of one goes."""
    for name, content in changes.items():
        path = root / name
        for above in [*reversed(path.parents), path]:
            if above != root and root in above.parents and (above.is_symlink() or above.is_file()):
                above.unlink()
        if path.is_dir():
            shutil.rmtree(path)
        if content is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "link":
            path.symlink_to("docker-compose.yml")
        else:
            path.write_bytes(b"run" if content == "exec" else content)
            path.chmod(0o755 if content == "exec" else 0o644)


@pytest.mark.long
@settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(edits=EDITS)
def test_after_any_edits_the_trees_are_the_same_and_the_vms_own_files_there(
    vm: Vm, edits: list[dict[str, Any]]
) -> None:
    empty(vm)
    write(vm.work, {"plato-config.yml": config_text(main={}), "docker-compose.yml": IDLE})
    made: Tree = {}
    for number, changes in enumerate(edits):
        edit(vm.work, changes)
        local = read(vm.work)
        blocked = {path for path in made for above in local if path.startswith(above + b"/")}
        if blocked:
            result = vm.run("--json")
            assert result.code == 5, result
            for path in blocked:
                (vm.tree / os.fsdecode(path)).unlink()
                del made[path]
        vm.good()
        assert vm.pushed() == local
        assert read(vm.tree) == {**local, **made}
        for directory in [vm.tree, *(path for path in vm.tree.rglob("*") if path.is_dir())]:
            if ".git" not in directory.parts and not directory.is_symlink():
                own = directory / f"made-{number}"
                own.write_text("by a service")
                made[os.fsencode(own.relative_to(vm.tree))] = (b"100644", b"by a service")


# ---------------------------------------------------------------------------
# secrets
# ---------------------------------------------------------------------------


def credentials(vm: Vm) -> tuple[str, str]:
    stored = json.loads((vm.plato.home / "hub" / "credentials.json").read_text())
    return stored["username"], stored["password"]


def canaries(vm: Vm) -> list[bytes]:
    """The credentials in every form in which they could turn up, beside the random end of the password."""
    username, password = credentials(vm)
    both = base64.b64encode(f"{username}:{password}".encode())
    words = [password[-16:], username, urllib.parse.quote(username, safe=""), urllib.parse.quote(username)]
    return [*(word.encode() for word in words), both, both[8:40], json.dumps(username).encode()]


class Sampler:
    """Reads the command lines of all processes of this machine, VMs and all, as often as it can."""

    def __init__(self, wanted: list[bytes]) -> None:
        self.wanted = wanted
        self.found: set[bytes] = set()
        self.seen: set[bytes] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Sampler:  # noqa: PYI034 - Self is not in Python 3.9
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.thread.join()

    def run(self) -> None:
        while not self.ended.is_set():
            for name in os.listdir("/proc"):
                if name.isdigit():
                    with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                        line = file.read()
                        self.seen.add(line)
            self.ended.wait(0.002)
        self.found = {line for line in self.seen if any(word in line for word in self.wanted)}


TRACES = {
    "GIT_TRACE": "1",
    "GIT_TRACE_CURL": "1",
    "GIT_CURL_VERBOSE": "1",
    "GIT_TRACE_PACKET": "1",
    "GIT_TRACE_REDACT": "0",
    "GIT_TRACE2_EVENT": "1",
}
TROUBLES: list[dict[str, Any]] = [
    {},
    {"effect": "status", "status": 401, "path": "*/info/refs", "times": -1},
    {"effect": "status", "status": 403, "path": "*/git-receive-pack", "times": -1},
    {"effect": "status", "status": 500, "path": "*/git-receive-pack", "times": -1},
    {"effect": "reset_before_body", "path": "*/info/refs", "times": -1},
    {"effect": "status", "status": 403, "method": "POST", "path": "*/git-upload-pack", "times": -1},
    {"effect": "truncate", "path": f"{GITEA}/credentials", "bytes": 60, "times": -1},
]


@pytest.mark.long
def test_gitea_s_credentials_are_found_nowhere(vm: Vm, tmp_path: Path) -> None:
    wanted = canaries(vm)
    outputs = ""
    trace = tmp_path / "trace"
    trace.mkdir()
    write(vm.work, {"a": "0"})
    vm.good()
    since = len(vm.plato.requests())
    with Sampler(wanted) as sampler:
        for number, trouble in enumerate(TROUBLES):
            if trouble:
                vm.plato.fault(**trouble)
            write(vm.work, {"a": str(number + 1)})
            environment = {**TRACES, "GIT_TRACE_SETUP": str(trace / "setup")}
            result = vm.run("--verbose", environment=environment)
            assert (result.code == 0) == (not trouble and vm.docker is None), result
            outputs += result.out + result.err
            vm.plato.clear_faults()
    assert any(b"remote-http" in line or b"receive-pack" in line for line in sampler.seen)
    assert sampler.found == set()
    heard = {word for word in wanted if word in outputs.encode()}
    assert heard == set()
    logged = json.dumps(vm.plato.requests()[since:], ensure_ascii=False).encode()
    assert [word for word in wanted if word in logged] == []
    for root in (vm.desk.place, trace, vm.root):
        for directory, directories, files in os.walk(root):
            directories[:] = [name for name in directories if name != "docker"]
            for name in files:
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    content = path.read_bytes()
                    assert [word for word in wanted if word in content] == [], path
    assert (vm.root / "home").is_dir()


# ---------------------------------------------------------------------------
# trouble with Gitea: step, what failed, exit code; and afterwards it succeeds
# ---------------------------------------------------------------------------

REPO = f"{GITEA}/simulators/*/repo"
FINDING, PUSHING = "Finding the repository: ", "Pushing 3 files: "
# What goes wrong, the exit code, the step, and words of the message.
CASES: list[tuple[dict[str, Any], int, str, str]] = [
    ({"effect": "status", "status": 403, "path": f"{GITEA}/credentials"}, 4, FINDING, "403"),
    ({"effect": "status", "status": 500, "path": f"{GITEA}/simulators"}, 6, FINDING, "failed with 500"),
    ({"effect": "reset_before_body", "path": f"{GITEA}/simulators"}, 6, FINDING, "connection"),
    ({"effect": "html", "status": 200, "path": f"{GITEA}/credentials"}, 6, FINDING, "not the JSON"),
    ({"effect": "status", "status": 404, "path": REPO}, 6, FINDING, "404"),
    ({"effect": "status", "status": 401, "path": "*/info/refs"}, 4, PUSHING, "refused the credentials"),
    ({"effect": "status", "status": 404, "path": "*/info/refs"}, 1, PUSHING, "not found"),
    ({"effect": "status", "status": 503, "path": "*/info/refs"}, 6, PUSHING, "503"),
    ({"effect": "redirect", "url": "http://127.0.0.1:1/", "path": "*/info/refs"}, 1, PUSHING, "30"),
    ({"effect": "status", "status": 403, "path": "*/git-receive-pack"}, 4, PUSHING, "403"),
    ({"effect": "status", "status": 413, "path": "*/git-receive-pack"}, 1, PUSHING, "413"),
    ({"effect": "reset_before_body", "path": "*/git-receive-pack"}, 6, PUSHING, "could not talk to Gitea"),
    ({"effect": "cut_upload", "path": "*/git-receive-pack", "bytes": 100}, 6, PUSHING, "could not talk"),
    (
        {"effect": "status", "status": 403, "method": "POST", "path": "*/git-upload-pack"},
        4,
        PUSHING,
        "403",
    ),
    (
        {"effect": "status", "status": 502, "method": "POST", "path": "*/git-upload-pack"},
        6,
        PUSHING,
        "502",
    ),
    (
        {"effect": "reset_before_body", "method": "POST", "path": "*/git-upload-pack"},
        6,
        PUSHING,
        "talk",
    ),
]


@pytest.mark.sampled
@pytest.mark.parametrize("number", range(len(CASES)))
def test_trouble_with_gitea_is_told_and_the_next_run_succeeds(vm: Vm, number: int) -> None:
    trouble, code, step, words = CASES[number]
    write(vm.work, {"a": os.urandom(2000)})
    vm.plato.fault(**{"times": -1, **trouble})
    result = vm.run("--json")
    message = result.error["message"]
    assert (result.code, message.startswith(step), words in message) == (code, True, True), result
    assert result.error["hint"] or words in ("404", "30")
    assert "\n" not in message
    vm.plato.clear_faults()
    vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)


@pytest.mark.long
def test_a_connection_that_breaks_once_is_not_even_noticed(vm: Vm) -> None:
    for effect in ("reset_before_body", "lost_answer"):
        write(vm.work, {"a": os.urandom(2000)})
        vm.plato.fault(effect, path="*/git-receive-pack")
        vm.good()
        assert vm.pushed() == read(vm.tree) == read(vm.work)


@pytest.mark.long
def test_a_push_that_another_one_overtakes_is_made_again(vm: Vm) -> None:
    write(vm.work, {"a": "1"})
    vm.good()
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.com")
    other = (
        vm.git(*identity, "commit-tree", "-p", vm.head(), "-m", "Other", f"{vm.head()}^{{tree}}")
        .decode()
        .strip()
    )
    write(vm.work, {"a": "2"})
    refs = f"/{SERVICE}.git/info/refs"
    since = len(vm.plato.requests("GET", refs))
    vm.plato.fault(
        "latency", path=f"*{refs}", nth=4, seconds=4
    )  # the push looks at the branch, once admitted
    process = vm.desk.begin("start-services", "--json")
    vm.plato.wait_for_request("GET", refs, since + 4)
    vm.git("update-ref", f"refs/heads/{vm.branch}", other)
    result = ending(process)
    assert (result.code == 0) == (vm.docker is None), result
    assert vm.git("rev-parse", f"{vm.head()}^").decode().strip() == other
    assert vm.pushed() == read(vm.tree) == read(vm.work)


@pytest.mark.long
def test_limits_of_the_server_are_told_with_its_own_words(vm: Vm) -> None:
    write(vm.work, {"large.bin": os.urandom(300_000)})
    vm.plato.limit_hub(file=100_000)
    result = vm.run("--json")
    assert result.code == 1
    assert "File large.bin has 300000 bytes; the limit is 100000 bytes" in result.error["message"]
    assert ".platoignore" in result.error["hint"]
    vm.plato.limit_hub(file=0, body=100_000)
    result = vm.run("--json")
    assert result.code == 1, result
    assert "413" in result.error["message"]
    assert ".platoignore" in result.error["hint"]
    write(vm.work, {".platoignore": "large.bin\n"})
    vm.good()


@pytest.mark.long
def test_a_simulator_that_is_not_listed(new_plato: Callable[..., LocalPlato], tmp_path: Path) -> None:
    plato = new_plato(docker="absent")
    vm = begin_vm(plato, tmp_path / "own")
    write(vm.work, {"docker-compose.yml": IDLE})
    state = vm.desk.state_file.read_text()
    vm.desk.state_file.write_text(re.sub(r"(?m)^service: .*$", "service: taskbord", state))
    result = vm.run("--json")
    assert result.code == 1
    message = "Finding the repository: Gitea lists no simulator 'taskbord' for this API key."
    assert result.error["message"] == message
    assert "docuseal, espocrm, taskboard" in result.error["hint"]
    assert "--via sync" in result.error["hint"]
    vm.desk.state_file.write_text(re.sub(r"(?m)^service: .*$", "service: TaskBoard", state))
    result = vm.run("--json")
    assert result.error["message"].startswith("Starting main"), result
    assert "The VM has no docker." in result.error["message"]
    assert read(vm.root / "home/plato/worktree/TaskBoard") == read(vm.work)
    plato.add_simulator("busy", has_repo=False)
    vm.desk.state_file.write_text(re.sub(r"(?m)^service: .*$", "service: busy", state))
    plato.fault("lost_answer", method="POST", path=REPO)  # made, but nobody heard of it
    result = vm.run("--json")
    assert result.error["message"].startswith("Starting main"), result
    assert plato.repository("busy").is_dir()
    vm.desk.clear()


def test_no_git_on_the_vm(vm: Vm) -> None:
    programs = "/home/plato/bin"
    vm.execute(
        f"mkdir {programs}; ln -s /usr/bin/* /bin/* {programs} 2>/dev/null; rm {programs}/git", code=None
    )
    (vm.root / "root/.bashrc").write_text(f"PATH={programs}\n")
    try:
        result = vm.run("--json")
    finally:
        vm.execute(f"rm -rf {programs} /root/.bashrc")
    assert result.code == 1
    assert result.error["message"] == (
        "Pushing 2 files: The VM has no git; bring the code over with --via sync."
    )


# ---------------------------------------------------------------------------
# interruptions
# ---------------------------------------------------------------------------


def session_processes(vm: Vm) -> dict[int, str]:
    """The processes of this desk by pid, but for heartbeats and the connection that ssh keeps."""
    found = {}
    mark = os.fsencode(f"HOME={vm.desk.home}") + b"\0"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment, line = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
            if mark in environment and not re.search(b"heartbeat-child|gateway-stream|^ssh: ", line):
                found[int(process.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


@pytest.mark.long
@pytest.mark.parametrize("path", ["*/info/refs", "*/git-receive-pack", f"{GITEA}/simulators"])
def test_an_interruption_while_pushing_leaves_nothing(vm: Vm, path: str) -> None:
    write(vm.work, {"a": "1"})
    vm.plato.fault("hang", path=path, times=-1)
    method, part_of_path = "POST" if "receive" in path else "GET", path.lstrip("*")
    since = len(vm.plato.requests(method, part_of_path))
    before = set(session_processes(vm))
    process = vm.desk.begin("start-services", "--json")
    vm.plato.wait_for_request(method, part_of_path, since + 1)
    process.send_signal(signal.SIGINT)
    result = ending(process)
    assert result.code == 130, result
    eventually(lambda: set(session_processes(vm)) <= before)
    vm.plato.clear_faults()
    vm.good()
    assert vm.pushed() == read(vm.tree) == read(vm.work)


GATE = {
    "command": ["sh", "-c", "touch /gate/here; until [ -e /gate/go ]; do sleep 0.1; done"],
    "volumes": ["./gate:/gate"],
}


def gated() -> str:
    """A Compose file whose `up` lasts until the file gate/go is there."""
    app = {
        "command": ["sleep", "1000"],
        "depends_on": {"gate": {"condition": "service_completed_successfully"}},
    }
    return compose(gate=GATE, app=app)


@pytest.mark.long
def test_an_interruption_during_up_ends_it_there_too(docker: Vm) -> None:
    vm = docker
    write(vm.work, {"docker-compose.yml": gated(), "gate/.keep": ""})
    before = set(session_processes(vm))
    process = vm.desk.begin("start-services", "--json")
    eventually(lambda: (vm.tree / "gate/here").exists())
    assert "compose" in vm.execute("ps -eo args")
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 130
    eventually(lambda: "docker compose" not in vm.execute("ps -eo args"))
    eventually(lambda: set(session_processes(vm)) <= before)
    (vm.tree / "gate/go").touch()
    report = vm.good()
    assert [one["state"] for one in report["services"][0]["containers"]] == ["running", "exited"]


@pytest.mark.long
def test_ssh_that_breaks_during_up_is_opened_again(docker: Vm) -> None:
    vm = docker
    write(vm.work, {"docker-compose.yml": gated(), "gate/.keep": ""})
    process = vm.desk.begin("start-services")
    eventually(lambda: (vm.tree / "gate/here").exists(), 60)
    vm.execute("kill -9 $(ps -eo pid,args | sed -n 's/^ *\\([0-9]*\\) sshd.*/\\1/p')", code=None)
    eventually(lambda: "root@notty" in vm.execute("ps -eo args"), 60)
    (vm.tree / "gate/go").touch()
    result = ending(process)
    assert result.code == 0, result
    assert "app running" in result.out


# ---------------------------------------------------------------------------
# Docker Compose
# ---------------------------------------------------------------------------


def test_services_come_up_in_order_and_stay_over_an_update(docker: Vm) -> None:
    vm = docker
    healthy = {"test": ["CMD", "test", "-e", "/tmp/up"], "interval": "1s"}
    shared = {"volumes": ["./shared:/shared"]}
    first = compose(
        db={"command": ["sh", "-c", "touch /tmp/up; exec sleep 1000"], "healthcheck": healthy, **shared},
        once={"command": ["sh", "-c", "sleep 0.5; touch /shared/first"], **shared},
    )
    second = compose(app={"command": ["sh", "-c", "rm /shared/first && exec sleep 1000"], **shared})
    services = {
        "data": {
            "file": "first.yml",
            "required_healthy_containers": ["db", "once"],
            "healthy_wait_timeout": 60,
        }
    }
    services["front"] = {"file": "./second.yml", "required_healthy_containers": ["all"]}
    write(vm.work, {"plato-config.yml": config_text(**services), "first.yml": first, "second.yml": second})
    write(vm.work, {"shared/config": "1", "docker-compose.yml": None})
    report = vm.good()
    assert [(one["name"], one["type"], one["file"]) for one in report["services"]] == [
        ("data", "docker-compose", "first.yml"),
        ("front", "docker-compose", "second.yml"),
    ]
    assert set(report) == {
        "via", "path", "branch", "commit", "pushed", "repository", "changed", "services", "url",
        "app_answers", "steps", "seconds",
    }  # fmt: skip
    assert report["path"] == TARGET
    assert report["repository"].endswith(f"/local/{SERVICE}.git")
    assert [step["step"] for step in report["steps"]] == [
        "repository", "sync", "push", "data", "front", "app"
    ]  # fmt: skip
    states = {found["service"]: found for one in report["services"] for found in one["containers"]}
    assert states["db"]["health"] == "healthy"
    assert states["once"]["state"] == "exited"
    assert (states["app"]["state"], states["app"]["health"]) == ("running", None)
    assert not (vm.tree / "shared/first").exists()  # the second service removes it, or dies
    (vm.tree / "shared/made").touch()
    ids = vm.execute("docker ps -q --no-trunc").split()
    assert not any(found["outdated"] for found in states.values())
    assert vm.desk.good("sync", "--json").document["sent"] == 0
    write(vm.work, {"unrelated": "1"})
    assert "mounted" not in vm.run().err
    write(vm.work, {"shared/config": "2", "shared/new": "1"})
    told = vm.run()
    assert told.code == 0
    assert (
        "leads to port 8080 of the VM (`compute.app_port`), where it does not work yet: nothing" in told.err
    )
    assert "Containers publish: no port." in told.err
    assert "The code that db mounted has changed since it was started." in told.err
    assert "The code that app mounted has changed" in told.err
    assert vm.execute("docker ps -q --no-trunc").split() == ids  # nothing about the containers changed
    container = states["app"]["name"]
    assert vm.execute(f"docker exec {container} cat /shared/config /shared/new") == "21"
    assert (vm.tree / "shared/made").exists()
    assert "mounted" not in vm.run("--force-recreate").err
    assert not set(vm.execute("docker ps -q --no-trunc").split()) & set(ids)


@pytest.mark.long
def test_images_are_made_anew_when_the_code_has_changed(docker: Vm) -> None:
    vm = docker

    def word() -> str:
        name = vm.execute("docker ps --format '{{.Names}}'").strip()
        return str(vm.execute(f"docker exec {name} cat /word"))

    file = compose(app={"image": "built:latest", "build": ".", "command": ["sleep", "1000"]})
    write(
        vm.work,
        {"docker-compose.yml": file, "Dockerfile": "FROM busybox:latest\nCOPY word /word\n", "word": "1"},
    )
    vm.good("--timeout", "120")
    write(vm.work, {"word": "2"})
    vm.good("--no-build")
    assert word() == "1"
    vm.good()
    assert word() == "2"
    vm.execute("docker tag busybox:latest built:latest")
    vm.good()  # nothing has changed since the image was made from it
    assert vm.run("--build", "--no-build").code == 2
    with pytest.raises(AssertionError):
        word()
    vm.good("--build")
    assert word() == "2"
    vm.execute("docker ps -aq | xargs docker rm -f; docker rmi built:latest")


DYING = {
    "command": [
        "sh",
        "-c",
        "echo line 1; echo line 2; echo 'cannot open \x1b[31m/data' >&2; exit 3",
    ]
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("service", "settings_of_it", "code", "words"),
    [
        (DYING, {}, 1, ["app is exited (3).", "app | line 2", "app | cannot open \\x1b[31m/data"]),
        (
            {
                "command": ["sleep", "1000"],
                "healthcheck": {"test": ["CMD", "false"], "interval": "1s", "retries": 1},
            },
            {},
            1,
            ["app is unhealthy.", "app | (it wrote nothing)"],
        ),
        ({"command": ["no-such-program"], "init": False}, {}, 1, ["no-such-program"]),
        ({"image": "missing.invalid/none:1"}, {}, 1, ["`docker compose up` failed", "missing.invalid"]),
        (
            {"command": ["sleep", "1000"]},
            {"required_healthy_containers": ["other-app"]},  # as a project called `other` would have it
            1,
            ["`required_healthy_containers` names other-app; docker-compose.yml has none such."],
        ),
    ],
    ids=["dies", "unhealthy", "no program", "no image", "unknown name"],
)
def test_containers_that_do_not_come_up(
    docker: Vm, service: dict[str, Any], settings_of_it: dict[str, Any], code: int, words: list[str]
) -> None:
    vm = docker
    write(
        vm.work,
        {"plato-config.yml": config_text(main=settings_of_it), "docker-compose.yml": compose(app=service)},
    )
    result = vm.run()
    assert result.code == code, result
    assert "Starting main (docker-compose.yml): " in result.err
    for text in words:
        assert text in result.err, result.err
    write(vm.work, {"plato-config.yml": config_text(main={}), "docker-compose.yml": IDLE})
    vm.good()


SHORTER = """
plan = product.plan_services
product.plan_services = lambda config: [{**service, "seconds": 2} for service in plan(config)]
"""


@pytest.mark.long
def test_containers_that_are_not_healthy_in_time(docker: Vm) -> None:
    check = {"test": ["CMD-SHELL", "echo the check says no; exit 1"], "interval": "1s", "retries": 99}
    app = {"command": ["sleep", "1000"], "healthcheck": check}
    write(docker.work, {"docker-compose.yml": compose(app=app)})
    result = docker.desk.run(command=altered(SHORTER, "start-services", "--json"))
    assert (result.code, result.error["code"]) == (7, "timed_out"), result
    assert "Not healthy within 2 s: app is starting." in result.error["message"]
    assert "\n  app | health check: the check says no" in result.error["message"]


@pytest.mark.long
def test_an_up_that_does_not_end_in_time(docker: Vm) -> None:
    vm = docker
    write(vm.work, {"docker-compose.yml": gated(), "gate/.keep": ""})
    result = vm.run("--json", "--timeout", "1")
    assert (result.code, result.error["code"]) == (7, "timed_out"), result
    assert "did not end within 1 s" in result.error["message"]
    eventually(lambda: (vm.tree / "gate/here").exists())
    (vm.tree / "gate/go").touch()
    vm.good()


def test_a_compose_file_that_is_not_valid(vm: Vm) -> None:
    write(vm.work, {"docker-compose.yml": "services:\n  app:\n    imagee: x\n"})
    result = vm.run("--json")
    assert result.code == 1
    if vm.docker is None:
        assert "docker-compose.yml is not a valid Compose file: " in result.error["message"]
        assert "imagee" in result.error["message"]
    write(vm.work, {"plato-config.yml": config_text(main={"file": "nowhere.yml"})})
    since = len(vm.plato.requests())
    result = vm.run("--json")
    assert result.code == 8
    assert "there is no 'nowhere.yml'" in result.error["message"]
    assert [one["path"] for one in vm.plato.requests()[since:] if "gitea" in one["path"]] == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("docker", "words"), [("absent", "The VM has no docker."), ("off", "Docker on the VM does")]
)
def test_a_vm_without_docker(
    new_plato: Callable[..., LocalPlato], tmp_path: Path, docker: str, words: str
) -> None:
    if docker == "off":
        part("docker", "docker.io")
    vm = begin_vm(new_plato(docker=docker), tmp_path / "own")
    write(vm.work, {"docker-compose.yml": IDLE})
    result = vm.run("--json")
    assert result.code == 1
    assert result.error["message"].startswith(f"Starting main (docker-compose.yml): {words}"), result
    assert read(vm.tree) == read(vm.work)
    vm.desk.clear()


@pytest.mark.long
def test_the_user_s_own_docker_socket_is_used(docker: Vm) -> None:
    docker.good()
    docker.execute("rm -f /run/docker-user.sock; mv /run/docker.sock /run/docker-user.sock")
    docker.good("--force-recreate")


@pytest.mark.long
def test_without_ssh_the_api_starts_what_sync_brought(docker: Vm) -> None:
    vm = docker
    write(vm.work, {"docker-compose.yml": compose(app={"command": ["sleep", "1000"]})})
    state = vm.desk.state_file.read_text()
    try:
        vm.desk.state_file.write_text(re.sub(r"(?m)^ssh_\w+: .*\n", "", state))
        result = vm.run("--json")
        assert result.code == 1
        assert "This sandbox has no SSH" in result.error["message"]
        assert "--via sync" in result.error["hint"]
        report = vm.good("--via", "sync")
    finally:
        vm.desk.state_file.write_text(state)
    assert report["branch"] is report["commit"] is None
    assert [one["state"] for one in report["services"][0]["containers"]] == ["running"]
    vm.good()  # as the user plato, where root has been at work
    assert read(vm.tree) == read(vm.work)


@pytest.mark.long
def test_the_report_for_people(vm: Vm) -> None:
    if vm.docker is not None:
        missing(f"the VM has no Docker engine: {vm.docker}")
    result = vm.run()
    lines = [line.split(":")[0].strip() for line in result.out.splitlines()]
    assert lines[:5] == ["Services started successfully!", "Branch", "Commit", "VM Path", "main"]
    assert lines[5:] == ["Public URL"]
    assert TARGET in result.out
    assert "\x1b" not in result.out
