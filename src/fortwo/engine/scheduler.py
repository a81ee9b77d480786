"""Who runs next: requests in order of arrival, a bounded number at once, and a job's fair share of the device.

Decisions only. This module knows no torch, no clock, no text and no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(eq=False)
class Sequence:
    """One request as the runner sees it. tokens: the prompt, then what was generated; adapter: whose weights answer,
    None for the plain base; slot: its place in the cache while it runs, filled by the runner."""

    tokens: list[int]
    adapter: str | None
    slot: int | None = None


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """The requests of one base: at most `limit` that run, and those that wait, first come first served."""

    def __init__(self, limit: int) -> None:
        self.running: list[S] = []
        self.waiting: deque[S] = deque()
        self._limit = limit

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def __iter__(self) -> Iterator[S]:
        """A snapshot: requests may leave while it is walked."""
        return iter([*self.running, *self.waiting])

    def add(self, sequence: S) -> None:
        self.waiting.append(sequence)

    def admit(self, budget: int) -> list[S]:
        """Those who run from now on: who waited longest, together at most `budget` prompt tokens.

        Whoever is first is admitted whatever its length; nobody overtakes.
        """
        admitted: list[S] = []
        while self.waiting and len(self.running) + len(admitted) < self._limit:
            budget -= len(self.waiting[0].tokens)
            if admitted and budget < 0:
                break
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

    def remove(self, sequence: S) -> None:
        """A request leaves, from wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)


class FairShare:
    """A job that held the device for t seconds lets running requests have it for as long before it goes on."""

    def __init__(self) -> None:
        self._owed = 0.0

    def worked(self, seconds: float) -> None:
        """The job's micro-step took this long."""
        self._owed = seconds

    def served(self, seconds: float) -> None:
        """Requests had the device for this long."""
        self._owed -= seconds

    def job_may_run(self, *, requests: bool) -> bool:
        """Nobody is owed anything, or nobody is there to be paid."""
        return not requests or self._owed <= 0
