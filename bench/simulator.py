"""One node as a simulation: the scheduler that serves, with the engine's turns, on a clock of its own.

What is simulated is a base whose adapters lie on disk and are loaded when they are asked for, at most so many at once.
Left out: the bound of the cache for keys and values, kept prefixes, and jobs. Nothing here reads a clock or a device.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from fortwo.engine import scheduler
from fortwo.engine.scheduler import Scheduler, split_budget
from fortwo.prompts import MAX_RUNNING

# As in fortwo.engine.engine, which needs torch; a test compares them.
PROMPT_TOKENS = 2048
PROMPT_TOKENS_WHILE_DECODING = 256


@dataclass(frozen=True)
class Workload:
    """Requests that arrive independently of each other (a Poisson process).

    rate: of arrivals, per second. seconds: for how long they arrive. prompt, reply: the fewest and the most tokens, all
    between them equally likely. adapters: how many there are; 0 means the base alone. alpha: exponent of the power law
    of popularity: the k-th most popular adapter is asked for k ** -alpha times as often as the first."""

    rate: float
    seconds: float
    prompt: tuple[int, int]
    reply: tuple[int, int]
    adapters: int = 0
    alpha: float = 1.0


@dataclass(frozen=True)
class Arrival:
    """A request. at: in seconds from the beginning; prompt, reply: tokens, both at least 1; adapter: None for the
    base."""

    at: float
    prompt: int
    reply: int
    adapter: int | None = None


def arrivals(workload: Workload, seed: int = 0) -> list[Arrival]:
    """The requests of a workload, in order. The same seed gives the same ones."""
    rng = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -workload.alpha for rank in range(workload.adapters)))
    found, at = [], rng.expovariate(workload.rate)
    while at < workload.seconds:
        adapter = rng.choices(range(workload.adapters), cum_weights=weights)[0] if weights else None
        found.append(Arrival(at, rng.randint(*workload.prompt), rng.randint(*workload.reply), adapter))
        at += rng.expovariate(workload.rate)
    return found


class Costs(Protocol):
    """Seconds on the device. adapter_load: from the disk until an adapter answers, while other requests go on;
    adapter_check: the part of it for which it holds the device."""

    @property
    def adapter_load(self) -> float: ...
    @property
    def adapter_check(self) -> float: ...
    def decode(self, rows: int) -> float: ...
    def prefill(self, tokens: int) -> float: ...


@dataclass(frozen=True)
class MeasuredCosts:
    """decode_seconds: of a step, by rows; prefill_seconds: of a turn's prompts, by tokens. Between two measured places
    they are on a line, and beyond the last one in proportion."""

    decode_seconds: Mapping[int, float]
    prefill_seconds: Mapping[int, float]
    adapter_load: float
    adapter_check: float

    def decode(self, rows: int) -> float:
        return _between(self.decode_seconds, rows)

    def prefill(self, tokens: int) -> float:
        return _between(self.prefill_seconds, tokens)


def mean(first: MeasuredCosts, other: MeasuredCosts) -> MeasuredCosts:
    """The costs halfway between two measurements of the same places."""

    def halfway(one: Mapping[int, float], two: Mapping[int, float]) -> dict[int, float]:
        return {place: (seconds + two[place]) / 2 for place, seconds in one.items()}

    return MeasuredCosts(
        halfway(first.decode_seconds, other.decode_seconds),
        halfway(first.prefill_seconds, other.prefill_seconds),
        (first.adapter_load + other.adapter_load) / 2,
        (first.adapter_check + other.adapter_check) / 2,
    )


def drift(first: MeasuredCosts, other: MeasuredCosts) -> float:
    """By how much steps of decoding got slower between two measurements of the same places, the median of all places:
    1 if they took as long. Far from 1, other programs used the machine, and predictions cannot hold."""
    return statistics.median(other.decode_seconds[rows] / seconds for rows, seconds in first.decode_seconds.items())


def _between(measured: Mapping[int, float], place: int) -> float:
    places = sorted(measured)
    if place <= places[0]:
        return measured[places[0]]
    if place >= places[-1]:
        return measured[places[-1]] * place / places[-1]
    above = next(one for one in places if one > place)
    below = places[places.index(above) - 1]
    share = (place - below) / (above - below)
    return measured[below] * (1 - share) + measured[above] * share


@dataclass(frozen=True)
class Node:
    """max_adapters, queue: the settings of these names; running: how many requests decode together."""

    costs: Costs
    max_adapters: int = 64
    queue: int = 256
    running: int = MAX_RUNNING


@dataclass
class Outcome:
    """What became of a request. tokens: when each token of its reply came, in seconds from the beginning; refused: why
    it got none."""

    arrival: Arrival
    tokens: list[float] = field(default_factory=list)
    refused: str | None = None


@dataclass
class _Slot:
    length: int = 0


@dataclass(eq=False, kw_only=True)
class _Request(scheduler.Sequence):
    outcome: Outcome


def simulate(requests: Sequence[Arrival], node: Node) -> list[Outcome]:
    """What becomes of the requests, in order of arrival, until the last has ended."""
    return _Simulation(requests, node).run()


class _Simulation:
    def __init__(self, requests: Sequence[Arrival], node: Node) -> None:
        self._outcomes = [Outcome(one) for one in sorted(requests, key=lambda one: one.at)]
        self._coming = deque(self._outcomes)
        self._node = node
        self._scheduler: Scheduler[_Request] = Scheduler(node.running)
        self._now = 0.0
        self._loader_free = 0.0  # adapters are loaded one after the other
        self._loads: list[tuple[float, int]] = []  # a heap: when an adapter will be read, and which
        self._awaiting: dict[int, list[Outcome]] = {}  # requests by the adapter that is loaded for them
        self._loaded: dict[int, None] = {}  # adapters in memory, the one asked for least recently first

    def run(self) -> list[Outcome]:
        while self._coming or self._loads or len(self._scheduler):
            if not len(self._scheduler):
                self._now = max(self._now, min(self._next_times()))
            self._accept()
            self._finish_loads()
            self._decode()
            self._prefill()
        return self._outcomes

    def _next_times(self) -> Iterator[float]:
        if self._coming:
            yield self._coming[0].arrival.at
        if self._loads:
            yield self._loads[0][0]

    def _accept(self) -> None:
        while self._coming and self._coming[0].arrival.at <= self._now:
            outcome = self._coming.popleft()
            adapter = outcome.arrival.adapter
            if len(self._scheduler) + sum(map(len, self._awaiting.values())) >= self._node.running + self._node.queue:
                outcome.refused = "queue full"
            elif adapter is None or adapter in self._loaded:
                self._submit(outcome)
            elif adapter in self._awaiting:
                self._awaiting[adapter].append(outcome)
            else:
                self._awaiting[adapter] = [outcome]
                costs = self._node.costs
                self._loader_free = max(self._loader_free, outcome.arrival.at) + costs.adapter_load
                heapq.heappush(self._loads, (self._loader_free - costs.adapter_check, adapter))

    def _finish_loads(self) -> None:
        while self._loads and self._loads[0][0] <= self._now:
            _, adapter = heapq.heappop(self._loads)
            waiting = self._awaiting.pop(adapter)
            self._now += self._node.costs.adapter_check
            self._loader_free = max(self._loader_free, self._now)
            if not self._evict():
                for outcome in waiting:
                    outcome.refused = "every adapter in memory is in use"
                continue
            self._loaded[adapter] = None
            for outcome in waiting:
                self._submit(outcome)

    def _evict(self) -> bool:
        """Whether there is room for one adapter more, made if necessary."""
        if len(self._loaded) < self._node.max_adapters:
            return True
        used = {request.outcome.arrival.adapter for request in self._scheduler}
        oldest = next((adapter for adapter in self._loaded if adapter not in used), None)
        if oldest is None:
            return False
        del self._loaded[oldest]
        return True

    def _submit(self, outcome: Outcome) -> None:
        adapter = outcome.arrival.adapter
        if adapter is not None:
            self._loaded[adapter] = self._loaded.pop(adapter)  # now the one asked for last
        name = None if adapter is None else str(adapter)
        self._scheduler.add(_Request([0] * outcome.arrival.prompt, name, outcome=outcome))

    # The two parts of a turn, as in fortwo.engine.engine.

    def _decode(self) -> None:
        if decoding := self._scheduler.decoding:
            self._advance([(request, 1) for request in decoding], self._node.costs.decode(len(decoding)))

    def _prefill(self) -> None:
        queue = self._scheduler
        budget = PROMPT_TOKENS_WHILE_DECODING if queue.decoding else PROMPT_TOKENS
        while queue.waiting and queue.admits(len(queue.waiting[0].tokens), budget):
            queue.waiting[0].slot = _Slot()
            queue.start()
        prefilling = queue.prefilling
        lengths = split_budget([request.uncomputed for request in prefilling], budget)
        parts = [(request, length) for request, length in zip(prefilling, lengths, strict=True) if length]
        if parts:
            self._advance(parts, self._node.costs.prefill(sum(length for _, length in parts)))

    def _advance(self, parts: list[tuple[_Request, int]], seconds: float) -> None:
        self._now += seconds
        for request, length in parts:
            assert request.slot is not None
            request.slot.length += length
            if request.uncomputed:
                continue
            request.tokens.append(0)
            request.outcome.tokens.append(self._now)
            if len(request.outcome.tokens) == request.outcome.arrival.reply:
                self._scheduler.remove(request)


@dataclass(frozen=True)
class Figures:
    """throughput: tokens of replies per second, from the first arrival to the last token. first: seconds from a request
    to its first token; each: seconds per token behind the first; both as (median, 95th percentile). refused: requests
    that got no reply."""

    throughput: float
    first: tuple[float, float]
    each: tuple[float, float]
    refused: int


def figures(outcomes: Sequence[Outcome]) -> Figures:
    """Raises ValueError if no request was answered, or none with two tokens."""
    answered = [one for one in outcomes if one.tokens]
    began, ended = min(one.arrival.at for one in outcomes), max(one.tokens[-1] for one in answered)
    longer = [one for one in answered if len(one.tokens) > 1]
    return Figures(
        sum(len(one.tokens) for one in answered) / (ended - began),
        _percentiles([one.tokens[0] - one.arrival.at for one in answered]),
        _percentiles([(one.tokens[-1] - one.tokens[0]) / (len(one.tokens) - 1) for one in longer]),
        len(outcomes) - len(answered),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    found = sorted(values)
    return statistics.median(found), found[min(len(found) - 1, int(len(found) * 0.95))]
