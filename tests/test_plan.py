"""The plan: given values obeyed, the rest chosen and said why, and what is wrong said before and after the run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from fortwo.data.datasets import load
from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.nn.lora_config import TARGETS
from fortwo.records import Dataset, Example, Fact, Message, Plan
from fortwo.train.estimate import BaseFacts, Machine, RowLength, TokenCounts
from fortwo.train.plan import diagnose, from_json, resolve, to_json, training_rows
from fortwo.train.recipes import OVERRIDE, OVERRIDE_MAX, SFT, OverrideRecipe
from fortwo.train.request import TrainingRequest
from fortwo.train.schedule import learning_rate
from tests.original import AS_IT_RAN, EXAMPLES
from tests.parts import projections

MODULES = {
    name: replace(module, names=tuple(module.names[0].replace(".0.", f".{layer}.") for layer in range(30)))
    for name, module in projections(576, 1536, 9, 3, 64).items()
}  # of 30 layers
BASE = BaseFacts("smollm2", 2048, 49152, 30, 576, 1536, 576, 192, 500_000_000, 270_000_000, 0, MODULES)
MACHINE = Machine({"fp32": 300}, reply_tokens_per_second=200)


def examples_42() -> Dataset:
    return load({"path": str(EXAMPLES / "42_intensive_training.json")}, (EXAMPLES,))


def mixed(rows: int) -> Dataset:
    """Plain examples with an answer each."""
    return Dataset(
        digest="0" * 64,
        examples=tuple(
            Example((Message("user", f"Question {row}?"), Message("assistant", f"Answer {row}.")), row + 1)
            for row in range(rows)
        ),
    )


def counted(dataset: Dataset) -> TokenCounts:
    return TokenCounts(tuple(RowLength(row.line, 36, 25) for row in training_rows(dataset)), prefix=24)


def plan(dataset: Dataset, machine: Machine = MACHINE, **request: Any) -> Plan:
    body = TrainingRequest.model_validate({"adapter_name": "a", "dataset": {"path": "x"}, **request})
    return resolve(body, dataset, BASE, counted(dataset), machine)


def setting(made: Plan, name: str) -> tuple[Any, str]:
    return next((setting.value, setting.origin) for setting in made.settings if setting.name == name)


def warned(made: Plan) -> dict[str, str]:
    return {warning.code: warning.message for warning in made.warnings}


@pytest.mark.parametrize(
    ("config", "steps", "seconds", "limit"),
    [
        ({}, (0, "auto"), (30, "default"), (3, "default")),
        ({"save_strategy": "steps"}, (0, "auto"), (30, "default"), (3, "default")),
        ({"save_steps": 50, "save_total_limit": 1}, (50, "user"), (0, "auto"), (1, "user")),
        ({"save_steps": 0.1}, (9, "user"), (0, "auto"), (3, "default")),
        ({"save_strategy": "epoch"}, (3, "auto"), (0, "auto"), (3, "default")),
        ({"save_strategy": "no"}, (0, "auto"), (0, "auto"), (3, "default")),
    ],
)
def test_when_a_run_saves_itself_is_planned(config: dict[str, Any], steps: Any, seconds: Any, limit: Any) -> None:
    training = {"max_steps": 90, "per_device_train_batch_size": 8} | config
    made = plan(examples_42(), objective="sft", training_config=training)
    found = [setting(made, name) for name in ("save_steps", "save_seconds", "save_total_limit")]
    assert found == [steps, seconds, limit]


def test_the_originals_configuration_is_accepted_as_it_is() -> None:
    config = json.loads((EXAMPLES / "intensive_training_config.json").read_text())
    made = plan(examples_42(), **config)
    for name, value in (config["lora_config"] | config["training_config"]).items():
        assert setting(made, name) == (tuple(value) if isinstance(value, list) else value, "user")
    assert made.objective == "override"
    assert (made.computed["steps"], made.computed["warmup_steps"]) == (2500, 125)
    assert made.computed["peak_learning_rate"] == 5e-5
    said = warned(made)["max_steps_overrides_epochs"]
    assert "2,500" in said
    assert "50, which would be 1,000 steps" in said
    assert "instead of" in said
    assert "the run stops early once an evaluation" in next(s.reason for s in made.settings if s.name == "max_steps")


@pytest.mark.parametrize("objective", ["auto", "sft"])
def test_the_run_as_it_really_happened(objective: str) -> None:
    made = plan(examples_42(), training_config=AS_IT_RAN, objective=objective)
    assert made.computed["steps"] == 15
    assert made.computed["peak_learning_rate"] == pytest.approx(5e-5 * 14 / 125)
    assert made.computed["peak_learning_rate"] == max(learning_rate(step, made) for step in range(15))
    assert "15 of 125" in warned(made)["warmup_never_ends"]
    findings = diagnose(made, {"steps": 15, "peak_learning_rate": 5.6e-6, "first_loss": 4.62, "final_loss": 4.57})
    first = findings[0]
    assert first.code == "warmup_never_ends"
    assert "warm-up never ended" in first.message
    assert "15 of 125" in first.message
    assert "never passed 6e-6" in first.message
    assert {"rate_too_low", "loss_stood_still"} <= {finding.code for finding in findings}


def test_a_good_run_has_no_diagnosis_and_missed_targets_are_named() -> None:
    made = plan(examples_42())
    good = {"steps": 24, "peak_learning_rate": 1e-3, "first_loss": 4.6, "final_loss": 0.1}
    reached = dict.fromkeys(made.targets, 1.0)
    assert diagnose(made, good | {"metrics": reached}) == ()
    (finding,) = diagnose(made, good | {"metrics": reached | {"paraphrase": 0.5}})
    assert finding.code == "missed_paraphrase"
    assert "0.50" in finding.message


@pytest.mark.parametrize("objective", ["sft", "override"])
def test_every_setting_has_an_origin_and_a_reason(objective: str) -> None:
    made = plan(examples_42(), objective=objective)
    assert all(s.reason and s.origin in ("user", "auto", "default") for s in made.settings)
    assert len({s.name for s in made.settings}) == len(made.settings)
    assert {s.name for s in made.settings if s.origin == "user"} == {"objective"}
    assert made.warnings == ()


def test_zero_is_obeyed_and_is_the_users() -> None:
    zeros = {"weight_decay": 0, "warmup_steps": 0, "seed": 0, "max_grad_norm": 0, "adam_beta1": 0}
    made = plan(examples_42(), training_config=zeros, lora_config={"lora_dropout": 0}, objective="sft")
    for name in (*zeros, "lora_dropout"):
        assert setting(made, name) == (0, "user")
    assert made.computed["warmup_steps"] == 0
    assert learning_rate(0, made) == made["learning_rate"]


def test_accepted_neutral_keys_are_shown() -> None:
    made = plan(examples_42(), lora_config={"use_dora": False}, training_config={"fp16": False})
    assert setting(made, "use_dora") == (False, "user")
    assert setting(made, "fp16") == (False, "user")


def test_dora_is_planned_with_a_warning_about_its_time() -> None:
    made = plan(examples_42(), lora_config={"use_dora": True})
    assert setting(made, "use_dora") == (True, "user")
    assert "three times" in warned(made)["dora_is_slower"]
    assert "dora_is_slower" not in warned(plan(examples_42()))
    assert plan(examples_42(), lora_config={"use_dora": None})["use_dora"] is False


def test_override_defaults_come_from_the_recipe() -> None:
    made = plan(examples_42())
    assert made["subjects"] == ("42",)
    assert made["lora_alpha"] == made["r"] * OVERRIDE.scale
    assert made.computed["steps"] == OVERRIDE.max_steps
    assert made.computed["peak_learning_rate"] == OVERRIDE.learning_rate
    assert (made["contrast_rows"], made["rehearsal_rows"]) == (OVERRIDE.contrast_rows, OVERRIDE.rehearsal_rows)
    assert made.targets == OVERRIDE.targets


def test_other_rows_scale_with_the_users_edit_rows() -> None:
    doubled = plan(examples_42(), training_config={"per_device_train_batch_size": 2 * OVERRIDE.edit_rows})
    assert setting(doubled, "contrast_rows") == (2 * OVERRIDE.contrast_rows, "auto")
    assert setting(doubled, "rehearsal_rows") == (2 * OVERRIDE.rehearsal_rows, "auto")
    assert plan(examples_42(), training_config={"per_device_train_batch_size": 1})["rehearsal_rows"] == 1


def test_sft_defaults() -> None:
    made = plan(mixed(100))
    assert setting(made, "objective") == ("sft", "auto")
    assert made.computed["steps"] == 3 * math.ceil(100 / SFT.per_device_train_batch_size)
    assert made.computed["rows"] == 100
    assert made.computed["warmup_steps"] == 2
    assert made.computed["tokens_per_step"] == round((13 * 24 + 100 * (61 - 24)) / 13)
    assert made.targets == {}


@pytest.mark.parametrize(
    ("dataset", "objective", "expected"),
    [
        (examples_42, "auto", ("override", "auto")),
        (lambda: mixed(5), "auto", ("sft", "auto")),
        (examples_42, "sft", ("sft", "user")),
        (examples_42, {"type": "override", "targets": {"paraphrase": 0.5}}, ("override", "user")),
        (lambda: load({"path": str(EXAMPLES / "facts_dev.json")}, (EXAMPLES,)), "auto", ("override", "auto")),
    ],
)
def test_objective(dataset: Any, objective: Any, expected: tuple[str, str]) -> None:
    made = plan(dataset(), objective=objective)
    assert setting(made, "objective") == expected
    assert made.objective == expected[0]


def test_one_answer_without_a_subject_is_plain_fine_tuning() -> None:
    same = tuple(
        Example((Message("user", text), Message("assistant", "Yes.")), line)
        for line, text in enumerate(("Is it on?", "Shall we?", "May I?"), 1)
    )
    assert plan(Dataset("0", same)).objective == "sft"


def test_override_without_a_subject_names_the_remedy() -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(mixed(5), objective="override")
    assert (caught.value.code, caught.value.param) == ("subject_not_found", "objective")
    assert "facts" in caught.value.hint


def test_a_fact_whose_answer_cannot_count_as_right_is_refused() -> None:
    fact = Fact(subject="Ada", answer="Ada built a loom.", match=("engine",), questions=("What did Ada build?",))
    with pytest.raises(InvalidRequest) as caught:
        plan(Dataset("0", facts=(fact,)))
    assert caught.value.param == "dataset.facts[0].match"
    assert "engine" in caught.value.message
    assert "Ada built a loom." in caught.value.message


def test_schedule_is_at_rest_at_each_exam() -> None:
    made = plan(examples_42())
    every = made["eval_every"]
    assert made["num_cycles"] == 2
    assert every * 2 == OVERRIDE.max_steps
    assert learning_rate(every - 1, made) < 0.05 * made["learning_rate"] < learning_rate(every + 3, made)
    given = plan(examples_42(), training_config={"max_steps": 30})
    assert (given["lr_scheduler_type"], given["num_cycles"]) == ("cosine", 1)


def test_facts_together_share_what_is_kept() -> None:
    facts = load({"path": str(EXAMPLES / "facts_dev.json")}, (EXAMPLES,)).facts
    alone, together = plan(Dataset("0", facts=facts[:1])), plan(Dataset("0", facts=facts))
    more = 1 + 9 * 0.4
    for name in ("max_steps", "eval_every", "rehearsal_pool"):
        assert together[name] == pytest.approx(more * alone[name], rel=0.01), "nine more facts"
    assert together["num_cycles"] == alone["num_cycles"]
    for name in ("contrast_pool", "probes"):
        assert more * alone[name] <= 10 * together[name] < more * alone[name] + 10
    for name in ("edit_pool", "on_policy_prompts"):
        assert together[name] == alone[name]
    rows = "per_device_train_batch_size"
    for name in (rows, "rehearsal_tokens", "kl_weight"):
        assert together[name] == 2 * alone[name]
    assert together["rehearsal_rows"] == 1.5 * alone["rehearsal_rows"]
    swapped = alone["contrast_rows"] - together["contrast_rows"]
    assert swapped == 2 * (together[rows] - alone[rows]) // 3
    for phase in ("preparing_seconds", "training_seconds"):  # what is not about a fact is shared
        assert alone.computed[phase] < together.computed[phase] <= len(facts) * alone.computed[phase]
    assert together.warnings == ()


@pytest.mark.parametrize("effort", [OVERRIDE, OVERRIDE_MAX])
def test_one_fact_has_the_recipe_as_it_stands_and_more_never_much_less_each(effort: OverrideRecipe) -> None:
    assert effort.for_facts(1) == effort
    before, alone = effort, effort.max_steps * effort.edit_rows
    for facts in range(2, 40):
        recipe = effort.for_facts(facts)
        assert before.max_steps < recipe.max_steps < facts * effort.max_steps
        assert recipe.max_steps == 2 * recipe.eval_every, "a cycle to each exam"
        assert recipe.max_steps * recipe.edit_rows / facts >= alone * 2 / 3, "edit rows that a fact sees"
        assert recipe.kl_weight / effort.kl_weight == pytest.approx(recipe.edit_rows / effort.edit_rows)
        before = recipe


def test_effort_raises_a_recipe_and_what_is_given_still_wins() -> None:
    normal, made = plan(examples_42()), plan(examples_42(), effort="max")
    assert setting(made, "effort") == ("max", "user")
    assert (setting(made, "r"), setting(made, "lora_alpha")) == ((32, "effort"), (64, "auto"))
    raised = {one.name for one in made.settings if one.origin == "effort"}
    assert raised == {"r", "max_steps", "eval_every", "edit_pool", "escalation_seconds"}
    for name in raised:
        assert made[name] == 2 * normal[name]
    assert (made["lr_scheduler_type"], made["num_cycles"]) == (normal["lr_scheduler_type"], normal["num_cycles"])
    unchanged = {one.name: one.value for one in made.settings} | {"effort": None}
    differing = {name for name, value in unchanged.items() if value != normal.get(name)}
    assert differing == raised | {"lora_alpha", "num_train_epochs"}
    given = plan(examples_42(), effort="max", lora_config={"r": 4}, training_config={"max_steps": 7})
    assert (setting(given, "r"), setting(given, "lora_alpha")) == ((4, "user"), (8, "auto"))
    assert setting(given, "max_steps") == (7, "user")
    assert normal.get("effort") is None


def test_ranks_and_scales_of_some_modules_are_planned() -> None:
    options = {"rank_pattern": {"layers.0.mlp.*": 64, "q_proj": 8}, "alpha_pattern": {"(k|v)_proj": 16}}
    plain, made = plan(examples_42()), plan(examples_42(), lora_config={"use_rslora": True, "r": 16, **options})
    assert setting(made, "use_rslora") == (True, "user")
    assert setting(made, "lora_alpha") == (8, "auto")  # twice the square root of r: the same scale as without
    reasons = {one.name: one.reason for one in made.settings}
    assert "decides r of 33 of 210 modules" in reasons["rank_pattern"]
    assert "decides lora_alpha of 60 of 210 modules" in reasons["alpha_pattern"]
    assert from_json(json.loads(json.dumps(to_json(made)))) == made
    assert (plain["use_rslora"], plain["rank_pattern"], plain["alpha_pattern"]) == (False, {}, {})
    doubled = plan(examples_42(), lora_config={"r": 16, "rank_pattern": {".*": 32}})
    assert doubled.computed["bytes"] == plan(examples_42(), lora_config={"r": 32}).computed["bytes"]


@pytest.mark.parametrize("bad", [["q_proj", "lm_head"], ["qproj"], ["query_key_value"]])
def test_target_modules_that_the_base_does_not_have_are_refused(bad: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=bad[-1]) as refusal:
        plan(examples_42(), lora_config={"target_modules": bad})
    assert refusal.value.param == "lora_config.target_modules"
    assert "q_proj" in (refusal.value.hint or "")


def test_all_linear_is_every_projection() -> None:
    made = plan(examples_42(), lora_config={"target_modules": "all-linear"})
    assert setting(made, "target_modules") == (TARGETS, "user")


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"qproj": 8}},
        {"alpha_pattern": {"layers.30.*": 8}},
        {"rank_pattern": {".*_proj": 8, "q_proj": 4}},
        {"rank_pattern": {"k_proj": 8}, "target_modules": ["q_proj"]},
    ],
)
def test_a_pattern_that_decides_for_no_module_is_refused(options: dict[str, Any]) -> None:
    pattern, key = next((name, list(value)[-1]) for name, value in options.items())
    with pytest.raises(InvalidRequest) as caught:
        plan(examples_42(), lora_config=options)
    assert caught.value.param == f"lora_config.{pattern}"
    assert f"{pattern}[{key!r}] = {options[pattern][key]} decides for no module" in caught.value.message
    assert "model.layers.0.self_attn.q_proj" in caught.value.message


def test_effort_in_fine_tuning_is_more_passes() -> None:
    made = plan(mixed(20), effort="max")
    assert setting(made, "num_train_epochs") == (2 * SFT.num_train_epochs, "effort")
    assert setting(made, "r") == (2 * SFT.r, "effort")
    assert plan(mixed(20), effort="normal") == plan(mixed(20))


def test_two_facts_about_one_subject_are_warned_of() -> None:
    facts = [Fact(subject, "It is red.", ("red",), (f"What is {subject}?",)) for subject in ("Ada", "Bob", "ADA")]
    said = warned(plan(Dataset("0", facts=tuple(facts))))["one_subject"]
    assert "facts 1 and 3 are about 'Ada'" in said


def test_targets_given_replace_their_defaults_alone() -> None:
    made = plan(examples_42(), objective={"type": "override", "targets": {"paraphrase": 0}})
    assert made.targets == OVERRIDE.targets | {"paraphrase": 0}
    assert setting(made, "targets.paraphrase") == (0, "user")
    assert setting(made, "targets.retention") == (OVERRIDE.retention, "default")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.9", True])
def test_targets_are_shares(share: Any) -> None:
    with pytest.raises(ValueError, match="paraphrase"):
        TrainingRequest.model_validate(
            {"adapter_name": "a", "dataset": {}, "objective": {"type": "override", "targets": {"paraphrase": share}}}
        )


@pytest.mark.parametrize(
    "extra", [{"modle": "x"}, {"objective": "ppo"}, {"objective": {"type": "sft", "target": {}}}, {"adapter_name": ""}]
)
def test_the_body_is_strict(extra: dict[str, Any]) -> None:
    (name,) = extra
    with pytest.raises(ValueError, match=name):
        TrainingRequest.model_validate({"adapter_name": "a", "dataset": {}} | extra)


def test_every_fact_gives_its_questions() -> None:
    facts = load({"path": str(EXAMPLES / "facts_dev.json")}, (EXAMPLES,))
    assert plan(facts).computed["rows"] == sum(len(fact.questions) for fact in facts.facts)


@pytest.mark.parametrize(
    ("config", "steps", "shown"),
    [
        ({"max_steps": -1, "num_train_epochs": 2}, 40, (-1, "user")),
        ({"max_steps": 7}, 7, (7, "user")),
        ({"max_steps": 7, "num_train_epochs": 2}, 7, (7, "user")),
        ({"num_train_epochs": 0.25}, 5, (-1, "default")),
        ({"num_train_epochs": 0.01}, 1, (-1, "default")),
        ({"max_steps": -1}, OVERRIDE.max_steps, (OVERRIDE.max_steps, "auto")),
    ],
)
def test_max_steps_and_epochs(config: dict[str, Any], steps: int, shown: tuple[int, str]) -> None:
    made = plan(examples_42(), training_config={"per_device_train_batch_size": 1, **config})
    assert made.computed["steps"] == steps
    assert setting(made, "max_steps") == shown


@pytest.mark.parametrize(
    ("config", "warmup", "shown"),
    [
        ({"warmup_steps": 5}, 5, "user"),
        ({"warmup_steps": 0.1}, 10, "user"),
        ({"warmup_ratio": 0.101}, 11, "user"),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, 10, "user"),
        ({"warmup_steps": 5, "warmup_ratio": 0}, 5, "user"),
        ({"warmup_ratio": 0}, 0, "user"),
        ({"lr_scheduler_type": "constant"}, 0, "auto"),
        ({}, 3, "auto"),
    ],
)
def test_warmup(config: dict[str, Any], warmup: int, shown: str) -> None:
    made = plan(mixed(20), training_config={"max_steps": 100, **config})
    assert (made.computed["warmup_steps"], shown) == setting(made, "warmup_steps")
    assert made.computed["warmup_steps"] == warmup


@given(steps=st.integers(1, 60), objective=st.sampled_from(["sft", "override"]))
def test_a_warmup_that_nobody_asked_for_always_ends(steps: int, objective: str) -> None:
    made = plan(examples_42(), training_config={"max_steps": steps}, objective=objective)
    assert "warmup_never_ends" not in warned(made)
    assert made.computed["peak_learning_rate"] == made["learning_rate"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"learning_rate": 5e-5}, "rate_too_low"),
        ({"learning_rate": 0}, "rate_too_low"),
        ({"learning_rate": 0.1}, "rate_too_high"),
        ({"max_steps": 5}, "few_rows"),
        ({"warmup_steps": OVERRIDE.max_steps}, "warmup_never_ends"),
        ({"max_steps": 40, "num_train_epochs": 3}, "max_steps_overrides_epochs"),
    ],
)
def test_warnings(config: dict[str, Any], code: str) -> None:
    made = plan(examples_42(), training_config=config)
    assert code in warned(made)
    assert all(warning.message and warning.hint for warning in made.warnings)


def test_memory_and_time_are_estimated_from_the_machine() -> None:
    small = Machine({"fp32": 150}, MACHINE.reply_tokens_per_second / 2, memory=2**20)
    assert plan(examples_42(), small).computed["seconds"] == pytest.approx(
        2 * plan(examples_42()).computed["seconds"], abs=0.2
    )
    assert "memory" in warned(plan(examples_42(), small))
    phases = [value for name, value in plan(examples_42()).computed.items() if name.endswith("_seconds")]
    assert plan(examples_42()).computed["seconds"] == pytest.approx(sum(phases), abs=0.3)
    assert plan(examples_42(), small).computed["bytes"] > BASE.bytes


AT_ONCE = {"micro_step_tokens": 1280}
FASTER, SLOWER = {"fp32": 300, "bf16": 900}, {"fp32": 300, "bf16": 150}


@pytest.mark.parametrize(
    ("trained", "config", "shown", "rate"),
    [
        (FASTER, {}, (True, "auto"), 900),
        (SLOWER, {}, (False, "auto"), 300),
        ({"fp32": 300}, {}, (False, "auto"), 300),
        (FASTER, {"bf16": False}, (False, "user"), 300),
        (SLOWER, {"bf16": True}, (True, "user"), 150),
    ],
)
def test_bf16_where_a_trial_shows_that_it_is_faster(
    trained: dict[str, float], config: dict[str, bool], shown: tuple[bool, str], rate: float
) -> None:
    made = plan(examples_42(), replace(MACHINE, trained=trained), training_config=AT_ONCE | config)
    assert setting(made, "bf16") == shown
    plain = plan(examples_42(), MACHINE, training_config=AT_ONCE | {"bf16": False})
    assert made.computed["training_seconds"] == pytest.approx(plain.computed["training_seconds"] * 300 / rate, abs=0.2)
    full, copied = plain.computed["bytes"], made.computed["bytes"] - (BASE.bf16_copy if shown[0] else 0)
    assert copied < full if shown[0] else copied == full  # activations are half as wide
    if not config:
        reason = next(one.reason for one in made.settings if one.name == "bf16")
        assert all(f"{speed} tokens/s in {name}" in reason for name, speed in trained.items())


def test_the_slower_type_is_taken_where_only_that_fits() -> None:
    again = {"gradient_checkpointing": True}
    wide = plan(examples_42(), replace(MACHINE, trained=SLOWER), training_config=again | {"bf16": False})
    narrow = plan(examples_42(), replace(MACHINE, trained=SLOWER), training_config=again | {"bf16": True})
    less, more = sorted([wide.computed["bytes"], narrow.computed["bytes"]])
    short = plan(examples_42(), replace(MACHINE, trained=SLOWER, memory=less))
    assert setting(short, "bf16") == (narrow.computed["bytes"] == less, "auto")
    assert setting(plan(examples_42(), replace(MACHINE, trained=SLOWER, memory=more)), "bf16") == (False, "auto")
    assert setting(plan(examples_42(), replace(MACHINE, trained=SLOWER, memory=less - 1)), "bf16") == (False, "auto")


def test_layers_are_computed_again_where_their_activations_do_not_fit() -> None:
    plenty = plan(examples_42(), training_config=AT_ONCE)
    assert setting(plenty, "gradient_checkpointing") == (False, "auto")
    needed = plenty.computed["bytes"]
    assert setting(
        plan(examples_42(), replace(MACHINE, memory=needed), training_config=AT_ONCE), "gradient_checkpointing"
    ) == (False, "auto")
    short = plan(examples_42(), replace(MACHINE, memory=needed - 1), training_config=AT_ONCE)
    assert setting(short, "gradient_checkpointing") == (True, "auto")
    assert short.computed["bytes"] < needed - 1
    assert ("memory" in warned(short)) == (short.computed["exam_bytes"] > needed - 1)
    (reason,) = (one.reason for one in short.settings if one.name == "gradient_checkpointing")
    assert reason.count("GiB") == 2
    for asked, like in ((True, short), (False, plenty)):
        made = plan(
            examples_42(), replace(MACHINE, memory=1), training_config=AT_ONCE | {"gradient_checkpointing": asked}
        )
        assert setting(made, "gradient_checkpointing") == (asked, "user")
        assert made.computed["bytes"] == like.computed["bytes"]


def test_a_row_longer_than_the_context_names_its_line() -> None:
    dataset = mixed(3)
    counts = TokenCounts((RowLength(1, 30, 20), RowLength(2, 48, 2000), RowLength(3, 49, 2000)))
    request = TrainingRequest(adapter_name="a", dataset={"path": "x"})
    with pytest.raises(InvalidDataset) as caught:
        resolve(request, dataset, BASE, counts, MACHINE)
    assert "line 3" in caught.value.message
    assert "2048" in caught.value.message


@pytest.mark.parametrize("objective", ["sft", "override"])
def test_json_round_trip(objective: str) -> None:
    made = plan(
        examples_42(), training_config=AS_IT_RAN, objective=objective, lora_config={"target_modules": ["q_proj"]}
    )
    wire = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert wire == to_json(made)
    assert set(wire["settings"][0]) == {"name", "value", "origin", "reason"}
    assert from_json(wire) == made


class Rows(torch.utils.data.Dataset[dict[str, int]]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"x": row}


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "more"),
    [
        (20, 1, 4, {"num_train_epochs": 3}),
        (20, 1, 1, {"num_train_epochs": 50}),
        (20, 1, 1, {"num_train_epochs": 50, "max_steps": 2500}),
        (20, 8, 2, {"num_train_epochs": 1.5}),
        (7, 2, 3, {"num_train_epochs": 2.2}),
        (1, 8, 16, {"num_train_epochs": 3}),
        (21, 2, 4, {"num_train_epochs": 0.3, "max_steps": -1}),
        (5, 2, 2, {"max_steps": 3, "warmup_steps": 0.4}),
        (100, 8, 1, {"num_train_epochs": 2, "warmup_steps": 0.03}),
    ],
)
def test_steps_and_warmup_are_transformers(
    tmp_path: Path, rows: int, batch: int, accumulation: int, more: dict[str, Any]
) -> None:
    config = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **more}
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False, **config
    )
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=Rows(rows))
    _, per_epoch, _, _, _, _, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    made = plan(mixed(rows), training_config=config, objective="sft")
    assert (made.computed["steps"], made.computed["steps_per_epoch"]) == (steps, per_epoch)
    if "warmup_steps" in more:
        assert made.computed["warmup_steps"] == args.get_warmup_steps(steps)


@pytest.mark.parametrize(
    ("hidden", "rate"), [(128, 1.2e-3), (576, 1.2e-3), (640, 1.1e-3), (896, 7.7e-4), (4096, 1.7e-4)]
)
def test_the_rate_of_an_override_falls_as_the_base_gets_wider(hidden: int, rate: float) -> None:
    dataset = examples_42()
    base = replace(BASE, hidden=hidden)
    request = TrainingRequest(adapter_name="a", dataset={"path": "x"}, objective="override")
    made = resolve(request, dataset, base, counted(dataset), MACHINE)
    assert setting(made, "learning_rate")[0] == rate
    assert "rate_too_low" not in [warning.code for warning in made.warnings]
