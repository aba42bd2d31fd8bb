"""The local Plato: a server of the Plato API on loopback, with VMs that are real processes.

`LocalPlato` runs one for tests. Every module has one concern: `contract` (the API's models), `server`
(HTTP), `endpoints` (what each does), `sessions` (lifecycles), `machine`, `init` and `accounts` (VMs),
`gateway`, `certificates` and `relay` (TLS into VMs), `ssh`, `network`, `public_url`, `catalogue`
(simulators and artifacts), `snapshots` and `artifacts` (making and showing those), `engine`, `keeper`,
`images` and `programs` (Docker in VMs), `hub` and `git_server` (Gitea), `worker`, `database`,
`sqlite_client` and `mutations` (changes in databases), `debian` (its mirror), `faults`, `admin`, `clock`,
`home` (the data directory), `serve` and `cli`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable

__all__ = ["LocalPlato"]

COMMAND = Path(__file__).resolve().parent.parent / "local_plato.py"
ADMIN_SECONDS = 70.0
POLL_SECONDS = 30.0
STOP_SECONDS = 20.0


class LocalPlato:
    """A server of its own, as a context manager.

    `settings` are the options of `serve`, such as boot_seconds, gateway_seconds, not_ready_status, isolation
    and old_clients; nothing takes time here unless they say so. `ca_from` is the `certificates` of another
    server, to save making a CA.
    """

    def __init__(self, home: Path, ca_from: Path | None = None, **settings: Any) -> None:
        self.home = Path(home)
        names = ("boot_seconds", "upload_seconds", "worker_seconds", "gateway_seconds")
        at_once = dict.fromkeys(names, 0.0)
        self.settings = {**at_once, **settings}
        self.ca_from = ca_from
        self.process: subprocess.Popen[str] | None = None
        self.information: dict[str, Any] = {}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> LocalPlato:  # noqa: PYI034 - Self is not in Python 3.9
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises RuntimeError with its words when it is not."""
        command = [sys.executable, str(COMMAND), "--home", str(self.home), "serve"]
        for name, value in self.settings.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        if self.ca_from is not None:
            command += ["--ca-from", str(self.ca_from)]
        self.home.mkdir(parents=True, exist_ok=True)
        log_path = self.home / "server.log"
        with open(log_path, "a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        with self.process.stdout:
            line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(
                f"the local Plato did not start: {log_path.read_text(errors='replace')[-2000:]}"
            )
        self.information = json.loads(line)

    def stop(self) -> None:
        """End the server in order, and with it every VM."""
        self.end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash does."""
        self.end(signal.SIGKILL)

    def end(self, number: int) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process = None

    # -- what clients need --

    @property
    def base_url(self) -> str:
        return str(self.information["base_url"])

    @property
    def api_key(self) -> str:
        return self.environment["PLATO_API_KEY"]

    @property
    def gateway_port(self) -> int:
        return int(self.information["gateway_port"])

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client is to be run with."""
        return dict(self.information["environment"])

    @property
    def certificates(self) -> Path:
        """The directory to give to another server as `ca_from`."""
        return self.home / "certificates"

    # -- the admin interface --

    def admin(
        self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any
    ) -> dict[str, Any]:
        """One request to `/_local/PATH`. Raises urllib.error.HTTPError when the server refuses it."""
        url = f"{self.base_url}/_local/{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method)
        with self.opener.open(request, timeout=ADMIN_SECONDS) as response:
            value: dict[str, Any] = json.load(response)
        return value

    def fault(self, effect: str, **values: Any) -> None:
        """Script a fault: `effect` and fields of `faults.Fault`, or an effect of `admin.post_fault`."""
        self.admin("POST", "faults", {"effect": effect, **values})

    def clear_faults(self) -> None:
        self.admin("DELETE", "faults")

    def advance(self, seconds: float) -> None:
        """Move the server's clock on; what is due then has happened afterwards."""
        self.admin("POST", "advance", {"seconds": seconds})

    def requests(
        self, method: str | None = None, path: str | None = None, since: int = 0
    ) -> list[dict[str, Any]]:
        """The requests so far, oldest first: of that method, whose path contains that text, and whose
        `number` is beyond `since`."""
        return matching(self.admin("GET", "requests", since=since)["requests"], method, path)

    def sessions(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "sessions")["sessions"])

    def machines(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "machines")["machines"])

    def unknown_fields(self) -> list[dict[str, Any]]:
        """Fields that clients sent and no model knows."""
        return list(self.admin("GET", "unknown_fields")["unknown_fields"])

    def artifacts(self) -> list[dict[str, Any]]:
        """Every artifact as it is recorded, the seeds first."""
        return list(self.admin("GET", "artifacts")["artifacts"])

    def tag(self, simulator: str, tag: str, artifact_id: str) -> None:
        """Let a simulator's tag name an artifact."""
        self.admin("POST", "tags", {"simulator": simulator, "tag": tag, "artifact_id": artifact_id})

    def gateway(self) -> dict[str, Any]:
        """The gateway's connections: how many are open, and the newest ones."""
        return self.admin("GET", "gateway")

    # -- Gitea --

    def hub(self) -> dict[str, Any]:
        """Gitea's address, limits and simulators, each with the `path` of its bare repository or None."""
        return self.admin("GET", "hub")

    def add_simulator(self, name: str, **fields: Any) -> dict[str, Any]:
        """Let Gitea list one more: description, has_repo, owner, access (write, read, none), listed."""
        return self.admin("POST", "hub/simulators", {"name": name, **fields})

    def limit_hub(self, **limits: int) -> None:
        """Limit what Gitea takes, in bytes (0: no limit): `body` of a request, `pack`, `file`."""
        self.admin("POST", "hub", limits)

    def repository(self, name: str) -> Path:
        """The bare repository of the simulator of that name. Raises KeyError when it has none."""
        for simulator in self.hub()["simulators"]:
            if simulator["name"] == name and simulator["path"]:
                return Path(simulator["path"])
        raise KeyError(name)

    def wait_for(self, predicate: Callable[[dict[str, Any]], Any], timeout: float = 30.0) -> Any:
        """Wait until a predicate of a snapshot (sessions, requests, unknown_fields) holds; what it returned.

        Raises TimeoutError with the last snapshot.
        """
        deadline = time.monotonic() + timeout
        snapshot = self.admin("GET", "snapshot")
        while True:
            found = predicate(snapshot)
            if found:
                return found
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"not within {timeout} s: {json.dumps(snapshot)[-3000:]}")
            snapshot = self.admin(
                "GET", "snapshot", after=snapshot["version"], wait=min(remaining, POLL_SECONDS)
            )

    def wait_for_request(
        self, method: str, path: str, count: int = 1, timeout: float = 30.0
    ) -> list[dict[str, Any]]:
        """Wait until that many requests of that kind have come; all of them."""

        def enough(snapshot: dict[str, Any]) -> list[dict[str, Any]] | None:
            found = matching(snapshot["requests"], method, path)
            return found if len(found) >= count else None

        requests: list[dict[str, Any]] = self.wait_for(enough, timeout)
        return requests


def matching(requests: list[dict[str, Any]], method: str | None, path: str | None) -> list[dict[str, Any]]:
    return [
        request
        for request in requests
        if (method is None or request["method"] == method) and (path is None or path in request["path"])
    ]
