"""Checks that an adapter read from disk can have the effect it was trained for."""

from __future__ import annotations

import math

import torch

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import InvalidAdapter
from fortwo.execution.backend import Backend
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import pack
from fortwo.records import Message

MIN_EFFECT = 1e-6  # a smaller relative change of the logits counts as none
PROBE_TOKENS = 2  # more than one, so that attention takes part; few, because replies wait meanwhile


def check_tensors(id: str, lora: Lora) -> None:
    """Raises InvalidAdapter for tensors that have no effect (lora_B all zero, unless DoRA's magnitudes have one) or a
    harmful one (nan, infinite)."""
    tensors = lora.parameters()
    if not tensors:
        raise InvalidAdapter(
            f"Adapter {id!r} matches no module of its base.", hint="Check target_modules in its configuration."
        )
    sums = torch.stack([tensor.sum() for tensor in tensors])
    if not sums.isfinite().all():  # the sum of large finite numbers may overflow too
        for name, tensor in lora.state().items():
            if not tensor.isfinite().all():
                raise InvalidAdapter(
                    f"Tensor {name!r} of adapter {id!r} holds nan or infinite values.",
                    hint="Its training diverged. Train it again with a lower learning rate.",
                )
    updated = any(B_Or.any() for groups in lora.layers for group in groups.values() for B_Or in group.Bs)
    if not updated and not lora.config.use_dora:
        raise InvalidAdapter(
            f"Adapter {id!r} changes nothing: lora_B is zero everywhere.", hint="It was never trained."
        )


@torch.no_grad()
def measure_effect(backend: Backend, renderer: ChatTemplateRenderer, lora: Lora) -> float:
    """The largest change of a logit by the adapter on a short probe, relative to the largest logit; infinite if the
    adapter leaves all tokens equally likely or its logits are no numbers, nan if those of the base alone are none. Call
    it on the device's thread."""
    tokens = renderer.encode_prompt([Message("user", "Hello")])[-PROBE_TOKENS:]
    packed = pack([tokens, tokens], backend.decoder.device, prefix=0)
    adapted = Segment(lora, slice(len(tokens), None))
    hidden_TD = backend.forward(packed, [adapted])
    plain_V, adapted_V = backend.decoder.logits(hidden_TD[packed.last_places()])
    if not plain_V.isfinite().all():
        return math.nan
    if not adapted_V.isfinite().all() or adapted_V.min() == adapted_V.max():
        return math.inf
    return float((adapted_V - plain_V).abs().max() / plain_V.abs().max())
