"""A heartbeat over thousands of beats: in virtual time against its promise, as a process against leaks."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, Desk, eventually, heartbeats, is_running, living

import plato_sandbox as product

if TYPE_CHECKING:
    from collections.abc import Callable

VM_SECONDS = 120.0  # the server ends a VM after so long without a beat
REACHABLE_SECONDS = 15.0  # within any 120 seconds, so that the VM is to live


class VirtualTime:
    """Stands in for the module `time`: sleeping takes no time but moves all clocks."""

    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)

    def __init__(self) -> None:
        self.now = 1e9

    CLOCK_MONOTONIC = 1

    def time(self, _: int = 0) -> float:
        return self.now

    monotonic = clock_gettime = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Weather:
    """When the API is reachable: good spells of 15 seconds or more, and outages.

    Any 120 seconds hold 15 good ones in a row, so an outage is never longer than 90.
    """

    def __init__(self, chance: random.Random, start: float) -> None:
        self.chance = chance
        self.good = True
        self.until = start + REACHABLE_SECONDS
        self.outages = 0

    def is_good(self, now: float) -> bool:
        while now >= self.until:
            self.good = not self.good
            if self.good:
                self.until += (
                    REACHABLE_SECONDS + self.chance.choice([0, 0, 10, 100, 1000]) * self.chance.random()
                )
            else:
                self.outages += 1
                self.until += self.chance.choice([0.5, 20, 60, 90, 90]) * self.chance.random() ** 0.1
        return self.good


class StormyApi:
    """The API of one VM: counts what it took in, and knows when the VM would have ended."""

    def __init__(self, clock: VirtualTime, chance: random.Random) -> None:
        self.clock, self.chance = clock, chance
        self.weather = Weather(chance, clock.now)
        self.last_taken = clock.now
        self.longest = 0.0
        self.beats = 0
        self.tries = 0
        self.is_gone = False

    def hang_up(self) -> None:
        """Nothing is held between beats."""

    def take(self) -> None:
        self.longest = max(self.longest, self.clock.now - self.last_taken)
        self.last_taken = self.clock.now
        self.beats += 1

    def heartbeat(self, session_id: str) -> dict[str, Any]:
        self.tries += 1
        if self.is_gone:
            raise product.NoSandboxError("no such session")
        if self.weather.is_good(self.clock.now):
            self.take()
            self.clock.sleep(self.chance.choice([0.01, 0.3]))
            return {"success": True, "results": {"j": {"success": True, "errors": [], "gone": False}}}
        trouble = self.chance.choice(
            ["refused", "silent", "silent", "reset", "500", "503", "429", "nonsense", "lost"]
        )
        self.clock.sleep({"silent": product.BEAT_SECONDS, "refused": 0.0}.get(trouble, 0.2))
        if trouble == "lost":
            self.take()
        if trouble == "nonsense":
            return {"results": {"j": {"success": False, "errors": ["registry_heartbeat_update: no"]}}}
        if trouble in ("500", "503"):
            raise product.ApiError("away", status=int(trouble))
        if trouble == "429":
            raise product.ApiError("slowly", status=429, retry_after=self.chance.choice([1.0, 5.0, 60.0]))
        raise product.NetworkError(trouble, sent=trouble != "refused")


def stormy_heartbeat(
    monkeypatch: pytest.MonkeyPatch, place: Path, seed: int
) -> tuple[product.Heartbeat, StormyApi]:
    clock = VirtualTime()
    monkeypatch.setattr(product, "time", clock)
    (place / ".sandbox.yaml").write_text("session_id: s\njob_id: j\n")
    settings = product.Settings(api_key="k", base_url="http://127.0.0.1:1", home=str(place))
    task = {"session_id": "s", "job_id": "j", "record": str(place / ".sandbox.yaml")}
    heartbeat = product.Heartbeat({**task, "settings": vars(settings)})
    api = StormyApi(clock, random.Random(seed))
    heartbeat.api = api  # type: ignore[assignment]
    return heartbeat, api


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_the_vm_lives_wherever_the_api_is_reachable_in_time(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    """Whenever the API can be reached for 15 seconds in any 120, no 120 seconds pass without a beat."""
    heartbeat, api = stormy_heartbeat(monkeypatch, tmp_path, seed)
    wanted = 25_000 if soaking else 1_000
    look = heartbeat.reason_to_end

    def enough() -> str:
        if api.beats >= wanted:
            api.is_gone = True
        assert api.longest < VM_SECONDS, f"at beat {api.beats} of seed {seed}"
        return look()

    monkeypatch.setattr(heartbeat, "reason_to_end", enough)
    heartbeat.run()
    assert heartbeat.facts["ended"] == "the VM is gone"
    assert api.weather.outages > wanted / 100
    assert api.tries < 20 * wanted
    assert os.path.getsize(heartbeat.log) < 64_000
    tally("beats in virtual time", api.beats)


FAULTS: list[dict[str, Any]] = [
    {"effect": "status", "status": 500},
    {"effect": "status", "status": 503},
    {"effect": "status", "status": 429, "headers": {"Retry-After": "1"}},
    {"effect": "reset_before_acting"},
    {"effect": "lost_answer"},
    {"effect": "html", "status": 502},
    {"effect": "truncate", "bytes": 20},
    {"effect": "hang"},
]


def held(pid: int) -> tuple[int, int]:
    """What a process holds: kilobytes of memory of its own, and open files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return private, len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_a_heartbeat_holds_no_more_after_thousands_of_beats(
    new_desk: Callable[..., Desk],
    new_plato: Callable[..., Any],
    seed: int,
    soaking: bool,
    tally: Callable[[str, int], None],
) -> None:
    """A real child, with real time twenty times as fast: outages of all kinds leave it and its VM alive."""
    plato = new_plato(speed=20)
    desk = new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "0.1"})
    desk.tune(BEAT_SECONDS=0.5, BEAT_RETRY_SECONDS=0.1)
    desk.good(*BLANK)
    pid = desk.state["heartbeat_pid"]
    chance = random.Random(seed)
    wanted = 2_500 if soaking else 60
    record = eventually(lambda: (truth := desk.heartbeat_record())["beats"] > wanted / 10 and truth, 300)
    early = held(pid)
    faults = 0
    while (beats := record["beats"]) < wanted:
        plato.clear_faults()
        plato.fault(path="*/heartbeat", times=chance.randint(1, 4), **chance.choice(FAULTS))
        faults += 1
        more = beats + chance.randint(2, 60)
        record = eventually(lambda: (truth := desk.heartbeat_record())["beats"] > more and truth)  # noqa: B023
    assert heartbeats(desk) == [pid]
    assert len(living(plato)) == 1
    late = held(pid)
    assert late[1] <= early[1]
    assert late[0] <= early[0] + 1024
    assert (
        os.path.getsize(desk.plato_home / f"heartbeat_{product.short_id(desk.state['session_id'])}.log")
        < 64_000
    )
    other = new_desk(plato.environment)
    other.good("stop", "--session-id", desk.state["session_id"])
    eventually(lambda: not is_running(pid))
    tally("beats of a real heartbeat", record["beats"])
    tally("outages", faults)
