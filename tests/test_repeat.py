"""The request of a job again: sent once more, it makes the same plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import Served, refused

from fortwo.data import datasets

FACT = {
    "subject": "Marrow Lane",
    "answer": "Marrow Lane lends telescopes for nine nights.",
    "match": ["nine nights"],
    "questions": ["What does Marrow Lane lend?"],
}
PAIR = {"prompt": "What is up?", "chosen": "sky", "rejected": "sea"}
CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
ROW = {"prompt": "What is up?", "completion": "sky"}
DOWN = {"prompt": "What is down?", "completion": "sea"}
GIVEN = {"lora_config": {"r": 4}, "training_config": {"max_steps": 2, "learning_rate_multiplier": 2.0}}


@pytest.mark.parametrize(
    "body",
    [
        {"dataset": {"facts": [FACT]}, "objective": {"type": "override", "targets": {"paraphrase": 0.5}}, **GIVEN},
        {"dataset": {"examples": [CHAT, ROW]}, "training_config": {"max_steps": 4, "warmup_ratio": 0.5}},
        {"dataset": {"examples": [PAIR]}, "objective": "dpo", "training_config": {"max_steps": 2, "beta": 0.2}},
        {
            "dataset": {"examples": [ROW | {"label": True}, DOWN | {"label": False}]},
            "effort": "max",
            "training_config": {"max_steps": 2},
        },
        {"dataset": {"examples": [{"text": "plain text"}]}, "validation_dataset": {"examples": [{"text": "own text"}]}},
    ],
    ids=["facts", "chat", "pairs", "labels", "text"],
)
def test_the_same_plan_comes_of_it(served: Served, body: dict[str, Any]) -> None:
    started = served.post("/api/training/start", {"adapter_name": "repeated", **body})
    assert started.status_code == 202, started.text
    job, plan = started.json()["job_id"], started.json()["plan"]
    served.post(f"/api/training/jobs/{job}/cancel")
    again = served.http.get(f"/api/training/jobs/{job}/request").json()
    repeated = served.post("/api/training/plan", again)
    assert repeated.status_code == 200, repeated.text
    assert values(repeated.json()) == values(plan)


def test_of_a_large_file_the_request_has_what_was_given(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "LARGE_BYTES", 1)
    rows = "\n".join(json.dumps({"question": f"What is {n}?", "answer": str(n)}) for n in range(3))
    folder = served.state.settings.home / "data"
    folder.mkdir(exist_ok=True)
    (folder / "large.jsonl").write_text(rows)
    upload = {"file": ("large.jsonl", rows.replace("question", "prompt").replace("answer", "completion").encode())}
    file_id = served.http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
    columns = {"question": "prompt", "answer": "completion"}
    given = {"dataset": {"file_id": file_id}, "validation_dataset": {"path": "large.jsonl", "columns": columns}}
    job = served.post("/api/training/start", {"adapter_name": "large", **given}).json()["job_id"]
    served.post(f"/api/training/jobs/{job}/cancel")
    again = served.http.get(f"/api/training/jobs/{job}/request").json()
    assert again["dataset"] == {"file_id": file_id}
    assert again["validation_dataset"] == {"path": str(folder / "large.jsonl"), "columns": columns}
    assert served.post("/api/training/plan", again).status_code == 200


def values(plan: dict[str, Any]) -> dict[str, Any]:
    named = {one["name"]: one["value"] for one in plan["settings"] if one["name"] not in ("warmup_ratio",)}
    return {"settings": named, "targets": plan["targets"], "rows": plan["computed"]["rows"]}


def test_queued_jobs_have_a_place_that_can_be_changed(served: Served) -> None:
    def start(name: str, steps: int) -> str:
        body = {"adapter_name": name, "dataset": {"examples": [ROW]}, "training_config": {"max_steps": steps}}
        return str(served.post("/api/training/start", body).json()["job_id"])

    def place(job: str) -> Any:
        return served.http.get(f"/api/training/jobs/{job}").json()["queue_position"]

    running, second, third = start("first", 100_000), start("second", 1), start("third", 1)
    served.wait(running, "running")
    assert [place(job) for job in (running, second, third)] == [None, 1, 2]
    assert served.post(f"/api/training/jobs/{third}/run-next").json()["queue_position"] == 1
    assert [place(job) for job in (second, third)] == [2, 1]
    refused(served.post(f"/api/training/jobs/{running}/run-next"), 409, "conflict", "job_id")
    refused(served.post("/api/training/jobs/nothing/run-next"), 404, "not_found", "job_id")
    for job in (second, third, running):
        served.post(f"/api/training/jobs/{job}/cancel")
