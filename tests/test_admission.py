"""Who is let in, who is told to come back and when, and how everybody goes."""

from __future__ import annotations

import asyncio

import pytest

from fortwo.errors import InvalidRequest, Overloaded, Unavailable
from fortwo.server.admission import Admission


class Visitor:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_places_are_taken_and_given_back() -> None:
    admission, first, second = Admission(4), Visitor(), Visitor()
    admission.enter(first, 3)
    with pytest.raises(Overloaded, match="3 replies"):
        admission.enter(second, 2)
    admission.enter(second, 1)
    admission.leave(first, 2, seconds=1.0)
    admission.leave(second, 1, seconds=1.0)
    assert admission.open == 1
    admission.enter(second, 3)
    admission.leave(first, 1)
    admission.leave(second, 3)
    assert admission.open == 0
    admission.leave(second, 0)
    assert admission.open == 0


def test_what_never_fits_is_a_bad_request_and_not_a_matter_of_time() -> None:
    with pytest.raises(InvalidRequest, match="5 replies"):
        Admission(4).enter(Visitor(), 5)


def test_retry_after_is_when_that_many_places_become_free() -> None:
    admission, crowd = Admission(8), Visitor()
    admission.enter(crowd, 8)
    with pytest.raises(Overloaded) as at_first:
        admission.enter(Visitor(), 1)
    assert at_first.value.retry_after == 1
    for _ in range(200):
        admission.leave(crowd, 1, seconds=39.0)
        admission.enter(crowd, 1)
    with pytest.raises(Overloaded) as one:
        admission.enter(Visitor(), 1)
    with pytest.raises(Overloaded) as four:
        admission.enter(Visitor(), 4)
    assert (one.value.retry_after, four.value.retry_after) == (5, 20)  # one of eight ends every 39 / 8 seconds


def test_draining_waits_for_who_goes_by_himself_and_stops_the_others() -> None:
    async def drain(seconds: float, goes: bool) -> tuple[Visitor, Admission]:
        admission, visitor = Admission(4), Visitor()
        admission.enter(visitor, 1)
        draining = asyncio.create_task(admission.drain(seconds))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            admission.enter(Visitor(), 1)
        if goes:
            admission.leave(visitor, 1)
        await draining
        return visitor, admission

    visitor, admission = asyncio.run(drain(60, goes=True))
    assert not visitor.stopped
    assert admission.open == 0
    visitor, _ = asyncio.run(drain(0, goes=False))
    assert visitor.stopped
