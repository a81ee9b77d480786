"""The compiled kernels in C for an instruction level of this machine. Torch-free.

A wheel carries libraries for the usual processors (`SHIPPED`), which need no compiler. Elsewhere they are compiled
once. Such a library lies in the package's __pycache__, as Python's own compiled files do; where the package may not be
written, in fortwo/kernels of $XDG_CACHE_HOME or ~/.cache. Its name is a digest of sources, flags and processor. It is
linked beside its place and renamed, so two processes that compile at once do not disturb each other.
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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shipped:
    """A library in a wheel. needs: instructions beside those of the level, in Linux's names. flags: the compiler's."""

    name: str
    level: str
    needs: frozenset[str]
    flags: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where it lies in the package, if this is a wheel made of these sources."""
        digest = hashlib.sha256(_sources() + " ".join((*_COMPILE, *self.flags)).encode()).hexdigest()
        return SOURCES / "compiled" / f"{self.name}-{digest[:16]}.so"


_VNNI, _BF16, _AVX_VNNI = frozenset({"avx512_vnni"}), frozenset({"avx512_vnni", "avx512_bf16"}), frozenset({"avx_vnni"})
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_AVX512_VNNI = (*_AVX512, "-mavx512vnni")
_AVX512_BF16 = (*_AVX512_VNNI, "-mavx512bf16")
SHIPPED = (  # the best of each level first
    Shipped("amx", "amx", _BF16, (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")),
    Shipped("avx512-bf16", "avx512", _BF16, _AVX512_BF16),
    Shipped("avx512-vnni", "avx512", _VNNI, _AVX512_VNNI),
    Shipped("avx512", "avx512", frozenset(), _AVX512),
    Shipped("avx2-vnni", "avx2", _AVX_VNNI, ("-march=x86-64-v3", "-mavxvnni")),
    Shipped("avx2", "avx2", frozenset(), ("-march=x86-64-v3",)),
    Shipped("dotprod-i8mm", "dotprod", frozenset({"i8mm"}), ("-march=armv8.2-a+dotprod+i8mm",)),
    Shipped("dotprod", "dotprod", frozenset(), ("-march=armv8.2-a+dotprod",)),
    Shipped("neon", "neon", frozenset(), ("-march=armv8-a",)),
)


def path(level: str | None) -> Path:
    """Where the library for a level lies: in the wheel, or where it lies once it is compiled."""
    for one in SHIPPED:
        if one.level == level and one.needs <= isa.flags() and one.path.exists():
            return one.path
    about = " ".join((_cc(), *_COMPILE, *isa.compiler_flags(level), *_FOR_EACH_TYPE)).encode()
    return _folder() / f"kernels-{hashlib.sha256(_sources() + about + isa.identity()).hexdigest()[:16]}.so"


def library(level: str | None) -> Path:
    """The library for a level, compiled if it is not there.

    Raises OSError where there is no compiler or nothing can be written, CalledProcessError where it fails.
    """
    found = path(level)
    if not found.exists():
        began = time.perf_counter()
        compile_to(found, isa.compiler_flags(level))
        seconds = time.perf_counter() - began
        log.info("compiled the C kernels for %s in %.1f s: %s", level or "this processor", seconds, found)
    return found


def compile_to(found: Path, flags: tuple[str, ...]) -> None:
    """Compile the library `found` with the compiler's flags of a level. Raises as `library` does."""
    command = (_cc(), *_COMPILE, *flags)
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


def compiler() -> str | None:
    """The C compiler's version; None where there is none."""
    return _run(_cc(), "--version").splitlines()[0] if shutil.which(_cc()) else None


def _sources() -> bytes:
    return b"".join(source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]")))


def _cc() -> str:
    return os.environ.get("CC") or "cc"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _folder() -> Path:
    beside = SOURCES / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fortwo" / "kernels"
