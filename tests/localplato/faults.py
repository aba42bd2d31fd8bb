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
)


@dataclass
class Fault:
    """One rule. It meets the `nth` matching request and the `times - 1` after it; `times` -1 is for ever."""

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
    seen: int = 0
    fired: int = 0

    def matches(self, method: str, path: str) -> bool:
        return fnmatch.fnmatchcase(method, self.method.upper()) and fnmatch.fnmatchcase(path, self.path)

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
    return Fault(**values)


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
