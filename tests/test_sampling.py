"""Which token comes next: exact where it is greedy, the right distribution where it is drawn."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fortwo.engine.sampling import Sampler, _nucleus, choose
from fortwo.records import Sampling

PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]
LOGITS = torch.tensor(PROBABILITIES).log()


def draws(n: int = 4000, logits: torch.Tensor = LOGITS, **settings: float) -> Counter[int]:
    sampler = Sampler(Sampling(seed=0, **{"temperature": 1.0, **settings}))  # type: ignore[arg-type]
    return Counter(sampler.draw(logits) for _ in range(n))


def test_greedy_is_the_exact_argmax_of_every_row() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [Sampler(Sampling()) for _ in range(64)]) == logits.argmax(-1).tolist()


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
        assert choose(logits[-1:], [alone])[0] == choose(logits, [*crowd, among])[-1]


def test_without_a_seed_two_requests_differ() -> None:
    first, second = (Sampler(Sampling(temperature=1.0)) for _ in range(2))
    flat = torch.zeros(1000)
    assert [first.draw(flat) for _ in range(8)] != [second.draw(flat) for _ in range(8)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_numbers_are_told_apart(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    logits[2, 4] = 1.0
    assert choose(logits, [Sampler(Sampling()) for _ in range(3)]) == [0, None, 4]
