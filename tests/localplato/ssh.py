"""SSH into a VM: OpenSSH's own sshd, started inside the VM for each connection, and the authorized keys."""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import socket
import struct
from pathlib import Path

from .accounts import PLATO_UID, ROOT_SHELL, root_shell_text
from .machine import PATH, Machine, MachineError

DIRECTORY = "/run/plato"
KEY_SECONDS = 30.0
MAXIMUM_KEY_LENGTH = 16_384
CONFIG = f"""\
HostKey {DIRECTORY}/ssh_host_ed25519_key
PidFile none
AuthorizedKeysFile .ssh/authorized_keys
PubkeyAuthentication yes
PasswordAuthentication no
ChallengeResponseAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
X11Forwarding no
AllowTcpForwarding yes
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
SetEnv PATH={PATH}
LogLevel VERBOSE
"""
# Reads the key from standard input; a key that is there already is not written twice.
ADD_KEY_SCRIPT = """\
umask 077
key=$(cat)
mkdir -p "$HOME/.ssh" || exit
file=$HOME/.ssh/authorized_keys
touch "$file" || exit
grep -qxF -e "$key" "$file" || printf '%s\\n' "$key" >> "$file"
"""


def find_sshd() -> str | None:
    """The absolute path of sshd, which it needs to start itself again."""
    return shutil.which("sshd", path=PATH + ":" + os.environ.get("PATH", ""))


def sshd_problem() -> str | None:
    """Why there is no SSH into VMs here, or None."""
    if find_sshd() is None:
        return "there is no sshd on this host, so SSH into VMs is off; install the package openssh-server"
    if shutil.which("ssh-keygen") is None:
        return "the ssh-keygen command is missing, so SSH into VMs is off; install the package openssh-client"
    return None


def public_key_problem(key: str) -> str | None:
    """Why a text is not one public key in OpenSSH's format, or None."""
    fields = key.split()
    if len(key) > MAXIMUM_KEY_LENGTH or len(key.strip().splitlines()) != 1 or len(fields) < 2:
        return "not one line of an OpenSSH public key"
    try:
        blob = base64.b64decode(fields[1], validate=True)
        (length,) = struct.unpack_from("!I", blob)
    except (binascii.Error, struct.error):
        return "the key is not valid base64"
    if blob[4 : 4 + length] != fields[0].encode():
        return f"the key's data is not of type {fields[0]}"
    return None


def add_key(machine: Machine, user: str, key: str) -> str:
    """Let that key log in as that user; what the VM printed. Raises MachineError."""
    result = machine.execute(ADD_KEY_SCRIPT, KEY_SECONDS, user, (key.strip() + "\n").encode())
    if result.exit_code != 0:
        reason = result.stderr.decode("utf-8", "replace").strip()
        raise MachineError(f"the key could not be written: {reason}")
    return result.stdout.decode("utf-8", "replace")


def prepare(machine: Machine) -> None:
    """Give the VM its host key and the configuration of sshd, once. Raises MachineError."""
    directory = machine.directory / "run" / "plato"
    with machine.ssh_lock:
        if (directory / "sshd_config").exists():
            return
        directory.mkdir(mode=0o755, exist_ok=True)
        if not (directory / "ssh_host_ed25519_key").exists():
            make_host_key(machine)
        shell = directory / Path(ROOT_SHELL).name
        shell.write_text(root_shell_text())
        shell.chmod(0o755)
        (directory / "sshd_config").write_text(CONFIG)


def make_host_key(machine: Machine) -> None:
    """The VM makes its own host key: ssh-keygen wants to know the user that it runs as."""
    path = f"{DIRECTORY}/ssh_host_ed25519_key"
    result = machine.execute(f"ssh-keygen -q -t ed25519 -N '' -C {machine.hostname} -f {path}", KEY_SECONDS)
    if result.exit_code != 0:
        raise MachineError(f"ssh-keygen failed: {result.stderr.decode('utf-8', 'replace').strip()}")


def server_command(machine: Machine) -> list[str]:
    """The command that serves one SSH connection on its standard input and output."""
    sshd = find_sshd()
    if sshd is None:
        raise MachineError(sshd_problem() or "no sshd")
    command = [sshd, "-i", "-e", "-f", f"{DIRECTORY}/sshd_config"]
    if machine.one_uid:
        # Without root sshd lets in only the user that it runs as, and that cannot be the namespace's uid 0.
        return ["unshare", "--user", f"--map-user={PLATO_UID}", f"--map-group={PLATO_UID}", "--", *command]
    return command


def connect(machine: Machine) -> socket.socket:
    """Start an sshd in the VM for one connection; our end of it. Raises MachineError."""
    prepare(machine)
    ours, theirs = socket.socketpair()
    with theirs, open(machine.directory / "sshd.log", "ab") as log:
        try:
            machine.spawn(server_command(machine), theirs.fileno(), theirs.fileno(), log.fileno())
        except MachineError:
            ours.close()
            raise
    return ours
