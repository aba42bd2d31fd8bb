#!/usr/bin/env python3
"""Set up what the tests need and run them.

    python3 tests/run.py [PYTEST ARGUMENTS]   a virtual environment with the `test` group, then pytest
    python3 tests/run.py --all                the same; on Debian, as root, it first installs the system's
                                              parts, a test that would skip for a missing part fails, and
                                              the long tests run too
    python3 tests/run.py -m soak              every fault, crash point and race instead of a sample, long
                                              fuzzing, and how many of each there were
    python3 tests/run.py --check              linter, formatter's check and type checker
    python3 tests/run.py --latest             the newest versions of everything, instead of those pinned in
                                              tests/constraints*.txt (with the other arguments)
    python3 tests/run.py --pin                pin the newest versions from now on: write those files anew

The virtual environment is .venv-test in the repository, made anew when pyproject.toml or the pins change;
where the repository cannot be written, it is in a directory of the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from localplato import debian

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PACKAGES = {
    # what must be there: the Debian package that brings it
    "/usr/sbin/sshd": "openssh-server",
    "/usr/bin/ssh": "openssh-client",
    "/usr/bin/openssl": "openssl",
    "/usr/bin/git": "git",
    "/usr/bin/unshare": "util-linux",
    "/usr/bin/tmux": "tmux",
    "/usr/bin/zsh": "zsh",
    "/usr/bin/fish": "fish",
    "/usr/bin/strace": "strace",
    "/usr/sbin/runuser": "util-linux",
    "/usr/share/postgresql-common": "postgresql-common",
    "/usr/lib/postgresql": "postgresql",
    "/usr/sbin/mariadbd": "mariadb-server-core",
    "/usr/bin/mariadb-dump": "mariadb-client",
    "/usr/lib/python3/dist-packages/pip": "python3-pip",
    "/usr/sbin/dockerd": "docker.io",
    "/usr/sbin/iptables": "iptables",
    "/usr/bin/mmdebstrap": "mmdebstrap",
    "/usr/bin/busybox": "busybox-static",
    "/usr/bin/chromium": "chromium",
    "/usr/share/doc/libatomic1": "libatomic1",  # for the Node.js of Playwright's driver
    "/usr/share/fonts/truetype/dejavu": "fonts-dejavu-core",
}
# What Debian has in the release after 12: Compose v2, whose package holds one static program, and a Python
# that is stricter in TLS.
LATER_RELEASE = "trixie"
LATER_PYTHON = "python3.13"
COMPOSE_PACKAGE = "docker-compose"
COMPOSE_IN_PACKAGE = "usr/libexec/docker/cli-plugins/docker-compose"
CHECKED = ["plato_sandbox.py", "tests"]
# The pinned versions, and the groups of pyproject.toml that they are for.
PINS = {
    "constraints.txt": ("test", "setup", "sdk", "ways"),
    "constraints-newest-sdk.txt": ("newest-sdk", "setup"),
}
OLDEST_PYTHON = "3.9"
SDK_GROUPS = {"2.0.40": ("sdk", "constraints.txt"), "2.187.0": ("newest-sdk", "constraints-newest-sdk.txt")}


def main(arguments: list[str]) -> int:
    own = ("--all", "--check", "--latest", "--pin")
    everything = "--all" in arguments
    rest = [argument for argument in arguments if argument not in own]
    if "--pin" in arguments:
        return pin()
    if "--latest" in arguments:
        os.environ["PLATO_TESTS_LATEST"] = "1"
    if everything:
        install_system_packages()
        install_compose()
        install_later_python()
        # Once for all test processes, which would wait for one another.
        run([sys.executable, str(ROOT / "tests" / "local_plato.py"), "images"], "no images for Docker in VMs")
    python = virtual_environment()
    if "--check" in arguments:
        return check(python)
    environment = {**os.environ, "PLATO_TESTS_ALL": "1" if everything else ""}
    if not any(argument.startswith("-n") for argument in rest):
        rest = ["-n", str(min(4, os.cpu_count() or 1) * 5 // 2), "--dist", "loadgroup", *rest]
    return subprocess.run([python, "-m", "pytest", *rest], cwd=ROOT, env=environment, check=False).returncode


def check(python: str) -> int:
    """Lint, format and types, all three even when one fails."""
    commands = (
        ["ruff", "check", *CHECKED],
        ["ruff", "format", "--check", *CHECKED],
        ["mypy", *CHECKED],
    )
    failed = [
        words[0]
        for words in commands
        if subprocess.run([python, "-m", *words], cwd=ROOT, check=False).returncode
    ]
    return 1 if failed else 0


def pin() -> int:
    """Write the constraints anew: the newest versions, with all that they bring along, on every Python that
    the tests run on."""
    with tempfile.TemporaryDirectory() as place:
        run([sys.executable, "-m", "venv", place], "python3 -m venv failed")
        run([f"{place}/bin/python", "-m", "pip", "install", "--quiet", "uv"], "uv could not be installed")
        for name, groups in PINS.items():
            command = [f"{place}/bin/uv", "pip", "compile", "--quiet", "--universal", "--upgrade"]
            command += ["--python-version", OLDEST_PYTHON, "--no-annotate", "--no-header"]
            command += [f"--group={ROOT / 'pyproject.toml'}:{group}" for group in groups]
            run([*command, "--output-file", str(ROOT / "tests" / name)], "the versions do not fit together")
    return 0


def pinned(name: str = "constraints.txt") -> list[str]:
    """The words that keep pip to the pinned versions; none with --latest."""
    if os.environ.get("PLATO_TESTS_LATEST"):
        return []
    return ["--constraint", str(ROOT / "tests" / name)]


def sdk_words(release: str) -> list[str]:
    """The words for `pip install` that bring a release of the SDK with all it needs, in pinned versions."""
    group, name = SDK_GROUPS[release]
    return [*pinned(name), f"--group={ROOT / 'pyproject.toml'}:{group}"]


def pins_mark() -> str:
    """What an environment depends on: the groups of pyproject.toml and their pins, or the day."""
    texts = [(ROOT / "pyproject.toml").read_bytes(), sys.version.encode(), str(ROOT).encode()]
    if pinned():
        texts += [(ROOT / "tests" / name).read_bytes() for name in PINS]
    else:
        texts += [time.strftime("%Y-%m-%d").encode()]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def virtual_environment() -> str:
    """The interpreter of a virtual environment that holds the `test` group of pyproject.toml."""
    mark = pins_mark()
    place = environment_place()
    stamp, python = place / "stamp", place / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == mark and python.exists():
        return str(python)
    shutil.rmtree(place, ignore_errors=True)
    print(f"Setting up {place} ...", file=sys.stderr, flush=True)
    run(
        [sys.executable, "-m", "venv", str(place)],
        "python3 -m venv failed; on Debian: apt-get install python3-venv",
    )
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned()]
    run(
        [*pip, "--upgrade", "pip>=25.3"],
        "pip could not be brought up to date; is the package index reachable?",
    )
    run([*pip, "--group", f"{ROOT / 'pyproject.toml'}:test"], "the test group could not be installed")
    stamp.write_text(mark)
    return str(python)


def environment_place() -> Path:
    return ROOT / ".venv-test" if os.access(ROOT, os.W_OK) else cache_directory() / "venv"


def cache_directory() -> Path:
    """Where what the tests need is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).absolute() / "plato-sandbox-tests"


def install_system_packages() -> None:
    """Install the Debian packages of the parts that are missing; needs root."""
    missing = sorted({package for path, package in SYSTEM_PACKAGES.items() if not Path(path).exists()})
    if not venv_works():
        missing.append("python3-venv")
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"--all needs these Debian packages, and root to install them: {' '.join(missing)}")
    print(f"Installing {' '.join(missing)} ...", file=sys.stderr, flush=True)
    keep_services_from_starting()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-q"], "apt-get update failed", environment)
    run(
        ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], "apt-get failed", environment
    )


def install_compose() -> None:
    """Put the Compose plugin into ~/.docker, unless Docker has one. apt checks whether it is Debian's."""
    version = ["docker", "compose", "version"]
    if subprocess.run(version, capture_output=True, check=False).returncode == 0:
        return
    print("Installing Docker Compose ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = later_source(place)
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (place / directory).mkdir(parents=True)
        settings = {
            "Dir::Etc::SourceList": source,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": place / "state",
            "Dir::Cache": place / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
        run([*apt, "update"], "apt-get update failed")
        run([*apt, "download", COMPOSE_PACKAGE], "the download failed", directory=place)
        (package,) = place.glob("*.deb")
        run(["dpkg-deb", "--extract", str(package), str(place / "root")], "the package cannot be unpacked")
        plugins = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        partial = plugins / f".new-{os.getpid()}"
        shutil.copy(place / "root" / COMPOSE_IN_PACKAGE, partial)
        partial.rename(plugins / "docker-compose")
    run(version, "Docker does not take the Compose plugin")


def install_later_python() -> None:
    """Put the Python of a later Debian at the end of PATH, unless there is one.

    Only its files are fetched; it runs with libraries of its own.
    """
    if shutil.which(LATER_PYTHON) is None:
        place = cache_directory() / f"{LATER_PYTHON}-{platform.machine()}"
        if not place.exists():
            make_later_python(place)
        os.environ["PATH"] += os.pathsep + str(place / "bin")


def make_later_python(place: Path) -> None:
    print(f"Fetching {LATER_PYTHON} ...", file=sys.stderr, flush=True)
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "bin").mkdir(parents=True)
    own_mounts = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*own_mounts, "mmdebstrap", "--quiet", "--mode=root", "--variant=extract"]
    command += [f"--include={LATER_PYTHON}", LATER_RELEASE, str(new / "root"), str(later_source(new))]
    run(command, f"mmdebstrap could not fetch {LATER_PYTHON}")
    # Python looks for its modules beside the name that it is started by, which is this script's.
    (loader,) = (new / "root").glob("usr/lib/*/ld-linux*.so.*")
    (new / "lib").symlink_to("root/usr/lib")
    libraries = place / loader.parent.relative_to(new)
    words = f'"{libraries / loader.name}" --library-path "{libraries}" --argv0 "$0"'
    script = new / "bin" / LATER_PYTHON
    script.write_text(f'#!/bin/sh\nexec {words} "{place}/root/usr/bin/{LATER_PYTHON}" "$@"\n')
    script.chmod(0o755)
    new.rename(place)


def later_source(place: Path) -> Path:
    """A file of apt's sources for that later Debian, made in a directory."""
    source = debian.source_file(LATER_RELEASE, place)
    if source is None:
        run(["apt-get", "update", "-q"], "apt-get update failed")
        source = debian.source_file(LATER_RELEASE, place)
    if source is None:
        sys.exit(f"apt knows no mirror of Debian, which --all needs for packages of {LATER_RELEASE}")
    return source


def venv_works() -> bool:
    return (
        subprocess.run(
            [sys.executable, "-c", "import ensurepip"], capture_output=True, check=False
        ).returncode
        == 0
    )


def keep_services_from_starting() -> None:
    """The tests start their own servers on loopback; the packages' services and clusters stay down."""
    settings = Path("/etc/postgresql-common/createcluster.conf")
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("create_main_cluster = false\n")
    policy = Path("/usr/sbin/policy-rc.d")
    if not policy.exists():
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)


def run(
    command: list[str], failure: str, environment: dict[str, str] | None = None, directory: Path | None = None
) -> None:
    """Run a command of the setup; its output goes to stderr, its failure ends everything."""
    done = subprocess.run(command, env=environment, cwd=directory, stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        sys.exit(f"{failure} (exit {done.returncode})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
