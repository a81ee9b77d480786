"""Compiles the kernels in C for an instruction level of this machine, once. Torch-free.

The library lies in the package's __pycache__, as Python's own compiled files do; where the package may not be written,
in fortwo/kernels of $XDG_CACHE_HOME or ~/.cache. Its name is a digest of sources, flags and processor. It is linked
beside its place and renamed, so two processes that compile at once do not disturb each other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fortwo import hardware
from fortwo.kernels import isa

log = logging.getLogger(__name__)
SOURCES = Path(__file__).with_name("cpu")
HEADER = SOURCES / "fortwo_kernels.h"
_COMPILE = (
    *("-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
_FOR_EACH_TYPE = ("attention.c", "elementwise.c", "losses.c")  # compiled for fp32, then for bf16


def path(level: str | None) -> Path:
    """Where the library for a level lies once it is compiled."""
    sources = b"".join(source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]")))
    about = " ".join((_cc(), *_COMPILE, *isa.compiler_flags(level), *_FOR_EACH_TYPE))
    return _folder() / f"kernels-{hashlib.sha256(sources + about.encode() + isa.identity()).hexdigest()[:16]}.so"


def library(level: str | None) -> Path:
    """The library for a level, compiled if it is not there.

    Raises OSError where there is no compiler or nothing can be written, CalledProcessError where it fails.
    """
    found = path(level)
    if found.exists():
        return found
    began, command = time.perf_counter(), (_cc(), *_COMPILE, *isa.compiler_flags(level))
    found.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=found.parent) as beside, ThreadPoolExecutor(hardware.cores()) as pool:
        units: list[tuple[Path, tuple[str, ...]]] = [(source, ()) for source in sorted(SOURCES.glob("*.c"))]
        units += [(SOURCES / name, ("-DELEMENT_BFLOAT16",)) for name in _FOR_EACH_TYPE]
        objects = [Path(beside) / f"{number}.o" for number in range(len(units))]

        def compiled(number: int) -> None:
            source, types = units[number]
            _run(*command, *types, "-c", str(source), "-o", str(objects[number]))

        list(pool.map(compiled, range(len(units))))
        linked = Path(beside) / found.name
        _run(*command, "-shared", "-o", str(linked), *map(str, objects), "-lm")
        linked.replace(found)
    seconds = time.perf_counter() - began
    log.info("compiled the C kernels for %s in %.1f s: %s", level or "this processor", seconds, found)
    return found


def compiler() -> str | None:
    """The C compiler's version; None where there is none."""
    return _run(_cc(), "--version").splitlines()[0] if shutil.which(_cc()) else None


def _cc() -> str:
    return os.environ.get("CC") or "cc"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _folder() -> Path:
    beside = SOURCES / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fortwo" / "kernels"
