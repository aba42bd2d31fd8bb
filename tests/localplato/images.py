"""The Docker images that every VM has from the start, for a VM has no network to pull any through.

`busybox:latest` is the host's static busybox. `debian:bookworm-slim` is made by mmdebstrap from the mirror
that the system uses, with the packages that the example simulator installs already in it. Both are imported
once by an engine in a VM of its own, whose data root is kept in the user's cache, named after what it was
made of. With PLATO_LOCAL_IMAGES=busybox in its environment a server makes the first alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import debian, engine
from .engine import EngineError
from .home import in_home
from .machine import PATH, Machine, MachineError, create_directory, remove_tree

FORMAT = "1"
IMPORT_SECONDS = 300.0
BOOTSTRAP_SECONDS = 1800
SUITE = "bookworm"
PACKAGES = "gunicorn,postgresql-15,postgresql-common,python3-flask,python3-psycopg2"
# As in Debian's own slim image there are no manuals and no translations; copyright files stay. PostgreSQL's
# compiler of queries, which it does without, is half of what would be left.
EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/i18n/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libz3.so*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
    "/usr/lib/postgresql/*/lib/llvmjit*",
)
INCLUDED = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")
NO_CLUSTER = (
    'mkdir -p "$1/etc/postgresql-common"'
    ' && echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf"'
)
TO_CLEAN = (
    'rm -rf "$1"/var/cache/debconf/*-old "$1"/var/log/*.log "$1"/var/log/apt "$1"/usr/share/zoneinfo/right'
)
ELF_INTERPRETER = 3
BUSYBOX_PATHS = ("/bin/busybox", "/usr/bin/busybox")
BUSYBOX_ACCOUNTS = {"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n"}


class ImageError(Exception):
    """The images could not be made; the message says why."""


# ---------------------------------------------------------------------------
# what they are made of
# ---------------------------------------------------------------------------


def cache_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return in_home(cache) / "plato-local" / "images"


def find_busybox() -> Path | None:
    """A busybox that needs no library, or None."""
    for name in BUSYBOX_PATHS:
        path = Path(name)
        if path.exists() and is_static(path.read_bytes()):
            return path
    return None


def debian_problem() -> str | None:
    """Why the Debian image cannot be made here, or None."""
    if shutil.which("mmdebstrap", path=PATH) is None:
        return "debian:bookworm-slim needs mmdebstrap; on Debian: apt-get install mmdebstrap"
    return None


def is_static(program: bytes) -> bool:
    """Whether a program (64 bits, little-endian) names no loader in its header."""
    if program[:6] != b"\x7fELF\x02\x01":
        return False
    (start,), (size, count) = struct.unpack_from("<Q", program, 32), struct.unpack_from("<HH", program, 54)
    kinds = [struct.unpack_from("<I", program, start + number * size)[0] for number in range(count)]
    return ELF_INTERPRETER not in kinds


def bootstrap_command(target: Path) -> list[str]:
    """The command that makes the Debian image's files; its mounts and processes end with it."""
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "mmdebstrap",
        "--quiet",
    ]
    command += ["--mode=root", "--variant=minbase", f"--include={PACKAGES}", f"--setup-hook={NO_CLUSTER}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in INCLUDED]
    return [*command, f"--customize-hook={TO_CLEAN}", SUITE, str(target)]


def recipe(with_debian: bool) -> str:
    """Everything that the images depend on."""
    busybox = find_busybox()
    parts = [
        FORMAT,
        platform.machine(),
        hashlib.sha256(busybox.read_bytes()).hexdigest() if busybox is not None else "no busybox",
        subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout,
        *(bootstrap_command(Path("debian.tar")) if with_debian else ()),
    ]
    return "\n".join(parts)


# ---------------------------------------------------------------------------
# making them
# ---------------------------------------------------------------------------


class Images:
    """The images of one server. What could not be made is not tried again by the same server."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or cache_directory()
        self.lock = threading.Lock()
        self.problem: str | None = None

    def data_root(self) -> Path | None:
        """A saved data root that has the images, made if need be; None where none can be made."""
        with self.lock:
            for with_debian in self.choices():
                try:
                    return self.prepare(with_debian)
                except ImageError as error:
                    self.problem = str(error)
                    print(f"images: {error}", file=sys.stderr, flush=True)
            return None

    def choices(self) -> list[bool]:
        """What to try: both images, and then busybox alone."""
        small = os.environ.get("PLATO_LOCAL_IMAGES") == "busybox" or self.problem is not None
        return [False] if small else [True, False]

    def prepare(self, with_debian: bool) -> Path:
        """The data root of a recipe. Raises ImageError."""
        problem = debian_problem() if with_debian else None
        if not with_debian and find_busybox() is None:
            problem = "the image busybox needs a static one; on Debian: apt-get install busybox-static"
        if problem is not None:
            raise ImageError(problem)
        name = hashlib.sha256(recipe(with_debian).encode()).hexdigest()[:16]
        place = self.directory / name
        try:
            with self.only_one():
                if not place.exists():
                    self.make(place, with_debian)
        except (OSError, EngineError, MachineError, subprocess.SubprocessError) as error:
            raise ImageError(f"the images could not be made: {error}") from error
        return place / "docker"

    @contextlib.contextmanager
    def only_one(self) -> Iterator[None]:
        """One process at a time makes images; the others find them made."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for rest in self.directory.glob("making-*"):
                remove_tree(rest)
            yield

    def make(self, place: Path, with_debian: bool) -> None:
        """Import the images in a VM of its own and keep its data root."""
        work = self.directory / f"making-{os.getpid()}"
        machine = Machine("images-" + place.name, work / "vm", "images", True, lambda dead: None)
        began = time.monotonic()
        try:
            create_directory(machine.directory, "images")
            names = pack(machine.directory / "tmp", with_debian)
            machine.start()
            machine.engine = engine.Engine(machine, lambda: None)
            for name, command in names.items():
                import_image(machine, name, command)
            with machine.frozen():
                machine.engine.save(work / "image" / "docker")
            machine.kill()
            made = {"images": sorted(names), "seconds": round(time.monotonic() - began, 1)}
            (work / "image" / "made.json").write_text(json.dumps(made))
            (work / "image").rename(place)
        finally:
            machine.kill()
            remove_tree(work)


def pack(directory: Path, with_debian: bool) -> dict[str, str]:
    """Write the images' files as archives named after them; their names and default commands."""
    names: dict[str, str] = {}
    busybox = find_busybox()
    if busybox is not None:
        (directory / "busybox.tar").write_bytes(busybox_archive(busybox))
        names["busybox:latest"] = '["sh"]'
    if with_debian:
        command = bootstrap_command(directory / "debian.tar")
        source = debian.source_file(SUITE, directory)
        command += (
            [str(source)] if source is not None else []
        )  # without one, mmdebstrap has a mirror of its own
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=BOOTSTRAP_SECONDS,
            stdin=subprocess.DEVNULL,
            env={"PATH": PATH, "TMPDIR": str(directory), "HOME": "/root"},
            check=False,
        )
        if done.returncode:
            reason = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise ImageError(f"mmdebstrap could not make debian:bookworm-slim: {reason}")
        names["debian:bookworm-slim"] = '["bash"]'
    return names


def busybox_archive(busybox: Path) -> bytes:
    """The files of the busybox image."""
    listing = subprocess.run([str(busybox), "--list"], capture_output=True, text=True, check=True).stdout
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777), ("var", 0o755)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        contents = {"bin/busybox": (busybox.read_bytes(), 0o755)}
        contents.update({name: (text.encode(), 0o644) for name, text in BUSYBOX_ACCOUNTS.items()})
        for name, (content, mode) in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
        for name in sorted(set(listing.split()) - {"busybox"}):
            entry = tarfile.TarInfo("bin/" + name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, "busybox", 0o777
            archive.addfile(entry)
    return buffer.getvalue()


def import_image(machine: Machine, name: str, command: str) -> None:
    archive = f"/tmp/{name.partition(':')[0]}.tar"
    words = f"docker import --change 'CMD {command}' {archive} {name} && rm {archive}"
    done = machine.execute(words, IMPORT_SECONDS)
    if done.exit_code:
        raise ImageError(f"{name} could not be imported: {done.stderr.decode('utf-8', 'replace').strip()}")
