"""`fortwo doctor`: this machine's properties and measurements. It needs no server and imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Group
from rich.table import Table

from fortwo import hardware
from fortwo.cli import views
from fortwo.kernels import build, isa
from fortwo.quantization.selection import ROWS, Choice, Measured, Measurements

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Examination:
    """properties: of the machine, in words; measured: the weight formats that were timed on it."""

    properties: dict[str, str]
    measured: list[Measured]


def examine(home: Path, weights: str, cap: str) -> Examination:
    """What `fortwo doctor` found. home, weights, cap: the settings home, weights and isa."""
    return Examination(dict(_properties(home, weights, cap)), list(Measurements(home).all().values()))


def shown(found: Examination) -> Group:
    machine = views.table("", "")
    for name, value in found.properties.items():
        machine.add_row(name, value)
    if not found.measured:
        hint = "No base model was measured here yet. The first load with FORTWO_WEIGHTS=auto measures it."
        return Group(machine, "", hint)
    return Group(machine, *(part for one in found.measured for part in ("", _table(one))))


def _properties(home: Path, weights: str, cap: str) -> Iterator[tuple[str, str]]:
    yield "fortwo", f"{version('fortwo')}, torch {version('torch')}"
    yield "processor", f"{isa.processor()}, {hardware.cores()} cores"
    known = [name for name in INSTRUCTIONS if name in isa.flags()]
    yield "instructions", ", ".join(known) if known else "none that the kernels use"
    yield "memory", views.size(hardware.memory_bytes())
    yield "C compiler", build.compiler() or "none: torch's operations are used, int8 and int4 are not available"
    isa.cap(cap)
    if (level := isa.level()) == "none":
        yield "kernels", "none, as FORTWO_ISA says: torch's operations are used, int8 and int4 are not available"
    else:
        library = build.path(level)
        there = "compiled" if library.exists() else "compiled when a server starts"
        yield "kernels", f"{level or 'this processor'}: {library}, {there}"
    yield "home", str(home)
    yield "weights", weights + (", as measured below" if weights == "auto" else ", fixed by the setting")


def _table(one: Measured) -> Table:
    title = f"{one.model} on {one.processor}, {one.threads} threads: milliseconds for the matrix products of a forward"
    rows = views.table("rows", *one.seconds, "auto takes", title=title)
    for count in ROWS:
        spent = [f"{one.seconds[weight_format][count] * 1000:.1f}" for weight_format in one.seconds]
        rows.add_row(str(count), *spent, Choice(one.choice).format_for(count))
    return rows
