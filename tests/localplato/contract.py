"""The API's contract: reads `contract.txt`, and checks requests and answers against its models.

A wrong request gets the list of problems that FastAPI (pydantic 2) would answer with a 422. Numbers and
booleans are converted in the few cases in which it converts them. Unknown fields are let through and listed.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Union

Location = tuple[Union[str, int], ...]
MISSING = object()
TRUE_WORDS = {"1", "t", "true", "y", "yes", "on"}
FALSE_WORDS = {"0", "f", "false", "n", "no", "off"}


@dataclass(frozen=True)
class Type:
    """One type of the contract; `members` are a union's, list's or map's parts, `values` an enum's."""

    kind: str
    members: tuple[Type, ...] = ()
    values: tuple[str, ...] = ()
    name: str = ""
    limits: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Field:
    name: str
    type: Type
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Endpoint:
    """One line of the contract; `body` and `returns` are None where there is none."""

    method: str
    path: str
    body: Type | None
    query: tuple[Field, ...]
    returns: Type | None
    pattern: re.Pattern[str]


@dataclass
class Report:
    """What a check found: problems as pydantic words them, and the places of unknown or converted values."""

    problems: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def problem(self, kind: str, where: Location, message: str, value: Any, **context: Any) -> None:
        entry: dict[str, Any] = {"type": kind, "loc": list(where), "msg": message, "input": value}
        if context:
            entry["ctx"] = context
        self.problems.append(entry)


# ---------------------------------------------------------------------------
# reading the contract
# ---------------------------------------------------------------------------

TOKEN = re.compile(r"\s*(->|'[^']*'|[A-Za-z_](?:\w|-(?!>))*|[\[\]|?(),]|\{[^}]*\})")


class TypeReader:
    """Reads one type expression; `position` is then where the rest of the line begins."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def peek(self) -> str:
        match = TOKEN.match(self.text, self.position)
        return match.group(1) if match else ""

    def take(self, expected: str = "") -> str:
        match = TOKEN.match(self.text, self.position)
        if match is None or (expected and match.group(1) != expected):
            raise ValueError(
                f"contract.txt: expected {expected or 'a type'} at {self.text[self.position :]!r}"
            )
        self.position = match.end()
        return match.group(1)

    def union(self) -> Type:
        members = [self.member()]
        while self.peek() == "|":
            self.take()
            members.append(self.member())
        limits = tuple(limit for member in members for limit in member.limits)
        flat = [
            part for member in members for part in (member.members if member.kind == "union" else (member,))
        ]
        if len(flat) == 1:
            return flat[0]
        return Type("union", tuple(Type(m.kind, m.members, m.values, m.name, limits) for m in flat))

    def member(self) -> Type:
        result = self.atom()
        if self.peek() == "?":
            self.take()
            result = Type("union", (result, Type("null")))
        if self.peek().startswith("{"):
            limits = read_limits(self.take()[1:-1])
            result = Type(result.kind, result.members, result.values, result.name, limits)
        return result

    def atom(self) -> Type:
        word = self.take()
        if word.startswith("'"):
            return Type("literal", values=(word[1:-1],))
        if word == "enum":
            self.take("(")
            values = [self.take()]
            while self.peek() != ")":
                self.take(",")
                values.append(self.take())
            self.take(")")
            return Type("enum", values=tuple(values))
        if word == "list":
            self.take("[")
            inner = self.union()
            self.take("]")
            return Type("list", (inner,))
        if word in ("map", "dict"):
            self.take("[")
            key = self.union()
            self.take("," if word == "dict" else "->")
            inner = self.union()
            self.take("]")
            return Type("map", (key, inner))
        if word in ("str", "int", "bool", "float", "datetime", "null", "Any"):
            return Type(word.lower())
        return Type("model", name=word)


def read_limits(text: str) -> tuple[tuple[str, str], ...]:
    """`ge=0, le=8` as pairs."""
    return tuple(
        (name.strip(), value) for name, _, value in (part.partition("=") for part in text.split(", "))
    )


def read_field(line: str) -> Field:
    """`name: type (required)` or `name: type = default`."""
    name, _, rest = line.partition(": ")
    reader = TypeReader(rest)
    kind = reader.union()
    tail = rest[reader.position :].strip()
    if tail == "(required)":
        return Field(name, kind, True)
    return Field(name, kind, False, ast.literal_eval(tail[1:].strip()) if tail.startswith("=") else None)


def read_endpoint(block: str) -> Endpoint:
    """One paragraph of the endpoints."""
    head, *lines = block.splitlines()
    method, path = head.split()
    body: Type | None = None
    returns: Type | None = None
    query: list[Field] = []
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "body:":
            body = TypeReader(rest).union()
        elif word == "returns:":
            returns = TypeReader(rest).union()
        else:
            query.append(read_field(rest))
    pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + "$")
    return Endpoint(method, path, body, tuple(query), returns, pattern)


def read_contract(text: str) -> tuple[list[Endpoint], dict[str, list[Field]]]:
    """The endpoints, and each model's fields by its name."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    endpoints_text, _, models_text = text.partition("\nMODELS\n")
    endpoints = [read_endpoint(block) for block in endpoints_text.split("\n\n") if "/" in block]
    models: dict[str, list[Field]] = {}
    for block in models_text.strip().split("\n\n"):
        name, *lines = block.splitlines()
        models[name.strip()] = [read_field(line.strip()) for line in lines]
    return endpoints, models


# ---------------------------------------------------------------------------
# checking values
# ---------------------------------------------------------------------------


class Contract:
    """The endpoints and the models, and the checks of values against them."""

    def __init__(self, text: str) -> None:
        self.endpoints, self.models = read_contract(text)

    def check(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        """The value with defaults filled in and conversions made; what is wrong goes into the report."""
        checker: Callable[[Type, Any, Location, Report], Any] = getattr(self, "check_" + kind.kind)
        checked = checker(kind, value, where, report)
        for name, limit in kind.limits:
            self.check_limit(name, limit, checked, where, report)
        return checked

    def check_any(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        return value

    def check_null(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if value is not None:
            report.problem("none_required", where, "Input should be None", value)
        return None

    def check_str(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if not isinstance(value, str):
            report.problem("string_type", where, "Input should be a valid string", value)
        return value

    def check_bool(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if isinstance(value, bool):
            return value
        word = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).lower()
        if isinstance(value, (str, int, float)) and word in TRUE_WORDS | FALSE_WORDS:
            report.unknown.append(f"{place(where)} ({type(value).__name__} where a boolean belongs)")
            return word in TRUE_WORDS
        if isinstance(value, (str, int, float)):
            message = "Input should be a valid boolean, unable to interpret input"
            report.problem("bool_parsing", where, message, value)
        else:
            report.problem("bool_type", where, "Input should be a valid boolean", value)
        return value

    def check_int(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and not value.is_integer():
            message = "Input should be a valid integer, got a number with a fractional part"
            report.problem("int_from_float", where, message, value)
        elif isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+(\.0+)?\s*", value):
            message = "Input should be a valid integer, unable to parse string as an integer"
            report.problem("int_parsing", where, message, value)
        elif isinstance(value, (str, bool, float)):
            report.unknown.append(f"{place(where)} ({type(value).__name__} where an integer belongs)")
            return int(float(value))
        else:
            report.problem("int_type", where, "Input should be a valid integer", value)
        return value

    def check_float(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        try:
            return float(value)
        except (TypeError, ValueError):
            report.problem("float_type", where, "Input should be a valid number", value)
            return value

    def check_datetime(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        try:
            datetime.fromisoformat(re.sub(r"Z$", "+00:00", value))
        except (TypeError, ValueError):
            report.problem("datetime_parsing", where, "Input should be a valid datetime", value)
        return value

    def check_literal(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if value not in kind.values:
            expected = f"'{kind.values[0]}'"
            report.problem("literal_error", where, f"Input should be {expected}", value, expected=expected)
        return value

    def check_enum(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if value not in kind.values:
            quoted = [f"'{name}'" for name in kind.values]
            expected = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]
            report.problem("enum", where, f"Input should be {expected}", value, expected=expected)
        return value

    def check_list(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if not isinstance(value, list):
            report.problem("list_type", where, "Input should be a valid list", value)
            return value
        return [
            self.check(kind.members[0], item, (*where, index), report) for index, item in enumerate(value)
        ]

    def check_map(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        if not isinstance(value, dict):
            report.problem("dict_type", where, "Input should be a valid dictionary", value)
            return value
        return {key: self.check(kind.members[1], item, (*where, key), report) for key, item in value.items()}

    def check_model(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        fields = self.models[kind.name]
        if [known.name for known in fields] == ["root"]:
            return self.check(fields[0].type, value, where, report)
        if not isinstance(value, dict):
            message = "Input should be a valid dictionary or object to extract fields from"
            report.problem("model_attributes_type", where, message, value)
            return value
        return self.check_fields(fields, value, where, report)

    def check_fields(
        self, fields: list[Field], value: dict[str, Any], where: Location, report: Report
    ) -> Any:
        """An object against the fields of a model: defaults filled in, unknown fields kept and listed."""
        checked = dict(value)
        for known in fields:
            if known.name in value:
                checked[known.name] = self.check(known.type, value[known.name], (*where, known.name), report)
            elif known.required:
                report.problem("missing", (*where, known.name), "Field required", value)
            else:
                checked[known.name] = known.default
        names = {known.name for known in fields}
        report.unknown.extend(place((*where, name)) for name in value if name not in names)
        return checked

    def check_union(self, kind: Type, value: Any, where: Location, report: Report) -> Any:
        members = [member for member in kind.members if member.kind != "null"]
        if value is None and len(members) < len(kind.members):
            return None
        if len(members) == 1:
            return self.check(members[0], value, where, report)
        tags = {tag: member for member in members for tag in self.tags_of(member)}
        if len(tags) >= len(members):
            return self.check_tagged(tags, value, where, report)
        return self.check_untagged(members, value, where, report)

    def check_untagged(self, members: list[Type], value: Any, where: Location, report: Report) -> Any:
        """The first member that takes the value as it is, else one that converts it, else every problem."""
        trials = []
        for member in members:
            trial = Report()
            checked = self.check(member, value, (*where, member.name or member.kind), trial)
            trials.append((trial, checked))
        for trial, checked in trials:
            if not trial.problems and (checked is value or isinstance(value, (dict, list))):
                report.unknown.extend(trial.unknown)
                return checked
        for trial, checked in trials:
            if not trial.problems:
                return checked
        for trial, _ in trials:
            report.problems.extend(trial.problems)
        return value

    def check_tagged(self, tags: dict[str, Type], value: Any, where: Location, report: Report) -> Any:
        """A union of models told apart by their field `type`."""
        if not isinstance(value, dict):
            message = "Input should be a valid dictionary or object to extract fields from"
            report.problem("model_attributes_type", where, message, value)
            return value
        if "type" not in value:
            report.problem(
                "union_tag_not_found", where, "Unable to extract tag using discriminator 'type'", value
            )
            return value
        tag = value["type"]
        if not isinstance(tag, str) or tag not in tags:
            expected = ", ".join(f"'{name}'" for name in tags)
            message = (
                f"Input tag '{tag}' found using 'type' does not match any of the expected tags: {expected}"
            )
            report.problem("union_tag_invalid", where, message, value, tag=str(tag), expected_tags=expected)
            return value
        return self.check(tags[tag], value, (*where, tag), report)

    def tags_of(self, kind: Type) -> tuple[str, ...]:
        """The `type` of a model that has a literal one."""
        if kind.kind != "model":
            return ()
        literal = [known.type.values for known in self.models[kind.name] if known.name == "type"]
        return literal[0] if literal else ()

    def check_limit(self, name: str, limit: str, value: Any, where: Location, report: Report) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if name == "ge" and value < int(limit):
                message = f"Input should be greater than or equal to {limit}"
                report.problem("greater_than_equal", where, message, value, ge=int(limit))
            if name == "le" and value > int(limit):
                message = f"Input should be less than or equal to {limit}"
                report.problem("less_than_equal", where, message, value, le=int(limit))
        if isinstance(value, str):
            if name == "min_length" and len(value) < int(limit):
                message = f"String should have at least {limit} character{'s' if limit != '1' else ''}"
                report.problem("string_too_short", where, message, value, min_length=int(limit))
            if name == "pattern" and not re.search(limit, value):
                message = f"String should match pattern '{limit}'"
                report.problem("string_pattern_mismatch", where, message, value, pattern=limit)

    def check_query(self, fields: tuple[Field, ...], given: dict[str, str], report: Report) -> dict[str, Any]:
        """Query parameters, which are all text, as values of their types."""
        text_report = Report()
        checked = self.check_fields(list(fields), dict(given), ("query",), text_report)
        names = {known.name for known in fields}
        report.problems.extend(text_report.problems)
        report.unknown.extend(place(("query", name)) for name in given if name not in names)
        return dict(checked)


def place(where: Location) -> str:
    """A location as one word: `body.envs.0.type`."""
    return ".".join(str(part) for part in where)


def load() -> Contract:
    """The contract that lies beside this file."""
    return Contract(Path(__file__).with_name("contract.txt").read_text(encoding="utf-8"))
