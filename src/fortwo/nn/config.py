"""The network's shape and features, read from a transformers config.json. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol

from fortwo.errors import UnsupportedModel
from fortwo.nn.config_fields import Fields
from fortwo.nn.families import Family, family_of
from fortwo.nn.lora_config import GROUPS, JOINED, module_name
from fortwo.nn.rope_config import Rope, read_rope

Activation = Literal["silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: dict[Any, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # in config.json


class Shape(Protocol):
    """What the parts that serve and train ask of any network's shape.

    kv_layers: layers with attention, the only ones that `attend` and `window_of` count; kv_heads, head_size: of the
    keys and values; state_bytes: what a sequence of any length carries besides them; context: the most tokens of a
    sequence; attention_softcap: as in `DecoderConfig`.
    """

    @property
    def architecture(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_layers(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def attention_softcap(self) -> float | None: ...
    @property
    def parameters(self) -> int: ...
    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The linear modules that each product computes together."""

    def has(self, layer: int, target: str, /) -> bool:
        """Whether the layer has this linear module of `groups`."""

    def window_of(self, layer: int, /) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all."""

    def module_name(self, layer: int, target: str, /) -> str:
        """PEFT's name of a linear module, such as model.layers.3.self_attn.q_proj."""

    def in_features(self, group: str, /) -> int:
        """The input width of a product."""

    def columns(self, name: str, /) -> tuple[int, int]:
        """First and past-last output column of a linear module within its product."""


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama network, whose sizes have no defaults, and the features in which others differ from it, which have.

    layer_norm: norms subtract the mean and have a bias; norm_offset: added to the weights of all norms; whole_qk_norm:
    q and k are normed over all heads together; pre_norm, post_norm: norms before and behind attention and MLP;
    query_scale: of queries, before they are divided by the square root of head_size; attention_softcap, logit_softcap:
    c of c * tanh(x / c). Layers in `windowed` see the last `window` tokens alone, themselves included, and turn by
    `window_rope` where there is one; those in `without_rope` know no positions. joined_projections: the model's files
    have one projection for q, k and v, and one for gate and up.
    """

    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    context: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    layer_norm: bool = False
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    query_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    windowed: frozenset[int] = frozenset()
    window_rope: Rope | None = None
    without_rope: frozenset[int] = frozenset()
    joined_projections: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a transformers config.json. Raises UnsupportedModel naming what is not supported, and every field that
        is missing or wrong."""
        if not isinstance(config, Mapping):
            raise UnsupportedModel("config.json is not a JSON object", hint="Save the model again with transformers.")
        architecture, family = family_of(config)
        f = Fields(config, {**_DEFAULTS, **family.defaults})
        heads, hidden, layers = (f.whole(name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        head_size = f.optional_whole("head_dim") or max(1, hidden // heads)
        kv_heads = f.optional_whole("num_key_value_heads") or heads
        if heads % kv_heads:
            f.wrong("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        context = f.whole("max_position_embeddings")
        windowed, window = _windows(f, family, layers)
        rope, window_rope, context = _ropes(f, family, head_size, context)
        found = cls(
            architecture=architecture,
            vocabulary=f.whole("vocab_size"),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            intermediate=f.whole("intermediate_size"),
            context=context,
            norm_eps=f.number("layer_norm_eps" if "layer_norm" in family.traits else "rms_norm_eps"),
            rope=rope,
            tied=f.flag("tie_word_embeddings"),
            activation=_activation(f, architecture),
            window=window,
            windowed=windowed,
            window_rope=window_rope if windowed else None,
            without_rope=_without_rope(f, architecture, layers),
            mlp_bias=f.flag("mlp_bias"),
            **_biases(f, family),
            **_scales(f, architecture, hidden, head_size),
            **{trait: value for trait, value in family.traits.items() if trait != "qkv_bias"},
        )
        for name in ("use_bidirectional_attention", "use_parallel_residual", "qk_layernorm"):
            if f.flag(name):
                f.wrong(name, "is not supported")
        f.raise_findings()
        return found

    @property
    def features(self) -> frozenset[str]:
        """In what the network differs from Llama's, by names of fields; and "partial_rope" and "rope_amplitude". A
        kernel for a whole pass names those it computes, and must not be used where there are others."""
        differing = {
            field.name
            for field in fields(self)
            if field.default is not MISSING and getattr(self, field.name) != field.default
        }
        if self.rope.size != self.head_size:
            differing.add("partial_rope")
        if self.rope.amplitude != 1:
            differing.add("rope_amplitude")
        return frozenset(differing)

    @property
    def kv_layers(self) -> int:
        return self.layers

    @property
    def state_bytes(self) -> int:
        return 0

    def has(self, layer: int, target: str) -> bool:
        del layer, target
        return True

    def fits_window(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is within the window of all layers."""
        return not self.windowed or self.window is None or tokens <= self.window

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all."""
        return self.window if layer in self.windowed else None

    @property
    def parameters(self) -> int:
        """Of embedding, head and the projections; the rest is next to nothing."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = self.hidden * (2 * q + 2 * kv + 3 * self.intermediate)
        return self.layers * layer + self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The projections of each fused product."""
        return JOINED if self.joined_projections else GROUPS

    def module_name(self, layer: int, target: str) -> str:
        """PEFT's name of a projection, such as model.layers.3.self_attn.q_proj."""
        return module_name(layer, target)

    def in_features(self, group: str) -> int:
        """Input width of a fused product: qkv, o, gate_up or down."""
        return {
            "qkv": self.hidden,
            "o": self.heads * self.head_size,
            "gate_up": self.hidden,
            "down": self.intermediate,
        }[group]

    def columns(self, name: str) -> tuple[int, int]:
        """First and past-last output column of a projection within its fused product."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (0, q),
            "k_proj": (q, q + kv),
            "v_proj": (q + kv, q + 2 * kv),
            "qkv_proj": (0, q + 2 * kv),
            "o_proj": (0, self.hidden),
            "gate_proj": (0, self.intermediate),
            "up_proj": (self.intermediate, 2 * self.intermediate),
            "gate_up_proj": (0, 2 * self.intermediate),
            "down_proj": (0, self.hidden),
        }[name]


def _activation(f: Fields, architecture: str) -> Activation:
    name = "hidden_activation" if "hidden_activation" in f else "hidden_act"
    value = f.raw(name)
    if architecture == "GemmaForCausalLM" and value == "gelu":
        return "gelu_tanh"  # what the first Gemma means by it
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        f.wrong(name, f"is not supported, only {', '.join(_ACTIVATIONS)}")
        return "silu"
    return _ACTIVATIONS[value]


def _biases(f: Fields, family: Family) -> dict[str, bool]:
    given = f.flag("attention_bias") and family.attention_bias == "qkvo"
    qkv = family.traits.get("qkv_bias") or f.flag("use_qkv_bias")
    return {"qkv_bias": given or bool(qkv), "o_bias": given}


def _scales(f: Fields, architecture: str, hidden: int, head_size: int) -> dict[str, Any]:
    """What embeddings, updates, queries and logits are multiplied with, and where the latter are capped."""
    if architecture == "GemmaForCausalLM":
        return {"embedding_scale": hidden**0.5}
    if architecture.startswith("Gemma"):
        return {
            "embedding_scale": hidden**0.5,
            "query_scale": (head_size / f.number("query_pre_attn_scalar")) ** 0.5,
            # transformers' Gemma 3 reads the caps and computes without that of attention
            "attention_softcap": f.optional_number("attn_logit_softcapping") if "Gemma2" in architecture else None,
            "logit_softcap": f.optional_number("final_logit_softcapping"),
        }
    if architecture == "GraniteForCausalLM":
        return {
            "embedding_scale": f.number("embedding_multiplier"),
            "residual_scale": f.number("residual_multiplier"),
            "query_scale": f.number("attention_multiplier") * head_size**0.5,
            "logit_scale": 1 / f.number("logits_scaling"),
        }
    return {}


def _without_rope(f: Fields, architecture: str, layers: int) -> frozenset[int]:
    """SmolLM3's field no_rope_layers has 1 for a layer with positions, and 0 for one without."""
    if architecture != "SmolLM3ForCausalLM":
        return frozenset()
    if "no_rope_layers" not in f:
        interval = f.whole("no_rope_layer_interval")
        return frozenset(range(interval - 1, layers, interval))
    given = f.raw("no_rope_layers")
    if not isinstance(given, list | tuple) or len(given) != layers or any(one not in (0, 1) for one in given):
        f.wrong("no_rope_layers", f"is not a list of {layers} numbers, each 0 or 1")
        return frozenset()
    return frozenset(layer for layer, has_rope in enumerate(given) if not has_rope)


def _windows(f: Fields, family: Family, layers: int) -> tuple[frozenset[int], int | None]:
    """The layers that see a window alone, and its tokens."""
    switched_off = family.sliding in ("last", "without_rope") and not f.flag("use_sliding_window")
    if family.sliding == "none" or switched_off or "sliding_window" not in f:
        return frozenset(), None
    window = f.whole("sliding_window")
    if family.sliding == "all":
        return frozenset(range(layers)), window
    if "layer_types" in f:
        types = f.words("layer_types", layers, _LAYER_TYPES)
        found = {layer for layer, kind in enumerate(types) if kind == "sliding_attention"}
    elif family.sliding == "last":
        found = set(range(f.whole("max_window_layers", least=0), layers))
    elif family.sliding == "without_rope":
        found = set(_without_rope(f, "SmolLM3ForCausalLM", layers))
    else:
        pattern = f.whole("sliding_window_pattern")
        found = {layer for layer in range(layers) if (layer + 1) % pattern}
    return frozenset(found), window if found else None


def _ropes(f: Fields, family: Family, head_size: int, context: int) -> tuple[Rope, Rope | None, int]:
    """The rope, that of layers with a window where it is another one, and the context in which both hold."""
    name = "rope_scaling" if f.raw("rope_scaling") else "rope_parameters"
    given = f.raw(name) or {}
    outer = f.inner(name, given)
    values = given if isinstance(given, Mapping) else {}
    by_kind = any(kind in values for kind in _LAYER_TYPES)
    inherited = {"rope_theta": f.raw("rope_theta")}
    if family.partial:
        inherited["partial_rotary_factor"] = f.raw("partial_rotary_factor")
    original = f.optional_whole("original_max_position_embeddings")

    def rope_of(kind: str, inherited: Mapping[str, Any]) -> tuple[Rope, int]:
        own = outer.inner(kind, values.get(kind) or {}, inherited) if by_kind else f.inner(name, values, inherited)
        return read_rope(own, head_size, context, original, family.partial)

    rope, longest = rope_of("full_attention", inherited)
    local = f.raw("rope_local_base_freq") if "rope_local_base_freq" in family.defaults else None
    if local is None and not by_kind:
        return rope, None, longest
    if local is not None and not by_kind:
        values = {}
    window_rope, shorter = rope_of("sliding_attention", inherited if local is None else {"rope_theta": local})
    return rope, None if window_rope == rope else window_rope, min(longest, shorter)
