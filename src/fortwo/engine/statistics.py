"""What the engine has done since it started, in plain numbers. The device's thread counts; other threads only read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 96)


class Histogram:
    """Counts values by the first of `bounds` that is not smaller; the last count is of those above all."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def __add__(self, other: Histogram) -> Histogram:
        """Of both together; they have the same bounds."""
        both = Histogram(self.bounds)
        both.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        both.sum = self.sum + other.sum
        return both


@dataclass
class EngineStatistics:
    """Tokens and times are of clients' requests, without a job's own questions. cached_tokens: tokens of prompts that
    did not have to be computed; batch_rows: rows of each decode step; first_token_seconds: from a request to its first
    token, the wait for its turn included; preemptions: requests that had to wait again because the cache was full."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def __add__(self, other: EngineStatistics) -> EngineStatistics:
        """Of both together."""
        names = [field.name for field in fields(self)]
        return EngineStatistics(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class BaseLoad:
    """What a base does now. cache_tokens: tokens that its cache has memory for; cache_limit: None for no limit."""

    id: str
    running: int
    waiting: int
    cache_tokens: int
    cache_limit: int | None

    def __add__(self, other: BaseLoad) -> BaseLoad:
        """Of the same base on two devices together."""
        mine, theirs = self.cache_limit, other.cache_limit
        return BaseLoad(
            self.id,
            self.running + other.running,
            self.waiting + other.waiting,
            self.cache_tokens + other.cache_tokens,
            None if mine is None or theirs is None else mine + theirs,
        )
