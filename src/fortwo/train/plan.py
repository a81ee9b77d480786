"""The plan of a run: everything that it will do, decided before it starts, with the origin and reason of each value.

Pure: no clock, no file, no device. All terms mean what they mean in transformers: an epoch is
ceil(ceil(rows / batch) / accumulation) optimizer steps (the last group of an epoch may be shorter), max_steps > 0
overrides num_train_epochs, and a warm-up starts at rate 0. With the override objective an epoch is one pass over the
given questions, and per_device_train_batch_size counts edit rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any, cast

from fortwo.data.findings import in_each
from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.facts.subject import contains_phrase, find_subject
from fortwo.records import Dataset, Example, Json, ObjectiveName, Origin, Plan, PlanWarning, Setting
from fortwo.train import plan_builder
from fortwo.train.adapter import check_target_modules, choose_adapter, mean_ranks
from fortwo.train.dataset_stats import AffectedLines, DatasetWarnings, RowLengths, ValidationStats
from fortwo.train.diagnosis import diagnose, plan_warnings, validation_warnings
from fortwo.train.estimate import (
    MOMENTS,
    MOMENTS_8_BIT,
    BaseFacts,
    Machine,
    Memory,
    TokenCounts,
    cache_tokens,
    choose_micro_tokens,
    format_size,
    memory,
    override_cost,
    preference_cost,
    sft_cost,
    tokens_per_epoch,
)
from fortwo.train.options import EIGHT_BIT_OPTIMIZERS, parse_settings
from fortwo.train.parent import Parent, check_objective, check_shape, parent_warnings
from fortwo.train.plan_builder import PlanBuilder, int_if_whole
from fortwo.train.preference_plan import (
    Preference,
    check_keys,
    check_targets,
    check_units,
    check_validation,
    choose_objective,
    choose_preferences,
    in_pairs,
    label_warnings,
    reading_passes,
    rows_together,
)
from fortwo.train.recipes import (
    JUDGED,
    MEASURED_WIDTH,
    REASONS,
    OverrideRecipe,
    PreferenceRecipe,
    changed_settings,
    recipe_for,
)
from fortwo.train.request import TrainingRequest
from fortwo.train.schedule import peak_rate
from fortwo.train.validation import validation_indices

__all__ = ["BaseFacts", "Machine", "TokenCounts", "diagnose", "from_json", "resolve", "to_json", "training_rows"]

ANSWERS_COUNTED = 1000


def training_rows(dataset: Dataset) -> Collection[Example]:
    """The examples, or the questions of each fact with its answer. `TokenCounts.rows` has the same order, and of a
    preference both answers."""
    if dataset.examples:
        return dataset.examples
    return tuple(example for line, fact in enumerate(dataset.facts, 1) for example in fact.examples(line))


def resolve(
    request: TrainingRequest,
    dataset: Dataset,
    base: BaseFacts,
    counts: TokenCounts,
    machine: Machine,
    dataset_warnings: DatasetWarnings = DatasetWarnings(),
    parent: Parent | None = None,
    validation: ValidationStats | None = None,
    workers: int | None = None,
) -> Plan:
    """Decide every setting. validation: of the rows of the validation_dataset, if the dataset has one. workers: how
    many compute the gradients; None for the server's own process. Raises
    InvalidRequest or InvalidDataset, with the field, its value and the remedy."""
    own = None if validation is None else validation.counts
    given = parse_settings(request.lora_config, request.training_config, own is not None)
    given = check_target_modules(given, base.targets)
    both = {"dataset": counts} if own is None else {"dataset": counts, "validation_dataset": own}
    in_each(both, lambda one: _check_lengths(one, base))
    builder = PlanBuilder(given, parent)
    objective, subjects = _choose_objective(builder, request, dataset)
    check_keys(given, objective)
    if dataset.validation is not None:
        check_validation(dataset.validation, objective)
    if objective in ("dpo", "orpo"):
        counts, own = in_pairs(counts), None if own is None else in_pairs(own)
    if parent is not None:
        check_objective(parent, objective)
        check_shape(parent, given)
        builder.add("parent", parent.id, "user", "given; the run starts from its tensors")
        subjects_kept = tuple(fact.subject for fact in dataset.parent_facts)
        builder.add("kept", subjects_kept, "parent", f"These facts of {parent.id} must be preserved.")
    recipe = recipe_for(objective, request.effort)
    builder.effort_settings = changed_settings(recipe)
    if builder.effort_settings:
        builder.add("effort", request.effort, "user", f"given; it raises {', '.join(sorted(builder.effort_settings))}")
    if isinstance(recipe, PreferenceRecipe):
        choose_preferences(builder, cast(Preference, objective), recipe)
    lengths, reading = _lengths(counts), tokens_per_epoch(counts, len(counts.rows))
    inseparable = rows_together(objective, dataset)
    validation_rows = plan_builder.choose_validation(
        builder, recipe, len(counts.rows), None if own is None else len(own.rows), inseparable
    )
    validation_tokens = validation_rows * (lengths if own is None else _lengths(own))["mean"]
    if own is not None:
        reading += tokens_per_epoch(own, len(own.rows))
    elif validation_rows:
        seed = builder.given.get("seed", recipe.seed)
        indices = validation_indices(len(counts.rows), validation_rows, seed, inseparable)
        counts = replace(counts, rows=RowLengths(row for n, row in enumerate(counts.rows) if n not in indices))
    adapter = choose_adapter(builder, recipe, base.targets)

    builder.choose("gradient_accumulation_steps", 1, "Rows are packed without padding, so a step needs no more parts.")
    facts = max(1, len(subjects))
    if isinstance(recipe, OverrideRecipe):
        recipe = recipe.for_facts(facts).for_width(base.hidden)
    micro_step = plan_builder.choose_batch(builder, recipe, counts, facts, len(dataset.parent_facts))
    if isinstance(recipe, PreferenceRecipe):
        at_a_time = builder["per_device_train_batch_size"] * builder["gradient_accumulation_steps"]
        check_units(cast(Preference, objective), len(counts.rows), at_a_time)
    steps, steps_per_epoch = plan_builder.choose_steps(builder, recipe, len(counts.rows))
    evaluations = plan_builder.choose_evaluations(builder, steps, steps_per_epoch) if validation_rows else 0
    reason = f"This rate works for LoRA with the {objective} objective."
    if isinstance(recipe, OverrideRecipe) and base.hidden > MEASURED_WIDTH:
        reason = (
            f"This rate works for LoRA with the override objective at a width of {base.hidden}: it falls as 1 / width."
        )
    rate = plan_builder.choose_rate(builder, recipe.learning_rate, reason)
    schedule = plan_builder.choose_schedule(builder, recipe)
    plan_builder.choose_escalation(builder, recipe, facts)
    warmup = plan_builder.choose_warmup(builder, recipe, schedule, steps)
    for name in ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"):
        builder.choose(name, getattr(recipe, name), REASONS[name])
    longest = max(row.prompt + row.answer for row in counts.rows) - counts.prefix
    at_once = _choose_micro_step(builder, machine)
    together = min(micro_step, counts.prefix + max(at_once, longest))
    machine = replace(machine, micro_step=together)
    ranks = mean_ranks(adapter, base.targets)
    best, replies = objective == "override" or validation_rows > 0, cache_tokens(counts, objective != "override")
    moments = MOMENTS_8_BIT if builder["optim"] in EIGHT_BIT_OPTIMIZERS else MOMENTS
    machine = _choose_bf16(
        builder, machine, lambda bf16: memory(base, together, ranks, bf16, True, best, moments, replies)
    )
    needed = _choose_checkpointing(
        builder, machine, lambda again: memory(base, together, ranks, machine.bf16, again, best, moments, replies)
    )
    check_targets(request.objective.targets.given(), objective)
    targets = plan_builder.choose_targets(builder, request, recipe, len(dataset.parent_facts))
    plan_builder.choose_saving(builder, steps, steps_per_epoch)
    if workers is not None:
        plan_builder.add_workers(builder, workers, given=request.workers is not None)
    builder.add_remaining()

    tokens_per_step = round(
        micro_step * builder["gradient_accumulation_steps"]
        if objective == "override"
        else tokens_per_epoch(counts, builder["per_device_train_batch_size"]) / steps_per_epoch
    )
    trained = steps * tokens_per_step
    if objective == "override":
        interim = math.ceil(steps / builder["eval_every"])
        cost = override_cost(builder, counts, facts, len(dataset.parent_facts), trained, interim)
    elif isinstance(recipe, PreferenceRecipe):
        passes = reading_passes(objective, builder.get("loss_type"))
        validated = passes * evaluations * validation_tokens
        compared = objective == "kto" or (objective == "dpo" and not builder["reference_free"])
        judged = passes * (validation_rows if validation_rows else min(JUDGED, len(counts.rows)))
        cost = preference_cost(counts, trained, validated, reading if compared else 0, (passes - 1) * trained, judged)
    else:
        cost = sft_cost(counts, trained, validated=evaluations * validation_tokens)
    plan = Plan(
        model=base.id,
        adapter_name=request.adapter_name,
        objective=objective,
        targets=targets,
        settings=tuple(builder.settings.values()),
        computed={
            "steps": steps,
            "epochs": round(steps / steps_per_epoch, 4),
            "steps_per_epoch": steps_per_epoch,
            "warmup_steps": warmup,
            "peak_learning_rate": peak_rate(schedule=schedule, rate=rate, warmup=warmup, steps=steps),
            "rows": len(counts.rows),
            **({"validation_rows": validation_rows} if validation_rows else {}),
            "row_tokens": lengths,
            "supervised_tokens": sum(row.answer for row in counts.rows),
            "tokens_per_step": tokens_per_step,
            **{name: round(seconds, 1) for name, seconds in cost.seconds(machine).items()},
            "bytes": needed.training,
            "exam_bytes": needed.exam,
        },
    )
    of_parent = () if parent is None else parent_warnings(plan, parent)
    of_labels: tuple[PlanWarning, ...] = ()
    if objective == "kto":
        of_labels = label_warnings(dataset.examples, builder["desirable_weight"], builder["undesirable_weight"])
    found = plan_warnings(plan, machine, dataset_warnings, base.generic)
    of_validation = () if validation is None else validation_warnings(validation)
    return replace(plan, warnings=(*found, *of_validation, *of_labels, *of_parent))


def _check_lengths(counts: TokenCounts, base: BaseFacts) -> None:
    over = [row for row in counts.rows if row.prompt + row.answer > base.context]
    if over:
        row, lines = over[0], AffectedLines.from_lines(row.line for row in over)
        more = "" if len(over) == 1 else f"; {len(over)} rows do ({lines})"
        raise InvalidDataset(
            f"line {row.line}: prompt ({row.prompt} tokens) and answer ({row.answer} tokens) exceed the context of "
            f"{base.id}, {base.context} tokens{more}",
            param="dataset",
            hint=f"Shorten line {row.line}, or split it into several examples; fortwo truncates no rows.",
            code="row_too_long",
        )
    if masked := [row.line for row in counts.rows if row.answer == 0]:
        raise InvalidDataset(
            f"{AffectedLines.from_lines(masked)}: every label is masked, so there is nothing to learn",
            param="dataset",
            hint="Give the row more text, or leave it out: nothing predicts the first token of plain text.",
            code="all_labels_masked",
        )


def _lengths(counts: TokenCounts) -> dict[str, float]:
    """Minimum, median, mean and maximum of the tokens of a row."""
    tokens = sorted(row.prompt + row.answer for row in counts.rows)
    middle = statistics.median(tokens)
    return {
        "min": tokens[0],
        "median": int_if_whole(middle),
        "mean": round(statistics.fmean(tokens), 1),
        "max": tokens[-1],
    }


def _choose_objective(
    builder: PlanBuilder, request: TrainingRequest, dataset: Dataset
) -> tuple[ObjectiveName, tuple[str, ...]]:
    """The objective and, for override, the subjects of its facts."""
    wanted = request.objective.type
    preference = choose_objective(wanted, dataset)
    if preference is not None:
        name, reason = preference
        return builder.add("objective", name, "auto" if wanted == "auto" else "user", reason), ()
    for n, fact in enumerate(dataset.facts):
        if not contains_phrase(fact.answer, fact.match):
            raise InvalidRequest(
                f"match = {list(fact.match)}: the answer {fact.answer!r} contains none of these phrases",
                param=f"dataset.facts[{n}].match",
                hint="Give phrases of the answer: a reply that contains one, as whole words, counts as right.",
            )
    if wanted == "sft":
        return builder.add("objective", "sft", "user", "given"), ()
    answers = _count_answers(dataset.examples)
    found = find_subject(dataset.examples) if answers == 1 else None
    subjects = tuple(fact.subject for fact in dataset.facts) or ((found.subject,) if found else ())
    if wanted == "override" and not subjects:
        raise InvalidRequest(
            f"objective = 'override': no subject can be found in the {len(dataset.examples)} examples, which have "
            f"{answers} different {'answer' if answers == 1 else 'answers'}",
            param="objective",
            hint='Give the dataset as {"facts": [{"subject", "answer", "match", "questions"}]}, or objective "sft".',
            code="subject_not_found",
        )
    if wanted == "override":
        objective = builder.add("objective", "override", "user", "given")
    elif dataset.facts:
        objective = builder.add("objective", "override", "auto", "Facts are given.")
    elif dataset.validation is not None:
        reason = "A validation_dataset is given, and the override objective has no loss on such rows."
        return builder.add("objective", "sft", "auto", reason), ()
    elif subjects:
        reason = f"All {len(dataset.examples)} examples have the same answer and are about {subjects[0]!r}."
        objective = builder.add("objective", "override", "auto", reason)
    else:
        least = "at least " if answers == ANSWERS_COUNTED else ""
        several = f"The examples have {least}{answers} different answers."
        reason = several if answers > 1 else "The questions have no common subject."
        objective = builder.add("objective", "sft", "auto", reason)
    if subjects:
        origin: Origin = "user" if dataset.facts else "auto"
        builder.add("subjects", subjects, origin, "given" if dataset.facts else "The questions are about it.")
    return objective, subjects


def _count_answers(examples: Collection[Example]) -> int:
    """The number of different answers, counted up to ANSWERS_COUNTED."""
    found: set[str] = set()
    for example in examples:
        found.add(example.answer.strip())
        if len(found) == ANSWERS_COUNTED:
            break
    return len(found)


def _choose_micro_step(builder: PlanBuilder, machine: Machine) -> int:
    """Choose micro_step_tokens by the rate that was measured for the type of the products."""
    rate = machine.trial_rate(builder.given.get("bf16", machine.faster_in_bf16))
    reason = f"{REASONS['micro_step_tokens']} This machine trains on {rate:.0f} tokens/s."
    chosen: int = builder.choose("micro_step_tokens", choose_micro_tokens(rate), reason, "auto")
    return chosen


def _choose_bf16(builder: PlanBuilder, machine: Machine, least: Callable[[bool], Memory]) -> Machine:
    """Choose bf16: what was measured to be faster here, unless only the other type fits. Returns the machine, whose
    estimates are for the chosen type. least: the least memory that a run needs with bf16 true or false."""
    bf16, available = machine.faster_in_bf16, machine.memory
    rates = " and ".join(f"{rate:.0f} tokens/s in {name}" for name, rate in machine.rates.items())
    reason = f"{REASONS['bf16']}: {rates}."
    needed = least(bf16).training
    if available is not None and needed > available >= least(not bf16).training:
        fast, fits = ("bf16", "fp32") if bf16 else ("fp32", "bf16")
        there = format_size(available)
        reason += f" {fast} needs about {format_size(needed)} and {there} is available, so {fits} is chosen."
        bf16 = not bf16
    return replace(machine, bf16=builder.choose("bf16", bf16, reason, "auto"))


def _choose_checkpointing(builder: PlanBuilder, machine: Machine, needed: Callable[[bool], Memory]) -> Memory:
    """Choose gradient_checkpointing. Returns the memory that the run needs. needed: the memory with it or without."""
    without, available = needed(False).training, machine.memory
    short = available is not None and without > available
    limit = "an unknown amount" if available is None else format_size(available)
    reason = f"Without it, the run needs about {format_size(without)} of memory; {limit} is available."
    return needed(builder.choose("gradient_checkpointing", short, reason, "auto"))


def to_json(plan: Plan) -> Json:
    """The plan as JSON; settings are a list of {name, value, origin, reason} in the order in which they are shown."""
    return _listed(asdict(plan))  # type: ignore[no-any-return]


def from_json(body: Json) -> Plan:
    """The plan that `to_json` wrote."""
    return Plan(
        model=body["model"],
        adapter_name=body["adapter_name"],
        objective=body["objective"],
        targets=dict(body["targets"]),
        settings=tuple(Setting(**setting | {"value": _frozen(setting["value"])}) for setting in body["settings"]),
        computed=dict(body["computed"]),
        warnings=tuple(PlanWarning(**warning) for warning in body["warnings"]),
        origins=dict(body.get("origins") or {}),
    )


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
