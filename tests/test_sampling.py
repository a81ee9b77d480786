"""Which token comes next: exact where it is greedy, the right distribution where it is drawn."""

import json
import math
from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from fortwo.data.json_constraint import Vocabulary
from fortwo.engine.sampling import SampledToken, Sampler, _nucleus, sample
from fortwo.errors import UnsupportedModel
from fortwo.prompts import NON_FINITE_LOGITS, Sampling

PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]
LOGITS = torch.tensor(PROBABILITIES).log()


def draws(n: int = 4000, logits: torch.Tensor = LOGITS, **settings: float) -> Counter[int]:
    sampler = Sampler(Sampling(seed=0, **{"temperature": 1.0, **settings}))  # type: ignore[arg-type]
    return Counter(sampler.draw(logits) for _ in range(n))


def test_greedy_is_the_exact_argmax_of_every_row() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [Sampler(Sampling()) for _ in range(64)]) == [
        SampledToken(best) for best in logits.argmax(-1)
    ]


def test_temperature_1_draws_from_the_softmax() -> None:
    counts = draws()
    for token, probability in enumerate(PROBABILITIES):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    squared = [p * p for p in PROBABILITIES]
    counts = draws(temperature=0.5)
    for token, weight in enumerate(squared):
        assert counts[token] / 4000 == pytest.approx(weight / sum(squared), abs=0.03)
    assert draws(temperature=1e-6) == {1: 4000}
    assert max(draws(temperature=1e6).values()) / 4000 < 0.25


def test_numbers_that_overflow_still_choose_the_likeliest() -> None:
    """A token that does not exist would end the whole batch's next step."""
    assert draws(temperature=5e-324) == draws(temperature=1e-310) == {1: 4000}
    said = Sampler(Sampling(temperature=1.0, repetition_penalty=1e-45, seed=0), [3])
    assert {said.sample(LOGITS + 5).token for _ in range(50)} == {3}


def test_top_k_keeps_the_k_likeliest_and_their_proportions() -> None:
    counts = draws(top_k=2)
    assert set(counts) == {1, 3}
    assert counts[1] / 4000 == pytest.approx(4 / 7, abs=0.03)
    assert draws(top_k=1) == {1: 4000}
    assert draws(top_k=0) == draws(top_k=99) == draws()


def test_top_k_among_equals_keeps_exactly_k() -> None:
    assert len(draws(logits=torch.zeros(10), top_k=3)) == 3


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {1}), (0.39, {1}), (0.5, {1, 3}), (0.71, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})]
)
def test_top_p_keeps_the_fewest_that_hold_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(top_p=top_p)) == kept


@given(st.integers(0, 1000), st.floats(0, 0.999), st.sampled_from([0.01, 1.0, 20.0]))
def test_the_nucleus_is_the_shortest_beginning_of_the_sorted_tokens(seed: int, top_p: float, spread: float) -> None:
    logits = spread * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    weights = torch.softmax(logits.double(), -1)
    total, expected = 0.0, []
    for token in weights.argsort(descending=True, stable=True).tolist():
        expected.append(token)
        total += float(weights[token])
        if total >= top_p:
            break
    assert _nucleus(weights, top_p).tolist() == expected


def test_top_p_counts_what_top_k_left_over() -> None:
    assert set(draws(top_k=2, top_p=0.5)) == {1}  # 0.4 of 0.7 is more than half


@pytest.mark.parametrize("vocabulary", [3, 7, 49, 49152])
def test_a_tiny_top_p_among_equals_keeps_one(vocabulary: int) -> None:
    assert len(_nucleus(torch.softmax(torch.zeros(vocabulary).double(), -1), 1e-12)) == 1


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draws(logits=logits)) == {1, 3}


@given(st.integers(-(2**70), 2**70), st.integers(1, 12))
def test_a_seed_gives_the_same_draws_whatever_else_is_in_the_batch(seed: int, others: int) -> None:
    logits = torch.randn(others + 1, 50, generator=torch.Generator().manual_seed(others))
    settings = Sampling(temperature=1.3, top_p=0.9, top_k=20, seed=seed)
    alone, among = Sampler(settings), Sampler(settings)
    crowd = [Sampler(Sampling(temperature=0.7 * (i % 2), seed=i)) for i in range(others)]
    for _ in range(3):
        assert sample(logits[-1:], [alone])[0] == sample(logits, [*crowd, among])[-1]


def test_without_a_seed_two_requests_differ() -> None:
    first, second = (Sampler(Sampling(temperature=1.0)) for _ in range(2))
    flat = torch.zeros(1000)
    assert [first.draw(flat) for _ in range(8)] != [second.draw(flat) for _ in range(8)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_numbers_are_told_apart(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    logits[2, 4] = 1.0
    assert sample(logits, [Sampler(Sampling()) for _ in range(3)]) == [
        SampledToken(0),
        NON_FINITE_LOGITS,
        SampledToken(4),
    ]


# ---------------------------------------------------------------- what bends the choice


def random_logits(seed: int, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@hypothesis.settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 1), st.integers(0, 60), st.floats(0.1, 1), st.floats(0.3, 3))
def test_what_can_be_drawn_is_what_transformers_leaves(
    seed: int, min_p: float, top_k: int, top_p: float, temperature: float
) -> None:
    logits = random_logits(seed).double()
    left = logits[None] / temperature
    for filter in (MinPLogitsWarper(min_p), TopKLogitsWarper(top_k or 50), TopPLogitsWarper(top_p)):
        left = filter(torch.zeros(1, 0, dtype=torch.long), left)
    possible = set(left[0].isfinite().nonzero().squeeze(-1).tolist())
    settings = Sampling(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed)
    sampler = Sampler(settings)
    assert {sampler.draw(logits) for _ in range(20)} <= possible


def test_min_p_counts_from_the_likeliest() -> None:
    assert set(draws(min_p=0.3)) == {1, 3, 4}  # 0.15 / 0.4 is above, 0.1 / 0.4 below
    assert set(draws(min_p=1)) == {1}
    assert draws(min_p=0) == draws()


def greedy(logits: torch.Tensor, count: int, prompt: tuple[int, ...] = (), **settings: float) -> list[int]:
    """So many tokens from logits that stay the same."""
    sampler = Sampler(Sampling(**settings), prompt)  # type: ignore[arg-type]
    return [sampler.sample(logits).token for _ in range(count)]


def test_penalties_act_as_vllm_documents_them() -> None:
    logits = torch.tensor([3.0, 2.5, 1.0])
    assert greedy(logits, 3) == [0, 0, 0]
    assert greedy(logits, 4, presence_penalty=1.0) == [0, 1, 0, 0]  # once for a token, however often it came
    assert greedy(logits, 6, frequency_penalty=0.4) == [0, 0, 1, 0, 1, 0]  # each time: 3, 2.6, (2.2, 2.5), ...
    assert greedy(logits, 3, presence_penalty=-1.0, logit_bias=((1, 0.6),)) == [1, 1, 1]
    assert greedy(logits, 1, (0, 0), presence_penalty=2.0) == [0], "the prompt's tokens are not the reply's"
    assert greedy(logits, 1, (0,), repetition_penalty=1.5) == [1], "here they count"


@hypothesis.settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.5, 2), st.lists(st.integers(0, 49), max_size=8))
def test_the_repetition_penalty_is_that_of_transformers(seed: int, penalty: float, prompt: list[int]) -> None:
    logits, said = random_logits(seed), list(prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for token in greedy(logits, 12, tuple(prompt), repetition_penalty=penalty):
        expected = processor(torch.tensor([said], dtype=torch.long), logits[None].clone())[0]
        assert expected[token] == pytest.approx(float(expected.max()), abs=1e-5)
        said.append(token)


def test_a_bias_forces_and_forbids() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0, logit_bias=((0, 100.0),)))
    assert {sampler.sample(LOGITS).token for _ in range(100)} == {0}
    sampler = Sampler(Sampling(temperature=1.0, seed=0, logit_bias=((1, -100), (3, -100.0))))
    assert {sampler.sample(LOGITS).token for _ in range(300)} == {0, 2, 4}
    assert LOGITS.exp().tolist() == pytest.approx(PROBABILITIES), "the row itself is left as it was"


def test_logprobs_are_the_models_own_whatever_bends_the_choice() -> None:
    settings = Sampling(
        temperature=0.3, seed=1, logprobs=2, logit_bias=((0, 100.0),), presence_penalty=1, repetition_penalty=1.5
    )
    ((token, told),) = sample(LOGITS[None], [Sampler(settings, (1, 2))])
    assert (token, told.token) == (0, 0)
    assert math.exp(told.logprob) == pytest.approx(0.05)
    assert [token for token, _ in told.top] == [1, 3]
    assert [math.exp(value) for _, value in told.top] == pytest.approx([0.4, 0.3])
    assert sample(LOGITS[None], [Sampler(Sampling(logprobs=0))])[0].logprob.top == ()
    assert len(sample(LOGITS[None], [Sampler(Sampling(logprobs=20))])[0].logprob.top) == 5


def test_a_schema_leaves_only_tokens_that_fit() -> None:
    letters = {letter: number for number, letter in enumerate(["</s>", *'{}":ax1Ġ'])}
    spec = {"type": "BPE", "vocab": letters, "merges": []}
    special = {"id": 0, "content": "</s>", "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    backend = Tokenizer.from_str(json.dumps({"version": "1.0", "model": spec, "added_tokens": [special]}))
    with pytest.raises(UnsupportedModel):
        Vocabulary(backend, [0])
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(backend, [0])
    logits = random_logits(0, 12)  # more than the tokenizer has: some models pad
    logits[9:] = 50
    for seed in range(5):
        constraint = vocabulary.constraint('{"enum": ["a", "xx", 11]}')
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), constraint=constraint)
        tokens: list[int] = []
        while not tokens or tokens[-1] != 0:
            (chosen,) = sample(logits[None], [sampler])
            assert isinstance(chosen, SampledToken), chosen
            tokens.append(chosen.token)
        assert b"".join(map(vocabulary.token_bytes, tokens[:-1])) in (b'"a"', b'"xx"', b"11")


def test_rows_that_ask_for_more_leave_plain_ones_as_they_are() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(4)])
    samplers = [
        Sampler(Sampling()),
        Sampler(Sampling(logit_bias=((7, 100),), logprobs=1)),
        Sampler(Sampling()),
        Sampler(Sampling(frequency_penalty=2)),
    ]
    best = logits.argmax(-1).tolist()
    assert [row.token for row in sample(logits, samplers)] == [best[0], 7, best[2], best[3]]
