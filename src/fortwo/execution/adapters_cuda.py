"""Adapters on a GPU: each by itself, found by its address, so that rows of any of them share a forward.

The idea of Punica's and S-LoRA's kernels (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285),
which take adapters of any rank where they lie. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fortwo.kernels import cuda
from fortwo.nn.lora import Lora, Segment, Update
from fortwo.nn.lora_config import GROUPS
from fortwo.nn.lora_group import LoraGroup
from fortwo.quantization.formats import Frozen

_PLACES = {group: place for place, group in enumerate(GROUPS)}


@dataclass(frozen=True)
class Tabled:
    """One adapter. lora: a copy whose Bs hold the scale. table: cuda.ENTRY numbers for each layer and fused product."""

    lora: Lora
    table: Tensor
    most: int  # ranks of the fused product that has the most

    @classmethod
    def of(cls, lora: Lora, dtype: torch.dtype, device: torch.device) -> Tabled:
        layers = [{name: _copy(group, dtype, device) for name, group in groups.items()} for groups in lora.layers]
        entries = [_entry(groups.get(name)) for groups in layers for name in GROUPS]
        most = max(ranks for _, ranks, *_ in entries)
        return cls(Lora(replace(lora.config, dropout=0.0), layers), torch.tensor(entries, device=device), most)


def _copy(group: LoraGroup, dtype: torch.dtype, device: torch.device) -> LoraGroup:
    places = tuple(place._replace(scale=1.0) for place in group.places)
    Bs = [
        (B_Or.detach() * place.scale).to(device, dtype).contiguous()
        for place, B_Or in zip(group.places, group.Bs, strict=True)
    ]
    return LoraGroup(places, group.A_RI.detach().to(device, dtype, copy=True).contiguous(), Bs)


def _entry(group: LoraGroup | None) -> list[int]:
    if group is None:
        return [0] * cuda.ENTRY
    numbers = [group.A_RI.data_ptr(), len(group.A_RI)]
    for place, B_Or in zip(group.places, group.Bs, strict=True):
        numbers += [B_Or.data_ptr(), B_Or.shape[1], place.rows.start, place.columns.start, place.columns.stop]
    return numbers + [0] * (cuda.ENTRY - len(numbers))


class OwnRows:
    """What each row's own adapter adds. owners_B: as `cuda.add_own` takes them."""

    def __init__(self, owners_B: Tensor, most: int) -> None:
        self._owners_B, self._most = owners_B, most

    def changes(self, layer: int, group: str) -> bool:
        del layer, group
        return True

    def apply(self, y_TO: Tensor, x_TI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        del weight_OI
        cuda.add_own(self._owners_B, x_TI, y_TO, layer * len(GROUPS) + _PLACES[group], self._most)


class TabledAdapters:
    """`adapters.AdapterPool` of adapters on a GPU, as `dtype`."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._held: dict[str, Tabled] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def add(self, key: str, lora: Lora) -> None:
        self._held[key] = Tabled.of(lora, self._dtype, self._device)

    copy = add

    def remove(self, key: str) -> None:
        self._held.pop(key, None)

    @property
    def most(self) -> int:
        """Ranks of the fused product that has the most."""
        return max((held.most for held in self._held.values()), default=0)

    def address(self, key: str | None) -> int:
        """Of the adapter's table; 0 for none."""
        return 0 if key is None else self._held[key].table.data_ptr()

    def whole(self, key: str, rows: int) -> Update:
        del rows
        return Segment(self._held[key].lora)

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        placed = {key: torch.tensor(own, device=self._device) for key, own in rows.items()}
        return [Segment(self._held[key].lora, own) for key, own in placed.items()]
