"""A model's tensors as the decoder multiplies with them: q, k and v as one weight, gate and up as one.

Nothing is kept: each is read when it is asked for, so what is made of them weight by weight needs no memory for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fortwo.errors import UnsupportedModel
from fortwo.nn.lora_config import module_name
from fortwo.quantization.blocks import Blocks, Read, dense

if TYPE_CHECKING:
    from fortwo.nn.config import DecoderConfig


_HARMLESS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".self_attn.bias")
_HINT = "Check that config.json and the weights are of the same model, or save it again with transformers."


class Fused:
    """Every method that reads raises UnsupportedModel for a tensor that is missing or misshapen."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Read], device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._tensors = tensors
        self._used: set[str] = set()

    def weight(self, layer: int, group: str) -> Read:
        """The weight (O, I) of a fused product: qkv, o, gate_up or down; in the type it was saved in."""
        I = self.config.in_features(group)  # noqa: E741
        names = self.config.groups[group]
        found = [self._read(f"{module_name(layer, name)}.weight", self._outputs(name), I) for name in names]
        blocks = [one for one in found if isinstance(one, Blocks)]
        return blocks[0].joined(*blocks[1:]) if len(blocks) == len(found) else self._joined(found)

    def bias(self, layer: int, group: str) -> Tensor:
        """(O,), fp32."""
        names = self.config.groups[group]
        found = [self._read(f"{module_name(layer, name)}.bias", self._outputs(name)) for name in names]
        return self._joined(found).float()

    def embedding(self) -> Read:
        """(V, D), fp32 or as blocks."""
        found = self._read("model.embed_tokens.weight", self.config.vocabulary, self.config.hidden)
        return found if isinstance(found, Blocks) else found.float()

    def head(self, embedding_VD: Read | None = None) -> Read:
        """(V, D), the embedding itself where they are tied, unless the file has another one."""
        c = self.config
        embedding_VD = self.embedding() if c.tied and embedding_VD is None else embedding_VD
        if c.tied and embedding_VD is not None:
            if "lm_head.weight" not in self._tensors:
                return embedding_VD
            head_VD = self._read("lm_head.weight", c.vocabulary, c.hidden)
            return embedding_VD if _same(head_VD, embedding_VD) else head_VD
        return self._read("lm_head.weight", c.vocabulary, c.hidden)

    def norm(self, name: str, size: int) -> Tensor:
        """What a norm multiplies with (size,), fp32."""
        return self._tensor(f"{name}.weight", size).float() + self.config.norm_offset

    def norm_bias(self, name: str, size: int) -> Tensor | None:
        """What a norm adds (size,), fp32; None where the network's norms have none."""
        return self._tensor(f"{name}.bias", size).float() if self.config.layer_norm else None

    def raise_unused(self) -> None:
        """Raises UnsupportedModel for a tensor that nothing has read, since the network would be another one than that
        of the file."""
        unused = [name for name in self._tensors if name not in self._used and not name.endswith(_HARMLESS)]
        if unused:
            few = ", ".join(map(repr, unused[:5])) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
            raise UnsupportedModel(
                f"the model's weights have {few}, which {self.config.architecture} with this config.json does not use",
                hint="The replies would be those of another model. " + _HINT,
            )

    def _outputs(self, name: str) -> int:
        first, last = self.config.columns(name)
        return last - first

    def _joined(self, found: list[Read]) -> Tensor:
        tensors = [dense(one) for one in found]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        return dense(self._read(name, *shape))

    def _read(self, name: str, *shape: int) -> Read:
        if name not in self._tensors:
            raise UnsupportedModel(f"tensor {name!r} is missing from the model's weights", hint=_HINT)
        self._used.add(name)
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"tensor {name!r} is {tuple(tensor.shape)}, the configuration needs {shape}", hint=_HINT
            )
        return tensor if isinstance(tensor, Blocks) else tensor.to(self.device)


def _same(one: Read, other: Read) -> bool:
    if isinstance(one, Blocks) and isinstance(other, Blocks):
        return one.equals(other)
    return torch.equal(dense(one).float(), dense(other).float())
