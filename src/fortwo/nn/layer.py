"""The weights of one layer of the decoder. Shape suffixes as in `decoder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fortwo.nn.fused_weights import Fused
from fortwo.quantization.blocks import Read
from fortwo.quantization.formats import Frozen


@dataclass(frozen=True)
class Layer:
    """One layer's weights; None for what the network has not. after_attention and after_mlp: norms of what attention
    and MLP add to the sum."""

    attention_norm_D: Tensor | None
    attention_norm_bias_D: Tensor | None
    qkv_OD: Frozen
    qkv_bias_O: Tensor | None
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    o_DI: Frozen
    o_bias_D: Tensor | None
    after_attention_D: Tensor | None
    mlp_norm_D: Tensor | None
    mlp_norm_bias_D: Tensor | None
    gate_up_OD: Frozen
    gate_up_bias_O: Tensor | None
    down_DI: Frozen
    down_bias_D: Tensor | None
    after_mlp_D: Tensor | None


def read_layer(fused: Fused, index: int, held: Callable[[Read], Frozen]) -> Layer:
    """The weights of one layer, read one after the other. held: called with each that is multiplied."""
    c, at = fused.config, f"model.layers.{index}"

    def norm(name: str, there: bool, size: int = c.hidden) -> Tensor | None:
        return fused.norm(f"{at}.{name}", size) if there else None

    def bias(group: str, there: bool) -> Tensor | None:
        return fused.bias(index, group) if there else None

    normed = c.qk_norm or c.whole_qk_norm
    q, k = (c.head_size * (heads if c.whole_qk_norm else 1) for heads in (c.heads, c.kv_heads))
    both = c.pre_norm and c.post_norm
    return Layer(
        attention_norm_D=norm("input_layernorm", c.pre_norm),
        attention_norm_bias_D=fused.norm_bias(f"{at}.input_layernorm", c.hidden),
        qkv_OD=held(fused.weight(index, "qkv")),
        qkv_bias_O=bias("qkv", c.qkv_bias),
        q_norm_E=norm("self_attn.q_norm", normed, q),
        k_norm_E=norm("self_attn.k_norm", normed, k),
        o_DI=held(fused.weight(index, "o")),
        o_bias_D=bias("o", c.o_bias),
        after_attention_D=norm("post_attention_layernorm", c.post_norm),
        mlp_norm_D=norm("pre_feedforward_layernorm" if both else "post_attention_layernorm", c.pre_norm),
        mlp_norm_bias_D=fused.norm_bias(f"{at}.post_attention_layernorm", c.hidden),
        gate_up_OD=held(fused.weight(index, "gate_up")),
        gate_up_bias_O=bias("gate_up", c.mlp_bias),
        down_DI=held(fused.weight(index, "down")),
        down_bias_D=bias("down", c.mlp_bias),
        after_mlp_D=norm("post_feedforward_layernorm", c.post_norm),
    )
