#!/usr/bin/env python3
"""Compares our way through the gateway with others: `python3 tests/bench/ssh.py [--megabytes N]`.

The same OpenSSH client, config and VM by three ways: our ProxyCommand, `openssl s_client` as ProxyCommand
to the same gateway (which verifies the certificate too), and a direct TCP connection to an sshd that
listens inside the VM. The VM of a local Plato has a network of its own, so for that `ssh` itself runs in
it, by nsenter; where that cannot be, the direct way is left out. Measured are the time to the first byte
of a command, alone and over a connection that is there already, and the throughput both ways: unhindered,
where all that encrypts shares the CPUs of this host, and offered at the rate of a line of 1 Gbit/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from localplato import LocalPlato  # noqa: E402
from localplato.accounts import PLATO_UID  # noqa: E402

from bench import shared  # noqa: E402
from bench.shared import Contestants, Desk, Measured  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS = "our ProxyCommand"
OPENSSL = "`openssl s_client`"
DIRECT = "direct"
BEFORE = "the ProxyCommand before"
ALONE = ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
SSHD_PORT = 2222
LINE_BYTES = 118_000_000  # what TCP carries over a line of 1 Gbit/s, in a second
# Writes so many bytes at such a rate.
PACED = """
import os, sys, time
size, rate = int(sys.argv[1]), int(sys.argv[2])
sent, began, data = 0, time.perf_counter(), bytes(1 << 18)
while sent < size:
    time.sleep(max(0.0, sent / rate - (time.perf_counter() - began)))
    sent += os.write(1, data[: size - sent])
"""


class Way:
    """One way to the VM: the words of `ssh` before its host, all with the config that `start` wrote."""

    def __init__(
        self, desk: Desk, prefix: list[str], config: str, host: str, options: Sequence[str] = ()
    ) -> None:
        self.desk = desk
        self.start = [*prefix, "ssh", "-F", config]
        self.host = host
        self.options = list(options)
        self.sharing: list[str] = []

    def command(self, line: str, *, alone: bool) -> list[str]:
        return [*self.start, *(ALONE if alone else self.sharing), *self.options, self.host, line]

    def first_byte(self, *, alone: bool) -> Measured:
        """Seconds until a command on the VM has been heard."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self.command("echo", alone=alone),
            env=self.desk.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert process.stdout is not None
        found = process.stdout.read(1)
        seconds = time.perf_counter() - began
        if not found:
            raise RuntimeError(" ".join(process.communicate()[1].decode(errors="replace").split()))
        process.stdout.close()
        process.wait()
        return Measured(seconds)

    def share(self, place: Path) -> None:
        """Open the connection that later ones are to use: ours as its config says, another the same way."""
        if self.options or self.start[0] != "ssh":
            self.sharing = ["-o", f"ControlPath={place}"]
        self.first_byte(alone=False)

    def hang_up(self) -> None:
        words = [*self.start, *self.sharing, "-O", "exit", self.host]
        subprocess.run(words, env=self.desk.environment, capture_output=True, check=False)

    def upload(self, size: int) -> Measured:
        return self.transfer("cat > /dev/null", ["head", "-c", str(size), "/dev/zero"])

    def download(self, size: int) -> Measured:
        return self.transfer(f"head -c {size} /dev/zero", ["true"])

    def paced_upload(self, size: int) -> Measured:
        return self.transfer("cat > /dev/null", paced(size))

    def paced_download(self, size: int) -> Measured:
        return self.transfer(shlex.join(paced(size)), ["true"])

    def transfer(self, line: str, source: list[str]) -> Measured:
        """Seconds of a command on the VM that gets what another one says here."""
        began = time.perf_counter()
        with subprocess.Popen(source, stdout=subprocess.PIPE) as feeding:
            done = subprocess.run(
                self.command(line, alone=True),
                env=self.desk.environment,
                stdin=feeding.stdout,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
            seconds = time.perf_counter() - began
        if done.returncode or feeding.returncode:
            raise RuntimeError(" ".join(done.stderr.decode(errors="replace").split()))
        return Measured(seconds)


def paced(size: int) -> list[str]:
    return ["python3", "-I", "-S", "-c", PACED, str(size), str(LINE_BYTES)]


def openssl_proxy(desk: Desk, job_id: str) -> list[str]:
    """The option of `ssh` that has openssl carry the connection."""
    host, port = (desk.environment[name] for name in ("PLATO_GATEWAY_HOST", "PLATO_GATEWAY_PORT"))
    name = f"{job_id}--22.{host}"
    words = ["openssl", "s_client", "-quiet", "-verify_quiet", "-connect", f"{host}:{port}"]
    words += ["-servername", name, "-verify_return_error", "-verify_hostname", name]
    words += ["-CAfile", desk.environment["SSL_CERT_FILE"]]
    return ["-o", f"ProxyCommand={shlex.join(words)} 2>/dev/null"]


def direct_prefix(plato: LocalPlato, way: Way) -> list[str] | None:
    """Start an sshd in the VM, with the VM's own settings; the words that put a command into its network."""
    (machine,) = plato.machines()
    pid = machine["pid"]
    if shutil.which("nsenter") is None or pid is None or same_network(pid):
        return None
    # As the gateway starts it: without root, sshd lets in only the user that it runs as.
    mapped = f"unshare --user --map-user={PLATO_UID} --map-group={PLATO_UID} --" if os.geteuid() else ""
    found = way.command(
        "sshd=$(command -v sshd || echo /usr/sbin/sshd); "
        f"{mapped} $sshd -f /run/plato/sshd_config -p {SSHD_PORT} -o ListenAddress=127.0.0.1",
        alone=True,
    )
    subprocess.run(found, env=way.desk.environment, stdin=subprocess.DEVNULL, check=True)
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", *user, "--net", "--target", str(pid), "--"]


def same_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")


def make_ways(plato: LocalPlato, desk: Desk) -> dict[str, Way]:
    state: dict[str, Any] = json.loads(desk.output("start", "--blank", "--service", "bench", "--json"))
    config, host = state["ssh_config_path"], state["ssh_host"]
    ours = Way(desk, [], config, host)
    openssl = Way(desk, [], config, host, openssl_proxy(desk, state["job_id"]))
    ways = {OURS: ours, OPENSSL: openssl}
    prefix = direct_prefix(plato, ours)
    if prefix is None:
        print("The direct way is left out: the VM has no network of its own here.", file=sys.stderr)
        return ways
    to_sshd = ["-o", "ProxyCommand=none", "-o", "HostName=127.0.0.1", "-p", str(SSHD_PORT)]
    direct = Way(desk, prefix, config, host, to_sshd)
    try:
        direct.first_byte(alone=True)
    except RuntimeError as error:
        print(f"The direct way is left out: {error or 'the VM refuses it'}.", file=sys.stderr)
        return ways
    return {**ways, DIRECT: direct}


def ways_before(plato: LocalPlato, place: Path, product: Path) -> dict[str, Way]:
    """Those of another file, each with a VM of its own, from cached bytecode and without."""
    ways = {}
    for name, word in ((BEFORE, ""), (f"{BEFORE}, without bytecode", "1")):
        (place / f"p{word}").mkdir(parents=True)
        copy = shutil.copy(product, place / f"p{word}" / "plato_sandbox.py")
        desk = shared.our_desk(place / f"d{word}", plato, [sys.executable, str(copy)])
        desk.environment["PYTHONDONTWRITEBYTECODE"] = word
        state = json.loads(desk.output("start", "--blank", "--service", "bench", "--json"))
        ways[name] = Way(desk, [], state["ssh_config_path"], state["ssh_host"])
    return ways


def contest(ways: dict[str, Way], act: Callable[[Way], Measured]) -> Contestants:
    def contestant(way: Way) -> Callable[[], Measured]:
        return lambda: act(way)

    return {name: contestant(way) for name, way in ways.items()}


def throughput_table(size: int, results: dict[str, shared.Results]) -> str:
    rows = []
    for name, found in results.items():
        for way in (OURS, OPENSSL, DIRECT):
            seconds = [one.seconds for one in found.get(way, [])]
            if seconds:
                rates = [size / 1_000_000 / one for one in seconds]
                shares = [share(found, way, other) for other in (OPENSSL, DIRECT)]
                rows.append([f"{way}, {name}", shared.spread(rates, "{:.0f} MB/s"), *shares])
    return shared.markdown(["throughput", "median", f"of {OPENSSL}", f"of {DIRECT}"], rows)


def share(results: shared.Results, way: str, other: str) -> str:
    """The median of each turn's throughput as a part of another way's in the same turn."""
    pairs = zip(results[way], results.get(other, []))
    parts = [theirs.seconds / mine.seconds for mine, theirs in pairs]
    return f"{statistics.median(parts):.0%}" if parts else "-"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=0, help="to send and to receive (default: 1000)")


def main() -> int:
    options = shared.options_of(__doc__, add_options)
    before = os.getloadavg()
    size = (options.megabytes or (20 if options.quick else 1000)) << 20
    runs = options.runs
    with shared.patient_plato() as (place, plato):
        desk = shared.our_desk(place / "d", plato)
        ways: dict[str, Way] = {}
        throughput: dict[str, shared.Results] = {}
        try:
            ways = make_ways(plato, desk)
            others = ways_before(plato, place / "b", options.before) if options.before else {}
            ways.update(others)
            alone = shared.interleave(contest(ways, lambda way: way.first_byte(alone=True)), runs)
            for way in others.values():
                way.desk.quietly("stop")
            ways = {
                name: way for name, way in ways.items() if alone[name] and name in (OURS, OPENSSL, DIRECT)
            }
            for number, way in enumerate(ways.values()):
                way.share(place / f"s{number}")
            later = shared.interleave(contest(ways, lambda way: way.first_byte(alone=False)), runs)
            for label, act in {
                "up": lambda way: way.upload(size),
                "down": lambda way: way.download(size),
                "up, offered 118 MB/s": lambda way: way.paced_upload(size),
                "down, offered 118 MB/s": lambda way: way.paced_download(size),
            }.items():
                throughput[label] = shared.interleave(contest(ways, act), runs)
        finally:
            for way in ways.values():
                way.hang_up()
            desk.quietly("stop")
    print(shared.machine_line(f"medians of {runs} runs by turns, {size >> 20} MB each way", before))
    bases = [base for base in (OPENSSL, DIRECT) if base in ways]
    print(shared.times_table(alone, bases, "first byte, a connection of its own") + "\n")
    print(shared.times_table(later, bases, "first byte, over one that is there") + "\n")
    print(throughput_table(size, throughput))
    return 0


if __name__ == "__main__":
    sys.exit(main())
