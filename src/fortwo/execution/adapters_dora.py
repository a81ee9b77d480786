"""DoRA adapters beside plain ones: their outputs are scaled, too, which not all kernels for plain adapters do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fortwo.execution.adapters import AdapterPool
from fortwo.execution.parts import Computed, Part
from fortwo.nn.lora import Lora, Segment, Update
from fortwo.nn.lora_group import LoraGroup
from fortwo.nn.network import Network
from fortwo.quantization.formats import dense


class DoraAdapters:
    """An `adapters.AdapterPool` that gives DoRA adapters the scale of their outputs and holds them itself, unless
    `plain`, which holds the others, can multiply by it (scaling). network: whose weights they change."""

    def __init__(self, plain: AdapterPool, network: Network, *, scaling: bool = False) -> None:
        self._plain = plain
        self._network = network
        self._scaling = scaling
        self._loras: dict[str, Lora] = {}
        self._copied: dict[str, Lora] = {}  # adapters in training, as they were when they were taken last

    def __contains__(self, key: str) -> bool:
        return key in self._loras or key in self._plain

    def add(self, key: str, lora: Lora) -> None:
        if lora.config.use_dora:
            self._add_scaled(key, self._with_scale(lora))
        else:
            self._plain.add(key, lora)

    def copy(self, key: str, lora: Lora) -> None:
        """The scale is computed again only if the adapter has changed, because that reads all weights."""
        if not lora.config.use_dora:
            self._plain.copy(key, lora)
            return
        last = self._copied.get(key)
        now = lora.parameters()
        if last is None or not all(map(torch.equal, last.parameters(), now)):
            self._copied[key] = self._with_scale(lora)
            self._add_scaled(key, self._copied[key])

    def remove(self, key: str) -> None:
        self._loras.pop(key, None)
        self._copied.pop(key, None)
        self._plain.remove(key)

    def whole(self, key: str, rows: int) -> Update:
        return Segment(self._loras[key]) if key in self._loras else self._plain.whole(key, rows)

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        device = self._network.device
        plain = {key: own for key, own in rows.items() if key not in self._loras}
        scaled = [
            Segment(self._loras[key], torch.tensor(own, device=device))
            for key, own in rows.items()
            if key in self._loras
        ]
        return [*(self._plain.updates(plain) if plain else []), *scaled]

    def answer(self, part: Part) -> bool:
        """Whether one of the adapters that are held here answers the part."""
        return part.adapter in self._loras

    def _add_scaled(self, key: str, lora: Lora) -> None:
        if self._scaling:
            self._plain.add(key, lora)
        else:
            self._loras[key] = lora

    def _with_scale(self, lora: Lora) -> Lora:
        layers = [
            {name: self._scaled(layer, name, group) for name, group in groups.items()}
            for layer, groups in enumerate(lora.layers)
        ]
        return Lora(lora.config, layers)

    def _scaled(self, layer: int, name: str, group: LoraGroup) -> LoraGroup:
        """A copy with its scale, which is computed in fp32 from the weight as it is held."""
        copy = group.frozen_copy()
        copy.scale_O = copy.output_scale(dense(self._network.frozen(layer, name), torch.float32))
        return copy


Decode = Callable[[Sequence[Part]], Tensor]
Prefill = Callable[[Sequence[Part]], Iterator[Computed]]


def decode_apart(parts: Sequence[Part], apart: Callable[[Part], bool], plain: Decode, other: Decode) -> Tensor:
    """What `Backend.decode` returns, where the parts that are `apart` are computed by `other`."""
    ours, theirs = _split(parts, apart)
    hidden_BD = torch.cat([plain([parts[n] for n in ours]), other([parts[n] for n in theirs])])
    return hidden_BD[torch.tensor(ours + theirs, device=hidden_BD.device).argsort()]


def prefill_apart(
    parts: Sequence[Part], apart: Callable[[Part], bool], plain: Prefill, other: Prefill
) -> Iterator[Computed]:
    """What `Backend.prefill` yields, where the parts that are `apart` are computed by `other`."""
    for numbers, prefill in zip(_split(parts, apart), (plain, other), strict=True):
        for computed in prefill([parts[n] for n in numbers]):
            yield computed._replace(parts=[numbers[n] for n in computed.parts])


def _split(parts: Sequence[Part], apart: Callable[[Part], bool]) -> tuple[list[int], list[int]]:
    """The numbers of the parts that are not apart, and of those that are."""
    ours, theirs = list[int](), list[int]()
    for number, part in enumerate(parts):
        (theirs if apart(part) else ours).append(number)
    return ours, theirs
