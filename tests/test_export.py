"""Every exported form computes what fortwo computes, and an export is whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fortwo.adapters.store import AdapterStore
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import Conflict, FortwoError, InvalidRequest, StorageFailed, UnsupportedModel
from fortwo.export import ollama
from fortwo.export.exporter import Exported, export
from fortwo.export.k_quants import quantize_q4_k, quantize_q6_k
from fortwo.export.source import Source
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.hub.prepared import ModelInfo
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion, Message
from tests.tiny import save_directory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),  # vLLM's form knows no list of layers
]

TOKENS = torch.tensor([[1, 5, 40, 99, 7, 30, 200, 17]])
FAMILIES = ["llama", "qwen2", "gemma3"]


class Home:
    """A home with a tiny base and an adapter with patterns of rank and scale, which leaves layer 1 as it is."""

    def __init__(self, folder: Path, family: str, use_dora: bool = False) -> None:
        options = {"query_pre_attn_scalar": 16} if family == "gemma3" else {}  # as llama.cpp supposes
        self.base = save_directory(folder / "base", family, **options)
        self.catalog, self.store = Catalog(folder / "models"), AdapterStore(folder / "adapters")
        self.catalog.add("tiny", self.base)
        self.catalog.prepare("tiny")
        info = self.catalog.model_info("tiny")
        assert info is not None
        patterns: Any = {"rank_pattern": (("v_proj", 2),), "alpha_pattern": (("k_proj", 5),)}
        config = LoraConfig(r=4, alpha=12, layers=(0, 2), use_dora=use_dora, **patterns)
        shape = DecoderConfig.from_hf(json.loads((self.base / "config.json").read_text()))
        generator, tensors = torch.Generator().manual_seed(3), {}
        sizes = weights.tensor_infos(self.base)
        for layer in (0, 2):
            for names in shape.groups.values():
                for name in names:
                    module = shape.module_name(layer, name)
                    rows, columns = sizes[f"{module}.weight"].shape
                    rank = config.rank(module)
                    a = torch.randn(rank, columns, generator=generator) * 0.1
                    b = torch.randn(rows, rank, generator=generator) * 0.1
                    tensors |= {f"base_model.model.{module}.lora_{half}.weight": t for half, t in (("A", a), ("B", b))}
                    if use_dora:
                        magnitude = torch.rand(rows, generator=generator) + 0.5
                        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
        manifest = {"base_model": "tiny", "base_digest": info.digest}
        self.store.publish("one", tensors, config.to_peft("tiny"), manifest, current=True)
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.plain = logits(base)
        self.wanted = logits(PeftModel.from_pretrained(base, self.store.get("one").path))
        assert (self.wanted - self.plain).abs().max() > 0.05

    def export(self, to: str, output: Path, **more: object) -> Exported:
        return export("one", to, output, self.catalog, self.store, lambda *_: None, **more)  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture(params=FAMILIES)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    return Home(tmp_path, request.param)


@pytest.fixture
def llama(tmp_path: Path) -> Home:
    return Home(tmp_path, "llama")


@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_pefts_and_vllms_folders_give_the_adapters_logits(home: Home, tmp_path: Path, to: str) -> None:
    home.export(to, tmp_path / "out")
    named = json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32), tmp_path / "out"
    )
    torch.testing.assert_close(logits(model), home.wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_is_exported_where_it_is_known(family: str, tmp_path: Path) -> None:
    """PEFT reads the files; merged, and in a GGUF, the scale is in the weights."""
    home = Home(tmp_path, family, use_dora=True)
    home.export("peft", tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(home.base, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "peft")), home.wanted)
    home.export("merged", tmp_path / "merged")
    home.export("gguf", tmp_path / "gguf", quantization="F32")
    home.catalog.add("again", tmp_path / "gguf/model.gguf")
    home.catalog.prepare("again")
    again = home.catalog.model_info("again")
    assert again is not None
    for folder in (tmp_path / "merged", again.directory):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(model), home.wanted, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "who"), [("gguf-lora", "llama.cpp"), ("vllm", "vLLM"), ("mlx", "MLX")])
def test_dora_is_refused_where_it_is_not_known(tmp_path: Path, to: str, who: str) -> None:
    home = Home(tmp_path, "llama", use_dora=True)
    with pytest.raises(InvalidRequest, match=f"one@1 .*DoRA.*{who}") as caught:
        home.export(to, tmp_path / "out")
    assert "merged" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_vllms_folder_has_one_rank_and_one_scale_without_patterns(llama: Home, tmp_path: Path) -> None:
    llama.export("vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "layers_to_transform"}
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}


def test_merged_is_a_whole_model_of_transformers(home: Home, tmp_path: Path) -> None:
    home.export("merged", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), home.wanted, atol=2e-5, rtol=1e-5)
    ours, theirs = (ChatTemplateRenderer(folder) for folder in (home.base, tmp_path / "out"))
    asked = [Message("user", "hello")]
    assert ours.encode_prompt(asked) == theirs.encode_prompt(asked)


def test_transposed_weights_are_not_merged(tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)).save_pretrained(base)
    version = AdapterVersion("one", 1, "d", "", "gpt2", "b", 0.0, True, {})
    info = ModelInfo("gpt2", "d", "d", base, 1, 1, "GPT2LMHeadModel", "", None)
    with pytest.raises(UnsupportedModel, match="as \\(inputs, outputs\\)"):
        next(Source(version, {}, {}, info, "gpt2").merged())


def test_mlx_has_transposed_halves_that_give_the_update(llama: Home, tmp_path: Path) -> None:
    llama.export("mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapters.safetensors")
    _, peft, published = llama.store.read("one")
    lora = LoraConfig.from_peft(peft)
    assert config["num_layers"] == 3
    for module in ("model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.k_proj"):
        a, b = (published[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        theirs = config["lora_parameters"]["scale"] * (tensors[f"{module}.lora_a"] @ tensors[f"{module}.lora_b"])
        torch.testing.assert_close(theirs.T, lora.scale(module) * (b @ a))
        assert tensors[f"{module}.lora_a"].shape[1] == config["lora_parameters"]["rank"]


def test_a_merged_gguf_read_back_gives_the_adapters_logits(home: Home, tmp_path: Path) -> None:
    home.export("gguf", tmp_path / "out", quantization="F32")
    home.catalog.add("back", tmp_path / "out/model.gguf")
    folder = home.catalog.prepare("back")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model), home.wanted, atol=1e-4, rtol=1e-4)
    ours, theirs = (ChatTemplateRenderer(folder) for folder in (home.base, folder))
    asked = [Message("user", "hello, the 42")]
    assert ours.encode_prompt(asked) == theirs.encode_prompt(asked)


def test_the_gguf_adapter_added_to_the_gguf_base_is_the_merged_gguf(home: Home, tmp_path: Path) -> None:
    home.export("gguf", tmp_path / "merged", quantization="F32")
    home.export("gguf-lora", tmp_path / "lora")
    adapter = GGUFReader(tmp_path / "lora/adapter.gguf")
    alpha = adapter.get_field("adapter.lora.alpha").contents()
    halves = {tensor.name: tensor.data for tensor in adapter.tensors}
    merged = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "merged/model.gguf").tensors}
    updated = [name.removesuffix(".lora_a") for name in halves if name.endswith(".lora_a")]
    assert len(updated) == 14
    # A merged export of the same adapter with B of zero is the plain base in llama.cpp's order.
    version, peft, tensors = home.store.read("one")
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    home.store.publish("zero", zero, peft, {**version.manifest}, current=True)
    export("zero", "gguf", tmp_path / "plain", home.catalog, home.store, lambda *_: None, quantization="F32")
    plain = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "plain/model.gguf").tensors}
    for name in updated:
        a, b = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        np.testing.assert_allclose(plain[name] + alpha / a.shape[0] * (b @ a), merged[name], atol=1e-5)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_quantised_gguf_stays_near(llama: Home, tmp_path: Path, quantization: str) -> None:
    llama.export("gguf", tmp_path / "exact", quantization="F32")
    llama.export("gguf", tmp_path / "out", quantization=quantization.lower())
    exact = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "exact/model.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "out/model.gguf").tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        error = np.sqrt(((values - exact[tensor.name]) ** 2).mean() / (exact[tensor.name] ** 2).mean())
        assert error < 0.12, (tensor.name, tensor.tensor_type)


@pytest.mark.parametrize(("ours", "kind", "other"), [(quantize_q4_k, "Q4_K", "Q4_0"), (quantize_q6_k, "Q6_K", "Q5_0")])
def test_k_quants_are_nearer_than_simpler_formats_of_their_size(ours, kind: str, other: str) -> None:  # type: ignore[no-untyped-def]
    values = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)

    def error(stored: np.ndarray, name: str) -> float:
        return float(((dequantize(stored, GGMLQuantizationType[name]) - values) ** 2).mean())

    simple = quantize(values, GGMLQuantizationType[other])
    assert error(ours(values), kind) < 0.8 * error(simple, other)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_k_quants_of_equal_numbers(value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    for ours, kind in ((quantize_q4_k, "Q4_K"), (quantize_q6_k, "Q6_K")):
        back = dequantize(ours(values), GGMLQuantizationType[kind])
        np.testing.assert_allclose(back, values, rtol=0.04)


LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = "
    "messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '')"
    " + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_IS_SPECIAL = (
    "{% for m in messages %}{{ ('First: ' if loop.first else '') + m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def renderer(folder: Path, template: str) -> ChatTemplateRenderer:
    save_directory(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplateRenderer(folder)


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, DEFAULT_SYSTEM], ids=["llama3", "gemma", "default system"])
def test_frames_of_a_template_render_what_it_renders(tmp_path: Path, template: str) -> None:
    one = renderer(tmp_path, template)
    frames = ollama.frames_of(one)
    talk = [Message("user", "a b"), Message("assistant", "c"), Message("user", "d")]
    for messages in (talk, [Message("system", "Be brief."), *talk]):
        assert frames.render(messages) == one.render(messages)


def test_a_template_that_treats_the_first_message_differently_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be expressed"):
        ollama.frames_of(renderer(tmp_path, FIRST_IS_SPECIAL))


def test_ollamas_folder(llama: Home, tmp_path: Path) -> None:
    llama.export("ollama", tmp_path / "out", quantization="Q8_0")
    text = (tmp_path / "out/Modelfile").read_text()
    assert "FROM ./model.gguf\n" in text
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert (tmp_path / "out/model.gguf").is_file()


def test_an_existing_output_is_kept_unless_told(llama: Home, tmp_path: Path) -> None:
    llama.export("peft", tmp_path / "out")
    with pytest.raises(Conflict, match="exists already"):
        llama.export("mlx", tmp_path / "out")
    llama.export("mlx", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/adapters.safetensors").is_file()
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_folder_that_is_no_export_is_never_replaced(llama: Home, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("important")
    with pytest.raises(Conflict, match="no export"):
        llama.export("peft", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "important"


def test_an_interrupted_export_leaves_nothing(llama: Home, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export("one", "merged", tmp_path / "there/out", llama.catalog, llama.store, stop)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_replacement_that_fails_leaves_the_earlier_export_in_its_place(
    llama: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "there/out", Path.rename
    llama.export("peft", output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".draft-") and target == output:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageFailed, match="Input/output error"):
        llama.export("mlx", output, overwrite=True)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_replacement_that_was_killed_is_undone_by_the_next_export(llama: Home, tmp_path: Path) -> None:
    """A kill between the two renames leaves the earlier export aside."""
    output = tmp_path / "there/out"
    llama.export("peft", output)
    output.rename(output.with_name(".earlier-out"))
    with pytest.raises(Conflict, match="exists already"):
        llama.export("mlx", output)
    assert (output / "adapter_model.safetensors").is_file()
    llama.export("mlx", output, overwrite=True)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_anything_is_written(
    llama: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(StorageFailed, match="0 MiB free"):
        llama.export("merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "quantization", "param"),
    [
        ("onnx", None, "to"),
        ("peft", "Q8_0", "quantization"),
        ("gguf", "Q3_X", "quantization"),
        ("gguf", "", "quantization"),
    ],
)
def test_forms_that_there_are_not(llama: Home, tmp_path: Path, to: str, quantization: str | None, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llama.export(to, tmp_path / "out", quantization=quantization)
    assert caught.value.param == param


def test_a_damaged_or_missing_base_is_an_error(llama: Home, tmp_path: Path) -> None:
    file = llama.base / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(FortwoError):
        llama.export("merged", tmp_path / "out")
    llama.catalog.remove("tiny")
    with pytest.raises(FortwoError, match="no base model here"):
        llama.export("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gemma_whose_queries_llama_cpp_would_scale_otherwise_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path, "gemma2")
    with pytest.raises(UnsupportedModel, match="query_pre_attn_scalar = 256"):
        home.export("gguf", tmp_path / "out")


def test_a_network_that_gguf_is_not_written_for_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path, "olmo2")
    with pytest.raises(UnsupportedModel, match="Olmo2ForCausalLM"):
        home.export("gguf-lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()
