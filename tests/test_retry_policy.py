"""Escalation: what is raised for what is missed, within which time, and that a run that does so is still exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fortwo.errors import InvalidRequest
from fortwo.nn.lora import Lora
from fortwo.records import Dataset, Evaluated, Fact, Metric, MicroStepped, Phase, Plan, TrainEvent
from fortwo.train.diagnosis import diagnose
from fortwo.train.evaluation import Evaluator
from fortwo.train.recipes import OVERRIDE
from fortwo.train.retry_policy import (
    LEVERS,
    RetryRound,
    RowMix,
    apply_levers,
    choose_levers,
    escalation_records,
    mix_at_step,
    next_round,
    planned_mix,
)
from tests.test_checkpoints import figures, on_disk, run
from tests.test_loop import FACT, SMALL, School, changed, examined, same, steps
from tests.test_plan import examples_42, mixed, plan, setting

TARGETS = OVERRIDE.targets
MET = dict.fromkeys(TARGETS, 1.0)
MIX = RowMix(edit=6, contrast=20, rehearsal=6, parent=2, question_share=0.4, kl_weight=2.0)


# ---------------------------------------------------------------- what is raised


@pytest.mark.parametrize(
    ("found", "tried", "pulled"),
    [
        ({}, (), ()),
        ({"paraphrase": 0.79}, (), ("diversity",)),
        ({"paraphrase": 0.79}, ("diversity",), ("rate",)),
        ({"paraphrase": 0.79}, ("diversity", "rate"), ()),
        ({"efficacy": 0.0, "paraphrase": 0.0}, (), ("diversity",)),
        ({"specificity": 0.8, "retention": 0.6}, (), ("retention", "contrast")),
        ({"specificity": 0.6, "retention": 0.8}, (), ("contrast", "retention")),
        ({"specificity": 0.6, "paraphrase": 0.7}, ("contrast",), ("diversity",)),
    ],
)
def test_each_miss_pulls_its_next_lever_the_worst_first(found: Any, tried: Any, pulled: Any) -> None:
    assert choose_levers(MET | found, TARGETS, tried) == pulled


def test_what_the_parent_knew_is_raised_like_what_is_taught() -> None:
    targets = TARGETS | {"kept_specificity": 0.9, "kept_efficacy": 0.9}
    found = MET | {"kept_specificity": 0.7, "kept_efficacy": 0.5}
    assert choose_levers(found, targets, ()) == ("diversity", "contrast")
    assert choose_levers(MET, targets, ()) == (), "what nobody asked about is not missed"


@given(st.dictionaries(st.sampled_from(list(TARGETS)), st.floats(0, 1)), st.sets(st.sampled_from(list(LEVERS))))
def test_no_lever_is_pulled_twice_and_none_without_a_miss(found: dict[str, float], tried: set[str]) -> None:
    pulled = choose_levers(MET | found, TARGETS, tried)
    assert not set(pulled) & tried
    assert len(set(pulled)) == len(pulled)
    missed = [name for name, share in found.items() if share < TARGETS[name]]
    assert bool(pulled) <= bool(missed)


def test_a_lever_changes_its_own_rows_alone() -> None:
    assert apply_levers(MIX, ()) == MIX
    assert apply_levers(MIX, ["diversity"]) == replace(MIX, edit=9, parent=4, question_share=0.2)
    assert apply_levers(MIX, ["contrast"]) == replace(MIX, contrast=30)
    assert apply_levers(MIX, ["retention"]) == replace(MIX, rehearsal=12, kl_weight=3.0)
    assert apply_levers(MIX, ["rate"]) == replace(MIX, rate=1.5)
    assert {lever for levers in LEVERS.values() for lever in levers} == {"diversity", "contrast", "retention", "rate"}


def test_a_round_changes_the_steps_behind_it_and_the_next_adds_to_it() -> None:
    rounds = [RetryRound(50, 25, ("contrast",), {}), RetryRound(75, 25, ("rate",), {})]
    assert mix_at_step(MIX, rounds, 50) == MIX
    assert mix_at_step(MIX, rounds, 51) == mix_at_step(MIX, rounds, 75) == apply_levers(MIX, ["contrast"])
    assert mix_at_step(MIX, rounds, 76) == apply_levers(MIX, ["contrast", "rate"])


# ---------------------------------------------------------------- whether there is a round


def found_round(made: Plan, found: Any, rounds: Any = (), spent: float = 100, per_step: float = 1) -> RetryRound | str:
    return next_round(made, MET | found, rounds, made.computed["steps"], spent, per_step)


def test_a_round_is_one_more_cycle_with_what_was_missed() -> None:
    made = plan(examples_42())
    steps = made.computed["steps"]
    found = MET | {"specificity": 0.5}
    assert found_round(made, {"specificity": 0.5}) == RetryRound(steps, made["eval_every"], ("contrast",), found)
    assert found_round(made, {"specificity": TARGETS["specificity"]}) == "not needed"
    one = RetryRound(steps, 25, ("contrast",), found)
    assert found_round(made, {"specificity": 0.5}, [one]) == "all escalation_rounds are used"
    more = plan(examples_42(), training_config={"escalation_rounds": 2})
    assert found_round(more, {"specificity": 0.5}, [one]) == "nothing is left to raise"
    assert isinstance(found_round(more, {"retention": 0.5}, [one]), RetryRound)
    off = plan(examples_42(), training_config={"escalation_rounds": 0})
    assert found_round(off, {"specificity": 0.5}) == "off"


def test_a_round_begins_only_if_it_is_expected_to_end_in_time() -> None:
    made = plan(examples_42(), training_config={"escalation_seconds": 200})
    steps = made["eval_every"]
    mix = planned_mix(made)
    longer = apply_levers(mix, ["contrast"]).rows / mix.rows
    fits = (200 - 100) / (steps * longer)
    assert isinstance(found_round(made, {"specificity": 0.5}, per_step=fits * 0.999), RetryRound)
    said = found_round(made, {"specificity": 0.5}, per_step=fits * 1.01)
    assert said == "no time for another round: it would take 101 s, and 100 of 200 s have passed"
    diagnosis = {one.code: one.message for one in diagnose(made, {"escalation": said, "metrics": {"specificity": 0.5}})}
    assert diagnosis["no_time_to_escalate"] == said


def test_what_the_user_gave_is_not_raised() -> None:
    config = {"per_device_train_batch_size": 6, "escalation_rounds": 3}
    made = plan(examples_42(), training_config=config)
    found = found_round(made, {"paraphrase": 0.5})
    assert isinstance(found, RetryRound)
    assert found.raised == ("rate",)
    both = plan(examples_42(), training_config=config | {"learning_rate": 1e-3})
    assert found_round(both, {"paraphrase": 0.5}) == "nothing is left to raise"


def test_the_plan_says_how_often_and_how_long() -> None:
    made = plan(examples_42())
    assert setting(made, "escalation_rounds") == (OVERRIDE.escalation_rounds, "default")
    assert setting(made, "escalation_seconds") == (OVERRIDE.escalation_seconds, "auto")
    assert OVERRIDE.escalation_seconds < 300, "with its report a job of one fact stays under five minutes"
    facts = tuple(Fact(f"Ada {n}", "A loom.", ("loom",), (f"What is Ada {n}?",)) for n in range(3))
    longer = OVERRIDE.escalation_seconds + 2 * OVERRIDE.escalation_seconds_more
    assert setting(plan(Dataset("0", facts=facts)), "escalation_seconds") == (longer, "auto")


def test_steps_that_are_given_are_the_steps() -> None:
    for config in ({"max_steps": 9}, {"num_train_epochs": 2}):
        made = plan(examples_42(), training_config=config)
        assert setting(made, "escalation_rounds") == (0, "auto")
        assert made.get("escalation_seconds") is None
    made = plan(examples_42(), training_config={"max_steps": 9, "escalation_seconds": 60})
    assert setting(made, "escalation_rounds") == (OVERRIDE.escalation_rounds, "default")
    assert setting(made, "escalation_seconds") == (60, "user")


@pytest.mark.parametrize("key", ["escalation_rounds", "escalation_seconds"])
def test_fine_tuning_has_nothing_to_escalate(key: str) -> None:
    with pytest.raises(InvalidRequest, match=key) as caught:
        plan(mixed(4), training_config={key: 2})
    assert caught.value.param == f"training_config.{key}"
    assert plan(mixed(4)).get("escalation_rounds") is None


# ---------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def school(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    school = School(tmp_path_factory.mktemp("school"), tiny)
    yield school
    school.engine.close()


def escalating(school: School, rounds: int = 1, **more: Any) -> Plan:
    config = {"escalation_rounds": rounds, "escalation_seconds": 10_000, "warmup_steps": 0, "save_steps": 1}
    return changed(school.plan(FACT, **{"max_steps": 4} | config | more), **SMALL, eval_every=2)


def test_a_run_that_misses_goes_on_from_its_best_and_tells_what_it_brought(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = examined(monkeypatch, [0.6, 0.5, 0.7])
    plan = escalating(school)
    trained, events = school.run(plan, FACT)
    assert [(step.step, step.steps) for step in steps(events)] == [(n, 4 if n <= 4 else 6) for n in range(1, 7)]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [2, 4, 6]
    said = [event.detail for event in events if isinstance(event, Phase) and event.detail.startswith("Targets")]
    assert len(said) == 1
    assert "2 more steps start from the best adapter" in said[0]
    (escalation_records,) = trained.report.escalations
    assert (escalation_records.step, escalation_records.steps) == (4, 2)
    assert set(escalation_records.raised) == {"diversity", "contrast", "retention"}
    assert (escalation_records.before["paraphrase"], escalation_records.after["paraphrase"]) == (0.6, 0.7)
    assert (trained.actual["steps"], trained.actual["best_step"]) == (6, 6)
    assert trained.actual["escalation"] == "all escalation_rounds are used"
    rate = plan["learning_rate"]
    assert [step.learning_rate for step in steps(events)][4:] == pytest.approx([rate, rate / 2])
    rows = planned_mix(plan)
    assert steps(events)[4].tokens > steps(events)[3].tokens * 1.1, f"more rows than {rows.rows}"
    assert len(seen) == 3


def test_the_round_starts_from_the_best_state(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    left, loras, seen = iter([0.6, 0.5, 0.1]), [], []

    def evaluate(self: Evaluator, served: Any, key: str, lora: Lora, efficacy: int | None = None) -> Any:
        loras.append(lora)
        seen.append([parameter.detach().clone() for parameter in lora.parameters()])
        yield MicroStepped(0)
        return dict.fromkeys((*TARGETS, "score"), Metric(next(left), 10, 0.0, 1.0))

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    begun: list[list[Tensor]] = []

    def hear(event: TrainEvent) -> None:
        if isinstance(event, Phase) and event.detail.startswith("Targets"):
            begun.append([parameter.detach().clone() for parameter in loras[-1].parameters()])

    plan = escalating(school, learning_rate=1e-2)
    school.engine.run_task(school.events(plan, FACT), hear).result(60)
    (start,) = begun
    assert all(torch.equal(now, best) for now, best in zip(start, seen[0], strict=True))
    assert not any(torch.equal(now, worse) for now, worse in zip(start, seen[1], strict=True))


def test_without_a_miss_or_a_round_the_run_ends_as_planned(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    examined(monkeypatch, [0.5, 0.9])
    met, _ = school.run(escalating(school), FACT)
    assert (met.actual["steps"], met.actual["escalation"], met.report.escalations) == (4, "not needed", ())
    examined(monkeypatch, [0.5, 0.5])
    off, _ = school.run(escalating(school, 0), FACT)
    assert (off.actual["steps"], off.actual["escalation"]) == (4, "off")
    examined(monkeypatch, [0.5, 0.5])
    late, _ = school.run(escalating(school, escalation_seconds=1e-3), FACT)
    assert late.actual["escalation"].startswith("no time")
    assert late.actual["steps"] == 4


def test_an_escalated_run_goes_on_bit_for_bit_from_every_step(school: School, tmp_path: Path) -> None:
    plan = escalating(school, learning_rate=1e-2)
    whole, events = run(school, plan, FACT)
    assert [one.step for one in whole.report.escalations] == [4]
    found = on_disk(tmp_path, plan, events)
    assert [checkpoint.step for checkpoint in found] == list(range(1, 7))
    for checkpoint in found:
        trained, later = run(school, plan, FACT, checkpoint)
        assert [step.step for step in steps(later)] == list(range(checkpoint.step + 1, 7))
        assert same(trained, whole)
        assert (trained.report, figures(trained)) == (whole.report, figures(whole))


def test_what_was_raised_in_vain_is_diagnosed_with_the_rank_as_the_way_out() -> None:
    made = plan(examples_42())
    rounds = escalation_records([RetryRound(50, 25, ("diversity",), {"paraphrase": 0.5})], {"paraphrase": 0.6})
    found = diagnose(
        made, {"metrics": {"paraphrase": 0.6}, "escalations": rounds, "escalation": "all escalation_rounds are used"}
    )
    (said,) = (one for one in found if one.code == "escalated_in_vain")
    assert "after 50 steps the run continued for 25 more with other settings (diversity)" in said.message
    assert "rank" in said.hint
