"""The network as a plain forward, which defines what training, prefill and decode compute.

Whatever computes the same faster is a backend beside it (`execution.backend`). All families by features of the
configuration, none by a class of its own. The decoder knows tokens, positions and weights; what a token may attend to,
and where keys and values are kept, is the caller's `attend`.
Shape suffixes: T tokens, D hidden, H query heads, K key/value heads, E head size, V vocabulary, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fortwo.kernels import operations as fused_operations
from fortwo.nn.config import DecoderConfig
from fortwo.nn.fused_weights import Fused
from fortwo.nn.head import CappedHead, Head, capped
from fortwo.nn.layer import Layer, read_layer
from fortwo.nn.lora import Seeds, Update, in_training, lora_product
from fortwo.nn.rope import inverse_frequency
from fortwo.nn.rows import Rows
from fortwo.quantization.blocks import Blocks, Read
from fortwo.quantization.formats import (
    Frozen,
    HugePageArena,
    Weight,
    as_in_file,
    bytes_to_train,
    dense,
    head_format,
    quantize,
    to_train,
)
from fortwo.quantization.matmul import frozen_product
from fortwo.quantization.selection import Choice

Angles = tuple[Tensor, Tensor]
"""cos and sin (T, R) of a rotary embedding that turns R numbers of each head, each angle in both halves."""
Hold = Callable[[Frozen, bool], Frozen]  # how a weight is held; and whether it is the head


class Attend(Protocol):
    """Attention of one layer over the tokens of this forward and whatever came before.

    qkv (T, H + 2K, E): query heads, key heads, value heads. The result is (T, H, E).
    """

    def __call__(self, layer: int, qkv_TNE: Tensor, /) -> Tensor: ...


class Operations(Protocol):
    """The small operations that the forward calls, as `kernels.operations` describes them. That module uses kernels
    where there are some; `kernels.reference` holds the plain formulas."""

    def add_norm(
        self, x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...
    def rotate(self, x_TNE: Tensor, turned: int, cos_TE: Tensor, sin_TE: Tensor) -> Tensor: ...
    def swiglu(self, gate_up_T2I: Tensor) -> Tensor: ...
    def decode_attention(
        self,
        qkv_BNE: Tensor,
        k: Tensor,
        v: Tensor,
        rows_B: Tensor,
        positions_B: Tensor,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


class Decoder:
    """Frozen weights and the forward over them.

    hold: called with each weight as soon as it is read; None holds them in fp32. What comes as blocks is held so.
    `weights` are asked for one after the other, so what reads them from a disk needs no memory for all. Raises
    UnsupportedModel for missing or misshapen tensors.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Read],
        device: torch.device | str = "cpu",
        hold: Hold | None = None,
    ) -> None:
        self.config = c = config
        self.operations: Operations = fused_operations
        self.device = torch.device(device)
        fused, arena = Fused(config, weights, device), HugePageArena()

        def held(weight: Read, is_head: bool = False) -> Frozen:
            if isinstance(weight, Blocks):
                return as_in_file(weight, arena)
            return weight.float() if hold is None else hold(weight, is_head)

        read_VD = fused.embedding()
        self.embedding_VD = as_in_file(read_VD, arena) if isinstance(read_VD, Blocks) else read_VD
        self.norm_D = fused.norm("model.norm", c.hidden) * c.logit_scale
        self._norm_bias_D = fused.norm_bias("model.norm", c.hidden)
        head_VD = fused.head(read_VD)
        if c.tied and head_VD is not read_VD:
            self.config = replace(c, tied=False)  # the file has a head of its own
        shared = head_VD is read_VD and isinstance(read_VD, Blocks)
        self.head: Frozen = self.embedding_VD if shared else held(head_VD, True)
        del head_VD, read_VD  # they are not needed beside what they are held in
        self.layers: Sequence[Layer] = [read_layer(fused, index, held) for index in range(c.layers)]
        fused.raise_unused()
        self.inverse_frequency_E2 = inverse_frequency(c.rope).to(self.device)
        self._window_frequency_E2 = None if c.window_rope is None else inverse_frequency(c.window_rope).to(self.device)

    def weights(self) -> list[Tensor]:
        """What the network multiplies with, as fp32: each layer's four, and the head."""
        return [dense(weight, torch.float32) for weight in self._multiplied()]

    def _multiplied(self) -> list[Frozen]:
        inner = [
            weight for layer in self.layers for weight in (layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI)
        ]
        return [*inner, self.head]

    def frozen(self, layer: int, group: str) -> Frozen:
        """The weight of a layer's fused product."""
        own = self.layers[layer]
        return {"qkv": own.qkv_OD, "o": own.o_DI, "gate_up": own.gate_up_OD, "down": own.down_DI}[group]

    def in_fp32(self) -> Decoder:
        """The same network with fp32 products, to train on; what is fp32 already is not copied, NF4 stays NF4."""
        return self._with(to_train(torch.float32))

    def in_bf16(self) -> Decoder:
        """The same network with bf16 products, to train on; what is between the products stays fp32, NF4 stays NF4."""
        return self._with(to_train(torch.bfloat16))

    def bytes_to_train(self, bf16: bool) -> int:
        """Memory that in_bf16 or in_fp32 takes beside what is held."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        return sum(bytes_to_train(weight, dtype) for weight in self._multiplied())

    def with_operations(self, operations: Operations) -> Decoder:
        """The same network, computed with other small operations."""
        other = copy(self)
        other.operations = operations
        return other

    def with_rows(self, rows: Rows) -> Decoder:
        """The network itself: its layers carry nothing besides keys and values."""
        del rows
        return self

    def beginning(self, layers: int) -> Decoder:
        """The network's first layers, and its head."""
        other = copy(self)
        other.layers = self.layers[:layers]
        other.config = replace(self.config, layers=len(other.layers))
        return other

    def in_formats(self, choice: Choice, exact: bool = False) -> Decoder:
        """The same network, to serve: weights as `formats_of` has them; the embedding in fp32."""
        return self._with(formats_of(choice, exact))

    def _with(self, change: Hold) -> Decoder:
        other = copy(self)
        other.head = change(self.head, True)
        other.layers = [
            replace(
                layer,
                qkv_OD=change(layer.qkv_OD, False),
                o_DI=change(layer.o_DI, False),
                gate_up_OD=change(layer.gate_up_OD, False),
                down_DI=change(layer.down_DI, False),
            )
            for layer in self.layers
        ]
        return other

    @property
    def head_VD(self) -> Head:
        """The head of a network to train on. Raises TypeError for one that is held in formats."""
        if isinstance(self.head, Weight):
            raise TypeError("train on in_fp32() or in_bf16(): these weights are held to serve")
        cap = self.config.logit_softcap
        return self.head if cap is None else CappedHead(self.head, cap)

    @property
    def dtype(self) -> torch.dtype:
        """What the layers' products take and give."""
        return self.layers[0].qkv_OD.dtype

    @property
    def parameters(self) -> int:
        return sum(math.prod(held.shape) for held in self._held())

    @property
    def bytes(self) -> int:
        """Memory held by the weights."""
        total = sum(held.nbytes for held in self._held())
        if self.head is self.embedding_VD:
            return total
        if self.config.tied and isinstance(self.head, Weight):
            total += sum(weight_format.nbytes for name, weight_format in self.head.formats.items() if name != "fp32")
        elif self.config.tied:
            total += self.head.nbytes
        return total

    def _held(self) -> list[Frozen]:
        """Everything, a head that is the embedding once."""
        everything: list[Frozen] = [self.embedding_VD, self.norm_D]
        if self._norm_bias_D is not None:
            everything.append(self._norm_bias_D)
        if not self.config.tied:
            everything.append(self.head)
        for layer in self.layers:
            everything += [held for held in vars(layer).values() if held is not None]
        return everything

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        segments: Sequence[Update] = (),
        dropout: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        """Hidden states (T, D) after the final norm. dropout: the adapter's, where it gets gradients."""
        lora = in_training(segments)
        seeds: Seeds = lora.seeds() if lora is not None and dropout else {}
        x_TD, angles = self.embed(tokens_T), self.angles(positions_T)
        return self.norm(self.through_layers(x_TD, angles, attend, segments, seeds, checkpointing))

    def embed(self, tokens_T: Tensor) -> Tensor:
        """What the first layer reads (T, D)."""
        embedding_VD, scale = self.embedding_VD, self.config.embedding_scale
        x_TD = embedding_VD.rows(tokens_T) if isinstance(embedding_VD, Weight) else embedding_VD[tokens_T]
        return x_TD if scale == 1 else x_TD * scale

    def angles(self, positions_T: Tensor) -> list[Angles | None]:
        """Those of each layer; None for a layer without positions."""
        c = self.config
        own = _angles(positions_T, self.inverse_frequency_E2, c.rope.amplitude)
        windowed = own
        if c.window_rope is not None and self._window_frequency_E2 is not None:
            windowed = _angles(positions_T, self._window_frequency_E2, c.window_rope.amplitude)
        layers = range(c.layers)
        return [None if n in c.without_rope else windowed if n in c.windowed else own for n in layers]

    def norm(self, x_TD: Tensor) -> Tensor:
        """The final norm."""
        return self._read(x_TD, None, self.norm_D, self._norm_bias_D, x_TD.dtype)[1]

    def through_layers(
        self,
        x_TD: Tensor,
        angles: Sequence[Angles | None],
        attend: Attend,
        segments: Sequence[Update] = (),
        seeds: Seeds = MappingProxyType({}),
        checkpointing: bool = False,
    ) -> Tensor:
        """Carry what the first layer reads (T, D) to what comes after the last one (T, D).

        angles: as `angles` finds them; seeds: of the adapter's dropout. checkpointing: keep for the gradient what each
        layer reads, and compute the layer again when it is wanted, the same dropout drawn (Chen et al. 2016,
        arXiv:1604.06174).
        """
        update_TD: Tensor | None = None

        def layer_through(index: int, x_TD: Tensor, update_TD: Tensor | None) -> tuple[Tensor, Tensor]:
            """What comes after the layer: the sum so far, and what the layer adds to it last."""
            layer = self.layers[index]

            def product(x_TI: Tensor, weight_OI: Frozen, bias_O: Tensor | None, group: str) -> Tensor:
                y_TO = lora_product(x_TI, weight_OI, index, group, segments, seeds.get((index, group)))
                return y_TO if bias_O is None else y_TO + bias_O.to(y_TO.dtype)

            norm = layer.attention_norm_D, layer.attention_norm_bias_D
            x_TD, read_TD = self._read(x_TD, update_TD, *norm, layer.qkv_OD.dtype)
            qkv_TO = product(read_TD, layer.qkv_OD, layer.qkv_bias_O, "qkv")
            mixed_THE = attend(index, self._heads(qkv_TO, layer, angles[index]))
            update_TD = product(mixed_THE.reshape(len(x_TD), -1), layer.o_DI, layer.o_bias_D, "o")
            update_TD = self._written(update_TD, layer.after_attention_D)
            norm = layer.mlp_norm_D, layer.mlp_norm_bias_D
            x_TD, read_TD = self._read(x_TD, update_TD, *norm, layer.qkv_OD.dtype)
            inner_TI = self._gated(product(read_TD, layer.gate_up_OD, layer.gate_up_bias_O, "gate_up"))
            update_TD = product(inner_TI, layer.down_DI, layer.down_bias_D, "down")
            return x_TD, self._written(update_TD, layer.after_mlp_D)

        for index in range(self.config.layers):
            if checkpointing:
                x_TD, update_TD = checkpoint(
                    layer_through, index, x_TD, update_TD, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD, update_TD = layer_through(index, x_TD, update_TD)
        return x_TD if update_TD is None else x_TD + update_TD

    def _read(
        self,
        x_TD: Tensor,
        update_TD: Tensor | None,
        norm_D: Tensor | None,
        norm_bias_D: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """The sum with the update, and what attention or MLP reads of it."""
        if norm_D is not None and norm_bias_D is None:
            return self.operations.add_norm(x_TD, update_TD, norm_D, self.config.norm_eps, dtype)
        x_TD = x_TD if update_TD is None else x_TD + update_TD
        if norm_D is None:
            return x_TD, x_TD.to(dtype)
        return x_TD, F.layer_norm(x_TD, norm_D.shape, norm_D, norm_bias_D, self.config.norm_eps).to(dtype)

    def _written(self, update_TD: Tensor, norm_D: Tensor | None) -> Tensor:
        """What attention or MLP adds to the sum."""
        update_TD = update_TD if norm_D is None else self._rms_norm(update_TD, norm_D)
        scale = self.config.residual_scale
        return update_TD if scale == 1 else update_TD * scale

    def _heads(self, qkv_TO: Tensor, layer: Layer, angles: Angles | None) -> Tensor:
        """Heads (T, H + 2K, E) as attention takes them: those of q and k normed and turned by their positions."""
        c, T = self.config, len(qkv_TO)
        qkv_TNE = qkv_TO.view(T, c.heads + 2 * c.kv_heads, c.head_size)
        if layer.q_norm_E is not None and layer.k_norm_E is not None:
            q_THE, k_TKE, v_TKE = qkv_TNE.split([c.heads, c.kv_heads, c.kv_heads], 1)
            if c.whole_qk_norm:
                q_THE = self._rms_norm(q_THE.flatten(1), layer.q_norm_E).view_as(q_THE)
                k_TKE = self._rms_norm(k_TKE.flatten(1), layer.k_norm_E).view_as(k_TKE)
            else:
                q_THE, k_TKE = self._rms_norm(q_THE, layer.q_norm_E), self._rms_norm(k_TKE, layer.k_norm_E)
            qkv_TNE = torch.cat([q_THE, k_TKE, v_TKE], 1)
        if angles is not None:
            qkv_TNE = self._turned(qkv_TNE, angles)
        if c.query_scale != 1:
            qkv_TNE = torch.cat([qkv_TNE[:, : c.heads] * c.query_scale, qkv_TNE[:, c.heads :]], 1)
        return qkv_TNE

    def _turned(self, qkv_TNE: Tensor, angles: Angles) -> Tensor:
        turned, size = self.config.heads + self.config.kv_heads, self.config.rope.size
        if size == self.config.head_size:
            return self.operations.rotate(qkv_TNE, turned, *angles)
        return torch.cat([self.operations.rotate(qkv_TNE[..., :size], turned, *angles), qkv_TNE[..., size:]], -1)

    def _gated(self, gate_up_T2I: Tensor) -> Tensor:
        """activation(gate) * up."""
        if self.config.activation == "silu":
            return self.operations.swiglu(gate_up_T2I)
        gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
        return F.gelu(gate_TI, approximate="tanh" if self.config.activation == "gelu_tanh" else "none") * up_TI

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        return self.operations.add_norm(rows, None, weight, self.config.norm_eps, x.dtype)[1].view(x.shape)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V)."""
        logits_TV, cap = frozen_product(hidden_TD, self.head), self.config.logit_softcap
        return logits_TV if cap is None else capped(logits_TV, cap)


def _angles(positions_T: Tensor, inverse_frequency_R2: Tensor, amplitude: float) -> Angles:
    angles_TR2 = positions_T[:, None].float() * inverse_frequency_R2
    angles_TR = torch.cat([angles_TR2, angles_TR2], -1)
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    return (cos_TR, sin_TR) if amplitude == 1 else (cos_TR * amplitude, sin_TR * amplitude)


def formats_of(choice: Choice, exact: bool = False) -> Hold:
    """Weights in the formats of `choice`. exact: and in fp32, unless one of them has the weight to the last bit; a
    head, which may be the embedding, in any case."""
    arena = HugePageArena()

    def held(weight: Frozen, is_head: bool) -> Weight:
        weight_OI = weight if isinstance(weight, Tensor) else dense(weight, torch.float32)
        formats = {name: quantize(head_format(name) if is_head else name, weight_OI, arena) for name in choice.formats}
        nearest = None
        if exact and "fp32" not in formats:
            same = (name for name in formats if torch.equal(formats[name].dense().float(), weight_OI))
            nearest = None if is_head else next(same, None)
            if nearest is None:
                formats["fp32"] = quantize("fp32", weight_OI, arena)
        return Weight(weight_OI.shape, formats, choice, nearest)

    return held
