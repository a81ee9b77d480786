"""Who is let in, who is told to come back and when, and how everybody goes."""

from __future__ import annotations

import asyncio

import pytest

from fortwo.errors import InvalidRequest, Overloaded, Unavailable
from fortwo.server.admission import Admission


class FakeRequest:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_places_are_taken_and_given_back() -> None:
    admission, first, second = Admission(4), FakeRequest(), FakeRequest()
    admission.admit(first, 3)
    with pytest.raises(Overloaded, match="limit of 4 replies: 3 run or wait"):
        admission.admit(second, 2)
    admission.admit(second, 1)
    admission.release(first, 2, seconds=1.0)
    admission.release(second, 1, seconds=1.0)
    assert admission.active == 1
    admission.admit(second, 3)
    admission.release(first, 1)
    admission.release(second, 3)
    assert admission.active == 0
    admission.release(second, 0)
    assert admission.active == 0


def test_what_never_fits_is_a_bad_request_and_not_a_matter_of_time() -> None:
    with pytest.raises(InvalidRequest, match="5 replies"):
        Admission(4).admit(FakeRequest(), 5)


def test_retry_after_is_when_that_many_places_become_free() -> None:
    admission, crowd = Admission(8), FakeRequest()
    admission.admit(crowd, 8)
    with pytest.raises(Overloaded) as at_first:
        admission.admit(FakeRequest(), 1)
    assert at_first.value.retry_after == 1
    for _ in range(200):
        admission.release(crowd, 1, seconds=39.0)
        admission.admit(crowd, 1)
    with pytest.raises(Overloaded) as one:
        admission.admit(FakeRequest(), 1)
    with pytest.raises(Overloaded) as four:
        admission.admit(FakeRequest(), 4)
    assert (one.value.retry_after, four.value.retry_after) == (5, 20)  # one of eight ends every 39 / 8 seconds


def test_draining_waits_for_who_goes_by_himself_and_stops_the_others() -> None:
    async def drain(seconds: float, goes: bool) -> tuple[FakeRequest, Admission]:
        admission, visitor = Admission(4), FakeRequest()
        admission.admit(visitor, 1)
        draining = asyncio.create_task(admission.drain(seconds))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            admission.admit(FakeRequest(), 1)
        if goes:
            admission.release(visitor, 1)
        await draining
        return visitor, admission

    visitor, admission = asyncio.run(drain(60, goes=True))
    assert not visitor.stopped
    assert admission.active == 0
    visitor, _ = asyncio.run(drain(0, goes=False))
    assert visitor.stopped
