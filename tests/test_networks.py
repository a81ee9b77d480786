"""The network of every family is transformers', and a training step on it is PEFT's, on every backend of this machine.

Tolerance: logits within 1e-4 on tiny random models whose logits reach 4 (fp32, sums in another order); greedy tokens
are identical; gradients within 1e-4 of PEFT's. Sequences are longer than the windows.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.errors import UnsupportedModel
from fortwo.execution.backend import Backend
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import cpu
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.lora_group import LoraGroup
from fortwo.nn.packing import pack
from fortwo.quantization.selection import Choice
from fortwo.train.losses import Row, compute_losses
from tests.parts import as_decoder, make_rows, random_lora
from tests.test_lora import save
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
ATOL = 1e-4
WINDOW = 24
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
GEMMA = {"sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 20, "num_hidden_layers": 7}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with yarn": ("llama", {"rope_parameters": YARN}),
    "llama with yarn, all fields": (
        "llama",
        {
            "rope_parameters": {
                **YARN,
                "beta_fast": 4,
                "beta_slow": 2,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            }
        },
    ),
    "llama with an attention factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "llama with dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": 32},
    ),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3", GEMMA),
    "gemma3 as the 270M": (
        "gemma3",
        {**GEMMA, "head_dim": 256, "query_pre_attn_scalar": 256, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3 with longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "num_hidden_layers": 5}),
    "stablelm": ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "stablelm with biases": ("stablelm", {"use_qkv_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.3,
            "attention_bias": True,
        },
    ),
}
KINDS: list[type[ReferenceBackend]] = [ReferenceBackend, CpuBackend]
if torch.cuda.is_available():
    KINDS.append(CudaBackend)
families = pytest.mark.parametrize("case", CASES)
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def model_of(case: str) -> PreTrainedModel:
    family, options = CASES[case]
    return tiny_model(family, attn_implementation="eager", **options)


@cache
def network(case: str, device: str = "cpu") -> Decoder:
    return as_decoder(model_of(case), device)


def backend_of(kind: type[ReferenceBackend], case: str) -> Backend:
    return kind(network(case, "cuda" if kind is CudaBackend else "cpu"))


def every(config: DecoderConfig) -> tuple[str, ...]:
    """The base's projections."""
    return tuple(name for names in config.groups.values() for name in names)


@torch.no_grad()
def expected(model: Any, row: list[int]) -> Tensor:
    """Logits (T, V) of a row alone."""
    logits: Tensor = model(torch.tensor([row])).logits[0]
    return logits


@torch.no_grad()
@families
@kinds
def test_logits_of_packed_rows(kind: type[ReferenceBackend], case: str) -> None:
    """What rows begin with is computed once; the rows' positions go beyond the window."""
    backend, rows = backend_of(kind, case), make_rows([1, 50, 7, 90], start=range(5, 35))
    packed = pack(rows, backend.decoder.device)
    assert packed.prefix == 30
    logits_TV = backend.decoder.logits(backend.forward(packed)).cpu()
    for index, row in enumerate(rows):
        places = [packed.place(index, position) for position in range(len(row))]
        torch.testing.assert_close(logits_TV[places], expected(model_of(case), row), atol=ATOL, rtol=0)


@torch.no_grad()
@families
def test_every_feature_matters(case: str) -> None:
    """Without this a case could pass by ignoring what it is about: without one of its features the network computes
    something else, or its weights do not fit."""
    home, row = network(case), make_rows([90])[0]
    wanted = expected(model_of(case), row)
    rope = replace(home.config.rope, scaling=None, amplitude=1.0)
    others = {name: replace(home.config, **{name: DEFAULTS[name]}) for name in home.config.features & DEFAULTS.keys()}
    if rope != home.config.rope:
        others["rope"] = replace(home.config, rope=rope)
    if home.config.rope.size != home.config.head_size:
        others["partial_rope"] = replace(home.config, rope=replace(rope, size=home.config.head_size, scaling=None))
    assert others or case in ("llama", "llama with dynamic rope")
    for name, config in others.items():
        try:
            other = Decoder(config, model_of(case).state_dict())
        except UnsupportedModel:
            continue
        logits_TV = other.logits(ReferenceBackend(other).forward(pack([row])))
        assert (logits_TV - wanted).abs().max() > 30 * ATOL, name


DEFAULTS = {field.name: field.default for field in fields(DecoderConfig) if field.default is not MISSING}


@families
@kinds
def test_served_tokens(kind: type[ReferenceBackend], case: str) -> None:
    """Greedy tokens of sequences together: some are read in parts, one finds its beginning in the cache."""
    runner, model = Runner(backend_of(kind, case)), model_of(case)
    start = list(range(5, 45))
    first = Running(start + [7] * 20, None)
    runner.prefill([first])
    runner.release(first)
    rows = [Running(tokens, None) for tokens in make_rows([3, 40, 17], start)]
    rows.append(Running([9, 8], None))
    prompts = [list(row.tokens) for row in rows]
    assert runner.unread(rows[0]) < len(start)  # the cache has what they begin with
    runner.prefill(rows[:2], [2, 20])
    runner.prefill(rows[:2])
    runner.prefill(rows[2:])
    for row, tokens in zip(rows, prompts, strict=True):
        row.tokens.append(int(expected(model, tokens)[-1].argmax()))
        assert runner.extend(row)
    found = []
    for _ in range(12):
        found.append(runner.step(rows).cpu())
        for row, logits_V in zip(rows, found[-1], strict=True):
            row.tokens.append(int(logits_V.argmax()))
            assert runner.extend(row)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        wanted = expected(model, row.tokens[:-1])[len(prompt) :]
        torch.testing.assert_close(torch.stack([logits[index] for logits in found]), wanted, atol=ATOL, rtol=0)
        assert row.tokens[len(prompt) + 1 :] == wanted.argmax(-1).tolist()


@torch.no_grad()
@families
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4"])
def test_weights_in_other_forms(weight_format: str, case: str) -> None:
    """A kernel for a whole pass is not used for a network, or a sequence, that it does not know: prompts and steps,
    some of sequences beyond the window, are the reference's over the same weights."""
    if weight_format == "int8" and not cpu.usable(torch.empty(0)):
        pytest.skip("there is no C compiler")
    held = network(case).in_formats(Choice.fixed(weight_format))

    def served(backend: Backend) -> Tensor:
        runner = Runner(backend)
        runner.attach("a", random_lora(network(case), config=LoraConfig(r=4, alpha=1)), frozen=True)
        rows = [
            Running(row, adapter) for row, adapter in zip(make_rows([3, 70, 12], [5]), (None, "a", "a"), strict=True)
        ]
        found = [runner.prefill(rows)]
        for token in range(14):
            for row in rows:
                row.tokens.append(token)
                assert runner.extend(row)
            found.append(runner.step(rows))
        return torch.stack(found)

    wanted, found = served(ReferenceBackend(held.in_fp32())), served(CpuBackend(held))
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 5e-2


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_in_bf16(checkpointing: bool, case: str) -> None:
    """As the reference in fp32, over the same weights; each layer computed again for its gradient or not."""

    def trained(backend: Backend, checkpointing: bool) -> Tensor:
        config = LoraConfig(r=4, alpha=4, target_modules=every(backend.decoder.config))
        lora = random_lora(network(case), 3, config)
        flat_N = lora.flatten()
        rows = [Row(tuple(row), 9) for row in make_rows([9, 50], range(5, 12))]
        compute_losses(backend, lora, 7, rows, checkpointing).ce.backward()
        assert flat_N.grad is not None
        return flat_N.grad

    held = network(case).in_bf16()
    wanted = trained(ReferenceBackend(held.in_fp32()), False)
    found = trained(CpuBackend(held), checkpointing)
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 8e-2


def of_gradients(group: LoraGroup) -> LoraGroup:
    found = [tensor.grad for tensor in group.tensors if tensor.grad is not None]
    return LoraGroup(group.places, found[0], found[1:])


@families
@kinds
def test_a_training_step(kind: type[ReferenceBackend], case: str, tmp_path: Path) -> None:
    """Loss and gradients of an adapter on all projections, which PEFT reads from the files that we write."""
    model, backend = tiny_model(CASES[case][0], attn_implementation="eager", **CASES[case][1]), backend_of(kind, case)
    base = backend.decoder.config
    config = LoraConfig(r=4, alpha=8, target_modules=every(base))
    lora = random_lora(network(case), config=config)
    tuned = peft.PeftModel.from_pretrained(model, save(tmp_path / "adapter", lora), is_trainable=True)
    rows = make_rows([9, 50], range(5, 12))
    loss = torch.zeros(())
    for row in rows:
        logits_TV = tuned(torch.tensor([row])).logits[0]
        loss = loss + F.cross_entropy(logits_TV[8:-1], torch.tensor(row[9:]), reduction="sum")
    loss.backward()
    wanted = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    own = Lora.from_state(config, base, lora.state(), backend.decoder.device)
    own.flatten()
    found = compute_losses(backend, own, 7, [Row(tuple(row), 9) for row in rows])
    torch.testing.assert_close(found.ce.detach().cpu(), loss.detach(), atol=1e-3, rtol=1e-5)
    found.ce.backward()
    slopes = Lora(config, [{name: of_gradients(group) for name, group in groups.items()} for groups in own.layers])
    got = slopes.state()
    assert got.keys() == wanted.keys()
    for name, theirs in wanted.items():
        assert theirs is not None
        largest = float(theirs.abs().max())
        assert largest > 1e-3, name
        torch.testing.assert_close(got[name].cpu(), theirs, atol=ATOL * max(1, largest), rtol=0)
