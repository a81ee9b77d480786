"""What a pass of the serving path computes: the next tokens of several sequences. Shape suffixes as in `decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fortwo.execution.kv_cache import Slot


class Part(NamedTuple):
    """The next tokens of one sequence. before: how many are computed already, whose keys and values its slot holds;
    adapter: the key of the one that answers, None for the plain base; ends: whether the sequence ends with them."""

    tokens: Sequence[int]
    before: int
    slot: Slot
    adapter: str | None
    ends: bool = True

    @property
    def whole(self) -> bool:
        """Whether it is a whole sequence of which nothing is computed yet."""
        return self.ends and not self.before


class Computed(NamedTuple):
    """Hidden states (T, D) of several parts. parts: their numbers; spans: where in T the tokens of each lie."""

    parts: list[int]
    hidden_TD: Tensor
    spans: list[list[int]]
