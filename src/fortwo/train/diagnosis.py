"""What is wrong with a run, in words: foreseen from its plan, and diagnosed once it missed its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fortwo.records import Plan, PlanWarning
from fortwo.train.escalation import NO_TIME
from fortwo.train.estimate import Machine, duration, size
from fortwo.train.options import WITHOUT_WARMUP
from fortwo.train.recipes import OverrideRecipe, Recipe, recipe_of
from fortwo.train.survey import Suspicions

_REMEDIES = {
    "efficacy": "Train longer or at a higher rate: leave max_steps and learning_rate to the plan.",
    "paraphrase": "Give more and more varied questions, and the subject's aliases.",
    "specificity": "Give the fact's subject in full, as people write it, so that its siblings can be told from it.",
    "retention": "Train with a lower learning_rate or a smaller r.",
} | dict.fromkeys(
    (f"kept_{name}" for name in ("efficacy", "paraphrase", "specificity")),
    "Teach the old facts and the new ones together, without a parent: give all of them in one dataset.",
)


NO_EFFECT = 1e-4  # an entry of B; AdamW moves it by about the learning rate a step


def foresee(plan: Plan, machine: Machine, suspicions: Suspicions = Suspicions()) -> tuple[PlanWarning, ...]:
    """What the plan's own figures and its rows say against it."""
    recipe, computed = recipe_of(plan.objective), plan.computed
    warnings = [
        _epochs_overridden(plan),
        _warmup_never_ends(plan, computed["steps"], "takes"),
        _rate_far_off(recipe, computed["peak_learning_rate"]),
        _few_rows(plan, recipe, computed["steps"]),
        _one_subject(plan),
    ]
    needed = max(computed["bytes"], computed["exam_bytes"])
    if machine.memory is not None and needed > machine.memory:
        warnings.append(
            PlanWarning(
                "memory",
                f"the run needs about {size(needed)}; {size(machine.memory)} are there",
                "Give a smaller per_device_train_batch_size and more gradient_accumulation_steps, or start the server "
                "with FORTWO_WEIGHTS=nf4.",
            )
        )
    return (*(warning for warning in warnings if warning), *suspect(suspicions))


def suspect(rows: Suspicions) -> tuple[PlanWarning, ...]:
    """What the rows themselves say against the run. All of them are trained on all the same."""
    found = {
        "duplicate_rows": (
            rows.repeats,
            "say what an earlier row says, word for word, and weigh double",
            "Remove them, unless that is meant: no row is dropped in silence.",
        ),
        "contradicting_answers": (
            rows.contradictions,
            "answer a prompt otherwise than an earlier row with the same prompt: the model learns to guess",
            "Keep one answer to a prompt, or make the prompts say what differs.",
        ),
        "foreign_template": (
            rows.templates,
            f"hold {rows.template!r}, which is a chat template's own text: here it is trained on as characters, and "
            "serving writes its own template around them",
            "Give the bare conversation as messages or prompt and completion; the model's template is added here.",
        ),
        "truncated_answers": (
            rows.cut,
            "end in mid-word at the same length: their answers look cut off, and the model learns to stop there",
            "Export the rows again with whole answers.",
        ),
    }
    return tuple(
        PlanWarning(code, f"{lines.count} {'row' if lines.count == 1 else 'rows'} ({lines}) {what}", hint)
        for code, (lines, what, hint) in found.items()
        if lines.count
    )


def diagnose(plan: Plan, actual: Mapping[str, Any]) -> tuple[PlanWarning, ...]:
    """Why a run missed its targets, likeliest cause first. `actual` holds what is known of steps, peak_learning_rate,
    first_loss, final_loss, largest_b, eval_loss, eval_losses, escalation, escalations and metrics (shares by name)."""
    recipe = recipe_of(plan.objective)
    steps = actual.get("steps", plan.computed["steps"])
    peak = actual.get("peak_learning_rate", plan.computed["peak_learning_rate"])
    findings = [
        _warmup_never_ends(plan, steps, "took"),
        _rate_far_off(recipe, peak),
        _few_rows(plan, recipe, steps),
        _loss_exploded(actual),
        _loss_stood_still(actual),
        _no_effect(actual),
        _learned_by_heart(actual),
    ]
    metrics, missed = actual.get("metrics") or {}, False
    for name, target in plan.targets.items():
        reached = metrics.get(name)
        if reached is not None and reached < target:
            message = f"{name} is {reached:.2f}, below its target {target:.2f}"
            findings.append(PlanWarning(f"missed_{name}", message, _REMEDIES[name]))
            missed = True
    if missed:
        findings.append(_escalated(actual))
    return tuple(finding for finding in findings if finding)


def _origin(plan: Plan, name: str) -> str:
    return next(setting.origin for setting in plan.settings if setting.name == name)


def _epochs_overridden(plan: Plan) -> PlanWarning | None:
    computed, steps, epochs = plan.computed, plan["max_steps"], plan["num_train_epochs"]
    if steps <= 0 or _origin(plan, "num_train_epochs") != "user":
        return None
    asked = round(epochs * computed["steps_per_epoch"])
    each = computed["seconds"] / computed["steps"]
    return PlanWarning(
        "max_steps_overrides_epochs",
        f"max_steps = {steps:,} overrides num_train_epochs = {epochs:g}, which would be {asked:,} steps: up to "
        f"{duration(steps * each)} instead of {duration(asked * each)}",
        f"Leave max_steps out to train {epochs:g} epochs, or num_train_epochs to say what you mean.",
    )


def _warmup_never_ends(plan: Plan, steps: int, verb: str) -> PlanWarning | None:
    warmup, rate = plan.computed["warmup_steps"], plan["learning_rate"]
    if steps > warmup or warmup == 0 or plan["lr_scheduler_type"] in WITHOUT_WARMUP:
        return None
    tense = "never ends" if verb == "takes" else "never ended"
    passes = "never passes" if verb == "takes" else "never passed"
    return PlanWarning(
        "warmup_never_ends",
        f"warm-up {tense}: the run {verb} {steps} of {warmup} warm-up steps, so the learning rate {passes} "
        f"{_rate(rate * steps / warmup)} of {_rate(rate)}",
        f"Leave warmup_steps out, or give at most {max(1, steps // 10)} for {steps} steps.",
    )


def _rate_far_off(recipe: Recipe, peak: float) -> PlanWarning | None:
    if recipe.lowest_rate <= peak <= recipe.highest_rate:
        return None
    low = peak < recipe.lowest_rate
    return PlanWarning(
        "rate_too_low" if low else "rate_too_high",
        f"the learning rate peaks at {_rate(peak)}, {'below' if low else 'above'} what works for LoRA "
        f"({_rate(recipe.lowest_rate)} to {_rate(recipe.highest_rate)})",
        f"Leave learning_rate out, or give {_rate(recipe.learning_rate)}"
        + (", with a warm-up that ends." if low else "."),
    )


def _few_rows(plan: Plan, recipe: Recipe, steps: int) -> PlanWarning | None:
    if not isinstance(recipe, OverrideRecipe):
        return None
    facts = len(plan["subjects"])
    rows = steps * plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"]
    recipe = recipe.for_facts(facts)
    usual = recipe.max_steps * recipe.edit_rows
    if rows * 4 > usual:
        return None
    return PlanWarning(
        "few_rows",
        f"{steps} steps see {rows} edit rows; {usual} teach {'a fact' if facts == 1 else f'{facts} facts'}",
        "Leave max_steps, num_train_epochs and per_device_train_batch_size to the plan.",
    )


def _one_subject(plan: Plan) -> PlanWarning | None:
    """Facts about one and the same subject: what asks for the subject alone is answered by either."""
    if plan.objective != "override":
        return None
    subjects = [subject.casefold() for subject in plan["subjects"]]
    subject = next((one for one in subjects if subjects.count(one) > 1), None)
    if subject is None:
        return None
    places = [str(place) for place, one in enumerate(subjects, 1) if one == subject]
    return PlanWarning(
        "one_subject",
        f"facts {' and '.join(places)} are about {plan['subjects'][subjects.index(subject)]!r}: the model learns to "
        "answer with one or the other",
        "Say all of it in one answer, or give each the subject it is really about.",
    )


def _loss_stood_still(actual: Mapping[str, Any]) -> PlanWarning | None:
    first, final = actual.get("first_loss"), actual.get("final_loss")
    if first is None or final is None or not 0.8 * first <= final <= max(first + 1, 1.5 * first):
        return None
    return PlanWarning(
        "loss_stood_still",
        f"the loss went from {first:.2f} to {final:.2f}: the adapter learned next to nothing",
        "Check the learning rate and the number of steps first.",
    )


def _loss_exploded(actual: Mapping[str, Any]) -> PlanWarning | None:
    """The loss ends well above where it began. Where it is no number any more, the run ends by itself (nan_loss)."""
    first, final = actual.get("first_loss"), actual.get("final_loss")
    if first is None or final is None or final <= max(first + 1, 1.5 * first):
        return None
    return PlanWarning(
        "loss_exploded",
        f"the loss rose from {first:.2f} to {final:.2f}: the run diverged",
        "Lower learning_rate to a third, give it a warm-up, and keep max_grad_norm at 1.",
    )


def _no_effect(actual: Mapping[str, Any]) -> PlanWarning | None:
    largest = actual.get("largest_b")
    if largest is None or largest >= NO_EFFECT:
        return None
    return PlanWarning(
        "b_near_zero",
        f"no entry of the adapter's B is above {largest:.2g}: it changes next to nothing of what the base says",
        "Train more steps at a higher learning_rate, and see that the warm-up ends.",
    )


def _learned_by_heart(actual: Mapping[str, Any]) -> PlanWarning | None:
    """On rows held back the kept state is clearly worse than the best one was."""
    losses = [loss for _, loss in actual.get("eval_losses", ())]
    kept = actual.get("eval_loss")
    if not losses or kept is None or kept <= 1.05 * min(losses):
        return None
    step = next(step for step, loss in actual["eval_losses"] if loss == min(losses))
    return PlanWarning(
        "overfitting",
        f"eval_loss was {min(losses):.2f} at step {step} and is {kept:.2f} in what was kept: the run learned its rows "
        "by heart",
        "Give early_stopping_patience or load_best_model_at_end, fewer epochs, or more rows.",
    )


def _escalated(actual: Mapping[str, Any]) -> PlanWarning | None:
    """What was raised in vain, or why nothing was."""
    why, rounds = actual.get("escalation", "off"), actual.get("escalations", ())
    if why.startswith(NO_TIME):
        return PlanWarning("no_time_to_escalate", why, "Raise escalation_seconds, or give the job a faster machine.")
    if not rounds:
        return None
    raised = ", ".join(lever for one in rounds for lever in one.raised)
    return PlanWarning(
        "escalated_in_vain",
        f"after {rounds[0].step} steps the run raised {raised} for {sum(one.steps for one in rounds)} more, in vain",
        'What is left is the rank, which cannot change during a run: teach again with effort "max" or a larger r.',
    )


def _rate(rate: float) -> str:
    return f"{rate:.2g}".replace("e-0", "e-")
