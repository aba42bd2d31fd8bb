"""The local Plato's worker from outside: what changed in real databases inside VMs, reset, audit tables."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import SIMULATOR, eventually, missing
from hypothesis import given
from hypothesis import strategies as st
from localplato import LocalPlato
from localplato.mutations import merge, unignored
from test_local_plato import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SESSIONS = "/api/v2/sessions"
VM = "/api/v1/sandbox/public-build/vm"
PASSWORD = "pass word'\"$(id)é"
UP_SECONDS = 60

# The servers refuse to run as root. An ordinary user's VM knows only that one user, and calls it root: a user
# namespace further in, it has another name.
AS_PLATO = (
    "setpriv --reuid=1000 --regid=1000 --clear-groups"
    if os.geteuid() == 0
    else "unshare --user --map-user=1000 --map-group=1000"
)
POSTGRESQL = """
set -e
PATH=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1):$PATH
cd /home/plato
printf %s "$WORD" > word
initdb -D pg -U plato --pwfile=word -A scram-sha-256 -E UTF8 --locale=C.UTF-8 --no-sync >/dev/null
pg_ctl -D pg -w -t 100 -l pg.log -o "-c listen_addresses=127.0.0.1 -c unix_socket_directories=/home/plato \
-c fsync=off -c max_connections=30" start >/dev/null
"""
MARIADB = """
set -e
cd /home/plato
mariadb-install-db --no-defaults --datadir=/home/plato/my --auth-root-authentication-method=normal \
    --skip-test-db --skip-log-bin --tmpdir=/home/plato >my-install.log 2>&1
setsid mariadbd --no-defaults --datadir=/home/plato/my --socket=/home/plato/my.sock --port=3306 \
    --bind-address=127.0.0.1 --innodb-flush-log-at-trx-commit=0 --tmpdir=/home/plato >my.log 2>&1 </dev/null &
for i in $(seq 1000); do
    mariadb-admin --no-defaults --socket=/home/plato/my.sock --user=root ping >/dev/null 2>&1 && break
    sleep 0.1
done
printf '%s' "$USERS" | mariadb --no-defaults --socket=/home/plato/my.sock --user=root
"""


class House:
    """A local Plato with one VM whose databases many tests use, each one of its own."""

    def __init__(self, plato: LocalPlato) -> None:
        self.plato = plato
        self.client = Client(plato)
        # Nobody beats for it, and a slow machine takes its time.
        self.session_id, self.job_id = self.client.start(heartbeat_timeout=0, timeout=86_400)
        self.databases = 0

    def shell(self, script: str, **environment: str) -> str:
        """Run a script in the VM; its output."""
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        text = base64.b64encode(f"{f'export {words}' if words else ''}\n{script}".encode()).decode()
        command = f"echo {text} | base64 -d > /tmp/script; sh /tmp/script"
        return str(self.client.output(self.session_id, command))

    def as_plato(self, script: str, **environment: str) -> str:
        text = base64.b64encode(script.encode()).decode()
        return self.shell(f"echo {text} | base64 -d | {AS_PLATO} sh", **environment)

    def new_name(self) -> str:
        self.databases += 1
        return f"data{self.databases}"

    # -- the worker --

    def start_worker(self, listeners: dict[str, Any], wait: bool = True, **extra: Any) -> None:
        dataset = {"compute": {}, "metadata": {}, "listeners": listeners, **extra}
        body = {"service": "shop", "dataset": "base", "plato_dataset_config": dataset}
        answer = self.client.call("POST", f"{VM}/{self.job_id}/start-worker", body)
        assert answer["status"] == "success"
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        def over(snapshot: dict[str, Any]) -> Any:
            return any(
                job["worker"] and job["worker"]["up"]
                for session in snapshot["sessions"]
                for job in session["jobs"]
                if job["job_id"] == self.job_id
            )

        try:
            self.plato.wait_for(over, UP_SECONDS)
        except TimeoutError:
            pytest.fail(f"the worker is not up: {self.result()}")

    def state(self, merged: bool = True) -> dict[str, Any]:
        """The state of the VM, which must be known."""
        result = self.result(merged)
        assert result["success"], result
        return dict(result["state"])

    def result(self, merged: bool = True) -> dict[str, Any]:
        path = f"{SESSIONS}/{self.session_id}/state?merge_mutations={str(merged).lower()}"
        return dict(self.client.call("GET", path)["results"][self.job_id])

    def changes(self, merged: bool = True) -> list[tuple[Any, ...]]:
        """(action, table, before, after) of every mutation."""
        return [
            (one["action"], one["table_name"], one["before"], one["after"])
            for one in self.state(merged)["mutations"]
        ]

    def reset(self) -> None:
        answer = self.client.call("POST", f"{SESSIONS}/{self.session_id}/reset", {})
        assert answer["success"], answer

    def cleanup(self, status: int = 200) -> dict[str, Any]:
        path = f"/api/v1/env/{self.session_id}/cleanup"
        return dict(self.client.call("POST", path, status=status))


class Engine:
    """A kind of database server in the house: a new database for each test."""

    kind = ""
    row_id = "id integer PRIMARY KEY"

    def __init__(self, house: House) -> None:
        self.house = house
        self.name = house.new_name()
        self.listener: dict[str, Any] = {"type": "db", "db_type": self.kind, "db_database": self.name}

    def sql(self, script: str) -> str:
        raise NotImplementedError

    def begin(self, script: str, **listener: Any) -> None:
        """Run a script, and start the worker on this database."""
        self.sql(script)
        self.listener.update(listener)
        self.house.start_worker({"db": self.listener})


class PostgreSql(Engine):
    kind = "postgresql"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.listener.update(db_host="127.0.0.1", db_port=5432, db_user="plato", db_password=PASSWORD)
        self.sql(f"CREATE DATABASE {self.name}", "postgres")

    def sql(self, script: str, database: str = "") -> str:
        command = "psql -X -q -A -t -v ON_ERROR_STOP=1 -h 127.0.0.1 -U plato"
        return self.house.shell(
            f"printf '%s' \"$SCRIPT\" | {command} -d {database or self.name}",
            SCRIPT=script,
            PGPASSWORD=PASSWORD,
        )


class MariaDb(Engine):
    kind = "mysql"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.listener.update(db_host="127.0.0.1", db_port=3306, db_user="plato", db_password=PASSWORD)
        self.sql(f"CREATE DATABASE {self.name} CHARACTER SET utf8mb4", "")

    def sql(self, script: str, database: str | None = None) -> str:
        command = "mariadb --no-defaults -h 127.0.0.1 -u plato -N -B --default-character-set=utf8mb4"
        name = self.name if database is None else database
        return self.house.shell(
            f"printf '%s' \"$SCRIPT\" | {command} {name}", SCRIPT=script, MYSQL_PWD=PASSWORD
        )


class Sqlite(Engine):
    kind = "sqlite"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.path = f"/home/plato/{self.name} file?.db"
        self.listener["db_database"] = self.path
        self.sql("SELECT 1")

    def sql(self, script: str) -> str:
        program = (
            "import os, sqlite3\n"
            f"connection = sqlite3.connect({self.path!r})\n"
            "connection.execute('PRAGMA foreign_keys = ON')\n"
            "connection.execute('CREATE TABLE IF NOT EXISTS zz (a)')\n"
            "for text in os.environ['SCRIPT'].split(';'):\n"
            "    for row in connection.execute(text): print('|'.join(map(str, row)))\n"
            "connection.commit()\n"
        )
        return self.house.shell(f"python3 -c {shlex.quote(program)}", SCRIPT=script)


def has_postgresql() -> None:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        missing("PostgreSQL is not installed; on Debian: apt-get install postgresql")


def has_mariadb() -> None:
    if shutil.which("mariadbd", path="/usr/sbin:/usr/bin") is None:
        missing("MariaDB is not installed; on Debian: apt-get install mariadb-server")


def has_namespaces(plato: LocalPlato) -> None:
    if any("without namespaces" in warning for warning in plato.information["warnings"]):
        missing("VMs have no network of their own here, and the databases' ports would be this host's")


@pytest.fixture(scope="module")
def house(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with LocalPlato(tmp_path_factory.mktemp("house"), ca_from=certificates) as plato:
        has_namespaces(plato)
        yield House(plato)


@pytest.fixture(scope="module")
def postgresql_server(house: House) -> House:
    has_postgresql()
    house.as_plato(POSTGRESQL, WORD=PASSWORD)
    return house


@pytest.fixture(scope="module")
def mariadb_server(house: House) -> House:
    has_mariadb()
    word = PASSWORD.replace("'", "''")
    users = f"CREATE USER plato@'%' IDENTIFIED BY '{word}'; GRANT ALL ON *.* TO plato@'%';"
    house.as_plato(MARIADB, USERS=users)
    return house


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def engine(request: pytest.FixtureRequest, house: House) -> Engine:
    """A new database of each kind."""
    if request.param == "postgresql":
        request.getfixturevalue("postgresql_server")
        return PostgreSql(house)
    if request.param == "mariadb":
        request.getfixturevalue("mariadb_server")
        return MariaDb(house)
    return Sqlite(house)


@pytest.fixture
def postgresql(postgresql_server: House) -> PostgreSql:
    return PostgreSql(postgresql_server)


# ---------------------------------------------------------------------------
# what changed
# ---------------------------------------------------------------------------

TASKS = """
CREATE TABLE tasks (id integer PRIMARY KEY, title varchar(50), seen integer);
INSERT INTO tasks VALUES (1, 'one', 0);
INSERT INTO tasks VALUES (2, 'two', 0);
CREATE TABLE visits (id integer PRIMARY KEY)
"""


def task(number: int, title: str | None, seen: int = 0) -> dict[str, Any]:
    return {"id": number, "title": title, "seen": seen}


@pytest.mark.long
def test_every_change_of_a_row(engine: Engine) -> None:
    engine.begin(TASKS)
    assert engine.house.state() == {"db": {"mutations": [], "audit_log_count": 0}, "mutations": []}
    engine.sql(
        "INSERT INTO tasks VALUES (3, 'b''\"\té', 0); UPDATE tasks SET title = NULL WHERE id = 1; "
        "DELETE FROM tasks WHERE id = 2; UPDATE tasks SET seen = seen WHERE id = 3"
    )
    changes = engine.house.changes(merged=False)
    assert changes == [
        ("INSERT", "tasks", None, task(3, "b'\"\té")),
        ("UPDATE", "tasks", task(1, "one"), task(1, None)),
        ("DELETE", "tasks", task(2, "two"), None),
        ("UPDATE", "tasks", task(3, "b'\"\té"), task(3, "b'\"\té")),
    ]
    state = engine.house.state()
    assert state["db"]["mutations"] == state["mutations"]
    assert state["db"]["audit_log_count"] == 4
    assert [one["changed_columns"] for one in state["mutations"]] == [[], ["title"], []]
    times = [one["timestamp"] for one in engine.house.state(merged=False)["mutations"]]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", text) for text in times)


@pytest.mark.long
def test_changes_of_one_row_are_merged(engine: Engine) -> None:
    engine.begin(TASKS)
    engine.sql(
        "INSERT INTO tasks VALUES (3, 'x', 0); DELETE FROM tasks WHERE id = 3; "
        "INSERT INTO tasks VALUES (4, 'x', 0); UPDATE tasks SET title = 'y' WHERE id = 4; "
        "UPDATE tasks SET title = 'z' WHERE id = 1; UPDATE tasks SET title = 'one' WHERE id = 1; "
        "UPDATE tasks SET title = 'z' WHERE id = 2; UPDATE tasks SET seen = 5 WHERE id = 2"
    )
    assert engine.house.changes() == [
        ("INSERT", "tasks", None, task(4, "y")),
        ("UPDATE", "tasks", task(2, "two"), task(2, "z", 5)),
    ]
    assert len(engine.house.changes(merged=False)) == 8


@pytest.mark.long
def test_ignore_rules(engine: Engine) -> None:
    rules = ["visits", {"table": "tasks", "columns": ["seen"]}]
    engine.begin(TASKS, audit_ignore_tables=rules)
    engine.sql("INSERT INTO visits VALUES (1); UPDATE tasks SET seen = 1")
    assert engine.house.changes() == []
    assert len(engine.house.changes(merged=False)) == 3
    engine.sql(
        "UPDATE tasks SET seen = 2, title = 'new' WHERE id = 1; INSERT INTO tasks VALUES (7, 'seven', 1)"
    )
    assert engine.house.changes() == [
        ("UPDATE", "tasks", task(1, "one"), task(1, "new", 2)),
        ("INSERT", "tasks", None, task(7, "seven", 1)),
    ]


@pytest.mark.long
def test_odd_names(engine: Engine) -> None:
    mark = "`" if engine.kind == "mysql" else '"'
    table, column = "we'ird `\"; $(id)é", "co'l umn\\\"`"
    names = [mark + name.replace(mark, mark * 2) + mark for name in (table, column)]
    script = f"CREATE TABLE {names[0]} (id integer PRIMARY KEY, {names[1]} varchar(9))"
    if engine.kind == "sqlite":
        table = table.replace(";", "")
        script = script.replace(";", "")
        names[0] = names[0].replace(";", "")
    engine.begin(script, audit_table_name="au'dit \"log")
    engine.sql(f"INSERT INTO {names[0]} VALUES (1, 'a'); UPDATE {names[0]} SET {names[1]} = 'b'")
    assert engine.house.changes() == [("INSERT", table, None, {"id": 1, column: "b"})]
    engine.house.reset()
    assert engine.house.changes() == []


@pytest.mark.long
def test_tables_and_columns_that_come_later(engine: Engine) -> None:
    engine.begin(TASKS)
    engine.sql("CREATE TABLE later (id integer PRIMARY KEY); ALTER TABLE tasks ADD COLUMN due varchar(9)")
    assert engine.house.changes() == []
    engine.sql("INSERT INTO later VALUES (1); UPDATE tasks SET due = 'now' WHERE id = 1")
    assert engine.house.changes() == [
        ("INSERT", "later", None, {"id": 1}),
        ("UPDATE", "tasks", {**task(1, "one"), "due": None}, {**task(1, "one"), "due": "now"}),
    ]


@pytest.mark.long
def test_rows_without_a_primary_key(engine: Engine) -> None:
    engine.begin("CREATE TABLE notes (a integer); INSERT INTO notes VALUES (1); INSERT INTO notes VALUES (1)")
    engine.sql(
        "UPDATE notes SET a = 2; UPDATE notes SET a = 3; INSERT INTO notes VALUES (9); "
        "DELETE FROM notes WHERE a = 9"
    )
    assert engine.house.changes() == [("UPDATE", "notes", {"a": 1}, {"a": 3})] * 2


# ---------------------------------------------------------------------------
# back again
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_reset(engine: Engine) -> None:
    engine.begin(TASKS + "; CREATE VIEW open_tasks AS SELECT id FROM tasks")
    for _ in range(2):
        engine.sql(
            "UPDATE tasks SET title = 'x'; DELETE FROM tasks WHERE id = 2; INSERT INTO visits VALUES (5); "
            "CREATE TABLE later (id integer); INSERT INTO later VALUES (1); "
            "DROP VIEW open_tasks; CREATE VIEW late_view AS SELECT id FROM visits; "
            "ALTER TABLE tasks ADD COLUMN due integer"
        )
        assert len(engine.house.changes()) >= 3
        engine.house.reset()
        assert engine.house.state() == {"db": {"mutations": [], "audit_log_count": 0}, "mutations": []}
        rows = engine.sql(
            "SELECT * FROM tasks ORDER BY id; SELECT count(*) FROM visits; "
            "SELECT id FROM open_tasks ORDER BY id"
        )
        assert rows.replace("\t", "|").split() == ["1|one|0", "2|two|0", "0", "1", "2"]
        for name in ("later", "late_view"):
            with pytest.raises(AssertionError):
                engine.sql(f"SELECT * FROM {name}")
    engine.sql("UPDATE tasks SET title = 'after' WHERE id = 1")
    assert engine.house.changes() == [("UPDATE", "tasks", task(1, "one"), task(1, "after"))]


@pytest.mark.long
def test_reset_brings_back_a_dropped_table(engine: Engine) -> None:
    engine.begin(TASKS)
    engine.sql("DROP TABLE tasks")
    engine.house.reset()
    engine.sql("INSERT INTO tasks VALUES (3, 'three', 0)")
    assert engine.house.changes() == [("INSERT", "tasks", None, task(3, "three"))]


@pytest.mark.long
def test_generated_keys_go_back(engine: Engine) -> None:
    words = {
        "postgresql": "id serial PRIMARY KEY",
        "mysql": "id integer AUTO_INCREMENT PRIMARY KEY",
        "sqlite": "id integer PRIMARY KEY AUTOINCREMENT",
    }[engine.kind]
    engine.begin(f"CREATE TABLE tasks ({words}, title varchar(9)); INSERT INTO tasks (title) VALUES ('a')")
    for _ in range(2):
        engine.sql("INSERT INTO tasks (title) VALUES ('b'); INSERT INTO tasks (title) VALUES ('c')")
        assert [after["id"] for _, _, _, after in engine.house.changes()] == [2, 3]
        engine.house.reset()


@pytest.mark.long
def test_cleanup_keeps_the_rows(engine: Engine) -> None:
    engine.begin(TASKS)
    engine.sql("DELETE FROM tasks WHERE id = 1")
    assert len(engine.house.changes()) == 1
    assert engine.house.cleanup() == {"success": True, "error": None}
    assert engine.house.changes() == []
    assert engine.sql("SELECT id FROM tasks").split() == ["2"]
    engine.house.reset()
    assert engine.sql("SELECT id FROM tasks ORDER BY id").split() == ["1", "2"]


@pytest.mark.long
def test_a_worker_started_again_begins_anew(engine: Engine) -> None:
    engine.begin(TASKS)
    engine.sql("DELETE FROM tasks WHERE id = 1")
    engine.begin("SELECT 1")
    assert engine.house.changes() == []
    engine.sql("DELETE FROM tasks WHERE id = 2")
    engine.house.reset()
    assert engine.sql("SELECT id FROM tasks").split() == ["2"]


# ---------------------------------------------------------------------------
# one kind of database
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_truncate(postgresql: PostgreSql) -> None:
    postgresql.begin(
        TASKS + "; CREATE TABLE parts (task integer REFERENCES tasks); INSERT INTO parts VALUES (1)"
    )
    postgresql.sql("TRUNCATE tasks CASCADE; TRUNCATE visits")
    assert sorted(postgresql.house.changes(merged=False), key=str) == [
        ("TRUNCATE", "parts", {"task": 1}, None),
        ("TRUNCATE", "tasks", task(1, "one"), None),
        ("TRUNCATE", "tasks", task(2, "two"), None),
    ]
    assert {one[0] for one in postgresql.house.changes()} == {"DELETE"}
    postgresql.house.reset()
    assert postgresql.sql("SELECT count(*) FROM tasks, parts") == "2\n"


@pytest.mark.long
def test_partitions(postgresql: PostgreSql) -> None:
    postgresql.begin(
        "CREATE TABLE logs (id integer, day integer, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);"
        "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10);"
        "INSERT INTO logs VALUES (1, 1)"
    )
    postgresql.sql("CREATE TABLE logs_2 PARTITION OF logs FOR VALUES FROM (10) TO (20)")
    postgresql.sql("INSERT INTO logs VALUES (2, 12); UPDATE logs SET day = 15 WHERE id = 1")
    assert postgresql.house.changes() == [
        ("INSERT", "logs", None, {"id": 2, "day": 12}),
        ("DELETE", "logs", {"id": 1, "day": 1}, None),
        ("INSERT", "logs", None, {"id": 1, "day": 15}),
    ]
    postgresql.sql("TRUNCATE logs_2")
    assert postgresql.house.changes() == [("DELETE", "logs", {"id": 1, "day": 1}, None)]
    postgresql.house.reset()
    assert postgresql.sql("SELECT * FROM logs") == "1|1\n"


@pytest.mark.long
def test_all_that_a_schema_holds_goes_back(postgresql: PostgreSql) -> None:
    postgresql.begin(
        'CREATE SCHEMA "od d"; SET search_path = "od d";'
        "CREATE TYPE mood AS ENUM ('good', 'bad');"
        "CREATE TABLE people (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, now mood);"
        "CREATE FUNCTION everyone() RETURNS SETOF people LANGUAGE sql AS 'SELECT * FROM \"od d\".people';"
        "CREATE MATERIALIZED VIEW moods AS SELECT DISTINCT now FROM people;"
        "CREATE TABLE public.other (id integer)",
        db_schema="od d",
    )
    change = (
        "SET search_path = \"od d\"; ALTER TYPE mood ADD VALUE 'so'; DROP FUNCTION everyone();"
        "CREATE FUNCTION late() RETURNS integer LANGUAGE sql AS 'SELECT 1';"
        "CREATE TYPE pair AS (a integer); CREATE DOMAIN small AS integer CHECK (value < 9);"
        "INSERT INTO people (now) VALUES ('good'); INSERT INTO public.other VALUES (1)"
    )
    for _ in range(2):
        postgresql.sql(change)
        assert postgresql.house.changes() == [("INSERT", "people", None, {"id": 1, "now": "good"})]
        postgresql.house.reset()
    assert postgresql.sql('SELECT count(*) FROM "od d".everyone(); SELECT count(*) FROM other') == "0\n2\n"
    assert postgresql.house.state()["mutations"] == []


@pytest.mark.long
def test_another_user_of_the_database_is_recorded_too(postgresql: PostgreSql) -> None:
    user = f"app_{postgresql.name}"
    postgresql.begin(
        f"{TASKS}; CREATE ROLE {user}; GRANT SELECT, INSERT, UPDATE ON tasks TO {user}",
    )
    postgresql.sql(f"SET ROLE {user}; SET search_path = ''; UPDATE public.tasks SET title = 'x' WHERE id = 1")
    assert postgresql.house.changes() == [("UPDATE", "tasks", task(1, "one"), task(1, "x"))]


@pytest.mark.long
def test_extensions_survive_a_reset(postgresql: PostgreSql) -> None:
    has = postgresql.sql("SELECT count(*) FROM pg_available_extensions WHERE name = 'citext'")
    if has != "1\n":
        missing("PostgreSQL's contributed extensions are not installed")
    postgresql.begin("CREATE EXTENSION citext; CREATE TABLE names (name citext PRIMARY KEY)")
    postgresql.sql("INSERT INTO names VALUES ('Ann')")
    postgresql.house.reset()
    assert (
        postgresql.sql("INSERT INTO names VALUES ('Bob'); SELECT count(*) FROM names WHERE name = 'BOB'")
        == "1\n"
    )


@pytest.mark.long
def test_a_table_in_the_place_of_the_audit_table(postgresql: PostgreSql) -> None:
    postgresql.sql("CREATE TABLE audit_log (id integer)")
    postgresql.house.start_worker({"db": postgresql.listener}, wait=False)
    said = eventually(
        lambda: "audit_table_name" in str(postgresql.house.result()["state"]) and postgresql.house.result()
    )
    assert said["success"] is False
    postgresql.begin("INSERT INTO audit_log VALUES (1)", audit_table_name="changes")
    postgresql.sql("DELETE FROM audit_log")
    assert postgresql.house.changes() == [("DELETE", "audit_log", {"id": 1}, None)]


@pytest.mark.long
def test_the_example(postgresql: PostgreSql) -> None:
    """The listener of the example's own plato-config.yml, with its schema and its data."""
    listener = yaml.safe_load((SIMULATOR / "plato-config.yml").read_text())["datasets"]["base"]["listeners"][
        "db"
    ]
    postgresql.sql(
        "CREATE ROLE taskboard LOGIN PASSWORD 'taskboard'; CREATE DATABASE taskboard OWNER taskboard"
    )
    for name in ("schema.sql", "seed/users.sql", "seed/board.sql"):
        text = (SIMULATOR / "db" / name).read_text()
        postgresql.sql(f"SET ROLE taskboard;\n{text}", "taskboard")
    postgresql.listener = listener
    postgresql.house.start_worker({"db": listener})
    postgresql.sql(
        "UPDATE users SET login_count = login_count + 1 WHERE id = 1;"
        "INSERT INTO sessions SELECT * FROM sessions WHERE false",
        "taskboard",
    )
    (change,) = postgresql.house.state()["mutations"]
    assert (change["table_name"], change["changed_columns"]) == ("users", ["login_count"])
    postgresql.house.reset()
    assert postgresql.house.changes() == []
    assert postgresql.sql("SELECT count(*) FROM tasks", "taskboard") != "0\n"


@pytest.mark.long
def test_types_of_mariadb(mariadb_server: House) -> None:
    engine = MariaDb(mariadb_server)
    engine.begin(
        "CREATE TABLE everything (id bigint PRIMARY KEY, price decimal(9,2), ratio double, flag boolean,"
        " bits bit(4), day date, moment datetime(3), raw varbinary(9), doc json, kind enum('a','b'),"
        " place point, note text CHARACTER SET latin1, longer int AS (flag + 1) VIRTUAL)"
    )
    engine.sql(
        "INSERT INTO everything (id, price, ratio, flag, bits, day, moment, raw, doc, kind, place, note)"
        " VALUES (4611686018427387903, 12.50, 0.5, TRUE, b'101', '2024-02-29', '2024-02-29 01:02:03.456',"
        " x'00FF', '{\"a\": [1]}', 'b', POINT(1, 2), 'é')"
    )
    (change,) = engine.house.changes()
    assert change[3] == {
        "id": 4611686018427387903,
        "price": 12.5,
        "ratio": 0.5,
        "flag": 1,
        "bits": 5,
        "day": "2024-02-29",
        "moment": "2024-02-29 01:02:03.456",
        "raw": "00FF",
        "doc": '{"a": [1]}',
        "kind": "b",
        "place": "POINT(1 2)",
        "note": "é",
        "longer": 2,
    }


@pytest.mark.long
def test_types_of_sqlite(house: House) -> None:
    engine = Sqlite(house)
    columns = ", ".join(f"c{number}" for number in range(150))
    engine.begin(
        f"CREATE TABLE wide (id integer PRIMARY KEY, {columns}); "
        "CREATE TABLE nokey (a, PRIMARY KEY (a)) WITHOUT ROWID"
    )
    engine.sql(
        "INSERT INTO wide (id, c1, c2, c3) VALUES (1, x'00ff', 1.5, 'a'); INSERT INTO nokey VALUES ('k')"
    )
    first, second = engine.house.changes()
    assert {name: first[3][name] for name in ("id", "c1", "c2", "c3", "c149")} == {
        "id": 1, "c1": "00FF", "c2": 1.5, "c3": "a", "c149": None,
    }  # fmt: skip
    assert second == ("INSERT", "nokey", None, {"a": "k"})


# ---------------------------------------------------------------------------
# the worker's life
# ---------------------------------------------------------------------------


@pytest.mark.long
def test_it_comes_up_when_its_time_has_come(new_plato: Callable[..., LocalPlato]) -> None:
    house = House(new_plato(worker_seconds=100))
    sqlite = Sqlite(house)
    assert "not started" in house.result()["state"]["error"]
    house.client.call("GET", f"{VM}/{house.job_id}/healthy-worker", status=503)
    house.cleanup(status=404)
    house.start_worker({"db": sqlite.listener}, wait=False)
    assert house.result() == {"success": False, "state": {"error": "The worker is starting"}}
    beat = f"{SESSIONS}/{house.session_id}/heartbeat"
    assert "vm_heartbeat_message" in str(house.client.call("POST", beat)["results"][house.job_id]["errors"])
    answer = house.client.call("POST", f"{SESSIONS}/{house.session_id}/reset", {})
    assert answer["success"] is False
    assert house.cleanup()["success"] is False
    house.plato.advance(101)
    house.wait_until_up()
    assert house.client.call("GET", f"{VM}/{house.job_id}/healthy-worker")["status"] == "healthy"
    assert house.client.call("POST", beat)["results"][house.job_id]["errors"] == []
    assert house.changes() == []


@pytest.mark.long
def test_it_waits_for_the_database(house: House) -> None:
    path = f"/home/plato/late-{house.new_name()}.db"
    house.start_worker({"db": {"type": "db", "db_type": "sqlite", "db_database": path}}, wait=False)
    eventually(lambda: path in str(house.result()["state"].get("error")))
    house.shell(f'python3 -c \'import sqlite3; sqlite3.connect("{path}").execute("CREATE TABLE a (b)")\'')
    house.wait_until_up()
    assert house.changes() == []


@pytest.mark.long
@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_server_that_does_not_answer(house: House, kind: str) -> None:
    listener = {"type": "db", "db_type": kind, "db_database": "a", "db_port": 9, "db_password": "canary-word"}
    house.start_worker({"main": listener}, wait=False)
    said = eventually(
        lambda: "main" in str(house.result()["state"]) and str(house.result()["state"]["error"])
    )
    assert said.startswith("Listener 'main' cannot use its database: ")
    assert "canary-word" not in said


@pytest.mark.long
def test_scripted_failures(plato: LocalPlato) -> None:
    house = House(plato)
    sqlite = Sqlite(house)
    plato.fault("worker_failure", reason="out of memory")
    house.start_worker({"db": sqlite.listener}, wait=False)
    eventually(lambda: house.result()["state"] == {"error": "out of memory"})
    plato.fault("worker_never", bad_gateway=True)
    house.start_worker({"db": sqlite.listener}, wait=False)
    assert house.result()["state"] == {"errors": ["502 Bad Gateway: The worker is starting"]}
    house.start_worker({"db": sqlite.listener})
    assert house.changes() == []


def test_listeners_that_are_not_watched(house: House) -> None:
    sqlite = Sqlite(house)
    listeners = {
        "db": sqlite.listener,
        "files": {"type": "file", "target_dir": "/data"},
        "feed": {"type": "xml", "target_dir": "/data"},
        "proxy": {"type": "proxy"},
        "clicks": {"type": "db", "db_type": "clickhouse", "db_database": "x"},
        "cache": {"type": "db", "db_type": "redis", "db_database": "0"},
    }
    house.start_worker(listeners)
    state = house.state()
    assert state["db"] == {"mutations": [], "audit_log_count": 0}
    assert "clickhouse" in state["clicks"]["error"]
    assert "redis" in state["cache"]["error"]
    for name in ("files", "feed", "proxy"):
        assert state[name]["observed"] is False
    house.start_worker({})
    assert house.state() == {"mutations": []}


def test_the_dataset_is_kept_as_it_was_sent(house: House) -> None:
    sqlite = Sqlite(house)
    listener = {**sqlite.listener, "colour": {"deep": [1, None]}}
    house.start_worker({"db": listener}, services={}, mood="good")
    job = next(
        job for session in house.plato.sessions() for job in session["jobs"] if job["job_id"] == house.job_id
    )
    expected = {"compute": {}, "metadata": {}, "listeners": {"db": listener}, "services": {}, "mood": "good"}
    assert job["dataset"] == job["worker"]["dataset"] == expected


def test_what_start_worker_refuses(new_plato: Callable[..., LocalPlato]) -> None:
    plato = new_plato(boot_seconds=100)
    client = Client(plato)
    made = client.make(wait=False)
    path = f"{VM}/{made['envs'][0]['job_id']}/start-worker"
    body: dict[str, Any] = {"dataset": "base", "plato_dataset_config": {"compute": {}, "metadata": {}}}
    client.call("POST", path, body, status=409)
    client.call("POST", f"{VM}/nobody/start-worker", body, status=404)
    wrong = {**body, "plato_dataset_config": {"listeners": {"db": {"type": "db"}}}}
    places = {
        ".".join(map(str, one["loc"])) for one in client.call("POST", path, wrong, status=422)["detail"]
    }
    assert "body.plato_dataset_config.listeners.db.db.db_type" in places
    assert "body.plato_dataset_config.compute" in places
    client.call("POST", f"{SESSIONS}/{made['session_id']}/close")
    client.call("POST", path, body, status=410)
    client.call("GET", f"{SESSIONS}/{made['session_id']}/state", status=410)
    client.call("POST", f"/api/v1/env/{made['session_id']}/cleanup", status=404)


@pytest.mark.long
def test_only_what_came_after_a_cursor(house: House) -> None:
    sqlite = Sqlite(house)
    sqlite.begin("CREATE TABLE a (id integer PRIMARY KEY)")
    sqlite.sql("INSERT INTO a VALUES (1)")
    path = f"/api/v2/jobs/{house.job_id}/state"
    first = house.client.call("GET", path)
    sqlite.sql("INSERT INTO a VALUES (2)")
    later = house.client.call("GET", f"{path}?since={first['mutations_cursor']}")
    assert [one["after"]["id"] for one in later["state"]["mutations"]] == [2]
    assert len(house.client.call("GET", path)["state"]["mutations"]) == 2
    house.client.call("GET", f"{path}?since=x", status=400)


@pytest.mark.long
def test_no_password_in_any_command(house: House, postgresql: PostgreSql, mariadb_server: House) -> None:
    """A process of the VM looks at every command line for as long as the worker works."""
    watch = (
        "import glob, os\n"
        "seen = set()\n"
        "while not os.path.exists('/tmp/enough'):\n"
        "    for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "        try: seen.add(open(path, 'rb').read())\n"
        "        except OSError: pass\n"
        "    open('/tmp/seen.new', 'wb').write(b'\\n'.join(seen)); os.rename('/tmp/seen.new', '/tmp/seen')\n"
    )
    mariadb = MariaDb(mariadb_server)
    house.shell(
        'printf %s "$WATCH" > /tmp/watch.py; setsid python3 /tmp/watch.py >/dev/null 2>&1 &',
        WATCH=watch,
    )
    house.start_worker({"one": postgresql.listener, "two": mariadb.listener})

    def seen() -> str:
        house.reset()
        return house.shell("tr '\\0' ' ' < /tmp/seen | grep -a -v watch.py")

    lines = eventually(
        lambda: (text := seen()) and "--no-psqlrc" in text and "--skip-column-names" in text and text
    )
    house.shell("touch /tmp/enough")
    assert "pass word" not in lines


def artifact_of(house: House, **body: Any) -> str:
    """An artifact of the house's VM, which can be started from."""
    answer = house.client.call("POST", f"{SESSIONS}/{house.session_id}/snapshot", body)
    artifact_id = str(answer["results"][house.job_id]["artifact_id"])
    house.plato.wait_for(
        lambda _: house.client.call("GET", f"/api/v2/artifacts/{artifact_id}")["status"] == "ready"
    )
    return artifact_id


@pytest.mark.long
def test_an_artifact_without_its_dataset_knows_no_listeners(plato: LocalPlato) -> None:
    """Whatever the worker of its VM knew: only what the snapshot stores is there again."""
    house = House(plato)
    sqlite = Sqlite(house)
    sqlite.begin(TASKS)
    dataset = {"compute": {}, "metadata": {}, "listeners": {"db": sqlite.listener}}
    for body in ({}, {"plato_config": yaml.safe_dump({"service": "shop", "datasets": {"base": dataset}})}):
        artifact_id = artifact_of(house, **body)
        session_id, job_id = house.client.start({"type": "artifact", "artifact_id": artifact_id})
        state = house.client.call("GET", f"{SESSIONS}/{session_id}/state")["results"][job_id]
        assert state == {"success": False, "state": {"error": "The worker is not started"}}


@pytest.mark.long
def test_an_artifact_keeps_the_worker(plato: LocalPlato) -> None:
    """Its databases, audit tables included, come with the files; the baseline is what it starts with."""
    house = House(plato)
    sqlite = Sqlite(house)
    sqlite.begin(TASKS)
    sqlite.sql("DELETE FROM tasks WHERE id = 1")
    assert len(house.changes()) == 1
    dataset = {"compute": {}, "metadata": {}, "listeners": {"db": sqlite.listener}}
    artifact_id = artifact_of(house, plato_config=yaml.safe_dump(dataset))
    house.session_id, house.job_id = house.client.start({"type": "artifact", "artifact_id": artifact_id})
    house.wait_until_up()
    assert house.changes() == []
    sqlite.sql("DELETE FROM tasks WHERE id = 2")
    assert house.changes() == [("DELETE", "tasks", task(2, "two"), None)]
    house.reset()
    assert sqlite.sql("SELECT id FROM tasks").split() == ["2"]


@pytest.mark.long
def test_a_worker_ends_with_its_vm(plato: LocalPlato) -> None:
    def one_life() -> None:
        house = House(plato)
        house.start_worker({"db": {"type": "db", "db_type": "sqlite", "db_database": "/nowhere"}}, wait=False)
        eventually(lambda: "/nowhere" in str(house.result()))
        house.client.call("POST", f"{SESSIONS}/{house.session_id}/close")

    def threads() -> int:
        return len(list(Path(f"/proc/{plato.information['pid']}/task").iterdir()))

    before = threads()
    for _ in range(3):
        one_life()
    eventually(lambda: threads() <= before)


# ---------------------------------------------------------------------------
# merging
# ---------------------------------------------------------------------------


@pytest.mark.long
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=30))
def test_merged_changes_are_the_difference(steps: list[tuple[int, int, int]]) -> None:
    """Whatever happens to the rows of a table, merging tells how the end differs from the beginning."""
    begin = {0: {"id": 0, "v": 0}, 1: {"id": 1, "v": 1}}
    table = dict(begin)
    log: list[dict[str, Any]] = []

    def note(before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        log.append(
            {
                "id": len(log),
                "timestamp": "",
                "schema": "s",
                "table_name": "t",
                "action": "",
                "before": before,
                "after": after,
            }
        )

    for number, value, target in steps:
        old = table.pop(number, None)
        if value == 0:
            if old is not None:
                note(old, None)
            continue
        moved = number if target in table or old is None else target
        table[moved] = {"id": moved, "v": value}
        note(old, table[moved])
    merged = merge(log, {"t": ["id"]})
    rows = dict(begin)
    for one in merged:
        if one["before"] is not None:
            assert rows.pop(one["before"]["id"]) == one["before"]
    for one in merged:
        if one["after"] is not None:
            rows[one["after"]["id"]] = one["after"]
    assert rows == table
    assert unignored(merged, ["t"]) == unignored(merged, ["s.t"]) == []
