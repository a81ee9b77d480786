"""Rows held back: only when asked for, the same ones for a seed, never trained on, their loss told and decided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.records import Evaluated, Stepped
from fortwo.train import validation
from fortwo.train.options import parse_training_config
from fortwo.train.validation import patience_exhausted, validation_size
from tests.test_loop import FACT, ROWS, School, plain_hidden, school
from tests.test_plan import examples_42, mixed, plan, setting

__all__ = ["school"]


@given(st.integers(1, 500), st.floats(0, 0.5), st.integers(0, 9))
def test_as_many_rows_are_held_back_as_are_asked_for(rows: int, split: float, seed: int) -> None:
    held = validation_size(rows, split)
    assert held == (0 if split == 0 else max(1, round(rows * split)))
    if held < rows:
        places = validation.validation_indices(rows, held, seed)
        assert len(places) == held
        assert places == validation.validation_indices(rows, held, seed) <= set(range(rows))


@given(st.integers(1, 100), st.floats(0.01, 0.5), st.integers(0, 9))
def test_the_answers_of_a_pair_are_held_back_together(pairs: int, split: float, seed: int) -> None:
    held = validation_size(2 * pairs, split, together=2)
    assert held == 2 * validation_size(pairs, split)
    if held < 2 * pairs:
        places = validation.validation_indices(2 * pairs, held, seed, together=2)
        assert len(places) == held
        assert {place ^ 1 for place in places} == places


def test_another_seed_holds_other_rows_back() -> None:
    assert validation.validation_indices(1000, 100, 1) != validation.validation_indices(1000, 100, 2)


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([3.0], 1, False),
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.0], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(losses: list[float], patience: int, ends: bool) -> None:
    assert patience_exhausted(losses, patience) is ends


# ---------------------------------------------------------------- what may be asked


@pytest.mark.parametrize(
    ("config", "param", "said"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy", "validation_split"),
        ({"eval_steps": 10}, "eval_steps", "validation_split"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "validation_split"),
        ({"validation_split": 0, "eval_strategy": "steps"}, "eval_strategy", "validation_split"),
        ({"validation_split": 0, "early_stopping_patience": 2}, "validation_split", "stopping needs validation rows"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "eval_strategy", "nothing would be evaluated"),
        ({"eval_strategy": "no", "validation_split": 0.1}, "eval_strategy", "held-back rows would not be used"),
        (
            {"load_best_model_at_end": False, "early_stopping_patience": 2},
            "load_best_model_at_end",
            "an earlier state may be best",
        ),
        ({"validation_split": 0.1, "eval_strategy": "epoch", "eval_steps": 5}, "eval_strategy", "only one can decide"),
        ({"validation_split": 0.7}, "validation_split", "at most 0.5"),
        ({"validation_split": True}, "validation_split", "True"),
        ({"early_stopping_patience": 0}, "early_stopping_patience", "at least 1"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model", "eval_loss"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_training_config(config)
    assert caught.value.param == f"training_config.{param}"
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {"eval_strategy": "no", "eval_steps": None, "load_best_model_at_end": False, "validation_split": 0}
    assert parse_training_config(nothing) == {
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "validation_split": 0,
    }


# ---------------------------------------------------------------- plans


def test_no_row_is_held_back_unless_asked_for() -> None:
    made = plan(mixed(50))
    assert setting(made, "validation_split") == (0.0, "default")
    assert made.computed["rows"] == 50
    assert "validation_rows" not in made.computed


def test_the_plan_says_what_is_held_back_and_when_it_is_evaluated() -> None:
    made = plan(mixed(50), training_config={"validation_split": 0.2, "per_device_train_batch_size": 4})
    assert (made.computed["rows"], made.computed["validation_rows"]) == (40, 10)
    assert (made.computed["steps_per_epoch"], made.computed["supervised_tokens"]) == (10, 40 * 25)
    assert setting(made, "validation_split") == (0.2, "user")
    assert setting(made, "eval_strategy") == ("epoch", "auto")
    assert setting(made, "eval_steps") == (10, "auto")
    assert setting(made, "load_best_model_at_end") == (False, "default")
    longer = plan(
        mixed(50), training_config={"validation_split": 0.2, "per_device_train_batch_size": 4, "eval_steps": 1}
    )
    assert longer.computed["seconds"] > made.computed["seconds"]
    assert setting(longer, "eval_strategy") == ("steps", "auto")


def test_early_stopping_holds_rows_back_and_says_so() -> None:
    made = plan(mixed(50), training_config={"early_stopping_patience": 2})
    assert setting(made, "validation_split") == (0.1, "auto")
    assert "arly stopping" in next(one.reason for one in made.settings if one.name == "validation_split")
    assert made.computed["validation_rows"] == 5
    assert setting(made, "load_best_model_at_end") == (True, "auto")


def test_too_few_rows_and_the_override_objective_are_refused() -> None:
    with pytest.raises(InvalidDataset) as few:
        plan(mixed(1), training_config={"validation_split": 0.5})
    assert "0.5 of 1 row leaves nothing" in few.value.message
    for config in ({"validation_split": 0.1}, {"early_stopping_patience": 1}):
        with pytest.raises(InvalidRequest) as caught:
            plan(examples_42(), training_config=config)
        assert caught.value.param == f"training_config.{next(iter(config))}"
        assert "override" in caught.value.message
    assert plan(examples_42(), training_config={"validation_split": 0}).objective == "override"


def test_rows_over_the_context_are_counted_and_named() -> None:
    from dataclasses import replace

    from fortwo.train.estimate import RowLength, TokenCounts
    from fortwo.train.plan import resolve
    from fortwo.train.request import TrainingRequest
    from tests.test_plan import BASE, MACHINE

    body = TrainingRequest.model_validate({"adapter_name": "a", "dataset": {"path": "x"}})
    counts = TokenCounts(tuple(RowLength(line, 30, size) for line, size in enumerate((5, 3000, 7, 4000), 1)))
    with pytest.raises(InvalidDataset) as caught:
        resolve(body, mixed(4), BASE, counts, MACHINE)
    assert caught.value.message.startswith("line 2: prompt (30 tokens) and answer (3000 tokens)")
    assert "2 rows do (lines 2, 4)" in caught.value.message
    masked = replace(counts, rows=tuple(RowLength(line, 5, line - 1) for line in (1, 2, 3, 4)))
    with pytest.raises(InvalidDataset) as caught:
        resolve(body, mixed(4), BASE, masked, MACHINE)
    assert (caught.value.code, caught.value.message.split(":")[0]) == ("all_labels_masked", "line 1")
    fine = replace(counts, rows=tuple(RowLength(line, 10, size) for line, size in enumerate((1, 2, 3, 8), 1)))
    assert resolve(body, mixed(4), BASE, fine, MACHINE).computed["row_tokens"] == {
        "min": 11,
        "median": 12.5,
        "mean": 13.5,
        "max": 18,
    }


# ---------------------------------------------------------------- runs


def evaluations(events: list[Any]) -> list[tuple[int, float]]:
    return [(one.step, one.eval_loss) for one in events if isinstance(one, Evaluated)]


def test_the_loss_of_rows_held_back_is_told_and_they_are_never_trained_on(school: School) -> None:
    made = school.plan(
        max_steps=6, learning_rate=2e-2, validation_split=0.25, eval_steps=3, per_device_train_batch_size=3
    )
    assert (made.computed["rows"], made.computed["validation_rows"]) == (3, 1)
    trained, events = school.run(made)
    told = evaluations(events)
    assert [step for step, _ in told] == [0, 3, 6]
    assert [(one.step, one.loss) for one in trained.report.eval_losses] == told
    assert trained.actual["base_eval_loss"] == told[0][1]
    assert trained.actual["eval_loss"] == told[-1][1]

    (held,) = validation.validation_indices(4, 1, made["seed"])
    tokens, mask = school.base.renderer.encode_conversation(list(list(ROWS.examples)[held].messages))
    logits = school.base.decoder.logits(plain_hidden(school.base.decoder, tokens))
    places = [place for place, here in enumerate(mask) if here]
    wanted = F.cross_entropy(logits[[place - 1 for place in places]], torch.tensor([tokens[p] for p in places]))
    assert told[0][1] == pytest.approx(float(wanted), rel=1e-5)
    prompts = {one.prompt for one in trained.report.transcripts if one.kind == "efficacy"}
    assert prompts == {one.prompt for n, one in enumerate(ROWS.examples) if n != held}
    lowered = [one for one in events if isinstance(one, Stepped)]
    assert lowered[-1].loss < 0.7 * lowered[0].loss


def test_early_stopping_ends_the_run_and_keeps_the_best_state(school: School) -> None:
    made = school.plan(
        max_steps=60, learning_rate=5e-2, warmup_steps=0, lr_scheduler_type="constant", eval_steps=2,
        early_stopping_patience=2, validation_split=0.25,
    )  # fmt: skip
    trained, events = school.run(made)
    told = [(step, loss) for step, loss in evaluations(events) if step]
    assert trained.actual["stopped_by"] == "early_stopping"
    assert trained.actual["steps"] == told[-1][0] < 60
    best = min(told, key=lambda one: one[1])
    assert (trained.actual["best_step"], trained.actual["eval_loss"]) == best
    assert told[-1][0] - best[0] >= 4


def test_without_validation_nothing_is_evaluated(school: School) -> None:
    trained, events = school.run(school.plan())
    assert evaluations(events) == []
    assert trained.report.eval_losses == ()
    assert "eval_loss" not in trained.actual
    assert school.plan(FACT).computed["rows"] == 2
