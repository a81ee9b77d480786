"""Adapters that are only served, stacked by shape, so that rows of many adapters share a forward.

The idea of BGMV and S-LoRA (Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285): each adapter's
weights are read once, in place. In bf16 by a kernel of our own (step.h); elsewhere by torch's batched product, for
which the adapters of a batch lie side by side. Shape suffixes as in `decoder`, and N adapters, M rows of each, r rank.
This module knows no requests and no files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.lora import GROUPS, Lora, LoraConfig, LoraGroup, Segment, Update

if TYPE_CHECKING:
    from fortwo.models.decoder import DecoderConfig

_UPDATE = 18  # numbers of step.h's `update`
ROOM = 64  # adapters for which room is made at once on the CPU, where memory that was never touched costs nothing
ROOM_ELSEWHERE = 8
SPARE = 16  # adapters that have gone whose memory may stay
PADDING_COST = 0.05  # milliseconds a step: a row of padding in the batched product (r = 16, the bundled model)
APART_COST = 2.5  # an adapter with products of its own; about that much, too, the batched ones of the first adapter


@dataclass
class _Stack:
    """One fused product of all adapters: A (N, R, I), and (first, past-last column, B (N, r, O)) per target."""

    A_NRI: Tensor
    Bs: list[tuple[int, int, Tensor]]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.A_NRI, *(B_NrO for *_, B_NrO in self.Bs)]


class Bank:
    """Adapters of one shape (LoraConfig without dropout), held in `dtype`. keys: whose tensors lie in each place of the
    stacks."""

    def __init__(
        self,
        config: LoraConfig,
        decoder: DecoderConfig,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.keys: list[str] = []
        self._table: Tensor | None = None
        self._in_sixteens = dtype == torch.bfloat16
        self._room = 0
        self._step = ROOM if torch.device(device).type == "cpu" else ROOM_ELSEWHERE
        self._touched = 0  # places that were ever filled
        empty = Lora.init(config, decoder, seed=0)
        self.layers: list[dict[str, _Stack]] = [
            {
                name: _Stack(
                    torch.empty(0, *group.A_RI.shape, device=device, dtype=dtype),
                    [
                        (first, last, torch.empty(0, *self._laid(B_Or).shape, device=device, dtype=dtype))
                        for first, last, B_Or in group.Bs
                    ],
                )
                for name, group in groups.items()
            }
            for groups in empty.layers
        ]

    def add(self, key: str, lora: Lora) -> None:
        """Copy the adapter's tensors to the end of the stacks."""
        if len(self.keys) == self._room:
            self._resize(self._room + self._step)
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
                    for (*_, B_NrO), (*_, B_Or) in zip(stack.Bs, groups[name].Bs, strict=True):
                        B_NrO[place] = self._laid(B_Or)

    def remove(self, key: str) -> None:
        """The last adapter takes its place."""
        place, last = self.keys.index(key), len(self.keys) - 1
        for tensor in self._tensors():
            tensor[place] = tensor[last]
        self.keys[place] = self.keys[last]
        self.keys.pop()
        if self._touched - len(self.keys) > SPARE:
            self._resize(-(-len(self.keys) // self._step) * self._step)

    def lora(self, key: str) -> Lora:
        """The adapter as views of the stacks, until the next change of the bank."""
        place = self.keys.index(key)
        return Lora(
            self.config,
            [
                {
                    name: LoraGroup(
                        stack.A_NRI[place],
                        [(first, last, self._plain(B_NrO[place])) for first, last, B_NrO in stack.Bs],
                    )
                    for name, stack in stacks.items()
                }
                for stacks in self.layers
            ],
        )

    @property
    def table(self) -> Tensor:
        """step.h's `update` of each layer and fused product (layers, 4, 18); moves when the bank grows."""
        if self._table is None:
            self._table = torch.tensor([[_update(groups.get(name)) for name in GROUPS] for groups in self.layers])
        return self._table

    def _laid(self, B_Or: Tensor) -> Tensor:
        """B as the stack holds it: (r, O), or for the kernel (O / 16, r, 16)."""
        return B_Or.view(-1, 16, B_Or.shape[1]).transpose(1, 2) if self._in_sixteens else B_Or.t()

    def _plain(self, laid: Tensor) -> Tensor:
        return laid.transpose(1, 2).reshape(-1, laid.shape[1]) if self._in_sixteens else laid.t()

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
                stack.Bs = [(first, last, resized(B_NrO)) for first, last, B_NrO in stack.Bs]
        self._room, self._touched, self._table = room, len(self.keys), None


def _update(stack: _Stack | None) -> list[int]:
    if stack is None:
        return [0] * _UPDATE
    found, rank = [stack.A_NRI.shape[1], stack.A_NRI.data_ptr(), len(stack.Bs)], 0
    for first, last, B_NrO in stack.Bs:
        r = B_NrO.shape[2]  # they are in sixteens
        found += [first, last - first, rank, r, B_NrO.data_ptr()]
        rank += r
    return found + [0] * (_UPDATE - len(found))


class Rows:
    """The rows of a forward that adapters of banks in bf16 answer for. rows: of each adapter, None for all of them.

    adapters_N5 and members are step.h's; the banks must not change in the meantime.
    """

    def __init__(self, answering: Mapping[tuple[Bank, str], Sequence[int] | None]) -> None:
        self._banks = [bank for bank, _ in answering]
        self._whole = [rows for rows in answering.values()] == [None]
        self.members = torch.tensor([row for rows in answering.values() for row in rows or ()], dtype=torch.int64)
        adapters, first = [], 0
        for (bank, key), rows in answering.items():
            last = first + len(rows or ())
            adapters.append([bank.table.data_ptr(), bank.keys.index(key), first, last, bits(bank.config.scale)])
            first = last
        self.adapters_N5 = torch.tensor(adapters)

    def changes(self, layer: int, group: str) -> bool:
        return any(group in bank.layers[layer] for bank in self._banks)

    def add_to(self, y_TO: Tensor, x_TI: Tensor, layer: int, group: str) -> None:
        if self._whole and len(self.members) != len(x_TI):
            self.members = torch.arange(len(x_TI))
            self.adapters_N5[0, 3] = len(x_TI)
        index = layer * len(GROUPS) + list(GROUPS).index(group)
        sizes = len(x_TI), x_TI.shape[1], y_TO.shape[1]
        x_TI = x_TI.bfloat16().contiguous()
        kernels.call("add_updates", None, len(self.adapters_N5), self.adapters_N5, self.members, index, *sizes, x_TI, y_TO)


def bits(number: float) -> int:
    """A double's bits as a whole number."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


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

    def add_to(self, y_TO: Tensor, x_TI: Tensor, layer: int, group: str) -> None:
        stack, config = self._bank.layers[layer][group], self._bank.config
        N, M = self._shape
        x_NMI = x_TI.index_select(0, self._taken_NM).view(N, M, -1)
        h_NMR = torch.bmm(x_NMI, stack.A_NRI[:N].transpose(1, 2)).mul_(config.scale)
        for place, (first, last, B_NrO) in enumerate(stack.Bs):
            u_NMO = torch.bmm(h_NMR[:, :, place * config.r : (place + 1) * config.r], B_NrO[:N])
            u_SO = u_NMO.view(N * M, -1)
            y_TO[:, first:last].index_add_(0, self._rows, u_SO if self._places is None else u_SO[self._places])


class Banks:
    """All adapters that are only served, a bank for each shape. dtype: in bf16 they answer through the kernel."""

    def __init__(self, decoder: DecoderConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._decoder = decoder
        self._device = device
        self._dtype = dtype
        self._banks: dict[LoraConfig, Bank] = {}
        self._homes: dict[str, Bank] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._homes

    def add(self, key: str, lora: Lora) -> None:
        c = lora.config
        shape = LoraConfig(c.r, c.alpha, target_modules=c.target_modules, layers=c.layers)
        if shape not in self._banks:
            self._banks[shape] = Bank(shape, self._decoder, self._device, self._dtype)
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

    def whole(self, key: str) -> Update:
        """The update of a forward all of whose rows are this adapter's."""
        return Segment(self.lora(key)) if self._dtype == torch.float32 else Rows({(self._homes[key], key): None})

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        """Updates of the rows of each adapter. In fp32 batched, but for adapters with many more rows than the others."""
        found: list[Update] = []
        if self._dtype != torch.float32:
            return [Rows({(self._homes[key], key): own for key, own in rows.items()})] if rows else []
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
