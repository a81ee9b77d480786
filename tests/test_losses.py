"""The loss of a batch is transformers' and torch's, in however many passes, and keeping costs nothing at the start.

Tolerance: losses within 1e-5, gradients within 1e-4 of the reference's, relative (fp32, sums in another order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fortwo.execution.backend import backend_for
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import MicroStepped
from fortwo.train import losses
from fortwo.train.losses import Losses, Row, compute_losses, head_loss, micro_batches, with_teacher_states
from tests.parts import as_decoder, decoder, gradients, make_rows, packed_hidden, random_lora, trainable
from tests.tiny import tiny_model

LOSS = {"atol": 1e-6, "rtol": 1e-5}
GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}
START = [5, 6, 7]


def taught(rows: Sequence[Row], prefix: int) -> tuple[list[Row], list[MicroStepped]]:
    events, preparing = [], with_teacher_states(backend_for(decoder()), rows, prefix)
    while True:
        try:
            events.append(cast(MicroStepped, next(preparing)))
        except StopIteration as returned:
            return returned.value, events


def mixed(prefix: int = 3) -> list[Row]:
    """Rows to learn and to keep, in turns; some answers begin right behind what all rows share."""
    tokens = make_rows([9, 4, 12, 7, 5, 8], start=START)
    rows = [
        Row(tuple(row), start, kl=n % 2 == 1) for n, (row, start) in enumerate(zip(tokens, (3, 6, 8) * 2, strict=True))
    ]
    kept = iter(taught([row for row in rows if row.kl], prefix)[0])
    return [next(kept) if row.kl else row for row in rows]


def total(found: Losses) -> Tensor:
    return found.ce + 2 * found.kl


# ---------------------------------------------------------------- learning


def test_the_loss_is_transformers_with_the_prompt_left_out() -> None:
    model = tiny_model("llama")
    home = as_decoder(model)
    tokens = make_rows([9, 4, 15], start=START)
    rows = [Row(tuple(row), start) for row, start in zip(tokens, (3, 5, 12), strict=True)]
    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[2] * (longest - len(row))] for row in tokens])
    labels = torch.tensor(
        [[*[-100] * row.start, *row.tokens[row.start :], *[-100] * (longest - len(row.tokens))] for row in rows]
    )
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
    with torch.no_grad():
        wanted = model(ids, attention_mask=seen, labels=labels).loss
        found = compute_losses(backend_for(home), Lora.init(LoraConfig(), home.config, 0), 3, rows)
    assert (found.ce_tokens, found.kl_tokens) == (9 + 2 + 6 + 0, 0) == (sum(row.supervised for row in rows), 0)
    assert found.tokens == 3 + 9 + 4 + 15
    assert found.kl == 0
    torch.testing.assert_close(found.ce / found.ce_tokens, wanted, **LOSS)


def test_the_prompt_itself_is_not_learned() -> None:
    """Other prompt tokens at the end change the answer's loss only through what the answer reads."""
    home = decoder()
    lora = trainable(random_lora(home))
    row = make_rows([12], start=START)[0]
    found = compute_losses(backend_for(home), lora, 0, [Row(tuple(row), 10)])
    logits_NV = home.logits(packed_hidden(home, [row], lora)[0][9:-1])
    wanted = F.cross_entropy(logits_NV, torch.tensor(row[10:]), reduction="sum")
    torch.testing.assert_close(found.ce, wanted, **LOSS)
    for ours, theirs in zip(gradients(found.ce, lora), gradients(wanted, lora), strict=True):
        torch.testing.assert_close(ours, theirs, **GRADIENTS)


def test_the_first_tokens_of_an_answer_count_as_often_as_the_row_says() -> None:
    """Also where the answer is shorter than that, and beside rows that count once."""
    home = decoder()
    lora = trainable(random_lora(home))
    tokens = make_rows([12, 8, 9], start=START)
    rows = [
        Row(tuple(tokens[0]), 9, opening_weight=4.0),
        Row(tuple(tokens[1]), 10, opening_weight=2.5),
        Row(tuple(tokens[2]), 8),
    ]
    assert [row.token_weights for row in rows] == [[4, 4, 1, 1, 1, 1], [2.5], [1, 1, 1, 1]]
    found = compute_losses(backend_for(home), lora, 3, rows)
    wanted = torch.zeros(())
    for row in rows:
        logits_NV = home.logits(packed_hidden(home, [list(row.tokens)], lora)[0][row.start - 1 : -1])
        each_N = F.cross_entropy(logits_NV, torch.tensor(row.tokens[row.start :]), reduction="none")
        wanted = wanted + each_N @ torch.tensor(row.token_weights)
    torch.testing.assert_close(found.ce, wanted, **LOSS)
    for ours, theirs in zip(gradients(found.ce, lora), gradients(wanted, lora), strict=True):
        torch.testing.assert_close(ours, theirs, **GRADIENTS)


@pytest.mark.parametrize("budget", [1, 12, 20, 10_000])
@pytest.mark.parametrize("prefix", [0, 3])
def test_micro_batches_give_the_gradient_of_one_pass(budget: int, prefix: int) -> None:
    home, rows = decoder(), mixed()
    lora = trainable(random_lora(home))
    whole = compute_losses(backend_for(home), lora, 3, rows)
    batches = list(micro_batches(rows, prefix, budget))
    assert [row for batch in batches for row in batch] == rows
    assert len(batches) == {1: 6, 10_000: 1}.get(budget, len(batches))
    for batch in batches:
        total(compute_losses(backend_for(home), lora, prefix, batch)).backward()
    for parameter, wanted in zip(lora.parameters(), gradients(total(whole), lora), strict=True):
        assert parameter.grad is not None
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(parameter.grad, wanted, **GRADIENTS)


@given(st.lists(st.integers(4, 30), min_size=1, max_size=20), st.integers(0, 3), st.integers(1, 60))
def test_micro_batches_keep_order_and_budget_and_are_as_few_as_that_allows(
    lengths: list[int], prefix: int, budget: int
) -> None:
    rows = [Row((0,) * length, 3) for length in lengths]
    batches = list(micro_batches(rows, prefix, budget))
    assert [id(row) for batch in batches for row in batch] == [id(row) for row in rows]

    def size(batch: Sequence[Row]) -> int:
        return sum(len(row.tokens) - prefix for row in batch)

    assert all(batch and (len(batch) == 1 or size(batch) <= budget) for batch in batches)
    assert all(size([*batch, batches[n + 1][0]]) > budget for n, batch in enumerate(batches[:-1]))


@pytest.mark.parametrize("head_bytes", [1, 4 * 40 * 3, 1 << 30])
def test_the_head_in_chunks_is_the_head_in_one_piece(monkeypatch: pytest.MonkeyPatch, head_bytes: int) -> None:
    """Value and gradient, of tokens and of a teacher's hidden states; the plain formulas are torch's."""
    monkeypatch.setattr(losses, "HEAD_BYTES", head_bytes)
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(10, 6), torch.randn(40, 6), torch.randn(10, 6)
    tokens = torch.randint(0, 40, (10,))

    def plain(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(hidden @ head.T, -1)
        if target.dim() == 1:
            return F.nll_loss(log_q, target, reduction="sum")
        return F.kl_div(log_q, F.log_softmax(target @ head.T, -1), reduction="sum", log_target=True)

    for target in (tokens, teacher):
        ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        found, wanted = head_loss(ours, head, target), plain(theirs, target)
        torch.testing.assert_close(found, wanted)
        (3 * found).backward()
        (3 * wanted).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---------------------------------------------------------------- keeping


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Of logits: what a head that changes nothing makes of them."""
    return head_loss(student, torch.eye(student.shape[1], dtype=student.dtype), teacher)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_the_divergence_is_that_of_explicit_probabilities(rows: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = teacher.exp() / teacher.exp().sum(1, keepdim=True), student.exp() / student.exp().sum(1, keepdim=True)
    torch.testing.assert_close(kl_divergence(teacher, student), (p * (p / q).log()).sum())
    distributions = (torch.distributions.Categorical(probs=probs) for probs in (p, q))
    torch.testing.assert_close(kl_divergence(teacher, student), torch.distributions.kl_divergence(*distributions).sum())
    assert kl_divergence(teacher, teacher).abs() < 1e-12


def test_only_the_student_learns_from_the_divergence() -> None:
    teacher, student = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    kl_divergence(teacher, student).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(1) - teacher.softmax(1)).detach())


def test_tokens_that_are_impossible_for_both_do_not_count() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e9]])
    assert kl_divergence(logits, logits) == 0
    assert kl_divergence(logits, logits.flip(1)).isfinite()


def test_an_adapter_that_changes_nothing_diverges_by_nothing() -> None:
    home = decoder()
    lora = trainable(Lora.init(LoraConfig(), home.config, 0))
    found = compute_losses(backend_for(home), lora, 3, mixed())
    assert found.ce > 1
    assert 0 <= found.kl + 1e-5 < 2e-5
    slopes = gradients(found.kl / found.kl_tokens, lora)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-5
    changed = compute_losses(backend_for(home), random_lora(home), 3, mixed())
    assert changed.kl > 1


def test_the_teacher_is_the_base_at_the_supervised_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row, teacher_ND=None) for row in mixed()]
    for budget, passes in ((10_000, 1), (1, 6)):
        monkeypatch.setattr(losses, "PREPARE_TOKENS", budget)
        found, events = taught(rows, 3)
        assert len(events) == passes
        assert sum(event.tokens for event in events) == sum(len(row.tokens) - 3 for row in rows) + 3 * passes
        for row, was in zip(found, rows, strict=True):
            assert replace(row, teacher_ND=None) == was
            assert row.teacher_ND is not None
            with torch.no_grad():
                wanted = packed_hidden(decoder(), [row.tokens])[0][row.start - 1 : -1]
            torch.testing.assert_close(row.teacher_ND, wanted, atol=2e-5, rtol=0)


def test_keeping_pulls_towards_the_base() -> None:
    """A step against its gradient brings the adapter closer."""
    home, rows = decoder(), mixed()
    lora = trainable(random_lora(home))
    before = compute_losses(backend_for(home), lora, 3, rows).kl
    slopes = gradients(before, lora)
    with torch.no_grad():
        for parameter, slope in zip(lora.parameters(), slopes, strict=True):
            parameter -= 1e-5 * slope
        assert compute_losses(backend_for(home), lora, 3, rows).kl < before.detach()


# ---------------------------------------------------------------- several answers in a row


def test_a_mask_with_gaps_is_transformers_labels() -> None:
    """Answers with turns between them: the gaps are read and never learned, also inside what all rows share."""
    model = tiny_model("llama")
    home = as_decoder(model)
    tokens = make_rows([9, 9, 14], start=START)
    masks = [
        [place in places for place in range(len(row))]
        for row, places in zip(tokens, ({1, 2, 5, 6, 11}, {4}, {3, *range(8, 17)}), strict=True)
    ]
    rows = [Row.from_mask(row, mask) for row, mask in zip(tokens, masks, strict=True)]
    assert [row.supervised for row in rows] == [sum(mask) for mask in masks] == [5, 1, 10]
    assert [row.supervised_positions for row in rows] == [[n for n, here in enumerate(mask) if here] for mask in masks]
    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[2] * (longest - len(row))] for row in tokens])
    labels = torch.tensor(
        [
            [token if here else -100 for token, here in zip(row, mask, strict=True)] + [-100] * (longest - len(row))
            for row, mask in zip(tokens, masks, strict=True)
        ]
    )
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
    with torch.no_grad():
        wanted = model(ids, attention_mask=seen, labels=labels).loss
    lora = trainable(Lora.init(LoraConfig(), home.config, 0))
    for prefix in (0, 3):
        found = compute_losses(backend_for(home), lora, prefix, rows)
        assert found.ce_tokens == 16
        torch.testing.assert_close(found.ce.detach() / 16, wanted, **LOSS)


def test_a_row_without_gaps_is_the_plain_row() -> None:
    assert Row.from_mask([4, 5, 6, 7], [False, False, True, True]) == Row((4, 5, 6, 7), 2)
    assert Row.from_mask([4, 5, 6, 7], [False, True, False, True]) == Row((4, 5, 6, 7), 1, unsupervised=frozenset({2}))
