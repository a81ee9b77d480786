"""Settings in the making: given values obeyed, the rest chosen and said why, one group of settings after another.

Pure. `plan.resolve` makes a Plan of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.records import Origin, Setting
from fortwo.train.escalation import mix_of
from fortwo.train.estimate import TokenCounts, tokens_per_micro_step
from fortwo.train.options import WITHOUT_WARMUP
from fortwo.train.parent import Parent
from fortwo.train.recipes import REASONS, SAVE_SECONDS, SAVE_TOTAL_LIMIT, OverrideRecipe, SftRecipe
from fortwo.train.request import TrainingRequest
from fortwo.train.validation import held_back

ABOUT_FACTS = ("efficacy", "paraphrase", "specificity")
_CAP = "a cap: the run stops once an exam on prompts it did not train on is passed well above the targets"


class Draft:
    """Settings in the making. What was given always wins."""

    def __init__(self, given: Mapping[str, Any], parent: Parent | None = None) -> None:
        self.given = given
        self.raised: frozenset[str] = frozenset()  # what the effort has otherwise than the normal one
        self._parent = parent
        self._inherited = {} if parent is None else parent.shape
        self.settings: dict[str, Setting] = {}

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def get(self, name: str) -> Any:
        """None where there is no such setting so far."""
        return self.settings[name].value if name in self.settings else None

    def add(self, name: str, value: Any, origin: Origin, reason: str) -> Any:
        if name in self.raised and origin in ("auto", "default"):
            origin = "effort"
        self.settings[name] = Setting(name, value, origin, reason)
        return value

    def choose(self, name: str, value: Any, reason: str, origin: Origin = "default") -> Any:
        """`value` for `reason`, unless the user gave one or the parent has one."""
        if name in self.given:
            return self.add(name, self.given[name], "user", "given")
        if self._parent is not None and name in self._inherited:
            reason = f"as in {self._parent.id}, whose tensors the run starts from"
            return self.add(name, self._inherited[name], "parent", reason)
        return self.add(name, value, origin, reason)

    def add_rest(self) -> None:
        """Given keys that ask for what happens anyway (use_dora false) are shown too."""
        for name, value in self.given.items():
            if name not in self.settings:
                self.add(name, value, "user", "given; it asks for what happens anyway")


def choose_validation(draft: Draft, recipe: OverrideRecipe | SftRecipe, rows: int) -> int:
    """How many rows are held back."""
    asked = [key for key in ("validation_split", "early_stopping_patience") if draft.given.get(key, 0) != 0]
    if isinstance(recipe, OverrideRecipe):
        if asked:
            raise InvalidRequest(
                f"training_config.{asked[0]} = {draft.given[asked[0]]!r} means nothing for the override objective, "
                "which stops by exams on prompts that it never trains on",
                param=f"training_config.{asked[0]}",
                hint='Leave it out, or give objective "sft".',
            )
        return 0
    stops = "early_stopping_patience" in draft.given
    split, reason = recipe.validation_split, "every row is trained on: no validation was asked for"
    if stops:
        split, reason = recipe.early_stopping_split, "early stopping needs rows that are not trained on"
    split = draft.choose("validation_split", split, reason, "auto" if stops else "default")
    held = held_back(rows, split)
    if held >= rows:
        raise InvalidDataset(
            f"validation_split = {split:g} of {rows} {'row' if rows == 1 else 'rows'} leaves nothing to train on",
            param="training_config.validation_split",
            hint="Give more rows, or leave validation_split and early_stopping_patience out.",
        )
    return held


def choose_evaluations(draft: Draft, steps: int, steps_per_epoch: int) -> int:
    """How often the rows that are held back are evaluated: before the first step, as they say, and after the last."""
    strategy = "steps" if "eval_steps" in draft.given else "epoch"
    reason = "eval_steps is given" if strategy == "steps" else "after every pass over the rows, and after the last step"
    if draft.choose("eval_strategy", strategy, reason, "auto") == "steps":
        every = draft.choose("eval_steps", max(1, steps // 10), "ten times in the run", "auto")
    else:
        every = draft.add("eval_steps", steps_per_epoch, "auto", "the steps of an epoch")
    stops = "early_stopping_patience" in draft.given
    if stops:
        draft.choose("early_stopping_patience", None, "")
    draft.choose(
        "load_best_model_at_end",
        stops,
        "early stopping keeps the lowest eval_loss" if stops else "transformers' default: the last state is kept",
        "auto" if stops else "default",
    )
    return 1 + -(-steps // int(every))


def choose_batch(
    draft: Draft, recipe: OverrideRecipe | SftRecipe, counts: TokenCounts, facts: int, known: int
) -> float:
    """Rows of a micro-step; the answer is its tokens. facts: how many are taught; known: how many are kept."""
    name, rows = "per_device_train_batch_size", len(counts.rows)
    if isinstance(recipe, OverrideRecipe):
        edit = draft.choose(name, recipe.edit_rows, "edit rows a micro-step: enough sentence frames at once")
        per_edit = f"{recipe.contrast_rows}, {recipe.rehearsal_rows} rows to {recipe.edit_rows} edit rows"
        contrast = max(1, round(edit * recipe.contrast_rows / recipe.edit_rows))
        rehearsal = max(1, round(edit * recipe.rehearsal_rows / recipe.edit_rows))
        draft.add("contrast_rows", contrast, "auto", f"siblings keep the base's answers; in proportion: {per_edit}")
        draft.add("rehearsal_rows", rehearsal, "auto", f"the rest keeps the base's answers; in proportion: {per_edit}")
        draft.add("contrast_tokens", recipe.contrast_tokens, "default", "first tokens of the base's reply to a sibling")
        draft.add("rehearsal_tokens", recipe.rehearsal_tokens, "default", "first tokens of the base's reply elsewhere")
        draft.add("kl_weight", recipe.kl_weight, "default", "weight of keeping against learning")
        draft.add("edit_pool", recipe.edit_pool, "default", "prompts about each fact that edit rows are drawn from")
        draft.add("contrast_pool", recipe.contrast_pool, "default", "prompts about each fact's siblings")
        draft.add("rehearsal_pool", recipe.rehearsal_pool, "default", "everyday prompts, as far as there are so many")
        draft.add(
            "on_policy_prompts",
            recipe.on_policy_prompts,
            "default",
            "siblings to answer behind an exam that finds leaks",
        )
        draft.add("on_policy_tokens", recipe.on_policy_tokens, "default", "of each such reply")
        draft.add(
            "on_policy_share", recipe.on_policy_share, "default", "of the contrast rows then: replies that had strayed"
        )
        draft.add("opening_weight", recipe.opening_weight, "default", "of an answer's first tokens against its others")
        draft.add("question_share", recipe.question_share, "default", "of the edit rows: the questions as given")
        draft.add("probes", recipe.probes, "default", "prompts of a kind, never trained on, that decide when to stop")
        seen = edit * draft["gradient_accumulation_steps"]
        between = recipe.eval_every * recipe.edit_rows
        every = max(1, round(between / seen))
        per_exam = f"evaluated after every {between // facts} edit rows for each fact"
        draft.add("eval_every", every, "auto", f"steps from one exam of the served adapter to the next: {per_exam}")
        if known:
            kept = min(edit, max(recipe.kept_rows, known))
            of_each = "rows that ask for what the parent knows, and as many about siblings"
            draft.add("kept_rows", kept, "auto", f"{of_each}: at least {recipe.kept_rows}, one for each fact")
            draft.add(
                "kept_pool", recipe.kept_pool, "default", "prompts about each of the parent's facts; and siblings"
            )
        mix = mix_of(draft)
        held = mix.siblings * recipe.contrast_tokens + mix.rehearsal * recipe.rehearsal_tokens
        micro_step = tokens_per_micro_step(counts, mix.asking, held, mix.siblings + mix.rehearsal)
    else:
        size = min(recipe.per_device_train_batch_size, rows)
        batch = draft.choose(name, size, f"{size} of {rows} rows at once", "auto")
        micro_step = tokens_per_micro_step(counts, min(batch, rows))
    return micro_step


def choose_steps(draft: Draft, recipe: OverrideRecipe | SftRecipe, rows: int) -> tuple[int, int]:
    """(steps, steps per epoch). max_steps decides where it is positive, else num_train_epochs; -1 leaves it open."""
    batches = math.ceil(rows / draft["per_device_train_batch_size"])
    steps_per_epoch = math.ceil(batches / draft["gradient_accumulation_steps"])
    max_steps = draft.given.get("max_steps", -1)
    override = isinstance(recipe, OverrideRecipe)
    if max_steps > 0:
        draft.add("max_steps", max_steps, "user", f"given; {_CAP}" if override else "given")
    elif "num_train_epochs" in draft.given:
        draft.choose("max_steps", -1, f"num_train_epochs decides; {_CAP}" if override else "num_train_epochs decides")
        epochs = draft.choose("num_train_epochs", None, "")
        return math.ceil(epochs * steps_per_epoch), steps_per_epoch
    elif isinstance(recipe, OverrideRecipe):
        max_steps = recipe.max_steps
        steps_of = f"of one fact, and {recipe.more_facts:.0%} of them for each further one"
        draft.add("max_steps", max_steps, "auto", f"{steps_of}; {_CAP}")
    else:
        draft.choose("max_steps", -1, "num_train_epochs decides")
        epochs = draft.choose("num_train_epochs", recipe.num_train_epochs, "a few passes over every row")
        return epochs * steps_per_epoch, steps_per_epoch
    passes = f"max_steps = {max_steps} decides; an epoch is {steps_per_epoch} steps"
    draft.choose("num_train_epochs", round(max_steps / steps_per_epoch, 2), passes, "auto")
    return max_steps, steps_per_epoch


def choose_schedule(draft: Draft, recipe: OverrideRecipe | SftRecipe) -> str:
    """Its name, and how often it starts anew: a run that may stop early is at rest at each of its exams."""
    if isinstance(recipe, OverrideRecipe) and draft.settings["max_steps"].origin in ("auto", "effort"):
        reason = "at rest at each exam; goes on from the full rate where targets are missed"
        schedule = draft.choose("lr_scheduler_type", "cosine_with_restarts", reason, "auto")
        if draft.settings["lr_scheduler_type"].origin == "auto":
            cycles = draft["max_steps"] // draft["eval_every"]
            draft.add("num_cycles", cycles, "auto", f"one for each {draft['eval_every']} steps to an exam")
            return str(schedule)
    else:
        schedule = draft.choose("lr_scheduler_type", recipe.lr_scheduler_type, REASONS["lr_scheduler_type"])
    draft.add("num_cycles", 1, "default", "transformers' default")
    return str(schedule)


def choose_escalation(draft: Draft, recipe: OverrideRecipe | SftRecipe, facts: int) -> None:
    """Rounds beyond the planned steps; none where the user said how many steps there are."""
    if not isinstance(recipe, OverrideRecipe):
        for key in ("escalation_rounds", "escalation_seconds"):
            if draft.given.get(key):
                raise InvalidRequest(
                    f"training_config.{key} = {draft.given[key]!r} means nothing for the sft objective, which has no "
                    "exam that can be missed",
                    param=f"training_config.{key}",
                    hint="Leave it out.",
                )
        return
    steps = [key for key in ("max_steps", "num_train_epochs") if draft.settings[key].origin == "user"]
    if steps and "escalation_seconds" not in draft.given:
        rounds = draft.choose("escalation_rounds", 0, f"{steps[0]} is given: no step beyond it", "auto")
    else:
        rounds = draft.choose("escalation_rounds", recipe.escalation_rounds, REASONS["escalation_rounds"])
    if rounds:
        seconds = recipe.escalation_seconds + (facts - 1) * recipe.escalation_seconds_more
        draft.choose("escalation_seconds", seconds, REASONS["escalation_seconds"], "auto")


def choose_warmup(draft: Draft, recipe: OverrideRecipe | SftRecipe, schedule: str, steps: int) -> int:
    """Steps of warm-up: given, a given share of the run, or the recipe's, which always leaves steps after it."""
    given_steps, given_share = draft.given.get("warmup_steps"), draft.given.get("warmup_ratio")
    if given_share is not None:
        draft.choose("warmup_ratio", None, "")
    if given_steps is not None and (given_steps > 0 or not given_share):
        if 0 < given_steps < 1:
            warmup = math.ceil(steps * given_steps)
            reason = f"given as {given_steps}, a share of {steps} steps"
        else:
            warmup, reason = int(given_steps), "given"
        return int(draft.add("warmup_steps", warmup, "user", reason))
    if given_share is not None:
        warmup = math.ceil(steps * given_share)
        return int(draft.add("warmup_steps", warmup, "user", f"warmup_ratio {given_share} of {steps} steps"))
    if schedule in WITHOUT_WARMUP:
        return int(draft.add("warmup_steps", 0, "auto", f"{schedule} has no warm-up"))
    if isinstance(recipe, OverrideRecipe):
        warmup = min(recipe.warmup_steps, steps // 4)
        return int(
            draft.add("warmup_steps", warmup, "default", "AdamW's first estimates are rough; a few steps settle them")
        )
    warmup = min(math.ceil(steps * recipe.warmup_ratio), steps // 4)
    return int(draft.add("warmup_steps", warmup, "auto", f"about {recipe.warmup_ratio:.0%} of {steps} steps"))


def choose_saving(draft: Draft, steps: int, steps_per_epoch: int) -> None:
    """When the run saves itself: save_steps and save_seconds, 0 for never by this measure; and how often at most."""
    strategy, given = draft.given.get("save_strategy"), draft.given.get("save_steps")
    also = "besides before each exam and at the end"
    if strategy is not None:
        draft.choose("save_strategy", None, "")
    if given is not None:
        whole = math.ceil(steps * given) if given < 1 else int(given)
        share = f"given as {given}, a share of {steps} steps; {also}" if given < 1 else f"given; {also}"
        draft.add("save_steps", whole, "user", share)
    elif strategy == "no":
        draft.add("save_steps", 0, "auto", "save_strategy is no: a checkpoint is made only to pause the job")
    elif strategy == "epoch":
        draft.add("save_steps", steps_per_epoch, "auto", f"save_strategy is epoch; {also}")
    else:
        draft.add("save_steps", 0, "auto", "save_seconds decides")
    if given is not None or strategy in ("no", "epoch"):
        draft.add("save_seconds", 0, "auto", "save_steps decides")
    else:
        draft.add("save_seconds", SAVE_SECONDS, "default", f"what a crash may cost; {also}")
    draft.choose("save_total_limit", SAVE_TOTAL_LIMIT, REASONS["save_total_limit"])


def choose_targets(
    draft: Draft, request: TrainingRequest, recipe: OverrideRecipe | SftRecipe, known: int
) -> dict[str, float]:
    """For what is taught; of override, the same for what the parent knows."""
    given = request.objective.targets.given()
    defaults = recipe.targets if isinstance(recipe, OverrideRecipe) else {}
    targets = defaults | given
    for name, share in targets.items():
        origin: Origin = "user" if name in given else "default"
        draft.add(f"targets.{name}", share, origin, "given" if name in given else "what counts as learned")
    if known and isinstance(recipe, OverrideRecipe):
        for name in ABOUT_FACTS:
            share = draft.add(f"targets.kept_{name}", targets[name], "auto", f"as {name}, of what the parent knows")
            targets[f"kept_{name}"] = share
    return targets


def plain(number: float) -> float:
    """32 rather than 32.0: lora_alpha is whole in most adapter_config.json files."""
    return int(number) if number == int(number) else number
