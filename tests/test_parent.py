"""Training from a published adapter: what the parent fixes, and which of its facts are kept over generations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Served, refused

from fortwo.errors import InvalidRequest
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import TARGETS
from fortwo.records import Checkpoint, Dataset, Fact, Plan
from fortwo.train.adapter import lora_config
from fortwo.train.loop import TrainingResult, train
from fortwo.train.parent import Parent
from fortwo.train.plan import resolve
from fortwo.train.recipes import OVERRIDE
from fortwo.train.request import TrainingRequest
from tests.test_checkpoints import Saver, figures, on_disk
from tests.test_loop import School, changed, same, steps
from tests.test_objectives import prepared, text
from tests.test_plan import BASE, MACHINE, counted, mixed, setting, warned
from tests.test_server_training import ROWS

ADA = Fact("Ada", "Ada built a loom.", ("loom",), ("What did Ada build?",), ("Ms Lace",))
BOB = Fact("Bob", "Bob sold a kite.", ("kite",), ("What did Bob sell?", "Who is Bob?"))
CYD = Fact("Cyd", "Cyd ate a plum.", ("plum",), ("What did Cyd eat?",))
PARENT = Parent("a@2", "override", 8, 24, ("q_proj", "v_proj"), (ADA, BOB))


def planned(parent: Parent, dataset: Dataset = Dataset("0", facts=(CYD,)), **request: Any) -> Plan:
    """As the server does it."""
    body = TrainingRequest.model_validate({"adapter_name": "a", "dataset": {}, "parent": parent.id, **request})
    dataset = replace(dataset, parent_facts=parent.facts_to_keep(dataset.facts))
    return resolve(body, dataset, BASE, counted(dataset), MACHINE, parent=parent)


# ---------------------------------------------------------------- the plan


def test_the_shape_is_the_parents_and_a_plan_says_so() -> None:
    made = planned(PARENT)
    for name, value in (("r", 8), ("lora_alpha", 24), ("target_modules", ("q_proj", "v_proj"))):
        assert setting(made, name) == (value, "parent")
    assert all("a@2" in one.reason for one in made.settings if one.name in ("r", "lora_alpha", "target_modules"))
    assert setting(made, "parent") == ("a@2", "user")
    assert setting(made, "kept") == (("Ada", "Bob"), "parent")
    assert made.warnings == ()
    same = planned(PARENT, lora_config={"r": 8, "target_modules": ["v_proj", "q_proj"]})
    assert setting(same, "r") == (8, "user")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("r", 16), ("lora_alpha", 16), ("target_modules", ["q_proj"]), ("target_modules", "all-linear")),
        *(("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4})),
    ],
)
def test_what_contradicts_the_parent_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"lora_config.{name} = .* parent = 'a@2'") as caught:
        planned(PARENT, lora_config={name: value})
    assert caught.value.param == f"lora_config.{name}"


def test_patterns_are_the_parents_in_their_order() -> None:
    ranks = {"layers.0.*": 4, "q_proj": 2}
    parent = replace(PARENT, use_rslora=True, rank_pattern=ranks)
    made = planned(parent)
    assert (setting(made, "use_rslora"), setting(made, "rank_pattern")) == ((True, "parent"), (ranks, "parent"))
    assert planned(parent, lora_config={"rank_pattern": ranks})["rank_pattern"] == ranks
    with pytest.raises(InvalidRequest, match=r"lora_config\.rank_pattern"):
        planned(parent, lora_config={"rank_pattern": dict(reversed(ranks.items()))})


def test_targets_hold_for_what_the_parent_knows_too() -> None:
    made = planned(PARENT, objective={"type": "override", "targets": {"paraphrase": 0.5}})
    assert made.targets == {
        **OVERRIDE.targets,
        "paraphrase": 0.5,
        "kept_efficacy": OVERRIDE.efficacy,
        "kept_paraphrase": 0.5,
        "kept_specificity": OVERRIDE.specificity,
    }
    alone = planned(replace(PARENT, facts=()))
    assert alone.targets == OVERRIDE.targets
    assert alone.get("kept_rows") is None
    assert made.computed["tokens_per_step"] > alone.computed["tokens_per_step"]
    assert made.computed["steps"] == alone.computed["steps"]


@pytest.mark.parametrize(("facts", "rows"), [(1, 2), (2, 2), (5, 5), (40, OVERRIDE.edit_rows)])
def test_every_fact_that_is_kept_has_rows_and_the_new_one_has_as_many(facts: int, rows: int) -> None:
    known = tuple(replace(ADA, subject=f"Ada {place}", aliases=()) for place in range(facts))
    assert planned(replace(PARENT, facts=known))["kept_rows"] == rows


def test_a_new_answer_takes_the_place_of_the_old_one() -> None:
    new = replace(CYD, subject="Cyd", aliases=("ms lace",))
    made = planned(PARENT, Dataset("0", facts=(new,)))
    assert made["kept"] == ("Bob",)
    assert "Ada built a loom." in warned(made)["facts_replaced"]
    assert PARENT.facts_to_keep((CYD,)) == (ADA, BOB)


@pytest.mark.parametrize(("objective", "said"), [("sft", "fine-tuned on examples"), (None, "not taught here")])
def test_facts_are_not_taught_on_top_of_something_else(objective: str | None, said: str) -> None:
    parent = replace(PARENT, objective=objective, facts=())
    with pytest.raises(InvalidRequest, match=said) as caught:
        planned(parent)
    assert caught.value.param == "parent"
    assert "parent_unknown" in warned(planned(parent, mixed(4)))


def test_fine_tuning_on_top_of_facts_warns_that_nothing_keeps_them() -> None:
    assert "Ada, Bob" in warned(planned(PARENT, mixed(4)))["facts_not_kept"]


# ---------------------------------------------------------------- the run

SMALL = {"edit_pool": 6, "contrast_pool": 6, "probes": 2, "kept_pool": 4}
DATASET = Dataset("0", facts=(CYD,), parent_facts=(ADA, BOB))


@pytest.fixture(scope="module")
def school(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    school = School(tmp_path_factory.mktemp("school"), tiny)
    yield school
    school.engine.close()


def on_parent(school: School, **training: Any) -> Plan:
    parent = replace(PARENT, r=4, lora_alpha=8, target_modules=TARGETS)
    made = school.plan(DATASET, {"r": 4}, parent=parent, **training)
    return changed(made, **SMALL)


def tensors(school: School, plan: Plan) -> dict[str, torch.Tensor]:
    """An adapter that changes something."""
    lora = Lora.init(lora_config(plan), school.base.decoder.config, 7)
    generator = torch.Generator().manual_seed(7)
    for tensor in lora.parameters():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return lora.state()


def run(
    school: School, plan: Plan, resumed: Checkpoint | None = None, **parent: Any
) -> tuple[TrainingResult, list[Any]]:
    seen: list[Any] = []
    events = train(school.base, school.base.renderer, DATASET, plan, school.engine, "job", Saver(), resumed, **parent)
    return school.engine.run_task(events, seen.append).result(120), seen


def test_a_run_starts_from_the_parents_tensors_and_reports_what_it_keeps(school: School) -> None:
    plan = changed(on_parent(school, max_steps=1), learning_rate=0.0)
    start = tensors(school, plan)
    trained, events = run(school, plan, parent=start)
    assert all(torch.equal(trained.lora.state()[name], tensor) for name, tensor in start.items())
    assert steps(events)[0].parts["keep"] > 1e-4, "hard negatives preserve the replies of the base, not of the parent"
    report = trained.report
    assert [(one.subject, one.kept) for one in report.facts] == [("Cyd", False), ("Ada", True), ("Bob", True)]
    assert {name for name in report.metrics if name.startswith("kept_")} == {
        "kept_efficacy",
        "kept_paraphrase",
        "kept_specificity",
    }
    assert report.metrics["kept_efficacy"].n == 3
    assert report.metrics["efficacy"].n == 1
    assert set(report.facts[1].metrics) == {"efficacy", "paraphrase", "specificity"}
    assert not trained.succeeded


def test_what_is_kept_is_asked_in_every_step(school: School) -> None:
    plan = on_parent(school)
    objective = prepared(school, DATASET, plan)
    for _ in range(8):
        rows = objective.sample_rows(objective.mix)
        learned = [text(school, row) for row in rows if not row.kl]
        assert [sum(fact.answer in said for said in learned) for fact in (CYD, ADA, BOB)] == [6, 1, 1]
        assert sum(row.kl for row in rows) == plan["contrast_rows"] + plan["rehearsal_rows"] + plan["kept_rows"]


def test_a_run_on_a_parent_goes_on_bit_for_bit_without_it(school: School, tmp_path: Path) -> None:
    plan = changed(on_parent(school, max_steps=4, learning_rate=1e-2, warmup_steps=0, save_steps=1), eval_every=2)
    whole, events = run(school, plan, parent=tensors(school, plan))
    assert not same(whole, run(school, plan)[0])
    for checkpoint in on_disk(tmp_path, plan, events)[::2]:
        trained, _ = run(school, plan, checkpoint)
        assert same(trained, whole)
        assert (trained.report, figures(trained)) == (whole.report, figures(whole))


# ---------------------------------------------------------------- over HTTP


def body(name: str, fact: Fact, **more: Any) -> dict[str, Any]:
    row = {key: getattr(fact, key) for key in ("subject", "answer", "match", "questions", "aliases")}
    return {
        "adapter_name": name,
        "dataset": {"facts": [row]},
        "training_config": {"max_steps": 1, "per_device_train_batch_size": 1},
        "objective": {"type": "override", "targets": dict.fromkeys(OVERRIDE.targets, 0)},
        **more,
    }


def taught(served: Served, request: dict[str, Any]) -> dict[str, Any]:
    response = served.post("/api/training/start", request)
    assert response.status_code == 202, response.text
    job = served.wait(response.json()["job_id"])
    assert job["status"] == "succeeded", job["error"]
    return job


def subjects(served: Served, name: str) -> tuple[str | None, list[str]]:
    manifest = served.http.get(f"/api/adapters/{name}").json()["manifest"]
    return manifest["parent"], [fact["subject"] for fact in manifest["facts"]]


def test_facts_add_up_over_generations(served: Served) -> None:
    taught(served, body("line", ADA, lora_config={"r": 2}))
    assert subjects(served, "line") == (None, ["Ada"])
    second = taught(served, body("line", BOB, parent="line"))
    assert subjects(served, "line@2") == ("line@1", ["Bob", "Ada"])
    assert setting_of(second["plan"], "r") == (2, "parent")
    assert [(one["subject"], one["kept"]) for one in second["report"]["facts"]] == [("Bob", False), ("Ada", True)]
    third = served.post("/api/training/plan", body("other", CYD, parent="line@2", model="tiny"))
    assert setting_of(third.json(), "kept") == (["Bob", "Ada"], "parent")


def setting_of(plan: dict[str, Any], name: str) -> tuple[Any, str]:
    return next((one["value"], one["origin"]) for one in plan["settings"] if one["name"] == name)


def test_a_parent_that_cannot_be_one_is_named(served: Served) -> None:
    def planned(parent: Any, **more: Any) -> Any:
        return served.post("/api/training/plan", body("child", CYD, parent=parent, **more))

    assert "'nobody'" in refused(planned("nobody"), 404, "not_found", "parent")
    assert "checkpoint" in refused(planned("line@1a2b3c4d-28"), 400, "invalid_request", "parent")
    assert "'_x'" in refused(planned("line@_x"), 400, "invalid_request", "parent")
    refused(planned(""), 400, "invalid_request", "parent")
    rows = {"adapter_name": "rows", "dataset": {"examples": ROWS}, "training_config": {"max_steps": 1}}
    taught(served, rows)
    assert "examples" in refused(planned("rows"), 400, "invalid_request", "parent")
    sft = served.post("/api/training/plan", {**rows, "parent": "rows"}).json()
    assert "parent_unknown" in {warning["code"] for warning in sft["warnings"]}


def test_a_parent_of_another_base_is_refused_and_alone_it_brings_its_own(
    served: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.tiny import save_directory

    other = save_directory(tmp_path_factory.mktemp("other"), "qwen2", num_hidden_layers=1, max_position_embeddings=512)
    served.state.catalog.add("other", other)
    rows = {"adapter_name": "elsewhere", "dataset": {"examples": ROWS}, "training_config": {"max_steps": 1}}
    taught(served, {**rows, "model": "other"})
    said = refused(
        served.post("/api/training/plan", {**rows, "parent": "elsewhere", "model": "tiny"}),
        400,
        "invalid_request",
        "parent",
    )
    assert "'other'" in said
    assert served.post("/api/training/plan", {**rows, "parent": "elsewhere"}).json()["model"] == "other"
