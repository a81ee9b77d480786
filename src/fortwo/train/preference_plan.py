"""Which rows an objective learns from and is validated on, and TRL's options of the losses of preferences. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fortwo.errors import InvalidDataset, InvalidRequest, all_of
from fortwo.records import Dataset, Example, PlanWarning
from fortwo.train.estimate import RowLength, TokenCounts
from fortwo.train.plan_builder import PlanBuilder
from fortwo.train.recipes import REASONS, PreferenceRecipe

Preference = Literal["dpo", "kto", "orpo"]
PREFERENCES: tuple[Preference, ...] = ("dpo", "kto", "orpo")
PREFERENCE_LOSSES = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "nca_pair"),
        *("sppo_hard", "apo_zero", "apo_down"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
}
SMOOTHED = ("sigmoid", "robust")
_KEYS = {
    "beta": PREFERENCES,
    "loss_type": ("dpo", "kto"),
    "label_smoothing": ("dpo",),
    "reference_free": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "precompute_ref_log_probs": ("dpo", "kto"),
}  # the objectives that know each key of training_config
_NEUTRAL: Mapping[str, Any] = {"label_smoothing": 0, "reference_free": False, "precompute_ref_log_probs": False}
_ROWS = {
    "pairs": ("rows with a chosen and a rejected answer", '{"prompt": "...", "chosen": "...", "rejected": "..."}'),
    "labelled": ("answers with a label", '{"prompt": "...", "completion": "...", "label": true}'),
    "other": ("examples without preferences", '{"prompt": "...", "completion": "..."}'),
    "facts": ("facts", '{"subject": "...", "answer": "...", "match": ["..."], "questions": ["..."]}'),
}


def kind_of_rows(dataset: Dataset) -> Literal["pairs", "labelled", "other", "facts"]:
    """What the rows of a dataset are; they are all of one kind."""
    first = next(iter(dataset.examples), None)
    if first is None:
        return "facts"
    if first.rejected:
        return "pairs"
    return "other" if first.label is None else "labelled"


def rows_together(objective: str, dataset: Dataset) -> int:
    """How many rows that follow each other must not be separated by validation: KTO's two answers to one prompt, where
    the dataset has pairs."""
    return 2 if objective == "kto" and kind_of_rows(dataset) == "pairs" else 1


def reading_passes(objective: str, loss_type: str | None) -> int:
    """How often each answer is read to compute a loss: KTO's estimate of the divergence reads the mismatched answers
    with the adapter and with the reference."""
    return 3 if objective == "kto" and loss_type == "kto" else 1


def choose_objective(wanted: str, dataset: Dataset) -> tuple[Preference, str] | None:
    """The objective and its reason, or None for one that does not train on preferences. Raises InvalidRequest for an
    objective that cannot learn from these rows."""
    rows = kind_of_rows(dataset)
    if wanted == "auto" and rows in ("pairs", "labelled"):
        return (
            ("dpo", "The rows have a chosen and a rejected answer.")
            if rows == "pairs"
            else ("kto", "The answers have labels.")
        )
    fitting: dict[str, tuple[str, ...]] = {"pairs": PREFERENCES, "labelled": ("kto",)}
    if wanted in (fitting.get(rows) or ("auto", "sft", "override")):
        return (wanted, "given") if wanted in PREFERENCES else None
    fits = fitting.get(rows, ("sft",) if rows == "other" else ("override",))
    needed = "pairs" if wanted in ("dpo", "orpo") else "labelled" if wanted == "kto" else "other"
    raise InvalidRequest(
        f"objective = {wanted!r} cannot learn from {_ROWS[rows][0]}",
        param="objective",
        hint=f"Give rows like {_ROWS[needed][1]}, or objective {' or '.join(map(repr, fits))}.",
        code="objective_mismatch",
    )


def check_validation(validation: Dataset, objective: str) -> None:
    """Raises InvalidRequest for validation rows that have no loss with this objective."""
    if objective == "override":
        raise InvalidRequest(
            "validation_dataset cannot be used with the override objective, which has no validation rows: it evaluates "
            "on prompts that it never trains on",
            param="validation_dataset",
            hint='Leave it out, or give objective "sft". held_out of a fact gives prompts for its evaluation.',
        )
    rows = kind_of_rows(validation)
    fitting = {"sft": ("other",), "kto": ("labelled", "pairs")}.get(objective, ("pairs",))
    if rows not in fitting:
        raise InvalidRequest(
            f"validation_dataset has {_ROWS[rows][0]}, which have no loss with the objective {objective!r}",
            param="validation_dataset",
            hint=f"Give rows like {_ROWS[fitting[0]][1]}, or leave it out.",
            code="objective_mismatch",
        )


def check_keys(given: Mapping[str, Any], objective: str) -> None:
    """Raises InvalidRequest with all given keys that mean nothing to the objective and would be lost."""
    if errors := key_errors(given, objective):
        raise all_of(errors)


def key_errors(given: Mapping[str, Any], objective: str) -> list[InvalidRequest]:
    """What is wrong with given keys for the objective; none with "auto", which is not decided yet."""
    if objective == "auto":
        return []
    errors = []
    for key, knowing in _KEYS.items():
        if key not in given or objective in knowing or (key in _NEUTRAL and given[key] == _NEUTRAL[key]):
            continue
        if key == "loss_type" and objective == "sft" and given[key] == "nll":
            continue
        errors.append(
            InvalidRequest(
                f"training_config.{key} = {given[key]!r} means nothing to the objective {objective!r}",
                param=f"training_config.{key}",
                hint=f"Leave it out, or give objective {' or '.join(map(repr, knowing))}.",
            )
        )
    return [*errors, *_contradictions(given, objective)]


def _contradictions(given: Mapping[str, Any], objective: str) -> Sequence[InvalidRequest]:
    errors = []
    loss = given.get("loss_type", "sigmoid")
    if objective in PREFERENCE_LOSSES and "loss_type" in given and loss not in PREFERENCE_LOSSES[objective]:
        errors.append(
            InvalidRequest(
                f"training_config.loss_type = {loss!r} is not a loss of the objective {objective!r}",
                param="training_config.loss_type",
                hint=f"Give one of {', '.join(PREFERENCE_LOSSES[objective])}, or leave it out.",
            )
        )
    elif objective == "dpo" and given.get("label_smoothing") and loss not in SMOOTHED:
        errors.append(
            InvalidRequest(
                f"training_config.label_smoothing = {given['label_smoothing']!r} has no place in loss_type = {loss!r}",
                param="training_config.label_smoothing",
                hint=f"Leave it out, or give loss_type {' or '.join(map(repr, SMOOTHED))}.",
            )
        )
    return errors


def choose_preferences(builder: PlanBuilder, objective: Preference, recipe: PreferenceRecipe) -> None:
    """Choose the options of the loss."""
    builder.choose("beta", recipe.beta, REASONS["beta"])
    if objective == "orpo":
        return
    builder.choose("loss_type", PREFERENCE_LOSSES[objective][0], REASONS["loss_type"])
    if objective == "dpo":
        for name in ("label_smoothing", "reference_free"):
            builder.choose(name, getattr(recipe, name), REASONS[name])
    else:
        for name in ("desirable_weight", "undesirable_weight"):
            builder.choose(name, getattr(recipe, name), REASONS[name])
    if not builder.get("reference_free") and "precompute_ref_log_probs" not in builder.given:
        builder.add("precompute_ref_log_probs", True, "default", REASONS["precompute_ref_log_probs"])


def in_pairs(counts: TokenCounts) -> TokenCounts:
    """The lengths of pairs, from those of their answers in turn; the prefix counts once."""
    rows = list(counts.rows)
    pairs = tuple(
        RowLength(one.line, one.prompt + other.prompt - counts.prefix, one.answer + other.answer)
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    )
    return TokenCounts(pairs, counts.prefix)


def check_targets(targets: Mapping[str, float], objective: str) -> None:
    """Raises InvalidRequest for targets that the objective does not measure."""
    ours = ("accuracy", "retention")
    wrong = [one for one in targets if (one not in ours if objective in PREFERENCES else one == "accuracy")]
    if wrong:
        measured = ours if objective in PREFERENCES else ("efficacy", "paraphrase", "specificity", "retention")
        raise InvalidRequest(
            f"objective.targets.{wrong[0]} = {targets[wrong[0]]:g}: the objective {objective!r} does not measure it",
            param=f"objective.targets.{wrong[0]}",
            hint=f"Give targets for {' or '.join(measured)}, or leave them out.",
        )


def check_units(objective: Preference, rows: int, batch: int) -> None:
    """Raises for too few answers in a step for KTO, which compares each prompt with the answer to another."""
    if objective == "kto" and rows < 2:
        raise InvalidDataset(
            "the objective 'kto' has one answer to train on",
            param="dataset",
            hint="Give more rows: KTO compares each prompt with the answer to another one.",
        )
    if objective == "kto" and batch < 2:
        raise InvalidRequest(
            f"training_config.per_device_train_batch_size = {batch} leaves KTO one answer in a step",
            param="training_config.per_device_train_batch_size",
            hint="Give at least 2, or more gradient_accumulation_steps: KTO compares each prompt of a step with the "
            "answer to another one.",
        )


def label_warnings(
    examples: Collection[Example], desirable_weight: float, undesirable_weight: float
) -> tuple[PlanWarning, ...]:
    """Warnings about the labels of KTO: all alike, or far from the balance that its authors found best."""
    sides = [side.label for example in examples for side in example.sides]
    good = sum(label is True for label in sides)
    bad = len(sides) - good
    if not good or not bad:
        which = "true" if good else "false"
        return (
            PlanWarning(
                "one_label",
                f"all {len(sides)} labels are {which}: nothing says what to tell these answers from",
                f'Add answers with the label {"false" if good else "true"}, or give objective "sft" the good answers.',
            ),
        )
    ratio = (desirable_weight * good) / (undesirable_weight * bad) if undesirable_weight else float("inf")
    if 0.99 <= ratio <= 1.34 or not undesirable_weight:
        return ()
    wanted = round(undesirable_weight * bad / good, 2)
    return (
        PlanWarning(
            "unbalanced_labels",
            f"{good} answers are desirable and {bad} are not, and with their weights they count {ratio:.2f} to 1",
            f"Give desirable_weight = {wanted:g} to {round(1.33 * wanted, 2):g}, which makes it 1 to 1.33 to 1.",
        ),
    )
