"""Everything that a run will do, decided before it runs: given values obeyed, the rest chosen and said why.

Pure: no clock, no file, no device. transformers' meaning throughout: an epoch is
ceil(ceil(rows / batch) / accumulation) optimizer steps (the last group of an epoch may be short), max_steps > 0
overrides num_train_epochs, and a warm-up starts at rate 0. With the override objective an epoch is one pass over the
questions that were given, and per_device_train_batch_size counts edit rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any, Literal

from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.facts.subject import find_subject, holds
from fortwo.records import Dataset, Example, Json, Origin, Plan, PlanWarning, Setting
from fortwo.train.adapter import choose_adapter, mean_ranks
from fortwo.train.diagnosis import diagnose, foresee
from fortwo.train.draft import (
    Draft,
    choose_batch,
    choose_escalation,
    choose_evaluations,
    choose_saving,
    choose_schedule,
    choose_steps,
    choose_targets,
    choose_validation,
    choose_warmup,
    plain,
)
from fortwo.train.estimate import (
    MICRO_TOKENS,
    MOMENTS,
    MOMENTS_8_BIT,
    BaseFacts,
    Machine,
    Memory,
    TokenCounts,
    memory,
    override_phases,
    reply_tokens,
    sft_phases,
    size,
    tokens_per_epoch,
)
from fortwo.train.options import IN_8_BITS, read_lora, read_training
from fortwo.train.parent import Parent, check_objective, check_shape, objections
from fortwo.train.recipes import REASONS, OverrideRecipe, raised_by, recipe_of
from fortwo.train.request import TrainingRequest
from fortwo.train.schedule import peak_rate
from fortwo.train.survey import Lines, RowCounts, Suspicions
from fortwo.train.validation import places

__all__ = ["BaseFacts", "Machine", "TokenCounts", "diagnose", "from_json", "resolve", "to_json", "training_rows"]

ANSWERS_COUNTED = 1000


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
    parent: Parent | None = None,
) -> Plan:
    """Decide every setting. parent: what the run goes on from. Raises InvalidRequest or InvalidDataset naming field,
    value and remedy."""
    given = read_lora(request.lora_config) | read_training(request.training_config)
    _check_lengths(counts, base)
    draft = Draft(given, parent)
    objective, subjects = _objective(draft, request, dataset)
    if parent is not None:
        check_objective(parent, objective)
        check_shape(parent, given)
        draft.add("parent", parent.id, "user", "given; the run starts from its tensors")
        draft.add("kept", tuple(fact.subject for fact in dataset.kept), "parent", f"what {parent.id} knows")
    recipe = recipe_of(objective, request.effort)
    draft.raised = raised_by(recipe)
    if draft.raised:
        draft.add("effort", request.effort, "user", f"given; it raises {', '.join(sorted(draft.raised))}")
    lengths = _lengths(counts)
    held = choose_validation(draft, recipe, len(counts.rows))
    if held:
        kept = places(len(counts.rows), held, draft.given.get("seed", recipe.seed))
        counts = replace(counts, rows=RowCounts(row for place, row in enumerate(counts.rows) if place not in kept))
    adapter = choose_adapter(draft, recipe, base.layers)

    draft.choose("gradient_accumulation_steps", 1, "rows are packed: a step is one pass")
    facts = max(1, len(subjects))
    if isinstance(recipe, OverrideRecipe):
        recipe = recipe.for_facts(facts)
    micro_step = choose_batch(draft, recipe, counts, facts, len(dataset.kept))
    steps, steps_per_epoch = choose_steps(draft, recipe, len(counts.rows))
    evaluations = choose_evaluations(draft, steps, steps_per_epoch) if held else 0
    rate = draft.choose("learning_rate", recipe.learning_rate, f"works for LoRA with the {objective} objective")
    schedule = choose_schedule(draft, recipe)
    choose_escalation(draft, recipe, facts)
    warmup = choose_warmup(draft, recipe, schedule, steps)
    for name in ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"):
        draft.choose(name, getattr(recipe, name), REASONS[name])
    longest = max(row.prompt + row.answer for row in counts.rows) - counts.prefix
    at_once = draft.choose("micro_step_tokens", MICRO_TOKENS, REASONS["micro_step_tokens"])
    together = min(micro_step, counts.prefix + max(at_once, longest))
    ranks = mean_ranks(adapter, base.layers)
    best, replies = objective == "override" or held > 0, reply_tokens(counts, objective == "sft")
    moments = MOMENTS_8_BIT if draft["optim"] in IN_8_BITS else MOMENTS
    machine = _products(draft, machine, lambda bf16: memory(base, together, ranks, bf16, True, best, moments, replies))
    needed = _checkpointing(
        draft, machine, lambda again: memory(base, together, ranks, machine.bf16, again, best, moments, replies)
    )
    targets = choose_targets(draft, request, recipe, len(dataset.kept))
    choose_saving(draft, steps, steps_per_epoch)
    draft.add_rest()

    tokens_per_step = round(
        micro_step * draft["gradient_accumulation_steps"]
        if objective == "override"
        else tokens_per_epoch(counts, draft["per_device_train_batch_size"]) / steps_per_epoch
    )
    trained, known = steps * tokens_per_step, len(dataset.kept)
    phases = (
        override_phases(draft, counts, facts, known, trained, exams=math.ceil(steps / draft["eval_every"]))
        if objective == "override"
        else sft_phases(counts, trained, validated=evaluations * held * lengths["mean"])
    )
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
            **{name: round(seconds, 1) for name, seconds in phases.seconds(machine).items()},
            "bytes": needed.training,
            "exam_bytes": needed.exam,
        },
    )
    of_parent = () if parent is None else objections(plan, parent)
    return replace(plan, warnings=(*foresee(plan, machine, suspicions), *of_parent))


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
    return {"min": tokens[0], "median": plain(middle), "mean": round(statistics.fmean(tokens), 1), "max": tokens[-1]}


def _objective(
    draft: Draft, request: TrainingRequest, dataset: Dataset
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


def _products(draft: Draft, machine: Machine, least: Callable[[bool], Memory]) -> Machine:
    """Whether training multiplies in bf16: what was measured to be faster here, unless only the other one fits.

    least: the least memory that a run needs with bf16 true or false. The answer estimates for the chosen type.
    """
    bf16, there = machine.faster_in_bf16, machine.memory
    speeds = " and ".join(f"{rate:.0f} tokens/s in {name}" for name, rate in machine.trained.items())
    reason = f"{REASONS['bf16']}: {speeds}"
    if there is not None and least(bf16).training > there >= least(not bf16).training:
        fast, fits = ("bf16", "fp32") if bf16 else ("fp32", "bf16")
        reason += f"; {fast} needs about {size(least(bf16).training)} and {size(there)} are there, so {fits} is taken"
        bf16 = not bf16
    return replace(machine, bf16=draft.choose("bf16", bf16, reason, "auto"))


def _checkpointing(draft: Draft, machine: Machine, needed: Callable[[bool], Memory]) -> Memory:
    """Whether layers are computed again for the gradient; the answer is the memory that the run needs then."""
    all_kept, there = needed(False).training, machine.memory
    short = there is not None and all_kept > there
    wanted = f"every layer's activations kept, the run needs about {size(all_kept)}"
    reason = f"{wanted}, {size(there)} are there" if there is not None else f"{wanted}; what is there is not known"
    return needed(draft.choose("gradient_checkpointing", short, reason, "auto"))


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
