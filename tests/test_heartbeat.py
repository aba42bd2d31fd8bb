"""The heartbeat: a child that keeps a VM alive, needs no terminal, and ends when it is not wanted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import BLANK, PRODUCT, ROOT, Desk, eventually, heartbeats, is_running, living
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

    from localplato import LocalPlato

sys.path.insert(0, str(ROOT))

import plato_sandbox as product


def beats(plato: LocalPlato) -> int:
    return len(plato.requests("POST", "/heartbeat"))


def wait_for_beats(plato: LocalPlato, more: int) -> None:
    """Wait for that many beats more than there have been."""
    plato.wait_for_request("POST", "/heartbeat", count=beats(plato) + more)


def start(desk: Desk) -> int:
    """Start a blank sandbox; the pid of its heartbeat."""
    desk.good(*BLANK)
    pid: int = desk.state["heartbeat_pid"]
    assert heartbeats(desk) == [pid]
    return pid


def ended(desk: Desk, pid: int) -> None:
    eventually(lambda: not is_running(pid))
    assert heartbeats(desk) == []


@pytest.fixture
def fast(new_desk: Callable[..., Desk], plato: LocalPlato) -> Desk:
    """A desk whose heartbeat beats as fast as it may."""
    return new_desk({**plato.environment, "PLATO_HEARTBEAT_INTERVAL_SECONDS": "0.1"})


# -- what the child is --


def test_child_holds_nothing_of_its_parent(desk: Desk, plato: LocalPlato) -> None:
    """`out=$(... start --json)` returns; the child has a session, a directory and descriptors of its own."""
    started = desk.good(*BLANK, "--json")  # reads both pipes to their end
    pid = started.document["heartbeat_pid"]
    open_files = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    record = desk.plato_home / f"heartbeat_{desk.state['session_id'].split('-')[0]}.log"
    connections = {name for name in open_files if name.startswith("socket:")}  # to the API, while it beats
    assert open_files - connections == {"/dev/null", str(record)}
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(desk.work)  # which may be moved


def test_key_is_neither_in_argv_nor_in_the_environment(desk: Desk, plato: LocalPlato) -> None:
    pid = start(desk)
    key = plato.api_key.encode()
    assert key not in Path(f"/proc/{pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"HOME=" in environment
    assert key not in environment
    assert all(request["key"] == "right" for request in plato.wait_for_request("POST", "/heartbeat", count=2))


def test_only_the_interpreter_that_runs_is_needed(desk: Desk, plato: LocalPlato, tmp_path: Path) -> None:
    """The original needs a `python3` with packages on PATH; without it the VM dies two minutes later."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").symlink_to("/bin/false")
    (tools / "python").symlink_to("/bin/false")
    desk.environment.update(PATH=f"{tools}:{desk.environment['PATH']}", PYTHONPATH="/nowhere", PYTHONHOME="")
    pid = start(desk)
    wait_for_beats(plato, 2)
    assert is_running(pid)


@pytest.mark.sampled
@pytest.mark.parametrize(("text", "seconds"), [("0.1", 0.1), ("2", 2.0), ("", 15.0)])
def test_interval_comes_from_the_environment(desk: Desk, text: str, seconds: float) -> None:
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = text
    start(desk)
    assert desk.heartbeat_record()["interval"] == seconds


@pytest.mark.sampled
@pytest.mark.parametrize("text", ["0", "-1", "0.09", "3601", "nan", "inf", "often", "1,5"])
def test_interval_that_makes_no_sense_creates_nothing(desk: Desk, plato: LocalPlato, text: str) -> None:
    refused = desk.run(*BLANK, environment={"PLATO_HEARTBEAT_INTERVAL_SECONDS": text})
    assert refused.code == 2
    assert "PLATO_HEARTBEAT_INTERVAL_SECONDS" in refused.err
    assert plato.requests() == []


# -- how long it lives --


@pytest.mark.long
def test_vm_outlives_its_terminal(desk: Desk, plato: LocalPlato) -> None:
    """Started on a terminal that is then closed, it lives past many limits, until the child is killed."""
    process, master = desk.begin_on_terminal(*BLANK)
    assert process.wait(60) == 0
    os.close(master)
    [machine] = living(plato)
    for _ in range(4):
        wait_for_beats(plato, 2)
        plato.advance(80)
    wait_for_beats(plato, 2)
    assert living(plato) == [machine]
    pid = desk.state["heartbeat_pid"]
    assert f"  Heartbeat:   running (PID: {pid})\n" in desk.good("status").out

    os.kill(pid, signal.SIGKILL)
    ended(desk, pid)
    orphaned = desk.run("status")
    assert orphaned.code == 0
    assert "  VM Status:   running\n" in orphaned.out
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in orphaned.out
    plato.advance(90)
    assert living(plato) == [machine]
    plato.advance(31)
    eventually(lambda: living(plato) == [])
    gone = desk.run("status")
    assert gone.code == 3
    assert "heartbeat miss" in gone.out
    assert f"  Heartbeat:   stopped (PID: {pid} not found)\n" in gone.out
    desk.good("stop")
    assert desk.leftovers() == []


FAILURES: dict[str, dict[str, Any]] = {
    "500": {"effect": "status", "status": 500},
    "502 html": {"effect": "html", "status": 502},
    "200 html": {"effect": "html", "status": 200},
    "401": {"effect": "status", "status": 401},
    "429": {"effect": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "reset": {"effect": "reset_before_acting"},
    "lost answer": {"effect": "lost_answer"},
    "half a body": {"effect": "truncate", "bytes": 20},
    "a list": {"effect": "content_type", "body": "[]"},
    "null": {"effect": "content_type", "body": "null"},
    "not accepted": {"effect": "content_type", "body": '{"success": false, "results": null}'},
    "nested nonsense": {"effect": "content_type", "body": '{"success": "yes", "results": {"x": [1]}}'},
    "redirect": {"effect": "redirect", "url": "http://127.0.0.1:9/"},
}


@pytest.mark.sampled
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failed_beat_is_recorded_and_retried_before_the_next_regular_one(
    desk: Desk, plato: LocalPlato, failure: dict[str, Any]
) -> None:
    """With an interval of an hour only a retry can come."""
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "3600"
    plato.fault(path="*/heartbeat", **failure)
    start(desk)
    plato.wait_for_request("POST", "/heartbeat", count=2)
    record = eventually(lambda: (truth := desk.heartbeat_record())["beats"] and truth)
    assert record["failures"] == 0
    assert record["last_error"]
    assert record["last_error_at"] <= record["last_ok"]
    status = desk.good("status", "--json").document
    assert status["heartbeat"]["state"] == "ok"
    assert status["heartbeat"]["last_error"] is None
    desk.good("stop")
    assert desk.leftovers() == []


SILENCES: dict[str, dict[str, Any]] = {
    "hanging": {"effect": "hang"},
    "dripping": {"effect": "drip", "seconds": 60},
}


@pytest.mark.long
@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
def test_silent_api_does_not_kill_it(desk: Desk, plato: LocalPlato, silence: dict[str, Any]) -> None:
    desk.tune(BEAT_SECONDS=0.5)
    plato.fault(path="*/heartbeat", times=2, **silence)
    pid = start(desk)
    record = eventually(lambda: (truth := desk.heartbeat_record())["beats"] and truth)
    assert "time" in record["last_error"]
    assert is_running(pid)


@pytest.mark.long
def test_unreachable_api_does_not_kill_it(desk: Desk, plato: LocalPlato) -> None:
    pid = start(desk)
    wait_for_beats(plato, 1)
    plato.kill()
    eventually(lambda: desk.heartbeat_record()["failures"] >= 3)
    assert is_running(pid)
    status = desk.run("status")
    assert status.code == 6
    assert f"  Heartbeat:   running (PID: {pid})\n" in status.out
    assert desk.heartbeat_record()["last_error"] in status.out


GONE: dict[str, dict[str, Any]] = {
    "404": {"effect": "status", "status": 404},
    "410": {"effect": "status", "status": 410},
}


@pytest.mark.long
@pytest.mark.parametrize("gone", GONE.values(), ids=GONE)
def test_gone_is_believed_only_after_a_second_look(
    desk: Desk, plato: LocalPlato, gone: dict[str, Any]
) -> None:
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "1"
    plato.fault(path="*/heartbeat", nth=2, times=1, **gone)
    plato.fault(path="*/heartbeat", nth=5, times=2, **gone)
    pid = start(desk)
    ended(desk, pid)
    assert beats(plato) == 6
    assert desk.heartbeat_record()["ended"] == "the VM is gone"


@pytest.mark.long
def test_vm_that_ended_ends_it(desk: Desk, plato: LocalPlato) -> None:
    pid = start(desk)
    wait_for_beats(plato, 1)
    plato.advance(9 * 3600)  # beyond its lifetime
    ended(desk, pid)
    status = desk.run("status", "--json")
    assert status.code == 3
    assert status.document["heartbeat"]["state"] == "expired"


@pytest.mark.long
def test_session_closed_elsewhere_ends_it(desk: Desk, plato: LocalPlato, tmp_path: Path) -> None:
    pid = start(desk)
    state = desk.state
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    desk.environment["PLATO_HOME"] = str(tmp_path / "other home")
    desk.good("stop", "--session-id", state["session_id"], directory=elsewhere)
    ended(desk, pid)


# -- .sandbox.yaml and its record --


def test_removed_state_ends_it(fast: Desk) -> None:
    pid = start(fast)
    fast.state_file.unlink()
    ended(fast, pid)


def test_state_of_another_session_ends_it(fast: Desk) -> None:
    pid = start(fast)
    session = fast.state["session_id"]
    fast.state_file.write_text(fast.state_file.read_text().replace(session, "0" * 8 + session[8:]))
    ended(fast, pid)


def test_removed_directory_ends_it(fast: Desk) -> None:
    pid = start(fast)
    shutil.rmtree(fast.work)
    ended(fast, pid)


def test_it_goes_on_in_a_directory_that_was_moved(fast: Desk, plato: LocalPlato) -> None:
    pid = start(fast)
    moved = fast.place / "moved"
    fast.work.rename(moved)
    wait_for_beats(plato, 5)
    assert fast.good("sync", directory=moved).err.count("Warning") == 0
    wait_for_beats(plato, 5)
    assert heartbeats(fast) == [pid]
    fast.good("stop", directory=moved)
    ended(fast, pid)


def test_one_with_a_key_that_is_refused_is_replaced_by_whoever_has_another(
    fast: Desk, plato: LocalPlato
) -> None:
    os.kill(start(fast), signal.SIGKILL)
    wrong = {"PLATO_API_KEY": "another-key-of-somebody"}
    eventually(lambda: not heartbeats(fast))
    fast.good("sync", environment=wrong)  # over SSH
    [refused] = heartbeats(fast)
    eventually(lambda: fast.heartbeat_record()["failures"] > 1)
    told = fast.run("sync", environment=wrong).err
    assert "no good beat since its start: Plato refused the API key" in told
    assert heartbeats(fast) == [refused]
    told = fast.good("sync").err
    assert "Plato refused the API key" in told
    assert "it was started again" in told
    [pid] = heartbeats(fast)
    assert pid != refused
    eventually(lambda: fast.heartbeat_record()["beats"] > 1)
    assert "Warning" not in fast.good("sync").err


def test_removed_record_ends_it(fast: Desk) -> None:
    pid = start(fast)
    [record] = fast.plato_home.glob("heartbeat_*.log")
    record.unlink()
    ended(fast, pid)


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "no end": lambda data: data.rpartition(b"# end")[0],
    "not text": lambda data: b"\xff\xfe" + data,
    "not YAML": lambda data: b"{[" + data,
    "a list": lambda data: b"- 1\n",
}


@pytest.mark.sampled
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_state_does_not_end_it(
    fast: Desk, plato: LocalPlato, damage: Callable[[bytes], bytes]
) -> None:
    pid = start(fast)
    whole = fast.state_file.read_bytes()
    fast.state_file.write_bytes(damage(whole))
    wait_for_beats(plato, 3)
    assert is_running(pid)
    fast.state_file.write_bytes(whole)
    fast.good("stop")
    assert fast.leftovers() == []


def test_state_written_again_does_not_end_it(fast: Desk, plato: LocalPlato) -> None:
    """Other clients rewrite .sandbox.yaml in their own manner; the session is what counts."""
    pid = start(fast)
    fast.state_file.write_text("".join(f"{key}: {value!r}\n" for key, value in fast.state.items()))
    wait_for_beats(plato, 3)
    assert is_running(pid)


def test_suspended_and_continued(desk: Desk, plato: LocalPlato) -> None:
    """A stopped process is alive to `status`; continued, it goes on."""
    desk.environment["PLATO_HEARTBEAT_INTERVAL_SECONDS"] = "1"
    pid = start(desk)
    plato.wait_for_request("POST", "/heartbeat", count=2)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    before = beats(plato)
    plato.advance(100)
    assert f"  Heartbeat:   running (PID: {pid})\n" in desk.good("status").out
    os.kill(pid, signal.SIGCONT)
    plato.wait_for_request("POST", "/heartbeat", count=before + 1)
    plato.advance(100)
    assert len(living(plato)) == 1


@pytest.mark.long
def test_first_line_of_the_record_is_always_whole(fast: Desk, plato: LocalPlato) -> None:
    start(fast)
    [path] = fast.plato_home.glob("heartbeat_*.log")
    goal = beats(plato) + 10
    reads = 0
    while reads % 500 or beats(plato) < goal:
        first = path.read_bytes().splitlines()[0]
        assert json.loads(first)["session_id"] == fast.state["session_id"]
        reads += 1
    assert path.stat().st_mode & 0o777 == 0o600


def child(desk: Desk, program: str) -> subprocess.CompletedProcess[bytes]:
    """Start a heartbeat by hand; how it ended."""
    return subprocess.run(
        product.own_command("-", "heartbeat-child"),
        input=program.encode(),
        env=desk.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_of_two_heartbeats_one_lives(desk: Desk, plato: LocalPlato) -> None:
    pid = start(desk)
    state = desk.state
    task = {
        "settings": vars(desk.settings),
        "session_id": state["session_id"],
        "job_id": state["job_id"],
        "record": str(desk.state_file),
    }
    second = child(desk, product.child_program(task))
    assert (second.returncode, second.stdout, second.stderr) == (0, b"", b"")
    assert heartbeats(desk) == [pid]
    assert desk.heartbeat_record()["pid"] == pid


@pytest.mark.parametrize("holder", ["abcdef12-mine", "abcdef12-another"])
def test_record_that_is_held_already(tmp_path: Path, holder: str) -> None:
    """By a heartbeat of this session: it will do. By that of another one: this sandbox has none, an error."""
    settings = product.Settings(api_key="key", home=str(tmp_path))
    path = Path(product.heartbeat_path(str(tmp_path), holder))
    path.write_text(json.dumps({"session_id": holder, "pid": os.getpid()}) + "\n")
    task = settings, {"session_id": "abcdef12-mine"}, str(tmp_path / "record"), product.Reporter()
    with path.open() as log:
        assert product.take_lock(log.fileno())
        if holder == "abcdef12-mine":
            assert product.spawn_heartbeat(*task) == os.getpid()
        else:
            with pytest.raises(product.SandboxError, match="could not be started"):
                product.spawn_heartbeat(*task)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_child_whose_parent_ends_too_early_does_nothing(desk: Desk, share: float) -> None:
    """All but the last line break and bracket is the most that is no whole program."""
    program = product.child_program({"session_id": "abcdef12-mine", "settings": vars(desk.settings)})
    done = child(desk, program[: int(share * (len(program) - 2))])
    assert done.stdout == b""
    assert desk.leftovers() == []


# -- in-process: the record's size, the judgement, the rhythm --


class ScriptedApi:
    """Answers heartbeats from a list: a dict is an answer, an exception is raised."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def heartbeat(self, session_id: str) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer

    def hang_up(self) -> None:
        """The connection is given up after every beat."""


GOOD = {"success": True, "results": {"j": {"success": True, "errors": [], "gone": False}}}
GONE_ANSWER = {
    "success": False,
    "results": {"j": {"success": False, "errors": ["job is failed"], "gone": True}},
}


def heartbeat_in_process(directory: Path, answers: list[Any]) -> product.Heartbeat:
    settings = product.Settings(api_key="key", base_url="http://127.0.0.1:1", home=str(directory))
    task = {"session_id": "s", "job_id": "j", "record": str(directory / ".sandbox.yaml")}
    heartbeat = product.Heartbeat({**task, "settings": vars(settings)})
    heartbeat.api = ScriptedApi(answers)  # type: ignore[assignment]
    return heartbeat


def test_record_stays_small(tmp_path: Path) -> None:
    """Thousands of beats, half of them failing with long words."""
    trouble = product.ApiError("x" * 5000, status=500)
    heartbeat = heartbeat_in_process(tmp_path, [GOOD, trouble] * 3000)
    for _ in range(6000):
        assert heartbeat.beat() == ""
        heartbeat.write()
    data = Path(heartbeat.log).read_bytes()
    assert len(data) < 6_000
    assert json.loads(data)["beats"] == 3000


def test_gone_then_good_again_is_not_gone(tmp_path: Path) -> None:
    heartbeat = heartbeat_in_process(tmp_path, [GONE_ANSWER, GOOD, GONE_ANSWER, GONE_ANSWER])
    assert [heartbeat.beat() for _ in range(4)] == ["", "", "", "the VM is gone"]


def test_an_hour_without_a_good_beat_ends_it(tmp_path: Path) -> None:
    heartbeat = heartbeat_in_process(tmp_path, [product.NetworkError("no", sent=False)] * 2)
    assert heartbeat.beat() == ""
    heartbeat.last_ok -= product.BEAT_SILENCE_LIMIT_SECONDS
    assert heartbeat.beat() == "no good beat for an hour"


def job(**fields: Any) -> dict[str, Any]:
    return {"results": {"j": fields}}


JUDGED: dict[str, tuple[dict[str, Any], bool, bool]] = {  # answer, good, gone
    "good": (GOOD, True, False),
    "worker not started": (
        {"success": True, **job(success=True, errors=["vm_heartbeat_message: no"])},
        True,
        False,
    ),
    "worker not started, refused": (
        {"success": False, **job(success=False, errors=["vm_heartbeat_message: no"])},
        True,
        False,
    ),
    "record not updated": (
        {"success": False, **job(success=False, errors=["registry_heartbeat_update: no"])},
        False,
        False,
    ),
    "both": (
        {"success": True, **job(errors=["vm_heartbeat_message: x", "registry_heartbeat_update: y"])},
        False,
        False,
    ),
    "gone": (GONE_ANSWER, False, True),
    "gone and success": ({"success": True, **job(success=True, gone=True)}, False, True),
    "gone is a text": ({"success": True, **job(success=True, gone="no")}, True, False),
    "no results": ({"success": True}, True, False),
    "empty": ({}, False, False),
    "refused without a word": ({"success": False}, False, False),
    "results of another job alone": ({"success": True, "results": {"k": {"gone": True}}}, False, True),
    "results of others": ({"success": True, "results": {"k": {"gone": True}, "l": {}}}, True, False),
}


@pytest.mark.parametrize(("answer", "good", "gone"), JUDGED.values(), ids=JUDGED)
def test_what_an_answer_means(answer: dict[str, Any], good: bool, gone: bool) -> None:
    trouble, is_gone = product.beat_trouble(answer, "j")
    assert (not trouble, is_gone) == (good, gone)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["success", "results", "j", "errors", "gone"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["success", "results", "errors"]), JSON))
def test_what_any_answer_means(answer: dict[str, Any]) -> None:
    trouble, is_gone = product.beat_trouble(answer, "j")
    assert trouble or not is_gone
    assert trouble.isprintable()
    assert len(trouble) <= 200


class Watch:
    """A clock that only `sleep` moves, and what it slept."""

    def __init__(self) -> None:
        self.now = 50.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_the_rhythm_of_beats_and_of_retries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Regular after a good one, soon after a failure while the VM may live, and never later than regular."""
    watch = Watch()
    monkeypatch.setattr(product, "time", watch)
    away = [product.NetworkError("away", sent=False)] * 80
    heartbeat = heartbeat_in_process(tmp_path, [GOOD, GOOD, *away, GOOD, GONE_ANSWER, GONE_ANSWER])
    monkeypatch.setattr(heartbeat, "reason_to_end", lambda: "")
    heartbeat.run()
    regular, soon = heartbeat.facts["interval"], product.BEAT_RETRY_SECONDS
    assert heartbeat.facts["ended"] == "the VM is gone"
    assert heartbeat.facts["beats"] == 3
    urgent = [pause for pause in watch.slept[2:82] if pause == soon]
    assert watch.slept[:2] == [regular] * 2
    assert watch.slept[2 : 2 + len(urgent)] == urgent, "dense while the VM may still live"
    assert 120 < regular + soon * len(urgent) < 180
    assert set(watch.slept[2 + len(urgent) : 82]) == {regular}
    assert watch.slept[82:] == [regular, soon]


@pytest.mark.parametrize(
    ("interval", "taken", "pause"), [(1.5, 0.0, 1.5), (30.0, 29.0, 1.0), (5.0, 9.0, 0.0)]
)
def test_a_retry_is_never_later_than_the_regular_beat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interval: float, taken: float, pause: float
) -> None:
    watch = Watch()
    monkeypatch.setattr(product, "time", watch)
    heartbeat = heartbeat_in_process(tmp_path, [GONE_ANSWER, GONE_ANSWER])
    heartbeat.facts["interval"] = interval

    def slow() -> str:
        watch.now += taken
        return ""

    monkeypatch.setattr(heartbeat, "reason_to_end", slow)
    heartbeat.run()
    assert watch.slept == [pause]


def test_record_of_a_dead_heartbeat_is_not_alive(tmp_path: Path) -> None:
    settings = product.Settings(home=str(tmp_path))
    path = Path(product.heartbeat_path(str(tmp_path), "s"))
    path.write_text(json.dumps({"pid": os.getpid()}) + "\n")
    with path.open() as log:
        assert product.take_lock(log.fileno())
        assert product.heartbeat_facts(str(tmp_path), "s")["alive"]
    assert not product.heartbeat_facts(str(tmp_path), "s")["alive"]
    assert product.heartbeat_health(settings, {"session_id": "s"})["state"] == "dead"


def test_product_of_these_tests_is_the_one_that_runs() -> None:
    assert Path(product.__file__).resolve() == PRODUCT
