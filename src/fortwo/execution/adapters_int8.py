"""Adapters in 8 bits, laid out for the kernel that adds what many of them change in many rows (step.h).

The idea of Punica's and S-LoRA's kernels (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285):
rows of any adapters share a forward, and each adapter's weights are read once. A row of A, and one of B, has a scale of
its own. Shape suffixes as in `decoder`, and N adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.nn.lora import Lora, Update
from fortwo.nn.lora_config import GROUPS
from fortwo.quantization.formats import Regions

SIXTEEN = 16  # outputs that the kernel computes together
_NUMBERS = 18  # of step.h's `update`
OVER = 512  # bytes behind the last: a tile reads on where a rank does not fill it


@dataclass(frozen=True)
class Laid:
    """One adapter. flat: for each layer and fused product A, then each B, in laid.h's slabs, with zeros where a rank is
    odd or ranks are no whole sixteens; A's scales hold the adapter's.

    table: step.h's `update` of each layer and fused product (layers, 4, 18).
    """

    flat: Tensor
    table: Tensor
    groups: tuple[frozenset[str], ...]  # of each layer, those that change

    @classmethod
    def of(cls, lora: Lora) -> Laid:
        """A copy. Outputs are whole sixteens."""
        matrices: list[list[int]] = []  # laid.h's
        scales: list[float] = []
        held: list[Tensor] = []  # they live as long as their addresses
        table, at = [], 0

        def put(x_NM: Tensor, at: int, first: int = 0, scale: float = 1.0) -> None:
            held.append(x_NM.contiguous())
            matrices.append([held[-1].data_ptr(), *x_NM.shape, at, first])
            scales.append(scale)

        for groups in lora.layers:
            for name in GROUPS:
                numbers = [0]
                if name in groups:
                    group, rank = groups[name], 0
                    ranks = [_whole(B_Or.shape[1], 2) for B_Or in group.Bs]
                    numbers = [_whole(sum(ranks), SIXTEEN), at, len(ranks)]
                    A_at, at = at, at + _slabs(numbers[0], group.A_RI.shape[1])
                    for place, B_Or, r in zip(group.places, group.Bs, ranks, strict=True):
                        put(group.A_RI[place.rows], A_at, rank, place.scale)
                        put(B_Or, at)
                        numbers += [place.columns.start, len(B_Or), rank, r // 2, at]
                        rank, at = rank + r, at + _slabs(len(B_Or), r)
                table.append(numbers + [0] * (_NUMBERS - len(numbers)))
        flat = Regions(0).zeros((at + OVER,), torch.int8)
        cpu.call("lay_slabs", None, len(matrices), torch.tensor(matrices), torch.tensor(scales), flat)
        return cls(flat, torch.tensor(table), tuple(frozenset(groups) for groups in lora.layers))


def _slabs(rows: int, row: int) -> int:
    """Bytes of so many rows of so many numbers."""
    return rows * (torch.float32.itemsize + row)


def _whole(size: int, of: int) -> int:
    return -(-size // of) * of


class Rows:
    """The rows of a forward that each of some adapters answers for. adapters_N4 and members are step.h's."""

    def __init__(self, answering: Sequence[tuple[Laid, Sequence[int]]]) -> None:
        self._laid = [laid for laid, _ in answering]  # they live as long as their addresses
        self.members = torch.tensor([row for _, rows in answering for row in rows])
        adapters, first = [], 0
        for laid, rows in answering:
            adapters.append([laid.table.data_ptr(), laid.flat.data_ptr(), first, first + len(rows)])
            first += len(rows)
        self.adapters_N4 = torch.tensor(adapters)

    def changes(self, layer: int, group: str) -> bool:
        return any(group in laid.groups[layer] for laid in self._laid)

    def add_to(self, y_TO: Tensor, x_TI: Tensor, layer: int, group: str) -> None:
        index = layer * len(GROUPS) + list(GROUPS).index(group)
        sizes = len(x_TI), x_TI.shape[1], y_TO.shape[1]
        told = len(self.adapters_N4), self.adapters_N4, self.members
        cpu.call("add_updates", None, *told, index, *sizes, x_TI.float().contiguous(), y_TO)


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
