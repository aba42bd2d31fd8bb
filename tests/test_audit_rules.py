"""Ignore rules: what they hide, how they change, how they get into a plato-config.yml; nothing runs here."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plato_sandbox import (
    Changes,
    ConfigError,
    ConflictError,
    Mutation,
    SandboxError,
    change_text,
    difference,
    difference_of,
    edit_rules,
    entries_with,
    listener_node,
    new_mutations,
    read_config,
    replace_text,
    rules_text,
    ticks_of,
    yaml_load,
)

if TYPE_CHECKING:
    from pathlib import Path

KEY = "audit_ignore_tables"
EXAMPLE = (SIMULATOR / "plato-config.yml").read_text()


def update(table: str, before: dict[str, Any], after: dict[str, Any], **more: Any) -> Mutation:
    return Mutation({"table_name": table, "action": "UPDATE", "before": before, "after": after, **more})


def insert(table: str, row: dict[str, Any]) -> Mutation:
    return Mutation({"table_name": table, "action": "INSERT", "before": None, "after": row})


def delete(table: str, row: dict[str, Any]) -> Mutation:
    return Mutation({"table_name": table, "action": "DELETE", "before": row, "after": None})


LOGIN = update("users", {"id": 1, "seen": 1, "count": 1}, {"id": 1, "seen": 2, "count": 2})
RENAMED = update("users", {"id": 1, "name": "a", "seen": 1}, {"id": 1, "name": "b", "seen": 2})
ADDED = insert("users", {"id": 2, "seen": 1})
SESSION = insert("sessions", {"token": "x"})


# What rules hide


def ticks(rules: list[Any]) -> set[tuple[str, str]]:
    """The rules as pairs of table and column, in a listener of the schema `public`."""
    return {tick for rule in rules for tick in ticks_of(rule, "public")}


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ([], [LOGIN, RENAMED, ADDED, SESSION]),
        (["sessions"], [LOGIN, RENAMED, ADDED]),
        (["users"], [SESSION]),
        (["public.users"], [SESSION]),
        ([{"table": "users", "columns": ["seen", "count"]}], [RENAMED, ADDED, SESSION]),
        ([{"table": "users", "columns": ["seen"]}], [LOGIN, RENAMED, ADDED, SESSION]),
        ([{"table": "users", "columns": ["seen", "count", "name"]}], [ADDED, SESSION]),
        ([{"table": "users", "columns": []}], [LOGIN, RENAMED, ADDED, SESSION]),
        ([{"table": "users"}], [SESSION]),
        (["Users", "session", 7, None, {"columns": ["seen"]}, ["users"]], [LOGIN, RENAMED, ADDED, SESSION]),
    ],
)
def test_what_remains_under_rules(rules: list[Any], left: list[Mutation]) -> None:
    changes = Changes([LOGIN, RENAMED, ADDED, SESSION], "public")
    assert changes.remaining(ticks(rules)) == Changes(left, "public").kinds
    assert changes.remaining(ticks(rules) | changes.noise(ticks(rules))) == {}


def test_tables_of_other_schemas_are_others() -> None:
    told = [update("users", {"a": 1}, {"a": 2}, schema=name) for name in ("public", "crm")]
    changes = Changes([*told, LOGIN], "public")
    assert len(changes.of["users", ""]) == 2
    assert len(changes.of["crm.users", "a"]) == 1
    assert {table for table, _, _ in changes.remaining(ticks(["users"]))} == {"crm.users"}
    assert {table for table, _, _ in changes.remaining(ticks(["crm.users"]))} == {"users"}


def test_an_update_that_does_not_say_what_it_changed_is_not_hidden_by_columns() -> None:
    changes = Changes([Mutation({"table_name": "users", "action": "UPDATE"})], "public")
    assert changes.remaining(ticks([{"table": "users", "columns": ["seen"]}])) == changes.kinds
    assert changes.noise(set()) == {("users", "")}


def test_what_happened_is_told_by_table_and_column() -> None:
    changes = Changes([SESSION, LOGIN, RENAMED, ADDED], "public")
    assert changes.of["users", ""] == [LOGIN, RENAMED, ADDED]
    assert changes.of["users", "seen"] == [LOGIN, RENAMED]
    assert change_text(LOGIN, "seen") == "1 -> 2"
    assert change_text(RENAMED, "name") == "a -> b"
    assert change_text(LOGIN, "") == "updated: id=1  seen: 1 -> 2, count: 1 -> 2"
    assert change_text(SESSION, "") == "inserted: token=x"
    columns = {("users", name) for name in ("seen", "count", "name")}
    assert changes.noise(set()) == {("users", ""), ("sessions", ""), *columns}
    assert Changes([LOGIN], "public").noise(set()) == {("users", "seen"), ("users", "count")}


def test_long_values_are_shown_where_they_differ() -> None:
    text = "Lorem ipsum " * 30
    assert difference("a", "b") == "a -> b"
    assert difference(text + "old", text + "new") == "...um Lorem ipsum old -> ...um Lorem ipsum new"
    assert difference(text, text + "more").endswith("-> ...um Lorem ipsum more")
    assert len(difference("x" * 5000, "y" * 5000)) < 150
    assert difference("a\x1b[2J", "b") == "a\\x1b[2J -> b"


# How rules change


@pytest.mark.parametrize(
    ("before", "chosen", "after"),
    [
        (["a"], {("a", ""), ("b", "y"), ("b", "x")}, ["a", {"table": "b", "columns": ["x", "y"]}]),
        (
            ["a", {"table": "b", "columns": ["y"]}],
            {("b", "x"), ("b", "y")},
            [{"table": "b", "columns": ["x", "y"]}],
        ),
        ([{"table": "b", "columns": ["y"]}, "c"], {("b", ""), ("b", "y"), ("c", "")}, ["b", "c"]),
        (["b"], {("b", "x")}, [{"table": "b", "columns": ["x"]}]),
        ([{"table": "b", "columns": ["x"], "why": "w"}], {("b", "")}, [{"table": "b", "why": "w"}]),
        (
            [{"why": "w", "table": "b", "columns": ["x", "y"]}],
            {("b", "y"), ("b", "z")},
            [{"why": "w", "table": "b", "columns": ["y", "z"]}],
        ),
        (["public.a"], {("a", "")}, ["public.a"]),
        (["public.a"], {("a", "x")}, [{"table": "public.a", "columns": ["x"]}]),
        ([{"table": "a"}, 7, {"odd": 1}], {("a", "")}, [{"table": "a"}, 7, {"odd": 1}]),
        (["a", {"table": "a", "columns": ["x"]}], {("a", "x")}, [{"table": "a", "columns": ["x"]}]),
        ([7, "a"], set(), [7]),
    ],
)
def test_rules_for_what_is_ticked(before: list[Any], chosen: set[tuple[str, str]], after: list[Any]) -> None:
    """Those of other tables stay as they are, and so do fields that nobody here knows."""
    assert entries_with(before, chosen, "public") == after
    assert entries_with(before, ticks(before), "public") == before


# What happened between two looks


def test_only_what_came_since_is_recorded() -> None:
    assert new_mutations([LOGIN], [LOGIN, SESSION]) == [SESSION]
    assert new_mutations([], [LOGIN]) == [LOGIN]
    assert new_mutations([LOGIN, SESSION], [SESSION, LOGIN]) == []
    assert new_mutations([LOGIN], [LOGIN, LOGIN]) == [LOGIN]
    assert new_mutations([LOGIN], []) == []


def test_a_row_that_changed_before_is_told_as_the_worker_tells_it_now() -> None:
    later = update("users", {"id": 1, "seen": 1, "count": 1}, {"id": 1, "seen": 3, "count": 2})
    assert new_mutations([LOGIN], [later]) == [later]


# The edit of a config


def edited(text: str, rules: list[Any], listener: str = "db", dataset: str = "base") -> str:
    """The text after the edit; it is checked that another reader of YAML sees the rules and nothing else."""
    new, shared = edit_rules(text, "plato-config.yml", dataset, listener, rules)
    before, after = yaml.safe_load(text), yaml.safe_load(new)
    assert after["datasets"][dataset]["listeners"][listener].get(KEY) in (rules, rules or None)
    for place in (f"{dataset}/{listener}", *shared):
        name, part = place.split("/")
        for config in (before, after):
            config["datasets"][name]["listeners"][part] = {
                **config["datasets"][name]["listeners"][part],
                KEY: None,
            }
    assert before == after
    assert yaml_load(new) == yaml.safe_load(new)
    return new


def config(listener: str) -> str:
    """A config whose listener has these lines."""
    body = "".join(f"        {line}\n" if line else "\n" for line in listener.splitlines())
    return f"service: s\ndatasets:\n  base:\n    listeners:\n      db:\n{body}    services: {{}}  # the end\n"


LISTENERS = {
    "no key": (
        "type: db\nport: 1",
        "type: db\nport: 1\naudit_ignore_tables:\n  - a\n  - table: b\n    columns: [c]",
    ),
    "no key, block text last": (
        "sql: |\n  x\n  y",
        "sql: |\n  x\n  y\naudit_ignore_tables:\n  - a\n  - table: b\n    columns: [c]",
    ),
    "empty value": (
        "audit_ignore_tables:  # none\nport: 1",
        "audit_ignore_tables:  # none\n  - a\n  - table: b\n    columns: [c]\nport: 1",
    ),
    "null": (
        "audit_ignore_tables: ~  # none\nport: 1",
        "audit_ignore_tables:  # none\n  - a\n  - table: b\n    columns: [c]\nport: 1",
    ),
    "empty list": (
        "audit_ignore_tables: []  # none\nport: 1",
        "audit_ignore_tables:  # none\n  - a\n  - table: b\n    columns: [c]\nport: 1",
    ),
    "lists are not indented here": (
        "seed:\n- x\naudit_ignore_tables: []",
        "seed:\n- x\naudit_ignore_tables:\n  - a\n  - table: b\n    columns: [c]",
    ),
    "empty list of two lines": (
        "audit_ignore_tables: [  # none\n  ]",
        "audit_ignore_tables:\n  - a\n  - table: b\n    columns: [c]",
    ),
    "one line": (
        "audit_ignore_tables: [ x, a ]  # why",
        "audit_ignore_tables:  # why\n  - a\n  - table: b\n    columns: [c]",
    ),
    "several lines": (
        "audit_ignore_tables: [\n  x,  # old\n  a,  # keep\n]",
        "audit_ignore_tables:\n  - a\n  - table: b\n    columns: [c]",
    ),
    "block": (
        "audit_ignore_tables:\n    # first\n    - x  # old\n    # second\n    - a  # keep\n"
        "    # - comment\nport: 1",
        "audit_ignore_tables:\n    # first\n    # second\n    - a  # keep\n"
        "    - table: b\n      columns: [c]\n"
        "    # - comment\nport: 1",
    ),
    "a column more": (
        "audit_ignore_tables:\n  - a  # keep\n  - {columns: [x], table: b}",
        "audit_ignore_tables:\n  - a  # keep\n  - table: b\n    columns: [c]",
    ),
    "quoted key": (
        "\"audit_ignore_tables\":\n  - 'a'",
        "\"audit_ignore_tables\":\n  - 'a'\n  - table: b\n    columns: [c]",
    ),
}


@pytest.mark.parametrize(("before", "after"), LISTENERS.values(), ids=LISTENERS)
def test_the_edit_is_small(before: str, after: str) -> None:
    assert edited(config(before), ["a", {"table": "b", "columns": ["c"]}]) == config(after)


def test_all_rules_can_be_taken_out() -> None:
    text = config(f"{KEY}:  # noise\n  # why\n  - a\n  - b\n# the port\nport: 1")
    assert edited(text, []) == config(f"{KEY}: []\n# the port\nport: 1")
    assert edited(config(f"{KEY}: [a, b]  # why"), []) == config(f"{KEY}: []  # why")


def test_line_ends_and_a_missing_last_one_stay() -> None:
    text = config(f"{KEY}:\n  - a\nport: 1").replace("\n", "\r\n")
    assert edited(text, ["a", "b"]) == text.replace("- a\r\n", "- a\r\n          - b\r\n")
    last = "datasets:\n  base:\n    listeners:\n      db:\n        audit_ignore_tables:\n          - a"
    assert edited(last, ["a", "b"]) == last + "\n          - b"
    assert edited(last[: last.index("audit")] + "port: 1", ["b"]).endswith(
        "port: 1\n        audit_ignore_tables:\n          - b"
    )
    assert edited("\ufeff" + last, ["a", "b"]) == "\ufeff" + last + "\n          - b"


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name",
    ["user's", 'say "hi"', "tab\u20acle \U0001f600", "back\\slash", "a, b", "[x]", "yes", "12", "2024-01-01",
     "a: b",
     "# no", "", " ", "crm.users", "- x", "x\ny", "~", "é", "\u2028", "a\tb", "%s {}"],
)  # fmt: skip
def test_names_of_every_kind_come_back_the_same(name: str) -> None:
    for body in ("port: 1", f"{KEY}: [a]", f"{KEY}:\n  - a"):
        edited(config(body), ["a", name, {"table": name, "columns": [name, "x"]}])


def test_readable_names_stay_readable() -> None:
    assert '- "Größe 😀"\n' in edited(config(f"{KEY}:\n  - a"), ["a", "Größe 😀"])


def test_the_example_simulator() -> None:
    """Its listener is an anchor that another dataset merges: they change together, and the edit says so."""
    rules = ["sessions", {"table": "users", "columns": ["login_count", "last_login_at"]}, "activity"]
    text = edited(EXAMPLE, rules)
    added = (
        "          - table: users\n            columns: [login_count, last_login_at]\n          - activity\n"
    )
    assert text == EXAMPLE.replace("          - sessions\n", "          - sessions\n" + added)
    assert edit_rules(EXAMPLE, "c", "base", "db", rules)[1] == ["empty/db"]


def test_a_listener_that_merges_another_gets_a_list_of_its_own() -> None:
    assert edit_rules(EXAMPLE, "c", "empty", "db", ["sessions", "activity"])[1] == []
    assert edited(EXAMPLE, ["sessions", "activity"], dataset="empty").startswith(EXAMPLE.rstrip("\n"))
    only = "x: &x {type: db}\ndatasets:\n  base:\n    listeners:\n      db:\n        <<: *x\n"
    assert edited(only, ["a"]) == only + "        audit_ignore_tables:\n          - a\n"


def test_an_alias_is_followed_to_where_the_list_stands() -> None:
    text = (
        "datasets:\n  base:\n    listeners:\n      db: &db\n        port: 1\n"
        "        audit_ignore_tables: &rules\n          - a\n"
        "      other:\n        audit_ignore_tables: *rules\n"
        "  more:\n    listeners:\n      db: *db\n"
    )
    new, shared = edit_rules(text, "c", "base", "other", ["a", "b"])
    assert new == text.replace("          - a\n", "          - a\n          - b\n")
    assert sorted(shared) == ["base/db", "more/db"]
    assert edit_rules(text, "c", "more", "db", ["b"])[1] == ["base/db", "base/other"]


@pytest.mark.parametrize(
    "text",
    [
        config(f"{KEY}: [&one a, b]\nother: *one"),
        "datasets: {base: {listeners: {db: {type: db}}}}\n",
        f"x: &r [a]\ndatasets:\n  base:\n    listeners:\n      db: {{{KEY}: *r}}\n",
        f"x: &r\n  - a\ndatasets:\n  base:\n    listeners:\n      db:\n        {KEY}: *r\n        y: *r\n",
        "datasets: {base: {listeners: {other: {}}}}",
        "datasets: {base: {listeners: {db: }}}",
        "datasets: [1]",
        "",
    ],
)
def test_what_cannot_be_edited_is_refused(text: str) -> None:
    with pytest.raises(SandboxError):
        edit_rules(text, "plato-config.yml", "base", "db", ["b"])


# Documents of every style, edited in every way

NAMES = st.sampled_from(["a", "b", "users", "Ünïcode", "with space", "x,y", "yes", "'", "t-1"])
COLUMNS = st.lists(NAMES, min_size=1, max_size=3, unique=True)
CHOICES = st.lists(st.tuples(NAMES, st.one_of(st.just(""), NAMES)), max_size=5).map(set)


def quoted(name: str, draw: Any) -> str:
    styles = ['"' + name + '"', "'" + name.replace("'", "''") + "'"]
    if name not in ("yes", "x,y", "'"):
        styles.append(name)
    return str(draw(st.sampled_from(styles)))


@st.composite
def documents(draw: Any) -> str:
    """A config with a listener whose rules are written in some style, among comments and other listeners."""
    comment = st.sampled_from(["", "  # noise", " #"])
    line_comment = st.sampled_from(["", "# why\n", "\n", "  # - x\n"])
    rules = []
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        columns = draw(st.one_of(st.none(), COLUMNS))
        rules.append((name, columns))
    offset = " " * draw(st.sampled_from([0, 2, 4]))
    style = draw(st.sampled_from(["absent", "null", "block", "flow", "lines"]))
    margin = " " * 8
    out = ""
    if style == "null":
        out = f"{margin}{KEY}:{draw(st.sampled_from(['', ' null', ' ~', ' []', ' [ ]']))}{draw(comment)}\n"
    elif style in ("flow", "lines"):
        items = [
            quoted(name, draw)
            if columns is None
            else f"{{table: {quoted(name, draw)}, columns: [{', '.join(quoted(c, draw) for c in columns)}]}}"
            for name, columns in rules
        ]
        if style == "flow":
            out = f"{margin}{KEY}: [{', '.join(items)}]{draw(comment)}\n"
        else:
            body = "".join(f"{margin}  {item},{draw(comment)}\n" for item in items)
            out = f"{margin}{KEY}: [{draw(comment)}\n{body}{margin}  ]\n"
    elif style == "block" and rules:
        out = f"{margin}{KEY}:{draw(st.sampled_from(['', ' &rules']))}{draw(comment)}\n"
        for name, columns in rules:
            out += draw(line_comment)
            dash = f"{margin}{offset}- "
            if columns is None:
                out += f"{dash}{quoted(name, draw)}{draw(comment)}\n"
                continue
            out += f"{dash}table: {quoted(name, draw)}{draw(comment)}\n"
            listed = [quoted(column, draw) for column in columns]
            if draw(st.booleans()):
                out += f"{margin}{offset}  columns: [{', '.join(listed)}]{draw(comment)}\n"
            else:
                inner = "".join(f"{margin}{offset}    - {column}{draw(comment)}\n" for column in listed)
                out += f"{margin}{offset}  columns:\n{inner}"
        out += draw(line_comment)
    before = f"{margin}type: db\n{margin}port: 1{draw(comment)}\n" if draw(st.booleans()) or not out else ""
    after = f"{margin}seed:\n{margin}{offset}- x\n" if draw(st.booleans()) else ""
    anchor = draw(st.sampled_from(["", " &db"]))
    more = "  empty:\n    listeners:\n      db:\n        <<: *db\n        port: 2\n" if anchor else ""
    head = f"# head\nservice: s\ndatasets:\n  base:\n    listeners:\n      db:{anchor}\n"
    text = f"{head}{before}{out}{after}{more}"
    if draw(st.booleans()):
        text = text.rstrip("\n")
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(documents(), CHOICES, st.booleans())
def test_any_edit_of_any_document(text: str, chosen: set[tuple[str, str]], more: bool) -> None:
    listener = yaml.safe_load(text)["datasets"]["base"]["listeners"]["db"]
    old = listener.get(KEY) or []
    rules = entries_with(old, chosen | ticks(old) if more else chosen, "public")
    assume(rules != old)
    result = edited(text, rules)
    assert result.startswith(text[: text.index("\n", text.index("db:")) + 1])
    assert (result.count("\r\n") == result.count("\n")) is ("\r\n" in text)
    for mark in ("seed:", "  empty:"):
        if KEY in text and mark in text:
            assert result.endswith(text[text.index(mark) :])
    if all(rule in rules for rule in old):
        kept = {line.strip() for line in text.splitlines() if line.strip().startswith("#")}
        assert kept <= {line.strip() for line in result.splitlines()}


# The file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config_path = tmp_path / "plato-config.yml"
    config_path.write_text(EXAMPLE)
    config_path.chmod(0o640)
    return config_path


def test_saving_keeps_mode_and_symbolic_link(path: Path) -> None:
    link = path.with_name("link.yml")
    link.symlink_to(path.name)
    replace_text(str(link), EXAMPLE, EXAMPLE + "# more\r\n")
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == (EXAMPLE + "# more\r\n").encode()
    assert list(path.parent.glob("*.tmp")) == []


def test_a_file_that_changed_meanwhile_is_not_overwritten(path: Path) -> None:
    path.write_text(EXAMPLE + "# mine\n")
    with pytest.raises(ConflictError, match="was changed"):
        replace_text(str(path), EXAMPLE, "new")
    assert path.read_text() == EXAMPLE + "# mine\n"


def test_a_file_that_may_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0o444)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written"):
        replace_text(str(path), EXAMPLE, "new")
    assert path.read_text() == EXAMPLE


def test_files_that_cannot_be_read(path: Path) -> None:
    for data in (b"\xff", b"a: [", b"datasets: {}"):
        path.write_bytes(data)
        with pytest.raises(SandboxError):
            listener_node(read_config(str(path)), "plato-config.yml", "base", "db")
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(str(path))


def test_what_is_shown_of_an_edit_holds_no_password() -> None:
    text = EXAMPLE.replace("        truncate_tables: true\n", "        db_password: hunter2\n")
    text = text.replace("        db_password: taskboard\n", "")
    diff = difference_of(text, edit_rules(text, "c", "base", "db", ["activity"])[0])
    assert "-          - sessions\n+          - activity" in diff
    assert "hunter2" not in diff


def test_the_block_to_copy_is_what_the_file_would_hold() -> None:
    rules = ["sessions", {"table": "users", "columns": ["a", "b c"]}, "x, y"]
    assert yaml.safe_load(rules_text(rules)) == {KEY: rules}
    assert yaml.safe_load(rules_text([])) == {KEY: []}
