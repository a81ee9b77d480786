"""Warnings about a plan before the run, and the diagnosis of a run that missed its targets. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fortwo.records import Plan, PlanWarning
from fortwo.train.dataset_stats import AffectedLines, DatasetWarnings, ValidationStats
from fortwo.train.estimate import Machine, format_duration, format_size
from fortwo.train.options import WITHOUT_WARMUP
from fortwo.train.recipes import OverrideRecipe, Recipe, recipe_for
from fortwo.train.retry_policy import NO_TIME

_REMEDIES = {
    "efficacy": "Train longer or at a higher rate: leave out max_steps and learning_rate, and the plan chooses them.",
    "paraphrase": "Give more questions with more varied wording, and the aliases of the subject.",
    "specificity": "Give the full subject, as people write it, so that similar subjects can be distinguished from it.",
    "retention": "Train with a lower learning_rate or a smaller r.",
    "accuracy": "Train longer or at a higher rate, give a smaller beta, or look for rows that contradict each other.",
} | dict.fromkeys(
    (f"kept_{name}" for name in ("efficacy", "paraphrase", "specificity")),
    "Teach the old and the new facts together: give all of them in one dataset, without a parent.",
)


NO_EFFECT = 1e-4  # limit for the entries of B; AdamW changes them by about the learning rate in each step


def plan_warnings(
    plan: Plan, machine: Machine, rows: DatasetWarnings = DatasetWarnings(), generic: bool = False
) -> tuple[PlanWarning, ...]:
    """Warnings that follow from the values of the plan and from its rows. generic: transformers computes the base's
    layers."""
    recipe, computed = recipe_for(plan.objective), plan.computed
    warnings = [
        _epochs_overridden(plan),
        _warmup_never_ends(plan, computed["steps"], "takes"),
        _rate_far_off(recipe, computed["peak_learning_rate"]),
        _few_rows(plan, recipe, computed["steps"]),
        _shared_subject(plan),
    ]
    if plan["use_dora"]:
        warnings.append(
            PlanWarning(
                "dora_is_slower",
                "a step with DoRA runs operation by operation and takes up to three times as long as the estimate, "
                "which is of plain LoRA",
                "Leave use_dora out if time matters.",
            )
        )
    if generic:
        warnings.append(
            PlanWarning(
                "generic_network",
                f"the layers of {plan.model} are computed by transformers, which is slower than fortwo's own decoder",
                "Choose a base of a family that docs/guide-bases.md lists for the own decoder, if time matters.",
            )
        )
    needed = max(computed["bytes"], computed["exam_bytes"])
    if machine.memory is not None and needed > machine.memory:
        warnings.append(
            PlanWarning(
                "memory",
                f"the run needs about {format_size(needed)} of memory, and {format_size(machine.memory)} are available",
                "Give a smaller per_device_train_batch_size and more gradient_accumulation_steps, or start the server "
                "with FORTWO_WEIGHTS=nf4.",
            )
        )
    return (*(warning for warning in warnings if warning), *dataset_warnings(rows))


def dataset_warnings(rows: DatasetWarnings) -> tuple[PlanWarning, ...]:
    """Warnings about rows that probably contain mistakes. These rows are trained on nevertheless."""
    found = {
        "duplicate_rows": (
            rows.duplicates,
            "the text is the same as in an earlier row, so that it counts more than once",
            "Remove them unless they are intended; fortwo drops no rows.",
        ),
        "contradicting_answers": (
            rows.contradictions,
            "the answer differs from that of an earlier row with the same prompt, so the model learns to guess",
            "Keep one answer for each prompt, or make the prompts different.",
        ),
        "foreign_template": (
            rows.foreign_templates,
            f"the text contains {rows.template!r}, which belongs to a chat template: it would be trained on as plain "
            "text, in addition to the model's own template",
            "Give only the conversation, as messages or as prompt and completion; fortwo adds the model's template.",
        ),
        "truncated_answers": (
            rows.truncated,
            "the answer ends within a word, at the same length as others: it looks truncated, and the model would "
            "learn to stop there",
            "Export the rows again with complete answers.",
        ),
    }
    return _of_rows(found)


def validation_warnings(stats: ValidationStats) -> tuple[PlanWarning, ...]:
    """Warnings about rows of the validation_dataset. These rows are evaluated nevertheless."""
    found = {
        "validation_rows_trained_on": (
            stats.trained,
            "the text is the same as in a row of dataset, so eval_loss does not show whether the model learned it by "
            "heart",
            "Remove them from dataset or from validation_dataset; fortwo drops no rows.",
        ),
        "validation_duplicate_rows": (
            stats.warnings.duplicates,
            "the text is the same as in an earlier row, so that it counts more than once in eval_loss",
            "Remove them unless they are intended; fortwo drops no rows.",
        ),
        "validation_foreign_template": (
            stats.warnings.foreign_templates,
            f"the text contains {stats.warnings.template!r}, which belongs to a chat template: eval_loss would count "
            "it as plain text, in addition to the model's own template",
            "Give only the conversation, as messages or as prompt and completion; fortwo adds the model's template.",
        ),
        "validation_truncated_answers": (
            stats.warnings.truncated,
            "the answer ends within a word, at the same length as others: it looks truncated",
            "Export the rows again with complete answers.",
        ),
    }
    return _of_rows(found, " of validation_dataset")


def _of_rows(found: Mapping[str, tuple[AffectedLines, str, str]], dataset: str = "") -> tuple[PlanWarning, ...]:
    """Those of these warnings that are about any rows. found: the rows, what is wrong, and the remedy, by code."""
    return tuple(
        PlanWarning(code, f"{lines.count} {'row' if lines.count == 1 else 'rows'}{dataset} ({lines}): {what}", hint)
        for code, (lines, what, hint) in found.items()
        if lines.count
    )


def diagnose(plan: Plan, actual: Mapping[str, Any]) -> tuple[PlanWarning, ...]:
    """Why a run missed its targets, the most likely cause first. actual: those that are known of steps,
    peak_learning_rate, first_loss, final_loss, largest_b, eval_loss, eval_losses, escalation, escalations and metrics
    (shares by name)."""
    recipe = recipe_for(plan.objective)
    steps = actual.get("steps", plan.computed["steps"])
    peak = actual.get("peak_learning_rate", plan.computed["peak_learning_rate"])
    findings = [
        _warmup_never_ends(plan, steps, "took"),
        _rate_far_off(recipe, peak),
        _few_rows(plan, recipe, steps),
        _loss_exploded(actual),
        _loss_unchanged(actual, 0.8 if plan.objective in ("sft", "override") else 0.99),
        _no_effect(actual),
        _overfitting(actual),
    ]
    metrics, missed = actual.get("metrics") or {}, False
    for name, target in plan.targets.items():
        reached = metrics.get(name)
        if reached is not None and reached < target:
            message = f"{name} is {reached:.2f}, below its target {target:.2f}"
            findings.append(PlanWarning(f"missed_{name}", message, _REMEDIES[name]))
            missed = True
    if missed:
        findings.append(_failed_escalation(actual))
    return tuple(finding for finding in findings if finding)


def _origin(plan: Plan, name: str) -> str:
    return next(setting.origin for setting in plan.settings if setting.name == name)


def _epochs_overridden(plan: Plan) -> PlanWarning | None:
    computed, steps, epochs = plan.computed, plan["max_steps"], plan["num_train_epochs"]
    if steps <= 0 or _origin(plan, "num_train_epochs") != "user":
        return None
    wanted = round(epochs * computed["steps_per_epoch"])
    per_step = computed["seconds"] / computed["steps"]
    return PlanWarning(
        "max_steps_overrides_epochs",
        f"max_steps = {steps:,} overrides num_train_epochs = {epochs:g}, which would be {wanted:,} steps: the run "
        f"takes up to {format_duration(steps * per_step)} instead of {format_duration(wanted * per_step)}",
        f"Leave out max_steps to train {epochs:g} epochs, or leave out num_train_epochs.",
    )


def _warmup_never_ends(plan: Plan, steps: int, verb: str) -> PlanWarning | None:
    warmup, rate = plan.computed["warmup_steps"], plan["learning_rate"]
    if steps > warmup or warmup == 0 or plan["lr_scheduler_type"] in WITHOUT_WARMUP:
        return None
    tense = "never ends" if verb == "takes" else "never ended"
    passes = "never passes" if verb == "takes" else "never passed"
    return PlanWarning(
        "warmup_never_ends",
        f"the warm-up {tense}: the run {verb} {steps} of {warmup} warm-up steps, so the learning rate {passes} "
        f"{_rate(rate * steps / warmup)}, although {_rate(rate)} is set",
        f"Leave out warmup_steps, or give at most {max(1, steps // 10)} for {steps} steps.",
    )


def _rate_far_off(recipe: Recipe, peak: float) -> PlanWarning | None:
    if recipe.lowest_rate <= peak <= recipe.highest_rate:
        return None
    low = peak < recipe.lowest_rate
    return PlanWarning(
        "rate_too_low" if low else "rate_too_high",
        f"the learning rate peaks at {_rate(peak)}, {'below' if low else 'above'} what works for LoRA "
        f"({_rate(recipe.lowest_rate)} to {_rate(recipe.highest_rate)})",
        f"Leave out learning_rate, or give {_rate(recipe.learning_rate)}"
        + (", with a warm-up that ends before the run does." if low else "."),
    )


def _few_rows(plan: Plan, recipe: Recipe, steps: int) -> PlanWarning | None:
    if not isinstance(recipe, OverrideRecipe):
        return None
    facts = len(plan["subjects"])
    rows = steps * plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"]
    recipe = recipe.for_facts(facts)
    usual = recipe.max_steps * recipe.edit_rows  # the plan's own choice
    if rows * 4 > usual:
        return None
    return PlanWarning(
        "few_rows",
        f"the {steps} steps train on only {rows} edit rows; the plan would use {usual} for "
        f"{'a fact' if facts == 1 else f'{facts} facts'}",
        "Leave out max_steps, num_train_epochs and per_device_train_batch_size, and the plan chooses them.",
    )


def _shared_subject(plan: Plan) -> PlanWarning | None:
    """Several facts have the same subject, so a question that names only the subject does not say which is meant."""
    if plan.objective != "override":
        return None
    subjects = [subject.casefold() for subject in plan["subjects"]]
    subject = next((one for one in subjects if subjects.count(one) > 1), None)
    if subject is None:
        return None
    numbers = [str(number) for number, one in enumerate(subjects, 1) if one == subject]
    return PlanWarning(
        "one_subject",
        f"facts {' and '.join(numbers)} are about {plan['subjects'][subjects.index(subject)]!r}: the model learns to "
        "answer with one or the other",
        "Give one fact whose answer contains everything, or give each fact a more precise subject.",
    )


def _loss_unchanged(actual: Mapping[str, Any], share: float) -> PlanWarning | None:
    """The loss ended at more than this share of its first value; losses of preferences fall little."""
    first, final = actual.get("first_loss"), actual.get("final_loss")
    if first is None or final is None or not share * first <= final <= max(first + 1, 1.5 * first):
        return None
    return PlanWarning(
        "loss_stood_still",
        f"the loss went from {first:.2f} to {final:.2f}: the adapter learned almost nothing",
        "Check whether the learning rate or the number of steps is too low.",
    )


def _loss_exploded(actual: Mapping[str, Any]) -> PlanWarning | None:
    """The loss ended well above its first value. If it becomes NaN or infinite, the run itself fails with nan_loss."""
    first, final = actual.get("first_loss"), actual.get("final_loss")
    if first is None or final is None or final <= max(first + 1, 1.5 * first):
        return None
    return PlanWarning(
        "loss_exploded",
        f"the loss rose from {first:.2f} to {final:.2f}: the run diverged",
        "Reduce learning_rate to a third, use a warm-up, and keep max_grad_norm at 1.",
    )


def _no_effect(actual: Mapping[str, Any]) -> PlanWarning | None:
    largest = actual.get("largest_b")
    if largest is None or largest >= NO_EFFECT:
        return None
    return PlanWarning(
        "b_near_zero",
        f"no entry of the adapter's B matrices is above {largest:.2g}: the adapter has almost no effect on the base",
        "Train more steps at a higher learning_rate, and check that the warm-up ends before the run does.",
    )


def _overfitting(actual: Mapping[str, Any]) -> PlanWarning | None:
    """On the validation rows, the published state is clearly worse than the best one was."""
    losses = [loss for _, loss in actual.get("eval_losses", ())]
    published = actual.get("eval_loss")
    if not losses or published is None or published <= 1.05 * min(losses):
        return None
    step = next(step for step, loss in actual["eval_losses"] if loss == min(losses))
    return PlanWarning(
        "overfitting",
        f"eval_loss was {min(losses):.2f} at step {step} but is {published:.2f} in the published adapter: the adapter "
        "overfits its training rows",
        "Give early_stopping_patience or load_best_model_at_end, fewer epochs, or more rows.",
    )


def _failed_escalation(actual: Mapping[str, Any]) -> PlanWarning | None:
    """The retry rounds did not help, or there was no time for them."""
    why, rounds = actual.get("escalation", "off"), actual.get("escalations", ())
    if why.startswith(NO_TIME):
        return PlanWarning("no_time_to_escalate", why, "Raise escalation_seconds, or use a faster machine.")
    if not rounds:
        return None
    raised = ", ".join(lever for one in rounds for lever in one.raised)
    return PlanWarning(
        "escalated_in_vain",
        f"after {rounds[0].step} steps the run continued for {sum(one.steps for one in rounds)} more with other "
        f"settings ({raised}), but the targets were still missed",
        'Train again with effort "max" or a larger r: the rank could not be changed during the run.',
    )


def _rate(rate: float) -> str:
    return f"{rate:.2g}".replace("e-0", "e-")
