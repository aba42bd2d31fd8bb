"""The users of a VM: root and plato, beside the system accounts of the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

PLATO_UID = 1000
LAST_SYSTEM_UID = 999
NOBODY_UID = 65534
ROOT_SHELL = "/run/plato/root-shell"


@dataclass(frozen=True)
class Account:
    uid: int
    home: str


ACCOUNTS = {"root": Account(0, "/root"), "plato": Account(PLATO_UID, "/home/plato")}


def shell() -> str:
    """The login shell of both users."""
    return "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"


def environment(user: str, path: str) -> dict[str, str]:
    """The environment of a login of that user, without a terminal."""
    return {
        "HOME": ACCOUNTS[user].home,
        "LOGNAME": user,
        "PATH": path,
        "SHELL": shell(),
        "USER": user,
        "LANG": "C.UTF-8",
    }


def system_lines(path: str, replaced: tuple[str, ...]) -> list[str]:
    """The host's system accounts or groups, without those that a VM defines itself."""
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file.read().splitlines():
            fields = line.split(":")
            if len(fields) < 3 or not fields[2].isdigit() or fields[0] in replaced:
                continue
            if 0 < int(fields[2]) <= LAST_SYSTEM_UID or int(fields[2]) == NOBODY_UID:
                lines.append(line)
    return lines


def root_shell_text() -> str:
    """The login shell of root where sshd runs as uid 1000: a namespace further in, the same user is uid 0."""
    become = f"exec unshare --user --map-root-user -- {shell()}"
    return f"""#!/bin/sh\n[ "$#" -gt 0 ] || set -- -l\nSHELL={shell()} {become} "$@"\n"""


def passwd_text(one_uid: bool) -> str:
    """/etc/passwd of a VM.

    With `one_uid` (an ordinary user's VM) sshd runs as uid 1000 and lets in only that uid: both names lead to
    it. The shell of root then makes itself uid 0, which is called root too.
    """
    sh = shell()
    root = f"root:x:0:0:root:/root:{sh}"
    plato = f"plato:x:{PLATO_UID}:{PLATO_UID}:Plato:/home/plato:{sh}"
    root_over_ssh = f"root:x:{PLATO_UID}:{PLATO_UID}:root over SSH:/root:{ROOT_SHELL}"
    ours = [plato, root_over_ssh, root] if one_uid else [root, plato]
    system = system_lines("/etc/passwd", ("root", "plato"))
    if not any(line.startswith("sshd:") for line in system):
        system.append("sshd:x:74:65534:sshd:/run/sshd:/usr/sbin/nologin")
    return "\n".join([*ours, *system, ""])


def group_text(one_uid: bool) -> str:
    """/etc/group of a VM. With `one_uid` nothing can be given to a group tty: there is none."""
    ours = ["root:x:0:", f"plato:x:{PLATO_UID}:"]
    replaced = ("root", "plato", "tty") if one_uid else ("root", "plato")
    return "\n".join([*ours, *system_lines("/etc/group", replaced), ""])


def shadow_text(passwd: str) -> str:
    """/etc/shadow of a VM: nobody has a password, nobody is locked."""
    names = dict.fromkeys(line.split(":")[0] for line in passwd.splitlines())
    return "".join(f"{name}:*:19000:0:99999:7:::\n" for name in names)


def account_files(hostname: str, one_uid: bool) -> Iterator[tuple[str, str, int]]:
    """The files of a VM's /etc: name, text, mode."""
    passwd = passwd_text(one_uid)
    yield "passwd", passwd, 0o644
    yield "group", group_text(one_uid), 0o644
    yield "shadow", shadow_text(passwd), 0o600
    yield "hostname", hostname + "\n", 0o644
    yield (
        "hosts",
        f"127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n",
        0o644,
    )
