"""Sessions and jobs: what was asked for, how far it is, and when it ends. A job is one VM."""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from .catalogue import DEFAULT_DATASET, Artifact, Catalogue, UnknownArtifactError
from .clock import Clock
from .engine import Engine
from .images import Images
from .machine import Machine, MachineError, create_directory, remove_tree
from .programs import hide, plug_in_compose
from .public_url import Door
from .snapshots import Uploads, start_containers

if TYPE_CHECKING:
    from .worker import Worker

DEFAULT_LIFETIME_SECONDS = 1800
DEFAULT_HEARTBEAT_SECONDS = 120.0
TERMINAL = ("completed", "failed", "cancelled", "timeout")
HEARTBEAT_MISS = "VM shutdown due to heartbeat miss"
WORKER_MISSING = "vm_heartbeat_message: the Plato worker of this VM is not started"
IDLE_LOOK_SECONDS = 30.0


@dataclass
class BootFault:
    """What goes wrong with the next `times` VMs: they fail for a reason, or never get ready (None)."""

    reason: str | None
    times: int


@dataclass
class WorkerFault:
    """The next `times` workers fail for a reason, or never come up (None), and say so in a 502 or plainly."""

    reason: str | None
    times: int
    bad_gateway: bool = False


@dataclass(eq=False)
class Job:
    """One VM of a session. `compute` has cpus, memory (MB) and disk (MB)."""

    job_id: str
    session: Session
    alias: str
    simulator: str
    kind: str
    compute: dict[str, int]
    created_at: str
    boot_at: float
    app_port: int
    messaging_port: int | None = None
    artifact: Artifact | None = None
    provider: str = "firecracker"
    dataset: dict[str, Any] | None = None
    dataset_name: str = DEFAULT_DATASET
    worker: Worker | None = None
    fault: BootFault | None = None
    status: str = "created"
    reason: str | None = None
    ready: bool = False
    booted: bool = False
    last_beat: float = 0.0
    machine: Machine | None = None
    # When the gateway knows the VM, by the clock; None before connect_network.
    known_at: float | None = None
    doors: dict[int, Door] = field(default_factory=dict)
    closers: list[Callable[[], None]] = field(default_factory=list)
    logs: list[dict[str, str]] = field(default_factory=list)
    # What an artifact keeps of the job, beside its files and its dataset, for a job started from it.
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.status in TERMINAL


@dataclass(eq=False)
class Session:
    """What one `make` asked for. Times are the clock's; with `heartbeat_timeout` 0 none is needed."""

    session_id: str
    created: float
    created_at: str
    updated_at: str
    lifetime: float
    heartbeat_timeout: float
    source: str
    jobs: list[Job] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False


class Sessions:
    """Every session of this server. Whenever one changes, `changed` is notified and `version` counts on."""

    def __init__(self, clock: Clock, catalogue: Catalogue, directory: Path, boot_seconds: float) -> None:
        self.clock = clock
        self.catalogue = catalogue
        self.directory = directory
        self.boot_seconds = boot_seconds
        self.heartbeat_seconds = DEFAULT_HEARTBEAT_SECONDS
        self.isolated = True
        self.images: Images | None = None  # where VMs have Docker engines
        self.without_docker = False  # not even the command
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = 0
        self.sessions: dict[str, Session] = {}
        self.jobs: dict[str, Job] = {}
        self.uploads = Uploads(clock, catalogue)
        self.boot_fault: BootFault | None = None
        self.worker_seconds = 0.0
        self.worker_fault: WorkerFault | None = None
        # Called with every VM that has started; what is to end with it goes into `job.closers`.
        self.on_machine: list[Callable[[Job, Machine], None]] = []
        self.snapshot_fault: BootFault | None = None
        self.stopping = False

    def touch(self, session: Session | None = None) -> None:
        """Something changed: whoever waits looks again. Call with the lock held."""
        self.version += 1
        if session is not None:
            session.updated_at = self.clock.timestamp()
        self.changed.notify_all()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition over the sessions holds, at most that many real seconds."""
        deadline = time.monotonic() + seconds
        with self.lock:
            while not condition():
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self.stopping:
                    return False
                self.changed.wait(remaining)
            return True

    def wait_for_clock(self, moment: float, given_up: Callable[[], bool]) -> bool:
        """Wait until the clock shows that moment; False when it was given up, or the server ends, before."""
        while not given_up() and not self.stopping:
            if self.clock.now() >= moment:
                return True
            self.wait_until(
                lambda: self.clock.now() >= moment or given_up(), self.clock.real_seconds_until(moment)
            )
        return False

    # -- making --

    def make(self, request: dict[str, Any]) -> Session:
        """A new session with a job for every environment that exists; the others say what is wrong."""
        lifetime = request["timeout"] if request["timeout"] is not None else DEFAULT_LIFETIME_SECONDS
        beat = request["heartbeat_timeout"]
        now, stamp = self.clock.now(), self.clock.timestamp()
        session = Session(
            session_id=str(uuid.uuid4()),
            created=now,
            created_at=stamp,
            updated_at=stamp,
            lifetime=float(lifetime),
            heartbeat_timeout=self.heartbeat_seconds if beat is None else float(beat),
            source=request["source"] or "SDK",
        )
        for environment in request["envs"]:
            self.add_environment(session, environment)
        with self.lock:
            self.sessions[session.session_id] = session
            self.jobs.update({job.job_id: job for job in session.jobs})
            self.touch()
        for job in session.jobs:
            threading.Thread(target=self.boot, args=(job,), name=f"boot {job.job_id}", daemon=True).start()
        return session

    def add_environment(self, session: Session, environment: dict[str, Any]) -> None:
        """Plan one VM, or note why it cannot be."""
        kind = environment["type"]
        name = environment.get("simulator") or kind
        alias = self.free_alias(session, environment["alias"] or name.partition(":")[0])
        info: dict[str, Any] = {"job_id": None, "alias": alias, "simulator": environment.get("simulator")}
        session.environments.append(info)
        try:
            artifact = self.artifact_of(environment)
        except UnknownArtifactError as error:
            info.update(success=False, error=str(error), artifact_id=environment.get("artifact_id"))
            return
        job = self.plan_job(session, environment, alias, artifact)
        session.jobs.append(job)
        info.update(
            job_id=job.job_id,
            simulator=job.simulator,
            artifact_id=artifact.artifact_id if artifact else None,
            is_desktop=job.provider == "qemu",
            success=True,
            effective_sim_config=dict(job.compute),
        )

    def artifact_of(self, environment: dict[str, Any]) -> Artifact | None:
        """What an environment starts from; None for a blank VM. Raises UnknownArtifactError."""
        if environment["type"] == "artifact":
            return self.catalogue.ready(environment["artifact_id"])
        if environment["type"] == "simulator":
            return self.catalogue.find(
                environment["simulator"], environment["tag"], environment["version"], environment["dataset"]
            )
        return None

    def plan_job(
        self, session: Session, environment: dict[str, Any], alias: str, artifact: Artifact | None
    ) -> Job:
        wishes = environment["sim_config"] or {}
        base = artifact.compute if artifact else {"cpus": 1, "memory": 2048, "disk": 10240}
        compute = {name: wishes[name] if wishes.get(name) is not None else base[name] for name in base}
        port = artifact.app_port if artifact else wishes.get("app_port")
        messaging_port = artifact.messaging_port if artifact else wishes.get("plato_messaging_port")
        return Job(
            job_id=str(uuid.uuid4()),
            session=session,
            alias=alias,
            simulator=artifact.simulator if artifact else environment["simulator"],
            kind=environment["type"],
            compute=compute,
            created_at=self.clock.timestamp(),
            boot_at=self.clock.now() + self.boot_seconds,
            app_port=8080 if port is None else port,
            messaging_port=messaging_port,
            artifact=artifact,
            dataset=artifact.dataset_config if artifact else None,
            dataset_name=artifact.dataset if artifact else DEFAULT_DATASET,
            kept=dict(artifact.kept) if artifact else {},
            provider=environment.get("provider") or "firecracker",
            fault=self.take_boot_fault(),
        )

    def free_alias(self, session: Session, wanted: str) -> str:
        taken = {info["alias"] for info in session.environments}
        candidate, number = wanted, 1
        while candidate in taken:
            number += 1
            candidate = f"{wanted}-{number}"
        return candidate

    def take_boot_fault(self) -> BootFault | None:
        with self.lock:
            fault = self.boot_fault
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault

    def take_snapshot_fault(self) -> str | None:
        """Why the snapshot that is about to be taken fails, or None."""
        with self.lock:
            fault = self.snapshot_fault
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault.reason

    def take_worker_fault(self) -> WorkerFault | None:
        with self.lock:
            fault = self.worker_fault
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault

    # -- booting --

    def boot(self, job: Job) -> None:
        """The job's thread: start its VM. `tick` declares it running when its time has come."""
        with self.lock:
            if job.over:
                return
            job.status = "queued"
            self.log(job, "queued")
        if job.fault is None or job.fault.reason is None:
            try:
                self.start_machine(job)
            except (MachineError, OSError) as error:
                self.fail(job, f"VM failed to start: {error}")
                return
        with self.lock:
            job.booted = True
            self.touch(job.session)

    def start_machine(self, job: Job) -> None:
        """Lay out the VM's directory and start it, unless the job has ended meanwhile. Or MachineError."""
        directory = self.directory / job.job_id
        hostname = "vm-" + job.job_id.partition("-")[0]
        create_directory(directory, hostname)
        if job.artifact is not None:
            self.catalogue.extract(job.artifact, directory)
        machine = Machine(
            job.job_id,
            directory,
            hostname,
            self.isolated,
            lambda dead: self.fail(job, "VM stopped unexpectedly"),
        )
        if self.without_docker:
            hide(machine, "docker")
        elif self.isolated and os.geteuid() == 0:
            plug_in_compose(machine)
        machine.start()
        if self.images is not None:
            machine.engine = Engine(machine, lambda: self.data_root(job.artifact))
        with self.lock:
            if not job.over and not self.stopping:
                job.machine = machine
        if job.machine is None:
            machine.kill()
            remove_tree(directory)
            return
        for prepare in self.on_machine:
            prepare(job, machine)
        if job.over:
            self.close_all(job)
        elif job.artifact is not None:
            for problem in start_containers(job.artifact, machine):
                with self.lock:
                    self.log(job, problem)

    def data_root(self, artifact: Artifact | None) -> Path | None:
        """What the Docker engine of a VM begins with."""
        if artifact is not None and (self.catalogue.directory / artifact.artifact_id / "docker").is_dir():
            return self.catalogue.directory / artifact.artifact_id / "docker"
        return self.images.data_root() if self.images is not None else None

    def fail(self, job: Job, reason: str) -> None:
        with self.lock:
            self.finish(job, "failed", reason)
        self.remove(job)

    # -- time --

    def tick(self) -> float:
        """Do what is due by the clock; the moment when something will be due next."""
        ended: list[Job] = []
        with self.lock:
            now = self.clock.now()
            following = now + IDLE_LOOK_SECONDS * self.clock.speed
            upload, uploaded = self.uploads.tick(now)
            following = min(following, upload if upload is not None else following)
            if uploaded:
                self.touch()
            for job in self.jobs.values():
                if job.over:
                    continue
                due = self.advance_job(job, now)
                if due is None:
                    ended.append(job)
                elif due > now:
                    following = min(following, due)
        for job in ended:
            self.remove(job)
        return following

    def advance_job(self, job: Job, now: float) -> float | None:
        """Move one job on; when to look at it again, or None when it has ended."""
        session = job.session
        end_of_life = session.created + session.lifetime
        if now >= end_of_life:
            self.finish(job, "timeout", f"VM reached its lifetime of {session.lifetime:g} seconds")
            return None
        if job.status != "running":
            if now < job.boot_at or not job.booted:
                return min(end_of_life, max(job.boot_at, now))
            if job.fault is not None and job.fault.reason is not None:
                self.finish(job, "failed", job.fault.reason)
                return None
            self.come_up(job, now)
        if session.heartbeat_timeout <= 0:
            return end_of_life
        deadline = job.last_beat + session.heartbeat_timeout
        if now >= deadline:
            self.finish(job, "failed", HEARTBEAT_MISS)
            return None
        return min(end_of_life, deadline)

    def come_up(self, job: Job, now: float) -> None:
        """The boot is over: the VM runs. Heartbeats are due from here on."""
        job.status = "running"
        job.ready = job.fault is None
        job.last_beat = now
        self.log(job, "running")

    def run(self) -> None:
        """The timer's thread."""
        while not self.stopping:
            seen = self.version
            following = self.tick()
            with self.lock:
                if self.version != seen:
                    continue
                self.changed.wait(min(self.clock.real_seconds_until(following), IDLE_LOOK_SECONDS))

    # -- ending --

    def finish(self, job: Job, status: str, reason: str | None) -> None:
        """Set the final status of a job. Call with the lock held, then `remove` without it."""
        if job.over:
            return
        job.status, job.reason, job.ready = status, reason, False
        self.log(job, status if reason is None else f"{status}: {reason}")

    def remove(self, job: Job) -> None:
        """End the VM of a finished job, its doors and its files."""
        for door in list(job.doors.values()):
            door.close()
        self.close_all(job)
        if job.machine is not None:
            job.machine.kill()
            remove_tree(job.machine.directory)
        with self.lock:
            self.touch(job.session)

    def close_all(self, job: Job) -> None:
        """End what was to end with the VM."""
        with self.lock:
            closers, job.closers = job.closers, []
        for close in closers:
            close()

    def close(self, session: Session) -> list[Job]:
        """End a session; the jobs that were still alive."""
        with self.lock:
            session.closed = True
            alive = [job for job in session.jobs if not job.over]
            for job in alive:
                self.finish(job, "completed", "session closed")
            self.touch(session)
        for job in alive:
            self.remove(job)
        return alive

    def stop(self) -> None:
        """The server ends, and so does every VM."""
        with self.lock:
            self.stopping = True
            self.changed.notify_all()
        for session in list(self.sessions.values()):
            self.close(session)

    # -- looking --

    def log(self, job: Job, message: str) -> None:
        """Note an event of a job. Call with the lock held."""
        job.logs.append({"timestamp": self.clock.timestamp(), "message": message})
        self.touch(job.session)

    def booted(self) -> bool:
        """Whether every VM runs, or is over, whose time to boot has passed."""
        now = self.clock.now()
        return all(job.over or job.status == "running" or job.boot_at > now for job in self.jobs.values())

    def alive(self) -> list[Job]:
        with self.lock:
            return [job for job in self.jobs.values() if not job.over]

    def reachable(self, job_id: str) -> bool | None:
        """Whether the gateway knows a VM, or None when it was never connected to the network."""
        job = self.jobs.get(job_id)
        if job is None or job.known_at is None:
            return None
        return self.clock.now() >= job.known_at

    def machine(self, job_id: str) -> Machine | None:
        """The running VM of a job, or None."""
        job = self.jobs.get(job_id)
        if job is None or job.status != "running" or job.machine is None or not job.machine.alive:
            return None
        return job.machine
