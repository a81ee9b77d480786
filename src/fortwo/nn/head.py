"""What makes logits of hidden states while an adapter is trained. Shape suffixes as in `decoder`, and N rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fortwo.quantization.matmul import frozen_product
from fortwo.quantization.tiles import Tiles


class HeadFunction(Protocol):
    """A head whose logits (N, V) of hidden states (N, D) are not a product alone: it has a bias or a soft cap."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def __call__(self, hidden_ND: Tensor, /) -> Tensor: ...


Head = Tensor | Tiles | HeadFunction


@dataclass(frozen=True)
class CappedHead:
    """A `HeadFunction`: logits x become cap * tanh(x / cap)."""

    weight_VD: Tensor | Tiles
    cap: float

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_VD.dtype

    @property
    def shape(self) -> tuple[int, int]:
        V, D = self.weight_VD.shape
        return V, D

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return capped(frozen_product(hidden_ND.to(self.dtype), self.weight_VD), self.cap)


def capped(logits_TV: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap)."""
    return (logits_TV / cap).tanh() * cap
