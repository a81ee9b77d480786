"""The next try after a failure: settings that the diagnosis blames are left to the plan, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Served, refused

from fortwo.train.next_try import BLAMED, next_try
from fortwo.train.options import TRAINING_KEYS

GIVEN: dict[str, Any] = {"model": "tiny", "training_config": {"max_steps": 2, "learning_rate": 0.5, "seed": 1}}


def test_blamed_settings_are_those_of_a_request() -> None:
    assert {name for names in BLAMED.values() for name in names} <= {*TRAINING_KEYS}


@pytest.mark.parametrize(
    ("codes", "left", "changed"),
    [
        (["few_rows", "missed_paraphrase"], {"learning_rate": 0.5, "seed": 1}, ["max_steps"]),
        (["nan_loss"], {"max_steps": 2, "seed": 1}, ["learning_rate"]),
        (["loss_stood_still"], {"seed": 1}, ["max_steps", "learning_rate"]),
        (["interrupted"], GIVEN["training_config"], []),
    ],
)
def test_what_is_blamed_is_left_to_the_plan(codes: list[str], left: dict[str, Any], changed: list[str]) -> None:
    body, changes = next_try(GIVEN, codes)
    assert body == {"model": "tiny", "training_config": left}
    assert changes == [{"setting": name, "value": None} for name in changed]


def test_with_nothing_to_blame_the_effort_is_raised_once() -> None:
    plain = {"model": "tiny"}
    body, changes = next_try(plain, ["missed_paraphrase", "targets_missed"])
    assert (body, changes) == (plain | {"effort": "max"}, [{"setting": "effort", "value": "max"}])
    assert next_try(body, ["missed_paraphrase"]) == (body, [])


def test_a_failed_job_has_a_next_try_and_no_other_has(served: Served) -> None:
    rows = [{"prompt": "What is up?", "completion": "sky"}]
    config = {"max_steps": 60, "learning_rate": 1.0, "weight_decay": 1000.0, "lr_scheduler_type": "constant"}
    body = {"adapter_name": "tried", "dataset": {"examples": rows}, "training_config": config}
    job = served.wait(served.post("/api/training/start", body).json()["job_id"])
    assert job["error"]["code"] == "nan_loss"
    found = served.http.get(f"/api/training/jobs/{job['job_id']}/next-try").json()
    assert found["request"]["training_config"] == {"max_steps": 60, "weight_decay": 1000.0}
    assert [one["setting"] for one in found["changes"]] == ["learning_rate", "lr_scheduler_type"]
    body["training_config"] = {"max_steps": 1}
    done = served.wait(served.post("/api/training/start", body).json()["job_id"])
    refused(served.http.get(f"/api/training/jobs/{done['job_id']}/next-try"), 409, "conflict", "job_id")
