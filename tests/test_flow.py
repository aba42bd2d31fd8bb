"""flow: files checked, every step in a real browser, failures told, passwords hidden, nothing left."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import ROOT, SIMULATOR, Desk, Result, altered, ending, eventually, missing, processes_of
from flow_pages import Site
from localplato import LocalPlato
from test_simulator import app, database  # noqa: F401  (fixtures)

import plato_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = "S3cret&<pass> word/1"
BROWSER_PACKAGE = "chromium"


def browser() -> str:
    """The Chrome or Chromium of this machine."""
    names = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        missing(f"no Chrome or Chromium is installed; on Debian: apt-get install {BROWSER_PACKAGE}")
    try:
        import playwright  # noqa: F401
    except ImportError:
        missing("playwright is not installed; it is in the test group of pyproject.toml")
    return str(found)


@pytest.fixture
def site() -> Iterator[Site]:
    browser()
    with Site() as pages:
        yield pages


@pytest.fixture
def nobody(new_desk: Callable[..., Desk]) -> Desk:
    """A user without a sandbox and without a key."""
    return new_desk({})


@pytest.fixture
def temporary(nobody: Desk) -> Iterator[Path]:
    """The directory that the user's programs take for temporary files: a short name, as Chromium needs."""
    with tempfile.TemporaryDirectory() as name:
        nobody.environment["TMPDIR"] = name
        yield Path(name)


def write_flows(desk: Desk, *flows: dict[str, Any], text: str | None = None) -> None:
    content = yaml.safe_dump({"flows": list(flows)}, sort_keys=False) if text is None else text
    (desk.work / "flows.yml").write_text(content)


def flow(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "description": f"About {name}", "steps": list(steps)}


def step(kind: str, **values: Any) -> dict[str, Any]:
    return {"type": kind, **values}


def browsers_of(desk: Desk) -> list[str]:
    """What still runs of a desk's browsers and their driver, by the home in their environment."""
    commands = processes_of(desk).values()
    return [
        command.replace(b"\0", b" ").decode(errors="replace")[:200]
        for command in commands
        if b"heartbeat-child" not in command
    ]


def texts_below(place: Path) -> dict[str, bytes]:
    """Every file below a directory, and every file inside its archives."""
    found = {}
    for path in place.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found.update({f"{path}:{name}": archive.read(name) for name in archive.namelist()})
    return found


# ---------------------------------------------------------------------------
# the file, before a browser opens
# ---------------------------------------------------------------------------

PROBLEMS = {
    "no flows": ("name: x\n", "flows.yml:1:1: `flows` is missing"),
    "empty": ("", "flows.yml:1:1: the file must be a map"),
    "not yaml": ("flows: [", "flows.yml:1:"),
    "not a list": ("flows: {a: 1}\n", "flows.yml:1:8: `flows` must be a list"),
    "no name": ("flows:\n  - steps: []\n", "flows.yml:2:5: `flows.1.name` is missing"),
    "two of a name": ("flows:\n  - name: a\n  - name: a\n", "flows.yml:3:5: `flows` names `a` twice"),
    "flow field": (
        "flows:\n  - name: a\n    step: []\n",
        "flows.yml:3:5: `flows.a` has no field `step`; did you mean `steps`?",
    ),
}
# One step of a flow each.
STEP_PROBLEMS = {
    "unknown type": (
        "{type: clik, selector: a}",
        "flows.yml:4:16: `flows.login.steps.1.type` is clik; did you mean `click`?",
    ),
    "unlike any type": ("{type: sing}", "there are: navigate, "),
    "no type": ("{selector: a}", "flows.yml:4:9: `flows.login.steps.1.type` is missing; there are: "),
    "missing field": ("{type: click}", "flows.yml:4:9: `flows.login.steps.1.selector` is missing"),
    "misspelt field": (
        "{type: click, selectr: a}",
        "flows.yml:4:23: `flows.login.steps.1` has no field `selectr`; did you mean `selector`?",
    ),
    "field of another type": (
        "{type: click, selector: a, text: b}",
        "`flows.login.steps.1` has no field `text`; there are: type, selector, ",
    ),
    "wrong kind": (
        "{type: wait, duration: soon}",
        "flows.yml:4:32: `flows.login.steps.1.duration` is soon; it must be a whole number",
    ),
    "negative": (
        "{type: click, selector: a, timeout: -1}",
        "timeout` is -1; it must be a whole number, at least 0",
    ),
    "empty selector": ("{type: click, selector: ''}", "selector` is ''; it must be a text that is not blank"),
    "empty text": ("{type: verify_text, text: ''}", "it must be a text that is not blank"),
    "null": ("{type: verify_url, url: ~}", "flows.yml:4:33: `flows.login.steps.1.url` is empty"),
    "float value": (
        "{type: fill, selector: a, value: 1.5}",
        "value` is wrong; it must be a text, a whole number, or true or false",
    ),
    "verify type": (
        "{type: verify, verify_type: element_text_, selector: a}",
        "did you mean `element_text`?",
    ),
    "verify without text": (
        "{type: verify, verify_type: element_text, selector: a}",
        "text` is missing",
    ),
    "verify without count": (
        "{type: verify, verify_type: element_count, selector: a}",
        "count` is missing",
    ),
    "verify without title": ("{type: verify, verify_type: page_title}", "title` is missing"),
    "outside": ("{type: screenshot, filename: ../x.png}", "it must be a path in the screenshots folder"),
    "outside, absolute": (
        "{type: screenshot, filename: /tmp/x.png}",
        "it must be a path in the screenshots folder",
    ),
    "outside, hidden": (
        "{type: screenshot, filename: a/../../x.png}",
        "it must be a path in the screenshots folder",
    ),
    "step is a text": ("click", "`flows.login.steps.1` must be a map"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_is_told_with_its_place_and_no_browser_opens(nobody: Desk, name: str) -> None:
    text, expected = PROBLEMS[name]
    assert_problems(nobody, text, [expected])


def test_problems_of_steps_are_told_with_their_places(nobody: Desk) -> None:
    text, told = "flows:\n", []
    for number, (wrong, expected) in enumerate(STEP_PROBLEMS.values()):
        line = f"flows.yml:{4 + 3 * number}:"
        told.append(expected.replace("flows.yml:4:", line).replace("`flows.login.", f"`flows.login{number}."))
        text += f"  - name: login{number}\n    steps:\n      - {wrong}\n"
    assert_problems(nobody, text, told)


def assert_problems(nobody: Desk, text: str, expected: list[str]) -> None:
    """Each problem is in the message, and no browser opens."""
    write_flows(nobody, text=text)
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", "--json")
    assert result.code == 8, result
    assert result.error["code"] == "config_invalid"
    assert [words for words in expected if words not in result.error["message"]] == []
    assert "Nothing was done" in result.error["hint"]
    assert not (nobody.work / "test-results").exists()


def test_every_problem_of_the_whole_file_is_told_at_once(nobody: Desk) -> None:
    write_flows(
        nobody,
        flow("login", step("click", selector="a")),
        flow("other", step("clik"), step("wait"), step("navigate", url="/", full_page=True)),
    )
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9")
    assert result.code == 8
    assert "3 problems" in result.err
    assert len(re.findall(r"flows\.yml:\d+:\d+: `flows\.other", result.err)) == 3


def test_a_number_that_yaml_reads_otherwise_is_warned_of(nobody: Desk) -> None:
    line = "{type: fill, selector: '#pin', value: 0600}"
    write_flows(nobody, text=f"flows:\n  - name: login\n    steps:\n      - {line}\n")
    result = nobody.good("flow", "--list", "--base-url", "http://127.0.0.1:9")
    assert "flows.yml:4:47" in result.err
    assert "YAML reads 0600 as 384; quotes keep it as it is" in result.err


@pytest.mark.long
def test_flows_of_other_simulators_parse(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those that ship in a wheel of the SDK's first generation, read as they are."""
    wheel = download_wheel(tmp_path_factory)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"/flows/.*\.ya?ml$", name)]
        files = {name: archive.read(name).decode() for name in names}
    assert len(files) >= 67
    steps = 0
    for name, text in files.items():
        known = plato_sandbox.parse_flows(text, name, name)
        told = [item for flow in yaml.safe_load(text)["flows"] for item in flow["steps"]]
        parsed = [step.values for flow in known.flows for step in flow["steps"]]
        assert parsed == told, name
        steps += len(parsed)
    assert steps > 1000


def download_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, kept in the cache of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plato-sandbox-tests"
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    place = cache if os.access(cache, os.W_OK) else tmp_path_factory.mktemp("wheel")
    found = sorted(place.glob("plato_sdk-1.1.30-*.whl"))
    if found:
        return found[0]
    fresh = tmp_path_factory.mktemp("download")
    words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(fresh)]
    python = ["--python-version", "3.11", "--platform", "manylinux_2_17_x86_64", "plato-sdk==1.1.30"]
    command = [sys.executable, "-m", "pip", *words, *python]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(fresh.glob("*.whl"))
    if done.returncode or not wheels:
        missing(f"plato-sdk 1.1.30 cannot be had from the package index: {done.stderr[-300:]}")
    target = place / wheels[0].name
    temporary = target.with_suffix(f".{os.getpid()}")
    shutil.copy(wheels[0], temporary)
    temporary.replace(target)
    return target


# ---------------------------------------------------------------------------
# every step, passing and failing
# ---------------------------------------------------------------------------

SLOW = step("navigate", url="/slow")
TROUBLE = step("navigate", url="/trouble")
THIRD_TIME = "(() => { window.n = (window.n || 0) + 1; if (window.n < 3) throw new Error('again'); })()"

PASSING = {
    "navigate": [step("navigate", url="/second"), step("verify_url", url="/second")],
    "navigate, relative": [
        step("navigate", url="/login"),
        step("navigate", url="second"),
        step("verify_text", text="The second page"),
    ],
    "navigate, redirect": [step("navigate", url="/redirect"), step("verify_url", url="/second")],
    "wait_for_selector": [SLOW, step("wait_for_selector", selector="#late")],
    "click": [step("click", selector="#popup")],
    "fill": [
        step("navigate", url="/login"),
        step("fill", selector="#email", value="a@b"),
        step("execute_script", script="() => { if (email.value !== 'a@b') throw Error('no') }"),
    ],
    "fill, number and truth": [
        step("navigate", url="/login"),
        step("fill", selector="#email", value=12),
        step("execute_script", script="() => { if (email.value !== '12') throw Error('no') }"),
        step("fill", selector="#email", value=True),
        step("execute_script", script="() => { if (email.value !== 'True') throw Error('no') }"),
    ],
    "fill in a frame": [
        step("navigate", url="/frame"),
        step("fill", selector="#inner >> internal:control=enter-frame >> #email", value="inside"),
    ],
    "wait": [
        SLOW,
        step("wait", duration=400),
        step("verify", verify_type="page_title", title="Done", timeout=1),
    ],
    "wait_for_url": [SLOW, step("wait_for_url", url_contains="/done")],
    "check_element": [SLOW, step("check_element", selector="li")],
    "check_element, gone": [SLOW, step("check_element", selector="#early", should_exist=False)],
    "element_exists": [SLOW, step("verify", verify_type="element_exists", selector="li")],
    "element_visible": [SLOW, step("verify", verify_type="element_visible", selector="#late")],
    "element_text": [SLOW, step("verify", verify_type="element_text", selector="ul", text="ab")],
    "element_text, as a person sees it": [
        step("execute_script", script="document.querySelector('h1').style.textTransform = 'uppercase'"),
        step("verify", verify_type="element_text", selector="h1", text="WELCOME"),
    ],
    "element_text, equal": [
        SLOW,
        step("verify", verify_type="element_text", selector="#late", text="Here at last", contains=False),
    ],
    "element_count": [SLOW, step("verify", verify_type="element_count", selector="li", count=2)],
    "element_count, none": [SLOW, step("verify", verify_type="element_count", selector="#early", count=0)],
    "page_title": [SLOW, step("verify", verify_type="page_title", title="Don")],
    "page_title, equal": [SLOW, step("verify", verify_type="page_title", title="Done", contains=False)],
    "verify_text": [SLOW, step("verify_text", text="<li>a</li>")],
    "verify_text, as a person sees it": [
        step("execute_script", script="document.body.textContent = 'Tom & Jerry'"),
        step("verify_text", text="Tom & Jerry"),
    ],
    "verify_text, gone": [SLOW, step("verify_text", text="soon gone</div>", should_exist=False)],
    "verify_url": [SLOW, step("verify_url", url="/slow/d")],
    "verify_no_errors": [step("navigate", url="/errors"), step("verify_no_errors")],
    "verify_no_errors, own": [TROUBLE, step("verify_no_errors", error_selectors=[".other"])],
    "screenshot": [
        step("screenshot", filename="shot.png"),
        step("screenshot", filename="sub/more.jpg", full_page=True),
    ],
    "switch_page": [
        step("click", selector="#popup"),
        step("switch_page", page_index=1),
        step("wait_for_selector", selector="#second"),
        step("switch_page", page_index=0),
        step("wait_for_selector", selector="#popup"),
        step("switch_page", page_index=-1),
        step("verify_url", url="/second"),
    ],
    "execute_script": [
        step("execute_script", script="document.title = 'Set by script'"),
        step("verify", verify_type="page_title", title="Set by script"),
    ],
    "execute_script, promise": [step("execute_script", script="async () => await 7")],
    "alert": [
        step("navigate", url="/alert"),
        step("click", selector="#ask"),
        step("verify", verify_type="page_title", title="dismissed"),
    ],
    "retries": [
        step("navigate", url="/"),
        step("execute_script", script=THIRD_TIME, retries=9, retry_delay_ms=1),
    ],
}

COVERED = step("navigate", url="/covered")
FAST = {"timeout": 500}
LOOK = {"timeout": 5000}  # for what must have been seen, also by a browser that has to share its processor
NOTHING = "nothing like it within 500 ms"
# name: the steps, where it fails, what was expected, what was seen
FAILING: dict[str, tuple[list[dict[str, Any]], int, str, str]] = {
    "navigate": ([step("navigate", url="http://127.0.0.1:1/")], 1, "to open", "unsafe port"),
    "navigate, nobody": (
        [step("navigate", url="http://127.0.0.1:{closed}/")],
        1,
        "to open",
        "connection refused",
    ),
    "navigate, circle": ([step("navigate", url="/circle")], 1, "/circle to open", "too many redirects"),
    "navigate, hang": ([step("navigate", url="/hang", **FAST)], 1, "/hang to open", NOTHING),
    "wait_for_selector": ([step("wait_for_selector", selector="#no", **FAST)], 1, "element #no", NOTHING),
    "wait_for_selector, hidden": (
        [COVERED, step("wait_for_selector", selector="#nothing", **LOOK)],
        2,
        "a visible element #nothing",
        'hidden <span hidden="" id="nothing">',
    ),
    "wait_for_selector, wrong": (
        [step("wait_for_selector", selector="a[")],
        1,
        "a[",
        'while parsing css selector "a["',
    ),
    "click": ([step("click", selector="#no", **FAST)], 1, "#no that can be clicked", NOTHING),
    "click, wrong": (
        [step("click", selector="a:contains('x')")],
        1,
        "a:contains('x')",
        "is not a valid selector",
    ),
    "click, covered": (
        [COVERED, step("click", selector="#under", timeout=4000)],
        2,
        "#under that can be clicked",
        '<div id="veil"></div> intercepts pointer events',
    ),
    "click, disabled": (
        [COVERED, step("click", selector="#off", timeout=4000)],
        2,
        "#off that can be clicked",
        "element is not enabled",
    ),
    "fill": ([step("fill", selector="#no", value="x", **FAST)], 1, "a field #no", NOTHING),
    "fill, checkbox": (
        [step("navigate", url="/login"), step("fill", selector="#agree", value="x")],
        2,
        "a field #agree",
        'type "checkbox" can',
    ),
    "wait_for_url": (
        [step("wait_for_url", url_contains="/never", **LOOK)],
        1,
        "an address with '/never'",
        "http://127.0.0.1:",
    ),
    "check_element": ([step("check_element", selector="#no", **LOOK)], 1, "an element #no", "not found"),
    "check_element, there": (
        [step("check_element", selector="h1", should_exist=False, **LOOK)],
        1,
        "no element h1",
        "attached",
    ),
    "check_element, wrong": ([step("check_element", selector="a[")], 1, "a[", "while parsing css selector"),
    "element_exists": (
        [step("verify", verify_type="element_exists", selector="#no", **LOOK)],
        1,
        "an element #no",
        "not found",
    ),
    "element_visible": (
        [COVERED, step("verify", verify_type="element_visible", selector="#nothing", **LOOK)],
        2,
        "a visible element",
        "hidden",
    ),
    "element_text": (
        [step("verify", verify_type="element_text", selector="h1", text="Bye", **LOOK)],
        1,
        "h1 with the text 'Bye'",
        '"Welcome"',
    ),
    "element_text, equal": (
        [step("verify", verify_type="element_text", selector="h1", text="Wel", contains=False, **LOOK)],
        1,
        "h1 to be the text 'Wel'",
        '"Welcome"',
    ),
    "element_count": (
        [step("verify", verify_type="element_count", selector="h1", count=2, **LOOK)],
        1,
        "2 elements h1",
        '"1"',
    ),
    "page_title": (
        [step("verify", verify_type="page_title", title="Bye", **LOOK)],
        1,
        "a page title with 'Bye'",
        '"Home"',
    ),
    "verify_text": (
        [step("verify_text", text="Bye", **FAST)],
        1,
        "a page with the text 'Bye'",
        NOTHING,
    ),
    "verify_text, there": (
        [step("verify_text", text="Welcome", should_exist=False, **FAST)],
        1,
        "a page without the text",
        NOTHING,
    ),
    "verify_url": (
        [step("verify_url", url="/login", **LOOK)],
        1,
        "the address to contain '/login'",
        "http://127.0.0.1:",
    ),
    "verify_url, equal": (
        [step("verify_url", url="127.0.0.1", contains=False, **LOOK)],
        1,
        "the address to be '127.0.0.1'",
        "http://127.0.0.1:",
    ),
    "verify_no_errors": (
        [TROUBLE, step("verify_no_errors")],
        2,
        "no visible error",
        ".error-message says 'The name is taken'",
    ),
    "verify_no_errors, own": (
        [TROUBLE, step("verify_no_errors", error_selectors=[".x", ".warning"])],
        2,
        "no visible error",
        ".warning says 'Careful'",
    ),
    "screenshot": (
        [step("screenshot", filename="blocked/x.png")],
        1,
        "a screenshot blocked/x.png",
        "Not a directory",
    ),
    "screenshot, link": (
        [step("screenshot", filename="link/x.png")],
        1,
        "a screenshot link/x.png",
        "would lie outside",
    ),
    "switch_page": (
        [step("switch_page", page_index=1, **FAST)],
        1,
        "a page with the index 1",
        NOTHING,
    ),
    "execute_script": (
        [step("execute_script", script="() => { throw Error('mine') }")],
        1,
        "without an error",
        "mine",
    ),
    "execute_script, endless": (
        [step("execute_script", script="new Promise(() => 0)", **FAST)],
        1,
        "without an error",
        "did not answer",
    ),
    "retries": (
        [step("click", selector="a[", retries=2, retry_delay_ms=1)],
        1,
        "an element a[",
        "while parsing css selector",
    ),
    "busy page": (
        [
            step("navigate", url="/busy"),
            step("execute_script", script="setTimeout(() => { for(;;); }, 0)"),
            step("verify", verify_type="element_visible", selector="#spin", **FAST),
        ],
        3,
        "a visible element",
        "",
    ),
    "closed page": (
        [
            step("execute_script", script="() => { window.open('/second'); }"),
            step("switch_page", page_index=1),
            step("execute_script", script="() => { window.close(); }"),
            step("wait_for_selector", selector="#no", **FAST),
        ],
        4,
        "a visible element #no",
        "closed",
    ),
}


PICTURED = ("click", "page_title", "verify_no_errors")  # at least


def run_all(place: Path, flows: dict[str, list[dict[str, Any]]]) -> tuple[Result, dict[str, Any], Desk]:
    """One run of many flows; its document, and each flow's result by name."""
    desk = Desk(place, {})
    write_flows(desk, *(flow(name, *steps) for name, steps in flows.items()))
    (desk.work / "screenshots").mkdir()
    (desk.work / "screenshots" / "blocked").write_text("a file")
    (desk.work / "screenshots" / "link").symlink_to("..")
    with Site() as pages:
        result = desk.run("flow", "--all", "--json", "--base-url", pages.url, timeout=250)
    return result, {told["name"]: told for told in result.document["flows"]}, desk


@pytest.mark.long
def test_every_step_passes(tmp_path: Path) -> None:
    browser()
    result, told, desk = run_all(tmp_path / "desk", PASSING)
    assert result.code == 0, [item["failure"] for item in told.values() if item["failure"]]
    assert set(told) == set(PASSING)
    for name, steps in PASSING.items():
        assert told[name]["passed"], name
        assert [item["status"] for item in told[name]["steps"]] == ["passed"] * (len(steps) + 1), name
        assert [item["type"] for item in told[name]["steps"][1:]] == [item["type"] for item in steps], name
    known = set(plato_sandbox.schemas()["flow"]["steps"][0]["type!?"])
    assert {kind["type"] for steps in PASSING.values() for kind in steps} == known
    types = {steps[at - 1]["type"] for steps, at, *_ in FAILING.values()}
    assert types >= known - {"wait"}
    assert told["retries"]["steps"][2]["attempts"] == 3
    shots = sorted(path.name for path in (desk.work / "screenshots").rglob("*.*g"))
    assert [re.sub(r"^\d{13}_", "", name) for name in shots] == ["shot.png", "more.jpg"]
    assert not list(desk.work.glob("*.png"))
    assert browsers_of(desk) == []


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [0, 1])
def test_every_step_fails_with_its_reason(tmp_path: Path, part: int) -> None:
    browser()
    cases = dict(list(FAILING.items())[part::2])
    with Site() as gone:
        port = gone.url.rpartition(":")[2]
    text = json.dumps({name: steps for name, (steps, *_) in cases.items()}).replace("{closed}", port)
    result, told, desk = run_all(tmp_path / "desk", json.loads(text))
    assert result.code == 8
    assert result.error["code"] == "flow_failed"
    assert f"{len(cases) - 1} more failed" in result.error["message"]
    lines = (desk.work / "flows.yml").read_text().splitlines()
    wrong = []
    for name, (steps, number, expected, seen) in cases.items():
        failure, records, failed = told[name]["failure"], told[name]["steps"], steps[number - 1]
        place = re.fullmatch(r"flows\.yml:(\d+):(\d+)", failure["place"])
        if not (
            expected in failure["expected"]
            and seen in failure["seen"]
            and not re.search(r"\n|<anonymous>|UtilityScript", failure["seen"])
            and (failure["step"], failure["type"]) == (number, failed["type"])
            and [record["status"] for record in records]
            == ["passed"] * number + ["failed"] + ["skipped"] * (len(steps) - number)
            and records[number]["attempts"] == 1 + failed.get("retries", 0)
            and place
            and lines[int(place[1]) - 1][int(place[2]) - 1 :] == f"type: {failed['type']}"
            and told[name]["trace"]
            and not failure["url"].startswith("chrome-error")
            and (name not in PICTURED or Path(failure["picture"]).read_bytes().startswith(b"\xff\xd8\xff"))
        ):
            wrong.append((name, failure))
    assert not wrong, json.dumps(wrong)
    assert [path.name for path in (desk.work / "screenshots").rglob("*")].count("x.png") == 0
    if "click" in told:
        assert told["click"]["failure"]["text"].startswith("Welcome")
    if "navigate, nobody" in told:
        failure = told["navigate, nobody"]["failure"]
        assert failure["url"] == told["navigate, nobody"]["steps"][1]["target"]
        assert failure["http_status"] is None
    assert browsers_of(desk) == []


@pytest.mark.long
def test_server_goes_away(nobody: Desk, site: Site) -> None:
    write_flows(nobody, flow("login", step("navigate", url="/gone"), step("wait", duration=1)))
    result = nobody.run("flow", "--base-url", site.url, "--json")
    assert result.code == 8
    failure = result.document["flows"][0]["failure"]
    assert failure["step"] == 1
    assert re.match("(empty response|connection (refused|reset|closed)) at", failure["seen"])


@pytest.mark.long
def test_services_that_are_not_up(nobody: Desk, site: Site) -> None:
    write_flows(nobody, flow("login", step("click", selector="#go", **FAST)))
    result = nobody.run("flow", "--base-url", f"{site.url}/unavailable", "--json")
    assert result.code == 8
    assert result.document["flows"][0]["failure"]["http_status"] == 503
    assert "HTTP 503" in result.error["hint"]
    assert "may not be up yet" in result.error["hint"]


# ---------------------------------------------------------------------------
# what is told
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_words_of_a_run(nobody: Desk, site: Site) -> None:
    """What a person reads, in order; progress on stderr, no escape codes."""
    write_flows(
        nobody,
        flow("login", step("click", selector="#popup", description="Open the other page")),
        flow("broken", step("wait_for_selector", selector="#no", timeout=100), step("wait", duration=1)),
    )
    result = nobody.run("flow", "-f", "login", "-f", "broken", "--base-url", site.url, "--slowmo", "1")
    assert result.code == 8
    time = r"\(\d+\.\d\d s\)"
    pattern = rf"""Flow login: About login
  ok       1 Open the other page {time}
Flow login passed: 1 step in .*
Flow broken: About broken
  FAILED   1 wait_for_selector #no {time}
Flow broken failed: 0 of 2 steps passed in .*
  Place:       flows.yml:11:5
  Expected:    a visible element #no
  Seen:        nothing like it within 100 ms
  Address:     {site.url}/ \(HTTP 200\)
  Page says:   Welcome
               second
  Picture:     test-results/flow-2-broken-step-01.jpeg
  Trace:       .*python.* -m playwright show-trace .*/test-results/flow-2-broken-trace.zip
  Report:      test-results/report.html
"""
    assert re.fullmatch(pattern, result.out), result.out
    assert "\x1b" not in result.out + result.err
    assert "Error: The flow broken failed at step 1 (flows.yml:11:5): expected a visible" in result.err
    quiet = nobody.run("flow", "-f", "broken", "--base-url", site.url, "-q")
    assert quiet.err.startswith("Error: ")
    names = {path.name for path in (nobody.work / "test-results").iterdir()}
    assert names == {
        ".platoignore",  # so that `sync` leaves all of it here
        "report.html",
        *(f"flow-1-broken-{name}" for name in ("step-01.jpeg", "trace.zip")),
    }


@pytest.mark.long
def test_report_stands_alone(nobody: Desk, site: Site) -> None:
    """One page: a picture of every step, all that is known of the failure, nothing loaded from elsewhere."""
    name = "<b>& 'name'"
    write_flows(
        nobody,
        flow(
            name,
            step("navigate", url="/login"),
            step("fill", selector="#email", value="a@b", description="Who <i>I</i> am"),
            step("wait_for_selector", selector="#nothing>b", timeout=100),
            step("wait", duration=1),
        ),
    )
    output = nobody.place / "out put"
    result = nobody.run("flow", "-f", name, "--base-url", site.url, "--json", "-o", str(output))
    assert result.code == 8
    report = (output / "report.html").read_text()
    assert result.document["report"] == str(output / "report.html")
    for text in (name, "Who <i>I</i> am", "a visible element #nothing>b", "nothing like it", "Log in"):
        assert html.escape(text) in report, text
        assert text not in report or html.escape(text) == text
    assert report.count("data:image/jpeg;base64,/9j/") == 3
    assert report.count('<li class="step skipped">') == 1
    assert not re.search(r"<script|<link|src=[\"'](?!data:)|https?://(?!127\.0\.0\.1)", report)
    told = result.document["flows"][0]["steps"]
    assert [bool(item["picture"]) for item in told] == [False, True, True, True, False]
    for item in told[1:4]:
        assert Path(item["picture"]).stat().st_size > 500
    assert not (nobody.work / "test-results").exists()
    assert shown_by_browser(output / "report.html") == {"1280": "fits", "390": "fits"}


def shown_by_browser(page: Path) -> dict[str, str]:
    """Whether a page needs no sideways scrolling, by the width of the window."""
    code = """
import json, sys
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1])
    found = {}
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto("file://" + sys.argv[2])
        wide = page.evaluate("document.documentElement.scrollWidth")
        found[width] = "fits" if wide <= width else f"is {wide} wide"
    browser.close()
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, browser(), str(page)], capture_output=True, text=True, check=True
    )
    value: dict[str, str] = json.loads(done.stdout)
    return value


@pytest.mark.long
def test_alerts_and_errors_of_the_page_are_told(nobody: Desk, site: Site) -> None:
    write_flows(
        nobody,
        flow(
            "login",
            step("navigate", url="/script"),
            step("navigate", url="/nowhere"),
            step("navigate", url="/alert"),
            step("click", selector="#ask"),
            step("wait_for_selector", selector="#no", timeout=100),
        ),
    )
    failure = nobody.run("flow", "--base-url", site.url, "--json").document["flows"][0]["failure"]
    troubles = "\n".join(failure["troubles"])
    assert "script error: " in troubles
    assert "null" in troubles
    assert f"404 (Not Found) {site.url}/nowhere" in troubles
    assert "alert: 'Are you there?'" in troubles


# ---------------------------------------------------------------------------
# passwords
# ---------------------------------------------------------------------------


def secret_flow(selector: str, *more: dict[str, Any], value: str = SECRET) -> dict[str, Any]:
    """A login whose page shows the password in its text, in an error and in a field."""
    return flow(
        "login",
        step("navigate", url="/login"),
        step("fill", selector=selector, value=value, description=f"Type {value} there"),
        step("click", selector="#go"),
        *more,
    )


@pytest.mark.long
@pytest.mark.parametrize("selector", ["#pin", "#shown-password"], ids=["by its type", "by its selector"])
def test_password_is_nowhere(nobody: Desk, site: Site, selector: str) -> None:
    """Not in what is printed, nor in any file, nor inside the trace; however it is spelt there."""
    extra = [] if selector == "#pin" else [step("navigate", url=f"/login?{SECRET}")]
    write_flows(
        nobody,
        secret_flow(
            selector,
            *extra,
            step("verify_no_errors", error_selectors=["#in", ".error"]),
            step("wait_for_selector", selector="#no", timeout=100),
        ),
    )
    texts = b""
    for words in (["--json"], ["--verbose"]):
        result = nobody.run("flow", "--base-url", site.url, *words)
        assert result.code == 8
        texts += (result.out + result.err).encode()
    files = texts_below(nobody.work)
    assert any(name.endswith(":trace.trace") for name in files)
    own = str(nobody.work / "flows.yml")
    everything = {"printed": texts, **{name: data for name, data in files.items() if name != own}}
    for spelling in plato_sandbox.spellings(SECRET):
        assert [name for name, data in everything.items() if spelling.encode() in data] == []
    assert b"Type *** there" in texts
    assert any(SECRET[:6] in body for body in site.posted)


@pytest.mark.long
def test_password_that_is_a_plain_word(nobody: Desk, site: Site) -> None:
    """Hidden where it stands as a value; other words stay as they are, and the trace is kept."""
    places = ("#shown-password", "#pin")
    write_flows(
        nobody,
        flow(
            "login",
            step("navigate", url="/login"),
            *(step("fill", selector=selector, value="password") for selector in places),
            step("execute_script", script="() => { form.action = '/admin/password' }"),
            step("click", selector="#go"),
            step("wait_for_selector", selector="#no", timeout=100),
        ),
        flow(
            "admin",
            step("navigate", url="/admin/login"),
            step("fill", selector="#pin", value="admin"),
            step("click", selector="#go"),
            step("wait_for_selector", selector="#no", timeout=100),
        ),
    )
    result = nobody.run("flow", "--all", "--base-url", site.url, "--json")
    login, admin = result.document["flows"]
    assert [item["target"] for item in login["steps"][2:4]] == list(places)
    assert login["failure"]["url"] == f"{site.url}/admin/password"
    assert admin["failure"]["url"] == f"{site.url}/login"
    assert admin["steps"][1]["url"] == f"{site.url}/admin/login"
    inside = texts_below(nobody.work / "test-results")
    everything = b"\n".join(data for name, data in inside.items() if ".zip:" in name)
    for word in (b"password", b"admin"):
        assert (
            re.findall(
                rb'value_?\\*":\\*"' + word + rb'\\*"|fill\(\\*"' + word + rb"|pin=" + word, everything
            )
            == []
        )
    assert b'"type":"password"' in everything
    assert b'value":"***"' in everything
    assert b"pin=***" in everything


@pytest.mark.long
def test_readable_password_is_covered_in_pictures(nobody: Desk, site: Site) -> None:
    """A field that shows what is typed: its pictures are the same whatever was typed there."""
    pictures = []
    for value in ("first-password", "another"):
        write_flows(
            nobody,
            flow(
                "login",
                step("navigate", url="/login"),
                step("fill", selector="#shown-password", value=value),
                step("execute_script", script="() => document.activeElement.blur()"),
                step("screenshot", filename=f"{value}.png"),
                step("wait_for_selector", selector="#no", timeout=100),
            ),
        )
        told = nobody.run("flow", "--base-url", site.url, "--json").document["flows"][0]
        (shot,) = (nobody.work / "screenshots").glob(f"*_{value}.png")
        pictures.append([shot.read_bytes(), Path(told["failure"]["picture"]).read_bytes()])
    assert pictures[0] == pictures[1]


# ---------------------------------------------------------------------------
# options, and what is missing
# ---------------------------------------------------------------------------

UNUSABLE = {
    "base url": (["--base-url", "example"], "not the address of a page"),
    "base url of a file": (["--base-url", "file:///etc/passwd"], "not the address of a page"),
    "both sources": (["--local", "--api"], "not allowed with"),
    "both windows": (["--headed", "--headless"], "not allowed with"),
    "all and one": (["--all", "-f", "login"], "not allowed with"),
    "name": (["-f", "logn"], "has no flow 'logn'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_options(nobody: Desk, name: str) -> None:
    write_flows(nobody, flow("login", step("wait", duration=1)))
    words, expected = UNUSABLE[name]
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", *words, "--json")
    assert result.code == 2, result
    assert expected in result.error["message"]
    if name == "name":
        assert "did you mean `login`?" in result.error["message"]


def test_report_that_cannot_be_written(nobody: Desk) -> None:
    write_flows(nobody, flow("login", step("wait", duration=1)))
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", "-o", "flows.yml/x", "--json")
    assert result.code == 1
    assert "flows.yml/x cannot be written" in result.error["message"]
    assert "--output" in result.error["hint"]


def test_default_is_the_login_flow(nobody: Desk) -> None:
    write_flows(nobody, flow("checkout", step("wait", duration=1)))
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", "--json")
    assert result.code == 2
    assert result.error["message"].endswith("has no flow 'login'; there are: checkout")


def test_flow_without_steps_is_refused(nobody: Desk) -> None:
    write_flows(nobody, flow("login"))
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", "--json")
    assert result.code == 2
    assert "has no steps" in result.error["message"]


def test_without_playwright(nobody: Desk, tmp_path: Path) -> None:
    """One line with a command that is for this very interpreter."""
    write_flows(nobody, flow("login", step("wait", duration=1)))
    hidden = "sys.modules['playwright'] = None"
    result = nobody.run(command=altered(hidden, "flow", "--base-url", "http://127.0.0.1:9", "--json"))
    assert result.code == 1
    message = result.error["message"]
    assert "\n" not in message
    assert "playwright" in message
    assert sys.executable in message or "venv" in message or message.endswith("install playwright")
    assert not list((nobody.work / "test-results").glob("*.html"))


@pytest.mark.long
def test_without_a_browser(nobody: Desk, tmp_path: Path) -> None:
    browser()
    write_flows(nobody, flow("login", step("wait", duration=1)))
    environment = {"PATH": "/nonexistent", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path)}
    result = nobody.run("flow", "--base-url", "http://127.0.0.1:9", "--json", environment=environment)
    assert result.code == 1
    assert f"{sys.executable} -m playwright install" in result.error["message"]
    assert "\n" not in result.error["message"]
    assert "PLATO_BROWSER" in result.error["message"]
    assert browsers_of(nobody) == []


@pytest.mark.long
def test_browser_of_the_environment(nobody: Desk, site: Site, tmp_path: Path) -> None:
    mark = tmp_path / "used"
    own = tmp_path / "my browser"
    own.write_text(f'#!/bin/sh\ntouch "{mark}"\nexec {browser()} "$@"\n')
    own.chmod(0o755)
    write_flows(nobody, flow("login", step("verify_url", url=site.url)))
    nobody.good("flow", "--base-url", site.url, environment={"PLATO_BROWSER": str(own)})
    assert mark.exists()
    mark.unlink()
    wrong = nobody.run(
        "flow", "--base-url", site.url, "--json", environment={"PLATO_BROWSER": str(tmp_path / "none")}
    )
    assert wrong.code == 1
    assert f"executable doesn't exist at {tmp_path}/none" in wrong.error["message"]
    assert "PLATO_BROWSER" in wrong.error["message"]


@pytest.mark.long
def test_browser_that_ends_at_once(nobody: Desk, site: Site, tmp_path: Path) -> None:
    write_flows(nobody, flow("login", step("verify_url", url=site.url)))
    result = nobody.run(
        "flow", "--base-url", site.url, "--json", environment={"PLATO_BROWSER": shutil.which("false") or ""}
    )
    assert result.code == 1
    assert "could not be opened" in result.error["message"]
    assert browsers_of(nobody) == []


# ---------------------------------------------------------------------------
# the end: patience, time-outs, interruptions, nothing left
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_slow_simulators_have_the_time_that_the_sdk_gives_them(nobody: Desk, site: Site) -> None:
    """30 s to open a page, and 8 s for an element and then 30 s until it can be used."""
    write_flows(nobody, flow("login", step("navigate", url="/late"), step("click", selector="#under")))
    assert nobody.good("flow", "--base-url", site.url, "--json").document["passed"]


@pytest.mark.long
def test_time_for_the_whole_is_over(nobody: Desk, site: Site) -> None:
    write_flows(nobody, flow("login", step("wait", duration=1), step("wait", duration=600000)))
    result = nobody.run("flow", "--timeout", "9", "--base-url", site.url, "--json")
    assert result.code == 7
    assert result.error["code"] == "timed_out"
    told = result.document["flows"][0]
    assert [item["status"] for item in told["steps"]] == ["passed", "passed", "failed"]
    assert "9 s for the whole run" in told["failure"]["seen"]
    assert Path(result.document["report"]).exists()
    assert browsers_of(nobody) == []


ENDLESS = flow("login", step("navigate", url="/second"), step("wait", duration=600000))


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
)
def test_interruption_leaves_nothing(
    nobody: Desk, site: Site, temporary: Path, number: int, group: bool
) -> None:
    write_flows(nobody, ENDLESS)
    process = nobody.begin("flow", "--base-url", site.url, "--json", start_new_session=True)
    eventually(lambda: "/second" in site.paths)
    assert len(browsers_of(nobody)) > 2
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    result = ending(process)
    assert result.code == 128 + number
    assert result.error["code"] == "interrupted"
    eventually(lambda: browsers_of(nobody) == [])
    assert list(temporary.glob("pl*")) == []


@pytest.mark.sampled
@pytest.mark.parametrize("moment", ["playwright", "launch", "context"])
def test_interruption_while_the_browser_opens(nobody: Desk, site: Site, moment: str) -> None:
    """A Ctrl-C in the terminal, so that everything gets it, at a moment chosen in the middle of the start."""
    write_flows(nobody, ENDLESS)
    places = {
        "playwright": "ours = api.async_playwright\n"
        "def outer(): os.killpg(0, 2); return ours()\napi.async_playwright = outer",
        "launch": "ours = api.BrowserType.launch\n"
        "async def launch(*a, **k): os.killpg(0, 2); return await ours(*a, **k)\n"
        "api.BrowserType.launch = launch",
        "context": "ours = api.Browser.new_context\n"
        "async def new(*a, **k): os.killpg(0, 2); return await ours(*a, **k)\napi.Browser.new_context = new",
    }
    command = altered(
        f"import os, playwright.async_api as api\n{places[moment]}", "flow", "--base-url", site.url, "--json"
    )
    result = ending(nobody.begin_command(command, start_new_session=True))
    assert result.code == 130, result
    eventually(lambda: browsers_of(nobody) == [])


@pytest.mark.long
def test_second_interruption_ends_it_at_once(nobody: Desk, site: Site) -> None:
    write_flows(nobody, ENDLESS)
    slow = (
        "import asyncio\nfrom playwright.async_api._context_manager import PlaywrightContextManager\n"
        "async def close(self, *words):\n    open('closing', 'w').close()\n    await asyncio.sleep(600)\n"
        "PlaywrightContextManager.__aexit__ = close"
    )
    process = nobody.begin_command(altered(slow, "flow", "--base-url", site.url), start_new_session=True)
    eventually(lambda: "/second" in site.paths)
    process.send_signal(signal.SIGINT)
    eventually((nobody.work / "closing").exists)
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 130
    eventually(lambda: browsers_of(nobody) == [])


@pytest.mark.long
def test_kill_of_the_command_leaves_nothing(nobody: Desk, site: Site, temporary: Path) -> None:
    """Nothing of ours can run any more: the driver ends the browser. Only its trace is left, for nobody."""
    write_flows(nobody, ENDLESS)
    process = nobody.begin("flow", "--base-url", site.url)
    eventually(lambda: "/second" in site.paths)
    process.kill()
    process.wait()
    eventually(lambda: browsers_of(nobody) == [])
    assert [path.stat().st_mode & 0o777 for path in temporary.glob("plato-*")] == [0o700]


@pytest.mark.long
def test_closed_output_ends_the_browser(nobody: Desk, site: Site) -> None:
    write_flows(nobody, flow("login", step("verify_url", url=site.url), step("wait", duration=1)))
    reading, writing = os.pipe()
    os.close(reading)
    command = nobody.command("flow", "--base-url", site.url)
    done = subprocess.run(
        command, cwd=nobody.work, env=nobody.environment, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    eventually(lambda: browsers_of(nobody) == [])


@pytest.mark.long
def test_browser_that_is_killed(nobody: Desk, site: Site) -> None:
    write_flows(nobody, ENDLESS)
    process = nobody.begin("flow", "--base-url", site.url, "--json")
    eventually(lambda: "/second" in site.paths)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            mine = os.fsencode(f"HOME={nobody.home}") + b"\0" in (entry / "environ").read_bytes()
            if mine and b"--remote-debugging-pipe" in words:
                os.kill(int(entry.name), signal.SIGKILL)
    process.send_signal(signal.SIGINT)
    assert ending(process).code == 130
    eventually(lambda: browsers_of(nobody) == [])


@pytest.mark.long
def test_keep_open_until_ctrl_c(nobody: Desk, site: Site, tmp_path: Path) -> None:
    """The result is that of the flow; Ctrl-C is how a person says that they have seen enough."""
    write_flows(nobody, flow("login", step("verify_url", url=site.url)))
    unseen = tmp_path / "chromium"
    unseen.write_text(f'#!/bin/sh\nexec {browser()} --headless "$@"\n')
    unseen.chmod(0o755)
    nobody.environment.update({"PLATO_BROWSER": str(unseen), "DISPLAY": ":none"})
    words = ["flow", "--keep-open", "--base-url", site.url, "--json"]
    process = nobody.begin(*words)
    assert process.stderr is not None
    assert any("stays open" in line for line in iter(process.stderr.readline, ""))
    assert process.poll() is None
    assert (nobody.work / "test-results" / "report.html").exists()
    process.send_signal(signal.SIGINT)
    result = ending(process)
    assert result.code == 0, result
    assert result.document["passed"]
    eventually(lambda: browsers_of(nobody) == [])


# ---------------------------------------------------------------------------
# with a sandbox
# ---------------------------------------------------------------------------

SERVE = (
    "mkdir -p site && echo '<title>On the VM</title>' > site/index.html && cd site && "
    "(setsid python3 -m http.server {port} >/dev/null 2>&1 &)"
)
ON_VM = step("verify", verify_type="page_title", title="On the VM")


def serve_page(desk: Desk, plato: LocalPlato) -> None:
    """A page on the port of the VM to which the public URL leads."""
    desk.ssh(SERVE.format(port=8080))
    url = desk.state["public_url"]

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return b"On the VM" in answer.read()
        except OSError:
            return False

    eventually(answers)


@pytest.mark.long
def test_flow_of_a_sandbox(desk: Desk, plato: LocalPlato) -> None:
    """Against its address, with its local flows; then with those that Plato has."""
    browser()
    desk.good("start", "--from-config")
    write_flows(desk, flow("login", ON_VM))
    down = desk.run("flow", "--json")
    assert down.code == 8
    assert "HTTP 502" in down.error["hint"]
    serve_page(desk, plato)
    result = desk.good("flow", "--json")
    assert result.document["source"] == "local"
    assert result.document["address"] == desk.state["url"]
    assert result.document["flows_path"] == str(desk.work / "flows.yml")
    assert "Plato has no flows" in desk.run("flow", "--api", "--json").error["message"]
    theirs = [flow("login", ON_VM), {"name": "other", "id": 3, "steps": None}]
    plato.fault("status", status=200, method="GET", path="/api/v2/jobs/*/flows", body=theirs, times=-1)
    result = desk.good("flow", "--api", "--json")
    assert result.document["source"] == "api"
    assert result.document["flows_path"] is None
    listed = desk.good("flow", "--list", "--api", "--json").document
    assert [(item["name"], item["steps"]) for item in listed["flows"]] == [("login", 1), ("other", 0)]
    shutil.rmtree(desk.work / "test-results")
    (desk.work / "plato-config.yml").unlink()
    (desk.work / "flows.yml").unlink()
    assert desk.good("flow", "--json").document["source"] == "api"
    assert desk.run("flow", "--local", "--json").code == 8
    desk.good("stop")
    assert desk.run("flow", "--json").code == 3
    assert browsers_of(desk) == []


@pytest.mark.long
def test_flows_of_plato_with_problems(desk: Desk, plato: LocalPlato) -> None:
    desk.good("start", "--blank", "--service", "myapp")
    body = [{"name": "login", "steps": [{"type": "clik"}, {"type": "click"}]}]
    plato.fault("status", status=200, method="GET", path="/api/v2/jobs/*/flows", body=body)
    result = desk.run("flow", "--api", "--json")
    assert result.code == 8
    assert "`flows.login.steps.1.type` is clik; did you mean `click`?" in result.error["message"]
    assert "`flows.login.steps.2.selector` is missing" in result.error["message"]


@pytest.mark.long
def test_flows_of_an_artifact(desk: Desk, plato: LocalPlato) -> None:
    """A server without flows of jobs is asked for those of the artifact, in each shape that they may have."""
    desk.good("start", "--blank", "--service", "myapp")
    (desk.work / "plato-config.yml").unlink()
    state = desk.state_file.read_text().replace("mode: blank", "mode: artifact\nartifact_id: art_1")
    desk.state_file.write_text(state)
    plato.fault(
        "status", status=404, method="GET", path="/api/v2/jobs/*/flows", body={"detail": "x"}, times=-1
    )
    flows = [flow("login", step("wait", duration=1))]
    text = yaml.safe_dump({"flows": flows})
    bodies = (
        flows,
        {"flows": flows},
        {"data": {"flows": text}},
        {"data": {"flows": flows}},
        json.dumps(text),
        text,
    )
    for nth, body in enumerate(bodies, 1):
        path = "/api/v1/simulator/art_1/flows"
        headers = {"Content-Type": "application/json"}
        plato.fault("status", status=200, method="GET", path=path, body=body, nth=nth, headers=headers)
    for _ in bodies:
        listed = desk.good("flow", "--list", "--json").document
        assert [item["name"] for item in listed["flows"]] == ["login"]
        assert listed["source"] == "api"


@pytest.mark.long
def test_vm_that_is_gone(desk: Desk, plato: LocalPlato) -> None:
    browser()
    desk.good("start", "--from-config", environment={"PLATO_HEARTBEAT_INTERVAL_SECONDS": "3600"})
    write_flows(desk, flow("login", ON_VM))
    plato.advance(20 * 3600)
    result = desk.run("flow", "--json")
    assert result.code == 3
    assert "gone" in result.error["message"]
    assert browsers_of(desk) == []


def mutation(table: str, action: str) -> dict[str, Any]:
    return {"table_name": table, "action": action, "row": {"id": 1}}


@pytest.mark.long
def test_verify_no_mutations(desk: Desk, plato: LocalPlato) -> None:
    """Only what the flow itself adds counts."""
    browser()
    desk.good("start", "--from-config")
    serve_page(desk, plato)
    write_flows(desk, flow("login", ON_VM))
    job = desk.state["job_id"]

    def state(nth: int, *mutations: dict[str, Any]) -> None:
        answer = {"success": True, "state": {"db": {"mutations": mutations}, "mutations": mutations}}
        body = {"session_id": desk.state["session_id"], "results": {job: answer}}
        plato.fault("status", status=200, method="GET", path="/api/v2/sessions/*/state", body=body, nth=nth)

    old = mutation("users", "UPDATE")
    state(1, old)
    state(2, old)
    assert desk.good("flow", "--verify-no-mutations", "--json").document["mutations"] == []
    plato.clear_faults()
    state(1, old)
    state(2, old, old, mutation("activity", "INSERT"))
    result = desk.run("flow", "--verify-no-mutations", "--json")
    assert result.code == 8
    assert "2 mutations: activity (1 inserted); users (1 updated)" in result.error["message"]
    assert result.document["flows"][0]["passed"]
    added = [old, mutation("activity", "INSERT")]
    assert result.document["mutations"] == [{"listener": "db", **one} for one in added]


# ---------------------------------------------------------------------------
# the example simulator, and Python programs
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_flows_of_the_example_simulator(nobody: Desk, app: str) -> None:  # noqa: F811
    """A real application: its flows pass, and its wrong password fails at the step that says so."""
    browser()
    shutil.copy(SIMULATOR / "flows.yml", nobody.work)
    result = nobody.run("flow", "--all", "--base-url", app, "--json")
    assert result.code == 8
    told = {item["name"]: item for item in result.document["flows"]}
    assert {name: item["passed"] for name, item in told.items()} == {
        "login": True,
        "wrong_password": False,
        "add_task": True,
    }
    failure = told["wrong_password"]["failure"]
    assert failure["step"] == 5
    assert "Wrong email or password." in failure["text"]
    assert len(list((nobody.work / "screenshots").glob("*.png"))) == 3
    text = result.out + (nobody.work / "test-results" / "report.html").read_text()
    assert "demo-password" not in text
    assert "not-the-password" not in text


@pytest.mark.long
def test_python_program(nobody: Desk, site: Site) -> None:
    """The method, also inside of a running event loop."""
    write_flows(
        nobody,
        flow("login", step("verify_url", url=site.url), step("wait_for_selector", selector="#no", **FAST)),
    )
    program = f"""
import asyncio, json, sys
sys.path.insert(0, {str(ROOT)!r})
from plato_sandbox import Sandbox
async def work():
    steps = []
    def told(flow, step):
        steps.append(step and step["status"])
    report = Sandbox(".").flow(base_url={site.url!r}, told=told)
    error = report.pop("error")
    name = json.loads(json.dumps(report))["flows"][0]["name"]
    return [report["passed"], steps, type(error).__name__, error.exit_code, name]
print(json.dumps(asyncio.run(work())))
"""
    done = nobody.run(command=[sys.executable, "-W", "error", "-c", program])
    assert json.loads(done.out) == [
        False,
        ["passed", "passed", "failed", None],
        "FlowFailedError",
        8,
        "login",
    ]
    assert done.err == ""
