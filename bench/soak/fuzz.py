"""Runs what hypothesis makes of valid inputs: each must end as a success or an error of ours, in time and in memory."""

from __future__ import annotations

import gc
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from fortwo.errors import FortwoError

SECONDS = 30.0  # for one example; the longest budget of ours within is that of a chat template
SPARE_BYTES = 256 << 20  # beyond twice the input

Input = TypeVar("Input")


class TooLong(BaseException):
    """No library may catch it."""


@dataclass(frozen=True)
class Kind(Generic[Input]):
    """inputs: of `run`, which raises a FortwoError for one that is refused, and may return how it ended. size: the
    bytes of an input."""

    name: str
    inputs: SearchStrategy[Input]
    run: Callable[[Input], object]
    size: Callable[[Input], int]


@dataclass
class Fault:
    """what: the exception and where it was raised; example: the first input that led to it."""

    what: str
    told: str
    example: object
    times: int = 1


@dataclass
class Outcome:
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Fault] = field(default_factory=dict)
    slowest: float = 0.0
    most_bytes: int = 0  # beyond twice the input

    def fault(self, what: str, told: str, example: object) -> None:
        if what in self.faults:
            self.faults[what].times += 1
        else:
            self.faults[what] = Fault(what, told, example)


def fuzz(kind: Kind[Input], examples: int, seed: int = 0, seconds: float = SECONDS) -> Outcome:
    """All faults that so many examples show; the search goes on behind each. seconds: for one example."""
    outcome = Outcome()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(kind.inputs)
    def each(given: Input) -> None:
        with memory() as taken:
            try:
                outcome.ends[_end(kind.run, given, seconds)] += 1
            except TooLong:
                outcome.fault("too long", traceback.format_exc(), given)
            except Exception as error:
                outcome.fault(f"{type(error).__name__} in {place(error)}", traceback.format_exc(), given)
        beyond = taken[0] - 2 * kind.size(given)
        outcome.most_bytes = max(outcome.most_bytes, beyond)
        if beyond > SPARE_BYTES:
            outcome.fault("too much memory", f"{beyond >> 20} MiB beyond twice the input", given)

    gc.collect()
    gc.freeze()  # what is there already is not looked at again after each example
    each()
    gc.unfreeze()
    return outcome


def _end(run: Callable[[Input], object], given: Input, seconds: float) -> str:
    with limit(seconds):
        try:
            ended = run(given)
        except FortwoError as error:
            if error.code == "internal_error":
                raise
            return error.code
    return ended if isinstance(ended, str) else "success"


def place(error: BaseException) -> str:
    """The last line of ours in the traceback, as module:function."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fortwo/" in frame.filename] or frames[-1:]
    return f"{Path(ours[-1].filename).stem}:{ours[-1].name}"


@contextmanager
def limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooLong in this thread after so many seconds."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory() -> Iterator[list[int]]:
    """A list that holds afterwards how many bytes the process took at most beyond those of before (on Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, taken = _status("VmRSS"), [0]
    yield taken
    taken[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)
