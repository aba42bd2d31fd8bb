"""The local Plato's Gitea from outside: its endpoints, and git itself over smart HTTP, also inside VMs."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from conftest import Result, eventually, part
from test_local_plato import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

GITEA = "/api/v1/gitea"
HELPER = '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$HUB_USER" "$HUB_WORD"; }; f'
RPC = "application/x-git-%s-request"


class Git:
    """Real git at a place of its own, with the credentials that the API gives."""

    def __init__(self, plato: LocalPlato, place: Path) -> None:
        part("git", "git")
        self.plato = plato
        self.client = Client(plato)
        self.place = place
        place.mkdir()
        credentials = self.client.call("GET", f"{GITEA}/credentials")
        self.user, self.password = credentials["username"], credentials["password"]
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(place),
            "GIT_TERMINAL_PROMPT": "0",
            "HUB_USER": self.user,
            "HUB_WORD": self.password,
            "GIT_SSL_CAINFO": plato.environment["SSL_CERT_FILE"],
        }

    def run(self, *words: str, directory: str = ".", helper: str = HELPER, **environment: str) -> Result:
        identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com")
        done = subprocess.run(
            ["git", "-c", f"credential.helper={helper}", *identity, *words],
            cwd=self.place / directory,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def good(self, *words: str, **options: Any) -> str:
        result = self.run(*words, **options)
        assert result.code == 0, result
        return result.out

    def simulator(self, name: str) -> dict[str, Any]:
        listed = self.client.call("GET", f"{GITEA}/simulators")
        return next(dict(one) for one in listed if one["name"] == name)

    def url(self, name: str) -> str:
        """The clone URL of a simulator's repository, which is made when there is none."""
        simulator = self.simulator(name)
        method = "GET" if simulator["has_repo"] else "POST"
        path = f"{GITEA}/simulators/{simulator['id']}/repo"
        return str(self.client.call(method, path)["clone_url"])

    def work(self, files: dict[str, bytes], directory: str = "work") -> None:
        """A commit of these files on the branch main of a new repository."""
        self.good("init", "-q", "-b", "main", directory)
        for name, content in files.items():
            (self.place / directory / name).write_bytes(content)
        self.good("add", "-A", directory=directory)
        self.good("commit", "-q", "-m", "A change", directory=directory)

    def push(self, url: str, *options: str, directory: str = "work", **environment: str) -> Result:
        return self.run("push", *options, url, "main", directory=directory, **environment)


@pytest.fixture
def git(plato: LocalPlato, tmp_path: Path) -> Git:
    return Git(plato, tmp_path / "git")


def raw(
    git: Git, method: str, url: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request to the git server, with the right credentials unless the headers say otherwise."""
    parts = urlsplit(url)
    right = base64.b64encode(f"{git.user}:{git.password}".encode()).decode()
    sent = {
        "Authorization": f"Basic {right}",
        **{name.replace("_", "-"): text for name, text in headers.items()},
    }
    connection = http.client.HTTPConnection(str(parts.netloc), timeout=60)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, {name: text for name, text in sent.items() if text})
        with connection.getresponse() as response:
            received = {name.lower(): text for name, text in response.getheaders()}
            return response.status, received, response.read()
    finally:
        connection.close()


# ---------------------------------------------------------------------------
# the endpoints
# ---------------------------------------------------------------------------


def test_whoever_runs_a_vm_of_a_simulator_may_push_it(git: Git, plato: LocalPlato) -> None:
    environment = {"type": "resource", "simulator": "Shoe-shop", "sim_config": {"cpus": 1}}
    body = {"type": "envs", "envs": [environment], "timeout": 600, "source": "SDK"}
    session = git.client.call("POST", "/api/v2/sessions/make", body)
    assert git.simulator("Shoe-shop")["has_repo"] is False
    assert git.url("Shoe-shop").endswith("/local/Shoe-shop.git")
    git.client.call("POST", f"/api/v2/sessions/{session['session_id']}/close")
    assert git.simulator("Shoe-shop")["has_repo"] is True


def test_simulators_and_their_repositories(git: Git, plato: LocalPlato) -> None:
    plato.add_simulator("TaskBoards", has_repo=True, description="Close, but another")
    plato.add_simulator("hidden", has_repo=True, listed=False)
    call = git.client.call
    listed = {one["name"]: one for one in call("GET", f"{GITEA}/simulators")}
    assert list(listed) == ["espocrm", "docuseal", "taskboard", "TaskBoards"]
    assert [one["has_repo"] for one in listed.values()] == [True, True, False, True]
    path = f"{GITEA}/simulators/{listed['taskboard']['id']}/repo"
    assert call("GET", path)["has_repo"] is False
    made = call("POST", path)
    assert made["clone_url"].endswith("/local/taskboard.git")
    assert made["default_branch"] == "main"
    assert git.simulator("taskboard")["has_repo"] is True
    assert call("GET", path)["clone_url"] == made["clone_url"]
    call("POST", path, status=409)
    bare = plato.repository("taskboard")
    assert git.good("--git-dir", str(bare), "symbolic-ref", "HEAD") == "refs/heads/main\n"
    assert git.good("--git-dir", str(bare), "for-each-ref") == ""
    assert not (bare / "hooks").exists()
    for wrong, status in (("999", 404), (str(listed["TaskBoards"]["id"] + 1), 404), ("taskboard", 422)):
        call("GET", f"{GITEA}/simulators/{wrong}/repo", status=status)
        call("POST", f"{GITEA}/simulators/{wrong}/repo", status=status)


def test_names_that_differ_by_case_have_their_own_repositories(git: Git, plato: LocalPlato) -> None:
    for name in ("Taskboard", "TASKBOARD", "task board/..", "taskboard"):
        plato.add_simulator(name)
    identifiers = [one["id"] for one in git.client.call("GET", f"{GITEA}/simulators")][2:]
    urls = [
        git.client.call("POST", f"{GITEA}/simulators/{identifier}/repo")["clone_url"]
        for identifier in identifiers
    ]
    assert len({url.lower() for url in urls}) == 5
    git.work({"a": b"1"})
    assert git.push(urls[1]).code == 0
    assert [bool(git.good("ls-remote", url)) for url in urls] == [False, True, False, False, False]


def test_credentials_and_repositories_outlast_the_server(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    git.work({"a": b"1"})
    assert git.push(url).code == 0
    listed = git.client.call("GET", f"{GITEA}/simulators")
    plato.stop()
    plato.start()
    again = Git(plato, git.place / "again")
    assert (again.user, again.password) == (git.user, git.password)
    assert again.client.call("GET", f"{GITEA}/simulators") == listed
    assert "refs/heads/main" in again.good("ls-remote", again.url("taskboard"))
    for path in (plato.home / "hub").glob("*.json"):
        assert path.stat().st_mode & 0o77 == 0


def test_a_wrong_simulator_is_refused_by_the_admin_interface(plato: LocalPlato) -> None:
    client = Client(plato)
    for body in ({}, {"name": "x", "id": 5}, {"name": "x", "access": "some"}, {"name": "x", "colour": 1}):
        assert client.send("POST", "/_local/hub/simulators", json.dumps(body).encode()).status == 400
    assert client.send("POST", "/_local/hub", b'{"colour": 1}').status == 400


# ---------------------------------------------------------------------------
# git
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_push_and_clone(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    assert git.run("clone", "-q", url, "empty").code == 0
    git.work({"a": b"1", "b": os.urandom(3 << 20)})  # over http.postBuffer: a chunked body
    assert git.push(url).code == 0
    git.good("clone", "-q", url, "copy")
    assert (git.place / "copy/b").read_bytes() == (git.place / "work/b").read_bytes()
    assert not (plato.repository("taskboard") / "hooks").exists()
    pushes = [one for one in plato.requests("POST", "/git-receive-pack") if one["received"] > 1 << 20]
    assert [one["headers"].get("transfer-encoding") for one in pushes] == ["chunked"]
    fetches = plato.requests("POST", "/git-upload-pack")
    assert fetches[-1]["headers"]["git-protocol"] == "version=2"
    assert fetches[-1]["sent"] > 3 << 20


@pytest.mark.sampled
@pytest.mark.parametrize("version", ["0", "1", "2"])
def test_every_protocol_version(git: Git, version: str) -> None:
    url = git.url("taskboard")
    git.work({"a": b"1"})
    options = ("-c", f"protocol.version={version}")
    git.good(*options, "push", "-q", url, "main", directory="work")
    git.good(*options, "clone", "-q", "--depth", "1", url, "copy")
    assert (git.place / "copy/a").read_bytes() == b"1"


@pytest.mark.long
def test_a_compressed_request(git: Git, plato: LocalPlato) -> None:
    """Git compresses what it has to say of many commits, here of a history that the server does not know."""
    url = git.url("taskboard")
    git.work({"a": b"0"})
    assert git.push(url).code == 0
    git.work({"a": b"other"}, "other")
    for number in range(60):
        git.good("commit", "-q", "--allow-empty", "-m", f"own {number}", directory="other")
    git.good("-c", "protocol.version=0", "fetch", "-q", url, "main", directory="other")
    encodings = [one["headers"].get("content-encoding") for one in plato.requests("POST", "/git-upload-pack")]
    assert "gzip" in encodings
    assert git.good("show", "FETCH_HEAD:a", directory="other") == "0"


def test_a_compressed_and_chunked_request(git: Git) -> None:
    url = git.url("espocrm")
    body = gzip.compress(b"0014command=ls-refs\n0000")
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    right = base64.b64encode(f"{git.user}:{git.password}".encode()).decode()
    headers = {
        "Authorization": f"Basic {right}",
        "Content-Type": RPC % "upload-pack",
        "Content-Encoding": "gzip",
        "Git-Protocol": "version=2",
    }
    path = urlsplit(url).path + "/git-upload-pack"
    for _ in range(2):  # on one connection
        connection.request(
            "POST", path, iter([body[:5], body[5:]]), {**headers, "Transfer-Encoding": "chunked"},
            encode_chunked=True,
        )  # fmt: skip
        with connection.getresponse() as response:
            assert (response.status, response.read()) == (200, b"0000")
    connection.close()


@pytest.mark.long
def test_a_big_push_is_not_held_in_memory(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    with open(git.place / "big", "wb") as file:
        for _ in range(100):
            file.write(os.urandom(1 << 20))
    git.good("init", "-q", "-b", "main", "work")
    (git.place / "big").rename(git.place / "work/big")
    git.good("-c", "core.compression=0", "add", "-A", directory="work")
    git.good("commit", "-q", "-m", "Big", directory="work")
    assert git.push(url).code == 0
    git.good("clone", "-q", "--no-checkout", url, "copy")
    status = Path(f"/proc/{plato.information['pid']}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 80 << 10  # KB


@pytest.mark.long
def test_over_https(new_plato: Callable[..., LocalPlato], tmp_path: Path) -> None:
    plato = new_plato(hub_scheme="https")
    git = Git(plato, tmp_path / "git")
    url = git.url("taskboard")
    assert url.startswith("https://localhost:")
    git.work({"a": os.urandom(2 << 20)})
    assert git.push(url).code == 0
    git.good("clone", "-q", url, "copy")
    assert (git.place / "copy/a").read_bytes() == (git.place / "work/a").read_bytes()
    assert git.run("ls-remote", url, GIT_SSL_CAINFO="/etc/ssl/certs/ca-certificates.crt").code == 128
    assert plato.environment["GIT_SSL_CAINFO"] == plato.environment["SSL_CERT_FILE"]


# ---------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------


def test_credentials_are_asked_for(git: Git) -> None:
    url = git.url("espocrm") + "/info/refs?service=git-upload-pack"
    status, headers, _ = raw(git, "GET", url, Authorization="")
    assert (status, headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
    cases = {
        "Basic " + base64.b64encode(f"{git.user}:{git.password}x".encode()).decode(): 401,
        "Basic " + base64.b64encode(f"{git.user}:{git.password}".encode("latin-1", "replace")).decode(): 401,
        "Basic " + base64.b64encode(f"x{git.user}:{git.password}".encode()).decode(): 401,
        "Basic !!!": 401,
        "Bearer x": 401,
        "basic " + base64.b64encode(f"{git.user}:{git.password}".encode()).decode(): 200,
    }
    assert {text: raw(git, "GET", url, Authorization=text)[0] for text in cases} == cases
    assert git.run("ls-remote", git.url("espocrm"), helper="").code == 128
    refused = git.run("ls-remote", git.url("espocrm"), HUB_WORD="wrong")
    assert "Authentication failed" in refused.err


@pytest.mark.long
def test_what_is_not_ours_and_what_is_not_there(git: Git, plato: LocalPlato) -> None:
    theirs = plato.add_simulator("theirs", has_repo=True, owner="others", access="none", listed=False)
    shown = plato.add_simulator("shown", has_repo=True, access="read")
    base = plato.hub()["base_url"]
    refused = git.run("ls-remote", f"{base}/others/{theirs['repository']}.git")
    assert "403" in refused.err
    git.work({"a": b"1"})
    assert git.run("ls-remote", f"{base}/local/{shown['repository']}.git").code == 0
    assert "403" in git.push(f"{base}/local/{shown['repository']}.git").err
    assert "not found" in git.run("ls-remote", f"{base}/local/nobody.git").err
    url = git.url("espocrm")
    for path in ("HEAD", "objects/info/packs", "info/refs", "info/refs?service=git-x", "../../key", ""):
        assert raw(git, "GET", f"{url}/{path}")[0] == 404, path
    assert raw(git, "GET", f"{url}/git-upload-pack")[0] == 405
    assert raw(git, "POST", f"{url}/info/refs?service=git-upload-pack")[0] == 405
    assert raw(git, "POST", f"{url}/git-upload-pack", b"x", Content_Length="many")[0] == 400


LIMITS = {
    "body": ("HTTP 413", {"body": 1 << 20}),
    "pack": ("remote rejected", {"pack": 1 << 20}),
    "file": ("pre-receive hook declined", {"file": 1 << 20}),
}


@pytest.mark.long
@pytest.mark.parametrize(("words", "limits"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("post_buffer", [1 << 20, 8 << 20], ids=["chunked", "at once"])
def test_limits(git: Git, plato: LocalPlato, words: str, limits: dict[str, int], post_buffer: int) -> None:
    url = git.url("taskboard")
    git.work({"small": b"1", "big file": os.urandom(3 << 20)})
    plato.limit_hub(**limits)
    options = ("-c", f"http.postBuffer={post_buffer}")
    refused = git.run(*options, "push", url, "main", directory="work")
    assert refused.code != 0
    assert words in refused.err
    assert ("big file has 3145728 bytes" in refused.err) == ("file" in limits)
    assert git.good("ls-remote", url) == ""
    bare = plato.repository("taskboard")
    eventually(lambda: not list(bare.glob("objects/tmp_objdir-*")))
    (git.place / "work/big file").unlink()
    git.good("commit", "-q", "-a", "--amend", "-m", "Smaller", directory="work")
    assert git.push(url).code == 0
    assert not (bare / "hooks").exists()
    plato.limit_hub(body=0, pack=0, file=0)


# ---------------------------------------------------------------------------
# faults and records
# ---------------------------------------------------------------------------

UPLOAD, DOWNLOAD, REFS = "*/git-receive-pack", "*/git-upload-pack", "*/info/refs"
FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "401": ("push", {"effect": "status", "path": "*", "status": 401, "times": -1}, "Authentication failed"),
    "403": ("push", {"effect": "status", "path": UPLOAD, "status": 403, "times": -1}, "403"),
    "500": ("push", {"effect": "status", "path": UPLOAD, "status": 500, "times": -1}, "500"),
    "503 html": ("clone", {"effect": "html", "path": REFS, "status": 503, "times": -1}, "503"),
    "cut upload": (
        "push",
        {"effect": "cut_upload", "path": UPLOAD, "bytes": 1 << 20, "times": -1},
        "RPC failed",
    ),
    "reset": ("clone", {"effect": "reset_before_body", "path": DOWNLOAD, "times": -1}, "RPC failed"),
    "reset after": ("push", {"effect": "reset_before_acting", "path": UPLOAD, "times": -1}, "RPC failed"),
    "truncated": (
        "clone",
        {"effect": "truncate", "path": DOWNLOAD, "bytes": 9999, "times": -1},
        "RPC failed",
    ),
    "lost answer": ("push", {"effect": "lost_answer", "path": UPLOAD, "nth": 2}, "RPC failed"),
    "wrong type": (
        "clone",
        {"effect": "content_type", "path": REFS, "headers": {"Content-Type": "text/html"}, "times": -1},
        "fatal: ",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(("action", "fault", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(git: Git, plato: LocalPlato, action: str, fault: dict[str, Any], words: str) -> None:
    url = git.url("taskboard")
    git.work({"a": os.urandom(3 << 20)})
    if action == "clone":
        assert git.push(url).code == 0
    commands = {"push": ("push", url, "main"), "clone": ("clone", url, "../copy")}
    plato.fault(**fault)
    failed = git.run(*commands[action], directory="work")
    assert failed.code != 0
    assert words in failed.err, failed.err
    plato.clear_faults()
    if fault["effect"] == "lost_answer":
        assert git.good("ls-remote", url) != ""
    elif action == "push":
        assert git.good("ls-remote", url) == ""
    assert git.run(*commands[action], directory="work").code == 0
    assert any(one["fault"] == fault["effect"] for one in plato.requests())


@pytest.mark.long
@pytest.mark.parametrize("effect", ["latency", "drip"])
def test_a_slow_answer_is_whole(git: Git, plato: LocalPlato, effect: str) -> None:
    url = git.url("taskboard")
    git.work({"a": b"1"})
    plato.fault(effect, path="*.git/*", seconds=0.1, times=-1)
    assert git.push(url).code == 0
    git.good("clone", "-q", url, "copy")
    assert (git.place / "copy/a").read_bytes() == b"1"


def test_no_credentials_in_any_record(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    git.work({"a": b"1"})
    assert git.push(url).code == 0
    assert git.run("ls-remote", url, HUB_WORD="wrong-word").code == 128
    record = json.dumps(plato.requests(), ensure_ascii=False)
    random_word = git.password[-16:]
    right = base64.b64encode(f"{git.user}:{git.password}".encode()).decode()
    assert random_word not in record
    assert right not in record
    assert "<credentials>" in record
    log = (plato.home / "server.log").read_text()
    assert random_word not in log
    assert right not in log
    for path in plato.repository("taskboard").rglob("*"):
        assert path.is_dir() or random_word.encode() not in path.read_bytes()


# ---------------------------------------------------------------------------
# inside VMs
# ---------------------------------------------------------------------------

STORE = "mkdir -p ~/w; printf %s {words} | base64 -d > ~/askpass; chmod 700 ~/askpass; "
ASKPASS = """#!/bin/sh
case $1 in User*) printf '%s\\n' {user} ;; *) printf '%s\\n' {password} ;; esac
"""


def askpass(git: Git) -> str:
    """Shell words that let git in a VM know the credentials."""
    text = ASKPASS.format(user=shlex.quote(git.user), password=shlex.quote(git.password))
    return STORE.format(words=base64.b64encode(text.encode()).decode()) + "export GIT_ASKPASS=~/askpass; "


@pytest.mark.long
def test_the_same_address_in_every_vm(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    git.work({"a": os.urandom(2 << 20)})
    assert git.push(url).code == 0
    sessions = [git.client.start()[0] for _ in range(2)]
    for session_id in sessions:
        result = git.client.execute(
            session_id, askpass(git) + f"git clone -q {url} ~/w/x && cat ~/w/x/a | sha1sum"
        )
        assert result["success"], result
        plain = git.client.execute(session_id, f"GIT_TERMINAL_PROMPT=0 git ls-remote {url}")
        assert "could not read Username" in plain["stderr"]
    command = (
        "cd ~/w/x; echo vm > b; git add b; git -c user.name=V -c user.email=v@v commit -qm vm; git push -q"
    )
    result = git.client.execute(sessions[0], askpass(git) + command)
    assert result["success"], result
    git.good("pull", "-q", url, "main", directory="work")
    assert (git.place / "work/b").read_text() == "vm\n"


def used(plato: LocalPlato) -> tuple[int, int]:
    """How many descriptors and threads the server has."""
    process = Path(f"/proc/{plato.information['pid']}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


@pytest.mark.long
def test_vms_leave_nothing_behind(git: Git, plato: LocalPlato) -> None:
    url = git.url("taskboard")
    git.client.call("GET", f"{GITEA}/simulators")

    def one_life(end: Callable[[str, dict[str, Any]], None]) -> None:
        session_id, job_id = git.client.start()
        # A client that keeps its connection open for as long as the VM lives.
        hold = f"exec 3<>/dev/tcp/127.0.0.1/{urlsplit(url).port}; sleep 1000"
        git.client.execute(session_id, f"setsid bash -c '{hold}' >/dev/null 2>&1 &")
        git.client.execute(session_id, askpass(git) + f"git ls-remote {url}")
        machine = next(one for one in plato.machines() if one["job_id"] == job_id)
        end(session_id, machine)
        plato.wait_for(
            lambda snapshot: all(
                job["status"] != "running" for session in snapshot["sessions"] for job in session["jobs"]
            )
        )

    def close(session_id: str, machine: dict[str, Any]) -> None:
        git.client.call("POST", f"/api/v2/sessions/{session_id}/close")

    def kill(session_id: str, machine: dict[str, Any]) -> None:
        os.kill(machine["pid"], 9)

    one_life(close)
    before = used(plato)
    for end in (close, kill, close, kill):
        one_life(end)
    eventually(lambda: used(plato) <= before)
