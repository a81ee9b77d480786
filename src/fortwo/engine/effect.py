"""Whether an adapter from the disk can have the effect that it was trained for."""

from __future__ import annotations

import torch

from fortwo.data.render import Renderer
from fortwo.errors import InvalidAdapter
from fortwo.execution.backend import Backend
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import pack
from fortwo.records import AdapterVersion, Message

ROUNDING = 1e-6  # a relative change of the logits below this is no effect
PROBE = 2  # tokens: more than one, for what changes only where attention looks; few, since replies wait meanwhile


def check(version: AdapterVersion, lora: Lora) -> None:
    """Raises InvalidAdapter for tensors that cannot have an effect, or only a bad one."""
    tensors = lora.parameters()
    if not tensors:
        raise InvalidAdapter(f"adapter {version.id!r} matches no module of its base")
    sums = torch.stack([tensor.sum() for tensor in tensors])
    if not sums.isfinite().all():  # of large numbers a sum may overflow too
        for name, tensor in lora.state().items():
            if not tensor.isfinite().all():
                raise InvalidAdapter(f"tensor {name!r} of adapter {version.id!r} holds nan or infinite values")
    if not any(B_Or.any() for groups in lora.layers for group in groups.values() for B_Or in group.Bs):
        raise InvalidAdapter(
            f"adapter {version.id!r} changes nothing: lora_B is zero everywhere", hint="It was never trained."
        )


@torch.no_grad()
def effect(backend: Backend, renderer: Renderer, lora: Lora) -> float:
    """How much the adapter moves the logits of a probe, relative to the largest. On the device's thread."""
    tokens = renderer.prompt([Message("user", "Hello")])[-PROBE:]
    packed = pack([tokens, tokens], backend.decoder.device, prefix=0)
    adapted = Segment(lora, slice(len(tokens), None))
    hidden_TD = backend.forward(packed, [adapted])
    plain_V, adapted_V = backend.decoder.logits(hidden_TD[packed.last_places()])
    return float((adapted_V - plain_V).abs().max() / plain_V.abs().max())
