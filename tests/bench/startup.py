#!/usr/bin/env python3
"""Compares the start-up of command lines, ours and both SDK releases': `python3 tests/bench/startup.py`.

`--help`, and `status` and `status --json` of a sandbox at a local Plato, of every way to run our file and of
the SDKs' programs, against an interpreter that does nothing and against the bare request.
"""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from localplato import LocalPlato  # noqa: E402

from bench import shared  # noqa: E402
from bench.shared import Contestants, Desk, Measured  # noqa: E402

NOTHING = "`python3 -c pass`"
ARGPARSE = '`python3 -c "import argparse"`'
BARE = '`python3 -I -S -c "import argparse, json, http.client"`'
WARM = "the request in a warm process"
FRESH = "the request in a fresh process"
INSTALLED = "ours, installed command"
RUN_CACHED = (
    "import sys; from importlib.machinery import SourceFileLoader as Loader; sys.argv.pop(0); "
    "exec(Loader('plato_sandbox', sys.argv[0]).get_code('plato_sandbox'),"
    " {'__name__': '__main__', '__file__': sys.argv[0]})"
)
REQUEST = """
import http.client, os, sys
connection = http.client.HTTPConnection(*sys.argv[1].split(":"))
connection.request("GET", sys.argv[2], headers={"X-API-Key": os.environ["PLATO_API_KEY"]})
answer = connection.getresponse()
answer.read()
sys.exit(answer.status != 200)
"""


def our_programs(place: Path, before: Path | None) -> tuple[dict[str, list[str]], Path]:
    """Every way to run our file, and the directory that `python3 -m` finds it in; some of the file before."""
    modules = place / "modules"
    modules.mkdir()
    copy = Path(shutil.copy(shared.PRODUCT, modules))
    programs = {
        "ours, script": [sys.executable, str(copy)],
        "ours, `python3 -m`": [sys.executable, "-m", "plato_sandbox"],
        INSTALLED: shared.installed_command(place),
        "ours, `-I -S`, cached": [*shared.BARE, "-c", RUN_CACHED, str(copy)],
    }
    if before:
        (place / "before").mkdir()
        copy = Path(shutil.copy(before, place / "before" / "plato_sandbox.py"))
        programs["before, script"] = [sys.executable, str(copy)]
        programs["before, installed command"] = shared.installed_command(place / "before", before)
    return programs, modules


def make_desks(place: Path, plato: LocalPlato, options: Any) -> dict[str, Desk]:
    """A client for each program; ours share a home and a directory, and so a sandbox."""
    programs, modules = our_programs(place, options.before)
    ours = shared.our_desk(place / "ours", plato)
    environment = {**ours.environment, "PYTHONPATH": str(modules)}
    desks = {name: Desk(program, ours.work, environment) for name, program in programs.items()}
    for release in options.releases:
        desks[f"SDK {release}"] = shared.sdk_desk(place / release, plato, release, options.cache)
    return desks


def floors(place: Path) -> Contestants:
    environment = shared.environment_of(place / "floor")

    def python(*words: str) -> Measured:
        return shared.measure([sys.executable, *words], place, environment)

    return {
        NOTHING: lambda: python("-c", "pass"),
        ARGPARSE: lambda: python("-c", "import argparse"),
        BARE: lambda: python("-I", "-S", "-c", "import argparse, json, http.client"),
    }


def requests(place: Path, plato: LocalPlato, session_id: str) -> Contestants:
    """The one request of `status` by itself."""
    address = urllib.parse.urlsplit(plato.base_url).netloc
    path = f"/api/v2/sessions/{session_id}"
    environment = shared.environment_of(place / "request", plato)

    def warm() -> Measured:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(address)
        connection.request("GET", path, headers={"X-API-Key": plato.api_key})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"the request was answered with {answer.status}")
        return Measured(time.perf_counter() - began)

    def fresh() -> Measured:
        return shared.measure([*shared.BARE, "-c", REQUEST, address, path], place, environment)

    return {WARM: warm, FRESH: fresh}


def contestants_of(desks: dict[str, Desk], *words: str) -> Contestants:
    def contestant(desk: Desk) -> Any:
        return lambda: desk.run(*words)

    return {name: contestant(desk) for name, desk in desks.items()}


def start_all(desks: dict[str, Desk]) -> dict[str, Desk]:
    """The clients that could start a sandbox; one of ours starts that of all of ours."""
    first = desks[INSTALLED]
    first.run("start", "--blank", "--service", "bench")
    return {
        name: desk
        for name, desk in desks.items()
        if desk.work == first.work or shared.started(name, desk, *shared.sdk_start(name.split()[1]))
    }


def show(words: str, results: shared.Results, bases: list[str]) -> None:
    print(shared.times_table(results, bases, f"`{words}`") + "\n")


def main() -> int:
    options = shared.options_of(__doc__)
    before = os.getloadavg()
    with shared.patient_plato() as (place, plato):
        desks = make_desks(place, plato, options)
        help_results = shared.interleave({**floors(place), **contestants_of(desks, "--help")}, options.runs)
        begun: dict[str, Desk] = {}
        tables = {}
        try:
            begun = start_all(desks)
            request = requests(place, plato, plato.sessions()[0]["session_id"])
            for words in (["status"], ["status", "--json"]):
                tables[" ".join(words)] = shared.interleave(
                    {**request, **contestants_of(begun, *words)}, options.runs
                )
        finally:
            for desk in {desk.work: desk for desk in begun.values()}.values():
                desk.quietly("stop")
    print(shared.machine_line(f"medians of {options.runs} runs by turns", before))
    show("--help", help_results, [ARGPARSE, INSTALLED])
    for text, results in tables.items():
        show(text, results, [FRESH, INSTALLED])
        ours, bare = (shared.median_seconds(results, name) for name in (INSTALLED, WARM))
        if ours is not None and bare is not None:
            print(f"{INSTALLED}: {shared.seconds_text(ours - bare)} more than {WARM}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
