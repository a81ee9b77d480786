"""Order of arrival, bounds, and the share of the device a job may take."""

from hypothesis import given
from hypothesis import strategies as st

from fortwo.engine.scheduler import FairShare, Scheduler, Sequence


def waiting(*lengths: int, limit: int = 32) -> tuple[Scheduler[Sequence], list[Sequence]]:
    scheduler: Scheduler[Sequence] = Scheduler(limit)
    sequences = [Sequence([0] * length, None) for length in lengths]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, sequences


def test_requests_run_in_order_of_arrival_up_to_the_limit() -> None:
    scheduler, sequences = waiting(1, 1, 1, limit=2)
    assert scheduler.admit(100) == sequences[:2]
    assert scheduler.admit(100) == []
    scheduler.remove(sequences[0])
    assert scheduler.admit(100) == [sequences[2]]
    assert scheduler.running == sequences[1:]


def test_a_turn_prefills_no_more_than_its_budget() -> None:
    scheduler, sequences = waiting(6, 4, 1)
    assert scheduler.admit(10) == sequences[:2]
    assert scheduler.admit(10) == sequences[2:]


def test_a_prompt_over_the_budget_is_admitted_alone_and_not_overtaken() -> None:
    scheduler, sequences = waiting(1, 50, 1)
    assert [scheduler.admit(10) for _ in range(3)] == [[sequences[0]], [sequences[1]], [sequences[2]]]


def test_a_request_leaves_from_wherever_it_is() -> None:
    scheduler, (first, second) = waiting(1, 1, limit=1)
    scheduler.admit(10)
    for sequence in scheduler:
        scheduler.remove(sequence)
    assert len(scheduler) == 0
    assert (first in scheduler.running, second in scheduler.waiting) == (False, False)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 5), st.integers(1, 50))
def test_everybody_gets_a_turn_and_the_bounds_hold(lengths: list[int], limit: int, budget: int) -> None:
    scheduler, sequences = waiting(*lengths, limit=limit)
    order: list[Sequence] = []
    while len(scheduler):
        admitted = scheduler.admit(budget)
        assert len(scheduler.running) <= limit
        assert len(admitted) <= 1 or sum(len(sequence.tokens) for sequence in admitted) <= budget
        order += admitted
        scheduler.remove(scheduler.running[0])
    assert order == sequences


def test_a_job_waits_until_requests_had_the_device_as_long_as_it_had() -> None:
    share = FairShare()
    assert share.job_may_run(requests=True)
    share.worked(0.3)
    share.served(0.2)
    assert not share.job_may_run(requests=True)
    share.served(0.1)
    assert share.job_may_run(requests=True)


def test_a_job_goes_on_at_once_when_nobody_asks() -> None:
    share = FairShare()
    share.worked(10)
    assert share.job_may_run(requests=False)
    assert not share.job_may_run(requests=True)
