"""Any causal language model that transformers builds, as a network that the backends compute like the decoder.

transformers defines the layers; only its attention function, the linear modules of its layers and its head are
replaced. They call the backend's `attend`, add the adapters' updates and multiply with frozen weights in any format.
Packed rows, prefixes, mixed adapters and training therefore work as they do for the decoder. Shape suffixes as in
`decoder`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from fortwo.errors import UnsupportedModel
from fortwo.nn.config import CONTEXT_NAMES
from fortwo.nn.decoder import Angles, Attend, Hold, Operations
from fortwo.nn.head import Head
from fortwo.nn.lora import Seeds, Update, in_training, lora_product
from fortwo.nn.packing import PackedAttention, pack
from fortwo.nn.recurrent import Narrowed, RecurrentMixer, recurrent_modules
from fortwo.nn.rows import Rows
from fortwo.quantization.formats import Frozen, Weight, bytes_to_train, to_train
from fortwo.quantization.matmul import frozen_product

log = logging.getLogger(__name__)
ATTENTION = "fortwo"  # the name of our attention function in transformers
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # the largest relative difference to transformers' own logits
STATE = 4  # bytes of a number of the state that a layer carries, in whatever format the weights are read
PROBE = [3, 5, 7, 11, 13, 17, 19, 23]  # tokens
PROBES = [PROBE, [*PROBE[:3], *PROBE[:4]]]  # rows of the comparison with transformers, which begin alike
NOT_ADAPTED = {  # linear modules by model type: PEFT refuses the first, and takes the others for those of the experts
    "falcon_h1": ("mamba.out_proj",),
    "qwen3_next": tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
}

Key = tuple[int, str]  # the number of a layer, and the name of a linear module within it


@dataclass(frozen=True)
class GenericConfig:
    """What engine, trainer and plan ask of a network's shape, as `DecoderConfig` answers it.

    modules: (in, out) of each linear module that an adapter can change, by its name within a layer, such as
    attention.dense; path: where the layers are, such as gpt_neox.layers; lacking: what some layers do not have, as
    (layer, module). parameters: of the whole network. windows: how many tokens each layer with attention sees, None
    for all.
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
    parameters: int
    tied: bool
    path: str
    modules: Mapping[str, tuple[int, int]]
    lacking: frozenset[Key]
    windows: tuple[int | None, ...]
    attention_softcap: float | None
    state_bytes: int

    def window_of(self, layer: int) -> int | None:
        return self.windows[layer]

    @property
    def kv_layers(self) -> int:
        return len(self.windows)

    def has(self, layer: int, target: str) -> bool:
        return (layer, target) not in self.lacking

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Each module is a product of its own."""
        return {name: (name,) for name in self.modules}

    def module_name(self, layer: int, target: str) -> str:
        """PEFT's name of a module, such as gpt_neox.layers.3.attention.dense."""
        return f"{self.path}.{layer}.{target}"

    def in_features(self, group: str) -> int:
        return self.modules[group][0]

    def columns(self, name: str) -> tuple[int, int]:
        return 0, self.modules[name][1]


@dataclass
class _Pass:
    """What the modules read during a forward, and during the backward that follows it."""

    attend: Attend | None = None
    attentions: Mapping[int, int] = field(default_factory=dict)  # the number of each layer among those with attention
    rows: Rows | None = None
    segments: Sequence[Update] = ()
    seeds: Seeds = field(default_factory=dict)
    weights: Mapping[Key, Frozen] = field(default_factory=dict)
    head: Frozen | None = None
    hidden_TD: Tensor | None = None
    probe: Callable[..., tuple[Tensor, None]] | None = None  # in place of `attend`, while the network is probed

    def known_rows(self) -> Rows:
        assert self.rows is not None, "layers with a state have to know the rows of a pass (Network.with_rows)"
        return self.rows

    @contextmanager
    def narrowed(self, places: Sequence[range]) -> Iterator[None]:
        """Within it only the tokens of these places are computed, one place behind the other."""
        rows, segments, seeds = self.known_rows(), self.segments, self.seeds
        if sum(map(len, places)) == rows.tokens:
            yield
            return
        places_S = torch.tensor([place for span in places for place in span])
        self.segments = [Narrowed.of(segment, places_S, rows.tokens) for segment in segments]
        self.seeds = {key: (seed + places[0].start) % 2**32 for key, seed in seeds.items()}
        try:
            yield
        finally:
            self.segments, self.seeds = segments, seeds


class _Projection(nn.Module):
    """A linear module whose weight the pass holds, with the updates of the adapters."""

    def __init__(self, current: _Pass, key: Key, bias: Tensor | None) -> None:
        super().__init__()
        self._current, self._key = current, key
        self._bias_O = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        now, (layer, name) = self._current, self._key
        weight_OI = now.weights[self._key]
        x_TI = x.flatten(0, -2).to(weight_OI.dtype)
        y_TO = lora_product(x_TI, weight_OI, layer, name, now.segments, now.seeds.get(self._key)).to(x.dtype)
        return (y_TO if self._bias_O is None else y_TO + self._bias_O).view(*x.shape[:-1], -1)


class _Head(nn.Module):
    """The output embedding, whose weight the pass holds."""

    def __init__(self, current: _Pass, bias: Tensor | None) -> None:
        super().__init__()
        self._current = current
        self._bias_V = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        assert self._current.head is not None
        y_TV = frozen_product(x.flatten(0, -2), self._current.head).view(*x.shape[:-1], -1)
        return y_TV if self._bias_V is None else y_TV + self._bias_V


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """Hidden states alone; whatever else a model's head asks for, such as a router's logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Hidden(nn.Module):
    """Stands for the layers when only the head is to be computed."""

    def __init__(self, current: _Pass, backbone: nn.Module) -> None:
        super().__init__()
        self._current, self._layers = current, (backbone,)  # in a tuple, so that its modules are not this one's

    def __getattr__(self, name: str) -> Any:
        """Numbers of the layers that some heads read."""
        return super().__getattr__(name) if name.startswith("_") else getattr(self._layers[0], name)

    @property
    def decoder(self) -> nn.Module:
        """Where some models keep their layers."""
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        assert self._current.hidden_TD is not None
        return _Output(last_hidden_state=self._current.hidden_TD[None])


class _HeadFunction:
    """A head whose logits are not a product alone, such as one with a bias or a soft cap: from hidden states (N, D) to
    logits (N, V)."""

    def __init__(self, network: GenericDecoder) -> None:
        self._network = network
        self.dtype = network.dtype
        self.shape = (network.config.vocabulary, network.config.hidden)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return self._network.logits(hidden_ND)


def _attention(
    module: nn.Module,
    q_1HTE: Tensor,
    k_1KTE: Tensor,
    v_1KTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: what the pass attends with, which scales by 1 / sqrt(E)."""
    now: _Pass = module.current_pass  # type: ignore[assignment]
    if now.probe is not None:
        return now.probe(module.layer_idx, q_1HTE, k_1KTE, v_1KTE, **options)
    assert now.attend is not None
    E = q_1HTE.shape[-1]
    if scaling is not None and scaling != E**-0.5:
        q_1HTE = q_1HTE * (scaling * E**0.5)
    qkv_TNE = torch.cat([q_1HTE[0], k_1KTE[0], v_1KTE[0]]).transpose(0, 1).contiguous()
    return now.attend(now.attentions[module.layer_idx], qkv_TNE)[None], None  # type: ignore[index]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class GenericDecoder:
    """A frozen causal language model of transformers, with the interface of `Decoder`.

    hold: as in `Decoder`. The layers compute in fp32 between the products. Raises UnsupportedModel for a network that
    cannot be computed token by token through one attention function, and for one whose logits then differ from those
    of transformers.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu", hold: Hold | None = None) -> None:
        self.device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self.device)
        architecture = type(model).__name__
        with torch.no_grad():
            wanted_TV = torch.cat([_plain_logits(model, row) for row in PROBES])
        self._now = now = _Pass()
        self._rows: Rows | None = None
        self._backbone = model.get_submodule(model.base_model_prefix)
        path, layers = _layers(model)
        self._layers, self._forwards = layers, [layer.forward for layer in layers]
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.current_pass = now
        self._recurrent = {number for number, layer in enumerate(layers) if _carry_state(layer, now)}
        model.set_attn_implementation(ATTENTION)
        attention, rows, state_bytes = _probe(self, architecture)
        now.attentions = {layer: place for place, layer in enumerate(sorted(attention))}
        modules, lacking = _uniform(layers, rows, NOT_ADAPTED.get(model.config.model_type, ()))
        self.weights: dict[Key, Frozen] = {}
        for number, layer in enumerate(layers):
            for name in modules:
                if (number, name) in lacking:
                    continue
                linear = layer.get_submodule(name)
                assert isinstance(linear, nn.Linear | Conv1D)
                weight_OI = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
                self.weights[number, name] = weight_OI.detach()
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, _Projection(now, (number, name), linear.bias))
        output = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        assert output is not None
        tied = output.weight is embedding.weight
        self.head: Frozen = output.weight.detach()
        model.set_output_embeddings(_Head(now, output.bias))
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        self._with_head = copy(model)
        self._with_head._modules = {**model._modules, model.base_model_prefix: _Hidden(now, self._backbone)}
        self._embedding = embedding
        self._any_token = torch.tensor([PROBE[:1]], device=self.device)
        self.config = _config(
            model,
            [attention[layer] for layer in sorted(attention)],
            modules,
            lacking,
            path,
            tied,
            self._rest() + _numel(self._multiplied(), tied),
            state_bytes,
        )
        self._check(wanted_TV)
        if hold is not None:
            for key, weight in self.weights.items():
                self.weights[key] = hold(weight, False)
            self.head = hold(self.head, True)

    # ------------------------------------------------------------ what Decoder offers

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def parameters(self) -> int:
        return self.config.parameters

    @property
    def bytes(self) -> int:
        """Memory held by the weights."""
        held = [*self.weights.values(), *([] if self.config.tied and isinstance(self.head, Tensor) else [self.head])]
        return 4 * self._rest() + sum(weight.nbytes for weight in held)

    @property
    def head_VD(self) -> Head:
        """The head of a network to train on. Raises TypeError for one that is held in formats."""
        if isinstance(self.head, Weight):
            raise TypeError("train on in_fp32() or in_bf16(): these weights are held to serve")
        return self.head if self._plain_head else _HeadFunction(self)

    def with_operations(self, operations: Operations) -> GenericDecoder:
        """The network itself: transformers defines its small operations."""
        del operations
        return self

    def with_rows(self, rows: Rows) -> GenericDecoder:
        other = copy(self)
        other._rows = rows
        return other

    def beginning(self, layers: int) -> GenericDecoder:
        """The network itself: transformers' layers cannot be left out."""
        del layers
        return self

    def in_fp32(self) -> GenericDecoder:
        return self._with(to_train(torch.float32))

    def in_bf16(self) -> GenericDecoder:
        return self._with(to_train(torch.bfloat16))

    def bytes_to_train(self, bf16: bool) -> int:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return sum(bytes_to_train(weight, dtype) for weight in self._multiplied())

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        segments: Sequence[Update] = (),
        dropout: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        lora = in_training(segments)
        seeds: Seeds = lora.seeds() if lora is not None and dropout else {}
        return self.through_layers(
            self.embed(tokens_T), self.angles(positions_T), attend, segments, seeds, checkpointing
        )

    def embed(self, tokens_T: Tensor) -> Tensor:
        embedded: Tensor = self._embedding(tokens_T)
        return embedded

    def angles(self, positions_T: Tensor) -> list[Angles | None]:
        """The positions: transformers computes the angles."""
        return [(positions_T, positions_T)]

    def norm(self, x_TD: Tensor) -> Tensor:
        """Nothing more: transformers' layers end with the norm."""
        return x_TD

    def through_layers(
        self,
        x_TD: Tensor,
        angles: Sequence[Angles | None],
        attend: Attend,
        segments: Sequence[Update] = (),
        seeds: Seeds = MappingProxyType({}),
        checkpointing: bool = False,
    ) -> Tensor:
        """Carry what the first layer reads (T, D) to what comes after the final norm (T, D)."""
        now = self._now
        assert angles[0] is not None
        positions_T, _ = angles[0]
        now.attend, now.segments, now.seeds, now.weights = attend, segments, seeds, self.weights
        now.rows = self._rows
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            vars(layer)["forward"] = again if checkpointing else forward
        hidden: Tensor = self._backbone(
            inputs_embeds=x_TD[None], position_ids=positions_T[None], use_cache=False
        ).last_hidden_state
        return hidden[0]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V), as transformers makes them of the head's product."""
        self._now.head, self._now.hidden_TD = self.head, hidden_TD
        logits: Tensor = self._with_head(self._any_token).logits
        return logits[0].float()

    # ------------------------------------------------------------ inside

    def _multiplied(self) -> list[Frozen]:
        return [*self.weights.values(), self.head]

    def _rest(self) -> int:
        """Numbers of the embedding, norms and whatever else stays in transformers' modules."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def _with(self, change: Hold) -> GenericDecoder:
        other = copy(self)
        other.weights = {key: change(weight, False) for key, weight in self.weights.items()}
        other.head = change(self.head, True)
        return other

    @torch.no_grad()
    def _check(self, wanted_TV: Tensor) -> None:
        """Compare packed rows, and of layers with a state the parts of one row, with transformers' own logits of each
        row. Raises UnsupportedModel where they differ."""
        packed = pack(PROBES, self.device)
        network = self.with_rows(Rows(packed.lengths, packed.prefix))
        hidden_TD = network.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, self.config))
        places = [packed.place(row, position) for row, tokens in enumerate(PROBES) for position in range(len(tokens))]
        found_TV = self.logits(hidden_TD[places])
        if (off := _difference(found_TV, wanted_TV)) > CLOSE[self.dtype]:
            raise _unsupported(
                self.config.architecture,
                f"its attention is not plain causal attention (its logits are off by {off:.1e})",
            )
        if self._recurrent:
            found_PV = self.logits(self._in_parts(PROBE, (5, 7)))
            if (off := _difference(found_PV, wanted_TV[: len(PROBE)])) > CLOSE[self.dtype]:
                raise _unsupported(
                    self.config.architecture,
                    f"the state of its layers does not continue a sequence (its logits are off by {off:.1e})",
                )
        product_TV = frozen_product(hidden_TD[places], self.head).float()
        self._plain_head = bool(torch.allclose(found_TV, product_TV, rtol=1e-4, atol=1e-4))

    def _in_parts(self, tokens: list[int], cuts: Sequence[int]) -> Tensor:
        """Hidden states of one row (T, D), computed in parts that end at `cuts` and at the last token."""
        hidden, rows = [], Rows([0], states=[{}])
        read: dict[int, list[Tensor]] = {}
        for first, last in pairwise((0, *cuts, len(tokens))):
            attention = PackedAttention(pack([tokens[:last]], self.device, prefix=0), self.config)

            def attend(layer: int, qkv_TNE: Tensor, attention: PackedAttention = attention) -> Tensor:
                read.setdefault(layer, []).append(qkv_TNE)
                return attention(layer, torch.cat(read[layer]))[-len(qkv_TNE) :]

            rows = Rows([last - first], states=rows.after)
            positions_T = torch.arange(first, last, device=self.device)
            tokens_T = torch.tensor(tokens[first:last], device=self.device)
            hidden.append(self.with_rows(rows).forward(tokens_T, positions_T, attend))
        return torch.cat(hidden)


def load(directory: Path, device: torch.device | str, hold: Hold | None, dtype: torch.dtype) -> GenericDecoder:
    """Read a model directory in transformers' layout. dtype: in which the weights are read. Of a model with a tower for
    pictures the text part is read, where transformers has a class for it. No code of the directory is run, and no
    pickle is read. Raises UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
        text_alone = bool(towers) and _has_text_class(config)
        if text_alone:
            log.warning("The text part of %s is served; %s is left out.", type(config).__name__, " and ".join(towers))
        elif towers:
            raise _unsupported(type(config).__name__, f"it has a tower that is not for text ({', '.join(towers)})")
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            raise _unsupported(type(config).__name__, f"its weights are quantised ({quantised.get('quant_method')})")
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UnsupportedModel:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"transformers cannot load the model: {first}",
            param="architectures",
            hint="fortwo serves causal language models that transformers itself knows; it never runs a model's code.",
        ) from None
    architecture, named = type(model).__name__, config.architectures or ["?"]
    if architecture not in named and not text_alone:
        raise _unsupported(named[0], f"its model_type {config.model_type!r} means {architecture}")
    for what, names in (
        ("lacks", "missing_keys"),
        ("has a foreign", "unexpected_keys"),
        ("has in another shape", "mismatched_keys"),
    ):
        if wrong := sorted(map(str, found[names])):
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise _unsupported(architecture, f"the file {what} tensor {wrong[0]}{more}")
    return GenericDecoder(model, device, hold)


def _has_text_class(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for the text part of this model, which knows what to leave out."""
    text, mapping = config.sub_configs.get("text_config"), AutoModelForCausalLM._model_mapping
    return text is not None and type(config) in mapping and mapping[type(config)].config_class is text


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The relative one; infinite where there are numbers that are none."""
    off = float((found - wanted).norm() / wanted.norm())
    return off if math.isfinite(off) else math.inf


def _unsupported(architecture: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{architecture} cannot be served: {why}",
        param="architectures",
        hint="Choose another base; docs/guide-bases.md lists the families that are tested.",
    )


def _plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """transformers' own logits (T, V)."""
    logits: Tensor = model(torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0].float()


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the network's layers, and its name."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+(\.|$)", name):
            return name, module
    raise _unsupported(type(model).__name__, "its layers are not in one list")


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


class _Attention(NamedTuple):
    """What one layer asks of its attention."""

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    softcap: float | None
    window: int | None


def _carry_state(layer: nn.Module, current: _Pass) -> bool:
    """Let the layer's recurrent modules know the rows of the pass. Whether it has any."""
    modules = recurrent_modules(layer)
    for module in modules:
        vars(module)["forward"] = RecurrentMixer(module, current.known_rows, current.narrowed)
    return bool(modules)


@torch.no_grad()
def _probe(decoder: GenericDecoder, architecture: str) -> tuple[dict[int, _Attention], dict[Key, list[int]], int]:
    """One forward: what each layer with attention asks of it, how many rows each linear module was called with, call by
    call, and the bytes of the state that a sequence carries besides."""
    asked: dict[int, _Attention] = {}
    calls: dict[Key, list[int]] = {}

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        if options.get("s_aux") is not None:
            raise ValueError("it has attention sinks")
        softcap, window = options.get("softcap"), options.get("sliding_window")
        asked[layer] = _Attention(q.shape[1], k.shape[1], q.shape[3], v.shape[3], softcap or None, window or None)
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2), None

    def counted(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: calls.setdefault(key, []).append(given[0].shape[:-1].numel())

    hooks = [
        linear.register_forward_pre_hook(counted((number, name)))
        for number, layer in enumerate(decoder._layers)
        for name, linear in _linears(layer)
    ]
    decoder._now.probe = attention
    decoder._now.rows = rows = Rows([len(PROBE)], states=[{}])
    try:
        embedded = decoder._model.get_input_embeddings()(torch.tensor(PROBE, device=decoder.device))
        positions = torch.arange(len(PROBE), device=decoder.device)
        decoder._backbone(inputs_embeds=embedded[None], position_ids=positions[None], use_cache=False)
    except (TypeError, RuntimeError, AttributeError, ValueError, KeyError, IndexError) as error:
        raise _unsupported(architecture, f"transformers' forward fails with our attention ({error})") from None
    finally:
        decoder._now.probe = None
        for hook in hooks:
            hook.remove()
    if not asked:
        why = "it has no attention" if decoder._recurrent else "its attention cannot be replaced"
        raise _unsupported(architecture, f"{why} (it calls no attention interface)")
    if without := sorted(set(range(len(decoder._layers))) - set(asked) - decoder._recurrent):
        raise _unsupported(architecture, f"layers {without} have neither attention nor a state that can be kept")
    first = next(iter(asked.values()))
    if len({one[:5] for one in asked.values()}) > 1 or first.head_size != first.value_size:
        raise _unsupported(architecture, "its heads differ in size, or its layers in the soft cap of their scores")
    return asked, calls, STATE * sum(state.numel for state in rows.after[0].values())


def _uniform(
    layers: nn.ModuleList, calls: Mapping[Key, list[int]], others: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], frozenset[Key]]:
    """(in, out) of the linear modules that have one shape in all layers that have them, and that read every token once;
    and what some layers lack of them. The `others`, and those of a router's experts, which read a part of the tokens,
    are served as they are and cannot be adapted."""
    named = [dict(_linears(layer)) for layer in layers]
    found: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys(name for linears in named for name in linears):
        same = {number: linears[name] for number, linears in enumerate(named) if name in linears}
        once = all(calls.get((number, name)) == [len(PROBE)] for number in same)
        sizes = {_size(linear) for linear in same.values()}
        if once and len(sizes) == 1 and name not in others:
            (found[name],) = sizes
    lacking = ((number, name) for number, linears in enumerate(named) for name in found if name not in linears)
    return found, frozenset(lacking)


def _size(linear: nn.Module) -> tuple[int, int]:
    """Of a linear module, (in, out)."""
    assert isinstance(linear, nn.Linear | Conv1D)
    first, second = linear.weight.shape
    return (first, second) if isinstance(linear, Conv1D) else (second, first)


def _config(
    model: PreTrainedModel,
    attention: Sequence[_Attention],
    modules: Mapping[str, tuple[int, int]],
    lacking: frozenset[Key],
    path: str,
    tied: bool,
    parameters: int,
    state_bytes: int,
) -> GenericConfig:
    c, one = model.config.get_text_config(), attention[0]
    context = next((value for name in CONTEXT_NAMES if isinstance(value := getattr(c, name, None), int)), 2048)
    rope = getattr(c, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(c, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("dynamic", "longrope") and original:
        context = min(context, original)  # beyond it the angles of all rows would depend on the longest one
    if chunk := getattr(c, "attention_chunk_size", None):
        context = min(context, chunk)
    hidden = model.get_input_embeddings().weight.shape[1]
    return GenericConfig(
        architecture=type(model).__name__,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        hidden=hidden,
        layers=c.num_hidden_layers,
        heads=one.heads,
        kv_heads=one.kv_heads,
        head_size=one.head_size,
        intermediate=max((max(size) for size in modules.values()), default=4 * hidden),
        context=context,
        parameters=parameters,
        tied=tied,
        path=path,
        modules=MappingProxyType(dict(modules)),
        lacking=lacking,
        windows=tuple(layer.window for layer in attention),
        attention_softcap=one.softcap,
        state_bytes=state_bytes,
    )


def _numel(weights: Sequence[Frozen], tied: bool) -> int:
    held = weights[:-1] if tied else weights
    return sum(math.prod(weight.shape) for weight in held)
