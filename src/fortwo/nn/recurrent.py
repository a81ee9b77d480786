"""Layers of transformers that carry a state from token to token: linear attention, state spaces, short convolutions.

The state of a sequence is the last inputs of a causal convolution and, except for a convolution alone, a matrix for
each head. Attention reads all tokens of a pass at once; these layers are called once for all rows of one length, with
the states of these rows. Shape suffixes as in `decoder`, and R rows, L tokens of each, P tokens of a shared prefix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from fortwo.nn.lora import Segment, Update
from fortwo.nn.rows import LayerState, Rows
from fortwo.quantization.formats import Frozen

CACHES = ("cache_params", "past_key_values")  # what the parameter for transformers' cache is called


class RecurrentMixer:
    """The forward of one recurrent module of transformers over all rows of a pass.

    rows: those of the pass that runs. narrowed: the context in which the module computes the tokens of some places.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Callable[[], Rows],
        narrowed: Callable[[Sequence[range]], AbstractContextManager[None]],
    ) -> None:
        self._layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._forward = module.forward
        self._signature = inspect.signature(module.forward)
        self._cache = next(name for name in CACHES if name in self._signature.parameters)
        self._rows, self._narrowed = rows, narrowed

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        """What transformers' layer calls: hidden states (1, T, D) to (1, T, D)."""
        told = self._signature.bind(*given, **options).arguments
        told.update(told.pop("kwargs", {}))
        x_TD = told.pop("hidden_states")[0]
        if "attention_mask" in told:
            told["attention_mask"] = None  # of padding, and there is none
        rows, places = self._rows(), _places(self._rows())
        starts: list[LayerState | None] = [None] * len(rows.lengths)
        if rows.states is not None:
            starts = [state.get(self._layer) for state in rows.states]
        mixed: dict[int, Tensor] = {}
        if rows.prefix:
            shared = range(rows.prefix)
            y_PD, ends = self._mix(x_TD, [shared], [None], True, told)
            mixed[0], starts = y_PD[0], [ends] * len(rows.lengths)
        for group in _groups(rows.lengths, starts):
            y_RLD, ends = self._mix(
                x_TD, [places[row] for row in group], [starts[row] for row in group], rows.states is not None, told
            )
            mixed |= {places[row].start: y_LD for row, y_LD in zip(group, y_RLD, strict=True)}
            if ends is not None:
                for row, end in zip(group, ends.rows(), strict=True):
                    rows.after[row][self._layer] = end
        return torch.cat([mixed[place] for place in sorted(mixed)])[None]

    def _mix(
        self,
        x_TD: Tensor,
        places: Sequence[range],
        starts: Sequence[LayerState | None],
        ends: bool,
        told: Mapping[str, Any],
    ) -> tuple[Tensor, LayerState | None]:
        """Rows of one length (R, L, D), and their states behind them, if these are wanted."""
        begun = [start for start in starts if start is not None]
        carried = _Carried(LayerState.of(begun) if begun else None) if begun or ends else None
        cache = None if carried is None else Cache(layers=[carried] * (self._layer + 1))
        x_RLD = torch.stack([x_TD[place.start : place.stop] for place in places])
        with self._narrowed(places):
            y_RLD: Tensor = self._forward(x_RLD, **{**told, self._cache: cache})
        return y_RLD, carried.state if carried is not None and ends else None


class _Carried(LinearAttentionLayer):  # type: ignore[misc]
    """A layer of transformers' cache that replaces a state in place of writing over it: gradients flow through it."""

    def __init__(self, state: LayerState | None) -> None:
        super().__init__()
        if state is not None:
            self.conv_states[0], self.recurrent_states[0] = state.inputs, state.matrices
            self.conv_kernel_size[0] = state.inputs.shape[-1]
            self.has_previous_state[0] = self.is_conv_states_initialized[0] = True
            self.is_recurrent_states_initialized[0] = state.matrices is not None

    @property
    def state(self) -> LayerState:
        return LayerState(self.conv_states[0], self.recurrent_states[0])

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], -1)
        else:
            kernel = conv_kernel_size or conv_states.shape[-1]
            conv_states = nn.functional.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
            self.conv_kernel_size[state_idx], self.has_previous_state[state_idx] = kernel, True
            self.is_conv_states_initialized[state_idx] = True
        self.conv_states[state_idx] = conv_states[..., -self.conv_kernel_size[state_idx] :].clone()  # not all of them
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


@dataclass(frozen=True)
class Narrowed:
    """What adapters change in some of a forward's T rows. places_S: these."""

    whole: Update
    places_S: Tensor
    T: int

    @classmethod
    def of(cls, update: Update, places_S: Tensor, T: int) -> Update:
        return update if isinstance(update, Segment) and update.everywhere else cls(update, places_S, T)

    def changes(self, layer: int, group: str) -> bool:
        return self.whole.changes(layer, group)

    def apply(self, y_SO: Tensor, x_SI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        places_S = self.places_S.to(x_SI.device)
        x_TI = x_SI.new_zeros(self.T, x_SI.shape[1]).index_copy_(0, places_S, x_SI)
        y_TO = y_SO.new_zeros(self.T, y_SO.shape[1]).index_copy_(0, places_S, y_SO)
        self.whole.apply(y_TO, x_TI, weight_OI, layer, group)
        y_SO.copy_(y_TO[places_S])


def recurrent_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that carry a state: they have a causal convolution, and transformers' cache as a
    parameter."""
    return [
        module
        for module in layer.modules()
        if hasattr(module, "layer_idx")
        and any(isinstance(child, nn.Conv1d) for child in module.children())
        and any(name in inspect.signature(module.forward).parameters for name in CACHES)
    ]


def _places(rows: Rows) -> list[range]:
    """Where in T the tokens of each row behind the prefix lie."""
    places, start = [], rows.prefix
    for length in rows.lengths:
        places.append(range(start, start + length))
        start += length
    return places


def _groups(lengths: Sequence[int], starts: Sequence[LayerState | None]) -> list[list[int]]:
    """The rows of each length, those with a state apart from those without."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        groups.setdefault((length, start is None), []).append(row)
    return list(groups.values())
