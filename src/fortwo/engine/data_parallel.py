"""Replies on several devices of one machine: each holds the bases and all adapters, and computes whole requests.

One engine stands for all. It is itself the engine of the first device, and each further device has an engine, and so a
thread, as well. A user's request goes to the device with the fewest. What a job asks stays on the first device, so that
the same job gives the same adapter: batches of other sizes round differently.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from fortwo.engine.engine import Engine, in_use, not_loaded
from fortwo.engine.generation import Reply
from fortwo.engine.statistics import BaseLoad, EngineStatistics
from fortwo.nn.lora import Lora
from fortwo.prompts import Delta, Prompt
from fortwo.records import AdapterVersion


@dataclass(eq=False)
class _Requests:
    """Of one device. entering: prompts that are about to be accepted; replies: those that have not ended, and perhaps
    some that have; failures: how many replies have failed since one succeeded."""

    entering: list[Prompt] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    failures: int = 0

    def prompts(self) -> list[Prompt]:
        """Of the requests that have not ended."""
        going_on = []
        for reply in self.replies:
            if not reply.done:
                going_on.append(reply)
            elif reply.finish_reason == "error":
                self.failures += 1
            elif reply.finish_reason != "cancelled":
                self.failures = 0
        self.replies = going_on
        return [*self.entering, *(reply.prompt for reply in going_on)]


class DataParallelEngine(Engine):
    """others: the engines of the further devices, which have not been started. The bases of a further device are added
    to its engine before they are added to this one; adapters are attached to this one alone. Else as Engine."""

    def __init__(self, threads: int | None, flush: Callable[[], None], others: Sequence[Engine]) -> None:
        super().__init__(threads, flush)
        self.others = others
        self._requests = [_Requests() for _ in range(1 + len(others))]  # by device, the own one first
        self._removing: set[str] = set()  # ids of bases
        self._lock = threading.Lock()  # for both

    # ------------------------------------------------------------ any thread

    @property
    def statistics(self) -> EngineStatistics:
        """Of all devices together."""
        return reduce(add, (other.statistics for other in self.others), super().statistics)

    def start(self) -> None:
        super().start()
        for other in self.others:
            other.start()

    def close(self) -> None:
        super().close()  # its jobs still use the others
        for other in self.others:
            other.close()

    def remove_base(self, id: str) -> None:
        """Stop serving a base on every device. Raises Conflict while requests use it."""
        with self._lock:
            if count := self._count(id, None):
                raise in_use(id, count)
            self._removing.add(id)
        try:
            super().remove_base(id)
            for other in self.others:
                other.remove_base(id)
        finally:
            self._removing.remove(id)

    def attach(self, base: str, key: str, lora: Lora, *, version: AdapterVersion | None = None) -> None:
        """As Engine.attach, on every device or on none; an adapter in training on the first one alone."""
        try:
            super().attach(base, key, lora, version=version)
            for other in self.others if version is not None else ():
                other.attach(base, key, lora, version=version)
        except BaseException:
            self.detach(base, key)
            raise

    def detach(self, base: str, key: str) -> None:
        super().detach(base, key)
        for other in self.others:
            other.detach(base, key)

    def count_requests(self, base: str, adapter: str | None = None) -> int:
        with self._lock:
            return self._count(base, adapter)

    def loads(self) -> list[BaseLoad]:
        """What each base does now on all devices together."""
        loads: dict[str, BaseLoad] = {}
        for load in (*super().loads(), *(load for other in self.others for load in other.loads())):
            loads[load.id] = loads[load.id] + load if load.id in loads else load
        return list(loads.values())

    def ready(self) -> Future[None]:
        """Done once every device has had its turn."""
        ready: Future[None] = Future()
        left = [super().ready(), *(other.ready() for other in self.others)]

        def turned(done: Future[None]) -> None:
            with self._lock:
                left.remove(done)
                last = not left
            if last and ready.set_running_or_notify_cancel():  # nobody may wait for it any more
                ready.set_result(None)

        for turn in left.copy():
            turn.add_done_callback(turned)
        return ready

    def submit(self, prompt: Prompt, on_delta: Callable[[Delta], None] | None = None) -> Reply:
        """As Engine.submit, on the device with the fewest requests."""
        place = self._enter(prompt)
        requests = self._requests[place]
        try:
            submit = self.others[place - 1].submit if place else super().submit
            reply = submit(prompt, on_delta)
            with self._lock:
                requests.replies.append(reply)
        finally:
            with self._lock:
                requests.entering.remove(prompt)
        return reply

    def _enter(self, prompt: Prompt) -> int:
        """The place of the device that gets the prompt; it counts as one of its requests from now on."""
        with self._lock:
            if prompt.base in self._removing:
                raise not_loaded(prompt.base)
            counts: list[float] = [len(requests.prompts()) + requests.failures for requests in self._requests]
            counts[0] += len(self._tasks)
            for place, engine in enumerate((self, *self.others)):
                counts[place] += math.inf if engine.failed else 0
            place = 0 if prompt.background else choose_device(counts, lambda place: self._unread(place, prompt))
            self._requests[place].entering.append(prompt)
        return place

    def _unread(self, place: int, prompt: Prompt) -> int:
        return self.others[place - 1].unread(prompt) if place else self.unread(prompt)

    def _count(self, base: str, adapter: str | None) -> int:
        prompts = [prompt for requests in self._requests for prompt in requests.prompts()]
        return sum(prompt.base == base and adapter in (None, prompt.adapter) for prompt in prompts)


def choose_device(requests: Sequence[float], unread: Callable[[int], int]) -> int:
    """The place of the device that gets a prompt: one that has the fewest requests, and of several such the one that
    has to compute the fewest of its tokens. requests: how many each device has; a device whose replies fail, which is
    soon done with them, counts those as well. unread: the tokens of the prompt that the device at a place has not kept
    from earlier ones."""
    fewest = [place for place, count in enumerate(requests) if count == min(requests)]
    return fewest[0] if len(fewest) == 1 else min(fewest, key=unread)
