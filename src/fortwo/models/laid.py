"""Adapters in bf16, laid out for the kernel that adds what many of them change in many rows (step.h).

The idea of Punica's and S-LoRA's kernels (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285):
rows of any adapters share a forward, and each adapter's weights are read once. Shape suffixes as in `decoder`, and
N adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.forms import Regions
from fortwo.models.lora import Lora
from fortwo.models.lora_config import GROUPS

SIXTEEN = 16  # outputs that the kernel computes together
_NUMBERS = 18  # of step.h's `update`
OVER = 512  # numbers behind the last: a tile reads on where a rank does not fill it


@dataclass(frozen=True)
class Laid:
    """One adapter. flat: for each layer and fused product A, scaled, as (ranks / 16, in / 2, 16, 2), then each B as
    (out / 16, r / 2, 16, 2), with zeros where a rank is odd or ranks are no whole sixteens.

    table: step.h's `update` of each layer and fused product (layers, 4, 18).
    """

    flat: Tensor
    table: Tensor
    groups: tuple[frozenset[str], ...]  # of each layer, those that change

    @classmethod
    def of(cls, lora: Lora) -> Laid:
        """A copy. Outputs are whole sixteens."""
        parts: list[Tensor] = []
        table, at = [], 0

        def put(tensor: Tensor) -> int:
            nonlocal at
            parts.append(tensor.detach().flatten())
            at += tensor.numel()
            return at - tensor.numel()

        for groups in lora.layers:
            for name in GROUPS:
                numbers, rank = [0], 0
                if name in groups:
                    group = groups[name]
                    As = [_padded(group.A_RI[place.rows] * place.scale, 0, 2) for place in group.places]
                    A_RI = _padded(torch.cat(As), 0, SIXTEEN)
                    numbers = [len(A_RI), put(_in_pairs(A_RI)), len(As)]
                    for place, B_Or in zip(group.places, group.Bs, strict=True):
                        B_Or = _padded(B_Or, 1, 2)
                        r, columns = B_Or.shape[1], place.columns
                        numbers += [columns.start, columns.stop - columns.start, rank, r // 2, put(_in_pairs(B_Or))]
                        rank += r
                table.append(numbers + [0] * (_NUMBERS - len(numbers)))
        parts.append(torch.zeros(OVER))
        flat = Regions(0).hold(torch.cat([part.bfloat16() for part in parts]))
        return cls(flat, torch.tensor(table), tuple(frozenset(groups) for groups in lora.layers))


def _padded(tensor: Tensor, dimension: int, whole: int) -> Tensor:
    """With zeros, so that its size is a multiple of `whole`."""
    missing = -tensor.shape[dimension] % whole
    shape = [missing if n == dimension else size for n, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension) if missing else tensor


def _in_pairs(tensor: Tensor) -> Tensor:
    """(N, M) as (N / 16, M / 2, 16, 2)."""
    return tensor.reshape(-1, SIXTEEN, tensor.shape[1] // 2, 2).transpose(1, 2)


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
        kernels.call("add_updates", None, *told, index, *sizes, x_TI.bfloat16().contiguous(), y_TO)
