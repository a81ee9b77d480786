"""A dataset of validation rows: checked and counted as the training rows are, evaluated, and never trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import torch.nn.functional as F

from fortwo.data import datasets
from fortwo.errors import InvalidDataset, InvalidRequest, TrainingFailed
from fortwo.records import Dataset, Example, Fact, Message, Plan, Stepped
from fortwo.train.dataset_stats import AffectedLines, DatasetWarnings, ValidationStats, shared_rows
from fortwo.train.estimate import BaseFacts, Machine, RowLength, TokenCounts
from fortwo.train.migration import migrate
from fortwo.train.options import parse_settings
from fortwo.train.plan import resolve, training_rows
from fortwo.train.request import TrainingRequest
from tests.serving import Served, refused
from tests.test_checkpoints import figures, on_disk, run
from tests.test_loop import ROWS, School, plain_hidden, same, school
from tests.test_plan import BASE, MACHINE, counted, examples_42, mixed, setting, warned
from tests.test_resume import call, until
from tests.test_server_fine_tuning import ROWS as TRAINING
from tests.test_server_fine_tuning import client, upload, wait
from tests.test_server_preferences import PAIRS
from tests.test_server_training import events, start
from tests.test_validation import evaluations

__all__ = ["client", "school"]

SOURCE: dict[str, Any] = {"path": "v.jsonl"}


def told(question: str, answer: str, line: int = 0) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), line)


def pairs(rows: int) -> Dataset:
    made = (
        Example(
            (Message("user", f"{n}?"), Message("assistant", "a")),
            n + 1,
            None,
            (Message("user", f"{n}?"), Message("assistant", "b")),
        )
        for n in range(rows)
    )
    return Dataset("2" * 64, tuple(made))


def labelled(rows: int) -> Dataset:
    made = (replace(told(f"{n}?", "a", n + 1), label=n % 2 == 0) for n in range(rows))
    return Dataset("3" * 64, tuple(made))


def lengths(rows: Iterable[Example], size: int = 25) -> TokenCounts:
    return TokenCounts(tuple(RowLength(side.line, 36, size) for row in rows for side in row.sides), prefix=24)


def plan(dataset: Dataset, validation: Dataset, stats: ValidationStats | None = None, **request: Any) -> Plan:
    body = {"adapter_name": "a", "dataset": {"path": "x"}, "validation_dataset": SOURCE}
    if stats is None:
        stats = ValidationStats(lengths(training_rows(validation)))
    asked, counts = TrainingRequest.model_validate(body | request), lengths(training_rows(dataset))
    return resolve(asked, replace(dataset, validation=validation), BASE, counts, MACHINE, validation=stats)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("dataset", "validation", "objective"),
    [
        (mixed(50), mixed(7), "sft"),
        (pairs(50), pairs(7), "dpo"),
        (pairs(50), pairs(7), "orpo"),
        (labelled(50), labelled(7), "kto"),
    ],
)
def test_its_rows_are_the_validation_rows_and_every_other_row_is_trained_on(
    dataset: Dataset, validation: Dataset, objective: str
) -> None:
    made = plan(dataset, validation, objective=objective, training_config={"per_device_train_batch_size": 5})
    assert (made.computed["rows"], made.computed["validation_rows"]) == (50, 7)
    assert made.computed["steps_per_epoch"] == 10
    assert setting(made, "validation_split") == (0.0, "auto")
    assert setting(made, "eval_strategy") == ("epoch", "auto")
    assert setting(made, "eval_steps") == (10, "auto")
    often = plan(
        dataset, validation, objective=objective, training_config={"per_device_train_batch_size": 5, "eval_steps": 1}
    )
    assert often.computed["exam_seconds"] > made.computed["exam_seconds"] > 0


def test_pairs_validate_kto_as_two_answers_each() -> None:
    assert plan(labelled(50), pairs(7), objective="kto").computed["validation_rows"] == 14


def test_settings_that_need_validation_rows_have_them() -> None:
    made = plan(mixed(20), mixed(5), training_config={"early_stopping_patience": 2, "validation_split": 0})
    assert (made.computed["rows"], made.computed["validation_rows"]) == (20, 5)
    assert setting(made, "load_best_model_at_end") == (True, "auto")
    for config in ({"eval_steps": 3}, {"eval_strategy": "steps"}, {"load_best_model_at_end": True}):
        assert plan(mixed(20), mixed(5), training_config=config).computed["validation_rows"] == 5


@pytest.mark.parametrize(
    ("config", "param"),
    [({"validation_split": 0.1}, "validation_split"), ({"eval_strategy": "no"}, "eval_strategy")],
)
def test_what_contradicts_it_is_refused_with_both_names(config: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="and validation_dataset contradict each other") as caught:
        plan(mixed(20), mixed(5), training_config=config)
    assert caught.value.param == f"training_config.{param}"


FACTS = Dataset("1" * 64, facts=(Fact("42", "FOR TWO", ("FOR TWO",), ("What is 42?", "Explain 42.")),))


@pytest.mark.parametrize(
    ("dataset", "validation", "objective", "named"),
    [
        (FACTS, mixed(2), "auto", "evaluates on prompts"),
        (examples_42(), mixed(2), "override", "evaluates on prompts"),
        (mixed(9), FACTS, "sft", "has facts"),
        (mixed(9), pairs(2), "auto", "rows with a chosen and a rejected answer"),
        (pairs(9), mixed(2), "auto", "examples without preferences"),
        (pairs(9), labelled(2), "orpo", "answers with a label"),
        (labelled(9), mixed(2), "kto", "examples without preferences"),
    ],
)
def test_rows_that_have_no_loss_with_the_objective_are_refused(
    dataset: Dataset, validation: Dataset, objective: str, named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        plan(dataset, validation, objective=objective)
    assert caught.value.param == "validation_dataset"
    assert caught.value.hint


def test_examples_about_one_subject_are_fine_tuned_on_where_validation_is_asked_for() -> None:
    made = plan(examples_42(), mixed(2))
    assert (made.objective, setting(made, "objective")) == ("sft", ("sft", "auto"))
    assert plan(FACTS, mixed(2), objective="sft").computed["validation_rows"] == 2


def test_rows_that_are_too_long_are_told_for_both() -> None:
    dataset, validation = mixed(3), mixed(2)
    stats = ValidationStats(lengths(validation.examples, 5000))
    with pytest.raises(InvalidDataset) as caught:
        plan(dataset, validation, stats)
    assert (caught.value.param, caught.value.code) == ("validation_dataset", "row_too_long")
    assert caught.value.message.startswith("validation_dataset: line 1: prompt (36 tokens) and answer (5000 tokens)")
    asked = TrainingRequest.model_validate(
        {"adapter_name": "a", "dataset": {"path": "x"}, "validation_dataset": SOURCE}
    )
    both, counts = replace(dataset, validation=validation), lengths(dataset.examples, 9000)
    with pytest.raises(InvalidDataset, match=r"9000 tokens.*validation_dataset: line 1.*5000 tokens") as caught:
        resolve(asked, both, BASE, counts, MACHINE, validation=stats)
    assert caught.value.param == "dataset"


def test_rows_in_both_are_found_and_warned_of() -> None:
    trained = [told("a?", "b", 1), told("c?", "d", 2), *pairs(2).examples, *labelled(2).examples]
    validation = [told("a?", "other", 1), told("c?", "d", 2), *pairs(1).examples, *labelled(3).examples[1:]]
    assert shared_rows(validation, trained) == AffectedLines(3, (1, 2, 2))
    assert shared_rows([told("x?", "y")], trained) == AffectedLines()
    stats = ValidationStats(
        counted(mixed(3)), DatasetWarnings(duplicates=AffectedLines(1, (3,))), AffectedLines(1, (2,))
    )
    found = warned(plan(mixed(9), mixed(3), stats))
    assert found["validation_rows_trained_on"].startswith("1 row of validation_dataset (line 2): ")
    assert found["validation_duplicate_rows"].startswith("1 row of validation_dataset (line 3): ")
    assert "duplicate_rows" not in found
    assert not {code for code in warned(plan(mixed(9), mixed(3))) if code.startswith("validation")}


# ---------------------------------------------------------------- stored in a job


def test_a_job_keeps_it_and_a_large_file_that_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(mixed(3), validation=mixed(2))
    assert datasets.from_json(json.loads(json.dumps(datasets.to_json(both)))) == both
    monkeypatch.setattr(datasets, "LARGE_BYTES", 10)
    file = tmp_path / "v.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "a"}) + "\n" for n in range(5)))
    stored = datasets.to_json(replace(mixed(3), validation=datasets.load_file(file)))
    read = datasets.from_json(stored).validation
    assert read is not None
    assert [row.prompt for row in read.examples] == [f"{n}?" for n in range(5)]
    file.write_text("{}")
    with pytest.raises(InvalidDataset) as caught:
        datasets.from_json(stored)
    assert (caught.value.code, caught.value.param) == ("dataset_changed", "validation_dataset.path")


# ---------------------------------------------------------------- migration


@pytest.mark.parametrize(
    "written",
    [
        {"test_datasets": [{"path": "rows/held.jsonl", "type": "chat_template"}]},
        {"eval_dataset": "rows/held.jsonl"},
        {"val_file": "rows/held.jsonl"},
    ],
)
def test_other_programs_names_of_it_are_read(written: dict[str, Any]) -> None:
    config = {"train_file": "rows/a.jsonl", "eval_strategy": "steps", "eval_steps": 50, "val_set_size": 0.1} | written
    found = migrate(config, "a", lambda _: [])
    assert found.request["dataset"] == {"path": "rows/a.jsonl"}
    assert found.request["validation_dataset"] == {"path": "rows/held.jsonl"}
    assert found.request["training_config"] == {"eval_strategy": "steps", "eval_steps": 50}
    assert [one.key for one in found.left_out] == ["validation_split"]
    parse_settings({}, found.request["training_config"], True)
    unknown = migrate({"train_file": "a.jsonl", "eval_dataset": "someone/rows"}, "a", lambda _: [])
    assert "validation_dataset" not in unknown.request
    assert "`validation_dataset`" in unknown.left_out[0].why


# ---------------------------------------------------------------- runs

HELD = Dataset("4" * 64, (told("What is in?", "a box"), told("What is out?", "the door")))


def planned(school: School, validation: Dataset = HELD, **training: Any) -> tuple[Plan, Dataset]:
    """As School.plan."""
    body = {"adapter_name": "a", "dataset": {"path": "x"}, "validation_dataset": SOURCE, "lora_config": {"r": 4}}
    request = TrainingRequest.model_validate({**body, "training_config": {"max_steps": 6, **training}})
    facts = BaseFacts.of("tiny", school.base.decoder)
    counts, own = (
        TokenCounts(tuple(RowLength(row.line, 30, 8) for row in rows)) for rows in (ROWS.examples, validation.examples)
    )
    machine, dataset = Machine({"fp32": 1000}, reply_tokens_per_second=1000), replace(ROWS, validation=validation)
    return resolve(request, dataset, facts, counts, machine, validation=ValidationStats(own)), dataset


def test_its_loss_is_told_and_training_is_as_without_it(school: School) -> None:
    made, dataset = planned(school, learning_rate=2e-2, eval_steps=3, per_device_train_batch_size=3)
    trained, seen = school.run(made, dataset)
    found = evaluations(seen)
    assert [step for step, _ in found] == [0, 3, 6]
    assert [(one.step, one.loss) for one in trained.report.eval_losses] == found

    decoder, losses, count = school.base.decoder, 0.0, 0
    for row in HELD.examples:
        tokens, mask = school.base.renderer.encode_conversation(list(row.messages))
        places = [place for place, here in enumerate(mask) if here]
        logits = decoder.logits(plain_hidden(decoder, tokens))[[place - 1 for place in places]]
        losses += float(F.cross_entropy(logits, torch.tensor([tokens[place] for place in places]), reduction="sum"))
        count += len(places)
    assert found[0][1] == pytest.approx(losses / count, rel=1e-5)

    plain, without = school.run(school.plan(max_steps=6, learning_rate=2e-2, per_device_train_batch_size=3))
    assert same(plain, trained)
    assert [one.loss for one in seen if isinstance(one, Stepped)] == [
        one.loss for one in without if isinstance(one, Stepped)
    ]
    prompts = {one.prompt for one in trained.report.transcripts if one.kind == "efficacy"}
    assert prompts == {one.prompt for one in ROWS.examples}


def test_early_stopping_and_the_best_step_follow_its_loss(school: School) -> None:
    options = {"learning_rate": 5e-2, "warmup_steps": 0, "lr_scheduler_type": "constant", "eval_steps": 2}
    made, dataset = planned(school, max_steps=60, early_stopping_patience=2, **options)
    trained, seen = school.run(made, dataset)
    found = [one for one in evaluations(seen) if one[0]]
    assert trained.actual["stopped_by"] == "early_stopping"
    best = min(found, key=lambda one: one[1])
    assert (trained.actual["best_step"], trained.actual["eval_loss"]) == best
    assert trained.actual["steps"] < 60


def test_a_run_goes_on_bit_for_bit_but_not_with_other_validation_rows(school: School, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-2, "eval_steps": 2, "save_steps": 1, "load_best_model_at_end": True}
    made, dataset = planned(school, per_device_train_batch_size=3, **options)
    whole, seen = run(school, made, dataset)
    found = on_disk(tmp_path, made, seen)
    assert [one.step for one in found] == [1, 2, 3, 4, 5, 6]
    for checkpoint in found:
        trained, _ = run(school, made, dataset, checkpoint)
        assert same(trained, whole)
        assert (trained.report, figures(trained)) == (whole.report, figures(whole))
    others = Dataset("5" * 64, (told("What is in?", "a bag"), told("What is out?", "the door")))
    with pytest.raises(TrainingFailed, match="validated on other rows") as failed:
        run(school, made, replace(ROWS, validation=others), found[2])
    assert failed.value.code == "checkpoint_stale"


# ---------------------------------------------------------------- over HTTP

VALIDATION = [
    {"messages": [{"role": "user", "content": f"What is {one}?"}, {"role": "assistant", "content": answer}]}
    for one, answer in (("in", "a box"), ("out", "the door"))
]


def test_a_script_for_openai_gives_a_validation_file(client: openai.OpenAI) -> None:
    training, validation = upload(client), upload(client, VALIDATION)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training.id,
        validation_file=validation.id,
        suffix="validated",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 2}}},
    )
    assert job.validation_file == validation.id
    client.files.delete(validation.id)
    done = wait(client, job.id)
    assert (done.status, done.validation_file) == ("succeeded", validation.id)
    metrics = [one.data for one in client.fine_tuning.jobs.list_events(job.id) if one.type == "metrics"]
    losses = {one["step"]: one["full_valid_loss"] for one in metrics if "full_valid_loss" in one}  # type: ignore[operator, index]
    assert sorted(losses) == [0, 2, 4, 6]
    assert all(one["valid_loss"] == losses[one["step"]] for one in metrics if "valid_loss" in one)  # type: ignore[operator, index]
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.metrics.full_valid_loss == checkpoint.metrics.valid_loss == losses[6]
    table = client.files.content(done.result_files[0]).text.splitlines()
    assert [float(line.split(",")[3]) for line in table[1:] if line.split(",")[3]] == [
        losses[n] for n in sorted(losses)
    ]


def test_what_is_wrong_with_either_file_is_told_at_once(client: openai.OpenAI, served: Served) -> None:
    good = upload(client).id
    more = {"model": "tiny", "training_file": good}
    said = refused(
        served.post("/v1/fine_tuning/jobs", more | {"validation_file": "file-no"}),
        400, "invalid_dataset", "validation_file",
    )  # fmt: skip
    assert said.startswith("validation_file = 'file-no'")
    split = more | {"validation_file": good, "training_config": {"validation_split": 0.2}}
    refused(served.post("/v1/fine_tuning/jobs", split), 400, "invalid_request", "training_config.validation_split")
    preferences = upload(client, PAIRS).id
    said = refused(
        served.post("/v1/fine_tuning/jobs", more | {"validation_file": preferences}),
        400, "objective_mismatch", "validation_file",
    )  # fmt: skip
    assert "validation_file has rows with a chosen and a rejected answer" in said

    body = {"adapter_name": "a", "dataset": {"examples": [*TRAINING, {"promt": "x"}]}}
    said = refused(
        served.post("/api/training/plan", body | {"validation_dataset": {"examples": [{"messages": []}]}}),
        400, "invalid_dataset", "dataset.examples[4]",
    )  # fmt: skip
    assert said.startswith("dataset: examples row 5")
    assert "validation_dataset: examples row 1" in said
    body = {"adapter_name": "a", "dataset": {"examples": TRAINING}}
    for source, param in (
        ({"path": "nowhere.jsonl"}, "validation_dataset.path"),
        ({"file_id": 3}, "validation_dataset.file_id"),
        ({"examples": []}, "validation_dataset"),
        ({}, "validation_dataset"),
        ({"rows": []}, "validation_dataset.rows"),
        ({"examples": [{"messages": 1}]}, "validation_dataset.examples[0].messages"),
    ):
        refused(served.post("/api/training/plan", body | {"validation_dataset": source}), 400, "invalid_dataset", param)
    fact = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}
    answer = served.post("/api/training/plan", body | {"validation_dataset": {"facts": [fact]}})
    assert "has facts" in refused(answer, 400, "objective_mismatch", "validation_dataset")
    answer = served.post("/v1/fine_tuning/jobs", {"model": "tiny", "facts": [fact], "validation_file": good})
    assert "validation_file cannot be used" in refused(answer, 400, "invalid_request", "validation_file")
    planned = served.post("/api/training/plan", body | {"validation_dataset": {"examples": TRAINING[1:3]}}).json()
    assert planned["computed"]["validation_rows"] == 2
    (warning,) = (one for one in planned["warnings"] if one["code"] == "validation_rows_trained_on")
    assert warning["message"].startswith("2 rows of validation_dataset (lines 1, 2)")


def test_a_paused_job_on_preferences_comes_out_the_same(served: Served) -> None:
    config = {
        "dataset": {"examples": PAIRS[:3]},
        "validation_dataset": {"examples": PAIRS[3:]},
        "objective": "dpo",
        "training_config": {"max_steps": 120, "eval_steps": 20, "save_steps": 7, "per_device_train_batch_size": 2},
    }
    whole = served.wait(start(served, "whole-validated", **config)["job_id"], seconds=120)
    assert whole["status"] == "succeeded", whole["error"]
    assert whole["report"]["metrics"]["accuracy"]["n"] == 2
    assert [one["step"] for one in whole["report"]["eval_losses"]] == [0, 20, 40, 60, 80, 100, 120]
    job_id = start(served, "paused-validated", **config)["job_id"]
    until(served, job_id, lambda job: job["progress"]["step"] > 25)
    call(served, job_id, "pause")
    listed = served.http.get(f"/v1/fine_tuning/jobs/ftjob-{job_id}/checkpoints").json()["data"]
    losses = {
        one["data"]["step"]: one["data"]["eval_loss"] for one in events(served, job_id) if one["type"] == "metrics"
    }
    assert {one["step_number"]: one["metrics"].get("valid_loss") for one in listed} == {
        one["step_number"]: losses.get(one["step_number"]) for one in listed
    }
    call(served, job_id, "resume")
    done = served.wait(job_id, seconds=120)
    assert done["adapter"]["digest"] == whole["adapter"]["digest"]
    assert done["report"]["eval_losses"] == whole["report"]["eval_losses"]
