"""A job on the device: a generator that the engine advances one micro-step at a time.

Whoever waits for it gets its return value, its exception or its cancellation. This module knows no requests and no
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextvars import copy_context
from typing import Generic, TypeVar

from fortwo.records import TrainEvent, Waiting

T = TypeVar("T")


class Task(Generic[T]):
    """Handle of a running generator. wake: called when `cancel` is, so that an idle engine notices."""

    def __init__(
        self, events: Generator[TrainEvent, None, T], on_event: Callable[[TrainEvent], None], wake: Callable[[], None]
    ) -> None:
        self._events = events
        self._on_event = on_event
        self._wake = wake
        self._context = copy_context()  # of the job that starts it
        self._outcome: Future[T] = Future()
        self._cancel_requested = False
        self.waiting = False  # whether its last event was Waiting

    # ------------------------------------------------------------ any thread

    @property
    def done(self) -> bool:
        return self._outcome.done()

    def cancel(self) -> None:
        """Ask for the job to end; it does so before the next micro-step."""
        self._cancel_requested = True
        self._wake()

    def result(self, timeout: float | None = None) -> T:
        """The generator's return value. timeout: seconds. Raises its exception, or CancelledError."""
        return self._outcome.result(timeout)

    # ------------------------------------------------------------ the engine's thread

    def advance(self) -> None:
        """Run one micro-step. Its event goes to on_event, except Waiting, which means that there was nothing to do."""
        if self._cancel_requested:
            self.end()
            return
        try:
            event = self._context.run(next, self._events)
            self.waiting = isinstance(event, Waiting)
            if not self.waiting:
                self._on_event(event)
        except StopIteration as returned:
            self._outcome.set_result(returned.value)
        except BaseException as error:  # a failing job must not end the engine's thread
            self._close()
            self._outcome.set_exception(error)

    def end(self, error: Exception | None = None) -> None:
        """Cancel now, or fail with this error: the generator's `finally` runs, then the waiter is notified."""
        raised = self._close()
        if error is None and raised is None:
            self._outcome.cancel()
        else:
            self._outcome.set_exception(error or raised)

    def _close(self) -> BaseException | None:
        try:
            self._context.run(self._events.close)
        except BaseException as error:
            return error
        return None
