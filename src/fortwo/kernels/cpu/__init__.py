"""Kernels in C for the CPU, compiled for this machine (`build`) and called as their header declares them.

`lib().name(...)` calls a kernel. cffi reads the types of its arguments from fortwo_kernels.h, the header that the C is
compiled from, and raises TypeError for others. `pointer` hands a tensor over, `ffi.new` makes the header's structs.
Where there is no C compiler, or on another device or another type of number, `usable` says so and `operations` computes
the same with torch.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from cffi import FFI
from torch import Tensor

from fortwo.kernels import build, isa

log = logging.getLogger(__name__)
ffi = FFI()
ffi.cdef(re.sub(r"^#.*$", "", build.HEADER.read_text(), flags=re.MULTILINE))
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # elements of kernels that exist for several types
_C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
}
# Adding to a null pointer of the type takes a quarter of the time of a cast. By type, with the shift from bytes to it.
_BASES = {t: (ffi.cast(f"{name} *", 0), t.itemsize.bit_length() - 1) for t, name in _C_TYPES.items()}


def prepare() -> None:
    """Compile and load what is used, so that no request has to wait for it."""
    lib()


def identity() -> str:
    """What tells these kernels, compiled for this machine, from others; empty where there are none."""
    return "" if lib() is None else build.path(isa.level()).stem


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    for tensor in tensors:
        if tensor.dtype not in _NAMES or not tensor.is_cpu:
            return False
    return lib() is not None


def multiplies_tiles() -> bool:
    """Whether the kernels in use multiply bf16 by blocks (tiles.h): on AMX's tiles, where the system lets this process
    use them, or by AVX-512's products of pairs."""
    library = lib()
    return library is not None and _tiles(library)


def widening_rows() -> int | None:
    """From how many rows on weights in 4 to 8 bits are multiplied faster as bf16: on AMX's tiles, and by AVX-512 where
    its products of pairs are measured to be fast. None if they never are."""
    library = lib()
    return (library.widening_rows() or None) if library is not None and _tiles(library) else None


@cache
def _tiles(library: Kernels) -> bool:
    return hasattr(library, "gemm_bf16") and bool(library.tiles_allowed())


def pointer(tensor: Tensor | None, strided: bool = False) -> Any:
    """The tensor's first number as a kernel takes it, which must not outlive the tensor; null for None.

    strided: for a kernel that is told the strides. Raises TypeError for a tensor that is not contiguous, not on the
    CPU, or of a type that no kernel takes; the call raises it where the kernel takes another type.
    """
    if tensor is None:
        return ffi.NULL
    base = _BASES.get(tensor.dtype)
    if base is None or not tensor.is_cpu or not (strided or tensor.is_contiguous()):
        raise TypeError(f"no kernel takes this tensor: {tensor.dtype}, {tensor.device}, strides {tensor.stride()}")
    return base[0] + (tensor.data_ptr() >> base[1])


class Kernels:
    """The kernels of one level, as methods. Tensors are handed over by `pointer`, None as null; they live until the
    kernel returns. A kernel that the level does not have is no attribute."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            return kernel(*[pointer(one) if one is None or isinstance(one, Tensor) else one for one in arguments])

        setattr(self, name, call)
        return call


def array(struct: str, values: Iterable[Any]) -> Any:
    """Structs of the header, one after the other, each a tuple of its fields' values."""
    return ffi.new(f"{struct}[]", list(values))


def typed(kernel: str, element: torch.dtype) -> str:
    """The name of the kernel for this type of element."""
    return f"{kernel}_{_NAMES[element]}"


def run(kernel: str, element: torch.dtype, *arguments: Any) -> None:
    """Run the kernel for this type of element."""
    getattr(kernels(), typed(kernel, element))(*arguments)


def kernels() -> Kernels:
    """The kernels for the level in use, which exist: see `usable`."""
    found = lib()
    assert found is not None, "there are no kernels"
    return found


@cache
def lib() -> Kernels | None:
    """The kernels for the level in use; None where FORTWO_ISA is none or, with a warning, where they cannot be had."""
    level = isa.level()
    return None if level == "none" else library(level)


@cache
def library(level: str | None) -> Kernels | None:
    """The kernels for a level that the processor has; None, with a warning, where they cannot be had."""
    try:
        # OpenMP is torch's: it is loaded already, under the same name.
        return Kernels(ffi.dlopen(str(build.library(level))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("no C kernels, torch's own operations take their place: %s", said)
        return None
