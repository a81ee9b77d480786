"""DoRA is PEFT's: what is served and trained, alone and beside plain adapters, on every backend.

Tolerance: logits within 1e-4, gradients within 1e-4 of PEFT's (fp32, sums in another order).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.errors import InvalidAdapter
from fortwo.execution.adapters_dora import decode_apart, prefill_apart
from fortwo.execution.backend import Backend, backend_for
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.parts import Computed, Part
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import cpu
from fortwo.kernels.operations import dropout as drop
from fortwo.nn.generic import GenericDecoder
from fortwo.nn.lora import MAGNITUDE, Lora, Segment, lora_product
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.network import Network
from fortwo.nn.packing import pack
from fortwo.quantization.selection import Choice
from fortwo.train.losses import Row, compute_losses
from tests.parts import as_decoder, decoder, make_rows, random_lora
from tests.tiny import generic_model, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # of PEFT
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
FAMILIES = ("llama", "gemma3", "qwen2", "gpt2")  # with plain norms; four norms; biases; transposed weights
KINDS: list[type[ReferenceBackend]] = [ReferenceBackend, CpuBackend]
if torch.cuda.is_available():
    KINDS.append(CudaBackend)


def model_of(family: str) -> Any:
    return generic_model(family) if family == "gpt2" else tiny_model(family)


@cache
def network(family: str, device: str = "cpu") -> Network:
    model = model_of(family)
    return GenericDecoder(model, device) if family == "gpt2" else as_decoder(model, device)


def saved(family: str, directory: Path, seed: int = 0, use_dora: bool = True) -> Any:
    """PEFT's model with an adapter that it trained for a few steps at a high rate, and saved."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=3 + seed,
        lora_alpha=9,
        use_dora=use_dora,
        target_modules="all-linear",
        rank_pattern={"layers.1.*": 2},
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model_of(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if MAGNITUDE in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    model.save_pretrained(directory)
    return model.eval()


def read(home: Network, directory: Path) -> Lora:
    stored = json.loads((directory / "adapter_config.json").read_text())
    config = LoraConfig.from_peft(stored, [name for names in home.config.groups.values() for name in names])
    tensors = load_file(directory / "adapter_model.safetensors")
    return Lora.from_state(config, home.config, tensors, home.device)


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> Tensor:
    found: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return found


# ---------------------------------------------------------------- served


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_rows_are_pefts(kind: type[ReferenceBackend], family: str, tmp_path: Path) -> None:
    """Rows of the base, of a plain adapter and of two DoRA adapters: prompts, one of them read in two parts and one
    whose beginning is known, and steps."""
    home = network(family, "cuda" if kind is CudaBackend else "cpu")
    backend = backend_for(home) if family == "gpt2" else kind(home)
    models = {"plain": saved(family, tmp_path / "plain", 0, use_dora=False), None: model_of(family).eval()}
    models |= {key: saved(family, tmp_path / key, seed) for seed, key in enumerate(("one", "two"))}
    runner = Runner(backend)
    for key in ("plain", "one", "two"):
        runner.attach(key, read(home, tmp_path / key), frozen=True)
    start = list(range(5, 45))
    first = Running([*start, 7, 8, 9], "one")
    runner.prefill([first])
    runner.release(first)
    keys = ["one", None, "plain", "two", "one", "plain"]
    rows = [Running(row, key) for row, key in zip(make_rows([3, 9, 20, 31, 4, 6], start), keys, strict=True)]
    assert runner.unread(rows[0]) < len(start)
    assert runner.unread(rows[3]) > len(start)
    runner.prefill(rows, [len(row.tokens) // 2 if n == 3 else runner.unread(row) for n, row in enumerate(rows)])
    runner.prefill([row for row in rows if row.uncomputed])
    for step in range(3):
        for number, row in enumerate(rows):
            row.tokens.append(5 + number + step)
            assert runner.extend(row)
        found = runner.step(rows).cpu()
        for row, logits_V in zip(rows, found, strict=True):
            wanted_V = logits_of(models[row.adapter], row.tokens)[-1]
            torch.testing.assert_close(logits_V, wanted_V, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4", "nf4"])
def test_weights_in_other_formats(weight_format: str) -> None:
    """The scale is of the weights as they are held, whatever multiplies them; steps and prompts, few rows and many."""
    if weight_format in ("int8", "int4") and not cpu.usable(torch.empty(0)):
        pytest.skip("there is no C compiler")
    held = as_decoder(tiny_model("llama", head_dim=32)).in_formats(Choice.fixed(weight_format))
    shapes = {"dora": LoraConfig(r=4, alpha=6, use_dora=True), "plain": LoraConfig(r=4, alpha=6)}

    def served(backend: Backend) -> Tensor:
        runner = Runner(backend)
        for key, config in shapes.items():
            lora = Lora.init(config, backend.decoder.config, 1)
            lora.take_magnitudes(backend.decoder.frozen)
            generator = torch.Generator().manual_seed(2)
            for tensor in lora.parameters():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
            for group in (group for groups in lora.layers for group in groups.values()):
                for magnitude in group.magnitudes:
                    magnitude *= torch.rand(magnitude.shape, generator=generator) + 0.5
            runner.attach(key, lora, frozen=True)
        rows = [
            Running(row, key)
            for row, key in zip(make_rows([3, 70, 12, 5, 60]), ("dora", None, "plain", "dora", "dora"), strict=True)
        ]
        found = [runner.prefill(rows)]
        for token in range(4):
            for row in rows:
                row.tokens.append(token)
                assert runner.extend(row)
            found.append(runner.step(rows))
        return torch.stack(found)

    wanted, found = served(ReferenceBackend(held.in_fp32())), served(CpuBackend(held))
    for row in range(5):
        assert (found[:, row] - wanted[:, row]).norm() / wanted[:, row].norm() < 2e-2, row


@torch.no_grad()
def test_an_adapter_in_training_is_served_as_it_is_now() -> None:
    """A copy that is taken again has the new tensors and the scale that belongs to them."""
    home, row = decoder(), make_rows([30])[0]
    lora = random_lora(home, config=LoraConfig(r=4, alpha=8, use_dora=True))
    runner = Runner(CpuBackend(home))
    runner.attach("job", lora)
    for _ in range(2):
        for tensor in lora.parameters():
            tensor *= 1.3
        packed = pack([row])
        wanted_TD = ReferenceBackend(home).forward(packed, [Segment(lora)])
        found_1V = runner.prefill([Running(list(row), "job")])
        torch.testing.assert_close(found_1V[0], home.logits(wanted_TD)[-1], atol=1e-4, rtol=1e-4)
        held = runner.backend.adapters.whole("job", 1)
        runner.prefill([Running(list(row), "job")])  # nothing has changed, so the copy of before stays
        again = runner.backend.adapters.whole("job", 1)
        assert isinstance(held, Segment)
        assert isinstance(again, Segment)
        assert again.lora is held.lora


@torch.no_grad()
def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    """A pruned output has no norm to divide by."""
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.weight[3] = 0
    home = as_decoder(model)
    lora = random_lora(home, config=LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    lora.layers[0]["qkv"].Bs[0][3] = 0
    x_TI = torch.randn(5, 64)
    y_TO = lora_product(x_TI, home.frozen(0, "qkv"), 0, "qkv", [Segment(lora)])
    assert y_TO.isfinite().all()
    assert not y_TO[:, 3].any()


@torch.no_grad()
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_parts_computed_apart_are_those_computed_together(weight_format: str) -> None:
    """A backend whose kernels do not scale leaves the parts of DoRA adapters to another pass: the tokens of the step
    survive the moves of the cache that it makes."""
    if weight_format == "int8" and not cpu.usable(torch.empty(0)):
        pytest.skip("there is no C compiler")
    home = decoder()
    held = home if weight_format == "fp32" else home.in_formats(Choice.fixed(weight_format))
    keys = ("dora", None, "dora", "plain", None, "dora")

    def served(apart: bool) -> Tensor:
        backend = CpuBackend(held)
        runner = Runner(backend)
        for key in ("dora", "plain"):
            config = LoraConfig(r=4, alpha=2, use_dora=key == "dora")
            runner.attach(key, random_lora(home, 1, config), frozen=True)
        if apart:
            plain = ReferenceBackend.decode, ReferenceBackend.prefill

            def decode(parts: Sequence[Part]) -> Tensor:
                ways = (partial(way, backend) for way in (CpuBackend.decode, plain[0]))
                return decode_apart(parts, lambda part: part.adapter == "dora", *ways)

            def prefill(parts: Sequence[Part]) -> Iterator[Computed]:
                ways = (partial(way, backend) for way in (CpuBackend.prefill, plain[1]))
                return prefill_apart(parts, lambda part: part.adapter == "dora", *ways)

            backend.decode, backend.prefill = decode, prefill  # type: ignore[method-assign]
        rows = [Running(row, key) for row, key in zip(make_rows([3, 40, 12, 5, 9, 20]), keys, strict=True)]
        found = [runner.prefill(rows)]
        for token in range(4):
            for row in rows:
                row.tokens.append(token)
                assert runner.extend(row)
            found.append(runner.step(rows))
        return torch.stack(found)

    wanted, found = served(False), served(True)
    assert (found - wanted).norm() / wanted.norm() < (1e-5 if weight_format == "fp32" else 2e-2)


# ---------------------------------------------------------------- trained


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_pefts(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Loss and gradients, those of the magnitudes included."""
    theirs, home = saved(family, tmp_path), network(family)
    lora = read(home, tmp_path)
    lora.flatten()
    rows = make_rows([9, 30], range(5, 12))
    found = compute_losses(backend_for(home.in_fp32()), lora, 7, [Row(tuple(row), 9) for row in rows], checkpointing)
    found.ce.backward()
    wanted = torch.zeros(())
    for row in rows:
        logits_TV = theirs(torch.tensor([row])).logits[0].float()
        wanted = wanted + F.cross_entropy(logits_TV[8:-1], torch.tensor(row[9:]), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(found.ce, wanted, atol=1e-3, rtol=1e-5)
    gradients = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    names = {tensor.data_ptr(): name for name, tensor in lora.state().items()}
    checked = 0
    for group in (group for groups in lora.layers for group in groups.values()):
        slopes = dict(
            zip(
                lora_names(group.places, "lora_A"),
                gradient(group.A_RI).split([place.rank for place in group.places]),
                strict=True,
            )
        )
        slopes |= zip(lora_names(group.places, "lora_B"), map(gradient, group.Bs), strict=True)
        slopes |= zip(lora_names(group.places, MAGNITUDE), map(gradient, group.magnitudes), strict=True)
        for name, slope in slopes.items():
            assert gradients[name].abs().max() > 0
            assert (slope - gradients[name]).norm() / gradients[name].norm() < 1e-3, name
            checked += 1
    assert checked == len(names) == len(gradients)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def lora_names(places: Sequence[Any], kind: str) -> list[str]:
    return [f"{place.prefix}{kind}" for place in places]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_product_and_its_gradients_are_the_plain_formulas(dropout: float) -> None:
    """The dropout is on what DoRA adds to the base's product, as in PEFT."""
    home = decoder()
    lora = random_lora(home, config=LoraConfig(r=4, alpha=12, dropout=dropout, use_dora=True))
    update = lora.layers[1]["qkv"]
    for tensor in update.tensors:
        tensor.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    weight = torch.randn(128, 64, generator=generator)
    upstream = torch.randn(5, 128, generator=generator)

    ours = lora_product(x, weight, 1, "qkv", [Segment(lora)], seed=7 if dropout else None)
    seen = x * drop(torch.ones_like(x), dropout, 7)
    parts = []
    for place, A, B, magnitude in zip(update.places, update.A_RI.split(4), update.Bs, update.magnitudes, strict=True):
        own = weight[place.columns]
        scale = magnitude / (own + 3 * B @ A).detach().norm(dim=1)
        parts.append(x @ own.t() + (scale - 1) * (seen @ own.t()) + scale * 3 * (seen @ A.t() @ B.t()))
    plain = torch.cat(parts, 1)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    leaves = [x, *update.tensors]
    got, want = (torch.autograd.grad(y, leaves, upstream) for y in (ours, plain))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_at_the_start_nothing_changes_and_the_magnitudes_are_pefts() -> None:
    model, row = tiny_model("qwen2"), make_rows([20])[0]
    home = as_decoder(model)
    config = LoraConfig(r=4, alpha=8, use_dora=True)
    lora = Lora.init(config, home.config, seed=0)
    lora.take_magnitudes(home.frozen)
    for segments in ([], [Segment(lora)]):
        found_TV = home.logits(ReferenceBackend(home).forward(pack([row]), segments))
        torch.testing.assert_close(found_TV, logits_of(model, row), atol=1e-5, rtol=1e-5)
    options = config.to_peft("tiny")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=options["target_modules"]))
    wanted = peft.get_peft_model_state_dict(theirs)
    ours = lora.state()
    assert ours.keys() == wanted.keys()
    for name in (name for name in ours if name.endswith(MAGNITUDE)):
        torch.testing.assert_close(ours[name], wanted[name])


# ---------------------------------------------------------------- refused


def test_magnitudes_and_use_dora_belong_together() -> None:
    home, config = decoder(), LoraConfig(r=4, use_dora=True)
    whole = random_lora(home, config=config).state()
    vectors = [name for name in whole if name.endswith(MAGNITUDE)]
    assert len(vectors) == len(whole) // 3
    with pytest.raises(InvalidAdapter, match="use_dora is not true"):
        Lora.from_state(LoraConfig(r=4), home.config, whole)
    with pytest.raises(InvalidAdapter, match=f"{vectors[0]!r} is missing"):
        Lora.from_state(config, home.config, {name: whole[name] for name in whole if name != vectors[0]})
    with pytest.raises(InvalidAdapter, match=r"\(63,\), this base needs \(64,\)"):
        Lora.from_state(config, home.config, {**whole, vectors[0]: whole[vectors[0]][1:]})
