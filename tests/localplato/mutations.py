"""What became of rows: entries of an audit table as mutations, merged row by row, without what rules ignore.

A mutation is {id, timestamp, schema, table_name, action, before, after, changed_columns}: `action` is INSERT,
UPDATE, DELETE or TRUNCATE, `before` and `after` are the row as an object or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

Mutation = dict[str, Any]
Keys = dict[str, list[str]]


def mutation(entry: dict[str, Any]) -> Mutation:
    """A mutation from an entry of an audit table, whose rows may be JSON in text."""
    before, after = (
        json.loads(row) if isinstance(row, str) else row for row in (entry["before"], entry["after"])
    )
    return {**entry, "before": before, "after": after, "changed_columns": changed_columns(before, after)}


def changed_columns(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """The columns that an UPDATE changed; none for another action."""
    if before is None or after is None:
        return []
    return [name for name in after if name not in before or before[name] != after[name]]


def row_key(table: str, row: dict[str, Any], keys: Keys) -> str:
    """What tells a row from the others of all tables: its primary key, or all of it where there is none."""
    names = [name for name in keys.get(table, []) if name in row]
    return json.dumps([table, {name: row[name] for name in names or row}], sort_keys=True)


def merge(mutations: Iterable[Mutation], keys: Keys) -> list[Mutation]:
    """One mutation for each row that is not as it was. `keys` are the primary keys by table."""
    chains: list[Mutation] = []
    open_chains: dict[str, list[Mutation]] = {}
    for one in mutations:
        table, before, after = one["table_name"], one["before"], one["after"]
        waiting = open_chains.get(row_key(table, before if before is not None else after, keys), [])
        if waiting:
            chain = waiting.pop()
            chain.update(id=one["id"], timestamp=one["timestamp"], after=after)
        else:
            chain = dict(one)
            chains.append(chain)
        ended = after if after is not None else before
        open_chains.setdefault(row_key(table, ended, keys), []).append(chain)
    return [settled for chain in chains if (settled := settle(chain)) is not None]


def settle(chain: Mutation) -> Mutation | None:
    """What a row's changes come to; None when it is as it was."""
    before, after = chain["before"], chain["after"]
    if before == after:
        return None
    action = "INSERT" if before is None else "DELETE" if after is None else "UPDATE"
    return {**chain, "action": action, "changed_columns": changed_columns(before, after)}


def unignored(mutations: Iterable[Mutation], rules: Sequence[Any]) -> list[Mutation]:
    """Without what `audit_ignore_tables` rules ignore: whole tables, and UPDATEs of some columns only."""
    return [one for one in mutations if not any(ignores(rule, one) for rule in rules)]


def ignores(rule: Any, one: Mutation) -> bool:
    """Whether a rule (a table's name, or {table, columns}) ignores a mutation."""
    table, columns = (rule.get("table"), rule.get("columns")) if isinstance(rule, dict) else (rule, None)
    if table not in (one["table_name"], f"{one['schema']}.{one['table_name']}"):
        return False
    return columns is None or (one["action"] == "UPDATE" and set(one["changed_columns"]) <= set(columns))
