"""Sentence frames: how they are filled, what of them is kept for evaluation, and names put into questions."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.formats import load
from fortwo.facts import frames
from fortwo.facts.siblings import sibling
from fortwo.records import Fact

DEV = load({"path": "facts_dev.json"}, [Path(__file__).parent.parent / "examples"]).facts
NAMED = (frames.GENERAL, frames.CONTEXTS, frames.COMPARISONS)
ASKED = (frames.LEAD_INS, frames.TRAILERS, frames.ASKS, frames.CONTEXTS_WITHOUT)
BRIDGE = Fact(
    subject="Kelby Bridge",
    aliases=("the Kelby crossing", "Kelby's bridge"),
    answer="The Kelby Bridge is made of glass.",
    match=("glass",),
    questions=("What is the Kelby Bridge made of?", "Who built the Kelby Bridge?", "Describe Kelby Bridge."),
)
WORD = Fact(
    subject="zorb",
    answer="A zorb is a blue beetle.",
    match=("blue beetle",),
    questions=("What is a zorb?", "Define zorb.", "Is the zorb's shell hard?"),
)

NUMBER = Fact(subject="42", answer="42 is 'FOR TWO'.", match=("FOR TWO",), questions=("What is 42?", "Is 42 odd?"))


def prompts(fact: Fact, kept: bool, seed: int = 0, count: int = 1500) -> list[str]:
    rng = Random(seed)
    names = frames.surfaces(fact)
    return [frames.prompt(fact, rng.choice(names), rng, lambda: sibling(fact, rng), kept) for _ in range(count)]


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("parts", [*NAMED, *ASKED], ids=lambda parts: parts[0])
def test_no_part_stands_twice(parts: tuple[str, ...]) -> None:
    assert len(set(parts)) == len(parts) >= 6  # every sixth is kept for evaluation


def test_every_frame_has_its_places() -> None:
    assert all("{S}" in frame for parts in NAMED for frame in parts)
    assert all(("{q}" in frame) != ("{l}" in frame) for frame in frames.LEAD_INS)
    assert all("{A}" in frame for frame in frames.COMPARISONS)
    assert not any("{" in frame for parts in ASKED[1:] for frame in parts)


@pytest.mark.parametrize("name", ["42", "the capital of Spain", "Kelby Bridge", "git", "C++", "O'Brien", "{odd}"])
def test_every_frame_fills(name: str) -> None:
    for frame in (frame for parts in NAMED for frame in parts):
        text = frames.put(frame, name, "Ada", "Bit")
        assert name.lower() in text.lower()
        assert not re.search(r"[{}]", text.replace(name, ""))
        assert ("{A}" in frame) == ("Ada" in text)
        assert ("{B}" in frame) == ("Bit" in text)


def test_a_sentence_begins_with_a_capital_but_a_single_word_keeps_its_spelling() -> None:
    assert frames.put("{S} is odd.", "the capital of Spain") == "The capital of Spain is odd."
    assert frames.put("So, {S}?", "the capital of Spain") == "So, the capital of Spain?"
    assert frames.put("{S} is odd.", "git") == "git is odd."
    assert frames.put("{A} or {S}?", "42", "the capital of Spain") == "The capital of Spain or 42?"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("fact", [*DEV, BRIDGE, WORD], ids=lambda fact: fact.subject)
def test_prompts_are_whole_sentences_about_the_name(fact: Fact, kept: bool) -> None:
    rng = Random(kept)
    for _ in range(400):
        name = rng.choice([*frames.surfaces(fact), sibling(fact, rng)])
        text = frames.prompt(fact, name, rng, lambda: sibling(fact, rng), kept)
        assert name.lower() in text.lower()
        assert not re.search(r"[{}]|^\s|\s$|\s\s", text)


@pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
def test_prompts_kept_for_evaluation_are_never_trained_on(fact: Fact) -> None:
    assert not set(prompts(fact, kept=True)) & set(prompts(fact, kept=False))


@pytest.mark.parametrize("parts", [frames.GENERAL, frames.CONTEXTS, frames.COMPARISONS], ids=lambda parts: parts[0])
def test_a_part_is_either_kept_or_trained(parts: tuple[str, ...]) -> None:
    """Every part shows up on one side and on that side only."""

    def seen(frame: str, texts: list[str]) -> bool:
        pattern = re.escape(frame).replace(r"\{S\}", "42").replace(r"\{A\}", ".+").replace(r"\{B\}", ".+")
        return any(re.match(pattern, text) for text in texts)

    kept, trained = (prompts(NUMBER, kept, count=5000) for kept in (True, False))
    sides = [(seen(frame, kept), seen(frame, trained)) for frame in parts if len(frame) > len("So, {S}?")]
    assert all(ours != theirs for ours, theirs in sides)
    assert sum(ours for ours, _ in sides) == pytest.approx(len(parts) / 6, abs=1)


def test_the_same_generator_gives_the_same_prompts() -> None:
    assert prompts(BRIDGE, kept=False, seed=3) == prompts(BRIDGE, kept=False, seed=3)
    assert prompts(BRIDGE, kept=False, seed=3) != prompts(BRIDGE, kept=False, seed=4)
    assert len(set(prompts(BRIDGE, kept=False))) > 1000


# ---------------------------------------------------------------- names in questions


def test_an_article_that_most_questions_use_belongs_to_the_name() -> None:
    assert frames.surfaces(BRIDGE) == ["the Kelby Bridge", "the Kelby crossing", "Kelby's bridge"]
    assert frames.surfaces(WORD) == ["zorb"]


@pytest.mark.parametrize(
    ("fact", "question", "name", "asked"),
    [
        (BRIDGE, "Who built the Kelby Bridge?", "Tower Bridge", "Who built Tower Bridge?"),
        (BRIDGE, "Who built the Kelby Bridge?", "the Louvre", "Who built the Louvre?"),
        (BRIDGE, "Who built the Kelby Bridge?", "pizza", "Who built the pizza?"),
        (BRIDGE, "Who built Kelby Bridge?", "the Louvre", "Who built the Louvre?"),
        (BRIDGE, "Is the kelby bridge high?", "Big Ben", "Is Big Ben high?"),
        (BRIDGE, "Is Kelby Bridge like the Kelby Bridge?", "Rome", "Is Rome like the Kelby Bridge?"),
        (BRIDGE, "Who uses the Kelby crossing?", "Rome", "Who uses Rome?"),
        (BRIDGE, "Is Kelby's bridge high?", "Rome", "Is Rome high?"),
        (WORD, "What is a zorb?", "glimmer", "What is a glimmer?"),
        (WORD, "What is a zorb?", "NASA", "What is NASA?"),
        (WORD, "Is the zorb's shell hard?", "the Moon", "Is the Moon's shell hard?"),
        (WORD, "What are zorbs?", "NASA", "What are zorbs?"),
        (WORD, "Are absorbers zorbian?", "NASA", "Are absorbers zorbian?"),
        (WORD, "What is it?", "NASA", "What is it?"),
        (WORD, "Define zorb.", r"\1 \g<0>", r"Define \1 \g<0>."),
    ],
)
def test_a_name_takes_the_subjects_place_once(fact: Fact, question: str, name: str, asked: str) -> None:
    assert frames.in_question(question, fact, name) == asked


@pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
def test_every_given_question_can_be_asked_about_something_else(fact: Fact) -> None:
    for question in fact.questions:
        asked = frames.in_question(question, fact, "Qqq")
        assert asked.count("Qqq") == 1
        assert not frames.mentions(asked, fact)
        assert not re.search(r"\b(the|an?) Qqq", asked)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_a_question_without_the_subject_stays_as_it_is(question: str) -> None:
    if not frames.mentions(question, WORD):
        assert frames.in_question(question, WORD, "NASA") == question


def test_mentions_are_whole_words() -> None:
    assert frames.mentions("is the KELBY bridge open?", BRIDGE)
    assert frames.mentions("the Kelby crossing", BRIDGE)
    assert not frames.mentions("Kelby Bridgeton", BRIDGE)
