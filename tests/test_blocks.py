"""Weights of a quantised GGUF file are held in the file's numbers, which gguf's own dequantisation knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.errors import InvalidRequest
from fortwo.execution import autotuning
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.decode_fused import Step
from fortwo.hub import gguf, weights
from fortwo.kernels import cpu
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.quantization.blocks import TYPES, Blocks
from fortwo.quantization.formats import HugePageArena, Weight
from fortwo.quantization.grouped import Grouped, Parts
from fortwo.quantization.selection import Measurements
from fortwo.train.fit import fit
from tests.parts import Unfused
from tests.test_quantization_formats import random, relative, rounded
from tests.tiny import save_directory, save_gguf, tiny_model

compiled = pytest.mark.usefixtures("level")
SCALES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}  # bytes where fp16 numbers of a block are
LARGEST = 1.3  # bytes held for one of the file
MIXED = {
    "attn_q": "Q5_0",
    "attn_k": "Q5_0",
    "attn_v": "Q8_0",
    "attn_output": "Q4_0",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q4_1",
    "ffn_down": "Q5_1",
    "token_embd": "Q8_0",
    "output": "Q5_0",
}


def file_weight(kind: str, outputs: int, inputs: int, seed: int = 0) -> tuple[Blocks, Tensor]:
    """A weight of random blocks, and its numbers."""
    numbers, size, _ = TYPES[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (outputs, inputs // numbers, size), dtype=np.uint8)
    for at in SCALES.get(kind, [0, 2]):
        scales = generator.standard_normal((*raw.shape[:2], 1)) / 100
        raw[:, :, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    raw = raw.reshape(outputs, -1)
    dense = quants.dequantize(raw, GGMLQuantizationType[kind])
    return Blocks(((kind, torch.from_numpy(raw)),)), torch.from_numpy(dense)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_file(kind: str) -> None:
    blocks, wanted = file_weight(kind, 64, 512)
    held = blocks.grouped(HugePageArena())
    assert blocks.shape == held.shape == wanted.shape
    if kind.endswith("_K"):  # scales are rounded to fp16
        assert float((held.dense() - wanted).abs().max()) < 2**-10 * float(wanted.abs().max())
    else:
        torch.testing.assert_close(held.dense(), wanted, rtol=1e-6, atol=1e-7)
    assert held.nbytes <= LARGEST * blocks.parts[0][1].nbytes


@pytest.mark.parametrize("kinds", [["Q5_0"], ["Q6_K"], ["Q4_K", "Q6_K"], ["Q8_0", "Q5_K", "Q4_0"]])
def test_rows_are_those_of_the_weight(kinds: list[str]) -> None:
    held = below(kinds, [32, 16, 23][-len(kinds) :], 256)
    numbers = torch.tensor([0, held.shape[0] - 1, 17, 17, 5])
    assert torch.equal(held.rows(numbers), held.dense()[numbers])


def below(kinds: list[str], outputs: list[int], inputs: int) -> Grouped | Parts:
    first, *others = [file_weight(kind, count, inputs, count)[0] for kind, count in zip(kinds, outputs, strict=True)]
    return first.joined(*others).grouped(HugePageArena())


@compiled
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 23])
def test_whole_numbers_multiply_as_the_dense_weight_does(kind: str, rows: int) -> None:
    held, x = below([kind], [50], 512), random(rows, 512, seed=1)
    wanted = rounded(x).double() @ held.dense().double().t()
    tie = 3e-4 * float(held.dense().abs().max())  # may round the other way
    torch.testing.assert_close(held.product(x).double(), wanted, atol=tie, rtol=1e-5)


@compiled
@pytest.mark.parametrize("rows", [1, 3, 8, 31, 70])
@pytest.mark.parametrize(
    ("kinds", "outputs"),
    [(["Q5_0", "Q8_0"], [48, 20]), (["Q4_K", "Q6_K"], [16, 32]), (["Q4_1", "Q6_K", "Q8_0"], [16] * 3)],
)
def test_parts_multiply_as_the_dense_weight_does(kinds: list[str], outputs: list[int], rows: int) -> None:
    held, x = below(kinds, outputs, 256), random(rows, 256, seed=1)
    assert isinstance(held, Parts)
    assert relative(held.product(x), x @ held.dense().t()) < (5e-3 if rows >= (cpu.widening_rows() or 100) else 5e-5)


def test_without_kernels_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "lib", lambda: None)
    held, x = below(["Q4_K", "Q6_K"], [16, 32], 256), random(3, 256)
    assert relative(held.product(x), x @ held.dense().t()) < 1e-6


def test_neighbours_of_one_type_are_one_part_and_parts_are_whole_tiles() -> None:
    q, k, v = (file_weight("Q4_0", count, 64)[0] for count in (32, 8, 8))
    assert isinstance(q.joined(k, v).grouped(HugePageArena()), Grouped)
    with pytest.raises(ValueError, match="do not lie in whole tiles"):
        k.joined(file_weight("Q8_0", 16, 64)[0]).grouped(HugePageArena())


def converted(folder: Path, family: str, types: Mapping[str, str] = MIXED, **options: int | bool) -> Path:
    target = folder / "converted"
    target.mkdir(exist_ok=True)
    model = tiny_model(family, hidden_size=64, intermediate_size=96, **options)
    gguf.convert(save_gguf(folder / "tiny.gguf", model, types=types), target, lambda *told: None)
    return target


def networks(directory: Path) -> tuple[Decoder, Decoder]:
    """As the file has it, and dequantised."""
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    assert autotuning.all_blocks(config, weights.block_types(directory))
    return Decoder(config, weights.QuantisedTensors(directory)), Decoder(config, weights.open_tensors(directory))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_network_holds_every_weight_of_its_file(tmp_path: Path, family: str, tied: bool) -> None:
    held, dense = networks(converted(tmp_path, family, tie_word_embeddings=tied))
    for one, other in zip(held.weights(), dense.weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    tokens = torch.tensor([3, 1, 7])
    torch.testing.assert_close(held.embed(tokens), dense.embed(tokens), rtol=1e-6, atol=1e-6)
    assert (held.head is held.embedding_VD) == tied
    assert held.parameters == dense.parameters
    assert held.bytes < 0.4 * dense.bytes
    for one, other in zip(held.in_fp32().weights(), dense.weights(), strict=True):  # what a job trains on
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert held.bytes_to_train(bf16=False) == sum(weight.nbytes for weight in dense.weights())


def logits(backend: CpuBackend, count: int) -> Tensor:
    runner, rows = Runner(backend), [Running(list(range(1, 5 + row)), None) for row in range(count)]
    found = [runner.prefill(rows)]
    for step in range(3):
        for row in rows:
            row.tokens.append(5 + step)
            assert runner.extend(row)
        found.append(runner.step(rows))
    return torch.stack(found)


@compiled
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_replies_are_those_of_the_dequantised_network(tmp_path: Path, family: str, rows: int) -> None:
    held, dense = networks(converted(tmp_path, family))
    assert Step(held).takes(rows) == (family != "gemma3")
    found, wanted = logits(CpuBackend(held), rows), logits(Unfused(dense), rows)
    torch.testing.assert_close(found, wanted, atol=0.08, rtol=0)
    assert (found - wanted).abs().mean() < 5e-3
    assert (wanted[0] - wanted[-1]).abs().max() > 0.1


def serving(directory: Path, setting: str, home: Path) -> Decoder:
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    blocks = weights.QuantisedTensors(directory) if weights.block_types(directory) else None
    told = weights.open_tensors(directory), torch.device("cpu"), setting, 1, Measurements(home), lambda run: run()
    return autotuning.serving("tiny", config, *told, blocks)


@compiled
def test_auto_holds_a_quantised_file_in_its_own_numbers_alone(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = converted(tmp_path, "llama")
    assert isinstance(serving(directory, "auto", home).head, Tensor)  # too small for it to matter
    monkeypatch.setattr(autotuning, "SMALL", 0)
    found = serving(directory, "auto", home)
    for weight in (found.head, found.embedding_VD, *(layer.qkv_OD for layer in found.layers)):
        assert isinstance(weight, Weight)
        assert set(weight.formats) == {"gguf"}
    assert not Measurements(home).all()
    head = serving(directory, "int8", home).head
    assert isinstance(head, Weight)
    assert set(head.formats) == {"int8"}


def test_gguf_is_refused_for_what_is_no_quantised_file(tmp_path: Path, home: Path) -> None:
    with pytest.raises(InvalidRequest, match="'gguf' cannot hold 'tiny'"):
        serving(save_directory(tmp_path / "plain"), "gguf", home)
    kinds = weights.block_types(converted(tmp_path, "llama", {**MIXED, "ffn_down": "F16"}))
    config = DecoderConfig.from_hf(json.loads((tmp_path / "converted" / "config.json").read_text()))
    assert kinds
    assert not autotuning.all_blocks(config, kinds)


def test_a_head_that_is_not_quantised_is_bf16(tmp_path: Path, home: Path) -> None:
    directory = converted(tmp_path, "llama", {name: kind for name, kind in MIXED.items() if name != "output"})
    head = serving(directory, "gguf", home).head
    assert isinstance(head, Weight)
    wanted = weights.open_tensors(directory)["lm_head.weight"]
    assert torch.equal(head.dense(torch.float32), wanted.bfloat16().float())


def test_the_estimate_of_memory_knows_the_file(tmp_path: Path) -> None:
    directory = converted(tmp_path, "llama")
    config, blocks = json.loads((directory / "config.json").read_text()), weights.block_bytes(directory)
    quantised, plain = (fit(config, "auto", 1 << 33, size) for size in (10 * blocks, 0))
    assert quantised is not None
    assert plain is not None
    assert (quantised.weight_format, plain.weight_format) == ("gguf", "fp32")
    other = fit(config, "auto", 1 << 33, 20 * blocks)
    assert other is not None
    assert other.serve - quantised.serve == pytest.approx(1.12 * 10 * blocks, rel=0.01)
