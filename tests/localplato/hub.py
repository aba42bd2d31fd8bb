"""The hub: the simulators that the key may use, and their Gitea repositories. `git_server.py` serves those.

Everything lies in one directory: `credentials.json`, `simulators.json` and `repositories/<owner>/<name>.git`,
bare and without hooks.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .endpoints import ApiError, Call, endpoint

OWNER = "local"
DEFAULT_BRANCH = "main"
ACCESS = ("write", "read", "none")
# What a client must be able to carry: everything but line ends, and a colon in the name, which Basic
# authentication forbids. A URL or a shell line that is put together carelessly breaks, or runs `id`.
# A random word follows each, so that nobody takes one Gitea's for another's.
USERNAME = "dev/ops@local %41#?&'\"\\ é+"
PASSWORD = "p:/@%25#?&='\"\\`id`$(id) ;ß雪+"
# What no configuration of the host or of its user may change.
GIT_SETTINGS = {
    "safe.directory": "*",
    "gc.auto": "0",
    "receive.autogc": "false",
    "core.hooksPath": os.devnull,
}


class HubError(Exception):
    """A repository could not be made; the message says why."""


@dataclass
class Simulator:
    """A simulator as Gitea knows it. Without `listed` the key does not see it; `access` is ours to it."""

    id: int
    name: str
    description: str = ""
    has_repo: bool = False
    repository: str = ""
    owner: str = OWNER
    access: str = "write"
    listed: bool = True


@dataclass
class Limits:
    """What the server refuses, in bytes; 0 is no limit. `body` is a request's, as a proxy sees it."""

    body: int = 0
    pack: int = 0
    file: int = 0


SEEDS = (
    Simulator(1, "espocrm", "EspoCRM", True, "espocrm"),
    Simulator(2, "docuseal", "DocuSeal", True, "docuseal"),
    Simulator(3, "taskboard", "The example of this repository"),
)


def git_environment(settings: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of the server's own git commands: nothing of the user's configuration, only ours."""
    chosen = {**GIT_SETTINGS, **(settings or {})}
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": str(len(chosen)),
    }
    for number, (name, value) in enumerate(chosen.items()):
        environment[f"GIT_CONFIG_KEY_{number}"] = name
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    return environment


def git_problem() -> str | None:
    """Why there are no repositories here, or None."""
    if shutil.which("git") is None:
        return "the git command is missing, so there are no repositories; install the package git"
    return None


class Hub:
    """The simulators and repositories of a data directory. `base_url` is where `git_server.py` answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repositories = directory / "repositories"
        self.base_url = ""
        self.limits = Limits()
        self.lock = threading.Lock()
        self.username = self.password = ""
        self.simulators: list[Simulator] = []

    def prepare(self) -> None:
        """Read what the directory holds, or begin with the seeds and new credentials."""
        self.directory.mkdir(parents=True, exist_ok=True)
        credentials = self.load("credentials.json")
        if credentials is None:
            credentials = {
                "username": USERNAME + secrets.token_hex(4),
                "password": PASSWORD + secrets.token_urlsafe(12),
            }
            self.save("credentials.json", credentials)
        self.username, self.password = credentials["username"], credentials["password"]
        known = self.load("simulators.json")
        self.simulators = [Simulator(**values) for values in known or [asdict(seed) for seed in SEEDS]]

    def load(self, name: str) -> Any:
        path = self.directory / name
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, name: str, value: Any) -> None:
        partial = self.directory / (name + ".new")
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with open(descriptor, "w") as file:
            json.dump(value, file, indent=1)
        partial.rename(self.directory / name)

    def save_simulators(self) -> None:
        self.save("simulators.json", [asdict(simulator) for simulator in self.simulators])

    def add(self, values: dict[str, Any]) -> Simulator:
        """Another simulator; `values` are fields of Simulator but id and repository. Raises ValueError."""
        unknown = sorted(
            set(values) - set(Simulator.__dataclass_fields__) | {"id", "repository"} & set(values)
        )
        if unknown or not values.get("name") or values.get("access", "write") not in ACCESS:
            raise ValueError(f"a simulator has a name, and not {unknown}; its access is one of {ACCESS}")
        with self.lock:
            simulator = Simulator(max(known.id for known in self.simulators) + 1, **values)
            self.simulators.append(simulator)
            if simulator.has_repo:
                simulator.repository = self.free_name(simulator)
            self.save_simulators()
        return simulator

    def learn(self, names: Iterable[str]) -> None:
        """Add a simulator, without a repository, for each name that is not known yet."""
        known = {simulator.name.lower() for simulator in self.simulators}
        for name in sorted({name for name in names if name and name.lower() not in known}):
            self.add({"name": name})

    def free_name(self, simulator: Simulator) -> str:
        """A name for a simulator's repository. Gitea tells names apart without regard to case."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", simulator.name).strip(".-") or "simulator"
        taken = {other.repository.lower() for other in self.simulators if other.owner == simulator.owner}
        return plain if plain.lower() not in taken else f"{plain}-{simulator.id}"

    def simulator(self, identifier: int) -> Simulator | None:
        """The simulator of that id that the key may see."""
        return next((one for one in self.simulators if one.id == identifier and one.listed), None)

    def create_repository(self, simulator: Simulator) -> None:
        """Give a simulator an empty repository."""
        with self.lock:
            simulator.repository = simulator.repository or self.free_name(simulator)
            simulator.has_repo = True
            self.save_simulators()
        self.repository(simulator)

    def find(self, owner: str, name: str) -> Simulator | None:
        """The simulator whose repository has that address."""
        for one in self.simulators:
            if one.has_repo and (one.owner.lower(), one.repository.lower()) == (owner.lower(), name.lower()):
                return one
        return None

    def repository(self, simulator: Simulator) -> Path:
        """The bare repository of a simulator, made when first asked for. Raises HubError."""
        path = self.repositories / simulator.owner / f"{simulator.repository}.git"
        with self.lock:
            if path.exists():
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".new")
            shutil.rmtree(partial, ignore_errors=True)
            command = ["git", "init", "-q", "--bare", "--template=", f"--initial-branch={DEFAULT_BRANCH}"]
            try:
                done = subprocess.run(
                    [*command, str(partial)], env=git_environment(), capture_output=True, text=True
                )
            except OSError as error:
                raise HubError(git_problem() or str(error)) from error
            if done.returncode != 0:
                raise HubError(f"git init failed: {done.stderr.strip()[-300:]}")
            partial.rename(path)
        return path

    def view(self) -> dict[str, Any]:
        """What the admin interface shows: addresses, limits, and where every repository lies."""
        with self.lock:
            simulators = [asdict(simulator) for simulator in self.simulators]
        for values in simulators:
            name = f"{values['repository']}.git"
            values["path"] = str(self.repositories / values["owner"] / name) if values["has_repo"] else None
        return {"base_url": self.base_url, "limits": asdict(self.limits), "simulators": simulators}

    def describe(self, simulator: Simulator) -> dict[str, Any]:
        """A repository as Gitea describes it."""
        full_name = f"{simulator.owner}/{simulator.repository}"
        path = self.repository(simulator)
        return {
            "id": simulator.id,
            "name": simulator.repository,
            "full_name": full_name,
            "description": simulator.description,
            "private": True,
            "fork": False,
            "html_url": f"{self.base_url}/{full_name}",
            "ssh_url": f"ssh://git@127.0.0.1/{full_name}.git",
            "clone_url": f"{self.base_url}/{full_name}.git",
            "default_branch": DEFAULT_BRANCH,
            "size": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) // 1024,
            "language": "",
        }


# ---------------------------------------------------------------------------
# endpoints
# ---------------------------------------------------------------------------


def listed(call: Call) -> tuple[Hub, Simulator]:
    """The simulator that the path names. Raises 404, and 422 for what is no number."""
    text = call.path["simulator_id"]
    if not re.fullmatch(r"-?\d+", text):
        problem = {
            "type": "int_parsing",
            "loc": ["path", "simulator_id"],
            "msg": "Input should be a valid integer, unable to parse string as an integer",
            "input": text,
        }
        raise ApiError(422, [problem])
    hub = hub_of(call)
    found = hub.simulator(int(text))
    if found is None:
        raise ApiError(404, "Simulator not found")
    return hub, found


def hub_of(call: Call) -> Hub:
    """Raises 503 where there are no repositories."""
    hub = call.hub
    if not isinstance(hub, Hub) or not hub.base_url:
        raise ApiError(503, git_problem() or "Gitea is not available")
    return hub


@endpoint("GET", "/api/v1/gitea/credentials")
def credentials(call: Call) -> dict[str, Any]:
    """The user name and password for every `clone_url`."""
    hub = hub_of(call)
    # Older clients want the last two as well.
    return {"username": hub.username, "password": hub.password, "org_name": OWNER, "is_admin": False}


@endpoint("GET", "/api/v1/gitea/simulators")
def simulators(call: Call) -> list[dict[str, Any]]:
    """Those that it began with, and those that the VMs of now are of: whoever runs one here may push it."""
    hub = hub_of(call)
    hub.learn(job.simulator for job in call.sessions.alive())
    return [
        {
            "id": one.id,
            "name": one.name,
            "description": one.description,
            "img_url": None,
            "organization_name": "Local",
            "gitea_repo_name": one.repository or None,
            "gitea_repo_owner": one.owner if one.has_repo else None,
            "has_repo": one.has_repo,
        }
        for one in hub.simulators
        if one.listed
    ]


@endpoint("GET", "/api/v1/gitea/simulators/{simulator_id}/repo")
def repository(call: Call) -> dict[str, Any]:
    """A simulator's repository, or that it has none."""
    hub, simulator = listed(call)
    if not simulator.has_repo:
        return {"has_repo": False, "simulator_name": simulator.name, "message": "No repository yet"}
    return {"has_repo": True, "simulator_name": simulator.name, **described(hub, simulator)}


@endpoint("POST", "/api/v1/gitea/simulators/{simulator_id}/repo")
def create_repository(call: Call) -> dict[str, Any]:
    """Make an empty repository; 409 when there is one."""
    hub, simulator = listed(call)
    if simulator.has_repo:
        raise ApiError(409, f"Simulator '{simulator.name}' already has a repository")
    hub.create_repository(simulator)
    return {**described(hub, simulator), "stars_count": 0, "forks_count": 0, "open_issues_count": 0}


def described(hub: Hub, simulator: Simulator) -> dict[str, Any]:
    try:
        return hub.describe(simulator)
    except HubError as error:
        raise ApiError(500, str(error)) from error
