"""Suggested questions: new ones, from parts of templates that are not kept for evaluation."""

from __future__ import annotations

from serving import Served, refused

from fortwo.facts import phrases, templates
from fortwo.facts.suggestions import suggest_questions
from fortwo.records import Fact

FACT = Fact(
    "Marrow Lane Library",
    "It lends telescopes for nine nights.",
    ("nine nights",),
    ("What does the Marrow Lane Library lend?", "How long may I keep what the Marrow Lane Library lends?"),
    ("MLL",),
)


def test_own_questions_come_under_other_names_and_then_general_ones() -> None:
    found = suggest_questions(FACT, 10)
    assert len(found) == len(set(found)) == 10
    assert found[0] == "What does MLL lend?"
    assert suggest_questions(FACT, 10) == found
    assert not {*found} & {*FACT.questions}
    assert all("MLL" in one or "Marrow Lane Library" in one for one in found)
    assert any("the Marrow Lane Library" in one for one in found)


def test_no_suggestion_is_of_a_part_for_evaluation_or_holds_the_answer() -> None:
    kept = set(phrases.GENERAL) - set(templates.training_parts(phrases.GENERAL))
    assert kept
    plain = Fact("42", "FOR TWO", ("about",), ())
    found = suggest_questions(plain, 1000)
    assert len(found) > 20
    assert not {templates.fill(part, {"S": "42"}) for part in kept} & {*found}
    assert not any("about" in question.split() for question in found)


def test_questions_are_suggested_over_http(served: Served) -> None:
    body = {"subject": "42", "questions": ["What is 42?"], "count": 3}
    assert len(served.post("/api/facts/questions", body).json()["questions"]) == 3
    refused(served.post("/api/facts/questions", {"subject": " "}), 400, "invalid_request", "subject")
    refused(served.post("/api/facts/questions", {"subject": "42", "count": 0}), 400, "invalid_request", "count")
