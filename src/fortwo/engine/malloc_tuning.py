"""How glibc's allocator treats the memory of freed tensors. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes

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
    """Return free memory to the system. Tensor sizes change from step to step and fit the freed blocks less and less:
    after some minutes the holes take more memory than what is in use."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
