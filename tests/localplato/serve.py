"""`serve`: the server in the foreground, from its locks and ports to its end."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import contract, ssh
from .catalogue import Catalogue
from .certificates import CertificateError, Certificates
from .clock import Clock
from .endpoints import Settings
from .engine import engine_problem
from .gateway import Gateway
from .git_server import GitServer, Outlet
from .home import Home, HomeError
from .hub import Hub, git_problem
from .images import Images, debian_problem
from .machine import Machine, namespaces_problem, namespaces_remedy, remove_tree
from .server import HttpServer, Service
from .sessions import Job, Sessions
from .worker import resume as resume_workers

IDLE_CHECKS = 4


@dataclass
class Running:
    """The parts of a running server."""

    service: Service
    http: HttpServer
    gateway: Gateway | None
    git: GitServer | None
    information: dict[str, Any]


def serve(home: Home, settings: Settings, shared_authority: Path | None) -> int:
    """Serve until a signal, the admin interface or idleness ends it. Prints one line of JSON when ready."""
    home.prepare()
    with home.lock_for_server():
        raise_file_limit()
        # A killed server leaves its VMs' files; the VMs themselves died with it.
        remove_tree(home.machines)
        running = start(home, settings, shared_authority)
        listen_for_signals(running.service)
        print(json.dumps(running.information), flush=True)
        wait_for_end(running.service, settings.idle_minutes * 60)
        stop(running)
        remove_tree(home.machines)
    return 0


def raise_file_limit() -> None:
    """Every connection takes some descriptors: allow as many as the host does."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass


def start(home: Home, settings: Settings, shared_authority: Path | None) -> Running:
    """Start every part, on the ports of the last time when they are free."""
    clock = Clock(settings.speed)
    catalogue = Catalogue(home.artifacts, clock)
    catalogue.prepare()
    sessions = Sessions(clock, catalogue, home.machines, settings.boot_seconds)
    sessions.heartbeat_seconds = settings.heartbeat_seconds
    sessions.uploads.seconds = settings.upload_seconds
    sessions.worker_seconds = settings.worker_seconds
    resume_workers(sessions)
    sessions.isolated, warnings = choose_isolation(settings.isolation)
    if settings.gateway_host == "localhost" and not is_found("localhost"):
        settings.gateway_host = "127.0.0.1"
    last = home.information() or {}
    certificates = Certificates(home.certificates, settings.gateway_host)
    gateway: Gateway | None = None
    try:
        certificates.prepare(shared_authority)
        gateway = Gateway(
            certificates,
            settings.gateway_host,
            int(last.get("gateway_port", 0)),
            sessions.machine,
            sessions.reachable,
            settings.unconnected,
        )
    except CertificateError as error:
        warnings.append(str(error))
    problem = ssh.sshd_problem()
    if problem is not None:
        warnings.append(problem)
    docker_problem = choose_docker(settings.docker, sessions)
    without_debian = debian_problem()
    if docker_problem is None and without_debian is not None:
        warnings.append(f"an image is missing in VMs: {without_debian}")
    hub = Hub(home.hub)
    hub.prepare()
    service = Service(contract.load(), sessions, settings, home.key(), gateway, hub)
    http = open_http(int(last.get("port", 0)), service)
    git = open_git(int(last.get("hub_port", 0)), service, certificates, warnings)
    information = describe(service, http, gateway, git, certificates, warnings)
    information["docker"] = docker_problem
    home.write_information(information)
    if gateway is not None:
        gateway.start()
    threading.Thread(target=sessions.run, name="timer", daemon=True).start()
    threading.Thread(target=http.serve_forever, name="http", daemon=True).start()
    if git is not None:
        threading.Thread(target=git.serve_forever, name="git", daemon=True).start()
    return Running(service, http, gateway, git, information)


def is_found(host: str) -> bool:
    """Whether a host's name leads somewhere; without an /etc/hosts, not even `localhost` need."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def choose_isolation(wish: str) -> tuple[bool, list[str]]:
    """Whether VMs get namespaces, and what does not work when they do not. Raises HomeError."""
    if wish == "namespaces" or (wish == "auto" and namespaces_problem() is None):
        problem = namespaces_problem()
        if problem is not None:
            raise HomeError(problem)
        return True, []
    if wish == "none":
        return False, ["VMs run no commands and have no SSH: asked for"]
    problem = str(namespaces_problem())
    return False, [
        "here a VM can be started, looked at and stopped, but it runs no commands and has no SSH, as "
        f"{problem}. What helps: {namespaces_remedy(problem)}"
    ]


def choose_docker(wish: str, sessions: Sessions) -> str | None:
    """Let VMs have Docker engines; why they have none, or None."""
    if wish != "auto":
        if wish == "absent" and not sessions.isolated:
            raise HomeError("only a VM with namespaces can be without a program of this host")
        sessions.without_docker = wish == "absent"
        return "asked for"
    problem = engine_problem() if sessions.isolated else "VMs have no namespaces"
    if problem is None:
        sessions.images = Images()
    return problem


def open_http(port: int, service: Service) -> HttpServer:
    try:
        return HttpServer(port, service)
    except OSError:
        return HttpServer(0, service)


def open_git(
    port: int, service: Service, certificates: Certificates, warnings: list[str]
) -> GitServer | None:
    """The git server, which answers in every VM too; None without git. TLS works on its port as well."""
    problem = git_problem()
    if problem is not None:
        warnings.append(problem)
        return None
    settings, hub = service.settings, service.hub
    tls = certificates.context(settings.gateway_host) if settings.hub_scheme == "https" else None
    try:
        server = GitServer(port, service, hub, tls)
    except OSError:
        server = GitServer(0, service, hub, tls)
    host = "127.0.0.1" if tls is None else settings.gateway_host
    hub.base_url = f"{settings.hub_scheme}://{host}:{server.server_port}"

    def open_outlet(job: Job, machine: Machine) -> None:
        if machine.isolated:
            job.closers.append(Outlet(machine, server).close)

    service.sessions.on_machine.append(open_outlet)
    return server


def describe(
    service: Service,
    http: HttpServer,
    gateway: Gateway | None,
    git: GitServer | None,
    certificates: Certificates,
    warnings: list[str],
) -> dict[str, Any]:
    """What clients need to know; `environment` is what they are run with."""
    base_url = f"http://127.0.0.1:{http.server_port}"
    environment = {"PLATO_BASE_URL": base_url, "PLATO_API_KEY": service.key}
    if gateway is not None:
        environment["PLATO_GATEWAY_HOST"] = service.settings.gateway_host
        environment["PLATO_GATEWAY_PORT"] = str(gateway.port)
        environment["SSL_CERT_FILE"] = str(certificates.bundle_path)
    if git is not None and git.tls is not None:
        environment["GIT_SSL_CAINFO"] = str(certificates.bundle_path)
    return {
        "pid": os.getpid(),
        "port": http.server_port,
        "hub_port": git.server_port if git is not None else 0,
        "gateway_port": gateway.port if gateway is not None else 0,
        "base_url": base_url,
        "environment": environment,
        "warnings": warnings,
    }


def listen_for_signals(service: Service) -> None:
    """Let the signals that end a server write to the socket that `wait_for_end` waits for.

    A handler that sets an event would not do: a signal that comes just before the main thread falls asleep in
    a lock is not seen until the lock wakes it.
    """
    signal.set_wakeup_fd(service.stop_writer.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)


def wait_for_end(service: Service, idle_seconds: float) -> None:
    """Until someone asks for the end, or nobody has used the server for that long and no VM is alive."""
    pause = idle_seconds / IDLE_CHECKS if idle_seconds > 0 else None
    while not select.select([service.stop_reader], [], [], pause)[0]:
        idle = time.monotonic() - service.last_active
        if idle >= idle_seconds and not service.sessions.alive():
            return


def stop(running: Running) -> None:
    """End the VMs, then the rest. Connections that are still open die with the process."""
    running.service.stopping.set()
    running.http.socket.close()
    if running.git is not None:
        running.git.socket.close()
    if running.gateway is not None:
        running.gateway.stop()
    running.service.sessions.stop()
    sys.stdout.flush()
