"""Configurations of other programs as training requests: what is taken, and that nothing is lost without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fortwo.errors import InvalidRequest
from fortwo.train.migration import Migration, migrate
from fortwo.train.options import parse_settings
from fortwo.train.request import TrainingRequest

AXOLOTL = """
base_model: acme/Depot-Base
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: rows/house.jsonl
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/house-lora
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
"""
LLAMA_FACTORY = """
model_name_or_path: acme/depot-base
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
overwrite_cache: true
output_dir: saves/depot/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
quux: 7
"""
TRL = """
model_name_or_path: nobody/knows
dataset_name: trl-lib/Capybara
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-4
max_length: 1024
packing: false
eval_strategy: steps
eval_steps: 100
warmup_steps: 5
warmup_ratio: 0.1
output_dir: Qwen2 LoRA!
"""


def migrated(text: str, name: str | None = None) -> Migration:
    found = migrate(
        yaml.safe_load(text), name, lambda named: ["depot-base"] if named.lower() == "acme/depot-base" else []
    )
    request = TrainingRequest.model_validate({"dataset": {"path": "x.jsonl"}} | found.request)
    parse_settings(request.lora_config, request.training_config)  # it is a request that can be planned
    return found


def left_out(found: Migration) -> dict[str, str]:
    return {one.key: one.why for one in found.left_out}


def test_pretraining_of_llama_factory_is_sft() -> None:
    assert migrate({"stage": "pt"}, "one", lambda _: []).request["objective"] == "sft"


def test_axolotl() -> None:
    found = migrated(AXOLOTL)
    assert found.request == {
        "adapter_name": "house-lora",
        "model": "depot-base",
        "dataset": {"path": "rows/house.jsonl"},
        "objective": "sft",
        "lora_config": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "training_config": {
            "validation_split": 0.1,
            "gradient_accumulation_steps": 4,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 4,
            "optim": "adamw_8bit",
            "lr_scheduler_type": "cosine",
            "learning_rate": 0.0002,
            "gradient_checkpointing": True,
            "warmup_steps": 10,
            "weight_decay": 0.0,
        },
    }
    why = left_out(found)
    assert set(why) == {
        *("load_in_4bit", "adapter", "sequence_len", "sample_packing", "pad_to_sequence_len"),
        *("bf16", "logging_steps", "flash_attention", "evals_per_epoch"),
    }
    assert "never cut" in why["sequence_len"]
    assert "FORTWO_WEIGHTS=nf4" in why["adapter"]
    assert "plan chooses" in why["bf16"]


def test_llama_factory() -> None:
    found = migrated(LLAMA_FACTORY, "depot")
    assert found.request["adapter_name"] == "depot"
    assert found.request["lora_config"] == {
        "r": 8,
        "target_modules": "all-linear",
    }
    assert found.request["training_config"] == {
        "save_steps": 500,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 0.0001,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "validation_split": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 500,
    }
    assert "dataset" not in found.request
    datasets = [one.value for one in found.left_out if one.key == "dataset"]
    assert datasets == ["identity", "alpaca_en_demo"]
    why = left_out(found)
    assert "one file" in why["dataset"]
    assert "no such setting" in why["quux"]
    assert "own chat template" in why["template"]
    assert "code" in why["trust_remote_code"]
    assert not {"stage", "do_train", "finetuning_type"} & set(why)


def test_trl_and_what_contradicts() -> None:
    found = migrated(TRL)
    assert found.request["adapter_name"] == "Qwen2-LoRA"
    assert found.request["lora_config"] == {"r": 32, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert found.request["training_config"] == {"learning_rate": 0.0002, "warmup_ratio": 0.1}
    why = left_out(found)
    assert "model" not in found.request
    assert "fortwo models add" in why["model_name_or_path"]
    assert "to_parquet" in why["dataset_name"]
    assert "contradict" in why["warmup_steps"]
    assert "validation_split" in why["eval_steps"]
    assert "packing" not in why


@pytest.mark.parametrize(
    ("text", "objective", "training"),
    [
        ("{rl: dpo, rl_beta: 0.2, dpo_label_smoothing: 0.1}", "dpo", {"beta": 0.2, "label_smoothing": 0.1}),
        ("{rl: ipo}", "dpo", {"loss_type": "ipo"}),
        (
            "{rl: kto, kto_desirable_weight: 0.5, kto_undesirable_weight: 1}",
            "kto",
            {"desirable_weight": 0.5, "undesirable_weight": 1},
        ),
        ("{rl: orpo, orpo_alpha: 0.3}", "orpo", {"beta": 0.3}),
        ("{stage: dpo, pref_beta: 0.1, pref_loss: sigmoid}", "dpo", {"beta": 0.1, "loss_type": "sigmoid"}),
        ("{stage: dpo, pref_beta: 0.1, pref_loss: orpo}", "orpo", {"beta": 0.1}),
        ("{stage: kto, pref_beta: 0.1, kto_chosen_weight: 2.0}", "kto", {"beta": 0.1, "desirable_weight": 2.0}),
        ("{beta: 0.1, loss_type: [sigmoid]}", "auto", {"beta": 0.1, "loss_type": "sigmoid"}),
        ("{stage: sft}", "sft", {}),
    ],
)
def test_training_on_preferences_becomes_its_objective(text: str, objective: str, training: dict[str, Any]) -> None:
    found = migrated(text)
    assert found.request["objective"] == objective
    assert found.request.get("training_config", {}) == training
    assert left_out(found) == {}


def test_what_means_nothing_to_the_objective_is_left_out() -> None:
    found = migrated("{rl: orpo, loss_type: ipo, kto_desirable_weight: 2, rl_beta: 0.2}")
    assert found.request["training_config"] == {"beta": 0.2}
    assert set(left_out(found)) == {"loss_type", "desirable_weight"}


@pytest.mark.parametrize("text", ["rl: grpo", "stage: ppo", "rl: simpo", "{stage: dpo, pref_loss: simpo}", "stage: rm"])
def test_training_on_rewards_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="does not support"):
        migrated(text)


def test_columns_with_other_names_are_told() -> None:
    found = migrated("datasets: [{path: a.jsonl, type: {field_instruction: q}, field_messages: turns}]")
    assert set(left_out(found)) == {"datasets.type", "datasets.field_messages"}


def run(home: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORTWO_")}
    return subprocess.run(
        [sys.executable, "-m", "fortwo", "migrate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"FORTWO_HOME": str(home)},
        timeout=60,
    )


def test_the_command_prints_the_request_alone(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(TRL.replace("nobody/knows", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    done = run(tmp_path, tmp_path / "a.yml", "--name", "mine")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert (request["adapter_name"], request["model"]) == ("mine", "smollm2-135m-instruct")
    assert "left out warmup_steps = 5" in done.stderr
    (tmp_path / "b.yml").write_text("a: [")
    assert "is not YAML" in " ".join(run(tmp_path, tmp_path / "b.yml").stderr.split())
    (tmp_path / "c.yml").write_text("- 1")
    assert "does not contain an object" in " ".join(run(tmp_path, tmp_path / "c.yml").stderr.split())
