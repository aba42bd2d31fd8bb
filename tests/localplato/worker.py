"""The worker of a VM: watches the databases that the dataset's listeners name, and puts them back.

It comes up some time after `start-worker`, when every database answers; until then `state` says why not.
`proxy`, `file` and `xml` listeners are taken, and their state says that the local Plato does not watch them.
"""

from __future__ import annotations

import re
import threading
from typing import Any, Callable

from .database import Database, DatabaseError, open_database
from .endpoints import ApiError, Call, endpoint, for_each_job, managed
from .machine import Machine
from .mutations import merge, unignored
from .sessions import Job, Sessions

RESET_WAIT_SECONDS = 60.0
RETRY_SECONDS = 1.0
NOT_STARTED = "The worker is not started"


class WorkerError(Exception):
    """The worker has no answer; the message says why."""


class Worker:
    """One start of a VM's worker. `dataset` is as it was sent."""

    def __init__(self, sessions: Sessions, job: Job, machine: Machine, dataset: dict[str, Any]) -> None:
        self.sessions = sessions
        self.job = job
        self.dataset = dataset
        self.fault = sessions.take_worker_fault()
        self.up_at = sessions.clock.now() + sessions.worker_seconds
        self.problem = "The worker is starting"
        self.up = False
        self.resumed = False
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.databases: dict[str, Database] = {}
        self.unwatched: dict[str, str] = {}
        for number, (name, listener) in enumerate((dataset.get("listeners") or {}).items()):
            self.add_listener(machine, name, listener, f"worker-{number}")
        threading.Thread(target=self.run, name=f"worker {job.job_id}", daemon=True).start()

    def add_listener(self, machine: Machine, name: str, listener: dict[str, Any], label: str) -> None:
        """Watch a listener's database, or note why it is not watched."""
        kind = listener.get("type", "db")
        if kind != "db":
            self.unwatched[name] = f"The local Plato does not watch listeners of type {kind}"
            return
        place = machine.directory / label
        place.mkdir(exist_ok=True, mode=0o700)
        database = open_database(machine, listener, place)
        if database is None:
            self.unwatched[name] = f"The local Plato cannot watch {listener['db_type']} databases"
        else:
            self.databases[name] = database

    # -- coming up --

    def run(self) -> None:
        """The worker's thread: wait until it is time, then until every database answers."""
        if not self.wait_for_boot():
            return
        if self.fault is not None:
            self.note(self.fault.reason or self.problem)
            return
        missing = dict(self.databases)
        while missing and not self.stopped.is_set():
            for name, database in list(missing.items()):
                try:
                    database.prepare()
                    del missing[name]
                except DatabaseError as error:
                    self.note(f"Listener '{name}' cannot use its database: {error}")
            if missing:
                self.stopped.wait(RETRY_SECONDS)
        if not self.stopped.is_set():
            with self.sessions.lock:
                self.up = True
                self.sessions.log(self.job, "worker up")

    def wait_for_boot(self) -> bool:
        """Wait for the server's clock; False when the worker was stopped before."""
        return self.sessions.wait_for_clock(self.up_at, self.stopped.is_set)

    def note(self, problem: str) -> None:
        with self.sessions.lock:
            self.problem = problem
            self.sessions.touch()

    def stop(self) -> None:
        """Forget the VM; its databases are gone or belong to the next worker."""
        self.stopped.set()
        with self.sessions.lock:
            self.up = False
            self.sessions.touch()

    # -- working --

    def wait_until_up(self) -> None:
        """Give a worker that came with its VM's artifact some time to arrive, as the VM's databases do."""
        if self.resumed and self.fault is None:
            self.sessions.wait_until(lambda: self.up or self.stopped.is_set(), RESET_WAIT_SECONDS)

    def check(self) -> None:
        """Raises WorkerError unless the worker is up."""
        if not self.up:
            raise WorkerError(self.problem)

    def state(self, merged: bool, since: list[int]) -> tuple[dict[str, Any], str]:
        """What changed since the last reset, listener by listener and together, and the cursor after it."""
        self.check()
        state: dict[str, Any] = {
            name: {"observed": False, "error": problem} for name, problem in self.unwatched.items()
        }
        together: list[dict[str, Any]] = []
        cursor: list[int] = []
        with self.lock:
            for number, (name, database) in enumerate(self.databases.items()):
                records = attempt(name, database.read)
                after = since[number] if number < len(since) else 0
                mutations = [one for one in records.mutations if one["id"] > after]
                cursor.append(max([after, *(one["id"] for one in records.mutations)]))
                count = len(mutations)
                if merged:
                    rules = database.listener.get("audit_ignore_tables") or []
                    mutations = unignored(merge(mutations, records.keys), rules)
                state[name] = {"mutations": mutations, "audit_log_count": count}
                together += mutations
        return {**state, "mutations": together}, ",".join(map(str, cursor))

    def for_each_database(self, action: Callable[[Database], None]) -> None:
        """Raises WorkerError when a database refuses."""
        self.check()
        with self.lock:
            for name, database in self.databases.items():
                attempt(name, lambda database=database: action(database))  # type: ignore[misc]

    def view(self) -> dict[str, Any]:
        """For the admin interface."""
        return {"up": self.up, "problem": None if self.up else self.problem, "dataset": self.dataset}


def attempt(name: str, action: Callable[[], Any]) -> Any:
    """Do something with a listener's database. Raises WorkerError."""
    try:
        return action()
    except DatabaseError as error:
        raise WorkerError(f"Listener '{name}': {error}") from error


def start(sessions: Sessions, job: Job, dataset: dict[str, Any]) -> Worker:
    """Start a job's worker in place of the one that it has. Raises WorkerError when the VM is gone."""
    machine = job.machine
    if machine is None:
        raise WorkerError("VM is not running")
    if job.worker is not None:
        job.worker.stop()
    with sessions.lock:
        job.dataset = dataset
        job.kept["worker"] = True
        job.worker = worker = Worker(sessions, job, machine, dataset)
        job.closers.append(worker.stop)
        sessions.log(job, "worker starting")
    return worker


def resume(sessions: Sessions) -> None:
    """From now on, start the worker of every VM whose artifact was recorded with one."""

    def start_again(job: Job, machine: Machine) -> None:
        if job.kept.get("worker") and job.dataset is not None:
            start(sessions, job, job.dataset).resumed = True

    sessions.on_machine.append(start_again)


# ---------------------------------------------------------------------------
# endpoints of the worker
# ---------------------------------------------------------------------------

SANDBOX = "/api/v1/sandbox/public-build/vm/{public_id}"


@endpoint("POST", SANDBOX + "/start-worker")
def start_worker(call: Call) -> dict[str, Any]:
    """Answers at once; the worker comes up later. The dataset is kept as it was sent."""
    job = call.running_job("public_id")
    with call.sessions.lock:
        job.dataset_name = call.body["dataset"]
    start(call.sessions, job, call.raw["plato_dataset_config"])
    return managed(call)


@endpoint("GET", SANDBOX + "/healthy-worker")
def healthy_worker(call: Call) -> dict[str, Any]:
    """`healthy` once the worker is up, else 503 with the reason."""
    job = call.running_job("public_id")
    if job.worker is None or not job.worker.up:
        raise ApiError(503, NOT_STARTED if job.worker is None else job.worker.problem)
    return {**managed(call), "status": "healthy"}


@endpoint("POST", SANDBOX + "/healthy-services")
def healthy_services(call: Call) -> dict[str, Any]:
    """`healthy` for every running VM: the local Plato does not look into its containers."""
    call.running_job("public_id")
    return {**managed(call), "status": "healthy"}


# ---------------------------------------------------------------------------
# endpoints of the state
# ---------------------------------------------------------------------------


@endpoint("GET", "/api/v2/sessions/{session_id}/state")
def session_state(call: Call) -> dict[str, Any]:
    session = call.session(living=True)
    merged = bool(call.query["merge_mutations"])
    results = for_each_job(session, lambda job: state_of(call.sessions, job, merged, []))
    return {"session_id": session.session_id, "results": results}


@endpoint("GET", "/api/v2/jobs/{job_id}/state")
def job_state(call: Call) -> dict[str, Any]:
    """With `since`, the `mutations_cursor` of an earlier answer, only what came after it."""
    since = call.query["since"] or ""
    if not re.fullmatch(r"(\d+(,\d+)*)?", since):
        raise ApiError(400, "Invalid mutations cursor")
    numbers = [int(text) for text in since.split(",") if text]
    return state_of(call.sessions, call.job(), bool(call.query["merge_mutations"]), numbers)


def state_of(sessions: Sessions, job: Job, merged: bool, since: list[int]) -> dict[str, Any]:
    """A SessionStateResult. Without a worker it has an `error`; a scripted 502 comes in `errors`."""
    try:
        if sessions.machine(job.job_id) is None:
            raise WorkerError(f"VM is not running (status: {job.status})")
        if job.worker is None:
            raise WorkerError(NOT_STARTED)
        state, cursor = job.worker.state(merged, since)
    except WorkerError as error:
        fault = job.worker.fault if job.worker is not None else None
        if fault is not None and fault.bad_gateway:
            return {"success": False, "state": {"errors": [f"502 Bad Gateway: {error}"]}}
        return {"success": False, "state": {"error": str(error)}}
    return {"success": True, "state": state, "mutations_cursor": cursor}


@endpoint("POST", "/api/v2/sessions/{session_id}/reset")
def reset(call: Call) -> dict[str, Any]:
    """Put every job's databases back to what they were when its worker came up.

    It fails where no worker runs; one that came with its VM's artifact is waited for. Unknown, and a setting:
    whether that failure is an answer without success, or a 500.
    """
    session = call.session(living=True)

    def reset_job(job: Job) -> dict[str, Any]:
        if call.sessions.machine(job.job_id) is None:
            return {"success": False, "message": f"VM is not running (status: {job.status})"}
        try:
            if job.worker is None:
                raise WorkerError(NOT_STARTED)
            job.worker.wait_until_up()
            job.worker.check()
        except WorkerError as error:
            if call.settings.reset_without_worker != 200:
                raise ApiError(call.settings.reset_without_worker, f"Reset failed: {error}") from error
            return {"success": False, "message": str(error)}
        try:
            job.worker.for_each_database(lambda database: database.restore())
        except WorkerError as error:
            return {"success": False, "message": str(error)}
        return {"success": True, "message": None}

    results = for_each_job(session, reset_job)
    return {
        "success": all(result["success"] for result in results.values()),
        "session_id": session.session_id,
        "results": results,
    }


@endpoint("POST", "/api/v1/env/{job_group_id}/cleanup")
def cleanup(call: Call) -> dict[str, Any]:
    """Empty the audit tables of every job; 404 for a session that has no worker."""
    session = call.sessions.sessions.get(call.path["job_group_id"])
    if session is None or session.closed:
        raise ApiError(404, "Environment not found")
    workers = [job.worker for job in session.jobs if job.worker is not None and not job.over]
    if not workers:
        raise ApiError(404, "No simulator is attached to this environment")
    try:
        for worker in workers:
            worker.for_each_database(lambda database: database.clear())
    except WorkerError as error:
        return {"success": False, "error": str(error)}
    return {"success": True, "error": None}
