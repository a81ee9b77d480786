"""One rank and one scale for all modules, for programs that know no patterns. The update stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fortwo.export.source import Source

if TYPE_CHECKING:
    from torch import Tensor


def rank(source: Source) -> int:
    """The largest rank of a module."""
    return max(source.halves(module)[0].shape[0] for module in source.modules)


def scale(source: Source) -> float:
    """The scale of all modules, or 1 where they differ."""
    scales = {source.lora.scale(module) for module in source.modules}
    return scales.pop() if len(scales) == 1 else 1.0


def halves(source: Source) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each module with A (r, in) and B (out, r) in fp32, of the common rank and for the common scale: smaller ones are
    filled up with zeros, and what a scale differs by is in B."""
    import torch.nn.functional as F

    whole, common = rank(source), scale(source)
    for module in source.modules:
        a, b = source.halves(module)
        b = b * (source.lora.scale(module) / common)
        missing = whole - a.shape[0]
        yield module, F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def names(source: Source) -> list[str]:
    """The modules as target_modules lists them: by the last part of the name."""
    return sorted({module.rpartition(".")[2] for module in source.modules})
