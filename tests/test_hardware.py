"""What this process may use, where the control groups of Linux leave less than the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fortwo import hardware


def grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, files: dict[str, str]) -> None:
    """Control groups as Linux shows them, in a folder of their own."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    root.mkdir()
    membership.write_text(lines)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    monkeypatch.setattr(hardware, "CGROUPS", root)
    monkeypatch.setattr(hardware, "MEMBERSHIP", membership)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(64)))


GIB = 2**30
CASES = {
    "version 2": ("0::/box\n", {"box/cpu.max": "150000 100000", "box/memory.max": str(GIB)}, 2, GIB),
    "the group above": ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3, None),
    "in a container": ("0::/not/here\n", {"cpu.max": "400000 100000", "memory.max": str(2 * GIB)}, 4, 2 * GIB),
    "less than a core": ("0::/\n", {"cpu.max": "20000 100000"}, 1, None),
    "version 1": (
        "3:cpu,cpuacct:/box\n2:memory:/box\n1:name=systemd:/box\n",
        {
            "cpu,cpuacct/box/cpu.cfs_quota_us": "500000",
            "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": str(GIB),
        },
        5,
        GIB,
    ),
    "version 1 without limits": (
        "3:cpu:/\n2:memory:/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        64,
        None,
    ),
    "no limits": ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 64, None),
    "no control groups": ("", {}, 64, None),
}


@pytest.mark.parametrize(("lines", "files", "cores", "memory"), CASES.values(), ids=CASES)
def test_the_lowest_limit_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    files: dict[str, str],
    cores: int,
    memory: int | None,
) -> None:
    grouped(tmp_path, monkeypatch, lines, files)
    assert hardware.cores() == cores
    whole = hardware.psutil.virtual_memory().total
    assert hardware.memory_bytes() == (whole if memory is None else min(memory, whole))


def test_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped(tmp_path, monkeypatch, "", {})
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {3})
    assert hardware.cores() == 1


def test_a_peak_is_no_less_than_what_was_taken() -> None:
    before = hardware.peak_memory_bytes()
    block = bytearray(b"x") * (before + 2**26)
    assert hardware.peak_memory_bytes() >= len(block)


WAITS = "from fortwo.server.state import AppState; from fortwo.settings import load; AppState(load())"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings OpenMP of another maker")
@pytest.mark.parametrize(
    ("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_the_threads_of_a_server_soon_sleep_where_they_wait(given: dict[str, str], spins: str, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"FORTWO_HOME": str(tmp_path), "OMP_DISPLAY_ENV": "verbose", **given}
    told = subprocess.run([sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr
