"""Instruction levels of x86 and ARM processors: what this one has, and the cap on what is used of it. Torch-free.

A level names what the kernels in C are compiled for. FORTWO_ISA caps it, and with it what torch, oneDNN and MKL use,
so that one machine can test and measure every level below its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from fortwo.errors import InvalidRequest

ARM = platform.machine() in ("aarch64", "arm64")
X86_LEVELS, ARM_LEVELS = ("avx2", "avx512", "amx"), ("neon", "dotprod")
LEVELS = ("none", *(ARM_LEVELS if ARM else X86_LEVELS))  # of this architecture, from the lowest to the highest
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
    "neon": {"asimd"},
    "dotprod": {"asimddp"},
}
# What Linux tells an ARM process of its processor: the entry of the auxiliary vector and the bit, by instruction.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARM_BITS = {"asimd": (_AT_HWCAP, 1), "asimddp": (_AT_HWCAP, 20), "i8mm": (_AT_HWCAP2, 13)}
# What caps the libraries. They read it when they compute for the first time.
_LIBRARIES = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_cap = "auto"


def cap(level: str) -> None:
    """Use nothing above `level` (one of LEVELS, or auto for all that the processor has) in this process.

    It must be called before anything is computed. A cap can only be lowered. With none there are no kernels in C, and
    torch's own operations, which are not capped then, take their place. Raises InvalidRequest for a level of another
    architecture.
    """
    global _cap
    if level not in ("auto", *LEVELS):
        raise InvalidRequest(
            f"FORTWO_ISA is {level}, which this {platform.machine()} processor cannot have",
            param="isa",
            hint=f"Set it to auto, {', '.join(LEVELS)}, or remove it.",
        )
    if level == "auto" or (_cap != "auto" and LEVELS.index(level) >= LEVELS.index(_cap)):
        return
    _cap = level
    os.environ.update(library_caps(level))


def library_caps(level: str) -> dict[str, str]:
    """The environment of a process that caps torch, oneDNN and MKL as `cap` does."""
    return dict(_LIBRARIES.get(level, {}))


@cache
def highest() -> str | None:
    """The highest level that the processor has; None where Linux describes no x86 or ARM processor."""
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
    if level == "neon":
        return ("-march=armv8-a",)
    if level == "dotprod":
        return (f"-march=armv8.2-a+dotprod{'+i8mm' if 'i8mm' in flags() else ''}",)
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    present = sorted(flags() & _NEEDS["amx"]) if level == "avx512" else ()
    return ("-march=native", *wide, *(f"-mno-{name.replace('_', '-')}" for name in present))


def _up_to(level: str) -> tuple[str, ...]:
    return LEVELS[1 : LEVELS.index(level) + 1]


def identity() -> bytes:
    """What tells one kind of processor from another."""
    return " ".join((platform.machine(), processor(), *sorted(flags()))).encode()


def processor() -> str:
    """The processor's name, or its architecture where Linux knows no name."""
    named = None if ARM else next(iter(_cpuinfo("model name")), None)
    return named or f"{platform.machine() or 'unknown'} processor"


@cache
def flags() -> frozenset[str]:
    """Instructions the processor has, in Linux's names."""
    if ARM:
        try:
            auxiliary = ctypes.CDLL(None).getauxval
        except (AttributeError, OSError):  # not Linux
            return frozenset()
        auxiliary.argtypes, auxiliary.restype = [ctypes.c_ulong], ctypes.c_ulong
        return frozenset(name for name, (entry, bit) in _ARM_BITS.items() if auxiliary(entry) >> bit & 1)
    return frozenset(name for line in _cpuinfo("flags") for name in line.split())


def _cpuinfo(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]
