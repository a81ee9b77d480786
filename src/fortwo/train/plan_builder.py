"""Chooses the settings of a plan, one group after another, each with its origin and reason. Given values are obeyed.

Pure. `plan.resolve` makes a Plan of the settings. In all functions here, `facts` is the number of facts to teach and
`parent_facts` the number of facts of the parent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.records import Origin, Setting
from fortwo.train.estimate import TokenCounts, tokens_per_micro_step
from fortwo.train.options import WITHOUT_WARMUP
from fortwo.train.parent import Parent
from fortwo.train.recipes import FIXED_OVERRIDE, REASONS, SAVE_SECONDS, SAVE_TOTAL_LIMIT, OverrideRecipe, SftRecipe
from fortwo.train.request import TrainingRequest
from fortwo.train.retry_policy import planned_mix
from fortwo.train.validation import validation_size

FACT_METRICS = ("efficacy", "paraphrase", "specificity")
_CAP = "This is a maximum: the run stops early once an evaluation on untrained prompts is well above the targets."


class PlanBuilder:
    """The settings of a plan that is being built. A given value always wins."""

    def __init__(self, given: Mapping[str, Any], parent: Parent | None = None) -> None:
        self.given = given
        self.effort_settings: frozenset[str] = frozenset()  # settings in which the effort differs from "normal"
        self._parent = parent
        self._inherited = {} if parent is None else parent.shape
        self.settings: dict[str, Setting] = {}

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def get(self, name: str) -> Any:
        """The value of a setting, or None if it has not been chosen yet."""
        return self.settings[name].value if name in self.settings else None

    def add(self, name: str, value: Any, origin: Origin, reason: str) -> Any:
        """Set a value and return it."""
        if name in self.effort_settings and origin in ("auto", "default"):
            origin = "effort"
        self.settings[name] = Setting(name, value, origin, reason)
        return value

    def choose(self, name: str, value: Any, reason: str, origin: Origin = "default") -> Any:
        """Set `value` for `reason`, unless the user gave another or the parent has one. Returns the value set."""
        if name in self.given:
            return self.add(name, self.given[name], "user", "given")
        if self._parent is not None and name in self._inherited:
            reason = f"The run starts from the tensors of {self._parent.id}, which have this value."
            return self.add(name, self._inherited[name], "parent", reason)
        return self.add(name, value, origin, reason)

    def add_remaining(self) -> None:
        """Add given keys that have no effect, such as use_dora = false, so that the plan shows them."""
        for name, value in self.given.items():
            if name not in self.settings:
                self.add(name, value, "user", "given; this value changes nothing")


def choose_validation(
    builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe, rows: int, own: int | None = None, together: int = 1
) -> int:
    """The number of validation rows. rows: those of the dataset; own: those of the validation_dataset, if there is one;
    together: rows that must not be separated. Raises InvalidRequest for the override objective, and InvalidDataset if
    no row is left to train on."""
    if own is not None:
        reason = f"validation_dataset has {own} validation rows, so every row of dataset is trained on."
        builder.choose("validation_split", 0.0, reason, "auto")
        return own
    asked = [key for key in ("validation_split", "early_stopping_patience") if builder.given.get(key, 0) != 0]
    if isinstance(recipe, OverrideRecipe):
        if asked:
            raise InvalidRequest(
                f"training_config.{asked[0]} = {builder.given[asked[0]]!r} cannot be used with the override objective, "
                "which has no validation rows: it evaluates on prompts that it never trains on",
                param=f"training_config.{asked[0]}",
                hint='Leave it out, or give objective "sft".',
            )
        return 0
    stops = "early_stopping_patience" in builder.given
    split, reason = recipe.validation_split, "No validation was requested, so every row is trained on."
    if stops:
        split, reason = recipe.early_stopping_split, "Early stopping needs rows that are not trained on."
    split = builder.choose("validation_split", split, reason, "auto" if stops else "default")
    size = validation_size(rows, split, together)
    if size >= rows:
        raise InvalidDataset(
            f"validation_split = {split:g} of {rows} {'row' if rows == 1 else 'rows'} leaves nothing to train on",
            param="training_config.validation_split",
            hint="Give more rows, or leave validation_split and early_stopping_patience out.",
        )
    return size


def choose_evaluations(builder: PlanBuilder, steps: int, steps_per_epoch: int) -> int:
    """The number of evaluations on validation rows: one before the first step, then as chosen, and after the last."""
    strategy = "steps" if "eval_steps" in builder.given else "epoch"
    reason = "eval_steps is given." if strategy == "steps" else "Validation rows are evaluated after every epoch."
    if builder.choose("eval_strategy", strategy, reason, "auto") == "steps":
        every = builder.choose("eval_steps", max(1, steps // 10), "There are ten evaluations in the run.", "auto")
    else:
        every = builder.add("eval_steps", steps_per_epoch, "auto", "This is the number of steps in an epoch.")
    stops = "early_stopping_patience" in builder.given
    if stops:
        builder.choose("early_stopping_patience", None, "")
    best, last = (
        "Early stopping keeps the state with the lowest eval_loss.",
        "The last state is kept, as in transformers.",
    )
    builder.choose("load_best_model_at_end", stops, best if stops else last, "auto" if stops else "default")
    return 1 + -(-steps // int(every))


def choose_batch(
    builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe, counts: TokenCounts, facts: int, parent_facts: int
) -> float:
    """Choose the rows of a micro-step and the pools that they come from. Returns the tokens of a micro-step."""
    name, rows = "per_device_train_batch_size", len(counts.rows)
    if isinstance(recipe, OverrideRecipe):
        edit = builder.choose(
            name, recipe.edit_rows, "Each micro-step has this many edit rows, which ask for the facts."
        )
        contrast = max(1, round(edit * recipe.contrast_rows / recipe.edit_rows))
        rehearsal = max(1, round(edit * recipe.rehearsal_rows / recipe.edit_rows))
        for key, count in (("contrast_rows", contrast), ("rehearsal_rows", rehearsal)):
            builder.add(key, count, "auto", f"{REASONS[key]}: {getattr(recipe, key)} for {recipe.edit_rows} edit rows.")
        for key in FIXED_OVERRIDE:
            builder.add(key, getattr(recipe, key), "default", REASONS[key])
        seen = edit * builder["gradient_accumulation_steps"]
        between = recipe.eval_every * recipe.edit_rows
        every = max(1, round(between / seen))
        reason = f"The served adapter is evaluated after every {between // facts} edit rows for each fact."
        builder.add("eval_every", every, "auto", reason)
        if parent_facts:
            kept_rows = min(edit, max(recipe.kept_rows, parent_facts))
            builder.add("kept_rows", kept_rows, "auto", REASONS["kept_rows"])
            builder.add("kept_pool", recipe.kept_pool, "default", REASONS["kept_pool"])
        mix = planned_mix(builder)
        kl_tokens = mix.negative_rows * recipe.contrast_tokens + mix.rehearsal * recipe.rehearsal_tokens
        micro_step = tokens_per_micro_step(counts, mix.ce_rows, kl_tokens, mix.negative_rows + mix.rehearsal)
    else:
        size = min(recipe.per_device_train_batch_size, rows)
        batch = builder.choose(name, size, f"Each micro-step has {size} of {rows} rows.", "auto")
        micro_step = tokens_per_micro_step(counts, min(batch, rows))
    return micro_step


def choose_steps(builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe, rows: int) -> tuple[int, int]:
    """(steps, steps per epoch). A positive max_steps decides, else num_train_epochs; max_steps = -1 means not given."""
    batches = math.ceil(rows / builder["per_device_train_batch_size"])
    steps_per_epoch = math.ceil(batches / builder["gradient_accumulation_steps"])
    max_steps = builder.given.get("max_steps", -1)
    override = isinstance(recipe, OverrideRecipe)
    if max_steps > 0:
        builder.add("max_steps", max_steps, "user", f"given. {_CAP}" if override else "given")
    elif "num_train_epochs" in builder.given:
        builder.choose("max_steps", -1, f"num_train_epochs decides. {_CAP if override else ''}".rstrip())
        epochs = builder.choose("num_train_epochs", None, "")
        return math.ceil(epochs * steps_per_epoch), steps_per_epoch
    elif isinstance(recipe, OverrideRecipe):
        max_steps = recipe.max_steps
        reason = f"Each fact after the first adds {recipe.more_facts:.0%} of the steps for one fact. {_CAP}"
        builder.add("max_steps", max_steps, "auto", reason)
    else:
        builder.choose("max_steps", -1, "num_train_epochs decides.")
        epochs = builder.choose("num_train_epochs", recipe.num_train_epochs, "A few passes over all rows are enough.")
        return epochs * steps_per_epoch, steps_per_epoch
    passes = f"max_steps = {max_steps} decides; an epoch has {steps_per_epoch} steps."
    builder.choose("num_train_epochs", round(max_steps / steps_per_epoch, 2), passes, "auto")
    return max_steps, steps_per_epoch


def choose_rate(builder: PlanBuilder, rate: float, reason: str) -> float:
    """The learning rate: as given, or the recipe's `rate` times learning_rate_multiplier. Raises InvalidRequest for a
    product above 1."""
    factor = builder.given.get("learning_rate_multiplier", 1)
    if factor == 1:
        return float(builder.choose("learning_rate", rate, reason))
    builder.add("learning_rate_multiplier", factor, "user", "given")
    if rate * factor > 1:
        raise InvalidRequest(
            f"training_config.learning_rate_multiplier = {factor} makes the rate {rate * factor:g}, which is above 1",
            param="training_config.learning_rate_multiplier",
            hint=f"The rate without it is {rate:g}; give a smaller one.",
        )
    return float(
        builder.add("learning_rate", rate * factor, "user", f"{rate:g} times learning_rate_multiplier. {reason}")
    )


def choose_schedule(builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe) -> str:
    """The name of the schedule. A run that may stop early restarts it after each evaluation, when it is at 0."""
    if isinstance(recipe, OverrideRecipe) and builder.settings["max_steps"].origin in ("auto", "effort"):
        name = "cosine_with_restarts"
        schedule = builder.choose("lr_scheduler_type", name, REASONS[name], "auto")
        if builder.settings["lr_scheduler_type"].origin == "auto":
            cycles = builder["max_steps"] // builder["eval_every"]
            reason = f"There is one cycle for the {builder['eval_every']} steps before each evaluation."
            builder.add("num_cycles", cycles, "auto", reason)
            return str(schedule)
    else:
        schedule = builder.choose("lr_scheduler_type", recipe.lr_scheduler_type, REASONS["lr_scheduler_type"])
    builder.add("num_cycles", 1, "default", "This is transformers' default.")
    return str(schedule)


def choose_escalation(builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe, facts: int) -> None:
    """Choose the retry rounds after the planned steps; none if the user gave the number of steps. Raises InvalidRequest
    for the sft objective."""
    if not isinstance(recipe, OverrideRecipe):
        for key in ("escalation_rounds", "escalation_seconds"):
            if builder.given.get(key):
                raise InvalidRequest(
                    f"training_config.{key} = {builder.given[key]!r} cannot be used with the "
                    f"{builder['objective']} objective, which has no evaluations whose targets can be missed",
                    param=f"training_config.{key}",
                    hint="Leave it out.",
                )
        return
    steps = [key for key in ("max_steps", "num_train_epochs") if builder.settings[key].origin == "user"]
    if steps and "escalation_seconds" not in builder.given:
        rounds = builder.choose("escalation_rounds", 0, f"{steps[0]} is given, so there are no further steps.", "auto")
    else:
        rounds = builder.choose("escalation_rounds", recipe.escalation_rounds, REASONS["escalation_rounds"])
    if rounds:
        seconds = recipe.escalation_seconds + (facts - 1) * recipe.escalation_seconds_more
        builder.choose("escalation_seconds", seconds, REASONS["escalation_seconds"], "auto")


def choose_warmup(builder: PlanBuilder, recipe: OverrideRecipe | SftRecipe, schedule: str, steps: int) -> int:
    """The number of warm-up steps: as given, a given share of the run, or the recipe's, which ends before the run."""
    given_steps, given_share = builder.given.get("warmup_steps"), builder.given.get("warmup_ratio")
    if given_share is not None:
        builder.choose("warmup_ratio", None, "")
    if given_steps is not None and (given_steps > 0 or not given_share):
        if 0 < given_steps < 1:
            warmup = math.ceil(steps * given_steps)
            reason = f"given as {given_steps}, which is a share of the {steps} steps"
        else:
            warmup, reason = int(given_steps), "given"
        return int(builder.add("warmup_steps", warmup, "user", reason))
    if given_share is not None:
        warmup = math.ceil(steps * given_share)
        return int(builder.add("warmup_steps", warmup, "user", f"warmup_ratio = {given_share} of {steps} steps"))
    if schedule in WITHOUT_WARMUP:
        return int(builder.add("warmup_steps", 0, "auto", f"The schedule {schedule} has no warm-up."))
    if isinstance(recipe, OverrideRecipe):
        warmup = min(recipe.warmup_steps, steps // 4)
        return int(builder.add("warmup_steps", warmup, "default", REASONS["warmup_steps"]))
    warmup = min(math.ceil(steps * recipe.warmup_ratio), steps // 4)
    reason = f"The warm-up takes about {recipe.warmup_ratio:.0%} of {steps} steps."
    return int(builder.add("warmup_steps", warmup, "auto", reason))


def choose_saving(builder: PlanBuilder, steps: int, steps_per_epoch: int) -> None:
    """Choose when the run makes checkpoints: every save_steps steps or save_seconds seconds, where 0 means never."""
    strategy, given = builder.given.get("save_strategy"), builder.given.get("save_steps")
    also = "There is also a checkpoint before each evaluation and at the end."
    if strategy is not None:
        builder.choose("save_strategy", None, "")
    if given is not None:
        whole = math.ceil(steps * given) if given < 1 else int(given)
        share = f"given as {given}, which is a share of the {steps} steps." if given < 1 else "given."
        builder.add("save_steps", whole, "user", f"{share} {also}")
    elif strategy == "no":
        builder.add("save_steps", 0, "auto", 'save_strategy is "no": a checkpoint is made only to pause the job.')
    elif strategy == "epoch":
        builder.add("save_steps", steps_per_epoch, "auto", f'save_strategy is "epoch". {also}')
    else:
        builder.add("save_steps", 0, "auto", "save_seconds decides.")
    if given is not None or strategy in ("no", "epoch"):
        builder.add("save_seconds", 0, "auto", "save_steps decides.")
    else:
        builder.add("save_seconds", SAVE_SECONDS, "default", f"A crash loses at most this many seconds. {also}")
    builder.choose("save_total_limit", SAVE_TOTAL_LIMIT, REASONS["save_total_limit"])


def add_workers(builder: PlanBuilder, workers: int, given: bool) -> None:
    """Add the number of workers of a Ray cluster that compute the gradients."""
    reason = "given." if given else "One worker leaves this server's processor to chat."
    reason += " The estimates of time and memory are those of this server without workers."
    builder.add("workers", workers, "user" if given else "default", reason)


def choose_targets(
    builder: PlanBuilder, request: TrainingRequest, recipe: OverrideRecipe | SftRecipe, parent_facts: int
) -> dict[str, float]:
    """The targets by metric; with the override objective, those for facts of the parent (kept_*) are the same."""
    given = request.objective.targets.given()
    defaults = recipe.targets if isinstance(recipe, OverrideRecipe) else {}
    targets = defaults | given
    for name, share in targets.items():
        origin: Origin = "user" if name in given else "default"
        reason = "given" if name in given else "The job succeeds if the final evaluation reaches this share."
        builder.add(f"targets.{name}", share, origin, reason)
    if parent_facts and isinstance(recipe, OverrideRecipe):
        for name in FACT_METRICS:
            reason = f"The target of {name} also holds for facts of the parent."
            share = builder.add(f"targets.kept_{name}", targets[name], "auto", reason)
            targets[f"kept_{name}"] = share
    return targets


def int_if_whole(number: float) -> float:
    """32 for 32.0, because lora_alpha is a whole number in most adapter_config.json files."""
    return int(number) if number == int(number) else number
