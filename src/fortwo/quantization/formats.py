"""Frozen weights in several formats, and which of them multiplies how many rows.

A format holds one weight (O, I) and multiplies with it: fp32 exactly, bf16, int8 and int4 in groups of 32 inputs (see
`grouped`), NF4 (see `nf4`), and gguf, the numbers of a quantised file (see `blocks`). A `Weight` holds one or more of
them and takes, for each number of rows, the one its `Choice` names.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.quantization import matmul
from fortwo.quantization.blocks import Blocks
from fortwo.quantization.grouped import Grouped, Parts
from fortwo.quantization.nf4 import Nf4
from fortwo.quantization.selection import FORMATS, Choice
from fortwo.quantization.tiles import Tiles

REGION = 32 << 20  # bytes of memory taken at once for quantised weights


class WeightFormat(Protocol):
    """One way to hold a weight."""

    @property
    def nbytes(self) -> int: ...

    def product(self, x_TI: Tensor) -> Tensor:
        """x @ weight.T as fp32."""

    def dense(self) -> Tensor:
        """The weight as this format has it: a bf16 tensor for bf16, else fp32."""


class HugePageArena:
    """Memory for weights in large pages: a product of one row reads all weights once and would wait for page tables.

    region: bytes that are taken at once."""

    def __init__(self, region: int = REGION) -> None:
        self._size = region
        self._region = torch.empty(0, dtype=torch.uint8)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy in such memory; on another device than the CPU the tensor itself."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in such memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // 64) * 64
        if size > len(self._region):
            pages = mmap.mmap(-1, max(size, self._size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._region = torch.frombuffer(pages, dtype=torch.uint8)
        taken, self._region = self._region[:nbytes], self._region[size:]
        return taken.view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class Dense:
    """fp32 or bf16."""

    weight_OI: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight_OI.nbytes

    def product(self, x_TI: Tensor) -> Tensor:
        return matmul.product(x_TI, self.weight_OI)

    def dense(self) -> Tensor:
        return self.weight_OI


class Weight:
    """A frozen weight (O, I) in the formats that `choice` names, and perhaps more. nearest: the format that is nearest
    to the original; None: the first in FORMATS."""

    dtype = torch.float32  # of what it multiplies and gives

    def __init__(
        self, shape: Sequence[int], formats: Mapping[str, WeightFormat], choice: Choice, nearest: str | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.formats = dict(formats)
        self.choice = choice
        self._nearest = next(name for name in FORMATS if name in self.formats) if nearest is None else nearest

    @property
    def nbytes(self) -> int:
        return sum(weight_format.nbytes for weight_format in self.formats.values())

    def product(self, x_TI: Tensor) -> Tensor:
        return self.formats[self.choice.format_for(x_TI.shape[0])].product(x_TI)

    def rows(self, numbers_T: Tensor) -> Tensor:
        """Rows of the weight (T, I) as fp32, from the format that is nearest to the original."""
        weight_format = self.formats[self._nearest]
        if isinstance(weight_format, Grouped | Parts):
            return weight_format.rows(numbers_T)
        return weight_format.dense()[numbers_T].float()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a tensor, from the format that is nearest to the original."""
        if dtype == torch.bfloat16 and "bf16" in self.formats:
            return self.formats["bf16"].dense()
        return self.formats[self._nearest].dense().to(dtype)


class Dequantised(Weight):
    """A weight in NF4 to train on, as QLoRA does: its products, forward and (by `t`) backward, are in `dtype`, and make
    it dense part by part. Gradients are those of the dense weight."""

    def __init__(self, weight_format: Nf4, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__(
            weight_format.shape[::-1] if transposed else weight_format.shape,
            {"nf4": weight_format},
            Choice.fixed("nf4"),
        )
        self.dtype = dtype
        self._nf4, self._transposed = weight_format, transposed

    def t(self) -> Dequantised:
        return Dequantised(self._nf4, self.dtype, not self._transposed)

    def product(self, x_TI: Tensor) -> Tensor:
        multiply = self._nf4.backward if self._transposed else self._nf4.forward
        return multiply(x_TI, self.dtype, x_TI.dtype)


Frozen = Tensor | Tiles | Weight


def as_in_file(weight: Blocks, arena: HugePageArena) -> Weight:
    """A weight of a quantised GGUF file in the file's numbers."""
    return Weight(weight.shape, {"gguf": weight.grouped(arena)}, Choice.fixed("gguf"))


def dense(weight_OI: Frozen, dtype: torch.dtype) -> Tensor:
    match weight_OI:
        case Weight():
            return weight_OI.dense(dtype)
        case Tiles():
            return weight_OI.dense().to(dtype)
    return weight_OI.to(dtype)


def trained_on(weight_OI: Frozen, arena: HugePageArena, dtype: torch.dtype = torch.bfloat16) -> Frozen:
    """The weight for products in `dtype` there and back. What is held in NF4 alone stays so; fp32, and tiles, that are
    held already are not copied."""
    if (weight_format := _nf4_alone(weight_OI)) is not None:
        return Dequantised(weight_format, dtype)
    tiles = _tiles(weight_OI)
    if not _becomes_tiles(weight_OI, dtype):
        return dense(weight_OI, dtype)
    return Tiles.of(dense(weight_OI, dtype), arena) if tiles is None else tiles


def to_train(dtype: torch.dtype) -> Callable[[Frozen, bool], Frozen]:
    """`trained_on` for all weights of a network, which share an arena. The second argument, whether it is the head, has
    no effect."""
    arena = HugePageArena()
    return lambda weight, is_head: trained_on(weight, arena, dtype)


def bytes_to_train(weight_OI: Frozen, dtype: torch.dtype) -> int:
    """What `trained_on` takes beside the weight."""
    size = math.prod(weight_OI.shape) * dtype.itemsize
    if _nf4_alone(weight_OI) is not None:
        return 0
    if _becomes_tiles(weight_OI, dtype):
        return 0 if _tiles(weight_OI) is not None else size
    return 0 if any(isinstance(one, Tensor) and one.dtype == dtype for one in _held(weight_OI)) else size


def _becomes_tiles(weight_OI: Frozen, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` take this weight as tiles: on a processor that has them, and there alone."""
    on_gpu = any(
        (one.codes if isinstance(one, Nf4) else one).is_cuda
        for one in _held(weight_OI)
        if isinstance(one, Tensor | Nf4)
    )
    return dtype == torch.bfloat16 and not on_gpu and cpu.multiplies_tiles()


def _nf4_alone(weight_OI: Frozen) -> Nf4 | None:
    if not isinstance(weight_OI, Weight) or len(weight_OI.formats) > 1:
        return None
    (weight_format,) = weight_OI.formats.values()
    return weight_format if isinstance(weight_format, Nf4) else None


def _tiles(weight_OI: Frozen) -> Tiles | None:
    return next((one for one in _held(weight_OI) if isinstance(one, Tiles)), None)


def _held(weight_OI: Frozen) -> list[Tensor | WeightFormat]:
    """What holds the weight: its formats, of which a dense one is its tensor."""
    held = list(weight_OI.formats.values()) if isinstance(weight_OI, Weight) else [weight_OI]
    return [one.weight_OI if isinstance(one, Dense) else one for one in held]


def quantize(name: str, weight_OI: Tensor, arena: HugePageArena) -> WeightFormat:
    """`weight_OI`, of any type of number, in the format `name`. Its width must fit (`fits`)."""
    match name:
        case "fp32":
            return Dense(weight_OI.float())
        case "bf16":
            if cpu.usable(weight_OI) and cpu.multiplies_tiles():
                return Tiles.of(weight_OI.bfloat16(), arena)
            return Dense(arena.hold(weight_OI.bfloat16()))
        case "int8" | "int4":
            return Grouped.of(weight_OI, int(name.removeprefix("int")), arena)
        case "nf4":
            return Nf4.of(weight_OI, arena)
    raise ValueError(name)


def head_format(name: str) -> str:
    """How a head that is a tensor is held where the rest has the format `name`: of what 4 bits lose it would lose most,
    so GGUF's files and QLoRA have it wider, too."""
    return {"int4": "int8", "nf4": "bf16", "gguf": "bf16"}.get(name, name)


def fits(name: str, weights: Iterable[Tensor]) -> bool:
    """Whether every weight can have this format here."""
    if name in ("int8", "int4"):
        return all(Grouped.fits(weight_OI) for weight_OI in weights)
    if name == "gguf":  # what only blocks of a file become (`as_in_file`)
        return False
    return name != "nf4" or all(Nf4.fits(weight_OI) for weight_OI in weights)
