"""audit-ui's readers of databases, on real PostgreSQL and MariaDB servers and on files of SQLite."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
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
    Database,
    DatabaseError,
    UsageError,
    database_url,
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
    own_place = f"--tmpdir={home}"  # a server that starts removes the temporary tables of others
    as_user(
        [install, "--no-defaults", f"--datadir={home}/data", "--auth-root-authentication-method=normal",
         "--skip-test-db", own_place]
    )  # fmt: skip
    for _ in range(5):
        port = free_port()
        service = Service(
            [server, "--no-defaults", f"--datadir={home}/data", f"--socket={home}/sock", f"--port={port}",
             "--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin",
             own_place],
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
        return Database("main", {**self.fields, **changes})


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
    mark = '"' if server.kind == "postgresql" else "`"
    return mark + name.replace(mark, 2 * mark) + mark


def names(table: Any) -> list[str]:
    return [row[2] for row in table]


@pytest.mark.sampled
def test_odd_names(server: Server) -> None:
    """Names that would end a quotation are tables and columns like all others."""
    # Names in MariaDB have no characters beyond the first 65,536.
    odd = [name.replace("😀", "☺") for name in ODD_NAMES] if server.kind == "mysql" else ODD_NAMES
    for name in odd:
        table = quoted(server, name)
        server.run(f"CREATE TABLE {table} (id int PRIMARY KEY, {table} varchar(20))")
        server.run(f"INSERT INTO {table} VALUES (1, 'it''s'), (2, NULL)")
    found = server.reader().tables()
    assert set(found) == set(odd)
    for name in odd:
        assert names(found[name]) == ["id", name]
        assert server.reader().examples(found[name]) == {"id": ("1", "2"), name: ("it's", None)}


@pytest.mark.sampled
def test_long_values_are_cut_off_where_they_are(server: Server) -> None:
    server.run("CREATE TABLE notes (a text)", "INSERT INTO notes VALUES (repeat('x', 60000))")
    reader = server.reader()
    assert reader.examples(reader.tables()["notes"]) == {"a": ("x" * 200,)}


def test_nothing_can_be_written(server: Server) -> None:
    server.run("CREATE TABLE notes (a int)", "INSERT INTO notes VALUES (1)")
    for statement in ("DELETE FROM notes", "CREATE TABLE more (a int)", "DROP TABLE notes"):
        with pytest.raises(DatabaseError, match=r"(?i)read.only"):
            server.reader().query(statement)
    assert server.run("SELECT count(*) FROM notes") == [(1,)]


def test_a_statement_that_takes_too_long_is_stopped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plato_sandbox, "AUDIT_QUERY_SECONDS", 1)
    slow = {"postgresql": "SELECT pg_sleep(100)", "mysql": "SELECT sleep(100)"}[server.kind]
    with pytest.raises(DatabaseError, match=r"(time|Lost)"):
        server.reader().query(slow)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"db_password": "wrong-secret"}, r"(password|denied)"),
        ({"db_database": "nowhere"}, "nowhere"),
        ({"db_port": 1}, "127.0.0.1.*refused"),
        ({"db_host": "no.such.host.invalid"}, r"no\.such\.host\.invalid"),
    ],
)
def test_a_database_that_cannot_be_used(server: Server, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DatabaseError, match=words) as raised:
        server.reader(**changes).tables()
    assert "the config" in str(raised.value.hint)
    assert "\n" not in raised.value.message
    assert "wrong-secret" not in raised.value.message


def test_every_look_is_a_connection_of_its_own(server: Server) -> None:
    """Nothing of a broken one is left over, and none stays open."""
    server.run("CREATE TABLE notes (a int)")
    reader = server.reader()
    there = reader.login.pop("port")
    reader.login["port"] = 1
    with pytest.raises(DatabaseError):
        reader.tables()
    reader.login["port"] = there
    assert set(reader.tables()) == {"notes"}
    count = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
    }[server.kind]
    eventually(lambda: server.run(count) == [(1,)])


def test_a_table_that_is_gone(server: Server) -> None:
    server.run("CREATE TABLE lost_connection_password (a int)")
    table = server.reader().tables()["lost_connection_password"]
    server.run("DROP TABLE lost_connection_password")
    with pytest.raises(DatabaseError, match=r"lost_connection_password.*(not|n't) exist") as raised:
        server.reader().examples(table)
    assert raised.value.hint is None


def test_the_workers_own_table_and_views_are_left_out(server: Server) -> None:
    server.run("CREATE TABLE audit_log (a int)", "CREATE TABLE mine (a int)")
    server.run("CREATE VIEW one AS SELECT 1 AS a")
    assert set(server.reader().tables()) == {"mine"}
    assert set(server.reader(audit_table_name="mine").tables()) == {"audit_log"}


@pytest.mark.long
def test_many_tables_are_listed_in_one_statement(server: Server) -> None:
    script = [f"CREATE TABLE t{number} (id int PRIMARY KEY, a int, b int, c int)" for number in range(MANY)]
    server.run(*script)
    reader: Any = server.reader()
    statements: list[Any] = []
    ask = reader.query

    def counted(statement: str) -> Any:
        statements.append(statement)
        return ask(statement)

    reader.query = counted
    tables = reader.tables()
    assert len(statements) == 1
    assert len(tables) == MANY
    assert {len(table) for table in tables.values()} == {4}


# PostgreSQL


def test_schemas_partitions_and_types(postgres: Server) -> None:
    postgres.run(
        'CREATE SCHEMA "Sales 2024"',
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        'CREATE TABLE "Sales 2024".orders (id bigserial PRIMARY KEY, data jsonb, tags text[], raw bytea,'
        " how mood,"
        " price numeric(8, 2), at timestamptz, gone int)",
        'ALTER TABLE "Sales 2024".orders DROP COLUMN gone',
        'INSERT INTO "Sales 2024".orders (data, tags, raw, how, price, at) VALUES (\'{"a": [1, null]}\','
        " '{x,\"y z\"}', '\\x00ff10', 'good', 12.50, '2024-01-02 03:04:05+00')",
        "CREATE TABLE orders (a int, b int, c int, PRIMARY KEY (c, a))",
        "CREATE MATERIALIZED VIEW kept AS SELECT 1 AS one",
        "CREATE TABLE events (id int, at date) PARTITION BY RANGE (at)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
        "CREATE TABLE nothing ()",
    )
    found = postgres.reader().tables()
    assert set(found) == {"orders", "Sales 2024.orders", "events", "events_1"}
    orders = found["Sales 2024.orders"]
    assert [row[3] for row in orders] == [
        *("bigint", "jsonb", "ARRAY", "bytea", "USER-DEFINED", "numeric", "timestamp with time zone")
    ]
    row = [values[0] for values in postgres.reader().examples(orders).values()]
    assert row[:6] == ["1", '{"a": [1, null]}', '["x", "y z"]', "(binary)", "good", "12.50"]
    assert set(postgres.reader(db_schema="Sales 2024").tables()) == {
        *("orders", "public.orders", "public.events", "public.events_1")
    }


def test_what_a_user_may_not_read(postgres: Server) -> None:
    name = f"weak{next(NUMBERS)}"
    postgres.run(
        f"CREATE USER {name} PASSWORD 'weak'",
        "CREATE TABLE secrets (a int)",
        "CREATE TABLE open (a int)",
        f"GRANT SELECT ON open TO {name}",
    )
    reader = postgres.reader(db_user=name, db_password="weak")
    assert set(reader.tables()) == {"open"}
    with pytest.raises(DatabaseError, match="permission denied"):
        reader.examples(postgres.reader().tables()["secrets"])


# MariaDB


def test_types_of_mariadb(maria: Server) -> None:
    maria.run(
        "CREATE TABLE orders (id int AUTO_INCREMENT PRIMARY KEY, data json, raw varbinary(9), picture"
        " longblob, how enum('good', 'bad'), flags bit(3), at datetime(6), spot point, price decimal(8, 2))",
        "INSERT INTO orders (data, raw, picture, how, flags, at, spot, price) "
        "VALUES ('{\"a\": 1}', x'00ff', repeat('x', 100000), 'bad', b'101', '2024-01-02', point(1, 2), 1.5)",
    )
    reader = maria.reader()
    row = [values[0] for values in reader.examples(reader.tables()["orders"]).values()]
    assert row[:5] == ["1", '{"a": 1}', "(binary)", "(binary)", "bad"]
    assert row[7:9] == ["(binary)", "1.50"]


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


def sqlite(path: Path | str) -> Database:
    return Database("file", {"db_type": "sqlite", "db_database": str(path)})


def test_a_file_of_sqlite(file: Path) -> None:
    reader = sqlite(file)
    tables = reader.tables()
    assert list(tables) == ['it\'s "odd"', "keyed"]
    odd = tables['it\'s "odd"']
    assert [row[2:4] for row in odd] == [["id", "INTEGER"], ["name", "TEXT"], ["raw", "BLOB"]]
    assert reader.examples(odd) == {"id": ("1", "7"), "name": ("é" * 200, None), "raw": ("(binary)", None)}


def test_a_file_is_not_written_and_may_be_in_use(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO keyed VALUES ('x')")
        connection.commit()
        reader = sqlite(file)
        assert reader.examples(reader.tables()["keyed"]) == {"name": ("x",)}
    connection.close()
    file.chmod(0o444)
    before = file.read_bytes()
    assert len(sqlite(file).tables()) == 2
    with pytest.raises(DatabaseError, match="readonly"):
        sqlite(file).query("DELETE FROM keyed")
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
    fields, options = database_url("postgresql+psycopg2://u%40x:p%2Fw@h:99/d%20b?sslmode=require", {})
    assert (fields["db_user"], fields["db_password"], fields["db_host"]) == ("u@x", "p/w", "h")
    assert (fields["db_port"], fields["db_database"], options) == ("99", "d b", {"sslmode": "require"})
    environment = {"PGPASSWORD": "one", "MYSQL_PWD": "two"}
    fields, _ = database_url("postgres://u@[::1]/d", environment)
    assert (fields["db_host"], fields["db_password"]) == ("::1", "one")
    fields, _ = database_url("mariadb://h/d", environment)
    assert (fields["db_type"], fields["db_password"]) == ("mysql", "two")
    assert database_url("sqlite:////var/a b.db", {})[0]["db_database"] == "/var/a b.db"
    assert database_url("sqlite:///here.db", {})[0]["db_database"] == os.path.abspath("here.db")


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "mongodb://h/d", "postgresql://h", "postgresql://h:port/d", "sqlite://"],
)
def test_addresses_that_make_no_sense(url: str) -> None:
    with pytest.raises(UsageError, match="database-url") as raised:
        database_url(url, {})
    assert url not in raised.value.message or not url


@pytest.mark.parametrize("kind", ["mongodb", "redis", "clickhouse"])
def test_kinds_that_cannot_be_read_are_named(kind: str) -> None:
    reader = Database("cache", {"db_type": kind, "db_database": "x"})
    with pytest.raises(DatabaseError, match=kind):
        reader.tables()


def test_all_drivers_are_here() -> None:
    for module in plato_sandbox.AUDIT_DRIVERS.values():
        try:
            __import__(module)
        except ImportError:
            missing(f"{module} is not installed; it is in the test group of pyproject.toml")
