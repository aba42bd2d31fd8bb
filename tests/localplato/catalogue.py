"""What can be started besides blank VMs: simulators, their tags, and artifacts (recorded files of a VM)."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from .accounts import PLATO_UID
from .clock import Clock
from .engine import copy_tree
from .machine import remove_tree

DEFAULT_TAG = "latest"
DEFAULT_DATASET = "base"
NAMESPACE = uuid.UUID("5b1f1d0e-6f2c-4d6e-9a55-0c6e8a1f7d20")


class UnknownArtifactError(Exception):
    """There is no such simulator, tag or artifact; the message names what is missing."""


@dataclass(frozen=True)
class Artifact:
    """A recorded VM. `compute` has cpus, memory (MB) and disk (MB).

    `plato_config` is a text, and `dataset_config` the dataset that it holds, which becomes a job's `dataset`;
    `kept` is a job's `kept`; `containers` are as `engine.running_containers` gives them.
    """

    artifact_id: str
    simulator: str
    dataset: str
    version: str
    compute: dict[str, int]
    app_port: int
    description: str = ""
    status: str = "ready"  # or "creating" or "failed"
    parent: str | None = None
    session_id: str | None = None
    job_id: str | None = None
    snapshotted_at: str | None = None
    expires_at: str | None = None
    flows: str | None = None
    plato_config: str | None = None
    messaging_port: int | None = None
    target: str | None = None
    credentials: dict[str, Any] | None = None
    mcp_config: dict[str, Any] | None = None
    ui_available: bool = True
    additional_metadata: dict[str, Any] | None = None
    dataset_config: dict[str, Any] | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    containers: dict[str, bool] = field(default_factory=dict)


def seeded(simulator: str, version: str, app_port: int, artifact_id: str = "") -> Artifact:
    """An artifact that every data directory has from the start, always under the same id."""
    identifier = artifact_id or str(uuid.uuid5(NAMESPACE, f"{simulator}:{version}"))
    compute = {"cpus": 2, "memory": 2048, "disk": 10240}
    return Artifact(
        identifier, simulator, DEFAULT_DATASET, version, compute, app_port, f"{simulator} {version}"
    )


SEEDS = (
    seeded("espocrm", "1.2.0", 80),
    seeded("espocrm", "1.1.0", 80),
    seeded("espocrm", "1.3.0-rc1", 80),
    seeded("docuseal", "2.0.0", 3000),
    seeded("espocrm", "0.9.0", 80, artifact_id="art_abc123"),
)
SEEDED_TAGS = {
    "espocrm": {"latest": SEEDS[0], "prod-latest": SEEDS[1], "staging": SEEDS[2]},
    "docuseal": {"latest": SEEDS[3], "prod-latest": SEEDS[3]},
}


class Catalogue:
    """The artifacts in a directory, and `tags.json`.

    Each has `<id>/artifact.json`, and `<id>/files.tar` (a seed) or `<id>/files` and `<id>/docker` (a
    snapshot).
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        self.clock = clock
        self.lock = threading.Lock()

    def prepare(self) -> None:
        """Write the seeds, unless the directory has them. The rest of an upload is done: it is all here."""
        remove_tree(self.directory / "making")
        for path in self.directory.glob("*/artifact.json"):
            if json.loads(path.read_text()).get("status") == "creating":
                self.set_status(path.parent.name, "ready")
        if (self.directory / "tags.json").exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for artifact in SEEDS:
            self.add(artifact, seed_files(artifact))
        tags = {
            name: {tag: a.artifact_id for tag, a in tagged.items()} for name, tagged in SEEDED_TAGS.items()
        }
        self.write_tags(tags)

    def add(self, artifact: Artifact, files: bytes) -> None:
        """Record an artifact and the tar archive of its VM's files (`home/...` and `root/...`)."""
        directory = self.directory / artifact.artifact_id
        directory.mkdir()
        (directory / "files.tar").write_bytes(files)
        (directory / "artifact.json").write_text(json.dumps(asdict(artifact), indent=1))

    def begin(self, artifact_id: str) -> Path:
        """An empty directory for the files of a new artifact."""
        place = self.directory / "making" / artifact_id
        place.mkdir(parents=True)
        return place

    def finish(self, artifact: Artifact, place: Path) -> None:
        """Record a new artifact with what has been put into its directory."""
        (place / "artifact.json").write_text(json.dumps(asdict(artifact), indent=1))
        place.rename(self.directory / artifact.artifact_id)

    def set_status(self, artifact_id: str, status: str) -> None:
        path = self.directory / artifact_id / "artifact.json"
        values = json.loads(path.read_text())
        partial = path.with_suffix(".new")
        partial.write_text(json.dumps({**values, "status": status}, indent=1))
        partial.rename(path)

    def write_tags(self, tags: dict[str, dict[str, str]]) -> None:
        partial = self.directory / "tags.json.new"
        partial.write_text(json.dumps(tags, indent=1))
        partial.rename(self.directory / "tags.json")

    def tags(self) -> dict[str, dict[str, str]]:
        """Artifact ids by simulator and tag."""
        tags: dict[str, dict[str, str]] = json.loads((self.directory / "tags.json").read_text())
        return tags

    def artifact(self, artifact_id: str) -> Artifact:
        """The artifact of that id, unless its time is over. Raises UnknownArtifactError."""
        path = self.directory / artifact_id / "artifact.json"
        if "/" in artifact_id or artifact_id.startswith(".") or not path.is_file():
            raise UnknownArtifactError(f"Artifact '{artifact_id}' not found")
        artifact = Artifact(**json.loads(path.read_text()))
        if artifact.expires_at is not None and moment(artifact.expires_at) <= moment(self.clock.timestamp()):
            raise UnknownArtifactError(f"Artifact '{artifact_id}' has expired")
        return artifact

    def ready(self, artifact_id: str) -> Artifact:
        """The artifact of that id, to start from. Raises UnknownArtifactError."""
        artifact = self.artifact(artifact_id)
        if artifact.status != "ready":
            raise UnknownArtifactError(f"Artifact '{artifact_id}' is not ready (status: {artifact.status})")
        return artifact

    def artifacts(self) -> list[Artifact]:
        """All that can be had, the seeds and then the snapshots, oldest first."""
        found: list[Artifact] = []
        for path in self.directory.glob("*/artifact.json"):
            with contextlib.suppress(UnknownArtifactError):
                found.append(self.artifact(path.parent.name))
        return sorted(found, key=lambda artifact: (artifact.snapshotted_at or "", artifact.artifact_id))

    def find(self, simulator: str, tag: str | None, version: str | None, dataset: str | None) -> Artifact:
        """The artifact that a simulator's tag or version names. Raises UnknownArtifactError."""
        name, _, tag_in_name = simulator.partition(":")
        tags = self.tags().get(name, {})
        known = [a for a in self.artifacts() if a.simulator == name]
        if not tags and not known:
            raise UnknownArtifactError(f"Simulator '{name}' not found")
        if version:
            of_version = [a for a in known if a.version == version]
            if not of_version:
                raise UnknownArtifactError(f"Simulator '{name}' has no version '{version}'")
            matching = [a for a in of_version if a.dataset == dataset] or of_version
            found = self.ready(matching[-1].artifact_id)
        else:
            wanted = tag_in_name or tag or DEFAULT_TAG
            by_id = {a.artifact_id: a.artifact_id for a in known}
            if wanted not in {**by_id, **tags}:
                raise UnknownArtifactError(f"No artifact of simulator '{name}' has the tag '{wanted}'")
            found = self.ready({**by_id, **tags}[wanted])
        if dataset and dataset != found.dataset:
            raise UnknownArtifactError(
                f"Simulator '{name}' has no dataset '{dataset}' (it has '{found.dataset}')"
            )
        return found

    def extract(self, artifact: Artifact, directory: Path) -> None:
        """Put an artifact's files into the directory of a new VM."""
        place = self.directory / artifact.artifact_id
        if (place / "files").is_dir():
            copy_tree(place / "files", directory)
            return
        with tarfile.open(place / "files.tar") as archive:
            archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
            archive.extractall(directory, numeric_owner=True)  # noqa: S202 - written by this class


def moment(text: str) -> datetime:
    """A time of ISO 8601; without a zone it is UTC."""
    value = datetime.fromisoformat(re.sub(r"Z$", "+00:00", text))
    return value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)


def seed_files(artifact: Artifact) -> bytes:
    """The files of a seeded artifact: the worktree of its simulator, as user plato has it."""
    worktree = f"home/plato/worktree/{artifact.simulator}"
    image = f"{artifact.simulator}:{artifact.version}"
    compose = f"services:\n  app:\n    image: {image}\n    ports: ['{artifact.app_port}:80']\n"
    files = {
        f"{worktree}/docker-compose.yml": compose,
        f"{worktree}/VERSION": artifact.version + "\n",
    }
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("home/plato/worktree", worktree):
            entry = plato_entry(name, 0o755)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, text in files.items():
            entry = plato_entry(name, 0o644)
            entry.size = len(text.encode())
            archive.addfile(entry, BytesIO(text.encode()))
    return buffer.getvalue()


def plato_entry(name: str, mode: int) -> tarfile.TarInfo:
    """An entry of an archive that belongs to the user plato."""
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid, entry.mtime = mode, PLATO_UID, PLATO_UID, int(time.time())
    return entry
