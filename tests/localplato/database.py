"""The databases that a dataset's `db` listeners name: audit triggers, what they recorded, and a baseline.

The databases' own clients run inside the VM, which sees host and port as the listener gives them. Passwords
go through the environment. What triggers cannot see is not recorded: TRUNCATE and cascading foreign keys in
MariaDB and MySQL, the rows that REPLACE takes away in SQLite. Changes of a table's columns and new tables
are picked up when the audit table is read next.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import Machine, MachineError
from .mutations import Keys, Mutation, mutation

CLIENT_SECONDS = 120.0
CONNECT_SECONDS = 5
POSTGRESQL_PORT, MYSQL_PORT = 5432, 3306
DEFAULT_AUDIT_TABLE = "audit_log"
NOT_FOUND = 127  # the exit code of a shell
CLIENTS = "; a VM has this host's programs: apt-get install postgresql-client mariadb-client"


class DatabaseError(Exception):
    """A database does not do what is asked; the message is its own."""


@dataclass
class Records:
    """What an audit table holds: mutations in order, and the primary keys of the tables."""

    mutations: list[Mutation]
    keys: Keys


class Database:
    """One listener's database. `place` is a directory of the server for the baseline."""

    def __init__(self, machine: Machine, listener: dict[str, Any], place: Path) -> None:
        self.machine = machine
        self.listener = listener
        self.place = place
        self.host: str = listener.get("db_host") or "127.0.0.1"
        self.port = int(listener.get("db_port") or 0)
        self.user: str = listener.get("db_user") or ""
        self.password: str = listener.get("db_password") or ""
        self.name: str = listener.get("db_database") or ""
        self.schema: str = listener.get("db_schema") or listener.get("schema_name") or "public"
        self.audit_table: str = listener.get("audit_table_name") or DEFAULT_AUDIT_TABLE
        # Two listeners of one database have triggers of their own.
        self.prefix = "plato_" + hashlib.sha256(self.audit_table.encode()).hexdigest()[:8]

    @property
    def baseline(self) -> Path:
        return self.place / "baseline.sql"

    def prepare(self) -> None:
        """Take the baseline, and begin to record. Raises DatabaseError."""
        raise NotImplementedError

    def read(self) -> Records:
        """Record new tables from now on, too; what was recorded. Raises DatabaseError."""
        raise NotImplementedError

    def clear(self) -> None:
        """Empty the audit table. Raises DatabaseError."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the baseline. Raises DatabaseError."""
        raise NotImplementedError

    def run(self, command: list[str], script: str | bytes, environment: dict[str, str]) -> bytes:
        """The output of a client in the VM that reads a script. Raises DatabaseError with its complaint."""
        text = script.encode() if isinstance(script, str) else script
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            stdin.write(text)
            stdin.seek(0)
            streams = (stdin.fileno(), stdout.fileno(), stderr.fileno())
            try:
                running = self.machine.spawn(command, *streams, environment=environment)
                code = running.exited.result(CLIENT_SECONDS)
            except MachineError as error:
                raise DatabaseError(str(error)) from error
            except concurrent.futures.TimeoutError:
                self.machine.kill_command(running)
                raise DatabaseError(f"{command[0]} did not end within {CLIENT_SECONDS:g} s") from None
            if code != 0:
                stderr.seek(0)
                words = complaint(stderr.read()) or f"{command[0]} ended with status {code}"
                raise DatabaseError(words + (CLIENTS if code == NOT_FOUND else ""))
            stdout.seek(0)
            return stdout.read()

    def records(self, output: bytes) -> Records:
        """Lines of JSON, a column of a primary key or an entry of the audit table, as records."""
        lines = [json.loads(line) for line in output.decode("utf-8").split("\n") if line]
        keys: Keys = {}
        for line in lines:
            if "column" in line:
                keys.setdefault(line["table"], []).append(line["column"])
        return Records([mutation(line) for line in lines if "column" not in line], keys)


def complaint(output: bytes) -> str:
    """The line of a client's messages that says what is wrong."""
    lines = output.decode("utf-8", "replace").strip().splitlines()
    marked = [line for line in lines if re.search(r"ERROR|FATAL|error:", line)]
    return (marked or lines or [""])[-1]


def open_database(machine: Machine, listener: dict[str, Any], place: Path) -> Database | None:
    """The database of a `db` listener; None for a kind that the local Plato cannot watch."""
    kinds = {"postgresql": PostgreSql, "mysql": MySql, "sqlite": Sqlite}
    kind = kinds.get(listener["db_type"])
    return None if kind is None else kind(machine, listener, place)


def literal(text: str) -> str:
    """A string of standard SQL."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str, mark: str = '"') -> str:
    """An identifier."""
    return mark + name.replace(mark, mark + mark) + mark


# ---------------------------------------------------------------------------
# PostgreSQL
# ---------------------------------------------------------------------------

# The names come by settings and by the triggers' arguments, so that no name is ever part of a program text.
# A partition has its root's name, and its rows are recorded by the root's trigger, which it inherits.
POSTGRESQL_INSTALL = """
DO $plato$
DECLARE
    home text := current_setting('plato.schema');
    audit text := current_setting('plato.audit_table');
    prefix text := current_setting('plato.prefix');
    one record;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('plato audit'));
    IF EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = home AND c.relname = audit)
        AND NOT EXISTS (SELECT FROM information_schema.columns
            WHERE table_schema = home AND table_name = audit AND column_name = 'old_data')
    THEN
        RAISE EXCEPTION 'the table % is not the worker''s: set another audit_table_name', audit;
    END IF;
    EXECUTE format('CREATE TABLE IF NOT EXISTS %I.%I (id bigserial PRIMARY KEY,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(), table_name text NOT NULL,
        action text NOT NULL, old_data jsonb, new_data jsonb)', home, audit);
    IF to_regprocedure(format('%I.plato_record()', home)) IS NULL THEN
        EXECUTE format('CREATE FUNCTION %I.plato_record() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS ', home) || quote_literal('
BEGIN
    IF TG_OP = ''TRUNCATE'' THEN
        EXECUTE format(''INSERT INTO %I.%I (table_name, action, old_data)
            SELECT %L, ''''TRUNCATE'''', to_jsonb(t) FROM ONLY %I.%I t'',
            TG_ARGV[0], TG_ARGV[1], TG_ARGV[2], TG_TABLE_SCHEMA, TG_TABLE_NAME);
        RETURN NULL;
    END IF;
    EXECUTE format(''INSERT INTO %I.%I (table_name, action, old_data, new_data) VALUES ($1, $2, $3, $4)'',
        TG_ARGV[0], TG_ARGV[1])
    USING TG_ARGV[2], TG_OP, CASE WHEN TG_OP <> ''INSERT'' THEN to_jsonb(OLD) END,
        CASE WHEN TG_OP <> ''DELETE'' THEN to_jsonb(NEW) END;
    RETURN NULL;
END');
    END IF;
    FOR one IN
        SELECT c.relname AS name, c.relkind AS kind, c.relispartition AS part,
            coalesce((SELECT r.relname FROM pg_class r WHERE r.oid = pg_partition_root(c.oid)), c.relname)
                AS root,
            EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgname = prefix || '_rows') AS has_rows,
            EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgname = prefix || '_all') AS has_all
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = home AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND c.relname <> audit
    LOOP
        IF NOT one.has_rows AND NOT one.part THEN
            EXECUTE format('CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %I.%I
                FOR EACH ROW EXECUTE FUNCTION %I.plato_record(%L, %L, %L)',
                prefix || '_rows', home, one.name, home, home, audit, one.root);
        END IF;
        IF NOT one.has_all AND one.kind = 'r' THEN
            EXECUTE format('CREATE TRIGGER %I BEFORE TRUNCATE ON %I.%I
                FOR EACH STATEMENT EXECUTE FUNCTION %I.plato_record(%L, %L, %L)',
                prefix || '_all', home, one.name, home, home, audit, one.root);
        END IF;
    END LOOP;
END $plato$;
"""
# Drops everything in the schema but what belongs to an extension.
POSTGRESQL_EMPTY = """
DO $plato$
DECLARE
    home oid := (SELECT oid FROM pg_namespace WHERE nspname = current_setting('plato.schema'));
    one record;
BEGIN
    LOOP
        SELECT kind, name INTO one FROM (
            SELECT 1 AS place, CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW'
                WHEN 'S' THEN 'SEQUENCE' WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END AS kind,
                format('%I.%I', current_setting('plato.schema'), relname) AS name,
                oid, 'pg_class'::regclass AS class
            FROM pg_class WHERE relnamespace = home AND relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
            UNION ALL
            SELECT 2, CASE prokind WHEN 'a' THEN 'AGGREGATE' WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END,
                oid::regprocedure::text, oid, 'pg_proc'::regclass FROM pg_proc WHERE pronamespace = home
            UNION ALL
            SELECT 3, 'TYPE', oid::regtype::text, oid, 'pg_type'::regclass
            FROM pg_type t WHERE typnamespace = home AND (typtype IN ('e', 'd', 'r')
                OR (SELECT relkind = 'c' FROM pg_class c WHERE c.oid = t.typrelid))
        ) found
        WHERE NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = found.oid AND d.classid = found.class
            AND d.refobjid <> d.objid
            AND (d.deptype IN ('e', 'i') OR (d.deptype = 'a' AND found.kind = 'SEQUENCE')))
        ORDER BY place LIMIT 1;
        EXIT WHEN NOT FOUND;
        EXECUTE format('DROP %s %s CASCADE', one.kind, one.name);
    END LOOP;
END $plato$;
"""
POSTGRESQL_READ = """
SELECT json_build_object('table', r.relname, 'column', a.attname)
FROM pg_index i JOIN pg_class r ON r.oid = i.indrelid
JOIN pg_namespace n ON n.oid = r.relnamespace
JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum = ANY (i.indkey)
WHERE i.indisprimary AND n.nspname = current_setting('plato.schema') ORDER BY r.relname, a.attnum;
SELECT json_build_object('id', id, 'timestamp', created_at, 'schema', current_setting('plato.schema'),
    'table_name', table_name, 'action', action, 'before', old_data, 'after', new_data)
FROM %s ORDER BY id;
"""
# The schema's own entry is left out: it stays, with its owner and rights.
POSTGRESQL_DUMP = """
place=$(mktemp -d) || exit
trap 'rm -rf "$place"' EXIT
pg_dump --format=custom --schema="$1" --exclude-table="$1.$2" --file="$place/dump" || exit
pg_restore --list "$place/dump" |
    grep -vE '^[0-9]+; [0-9]+ [0-9]+ (SCHEMA -|(COMMENT|ACL) - SCHEMA )' > "$place/list"
pg_restore --use-list="$place/list" --file=- "$place/dump"
"""


class PostgreSql(Database):
    """By psql and pg_dump. The baseline is all that the schema holds; the restore is a transaction."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port or POSTGRESQL_PORT),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": self.name,
            "PGCONNECT_TIMEOUT": str(CONNECT_SECONDS),
            "PGCLIENTENCODING": "UTF8",
            "PGOPTIONS": "-c lock_timeout=20s -c client_min_messages=warning",
        }

    @property
    def audit(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.audit_table)}"

    @property
    def install(self) -> str:
        return self.settings + POSTGRESQL_INSTALL

    @property
    def settings(self) -> str:
        return (
            f"SET plato.schema = {literal(self.schema)};\n"
            f"SET plato.audit_table = {literal(self.audit_table)};\n"
            f"SET plato.prefix = {literal(self.prefix)};\n"
        )

    @property
    def empty_audit(self) -> str:
        return f"TRUNCATE {self.audit} RESTART IDENTITY;\n"

    def psql(self, *scripts: str) -> bytes:
        """Run scripts as one transaction."""
        command = ["psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--single-transaction"]
        return self.run([*command, "--set=ON_ERROR_STOP=1", "--file=-"], "\n".join(scripts), self.environment)

    def prepare(self) -> None:
        names = (quoted(self.schema), quoted(self.audit_table))
        dump = self.run(["sh", "-c", POSTGRESQL_DUMP, "sh", *names], "", self.environment)
        self.baseline.write_bytes(dump)
        self.psql(self.install, self.empty_audit)

    def read(self) -> Records:
        return self.records(self.psql(self.install, POSTGRESQL_READ % self.audit))

    def clear(self) -> None:
        self.psql(self.empty_audit)

    def restore(self) -> None:
        self.psql(
            self.settings,
            "SET LOCAL search_path = '';",
            POSTGRESQL_EMPTY,
            self.baseline.read_text(),
            self.install,
        )


# ---------------------------------------------------------------------------
# MariaDB and MySQL
# ---------------------------------------------------------------------------

MYSQL_CLIENT = """
first=$1 second=$2
shift 2
program=$(command -v "$first" || command -v "$second") ||
    { echo "the VM has neither $first nor $second" >&2; exit 127; }
exec "$program" "$@"
"""
MYSQL_NUMBERS = ("tinyint", "smallint", "mediumint", "int", "bigint", "decimal", "float", "double", "year")
MYSQL_BYTES = ("binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob")
MYSQL_SHAPES = ("geometry", "point", "linestring", "polygon", "geometrycollection")
MYSQL_LOOK = """
SELECT JSON_OBJECT('table', c.table_name, 'column', c.column_name, 'type', c.data_type,
    'primary', c.column_key = 'PRI')
FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
WHERE c.table_schema = DATABASE() AND t.table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')
ORDER BY c.table_name, c.ordinal_position;
SELECT JSON_OBJECT('trigger', trigger_name) FROM information_schema.triggers
WHERE trigger_schema = DATABASE();
SELECT JSON_OBJECT('drop', table_name, 'view', table_type LIKE '%VIEW') FROM information_schema.tables
WHERE table_schema = DATABASE();
"""
MYSQL_AUDIT = """
CREATE TABLE IF NOT EXISTS %s (id bigint unsigned NOT NULL AUTO_INCREMENT PRIMARY KEY,
    created_at timestamp(6) NOT NULL DEFAULT current_timestamp(6), table_name varchar(64) NOT NULL,
    action varchar(8) NOT NULL, old_data longtext, new_data longtext) CHARACTER SET utf8mb4;
"""
MYSQL_READ = """
SELECT JSON_OBJECT('id', id, 'timestamp', DATE_FORMAT(created_at, '%%Y-%%m-%%dT%%H:%%i:%%s.%%f+00:00'),
    'schema', DATABASE(), 'table_name', table_name, 'action', action, 'before', old_data, 'after', new_data)
FROM %s ORDER BY id;
"""


class MySql(Database):
    """By mariadb and mariadb-dump, or mysql and mysqldump. The baseline is tables and views.

    A trigger names the columns of its table: a column that is dropped makes changes of that table fail until
    the audit table is read again.
    """

    def client(self, first: str, second: str, *options: str, script: str = "") -> bytes:
        words = [
            "--no-defaults",
            f"--host={self.host}",
            f"--port={self.port or MYSQL_PORT}",
            f"--user={self.user}",
            "--protocol=TCP",
            "--default-character-set=utf8mb4",
            *options,
        ]
        environment = {"MYSQL_PWD": self.password}
        return self.run(["sh", "-c", MYSQL_CLIENT, "sh", first, second, *words], script, environment)

    def sql(self, *scripts: str) -> bytes:
        options = ("--batch", "--raw", "--skip-column-names", f"--connect-timeout={CONNECT_SECONDS}")
        settings = "SET SESSION sql_mode = '', time_zone = '+00:00', lock_wait_timeout = 20;"
        script = "\n".join([settings, *scripts, ""])
        return self.client("mariadb", "mysql", *options, f"--database={self.name}", script=script)

    @property
    def audit(self) -> str:
        return quoted(self.audit_table, "`")

    def look(self) -> list[dict[str, Any]]:
        """Tables with their columns, triggers, and everything that a restore drops."""
        output = self.sql(MYSQL_LOOK).decode("utf-8")
        return [json.loads(line) for line in output.split("\n") if line]

    def install(self) -> Keys:
        """Make the audit table and the triggers that are missing; the primary keys."""
        self.sql(MYSQL_AUDIT % self.audit)
        columns: dict[str, dict[str, str]] = {}
        keys: Keys = {}
        found = self.look()
        for line in found:
            if "column" in line and line["table"] != self.audit_table:
                columns.setdefault(line["table"], {})[line["column"]] = line["type"]
                if line["primary"]:
                    keys.setdefault(line["table"], []).append(line["column"])
        wanted: dict[str, str] = {}
        for table, typed in columns.items():
            wanted.update(self.triggers(table, typed))
        present = {line["trigger"] for line in found if "trigger" in line}
        stale = [name for name in present if name.startswith(self.prefix) and name not in wanted]
        script = [f"DROP TRIGGER IF EXISTS {quoted(name, '`')};" for name in stale]
        script += [text for name, text in wanted.items() if name not in present]
        if script:
            self.sql(*script)
        return keys

    def triggers(self, table: str, columns: dict[str, str]) -> dict[str, str]:
        """The statements that make a table's triggers, by name; the name says for which columns."""
        shape = hashlib.sha256(json.dumps([table, columns]).encode()).hexdigest()[:24]
        old, new = (mysql_row(columns, side) for side in ("OLD", "NEW"))
        made: dict[str, str] = {}
        for action, before, after in (("INSERT", "NULL", new), ("UPDATE", old, new), ("DELETE", old, "NULL")):
            name = f"{self.prefix}_{action[0].lower()}_{shape}"
            made[name] = (
                f"CREATE TRIGGER {quoted(name, '`')} AFTER {action} ON {quoted(table, '`')} FOR EACH ROW "
                f"INSERT INTO {self.audit} (table_name, action, old_data, new_data) "
                f"VALUES ({mysql_literal(table)}, '{action}', {before}, {after});"
            )
        return made

    def prepare(self) -> None:
        options = ("--single-transaction", "--skip-lock-tables", "--no-tablespaces", "--hex-blob")
        ignored = f"--ignore-table={self.name}.{self.audit_table}"
        self.baseline.write_bytes(
            self.client("mariadb-dump", "mysqldump", *options, "--triggers", ignored, self.name)
        )
        self.install()
        self.clear()

    def read(self) -> Records:
        keys = self.install()
        return Records(self.records(self.sql(MYSQL_READ % self.audit)).mutations, keys)

    def clear(self) -> None:
        self.sql(f"TRUNCATE TABLE {self.audit};")

    def restore(self) -> None:
        drops = [
            f"DROP {'VIEW' if line['view'] else 'TABLE'} IF EXISTS {quoted(line['drop'], '`')};"
            for line in self.look()
            if "drop" in line
        ]
        self.sql("SET FOREIGN_KEY_CHECKS = 0;", *drops, self.baseline.read_text())
        self.install()


def mysql_literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def mysql_row(columns: dict[str, str], side: str) -> str:
    """The expression for a row as JSON: bytes in hexadecimal, shapes as text, numbers as numbers."""
    parts: list[str] = []
    for name, kind in columns.items():
        value = f"{side}.{quoted(name, '`')}"
        if kind in MYSQL_BYTES:
            value = f"HEX({value})"
        elif kind == "bit":
            value = f"{value} + 0"
        elif kind.startswith("multi") or kind in MYSQL_SHAPES:
            value = f"ST_AsText({value})"
        elif kind not in MYSQL_NUMBERS:
            value = f"CAST({value} AS CHAR CHARACTER SET utf8mb4)"
        parts += [mysql_literal(name), value]
    return f"JSON_OBJECT({', '.join(parts)})"


# ---------------------------------------------------------------------------
# SQLite
# ---------------------------------------------------------------------------


class Sqlite(Database):
    """By Python in the VM, which runs `sqlite_client.py`. The baseline is a copy of the file, in the VM."""

    def command(self, action: str) -> bytes:
        program = Path(__file__).with_name("sqlite_client.py").read_bytes()
        copy = f"/run/plato/{self.place.name}.sqlite"
        words = (self.name, copy, self.audit_table, self.prefix)
        return self.run(["python3", "-I", "-", action, *words], program, {})

    def prepare(self) -> None:
        self.command("prepare")

    def read(self) -> Records:
        return self.records(self.command("read"))

    def clear(self) -> None:
        self.command("clear")

    def restore(self) -> None:
        self.command("restore")
