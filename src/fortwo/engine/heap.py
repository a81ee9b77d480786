"""What glibc does with the memory of freed tensors. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes

_OPTIONS = ((-8, 1), (-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20))  # arenas, mmap and trim thresholds, padding


def keep() -> None:
    """From here on freed memory is used again instead of going back to the system after every operation.

    Outside the main thread glibc gives back anything large, and a training step would spend a tenth of its time on the
    page faults that follow.
    """
    if (libc := _glibc()) is not None:
        for option, value in _OPTIONS:
            libc.mallopt(option, value)


def give_back() -> None:
    """Give the system what is free now. Sizes change from step to step and fit what was freed worse and worse: kept
    for minutes, the holes come to more than what is in use."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
