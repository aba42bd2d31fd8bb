"""audit-ui's page, run by Streamlit's own AppTest: what each click does to the rules and to the file."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR, missing

from plato_sandbox import (
    AuditPlan,
    Changes,
    Database,
    DatabaseError,
    Mutation,
    WorkerNotUpError,
    bars_of,
    parse_config,
    show_audit_page,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KEY = "audit_ignore_tables"
SCRIPT = "<script>alert(1)</script> *bold* 'x' \"y\" 😀"
WHOLE = "(whole table)"
SAVE = "Save to plato\\-config\\.yml"
IGNORE_REST = "Ignore all that remains"


@pytest.fixture(autouse=True)
def streamlit() -> Any:
    try:
        import streamlit
    except ImportError:
        missing("streamlit is not installed; it is in the test group of pyproject.toml")
    return streamlit


def update(table: str, before: dict[str, Any], after: dict[str, Any], **more: Any) -> Mutation:
    return Mutation({"table_name": table, "action": "UPDATE", "before": before, "after": after, **more})


def insert(table: str, row: dict[str, Any]) -> Mutation:
    return Mutation({"table_name": table, "action": "INSERT", "before": None, "after": row})


LOGIN = [
    update("users", {"id": 1, "login_count": 0, "last": None}, {"id": 1, "login_count": 1, "last": "now"}),
    insert("activity", {"id": 1, "action": "login"}),
]


class Shelf(Database):
    """A database of tables that a test lays out; every look at it is counted."""

    def __init__(self, name: str = "db", **tables: list[str]) -> None:
        super().__init__(name, {"db_type": "postgresql", "db_database": "taskboard"})
        self.found: dict[str, list[Any]] = {}
        for title, columns in tables.items():
            self.put(title, columns)
        self.looks: list[str] = []
        self.trouble: Exception | None = None

    def put(self, name: str, columns: list[str]) -> None:
        self.found[name] = [("public", name, column, "text") for column in columns]

    def look(self, what: str) -> None:
        self.looks.append(what)
        if self.trouble is not None:
            raise self.trouble

    def tables(self) -> dict[str, list[Any]]:
        self.look("tables")
        return self.found

    def examples(self, columns: Sequence[Any]) -> dict[str, Any]:
        self.look(f"examples {columns[0][1]}")
        return {row[2]: ["1", None] for row in columns}


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
        self.path = str(self.config)
        self.others: list[Shelf] = []
        self.plan: AuditPlan | None = None

    def read(self, listener: str) -> list[Mutation]:
        self.reads += 1
        if isinstance(self.changes, Exception):
            raise self.changes
        return list(self.changes) if listener == "db" else []

    def show(self) -> None:
        if self.plan is None:
            reader = self.read if self.has_sandbox else lambda _: None
            self.plan = AuditPlan(
                (self.database, *self.others),
                reader,
                parse_config("{service: taskboard, datasets: {base: {}}}", "", self.path, "base"),
                "https://app.example/",
            )
        show_audit_page(self.plan)

    def open(self, visit: str | None = None) -> Any:
        """The page in a new browser, so to say; or in one that comes back."""
        from streamlit.testing.v1 import AppTest

        def script() -> None:
            import test_audit_page

            test_audit_page.Stage.shown.show()

        Stage.shown = self
        page = AppTest.from_function(script, default_timeout=30)
        if visit is not None:
            page.query_params["visit"] = visit
        page.run()
        assert not page.exception, page.exception
        return page

    @property
    def rules(self) -> Any:
        config = yaml.safe_load(self.config.read_text())
        return config["datasets"]["base"]["listeners"]["db"][KEY]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def click(page: Any, label: str) -> Any:
    (button,) = [button for button in page.button if button.label.startswith(label)]
    button.click().run()
    assert not page.exception, page.exception
    return page


def grid(page: Any) -> Any:
    return page.dataframe[0]


def rows(page: Any) -> list[tuple[str, str]]:
    """The tables and columns of the grid, from the top."""
    value = grid(page).value
    return list(zip(value["Table"], value["Column"]))


def tick(page: Any, *places: tuple[str, str], to: bool = True) -> Any:
    """Tick rows of the grid, as Streamlit's own front end tells it: all edits since it was drawn."""
    found, element = rows(page), grid(page)
    edits = page.__dict__.setdefault("edits", {}).setdefault(element.proto.id, {})
    edits.update({str(found.index(place)): {"Ignore": to} for place in places})
    states = page._tree.get_widget_states()
    state = states.widgets.add()
    state.id = element.proto.id
    state.string_value = json.dumps({"edited_rows": edits, "added_rows": [], "deleted_rows": []})
    page._run(states)
    assert not page.exception, page.exception
    return page


def buttons(page: Any) -> set[str]:
    return {button.label for button in page.button}


def text(page: Any) -> str:
    """All that a person could read."""
    kinds = ("title", "caption", "markdown", "info", "success", "warning", "error", "code", "toast")
    parts = [str(part.value) for kind in kinds for part in page.get(kind) if hasattr(part, "value")]
    return "\n".join([*parts, html(page)])


def html(page: Any) -> str:
    return "\n".join(str(part.proto.body) for part in page.get("html"))


def numbers(page: Any) -> list[str]:
    """Changes, hidden by the rules, remaining."""
    return [metric.value for metric in page.metric]


# Choosing


def test_what_changed_is_there_at_once_by_table_and_column(stage: Stage) -> None:
    page = stage.open()
    assert numbers(page) == ["2", "0", "2"]
    assert rows(page) == [
        ("activity", WHOLE),
        ("users", WHOLE),
        ("users", "login_count"),
        ("users", "last"),
        ("sessions", WHOLE),
    ]
    assert list(grid(page).value["Ignore"]) == [False, False, False, False, True]
    assert list(grid(page).value["What happened"])[:4] == [
        "inserted: id=1, action=login",
        "updated: id=1  login_count: 0 -> 1, last: null -> now",
        "0 -> 1",
        "null -> now",
    ]
    assert (stage.database.looks, stage.reads) == (["tables"], 1)


def test_ticks_are_the_rules_and_saving_writes_them(stage: Stage) -> None:
    page = tick(stage.open(), ("users", "login_count"))
    assert numbers(page) == ["2", "0", "2"], "another column changed, too"
    tick(page, ("users", "last"))
    assert numbers(page) == ["2", "1", "1"]
    assert stage.rules == ["sessions"], "nothing is written before Save"
    tick(page, ("activity", WHOLE))
    assert numbers(page) == ["2", "2", "0"]
    assert "would pass" in text(page)
    (diff,) = [code.value for code in page.code if code.value.startswith("@@")]
    assert "+          - activity" in diff
    assert "empty/db" in text(page), "the listener that shares the list is named"
    click(page, "Save to ")
    assert stage.rules == ["sessions", "activity", {"table": "users", "columns": ["last", "login_count"]}]
    assert "Saved" in text(page)
    assert "start-worker" in text(page)
    assert SAVE not in buttons(page)
    assert (stage.database.looks, stage.reads) == (["tables"], 1), "choosing asks nobody again"


def test_rules_are_taken_back_and_choices_discarded(stage: Stage) -> None:
    page = tick(stage.open(), ("sessions", WHOLE), to=False)
    assert f"{KEY}: []" in text(page)
    click(page, "Discard")
    assert SAVE not in buttons(page)
    click(tick(page, ("sessions", WHOLE), to=False), "Save to ")
    assert stage.rules == []


def test_all_that_remains_is_ignored_with_one_click(stage: Stage) -> None:
    page = click(tick(stage.open(), ("users", "last")), IGNORE_REST)
    assert numbers(page) == ["2", "2", "0"]
    click(page, "Save to ")
    assert stage.rules == ["sessions", "activity", {"table": "users", "columns": ["last", "login_count"]}]


def test_a_column_is_ignored_in_every_table_that_has_it(stage: Stage) -> None:
    """A rule for a whole table stays one."""
    page = stage.open()
    page.text_input[0].set_value("LAST").run()
    assert rows(page) == [("users", "last"), ("sessions", "last")]
    click(click(page, "Ignore 2 columns"), "Save to ")
    assert stage.rules == ["sessions", {"table": "users", "columns": ["last"]}]


def test_a_file_that_changed_meanwhile_keeps_both(stage: Stage) -> None:
    page = tick(stage.open(), ("activity", WHOLE))
    stage.config.write_text(stage.config.read_text().replace("- sessions", "- sessions\n          - mine"))
    click(page, "Save to ")
    assert stage.rules == ["sessions", "mine"]
    assert "was changed" in text(page)
    click(click(page, "Look again"), "Save to ")
    assert stage.rules == ["sessions", "mine", "activity"]


def test_a_config_that_cannot_be_edited_leaves_the_block_to_copy(stage: Stage) -> None:
    page = tick(stage.open(), ("activity", WHOLE))
    stage.config.write_text("nonsense: [")
    click(click(page, "Save to "), "Look again")
    assert "plato\\-config\\.yml\\:1\\:11" in text(page)
    assert SAVE not in buttons(page)
    assert any("- activity" in code.value and code.value.startswith(KEY) for code in page.code)


def test_without_a_config_there_is_the_block_to_copy(stage: Stage) -> None:
    stage.path = ""
    page = tick(stage.open(), ("users", "login_count"))
    assert SAVE not in buttons(page)
    (block,) = [code.value for code in page.code]
    assert yaml.safe_load(block) == {KEY: [{"table": "users", "columns": ["login_count"]}]}


def test_without_a_config_the_rules_of_the_artifact_are_where_one_begins(stage: Stage) -> None:
    """Whoever copies the YAML into a config loses none of them."""
    stage.path = ""
    own = ["sessions", {"table": "users", "columns": ["last"], "why": "each login"}]
    stage.database.rules = own
    page = tick(stage.open(), ("activity", WHOLE))
    assert numbers(page) == ["2", "1", "1"]
    (block,) = [code.value for code in page.code]
    assert yaml.safe_load(block) == {KEY: [*own, "activity"]}


def test_a_reload_keeps_what_is_not_saved(stage: Stage) -> None:
    page = tick(stage.open(), ("activity", WHOLE))
    again = stage.open("".join(page.query_params["visit"]))
    assert numbers(again) == ["2", "1", "1"]
    assert list(grid(again).value["Ignore"])[:2] == [True, False]
    click(again, "Save to ")
    assert stage.rules == ["sessions", "activity"]
    assert numbers(stage.open()) == ["2", "1", "1"]


def test_two_people_have_choices_of_their_own(stage: Stage) -> None:
    first = tick(stage.open(), ("activity", WHOLE))
    second = stage.open()
    assert (numbers(first), numbers(second)) == (["2", "1", "1"], ["2", "0", "2"])


# Looking


def test_recording_shows_only_what_happened_meanwhile(stage: Stage) -> None:
    page = click(stage.open(), "Record")
    assert "Recording" in text(page)
    assert "https://app.example/" in text(page)
    stage.changes = [*LOGIN, insert("tasks", {"id": 5, "title": "mine"})]
    click(page, "Stop")
    assert numbers(page) == ["1", "0", "1"]
    assert rows(page)[0] == ("tasks", WHOLE)
    click(page, "Look again")
    assert numbers(page) == ["3", "0", "3"]


def test_a_recording_in_which_nothing_happened(stage: Stage) -> None:
    page = click(click(stage.open(), "Record"), "Stop")
    assert "Nothing changed." in text(page)
    stage.changes = WorkerNotUpError("The worker went away.")
    page = click(page, "Record")
    assert "worker went away" in text(page)


def test_looking_again_renews_everything(stage: Stage) -> None:
    stage.changes = []
    stage.database.trouble = DatabaseError("It does not answer.", hint="Start it.")
    page = stage.open()
    assert "Nothing changed." in text(page)
    assert "does not answer" in text(page)
    stage.changes, stage.database.trouble = LOGIN, None
    assert numbers(click(page, "Look again")) == ["2", "0", "2"]
    assert "does not answer" not in text(page)


def test_a_worker_that_is_not_up_leaves_the_tables(stage: Stage) -> None:
    stage.changes = WorkerNotUpError("The worker is not up.", hint="Start it: plato-sandbox start-worker")
    page = stage.open()
    assert "not up" in text(page)
    assert "start\\-worker" in text(page)
    assert len(rows(page)) == 10
    stage.changes = LOGIN
    assert numbers(click(page, "Look again")) == ["2", "0", "2"]


def test_of_a_database_that_is_away_only_its_own_hint_is_told(stage: Stage) -> None:
    stage.database.trouble = DatabaseError("It does not answer.", hint="Start its services.")
    stage.changes = WorkerNotUpError("The worker is not up.", hint="Start the worker.")
    page = stage.open()
    assert "Start its services" in text(page)
    assert "Start the worker" not in text(page)
    stage.changes = LOGIN
    tick(click(page, "Look again"), ("activity", WHOLE))
    assert numbers(page) == ["2", "1", "1"], "what changed is there without the database"


def test_without_a_sandbox_there_are_tables_and_rules(stage: Stage) -> None:
    stage.has_sandbox = False
    page = stage.open()
    assert numbers(page) == []
    assert len(rows(page)) == 10


def test_tables_are_searched_by_their_names_and_their_columns(stage: Stage) -> None:
    page = stage.open()
    for words, names in (("ACTIV", {"activity"}), ("last", {"users", "sessions"}), ("zzz", set())):
        page.text_input[0].set_value(words).run()
        assert ({name for name, _ in rows(page)} if names else set()) == names
    assert "Nothing here has such a name" in text(page)
    page.text_input[0].set_value("").run()
    page.toggle[0].set_value(False).run()
    assert len(rows(page)) == 10


def test_choices_outlive_another_view(stage: Stage) -> None:
    page = tick(stage.open(), ("activity", WHOLE))
    page.text_input[0].set_value("users").run()
    tick(page, ("users", "last"))
    page.text_input[0].set_value("").run()
    click(page, "Save to ")
    assert stage.rules == ["sessions", "activity", {"table": "users", "columns": ["last"]}]


def test_a_table_is_looked_into_on_demand(stage: Stage) -> None:
    page = stage.open()
    page.selectbox[0].set_value("activity").run()
    assert stage.database.looks == ["tables", "examples activity"]
    assert list(page.dataframe[1].value["action"].fillna("NULL")) == ["1", "NULL"]
    tick(page, ("users", "last"))
    assert stage.database.looks == ["tables", "examples activity"]
    stage.database.trouble = DatabaseError("It took too long.")
    page.selectbox[0].set_value("users").run()
    assert "took too long" in text(page)


@pytest.mark.parametrize("column", [SCRIPT, WHOLE])
def test_names_from_a_database_are_text_and_nothing_else(stage: Stage, column: str) -> None:
    stage.changes = [update(SCRIPT, {SCRIPT: SCRIPT}, {SCRIPT: SCRIPT + "2"})]
    stage.database.found = {}
    stage.database.put(SCRIPT, [SCRIPT, "id"])
    page = tick(stage.open(), (SCRIPT, column))
    page.selectbox[0].set_value(SCRIPT).run()
    click(page, "Save to ")
    assert stage.rules[1] == (SCRIPT if column == WHOLE else {"table": SCRIPT, "columns": [SCRIPT]})
    assert "<script" not in html(page)


@pytest.mark.parametrize("name", ["of it", "rules", "0", " ", "(whole table)"])
def test_names_of_tables_do_not_get_in_the_way_of_the_page_itself(stage: Stage, name: str) -> None:
    stage.changes = [update(name, {"a": 1, name: 1}, {"a": 2, name: 2})]
    stage.database.found = {}
    stage.database.put(name, ["a", name])
    page = stage.open()
    page.selectbox[0].set_value(name).run()
    click(tick(page, (name, "a")), "Save to ")
    assert stage.rules == ["sessions", {"table": name, "columns": ["a"]}]


def test_rules_for_what_is_not_there_are_marked(stage: Stage) -> None:
    text_of_config = stage.config.read_text().replace(
        "- sessions\n", "- gone\n          - {table: users, columns: [id, nope]}\n"
    )
    stage.config.write_text(text_of_config)
    value = grid(stage.open()).value
    marked = value[value["Type"] == "not in the database"]
    assert list(zip(marked["Table"], marked["Column"])) == [("users", "nope"), ("gone", WHOLE)]


def test_each_listener_has_its_own_tables_changes_and_choices(stage: Stage) -> None:
    """Tables of the same name are two."""
    text_of_config = stage.config.read_text().replace("  empty:\n", "      other: *listener\n\n  empty:\n")
    stage.config.write_text(text_of_config)
    stage.others.append(Shelf("other", users=["id", "only_here"], extra=["id"]))
    page = tick(stage.open(), ("activity", WHOLE))
    page.radio[0].set_value(1).run()
    assert not page.exception
    assert "Nothing changed." in text(page)
    assert [place for place in rows(page) if place[0] == "users"] == [
        *(("users", WHOLE), ("users", "id"), ("users", "only_here"))
    ]
    assert SAVE not in buttons(page)
    page.radio[0].set_value(0).run()
    assert numbers(page) == ["2", "1", "1"]
    assert SAVE in buttons(page)
    assert stage.database.looks == stage.others[0].looks == ["tables"]


# Much, and pictures


def test_the_effect_of_a_tick_does_not_depend_on_how_much_changed() -> None:
    """Each of so many changes is looked at once, when they are read."""
    row = {f"c{number}": 0 for number in range(12)}
    mutations = [update("wide", row, {**row, f"c{number % 12}": number}) for number in range(1, 30_001)]
    changes = Changes(mutations, "public")
    assert len(changes.kinds) == 12
    assert sum(changes.kinds.values()) == 30_000 == len(changes.of["wide", ""])
    assert sum(changes.remaining({("wide", "c0")}).values()) == 27_500
    began = time.process_time()
    for number in range(1000):
        bars_of(changes, {("wide", f"c{number % 12}")})
    assert time.process_time() - began < 10, "a thousand times"


def test_the_picture_has_each_kind_and_fades_what_is_hidden() -> None:
    mutations = [*LOGIN, Mutation({"table": "activity", "action": "DELETE", "row_data": {"id": 2}})]
    changes = Changes(mutations, "public")
    activity = [
        (bar["kind"], bar["changes"]) for bar in bars_of(changes, set()) if bar["table"] == "activity"
    ]
    assert activity == [("inserted", 1), ("deleted", 1)]
    assert {bar["rules"] for bar in bars_of(changes, set())} == {"remaining"}
    faded = [bar["table"] for bar in bars_of(changes, {("activity", "")}) if bar["rules"] != "remaining"]
    assert faded == ["activity", "activity"]
