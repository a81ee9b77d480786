"""Adapters that are only served, stacked by shape, so that rows of many adapters take one batched product each.

The idea of BGMV and S-LoRA (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285) for torch's own
batched product: the adapters of a batch lie side by side in the stack, and their weights are read once, in place.
Shape suffixes as in `decoder`, and N adapters, M rows of each, r rank. This module knows no requests and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fortwo.nn.config import Shape
from fortwo.nn.lora import Lora, Segment, Update
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.lora_group import LoraGroup, Place
from fortwo.quantization.formats import Frozen

ROOM = 4  # adapters for which room is made at once
SPARE = 16  # adapters that have gone whose memory may stay
PADDING_COST = 0.05  # milliseconds a step: a row of padding in the batched product (r = 16, the bundled model)
APART_COST = 2.5  # an adapter with products of its own; about that much, too, the batched ones of the first adapter


@dataclass
class _Stack:
    """One fused product of all adapters: A (N, R, I), the scale of each of its rows, and B (N, r, O) per target."""

    places: tuple[Place, ...]
    scale_R: Tensor
    A_NRI: Tensor
    Bs: list[Tensor]

    @classmethod
    def empty(cls, group: LoraGroup, device: torch.device | str) -> _Stack:
        scales = [place.scale for place, B_Or in zip(group.places, group.Bs, strict=True) for _ in range(B_Or.shape[1])]
        return cls(
            group.places,
            torch.tensor(scales, device=device),
            torch.empty(0, *group.A_RI.shape, device=device),
            [torch.empty(0, *B_Or.t().shape, device=device) for B_Or in group.Bs],
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [self.A_NRI, *self.Bs]


class Bank:
    """Adapters of one shape (LoraConfig without dropout). keys: whose tensors lie in each place of the stacks."""

    def __init__(self, config: LoraConfig, decoder: Shape, device: torch.device | str) -> None:
        self.config = config
        self.keys: list[str] = []
        self._room = 0
        self._touched = 0  # places that were ever filled
        empty = Lora.init(config, decoder, seed=0)
        self.layers: list[dict[str, _Stack]] = [
            {name: _Stack.empty(group, device) for name, group in groups.items()} for groups in empty.layers
        ]

    def add(self, key: str, lora: Lora) -> None:
        """Copy the adapter's tensors to the end of the stacks."""
        if len(self.keys) == self._room:
            self._resize(self._room + ROOM)
        self.keys.append(key)
        self._touched = max(self._touched, len(self.keys))
        self.copy(key, lora)

    def copy(self, key: str, lora: Lora) -> None:
        """The adapter's tensors as they are now, over those that are held."""
        place = self.keys.index(key)
        with torch.no_grad():
            for stacks, groups in zip(self.layers, lora.layers, strict=True):
                for name, stack in stacks.items():
                    stack.A_NRI[place] = groups[name].A_RI
                    for B_NrO, B_Or in zip(stack.Bs, groups[name].Bs, strict=True):
                        B_NrO[place] = B_Or.t()

    def remove(self, key: str) -> None:
        """The last adapter takes its place."""
        place, last = self.keys.index(key), len(self.keys) - 1
        for tensor in self._tensors():
            tensor[place] = tensor[last]
        self.keys[place] = self.keys[last]
        self.keys.pop()
        if self._touched - len(self.keys) > SPARE:
            self._resize(-(-len(self.keys) // ROOM) * ROOM)

    def lora(self, key: str) -> Lora:
        """The adapter as views of the stacks, until the next change of the bank."""
        place = self.keys.index(key)
        return Lora(
            self.config,
            [
                {
                    name: LoraGroup(stack.places, stack.A_NRI[place], [B_NrO[place].t() for B_NrO in stack.Bs])
                    for name, stack in stacks.items()
                }
                for stacks in self.layers
            ],
        )

    def gather(self, keys: Sequence[str]) -> int:
        """Have these adapters among the first N of the stacks, at least half of which are theirs; N."""
        places = sorted(self.keys.index(key) for key in keys)
        if places[-1] < 2 * len(keys):
            return places[-1] + 1
        wanted = set(keys)
        free = [place for place in range(len(keys)) if self.keys[place] not in wanted]
        for here, there in zip(free, [place for place in places if place >= len(keys)], strict=True):
            for tensor in self._tensors():
                held = tensor[here].clone()
                tensor[here] = tensor[there]
                tensor[there] = held
            self.keys[here], self.keys[there] = self.keys[there], self.keys[here]
        return len(keys)

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for stacks in self.layers for stack in stacks.values() for tensor in stack.tensors)

    def _resize(self, room: int) -> None:
        def resized(old: Tensor) -> Tensor:
            new = old.new_empty(room, *old.shape[1:])
            new[: len(self.keys)] = old[: len(self.keys)]
            return new

        for stacks in self.layers:
            for stack in stacks.values():
                stack.A_NRI = resized(stack.A_NRI)
                stack.Bs = [resized(B_NrO) for B_NrO in stack.Bs]
        self._room, self._touched = room, len(self.keys)


class Stacked:
    """The rows of a forward that the first adapters of a bank answer for. rows: those of each place, at most M."""

    def __init__(self, bank: Bank, rows: Sequence[Sequence[int]], device: torch.device | str) -> None:
        self._bank = bank
        self._shape = len(rows), max(map(len, rows))
        M = self._shape[1]
        padded = [row for own in rows for row in (*own, *([0] * (M - len(own))))]
        self._taken_NM = torch.tensor(padded, device=device)
        self._rows = torch.tensor([row for own in rows for row in own], device=device)
        places = [place * M + n for place, own in enumerate(rows) for n in range(len(own))]
        self._places = None if len(places) == len(padded) else torch.tensor(places, device=device)

    def changes(self, layer: int, group: str) -> bool:
        return group in self._bank.layers[layer]

    def apply(self, y_TO: Tensor, x_TI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        del weight_OI
        stack = self._bank.layers[layer][group]
        N, M = self._shape
        x_NMI = x_TI.index_select(0, self._taken_NM).view(N, M, -1)
        h_NMR = torch.bmm(x_NMI, stack.A_NRI[:N].transpose(1, 2)).mul_(stack.scale_R)
        for place, B_NrO in zip(stack.places, stack.Bs, strict=True):
            u_NMO = torch.bmm(h_NMR[:, :, place.rows], B_NrO[:N])
            u_SO = u_NMO.view(N * M, -1)
            y_TO[:, place.columns].index_add_(0, self._rows, u_SO if self._places is None else u_SO[self._places])


class StackedAdapters:
    """`adapters.AdapterPool` of adapters in fp32, a bank for each shape."""

    def __init__(self, decoder: Shape, device: torch.device) -> None:
        self._decoder = decoder
        self._device = device
        self._banks: dict[LoraConfig, Bank] = {}
        self._homes: dict[str, Bank] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._homes

    def add(self, key: str, lora: Lora) -> None:
        shape = replace(lora.config, dropout=0.0)
        if shape not in self._banks:
            self._banks[shape] = Bank(shape, self._decoder, self._device)
        bank = self._banks[shape]
        bank.add(key, lora)
        self._homes[key] = bank

    def copy(self, key: str, lora: Lora) -> None:
        self._homes[key].copy(key, lora)

    def remove(self, key: str) -> None:
        bank = self._homes.pop(key, None)
        if bank is not None:
            bank.remove(key)
            if not bank.keys:
                del self._banks[bank.config]

    def lora(self, key: str) -> Lora:
        return self._homes[key].lora(key)

    def whole(self, key: str, rows: int) -> Update:
        del rows
        return Segment(self.lora(key))

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        """Batched, but for adapters with many more rows than others."""
        found: list[Update] = []
        for bank in dict.fromkeys(self._homes[key] for key in rows):
            own = {key: rows[key] for key in rows if self._homes[key] is bank}
            most = batched_rows([len(members) for members in own.values()])
            if batched := {key: members for key, members in own.items() if len(members) <= most}:
                N = bank.gather(list(batched))
                found.append(Stacked(bank, [batched.get(key, ()) for key in bank.keys[:N]], self._device))
            for key, members in own.items():
                if key not in batched:
                    found.append(Segment(bank.lora(key), torch.tensor(members, device=self._device)))
        return found


def batched_rows(counts: Sequence[int]) -> int:
    """The most rows of an adapter that go into the batched product, where every adapter is padded to them; 0: none."""

    def cost(most: int) -> float:
        batched = [count for count in counts if count <= most]
        padding = len(batched) * max(batched, default=0) - sum(batched)
        return PADDING_COST * padding + APART_COST * (len(counts) - len(batched)) + APART_COST * (len(batched) > 0)

    return min({0, *counts}, key=lambda most: (cost(most), most))
