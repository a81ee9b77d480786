"""What this machine does with a base model: as the last job has shown it, or from a trial of a few layers.

The trial runs what a job runs, in the forms that it would use: a micro-step, and one token for many replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fortwo.train.estimate import MICRO_TOKENS, PASSES, Machine

if TYPE_CHECKING:
    from fortwo.nn.decoder import Decoder
    from fortwo.records import Json

LAYERS = 2  # of a trial; the others take as long
ROWS = 48  # replies of a trial, and rows of its micro-step
REPLY, ASKED = 20, 30  # tokens of a reply, and of its prompt beyond what prompts share
REPEATS = 3


@dataclass(frozen=True)
class Trial:
    """What a trial of a few layers found: seconds of a micro-step of MICRO_TOKENS tokens by the type of its products,
    and seconds of one token for each of ROWS replies. memory: bytes of the device."""

    micro_step: Mapping[str, float]
    token: float
    memory: int | None = None


def try_out(decoder: Decoder) -> Trial:
    """Measure. It must run on the device's thread.

    The CPU tries both types, since which one is faster depends on its instructions and on the shapes. A GPU with bf16
    products, where a first run compiles kernels, tries that alone. A small model stays in fp32, as it is served.
    """
    from fortwo.execution.autotuning import SMALL, memory
    from fortwo.quantization.matmul import multiplies_bf16

    types = ["fp32"] if decoder.config.parameters < SMALL else ["fp32", "bf16"]
    if decoder.device.type != "cpu":
        types = ["bf16" if multiplies_bf16(decoder.device) else "fp32"]
    micro_step = {name: micro_step_seconds(decoder, name == "bf16") for name in types}
    return Trial(micro_step, token_seconds(decoder), memory(decoder.device))


def machine_of(trial: Trial, last: Json | None) -> Machine:
    """The machine by a trial and, where there is one, by what the newest run on this base took."""
    trained = {name: MICRO_TOKENS / seconds for name, seconds in trial.micro_step.items()}
    found, seen = last or {}, dict[str, float]()
    if found.get("tokens_per_second") and "bf16" in found:
        seen["bf16" if found["bf16"] else "fp32"] = found["tokens_per_second"]
    replied = found.get("reply_tokens_per_second")
    rate = replied or reply_rate(trial.token, ROWS, PASSES * max(trained.values()))
    return Machine(trained, rate, trial.memory, seen)


def reply_rate(step: float, rows: int, read: float) -> float:
    """Tokens a second of replies. step: seconds of one token for so many rows; read: tokens of prompts a second."""
    return rows * REPLY / (REPLY * step + rows * ASKED / read)


def micro_step_seconds(decoder: Decoder, bf16: bool) -> float:
    """Of MICRO_TOKENS tokens, of which half are supervised, forward and backward."""
    from fortwo.nn.lora import Lora, Segment
    from fortwo.nn.lora_config import LoraConfig
    from fortwo.nn.packing import PackedAttention, pack
    from fortwo.train.losses import head_loss

    part = _beginning(decoder)
    part = part.in_bf16() if bf16 else part.in_fp32()
    lora = Lora.init(LoraConfig(), part.config, seed=0, device=part.device)
    lora.flatten()
    packed = pack([[0] * (MICRO_TOKENS // ROWS)] * ROWS, part.device, prefix=0)
    attention, segments = PackedAttention(packed, part.config), [Segment(lora)]
    x_TD = part.embed(packed.tokens_T).requires_grad_()
    final_ND = x_TD[::2].detach().requires_grad_()

    def layers() -> float:
        through_TD = part.run(x_TD, packed.positions_T, attention, segments, range(part.config.layers))
        through_TD.sum().backward()
        return float(through_TD[0, 0].detach())

    def head() -> float:
        loss = head_loss(final_ND, part.head_VD, final_ND.detach())
        loss.backward()
        return float(loss.detach())

    return _fastest(layers) * decoder.config.layers / part.config.layers + _fastest(head)


def token_seconds(decoder: Decoder) -> float:
    """Of one token for ROWS replies."""
    import torch

    from fortwo.engine.runner import Runner
    from fortwo.engine.scheduler import Sequence

    part = _beginning(decoder)
    runner = Runner(part)
    sequences = [Sequence([0] * (ASKED + REPLY), None, background=True) for _ in range(ROWS)]
    hidden_BD = torch.ones(ROWS, part.config.hidden, device=part.device)
    runner.prefill(sequences)

    def step() -> float:
        for sequence in sequences:
            sequence.tokens.append(0)
            runner.extend(sequence)
        return float(runner.step(sequences)[0, 0])

    def head() -> float:
        with torch.no_grad():
            return float(part.logits(hidden_BD)[0, 0])

    alone = _fastest(head)
    return max(0.0, _fastest(step) - alone) * decoder.config.layers / part.config.layers + alone


def _beginning(decoder: Decoder) -> Decoder:
    """The network's first layers, and its head."""
    part = copy(decoder)
    part.layers = decoder.layers[:LAYERS]
    part.config = replace(decoder.config, layers=len(part.layers))
    return part


def _fastest(run: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs, since other load can only make one slower. The first run warms up. `run`
    returns a number, so it has to wait for the device."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
