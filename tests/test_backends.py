"""Every backend that can run here computes what the reference does: prompts, steps, adapters, a training step.

The reference multiplies with the very weights that the backend holds, made fp32. An error is the norm of the difference
to what the reference finds, relative to the norm of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.backend import Backend, backend_for
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import cpu
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import pack
from fortwo.quantization.selection import Choice
from fortwo.train.losses import Row, compute_losses, with_teacher_states
from tests.parts import as_decoder, make_rows, random_lora
from tests.tiny import tiny_model

FP32_PRODUCTS = 5e-6  # sums in another order
INT16_PRODUCTS = 1e-3  # x rounded to 16 bits, keys and values to fp16
INT8_ADAPTERS = 1e-2  # A and B rounded to 8 bits
BF16_PRODUCTS = 2e-2  # both factors rounded to 8 bits
BF16_GRADIENTS = 3e-2
FAMILIES = ("llama", "qwen2", "qwen3")
SHAPES = {
    "all": LoraConfig(r=4, alpha=4),
    "some": LoraConfig(r=3, alpha=3, target_modules=("k_proj", "v_proj", "up_proj"), layers=(0, 2)),
    "down": LoraConfig(r=16, alpha=8, target_modules=("down_proj",)),
}
MIXED = ["some", None, "all", "all", "down", "all", None, "all", "down"]
KINDS: list[type[ReferenceBackend]] = [ReferenceBackend, CpuBackend]
if torch.cuda.is_available():
    KINDS.append(CudaBackend)


@cache
def network(family: str, kind: type[ReferenceBackend] = ReferenceBackend) -> Decoder:
    return as_decoder(tiny_model(family, head_dim=32), "cuda" if kind is CudaBackend else "cpu")


def products_of(weight_format: str, adapted: bool) -> float:
    """The largest error of weights that are held in this format."""
    if weight_format == "fp32":
        return FP32_PRODUCTS
    if weight_format in ("int8", "int4") and cpu.widening_rows() is None:  # otherwise prompts are read in bf16
        return INT8_ADAPTERS if adapted else INT16_PRODUCTS
    return BF16_PRODUCTS


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).norm() / wanted.norm())


def replies(backend: Backend, adapters: Sequence[str | None]) -> Tensor:
    """Logits (3, rows, V) of steps behind prompts that begin alike, some of which are read in two parts."""
    runner = Runner(backend)
    for seed, (key, shape) in enumerate(SHAPES.items()):
        own = random_lora(network("llama"), seed, shape).state()
        runner.attach(key, Lora.from_state(shape, backend.decoder.config, own, backend.decoder.device), frozen=True)
    lengths = [3 + 9 * row % 40 + (110 if row == 1 else 0) for row in range(len(adapters))]  # one outgrows its pool
    rows = [Running(row, key) for row, key in zip(make_rows(lengths, range(5, 15)), adapters, strict=True)]
    runner.prefill(rows, [len(row.tokens) // (2 if n % 3 == 0 else 1) for n, row in enumerate(rows)])
    runner.prefill([row for row in rows if row.uncomputed])
    found = []
    for step in range(3):
        for number, row in enumerate(rows):
            row.tokens.append(5 + number + step)
            assert runner.extend(row)
        found.append(runner.step(rows))
    return torch.stack(found)


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [[None] * 9, ["all"] * 9, MIXED, MIXED * 3], ids=["plain", "one", "mixed", "many"])
def test_prompts_and_steps(
    kind: type[ReferenceBackend], family: str, weight_format: str, adapters: list[str | None]
) -> None:
    """Of the plain base, of one adapter, and of several; in few rows and in many."""
    if kind is CudaBackend and weight_format != "fp32":
        pytest.skip("a GPU holds weights as they are")
    if weight_format in ("int8", "int4") and not cpu.usable(torch.empty(0)):
        pytest.skip("there is no C compiler")
    home = network(family, kind)
    held = home if weight_format == "fp32" else home.in_formats(Choice.fixed(weight_format))
    exact = network(family) if weight_format == "fp32" else held.in_fp32()
    wanted = replies(ReferenceBackend(exact), adapters)
    assert error(replies(kind(held), adapters), wanted) < products_of(weight_format, any(adapters))
    assert wanted.std(1).mean() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_without_a_cache(kind: type[ReferenceBackend], family: str) -> None:
    def hidden(backend: Backend) -> Tensor:
        home = backend.decoder
        own = random_lora(network("llama"), 1).state()
        adapted = Segment(Lora.from_state(LoraConfig(r=4, alpha=12), home.config, own, home.device), slice(20, 40))
        return backend.forward(pack(make_rows([9, 30, 17], range(5, 12)), home.device), [adapted])

    wanted = hidden(ReferenceBackend(network(family)))
    assert error(hidden(kind(network(family, kind))), wanted) < FP32_PRODUCTS


def trained(backend: Backend, dropout: float = 0.0, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
    """The loss of rows to learn and rows to keep, and the gradient of the adapter."""
    home, config = backend.decoder, LoraConfig(r=4, alpha=4, dropout=dropout)
    own = random_lora(network("llama"), 3, config).state()
    lora = Lora.from_state(config, home.config, own, home.device)
    lora.flatten()
    learn, keep = ([Row(tuple(row), 9, kept) for row in make_rows([9, 30], range(5, 12))] for kept in (False, True))
    teaching = with_teacher_states(backend, keep, 7)
    while True:
        try:
            next(teaching)
        except StopIteration as end:
            keep = end.value
            break
    torch.manual_seed(6)
    found = compute_losses(backend, lora, 7, [*learn, *keep], checkpointing)
    loss = found.ce + found.kl
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in lora.parameters() if parameter.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step(
    kind: type[ReferenceBackend], family: str, bf16: bool, dropout: float, checkpointing: bool
) -> None:
    """Loss and gradients; the dropout drawn is the same, but on a GPU."""
    if kind is CudaBackend and dropout:
        pytest.skip("a GPU draws its dropout by another generator")
    home = network(family, kind)
    held = home.in_bf16() if bf16 else home
    exact = network(family).in_bf16().in_fp32() if bf16 else network(family)
    loss, found = trained(kind(held), dropout, checkpointing)
    wanted_loss, wanted = trained(ReferenceBackend(exact), dropout)
    assert error(loss, wanted_loss) < (BF16_PRODUCTS if bf16 else FP32_PRODUCTS)
    assert error(found, wanted) < (BF16_GRADIENTS if bf16 else FP32_PRODUCTS)
    assert wanted.abs().max() > 0.01


def test_the_device_picks_the_backend() -> None:
    backend = backend_for(network("llama"))
    assert isinstance(backend, CpuBackend)
    assert isinstance(backend.with_decoder(network("qwen2")), CpuBackend)
