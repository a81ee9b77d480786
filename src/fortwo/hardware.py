"""The cores, the memory and the open files that this process may use. Torch-free.

A container or a service may have less of them than its machine: Linux limits cores and memory by control groups
(https://docs.kernel.org/admin-guide/cgroup-v2.html), and cores by the affinity of a process too.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SPINS = 2000  # a tenth of a millisecond, about
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """The number of cores: at least one, at most those that the affinity and the control groups leave."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for group in _groups(CGROUPS, MEMBERSHIP) if (share := _cpu_share(group)) is not None]
    return max(1, math.ceil(min([allowed, *shares])))


def memory_bytes() -> int:
    """Bytes of memory: the machine's, or the lowest limit of a control group."""
    limits = [limit for group in _groups(CGROUPS, MEMBERSHIP) if (limit := _memory_limit(group)) is not None]
    return min([int(psutil.virtual_memory().total), *limits])


def peak_memory_bytes() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_spinning() -> None:
    """From now on the threads of a product that wait for each other soon sleep, unless the environment says how they
    wait. It must be called before torch is imported, which loads OpenMP.

    By default they keep their cores for some milliseconds. Where other programs compute too, the thread that they wait
    for has no core meanwhile, and a step takes ten times as long and more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def open_files() -> int | None:
    """How many files and connections the process may have open; None where nothing limits it."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process, each with those above it. Lines of `membership` are
    `0::/path` in version 2 and `4:cpu,cpuacct:/path` in version 1. In a container the path may not be there; then the
    folder at the top stands for the container."""
    lines = []
    with suppress(OSError):
        lines = membership.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / controllers if controllers else root
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_dir() and folder.is_relative_to(top))


def _cpu_share(group: Path) -> float | None:
    """Cores' worth of time that the group may have; None without a limit."""
    quota, period = _words(group / "cpu.max"), _words(group / "cpu.cfs_period_us")
    if quota:
        return None if quota[0] == "max" else int(quota[0]) / int(quota[1])
    old = _words(group / "cpu.cfs_quota_us")
    return int(old[0]) / int(period[0]) if old and period and int(old[0]) > 0 else None


def _memory_limit(group: Path) -> int | None:
    """Bytes that the group may have; None without a limit. Version 1 writes a number beyond any machine for none."""
    words = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
    return int(words[0]) if words and words[0] != "max" else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
