"""A run that resumes from a checkpoint equals the run that never stopped, bit for bit: adapter, report and numbers.

Every checkpoint in these tests has been on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from fortwo.errors import TrainingFailed
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Prompt
from fortwo.records import Checkpoint, Dataset, Evaluated, MicroStepped, Phase, Plan, TrainEvent, Waiting
from fortwo.train import objectives
from fortwo.train.adapter import lora_config
from fortwo.train.checkpoints import Best, Clock, RunState, is_due
from fortwo.train.loop import TrainingResult, train
from fortwo.train.losses import Row
from tests.parts import decoder
from tests.test_loop import FACT, ROWS, SMALL, School, changed, examined, phases, same, steps

PHASES = {f"{phase}_seconds" for phase in ("preparing", "training", "exam", "report")}
TIMES = PHASES | {"seconds", "tokens_per_second", "reply_tokens_per_second", "peak_bytes"}


@pytest.fixture(scope="module")
def school(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    school = School(tmp_path_factory.mktemp("school"), tiny)
    yield school
    school.engine.close()


class Saver:
    """loop.CheckpointControl: one checkpoint at a time, and one on demand."""

    wanted = False
    busy = False
    safe = True


def after_a_step(events: Iterator[TrainEvent]) -> TrainEvent:
    """What comes once the micro-steps of a step are over."""
    return next(event for event in events if not isinstance(event, MicroStepped))


class Asked:
    """The serving path, with what was asked of the plain base."""

    def __init__(self, engine: Any) -> None:
        self.attach, self.detach, self._submit = engine.attach, engine.detach, engine.submit
        self.elsewhere = engine.elsewhere
        self.of_the_base: list[Prompt] = []

    def submit(self, prompt: Prompt) -> Any:
        if prompt.adapter is None:
            self.of_the_base.append(prompt)
        return self._submit(prompt)


def run(
    school: School, plan: Plan, dataset: Dataset = ROWS, resumed: Checkpoint | None = None, serving: Any = None
) -> tuple[TrainingResult, list[TrainEvent]]:
    seen: list[TrainEvent] = []
    serving = school.engine if serving is None else serving
    events = train(school.base, school.base.renderer, dataset, plan, serving, "job", Saver(), resumed)
    return school.engine.run_task(events, seen.append).result(120), seen


def on_disk(root: Path, plan: Plan, events: Sequence[TrainEvent]) -> list[Checkpoint]:
    """The checkpoints of a run, written and read again."""
    store, config = CheckpointStore(root), lora_config(plan).to_peft("tiny")
    for event in events:
        if isinstance(event, Checkpoint):
            store.save("j" * 36, event, config, {"adapter_name": "a", "base_model": "t", "base_digest": "d"}, 1000)
    return [store.restore(version) for version in store.of_job("j" * 36)]


def figures(trained: TrainingResult) -> dict[str, Any]:
    return {name: value for name, value in trained.actual.items() if name not in TIMES}


# ---------------------------------------------------------------- resumed = uninterrupted


@pytest.mark.parametrize(("optim", "use_dora"), [("adamw_torch", False), ("adamw_torch", True), ("adamw_8bit", False)])
def test_plain_fine_tuning_goes_on_bit_for_bit_from_every_step(
    school: School, tmp_path: Path, optim: str, use_dora: bool
) -> None:
    """Dropout takes random numbers in every step; batches of 3 of 4 rows end epochs short."""
    lora = {"r": 4, "lora_dropout": 0.2, "use_dora": use_dora}
    options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": 1}
    plan = school.plan(lora=lora, max_steps=6, optim=optim, **options)
    whole, events = run(school, plan)
    found = on_disk(tmp_path, plan, events)
    assert [checkpoint.step for checkpoint in found] == [1, 2, 3, 4, 5, 6]
    for checkpoint in found:
        torch.manual_seed(99)
        trained, later = run(school, plan, resumed=checkpoint)
        assert [step.step for step in steps(later)] == list(range(checkpoint.step + 1, 7))
        assert [(step.loss, step.gradient_norm) for step in steps(later)] == [
            (step.loss, step.gradient_norm) for step in steps(events)[checkpoint.step :]
        ]
        assert same(trained, whole)
        assert (trained.report, figures(trained)) == (whole.report, figures(whole))
    assert not same(whole, run(school, changed(plan, seed=1))[0])
    other = {"adamw_torch": "adamw_8bit", "adamw_8bit": "adamw_bnb_8bit"}[optim]
    assert same(whole, run(school, changed(plan, optim=other))[0]) == (optim == "adamw_8bit"), (
        "two names, one optimizer"
    )


def test_an_override_goes_on_bit_for_bit_and_the_base_is_not_asked_again(school: School, tmp_path: Path) -> None:
    lora = {"r": 4, "lora_dropout": 0.1}
    plan = school.plan(FACT, lora, max_steps=5, learning_rate=1e-2, warmup_steps=1, save_steps=1)
    plan = changed(plan, **SMALL, eval_every=2)
    whole, events = run(school, plan, FACT)
    exams = [event for event in events if isinstance(event, Evaluated)]
    assert [exam.step for exam in exams] == [2, 4, 5]
    found = on_disk(tmp_path, plan, events)
    assert [checkpoint.step for checkpoint in found] == [1, 2, 3, 4, 5]
    for checkpoint in found:
        serving = Asked(school.engine)
        trained, later = run(school, plan, FACT, checkpoint, serving)
        assert same(trained, whole)
        assert (trained.report, figures(trained)) == (whole.report, figures(whole))
        assert [event for event in later if isinstance(event, Evaluated)] == [
            exam for exam in exams if exam.step >= checkpoint.step
        ], "the exam behind the checkpoint is taken again"
        known = {(tuple(prompt), length) for prompt, length, *_ in checkpoint.state["known"]}
        assert known
        assert not [one for one in serving.of_the_base if (one.tokens, one.sampling.max_tokens) in known]


def test_the_best_adapter_of_before_is_still_the_best(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = changed(school.plan(FACT, max_steps=6, learning_rate=1e-2, save_steps=1), **SMALL, eval_every=2)
    seen = examined(monkeypatch, [0.2, 0.7, 0.1])
    whole, events = run(school, plan, FACT)
    assert whole.actual["best_step"] == 4
    found = on_disk(tmp_path, plan, events)
    for place, left in ((4, [0.1]), (3, [0.7, 0.1])):
        assert found[place].step == place + 1
        examined(monkeypatch, left)
        trained, _ = run(school, plan, FACT, found[place])
        assert same(trained, whole)
        assert figures(trained) == figures(whole)
        assert all(torch.equal(now, was) for now, was in zip(trained.lora.parameters(), seen[1], strict=True))


def test_a_run_whose_targets_were_met_stops_there_again(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = changed(school.plan(FACT, max_steps=50), **SMALL, eval_every=2)
    examined(monkeypatch, [0.5, 0.99])
    whole, events = run(school, plan, FACT)
    found = on_disk(tmp_path, plan, events)
    assert [checkpoint.step for checkpoint in found] == [2, 4], "one before each exam"
    examined(monkeypatch, [0.99])
    trained, later = run(school, plan, FACT, found[-1])
    assert not steps(later)
    assert (figures(trained), same(trained, whole)) == (figures(whole), True)
    assert trained.actual["stopped_by"] == "targets"


def test_making_checkpoints_changes_nothing_and_the_clock_runs_on(school: School, tmp_path: Path) -> None:
    plan = school.plan(lora={"r": 4, "lora_dropout": 0.2}, learning_rate=1e-2, save_steps=2)
    plain, _ = school.run(plan)
    saved, events = run(school, plan)
    assert same(plain, saved)
    last = on_disk(tmp_path, plan, events)[-1]
    resumed, _ = run(school, plan, resumed=last)
    assert resumed.actual["training_seconds"] == last.state["clock"]["training"]
    assert resumed.actual["seconds"] > last.state["clock"]["before"] > last.state["clock"]["training"]


def test_rows_that_are_drawn_otherwise_are_refused(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = school.plan(save_steps=1, per_device_train_batch_size=2)
    checkpoint = on_disk(tmp_path, plan, run(school, plan)[1])[1]
    batches = objectives.index_batches
    monkeypatch.setattr(objectives, "index_batches", lambda rows, size, _: batches(rows, size, Random(99)))
    with pytest.raises(TrainingFailed, match="step 2 was trained on other rows") as failed:
        run(school, plan, resumed=checkpoint)
    assert failed.value.code == "checkpoint_stale"
    assert not school.attached()


# ---------------------------------------------------------------- when


def test_a_checkpoint_that_is_wanted_is_made_behind_the_step_and_the_run_stands_still(school: School) -> None:
    saver = Saver()
    events = train(school.base, school.base.renderer, ROWS, school.plan(), school.engine, "still", saver)
    next(event for event in events if isinstance(event, Phase) and event.name == "running")
    assert [step.step for step in steps([after_a_step(events)])] == [1]
    assert not saver.safe
    saver.wanted = True
    made = next(events)
    assert isinstance(made, Checkpoint)
    assert made.step == 1
    assert [next(events) for _ in range(5)] == [Waiting()] * 5
    assert saver.safe
    saver.wanted = False
    assert [step.step for step in steps([after_a_step(events)])] == [2]
    events.close()


def test_before_the_first_step_there_is_nothing_to_keep(school: School) -> None:
    saver = Saver()
    saver.wanted = True
    events = train(school.base, school.base.renderer, ROWS, school.plan(), school.engine, "unbegun", saver)
    next(event for event in events if isinstance(event, Phase) and event.name == "running")
    assert [next(events) for _ in range(3)] == [Waiting()] * 3
    assert saver.safe
    events.close()


def test_a_run_without_checkpoints_makes_one_when_it_is_wanted_in_an_exam(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined(monkeypatch, [0.1])
    saver = Saver()
    plan = changed(school.plan(FACT, save_strategy="no"), **SMALL, eval_every=2)
    events = train(school.base, school.base.renderer, FACT, plan, school.engine, "exam", saver)

    seen: list[TrainEvent] = []

    def hear(event: TrainEvent) -> None:
        seen.append(event)
        saver.wanted = saver.wanted or isinstance(event, Evaluated)
        if isinstance(event, Checkpoint):
            task.cancel()

    task = school.engine.run_task(events, hear)
    with pytest.raises(CancelledError):
        task.result(60)
    assert [event.step for event in seen if isinstance(event, Checkpoint)] == [2]
    assert len(steps(seen)) == 2


def test_no_checkpoint_is_made_while_the_last_one_is_not_kept(school: School) -> None:
    saver = Saver()
    plan = school.plan(save_steps=1)
    events = train(school.base, school.base.renderer, ROWS, plan, school.engine, "busy", saver)
    next(event for event in events if isinstance(event, Checkpoint))
    saver.busy = True
    assert steps([after_a_step(events)])[0].step == 2
    assert [next(events) for _ in range(5)] == [Waiting()] * 5
    saver.busy = False
    following = next(events)
    assert isinstance(following, Checkpoint)
    assert following.step == 2
    events.close()


def test_without_anybody_who_keeps_them_there_are_none(school: School) -> None:
    _, events = school.run(school.plan(save_steps=1))
    assert phases(events) == ["preparing", "running", "evaluating"]
    assert not [event for event in events if isinstance(event, Checkpoint)]


@pytest.mark.parametrize(
    ("options", "step", "seconds", "examined", "wanted"),
    [
        ({}, 1, 1.0, False, False),
        ({}, 1, 30.0, False, True),
        ({}, 1, 0.0, True, True),
        ({}, 20, 0.0, False, True),
        ({"save_steps": 5}, 4, 1e9, False, False),
        ({"save_steps": 5}, 5, 0.0, False, True),
        ({"save_steps": 5}, 10, 0.0, False, True),
        ({"save_steps": 0.25}, 5, 0.0, False, True),
        ({"save_steps": 0.25}, 4, 0.0, False, False),
        ({"save_steps": 5}, 4, 0.0, True, True),
        ({"save_steps": 7}, 20, 0.0, False, True),
        ({"save_strategy": "epoch", "per_device_train_batch_size": 2}, 2, 0.0, False, True),
        ({"save_strategy": "epoch", "per_device_train_batch_size": 2}, 3, 1e9, False, False),
        ({"save_strategy": "steps"}, 1, 30.0, False, True),
        ({"save_strategy": "no"}, 1, 1e9, True, False),
        ({"save_strategy": "no"}, 20, 1e9, True, False),
    ],
)
def test_checkpoints_are_due_as_the_plan_says(
    school: School, options: dict[str, Any], step: int, seconds: float, examined: bool, wanted: bool
) -> None:
    assert is_due(school.plan(max_steps=20, **options), step, seconds, examined) is wanted


# ---------------------------------------------------------------- parts


def test_the_digest_of_drawn_rows_sees_every_token_and_every_border() -> None:
    def drawn(*draws: list[Row]) -> str:
        lora, flat = Lora.init(LoraConfig(r=1), decoder().config, 0), torch.zeros(1)
        run = RunState(lora, flat, torch.optim.SGD([flat]), Clock())
        for rows in draws:
            run.record_rows(rows)
        return run.rows_digest

    row, other = Row((1, 2, 3), 1), Row((4, 5), 1)
    assert drawn([row], [other]) == drawn([row, other])
    others = [[], [row], [other, row], [Row((1, 2, 4), 1), other], [Row((1, 2, 3), 2), other], [Row((1, 2), 1), other]]
    assert len({drawn(rows) for rows in (*others, [row, other], [Row((1, 2, 3), 1, kl=True), other])}) == 8


def test_best_keeps_a_copy_of_the_highest_score_and_the_later_of_equals() -> None:
    live, best = [torch.zeros(2), torch.zeros(3)], Best()
    for step, score in enumerate((0.0, 0.5, 0.9, 0.9, 0.8, math.nan), 1):
        for tensor in live:
            tensor.fill_(step)
        best.update(score, step, live)
    best.load_into(live)
    assert (best.score, best.step) == (0.9, 4)
    assert [tensor.tolist() for tensor in live] == [[4, 4], [4, 4, 4]]


def test_without_an_exam_the_last_adapter_is_the_best() -> None:
    live = [torch.ones(2)]
    Best().load_into(live)
    assert live[0].tolist() == [1, 1]
    with pytest.raises(ValueError):
        Best(tensors=[torch.zeros(2)]).load_into([*live, *live])
