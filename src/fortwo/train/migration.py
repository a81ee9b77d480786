"""Turns a configuration of Axolotl, LLaMA-Factory or TRL into a training request, and says what it leaves out and why.

Pure: the YAML is read, and the dataset's names are resolved, by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fortwo.errors import InvalidRequest
from fortwo.records import Json
from fortwo.train.foreign_keys import FOREIGN_LORA, FOREIGN_TRAINING, LORA_ALIASES, TRAINING_ALIASES
from fortwo.train.options import LORA_KEYS, TRAINING_KEYS, parse_lora_config, parse_training_config
from fortwo.train.preference_plan import key_errors
from fortwo.train.refused import LORA_REFUSED, TRAINING_REFUSED

BASE_KEYS = ("base_model", "model_name_or_path", "model_name", "model")
NAME_KEYS = ("output_dir", "run_name", "hub_model_id")
DATASET_KEYS = ("datasets", "dataset", "dataset_name", "train_file")
VALIDATION_KEYS = ("test_datasets", "eval_dataset", "val_file", "validation_file", "eval_file")
HANDLED = {*BASE_KEYS, *DATASET_KEYS, *VALIDATION_KEYS, "output_dir", "rl", "stage"}
OBJECTIVE_KEYS = ("rl", "stage")  # of Axolotl, and of LLaMA-Factory
OBJECTIVES: dict[str, tuple[str, Json]] = {
    "sft": ("sft", {}),
    "pt": ("sft", {}),
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {}),
}  # by what these keys say: the objective, and settings that go with it
_OF_PREFERENCES = ("beta", "loss_type", "label_smoothing", "desirable_weight", "undesirable_weight")
FILES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
# Keys that both sections may have in other programs' flat files belong to the adapter.
_TO_LORA = {*LORA_KEYS, *LORA_ALIASES, *LORA_REFUSED, *FOREIGN_LORA}
_TO_TRAINING = {*TRAINING_KEYS, *TRAINING_ALIASES, *TRAINING_REFUSED, *FOREIGN_TRAINING}
_TEXT_KEYS = {"lr_scheduler_type", "lr_scheduler", "optim", "optimizer", "save_strategy", "eval_strategy"}


@dataclass(frozen=True)
class LeftOut:
    """A key that is not in the request; value: as it was."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Migration:
    """request: a body of /api/training/start, without `dataset` if none could be named."""

    request: Json
    left_out: tuple[LeftOut, ...]


def migrate(config: Mapping[str, Any], name: str | None, find_base: Callable[[str], Sequence[str]]) -> Migration:
    """The training request that a configuration means.

    name: of the adapter; None takes the last part of where the configuration saves it. find_base: the ids of the bases
    that a name of theirs means. Raises InvalidRequest for a configuration that trains on rewards.
    """
    objective, settings = _objective(config)
    left: list[LeftOut] = []
    request: Json = {"adapter_name": name if name is not None else _adapter_name(config)}
    _base(config, find_base, request, left)
    _dataset(config, DATASET_KEYS, "dataset", request, left)
    _dataset(config, VALIDATION_KEYS, "validation_dataset", request, left)
    sections: dict[str, Json] = {"lora_config": {}, "training_config": {}}
    for key, value in config.items():
        if key not in HANDLED and value is not None and not (key == "pref_loss" and value == objective):
            _take(str(key), value, sections, left)
    sections["training_config"] |= settings
    if objective is None:
        preferences = any(key in sections["training_config"] for key in _OF_PREFERENCES)
        objective = "auto" if preferences else "sft"
    _drop_foreign_to(objective, sections["training_config"], left)
    _drop_contradictions(sections, "validation_dataset" in request, left)
    request |= {section: values for section, values in sections.items() if values}
    return Migration(request | {"objective": objective}, tuple(left))


def _objective(config: Mapping[str, Any]) -> tuple[str | None, Json]:
    """The objective that the configuration names, and settings that go with it; None if it names none. Raises
    InvalidRequest for one that fortwo does not have."""
    named = next(((key, config[key]) for key in OBJECTIVE_KEYS if config.get(key)), None)
    if named is None:
        return None, {}
    key, value = named
    if value == "dpo" and config.get("pref_loss") in ("orpo", "simpo", "kto_pair"):
        key, value = "pref_loss", config["pref_loss"]
    if not isinstance(value, str) or value not in OBJECTIVES:
        raise InvalidRequest(
            f"{key} = {value!r}: this configuration trains in a way that fortwo does not support",
            param=key,
            hint=f"What can be turned into a request: {', '.join(OBJECTIVES)}.",
        )
    return OBJECTIVES[value]


def _drop_foreign_to(objective: str, training: Json, left: list[LeftOut]) -> None:
    """Leave out settings of preferences that mean nothing to the objective."""
    for error in key_errors(training, objective):
        key = str(error.param).rpartition(".")[2]
        left.append(LeftOut(key, training.pop(key), f"{error.message}. {error.hint}"))


def _adapter_name(config: Mapping[str, Any]) -> str:
    for key in NAME_KEYS:
        if isinstance(value := config.get(key), str):
            name = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", PurePath(value).name).strip("-._")
            if name:
                return name[:128]
    return "migrated"


def _base(
    config: Mapping[str, Any], find_base: Callable[[str], Sequence[str]], request: Json, left: list[LeftOut]
) -> None:
    """The base, by the name that fortwo has for it."""
    key = next((key for key in BASE_KEYS if isinstance(config.get(key), str)), None)
    if key is None:
        return
    named = str(config[key])
    ids = find_base(named)
    if len(ids) == 1:
        request["model"] = ids[0]
        return
    what = f"may be any of {', '.join(ids)}" if ids else "is no base model here"
    left.append(LeftOut(key, named, f"It {what}. Add it with fortwo models add ID PATH, and write its id as `model`."))


def _dataset(config: Mapping[str, Any], keys: Sequence[str], field: str, request: Json, left: list[LeftOut]) -> None:
    """The dataset that any of these keys names, if it is one local file. field: of the request, which gives it."""
    found: list[tuple[str, str]] = []
    for key in keys:
        value = config.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                _columns(key, one, left)
            names = one.get("path") if isinstance(one, Mapping) else one
            found += [
                (key, name.strip()) for name in (names.split(",") if isinstance(names, str) else ()) if name.strip()
            ]
    files = [(key, name) for key, name in found if PurePath(name).suffix.lower() in FILES]
    if len(found) == 1 and files:
        request[field] = {"path": files[0][1]}
        return
    for key, name in found:
        why = (
            "Several datasets are not mixed: write their rows into one file."
            if len(found) > 1
            else ("It is not a file. Save it as one, for example with datasets: load_dataset(...).to_parquet(...).")
        )
        left.append(LeftOut(key, name, f'{why} Then name the file as `{field}`: {{"path": ...}}.'))


def _columns(key: str, dataset: Mapping[str, Any], left: list[LeftOut]) -> None:
    """Settings of a dataset of Axolotl that name its columns."""
    for name, value in dataset.items():
        if name.startswith(("field", "message_", "roles")) or (name == "type" and isinstance(value, Mapping)):
            why = "The keys of a row say what it is: rename the columns to those of a format in the guide to data."
            left.append(LeftOut(f"{key}.{name}", value, why))


def _take(key: str, value: Any, sections: dict[str, Json], left: list[LeftOut]) -> None:
    """Put a key into the section that it belongs to, or among those that are left out."""
    if key == "lora_target_linear" and value is True:
        sections["lora_config"]["target_modules"] = "all-linear"
        return
    if key not in _TO_LORA and key not in _TO_TRAINING:
        left.append(LeftOut(key, value, "fortwo has no such setting."))
        return
    section = "lora_config" if key in _TO_LORA else "training_config"
    parse = parse_lora_config if key in _TO_LORA else parse_training_config
    own = (LORA_ALIASES | TRAINING_ALIASES).get(key, key)
    plain = _plain(key, own, value)
    if plain is None:
        left.append(LeftOut(key, value, "The plan chooses it."))
        return
    try:
        given = parse({key: plain})
    except InvalidRequest as error:
        if not _alone(key, error):
            left.append(LeftOut(key, value, error.hint or error.message))
            return
        given = {own: plain}
    if own not in given or (own not in LORA_KEYS and own not in TRAINING_KEYS):
        return  # a refused key whose value asks for what happens anyway
    if own in sections[section]:
        left.append(LeftOut(key, value, f"{own} is given already, as {sections[section][own]!r}."))
        return
    sections[section][own] = list(given[own]) if isinstance(given[own], tuple) else given[own]


def _alone(key: str, error: InvalidRequest) -> bool:
    """Whether a key is only refused because it is alone: what it needs may come with another key."""
    return key in ("eval_strategy", "evaluation_strategy", "eval_steps", "load_best_model_at_end") and (
        "needs rows that are not trained on" in error.message
    )


def _plain(key: str, own: str, value: Any) -> Any:
    """The value as JSON has it: YAML reads 2e-5 as text. None for one that lets the program choose."""
    if value == "auto" and own in ("bf16", "gradient_checkpointing"):
        return None
    if own == "gradient_checkpointing" and value == "unsloth":
        return True
    if own == "optim" and value == "adamw_bnb_8bit":
        return "adamw_8bit"
    if own == "target_modules" and isinstance(value, str):
        if value in ("all", "all-linear"):
            return "all-linear"
        return [name.strip() for name in value.split(",")]
    if isinstance(value, str) and key not in _TEXT_KEYS and own in (*LORA_KEYS, *TRAINING_KEYS):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(value) if value.strip().lstrip("+-").isdecimal() else number
    if isinstance(value, float) and value.is_integer() and own in ("r", "seed", "max_steps"):
        return int(value)
    return value


def _drop_contradictions(sections: dict[str, Json], validation_dataset: bool, left: list[LeftOut]) -> None:
    """Leave out what contradicts another key of training_config, until the rest is a request."""
    training = sections["training_config"]
    while training:
        try:
            parse_training_config(training, validation_dataset)
        except InvalidRequest as error:
            key = str(error.param).rpartition(".")[2]
            left.append(LeftOut(key, training.pop(key), f"{error.message.rstrip('.')}. {error.hint}"))
        else:
            return
