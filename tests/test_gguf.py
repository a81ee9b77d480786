"""A GGUF file is converted to the model it was made from: config, weights, tokenizer, chat template."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fortwo.errors import UnsupportedModel
from fortwo.execution.reference import ReferenceBackend
from fortwo.hub import gguf, weights
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.packing import pack
from tests import tiny
from tests.tiny import LLAMA3_ROPE, TEMPLATE, save_gguf, tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0],
    "long_factor": [2.0] * 8,
}
GEMMA3_STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"head_dim": 16, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"sliding_window": 24}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"head_dim": 32, "attention_bias": True}),
    ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "attn_logit_softcapping": 3.0}),
    ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "num_hidden_layers": 7}),
    ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": GEMMA3_STRETCHED}),
    ("phi3", {"sliding_window": 24, "rope_parameters": PARTIAL}),
    ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONGROPE}),
    ("llama", {"rope_parameters": YARN}),
]
TEXTS = ["What is 42?", "\n\n1. the  42", "héllo 🦜 <|im_end|> x", "  def f(x):\n\treturn 1234", ""]


def silent(label: str, done: int, total: int) -> None:
    pass


def converted(file: Path) -> Path:
    target = file.parent / "converted"
    target.mkdir(exist_ok=True)
    gguf.convert(file, target, silent)
    return target


@pytest.mark.parametrize(("family", "options"), CASES)
def test_weights_are_those_the_file_was_made_from(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    target = converted(save_gguf(tmp_path / "tiny.gguf", model))
    found, expected = weights.open_tensors(target), model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # to a norm's weight the converter of Gemma adds 1
        rounding = 1e-6 if family.startswith("gemma") and name.endswith("norm.weight") else 0
        torch.testing.assert_close(found[name], tensor, atol=rounding, rtol=0)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_config_computes_what_the_model_computed(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    target = converted(save_gguf(tmp_path / "tiny.gguf", model))
    tokens = torch.arange(40)[None] * 5 % model.config.vocab_size
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()(tokens).logits
        model.set_attn_implementation("eager")
        wanted = model(tokens).logits
        torch.testing.assert_close(again, wanted, atol=1e-4 if family.startswith("gemma") else 0, rtol=0)
        torch.testing.assert_close(logits_of(target, tokens[0].tolist()), wanted[0], atol=1e-4, rtol=0)


def logits_of(directory: Path, row: list[int]) -> torch.Tensor:
    """The decoder's (T, V)."""
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    decoder = Decoder(config, weights.open_tensors(directory))
    with torch.no_grad():
        return decoder.logits(ReferenceBackend(decoder).forward(pack([row])))


BIASES = [
    ("llama", {"blk.0.attn_q": 64, "blk.0.attn_k": 32, "blk.0.attn_v": 32}),
    ("llama", {"blk.2.attn_k": 32}),
    ("llama", {"blk.1.ffn_up": 96}),
    ("qwen2", {"blk.0.attn_output": 64}),
    ("qwen2", {"blk.0.ffn_down": 64}),
    ("qwen3", {"blk.0.attn_output": 64}),
]


@pytest.mark.parametrize(("family", "biases"), BIASES)
def test_biases_in_a_file_are_used(tmp_path: Path, family: str, biases: dict[str, int]) -> None:
    """Those of some layers and projections; the others are zero. transformers computes the same."""
    generator = np.random.default_rng(0)
    model = tiny_model(family)
    extra = {f"{name}.bias": (generator.normal(0, 3, size).astype(np.float32), None) for name, size in biases.items()}
    target = converted(save_gguf(tmp_path / "tiny.gguf", model, extra=extra))
    tokens = torch.arange(40)[None] * 5 % model.config.vocab_size
    with torch.no_grad():
        wanted, without = (AutoModelForCausalLM.from_pretrained(target).eval()(tokens).logits, model(tokens).logits)
    assert (wanted - without).abs().max() > 0.1
    torch.testing.assert_close(logits_of(target, tokens[0].tolist()), wanted[0], atol=1e-4, rtol=0)
    found = weights.open_tensors(target)
    for name, (values, _) in extra.items():
        _, layer, ours, _ = name.split(".")
        theirs = found[f"model.layers.{layer}.{HF_NAMES[ours]}.bias"]
        assert torch.equal(theirs.sort().values, torch.from_numpy(values).sort().values)


HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        ("llama", "blk.0.attn_q_norm.weight", "architecture 'llama'"),
        ("llama", "blk.7.attn_norm.weight", "llama.block_count is 3"),
        ("llama", "blk.0.attn_norm.bias", "architecture 'llama'"),
        ("gemma3", "blk.0.attn_qkv.weight", "architecture 'gemma3'"),
        ("llama", "output.bias", "architecture 'llama'"),
    ],
)
def test_a_tensor_that_the_network_has_not_is_named(tmp_path: Path, family: str, name: str, text: str) -> None:
    extra = {name: (np.ones(64, np.float32), None)}
    with pytest.raises(UnsupportedModel, match=f"{name}, .*{text}") as raised:
        converted(save_gguf(tmp_path / "tiny.gguf", tiny_model(family), extra=extra))
    assert raised.value.hint


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16])
def test_quantised_tensors_are_dequantised_as_gguf_defines(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    model = tiny_model("qwen2")
    values = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    packed = quants.quantize(values, kind)
    file = save_gguf(
        tmp_path / "tiny.gguf", model, without="blk.1.ffn_up", extra={"blk.1.ffn_up.weight": (packed, kind)}
    )
    found = weights.open_tensors(converted(file))["model.layers.1.mlp.up_proj.weight"].numpy()
    assert np.array_equal(found, quants.dequantize(packed, kind).astype(np.float32))
    assert 0 < np.abs(found - values).max() < 0.05


def test_the_safetensors_files_of_a_converted_file_are_its_weights_alone(tmp_path: Path) -> None:
    """Programs such as vLLM load the tensors of all of them."""
    model = tiny_model("qwen2")
    packed = quants.quantize(model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy(), GGMLQuantizationType.Q4_1)
    extra = {"blk.1.ffn_up.weight": (packed, GGMLQuantizationType.Q4_1)}
    target = converted(save_gguf(tmp_path / "tiny.gguf", model, without="blk.1.ffn_up", extra=extra))
    assert weights.block_bytes(target) > 0
    loaded = [name for file in target.glob("*.safetensors") for name in load_file(file)]
    assert sorted(loaded) == sorted(weights.open_tensors(target))


def test_blocks_that_an_earlier_version_has_written_are_found_and_renamed(tmp_path: Path) -> None:
    weights.write_blocks(tmp_path, {"one": "Q8_0"}, {"one": np.zeros((2, 34), np.uint8)})
    size = (tmp_path / "model.blocks").stat().st_size
    (tmp_path / "model.blocks").rename(tmp_path / "blocks.safetensors")
    assert weights.block_bytes(tmp_path) == size
    assert weights.block_types(tmp_path) == {"one": "Q8_0"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.blocks"]


def test_llama3_scaling_of_positions_is_recovered(tmp_path: Path) -> None:
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    model = tiny_model("llama", head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    half = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (half / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    target = converted(save_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": (factors, None)}))
    scaling = json.loads((target / "config.json").read_text())["rope_scaling"]
    assert scaling.pop("factor") == pytest.approx(8.0)
    assert scaling == {key: rope[key] for key in scaling}
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.allclose(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5)


def test_other_scaling_of_positions_is_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    file = save_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra={"rope_freqs.weight": (factors, None)})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs.weight does not hold Llama 3's RoPE scaling"):
        converted(file)


def test_tokenizer_is_the_files_own_and_what_lies_beside_it_is_not_read(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "wrong", "chat_template": "wrong"}')
    target = converted(file)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert [tokenizer.encode(text) for text in TEXTS] == [reference.encode(text) for text in TEXTS]
    assert tokenizer.decode(tokenizer.encode("the 🦜")) == "the 🦜"
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", TEMPLATE)
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_every_end_of_reply_is_declared(tmp_path: Path) -> None:
    target = converted(save_gguf(tmp_path / "tiny.gguf", tiny_model("llama")))
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [2]}


def test_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="architecture 'mamba'") as raised:
        converted(tmp_path / "x.gguf")
    assert "llama, qwen2, qwen3" in str(raised.value.hint)


def test_missing_embedding_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"lacks the tensor token_embd.weight"):
        converted(save_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), without="token_embd"))


def test_foreign_tensor_is_named(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_exps.weight": (np.zeros((2, 96, 64), np.float32), None)}
    with pytest.raises(UnsupportedModel, match=r"blk.0.ffn_gate_exps.weight"):
        converted(save_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra))


@pytest.mark.parametrize("keep", [0, 3, 1000, -1000])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = save_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UnsupportedModel, match="is not a readable GGUF file"):
        converted(file)


def test_a_file_in_parts_is_joined_whichever_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = weights.open_tensors(converted(save_gguf(tmp_path / "whole.gguf", model)))
    monkeypatch.setattr(tiny.gguf, "GGUFWriter", partial(GGUFWriter, split_max_tensors=10))
    folder = tmp_path / "parts"
    folder.mkdir()
    save_gguf(folder / "tiny.gguf", model)
    first, *others = sorted(folder.iterdir())
    assert first.name == f"tiny-00001-of-0000{len(others) + 1}.gguf"
    for part in (first, others[-1]):
        target = tmp_path / part.name
        target.mkdir()
        gguf.convert(part, target, silent)
        found = weights.open_tensors(target)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert (target / "tokenizer.json").is_file()
    renamed = tmp_path / "alone.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(UnsupportedModel, match=r"is one of . parts of a model, but its name does not say so"):
        gguf.convert(renamed, tmp_path, silent)
    others[0].unlink()
    with pytest.raises(UnsupportedModel, match=f"lacks {others[0].name}") as raised:
        gguf.convert(others[-1], tmp_path, silent)
    assert "Download all parts" in str(raised.value.hint)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_K, GGMLQuantizationType.Q8_1, GGMLQuantizationType.F64])
def test_tensors_that_cannot_be_dequantised_are_named_with_their_type(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    rows, columns = 64, 256
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.zeros((rows, columns // block * size), np.uint8)
    extra = dict.fromkeys(("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"), (packed, kind))
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    for name, (array, type) in extra.items():
        writer.add_tensor(name, array, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=f"blk.0.ffn_up.weight and 1 more of type {kind.name}") as raised:
        converted(file)
    assert "another quantisation" in str(raised.value.hint)


def test_an_unknown_type_is_named_with_its_number(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    name = b"blk.1.ffn_down.weight"
    content = file.read_bytes()
    at = content.index(name) + len(name)
    dimensions = int.from_bytes(content[at : at + 4], "little")
    at += 4 + 8 * dimensions
    file.write_bytes(content[:at] + (156).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UnsupportedModel, match=r"blk.1.ffn_down.weight of type the unknown number 156") as raised:
        converted(file)
    assert "another quantisation" in str(raised.value.hint)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model_is_named(tmp_path: Path, kind: str) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=f"holds no model, its general.type is '{kind}'"):
        converted(tmp_path / "x.gguf")


def metadata(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> None:
    """Let the writer write other values: its methods' names and their arguments."""

    class Writer(GGUFWriter):
        pass

    for name, value in methods.items():
        original = getattr(GGUFWriter, name)
        setattr(Writer, name, lambda self, _, original=original, value=value: original(self, value))
    monkeypatch.setattr(tiny.gguf, "GGUFWriter", Writer)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ({"add_head_count": 0}, "head_count is 0"),
        ({"add_head_count_kv": [2, 1, 2]}, r"head_count_kv is \[2, 1, 2\]"),
        ({"add_feed_forward_length": 0}, "feed_forward_length is 0"),
        ({"add_block_count": 0}, "block_count is 0"),
    ],
)
def test_metadata_that_makes_no_network_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: dict[str, Any], reason: str
) -> None:
    metadata(monkeypatch, **methods)
    with pytest.raises(UnsupportedModel, match=reason):
        converted(save_gguf(tmp_path / "tiny.gguf", tiny_model("llama")))


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"nowhere.gguf does not exist"):
        converted(tmp_path / "nowhere.gguf")


@pytest.mark.real
def test_bundled_model_is_transformers_reading_of_its_gguf(real_home: Path, tmp_path: Path) -> None:
    directory = real_home / "models" / "smollm2-135m-instruct"
    (file,) = directory.glob("*.gguf")
    (tmp_path / file.name).symlink_to(file)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    shared = ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "num_attention_heads", "num_key_value_heads"]
    shared += ["head_dim", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"]
    assert {key: getattr(model.config, key) for key in shared} == {
        key: getattr(reference.config, key) for key in shared
    }
    tokenizer = AutoTokenizer.from_pretrained(directory)
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert [tokenizer.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]
    assert tokenizer.chat_template == GGUFReader(file).get_field("tokenizer.chat_template").contents()
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
