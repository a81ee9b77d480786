"""What the benchmarks decide and show, on made-up measurements."""

from __future__ import annotations

import pytest
from rich.table import Table

from bench import coserving, learn, train
from bench.coserving import Job, figures
from bench.learn import ENDED, LATE, REACHED, Learned, ending, verdict
from bench.replicas import table
from bench.streams import Heard, lines
from bench.train import JUDGED, PEERS, WARM_UP, Run, best, rate, verdicts

FP32, BF16 = PEERS


def run(seconds: float, peak: int = 1) -> Run:
    """The first steps are slow, and one later."""
    return Run([*[100.0] * WARM_UP, seconds, seconds, 90.0], peak)


def rows(table: Table) -> list[list[str]]:
    """Cells, row by row."""
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


FOUND: train.Found = {
    FP32: {1: run(1.0, 300), 8: run(4.0, 900)},
    BF16: {1: run(2.0, 200), 8: run(16.0, 900)},
    "fortwo, fp32": {1: run(0.5, 350), 8: run(4.0, 900)},
    JUDGED: {1: run(0.125, 250), 8: run(0.8, 900)},
}


def test_a_rate_is_that_of_the_median_step_behind_the_warm_up() -> None:
    assert rate(run(4.0), 8) == 2.0


def test_the_best_batch_has_the_most_examples_a_second_not_the_shortest_steps() -> None:
    assert {name: best(runs) for name, runs in FOUND.items()} == {FP32: 8, BF16: 1, "fortwo, fp32": 1, JUDGED: 8}


def test_verdicts_take_the_faster_peer_and_the_one_with_less_memory() -> None:
    one, bests, memory = verdicts(FOUND)
    assert one.startswith("batch 1: 8.00 times")
    assert FP32 in one
    assert one.endswith("target 6: met")
    assert bests.startswith("each at its best batch: 5.00 times")
    assert f"{FP32} at 8" in bests
    assert BF16 in memory
    assert memory.endswith("target less: missed")


def test_every_trainer_is_shown_at_every_batch_beside_the_peers_at_the_same() -> None:
    shown = rows(train.show(FOUND, row_tokens=10.0))
    assert [row[:2] for row in shown] == [[name, batch] for batch in ("1", "8") for name in FOUND]
    assert shown[3][2:4] == ["8.00", "80"]
    assert shown[3][-2:] == ["8.00", "16.00"]
    assert shown[7][-2:] == ["5.00", "20.00"]


def test_steps_hold_enough_examples_and_are_enough() -> None:
    assert [train.steps_of(batch) - WARM_UP for batch in (1, 5, 20)] == [24, 5, 3]


@pytest.mark.parametrize(
    ("paraphrase", "seconds", "last", "why"),
    [
        (0.75, 10.0, False, None),
        (1.0, 10.0, False, REACHED),
        (1.0, 70.0, True, REACHED),
        (0.75, 10.0, True, ENDED),
        (0.75, 60.0, False, LATE),
        (0.0, 0.0, False, None),
    ],
)
def test_a_peer_goes_on_until_it_has_what_is_wanted_or_cannot_get_it(
    paraphrase: float, seconds: float, last: bool, why: str | None
) -> None:
    assert ending(paraphrase, wanted=0.9, seconds=seconds, patience=60.0, last=last) == why


@pytest.mark.parametrize(
    ("end", "seconds", "said"),
    [
        (REACHED, 49.0, "missed"),
        (REACHED, 50.0, "met"),
        (ENDED, 5.0, "met"),
        (LATE, 49.0, "open"),
        (LATE, 60.0, "met"),
    ],
)
def test_a_peer_that_was_stopped_too_early_proves_nothing(end: str, seconds: float, said: str) -> None:
    assert verdict(Learned(seconds, end, 0.5, 1.0, 0.9), own=10.0) == said


def test_who_never_learned_it_is_shown_without_a_factor() -> None:
    own = Learned(10.0, "succeeded", 0.92, 1.0, 0.97)
    peers = {"quick": Learned(80.0, REACHED, 1.0, 0.25, 0.5), "short": Learned(5.0, ENDED, 0.0, 1.0, 0.99)}
    table = learn.show(own, peers)
    assert table.columns[1].header == "s to 0.92"
    _, quick, short = rows(table)
    assert quick == ["quick", "80", "8.00", "met", "1.00", "0.25", "0.50"]
    assert short[1:3] == [f"never in 5: {ENDED}", ""]


def test_figures_count_what_came_within_the_window() -> None:
    early = Heard(sent=0.0, times=[1.0, 2.0, 5.0, 6.0], prompt=9, tokens=8)
    late = Heard(sent=4.0, times=[4.5, 7.5], prompt=9, tokens=2)
    found = figures([early, late], (4.0, 8.0))
    assert found.rate == (8 * 2 / 4 + 2 * 2 / 2) / 4
    assert found.first == [0.5]
    assert found.gaps == [3.0, 1.0, 3.0]


def test_a_step_lasts_as_long_as_the_clock_says_whoever_had_the_device() -> None:
    job = Job(began=10.0, steps=[20.0, 22.0, 26.0], ended=40.0)
    assert job.step == 3.0
    assert job.seconds == 30.0
    assert list(job.phases.values()) == [(10.0, 20.0), (20.0, 26.0), (26.0, 40.0)]


def test_a_jobs_slowdown_stands_beside_it() -> None:
    alone, beside = Job(0.0, [1.0, 2.0], 10.0), Job(0.0, [1.0, 3.5], 30.0)
    assert rows(coserving.show_jobs({640: (alone, beside)})) == [["640", "1.00", "2.50", "2.50", "10", "30", "3.00"]]


def test_most_waits_are_no_longer_than_the_95th_percentile() -> None:
    assert coserving.p95([float(value) for value in range(101)]) == 95.0


def test_lines_have_the_time_at_which_they_ended() -> None:
    pieces = [(1.0, b"data: a\n\nda"), (2.0, b"ta: b"), (3.0, b"\n\ndata: c\n")]
    assert [line for line in lines(pieces) if line[1]] == [(1.0, b"data: a"), (3.0, b"data: b"), (3.0, b"data: c")]
    assert list(lines([(1.0, b"cut")])) == [(1.0, b"cut")]


def test_what_a_replica_adds_is_the_median_of_the_pairs() -> None:
    def heard(*times: float) -> Heard:
        return Heard(1.0, list(times), 9, 5)

    own = [heard(1.1, 1.5), heard(1.2, 1.6), heard(1.3, 1.7)]
    replica = [heard(1.11, 1.55), heard(1.5, 1.9), heard(1.32, 1.76)]
    rows = list(zip(*(column.cells for column in table(own, replica).columns[1:]), strict=True))
    assert rows == [
        ("200.0", "320.0", "20.0"),
        ("100.0", "110.0", "10.0"),
        ("600.0", "760.0", "60.0"),
    ]
