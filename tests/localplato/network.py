"""connect_network: makes a session's VMs reachable over the network."""

from __future__ import annotations

from typing import Any

from .endpoints import ApiError, Call, endpoint


@endpoint("POST", "/api/v2/sessions/{session_id}/connect_network")
def connect_network(call: Call) -> dict[str, Any]:
    """Success for a session of one VM: the gateway reaches every VM from its boot on, and a network of one
    has nobody else to reach. VMs here cannot reach each other, so a session of several gets a 501."""
    session = call.session(living=True)
    for job in session.jobs:
        if job.over:
            raise ApiError(410, f"Job is gone: {job.status} ({job.reason})")
        if not job.ready:
            raise ApiError(409, f"VM is not ready yet (status: {job.status})")
    if len(session.jobs) > 1:
        raise ApiError(501, "the local Plato has no network between VMs")
    results = {job.job_id: {"success": True} for job in session.jobs}
    return {"success": True, "session_id": session.session_id, "results": results}
