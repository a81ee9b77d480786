"""A step in one kernel gives what the decoder's own operations give, with any adapters on any rows.

Tolerance: 0.03 on logits near 10, 2e-3 on average (the same numbers in 16 bits and bf16, but sums in another order,
after which keys and values are rounded to fp16).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.adapters_int8 import Laid, Rows
from fortwo.execution.backend import Backend
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.decode_fused import Step
from fortwo.kernels import cpu
from fortwo.nn.lora_config import GROUPS, LoraConfig
from fortwo.quantization.selection import Choice
from tests.parts import Unfused, as_decoder, decoder, make_rows, random_lora
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("level")
SHAPES = {
    "all": LoraConfig(r=4, alpha=12),
    "some": LoraConfig(r=3, alpha=6, target_modules=("k_proj", "v_proj", "up_proj"), layers=(0, 2)),
    "down": LoraConfig(r=16, alpha=16, target_modules=("down_proj",)),
}


def replies(backend: Backend, adapters: list[str | None], steps: int = 4) -> Tensor:
    """Logits (steps, rows, V) of sequences of different lengths, the same tokens whatever comes out."""
    runner, found = Runner(backend), []
    for seed, (key, shape) in enumerate(SHAPES.items()):
        runner.attach(key, random_lora(backend.decoder, seed, shape), frozen=True)
    lengths = [3 + 7 * row % 30 + (120 if row == 1 else 0) for row in range(len(adapters))]  # one outgrows its pool
    rows = [Running(row, key) for row, key in zip(make_rows(lengths), adapters, strict=True)]
    runner.prefill(rows)
    for step in range(steps):
        for number, row in enumerate(rows):
            row.tokens.append(5 + number + step)
            assert runner.extend(row)
        found.append(runner.step(rows))
    return torch.stack(found)


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "adapters",
    [[None], ["all"], [None, "down", "some"], ["some", None, "all", "all", "down", "all", "some", "all", "all"]],
    ids=["plain", "one", "three", "nine"],
)
def test_one_kernel_is_the_decoder(weight_format: str, family: str, adapters: list[str | None]) -> None:
    home = as_decoder(tiny_model(family, hidden_size=64)).in_formats(Choice.fixed(weight_format))
    assert Step(home).takes(len(adapters))
    found, wanted = replies(CpuBackend(home), adapters), replies(Unfused(home), adapters)
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
    assert (found - wanted).abs().mean() < 2e-3
    assert (found[0] - found[-1]).abs().max() > 0.1


def test_rows_with_an_adapter_are_not_the_plain_ones() -> None:
    """Plain prompts are read in other company, and attend in bf16: their logits agree to 0.05."""
    home = decoder().in_formats(Choice.fixed("int4"))
    plain, mixed = (replies(CpuBackend(home), [None, key, None]) for key in (None, "all"))
    torch.testing.assert_close(mixed[:, [0, 2]], plain[:, [0, 2]], atol=0.05, rtol=0)
    assert (mixed[:, 1] - plain[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), LoraConfig(r=3, alpha=5, rank_pattern=(("v_proj", 6), ("up_proj", 1), ("0.o_proj", 17)))],
)
def test_an_adapter_is_laid_out_as_the_table_says(shape: LoraConfig) -> None:
    """What is read back is each row, rounded to 127 steps of its largest number."""
    lora = random_lora(decoder(), config=shape)
    laid = Laid.of(lora)

    def read(at: int, rows: int, inputs: int) -> Tensor:
        blocks = laid.flat[at : at + rows * (4 + inputs)].view(rows // 16, 64 + 16 * inputs)
        pairs = blocks[:, 64:].reshape(rows // 16, inputs // 2, 16, 2).transpose(1, 2).reshape(rows, inputs)
        return pairs * blocks[:, :64].contiguous().view(torch.float32).reshape(rows, 1)

    def agree(found: Tensor, wanted: Tensor) -> None:
        steps = wanted.abs().amax(1, keepdim=True) / 127
        assert bool(((found - wanted).abs() <= steps * 0.5001).all())

    for layer, groups in enumerate(lora.layers):
        for index, name in enumerate(GROUPS):
            product = laid.table[layer * len(GROUPS) + index]
            R, A, parts = product.ranks, product.A, product.parts
            assert parts == (len(groups[name].places) if name in groups else 0)
            if name in groups:
                group, wanted = groups[name], torch.zeros(R, groups[name].A_RI.shape[1])
                for n, (place, B_Or) in enumerate(zip(group.places, group.Bs, strict=True)):
                    one = product.part[n]
                    first, width, rank, pairs, B = one.first, one.width, one.rank, one.pairs, one.B
                    found, r = read(B, width, 2 * pairs), B_Or.shape[1]
                    assert first == place.columns.start
                    agree(found[:, :r], B_Or)
                    assert not found[:, r:].any()
                    wanted[rank : rank + r] = group.A_RI[place.rows] * place.scale
                agree(read(A, *wanted.shape), wanted)


def test_sums_of_whole_numbers_stay_whole() -> None:
    """1,024 products of the largest numbers there are."""
    lora = random_lora(as_decoder(tiny_model("llama", hidden_size=1024)), config=LoraConfig(r=4, alpha=4))
    group = lora.layers[0]["gate_up"]
    for tensor in group.tensors:
        tensor.data.fill_(0.5)
    x_TI, y_TO = torch.full((5, 1024), 3.0), torch.zeros(5, sum(len(B_Or) for B_Or in group.Bs))
    Rows([(Laid.of(lora), range(5))]).apply(y_TO, x_TI, torch.empty(0), 0, "gate_up")
    torch.testing.assert_close(y_TO, torch.full_like(y_TO, 1024 * 3 * 0.5 * 4 * 0.5), rtol=1e-3, atol=0)


def test_other_weights_and_shapes_are_left_to_the_decoder() -> None:
    assert not Step(decoder()).takes(1)
    several = decoder().in_formats(Choice(((4, "int4"), (8, "fp32"))))
    assert Step(several).takes(4)
    assert not Step(several).takes(5)
    narrow = as_decoder(tiny_model("llama", head_dim=8))
    assert not Step(narrow.in_formats(Choice.fixed("int8"))).takes(1)


def test_without_kernels_adapters_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    home = decoder().in_formats(Choice.fixed("bf16"))
    assert Step(home).laid
    monkeypatch.setattr(cpu, "lib", lambda: None)
    assert not Step(home).laid
