"""lora_config and training_config: every key honoured or refused by name, never ignored."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from fortwo.errors import InvalidRequest
from fortwo.train.foreign_keys import FOREIGN_LORA, FOREIGN_TRAINING, LORA_ALIASES, TRAINING_ALIASES
from fortwo.train.options import (
    LORA_KEYS,
    LORA_REFUSED,
    OPTIMIZERS,
    TRAINING_KEYS,
    TRAINING_REFUSED,
    parse_lora_config,
    parse_settings,
    parse_training_config,
)


def refusal(read: Any, config: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(config)
    assert caught.value.hint
    return caught.value


def test_every_key_of_peft_and_transformers_is_known() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= {*LORA_KEYS, *LORA_REFUSED}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= {*TRAINING_KEYS, *TRAINING_REFUSED}
    assert not set(LORA_KEYS) & set(LORA_REFUSED)
    assert not set(TRAINING_KEYS) & set(TRAINING_REFUSED)


def test_optimizers_are_ones_that_exist() -> None:
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_a_plain_peft_config_is_accepted_as_it_is_written() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    del config["peft_version"]
    given = parse_lora_config(json.loads(json.dumps(config, default=sorted)))
    assert (given["r"], given["target_modules"], given["use_dora"]) == (4, ("q_proj",), False)


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        ({"learning_rat": 1e-3}, "learning_rate"),
        ({"lr": 1e-3}, "learning_rate"),
        ({"epochs": 3}, "num_train_epochs"),
        ({"warmup_step": 3}, "warmup_steps"),
        ({"batch_size": 3}, "per_device_train_batch_size"),
        ({"gradient_acumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"r": 8}, "lora_config"),
        ({"lora_rank": 8}, "lora_config"),
        ({"number_of_epochs": 3}, "num_train_epochs"),
        ({"n_steps": 3}, "max_steps"),
        ({"optimiser": "adamw_torch"}, "optim"),
        ({"grad_clip": 1.0}, "max_grad_norm"),
        ({"grad_accum": 2}, "gradient_accumulation_steps"),
        ({"test_size": 0.1}, "validation_split"),
        ({"patience": 3}, "early_stopping_patience"),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(config: dict[str, Any], nearest: str) -> None:
    error = refusal(parse_training_config, config)
    (key,) = config
    assert (error.code, error.param) == ("unknown_key", f"training_config.{key}")
    assert key in error.message
    assert nearest in error.hint


def test_a_training_key_in_lora_config_is_sent_home() -> None:
    assert "training_config" in refusal(parse_lora_config, {"learning_rate": 1e-3}).hint


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("lora_bias", True, "without biases"),
        ("init_lora_weights", "pissa", "PEFT"),
        ("init_lora_weights", "gaussian", "PEFT"),
        ("init_lora_weights", False, "PEFT"),
        ("modules_to_save", ["lm_head"], "target_modules"),
        ("layers_to_transform", [0], "target_modules"),
        ("use_qalora", 0, "without biases"),
    ],
)
def test_peft_keys_that_change_the_computation_are_refused(key: str, value: Any, remedy: str) -> None:
    error = refusal(parse_lora_config, {key: value})
    assert error.param == f"lora_config.{key}"
    assert repr(value) in error.message
    assert remedy in error.hint


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("fp16", True, "bf16"),
        ("save_strategy", "best", "epoch"),
        ("deepspeed", "ds.json", "one process"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "gradient_checkpointing"),
        ("eval_on_start", True, "validation_split"),
        ("output_dir", "out", "adapter_name"),
        ("logging_steps", 10, "events"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, "lr_scheduler_type"),
        ("optim", "paged_adamw_8bit", "adamw_8bit"),
        ("lr_scheduler_type", "cosine_with_min_lr", "cosine"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "linear"),
    ],
)
def test_training_arguments_that_cannot_be_honoured_are_refused(key: str, value: Any, remedy: str) -> None:
    error = refusal(parse_training_config, {key: value})
    assert error.param == f"training_config.{key}"
    assert repr(value) in error.message
    assert remedy in error.hint


def test_refused_keys_may_ask_for_what_happens_anyway() -> None:
    given = {"fp16": False, "deepspeed": None, "report_to": "none", "eval_strategy": "no", "label_smoothing_factor": 0}
    assert parse_training_config(given) == given


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("read", "section", "key", "value"),
    [
        *(
            (parse_training_config, "training_config", "learning_rate", bad)
            for bad in (-1e-4, NAN, INF, "5e-5", True, None, [])
        ),
        *(
            (parse_training_config, "training_config", "num_train_epochs", bad)
            for bad in (0, -1, NAN, "3", True, 10**400)
        ),
        *(
            (parse_training_config, "training_config", "max_steps", bad)
            for bad in (0, -2, 1.5, "10", True, None, 10**400)
        ),
        *((parse_training_config, "training_config", "per_device_train_batch_size", bad) for bad in (0, -1, 2.0, True)),
        *(
            (parse_training_config, "training_config", "gradient_accumulation_steps", bad)
            for bad in (0, -4, "4", False)
        ),
        *((parse_training_config, "training_config", "warmup_steps", bad) for bad in (-1, 2.5, NAN, True, "3")),
        *((parse_training_config, "training_config", "warmup_ratio", bad) for bad in (-0.1, 1.1, NAN, True)),
        *((parse_training_config, "training_config", "adam_beta2", bad) for bad in (1.0, -0.1, "0.9")),
        *((parse_training_config, "training_config", "weight_decay", bad) for bad in (-0.1, INF, False)),
        *((parse_training_config, "training_config", "seed", bad) for bad in (-1, 2**32, 1.0, True)),
        *((parse_training_config, "training_config", "lr_scheduler_type", bad) for bad in ("Cosine", "", None, 3, [])),
        *((parse_training_config, "training_config", "bf16", bad) for bad in (1, "true", None)),
        *((parse_training_config, "training_config", "save_steps", bad) for bad in (0, -1, 2.5, NAN, True, "10", None)),
        *((parse_training_config, "training_config", "save_total_limit", bad) for bad in (0, -1, 1.5, True, "3")),
        *((parse_lora_config, "lora_config", "r", bad) for bad in (0, -8, 8.0, "8", True)),
        *((parse_lora_config, "lora_config", "lora_alpha", bad) for bad in (0, -1, NAN, True)),
        *((parse_lora_config, "lora_config", "lora_dropout", bad) for bad in (1.0, -0.1, NAN, "0")),
        *((parse_lora_config, "lora_config", "bias", bad) for bad in ("all", None)),
        *((parse_lora_config, "lora_config", "task_type", bad) for bad in ("SEQ_CLS", None)),
        *((parse_lora_config, "lora_config", "use_rslora", bad) for bad in (1, "true", None)),
        *((parse_lora_config, "lora_config", "use_dora", bad) for bad in (0, "true")),
        *((parse_lora_config, "lora_config", "rank_pattern", bad) for bad in ([], "q_proj", 8)),
    ],
)
def test_bad_values_name_field_value_and_remedy(read: Any, section: str, key: str, value: Any) -> None:
    error = refusal(read, {key: value})
    assert error.param == f"{section}.{key}"
    assert error.message.startswith(f"{section}.{key} = ")
    shown = error.message.removeprefix(f"{section}.{key} = ")
    assert shown.startswith(repr(value)[:10])


@pytest.mark.parametrize("bad", [[], "q_proj", [None], [3], [""], {"q_proj": 1}, None])
def test_target_modules_that_are_no_names_are_refused(bad: Any) -> None:
    error = refusal(parse_lora_config, {"target_modules": bad})
    assert error.param == "lora_config.target_modules"
    assert "q_proj" in error.hint


@pytest.mark.parametrize(
    ("pattern", "value", "said"),
    [
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] = 0 is not a whole number"),
        ("rank_pattern", {"v_proj": 8, "q_proj": 1.5}, "rank_pattern['q_proj'] = 1.5 is not a whole number"),
        ("rank_pattern", {"q_proj": True}, "rank_pattern['q_proj'] = True is not"),
        ("alpha_pattern", {"q_proj": 0}, "alpha_pattern['q_proj'] = 0 is not a number above 0"),
        ("alpha_pattern", {"q_proj": None}, "alpha_pattern['q_proj'] = None is not"),
        ("rank_pattern", {"q_proj(": 8}, "rank_pattern = 'q_proj(' is not a regular expression"),
        ("rank_pattern", {"(?!q)_proj": 8}, "RE2's syntax: no look-around"),
        ("rank_pattern", {r"(q)\1": 8}, "RE2's syntax: no look-around"),
        ("rank_pattern", {"\udc00": 8}, "surrogate"),
    ],
)
def test_patterns_name_the_entry_that_is_wrong(pattern: str, value: Any, said: str) -> None:
    error = refusal(parse_lora_config, {pattern: value})
    assert error.param.startswith(f"lora_config.{pattern}")
    assert said in error.message


def test_patterns_have_a_bounded_length_and_number_of_keys() -> None:
    long, many = {"q" * 1001: 8}, {f"q{n}": 8 for n in range(1001)}
    assert (
        "it has 1001 characters, at most 1000 are allowed" in refusal(parse_lora_config, {"rank_pattern": long}).message
    )
    assert "has 1001 keys, at most 1000 are allowed" in refusal(parse_lora_config, {"rank_pattern": many}).message


def test_patterns_are_read_as_peft_writes_them() -> None:
    given = {"rank_pattern": {"^model.layers.0.*": 4, "q_proj": 8}, "alpha_pattern": {"q_proj": 0.5}}
    assert parse_lora_config(given) == given
    assert parse_lora_config({"rank_pattern": None, "alpha_pattern": {}}) == {"rank_pattern": {}, "alpha_pattern": {}}


@pytest.mark.parametrize(
    ("config", "other"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "lr_scheduler_type"),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, "lr_scheduler_type"),
        ({"save_steps": 10, "save_strategy": "no"}, "save_strategy"),
        ({"save_steps": 10, "save_strategy": "epoch"}, "save_strategy"),
    ],
)
def test_contradictions_name_both_keys(config: dict[str, Any], other: str) -> None:
    error = refusal(parse_training_config, config)
    assert error.param.split(".")[1] in config
    assert error.param in error.message
    assert other in error.message


def test_polynomial_needs_a_rate_above_its_end() -> None:
    error = refusal(parse_training_config, {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7})
    assert error.param == "training_config.learning_rate"


def test_zero_is_a_value() -> None:
    zeros = {"warmup_steps": 0, "warmup_ratio": 0, "weight_decay": 0, "seed": 0, "max_grad_norm": 0, "adam_beta1": 0}
    assert parse_training_config(zeros) == zeros
    assert parse_lora_config({"lora_dropout": 0}) == {"lora_dropout": 0}


# ---------------------------------------------------------------- other programs' keys

SFT_CONFIG = (
    "model_init_kwargs trust_remote_code chat_template_path dataset_text_field dataset_kwargs dataset_num_proc "
    "eos_token pad_token max_length max_seq_length shuffle_dataset packing packing_strategy padding_free "
    "pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss activation_offloading "
    "dataset_batch_size num_of_sequences chars_per_token use_liger"
).split()  # what TRL's SFTConfig adds to TrainingArguments, of its older versions too


def test_a_key_of_another_program_is_read_or_has_an_answer_but_not_both() -> None:
    assert set(SFT_CONFIG) <= {*FOREIGN_TRAINING, *TRAINING_REFUSED}
    assert set(TRAINING_ALIASES.values()) <= set(TRAINING_KEYS)
    assert set(LORA_ALIASES.values()) <= set(LORA_KEYS)
    for aliases, foreign, own in (
        (TRAINING_ALIASES, {*FOREIGN_TRAINING, *TRAINING_REFUSED}, TRAINING_KEYS),
        (LORA_ALIASES, {*FOREIGN_LORA, *LORA_REFUSED}, LORA_KEYS),
    ):
        assert not foreign & {*aliases, *own}
        assert not set(aliases) & set(own)


def test_other_names_of_a_setting_are_read() -> None:
    assert parse_lora_config({"lora_r": 4, "lora_target": "q_proj,v_proj"}) == {
        "r": 4,
        "target_modules": ("q_proj", "v_proj"),
    }
    assert parse_lora_config({"lora_target": "all", "lora_rank": None}) == {"target_modules": "all-linear"}
    given = {
        "micro_batch_size": 2,
        "num_epochs": 1,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "val_size": 0.1,
    }
    assert parse_training_config(given | {"evaluation_strategy": "epoch", "use_gradient_checkpointing": "unsloth"}) == {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "validation_split": 0.1,
        "eval_strategy": "epoch",
        "gradient_checkpointing": True,
    }
    error = refusal(parse_training_config, {"num_epochs": 1, "num_train_epochs": 2})
    assert "num_train_epochs = 2 and training_config.num_epochs mean the same" in error.message
    assert "training_config.micro_batch_size = 0" in refusal(parse_training_config, {"micro_batch_size": 0}).message


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("max_seq_length", 2048, "never cut"),
        ("max_length", 1024, "never cut"),
        ("cutoff_len", 1024, "never cut"),
        ("packing", True, "always packed"),
        ("sample_packing", True, "always packed"),
        ("dataset_text_field", "text", "keys of a row"),
        ("completion_only_loss", True, "assistant's turns"),
        ("assistant_only_loss", True, "assistant's turns"),
        ("train_on_inputs", True, "assistant's turns"),
        ("load_in_4bit", True, "FORTWO_WEIGHTS"),
        ("template", "qwen", "own chat template"),
        ("flash_attention", True, "own kernels"),
        ("rl", "dpo", "`objective`"),
        ("ref_model", "x/y", "reference"),
        ("simpo_gamma", 0.5, "none with a reward model"),
        ("use_weighting", True, "loss_type alone"),
        ("wandb_project", "x", "events"),
        ("base_model", "x/y", "`model`"),
    ],
)
def test_a_key_of_another_program_has_our_own_answer(key: str, value: Any, answer: str) -> None:
    error = refusal(parse_training_config, {key: value})
    assert error.param == f"training_config.{key}"
    assert answer in error.hint
    assert "Did you mean" not in error.hint


def test_all_findings_come_in_one_answer() -> None:
    given = {
        "output_dir": "out",
        "logging_steps": 10,
        "report_to": ["none"],
        "evaluation_strategy": "epoch",
        "fp16": True,
        "optim": "paged_adamw_8bit",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "gradient_checkpointing": "unsloth",
        "save_strategy": "best",
        "learning_rate": "2e-4",
    }
    with pytest.raises(InvalidRequest) as caught:
        parse_settings({"r": 0, "made_up": 1}, given)
    wrong = {"lora_config.r", "lora_config.made_up"} | {f"training_config.{key}" for key in given} - {
        "training_config.report_to"
    }
    wrong = wrong - {"training_config.evaluation_strategy"} | {"training_config.eval_strategy"}
    assert [key for key in wrong if key not in caught.value.message] == []
    assert "report_to" not in caught.value.message
    assert "without quotes: 0.0002" in str(caught.value.hint)
    assert caught.value.param == "lora_config.r"


def test_what_is_meant_by_nothing_is_not_guessed() -> None:
    assert "Did you mean" not in refusal(parse_training_config, {"zebra": 1}).hint
