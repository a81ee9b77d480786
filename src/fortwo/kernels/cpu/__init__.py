"""Kernels in C for the CPU, compiled for this machine the first time they are needed.

Where there is no C compiler, or on another device or another type of number, `usable` says so and `operations` computes
the same with torch. The library lies in __pycache__, as Python's own compiled files do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fortwo.kernels import isa

log = logging.getLogger(__name__)
_HEADERS = "kernels vectors matrix attention adapted layer losses quantised nf4 decode step prefill laid"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", *(f"{name}.h" for name in _HEADERS.split())))
_COMPILE = (
    *("cc", "-O3", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
_TYPES = (torch.float32, torch.bfloat16)
_kernels: dict[tuple[str, torch.dtype | None], Any] = {}


def identity() -> str:
    """What tells these kernels, compiled for this machine, from others; empty where there are none."""
    return "" if _library() is None else _compiled().stem


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    for tensor in tensors:
        if tensor.dtype not in _TYPES or tensor.device.type != "cpu":
            return False
    return _library() is not None


@cache
def multiplies_tiles() -> bool:
    """Whether there is a `matrix_product`: the processor has AMX's bf16 tiles and the system lets us use them."""
    library = _library()
    return library is not None and hasattr(library, "tiles_allowed") and bool(library.tiles_allowed())


def call(kernel: str, element: torch.dtype | None, *arguments: Tensor | bytes | float | int | None) -> None:
    """Run a kernel. Tensors and bytes are passed by address and must be contiguous; None is an absent one.

    element: for kernels that there are for several types. The kinds of the arguments are those of the first call.
    """
    function = _kernels.get((kernel, element))
    if function is None:
        function = _kernels[kernel, element] = _kernel(kernel, element, arguments)
    function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def _kernel(name: str, element: torch.dtype | None, arguments: tuple[Any, ...]) -> Any:
    function = getattr(_library(), name if element is None else f"{name}_{str(element).removeprefix('torch.')}")
    function.restype = None
    kinds = {float: ctypes.c_float, int: ctypes.c_long}
    function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments]
    return function


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None where FORTWO_ISA is none or, with a warning, where it cannot be had."""
    if isa.level() == "none":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))  # OpenMP is torch's: it is loaded already, under the same name
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("no C kernels, torch's own operations take their place: %s", said)
        return None


def _compiled() -> Path:
    command = (*_COMPILE, *isa.compiler_flags())
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    digest = hashlib.sha256(sources + " ".join(command).encode() + _processor()).hexdigest()[:16]
    home = Path(__file__).with_name("__pycache__")
    if not os.access(home if home.exists() else home.parent, os.W_OK):
        home = Path(tempfile.mkdtemp(prefix="fortwo-"))
    library = home / f"kernels-{digest}.so"
    if not library.exists():
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as beside:
            built = Path(beside) / library.name
            subprocess.run([*command, "-o", built, _SOURCES[0], "-lm"], check=True, capture_output=True, text=True)
            built.replace(library)
    return library


def _processor() -> bytes:
    """What tells one kind of processor from another."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"".join(sorted({line for line in lines if line.startswith((b"model name", b"flags"))}))
