"""audit-ui's page, run by Streamlit's own AppTest: what each click does to the rules and to the file."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR, eventually, missing

import plato_sandbox
from plato_sandbox import (
    AuditPage,
    AuditPlan,
    AuditTable,
    Database,
    DatabaseError,
    Early,
    Mutation,
    Table,
    TimedOutError,
    WorkerNotUpError,
    changes_by_table,
    changes_picture,
    changes_table,
    rule_trouble,
    rule_words,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KEY = "audit_ignore_tables"
SCRIPT = "<script>alert(1)</script> *bold* 'x' \"y\" 😀"


@pytest.fixture(autouse=True)
def streamlit() -> Any:
    try:
        import streamlit
    except ImportError:
        missing("streamlit is not installed; it is in the test group of pyproject.toml")
    return streamlit


def update(table: str, before: dict[str, Any], after: dict[str, Any]) -> Mutation:
    return Mutation({"table_name": table, "action": "UPDATE", "before": before, "after": after})


def insert(table: str, row: dict[str, Any]) -> Mutation:
    return Mutation({"table_name": table, "action": "INSERT", "before": None, "after": row})


LOGIN = [
    update("users", {"id": 1, "login_count": 0, "last": None}, {"id": 1, "login_count": 1, "last": "now"}),
    insert("activity", {"id": 1, "action": "login"}),
]


class Shelf(Database):
    """A database of tables that a test lays out; every look at it is counted."""

    words = "PostgreSQL"

    def __init__(self, **tables: list[str]) -> None:
        super().__init__(AuditTable("db", {"db_type": "postgresql", "db_database": "taskboard"}))
        self.found = [self.table(name, columns) for name, columns in tables.items()]
        self.looks: list[str] = []
        self.trouble: Exception | None = None

    @staticmethod
    def table(name: str, columns: list[str], schema: str = "public", rows: int | None = 1000) -> Table:
        table = Table(schema, name, "table", rows)
        table.columns = [(column, "text", column == "id") for column in columns]
        return table

    def look(self, what: str) -> None:
        self.looks.append(what)
        if self.trouble is not None:
            raise self.trouble

    def tables(self) -> list[Table]:
        self.look("tables")
        return self.found

    def count(self, table: Table) -> int:
        self.look(f"count {table.name}")
        return 1234567

    def examples(self, table: Table) -> list[Sequence[str | None]]:
        self.look(f"examples {table.name}")
        return [["1", "a\x1b[2J"], ["2", None]]


class Stage:
    """A page with a config, a database and changes of the test's choice, and what it shows."""

    shown: Stage

    def __init__(self, place: Path) -> None:
        self.config = place / "plato-config.yml"
        shutil.copy(SIMULATOR / "plato-config.yml", self.config)
        self.database = Shelf(
            users=["id", "login_count", "last"], activity=["id", "action"], sessions=["id", "last"]
        )
        self.changes: list[Mutation] | Exception = LOGIN
        self.reads = 0
        self.has_sandbox = True
        self.path: str | None = str(self.config)
        self.others: dict[str, Shelf] = {}

    def read(self) -> dict[str, list[Mutation]]:
        self.reads += 1
        if isinstance(self.changes, Exception):
            raise self.changes
        return {"db": list(self.changes), **{name: [] for name in self.others}}

    def show(self) -> None:
        fields = {"db_type": "postgresql", "db_database": "taskboard"}
        plan = AuditPlan(
            [{"name": name, "fields": fields} for name in ("db", *self.others)],
            config=self.path,
            service="taskboard",
            dataset="base",
            directory=None,
            url="https://app.example/",
        )
        databases = [self.database, *self.others.values()]
        AuditPage(plan, databases, self.read if self.has_sandbox else None).show()

    def open(self) -> Any:
        """The page in a new browser, so to say."""
        from streamlit.testing.v1 import AppTest

        def script() -> None:
            import test_audit_page

            test_audit_page.Stage.shown.show()

        Stage.shown = self
        page = AppTest.from_function(script, default_timeout=30).run()
        assert not page.exception, page.exception
        return page

    @property
    def rules(self) -> Any:
        config = yaml.safe_load(self.config.read_text())
        return config["datasets"]["base"]["listeners"]["db"][KEY]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def click(page: Any, key: str) -> Any:
    page.button(key=key).click().run()
    assert not page.exception, page.exception
    return page


def keys(page: Any) -> set[str]:
    return {button.key for button in page.button}


def text(page: Any) -> str:
    """All that a person could read."""
    kinds = (
        "title",
        "subheader",
        "caption",
        "markdown",
        "info",
        "success",
        "warning",
        "error",
        "code",
        "html",
    )
    parts = [str(part.value) for kind in kinds for part in page.get(kind) if hasattr(part, "value")]
    parts += [str(part.proto.body) for part in page.get("html")]
    return "\n".join(parts)


def numbers(page: Any) -> list[str]:
    """Changes, hidden by the rules, remaining."""
    return [metric.value for metric in page.metric]


# Choosing


def test_what_changed_is_there_at_once_with_a_rule_for_each_table(stage: Stage) -> None:
    page = stage.open()
    assert numbers(page) == ["2", "0", "2"]
    assert {"columns users", "table users", "table activity"} <= keys(page)
    shown = text(page)
    assert "login_count" in shown
    assert "<del>0</del> → 1" in shown
    assert stage.database.looks == ["tables"]
    assert stage.reads == 1


def test_two_clicks_and_saving(stage: Stage) -> None:
    page = stage.open()
    click(page, "columns users")
    assert numbers(page) == ["2", "1", "1"]
    assert "columns users" not in keys(page)
    assert stage.rules == ["sessions"], "nothing is written before Save"
    click(page, "table activity")
    assert numbers(page) == ["2", "2", "0"]
    (diff,) = [code.value for code in page.code if code.value.startswith("---")]
    assert "+          - activity" in diff
    assert "empty/db" in text(page), "the listener that shares the list is named"
    click(page, "save")
    assert stage.rules == ["sessions", {"table": "users", "columns": ["login_count", "last"]}, "activity"]
    assert "Saved" in text(page)
    assert "start-worker" in text(page)
    assert "save" not in keys(page)
    assert stage.database.looks == ["tables"], "choosing asks no database again"
    assert stage.reads == 1


def test_rules_are_removed_and_choices_discarded(stage: Stage) -> None:
    page = stage.open()
    click(page, "remove 0")
    assert "No rules yet" in text(page)
    click(page, "discard")
    assert "save" not in keys(page)
    click(click(page, "remove 0"), "save")
    assert stage.rules == []


def test_a_file_that_changed_meanwhile_keeps_both(stage: Stage) -> None:
    page = click(stage.open(), "table activity")
    stage.config.write_text(stage.config.read_text().replace("- sessions", "- sessions\n          - mine"))
    click(page, "save")
    assert stage.rules == ["sessions", "mine"]
    assert "was changed" in text(page)
    click(click(page, "reload"), "save")
    assert stage.rules == ["sessions", "mine", "activity"]


def test_a_config_that_cannot_be_edited_leaves_the_block_to_copy(stage: Stage) -> None:
    broken = stage.config.read_text().replace("audit_ignore_tables:\n", "audit_ignore_tables: &a\n")
    stage.config.write_text(broken)
    page = click(stage.open(), "table activity")
    stage.config.write_text("nonsense: [")
    click(click(page, "save"), "reload")
    assert "cannot be used" in text(page)
    assert any("- activity" in code.value and code.value.startswith(KEY) for code in page.code)


def test_without_a_config_there_is_the_block_to_copy(stage: Stage) -> None:
    stage.path = None
    page = click(stage.open(), "columns users")
    assert "save" not in keys(page)
    (block,) = [code.value for code in page.code]
    assert yaml.safe_load(block) == {KEY: [{"table": "users", "columns": ["login_count", "last"]}]}


# Looking


def test_recording_shows_only_what_happened_meanwhile(stage: Stage) -> None:
    page = click(stage.open(), "record")
    assert "Recording" in text(page)
    assert "https://app.example/" in text(page)
    stage.changes = [*LOGIN, insert("tasks", {"id": 5, "title": "mine"})]
    click(page, "stop")
    assert numbers(page) == ["1", "0", "1"]
    assert {"table tasks"} <= keys(page)
    assert "table activity" not in keys(page)
    click(page, "all")
    assert numbers(page) == ["3", "0", "3"]


def test_a_recording_in_which_nothing_happened(stage: Stage) -> None:
    page = click(click(stage.open(), "record"), "stop")
    assert "Nothing changed meanwhile" in text(page)
    stage.changes = WorkerNotUpError("The worker went away.")
    page = click(page, "record")
    assert "worker went away" in text(page)


def test_looking_again(stage: Stage) -> None:
    stage.changes = []
    page = stage.open()
    assert "No changes since the last reset" in text(page)
    stage.changes = LOGIN
    assert numbers(click(page, "refresh")) == ["2", "0", "2"]


def test_a_worker_that_is_not_up_leaves_the_tables(stage: Stage) -> None:
    stage.changes = WorkerNotUpError("The worker is not up.", hint="Start it: plato-sandbox start-worker")
    page = stage.open()
    assert "not up" in text(page)
    assert "start\\-worker" in text(page)
    assert len(page.dataframe[0].value) == 3
    stage.changes = LOGIN
    assert numbers(click(page, "refresh")) == ["2", "0", "2"]


def test_a_database_that_is_away_leaves_the_changes(stage: Stage) -> None:
    stage.database.trouble = DatabaseError("It does not answer.", hint="Start it.")
    page = click(stage.open(), "table activity")
    assert "does not answer" in text(page)
    assert numbers(page) == ["2", "1", "1"]
    stage.database.trouble = None
    assert len(click(page, "again").dataframe[0].value) == 3


def test_without_a_sandbox_there_are_tables_and_rules(stage: Stage) -> None:
    stage.has_sandbox = False
    page = stage.open()
    assert [heading.value for heading in page.subheader] == ["Tables", "Rules"]


def test_tables_are_searched_by_their_names_and_their_columns(stage: Stage) -> None:
    page = stage.open()
    for words, names in (("ACTIV", ["activity"]), ("last", ["users", "sessions"]), ("zzz", [])):
        page.text_input(key="search").set_value(words).run()
        found = list(page.dataframe[0].value["Table"]) if names else []
        assert found == names
    assert "No table matches" in text(page)


def test_schemas_can_be_told_apart(stage: Stage) -> None:
    stage.database.found.append(Shelf.table("users", ["id"], schema="archive"))
    page = stage.open()
    assert list(page.dataframe[0].value["Schema"]) == ["public"] * 3
    page.selectbox(key="schema").set_value("all schemas").run()
    assert list(page.dataframe[0].value["Schema"]) == ["public"] * 3 + ["archive"]
    page.selectbox(key="look").set_value("archive.users").run()
    assert not page.exception


def test_a_table_is_looked_into_on_demand(stage: Stage) -> None:
    page = stage.open()
    page.selectbox(key="look").set_value("activity").run()
    assert stage.database.looks == ["tables"]
    assert "about 1,000 rows" in text(page)
    click(click(page, "examples"), "counts")
    assert stage.database.looks == ["tables", "examples activity", "count activity"]
    assert "1,234,567 rows" in text(page)
    assert list(page.dataframe[1].value["Examples"]) == ["1 · 2", "a\\x1b[2J · NULL"]
    page.multiselect[0].set_value(["action"]).run()
    click(page, "ignore columns")
    click(page, "save")
    assert stage.rules == ["sessions", {"table": "activity", "columns": ["action"]}]


def test_a_look_that_fails_is_told_beside_the_table(stage: Stage) -> None:
    page = stage.open()
    page.selectbox(key="look").set_value("activity").run()
    stage.database.trouble = TimedOutError("It took too long.")
    assert "took too long" in text(click(page, "counts"))
    assert "counts" in keys(page)


def test_a_column_is_ignored_in_every_table_that_has_it(stage: Stage) -> None:
    page = stage.open()
    page.selectbox(key="common").set_value("last").run()
    click(click(page, "everywhere"), "save")
    assert stage.rules == ["sessions", {"table": "users", "columns": ["last"]}]


def test_many_changes_are_not_all_drawn(stage: Stage) -> None:
    stage.changes = [insert(f"t{number}", {"id": number}) for number in range(300)]
    page = stage.open()
    assert len([key for key in keys(page) if key.startswith("table ")]) == plato_sandbox.SHOWN_GROUPS
    assert len([key for key in keys(click(page, "more")) if key.startswith("table ")]) == 300


@pytest.mark.parametrize("choose", ["columns", "table"])
def test_names_from_a_database_are_text_and_nothing_else(stage: Stage, choose: str) -> None:
    stage.changes = [update(SCRIPT, {SCRIPT: SCRIPT}, {SCRIPT: SCRIPT + "2"})]
    stage.database.found = [Shelf.table(SCRIPT, [SCRIPT, "id"])]
    page = click(stage.open(), f"{choose} {SCRIPT}")
    page.selectbox(key="look").set_value(SCRIPT).run()
    click(page, "save")
    assert stage.rules[1] == (SCRIPT if choose == "table" else {"table": SCRIPT, "columns": [SCRIPT]})
    html = "\n".join(str(part.proto.body) for part in page.get("html"))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_work_begun_early_is_used_once_and_only_while_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def work() -> int:
        done.append(len(done))
        return done[-1]

    early = Early(work)
    assert (early(), early()) == (0, 1)
    stale = Early(work)
    eventually(lambda: len(done) == 3)
    monkeypatch.setattr(plato_sandbox, "AUDIT_FRESH_SECONDS", 0.0)
    assert stale() == 3


def test_each_listener_has_its_own_tables_changes_and_choices(stage: Stage) -> None:
    text_of_config = stage.config.read_text().replace("  empty:\n", "      other: *listener\n\n  empty:\n")
    stage.config.write_text(text_of_config)
    stage.others["other"] = Shelf(users=["id", "only_here"], extra=["id"])
    stage.others["other"].listener.name = "other"
    page = click(stage.open(), "table activity")
    page.selectbox(key="look").set_value("users").run()
    page.radio[0].set_value(1).run()
    assert not page.exception
    assert "No changes since the last reset" in text(page)
    assert list(page.dataframe[0].value["Table"]) == ["users", "extra"]
    page.selectbox(key="look 1").set_value("users").run()
    assert list(page.dataframe[1].value["Column"]) == ["id", "only_here"]
    assert "save" not in keys(page)
    page.radio[0].set_value(0).run()
    assert numbers(page) == ["2", "1", "1"]
    assert "save" in keys(page)
    assert stage.database.looks == stage.others["other"].looks == ["tables"]


@pytest.mark.parametrize("name", ["of it", "rules", "0", " "])
def test_names_of_tables_do_not_get_in_the_way_of_the_page_itself(stage: Stage, name: str) -> None:
    stage.changes = [update(name, {"a": 1}, {"a": 2})]
    stage.database.found = [Shelf.table(name, ["a"])]
    page = stage.open()
    page.selectbox(key="look").set_value(name).run()
    click(click(page, f"columns {name}"), "save")
    assert stage.rules == ["sessions", {"table": name, "columns": ["a"]}]


# Pictures and words


def test_the_picture_has_each_kind_and_fades_what_is_hidden() -> None:
    mutations = [*LOGIN, Mutation({"table": "activity", "action": "DELETE", "row_data": {"id": 2}})]
    groups = changes_by_table(mutations)
    plain, faded = changes_picture(groups, []), changes_picture(groups, ["activity"])
    assert 'aria-label="1 inserted, 1 deleted"' in plain
    assert "pa-faded" not in plain
    assert 'aria-label="1 inserted, 1 deleted, 2 of them hidden"' in faded
    assert faded.count("pa-faded") == 3  # two bars and the key
    assert "more table" in changes_picture(groups * 10, [])


def test_a_table_of_changes_does_not_grow_without_end() -> None:
    before = {f"c{number}": 0 for number in range(50)}
    mutations = [update("wide", before, dict.fromkeys(before, time)) for time in range(1, 200)]
    (group,) = changes_by_table(mutations)
    shown = changes_table(group)
    assert shown.count("<tr>") == plato_sandbox.SHOWN_COLUMNS + 1
    assert "and 42 more columns" in shown
    assert len(shown) < 6000


@pytest.mark.parametrize(
    ("rule", "words", "trouble"),
    [
        ("users", "users", ""),
        ("public.users", "public.users", ""),
        ("gone", "gone", "no such table"),
        ({"table": "users", "columns": ["id", "x", "y"]}, "users: id, x, y", "no such column: x, y"),
        ({"odd": 1}, "{odd: 1}", "not a rule"),
    ],
)
def test_rules_that_match_nothing_are_marked(rule: Any, words: str, trouble: str) -> None:
    assert rule_words(rule) == words
    found = rule_trouble(rule, [Shelf.table("users", ["id"])])
    assert found.startswith(trouble)
    assert bool(found) is bool(trouble)
