"""OpenAI's method of a fine-tuning job, as the objective and the settings that it means here."""

from __future__ import annotations

from typing import Any

import pytest

from fortwo.errors import InvalidRequest
from fortwo.train.openai_method import method_settings
from fortwo.train.options import parse_training_config
from fortwo.train.recipes import PREFERENCE, SFT


@pytest.mark.parametrize("kind", ["dpo", "supervised"])
@pytest.mark.parametrize(
    "options", [None, {}, {"hyperparameters": None}, {"hyperparameters": {"n_epochs": "auto", "batch_size": None}}]
)
def test_what_is_not_given_is_left_to_the_plan(kind: str, options: Any) -> None:
    method = {"type": kind} | ({} if options is None else {kind: options}) | {"reinforcement": None}
    assert method_settings(method) == ("dpo" if kind == "dpo" else "sft", {})


def test_hyperparameters_are_keys_of_training_config() -> None:
    given = {"beta": 0.2, "batch_size": 4, "n_epochs": 2, "learning_rate_multiplier": 2}
    objective, training = method_settings({"type": "dpo", "dpo": {"hyperparameters": given}})
    assert (objective, training.pop("learning_rate")) == ("dpo", pytest.approx(2 * PREFERENCE.learning_rate))
    assert training == {"beta": 0.2, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    assert parse_training_config(training) == training
    of_sft = method_settings(
        {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0.5}}}
    )
    assert of_sft == ("sft", {"learning_rate": 0.5 * SFT.learning_rate})


@pytest.mark.parametrize(
    ("method", "param"),
    [
        ("dpo", "method.type"),
        ({}, "method.type"),
        ({"type": "reinforcement"}, "method.type"),
        ({"type": ["dpo"]}, "method.type"),
        ({"type": "dpo", "supervised": {"hyperparameters": {}}}, "method.supervised"),
        ({"type": "dpo", "dpo": []}, "method.dpo"),
        ({"type": "dpo", "dpo": {"beta": 0.1}}, "method.dpo.beta"),
        ({"type": "dpo", "dpo": {"hyperparameters": {"bta": 1}}}, "method.dpo.hyperparameters.bta"),
        (
            {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}},
            "method.supervised.hyperparameters.beta",
        ),
        ({"type": "dpo", "dpo": {"hyperparameters": {"learning_rate_multiplier": 0}}}, None),
        ({"type": "dpo", "dpo": {"hyperparameters": {"learning_rate_multiplier": True}}}, None),
    ],
)
def test_anything_else_is_refused_by_name(method: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        method_settings(method)
    named = "method.dpo.hyperparameters.learning_rate_multiplier" if param is None else param
    assert refused.value.param == named
    assert refused.value.hint
    assert named in refused.value.message


def test_all_findings_come_in_one_answer() -> None:
    given = {"bta": 1, "learning_rate_multiplier": -1}
    with pytest.raises(InvalidRequest, match=r"(?s)bta.*learning_rate_multiplier"):
        method_settings({"type": "dpo", "dpo": {"hyperparameters": given}})
