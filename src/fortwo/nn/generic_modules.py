"""What takes the place of modules of transformers: linear modules and a head whose weights a pass holds, and attention.

Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fortwo.nn.decoder import Attend
from fortwo.nn.lora import Seeds, Update, lora_product
from fortwo.nn.recurrent import Narrowed, RecurrentMixer, recurrent_modules
from fortwo.nn.rows import Rows
from fortwo.quantization.formats import Frozen
from fortwo.quantization.matmul import frozen_product

ATTENTION = "fortwo"  # the name of our attention function in transformers

Key = tuple[int, str]  # the number of a layer, and the name of a linear module within it


@dataclass
class Pass:
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


class Projection(nn.Module):
    """A linear module whose weight the pass holds, with the updates of the adapters."""

    def __init__(self, current: Pass, key: Key, bias: Tensor | None) -> None:
        super().__init__()
        self._current, self._key = current, key
        self._bias_O = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        now, (layer, name) = self._current, self._key
        weight_OI = now.weights[self._key]
        x_TI = x.flatten(0, -2).to(weight_OI.dtype)
        y_TO = lora_product(x_TI, weight_OI, layer, name, now.segments, now.seeds.get(self._key)).to(x.dtype)
        return (y_TO if self._bias_O is None else y_TO + self._bias_O).view(*x.shape[:-1], -1)


class OutputHead(nn.Module):
    """The output embedding, whose weight the pass holds."""

    def __init__(self, current: Pass, bias: Tensor | None) -> None:
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


class HiddenStates(nn.Module):
    """Stands for the layers when only the head is to be computed."""

    def __init__(self, current: Pass, backbone: nn.Module) -> None:
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
    now: Pass = module.current_pass  # type: ignore[assignment]
    if now.probe is not None:
        return now.probe(module.layer_idx, q_1HTE, k_1KTE, v_1KTE, **options)
    assert now.attend is not None
    E = q_1HTE.shape[-1]
    if scaling is not None and scaling != E**-0.5:
        q_1HTE = q_1HTE * (scaling * E**0.5)
    qkv_TNE = torch.cat([q_1HTE[0], k_1KTE[0], v_1KTE[0]]).transpose(0, 1).contiguous()
    return now.attend(now.attentions[module.layer_idx], qkv_TNE)[None], None  # type: ignore[index]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


def carry_state(layer: nn.Module, current: Pass) -> bool:
    """Let the layer's recurrent modules know the rows of the pass. Whether it has any."""
    modules = recurrent_modules(layer)
    for module in modules:
        vars(module)["forward"] = RecurrentMixer(module, current.known_rows, current.narrowed)
    return bool(modules)
