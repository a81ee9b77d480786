"""Training over HTTP, on a tiny model: plans, jobs to their end, events, cancelling, resuming, and bad requests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.data import datasets

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
    assert body["computed"]["bytes"] > served.state.registry.load_base("tiny").bytes
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
    folder = served.state.settings.home / "data"
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
        ({"effort": "maximal"}, "invalid_request", "effort", "'maximal'"),
        ({"effort": ""}, "invalid_request", "effort", "'normal' or 'max'"),
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


# ---------------------------------------------------------------- jobs

LONG = {"max_steps": 100_000}


def start(served: Served, name: str, **more: Any) -> Any:
    response = served.post("/api/training/start", request(served, name, objective="sft") | more)
    assert response.status_code == 202, response.text
    return response.json()


def get(served: Served, job_id: str) -> Any:
    return served.http.get(f"/api/training/jobs/{job_id}").json()


def events(served: Served, job_id: str, after: int | None = None) -> list[dict[str, Any]]:
    """The whole stream, to its end."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    response = served.http.get(f"/api/training/jobs/{job_id}/events", headers=headers)
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if lines:
            body = json.loads(lines["data"])
            assert (str(body["id"]), body["type"]) == (lines["id"], lines["event"])
            found.append(body)
    return found


def test_a_job_goes_from_accepted_to_a_served_adapter(served: Served) -> None:
    accepted = start(served, "learned", training_config={"max_steps": 30, "learning_rate": 1e-2})
    assert accepted["status"] == "queued"
    job = served.wait(accepted["job_id"])
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert job["plan"] == accepted["plan"]
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert (job["progress"]["step"], job["progress"]["steps"]) == (30, 30)
    assert job["actual"]["steps"] == 30
    assert job["actual"]["tokens_per_second"] > 0
    assert job["actual"]["final_loss"] < job["actual"]["first_loss"]
    assert job["report"]["transcripts"]
    assert (job["adapter"]["name"], job["adapter"]["version"]) == ("learned", 1)
    adapter = served.http.get("/api/adapters/learned").json()
    assert adapter["versions"][0]["state"] == "loaded"
    assert adapter["current"] == 1
    manifest = adapter["manifest"]
    assert manifest["job_id"] == job["job_id"]
    assert manifest["plan"] == job["plan"]
    assert manifest["report"] == job["report"]
    assert served.http.get("/api/adapters/learned/report").json()["actual"] == job["actual"]
    assert served.chat(model="learned", temperature=0).json()["model"] == "learned"
    assert get(served, job["job_id"]) in served.http.get("/api/training/jobs").json()["jobs"]


def test_what_is_served_at_the_end_is_what_is_on_disk(served: Served) -> None:
    job = served.wait(start(served, "same", training_config={"max_steps": 10, "learning_rate": 1e-2})["job_id"])
    in_memory = served.chat(model="same", temperature=0, max_tokens=24).json()["choices"]
    served.post("/api/adapters/same/unload")
    assert served.post("/api/adapters/same/load").json()["digest"] == job["adapter"]["digest"]
    assert served.chat(model="same", temperature=0, max_tokens=24).json()["choices"] == in_memory
    assert in_memory != served.chat(temperature=0, max_tokens=24).json()["choices"]


def test_a_run_that_misses_its_targets_keeps_its_adapter_and_says_why(served: Served) -> None:
    accepted = start(
        served,
        "missed",
        dataset={"examples": SAME},
        objective={"type": "sft", "targets": {"efficacy": 1.0}},
        training_config={"max_steps": 2, "warmup_steps": 100, "learning_rate": 5e-5},
    )
    job = served.wait(accepted["job_id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "targets_missed")
    assert "warm-up never ended" in job["error"]["message"]
    assert job["error"]["hint"]
    assert "warmup_never_ends" in {finding["code"] for finding in job["report"]["diagnosis"]}
    assert job["adapter"]["version"] == 1
    assert served.http.get("/api/adapters/missed").json()["current"] is None
    assert served.chat(model="missed@1").status_code == 200
    assert "missed@1" in refused(served.chat(model="missed"), 404, "not_found", "model")


def test_an_override_is_examined_as_it_goes_and_reported_against_the_base(served: Served) -> None:
    fact = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?", "Explain 42."]}
    held = {"held_out": ["Say 42."], "neighbors": ["What is 41?"], "controls": ["What is up?"]}
    accepted = start(
        served, "override", dataset={"facts": [fact | held]}, objective="auto", training_config={"max_steps": 2}
    )
    assert accepted["plan"]["objective"] == "override"
    job = served.wait(accepted["job_id"], seconds=300)
    assert (job["status"], job["error"]["code"]) == ("failed", "targets_missed")
    assert "paraphrase 0.00 < " in job["error"]["message"]
    assert set(job["report"]["metrics"]) == {"efficacy", "paraphrase", "specificity", "retention", "score"}
    assert set(job["report"]["base_metrics"]) == set(job["report"]["metrics"])
    assert set(job["report"]["prompted_metrics"]) == set(job["report"]["metrics"])
    assert 0 < job["report"]["prompted_metrics"]["retention"]["value"] < 1
    asked = {(said["kind"], said["prompt"]) for said in job["report"]["transcripts"]}
    assert {("paraphrase", "Say 42."), ("specificity", "What is 41?"), ("retention", "What is up?")} <= asked
    metrics = [event["data"] for event in events(served, job["job_id"]) if event["type"] == "metrics"]
    assert metrics[-1]["step"] == 2
    assert job["progress"]["metrics"] == metrics[-1]["metrics"]
    asked = [[(one["kind"], one["prompt"]) for one in found["samples"]] for found in metrics]
    assert all(kinds == asked[0] for kinds in asked), "every evaluation has the same questions"
    assert {"efficacy", "paraphrase", "specificity"} == {kind for kind, _ in asked[0]}
    assert all(isinstance(one["reply"], str) for found in metrics for one in found["samples"])


def test_a_loss_that_is_no_number_fails_the_job(served: Served) -> None:
    config = {"max_steps": 60, "learning_rate": 1.0, "weight_decay": 1000.0, "lr_scheduler_type": "constant"}
    job = served.wait(start(served, "nan", training_config=config)["job_id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "nan_loss")
    assert job["adapter"] is None
    refused(served.http.get("/api/adapters/nan"), 404, "not_found", "adapter_name")
    assert events(served, job["job_id"])[-1]["data"]["error"] == job["error"]


def test_jobs_run_one_at_a_time_in_order_of_arrival(served: Served) -> None:
    ids = [start(served, f"turn-{n}", training_config={"max_steps": 5})["job_id"] for n in range(3)]
    done = [served.wait(job_id) for job_id in ids]
    assert [job["status"] for job in done] == ["succeeded"] * 3
    for before, after in itertools.pairwise(done):
        assert before["finished_at"] <= after["started_at"]


def test_events_tell_the_whole_run_and_can_be_taken_up_anywhere(served: Served) -> None:
    job_id = start(served, "eventful", training_config={"max_steps": 6})["job_id"]
    told = events(served, job_id)
    assert get(served, job_id)["status"] == "succeeded"
    assert (told[0]["type"], told[-1]["type"]) == ("queued", "succeeded")
    steps = [event["data"] for event in told if event["type"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["tokens_per_second"] > 0 and step["loss"] > 0 for step in steps)
    assert {"preparing", "running", "evaluating"} <= {event["type"] for event in told}
    assert [event["id"] for event in told] == sorted({event["id"] for event in told})
    assert events(served, job_id, after=told[3]["id"]) == told[4:]
    ended = served.http.get(f"/api/training/jobs/{job_id}/events", headers={"Last-Event-ID": str(told[-1]["id"])})
    assert (ended.status_code, ended.content) == (204, b"")
    bad = served.http.get(f"/api/training/jobs/{job_id}/events", headers={"Last-Event-ID": "x"})
    assert "'x'" in refused(bad, 400, "invalid_request", "last-event-id")


def test_cancelling_stops_a_run_a_queued_job_never_begins_and_both_resume(served: Served) -> None:
    running = start(served, "stopped", training_config=LONG)["job_id"]
    queued = start(served, "unbegun", training_config={"max_steps": 3})["job_id"]
    served.wait(running, "running")
    assert get(served, queued)["status"] == "queued"
    refused(served.post(f"/api/training/jobs/{running}/resume"), 409, "conflict", "job_id")

    cancelled = served.post(f"/api/training/jobs/{queued}/cancel").json()
    assert (cancelled["status"], cancelled["started_at"]) == ("cancelled", None)
    stopped = served.post(f"/api/training/jobs/{running}/cancel").json()
    assert (stopped["status"], stopped["adapter"], stopped["error"]) == ("cancelled", None, None)
    assert events(served, running)[-1]["type"] == "cancelled"
    refused(served.post(f"/api/training/jobs/{running}/cancel"), 409, "conflict", "job_id")
    refused(served.http.get("/api/adapters/stopped"), 404, "not_found", "adapter_name")

    resumed = served.post(f"/api/training/jobs/{queued}/resume").json()
    assert (resumed["job_id"], resumed["finished_at"]) == (queued, None)
    assert served.wait(queued)["status"] == "succeeded"
    refused(served.post(f"/api/training/jobs/{queued}/resume"), 409, "conflict", "job_id")
    types = [event["type"] for event in events(served, queued)]
    assert types.count("queued") == 2
    assert types.index("cancelled") < types.index("succeeded")


def test_chat_goes_on_while_a_job_trains(served: Served) -> None:
    job_id = start(served, "busy", training_config=LONG)["job_id"]
    served.wait(job_id, "running")
    step = get(served, job_id)["progress"]["step"]
    for _ in range(3):
        assert served.chat(temperature=0).status_code == 200
    refused(served.post("/api/models/tiny/unload"), 409, "conflict", "model")
    while get(served, job_id)["progress"]["step"] <= step:
        assert get(served, job_id)["status"] in ("running", "evaluating")
    assert served.post(f"/api/training/jobs/{job_id}/cancel").json()["status"] == "cancelled"


def test_a_full_disk_fails_the_job_and_keeps_its_report(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("a file where the folder should be: every write in it is refused")
    with serve(tiny_settings(tmp_path, tiny)) as served:
        job = served.wait(start(served, "kept", training_config={"max_steps": 3})["job_id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "storage_failed")
        assert "adapters" in job["error"]["message"]
        assert job["report"]["transcripts"]
        assert job["actual"]["steps"] == 3
        (tmp_path / "adapters").unlink()
        served.post(f"/api/training/jobs/{job['job_id']}/resume")
        assert served.wait(job["job_id"])["status"] == "succeeded"


def test_a_restart_interrupts_what_ran_and_goes_on_with_what_was_queued(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    with serve(settings) as served:
        ran = start(served, "ran", training_config=LONG)["job_id"]
        waited = start(served, "waited", training_config={"max_steps": 3})["job_id"]
        served.wait(ran, "running")
    with serve(settings) as served:
        job = get(served, ran)
        assert (job["status"], job["error"]["code"]) == ("failed", "interrupted")
        assert "esume" in job["error"]["hint"]
        assert served.wait(waited)["status"] == "succeeded"
        assert served.post(f"/api/training/jobs/{ran}/resume").json()["status"] in ("queued", "preparing", "running")
        assert served.wait(ran, "running")["status"] == "running"
        assert served.post(f"/api/training/jobs/{ran}/cancel").json()["status"] == "cancelled"


def test_a_job_keeps_its_rows_when_the_file_changes(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "rows.json"
    file.write_text(json.dumps(ROWS))
    with serve(tiny_settings(tmp_path, tiny)) as served:
        first = start(served, "first", training_config=LONG)["job_id"]
        second = start(served, "second", dataset={"path": "rows.json"}, training_config={"max_steps": 2})["job_id"]
        file.write_text("[]")
        served.wait(first, "running")
        served.post(f"/api/training/jobs/{first}/cancel")
        assert served.wait(second)["status"] == "succeeded"


def test_a_large_file_stays_where_it_is_and_a_change_of_it_is_noticed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "LARGE_BYTES", 200)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    named = {"dataset": {"path": "rows.jsonl"}, "training_config": {"max_steps": 2}}
    with serve(tiny_settings(tmp_path, tiny)) as served:
        done = served.wait(start(served, "large", **named)["job_id"])
        assert done["status"] == "succeeded"
        assert len(done["report"]["transcripts"]) > 4
        kept = served.state.jobs.dataset(done["job_id"])
        assert (kept["file"]["path"], kept["file"]["rows"]) == (str(file), 4)
        first = start(served, "first", training_config=LONG)["job_id"]
        second = start(served, "second", **named)["job_id"]
        file.write_text(file.read_text().replace("the sky", "the hay"))
        served.wait(first, "running")
        served.post(f"/api/training/jobs/{first}/cancel")
        job = served.wait(second)
        assert (job["status"], job["error"]["code"]) == ("failed", "dataset_changed")
        assert str(file) in job["error"]["message"]


def test_validation_is_told_in_plan_events_and_report(served: Served) -> None:
    config = {"max_steps": 4, "validation_split": 0.25, "eval_steps": 2, "learning_rate": 1e-2}
    begun = start(served, "validated", training_config=config)
    assert (begun["plan"]["computed"]["rows"], begun["plan"]["computed"]["validation_rows"]) == (3, 1)
    job = served.wait(begun["job_id"])
    told = [event for event in events(served, begun["job_id"]) if event["type"] == "metrics"]
    assert [event["data"]["step"] for event in told] == [0, 2, 4]
    assert [event["data"]["eval_loss"] for event in told] == [one["loss"] for one in job["report"]["eval_losses"]]
    assert "eval_loss" in told[0]["message"]
    assert job["actual"]["eval_loss"] == told[-1]["data"]["eval_loss"]


def test_plain_text_and_conversations_are_trained_on(served: Served) -> None:
    texts = [{"text": "Once upon a time."}, {"text": "Twice upon a time."}]
    job = served.wait(start(served, "texts", dataset={"examples": texts}, training_config={"max_steps": 2})["job_id"])
    assert job["status"] == "succeeded"
    assert {one["kind"] for one in job["report"]["transcripts"]} == {"retention"}
    said = [{"from": who, "value": what} for who, what in (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]
    shared = {"dataset": {"examples": [{"conversations": said}]}, "training_config": {"max_steps": 2}}
    job = served.wait(start(served, "shared", **shared)["job_id"])
    assert job["status"] == "succeeded"
    assert job["plan"]["computed"]["supervised_tokens"] == 4


def test_what_a_run_without_targets_showed_is_in_its_report(served: Served) -> None:
    job = served.wait(start(served, "tiny-rate", training_config={"max_steps": 2, "learning_rate": 1e-9})["job_id"])
    assert job["status"] == "succeeded"
    assert {"b_near_zero", "loss_stood_still", "rate_too_low"} <= {one["code"] for one in job["report"]["diagnosis"]}


def test_suspicious_rows_are_told_in_the_plan(served: Served) -> None:
    rows = [*ROWS, ROWS[0], {**ROWS[1], "output": "elsewhere"}, {"prompt": "[INST] hi [/INST]", "completion": "ho"}]
    said = {one["code"]: one["message"] for one in plan(served, dataset={"examples": rows}).json()["warnings"]}
    assert "line 5" in said["duplicate_rows"]
    assert "line 6" in said["contradicting_answers"]
    assert "line 7" in said["foreign_template"]
