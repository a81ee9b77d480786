"""A model's tensors as the decoder multiplies with them: q, k and v as one weight, gate and up as one.

Nothing is kept: each is read when it is asked for, so what is made of them weight by weight needs no memory for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fortwo.errors import UnsupportedModel
from fortwo.nn.lora_config import GROUPS, module_name

if TYPE_CHECKING:
    from fortwo.nn.config import DecoderConfig


class Fused:
    """Every method raises UnsupportedModel for a tensor that is missing or misshapen."""

    def __init__(
        self, config: DecoderConfig, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._tensors = tensors

    def weight(self, layer: int, group: str) -> Tensor:
        """The weight (O, I) of a fused product: qkv, o, gate_up or down; in the type it was saved in."""
        I = self.config.in_features(group)  # noqa: E741
        return self._joined([(f"{module_name(layer, name)}.weight", self._outputs(name), I) for name in GROUPS[group]])

    def bias(self, layer: int, group: str) -> Tensor:
        """(O,), fp32."""
        return self._joined(
            [(f"{module_name(layer, name)}.bias", self._outputs(name)) for name in GROUPS[group]]
        ).float()

    def embedding(self) -> Tensor:
        """(V, D), fp32."""
        return self.plain("model.embed_tokens.weight", self.config.vocabulary, self.config.hidden)

    def head(self) -> Tensor:
        """(V, D), the embedding itself where they are tied."""
        c = self.config
        return self.embedding() if c.tied else self._read("lm_head.weight", c.vocabulary, c.hidden)

    def plain(self, name: str, *shape: int) -> Tensor:
        """A tensor as fp32."""
        return self._read(name, *shape).float()

    def _outputs(self, name: str) -> int:
        first, last = self.config.columns(name)
        return last - first

    def _joined(self, parts: list[tuple[str, int, int]] | list[tuple[str, int]]) -> Tensor:
        found = [self._read(*part) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, name: str, *shape: int) -> Tensor:
        if name not in self._tensors:
            raise UnsupportedModel(f"tensor {name!r} is missing from the model's weights")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(f"tensor {name!r} is {tuple(tensor.shape)}, the configuration needs {shape}")
        return tensor.to(self.device)
