"""Validation of `lora_config` and `training_config`: keys of PEFT and transformers are honoured, or refused by name."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fortwo.errors import InvalidRequest, all_of
from fortwo.nn.lora_config import ALL_LINEAR, TARGETS
from fortwo.nn.module_patterns import MOST_KEYS, expression
from fortwo.train.foreign_keys import FOREIGN_LORA, FOREIGN_TRAINING, LORA_ALIASES, TRAINING_ALIASES, meant
from fortwo.train.refused import LORA_REFUSED, TRAINING_REFUSED, Refused
from fortwo.train.schedule import POLYNOMIAL_END, SCHEDULES

EIGHT_BIT_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")  # three names of one optimizer
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *EIGHT_BIT_OPTIMIZERS)
LOSSES = (
    *("nll", "sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "nca_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("kto", "apo_zero_unpaired"),
)  # of all objectives
WITHOUT_WARMUP = ("constant",)
SAVE_STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True)
class _Number:
    """Numbers from low to high, both included by default. A `whole` number must be an integer in JSON, not 3.0."""

    low: float
    high: float
    example: str
    whole: bool = False
    above_low: bool = False
    below_high: bool = False

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = value > self.low if self.above_low else value >= self.low
        high = value < self.high if self.below_high else value <= self.high
        return low and high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:,}" if self.above_low else f"of at least {self.low:,}"
        high = f"below {self.high:,}" if self.below_high else f"at most {self.high:,}"
        return f"{kind} {low} and {high}"


@dataclass(frozen=True)
class _Word:
    choices: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices

    def __str__(self) -> str:
        quoted = [f'"{choice}"' for choice in self.choices]
        return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)


@dataclass(frozen=True)
class _Flag:
    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


_Kind = _Number | _Word | _Flag

_LORA: dict[str, _Kind] = {
    "r": _Number(1, 4096, "16", whole=True),
    "lora_alpha": _Number(0, 1_000_000, "32", above_low=True),
    "lora_dropout": _Number(0, 1, "0.05", below_high=True),
    "use_rslora": _Flag(),
    "use_dora": _Flag(),
    "bias": _Word(("none",)),
    "task_type": _Word(("CAUSAL_LM",)),
}
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # the key that each overrides for some modules
LORA_KEYS = (*_LORA, "target_modules", *PATTERNS)

_TRAINING: dict[str, _Kind] = {
    "num_train_epochs": _Number(0, 1_000_000, "3", above_low=True),
    "max_steps": _Number(-1, 10_000_000, "48", whole=True),
    "per_device_train_batch_size": _Number(1, 65536, "8", whole=True),
    "gradient_accumulation_steps": _Number(1, 65536, "1", whole=True),
    "learning_rate": _Number(0, 1, "2e-4"),
    "learning_rate_multiplier": _Number(0, 1_000_000, "2.0", above_low=True),
    "lr_scheduler_type": _Word(SCHEDULES),
    "warmup_steps": _Number(0, 10_000_000, "3"),
    "warmup_ratio": _Number(0, 1, "0.03"),
    "weight_decay": _Number(0, 1_000, "0.01"),
    "adam_beta1": _Number(0, 1, "0.9", below_high=True),
    "adam_beta2": _Number(0, 1, "0.999", below_high=True),
    "adam_epsilon": _Number(0, 1, "1e-8"),
    "max_grad_norm": _Number(0, 1_000_000_000, "1.0, or 0 for no clipping"),
    "seed": _Number(0, 2**32 - 1, "42", whole=True),
    "optim": _Word(OPTIMIZERS),
    "bf16": _Flag(),
    "gradient_checkpointing": _Flag(),
    "micro_step_tokens": _Number(1, 1_000_000, "640", whole=True),
    "validation_split": _Number(0, 0.5, "0.1"),
    "eval_strategy": _Word(("no", "steps", "epoch")),
    "eval_steps": _Number(1, 10_000_000, "50", whole=True),
    "early_stopping_patience": _Number(1, 10_000, "3", whole=True),
    "load_best_model_at_end": _Flag(),
    "escalation_rounds": _Number(0, 10, "1, or 0 for none", whole=True),
    "escalation_seconds": _Number(0, 1_000_000, "270", above_low=True),
    "save_strategy": _Word(SAVE_STRATEGIES),
    "save_steps": _Number(0, 10_000_000, "50", above_low=True),
    "save_total_limit": _Number(1, 1000, "3", whole=True),
    "beta": _Number(0, 1_000, "0.1", above_low=True),
    "loss_type": _Word(LOSSES),
    "label_smoothing": _Number(0, 0.5, "0.1", below_high=True),
    "reference_free": _Flag(),
    "desirable_weight": _Number(0, 1_000, "1.0"),
    "undesirable_weight": _Number(0, 1_000, "1.0"),
    "precompute_ref_log_probs": _Flag(),
}
TRAINING_KEYS = tuple(_TRAINING)
_OF_PREFERENCES = ("beta", "loss_type", "label_smoothing", "reference_free", "desirable_weight", "undesirable_weight")
_MAY_BE_NONE = (
    *("use_dora", "eval_strategy", "eval_steps", "early_stopping_patience", "precompute_ref_log_probs"),
    *_OF_PREFERENCES,
)  # null means the same as leaving them out


@dataclass(frozen=True)
class _Section:
    """One of the two configurations. aliases: other names of its keys; refused: keys with a remedy; other: the name of
    the other section and its keys."""

    name: str
    kinds: Mapping[str, _Kind]
    honoured: tuple[str, ...]
    aliases: Mapping[str, str]
    refused: Mapping[str, Refused]
    other: tuple[str, Collection[str]]


_LORA_SECTION = _Section(
    "lora_config",
    _LORA,
    LORA_KEYS,
    LORA_ALIASES,
    LORA_REFUSED | FOREIGN_LORA,
    ("training_config", {*TRAINING_KEYS, *TRAINING_ALIASES}),
)
_TRAINING_SECTION = _Section(
    "training_config",
    _TRAINING,
    TRAINING_KEYS,
    TRAINING_ALIASES,
    TRAINING_REFUSED | {key: one for key, one in FOREIGN_TRAINING.items() if key not in TRAINING_REFUSED},
    ("lora_config", {*LORA_KEYS, *LORA_ALIASES}),
)


def parse_settings(
    lora_config: Mapping[str, Any], training_config: Mapping[str, Any], validation_dataset: bool = False
) -> dict[str, Any]:
    """The given settings of both, under PEFT's and transformers' names, with their checked values. validation_dataset:
    whether the request gives one. Raises InvalidRequest with all that is wrong with either: keys, values, remedies."""
    errors: list[InvalidRequest] = []
    given: dict[str, Any] = {}
    in_training = partial(parse_training_config, validation_dataset=validation_dataset)
    for parse, config in ((parse_lora_config, lora_config), (in_training, training_config)):
        try:
            given |= parse(config)
        except InvalidRequest as error:
            errors.append(error)
    if errors:
        raise all_of(errors)
    return given


def parse_lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys with their checked values. Raises InvalidRequest with every key that is wrong, its value and the
    remedy."""
    errors: list[InvalidRequest] = []
    given = _given(_without_none(config), _LORA_SECTION, errors)
    if errors:
        raise all_of(errors)
    return given


def parse_training_config(config: Mapping[str, Any], validation_dataset: bool = False) -> dict[str, Any]:
    """The same for training_config. Keys that contradict each other are refused with both names. validation_dataset:
    whether the request gives one."""
    errors: list[InvalidRequest] = []
    given = _given(_without_none(config), _TRAINING_SECTION, errors)
    errors += _contradictions(given)
    errors += _of_validation(given, validation_dataset)
    if errors:
        raise all_of(errors)
    return given


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the keys whose null says nothing."""
    return {key: value for key, value in config.items() if value is not None or key not in _MAY_BE_NONE}


def _given(config: Mapping[str, Any], section: _Section, errors: list[InvalidRequest]) -> dict[str, Any]:
    """The keys that are right, under our names; what is wrong with the others goes to `errors`."""
    given: dict[str, Any] = {}
    names: dict[str, str] = {}  # the name under which each was given
    for key, value in config.items():
        own = section.aliases.get(key, key)
        try:
            if own in names:
                raise _refusal(
                    f"{section.name}.{key}",
                    value,
                    f"and {section.name}.{names[own]} mean the same",
                    "Give one of the two.",
                )
            if own != key and value is None:
                continue
            names[own] = key
            given[own] = _checked_key(section, key, own, value)
        except InvalidRequest as error:
            errors.append(error)
    return given


def _checked_key(section: _Section, key: str, own: str, value: Any) -> Any:
    """The value of a key, checked. key: as given; own: our name of it. Raises InvalidRequest."""
    param = f"{section.name}.{key}"
    if key in section.refused and own == key:
        if not any(type(value) is type(neutral) and value == neutral for neutral in section.refused[key].neutral):
            raise _refusal(param, value, "cannot be honoured", section.refused[key].remedy)
        return value
    if own not in section.honoured:
        raise _unknown(section, key)
    if own == "target_modules":
        return _target_modules(param, value)
    if own in PATTERNS:
        return _pattern(param, value, _LORA[PATTERNS[own]])
    if own == "loss_type" and isinstance(value, list) and len(value) == 1:  # TRL allows several with weights
        (value,) = value
    if key == "use_gradient_checkpointing" and value == "unsloth":
        value = True
    return _checked(param, value, section.kinds.get(own))


def _unknown(section: _Section, key: str) -> InvalidRequest:
    home, keys = section.other
    nearest = meant(key, section.honoured)
    hint = f"Honoured: {', '.join(section.honoured)}."
    if key in keys:
        hint = f"Move {key} to {home}."
    elif nearest is not None:
        hint = f"Did you mean {nearest}? {hint}"
    param = f"{section.name}.{key}"
    return InvalidRequest(f"{param} is not a known key", param=param, hint=hint, code="unknown_key")


def _contradictions(given: Mapping[str, Any]) -> Iterator[InvalidRequest]:
    """What is wrong with keys of training_config that are right one by one."""
    if given.get("max_steps") == 0:
        remedy = "Give at least 1, or -1 to let num_train_epochs decide."
        yield _refusal("training_config.max_steps", 0, "would train nothing", remedy)
    if "learning_rate" in given and given.get("learning_rate_multiplier", 1) != 1:
        yield _contradiction(given, "learning_rate_multiplier", "learning_rate", "Give one of the two.")
    warmup, ratio = given.get("warmup_steps", 0), given.get("warmup_ratio", 0)
    for key in ("warmup_steps", "save_steps"):
        if given.get(key, 0) > 1 and given[key] != int(given[key]):
            remedy = "Give a whole number of steps, or a number below 1 for a share of the run."
            yield _refusal(f"training_config.{key}", given[key], "is not a whole number of steps", remedy)
    if "save_steps" in given and given.get("save_strategy", "steps") != "steps":
        yield _contradiction(given, "save_steps", "save_strategy", "Give one of the two.")
    if warmup > 0 and ratio > 0:
        yield _contradiction(given, "warmup_steps", "warmup_ratio", "Give one of the two.")
    schedule = given.get("lr_scheduler_type")
    if schedule in WITHOUT_WARMUP and (warmup > 0 or ratio > 0):
        key = "warmup_steps" if warmup > 0 else "warmup_ratio"
        hint = 'Give lr_scheduler_type "constant_with_warmup", or leave the warm-up out.'
        yield _contradiction(given, key, "lr_scheduler_type", hint, ": this schedule has no warm-up")
    if schedule == "polynomial" and given.get("learning_rate", 1) <= POLYNOMIAL_END:
        yield _refusal(
            "training_config.learning_rate",
            given["learning_rate"],
            f"is not above {POLYNOMIAL_END:g}, where the polynomial schedule ends",
            'Give a higher rate, or lr_scheduler_type "linear".',
        )


def _of_validation(given: Mapping[str, Any], own: bool) -> Iterator[InvalidRequest]:
    """Validation that is requested without rows for it, and rows without validation. own: the request gives a
    validation_dataset."""
    split, strategy = given.get("validation_split"), given.get("eval_strategy")
    stops, best = "early_stopping_patience" in given, given.get("load_best_model_at_end")
    asked = {"eval_strategy": strategy not in (None, "no"), "eval_steps": "eval_steps" in given}
    asked["load_best_model_at_end"] = bool(best)
    for key in (key for key, wanted in asked.items() if wanted and not (split or stops or own)):
        yield _refusal(
            f"training_config.{key}",
            given[key],
            "needs rows that are not trained on",
            "Give validation_dataset, or validation_split, the share of rows to hold back, such as 0.1.",
        )
    for contradict, key, why in (
        (bool(split), "validation_split", "only one can give the validation rows"),
        (strategy == "no", "eval_strategy", "the validation rows would not be used"),
    ):
        if own and contradict:
            problem = f"and validation_dataset contradict each other: {why}"
            remedy = f"Leave out {key} or validation_dataset."
            yield _refusal(f"training_config.{key}", given[key], problem, remedy)
    without = stops and split == 0 and not own
    unused = bool(split) and strategy == "no" and not own
    for contradict, one, other, why in (
        (without, "validation_split", "early_stopping_patience", "stopping needs validation rows"),
        (stops and strategy == "no", "eval_strategy", "early_stopping_patience", "nothing would be evaluated"),
        (stops and best is False, "load_best_model_at_end", "early_stopping_patience", "an earlier state may be best"),
        (unused, "eval_strategy", "validation_split", "the held-back rows would not be used"),
        (strategy == "epoch" and "eval_steps" in given, "eval_strategy", "eval_steps", "only one can decide when"),
    ):
        if contradict:
            yield _contradiction(given, one, other, f"Leave out {one} or {other}.", f": {why}")


def _checked(param: str, value: Any, kind: _Kind | None) -> Any:
    if kind is None or kind.accepts(value):
        return value
    if isinstance(kind, _Word | _Flag):
        raise _refusal(param, value, "cannot be honoured", f"Give {kind}, or leave it out.")
    if isinstance(value, str) and _is_numeral(value):
        raise _refusal(param, value, f"is a text, not {kind}", f"Give the number without quotes: {float(value):g}.")
    raise _refusal(param, value, f"is not {kind}", f"Give a number such as {kind.example}, or leave it out.")


def _is_numeral(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _target_modules(param: str, value: Any) -> tuple[str, ...] | str:
    """Which of them a base has is known when its plan is made (`adapter`)."""
    example = ", ".join(TARGETS[:2])
    if value == ALL_LINEAR or (value == "all" and param.endswith(".lora_target")):
        return ALL_LINEAR
    if isinstance(value, str) and param.endswith(".lora_target"):  # LLaMA-Factory separates the names by commas
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        hint = f'Give some of the base\'s modules, such as {example}, or "{ALL_LINEAR}" for all.'
        raise _refusal(param, value, "is not a list of modules", hint)
    for name in value:
        if not isinstance(name, str) or not name:
            raise _refusal(param, name, "is not the name of a module", f"Give names such as {example}.")
    return tuple(dict.fromkeys(value))


def _pattern(param: str, value: Any, number: _Kind) -> dict[str, float]:
    if value is None:  # which PEFT writes for none
        return {}
    if not isinstance(value, Mapping):
        hint = 'Give an object of module names and numbers such as {"q_proj": 8}, or leave it out.'
        raise _refusal(param, value, "is not an object", hint)
    if len(value) > MOST_KEYS:
        hint = "Let one regular expression stand for several modules."
        raise _refusal(param, value, f"has {len(value)} keys, at most {MOST_KEYS} are allowed", hint)
    for key, item in value.items():
        try:
            expression(key)
        except ValueError as error:
            hint = "Give a module's name, the end of one, or a regular expression for it."
            raise _refusal(param, key, f"is not a regular expression: {error}", hint) from None
        _checked(f"{param}[{key!r}]", item, number)
    return dict(value)


def _contradiction(given: Mapping[str, Any], one: str, other: str, hint: str, why: str = "") -> InvalidRequest:
    both = f"training_config.{one} = {given[one]!r} and training_config.{other} = {given[other]!r}"
    return InvalidRequest(f"{both} contradict each other{why}", param=f"training_config.{one}", hint=hint)


def _refusal(param: str, value: Any, problem: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(f"{param} = {reprlib.repr(value)} {problem}", param=param, hint=remedy)
