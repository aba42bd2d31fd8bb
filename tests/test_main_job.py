"""The main job from end to end: start, look, log in by SSH, stop, and nothing is left."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from conftest import Desk, eventually, is_running, living

if TYPE_CHECKING:
    from localplato import LocalPlato

MODES = {
    "config": ["--from-config"],
    "simulator": ["--simulator", "espocrm"],
    "blank": ["--blank", "--service", "myapp"],
}


@pytest.mark.sampled
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_start_status_ssh_stop(desk: Desk, plato: LocalPlato, options: list[str]) -> None:
    started = desk.good("start", *options)
    assert started.out.startswith("Sandbox started successfully!\n  Session ID:  ")

    status = desk.good("status")
    assert "  VM Status:   running\n" in status.out
    assert f"  Heartbeat:   running (PID: {desk.state['heartbeat_pid']})\n" in status.out

    assert desk.ssh("id -un").out == "root\n"
    assert living(plato) == [desk.state["job_id"]]

    heartbeat = desk.state["heartbeat_pid"]
    stopped = desk.good("stop")
    assert stopped.out == "Sandbox stopped successfully.\n"
    assert desk.leftovers() == []
    assert living(plato) == []
    assert not is_running(heartbeat)
    assert plato.unknown_fields() == []


@pytest.mark.long
def test_vm_outlives_its_terminal_and_dies_without_heartbeats(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "--blank", "--service", "myapp")
    plato.wait_for_request("POST", "/heartbeat", count=3)
    assert desk.run("status", "--json").document["vm_running"] is True
    heartbeat = desk.state["heartbeat_pid"]
    os.kill(heartbeat, signal.SIGKILL)
    eventually(lambda: not is_running(heartbeat))
    plato.advance(130)
    gone = desk.run("status")
    assert gone.code == 3
    assert f"  Heartbeat:   stopped (PID: {heartbeat} not found)\n" in gone.out
    assert "heartbeat miss" in gone.out
