"""Instruction levels of x86 processors: what this one has, and the cap on what is used of it. Torch-free.

A level names what the kernels in C are compiled for. FORTWO_ISA caps it, and with it what torch, oneDNN and MKL use,
so that one machine can test and measure every level below its own.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

LEVELS = ("none", "avx2", "avx512", "amx")  # from the lowest to the highest
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}
# What caps the libraries. They read it when they compute for the first time.
_LIBRARIES = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_cap = "auto"


def cap(level: str) -> None:
    """Use nothing above `level` (one of LEVELS, or auto for all that the processor has) in this process.

    It must be called before anything is computed. A cap can only be lowered. With none there are no kernels in C, and
    torch's own operations, which are not capped then, take their place.
    """
    global _cap
    if level == "auto" or (_cap != "auto" and LEVELS.index(level) >= LEVELS.index(_cap)):
        return
    _cap = level
    os.environ.update(_LIBRARIES.get(level, {}))


@cache
def highest() -> str | None:
    """The highest level that the processor has; None for one that is not an x86 processor that Linux describes."""
    present = flags()
    return next((level for level in reversed(LEVELS[1:]) if all(_NEEDS[one] <= present for one in _up_to(level))), None)


def level() -> str | None:
    """The level in use; None where the processor has no level and nothing is capped."""
    found = highest()
    if _cap == "auto":
        return found
    return _cap if found is None else min(found, _cap, key=LEVELS.index)


def levels() -> tuple[str | None, ...]:
    """The levels that kernels can run at here, from the lowest to the one in use; None is a processor without any."""
    here = level()
    return (here,) if here is None else _up_to(here)


def compiler_flags(level: str | None) -> tuple[str, ...]:
    """What tells the C compiler to use the instructions of a level, and none above it."""
    if level == "avx2" and highest() != "avx2":
        return ("-march=x86-64-v3",)
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    present = sorted(flags() & _NEEDS["amx"]) if level == "avx512" else ()
    return ("-march=native", *wide, *(f"-mno-{name.replace('_', '-')}" for name in present))


def _up_to(level: str) -> tuple[str, ...]:
    return LEVELS[1 : LEVELS.index(level) + 1]


def identity() -> bytes:
    """What tells one kind of processor from another."""
    return "".join(sorted({*_cpuinfo("model name"), *_cpuinfo("flags")})).encode()


def processor() -> str:
    """The processor's name."""
    return next(iter(_cpuinfo("model name")), "unknown processor")


@cache
def flags() -> frozenset[str]:
    """Instructions the processor has, in Linux's names."""
    return frozenset(name for line in _cpuinfo("flags") for name in line.split())


def _cpuinfo(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]
