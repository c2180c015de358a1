"""Rates and quotas of one tenant. Pure: instants are passed in, in seconds.

    requests per minute, tokens per minute   buckets that fill evenly and hold one minute's worth
    tokens per day                           a sum that ends at midnight UTC
    in flight                                a count

Tokens are prompt and output. A request is charged what it is expected to use when it comes, and settled with what it
used when it ends; both may leave a bucket in debt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from omni_common.errors import ResourceExhausted

_DAY_S = 86_400.0
_BUSY_RETRY_S = 1.0


class Limited(Protocol):
    """Limits as configured; None: none."""

    @property
    def requests_per_minute(self) -> float | None: ...

    @property
    def tokens_per_minute(self) -> float | None: ...

    @property
    def tokens_per_day(self) -> float | None: ...

    @property
    def max_inflight(self) -> int | None: ...


class Bucket:
    """Holds up to `per_minute`, at least 1, and fills evenly."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._most = self._level = max(1.0, per_minute)
        self._at_s = now

    def level(self, now: float) -> float:
        self._level = min(self._most, self._level + (now - self._at_s) * self.per_minute / 60)
        self._at_s = now
        return self._level

    def seconds_until(self, amount: float, now: float) -> float:
        """Until the bucket holds `amount`."""
        return max(0.0, amount - self.level(now)) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """May leave a debt; less than 0 gives back."""
        self._level = min(self._most, self.level(now) - amount)


@dataclass(slots=True)
class Day:
    """Tokens used since the last midnight, UTC."""

    number: int = 0
    used: float = 0.0

    def used_at(self, wall_s: float) -> float:
        """A clock that is set back over midnight does not begin the day twice."""
        number = _day_of(wall_s)
        if number > self.number or number < self.number - 1:
            self.number, self.used = number, 0.0
        return self.used

    def correct(self, tokens: float, charged_s: float) -> None:
        """By what was charged too little at that time. Of an earlier day there is nothing to correct."""
        if _day_of(charged_s) == self.number:
            self.used = max(0.0, self.used + tokens)


class Quota:
    """What one tenant has used, against its limits. `now` is monotonic, `wall` is Unix time."""

    def __init__(self, limits: Limited, now: float) -> None:
        self._limits = limits
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self._day = Day()
        self.inflight = 0

    def reconfigure(self, limits: Limited, now: float) -> None:
        """Go on with other limits. What was used in the last minute stays used."""
        self._limits = limits
        self._requests = _refitted(self._requests, limits.requests_per_minute, now)
        self._tokens = _refitted(self._tokens, limits.tokens_per_minute, now)

    def enter(self, now: float) -> None:
        """Count a request in; its end is `leave`.

        Raises:
            ResourceExhausted: too many in this minute, or at once.
        """
        most = self._limits.max_inflight
        if most is not None and self.inflight >= most:
            message = f"{self.inflight} requests of this tenant are in flight, at most {most} are allowed"
            raise ResourceExhausted(message, reason="tenant_in_flight", retry_after_s=_BUSY_RETRY_S)
        if self._requests is not None:
            if wait_s := self._requests.seconds_until(1, now):
                message = f"more than {self._requests.per_minute:g} requests per minute"
                raise ResourceExhausted(message, reason="requests_per_minute", retry_after_s=wait_s)
            self._requests.take(1, now)
        self.inflight += 1

    def leave(self) -> None:
        self.inflight -= 1

    def charge(self, tokens: float, now: float, wall_s: float) -> None:
        """Take the tokens a request is expected to use.

        Raises:
            ResourceExhausted: they are too many now; without `retry_after_s` if they always will be.
        """
        daily = self._limits.tokens_per_day
        if daily is not None and self._day.used_at(wall_s) + tokens > daily:
            message = f"more than {daily:g} tokens per day"
            midnight_s = None if tokens > daily else _DAY_S - wall_s % _DAY_S
            raise ResourceExhausted(message, reason="tokens_per_day", retry_after_s=midnight_s)
        if self._tokens is not None:
            if tokens > self._tokens.per_minute:
                message = f"{tokens:g} tokens are more than the {self._tokens.per_minute:g} of a minute"
                raise ResourceExhausted(message, reason="tokens_per_minute")
            if wait_s := self._tokens.seconds_until(tokens, now):
                message = f"more than {self._tokens.per_minute:g} tokens per minute"
                raise ResourceExhausted(message, reason="tokens_per_minute", retry_after_s=wait_s)
            self._tokens.take(tokens, now)
        self._day.used = self._day.used_at(wall_s) + tokens

    def settle(self, tokens: float, now: float, charged_s: float) -> None:
        """Correct a charge of that Unix time by so many tokens."""
        if self._tokens is not None:
            self._tokens.take(tokens, now)
        self._day.correct(tokens, charged_s)

    def headers(self, now: float) -> Mapping[str, str]:
        """Like OpenAI's: the limits of a minute, what is left, and when all of it will be."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:g}"
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = span_of(bucket.seconds_until(bucket.per_minute, now))
        return found


def _day_of(wall_s: float) -> int:
    return int(wall_s // _DAY_S)


def span_of(seconds: float) -> str:
    """As in `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{round(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:g}m{rest:g}s" if minutes else f"{rest:g}s"


def _bucket(per_minute: float | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


def _refitted(bucket: Bucket | None, per_minute: float | None, now: float) -> Bucket | None:
    if bucket is None or per_minute is None:
        return _bucket(per_minute, now)
    used = bucket.per_minute - bucket.level(now)
    fresh = Bucket(per_minute, now)
    fresh.take(used, now)
    return fresh
