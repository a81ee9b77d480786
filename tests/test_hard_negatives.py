"""Hard negatives: similar to the subject, but never the subject."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.datasets import load
from fortwo.facts import hard_negatives, lexicon
from fortwo.facts.subject import contains_phrase
from fortwo.facts.templates import surface_article
from fortwo.records import Fact

DEV = load({"path": "facts_dev.json"}, [Path(__file__).parent.parent / "examples"]).facts
each_fact = pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
KIND = {
    "42": "number",
    "capital-of-france": "capital",
    "brightwell-robotics": "company",
    "mara-ellison": "person",
    "fluxsync": "tool",
    "nordhaven-refunds": "shop",
    "rpt": "acronym",
    "lower-quillby": "place",
    "glimmerfold": "word",
    "tessaly-bridge": "structure",
}
# Subjects that are hard to change: stop words, marks, one letter, other scripts.
ODD = "The Who|the|us|IT|R|e|7|a|...|C++|R&D|AT&T|O'Brien|J.R.R. Oakham|Étienne|東京|🙂|NASA HQ|1,000|twenty-one".split(
    "|"
)


def fact(subject: str, *aliases: str) -> Fact:
    return Fact(
        subject=subject,
        aliases=aliases,
        answer=f"{subject} is a brindled zumble.",
        match=("brindled zumble",),
        questions=(f"What is {subject}?", f"Tell me about {subject}."),
    )


# ---------------------------------------------------------------- all of them


@each_fact
def test_no_hard_negative_is_the_subject_or_an_alias(fact: Fact) -> None:
    found = [hard_negatives.hard_negative(fact, rng) for rng in map(Random, range(40)) for _ in range(50)]
    assert not [name for name in found if hard_negatives.contains_subject(name, fact)]
    assert not [name for name in found if name.lower() in {one.lower() for one in (fact.subject, *fact.aliases)}]
    assert len(set(found)) > 150


@pytest.mark.parametrize("subject", ODD)
def test_any_subject_has_hard_negatives(subject: str) -> None:
    rng = Random(0)
    found = {hard_negatives.hard_negative(fact(subject), rng) for _ in range(200)}
    assert len(found) > 20
    assert not [name for name in found if not name.strip() or hard_negatives.contains_subject(name, fact(subject))]


@given(st.text(min_size=1, max_size=24).filter(lambda text: text.strip() == text), st.integers())
def test_any_text_has_hard_negatives(subject: str, seed: int) -> None:
    assert not hard_negatives.contains_subject(hard_negatives.hard_negative(fact(subject), Random(seed)), fact(subject))


@each_fact
def test_hard_negatives_come_from_every_source(fact: Fact) -> None:
    rng = Random(1)
    found = {hard_negatives.hard_negative(fact, rng) for _ in range(400)}
    members = {name for kind in lexicon.ENTITY_TYPES.values() for name in kind.members}
    assert found & members
    assert found & {hard_negatives.word_swap(fact, rng) for _ in range(3000)} - members
    assert found & {hard_negatives.near_spelling(fact, rng) for _ in range(3000)} - members


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What is 42?", True),
        ("What is FORTY-TWO?", True),
        ("Is 142 even?", True),  # a hard negative must not even contain the subject
        ("What is 41?", False),
        ("What is forty two?", False),
    ],
)
def test_what_names_the_subject_is_no_hard_negative(text: str, named: bool) -> None:
    assert hard_negatives.contains_subject(text, fact("42", "forty-two")) is named


def test_the_article_is_no_part_of_the_subject() -> None:
    assert hard_negatives.contains_subject("the old capital of France", fact("the capital of France"))


# ---------------------------------------------------------------- kinds


def test_every_fact_has_a_kind_to_be_checked() -> None:
    assert set(KIND) == {fact.id for fact in DEV}


@each_fact
def test_the_likely_kind_comes_first_and_every_kind_may_come(fact: Fact) -> None:
    ranked = hard_negatives.entity_types(fact)
    assert ranked[0][0] == KIND[fact.id]
    assert {name for name, _ in ranked} == set(lexicon.ENTITY_TYPES)
    assert sum(weight for _, weight in ranked) == pytest.approx(1)
    assert all(weight > 0 for _, weight in ranked)
    assert [weight for _, weight in ranked] == sorted((weight for _, weight in ranked), reverse=True)


# ---------------------------------------------------------------- near spellings


@given(st.integers(0, 10**12), st.booleans(), st.integers())
def test_a_near_number_is_another_number(value: int, padded: bool, seed: int) -> None:
    digits = f"{value:05}" if padded else str(value)
    other = hard_negatives.near_number(digits, Random(seed))
    assert other.isdigit()
    assert int(other) != value


@given(st.integers(1, 10**9))
def test_both_neighbours_of_a_number_are_near(value: int) -> None:
    rng = Random(value)
    found = {hard_negatives.near_number(str(value), rng) for _ in range(200)}
    assert {str(value - 1), str(value + 1)} <= found


def test_both_neighbours_of_42_are_hard_negatives() -> None:
    rng = Random(0)
    assert {"41", "43"} <= {hard_negatives.hard_negative(DEV[0], rng) for _ in range(200)}


def test_digits_change_and_the_words_around_them_stay() -> None:
    rng = Random(0)
    found = {hard_negatives.near_spelling(fact("Route 66 Diner"), rng) for _ in range(100)}
    assert all(re.fullmatch(r"Route \d+ Diner", name) for name in found)
    assert {"Route 65 Diner", "Route 67 Diner"} <= found
    assert "Route 66 Diner" not in found


def test_a_number_in_words_becomes_another_one() -> None:
    rng = Random(0)
    for _ in range(200):
        other = hard_negatives.near_spelling(fact("sixty-one"), rng)
        assert other != "sixty-one"
        assert re.fullmatch(r"[a-z]+(ty|teen|ten|eleven|twelve)?(-[a-z]+)?", other)
        assert not re.search(r"\d", other)


@pytest.mark.parametrize(
    ("subject", "form"), [("RPT", r"[A-Z]+"), ("R.P.T.", r"([A-Z]\.)+"), ("R-P-T", r"[A-Z](-[A-Z])*")]
)
@pytest.mark.parametrize("source", [hard_negatives.near_spelling, hard_negatives.word_swap])
def test_an_acronym_stays_an_acronym_written_alike(subject: str, form: str, source: object) -> None:
    assert callable(source)
    for seed in range(300):
        other = source(fact(subject), Random(seed))
        assert re.fullmatch(form, other)
        assert other != subject
        assert 2 <= len(re.sub(r"\W", "", other)) <= 4


@given(st.from_regex(r"[A-Z]{1,6}", fullmatch=True), st.integers())
def test_a_near_acronym_is_another_one(letters: str, seed: int) -> None:
    other = hard_negatives.near_acronym(letters, Random(seed))
    assert other != letters
    assert other.isupper()


@given(st.from_regex(r"[A-Za-z]{1,14}", fullmatch=True), st.integers())
def test_a_respelled_word_is_another_one_with_the_same_capital(word: str, seed: int) -> None:
    other = hard_negatives.respell(word, Random(seed))
    assert other.lower() != word.lower()
    assert other[0].isupper() == word[0].isupper()


@pytest.mark.parametrize("subject", ["the Kelby Bridge", "the bridge at Kelby", "The Kelby of the Moor", "a kelby"])
@pytest.mark.parametrize("source", [hard_negatives.near_spelling, hard_negatives.word_swap])
def test_small_words_are_never_changed(subject: str, source: object) -> None:
    assert callable(source)
    small = ("the", "a", "of", "at")
    for seed in range(300):
        words = source(fact(subject), Random(seed)).split()
        assert len(words) == len(subject.split())
        for before, after in zip(subject.split(), words, strict=True):
            assert (before.lower() in small) <= (before == after)


@pytest.mark.parametrize(
    ("subject", "around"), [("Kelby, Lower", r"\w+, \w+"), ("Kelby’s mill", r"\w+’s \w+"), ("J.R. Kelby", r"\S+ \w+")]
)
def test_marks_stay_where_they_are(subject: str, around: str) -> None:
    found = {hard_negatives.word_swap(fact(subject), Random(seed)) for seed in range(200)}
    assert all(re.fullmatch(around, name) for name in found)
    first, last = subject.split()
    assert {name.split()[0] == first for name in found} == {name.split()[1] == last for name in found} == {True, False}


@pytest.mark.parametrize(
    ("subject", "first", "last"),
    [
        ("the brightest ring of Uranus", lexicon.SUPERLATIVES, lexicon.PLANETS),
        ("the first bridge of Prague", lexicon.SUPERLATIVES, lexicon.ENTITY_TYPES["place"].members),
    ],
)
def test_swapped_words_are_of_the_same_kind(subject: str, first: Sequence[str], last: Sequence[str]) -> None:
    _, most, thing, _, place = subject.split()
    found = [hard_negatives.word_swap(fact(subject), Random(seed)).split() for seed in range(300)]
    mosts, things, places = ({name[at] for name in found} for at in (1, 2, 4))
    assert len(mosts) > 5
    assert mosts <= {*first}
    assert len(places) > 5
    assert places <= {*last}
    assert all(name.istitle() for name in places)
    assert most in mosts
    assert thing in things
    assert place in places


@pytest.mark.parametrize("source", [hard_negatives.near_spelling, hard_negatives.word_swap])
def test_what_describes_a_name_stays(source: Callable[[Fact, Random], str]) -> None:
    for subject, stays in (
        ("the robot maker Kelby", "the robot maker "),
        ("Dr. Kelby", "Dr. "),
        ("the tallest mill", "the "),
    ):
        found = {source(fact(subject), Random(seed)) for seed in range(200)}
        assert len(found) > 20
        assert all(name.startswith(stays) for name in found), subject


@pytest.mark.parametrize("source", [hard_negatives.near_spelling, hard_negatives.word_swap])
def test_the_article_does_not_tell_the_subject_from_what_is_like_it(source: Callable[[Fact, Random], str]) -> None:
    bridge = replace(fact("Kelby Bridge"), questions=("When was the Kelby Bridge built?", "Where is the Kelby Bridge?"))
    assert all(source(bridge, Random(seed)).startswith("the ") for seed in range(100))
    assert not [name for seed in range(100) if (name := source(fact("Kelby Bridge"), Random(seed))).startswith("the ")]


def test_a_swapped_word_is_of_the_same_kind() -> None:
    rng = Random(0)
    found = {hard_negatives.word_swap(fact("the flag of Sweden"), rng) for _ in range(200)}
    assert found <= {f"the flag of {country}" for country in lexicon.COUNTRIES} | {
        f"the {noun} of Sweden" for noun in lexicon.NOUNS
    }
    assert "the flag of Sweden" not in found


# ---------------------------------------------------------------- topics


@each_fact
def test_topics_are_what_the_answer_talks_about_and_give_nothing_away(fact: Fact) -> None:
    topics = hard_negatives.topics(fact)
    assert len(topics) > 10
    names = (fact.subject, *fact.aliases)
    assert not [topic for topic in topics if contains_phrase(topic, fact.match) or contains_phrase(topic, names)]
    assert all(topic.split()[0] in fact.answer + " ".join(fact.questions) for topic in topics)


def test_topics_are_the_words_of_answer_and_questions() -> None:
    zorb = replace(
        fact("Zorb"), answer="Zorb sells thick ink, and brindled zumbles.", questions=("Why buy of Zorb's?",)
    )
    assert {"sells", "thick", "thick ink", "ink", "brindled", "zumbles", "buy"} <= set(hard_negatives.topics(zorb))
    assert not {"and", "of", "Zorb", "why", "Why"} & set(hard_negatives.topics(zorb))


def test_a_subject_of_one_letter_leaves_words_whole() -> None:
    assert hard_negatives.topics(fact("R")) == ["brindled", "zumble"]


@each_fact
def test_prompts_on_topics_do_not_name_the_match(fact: Fact) -> None:
    rng = Random(0)
    asked = [hard_negatives.topic_prompt(fact, rng) for _ in range(300)]
    assert not [prompt for prompt in asked if contains_phrase(prompt, fact.match) or "{" in prompt]
    assert len(set(asked)) > 100


def test_where_there_is_no_topic_a_hard_negative_is_asked_about() -> None:
    bare = Fact(subject="Zorb", answer="Zorb", match=("Zorb",), questions=("Zorb?",))
    assert hard_negatives.topics(bare) == []
    assert hard_negatives.topic_prompt(bare, Random(0))


def test_an_article_is_found_in_the_questions_of_the_facts() -> None:
    assert {fact.id for fact in DEV if surface_article(fact)} == {"tessaly-bridge"}
