"""What a base model costs on this machine: a trial of its first layers, through its backend.

The trial runs what a job runs, in the formats that it would use: a micro-step, and one token for many replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fortwo.execution import autotuning
from fortwo.execution.backend import Backend
from fortwo.execution.kv_cache import Pool
from fortwo.execution.parts import Part
from fortwo.nn.head import Head
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import pack
from fortwo.quantization.matmul import multiplies_bf16

LAYERS = 2  # of a trial; the others take as long
REPEATS = 3
DISTURBED = 0.2  # threads that waited for a processor on average: from there on, other programs have slowed a trial

HeadLoss = Callable[[Tensor, Head, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """What a trial of a few layers found: seconds of a micro-step by the type of its products, those of a short one,
    and seconds of one token for each of many replies. memory: bytes of the device. waiting: threads of this process
    that waited for a processor meanwhile, on average; None where the operating system does not tell."""

    micro_step: Mapping[str, float]
    short_step: Mapping[str, float]
    token: float
    memory: int | None = None
    waiting: float | None = None

    @property
    def disturbed(self) -> bool:
        return self.waiting is not None and self.waiting > DISTURBED

    def with_repeat(self, other: Trial) -> Trial:
        """Of both trials the faster figures, since other load can only make one slower, and the smaller disturbance."""
        waiting = None if self.waiting is None or other.waiting is None else min(self.waiting, other.waiting)
        return Trial(
            _fastest_of(self.micro_step, other.micro_step),
            _fastest_of(self.short_step, other.short_step),
            min(self.token, other.token),
            other.memory,
            waiting,
        )


def _fastest_of(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: min(seconds, other[name]) for name, seconds in one.items()}


def measure_throughput(backend: Backend, tokens: int, short: int, rows: int, length: int, head_loss: HeadLoss) -> Trial:
    """Measure. It must run on the device's thread. tokens: of a micro-step; short: of a short one, which is one row;
    rows: of a micro-step, and replies that run together; length: tokens before the one of each reply that is measured;
    head_loss: of hidden states (N, D) by the head (V, D), against those of a teacher.

    The CPU tries both types, since which one is faster depends on its instructions and on the shapes. A GPU with bf16
    products, where a first run compiles kernels, tries that alone. A small model stays in fp32, as it is served.
    """
    decoder = backend.decoder
    types = ["fp32"] if decoder.config.parameters < autotuning.SMALL else ["fp32", "bf16"]
    if decoder.device.type != "cpu":
        types = ["bf16" if multiplies_bf16(decoder.device) else "fp32"]
    began, waited = time.perf_counter(), _waited()
    seconds = {name: _micro_step_seconds(backend, name == "bf16", tokens, rows, head_loss) for name in types}
    short_seconds = {name: _micro_step_seconds(backend, name == "bf16", short, 1, head_loss) for name in types}
    token = _token_seconds(backend, rows, length)
    waiting = None if waited is None else ((_waited() or waited) - waited) / (time.perf_counter() - began)
    return Trial(seconds, short_seconds, token, autotuning.memory(decoder.device), waiting)


def _waited() -> float | None:
    """Seconds that the threads of this process have waited for a processor so far. None where the operating system does
    not tell."""
    nanoseconds = []
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds.append(int(file.read_text().split()[1]))
        except OSError:  # the thread has ended
            continue
    return sum(nanoseconds) / 1e9 if nanoseconds else None


def _micro_step_seconds(backend: Backend, bf16: bool, tokens: int, rows: int, head_loss: HeadLoss) -> float:
    """Of so many tokens, of which half are supervised, forward and backward."""
    part = backend.decoder.beginning(LAYERS)
    part = part.in_bf16() if bf16 else part.in_fp32()
    trained = backend.with_decoder(part)
    every = tuple(name for names in part.config.groups.values() for name in names)
    lora = Lora.init(LoraConfig(target_modules=every), part.config, seed=0, device=part.device)
    lora.flatten()
    packed = pack([[0] * (tokens // rows)] * rows, part.device, prefix=0)
    x_TD = part.embed(packed.tokens_T).requires_grad_()
    final_ND = x_TD[::2].detach().requires_grad_()

    def layers() -> float:
        hidden_TD = trained.train(packed, lora, x_TD=x_TD)
        hidden_TD.sum().backward()
        return float(hidden_TD[0, 0].detach())

    def head() -> float:
        loss = head_loss(final_ND, part.head_VD, final_ND.detach())
        loss.backward()
        return float(loss.detach())

    return _fastest(layers) * backend.decoder.config.layers / part.config.layers + _fastest(head)


@torch.no_grad()
def _token_seconds(backend: Backend, rows: int, length: int) -> float:
    """Of one token for each of so many replies, behind so many tokens."""
    part = backend.decoder.beginning(LAYERS)
    served = backend.with_decoder(part)
    pool = Pool(part.config, length + 1, part.device, served.kv_dtype)
    pool.resize(rows)
    slots = [pool.take() for _ in range(rows)]
    for _ in served.prefill([Part([0] * length, 0, slot, None) for slot in slots]):
        pass
    hidden_BD = torch.ones(rows, part.config.hidden, device=part.device)

    def step() -> float:
        return float(served.decode([Part([0], length, slot, None) for slot in slots])[0, 0])

    def head() -> float:
        return float(part.logits(hidden_BD)[0, 0])

    return _fastest(step) * backend.decoder.config.layers / part.config.layers + _fastest(head)


def _fastest(run: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs, since other load can only make one slower. The first run warms up. `run`
    returns a number, so it has to wait for the device."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
