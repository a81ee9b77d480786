"""Decides who runs next: requests in order of arrival, a limited number at once, and a job's fair share of the device.

Decisions only: this module knows no torch, no clock, no text and no thread.
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
    def on_hidden_states(self, hidden_LD: Any, begin: int, /) -> None:
        """Hidden states (a tensor) after the final norm of the sequence's tokens from place `begin` on."""


@dataclass(eq=False)
class Sequence:
    """A request as the runner sees it. tokens: the prompt, then the generated ones; adapter: the key of the adapter,
    None for the plain base; slot: its memory in the cache while it runs, set by the runner; listener: receives the
    hidden states of its tokens, none of which is taken from kept prefixes then; background: as in prompts.Prompt."""

    tokens: list[int]
    adapter: str | None
    slot: Slot | None = None
    listener: Listener | None = None
    background: bool = False

    @property
    def uncomputed(self) -> int:
        """How many tokens are still to be computed; a decode step computes one."""
        return len(self.tokens) - (0 if self.slot is None else self.slot.length)


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """Requests of one base: at most `limit` run, the others wait, first come first served. A running request is first
    prefilled, in parts if its prompt is long, and then decodes."""

    def __init__(self, limit: int) -> None:
        self.running: list[S] = []
        self.waiting: deque[S] = deque()
        self._limit = limit

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def __iter__(self) -> Iterator[S]:
        """Iterates over a snapshot, so that requests may leave meanwhile."""
        return iter([*self.running, *self.waiting])

    @property
    def decoding(self) -> list[S]:
        return [sequence for sequence in self.running if sequence.uncomputed == 1]

    @property
    def prefilling(self) -> list[S]:
        return [sequence for sequence in self.running if sequence.uncomputed > 1]

    def add(self, sequence: S) -> None:
        """Queue a request behind those that came before it."""
        self.waiting.append(sequence)

    def admits(self, uncomputed: int, budget: int) -> bool:
        """Whether the first waiting request, with so many tokens to compute, would get part of this turn's budget."""
        if len(self.running) >= self._limit:
            return False
        return split_budget([*(sequence.uncomputed for sequence in self.prefilling), uncomputed], budget)[-1] > 0

    def start(self) -> None:
        """Move the first waiting request to the running ones."""
        self.running.append(self.waiting.popleft())

    def preempt(self, sequence: S) -> None:
        """Move a running request back to the head of the waiting ones."""
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: S) -> None:
        """Remove a request that runs or waits."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)


def split_budget(uncomputed: Row[int], budget: int) -> list[int]:
    """How many tokens of each prompt to compute this turn, at most `budget` together; prompts in order of arrival.

    A prompt that fits is computed whole. The first that does not fit gets at least half of what is left at that
    point, so that it advances every turn; the shorter ones behind it need not wait for it to finish.
    """
    taken = [0] * len(uncomputed)
    left, cut, reserved = budget, None, 0
    for index, tokens in enumerate(uncomputed):
        if tokens <= left - reserved:
            taken[index] = tokens
            left -= tokens
        elif cut is None:
            cut, reserved = index, (left + 1) // 2
    if cut is not None:
        taken[cut] = left
    return taken


class FairShare:
    """A job that held the device for t seconds lets running requests have it for as long before it continues. What a
    job does is a micro-step, or a turn of its own requests."""

    def __init__(self) -> None:
        self._owed = 0.0

    def job_ran(self, seconds: float) -> None:
        """The job's micro-step took this long."""
        self._owed = seconds

    def requests_ran(self, seconds: float) -> None:
        """Requests had the device for this long."""
        self._owed -= seconds

    def job_may_run(self, *, requests: bool) -> bool:
        """Whether no request is waiting for device time that the job owes. requests: whether there are any."""
        return not requests or self._owed <= 0
