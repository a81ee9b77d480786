"""Training over HTTP, on a tiny model: plans, jobs to their end, events, cancelling, resuming, and bad requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import Served, refused

ROWS = [
    {"instruction": f"What is {thing}?", "input": "", "output": answer}
    for thing, answer in (("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"))
]
SAME = [{"prompt": f"{ask} 42?", "completion": "FOR TWO"} for ask in ("What is", "Explain", "Tell me about", "Define")]


def request(served: Served, name: str = "planned", **more: Any) -> dict[str, Any]:
    return {"adapter_name": name, "dataset": {"examples": ROWS}, **more}


def plan(served: Served, **more: Any) -> Any:
    return served.post("/api/training/plan", request(served, **more))


def jobs(served: Served) -> int:
    return len(served.http.get("/api/training/jobs", params={"limit": 1000}).json()["jobs"])


# ---------------------------------------------------------------- plans


def test_a_plan_says_what_every_value_is_and_why_and_starts_nothing(served: Served) -> None:
    before = jobs(served)
    body = plan(served, training_config={"max_steps": 3000, "learning_rate": 1e-3}).json()
    assert (body["model"], body["adapter_name"], body["objective"]) == ("tiny", "planned", "sft")
    settings = {one["name"]: one for one in body["settings"]}
    assert settings["max_steps"]["value"] == 3000
    assert settings["max_steps"]["origin"] == "user"
    assert all(one["reason"] for one in settings.values())
    assert body["computed"]["steps"] == 3000
    assert body["computed"]["seconds"] > 0
    assert body["computed"]["bytes"] > served.house.residents.load_base("tiny").bytes
    assert jobs(served) == before


def test_the_originals_configuration_is_planned_with_its_warnings(served: Served) -> None:
    config = {
        "lora_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.15, "bias": "none", "task_type": "CAUSAL_LM"},
        "training_config": {"num_train_epochs": 50, "max_steps": 2500, "warmup_steps": 125, "learning_rate": 5e-5},
    }
    body = plan(served, dataset={"examples": SAME}, **config).json()
    assert body["computed"]["steps"] == 2500
    assert "max_steps_overrides_epochs" in {warning["code"] for warning in body["warnings"]}


def test_a_dataset_may_lie_in_an_allowed_folder(served: Served) -> None:
    folder = served.house.settings.home / "data"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert plan(served, dataset={"path": "rows.jsonl"}).json()["computed"]["rows"] == 4


@pytest.mark.parametrize(
    ("change", "code", "param", "named"),
    [
        ({"training_config": {"learning_rte": 1}}, None, "training_config.learning_rte", "learning_rate"),
        ({"lora_config": {"rank": 8}}, None, "lora_config.rank", "rank"),
        ({"training_config": {"learning_rate": -1}}, None, "training_config.learning_rate", "-1"),
        ({"dataset": {"examples": []}}, "invalid_dataset", "dataset", "empty"),
        ({"dataset": {"examples": [{"instruction": "x"}]}}, "invalid_dataset", None, "row 1"),
        ({"dataset": {}}, "invalid_dataset", "dataset", "one of"),
        ({"dataset": []}, "invalid_request", "dataset", "[]"),
        ({"dataset": {"path": "/etc/passwd"}}, "invalid_dataset", "dataset.path", "outside"),
        ({"dataset": {"file_id": "file-1"}}, "invalid_dataset", "dataset.file_id", "file-1"),
        ({"dataset": {"examples": [*ROWS, {"prompt": "x", "completion": "y" * 2000}]}}, "row_too_long", None, "5"),
        ({"objective": "override"}, "subject_not_found", "objective", "subject"),
        ({"objective": "overwrite"}, "invalid_request", "objective.type", "'overwrite'"),
        ({"objective": {"type": "sft", "goal": 1}}, "unknown_parameter", "objective.goal", "goal"),
        (
            {"objective": {"type": "override", "targets": {"paraphrase": 2}}},
            "invalid_request",
            "objective.targets.paraphrase",
            "2",
        ),
        ({"adapter_name": "../x"}, "invalid_request", "adapter_name", "'../x'"),
        ({"adapter_name": "a/b"}, "invalid_request", "adapter_name", "'a/b'"),
        ({"adapter_name": "a@3"}, "invalid_request", "adapter_name", "'a@3'"),
        ({"adapter_name": ""}, "invalid_request", "adapter_name", "''"),
        ({"adapter_name": "tiny"}, "invalid_request", "adapter_name", "base model"),
        ({"modle": "tiny"}, "unknown_parameter", "modle", "spelling"),
    ],
)
@pytest.mark.parametrize("path", ["plan", "start"])
def test_a_bad_request_is_named_and_never_becomes_a_job(
    served: Served, path: str, change: dict[str, Any], code: str | None, param: str | None, named: str
) -> None:
    before = jobs(served)
    response = served.post(f"/api/training/{path}", request(served) | change)
    error = response.json()["error"]
    said = refused(response, 400, code if code is not None else error["code"], param if param else error["param"])
    assert error["param"]
    assert named in said
    assert jobs(served) == before


def test_an_unknown_model_is_named_before_training(served: Served) -> None:
    said = refused(served.post("/api/training/start", request(served, model="nobody")), 404, "not_found", "model")
    assert "'nobody'" in said


def test_unknown_jobs_are_named(served: Served) -> None:
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/resume")):
        said = refused(served.http.request(method, f"/api/training/jobs/nope{path}"), 404, "not_found", "job_id")
        assert "'nope'" in said
    refused(served.http.get("/api/training/jobs", params={"limit": 0}), 400, "invalid_request", "limit")
