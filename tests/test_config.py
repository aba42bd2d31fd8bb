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


# Each: a config whose marks stand where the problems are, and what the message of each must name, in order.
WRONG: dict[str, tuple[str, str]] = {
    "empty": (MARK, "map"),
    "comments only": (f"{MARK}# nothing yet\n", "map"),
    "a list": (f"{MARK}- service: myapp\n", "map"),
    "a text": (f"{MARK}just words\n", "map"),
    "unclosed bracket": (f"{HEAD}    compute: {MARK}{{cpus: 2\n", "closed"),
    "tab": (f"service: myapp\n{MARK}\tdatasets: 1\n", "tab"),
    "duplicate key": (f"service: myapp\n{MARK}service: other\n", "service"),
    "two documents": (f"service: myapp\n{MARK}---\nservice: other\n", "document"),
    "no service": (f"{MARK}datasets:\n  base: {{}}\n", "`service`"),
    "service is a number": (f"service: {MARK}12\ndatasets:\n  base: {{}}\n", "`service`"),
    "service is a path": (f"service: {MARK}../x\ndatasets:\n  base: {{}}\n", "`service`"),
    "service is empty text": (f"service: {MARK}''\ndatasets:\n  base: {{}}\n", "`service`"),
    "datasets is empty": (f"service: myapp\ndatasets: {MARK}{{}}\n", "there are: none"),
    "dataset is a list": (f"service: myapp\ndatasets:\n  base: {MARK}[]\n", "base`"),
    "service and datasets are lists": (
        f"service: {MARK}[a]\ndatasets:\n  {MARK}- base\n",
        "`service` `datasets`",
    ),
    "nothing but an unknown key": (f"{MARK}{MARK}{MARK}datset: {{}}\n", "`service` `datasets` `datset`"),
    "sections of other kinds": (
        f"{HEAD}    compute: {MARK}big\n    metadata: {MARK}[]\n"
        f"    services: {MARK}[main]\n    listeners: {MARK}1\n",
        "compute` metadata` services` listeners`",
    ),
    "too low": (
        f"{HEAD}    compute: {{cpus: {MARK}0, memory: {MARK}511, disk: {MARK}1023, app_port: {MARK}-1}}\n",
        "compute.cpus` compute.memory` compute.disk` compute.app_port`",
    ),
    "too high": (
        f"{HEAD}    compute: {{cpus: {MARK}9, memory: {MARK}16385, disk: {MARK}204801,"
        f" app_port: {MARK}65536}}\n",
        "compute.cpus` compute.memory` compute.disk` compute.app_port`",
    ),
    "what Plato cannot be sent": (f"{HEAD}    metadata: {{variables: [{{a: {MARK}.nan}}]}}\n", "quotes"),
    "no numbers": (
        f"""\
{HEAD}    compute: {{cpus: {MARK}1.5, memory: {MARK}two, disk: {MARK}yes, app_port: {MARK}[2]}}
    metadata: {{name: {MARK}1.0}}
""",
        "cpus` memory` disk` app_port` metadata.name`",
    ),
    "services": (
        f"""\
{HEAD}    services:
      a: {MARK}compose
      b: {{type: {MARK}podman}}
      c: {{healthy_wait_timeout: {MARK}29}}
      d: {{required_healthy_containers: {MARK}all}}
      e: {{required_healthy_containers: [app, {MARK}7]}}
""",
        "services.a` b.type` c.healthy_wait_timeout` d.required_healthy_containers` containers.2`",
    ),
    "listeners": (
        f"""\
{HEAD}    listeners:
      a: {MARK}~
      b: {{type: {MARK}kafka}}
      c: {{type: {MARK}[db]}}
      d: {MARK}{{db_database: d}}
      e: {{db_type: {MARK}oracle, db_database: d}}
      f: {MARK}{{db_type: mysql}}
      g: {{{MYSQL}, db_port: {MARK}70000}}
      h: {{{MYSQL}, audit_ignore_tables: {MARK}sessions}}
      i: {{{MYSQL}, audit_ignore_tables: [a, {MARK}7, {{table: b, columns: [c]}}]}}
      j: {MARK}{{type: file}}
      k: {{type: proxy, proxy_port: {MARK}80}}
      l: {MARK}{MARK}{{type: db}}
""",
        "a` b.type` c.type` d.db_type` e.db_type` f.db_database` g.db_port` h.audit_ignore_tables` "
        "i.audit_ignore_tables.2` j.target_dir` k.proxy_port` l.db_type` l.db_database`",
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("marked", "named"), WRONG.values(), ids=WRONG)
def test_every_problem_is_told_with_its_place(
    visitor: Desk, shared_plato: LocalPlato, marked: str, named: str
) -> None:
    text, places = unmarked(marked)
    write_config(visitor, text)
    before = len(shared_plato.requests())
    result = visitor.run("start", "-c", "--json")
    assert result.code == 8
    names = named.split() if len(places) > 1 else [named]
    for told in (result.error["message"], result.err):
        lines = [
            line.split("plato-config.yml:")[1] for line in told.splitlines() if "plato-config.yml:" in line
        ]
        for place, name in zip(places, names):
            assert any(line.startswith(f"{place}: ") and name in line for line in lines), (place, name, lines)
        assert len(lines) == len(places) == len(names)
    doubts = result.err.count("(a warning)")
    assert f"{len(places) - doubts} problem" in result.err
    assert visitor.leftovers() == []
    assert len(shared_plato.requests()) == before


def test_a_password_that_is_no_text_is_not_shown(visitor: Desk) -> None:
    write_config(visitor, f"{HEAD}    listeners: {{db: {{{MYSQL}, db_password: 12345678}}}}\n")
    result = visitor.run("start", "-c")
    assert result.code == 8
    assert "listeners.db.db_password` is wrong; it must be a text" in result.err
    assert "12345678" not in result.err


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
    assert (result.code, result.error["code"]) == (2, "usage")
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


@pytest.mark.sampled
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


@pytest.mark.sampled
@pytest.mark.parametrize("text", SENT.values(), ids=SENT)
def test_the_dataset_is_sent_as_written(visitor: Desk, shared_plato: LocalPlato, text: str) -> None:
    write_config(visitor, text)
    write_config(visitor, "", "compose.yml")
    started = visitor.good("start", "-c")
    assert "plato-config.yml" not in started.err
    written = dataset_of(text.removeprefix("\ufeff") if hasattr(text, "removeprefix") else text)
    expected = {**written, "compute": written.get("compute") or {}, "metadata": written.get("metadata") or {}}
    for name, kind in (("services", "docker-compose"), ("listeners", "db")):
        for part in (expected.get(name) or {}).values():
            part.setdefault("type", kind)
    visitor.good("start-worker")
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/start-worker")
    assert (setup["service"], setup["dataset"]) == ("myapp", "base")
    assert setup["plato_dataset_config"] == json.loads(json.dumps(expected))
    make = sent(shared_plato, "/sessions/make")[-1]
    sizes = {name: value for name, value in expected["compute"].items() if name != "accelerators"}
    assert make["envs"][0]["sim_config"] == sizes
    visitor.good("stop")


@pytest.mark.long
def test_the_example_is_sent_as_written(visitor: Desk, shared_plato: LocalPlato) -> None:
    visitor.good("start", "-c", "-d", "empty")
    visitor.good("start-worker")
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/start-worker")
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
    compute: {{cpus: 2, {MARK}memroy: 2048, colour: red, native_worker: {MARK}true}}
    services: {{main: {{{MARK}required_healthy_container: [a]}}}}
    listeners:
      db: {{db_type: sqlite, db_database: d, {MARK}audit_ignore_table: [a]}}
    unrelated: 1
"""
    )
    write_config(visitor, text)
    started = visitor.good("start", "-c", "--json")
    warnings = [line for line in started.err.splitlines() if line.startswith("Warning: ") and ".yml:" in line]
    assert [line.split("plato-config.yml:")[1].split(": ")[0] for line in sorted(warnings)] == sorted(places)
    for meant in ("service", "metadata", "memory", "required_healthy_containers", "audit_ignore_tables"):
        assert f"`{meant}`" in started.err
    assert "`compute.native_worker` is ignored by Plato" in started.err
    for harmless in ("colour", "unrelated"):
        assert harmless not in started.err
    visitor.good("start-worker")
    (setup,) = sent(shared_plato, f"{visitor.state['job_id']}/start-worker")
    assert setup["plato_dataset_config"]["metdata"] == {"name": "A"}
    visitor.good("stop")


def test_a_config_is_found_through_the_working_directory_option(visitor: Desk) -> None:
    elsewhere = visitor.place / "a simulator"
    shutil.move(str(visitor.work), elsewhere)
    visitor.work.mkdir()
    visitor.good("start", "-c", "-w", "../a simulator")
    state = yaml.safe_load((elsewhere / ".sandbox.yaml").read_text())
    assert state["plato_config_path"] == str(elsewhere / "plato-config.yml")
    visitor.good("stop", "-w", "../a simulator")


def test_files_that_are_not_there_are_told_before_a_vm_is_made(
    visitor: Desk, shared_plato: LocalPlato
) -> None:
    parts = """\
    metadata: {flows_path: flow.yml}
    services:
      main: {file: compose.yml, required_healthy_containers: [fronted, db, myapp-frontend-1, one-off]}
      other: {file: other.yml}
    listeners:
      db: {db_type: mysql, db_database: d, seed_data_paths: [seed.sql]}
"""
    write_config(visitor, HEAD + parts)
    services = "services: {frontend: {image: a}, db: {image: b}, job: {image: c, container_name: one-off}}\n"
    write_config(visitor, services, "compose.yml")
    made = len(sent(shared_plato, "/sessions/make"))
    result = visitor.run("start", "-c", "--json")
    assert (result.code, result.error["code"]) == (8, "config_invalid")
    message = result.error["message"]
    assert "4 problems" in message
    assert "compose.yml defines no container 'fronted'; did you mean `frontend`?" in message
    for missing in ("'other.yml'", "'flow.yml'", "'seed.sql'"):
        assert missing in message
    assert len(sent(shared_plato, "/sessions/make")) == made
    for name in ("other.yml", "flow.yml", "seed.sql"):
        write_config(visitor, "", name)
    write_config(visitor, services.replace("frontend:", "fronted:"), "compose.yml")
    assert visitor.run("start", "-c").code == 8  # myapp-frontend-1 is no container now
    write_config(
        visitor, services.replace("{frontend: {", "{fronted: {image: a}, frontend: {"), "compose.yml"
    )
    visitor.good("start", "-c")
    visitor.good("stop")


def test_a_dataset_that_is_not_there(visitor: Desk) -> None:
    visitor.good("start", "-c")
    result = visitor.run("start-services", "-d", "empyt", "--json")
    assert (result.code, result.error["code"]) == (2, "usage")
    assert "no dataset 'empyt'; did you mean `empty`?" in result.error["message"]
    visitor.good("stop")
