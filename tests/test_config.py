"""plato-config.yml: what is wrong is told with its place before anything is created; the rest is sent on."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR, Desk, sent

if TYPE_CHECKING:
    from pathlib import Path

    from localplato import LocalPlato

HEAD = "service: myapp\ndatasets:\n  base:\n"
MYSQL = "db_type: mysql, db_database: d"
MARK = "§"


def unmarked(text: str) -> tuple[str, list[str]]:
    """A text without its marks, and the LINE:COLUMN of each."""
    places = []
    while MARK in text:
        before, _, after = text.partition(MARK)
        places.append(f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}")
        text = before + after
    return text, places


def write_config(desk: Desk, text: str | bytes, name: str = "plato-config.yml") -> Path:
    path = desk.work / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def dataset_of(text: str) -> Any:
    return yaml.safe_load(text)["datasets"]["base"]


# Each: a config whose mark stands where the problem is, and what the message must name.
WRONG: dict[str, tuple[str, str]] = {
    "empty": (MARK, "empty"),
    "comments only": (f"{MARK}# nothing yet\n", "empty"),
    "a list": (f"{MARK}- service: myapp\n", "map"),
    "a text": (f"{MARK}just words\n", "map"),
    "unclosed bracket": (f"{HEAD}    compute: {MARK}{{cpus: 2\n", ""),
    "tab": (f"service: myapp\n{MARK}\tdatasets: 1\n", "tab"),
    "duplicate key": (f"service: myapp\n{MARK}service: other\n", "service"),
    "two documents": (f"service: myapp\n{MARK}---\nservice: other\n", "document"),
    "no service": (f"{MARK}datasets:\n  base: {{}}\n", "service"),
    "service is a number": (f"service: {MARK}12\ndatasets:\n  base: {{}}\n", "service"),
    "service is a list": (f"service: {MARK}[a]\ndatasets:\n  base: {{}}\n", "service"),
    "service is a path": (f"service: {MARK}../x\ndatasets:\n  base: {{}}\n", "service"),
    "service is empty text": (f"service: {MARK}''\ndatasets:\n  base: {{}}\n", "service"),
    "no datasets": (f"{MARK}service: myapp\n", "datasets"),
    "datasets is a list": (f"service: myapp\ndatasets:\n  {MARK}- base\n", "datasets"),
    "datasets is empty": (f"service: myapp\ndatasets: {MARK}{{}}\n", "base"),
    "dataset is a list": (f"service: myapp\ndatasets:\n  base: {MARK}[]\n", "base"),
    "compute is a text": (f"{HEAD}    compute: {MARK}big\n", "compute"),
    "metadata is a list": (f"{HEAD}    metadata: {MARK}[]\n", "metadata"),
    "services is a list": (f"{HEAD}    services: {MARK}[main]\n", "services"),
    "a service is a text": (f"{HEAD}    services:\n      main: {MARK}compose\n", "services.main"),
    "a listener is null": (f"{HEAD}    listeners:\n      db: {MARK}~\n", "listeners.db"),
    "cpus 0": (f"{HEAD}    compute: {{cpus: {MARK}0}}\n", "compute.cpus"),
    "cpus 9": (f"{HEAD}    compute: {{cpus: {MARK}9}}\n", "compute.cpus"),
    "cpus negative": (f"{HEAD}    compute: {{cpus: {MARK}-2}}\n", "compute.cpus"),
    "cpus a fraction": (f"{HEAD}    compute: {{cpus: {MARK}1.5}}\n", "compute.cpus"),
    "cpus a word": (f"{HEAD}    compute: {{cpus: {MARK}two}}\n", "compute.cpus"),
    "cpus a truth": (f"{HEAD}    compute: {{cpus: {MARK}yes}}\n", "compute.cpus"),
    "cpus a list": (f"{HEAD}    compute: {{cpus: {MARK}[2]}}\n", "compute.cpus"),
    "cpus infinite": (f"{HEAD}    compute: {{cpus: {MARK}.inf}}\n", "compute.cpus"),
    "memory 511": (f"{HEAD}    compute: {{memory: {MARK}511}}\n", "compute.memory"),
    "memory 16385": (f"{HEAD}    compute: {{memory: {MARK}16385}}\n", "compute.memory"),
    "disk 1023": (f"{HEAD}    compute: {{disk: {MARK}1023}}\n", "compute.disk"),
    "disk 204801": (f"{HEAD}    compute: {{disk: {MARK}204801}}\n", "compute.disk"),
    "app_port 65536": (f"{HEAD}    compute: {{app_port: {MARK}65536}}\n", "compute.app_port"),
    "app_port -1": (f"{HEAD}    compute: {{app_port: {MARK}-1}}\n", "compute.app_port"),
    "native_worker a text": (f"{HEAD}    compute: {{native_worker: {MARK}maybe}}\n", "compute.native_worker"),
    "name a number": (f"{HEAD}    metadata: {{name: {MARK}1.0}}\n", "metadata.name"),
    "service type": (f"{HEAD}    services: {{main: {{type: {MARK}podman}}}}\n", "services.main.type"),
    "healthy wait 29": (
        f"{HEAD}    services: {{main: {{healthy_wait_timeout: {MARK}29}}}}\n",
        "services.main.healthy_wait_timeout",
    ),
    "containers a text": (
        f"{HEAD}    services: {{main: {{required_healthy_containers: {MARK}all}}}}\n",
        "services.main.required_healthy_containers",
    ),
    "listener type": (f"{HEAD}    listeners: {{it: {{type: {MARK}kafka}}}}\n", "listeners.it.type"),
    "listener type a list": (f"{HEAD}    listeners: {{it: {{type: {MARK}[db]}}}}\n", "listeners.it.type"),
    "no db_type": (f"{HEAD}    listeners: {{it: {MARK}{{db_database: d}}}}\n", "listeners.it.db_type"),
    "db_type": (
        f"{HEAD}    listeners: {{it: {{db_type: {MARK}oracle, db_database: d}}}}\n",
        "listeners.it.db_type",
    ),
    "no db_database": (
        f"{HEAD}    listeners: {{it: {MARK}{{db_type: mysql}}}}\n",
        "listeners.it.db_database",
    ),
    "db_port": (
        f"{HEAD}    listeners: {{it: {{{MYSQL}, db_port: {MARK}70000}}}}\n",
        "listeners.it.db_port",
    ),
    "ignore rules a text": (
        f"{HEAD}    listeners: {{it: {{{MYSQL}, audit_ignore_tables: {MARK}sessions}}}}\n",
        "audit_ignore_tables",
    ),
    "an ignore rule a number": (
        f"{HEAD}    listeners: {{it: {{{MYSQL}, audit_ignore_tables: [a, {MARK}7]}}}}\n",
        "audit_ignore_tables",
    ),
    "no target_dir": (f"{HEAD}    listeners: {{it: {MARK}{{type: file}}}}\n", "listeners.it.target_dir"),
    "proxy_port 80": (f"{HEAD}    listeners: {{it: {{type: proxy, proxy_port: {MARK}80}}}}\n", "proxy_port"),
    "a number that JSON lacks": (f"{HEAD}    anything:\n      - deep: {MARK}.nan\n", ".nan"),
    "another number that JSON lacks": (f"{HEAD}    metadata: {{variables: [{{a: {MARK}-.inf}}]}}\n", ".inf"),
}


@pytest.mark.parametrize(("marked", "named"), WRONG.values(), ids=WRONG)
def test_a_problem_is_told_with_its_place(
    visitor: Desk, shared_plato: LocalPlato, marked: str, named: str
) -> None:
    text, places = unmarked(marked)
    write_config(visitor, text)
    before = len(shared_plato.requests())
    result = visitor.run("start", "-c", "--json")
    assert result.code == 8
    for told in (result.error["message"], result.err):
        assert f"plato-config.yml:{places[0]}: " in told
        assert named in told
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_all_problems_are_told_at_once(visitor: Desk, shared_plato: LocalPlato) -> None:
    text, places = unmarked(
        f"""\
service: {MARK}no/slashes
datasets:
  base:
    compute:
      cpus: {MARK}64
      memory: {MARK}lots
    services:
      main: {{type: docker-compose, healthy_wait_timeout: {MARK}1}}
    listeners:
      db: {MARK}{{type: db}}
      files: {MARK}{{type: file}}
"""
    )
    write_config(visitor, text)
    before = len(shared_plato.requests())
    result = visitor.run("start", "--from-config")
    assert (result.code, result.out) == (8, "")
    lines = [line for line in result.err.splitlines() if "plato-config.yml:" in line]
    told = [line.split("plato-config.yml:")[1].split(": ")[0] for line in lines]
    assert sorted(set(told)) == sorted(places)
    assert len(told) == len(places) + 1, "a db listener lacks two fields"
    assert f"{len(told)} problems" in result.err
    assert len(shared_plato.requests()) == before


@pytest.mark.parametrize("others", [False, True], ids=["this dataset", "another dataset"])
def test_only_the_chosen_dataset_is_checked(visitor: Desk, others: bool) -> None:
    write_config(visitor, "service: myapp\ndatasets:\n  base: {compute: {cpus: 99}}\n  small: {}\n")
    result = visitor.run("start", "-c", *(["--dataset", "small"] if others else []))
    assert result.code == (0 if others else 8)
    if others:
        assert visitor.state["dataset"] == "small"
        visitor.good("stop")


@pytest.mark.parametrize(
    ("name", "told"), [("empyt", "did you mean `empty`?"), ("1", "there are: base, empty")]
)
def test_an_unknown_dataset_is_answered_with_the_known_ones(
    visitor: Desk, shared_plato: LocalPlato, name: str, told: str
) -> None:
    before = len(shared_plato.requests())
    result = visitor.run("start", "-c", "-d", name, "--json")
    assert result.code == 8
    assert name in result.error["message"]
    assert told in result.error["message"]
    assert len(shared_plato.requests()) == before


# The file as such


def directory(path: Path) -> None:
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def not_text(path: Path) -> None:
    path.write_bytes(b"service: caf\xe9\n")


def sixteen_bits(path: Path) -> None:
    path.write_bytes("service: myapp\n".encode("utf-16"))


def forbidden(path: Path) -> None:
    path.write_text("service: myapp\n")
    path.chmod(0)


UNREADABLE = [directory, dangling_link, not_text, sixteen_bits, *([forbidden] if os.geteuid() else [])]


@pytest.mark.parametrize("make", UNREADABLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["plato-config.yml", "plato-config.yaml"])
def test_a_config_that_cannot_be_read(visitor: Desk, shared_plato: LocalPlato, make: Any, name: str) -> None:
    (visitor.work / "plato-config.yml").unlink()
    make(visitor.work / name)
    before = len(shared_plato.requests())
    result = visitor.run("start", "-c", "--json")
    assert result.code == 8
    assert name in result.error["message"]
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_no_config(visitor: Desk, shared_plato: LocalPlato) -> None:
    (visitor.work / "plato-config.yml").unlink()
    before = len(shared_plato.requests())
    result = visitor.run("start", "-c", "--json")
    assert result.code == 8
    assert "plato-config.yml" in result.error["message"]
    assert str(visitor.work) in result.error["message"]
    assert "-w" in result.error["hint"]
    assert len(shared_plato.requests()) == before


def test_the_other_name_is_found(visitor: Desk) -> None:
    (visitor.work / "plato-config.yml").rename(visitor.work / "plato-config.yaml")
    visitor.good("start", "-c")
    assert visitor.state["plato_config_path"] == str(visitor.work / "plato-config.yaml")
    visitor.good("stop")


def test_the_first_name_wins(visitor: Desk) -> None:
    write_config(visitor, "service: second\ndatasets: {base: {}}\n", "plato-config.yaml")
    visitor.good("start", "-c")
    assert visitor.state["plato_config_path"] == str(visitor.work / "plato-config.yml")
    assert visitor.state["service"] == "taskboard"
    visitor.good("stop")


# What is sent

SENT: dict[str, str] = {
    "nothing but a name": f"{HEAD}    {{}}\n",
    "lowest values": f"{HEAD}    compute: {{cpus: 1, memory: 512, disk: 1024, app_port: 0}}\n",
    "highest values": f"{HEAD}    compute: {{cpus: 8, memory: 16384, disk: 204800, app_port: 65535}}\n",
    "empty sections": f"{HEAD}    compute:\n    metadata:\n    services:\n    listeners:\n",
    "CRLF and a byte order mark": f"\ufeff{HEAD}    compute: {{cpus: 3}}\n".replace("\n", "\r\n"),
    "unknown keys at every level": f"""\
{HEAD}    compute: {{cpus: 2, accelerators: 1}}
    metadata: {{name: App, owner: {{team: [a, b]}}}}
    services: {{main: {{type: docker-compose, profiles: [x], weight: 1.5}}}}
    listeners:
      db:
        type: db
        db_type: postgresql
        db_database: d
        db_password: 'p@ss: word'
        audit_ignore_tables:
          - sessions
          - {{table: users, columns: [last_login, "updated at"], note: ours}}
        custom: null
    extra: {{on: [1, 0x1f, 1_000, true, ~, 2024-01-01x, "2024-01-01"]}}
""",
    "parts without a type": f"""\
{HEAD}    services: {{main: {{file: compose.yml}}, other: {{}}}}
    listeners: {{db: {{db_type: sqlite, db_database: d}}}}
""",
    "anchors and merges": f"""\
{HEAD}    compute: &size {{cpus: 4, memory: 4096}}
    metadata: {{name: A}}
    more:
      <<: *size
      cpus: 5
      again: [*size, *size]
""",
    "text of every kind": f"""\
{HEAD}    metadata:
      description: >-
        folded
        text

        of two paragraphs
      license: "tab\\tand \\u00e9"
      start_url: 'it''s'
      favicon: |
        kept
          as is
    ünïcode: "→ 漢字 😀"
""",
}


@pytest.mark.parametrize("text", SENT.values(), ids=SENT)
def test_the_dataset_is_sent_as_written(visitor: Desk, shared_plato: LocalPlato, text: str) -> None:
    write_config(visitor, text)
    started = visitor.good("start", "-c")
    assert "Warning" not in started.err
    written = dataset_of(text.removeprefix("\ufeff") if hasattr(text, "removeprefix") else text)
    expected = {**written, "compute": written.get("compute") or {}, "metadata": written.get("metadata") or {}}
    for name, kind in (("services", "docker-compose"), ("listeners", "db")):
        for part in (expected.get(name) or {}).values():
            part.setdefault("type", kind)
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/setup-sandbox")
    assert (setup["service"], setup["dataset"]) == ("myapp", "base")
    assert setup["plato_dataset_config"] == json.loads(json.dumps(expected))
    make = sent(shared_plato, "/sessions/make")[-1]
    sizes = {name: value for name, value in expected["compute"].items() if name != "accelerators"}
    assert make["envs"][0]["sim_config"] == sizes
    visitor.good("stop")


def test_the_example_is_sent_as_written(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", "-c", "-d", "empty")
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/setup-sandbox")
    document = yaml.safe_load((SIMULATOR / "plato-config.yml").read_text())
    assert setup["plato_dataset_config"] == document["datasets"]["empty"]
    visitor.good("stop")


def test_numbers_written_as_texts_are_numbers(visitor: Desk, shared_plato: LocalPlato) -> None:
    write_config(visitor, f"{HEAD}    compute: {{cpus: '3', memory: 2048.0}}\n")
    visitor.good("start", "-c")
    make = sent(shared_plato, "/sessions/make")[-1]
    assert make["envs"][0]["sim_config"] == {"cpus": 3, "memory": 2048}
    assert (visitor.state["cpus"], visitor.state["memory"]) == (3, 2048)
    visitor.good("stop")


def test_misspelt_fields_are_warned_about_and_sent(visitor: Desk, shared_plato: LocalPlato) -> None:
    text, places = unmarked(
        f"""\
service: myapp
{MARK}servise: other
datasets:
  base:
    {MARK}metdata: {{name: A}}
    compute: {{cpus: 2, {MARK}memroy: 2048, colour: red}}
    services: {{main: {{{MARK}required_healthy_container: [a]}}}}
    listeners:
      db: {{db_type: sqlite, db_database: d, {MARK}audit_ignore_table: [a]}}
    unrelated: 1
"""
    )
    write_config(visitor, text)
    started = visitor.good("start", "-c", "--json")
    warnings = [line for line in started.err.splitlines() if line.startswith("Warning: ")]
    assert [line.split("plato-config.yml:")[1].split(": ")[0] for line in sorted(warnings)] == sorted(places)
    for meant in ("service", "metadata", "memory", "required_healthy_containers", "audit_ignore_tables"):
        assert f"`{meant}`" in started.err
    for harmless in ("colour", "unrelated"):
        assert harmless not in started.err
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/setup-sandbox")
    assert setup["plato_dataset_config"]["metdata"] == {"name": "A"}
    visitor.good("stop")


def test_a_config_is_found_through_the_working_directory_option(visitor: Desk) -> None:
    elsewhere = visitor.place / "a simulator"
    elsewhere.mkdir()
    shutil.move(str(visitor.work / "plato-config.yml"), elsewhere)
    visitor.good("start", "-c", "-w", "../a simulator")
    state = yaml.safe_load((elsewhere / ".sandbox.yaml").read_text())
    assert state["plato_config_path"] == str(elsewhere / "plato-config.yml")
    visitor.good("stop", "-w", "../a simulator")
