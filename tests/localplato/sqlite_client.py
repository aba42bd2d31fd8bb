"""A SQLite database's audit triggers, audit table and baseline: `python3 - ACTION FILE COPY AUDIT PREFIX`.

It runs inside the VM, reads no other file of ours, and prints lines of JSON as `database.py` reads them.
Bytes are recorded in hexadecimal.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import urllib.parse

WAIT_SECONDS = 20.0


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def connect(path: str, mode: str) -> sqlite3.Connection:
    """Open a database file. Without "c" in the mode it must exist."""
    address = "file:" + urllib.parse.quote(os.path.abspath(path)) + f"?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None)


def tables(connection: sqlite3.Connection, audit: str) -> dict[str, list[tuple[str, int]]]:
    """The columns of every table, each with its place in the primary key (0: not in it)."""
    names = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' "
        "AND sql NOT LIKE 'CREATE VIRTUAL%' AND name <> ?",
        (audit,),
    ).fetchall()
    found: dict[str, list[tuple[str, int]]] = {}
    for (name,) in names:
        rows = connection.execute(f"PRAGMA table_xinfo({quoted(name)})").fetchall()
        found[name] = [(row[1], row[5]) for row in rows if row[6] != 1]
    return found


def row_text(columns: list[tuple[str, int]], side: str) -> str:
    """The expression for a row as JSON."""
    parts = []
    for name, _ in columns:
        value = f"{side}.{quoted(name)}"
        plain = f"CASE typeof({value}) WHEN 'blob' THEN hex({value}) ELSE {value} END"
        parts.append(f"{literal(json.dumps(name) + ': ')} || json_quote({plain})")
    return "'{' || " + " || ', ' || ".join(parts) + " || '}'"


def install(connection: sqlite3.Connection, audit: str, prefix: str) -> None:
    """Make the audit table and the triggers that are missing, and drop those of other columns."""
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {quoted(audit)} (id INTEGER PRIMARY KEY AUTOINCREMENT, created_at TEXT "
        "NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')), table_name TEXT NOT NULL, "
        "action TEXT NOT NULL, old_data TEXT, new_data TEXT)"
    )
    wanted: dict[str, str] = {}
    for table, columns in tables(connection, audit).items():
        shape = hashlib.sha256(json.dumps([table, columns]).encode()).hexdigest()[:24]
        old, new = row_text(columns, "OLD"), row_text(columns, "NEW")
        for action, before, after in (("INSERT", "NULL", new), ("UPDATE", old, new), ("DELETE", old, "NULL")):
            name = f"{prefix}_{action[0].lower()}_{shape}"
            wanted[name] = (
                f"CREATE TRIGGER {quoted(name)} AFTER {action} ON {quoted(table)} BEGIN "
                f"INSERT INTO {quoted(audit)} (table_name, action, old_data, new_data) "
                f"VALUES ({literal(table)}, '{action}', {before}, {after}); END"
            )
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    present = {name for (name,) in rows if name.startswith(prefix + "_")}
    for name in present - set(wanted):
        connection.execute(f"DROP TRIGGER {quoted(name)}")
    for name in set(wanted) - present:
        connection.execute(wanted[name])
    connection.execute("COMMIT")


def clear(connection: sqlite3.Connection, audit: str) -> None:
    connection.execute(f"DELETE FROM {quoted(audit)}")


def copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Make one database what the other is, also while others have it open."""
    source.backup(target)


def read(connection: sqlite3.Connection, audit: str) -> None:
    """Print the primary keys and the entries."""
    for table, columns in tables(connection, audit).items():
        for name, place in sorted(columns, key=lambda column: column[1]):
            if place:
                print(json.dumps({"table": table, "column": name}))
    names = ("id", "timestamp", "table_name", "action", "before", "after")
    query = f"SELECT id, created_at, table_name, action, old_data, new_data FROM {quoted(audit)} ORDER BY id"
    for row in connection.execute(query):
        print(json.dumps({**dict(zip(names, row)), "schema": "main"}))


def main() -> None:
    action, path, copy_path, audit, prefix = sys.argv[1:]
    connection = connect(path, "rw")
    if action == "prepare":
        os.makedirs(os.path.dirname(copy_path), mode=0o755, exist_ok=True)
        copy(connection, connect(copy_path, "rwc"))
    if action == "restore":
        copy(connect(copy_path, "ro"), connection)
    if action != "clear":
        install(connection, audit, prefix)
    if action in ("prepare", "restore", "clear"):
        clear(connection, audit)
    if action == "read":
        read(connection, audit)


try:
    main()
except sqlite3.Error as error:
    sys.exit(f"{error}: {sys.argv[2]}")
