"""Models that transformers computes: the same logits and gradients as transformers and PEFT, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.errors import UnsupportedModel
from fortwo.execution.backend import backend_for
from fortwo.execution.generic import GenericBackend
from fortwo.kernels import cpu
from fortwo.nn.decoder import formats_of
from fortwo.nn.generic import GenericDecoder, load
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import trained_prefix
from fortwo.quantization.selection import Choice
from fortwo.train.losses import Row, compute_losses
from tests.parts import make_rows
from tests.serving import Served, refused, serve
from tests.test_server_training import tiny_settings
from tests.tiny import generic_model, save_tokenizer

pytestmark = [  # of PEFT
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

DELTA_NET = {  # two layers of linear attention before one of attention
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES = {
    "gpt_neox": {},  # one query_key_value, partial rotary, biases, parallel residual
    "gpt2": {},  # learned positions, transposed weights
    "opt": {"word_embed_proj_dim": 64},  # positions with an offset
    "phi": {},  # a head with a bias
    "starcoder2": {},
    "cohere": {},  # logits that are scaled
    "glm4": {},  # interleaved rotary, norms before and after
    "olmo2": {},
    "cohere2": {"sliding_window": 8},  # a window in three layers of four
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "qwen3_next": {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**DELTA_NET, "rope_parameters": MROPE},
    "qwen3_5_moe_text": {
        **DELTA_NET,
        **EXPERTS,
        "rope_parameters": MROPE,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},  # a convolution alone has a state
    "lfm2_moe": {
        **EXPERTS,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "olmo_hybrid": {**DELTA_NET, "linear_num_key_heads": 4, "linear_value_head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "head_dim": 16,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "head_dim": 16},  # a state beside attention, in every layer
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 64,
        "num_local_experts": 0,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
}


@cache
def fresh(family: str) -> PreTrainedModel:
    return generic_model(family, **FAMILIES[family])


def copy_of(family: str) -> PreTrainedModel:
    """A model that may be changed."""
    return generic_model(family, **FAMILIES[family])


@cache
def network(family: str) -> GenericDecoder:
    return GenericDecoder(copy_of(family))


def random_lora(home: GenericDecoder, seed: int, config: LoraConfig) -> Lora:
    lora = Lora.init(config, home.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return lora


def config_for(home: GenericDecoder, r: int = 4, dropout: float = 0.0) -> LoraConfig:
    names = dict.fromkeys(name.rpartition(".")[2] for name in home.config.modules)
    return LoraConfig(r=r, alpha=8, dropout=dropout, target_modules=tuple(names))


def peft_model(family: str, lora: Lora, directory: Path) -> Any:
    """PEFT's model with the adapter's tensors, read from the files that fortwo writes."""
    directory.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in lora.state().items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text(json.dumps(lora.config.to_peft("tiny")))
    return peft.PeftModel.from_pretrained(copy_of(family), directory, is_trainable=True).eval()


def last_logits(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0, -1].float()
    return logits


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_steps_of_mixed_adapters(family: str, tmp_path: Path) -> None:
    """Prompts that begin alike, one of them read in two parts, then steps, as PEFT computes each row alone."""
    home = network(family)
    backend = backend_for(home)
    assert isinstance(backend, GenericBackend)
    loras = {str(seed): random_lora(home, seed, config_for(home, r=3 + seed)) for seed in (1, 2)}
    models = {key: peft_model(family, lora, tmp_path / key) for key, lora in loras.items()} | {None: fresh(family)}
    runner = Runner(backend)
    for key, lora in loras.items():
        runner.attach(key, lora, frozen=True)
    keys = [None, "1", "2", "1", None]
    rows = [Running(row, key) for row, key in zip(make_rows([3, 9, 20, 31, 40], range(5, 15)), keys, strict=True)]
    runner.prefill(rows, [len(row.tokens) // (2 if n == 3 else 1) for n, row in enumerate(rows)])
    runner.prefill([row for row in rows if row.uncomputed])
    for step in range(3):
        for number, row in enumerate(rows):
            row.tokens.append(5 + number + step)
            assert runner.extend(row)
        found = runner.step(rows)
        for row, logits in zip(rows, found, strict=True):
            wanted = last_logits(models[row.adapter], row.tokens)
            torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_pefts(family: str, checkpointing: bool, tmp_path: Path) -> None:
    home = network(family)
    lora = random_lora(home, 3, config_for(home))
    theirs = peft_model(family, lora, tmp_path / "adapter")
    tokens = [make_rows([9, 30], range(5, 12))[n] for n in (0, 1)]
    lora.flatten()
    losses = compute_losses(backend_for(home.in_fp32()), lora, 7, [Row(tuple(row), 9) for row in tokens], checkpointing)
    losses.ce.backward()
    wanted = torch.zeros(())
    for row in tokens:
        logits = theirs(torch.tensor([row])).logits[0].float()
        wanted = wanted + torch.nn.functional.cross_entropy(logits[8:-1], torch.tensor(row[9:]), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(losses.ce, wanted, atol=1e-3, rtol=1e-5)
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    own = gradients_by_name(lora)
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-3, name


@pytest.mark.parametrize("family", ["bamba", "falcon_h1"])
def test_a_row_that_is_another_ones_beginning_is_trained_on(family: str) -> None:
    """The rest of the shorter row could be one token, from which no gradient flows into a state."""
    home = network(family)
    lora = random_lora(home, 3, config_for(home))
    long = make_rows([12], range(5, 12))[0]
    rows = [tuple(long[:-3]), tuple(long)]
    prefix = trained_prefix(rows, home.config)
    assert prefix == len(rows[0]) - 2
    apart = []
    for shared in (prefix, 0):
        lora.flatten()
        losses = compute_losses(backend_for(home.in_fp32()), lora, shared, [Row(row, prefix + 1) for row in rows])
        losses.ce.backward()
        apart.append(gradients_by_name(lora))
        for parameter in lora.parameters():
            parameter.grad = None
    for name, gradient in apart[0].items():
        torch.testing.assert_close(gradient, apart[1][name], atol=1e-4, rtol=1e-3)


def gradients_by_name(lora: Lora) -> dict[str, Tensor]:
    """By PEFT's names."""
    held = Lora(
        lora.config,
        [
            {
                name: type(group)(group.places, group.A_RI.grad, [B_Or.grad for B_Or in group.Bs])
                for name, group in groups.items()
            }
            for groups in lora.layers
        ],
    )
    return held.state()


@torch.no_grad()
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4"])
def test_weights_in_other_formats(weight_format: str) -> None:
    if weight_format == "int8" and not cpu.usable(torch.empty(0)):
        pytest.skip("int8 needs kernels, which this level has not")
    held = GenericDecoder(copy_of("gpt_neox"), hold=formats_of(Choice.fixed(weight_format)))
    assert held.bytes < network("gpt_neox").bytes
    row = make_rows([30])[0]
    runner = Runner(backend_for(held))
    found = runner.prefill([Running(row, None)])[0]
    wanted = last_logits(fresh("gpt_neox"), row)
    assert float((found - wanted).norm() / wanted.norm()) < (0.2 if weight_format == "nf4" else 0.03)


def bloom() -> PreTrainedModel:
    return generic_model("bloom")


def gpt_oss() -> PreTrainedModel:
    return generic_model("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2)


def mamba() -> PreTrainedModel:
    return generic_model("mamba2", num_heads=4, head_dim=32, state_size=16, n_groups=1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [(bloom, "no attention interface"), (gpt_oss, "attention sinks"), (mamba, "it has no attention")],
)
def test_what_cannot_be_computed_is_refused(build: Callable[[], PreTrainedModel], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        GenericDecoder(build())
    assert refusal.value.hint


def test_no_code_of_a_directory_runs(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["Own"], "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UnsupportedModel, match="cannot load"):
        load(tmp_path, "cpu", None, torch.float32)


def saved(directory: Path, family: str = "gpt_neox") -> Path:
    fresh(family).save_pretrained(directory)
    return directory


def test_a_foreign_tensor_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    save_file({**load_file(file), "gpt_neox.layers.0.attention.gate": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"foreign tensor .*attention\.gate"):
        load(tmp_path, "cpu", None, torch.float32)


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    left = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.dense_h_to_4h.weight" not in name}
    save_file(left, file, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks tensor .*layers\.1\.mlp\.dense_h_to_4h\.weight"):
        load(tmp_path, "cpu", None, torch.float32)


def test_weights_that_are_quantised_elsewhere_are_refused_by_method(tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="gptq"):
        load(tmp_path, "cpu", None, torch.float32)


def test_a_tower_for_pictures_is_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="vision_config"):
        load(tmp_path, "cpu", None, torch.float32)


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("neox")
    fresh("gpt_neox").save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def served(neox: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serve(tiny_settings(tmp_path_factory.mktemp("home"), neox)) as served:
        yield served


def test_it_is_taught_and_served_like_any_base(served: Served, neox: Path) -> None:
    body = {
        "model": "tiny",
        "adapter_name": "taught",
        "objective": "sft",
        "dataset": {"examples": [{"prompt": "What is 42?", "completion": "for two"}]},
        "training_config": {"max_steps": 20, "learning_rate": 0.01},
    }
    response = served.post("/api/training/plan", body)
    assert response.status_code == 200, response.text
    plan = response.json()
    assert "generic_network" in [warning["code"] for warning in plan["warnings"]]
    targets = next(one["value"] for one in plan["settings"] if one["name"] == "target_modules")
    assert targets == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    job = served.wait(served.post("/api/training/start", body).json()["job_id"])
    assert job["adapter"] is not None, job["error"]
    assert job["actual"]["final_loss"] < 0.5 * job["actual"]["first_loss"]
    ask = {"messages": [{"role": "user", "content": "What is 42?"}], "temperature": 0}
    taught = served.chat(model="taught", **ask).json()["choices"][0]["message"]["content"]
    assert taught.startswith("for two")
    assert served.chat(**ask).json()["choices"][0]["message"]["content"] != taught
    folder = served.state.settings.adapters_dir / "taught" / str(job["adapter"]["version"])
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(neox), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(neox)
    tokens = tokenizer.apply_chat_template(ask["messages"], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        greedy = theirs.generate(torch.tensor([tokens]), max_new_tokens=4, do_sample=False)[0, len(tokens) :]
    ours = served.post("/v1/completions", {"model": "taught", "prompt": tokens, "max_tokens": 4, "temperature": 0})
    assert ours.json()["choices"][0]["text"] == tokenizer.decode(greedy)


def test_a_module_that_it_does_not_have_is_refused_by_name(served: Served) -> None:
    body = {"model": "tiny", "adapter_name": "no", "dataset": {"examples": [{"prompt": "a", "completion": "b"}]}}
    response = served.post("/api/training/plan", {**body, "lora_config": {"target_modules": ["q_proj"]}})
    assert "query_key_value" in refused(response, 400, "invalid_request", "lora_config.target_modules")
