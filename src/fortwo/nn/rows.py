"""Where the rows of a pass lie, and what each carries from token to token besides keys and values.

Own layers carry nothing; `recurrent` describes those that do. R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """The states of R sequences in one layer: the last inputs of the convolution (R, channels, kernel), and the
    matrices (R, ...), if there are some."""

    inputs: Tensor
    matrices: Tensor | None

    @property
    def numel(self) -> int:
        return self.inputs.numel() + (0 if self.matrices is None else self.matrices.numel())

    def rows(self) -> list[LayerState]:
        """That of each sequence."""
        inputs = self.inputs.split(1)
        matrices = [None] * len(inputs) if self.matrices is None else self.matrices.split(1)
        return [LayerState(*one) for one in zip(inputs, matrices, strict=True)]

    @classmethod
    def of(cls, rows: Sequence[LayerState]) -> LayerState:
        """A copy of the states of several sequences as one."""
        matrices = [row.matrices for row in rows if row.matrices is not None]
        return cls(torch.cat([row.inputs for row in rows]), torch.cat(matrices) if matrices else None)


State = Mapping[int, LayerState]
"""What a sequence carries, by layer; empty before its first token."""


@dataclass
class Rows:
    """Where the rows of a pass lie: `prefix` tokens that all rows begin with, then the `lengths` of the rests.

    states: what each row carries into the pass; None for rows that begin in it and end with it. after: what they carry
    out of it, which the network writes; a layer that is computed again for a gradient writes the same again.
    """

    lengths: Sequence[int]
    prefix: int = 0
    states: Sequence[State] | None = None
    after: list[dict[int, LayerState]] = field(init=False)

    def __post_init__(self) -> None:
        self.after = [{} for _ in self.lengths]

    @property
    def tokens(self) -> int:
        """T."""
        return self.prefix + sum(self.lengths)
