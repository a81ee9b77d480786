"""The tensors by which an adapter changes one fused product, and DoRA's scale of its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fortwo.quantization.formats import Frozen, dense
from fortwo.quantization.matmul import product


class Place(NamedTuple):
    """Where the update of a linear module lies: its rows of the stacked A and its columns of the fused product; scale:
    of it. module: PEFT's name."""

    module: str
    rows: slice
    columns: slice
    scale: float

    @property
    def rank(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def outputs(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def prefix(self) -> str:
        """What PEFT's names of the module's tensors begin with."""
        return f"base_model.model.{self.module}."


@dataclass
class LoraGroup:
    """The update of one fused product. A_RI stacks the A (r, in) of each target, Bs holds its B (out, r); r may
    differ from target to target. magnitudes: of DoRA (Liu et al. 2024, arXiv:2402.09353) the vector (out,) of each
    target, none without it.

    scale_O: DoRA's scale of the outputs, where the tensors do not change any more.
    """

    places: tuple[Place, ...]
    A_RI: Tensor
    Bs: list[Tensor]
    magnitudes: list[Tensor] = field(default_factory=list)
    scale_O: Tensor | None = None
    _squares_O: Tensor | None = None  # of the frozen weight's rows, which never change

    @property
    def tensors(self) -> list[Tensor]:
        return [self.A_RI, *self.Bs, *self.magnitudes]

    def frozen_copy(self) -> LoraGroup:
        """A copy of the tensors as they are now, without gradients."""
        A_RI, *rest = (tensor.detach().clone() for tensor in self.tensors)
        return LoraGroup(self.places, A_RI, rest[: len(self.Bs)], rest[len(self.Bs) :])

    def to(self, device: torch.device) -> LoraGroup:
        """A copy on another device, without gradients."""
        A_RI, *rest = (tensor.detach().to(device) for tensor in self.tensors)
        return LoraGroup(self.places, A_RI, rest[: len(self.Bs)], rest[len(self.Bs) :])

    def norms(self, weight_OI: Frozen) -> Tensor:
        """The norm of each row of W + s B A (O,), in fp32, where W is the frozen weight of the fused product.

        It is found without making B A: the square is |w|^2 + 2 s b (A w) + s^2 b (A A') b'.
        """
        if self._squares_O is None:
            self._squares_O = dense(weight_OI, torch.float32).square().sum(1)
        squares_O = self._squares_O.clone()
        A_RI = self.A_RI.detach().float()
        AW_RO = product(A_RI, weight_OI, dtype=torch.float32)
        for place, B_Or in zip(self.places, self.Bs, strict=True):
            A_rI, B_Or = A_RI[place.rows], place.scale * B_Or.detach().float()
            squares_O[place.columns] += (
                B_Or * (2 * AW_RO[place.rows, place.columns].t() + B_Or @ (A_rI @ A_rI.t()))
            ).sum(1)
        return squares_O.clamp_min(0).sqrt()

    def output_scale(self, weight_OI: Frozen) -> Tensor:
        """DoRA's m / |W + s B A| of each output (O,); 1 where nothing is scaled. It has a gradient for the magnitudes
        alone, because DoRA takes the norm for a constant."""
        if self.scale_O is not None:
            return self.scale_O
        with torch.no_grad():
            norms_O = self.norms(weight_OI)
        scale_O = torch.ones_like(norms_O)
        for place, magnitude_o in zip(self.places, self.magnitudes, strict=True):
            norm_o = norms_O[place.columns]
            whole = norm_o > 0  # a row of zeros stays one, whatever scales it
            scale_O[place.columns] = torch.where(whole, magnitude_o / norm_o.where(whole, 1), 1)
        return scale_O
