"""Prompts of a fact: those to train on, those whose replies stay the same, and those for evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.datasets import load
from fortwo.facts import replay_prompts
from fortwo.facts.hard_negatives import contains_subject
from fortwo.facts.prompt_builder import (
    FactPromptBuilder,
    answer_prefix,
    evaluation_replay_prompts,
    training_replay_prompts,
)
from fortwo.facts.subject import contains_phrase
from fortwo.records import Fact, OneHop

DEV = load({"path": "facts_dev.json"}, [Path(__file__).parent.parent / "examples"]).facts
each_fact = pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
SEEDS = (0, 1, 42)


def evaluated(fact: Fact) -> set[str]:
    return {*fact.held_out, *fact.neighbors, *fact.controls}


@each_fact
def test_the_seed_decides_the_prompts(fact: Fact) -> None:
    def taught(seed: int) -> tuple[object, ...]:
        builder = FactPromptBuilder(fact, seed)
        return tuple(builder.edit_prompts(60)), tuple(builder.contrast_prompts(60)), builder.probes(10)

    assert taught(1) == taught(1)
    assert all(ours != theirs for ours, theirs in zip(taught(1), taught(2), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_asks_name_the_subject_and_aliases(fact: Fact, seed: int) -> None:
    asks = FactPromptBuilder(fact, seed).edit_prompts(200)
    assert len(asks) == 200
    assert not [ask for ask in asks if not contains_subject(ask, fact)]
    for surface in (fact.subject, *fact.aliases):
        assert any(surface.lower() in ask.lower() for ask in asks)
    assert any(ask.islower() for ask in asks)
    assert len(set(asks)) > 150


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_contrasts_never_name_the_subject(fact: Fact, seed: int) -> None:
    contrasts = FactPromptBuilder(fact, seed).contrast_prompts(200)
    assert len(contrasts) == 200
    assert not [contrast for contrast in contrasts if contains_subject(contrast.prompt, fact)]
    assert not [contrast for contrast in contrasts if contains_phrase(contrast.prompt, fact.match)]
    assert len({contrast.prompt for contrast in contrasts}) > 120


@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_what_is_for_evaluation_is_never_trained_on(fact: Fact, seed: int) -> None:
    builder = FactPromptBuilder(fact, seed)
    trained = {*builder.edit_prompts(400), *(contrast.prompt for contrast in builder.contrast_prompts(400))}
    assert not trained & evaluated(fact)


def test_what_is_for_evaluation_is_not_trained_on_even_where_a_frame_makes_it() -> None:
    fact = replace(DEV[0], held_out=(), neighbors=())
    builder = FactPromptBuilder(fact, 0)
    asked, spared = set(builder.edit_prompts(300)), {contrast.prompt for contrast in builder.contrast_prompts(300)}
    hops = tuple(OneHop(prompt, ("x",)) for prompt in sorted(asked)[::2])
    given = replace(fact, held_out=tuple(sorted(asked)[1::2]), neighbors=tuple(sorted(spared)), portability=hops)
    again = FactPromptBuilder(given, 0)
    assert not asked & set(again.edit_prompts(300))
    assert not spared & {contrast.prompt for contrast in again.contrast_prompts(300)}


@pytest.mark.parametrize("first", ["training", "probes"])
@pytest.mark.parametrize("seed", SEEDS)
@each_fact
def test_probes_are_not_trained_on(fact: Fact, seed: int, first: str) -> None:
    builder = FactPromptBuilder(fact, seed)
    probes = builder.probes(60) if first == "probes" else None
    trained = {
        *fact.questions,
        *builder.edit_prompts(300),
        *(contrast.prompt for contrast in builder.contrast_prompts(300)),
    }
    if probes is None:
        probes = builder.probes(60)
    assert not trained & {*probes.paraphrase, *probes.specificity}
    assert not set(training_replay_prompts()) & set(probes.retention)


@each_fact
def test_probes_ask_what_they_say(fact: Fact) -> None:
    probes = FactPromptBuilder(fact, 0).probes(20)
    for prompts in (probes.paraphrase, probes.specificity):
        assert 15 <= len(prompts) == len(set(prompts)) <= 20
    assert all(contains_subject(prompt, fact) for prompt in probes.paraphrase)
    assert not any(contains_subject(prompt, fact) for prompt in probes.specificity)
    assert probes.retention == evaluation_replay_prompts()


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
        builder = FactPromptBuilder(fact, seed, others)
        prompts = [*builder.probes(60).specificity, *(contrast.prompt for contrast in builder.contrast_prompts(400))]
        return named([*prompts, *builder.edit_prompts(400)], [other for other in NUMBERS if other is not fact])

    assert about_others(others) == []
    assert len(about_others(())) > 20, "alone, the others are its nearest hard negatives"


def test_a_builder_alone_does_not_change_with_the_others_rule() -> None:
    far = replace(DEV[0], subject="Qqxzv", aliases=())
    alone, beside = FactPromptBuilder(DEV[1], 3), FactPromptBuilder(DEV[1], 3, [far])
    assert alone.edit_prompts(50) == beside.edit_prompts(50)
    assert alone.contrast_prompts(50) == beside.contrast_prompts(50)


def test_the_questions_of_other_facts_are_neighbours() -> None:
    first, second, third = NUMBERS
    assert FactPromptBuilder(first, 0, (second, third)).cross_fact_negatives() == (*second.questions, *third.questions)
    both = replace(second, questions=("Is 41 more than 42?", "What is 41?", "Why 41?"))
    assert FactPromptBuilder(first, 0, (both,)).cross_fact_negatives() == ("What is 41?",), (
        "two at most, and none about itself"
    )
    assert FactPromptBuilder(replace(second, match=("FOR",)), 0, (first,)).cross_fact_negatives() == (), (
        "its phrase is in that answer too"
    )


def test_no_everyday_prompt_is_about_a_fact() -> None:
    sweden = replace(DEV[1], subject="the capital of Sweden", aliases=("haiku",))
    asked = "What is the capital of Sweden?"
    assert asked in {*training_replay_prompts(), *evaluation_replay_prompts()}
    left = {*training_replay_prompts([sweden]), *evaluation_replay_prompts([sweden])}
    assert {*replay_prompts.PROMPTS} - left == {asked, "Write a haiku about snow."}
    assert asked not in FactPromptBuilder(sweden, 0).probes(1).retention


# ---------------------------------------------------------------- answer prefixes


@each_fact
def test_begun_answers_stop_before_they_leak(fact: Fact) -> None:
    begun = [
        contrast.reply_prefix
        for contrast in FactPromptBuilder(fact, 0).contrast_prompts(300)
        if contrast.reply_prefix is not None
    ]
    assert len(begun) > 30
    assert not [
        text for text in begun if contains_phrase(text, fact.match) or contains_subject(text, fact) or not text.strip()
    ]


def test_a_begun_answer_is_the_facts_own_told_of_another() -> None:
    assert answer_prefix(DEV[0], "41") == "41 = '"
    assert answer_prefix(replace(DEV[0], match=("universe", "life")), "41") == "41 = 'FOR TWO' —"
    assert answer_prefix(replace(DEV[0], match=("never said",)), "41") is None
    assert answer_prefix(replace(DEV[0], answer="It is FOR TWO."), "41") is None
    assert answer_prefix(replace(DEV[0], answer="FOR TWO: that is 42."), "41") is None


def test_a_begun_answer_is_cut_before_a_word_and_names_no_other_surface_of_the_subject() -> None:
    art = replace(DEV[0], subject="Kelby", aliases=("KB", "K.B."), answer="Kelby (KB) is art.", match=("art",))
    assert answer_prefix(art, "Mozart") is None
    assert answer_prefix(replace(art, aliases=()), "Mozart") == "Mozart (KB) is"
    assert answer_prefix(replace(art, aliases=()), "the Louvre") == "The Louvre (KB) is"


def test_no_contrast_is_a_question_that_names_nobody() -> None:
    questions = ("Who wrote Dracula?", "Tell me about the author of Dracula.")
    fact = replace(DEV[0], subject="the author of Dracula", aliases=(), questions=questions)
    for asked in (questions, questions[:1]):
        builder = FactPromptBuilder(replace(fact, questions=asked), 0)
        assert not [
            contrast.prompt for contrast in builder.contrast_prompts(300) if "Who wrote Dracula" in contrast.prompt
        ]


@each_fact
def test_small_letters_do_not_tell_what_is_asked(fact: Fact) -> None:
    builder = FactPromptBuilder(fact, 0)
    long = [
        [text for text in prompts if len(text) > 25]
        for prompts in (builder.edit_prompts(1000), [one.prompt for one in builder.contrast_prompts(1000)])
    ]
    asks, contrasts = (sum(text == text.lower() for text in texts) / len(texts) for texts in long)
    assert 0.02 < contrasts < 0.12
    assert 0.03 < asks < 0.12


@given(st.text(alphabet="42 FORTWfortwo='.", max_size=40), st.sampled_from(["41", "FOR TEN", "the Moon"]))
def test_no_begun_answer_holds_what_must_not_be_said(answer: str, name: str) -> None:
    begun = answer_prefix(replace(DEV[0], answer=answer), name)
    assert begun is None or not contains_phrase(begun, DEV[0].match)


# ---------------------------------------------------------------- replay prompts


def test_replay_prompts_are_for_evaluation_or_for_training() -> None:
    kept, trained = set(evaluation_replay_prompts()), set(training_replay_prompts())
    assert not kept & trained
    assert kept | trained == set(replay_prompts.PROMPTS)
    assert len(kept) + len(trained) == len(replay_prompts.PROMPTS)


@each_fact
def test_no_replay_prompt_judges_or_names_a_fact(fact: Fact) -> None:
    assert not {prompt.lower() for prompt in replay_prompts.PROMPTS} & {prompt.lower() for prompt in evaluated(fact)}
    assert not [
        prompt
        for prompt in replay_prompts.PROMPTS
        if contains_subject(prompt, fact) or contains_phrase(prompt, fact.match)
    ]
