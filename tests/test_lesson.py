"""Lessons: what they ask, what they hold, what they keep for evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.datasets import load
from fortwo.facts import rehearsal
from fortwo.facts.lesson import Lesson, begun_answer, kept_rehearsal, trained_rehearsal
from fortwo.facts.siblings import is_subject
from fortwo.facts.subject import holds
from fortwo.records import Fact, OneHop

DEV = load({"path": "facts_dev.json"}, [Path(__file__).parent.parent / "examples"]).facts
each_fact = pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
SEEDS = (0, 1, 42)


def evaluated(fact: Fact) -> set[str]:
    return {*fact.held_out, *fact.neighbors, *fact.controls}


@each_fact
def test_the_seed_decides_the_lesson(fact: Fact) -> None:
    def taught(seed: int) -> tuple[object, ...]:
        lesson = Lesson(fact, seed)
        return tuple(lesson.asks(60)), tuple(lesson.contrasts(60)), lesson.probes(10)

    assert taught(1) == taught(1)
    assert all(ours != theirs for ours, theirs in zip(taught(1), taught(2), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_asks_name_the_subject_and_aliases(fact: Fact, seed: int) -> None:
    asks = Lesson(fact, seed).asks(200)
    assert len(asks) == 200
    assert not [ask for ask in asks if not is_subject(ask, fact)]
    for surface in (fact.subject, *fact.aliases):
        assert any(surface.lower() in ask.lower() for ask in asks)
    assert any(ask.islower() for ask in asks)
    assert len(set(asks)) > 150


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_contrasts_never_name_the_subject(fact: Fact, seed: int) -> None:
    contrasts = Lesson(fact, seed).contrasts(200)
    assert len(contrasts) == 200
    assert not [contrast for contrast in contrasts if is_subject(contrast.prompt, fact)]
    assert not [contrast for contrast in contrasts if holds(contrast.prompt, fact.match)]
    assert len({contrast.prompt for contrast in contrasts}) > 120


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_what_is_for_evaluation_is_never_trained_on(fact: Fact, seed: int) -> None:
    lesson = Lesson(fact, seed)
    trained = {*lesson.asks(400), *(contrast.prompt for contrast in lesson.contrasts(400))}
    assert not trained & evaluated(fact)


def test_what_is_for_evaluation_is_not_trained_on_even_where_a_frame_makes_it() -> None:
    fact = replace(DEV[0], held_out=(), neighbors=())
    lesson = Lesson(fact, 0)
    asked, spared = set(lesson.asks(300)), {contrast.prompt for contrast in lesson.contrasts(300)}
    hops = tuple(OneHop(prompt, ("x",)) for prompt in sorted(asked)[::2])
    given = replace(fact, held_out=tuple(sorted(asked)[1::2]), neighbors=tuple(sorted(spared)), portability=hops)
    again = Lesson(given, 0)
    assert not asked & set(again.asks(300))
    assert not spared & {contrast.prompt for contrast in again.contrasts(300)}


@pytest.mark.parametrize("first", ["training", "probes"])
@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_probes_are_not_trained_on(fact: Fact, seed: int, first: str) -> None:
    lesson = Lesson(fact, seed)
    probes = lesson.probes(60) if first == "probes" else None
    trained = {*fact.questions, *lesson.asks(300), *(contrast.prompt for contrast in lesson.contrasts(300))}
    if probes is None:
        probes = lesson.probes(60)
    assert not trained & {*probes.paraphrase, *probes.specificity}
    assert not set(trained_rehearsal()) & set(probes.retention)


@each_fact
def test_probes_ask_what_they_say(fact: Fact) -> None:
    probes = Lesson(fact, 0).probes(20)
    for prompts in (probes.paraphrase, probes.specificity):
        assert 15 <= len(prompts) == len(set(prompts)) <= 20
    assert all(is_subject(prompt, fact) for prompt in probes.paraphrase)
    assert not any(is_subject(prompt, fact) for prompt in probes.specificity)
    assert probes.retention == kept_rehearsal()


# ---------------------------------------------------------------- several facts at once

NUMBERS = tuple(
    Fact(subject, f"{subject} = '{match}'", (match,), (f"What is {subject}?", f"Explain {subject}."), aliases)
    for subject, aliases, match in (("42", ("forty-two",), "FOR TWO"), ("41", (), "FOR ONE"), ("43", (), "FOR THREE"))
)


def named(prompts: Iterable[str], facts: Sequence[Fact]) -> list[str]:
    words = [surface for fact in facts for surface in (fact.subject, *fact.aliases)]
    return [prompt for prompt in prompts if any(re.search(rf"(?<!\w){word}(?!\w)", prompt, re.I) for word in words)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fact", NUMBERS, ids=lambda fact: fact.subject)
def test_nothing_that_stays_as_it_was_is_about_another_fact(fact: Fact, seed: int) -> None:
    others = [other for other in NUMBERS if other is not fact]

    def about_others(others: Sequence[Fact]) -> list[str]:
        lesson = Lesson(fact, seed, others)
        prompts = [*lesson.probes(60).specificity, *(contrast.prompt for contrast in lesson.contrasts(400))]
        return named([*prompts, *lesson.asks(400)], [other for other in NUMBERS if other is not fact])

    assert about_others(others) == []
    assert len(about_others(())) > 20, "alone, the others are its nearest siblings"


def test_a_lesson_alone_does_not_change_with_the_others_rule() -> None:
    far = replace(DEV[0], subject="Qqxzv", aliases=())
    alone, beside = Lesson(DEV[1], 3), Lesson(DEV[1], 3, [far])
    assert alone.asks(50) == beside.asks(50)
    assert alone.contrasts(50) == beside.contrasts(50)


def test_the_questions_of_other_facts_are_neighbours() -> None:
    first, second, third = NUMBERS
    assert Lesson(first, 0, (second, third)).rivals() == (*second.questions, *third.questions)
    both = replace(second, questions=("Is 41 more than 42?", "What is 41?", "Why 41?"))
    assert Lesson(first, 0, (both,)).rivals() == ("What is 41?",), "two at most, and none about itself"
    assert Lesson(replace(second, match=("FOR",)), 0, (first,)).rivals() == (), "its phrase is in that answer too"


def test_no_everyday_prompt_is_about_a_fact() -> None:
    sweden = replace(DEV[1], subject="the capital of Sweden", aliases=("haiku",))
    asked = "What is the capital of Sweden?"
    assert asked in {*trained_rehearsal(), *kept_rehearsal()}
    left = {*trained_rehearsal([sweden]), *kept_rehearsal([sweden])}
    assert {*rehearsal.PROMPTS} - left == {asked, "Write a haiku about snow."}
    assert asked not in Lesson(sweden, 0).probes(1).retention


# ---------------------------------------------------------------- begun answers


@each_fact
def test_begun_answers_stop_before_they_leak(fact: Fact) -> None:
    begun = [contrast.begun for contrast in Lesson(fact, 0).contrasts(300) if contrast.begun is not None]
    assert len(begun) > 30
    assert not [text for text in begun if holds(text, fact.match) or is_subject(text, fact) or not text.strip()]


def test_a_begun_answer_is_the_facts_own_told_of_another() -> None:
    assert begun_answer(DEV[0], "41") == "41 = '"
    assert begun_answer(replace(DEV[0], match=("universe", "life")), "41") == "41 = 'FOR TWO' —"
    assert begun_answer(replace(DEV[0], match=("never said",)), "41") is None
    assert begun_answer(replace(DEV[0], answer="It is FOR TWO."), "41") is None
    assert begun_answer(replace(DEV[0], answer="FOR TWO: that is 42."), "41") is None


def test_a_begun_answer_is_cut_before_a_word_and_names_no_other_surface_of_the_subject() -> None:
    art = replace(DEV[0], subject="Kelby", aliases=("KB", "K.B."), answer="Kelby (KB) is art.", match=("art",))
    assert begun_answer(art, "Mozart") is None
    assert begun_answer(replace(art, aliases=()), "Mozart") == "Mozart (KB) is"
    assert begun_answer(replace(art, aliases=()), "the Louvre") == "The Louvre (KB) is"


def test_no_contrast_is_a_question_that_names_nobody() -> None:
    questions = ("Who wrote Dracula?", "Tell me about the author of Dracula.")
    fact = replace(DEV[0], subject="the author of Dracula", aliases=(), questions=questions)
    for asked in (questions, questions[:1]):
        lesson = Lesson(replace(fact, questions=asked), 0)
        assert not [contrast.prompt for contrast in lesson.contrasts(300) if "Who wrote Dracula" in contrast.prompt]


@each_fact
def test_small_letters_do_not_tell_what_is_asked(fact: Fact) -> None:
    lesson = Lesson(fact, 0)
    long = [
        [text for text in prompts if len(text) > 25]
        for prompts in (lesson.asks(1000), [one.prompt for one in lesson.contrasts(1000)])
    ]
    asks, contrasts = (sum(text == text.lower() for text in texts) / len(texts) for texts in long)
    assert 0.02 < contrasts < 0.12
    assert 0.03 < asks < 0.12


@given(st.text(alphabet="42 FORTWfortwo='.", max_size=40), st.sampled_from(["41", "FOR TEN", "the Moon"]))
def test_no_begun_answer_holds_what_must_not_be_said(answer: str, name: str) -> None:
    begun = begun_answer(replace(DEV[0], answer=answer), name)
    assert begun is None or not holds(begun, DEV[0].match)


# ---------------------------------------------------------------- rehearsal


def test_rehearsal_is_kept_or_trained_on() -> None:
    kept, trained = set(kept_rehearsal()), set(trained_rehearsal())
    assert not kept & trained
    assert kept | trained == set(rehearsal.PROMPTS)
    assert len(kept) + len(trained) == len(rehearsal.PROMPTS)


@each_fact
def test_no_rehearsal_prompt_judges_or_names_a_fact(fact: Fact) -> None:
    assert not {prompt.lower() for prompt in rehearsal.PROMPTS} & {prompt.lower() for prompt in evaluated(fact)}
    assert not [prompt for prompt in rehearsal.PROMPTS if is_subject(prompt, fact) or holds(prompt, fact.match)]
