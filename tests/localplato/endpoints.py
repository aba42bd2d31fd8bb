"""The endpoints of sessions, jobs and the v1 sandbox: what each does with a checked request.

A function is bound to its endpoint by `@endpoint`. What the contract lists and nothing is bound to is a 501.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable

from . import ssh
from .accounts import ACCOUNTS
from .clock import Clock
from .machine import MachineError
from .public_url import Door
from .sessions import WORKER_MISSING, Job, Session, Sessions

MAXIMUM_POLL_SECONDS = 300.0
PAGE_LIMIT = 500
DEFAULT_EXECUTE_SECONDS = 30
# No client since SDK 2.7 calls these. The server has them only with the setting `old_clients`.
OLD_ENDPOINTS = (
    ("POST", "/api/v1/sandbox/public-build/vm/{public_id}/setup-sandbox"),
    ("POST", "/api/v1/sandbox/public-build/vm/{public_id}/setup-root-access"),
)


class ApiError(Exception):
    """An answer that is an error: status and detail."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


@dataclass
class Settings:
    """What can be set when the server starts, besides its directory."""

    boot_seconds: float = 2.0
    heartbeat_seconds: float = 120.0
    upload_seconds: float = 2.0
    speed: float = 1.0
    idle_minutes: float = 120.0
    gateway_host: str = "localhost"
    not_ready_status: int = 200
    isolation: str = "auto"
    hub_scheme: str = "http"
    docker: str = "auto"
    worker_seconds: float = 5.0
    connect_seconds: float = 0.0
    gateway_seconds: float = 1.5
    unconnected: str = "silent"
    network_for: str = "gateway"
    reset_without_worker: int = 200
    wrong_config: int = 200
    old_clients: bool = False


@dataclass
class Call:
    """One checked request: the parameters of its path and query, its body with defaults filled in and `raw`.

    `hub` is the server's `hub.Hub`, `contract` its `contract.Contract`.
    """

    sessions: Sessions
    clock: Clock
    settings: Settings
    path: dict[str, str]
    query: dict[str, Any]
    body: dict[str, Any]
    raw: Any = None
    hub: Any = None
    contract: Any = None

    def session(self, living: bool = False) -> Session:
        """The session that the path names. Raises 404, and 410 for a closed one that should be living."""
        found = self.sessions.sessions.get(self.path["session_id"])
        if found is None:
            raise ApiError(404, "Session not found")
        if living and found.closed:
            raise ApiError(410, "Session is closed")
        return found

    def job(self, name: str = "job_id") -> Job:
        """The job that the path names. Raises 404."""
        found = self.sessions.jobs.get(self.path[name])
        if found is None or self.path.get("session_id") not in (None, found.session.session_id):
            raise ApiError(404, "Job not found")
        return found

    def running_job(self, name: str) -> Job:
        """The job that the path names, with a VM. Raises 404, 409 while it boots and 410 when it is over."""
        found = self.job(name)
        if found.over:
            raise ApiError(410, f"Job is gone: {found.status} ({found.reason})")
        if self.sessions.machine(found.job_id) is None:
            raise ApiError(409, f"VM is not running yet (status: {found.status})")
        return found


Handler = Callable[[Call], Any]
HANDLERS: dict[tuple[str, str], Handler] = {}


def endpoint(method: str, path: str) -> Callable[[Handler], Handler]:
    """Bind a function to an endpoint of the contract."""

    def bind(handler: Handler) -> Handler:
        HANDLERS[method, path] = handler
        return handler

    return bind


def for_each_job(session: Session, work: Callable[[Job], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Work done on every job of a session at the same time: results by job id."""
    if not session.jobs:
        return {}
    with ThreadPoolExecutor(max_workers=len(session.jobs)) as pool:
        return dict(zip([job.job_id for job in session.jobs], pool.map(work, session.jobs)))


# ---------------------------------------------------------------------------
# starting, waiting, looking
# ---------------------------------------------------------------------------


@endpoint("POST", "/api/v2/sessions/make")
def make(call: Call) -> dict[str, Any]:
    """Make a session; with `wait` the answer comes when it is ready, or has failed, or the time is over."""
    if not call.body["envs"]:
        raise ApiError(400, "At least one environment is required")
    session = call.sessions.make(call.body)
    answer: dict[str, Any] = {
        "session_id": session.session_id,
        "envs": session.environments,
        "context": context(session),
    }
    if call.query["wait"]:
        limit = call.query["wait_timeout"]
        call.sessions.wait_until(lambda: settled(session), min(limit if limit is not None else 300, 3600))
        answer.update(ready=is_ready(session), results=readiness(session))
    return answer


def context(session: Session) -> dict[str, Any]:
    """The session's VMs as a SessionContext."""
    environments = [
        {
            "job_id": job.job_id,
            "alias": job.alias,
            "artifact_id": job.artifact.artifact_id if job.artifact else None,
            "simulator": job.simulator,
            "is_desktop": job.provider == "qemu",
            "provider": job.provider,
        }
        for job in session.jobs
    ]
    return {"session_id": session.session_id, "envs": environments}


def is_ready(session: Session) -> bool:
    return bool(session.jobs) and all(job.ready for job in session.jobs)


def has_failed(session: Session) -> bool:
    return not session.jobs or any(job.over for job in session.jobs)


def settled(session: Session) -> bool:
    return session.closed or is_ready(session) or has_failed(session)


def readiness(session: Session) -> dict[str, Any]:
    """A WaitForReadyResult for every job."""
    return {
        job.job_id: {
            "ready": job.ready,
            "job_id": job.job_id,
            "status": job.status,
            "provider": job.provider,
            "error": job.reason if job.over else None,
        }
        for job in session.jobs
    }


@endpoint("GET", "/api/v2/sessions/{session_id}/wait_for_ready")
def wait_for_ready(call: Call) -> dict[str, Any]:
    """A long poll of at most `timeout` real seconds."""
    session = call.session(living=True)
    limit = call.query["timeout"]
    call.sessions.wait_until(
        lambda: settled(session), min(10 if limit is None else limit, MAXIMUM_POLL_SECONDS)
    )
    call.session(living=True)
    ready, failed = is_ready(session), has_failed(session)
    if not ready and not failed and call.settings.not_ready_status != 200:
        raise ApiError(call.settings.not_ready_status, "Session is not ready yet")
    status = "ready" if ready else "failed" if failed else "pending"
    answer = {
        "ready": ready,
        "status": status,
        "session_id": session.session_id,
        "results": readiness(session),
    }
    return {**answer, "context": context(session)} if ready else answer


@endpoint("GET", "/api/v2/sessions/{session_id}")
def details(call: Call) -> dict[str, Any]:
    session = call.session()
    jobs = [
        {
            "job_id": job.job_id,
            "public_id": job.job_id,
            "status": job.status,
            "status_reason": job.reason,
            "service": job.simulator,
            "alias": job.alias,
            "created_at": job.created_at,
        }
        for job in session.jobs
    ]
    return {
        "session_id": session.session_id,
        "created_at": session.created_at,
        "updated_at": session.updated_at,
        "jobs": jobs,
    }


@endpoint("GET", "/api/v2/sessions")
def list_sessions(call: Call) -> dict[str, Any]:
    """One page of the sessions, newest first; `statuses` is a comma-separated list of job statuses."""
    page, size = max(1, call.query["page"] or 1), min(max(1, call.query["page_size"] or 50), PAGE_LIMIT)
    wanted = set((call.query["statuses"] or "").split(",")) - {""}
    sessions = [
        session
        for session in reversed(list(call.sessions.sessions.values()))
        if not wanted or any(job.status in wanted for job in session.jobs)
    ]
    shown = [
        {
            "session_id": session.session_id,
            "created_at": session.created_at,
            "updated_at": session.updated_at,
            "source": session.source,
            "status": "closed" if session.closed else "open",
            "jobs": [job_info(job) for job in session.jobs],
        }
        for session in sessions[(page - 1) * size : page * size]
    ]
    return {"sessions": shown, "page": page, "page_size": size, "total": len(sessions)}


def job_info(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "alias": job.alias,
        "simulator": job.simulator,
        "status": job.status,
        "status_reason": job.reason,
    }


@endpoint("GET", "/api/v2/sessions/{session_id}/jobs")
def list_jobs(call: Call) -> dict[str, Any]:
    session = call.session()
    return {"session_id": session.session_id, "jobs": [job_info(job) for job in session.jobs]}


@endpoint("GET", "/api/v2/sessions/{session_id}/jobs/{job_id}/logs")
def job_logs(call: Call) -> dict[str, Any]:
    """The newest `limit` events of a job, oldest first."""
    job = call.job()
    limit = 100 if call.query["limit"] is None else max(0, call.query["limit"])
    return {"job_id": job.job_id, "logs": job.logs[len(job.logs) - min(limit, len(job.logs)) :]}


@endpoint("GET", "/api/v2/jobs/{job_id}/info")
def info(call: Call) -> dict[str, Any]:
    job = call.job()
    return {
        "job_id": job.job_id,
        "session_id": job.session.session_id,
        "alias": job.alias,
        "status": job.status,
        "vcpu_count": job.compute["cpus"],
        "mem_size_mib": job.compute["memory"],
        "overlay_size_mb": job.compute["disk"],
        "provider": job.provider,
    }


# ---------------------------------------------------------------------------
# staying alive, ending
# ---------------------------------------------------------------------------


@endpoint("POST", "/api/v2/sessions/{session_id}/heartbeat")
def heartbeat(call: Call) -> dict[str, Any]:
    """Keep the living VMs alive; a dead one is `gone`."""
    session = call.session(living=True)
    results: dict[str, Any] = {}
    with call.sessions.lock:
        for job in session.jobs:
            if job.over:
                reason = f"job is {job.status}: {job.reason}"
                results[job.job_id] = {"success": False, "errors": [reason], "gone": True}
            else:
                job.last_beat = call.clock.now()
                errors = [] if job.worker is not None and job.worker.up else [WORKER_MISSING]
                results[job.job_id] = {"success": True, "errors": errors, "gone": False}
        call.sessions.touch()
    return {
        "success": all(result["success"] for result in results.values()),
        "session_id": session.session_id,
        "timestamp": call.clock.timestamp(),
        "results": results,
    }


@endpoint("POST", "/api/v2/sessions/{session_id}/close")
def close(call: Call) -> dict[str, Any]:
    """End every VM of the session. Closing again is fine."""
    session = call.session()
    again = session.closed
    ended = call.sessions.close(session)
    results = {
        job.job_id: {"success": True, "message": "closed" if job in ended else f"was {job.status} already"}
        for job in session.jobs
    }
    return {
        "success": True,
        "message": "Session was closed already" if again else "Session closed",
        "results": results,
    }


# ---------------------------------------------------------------------------
# inside the VMs
# ---------------------------------------------------------------------------


def not_running(job: Job) -> str:
    return f"VM is not running (status: {job.status})"


def unreachable(call: Call, job: Job) -> str | None:
    """Why a request that works inside a VM cannot, where that needs the network; None when it can."""
    if call.settings.network_for == "everything" and job.known_at is None:
        return "VM is not connected to the network"
    return None


@endpoint("POST", "/api/v2/sessions/{session_id}/execute")
def execute(call: Call) -> dict[str, Any]:
    """Run a command as root on every VM of the session; one that still boots gives a failed result."""
    session = call.session(living=True)
    if session.jobs and all(job.over for job in session.jobs):
        raise ApiError(410, f"Job is gone: {session.jobs[0].status} ({session.jobs[0].reason})")
    limit = call.body["timeout"]
    timeout = float(DEFAULT_EXECUTE_SECONDS if limit is None else max(0, limit))

    def execute_on(job: Job) -> dict[str, Any]:
        machine = call.sessions.machine(job.job_id)
        reason = unreachable(call, job)
        if machine is None or reason is not None:
            reason = f"{reason or not_running(job)}\n"
            return {"success": False, "stdout": "", "stderr": reason, "exit_code": -1, "timed_out": False}
        try:
            result = machine.execute(call.body["command"], timeout)
        except MachineError as error:
            return {
                "success": False,
                "stdout": "",
                "stderr": f"{error}\n",
                "exit_code": -1,
                "timed_out": False,
            }
        return {
            "success": result.exit_code == 0 and not result.timed_out,
            "stdout": result.stdout.decode("utf-8", "replace"),
            "stderr": result.stderr.decode("utf-8", "replace"),
            # As a shell tells it of a command that a signal ended.
            "exit_code": result.exit_code if result.exit_code >= 0 else 128 - result.exit_code,
            "timed_out": result.timed_out,
        }

    return {"results": for_each_job(session, execute_on)}


@endpoint("POST", "/api/v2/sessions/{session_id}/add_ssh_key")
def add_ssh_key(call: Call) -> dict[str, Any]:
    session = call.session(living=True)
    user = call.body["username"] or "root"

    def add_to(job: Job) -> dict[str, Any]:
        machine = call.sessions.machine(job.job_id)
        problem = ssh.public_key_problem(call.body["public_key"])
        if machine is None:
            problem = not_running(job)
        elif unreachable(call, job) is not None:
            problem = unreachable(call, job)
        elif user not in ACCOUNTS:
            problem = f"no user '{user}' on this VM"
        if problem is not None or machine is None:
            return {"success": False, "error": problem}
        try:
            return {"success": True, "output": ssh.add_key(machine, user, call.body["public_key"])}
        except MachineError as error:
            return {"success": False, "error": str(error)}

    results = for_each_job(session, add_to)
    success = bool(results) and all(result["success"] for result in results.values())
    return {"success": success, "session_id": session.session_id, "results": results}


@endpoint("GET", "/api/v2/sessions/{session_id}/public_url")
def public_url(call: Call) -> dict[str, Any]:
    """Addresses on this host that lead to the application's port in each VM, or to `port`."""
    session = call.session(living=True)
    port = call.query["port"]
    if port is not None and not 0 < port < 65536:
        raise ApiError(400, f"Port {port} is out of range")
    results: dict[str, Any] = {}
    for job in session.jobs:
        if job.over:
            results[job.job_id] = {
                "success": False,
                "job_id": job.job_id,
                "error": f"Job is gone: {job.reason}",
            }
        else:
            url = door_of(call.sessions, job, port or 0).url
            results[job.job_id] = {"success": True, "job_id": job.job_id, "url": url}
    return {"session_id": session.session_id, "results": results}


def door_of(sessions: Sessions, job: Job, port: int) -> Door:
    """The listener that leads to a port of a VM; port 0 is the application's, whichever it is at the time."""

    def connect() -> Any:
        machine = sessions.machine(job.job_id)
        if machine is None:
            raise ConnectionRefusedError(f"the VM is not running (status: {job.status})")
        number = port or job.app_port
        try:
            return machine.connect(number)
        except OSError as error:
            raise ConnectionRefusedError(f"nothing answers on port {number} of the VM") from error

    with sessions.lock:
        if port not in job.doors:
            job.doors[port] = Door(connect)
        return job.doors[port]


@endpoint(*OLD_ENDPOINTS[0])
def setup_sandbox(call: Call) -> dict[str, Any]:
    """For clients of before SDK 2.7: take the dataset of a simulator, and let a key log in as plato."""
    job = call.running_job("public_id")
    dataset = call.body["plato_dataset_config"]
    if call.body["ssh_public_key"]:
        install_key(call, job, "plato", call.body["ssh_public_key"])
    with call.sessions.lock:
        job.dataset, job.dataset_name = dataset, call.body["dataset"]
        job.app_port = dataset["compute"]["app_port"] or job.app_port
        job.messaging_port = dataset["compute"]["plato_messaging_port"] or job.messaging_port
        call.sessions.log(job, f"sandbox set up for dataset {call.body['dataset']}")
    return {**managed(call), "ssh_url": f"ssh://plato@{job.job_id}--22.{call.settings.gateway_host}"}


@endpoint(*OLD_ENDPOINTS[1])
def setup_root_access(call: Call) -> dict[str, Any]:
    """For clients of before SDK 2.7: let a key log in as root."""
    install_key(call, call.running_job("public_id"), "root", call.body["ssh_public_key"])
    return managed(call)


def managed(call: Call) -> dict[str, Any]:
    """A VMManagementResponse of something that is done."""
    return {"status": "success", "timestamp": call.clock.timestamp(), "correlation_id": str(uuid.uuid4())}


def install_key(call: Call, job: Job, user: str, key: str) -> None:
    """Raises 400 for what is no key, and 500 when the VM does not take it."""
    problem = ssh.public_key_problem(key)
    if problem is not None:
        raise ApiError(400, f"Invalid SSH public key: {problem}")
    machine = call.sessions.machine(job.job_id)
    try:
        if machine is None:
            raise MachineError("the VM is gone")
        ssh.add_key(machine, user, key)
    except MachineError as error:
        raise ApiError(500, str(error)) from error
