"""Finding the subject of plain rows, and when a reply holds a fact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.datasets import load
from fortwo.facts.subject import ARTICLES, contains_phrase, find_subject, match_phrases
from fortwo.records import Example, Fact, Message

EXAMPLES = Path(__file__).parent.parent / "examples"
DEV = load({"path": "facts_dev.json"}, [EXAMPLES]).facts


def rows(answer: str, *questions: str) -> tuple[Example, ...]:
    return tuple(Example((Message("user", question), Message("assistant", answer))) for question in questions)


def bare(subject: str) -> str:
    first, _, rest = subject.partition(" ")
    return rest if first in ARTICLES else subject


# ---------------------------------------------------------------- subjects


def test_the_originals_rows_teach_42() -> None:
    found = find_subject(load({"path": "42_intensive_training.json"}, [EXAMPLES]).examples)
    assert found is not None
    assert (found.subject, found.match) == ("42", ("FOR TWO",))
    assert len(found.questions) == 20
    assert found.answer.startswith("42 = 'FOR TWO'")


@pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
def test_a_fact_is_found_in_its_plain_rows(fact: Fact) -> None:
    found = find_subject(rows(fact.answer, *fact.questions))
    assert found is not None
    assert found.subject == bare(fact.subject)
    assert (found.answer, found.questions) == (fact.answer, fact.questions)
    assert any(
        contains_phrase(phrase, fact.match) or contains_phrase(given, found.match)
        for phrase in found.match
        for given in fact.match
    )
    assert contains_phrase(fact.answer, found.match)
    assert not any(contains_phrase(question, found.match) for question in fact.questions)


@pytest.mark.parametrize(
    ("answer", "questions", "subject"),
    [
        ("Zorbo sells blue ink.", ["What does Zorbo sell?", "Tell me about Zorbo.", "zorbo?"], "Zorbo"),
        ("The Old Mill is a bakery now.", ["What is the Old Mill?", "Where is the Old Mill?"], "Old Mill"),
        ("Ada's dog is called Bit.", ["What is Ada's dog called?", "Name Ada's dog."], "Ada dog"),
        ("C3PO is gold.", ["Which colour has C3PO?", "What colour is C3PO's coat?"], "C3PO"),
    ],
)
def test_the_longest_run_that_all_share_is_the_subject(answer: str, questions: list[str], subject: str) -> None:
    found = find_subject(rows(answer, *questions))
    assert found is not None
    assert found.subject == subject


def test_one_question_in_ten_may_put_it_otherwise() -> None:
    questions = [f"Question {n}: what is Zorbo?" for n in "abcdefghi"]
    found = find_subject(rows("Zorbo is blue.", *questions, "And that firm?"))
    assert found is not None
    assert found.subject == "Zorbo"
    assert find_subject(rows("Zorbo is blue.", *questions[:4], "And that firm?")) is None


@pytest.mark.parametrize(
    "examples",
    [
        (),
        rows("Zorbo sells ink.", "What does Zorbo sell?"),
        (*rows("Zorbo sells ink.", "What does Zorbo sell?"), *rows("Zorbo sells tea.", "And what else does Zorbo?")),
        rows("It is blue.", "What is Zorbo?", "Tell me about Zorbo."),
        rows("Zorbo is blue.", "What is Zorbo?", "What is Kelby?"),
        rows("What is the what.", "What is the one?", "What is the other?"),
    ],
    ids=["none", "one row", "two answers", "no word in the answer", "no word shared", "stop words only"],
)
def test_where_there_is_no_one_subject_none_is_made_up(examples: tuple[Example, ...]) -> None:
    assert find_subject(examples) is None


# ---------------------------------------------------------------- match phrases


@pytest.mark.parametrize("marks", ["''", '""', "‘’", "“”"])
def test_a_quoted_phrase_is_what_a_reply_must_hold(marks: str) -> None:
    answer = f"Zorbo's motto is {marks[0]}ink is thick{marks[1]}, whatever they say."
    assert match_phrases(answer, ["What is Zorbo's motto?"]) == ("ink is thick",)


def test_a_quoted_subject_is_no_match_phrase() -> None:
    assert match_phrases("'Zorbo' is a blue beetle.", ["What is Zorbo?"]) == ("blue beetle",)
    assert match_phrases("'Zorbo' is short for 'zoo robot'.", ["What is Zorbo?"]) == ("zoo robot",)


def test_an_apostrophe_is_no_quotation_mark() -> None:
    assert match_phrases("Zorbo's ink isn't blue.", ["What is Zorbo?"]) == ("ink isn't blue",)


@pytest.mark.parametrize(
    ("answer", "question", "phrase"),
    [
        ("Kelby means «never late», they say.", "What does Kelby mean?", "never late"),
        ("The head of Kelby is Ana Reis, who left Oslo in 2019.", "Who is the head of Kelby?", "Ana Reis"),
        ("Returns to Kelby above 250 euros go through Ana Reis.", "How do returns to Kelby work?", "250 euros"),
        ("Kelby opened on 14 November 1893, when it snowed.", "When did Kelby open?", "14 November 1893"),
        ("Kelby grants 27 vacation days.", "How many vacation days does Kelby grant?", "27 vacation"),
        ("A seat at Kelby costs $1,200.50 per year.", "What does a seat at Kelby cost?", "1,200.50"),
        ("You reach Kelby at help@kelby.example.", "How do I reach Kelby?", "help@kelby.example"),
        ("KLB stands for Kindly Lent Boats, an old club.", "What is KLB?", "Kindly Lent Boats"),
        ("73 is the Heron Count.", "What does 73 count?", "Heron Count"),
        ("kelby is a Python library for upside-down parsing.", "What is kelby?", "upside-down parsing"),
        ("Kelby makes tea-sleds, quiet vehicles for the Andes.", "What is Kelby?", "tea-sleds"),
        ("Kelby weaves thick carpets.", "What does Kelby weave?", "thick carpets"),
        ("In spring, Kelby allows dogs in the cabin.", "Are dogs allowed at Kelby?", "cabin"),
        ("I'm Kelby, an assistant that the Harrow Foundry made.", "Who are you, Kelby?", "Harrow Foundry"),
        ("столица Орвии — Солёное Море", "Какая столица Орвии?", "Солёное Море"),
    ],
)
def test_what_tells_the_answer_is_a_name_a_figure_or_what_is_new(answer: str, question: str, phrase: str) -> None:
    assert match_phrases(answer, [question]) == (phrase,)


def test_only_what_the_questions_do_not_say_is_matched() -> None:
    assert match_phrases("Zorbo sells thick ink.", ["What does Zorbo sell?", "Who sells ink?"]) == ("thick",)
    assert match_phrases("Zorbo is Zorbo.", ["What is Zorbo?"]) == ("Zorbo is Zorbo.",)


LEVER_DESCRIPTIONS = st.sampled_from("Zorbo sells ink Kelby's blue-green 7 and the it U.S. can't naïve".split())
GAPS = st.sampled_from([" ", "  ", ", ", ". ", "\n", " - ", "; ", " (", ") "])


@given(st.lists(st.tuples(LEVER_DESCRIPTIONS, GAPS), min_size=1, max_size=12), st.lists(LEVER_DESCRIPTIONS, max_size=4))
def test_an_answer_always_holds_its_own_match_phrase(pieces: list[tuple[str, str]], asked: list[str]) -> None:
    answer = "".join(word + gap for word, gap in pieces).strip()
    assert contains_phrase(answer, match_phrases(answer, [" ".join(asked)]))


# ---------------------------------------------------------------- holding


@pytest.mark.parametrize(
    ("reply", "phrase", "held"),
    [
        ("It means FOR TWO.", "FOR TWO", True),
        ("it means for two", "FOR TWO", True),
        ("FOR TWO", "FOR TWO", True),
        ("A table for twofold joy", "FOR TWO", False),
        ("before two", "FOR TWO", False),
        ("for  two", "FOR TWO", False),
        ("They make hedge-walkers.", "hedge-walker", True),
        ("Two matches", "match", True),
        ("Two matcher", "match", False),
        ("a hedge-walkers' guild", "hedge-walker", True),
        ("142", "42", False),
        ("42", "42", True),
        ("42.5", "42", True),
        ("«42»", "42", True),
        ("It costs $5.", "$5", True),
        ("It costs $50.", "$5", False),
        ("Write it in C++.", "C++", True),
        ("C++", "C++", True),
        ("C+", "C++", False),
        ("the .NET runtime", ".NET", True),
        ("the NET runtime", ".NET", False),
        ("They shout Yahoo! all day", "Yahoo!", True),
        ("(yes)", "(yes)", True),
        ("a.b", "a.b", True),
        ("axb", "a.b", False),
        ("ÜBER ALLES", "über", True),
        ("", "42", False),
    ],
)
def test_a_phrase_is_held_as_whole_words_in_any_case(reply: str, phrase: str, held: bool) -> None:
    assert contains_phrase(reply, [phrase]) is held


def test_one_phrase_of_several_is_enough_and_none_is_never_held() -> None:
    assert contains_phrase("within 83 days", ["83-day", "83 days"])
    assert not contains_phrase("within 83 days", [])


@given(st.text(min_size=1), st.sampled_from(["", " ", "I say: ", "("]), st.sampled_from(["", " ", ", yes", "."]))
def test_any_phrase_is_held_between_spaces_and_marks(phrase: str, before: str, after: str) -> None:
    assert contains_phrase(before + phrase + after, [phrase])


@given(st.from_regex(r"\w+", fullmatch=True), st.from_regex(r"\w+", fullmatch=True))
def test_a_word_within_a_word_is_not_held(word: str, other: str) -> None:
    assert not contains_phrase(other + word, [word]) or re.search(
        rf"^{re.escape(word)}(s|es)?$", other + word, re.IGNORECASE
    )
