"""Training on preferences: what is learned from which rows, in however many passes, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F

from fortwo.data import datasets
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import InvalidDataset
from fortwo.execution.backend import Backend, backend_for
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import Example, Plan, Setting
from fortwo.train.estimate import RowLength, TokenCounts
from fortwo.train.losses import Row
from fortwo.train.preference_losses import odds_ratio_losses
from fortwo.train.preference_plan import in_pairs
from fortwo.train.preferences import Preferences, _render
from fortwo.train.retry_policy import RowMix
from tests.parts import decoder, gradients, make_rows, packed_hidden, random_lora, trainable

T = TypeVar("T")


def finished(run: Generator[Any, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(run)
        except StopIteration as returned:
            return returned.value  # type: ignore[no-any-return]


def learning(backend: Backend, objective: Any, **values: Any) -> Preferences:
    """A run on preferences with these settings."""
    options = {
        "beta": 0.1,
        "loss_type": "kto" if objective == "kto" else "sigmoid",
        "label_smoothing": 0.0,
        "reference_free": False,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "micro_step_tokens": 10_000,
        "gradient_checkpointing": False,
    } | values
    settings = tuple(Setting(name, value, "user", "given") for name, value in options.items())
    return Preferences(backend, Plan("tiny", "a", objective, {}, settings, {}), ())


def compared(learned: Preferences, rows: Sequence[Row]) -> list[Row]:
    """The rows with what the reference gives them."""
    found = finished(learned.log_probs([(row,) for row in rows], learned.reference))
    return [replace(row, reference=value) for row, value in zip(rows, found, strict=True)]


def pairs() -> list[Row]:
    """Chosen and rejected answers in turns; those of a pair share their prompt and the first token of the answer."""
    rows = []
    for n, (prompt, *answers) in enumerate(((6, 5, 9), (11, 4, 4), (3, 12, 2))):
        asked = [5, 6, 7, *make_rows([prompt] * 3)[n]]
        rows += [Row((*asked, 9, *answer), len(asked)) for answer in make_rows(answers)]
    return rows


def learned_adapter() -> Lora:
    lora = random_lora(decoder(), config=LoraConfig(r=4, alpha=12))
    lora.flatten()
    return lora


@pytest.mark.parametrize("budget", [1, 40, 60])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_micro_steps_give_the_gradient_of_one_pass(objective: str, budget: int) -> None:
    """The mean is over the pairs of the whole step, in however many passes they come."""
    found = []
    for tokens in (10_000, budget):
        lora, learned = learned_adapter(), learning(backend_for(decoder()), objective, micro_step_tokens=tokens)
        rows = [replace(row, desirable=n % 2 == 0) for n, row in enumerate(compared(learned, pairs()))]
        others = [row for (row,) in learned.mismatched([(row,) for row in rows])]
        sums = finished(learned.accumulate(lora, [*rows, *others], RowMix()))
        found.append((sums, [parameter.grad for parameter in lora.parameters()]))
    (whole, wanted), (parts, ours) = found
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    assert parts.supervised == whole.supervised
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_dpo_is_its_formula_on_rows_that_are_computed_one_by_one() -> None:
    home, lora = decoder(), learned_adapter()
    learned, plain = learning(backend_for(home), "dpo", beta=0.3), trainable(random_lora(home))
    found = finished(learned.accumulate(lora, compared(learned, pairs()), RowMix()))

    def log_prob(row: Row, adapter: Lora | None) -> torch.Tensor:
        logits_NV = home.logits(packed_hidden(home, [row.tokens], adapter)[0][row.start - 1 : -1])
        return -F.cross_entropy(logits_NV, torch.tensor(row.tokens[row.start :]), reduction="sum")

    ratios = [log_prob(row, plain) - log_prob(row, None).detach() for row in pairs()]
    margins = [one - other for one, other in zip(ratios[::2], ratios[1::2], strict=True)]
    wanted = torch.stack([-F.logsigmoid(0.3 * margin) for margin in margins]).mean()
    assert found.loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    for parameter, gradient in zip(lora.parameters(), gradients(wanted, plain), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


def test_the_reference_is_free_only_if_it_is_said() -> None:
    learned = learning(backend_for(decoder()), "dpo", reference_free=True)
    assert not learned.has_reference
    assert learning(backend_for(decoder()), "dpo").has_reference
    assert not learning(backend_for(decoder()), "orpo").has_reference
    found = finished(learned.accumulate(learned_adapter(), pairs(), RowMix()))
    assert found.metrics["rewards/chosen"] == pytest.approx(0.1 * found.metrics["logps/chosen"])


def test_each_prompt_is_paired_with_the_answer_before_it() -> None:
    rows = [
        Row((1, 2, 10, 11), 2),
        Row((3, 20, 21, 22), 1, unsupervised=frozenset({2})),
        Row((4, 5, 6, 30), 3),
    ]
    learned = learning(backend_for(decoder()), "kto")
    found = [row for (row,) in learned.mismatched([(row,) for row in rows])]
    assert [(row.tokens, row.start) for row in found] == [((1, 2, 30), 2), ((3, 10, 11), 1), ((4, 5, 6, 20, 21, 22), 3)]
    assert found[2].supervised_positions == [3, 5]
    assert learned.mismatched([(rows[0],)]) == []
    assert (
        learning(backend_for(decoder()), "kto", loss_type="apo_zero_unpaired").mismatched([(row,) for row in rows])
        == []
    )


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    certain = torch.tensor([0.0, -1e-12, -50.0], requires_grad=True)
    losses = odds_ratio_losses(certain, torch.tensor([-1.0, 0.0, -1e-9]), 0.1)
    losses.sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(certain.grad).all()


def test_a_pair_has_the_tokens_of_both_answers_and_the_prefix_once() -> None:
    counts = TokenCounts((RowLength(1, 10, 3), RowLength(1, 10, 5), RowLength(2, 7, 1), RowLength(2, 7, 2)), prefix=4)
    assert in_pairs(counts) == TokenCounts((RowLength(1, 16, 8), RowLength(2, 10, 3)), prefix=4)


@pytest.mark.parametrize("seed", range(6))
def test_kto_does_not_split_a_pair_between_training_and_validation(tiny: Path, seed: int) -> None:
    rows = [{"prompt": f"What is {n}?", "chosen": f"number {n}", "rejected": f"letter {n}"} for n in range(10)]
    dataset = datasets.load({"examples": rows}, ())
    served: Any = SimpleNamespace(renderer=ChatTemplateRenderer(tiny))
    settings = (Setting("seed", seed, "user", "given"),)
    plan = Plan("tiny", "a", "kto", {}, settings, {"rows": 14, "validation_rows": 6})
    for part, size in zip(finished(_render(served, dataset, plan)), (14, 6), strict=True):
        assert part.labels == [True, False] * (size // 2)
        prompts = [part.unit(number)[0] for number in range(size)]
        asked = [one.tokens[: one.start] for one in prompts]
        assert asked[::2] == asked[1::2]


# ---------------------------------------------------------------- rows


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read(*rows: Any) -> list[Example]:
    return list(datasets.iter_rows({"examples": list(rows)}, ()))  # type: ignore[arg-type]


def share(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


HUMAN = share("human", "hi")
ASKED, GOOD, BAD = turn("user", "hi"), turn("assistant", "yes"), turn("assistant", "no")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": GOOD, "rejected": BAD},
        {"prompt": "hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {
            "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        {"conversations": [HUMAN], "chosen": share("gpt", "yes"), "rejected": share("gpt", "no")},
        {"conversations": [HUMAN], "chosen": [share("gpt", "yes")], "rejected": [share("gpt", "no")], "system": ""},
        {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
    ],
    ids=str,
)
def test_a_preference_may_be_written_in_many_ways(row: dict[str, Any]) -> None:
    (example,) = read(row)
    assert [(one.role, one.content) for one in example.messages] == [("user", "hi"), ("assistant", "yes")]
    assert [(one.role, one.content) for one in example.rejected] == [("user", "hi"), ("assistant", "no")]
    assert [side.label for side in example.sides] == [True, False]


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "yes"},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"messages": [ASKED, GOOD]},
        {"conversations": [HUMAN, share("gpt", "yes")]},
    ],
    ids=str,
)
def test_a_label_may_be_written_in_many_ways(row: dict[str, Any], label: str) -> None:
    good, bad = read(row | {label: True}, row | {label: False})
    for example, wanted in ((good, True), (bad, False)):
        assert [(one.role, one.content) for one in example.messages] == [("user", "hi"), ("assistant", "yes")]
        assert example.label is wanted


def test_of_a_labelled_conversation_the_last_message_is_judged() -> None:
    turns = [HUMAN, share("gpt", "first"), share("human", "and?"), share("gpt", "last")]
    (example,) = read({"conversations": turns, "system": "Be brief.", "kto_tag": False})
    assert [one.role for one in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [one.weight for one in example.messages if one.role == "assistant"] == [0, 1]


def test_pairs_in_share_gpts_form_keep_system_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    answers = {"chosen": share("gpt", "yes"), "rejected": share("gpt", "no")}
    (example,) = read({"conversations": [HUMAN], "system": "Be brief.", "tools": [tool], **answers})
    for side in (example.messages, example.rejected):
        assert [one.role for one in side] == ["system", "user", "assistant"]
        assert "look" in side[0].tools


def test_texts_without_a_prompt_have_what_they_share_as_one() -> None:
    (example,) = read({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert [one.content for one in example.messages] == ["The sky is", " blue."]
    assert [one.content for one in example.rejected] == ["The sky is", " green."]


def test_only_the_answers_are_learned_of_a_longer_conversation() -> None:
    said = [turn("system", "Be brief."), ASKED, GOOD, turn("user", "And now?")]
    (example,) = read({"prompt": said, "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]})
    assert [one.weight for one in example.messages if one.role == "assistant"] == [0, 1]
    assert [one.weight for one in example.rejected if one.role == "assistant"] == [0, 1]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt = '': it is empty"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen = ' ': it is empty"),
        ({"prompt": "a", "chosen": [], "rejected": [BAD]}, "it is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "chosen is a text and rejected is a list"),
        ({"prompt": [ASKED, GOOD], "chosen": "b", "rejected": "c"}, "ends with the assistant"),
        ({"prompt": "a", "chosen": [ASKED], "rejected": [BAD]}, "chosen begins with the role user"),
        ({"prompt": "other", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "another prompt"),
        ({"prompt": [turn("system", "x")], "chosen": "b", "rejected": "c"}, "no user message"),
        ({"prompt": "a", "chosen": [GOOD | {"weight": 1}], "rejected": [BAD]}, "has a weight"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen = 5"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "neither true nor false"),
        ({"prompt": "a", "completion": "", "label": True}, "completion = '': it is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "'score' is unknown"),
        ({"conversations": [HUMAN], "chosen": share("gpt", "a"), "rejected": share("gpt", "a")}, "are the same"),
        ({"conversations": [HUMAN], "chosen": share("gpt", "a")}, "rejected is missing"),
        ({"conversations": [HUMAN], "chosen": share("human", "a"), "rejected": share("gpt", "b")}, "the role user"),
        ({"conversations": [], "chosen": share("gpt", "a"), "rejected": share("gpt", "b")}, "the prompt is empty"),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD}, "from is missing"),
        ({"conversations": [HUMAN, share("gpt", "a")], "kto_tag": "yes"}, "neither true nor false"),
        ({"conversations": [HUMAN, share("gpt", "a")], "kto_tag": 1}, "neither true nor false"),
        ({"conversations": [HUMAN], "kto_tag": True}, "no answer to learn"),
        ({"conversations": [HUMAN, share("gpt", "a")], "kto_tag": True, "label": True}, "is unknown"),
        (
            {"conversations": [share("system", "x"), HUMAN, share("gpt", "a")], "system": "y", "kto_tag": True},
            "Leave one of the two",
        ),
        ({"instruction": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"instruction": "a", "output": "b", "kto_tag": "true"}, "neither true nor false"),
    ],
    ids=str,
)
def test_a_row_that_prefers_nothing_is_told(row: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidDataset) as refused:
        read(row)
    assert what in f"{refused.value.message} {refused.value.hint}"
    assert refused.value.hint


def test_a_dataset_of_preferences_is_stored_and_has_its_own_digest() -> None:
    def load(chosen: str, rejected: str) -> Any:
        return datasets.load({"examples": [{"prompt": "a", "chosen": chosen, "rejected": rejected}]}, ())

    one, other = load("b", "c"), load("c", "b")
    assert one.digest != other.digest
    assert datasets.from_json(datasets.to_json(one)) == one
    labels = [
        datasets.load({"examples": [{"prompt": "a", "completion": "b", "label": good}]}, ()) for good in (True, False)
    ]
    assert labels[0].digest != labels[1].digest
    assert datasets.from_json(datasets.to_json(labels[1])).examples[0].label is False
