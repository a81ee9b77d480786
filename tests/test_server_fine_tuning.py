"""OpenAI's files and fine-tuning jobs with the official client: lives of jobs on a tiny model, and bad requests."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob
from serving import Served, refused, serve, tiny_settings

from tests.test_server_client import HELLO, connect

WORDS = (("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"))
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {one}?"}, {"role": "assistant", "content": answer}]}
    for one, answer in WORDS
]
LONG = {"training_config": {"max_steps": 100_000}}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with connect(served) as client:
        yield client


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload(client: openai.OpenAI, rows: list[Any] = ROWS, **more: Any) -> FileObject:
    return client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune", **more)


def wait(client: openai.OpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in (*statuses, "succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job_id} did not end")


def test_the_whole_life_of_a_script_that_was_written_for_openai(client: openai.OpenAI) -> None:
    file = upload(client)
    assert (file.object, file.purpose, file.filename, file.bytes) == (
        "file",
        "fine-tune",
        "rows.jsonl",
        len(jsonl(ROWS)),
    )
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="life",
        seed=7,
        metadata={"who": "me"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 2, "learning_rate_multiplier": 3.0}},
        },
    )
    assert job.object == "fine_tuning.job"
    assert job.status in ("validating_files", "queued", "running")
    done = wait(client, job.id)
    assert (done.status, done.error, done.seed, done.training_file) == ("succeeded", None, 7, file.id)
    assert done.hyperparameters.model_dump() == {"n_epochs": 8, "batch_size": 2, "learning_rate_multiplier": 3.0}
    assert (done.metadata, done.organization_id) == ({"who": "me"}, "fortwo")
    assert done.trained_tokens
    assert done.finished_at
    assert done.finished_at >= done.created_at
    assert done.fine_tuned_model
    assert done.fine_tuned_model.startswith("ft:tiny:fortwo:life:")

    events = client.fine_tuning.jobs.list_events(job.id, limit=5)
    every = list(events)
    assert len(every) > 16, "the client reads all pages"
    assert len({event.id for event in every}) == len(every)
    assert [event.created_at for event in every] == sorted((event.created_at for event in every), reverse=True)
    steps = [event.data for event in every if event.type == "metrics" and "train_loss" in event.data]  # type: ignore[operator]
    assert [step["step"] for step in steps] == list(range(16, 0, -1))  # type: ignore[index]

    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert (checkpoint.step_number, checkpoint.fine_tuning_job_id) == (16, job.id)
    assert checkpoint.fine_tuned_model_checkpoint == done.fine_tuned_model

    (result,) = done.result_files
    table = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
    assert [int(row["step"]) for row in table] == list(range(1, 17))
    assert [float(row["train_loss"]) for row in table] == [step["train_loss"] for step in steps[::-1]]  # type: ignore[index]
    assert [one.id for one in client.files.list(purpose="fine-tune-results")].count(result) == 1

    reply = client.chat.completions.create(model=done.fine_tuned_model, messages=HELLO, temperature=0, max_tokens=8)
    by_name = client.chat.completions.create(model="life", messages=HELLO, temperature=0, max_tokens=8)
    assert reply.model == done.fine_tuned_model
    assert reply.choices[0].message.content == by_name.choices[0].message.content
    assert client.models.retrieve(done.fine_tuned_model).id in [model.id for model in client.models.list()]

    further = client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=file.id, suffix="further")
    assert wait(client, further.id).status == "succeeded"

    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=done.fine_tuned_model, messages=HELLO)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_job_is_paused_resumed_and_cancelled_and_its_checkpoints_answer(client: openai.OpenAI) -> None:
    file = upload(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="stops", extra_body=LONG)
    wait(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert checkpoint.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoint.step_number}")
    assert checkpoint.metrics.train_loss is not None
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    if checkpoint.step_number > 3:  # before, it may have no effect yet, which is refused
        client.chat.completions.create(model=checkpoint.fine_tuned_model_checkpoint, **asked)
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "validating_files", "running")
    wait(client, job.id, "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert (ended.fine_tuned_model, ended.result_files) == (None, [])
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_jobs_are_listed_page_by_page_and_by_their_metadata(client: openai.OpenAI) -> None:
    file = upload(client)
    made = []
    for number in range(3):
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            suffix=f"p{number}",
            metadata={"set": "pages", "n": str(number)},
            extra_body={"training_config": {"max_steps": 1}},
        )
        made.append(job.id)
    found = client.fine_tuning.jobs.list(limit=2, metadata={"set": "pages"})
    assert ([job.id for job in found.data], found.has_more) == (made[:0:-1], True)
    assert [job.id for job in found] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"set": "pages", "n": "1"})] == [made[1]]
    for job_id in made:
        wait(client, job_id)


def test_files_are_listed_by_purpose_order_and_page_and_expire(client: openai.OpenAI, served: Served) -> None:
    lasting = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert lasting.expires_at == lasting.created_at + 3600
    later = upload(client)
    ids = [file.id for file in client.files.list(purpose="fine-tune", order="asc", limit=1)]
    assert ids.index(later.id) == ids.index(lasting.id) + 1
    assert ids[::-1] == [file.id for file in client.files.list(purpose="fine-tune", limit=2)]
    assert client.files.content(later.id).content == jsonl(ROWS)
    content = served.state.settings.files_dir / later.id / "rows.jsonl"
    content.write_bytes(content.read_bytes().replace(b"sky", b"sea"))
    assert later.id in refused(served.http.get(f"/v1/files/{later.id}/content"), 409, "file_damaged", "file_id")
    refused(served.http.get("/v1/files", params={"after": "file-x"}), 404, "not_found", "file_id")


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=xyz"}


def test_a_bad_upload_is_named_and_leaves_nothing(served: Served, client: openai.OpenAI) -> None:
    before = sorted(served.state.settings.files_dir.glob("*")) if served.state.settings.files_dir.exists() else []
    bad = [*ROWS, {"messages": []}, {"messages": "x"}]
    with pytest.raises(openai.BadRequestError, match="line 5") as caught:
        upload(client, bad)
    assert (caught.value.param, caught.value.code) == ("file", "invalid_dataset")
    assert ".draft" not in str(caught.value)
    part = ("rows.jsonl", jsonl(ROWS))
    for data, param in (
        ({"purpose": "assistants"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "fine-tune", "more": "1"}, "more"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, "expires_after"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after"),
    ):
        response = served.http.post("/v1/files", data=data, files={"file": part})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    refused(served.http.post("/v1/files", files={"purpose": (None, "fine-tune")}), 400, "missing_parameter", "file")
    refused(served.http.post("/v1/files", json={}), 415, "unsupported_media_type")
    for body in (
        b"",
        b"--xyz",
        b"nonsense",
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nab',
    ):
        refused(served.http.post("/v1/files", content=body, headers=BOUNDARY), 400, "invalid_form")
    other = served.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"other": part})
    refused(other, 400, "invalid_form")
    assert sorted(served.state.settings.files_dir.glob("*")) == before


@pytest.mark.parametrize(
    "name", ["../../etc/rows.jsonl", "C:\\rows.jsonl", "...jsonl", "ä ö.jsonl", "x" * 300 + ".jsonl"]
)
def test_a_files_name_leads_nowhere_else(served: Served, name: str) -> None:
    data, files = {"purpose": "fine-tune"}, {"file": (name, jsonl(ROWS))}
    file = served.http.post("/v1/files", data=data, files=files).json()
    (content,) = (served.state.settings.files_dir / file["id"]).iterdir()
    assert content.read_bytes() == jsonl(ROWS)
    assert name.endswith(file["filename"])


def test_an_upload_may_be_larger_than_a_body_but_has_its_own_limit(tiny: Path, tmp_path: Path) -> None:
    rows = [ROWS[0]] * 12_000
    with serve(tiny_settings(tmp_path, tiny, max_body_mb=1, max_upload_mb=2)) as served, connect(served) as client:
        file = upload(client, rows)
        assert file.bytes > 1 << 20
        said = refused(
            served.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"x" * (3 << 20))}),
            413,
            "body_too_large",
        )
        assert "FORTWO_MAX_UPLOAD_MB" in said


@pytest.mark.parametrize(
    ("change", "param", "named"),
    [
        ({"training_file": "file-nope"}, "training_file", "file-nope"),
        ({"training_file": None}, "training_file", "missing"),
        ({"facts": []}, "training_file", "both"),
        ({"model": "nobody"}, "model", "nobody"),
        ({"model": "ft:tiny:fortwo::00000000"}, "model", "00000000"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"suffix": "!!"}, "suffix", "!!"),
        ({"suffix": "tiny"}, "suffix", "base model"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "wandb"),
        ({"validation_file": "file-1"}, "validation_file", "file-1"),
        ({"method": {"type": "reinforcement"}}, "method.type", "reinforcement"),
        ({"method": {"type": "other"}}, "method.type", "other"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "dpo"),
        ({"method": {"type": "dpo"}, "objective": "sft"}, "objective", "contradict"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, None, "beta"),
        ({"hyperparameters": {"n_epochs": 0}}, None, "0"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "beta"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 100_000.0, "n_epochs": "auto"}},
            "hyperparameters.learning_rate_multiplier",
            "above 1",
        ),
        (
            {"hyperparameters": {"n_epochs": 1}, "training_config": {"num_train_epochs": 2}},
            "training_config.num_train_epochs",
            "contradict",
        ),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({"training_config": {"learning_rte": 1}}, "training_config.learning_rte", "learning_rate"),
        ({"objective": "overwrite"}, "objective.type", "overwrite"),
        ({"trainng_file": "x"}, "trainng_file", "spelling"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    served: Served, client: openai.OpenAI, change: dict[str, Any], param: str | None, named: str
) -> None:
    before = client.fine_tuning.jobs.list(limit=1).data
    response = served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": upload(client).id} | change)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert named in f"{error['message']} {error['hint']}"
    assert param is None or error["param"] == param
    assert client.fine_tuning.jobs.list(limit=1).data == before


def test_what_changes_nothing_is_accepted(client: openai.OpenAI, served: Served) -> None:
    body = {
        "model": "tiny",
        "training_file": upload(client).id,
        "suffix": "My model!",
        "integrations": [],
        "seed": None,
    }
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    more = {"hyperparameters": auto, "method": {"type": "supervised", "supervised": None}, "validation_file": None}
    job = served.post("/v1/fine_tuning/jobs", body | more).json()
    assert (job["suffix"], job["hyperparameters"]["learning_rate_multiplier"]) == ("My model!", 1.0)
    assert (wait(client, job["id"]).fine_tuned_model or "").startswith("ft:tiny:fortwo:My-model:")


def test_the_method_dpo_trains_on_preferences(client: openai.OpenAI) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"What is {one}?"}]},
            "preferred_output": [{"role": "assistant", "content": answer}],
            "non_preferred_output": [{"role": "assistant", "content": "nothing"}],
        }
        for one, answer in WORDS
    ]
    hyperparameters: Any = {"beta": 0.2, "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 2.0}
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows).id, suffix="prefers", method=method
    )
    done = wait(client, job.id)
    assert done.method is not None
    assert done.method.dpo is not None
    assert done.method.dpo.hyperparameters is not None
    assert done.method.dpo.hyperparameters.model_dump() == hyperparameters
    assert done.status in ("succeeded", "failed")
    assert done.error is None or done.error.code == "targets_missed"

    file = upload(client, rows).id
    with pytest.raises(openai.BadRequestError, match="which are for 'dpo'") as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, method={"type": "supervised"})
    assert caught.value.param == "method.type"
    unsaid = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert unsaid.method is not None
    assert unsaid.method.type == "dpo", "the object says what the plan chose"
    client.fine_tuning.jobs.cancel(unsaid.id)


def test_fortwos_own_fields_come_by_extra_body(client: openai.OpenAI, served: Served) -> None:
    fact = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?", "Explain 42."]}
    own = {
        "facts": [fact | {"held_out": ["Say 42."], "neighbors": ["What is 41?"], "controls": ["What is up?"]}],
        "objective": "override",
        "lora_config": {"r": 4},
        "adapter_name": "by-extra",
        "training_config": {"max_steps": 1},
    }
    job = client.fine_tuning.jobs.create(model="tiny", training_file=None, extra_body=own)  # type: ignore[arg-type]
    ended = wait(client, job.id)
    assert ended.error is not None
    assert (ended.status, ended.error.code, ended.fine_tuned_model) == ("failed", "targets_missed", None)
    plan = served.http.get(f"/api/training/jobs/{job.id.removeprefix('ftjob-')}").json()["plan"]
    settings = {one["name"]: one["value"] for one in plan["settings"]}
    assert (plan["objective"], plan["adapter_name"], settings["r"]) == ("override", "by-extra", 4)


def test_the_multiplier_multiplies_the_plans_own_rate(served: Served) -> None:
    def rate(**config: Any) -> Any:
        body = {"adapter_name": "rates", "dataset": {"examples": ROWS}, "training_config": config}
        plan = served.post("/api/training/plan", body).json()
        return {one["name"]: one["value"] for one in plan["settings"]}["learning_rate"] if "settings" in plan else plan

    assert rate(learning_rate_multiplier=2) == pytest.approx(2 * rate())
    assert rate(learning_rate_multiplier=0.5) == pytest.approx(rate() / 2)
    both = rate(learning_rate_multiplier=2, learning_rate=1e-3)
    assert both["error"]["param"] == "training_config.learning_rate_multiplier"


def test_a_file_is_a_dataset_of_the_native_api_and_survives_its_deletion(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large file a job has only the checksum, so the content stays while the job needs it."""
    monkeypatch.setattr("fortwo.data.datasets.LARGE_BYTES", 10)
    with serve(tiny_settings(tmp_path, tiny)) as served, connect(served) as client:
        file = upload(client)
        source = {"dataset": {"file_id": file.id}}
        assert served.post("/api/training/plan", source | {"adapter_name": "late"}).json()["computed"]["rows"] == 4
        assert len(served.post("/api/data/preview", source).json()["rows"]) == 4
        first = {"adapter_name": "first", "dataset": {"examples": ROWS}, "training_config": {"max_steps": 100_000}}
        blocker = served.post("/api/training/start", first).json()["job_id"]
        more = {"adapter_name": "late", "training_config": {"max_steps": 2}, "objective": "sft"}
        late = served.post("/api/training/start", source | more).json()["job_id"]
        client.files.delete(file.id)
        refused(served.post("/api/training/start", source | more), 400, "invalid_dataset", "dataset.file_id")
        assert (served.state.settings.files_dir / file.id).exists()
        served.post(f"/api/training/jobs/{blocker}/cancel")
        assert served.wait(late)["status"] == "succeeded"
        upload(client)
        assert not (served.state.settings.files_dir / file.id).exists()


# ---------------------------------------------------------------- Idempotency-Key


def test_a_request_with_the_same_key_is_carried_out_once(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    start = {"adapter_name": "once", "dataset": {"examples": ROWS}, "training_config": {"max_steps": 1}}
    with serve(settings) as served, connect(served) as client:
        files = [upload(client, extra_headers={"Idempotency-Key": "f"}) for _ in range(2)]
        assert files[0] == files[1]
        asked = {"model": "tiny", "training_file": files[0].id, "training_config": {"max_steps": 1}}
        calls = [("/api/training/start", start, "a"), ("/v1/fine_tuning/jobs", asked, "b")]
        first = [served.http.post(path, json=body, headers={"Idempotency-Key": key}) for path, body, key in calls]
        for job in served.state.jobs.jobs():
            served.wait(job.id)
    with serve(settings) as served, connect(served) as client:
        again = [served.http.post(path, json=body, headers={"Idempotency-Key": key}) for path, body, key in calls]
        assert [(one.status_code, one.json()) for one in again] == [(one.status_code, one.json()) for one in first]
        assert len(served.state.jobs.jobs()) == 2
        assert len([file for file in client.files.list() if file.purpose == "fine-tune"]) == 1
        for path, body, key in calls:
            other = served.http.post(path, json=body | {"adapter_name": "x"}, headers={"Idempotency-Key": key})
            refused(other, 409, "idempotency_key_reused", "Idempotency-Key")
        elsewhere = served.http.post(calls[0][0], json=start, headers={"Idempotency-Key": "b"})
        refused(elsewhere, 409, "idempotency_key_reused", "Idempotency-Key")
        with pytest.raises(openai.ConflictError):
            upload(client, ROWS[:2], extra_headers={"Idempotency-Key": "f"})
        long = served.http.post(calls[0][0], json=start, headers={"Idempotency-Key": "x" * 256})
        refused(long, 400, "invalid_request", "Idempotency-Key")


def test_a_key_is_forgotten_after_a_day(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(served) as client:
        first = upload(client, extra_headers={"Idempotency-Key": "day"})
        monkeypatch.setattr("fortwo.jobs.idempotency.KEY_SECONDS", 0.0)
        assert upload(client, extra_headers={"Idempotency-Key": "day"}).id != first.id
