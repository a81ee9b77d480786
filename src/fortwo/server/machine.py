"""The native API of the machine: what it is, what it does, and what its owner should know."""

from __future__ import annotations

import shutil
from importlib.metadata import version

import psutil
from fastapi import APIRouter

from fortwo import hardware
from fortwo.kernels import build, isa
from fortwo.quantization.selection import Measurements
from fortwo.records import Json
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppStateDep

LITTLE_DISK = 2 << 30  # bytes

router = APIRouter(prefix="/api", tags=["server"], route_class=JsonRoute)


@router.get("/machine", summary="The machine, what the server does at present, and advice")
def machine(state: AppStateDep) -> Json:
    """Sizes in bytes. `replies` are those that run or wait; `queue` the ids of queued jobs, the next one first.
    `advice` is empty where nothing needs attention."""
    compiler, level, memory = build.compiler(), isa.level(), hardware.memory_bytes()
    free = shutil.disk_usage(state.settings.home).free
    measured = bool(Measurements(state.settings.home).all())
    return {
        "fortwo": version("fortwo"),
        "torch": version("torch"),
        "processor": isa.processor(),
        "cores": hardware.cores(),
        "threads": state.settings.threads,
        "device": state.settings.device,
        "train_device": state.settings.train_device,
        "memory": memory,
        "memory_available": min(memory, psutil.virtual_memory().available),
        "disk_free": free,
        "kernels": level or "for this processor",
        "weights": state.settings.weights,
        "home": str(state.settings.home),
        "replies": state.admission.active,
        "queue": state.jobs.queue(),
        "advice": advice(compiler is not None, level, free, measured or state.settings.weights != "auto"),
    }


def advice(compiler: bool, level: str | None, free: int, measured: bool) -> list[Json]:
    """What is worth knowing, each as {message, hint}. level: as in isa.level; free: bytes of disk; measured: whether
    the fastest form of the weights is known."""
    found = [
        (not compiler, "There is no C compiler.", "Install gcc or clang: without it torch's operations are used."),
        (level == "none", "FORTWO_ISA switches the kernels off.", "Set it to auto, unless you compare levels."),
        (free < LITTLE_DISK, "The disk is nearly full.", "Free some space, or move FORTWO_HOME to another disk."),
        (
            not measured,
            "The fastest form of a base's weights was not measured here yet.",
            "Load a base while no other program computes: then it is measured.",
        ),
    ]
    return [{"message": message, "hint": hint} for applies, message, hint in found if applies]
