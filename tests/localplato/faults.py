"""Scripted faults of the HTTP interface: which requests they meet, and what then happens to the answer."""

from __future__ import annotations

import fnmatch
import re
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

EFFECTS = (
    "status",  # answer with `status`, `headers` and `body` without acting
    "reset_before_body",  # reset the connection when the head has come, before reading the body
    "reset_before_acting",  # reset it after the body, without acting
    "cut_upload",  # reset it as soon as `bytes` of the body have come; git: a shorter body is not met
    "lost_answer",  # act, then reset it before answering
    "hang",  # never answer; act first when `act` is set
    "latency",  # act and answer after `seconds`
    "truncate",  # act; announce the whole answer, send `bytes` of it, then close
    "content_type",  # act; answer with `headers`' type, and `body` when given
    "html",  # answer `status` with an HTML page, as a proxy does
    "drip",  # act; send the answer byte by byte over `seconds`
    "redirect",  # answer `status` (307) with Location `url`
    "edit",  # act; answer after `edits`: [place, value] sets what is at a place, [place] takes it away
    "copy",  # act and answer, and keep the answer in the record of the request (`answer`)
)


@dataclass
class Fault:
    """One rule. It meets the `nth` matching request and the `times - 1` after it; `times` -1 is for ever.

    A `path` may be a pattern of a shell, or an endpoint as the contract has it: `/api/v2/jobs/{job_id}/info`.
    """

    effect: str
    method: str = "*"
    path: str = "*"
    nth: int = 1
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    seconds: float = 1.0
    bytes: int = 1
    act: bool = False
    url: str = ""
    edits: list[Any] = field(default_factory=list)
    seen: int = 0
    fired: int = 0

    def matches(self, method: str, path: str) -> bool:
        if not fnmatch.fnmatchcase(method, self.method.upper()):
            return False
        if "{" in self.path:
            return re.fullmatch(re.sub(r"{\w+}", "[^/]+", self.path), path) is not None
        return fnmatch.fnmatchcase(path, self.path)

    @property
    def due(self) -> bool:
        """Whether the request seen last is one that the fault meets."""
        return self.seen >= self.nth and (self.times < 0 or self.seen < self.nth + self.times)


def fault_from(values: dict[str, Any]) -> Fault:
    """A rule as the admin interface takes it. Raises ValueError for an unknown effect or field."""
    known = set(Fault.__dataclass_fields__) - {"seen", "fired"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"a fault has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if values.get("effect") not in EFFECTS:
        raise ValueError(f"a fault's effect is one of {', '.join(EFFECTS)}")
    if re.search(r"[^A-Za-z*]", str(values.get("method", "*"))):
        raise ValueError("a fault's method is a word or *")
    for edit in values.get("edits", []):
        if not isinstance(edit, list) or len(edit) not in (1, 2) or not isinstance(edit[0], list):
            raise ValueError("an edit is [place, value] or [place], and a place is a list of keys")
    return Fault(**values)


def edited(value: Any, edits: list[Any]) -> Any:
    """A JSON value after edits. A key may be "*": every one there is. LookupError: a place is not there."""
    root = {"": value}
    for place, *new in edits:
        parents: list[Any] = [root]
        for key, inner in zip(["", *place], [*place, None]):
            if inner is None:
                for parent in parents:
                    change(parent, key, new)
            else:
                parents = [parent[one] for parent in parents for one in keys_of(parent, key)]
    return root.get("")


def keys_of(parent: Any, key: Any) -> list[Any]:
    """The keys that a part of a place means. LookupError when there is none."""
    every: list[Any] = list(parent) if isinstance(parent, dict) else []
    if isinstance(parent, list):
        every = list(range(len(parent)))
    found = every if key == "*" else [one for one in every if one == key]
    if not found:
        raise LookupError(f"there is no {key!r}")
    return found


def change(parent: Any, key: Any, new: list[Any]) -> None:
    """Set what is at a key, or take it away if nothing is given."""
    if new and isinstance(parent, dict) and key != "*":
        parent[key] = new[0]
        return
    for one in reversed(keys_of(parent, key)):
        if new:
            parent[one] = new[0]
        else:
            del parent[one]


class Faults:
    """The rules in force."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self.lock:
            self.rules.append(fault)

    def clear(self) -> None:
        with self.lock:
            self.rules.clear()

    def meet(self, method: str, path: str) -> Fault | None:
        """The first due rule for a request. Every matching rule counts it."""
        with self.lock:
            matching = [rule for rule in self.rules if rule.matches(method, path)]
            for rule in matching:
                rule.seen += 1
            for rule in matching:
                if rule.due:
                    rule.fired += 1
                    return rule
        return None

    def listing(self) -> list[dict[str, Any]]:
        with self.lock:
            return [asdict(rule) for rule in self.rules]
