"""Coverage-guided fuzzing: whatever comes in, only errors of the product come out (see `fuzz.py`)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fuzz
import pytest
from conftest import ROOT, missing

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE_RUNS = 2000
SOAK_RUNS = 110_000
SOAK_SECONDS = 150
HANG_SECONDS = 30  # a single execution that takes so long never ends, for all that anybody knows


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
    assert done.returncode == 0, f"{said[-6000:]}\n{found}"
    counted = re.search(r"^Done (\d+) in", said, re.MULTILINE)
    assert counted, said[-2000:]
    executions = int(counted[1])
    assert executions >= SAMPLE_RUNS
    assert re.search(r"cov: \d{2,}", said), "the search saw nothing of the product's code"
    tally("fuzz executions", executions)


def test_a_wrong_answer_of_the_product_is_found(tmp_path: Path) -> None:
    """The targets do look: a reader that takes a word for another is caught by the first text that has it."""
    for target, change in (
        ("yaml", "product.yaml_load = lambda text, source='': {'a': 1}"),
        ("ignore", "product.IgnoreRules.decide = lambda *words: 1 / 0"),
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
