"""The one clock of the local Plato: real time, multiplied and moved on request."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone


class Clock:
    """Seconds since the server started, `speed` times as fast as real time, plus every `advance`.

    Boots, lifetimes and heartbeats go by it. Network timeouts and timeouts of commands are real seconds.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self.advanced = 0.0
        self.started = time.monotonic()
        self.started_at = datetime.now(timezone.utc)

    def now(self) -> float:
        return (time.monotonic() - self.started) * self.speed + self.advanced

    def advance(self, seconds: float) -> None:
        self.advanced += seconds

    def real_seconds_until(self, moment: float) -> float:
        """How long to wait for a moment of this clock, never negative."""
        return max(0.0, (moment - self.now()) / self.speed)

    def timestamp(self) -> str:
        """The present in ISO 8601, UTC."""
        return (self.started_at + timedelta(seconds=self.now())).isoformat()
