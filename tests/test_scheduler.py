"""Order of arrival, bounds, and the share of the device a job may take."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from fortwo.engine.scheduler import FairShare, Scheduler, Sequence, split_budget


def waiting(*lengths: int, limit: int = 32) -> tuple[Scheduler[Sequence], list[Sequence]]:
    scheduler: Scheduler[Sequence] = Scheduler(limit)
    sequences = [Sequence([0] * length, None) for length in lengths]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, sequences


def turn(scheduler: Scheduler[Sequence], budget: int) -> dict[int, int]:
    """Admit and compute as the engine does; how many tokens of which request (by its number of tokens)."""
    while scheduler.waiting and scheduler.admits(scheduler.waiting[0].uncomputed, budget):
        scheduler.waiting[0].slot = SimpleNamespace(length=0)
        scheduler.start()
    prefilling = scheduler.prefilling
    computed = {}
    for sequence, length in zip(prefilling, split_budget([one.uncomputed for one in prefilling], budget), strict=True):
        assert sequence.slot is not None
        sequence.slot.length += length
        if length:
            computed[len(sequence.tokens)] = length
    return computed


def test_requests_run_in_order_of_arrival_up_to_the_limit() -> None:
    scheduler, sequences = waiting(2, 3, 4, limit=2)
    assert turn(scheduler, 100) == {2: 2, 3: 3}
    assert turn(scheduler, 100) == {}
    scheduler.remove(sequences[0])
    assert turn(scheduler, 100) == {4: 4}
    assert scheduler.running == sequences[1:]


def test_who_is_read_but_for_one_token_decodes() -> None:
    scheduler, (first, second) = waiting(5, 1)
    turn(scheduler, 4)
    assert (scheduler.decoding, scheduler.prefilling) == ([first, second], [])
    first.tokens += [0, 0]
    assert (scheduler.decoding, scheduler.prefilling) == ([second], [first])


def test_a_long_prompt_takes_several_turns_and_short_ones_pass_it() -> None:
    scheduler, _ = waiting(100, 10, 90, 11)
    assert turn(scheduler, 40) == {100: 30, 10: 10}  # the next long one must wait, and nobody passes who waits
    assert turn(scheduler, 40) == {100: 40}
    assert turn(scheduler, 40) == {100: 30, 90: 10}
    assert turn(scheduler, 40) == {90: 29, 11: 11}


def test_who_is_preempted_is_the_next_to_run() -> None:
    scheduler, (first, second, third) = waiting(2, 2, 2, limit=2)
    turn(scheduler, 10)
    scheduler.preempt(second)
    assert (scheduler.running, list(scheduler.waiting)) == ([first], [second, third])


def test_a_request_leaves_from_wherever_it_is() -> None:
    scheduler, (first, second) = waiting(2, 2, limit=1)
    turn(scheduler, 10)
    for sequence in scheduler:
        scheduler.remove(sequence)
    assert len(scheduler) == 0
    assert (first in scheduler.running, second in scheduler.waiting) == (False, False)


@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 50))
def test_shares_are_within_the_budget_and_the_first_always_goes_on(unread: list[int], budget: int) -> None:
    taken = split_budget(unread, budget)
    assert sum(taken) <= budget
    assert all(0 <= one <= all_ for one, all_ in zip(taken, unread, strict=True))
    assert sum(0 < one < all_ for one, all_ in zip(taken, unread, strict=True)) <= 1, "one prompt is cut at most"
    if unread:
        assert taken[0] >= min(unread[0], (budget + 1) // 2)


@given(st.lists(st.integers(2, 60), max_size=30), st.integers(1, 5), st.integers(1, 50))
def test_everybody_gets_a_turn_and_the_bounds_hold(lengths: list[int], limit: int, budget: int) -> None:
    scheduler, sequences = waiting(*lengths, limit=limit)
    order: list[Sequence] = []
    for _ in range(10_000):
        if not len(scheduler):
            break
        assert sum(turn(scheduler, budget).values()) <= budget
        assert len(scheduler.running) <= limit
        for sequence in [one for one in scheduler.running if one.uncomputed <= 1]:
            scheduler.remove(sequence)
            order.append(sequence)
    assert sorted(map(id, order)) == sorted(map(id, sequences))


def test_a_job_waits_until_requests_had_the_device_as_long_as_it_had() -> None:
    share = FairShare()
    assert share.job_may_run(requests=True)
    share.job_ran(0.3)
    share.requests_ran(0.2)
    assert not share.job_may_run(requests=True)
    share.requests_ran(0.1)
    assert share.job_may_run(requests=True)


def test_a_job_goes_on_at_once_when_nobody_asks() -> None:
    share = FairShare()
    share.job_ran(10)
    assert share.job_may_run(requests=False)
    assert not share.job_may_run(requests=True)
