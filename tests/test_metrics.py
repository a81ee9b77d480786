"""Shares, their intervals, and what is made of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.facts.metrics import score, share, targets_met
from fortwo.records import Metric

counts = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),  # likewise
        (0, 20, 0.0, 0.1611),  # likewise
        (1, 29, 0.0061, 0.1718),  # likewise
    ],
)
def test_the_interval_is_wilsons(hits: int, n: int, low: float, high: float) -> None:
    metric = share(hits, n)
    assert (metric.value, metric.n) == (hits / n, n)
    assert (metric.low, metric.high) == pytest.approx((low, high), abs=5e-5)


def test_of_nothing_nothing_is_known() -> None:
    assert share(0, 0) == Metric(0.0, 0, 0.0, 1.0)


@given(counts)
def test_the_interval_holds_the_share_and_mirrors(count: tuple[int, int]) -> None:
    hits, n = count
    metric, other = share(hits, n), share(n - hits, n)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    assert (other.low, other.high) == pytest.approx((1 - metric.high, 1 - metric.low))


@given(counts)
def test_more_of_the_same_narrows_the_interval(count: tuple[int, int]) -> None:
    once, twice = share(*count), share(2 * count[0], 2 * count[1])
    assert twice.high - twice.low < once.high - once.low


def test_the_score_is_the_harmonic_mean() -> None:
    found = score({"a": Metric(1.0, 20, 0.5, 1.0), "b": Metric(0.5, 10, 0.25, 1.0)})
    assert (found.value, found.n) == (pytest.approx(2 / 3), 10)
    assert (found.low, found.high) == (pytest.approx(1 / 3), 1.0)
    assert score({"a": share(0, 10), "b": share(10, 10)}).value == 0
    assert score({"a": share(7, 10)}).value == pytest.approx(0.7)


@given(st.lists(counts, min_size=1, max_size=5))
def test_the_score_lies_between_the_shares(found: list[tuple[int, int]]) -> None:
    metrics = {str(place): share(*count) for place, count in enumerate(found)}
    values = [metric.value for metric in metrics.values()]
    assert min(values) - 1e-9 <= score(metrics).value <= max(values) + 1e-9


def test_targets_are_met_by_the_value_alone() -> None:
    metrics = {"efficacy": share(9, 10), "retention": share(0, 0)}
    assert targets_met(metrics, {"efficacy": 0.9})
    assert not targets_met(metrics, {"efficacy": 0.91})
    assert not targets_met(metrics, {"efficacy": 0.5, "retention": 0.5})
    assert targets_met(metrics, {"efficacy": 0.0, "retention": 0.0})
    assert targets_met(metrics, {})
    assert targets_met(metrics, {"specificity": 1.0})  # nothing of that kind was asked


def test_a_margin_asks_for_part_of_what_is_left() -> None:
    found = {"paraphrase": share(18, 20)}
    assert targets_met(found, {"paraphrase": 0.9})
    assert not targets_met(found, {"paraphrase": 0.9}, margin=0.5)
    assert targets_met({"paraphrase": share(20, 20)}, {"paraphrase": 0.9}, margin=0.5)
    assert targets_met(found, {"paraphrase": 0}, margin=0.5)
