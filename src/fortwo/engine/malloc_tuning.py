"""How glibc's allocator treats the memory of freed tensors. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import psutil

STEPS = 8  # micro-steps through which a hole has been free
SECONDS = 20.0  # between two returns where nobody tells what is allocated
LARGEST = 192 << 20  # bytes of holes that are kept
_OPTIONS = ((-8, 1), (-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20))  # arenas, mmap and trim thresholds, padding


def retain_freed_memory() -> None:
    """From now on the allocator reuses freed memory instead of returning it to the system after every operation.

    Outside the main thread glibc returns every large block at once, and a training step would spend a tenth of its
    time on the resulting page faults.
    """
    if (libc := _glibc()) is not None:
        for option, value in _OPTIONS:
            libc.mallopt(option, value)


def trim() -> None:
    """Return free memory to the system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _allocated_bytes() -> int | None:
    """What the allocator has given out, in its heap and beside it; None where it does not tell."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class Holes:
    """Free memory that a job does not use again. The sizes of tensors change from step to step and fit the freed blocks
    less and less, so that after some minutes the holes between them may take half of the memory.

    What is free varies within a step; a hole is what stayed free through STEPS micro-steps. resident: bytes of memory
    that the process has; used: bytes of it that are allocated, None where that is not known: then all that is free is
    returned now and then."""

    def __init__(
        self,
        resident: Callable[[], int] = _resident_bytes,
        used: Callable[[], int | None] = _allocated_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._resident = resident
        self._used = used
        self._fewest: int | None = None  # free bytes since the holes were returned, when they were fewest
        self._trimmed = 0.0  # when memory was last returned
        self._least, self._steps = 0, 0  # the fewest ones of the last steps, and how many these are

    def after_step(self) -> None:
        """Return the holes to the system if they are larger than LARGEST."""
        if (used := self._used()) is None:
            if self._clock() - self._trimmed > SECONDS:
                self.close()
            return
        free = self._resident() - used
        self._fewest = free if self._fewest is None else min(self._fewest, free)
        self._least = free if self._steps == 0 else min(self._least, free)
        self._steps += 1
        if self._steps == STEPS:
            if self._least - self._fewest > LARGEST:
                self.close()
            self._steps = 0

    def close(self) -> None:
        """Return all free memory to the system, also because the job makes way for other work."""
        trim()
        self._fewest, self._steps, self._trimmed = None, 0, self._clock()


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
