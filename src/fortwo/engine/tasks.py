"""A job on the device: a generator that the engine advances one micro-step at a time.

Its return value, its exception or its cancellation reaches whoever waits. Knows no requests and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Generic, TypeVar

from fortwo.records import TrainEvent, Waiting

T = TypeVar("T")


class Task(Generic[T]):
    """Handle of a running generator. wake: called when a cancellation is asked for."""

    def __init__(
        self,
        events: Generator[TrainEvent, None, T],
        on_event: Callable[[TrainEvent], None],
        wake: Callable[[], None],
    ) -> None:
        self._events = events
        self._on_event = on_event
        self._wake = wake
        self._outcome: Future[T] = Future()
        self._cancel_requested = False
        self.waiting = False  # its last event was Waiting

    # ------------------------------------------------------------ any thread

    @property
    def done(self) -> bool:
        return self._outcome.done()

    def cancel(self) -> None:
        """Ask for the end; it comes before the next micro-step."""
        self._cancel_requested = True
        self._wake()

    def result(self, timeout: float | None = None) -> T:
        """What the generator returned. Raises its exception, or concurrent.futures.CancelledError."""
        return self._outcome.result(timeout)

    # ------------------------------------------------------------ the engine's thread

    def advance(self) -> None:
        """One micro-step; its event goes to on_event, except Waiting, which only says that there was none."""
        if self._cancel_requested:
            self.end()
            return
        try:
            event = next(self._events)
            self.waiting = isinstance(event, Waiting)
            if not self.waiting:
                self._on_event(event)
        except StopIteration as returned:
            self._outcome.set_result(returned.value)
        except BaseException as error:  # the thread outlives whatever a job does
            self._close()
            self._outcome.set_exception(error)

    def end(self) -> None:
        """Cancelled: the generator's `finally` runs, then the waiter learns of it."""
        error = self._close()
        if error is None:
            self._outcome.cancel()
        else:
            self._outcome.set_exception(error)

    def _close(self) -> BaseException | None:
        try:
            self._events.close()
        except BaseException as error:
            return error
        return None
