"""Prompts in one kernel give what the decoder's own operations give, with any adapters on any rows, in any parts.

Tolerance: 0.1 on logits near 3, 0.02 on average: both multiply in bf16, one rounds more of what is in between.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.prefill_fused import Prefill
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import cpu
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora_config import LoraConfig
from fortwo.quantization.formats import Frozen, HugePageArena, Weight, dense, quantize
from fortwo.quantization.grouped import Grouped
from fortwo.quantization.selection import Choice
from tests.parts import WITHOUT_TILES, Unfused, as_decoder, make_rows, random_lora
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not cpu.multiplies_tiles(), reason=WITHOUT_TILES)
SHAPES = {
    "all": LoraConfig(r=4, alpha=12),
    "odd": LoraConfig(r=3, alpha=6, target_modules=("k_proj", "v_proj", "up_proj"), layers=(0, 2)),
    "down": LoraConfig(r=16, alpha=16, target_modules=("down_proj",)),
    "wide": LoraConfig(r=40, alpha=80),
}
LENGTHS = [3, 10, 17, 70, 24, 31, 150, 33]  # strips of 32 rows are several sequences', and the other way round
WEIGHTS = ("qkv_OD", "o_DI", "gate_up_OD", "down_DI")
ADAPTERS = [None, "all", None, "odd", "wide", "down", "all", None]


def home(family: str = "llama") -> Decoder:
    tiny = as_decoder(tiny_model(family, hidden_size=64, head_dim=32, intermediate_size=96))
    return tiny.in_formats(Choice.fixed("bf16"))


def runner_of(decoder: Decoder, kind: type[ReferenceBackend] = CpuBackend) -> Runner:
    runner = Runner(kind(decoder))
    for seed, (key, shape) in enumerate(SHAPES.items()):
        runner.attach(key, random_lora(decoder, seed, shape), frozen=True)
    return runner


def replies(decoder: Decoder, adapters: list[str | None], kind: type[ReferenceBackend] = CpuBackend) -> Tensor:
    """Logits after prompts, of which some are read in two parts, and after a step that reads what is cached."""
    runner = runner_of(decoder, kind)
    rows = [Running(tokens, key) for tokens, key in zip(make_rows(LENGTHS), adapters, strict=True)]
    rows += [Running(rows[6].tokens[:20] + [7, 8, 9][:n], "all") for n in (1, 2, 3)]  # what they begin with is shared
    parts = [len(row.tokens) - (5 if place in (3, 6) else 0) for place, row in enumerate(rows)]
    whole = runner.prefill(rows, parts)
    rest = runner.prefill([rows[3], rows[6]])
    for row in rows:
        row.tokens.append(5)
        assert runner.extend(row)
    return torch.cat([whole, rest, runner.step(rows)])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [[None] * 8, ["all"] * 8, ADAPTERS], ids=["plain", "one", "mixed"])
def test_one_kernel_is_the_decoder(family: str, adapters: list[str | None]) -> None:
    decoder = home(family)
    assert Prefill(decoder).takes
    found = replies(decoder, adapters)
    wanted = replies(decoder, adapters, Unfused)
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)
    assert (found - wanted).abs().mean() < 0.02
    assert found.std(0).mean() > 0.1


def test_rows_without_an_adapter_are_the_plain_ones() -> None:
    """What plain rows begin with is computed once when they are alone: 0.05."""
    decoder = home()
    plain = runner_of(decoder).prefill([Running(tokens, None) for tokens in make_rows(LENGTHS)])
    mixed = runner_of(decoder).prefill([Running(*row) for row in zip(make_rows(LENGTHS), ADAPTERS, strict=True)])
    own = [place for place, key in enumerate(ADAPTERS) if key is None]
    changed = [place for place, key in enumerate(ADAPTERS) if key is not None]
    torch.testing.assert_close(mixed[own], plain[own], atol=0.05, rtol=0)
    assert (mixed[changed] - plain[changed]).abs().amax(1).min() > 0.1


@pytest.mark.parametrize(
    ("head", "weight_format", "takes"),
    [(32, "bf16", True), (32, "int4", cpu.widening_rows() is not None), (16, "int4", False)],
)
def test_other_weights_and_shapes_are_left_to_the_decoder(head: int, weight_format: str, takes: bool) -> None:
    tiny = as_decoder(tiny_model("llama", hidden_size=64, head_dim=head, intermediate_size=96))
    assert Prefill(tiny.in_formats(Choice.fixed(weight_format))).takes is takes
    assert not Prefill(tiny).takes


@pytest.mark.skipif(cpu.widening_rows() is None, reason="weights in few bits are multiplied as bytes at this level")
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_few_bits_are_made_bf16(weight_format: str) -> None:
    """The kernel multiplies with the very numbers that the format holds, rounded to bf16."""
    narrow = as_decoder(tiny_model("llama", hidden_size=64, head_dim=32, intermediate_size=96))
    held = narrow.in_formats(Choice.fixed(weight_format))
    wide = copy(held)
    wide.layers = [
        replace(layer, **{name: _in_bf16(getattr(layer, name)) for name in WEIGHTS}) for layer in held.layers
    ]
    found, wanted = (runner_of(one).prefill([Running(row, None) for row in make_rows(LENGTHS)]) for one in (held, wide))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def _in_bf16(weight: Frozen) -> Weight:
    rounded = dense(weight, torch.float32)
    return Weight(rounded.shape, {"bf16": quantize("bf16", rounded, HugePageArena())}, Choice.fixed("bf16"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(40, 64), (259, 96), (96, 32)])
def test_products_of_many_rows(bits: int, shape: tuple[int, int]) -> None:
    """In bf16: 1 % of the largest."""
    held = Grouped.of(torch.randn(shape, generator=torch.Generator().manual_seed(0)), bits, HugePageArena())
    for rows in (24, 32, 70):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
        wanted = x @ held.dense().t()
        torch.testing.assert_close(held.product(x), wanted, atol=0.01 * float(wanted.abs().max()), rtol=0)


def test_steps_of_many_rows_are_those_of_few() -> None:
    """As in bf16: 0.1."""
    decoder = as_decoder(tiny_model("llama", hidden_size=64, head_dim=32, intermediate_size=96)).in_formats(
        Choice.fixed("int8")
    )
    keys = [*SHAPES, None] * 6

    def step(size: int) -> Tensor:
        runner = runner_of(decoder)
        rows = [
            Running(tokens, key)
            for tokens, key in zip(make_rows([5 + place for place in range(30)]), keys, strict=True)
        ]
        runner.prefill(rows)
        for row in rows:
            row.tokens.append(7)
            assert runner.extend(row)
        return torch.cat([runner.step(rows[place : place + size]) for place in range(0, 30, size)])

    torch.testing.assert_close(step(30), step(6), atol=0.1, rtol=0)
