"""Other releases of Debian, from the mirror that this system has its own packages from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# What apt knows about each list of packages that it has fetched: where it comes from, and the entry of its
# sources that names it, as `file:number`.
FIELDS = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(CODENAME)|$(SOURCESENTRY)"


def source_file(suite: str, directory: Path) -> Path | None:
    """Write a file of apt's sources for the main packages of a release: this system's own entry for Debian,
    with its mirror and its options. None where apt has no list of Debian's packages (yet).
    """
    command = ["apt-get", "indextargets", "--format", FIELDS, "Created-By: Packages"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return None
    for line in listed.splitlines():
        origin, label, component, codename, entry = line.split("|", 4)
        if (origin, label, component) == ("Debian", "Debian", "main") and "-" not in codename:
            path, _, number = entry.rpartition(":")
            file = directory / f"{suite}{Path(path).suffix}"
            file.write_text(for_suite(Path(path), int(number), suite))
            return file
    return None


def for_suite(path: Path, number: int, suite: str) -> str:
    """An entry of a file of apt's sources (a stanza of *.sources, else a line), for another release."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".sources":
        line = text.splitlines()[number - 1]
        return re.sub(r"^\s*deb\s+(\[[^]]*]\s+)?(\S+)\s.*$", rf"deb \1\2 {suite} main", line) + "\n"
    text = re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)
    stanza = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()][number - 1].strip("\n")
    for name, value in (("Types", "deb"), ("Suites", suite), ("Components", "main")):
        field = rf"^{name}:.*(\n[ \t].*)*"
        stanza = re.sub(field, f"{name}: {value}", stanza, flags=re.MULTILINE | re.IGNORECASE)
    return stanza + "\n"
