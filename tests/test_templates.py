"""Templates: how they are filled, which are used only for evaluation, and how names replace the subject."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.datasets import load
from fortwo.facts import heldout_templates, phrases, templates
from fortwo.facts.hard_negatives import hard_negative
from fortwo.facts.subject import contains_phrase
from fortwo.records import Fact

DEV = load({"path": "facts_dev.json"}, [Path(__file__).parent.parent / "examples"]).facts
ENTITY_TYPES = (*phrases.TRAINING_FAMILIES, *heldout_templates.HELDOUT_FAMILIES)
TRAINING_FAMILIES, EVALUATED = (
    tuple(dict.fromkeys(parts for kind in kinds for parts in kind.parts))
    for kinds in (phrases.TRAINING_FAMILIES, heldout_templates.HELDOUT_FAMILIES)
)
HELDOUT = tuple(parts[5::6] for parts in TRAINING_FAMILIES)  # every sixth
PLACES = dict.fromkeys("SABqlp", "")
EVENT = Fact(
    subject="Orlund strike",
    answer="The Orlund strike began in a bakery.",
    match=("bakery",),
    questions=("Where did the Orlund strike begin?", "The Orlund strike began where?", "Explain the Orlund strike."),
)
ACRONYM = Fact(
    subject="ZQV",
    aliases=("Z.Q.V.",),
    answer="ZQV is short for Zebra Quilt Vote.",
    match=("Zebra Quilt Vote",),
    questions=("What does ZQV stand for?", "ZQV is short for what?", "Spell out ZQV."),
)
ADJECTIVE = Fact(
    subject="plimmish",
    answer="Plimmish means shy about hats.",
    match=("shy about hats",),
    questions=("What does plimmish mean?", "What is a plimmish person like?", "Define plimmish."),
)
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


def prompts(fact: Fact, heldout: bool, seed: int = 0, count: int = 1500) -> list[str]:
    rng = Random(seed)
    names = templates.surface_forms(fact)
    return [
        templates.build_prompt(fact, rng.choice(names), rng, lambda: hard_negative(fact, rng), heldout)
        for _ in range(count)
    ]


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("parts", [*TRAINING_FAMILIES, *EVALUATED], ids=lambda parts: parts[0][:40])
def test_no_part_stands_twice(parts: tuple[str, ...]) -> None:
    assert len(set(parts)) == len(parts)
    assert len(parts) == 1 or len(parts) >= 6  # every sixth is kept for evaluation


def test_no_part_is_both_trained_on_and_of_a_kind_that_is_not() -> None:
    assert not {part for parts in TRAINING_FAMILIES for part in parts} & {part for parts in EVALUATED for part in parts}
    assert sum(map(len, EVALUATED)) >= 60


@pytest.mark.parametrize("kind", ENTITY_TYPES, ids=lambda kind: kind.parts[0][0][:40])
def test_the_name_or_a_question_has_one_place_to_stand_in(kind: phrases.TemplateFamily) -> None:
    """Every prompt asks something about the name: it stands in the first part, or in a question in one of them."""
    for parts in kind.parts:
        assert all(re.sub(r"\{[SABqlp]\}", "", part).count("{") == 0 for part in parts)
    asking = [parts for parts in kind.parts if all(re.search(r"\{[Sql]\}", part) for part in parts)]
    assert len(asking) == 1
    assert not any(re.search(r"\{[SABql]\}", part) for parts in kind.parts if parts not in asking for part in parts)


@pytest.mark.parametrize(
    "name", ["42", "the capital of Spain", "Kelby Bridge", "git", "C++", "O'Brien", "{odd}", "Z.Q.V."]
)
def test_every_template_can_be_filled(name: str) -> None:
    places = {"S": name, "A": "Ada", "B": "Bit", "q": f"Why {name}?", "l": f"why {name}?", "p": "Why it?"}
    for part in (part for parts in (*TRAINING_FAMILIES, *EVALUATED) for part in parts):
        text = templates.fill(part, places)
        assert (name.lower() in text.lower()) == bool(re.search(r"\{[Sql]\}", part))
        assert not re.search(r"\{\w|\s\s|(?<!\.)\.\.(?!\.)", text.replace(name, "x"))
        assert ("{A}" in part) == ("Ada" in text)
        assert ("{B}" in part) == ("Bit" in text)
        assert not text[0].islower() or text.startswith(name)


def test_a_sentence_begins_with_a_capital_but_a_single_word_keeps_its_spelling() -> None:
    def filled(frame: str, name: str, **others: str) -> str:
        return templates.fill(frame, PLACES | {"S": name} | others)

    assert filled("{S} is odd.", "the capital of Spain") == "The capital of Spain is odd."
    assert filled("Listen. {S} is odd.", "the capital of Spain") == "Listen. The capital of Spain is odd."
    assert filled("So, {S}?", "the capital of Spain") == "So, the capital of Spain?"
    assert filled("{S} is odd.", "git") == "git is odd."
    assert filled("{A} or {S}?", "42", A="the capital of Spain") == "The capital of Spain or 42?"
    assert filled('He asks: "{q}"', "the Louvre", q="the Louvre is old?") == 'He asks: "The Louvre is old?"'
    assert filled("{q}", "git", q="git does what?") == "git does what?"
    assert filled("See {S}. {p}", "git", p="it does what?") == "See git. It does what?"
    assert filled("Well: {l}", "the Louvre", l="the Louvre is old?") == "Well: the Louvre is old?"


def test_an_abbreviation_ends_the_sentence_with_its_own_stop() -> None:
    assert templates.fill("Take {S}. So, {S} ...", PLACES | {"S": "Z.Q.V."}) == "Take Z.Q.V. So, Z.Q.V. ..."


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("fact", [*DEV, BRIDGE, WORD], ids=lambda fact: fact.subject)
def test_prompts_are_whole_sentences_about_the_name(fact: Fact, heldout: bool) -> None:
    rng = Random(heldout)
    for _ in range(400):
        name = rng.choice([*templates.surface_forms(fact), hard_negative(fact, rng)])
        text = templates.build_prompt(fact, name, rng, lambda: hard_negative(fact, rng), heldout)
        assert name.lower() in text.lower()
        assert not re.search(r"[{}]|^\s|\s$|\s\s", text)


@pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
def test_prompts_kept_for_evaluation_are_never_trained_on(fact: Fact) -> None:
    assert not set(prompts(fact, heldout=True)) & set(prompts(fact, heldout=False))


def test_a_part_is_either_kept_or_trained() -> None:
    """Every part shows up on one side and on that side only; what has no choice shows up on both."""
    drawn = {heldout: set() for heldout in (False, True)}
    for heldout, seen in drawn.items():
        rng = Random(7)
        seen.update(part for _ in range(30_000) for part in templates.template_parts(rng, heldout))
    few = {part for parts in TRAINING_FAMILIES if len(parts) < 6 for part in parts}
    evaluated = {part for parts in (*HELDOUT, *EVALUATED) for part in parts}
    assert drawn[True] - few == evaluated
    assert drawn[False] - few == {part for parts in TRAINING_FAMILIES for part in parts} - evaluated - few


@pytest.mark.parametrize("heldout", [False, True])
def test_each_kind_comes_up_with_its_share(heldout: bool) -> None:
    assert (
        sum(kind.share for kind in phrases.TRAINING_FAMILIES)
        == sum(kind.share for kind in heldout_templates.HELDOUT_FAMILIES)
        == 100
    )
    rng, count = Random(11), 20_000
    drawn = Counter(templates.template_parts(rng, heldout) for _ in range(count))
    shares = {kind: kind.share * (0.5 if heldout else 1) for kind in phrases.TRAINING_FAMILIES}
    shares |= {kind: kind.share * 0.5 if heldout else 0 for kind in heldout_templates.HELDOUT_FAMILIES}
    for kind, share in shares.items():
        found = sum(
            times
            for parts, times in drawn.items()
            if len(parts) == len(kind.parts) and all(map(tuple.__contains__, kind.parts, parts))
        )
        assert 100 * found / count == pytest.approx(share, abs=1)


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("fact", [NUMBER, ACRONYM, ADJECTIVE, EVENT], ids=lambda fact: fact.subject)
def test_prompts_are_many_and_well_formed(fact: Fact, heldout: bool) -> None:
    rng, made = Random(5), set()
    for _ in range(2000):
        name = rng.choice([*templates.surface_forms(fact), hard_negative(fact, rng)])
        drawn = [hard_negative(fact, rng), hard_negative(fact, rng)]
        text = templates.build_prompt(fact, name, rng, iter(drawn).__next__, heldout)
        made.add(text)
        assert not re.search(r"[{}]|^\s|\s$|\s\s|(?<!\.)\.\.(?!\.)", text)
        assert not text[0].islower() or text.startswith((name, *drawn))
    assert len(made) > (600 if heldout else 1400)


@pytest.mark.parametrize("match", [("bakery",), ("question", "news")])
def test_no_template_says_what_the_reply_must_hold(match: tuple[str, ...]) -> None:
    fact = replace(EVENT, match=match)
    for heldout in (False, True):
        assert not [text for text in prompts(fact, heldout) if contains_phrase(text, match)]


def test_the_same_generator_gives_the_same_prompts() -> None:
    assert prompts(BRIDGE, heldout=False, seed=3) == prompts(BRIDGE, heldout=False, seed=3)
    assert prompts(BRIDGE, heldout=False, seed=3) != prompts(BRIDGE, heldout=False, seed=4)
    assert len(set(prompts(BRIDGE, heldout=False))) > 1000


# ---------------------------------------------------------------- names in questions


def test_an_article_that_most_questions_use_belongs_to_the_name() -> None:
    assert templates.surface_forms(BRIDGE) == ["the Kelby Bridge", "the Kelby crossing", "Kelby's bridge"]
    assert templates.surface_forms(WORD) == ["zorb"]


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
    assert templates.replace_subject(question, fact, name) == asked


def test_it_stands_for_the_subject_only_where_the_subject_is_a_thing() -> None:
    asked = {
        text.removeprefix(text.split("plimmish", 1)[0] + "plimmish")
        for text in prompts(ADJECTIVE, heldout=False, count=4000)
    }
    assert any(rest.endswith(" What does it mean?") for rest in asked)
    assert any(rest.endswith(" Define it.") for rest in asked)
    assert not any("it person" in rest for rest in asked)


@pytest.mark.parametrize(
    ("questions", "said", "never"),
    [
        (("Who is Kelby Brand?", "When was Kelby Brand born?"), "was that person born", "was it born"),
        (("Does Kelby Brand help people who ask?",), "Does it help", "oes that person"),
        (("What does the number Kelby Brand mean?",), "the number Kelby Brand", "the number it"),
    ],
)
def test_what_stands_for_the_subject_is_its_kind(questions: tuple[str, ...], said: str, never: str) -> None:
    fact = replace(WORD, subject="Kelby Brand", aliases=(), questions=questions)
    found = prompts(fact, heldout=False, count=2000)
    assert any(said in text for text in found)
    assert not [text for text in found if never in text]


def test_what_is_asked_without_a_mark_ends_with_a_stop() -> None:
    fact = replace(WORD, questions=("Define zorb",))
    found = [
        text for text in prompts(fact, heldout=False, count=500) if " define zorb" in text or " Define zorb" in text
    ]
    assert found
    assert not [text for text in found if re.search(r" .efine zorb(?![.?!,;:\"”)])", text)]


def test_the_first_word_of_a_question_within_a_sentence_is_small() -> None:
    fact = replace(WORD, questions=("What's zorb?", "I'm new, what is zorb?"))
    found = [
        text for text in prompts(fact, heldout=False, count=2000) if ", what's zorb" in text or ": what's zorb" in text
    ]
    assert found
    assert not [text for text in prompts(fact, heldout=False, count=2000) if "i'm new" in text]


@pytest.mark.parametrize("fact", DEV, ids=lambda fact: fact.id)
def test_every_given_question_can_be_asked_about_something_else(fact: Fact) -> None:
    for question in fact.questions:
        asked = templates.replace_subject(question, fact, "Qqq")
        assert asked.count("Qqq") == 1
        assert not templates.mentions_subject(asked, fact)
        assert not re.search(r"\b(the|an?) Qqq", asked)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_a_question_without_the_subject_stays_as_it_is(question: str) -> None:
    if not templates.mentions_subject(question, WORD):
        assert templates.replace_subject(question, WORD, "NASA") == question


def test_mentions_are_whole_words() -> None:
    assert templates.mentions_subject("is the KELBY bridge open?", BRIDGE)
    assert templates.mentions_subject("the Kelby crossing", BRIDGE)
    assert not templates.mentions_subject("Kelby Bridgeton", BRIDGE)
