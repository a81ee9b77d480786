"""The shape of a model of transformers: what one forward shows of its attention, its linear modules and its state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fortwo.errors import UnsupportedModel
from fortwo.nn.config import CONTEXT_NAMES
from fortwo.nn.generic_modules import Key, Pass
from fortwo.nn.rows import Rows

FAILURES = (TypeError, RuntimeError, AttributeError, ValueError, KeyError, IndexError)  # of transformers' forward
STATE = 4  # bytes of a number of the state that a layer carries, in whatever format the weights are read
PROBE = [3, 5, 7, 11, 13, 17, 19, 23]  # tokens
NOT_ADAPTED = {  # linear modules by model type: PEFT refuses out_proj, and takes the others for those of experts
    "falcon_h1": ("mamba.out_proj",),
    "nemotron_h": ("mixer.out_proj",),
    "qwen3_next": tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
}


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


def unsupported(architecture: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{architecture} cannot be served: {why}",
        param="architectures",
        hint="Choose another base; docs/guide-bases.md lists the families that are tested.",
    )


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the network's layers, and its name."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+(\.|$)", name):
            return name, module
    raise unsupported(type(model).__name__, "its layers are not in one list")


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


class AskedAttention(NamedTuple):
    """What one layer asks of its attention."""

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    softcap: float | None
    window: int | None


@torch.no_grad()
def probe(
    model: PreTrainedModel, layers: nn.ModuleList, current: Pass, recurrent: Set[int]
) -> tuple[dict[int, AskedAttention], dict[Key, list[int]], int]:
    """One forward: what each layer with attention asks of it, how many rows each linear module was called with, call by
    call, and the bytes of the state that a sequence carries besides. recurrent: layers that carry one."""
    architecture = type(model).__name__
    asked: dict[int, AskedAttention] = {}
    calls: dict[Key, list[int]] = {}

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        if options.get("s_aux") is not None:
            raise ValueError("it has attention sinks")
        softcap, window = options.get("softcap"), options.get("sliding_window")
        asked[layer] = AskedAttention(q.shape[1], k.shape[1], q.shape[3], v.shape[3], softcap or None, window or None)
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2), None

    def counted(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: calls.setdefault(key, []).append(given[0].shape[:-1].numel())

    hooks = [
        linear.register_forward_pre_hook(counted((number, name)))
        for number, layer in enumerate(layers)
        for name, linear in linears(layer)
    ]
    current.probe = attention
    current.rows = rows = Rows([len(PROBE)], states=[{}])
    try:
        embedded = model.get_input_embeddings()(torch.tensor(PROBE, device=model.device))
        positions = torch.arange(len(PROBE), device=model.device)
        model.get_submodule(model.base_model_prefix)(
            inputs_embeds=embedded[None], position_ids=positions[None], use_cache=False
        )
    except FAILURES as error:
        raise unsupported(architecture, f"transformers' forward fails with our attention ({error})") from None
    finally:
        current.probe = None
        for hook in hooks:
            hook.remove()
    if not asked:
        why = "it has no attention" if recurrent else "its attention cannot be replaced"
        raise unsupported(architecture, f"{why} (it calls no attention interface)")
    if without := sorted(set(range(len(layers))) - set(asked) - recurrent):
        raise unsupported(architecture, f"layers {without} have neither attention nor a state that can be kept")
    first = next(iter(asked.values()))
    if len({one[:5] for one in asked.values()}) > 1 or first.head_size != first.value_size:
        raise unsupported(architecture, "its heads differ in size, or its layers in the soft cap of their scores")
    return asked, calls, STATE * sum(state.numel for state in rows.after[0].values())


def uniform(
    layers: nn.ModuleList, calls: Mapping[Key, list[int]], others: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], frozenset[Key]]:
    """(in, out) of the linear modules that have one shape in all layers that have them, and that read every token once;
    and what some layers lack of them. The `others`, and those of a router's experts, which read a part of the tokens,
    are served as they are and cannot be adapted."""
    named = [dict(linears(layer)) for layer in layers]
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


def config_of(
    model: PreTrainedModel,
    attention: Sequence[AskedAttention],
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
