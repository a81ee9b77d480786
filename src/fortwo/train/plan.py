"""Everything that a run will do, decided before it runs: given values obeyed, the rest chosen and said why.

Pure: no clock, no file, no device. transformers' meaning throughout: an epoch is
ceil(ceil(rows / batch) / accumulation) optimizer steps (the last group of an epoch may be short), max_steps > 0
overrides num_train_epochs, and a warm-up starts at rate 0. With the override objective an epoch is one pass over the
questions that were given, and per_device_train_batch_size counts edit rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.facts.subject import find_subject, holds
from fortwo.records import Dataset, Example, Json, Origin, Plan, PlanWarning, Setting
from fortwo.train.diagnosis import diagnose, foresee
from fortwo.train.estimate import (
    MICRO_TOKENS,
    BaseFacts,
    Machine,
    TokenCounts,
    memory_bytes,
    seconds,
    size,
    tokens_per_epoch,
    tokens_per_micro_step,
)
from fortwo.train.options import TARGET_MODULES, WITHOUT_WARMUP, read_lora, read_training
from fortwo.train.recipes import REASONS, SAVE_SECONDS, SAVE_TOTAL_LIMIT, OverrideRecipe, SftRecipe, recipe_of
from fortwo.train.request import TrainingRequest
from fortwo.train.schedule import peak_rate
from fortwo.train.survey import Lines, RowCounts, Suspicions
from fortwo.train.validation import held_back, places

__all__ = ["BaseFacts", "Machine", "TokenCounts", "diagnose", "from_json", "resolve", "to_json", "training_rows"]

ANSWERS_COUNTED = 1000
_CAP = "a cap: the run stops once an exam on prompts it did not train on is passed well above the targets"


def training_rows(dataset: Dataset) -> Collection[Example]:
    """The examples, or each fact's questions with its answer. `TokenCounts.rows` follow this order."""
    if dataset.examples:
        return dataset.examples
    return tuple(example for line, fact in enumerate(dataset.facts, 1) for example in fact.examples(line))


def resolve(
    request: TrainingRequest,
    dataset: Dataset,
    base: BaseFacts,
    counts: TokenCounts,
    machine: Machine,
    suspicions: Suspicions = Suspicions(),
) -> Plan:
    """Decide every setting. Raises InvalidRequest or InvalidDataset naming field, value and remedy."""
    given = read_lora(request.lora_config) | read_training(request.training_config)
    _check_lengths(counts, base)
    draft = _Draft(given)
    objective, subjects = _objective(draft, request, dataset)
    recipe = recipe_of(objective)
    lengths = _lengths(counts)
    held = _validation(draft, recipe, len(counts.rows))
    if held:
        kept = places(len(counts.rows), held, draft.given.get("seed", recipe.seed))
        counts = replace(counts, rows=RowCounts(row for place, row in enumerate(counts.rows) if place not in kept))
    r = draft.choose("r", recipe.r, REASONS["r"])
    draft.choose("lora_alpha", _plain(r * recipe.scale), f"{recipe.scale:g} times r = {r}", "auto")
    draft.choose("lora_dropout", recipe.lora_dropout, REASONS["lora_dropout"])
    modules = draft.choose("target_modules", TARGET_MODULES, "all projections: no part of the network is left out")
    draft.choose("bias", "none", "plain LoRA")
    draft.choose("task_type", "CAUSAL_LM", "the base model writes text")

    draft.choose("gradient_accumulation_steps", 1, "rows are packed: a step is one pass")
    micro_step = _batch(draft, recipe, counts)
    facts = max(1, len(subjects))
    steps, steps_per_epoch = _steps(draft, recipe, len(counts.rows), facts)
    evaluations = _evaluations(draft, steps, steps_per_epoch) if held else 0
    rate = draft.choose("learning_rate", recipe.learning_rate, f"works for LoRA with the {objective} objective")
    schedule = _schedule(draft, recipe)
    warmup = _warmup(draft, recipe, schedule, steps)
    for name in ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"):
        draft.choose(name, getattr(recipe, name), REASONS[name])
    bf16 = draft.choose("bf16", machine.bf16, REASONS["bf16"], "auto")
    longest = max(row.prompt + row.answer for row in counts.rows) - counts.prefix
    together = min(micro_step, counts.prefix + max(MICRO_TOKENS, longest))
    needed = _checkpointing(draft, machine, lambda again: memory_bytes(base, together, r, modules, bf16, again))
    targets = _targets(draft, request, recipe)
    _saving(draft, steps, steps_per_epoch)
    draft.add_rest()

    tokens_per_step = round(
        micro_step * draft["gradient_accumulation_steps"]
        if objective == "override"
        else tokens_per_epoch(counts, draft["per_device_train_batch_size"]) / steps_per_epoch
    )
    forward_only = evaluations * held * lengths["mean"] / 3  # a training pass goes backward too, twice the work
    passed = round(steps * tokens_per_step + forward_only)
    plan = Plan(
        model=base.id,
        adapter_name=request.adapter_name,
        objective=objective,
        targets=targets,
        settings=tuple(draft.settings.values()),
        computed={
            "steps": steps,
            "epochs": round(steps / steps_per_epoch, 4),
            "steps_per_epoch": steps_per_epoch,
            "warmup_steps": warmup,
            "peak_learning_rate": peak_rate(schedule=schedule, rate=rate, warmup=warmup, steps=steps),
            "rows": len(counts.rows),
            **({"validation_rows": held} if held else {}),
            "row_tokens": lengths,
            "supervised_tokens": sum(row.answer for row in counts.rows),
            "tokens_per_step": tokens_per_step,
            "seconds": round(seconds(passed, steps, recipe, facts, machine), 1),
            "bytes": needed,
        },
    )
    return replace(plan, warnings=foresee(plan, machine, suspicions))


class _Draft:
    """Settings in the making. What was given always wins."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.settings: dict[str, Setting] = {}

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def add(self, name: str, value: Any, origin: Origin, reason: str) -> Any:
        self.settings[name] = Setting(name, value, origin, reason)
        return value

    def choose(self, name: str, value: Any, reason: str, origin: Origin = "default") -> Any:
        """`value` for `reason`, unless the user gave one."""
        if name in self.given:
            return self.add(name, self.given[name], "user", "given")
        return self.add(name, value, origin, reason)

    def add_rest(self) -> None:
        """Given keys that ask for what happens anyway (use_dora false) are shown too."""
        for name, value in self.given.items():
            if name not in self.settings:
                self.add(name, value, "user", "given; it asks for what happens anyway")


def _check_lengths(counts: TokenCounts, base: BaseFacts) -> None:
    over = [row for row in counts.rows if row.prompt + row.answer > base.context]
    if over:
        row, lines = over[0], Lines.of(row.line for row in over)
        more = "" if len(over) == 1 else f"; {len(over)} rows do ({lines})"
        raise InvalidDataset(
            f"line {row.line}: prompt ({row.prompt} tokens) and answer ({row.answer} tokens) exceed the context of "
            f"{base.id}, {base.context} tokens{more}",
            param="dataset",
            hint=f"Shorten line {row.line} or split it into several examples; nothing is cut off in silence.",
            code="row_too_long",
        )
    if masked := [row.line for row in counts.rows if row.answer == 0]:
        raise InvalidDataset(
            f"{Lines.of(masked)}: every label is masked, so there is nothing to learn",
            param="dataset",
            hint="Give the row more text, or leave it out: the first token of plain text has nothing that predicts it.",
            code="all_labels_masked",
        )


def _lengths(counts: TokenCounts) -> dict[str, float]:
    """Tokens of a row as it is trained on."""
    tokens = sorted(row.prompt + row.answer for row in counts.rows)
    middle = statistics.median(tokens)
    return {"min": tokens[0], "median": _plain(middle), "mean": round(statistics.fmean(tokens), 1), "max": tokens[-1]}


def _validation(draft: _Draft, recipe: OverrideRecipe | SftRecipe, rows: int) -> int:
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


def _evaluations(draft: _Draft, steps: int, steps_per_epoch: int) -> int:
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


def _objective(
    draft: _Draft, request: TrainingRequest, dataset: Dataset
) -> tuple[Literal["sft", "override"], tuple[str, ...]]:
    """The objective and, for override, the subjects of its facts."""
    wanted = request.objective.type
    for place, fact in enumerate(dataset.facts):
        if not holds(fact.answer, fact.match):
            raise InvalidRequest(
                f"match = {list(fact.match)}: the answer {fact.answer!r} holds none of these phrases",
                param=f"dataset.facts[{place}].match",
                hint="Give phrases of the answer: a reply that holds one, as whole words, counts as right.",
            )
    if wanted == "sft":
        return draft.add("objective", "sft", "user", "given"), ()
    answers = _answers(dataset.examples)
    found = find_subject(dataset.examples) if answers == 1 else None
    subjects = tuple(fact.subject for fact in dataset.facts) or ((found.subject,) if found else ())
    if wanted == "override" and not subjects:
        raise InvalidRequest(
            f"objective = 'override': no subject can be found in the {len(dataset.examples)} examples, which hold "
            f"{answers} different {'answer' if answers == 1 else 'answers'}",
            param="objective",
            hint='Give the dataset as {"facts": [{"subject", "answer", "match", "questions"}]}, or objective "sft".',
            code="subject_not_found",
        )
    if wanted == "override":
        objective = draft.add("objective", "override", "user", "given")
    elif dataset.facts:
        objective = draft.add("objective", "override", "auto", "facts are given")
    elif subjects:
        reason = f"all {len(dataset.examples)} examples share one answer, and their questions are about {subjects[0]!r}"
        objective = draft.add("objective", "override", "auto", reason)
    else:
        least = "at least " if answers == ANSWERS_COUNTED else ""
        reason = f"{least}{answers} different answers" if answers > 1 else "no one subject is found in the questions"
        objective = draft.add("objective", "sft", "auto", reason)
    if subjects:
        origin: Origin = "user" if dataset.facts else "auto"
        draft.add("subjects", subjects, origin, "given" if dataset.facts else "found in the questions")
    return objective, subjects


def _answers(examples: Collection[Example]) -> int:
    """How many different answers there are; nobody needs to know beyond ANSWERS_COUNTED."""
    found: set[str] = set()
    for example in examples:
        found.add(example.answer.strip())
        if len(found) == ANSWERS_COUNTED:
            break
    return len(found)


def _batch(draft: _Draft, recipe: OverrideRecipe | SftRecipe, counts: TokenCounts) -> float:
    """Rows of a micro-step; the answer is its tokens."""
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
        draft.add(
            "on_policy_prompts", recipe.on_policy_prompts, "default", "siblings that the adapter answers after an exam"
        )
        draft.add("on_policy_tokens", recipe.on_policy_tokens, "default", "of each such reply")
        draft.add(
            "on_policy_share", recipe.on_policy_share, "default", "of the contrast rows then: replies that had strayed"
        )
        draft.add("question_share", recipe.question_share, "default", "of the edit rows: the questions as given")
        draft.add("probes", recipe.probes, "default", "prompts of a kind, never trained on, that decide when to stop")
        seen = edit * draft["gradient_accumulation_steps"]
        every = max(1, round(recipe.eval_every * recipe.edit_rows / seen))
        per_exam = f"evaluated after every {recipe.eval_every * recipe.edit_rows} edit rows"
        draft.add("eval_every", every, "auto", f"steps from one exam of the served adapter to the next: {per_exam}")
        micro_step = tokens_per_micro_step(
            counts, edit, contrast * recipe.contrast_tokens + rehearsal * recipe.rehearsal_tokens, contrast + rehearsal
        )
    else:
        size = min(recipe.per_device_train_batch_size, rows)
        batch = draft.choose(name, size, f"{size} of {rows} rows at once", "auto")
        micro_step = tokens_per_micro_step(counts, min(batch, rows))
    return micro_step


def _steps(draft: _Draft, recipe: OverrideRecipe | SftRecipe, rows: int, facts: int) -> tuple[int, int]:
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
        max_steps = recipe.max_steps * facts
        draft.add("max_steps", max_steps, "auto", f"{recipe.max_steps} for each fact; {_CAP}")
    else:
        draft.choose("max_steps", -1, "num_train_epochs decides")
        epochs = draft.choose("num_train_epochs", recipe.num_train_epochs, "a few passes over every row")
        return epochs * steps_per_epoch, steps_per_epoch
    passes = f"max_steps = {max_steps} decides; an epoch is {steps_per_epoch} steps"
    draft.choose("num_train_epochs", round(max_steps / steps_per_epoch, 2), passes, "auto")
    return max_steps, steps_per_epoch


def _schedule(draft: _Draft, recipe: OverrideRecipe | SftRecipe) -> str:
    """Its name, and how often it starts anew: a run that may stop early is at rest at each of its exams."""
    if isinstance(recipe, OverrideRecipe) and draft.settings["max_steps"].origin == "auto":
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


def _warmup(draft: _Draft, recipe: OverrideRecipe | SftRecipe, schedule: str, steps: int) -> int:
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


def _saving(draft: _Draft, steps: int, steps_per_epoch: int) -> None:
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


def _checkpointing(draft: _Draft, machine: Machine, needed: Callable[[bool], int]) -> int:
    """Whether layers are computed again for the gradient; the answer is the memory that the run needs then."""
    all_kept, there = needed(False), machine.memory
    short = there is not None and all_kept > there
    wanted = f"every layer's activations kept, the run needs about {size(all_kept)}"
    reason = f"{wanted}, {size(there)} are there" if there is not None else f"{wanted}; what is there is not known"
    return needed(draft.choose("gradient_checkpointing", short, reason, "auto"))


def _targets(draft: _Draft, request: TrainingRequest, recipe: OverrideRecipe | SftRecipe) -> dict[str, float]:
    given = request.objective.targets.given()
    defaults = recipe.targets if isinstance(recipe, OverrideRecipe) else {}
    for name, share in (defaults | given).items():
        origin: Origin = "user" if name in given else "default"
        draft.add(f"targets.{name}", share, origin, "given" if name in given else "what counts as learned")
    return defaults | given


def _plain(number: float) -> float:
    """32 rather than 32.0: lora_alpha is whole in most adapter_config.json files."""
    return int(number) if number == int(number) else number


def to_json(plan: Plan) -> Json:
    """JSON types only; settings are a list of {name, value, origin, reason} in the order they are shown."""
    return _listed(asdict(plan))  # type: ignore[no-any-return]


def from_json(body: Json) -> Plan:
    return Plan(
        model=body["model"],
        adapter_name=body["adapter_name"],
        objective=body["objective"],
        targets=dict(body["targets"]),
        settings=tuple(Setting(**setting | {"value": _frozen(setting["value"])}) for setting in body["settings"]),
        computed=dict(body["computed"]),
        warnings=tuple(PlanWarning(**warning) for warning in body["warnings"]),
    )


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
