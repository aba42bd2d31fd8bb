"""The data directory of a local Plato: its key, its locks, and what clients need to reach it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

KEY_PREFIX = "local-"


class HomeError(Exception):
    """The data directory cannot be used; the message says why."""


def in_home(path: str) -> Path:
    """A path that may begin with `~`, in full. Raises HomeError for a user without a home."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        uid = os.getuid()
        raise HomeError(f"{path}: uid {uid} has no home here; set HOME to a directory of yours") from error


def default_home() -> Path:
    return in_home(os.environ.get("PLATO_LOCAL_HOME") or "~/.plato-local")


class Home:
    """A data directory, 0700. `server.lock` is held by the running server for its life."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.information_path = directory / "server.json"
        self.log_path = directory / "server.log"
        self.certificates = directory / "certificates"
        self.machines = directory / "vms"
        self.artifacts = directory / "artifacts"
        self.hub = directory / "hub"

    def prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        except OSError as error:
            raise HomeError(
                f"the data directory {self.directory} cannot be used: {error.strerror}; "
                "PLATO_LOCAL_HOME=DIR names another"
            ) from error

    def key(self) -> str:
        """The API key, made once."""
        path = self.directory / "key"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return path.read_text().strip()
        with open(descriptor, "w") as file:
            file.write(KEY_PREFIX + secrets.token_urlsafe(24) + "\n")
        return path.read_text().strip()

    # -- locks --

    def lock_for_server(self) -> IO[str]:
        """Hold the server's lock until the returned file closes. Raises HomeError when a server has it."""
        file = open(self.directory / "server.lock", "w")  # noqa: SIM115 - it is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise HomeError(f"a local Plato runs already on {self.directory}") from None
        return file

    @contextlib.contextmanager
    def lock_for_start(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        with open(self.directory / "start.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def running(self) -> bool:
        """Whether a server holds its lock."""
        try:
            with open(self.directory / "server.lock", "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def wait_until_stopped(self) -> None:
        """Until the server has let go of its lock."""
        with open(self.directory / "server.lock", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)

    # -- what the server says about itself --

    def information(self) -> dict[str, Any] | None:
        """The newest server's pid, ports and environment, or None."""
        try:
            information: dict[str, Any] = json.loads(self.information_path.read_text())
        except (OSError, ValueError):
            return None
        return information

    def write_information(self, information: dict[str, Any]) -> None:
        partial = self.directory / "server.json.new"
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with open(descriptor, "w") as file:
            json.dump(information, file, indent=1)
        partial.rename(self.information_path)
