"""Adapters in bf16, laid out for the kernel that adds what many of them change in many rows (step.h).

The idea of Punica's and S-LoRA's kernels (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285):
rows of any adapters share a forward, and each adapter's weights are read once. Shape suffixes as in `decoder`, and
N adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.forms import Regions
from fortwo.models.lora import Lora, LoraGroup, Place
from fortwo.models.lora_config import GROUPS

SIXTEEN = 16  # outputs that the kernel computes together
_NUMBERS = 18  # of step.h's `update`
_OFFSETS = [1, 7, 12, 17]  # those of them that say where A and each B begin


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
        flats, tables, at = [], [], 0
        for _, run in groupby(lora.layers, _places):
            flat_LN, table_LGN = _lay(list(run), at)
            flats.append(flat_LN.flatten())
            tables.append(table_LGN.flatten(0, 1))
            at += flat_LN.numel()
        flat = Regions(0).hold(torch.cat(flats))
        return cls(flat, torch.cat(tables), tuple(frozenset(groups) for groups in lora.layers))


def _places(groups: dict[str, LoraGroup]) -> list[tuple[Place, ...]]:
    """What is the same in layers that are laid out together."""
    return [groups[name].places if name in groups else () for name in GROUPS]


def _lay(layers: Sequence[dict[str, LoraGroup]], begin: int) -> tuple[Tensor, Tensor]:
    """flat (L, its length) and table (L, 4, 18) of L layers alike, the first of which lies at `begin`."""
    parts: list[Tensor] = []
    at, table = 0, []

    def put(tensor_LNM: Tensor) -> int:
        nonlocal at
        parts.append(_in_pairs(tensor_LNM))
        at += parts[-1].shape[1]
        return at - parts[-1].shape[1]

    for name in GROUPS:
        numbers, rank = [0], 0
        if name in layers[0]:
            places = layers[0][name].places
            A_LRI = torch.stack([groups[name].A_RI.detach() for groups in layers])
            As = [_padded((A_LRI[:, place.rows] * place.scale).bfloat16(), 1, 2) for place in places]
            A_LRI = _padded(torch.cat(As, 1), 1, SIXTEEN)
            numbers = [A_LRI.shape[1], put(A_LRI), len(places)]
            for n, place in enumerate(places):
                B_LOr = torch.stack([groups[name].Bs[n].detach() for groups in layers])
                B_LOr = _padded(B_LOr.bfloat16(), 2, 2)
                r, columns = B_LOr.shape[2], place.columns
                numbers += [columns.start, columns.stop - columns.start, rank, r // 2, put(B_LOr)]
                rank += r
        table.append(numbers + [0] * (_NUMBERS - len(numbers)))
    flat_LN = torch.cat(parts, 1) if parts else torch.empty(len(layers), 0, dtype=torch.bfloat16)
    table_LGN = torch.tensor(table).repeat(len(layers), 1, 1)
    table_LGN[:, :, _OFFSETS] += begin + at * torch.arange(len(layers))[:, None, None]
    return flat_LN, table_LGN


def _padded(tensor: Tensor, dimension: int, whole: int) -> Tensor:
    """With zeros, so that its size is a multiple of `whole`."""
    missing = -tensor.shape[dimension] % whole
    shape = [missing if n == dimension else size for n, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension) if missing else tensor


def _in_pairs(tensor_LNM: Tensor) -> Tensor:
    """Each (N, M) as (N / 16, M / 2, 16, 2), flat. Two numbers are moved as one."""
    L, N, M = tensor_LNM.shape
    pairs = tensor_LNM.view(torch.int32).view(L, N // SIXTEEN, SIXTEEN, M // 2)
    return pairs.transpose(2, 3).flatten(1).view(torch.bfloat16)


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
