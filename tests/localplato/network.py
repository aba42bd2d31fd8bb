"""connect_network: lets the gateway reach a session's VMs.

What a client sees of a VM that is not connected, and in the seconds until the gateway knows it, is the
gateway's part (`Gateway.carry`). Unknown, and chosen here: the status of a call that comes too early (409),
what happens on connections to a VM that was never connected (`unconnected`), and whether `execute` and
`add_ssh_key` need the network too (`network_for`).
"""

from __future__ import annotations

from typing import Any

from .endpoints import ApiError, Call, endpoint
from .sessions import Session


@endpoint("POST", "/api/v2/sessions/{session_id}/connect_network")
def connect_network(call: Call) -> dict[str, Any]:
    """Connect every VM of a session; again is fine. VMs here cannot reach each other, so a session of
    several gets a 501."""
    session = call.session(living=True)
    check_ready(session)
    if len(session.jobs) > 1:
        raise ApiError(501, "the local Plato has no network between VMs")
    sessions = call.sessions
    done_at = call.clock.now() + call.settings.connect_seconds
    if not all(job.known_at is not None for job in session.jobs):
        sessions.wait_for_clock(done_at, lambda: session.closed)
    call.session(living=True)
    check_ready(session)
    with sessions.lock:
        for job in session.jobs:
            if job.known_at is None:
                job.known_at = call.clock.now() + call.settings.gateway_seconds
                sessions.log(job, "connected to the network")
    return {
        "success": True,
        "session_id": session.session_id,
        "subnet": subnet(list(sessions.sessions).index(session.session_id)),
        "results": {job.job_id: True for job in session.jobs},
    }


def check_ready(session: Session) -> None:
    """Raises 410 when a VM is over, and 409 when one is not ready."""
    for job in session.jobs:
        if job.over:
            raise ApiError(410, f"Job is gone: {job.status} ({job.reason})")
        if not job.ready:
            raise ApiError(409, f"VM is not ready yet (status: {job.status})")


def subnet(number: int) -> str:
    """The addresses of a session's network."""
    return f"10.{200 + number // 256 % 50}.{number % 256}.0/24"
