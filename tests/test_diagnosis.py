"""Each diagnosis is made where its sign is there, and not where it is not."""

from __future__ import annotations

from typing import Any

import pytest

from fortwo.train.dataset_stats import AffectedLines, DatasetWarnings
from fortwo.train.diagnosis import dataset_warnings, diagnose, plan_warnings
from tests.test_plan import MACHINE, examples_42, mixed, plan

GOOD: dict[str, Any] = {
    "steps": 21,
    "peak_learning_rate": 2e-4,
    "first_loss": 3.0,
    "final_loss": 0.5,
    "largest_b": 1e-2,
    "eval_loss": 1.0,
    "eval_losses": [(0, 3.0), (7, 1.2), (14, 1.0)],
}


def codes(**changed: Any) -> set[str]:
    return {finding.code for finding in diagnose(plan(mixed(50)), GOOD | changed)}


def test_a_good_run_has_no_diagnosis() -> None:
    assert codes() == set()
    assert diagnose(plan(mixed(50)), {}) == ()


@pytest.mark.parametrize(
    ("code", "signs"),
    [
        ("loss_exploded", {"final_loss": 9.0}),
        ("loss_exploded", {"final_loss": 4.6}),
        ("loss_stood_still", {"final_loss": 2.9}),
        ("loss_stood_still", {"final_loss": 3.2}),
        ("b_near_zero", {"largest_b": 1e-5}),
        ("b_near_zero", {"largest_b": 0.0}),
        ("overfitting", {"eval_loss": 1.6}),
        ("overfitting", {"eval_loss": 3.5, "eval_losses": [(0, 3.0), (7, 3.5)]}),
        ("rate_too_low", {"peak_learning_rate": 6e-6}),
        ("rate_too_high", {"peak_learning_rate": 0.1}),
    ],
)
def test_what_a_run_shows_is_named_with_a_remedy(code: str, signs: dict[str, Any]) -> None:
    assert codes(**signs) == {code}
    (finding,) = diagnose(plan(mixed(50)), GOOD | signs)
    assert finding.message
    assert finding.hint


@pytest.mark.parametrize(
    "signs",
    [
        {"first_loss": 0.5, "final_loss": 0.1},
        {"final_loss": 2.3},
        {"largest_b": 2e-4},
        {"eval_loss": 1.04},
        {"eval_losses": [], "eval_loss": None},
        {"peak_learning_rate": 1e-3},
    ],
)
def test_what_is_well_is_not_named(signs: dict[str, Any]) -> None:
    assert codes(**signs) == set()


def test_a_warm_up_that_never_ended_is_named() -> None:
    made = plan(mixed(50), training_config={"warmup_steps": 100, "max_steps": 20})
    assert "warmup_never_ends" in {warning.code for warning in made.warnings}
    assert "warmup_never_ends" in {finding.code for finding in diagnose(made, GOOD)}
    ended = plan(mixed(50), training_config={"warmup_steps": 2, "max_steps": 20})
    assert ended.warnings == ()


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (
            DatasetWarnings(duplicates=AffectedLines(2, (3, 6))),
            "duplicate_rows",
            "2 rows (lines 3, 6): the text is the same as in an earlier row",
        ),
        (
            DatasetWarnings(contradictions=AffectedLines(1, (4,))),
            "contradicting_answers",
            "1 row (line 4): the answer differs",
        ),
        (DatasetWarnings(foreign_templates=AffectedLines(1, (2,)), template="[INST]"), "foreign_template", "'[INST]'"),
        (DatasetWarnings(truncated=AffectedLines(9, (1, 2, 3, 4, 5))), "truncated_answers", "and 4 more"),
    ],
)
def test_suspicious_rows_are_told_with_their_lines(rows: DatasetWarnings, code: str, said: str) -> None:
    (warning,) = dataset_warnings(rows)
    assert warning.code == code
    assert said in warning.message
    assert warning.hint
    assert dataset_warnings(DatasetWarnings()) == ()
    assert plan_warnings(plan(examples_42()), MACHINE) == ()
    assert plan_warnings(plan(examples_42()), MACHINE, rows) == (warning,)
