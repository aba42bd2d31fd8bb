"""The endpoints of snapshots and artifacts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import snapshots
from .catalogue import Artifact, UnknownArtifactError
from .contract import Report, Type
from .endpoints import ApiError, Call, endpoint, for_each_job
from .engine import EngineError
from .machine import MachineError
from .sessions import Job

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ARCHIVE_TYPE = "snapshot-store"
DATASET = Type("model", name="StoredSimConfigDataset")
DATASET_KEYS = {"compute", "metadata", "services", "listeners"}
INSTANCE = "worker-local-0"
MCP_DEFAULTS = {"enabled": False, "port": 3000, "path": "/mcp"}


def artifact_named(call: Call) -> Artifact:
    """The artifact that the path names. Raises 404."""
    try:
        return call.sessions.catalogue.artifact(call.path["artifact_id"])
    except UnknownArtifactError as error:
        raise ApiError(404, str(error)) from error


@endpoint("POST", "/api/v2/sessions/{session_id}/snapshot")
def snapshot(call: Call) -> dict[str, Any]:
    """Make an artifact of every VM of the session. It exists when the answer comes; its upload goes on."""
    session = call.session(living=True)
    stored = stored_dataset(call)
    if session.jobs and all(job.over for job in session.jobs):
        raise ApiError(410, f"Job is gone: {session.jobs[0].status} ({session.jobs[0].reason})")

    def snapshot_job(job: Job) -> dict[str, Any]:
        reason = call.sessions.take_snapshot_fault()
        machine = call.sessions.machine(job.job_id)
        if machine is None:
            reason = f"VM is not running (status: {job.status})"
        if reason is not None or machine is None:
            return {"success": False, "error": reason}
        sessions, now = call.sessions, call.clock.timestamp()
        try:
            artifact = snapshots.take(job, machine, call.body, stored, sessions.catalogue, now)
        except (MachineError, EngineError) as error:
            return {"success": False, "error": f"Snapshot failed: {error}"}
        with sessions.lock:
            sessions.uploads.begin(artifact)
            sessions.log(job, f"snapshot {artifact.artifact_id}")
        return {"success": True, "artifact_id": artifact.artifact_id, "error": None}

    return {"results": for_each_job(session, snapshot_job)}


def stored_dataset(call: Call) -> dict[str, Any] | None:
    """The dataset in the `plato_config` of a snapshot, or None when there is none or it is none.

    Real servers store one dataset, flat: the keys of a StoredSimConfigDataset. What they make of anything
    else is unknown. Here the text is stored, nothing in it is ever found again, and a setting makes it a 422.
    """
    text = call.body["plato_config"]
    if text is None:
        return None
    try:
        value = parsed(text, "plato_config")
    except ApiError:
        value = None
    report = Report()
    call.contract.check(DATASET, value, ("body", "plato_config"), report)
    flat = isinstance(value, dict) and "datasets" not in value and not DATASET_KEYS.isdisjoint(value)
    if flat and not report.problems:
        return dict(value)
    if call.settings.wrong_config != 200:
        report.problem("value_error", ("body", "plato_config"), "Input should be one dataset", text)
        raise ApiError(call.settings.wrong_config, report.problems)
    return None


@endpoint("GET", "/api/v2/artifacts/{artifact_id}")
def artifact_info(call: Call) -> dict[str, Any]:
    artifact = artifact_named(call)
    mcp = {name: value for name, value in (artifact.mcp_config or {}).items() if value is not None}
    return {
        "artifact_id": artifact.artifact_id,
        "simulator_name": artifact.simulator,
        "dataset": artifact.dataset,
        "status": artifact.status,
        "archive_type": ARCHIVE_TYPE,
        "parent_artifact_id": artifact.parent,
        "description": artifact.description,
        "disk_manifest_id": f"disk-{artifact.artifact_id}" if artifact.status == "ready" else None,
        "snapshotted_at": artifact.snapshotted_at,
        "credentials": artifact.credentials,
        "mcp_config": artifact.mcp_config,
        "mcp": {name: mcp.get(name, default) for name, default in MCP_DEFAULTS.items()},
        "mcp_sources": {name: "artifact" if name in mcp else "default" for name in MCP_DEFAULTS},
        "ui_available": artifact.ui_available,
        "target": artifact.target,
        "internal_app_port": artifact.app_port,
        "messaging_port": artifact.messaging_port,
        "has_flows": artifact.flows is not None,
        "has_plato_config": artifact.plato_config is not None,
        "source_session_id": artifact.session_id,
        "source_job_id": artifact.job_id,
        "additional_metadata": artifact.additional_metadata,
    }


# ---------------------------------------------------------------------------
# the files that an artifact was made with
# ---------------------------------------------------------------------------


def parsed(text: str, name: str) -> Any:
    """The value of a YAML text. Raises 500.

    The standard library has no YAML, so this uses the product's reader; the tests compare it with PyYAML.
    """
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    import plato_sandbox

    try:
        return plato_sandbox.yaml_load(text)
    except plato_sandbox.SandboxError as error:
        raise ApiError(500, f"The stored {name} cannot be read: {error}") from error


@endpoint("GET", "/api/v1/simulator/{artifact_id}/flows")
def artifact_flows(call: Call) -> dict[str, Any]:
    """The text of the flows file."""
    artifact = artifact_named(call)
    if artifact.flows is None:
        raise ApiError(404, "Artifact has no flows")
    return {"data": {"flows": artifact.flows}}


@endpoint("GET", "/api/v1/simulator/{artifact_id}/plato_config")
def artifact_config(call: Call) -> dict[str, Any]:
    """The text that was stored, one dataset, or null."""
    artifact = artifact_named(call)
    return {"artifact_id": artifact.artifact_id, "plato_config": artifact.plato_config}


@endpoint("GET", "/api/v1/simulator/{artifact_id}/db_config")
def database_config(call: Call) -> list[dict[str, Any]]:
    """How to reach the databases of the listeners in the stored dataset. Unknown: what it says of a listener
    that leaves something out; here it is the empty value."""
    dataset = artifact_named(call).dataset_config
    if dataset is None:
        raise ApiError(404, "Artifact has no plato config")
    return [
        {
            "db_type": listener["db_type"],
            "db_port": listener.get("db_port") or 0,
            "db_user": listener.get("db_user") or "",
            "db_password": listener.get("db_password") or "",
            "db_database": listener["db_database"],
            "db_schema": listener.get("db_schema"),
        }
        for listener in (dataset.get("listeners") or {}).values()
        if listener.get("type", "db") == "db"
    ]


@endpoint("GET", "/api/v2/jobs/{job_id}/flows")
def job_flows(call: Call) -> Any:
    """The flows of the artifact that the VM came from."""
    artifact = call.job().artifact
    if artifact is None or artifact.flows is None:
        raise ApiError(404, "No flows found for this job")
    value = parsed(artifact.flows, "flows file")
    flows = value.get("flows") if isinstance(value, dict) else value
    if not isinstance(flows, list):
        raise ApiError(500, "The stored flows file has no list of flows")
    return flows


@endpoint("GET", "/api/v2/jobs/{job_id}/plato_config")
def job_config(call: Call) -> Any:
    """The dataset that is stored with the artifact that the VM came from."""
    artifact = call.job().artifact
    if artifact is None or artifact.dataset_config is None:
        raise ApiError(404, "No plato config found for this job")
    return artifact.dataset_config


@endpoint("POST", "/api/v1/cluster/prefetch")
def prefetch(call: Call) -> dict[str, Any]:
    """Nothing is to be fetched here: every artifact is on this disk, and there is one worker instance."""
    identifier = call.body["artifact_id"]
    if identifier is None:
        raise ApiError(501, "the local Plato fetches by artifact_id only")
    try:
        call.sessions.catalogue.artifact(identifier)
    except UnknownArtifactError as error:
        raise ApiError(404, str(error)) from error
    return {
        "success": True,
        "message": f"Artifact {identifier} is being fetched",
        "instances_notified": [INSTANCE],
        "total_instances": 1,
    }
