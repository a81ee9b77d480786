"""What a run trains on, on a tiny model: rows of several facts, none of which takes back what another teaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fortwo.facts import replay_prompts
from fortwo.facts.hard_negatives import names_any_fact
from fortwo.facts.metrics import score
from fortwo.facts.prompt_builder import training_replay_prompts
from fortwo.records import Dataset, Fact, Message, OneHop, Plan, TrainEvent, Waiting
from fortwo.train import objectives
from fortwo.train.evaluation import ServedBase, interleave
from fortwo.train.losses import Row
from fortwo.train.objectives import PreparedObjective, RoundRobinSampler, ShuffledSampler
from tests.test_loop import School, changed

SMALL = {
    "edit_pool": 12,
    "contrast_pool": 60,
    "rehearsal_pool": 30,
    "probes": 4,
    "contrast_tokens": 2,
    "rehearsal_tokens": 2,
}
FACTS = tuple(
    Fact(subject, f"{subject} = {said}", (said,), tuple(f"{ask} {subject}?" for ask in ("What is", "Why")[:asks]))
    for subject, said, asks in (("42", "FOR TWO", 2), ("41", "FOR ONE", 1), ("43", "FOR THREE", 2))
)


@pytest.fixture(scope="module")
def school(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    school = School(tmp_path_factory.mktemp("school"), tiny)
    yield school
    school.engine.close()


def prepared(school: School, dataset: Dataset, plan: Plan) -> PreparedObjective:
    base = school.base
    served = ServedBase(base.id, base.backend, base.renderer, school.engine)
    task: Any = school.engine.run_task(
        objectives.prepare_override(served, base.backend, dataset, plan), lambda event: None
    )
    objective: PreparedObjective = task.result(120)
    return objective


def text(school: School, row: Row) -> str:
    return str(school.base.renderer.decode(row.tokens))


def test_round_robin_gives_every_pool_its_share_and_one_pool_alone_is_shuffled() -> None:
    sampler = RoundRobinSampler([range(5), (), range(100, 200)], Random(0))
    drawn = sampler.sample(7) + sampler.sample(3)
    assert Counter(item >= 100 for item in drawn) == {False: 5, True: 5}
    assert sorted(item for item in drawn if item < 100) == [0, 1, 2, 3, 4]
    shuffled, alone = ShuffledSampler(range(9), Random(1)), RoundRobinSampler([range(9)], Random(1))
    assert [shuffled.sample(4) for _ in range(5)] == [alone.sample(4) for _ in range(5)]
    assert RoundRobinSampler([()], Random(0)).sample(3) == []


def test_what_runs_together_takes_turns_and_comes_to_its_end() -> None:
    done: list[str] = []

    def run(name: str, turns: int) -> Generator[TrainEvent, None, None]:
        for turn in range(turns):
            done.append(f"{name}{turn}")
            yield Waiting()
        done.append(name)

    assert list(interleave(run("a", 3), run("b", 1), run("c", 0))) == [Waiting()] * 4
    assert done == ["a0", "b0", "c", "a1", "b", "a2", "a"]


def test_rows_of_several_facts_share_a_step_and_none_to_keep_names_a_fact(school: School) -> None:
    dataset = Dataset("0", facts=FACTS)
    plan = changed(school.plan(dataset), **SMALL)
    objective = prepared(school, dataset, plan)
    taught: Counter[str] = Counter()
    for _ in range(20):
        for row in objective.sample_rows(objective.mix):
            said = text(school, row)
            assert row.opening_weight == (1 if row.kl else plan["opening_weight"])
            if row.kl:
                asked = said.split("<|im_start|>assistant")[0]
                assert not names_any_fact(asked, FACTS), asked
            else:
                (answer,) = (fact.answer for fact in FACTS if fact.answer in said)
                taught[answer] += 1
    assert sum(taught.values()) == 20 * plan["per_device_train_batch_size"]
    assert max(taught.values()) - min(taught.values()) <= 2, "whatever each brings in questions"


def test_rehearsal_rows_go_through_as_many_everyday_prompts_as_planned(school: School) -> None:
    dataset = Dataset("0", facts=FACTS[:1])
    objective = prepared(school, dataset, changed(school.plan(dataset), **SMALL))
    render = school.base.renderer.encode_prompt
    everyday = {tuple(render([Message("user", prompt)])): prompt for prompt in replay_prompts.PROMPTS}
    rows = [row.tokens[: row.start] for _ in range(6) for row in objective.sample_rows(objective.mix)]
    drawn = Counter(everyday[asked] for asked in rows if asked in everyday)
    assert set(drawn) == set(training_replay_prompts()[:30])
    assert drawn.total() == 6 * objective.mix.rehearsal
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_an_exam_asks_about_every_fact_and_about_the_others_as_neighbours(school: School) -> None:
    dataset = Dataset("0", facts=FACTS)
    objective = prepared(school, dataset, changed(school.plan(dataset), **SMALL))
    assert objective.evaluator is not None
    asked = objective.evaluator._select(1)
    assert [question.prompt for question in asked if question.kind == "efficacy"] == [
        "What is 42?",
        "What is 41?",
        "What is 43?",
    ]
    neighbours = {question.prompt for question in asked if question.kind == "specificity" and question.fact == FACTS[1]}
    assert {"What is 42?", "Why 42?", "What is 43?", "Why 43?"} <= neighbours
    for question in asked:
        assert question.passes is not None
        assert question.fact is not None
        rivals = {fact.answer for fact in FACTS if fact != question.fact}
        assert question.passes(question.fact.answer) is (question.kind != "specificity")
        assert {question.passes(answer) for answer in rivals} == {question.kind == "specificity"}


def test_what_follows_from_a_fact_is_asked_at_the_end_and_aims_at_nothing(school: School) -> None:
    hops = tuple(OneHop(f"Who says {said}?", (said,)) for said in ("FOR TWO", "everybody"))
    dataset = Dataset("0", facts=(replace(FACTS[0], portability=hops), FACTS[1]))
    plan = changed(school.plan(dataset, max_steps=1), **SMALL)
    objective = prepared(school, dataset, plan)
    assert objective.evaluator is not None
    assert "portability" not in {question.kind for question in objective.evaluator.questions}
    asked = [question for question in objective.final_evaluator.questions if question.kind == "portability"]
    assert [question.prompt for question in asked] == ["Who says FOR TWO?", "Who says everybody?"]
    assert [[bool(one.passes and one.passes(reply)) for reply in ("FOR TWO", "Everybody!")] for one in asked] == [
        [True, False],
        [False, True],
    ]
    report = school.run(plan, dataset)[0].report
    assert report.metrics["portability"].n == report.base_metrics["portability"].n == 2
    assert [one.metrics.get("portability") for one in report.facts] == [report.metrics["portability"], None]
    aimed = {name: report.metrics[name] for name in plan.targets}
    assert report.metrics["score"] == score(aimed)
    assert "portability" not in plan.targets


def test_each_fact_is_reported_beside_all_together(school: School) -> None:
    dataset = Dataset("0", facts=FACTS[:2])
    plan = changed(school.plan(dataset, max_steps=1), **SMALL)
    trained, _ = school.run(plan, dataset)
    report = trained.report
    assert [(one.subject, one.answer) for one in report.facts] == [("42", "42 = FOR TWO"), ("41", "41 = FOR ONE")]
    for name in ("efficacy", "paraphrase", "specificity"):
        parts, whole = [one.metrics[name] for one in report.facts], report.metrics[name]
        assert sum(part.n for part in parts) == whole.n
        assert sum(part.value * part.n for part in parts) == pytest.approx(whole.value * whole.n)
    assert [one.metrics["efficacy"].n for one in report.facts] == [2, 1]
