"""How fast an endpoint may be asked: requests and tokens per minute, and pauses it asks for.

Calls are spread evenly over the minute, because endpoints count in different ways (a bucket that
refills, a window that slides, a window that starts anew) and an even stream keeps within all of
them. Limits come from the config or from the answers' headers, whichever is lower; when an answer
says that nothing is left, everybody waits until it says there is something again.
"""

import asyncio
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

SAFETY = 0.97  # of the allowed rate is used: clocks differ, and calls arrive less evenly than they are sent
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def seconds_of(text: str | None) -> float | None:
    """Seconds in a header such as "1s", "6m0s", "120ms" or "2.5"; None when it says something else."""
    text = (text or "").strip().lower()
    try:
        value = float(text)
    except ValueError:
        parts = _PART.findall(text)
        if not parts or "".join(n + u for n, u in parts) != text:
            return None
        value = sum(float(n) * _UNITS[u] for n, u in parts)
    return value if math.isfinite(value) and value >= 0 else None


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds the endpoint asks to wait (retry-after-ms, or retry-after in seconds or as a date)."""
    milliseconds = seconds_of(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = seconds_of(text)
    if seconds is not None or not text:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError):
        return None


class _Bucket:
    """One allowance that refills evenly.

    Whatever is held back may be spent at once, so that any minute sees at most what refills in it
    and that much more; the refill is lowered by the largest call, and the sum stays within the limit.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.configured = per_minute
        self.per_minute = per_minute
        self._largest = 1.0
        self._level = math.inf  # lowered to a second's worth at the first refill
        self._at = time.monotonic()

    def limit(self, told: float) -> None:
        """Take over a limit from a header; the configured one stays when it is lower."""
        self.per_minute = told if self.configured is None else min(told, self.configured)

    def _refill(self) -> float:
        """Add what has accrued, up to a second's worth and at least one call; the rate per second."""
        assert self.per_minute is not None
        rate = max(SAFETY * self.per_minute - self._largest, self.per_minute / 4) / 60
        now = time.monotonic()
        self._level = min(max(rate, self._largest), self._level + rate * (now - self._at))
        self._at = now
        return rate

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is there."""
        if self.per_minute is None:
            return 0.0
        self._largest = max(self._largest, amount)
        rate = self._refill()
        return 0.0 if self._level >= amount else (amount - self._level) / rate + 1e-4

    def take(self, amount: float) -> None:
        """Spend it."""
        if self.per_minute is not None:
            self._level -= amount


class Pace:
    """Lets calls through at the allowed rate, first come, first served."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._requests, self._tokens = _Bucket(requests_per_minute), _Bucket(tokens_per_minute)
        self._resume = 0.0
        self._queue = asyncio.Lock()

    async def take(self, tokens: float) -> None:
        """Return when one more call of about ``tokens`` tokens may be sent."""
        async with self._queue:
            while (wait := self._wait(tokens)) > 0:
                await asyncio.sleep(wait)
            self._requests.take(1.0)
            self._tokens.take(tokens)

    def _wait(self, tokens: float) -> float:
        return max(self._resume - time.monotonic(), self._requests.wait(1.0), self._tokens.wait(tokens))

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long."""
        self._resume = max(self._resume, time.monotonic() + seconds)

    @property
    def per_minute(self) -> tuple[float | None, float | None]:
        """Requests and tokens per minute in force; None where no limit is known."""
        return self._requests.per_minute, self._tokens.per_minute

    def told(self, headers: Mapping[str, str], longest: float) -> None:
        """Take over what an answer's x-ratelimit headers say; pauses are ``longest`` seconds at most."""
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            limit = seconds_of(headers.get(f"x-ratelimit-limit-{what}"))
            if limit:
                bucket.limit(limit)
            if seconds_of(headers.get(f"x-ratelimit-remaining-{what}")) == 0:
                self.pause(min(longest, seconds_of(headers.get(f"x-ratelimit-reset-{what}")) or 0.0))
