"""The admin interface under `/_local/`: looks at the server, moves its clock and scripts its faults.

It needs no key, and is for tests and for the command `local_plato.py`. A GET with `after=N&wait=S` answers
when the server's version is beyond N, or after S seconds.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Callable

from . import faults, gateway
from .machine import BOOT_LIMIT_SECONDS, MachineError
from .sessions import BootFault, Job, WorkerFault

if TYPE_CHECKING:
    from .server import Service

MAXIMUM_WAIT_SECONDS = 60.0
AdminAnswer = tuple[int, Any]


def answer(service: Service, method: str, path: str, query: str, body: bytes) -> AdminAnswer:
    """Status and value of a request. Raises ValueError and TypeError for a wrong one."""
    handlers: dict[tuple[str, str], Callable[[Service, Any], AdminAnswer]] = {
        ("GET", "/_local/status"): get_status,
        ("GET", "/_local/requests"): get_requests,
        ("GET", "/_local/sessions"): get_sessions,
        ("GET", "/_local/machines"): get_machines,
        ("GET", "/_local/unknown_fields"): get_unknown_fields,
        ("GET", "/_local/gateway"): get_gateway,
        ("GET", "/_local/artifacts"): get_artifacts,
        ("POST", "/_local/tags"): post_tag,
        ("GET", "/_local/snapshot"): get_snapshot,
        ("GET", "/_local/hub"): get_hub,
        ("POST", "/_local/hub"): post_hub,
        ("POST", "/_local/hub/simulators"): post_simulator,
        ("GET", "/_local/faults"): get_faults,
        ("POST", "/_local/faults"): post_fault,
        ("DELETE", "/_local/faults"): delete_faults,
        ("POST", "/_local/advance"): post_advance,
        ("POST", "/_local/shutdown"): post_shutdown,
    }
    handler = handlers.get((method, path))
    if handler is None:
        return 404, {"detail": f"the admin interface has no {method} {path}"}
    if method == "GET":
        parameters = dict(urllib.parse.parse_qsl(query))
        wait_for_change(service, parameters)
        return handler(service, parameters)
    return handler(service, json.loads(body) if body else {})


def wait_for_change(service: Service, parameters: dict[str, str]) -> None:
    after, seconds = parameters.get("after"), parameters.get("wait")
    if after is not None and seconds is not None:
        known = int(after)
        limit = min(float(seconds), MAXIMUM_WAIT_SECONDS)
        service.sessions.wait_until(lambda: service.sessions.version > known, limit)


# ---------------------------------------------------------------------------
# looking
# ---------------------------------------------------------------------------


def get_status(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    return 200, {
        "version": service.sessions.version,
        "pid": os.getpid(),
        "clock": service.sessions.clock.now(),
        "requests": service.request_count,
        "alive": [job.job_id for job in service.sessions.alive()],
        "settings": vars(service.settings),
    }


def get_requests(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """All that are kept, or those after the one with the number `since`."""
    since = int(parameters.get("since", 0))
    with service.sessions.lock:
        return 200, {
            "version": service.sessions.version,
            "requests": [dict(entry) for entry in service.requests if entry["number"] > since],
        }


def job_view(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "alias": job.alias,
        "simulator": job.simulator,
        "kind": job.kind,
        "artifact_id": job.artifact.artifact_id if job.artifact else None,
        "compute": job.compute,
        "status": job.status,
        "reason": job.reason,
        "ready": job.ready,
        "app_port": job.app_port,
        "dataset": job.dataset,
        "worker": job.worker.view() if job.worker is not None else None,
        "last_beat": job.last_beat,
    }


def session_views(service: Service) -> list[dict[str, Any]]:
    return [
        {
            "session_id": session.session_id,
            "closed": session.closed,
            "lifetime": session.lifetime,
            "heartbeat_timeout": session.heartbeat_timeout,
            "jobs": [job_view(job) for job in session.jobs],
        }
        for session in service.sessions.sessions.values()
    ]


def get_sessions(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    with service.sessions.lock:
        return 200, {"version": service.sessions.version, "sessions": session_views(service)}


def get_machines(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """Every VM: its job, the host's pid of its PID 1, its directory and its processes."""
    with service.sessions.lock:
        version = service.sessions.version
        jobs = [job for job in service.sessions.jobs.values() if job.machine is not None]
    return 200, {"version": version, "machines": [machine_view(job) for job in jobs]}


def machine_view(job: Job) -> dict[str, Any]:
    machine = job.machine
    assert machine is not None
    processes: list[dict[str, Any]] = []
    try:
        processes = machine.processes()
    except MachineError:
        pass
    return {
        "job_id": job.job_id,
        "pid": machine.pid,
        "alive": machine.alive,
        "directory": str(machine.directory),
        "processes": processes,
    }


def get_unknown_fields(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    with service.sessions.lock:
        return 200, {"version": service.sessions.version, "unknown_fields": list(service.unknown_fields)}


def get_gateway(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """The newest connections of the gateway: server name, bytes and what went wrong."""
    door = service.gateway
    if door is None:
        return 200, {"version": service.sessions.version, "open": 0, "connections": []}
    with door.lock:
        entries = [dict(entry) for entry in door.log]
        return 200, {"version": service.sessions.version, "open": len(door.open), "connections": entries}


def get_artifacts(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """Every artifact, and the tags by simulator."""
    catalogue = service.sessions.catalogue
    with service.sessions.lock:
        return 200, {
            "version": service.sessions.version,
            "artifacts": [asdict(artifact) for artifact in catalogue.artifacts()],
            "tags": catalogue.tags(),
        }


def get_snapshot(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """Sessions, requests and unknown fields of one moment."""
    with service.sessions.lock:
        return 200, {
            "version": service.sessions.version,
            "clock": service.sessions.clock.now(),
            "sessions": session_views(service),
            "requests": [dict(entry) for entry in service.requests],
            "unknown_fields": list(service.unknown_fields),
        }


def get_hub(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    """Gitea's simulators with the places of their repositories, and the limits in force."""
    return 200, {"version": service.sessions.version, **service.hub.view()}


def get_faults(service: Service, parameters: dict[str, str]) -> AdminAnswer:
    return 200, {"version": service.sessions.version, "faults": service.faults.listing()}


# ---------------------------------------------------------------------------
# changing
# ---------------------------------------------------------------------------


def post_fault(service: Service, values: dict[str, Any]) -> AdminAnswer:
    """Script a rule of `faults.Fault`, or one for VMs or for the gateway.

    VMs: `boot_failure` (`reason`), `never_ready`; `snapshot_failure` (`reason`) of a snapshot's next jobs,
    and `upload_failure` of the artifacts of the next ones. Workers: `worker_failure` (`reason`),
    `worker_never`, both with `bad_gateway` for a 502 among `errors` instead of an `error`. Gateway:
    `gateway_down`, `gateway_reset` (`after_bytes`).
    """
    effect = values.get("effect")
    times = int(values.get("times", 1))
    if effect == "boot_failure":
        service.sessions.boot_fault = BootFault(str(values.get("reason", "VM failed to boot")), times)
    elif effect == "never_ready":
        service.sessions.boot_fault = BootFault(None, times)
    elif effect == "snapshot_failure":
        reason = str(values.get("reason", "VM could not be paused"))
        service.sessions.snapshot_fault = BootFault(reason, times)
    elif effect == "upload_failure":
        service.sessions.uploads.failures = times
    elif effect in ("worker_failure", "worker_never"):
        said = None if effect == "worker_never" else str(values.get("reason", "The worker failed to start"))
        service.sessions.worker_fault = WorkerFault(said, times, bool(values.get("bad_gateway", False)))
    elif effect in ("gateway_down", "gateway_reset"):
        if service.gateway is None:
            raise ValueError("there is no gateway")
        kind = "down" if effect == "gateway_down" else "reset"
        service.gateway.fault = gateway.Fault(kind, int(values.get("after_bytes", 0)), times)
    else:
        service.faults.add(faults.fault_from(values))
    return 200, {"effect": effect}


def delete_faults(service: Service, values: dict[str, Any]) -> AdminAnswer:
    service.faults.clear()
    service.sessions.boot_fault = service.sessions.snapshot_fault = None
    service.sessions.uploads.failures = 0
    service.sessions.worker_fault = None
    if service.gateway is not None:
        service.gateway.fault = None
    return 200, {}


def post_hub(service: Service, values: dict[str, Any]) -> AdminAnswer:
    """Set limits of Gitea, the fields of `hub.Limits`, in bytes."""
    service.hub.limits = replace(service.hub.limits, **{name: int(value) for name, value in values.items()})
    return get_hub(service, {})


def post_simulator(service: Service, values: dict[str, Any]) -> AdminAnswer:
    """Add a simulator: fields of `hub.Simulator`."""
    return 200, asdict(service.hub.add(values))


def post_tag(service: Service, values: dict[str, Any]) -> AdminAnswer:
    """Give `tag` of `simulator` to the artifact `artifact_id`."""
    catalogue = service.sessions.catalogue
    with service.sessions.lock:
        tags = catalogue.tags()
        tags.setdefault(str(values["simulator"]), {})[str(values["tag"])] = str(values["artifact_id"])
        catalogue.write_tags(tags)
        service.sessions.touch()
    return 200, {}


def post_advance(service: Service, values: dict[str, Any]) -> AdminAnswer:
    """Move the clock on by `seconds`; what is due then has happened when the answer comes."""
    service.sessions.clock.advance(float(values["seconds"]))
    service.sessions.tick()
    service.sessions.wait_until(service.sessions.booted, BOOT_LIMIT_SECONDS)
    with service.sessions.lock:
        service.sessions.touch()
        return 200, {"version": service.sessions.version, "clock": service.sessions.clock.now()}


def post_shutdown(service: Service, values: dict[str, Any]) -> AdminAnswer:
    service.request_stop()
    return 200, {}
