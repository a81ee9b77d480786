"""The decoder computes what transformers computes.

Tolerance: logits within 2e-5 of transformers' on tiny random models whose logits reach 4, within 1e-3 on the bundled
model whose logits reach 40 (fp32, sums in another order). Greedy text is identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.engine.runner import Runner
from fortwo.errors import UnsupportedModel
from fortwo.execution.backend import backend_for
from fortwo.hub import weights
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.packing import PackedAttention, pack
from fortwo.quantization.selection import Choice
from fortwo.records import Message
from tests.tiny import FAMILIES, LLAMA3_ROPE, VOCABULARY, tiny_model

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("llama", {"head_dim": 32, "max_position_embeddings": 512, "rope_parameters": LLAMA3_ROPE}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    ("mistral", {"sliding_window": 128, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
]
ATOL = 2e-5
REAL_ATOL = 1e-3


@dataclass
class Row:
    tokens: list[int]
    adapter: str | None = None
    slot: int | None = None
    listener: None = None
    background: bool = False


def hf_config(model: PreTrainedModel) -> dict[str, Any]:
    """What save_pretrained would write."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def make_decoder(model: PreTrainedModel) -> Decoder:
    return Decoder(DecoderConfig.from_hf(hf_config(model)), model.state_dict())


def make_rows(lengths: Sequence[int], start: Sequence[int] = ()) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[*start, *torch.randint(0, len(VOCABULARY), (length,), generator=generator).tolist()] for length in lengths]


@torch.no_grad()
def expected(model: PreTrainedModel, row: list[int]) -> Tensor:
    """Logits (T, V) of a row alone."""
    logits: Tensor = model(torch.tensor([row])).logits[0]
    return logits


@pytest.mark.parametrize(("family", "options"), CASES)
def test_logits_are_transformers(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    decoder = make_decoder(model)
    rows = make_rows([1, 50, 7, 100], start=[5, 6, 7])
    packed = pack(rows)
    assert packed.prefix == 3
    with torch.no_grad():
        hidden_TD = decoder.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, decoder.config))
        logits_TV = decoder.logits(hidden_TD)
    for index, row in enumerate(rows):
        places = [packed.place(index, position) for position in range(len(row))]
        torch.testing.assert_close(logits_TV[places], expected(model, row), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_prefill_and_steps_are_transformers(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    runner = Runner(backend_for(make_decoder(model)))
    rows = [Row(tokens) for tokens in make_rows([3, 40, 17])]
    got = [runner.prefill(rows)]
    for _ in range(12):
        for row, logits_V in zip(rows, got[-1], strict=True):
            row.tokens.append(int(logits_V.argmax()))
        got.append(runner.step(rows))
    for index, row in enumerate(rows):
        want = expected(model, row.tokens)[-len(got) :]
        torch.testing.assert_close(torch.stack([logits_BV[index] for logits_BV in got]), want, atol=ATOL, rtol=0)


def test_every_option_changes_the_logits() -> None:
    """Without this the cases above could pass by ignoring what they are about."""
    row = make_rows([100])[0]
    plain = expected(tiny_model("llama", max_position_embeddings=512, head_dim=32), row)
    for options in (
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rms_norm_eps": 1e-1},
    ):
        other = expected(tiny_model("llama", **{"max_position_embeddings": 512, "head_dim": 32, **options}), row)
        assert (other - plain).abs().max() > 100 * ATOL, options


UNUSED = [
    ("llama", "model.layers.0.self_attn.q_proj.bias"),
    ("qwen2", "model.layers.1.self_attn.o_proj.bias"),
    ("llama", "model.layers.0.mlp.up_proj.bias"),
    ("llama", "model.layers.0.self_attn.q_norm.weight"),
    ("llama", "model.layers.7.input_layernorm.weight"),
    ("llama", "model.layers.0.self_attn.q_proj.weight_scale"),
]


@pytest.mark.parametrize(("family", "name"), UNUSED)
def test_a_tensor_that_is_not_used_is_named(family: str, name: str) -> None:
    model = tiny_model(family)
    tensors = {**model.state_dict(), name: torch.ones(64)}
    with pytest.raises(UnsupportedModel, match=f"have '{name}', which .*does not use") as raised:
        Decoder(DecoderConfig.from_hf(hf_config(model)), tensors)
    assert raised.value.hint


def test_tensors_that_every_loader_ignores_are_ignored() -> None:
    model = tiny_model("llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8)}
    Decoder(DecoderConfig.from_hf(hf_config(model)), {**model.state_dict(), **extra})


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings_is_used_as_it_is(same: bool) -> None:
    """transformers takes the file's head, too."""
    model = tiny_model("llama", tie_word_embeddings=True)
    tensors = dict(model.state_dict())
    embedding_VD = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding_VD.clone() if same else embedding_VD.flip(0)
    home = Decoder(DecoderConfig.from_hf(hf_config(model)), tensors)
    assert home.config.tied == same
    x_TD = torch.randn(2, 64)
    torch.testing.assert_close(home.logits(x_TD), x_TD @ tensors["lm_head.weight"].t())
    assert home.bytes == sum(4 * p.numel() for p in model.parameters()) + (0 if same else embedding_VD.nbytes)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.layers.2.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(family: str, name: str) -> None:
    model = tiny_model(family)
    config, tensors = DecoderConfig.from_hf(hf_config(model)), dict(model.state_dict())
    whole = tensors.pop(name)
    with pytest.raises(UnsupportedModel, match=f"'{name}' is missing"):
        Decoder(config, tensors)
    with pytest.raises(UnsupportedModel, match=rf"'{name}' is \({whole.shape[0] - 1},"):
        Decoder(config, {**tensors, name: whole[1:]})


def test_bytes_are_those_of_the_weights() -> None:
    for family, tied in (("qwen2", False), ("qwen2", True), ("gemma3", True), ("phi3", False), ("stablelm", False)):
        model = tiny_model(family, tie_word_embeddings=tied)
        assert make_decoder(model).bytes == sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_products_change_the_logits_a_little_and_the_decoder_not_at_all(family: str) -> None:
    decoder = make_decoder(tiny_model(family))
    packed = pack([[3, 9, 4, 12, 7]])

    def logits(of: Decoder) -> torch.Tensor:
        return of.logits(of.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, of.config)))

    before = logits(decoder)
    narrow = logits(decoder.in_bf16())
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - before).norm() / before.norm() < 0.05
    assert torch.equal(logits(decoder), before)


@pytest.fixture(scope="module")
def real_directory(real_home: Path) -> Path:
    return real_home / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def reference(real_directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(real_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def real_runner(reference: PreTrainedModel, real_directory: Path) -> Runner:
    config = DecoderConfig.from_hf(reference.config.to_dict())
    return Runner(backend_for(Decoder(config, weights.open_tensors(real_directory))))


PROMPTS = [
    "What is the meaning of 42?",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
]


@pytest.mark.real
def test_real_logits_are_transformers(real_runner: Runner, reference: PreTrainedModel, real_directory: Path) -> None:
    renderer = ChatTemplateRenderer(real_directory)
    rows = [renderer.encode_prompt([Message("user", prompt)]) for prompt in PROMPTS]
    packed = pack(rows)
    decoder = real_runner.decoder
    with torch.no_grad():
        hidden_TD = decoder.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, decoder.config))
        logits_TV = decoder.logits(hidden_TD)
    for index, row in enumerate(rows):
        places = [packed.place(index, position) for position in range(len(row))]
        torch.testing.assert_close(logits_TV[places], expected(reference, row), atol=REAL_ATOL, rtol=0)


@pytest.mark.real
def test_real_greedy_text_is_transformers(
    real_runner: Runner, reference: PreTrainedModel, real_directory: Path
) -> None:
    """All prompts together here, each alone there."""
    renderer = ChatTemplateRenderer(real_directory)
    prompts = [renderer.encode_prompt([Message("user", prompt)]) for prompt in PROMPTS]
    rows = [Row(list(prompt)) for prompt in prompts]
    logits_BV = real_runner.prefill(rows)
    for _ in range(40):
        for row, logits_V in zip(rows, logits_BV, strict=True):
            row.tokens.append(int(logits_V.argmax()))
        logits_BV = real_runner.step(rows)
    for row in rows:
        real_runner.release(row)
    for prompt, row in zip(prompts, rows, strict=True):
        with torch.no_grad():
            given = torch.tensor([prompt])
            whole = reference.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False)
        want = whole[0, len(prompt) :].tolist()
        got = row.tokens[len(prompt) :][: len(want)]
        assert renderer.decode(got) == renderer.decode(want)
        assert got == want
        assert len(want) == 40 or want[-1] in renderer.stop_ids


@pytest.mark.real
@pytest.mark.parametrize(("weight_format", "share"), [("bf16", 0.9), ("int8", 0.9), ("int4", 0.9)])
def test_real_replies_in_narrow_forms(
    real_runner: Runner, real_directory: Path, weight_format: str, share: float
) -> None:
    """The bundled model's layers lose nothing in 4 bits, which they came in; replies stay sane in every format."""
    exact, renderer = real_runner.decoder, ChatTemplateRenderer(real_directory)
    narrow = exact.in_formats(Choice.fixed(weight_format))
    if weight_format == "int4":
        assert all(torch.equal(one, other) for one, other in zip(exact.weights(), narrow.weights(), strict=True))
    row, tokens = Row(renderer.encode_prompt([Message("user", "What is the capital of France?")])), []
    runner = Runner(backend_for(narrow))
    logits_BV = runner.prefill([row])
    while len(tokens) < 24 and (not tokens or tokens[-1] not in renderer.stop_ids):
        tokens.append(int(logits_BV[0].argmax()))
        row.tokens.append(tokens[-1])
        logits_BV = runner.step([row])
    assert "Paris" in renderer.decode(tokens)
    packed = pack([renderer.encode_prompt([Message("user", prompt)]) for prompt in PROMPTS])
    with torch.no_grad():
        first, other = (
            of.logits(of.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, of.config))).argmax(-1)
            for of in (exact, narrow)
        )
    assert (first == other).float().mean() > share
