"""audit-ui's readers of databases, on real PostgreSQL and MariaDB servers and on files of SQLite."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import eventually, missing, part
from test_simulator import Service, free_port, postgresql_programs, unprivileged_user

import plato_sandbox
from plato_sandbox import (
    AuditTable,
    Database,
    DatabaseError,
    SandboxError,
    SqliteDatabase,
    Table,
    TimedOutError,
    UsageError,
    database_url,
    mysql_name,
    open_database,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWORD = "pass word'\"$é"
ODD_NAMES = ["quote\"s and 'ticks'", "Größe 😀", "back`tick", "per%cent %s", "semi; DROP TABLE x", "Upper"]
MANY = 500


@pytest.fixture(scope="module")
def psycopg2() -> Any:
    return pytest.importorskip("psycopg2", reason="pip install psycopg2-binary")


@pytest.fixture(scope="module")
def pymysql() -> Any:
    return pytest.importorskip("pymysql", reason="pip install pymysql")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that an unprivileged server can use."""
    with tempfile.TemporaryDirectory(prefix="audit-") as name:
        path = Path(name)
        user = unprivileged_user()
        for child in (path / "postgresql", path / "mariadb"):
            child.mkdir()
            if user is not None:
                shutil.chown(child, user)
        path.chmod(0o755)
        yield path


def as_user(command: list[str]) -> None:
    user = unprivileged_user()
    done = subprocess.run(command, capture_output=True, text=True, user=user, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def postgresql(place: Path, psycopg2: Any) -> Iterator[int]:
    """The port of a PostgreSQL server of its own; the user is `reader`, with PASSWORD."""
    programs = postgresql_programs()
    data, word = place / "postgresql" / "data", place / "word"
    word.write_text(PASSWORD)
    word.chmod(0o644)
    options = ["-U", "reader", f"--pwfile={word}", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C.UTF-8"]
    as_user([str(programs / "initdb"), "-D", str(data), "--no-sync", *options])
    for _ in range(5):
        port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "fsync": "off",
            "unix_socket_directories": "",
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        service = Service(
            [str(programs / "postgres"), "-D", str(data), *words],
            {},
            "ready to accept connections",
            unprivileged_user(),
        )
        if service.ready:
            break
    else:
        pytest.fail("".join(service.output))
    yield port
    service.stop(signal.SIGINT)


@pytest.fixture(scope="module")
def mariadb(place: Path, pymysql: Any) -> Iterator[int]:
    """The port of a MariaDB server of its own."""
    server, install = part("mariadbd", "mariadb-server"), part("mariadb-install-db", "mariadb-server")
    home = place / "mariadb"
    as_user(
        [install, "--no-defaults", f"--datadir={home}/data", "--auth-root-authentication-method=normal",
         "--skip-test-db"]
    )  # fmt: skip
    for _ in range(5):
        port = free_port()
        service = Service(
            [server, "--no-defaults", f"--datadir={home}/data", f"--socket={home}/sock", f"--port={port}",
             "--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"],
            {},
            "ready for connections",
            unprivileged_user(),
        )  # fmt: skip
        if service.ready:
            break
    else:
        pytest.fail("".join(service.output))
    yield port
    service.stop()


class Server:
    """A new database on a server: statements in, and audit-ui's reader of it."""

    def __init__(self, kind: str, port: int, name: str) -> None:
        self.kind = kind
        self.fields = {
            "db_type": kind,
            "db_host": "127.0.0.1",
            "db_port": port,
            "db_user": "reader" if kind == "postgresql" else "root",
            "db_password": PASSWORD if kind == "postgresql" else "",
            "db_database": name,
        }
        base = "postgres" if kind == "postgresql" else "mysql"
        self.run(f"CREATE DATABASE {name}", database=base)

    def run(self, *statements: str, database: str | None = None) -> list[Any]:
        """Run statements; the rows of the last one."""
        name = database or self.fields["db_database"]
        if self.kind == "postgresql":
            connection: Any = importlib.import_module("psycopg2").connect(
                host="127.0.0.1", port=self.fields["db_port"], user="reader", password=PASSWORD, dbname=name
            )
            connection.autocommit = True
        else:
            connection = importlib.import_module("pymysql").connect(
                host="127.0.0.1", port=int(str(self.fields["db_port"])), user="root", database=str(name),
                charset="utf8mb4", autocommit=True,
            )  # fmt: skip
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def reader(self, **changes: Any) -> Database:
        return open_database(AuditTable("main", {**self.fields, **changes}), None, None)

    def table(self, name: str) -> Table:
        (found,) = [table for table in self.reader().tables() if table.name == name]
        return found


NUMBERS = iter(range(1000))


@pytest.fixture
def postgres(postgresql: int) -> Server:
    return Server("postgresql", postgresql, f"data{next(NUMBERS)}")


@pytest.fixture
def maria(mariadb: int) -> Server:
    return Server("mysql", mariadb, f"data{next(NUMBERS)}")


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue({"postgresql": "postgres", "mariadb": "maria"}[request.param])
    return found


# Both servers


def quoted(server: Server, name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if server.kind == "postgresql" else mysql_name(name)


def test_odd_names(server: Server) -> None:
    """Names that would end a quotation are tables and columns like all others."""
    # Names in MariaDB have no characters beyond the first 65,536.
    names = [name.replace("😀", "☺") for name in ODD_NAMES] if server.kind == "mysql" else ODD_NAMES
    for name in names:
        table = quoted(server, name)
        server.run(f"CREATE TABLE {table} (id int PRIMARY KEY, {table} varchar(20))")
        server.run(f"INSERT INTO {table} VALUES (1, 'it''s'), (2, NULL)")
    found = {table.name: table for table in server.reader().tables()}
    assert set(found) == set(names)
    for name in names:
        assert found[name].column_names() == ["id", name]
        assert [key for _, _, key in found[name].columns] == [True, False]
        assert server.reader().count(found[name]) == 2
        assert [list(row) for row in server.reader().examples(found[name])] == [["1", "it's"], ["2", None]]


def test_long_values_are_cut_off_where_they_are(server: Server) -> None:
    server.run("CREATE TABLE notes (a text)", "INSERT INTO notes VALUES (repeat('x', 60000))")
    ((value,),) = server.reader().examples(server.table("notes"))
    assert value == "x" * plato_sandbox.AUDIT_EXAMPLE_CHARACTERS


def test_nothing_can_be_written(server: Server) -> None:
    server.run("CREATE TABLE notes (a int)", "INSERT INTO notes VALUES (1)")
    reader: Any = server.reader()
    for statement in ("DELETE FROM notes", "CREATE TABLE more (a int)", "DROP TABLE notes"):
        with pytest.raises(DatabaseError, match=r"(?i)read.only"):
            reader._query(statement, 5.0)
    assert server.run("SELECT count(*) FROM notes") == [(1,)]


def test_a_statement_that_takes_too_long_is_stopped(server: Server) -> None:
    reader: Any = server.reader()
    slow = {
        "postgresql": "SELECT pg_sleep(100)",
        "mysql": "SELECT count(*) FROM information_schema.collations a, information_schema.collations b,"
        " information_schema.collations c, information_schema.collations d",
    }[server.kind]
    with pytest.raises(TimedOutError, match="longer than 1 s"):
        reader._query(slow, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"db_password": "wrong-secret"}, r"(password|denied)"),
        ({"db_database": "nowhere"}, "nowhere"),
        ({"db_port": 1}, "does not answer on port 1 of 127.0.0.1"),
        ({"db_host": "no.such.host.invalid"}, r"(does not answer|could not be read)"),
    ],
)
def test_a_database_that_cannot_be_used(server: Server, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DatabaseError, match=words) as raised:
        server.reader(**changes).tables()
    assert "'main'" in raised.value.message
    assert "\n" not in raised.value.message
    assert "wrong-secret" not in raised.value.message


def test_a_database_that_goes_away_and_comes_back(server: Server) -> None:
    """Every look is a connection of its own: nothing of a broken one is left over."""
    server.run("CREATE TABLE notes (a int)")
    with socket.create_server(("127.0.0.1", 0)) as nothing:
        port = nothing.getsockname()[1]
        reader = server.reader()
        reader.port, there = port, reader.port
        nothing.close()
        with pytest.raises(DatabaseError):
            reader.tables()
        reader.port = there
        assert [table.name for table in reader.tables()] == ["notes"]


def test_a_table_that_is_gone(server: Server) -> None:
    """Its name reads like another trouble, and is not taken for one."""
    server.run("CREATE TABLE lost_connection_password (a int)")
    table = server.table("lost_connection_password")
    server.run("DROP TABLE lost_connection_password")
    for look in (server.reader().count, server.reader().examples):
        with pytest.raises(DatabaseError, match=r"lost_connection_password.*(not|n't) exist") as raised:
            look(table)
        assert raised.value.hint is None


@pytest.mark.long
def test_many_tables_are_listed_in_few_statements(server: Server) -> None:
    """The sizes are what the server believes: in PostgreSQL, here, what its catalogue is told to believe."""
    script = [f"CREATE TABLE t{number} (id int PRIMARY KEY, a int, b int, c int)" for number in range(MANY)]
    server.run(*script)
    if server.kind == "postgresql":
        server.run("UPDATE pg_class SET reltuples = 100000, relpages = 1 WHERE relname ~ '^t[0-9]+$'")
    reader: Any = server.reader()
    statements: list[Any] = []
    ask = reader._query

    def counted(*words: Any) -> Any:
        statements.append(words)
        return ask(*words)

    reader._query = counted
    tables = reader.tables()
    assert len(statements) == 2
    assert len(tables) == MANY
    assert {len(table.columns) for table in tables} == {4}
    expected = 100000 if server.kind == "postgresql" else 0
    assert {table.rows for table in tables} == {expected}
    assert server.reader().count(tables[0]) == 0


# PostgreSQL


def test_schemas_views_partitions_and_types(postgres: Server) -> None:
    postgres.run(
        'CREATE SCHEMA "Sales 2024"',
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        'CREATE TABLE "Sales 2024".orders (id bigserial PRIMARY KEY, data jsonb, tags text[], raw bytea,'
        " how mood,"
        " price numeric(8, 2), at timestamptz, gone int)",
        'ALTER TABLE "Sales 2024".orders DROP COLUMN gone',
        'INSERT INTO "Sales 2024".orders (data, tags, raw, how, price, at) VALUES (\'{"a": [1, null]}\','
        " '{x,\"y z\"}', '\\x00ff10', 'good', 12.50, '2024-01-02 03:04:05+00')",
        'CREATE VIEW totals AS SELECT count(*) AS number FROM "Sales 2024".orders',
        "CREATE MATERIALIZED VIEW kept AS SELECT 1 AS one",
        "CREATE TABLE events (id int, at date) PARTITION BY RANGE (at)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')",
        "INSERT INTO events SELECT i, '2024-05-05' FROM generate_series(1, 30) i",
        "INSERT INTO events SELECT i, '2025-05-05' FROM generate_series(1, 12) i",
        "CREATE TABLE nothing ()",
        "ANALYZE",
    )
    found = {(table.schema, table.name): table for table in postgres.reader().tables()}
    assert {name: table.kind for (_, name), table in found.items()} == {
        "orders": "table",
        "totals": "view",
        "kept": "materialized view",
        "events": "partitioned table",
        "events_1": "partition of events",
        "events_2": "partition of events",
        "nothing": "table",
    }
    rows = {name: table.rows for (_, name), table in found.items()}
    assert (rows["events"], rows["events_1"], rows["events_2"]) == (42, 30, 12)
    assert (rows["orders"], rows["totals"], rows["nothing"]) == (1, None, 0)
    orders = found["Sales 2024", "orders"]
    assert [kind for _, kind, _ in orders.columns] == [
        *("bigint", "jsonb", "text[]", "bytea", "mood", "numeric(8,2)", "timestamp with time zone")
    ]
    reader = postgres.reader()
    row = reader.examples(orders)[0]
    assert list(row[:6]) == [
        "1",
        '{"a": [1, null]}',
        '{x,"y z"}',
        "3 bytes",
        "good",
        "12.50",
    ]
    assert reader.count(found["public", "events"]) == 42
    assert [list(row) for row in reader.examples(found["public", "totals"])] == [["1"]]
    assert reader.examples(found["public", "nothing"]) == []


def test_a_table_that_nobody_analyzed_has_no_false_number(postgres: Server) -> None:
    postgres.run(
        "CREATE TABLE empty (a int)", "CREATE TABLE filled (a int)", "INSERT INTO filled VALUES (1), (2)"
    )

    def estimated() -> bool:
        """The statistics come when the server gets round to it; until then nothing false is told."""
        rows = {table.name: table.rows for table in postgres.reader().tables()}
        assert rows["empty"] == 0
        assert rows["filled"] in (None, 2)
        return rows["filled"] == 2

    eventually(estimated)


def test_what_a_user_may_not_read(postgres: Server) -> None:
    name = f"weak{next(NUMBERS)}"
    postgres.run(
        f"CREATE USER {name} PASSWORD 'weak'",
        "CREATE TABLE secrets (a int)",
        "CREATE TABLE open (a int)",
        f"GRANT SELECT ON open TO {name}",
    )
    reader = postgres.reader(db_user=name, db_password="weak")
    tables = {table.name: table for table in reader.tables()}
    assert reader.count(tables["open"]) == 0
    with pytest.raises(DatabaseError, match="permission denied"):
        reader.examples(tables["secrets"])


def test_tables_that_appear_and_vanish_while_they_are_listed(postgres: Server) -> None:
    """The two statements of a listing may see different tables."""
    reader: Any = postgres.reader()
    postgres.run("CREATE TABLE stays (a int)", "CREATE TABLE goes (a int)")
    ask = reader._query

    def meddling(statement: Any, seconds: float) -> Any:
        if "pg_attribute" in str(statement):
            postgres.run("DROP TABLE goes", "CREATE TABLE comes (a int)")
        return ask(statement, seconds)

    reader._query = meddling
    assert {table.name: table.column_names() for table in reader.tables()} == {"stays": ["a"], "goes": []}


# MariaDB


def test_types_and_views_of_mariadb(maria: Server) -> None:
    maria.run(
        "CREATE TABLE orders (id int AUTO_INCREMENT PRIMARY KEY, data json, raw varbinary(9), picture"
        " longblob, how enum('good', 'bad'), flags bit(3), at datetime(6), spot point, price decimal(8, 2))",
        "INSERT INTO orders (data, raw, picture, how, flags, at, spot, price) "
        "VALUES ('{\"a\": 1}', x'00ff', repeat('x', 100000), 'bad', b'101', '2024-01-02', point(1, 2), 1.5)",
        "CREATE VIEW totals AS SELECT count(*) AS number FROM orders",
    )
    found = {table.name: table for table in maria.reader().tables()}
    assert {name: table.kind for name, table in found.items()} == {"orders": "table", "totals": "view"}
    assert found["totals"].rows is None
    (row,) = maria.reader().examples(found["orders"])
    assert row[1:6] == ('{"a": 1}', "2 bytes", "100000 bytes", "bad", "1 bytes")
    assert [list(row) for row in maria.reader().examples(found["totals"])] == [["1"]]


# SQLite


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file?.db"
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE "it\'s ""odd""" (id INTEGER PRIMARY KEY, name TEXT, raw BLOB)')
        connection.execute(
            'INSERT INTO "it\'s ""odd""" VALUES (1, ?, ?), (7, NULL, NULL)', ("é" * 500, b"\0\1")
        )
        connection.execute("CREATE TABLE keyed (name TEXT PRIMARY KEY) WITHOUT ROWID")
        connection.execute("CREATE VIEW names AS SELECT name FROM keyed")
    connection.close()
    return path


def sqlite(path: Path | str) -> SqliteDatabase:
    return SqliteDatabase(AuditTable("file", {"db_type": "sqlite", "db_database": str(path)}), None)


def test_a_file_of_sqlite(file: Path) -> None:
    reader = sqlite(file)
    tables = {table.name: table for table in reader.tables()}
    assert {name: (table.kind, table.rows) for name, table in tables.items()} == {
        'it\'s "odd"': ("table", 7),
        "keyed": ("table", None),
        "names": ("view", None),
    }
    odd = tables['it\'s "odd"']
    assert odd.columns == [("id", "INTEGER", True), ("name", "TEXT", False), ("raw", "BLOB", False)]
    assert reader.count(odd) == 2
    assert reader.examples(odd) == [["1", "é" * 120, "2 bytes"], ["7", None, None]]


def test_a_file_is_not_written_and_may_be_in_use(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO keyed VALUES ('x')")
        connection.commit()
        reader = sqlite(file)
        assert reader.count({table.name: table for table in reader.tables()}["keyed"]) == 1
    connection.close()
    file.chmod(0o444)
    before = file.read_bytes()
    assert len(sqlite(file).tables()) == 3
    assert file.read_bytes() == before


def test_files_that_are_no_databases(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="there is no file"):
        sqlite(tmp_path / "missing.db").tables()
    text = tmp_path / "text.db"
    text.write_text("hello, this is text and long enough to be taken for a header of a database" * 20)
    with pytest.raises(DatabaseError, match="not a database"):
        sqlite(text).tables()


# Addresses, kinds and packages


def test_addresses_of_databases() -> None:
    fields, options, is_open = database_url(
        "postgresql+psycopg2://u%40x:p%2Fw@h:99/d%20b?sslmode=require", {}
    )
    assert (fields["db_user"], fields["db_password"], fields["db_host"]) == ("u@x", "p/w", "h")
    assert (fields["db_port"], fields["db_database"], options, is_open) == (
        99,
        "d b",
        {"sslmode": "require"},
        True,
    )
    environment = {"PGPASSWORD": "one", "MYSQL_PWD": "two"}
    fields, _, is_open = database_url("postgres://u@[::1]/d", environment)
    assert (fields["db_host"], fields["db_password"], is_open) == ("::1", "one", False)
    fields, _, _ = database_url("mariadb://h/d", environment)
    assert (fields["db_type"], fields["db_password"]) == ("mysql", "two")
    assert database_url("sqlite:////var/a b.db", {})[0]["db_database"] == "/var/a b.db"
    assert database_url("sqlite:///here.db", {})[0]["db_database"] == os.path.abspath("here.db")


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "mongodb://h/d", "postgresql://h", "postgresql://h:port/d", "mysql://h/d?sslmode=require",
     "postgresql://h/d?options=-c", "sqlite://"],
)  # fmt: skip
def test_addresses_that_make_no_sense(url: str) -> None:
    with pytest.raises(UsageError, match="database-url") as raised:
        database_url(url, {})
    assert url not in raised.value.message or not url


@pytest.mark.parametrize("kind", ["mongodb", "redis", "clickhouse"])
def test_kinds_that_cannot_be_read_are_named(kind: str) -> None:
    reader = open_database(AuditTable("cache", {"db_type": kind, "db_database": "x"}), None, None)
    with pytest.raises(DatabaseError, match=kind):
        reader.tables()


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_missing_driver_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module, package = plato_sandbox.AUDIT_PACKAGES[kind]
    monkeypatch.setitem(sys.modules, module, None)
    reader = open_database(AuditTable("main", {"db_type": kind, "db_database": "x"}), None, None)
    with pytest.raises(SandboxError, match=package) as raised:
        reader.tables()
    assert sys.executable in raised.value.message
    assert "\n" not in raised.value.message


def test_all_drivers_are_here() -> None:
    for module, package in plato_sandbox.AUDIT_PACKAGES.values():
        try:
            __import__(module)
        except ImportError:
            missing(f"{package} is not installed; it is in the test group of pyproject.toml")
