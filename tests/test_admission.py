"""Admission control: the limit, Retry-After, and the end of requests at shutdown."""

from __future__ import annotations

import asyncio

import pytest

from fortwo.errors import InvalidRequest, Overloaded, Unavailable
from fortwo.server.admission import Admission


class FakeRequest:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_replies_are_counted_and_released() -> None:
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
    with pytest.raises(InvalidRequest, match="5 replies, but this server gives at most 4"):
        Admission(4).admit(FakeRequest(), 5)


def test_retry_after_is_when_that_many_replies_have_ended() -> None:
    admission, many = Admission(8), FakeRequest()
    admission.admit(many, 8)
    with pytest.raises(Overloaded) as at_first:
        admission.admit(FakeRequest(), 1)
    assert at_first.value.retry_after == 1
    for _ in range(200):
        admission.release(many, 1, seconds=39.0)
        admission.admit(many, 1)
    with pytest.raises(Overloaded) as one:
        admission.admit(FakeRequest(), 1)
    with pytest.raises(Overloaded) as four:
        admission.admit(FakeRequest(), 4)
    assert (one.value.retry_after, four.value.retry_after) == (5, 20)  # one of eight ends every 39 / 8 seconds


def test_draining_waits_for_requests_that_finish_and_stops_the_others() -> None:
    async def drain(seconds: float, finishes: bool) -> tuple[FakeRequest, Admission]:
        admission, request = Admission(4), FakeRequest()
        admission.admit(request, 1)
        draining = asyncio.create_task(admission.drain(seconds))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            admission.admit(FakeRequest(), 1)
        if finishes:
            admission.release(request, 1)
        await draining
        return request, admission

    request, admission = asyncio.run(drain(60, finishes=True))
    assert not request.stopped
    assert admission.active == 0
    request, _ = asyncio.run(drain(0, finishes=False))
    assert request.stopped
