"""Coverage-guided fuzzing: whatever comes in, only errors of the product come out (see `fuzz.py`)."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuzz
import pytest
from conftest import ROOT, missing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE_RUNS = 2000
SOAK_RUNS = 110_000
SOAK_SECONDS = 60
HANG_SECONDS = 30  # a single execution that takes so long never ends, for all that anybody knows


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 120)
@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_nothing_but_our_own_errors(
    target: str, tmp_path: Path, soaking: bool, tally: Callable[[str, int], None]
) -> None:
    if importlib.util.find_spec("atheris") is None:
        if not (3, 11) <= sys.version_info < (3, 14):
            pytest.skip("atheris is for Python 3.11 to 3.13")
        missing("atheris is not installed; it is in the test group of pyproject.toml")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(fuzz.corpus(target)):
        (corpus / f"{number:03d}").write_bytes(text)
    command = [
        *(sys.executable, str(ROOT / "tests" / "fuzz.py"), target),
        *(
            "-seed=20250101",
            f"-atheris_runs={SOAK_RUNS if soaking else SAMPLE_RUNS}",
            f"-timeout={HANG_SECONDS}",
        ),
        *("-print_final_stats=1", "-rss_limit_mb=2048", f"-artifact_prefix={tmp_path}/"),
        *([f"-max_total_time={SOAK_SECONDS}"] if soaking else []),
        str(corpus),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    found = [path.read_bytes()[:2000] for path in tmp_path.glob("*-*") if path.is_file()]
    counted = re.search(r"^Done (\d+) (?:runs )?in", said, re.MULTILINE)
    # The alarm by which it looks for hangs can come when it is done and Python has put its handlers away.
    endings = (0, -signal.SIGALRM) if counted else (0,)
    assert done.returncode in endings, f"{said[-6000:]}\n{found}"
    assert counted, said[-2000:]
    executions = int(counted[1])
    assert executions >= SAMPLE_RUNS
    assert re.search(r"cov: \d{2,}", said), "the search saw nothing of the product's code"
    tally("fuzz executions", executions)


@pytest.mark.long
def test_a_wrong_answer_of_the_product_is_found(tmp_path: Path) -> None:
    """The targets do look: a reader that takes a word for another is caught by the first text that has it."""
    for target, change in (
        ("yaml", "product.yaml_load = lambda text, source='': {'a': 1}"),
        ("ignore", "product.IgnoreFile.verdict = lambda *words: 1 / 0"),
        ("state", "product.printable = str"),
    ):
        program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import fuzz
product = fuzz.product
{change}
for text in [*fuzz.corpus({target!r}), b'session_id: "\\\\e[35m"\\n']:
    fuzz.TARGETS[{target!r}](text)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 1, target
        assert re.search(rb"^(AssertionError|ZeroDivisionError)", done.stderr, re.MULTILINE), done.stderr[
            -500:
        ]


# Answers of the right shape but for one thing in them, which a search by bytes seldom makes

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["", "\x1b[2J", "x\ny", "\u202e", "-1", "ready", "running", "2" * 400, "\ud800", [], {}]
    )
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FORMS = {
    "answers": [*fuzz.ANSWERS, *({"results": {fuzz.JOB: {"state": fuzz.STATE}}},)],
    "mutations": [fuzz.STATE],
    "state": [fuzz.RECORD],
    "slot": [fuzz.SLOT],
    "flows": [{"flows": [fuzz.FLOW]}],
}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@st.composite
def altered_forms(draw: Any, target: str) -> Any:
    """A known form with up to three of its parts taken away, or something else in their stead."""
    value = copy.deepcopy(draw(st.sampled_from(FORMS[target])))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(value)[1:] or [(None,)]))
        part = value
        for key in way:
            part = part[key]
        if last is None or draw(st.booleans()):
            if isinstance(part, (dict, list)) and last is not None:
                part.pop(last)
        else:
            part[last] = draw(ANYTHING)
    return value


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the targets put in the place of files is taken back."""
    for owner, name in (
        (fuzz.product, "load_state"),
        (fuzz.product, "read_config"),
        (fuzz.product, "text_of_others"),
        (fuzz.product, "heartbeat_facts"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.sampled
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("target", FORMS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_form_with_something_else_in_it(target: str, data: st.DataObject) -> None:
    text = json.dumps(data.draw(altered_forms(target))).encode()
    before = {"answers": b"2", "state": b"session_id: a-1\n\0", "flows": b"\xff"}
    fuzz.TARGETS[target](before.get(target, b"") + text)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_listing_with_something_else_in_it(data: st.DataObject) -> None:
    fields = list(fuzz.LISTING)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(fields) - 1))
        fields[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.lists(st.binary(max_size=12) | st.sampled_from(fuzz.LISTING), max_size=2)
        )
    fuzz.TARGETS["listings"](b"\0".join(fields))
