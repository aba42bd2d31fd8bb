"""VMs without namespaces: their homes are directories of the host, and paths in commands are rewritten.

As a script it is the forced command of such a VM's sshd: `paths.py DIRECTORY USER` runs the client's command.
It imports nothing of ours, so that it runs by its path with `python -I`.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys

HOMES = {"root": "root", "plato": "home/plato"}
MAPPED = ("home/plato", "root", "run/plato")
SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
)
NSS_WRAPPERS = (
    "/usr/lib/*/libnss_wrapper.so*",
    "/usr/lib64/libnss_wrapper.so*",
    "/usr/l*/lib/libnss_wrapper.so*",
)


def map_paths(text: str, directory: str) -> str:
    """/home/plato, /root and /run/plato in a text as they are on the host. Paths of the host stay."""
    pattern = rf"(?<![\w./~-])(?!{re.escape(directory)})/({'|'.join(MAPPED)})(?![\w.-])"
    return re.sub(pattern, lambda match: f"{directory}/{match.group(1)}", text)


def find_nss_wrapper() -> str | None:
    """The library that lets sshd see the VM's users without their being the host's."""
    for pattern in NSS_WRAPPERS:
        for path in sorted(glob.glob(pattern)):
            return path
    return None


def main() -> None:
    """Become the command of an SSH session, or a login shell, in the home of that user."""
    directory, user = sys.argv[1:3]
    home = os.path.join(directory, HOMES[user])
    shell = shutil.which("bash") or "/bin/sh"
    command = os.environ.pop("SSH_ORIGINAL_COMMAND", "")
    environment = {**os.environ, "HOME": home, "USER": user, "LOGNAME": user, "SHELL": shell}
    os.chdir(home)
    if command == "internal-sftp":
        server = next((path for path in SFTP_SERVERS if os.path.exists(path)), "sftp-server")
        os.execvpe(server, [server, "-d", home], environment)
    if command:
        os.execvpe(shell, [shell, "-c", map_paths(command, directory)], environment)
    os.execvpe(shell, ["-" + os.path.basename(shell)], environment)


if __name__ == "__main__":
    main()
