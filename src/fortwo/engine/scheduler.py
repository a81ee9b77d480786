"""Who runs next: requests in order of arrival, a bounded number at once, and a job's fair share of the device.

Decisions only. This module knows no torch, no clock, no text and no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class Slot(Protocol):
    """A place in the cache. length: tokens whose keys and values it holds."""

    length: int


class Listener(Protocol):
    def hear(self, hidden_LD: Any, begin: int, /) -> None:
        """Hidden states (a tensor) after the final norm of the sequence's tokens from place `begin` on."""


@dataclass(eq=False)
class Sequence:
    """One request as the runner sees it. tokens: the prompt, then what was generated; adapter: whose weights answer,
    None for the plain base; slot: its place in the cache while it runs, filled by the runner; listener: who hears the
    hidden states of its tokens, none of which is taken from kept prefixes then; kept: what is computed for it may
    serve others that begin alike."""

    tokens: list[int]
    adapter: str | None
    slot: Slot | None = None
    listener: Listener | None = None
    kept: bool = True

    @property
    def unread(self) -> int:
        """How many tokens are still to be computed; one is what a decode step computes."""
        return len(self.tokens) - (0 if self.slot is None else self.slot.length)


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """The requests of one base: at most `limit` that run, and those that wait, first come first served, a job's last.
    Who runs is read in first, in parts if its prompt is long, and then decodes."""

    def __init__(self, limit: int) -> None:
        self.running: list[S] = []
        self.waiting: deque[S] = deque()
        self._limit = limit

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def __iter__(self) -> Iterator[S]:
        """A snapshot: requests may leave while it is walked."""
        return iter([*self.running, *self.waiting])

    @property
    def decoding(self) -> list[S]:
        return [sequence for sequence in self.running if sequence.unread == 1]

    @property
    def reading(self) -> list[S]:
        return [sequence for sequence in self.running if sequence.unread > 1]

    def add(self, sequence: S) -> None:
        """It waits behind those who came before; what a job asks (`kept` is False) lets everybody else pass."""
        place = len(self.waiting)
        while sequence.kept and place and not self.waiting[place - 1].kept:
            place -= 1
        self.waiting.insert(place, sequence)

    def admits(self, unread: int, budget: int) -> bool:
        """Whether who waited longest, with so many tokens to compute, would get some of this turn's budget."""
        if len(self.running) >= self._limit:
            return False
        return shares([*(sequence.unread for sequence in self.reading), unread], budget)[-1] > 0

    def start(self) -> None:
        """Who waited longest runs from now on."""
        self.running.append(self.waiting.popleft())

    def preempt(self, sequence: S) -> None:
        """Back to the head of those who wait."""
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: S) -> None:
        """A request leaves, from wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)


def shares(unread: Row[int], budget: int) -> list[int]:
    """How many tokens of each prompt to compute this turn, together at most `budget`; prompts in order of arrival.

    What fits is computed whole. The first that does not gets at least half of what is left when its turn comes, so
    that it goes on every turn; the shorter ones behind it need not wait for its end.
    """
    taken = [0] * len(unread)
    left, cut, reserved = budget, None, 0
    for place, tokens in enumerate(unread):
        if tokens <= left - reserved:
            taken[place] = tokens
            left -= tokens
        elif cut is None:
            cut, reserved = place, (left + 1) // 2
    if cut is not None:
        taken[cut] = left
    return taken


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
