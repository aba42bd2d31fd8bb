"""The local Plato's Docker engines, snapshots and artifacts, from outside."""

from __future__ import annotations

import http.cookiejar
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR, Desk, eventually, missing, part
from localplato.engine import engine_problem
from test_local_plato import BLANK, COMMAND, NOBODY, SESSIONS, Client, SshUser, Tunnel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localplato import LocalPlato

pytestmark = pytest.mark.timeout(900)  # the first test of all makes the images

ARTIFACTS = "/api/v2/artifacts"
TASKBOARD = {"type": "resource", "simulator": "taskboard", "sim_config": {"app_port": 8080}}
LONG_SECONDS = 300
HEALTHY = """
services:
  web:
    image: busybox
    command: sh -c 'mkdir -p /www && echo page > /www/index.html && exec httpd -f -p 80 -h /www'
    ports: ["8080:80"]
    healthcheck: {test: [CMD, wget, -q, -O, /dev/null, "http://127.0.0.1/"], interval: 1s, retries: 30}
"""


@pytest.fixture(scope="session")
def docker() -> None:
    """VMs have Docker engines here, and the images are made."""
    if os.geteuid() != 0:
        pytest.skip("VMs of an ordinary user have no Docker engine")
    problem = engine_problem()
    if problem is not None:
        missing(problem)
    words = [sys.executable, str(COMMAND), "images"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing(done.stderr.strip())


@pytest.fixture(scope="session")
def compose(docker: None) -> None:
    """Docker Compose is here too."""
    words = [part("docker", "docker.io"), "compose", "version"]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        missing("the Docker Compose plugin is not installed")


@pytest.fixture
def visitors(shared_plato: LocalPlato) -> Iterator[Client]:
    """A client of `shared_plato` whose sessions are closed with the test."""
    client = Closing(shared_plato)
    yield client
    client.close()


class Closing(Client):
    """A client that knows its sessions."""

    def __init__(self, plato: LocalPlato) -> None:
        super().__init__(plato)
        self.sessions: list[str] = []

    def make(self, *environments: dict[str, Any], wait: bool = True, **fields: Any) -> dict[str, Any]:
        answer = super().make(*environments, wait=wait, **{"heartbeat_timeout": 0, **fields})
        self.sessions.append(answer["session_id"])
        return answer

    def output(self, session_id: str, command: str) -> str:
        result = self.execute(session_id, command, timeout=LONG_SECONDS)
        assert result["success"], result
        return str(result["stdout"])

    def snapshot(self, session_id: str, **fields: Any) -> str:
        """The artifact of the session's one VM."""
        answer = self.call("POST", f"{SESSIONS}/{session_id}/snapshot", fields)
        (result,) = answer["results"].values()
        assert result["success"], result
        return str(result["artifact_id"])

    def again(self, artifact_id: str) -> str:
        """A session of a VM from an artifact that is ready, or about to be."""
        path = f"{ARTIFACTS}/{artifact_id}"
        eventually(lambda: self.call("GET", path)["status"] == "ready")
        return self.start({"type": "artifact", "artifact_id": artifact_id})[0]

    def url(self, session_id: str, port: int | None = None) -> str:
        query = "" if port is None else f"?port={port}"
        answer = self.call("GET", f"{SESSIONS}/{session_id}/public_url{query}")
        (result,) = answer["results"].values()
        return str(result["url"])

    def close(self) -> None:
        for session_id in self.sessions:
            self.call("POST", f"{SESSIONS}/{session_id}/close")


def read(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as response:
        return str(response.read().decode())


def programs(plato: LocalPlato, job_id: str) -> set[str]:
    """The names of what runs in a VM."""
    (machine,) = [machine for machine in plato.machines() if machine["job_id"] == job_id]
    return {Path(process["argv"][0]).name for process in machine["processes"]}


# ---------------------------------------------------------------------------
# an engine
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_an_engine_starts_when_it_is_used(docker: None, visitors: Closing) -> None:
    session_id, job_id = visitors.start()
    assert visitors.output(session_id, "stat -c '%U %G %a' /run/docker.sock") == "root plato 660\n"
    assert "dockerd" not in programs(visitors.plato, job_id)
    words = "docker image ls --format '{{.Repository}}:{{.Tag}}'"
    images = visitors.output(session_id, words).split()
    assert {"busybox:latest", "debian:bookworm-slim"} <= set(images)
    assert "dockerd" in programs(visitors.plato, job_id)
    assert visitors.output(session_id, "docker run --rm busybox echo hello") == "hello\n"
    assert visitors.output(session_id, "docker info --format '{{.Name}}'") == f"vm-{job_id[:8]}\n"


@pytest.mark.long
def test_both_users_have_it_over_ssh_and_by_execute(docker: None, visitors: Closing, ssh_place: Path) -> None:
    session_id, job_id = visitors.connect()
    user = SshUser(visitors.plato, job_id, ssh_place)
    visitors.output(session_id, "docker run -d --name one busybox sleep 1000")
    for name in ("root", "plato"):
        body = {"public_key": user.public_key, "username": name}
        assert visitors.call("POST", f"{SESSIONS}/{session_id}/add_ssh_key", body)["success"]
        told = user.run(f"{name}@vm", "id -un; docker ps --format '{{.Names}}'")
        assert told.stdout.decode() == f"{name}\none\n", told
    made = user.run(
        "plato@vm", "docker run -i --rm -v /home/plato/worktree:/mine busybox sh -c 'echo x > /mine/made'"
    )
    assert made.returncode == 0, made.stderr
    assert visitors.output(session_id, "cat /home/plato/worktree/made") == "x\n"


@pytest.mark.long
def test_images_are_made_once(
    docker: None,
    new_plato: Callable[..., LocalPlato],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PLATO_LOCAL_IMAGES", "busybox")
    words = [sys.executable, str(COMMAND), "images"]
    makers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    (place,) = {maker.communicate()[0].strip() for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    made = Path(place, "made.json").stat()
    client = Closing(new_plato())
    session_id, _ = client.start()
    assert client.output(session_id, "docker image ls --format '{{.Repository}}'") == "busybox\n"
    assert client.output(session_id, "docker run --rm busybox sh -c 'id -un; ls /'").startswith("root\nbin\n")
    assert Path(place, "made.json").stat() == made
    assert sorted(path.name for path in Path(place).parent.iterdir()) == sorted([Path(place).name, "lock"])


@pytest.mark.long
def test_compose_builds_runs_and_becomes_healthy(compose: None, visitors: Closing) -> None:
    session_id, job_id = visitors.connect(TASKBOARD)
    visitors.output(session_id, f"mkdir app; cd app; printf %s {shlex.quote(HEALTHY)} > docker-compose.yml")
    for user, home in (("plato", "/home/plato"), ("root", "/root")):
        script = "cd /tmp/app && docker compose up -d --wait && docker compose ps --format '{{.Health}}'"
        visitors.output(session_id, "rm -rf /tmp/app; cp -r /root/app /tmp; chmod -R a+rX /tmp/app")
        words = f"setpriv --reuid={user} --regid={user} --init-groups env HOME={home}"
        assert visitors.output(session_id, f"{words} sh -c {shlex.quote(script)}") == "healthy\n"
    assert read(visitors.url(session_id)) == "page\n"
    assert read(visitors.url(session_id, 8080)) == "page\n"
    with Tunnel(visitors.plato, f"{job_id}--8080.localhost") as tunnel:
        tunnel.send(b"GET / HTTP/1.0\r\n\r\n")
        assert tunnel.receive_all().endswith(b"\r\n\r\npage\n")


@pytest.mark.long
def test_vms_share_no_container_network_or_change_of_an_image(docker: None, visitors: Closing) -> None:
    first, second = (visitors.start()[0] for _ in range(2))
    before = Path("/proc/net/dev").read_text().count(":")
    change = (
        "docker run --name same -p 80:80 -v /data busybox sh -c 'echo changed > /etc/passwd; cat /etc/passwd'"
    )
    assert visitors.output(first, change) == "changed\n"
    assert visitors.output(second, "docker ps -aq") == ""
    assert visitors.output(second, "docker run --name same busybox cat /etc/passwd").startswith("root:")
    assert visitors.output(first, "docker run --rm busybox cat /etc/passwd").startswith("root:")
    visitors.output(
        first, "docker rm -fv same; docker rmi busybox debian:bookworm-slim; docker system prune -af"
    )
    assert visitors.output(first, "docker image ls -q") == ""
    assert visitors.output(second, "docker run --rm busybox echo still").endswith("still\n")
    assert Path("/proc/net/dev").read_text().count(":") == before


@pytest.mark.long
def test_an_engine_that_ended_starts_again(docker: None, visitors: Closing) -> None:
    session_id, _ = visitors.start()
    visitors.output(session_id, "docker run -d --name one --restart unless-stopped busybox sleep 1000")
    visitors.output(session_id, "kill $(cat /run/docker.pid); while pidof dockerd; do sleep 0.05; done")
    names = "docker ps --format '{{.Names}}'"
    assert visitors.output(session_id, f"until {names} | grep one; do sleep 0.1; done") == "one\n"


@pytest.mark.long
def test_an_engine_that_cannot_run_refuses_its_clients(docker: None, visitors: Closing) -> None:
    session_id, _ = visitors.start()
    visitors.output(session_id, "mkdir /run/docker.pid")
    for _ in range(2):
        refused = visitors.execute(session_id, "docker ps", timeout=60)
        assert (refused["exit_code"], refused["timed_out"]) == (1, False)
        assert "error during connect" in refused["stderr"]
    visitors.output(session_id, "rmdir /run/docker.pid")
    visitors.output(session_id, "docker ps")


def remains(job_id: str) -> list[str]:
    """Processes and cgroups of this host that belong to a VM's engine."""
    # Not Path.rglob, which fails where a cgroup goes while it looks.
    places = [place for place, _, _ in os.walk("/sys/fs/cgroup")]
    found = [place for place in places if job_id in os.path.basename(place)]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_text() + (process / "cgroup").read_text()
        except OSError:
            continue
        if job_id in text:
            found.append(f"{process} {text}")
    return found


@pytest.mark.long
@pytest.mark.parametrize("ending", ["close", "lifetime", "killed VM", "stop", "kill"])
def test_nothing_of_an_engine_is_left(docker: None, plato: LocalPlato, ending: str) -> None:
    mounts, devices = Path("/proc/self/mounts").read_text(), Path("/proc/net/dev").read_text().count(":")
    client = Closing(plato)
    session_id, job_id = client.start(timeout=3600)
    client.output(
        session_id, "docker network create net; docker run -d --net net -p 80:80 -v /v busybox sleep 1000"
    )
    client.output(session_id, "docker pause $(docker run -d busybox sleep 1000)")
    assert len(remains(job_id)) > 3
    (machine,) = plato.machines()
    if ending == "close":
        client.close()
    elif ending == "lifetime":
        plato.advance(3601)
    elif ending == "killed VM":
        os.kill(machine["pid"], 9)
    else:
        getattr(plato, ending)()
    eventually(lambda: not remains(job_id))
    assert Path("/proc/self/mounts").read_text() == mounts
    assert Path("/proc/net/dev").read_text().count(":") == devices
    if ending != "kill":
        eventually(lambda: not Path(machine["directory"]).exists())


@pytest.mark.long
def test_vms_without_an_engine_or_without_docker(new_plato: Callable[..., LocalPlato]) -> None:
    part("docker", "docker.io")
    for wish, code, words in (
        ("off", 1, "Cannot connect to the Docker daemon"),
        ("absent", 127, "not found"),
    ):
        client = Client(new_plato(docker=wish))
        session_id, _ = client.start()
        refused = client.execute(session_id, "docker ps")
        assert refused["exit_code"] == code, refused
        assert words in refused["stderr"]
        assert client.output(session_id, "command -v env") == "/usr/bin/env\n"
        status = subprocess.run(
            [sys.executable, str(COMMAND), "--home", str(client.plato.home), "status"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Docker in VMs:   off: asked for\n" in status.stdout


# ---------------------------------------------------------------------------
# the example simulator
# ---------------------------------------------------------------------------


class Browser:
    """Forms, a cookie and the token of the last page."""

    def __init__(self, url: str) -> None:
        self.url = url
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), jar)
        self.page = ""

    def open(self, path: str, **form: str) -> str:
        token = re.search(r'name="csrf_token" value="([^"]*)"', self.page)
        fields = {**form, "csrf_token": token.group(1)} if token and form else form
        data = urllib.parse.urlencode(fields).encode() if fields else None
        with self.opener.open(self.url + path, data, timeout=20) as response:
            self.page = response.read().decode()
        return self.page

    def log_in(self) -> str:
        self.open("/login")
        return self.open("/login", email="admin@example.com", password="demo-password")


@pytest.mark.long
def test_the_example_simulator_from_its_build_to_a_vm_of_its_snapshot(
    compose: None, visitor: Desk, visitors: Closing
) -> None:
    work = visitor.work
    shutil.copytree(SIMULATOR, work, dirs_exist_ok=True)
    visitor.good("start", "-c")
    visitor.good("sync")
    place = "cd /home/plato/worktree/taskboard && docker compose"
    up = visitor.ssh(f"{place} up -d --build --wait")
    assert up.code == 0, up.err
    state = visitor.state
    browser = Browser(visitors.url(state["session_id"]))
    assert "Ada Admin" in browser.log_in()
    (form,) = set(re.findall(r'action="(/projects/1/tasks)"', browser.page))
    assert "Kept by the snapshot" in browser.open(form, title="Kept by the snapshot")
    artifact = visitors.snapshot(
        state["session_id"],
        flows=(work / "flows.yml").read_text(),
        plato_config=yaml.safe_dump(
            yaml.safe_load((work / "plato-config.yml").read_text())["datasets"]["base"]
        ),
    )
    visitor.good("stop")
    session_id = visitors.again(artifact)
    url = visitors.url(session_id)
    eventually(lambda: answers(f"{url}/health"), 60)
    again = Browser(url)
    assert "Kept by the snapshot" in again.log_in()
    assert (
        visitors.output(session_id, f"{place} up -d --wait --build >/dev/null 2>&1 && {place} ps -q | wc -l")
        == "2\n"
    )


def answers(url: str) -> bool:
    try:
        return bool(read(url))
    except OSError:
        return False


# ---------------------------------------------------------------------------
# snapshots
# ---------------------------------------------------------------------------

KEEPING = """
mkdir -p /home/plato/code/deep && cd /home/plato/code
echo text > 'a name' && ln -s 'a name' link && ln 'a name' other && chmod 640 'a name'
truncate -s 5000000 sparse && mkfifo pipe && chmod 700 deep && touch deep/.hidden && echo secret > /root/note
"""
LOOK = """
cd /home/plato/code && ls -A . deep && cat link /root/note && stat -c '%n %a %h %s %F' 'a name' sparse pipe
"""
SEEN = [
    *(".:", "a name", "deep", "link", "other", "pipe", "sparse", "", "deep:", ".hidden", "text", "secret"),
    *("a name 640 2 5 regular file", "sparse 644 1 5000000 regular file", "pipe 644 1 0 fifo"),
]


@pytest.mark.long
def test_a_vm_of_a_snapshot_has_its_files(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    client.output(session_id, KEEPING)
    artifact = client.snapshot(session_id)
    client.output(session_id, "rm -r /home/plato/code")  # what comes later is not in it
    second = client.again(artifact)
    assert client.output(second, LOOK).splitlines() == SEEN
    # From the one that was started from it, and still of the first.
    third = client.again(client.snapshot(second))
    assert client.output(third, LOOK).splitlines() == SEEN


@pytest.mark.long
def test_what_of_a_vm_lasts(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    client.output(session_id, "for place in /tmp /var/tmp /run /dev/shm; do echo here > $place/kept; done")
    artifact = client.snapshot(session_id)
    client.again(artifact)
    second, job_id = client.sessions[-1], client.details(client.sessions[-1])["job_id"]
    assert client.execute(second, "ls /tmp/kept /var/tmp/kept /run/kept /dev/shm/kept")["stdout"].split() == [
        *("/tmp/kept", "/var/tmp/kept")
    ]
    name = f"vm-{job_id[:8]}"
    assert client.output(second, "hostname; cat /etc/hostname").split() == [name, name]
    owner = "plato" if os.geteuid() == 0 else "root"  # an ordinary user's VM has one user
    assert client.output(second, "stat -c %U /home/plato /root").split() == [owner, "root"]


COUNTER = """
cat > /tmp/count.sh <<'END'
n=0
while :; do n=$((n + 1)); echo $n > /home/count; echo $n > /var/tmp/count; done
END
head -c 30000000 /dev/zero > /root/large
setsid sh /tmp/count.sh >/dev/null 2>&1 &
setsid sleep 1000 >/dev/null 2>&1 & echo $! > /run/stopped
until [ "$(tr '\\0' ' ' < /proc/$!/cmdline)" = "sleep 1000 " ]; do :; done; kill -STOP $!
until grep -q '^State:.T' /proc/$!/status; do :; done
until [ -s /var/tmp/count ]; do :; done
"""


def test_a_snapshot_is_of_one_moment_and_the_vm_goes_on(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    client.output(session_id, COUNTER)
    artifact = client.snapshot(session_id)
    state = "cut -d' ' -f3 /proc/$(cat /run/stopped)/stat"
    assert client.output(session_id, state) == "T\n"
    now = int(client.output(session_id, "cat /var/tmp/count") or 0)
    more = f"until [ $(cat /var/tmp/count || echo 0) -gt {now} ]; do :; done 2>/dev/null; echo more"
    assert client.output(session_id, more) == "more\n"
    again = client.again(artifact)
    # /home is copied before a large file, /var/tmp after it.
    counts = client.output(again, "cat /home/count /var/tmp/count").split()
    assert len(counts) < 2 or int(counts[0]) - int(counts[1]) in (0, 1), counts


@pytest.mark.long
def test_a_snapshot_keeps_images_volumes_and_containers(docker: None, visitors: Closing) -> None:
    session_id, _ = visitors.start()
    visitors.output(
        session_id,
        "mkdir b && printf 'FROM busybox\\nRUN echo built > /built\\n' > b/Dockerfile && "
        "docker build -q -t mine b && "
        "docker run --name done mine sh -c 'echo kept > /kept; rm /etc/group' && "
        "docker run -d --name runs -v keep:/keep mine sh -c 'cat /built >> /keep/log; exec httpd -f' && "
        "docker pause $(docker run -d --name paused mine sleep 1000)",
    )
    artifact = visitors.snapshot(session_id)
    names = "docker ps -a --format '{{.Names}} {{.State}}' | sort"
    assert visitors.output(session_id, names) == "done exited\npaused paused\nruns running\n"
    visitors.close()
    again = visitors.again(artifact)
    assert visitors.output(again, names) == "done exited\npaused paused\nruns running\n"
    assert visitors.output(again, "docker cp done:/kept - | tar xO") == "kept\n"
    changes = visitors.output(again, "docker diff done").splitlines()
    assert sorted(changes) == ["A /kept", "C /etc", "D /etc/group"]
    log = "docker run --rm -v keep:/keep mine cat /keep/log"
    assert visitors.output(again, log) == "built\nbuilt\n"  # once in each of the two VMs
    visitors.output(again, "docker rm -f runs paused done && docker rmi mine && docker volume rm keep")
    # The artifact is as it was.
    assert visitors.output(visitors.again(artifact), names).endswith("runs running\n")


FLOWS = "flows:\n- name: login\n  steps:\n  - type: wait\n    duration: 5\n- name: empty\n"
CONFIG = """\
compute: {cpus: 2}
metadata: {name: Shop, colour: red}
listeners:
  db:
    {type: db, db_type: postgresql, db_database: shop, db_user: keeper, db_port: 5432, colour: red}
  cache: {type: db, db_type: redis, db_database: "0"}
  files: {type: file, target_dir: /data}
"""
BODY: dict[str, Any] = {
    "description": "before the sale",
    "override_service": "market",
    "override_version": "1.2.3",
    "override_dataset": "full",
    "flows": FLOWS,
    "plato_config": CONFIG,
    "internal_app_port": 3000,
    "messaging_port": 7001,
    "credentials": {"roles": {"admin": [{"type": "email", "text": "a@example.com"}]}},
    "mcp_config": {"port": 9000},
    "ui_available": False,
    "target": "market.web.plato.so",
    "snapshotted_at": "2024-05-01T10:00:00Z",
    "additional_metadata": {"any": ["thing", None, 1.5]},
}


def test_what_an_artifact_says(visitors: Closing) -> None:
    session_id, job_id = visitors.start()
    plain = visitors.call("GET", f"{ARTIFACTS}/{visitors.snapshot(session_id)}")
    expected = {
        "simulator_name": "shop",
        "dataset": "base",
        "parent_artifact_id": None,
        "internal_app_port": 8080,
        "has_flows": False,
        "has_plato_config": False,
        "source_session_id": session_id,
        "source_job_id": job_id,
        "ui_available": True,
    }
    assert {name: plain[name] for name in expected} == expected
    artifact = visitors.snapshot(session_id, **BODY)
    told = visitors.call("GET", f"{ARTIFACTS}/{artifact}")
    assert told["credentials"]["roles"] == BODY["credentials"]["roles"]
    names = ("description", "target", "messaging_port", "internal_app_port", "ui_available")
    for name in (*names, "snapshotted_at", "additional_metadata"):
        assert told[name] == BODY[name], name
    assert (told["simulator_name"], told["dataset"]) == ("market", "full")
    assert (told["has_flows"], told["has_plato_config"]) == (True, True)
    assert told["mcp"]["port"] == 9000
    assert told["mcp_sources"] == {"enabled": "default", "port": "artifact", "path": "default"}
    sold = visitors.call("GET", f"/api/v1/simulator/{artifact}/flows")
    assert sold == {"data": {"flows": FLOWS}}
    config = visitors.call("GET", f"/api/v1/simulator/{artifact}/plato_config")
    assert config == {"artifact_id": artifact, "plato_config": CONFIG}
    eventually(lambda: visitors.call("GET", f"{ARTIFACTS}/{artifact}")["status"] == "ready")
    made = visitors.make({"type": "simulator", "simulator": "market", "version": "1.2.3"})
    assert made["envs"][0]["artifact_id"] == artifact
    again = made["envs"][0]["job_id"]
    flows = visitors.call("GET", f"/api/v2/jobs/{again}/flows")
    assert flows == [
        {"name": "login", "steps": [{"type": "wait", "duration": 5}]},
        {"name": "empty"},
    ]
    stored = yaml.safe_load(CONFIG)
    assert visitors.call("GET", f"/api/v2/jobs/{again}/plato_config") == stored
    assert job_of(visitors, again)["dataset"] == stored
    database = {
        "db_type": "postgresql",
        "db_port": 5432,
        "db_user": "keeper",
        "db_password": "",
        "db_database": "shop",
        "db_schema": None,
    }
    cache = {**database, "db_type": "redis", "db_port": 0, "db_user": "", "db_database": "0"}
    assert visitors.call("GET", f"/api/v1/simulator/{artifact}/db_config") == [database, cache]
    # What a snapshot of that VM does not say is as it was.
    child = visitors.call("GET", f"{ARTIFACTS}/{visitors.snapshot(made['session_id'])}")
    assert (child["parent_artifact_id"], child["simulator_name"], child["dataset"]) == (
        artifact,
        "market",
        "full",
    )
    for name in ("target", "messaging_port", "internal_app_port", "has_flows", "has_plato_config"):
        assert child[name] == told[name], name
    grandchild = visitors.again(child["artifact_id"])
    job_id = visitors.details(grandchild)["job_id"]
    assert visitors.call("GET", f"/api/v2/jobs/{job_id}/plato_config") == stored


def job_of(client: Client, job_id: str) -> dict[str, Any]:
    """A job as the server's admin interface shows it."""
    jobs = [job for session in client.plato.sessions() for job in session["jobs"]]
    (found,) = [job for job in jobs if job["job_id"] == job_id]
    return dict(found)


WRONG_CONFIGS = {
    "the whole file": "service: shop\ndatasets:\n  base: {compute: {}, metadata: {}}\n",
    "both": "datasets: {}\ncompute: {}\nmetadata: {}\n",
    "no dataset": "service: shop\n",
    "a list": "- compute: {}\n",
    "nothing": "",
    "no YAML": "compute: [",
    "a wrong listener": "compute: {}\nlisteners:\n  db: {type: db, db_type: oracle, db_database: x}\n",
}


@pytest.mark.sampled
@pytest.mark.parametrize("text", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_config_that_is_not_one_dataset_is_not_found_again(visitors: Closing, text: str) -> None:
    session_id, _ = visitors.start()
    artifact = visitors.snapshot(session_id, plato_config=text)
    assert visitors.call("GET", f"{ARTIFACTS}/{artifact}")["has_plato_config"] is True
    config = visitors.call("GET", f"/api/v1/simulator/{artifact}/plato_config")
    assert config == {"artifact_id": artifact, "plato_config": text}
    visitors.call("GET", f"/api/v1/simulator/{artifact}/db_config", status=404)
    job_id = visitors.details(visitors.again(artifact))["job_id"]
    visitors.call("GET", f"/api/v2/jobs/{job_id}/plato_config", status=404)
    assert job_of(visitors, job_id)["dataset"] is None


def test_a_config_that_is_not_one_dataset_can_be_refused(new_plato: Callable[..., LocalPlato]) -> None:
    client = Closing(new_plato(wrong_config=422))
    session_id, _ = client.start()
    for text in WRONG_CONFIGS.values():
        refused = client.call("POST", f"{SESSIONS}/{session_id}/snapshot", {"plato_config": text}, status=422)
        assert {tuple(problem["loc"][:2]) for problem in refused["detail"]} == {("body", "plato_config")}
    client.snapshot(session_id, plato_config=CONFIG)
    client.snapshot(session_id)


def test_a_config_with_anchors_is_as_yaml_has_it(visitors: Closing) -> None:
    text = "compute: &one {cpus: 2}\nmetadata: {<<: {name: Shop}}\nlisteners: {}\nservices:\nextra: *one\n"
    session_id = visitors.again(visitors.snapshot(visitors.start()[0], plato_config=text))
    job_id = visitors.details(session_id)["job_id"]
    assert visitors.call("GET", f"/api/v2/jobs/{job_id}/plato_config") == yaml.safe_load(text)


def test_a_prefetch_is_taken(visitors: Closing, new_plato: Callable[..., LocalPlato]) -> None:
    path = "/api/v1/cluster/prefetch"
    done = visitors.call("POST", path, {"artifact_id": "art_abc123"})
    assert (done["success"], done["total_instances"]) == (True, len(done["instances_notified"]))
    visitors.call("POST", path, {"artifact_id": NOBODY}, status=404)
    visitors.call("POST", path, {"artifact_id": 5}, status=422)


@pytest.mark.long
def test_a_version_is_found_with_its_dataset(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    version = "3f2a91c"
    made = {
        dataset: client.snapshot(session_id, override_version=version, override_dataset=dataset)
        for dataset in ("base", "full")
    }
    for artifact in made.values():
        client.again(artifact)
    wanted = {"type": "simulator", "simulator": "shop", "version": version}
    for dataset, artifact in made.items():
        (found,) = client.make({**wanted, "dataset": dataset})["envs"]
        assert found["artifact_id"] == artifact
    (unknown,) = client.make({**wanted, "dataset": "huge"})["envs"]
    assert "dataset 'huge'" in unknown["error"]


def test_artifacts_and_flows_that_are_not_there(visitors: Closing) -> None:
    _, job_id = visitors.start()
    for path in (
        f"{ARTIFACTS}/{NOBODY}",
        f"{ARTIFACTS}/..%2Ftags.json",
        f"/api/v1/simulator/{NOBODY}/flows",
        f"/api/v1/simulator/{NOBODY}/plato_config",
        f"/api/v1/simulator/{NOBODY}/db_config",
        "/api/v1/simulator/art_abc123/db_config",
        "/api/v1/simulator/art_abc123/flows",
        f"/api/v2/jobs/{job_id}/flows",
        f"/api/v2/jobs/{job_id}/plato_config",
        f"/api/v2/jobs/{NOBODY}/flows",
    ):
        assert visitors.call("GET", path, status=404)["detail"]
    visitors.call("POST", f"{SESSIONS}/{NOBODY}/snapshot", {}, status=404)
    assert visitors.call("GET", f"{ARTIFACTS}/art_abc123")["simulator_name"] == "espocrm"
    config = visitors.call("GET", "/api/v1/simulator/art_abc123/plato_config")
    assert config == {"artifact_id": "art_abc123", "plato_config": None}


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({"description": 1, "ui_available": "perhaps"}, {"description", "ui_available"}),
        ({"internal_app_port": "web", "expires_at": "soon"}, {"internal_app_port", "expires_at"}),
        ({"credentials": {}, "mcp_config": {"port": 0}}, {"credentials.roles", "mcp_config.port"}),
        ({"flows": ["x"], "plato_config": {}}, {"flows", "plato_config"}),
    ],
)
def test_wrong_snapshot_requests(visitors: Closing, body: dict[str, Any], places: set[str]) -> None:
    session_id, _ = visitors.start()
    answer = visitors.call("POST", f"{SESSIONS}/{session_id}/snapshot", body, status=422)
    assert {".".join(map(str, problem["loc"][1:])) for problem in answer["detail"]} == places


def test_stored_flows_that_are_no_yaml(visitors: Closing) -> None:
    session_id, _ = visitors.start()
    artifact = visitors.snapshot(session_id, flows="flows: [")
    second = visitors.again(artifact)
    job_id = visitors.details(second)["job_id"]
    assert "flows" in visitors.call("GET", f"/api/v2/jobs/{job_id}/flows", status=500)["detail"]


@pytest.mark.long
def test_an_artifact_is_being_uploaded_for_a_while(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(upload_seconds=60, speed=0.001)
    client = Closing(plato)
    session_id, _ = client.start()
    first, second = client.snapshot(session_id), client.snapshot(session_id)
    plato.fault("upload_failure", times=1)
    third = client.snapshot(session_id)

    def statuses() -> list[str]:
        return [client.call("GET", f"{ARTIFACTS}/{name}")["status"] for name in (first, second, third)]

    def start(artifact: str) -> dict[str, Any]:
        made: dict[str, Any] = client.make({"type": "artifact", "artifact_id": artifact})
        return dict(made["envs"][0])

    assert statuses() == ["creating", "creating", "creating"]
    assert "not ready (status: creating)" in start(first)["error"]
    plato.advance(59)
    assert statuses() == ["creating", "creating", "creating"]
    plato.advance(2)
    assert statuses() == ["ready", "ready", "failed"]
    assert "not ready (status: failed)" in start(third)["error"]
    assert start(first)["success"]
    # All of it is on this disk, so an upload that the server's end has cut short is done.
    fourth = client.snapshot(session_id)
    plato.stop()
    plato.start()
    assert client.call("GET", f"{ARTIFACTS}/{fourth}")["status"] == "ready"
    assert {entry["artifact_id"] for entry in plato.artifacts()} > {first, second, third, fourth}


def test_artifacts_expire_by_the_clock(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    seconds = 3600
    expires = client.call("GET", f"{SESSIONS}/{session_id}")["created_at"]
    later = re.sub(r"^\d{4}", lambda year: str(int(year.group()) + 1), expires)
    artifact = client.snapshot(session_id, expires_at=later)
    plato.advance(seconds)
    assert client.call("GET", f"{ARTIFACTS}/{artifact}")["artifact_id"] == artifact
    plato.advance(367 * 24 * seconds)
    assert "expired" in client.call("GET", f"{ARTIFACTS}/{artifact}", status=404)["detail"]


def test_tags_name_artifacts(plato: LocalPlato) -> None:
    client = Closing(plato)
    artifact = client.snapshot(client.start()[0])
    unknown = client.make({"type": "simulator", "simulator": "shop"})["envs"][0]
    assert "tag 'latest'" in unknown["error"]
    plato.tag("shop", "latest", artifact)
    for name in ("shop", "shop:latest", f"shop:{artifact}"):
        made = client.make({"type": "simulator", "simulator": name})["envs"][0]
        assert made["artifact_id"] == artifact, made


def test_snapshots_that_fail_and_sessions_of_two_vms(plato: LocalPlato) -> None:
    client = Closing(plato)
    made = client.make(BLANK, {**BLANK, "simulator": "mail"})
    path = f"{SESSIONS}/{made['session_id']}/snapshot"
    plato.fault("snapshot_failure", reason="no space left", times=1)
    results = client.call("POST", path, {})["results"]
    assert set(results) == {env["job_id"] for env in made["envs"]}
    assert sorted(result["success"] for result in results.values()) == [False, True]
    (failed,) = [result for result in results.values() if not result["success"]]
    assert failed["error"] == "no space left"
    assert failed.get("artifact_id") is None
    artifacts = [result["artifact_id"] for result in client.call("POST", path, {})["results"].values()]
    simulators = {client.call("GET", f"{ARTIFACTS}/{name}")["simulator_name"] for name in artifacts}
    assert simulators == {"shop", "mail"}
    os.kill(plato.machines()[0]["pid"], 9)
    plato.wait_for(lambda now: "failed" in [job["status"] for job in now["sessions"][0]["jobs"]])
    errors = [result.get("error") for result in client.call("POST", path, {})["results"].values()]
    assert sorted(map(str, errors)) == ["None", "VM is not running (status: failed)"]
    client.close()
    client.call("POST", path, {}, status=410)
    assert not list((plato.home / "artifacts" / "making").glob("*"))


KILLER = """
import os, pathlib, sys
making, pid = pathlib.Path(sys.argv[1]), int(sys.argv[2])
while not list(making.glob("*/files/home/many/1*")):
    pass
os.kill(pid, 9)
"""


@pytest.mark.long
def test_a_vm_that_ends_during_its_snapshot(plato: LocalPlato) -> None:
    client = Closing(plato)
    session_id, _ = client.start()
    client.output(session_id, "mkdir /home/many; cd /home/many; seq 30000 | xargs touch")
    pid = plato.machines()[0]["pid"]
    making = plato.home / "artifacts" / "making"
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(making), str(pid)])
    (result,) = client.call("POST", f"{SESSIONS}/{session_id}/snapshot", {})["results"].values()
    assert killer.wait(60) == 0
    assert not list(making.glob("*"))
    # Either all of it was there in time, or there is no artifact.
    assert result["success"] == (result.get("artifact_id") is not None)
    if not result["success"]:
        assert "Snapshot failed" in result["error"]
        assert len(plato.artifacts()) == 5
