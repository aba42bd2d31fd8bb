"""Surroundings that allow or have less: no namespaces, no /etc/hosts, no home, a shell that refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import BLANK, COMMAND_SECONDS, ROOT, SIMULATOR, Desk, Result, part
from localplato.machine import CONTAINER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = ROOT / "tests" / "local_plato.py"
HOME = "/srv/somebody"
ORDINARY = 64_123
# What a container has of root's rights unless its maker says otherwise.
CONTAINER_RIGHTS = (
    "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,"
    "+sys_chroot,+mknod,+audit_write,+setfcap"
)
# The files of this machine, read-only below a layer that takes all that is written. What another file system
# has of the tests is mounted, too.
SET_UP = """\
set -e
mount -t tmpfs -o mode=755 tmpfs "$1"
cd "$1"
shift
mkdir written work root
mount -t overlay -o lowerdir=/,upperdir=written,workdir=work overlay root
mount -t proc proc root/proc
mount --rbind /dev root/dev
for place do
    [ -e "root$place" ] || { mkdir -p "root$place"; mount --bind -o ro "$place" "root$place"; }
done
echo ready
exec sleep infinity
"""


class Surroundings:
    """A machine with all files of this one, on which nothing can change those."""

    def __init__(self, place: Path, process: subprocess.Popen[str]) -> None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        self.pid = int(children)
        self.place = place
        self.inside = Path(f"/proc/{self.pid}/root{place}")
        self.root = self.inside / "root"
        self.enter = [part("nsenter", "util-linux"), f"--target={self.pid}", "--mount", "--pid"]
        self.enter += [part("chroot", "coreutils"), str(place / "root"), "env", "-i"]
        self.python = part("/usr/bin/python3", "python3")

    def run(
        self, *words: str, rights: tuple[str, ...] = (), environment: tuple[str, ...] = (f"HOME={HOME}",)
    ) -> Result:
        """Run a command there to its end; `rights` is a prefix that takes some away."""
        known = [f"PATH={os.environ['PATH']}:/usr/sbin:/sbin", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1"]
        done = subprocess.run(
            [*self.enter, *known, *environment, *rights, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def local_plato(self, *words: str, **options: tuple[str, ...]) -> Result:
        return self.run(self.python, str(COMMAND), *words, **options)

    def settle(self, uid: int) -> None:
        """A home of that user, with the example simulator in it; and an entry for anybody but root."""
        if uid:
            with open(self.root / "etc" / "passwd", "a") as file:
                file.write(f"somebody:x:{uid}:{uid}::{HOME}:/bin/sh\n")
        script = 'mkdir -p "$1" && cp -r "$2" "$1/work" && chown -R "$3:$3" "$1"'
        assert self.run("sh", "-c", script, "sh", HOME, str(SIMULATOR), str(uid)).code == 0

    def changes(self) -> set[str]:
        """Every path that was made, changed or removed there."""
        found = set()
        for path in (self.inside / "written").rglob("*"):
            name = path.relative_to(self.inside / "written")
            before, now = Path("/", name), path.lstat()
            if before.is_dir() and path.is_dir() and not path.is_symlink():
                same = before.stat()
                if (same.st_mode, same.st_uid, same.st_gid) == (now.st_mode, now.st_uid, now.st_gid):
                    continue  # only something in it has
            found.add(f"/{name}")
        return found


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[Surroundings]:
    """Surroundings whose processes end with the test."""
    if os.geteuid() != 0:
        pytest.skip("only root can make such surroundings")
    place = tmp_path / "machine"
    place.mkdir()
    part("mount", "mount")
    words = [part("unshare", "util-linux"), "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SET_UP]
    needed = (str(ROOT), sys.base_prefix)
    process = subprocess.Popen(
        [*words, "sh", str(place), *needed],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _, reason = process.communicate()
        pytest.skip(f"even root may not mount here: {reason.strip()}")
    yield Surroundings(place, process)
    process.kill()
    process.communicate()


@pytest.fixture
def setpriv() -> Callable[[int], tuple[str, ...]]:
    """The prefix that leaves a user what a container leaves it."""
    words = (part("setpriv", "util-linux"), f"--bounding-set={CONTAINER_RIGHTS}", "--inh-caps=-all")
    return lambda uid: (*words, f"--reuid={uid}", f"--regid={uid}", "--clear-groups")


@pytest.mark.long
@pytest.mark.parametrize("uid", [0, ORDINARY], ids=["root", "ordinary"])
def test_without_namespaces_nothing_of_the_host_is_reached(
    surroundings: Surroundings, setpriv: Callable[[int], tuple[str, ...]], uid: int
) -> None:
    part("ssh-keygen", "openssh-client")
    part("sshd", "openssh-server")
    surroundings.settle(uid)
    rights = setpriv(uid)
    refused = surroundings.run("unshare", "--mount", *(["--user"] if uid else []), "true", rights=rights)
    assert refused.code != 0
    before = surroundings.changes()

    def run(command: str, *words: str) -> Result:
        return surroundings.local_plato("run", command, "-w", f"{HOME}/work", *words, rights=rights)

    started = run("start", "-c")
    assert started.code == 0, started
    first, *others = started.err.splitlines()
    assert "runs no commands and has no SSH" in first
    assert f"{'--user root ' if uid else ''}{CONTAINER_OPTIONS} ..." in first.partition("docker run ")[2]
    (warning,) = [line for line in others if "The SSH key could not be installed" in line]
    assert "the VM runs no processes" in warning
    assert "Heartbeat:   running" in started.out
    assert "SSH:" not in started.out

    status = run("status")
    assert status.code == 0, status
    assert "VM Status:   running" in status.out
    for command, words, code, reason in (
        ("sync", (), 6, "the VM runs no processes"),
        ("exec", ("touch /home/plato/made /root/made",), 6, "the VM runs no processes"),
        ("start-services", ("--via", "sync"), 6, "the VM runs no processes"),
        ("ssh", ("touch /root/made",), 1, "This sandbox has no SSH"),
    ):
        result = run(command, *words)
        assert (result.code, reason in result.err) == (code, True), result
    assert run("stop").code == 0

    again = run("start", "--blank", "--service", "myapp", "--json")
    assert again.code == 0, again
    assert again.err.splitlines()[0] == first
    assert again.document["ssh_command"] is None
    assert run("stop").code == 0
    made = surroundings.changes() - before
    assert {path for path in made if not path.startswith(f"{HOME}/")} == set()
    assert surroundings.local_plato("down", "--purge", rights=rights).code == 0
    assert not (surroundings.root / HOME[1:] / ".plato-local").exists()


@pytest.mark.long
def test_without_names_ssh_goes_to_an_address(surroundings: Surroundings) -> None:
    part("sshd", "openssh-server")
    ssh = part("ssh", "openssh-client")
    surroundings.settle(0)
    for name in ("hosts", "resolv.conf", "nsswitch.conf"):
        (surroundings.root / "etc" / name).unlink(missing_ok=True)
    (surroundings.root / "etc" / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
    assert surroundings.run(part("getent", "libc-bin"), "hosts", "localhost").code != 0
    started = surroundings.local_plato("run", "start", "-w", f"{HOME}/work", "-b", "--service", "x", "--json")
    assert started.code == 0, started
    words = started.document["ssh_command"].split()
    assert words[:2] == ["ssh", "-F"]
    there = surroundings.run(ssh, *words[1:], "echo there")
    assert (there.code, there.out) == (0, "there\n"), there
    assert "127.0.0.1:" in surroundings.local_plato("status").out.partition("Gateway:")[2].splitlines()[0]
    assert surroundings.local_plato("run", "stop", "-w", f"{HOME}/work").code == 0


def test_without_a_home_a_sentence_says_so(surroundings: Surroundings) -> None:
    rights = (part("setpriv", "util-linux"), "--reuid=54321", "--regid=54321", "--clear-groups")
    for words in (("status",), ("run", "status"), ("down", "--purge")):
        result = surroundings.local_plato(*words, rights=rights, environment=())
        assert (result.code, result.out) == (1, ""), result
        assert result.err == (
            "local plato: ~/.plato-local: uid 54321 has no home here; set HOME to a directory of yours\n"
        )
    place = ("PLATO_LOCAL_HOME=/tmp/of-54321",)
    assert surroundings.local_plato("up", rights=rights, environment=place).code == 0
    assert surroundings.local_plato("down", "--purge", rights=rights, environment=place).code == 0


@pytest.mark.sampled
@pytest.mark.parametrize(("shell", "package"), [("nologin", "login"), ("false", "coreutils")])
def test_ssh_works_for_a_user_whose_shell_refuses(desk: Desk, shell: str, package: str) -> None:
    """OpenSSH runs a ProxyCommand by $SHELL, which `sudo -u` and services set to the user's login shell."""
    part("sshd", "openssh-server")
    desk.environment["SHELL"] = part(shell, package)
    started = desk.good(*BLANK, "--json")
    assert "SSH" not in started.err
    words = shlex.split(started.document["ssh_command"])
    assert desk.good(command=[*words, "echo there"]).out == "there\n"
    assert " env SHELL=/bin/sh ssh -F ~/.plato/" in desk.good("status").out
    desk.hang_up()
    assert desk.good("ssh", "echo there").out == "there\n"
    assert "through the API" not in desk.good("sync", "--via", "ssh").err
