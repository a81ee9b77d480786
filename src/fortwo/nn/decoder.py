"""The network as a plain forward, which defines what training, prefill and decode compute.

Whatever computes the same faster is a backend beside it (`execution.backend`). Llama, Mistral, Qwen2 and
Qwen3 by configuration flags. The decoder knows tokens, positions and weights; what a token may attend to, and where
keys and values are kept, is the caller's `attend`.
Shape suffixes: T tokens, D hidden, H query heads, K key/value heads, E head size, V vocabulary, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fortwo.kernels import operations as fused_operations
from fortwo.nn.config import DecoderConfig
from fortwo.nn.fused_weights import Fused
from fortwo.nn.lora import Seeds, Update, in_training, lora_product
from fortwo.quantization.formats import Frozen, Regions, Weight, bytes_to_train, dense, head_form, quantised, trained_on
from fortwo.quantization.matmul import frozen_product
from fortwo.quantization.selection import Choice
from fortwo.quantization.tiles import Tiles

Hold = Callable[[Frozen, bool], Frozen]  # how a weight is held; and whether it is the head


class HeadFunction(Protocol):
    """A head whose logits (N, V) of hidden states (N, D) are not a product alone: it has a bias or a soft cap."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def __call__(self, hidden_ND: Tensor, /) -> Tensor: ...


Head = Tensor | Tiles | HeadFunction


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
        self, qkv_BNE: Tensor, k: Tensor, v: Tensor, rows_B: Tensor, positions_B: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Layer:
    attention_norm_D: Tensor
    qkv_OD: Frozen
    qkv_bias_O: Tensor | None
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    o_DI: Frozen
    mlp_norm_D: Tensor
    gate_up_OD: Frozen
    down_DI: Frozen


class Decoder:
    """Frozen weights and the forward over them.

    hold: called with each weight as soon as it is read; None holds them in fp32. `weights` are asked for one after the
    other, so what reads them from a disk needs no memory for all. Raises UnsupportedModel for missing or misshapen
    tensors.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        hold: Hold | None = None,
    ) -> None:
        self.config = c = config
        self.operations: Operations = fused_operations
        self.device = torch.device(device)
        fused = Fused(config, weights, device)

        def held(weight: Tensor, is_head: bool = False) -> Frozen:
            return weight.float() if hold is None else hold(weight, is_head)

        self.embedding_VD = fused.embedding()
        self.norm_D = fused.plain("model.norm.weight", c.hidden)
        self.head: Frozen = held(self.embedding_VD if c.tied else fused.head(), True)
        self.layers: list[Layer] = []
        for index in range(c.layers):
            at = f"model.layers.{index}"
            self.layers.append(
                Layer(
                    attention_norm_D=fused.plain(f"{at}.input_layernorm.weight", c.hidden),
                    qkv_OD=held(fused.weight(index, "qkv")),
                    qkv_bias_O=fused.bias(index, "qkv") if c.qkv_bias else None,
                    q_norm_E=fused.plain(f"{at}.self_attn.q_norm.weight", c.head_size) if c.qk_norm else None,
                    k_norm_E=fused.plain(f"{at}.self_attn.k_norm.weight", c.head_size) if c.qk_norm else None,
                    o_DI=held(fused.weight(index, "o")),
                    mlp_norm_D=fused.plain(f"{at}.post_attention_layernorm.weight", c.hidden),
                    gate_up_OD=held(fused.weight(index, "gate_up")),
                    down_DI=held(fused.weight(index, "down")),
                )
            )
        self.inverse_frequency_E2 = _inverse_frequency(c).to(self.device)

    def weights(self) -> list[Tensor]:
        """What the network multiplies with, as fp32: each layer's four, and the head."""
        return [dense(weight, torch.float32) for weight in self._multiplied()]

    def _multiplied(self) -> list[Frozen]:
        inner = [
            weight for layer in self.layers for weight in (layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI)
        ]
        return [*inner, self.head]

    def in_fp32(self) -> Decoder:
        """The same network with fp32 products, to train on; what is fp32 already is not copied, NF4 stays NF4."""
        return self._to_train(torch.float32)

    def in_bf16(self) -> Decoder:
        """The same network with bf16 products, to train on; what is between the products stays fp32, NF4 stays NF4."""
        return self._to_train(torch.bfloat16)

    def bytes_to_train(self, bf16: bool) -> int:
        """Memory that in_bf16 or in_fp32 takes beside what is held."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        return sum(bytes_to_train(weight, dtype) for weight in self._multiplied())

    def with_operations(self, operations: Operations) -> Decoder:
        """The same network, computed with other small operations."""
        other = copy(self)
        other.operations = operations
        return other

    def beginning(self, layers: int) -> Decoder:
        """The network's first layers, and its head."""
        other = copy(self)
        other.layers = self.layers[:layers]
        other.config = replace(self.config, layers=len(other.layers))
        return other

    def in_forms(self, choice: Choice, exact: bool = False) -> Decoder:
        """The same network, to serve: weights as `forms_of` has them; the embedding in fp32."""
        return self._with(forms_of(choice, exact))

    def _to_train(self, dtype: torch.dtype) -> Decoder:
        regions = Regions()
        return self._with(lambda weight, is_head: trained_on(weight, regions, dtype))

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
    def head_VD(self) -> Tensor | Tiles:
        """The head of a network to train on. Raises TypeError for one that is held in forms."""
        if isinstance(self.head, Weight):
            raise TypeError("train on in_fp32() or in_bf16(): these weights are held to serve")
        return self.head

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
        if self.config.tied and isinstance(self.head, Weight):
            total += sum(form.nbytes for name, form in self.head.forms.items() if name != "fp32")
        elif self.config.tied and self.head is not self.embedding_VD:
            total += self.head.nbytes
        return total

    def _held(self) -> list[Frozen]:
        """Everything, a head that is the embedding once."""
        everything: list[Frozen] = [self.embedding_VD, self.norm_D]
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
        return self.embedding_VD[tokens_T]

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, E) of the rotary embedding, each angle in both halves."""
        angles_TE2 = positions_T[:, None].float() * self.inverse_frequency_E2
        angles_TE = torch.cat([angles_TE2, angles_TE2], -1)
        return angles_TE.cos(), angles_TE.sin()

    def norm(self, x_TD: Tensor) -> Tensor:
        """The final norm."""
        return self._rms_norm(x_TD, self.norm_D)

    def through_layers(
        self,
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        segments: Sequence[Update] = (),
        seeds: Seeds = MappingProxyType({}),
        checkpointing: bool = False,
    ) -> Tensor:
        """Carry what the first layer reads (T, D) to what comes after the last one (T, D).

        angles: cos and sin (T, E); seeds: of the adapter's dropout. checkpointing: keep for the gradient what each
        layer reads, and compute the layer again when it is wanted, the same dropout drawn (Chen et al. 2016,
        arXiv:1604.06174).
        """
        c, o, T, (cos_TE, sin_TE) = self.config, self.operations, len(x_TD), angles
        heads = c.heads + 2 * c.kv_heads
        update_TD: Tensor | None = None

        def layer_through(index: int, x_TD: Tensor, update_TD: Tensor | None) -> tuple[Tensor, Tensor]:
            """What comes after the layer: the sum so far, and what the layer adds to it last."""
            layer = self.layers[index]
            dtype = layer.qkv_OD.dtype
            x_TD, normed_TD = o.add_norm(x_TD, update_TD, layer.attention_norm_D, c.norm_eps, dtype)
            qkv_TO = lora_product(normed_TD, layer.qkv_OD, index, "qkv", segments, seeds.get((index, "qkv")))
            if layer.qkv_bias_O is not None:
                qkv_TO = qkv_TO + layer.qkv_bias_O.to(dtype)
            qkv_TNE = qkv_TO.view(T, heads, c.head_size)
            if layer.q_norm_E is not None and layer.k_norm_E is not None:
                q_THE, k_TKE, v_TKE = qkv_TNE.split([c.heads, c.kv_heads, c.kv_heads], 1)
                q_THE = self._rms_norm(q_THE, layer.q_norm_E)
                qkv_TNE = torch.cat([q_THE, self._rms_norm(k_TKE, layer.k_norm_E), v_TKE], 1)
            mixed_THE = attend(index, o.rotate(qkv_TNE, c.heads + c.kv_heads, cos_TE, sin_TE))
            update_TD = lora_product(
                mixed_THE.reshape(T, -1), layer.o_DI, index, "o", segments, seeds.get((index, "o"))
            )
            x_TD, normed_TD = o.add_norm(x_TD, update_TD, layer.mlp_norm_D, c.norm_eps, dtype)
            gate_up_T2I = lora_product(
                normed_TD, layer.gate_up_OD, index, "gate_up", segments, seeds.get((index, "gate_up"))
            )
            return x_TD, lora_product(
                o.swiglu(gate_up_T2I), layer.down_DI, index, "down", segments, seeds.get((index, "down"))
            )

        for index in range(c.layers):
            if checkpointing:
                x_TD, update_TD = checkpoint(
                    layer_through, index, x_TD, update_TD, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD, update_TD = layer_through(index, x_TD, update_TD)
        return x_TD if update_TD is None else x_TD + update_TD

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        return self.operations.add_norm(rows, None, weight, self.config.norm_eps, x.dtype)[1].view(x.shape)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V)."""
        return frozen_product(hidden_TD, self.head)


def forms_of(choice: Choice, exact: bool = False) -> Hold:
    """Weights in the forms of `choice`. exact: and in fp32, unless one of them has the weight to the last bit; a head,
    which may be the embedding, in any case."""
    regions = Regions()

    def held(weight: Frozen, is_head: bool) -> Weight:
        weight_OI = weight if isinstance(weight, Tensor) else dense(weight, torch.float32)
        forms = {name: quantised(head_form(name) if is_head else name, weight_OI, regions) for name in choice.forms}
        nearest = None
        if exact and "fp32" not in forms:
            same = (name for name in forms if torch.equal(forms[name].dense().float(), weight_OI))
            nearest = None if is_head else next(same, None)
            if nearest is None:
                forms["fp32"] = quantised("fp32", weight_OI, regions)
        return Weight(weight_OI.shape, forms, choice, nearest)

    return held


def _inverse_frequency(config: DecoderConfig) -> Tensor:
    """Rotary frequencies (head_size / 2), with Llama 3's or linear scaling where the configuration asks for it."""
    half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    inverse = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    factor = float(scaling["factor"])
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return inverse / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)
