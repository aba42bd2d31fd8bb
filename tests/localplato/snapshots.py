"""Snapshots: a VM's files and the data of its Docker engine become an artifact, from which VMs are started.

Every process of the VM, those in containers too, is held still while its files are copied, so that the copy
is of one moment. The real service keeps the VM's memory as well; here the VM boots, and the containers that
ran are started again.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import Artifact, Catalogue
from .clock import Clock
from .engine import EngineError, copy_tree, running_containers
from .machine import Machine, MachineError, remove_tree

if TYPE_CHECKING:
    from .sessions import Job

# The directories of a VM that last; /run is new at every boot.
KEPT = ("home", "root", "tmp", "var-tmp")
KEPT_ACCOUNTS = ("passwd", "group", "shadow")


# ---------------------------------------------------------------------------
# taking one
# ---------------------------------------------------------------------------


def take(
    job: Job,
    machine: Machine,
    body: dict[str, Any],
    stored: dict[str, Any] | None,
    catalogue: Catalogue,
    now: str,
) -> Artifact:
    """Make an artifact of a running VM; `body` is a CreateCheckpointRequest, `stored` the dataset in it.

    Raises MachineError and EngineError.
    """
    identifier = str(uuid.uuid4())
    place = catalogue.begin(identifier)
    try:
        containers = copy(machine, place)
        artifact = replace(describe(job, body, stored, identifier, now), containers=containers)
        catalogue.finish(artifact, place)
    except OSError as error:
        raise MachineError(f"the VM could not be saved: {error}") from error
    finally:
        remove_tree(place)
    return artifact


def copy(machine: Machine, place: Path) -> dict[str, bool]:
    """Copy a VM's files and its engine's data; the containers that ran."""
    engine = machine.engine
    if engine is None or not engine.begun:
        with machine.frozen():
            copy_files(machine, place / "files")
        return {}
    # It may be about to start, and would not be among the processes that are held.
    engine.call("GET", "/version")
    with engine.lock, machine.frozen():
        copy_files(machine, place / "files")
        engine.save(place / "docker")
    return running_containers(place / "docker")


def copy_files(machine: Machine, target: Path) -> None:
    for name in KEPT:
        copy_tree(machine.directory / name, target / name)
    (target / "etc").mkdir()
    for name in KEPT_ACCOUNTS:
        content = (machine.directory / "etc" / name).read_bytes()
        (target / "etc" / name).write_bytes(content)


def describe(
    job: Job, body: dict[str, Any], stored: dict[str, Any] | None, identifier: str, now: str
) -> Artifact:
    """The artifact that a request asks for. What it leaves out is as in the one that the VM came from."""
    parent = job.artifact

    def given(name: str) -> Any:
        return body[name] if body[name] is not None else getattr(parent, name, None)

    return Artifact(
        artifact_id=identifier,
        simulator=body["override_service"] or job.simulator.partition(":")[0],
        dataset=body["override_dataset"] or job.dataset_name,
        version=body["override_version"] or identifier,
        compute=dict(job.compute),
        app_port=job.app_port if body["internal_app_port"] is None else body["internal_app_port"],
        description=body["description"] or "",
        status="creating",
        parent=parent.artifact_id if parent else None,
        session_id=job.session.session_id,
        job_id=job.job_id,
        snapshotted_at=body["snapshotted_at"] or now,
        expires_at=body["expires_at"],
        flows=given("flows"),
        plato_config=given("plato_config"),
        messaging_port=job.messaging_port if body["messaging_port"] is None else body["messaging_port"],
        target=given("target"),
        credentials=given("credentials"),
        mcp_config=given("mcp_config"),
        ui_available=body["ui_available"] is not False,
        additional_metadata=body["additional_metadata"],
        dataset_config=stored
        if body["plato_config"] is not None
        else getattr(parent, "dataset_config", None),
        kept=dict(job.kept),
    )


# ---------------------------------------------------------------------------
# starting from one
# ---------------------------------------------------------------------------


def start_containers(artifact: Artifact, machine: Machine) -> list[str]:
    """Start the containers that ran when the snapshot was taken; what went wrong."""
    problems: list[str] = []
    for container, paused in artifact.containers.items():
        try:
            if machine.engine is None:
                raise EngineError("the VM has no Docker engine for the containers of its artifact")
            machine.engine.call("POST", f"/containers/{container}/start")
            if paused:
                machine.engine.call("POST", f"/containers/{container}/pause")
        except EngineError as error:
            problems.append(str(error))
    return problems


# ---------------------------------------------------------------------------
# uploads
# ---------------------------------------------------------------------------


class Uploads:
    """The artifacts that are `creating`, which they are for `seconds`; then they are `ready`, or `failed`.

    The next `failures` artifacts fail. Call with the lock of the sessions held.
    """

    def __init__(self, clock: Clock, catalogue: Catalogue) -> None:
        self.clock = clock
        self.catalogue = catalogue
        self.seconds = 0.0
        self.failures = 0
        self.pending: dict[str, tuple[float, str]] = {}

    def begin(self, artifact: Artifact) -> None:
        status = "failed" if self.failures else "ready"
        self.failures -= 1 if self.failures > 0 else 0
        self.pending[artifact.artifact_id] = (self.clock.now() + self.seconds, status)

    def tick(self, now: float) -> tuple[float | None, bool]:
        """Finish what is due; when something will be due next, and whether anything has changed."""
        due = [identifier for identifier, (moment, _) in self.pending.items() if moment <= now]
        for identifier in due:
            self.catalogue.set_status(identifier, self.pending.pop(identifier)[1])
        following = min((moment for moment, _ in self.pending.values()), default=None)
        return following, bool(due)
