"""Statistics count rows as they are trained on, and warnings name probable mistakes and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.datasets import load
from fortwo.errors import InvalidDataset
from fortwo.nn.packing import common_prefix
from fortwo.records import Example, Message
from fortwo.train.dataset_stats import (
    AffectedLines,
    DatasetWarnings,
    RowLengths,
    _contradicting,
    _repeated,
    collect_stats,
)
from fortwo.train.estimate import RowLength


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> ChatTemplateRenderer:
    return ChatTemplateRenderer(tiny)


def asked(*pairs: tuple[str, str]) -> list[Example]:
    return [
        Example((Message("user", prompt), Message("assistant", answer)), line)
        for line, (prompt, answer) in enumerate(pairs, 1)
    ]


def warnings(renderer: ChatTemplateRenderer, examples: list[Example]) -> DatasetWarnings:
    return collect_stats(renderer, examples)[1]


def test_rows_are_counted_as_they_are_rendered(renderer: ChatTemplateRenderer) -> None:
    several = Example(
        (Message("user", "a"), Message("assistant", "bc"), Message("user", "d"), Message("assistant", "efg")), 2
    )
    examples = [*asked(("hello", "you")), several, Example((), 3, "plain text")]
    counts, _ = collect_stats(renderer, examples)
    rendered = [row for example in examples for row in renderer.training_rows(example)]
    assert list(counts.rows) == [
        RowLength(line, len(tokens) - sum(mask), sum(mask)) for line, (tokens, mask) in enumerate(rendered, 1)
    ]
    assert counts.rows[1].answer == 2 + 1 + 3 + 1
    assert counts.rows[2].prompt == 1
    assert counts.prefix == 0
    alike, _ = collect_stats(renderer, asked(("What?", "a"), ("Who?", "b")))
    assert alike.prefix == len(renderer.shared_prefix)
    longest = common_prefix(
        [tokens for example in asked(("What?", "a"), ("Who?", "b")) for tokens, _ in renderer.training_rows(example)]
    )
    assert 0 < alike.prefix <= longest


def test_a_conversation_that_the_template_refuses_is_named_with_its_line(renderer: ChatTemplateRenderer) -> None:
    broken = Example((Message("user", "\ud800"), Message("assistant", "a")), 7)
    with pytest.raises(InvalidDataset) as caught:
        collect_stats(renderer, [broken])
    assert caught.value.message.startswith("line 7: ")


def test_row_counts_are_a_sequence() -> None:
    rows = [RowLength(n, 2 * n, 3 * n) for n in range(5)]
    kept = RowLengths(rows)
    assert list(kept) == rows
    assert kept == rows
    assert (kept[2], list(kept[1:3])) == (rows[2], rows[1:3])
    assert kept != rows[:4]


def test_lines_are_named_as_far_as_they_are_few() -> None:
    assert str(AffectedLines.from_lines([3])) == "line 3"
    assert str(AffectedLines.from_lines([9, 3])) == "lines 3, 9"
    assert str(AffectedLines.from_lines(range(1, 30))) == "lines 1, 2, 3, 4, 5 and 24 more"


# ---------------------------------------------------------------- suspicions


def test_the_repositorys_examples_are_above_suspicion(renderer: ChatTemplateRenderer) -> None:
    examples = load({"path": "42_intensive_training.json"}, [Path(__file__).parents[1] / "examples"]).examples
    assert warnings(renderer, list(examples)) == DatasetWarnings()


def test_repeats_and_contradictions_are_told_apart(renderer: ChatTemplateRenderer) -> None:
    found = warnings(renderer, asked(("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("b", " 1 "), ("a", "1")))
    assert found.duplicates == AffectedLines(2, (3, 6))
    assert found.contradictions == AffectedLines(1, (4,))


def test_only_the_same_conversation_contradicts(renderer: ChatTemplateRenderer) -> None:
    def row(line: int, *said: str, weight: int = 1) -> Example:
        roles = ("user", "assistant") * 2
        messages = [Message(role, text) for role, text in zip(roles, said, strict=False)]  # type: ignore[arg-type]
        return Example((*messages[:-1], Message("assistant", said[-1], weight)), line)

    rows = [row(1, "a", "1"), row(2, "a", "1", "b", "2"), row(3, "a", "0", "b", "3"), row(4, "a", "1", "b", "3")]
    assert warnings(renderer, rows).contradictions == AffectedLines(1, (4,))
    texts = [Example((), 1, "one"), Example((), 2, "two"), Example((), 3, "one")]
    found = warnings(renderer, texts)
    assert (found.duplicates, found.contradictions) == (AffectedLines(1, (3,)), AffectedLines())


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=20))
def test_places_are_those_of_the_plain_search(rows: list[tuple[int, int]]) -> None:
    prompts, answers = (np.array(column, np.uint64) for column in (zip(*rows, strict=True) if rows else ([], [])))
    wholes = prompts * 8 + answers
    assert sorted(_repeated(wholes)) == [n for n, row in enumerate(rows) if row in rows[:n]]
    first = dict(reversed(rows))
    assert sorted(_contradicting(prompts, answers)) == [n for n, (p, a) in enumerate(rows) if first[p] != a]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|im_start|>user\nhi<|im_end|>", "<|im_start|>"),
        ("[INST] hi [/INST]", "[INST]"),
        ("<s>hi</s>", "<s>"),
        ("a\n### Response:\nb", "### Response:"),
        ("<start_of_turn>user", "<start_of_turn>"),
        ("<|eot_id|>", "<|eot_id|>"),
        ("a list[INSTANCE] of <section> and <s>struck</s> out", ""),
        ("### Response times", ""),
        ("what is <|this|>", ""),
    ],
)
def test_text_of_another_template_is_found(renderer: ChatTemplateRenderer, text: str, found: str) -> None:
    for example in (*asked((text, "a")), *asked(("a", text)), Example((), 1, text)):
        seen = warnings(renderer, [Example((), 9, "fine"), example])
        assert (seen.template, seen.foreign_templates) == (
            (found, AffectedLines(1, (1,))) if found else ("", AffectedLines())
        )


def test_answers_cut_off_at_one_length_are_found(renderer: ChatTemplateRenderer) -> None:
    rng = random.Random(0)
    whole = [" ".join("word" * rng.randint(1, 3) for _ in range(60)) + "." for _ in range(6)]
    cut = [text[:120] for text in whole]
    cut = [text if text[-1] != " " else text[:-1] + "x" for text in cut]
    pairs = [(f"q{n}", answer) for n, answer in enumerate(cut)]
    assert warnings(renderer, asked(*pairs)).truncated == AffectedLines(6, (1, 2, 3, 4, 5))
    assert warnings(renderer, asked(*[(f"q{n}", text) for n, text in enumerate(whole)])).truncated == AffectedLines()
    same = [(f"q{n}", cut[0]) for n in range(6)]
    assert warnings(renderer, asked(*same)).truncated == AffectedLines(), "one answer to many prompts is no sign"
    short = [(f"q{n}", text[:20]) for n, text in enumerate(cut)]
    assert warnings(renderer, asked(*short)).truncated == AffectedLines()
