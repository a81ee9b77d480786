"""What a backend must offer to hold the adapters that it serves, and the plainest way to hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from fortwo.nn.lora import Lora, Segment, Update


class AdapterPool(Protocol):
    """Copies of the adapters that are served, by key."""

    def __contains__(self, key: str, /) -> bool: ...

    def add(self, key: str, lora: Lora, /) -> None:
        """Hold a copy of `lora`."""

    def copy(self, key: str, lora: Lora, /) -> None:
        """Take the adapter's tensors again, as they are now."""

    def remove(self, key: str, /) -> None:
        """Forget the adapter, if it is here."""

    def whole(self, key: str, rows: int, /) -> Update:
        """The update of a forward all of whose rows are this adapter's."""

    def updates(self, rows: Mapping[str, Sequence[int]], /) -> list[Update]:
        """The updates of a forward. rows: those of each adapter."""


def updates_of(pool: AdapterPool, keys: Sequence[str | None]) -> list[Update]:
    """What the adapters add in a forward. keys: of each of its rows, None for the plain base."""
    if len(set(keys)) == 1:
        return [] if keys[0] is None else [pool.whole(keys[0], len(keys))]
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            rows.setdefault(key, []).append(row)
    return pool.updates(rows)


class SeparateAdapters:
    """An `AdapterPool` that keeps each adapter's own tensors, and multiplies them adapter by adapter."""

    def __init__(self) -> None:
        self._loras: dict[str, Lora] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._loras

    def add(self, key: str, lora: Lora) -> None:
        layers = [{name: group.frozen_copy() for name, group in groups.items()} for groups in lora.layers]
        self._loras[key] = Lora(lora.config, layers)

    copy = add

    def remove(self, key: str) -> None:
        self._loras.pop(key, None)

    def whole(self, key: str, rows: int) -> Update:
        del rows
        return Segment(self._loras[key])

    def updates(self, rows: Mapping[str, Sequence[int]]) -> list[Update]:
        return [Segment(self._loras[key], torch.tensor(own)) for key, own in rows.items()]
