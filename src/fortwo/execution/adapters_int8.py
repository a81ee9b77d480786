"""Adapters in 8 bits, laid out for the kernel that adds what many of them change in many rows (adapters_int8.c).

The idea of Punica's and S-LoRA's kernels (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285):
rows of any adapters share a forward, and each adapter's weights are read once. A row of A, and one of B, has a scale of
its own. Shape suffixes as in `decoder`, and N adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.nn.lora import Lora, Update
from fortwo.nn.lora_config import GROUPS
from fortwo.quantization.formats import Frozen, HugePageArena

SIXTEEN = 16  # outputs that the kernel computes together
OVER = 512  # bytes behind the last: a tile reads on where a rank does not fill it


@dataclass(frozen=True)
class Laid:
    """One adapter. flat: for each layer and fused product A, then each B, in the kernel's blocks, with zeros where a
    rank is odd or ranks are no whole sixteens; A's scales hold the adapter's.

    scales: DoRA's, of the outputs. table: the adapter_product of each layer and fused product, which points to them.
    """

    flat: Tensor
    scales: tuple[Tensor, ...]
    table: Any
    groups: tuple[frozenset[str], ...]  # of each layer, those that change

    @classmethod
    def of(cls, lora: Lora) -> Laid:
        """A copy. Outputs are whole sixteens."""
        matrices: list[tuple[Any, ...]] = []  # each adapter_matrix
        held: list[Tensor] = []  # they live as long as their addresses
        scales: list[Tensor] = []
        table: list[tuple[Any, ...]] = []
        at = 0

        def put(x_NM: Tensor, at: int, first: int = 0, scale: float = 1.0) -> None:
            held.append(x_NM.contiguous())
            matrices.append((cpu.pointer(held[-1]), *x_NM.shape, at, first, scale))

        for groups in lora.layers:
            for name in GROUPS:
                product: tuple[Any, ...] = ()
                if name in groups:
                    group, rank, parts = groups[name], 0, list[tuple[int, ...]]()
                    ranks = [_whole(B_Or.shape[1], 2) for B_Or in group.Bs]
                    product = _whole(sum(ranks), SIXTEEN), at, len(ranks), parts, cpu.ffi.NULL
                    if group.scale_O is not None:
                        padding = _whole(len(group.scale_O), 2 * SIXTEEN) - len(group.scale_O)
                        scales.append(F.pad(group.scale_O, (0, padding)))
                        product = *product[:-1], cpu.pointer(scales[-1])
                    A_at, at = at, at + _blocks(product[0], group.A_RI.shape[1])
                    for place, B_Or, r in zip(group.places, group.Bs, ranks, strict=True):
                        put(group.A_RI[place.rows], A_at, rank, place.scale)
                        put(B_Or, at)
                        parts.append((place.columns.start, len(B_Or), rank, r // 2, at))
                        rank, at = rank + r, at + _blocks(len(B_Or), r)
                table.append(product)
        flat = HugePageArena(0).zeros((at + OVER,), torch.int8)
        cpu.kernels().pack_adapter(len(matrices), cpu.array("adapter_matrix", matrices), flat)
        return cls(
            flat, tuple(scales), cpu.array("adapter_product", table), tuple(frozenset(groups) for groups in lora.layers)
        )


def _blocks(rows: int, row: int) -> int:
    """Bytes of so many rows of so many numbers."""
    return rows * (torch.float32.itemsize + row)


def _whole(size: int, of: int) -> int:
    return -(-size // of) * of


class Rows:
    """The rows of a forward that each of some adapters answers for. adapters and members are the kernel's."""

    def __init__(self, answering: Sequence[tuple[Laid, Sequence[int]]]) -> None:
        self._laid = [laid for laid, _ in answering]  # they live as long as their addresses
        self.members = torch.tensor([row for _, rows in answering for row in rows])
        adapters, first = [], 0
        for laid, rows in answering:
            adapters.append((laid.table, cpu.pointer(laid.flat), first, first + len(rows)))
            first += len(rows)
        self.adapters = cpu.array("adapter", adapters)

    def changes(self, layer: int, group: str) -> bool:
        return any(group in laid.groups[layer] for laid in self._laid)

    def apply(self, y_TO: Tensor, x_TI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        del weight_OI
        index = layer * len(GROUPS) + list(GROUPS).index(group)
        sizes = len(x_TI), x_TI.shape[1], y_TO.shape[1]
        told = len(self.adapters), self.adapters, self.members
        cpu.kernels().add_adapters(*told, index, *sizes, x_TI.float().contiguous(), y_TO)


class Int8Adapters:
    """`adapters.AdapterPool` of adapters laid out for the kernel."""

    def __init__(self) -> None:
        self._laid: dict[str, Laid] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._laid

    def add(self, key: str, lora: Lora) -> None:
        self._laid[key] = Laid.of(lora)

    copy = add

    def remove(self, key: str) -> None:
        self._laid.pop(key, None)

    def whole(self, key: str, rows: int) -> Update:
        return Rows([(self._laid[key], range(rows))])

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        return [Rows([(self._laid[key], own) for key, own in rows.items()])] if rows else []
