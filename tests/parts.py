"""Decoders, adapters and rows with random content, and the hidden states of a row alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from fortwo.execution.cpu import CpuBackend
from fortwo.execution.packed_fused import FusedPackedAttention
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import operations
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from fortwo.train.estimate import LinearModule, linear_modules
from tests.tiny import VOCABULARY, tiny_model

WITHOUT_TILES = "no products of bf16 by blocks exist at this level"


@cache
def decoder(kv_heads: int = 2) -> Decoder:
    model = tiny_model("llama", num_key_value_heads=kv_heads)
    return as_decoder(model)


def as_decoder(model: Any, device: torch.device | str = "cpu") -> Decoder:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return Decoder(DecoderConfig.from_hf(config), model.state_dict(), device)


def projections(hidden: int, intermediate: int, heads: int, kv_heads: int, head_size: int) -> dict[str, LinearModule]:
    """The modules of a Llama of this shape, with two layers, that an adapter can change."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
    )
    return linear_modules(DecoderConfig.from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))


def random_lora(home: Decoder, seed: int = 0, config: LoraConfig = LoraConfig(r=4, alpha=12)) -> Lora:
    """An adapter that changes much: A and B random."""
    lora = Lora.init(config, home.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return lora


def make_rows(lengths: Sequence[int], start: Sequence[int] = ()) -> list[list[int]]:
    """Rows of these lengths after `start`; no two go on with the same token."""
    generator = torch.Generator().manual_seed(1)
    return [
        [*start, number, *torch.randint(0, len(VOCABULARY), (length - 1,), generator=generator).tolist()]
        for number, length in enumerate(lengths)
    ]


def packed_hidden(
    home: Decoder, rows: Sequence[Sequence[int]], lora: Lora | None = None, prefix: int | None = None
) -> list[Tensor]:
    """Hidden states (T, D) of each row, from one pass."""
    packed = pack(rows, prefix=prefix)
    segments = [] if lora is None else [Segment(lora)]
    hidden_TD = home.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, home.config), segments)
    return [hidden_TD[[packed.place(n, at) for at in range(len(row))]] for n, row in enumerate(rows)]


def gradients(loss: Tensor, lora: Lora) -> list[Tensor]:
    return list(torch.autograd.grad(loss, lora.parameters()))


def trainable(lora: Lora) -> Lora:
    for parameter in lora.parameters():
        parameter.requires_grad_(True)
    return lora


class Unfused(ReferenceBackend):
    """The decoder's forward by kernels for its operations and its attention, one after the other, over keys, values and
    adapters as the CPU's backend holds them."""

    operations = operations
    packed_attention = FusedPackedAttention

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        fused = CpuBackend(decoder)
        self.kv_dtype, self.adapters, self._mixes = fused.kv_dtype, fused.adapters, fused._mixes
