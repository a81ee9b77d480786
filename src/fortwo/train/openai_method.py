"""OpenAI's `method` of a fine-tuning job as an objective and keys of training_config. Pure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fortwo.errors import InvalidRequest, all_of
from fortwo.records import Json, ObjectiveName
from fortwo.train.recipes import recipe_for

AUTO = "auto"
_OBJECTIVES: Mapping[str, ObjectiveName] = {"supervised": "sft", "dpo": "dpo"}
_KEYS = {"beta": "beta", "batch_size": "per_device_train_batch_size", "n_epochs": "num_train_epochs"}
_MULTIPLIER = "learning_rate_multiplier"


def method_settings(method: Any) -> tuple[ObjectiveName, Json]:
    """The objective and the keys of training_config that `method` asks for: {"type": "dpo", "dpo": {"hyperparameters":
    {"beta": ..., "batch_size": ..., "learning_rate_multiplier": ..., "n_epochs": ...}}}, or the same for supervised.
    What is null, "auto" or left out is chosen by the plan. learning_rate_multiplier is of the objective's own rate.
    The values are checked by `options`, except the multiplier. Raises InvalidRequest with all that is wrong."""
    named = method.get("type") if isinstance(method, Mapping) else method
    if not isinstance(method, Mapping) or not isinstance(named, str) or named not in _OBJECTIVES:
        raise InvalidRequest(
            f"method.type = {reprlib.repr(named)} is not a method of fortwo",
            param="method.type",
            hint=f"Give one of {', '.join(_OBJECTIVES)}; `objective` has further ones.",
        )
    kind, objective = named, _OBJECTIVES[named]
    errors = [
        _unknown(f"method.{key}", f"Give type and {kind}.")
        for key, value in method.items()
        if key not in ("type", kind) and value is not None
    ]
    options = _object(method.get(kind), f"method.{kind}", errors)
    errors += [
        _unknown(f"method.{kind}.{key}", "Give hyperparameters.")
        for key, value in options.items()
        if key != "hyperparameters" and value is not None
    ]
    given = _object(options.get("hyperparameters"), f"method.{kind}.hyperparameters", errors)
    known = [key for key in (*_KEYS, _MULTIPLIER) if key != "beta" or kind == "dpo"]
    training: Json = {}
    for key, value in given.items():
        param = f"method.{kind}.hyperparameters.{key}"
        if value is None or value == AUTO:
            continue
        if key not in known:
            errors.append(_unknown(param, f"Give some of {', '.join(known)}."))
        elif key != _MULTIPLIER:
            training[_KEYS[key]] = value
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            errors.append(
                InvalidRequest(
                    f"{param} = {reprlib.repr(value)} is not a number above 0",
                    param=param,
                    hint='Give a number such as 1.0, or "auto".',
                )
            )
        else:
            training["learning_rate"] = recipe_for(objective).learning_rate * value
    if errors:
        raise all_of(errors)
    return objective, training


def _object(value: Any, param: str, errors: list[InvalidRequest]) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    errors.append(
        InvalidRequest(
            f"{param} = {reprlib.repr(value)} is not an object", param=param, hint="Give an object, or leave it out."
        )
    )
    return {}


def _unknown(param: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not a known key", param=param, hint=hint, code="unknown_key")
